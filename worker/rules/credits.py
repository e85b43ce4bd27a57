"""Purchased units: what an account bought, order by order, and how much of it a refund may take. Pure rules, no I/O.

All of it follows from the ledger entries of one account and meter, in their order. Nothing else stores it, so `verify`
replays it from the same entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from worker.rules.account import Balance
from worker.rules.grants import UNNAMED, Boundary, Grant, Grants, after_boundary, due_boundary, unnamed
from worker.rules.rows import EntryRow, UsageRow
from worker.rules.waterfall import available

# The kinds of entries that say something about purchases.
CREDIT_KINDS = (
    "open_meter", "grant", "grant_ahead", "expire", "clawback", "transfer_in", "transfer_out", "adjust", "undo",
    "merge_grants",
)  # fmt: skip


class Order(NamedTuple):
    """An order: units that it gave, and units that were taken back of it.

    `carried`: a carry-over moved the order to another account; refunds of it count there. `expired` are units that
    expired, or that returned after that, and that no refund counted yet: a refund finds them gone. `grant` is the
    credit as it was given; None of an order that an earlier release granted.
    """

    given: int
    taken: int = 0
    carried: bool = False
    expired: int = 0
    grant: Grant | None = None

    @property
    def left(self) -> int:
        """Return the units that a refund may still take."""
        return 0 if self.carried else max(0, self.given - self.taken)

    @property
    def unrefunded(self) -> int:
        """Return the units given that no refund took and that have not expired."""
        return max(0, self.given - self.taken - self.expired)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it; `from_json` reads it. An order without these says no word of grants."""
        facts: dict[str, Any] = {"given": self.given, "taken": self.taken, "carried": self.carried}
        if self.expired:
            facts["expired"] = self.expired
        if self.grant is not None:
            facts["grant"] = self.grant.as_json()
        return facts

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Order:
        """Return the value that `as_json` wrote."""
        grant = stored.get("grant")
        return cls(**{**stored, "grant": grant and Grant.from_json(grant)})


class Purchases(NamedTuple):
    """The purchases of an account on one meter: units bought and not taken back, and its orders by key.

    `bought` counts units that came by carry-over, and spent ones: a refund of these becomes debt. It is below zero
    after claw-backs of a former release, which had no bound.
    """

    bought: int = 0
    orders: Mapping[str, Order] = MappingProxyType({})

    def may_take(self, order: str | None) -> int:
        """Return the most units that a refund may take: of `order`, else of everything bought.

        What expired of other orders is gone, and is no unit that this refund could take.
        """
        others = sum(other.expired for key, other in self.orders.items() if key != order and not other.carried)
        bought = max(0, self.bought - others)
        return bought if order is None else min(bought, self.orders[order].left)

    def moved(self) -> dict[str, Any]:
        """Return what a carry-over takes along, for the details of its two entries."""
        orders = {key: order.as_json() for key, order in self.orders.items() if not order.carried}
        return {"bought": max(0, self.bought), "orders": orders}

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it; `from_json` reads it."""
        return {"bought": self.bought, "orders": {key: order.as_json() for key, order in self.orders.items()}}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Purchases:
        """Return the value that `as_json` wrote."""
        return cls(stored["bought"], {key: Order.from_json(order) for key, order in stored["orders"].items()})


def purchases_of(entries: Iterable[EntryRow]) -> Purchases:
    """Return the purchases that the entries of one account and meter make, in order."""
    purchases = Purchases()
    for entry in entries:
        purchases = after_entry(purchases, entry)
    return purchases


def after_entry(purchases: Purchases, entry: EntryRow) -> Purchases:
    """Return the purchases after one more entry of their account and meter."""
    return _STEPS.get(entry.kind, _unchanged)(purchases, entry)


def _unchanged(purchases: Purchases, _: EntryRow) -> Purchases:
    return purchases


def _opened(_: Purchases, entry: EntryRow) -> Purchases:
    brought = entry.detail.get("purchases")
    return Purchases(entry.purchased_change) if brought is None else Purchases.from_json(brought)


def _granted(purchases: Purchases, entry: EntryRow) -> Purchases:
    if entry.entry_key.startswith(STARTED):
        return purchases  # given by the entry that accepted it
    grant, key = grant_in(entry), order_in(entry.entry_key)
    given = entry.purchased_change if grant is None else grant.left
    return _with(purchases, given, key, given=given, grant=grant)


def _expired(purchases: Purchases, entry: EntryRow) -> Purchases:
    return _with_expired(purchases, {order_in(entry.entry_key): -entry.purchased_change})


def _reversed(purchases: Purchases, entry: EntryRow) -> Purchases:
    return _with_expired(purchases, entry.detail.get("gone", {}))


def _clawed_back(purchases: Purchases, entry: EntryRow) -> Purchases:
    amount = entry.detail["amount"]
    purchases = _with(purchases, -amount, entry.detail.get("order"), taken=amount)
    return _with_expired(purchases, entry.detail.get("gone", {}), -1)


def without_refund(purchases: Purchases, entry: EntryRow) -> Purchases:
    """Return the purchases as if the refund of this entry had not been."""
    amount = entry.detail["amount"]
    purchases = _with(purchases, amount, entry.detail.get("order"), taken=-amount)
    return _with_expired(purchases, entry.detail.get("gone", {}))


def _went(purchases: Purchases, entry: EntryRow) -> Purchases:
    carried = {key: order._replace(carried=True) for key, order in purchases.orders.items()}
    return Purchases(purchases.bought - entry.detail.get("bought", -entry.purchased_change), carried)


def _came(purchases: Purchases, entry: EntryRow) -> Purchases:
    purchases = purchases._replace(bought=purchases.bought + entry.detail.get("bought", entry.purchased_change))
    for key, stored in entry.detail.get("orders", {}).items():
        order = Order.from_json(stored)
        purchases = _with(purchases, 0, key, given=order.given, taken=order.taken, grant=order.grant)
        purchases = _with_expired(purchases, {key: order.expired})
    return purchases


def _adjusted(purchases: Purchases, entry: EntryRow) -> Purchases:
    return purchases._replace(bought=purchases.bought + entry.purchased_change)


def _undone(purchases: Purchases, entry: EntryRow) -> Purchases:
    kind, amount, order = entry.detail["kind"], entry.detail["amount"], entry.detail["order"]
    gone = entry.detail.get("gone", {})
    if kind in ("grant", "grant_ahead"):
        return _with_expired(_with(purchases, -amount, order, taken=amount), gone, -1)
    if kind == "clawback":
        return _with_expired(_with(purchases, amount, order, taken=-amount), gone)
    return _with_expired(_adjusted(purchases, entry), gone)


_STEPS = {
    "open_meter": _opened,
    "grant": _granted,
    "grant_ahead": _granted,
    "expire": _expired,
    "reversal": _reversed,
    "clawback": _clawed_back,
    "transfer_out": _went,
    "transfer_in": _came,
    "adjust": _adjusted,
    "undo": _undone,
}


def _with(
    purchases: Purchases,
    bought: int,
    order: str | None,
    *,
    given: int = 0,
    taken: int = 0,
    grant: Grant | None = None,
) -> Purchases:
    """Return the purchases after these units, of this order if one is named.

    An order that comes to an account counts there from then on, though it was carried away before.
    """
    total = purchases.bought + bought
    if order is None:
        return purchases._replace(bought=total)
    known = purchases.orders.get(order, Order(0))
    if known.carried and given:
        known = Order(0)
    changed = known._replace(given=known.given + given, taken=known.taken + taken, grant=grant or known.grant)
    return Purchases(total, {**purchases.orders, order: changed})


def _with_expired(purchases: Purchases, units: Mapping[str, int], sign: int = 1) -> Purchases:
    """Return the purchases after these units of orders expired, or a refund counted them."""
    orders = {
        key: purchases.orders[key]._replace(expired=purchases.orders[key].expired + sign * gone)
        for key, gone in units.items()
        if gone and key in purchases.orders
    }
    return purchases._replace(orders={**purchases.orders, **orders}) if orders else purchases


# The beginning of the key of the entry with which a grant that was accepted before comes into force.
STARTED = "start:"


def grant_in(entry: EntryRow) -> Grant | None:
    """Return the grant that an entry made or accepted; None of an entry of an earlier release."""
    stored = entry.detail.get("grant")
    return None if stored is None else Grant.from_json(stored)


def order_in(entry_key: str) -> str:
    """Return the caller's key in the key of an entry."""
    return entry_key.split(":", 1)[1]


def missing_units(balance: Balance, status: str) -> int:
    """Return the units that an account lacks before anything is available: its debt counts against all that it has."""
    limit, used, rollover, purchased, spill = balance.buckets(status)
    if limit is None or not spill:
        return 0
    return max(0, -(max(0, limit - used) + rollover + purchased))


def free_units(balance: Balance, status: str, held: int) -> int:
    """Return the purchased units that `held` units, which open holds may still cost, cannot need."""
    left = available(balance.buckets(status), held)
    return balance.purchased if left is None else min(balance.purchased, left)


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of the grants of a balance


def grants_on(balance: Balance) -> Grants:
    """Return the grants of a balance; credit that no order gave is one without a name."""
    if balance.grants is not None:
        return balance.grants
    return Grants((unnamed(balance.purchased),) if balance.purchased else ())


def with_grants(balance: Balance, grants: Grants) -> Balance:
    """Return the balance with these grants: what is left of those in force is its purchased units."""
    return balance._replace(purchased=grants.units(), grants=grants.packed())


def add_units(balance: Balance, units: int) -> Balance:
    """Return the balance with `units` more, or fewer, of purchased credit that belongs to no order.

    Units that go are taken in the order in which grants pay. So goes each change of an earlier release, which knows no
    grants; a trigger of `balance` does the same.
    """
    if balance.grants is None:
        return balance._replace(purchased=balance.purchased + units)
    if units < 0:
        return with_grants(balance, balance.grants.take(-units)[0])
    return with_grants(balance, balance.grants.plus([unnamed(units)])) if units else balance


def add_units_at(balance: Balance, units: int, at: datetime) -> Balance:
    """Return the same as `add_units`, but take nothing at the moment `at` of a grant that has ended before others."""
    if balance.grants is None or units >= 0:
        return add_units(balance, units)
    return with_grants(balance, balance.grants.take_at(-units, at, started=False)[0])


def give(balance: Balance, grant: Grant, *, to_come: bool) -> Balance:
    """Return the balance with one more grant; its units are purchased now, unless it is `to_come`."""
    return with_grants(balance, grants_on(balance).plus([grant], to_come=to_come))


class Taken(NamedTuple):
    """Units that a refund took: those `used` of each grant, by key; `gone` had expired before; the rest is `debt`."""

    balance: Balance
    used: dict[str, int]
    gone: int
    debt: int


def take_back(balance: Balance, amount: int, at: datetime, order: str | None = None, expired: int = 0) -> Taken:
    """Take purchased units back, of the grant of `order` first, then of the grants that pay next at the moment `at`.

    `expired` units of the order are gone already: nothing is taken for them. Units that are spent become debt.
    """
    grants = grants_on(balance)
    own = grants.of(order) if order is not None else None
    gone = min(expired, max(0, amount - (own.left if own else 0)))
    left, used = grants.take_at(amount - gone, at, order)
    debt = amount - gone - sum(used.values())
    after = with_grants(balance, left)
    return Taken(after._replace(rollover=after.rollover - debt), used, gone, debt)


class Returned(NamedTuple):
    """A balance to which units returned; `gone` are those of grants that have ended, by key.

    `reclaimed` are those that a refund of their order had taken elsewhere: they return there.
    """

    balance: Balance
    gone: dict[str, int]
    reclaimed: dict[str, int]


def put_back(balance: Balance, used: Mapping[str, int], orders: Mapping[str, Order], at: datetime) -> Returned:
    """Return units to the grants that gave them, by key, at the moment `at`.

    Units of a grant that has ended are gone. Not so those that a refund counted: it found them spent, and took others
    or made a debt. A grant with an end never gets them again; they pay debt, and what is more belongs to no order.
    Units of an order that says nothing of its grant belong to no order.
    """
    grants, gone, reclaimed = grants_on(balance), dict[str, int](), dict[str, int]()
    for key, units in used.items():
        open_grant = grants.of(key)
        order = orders.get(key)
        grant = open_grant or (order and order.grant) or unnamed(0)
        if order is not None and grant.expires_at is not None:
            own = min(units, max(0, order.unrefunded - (open_grant.left if open_grant else 0)))
            if units > own:
                reclaimed[key] = units - own
            units = own
        if not units:
            continue
        if open_grant is None and grant.has_ended(at):
            gone[key] = units
            continue
        waits = any(each.key == key for each in grants.to_come) or (open_grant is None and grant.effective_at > at)
        grants = grants.plus([grant._replace(left=units)], to_come=waits)
    others = sum(reclaimed.values())
    paid = min(others, max(0, -balance.rollover))
    after = with_grants(balance, grants)._replace(rollover=balance.rollover + paid)
    return Returned(add_units(after, others - paid), gone, reclaimed)


def move_out(balance: Balance, units: int, at: datetime) -> tuple[Balance, Grants]:
    """Take `units` of the grants that pay last, and all that are to come; return what is left, and what moves.

    Holds are paid by the grants that stay. A grant that has ended by `at` stays also, to expire where it is.
    """
    grants = grants_on(balance)
    lasting = Grants(*(tuple(each for each in part if not each.has_ended(at)) for part in grants))
    moving = Grants(lasting.last(units), lasting.to_come)
    left = grants.less({grant.key: grant.left for part in moving for grant in part})
    return with_grants(balance, left), moving


def move_in(balance: Balance, moving: Grants) -> Balance:
    """Return the balance with the grants that came with a carry-over."""
    grants = grants_on(balance).plus(moving.in_force).plus(moving.to_come, to_come=True)
    return with_grants(balance, grants)


def cross_grants(balance: Balance, until: datetime) -> Iterator[tuple[Boundary, Balance]]:
    """Yield each start and end of a grant that is due at `until`, in the order of time, with the balance after it."""
    while balance.grants is not None and (boundary := due_boundary(balance.grants, until)) is not None:
        balance = with_grants(balance, after_boundary(balance.grants, boundary))
        yield boundary, balance


def told_of_grants(
    before: Balance,
    after: Balance,
    used: Mapping[str, int],
    gone: Mapping[str, int],
    reclaimed: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return what the entry of a change says about the grants that it took from or gave back to, by key.

    Of a balance without grants it says nothing: an entry of an earlier release looks the same, and means the same.
    """
    if before.grants is None and after.grants is None and not gone and not reclaimed:
        return {}
    return {"grants": dict(used), "gone": dict(gone)} | ({"reclaimed": dict(reclaimed)} if reclaimed else {})


def used_in(row: UsageRow) -> Mapping[str, int]:
    """Return the units that an event took of each grant, by key."""
    return row.grants or ({UNNAMED: row.from_purchased} if row.from_purchased else {})
