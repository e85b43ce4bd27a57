"""The part of a request that the sponsorship pool covers. Pure rules, no I/O.

The pool pays for requests of trusted accounts, within a daily budget per trust tier. The golden cases are
tests/vectors/sponsor.json; worker/keyspace/lua/sponsor.lua decides the same way.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from hashlib import sha256
from typing import NamedTuple

# The tier of unknown users.
LOWEST_TIER = "new"
# Length of a budget's window. It floats: the first hold after the last window opens the next.
DAY_MS = 86_400_000


class Decision(NamedTuple):
    """The answer to a request, `free`, `partial` or `gate`, and its reason.

    `absorb` and `charge` sum to the estimate, if that is positive.
    """

    serve: str
    absorb: int
    charge: int
    reason: str


def decide(estimate: int, daily_budget: int, absorbed_today: int, pool: int) -> Decision:
    """Return the part of `estimate` units that the pool covers, and the rest to charge to the user.

    The open window absorbed or holds `absorbed_today`; `pool` units are neither given away nor held. Both may exceed
    their bounds, as an operator may lower a budget at any time: then nothing is left.
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
    """Return the units that the pool pays for a request that cost `actual`, after the user paid `paid`.

    Never more than the pool `held` for it.
    """
    return min(held, max(0, actual - paid))


def credit_of(paid: int, share_percent: int | Decimal) -> int:
    """Return the share of `paid` units that flows back into the pool, exact and rounded down."""
    numerator, denominator = share_percent.as_integer_ratio()
    return paid * numerator // (100 * denominator)


def hash_of(request_id: str) -> bytes:
    """Return the ledger's key of a request: SHA-256 of its id."""
    return sha256(request_id.encode()).digest()


class Pool(NamedTuple):
    """The units in the pool after its change number `seq`."""

    units: int
    seq: int
    epoch: int


class PoolStanding(NamedTuple):
    """A user's standing by the ledger: trust tier, last window, units absorbed in it.

    The tier is None without an account, and `!` for a suspended one, which has no budget.
    """

    tier: str | None
    seq: int
    epoch: int
    window_start: datetime | None
    absorbed: int


class GrantRow(NamedTuple):
    """The pool's part of one request, in the order of the columns. Amounts in units of the pool.

    `trace_id` names the trace of the call that settled it, if it had one.
    """

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
    trace_id: str | None = None


class CreditRow(NamedTuple):
    """The pool's share of one paid request, in the order of the columns.

    `share` is the exact percentage if that is no whole number; `share_percent` is then its whole part.
    """

    request_hash: bytes
    seq: int
    paid: int
    share_percent: int
    credited: int
    pool_after: int
    created_at: datetime
    share: Decimal | None = None

    @property
    def percent(self) -> int | Decimal:
        """The percentage in force."""
        return self.share_percent if self.share is None else self.share


class Known(NamedTuple):
    """Recorded facts by request hash: (user, actual, paid) of grants, and the payments of credits."""

    granted: dict[bytes, tuple[str, int, int]]
    credited: dict[bytes, int]


class Locked(NamedTuple):
    """The facts for a batch, read under its locks. `in_use`: users with skipped accounts."""

    now: datetime
    pool: Pool
    known: Known
    in_use: frozenset[str]
