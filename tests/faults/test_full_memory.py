"""Scenario 19: Redis is out of memory and refuses writes that need more. Work that frees memory goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from schemas.answers import HoldState, Serve
from schemas.events import UsageEvent
from tests.faults.house import METER, House
from worker.errors import RedisUnavailable


@pytest.mark.scenario(number=19)
def test_what_a_full_redis_refuses_is_the_producers_and_what_it_has_is_applied(house: House) -> None:
    user = house.users[0]
    house.emit(40)
    house.emit_nonsense()
    house.billing.reserve(user, METER, 5, "job-1")
    house.billing.reserve(user, METER, 5, "job-2")
    waiting = house.backlog()
    with out_of_memory(house):
        events = house.new_events(8)
        assert in_order(house.send(events)) == events, "all of them come back"
        with pytest.raises(RedisUnavailable) as settling:
            house.billing.settle(user, METER, "job-1", 4)
        with pytest.raises(RedisUnavailable) as charging:
            house.billing.charge(user, METER, 3, "c1")
        assert house.billing.release(user, METER, "job-2").state is HoldState.HELD
        assert house.backlog() == waiting, "what was refused left nothing behind"
        house.drain()
        assert house.backlog() == 0
        house.accepted.holds[user, METER, "job-1"] = 5
        house.prove()
    assert house.send(events) == []
    for refused in (settling, charging):
        assert house.send(refused.value.events) == []
    del house.accepted.holds[user, METER, "job-1"]
    house.resend()
    house.drain()
    house.prove()


@pytest.mark.scenario(number=19)
def test_a_dyno_empties_a_full_redis_and_goes_on_when_there_is_room(house: House) -> None:
    house.emit(40)
    house.emit_nonsense()
    # Its worker process cannot register: RQ needs memory for that.
    with out_of_memory(house), house.run("worker", "worker", "run") as dyno:
        house.wait_until_drained()
        assert "Redis has no memory for jobs" in house.log_of(dyno)
        house.prove()
        house.redis.config_set("maxmemory", 0)
        house.resend()
        house.emit(8)
        house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=19)
def test_the_pools_entries_are_applied_while_redis_is_full(house: House) -> None:
    user, other, *_ = house.users
    with house.sponsor() as sponsor:
        house.absorb(sponsor, user, "r1", 40)
        sponsor.decide(other, 30, "r2")
        with out_of_memory(house):
            assert sponsor.decide(user, 1, "r3").serve is Serve.GATE
            with pytest.raises(RedisUnavailable):
                sponsor.settle_sponsored(other, "r2", 30)
            house.drain()
            house.accepted.promises["r2"] = 30
            house.prove()
        del house.accepted.promises["r2"]
        house.absorb(sponsor, other, "r2", 30)
        assert sponsor.settle_sponsored(user, "r1", 40).repeated
    house.drain()
    house.prove()


def in_order(events: list[UsageEvent]) -> list[UsageEvent]:
    """Return events in the order of their making; a producer gets them back by partition."""
    return sorted(events, key=lambda event: int(event.event_id.removeprefix("e")))


@contextmanager
def out_of_memory(house: House) -> Iterator[None]:
    """Keep Redis above its memory limit for the length of the block."""
    house.redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        house.redis.config_set("maxmemory", 0)
