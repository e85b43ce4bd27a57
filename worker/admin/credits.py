"""Changes of credits by operators and shops: grant, claw back, seed, carry over, reverse.

Every change is a ledger entry with an idempotency key, under the account's lock; see worker/admin/change.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg

from schemas.events import MAX_AMOUNT, MAX_TOTAL
from worker.admin.change import (
    answer,
    cause_of,
    claim_order,
    commit,
    locked,
    moved,
    purchases_on,
    refresh,
    require_flag,
    require_identifier,
    require_meter,
    require_no_wallet,
    require_not_closed,
    require_same_period,
    require_spilling,
    require_time,
    require_users,
    with_grants_due,
    with_meter,
)
from worker.admin.pending import read_pending, require_all_applied, set_aside
from worker.errors import AccountError, KeyConflict, NotFound
from worker.ledger import batch
from worker.ledger.accounts import allowance_at, caps_at, has_entry, read_entry, read_usage
from worker.ledger.connection import Postgres, batch_connection
from worker.resources import Resources
from worker.rules.account import Balance, Cause, Change, ChangeAnswer
from worker.rules.calendar import CALENDAR_CADENCES
from worker.rules.credits import (
    Purchases,
    free_units,
    give,
    grants_on,
    missing_units,
    move_in,
    move_out,
    order_in,
    purchases_of,
    put_back,
    take_back,
    told_of_grants,
    used_in,
)
from worker.rules.grants import (
    CATEGORIES,
    DEFAULT_PRIORITY,
    FIRST_PRIORITY,
    LAST_PRIORITY,
    MAX_GRANTS,
    Category,
    Grant,
    unnamed,
)
from worker.rules.history import open_for_good
from worker.rules.lifecycle import as_of, open_account
from worker.rules.periods import rolled_over
from worker.rules.preflight import standing_in_wallet
from worker.rules.rows import EntryRow, UsageRow, Writes
from worker.rules.wallets import wallet_of


def grant(
    resources: Resources,
    user_id: str,
    meter: str,
    amount: int,
    key: str,
    *,
    category: str = "paid",
    priority: int = DEFAULT_PRIORITY,
    effective_at: datetime | None = None,
    expires_at: datetime | None = None,
    open_plan: str | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Grant `amount` purchased units, from `effective_at` (default: now) until `expires_at` (default: for ever).

    Grants pay in this order: `priority` (0 first, 100 last), the soonest end, `promotional` before `paid` (`category`),
    the earliest start. Both moments are boundaries like those of periods: an event is charged by the grants in force
    when its stream entry came in. A grant without a start, or with one that is over, is in force at once.
    `key` (the paid order or invoice) makes repeats harmless, and is used once in all accounts. With `open_plan`, a
    missing account is opened on that plan, without a refill before its next boundary; account and credit appear
    together. Credits pay no debt, yet debt counts against them: `owes` of the answer is the debt on this meter,
    `missing` the units that the account lacks before anything is available.
    Raises AccountError for an unknown account or meter, an amount out of range, a meter that does not spill (no event
    could ever spend the credit), an unknown category, a priority out of range, an end that is over or not after the
    start, too many open grants, and a key of another grant; OrderUsed for a key of another account.
    """
    cause = cause_of(actor, reason)
    _require_spending(resources, meter, "amount", amount)
    require_identifier("key", key)
    terms = _terms_of(category, priority, effective_at, expires_at)
    try:
        return _grant(resources, user_id, meter, amount, key, terms, open_plan, cause)
    except psycopg.errors.UniqueViolation:  # another call opened the account meanwhile
        return _grant(resources, user_id, meter, amount, key, terms, open_plan, cause)


class _Terms(NamedTuple):
    """How a grant pays, as its caller says it. Without a start it is in force at once."""

    category: Category
    priority: int
    effective_at: datetime | None
    expires_at: datetime | None


def _terms_of(category: str, priority: int, effective_at: datetime | None, expires_at: datetime | None) -> _Terms:
    """Return the terms of a grant. Raises AccountError."""
    if category not in CATEGORIES:
        raise AccountError(f"category: must be {' or '.join(CATEGORIES)} (got {category!r:.64})")
    if type(priority) is not int or not FIRST_PRIORITY <= priority <= LAST_PRIORITY:
        raise AccountError(
            f"priority: must be a whole number from {FIRST_PRIORITY} to {LAST_PRIORITY} (got {priority!r:.64})"
        )
    for field, moment in (("effective_at", effective_at), ("expires_at", expires_at)):
        if moment is not None:
            require_time(field, moment)
    effective_at, expires_at = (moment and moment.astimezone(UTC) for moment in (effective_at, expires_at))
    if effective_at is not None and expires_at is not None and expires_at <= effective_at:
        raise AccountError(
            f"expires_at: must be after effective_at, {effective_at.isoformat()} (got {expires_at.isoformat()})"
        )
    return _Terms(category, priority, effective_at, expires_at)


def _require_same_grant(given: Grant, meter: str, amount: int, terms: _Terms) -> None:
    """Raise KeyConflict if the key was used for another grant than this one."""
    if given.given != amount:
        raise KeyConflict(f"key: {given.key} was used for {given.given} of {meter}")
    for field, wanted in terms._asdict().items():
        found = getattr(given, field)
        if wanted != found and not (field == "effective_at" and wanted is None):
            raise KeyConflict(f"key: {given.key} was used for a grant with {field} {found} (got {wanted})")


def _grant(
    resources: Resources,
    user_id: str,
    meter: str,
    amount: int,
    key: str,
    terms: _Terms,
    open_plan: str | None,
    cause: Cause,
) -> ChangeAnswer:
    opened = False

    def opening(user_id: str, now: datetime) -> Writes:
        nonlocal opened
        opened = True
        if open_plan is None:
            raise NotFound(f"user_id: no account {user_id}; open it, or grant with open_plan (--open PLAN)")
        return _opening(resources, user_id, open_plan, now, cause)

    with locked(resources, user_id, cause=cause, opening=opening) as (postgres, now, (account,)):
        given = _given(postgres, user_id, meter, key)
        if given is not None:
            _require_same_grant(given, meter, amount, terms)
        claim_order(postgres, "grant", "key", key, user_id)
        if given is not None:
            return _with_debt(answer(resources, account.current, now, repeated=True), meter)
        require_no_wallet(resources, account.current, meter, "grant")  # no event could spend the credit
        account, before = with_meter(resources, account, meter, now)
        if terms.expires_at is not None and terms.expires_at <= now:
            raise AccountError(f"expires_at: must be after now, {now.isoformat()} (got {terms.expires_at.isoformat()})")
        begins = terms.effective_at or now
        new = Grant(key, amount, amount, terms.category, terms.priority, begins, terms.expires_at, created_at=now)
        after = give(before, new, to_come=begins > now)
        _require_room(after)
        step = Change(
            kind="grant_ahead" if begins > now else "grant",
            key=f"grant:{key}",
            meter=meter,
            before=before,
            after=after,
            detail={"grant": new.as_json()},
        )
        change = commit(resources, postgres, now, moved(account, step))
        if begins > now:
            change = change._replace(waits_until=begins)
    if opened:  # after the COMMIT also: a drain had no row yet to wait for
        refresh(resources, [user_id])
    return _with_debt(change, meter)


def _with_debt(change: ChangeAnswer, meter: str) -> ChangeAnswer:
    """Return the answer to a grant with the debt that counts against it."""
    balance = change.account.balances[meter]
    return change._replace(owes=max(0, -balance.rollover), missing=missing_units(balance, change.account.status))


def _require_room(after: Balance) -> None:
    """Raise AccountError for more purchased units, or more open grants, than a meter of an account may have."""
    grants = grants_on(after)
    if grants.units() + sum(grant.left for grant in grants.to_come) > MAX_TOTAL:
        raise AccountError(f"amount: purchased would exceed {MAX_TOTAL}")
    if len(grants.in_force) + len(grants.to_come) > MAX_GRANTS:
        raise AccountError(f"key: {MAX_GRANTS} grants of {after.meter} have something left; none may be added")


def _given(postgres: Postgres, user_id: str, meter: str, key: str) -> Grant | None:
    """Return what this order gave the account already, in this ledger or in the one it came from."""
    entries = [read_entry(postgres, user_id, entry_key, meter) for entry_key in ("open", f"grant:{key}")]
    order = purchases_of([entry for entry in entries if entry is not None]).orders.get(key)
    if order is None:
        return None
    return order.grant or unnamed(0)._replace(key=key, given=order.given)


def claw_back(
    resources: Resources,
    user_id: str,
    meter: str,
    amount: int | None = None,
    key: str | None = None,
    *,
    order: str | None = None,
    total_refunded: int | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Take purchased units back, as after a refund: `amount` of them, or up to the total that was refunded of an order.

    `order` is the key of the grant. The refund takes at most the units that this order gave and that were not taken
    back yet; without an order, at most the units that the account ever bought, less those taken back and those that
    expired. It takes from the grant of its order first, then from the grants that pay next. `total_refunded` is for
    providers that report totals: the difference to the units taken back of that order before is taken. A smaller total
    than before takes nothing and is `stale`; the same total is `repeated`.
    Units that are spent already become debt; `debt` of the answer says how many, `taken` how many in all. Units of the
    order that have expired are gone: they count as taken back and are no debt, `gone` of the answer. `key` makes
    repeats harmless; a total is its own key unless one is given.
    Raises AccountError as `grant` does, for an order that the account does not have on this meter or that was carried
    over to another account, for more units than may be taken, for a key of another refund, and for a debt while older
    events wait before the open period.
    """
    cause = cause_of(actor, reason)
    field, units = _units_to_take(amount, order, total_refunded)
    _require_spending(resources, meter, field, units)
    if order is not None:
        require_identifier("order", order)
    if key is None and total_refunded is None:
        raise AccountError("key: missing; the id of the refund")
    if key is not None:
        require_identifier("key", key)
    entry_key = f"clawback:{key or f'{order}:{total_refunded}'}"
    request = {"order": order, "total_refunded": total_refunded}
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        known = read_entry(postgres, user_id, entry_key, meter)
        if known is not None:
            _require_same_refund(known, request, amount, entry_key)
            repeated = answer(resources, account.current, now, repeated=True)
            return repeated._replace(debt=-known.rollover_change, taken=known.detail["amount"], gone=_gone_in(known))
        purchases = purchases_on(postgres, account, meter, now)
        _require_order(purchases, order, user_id, meter)
        if total_refunded is not None and order is not None:
            units -= purchases.orders[order].taken
            if units <= 0:
                return answer(resources, account.current, now, repeated=units == 0, stale=units < 0)
        allowed = purchases.may_take(order)
        if units > allowed:
            raise AccountError(_too_much(purchases, order, field, amount or total_refunded or 0, meter))
        account, before = with_meter(resources, account, meter, now)
        expired = purchases.orders[order].expired if order is not None else 0
        after, used, lost, debt = take_back(before, units, now, order, expired)
        if debt:
            require_same_period(resources, account, meter, now)
        if after.rollover < -MAX_TOTAL:
            raise AccountError(f"{field}: the debt would exceed {MAX_TOTAL}")
        gone = {order: lost} if order is not None and lost else {}
        words = told_of_grants(before, after, used, gone)
        detail = {"amount": units, "debt": debt, **request, "allowed": allowed, **words}
        step = Change(kind="clawback", key=entry_key, meter=meter, before=before, after=after, detail=detail)
        return commit(resources, postgres, now, moved(account, step))._replace(debt=debt, taken=units, gone=lost)


def _units_to_take(amount: int | None, order: str | None, total_refunded: int | None) -> tuple[str, int]:
    """Return the field that says how much is refunded, and its units. Raises AccountError unless there is one."""
    if (amount is None) == (total_refunded is None):
        raise AccountError("amount: give the units to take back, or total_refunded with an order; one of the two")
    if amount is not None:
        return "amount", amount
    if order is None:
        raise AccountError("order: missing; total_refunded is the total of one order")
    return "total_refunded", total_refunded or 0


def _require_same_refund(known: EntryRow, request: Mapping[str, object], amount: int | None, entry_key: str) -> None:
    """Raise KeyConflict if the key was used for another refund than this one."""
    told = {name: known.detail.get(name) for name in request}
    if told == request and (amount is None or known.detail["amount"] == amount):
        return
    of_order = f" of order {told['order']}" if told["order"] else ""
    total = f", as the total {told['total_refunded']}" if told["total_refunded"] else ""
    raise KeyConflict(
        f"key: {order_in(entry_key)} was used for {known.detail['amount']} of {known.meter}{of_order}{total}"
    )


def _require_order(purchases: Purchases, order: str | None, user_id: str, meter: str) -> None:
    """Raise AccountError for an order that gave the account nothing, or that is another account's now."""
    if order is None:
        return
    found = purchases.orders.get(order)
    if found is None:
        raise AccountError(f"order: {order} gave {user_id} nothing of {meter}")
    if found.carried:
        raise AccountError(f"order: {order} was carried over to another account; take it back there")


def _too_much(purchases: Purchases, order: str | None, field: str, given: int, meter: str) -> str:
    """Say what a refund may take at most, in the terms of its caller."""
    allowed = purchases.may_take(order)
    if order is None:
        return (
            f"{field}: must be at most {allowed}, the {meter} bought and neither taken back nor expired (got {given})"
        )
    found = purchases.orders[order]
    most = allowed if field == "amount" else found.taken + allowed
    told = f"{order} gave {found.given}, {found.taken} were taken back"
    if allowed < found.left:
        told += f", and {allowed} are left of everything bought"
    return f"{field}: must be at most {most}; {told} (got {given})"


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
    granted = resources.catalogue.plan(code).meters.get(meter) if isinstance(meter, str) else None
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
        try:
            batch.store_and_commit(postgres, writes, loaded.now)
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
    with_debt: bool = False,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Move the free purchased units of `meter` to another account, and the orders that gave them.

    A trial does so when it becomes an account. Units that open holds may still cost stay behind: `kept` of the answer;
    `moved` are the others. With `with_debt` the giver's debt goes along. `key` makes repeats harmless.
    Returns the receiving account. While the call runs, the giver may not spend purchased units of this meter.
    Raises AccountError for an unknown account or meter, for the key of a transfer between other accounts, for a giver
    in debt unless that goes along, while events of the giver wait to be applied, for debt that goes along while older
    events of the taker wait before its open period, and if holds need every unit.
    """
    cause = cause_of(actor, reason)
    require_identifier("key", key)
    require_meter(resources, meter)
    require_flag("with_debt", with_debt)
    require_identifier("from_user", from_user)
    require_identifier("to_user", to_user)
    if from_user == to_user:
        raise AccountError("to_user: must be another account than from_user")
    entry_key = f"transfer:{key}"
    with locked(resources, to_user, from_user, cause=cause) as (postgres, now, (taker, giver)):
        came = read_entry(postgres, to_user, entry_key, meter)
        went = read_entry(postgres, from_user, entry_key, meter)
        if came and went and _are_one_transfer(came, went):
            repeated = answer(resources, taker.current, now, repeated=True)
            return repeated._replace(moved=-went.purchased_change, kept=went.purchased_after)
        if (other := came or went) is not None:
            units = abs(other.purchased_change)
            raise KeyConflict(f"key: {key} was used for another transfer, of {units} of {meter}")
        giver, _ = with_meter(resources, giver, meter, now)
        giver, given = with_grants_due(giver, meter, now)  # no event of it waits, or nothing is stored
        taker, taken = with_meter(resources, taker, meter, now)
        with set_aside(resources, from_user, meter, given.purchased) as aside:
            pending = read_pending(resources, postgres, from_user)
            require_all_applied(pending, "from_user", from_user, "carry over")
            whole = as_of(resources.catalogue, giver.current, now)
            seen = whole.balances[meter]
            debt = max(0, -seen.rollover)
            if debt and not with_debt:
                raise AccountError(f"from_user: {from_user} owes {debt} of {meter}; take the debt along (with_debt)")
            if debt:  # what is left of the giver's periods that are over has paid its part of it
                require_same_period(resources, taker, meter, now)
            held = pending.held(meter) - pending.holds[meter][aside]
            if (wallet := wallet_of(whole.draws, meter)) == meter:  # holds of the meters that draw on it count also
                on_hold = {each: pending.held(each) for each in whole.balances} | {meter: held}
                held = standing_in_wallet(whole, meter, wallet, on_hold).pending
            units = free_units(seen._replace(rollover=seen.rollover + debt), giver.current.status, held)
            left, moving = move_out(given, units, now)
            units = moving.units()
            if given.purchased and not units:
                raise AccountError(f"from_user: holds need all {given.purchased} purchased units of {meter}")
            total = taken.purchased + units
            if total > MAX_TOTAL:
                raise AccountError(f"to_user: purchased would exceed {MAX_TOTAL}")
            if taken.rollover - debt < -MAX_TOTAL:
                raise AccountError(f"to_user: the debt would exceed {MAX_TOTAL}")
            # The key is in both ledger entries. Neither names the other account: its user may ask for erasure one day.
            detail = {**purchases_on(postgres, giver, meter, now).moved(), "units": units, "debt": debt}
            left = left._replace(rollover=left.rollover + debt)
            more = move_in(taken, moving)._replace(rollover=taken.rollover - debt)
            _require_room(more)
            if given.grants is not None or taken.grants is not None:
                detail["grants"] = moving.as_json()
            out = Change(kind="transfer_out", key=entry_key, meter=meter, before=given, after=left, detail=detail)
            into = Change(kind="transfer_in", key=entry_key, meter=meter, before=taken, after=more, detail=detail)
            change = commit(resources, postgres, now, moved(taker, into), moved(giver, out))
        return change._replace(moved=units, kept=left.purchased)


def _are_one_transfer(came: EntryRow, went: EntryRow) -> bool:
    """True for the two ledger entries of one transfer: they share a moment of their own."""
    return (came.kind, went.kind) == ("transfer_in", "transfer_out") and came.created_at == went.created_at


def reverse(
    resources: Resources, user_id: str, event_id: str, *, actor: str | None = None, reason: str | None = None
) -> ChangeAnswer:
    """Put the parts of an event back into their buckets, once.

    The subscription part returns to its period, as far as no adjustment took it off before. If that is closed, it
    returns as rollover within the cap; if the allowance was unlimited or usage never spills, not at all. Purchased
    units return to the grants that gave them; of a grant that has ended they are gone: `gone` of the answer. Those that
    a refund counted pay debt, or are credit without an order: the grant does not get them twice. Repeating is harmless.
    Raises AccountError for an unknown account or event, and for an event that no bucket paid.
    """
    cause = cause_of(actor, reason)
    require_identifier("event_id", event_id)
    entry_key = f"reverse:{event_id}"
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        row = read_usage(postgres, user_id, event_id)
        if row is None:
            raise NotFound(f"event_id: no event {event_id} of {user_id} is recorded")
        if row.seq is None:
            raise AccountError(f"event_id: {event_id} was recorded as uncollected, no bucket paid for it")
        if has_entry(postgres, user_id, entry_key):
            known = read_entry(postgres, user_id, entry_key, row.payer)
            repeated = answer(resources, account.current, now, repeated=True)
            return repeated._replace(gone=0 if known is None else _gone_in(known))
        before = account.current.balances[row.payer]
        orders = purchases_on(postgres, account, row.payer, now).orders if row.grants else {}
        credited, gone, reclaimed = put_back(before, used_in(row), orders, now)
        after, how = _put_back(postgres, row, credited)
        parts = {name: getattr(row, name) for name in _PARTS}
        period_start = row.period_start and row.period_start.isoformat()
        detail: dict[str, Any] = {
            "event_id": event_id,
            "parts": parts,
            "period_start": period_start,
            "subscription_part": how,
        }
        if after.limits is not None:
            after = after._replace(limits=after.limits.given_back(row.amount, row.seq))
            detail["seq"] = row.seq
        if row.from_purchased:
            detail |= told_of_grants(before, after, used_in(row), gone, reclaimed)
        account = moved(
            account, Change(kind="reversal", key=entry_key, meter=row.payer, before=before, after=after, detail=detail)
        )
        change = commit(resources, postgres, now, account, consumed={row.payer: -row.amount})
        return change._replace(gone=sum(gone.values()))


_PARTS = ("from_subscription", "from_rollover", "from_purchased", "overflow_to_debt")


def _put_back(postgres: Postgres, row: UsageRow, balance: Balance) -> tuple[Balance, str]:
    """Return the balance with the other parts back also; say where the subscription part went."""
    part, counted = row.from_subscription, row.meter if row.wallet else row.backend
    if not row.wallet and counted not in caps_at(postgres, row.user_id, row.meter, row.seq or 0):
        counted = None  # it never counted against a sub-cap
    balance = balance._replace(rollover=balance.rollover + row.from_rollover + row.overflow_to_debt)
    start, parked = row.period_start, balance.parked
    if start == balance.counted_from:
        cap_used = _less(balance.cap_used, counted, row.amount)
        where = _as_far_as_counted(part, balance.used, "returned to the open period")
        return balance._replace(used=max(0, balance.used - part), cap_used=cap_used), where
    if parked is not None and start == parked.period_start:
        cap_used = _less(parked.cap_used, counted, row.amount)
        where = _as_far_as_counted(part, parked.used, "returned to the lifetime usage that is parked")
        parked = parked._replace(used=max(0, parked.used - part), cap_used=cap_used)
        return balance._replace(parked=parked), where
    if part == 0 or not balance.spill:
        return balance, "returns nothing: usage never spills" if part else "none"
    if allowance_at(postgres, row.user_id, row.payer, row.seq or 0) is None:
        return balance, "returns nothing: the allowance was unlimited"
    rollover = rolled_over(part, 0, balance.rollover, balance.rollover_cap)
    how = f"{rollover - balance.rollover} of {part} returned as rollover, within the cap: its period is closed"
    return balance._replace(rollover=rollover), how


def _as_far_as_counted(part: int, used: int, where: str) -> str:
    """Say where a part went. An adjustment may have taken it off the used units already: they never go below zero."""
    return where if part <= used else f"{used} of {part} {where}: an adjustment had taken off the rest"


def _less(cap_used: Mapping[str, int] | None, counted: str | None, amount: int) -> Mapping[str, int] | None:
    """Return the usage of the sub-caps without an event of `amount` that `counted` against one, or drew on a wallet."""
    if cap_used is None or counted is None or counted not in cap_used:
        return cap_used
    return {**cap_used, counted: max(0, cap_used[counted] - amount)}


def _gone_in(entry: EntryRow) -> int:
    """Return the units that an entry says are gone."""
    gone: Mapping[str, int] = entry.detail.get("gone", {})
    return sum(gone.values())


def _opening(resources: Resources, user_id: str, plan: str, now: datetime, cause: Cause) -> Writes:
    """Return the rows of a new account, without a refill before its next boundary."""
    account = open_account(resources.catalogue, user_id, plan, "active", now)
    spent = {meter: _spent(balance) for meter, balance in account.balances.items()}
    writes = Writes.none()
    open_for_good(writes, account._replace(balances=spent), now, cause)
    return writes


def _spent(balance: Balance) -> Balance:
    """Return a first period without the allowance that a sign-up would give.

    Calendars with fixed boundaries keep theirs, and so does a lifetime cap of a meter that never spills.
    """
    replenishes = balance.anchor == "floating" and balance.cadence in CALENDAR_CADENCES
    seeds_once = balance.cadence == "off" or (balance.cadence == "lifetime" and balance.spill)
    return balance._replace(used=balance.allowance or 0) if replenishes or seeds_once else balance


def _plan_to_open(resources: Resources, plan: str | None) -> str:
    code = plan or resources.settings.default_plan
    if code is None:
        raise AccountError("plan: missing; the account does not exist, and METERFALL_DEFAULT_PLAN is unset")
    resources.catalogue.plan(code)
    return code


def _require_spending(resources: Resources, meter: str, field: str, amount: int) -> None:
    require_spilling(resources, meter)
    if type(amount) is not int or not 1 <= amount <= MAX_AMOUNT:
        raise AccountError(f"{field}: must be a whole number from 1 to {MAX_AMOUNT} (got {amount})")
