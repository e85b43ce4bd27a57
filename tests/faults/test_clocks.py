"""Scenario 26: wrong clocks, and terms that change inside a batch. The rule under the server's lock decides."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from schemas.events import UsageEvent
from tests.faults.house import METER, SLOW_SECONDS, House, thaw
from tests.support.ledger import give_account, move_clock, rows
from tests.support.waiting import wait_until
from worker.admin import accounts
from worker.resources import Resources

# A full batch, and one more that follows.
FIRST, SECOND = 10, 10
HOUR = timedelta(hours=1)
PATIENT = {"idle_in_transaction_timeout_ms": 30_000, "lock_timeout_ms": 20_000, "statement_timeout_ms": 25_000}


@pytest.mark.scenario(number=26)
def test_a_producer_an_hour_off_is_billed_by_the_clock_of_the_ledger_and_in_order(house: House) -> None:
    user = house.users[0]
    right = datetime.now(UTC)
    for number in range(12):
        off = (-HOUR, timedelta(0), HOUR)[number % 3]
        emit(house, user, number, right + off)
    with house.dyno():
        house.wait_until_drained()
    found = rows(
        house.settings,
        "SELECT event_id, clamped, occurred_at, period_start FROM usage_log ORDER BY seq",
    )
    assert [row[0] for row in found] == [f"{number:02}" for number in range(12)]
    assert [row[1] for row in found] == [False, False, True] * 4, "what is ahead is clamped, and flagged"
    for number, (_, _, occurred_at, _) in enumerate(found):
        assert isinstance(occurred_at, datetime)
        written = right - HOUR if number % 3 == 0 else right
        assert written <= occurred_at < written + timedelta(seconds=SLOW_SECONDS)
    assert len({row[3] for row in found}) == 1
    house.prove()


@pytest.mark.scenario(number=26)
@pytest.mark.parametrize("label", ["inside_transaction", "after_read"])
def test_a_month_that_ends_inside_a_batch_pays_what_came_before_its_end(house: House, label: str) -> None:
    user = "monthly"
    give_account(house.settings, user, "free")
    for number in range(FIRST):
        emit(house, user, number)
    ((start, end),) = bounds(house, user)
    with house.frozen_at(label, settings=house.settings_with(**PATIENT)) as worker:
        move_clock(house.settings, timedelta(days=32))
        # Their producer's clock shows the month before also; it does not count.
        for number in range(FIRST, FIRST + SECOND):
            emit(house, user, number, datetime.now(UTC) - HOUR)
        thaw(worker)
        house.wait_until_drained()
    found = rows(house.settings, "SELECT event_id, period_start FROM usage_log ORDER BY seq")
    assert [row[0] for row in found] == [f"{number:02}" for number in range(FIRST + SECOND)]
    assert [row[1] for row in found] == [start] * FIRST + [end] * SECOND
    query = "SELECT count(*) FROM ledger_entry WHERE kind = 'refill' AND meter = %s"
    assert rows(house.settings, query, METER) == [(1,)]
    assert rows(house.settings, "SELECT used FROM balance WHERE (user_id, meter) = (%s, %s)", user, METER) == [
        (SECOND,)
    ]
    house.prove()


@pytest.mark.scenario(number=26)
def test_a_plan_changed_inside_a_batch_counts_from_the_next_lock(house: House) -> None:
    user = house.users[0]  # 10 units are left of the plan, 20 saved, 30 bought
    for number in range(FIRST):
        emit(house, user, number, quantity=5)
    patient = house.settings_with(**PATIENT)
    with (
        closing(Resources.open(patient)) as resources,
        ThreadPoolExecutor(1) as thread,
        house.frozen_at("inside_transaction", settings=patient) as worker,
    ):
        change = thread.submit(accounts.change_plan, resources, user, "plus")
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
        wait_until(lambda: bool(rows(house.settings, waiting)), "the change waits for the batch", SLOW_SECONDS)
        thaw(worker)
        assert change.result(SLOW_SECONDS).account.plan == "plus"
        for number in range(FIRST, FIRST + SECOND):
            emit(house, user, number, quantity=5)
        with house.dyno():
            house.wait_until_drained()
    found = rows(
        house.settings,
        "SELECT event_id, from_subscription, from_rollover, from_purchased FROM usage_log ORDER BY seq",
    )
    under_basic = [(5, 0, 0)] * 2 + [(0, 5, 0)] * 4 + [(0, 0, 5)] * 4
    under_plus = [(5, 0, 0)] * SECOND
    assert [row[1:] for row in found] == under_basic + under_plus
    assert [row[0] for row in found] == [f"{number:02}" for number in range(FIRST + SECOND)]
    house.prove()


def emit(house: House, user_id: str, number: int, occurred_at: datetime | None = None, quantity: int = 1) -> None:
    """Emit an event with its place in the stream as its id."""
    event = UsageEvent(
        event_id=f"{number:02}", user_id=user_id, meter=METER, quantity=quantity, multiplier="1",
        occurred_at=occurred_at,
    )  # fmt: skip
    assert house.send([event]) == []


def bounds(house: House, user_id: str) -> list[tuple[object, ...]]:
    """Return start and end of the open period."""
    query = "SELECT period_start, period_end FROM balance WHERE (user_id, meter) = (%s, %s)"
    return rows(house.settings, query, user_id, METER)
