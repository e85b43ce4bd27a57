"""Scenario 10: a platform stops a dyno: SIGTERM to all its processes, more than once, and in the end SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tests.faults.house import SLOW_SECONDS, House, is_frozen, let_pass
from tests.support.ledger import rows
from tests.support.waiting import wait_until
from worker import crash
from worker.demo.processes import children, kill_tree

# RQ drops the job at a second SIGTERM that comes this long after the first.
RQ_PATIENCE_SECONDS = 1


@pytest.mark.scenario(number=10)
def test_sigterm_three_times_lets_the_batch_in_hand_finish(house: House) -> None:
    patient = house.settings_with(
        lock_timeout_ms=20_000, statement_timeout_ms=20_000, hand_grace_ms=25_000, stop_timeout_seconds=25
    )
    with house.dyno(settings=patient) as dyno:
        with accounts_locked(house):
            house.emit(40)
            wait_until(lambda: waits_for_a_lock(house), "the worker waits in its batch", SLOW_SECONDS)
            terminate(dyno)
            let_pass(1.1 * RQ_PATIENCE_SECONDS)
            for _ in range(2):
                terminate(dyno)
            assert waits_for_a_lock(house)
        assert dyno.wait(patient.stop_timeout_seconds) == 0
        assert "killing it" not in house.log_of(dyno)
    assert house.recorded() > 0
    house.resend()
    house.drain()
    house.prove()


@contextmanager
def accounts_locked(house: House) -> Iterator[None]:
    """Lock all accounts for the length of the block, so that every batch waits."""
    assert house.settings.database_url is not None
    with psycopg.connect(house.settings.database_url) as connection:
        connection.execute("SELECT 1 FROM account FOR UPDATE")
        yield
        connection.rollback()


def waits_for_a_lock(house: House) -> bool:
    return bool(rows(house.settings, "SELECT 1 FROM pg_locks WHERE NOT granted"))


@pytest.mark.scenario(number=10)
@pytest.mark.parametrize("by", [pytest.param("supervisor", marks=pytest.mark.slow), "platform"])
def test_a_worker_that_does_not_stop_in_time_is_killed_and_loses_nothing(house: House, by: str) -> None:
    hasty = house.settings_with(stop_timeout_seconds=1)
    house.emit(40)
    with house.dyno(settings=hasty, crash_at=crash.FREEZE + "rows_written") as dyno:
        (worker,) = children(dyno.pid)
        wait_until(lambda: is_frozen(worker), "the worker is stuck in its batch", SLOW_SECONDS)
        for _ in range(3):
            terminate(dyno)
        if by == "platform":
            kill_tree(dyno.pid)
        assert dyno.wait(SLOW_SECONDS) == (0 if by == "supervisor" else -signal.SIGKILL)
    assert house.recorded() == 0
    with house.dyno():
        house.wait_until_drained()
        house.resend()
        house.wait_until_drained()
    house.prove()


def terminate(dyno: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to both processes of a dyno."""
    for pid in (*children(dyno.pid), dyno.pid):
        os.kill(pid, signal.SIGTERM)
