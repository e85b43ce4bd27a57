"""What the sponsorship pool covers of a request. Pure rules, no I/O.

The pool pays for requests of trusted accounts, within a daily budget per trust tier. The golden cases are
tests/vectors/sponsor.json; worker/keyspace/lua/sponsor.lua decides the same way.
"""

from __future__ import annotations

from datetime import datetime
from hashlib import sha256
from typing import NamedTuple

# The tier of those of whom nothing is known.
LOWEST_TIER = "new"
# Length of a budget's window. It floats: the first hold after the last window opens the next.
DAY_MS = 86_400_000


class Decision(NamedTuple):
    """How a request is served: `free`, `partial` or `gate`, and why. `absorb` and `charge` sum to the estimate, if that
    is positive."""

    serve: str
    absorb: int
    charge: int
    reason: str


def decide(estimate: int, daily_budget: int, absorbed_today: int, pool: int) -> Decision:
    """What the pool covers of `estimate` units, and what is left to charge to the user.

    `absorbed_today` is absorbed or held in the open window, `pool` is neither given away nor held. Both may be beyond
    their bounds, as a budget may be lowered at any time: then nothing is left.
    """
    if estimate <= 0:
        return Decision("gate", 0, 0, "nothing_to_cover")
    budget_left = max(0, daily_budget - absorbed_today)
    absorb = min(estimate, budget_left, max(0, pool))
    charge = estimate - absorb
    if charge == 0:
        return Decision("free", absorb, charge, "within_budget")
    if absorb > 0:
        return Decision("partial", absorb, charge, "budget_short" if absorb == budget_left else "pool_short")
    if daily_budget <= 0:
        return Decision("gate", absorb, charge, "no_budget")
    return Decision("gate", absorb, charge, "budget_spent" if budget_left == 0 else "pool_empty")


def absorbed_of(held: int, actual: int, paid: int) -> int:
    """What the pool pays in the end for a request that cost `actual` units, of which the user paid `paid`.

    Never more than was `held` for it.
    """
    return min(held, max(0, actual - paid))


def credit_of(paid: int, share_percent: int) -> int:
    """What flows back into the pool of `paid` units: a share of them, rounded down."""
    return paid * share_percent // 100


def hash_of(request_id: str) -> bytes:
    """Under which the ledger keeps a request: SHA-256 of its id."""
    return sha256(request_id.encode()).digest()


class Pool(NamedTuple):
    """What is in the pool, in units, after its change number `seq`."""

    units: int
    seq: int
    epoch: int


class PoolStanding(NamedTuple):
    """What the ledger knows of a user: trust tier (None without an account), the last window and what it absorbed."""

    tier: str | None
    seq: int
    epoch: int
    window_start: datetime | None
    absorbed: int


class GrantRow(NamedTuple):
    """What the pool absorbed of one request, in the order of the columns. Amounts in units of the pool."""

    request_hash: bytes
    user_id: str
    seq: int
    held: int
    actual: int
    paid: int
    absorbed: int
    pool_after: int
    tier: str
    daily_budget: int
    window_start: datetime
    late: bool
    created_at: datetime


class CreditRow(NamedTuple):
    """What came back into the pool for one paid request, in the order of the columns."""

    request_hash: bytes
    seq: int
    paid: int
    share_percent: int
    credited: int
    pool_after: int
    created_at: datetime


class Known(NamedTuple):
    """What is recorded of some requests: by hash (user, actual, paid) of grants, and what was paid of credits."""

    granted: dict[bytes, tuple[str, int, int]]
    credited: dict[bytes, int]


class Locked(NamedTuple):
    """What a batch needs to know, read after its locks are held. `in_use` are users whose accounts were skipped."""

    now: datetime
    pool: Pool
    known: Known
    in_use: frozenset[str]
