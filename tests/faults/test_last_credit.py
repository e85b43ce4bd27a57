"""Scenario 15: many callers ask for the last credit at once, in threads and processes. Each granted hold can pay."""

from __future__ import annotations

import re
from contextlib import ExitStack

import pytest

from tests.faults.crowd import GO, READY, reserve_at_once
from tests.faults.house import METER, SLOW_SECONDS, House
from tests.support.waiting import wait_until

LAST = 1
CROWD = 32
PROCESSES = 8
# The first balance of an account of the house (see `BUCKETS`), without the last credit.
TAKEN = 60 - LAST


@pytest.mark.scenario(number=15)
def test_of_32_threads_that_reserve_the_last_credit_one_gets_it(house: House) -> None:
    user = house.users[0]
    hold(house, user, "job-1", TAKEN)
    granted = reserve_at_once(house.billing, user, METER, CROWD)
    settle_all(house, user, granted)


@pytest.mark.scenario(number=15)
def test_of_32_in_processes_of_their_own_that_reserve_the_last_credit_one_gets_it(house: House) -> None:
    user = house.users[0]
    hold(house, user, "job-1", TAKEN)
    with ExitStack() as stack:
        arguments = ("tests.faults.crowd", user, METER, str(CROWD // PROCESSES))
        crowd = [stack.enter_context(house.run(*arguments)) for _ in range(PROCESSES)]
        wait_until(lambda: int(house.redis.get(READY) or 0) == PROCESSES, "all are ready", 2 * SLOW_SECONDS)
        house.redis.rpush(GO, "go")
        assert [process.wait(SLOW_SECONDS) for process in crowd] == [0] * PROCESSES
        granted = [key for process in crowd for key in re.findall(r"^granted (\S+)$", house.log_of(process), re.M)]
    settle_all(house, user, granted)


def hold(house: House, user: str, key: str, amount: int) -> None:
    house.billing.reserve(user, METER, amount, key)
    house.accepted.holds[user, METER, key] = amount


def settle_all(house: House, user: str, granted: list[str]) -> None:
    """Settle the one granted hold and the earlier ones; the account's balance covers all."""
    assert len(granted) == LAST
    house.accepted.holds[user, METER, granted[0]] = LAST
    house.prove()
    for key in [*granted, "job-1"]:
        event = house.billing.settle(user, METER, key, house.accepted.holds.pop((user, METER, key)))
        house.accepted.events[user, event.event_id] = event.amount
    house.drain()
    assert house.billing.check(user, METER).available == 0
    house.prove()
