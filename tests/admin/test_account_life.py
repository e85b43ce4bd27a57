"""One account, whatever happens to it in whatever order, beside a plain model that knows nothing of our code.

The model is written from the design alone: its own calendar, one period at a time, dictionaries. The same rules drive
the whole system on real Postgres and Redis, and many more examples of it on a ledger in memory.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import count
from math import ceil, floor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from config.catalogue import load_catalogue
from config.settings import Settings
from schemas.events import Refusal
from tests.support.ledger import rows, stop_clock
from tests.support.resources import settings_for
from tests.support.simulation import differences_in_force, written_at
from worker.admin import accounts, change, corrections, credits, limits
from worker.client import Billing
from worker.consumer import renewals
from worker.consumer.drain import drain_stream
from worker.consumer.intake import Intake
from worker.errors import AccountError
from worker.keyspace import keys
from worker.ledger import batch
from worker.ledger.accounts import Snapshot
from worker.ledger.batch import usage_text
from worker.ledger.columns import COPY_NULL, as_json
from worker.ledger.connection import batch_connection
from worker.ledger.proof import read_history
from worker.reports.proof import Replayed, compare, replay, verify_ledger
from worker.resources import Resources
from worker.rules.account import Account, ChangeAnswer
from worker.rules.batch import identities_of, users_of, work_out
from worker.rules.credits import grants_on
from worker.rules.notices import tell
from worker.rules.preflight import remaining_answer, standing_in_ledger
from worker.rules.rows import Alarm, Changed, EntryRow, Loaded, Notice, UsageRow, Writes

# In whole milliseconds, as the ids of stream entries are.
# Ahead of any real clock: there the streams of the tests go by the ledger's clock. A leap year.
START = datetime(2088, 1, 31, 9, 30, 15, 123000, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)
GRACE = timedelta(hours=24)
ENTITLED = {"trialing", "active", "past_due"}
STATUSES = [
    "trialing", "active", "past_due", "canceled", "expired", "paused", "unpaid", "incomplete", "incomplete_expired",
    "suspended",
]  # fmt: skip


class Grant(NamedTuple):
    """What a plan of the tests grants on one meter. None = unlimited."""

    quantity: int | None
    cadence: str = "subscription"
    anchor: str = "sticky"
    cap: int = 0
    gemini: int | None = None
    # Limits by window: of the plan, on any meter.
    limits: tuple[tuple[str, int], ...] = ()


NOTHING = Grant(0, "off")
SPILLS = {"voice": True, "text": True, "credits": True, "relay": False}
PLANS: dict[str, dict[str, Grant]] = {
    "free": {"voice": Grant(10, "daily"), "text": Grant(50, "monthly", cap=20, limits=(("month", 80),))},
    "basic": {"voice": Grant(100, cap=150, limits=(("month", 90), ("week", 60))), "text": Grant(30, cap=1_000)},
    "plus": {
        "voice": Grant(None, cap=150, limits=(("day", 70), ("month", 400))), "text": Grant(60, cap=100),
        "relay": Grant(40, "lifetime", limits=(("week", 25),)),
    },
    "mixed": {
        "voice": Grant(100, cap=500), "text": Grant(20, "weekly", cap=70), "credits": Grant(20, "daily", "floating"),
    },
    "core": {"relay": Grant(50, "lifetime", gemini=10)},
    "pro": {"relay": Grant(100, "monthly", gemini=30, limits=(("month", 70),))},
    "endless": {"relay": Grant(None, "monthly")},
    "tenant": {"credits": Grant(100, "monthly", "floating", limits=(("day", 30), ("month", 500)))},
    "yearly": {"voice": Grant(80, "monthly", cap=300), "text": Grant(9, "daily", cap=50)},
    "studio": {"credits": Grant(400, "monthly", cap=90), "voice": NOTHING, "text": NOTHING},
}  # fmt: skip
# What one unit of a meter costs of the wallet.
WALLET = "credits"
PRICES = {"studio": {"voice": "3", "text": "0.35"}}
TIERS = {
    "free": 0, "basic": 1, "plus": 3, "mixed": 2, "core": 0, "pro": 1, "endless": 2, "tenant": 0, "yearly": 2,
    "studio": 1,
}  # fmt: skip
# The calendar of these plans refills within the time that invoices paid.
PAID_PLANS = {"yearly"}
TRIAL_DAYS = 7


def catalogue_file(folder: Path) -> Path:
    """The same plans as the commands read them."""
    lines = []
    for meter, spill in SPILLS.items():
        lines += [f"[meters.{meter}]", 'unit = "units"', f"spill = {str(spill).lower()}"]
    for plan, meters in PLANS.items():
        lines += [f"[plans.{plan}]", f'name = "{plan}"', f"tier = {TIERS[plan]}", f"trial_days = {TRIAL_DAYS}"]
        lines.append(f"paid_by_invoice = {str(plan in PAID_PLANS).lower()}")
        lines.append('notices = [{ kind = "balance.depleted" }, { kind = "balance.recovered" }]')
        for meter, granted in meters.items():
            if price := PRICES.get(plan, {}).get(meter):
                lines.append(f'meters.{meter} = {{ wallet = "{WALLET}", price = "{price}" }}')
                continue
            quantity = "" if granted.quantity is None else f"quantity = {granted.quantity}, "
            caps = "" if granted.gemini is None else f", caps = {{ backend = {{ gemini = {granted.gemini} }} }}"
            bounds = ", ".join(f'{{ per = "{per}", amount = {amount} }}' for per, amount in granted.limits)
            caps += f", limits = [{bounds}]" if granted.limits else ""
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


def slack(start: datetime, end: datetime) -> timedelta:
    """How far from a boundary of the calendar an invoice may begin that means it."""
    return min(GRACE, (end - start) / 24)


def window_of(per: str, moment: datetime) -> str:
    """What people call the day, week or month of a moment, in UTC."""
    if per == "day":
        return moment.strftime("%Y-%m-%d")
    return "-".join(map(str, moment.isocalendar()[:2])) if per == "week" else moment.strftime("%Y-%m")


def start_of_window(per: str, moment: datetime) -> datetime:
    """Midnight by midnight, as long as people call it the same."""
    day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    while window_of(per, day - timedelta(days=1)) == window_of(per, moment):
        day -= timedelta(days=1)
    return day


def end_of_window(per: str, moment: datetime) -> datetime:
    """Midnight by midnight, until people call it otherwise."""
    day = moment.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    while window_of(per, day) == window_of(per, moment):
        day += timedelta(days=1)
    return day


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
    drawn: dict[str, int] = field(default_factory=dict)
    rollover: int = 0
    purchased: int = 0
    # Of a period that the provider renews: is it paid, a trial, named by the provider, late, or missing its invoice?
    stands: str = ""
    parked: tuple[int, datetime, int, int] | None = None

    @property
    def calendar(self) -> bool:
        return self.granted.cadence in ("monthly", "weekly", "daily")

    @property
    def floating(self) -> bool:
        return self.calendar and self.granted.anchor == "floating"

    @property
    def counts_gemini(self) -> bool:
        """A calendar of the meter that has the sub-cap in some plan counts it always."""
        return self.granted.gemini is not None or (self.calendar and not self.spill)

    @property
    def provided(self) -> bool:
        return self.granted.cadence == "subscription"


@dataclass
class Credit:
    """What is left of an order, and how it pays. It began, or it will at `start`; it ended, or it will at `end`."""

    left: int
    promotional: bool
    priority: int
    start: datetime
    end: datetime | None
    made: int
    gone: int = 0
    begun: bool = True
    over: bool = False

    def turn(self) -> tuple[Any, ...]:
        """Who pays first: urgent, soon over, given away, begun early, made early."""
        lasting = timedelta.max if self.end is None else self.end - START
        return self.priority, lasting, not self.promotional, self.start, self.made


@dataclass
class Paid:
    """An event: who paid, and in which period."""

    meter: str
    amount: int
    gemini: bool
    period: int
    unlimited: bool
    parts: tuple[int, int, int, int]
    credit: dict[str, int] = field(default_factory=dict)
    # As which change of the model it came: a limit counts what came after its window opened.
    turn: int = 0
    # When it was applied. None: it waits. A limit that is set counts what was applied in its window before.
    applied: datetime | None = None
    # The meter that drew them, if `meter` is a wallet.
    drawn_by: str | None = None


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
    reversed: dict[str, int] = field(default_factory=dict)
    # What events left over of a unit, by meter: no boundary, plan or reversal changes it.
    fractions: dict[str, Fraction] = field(default_factory=dict)
    invoices: dict[str, tuple[datetime, datetime]] = field(default_factory=dict)
    ahead: list[tuple[datetime, int, str]] = field(default_factory=list)  # invoices that wait for their start
    paid: tuple[datetime, datetime] | tuple[None, None] = (None, None)
    bought: dict[str, int] = field(default_factory=dict)
    # Given and taken back, by meter and order.
    orders: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    # Credit by meter and order; that of no order is "".
    credit: dict[tuple[str, str], Credit] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)
    # Limits by meter, setter and window; and the change since which each window of a meter counts.
    limits: dict[tuple[str, str, str], int] = field(default_factory=dict)
    counted: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    turns_taken: Iterator[int] = field(default_factory=lambda: count(1))
    pay_from: str | None = None

    @classmethod
    def opened(cls, now: datetime, plan: str, status: str, end: datetime | None) -> Model:
        model = cls(now, plan, status, highest_tier=TIERS[plan])
        if status != "trialing":
            if plan in PAID_PLANS and end is not None:
                model.paid = now, end
            model.open_plan(now, end)
            return model
        end = end or now + timedelta(days=TRIAL_DAYS)
        model.open_plan(now, end, "trial")
        model.next_status, model.next_status_at = "expired", end
        return model

    # -- Periods

    def granted(self, meter: str) -> Grant:
        return PLANS[self.plan].get(meter, NOTHING)

    def fresh(
        self, meter: str, granted: Grant, start: datetime, end: datetime | None = None, stands: str = ""
    ) -> Period:
        old = self.meters.get(meter)
        calendar = granted.cadence in ("monthly", "weekly", "daily")
        if calendar and self.plan in PAID_PLANS:
            stands = stands or ("unpaid" if end is None else "named")
        elif granted.cadence != "subscription":
            stands = ""
        if calendar:
            end = later(start, granted.cadence, 1)
        elif granted.cadence != "subscription":
            end = None
        new = Period(granted, SPILLS[meter], next(self.numbers), start, 0, start, end)
        new.stands = stands
        if new.provided:
            new.stands = stands or ("unpaid" if end is None else "named")
        if old is not None:
            new.rollover, new.purchased, new.parked = old.rollover, old.purchased, old.parked
        if granted.cadence == "lifetime" and new.parked is not None:
            new.number, new.start, new.used, new.gemini_used = new.parked
            new.parked = None
        return new

    def open_plan(self, start: datetime, end: datetime | None = None, stands: str = "") -> None:
        for meter, granted in PLANS[self.plan].items():
            if meter not in self.meters:
                self.put(meter, self.fresh(meter, granted, start, end, stands))

    def limit(self, period: Period) -> int | None:
        return period.granted.quantity if self.status in ENTITLED and period.stands != "missing" else 0

    def close(self, period: Period) -> None:
        """Unused first pays debt, then accrues to the cap; what floats is lost but for that."""
        limit = self.limit(period)
        if not period.spill or limit is None or limit == 0 or period.stands in ("unpaid", "trial", "late"):
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
        new.stands = self.calendar_stands(new.start, new.end)
        if new.stands == "missing" and old.stands == "":
            new.stands = "unpaid"
        self.put(meter, new)

    def calendar_stands(self, start: datetime, end: datetime) -> str:
        """Of a calendar period: is that time paid?"""
        if self.plan not in PAID_PLANS:
            return ""
        until = self.paid[1]
        if until is None or start - until >= GRACE:
            return "missing"
        return "paid" if until - start > slack(start, end) else "late"

    def use(self, meter: str) -> Period:
        """The period in which an event of `meter` is applied now."""
        if meter not in self.meters:
            begun = min(period.start for period in self.meters.values())
            self.put(meter, self.fresh(meter, self.granted(meter), max(self.now, begun)))
        period = self.meters[meter]
        if period.floating and period.end is not None and period.end <= self.now:
            self.close(period)
            self.put(meter, self.fresh(meter, self.granted(meter), self.now))
            period = self.meters[meter]
        return period

    def due(self) -> list[tuple[datetime, float, str]]:
        """What changes by itself: when, in which order, of which meter."""
        due: list[tuple[datetime, float, str]] = []
        for meter, period in self.meters.items():
            if period.calendar and not period.floating and period.end is not None:
                due.append((period.end, 0, meter))
            if period.provided and period.end is not None:
                due.append((period.end, 2, ""))
            over = None if self.paid[1] is None else self.paid[1] + GRACE
            if over and period.calendar and period.stands not in ("", "missing"):
                due.append((over, 1.5, ""))
        if self.next_status_at is not None:
            due.append((self.next_status_at, 1, ""))
        if self.next_plan is not None and self.next_plan_at is not None:
            due.append((self.next_plan_at, 3, ""))
        if self.ahead:
            due.append((self.ahead[0][0], 4, ""))
        due += [(at, 0.5, "") for at in self.turns()]
        return due

    def turns(self) -> list[datetime]:
        """When credit begins and ends."""
        starts = [credit.start for credit in self.credit.values() if not credit.begun]
        return starts + [credit.end for credit in self.credit.values() if credit.end is not None and not credit.over]

    def turn_credit(self) -> None:
        for (meter, _), credit in self.credit.items():
            if not credit.begun and credit.start <= self.now:
                credit.begun = True
                self.meters[meter].purchased += credit.left
            if not credit.over and credit.end is not None and credit.end <= self.now:
                credit.over = True
                self.meters[meter].purchased -= credit.left
                credit.gone, credit.left = credit.gone + credit.left, 0

    def pay_from_credit(self, meter: str, units: int, first: str | None = None) -> dict[str, int]:
        """Take units from credit in its order; from `first` before, even if that is yet to begin."""
        found = [(order, each) for (on, order), each in self.credit.items() if on == meter and not each.over]
        turns = sorted((order != first, *each.turn(), order) for order, each in found if each.begun or order == first)
        paid: dict[str, int] = {}
        for *_, order in turns:
            credit = self.credit[meter, order]
            part = min(units, credit.left)
            if part:
                paid[order] = part
                units -= part
                credit.left -= part
                if credit.begun:
                    self.meters[meter].purchased -= part
        return paid

    def return_credit(self, meter: str, paid: dict[str, int]) -> int:
        """Give units back to the credit that they came from; return those that are gone, as it is over."""
        gone = elsewhere = 0
        for order, units in paid.items():
            credit = self.credit[meter, order]
            if order and credit.end is not None:
                # What a refund found spent it took elsewhere: it is not given twice.
                given, taken = self.orders[meter, order]
                own = min(units, max(0, given - taken - credit.gone - credit.left))
                elsewhere += units - own
                units = own
            if credit.over:
                credit.gone += units
                gone += units
            else:
                credit.left += units
                if credit.begun:
                    self.meters[meter].purchased += units
        period = self.meters[meter]
        debt = min(elsewhere, max(0, -period.rollover))
        period.rollover += debt
        self.loose(meter).left += elsewhere - debt
        period.purchased += elsewhere - debt
        return gone

    def loose(self, meter: str) -> Credit:
        """Credit of no order."""
        return self.credit.setdefault((meter, ""), Credit(0, False, 50, datetime.min.replace(tzinfo=UTC), None, -1))

    def advance(self, to: datetime) -> None:
        """Everything that is due until `to`, in the order of time; boundaries come before changes."""
        while True:
            at, what, meter = min(self.due(), default=(to + MILLISECOND, 0, ""))
            if at > to:
                break
            self.now = at
            if what == 0:
                self.cross(meter)
            elif what == 0.5:
                self.turn_credit()
            elif what == 1:
                self.put_in_status(self.next_status or "")
            elif what == 1.5:
                for period in self.meters.values():
                    if period.calendar and period.stands:
                        period.stands = "missing"
            elif what == 2:
                self.end_provided()
            elif what == 3:
                self.put_on_plan(self.next_plan or "")
            else:
                _, _, invoice = self.ahead.pop(0)
                self.pay(*self.invoices[invoice])
        self.now = to

    def end_provided(self) -> None:
        """The provider's periods that end now, without an invoice."""
        over = [meter for meter, each in self.meters.items() if each.provided and each.end == self.now]
        late = {meter for meter in over if self.meters[meter].stands == "late"}
        for meter in late:
            self.meters[meter].stands, self.meters[meter].end = "missing", None
        begin = [meter for meter in over if meter not in late]
        entitled = self.status in ENTITLED
        for meter in begin:
            self.close(self.meters[meter])
        lacking = set()
        others = []
        if begin and entitled and self.next_plan is not None and self.next_plan_at is None:
            others = [meter for meter in self.meters if meter not in over]
            lacking = set(PLANS[self.next_plan]) - set(self.meters)
            self.name_plan(self.next_plan)
        for meter in begin:
            end, stands = (self.now + GRACE, "late") if entitled else (None, "missing")
            self.put(meter, self.fresh(meter, self.granted(meter), self.now, end, stands))
        for meter in [*others, *(late if others or lacking else ())]:
            self.put(meter, self.under_plan(meter, self.meters[meter]))
        for meter in lacking:
            self.put(meter, self.fresh(meter, self.granted(meter), self.now, self.now + GRACE, "late"))

    # -- Plan and status

    def put_in_status(self, status: str) -> None:
        returns = self.status not in ENTITLED and status in ENTITLED
        begins_trial = status == "trialing" and self.status != "trialing"
        if status not in ("past_due", "trialing"):
            self.next_status = self.next_status_at = None
        if begins_trial and self.next_status is None:
            ends_at = self.known_end() or self.now + timedelta(days=TRIAL_DAYS)
            if ends_at > self.now:
                self.next_status, self.next_status_at = "expired", ends_at
        self.status = status
        for period in self.meters.values():
            if returns and period.provided and period.stands == "missing":
                period.stands, period.start, period.grid, period.end = "late", self.now, self.now, self.now + GRACE
            elif begins_trial and period.stands in ("unpaid", "named"):
                period.stands = "trial"

    def put_on_plan(self, plan: str, end: datetime | None = None) -> None:
        if plan in PAID_PLANS and self.plan not in PAID_PLANS:
            if end is not None:
                self.paid = self.now, end
            elif self.paid[1] is not None and self.paid[1] <= self.now:
                self.paid = None, None
        self.name_plan(plan)
        for meter, period in list(self.meters.items()):
            self.put(meter, self.under_plan(meter, period, end))
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
        endless = old.quantity is None and period.end is None and new.cadence in ("monthly", "weekly", "daily")
        if another and endless and later(period.start, new.cadence, 1) <= self.now:
            return self.fresh(meter, new, self.now, end)  # it had no such periods: nothing older counts
        was = period.stands if period.calendar else None
        period.granted = new
        self.forget_windows()
        if another:
            late, period.stands = period.stands == "late", "unpaid" if period.provided else ""
            if not period.calendar:
                period.end = None
            elif period.end is not None and period.end > self.now and not late:
                period.grid, period.step = period.end, -1
            else:
                begins = max(self.now, period.start)  # the provider's may be yet to begin
                period.grid, period.step, period.end = begins, 0, later(begins, new.cadence, 1)
        if new.cadence == "subscription" and end is not None and end > period.start:
            self.name_end(period, end)
        if period.calendar:
            period.stands = (was or self.begins(end)) if self.plan in PAID_PLANS else ""
        return period

    def begins(self, end: datetime | None) -> str:
        """Of a calendar that invoices pay from now on: is it paid?"""
        if self.status == "trialing":
            return "trial"
        if end is not None:
            return "named"
        return "paid" if self.paid[1] is not None and self.now < self.paid[1] else "unpaid"

    def name_end(self, period: Period, end: datetime) -> None:
        period.end = end
        if period.stands in ("unpaid", "late", "missing"):
            period.stands = "named"

    def known_end(self) -> datetime | None:
        """The provider's word, else the longest calendar."""
        if self.paid[1] is not None and any(period.calendar and period.stands for period in self.meters.values()):
            return self.paid[1]
        ends = [period.end for period in self.meters.values() if period.provided and period.stands != "late"]
        known = [end for end in ends if end is not None]
        if not known:
            sticky = [period.end for period in self.meters.values() if period.calendar and not period.floating]
            known = [end for end in sticky if end is not None]
        return max(known) if known else None

    def ends(self) -> list[datetime]:
        """All moments at which something of it changes by itself."""
        ends = [period.end for period in self.meters.values()]
        ends += [self.next_plan_at, self.next_status_at, *(at for at, _, _ in self.ahead), *self.turns()]
        return [end for end in ends if end is not None]

    def end_of_period(self) -> datetime | None:
        end = self.known_end()
        return None if end is None else max(end, self.now)

    def has_invoices(self) -> bool:
        return any(map(self.is_invoiced, self.meters.values()))

    def is_invoiced(self, period: Period) -> bool:
        return bool(period.stands) or (period.calendar and self.plan in PAID_PLANS)

    # -- Operations

    def apply(self, event: SentEvent) -> None:
        event_id, meter, gemini = event.event_id, event.meter, event.gemini
        period = self.use(meter)
        price = PRICES.get(self.plan, {}).get(meter)
        if price is not None:
            period = self.use(WALLET)
        if event_id in self.events:
            return
        due = event.quantity * Fraction(event.multiplier)
        if price is not None:
            due = Fraction(floor(due * Fraction(price) * 1_000_000), 1_000_000)
            if due > 10**12:  # a dead letter
                return
        due += self.fractions.get(meter, 0)
        amount = int(due)
        self.fractions[meter] = due - amount
        drawn_by = None
        if price is not None:
            meter, drawn_by, gemini = WALLET, meter, False
            period.drawn[drawn_by] = period.drawn.get(drawn_by, 0) + amount
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
        paid = self.pay_from_credit(meter, parts[2])
        capped = gemini and period.counts_gemini
        if capped:
            period.gemini_used += amount
        # The design speaks of an unlimited allowance; a status that is not entitled has none at all.
        self.see_windows(meter)
        turn = next(self.turns_taken)
        self.events[event_id] = Paid(
            meter, amount, capped, period.number, limit is None, parts, paid, turn, drawn_by=drawn_by
        )

    def settle(self) -> None:
        """Nothing waits any more."""
        for event in self.events.values():
            event.applied = event.applied or self.now

    def reverse(self, event_id: str) -> int:
        if event_id in self.reversed:
            return self.reversed[event_id]
        paid = self.events[event_id]
        self.reversed[event_id] = self.return_credit(paid.meter, paid.credit)
        period = self.meters[paid.meter]
        first, second, _, debt = paid.parts
        period.rollover += second + debt
        if paid.period == period.number:
            period.used = max(0, period.used - first)  # an adjustment may have taken it off before
            period.gemini_used -= paid.amount if paid.gemini else 0
            if paid.drawn_by is not None:
                period.drawn[paid.drawn_by] -= paid.amount
        elif period.parked is not None and paid.period == period.parked[0]:
            number, start, used, gemini_used = period.parked
            period.parked = number, start, max(0, used - first), gemini_used - (paid.amount if paid.gemini else 0)
        elif period.spill and not paid.unlimited and first:
            period.rollover = max(period.rollover, min(period.rollover + first, period.granted.cap))
        return self.reversed[event_id]

    # -- Limits

    def bounds_of(self, meter: str) -> dict[tuple[str, str], int]:
        """Limits of a meter by setter and window: the plan's are those of the open period."""
        period = self.meters.get(meter)
        found = {("plan", per): amount for per, amount in (period.granted.limits if period else ())}
        return found | {(by, per): amount for (on, by, per), amount in self.limits.items() if on == meter}

    def put(self, meter: str, period: Period) -> None:
        self.meters[meter] = period
        self.forget_windows()

    def forget_windows(self) -> None:
        """A window without a limit does not count any more."""
        for meter, per in list(self.counted):
            if per not in {per for _, per in self.bounds_of(meter)}:
                del self.counted[meter, per]

    def see_windows(self, meter: str) -> None:
        """An event comes: a limit of a plan counts from the first one on."""
        self.forget_windows()
        for _, per in self.bounds_of(meter):
            if self.counted.get((meter, per), ("", 0))[0] != window_of(per, self.now):
                self.counted[meter, per] = window_of(per, self.now), next(self.turns_taken)

    def spent(self, meter: str, per: str) -> int:
        """What counts in the window that is open now, and was not reversed."""
        name, since = self.counted.get((meter, per), ("", 0))
        if name != window_of(per, self.now):
            return 0
        return sum(
            event.amount
            for event_id, event in self.events.items()
            if event.meter == meter and event.turn > since and event_id not in self.reversed
        )

    def set_limit(self, meter: str, per: str, amount: int | None, by: str) -> None:
        self.with_meter(meter)
        if amount is None:
            self.limits.pop((meter, by, per), None)
        else:
            self.limits[meter, by, per] = amount
            if (meter, per) not in self.counted:  # the log tells what was applied before it
                starts = start_of_window(per, self.now)
                older = [each.turn for each in self.events.values() if each.applied and each.applied < starts]
                self.counted[meter, per] = window_of(per, self.now), max(older, default=0)
        self.forget_windows()

    def bounds_seen(self, meter: str) -> list[tuple[str, str, int, int, datetime]]:
        found = self.bounds_of(meter)
        return sorted(
            (per, by, amount, self.spent(meter, per), end_of_window(per, self.now))
            for (by, per), amount in found.items()
        )

    def grant(self, meter: str, amount: int, order: str, terms: Terms) -> None:
        start = self.now + (terms.start or timedelta(0))
        end = None if terms.end is None else self.now + terms.end
        credit = Credit(amount, terms.category == "promotional", terms.priority, start, end, len(self.credit))
        credit.begun = credit.start <= self.now
        self.credit[meter, order] = credit
        self.with_meter(meter).purchased += amount if credit.begun else 0
        self.bought[meter] = self.bought.get(meter, 0) + amount
        self.orders[meter, order] = [amount, 0]

    def refundable(self, meter: str, order: str | None) -> int:
        """No more than the order gave, and no more than was bought, less what came back and what others lost."""
        lost = sum(credit.gone for (on, key), credit in self.credit.items() if on == meter and key != order)
        most = max(0, self.bought.get(meter, 0) - lost)
        if order is not None:
            given, taken = self.orders[meter, order]
            most = min(most, given - taken)
        return most

    def claw_back(self, meter: str, amount: int, order: str | None = None) -> tuple[dict[str, int], int, int]:
        """What the credit gave, what had ended unused, and what is a debt now."""
        period = self.with_meter(meter)
        own = self.credit[meter, order] if order is not None else Credit(0, False, 50, START, None, 0)
        gone = min(own.gone, amount - min(amount, own.left))
        own.gone -= gone
        paid = self.pay_from_credit(meter, amount - gone, order)
        debt = amount - gone - sum(paid.values())
        period.rollover -= debt
        self.bought[meter] -= amount
        if order is not None:
            self.orders[meter, order][1] += amount
        return paid, gone, debt

    def shift(
        self, meter: str, used: int, rollover: int, purchased: int, back: dict[str, int] | None = None
    ) -> dict[str, int] | None:
        """Add units to the buckets; None where one would fall below zero, or the period is over.

        Returns the credit that purchased units came from. `back`: an adjustment is undone that took them there; what it
        gave is credit of no order, and goes first.
        """
        period = self.with_meter(meter)
        over = period.floating and period.end is not None and period.end <= self.now
        if min(period.used + used, period.purchased + purchased) < 0 or (used and over):
            return None
        period.used += used
        period.rollover += rollover
        paid: dict[str, int] = {}
        if back:
            self.return_credit(meter, back)
        elif purchased < 0:
            paid = self.pay_from_credit(meter, -purchased, None if back is None else "")
        elif purchased:
            self.loose(meter).left += purchased
            period.purchased += purchased
        self.bought[meter] = self.bought.get(meter, 0) + purchased
        return paid

    def with_meter(self, meter: str) -> Period:
        if meter not in self.meters:
            self.put(meter, self.fresh(meter, self.granted(meter), self.now))
        return self.meters[meter]

    def renew(self, invoice: str, start: datetime, end: datetime) -> str:
        if invoice in self.invoices:
            return "repeated" if self.invoices[invoice] == (start, end) else "conflict"
        if not self.has_invoices():
            return "refused"
        if start > self.now + timedelta(hours=1):
            self.invoices[invoice] = start, end
            self.ahead.append((start, next(self.numbers), invoice))
            self.ahead.sort()
            return "waits"
        if all(self.meets(each, start, end) == "stale" for each in self.meters.values() if self.is_invoiced(each)):
            return "stale"
        self.invoices[invoice] = start, end
        self.pay(start, end)
        return "renewed"

    def meets(self, period: Period, start: datetime, end: datetime) -> str:
        """Section 4 of the design: what an invoice for this time is to an open period."""
        if end <= period.start:
            return "stale"
        if period.calendar:
            return self.calendar_meets(period, start)
        if period.end is not None and start >= period.end and period.stands != "late":
            return "next"
        named = period.stands == "named" and abs(period.start - start) <= GRACE
        if named or period.stands in ("unpaid", "trial", "late", "missing"):
            return "its own" if period.start >= start - GRACE else "instead"
        return "instead" if start > period.start else "stale"

    def calendar_meets(self, period: Period, start: datetime) -> str:
        """What an invoice from `start` on is to an open period whose calendar invoices pay."""
        assert period.end is not None
        since, until = self.paid
        near = slack(period.start, period.end)
        if since is None or until is None or period.stands in ("", "unpaid", "trial"):
            if period.start > start + near or (period.start >= start and period.step > 0):
                return "goes on"
            return "its own" if period.start >= start - GRACE else "instead"
        if abs(since - start) <= GRACE:
            return "goes on" if period.start >= start - GRACE else "instead"
        if start >= until - near:
            nearest, step = period.start, 0
            while (at := later(period.grid, period.granted.cadence, step)) <= start + near:
                nearest, step = at, step + 1
            return "goes on" if abs(nearest - start) <= near else "next"
        return "instead" if start > since else "stale"

    def pay(self, start: datetime, end: datetime) -> None:
        met = {meter: self.meets(each, start, end) for meter, each in self.meters.items() if self.is_invoiced(each)}
        due = {meter for meter, how in met.items() if how != "stale"}
        if not due:
            return
        self.paid = start, end
        waiting = self.next_plan is not None and self.next_plan_at is None
        lacking = set(PLANS[self.next_plan or "" if waiting else self.plan]) - set(self.meters)
        if waiting:  # what nobody paid and the new plan leaves to the calendar is no provider's any more
            new = PLANS[self.next_plan or ""]
            due -= {
                m
                for m in due
                if met[m] == "its own" and self.meters[m].provided and new.get(m, NOTHING).cadence != "subscription"
            }
        for meter in due:  # closed under the terms they were opened with
            if met[meter] == "next":
                self.close(self.meters[meter])
        if waiting:
            self.name_plan(self.next_plan or "")
        for meter, period in list(self.meters.items()):
            if meter in due and met[meter] == "goes on" and self.granted(meter).cadence != "subscription":
                near = slack(period.start, period.end or period.start)
                period.stands = "paid" if period.start >= start - near else period.stands
            elif meter in due and met[meter] == "its own" and period.calendar:
                granted = self.granted(meter) if waiting or period.stands == "trial" else period.granted
                anew = self.fresh(meter, granted, start, end, "paid")
                if anew.calendar:
                    anew.number = period.number
                anew.used, anew.gemini_used = period.used, period.gemini_used
                self.put(meter, anew)
            elif meter in due and met[meter] == "its own":
                period.granted = self.granted(meter) if waiting or period.stands == "trial" else period.granted
                self.forget_windows()
                period.grid, period.start, period.end, period.stands = start, start, end, "paid"
            elif meter in due:
                self.put(meter, self.fresh(meter, self.granted(meter), start, end, "paid"))
            elif waiting:
                self.put(meter, self.under_plan(meter, period, end))
        for meter in lacking:
            self.put(meter, self.fresh(meter, self.granted(meter), start, end, "paid"))
        self.advance(self.now)  # a calendar that began with the invoice may be due already

    def set_period(self, end: datetime) -> str:
        paid = [period for period in self.meters.values() if period.stands]
        if not paid and self.status != "trialing":
            return "refused"
        if paid and end <= min(period.start for period in paid):
            return "refused"
        for period in paid:
            if period.start < end and period.provided:
                self.name_end(period, end)
            elif period.start < end and period.stands in ("unpaid", "late", "missing"):
                period.stands = "named"
        if self.status == "trialing":
            self.next_status, self.next_status_at = "expired", end
        since = self.paid[0] or min((period.start for period in paid if period.calendar), default=None)
        if since is not None and end > since:
            self.paid = since, end
        self.advance(self.now)
        return "set"

    def seen(self) -> dict[str, Any]:
        """What a look at the account shows now: floating periods as if they were used."""
        copy = replace(self, meters={meter: replace(period) for meter, period in self.meters.items()})
        copy.open_plan(self.now)
        for meter in copy.meters:
            copy.use(meter)
        shown: dict[str, Any] = {
            name: getattr(self, name) for name in ("plan", "status", "highest_tier", "next_plan", "next_status")
        }
        shown |= {"plan_change_at": self.next_plan_at, "status_change_at": self.next_status_at}
        shown |= {"paid": self.paid, "waiting": [(at, invoice) for at, _, invoice in self.ahead]}
        shown["pay_from"] = self.pay_from
        for meter, period in copy.meters.items():
            shown[meter] = {
                "allowance": period.granted.quantity,
                "cadence": period.granted.cadence,
                "start": period.start,
                "end": period.end,
                "stands": STANDS.get(period.stands),
                "used": period.used,
                "gemini": period.gemini_used if period.counts_gemini else 0,
                "drawn": {drawer: units for drawer, units in period.drawn.items() if units},
                "rollover": period.rollover,
                "purchased": period.purchased,
                "credit": self.credit_left(meter),
                "limits": copy.bounds_seen(meter),
                "carried": self.fractions.get(meter, 0) * 1_000_000,
                "available": copy.available_on(meter),
                "parked": period.parked[2:] if period.parked else None,
            }
        return shown

    def credit_left(self, meter: str) -> list[tuple[str, int]]:
        """Orders that have something left: in the order in which they pay, then those to come."""
        found = [(order, each) for (on, order), each in self.credit.items() if on == meter and each.left]
        pay = sorted((*each.turn(), order, each.left) for order, each in found if each.begun)
        come = sorted((each.start, *each.turn(), order, each.left) for order, each in found if not each.begun)
        return [each[-2:] for each in (*pay, *come)]

    def available_on(self, meter: str) -> int | None:
        price = PRICES.get(self.plan, {}).get(meter)
        if price is None:
            return self.available(meter)
        room = self.available(WALLET)
        if room is None or self.status == "suspended":
            return room
        # The next unit would cost more than the room.
        return ceil((room + 1 - self.fractions.get(meter, 0)) / Fraction(price)) - 1

    def available(self, meter: str) -> int | None:
        if self.status == "suspended":
            return 0
        bounds = [max(0, amount - used) for _, _, amount, used, _ in self.bounds_seen(meter)]
        period = self.meters[meter]
        limit = self.limit(period)
        if limit is not None:
            room = max(0, limit - period.used)
            purchased = 0 if self.pay_from == "allowance" else period.purchased
            bounds.append(max(0, room + period.rollover + purchased if period.spill else room))
        return min(bounds, default=None)


STANDS = {
    "unpaid": "none", "trial": "trial", "named": "bounds", "paid": "invoice", "late": "grace", "missing": "missing",
}  # fmt: skip


def shown_by(account: Account) -> dict[str, Any]:
    """An account as the system shows it, in the model's words."""
    names = (
        "plan", "status", "highest_tier", "next_plan", "next_status", "plan_change_at", "status_change_at", "pay_from",
    )  # fmt: skip
    shown: dict[str, Any] = {name: getattr(account, name) for name in names}
    shown |= {"paid": (account.paid_from, account.paid_until)}
    shown |= {"waiting": [(change.at, change.name) for change in account.waiting]}
    for meter, balance in account.balances.items():
        shown[meter] = {
            "allowance": balance.allowance,
            "cadence": balance.cadence,
            "start": balance.period_start,
            "end": balance.period_end,
            "stands": balance.backing,
            "used": balance.used,
            "gemini": (balance.cap_used or {}).get("gemini", 0) if balance.caps else 0,
            "drawn": {name: units for name, units in (balance.cap_used or {}).items() if name in SPILLS and units},
            "rollover": balance.rollover,
            "purchased": balance.purchased,
            "credit": [(grant.key, grant.left) for part in grants_on(balance) for grant in part],
            "limits": sorted(
                (each.per, each.set_by, each.amount, each.used, each.ends_at)
                for each in (balance.limits.standings() if balance.limits else ())
            ),
            "carried": balance.carried,
            "available": spendable(account, meter),
            "parked": (parked.used, (parked.cap_used or {}).get("gemini", 0)) if (parked := balance.parked) else None,
        }
    return shown


def spendable(account: Account, meter: str) -> int | None:
    """What a check without Redis finds."""
    standing = standing_in_ledger(account, meter, [])
    return remaining_answer(account.user_id, meter, standing).remaining


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
    quantity: int
    gemini: bool
    multiplier: str

    def payload(self, user_id: str) -> bytes:
        event: dict[str, Any] = {"event_id": self.event_id, "user_id": user_id, "meter": self.meter}
        event |= {"quantity": self.quantity, "multiplier": self.multiplier}
        if self.gemini:
            event["dimensions"] = {"backend": "gemini"}
        return json.dumps(event).encode()


class Told(NamedTuple):
    """A notice: what it is about, and its facts."""

    kind: str
    meter: str
    period: str
    times: int
    facts: Mapping[str, Any]


def wrongly_told(told: Sequence[Told]) -> list[Told]:
    """The notices that repeat another, or tell of a recovery that was none: a tenth of the allowance, and one unit."""
    wrong, depleted, seen = [], dict[str, Told | None](), set[tuple[str, str, str, int]]()
    for each in told:
        before = depleted.get(each.meter)
        if each.kind == "balance.depleted":
            is_wrong = before is not None and before.period == each.period
            depleted[each.meter] = each
        else:
            limit = each.facts.get("limit")  # missing: unlimited
            units = max(0, (limit or 0) - each.facts["used"]) + each.facts["rollover"] + each.facts["purchased"]
            is_real = limit is None or (units >= 1 and 10 * units >= limit)
            is_wrong = before is None or (before.period, before.times) != (each.period, each.times) or not is_real
            depleted[each.meter] = None
        if is_wrong or each[:4] in seen:
            wrong.append(each)
        seen.add(each[:4])
    return wrong


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
            fields: dict[Any, Any] = {"v": "1", "e": event.payload(user_id)}
            self.resources.redis.xadd(self._partition(user_id).entries, fields)

    def settle(self, user_id: str) -> None:
        """Apply and publish what waits."""
        drain_stream(self.resources, self._partition(user_id))
        assert self.resources.redis.xlen(self._partition(user_id).entries) == 0

    def available(self, user_id: str, meter: str) -> int | None:
        return self.billing.check(user_id, meter).available

    def told(self, user_id: str) -> list[Told]:
        """What the account was told, in order."""
        found = rows(
            self.resources.settings,
            "SELECT kind, meter, period, times, data FROM notice WHERE user_id = %s ORDER BY number",
            user_id,
        )
        return [Told(*cast("Any", row)) for row in found]

    def differences(self, _user_id: str) -> list[str]:
        return verify_ledger(self.resources).differences

    def history(self, user_id: str) -> list[EntryRow | UsageRow]:
        with batch_connection(self.resources.engine) as postgres:
            return list(read_history(postgres, [user_id]))

    def _partition(self, user_id: str) -> keys.Partition:
        return keys.partition_of(user_id, self.resources.settings.partitions)


class MemorySystem:
    """The same commands and batches on dictionaries that stand in for the ledger. No servers, far more examples."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.entry_ids = count(1)
        self.start_again()

    def start_again(self) -> None:
        self.now = START
        self.accounts: dict[str, Account] = {}
        self.counters: dict[str, dict[str, tuple[int, int]]] = {}
        self.entries: list[EntryRow] = []
        self.usage: list[UsageRow] = []
        self.waiting: dict[str, list[Any]] = defaultdict(list)
        self.orders: dict[tuple[str, str], str] = {}
        self.alarms: dict[tuple[str, str, str], Alarm] = {}
        self.notices: dict[str, Notice] = {}

    def set_clock(self, now: datetime) -> None:
        self.now = now

    def forget_cached(self, user_id: str) -> None:
        pass

    def send(self, user_id: str, events: Sequence[SentEvent]) -> None:
        self.waiting[user_id] += [
            (f"{int(self.now.timestamp() * 1_000)}-{next(self.entry_ids)}".encode(), [b"v", b"1", b"e", payload])
            for payload in (event.payload(user_id) for event in events)
        ]

    def settle(self, user_id: str) -> None:
        raw, self.waiting[user_id] = self.waiting[user_id], []
        if not raw:
            return
        intake = Intake(keys.partition_of(user_id, 8), self.resources.settings, self.resources.catalogue)
        received = list(intake.receive(raw))
        users, ids = identities_of(received)
        loaded = self.load_for_update(None, users_of(received), (users, ids))
        writes = work_out(received, loaded, self.resources.catalogue, None).writes
        assert {refused.reason for refused in writes.refused} <= {
            Refusal.AMOUNT_OUT_OF_RANGE
        }  # more than a wallet pays
        self.store(None, writes, self.now)

    def available(self, user_id: str, meter: str) -> int | None:
        account = accounts.show(self.resources, user_id)
        return spendable(account, meter)

    def history(self, _user_id: str) -> list[EntryRow | UsageRow]:
        changes: list[EntryRow | UsageRow] = [*self.entries, *self.usage]
        return sorted(changes, key=lambda row: row.seq or 0)

    def told(self, user_id: str) -> list[Told]:
        mine = [each for each in self.notices.values() if each.user_id == user_id]
        return [Told(each.kind, each.meter, each.period, each.times, each.data) for each in mine]

    def differences(self, user_id: str) -> list[str]:
        replayed = Replayed.nothing(user_id)
        found: list[str] = []
        for row in self.history(user_id):
            found += [wrong.text for wrong in replay(replayed, row)]
        snapshot = Snapshot(self.now, 1, self.accounts, self.counters)
        compared = compare(snapshot.accounts[user_id], snapshot.counters[user_id], replayed)
        return found + [wrong.text for wrong in compared]

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

    def read_credits(self, _: object, users: Sequence[str]) -> list[EntryRow]:
        return [entry for entry in self.entries if entry.user_id in users and entry.meter]

    def claim_key(self, _: object, kind: str, key: str, user_id: str) -> str:
        return self.orders.setdefault((kind, key), user_id)

    def read_usage(self, _: object, user_id: str, event_id: str) -> UsageRow | None:
        return next((row for row in self.usage if (row.user_id, row.event_id) == (user_id, event_id)), None)

    def allowance_at(self, _: object, user_id: str, meter: str, seq: int) -> int | None:
        mine = [entry for entry in self.entries if (entry.user_id, entry.meter) == (user_id, meter)]
        named = [entry.detail for entry in mine if entry.seq < seq]
        return next((detail["allowance"] for detail in reversed(named) if "allowance" in detail), 0)

    def due_balances(self, _: object, after: object, limit: int) -> list[tuple[datetime, str]]:
        return [] if after else [(self.now, user_id) for user_id in self.accounts][:limit]

    def caps_at(self, _: object, user_id: str, meter: str, seq: int) -> dict[str, int]:
        mine = [entry for entry in self.entries if (entry.user_id, entry.meter) == (user_id, meter)]
        named = [entry.detail for entry in mine if entry.seq < seq and "allowance" in entry.detail]
        return (named[-1]["caps"] if named else None) or {}

    def read_entries(self, _: object, user_id: str, entry_key: str) -> list[EntryRow]:
        return [entry for entry in self.entries if (entry.user_id, entry.entry_key) == (user_id, entry_key)]

    def due_provided(self, _: object, after: object, limit: int) -> list[tuple[datetime, str]]:
        return self.due_balances(_, after, limit)

    def due_grants(self, _: object, after: object, limit: int) -> list[tuple[datetime, str]]:
        return self.due_balances(_, after, limit)

    def due_waiting(self, _: object, after: object, limit: int) -> list[tuple[datetime, str]]:
        return self.due_balances(_, after, limit)

    def _settled_until(self, _resources: Resources, about: object, now: datetime | None = None) -> Any:
        """Of the streams of the partitions: for a command, and for the job."""
        if now is not None:
            return now - timedelta(hours=24) if self.waiting[str(about)] else now
        oldest = {
            user_id: datetime.fromtimestamp(int(raw[0][0].split(b"-")[0]) / 1_000, UTC)
            for user_id, raw in self.waiting.items()
            if raw
        }
        return {
            partition: max(
                self.now - timedelta(hours=24),
                min(
                    (at for user_id, at in oldest.items() if keys.partition_of(user_id, 8) == partition),
                    default=self.now,
                ),
            )
            for partition in keys.partitions_of(8)
        }

    def due_changes(self, _: object, after: object, limit: int) -> list[tuple[datetime, str]]:
        return self.due_balances(_, after, limit)

    def store(self, _: object, writes: Writes, now: datetime) -> None:
        told, changed_alarms = tell(writes.crossings, self.alarms)
        self.alarms |= changed_alarms
        for notice in (*writes.notices, *told):
            self.notices.setdefault(notice.notice_id, notice)
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
        self.usage += [_as_read(line) for run in writes.usage for line in usage_text([run], now).split("\n")[:-1]]
        for user_id, meter, used, rollover, purchased, carried, consumed, granted in writes.moved:
            balance = self.accounts[user_id].balances[meter]
            limits = None if balance.limits is None else balance.limits.spent(consumed)
            balance = balance._replace(
                used=used, rollover=rollover, purchased=purchased, carried=carried, limits=limits
            )
            self._put(Changed(user_id, balance, consumed, granted))
        for changed in writes.retermed:
            assert changed.balance.meter in self.accounts[changed.user_id].balances
            self._put(changed)
        for limited in writes.limits:
            balance = self.accounts[limited.user_id].balances[limited.meter]
            self._put(Changed(limited.user_id, balance._replace(limits=limited.limits), 0, 0))
        for user_id, version in writes.versions:
            self.accounts[user_id] = self.accounts[user_id]._replace(version=version)
        for stated in writes.restated:
            kept = self.accounts[stated.user_id]
            self.accounts[stated.user_id] = stated._replace(version=kept.version, balances=kept.balances)

    def spent_since(self, _: object, user_id: str, meter: str, starts: datetime, before: int) -> tuple[int, int]:
        mine = [row for row in self.usage if row.user_id == user_id and (row.seq or 0) < before]
        last = max((row.seq or 0 for row in mine if row.applied_at < starts), default=0)
        undone = {entry.entry_key for entry in self.entries if entry.user_id == user_id and entry.seq < before}
        counted = [row for row in mine if (row.seq or 0) > last and row.payer == meter]
        return last, sum(row.amount for row in counted if f"reverse:{row.event_id}" not in undone)

    def store_and_commit(self, _: object, writes: Writes, now: datetime) -> None:
        self.store(_, writes, now)

    def refresh_trust(self, _resources: Resources, _users: Sequence[str]) -> None:
        """Nothing is cached here."""

    def refresh(self, _resources: Resources, _users: Sequence[str]) -> None:
        """Nothing is cached here."""

    def _put(self, changed: Changed) -> None:
        user_id, balance, consumed, granted = changed
        account = self.accounts[user_id]
        self.accounts[user_id] = account._replace(balances={**account.balances, balance.meter: balance})
        before = self.counters[user_id].get(balance.meter, (0, 0))
        self.counters[user_id][balance.meter] = (before[0] + consumed, before[1] + granted)


_TEXTS = {
    "user_id",
    "event_id",
    "meter",
    "multiplier",
    "source",
    "reference_id",
    "hold_key",
    "trace_id",
    "wallet",
    "price",
}


def _as_read(line: str) -> UsageRow:
    """The row of an event as it is read back from the log; `line` is what COPY reads, without a backslash."""
    values = line.split("\t")
    stored: dict[str, Any] = dict(zip(UsageRow._fields[: len(values)], values, strict=True))
    for name, value in stored.items():
        if value == COPY_NULL:
            stored[name] = None
        elif name in {"period_start", "occurred_at", "applied_at"}:
            stored[name] = datetime.fromisoformat(value)
        elif name in {"dimensions", "grants"}:
            stored[name] = json.loads(value)
        elif name == "clamped":
            stored[name] = value == "t"
        elif name not in _TEXTS:
            stored[name] = int(value)
    return UsageRow(**stored)


class _NoPostgres:
    def commit(self) -> None:
        pass


STANDS_IN = {
    "batch_connection", "load_for_update", "read_account", "existing_accounts", "has_entry", "read_entry", "read_usage",
    "read_credits", "claim_key", "allowance_at", "caps_at", "due_balances", "due_changes", "due_grants",
    "due_provided", "due_waiting", "read_entries", "_settled_until", "store", "store_and_commit", "refresh",
    "refresh_trust", "spent_since",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The machine

amounts = st.integers(0, 30) | st.integers(0, 300) | st.sampled_from([0, 1, 10**6, 10**12])
meters = st.sampled_from(list(SPILLS))
multipliers = st.sampled_from(["1", "1", "0.75", "0.5", "0.333333", "0.000001"])
spilling = st.sampled_from([meter for meter, spill in SPILLS.items() if spill])
plans = st.sampled_from(list(PLANS))


def spans(least: timedelta, most: timedelta) -> st.SearchStrategy[timedelta]:
    """Lengths of time in whole milliseconds."""
    return st.integers(least // MILLISECOND, most // MILLISECOND).map(lambda units: units * MILLISECOND)


pauses = st.one_of(
    spans(MILLISECOND, timedelta(days=3)),
    spans(timedelta(days=3), timedelta(days=800)),
    st.sampled_from([timedelta(days=days) for days in (1, 7, 28, 31, 366)]),
)


class Terms(NamedTuple):
    """How credit pays; its start and its end are so long after it is granted."""

    category: str = "paid"
    priority: int = 50
    start: timedelta | None = None
    end: timedelta | None = None

    def told(self, now: datetime) -> dict[str, Any]:
        """The arguments of a grant."""
        start, end = (ahead and now + ahead for ahead in (self.start, self.end))
        return {"category": self.category, "priority": self.priority, "effective_at": start, "expires_at": end}


class Clawed(NamedTuple):
    """A refund: what it took from which credit, what had ended unused, and the debt that it made."""

    meter: str
    amount: int
    order: str | None
    paid: dict[str, int]
    gone: int
    debt: int


kinds_of_credit = st.just(Terms()) | st.builds(
    lambda category, priority, start, end: Terms(category, priority, start, end and end + (start or timedelta(0))),
    st.sampled_from(["paid", "promotional"]),
    st.sampled_from([0, 10, 50, 50, 100]),
    st.none() | st.none() | spans(MILLISECOND, timedelta(days=40)),
    st.none() | spans(MILLISECOND, timedelta(days=2)) | spans(timedelta(days=2), timedelta(days=90)),
)


class AccountLife(RuleBasedStateMachine):
    """What can happen to an account, done to the system and to the model alike."""

    system: ClassVar[RealSystem | MemorySystem]
    users: ClassVar[Iterator[int]] = count()
    kinds_told: ClassVar[set[str]]

    def __init__(self) -> None:
        super().__init__()
        self.user_id = f"user-{next(self.users)}"
        self.keys = count()
        self.granted: dict[str, tuple[str, int]] = {}
        self.terms: dict[str, dict[str, Any]] = {}
        self.undoable: dict[str, tuple[str, tuple[int, int, int], int, dict[str, int]]] = {}
        self.undone: set[str] = set()
        self.clawed: dict[str, Clawed] = {}
        self.is_behind = False
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

    @rule(data=st.data(), offset=st.sampled_from([-MILLISECOND, timedelta(0), MILLISECOND]))
    def time_comes_to_a_boundary(self, data: st.DataObject, offset: timedelta) -> None:
        future = sorted({end for end in self.model.ends() if end + offset > self.model.now})
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
        moment = self.model.now + MILLISECOND
        while moment in (self.model.next_plan_at, self.model.next_status_at):
            moment += MILLISECOND
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

    @rule(
        events=st.lists(st.tuples(meters, amounts, st.booleans(), multipliers), min_size=1, max_size=4),
        twice=st.booleans(),
    )
    def events_come(self, events: list[tuple[str, int, bool, str]], twice: bool) -> None:
        self.tick()
        sent = [SentEvent(f"e{next(self.keys)}", *event) for event in events]
        if twice:
            sent.append(sent[0])
        self.system.send(self.user_id, sent)
        for event in sent:
            self.model.apply(event)
        self.agree()

    @rule(
        data=st.data(), events=st.lists(st.tuples(meters, amounts, st.booleans(), multipliers), min_size=1, max_size=3)
    )
    def events_wait(self, data: st.DataObject, events: list[tuple[str, int, bool, str]]) -> None:
        """Whatever happens before they are applied, they count at the moment at which they came."""
        self.tick()
        sent = [SentEvent(f"e{next(self.keys)}", *event) for event in events]
        self.system.send(self.user_id, sent)
        for event in sent:
            self.model.apply(event)
        self.is_behind, until = True, self.model.now + timedelta(hours=23)
        for _ in range(data.draw(st.integers(1, 3))):
            meanwhile = data.draw(
                st.sampled_from(["time", "boundary", "plan", "status", "invoice", "job", "end", "period"])
            )
            if meanwhile in ("time", "boundary"):
                due = [end for end in self.model.ends() if self.model.now < end <= until]
                longest = min(due) if due and meanwhile == "boundary" else self.model.now + timedelta(hours=4)
                self.go_to(max(self.model.now, min(longest, until)))
            elif self.model.now + 2 * MILLISECOND < until:
                self.do_meanwhile(meanwhile, data)
        self.is_behind = False
        self.agree()

    def do_meanwhile(self, what: str, data: st.DataObject) -> None:
        if what == "plan":
            self.change_plan_now(data.draw(plans), None)
        elif what == "status":
            self.set_status_now(data.draw(st.sampled_from(STATUSES)))
        elif what == "invoice":
            self.an_invoice(timedelta(0), data.draw(st.sampled_from([1, 30])))
        elif what == "job":
            self.tick()
            renewals.renew_due(self.resources)
        elif what == "period":
            self.correct_the_end(
                data.draw(st.sampled_from([timedelta(hours=-1), timedelta(days=1), timedelta(days=9)]))
            )
        else:
            self.end_later("canceled")

    @precondition(lambda self: self.model.events)
    @rule(data=st.data())
    def an_event_is_reversed(self, data: st.DataObject) -> None:
        self.tick()
        event_id = data.draw(st.sampled_from(sorted(self.model.events)))
        change = credits.reverse(self.resources, self.user_id, event_id)
        assert change.repeated == (event_id in self.model.reversed)
        assert change.gone == self.model.reverse(event_id)
        self.agree(change)

    # -- Credits

    @rule(meter=spilling, amount=st.integers(1, 300), terms=kinds_of_credit)
    def credit_is_granted(self, meter: str, amount: int, terms: Terms) -> None:
        self.tick()
        key = f"order-{self.user_id}-{next(self.keys)}"
        told = terms.told(self.model.now)
        if meter in PRICES.get(self.model.plan, {}):
            with pytest.raises(AccountError, match=rf"^meter: {meter} draws on the wallet {WALLET}"):
                credits.grant(self.resources, self.user_id, meter, amount, key, **told)
            return
        self.granted[key] = meter, amount
        self.terms[key] = told
        change = credits.grant(self.resources, self.user_id, meter, amount, key, **told)
        assert change.waits_until == told["effective_at"]
        self.model.grant(meter, amount, key, terms)
        self.agree(change)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def a_grant_is_repeated(self, data: st.DataObject) -> None:
        self.tick()
        key = data.draw(st.sampled_from(sorted(self.granted)))
        change = credits.grant(self.resources, self.user_id, *self.granted[key], key, **self.terms[key])
        assert change.repeated
        self.agree(change)

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), amount=st.integers(1, 300), named=st.booleans())
    def a_purchase_is_refunded(self, data: st.DataObject, amount: int, named: bool) -> None:
        self.refund(data.draw(st.sampled_from(sorted(self.granted))), amount, named=named)

    @precondition(lambda self: self.model.turns())
    @rule(data=st.data(), amount=st.integers(1, 300))
    def a_grant_is_refunded_as_it_starts_or_ends(self, data: st.DataObject, amount: int) -> None:
        open_orders = [order for (_, order), each in self.model.credit.items() if order and not each.over]
        order = data.draw(st.sampled_from(sorted(open_orders)))
        credit = self.model.credit[self.granted[order][0], order]
        moment = credit.end if credit.begun else credit.start
        if moment is not None:
            self.go_to(max(moment, self.model.now))
        self.refund(order, amount, named=True)

    def refund(self, bought: str, amount: int, *, named: bool) -> None:
        self.tick()
        meter, order = self.granted[bought][0], bought if named else None
        key = f"refund-{next(self.keys)}"
        if amount > self.model.refundable(meter, order):
            with pytest.raises(AccountError, match=r"^amount: must be at most "):
                credits.claw_back(self.resources, self.user_id, meter, amount, key, order=order)
            self.agree()
            return
        change = credits.claw_back(self.resources, self.user_id, meter, amount, key, order=order)
        paid, gone, debt = self.model.claw_back(meter, amount, order)
        assert (change.debt, change.gone, change.taken) == (debt, gone, amount)
        self.clawed[key] = Clawed(meter, amount, order, paid, gone, debt)
        self.agree(change)

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), total=st.integers(1, 300))
    def a_provider_tells_the_total_refunded(self, data: st.DataObject, total: int) -> None:
        self.tick()
        order = data.draw(st.sampled_from(sorted(self.granted)))
        meter, told = self.granted[order][0], {"order": order, "total_refunded": total}
        key = f"total-{next(self.keys)}"
        units = total - self.model.orders[meter, order][1]
        if units > self.model.refundable(meter, order):
            with pytest.raises(AccountError, match=r"^total_refunded: must be at most "):
                credits.claw_back(self.resources, self.user_id, meter, key=key, **told)  # type: ignore[arg-type]
            self.agree()
            return
        change = credits.claw_back(self.resources, self.user_id, meter, key=key, **told)  # type: ignore[arg-type]
        assert (change.repeated, change.stale, change.taken) == (units == 0, units < 0, max(0, units))
        if units > 0:
            assert (change.gone, change.debt) == self.model.claw_back(meter, units, order)[1:]
        self.agree(change)

    @precondition(lambda self: self.clawed)
    @rule(data=st.data())
    def a_refund_is_repeated(self, data: st.DataObject) -> None:
        self.tick()
        key = data.draw(st.sampled_from(sorted(self.clawed)))
        meter, amount, order, _, gone, debt = self.clawed[key]
        change = credits.claw_back(self.resources, self.user_id, meter, amount, key, order=order)
        assert (change.repeated, change.debt, change.gone, change.taken) == (True, debt, gone, amount)
        self.agree(change)

    # -- Putting right

    @rule(
        meter=meters,
        shift=st.tuples(st.integers(-50, 50), st.integers(-50, 50), st.integers(-50, 50)).filter(any),
    )
    def a_balance_is_adjusted(self, meter: str, shift: tuple[int, int, int]) -> None:
        self.tick()
        key = f"fix-{next(self.keys)}"
        told = dict(zip(("used", "rollover", "purchased"), shift, strict=True))
        fits = SPILLS[meter] or not any(shift[1:])
        had_meter = meter in self.model.meters
        paid = self.model.shift(meter, *shift) if fits else None
        if paid is None:
            if not had_meter:
                self.model.meters.pop(meter, None)  # what is refused opens nothing
            with pytest.raises(AccountError, match=r"^(used|rollover|purchased): "):
                self.adjust(meter, key, told)
            self.agree()
            return
        change = self.adjust(meter, key, told)
        assert self.adjust(meter, key, told).repeated
        self.undoable[f"adjust:{key}"] = meter, shift, self.model.meters[meter].number, paid
        self.agree(change)

    def adjust(self, meter: str, key: str, shift: dict[str, int]) -> ChangeAnswer:
        return corrections.adjust(self.resources, self.user_id, meter, key=key, actor="ops", reason="test", **shift)

    @rule(meter=spilling, amount=st.none() | st.integers(1, 60))
    def debt_is_forgiven(self, meter: str, amount: int | None) -> None:
        self.tick()
        period = self.model.meters.get(meter)
        owed = 0 if period is None else max(0, -period.rollover)
        key = f"forgiven-{next(self.keys)}"
        if not owed or (amount or 0) > owed:
            with pytest.raises(AccountError, match=r"^amount: "):
                corrections.forgive_debt(self.resources, self.user_id, meter, amount, key=key)
            self.agree()
            return
        change = corrections.forgive_debt(self.resources, self.user_id, meter, amount, key=key)
        assert change.forgiven == (amount or owed)
        self.model.meters[meter].rollover += change.forgiven
        self.agree(change)

    @precondition(lambda self: self.undoable)
    @rule(data=st.data())
    def an_adjustment_is_undone(self, data: st.DataObject) -> None:
        self.tick()
        entry = data.draw(st.sampled_from(sorted(self.undoable)))
        meter, shift, number, paid = self.undoable[entry]
        period = self.model.meters[meter]
        closed = shift[0] and period.number != number
        used, rollover, purchased = (-units for units in shift)
        if closed or self.model.shift(meter, used, rollover, purchased, paid) is None:
            with pytest.raises(AccountError, match=r"^(entry|used): "):
                corrections.undo(self.resources, self.user_id, entry)
            self.agree()
            return
        change = corrections.undo(self.resources, self.user_id, entry)
        del self.undoable[entry]
        self.agree(change)
        assert corrections.undo(self.resources, self.user_id, entry).repeated

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def a_grant_is_undone(self, data: st.DataObject) -> None:
        self.tick()
        order = data.draw(st.sampled_from(sorted(self.granted)))
        meter = self.granted[order][0]
        units = self.model.refundable(meter, order)
        if order in self.undone:
            assert corrections.undo(self.resources, self.user_id, f"grant:{order}").repeated
            self.agree()
            return
        if units <= 0:
            with pytest.raises(AccountError, match=r"^entry: nothing of "):
                corrections.undo(self.resources, self.user_id, f"grant:{order}")
            self.agree()
            return
        self.undone.add(order)
        change = corrections.undo(self.resources, self.user_id, f"grant:{order}")
        assert (change.gone, change.debt) == self.model.claw_back(meter, units, order)[1:]
        self.agree(change)

    @precondition(lambda self: self.clawed)
    @rule(data=st.data())
    def a_refund_is_undone(self, data: st.DataObject) -> None:
        self.tick()
        key = data.draw(st.sampled_from(sorted(self.clawed)))
        meter, amount, order, paid, gone, debt = self.clawed[key]
        if key in self.undone:
            assert corrections.undo(self.resources, self.user_id, f"clawback:{key}").repeated
            self.agree()
            return
        if order in self.undone:
            with pytest.raises(AccountError, match=r"^entry: the grant of "):
                corrections.undo(self.resources, self.user_id, f"clawback:{key}")
            self.agree()
            return
        self.undone.add(key)
        change = corrections.undo(self.resources, self.user_id, f"clawback:{key}")
        self.model.meters[meter].rollover += debt
        self.model.bought[meter] += amount
        if order is not None:
            self.model.credit[meter, order].gone += gone
            self.model.orders[meter, order][1] -= amount
        assert change.gone == gone + self.model.return_credit(meter, paid)
        self.agree(change)

    # -- Limits

    @rule(
        meter=meters,
        per=st.sampled_from(["day", "week", "month"]),
        amount=st.none() | st.integers(1, 200),
        by=st.sampled_from(["user", "operator"]),
    )
    def a_limit_is_set(self, meter: str, per: str, amount: int | None, by: str) -> None:
        self.tick()
        same = self.model.limits.get((meter, by, per)) == amount
        if amount is not None and not same and meter in PRICES.get(self.model.plan, {}):
            with pytest.raises(AccountError, match=rf"^meter: {meter} draws on the wallet {WALLET}"):
                limits.set_limit(self.resources, self.user_id, meter, per, amount, of=by)
            return
        change = limits.set_limit(self.resources, self.user_id, meter, per, amount, of=by)
        assert change.repeated == same
        if not same:
            self.model.set_limit(meter, per, amount, by)
        self.agree(change)

    @rule(pay_from=st.sampled_from(["allowance", None]))
    def it_pays_from(self, pay_from: str | None) -> None:
        self.tick()
        change = limits.set_pay_from(self.resources, self.user_id, pay_from)
        assert change.repeated == (self.model.pay_from == pay_from)
        self.model.pay_from = pay_from
        self.agree(change)

    # -- Plan, status, renewals

    @rule(ago=spans(timedelta(0), timedelta(days=3)), length=st.sampled_from([1, 28, 30, 31, 365]))
    def an_invoice_is_paid(self, ago: timedelta, length: int) -> None:
        self.an_invoice(ago, length)

    def an_invoice(self, ago: timedelta, length: int) -> None:
        self.tick()
        start = self.model.now - ago
        self.renew(f"inv-{self.user_id}-{next(self.keys)}", start, start + timedelta(days=length))

    @rule(ago=spans(timedelta(days=10), timedelta(days=90)))
    def an_old_invoice_comes_late(self, ago: timedelta) -> None:
        self.tick()
        self.renew(
            f"inv-{self.user_id}-{next(self.keys)}", self.model.now - ago, self.model.now - ago + timedelta(days=30)
        )

    @precondition(lambda self: self.model.has_invoices())
    @rule(
        offset=st.sampled_from([timedelta(0), MILLISECOND, timedelta(minutes=30), timedelta(hours=23)]),
        length=st.sampled_from([1, 30]),
    )
    def an_invoice_starts_with_the_open_period(self, offset: timedelta, length: int) -> None:
        """Or a little after it: the time that it pays ends shortly after another boundary."""
        self.tick()
        paid = [period.start for period in self.model.meters.values() if period.stands]
        if not paid:
            return  # the plan that had invoices ended with the tick
        start = min(max(paid) + offset, self.model.now)
        self.renew(f"inv-{self.user_id}-{next(self.keys)}", start, start + timedelta(days=length))

    @precondition(lambda self: self.model.invoices)
    @rule(data=st.data())
    def an_invoice_is_delivered_again(self, data: st.DataObject) -> None:
        self.tick()
        invoice = data.draw(st.sampled_from(sorted(self.model.invoices)))
        same = data.draw(st.booleans())
        bounds = self.model.invoices[invoice] if same else (self.model.now, self.model.now + timedelta(days=30))
        self.renew(invoice, *bounds)

    @rule(ahead=spans(timedelta(minutes=1), timedelta(days=40)), length=st.sampled_from([1, 30, 365]))
    def an_invoice_is_paid_ahead(self, ahead: timedelta, length: int) -> None:
        self.tick()
        start = self.model.now + ahead
        self.renew(f"inv-{self.user_id}-{next(self.keys)}", start, start + timedelta(days=length))

    @rule(days=spans(timedelta(days=-20), timedelta(days=40)))
    def the_end_is_corrected(self, days: timedelta) -> None:
        self.correct_the_end(days)

    def correct_the_end(self, days: timedelta) -> None:
        self.tick()
        end = self.model.now + days
        key = f"fix-{next(self.keys)}"
        if self.model.set_period(end) == "refused":
            with pytest.raises(AccountError, match=r"^(plan|period_end): "):
                accounts.set_period(self.resources, self.user_id, end, key)
            self.agree()
            return
        self.agree(accounts.set_period(self.resources, self.user_id, end, key))

    def renew(self, invoice: str, start: datetime, end: datetime) -> None:
        expected = self.model.renew(invoice, start, end)
        if expected in ("refused", "conflict"):
            with pytest.raises(AccountError, match=r"^(plan|invoice_id): "):
                accounts.renew(self.resources, self.user_id, invoice, start, end)
            self.agree()
            return
        change = accounts.renew(self.resources, self.user_id, invoice, start, end)
        assert (change.repeated, change.stale) == (expected == "repeated", expected == "stale")
        assert change.waits_until == (start if expected == "waits" else None)
        self.agree(change)

    @rule(plan=plans, days=st.none() | st.integers(1, 40))
    def the_plan_changes_now(self, plan: str, days: int | None) -> None:
        self.change_plan_now(plan, days)

    def change_plan_now(self, plan: str, days: int | None) -> None:
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
        waits = wants_invoices and any(period.provided for period in model.meters.values())
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
        self.set_status_now(status)

    def set_status_now(self, status: str) -> None:
        self.tick()
        keeps_schedule = status in ("past_due", "trialing")
        repeated = self.model.status == status and (self.model.next_status is None or keeps_schedule)
        change = accounts.set_status(self.resources, self.user_id, status)
        assert change.repeated == repeated
        if not repeated:
            self.model.put_in_status(status)
        self.agree(change)

    @rule(status=st.sampled_from(["canceled", "expired"]))
    def it_is_to_end(self, status: str) -> None:
        self.end_later(status)

    def end_later(self, status: str) -> None:
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
        if self.is_behind:
            return
        self.model.advance(self.model.now)  # what was scheduled for this very moment
        self.system.settle(self.user_id)
        self.model.settle()
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
        history = self.system.history(self.user_id)
        for since in {written_at(history[len(history) * part // 3]) for part in range(3)}:
            assert "\n".join(differences_in_force(self.resources.catalogue, self.user_id, history, since)) == ""
        told = self.system.told(self.user_id)
        assert wrongly_told(told) == []
        self.kinds_told.update(each.kind for each in told)


def live(system: RealSystem | MemorySystem, examples: int, steps: int) -> None:
    machine = type("Machine", (AccountLife,), {"system": system, "kinds_told": set()})
    chosen = hypothesis_settings(max_examples=examples, stateful_step_count=steps, deadline=None, print_blob=True)
    run_state_machine_as_test(machine, settings=chosen)


def test_a_notice_told_again_or_of_no_recovery_is_found() -> None:
    def told(kind: str, period: str, times: int, used: int = 100, **facts: int) -> Told:
        return Told(f"balance.{kind}", "voice", period, times, {"used": used, "rollover": 0, "purchased": 0, **facts})

    down, up = told("depleted", "may", 1, limit=100), told("recovered", "may", 1, used=90, limit=100)
    again = told("depleted", "may", 2, limit=100)
    june = told("depleted", "june", 1, limit=100)
    assert wrongly_told([down, up, again, june]) == []
    assert wrongly_told([down, told("recovered", "may", 1)]) == []  # it is unlimited now
    assert wrongly_told([down, again]) == [again]
    assert wrongly_told([up]) == [up]
    assert wrongly_told([down, up, up]) == [up]
    assert wrongly_told([down, june, up]) == [up]
    assert wrongly_told([down, up, down]) == [down]
    near = told("recovered", "may", 1, used=91, limit=100)
    assert wrongly_told([down, near]) == [near]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemorySystem:
    settings = Settings(catalogue_path=catalogue_file(tmp_path))
    # No engine and no Redis: whatever would touch them fails.
    system = MemorySystem(Resources(settings, load_catalogue(settings.catalogue_path), None, None))  # type: ignore[arg-type]
    for module in (batch, change, accounts, corrections, credits, limits, renewals):
        for name in STANDS_IN & vars(module).keys():
            monkeypatch.setattr(module, name, getattr(system, name))
    return system


def test_a_life_in_memory(memory: MemorySystem) -> None:
    live(memory, examples=150, steps=30)


@pytest.fixture
def life(memory: MemorySystem) -> Iterator[AccountLife]:
    """A life that a test tells; the model, the proof and the simulation agree with it."""
    machine = type("Machine", (AccountLife,), {"system": memory, "kinds_told": set()})
    lived: AccountLife = machine()
    yield lived
    lived.teardown()


@pytest.mark.parametrize("plan", ["free", "plus", "core", "mixed"])
def test_a_checkout_of_a_yearly_plan_names_bounds_on_every_meter(life: AccountLife, plan: str) -> None:
    life.open(plan, "active", None)
    life.time_passes(timedelta(days=108))
    life.the_plan_changes_now("yearly", 40)
    shown = shown_by(accounts.show(life.resources, life.user_id))
    assert {meter: shown[meter]["stands"] for meter in PLANS["yearly"]} == {"voice": "bounds", "text": "bounds"}


@pytest.mark.parametrize("days", [0, 12, 20, 21])
@pytest.mark.parametrize("hours", [0, 7])
def test_an_invoice_meets_a_calendar_that_was_anchored_later(life: AccountLife, days: int, hours: int) -> None:
    """Days and months of the plan begin on the 20th day; the paid time was corrected to be over now."""
    life.open("basic", "active", None)
    life.an_invoice(timedelta(days=10), 30)
    life.the_plan_changes_now("yearly", None)
    life.correct_the_end(timedelta(0))
    life.time_passes(timedelta(days=days, hours=hours))
    life.an_invoice(timedelta(days=3), 28)
    life.time_passes(timedelta(days=2))
    life.events_come([("text", 5, False, "1"), ("voice", 5, False, "1")], twice=False)


def test_a_limit_counts_what_was_applied_in_its_window_whenever_it_came(life: AccountLife) -> None:
    life.open("free", "active", None)
    life.go_to(START + timedelta(hours=14))
    life.system.send(life.user_id, [late := SentEvent("late", "text", 40, False, "1")])
    life.model.apply(late)
    life.time_passes(timedelta(hours=1))
    life.a_limit_is_set("text", "day", 57, "user")
    shown = shown_by(accounts.show(life.resources, life.user_id))
    # The month of the plan's limit was open: there the event counted by the moment at which it came.
    assert [each[:4] for each in shown["text"]["limits"]] == [("day", "user", 57, 40), ("month", "plan", 80, 0)]


def test_an_event_opens_no_window_of_a_wallet_that_its_meter_left_before_it(life: AccountLife) -> None:
    life.open("studio", "active", None)
    life.events_come([("voice", 10, False, "1")], twice=False)
    life.is_behind = True
    for event_id in ("before", "after"):  # the plan changes between them, and waits for the first one
        life.tick()
        life.system.send(life.user_id, [event := SentEvent(event_id, "voice", 1, False, "1")])
        life.model.apply(event)
        if event_id == "before":
            life.change_plan_now("tenant", None)
    life.is_behind = False
    life.agree()
    life.a_limit_is_set("credits", "month", 60, "operator")
    shown = shown_by(accounts.show(life.resources, life.user_id))
    assert [each[:4] for each in shown["credits"]["limits"]] == [
        ("day", "plan", 30, 0), ("month", "operator", 60, 33), ("month", "plan", 500, 33),
    ]  # fmt: skip


def test_a_life_tells_of_a_line_that_is_reached_and_left_again(life: AccountLife) -> None:
    life.open("basic", "active", None)
    life.events_come([("text", 30, False, "1")], twice=False)
    life.credit_is_granted("text", 30, Terms())
    life.teardown()
    assert life.kinds_told == {"balance.depleted", "balance.recovered"}


class Drawn:
    """Answers what a rule draws, in order."""

    def __init__(self, *answers: object) -> None:
        self._answers = iter(answers)

    def draw(self, _: object) -> Any:
        return next(self._answers)


def test_a_simulation_opens_a_meter_ahead_of_the_paid_time(life: AccountLife) -> None:
    """The meter begins with the paid time, a minute later; the plan that waits comes before that."""
    life.open("basic", "active", None)
    life.an_invoice_is_paid_ahead(timedelta(minutes=1), 1)
    waiting: Any = Drawn(2, "plan", "free", "time")
    life.events_wait(waiting, [("voice", 0, False, "1"), ("credits", 0, False, "1")])


def test_a_life_on_real_servers(emptied_database_url: str, redis_url: str, tmp_path: Path) -> None:
    settings = settings_for(emptied_database_url, redis_url, catalogue_path=catalogue_file(tmp_path))
    with closing(Resources.open(settings)) as resources, Billing.connect(settings) as billing:
        live(RealSystem(resources, billing), examples=12, steps=25)
