"""What-if: the events of a window under another catalogue, beside what they really paid.

One read-only snapshot, read by cursors of the server, account by account: nothing is written or locked, and the memory
does not grow with accounts or events. An account is replayed from its first change, as a proof does; from the start of
the window on a second account goes along, under the catalogue to try. See `worker.rules.simulation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from heapq import heappush, heapreplace
from itertools import count, groupby, islice
from operator import attrgetter
from typing import NamedTuple

from config.catalogue import Catalogue, parse_with_settings
from schemas.answers import Parts
from schemas.simulation import SimulatedAccount, SimulatedMeter, SimulatedPlan, SimulationReport
from worker.errors import ReportError
from worker.ledger import overviews
from worker.ledger.accounts import existing_accounts
from worker.ledger.catalogues import read_versions
from worker.ledger.connection import Postgres, batch_connection, open_engine, read_clock
from worker.ledger.proof import read_history
from worker.ledger.simulation import (
    Need,
    Window,
    ledger_begins,
    meters_needed,
    plans_needed,
    reversed_events,
    uncollected_in,
    users_in,
)
from worker.reports.simulation_run import Billed, Walk
from worker.resources import Resources
from worker.rules.catalogues import Timeline
from worker.rules.simulation import Question
from worker.rules.words import counted

MAX_MOST_CHANGED = 10_000
DEFAULT_MOST_CHANGED = 20

# What no simulation can know; the answer says so.
UNKNOWN = (
    "checks, holds and charges that limits, sub-caps or an empty balance denied or would deny: the log has only events "
    "that happened",
    "what users would have done otherwise under other terms",
    "credits that a carry-over brings are those that really moved",
)


class Bucket(NamedTuple):
    """What one bucket paid, and would have paid."""

    name: str
    paid: int
    simulated: int


_BUCKETS = {
    "from_subscription": "allowance",
    "from_rollover": "rollover",
    "from_purchased": "purchased",
    "overflow_to_debt": "debt",
    "uncollected": "uncollected",
}


def buckets_of(paid: Parts, simulated: Parts) -> list[Bucket]:
    """Return the buckets that paid, or would have paid, by their names for people."""
    found = [Bucket(name, getattr(paid, part), getattr(simulated, part)) for part, name in _BUCKETS.items()]
    return [each for each in found if each.paid or each.simulated]


class Chosen(NamedTuple):
    """Which accounts with events in the window to simulate: all of them, a `sample`, or that of `user_id`."""

    sample: int | None = None
    user_id: str | None = None


def simulate(
    resources: Resources,
    catalogue: Catalogue,
    since: datetime,
    until: datetime | None = None,
    *,
    plans: Mapping[str, str] | None = None,
    chosen: Chosen = Chosen(),  # noqa: B008 - a frozen value
    most_changed: int = DEFAULT_MOST_CHANGED,
    progress: Callable[[int], None] | None = None,
) -> SimulationReport:
    """Report what the events from `since` up to `until` (default: now) would have paid under `catalogue`. Reads only.

    `plans` has the plan to try in place of another, by code. `most_changed` is the number of accounts to list.
    `progress` receives the number of accounts simulated so far.
    Raises ReportError for a wrong window, an unknown plan or account, and a catalogue that lacks a plan or a meter that
    accounts of the window need.
    """
    _require_choice(chosen, most_changed)
    timeout_ms = resources.settings.report_timeout_ms
    engine = open_engine(resources.settings, statement_timeout_ms=timeout_ms)
    try:
        with batch_connection(engine) as postgres:
            overviews.begin(postgres, idle_timeout_ms=timeout_ms)
            window = _window(postgres, since, until)
            timeline = _timeline(resources, postgres, window)
            in_force = timeline.at(window.since, window.since)
            question = Question(catalogue, lambda moment: timeline.at(moment, moment), dict(plans or {}), window.since)
            _require_answerable(postgres, question, timeline, window, chosen.user_id)
            sums = _Sums(question, most_changed)
            users = users_in(postgres, window, user_id=chosen.user_id, sample=chosen.sample)
            while some := list(islice(users, resources.settings.verify_chunk_accounts)):
                undone = reversed_events(postgres, some, window)
                for user_id, rows in groupby(read_history(postgres, some, window.until), key=attrgetter("user_id")):
                    sums.add(user_id, Walk(question, user_id, undone.get(user_id, ())).billed(rows))
                    if progress is not None:
                        progress(sums.accounts)
            if chosen.sample is None:
                for nobody in uncollected_in(postgres, window, chosen.user_id):
                    sums.add_uncollected(nobody.meter, nobody.events, nobody.amount)
            postgres.rollback()
    finally:
        engine.dispose()
    return SimulationReport(
        since=window.since,
        until=window.until,
        catalogue=catalogue.digest,
        in_force=in_force.digest,
        plans_tried=dict(question.plans),
        sample=chosen.sample,
        accounts=sums.accounts,
        changed=sums.changed,
        events=sums.events,
        refused=sums.refused,
        meters=sums.meters(),
        plans=sums.plans(in_force),
        most_changed=sums.most_changed(),
        more=sums.changed > most_changed,
        unknown=UNKNOWN,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The question


def _require_choice(chosen: Chosen, most_changed: int) -> None:
    for field, number, most in (("sample", chosen.sample, None), ("top", most_changed, MAX_MOST_CHANGED)):
        if number is not None and (type(number) is not int or number < 1 or (most is not None and number > most)):
            allowed = "1 or more" if most is None else f"from 1 to {most}"
            raise ReportError(f"{field}: must be a whole number, {allowed} (got {number!r:.64})")
    if chosen.sample is not None and chosen.user_id is not None:
        raise ReportError("sample: not together with user, which is one account")


def _window(postgres: Postgres, since: datetime, until: datetime | None) -> Window:
    """Return the window. Raises ReportError unless it lies in the time of the ledger."""
    now = read_clock(postgres)
    for field, moment in (("since", since), ("until", until)):
        if moment is not None and moment.tzinfo is None:
            raise ReportError(f"{field}: must be a time with an offset (got {moment})")
        if moment is not None and moment > now:
            raise ReportError(f"{field}: must not be after now, {now.isoformat()} (got {moment.isoformat()})")
    window = Window(since, until or now)
    if window.since >= window.until:
        raise ReportError(f"since: must be before until, {window.until.isoformat()} (got {since.isoformat()})")
    begins = ledger_begins(postgres)
    if begins is None:
        raise ReportError("since: the ledger has no account yet")
    if window.until <= begins:
        raise ReportError(f"until: the ledger begins at {begins.isoformat()}, after the window")
    return window


def _timeline(resources: Resources, postgres: Postgres, window: Window) -> Timeline:
    """Return the catalogues in force in the window. Raises CatalogueError for one that this release cannot read."""
    versions = read_versions(postgres)
    if not versions:
        return Timeline.of(0, [(window.since, resources.own_catalogue)])
    first = max((place for place, each in enumerate(versions) if each.effective_from <= window.since), default=0)
    registered = [
        (
            each.effective_from,
            parse_with_settings(each.content, f"catalogue version {each.version}", resources.settings),
        )
        for each in versions[first:]
    ]
    return Timeline.of(versions[-1].version, registered)


def _require_answerable(
    postgres: Postgres, question: Question, timeline: Timeline, window: Window, user_id: str | None
) -> None:
    """Raise ReportError for an unknown account or plan, and for a plan or a meter that the catalogue to try lacks."""
    if user_id is not None and not existing_accounts(postgres, [user_id]):
        raise ReportError(f"user: no account {user_id[:128]}")
    needed = plans_needed(postgres, window, user_id)
    known = {plan for _, each in timeline.changes for plan in each.plans} | {need.name for need in needed}
    for old, new in question.plans.items():
        if old not in known:
            raise ReportError(f"plan-map: unknown plan {old!r:.64}; there are {', '.join(sorted(known))}")
        if new not in question.catalogue.plans:
            raise ReportError(
                f"plan-map: the catalogue has no plan {new!r:.64}; it has {', '.join(sorted(question.catalogue.plans))}"
            )
    lacking = [need for need in needed if need.name and question.plan(need.name) not in question.catalogue.plans]
    if lacking:
        raise ReportError(
            f"catalogue: lacks plan {_said(lacking, 'on')}; name one to try instead with --plan-map "
            f"{lacking[0].name}=PLAN"
        )
    gone = {meter for _, each in timeline.changes for meter in each.meters} - question.catalogue.meters.keys()
    unused = meters_needed(postgres, window, sorted(gone), user_id) if gone else []
    if unused:
        raise ReportError(f"catalogue: lacks meter {_said(unused, 'using')}; keep it, without an allowance if need be")


def _said(needs: Iterable[Need], how: str) -> str:
    return "; ".join(f"{need.name} ({counted(need.accounts, 'account')} of the window {how} it)" for need in needs)


# ---------------------------------------------------------------------------------------------------------------------
# The sums


class _Units:
    """Units by bucket on one meter: events, what was paid, and what would have been."""

    __slots__ = ("accounts", "events", "paid", "simulated")

    def __init__(self) -> None:
        self.accounts = self.events = 0
        self.paid, self.simulated = [0] * 5, [0] * 5

    def add(self, other: _Units) -> None:
        self.accounts += other.accounts
        self.events += other.events
        for own, more in ((self.paid, other.paid), (self.simulated, other.simulated)):
            for place, units in enumerate(more):
                own[place] += units

    @property
    def difference(self) -> int:
        """The units that another bucket pays; of an event that another meter pays, all of them."""
        moved = [after - before for before, after in zip(self.paid, self.simulated, strict=True)]
        return max(sum(units for units in moved if units > 0), -sum(units for units in moved if units < 0))


def _parts(units: list[int]) -> Parts:
    return Parts(**dict(zip(Parts.model_fields, units, strict=True)))


class _Sums:
    """The sums of a simulation by plan and meter, and the accounts that changed most."""

    def __init__(self, question: Question, most: int) -> None:
        self._question, self._most = question, most
        self._by_plan: dict[tuple[str, str], _Units] = {}
        self._by_meter: dict[str, _Units] = {}
        # The smallest difference is on top; a number tells equal ones apart.
        self._heap: list[tuple[int, int, str, dict[str, _Units]]] = []
        self._numbers = count(0, -1)
        self.accounts = self.changed = self.events = self.refused = 0

    def add(self, user_id: str, billed: Iterable[Billed]) -> None:
        """Add one account."""
        by_plan: dict[tuple[str, str], _Units] = {}
        for sign, plan, row, charged in billed:
            self.events += sign
            paid = by_plan.setdefault((plan, row.payer), _Units())
            paid.events += sign
            parts = (row.from_subscription, row.from_rollover, row.from_purchased, row.overflow_to_debt)
            for place, units in enumerate(parts):
                paid.paid[place] += sign * units
            if charged is None:
                self.refused += sign
                continue
            if charged.payer != row.payer:
                paid = by_plan.setdefault((plan, charged.payer), _Units())
                paid.events += sign
            for place, units in enumerate(charged.split):
                paid.simulated[place] += sign * units
        by_meter: dict[str, _Units] = {}
        for (plan, meter), of_plan in by_plan.items():
            of_plan.accounts = 1
            self._by_plan.setdefault((plan, meter), _Units()).add(of_plan)
            by_meter.setdefault(meter, _Units()).add(of_plan)
        for meter, of_meter in by_meter.items():
            of_meter.accounts = 1
            self._by_meter.setdefault(meter, _Units()).add(of_meter)
        self.accounts += 1
        self._keep(user_id, by_meter)

    def _keep(self, user_id: str, by_meter: dict[str, _Units]) -> None:
        """Keep an account that changed, if it is one of those that changed most."""
        difference = max((units.difference for units in by_meter.values()), default=0)
        if not difference:
            return
        self.changed += 1
        item = difference, next(self._numbers), user_id, by_meter
        if len(self._heap) < self._most:
            heappush(self._heap, item)
        elif item > self._heap[0]:
            heapreplace(self._heap, item)

    def add_uncollected(self, meter: str, events: int, amount: int) -> None:
        """Add events without an account: nobody paid them, and nobody would have."""
        units = _Units()
        units.events = events
        units.paid[-1] = units.simulated[-1] = amount
        self.events += events
        self._by_plan.setdefault(("", meter), _Units()).add(units)
        self._by_meter.setdefault(meter, _Units()).add(units)

    def meters(self) -> tuple[SimulatedMeter, ...]:
        """Return the sums by meter."""
        return tuple(_of_meter(meter, units) for meter, units in sorted(self._by_meter.items()))

    def plans(self, in_force: Catalogue) -> tuple[SimulatedPlan, ...]:
        """Return the sums by plan and meter."""
        found: dict[str, list[SimulatedMeter]] = {}
        for (plan, meter), units in sorted(self._by_plan.items()):
            found.setdefault(plan, []).append(_of_meter(meter, units))
        return tuple(
            SimulatedPlan(
                plan=plan,
                simulated_plan=self._question.plan(plan),
                price_month_cents=_price(in_force, plan),
                simulated_price_month_cents=_price(self._question.catalogue, self._question.plan(plan)),
                meters=tuple(meters),
            )
            for plan, meters in found.items()
        )

    def most_changed(self) -> tuple[SimulatedAccount, ...]:
        """Return the accounts that changed most, by meter; the greatest difference first."""
        return tuple(
            SimulatedAccount(
                user_id=user_id,
                meter=meter,
                events=units.events,
                paid=_parts(units.paid),
                simulated=_parts(units.simulated),
                difference=units.difference,
            )
            for _, _, user_id, by_meter in sorted(self._heap, reverse=True)
            for meter, units in sorted(by_meter.items())
            if units.difference
        )


def _of_meter(meter: str, units: _Units) -> SimulatedMeter:
    return SimulatedMeter(
        meter=meter,
        accounts=units.accounts,
        events=units.events,
        paid=_parts(units.paid),
        simulated=_parts(units.simulated),
    )


def _price(catalogue: Catalogue, plan: str) -> int | None:
    return catalogue.plans[plan].price_month_cents if plan in catalogue.plans else None
