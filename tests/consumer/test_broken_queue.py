"""Keys that are broken, or that nobody may touch: RQ's, which a dyno can do without, and those of one partition."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import give_accounts, rows
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.consumer import jobs
from worker.consumer.sweep import Sweep
from worker.demo.servers import Server
from worker.keyspace import keys
from worker.reports.dynos import read_dynos
from worker.reports.proof import verify_ledger
from worker.resources import Resources

METER = "premium_voice"
USERS = [f"u{number}" for number in range(16)]


@pytest.fixture
def settings(emptied_database_url: str, own_redis: Server) -> Iterator[Settings]:
    made = settings_for(emptied_database_url, own_redis.url, partitions=4, verify_interval_seconds=0)
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
        give_accounts(made, USERS, "basic")
        yield made
        redis.flushall()


def emit(settings: Settings, first: int, number: int) -> None:
    with Billing.connect(settings) as billing:
        for each in range(first, first + number):
            billing.emit(USERS[each % len(USERS)], METER, 1, event_id=f"e{each}")


def applied(settings: Settings) -> int:
    ((found,),) = rows(settings, "SELECT count(*) FROM usage_log")
    assert isinstance(found, int)
    return found


def prove(settings: Settings) -> None:
    with worker_resources(settings) as resources:
        wait_until(lambda: not list(resources.redis.scan_iter(keys.PENDING_PATTERN)), "nothing is pending")
        assert verify_ledger(resources).differences == []


@pytest.mark.parametrize("fault", ["a corrupted queue", "no right to the queue"])
def test_a_dyno_drains_by_itself_while_rq_cannot_work(settings: Settings, redis: Redis, fault: str) -> None:
    queue = f"rq:queue:{settings.queue_name}"
    redis.execute_command("ACL", "SETUSER", "dyno", "on", "nopass", "~*", "&*", "+@all")
    theirs = settings.model_copy(update={"redis_url": settings.redis_url.replace("unix://", "unix://dyno:any@")})
    try:
        with dyno(theirs, METERFALL_PARTITIONS="4") as process:
            emit(settings, 0, 8)
            wait_until(lambda: applied(settings) == 8, "it works", seconds=30)
            if fault == "a corrupted queue":
                redis.delete(queue)
                redis.set(queue, "no list")
            else:
                redis.execute_command("ACL", "SETUSER", "dyno", "resetkeys", "~mf:*")
            emit(settings, 8, 32)
            wait_until(lambda: applied(settings) == 40, "it drains without jobs", seconds=40)
            assert process.poll() is None
            if fault == "a corrupted queue":
                redis.delete(queue)
            else:
                redis.execute_command("ACL", "SETUSER", "dyno", "~*")
            wait_until(
                lambda: any(one.role == "worker" for one in read_dynos(redis)), "a worker process is back", seconds=40
            )
            emit(settings, 40, 8)
            wait_until(lambda: applied(settings) == 48, "events are applied again", seconds=30)
            process.terminate()
            _, log = process.communicate(timeout=30)
        assert "draining without jobs" in log
    finally:
        redis.execute_command("ACL", "DELUSER", "dyno")
    prove(settings)


@pytest.mark.parametrize("broken", ["entries", "totals", "expiries"])
def test_a_broken_key_of_one_partition_leaves_the_others_their_turn(
    settings: Settings, resources: Resources, broken: str
) -> None:
    redis = resources.redis
    bad, good = keys.partitions_of(4)[:2]
    with closing(jobs.rq_connection(settings)) as connection:
        redis.set(getattr(bad, broken), "of another type")
        resources.claim()
        redis.xadd(good.entries, {"v": "1", "r": USERS[0]})
        redis.zadd(good.expiries, {"u0:premium_voice": 1})
        redis.sadd(good.unrolled, USERS[0])
        redis.sadd(bad.unrolled, USERS[1])
        redis.hset(good.totals, mapping={"events_added": 5, "events_left": 9, "counted_at_ms": 1})
        queue = jobs.job_queue(settings, connection)
        Sweep(settings, redis, queue, jobs.proof_queue(settings, connection)).run()
        found = {job_id.rpartition("-")[0] for job_id in queue.job_ids}
        assert {"drain-1", "expire_holds-1", "roll_up-1", "recount", "renew_due"} <= found
        assert not {"drain-0", "expire_holds-0"} & found


def test_three_worker_processes_bill_each_event_once_and_end_with_their_dyno(settings: Settings, redis: Redis) -> None:
    def workers() -> dict[int, int]:
        """Worker processes by their pids, with their parents."""
        return {one.pid: one.parent_pid for one in read_dynos(redis) if one.role == "worker"}

    with dyno(settings, "--processes", "3", METERFALL_PARTITIONS="4") as process:
        wait_until(lambda: len(workers()) == 3, "three are at work", seconds=40)
        before = workers()
        assert set(before.values()) == {process.pid}
        emit(settings, 0, 200)
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        emit(settings, 200, 200)
        wait_until(lambda: len(workers().keys() - before.keys()) == 1, "another one takes its place", seconds=40)
        wait_until(lambda: applied(settings) == 400, "all are billed", seconds=60)
        seen = before.keys() | workers().keys()
        process.terminate()
        _, log = process.communicate(timeout=40)
    assert process.returncode == 0
    assert f"worker process {killed} ended with -9" in log
    assert [pid for pid in seen if is_alive(pid)] == []
    assert workers().keys() <= {killed}, "those that ended by themselves took themselves off the list"
    assert rows(settings, "SELECT count(*), count(DISTINCT event_id), sum(amount) FROM usage_log") == [(400, 400, 400)]
    prove(settings)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
