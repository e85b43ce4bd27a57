"""Scenarios 13 and 14: a producer dies between its calls, or they arrive in another order than it sent them."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.answers import HoldState, Serve
from schemas.events import UsageEvent
from tests.faults.house import METER, SLOW_SECONDS, House
from tests.support.processes import killed_in
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.errors import HoldClosed, UsageDenied, UsageLimitExceeded
from worker.keyspace.scripts import script

# The first balance of an account of the house: see `BUCKETS`.
ROOM = 60
# Long enough to look at the hold, even on a slow machine.
TTL_SECONDS = 3


@pytest.mark.scenario(number=13)
def test_what_a_dead_producer_held_is_free_once_its_time_is_over(house: House) -> None:
    user = house.users[0]
    with house.dyno():
        with Billing.connect(house.settings) as doomed:
            killed_in(house.settings, lambda _: doomed.reserve(user, METER, ROOM, "job-1", TTL_SECONDS))
        assert house.pending() == {"h:job-1": ROOM}
        with pytest.raises(UsageLimitExceeded):
            house.billing.reserve(user, METER, 1, "job-2")
        # No check of this user comes, which would do the same.
        wait_until(lambda: not house.pending(), "the hold is gone", TTL_SECONDS + SLOW_SECONDS)
        house.billing.reserve(user, METER, ROOM, "job-2").settle(ROOM)
        house.accept([UsageEvent(event_id="job-2", user_id=user, meter=METER, quantity=ROOM)])
        house.wait_until_drained()
        house.resend(1)
        house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=13)
def test_what_the_pool_held_for_a_dead_producer_is_free_once_its_time_is_over(house: House) -> None:
    user = house.users[0]
    with house.sponsor(daily_units=ROOM) as sponsor:
        with house.sponsor(daily_units=ROOM) as doomed:
            killed_in(house.settings, lambda _: doomed.decide(user, ROOM, "r1", ttl_seconds=TTL_SECONDS))
        house.accepted.promises["r1"] = ROOM
        house.prove()
        assert sponsor.decide(user, 1, "r2").serve is Serve.GATE
        del house.accepted.promises["r1"]
        wait_until(lambda: sponsor.decide(user, ROOM, "r2").serve is Serve.FREE, "it is free", SLOW_SECONDS)
        house.absorb(sponsor, user, "r2", ROOM)
    house.drain()
    house.prove()


# A producer that waits shortly, once, and asks Redis again at once.
HASTY = {"redis_check_timeout_ms": 100, "redis_down_pause_ms": 0, "redis_retries": 0, "redis_down": "deny"}


@pytest.mark.scenario(number=14)
def test_a_reserve_that_arrives_after_its_release_holds_nothing(house: House) -> None:
    user = house.users[0]
    with house.proxied_redis() as (proxy, behind):
        hasty = behind.model_copy(update=HASTY)
        with Billing.connect(hasty) as producer:
            producer.check(user, METER)
            house.redis.script_load(script("reserve").text)  # so that it is on its way in one command
            proxy.black_hole()
            with pytest.raises(UsageDenied, match="redis_down_denied"):
                producer.reserve(user, METER, 12, "job-1")
            assert house.billing.release(user, METER, "job-1").state is HoldState.UNKNOWN
            before = scripts_run(house)
            proxy.forward()
            wait_until(lambda: scripts_run(house) > before, "the reserve has arrived", SLOW_SECONDS)
            with pytest.raises(HoldClosed):
                producer.reserve(user, METER, 12, "job-1")
    assert house.pending() == {}
    house.prove()


def scripts_run(house: House) -> int:
    """Return the number of scripts that Redis has run by their hash so far."""
    found: Any = house.redis.info("commandstats")
    return int(found["cmdstat_evalsha"]["calls"])


@pytest.mark.scenario(number=14)
@pytest.mark.parametrize("end", ["expired", "released"])
def test_work_that_is_settled_after_its_hold_was_over_still_counts(house: House, end: str) -> None:
    user = house.users[0]
    house.billing.reserve(user, METER, 12, "job-1", 1)
    if end == "released":
        house.billing.release(user, METER, "job-1")
    wait_until(lambda: house.billing.check(user, METER).pending == 0, "nothing is held", SLOW_SECONDS)
    assert house.billing.settle(user, METER, "job-1", 9).hold is HoldState(end)
    house.accept([UsageEvent(event_id="job-1", user_id=user, meter=METER, quantity=9)])
    house.drain()
    assert house.billing.settle(user, METER, "job-1", 9).repeated
    assert house.billing.reserve(user, METER, 1, "job-2").release().state is HoldState.HELD
    house.resend(1)
    house.drain()
    assert house.billing.check(user, METER).available == ROOM - 9
    house.prove()


@pytest.mark.scenario(number=14)
def test_the_pool_pays_for_work_that_is_settled_after_its_hold_expired(house: House) -> None:
    user = house.users[0]
    with house.sponsor() as sponsor:
        assert sponsor.decide(user, 12, "r1", ttl_seconds=1).serve is Serve.FREE
        wait_until(lambda: sponsor.estimate(user, METER, 1).sponsorship.absorbed_today == 0, "it expired", SLOW_SECONDS)
        for repeated in (False, True):
            answer = sponsor.settle_sponsored(user, "r1", 9)
            assert (answer.absorbed, answer.late, answer.repeated) == (9, True, repeated)
    house.accepted.grants["r1"] = 9
    house.drain()
    house.prove()
