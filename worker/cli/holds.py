"""The commands about holds: `reserve`, `capture`, `settle`, `release` and `holds …`."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.confirm import asks, confirm
from worker.cli.io import (
    amount_or_quantity,
    open_billing,
    open_resources,
    parse_dimensions,
    print_fields,
    print_rows,
)
from worker.cli.options import (
    BackendOption,
    DimensionOption,
    EventArgument,
    EventOption,
    HoldKeyArgument,
    JsonOption,
    LimitOption,
    MeterArgument,
    ModelOption,
    MultiplierOption,
    SourceOption,
    TtlOption,
    UnitsArgument,
    User,
    YesOption,
)
from worker.errors import BadInput

app = typer.Typer()
holds_app = typer.Typer(no_args_is_help=True, help="Look at holds, extend and release them.")
app.add_typer(holds_app, name="holds")


@app.command()
def reserve(
    user: User,
    meter: MeterArgument,
    amount: UnitsArgument,
    key: HoldKeyArgument,
    ttl_seconds: TtlOption = None,
    backend: BackendOption = None,
    model: ModelOption = None,
    multiplier: MultiplierOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an amount, and hold it if allowed."""
    units, quantity = amount_or_quantity(amount, model, multiplier)
    with open_billing() as billing:
        hold = billing.reserve(
            user, meter, units, key, ttl_seconds,
            quantity=quantity, model_slug=model, multiplier=multiplier, backend=backend,
        )  # fmt: skip
    print_fields(hold.answer.model_dump(mode="json"), as_json)


@app.command()
def capture(
    user: User,
    meter: MeterArgument,
    key: HoldKeyArgument,
    event_id: EventArgument,
    amount: UnitsArgument,
    source: SourceOption = None,
    dimension: DimensionOption = None,
    backend: BackendOption = None,
    model: ModelOption = None,
    multiplier: MultiplierOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bill a part of a hold as one event."""
    units, quantity = amount_or_quantity(amount, model, multiplier)
    with open_billing() as billing:
        facts = parse_dimensions(dimension)
        answer = billing.capture(
            user, meter, key, event_id, units, quantity=quantity, model_slug=model, multiplier=multiplier,
            source=source, dimensions=facts, backend=backend,
        )  # fmt: skip
    print_fields(answer.model_dump(mode="json"), as_json)


@app.command()
def settle(
    user: User,
    meter: MeterArgument,
    key: HoldKeyArgument,
    actual: UnitsArgument,
    event_id: EventOption = None,
    source: SourceOption = None,
    dimension: DimensionOption = None,
    backend: BackendOption = None,
    model: ModelOption = None,
    multiplier: MultiplierOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bill the real amount of a hold as one event, and close the hold."""
    units, quantity = amount_or_quantity(actual, model, multiplier)
    with open_billing() as billing:
        facts = parse_dimensions(dimension)
        answer = billing.settle(
            user, meter, key, units, quantity=quantity, model_slug=model, multiplier=multiplier,
            event_id=event_id, source=source, dimensions=facts, backend=backend,
        )  # fmt: skip
    print_fields(answer.model_dump(mode="json"), as_json)


@app.command()
def release(user: User, meter: MeterArgument, key: HoldKeyArgument, as_json: JsonOption = False) -> None:
    """Release a hold. One that is not remembered leaves nothing to do, which it says."""
    with open_billing() as billing:
        answer = billing.release(user, meter, key)
    print_fields(answer.model_dump(mode="json"), as_json)
    if answer.state == "unknown" and not as_json:
        typer.echo(
            f"no hold {key} of {user} is remembered on {meter}: nothing was released. Its key or meter is wrong, or it "
            "ended long ago"
        )


@holds_app.command("list")
def holds_list(
    user: Annotated[str | None, typer.Option(help="only holds of this user")] = None,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List open holds."""
    from worker.reports.holds import open_holds

    with open_resources() as resources:
        print_rows([hold._asdict() for hold in open_holds(resources, user, limit)], as_json)


@holds_app.command("show")
def holds_show(user: User, key: HoldKeyArgument, as_json: JsonOption = False) -> None:
    """Show a hold as Redis remembers it."""
    from worker.reports.holds import find_hold

    with open_resources() as resources:
        record = find_hold(resources, user, key)
    if not record:
        raise BadInput(f"key: no hold {key} of {user} is remembered")
    print_fields(record, as_json)


@holds_app.command("extend")
def holds_extend(
    user: User,
    meter: MeterArgument,
    key: HoldKeyArgument,
    ttl_seconds: TtlOption = None,
    amount: Annotated[
        int | None, typer.Option(help="units in all, after the multiplier, captured parts among them")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let an open hold live on, or hold another amount. Without an option it lives on as long as a new one."""
    with open_billing() as billing:
        answer = billing.extend(user, meter, key, ttl_seconds=ttl_seconds, amount=amount)
    print_fields(answer.model_dump(mode="json"), as_json)


@holds_app.command("release")
def holds_release(
    user: User, meter: MeterArgument, key: HoldKeyArgument, yes: YesOption = False, as_json: JsonOption = False
) -> None:
    """Release a hold; the same as `meterfall release`, which services call and which never asks."""
    from worker.reports.holds import find_hold

    if asks(yes=yes, is_final=False):
        with open_resources() as resources:
            held = int(find_hold(resources, user, key).get("amount", 0))
            limit = resources.settings.confirm_amount_units
        if held > limit:
            confirm(f"release hold {key} of {user}: {meter} held {held:,} → 0", yes=yes, is_final=False)
    release(user, meter, key, as_json=as_json)
