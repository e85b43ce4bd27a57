"""Changing the number of partitions on real servers: only when nothing is under way, whole, and known to everybody."""

from __future__ import annotations

from itertools import count as count_from
from itertools import islice

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import give_account, give_accounts, rows
from tests.support.processes import killed_in
from tests.support.resources import worker_resources
from tests.support.streams import drain, partition_of, pending_of
from worker.admin import dead_letters
from worker.admin.losses import reconcile
from worker.admin.partitions import RepartitionError, move_stranded, repartition
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.errors import PartitionMismatch
from worker.keyspace import calls, keys, scripts
from worker.ledger.connection import LedgerError, batch_connection
from worker.ledger.partitions import try_lock_partition
from worker.reports.proof import verify_ledger
from worker.reports.status import read_status
from worker.resources import Resources

USER, METER = "user-42", "premium_voice"


@pytest.fixture
def claimed(resources: Resources) -> Resources:
    """Resources on servers that were set up with eight partitions."""
    resources.claim()
    return resources


def test_users_go_on_in_other_streams_and_nothing_is_billed_twice(claimed: Resources, settings: Settings) -> None:
    users = [f"user-{number}" for number in range(20)]
    for user in users:
        give_account(settings, user, "basic")
    with Billing.connect(settings) as billing:
        for user in users:
            billing.emit(user, METER, 10, event_id="before")
    for user in users:
        drain(settings, user)
    assert repartition(claimed, 3) == 8
    other = settings.model_copy(update={"partitions": 3})
    assert any(partition_of(settings, user) != partition_of(other, user) for user in users)
    with Billing.connect(other) as billing, worker_resources(other) as resources:
        resources.claim()
        for user in users:
            billing.emit(user, METER, 10, event_id="before")  # a repeat is known wherever it comes from
            billing.emit(user, METER, 7, event_id="after")
            drain(other, user)
            assert billing.check(user, METER).used == 17
        assert verify_ledger(resources).differences == []
    assert rows(settings, "SELECT count(*), sum(amount) FROM usage_log") == [(40, 340)]


def test_whoever_has_the_old_number_is_turned_away(claimed: Resources, settings: Settings) -> None:
    repartition(claimed, 16)
    with pytest.raises(LedgerError, match="METERFALL_PARTITIONS: this ledger has 16 partitions, not 8"):
        claimed.claim()
    with Billing.connect(settings) as billing, pytest.raises(PartitionMismatch, match="16 partitions, not 8"):
        billing.emit(USER, METER, 1)


def test_nothing_changes_while_entries_wait(claimed: Resources, settings: Settings, redis: Redis) -> None:
    redis.xadd(keys.Partition(5).entries, {"v": "1", "r": USER})
    with pytest.raises(RepartitionError, match="partition 5: 1 stream entry in it; let workers drain it"):
        repartition(claimed, 16)
    claimed.claim()


def test_nothing_changes_while_a_hold_is_open(claimed: Resources, settings: Settings) -> None:
    give_account(settings, USER, "basic")
    with Billing.connect(settings) as billing:
        hold = billing.reserve(USER, METER, 10, "job-1")
        with pytest.raises(
            RepartitionError, match=r"user-42: 1 hold pending on premium_voice; .* `meterfall holds release`"
        ):
            repartition(claimed, 16)
        hold.release()
    assert repartition(claimed, 16) == 8


def test_a_refusal_because_of_lost_entries_names_the_way_out(
    claimed: Resources, settings: Settings, redis: Redis
) -> None:
    give_account(settings, USER, "basic")
    with Billing.connect(settings) as billing:
        for number in range(3):
            billing.emit(USER, METER, 10, event_id=f"e{number}")
    redis.xtrim(partition_of(settings, USER).entries, maxlen=0)
    with pytest.raises(RepartitionError) as refused:
        repartition(claimed, 16)
    message = str(refused.value)
    assert message.startswith("user-42: 3 events pending on premium_voice without a stream entry: ")
    assert "`meterfall pending reconcile`" in message
    assert "holds release" not in message
    assert len(reconcile(claimed, actor="ann", reason="trimmed").freed) == 3
    assert repartition(claimed, 16) == 8


def test_nothing_changes_while_a_worker_drains(claimed: Resources) -> None:
    with batch_connection(claimed.engine) as postgres:
        assert try_lock_partition(postgres, 3)
        with pytest.raises(RepartitionError, match="partition 3: a worker is draining it"):
            repartition(claimed, 16)
    claimed.claim()


@pytest.mark.parametrize("partitions", [0, -1, 1_025])
def test_a_number_out_of_range_names_what_is_allowed(claimed: Resources, partitions: int) -> None:
    with pytest.raises(RepartitionError, match="partitions: must be from 1 to 1024"):
        repartition(claimed, partitions)


def test_killed_between_the_ledger_and_redis_a_repeat_finishes_it(claimed: Resources, settings: Settings) -> None:
    killed_in(settings, lambda resources: repartition(resources, 16), "after_commit")
    other = settings.model_copy(update={"partitions": 16})
    with worker_resources(other) as resources:
        with pytest.raises(LedgerError, match="this Redis has 8 partitions, not 16"):
            resources.claim()
        assert repartition(resources, 16) == 16
        resources.claim()


# ---------------------------------------------------------------------------------------------------------------------
# Producers that did not hear of it


@pytest.fixture
def fewer(claimed: Resources, settings: Settings) -> Settings:
    """The settings of whoever has heard that there are three partitions now."""
    repartition(claimed, 3)
    return settings.model_copy(update={"partitions": 3})


def strand(settings: Settings, count: int) -> list[str]:
    """Have so many events sent to stream 7 by a service that did not hear of it; returns their users."""
    named = (f"user-{number}" for number in range(10_000))
    users = list(islice((name for name in named if partition_of(settings, name).number == 7), count))
    with Billing.connect(settings) as billing:
        billing.context.claimed = True  # it asked before the change
        for user in users:
            billing.emit(user, METER, 5, event_id=f"e{next(_NUMBERS)}")
    return users


_NUMBERS = count_from(1)


def test_what_waits_where_nobody_drains_is_shown(fewer: Settings, settings: Settings, redis: Redis) -> None:
    redis.xdel(
        keys.Partition(6).entries, redis.xadd(keys.Partition(6).entries, {"v": "1"})
    )  # drained before the change
    with worker_resources(fewer) as resources:
        assert read_status(resources).stranded == {}
        strand(settings, 1)
        assert read_status(resources).stranded == {7: 1}


def test_what_waits_where_nobody_drains_is_moved_and_billed(fewer: Settings, settings: Settings, redis: Redis) -> None:
    users = strand(settings, 250)
    give_accounts(fewer, users, "basic")
    assert pending_of(redis, settings, users[0], METER)["total"] == 5
    redis.xadd(keys.Partition(7).entries, {"v": "1", "e": "no event"})
    redis.xadd(keys.Partition(7).entries, {"v": "1", "r": users[0]})
    with worker_resources(fewer) as resources:
        assert move_stranded(resources, keys.Partition(7)) == 252
        assert move_stranded(resources, keys.Partition(7)) == 0
        assert list(redis.scan_iter(keys.Partition(7).pattern)) == []
        assert {int(number) for number in redis.lrange(keys.BELL, 0, -1)} == {0, 1, 2, 7}, "the service rang for 7"
        for partition in keys.partitions_of(3):
            drain_stream(resources, partition)
        assert [letter.payload for letter in dead_letters.listed(resources)] == [b"no event"]
        assert verify_ledger(resources).differences == []
        assert list(redis.scan_iter(keys.PENDING_PATTERN)) == []
        assert repartition(resources, 8) == 3
    assert rows(fewer, "SELECT count(*), sum(amount)::bigint FROM usage_log") == [(250, 1_250)]


def test_killed_while_it_moves_a_repeat_moves_the_rest(fewer: Settings, settings: Settings, redis: Redis) -> None:
    give_accounts(fewer, strand(settings, 3), "basic")
    killed_in(fewer, lambda resources: move_stranded(resources, keys.Partition(7)), "after_moving")
    assert redis.xlen(keys.Partition(7).entries) == 3
    with worker_resources(fewer) as resources:
        assert move_stranded(resources, keys.Partition(7)) == 3
        assert sum(redis.xlen(partition.entries) for partition in keys.partitions_of(3)) == 6
        for partition in keys.partitions_of(3):
            drain_stream(resources, partition)
        assert dead_letters.listed(resources) == []
    assert rows(fewer, "SELECT count(*), sum(amount)::bigint FROM usage_log") == [(3, 15)]


def test_what_comes_while_it_moves_is_moved_as_well(
    fewer: Settings, settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    strand(settings, 3)
    late = iter([True])
    monkeypatch.setattr(
        "worker.admin.partitions.crash_point", lambda _: strand(settings, 2) if next(late, False) else None
    )
    with worker_resources(fewer) as resources:
        assert move_stranded(resources, keys.Partition(7)) == 5
    assert redis.exists(keys.Partition(7).entries) == 0


def test_a_stream_that_has_grown_is_not_forgotten_and_forgetting_may_be_repeated(
    resources: Resources, redis: Redis
) -> None:
    first = str(redis.xadd(keys.Partition(7).entries, {"v": "1"}).decode())  # type: ignore[union-attr]
    second = str(redis.xadd(keys.Partition(7).entries, {"v": "1"}).decode())  # type: ignore[union-attr]
    redis.xdel(keys.Partition(7).entries, redis.xadd(keys.Partition(7).entries, {"v": "1"}))
    for last_id, gone in ((first, 0), (second, 1), (second, 1)):
        assert scripts.run(resources.redis, calls.forget(keys.Partition(7), last_id)) == gone
        assert redis.exists(keys.Partition(7).entries) == 1 - gone


def test_what_workers_drain_is_not_moved(fewer: Settings, redis: Redis) -> None:
    redis.xadd(keys.Partition(2).entries, {"v": "1", "e": "{}"})
    with worker_resources(fewer) as resources, pytest.raises(RepartitionError, match="one of the 3 that workers drain"):
        move_stranded(resources, keys.Partition(2))
    assert redis.xlen(keys.Partition(2).entries) == 1
