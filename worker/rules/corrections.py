"""Counter-entries: what an adjustment, a forgiven debt and an undone entry do to a balance. Pure rules, no I/O."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from worker.rules.account import Balance
from worker.rules.credits import Purchases, add_units_at, grants_on, order_in, put_back, with_grants, without_refund
from worker.rules.grants import UNNAMED
from worker.rules.rows import EntryRow


class Shift(NamedTuple):
    """Units that are added to the buckets of a balance; below zero they are taken."""

    used: int = 0
    rollover: int = 0
    purchased: int = 0


BUCKETS = Shift._fields

# Kinds of entries that give credit: now, or later.
GRANT_KINDS = ("grant", "grant_ahead")


def shifted(balance: Balance, shift: Shift, at: datetime) -> Balance:
    """Return the balance after a shift at the moment `at`; whoever calls keeps its bounds."""
    moved = balance._replace(used=balance.used + shift.used, rollover=balance.rollover + shift.rollover)
    return add_units_at(moved, shift.purchased, at)


class PutBack(NamedTuple):
    """A balance after an entry was put back.

    By key of a grant: `used` are the units that moved, `gone` those of ended grants, `reclaimed` those that a refund
    had taken already.
    """

    balance: Balance
    used: dict[str, int]
    gone: dict[str, int]
    reclaimed: dict[str, int]


def shift_back(entry: EntryRow, balance: Balance, purchases: Purchases, at: datetime) -> PutBack:
    """Return the balance after what an entry changed is put back, at the moment `at`.

    Units return to the grants that it took them from; of a grant that has ended they are gone, and so are those that it
    found gone itself. Units that it gave go from the credit without an order first, then from the grants that pay next.
    """
    shift = taken_back_shift(entry)
    used, gone = dict(entry.detail.get("grants", {})), dict(entry.detail.get("gone", {}))
    others = shifted(balance, shift._replace(purchased=0), at)
    if shift.purchased < 0:
        left, taken = grants_on(others).take(-shift.purchased, UNNAMED)
        return PutBack(with_grants(others, left), taken, gone, {})
    if not used:
        return PutBack(shifted(balance, shift, at), used, gone, {})
    orders = without_refund(purchases, entry).orders if entry.kind == "clawback" else purchases.orders
    returned = put_back(others, used, orders, at)
    for key, units in returned.gone.items():
        gone[key] = gone.get(key, 0) + units
    return PutBack(returned.balance, used, gone, dict(returned.reclaimed))


def forgiven(balance: Balance, amount: int) -> Balance:
    """Return the balance after `amount` units of its debt were forgiven."""
    return balance._replace(rollover=balance.rollover + amount)


def taken_back_shift(entry: EntryRow) -> Shift:
    """Return the shift that puts back what an entry changed."""
    return Shift(-entry.used_change, -entry.rollover_change, -entry.purchased_change)


def undoing(entry: EntryRow, purchases: Purchases) -> dict[str, Any]:
    """Return what the counter-entry of an entry says: entry and kind, order, and units that it takes or puts back.

    Of a grant it takes what no refund took back, and what is left of everything bought.
    """
    facts = {"entry": entry.entry_key, "kind": entry.kind}
    if entry.kind in GRANT_KINDS:
        order = order_in(entry.entry_key)
        return {**facts, "order": order, "amount": purchases.may_take(order)}
    return {**facts, "order": entry.detail.get("order"), "amount": entry.detail.get("amount", 0)}


def in_words(shift: Shift) -> str:
    """Return a shift as a message tells it: `used +5, rollover -3`."""
    return ", ".join(f"{name} {units:+}" for name, units in shift._asdict().items() if units)
