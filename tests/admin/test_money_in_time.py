"""What an account has in time: late events, invoices and webhooks in every order, trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count, permutations
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from config.settings import DEFAULT_CATALOGUE, Settings
from schemas.answers import Reason
from tests.support.ledger import rows, stop_clock
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import partition_of
from worker.admin import accounts, corrections, credits
from worker.admin.erasure import close_account, reopen
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.consumer.renewals import renew_due
from worker.errors import AccountError, KeyConflict, OrderUsed
from worker.reports.proof import verify_ledger
from worker.resources import Resources
from worker.rules.account import Balance, ChangeAnswer
from worker.rules.calendar import boundary
from worker.rules.credits import grants_on

USER, METER = "user-42", "premium_voice"
# Ahead of any real clock, so that entries of streams are as old as the test says.
START = datetime(2090, 11, 1, 10, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
END = START + 30 * DAY


class State(NamedTuple):
    """What matters of an account: what it has left, and until when."""

    plan: str
    status: str
    limit: int | None
    used: int
    rollover: int
    period_start: datetime
    period_end: datetime | None


class Life:
    """One account on real servers, and the time that it lives in."""

    def __init__(self, resources: Resources, billing: Billing) -> None:
        self.resources = resources
        self.billing = billing
        self.numbers = count()
        self.at(START)

    # -- Time and events

    def at(self, now: datetime) -> None:
        """Stop the clock at `now`, and forget cached balances: their time in Redis does not pass by itself."""
        stop_clock(self.resources.settings, now)
        self.resources.redis.delete(partition_of(self.resources.settings, USER).account(USER).balance)

    def send(self, amount: int) -> None:
        """Emit an event as a plain producer; it waits in the stream."""
        event = {"event_id": f"e{next(self.numbers)}", "user_id": USER, "meter": METER, "quantity": amount}
        stream = partition_of(self.resources.settings, USER).entries
        self.resources.redis.xadd(stream, {"v": "1", "e": json.dumps(event)})

    def settle(self) -> None:
        """Do what a worker does at once: apply and publish what waits."""
        drain_stream(self.resources, partition_of(self.resources.settings, USER))

    def spend(self, amount: int) -> None:
        self.send(amount)
        self.settle()

    # -- Calls

    def open(self, plan: str, **more: Any) -> ChangeAnswer:
        opened = ChangeAnswer(accounts.open_new(self.resources, USER, plan, **more))
        self.settle()
        return opened

    def renew(self, invoice: str, start: datetime, end: datetime) -> ChangeAnswer:
        return accounts.renew(self.resources, USER, invoice, start, end)

    def change_plan(self, plan: str, **more: Any) -> ChangeAnswer:
        return accounts.change_plan(self.resources, USER, plan, **more)

    def set_status(self, status: str, **more: Any) -> ChangeAnswer:
        return accounts.set_status(self.resources, USER, status, **more)

    def set_period(self, end: datetime, key: str) -> ChangeAnswer:
        return accounts.set_period(self.resources, USER, end, key)

    # -- What is there

    @property
    def voice(self) -> Balance:
        return accounts.show(self.resources, USER).balances[METER]

    @property
    def left(self) -> tuple[int, int]:
        """Units left of the allowance, and rollover."""
        found = self.state
        assert found.limit is not None
        return found.limit - found.used, found.rollover

    @property
    def state(self) -> State:
        account = accounts.show(self.resources, USER)
        voice = account.balances[METER]
        limit = voice.buckets(account.status).limit
        return State(
            account.plan, account.status, limit, voice.used, voice.rollover, voice.period_start, voice.period_end
        )

    @property
    def closed(self) -> list[tuple[int, datetime]]:
        """What closed periods used, and when they began."""
        found = rows(
            self.resources.settings,
            "SELECT detail->'closed'->'used', detail->'closed'->>'period_start' FROM ledger_entry "
            "WHERE user_id = %s AND meter = %s AND detail->'closed' IS NOT NULL "
            "AND kind <> 'change_plan' ORDER BY seq",
            USER, METER,
        )  # fmt: skip
        return [(int(str(used)), datetime.fromisoformat(str(start))) for used, start in found]


@pytest.fixture(params=[24])
def life(request: pytest.FixtureRequest, emptied_database_url: str, redis_url: str) -> Iterator[Life]:
    """An account to be opened; the parameter is METERFALL_RENEWAL_GRACE_HOURS. Whatever it did, the proof holds."""
    settings = settings_for(emptied_database_url, redis_url, renewal_grace_hours=request.param)
    with worker_resources(settings) as resources, Billing.connect(settings) as billing:
        lived = Life(resources, billing)
        yield lived
        lived.settle()
        assert verify_ledger(resources).differences == []


any_grace = pytest.mark.parametrize("life", [24, 0], indirect=True, ids=["24 h of grace", "no grace"])


# ---------------------------------------------------------------------------------------------------------------------
# Events that wait count in the month in which they came


def test_a_month_of_the_calendar_that_was_drained_late_left_its_allowance_to_the_next(life: Life) -> None:
    life.open("free")
    first_end = life.voice.period_end
    assert first_end is not None
    life.at(first_end - MINUTE)
    life.send(5_000)
    life.at(first_end + 2 * DAY)
    life.settle()
    assert life.left == (5_000, 0)
    renew_due(life.resources)
    assert life.closed == [(5_000, START)]
    assert rows(life.resources.settings, "SELECT period_start FROM usage_log") == [(START,)]


def test_a_paid_month_that_was_used_up_and_drained_late_rolls_nothing_over(life: Life) -> None:
    life.open("basic", end=END)
    life.at(END - MINUTE)
    life.send(100_000)
    life.at(END + 2 * DAY)
    life.settle()
    life.renew("in_2", END, END + 30 * DAY)
    assert life.left == (100_000, 0)
    assert life.closed[0] == (100_000, START)


MEANWHILE: dict[str, Callable[[Life], object]] = {
    "the job": lambda life: renew_due(life.resources),
    "a grant": lambda life: credits.grant(life.resources, USER, METER, 70, "order-1"),
    "a plan": lambda life: life.change_plan("plus"),
    "an invoice": lambda life: life.renew("in_2", END, END + 30 * DAY),
    "a status": lambda life: life.set_status("past_due"),
    "a correction": lambda life: accounts.set_trust(life.resources, USER, "trusted"),
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_nothing_that_comes_while_events_wait_closes_their_month_before_them(life: Life, meanwhile: str) -> None:
    life.open("basic", end=END)
    life.at(END - MINUTE)
    life.send(100_000)
    life.at(END + 23 * HOUR)
    MEANWHILE[meanwhile](life)
    assert life.closed == []
    life.settle()
    voice = life.voice
    assert (voice.used, voice.rollover, voice.purchased) == (0, 0, 70 if meanwhile == "a grant" else 0)
    assert life.left == (300_000 if meanwhile == "a plan" else 100_000, 0)
    renew_due(life.resources)
    assert life.closed[0] == (100_000, START)


@pytest.mark.parametrize("meanwhile", ["the job", "a grant", "a plan"])
def test_nor_a_month_of_the_calendar(life: Life, meanwhile: str) -> None:
    life.open("free")
    first_end = life.voice.period_end
    assert first_end is not None
    life.at(first_end - MINUTE)
    life.send(5_000)
    life.at(first_end + 23 * HOUR)
    MEANWHILE[meanwhile](life)
    life.settle()
    assert life.left == (300_000 if meanwhile == "a plan" else 5_000, 0)
    assert rows(life.resources.settings, "SELECT period_start FROM usage_log") == [(START,)]


def test_events_that_wait_for_more_than_a_day_hold_up_no_boundary(life: Life) -> None:
    life.open("free")
    first_end = life.voice.period_end
    assert first_end is not None
    life.at(first_end - MINUTE)
    life.send(5_000)
    life.at(first_end + DAY + MINUTE)
    assert renew_due(life.resources).accounts == 1
    life.settle()
    assert life.left == (0, 0)  # the open period takes them
    assert life.closed == [(0, START)]


# ---------------------------------------------------------------------------------------------------------------------
# Invoices


@pytest.mark.parametrize("age", [HOUR, 10 * DAY])
@pytest.mark.parametrize("knows_end", [True, False])
def test_from_the_free_plan_to_the_first_invoice_there_is_one_allowance(
    life: Life, age: timedelta, knows_end: bool
) -> None:
    life.open("free")
    life.spend(5_000)
    paid_at = START + age
    life.at(paid_at)
    life.change_plan("basic", period_end=paid_at + 30 * DAY if knows_end else None)
    life.settle()
    assert life.left == (95_000, 0)
    life.at(paid_at + MINUTE)
    life.renew("in_1", paid_at, paid_at + 30 * DAY)
    left, rollover = life.left
    assert left == (95_000 if age == HOUR else 100_000)
    assert rollover == 0
    life.at(paid_at + 30 * DAY)
    assert life.voice.rollover == left  # and what is left of it rolls over


def test_plans_and_invoices_in_turn_never_give_more_than_one_allowance(life: Life) -> None:
    life.open("plus", end=END)
    life.spend(200_000)
    life.at(END)
    assert life.voice.rollover == 100_000
    for turn in range(4):
        now = END + turn * HOUR
        life.at(now)
        life.renew(f"in_{turn}", now, now + 30 * DAY)
        life.settle()
        assert life.left <= (300_000, 100_000)
        life.spend(50_000)
        assert life.left == (250_000, 100_000)
        life.change_plan("basic")
        life.settle()
        assert life.left == (50_000, 100_000)
        life.at(now + MINUTE)
        life.change_plan("plus")
        life.settle()
        assert life.left == (250_000, 100_000)


def test_an_invoice_that_begins_in_five_days_waits_until_then(life: Life) -> None:
    life.open("basic", end=END)
    life.spend(40_000)
    life.at(END - 5 * DAY)
    answer = life.renew("in_2", END, END + 30 * DAY)
    assert (answer.waits_until, answer.stale, answer.repeated) == (END, False, False)
    assert [change.name for change in answer.account.waiting] == ["in_2"]
    life.settle()
    assert life.renew("in_2", END, END + 30 * DAY).repeated
    life.at(END - MINUTE)
    assert life.state == ("basic", "active", 100_000, 40_000, 0, START, END)
    life.at(END)
    assert life.state == ("basic", "active", 100_000, 0, 60_000, END, END + 30 * DAY)
    assert renew_due(life.resources).accounts == 1
    assert accounts.show(life.resources, USER).waiting == ()


def test_an_invoice_of_the_next_century_waits_and_later_ones_count(life: Life) -> None:
    life.open("basic", end=END)
    far = datetime(2126, 1, 1, tzinfo=UTC)
    assert life.renew("in_typo", far, far + 30 * DAY).waits_until == far
    life.settle()
    life.at(END)
    assert not life.renew("in_2", END, END + 30 * DAY).stale
    life.settle()
    assert life.state == ("basic", "active", 100_000, 0, 100_000, END, END + 30 * DAY)
    life.at(END + 30 * DAY)
    life.renew("in_3", END + 30 * DAY, END + 60 * DAY)
    life.settle()
    assert life.state == ("basic", "active", 100_000, 0, 200_000, END + 30 * DAY, END + 60 * DAY)
    assert [change.name for change in accounts.show(life.resources, USER).waiting] == ["in_typo"]


def test_an_invoice_with_other_dates_is_a_conflict_also_while_it_waits(life: Life) -> None:
    life.open("basic", end=END)
    life.renew("in_1", START, END)
    life.renew("in_2", END, END + 30 * DAY)
    for invoice in ("in_1", "in_2"):
        with pytest.raises(KeyConflict, match=rf"^invoice_id: {invoice} is of another period: 2090"):
            life.renew(invoice, START + DAY, END + DAY)


def test_an_invoice_that_comes_too_late_is_stale(life: Life) -> None:
    life.open("basic", start=START, end=END)
    life.renew("in_1", START, END)
    life.settle()
    before = life.state
    assert life.renew("in_0", START - 30 * DAY, START).stale
    assert life.renew("in_00", START, END).stale  # the period was paid by another
    assert life.state == before


# ---------------------------------------------------------------------------------------------------------------------
# Webhooks in either order


class Story(NamedTuple):
    """What was before, the webhooks that come in any order, and what is then."""

    before: Callable[[Life], object]
    webhooks: tuple[Callable[[Life], object], ...]
    after: State


def paid_month(life: Life, plan: str = "basic", used: int = 40_000) -> None:
    """A month that an invoice paid, from START to END."""
    life.open(plan, end=END)
    life.renew("in_1", START, END)
    life.settle()
    life.spend(used)


def on_trial(life: Life) -> None:
    life.open("basic", status="trialing", start=START, end=START + 7 * DAY)
    life.spend(10_000)


def trial_over(life: Life) -> None:
    on_trial(life)
    life.at(START + 7 * DAY + HOUR)


def tried_for_three_days(life: Life) -> None:
    on_trial(life)
    life.at(START + 3 * DAY)


def in_the_month(life: Life) -> None:
    paid_month(life)
    life.at(START + 10 * DAY)


def in_the_hour_after_basic(life: Life) -> None:
    paid_month(life)
    life.at(END + 30 * MINUTE)


def ten_days_on_the_free_plan(life: Life) -> None:
    life.open("free")
    life.spend(5_000)
    life.at(START + 10 * DAY)


def in_the_hour_after_plus(life: Life) -> None:
    paid_month(life, "plus")
    life.at(END + 30 * MINUTE)


def downgrade_is_scheduled(life: Life) -> None:
    paid_month(life, "plus")
    life.change_plan("basic", at="period_end")
    life.settle()
    life.at(END + 30 * MINUTE)


def canceled_and_gone_for_299_days(life: Life) -> None:
    paid_month(life)
    life.set_status("canceled", at="period_end")
    life.settle()
    life.at(END + 299 * DAY)


def canceled_at_once_and_gone_for_299_days(life: Life) -> None:
    paid_month(life)
    life.set_status("canceled")
    life.settle()
    life.at(END + 299 * DAY)


def unpaid_for_days(life: Life) -> None:
    paid_month(life)
    for status, moment in (("past_due", END + HOUR), ("unpaid", END + 3 * DAY)):
        life.at(moment)
        life.set_status(status)
        life.settle()
    life.at(END + 5 * DAY)


RETURN = END + 299 * DAY
STORIES = {
    "trial to paid, at its end": Story(
        trial_over,
        (
            lambda life: life.set_status("active"),
            lambda life: life.renew("in_1", START + 7 * DAY, START + 37 * DAY),
        ),
        State("basic", "active", 100_000, 0, 0, START + 7 * DAY, START + 37 * DAY),
    ),
    "trial to paid, before its end": Story(
        tried_for_three_days,
        (
            lambda life: life.set_status("active"),
            lambda life: life.renew("in_1", START + 3 * DAY, START + 33 * DAY),
        ),
        State("basic", "active", 100_000, 0, 0, START + 3 * DAY, START + 33 * DAY),
    ),
    "upgrade that begins a new period": Story(
        in_the_month,
        (
            lambda life: life.change_plan("plus"),
            lambda life: life.renew("in_2", START + 10 * DAY, START + 40 * DAY),
        ),
        State("plus", "active", 300_000, 0, 0, START + 10 * DAY, START + 40 * DAY),
    ),
    "upgrade at the end of the period": Story(
        in_the_hour_after_basic,
        (
            lambda life: life.change_plan("plus"),
            lambda life: life.renew("in_2", END, END + 30 * DAY),
        ),
        State("plus", "active", 300_000, 0, 60_000, END, END + 30 * DAY),
    ),
    "downgrade in the hour before the invoice": Story(
        in_the_hour_after_plus,
        (
            lambda life: life.change_plan("basic"),
            lambda life: life.renew("in_2", END, END + 30 * DAY),
        ),
        State("basic", "active", 100_000, 0, 260_000, END, END + 30 * DAY),
    ),
    "downgrade that was scheduled": Story(
        downgrade_is_scheduled,
        (
            lambda life: life.change_plan("basic"),
            lambda life: life.renew("in_2", END, END + 30 * DAY),
        ),
        State("basic", "active", 100_000, 0, 260_000, END, END + 30 * DAY),
    ),
    "return after a cancellation at period end": Story(
        canceled_and_gone_for_299_days,
        (
            lambda life: life.set_status("active"),
            lambda life: life.renew("in_9", RETURN - MINUTE, RETURN + 30 * DAY),
        ),
        State("basic", "active", 100_000, 0, 0, RETURN - MINUTE, RETURN + 30 * DAY),
    ),
    "return after a cancellation at once": Story(
        canceled_at_once_and_gone_for_299_days,
        (
            lambda life: life.set_status("active"),
            lambda life: life.renew("in_9", RETURN - MINUTE, RETURN + 30 * DAY),
        ),
        State("basic", "active", 100_000, 0, 0, RETURN - MINUTE, RETURN + 30 * DAY),
    ),
    "return on another plan": Story(
        canceled_and_gone_for_299_days,
        (
            lambda life: life.set_status("active"),
            lambda life: life.change_plan("plus"),
            lambda life: life.renew("in_9", RETURN - MINUTE, RETURN + 30 * DAY),
        ),
        State("plus", "active", 300_000, 0, 0, RETURN - MINUTE, RETURN + 30 * DAY),
    ),
    "payment after days unpaid": Story(
        unpaid_for_days,
        (
            lambda life: life.set_status("active"),
            lambda life: life.renew("in_2", END, END + 30 * DAY),
        ),
        State("basic", "active", 100_000, 0, 60_000, END, END + 30 * DAY),
    ),
    "first invoice of a checkout": Story(
        ten_days_on_the_free_plan,
        (
            lambda life: life.change_plan("basic", period_end=START + 40 * DAY),
            lambda life: try_renew(life, "in_1", START + 10 * DAY, START + 40 * DAY),
        ),
        State("basic", "active", 100_000, 0, 0, START + 10 * DAY, START + 40 * DAY),
    ),
}  # fmt: skip


def try_renew(life: Life, invoice: str, start: datetime, end: datetime) -> None:
    """Renew, as a provider does that sends a webhook again until it is taken."""
    try:
        life.renew(invoice, start, end)
    except AccountError:
        life.change_plan("basic", period_end=end)
        life.renew(invoice, start, end)


@any_grace
@pytest.mark.parametrize("worker", ["a worker runs", "no worker runs"])
@pytest.mark.parametrize(
    ("name", "order"),
    [(name, order) for name, story in STORIES.items() for order in permutations(range(len(story.webhooks)))],
)
def test_webhooks_end_alike_in_every_order(life: Life, worker: str, name: str, order: tuple[int, ...]) -> None:
    story = STORIES[name]
    story.before(life)
    for number in order:
        story.webhooks[number](life)
        if worker == "a worker runs":
            life.settle()
    assert life.state == story.after
    life.settle()
    assert life.state == story.after


def test_in_the_hour_before_the_invoice_checks_are_allowed_and_no_debt_arises(life: Life) -> None:
    paid_month(life, used=100_000)
    life.at(END + 30 * MINUTE)
    assert life.billing.check(USER, METER, 5_000).allowed
    life.spend(5_000)
    assert life.left == (95_000, 0)
    life.at(END + HOUR)
    life.renew("in_2", END, END + 30 * DAY)
    assert life.left == (95_000, 0)  # it counts in the period that the invoice pays
    assert life.voice.counted_from == END


@pytest.mark.parametrize("life", [0], indirect=True)
def test_without_hours_of_grace_that_hour_belongs_to_the_old_period(life: Life) -> None:
    paid_month(life, used=100_000)
    life.at(END + 30 * MINUTE)
    assert not life.billing.check(USER, METER, 5_000).allowed
    life.renew("in_2", END, END + 30 * DAY)
    life.settle()
    assert life.left == (100_000, 0)


def test_after_the_hours_of_grace_the_reason_is_that_the_renewal_is_missing(life: Life) -> None:
    paid_month(life, used=100_000)
    life.at(END + DAY - MINUTE)
    assert life.billing.check(USER, METER, 1).allowed
    life.at(END + DAY)
    answer = life.billing.check(USER, METER, 1)
    assert (answer.allowed, answer.reason) == (False, Reason.RENEWAL_MISSING)
    life.renew("in_2", END, END + 30 * DAY)
    life.settle()
    assert life.billing.check(USER, METER, 1).allowed
    assert life.state == ("basic", "active", 100_000, 0, 0, END, END + 30 * DAY)


# ---------------------------------------------------------------------------------------------------------------------
# Corrections of a period


def test_an_end_is_corrected_once_by_its_key(life: Life) -> None:
    life.open("basic", end=END)
    assert life.set_period(END + 5 * DAY, "fix-1").account.balances[METER].period_end == END + 5 * DAY
    life.settle()
    before = rows(life.resources.settings, "SELECT count(*) FROM ledger_entry")
    assert life.set_period(END + 5 * DAY, "fix-1").repeated
    assert rows(life.resources.settings, "SELECT count(*) FROM ledger_entry") == before
    with pytest.raises(KeyConflict, match=r"^key: fix-1 set the end 2090-12-06"):
        life.set_period(END + 6 * DAY, "fix-1")
    life.spend(40_000)
    life.at(END + 5 * DAY - MINUTE)
    assert life.left == (60_000, 0)
    life.at(END + 5 * DAY)
    assert life.left == (100_000, 60_000)


def test_a_first_period_gets_the_end_that_it_lacked(life: Life) -> None:
    life.open("basic")
    with pytest.raises(AccountError, match=r"^at: nobody knows when"):
        life.set_status("canceled", at="period_end")
    life.set_period(END, "fix-1")
    life.settle()
    assert life.state.period_end == END
    assert life.set_status("canceled", at="period_end").account.status_change_at == END


def test_the_end_of_a_trial_is_corrected(life: Life) -> None:
    on_trial(life)
    life.set_period(START + 10 * DAY, "longer")
    life.settle()
    life.at(START + 10 * DAY - MINUTE)
    assert life.state.status == "trialing"
    life.at(START + 10 * DAY)
    assert (life.state.status, life.state.limit) == ("expired", 0)


def test_an_end_that_is_over_closes_the_period(life: Life) -> None:
    paid_month(life)
    life.at(START + 20 * DAY)
    life.set_period(START + 20 * DAY - HOUR, "fix-1")
    life.settle()
    assert life.state == (
        "basic", "active", 100_000, 0, 60_000, START + 20 * DAY - HOUR, START + 21 * DAY - HOUR
    )  # fmt: skip
    for number, mistaken in enumerate((START, START + 20 * DAY - HOUR)):
        with pytest.raises(AccountError, match=r"^period_end: must be after period_start"):
            life.set_period(mistaken, f"mistake-{number}")


def test_a_correction_waits_behind_the_changes_that_wait_for_older_events(life: Life) -> None:
    paid_month(life)
    life.at(END + HOUR)
    life.send(10_000)  # no worker is there
    assert life.renew("in_2", END, END + 30 * DAY).waits_for_events
    corrected = life.set_period(END + 20 * DAY, "fix-1")
    assert corrected.waits_for_events
    assert corrected.account.balances[METER].period_end == END + 20 * DAY
    repeat = life.set_period(END + 20 * DAY, "fix-1")
    assert (repeat.repeated, repeat.waits_for_events) == (True, True)
    with pytest.raises(KeyConflict, match=r"^key: fix-1 set the end 2090-12-21"):
        life.set_period(END + 6 * DAY, "fix-1")
    life.settle()
    assert (life.state.period_start, life.state.period_end) == (END, END + 20 * DAY)
    repeat = life.set_period(END + 20 * DAY, "fix-1")
    assert (repeat.repeated, repeat.waits_for_events) == (True, False)
    with pytest.raises(KeyConflict, match=r"^key: fix-1 set the end 2090-12-21"):
        life.set_period(END + 6 * DAY, "fix-1")
    assert verify_ledger(life.resources).differences == []


def test_a_correction_of_the_period_is_refused_while_a_renewal_waits_before_it(life: Life) -> None:
    paid_month(life)
    who: Any = {"actor": "alice", "reason": "ticket 12"}
    corrections.adjust(life.resources, USER, METER, used=5, rollover=-9, key="early", **who)
    life.settle()
    life.at(END + HOUR)
    life.send(10_000)
    life.renew("in_2", END, END + 30 * DAY)
    before = life.state
    calls: tuple[Callable[[], object], ...] = (
        lambda: corrections.adjust(life.resources, USER, METER, used=7, key="k1", **who),
        lambda: corrections.adjust(life.resources, USER, METER, rollover=7, key="k2", **who),
        lambda: corrections.undo(life.resources, USER, "adjust:early", **who),
        lambda: corrections.forgive_debt(life.resources, USER, METER, key="k3", **who),
    )
    for call in calls:
        with pytest.raises(AccountError, match=r"^user_id: older events of .* wait, .*; call again when a worker has"):
            call()
    assert life.state == before
    corrections.adjust(life.resources, USER, METER, purchased=7, key="k4", **who)  # belongs to no period
    life.settle()
    used = life.state.used
    corrections.adjust(life.resources, USER, METER, used=7, key="k1", **who)
    life.settle()
    assert life.state.used == used + 7
    assert verify_ledger(life.resources).differences == []


def owe_after_a_refund(life: Life) -> None:
    """5,000 units of an order are spent, and their refund is a debt of the first month."""
    credits.claw_back(life.resources, USER, METER, 5_000, "early", order="order-2")


def bring_debt_along(life: Life) -> ChangeAnswer:
    """Another account owes 700 of its first month."""
    with suppress(AccountError):
        accounts.open_new(life.resources, "guest", "free", rollover={METER: -700})
        drain_stream(life.resources, partition_of(life.resources.settings, "guest"))
    return credits.carry_over(life.resources, "guest", USER, "merge", meter=METER, with_debt=True)


# What comes before in the first month, the change that moves debt in the third one, and the rollover after it.
NEW_DEBTS: dict[str, tuple[Callable[[Life], object], Callable[[Life], ChangeAnswer], int]] = {
    "a refund": (
        lambda _: None, lambda life: credits.claw_back(life.resources, USER, METER, 5_000, "re_1", order="order-1"),
        -5_000,
    ),
    "a grant that is undone": (
        lambda _: None, lambda life: corrections.undo(life.resources, USER, "grant:order-1"), -5_000
    ),
    "debt that comes along": (lambda _: None, bring_debt_along, -700),
    "a refund that is undone": (
        owe_after_a_refund, lambda life: corrections.undo(life.resources, USER, "clawback:early"), 5_000
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEW_DEBTS)
def test_debt_of_today_is_not_paid_by_a_month_that_is_over(life: Life, name: str) -> None:
    """An older entry waits, so the month before is still stored: what is left of it has nothing to do with today."""
    before, change, rollover = NEW_DEBTS[name]
    life.open("free")
    for order in ("order-1", "order-2"):
        credits.grant(life.resources, USER, METER, 5_000, order)
        life.settle()
    life.spend(15_000)
    before(life)
    life.settle()
    second, third = (boundary(START, "monthly", month) for month in (1, 2))
    life.at(second + DAY)
    renew_due(life.resources)
    life.at(third - MINUTE)
    life.send(0)
    life.at(third + HOUR)
    shown = life.state
    with pytest.raises(AccountError, match=r"^user_id: older events of user-42 wait, .*; call again when a worker has"):
        change(life)
    assert life.state == shown
    life.settle()
    change(life)
    life.settle()
    assert life.left == (5_000, rollover)


@pytest.mark.parametrize("order", list(permutations(range(2))))
@pytest.mark.parametrize(
    ("plan", "after"),
    [
        ("free", State("free", "active", 5_000, 0, 60_000, END, boundary(END, "monthly", 1))),
        ("plus", State("plus", "active", 300_000, 0, 60_000, END, END + 30 * DAY)),
    ],
)
def test_a_change_at_the_end_goes_by_the_open_period_though_an_invoice_waits_for_the_next(
    life: Life, plan: str, after: State, order: tuple[int, ...]
) -> None:
    """A plan that invoices renew comes with that invoice; another one at the end of the open period."""
    paid_month(life)
    life.at(END - 5 * DAY)
    webhooks: tuple[Callable[[], ChangeAnswer], ...] = (
        lambda: life.renew("in_2", END, END + 30 * DAY),
        lambda: life.change_plan(plan, at="period_end"),
    )
    for number in order:
        webhooks[number]()
        life.settle()
    assert life.state == ("basic", "active", 100_000, 40_000, 0, START, END)
    life.at(END)
    assert life.state == after
    life.at(END + HOUR)
    renew_due(life.resources)
    assert life.state == after
    assert accounts.show(life.resources, USER).waiting == ()


def test_another_time_zone_counts_from_the_next_period_though_events_wait_before_this_one(life: Life) -> None:
    life.open("free")
    second = boundary(START, "monthly", 1)
    life.at(second - MINUTE)
    life.send(0)
    life.at(second + HOUR)
    ends = life.voice.period_end
    with pytest.raises(AccountError, match=r"^user_id: older events of .* wait"):
        accounts.set_timezone(life.resources, USER, "America/New_York")
    life.settle()
    accounts.set_timezone(life.resources, USER, "America/New_York")
    assert life.voice.period_end == ends


def test_a_plan_of_the_calendar_has_no_end_to_correct(life: Life) -> None:
    life.open("free")
    with pytest.raises(AccountError, match=r"^plan: no meter of free has a period"):
        life.set_period(END, "fix-1")


# ---------------------------------------------------------------------------------------------------------------------
# Trials with allowances of their own


def trial_catalogue(path: Path, *, keeps: bool) -> Path:
    """The catalogue, with a trial of basic that lasts 14 days and grants 2,000."""
    text = DEFAULT_CATALOGUE.read_text(encoding="utf-8")
    basic = "trial = { days = 14, meters = { premium_voice = { quantity = 2_000, rollover_cap = 1_000_000 } } }\n"
    changed = text.replace("trial_days = 7\n", f"{basic}trial_rollover = {str(keeps).lower()}\n", 1)
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    return path


@pytest.mark.parametrize("first", ["status", "invoice"])
@pytest.mark.parametrize(("keeps", "rollover"), [(False, 0), (True, 1_500)])
def test_a_trial_has_allowances_of_its_own_and_its_rest_is_lost_unless_it_is_kept(
    settings: Settings, tmp_path: Path, keeps: bool, rollover: int, first: str
) -> None:
    own = settings.model_copy(update={"catalogue_path": trial_catalogue(tmp_path / "catalogue.toml", keeps=keeps)})
    with worker_resources(own) as resources, Billing.connect(own) as billing:
        life = Life(resources, billing)
        life.open("basic", status="trialing")
        ends = START + 14 * DAY
        assert life.state == ("basic", "trialing", 2_000, 0, 0, START, ends)
        life.spend(500)
        assert not life.billing.check(USER, METER, 1_501).allowed
        calls: list[Callable[[], object]] = [
            lambda: life.set_status("active"),
            lambda: life.renew("in_1", ends, ends + 30 * DAY),
        ]
        life.at(ends - MINUTE)
        for call in calls if first == "status" else reversed(calls):
            call()
            life.settle()
        life.at(ends)
        life.settle()
        assert life.state == ("basic", "active", 100_000, 0, rollover, ends, ends + 30 * DAY)
        assert verify_ledger(resources).differences == []


def test_the_end_of_the_period_is_that_of_an_invoice_that_waits_for_older_events(life: Life) -> None:
    life.open("basic", end=END)
    life.at(END + MINUTE)
    life.send(1_000)
    life.renew("in_17", END, END + 31 * DAY)
    life.change_plan("free", at="period_end")
    life.settle()
    renew_due(life.resources)
    account = accounts.show(life.resources, USER)
    assert life.voice.period_end == END + 31 * DAY
    assert (account.next_plan, account.plan_change_at) == ("free", END + 31 * DAY)


# ---------------------------------------------------------------------------------------------------------------------
# Credit that starts and ends, beside whatever else happens to the account

GIFT_ENDS, LATE_STARTS = START + 10 * DAY, START + 12 * DAY
# Done an hour after the end of a gift, while an older event may wait.
BESIDE_GRANTS: dict[str, Callable[[Life], object]] = {
    "nothing": lambda _: None,
    "a dearer plan": lambda life: life.change_plan("plus"),
    "a plan of the calendar": lambda life: life.change_plan("free"),
    "a plan without the meter": lambda life: life.change_plan("tenant"),
    "a plan at the end": lambda life: life.change_plan("free", at="period_end"),
    "an invoice that ends the period": lambda life: life.renew("in_2", GIFT_ENDS + HOUR, GIFT_ENDS + 30 * DAY),
    "another end": lambda life: life.set_period(START + 11 * DAY, "fix-1"),
    "an end that is over": lambda life: life.set_period(GIFT_ENDS, "fix-1"),
    "a cancellation": lambda life: life.set_status("canceled"),
    "a suspension": lambda life: life.set_status("suspended"),
    "a trial": lambda life: life.set_status("trialing"),
    "the job": lambda life: renew_due(life.resources),
    "a refund of the gift": lambda life: credits.claw_back(life.resources, USER, METER, 1_000, "re_1", order="gift"),
}


@pytest.mark.parametrize("waits", [True, False], ids=["an event waits", "no event waits"])
@pytest.mark.parametrize("name", BESIDE_GRANTS)
def test_credit_starts_and_ends_at_its_moments_whatever_else_happens(life: Life, name: str, waits: bool) -> None:
    life.open("basic", end=END)
    life.renew("in_1", START, END)
    life.settle()
    life.spend(100_000)
    for order, units, terms in (
        ("gift", 1_000, {"expires_at": GIFT_ENDS}), ("late", 500, {"effective_at": LATE_STARTS}), ("order-1", 300, {}),
    ):  # fmt: skip
        credits.grant(life.resources, USER, METER, units, order, **terms)  # type: ignore[arg-type]
        life.settle()
    life.at(GIFT_ENDS - MINUTE)
    life.send(200)
    if not waits:
        life.settle()
    life.at(GIFT_ENDS + HOUR)
    BESIDE_GRANTS[name](life)
    life.settle()
    is_refunded = name == "a refund of the gift"  # 200 of it are spent: they come from the other order
    assert grants_of(life) == {"order-1": 100 if is_refunded else 300, "late": 500}
    life.at(LATE_STARTS - MINUTE)
    before = life.voice.purchased
    life.at(LATE_STARTS)
    assert life.voice.purchased == before + 500
    renew_due(life.resources)
    told = "SELECT entry_key, purchased_change FROM ledger_entry WHERE kind = 'expire' OR entry_key LIKE 'start:%%'"
    expired = [] if is_refunded and waits else [("expire:gift", -800)]  # the refund has taken them
    assert rows(life.resources.settings, f"{told} ORDER BY seq") == [*expired, ("start:late", 500)]
    assert verify_ledger(life.resources).differences == []


def grants_of(life: Life) -> dict[str, int]:
    """What is left of each order, by the ledger."""
    return {grant.key: grant.left for part in grants_on(life.voice) for grant in part}


@pytest.mark.parametrize("stored", [True, False], ids=["its end is stored", "its end is due"])
def test_credit_that_ended_before_a_closing_is_gone_for_the_account_that_begins_anew(life: Life, stored: bool) -> None:
    life.open("free")
    for order, terms in (("gift", {"expires_at": GIFT_ENDS}), ("late", {"effective_at": LATE_STARTS})):
        credits.grant(life.resources, USER, METER, 1_000, order, **terms)  # type: ignore[arg-type]
        life.settle()
    life.at(GIFT_ENDS + HOUR)
    if stored:
        renew_due(life.resources)
    with pytest.raises(AccountError, match=r"^forfeit: closing user-42 loses 1000 to come of premium_voice; say so"):
        close_account(life.resources, USER)
    close_account(life.resources, USER, forfeit=True)
    life.settle()
    reopen(life.resources, USER, "free")
    life.settle()
    for moment in (LATE_STARTS - MINUTE, LATE_STARTS + DAY):
        life.at(moment)
        renew_due(life.resources)
        assert (life.voice.purchased, grants_of(life), life.left) == (0, {}, (5_000, 0))
    for order in ("gift", "late"):
        with pytest.raises(AccountError, match=rf"^order: {order} gave user-42 nothing"):
            credits.claw_back(life.resources, USER, METER, 1, "re_1", order=order)
        with pytest.raises(OrderUsed):
            credits.grant(life.resources, USER, METER, 1_000, order)
    assert verify_ledger(life.resources).differences == []
