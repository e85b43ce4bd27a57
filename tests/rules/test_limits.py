"""Limits per day, week and month: golden windows by hand, and a model that keeps a list of what was spent.

The model knows nothing of our code. It asks the wall clock of the zone, second by second of a table of offsets, and
adds up events.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.rules.limits import PERS, Per, bounds

DAY = timedelta(days=1)
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
NEW_YORK = "America/New_York"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


# ---------------------------------------------------------------------------------------------------------------------
# Windows

# In 2026 the clock of New York goes from 02:00 to 03:00 on 8 March, and from 02:00 back to 01:00 on 1 November. That of
# Beirut goes from 00:00 to 01:00 on 29 March, so that day has no midnight; that of Havana from 01:00 back to 00:00 on
# 1 November, so that day has two.
GOLDEN: dict[str, tuple[str | None, Per, str, str, str]] = {
    "a day": (None, "day", "2026-11-20T12:00Z", "2026-11-20T00:00Z", "2026-11-21T00:00Z"),
    "its first moment": (None, "day", "2026-11-20T00:00Z", "2026-11-20T00:00Z", "2026-11-21T00:00Z"),
    "its last one": (None, "day", "2026-11-20T23:59:59.999999Z", "2026-11-20T00:00Z", "2026-11-21T00:00Z"),
    "a week begins on Monday": (None, "week", "2026-11-22T23:00Z", "2026-11-16T00:00Z", "2026-11-23T00:00Z"),
    "and ends with Sunday": (None, "week", "2026-11-23T00:00Z", "2026-11-23T00:00Z", "2026-11-30T00:00Z"),
    "a month": (None, "month", "2026-02-28T23:00Z", "2026-02-01T00:00Z", "2026-03-01T00:00Z"),
    "a leap year": (None, "month", "2028-02-29T23:00Z", "2028-02-01T00:00Z", "2028-03-01T00:00Z"),
    "before the year 2001": (None, "month", "1999-12-31T23:00Z", "1999-12-01T00:00Z", "2000-01-01T00:00Z"),
    "23 hours": (NEW_YORK, "day", "2026-03-08T12:00Z", "2026-03-08T05:00Z", "2026-03-09T04:00Z"),
    "25 hours": (NEW_YORK, "day", "2026-11-01T12:00Z", "2026-11-01T04:00Z", "2026-11-02T05:00Z"),
    "a week of 167 hours": (NEW_YORK, "week", "2026-03-05T12:00Z", "2026-03-02T05:00Z", "2026-03-09T04:00Z"),
    "a month with a change": (NEW_YORK, "month", "2026-11-20T12:00Z", "2026-11-01T04:00Z", "2026-12-01T05:00Z"),
    "still the day before": (NEW_YORK, "day", "2026-11-20T03:00Z", "2026-11-19T05:00Z", "2026-11-20T05:00Z"),
    "a day without midnight": ("Asia/Beirut", "day", "2026-03-29T12:00Z", "2026-03-28T22:00Z", "2026-03-29T21:00Z"),
    "a day with two": ("America/Havana", "day", "2026-11-01T12:00Z", "2026-11-01T04:00Z", "2026-11-02T05:00Z"),
    "far east": ("Pacific/Kiritimati", "month", "2026-10-31T10:00Z", "2026-10-31T10:00Z", "2026-11-30T10:00Z"),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN)
def test_golden_windows(case: tuple[str | None, Per, str, str, str]) -> None:
    zone, per, moment, starts, ends = case
    assert bounds(per, at(moment), zone) == (at(starts), at(ends))


ZONES = [None, NEW_YORK, "Europe/Berlin", "Australia/Lord_Howe", "Asia/Kathmandu", "Asia/Beirut", "America/Havana"]
moments = st.integers(0, 40 * 365 * 86_400).map(
    lambda seconds: datetime(2000, 1, 1, tzinfo=UTC) + timedelta(0, seconds)
)


def named(per: Per, day: date) -> tuple[int, ...]:
    """What people call the window that a day is in."""
    if per == "day":
        return day.year, day.month, day.day
    return day.isocalendar()[:2] if per == "week" else (day.year, day.month)


@given(moments, st.sampled_from(PERS), st.sampled_from(ZONES))
def test_a_window_has_the_moments_whose_date_is_in_it(moment: datetime, per: Per, zone: str | None) -> None:
    starts, ends = bounds(per, moment, zone)
    instant, wall = timedelta(microseconds=1), ZoneInfo(zone or "UTC")
    assert starts <= moment < ends
    name = named(per, moment.astimezone(wall).date())
    for inside in (starts, ends - instant):
        assert named(per, inside.astimezone(wall).date()) == name
        assert bounds(per, inside, zone) == (starts, ends)
    assert named(per, ends.astimezone(wall).date()) != name
    assert bounds(per, ends, zone)[0] == ends
    assert bounds(per, starts - instant, zone)[1] == starts
