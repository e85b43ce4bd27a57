"""The commands about plans and accounts: `meterfall plans`, `meterfall catalogue …` and `meterfall account …`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.codes import TRUST_TIERS
from worker.cli.io import (
    counted,
    login,
    open_output,
    open_resources,
    parse_optional_time,
    parse_time,
    parse_units,
    print_json,
    print_rows,
    read_settings,
    read_text,
    show_progress,
)
from worker.cli.options import (
    ActorOption,
    AmountArgument,
    AtOption,
    CauseOption,
    EventArgument,
    JsonOption,
    KeyOption,
    MeterArgument,
    MeterOption,
    PlanArgument,
    PlanOption,
    User,
)
from worker.cli.reports import meter_row
from worker.errors import BadInput

if TYPE_CHECKING:
    from worker.rules.account import Account, ChangeAnswer

app = typer.Typer()
account_app = typer.Typer(no_args_is_help=True, help="Open and change accounts.")
catalogue_app = typer.Typer(no_args_is_help=True, help="Compare catalogues.")
app.add_typer(catalogue_app, name="catalogue")
app.add_typer(account_app, name="account")


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue


@app.command()
def plans(as_json: JsonOption = False) -> None:
    """List the plans of the catalogue."""
    from config.catalogue import load_catalogue

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


@catalogue_app.command("diff")
def catalogue_diff(
    edited: Annotated[
        Path | None, typer.Argument(help="the edited catalogue; default METERFALL_CATALOGUE_PATH")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a catalogue would change open accounts from their next period on."""
    from config.catalogue import load_catalogue
    from worker.admin.catalogue_diff import differences

    with open_resources() as resources:
        catalogue = load_catalogue(edited) if edited is not None else resources.catalogue
        print_rows([found._asdict() for found in differences(resources, catalogue)], as_json)


# ---------------------------------------------------------------------------------------------------------------------
# One account


@account_app.command("open")
def account_open(
    user: User,
    plan: PlanArgument,
    status: Annotated[str, typer.Option(help="active, trialing, …")] = "active",
    period_start: Annotated[str | None, typer.Option(help="ISO 8601 with offset; default now")] = None,
    period_end: Annotated[str | None, typer.Option(help="ISO 8601 with offset; default open")] = None,
    rollover: Annotated[list[str] | None, typer.Option(help="meter=units brought along, debt below 0")] = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Open an account."""
    from worker.admin import accounts

    start = parse_optional_time("--period-start", period_start)
    end = parse_optional_time("--period-end", period_end)
    with open_resources() as resources:
        account = accounts.open_new(
            resources,
            user,
            plan,
            status=status,
            start=start,
            end=end,
            rollover=parse_units("rollover", rollover),
            actor=login(by),
            reason=reason,
        )
    _print_account(account, as_json)


@account_app.command("show")
def account_show(user: User, as_json: JsonOption = False) -> None:
    """Show an account with its balances now, and its name in logs."""
    from config.log import name_in_logs
    from worker.admin import accounts

    with open_resources() as resources:
        account = accounts.show(resources, user)
        name = name_in_logs(user, resources.settings.log_user_ids)
    if as_json:
        print_json({**_plain(account), "name_in_logs": name})
        return
    _print_account(account, as_json=False)
    typer.echo(f"in logs: {name}")


@account_app.command("set-status")
def account_set_status(
    user: User,
    status: Annotated[str, typer.Argument(help="active, past_due, trialing, canceled, expired, paused, unpaid")],
    at: AtOption = "now",
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set the status. Only entitled accounts have an allowance; `active` revokes a cancellation."""
    from worker.admin import accounts

    with open_resources() as resources:
        _print_change(accounts.set_status(resources, user, status, at=at, actor=login(by), reason=reason), as_json)


@account_app.command("set-trust")
def account_set_trust(
    user: User,
    trust: Annotated[str, typer.Argument(help=", ".join(TRUST_TIERS))],
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set the trust tier, which limits the account's use of the sponsorship pool per day."""
    from worker.admin import accounts

    with open_resources() as resources:
        _print_change(accounts.set_trust(resources, user, trust, actor=login(by), reason=reason), as_json)


@account_app.command("change-plan")
def account_change_plan(
    user: User,
    plan: PlanArgument,
    at: AtOption = "now",
    period_end: Annotated[str | None, typer.Option(help="end of the provider's period, ISO 8601 with offset")] = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change the plan: now, with its allowance for the open period, or at period_end."""
    from worker.admin import accounts

    if period_end is not None and at != "now":
        raise BadInput("--period-end: belongs to --at now; a change at period_end waits for the provider's next period")
    end = parse_optional_time("--period-end", period_end)
    with open_resources() as resources:
        _print_change(
            accounts.change_plan(resources, user, plan, at=at, period_end=end, actor=login(by), reason=reason), as_json
        )


@account_app.command("renew")
def account_renew(
    user: User,
    invoice: Annotated[str, typer.Argument(help="id of the cycle invoice; a repeat changes nothing")],
    period_start: Annotated[str, typer.Argument(help="ISO 8601 with offset")],
    period_end: Annotated[str, typer.Argument(help="ISO 8601 with offset")],
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Close the open period and open the paid one in one step; unused allowance rolls over."""
    from worker.admin import accounts

    start, end = parse_time("period_start", period_start), parse_time("period_end", period_end)
    with open_resources() as resources:
        _print_change(accounts.renew(resources, user, invoice, start, end, actor=login(by), reason=reason), as_json)


@account_app.command("close")
def account_close(
    user: User,
    yes: Annotated[bool, typer.Option("--yes", help="confirm: closing cannot be undone")] = False,
    by: ActorOption = None,
    reason: CauseOption = None,
) -> None:
    """Close an account for good: set balances to zero, erase personal data, keep history under a hash."""
    from worker.admin.erasure import close_account

    if not yes:
        raise typer.BadParameter("closing cannot be undone; say --yes")
    with open_resources() as resources:
        typer.echo(f"closed; its history is kept as {close_account(resources, user, actor=login(by), reason=reason)}")


# ---------------------------------------------------------------------------------------------------------------------
# Credits


@account_app.command("grant")
def account_grant(
    user: User,
    meter: MeterArgument,
    amount: AmountArgument,
    key: KeyOption,
    plan: PlanOption = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add purchased credits; open the account if it does not exist."""
    from worker.admin import credits

    with open_resources() as resources:
        _print_change(
            credits.grant(resources, user, meter, amount, key, plan=plan, actor=login(by), reason=reason), as_json
        )


@account_app.command("clawback")
def account_clawback(
    user: User,
    meter: MeterArgument,
    amount: AmountArgument,
    key: KeyOption,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take purchased credits back after a refund; spent ones become debt."""
    from worker.admin import credits

    with open_resources() as resources:
        _print_change(credits.claw_back(resources, user, meter, amount, key, actor=login(by), reason=reason), as_json)


@account_app.command("seed")
def account_seed(
    user: User,
    amount: Annotated[int | None, typer.Option(help="units of the first period; default the plan's grant")] = None,
    meter: MeterOption = "credits",
    plan: PlanOption = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Open an account at sign-up with its first credits; leave an existing account unchanged."""
    from worker.admin import credits

    with open_resources() as resources:
        _print_change(
            credits.seed_signup(resources, user, amount, meter=meter, plan=plan, actor=login(by), reason=reason),
            as_json,
        )


@account_app.command("carry-over")
def account_carry_over(
    from_user: Annotated[str, typer.Argument(help="user who gives the purchased credits")],
    to_user: Annotated[str, typer.Argument(help="user who gets them")],
    key: KeyOption,
    meter: MeterOption = "credits",
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move purchased credits to another account, for example from a trial."""
    from worker.admin import credits

    with open_resources() as resources:
        _print_change(
            credits.carry_over(resources, from_user, to_user, key, meter=meter, actor=login(by), reason=reason), as_json
        )


@app.command()
def reverse(
    user: User,
    event: EventArgument,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put an event's units back into their buckets, once."""
    from worker.admin import credits

    with open_resources() as resources:
        _print_change(credits.reverse(resources, user, event, actor=login(by), reason=reason), as_json)


# ---------------------------------------------------------------------------------------------------------------------
# All accounts


@account_app.command("export")
def account_export(
    file: Annotated[str, typer.Argument(help="target file; - for standard output")] = "-",
) -> None:
    """Write the state of all open accounts as JSON lines, without their history."""
    from worker.admin.transfer import export_accounts

    with open_resources() as resources, open_output(file) as stream, show_progress("accounts written") as progress:
        accounts = export_accounts(resources, stream.write, progress)
    if file != "-":
        typer.echo(f"{counted(accounts, 'account')} written to {file}")


@account_app.command("import")
def account_import(
    file: Annotated[str, typer.Argument(help="JSON lines of an export, or a relay's ledger; - for standard input")],
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="list bad rows and import the others")] = False,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import the accounts of an export or of a relay's ledger, all or none."""
    from worker.admin.transfer import import_accounts

    text = read_text(file)
    with open_resources() as resources:
        imported = import_accounts(
            resources, text, skip_bad=skip_bad, watch=show_progress, actor=login(by), reason=reason
        )
    bad = [row._asdict() for row in imported.bad]
    if as_json:
        print_json({"accounts": imported.accounts, "bad": bad})
        return
    if bad:
        print_rows(bad, as_json=False)
    skipped = f", {counted(len(bad), 'bad row')} skipped" if bad else ""
    typer.echo(f"{counted(imported.accounts, 'account')} imported{skipped}")


@account_app.command("list")
def account_list(
    after: Annotated[str, typer.Option(help="only users after this id")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="number of accounts listed")] = None,
    as_json: JsonOption = False,
) -> None:
    """List all accounts by id, each as `usage` shows it."""
    from worker.reports import usage as reports_usage

    with open_resources() as resources:
        found = islice(reports_usage.snapshot(resources, after), limit)
        if as_json:
            _print_json_list(summary.model_dump(mode="json") for summary in found)
            return
        rows = [
            {"user": summary.user_id, "plan": summary.plan, "status": summary.status, **meter_row(usage)}
            for summary in found
            for usage in summary.meters
        ]
    print_rows(rows, as_json=False)


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


def _print_change(change: ChangeAnswer, as_json: bool) -> None:
    """Print the account after a change, and tell a repeat, a stale change or new debt."""
    if as_json:
        print_json({**_plain(change.account), "repeated": change.repeated, "stale": change.stale, "debt": change.debt})
        return
    if change.repeated:
        typer.echo("done before; nothing changed")
    if change.stale:
        typer.echo("stale: a later period is open already; nothing changed")
    if change.debt:
        typer.echo(f"{change.debt} of them were spent already and are debt now")
    _print_account(change.account, as_json=False)


def _print_account(account: Account, as_json: bool) -> None:
    if as_json:
        print_json(_plain(account))
        return
    about = f"plan {account.plan}, {account.status}, trust {account.trust}, version {account.version}"
    if account.next_plan is not None:
        about += f", {account.next_plan} from {account.plan_change_at or 'the next renewal'}"
    if account.next_status is not None:
        about += f", {account.next_status} from {account.status_change_at}"
    typer.echo(f"{account.user_id}: {about}")
    columns = ("meter", "allowance", "used", "rollover", "purchased", "period_start", "period_end")
    rows = [{name: getattr(balance, name) for name in columns} for balance in account.balances.values()]
    print_rows(
        [{**row, "allowance": "unlimited" if row["allowance"] is None else row["allowance"]} for row in rows], False
    )


def _plain(account: Account) -> dict[str, object]:
    balances = {meter: balance._asdict() for meter, balance in account.balances.items()}
    return {**account._asdict(), "balances": balances}


def _print_json_list(items: Iterator[object]) -> None:
    """Print a JSON list item by item, so that a list of all accounts need not fit into memory."""
    opening = "["
    for item in items:
        typer.echo(f"{opening}\n{json.dumps(item, indent=2)}", nl=False)
        opening = ","
    typer.echo("\n]" if opening == "," else "[]")
