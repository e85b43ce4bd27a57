"""The commands about plans and accounts: `meterfall plans` and `meterfall account …`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from config.catalogue import load_catalogue
from worker.cli_io import (
    AmountArgument,
    JsonOption,
    MeterArgument,
    User,
    open_tools,
    parse_time,
    parse_units,
    print_json,
    print_rows,
    read_settings,
)

if TYPE_CHECKING:
    from worker.snapshot import Account

account_app = typer.Typer(no_args_is_help=True, help="Open and change accounts.")


def plans(as_json: JsonOption = False) -> None:
    """The plans of the catalogue."""
    rows = [
        {
            "plan": code,
            "tier": plan.tier,
            "month_cents": plan.price_month_cents,
            "year_cents": plan.price_year_cents,
            "meter": meter,
            "quantity": "unlimited" if allowance.quantity is None else allowance.quantity,
            "cadence": allowance.cadence,
            "rollover_cap": allowance.rollover_cap,
        }
        for code, plan in load_catalogue(read_settings().catalogue_path).plans.items()
        if plan.active
        for meter, allowance in plan.meters.items()
    ]
    print_rows(rows, as_json)


@account_app.command("open")
def account_open(
    user: User,
    plan: Annotated[str, typer.Argument(help="plan code; see `meterfall plans`")],
    status: Annotated[str, typer.Option(help="active, trialing, …")] = "active",
    period_start: Annotated[str | None, typer.Option(help="ISO 8601 with offset; default now")] = None,
    period_end: Annotated[str | None, typer.Option(help="ISO 8601 with offset; default open")] = None,
    rollover: Annotated[list[str] | None, typer.Option(help="meter=units brought along, debt below 0")] = None,
    as_json: JsonOption = False,
) -> None:
    """Open an account."""
    from worker import accounts

    start, end = parse_time("period-start", period_start), parse_time("period-end", period_end)
    with open_tools() as tools:
        account = accounts.open_new(
            tools, user, plan, status=status, start=start, end=end, rollover=parse_units("rollover", rollover)
        )
    _print_account(account, as_json)


@account_app.command("show")
def account_show(user: User, as_json: JsonOption = False) -> None:
    """An account and its balances, as the ledger has them."""
    from worker import accounts

    with open_tools() as tools:
        _print_account(accounts.show(tools, user), as_json)


@account_app.command("set-status")
def account_set_status(
    user: User,
    status: Annotated[str, typer.Argument(help="active, past_due, trialing, canceled, expired, paused, unpaid")],
    as_json: JsonOption = False,
) -> None:
    """Set the status; only entitled accounts have an allowance."""
    from worker import accounts

    with open_tools() as tools:
        _print_account(accounts.set_status(tools, user, status).account, as_json)


@account_app.command("grant")
def account_grant(
    user: User,
    meter: MeterArgument,
    amount: AmountArgument,
    key: Annotated[str, typer.Option(help="what was paid, e.g. the order id; a repeat changes nothing")],
    as_json: JsonOption = False,
) -> None:
    """Add purchased credits."""
    from worker import accounts

    with open_tools() as tools:
        _print_account(accounts.grant(tools, user, meter, amount, key).account, as_json)


def _print_account(account: Account, as_json: bool) -> None:
    if as_json:
        balances = {meter: balance._asdict() for meter, balance in account.balances.items()}
        print_json({**account._asdict(), "balances": balances})
        return
    typer.echo(
        f"{account.user_id}: plan {account.plan}, {account.status}, trust {account.trust}, version {account.version}"
    )
    columns = ("meter", "allowance", "used", "rollover", "purchased", "period_start", "period_end")
    rows = [{name: getattr(balance, name) for name in columns} for balance in account.balances.values()]
    print_rows(
        [{**row, "allowance": "unlimited" if row["allowance"] is None else row["allowance"]} for row in rows], False
    )
