"""Plans whose calendar invoices pay, and calendars in a time zone: on real servers, with the ledger's clock moved."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from config.settings import DEFAULT_CATALOGUE
from schemas.answers import Reason
from tests.admin.test_money_in_time import DAY, HOUR, METER, MINUTE, START, USER, Life
from tests.support.ledger import execute
from tests.support.resources import settings_for, worker_resources
from worker.admin import accounts
from worker.client import Billing
from worker.consumer.renewals import renew_due
from worker.errors import AccountError
from worker.reports.proof import verify_ledger
from worker.rules import lifecycle
from worker.rules.calendar import boundary

YEARLY = """
[plans.yearly]
name = "Basic, by the year"
tier = 1
paid_by_invoice = true
meters.premium_voice = { quantity = 100_000, cadence = "monthly", rollover_cap = 1_000_000 }

[plans.by_day]
name = "Ten a day"
tier = 1
paid_by_invoice = true
meters.premium_voice = { quantity = 10, cadence = "daily", rollover_cap = 1_000 }

[plans.by_week]
name = "Ten a week"
tier = 1
paid_by_invoice = true
meters.premium_voice = { quantity = 10, cadence = "weekly", rollover_cap = 1_000 }

[plans.endless]
name = "Endless"
tier = 2
meters.premium_voice = { cadence = "subscription", rollover_cap = 1_000 }

[plans.new_york]
name = "Free, in New York"
tier = 0
timezone = "America/New_York"
meters.premium_voice = { quantity = 5_000, cadence = "daily" }
"""
YEAR_END = START.replace(year=START.year + 1)


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    path = tmp_path / "catalogue.toml"
    path.write_text(DEFAULT_CATALOGUE.read_text(encoding="utf-8") + YEARLY, encoding="utf-8")
    return path


@pytest.fixture
def life(emptied_database_url: str, redis_url: str, catalogue: Path) -> Iterator[Life]:
    settings = settings_for(emptied_database_url, redis_url, catalogue_path=catalogue)
    with worker_resources(settings) as resources, Billing.connect(settings) as billing:
        lived = Life(resources, billing)
        yield lived
        lived.settle()
        assert verify_ledger(resources).differences == []


def months_of(life: Life, until: datetime) -> list[tuple[datetime, int | None, int]]:
    """Each month's start, limit and units used, with a use of 60,000 a day after its start."""
    found: list[tuple[datetime, int | None, int]] = []
    for month in range(24):
        start = boundary(START, "monthly", month)
        if start >= until:
            return found
        life.at(start + DAY + HOUR)
        life.spend(60_000)
        found.append((life.voice.period_start, life.state.limit, life.voice.used))
    raise AssertionError


def test_a_yearly_invoice_refills_twelve_months_and_none_after(life: Life) -> None:
    life.open("yearly")
    life.renew("in_1", START, YEAR_END)
    months = months_of(life, YEAR_END)
    assert months == [(boundary(START, "monthly", month), 100_000, 60_000) for month in range(12)]
    before = life.voice.rollover
    assert before == 11 * 40_000
    life.at(YEAR_END + HOUR)
    assert life.left == (100_000, before + 40_000), "in the hours of grace"
    life.at(YEAR_END + 2 * DAY)
    assert life.state.limit == 0
    for month in range(1, 4):
        life.at(boundary(YEAR_END, "monthly", month) + HOUR)
        renew_due(life.resources)
        assert (life.state.limit, life.voice.rollover) == (0, before + 40_000), "unpaid time saves nothing"


def test_a_late_invoice_goes_on_with_the_calendar_and_what_was_used(life: Life) -> None:
    life.open("yearly", end=YEAR_END)
    life.at(YEAR_END + HOUR)
    life.spend(7_000)
    life.at(YEAR_END + 5 * DAY)
    answer = life.billing.check(USER, METER, 10_000_000)
    assert (answer.allowed, answer.reason) == (False, Reason.RENEWAL_MISSING)
    life.renew("in_2", YEAR_END, YEAR_END.replace(year=YEAR_END.year + 1))
    assert (life.voice.used, life.state.limit, life.voice.period_start) == (7_000, 100_000, YEAR_END)
    life.at(boundary(YEAR_END, "monthly", 1))
    assert (life.voice.used, life.state.limit) == (0, 100_000)


def test_without_an_invoice_there_is_one_allowance(life: Life) -> None:
    life.open("yearly")
    life.spend(100_000)
    life.at(START + 33 * DAY)
    assert (life.state.limit, life.left) == (0, (0, 0))
    answer = life.billing.check(USER, METER, 1)
    assert (answer.allowed, answer.reason) == (False, Reason.RENEWAL_MISSING)


def test_a_young_unpaid_month_is_adopted_with_what_it_used(life: Life) -> None:
    life.open("yearly")
    life.spend(2_000)
    life.at(START + 2 * HOUR)
    life.renew("in_1", START + HOUR, YEAR_END + HOUR)
    voice = life.voice
    assert (voice.period_start, voice.used, voice.backing) == (START + HOUR, 2_000, "invoice")
    assert voice.period_end == boundary(START + HOUR, "monthly", 1)


@pytest.mark.parametrize("plan_first", [True, False])
def test_from_free_to_yearly_in_either_order(life: Life, plan_first: bool) -> None:
    life.open("free")
    life.spend(3_000)
    bought = START + 10 * DAY
    life.at(bought)
    if plan_first:
        life.change_plan("yearly", period_end=bought.replace(year=bought.year + 1))
        life.settle()
        life.renew("in_1", bought, bought.replace(year=bought.year + 1))
    else:
        with pytest.raises(AccountError, match=r"^plan: no meter of free is renewed by invoices$"):
            life.renew("in_1", bought, bought.replace(year=bought.year + 1))
        life.change_plan("yearly")
        life.settle()
        life.renew("in_1", bought, bought.replace(year=bought.year + 1))
    assert (life.state.limit, life.voice.used, life.voice.rollover) == (100_000, 0, 0)
    life.at(bought + 40 * DAY)
    assert life.left == (100_000, 100_000)


@pytest.mark.parametrize("plan", ["free", "basic", "endless", "core"])
def test_a_checkout_names_bounds_on_every_plan_and_its_invoice_pays_them(life: Life, plan: str) -> None:
    life.open(plan)
    bought = START + 40 * DAY
    life.at(bought)
    year = bought.replace(year=bought.year + 1)
    life.change_plan("yearly", period_end=year)
    life.settle()
    named = life.voice
    life.renew("in_1", bought, year)
    assert (named.backing, life.voice.backing) == ("bounds", "invoice")


def test_what_a_checkout_named_is_tried_out_in_a_trial_until_it_is_paid(life: Life) -> None:
    life.open("free")
    life.change_plan("yearly", period_end=YEAR_END)
    life.set_status("trialing")
    assert life.voice.backing == "trial"


def behind_the_plan_change(life: Life) -> None:
    """Put it on ten a day within a month that an invoice paid; the paid time is corrected to be over at START."""
    life.open("basic")
    life.renew("in_1", START - 10 * DAY, START + 20 * DAY)
    life.change_plan("by_day")
    life.set_period(START, "evt_1")
    life.settle()
    assert (life.voice.period_start, life.voice.period_end) == (START - 10 * DAY, START + 20 * DAY)
    life.at(START + 9 * DAY)
    assert (life.voice.backing, life.state.limit) == ("missing", 0)


@pytest.mark.parametrize("offset", [timedelta(0), 7 * HOUR], ids=["at the time of day of the calendar", "at another"])
def test_an_invoice_within_a_period_older_than_its_calendar_is_worth_its_days_at_once(
    life: Life, offset: timedelta
) -> None:
    behind_the_plan_change(life)
    start = START + 8 * DAY + offset
    life.renew("in_2", start, start + 30 * DAY)
    life.at(start + DAY + HOUR)
    assert (life.voice.period_start, life.voice.backing, life.left) == (start + DAY, "invoice", (10, 10))


@pytest.mark.parametrize("offset", [timedelta(0), 7 * HOUR], ids=["at the time of day of the calendar", "at another"])
def test_an_invoice_from_before_the_first_day_of_a_calendar_pays_the_days_up_to_it(
    life: Life, offset: timedelta
) -> None:
    behind_the_plan_change(life)
    life.at(START + 20 * DAY + HOUR)
    assert life.voice.period_index == 0
    start = START + 17 * DAY - offset
    life.renew("in_2", start, start + 30 * DAY)
    assert life.left == (10, 30)


def test_an_invoice_of_a_period_older_than_its_calendar_leaves_what_was_used(life: Life) -> None:
    life.open("by_day", end=START + DAY)
    life.at(START + DAY + 10 * HOUR)
    life.spend(7)
    life.change_plan("by_week")
    assert life.voice.anchored_at > life.voice.period_start == START + DAY
    life.renew("in_2", START + DAY, START + 31 * DAY)
    assert (life.voice.used, life.voice.backing, life.left) == (7, "invoice", (3, 10))


def test_an_invoice_that_a_release_before_took_for_a_boundary_of_the_past_stays_proved(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind_the_plan_change(life)
    with monkeypatch.context() as patched:
        patched.setattr(lifecycle, "calendar_meeting_of", lambda *_: "continues")
        life.renew("in_2", START + 8 * DAY, START + 38 * DAY)
        life.settle()
    assert verify_ledger(life.resources).differences != []
    execute(
        life.resources.settings,
        "ALTER TABLE ledger_entry DISABLE TRIGGER USER; "
        "UPDATE ledger_entry SET detail = detail - 'grid' WHERE kind = 'renewal'; "
        "ALTER TABLE ledger_entry ENABLE TRIGGER USER",
    )
    assert verify_ledger(life.resources).differences == []


@pytest.mark.parametrize("daily", [True, False], ids=["the job runs each day", "nothing stores a boundary"])
def test_a_day_that_begins_shortly_before_the_paid_time_is_over_saves_nothing(life: Life, daily: bool) -> None:
    """It belongs to the next invoice, which never comes: not a day that nobody paid rolls over."""
    life.open("by_day", end=START + DAY + HOUR / 2)
    for days in range(1, 4):
        life.at(START + days * DAY)
        if daily:
            renew_due(life.resources)
    assert (life.state.limit, life.voice.rollover) == (0, 10)
    renew_due(life.resources)
    assert (life.state.limit, life.voice.rollover) == (0, 10)


def test_what_a_release_before_saved_of_such_a_day_stays_proved(life: Life) -> None:
    life.open("by_day", end=START + DAY + HOUR / 2)
    life.at(START + 2 * DAY + HOUR)
    renew_due(life.resources)
    assert life.voice.rollover == 10
    earlier = "UPDATE ledger_entry SET rollover_change = 20, rollover_after = 20, detail = detail"
    for added, differences in (("", True), ("- 'accrues'", False)):
        execute(
            life.resources.settings,
            "ALTER TABLE ledger_entry DISABLE TRIGGER USER; "
            f"{earlier} {added} WHERE kind = 'refill'; "
            "UPDATE ledger_entry SET rollover_after = 20 WHERE kind = 'missing'; "
            "ALTER TABLE ledger_entry ENABLE TRIGGER USER; "
            f"UPDATE balance SET rollover = 20 WHERE meter = '{METER}'",
        )
        assert bool(verify_ledger(life.resources).differences) == differences


def test_a_cancellation_ends_with_the_paid_year(life: Life) -> None:
    life.open("yearly", end=YEAR_END)
    assert life.set_status("canceled", at="period_end").account.status_change_at == YEAR_END
    life.at(YEAR_END + DAY)
    assert life.state.limit == 0


# ---------------------------------------------------------------------------------------------------------------------
# Time zones


def local(month: int, day: int, hour: int, minute: int = 0, year: int = 2090) -> datetime:
    return datetime(year, month, day, hour, minute, tzinfo=UTC)


def test_a_day_begins_at_local_midnight_through_both_changes_of_the_clock(life: Life) -> None:
    """The clock of New York goes back on 5 November 2090, and forward on 11 March 2091."""
    midnights = [
        [local(11, 4, 4), local(11, 5, 4), local(11, 6, 5), local(11, 7, 5)],
        [local(3, day, hour, year=2091) for day, hour in ((10, 5), (11, 5), (12, 4), (13, 4))],
    ]
    life.open("new_york", start=local(11, 3, 4))
    for days in midnights:
        life.at(days[0])
        for begun, next_one in pairwise(days):
            life.spend(4_000)
            life.at(next_one - MINUTE)
            assert (life.voice.period_start, life.voice.period_end, life.left) == (begun, next_one, (1_000, 0))
            life.at(next_one)
            assert (life.voice.period_start, life.left) == (next_one, (5_000, 0))


def test_an_account_has_a_time_zone_of_its_own_and_takes_another_with_its_next_period(life: Life) -> None:
    life.open("free", start=local(11, 1, 0), timezone="Europe/Berlin")
    end = life.voice.period_end
    assert end == datetime(2090, 11, 30, 23, tzinfo=UTC) + timedelta(hours=1), "midnight there is 23:00 UTC, from 1:00"
    accounts.set_timezone(life.resources, USER, "Asia/Tokyo")
    assert accounts.set_timezone(life.resources, USER, "Asia/Tokyo").repeated
    assert life.voice.period_end == end
    life.at(end + DAY)
    assert life.voice.period_start == end
    with pytest.raises(AccountError, match=r"^timezone: unknown time zone 'Mars/Base'; must be an IANA name"):
        accounts.set_timezone(life.resources, USER, "Mars/Base")
