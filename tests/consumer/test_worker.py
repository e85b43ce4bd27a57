"""The real worker command: started, signalled and killed as a platform would do it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import rows
from tests.support.processes import dyno, worker_process_of
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import backlog
from tests.support.waiting import wait_until
from worker import crash
from worker.admin import accounts, dead_letters
from worker.client import Billing
from worker.consumer import jobs
from worker.keyspace import keys
from worker.reports.proof import verify_ledger
from worker.resources import Resources

METER = "premium_voice"
USERS = [f"user-{number}" for number in range(40)]


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(database_url, redis_url)


@pytest.fixture
def resources(settings: Settings) -> Iterator[Resources]:
    with worker_resources(settings) as opened:
        accounts.open_many(opened, USERS, "basic")
        yield opened


def emit(settings: Settings, count: int, start: int = 0) -> list[tuple[str, str]]:
    """Emit events of all users in turn; returns their identities."""
    sent = []
    with Billing.connect(settings) as billing:
        for number in range(start, start + count):
            user = USERS[number % len(USERS)]
            billing.emit(user, METER, 1 + number % 7, event_id=f"e{number}")
            sent.append((user, f"e{number}"))
    return sent


def assert_each_once(settings: Settings, redis: Redis, resources: Resources, sent: list[tuple[str, str]]) -> None:
    """The oracle: every accepted event is in the log once, streams and pending are empty, every balance is proved."""
    wait_until(lambda: backlog(settings, redis) == 0, "streams are empty", seconds=20)
    wait_until(lambda: not list(redis.scan_iter(keys.PENDING_PATTERN)), "nothing is pending")
    assert sorted(rows(settings, "SELECT user_id, event_id FROM usage_log")) == sorted(sent)
    assert dead_letters.listed(resources) == []
    assert verify_ledger(resources).differences == []


def test_burst_empties_the_streams_and_leaves_no_process(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    sent = emit(settings, 200)
    with dyno(settings, "--burst") as process:
        assert process.wait(timeout=30) == 0
    assert_each_once(settings, redis, resources, sent)
    assert subprocess.run(["pgrep", "-P", str(process.pid)], check=False).returncode == 1


def test_events_are_billed_while_it_runs_with_and_without_a_doorbell(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    with dyno(settings):
        sent = emit(settings, 50)
        wait_until(lambda: backlog(settings, redis) == 0, "the doorbell was heard", seconds=20)
        raw = {"event_id": "raw", "user_id": USERS[0], "meter": METER, "quantity": 1}
        redis.xadd(keys.partition_of(USERS[0], 8).entries, {"v": "1", "e": json.dumps(raw)})
        assert_each_once(settings, redis, resources, [*sent, (USERS[0], "raw")])


def test_sigterm_three_times_to_every_process_finishes_the_batch(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    sent = emit(settings, 1_000)
    with dyno(settings) as process:
        wait_until(lambda: 0 < backlog(settings, redis) < 1_000 or not backlog(settings, redis), "it began", 20)
        for _ in range(3):
            child = worker_process_of(process)
            for pid in (process.pid, child):
                if pid is not None and process.poll() is None:
                    os.kill(pid, signal.SIGTERM)
        assert process.wait(timeout=25) == 0
    with dyno(settings, "--burst") as second:
        assert second.wait(timeout=30) == 0
    assert_each_once(settings, redis, resources, sent)


def test_a_worker_process_that_dies_is_started_again(settings: Settings, redis: Redis, resources: Resources) -> None:
    with dyno(settings) as process:
        sent = emit(settings, 40)
        wait_until(lambda: backlog(settings, redis) == 0, "the first worker works", seconds=20)
        first = worker_process_of(process)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        sent += emit(settings, 40, start=40)
        assert_each_once(settings, redis, resources, sent)
        assert worker_process_of(process) != first


# The fault matrix has all of these points in its fast half.
@pytest.mark.parametrize(
    "label",
    [
        "inside_transaction",
        "after_commit",
        *(pytest.param(label, marks=pytest.mark.slow) for label in ("after_read", "rows_written", "after_publish")),
    ],
)
def test_killed_anywhere_another_worker_goes_on(
    settings: Settings, redis: Redis, resources: Resources, label: str
) -> None:
    sent = emit(settings, 300)
    with dyno(settings, **{crash.VARIABLE: label}) as doomed:
        wait_until(lambda: any(redis.exists(p.hand) for p in keys.partitions_of(8)), "a batch is in hand", seconds=20)
        wait_until(lambda: worker_process_died(doomed), "the worker died at the crash point", seconds=20)
    with dyno(settings):
        assert_each_once(settings, redis, resources, sent)


def worker_process_died(process: subprocess.Popen[str]) -> bool:
    """True once the dyno's worker has been killed: it is gone, or a zombie that its supervisor has not buried yet."""
    pid = worker_process_of(process)
    if pid is None:
        return True
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return True


def test_an_event_that_kills_its_worker_ends_as_a_dead_letter(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    sent = emit(settings, 200)
    poison = sent[120]
    quick = {"METERFALL_HAND_GRACE_MS": "100", "METERFALL_SWEEP_INTERVAL_MS": "100"}
    with dyno(settings, **{crash.VARIABLE: f"poison:{poison[1]}"}, **quick):
        wait_until(lambda: bool(dead_letters.listed(resources)), "the poison is found", seconds=60)
        wait_until(lambda: backlog(settings, redis) == 0, "its neighbours are billed", seconds=20)
    (letter,) = dead_letters.listed(resources)
    assert (letter.reason, json.loads(letter.payload)["event_id"]) == ("poison", poison[1])
    sent.remove(poison)
    assert sorted(rows(settings, "SELECT user_id, event_id FROM usage_log")) == sorted(sent)
    assert list(redis.scan_iter(keys.PENDING_PATTERN)) == []
    assert verify_ledger(resources).differences == []


def test_nonsense_on_the_doorbell_is_ignored(settings: Settings, redis: Redis, resources: Resources) -> None:
    redis.rpush(keys.BELL, "p3", "-1", "999", b"\xff")
    with dyno(settings) as process:
        assert_each_once(settings, redis, resources, emit(settings, 40))
        assert process.poll() is None


def test_burst_ends_after_its_worker_was_killed(settings: Settings, redis: Redis, resources: Resources) -> None:
    sent = emit(settings, 400)
    with dyno(settings, "--burst") as process:
        wait_until(lambda: any(redis.exists(p.hand) for p in keys.partitions_of(8)), "a batch is in hand", seconds=20)
        pid = worker_process_of(process)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=30) == 0
    assert_each_once(settings, redis, resources, sent)


def test_two_dynos_share_the_work(settings: Settings, redis: Redis, resources: Resources) -> None:
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(dyno(settings))
        sent = emit(settings, 1_000)
        assert_each_once(settings, redis, resources, sent)


def test_expired_holds_leave_pending_without_anybody_asking(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    with Billing.connect(settings) as billing, dyno(settings):
        billing.reserve(USERS[0], METER, 10, key="job-1", ttl_seconds=1)
        wait_until(lambda: not list(redis.scan_iter(keys.PENDING_PATTERN)), "the hold expired", seconds=20)
        assert billing.check(USERS[0], METER).pending == 0


def test_another_number_of_partitions_is_refused(settings: Settings, resources: Resources) -> None:
    with dyno(settings, "--burst") as process:
        assert process.wait(timeout=30) == 0
    with dyno(settings, METERFALL_PARTITIONS="4") as refused:
        _, errors = refused.communicate(timeout=30)
    assert refused.returncode == 2
    assert errors == "meterfall: METERFALL_PARTITIONS: this ledger has 8 partitions, not 4\n"


def test_jobs_keep_the_names_that_an_older_worker_knows(settings: Settings, redis: Redis) -> None:
    """Old and new workers share one queue during a rolling deploy, and a queue outlives a release."""
    names = {"drain": (0,), "expire_holds": (0,), "roll_up": (0,), "renew_due": (), "verify": ()}
    queue = jobs.job_queue(settings, redis)
    for name, partitions in names.items():
        jobs.enqueue(queue, name, *map(keys.Partition, partitions))
    found = {job.func_name: job.func for job in queue.jobs}
    assert found == {f"worker.jobs.{name}": getattr(jobs, name) for name in names}
    assert {str(job.func_name).rpartition(".")[2]: tuple(job.args) for job in queue.jobs} == names
