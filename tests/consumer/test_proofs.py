"""The proof on a dyno: a queue and a process of its own, one at a time, never before a drain."""

from __future__ import annotations

import os
import signal

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import execute, give_accounts, rows
from tests.support.processes import dyno
from tests.support.resources import worker_resources
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.consumer import jobs
from worker.consumer.supervisor import Supervisor
from worker.keyspace import keys
from worker.reports.dynos import read_dynos
from worker.reports.proof import LedgerWrongError
from worker.reports.proof_result import read_result
from worker.resources import Resources


def test_a_due_proof_waits_once_in_a_queue_of_its_own(settings: Settings, redis: Redis) -> None:
    dynos = [Supervisor(settings, {}) for _ in range(2)]
    drains, proofs = (of(settings, jobs.rq_connection(settings)) for of in (jobs.job_queue, jobs.proof_queue))
    for _ in range(3):
        redis.delete(keys.VERIFIED)  # the interval is over
        for each in dynos:
            each.sweep.run()
    assert [job.func_name for job in proofs.jobs] == ["worker.jobs.verify"]
    assert not [job_id for job_id in drains.job_ids if job_id.startswith("verify")]
    assert proofs.name == f"{drains.name}-proof"


def test_a_dyno_proves_in_a_process_that_gives_way_to_others(settings: Settings, redis: Redis) -> None:
    with dyno(settings):
        wait_until(lambda: read_result(redis) is not None, "the proof has ended", seconds=30)
        found = {one.role: one.pid for one in read_dynos(redis)}
        assert set(found) == {"supervisor", "worker", "proof"}
        niceness = {role: os.getpriority(os.PRIO_PROCESS, pid) for role, pid in found.items()}
        assert niceness["proof"] > niceness["worker"] == niceness["supervisor"]


def test_a_dyno_without_periodic_proofs_has_no_process_for_them(settings: Settings, redis: Redis) -> None:
    with dyno(settings, METERFALL_VERIFY_INTERVAL_SECONDS="0"):
        wait_until(lambda: {one.role for one in read_dynos(redis)} == {"supervisor", "worker"}, "it is up", seconds=30)
        assert not redis.exists(keys.VERIFIED)


def test_a_burst_leaves_the_proof_to_others(settings: Settings, redis: Redis) -> None:
    with dyno(settings, "--burst") as process:
        assert process.wait(30) == 0
    assert read_result(redis) is None
    assert not redis.exists(keys.VERIFIED), "the next dyno proves at once"


# ---------------------------------------------------------------------------------------------------------------------
# Time boxes


def few(settings: Settings, **changes: object) -> Settings:
    """Steps of one account, as if each ledger were a large one."""
    return settings.model_copy(update={"verify_chunk_accounts": 1, **changes})


def test_a_job_re_enqueues_itself_until_the_run_is_over_and_never_piles_up(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_accounts(settings, [f"user-{number}" for number in range(4)], "basic")
    queue = jobs.proof_queue(settings, jobs.rq_connection(settings))
    # One step for each job.
    with worker_resources(few(settings, verify_time_box_seconds=0)) as resources:
        monkeypatch.setattr(jobs, "resources", lambda: resources)
        monkeypatch.setattr(jobs, "_own_queue", lambda: jobs.job_queue(settings, queue.connection))
        jobs.verify()
        assert [(job.func_name, job.args) for job in queue.jobs] == [("worker.jobs.verify", [1])]
        jobs.verify(1)
        assert len(queue.jobs) == 1, "one waits already"
        assert redis.get(keys.PROVING) == b"1"
        assert read_result(redis) is None
        while read_result(redis) is None:
            jobs.verify(1)
        assert not redis.exists(keys.PROVING)
        redis.delete(queue.key)
        jobs.verify(1)  # a late one
        assert (queue.jobs, rows(settings, "SELECT number FROM proof_run")) == ([], [(1,)])


def test_a_sweep_lets_a_job_go_on_with_a_run_that_lost_its_own(settings: Settings, redis: Redis) -> None:
    sweep = Supervisor(settings, {}).sweep
    queue = jobs.proof_queue(settings, jobs.rq_connection(settings))
    redis.set(keys.VERIFIED, 1, ex=3_600)
    sweep.run()
    assert queue.jobs == []
    redis.set(keys.PROVING, 7)
    for _ in range(3):
        sweep.run()
    assert [job.args for job in queue.jobs] == [[7]]


def test_a_difference_fails_the_last_job_of_its_run(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_accounts(settings, ["user-1", "user-2"], "basic")
    execute(settings, "UPDATE account SET trust = 'elite' WHERE user_id = 'user-1'")
    with worker_resources(few(settings, verify_time_box_seconds=60)) as resources:
        monkeypatch.setattr(jobs, "resources", lambda: resources)
        with pytest.raises(LedgerWrongError, match="1 differences"):
            jobs.verify()
    kept = read_result(redis)
    assert kept is not None
    assert (kept.accounts, kept.differences) == (2, 1)
    assert "account trust is elite" in kept.first[0].text


# Each step of one account, and nineteen times as much rest: a minute and more for all.
SLOWLY = {"METERFALL_VERIFY_CHUNK_ACCOUNTS": "1", "METERFALL_VERIFY_LOAD_PERCENT": "5"}


def test_events_are_drained_while_a_proof_of_many_accounts_runs(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    users = [f"user-{number:03}" for number in range(400)]
    give_accounts(settings, users, "basic")
    with dyno(settings, **SLOWLY), Billing.connect(settings) as billing:
        wait_until(lambda: position(settings) > "", "the proof is under way", seconds=40)
        for number in range(500):
            billing.emit(users[number % 50], "premium_voice", 1, event_id=f"e{number}")
        wait_until(lambda: rows(settings, "SELECT count(*) FROM usage_log") == [(500,)], "all are drained", seconds=20)
        assert "" < position(settings) < users[-1], "and the proof is still under way"


def test_a_killed_proof_goes_on_where_it_was(settings: Settings, redis: Redis, resources: Resources) -> None:
    users = [f"user-{number:03}" for number in range(400)]
    give_accounts(settings, users, "basic")
    with dyno(settings, **SLOWLY):
        wait_until(lambda: position(settings) > users[4], "the proof is under way", seconds=40)
        (prover,) = (one.pid for one in read_dynos(redis) if one.role == "proof")
        os.kill(prover, signal.SIGKILL)
        before = position(settings)
        wait_until(lambda: position(settings) > before, "another process goes on", seconds=40)
        assert rows(settings, "SELECT number, finished_at FROM proof_run") == [(1, None)]
        assert len(rows(settings, "SELECT FROM proof_checkpoint")) < len(users)


def position(settings: Settings) -> str:
    """The user after which the run of the proof goes on; '' without one."""
    found = rows(settings, "SELECT after FROM proof_run WHERE finished_at IS NULL")
    return str(found[0][0]) if found else ""
