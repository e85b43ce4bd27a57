"""Periods: the golden cases, calendars over ten years, catch-up in one step, and every change of terms. No servers."""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from config.catalogue import Allowance, Backend, Catalogue, Meter, Plan, Sponsorship, Trial
from tests.support.vectors import golden_cases
from worker.rules.account import Account, Balance, Change
from worker.rules.calendar import boundary, index_at
from worker.rules.lifecycle import (
    as_of,
    bring_all_up_to_date,
    bring_up_to_date,
    change_plan,
    change_status,
    end_of_period,
    open_account,
)
from worker.rules.periods import (
    Paid,
    Terms,
    next_period,
    open_balance,
    renewed,
    rolled_over,
    terms_of,
    under_plan,
    with_terms,
)
from worker.rules.waterfall import available

PERIODS = golden_cases("periods")
RENEWALS = golden_cases("renewal")

MICROSECOND = timedelta(microseconds=1)
DAY = timedelta(days=1)
START = datetime(2025, 1, 31, 9, 30, 15, tzinfo=UTC)
CALENDARS = ["monthly", "weekly", "daily"]

STICKY = Terms(100, True, 250, None, "daily", "sticky")
FLOATING = Terms(100, True, 0, None, "daily", "floating")
LIFETIME = Terms(500, False, 0, {"gemini": 100}, "lifetime", "sticky")


# Any microsecond of a century around now.
moments = st.integers(0, 100 * 365 * 86_400 * 10**6).map(
    lambda units: datetime(1990, 1, 1, tzinfo=UTC) + units * MICROSECOND
)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def opened(terms: Terms, start: datetime = START, end: datetime | None = None) -> Balance:
    """A first period under these terms, as an account that is opened on a plan gets it."""
    return open_balance(catalogue(plan={"voice": terms}), "plan", "voice", start, end)


def catalogue(**plans: dict[str, Terms]) -> Catalogue:
    """A catalogue of these plans, meters by name; the later a plan, the higher its tier."""
    spills = {meter: terms.spill for plan in plans.values() for meter, terms in plan.items()}
    return Catalogue(
        meters={meter: Meter(unit="units", spill=spill) for meter, spill in spills.items()},
        plans={
            code: Plan(name=code, tier=tier, meters={meter: allowance(terms) for meter, terms in meters.items()})
            for tier, (code, meters) in enumerate(plans.items())
        },
        sponsorship=Sponsorship(
            initial=0, paid_share_percent=0, daily_budget={"new": 0, "established": 0, "trusted": 0, "elite": 0}
        ),
        backends={"gemini": Backend(kind="hosted")},
    )


def allowance(terms: Terms) -> Allowance:
    named = terms._asdict()
    caps = {"backend": terms.caps} if terms.caps else {}
    names = {"allowance": "quantity", "cadence": "cadence", "anchor": "anchor", "rollover_cap": "rollover_cap"}
    return Allowance.model_validate({theirs: named[ours] for ours, theirs in names.items()} | {"caps": caps})


def account_on(found: Catalogue, plan: str = "plan", status: str = "active", start: datetime = START) -> Account:
    return open_account(found, "user-42", plan, status, start)


def holding(account: Account, meter: str = "voice", **values: Any) -> Account:
    """The account with other contents of one balance."""
    changed = account.balances[meter]._replace(**values)
    return account._replace(balances={**account.balances, meter: changed})


def contents(balance: Balance) -> tuple[int, int, int]:
    return balance.used, balance.rollover, balance.purchased


def bounds(balance: Balance) -> tuple[datetime, datetime | None]:
    return balance.period_start, balance.period_end


# ---------------------------------------------------------------------------------------------------------------------
# Golden cases


@pytest.mark.parametrize("case", PERIODS, ids=lambda case: f"{case['cadence']}-{case['anchor']}-{case['now']}")
def test_golden_period(case: dict[str, Any]) -> None:
    terms = Terms(100, True, 0, None, case["cadence"], "sticky")
    now = at(case["now"])
    account = account_on(catalogue(plan={"voice": terms}), start=at(case["anchor"]))
    current = as_of(catalogue(plan={"voice": terms}), account, now).balances["voice"]
    assert bounds(current) == (at(case["start"]), at(case["end"]))
    assert current.period_index == case["index"]
    assert index_at(at(case["anchor"]), case["cadence"], now) == case["index"]


@pytest.mark.parametrize("case", RENEWALS, ids=lambda case: "-".join(map(str, case.values())))
def test_golden_renewal(case: dict[str, Any]) -> None:
    terms = Terms(case["limit"], True, case["cap"], None, "subscription", "sticky")
    assert rolled_over(case["limit"], case["used"], case["rollover"], case["cap"]) == case["rollover_after"]
    before = opened(terms)._replace(used=case["used"], rollover=case["rollover"], purchased=7)
    after = renewed(before, terms, "active", START + 31 * DAY, START + 59 * DAY)
    assert contents(after) == (0, case["rollover_after"], 7)
    assert bounds(after) == (START + 31 * DAY, START + 59 * DAY)


@pytest.mark.parametrize("case", RENEWALS, ids=lambda case: "-".join(map(str, case.values())))
def test_golden_renewal_at_a_boundary_of_the_calendar(case: dict[str, Any]) -> None:
    terms = Terms(case["limit"], True, case["cap"], None, "monthly", "sticky")
    before = opened(terms)._replace(used=case["used"], rollover=case["rollover"], purchased=7)
    end = before.period_end
    assert end is not None
    crossed = next_period(before, terms, "active", end)
    assert crossed is not None
    assert contents(crossed[0]) == (0, case["rollover_after"], 7)


def test_there_are_golden_cases() -> None:
    assert {case["cadence"] for case in PERIODS} == set(CALENDARS)
    assert {case["limit"] is None for case in RENEWALS} == {True, False}


# ---------------------------------------------------------------------------------------------------------------------
# The calendar


def month_ends_and_ordinary_days() -> Iterator[datetime]:
    for day in (1, 15, 28, 29, 30, 31):
        for year, month in ((2023, 1), (2024, 1), (2023, 3), (2024, 12)):
            yield datetime(year, month, day, 23, 59, 59, 999_999, tzinfo=UTC)
    yield datetime(2024, 2, 29, 12, tzinfo=UTC)


@pytest.mark.parametrize("cadence", CALENDARS)
@pytest.mark.parametrize("anchor", list(month_ends_and_ordinary_days()), ids=lambda anchor: anchor.date().isoformat())
def test_ten_years_without_gap_or_overlap(cadence: str, anchor: datetime) -> None:
    """Crossing one boundary after the other, as an account does that is used all the time."""
    terms = Terms(1, True, 0, None, cadence, "sticky")
    balance = opened(terms, anchor)
    while balance.period_start < anchor + timedelta(days=3_653):
        end = balance.period_end
        assert end is not None
        assert end > balance.period_start
        assert end.time() == anchor.time()
        assert next_period(balance, terms, "active", end - MICROSECOND) is None
        assert index_at(anchor, cadence, end - MICROSECOND) == balance.period_index
        crossed = next_period(balance, terms, "active", end)
        assert crossed is not None
        after, skipped = crossed
        assert (after.period_start, after.period_index, skipped) == (end, balance.period_index + 1, 0)
        assert index_at(anchor, cadence, end) == after.period_index
        balance = after
    assert balance.anchored_at == anchor
    if cadence == "monthly":
        assert balance.period_index in (120, 121)


@given(moments, st.integers(0, 2_400))
def test_a_month_keeps_the_day_or_takes_the_last(anchor: datetime, index: int) -> None:
    found = boundary(anchor, "monthly", index)
    months = (found.year - anchor.year) * 12 + found.month - anchor.month
    assert months == index
    assert found.day == min(anchor.day, monthrange(found.year, found.month)[1])
    assert found.time() == anchor.time()
    assert boundary(anchor, "monthly", index + 1) > found


def test_a_leap_day_comes_back_every_fourth_year() -> None:
    anchor = datetime(2024, 2, 29, 6, tzinfo=UTC)
    assert [boundary(anchor, "monthly", 12 * year).day for year in range(5)] == [29, 28, 28, 28, 29]


def test_a_century_without_a_leap_day() -> None:
    assert boundary(datetime(2099, 12, 31, tzinfo=UTC), "monthly", 2) == datetime(2100, 2, 28, tzinfo=UTC)


# ---------------------------------------------------------------------------------------------------------------------
# Crossing boundaries


def test_a_boundary_is_due_at_its_microsecond_and_not_before() -> None:
    found = catalogue(plan={"voice": STICKY})
    account = holding(account_on(found), used=30)
    before, no_steps = bring_all_up_to_date(found, account, START + DAY - MICROSECOND)
    assert (before, no_steps) == (account, [])
    after, (step,) = bring_all_up_to_date(found, account, START + DAY)
    assert contents(after.balances["voice"]) == (0, 70, 0)
    assert bounds(after.balances["voice"]) == (START + DAY, START + 2 * DAY)
    assert (step.kind, step.key) == ("refill", f"refill:{(START + DAY).isoformat()}")
    assert step.detail["closed"] == {
        "plan": "plan", "skipped": 0, "period_start": START, "period_end": START + DAY, "allowance": 100, "used": 30,
        "rollover": 0, "cap_used": None,
    }  # fmt: skip


terms_strategy = st.builds(
    Terms,
    allowance=st.none() | st.integers(0, 300),
    spill=st.booleans(),
    rollover_cap=st.integers(0, 1_000),
    caps=st.none(),
    cadence=st.sampled_from(CALENDARS),
    anchor=st.just("sticky"),
    timezone=st.sampled_from([None, None, "America/New_York", "Australia/Lord_Howe"]),
)


@given(
    terms_strategy,
    terms_strategy,
    moments,
    st.integers(0, 400),
    st.integers(-1_500, 1_500),
    st.timedeltas(timedelta(0), timedelta(days=200)),
    st.sampled_from(["active", "trialing", "past_due", "canceled", "paused"]),
)
def test_catching_up_equals_crossing_one_boundary_at_a_time(
    first: Terms, later: Terms, start: datetime, used: int, rollover: int, dormant: timedelta, status: str
) -> None:
    """Also where the catalogue was edited meanwhile: the open period keeps its terms, the next ones have the new."""
    later = later._replace(spill=first.spill)
    now = start + dormant
    whole = single = opened(first, start)._replace(used=used, rollover=rollover, purchased=3)
    jumped = next_period(whole, later, status, now)
    crossings = 0
    while single.period_end is not None and single.period_end <= now:
        crossed = next_period(single, later, status, single.period_end)
        assert crossed is not None
        single, skipped = crossed
        assert skipped == 0
        crossings += 1
    assert (jumped is None) == (crossings == 0)
    if jumped is not None:
        assert jumped[0] == single
        assert jumped[1] == crossings - 1


@given(
    terms_strategy,
    moments,
    st.integers(0, 400),
    st.integers(-1_500, 1_500),
    st.none() | st.timedeltas(timedelta(0), timedelta(days=70)),
    st.timedeltas(timedelta(0), timedelta(days=90)),
    st.sampled_from([timedelta(0), timedelta(hours=24)]),
)
@example(STICKY, START, 0, 0, DAY + timedelta(minutes=30), 2 * DAY + timedelta(minutes=30), timedelta(hours=24))
def test_catching_up_in_paid_time_equals_crossing_one_boundary_at_a_time(
    terms: Terms,
    start: datetime,
    used: int,
    rollover: int,
    paid: timedelta | None,
    dormant: timedelta,
    grace: timedelta,
) -> None:
    """Also where invoices pay the calendar: only periods of paid time accrue, however they are crossed.

    A period that begins shortly before the paid time is over belongs to the next invoice.
    """
    now = start + dormant
    time = Paid(None if paid is None else start, None if paid is None else start + paid, grace)
    first = opened(terms, start)._replace(used=used, rollover=rollover, backing="none" if paid is None else "invoice")
    jumped, single, crossings = next_period(first, terms, "active", now, time), first, 0
    while single.period_end is not None and single.period_end <= now:
        crossed = next_period(single, terms, "active", single.period_end, time)
        assert crossed is not None
        single = crossed[0]
        crossings += 1
    assert (jumped is None) == (crossings == 0)
    assert jumped is None or jumped == (single, crossings - 1)


def test_the_cost_of_catching_up_does_not_grow_with_the_missed_periods() -> None:
    found = catalogue(plan={"voice": STICKY._replace(rollover_cap=10**12)})
    account = account_on(found, start=datetime(1, 1, 1, tzinfo=UTC))

    def cost(missed: int) -> float:
        now = account.balances["voice"].period_start + missed * DAY
        best = float("inf")
        for _ in range(20):
            began = perf_counter()
            for _ in range(20):
                bring_all_up_to_date(found, account, now)
            best = min(best, perf_counter() - began)
        assert bring_all_up_to_date(found, account, now)[0].balances["voice"].rollover == missed * 100
        return best

    assert cost(100_000) < 3 * cost(1)


@pytest.mark.parametrize("status", ["canceled", "expired", "paused", "unpaid"])
def test_time_not_entitled_accrues_nothing(status: str) -> None:
    found = catalogue(plan={"voice": STICKY})
    account = holding(account_on(found, status=status), rollover=20)
    after = as_of(found, account, START + 40 * DAY).balances["voice"]
    assert contents(after) == (0, 20, 0)
    assert bounds(after) == (START + 40 * DAY, START + 41 * DAY)


@pytest.mark.parametrize("status", ["canceled", "active"])
def test_nothing_pays_debt_while_not_entitled(status: str) -> None:
    found = catalogue(plan={"voice": STICKY})
    account = holding(account_on(found, status=status), rollover=-20)
    after = as_of(found, account, START + DAY).balances["voice"]
    assert after.rollover == (80 if status == "active" else -20)


def test_a_meter_that_does_not_spill_rolls_nothing_over() -> None:
    found = catalogue(plan={"relay": Terms(100, False, 50, None, "daily", "sticky")})
    account = holding(account_on(found), "relay", used=10)
    assert contents(as_of(found, account, START + 9 * DAY).balances["relay"]) == (0, 0, 0)


def test_sub_caps_start_again_with_the_period() -> None:
    capped = Terms(100, False, 0, {"gemini": 10}, "monthly", "sticky")
    found = catalogue(plan={"relay": capped})
    account = holding(account_on(found), "relay", used=10, cap_used={"gemini": 10})
    after = as_of(found, account, START + 31 * DAY).balances["relay"]
    assert (after.used, after.caps, after.cap_used or {}) == (0, {"gemini": 10}, {})


# ---------------------------------------------------------------------------------------------------------------------
# Floating, off, lifetime, subscription


def test_floating_is_refilled_on_use_only_and_the_next_period_starts_then() -> None:
    found = catalogue(plan={"voice": FLOATING, "text": STICKY})
    account = holding(account_on(found), used=60, purchased=5)
    used_at = START + 3 * DAY + timedelta(hours=5)
    others, _ = bring_up_to_date(found, account, used_at, ["text"])
    assert others.balances["voice"] == account.balances["voice"]
    eager, _ = bring_all_up_to_date(found, account, used_at)
    assert eager.balances["voice"] == account.balances["voice"]
    on_use, (step,) = bring_up_to_date(found, account, used_at, ["voice"])
    after = on_use.balances["voice"]
    assert contents(after) == (0, 0, 5)
    assert bounds(after) == (used_at, used_at + DAY)
    assert step.detail["closed"]["used"] == 60
    assert as_of(found, account, used_at).balances["voice"] == after


def test_floating_is_not_refilled_before_it_is_due() -> None:
    found = catalogue(plan={"voice": FLOATING})
    account = holding(account_on(found), used=60)
    assert as_of(found, account, START + DAY - MICROSECOND).balances["voice"].used == 60
    assert as_of(found, account, START + DAY).balances["voice"].used == 0


@given(st.integers(1, 1_000), st.integers(0, 100), st.integers(0, 50))
def test_floating_loses_leftovers_and_does_not_stack_what_it_missed(missed: int, used: int, rollover: int) -> None:
    found = catalogue(plan={"voice": FLOATING})
    account = holding(account_on(found), used=used, rollover=rollover)
    after = as_of(found, account, START + missed * DAY).balances["voice"]
    assert contents(after) == (0, rollover, 0)
    assert available(after.buckets("active"), 0) == 100 + rollover


def test_leftovers_of_a_floating_period_pay_debt_before_they_are_lost() -> None:
    """Closing a period is one formula; with a cap of 0, what is left pays debt and the rest is lost."""
    found = catalogue(plan={"voice": FLOATING})
    account = holding(account_on(found), used=20, rollover=-30)
    assert contents(as_of(found, account, START + 5 * DAY).balances["voice"]) == (0, 0, 0)
    deep = holding(account_on(found), used=20, rollover=-130)
    assert contents(as_of(found, deep, START + 5 * DAY).balances["voice"]) == (0, -50, 0)


def test_off_never_refills() -> None:
    found = catalogue(plan={"voice": Terms(100, True, 50, None, "off", "sticky")})
    account = holding(account_on(found), used=60)
    assert as_of(found, account, START + 4_000 * DAY) == account


def test_without_a_renewal_hours_of_grace_follow_and_then_the_limit_is_0() -> None:
    found = catalogue(plan={"voice": STICKY._replace(cadence="subscription")})
    over = START + 30 * DAY
    account = holding(open_account(found, "user-42", "plan", "active", START, over), used=60)
    assert as_of(found, account, over - MICROSECOND) == account
    graced = as_of(found, account, over).balances["voice"]
    assert (graced.backing, bounds(graced), contents(graced)) == ("grace", (over, over + DAY), (0, 40, 0))
    assert as_of(found, account, over + DAY - MICROSECOND).balances["voice"] == graced
    for late in (over + DAY, over + 300 * DAY):
        missing = as_of(found, account, late).balances["voice"]
        assert (missing.backing, bounds(missing), contents(missing)) == ("missing", (over, None), (0, 40, 0))
        assert missing.buckets("active").limit == 0


def test_without_hours_of_grace_the_period_stays_open_until_its_renewal() -> None:
    found = catalogue(plan={"voice": STICKY._replace(cadence="subscription")})
    found = Catalogue.model_validate(found.model_dump(), context=("", timedelta(0), ""))
    account = open_account(found, "user-42", "plan", "active", START, START + 30 * DAY)
    account = holding(account, used=60)
    assert as_of(found, account, START + 300 * DAY) == account


def test_lifetime_parks_and_resumes_with_its_sub_caps() -> None:
    found = catalogue(core={"relay": LIFETIME}, pro={"relay": LIFETIME._replace(allowance=900, cadence="monthly")})
    account = holding(account_on(found, "core"), "relay", used=120, cap_used={"gemini": 40})
    later = START + 10 * DAY
    pro = change_plan(found, account, "pro", later, [])
    assert (pro.balances["relay"].used, pro.balances["relay"].cap_used or {}) == (0, {})
    assert bounds(pro.balances["relay"]) == (later, boundary(later, "monthly", 1))
    pro = holding(pro, "relay", used=77, cap_used={"gemini": 7})
    pro = as_of(found, pro, later + 100 * DAY)
    back = change_plan(found, pro, "core", later + 100 * DAY, []).balances["relay"]
    assert (back.used, back.cap_used, back.period_start, back.period_end) == (120, {"gemini": 40}, START, None)
    assert back.parked is None


def test_lifetime_usage_survives_a_plan_without_the_meter() -> None:
    found = catalogue(core={"relay": LIFETIME}, free={"voice": STICKY})
    account = holding(account_on(found, "core"), "relay", used=120)
    away = change_plan(found, account, "free", START + DAY, [])
    assert available(away.balances["relay"].buckets("active"), 0) == 0
    back = change_plan(found, as_of(found, away, START + 90 * DAY), "core", START + 90 * DAY, [])
    assert back.balances["relay"].used == 120


# ---------------------------------------------------------------------------------------------------------------------
# Plan changes


@given(st.integers(0, 500), st.integers(-50, 500), st.none() | st.integers(0, 1_000), st.none() | st.integers(0, 1_000))
def test_a_change_now_keeps_bounds_used_and_rollover(
    used: int, rollover: int, before_allowance: int | None, after_allowance: int | None
) -> None:
    before, after = STICKY._replace(allowance=before_allowance), STICKY._replace(allowance=after_allowance)
    found = catalogue(basic={"voice": before}, plus={"voice": after})
    account = holding(account_on(found, "basic"), used=used, rollover=rollover, purchased=9)
    steps: list[Change] = []
    changed = change_plan(found, account, "plus", START + timedelta(hours=3), steps)
    balance = changed.balances["voice"]
    assert contents(balance) == (used, rollover, 9)
    assert bounds(balance) == (START, START + DAY)
    assert balance.allowance == after_allowance
    assert changed.highest_tier == 1
    assert [step.kind for step in steps] == ["change_plan"] * (2 if before != after else 1)


def test_a_change_now_keeps_the_open_period_of_the_provider_even_if_its_renewal_is_late() -> None:
    """Without a renewal the period stays open: the invoice that is late must still find it."""
    paid = Terms(100, True, 1_000, None, "subscription", "sticky")
    found = catalogue(basic={"voice": paid}, plus={"voice": paid._replace(allowance=300)})
    account = holding(open_account(found, "user-42", "basic", "active", START, START + 30 * DAY), used=40, rollover=8)
    for now in (START + 29 * DAY, START + 30 * DAY, START + 31 * DAY):
        balance = change_plan(found, account, "plus", now, []).balances["voice"]
        assert contents(balance) == (40, 8, 0)
        assert bounds(balance) == (START, START + 30 * DAY)
        assert balance.allowance == 300


def test_a_plan_opens_the_meters_that_the_account_lacks() -> None:
    """The provider's first period begins with the plan, not with the first use; so does a calendar's."""
    paid = Terms(100, True, 1_000, None, "subscription", "sticky")
    found = catalogue(free={"text": STICKY}, basic={"voice": paid, "tokens": STICKY})
    changed = change_plan(found, account_on(found, "free"), "basic", START + DAY, [], START + 31 * DAY)
    assert bounds(changed.balances["voice"]) == (START + DAY, START + 31 * DAY)
    assert bounds(changed.balances["tokens"]) == (START + DAY, START + 2 * DAY)
    assert end_of_period(changed) == START + 31 * DAY


def test_a_provider_s_period_that_is_yet_to_begin_becomes_the_first_of_the_calendar() -> None:
    before = opened(STICKY._replace(cadence="subscription"), START + 40 * DAY)
    after = with_terms(before, STICKY, START)
    assert (after.anchored_at, *bounds(after)) == (START + 40 * DAY, START + 40 * DAY, START + 41 * DAY)


@pytest.mark.parametrize("anchor", ["sticky", "floating"])
def test_a_floating_period_that_is_over_is_not_taken_along(anchor: str) -> None:
    """A check shows it refilled; the plan taken instead of a use must not take that away."""
    before = opened(FLOATING)._replace(used=90, rollover=-30)
    assert before.period_end is not None
    terms = Terms(500, True, 0, None, "monthly", anchor)
    after, closes = under_plan(before, terms, "active", before.period_end)
    assert (closes, *contents(after), after.allowance) == (True, 0, -20, 0, 500)  # what was left paid debt
    assert bounds(after) == (before.period_end, boundary(before.period_end, "monthly", 1))
    kept, closes = under_plan(before, terms, "active", before.period_end - MICROSECOND)
    assert (closes, kept.used, kept.period_start) == (False, 90, before.period_start)


def test_lifetime_to_periodic_anchors_at_that_moment_with_zero_used() -> None:
    for cadence in CALENDARS:
        found = catalogue(core={"voice": LIFETIME}, pro={"voice": LIFETIME._replace(cadence=cadence)})
        now = START + timedelta(days=17, microseconds=1)
        balance = change_plan(found, holding(account_on(found, "core"), used=50), "pro", now, []).balances["voice"]
        assert balance.used == 0
        assert (balance.anchored_at, balance.period_index) == (now, 0)
        assert bounds(balance) == (now, boundary(now, cadence, 1))


@pytest.mark.parametrize("end", [None, START + 30 * DAY])
def test_subscription_to_calendar_keeps_the_open_period_and_then_follows_the_calendar(end: datetime | None) -> None:
    paid = STICKY._replace(cadence="subscription")
    found = catalogue(paid={"voice": paid}, free={"voice": STICKY})
    account = holding(open_account(found, "user-42", "paid", "active", START, end), used=40, rollover=8)
    now = START + timedelta(days=10, hours=1)
    changed = change_plan(found, account, "free", now, [])
    balance = changed.balances["voice"]
    assert contents(balance) == (40, 8, 0)
    first = end or now + DAY
    assert bounds(balance) == (START, first)
    after = as_of(found, changed, first + 3 * DAY).balances["voice"]
    assert bounds(after) == (first + 3 * DAY, first + 4 * DAY)
    assert after.rollover == 250


def test_subscription_to_calendar_at_the_known_end_closes_the_period_under_its_own_terms() -> None:
    paid = Terms(1_000, True, 700, None, "subscription", "sticky")
    found = catalogue(paid={"voice": paid}, free={"voice": STICKY})
    end = START + 30 * DAY
    account = holding(open_account(found, "user-42", "paid", "active", START, end), used=400, rollover=-50)
    account = account._replace(next_plan="free", plan_change_at=end)
    assert as_of(found, account, end - MICROSECOND) == account
    moved = as_of(found, account, end).balances["voice"]
    assert contents(moved) == (0, 550, 0)
    assert (moved.allowance, *bounds(moved)) == (100, end, end + DAY)
    dormant = as_of(found, account, end + 7 * DAY).balances["voice"]
    assert contents(dormant) == (0, 550, 0)
    assert bounds(dormant) == (end + 7 * DAY, end + 8 * DAY)


def test_calendar_to_subscription_waits_for_the_provider() -> None:
    paid = STICKY._replace(allowance=900, cadence="subscription")
    found = catalogue(free={"voice": STICKY}, paid={"voice": paid})
    account = holding(account_on(found, "free"), used=40)
    changed = change_plan(found, account, "paid", START + timedelta(hours=1), [])
    assert contents(changed.balances["voice"]) == (40, 0, 0)
    assert bounds(changed.balances["voice"]) == (START, None)
    assert as_of(found, changed, START + 99 * DAY) == changed
    known = change_plan(found, account, "paid", START + timedelta(hours=1), [], START + 30 * DAY)
    assert bounds(known.balances["voice"]) == (START, START + 30 * DAY)


@pytest.mark.parametrize("cadence", CALENDARS)
def test_from_one_calendar_to_another_without_gap_or_overlap(cadence: str) -> None:
    for other in CALENDARS:
        found = catalogue(a={"voice": STICKY._replace(cadence=cadence)}, b={"voice": STICKY._replace(cadence=other)})
        account = account_on(found, "a")
        now = account.balances["voice"].period_start + timedelta(hours=1)
        end = account.balances["voice"].period_end
        assert end is not None
        changed = change_plan(found, account, "b", now, [])
        assert bounds(changed.balances["voice"]) == (START, end)
        after = as_of(found, changed, end).balances["voice"]
        assert bounds(after) == (end, boundary(START if cadence == other else end, other, 2 if cadence == other else 1))


def test_before_a_scheduled_change_each_period_closes_under_its_own_terms() -> None:
    found = catalogue(small={"voice": STICKY}, large={"voice": STICKY._replace(allowance=1_000, rollover_cap=10**6)})
    change_at = START + timedelta(days=2, hours=12)
    account = account_on(found, "small")._replace(next_plan="large", plan_change_at=change_at)
    late = as_of(found, account, START + 4 * DAY)
    # Two days small, up to the cap of 250; the third day's allowance is large when it closes, and so is the fourth's.
    assert contents(late.balances["voice"]) == (0, 200 + 2 * 1_000, 0)
    assert (late.plan, late.next_plan, late.plan_change_at) == ("large", None, None)


def test_a_scheduled_cancellation_stops_the_accrual_at_its_moment() -> None:
    found = catalogue(plan={"voice": STICKY._replace(rollover_cap=10**6)})
    account = account_on(found)._replace(next_status="canceled", status_change_at=START + 3 * DAY)
    late = as_of(found, account, START + 90 * DAY)
    assert (late.status, late.next_status, late.status_change_at) == ("canceled", None, None)
    assert contents(late.balances["voice"]) == (0, 300, 0)
    again = change_status(found, late, "active", START + 90 * DAY, [])
    assert as_of(found, again, START + 91 * DAY).balances["voice"].rollover == 400


@given(
    st.sampled_from(CALENDARS),
    st.integers(1, 60),
    st.integers(0, 60),
    st.lists(st.timedeltas(timedelta(0), timedelta(days=20)), max_size=6),
)
def test_what_is_due_is_the_same_however_often_it_is_applied(
    cadence: str, plan_days: int, status_days: int, pauses: list[timedelta]
) -> None:
    found = catalogue(
        small={"voice": STICKY._replace(cadence=cadence), "text": STICKY},
        large={"voice": STICKY._replace(allowance=777, cadence="weekly", rollover_cap=5_000), "text": FLOATING},
    )
    lazy = eager = account_on(found, "small")._replace(
        next_plan="large",
        plan_change_at=START + plan_days * DAY,
        next_status="canceled",
        status_change_at=START + status_days * DAY,
    )
    now = START
    for pause in pauses:
        now += pause
        eager, _ = bring_all_up_to_date(found, eager, now)
        twice, steps = bring_all_up_to_date(found, eager, now)
        assert (twice, steps) == (eager, [])
    assert bring_all_up_to_date(found, lazy, now)[0] == bring_all_up_to_date(found, eager, now)[0]


# ---------------------------------------------------------------------------------------------------------------------
# An edited catalogue


def test_an_edited_catalogue_touches_the_next_period_only() -> None:
    before, after = catalogue(plan={"voice": STICKY}), catalogue(plan={"voice": STICKY._replace(allowance=7)})
    account = holding(account_on(before), used=10, rollover=300)
    assert as_of(after, account, START + DAY - MICROSECOND).balances["voice"].allowance == 100
    moved = as_of(after, account, START + DAY).balances["voice"]
    assert (moved.allowance, moved.rollover) == (7, 300)
    paid = opened(STICKY._replace(cadence="subscription"))._replace(used=10)
    renewal = renewed(paid, STICKY._replace(cadence="subscription", allowance=7), "active", START + DAY, None)
    assert (renewal.allowance, renewal.rollover) == (7, 90)


def test_a_cap_that_was_lowered_takes_nothing_away() -> None:
    lowered = catalogue(plan={"voice": STICKY._replace(rollover_cap=10)})
    account = holding(account_on(catalogue(plan={"voice": STICKY})), rollover=200)
    after = as_of(lowered, account, START + 50 * DAY).balances["voice"]
    assert after.rollover == 250  # the open period still had the old cap; the later ones add nothing
    assert after.rollover_cap == 10


@pytest.mark.parametrize("later", ["floating", "off", "lifetime", "subscription", "weekly"])
def test_an_edited_cadence_begins_where_the_open_period_ends(later: str) -> None:
    edited = STICKY._replace(anchor="floating") if later == "floating" else STICKY._replace(cadence=later)
    found = catalogue(plan={"voice": edited})
    account = account_on(catalogue(plan={"voice": STICKY}))
    after = as_of(found, account, START + DAY).balances["voice"]
    assert (after.period_start, after.cadence, after.anchor) == (START + DAY, edited.cadence, edited.anchor)


def test_a_plan_that_became_floating_is_refilled_once_after_a_long_sleep() -> None:
    found = catalogue(plan={"voice": FLOATING})
    account = account_on(catalogue(plan={"voice": STICKY}))
    now = START + 30 * DAY
    once = as_of(found, account, now)
    assert as_of(found, once, now) == once
    assert bounds(once.balances["voice"]) == (now, now + DAY)


def test_a_plan_that_is_gone_keeps_its_terms() -> None:
    gone = catalogue(other={"voice": STICKY._replace(allowance=1)})
    account = account_on(catalogue(plan={"voice": STICKY}))
    after = as_of(gone, account, START + 10 * DAY).balances["voice"]
    assert (after.allowance, after.rollover, after.cadence) == (100, 250, "daily")
    assert bounds(after) == (START + 10 * DAY, START + 11 * DAY)


def test_a_meter_that_the_plan_gained_opens_with_its_first_use() -> None:
    found = catalogue(plan={"voice": STICKY, "text": STICKY})
    account = account_on(catalogue(plan={"voice": STICKY}))
    assert bounds(as_of(found, account, START + timedelta(hours=2)).balances["text"])[0] == START + timedelta(hours=2)


def test_a_meter_that_the_plan_lost_ends_with_its_period() -> None:
    found = catalogue(plan={"text": STICKY}, other={"voice": STICKY})
    account = holding(account_on(catalogue(plan={"voice": STICKY})), used=10, rollover=5, purchased=3)
    after = as_of(found, account, START + 9 * DAY).balances["voice"]
    assert available(after.buckets("active"), 0) == 95 + 3
    assert after.allowance == 0


# ---------------------------------------------------------------------------------------------------------------------
# Rank, trial


def test_the_highest_tier_counts_the_plan_that_is_left() -> None:
    """An account of an earlier release has no rank stored; what it leaves is known all the same."""
    found = catalogue(free={"voice": STICKY}, plus={"voice": STICKY})
    account = account_on(found, "plus")
    assert account.highest_tier == 1
    assert change_plan(found, account, "free", START, []).highest_tier == 1
    assert change_plan(found, account._replace(highest_tier=0), "free", START, []).highest_tier == 1


def test_a_trial_ends_by_itself() -> None:
    found = catalogue(plan={"voice": STICKY})
    plan = found.plans["plan"].model_copy(update={"trial_days": 7})
    found = found.model_copy(update={"plans": {"plan": plan}})
    trial = account_on(found, status="trialing")
    assert as_of(found, trial, START + 7 * DAY - MICROSECOND).status == "trialing"
    assert as_of(found, trial, START + 7 * DAY).status == "expired"
    assert account_on(found, status="active").status_change_at is None
    paying = change_status(found, trial, "active", START + DAY, [])
    assert as_of(found, paying, START + 99 * DAY).status == "active"


def test_terms_are_those_of_the_catalogue() -> None:
    found = catalogue(core={"relay": LIFETIME}, free={"voice": STICKY})
    assert terms_of(found, "core", "relay") == LIFETIME
    assert terms_of(found, "free", "relay") == Terms(0, False, 0, None, "off", "sticky")


@pytest.mark.parametrize("change", [lambda b: with_terms(b, LIFETIME, START), lambda b: with_terms(b, STICKY, START)])
def test_terms_that_stay_change_nothing(change: Callable[[Balance], Balance]) -> None:
    for terms in (LIFETIME, STICKY):
        balance = opened(terms)
        if change(balance)[1:7] == balance[1:7]:
            assert change(balance) == balance


def test_a_trial_keeps_its_own_allowance_through_boundaries_and_gives_way_to_the_plan() -> None:
    found = catalogue(plan={"voice": STICKY})
    trial = Trial(days=7, meters={"voice": allowance(STICKY._replace(allowance=10))})
    found = found.model_copy(
        update={"plans": {"plan": found.plans["plan"].model_copy(update={"trial": trial, "trial_days": 7})}}
    )
    account = account_on(found, status="trialing")
    for days in (0, 1, 3):
        assert as_of(found, account, START + days * DAY).balances["voice"].allowance == 10
    later = START + 3 * DAY
    current, _ = bring_all_up_to_date(found, holding(account, used=4), later)
    steps: list[Change] = []
    paying = change_status(found, current, "active", later, steps)
    assert [step.kind for step in steps] == ["set_status", "change_plan"]
    assert (paying.balances["voice"].allowance, paying.balances["voice"].used) == (100, 0)
    assert as_of(found, paying, later + DAY).balances["voice"].allowance == 100
