"""Put entries right: adjust a balance, forgive a debt, undo a grant, a claw-back or an adjustment.

History is never rewritten: each is an entry of its own, with an idempotency key, under the account's lock; see
worker/admin/change.py.
"""

from __future__ import annotations

from datetime import datetime

from schemas.events import MAX_AMOUNT, MAX_TOTAL
from worker.admin.change import (
    Held,
    answer,
    cause_of,
    commit,
    locked,
    moved,
    purchases_on,
    require_identifier,
    require_meter,
    require_same_period,
    require_spilling,
    with_meter,
)
from worker.errors import AccountError, KeyConflict
from worker.ledger.accounts import has_entry, read_entries, read_entry
from worker.ledger.connection import Postgres
from worker.resources import Resources
from worker.rules.account import Balance, Change, ChangeAnswer
from worker.rules.corrections import (
    BUCKETS,
    GRANT_KINDS,
    Shift,
    forgiven,
    in_words,
    shift_back,
    shifted,
    taken_back_shift,
    undoing,
)
from worker.rules.credits import STARTED, grants_on, order_in, take_back, told_of_grants
from worker.rules.rows import EntryRow

# Kinds of entries that have a counter-entry.
_UNDONE_KINDS = (*GRANT_KINDS, "clawback", "adjust")


def adjust(
    resources: Resources,
    user_id: str,
    meter: str,
    *,
    rollover: int = 0,
    purchased: int = 0,
    used: int = 0,
    key: str,
    actor: str,
    reason: str,
) -> ChangeAnswer:
    """Add these units, which may be below zero, to the buckets of a meter.

    `used` counts in the open period. No other bound than that of the ledger keeps rollover: below zero it is debt.
    Sub-caps stay. `key` makes repeats harmless.
    Raises AccountError for an unknown account or meter, without any unit, actor or reason, for rollover and purchased
    units of a meter that does not spill, if used or purchased would fall below zero, for used units of a period that is
    over, for a key of another adjustment, and for used or rollover while older events wait before the open period.
    """
    for field, told in (("actor", actor), ("reason", reason)):
        if told is None:
            raise AccountError(f"{field}: missing; an adjustment says who made it and why")
    cause = cause_of(actor, reason)
    require_identifier("key", key)
    require_meter(resources, meter)
    shift = Shift(used=used, rollover=rollover, purchased=purchased)
    _require_shift(resources, meter, shift)
    entry_key = f"adjust:{key}"
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        known = read_entry(postgres, user_id, entry_key, meter)
        if known is not None and _shift_in(known) != shift:
            raise KeyConflict(f"key: {key} was used for {in_words(_shift_in(known))} of {meter}")
        if known is not None:
            return answer(resources, account.current, now, repeated=True)
        account, before = with_meter(resources, account, meter, now)
        if shift.used or shift.rollover:
            require_same_period(resources, account, meter, now)
        _require_open(before, shift, now)
        after = _bounded(before, shift, now)
        taken = grants_on(before).take_at(max(0, -shift.purchased), now, started=False)[1]
        detail = {
            "adjusted": shift._asdict(),
            "period_start": before.counted_from,
            **told_of_grants(before, after, taken, {}),
        }
        step = Change(kind="adjust", key=entry_key, meter=meter, before=before, after=after, detail=detail)
        return commit(resources, postgres, now, moved(account, step))


def forgive_debt(
    resources: Resources,
    user_id: str,
    meter: str,
    amount: int | None = None,
    *,
    key: str,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Forgive `amount` units of an account's debt on a meter, by default all of it.

    `forgiven` of the answer says how many. `key` makes repeats harmless.
    Raises AccountError for an unknown account or meter, for more than the account owes, for a key of another amount,
    and while older events wait before the open period, which may pay the debt.
    """
    cause = cause_of(actor, reason)
    require_identifier("key", key)
    require_spilling(resources, meter)
    if amount is not None and (type(amount) is not int or not 1 <= amount <= MAX_TOTAL):
        raise AccountError(f"amount: must be a whole number from 1 to {MAX_TOTAL} (got {amount})")
    entry_key = f"forgive:{key}"
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        known = read_entry(postgres, user_id, entry_key, meter)
        if known is not None and amount not in (None, known.rollover_change):
            raise KeyConflict(f"key: {key} was used for {known.rollover_change} of {meter}")
        if known is not None:
            repeated = answer(resources, account.current, now, repeated=True)
            return repeated._replace(forgiven=known.rollover_change)
        before = account.current.balances.get(meter)
        if before is not None:
            require_same_period(resources, account, meter, now)
        owed = 0 if before is None else max(0, -before.rollover)
        if before is None or not owed:
            raise AccountError(f"amount: {user_id} owes nothing of {meter}")
        units = owed if amount is None else amount
        if units > owed:
            raise AccountError(f"amount: must be at most {owed}, the debt of {meter} (got {units})")
        step = Change(
            kind="forgive_debt",
            key=entry_key,
            meter=meter,
            before=before,
            after=forgiven(before, units),
            detail={"amount": units},
        )
        return commit(resources, postgres, now, moved(account, step))._replace(forgiven=units)


def undo(
    resources: Resources, user_id: str, entry: str, *, actor: str | None = None, reason: str | None = None
) -> ChangeAnswer:
    """Undo a grant, a claw-back or an adjustment by its entry key, such as `grant:order-9`: once, on all its meters.

    Of a grant it takes the units that no refund took back; spent ones become debt, `debt` of the answer. A claw-back
    and an adjustment are put back as they were made, to the same grants. Units that an adjustment added go from the
    credit without an order first. Units of a grant that has ended are gone: `gone` of the answer. Repeating is
    harmless: an entry that was undone stays undone.
    Raises AccountError for an unknown account or entry, for an entry of another kind, for a grant that was refunded or
    carried over and the refund of one that was carried over, if an adjustment can no longer be put back, and for a
    change of used or rollover while older events wait before the open period.
    """
    cause = cause_of(actor, reason)
    if not (isinstance(entry, str) and entry.isprintable()):
        raise AccountError(f"entry: must be the key of an entry, such as grant:order-9 (got {str(entry)[:64]!r})")
    undo_key = f"undo:{entry}"
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        rows = read_entries(postgres, user_id, entry)
        if not rows:
            raise AccountError(f"entry: {user_id} has no entry {str(entry)[:64]!r}")
        if rows[0].kind not in _UNDONE_KINDS:
            kinds = "grant, clawback, adjust"
            raise AccountError(f"entry: must be a {kinds} to be undone (got {rows[0].kind} {entry})")
        if entry.startswith(STARTED):
            raise AccountError(f"entry: {entry} is the start of a grant; undo grant:{order_in(entry)}")
        done = read_entries(postgres, user_id, undo_key)
        if done:
            owed = sum(row.detail["debt"] for row in done)
            gone = sum(sum(row.detail.get("gone", {}).values()) for row in done)
            return answer(resources, account.current, now, repeated=True)._replace(debt=owed, gone=gone)
        debt, gone = 0, 0
        for row in rows:
            account, owed, lost = _undone(resources, postgres, account, row, undo_key, now)
            debt += owed
            gone += lost
        return commit(resources, postgres, now, account)._replace(debt=debt, gone=gone)


def _undone(
    resources: Resources, postgres: Postgres, account: Held, row: EntryRow, undo_key: str, now: datetime
) -> tuple[Held, int, int]:
    """Return the account after the counter-entry of one entry, the debt that it made, and the units that are gone."""
    user_id, before = account.stored.user_id, account.current.balances[row.meter]
    purchases = purchases_on(postgres, account, row.meter, now)
    facts = undoing(row, purchases)
    if row.kind in GRANT_KINDS:
        order = purchases.orders[facts["order"]]
        if order.carried:
            raise AccountError(f"entry: {row.entry_key} was carried over to another account; take it back there")
        if not facts["amount"]:
            raise AccountError(f"entry: nothing of {row.entry_key} is left, {order.taken} were taken back")
        after, used, lost, debt = take_back(before, facts["amount"], now, facts["order"], order.expired)
        gone, reclaimed = {facts["order"]: lost} if lost else {}, dict[str, int]()
        if debt:
            require_same_period(resources, account, row.meter, now)
        if after.rollover < -MAX_TOTAL:
            raise AccountError(f"entry: the debt would exceed {MAX_TOTAL}")
    else:
        if facts["order"] is not None and has_entry(postgres, user_id, f"undo:grant:{facts['order']}"):
            raise AccountError(
                f"entry: the grant of {facts['order']} was undone, so nothing of {row.entry_key} returns"
            )
        if facts["order"] is not None and purchases.orders[facts["order"]].carried:
            raise AccountError(f"entry: {facts['order']} was carried over to another account; its refunds count there")
        shift, debt = taken_back_shift(row), 0
        if shift.used or shift.rollover:
            require_same_period(resources, account, row.meter, now)
        if shift.used and datetime.fromisoformat(row.detail["period_start"]) != before.counted_from:
            raise AccountError(f"entry: the period that {row.entry_key} adjusted is closed")
        _require_open(before, shift, now)
        _bounded(before, shift, now, f"entry: {row.entry_key} cannot be undone; ")
        after, used, gone, reclaimed = shift_back(row, before, purchases, now)
    detail = {**facts, "debt": debt, **told_of_grants(before, after, used, gone, reclaimed)}
    step = Change(kind="undo", key=undo_key, meter=row.meter, before=before, after=after, detail=detail)
    return moved(account, step), debt, sum(gone.values())


def _shift_in(entry: EntryRow) -> Shift:
    return Shift(**entry.detail["adjusted"])


def _require_shift(resources: Resources, meter: str, shift: Shift) -> None:
    for field, units in shift._asdict().items():
        if type(units) is not int or not -MAX_AMOUNT <= units <= MAX_AMOUNT:
            raise AccountError(f"{field}: must be a whole number from {-MAX_AMOUNT} to {MAX_AMOUNT} (got {units})")
        if units and field != "used" and not resources.catalogue.spills[meter]:
            raise AccountError(f"{field}: must be 0, as {meter} never spills (got {units})")
    if not any(shift):
        raise AccountError(f"adjust: give units of one of {', '.join(BUCKETS)}")


def _require_open(balance: Balance, shift: Shift, now: datetime) -> None:
    """Raise AccountError for used units of a floating period that is over: the next use begins another."""
    if shift.used and balance.anchor == "floating" and balance.period_end is not None and balance.period_end <= now:
        raise AccountError(f"used: the period of {balance.meter} is over, and the next use begins another")


def _bounded(before: Balance, shift: Shift, now: datetime, why: str = "") -> Balance:
    """Return the balance after a shift. Raises AccountError beyond the bounds of a bucket."""
    for field, units in shift._asdict().items():
        had = getattr(before, field)
        least = -MAX_TOTAL if field == "rollover" else 0
        if units and not least <= had + units <= MAX_TOTAL:
            bound = f"fall below {least}" if units < 0 else f"exceed {MAX_TOTAL}"
            raise AccountError(f"{why}{field}: {had} {units:+} would {bound}; add {least - had} to {MAX_TOTAL - had}")
    return shifted(before, shift, now)
