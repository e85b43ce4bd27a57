"""Changes of accounts by operators and provider webhooks: open, set status and trust, change the plan, renew, show.

Every change is a ledger entry under the account's lock, with an idempotency key. A change first applies all due
boundaries, under the terms of their time. Before its COMMIT it appends a `refresh` to the account's stream: a worker
publishes the new balance even if this process dies at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import MAXYEAR, UTC, datetime
from typing import Any, Literal, get_args

import psycopg

from config.catalogue import TRUST_TIERS
from schemas.events import MAX_AMOUNT
from worker.admin.change import (
    answer,
    cause_of,
    commit,
    locked,
    refresh,
    require_identifier,
    require_not_closed,
    require_users,
)
from worker.errors import AccountError
from worker.ledger import batch
from worker.ledger.accounts import has_entry, read_account, read_entries
from worker.ledger.connection import batch_connection
from worker.resources import Resources
from worker.rules import lifecycle as rules_lifecycle
from worker.rules.account import Account, Balance, Change, ChangeAnswer
from worker.rules.history import balance_of, open_for_good, schedule_of
from worker.rules.lifecycle import (
    Invoice,
    as_of,
    change_status,
    end_of_period,
    leaves_schedule,
    open_account,
    renew_account,
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
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Open an account as `open_new` does; a repeat of the same opening changes nothing and is `repeated`.

    It is the same if the account was opened on this plan, with this status, these bounds of its first period and this
    rollover. Raises AccountError for an account that was opened otherwise, and as `open_new` does.
    """
    opening: dict[str, Any] = {"status": status, "start": start, "end": end, "rollover": rollover}
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
    actor: str | None = None,
    reason: str | None = None,
) -> Account:
    """Open an account on `plan`, with a first period.

    The period lasts from `start` (default: now) to `end` (default: the first renewal). `rollover` is in units by meter:
    saved allowance that the account brings along, or debt below zero.
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
    actor: str | None = None,
    reason: str | None = None,
) -> list[Account]:
    """Open several accounts alike, all or none. See `open_new`."""
    cause = cause_of(actor, reason)
    brought = dict(rollover or {})
    require_users(users)
    _require_status(status)
    if start is not None:
        _require_start(start)
    if end is not None:
        _require_time("period_end", end)
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
            account = open_account(resources.catalogue, user_id, plan, status, start or loaded.now, end)
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
    at: Moment = "now",
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Set the account's status now, or cancel it at the end of its period.

    Only trialing, active and past_due accounts have an allowance. `active` withdraws a scheduled cancellation and turns
    a trial into an account; `past_due` and `trialing` leave the cancellation standing. Repeating is harmless.
    Raises AccountError for an unknown account or status, and if the end of the period is unknown.
    """
    cause = cause_of(actor, reason)
    _require_status(status)
    _require_moment(at)
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current = account.current
        if at == "period_end":
            if status not in ENDING_STATUSES:
                raise AccountError(f"status: at period_end only {' or '.join(ENDING_STATUSES)} (got {status!r})")
            ends_at = _end_of_period(current, now)
            if (current.next_status, current.status_change_at) == (status, ends_at):
                return answer(resources, current, now, repeated=True)
            current = current._replace(next_status=status, status_change_at=ends_at)
            return commit(resources, postgres, now, account.then(current, _schedule_step(current, now)))
        if current.status == status and (current.next_status is None or leaves_schedule(status)):
            return answer(resources, current, now, repeated=True)
        steps: list[Change] = []
        current = change_status(current, status, now, steps)
        return commit(resources, postgres, now, account.then(current, *steps))


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
    at: Moment = "now",
    period_end: datetime | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Put the account on `plan` now, or schedule it for the end of the period.

    Now: the open period takes the new allowance; its bounds, used and rollover stay. Between two plans that the payment
    provider renews, a change at period end waits for the renewal. `period_end` is the provider's end of the first
    period, if the provider renews the new plan. Naming the current plan withdraws a scheduled change. Repeating is
    harmless.
    Raises AccountError (unknown account, unknown end of period), CatalogueError.
    """
    cause = cause_of(actor, reason)
    resources.catalogue.plan(plan)
    _require_moment(at)
    if period_end is not None:
        _require_time("period_end", period_end)
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current = account.current
        if at == "period_end" and plan != current.plan:
            change_at = None if _is_renewed(resources, plan, current) else _end_of_period(current, now)
            if (current.next_plan, current.plan_change_at) == (plan, change_at):
                return answer(resources, current, now, repeated=True)
            current = current._replace(next_plan=plan, plan_change_at=change_at)
            return commit(resources, postgres, now, account.then(current, _schedule_step(current, now)))
        if plan == current.plan and current.next_plan is None:
            return answer(resources, current, now, repeated=True)
        if plan == current.plan:
            current = current._replace(next_plan=None, plan_change_at=None)
            return commit(resources, postgres, now, account.then(current, _schedule_step(current, now)))
        if period_end is not None and period_end <= now:
            raise AccountError(f"period_end: must be after now ({now.isoformat()})")
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
    """Close each open period that the provider renews, and open the invoice's.

    It takes effect at once, so call it when the new period begins: every later event belongs to that period. Unused
    allowance pays debt first, then rolls over up to the cap, per meter. A plan change that waits for the renewal takes
    effect with it. The invoice makes repeats harmless, also with other dates. An invoice that starts no later than the
    open period is `stale` and changes nothing.
    Raises AccountError for an unknown account, a period that ends before it starts, and a plan without such meters.
    """
    cause = cause_of(actor, reason)
    require_identifier("invoice_id", invoice_id)
    _require_start(period_start)
    _require_time("period_end", period_end)
    if period_end <= period_start:
        raise AccountError(f"period_end: must be after period_start ({period_start.isoformat()})")
    key = f"renew:{invoice_id}"
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current = account.current
        if has_entry(postgres, user_id, key):
            return answer(resources, current, now, repeated=True)
        if not any(balance.cadence == "subscription" for balance in current.balances.values()):
            raise AccountError(f"plan: no meter of {current.plan} is renewed by invoices")
        invoice = Invoice(invoice_id, key, period_start, period_end)
        steps: list[Change] = []
        renewed = renew_account(resources.catalogue, current, invoice, now, steps)
        if renewed is None:
            return answer(resources, current, now, stale=True)
        return commit(resources, postgres, now, account.then(renewed, *steps))


def show(resources: Resources, user_id: str) -> Account:
    """Return the account as it is now. Raises AccountError.

    Due boundaries are computed and not stored.
    """
    require_users([user_id])
    with batch_connection(resources.engine) as postgres:
        now, _, account = read_account(postgres, user_id)
    if account is None:
        raise AccountError(f"user_id: no account {user_id}")
    return as_of(resources.catalogue, account, now)


def _schedule_step(account: Account, now: datetime) -> Change:
    """Return the change that records the schedule of an account from now on."""
    return Change(
        kind="schedule",
        key=f"schedule:{now.isoformat()}",
        meter="",
        before=None,
        after=None,
        detail=schedule_of(account),
    )


def _is_renewed(resources: Resources, plan: str, account: Account) -> bool:
    """True if both the account's plan and `plan` wait for the payment provider."""
    wanted = resources.catalogue.plans[plan].meters.values()
    has = any(balance.cadence == "subscription" for balance in account.balances.values())
    return has and any(allowance.cadence == "subscription" for allowance in wanted)


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
) -> bool:
    """True if these entries, the first of an account and of its meters, are those of this opening."""
    first = entries[0]
    if (first.detail["plan"], first.detail["status"]) != (plan, status):
        return False
    opened = open_account(resources.catalogue, user_id, plan, status, start or first.created_at, end)
    wanted = _with_rollover(opened, rollover or {}).balances
    found = {entry.meter: balance_of(entry) for entry in entries[1:]}

    def about(balance: Balance | None) -> object:
        return balance and (balance.period_start, balance.period_end, balance.rollover)

    return all(about(balance) == about(found.get(meter)) for meter, balance in wanted.items())


def _require_moment(at: str) -> None:
    if at not in get_args(Moment):
        raise AccountError(f"at: must be {' or '.join(get_args(Moment))} (got {at!r:.64})")


def _require_time(field: str, moment: datetime) -> None:
    """Raise AccountError for a time without an offset: it names no moment."""
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise AccountError(f"{field}: must be a time with an offset (got {str(moment)[:64]!r})")


def _require_start(start: datetime) -> None:
    """Raise AccountError if the calendar would end within the first period."""
    _require_time("period_start", start)
    if start.year == MAXYEAR:
        raise AccountError(f"period_start: must be before the year {MAXYEAR} (got {start.isoformat()})")


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
