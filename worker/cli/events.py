"""The commands that record usage and ask before it: `emit`, `check`, `charge`, `remaining` and `plan-backend`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.io import (
    DONE,
    REFUSED,
    amount_or_quantity,
    open_billing,
    parse_dimensions,
    print_answer,
    print_fields,
    read_lines,
)
from worker.cli.options import (
    AmountArgument,
    BackendOption,
    DimensionOption,
    JsonOption,
    MeterArgument,
    ModelOption,
    MultiplierOption,
    RelayMeterOption,
    SourceOption,
    TierOption,
    UnitsArgument,
    User,
)
from worker.errors import BadInput
from worker.rules.words import counted

if TYPE_CHECKING:
    from worker.client import Billing

app = typer.Typer()


@app.command()
def emit(
    file: Annotated[str, typer.Argument(help="JSON lines, one event each; - for standard input")],
    raw: Annotated[bool, typer.Option(help="plain XADD, as from a producer in another language")] = False,
    as_json: JsonOption = False,
) -> None:
    """Append events: all lines if all are valid, else none. --raw sends lines without this check.

    Both sign if a key is set.
    """
    lines = read_lines(file)
    spooled = 0
    with open_billing() as billing:
        if raw:
            sent = _emit_raw(billing, lines)
        else:
            answers = billing.emit_events(_parsed_events(billing, lines))
            spooled = sum(answer.spooled for answer in answers)
            sent = len(answers) - spooled
    sentence = f"{counted(sent, 'event')} sent" + (f", {spooled:,} spooled" if spooled else "")
    print_answer(sentence, {"sent": sent, "spooled": spooled}, as_json)


@app.command()
def check(
    user: User,
    meter: MeterArgument,
    amount: AmountArgument = 1,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check whether a user may spend an amount now. Exit code 1 if not."""
    from worker.rules.explanations import explain_check

    with open_billing() as billing:
        answer = billing.check(user, meter, amount, backend=backend)
    print_fields(answer.model_copy(update={"explanation": explain_check(answer)}).model_dump(mode="json"), as_json)
    raise typer.Exit(DONE if answer.allowed else REFUSED)


@app.command()
def charge(
    user: User,
    meter: MeterArgument,
    amount: UnitsArgument,
    event_id: Annotated[str, typer.Argument(help="id of the event; a repeat is harmless")],
    source: SourceOption = None,
    dimension: DimensionOption = None,
    backend: BackendOption = None,
    model: ModelOption = None,
    multiplier: MultiplierOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check and record in one step."""
    units, quantity = amount_or_quantity(amount, model, multiplier)
    with open_billing() as billing:
        facts = parse_dimensions(dimension)
        answer = billing.charge(
            user, meter, units, event_id, quantity=quantity, model_slug=model, multiplier=multiplier,
            source=source, dimensions=facts, backend=backend,
        )  # fmt: skip
    print_fields(answer.model_dump(mode="json"), as_json)


@app.command()
def remaining(
    user: User, meter: RelayMeterOption = "relay_credits", tier: TierOption = None, as_json: JsonOption = False
) -> None:
    """Show the units left of a meter, in all and per capped backend."""
    with open_billing() as billing:
        answer = billing.remaining(user, meter, tier=tier)
    fields = answer.model_dump(mode="json")
    if not as_json:
        fields["backends"] = {each.backend: f"{each.remaining} of {each.cap}" for each in answer.backends}
    print_fields(fields, as_json)


@app.command("plan-backend")
def plan_backend(
    user: User,
    preference: Annotated[str, typer.Argument(help="gemini_first, hardware_first, gemini_only or hardware_only")],
    hardware: Annotated[bool, typer.Option("--hardware", help="the host has hardware of its own")] = False,
    meter: RelayMeterOption = "relay_credits",
    tier: TierOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pick the backend for a request of a user. Exit code 1 if none can take it."""
    with open_billing() as billing:
        answer = billing.plan_backend(user, preference, has_hardware=hardware, meter=meter, tier=tier)
    print_fields(answer.model_dump(mode="json"), as_json)
    raise typer.Exit(DONE if answer.allowed else REFUSED)


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


def _parsed_events(billing: Billing, lines: Iterable[str]) -> list[Any]:
    from pydantic import ValidationError

    from schemas.events import UsageEvent
    from worker.client.recording import priced, refusal_of
    from worker.errors import InvalidRequest

    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(priced(billing.context, UsageEvent.model_validate_json(line)))
        except InvalidRequest as error:
            raise BadInput(f"line {number}: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            said = refusal_of(error) if first["type"] != "json_invalid" and first["loc"] else f"event: {first['msg']}"
            raise BadInput(f"line {number}: {said}") from None
    return events


def _emit_raw(billing: Billing, lines: Sequence[str]) -> int:
    """XADD each line unchanged, to the partition of its user. Raises BadInput without a user."""
    from worker.keyspace.entries import plain_entry

    with billing.redis.pipeline(transaction=False) as pipe:
        for number, line in enumerate(lines, start=1):
            try:
                user_id = json.loads(line)["user_id"].encode("utf-8").decode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise BadInput(f"line {number}: user_id: missing; it decides the stream") from None
            fields = plain_entry(line.encode(), billing.context.signer)
            pipe.xadd(billing.context.partition(user_id).entries, fields)
        return len(pipe.execute())
