"""Changes of accounts by operators and provider webhooks: open, set status and trust, change the plan, renew, show.

Every change is a ledger entry under the account's lock, with an idempotency key. A change first applies all due
boundaries, under the terms of their time. Before its COMMIT it appends a `refresh` to the account's stream: a worker
publishes the new balance even if this process dies at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import MAXYEAR, UTC, datetime, timedelta
from typing import Any, Literal, get_args

import psycopg

from config.catalogue import TRUST_TIERS, known_timezone
from schemas.events import MAX_AMOUNT
from worker.admin.change import (
    Held,
    answer,
    cause_of,
    claim_order,
    commit,
    locked,
    refresh,
    require_identifier,
    require_not_closed,
    require_same_period,
    require_time,
    require_users,
)
from worker.errors import AccountError, KeyConflict, NotFound
from worker.ledger import batch
from worker.ledger.accounts import read_account, read_entries
from worker.ledger.connection import Postgres, batch_connection
from worker.resources import Resources
from worker.rules import lifecycle as rules_lifecycle
from worker.rules.account import Account, Balance, Change, ChangeAnswer, Waiting, schedule_of
from worker.rules.calendar import CALENDAR_CADENCES
from worker.rules.history import balance_of, open_for_good
from worker.rules.lifecycle import (
    Invoice,
    account_step,
    as_of,
    change_status,
    end_of_period,
    invoice_in,
    is_invoiced,
    leaves_schedule,
    open_account,
    renew_account,
    waiting_with,
)
from worker.rules.rows import EntryRow, Writes
from worker.rules.waterfall import STATUSES

Moment = Literal["now", "period_end"]
# Statuses that an account can take at the end of a period.
ENDING_STATUSES = ("canceled", "expired")


class _AccountExists(AccountError):
    """An account to be opened exists."""


def open_once(
    resources: Resources,
    user_id: str,
    plan: str,
    *,
    status: str = "active",
    start: datetime | None = None,
    end: datetime | None = None,
    rollover: Mapping[str, int] | None = None,
    timezone: str | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Open an account as `open_new` does; a repeat of the same opening changes nothing and is `repeated`.

    It is the same if the account was opened on this plan, with this status, these bounds of its first period and this
    rollover. Raises AccountError for an account that was opened otherwise, and as `open_new` does.
    """
    opening: dict[str, Any] = {
        "status": status, "start": start, "end": end, "rollover": rollover, "timezone": timezone,
    }  # fmt: skip
    try:
        return ChangeAnswer(open_new(resources, user_id, plan, **opening, actor=actor, reason=reason))
    except _AccountExists:
        with batch_connection(resources.engine) as postgres:
            now, _, account = read_account(postgres, user_id)
            entries = read_entries(postgres, user_id, "open")
        if account is None or not _opened_alike(resources, user_id, plan, entries, **opening):
            raise
    refresh(resources, [user_id])  # the first call may have died before it
    return answer(resources, account, now, repeated=True)


def open_new(
    resources: Resources,
    user_id: str,
    plan: str,
    *,
    status: str = "active",
    start: datetime | None = None,
    end: datetime | None = None,
    rollover: Mapping[str, int] | None = None,
    timezone: str | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> Account:
    """Open an account on `plan`, with a first period.

    The period lasts from `start` (default: now) to `end` (default: the first renewal). `rollover` is in units by meter:
    saved allowance that the account brings along, or debt below zero. Calendar boundaries keep their time of day in
    `timezone` (an IANA name), else in the plan's.
    Raises AccountError if the account exists, the status is unknown, the period ends before it starts or starts in the
    calendar's last year, or a meter takes no rollover; CatalogueError for an unknown plan.
    """
    (account,) = open_many(
        resources,
        [user_id],
        plan,
        status=status,
        start=start,
        end=end,
        rollover=rollover,
        timezone=timezone,
        actor=actor,
        reason=reason,
    )
    return account


def open_many(
    resources: Resources,
    users: Sequence[str],
    plan: str,
    *,
    status: str = "active",
    start: datetime | None = None,
    end: datetime | None = None,
    rollover: Mapping[str, int] | None = None,
    timezone: str | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> list[Account]:
    """Open several accounts alike, all or none. See `open_new`."""
    cause = cause_of(actor, reason)
    if rollover is not None and not isinstance(rollover, Mapping):
        raise AccountError(f"rollover: must be units by meter (got {str(rollover)[:64]!r})")
    brought = dict(rollover or {})
    require_users(users)
    _require_status(status)
    _require_timezone(timezone)
    if start is not None:
        _require_start(start)
    if end is not None:
        require_time("period_end", end)
    writes = Writes.none()
    with batch_connection(resources.engine) as postgres:
        loaded = batch.load_for_update(postgres, sorted(users), ([], []))
        if end is not None and end <= (start or loaded.now):
            raise AccountError(f"period_end: must be after period_start ({(start or loaded.now).isoformat()})")
        if loaded.accounts:
            raise _AccountExists(f"user_id: {next(iter(loaded.accounts))} has an account already")
        require_not_closed(loaded)
        opened = []
        for user_id in sorted(users):
            account = open_account(resources.catalogue, user_id, plan, status, start or loaded.now, end, timezone)
            opened.append(open_for_good(writes, _with_rollover(account, brought), loaded.now, cause))
        try:
            batch.store_and_commit(postgres, writes, loaded.now)
        except psycopg.errors.UniqueViolation:
            raise _AccountExists(f"user_id: one of {len(users)} has an account already") from None
    # After the COMMIT, not before it: a drain has no row yet to wait for.
    refresh(resources, users)
    return opened


def set_status(
    resources: Resources,
    user_id: str,
    status: str,
    *,
    at: Moment | datetime = "now",
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Set the account's status now, or end it at the end of its period or at a date.

    Only trialing, active and past_due accounts have an allowance. `active` withdraws a scheduled cancellation and turns
    a trial into an account; `past_due` and `trialing` leave the cancellation standing. Repeating is harmless.
    Raises AccountError for an unknown account or status, a date that is over, and if the end of the period is unknown.
    """
    cause = cause_of(actor, reason)
    _require_status(status)
    _require_moment(at)
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current, seen = account.current, as_of(resources.catalogue, account.current, now)
        if at != "now":
            if status not in ENDING_STATUSES:
                raise AccountError(f"status: later only {' or '.join(ENDING_STATUSES)} (got {status!r})")
            ends_at = _moment_of(at, seen, now)
            if (seen.next_status, seen.status_change_at) == (status, ends_at):
                return _repeat(resources, current, now)
            if account.is_behind:
                return _wait(resources, postgres, now, account, Waiting("next_status", now, status, ends_at))
            current = current._replace(next_status=status, status_change_at=ends_at)
            return commit(resources, postgres, now, account.then(current, _schedule_step(current, now)))
        if seen.status == status and (seen.next_status is None or leaves_schedule(status)):
            return _repeat(resources, current, now)
        if account.is_behind:
            return _wait(resources, postgres, now, account, Waiting("status", now, status))
        steps: list[Change] = []
        current = change_status(resources.catalogue, current, status, now, steps)
        return commit(resources, postgres, now, account.then(current, *steps))


def set_timezone(
    resources: Resources,
    user_id: str,
    timezone: str | None,
    *,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Give the account a time zone (an IANA name) for its calendar boundaries; None: the plan's.

    Open periods keep their end; the next ones have it. Repeating is harmless.
    Raises AccountError for an unknown account or time zone, and while older events wait before an open period.
    """
    cause = cause_of(actor, reason)
    _require_timezone(timezone)
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current = account.current
        if current.timezone == timezone:
            return answer(resources, current, now, repeated=True)
        for meter, balance in current.balances.items():
            if balance.cadence in CALENDAR_CADENCES:  # the next period would be one that has begun
                require_same_period(resources, account, meter, now)
        current = current._replace(timezone=timezone)
        step = account_step("set_timezone", f"timezone:{now.isoformat()}", schedule_of(current))
        return commit(resources, postgres, now, account.then(current, step))


def set_trust(
    resources: Resources, user_id: str, trust: str, *, actor: str | None = None, reason: str | None = None
) -> ChangeAnswer:
    """Put the account into a trust tier; the pool may spend the tier's daily budget on it.

    The open window stays: the units it absorbed count against the new budget. Repeating is harmless.
    Raises AccountError for an unknown account or tier.
    """
    cause = cause_of(actor, reason)
    if trust not in TRUST_TIERS:
        raise AccountError(f"trust: unknown {trust!r}; there are {', '.join(TRUST_TIERS)}")
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current = account.current
        if current.trust == trust:
            return answer(resources, current, now, repeated=True)
        detail = {"trust": trust, "before": current.trust}
        step = Change(
            kind="set_trust", key=f"trust:{now.isoformat()}", meter="", before=None, after=None, detail=detail
        )
        return commit(resources, postgres, now, account.then(current._replace(trust=trust), step))


def change_plan(
    resources: Resources,
    user_id: str,
    plan: str,
    *,
    at: Moment | datetime = "now",
    period_end: datetime | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Put the account on `plan` now, or schedule it for the end of the period or for a date.

    Now: the open period takes the new allowance; its bounds, used and rollover stay. Between two plans that the payment
    provider renews, a change at period end waits for the provider's next period, and so does a change of a period that
    is over. `period_end` is the provider's end of the first period, if the provider renews the new plan. Naming the
    current plan withdraws a scheduled change. While older events wait in the account's stream, the change takes effect
    after them. Repeating is harmless.
    Raises AccountError (unknown account, unknown end of period, a date that is over), CatalogueError.
    """
    cause = cause_of(actor, reason)
    resources.catalogue.plan(plan)
    _require_moment(at)
    if period_end is not None:
        require_time("period_end", period_end)
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current, seen = account.current, as_of(resources.catalogue, account.current, now)
        if plan == seen.plan:
            if seen.next_plan is None:
                return _repeat(resources, current, now)
            if account.is_behind:
                return _wait(resources, postgres, now, account, Waiting("plan", now, plan))
            current = current._replace(next_plan=None, plan_change_at=None)
            return commit(resources, postgres, now, account.then(current, _schedule_step(current, now)))
        # A period that is over takes no other terms: the plan belongs to the next one.
        is_next = at == "period_end" or (at == "now" and _is_over(seen, now))
        waits_for_renewal = is_next and _is_renewed(resources, plan, seen)
        if at != "now" or waits_for_renewal:
            change_at = None if waits_for_renewal else _moment_of(at, seen, now)
            if (seen.next_plan, seen.plan_change_at) == (plan, change_at):
                return _repeat(resources, current, now)
            if account.is_behind:
                return _wait(resources, postgres, now, account, Waiting("next_plan", now, plan, change_at))
            current = current._replace(next_plan=plan, plan_change_at=change_at)
            return commit(resources, postgres, now, account.then(current, _schedule_step(current, now)))
        if period_end is not None and period_end <= now:
            raise AccountError(f"period_end: must be after now ({now.isoformat()})")
        if account.is_behind:
            return _wait(resources, postgres, now, account, Waiting("plan", now, plan, period_end=period_end))
        steps: list[Change] = []
        current = rules_lifecycle.change_plan(resources.catalogue, current, plan, now, steps, period_end)
        return commit(resources, postgres, now, account.then(current, *steps))


def renew(
    resources: Resources,
    user_id: str,
    invoice_id: str,
    period_start: datetime,
    period_end: datetime,
    *,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Say that an invoice paid the time from `period_start` to `period_end`. For cycle invoices only.

    - It adopts an open period that no invoice paid, if that began at most `renewal_grace_hours` before it; `used`
      stays.
    - One that begins at or after the end of a paid period closes it: unused allowance pays debt first, then rolls over
      up to the cap, per meter.
    - Otherwise it closes the open period, and the rest of that is lost.
    - One that begins more than an hour ahead of the ledger's clock waits until then (`waits_until`), and so does one
      before which older events wait in the account's stream.
    - One that begins no later than a paid period, or is over before the open one began, is `stale`: it changes nothing.

    A plan change that waits for the provider's next period takes effect with it. The invoice makes repeats harmless.
    Raises AccountError for an unknown account, a period that ends before it starts, and a plan without such meters;
    KeyConflict for an invoice that is of other dates, and OrderUsed for one of another account.
    """
    cause = cause_of(actor, reason)
    require_identifier("invoice_id", invoice_id)
    _require_start(period_start)
    require_time("period_end", period_end)
    if period_end <= period_start:
        raise AccountError(f"period_end: must be after period_start ({period_start.isoformat()})")
    invoice = Invoice(invoice_id, f"renew:{invoice_id}", period_start, period_end)
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current, seen = account.current, as_of(resources.catalogue, account.current, now)
        if (known := _known_dates(postgres, current, invoice)) is not None:
            if [datetime.fromisoformat(moment) for moment in known] != [period_start, period_end]:
                raise KeyConflict(f"invoice_id: {invoice_id} is of another period: {' to '.join(known)}")
            return _repeat(resources, current, now)
        if not any(is_invoiced(resources.catalogue, seen, balance) for balance in seen.balances.values()):
            raise AccountError(f"plan: no meter of {seen.plan} is renewed by invoices")
        claim_order(postgres, "renew", "invoice_id", invoice_id, user_id)
        if period_start > now + _AHEAD:
            return _wait(resources, postgres, now, account, _waiting(invoice, period_start))
        if renew_account(resources.catalogue, seen, invoice, now, []) is None:
            return answer(resources, current, now, stale=True)
        if account.is_behind:
            return _wait(resources, postgres, now, account, _waiting(invoice, now))
        steps: list[Change] = []
        renewed = renew_account(resources.catalogue, current, invoice, now, steps)
        assert renewed is not None
        return commit(resources, postgres, now, account.then(renewed, *steps))


# An invoice that begins later than this waits until then; a little ahead is a matter of clocks.
_AHEAD = timedelta(hours=1)
# More changes than these never wait at a time: an account whose events are applied has none or one.
_MAX_WAITING = 100


def _waiting(invoice: Invoice, at: datetime) -> Waiting:
    """Return the invoice as a change that waits until `at`."""
    return Waiting("invoice", at, invoice.invoice_id, invoice.period_start, invoice.period_end)


def _wait(resources: Resources, postgres: Postgres, now: datetime, account: Held, change: Waiting) -> ChangeAnswer:
    """Store a change that takes effect later, in the order of the stream."""
    if len(account.current.waiting) >= _MAX_WAITING:
        raise AccountError(f"user_id: {_MAX_WAITING} changes of the account wait already; let its events be applied")
    current = waiting_with(account.current, change)
    step = account_step("waits", _waiting_key(change), {**change.as_json(), **schedule_of(current)})
    stored = commit(resources, postgres, now, account.then(current, step))
    if change.at > now:
        return stored._replace(waits_until=change.at)
    return stored._replace(waits_for_events=True)


def _waiting_key(change: Waiting) -> str:
    """Return the key of the entry that a change waits."""
    if change.kind == "invoice":
        return f"waits:{change.name}"
    if change.kind == "period":
        return f"period_waits:{change.name}"
    return f"waits:{change.kind}:{change.at.isoformat()}"


def _repeat(resources: Resources, account: Account, now: datetime) -> ChangeAnswer:
    """Answer a repeat of a change; it may still wait, among others, for older events."""
    waits = any(change.at <= now for change in account.waiting)
    return answer(resources, account, now, repeated=True)._replace(waits_for_events=waits)


def _known_dates(postgres: Postgres, account: Account, invoice: Invoice) -> tuple[str, str] | None:
    """Return the bounds that this invoice paid already, or waits to pay; None if it is new."""
    for change in account.waiting:  # an import brings them along without their entries
        if change.kind == "invoice" and change.name == invoice.invoice_id:
            known = invoice_in(change)
            return known.period_start.isoformat(), known.period_end.isoformat()
    # Earlier releases kept the dates per meter only.
    for key in (f"waits:{invoice.invoice_id}", f"paid:{invoice.invoice_id}", invoice.key):
        for entry in read_entries(postgres, account.user_id, key):
            return entry.detail["period_start"], entry.detail["period_end"]
    return None


def set_period(
    resources: Resources,
    user_id: str,
    period_end: datetime,
    key: str,
    *,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Correct the end of the open period that the payment provider renews, or of a trial.

    Also where the period had no end yet. An end that is over closes the period at once. While older events wait in the
    account's stream, the correction takes effect after them. `key` makes repeats harmless.
    Raises AccountError for an unknown account, an end before the period's start, a plan without such periods, and a key
    that set another end.
    """
    cause = cause_of(actor, reason)
    require_identifier("key", key)
    require_time("period_end", period_end)
    entry_key = f"period:{key}"
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current, seen = account.current, as_of(resources.catalogue, account.current, now)
        if (known := _known_end(postgres, current, key)) is not None:
            if datetime.fromisoformat(known) != period_end:
                raise KeyConflict(f"key: {key} set the end {known}")
            return _repeat(resources, current, now)
        starts = [each.period_start for each in seen.balances.values() if each.backing is not None]
        if not starts and seen.status != "trialing":
            raise AccountError(f"plan: no meter of {seen.plan} has a period that the payment provider ends")
        if starts and period_end <= min(starts):
            raise AccountError(f"period_end: must be after period_start ({min(starts).isoformat()})")
        if account.is_behind:
            return _wait(resources, postgres, now, account, Waiting("period", now, key, period_end=period_end))
        steps: list[Change] = []
        changed = rules_lifecycle.set_period(current, period_end, entry_key, steps)
        assert changed is not None
        return commit(resources, postgres, now, account.then(changed, *steps))


def _known_end(postgres: Postgres, account: Account, key: str) -> str | None:
    """Return the end that this key set already, or waits to set; None if it is new."""
    for change in account.waiting:  # an import brings them along without their entries
        if change.kind == "period" and change.name == key and change.period_end is not None:
            return change.period_end.isoformat()
    for entry in read_entries(postgres, account.user_id, f"period_waits:{key}"):
        return str(entry.detail["period_end"])
    for entry in read_entries(postgres, account.user_id, f"period:{key}"):
        return str(entry.detail["end"])
    return None


def show(resources: Resources, user_id: str) -> Account:
    """Return the account as it is now. Raises AccountError.

    Due boundaries are computed and not stored.
    """
    require_users([user_id])
    with batch_connection(resources.engine) as postgres:
        now, _, account = read_account(postgres, user_id)
    if account is None:
        raise NotFound(f"user_id: no account {user_id}")
    return as_of(resources.catalogue, account, now)


def _schedule_step(account: Account, now: datetime) -> Change:
    """Return the change that records the schedule of an account from now on."""
    return account_step("schedule", f"schedule:{now.isoformat()}", schedule_of(account))


def _is_over(account: Account, now: datetime) -> bool:
    """True if the provider's open period is over and, without hours of grace, waits for its invoice."""
    return any(
        balance.cadence == "subscription" and balance.period_end is not None and balance.period_end <= now
        for balance in account.balances.values()
    )


def _is_renewed(resources: Resources, plan: str, account: Account) -> bool:
    """True if both the account's plan and `plan` wait for the payment provider."""
    wanted = resources.catalogue.plans[plan].meters.values()
    has = any(balance.cadence == "subscription" for balance in account.balances.values())
    return has and any(allowance.cadence == "subscription" for allowance in wanted)


def _moment_of(at: Moment | datetime, account: Account, now: datetime) -> datetime:
    """Return the moment at which a scheduled change takes effect. Raises AccountError."""
    if not isinstance(at, datetime):
        return _end_of_period(account, now)
    if at <= now:
        raise AccountError(f"at: must be after now ({now.isoformat()})")
    return at


def _end_of_period(account: Account, now: datetime) -> datetime:
    ends_at = end_of_period(account)
    if ends_at is None:
        raise AccountError(f"at: nobody knows when the open period of {account.user_id} ends; use now")
    return max(ends_at, now)


def _with_rollover(account: Account, brought: Mapping[str, int]) -> Account:
    balances = dict(account.balances)
    for meter, units in brought.items():
        balance = balances.get(meter)
        if balance is None or not balance.spill:
            takers = ", ".join(sorted(name for name, each in balances.items() if each.spill)) or "none"
            raise AccountError(f"rollover: {meter!r} takes none on this plan; there are {takers}")
        if type(units) is not int or not -MAX_AMOUNT <= units <= MAX_AMOUNT:
            raise AccountError(f"rollover: must be from {-MAX_AMOUNT} to {MAX_AMOUNT} (got {units})")
        balances[meter] = balance._replace(rollover=units)
    return account._replace(balances=balances)


def _opened_alike(
    resources: Resources,
    user_id: str,
    plan: str,
    entries: Sequence[EntryRow],
    *,
    status: str,
    start: datetime | None,
    end: datetime | None,
    rollover: Mapping[str, int] | None,
    timezone: str | None,
) -> bool:
    """True if these entries, the first of an account and of its meters, are those of this opening."""
    first = entries[0]
    if (first.detail["plan"], first.detail["status"], first.detail.get("timezone")) != (plan, status, timezone):
        return False
    opened = open_account(resources.catalogue, user_id, plan, status, start or first.created_at, end, timezone)
    wanted = _with_rollover(opened, rollover or {}).balances
    found = {entry.meter: balance_of(entry) for entry in entries[1:]}

    def about(balance: Balance | None) -> object:
        return balance and (balance.period_start, balance.period_end, balance.rollover)

    return all(about(balance) == about(found.get(meter)) for meter, balance in wanted.items())


def _require_moment(at: str | datetime) -> None:
    if isinstance(at, datetime):
        require_time("at", at)
    elif at not in get_args(Moment):
        raise AccountError(f"at: must be {' or '.join(get_args(Moment))}, or a time with an offset (got {at!r:.64})")


def _require_start(start: datetime) -> None:
    """Raise AccountError if the calendar would end within the first period."""
    require_time("period_start", start)
    if start.year == MAXYEAR:
        raise AccountError(f"period_start: must be before the year {MAXYEAR} (got {start.isoformat()})")


def _require_timezone(timezone: str | None) -> None:
    if timezone is not None:
        try:
            known_timezone(timezone)
        except ValueError as error:
            raise AccountError(f"timezone: {error}") from None


def _require_status(status: str) -> None:
    if status not in STATUSES:
        raise AccountError(f"status: unknown {status!r}; there are {', '.join(STATUSES)}")


def parse_time(text: str) -> datetime:
    """Parse an ISO 8601 time with an offset; return it in UTC. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("needs an offset, such as Z")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is outside the calendar") from None
