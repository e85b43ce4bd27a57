"""Boundaries of periods by the calendar, in UTC or in a time zone. Pure.

A boundary keeps the local time of day of its anchor through both changes of the clock. In the hour that happens twice
it is the first one, unless the anchor is in the second; in the hour that does not exist it is as long after the last
second before it. What is stored is the instant, in UTC.
"""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo

_STEPS = {"weekly": timedelta(days=7), "daily": timedelta(days=1)}


CALENDAR_CADENCES = frozenset({"monthly", *_STEPS})


_SHORTEST_MONTH = 28


def boundary(anchor: datetime, cadence: str, index: int, timezone: str | None = None) -> datetime:
    """Return the boundary `index` steps after `anchor`, at its time of day in `timezone` (an IANA name; None: UTC).

    In a month that is too short it falls on the last day.
    """
    if timezone is not None:
        # Arithmetic on a time with a zone is that of the clock on the wall.
        local = anchor.astimezone(_zone(timezone))
        return _steps_after(local, cadence, index).replace(fold=local.fold).astimezone(UTC)
    return _steps_after(anchor, cadence, index)


def _steps_after(anchor: datetime, cadence: str, index: int) -> datetime:
    if cadence != "monthly":
        return anchor + index * _STEPS[cadence]
    year, month = divmod(anchor.year * 12 + anchor.month - 1 + index, 12)
    day = anchor.day if anchor.day <= _SHORTEST_MONTH else min(anchor.day, monthrange(year, month + 1)[1])
    return anchor.replace(year=year, month=month + 1, day=day)


def index_at(anchor: datetime, cadence: str, now: datetime, timezone: str | None = None) -> int:
    """Return the index of the last boundary at or before `now`.

    The cost does not grow with the distance.
    """
    zone = UTC if timezone is None else _zone(timezone)
    begun, at = anchor.astimezone(zone), now.astimezone(zone)
    if cadence != "monthly":
        index = (at.replace(tzinfo=None) - begun.replace(tzinfo=None)) // _STEPS[cadence]
    else:
        index = (at.year - begun.year) * 12 + at.month - begun.month
    # A change of the clock between the two may hide the last boundary, or show the next one.
    while boundary(anchor, cadence, index, timezone) > now:
        index -= 1
    while timezone is not None and boundary(anchor, cadence, index + 1, timezone) <= now:
        index += 1
    return index


@cache
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)
