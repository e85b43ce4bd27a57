"""Scenarios 8 and 9: a server goes down in the middle of a batch, and comes back on its data."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import pytest

from schemas.events import UsageEvent
from tests.faults.house import SLOW_SECONDS, House, thaw
from tests.support.waiting import wait_until
from worker.keyspace import keys


@pytest.mark.scenario(number=8)
def test_redis_killed_in_the_middle_of_a_batch_has_what_it_confirmed(house: House) -> None:
    house.emit(40)
    unsure: list[UsageEvent] = []
    with house.frozen_at("after_commit") as worker:
        with producing(house, unsure):
            sent = len(house.accepted.events)
            wait_until(lambda: len(house.accepted.events) > sent + 40, "a producer is at work", SLOW_SECONDS)
            house.redis_server.kill()
            wait_until(lambda: bool(unsure), "the producer noticed", SLOW_SECONDS)
        thaw(worker)
        wait_until_halted(house, worker)
        house.redis_server.start()
        assert house.redis.xlen(keys.Partition(0).entries), "confirmed and not published"
        with house.dyno():
            assert house.send(unsure) == []
            house.wait_until_drained()
    house.prove()


@contextmanager
def producing(house: House, unsure: list[UsageEvent]) -> Iterator[None]:
    """Emit for the length of the block, or until Redis does not confirm."""
    enough = Event()

    def produce() -> None:
        while not enough.is_set() and not unsure:
            unsure.extend(house.send(house.new_events(4)))

    thread = Thread(target=produce)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


@pytest.mark.scenario(number=9)
def test_postgres_stopped_at_once_in_the_middle_of_a_transaction_rolls_back(house: House) -> None:
    house.emit(40)
    with house.frozen_at("rows_written") as worker:
        house.postgres.stop(signal.SIGQUIT)
        assert "immediate shutdown" in house.postgres.log_tail()
        thaw(worker)
        wait_until_halted(house, worker)
        house.postgres.start()
        assert house.recorded() == 0
        with house.dyno():
            house.wait_until_drained()
            house.resend()
            house.wait_until_drained()
    house.prove()


def wait_until_halted(house: House, worker: subprocess.Popen[bytes]) -> None:
    """Return once a worker has given up its batch for now."""
    wait_until(lambda: "halted, nothing is lost" in house.log_of(worker), "the worker gave up", SLOW_SECONDS)
