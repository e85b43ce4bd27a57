"""Changes of credits by operators and shops: grant, claw back, seed, carry over, reverse.

Every change is a ledger entry with an idempotency key, under the account's lock; see worker/admin/change.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import psycopg

from schemas.events import MAX_AMOUNT, MAX_TOTAL
from worker.admin.change import (
    Held,
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
from worker.ledger.accounts import allowance_at, existing_accounts, has_entry, read_entry, read_usage
from worker.ledger.connection import Postgres, batch_connection
from worker.resources import Resources
from worker.rules.account import Balance, Cause, Change, ChangeAnswer
from worker.rules.calendar import CALENDAR_CADENCES
from worker.rules.history import open_for_good
from worker.rules.lifecycle import open_account
from worker.rules.periods import open_balance, opened_meter, rolled_over
from worker.rules.rows import EntryRow, UsageRow, Writes


def grant(
    resources: Resources,
    user_id: str,
    meter: str,
    amount: int,
    key: str,
    *,
    plan: str | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Add `amount` purchased units, which never expire.

    `key` (the paid order or invoice) makes repeats harmless. A missing account is opened on `plan`, else on the setting
    `default_plan`, without a refill before its next boundary.
    Raises AccountError for an unknown account or meter, an amount out of range, a meter that does not spill (no event
    could ever spend the credit), and a key of another amount.
    """
    cause = cause_of(actor, reason)
    _require_spending(resources, meter, amount)
    require_identifier("key", key)
    entry_key = f"grant:{key}"
    _open_missing(resources, user_id, plan, cause)
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        known = read_entry(postgres, user_id, entry_key, meter)
        if known is not None and known.purchased_change != amount:
            raise AccountError(f"key: {key} was used for {known.purchased_change} of {meter}")
        if known is not None:
            return answer(resources, account.current, now, repeated=True)
        account, before = _with_meter(resources, account, meter, now)
        after = before._replace(purchased=before.purchased + amount)
        if after.purchased > MAX_TOTAL:
            raise AccountError(f"amount: purchased would exceed {MAX_TOTAL}")
        account = _moved(
            account, Change(kind="grant", key=entry_key, meter=meter, before=before, after=after, detail={})
        )
        return commit(resources, postgres, now, account, granted={meter: amount})


def claw_back(
    resources: Resources,
    user_id: str,
    meter: str,
    amount: int,
    key: str,
    *,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Take `amount` purchased units back, as after a refund.

    Units that are spent already become debt; the answer says how many. `key` makes repeats harmless.
    Raises AccountError as `grant` does.
    """
    cause = cause_of(actor, reason)
    _require_spending(resources, meter, amount)
    require_identifier("key", key)
    entry_key = f"clawback:{key}"
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        known = read_entry(postgres, user_id, entry_key, meter)
        if known is not None and known.purchased_change + known.rollover_change != -amount:
            raise AccountError(f"key: {key} was used for {-known.purchased_change - known.rollover_change} of {meter}")
        if known is not None:
            return answer(resources, account.current, now, repeated=True, debt=-known.rollover_change)
        account, before = _with_meter(resources, account, meter, now)
        left = min(amount, before.purchased)
        debt = amount - left
        after = before._replace(purchased=before.purchased - left, rollover=before.rollover - debt)
        if after.rollover < -MAX_TOTAL:
            raise AccountError(f"amount: the debt would exceed {MAX_TOTAL}")
        account = _moved(
            account,
            Change(
                kind="clawback",
                key=entry_key,
                meter=meter,
                before=before,
                after=after,
                detail={"amount": amount, "debt": debt},
            ),
        )
        return commit(resources, postgres, now, account)._replace(debt=debt)


def seed_signup(
    resources: Resources,
    user_id: str,
    amount: int | None = None,
    *,
    meter: str = "credits",
    plan: str | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Open an account with `amount` units in its first period of `meter`.

    Without an `amount`, and in later periods, the plan decides. An existing account is not seeded again, whether or not
    this call opened it: the answer is `repeated`.
    Raises AccountError for an unknown meter, an amount out of range, and a plan that does not replenish the meter.
    """
    cause = cause_of(actor, reason)
    require_users([user_id])
    code = _plan_to_open(resources, plan)
    granted = resources.catalogue.plan(code).meters.get(meter)
    if granted is None or granted.quantity is None:
        raise AccountError(f"meter: {code} grants no number of {meter!r}")
    units = granted.quantity if amount is None else amount
    if type(units) is not int or not 0 <= units <= MAX_AMOUNT:
        raise AccountError(f"amount: must be a whole number from 0 to {MAX_AMOUNT} (got {units})")

    with batch_connection(resources.engine) as postgres:
        loaded = batch.load_for_update(postgres, [user_id], ([], []))
        if user_id in loaded.accounts:
            return answer(resources, loaded.accounts[user_id], loaded.now, repeated=True)
        require_not_closed(loaded)
        account = open_account(resources.catalogue, user_id, code, "active", loaded.now)
        seeded = account.balances[meter]._replace(allowance=units)
        account = account._replace(balances={**account.balances, meter: seeded})
        writes = Writes.none()
        account = open_for_good(writes, account, loaded.now, cause, seeded={meter: units})
        opened = [new._replace(granted=units if new.balance.meter == meter else 0) for new in writes.opened_balances]
        try:
            batch.store_and_commit(postgres, writes._replace(opened_balances=opened), loaded.now)
        except psycopg.errors.UniqueViolation:
            # Another call was faster.
            return seed_signup(resources, user_id, amount, meter=meter, plan=plan, actor=actor, reason=reason)
    refresh(resources, [user_id])
    return ChangeAnswer(account)


def carry_over(
    resources: Resources,
    from_user: str,
    to_user: str,
    key: str,
    *,
    meter: str = "credits",
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Move all purchased units of `meter` to another account.

    A trial does so when it becomes an account. `key` makes repeats harmless.
    Returns the receiving account.
    Raises AccountError for an unknown account or meter, and for the key of a transfer between other accounts.
    """
    cause = cause_of(actor, reason)
    require_identifier("key", key)
    _require_meter(resources, meter)
    if from_user == to_user:
        raise AccountError("to_user: must be another account than from_user")
    entry_key = f"transfer:{key}"
    with locked(resources, to_user, from_user, cause=cause) as (postgres, now, (taker, giver)):
        came = read_entry(postgres, to_user, entry_key, meter)
        went = read_entry(postgres, from_user, entry_key, meter)
        if came and went and _are_one_transfer(came, went):
            return answer(resources, taker.current, now, repeated=True)
        if came or went:
            raise AccountError(f"key: {key} was used for another transfer")
        giver, given = _with_meter(resources, giver, meter, now)
        taker, taken = _with_meter(resources, taker, meter, now)
        total = taken.purchased + given.purchased
        if total > MAX_TOTAL:
            raise AccountError(f"to_user: purchased would exceed {MAX_TOTAL}")
        # The key is in both ledger entries. Neither names the other account: its user may ask for erasure one day.
        out = Change(
            kind="transfer_out", key=entry_key, meter=meter, before=given, after=given._replace(purchased=0), detail={}
        )
        into = Change(
            kind="transfer_in",
            key=entry_key,
            meter=meter,
            before=taken,
            after=taken._replace(purchased=total),
            detail={},
        )
        return commit(resources, postgres, now, _moved(taker, into), _moved(giver, out))


def _are_one_transfer(came: EntryRow, went: EntryRow) -> bool:
    """True for the two ledger entries of one transfer: they share a moment of their own."""
    return (came.kind, went.kind) == ("transfer_in", "transfer_out") and came.created_at == went.created_at


def reverse(
    resources: Resources, user_id: str, event_id: str, *, actor: str | None = None, reason: str | None = None
) -> ChangeAnswer:
    """Put the parts of an event back into their buckets, once.

    The subscription part returns to its period. If that is closed, it returns as rollover within the cap; if the
    allowance was unlimited or usage never spills, not at all. Repeating is harmless.
    Raises AccountError for an unknown account or event, and for an event that no bucket paid.
    """
    cause = cause_of(actor, reason)
    require_identifier("event_id", event_id)
    entry_key = f"reverse:{event_id}"
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        row = read_usage(postgres, user_id, event_id)
        if row is None:
            raise AccountError(f"event_id: no event {event_id} of {user_id} is recorded")
        if row.seq is None:
            raise AccountError(f"event_id: {event_id} was recorded as uncollected, no bucket paid for it")
        if has_entry(postgres, user_id, entry_key):
            return answer(resources, account.current, now, repeated=True)
        before = account.current.balances[row.meter]
        after, how = _put_back(postgres, row, before)
        parts = {name: getattr(row, name) for name in _PARTS}
        period_start = row.period_start and row.period_start.isoformat()
        detail = {"event_id": event_id, "parts": parts, "period_start": period_start, "subscription_part": how}
        account = _moved(
            account, Change(kind="reversal", key=entry_key, meter=row.meter, before=before, after=after, detail=detail)
        )
        return commit(resources, postgres, now, account, consumed={row.meter: -row.amount})


_PARTS = ("from_subscription", "from_rollover", "from_purchased", "overflow_to_debt")


def _put_back(postgres: Postgres, row: UsageRow, balance: Balance) -> tuple[Balance, str]:
    """Return the balance with the parts back; say where the subscription part went."""
    part, backend = row.from_subscription, row.backend
    balance = balance._replace(
        rollover=balance.rollover + row.from_rollover + row.overflow_to_debt,
        purchased=balance.purchased + row.from_purchased,
    )
    start, parked = row.period_start, balance.parked
    if start == balance.period_start:
        cap_used = _less(balance.cap_used, backend, row.amount)
        return balance._replace(used=balance.used - part, cap_used=cap_used), "returned to the open period"
    if parked is not None and start == parked.period_start:
        cap_used = _less(parked.cap_used, backend, row.amount)
        parked = parked._replace(used=parked.used - part, cap_used=cap_used)
        return balance._replace(parked=parked), "returned to the lifetime usage that is parked"
    if part == 0 or not balance.spill:
        return balance, "returns nothing: usage never spills" if part else "none"
    if allowance_at(postgres, row.user_id, row.meter, row.seq or 0) is None:
        return balance, "returns nothing: the allowance was unlimited"
    rollover = rolled_over(part, 0, balance.rollover, balance.rollover_cap)
    how = f"{rollover - balance.rollover} of {part} returned as rollover, within the cap: its period is closed"
    return balance._replace(rollover=rollover), how


def _less(cap_used: Mapping[str, int] | None, backend: str | None, amount: int) -> Mapping[str, int] | None:
    """Return the usage of the sub-caps without an event of `amount` on `backend`."""
    if cap_used is None or backend is None or backend not in cap_used:
        return cap_used
    return {**cap_used, backend: max(0, cap_used[backend] - amount)}


def _open_missing(resources: Resources, user_id: str, plan: str | None, cause: Cause) -> None:
    """Open the account unless it exists, without a refill before its next boundary."""
    require_users([user_id])
    with batch_connection(resources.engine) as postgres:
        if existing_accounts(postgres, [user_id]):
            return
        code = _plan_to_open(resources, plan)
        loaded = batch.load_for_update(postgres, [user_id], ([], []))
        require_not_closed(loaded)
        now = loaded.now
        account = open_account(resources.catalogue, user_id, code, "active", now)
        spent = {meter: _spent(balance) for meter, balance in account.balances.items()}
        writes = Writes.none()
        open_for_good(writes, account._replace(balances=spent), now, cause)
        try:
            batch.store_and_commit(postgres, writes, now)
        except psycopg.errors.UniqueViolation:
            return  # another call was faster
    refresh(resources, [user_id])


def _spent(balance: Balance) -> Balance:
    floating = balance.anchor == "floating" and balance.cadence in CALENDAR_CADENCES
    return balance._replace(used=balance.allowance or 0) if floating else balance


def _plan_to_open(resources: Resources, plan: str | None) -> str:
    code = plan or resources.settings.default_plan
    if code is None:
        raise AccountError("plan: missing; the account does not exist, and METERFALL_DEFAULT_PLAN is unset")
    resources.catalogue.plan(code)
    return code


def _with_meter(resources: Resources, account: Held, meter: str, now: datetime) -> tuple[Held, Balance]:
    """Return the account with a first period of `meter`, if it had none."""
    found = account.current.balances.get(meter)
    if found is not None:
        return account, found
    opened = open_balance(resources.catalogue, account.current.plan, meter, now)
    balances = {**account.current.balances, meter: opened}
    return account.then(account.current._replace(balances=balances), opened_meter(opened)), opened


def _moved(account: Held, step: Change) -> Held:
    """Return the account after a step of one meter."""
    assert step.after is not None
    balances = {**account.current.balances, step.meter: step.after}
    return account.then(account.current._replace(balances=balances), step)


def _require_meter(resources: Resources, meter: str) -> None:
    if meter not in resources.catalogue.meters:
        raise AccountError(f"meter: unknown {meter!r}; there are {', '.join(sorted(resources.catalogue.meters))}")


def _require_spending(resources: Resources, meter: str, amount: int) -> None:
    _require_meter(resources, meter)
    if not resources.catalogue.spills[meter]:
        raise AccountError(f"meter: {meter} takes no grants, usage never spills into purchased credits")
    if type(amount) is not int or not 1 <= amount <= MAX_AMOUNT:
        raise AccountError(f"amount: must be a whole number from 1 to {MAX_AMOUNT} (got {amount})")
