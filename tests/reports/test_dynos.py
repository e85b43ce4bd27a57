"""Heartbeats: who lives, and what `status` and `health` make of it."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta

from redis import Redis

from config.settings import Settings
from schemas.status import Dyno
from tests.support.processes import dyno, worker_process_of
from tests.support.waiting import wait_until
from worker.cli.status_text import status_lines
from worker.consumer.heart import drop_old
from worker.keyspace import keys
from worker.reports.dynos import clock, name_of, read_dynos
from worker.reports.health import Limits, findings
from worker.reports.status import read_status
from worker.resources import Resources

LIMITS = Limits(60, 0, 0)


def process(role: str, pid: int, now: datetime, *, seen: float = 0, **about: object) -> Dyno:
    """A process that began an hour ago and was seen `seen` seconds ago."""
    times = {"since": now, "started_at": now - timedelta(hours=1), "seen_at": now - timedelta(seconds=seen)}
    named = {"host": "a", "pid": pid, "parent_pid": 1, "role": role, "release": "1.0", "revision": "0010"}
    return Dyno.model_validate({**named, "catalogue": "c", "doing": "idle", **times, **about})


def test_a_dyno_and_its_worker_processes_are_seen_until_they_end(settings: Settings, redis: Redis) -> None:
    with dyno(settings, "--processes", "2") as running:
        wait_until(lambda: len(read_dynos(redis)) == 4, "all four have a heartbeat", seconds=30)
        found = {one.pid: one for one in read_dynos(redis)}
        assert found[running.pid].role == "supervisor"
        workers = [one for one in found.values() if one.role == "worker"]
        assert [one.parent_pid for one in workers] == [running.pid] * 2
        assert [one.parent_pid for one in found.values() if one.role == "proof"] == [running.pid]
        killed = worker_process_of(running)
        assert killed in {one.pid for one in workers}
        os.kill(killed, signal.SIGSTOP)
        first = found[killed].seen_at
        others = [pid for pid in found if pid != killed]
        wait_until(
            lambda: all(one.seen_at > first + timedelta(seconds=4) for one in read_dynos(redis) if one.pid in others),
            "the others go on", seconds=20,
        )  # fmt: skip
        os.kill(killed, signal.SIGCONT)
        running.terminate()
        running.communicate(timeout=30)
        assert read_dynos(redis) == [], "they took themselves off the list"


def test_old_and_broken_heartbeats_are_dropped(redis: Redis) -> None:
    now = clock(redis)
    for pid, seen in ((1, 0), (2, 16), (3, 3_700)):
        one = process("worker", pid, now, seen=seen)
        redis.hset(keys.DYNOS, name_of(one), one.model_dump_json())
    redis.hset(keys.DYNOS, "a:4:worker", "{}")
    newer = process("worker", 5, now).model_dump_json()[:-1] + ',"more":1}'
    redis.hset(keys.DYNOS, "a:5:worker", newer)
    assert [one.pid for one in read_dynos(redis)] == [1, 5]
    drop_old(redis)
    assert sorted(redis.hkeys(keys.DYNOS)) == [b"a:1:worker", b"a:2:worker", b"a:5:worker"]
    assert name_of(read_dynos(redis)[0]) == "a:1:worker"


def test_health_tells_a_dyno_without_a_worker_process(redis: Redis, resources: Resources) -> None:
    now = datetime.now(UTC)
    led = process("supervisor", 1, now), process("worker", 10, now, parent_pid=1)
    bare = process("supervisor", 2, now)
    young = process("supervisor", 3, now, started_at=now)
    status = read_status(resources).model_copy(update={"is_led": True, "dynos": (*led, bare, young)})
    (found,) = [one for one in findings(status, LIMITS) if one.check == "workers"]
    assert (found.severity, found.text) == ("degraded", "1 of 3 dynos have no live worker process: a pid 2")
    fine = status.model_copy(update={"dynos": (*led, young)})
    assert "workers" not in {one.check for one in findings(fine, LIMITS)}
    gone = status.model_copy(update={"is_led": False, "dynos": ()})
    assert [one.severity for one in findings(gone, LIMITS) if one.check == "workers"] == ["down"]


def test_status_shows_dynos_and_remarks_on_releases_and_catalogues(redis: Redis, resources: Resources) -> None:
    now = datetime.now(UTC)
    status = read_status(resources)
    digest = status.catalogue
    dynos = process("supervisor", 1, now, catalogue=digest), process("worker", 2, now, catalogue=digest)
    shown = "\n".join(status_lines(status.model_copy(update={"dynos": dynos})))
    assert "1 dyno, 1 worker process, release 1.0\n" in shown
    assert "processes of several releases" not in shown
    assert "is in force" not in shown
    mixed = *dynos, process("worker", 3, now, release="2.0")
    shown = "\n".join(status_lines(status.model_copy(update={"dynos": mixed})))
    assert "1 dyno, 2 worker processes, releases 1.0, 2.0\n" in shown
    assert "processes of several releases: 1.0 in 2, 2.0 in 1" in shown
    assert f"catalogue c is in 1 process; {digest} is in force" in shown
