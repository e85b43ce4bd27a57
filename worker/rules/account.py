"""Values that travel between the ledger, the rules and Redis: an account and its balances at one version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from config.catalogue import Draw, NoticeRule, UnreadRule
from worker.rules.grants import Grants
from worker.rules.limits import Limits
from worker.rules.waterfall import Buckets, limit_in_force

# Who vouches for an open period that the payment provider renews, or whose calendar it pays:
# - `none`: nobody yet; it stays open until an invoice comes.
# - `trial`: it is tried out; its rest is lost.
# - `bounds`: the provider named its bounds, but no invoice yet.
# - `invoice`: an invoice paid it.
# - `grace`: the period before is over and its invoice is late; open for the hours of grace.
# - `missing`: these are over also; the limit is 0 until an invoice comes.
Backing = Literal["none", "trial", "bounds", "invoice", "grace", "missing"]


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

    `caps` are sub-caps by backend, `cap_used` their usage in the open period; None without sub-caps. A sub-cap of None
    limits nothing and is only counted. `backing` is None for a period that no payment provider renews. `counted_from`
    is the moment from which `used` counts: the start with which the period was opened, also if an invoice moved its
    bounds since. The usage log names periods by it.
    `carried` are millionths of a unit that events left over: they belong to account and meter, whatever the period.
    `grants` have what is left of each grant, together `purchased`; None: no order gave any of it. `limits` bound what
    is spent per day, week or month; None without any.
    """

    meter: str
    allowance: int | None
    spill: bool
    rollover_cap: int
    caps: Mapping[str, int | None] | None
    cadence: str
    anchor: str
    timezone: str | None
    anchored_at: datetime
    period_index: int
    period_start: datetime
    period_end: datetime | None
    backing: Backing | None
    counted_from: datetime
    used: int
    rollover: int
    purchased: int
    cap_used: Mapping[str, int] | None = None
    parked: Parked | None = None
    carried: int = 0
    grants: Grants | None = None
    limits: Limits | None = None

    def after(self, left: Buckets) -> Balance:
        """Return the same period with these units left in the buckets."""
        return self._replace(used=left.used, rollover=left.rollover, purchased=left.purchased)

    def limit(self, status: str) -> int | None:
        """Return the limit in force while the account has `status`; None = unlimited."""
        return 0 if self.backing == "missing" else limit_in_force(self.allowance, status)

    def buckets(self, status: str) -> Buckets:
        """Return the buckets for the waterfall while the account has `status`."""
        return Buckets(self.limit(status), self.used, self.rollover, self.purchased, self.spill)

    def terms(self) -> dict[str, object]:
        """Return the terms in force and their bounds by name, without the buckets."""
        return {name: getattr(self, name) for name in TERM_FIELDS}


TERM_FIELDS = Balance._fields[1:14]


class Waiting(NamedTuple):
    """A change that was accepted and takes effect at `at`, in the order of the stream.

    `name` is an invoice's id, a plan, a status, or the key that corrects a `period`. The bounds are those of the
    invoice; of a plan, the end that the provider named; of a period, its new end. `next_plan` and `next_status` are yet
    to be scheduled: for `period_start`, or without one for the provider's next period.
    """

    kind: Literal["invoice", "plan", "status", "period", "next_plan", "next_status"]
    at: datetime
    name: str
    period_start: datetime | None = None
    period_end: datetime | None = None

    @classmethod
    def from_json(cls, stored: Any) -> Waiting:
        """Return the value that `as_json` wrote."""
        times = {name: stored[name] and datetime.fromisoformat(stored[name]) for name in _WAITING_TIMES}
        return cls(stored["kind"], name=stored["name"], **times)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        times = {name: getattr(self, name) and getattr(self, name).isoformat() for name in _WAITING_TIMES}
        return {"kind": self.kind, "name": self.name, **times}


_WAITING_TIMES = ("at", "period_start", "period_end")


class Account(NamedTuple):
    """An account at `version`, its sequence number of changes. `balances` by meter.

    `next_plan` takes effect at `plan_change_at`, or with the provider's next period if that is None; `next_status` at
    `status_change_at`. `highest_tier` is the highest rank of its plans so far. Invoices paid the time from `paid_from`
    to `paid_until`. `waiting` are changes that take effect later, the next one first. `timezone` is in force instead of
    the plan's, and so are `notices`, the rules of what it is told. `reopened` counts the accounts of this id that were
    closed before it. `pay_from` "allowance": checks count no purchased units. `draws` are the meters of its plan that
    draw on a wallet, in an account as a check sees it (`lifecycle.as_of`); they are stored nowhere.
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
    paid_from: datetime | None = None
    paid_until: datetime | None = None
    waiting: tuple[Waiting, ...] = ()
    timezone: str | None = None
    reopened: int = 0
    pay_from: str | None = None
    notices: tuple[NoticeRule | UnreadRule, ...] | None = None
    draws: Mapping[str, Draw] = MappingProxyType({})


# What an account carries besides plan, status and trust.
SCHEDULE = (
    "highest_tier", "next_plan", "plan_change_at", "next_status", "status_change_at", "paid_from", "paid_until",
    "waiting", "timezone", "pay_from",
)  # fmt: skip


def schedule_of(account: Account) -> dict[str, Any]:
    """Return what is scheduled for an account, what invoices paid, and its rank, by name; as JSON takes it."""
    return {
        **{name: getattr(account, name) for name in SCHEDULE},
        "waiting": [change.as_json() for change in account.waiting],
    }


def without_schedule(account: Account) -> Account:
    """Return the account without any change to come."""
    return account._replace(next_plan=None, plan_change_at=None, next_status=None, status_change_at=None, waiting=())


def changes_after(account: Account, now: datetime, grace: timedelta) -> list[datetime]:
    """Return the moments after `now` at which the account changes by itself: boundaries and changes that wait.

    `grace` is the time for which a period is open whose invoice is late.
    """
    ends = [account.plan_change_at, account.status_change_at, *(change.at for change in account.waiting[:1])]
    if account.paid_until is not None:
        ends.append(account.paid_until + grace)
    for balance in account.balances.values():
        ends.append(balance.period_end)
        if balance.grants is not None:
            ends += balance.grants.boundaries()
        if balance.limits is not None:
            ends += balance.limits.boundaries()
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


class EventsAsked(NamedTuple):
    """Events of a user, and the version of a balance that may contain them."""

    user_id: str
    version: int
    event_ids: Sequence[str]


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

    `repeated`: an earlier call did it, nothing changed now. `stale`: the call came too late to change anything, as a
    later period is open already, or a refund knows a smaller total than an earlier one. `debt`: units that could not be
    taken back and became debt. `taken`: units that a refund took back, debt among them. `moved`: units that a
    carry-over moved; `kept`: units that stayed behind for open holds. `forgiven`: units of debt that were forgiven.
    `gone`: units that returned to grants which have ended, or that a refund found expired: no balance has them.
    `owes`: debt on the meter of a grant, which credits do not pay; `missing`: units short of it beside all that the
    account has, so that nothing is available yet. `waits_until`: it takes effect at that moment. `waits_for_events`: it
    takes effect after older events of the account's stream, when a worker applies them; `account` shows the outcome.
    """

    account: Account
    repeated: bool = False
    stale: bool = False
    debt: int = 0
    taken: int = 0
    moved: int = 0
    kept: int = 0
    forgiven: int = 0
    gone: int = 0
    owes: int = 0
    missing: int = 0
    waits_until: datetime | None = None
    waits_for_events: bool = False
