"""The demo's last act: periods of a few accounts end before the viewer's eyes, without moving any clock.

Their period began just long enough ago to end in a moment. They use most of the allowance while it is open. Then the
calendar, or an invoice of the payment provider, closes it: unused allowance pays debt first, the rest rolls over up to
the cap, and the next period begins. The catalogue says which plans can show this.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import NamedTuple

from config.catalogue import Catalogue
from worker.admin import accounts
from worker.client import Billing
from worker.demo.stage import Stage, Tally, Workers, wait_until_drained
from worker.ledger.connection import batch_connection, read_clock
from worker.ledger.reports import ClosedPeriod, closed_periods
from worker.rules.calendar import CALENDAR_CADENCES, boundary

# Long enough for workers to apply the events before it.
_ENDS_IN = timedelta(seconds=2)
_POLL_SECONDS = 0.02


class Part(NamedTuple):
    """The role of an account: of `meter` it brings `rollover` along (debt below zero) and uses `used`.

    `cadence` names the end of the period: the calendar's, or an invoice (`subscription`).
    """

    name: str
    plan: str
    meter: str
    cadence: str
    rollover: int
    used: int


def close_periods(on: Stage, workers: Workers, prefix: str, tally: Tally) -> list[ClosedPeriod]:
    """Open an account per part, use it, close its period; return the closed periods.

    `tally` notes the events.
    Raises RehearsalError if workers do not get through.
    """
    parts = {f"{prefix}{part.name}": part for part in _parts(on.resources.catalogue)}
    with batch_connection(on.resources.engine) as postgres:
        now = read_clock(postgres)
        # In whole milliseconds, as Redis counts: an event right after the end is none before it.
        end = now - timedelta(microseconds=now.microsecond % 1_000) + _ENDS_IN
    for user_id, part in parts.items():
        start, rollover = first_start(part.cadence, end), {part.meter: part.rollover} if part.rollover else None
        accounts.open_new(on.resources, user_id, part.plan, start=start, end=end, rollover=rollover)
    with Billing.connect(on.resources.settings) as billing:
        for user_id, part in parts.items():
            tally.take(billing.emit(user_id, part.meter, part.used, event_id="before", source="demo"))
        wait_until_drained(on, workers)
        wait_until(on, end)
        for user_id, part in parts.items():
            if part.cadence == "subscription":
                accounts.renew(on.resources, user_id, f"invoice-2-{user_id}", end, boundary(end, "monthly", 1))
            tally.take(billing.emit(user_id, part.meter, 1, event_id="after", source="demo"))
        wait_until_drained(on, workers)
    with batch_connection(on.resources.engine) as postgres:
        closed = closed_periods(postgres, prefix)
    return [period for period in closed if period.user_id in parts and period.meter == parts[period.user_id].meter]


def _parts(catalogue: Catalogue) -> list[Part]:
    """Return one part for each rule that a plan of the catalogue can show."""
    parts: dict[str, Part] = {}
    for code, plan in catalogue.plans.items():
        for meter, granted in plan.meters.items():
            if not plan.active or not granted.quantity or not catalogue.spills[meter]:
                continue
            tenth = granted.quantity // 10
            if granted.cadence == "subscription" and granted.rollover_cap > granted.quantity:
                shown = {"saved": 0, "debt": -tenth, "cap": granted.rollover_cap - tenth}
            elif granted.cadence in CALENDAR_CADENCES:
                shown = {"credits": 0} if granted.anchor == "floating" else {granted.cadence: -tenth}
            else:
                continue
            for name, rollover in shown.items():
                parts.setdefault(name, Part(name, code, meter, granted.cadence, rollover, 6 * tenth))
    return list(parts.values())


def first_start(cadence: str, end: datetime) -> datetime:
    """Return the start of a first period such that a period ends at `end`.

    That is one step of the calendar before. If the month before has no such day, it is two steps: then the first period
    has ended already, and the second ends at `end`.
    """
    cadence = cadence if cadence in CALENDAR_CADENCES else "monthly"
    starts = [boundary(end, cadence, -steps) for steps in (1, 2)]
    return next(start for steps, start in enumerate(starts, start=1) if boundary(start, cadence, steps) == end)


def wait_until(on: Stage, moment: datetime) -> None:
    """Wait until the ledger's clock reaches `moment`."""
    with batch_connection(on.resources.engine) as postgres:
        while read_clock(postgres) < moment:
            time.sleep(_POLL_SECONDS)
