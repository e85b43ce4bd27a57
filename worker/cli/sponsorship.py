"""The commands about the sponsorship pool, `meterfall pool …`, and `meterfall estimate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.confirm import asks, confirm
from worker.cli.io import (
    DONE,
    REFUSED,
    open_billing,
    open_resources,
    print_fields,
    print_json,
    print_rows,
    read_settings,
)
from worker.cli.options import (
    BackendOption,
    EstimateArgument,
    JsonOption,
    MeterArgument,
    PaidArgument,
    RequestArgument,
    SponsoredUser,
    TtlOption,
    User,
    YesOption,
)

if TYPE_CHECKING:
    from schemas.answers import EstimateAnswer

app = typer.Typer()
pool_app = typer.Typer(no_args_is_help=True, help="Cover requests of trusted accounts from the sponsorship pool.")
app.add_typer(pool_app, name="pool")

MAX_GRANTS = 1_000
_GRANT_COLUMNS = ("user_id", "held", "actual", "paid", "absorbed", "pool_after", "tier", "late", "created_at")
# Digits of a request's hash shown in a table.
_SHOWN_DIGITS = 12


@pool_app.command("status")
def pool_status(
    grants: Annotated[int, typer.Option(min=0, max=MAX_GRANTS, help="newest grants to list")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Show balance, held units, units absorbed today, budgets, and the last grants."""
    from worker.reports.sponsorship import read_pool_status

    with open_resources() as resources:
        found = read_pool_status(resources, grants)
    # A table has no room for a trace.
    columns = (*_GRANT_COLUMNS, "trace_id") if as_json else _GRANT_COLUMNS
    rows = [
        {"request": grant.request_hash.hex(), **{name: getattr(grant, name) for name in columns}}
        for grant in found.grants
    ]
    if as_json:
        print_json({**found._asdict(), "grants": rows})
        return
    fields = found._asdict()
    del fields["grants"]
    print_fields(fields, as_json=False)
    print_rows([{**row, "request": row["request"][:_SHOWN_DIGITS]} for row in rows], as_json=False)


@pool_app.command("credit")
def pool_credit(
    request: RequestArgument, paid: PaidArgument, yes: YesOption = False, as_json: JsonOption = False
) -> None:
    """Credit the pool with its share of paid work that it did not sponsor."""
    from schemas.events import MAX_AMOUNT

    if read_settings().confirm_amount_units < paid <= MAX_AMOUNT and asks(yes=yes, is_final=True):
        confirm(_credit_in_words(paid), yes=yes, is_final=True)
    with open_billing() as billing:
        print_fields(billing.credit_pool(request, paid).model_dump(mode="json"), as_json)


@pool_app.command("decide")
def pool_decide(
    user: SponsoredUser,
    estimate: EstimateArgument,
    request: RequestArgument,
    ttl_seconds: TtlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decide whether the pool pays: `free` holds at once, `partial` is advice, `gate` exits with 1."""
    from schemas.answers import Serve

    with open_billing() as billing:
        answer = billing.decide(user, estimate, request, ttl_seconds=ttl_seconds)
    print_fields(answer.model_dump(mode="json"), as_json)
    raise typer.Exit(REFUSED if answer.serve is Serve.GATE else DONE)


@pool_app.command("confirm")
def pool_confirm(
    user: User,
    estimate: EstimateArgument,
    request: RequestArgument,
    paid: PaidArgument,
    ttl_seconds: TtlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold the pool's part once the user has paid the rest. It may be less; exit code 1 if it is nothing."""
    from schemas.answers import Serve

    with open_billing() as billing:
        answer = billing.confirm_partial(user, estimate, request, paid=paid, ttl_seconds=ttl_seconds)
    print_fields(answer.model_dump(mode="json"), as_json)
    raise typer.Exit(REFUSED if answer.serve is Serve.GATE else DONE)


@pool_app.command("settle")
def pool_settle(
    user: User,
    request: RequestArgument,
    actual: Annotated[int, typer.Argument(help="units that the whole request cost")],
    paid: Annotated[int | None, typer.Option(help="units paid by the user; default as confirmed")] = None,
    as_json: JsonOption = False,
) -> None:
    """Record the units that the pool absorbs, and release the rest of the hold."""
    with open_billing() as billing:
        answer = billing.settle_sponsored(user, request, actual, paid=paid)
    print_fields(answer.model_dump(mode="json"), as_json)


@pool_app.command("release")
def pool_release(
    user: User,
    request: RequestArgument,
    reason: Annotated[str, typer.Argument(help="why, in a few words")],
    as_json: JsonOption = False,
) -> None:
    """Release the hold of a request."""
    with open_billing() as billing:
        print_fields(billing.release_sponsored(user, request, reason).model_dump(mode="json"), as_json)


@app.command()
def estimate(
    user: User,
    meter: MeterArgument,
    quantity: Annotated[int, typer.Argument(help="units, before the multiplier")],
    model: Annotated[str | None, typer.Option(help="model whose multiplier counts")] = None,
    multiplier: Annotated[str | None, typer.Option(help="decimal, instead of a model's")] = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the cost, the buckets that would pay, and the pool's part; change nothing. Exit code 1 if refused."""
    with open_billing() as billing:
        answer = billing.estimate(user, meter, quantity, model_slug=model, multiplier=multiplier, backend=backend)
    if as_json:
        print_json(answer.model_dump(mode="json"))
    else:
        print_fields(_in_words(answer), as_json=False)
    raise typer.Exit(DONE if answer.allowed or answer.allowed_with_pool else REFUSED)


def _credit_in_words(paid: int) -> str:
    """Say what a payment does to the pool."""
    from worker.reports.sponsorship import read_pool_status
    from worker.rules.sponsorship import credit_of

    with open_resources() as resources:
        before = read_pool_status(resources, grants=0).balance
        credited = credit_of(paid, resources.catalogue.sponsorship.paid_share_percent)
    return f"credit pool: balance {before:,} → {before + credited:,}"


def _in_words(answer: EstimateAnswer) -> dict[str, object]:
    """Return an estimate for people: price, answer of the check, buckets that would pay, the pool's part."""
    from worker.rules.explanations import explain_check

    pool = answer.sponsorship
    return {
        **answer.model_dump(include={"user_id", "meter", "quantity", "multiplier", "amount", "allowed"}),
        "check": explain_check(answer.check),
        **(answer.expected.model_dump() if answer.expected else {}),
        "pool": f"{pool.serve.value}: absorbs {pool.absorb}, leaves {pool.charge} to charge ({pool.reason.value})",
        "allowed_with_pool": answer.allowed_with_pool,
    }
