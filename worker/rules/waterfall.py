"""The waterfall: which bucket pays. Pure rules, no I/O.

An amount is taken from the subscription's allowance, then from rollover, then from purchased credits; what is left
becomes debt, which is a negative rollover. Rules: the order and the edge cases are the golden cases in
tests/vectors/waterfall.json.
"""

from __future__ import annotations

from typing import NamedTuple

ENTITLED_STATUSES = frozenset({"trialing", "active", "past_due"})
# What an account can be set to; `closed` is for good, see worker/admin/erasure.py.
STATUSES = (*sorted(ENTITLED_STATUSES), "canceled", "expired", "paused", "unpaid")


class Buckets(NamedTuple):
    """Balance of one account on one meter. `limit` None = unlimited; `rollover` below zero is debt."""

    limit: int | None
    used: int
    rollover: int
    purchased: int
    spill: bool


class Split(NamedTuple):
    """What each bucket paid; the four sum to the amount."""

    from_subscription: int
    from_rollover: int
    from_purchased: int
    overflow_to_debt: int


def pay(buckets: Buckets, amount: int) -> tuple[Buckets, Split]:
    """Take `amount` (≥ 0 units) from the buckets; returns the balances after and who paid. Always succeeds."""
    limit, used, rollover, purchased, spill = buckets
    if limit is None or not spill or used + amount <= limit:
        return Buckets(limit, used + amount, rollover, purchased, spill), Split(amount, 0, 0, 0)
    subscription = max(0, limit - used)
    rest = amount - subscription
    from_rollover = min(rest, max(0, rollover))
    rest -= from_rollover
    from_purchased = min(rest, purchased)
    debt = rest - from_purchased
    after = Buckets(limit, used + subscription, rollover - from_rollover - debt, purchased - from_purchased, spill)
    return after, Split(subscription, from_rollover, from_purchased, debt)


def available(buckets: Buckets, pending: int) -> int | None:
    """Units that may still be spent when `pending` units are promised elsewhere; None = unlimited."""
    if buckets.limit is None:
        return None
    room = max(0, buckets.limit - buckets.used)
    if buckets.spill:
        room += buckets.rollover + buckets.purchased
    return max(0, room - pending)


def limit_in_force(allowance: int | None, status: str) -> int | None:
    """The allowance that counts while the account has `status`: none at all unless the status is entitled."""
    return allowance if status in ENTITLED_STATUSES else 0
