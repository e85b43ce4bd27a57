"""Values that travel between the ledger, the rules and Redis: an account and its balances at one version.

And how Redis keeps them, and what is known of the sponsorship pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from worker.rules.sponsorship import LOWEST_TIER
from worker.rules.waterfall import Buckets, limit_in_force

if TYPE_CHECKING:
    from worker.ledger.sponsorship import Pool, Standing

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Parked(NamedTuple):
    """Lifetime usage that waits until its plan returns."""

    period_start: datetime
    used: int
    cap_used: Mapping[str, int] | None

    @classmethod
    def from_json(cls, stored: Any) -> Parked:
        """As `as_json` wrote it."""
        return cls(datetime.fromisoformat(stored["period_start"]), stored["used"], stored["cap_used"])

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {**self._asdict(), "period_start": self.period_start.isoformat()}


class Balance(NamedTuple):
    """One meter of an account: the open period with the terms in force, and what is in the buckets.

    `caps` are sub-caps by backend, `cap_used` what the open period used of them; None where there are none.
    """

    meter: str
    allowance: int | None
    spill: bool
    rollover_cap: int
    caps: Mapping[str, int] | None
    cadence: str
    anchor: str
    anchored_at: datetime
    period_index: int
    period_start: datetime
    period_end: datetime | None
    used: int
    rollover: int
    purchased: int
    cap_used: Mapping[str, int] | None = None
    parked: Parked | None = None

    def after(self, used: int, rollover: int, purchased: int) -> Balance:
        """The same period with other contents. Faster than `_replace`: a batch does this once an account and meter."""
        return Balance(*self[:11], used, rollover, purchased, self.cap_used, self.parked)

    def buckets(self, status: str) -> Buckets:
        """What the waterfall sees while the account has `status`."""
        return Buckets(limit_in_force(self.allowance, status), self.used, self.rollover, self.purchased, self.spill)

    def terms(self) -> dict[str, object]:
        """What is in force and from when to when, by name; not what is in the buckets."""
        return {name: getattr(self, name) for name in TERM_FIELDS}


TERM_FIELDS = Balance._fields[1:11]


class Account(NamedTuple):
    """An account at `version`, its sequence number of changes. `balances` by meter.

    `next_plan` takes effect at `plan_change_at`, or with the next renewal where that is None; `next_status` at
    `status_change_at`. `highest_tier` is the highest rank of a plan it ever had.
    """

    user_id: str
    plan: str
    status: str
    trust: str
    version: int
    balances: Mapping[str, Balance]
    highest_tier: int = 0
    next_plan: str | None = None
    plan_change_at: datetime | None = None
    next_status: str | None = None
    status_change_at: datetime | None = None


def cache_text(epoch: int, account: Account) -> str:
    """The balance as Redis keeps it: "epoch version", then a line per meter and per sub-cap of a backend.

    A line is: meter limit used rollover purchased spill kind; `-` is an unlimited limit.
    The Lua in worker/keyspace/lua/common.lua, `read_balance`, is the reader.
    """
    return "\n".join([f"{epoch} {account.version}", *_lines(account)])


def _lines(account: Account) -> Iterator[str]:
    for meter, balance in account.balances.items():
        limit, used, rollover, purchased, spill = balance.buckets(account.status)
        kind = "unlimited" if limit is None else balance.cadence
        yield f"{meter} {'-' if limit is None else limit} {used} {rollover} {purchased} {int(spill)} {kind}"
        for backend, cap in (balance.caps or {}).items():
            cap_used = (balance.cap_used or {}).get(backend, 0)
            yield f"{sub_meter(meter, backend)} {cap} {cap_used} 0 0 0 {balance.cadence}"


def unknown_account_text(epoch: int) -> str:
    """What is cached for a user whom nobody opened: version 0, so that the first real balance replaces it."""
    return f"{epoch} 0\n?"


def cache_ttl_ms(account: Account, now: datetime, longest_ms: int) -> int:
    """How long a cached balance may live: until its next boundary or change, at most `longest_ms`, at least 1."""
    due = [int((end - now).total_seconds() * 1_000) for end in changes_after(account, now)]
    return max(1, min([longest_ms, *due]))


def changes_after(account: Account, now: datetime) -> list[datetime]:
    """Moments behind `now` at which the account may look different, though nobody changes it: its next boundaries, and
    what is scheduled.
    """
    ends = [balance.period_end for balance in account.balances.values()]
    ends += [account.plan_change_at, account.status_change_at]
    return [end for end in ends if end is not None and end > now]


def pool_text(pool: Pool) -> str:
    """The sponsorship pool as Redis keeps it: "epoch seq", then its units.

    The Lua in worker/keyspace/lua/sponsor.lua, `find`, is the reader.
    """
    return f"{pool.epoch} {pool.seq}\n{pool.units}"


def standing_text(standing: Standing) -> str:
    """Where a user stands with the pool, as Redis keeps it: "epoch seq", then tier, start (ms) of the last window, what
    that absorbed. The start is 0 where there was none. The reader is the same.
    """
    start = standing.window_start or _EPOCH
    start_ms = (start - _EPOCH) // timedelta(milliseconds=1)
    return f"{standing.epoch} {standing.seq}\n{standing.tier or LOWEST_TIER} {start_ms} {standing.absorbed}"


def sub_meter(meter: str, backend: str) -> str:
    """Name under which a sub-cap is kept: a meter of its own, as `/` occurs in no meter and no backend."""
    return f"{meter}/{backend}"


def backend_of(meter: str) -> str | None:
    """The backend in the name of a sub-cap; None for a meter."""
    return meter.partition("/")[2] or None


def is_sub_meter(meter: str) -> bool:
    """True for the name of a sub-cap: what it counts, its meter counts as well."""
    return "/" in meter
