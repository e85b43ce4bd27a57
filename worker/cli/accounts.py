"""The commands about plans and accounts: `meterfall plans` and `meterfall account …`; see also `catalogue`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.codes import TRUST_TIERS
from worker.cli.catalogue import catalogue_app
from worker.cli.confirm import asks, confirm, confirmed
from worker.cli.io import (
    REFUSED,
    login,
    open_output,
    open_resources,
    parse_moment,
    parse_optional_time,
    parse_time,
    parse_units,
    print_answer,
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
    YesOption,
)
from worker.cli.reports import meter_row
from worker.errors import BadInput
from worker.rules.formats import moment
from worker.rules.words import counted

if TYPE_CHECKING:
    from worker.resources import Resources
    from worker.rules.account import Account, ChangeAnswer

app = typer.Typer()
account_app = typer.Typer(no_args_is_help=True, help="Open and change accounts.")
app.add_typer(catalogue_app, name="catalogue")
app.add_typer(account_app, name="account")


@app.command()
def plans(as_json: JsonOption = False) -> None:
    """List the plans of the catalogue."""
    from config.catalogue import granted_in_words, load_catalogue

    rows = [
        {
            "plan": code,
            "tier": plan.tier,
            "month_cents": plan.price_month_cents,
            "year_cents": plan.price_year_cents,
            "meter": meter,
            "quantity": granted_in_words(allowance),
            "cadence": "" if allowance.wallet else allowance.cadence,
            "rollover_cap": allowance.rollover_cap,
        }
        for code, plan in load_catalogue(read_settings().catalogue_path).plans.items()
        if plan.active
        for meter, allowance in plan.meters.items()
    ]
    print_rows(rows, as_json)


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
    timezone: Annotated[str | None, typer.Option(help="IANA name, for calendar periods; default the plan's")] = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Open an account; the same opening again changes nothing."""
    from worker.admin import accounts

    start = parse_optional_time("--period-start", period_start)
    end = parse_optional_time("--period-end", period_end)
    brought = parse_units("rollover", rollover)
    with open_resources() as resources:
        if max(map(abs, brought.values()), default=0) > resources.settings.confirm_amount_units:
            words = ", ".join(f"{meter} rollover 0 → {units:,}" for meter, units in brought.items())
            confirm(f"open {user}: {words}", yes=yes, is_final=False)
        change = accounts.open_once(
            resources,
            user,
            plan,
            status=status,
            start=start,
            end=end,
            rollover=brought,
            timezone=timezone,
            actor=login(by),
            reason=reason,
        )
    _print_change(change, as_json)


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


@account_app.command("find")
def account_find(
    user_id: Annotated[str | None, typer.Option("--id", help="the whole id")] = None,
    prefix: Annotated[str | None, typer.Option(help="beginning of the id")] = None,
    log_name: Annotated[str | None, typer.Option(help="name in logs: user: and 12 digits, or the digits alone")] = None,
    plan: Annotated[str | None, typer.Option(help="plan code; see `meterfall plans`")] = None,
    status: Annotated[str | None, typer.Option(help="active, past_due, …, closed")] = None,
    after: Annotated[str | None, typer.Option(help="only accounts after this id")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="number of accounts listed")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Find accounts by all that you name, and say how many there are in all."""
    from worker.reports.finding import find

    with open_resources() as resources:
        found = find(
            resources,
            user_id=user_id,
            prefix=prefix,
            log_name=log_name,
            plan=plan,
            status=status,
            after=after,
            limit=limit,
        )
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print_rows([account.model_dump() for account in found.accounts], as_json=False)
    if found.more_after is not None:
        typer.echo(f"{len(found.accounts):,} of {found.total:,}; the next: --after {found.more_after}", err=True)


@account_app.command("set-status")
def account_set_status(
    user: User,
    status: Annotated[str, typer.Argument(help="active, past_due, …, suspended; the README lists them")],
    at: AtOption = "now",
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set the status. Only entitled accounts have an allowance; `suspended` ones may spend nothing."""
    from worker.admin import accounts

    with open_resources() as resources:
        _print_change(
            accounts.set_status(resources, user, status, at=parse_moment(at), actor=login(by), reason=reason), as_json
        )


@account_app.command("set-timezone")
def account_set_timezone(
    user: User,
    timezone: Annotated[str, typer.Argument(help="IANA name, as America/New_York; plan: that of the plan")],
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set the time zone of calendar periods; the open ones keep their end."""
    from worker.admin import accounts

    zone = None if timezone == "plan" else timezone
    with open_resources() as resources:
        _print_change(accounts.set_timezone(resources, user, zone, actor=login(by), reason=reason), as_json)


@account_app.command("set-limit")
def account_set_limit(
    user: User,
    meter: MeterArgument,
    amount: Annotated[int | None, typer.Argument(help="most units per window; left out with --remove")] = None,
    per: Annotated[str, typer.Option(metavar="day|week|month", help="window of the calendar")] = "day",
    of: Annotated[
        str, typer.Option(metavar="user|operator", help="who sets it; each may set one per window")
    ] = "operator",
    remove: Annotated[bool, typer.Option("--remove", help="take the limit away")] = False,
    key: Annotated[str | None, typer.Option(help="its purpose, such as a ticket; a repeat changes nothing")] = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Limit what an account may spend per day, week or month, beside its allowance and the limits of others."""
    from worker.admin import limits

    if remove == (amount is not None):
        raise BadInput("amount: give the most units per window, or --remove")
    with open_resources() as resources:
        change = limits.set_limit(resources, user, meter, per, amount, key=key, of=of, actor=login(by), reason=reason)
    _print_change(change, as_json)


@account_app.command("limits")
def account_limits(user: User, as_json: JsonOption = False) -> None:
    """List the limits of an account: amount, used and left in the open window, and when that ends."""
    from worker.reports.limits import limits_of

    with open_resources() as resources:
        found = limits_of(resources, user)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    if found.pay_from is not None:
        typer.echo(f"pays from: {found.pay_from}; checks count no purchased units")
    columns = ("meter", "per", "set_by", "amount", "used", "left")
    print_rows(
        [
            {**{name: getattr(each, name) for name in columns}, "ends": _end_of(each.wallet, each.ends_at)}
            for each in found.limits
        ],
        as_json=False,
    )


def _end_of(wallet: str | None, ends_at: datetime) -> str:
    """Return the end of a limit's window, or why the limit rests."""
    return moment(ends_at) if wallet is None else f"rests: draws on {wallet}"


@account_app.command("set-pay-from")
def account_set_pay_from(
    user: User,
    pay_from: Annotated[
        str, typer.Argument(metavar="allowance|all", help="what checks count; all: purchased units also")
    ],
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let checks, holds and charges count the allowance and rollover alone, or purchased units also."""
    from worker.admin import limits

    if pay_from not in ("allowance", "all"):
        raise BadInput(f"pay_from: must be allowance or all (got {pay_from!r:.64})")
    wanted = None if pay_from == "all" else pay_from
    with open_resources() as resources:
        _print_change(limits.set_pay_from(resources, user, wanted, actor=login(by), reason=reason), as_json)


@account_app.command("set-notices")
def account_set_notices(
    user: User,
    rules: Annotated[
        list[str], typer.Argument(help="rules, as balance.threshold:percent=80,top_up=500; plan: those of the plan")
    ],
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set what the account is told, instead of what its plan says; `none` for nothing."""
    from worker.admin import notices

    with open_resources() as resources:
        parsed = notices.parse_rules(rules)
        _print_change(notices.set_rules(resources, user, parsed, actor=login(by), reason=reason), as_json)


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
    """Change the plan: now, with its allowance for the open period, at period_end, or at a date."""
    from worker.admin import accounts

    if period_end is not None and at != "now":
        raise BadInput("--period-end: belongs to --at now; a change at period_end waits for the provider's next period")
    end = parse_optional_time("--period-end", period_end)
    with open_resources() as resources:
        _print_change(
            accounts.change_plan(
                resources, user, plan, at=parse_moment(at), period_end=end, actor=login(by), reason=reason
            ),
            as_json,
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
    """Say that a cycle invoice paid a period: it adopts a young unpaid one, else the open period closes."""
    from worker.admin import accounts

    start, end = parse_time("period_start", period_start), parse_time("period_end", period_end)
    with open_resources() as resources:
        change = accounts.renew(resources, user, invoice, start, end, actor=login(by), reason=reason)
        _print_change(change, as_json)
    if change.stale:
        raise typer.Exit(REFUSED)


@account_app.command("set-period")
def account_set_period(
    user: User,
    period_end: Annotated[str, typer.Argument(help="ISO 8601 with offset")],
    key: KeyOption,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Correct the end of the open period that the payment provider renews, or of a trial."""
    from worker.admin import accounts

    end = parse_time("period_end", period_end)
    with open_resources() as resources:
        _print_change(accounts.set_period(resources, user, end, key, actor=login(by), reason=reason), as_json)


@account_app.command("close")
def account_close(
    user: User,
    forfeit: Annotated[bool, typer.Option("--forfeit", help="lose credits, open holds and unread events")] = False,
    by: ActorOption = None,
    reason: CauseOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Close an account: set balances to zero, erase personal data, keep history under a hash. Nothing undoes it."""
    from worker.admin.erasure import close_account

    with open_resources() as resources:
        history = confirmed(
            resources,
            lambda on: close_account(on, user, forfeit=forfeit, actor=login(by), reason=reason),
            yes=yes,
            always=True,
            is_final=True,
        )
    print_answer(f"closed; its history is kept as {history}", {"history": history}, as_json)


@account_app.command("reopen")
def account_reopen(
    user: User,
    plan: PlanArgument,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the id of a closed account begin anew; its old events stay known."""
    from worker.admin.erasure import reopen

    with open_resources() as resources:
        _print_change(reopen(resources, user, plan, actor=login(by), reason=reason), as_json)


# ---------------------------------------------------------------------------------------------------------------------
# Credits


@account_app.command("grant")
def account_grant(
    user: User,
    meter: MeterArgument,
    amount: AmountArgument,
    key: KeyOption,
    category: Annotated[str, typer.Option(metavar="paid|promotional", help="promotional credit pays first")] = "paid",
    priority: Annotated[int, typer.Option(help="0 pays first, 100 last; it counts before all else")] = 50,
    starts: Annotated[
        str | None, typer.Option(metavar="TIME", help="from this moment on, ISO 8601 with offset; default now")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="until this moment, ISO 8601 with offset; default for ever")
    ] = None,
    open_plan: Annotated[str | None, typer.Option("--open", help="plan on which a missing account is opened")] = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Grant purchased credits, for ever or for a time."""
    from worker.admin import credits

    effective_at, expires_at = parse_optional_time("--starts", starts), parse_optional_time("--expires", expires)

    def grant(on: Resources) -> ChangeAnswer:
        return credits.grant(
            on,
            user,
            meter,
            amount,
            key,
            category=category,
            priority=priority,
            effective_at=effective_at,
            expires_at=expires_at,
            open_plan=open_plan,
            actor=login(by),
            reason=reason,
        )

    with open_resources() as resources:
        change = confirmed(resources, grant, yes=yes)
    if change.owes and not as_json:
        typer.echo(_debt_counts(change, meter))
    _print_change(change, as_json)


@account_app.command("credits")
def account_credits(user: User, as_json: JsonOption = False) -> None:
    """List the grants of an account in the order in which they pay: given, left, when each ends, what used it."""
    from worker.reports.credits import credits_of

    with open_resources() as resources:
        found = credits_of(resources, user)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    columns = ("meter", "order", "state", "category", "priority", "given", "left", "used", "taken_back", "expired")
    rows = [
        {
            **{name: "" if getattr(each, name) is None else getattr(each, name) for name in columns},
            "starts": "" if each.effective_at is None else moment(each.effective_at),
            "ends": "never" if each.expires_at is None else moment(each.expires_at),
            "last used by": ", ".join(use.event_id for use in each.events),
        }
        for each in found.grants
    ]
    print_rows(rows, as_json=False)


@account_app.command("clawback")
def account_clawback(
    user: User,
    meter: MeterArgument,
    amount: Annotated[int | None, typer.Argument(help="units; left out with --total-refunded")] = None,
    key: Annotated[str | None, typer.Option(help="id of the refund; a repeat changes nothing")] = None,
    order: Annotated[str | None, typer.Option(help="key of the refunded grant; takes at most its units")] = None,
    total_refunded: Annotated[
        int | None, typer.Option(help="units refunded of the order in all; takes the difference")
    ] = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take purchased credits back after a refund; spent ones become debt."""
    from worker.admin import credits

    with open_resources() as resources:
        change = confirmed(
            resources,
            lambda on: credits.claw_back(
                on,
                user,
                meter,
                amount,
                key,
                order=order,
                total_refunded=total_refunded,
                actor=login(by),
                reason=reason,
            ),
            yes=yes,
        )
    if change.stale and not as_json:
        typer.echo("stale: more was taken back of this order before; nothing changed")
        change = change._replace(stale=False)
    _print_change(change, as_json)


@account_app.command("adjust")
def account_adjust(
    user: User,
    meter: MeterArgument,
    key: KeyOption,
    reason: Annotated[str, typer.Option("--reason", help="reason for the change; the timeline shows it")],
    rollover: Annotated[int, typer.Option(help="units to add; below 0 to take")] = 0,
    purchased: Annotated[int, typer.Option(help="units to add; below 0 to take")] = 0,
    used: Annotated[int, typer.Option(help="units to add to the open period's usage; below 0 to take")] = 0,
    by: ActorOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put a balance right by an entry of its own."""
    from worker.admin import corrections

    with open_resources() as resources:
        change = confirmed(
            resources,
            lambda on: corrections.adjust(
                on,
                user,
                meter,
                rollover=rollover,
                purchased=purchased,
                used=used,
                key=key,
                actor=login(by),
                reason=reason,
            ),
            yes=yes,
        )
    _print_change(change, as_json)


@account_app.command("forgive-debt")
def account_forgive_debt(
    user: User,
    meter: MeterArgument,
    key: KeyOption,
    amount: Annotated[int | None, typer.Argument(help="units; default all of the debt")] = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Forgive debt of an account on a meter."""
    from worker.admin import corrections

    with open_resources() as resources:
        change = confirmed(
            resources,
            lambda on: corrections.forgive_debt(on, user, meter, amount, key=key, actor=login(by), reason=reason),
            yes=yes,
        )
    if not as_json:
        typer.echo(f"{change.forgiven:,} of {meter} forgiven")
    _print_change(change, as_json)


@account_app.command("undo")
def account_undo(
    user: User,
    entry: Annotated[str, typer.Argument(help="key of the entry, such as grant:order-9; `usage --timeline` shows it")],
    by: ActorOption = None,
    reason: CauseOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Undo a grant, a clawback or an adjustment by a counter-entry, once."""
    from worker.admin import corrections

    with open_resources() as resources:
        change = confirmed(
            resources, lambda on: corrections.undo(on, user, entry, actor=login(by), reason=reason), yes=yes
        )
    _print_change(change, as_json)


@account_app.command("seed")
def account_seed(
    user: User,
    amount: Annotated[int | None, typer.Option(help="units of the first period; default the plan's grant")] = None,
    meter: MeterOption = "credits",
    plan: PlanOption = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Open an account at sign-up with its first credits; leave an existing account unchanged."""
    from worker.admin import credits

    with open_resources() as resources:
        if amount is not None and amount > resources.settings.confirm_amount_units:
            confirm(f"seed {user}: {meter} allowance 0 → {amount:,}", yes=yes, is_final=False)
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
    with_debt: Annotated[bool, typer.Option("--with-debt", help="the giver's debt goes along")] = False,
    by: ActorOption = None,
    reason: CauseOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Move purchased credits to another account, for example from a trial; held ones stay."""
    from worker.admin import credits

    with open_resources() as resources:
        change = confirmed(
            resources,
            lambda on: credits.carry_over(
                on, from_user, to_user, key, meter=meter, with_debt=with_debt, actor=login(by), reason=reason
            ),
            yes=yes,
        )
    if not as_json:
        stay = f"; {change.kept:,} stay, for holds" if change.kept else ""
        typer.echo(f"{change.moved:,} of {meter} moved{stay}")
    _print_change(change, as_json)


@app.command()
def reverse(
    user: User,
    event: EventArgument,
    by: ActorOption = None,
    reason: CauseOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put an event's units back into their buckets, once."""
    from worker.admin import credits

    with open_resources() as resources:
        change = confirmed(
            resources, lambda on: credits.reverse(on, user, event, actor=login(by), reason=reason), yes=yes
        )
    _print_change(change, as_json)


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
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import the accounts of an export or of a relay's ledger, all or none.

    With --skip-bad the exit code is 1 if all rows were bad.
    """
    from worker.admin.transfer import count_rows, import_accounts

    text = read_text(file)
    with open_resources() as resources:
        if asks(yes=yes, is_final=False) and (count := count_rows(text)) > resources.settings.confirm_items:
            confirm(f"{counted(count, 'account')} would be imported", yes=yes, is_final=False)
        imported = import_accounts(
            resources, text, skip_bad=skip_bad, watch=show_progress, actor=login(by), reason=reason
        )
    bad = [row._asdict() for row in imported.bad]
    if as_json:
        print_json({"accounts": imported.accounts, "bad": bad})
    else:
        _print_import(imported.accounts, bad)
    if bad and not imported.accounts:
        raise typer.Exit(1)


def _print_import(accounts: int, bad: list[dict[str, object]]) -> None:
    if bad:
        print_rows(bad, as_json=False)
    skipped = f", {counted(len(bad), 'bad row')} skipped" if bad else ""
    typer.echo(f"{counted(accounts, 'account')} imported{skipped}")


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
        about = {name: value for name, value in change._asdict().items() if name != "account"}
        print_json({**_plain(change.account), **about})
        return
    if change.repeated:
        typer.echo("done before; nothing changed")
    if change.stale:
        typer.echo("stale: a later period is open already; nothing changed")
    if change.waits_until is not None:
        typer.echo(f"it takes effect at {moment(change.waits_until)}")
    if change.waits_for_events:
        typer.echo("it waits for older events, and takes effect when a worker applies them; the account after it:")
    if change.taken and not change.repeated:
        typer.echo(f"{change.taken:,} taken back")
    if change.debt:
        typer.echo(f"{change.debt:,} of them were spent already and are debt now")
    if change.gone:
        typer.echo(f"{change.gone:,} of them are gone: the grant that they belong to has ended")
    _print_account(change.account, as_json=False)


def _debt_counts(change: ChangeAnswer, meter: str) -> str:
    """Say how much of a grant is spendable beside debt: credits do not pay it."""
    from worker.rules.waterfall import available, may_spend

    account = change.account
    left = available(account.balances[meter].buckets(account.status), 0) if may_spend(account.status) else 0
    until = f" until {change.missing:,} more are granted or allowance pays the debt" if change.missing else ""
    available_now = "unlimited" if left is None else f"{left:,}"
    return f"{change.owes:,} of debt count against it: {available_now} available{until}"


def _print_account(account: Account, as_json: bool) -> None:
    if as_json:
        print_json(_plain(account))
        return
    about = f"plan {account.plan}, {account.status}, trust {account.trust}, version {account.version}"
    if account.next_plan is not None:
        about += f", {account.next_plan} from {_moment_or(account.plan_change_at, 'the next renewal')}"
    if account.next_status is not None:
        about += f", {account.next_status} from {_moment_or(account.status_change_at, 'the next renewal')}"
    about += "".join(f", {change.kind} {change.name} from {moment(change.at)}" for change in account.waiting)
    typer.echo(f"{account.user_id}: {about}")
    columns = ("meter", "allowance", "used", "rollover", "purchased", "period_start", "period_end")
    rows = [{name: getattr(balance, name) for name in columns} for balance in account.balances.values()]
    print_rows(
        [{**row, "allowance": "unlimited" if row["allowance"] is None else row["allowance"]} for row in rows], False
    )


def _moment_or(at: datetime | None, otherwise: str) -> str:
    return otherwise if at is None else moment(at)


def _plain(account: Account) -> dict[str, object]:
    balances = {
        meter: {
            **balance._asdict(),
            "grants": balance.grants and balance.grants.as_json(),
            "limits": balance.limits and balance.limits.as_json(),
        }
        for meter, balance in account.balances.items()
    }
    return {**account._asdict(), "waiting": [change.as_json() for change in account.waiting], "balances": balances}


def _print_json_list(items: Iterator[object]) -> None:
    """Print a JSON list item by item, so that a list of all accounts need not fit into memory."""
    opening = "["
    for item in items:
        typer.echo(f"{opening}\n{json.dumps(item, indent=2)}", nl=False)
        opening = ","
    typer.echo("\n]" if opening == "," else "[]")
