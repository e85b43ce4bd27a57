"""The waterfall of a meter as bars: used of the limit, rollover or debt, purchased units by grant, what is pending.

All bars of a meter have one scale, so that their lengths compare. Lengths are hundredths of the widest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from schemas.overviews import UsageReport
from schemas.reports import GrantedCredit, MeterUsage
from worker.rules.words import counted

_KINDS_OF_GRANTS = ("grant-a", "grant-b")


class Part(NamedTuple):
    """A part of a bar: where it begins, how long it is, its class in the style sheet, and what it says."""

    x: float
    width: float
    kind: str
    text: str


class Bar(NamedTuple):
    """One bar: its name, what it says, and its parts from the left to the right."""

    name: str
    text: str
    parts: tuple[Part, ...]


def waterfall(meter: MeterUsage, grants: Sequence[GrantedCredit]) -> tuple[Bar, ...]:
    """Return the bars of a meter in the order in which its buckets pay. `grants` are those of this meter."""
    pending = meter.pending or 0
    widest = max(meter.limit or 0, meter.used, abs(meter.rollover), meter.purchased, pending, 1)

    def bar(name: str, text: str, *pieces: tuple[int, str, str]) -> Bar:
        parts, x = [], 0.0
        for amount, kind, told in pieces:
            width = 100 * amount / widest
            if amount > 0:
                parts.append(Part(round(x, 3), round(width, 3), kind, told))
            x += max(0.0, width)
        return Bar(name, text, tuple(parts))

    if meter.limit is None:
        allowance = bar("allowance", f"{meter.used:,} used, unlimited", (meter.used, "used", f"{meter.used:,} used"))
    else:
        within, left = min(meter.used, meter.limit), max(0, meter.limit - meter.used)
        allowance = bar(
            "allowance",
            f"{meter.used:,} used of {meter.limit:,}",
            (within, "used", f"{within:,} used"),
            (left, "left", f"{left:,} left"),
            (meter.used - within, "over", f"{meter.used - within:,} over the limit"),
        )
    if meter.rollover < 0:
        saved = bar("debt", f"{-meter.rollover:,} owed", (-meter.rollover, "debt", f"{-meter.rollover:,} owed"))
    else:
        saved = bar("rollover", f"{meter.rollover:,}", (meter.rollover, "rollover", f"{meter.rollover:,} rolled over"))
    given = [each for each in grants if each.state == "in_force" and each.left > 0]
    pieces = [
        (each.left, _KINDS_OF_GRANTS[number % 2], f"{each.left:,} of {each.order or 'no order'}")
        for number, each in enumerate(given)
    ]
    others = meter.purchased - sum(each.left for each in given)
    purchased = bar(
        "purchased", f"{meter.purchased:,}", *pieces, (others, _KINDS_OF_GRANTS[len(given) % 2], f"{others:,} others")
    )
    waiting = "not known: Redis does not answer" if meter.pending is None else f"{pending:,}"
    return allowance, saved, purchased, bar("pending", waiting, (pending, "pending", f"{pending:,} pending"))


class Column(NamedTuple):
    """One day of a chart: where it stands and how high it is, out of 100 of each, and what it says."""

    x: float
    width: float
    height: float
    text: str


class Chart(NamedTuple):
    """Usage of one meter by day; the highest column is `most` units high."""

    meter: str
    most: int
    total: int
    columns: tuple[Column, ...]


def charts(report: UsageReport) -> tuple[Chart, ...]:
    """Return a chart for each meter of a report by day. Days without usage have no column."""
    days = (report.until - report.since).days
    found = []
    for meter in sorted({each.meter for each in report.rows}):
        figures = [each for each in report.rows if each.meter == meter and each.day is not None]
        most = max((each.amount for each in figures), default=0)
        columns = tuple(
            Column(
                round(100 * (each.day - report.since).days / days, 3),
                round(90 / days, 3),
                round(100 * each.amount / most, 3) if most else 0.0,
                f"{each.day}: {each.amount:,} in {counted(each.events, 'event')}",
            )
            for each in figures
            if each.day is not None
        )
        found.append(Chart(meter, most, sum(each.amount for each in figures), columns))
    return tuple(found)
