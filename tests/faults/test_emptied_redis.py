"""Scenario 11: Redis lost all its data. The ledger has the balances; `status` tells of data that only Redis had."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime

import pytest

from schemas.answers import Serve
from schemas.events import UsageEvent
from tests.faults.house import METER, SLOW_SECONDS, House, thaw
from tests.support.waiting import wait_until
from worker.admin.lives import acknowledge
from worker.errors import HoldClosed
from worker.keyspace import keys
from worker.reports.status import read_status


@pytest.mark.scenario(number=11)
def test_an_emptied_redis_knows_the_balances_again_and_applies_nothing_twice(house: House) -> None:
    user = house.users[0]
    with house.dyno() as dyno:
        house.emit(40)
        house.billing.reserve(user, METER, 5, "job-1")
        house.wait_until_drained()
        left = house.billing.check(user, METER)
        assert read_status(house.resources).emptied_at is None
        house.redis.flushall()
        after = house.billing.check(user, METER)
        assert (left.available, left.pending) == (40, 5)
        assert (after.available, after.pending) == (45, 0), "the hold is gone, and nothing else"
        assert house.billing.settle(user, METER, "job-1", 4).hold is not None, "the work was done"
        house.accept([UsageEvent(event_id="job-1", user_id=user, meter=METER, quantity=4)])
        house.wait_until_drained()
        house.resend(41)
        house.emit(8)
        house.wait_until_drained()
        wait_until(lambda: "Redis was emptied" in house.log_of(dyno), "the dyno noticed", SLOW_SECONDS)
    house.prove()


@pytest.mark.scenario(number=11)
def test_events_that_were_lost_with_redis_count_once_when_they_are_sent_again(house: House) -> None:
    house.emit(16)
    house.drain()
    house.emit(24)
    lost = house.backlog()
    house.redis.flushall()
    assert (house.backlog(), lost) == (0, 24)
    assert house.pending() == {}
    assert "Redis was found empty" in said_by_status(house)
    emptied_at = read_status(house.resources).emptied_at
    assert emptied_at is not None
    assert abs((datetime.now(UTC) - emptied_at).total_seconds()) < SLOW_SECONDS
    with house.dyno():
        house.resend(40)
        house.wait_until_drained()
    house.prove()


def said_by_status(house: House) -> str:
    with house.run("worker", "status") as command:
        assert command.wait(SLOW_SECONDS) == 1, "degraded"
        return house.log_of(command)


@pytest.mark.slow
@pytest.mark.scenario(number=11)
@pytest.mark.parametrize("label", ["after_commit", "inside_transaction"])
def test_a_worker_in_the_middle_of_a_batch_goes_on_when_redis_is_emptied(house: House, label: str) -> None:
    house.emit(40)
    patient = house.settings_with(idle_in_transaction_timeout_ms=30_000)
    with house.frozen_at(label, settings=patient) as worker:
        house.redis.flushall()
        house.resend(40)
        thaw(worker)
        with house.dyno():
            house.wait_until_drained()
            house.emit(8)
            house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=11)
def test_the_pool_and_its_budgets_are_rebuilt_from_the_ledger(house: House) -> None:
    user = house.users[0]
    with house.sponsor(daily_units=100) as sponsor, house.dyno():
        house.absorb(sponsor, user, "r1", 40)
        house.wait_until_drained()
        assert sponsor.decide(user, 30, "r2").serve is Serve.FREE
        house.redis.flushall()
        advice = sponsor.estimate(user, METER, 1).sponsorship
        assert (advice.absorbed_today, advice.pool) == (40, 10_000 - 40), "what was held is free, what was given is not"
        assert sponsor.decide(user, 61, "r3").serve is Serve.PARTIAL
        with pytest.raises(HoldClosed):
            sponsor.settle_sponsored(user, "r2", 30)
        for request, units in (("r1", 40), ("r3", 20)):
            house.absorb(sponsor, user, request, units)
        house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=11)
def test_a_dyno_that_never_led_notices_what_happened_under_another_lead(house: House) -> None:
    with house.dyno() as leader:
        house.emit(8)
        house.wait_until_drained()
        with house.dyno() as other:
            wait_until(lambda: house.redis.get(keys.LEADER) is not None, "one leads", SLOW_SECONDS)
            os.killpg(leader.pid, signal.SIGKILL)
            house.redis.flushall()
            wait_until(lambda: "Redis was emptied" in house.log_of(other), "the other noticed", SLOW_SECONDS)
            assert [loss.found for loss in read_status(house.resources).redis_losses or ()] == ["empty"]
            acknowledge(house.resources, actor="jane", reason="sent again")
            assert read_status(house.resources).redis_losses == ()
            assert house.log_of(other).count("Redis was emptied") == 1
            house.resend(8)
            house.wait_until_drained()
            house.redis.flushall()
            wait_until(lambda: house.log_of(other).count("Redis was emptied") == 2, "said again", SLOW_SECONDS)
    house.prove()
