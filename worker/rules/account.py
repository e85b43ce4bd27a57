"""Values that travel between the ledger, the rules and Redis: an account and its balances at one version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from worker.rules.waterfall import Buckets, limit_in_force


class Parked(NamedTuple):
    """Lifetime usage that waits until its plan returns."""

    period_start: datetime
    used: int
    cap_used: Mapping[str, int] | None

    @classmethod
    def from_json(cls, stored: Any) -> Parked:
        """Return the value that `as_json` wrote."""
        return cls(datetime.fromisoformat(stored["period_start"]), stored["used"], stored["cap_used"])

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**self._asdict(), "period_start": self.period_start.isoformat()}


class Balance(NamedTuple):
    """One meter of an account: the open period with the terms in force, and the buckets.

    `caps` are sub-caps by backend, `cap_used` their usage in the open period; None without sub-caps.
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

    def after(self, left: Buckets) -> Balance:
        """Return the same period with these units left in the buckets."""
        return self._replace(used=left.used, rollover=left.rollover, purchased=left.purchased)

    def buckets(self, status: str) -> Buckets:
        """Return the buckets for the waterfall while the account has `status`."""
        return Buckets(limit_in_force(self.allowance, status), self.used, self.rollover, self.purchased, self.spill)

    def terms(self) -> dict[str, object]:
        """Return the terms in force and their bounds by name, without the buckets."""
        return {name: getattr(self, name) for name in TERM_FIELDS}


TERM_FIELDS = Balance._fields[1:11]


class Account(NamedTuple):
    """An account at `version`, its sequence number of changes. `balances` by meter.

    `next_plan` takes effect at `plan_change_at`, or with the next renewal if that is None; `next_status` at
    `status_change_at`. `highest_tier` is the highest rank of its plans so far.
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


def changes_after(account: Account, now: datetime) -> list[datetime]:
    """Return the moments after `now` at which the account changes by itself: boundaries and scheduled changes."""
    ends = [balance.period_end for balance in account.balances.values()]
    ends += [account.plan_change_at, account.status_change_at]
    return [end for end in ends if end is not None and end > now]


def sub_meter(meter: str, backend: str) -> str:
    """Return the name of a sub-cap: a meter of its own, as `/` occurs in no meter and no backend."""
    return f"{meter}/{backend}"


def sub_meters(meter: str, backends: Iterable[str]) -> list[str]:
    """Return the names of several sub-caps of one meter."""
    return [sub_meter(meter, backend) for backend in backends]


def backend_of(meter: str) -> str | None:
    """Return the backend in the name of a sub-cap; None for a meter."""
    return meter.partition("/")[2] or None


def is_sub_meter(meter: str) -> bool:
    """Return True for the name of a sub-cap; its meter counts the same units also."""
    return "/" in meter


class Cause(NamedTuple):
    """Who changed an account, and why. None: not said, as in all that the system does by itself."""

    actor: str | None
    reason: str | None


UNSAID = Cause(actor=None, reason=None)


class Change(NamedTuple):
    """One change of an account that is not usage; each becomes a ledger entry.

    `key` makes it happen at most once. A change of the account as a whole has meter "" and no balances.
    """

    kind: str
    key: str
    meter: str
    before: Balance | None
    after: Balance | None
    detail: Mapping[str, Any]
    cause: Cause = UNSAID


class ChangeAnswer(NamedTuple):
    """The outcome of a change, and the account as it is now.

    `repeated`: an earlier call did it, nothing changed now. `stale`: a later period is open already. `debt`: units that
    could not be taken back and became debt.
    """

    account: Account
    repeated: bool = False
    stale: bool = False
    debt: int = 0
