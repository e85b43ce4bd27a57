"""Scenario 25: one user has nearly all the traffic, or all users share one pool. The others do not starve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle

import psycopg
import pytest

from schemas.events import UsageEvent
from tests.faults.house import METER, SLOW_SECONDS, House, Trusting
from tests.support.ledger import rows
from tests.support.streams import partition_of
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.keyspace import keys

# So small that there are many batches and many drains.
BACKLOG = 600
BATCH = 10
TIME_BOX_MS = 30


@pytest.mark.scenario(number=25)
@pytest.mark.parametrize("crowd", ["one user", pytest.param("the pool", marks=pytest.mark.slow)])
def test_nobody_waits_for_the_backlog_of_another_stream(house: House, crowd: str) -> None:
    loud, *others = house.users
    calm = next(user for user in others if partition_of(house.settings, user) != partition_of(house.settings, loud))
    if crowd == "the pool":
        for number in range(BACKLOG):
            house.billing.credit_pool(f"request-{number}", 10)
        behind = "SELECT count(*) FROM sponsor_credit WHERE created_at > %s"
    else:
        house.send([event(loud, f"loud-{number}") for number in range(BACKLOG)])
        behind = "SELECT count(*) FROM usage_log WHERE applied_at > %s"
    house.send([event(calm, "calm")])
    with house.dyno(settings=house.settings_with(drain_time_box_ms=TIME_BOX_MS, batch_max_events=BATCH)):
        house.wait_until_drained(2 * SLOW_SECONDS)
    ((billed_at,),) = rows(house.settings, "SELECT applied_at FROM usage_log WHERE event_id = 'calm'")
    ((overtaken,),) = rows(house.settings, behind, billed_at)
    assert int(str(overtaken)) > BACKLOG / 2, "the last to come was among the first to be billed"
    house.prove()


@pytest.mark.slow
@pytest.mark.scenario(number=25)
def test_others_of_the_same_stream_wait_no_longer_than_in_an_equal_mix(house: House) -> None:
    partition = partition_of(house.settings, house.users[0])
    users = [user for user in house.users if partition_of(house.settings, user) == partition]
    loud, *others = users
    large = house.settings_with(batch_max_events=500)
    with house.dyno(settings=large):
        house.emit(8)
        house.wait_until_drained()
        equal = longest_wait(house, partition, "equal", users, others)
        mostly_loud = [loud if number % 10 else others[number // 10 % len(others)] for number in range(100)]
        crowded = longest_wait(house, partition, "crowded", mostly_loud, others)
    print(f"equal {equal:.2f} s, crowded {crowded:.2f} s")
    assert crowded < 3 * equal + 1
    house.prove()


def longest_wait(
    house: House, partition: keys.Partition, name: str, mix: Sequence[str], others: Sequence[str]
) -> float:
    """Return the seconds until the last event of `others` was applied; all were there from the beginning."""
    house.redis.set(partition.halted, "by the test")
    turns = cycle(mix)
    house.send([event(next(turns), f"{name}-{number}") for number in range(BACKLOG)])
    ((start,),) = rows(house.settings, "SELECT clock_timestamp()")
    house.redis.delete(partition.halted)
    house.wait_until_drained()
    query = (
        "SELECT extract(epoch FROM max(applied_at) - %s) FROM usage_log WHERE event_id LIKE %s AND user_id = ANY(%s)"
    )
    ((seconds,),) = rows(house.settings, query, start, f"{name}-%", list(others))
    return float(str(seconds))


@pytest.mark.slow
@pytest.mark.scenario(number=25)
def test_decisions_and_usage_go_on_while_the_pool_is_stuck_with_a_backlog(house: House) -> None:
    hasty = house.settings_with(lock_timeout_ms=100)
    with Billing.connect(house.settings, trust=Trusting()) as billing, house.dyno(settings=hasty):
        with pool_locked(house):
            for number in range(200):
                user = house.users[number % len(house.users)]
                assert billing.decide(user, 5, f"request-{number}").absorb == 5
                assert billing.settle_sponsored(user, f"request-{number}", 5).absorbed == 5
                house.accepted.grants[f"request-{number}"] = 5
            house.emit(20)
            wait_until(lambda: house.recorded() == 20, "usage is billed", SLOW_SECONDS)
            assert house.redis.xlen(keys.SPONSORSHIP.entries) == 200
            assert (
                billing.decide(house.users[0], 5, "last").pool == house.resources.catalogue.sponsorship.initial - 1_000
            )
            billing.release_sponsored(house.users[0], "last", "not needed")
        house.wait_until_drained()
    assert rows(house.settings, "SELECT count(*), sum(absorbed)::bigint FROM sponsor_grant") == [(200, 1_000)]
    house.prove()


@contextmanager
def pool_locked(house: House) -> Iterator[None]:
    """Lock the pool's row for the length of the block, so that no batch of the pool is applied."""
    house.billing.credit_pool("opens-the-pool", 0)
    house.wait_until_drained()
    assert house.settings.database_url is not None
    with psycopg.connect(house.settings.database_url) as connection:
        connection.execute("SELECT 1 FROM sponsor_pool FOR UPDATE")
        yield
        connection.rollback()


def event(user_id: str, event_id: str) -> UsageEvent:
    """Return an event over one unit."""
    return UsageEvent(event_id=event_id, user_id=user_id, meter=METER, quantity=1, multiplier="1")
