"""Scenario 12: Redis comes back from an older copy of its data. Disposed stream entries are there again.

The copy is a real one: the append-only file on disk at some moment, and a server started on it, like a lagging replica
or a backup.
"""

from __future__ import annotations

import shutil

import pytest

from schemas.answers import HoldState
from schemas.events import UsageEvent
from tests.faults.house import METER, House
from worker.keyspace import keys

AOF = "appendonlydir"


@pytest.mark.scenario(number=12)
def test_entries_that_come_back_are_all_duplicates(house: House) -> None:
    house.emit(16)
    house.drain()
    house.emit_nonsense()
    house.emit(40)
    backlog = house.backlog()
    save_copy(house)
    house.drain()
    house.prove()
    recorded = house.recorded()
    return_to_copy(house)
    assert house.backlog() == backlog
    with house.dyno():
        house.wait_until_drained()
        assert house.recorded() == recorded
        house.resend()
        house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=12)
def test_a_hold_that_comes_back_is_settled_once(house: House) -> None:
    user = house.users[0]
    house.billing.reserve(user, METER, 12, "job-1")
    house.emit(8)
    save_copy(house)
    house.billing.settle(user, METER, "job-1", 9)
    house.drain()
    return_to_copy(house)
    assert house.pending()["h:job-1"] == 12
    answer = house.billing.settle(user, METER, "job-1", 9)
    assert (answer.hold, answer.repeated) == (HoldState.HELD, False), "nobody remembers that it was settled"
    house.accept([UsageEvent(event_id="job-1", user_id=user, meter=METER, quantity=9)])
    house.drain()
    house.prove()


@pytest.mark.scenario(number=12)
def test_requests_of_the_pool_that_come_back_are_given_once(house: House) -> None:
    user, other, *_ = house.users
    with house.sponsor() as sponsor:
        house.absorb(sponsor, user, "r1", 40)
        sponsor.decide(other, 30, "r2")
        sponsor.credit_pool("r3", 500)
        save_copy(house)
        house.absorb(sponsor, other, "r2", 30)
        house.drain()
        house.prove()
        return_to_copy(house)
        assert house.redis.xlen(keys.SPONSORSHIP.entries) == 2
        house.drain()
        assert sponsor.settle_sponsored(other, "r2", 30).absorbed == 30
        sponsor.credit_pool("r3", 500)
        house.drain()
        assert sponsor.estimate(user, METER, 1).sponsorship.absorbed_today == 40
        assert sponsor.estimate(user, METER, 1).sponsorship.pool == 10_000 - 40 - 30 + 50
    house.prove()


def save_copy(house: House) -> None:
    """Copy the data of Redis on disk, which hold all confirmed writes."""
    shutil.copytree(house.redis_server.folder / AOF, house.folder / AOF)


def return_to_copy(house: House) -> None:
    """Kill Redis, and start it on the copy."""
    house.redis_server.kill()
    shutil.rmtree(house.redis_server.folder / AOF)
    shutil.copytree(house.folder / AOF, house.redis_server.folder / AOF)
    house.redis_server.start()
