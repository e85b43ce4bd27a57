"""A Redis out of memory: it refuses writes, and work that deletes stream entries goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from redis import Redis

from config.settings import Settings
from schemas.events import UsageEvent
from tests.support.ledger import rows
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import backlog
from tests.support.waiting import wait_until
from worker.admin import accounts
from worker.client import Billing
from worker.demo.servers import Binary, Server, redis_binaries, redis_server
from worker.errors import RedisUnavailable
from worker.keyspace import keys
from worker.reports.proof import verify_ledger
from worker.resources import Resources

# It is about a server of its own.
pytestmark = pytest.mark.once

METER = "premium_voice"
USERS = [f"user-{number}" for number in range(40)]
# Several times what a dyno itself takes of it, with its scripts, connections and queue: that cannot be emptied.
ROOM_BYTES = 4 * 2**20


@pytest.fixture(
    scope="module", params=list(redis_binaries(os.environ)), ids=lambda binary: binary.label if binary else ""
)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A Redis that only this module uses, and may fill: each kind that can be started."""
    binary: Binary = request.param
    with redis_server(binary) as started:
        yield started


@pytest.fixture
def settings(emptied_database_url: str, server: Server) -> Iterator[Settings]:
    with Redis.from_url(server.url) as redis:
        redis.flushall()
        yield settings_for(emptied_database_url, server.url)
        redis.config_set("maxmemory", 0)


@pytest.fixture
def resources(settings: Settings) -> Iterator[Resources]:
    with worker_resources(settings) as opened:
        accounts.open_many(opened, USERS, "basic")
        yield opened


def fill(settings: Settings, redis: Redis) -> tuple[list[str], list[UsageEvent]]:
    """Emit until Redis refuses. Returns the ids that it has confirmed, and the events that it has not."""
    memory = int(redis.info("memory")["used_memory"])
    redis.config_set("maxmemory", memory + ROOM_BYTES)
    confirmed: list[str] = []
    with Billing.connect(settings) as billing:
        for number in range(20_000):
            try:
                billing.emit(USERS[number % 40], METER, 1, event_id=f"e{number}", reference_id="x" * 200)
            except RedisUnavailable as error:
                return confirmed, list(error.events)
            confirmed.append(f"e{number}")
    raise AssertionError("Redis was never full")


def applied(settings: Settings) -> list[str]:
    return sorted(str(row[0]) for row in rows(settings, "SELECT event_id FROM usage_log"))


def test_a_worker_that_starts_on_a_full_redis_empties_it(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    confirmed, refused = fill(settings, redis)
    assert len(confirmed) > 500
    assert [event.event_id for event in refused] == [f"e{len(confirmed)}"]
    with dyno(settings):
        wait_until(lambda: backlog(settings, redis) == 0, "the streams are empty", seconds=40)
        with Billing.connect(settings) as billing:
            billing.emit_events(refused)
        wait_until(lambda: len(applied(settings)) > len(confirmed), "what was refused is applied, too", seconds=20)
    assert applied(settings) == sorted([*confirmed, refused[0].event_id])
    wait_until(lambda: not list(redis.scan_iter(keys.PENDING_PATTERN)), "nothing is pending")
    assert verify_ledger(resources).differences == []


def test_a_worker_drains_while_no_memory_becomes_free_and_has_jobs_again_once_it_is(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    with Billing.connect(settings) as billing, dyno(settings, METERFALL_RENEW_INTERVAL_SECONDS="1") as process:
        billing.emit(USERS[0], METER, 1, event_id="first")
        wait_until(lambda: applied(settings) == ["first"], "it works", seconds=20)
        # All of it at once, so that the worker finds no moment in between.
        with redis.pipeline(transaction=True) as pipe:
            for number, user in enumerate(USERS):
                event = UsageEvent(event_id=f"e{number:02}", user_id=user, meter=METER, quantity=1)
                pipe.xadd(keys.partition_of(user, 8).entries, {"v": "1", "e": event.model_dump_json()})
            pipe.config_set("maxmemory", 1)
            pipe.execute()
        expected = sorted(["first", *(f"e{number:02}" for number in range(len(USERS)))])
        wait_until(lambda: applied(settings) == expected, "all are applied by a Redis without memory", seconds=40)
        wait_until(lambda: backlog(settings, redis) == 0, "the streams are empty")
        assert process.poll() is None
        redis.config_set("maxmemory", 0)
        redis.delete(keys.RENEWED)
        wait_until(lambda: redis.exists(keys.RENEWED) == 1, "periodic jobs are enqueued again", seconds=20)
        billing.emit(USERS[0], METER, 1, event_id="last")
        wait_until(lambda: "last" in applied(settings), "events are applied again", seconds=20)
    assert verify_ledger(resources).differences == []
