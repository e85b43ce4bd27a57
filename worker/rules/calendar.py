"""Boundaries of periods by the calendar. Pure."""

from __future__ import annotations

from calendar import monthrange
from datetime import datetime, timedelta

_STEPS = {"weekly": timedelta(days=7), "daily": timedelta(days=1)}


CALENDAR_CADENCES = frozenset({"monthly", *_STEPS})


_SHORTEST_MONTH = 28


def boundary(anchor: datetime, cadence: str, index: int) -> datetime:
    """The boundary `index` steps behind `anchor`, at its time of day; a month too short ends on its last day."""
    if cadence != "monthly":
        return anchor + index * _STEPS[cadence]
    year, month = divmod(anchor.year * 12 + anchor.month - 1 + index, 12)
    day = anchor.day if anchor.day <= _SHORTEST_MONTH else min(anchor.day, monthrange(year, month + 1)[1])
    return anchor.replace(year=year, month=month + 1, day=day)


def index_at(anchor: datetime, cadence: str, now: datetime) -> int:
    """Index of the last boundary at or before `now`. Its cost does not depend on how far away that is."""
    if cadence != "monthly":
        return (now - anchor) // _STEPS[cadence]
    index = (now.year - anchor.year) * 12 + now.month - anchor.month
    return index if boundary(anchor, cadence, index) <= now else index - 1
