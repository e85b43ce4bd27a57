"""Purchased units: what an account bought, order by order, and how much of it a refund may take. Pure rules, no I/O.

All of it follows from the ledger entries of one account and meter, in their order. Nothing else stores it, so `verify`
replays it from the same entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from worker.rules.account import Balance
from worker.rules.rows import EntryRow
from worker.rules.waterfall import available

# The kinds of entries that say something about purchases.
CREDIT_KINDS = ("open_meter", "grant", "clawback", "transfer_in", "transfer_out", "adjust", "undo")


class Order(NamedTuple):
    """An order: units that it gave, and units that were taken back of it.

    `carried`: a carry-over moved the order to another account; refunds of it count there.
    """

    given: int
    taken: int = 0
    carried: bool = False

    @property
    def left(self) -> int:
        """Return the units that a refund may still take."""
        return 0 if self.carried else max(0, self.given - self.taken)


class Purchases(NamedTuple):
    """The purchases of an account on one meter: units bought and not taken back, and its orders by key.

    `bought` counts units that came by carry-over, and spent ones: a refund of these becomes debt. It is below zero
    after claw-backs of a former release, which had no bound.
    """

    bought: int = 0
    orders: Mapping[str, Order] = MappingProxyType({})

    def may_take(self, order: str | None) -> int:
        """Return the most units that a refund may take: of `order`, else of everything bought."""
        bought = max(0, self.bought)
        return bought if order is None else min(bought, self.orders[order].left)

    def moved(self) -> dict[str, Any]:
        """Return what a carry-over takes along, for the details of its two entries."""
        orders = {key: order._asdict() for key, order in self.orders.items() if not order.carried}
        return {"bought": max(0, self.bought), "orders": orders}

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it; `from_json` reads it."""
        return {"bought": self.bought, "orders": {key: order._asdict() for key, order in self.orders.items()}}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Purchases:
        """Return the value that `as_json` wrote."""
        return cls(stored["bought"], {key: Order(**order) for key, order in stored["orders"].items()})


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
    return _with(purchases, entry.purchased_change, order_in(entry.entry_key), given=entry.purchased_change)


def _clawed_back(purchases: Purchases, entry: EntryRow) -> Purchases:
    amount = entry.detail["amount"]
    return _with(purchases, -amount, entry.detail.get("order"), taken=amount)


def _went(purchases: Purchases, entry: EntryRow) -> Purchases:
    carried = {key: order._replace(carried=True) for key, order in purchases.orders.items()}
    return Purchases(purchases.bought - entry.detail.get("bought", -entry.purchased_change), carried)


def _came(purchases: Purchases, entry: EntryRow) -> Purchases:
    purchases = purchases._replace(bought=purchases.bought + entry.detail.get("bought", entry.purchased_change))
    for key, order in entry.detail.get("orders", {}).items():
        purchases = _with(purchases, 0, key, given=order["given"], taken=order["taken"])
    return purchases


def _adjusted(purchases: Purchases, entry: EntryRow) -> Purchases:
    return purchases._replace(bought=purchases.bought + entry.purchased_change)


def _undone(purchases: Purchases, entry: EntryRow) -> Purchases:
    kind, amount, order = entry.detail["kind"], entry.detail["amount"], entry.detail["order"]
    if kind == "grant":
        return _with(purchases, -amount, order, taken=amount)
    if kind == "clawback":
        return _with(purchases, amount, order, taken=-amount)
    return _adjusted(purchases, entry)


_STEPS = {
    "open_meter": _opened,
    "grant": _granted,
    "clawback": _clawed_back,
    "transfer_out": _went,
    "transfer_in": _came,
    "adjust": _adjusted,
    "undo": _undone,
}


def _with(purchases: Purchases, bought: int, order: str | None, *, given: int = 0, taken: int = 0) -> Purchases:
    """Return the purchases after these units, of this order if one is named.

    An order that comes to an account counts there from then on, though it was carried away before.
    """
    total = purchases.bought + bought
    if order is None:
        return purchases._replace(bought=total)
    known = purchases.orders.get(order, Order(0))
    if known.carried and given:
        known = Order(0)
    changed = known._replace(given=known.given + given, taken=known.taken + taken)
    return Purchases(total, {**purchases.orders, order: changed})


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


def take_back(balance: Balance, amount: int) -> tuple[Balance, int]:
    """Take purchased units back; units that are spent already become debt, which is returned also."""
    left = min(amount, balance.purchased)
    debt = amount - left
    return balance._replace(purchased=balance.purchased - left, rollover=balance.rollover - debt), debt
