"""Scenario 17: a job runs out of time while Postgres works for it.

RQ's time-out is a signal: it arms SIGALRM when a job begins, and its handler raises JobTimeoutException at any point
of the job. A test sends SIGALRM itself, so the same handler raises the same exception at a moment of the test's choice.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.faults.house import SLOW_SECONDS, House
from tests.support.ledger import rows
from tests.support.waiting import wait_until
from worker.demo.processes import children

TIMED_OUT = "failed: JobTimeoutException"
COMMIT_SECONDS = 2

_SLOW_COMMIT = f"""
    CREATE FUNCTION slow_commit() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN PERFORM pg_sleep({COMMIT_SECONDS}); RETURN NULL; END';
    CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON usage_log DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (NEW.event_id = 'e0') EXECUTE FUNCTION slow_commit();
"""


@pytest.mark.scenario(number=17)
def test_a_job_that_runs_out_of_time_in_a_query_gives_its_locks_back(house: House) -> None:
    # The query waits longer than its job lives; the statement's own time-out ends it later.
    seconds = 2
    named = house.settings_with(lock_timeout_ms=60_000, statement_timeout_ms=1_000 * seconds, hand_grace_ms=5_000)
    with house.dyno(settings=named) as dyno, house.connected() as holder:
        holder.execute("SELECT 1 FROM account FOR UPDATE")
        house.emit(40)
        backend = backend_that(house, "wait_event_type = 'Lock'")
        run_out_of_time(house, dyno.pid)
        wait_until(lambda: TIMED_OUT in house.log_of(dyno), "its job failed", SLOW_SECONDS)
        wait_until(lambda: not is_there(house, backend), "its connection is gone, and its locks", seconds + 3)
        assert house.recorded() == 0
        holder.rollback()
        house.wait_until_drained()
        house.resend()
        house.wait_until_drained()
    house.prove()


@pytest.mark.slow
@pytest.mark.scenario(number=17)
def test_a_job_that_runs_out_of_time_in_a_commit_finds_its_events_applied(house: House) -> None:
    with house.dyno() as dyno, slow_commits(house):
        house.emit(40)
        backend = backend_that(house, "wait_event = 'PgSleep'")
        run_out_of_time(house, dyno.pid)
        wait_until(lambda: TIMED_OUT in house.log_of(dyno), "its job failed", SLOW_SECONDS)
        wait_until(lambda: not is_there(house, backend), "its connection is gone, and its locks", COMMIT_SECONDS + 3)
        assert house.recorded(), "the COMMIT went on without it"
        house.wait_until_drained()
        house.resend()
        house.wait_until_drained()
    house.prove()


def run_out_of_time(house: House, dyno: int) -> None:
    """Send the alarm that the kernel would send at RQ's time-out."""
    (worker,) = children(dyno)
    os.kill(worker, signal.SIGALRM)


@contextmanager
def slow_commits(house: House) -> Iterator[None]:
    """Make the COMMIT that records event `e0` slow."""
    with house.connected() as connection:
        connection.execute(_SLOW_COMMIT)
    try:
        yield
    finally:
        with house.connected() as connection:
            connection.execute("DROP TRIGGER slow_commit ON usage_log; DROP FUNCTION slow_commit()")


def backend_that(house: House, does: str) -> int:
    """Return the id of the one server process in the state `does`, as soon as there is one."""
    found: list[int] = []

    def look() -> bool:
        query = f"SELECT pid FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() AND {does}"
        found[:] = [int(str(pid)) for (pid,) in rows(house.settings, query)]
        return bool(found)

    wait_until(look, f"a backend: {does}", SLOW_SECONDS)
    return found[0]


def is_there(house: House, backend: int) -> bool:
    return bool(rows(house.settings, "SELECT 1 FROM pg_stat_activity WHERE pid = %s", backend))
