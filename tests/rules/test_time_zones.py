"""Calendars in a time zone: golden cases of both changes of the clock, and every boundary found again. No servers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.rules.calendar import boundary, index_at

NEW_YORK = "America/New_York"
INSTANT = timedelta(microseconds=1)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


# In 2026 the clock of New York goes from 02:00 to 03:00 on 8 March, and from 02:00 back to 01:00 on 1 November.
GOLDEN = {
    "midnight, into summer": ("2026-03-07T05:00Z", "daily", ["2026-03-08T05:00Z", "2026-03-09T04:00Z"]),
    "midnight, into winter": ("2026-10-31T04:00Z", "daily", ["2026-11-01T04:00Z", "2026-11-02T05:00Z"]),
    "the hour that does not exist": (
        "2026-03-07T07:30Z", "daily", ["2026-03-08T07:30Z", "2026-03-09T06:30Z"],  # 02:30, 03:30, 02:30
    ),
    "the hour that happens twice": (
        "2026-10-31T05:30Z", "daily", ["2026-11-01T05:30Z", "2026-11-02T06:30Z"],  # its first time, then an hour later
    ),
    "from its second time": ("2026-11-01T06:30Z", "daily", ["2026-11-02T06:30Z", "2026-11-03T06:30Z"]),
    "months": ("2026-02-28T05:00Z", "monthly", ["2026-03-28T04:00Z", "2026-04-28T04:00Z"]),
    "the last day of a month": ("2026-01-31T05:00Z", "monthly", ["2026-02-28T05:00Z", "2026-03-31T04:00Z"]),
    "weeks": ("2026-03-01T05:00Z", "weekly", ["2026-03-08T05:00Z", "2026-03-15T04:00Z"]),
    # In New York it is still the day before: the anniversary is that of the 31st.
    "a day of its own": ("2026-02-01T03:00Z", "monthly", ["2026-03-01T03:00Z", "2026-04-01T02:00Z"]),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN)
def test_golden_boundaries(case: tuple[str, str, list[str]]) -> None:
    anchor, cadence, following = at(case[0]), case[1], [at(text) for text in case[2]]
    assert [boundary(anchor, cadence, index, NEW_YORK) for index in range(3)] == [anchor, *following]
    for index, moment in enumerate(following, start=1):
        assert index_at(anchor, cadence, moment, NEW_YORK) == index
        assert index_at(anchor, cadence, moment - INSTANT, NEW_YORK) == index - 1


@given(
    st.integers(0, 40 * 365 * 86_400).map(
        lambda seconds: datetime(2000, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    ),
    st.sampled_from(["monthly", "weekly", "daily"]),
    st.sampled_from([NEW_YORK, "Europe/Berlin", "Australia/Lord_Howe", "Asia/Kathmandu", "Pacific/Apia"]),
    st.integers(0, 400),
)
def test_boundaries_ascend_and_each_is_found_again(anchor: datetime, cadence: str, zone: str, index: int) -> None:
    moments = [boundary(anchor, cadence, step, zone) for step in range(index, index + 4)]
    assert all(earlier < later for earlier, later in pairwise(moments))
    assert all(moment.tzinfo is UTC for moment in moments)
    for step, moment in enumerate(moments, start=index):
        assert index_at(anchor, cadence, moment, zone) == step
        assert index_at(anchor, cadence, moment - INSTANT, zone) == step - 1
    assert boundary(anchor, cadence, 0, zone) == anchor


def test_the_time_of_day_is_that_of_the_wall() -> None:
    anchor = datetime(2026, 1, 15, 9, 30, tzinfo=ZoneInfo("Europe/Berlin")).astimezone(UTC)
    days = [boundary(anchor, "daily", day, "Europe/Berlin").astimezone(ZoneInfo("Europe/Berlin")) for day in range(365)]
    assert {(day.hour, day.minute) for day in days} == {(9, 30)}
