"""A Redis that lost its data: noticed once, said until an operator acknowledges it, and never said of a new one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import psycopg
import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import execute, rows
from tests.support.resources import settings_for, worker_resources
from worker.admin.lives import acknowledge
from worker.demo.servers import Server
from worker.errors import BadInput
from worker.keyspace import keys
from worker.reports.health import Limits, findings
from worker.reports.metrics import exposition, read_figures
from worker.reports.status import read_status
from worker.resources import Resources

FOUND = "SELECT found, acknowledged_by, reason FROM redis_life ORDER BY id"


def losses(resources: Resources) -> list[str]:
    """What `status` says of the data of Redis; `health` has a line for each."""
    status = read_status(resources)
    assert status.redis_losses is not None
    said = [one.text for one in findings(status, Limits(1, 0, 0)) if one.check == "redis_emptied"]
    assert len(said) == len(status.redis_losses)
    assert status.emptied_at == (status.redis_losses[0].at if said else None)
    return [loss.found for loss in status.redis_losses]


def test_a_new_installation_says_nothing(resources: Resources, settings: Settings) -> None:
    for _ in range(2):
        resources.claim()
        assert losses(resources) == []
    assert rows(settings, FOUND) == [("new", None, None)]
    assert resources.redis.get(keys.FOUND_EMPTY) == b"0"


def test_a_first_start_that_redis_did_not_survive_is_no_loss(resources: Resources, settings: Settings) -> None:
    """The number of partitions was written, and Redis was away: the ledger is in use, and has no life."""
    execute(settings, "UPDATE ledger SET partitions = 8")
    resources.claim()
    assert losses(resources) == []


def test_a_loss_is_said_until_it_is_acknowledged_and_the_next_one_again(resources: Resources, redis: Redis) -> None:
    resources.claim()
    redis.flushdb()
    assert losses(resources) == ["empty"], "said before anybody has begun the new life"
    for _ in range(2):
        resources.claim()
        assert losses(resources) == ["empty"]
    assert int(redis.get(keys.FOUND_EMPTY) or 0) > 0, "the former release says it also"
    assert b"meterfall_redis_emptied_timestamp_seconds 1." in exposition(read_figures(resources), {})
    (done,) = acknowledge(resources, actor="jane", reason="sent again")
    assert (done.found, done.acknowledged_by, done.reason) == ("empty", "jane", "sent again")
    assert losses(resources) == []
    assert b"meterfall_redis_emptied_timestamp_seconds 1." not in exposition(read_figures(resources), {})
    assert acknowledge(resources, actor="joe", reason="once more") == []
    assert redis.get(keys.FOUND_EMPTY) == b"0"
    redis.flushdb()
    resources.claim()
    redis.flushdb()
    resources.claim()
    assert losses(resources) == ["empty", "empty"], "each is one of its own"
    assert rows(resources.settings, FOUND) == [
        ("new", None, None), ("empty", "jane", "sent again"), ("empty", None, None), ("empty", None, None),
    ]  # fmt: skip


def test_an_old_copy_is_told_from_an_empty_redis_and_from_an_unknown_one(resources: Resources, redis: Redis) -> None:
    resources.claim()
    old = redis.get(keys.LIFE)
    redis.flushdb()
    resources.claim()
    redis.set(keys.LIFE, old)  # type: ignore[arg-type]
    assert losses(resources) == ["older", "empty"]
    resources.claim()
    assert losses(resources) == ["older", "empty"]
    assert redis.get(keys.LIFE) != old
    redis.set(keys.LIFE, "f" * 32)
    assert losses(resources) == ["unknown", "older", "empty"]
    resources.claim()
    resources.claim()
    assert losses(resources) == ["unknown", "older", "empty"]
    assert redis.get(keys.LIFE) == b"f" * 32, "taken over: another ledger may use this Redis, by mistake"


def test_a_restored_ledger_without_lives_takes_over_the_life_of_redis(resources: Resources, settings: Settings) -> None:
    resources.claim()
    token = resources.redis.get(keys.LIFE)
    execute(settings, "DELETE FROM redis_life")
    resources.claim()
    assert (losses(resources), resources.redis.get(keys.LIFE)) == ([], token)


@pytest.mark.parametrize(("mark", "said"), [(None, []), ("0", []), ("1700000000000", ["empty"])])
def test_an_upgrade_keeps_what_the_former_release_has_noticed(
    resources: Resources, redis: Redis, settings: Settings, mark: str | None, said: list[str]
) -> None:
    execute(settings, "UPDATE ledger SET partitions = 8")
    redis.set(keys.PARTITION_COUNT, 8)
    if mark is not None:
        redis.set(keys.FOUND_EMPTY, mark)
    resources.claim()
    assert losses(resources) == said
    if said:
        assert read_status(resources).emptied_at == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)


def test_several_processes_that_see_it_together_begin_one_life(settings: Settings, redis: Redis) -> None:
    def claim(_: int) -> None:
        with worker_resources(settings) as resources:
            resources.claim()

    for expected in (["new"], ["new", "empty"]):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(claim, range(16)))
        assert [found for found, *_ in rows(settings, FOUND)] == expected
        redis.flushdb()


def test_without_memory_no_life_begins_and_it_does_once_there_is_some(
    emptied_database_url: str, own_redis: Server
) -> None:
    settings = settings_for(emptied_database_url, own_redis.url)
    with Redis.from_url(own_redis.url) as redis, worker_resources(settings) as resources:
        redis.flushall()
        resources.claim()
        redis.flushall()
        redis.set(keys.PARTITION_COUNT, settings.partitions)
        redis.config_set("maxmemory", 1)
        try:
            resources.claim()
        finally:
            redis.config_set("maxmemory", 0)
        assert rows(settings, FOUND) == [("new", None, None)]
        assert losses(resources) == ["empty"]
        resources.claim()
        assert rows(settings, FOUND) == [("new", None, None), ("empty", None, None)]


def test_the_table_keeps_who_and_why_together(settings: Settings, resources: Resources) -> None:
    resources.claim()
    broken: list[Callable[[], object]] = [
        lambda: execute(settings, "UPDATE redis_life SET acknowledged_by = 'jane'"),
        lambda: execute(settings, "UPDATE redis_life SET found = 'other'"),
        lambda: execute(settings, "INSERT INTO redis_life (token, found) SELECT token, 'empty' FROM redis_life"),
    ]
    for each in broken:
        with pytest.raises(psycopg.errors.IntegrityError):
            each()
    with pytest.raises(BadInput):
        acknowledge(resources, actor="", reason="x")
