"""The waterfall: the buckets that pay. Pure rules, no I/O.

An event takes its amount from the subscription's allowance, then from rollover, then from purchased credits. The rest
becomes debt, which is a negative rollover. The golden cases in tests/vectors/waterfall.json fix the order and the edge
cases.
"""

from __future__ import annotations

from typing import NamedTuple

ENTITLED_STATUSES = frozenset({"trialing", "active", "past_due"})
# Statuses that an account can take; `closed` is for good, see worker/admin/erasure.py.
STATUSES = (
    *sorted(ENTITLED_STATUSES), "canceled", "expired", "paused", "unpaid", "incomplete", "incomplete_expired",
    "suspended",
)  # fmt: skip


class Buckets(NamedTuple):
    """The balance of one account on one meter. `limit` None = unlimited; `rollover` below zero is debt."""

    limit: int | None
    used: int
    rollover: int
    purchased: int
    spill: bool


class Split(NamedTuple):
    """The units that each bucket paid; the four sum to the amount."""

    from_subscription: int
    from_rollover: int
    from_purchased: int
    overflow_to_debt: int


def shares(
    limit: int | None, used: int, rollover: int, purchased: int, spill: bool, amount: int
) -> tuple[int, int, int, int]:
    """Return the units of `amount` (≥ 0) that each bucket pays, in the order of `Split`. This is the waterfall.

    It takes and returns plain numbers, as named values would be most of the cost of an event; `pay` has the names.
    """
    if limit is None or not spill or used + amount <= limit:
        return amount, 0, 0, 0
    subscription = max(0, limit - used)
    rest = amount - subscription
    from_rollover = min(rest, max(0, rollover))
    rest -= from_rollover
    from_purchased = min(rest, purchased)
    return subscription, from_rollover, from_purchased, rest - from_purchased


def pay(buckets: Buckets, amount: int) -> tuple[Buckets, Split]:
    """Take `amount` (≥ 0 units) from the buckets. Always succeeds.

    Returns the balances after, and the units that each bucket paid.
    """
    split = Split(*shares(*buckets, amount))
    after = buckets._replace(
        used=buckets.used + split.from_subscription,
        rollover=buckets.rollover - split.from_rollover - split.overflow_to_debt,
        purchased=buckets.purchased - split.from_purchased,
    )
    return after, split


def available(buckets: Buckets, pending: int) -> int | None:
    """Return the units left to spend beside `pending` promised ones; None = unlimited."""
    if buckets.limit is None:
        return None
    room = max(0, buckets.limit - buckets.used)
    if buckets.spill:
        room += buckets.rollover + buckets.purchased
    return max(0, room - pending)


def may_spend(status: str) -> bool:
    """Return True unless the status denies every check, hold and charge, whatever the balance."""
    return status != "suspended"


def limit_in_force(allowance: int | None, status: str) -> int | None:
    """Return the allowance under `status`: zero unless the status is entitled."""
    return allowance if status in ENTITLED_STATUSES else 0
