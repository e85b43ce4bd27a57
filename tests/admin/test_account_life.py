"""One account, whatever happens to it in whatever order, beside a plain model that knows nothing of our code.

The model is written from the design alone: its own calendar, one period at a time, dictionaries. The same rules drive
the whole system on real Postgres and Redis, and many more examples of it on a ledger in memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from config.catalogue import load_catalogue
from config.settings import Settings
from tests.support.ledger import stop_clock
from tests.support.resources import settings_for
from worker.admin import accounts, change, credits
from worker.client import Billing
from worker.consumer import renewals
from worker.consumer.drain import drain_stream
from worker.consumer.intake import Intake
from worker.errors import AccountError
from worker.keyspace import keys
from worker.ledger import batch
from worker.ledger.accounts import Snapshot
from worker.ledger.columns import as_json
from worker.reports.proof import _compare, _replay, _Replayed, verify_ledger
from worker.resources import Resources
from worker.rules.account import Account, ChangeAnswer
from worker.rules.batch import identities_of, users_of, work_out
from worker.rules.rows import AppliedEvent, Changed, EntryRow, Loaded, UsageRow, Writes
from worker.rules.waterfall import available

START = datetime(2024, 1, 31, 9, 30, 15, 123456, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
ENTITLED = {"trialing", "active", "past_due"}
STATUSES = ["trialing", "active", "past_due", "canceled", "expired", "paused", "unpaid"]


class Grant(NamedTuple):
    """What a plan of the tests grants on one meter. None = unlimited."""

    quantity: int | None
    cadence: str = "subscription"
    anchor: str = "sticky"
    cap: int = 0
    gemini: int | None = None


NOTHING = Grant(0, "off")
SPILLS = {"voice": True, "text": True, "credits": True, "relay": False}
PLANS: dict[str, dict[str, Grant]] = {
    "free": {"voice": Grant(10, "daily"), "text": Grant(50, "monthly", cap=20)},
    "basic": {"voice": Grant(100, cap=150), "text": Grant(30, cap=1_000)},
    "plus": {"voice": Grant(None, cap=150), "text": Grant(60, cap=100), "relay": Grant(40, "lifetime")},
    "mixed": {
        "voice": Grant(100, cap=500), "text": Grant(20, "weekly", cap=70), "credits": Grant(20, "daily", "floating"),
    },
    "core": {"relay": Grant(50, "lifetime", gemini=10)},
    "pro": {"relay": Grant(100, "monthly", gemini=30)},
    "tenant": {"credits": Grant(100, "monthly", "floating")},
}  # fmt: skip
TIERS = {"free": 0, "basic": 1, "plus": 3, "mixed": 2, "core": 0, "pro": 1, "tenant": 0}
TRIAL_DAYS = 7


def catalogue_file(folder: Path) -> Path:
    """The same plans as the commands read them."""
    lines = []
    for meter, spill in SPILLS.items():
        lines += [f"[meters.{meter}]", 'unit = "units"', f"spill = {str(spill).lower()}"]
    for plan, meters in PLANS.items():
        lines += [f"[plans.{plan}]", f'name = "{plan}"', f"tier = {TIERS[plan]}", f"trial_days = {TRIAL_DAYS}"]
        for meter, granted in meters.items():
            quantity = "" if granted.quantity is None else f"quantity = {granted.quantity}, "
            caps = "" if granted.gemini is None else f", caps = {{ backend = {{ gemini = {granted.gemini} }} }}"
            lines.append(
                f'meters.{meter} = {{ {quantity}cadence = "{granted.cadence}", anchor = "{granted.anchor}", '
                f"rollover_cap = {granted.cap}{caps} }}"
            )
    lines += ["[sponsorship]", "initial = 0", "paid_share_percent = 0"]
    lines += ["daily_budget = { new = 0, established = 0, trusted = 0, elite = 0 }", "[backends.gemini]"]
    path = folder / "catalogue.toml"
    path.write_text("\n".join([*lines, 'kind = "hosted"', ""]), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The model


def later(anchor: datetime, cadence: str, steps: int) -> datetime:
    """`steps` cadences behind `anchor`; the 31st becomes the last day of a shorter month."""
    if cadence == "daily":
        return anchor + timedelta(days=steps)
    if cadence == "weekly":
        return anchor + timedelta(weeks=steps)
    year, month = anchor.year, anchor.month
    for _ in range(steps):
        year, month = (year + 1, 1) if month == 12 else (year, month + 1)
    for day in (anchor.day, 30, 29, 28):
        try:
            return anchor.replace(year=year, month=month, day=day)
        except ValueError:
            continue
    raise AssertionError


@dataclass
class Period:
    """An open period of one meter, with what is left outside of it."""

    granted: Grant
    spill: bool
    number: int
    grid: datetime
    step: int
    start: datetime
    end: datetime | None
    used: int = 0
    gemini_used: int = 0
    rollover: int = 0
    purchased: int = 0
    parked: tuple[int, datetime, int, int] | None = None

    @property
    def calendar(self) -> bool:
        return self.granted.cadence in ("monthly", "weekly", "daily")

    @property
    def floating(self) -> bool:
        return self.calendar and self.granted.anchor == "floating"


@dataclass
class Paid:
    """An event: who paid, and in which period."""

    meter: str
    amount: int
    gemini: bool
    period: int
    unlimited: bool
    parts: tuple[int, int, int, int]


@dataclass
class Model:
    """One account by the book. Time passes in it one boundary after the other."""

    now: datetime
    plan: str
    status: str
    meters: dict[str, Period] = field(default_factory=dict)
    highest_tier: int = 0
    next_plan: str | None = None
    next_plan_at: datetime | None = None
    next_status: str | None = None
    next_status_at: datetime | None = None
    events: dict[str, Paid] = field(default_factory=dict)
    reversed: set[str] = field(default_factory=set)
    invoices: set[str] = field(default_factory=set)
    numbers: Iterator[int] = field(default_factory=count)

    @classmethod
    def opened(cls, now: datetime, plan: str, status: str, end: datetime | None) -> Model:
        model = cls(now, plan, status, highest_tier=TIERS[plan])
        model.open_plan(now, end)
        if status == "trialing":
            model.next_status, model.next_status_at = "expired", now + timedelta(days=TRIAL_DAYS)
        return model

    # -- Periods

    def granted(self, meter: str) -> Grant:
        return PLANS[self.plan].get(meter, NOTHING)

    def fresh(self, meter: str, granted: Grant, start: datetime, end: datetime | None = None) -> Period:
        old = self.meters.get(meter)
        if granted.cadence in ("monthly", "weekly", "daily"):
            end = later(start, granted.cadence, 1)
        elif granted.cadence != "subscription":
            end = None
        new = Period(granted, SPILLS[meter], next(self.numbers), start, 0, start, end)
        if old is not None:
            new.rollover, new.purchased, new.parked = old.rollover, old.purchased, old.parked
        if granted.cadence == "lifetime" and new.parked is not None:
            new.number, new.start, new.used, new.gemini_used = new.parked
            new.parked = None
        return new

    def open_plan(self, start: datetime, end: datetime | None = None) -> None:
        for meter, granted in PLANS[self.plan].items():
            if meter not in self.meters:
                self.meters[meter] = self.fresh(meter, granted, start, end)

    def limit(self, period: Period) -> int | None:
        return period.granted.quantity if self.status in ENTITLED else 0

    def close(self, period: Period) -> None:
        """Unused first pays debt, then accrues to the cap; what floats is lost but for that."""
        limit = self.limit(period)
        if not period.spill or limit is None or limit == 0:
            return
        cap = 0 if period.floating else period.granted.cap
        unused = max(0, limit - period.used)
        period.rollover = max(period.rollover, min(period.rollover + unused, cap))

    def cross(self, meter: str) -> None:
        """One boundary of a sticky calendar."""
        old = self.meters[meter]
        assert old.end is not None
        self.close(old)
        new = self.fresh(meter, self.granted(meter), old.end)
        assert new.granted.cadence == old.granted.cadence
        new.grid, new.step = old.grid, old.step + 1
        new.end = later(new.grid, new.granted.cadence, new.step + 1)
        self.meters[meter] = new

    def use(self, meter: str) -> Period:
        """The period in which an event of `meter` is applied now."""
        if meter not in self.meters:
            self.meters[meter] = self.fresh(meter, self.granted(meter), self.now)
        period = self.meters[meter]
        if period.floating and period.end is not None and period.end <= self.now:
            self.close(period)
            period = self.meters[meter] = self.fresh(meter, self.granted(meter), self.now)
        return period

    def advance(self, to: datetime) -> None:
        """Everything that is due until `to`, in the order of time; boundaries come before changes."""
        while True:
            due: list[tuple[datetime, int, str]] = []
            for meter, period in self.meters.items():
                if period.calendar and not period.floating and period.end is not None:
                    due.append((period.end, 0, meter))
            if self.next_plan is not None and self.next_plan_at is not None:
                due.append((self.next_plan_at, 1, ""))
            if self.next_status_at is not None:
                due.append((self.next_status_at, 2, ""))
            at, what, meter = min(due, default=(to + MICROSECOND, 0, ""))
            if at > to:
                break
            self.now = at
            if what == 0:
                self.cross(meter)
            elif what == 1:
                self.put_on_plan(self.next_plan or "")
            else:
                self.put_in_status(self.next_status or "")
        self.now = to

    # -- Plan and status

    def put_in_status(self, status: str) -> None:
        self.status, self.next_status, self.next_status_at = status, None, None

    def put_on_plan(self, plan: str, end: datetime | None = None) -> None:
        self.name_plan(plan)
        for meter, period in list(self.meters.items()):
            self.meters[meter] = self.under_plan(meter, period, end)
        self.open_plan(self.now, end)

    def name_plan(self, plan: str) -> None:
        self.highest_tier = max(self.highest_tier, TIERS[plan])
        self.plan, self.next_plan, self.next_plan_at = plan, None, None

    def under_plan(self, meter: str, period: Period, end: datetime | None = None) -> Period:
        """The open period of a meter under the plan that was just taken."""
        new, old = self.granted(meter), period.granted
        another = (new.cadence, new.anchor) != (old.cadence, old.anchor)
        if another and period.floating and period.end is not None and period.end <= self.now:
            self.close(period)
            return self.fresh(meter, new, self.now, end)
        if old.cadence == "lifetime" and new.cadence != "lifetime":
            period.parked = period.number, period.start, period.used, period.gemini_used
            return self.fresh(meter, new, self.now, end)
        if new.cadence == "lifetime" and old.cadence != "lifetime":
            return self.fresh(meter, new, self.now)
        ended = old.cadence == "subscription" and period.end is not None and period.end <= self.now
        if ended and new.cadence != "subscription":
            self.close(period)
            return self.fresh(meter, new, self.now)
        period.granted = new
        if another:
            if not period.calendar:
                period.end = None
            elif period.end is not None and period.end > self.now:
                period.grid, period.step = period.end, -1
            else:
                period.grid, period.step, period.end = self.now, 0, later(self.now, new.cadence, 1)
        if new.cadence == "subscription" and end is not None and end > period.start:
            period.end = end
        return period

    def end_of_period(self) -> datetime | None:
        """The provider's word, else the longest calendar."""
        ends = [period.end for period in self.meters.values() if period.granted.cadence == "subscription"]
        known = [end for end in ends if end is not None]
        if not known:
            sticky = [period.end for period in self.meters.values() if period.calendar and not period.floating]
            known = [end for end in sticky if end is not None]
        return max(max(known), self.now) if known else None

    def has_invoices(self) -> bool:
        return any(period.granted.cadence == "subscription" for period in self.meters.values())

    # -- Operations

    def apply(self, event_id: str, meter: str, amount: int, *, gemini: bool) -> None:
        period = self.use(meter)
        if event_id in self.events:
            return
        limit = self.limit(period)
        if limit is None or not period.spill:
            parts = (amount, 0, 0, 0)
        else:
            first = min(amount, max(0, limit - period.used))
            second = min(amount - first, max(0, period.rollover))
            third = min(amount - first - second, period.purchased)
            parts = (first, second, third, amount - first - second - third)
        period.used += parts[0]
        period.rollover -= parts[1] + parts[3]
        period.purchased -= parts[2]
        capped = gemini and period.granted.gemini is not None
        if capped:
            period.gemini_used += amount
        # The design speaks of an unlimited allowance; a status that is not entitled has none at all.
        self.events[event_id] = Paid(meter, amount, capped, period.number, limit is None, parts)

    def reverse(self, event_id: str) -> None:
        if event_id in self.reversed:
            return
        self.reversed.add(event_id)
        paid = self.events[event_id]
        period = self.meters[paid.meter]
        first, second, third, debt = paid.parts
        period.rollover += second + debt
        period.purchased += third
        if paid.period == period.number:
            period.used -= first
            period.gemini_used -= paid.amount if paid.gemini else 0
        elif period.parked is not None and paid.period == period.parked[0]:
            number, start, used, gemini_used = period.parked
            period.parked = number, start, used - first, gemini_used - (paid.amount if paid.gemini else 0)
        elif period.spill and not paid.unlimited and first:
            period.rollover = max(period.rollover, min(period.rollover + first, period.granted.cap))

    def grant(self, meter: str, amount: int) -> None:
        self.with_meter(meter).purchased += amount

    def claw_back(self, meter: str, amount: int) -> int:
        period = self.with_meter(meter)
        left = min(amount, period.purchased)
        period.purchased -= left
        period.rollover -= amount - left
        return amount - left

    def with_meter(self, meter: str) -> Period:
        if meter not in self.meters:
            self.meters[meter] = self.fresh(meter, self.granted(meter), self.now)
        return self.meters[meter]

    def renew(self, invoice: str, start: datetime, end: datetime) -> str:
        if invoice in self.invoices:
            return "repeated"
        if not self.has_invoices():
            return "refused"
        paid = {meter: period for meter, period in self.meters.items() if period.granted.cadence == "subscription"}
        due = [meter for meter, period in paid.items() if start > period.start]
        if not due:
            return "stale"
        self.invoices.add(invoice)
        waiting = self.next_plan is not None and self.next_plan_at is None
        lacking = set(PLANS[self.next_plan or "" if waiting else self.plan]) - set(self.meters)
        for meter in due:  # closed under the terms they were opened with
            self.close(self.meters[meter])
        if waiting:
            self.name_plan(self.next_plan or "")
        for meter, period in list(self.meters.items()):
            if meter in due:
                self.meters[meter] = self.fresh(meter, self.granted(meter), start, end)
            elif waiting:
                self.meters[meter] = self.under_plan(meter, period, end)
        for meter in lacking:
            self.meters[meter] = self.fresh(meter, self.granted(meter), start, end)
        self.advance(self.now)  # a calendar that began with the invoice may be due already
        return "renewed"

    def seen(self) -> dict[str, Any]:
        """What a look at the account shows now: floating periods as if they were used."""
        copy = replace(self, meters={meter: replace(period) for meter, period in self.meters.items()})
        for meter in copy.meters:
            copy.use(meter)
        shown: dict[str, Any] = {
            name: getattr(self, name) for name in ("plan", "status", "highest_tier", "next_plan", "next_status")
        }
        shown |= {"plan_change_at": self.next_plan_at, "status_change_at": self.next_status_at}
        for meter, period in copy.meters.items():
            shown[meter] = {
                "allowance": period.granted.quantity,
                "cadence": period.granted.cadence,
                "start": period.start,
                "end": period.end,
                "used": period.used,
                "gemini": period.gemini_used if period.granted.gemini is not None else 0,
                "rollover": period.rollover,
                "purchased": period.purchased,
                "available": copy.available(period),
                "parked": period.parked[2:] if period.parked else None,
            }
        return shown

    def available(self, period: Period) -> int | None:
        limit = self.limit(period)
        if limit is None:
            return None
        room = max(0, limit - period.used)
        return max(0, room + period.rollover + period.purchased if period.spill else room)


def shown_by(account: Account) -> dict[str, Any]:
    """An account as the system shows it, in the model's words."""
    names = ("plan", "status", "highest_tier", "next_plan", "next_status", "plan_change_at", "status_change_at")
    shown: dict[str, Any] = {name: getattr(account, name) for name in names}
    for meter, balance in account.balances.items():
        shown[meter] = {
            "allowance": balance.allowance,
            "cadence": balance.cadence,
            "start": balance.period_start,
            "end": balance.period_end,
            "used": balance.used,
            "gemini": (balance.cap_used or {}).get("gemini", 0) if balance.caps else 0,
            "rollover": balance.rollover,
            "purchased": balance.purchased,
            "available": available(balance.buckets(account.status), 0),
            "parked": (parked.used, (parked.cap_used or {}).get("gemini", 0)) if (parked := balance.parked) else None,
        }
    return shown


def unlike(shown: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Where the two differ, and how."""
    names = sorted(set(shown) | set(expected))
    return {name: (shown.get(name), expected.get(name)) for name in names if shown.get(name) != expected.get(name)}


# ---------------------------------------------------------------------------------------------------------------------
# The system: the real one, and one whose ledger is in memory


class SentEvent(NamedTuple):
    """An event of the machine, as a producer would send it."""

    event_id: str
    meter: str
    amount: int
    gemini: bool

    def payload(self, user_id: str) -> bytes:
        event: dict[str, Any] = {"event_id": self.event_id, "user_id": user_id, "meter": self.meter}
        event["quantity"] = self.amount
        if self.gemini:
            event["dimensions"] = {"backend": "gemini"}
        return json.dumps(event).encode()


class RealSystem:
    """Postgres, Redis, drains and checks."""

    def __init__(self, resources: Resources, billing: Billing) -> None:
        self.resources = resources
        self.billing = billing

    def start_again(self) -> None:
        self.resources.redis.flushdb()

    def set_clock(self, now: datetime) -> None:
        stop_clock(self.resources.settings, now)

    def forget_cached(self, user_id: str) -> None:
        """What time does by itself; here it stands still for Redis."""
        self.resources.redis.delete(self._partition(user_id).account(user_id).balance)

    def send(self, user_id: str, events: Sequence[SentEvent]) -> None:
        for event in events:
            self.resources.redis.xadd(self._partition(user_id).entries, {"v": "1", "e": event.payload(user_id)})

    def settle(self, user_id: str) -> None:
        """Apply and publish what waits."""
        drain_stream(self.resources, self._partition(user_id))
        assert self.resources.redis.xlen(self._partition(user_id).entries) == 0

    def available(self, user_id: str, meter: str) -> int | None:
        return self.billing.check(user_id, meter).available

    def differences(self, _user_id: str) -> list[str]:
        return verify_ledger(self.resources).differences

    def _partition(self, user_id: str) -> keys.Partition:
        return keys.partition_of(user_id, self.resources.settings.partitions)


class MemorySystem:
    """The same commands and batches on dictionaries that stand in for the ledger. No servers, far more examples."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.entry_ids = count(int(time.time() * 1_000))
        self.start_again()

    def start_again(self) -> None:
        self.now = START
        self.accounts: dict[str, Account] = {}
        self.counters: dict[str, dict[str, tuple[int, int]]] = {}
        self.entries: list[EntryRow] = []
        self.usage: list[UsageRow] = []

    def set_clock(self, now: datetime) -> None:
        self.now = now

    def forget_cached(self, user_id: str) -> None:
        pass

    def send(self, user_id: str, events: Sequence[SentEvent]) -> None:
        intake = Intake(keys.partition_of(user_id, 8), self.resources.settings, self.resources.catalogue)
        raw = [(f"{next(self.entry_ids)}-0".encode(), [b"v", b"1", b"e", each.payload(user_id)]) for each in events]
        received = list(intake.receive(raw))
        users, ids = identities_of(received)
        loaded = self.load_for_update(None, users_of(received), (users, ids))
        writes = work_out(received, loaded, self.resources.catalogue, None).writes
        assert writes.refused == []
        self.store(None, writes, self.now)

    def settle(self, user_id: str) -> None:
        pass

    def available(self, user_id: str, meter: str) -> int | None:
        account = accounts.show(self.resources, user_id)
        return available(account.balances[meter].buckets(account.status), 0)

    def differences(self, user_id: str) -> list[str]:
        replayed = _Replayed.nothing(user_id)
        found: list[str] = []
        changes: list[EntryRow | UsageRow] = [*self.entries, *self.usage]
        for row in sorted(changes, key=lambda row: row.seq or 0):
            found += _replay(replayed, row)
        snapshot = Snapshot(self.now, 1, self.accounts, self.counters)
        return found + _compare(snapshot.accounts[user_id], snapshot.counters[user_id], replayed)

    # -- In place of the ledger's functions, by name

    @contextmanager
    def batch_connection(self, _engine: object) -> Iterator[Any]:
        yield _NoPostgres()

    def load_for_update(
        self, _: object, users: Sequence[str], identities: tuple[list[str], list[str]], *, skip_locked: bool = False
    ) -> Loaded:
        del skip_locked
        recorded = {
            (row.user_id, row.event_id): (row.meter, row.quantity, row.multiplier)
            for row in self.usage
            if (row.user_id, row.event_id) in set(zip(*identities, strict=True))
        }
        found = {user_id: self.accounts[user_id] for user_id in users if user_id in self.accounts}
        return Loaded(self.now, 1, found, recorded)

    def read_account(self, _: object, user_id: str) -> tuple[datetime, int, Account | None]:
        return self.now, 1, self.accounts.get(user_id)

    def existing_accounts(self, _: object, users: Sequence[str]) -> set[str]:
        return set(users) & set(self.accounts)

    def has_entry(self, _: object, user_id: str, entry_key: str) -> bool:
        return any((entry.user_id, entry.entry_key) == (user_id, entry_key) for entry in self.entries)

    def read_entry(self, _: object, user_id: str, entry_key: str, meter: str) -> EntryRow | None:
        wanted = (user_id, entry_key, meter)
        return next((e for e in self.entries if (e.user_id, e.entry_key, e.meter) == wanted), None)

    def read_usage(self, _: object, user_id: str, event_id: str) -> UsageRow | None:
        return next((row for row in self.usage if (row.user_id, row.event_id) == (user_id, event_id)), None)

    def allowance_at(self, _: object, user_id: str, meter: str, seq: int) -> int | None:
        mine = [entry for entry in self.entries if (entry.user_id, entry.meter) == (user_id, meter)]
        named = [entry.detail for entry in mine if entry.seq < seq]
        return next((detail["allowance"] for detail in reversed(named) if "allowance" in detail), 0)

    def due_balances(self, _: object, after: object, limit: int) -> list[tuple[datetime, str]]:
        return [] if after else [(self.now, user_id) for user_id in self.accounts][:limit]

    def due_changes(self, _: object, after: object, limit: int) -> list[tuple[datetime, str]]:
        return self.due_balances(_, after, limit)

    def store(self, _: object, writes: Writes, _now: datetime) -> None:
        for account in writes.opened_accounts:
            assert account.user_id not in self.accounts
            self.accounts[account.user_id] = account._replace(balances={})
            self.counters[account.user_id] = {}
        for new in writes.opened_balances:
            assert new.balance.meter not in self.accounts[new.user_id].balances
            self._put(new)
        for entry in writes.entries:
            assert (entry.entry_key, entry.meter) not in {(old.entry_key, old.meter) for old in self.entries}
            self.entries.append(entry._replace(detail=json.loads(as_json(entry.detail) or "")))
        self.usage += map(_as_read, writes.usage)
        for user_id, meter, used, rollover, purchased, consumed, granted in writes.moved:
            balance = self.accounts[user_id].balances[meter]._replace(used=used, rollover=rollover, purchased=purchased)
            self._put(Changed(user_id, balance, consumed, granted))
        for changed in writes.retermed:
            assert changed.balance.meter in self.accounts[changed.user_id].balances
            self._put(changed)
        for user_id, version in writes.versions:
            self.accounts[user_id] = self.accounts[user_id]._replace(version=version)
        for stated in writes.restated:
            kept = self.accounts[stated.user_id]
            self.accounts[stated.user_id] = stated._replace(version=kept.version, balances=kept.balances)

    def store_and_commit(self, _: object, writes: Writes, now: datetime) -> None:
        self.store(_, writes, now)

    def refresh(self, _resources: Resources, _users: Sequence[str]) -> None:
        """Nothing is cached here."""

    def _put(self, changed: Changed) -> None:
        user_id, balance, consumed, granted = changed
        account = self.accounts[user_id]
        self.accounts[user_id] = account._replace(balances={**account.balances, balance.meter: balance})
        before = self.counters[user_id].get(balance.meter, (0, 0))
        self.counters[user_id][balance.meter] = (before[0] + consumed, before[1] + granted)


def _as_read(applied: AppliedEvent) -> UsageRow:
    """The row of an event as it is read back from the log."""
    stored: dict[str, Any] = dict(zip(UsageRow._fields, applied.columns(), strict=True))
    for name in ("period_start", "occurred_at", "applied_at"):
        stored[name] = stored[name] and datetime.fromisoformat(stored[name])
    stored["dimensions"] = stored["dimensions"] and json.loads(stored["dimensions"])
    return UsageRow(**stored)


class _NoPostgres:
    def commit(self) -> None:
        pass


STANDS_IN = {
    "batch_connection", "load_for_update", "read_account", "existing_accounts", "has_entry", "read_entry", "read_usage",
    "allowance_at", "due_balances", "due_changes", "store", "store_and_commit", "refresh",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The machine

amounts = st.integers(0, 30) | st.integers(0, 300) | st.sampled_from([0, 1, 10**6, 10**12])
meters = st.sampled_from(list(SPILLS))
spilling = st.sampled_from([meter for meter, spill in SPILLS.items() if spill])
plans = st.sampled_from(list(PLANS))
pauses = st.one_of(
    st.timedeltas(timedelta(microseconds=1), timedelta(days=3)),
    st.timedeltas(timedelta(days=3), timedelta(days=800)),
    st.sampled_from([timedelta(days=days) for days in (1, 7, 28, 31, 366)]),
)


class AccountLife(RuleBasedStateMachine):
    """What can happen to an account, done to the system and to the model alike."""

    system: ClassVar[RealSystem | MemorySystem]
    users: ClassVar[Iterator[int]] = count()

    def __init__(self) -> None:
        super().__init__()
        self.user_id = f"user-{next(self.users)}"
        self.keys = count()
        self.granted: dict[str, tuple[str, int]] = {}
        self.clawed: dict[str, tuple[str, int, int]] = {}
        self.system.start_again()

    @property
    def resources(self) -> Resources:
        return self.system.resources

    @initialize(
        plan=plans,
        status=st.sampled_from(["active", "active", "trialing", "canceled"]),
        days=st.none() | st.integers(1, 40),
    )
    def open(self, plan: str, status: str, days: int | None) -> None:
        end = None if days is None else START + timedelta(days=days)
        self.system.set_clock(START)
        accounts.open_new(self.resources, self.user_id, plan, status=status, end=end)
        self.model = Model.opened(START, plan, status, end)
        self.agree()

    # -- Time

    @rule(pause=pauses)
    def time_passes(self, pause: timedelta) -> None:
        self.go_to(self.model.now + pause)
        self.agree()

    @rule(data=st.data(), offset=st.sampled_from([-MICROSECOND, timedelta(0), MICROSECOND]))
    def time_comes_to_a_boundary(self, data: st.DataObject, offset: timedelta) -> None:
        ends = [period.end for period in self.model.meters.values()]
        ends += [self.model.next_plan_at, self.model.next_status_at]
        future = sorted({end for end in ends if end is not None and end + offset > self.model.now})
        if future:
            self.go_to(data.draw(st.sampled_from(future)) + offset)
        self.agree()

    def go_to(self, moment: datetime) -> None:
        self.model.advance(moment)
        self.system.set_clock(moment)
        self.system.forget_cached(self.user_id)

    def tick(self) -> None:
        """No two changes happen in the same microsecond."""
        before = self.model.seen()
        moment = self.model.now + MICROSECOND
        while moment in (self.model.next_plan_at, self.model.next_status_at):
            moment += MICROSECOND
        self.model.advance(moment)
        self.system.set_clock(moment)
        if before != self.model.seen():
            self.system.forget_cached(self.user_id)

    @rule()
    def the_job_runs(self) -> None:
        self.tick()
        renewals.renew_due(self.resources)
        self.agree()

    # -- Events

    @rule(events=st.lists(st.tuples(meters, amounts, st.booleans()), min_size=1, max_size=4), twice=st.booleans())
    def events_come(self, events: list[tuple[str, int, bool]], twice: bool) -> None:
        self.tick()
        sent = [SentEvent(f"e{next(self.keys)}", *event) for event in events]
        if twice:
            sent.append(sent[0])
        self.system.send(self.user_id, sent)
        for event in sent:
            self.model.apply(event.event_id, event.meter, event.amount, gemini=event.gemini)
        self.agree()

    @precondition(lambda self: self.model.events)
    @rule(data=st.data())
    def an_event_is_reversed(self, data: st.DataObject) -> None:
        self.tick()
        event_id = data.draw(st.sampled_from(sorted(self.model.events)))
        change = credits.reverse(self.resources, self.user_id, event_id)
        assert change.repeated == (event_id in self.model.reversed)
        self.model.reverse(event_id)
        self.agree(change)

    # -- Credits

    @rule(meter=spilling, amount=st.integers(1, 300))
    def credit_is_granted(self, meter: str, amount: int) -> None:
        self.tick()
        key = f"order-{next(self.keys)}"
        self.granted[key] = meter, amount
        change = credits.grant(self.resources, self.user_id, meter, amount, key)
        self.model.grant(meter, amount)
        self.agree(change)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def a_grant_is_repeated(self, data: st.DataObject) -> None:
        self.tick()
        key = data.draw(st.sampled_from(sorted(self.granted)))
        change = credits.grant(self.resources, self.user_id, *self.granted[key], key)
        assert change.repeated
        self.agree(change)

    @rule(meter=spilling, amount=st.integers(1, 300))
    def a_purchase_is_refunded(self, meter: str, amount: int) -> None:
        self.tick()
        key = f"refund-{next(self.keys)}"
        change = credits.claw_back(self.resources, self.user_id, meter, amount, key)
        debt = self.model.claw_back(meter, amount)
        assert change.debt == debt
        self.clawed[key] = meter, amount, debt
        self.agree(change)

    @precondition(lambda self: self.clawed)
    @rule(data=st.data())
    def a_refund_is_repeated(self, data: st.DataObject) -> None:
        self.tick()
        key = data.draw(st.sampled_from(sorted(self.clawed)))
        meter, amount, debt = self.clawed[key]
        change = credits.claw_back(self.resources, self.user_id, meter, amount, key)
        assert (change.repeated, change.debt) == (True, debt)
        self.agree(change)

    # -- Plan, status, renewals

    @rule(ago=st.timedeltas(timedelta(0), timedelta(days=3)), length=st.sampled_from([1, 28, 30, 31, 365]))
    def an_invoice_is_paid(self, ago: timedelta, length: int) -> None:
        self.tick()
        start = self.model.now - ago
        self.renew(f"inv-{next(self.keys)}", start, start + timedelta(days=length))

    @rule(ago=st.timedeltas(timedelta(days=10), timedelta(days=90)))
    def an_old_invoice_comes_late(self, ago: timedelta) -> None:
        self.tick()
        self.renew(f"inv-{next(self.keys)}", self.model.now - ago, self.model.now - ago + timedelta(days=30))

    @precondition(lambda self: self.model.has_invoices())
    @rule(offset=st.sampled_from([timedelta(0), MICROSECOND]))
    def an_invoice_starts_with_the_open_period(self, offset: timedelta) -> None:
        self.tick()
        paid = [period.start for period in self.model.meters.values() if period.granted.cadence == "subscription"]
        if not paid:
            return  # the plan that had invoices ended with the tick
        start = min(max(paid) + offset, self.model.now)
        self.renew(f"inv-{next(self.keys)}", start, start + timedelta(days=30))

    @precondition(lambda self: self.model.invoices)
    @rule(data=st.data())
    def an_invoice_is_delivered_again(self, data: st.DataObject) -> None:
        self.tick()
        invoice = data.draw(st.sampled_from(sorted(self.model.invoices)))
        self.renew(invoice, self.model.now, self.model.now + timedelta(days=30))

    def renew(self, invoice: str, start: datetime, end: datetime) -> None:
        expected = self.model.renew(invoice, start, end)
        if expected == "refused":
            with pytest.raises(AccountError, match=r"^plan: "):
                accounts.renew(self.resources, self.user_id, invoice, start, end)
            self.agree()
            return
        change = accounts.renew(self.resources, self.user_id, invoice, start, end)
        assert (change.repeated, change.stale) == (expected == "repeated", expected == "stale")
        self.agree(change)

    @rule(plan=plans, days=st.none() | st.integers(1, 40))
    def the_plan_changes_now(self, plan: str, days: int | None) -> None:
        self.tick()
        model = self.model
        end = None if days is None else model.now + timedelta(days=days)
        same = plan == model.plan
        repeated = same and model.next_plan is None
        change = accounts.change_plan(self.resources, self.user_id, plan, period_end=end)
        assert change.repeated == repeated
        if same:
            model.next_plan = model.next_plan_at = None
        else:
            model.put_on_plan(plan, end)
        self.agree(change)

    @rule(plan=plans)
    def the_plan_is_to_change(self, plan: str) -> None:
        self.tick()
        model = self.model
        if plan == model.plan:
            accounts.change_plan(self.resources, self.user_id, plan, at="period_end")
            model.next_plan = model.next_plan_at = None
            self.agree()
            return
        wants_invoices = any(granted.cadence == "subscription" for granted in PLANS[plan].values())
        waits = wants_invoices and model.has_invoices()
        ends_at = None if waits else model.end_of_period()
        if not waits and ends_at is None:
            with pytest.raises(AccountError, match=r"^at: "):
                accounts.change_plan(self.resources, self.user_id, plan, at="period_end")
        else:
            accounts.change_plan(self.resources, self.user_id, plan, at="period_end")
            model.next_plan, model.next_plan_at = plan, ends_at
        self.agree()

    @rule(status=st.sampled_from(STATUSES))
    def the_status_is_set(self, status: str) -> None:
        self.tick()
        keeps_schedule = status in ("past_due", "trialing")
        repeated = self.model.status == status and (self.model.next_status is None or keeps_schedule)
        change = accounts.set_status(self.resources, self.user_id, status)
        assert change.repeated == repeated
        if keeps_schedule:
            self.model.status = status
        else:
            self.model.put_in_status(status)
        self.agree(change)

    @rule(status=st.sampled_from(["canceled", "expired"]))
    def it_is_to_end(self, status: str) -> None:
        self.tick()
        ends_at = self.model.end_of_period()
        if ends_at is None:
            with pytest.raises(AccountError, match=r"^at: "):
                accounts.set_status(self.resources, self.user_id, status, at="period_end")
        else:
            accounts.set_status(self.resources, self.user_id, status, at="period_end")
            self.model.next_status, self.model.next_status_at = status, ends_at
        self.agree()

    # -- What must hold after each

    def agree(self, change: ChangeAnswer | None = None) -> None:
        self.model.advance(self.model.now)  # what was scheduled for this very moment
        self.system.settle(self.user_id)
        expected = self.model.seen()
        assert unlike(shown_by(accounts.show(self.resources, self.user_id)), expected) == {}
        if change is not None:
            assert unlike(shown_by(change.account), expected) == {}
        for meter in self.model.meters:
            assert self.system.available(self.user_id, meter) == expected[meter]["available"]

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return  # it was never opened
        assert self.system.differences(self.user_id) == []


def live(system: RealSystem | MemorySystem, examples: int, steps: int) -> None:
    machine = type("Machine", (AccountLife,), {"system": system})
    chosen = hypothesis_settings(max_examples=examples, stateful_step_count=steps, deadline=None, print_blob=True)
    run_state_machine_as_test(machine, settings=chosen)


def test_a_life_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(catalogue_path=catalogue_file(tmp_path))
    # No engine and no Redis: whatever would touch them fails.
    system = MemorySystem(Resources(settings, load_catalogue(settings.catalogue_path), None, None))  # type: ignore[arg-type]
    for module in (batch, change, accounts, credits, renewals):
        for name in STANDS_IN & vars(module).keys():
            monkeypatch.setattr(module, name, getattr(system, name))
    live(system, examples=150, steps=30)


def test_a_life_on_real_servers(emptied_database_url: str, redis_url: str, tmp_path: Path) -> None:
    settings = settings_for(emptied_database_url, redis_url, catalogue_path=catalogue_file(tmp_path))
    with closing(Resources.open(settings)) as resources, Billing.connect(settings) as billing:
        live(RealSystem(resources, billing), examples=12, steps=25)
