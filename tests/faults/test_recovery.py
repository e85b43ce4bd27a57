"""Work goes on by itself soon after a server comes back, after any outage, or starts for the first time."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.house import RECOVERY_SECONDS, SLOW_SECONDS, House, let_pass
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.demo.processes import children
from worker.demo.servers import Server

# A restart; and an outage long enough that waits which double each time would reach half a minute.
AWAY_SECONDS = [pytest.param(1, id="restart"), pytest.param(40, id="outage", marks=pytest.mark.slow)]
SERVERS = ["redis_server", "postgres"]


@pytest.mark.parametrize("away_seconds", AWAY_SECONDS)
@pytest.mark.parametrize("name", SERVERS)
def test_work_goes_on_soon_after_a_server_has_come_back(house: House, name: str, away_seconds: int) -> None:
    server: Server = getattr(house, name)
    with house.dyno() as dyno:
        house.emit(40)
        server.kill()
        let_pass(away_seconds)
        server.start()
        house.emit(8)
        house.wait_until_drained(RECOVERY_SECONDS)
        assert dyno.poll() is None
        assert house.log_of(dyno).count("ended with") <= 1, "a worker process that lost Redis is started again, once"
        house.resend()
        house.wait_until_drained()
    house.prove()


def test_a_worker_process_that_starts_in_an_outage_waits_for_its_end(house: House) -> None:
    with house.dyno() as dyno:
        house.redis_server.kill()
        wait_until(lambda: "is away, trying again" in house.log_of(dyno), "the supervisor noticed", SLOW_SECONDS)
        for worker in children(dyno.pid):
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: "waits for Redis" in house.log_of(dyno), "its successor waits", SLOW_SECONDS)
        ended = house.log_of(dyno).count("ended with")
        let_pass(2)
        house.redis_server.start()
        house.emit(8)
        house.wait_until_drained(RECOVERY_SECONDS)
        assert house.log_of(dyno).count("ended with") == ended, "one process waited all the time"
    house.prove()


@pytest.mark.parametrize("name", SERVERS)
def test_a_dyno_that_starts_before_its_servers_waits_for_them(house: House, name: str) -> None:
    server: Server = getattr(house, name)
    house.emit(40)
    server.kill()
    with house.run("worker", "worker", "run") as dyno:
        wait_until(lambda: "is away, trying again" in house.log_of(dyno), "it waits", SLOW_SECONDS)
        let_pass(1.5)
        server.start()
        house.wait_until_drained(RECOVERY_SECONDS)
        lines = [line for line in house.log_of(dyno).splitlines() if "WARNING" in line and "trying again" in line]
        warnings = [line.partition("WARNING")[2] for line in lines]
        assert len(warnings) == len(set(warnings)), "the same is not said every second"
        assert " answers" in house.log_of(dyno)
    house.prove()


@pytest.mark.parametrize("name", SERVERS)
def test_a_dyno_that_waits_for_a_server_ends_when_it_is_told_to(house: House, name: str) -> None:
    server: Server = getattr(house, name)
    server.kill()
    with house.run("worker", "worker", "run") as dyno:
        wait_until(lambda: "is away, trying again" in house.log_of(dyno), "it waits", SLOW_SECONDS)
        dyno.send_signal(signal.SIGTERM)
        assert dyno.wait(RECOVERY_SECONDS) == 0


@pytest.mark.parametrize("name", SERVERS)
def test_a_burst_does_not_wait_for_servers(house: House, name: str) -> None:
    server: Server = getattr(house, name)
    server.kill()
    with house.run("worker", "worker", "run", "--burst") as dyno:
        assert dyno.wait(SLOW_SECONDS) == 1
        assert "does not answer" in house.log_of(dyno)


def test_an_outage_of_postgres_is_no_flood_of_lines(house: House) -> None:
    with house.dyno() as dyno:
        house.postgres.kill()
        house.emit(40)
        wait_until(lambda: "halted, nothing is lost" in house.log_of(dyno), "the first drain gave up", SLOW_SECONDS)
        before = len(house.log_of(dyno).splitlines())
        let_pass(3)
        # Two lines for each of two partitions, about once a second.
        assert len(house.log_of(dyno).splitlines()) - before < 30
        house.postgres.start()
        house.wait_until_drained(RECOVERY_SECONDS)
    house.prove()


def connection_of(billing: Billing) -> int:
    """The number of the connection by which the client's next command travels."""
    (number,) = billing._recording.replies([("CLIENT", "ID")])
    assert isinstance(number, int)
    return number


def test_a_redis_that_is_a_replica_for_a_while_is_worked_with_again(house: House) -> None:
    with house.dyno() as dyno:
        house.emit(40)
        house.wait_until_drained()
        connection = connection_of(house.billing)
        house.redis.replicaof("127.0.0.1", "1")
        unsure = house.send(house.new_events(8))
        assert len(unsure) == 8
        wait_until(lambda: "refuses, trying again: ReadOnlyError" in house.log_of(dyno), "it noticed", SLOW_SECONDS)
        let_pass(2)
        house.redis.replicaof("no", "one")
        assert house.send(unsure) == []
        assert connection_of(house.billing) != connection, "by then the name may have led to the new primary"
        house.wait_until_drained(RECOVERY_SECONDS)
        assert dyno.poll() is None
    house.prove()
