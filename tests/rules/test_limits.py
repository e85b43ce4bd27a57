"""Limits per day, week and month: golden windows by hand, and a model that keeps a list of what was spent.

The model knows nothing of our code. It asks which date the wall clock of a zone shows, and adds up events.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.rules.limits import PERS, SETTERS, Limits, Per, Setter, Window, bounds, denying, with_plan

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


# ---------------------------------------------------------------------------------------------------------------------
# Limits, and what windows have used


def open_limits(amounts: dict[Setter, dict[Per, int]], moment: datetime = NOW, since: int = 7) -> Limits:
    return Limits(amounts).opened(moment, None, since)


def test_a_window_opens_once_and_again_after_its_end() -> None:
    limits = open_limits({"user": {"day": 100, "week": 500}})
    assert limits.windows["day"] == Window(at("2026-11-20T00:00Z"), at("2026-11-21T00:00Z"), 7)
    assert limits.next_window() == at("2026-11-21T00:00Z")
    spent = limits.spent(30)
    assert spent.opened(at("2026-11-20T23:59:59Z"), None, 9) == spent
    tomorrow = spent.opened(at("2026-11-21T00:00Z"), None, 9)
    assert tomorrow.windows == {
        "day": Window(at("2026-11-21T00:00Z"), at("2026-11-22T00:00Z"), 9), "week": spent.windows["week"],
    }  # fmt: skip
    assert Limits({"user": {"day": 1}}).next_window() < at("0001-01-02T00:00Z"), "never opened: it is due"


def test_a_reversal_gives_back_to_the_windows_that_counted_the_event() -> None:
    limits = open_limits({"user": {"day": 100, "week": 500}}).spent(30)  # since the change 7
    limits = limits.opened(NOW + DAY, None, 20).spent(5)
    assert [limits.given_back(5, seq).windows[per].used for seq in (8, 21) for per in ("day", "week")] == [5, 30, 0, 30]


def test_the_least_of_all_limits_counts_and_is_named() -> None:
    limits = open_limits({"plan": {"day": 300}, "operator": {"day": 200}, "user": {"day": 200, "month": 1_000}})
    names = [(each.per, each.set_by, each.amount) for each in limits.standings()]
    assert names == [
        ("day", "operator", 200), ("day", "user", 200), ("day", "plan", 300), ("month", "user", 1_000),
    ]  # fmt: skip
    limits = limits.spent(150)
    assert denying(limits.standings(), 50, 0) is None
    first = denying(limits.standings(), 51, 0)
    assert first is not None
    assert (first.per, first.set_by, first.left(0)) == ("day", "operator", 50)
    assert denying(limits.standings(), 50, 1) == first, "what is pending counts"
    later = denying(limits.standings(), 851, 0)
    assert later is not None
    assert later.per == "month", "before it ends, no window gives room"


def test_limits_of_others_stay_and_windows_without_one_close() -> None:
    limits = open_limits({"plan": {"day": 300, "week": 900}, "user": {"day": 200}}).spent(40)
    on_other_plan = with_plan(limits, {"month": 5})
    assert on_other_plan is not None
    assert on_other_plan.amounts == {"plan": {"month": 5}, "user": {"day": 200}}
    assert on_other_plan.windows == {"day": limits.windows["day"]}, "the month opens with its first event"
    alone = with_plan(limits, None)
    assert alone is not None
    assert alone.amounts == {"user": {"day": 200}}
    assert alone.with_amount("user", "day", None) is None
    assert with_plan(None, None) is None
    assert with_plan(None, {"day": 5}) == Limits({"plan": {"day": 5}})


amounts = st.dictionaries(st.sampled_from(SETTERS), st.dictionaries(st.sampled_from(PERS), st.integers(1, 500)))


@given(amounts.filter(lambda found: any(found.values())), st.integers(0, 300))
def test_limits_come_back_from_json(found: dict[Setter, dict[Per, int]], units: int) -> None:
    limits = open_limits(found).spent(units)
    assert Limits.from_json(limits.as_json()) == limits
    assert Limits.from_json({**limits.as_json(), "spent": 5}) == limits.spent(5)


class Spent(NamedTuple):
    """An event of the model: what it cost, when it came, and whether it was reversed."""

    seq: int
    at: datetime
    units: int
    reversed: bool = False


@given(
    found=amounts.filter(lambda found: any(found.values())),
    zone=st.sampled_from(ZONES),
    events=st.lists(st.tuples(st.integers(0, 40 * 3_600), st.integers(0, 200), st.booleans()), max_size=25),
    asked=st.tuples(st.integers(0, 400), st.integers(0, 100)),
)
def test_a_window_has_used_what_came_in_it_and_was_not_reversed(
    found: dict[Setter, dict[Per, int]],
    zone: str | None,
    events: list[tuple[int, int, bool]],
    asked: tuple[int, int],
) -> None:
    """Beside a list of events, summed up by the date on which each came."""
    wall = ZoneInfo(zone or "UTC")
    limits, moment, seq, log = Limits(found), NOW, 0, list[Spent]()
    for pause, units, is_reversed in events:
        moment += timedelta(seconds=pause)
        if limits.next_window() <= moment:
            seq += 1
            limits = limits.opened(moment, zone, seq)
        seq += 1
        limits = limits.spent(units)
        log.append(Spent(seq, moment, units))
        if is_reversed:
            at_random = (units + pause) % len(log)
            if not log[at_random].reversed:
                seq += 1
                limits = limits.given_back(log[at_random].units, log[at_random].seq)
                log[at_random] = log[at_random]._replace(reversed=True)
    limits = limits.opened(moment, zone, seq + 1)
    today = moment.astimezone(wall).date()

    def model(per: Per) -> int:
        same = [each for each in log if named(per, each.at.astimezone(wall).date()) == named(per, today)]
        return sum(each.units for each in same if not each.reversed)

    pers = {per for of_setter in found.values() for per in of_setter}
    assert {per: window.used for per, window in limits.windows.items()} == {per: model(per) for per in pers}
    units, pending = asked
    room = min(most - model(per) for of_setter in found.values() for per, most in of_setter.items())
    denied = denying(limits.standings(), units, pending)
    assert (denied is None) == (units <= max(0, room - pending))
    if denied is not None:
        assert found[denied.set_by][denied.per] == denied.amount
