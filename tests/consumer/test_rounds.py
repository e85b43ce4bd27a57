"""A round on real servers: small backlogs of many partitions in one transaction, and who must not be in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from loguru import logger
from redis import Redis

from config.settings import Settings
from tests.support.books import assert_proved
from tests.support.catalogues import edited_catalogue
from tests.support.ledger import execute, give_accounts, rows
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import backlog, partition_of, pending_of
from worker.admin import dead_letters, partitions
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.consumer.refusals import RefusalLog
from worker.consumer.rounds import dispose_together
from worker.consumer.tally import Tally
from worker.consumer.usage import UsageBooks
from worker.keyspace import calls, keys, reader, scripts
from worker.keyspace.keys import Partition
from worker.ledger.connection import batch_connection
from worker.ledger.partitions import try_lock_partition
from worker.resources import Resources

METER = "premium_voice"


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    return settings_for(
        emptied_database_url, redis_url, lock_timeout_ms=200, batch_max_events=20, hand_grace_ms=50, pause_min_entries=0
    )


@pytest.fixture
def users(settings: Settings, resources: Resources) -> list[str]:
    """One user of each of the eight partitions, with an account."""
    names = (f"user-{number}" for number in range(1_000))
    found: dict[Partition, str] = {}
    for name in names:
        found.setdefault(partition_of(settings, name), name)
    everyone = [found[partition] for partition in keys.partitions_of(settings.partitions)]
    assert len(everyone) == settings.partitions
    give_accounts(settings, everyone, "basic")
    return everyone


def emit(billing: Billing, users: list[str], each: int = 2) -> None:
    for user in users:
        for number in range(each):
            billing.emit(user, METER, 10 + number, event_id=f"{user}-{number}")


def applied(settings: Settings) -> list[tuple[object, ...]]:
    return rows(settings, "SELECT user_id, event_id, from_subscription FROM usage_log ORDER BY user_id, seq")


def transactions(settings: Settings) -> list[tuple[object, ...]]:
    """How many events each transaction has applied: the clock stands while one works."""
    return rows(settings, "SELECT count(*) FROM usage_log GROUP BY applied_at")


def together(resources: Resources) -> frozenset[Partition]:
    return dispose_together(resources, keys.Partition(0), RefusalLog(), Tally()).done


def test_a_round_applies_all_partitions_in_one_transaction_and_publishes_them(
    settings: Settings, redis: Redis, resources: Resources, users: list[str]
) -> None:
    with Billing.connect(settings) as billing:
        for user in users:
            billing.check(user, METER)
        emit(billing, users)
        assert together(resources) == set(keys.partitions_of(settings.partitions))
        assert transactions(settings) == [(2 * len(users),)]
        assert applied(settings) == [
            row for user in sorted(users) for row in ((user, f"{user}-0", 10), (user, f"{user}-1", 11))
        ]
        assert [billing.check(user, METER).used for user in users] == [21] * len(users)
    assert backlog(settings, redis) == 0
    assert [pending_of(redis, settings, user, METER) for user in users] == [{}] * len(users)
    assert not redis.keys("mf:*:hand")
    assert not redis.keys("mf:*:rung")
    assert_proved(resources)


def test_a_repeat_in_a_round_is_a_duplicate_and_another_event_of_that_id_a_dead_letter_of_its_partition(
    settings: Settings, resources: Resources, users: list[str]
) -> None:
    with Billing.connect(settings) as billing:
        emit(billing, users)
        together(resources)
        emit(billing, users)
        conflict = {"event_id": f"{users[3]}-0", "user_id": users[3], "meter": METER, "quantity": 99}
        resources.redis.xadd(Partition(3).entries, {"v": "1", "e": json.dumps(conflict)})
        assert len(together(resources)) == len(users)
    assert len(applied(settings)) == 2 * len(users)
    (letter,) = dead_letters.listed(resources)
    assert (letter.partition, letter.reason) == (3, "id_conflict")
    assert_proved(resources)


def paused(resources: Resources, partition: Partition) -> None:
    partitions.pause(resources, partition, "operator", "inventory")
    resources.redis.delete(partition.paused)  # the mark is short-lived; the row decides


def halted(resources: Resources, partition: Partition) -> None:
    resources.redis.set(partition.halted, "an error")


def failing(resources: Resources, partition: Partition) -> None:
    resources.redis.set(partition.failing, "an error")


def left_in_hand(resources: Resources, partition: Partition) -> None:
    request = calls.hand(partition, "a dead drain", 1, calls.InHand("-", 10, 0))
    scripts.run(resources.redis, request)


def with_nonsense(resources: Resources, partition: Partition) -> None:
    resources.redis.xadd(partition.entries, {"v": "1", "e": "{}"})


def with_more_than_a_batch(resources: Resources, partition: Partition) -> None:
    for _ in range(resources.settings.batch_max_events):
        resources.redis.xadd(partition.entries, {"v": "1", "r": "user-none"})


def with_an_id_from_the_future(resources: Resources, partition: Partition) -> None:
    resources.redis.xadd(partition.entries, {"v": "1", "r": "user-none"}, id="4000000000000-0")


@pytest.mark.parametrize(
    "given", [paused, halted, failing, left_in_hand, with_nonsense, with_more_than_a_batch, with_an_id_from_the_future]
)
def test_a_round_passes_by_what_needs_a_drain_of_its_own(
    settings: Settings,
    redis: Redis,
    resources: Resources,
    users: list[str],
    given: Callable[[Resources, Partition], None],
) -> None:
    odd, *others = keys.partitions_of(settings.partitions)
    with Billing.connect(settings) as billing:
        emit(billing, users)
    given(resources, odd)
    before = redis.xlen(odd.entries), redis.hgetall(odd.hand)
    assert together(resources) == set(others)
    assert (redis.xlen(odd.entries), redis.hgetall(odd.hand)) == before, "not touched"
    assert redis.exists(odd.rung), "its drain will come"


def test_a_round_passes_by_a_partition_that_another_drain_has(
    settings: Settings, resources: Resources, users: list[str]
) -> None:
    odd, *others = keys.partitions_of(settings.partitions)
    with Billing.connect(settings) as billing, batch_connection(resources.engine) as postgres:
        emit(billing, users)
        assert try_lock_partition(postgres, odd.number).is_ours
        assert together(resources) == set(others)
    assert drain_stream(resources, odd).entries == 2
    assert_proved(resources)


def test_one_partition_is_no_round(settings: Settings, resources: Resources, users: list[str]) -> None:
    with Billing.connect(settings) as billing:
        emit(billing, users[:1])
    assert together(resources) == frozenset()


def test_a_round_that_fails_changes_nothing_and_leaves_each_partition_to_its_drain(
    settings: Settings, redis: Redis, resources: Resources, users: list[str]
) -> None:
    """As an event does whose data Postgres refuses: its drain finds it by halves."""
    execute(settings, f"ALTER TABLE usage_log ADD CONSTRAINT refuses CHECK (event_id <> '{users[2]}-1') NOT VALID")
    try:
        with Billing.connect(settings) as billing:
            emit(billing, users)
        assert together(resources) == frozenset()
        assert applied(settings) == []
        assert not redis.keys("mf:*:hand")
        assert len(redis.keys("mf:*:rung")) == len(users)
        for partition in keys.partitions_of(settings.partitions):
            drain_stream(resources, partition)
    finally:
        execute(settings, "ALTER TABLE usage_log DROP CONSTRAINT refuses")
    (letter,) = dead_letters.listed(resources)
    assert (letter.partition, letter.reason) == (2, "data_error")
    assert len(applied(settings)) == 2 * len(users) - 1
    assert_proved(resources)


def test_an_account_in_use_holds_up_its_own_partition_alone(
    settings: Settings, resources: Resources, users: list[str]
) -> None:
    odd = partition_of(settings, users[5])
    with Billing.connect(settings) as billing, psycopg.connect(str(settings.database_url)) as other:
        emit(billing, users)
        other.execute("SELECT 1 FROM account WHERE user_id = %s FOR UPDATE", (users[5],))
        assert together(resources) == set(keys.partitions_of(settings.partitions)) - {odd}
    drain_stream(resources, odd)
    assert len(applied(settings)) == 2 * len(users)
    assert_proved(resources)


def test_a_round_whose_accounts_are_all_in_use_disposes_of_nothing(
    settings: Settings, resources: Resources, users: list[str]
) -> None:
    warned: list[str] = []
    sink = logger.add(warned.append, level="WARNING")
    with Billing.connect(settings) as billing, psycopg.connect(str(settings.database_url)) as other:
        emit(billing, users)
        other.execute("SELECT 1 FROM account FOR UPDATE")
        done = dispose_together(resources, partition_of(settings, users[0]), RefusalLog(), Tally())
    logger.remove(sink)
    assert done == (frozenset(), frozenset(keys.partitions_of(settings.partitions)))
    assert warned == []
    assert together(resources) == set(keys.partitions_of(settings.partitions))
    assert_proved(resources)


@pytest.mark.parametrize("broken", ["entries", "hand"])
def test_a_broken_key_of_one_partition_stops_no_other(
    settings: Settings, redis: Redis, resources: Resources, users: list[str], broken: str
) -> None:
    odd = Partition(6)
    with Billing.connect(settings) as billing:
        emit(billing, [user for user in users if partition_of(settings, user) != odd])
    redis.set(odd.rung, "1")
    redis.set(getattr(odd, broken), "of another type")
    assert together(resources) == set(keys.partitions_of(settings.partitions)) - {odd}


def test_an_error_of_ours_is_left_to_the_drain_that_meets_it(
    settings: Settings, redis: Redis, resources: Resources, users: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Billing.connect(settings) as billing:
        emit(billing, users)
    monkeypatch.setattr("worker.consumer.rounds.together", lambda _: 1 / 0)
    assert together(resources) == frozenset()
    assert len(redis.keys("mf:*:rung")) == len(users)
    assert applied(settings) == []


def test_a_catalogue_to_come_is_no_reason_to_stand_aside(
    settings: Settings, resources: Resources, users: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    later = datetime.now(UTC) + timedelta(days=30)
    monkeypatch.setattr(UsageBooks, "next_change", lambda *_: later)
    with Billing.connect(settings) as billing:
        emit(billing, users)
    assert len(together(resources)) == len(users)


def test_a_round_has_no_more_events_than_a_batch(settings: Settings, resources: Resources, users: list[str]) -> None:
    few = settings.model_copy(update={"batch_max_events": 6})
    with Billing.connect(settings) as billing, worker_resources(few) as small:
        emit(billing, users)
        assert together(small) == {Partition(0), Partition(1)}


def test_events_that_wait_for_a_catalogue_stay_and_do_not_ring(
    settings: Settings, redis: Redis, resources: Resources, users: list[str], tmp_path: Path
) -> None:
    """Else the worker process would turn round and round for them."""
    starter = '[plans.starter]\nname = "Starter"\ntier = 1\nmeters.premium_voice = { quantity = 100_000 }\n\n'
    newer = edited_catalogue(tmp_path, ("[plans.plus]", starter + "[plans.plus]"))
    stranger = next(f"new-{n}" for n in range(1_000) if partition_of(settings, f"new-{n}") == Partition(0))
    with Billing.connect(settings) as billing:
        emit(billing, [stranger, *users])
    resources.claim()  # the shipped catalogue is in force, without that plan
    opening = settings.model_copy(update={"default_plan": "starter", "catalogue_path": newer})
    with worker_resources(opening) as waiting:
        waiting.take_up_catalogues()
        assert len(together(waiting)) == len(users)
    assert backlog(settings, redis) == 2
    assert not redis.keys("mf:*:rung")
    assert len(applied(settings)) == 2 * len(users)


def test_two_rounds_at_once_share_the_partitions(settings: Settings, resources: Resources, users: list[str]) -> None:
    with Billing.connect(settings) as billing, batch_connection(resources.engine) as postgres:
        emit(billing, users)
        for number in range(4):
            assert try_lock_partition(postgres, number).is_ours
        with worker_resources(settings) as other:
            assert together(other) == set(keys.partitions_of(8)[4:])
    assert together(resources) == set(keys.partitions_of(8)[:4])
    assert_proved(resources)


def test_entries_that_came_during_a_round_ring_again(
    settings: Settings, redis: Redis, resources: Resources, users: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Billing.connect(settings) as billing:
        emit(billing, users)
        read = reader.read_small

        def read_and_emit(*arguments: object) -> object:
            found = read(*arguments)  # type: ignore[arg-type]
            billing.emit(users[0], METER, 1, event_id="late")
            redis.delete(Partition(0).rung)
            return found

        monkeypatch.setattr("worker.consumer.rounds.read_small", read_and_emit)
        together(resources)
    assert backlog(settings, redis) == 1
    assert redis.exists(Partition(0).rung)
