"""Scenario 18: the network swallows all bytes and closes no connection. Waits time out, and work goes on by itself.

When the hole opens again, the swallowed bytes arrive late, beside the retries.
"""

from __future__ import annotations

import os
import signal
from time import monotonic

import pytest

from schemas.answers import Reason
from tests.faults.house import METER, SLOW_SECONDS, House, is_frozen
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.crash import FREEZE
from worker.demo.processes import children
from worker.errors import LedgerUnavailable
from worker.keyspace import keys

# Attempts of a client or a worker on Redis, and the time-out of each.
TIMEOUT_MS = 400
ATTEMPTS = 2
QUICK = {
    "redis_socket_timeout_ms": TIMEOUT_MS, "redis_check_timeout_ms": TIMEOUT_MS, "redis_retries": ATTEMPTS - 1,
    "redis_down_pause_ms": 0,
}  # fmt: skip
# A loaded machine adds to it, but stays below one more round of any unbounded wait.
SLACK_SECONDS = 4


@pytest.mark.scenario(number=18)
@pytest.mark.parametrize("mode", ["ledger", "deny"])
def test_a_client_gives_a_silent_redis_up_in_time_and_goes_on_when_it_answers(house: House, mode: str) -> None:
    user = house.users[0]
    events = house.new_events(8)
    with house.proxied_redis() as (proxy, behind):
        named = behind.model_copy(update={**QUICK, "redis_down": mode})
        with Billing.connect(named) as producer:
            producer.check(user, METER)
            producer._recording.replies([("PING",)])  # so that events are on their way before anything is silent
            proxy.black_hole()
            start = monotonic()
            unsure = house.send(events, through=producer)
            answer = producer.check(user, METER)
            assert monotonic() - start < 2 * ATTEMPTS * TIMEOUT_MS / 1_000 + SLACK_SECONDS
            assert (answer.allowed, answer.reason) == {
                "ledger": (True, Reason.WITHIN_LIMIT),
                "deny": (False, Reason.REDIS_DOWN_DENIED),
            }[mode]
            assert {event.event_id for event in unsure} == {event.event_id for event in events}, "all of it comes back"
            proxy.forward()
            assert house.send(unsure, through=producer) == []
            assert producer.check(user, METER).allowed
            wait_until(lambda: house.backlog() == 2 * len(events), "what was swallowed has arrived", SLOW_SECONDS)
    house.drain()
    house.prove()


@pytest.mark.scenario(number=18)
@pytest.mark.parametrize("connection", ["new", "open"])
def test_a_client_gives_a_silent_postgres_up_in_time_and_goes_on_when_it_answers(house: House, connection: str) -> None:
    user, other, *_ = house.users
    with house.proxied_postgres() as (proxy, behind):
        named = behind.model_copy(
            update={"database_connect_timeout_seconds": 2, "statement_timeout_ms": 1_000, "ledger_answer_grace_ms": 500}
        )
        bound = {"new": named.database_connect_timeout_seconds, "open": 1.5}[connection]
        with Billing.connect(named) as producer:
            if connection == "open":
                forget_balance(house, other)
                producer.check(other, METER)
            proxy.black_hole()
            forget_balance(house, user)
            start = monotonic()
            with pytest.raises(LedgerUnavailable):
                producer.check(user, METER)
            # A client first tests an open connection, and replaces a dead one.
            assert monotonic() - start < named.database_connect_timeout_seconds + bound + SLACK_SECONDS
            proxy.forward()
            assert producer.check(user, METER).allowed
    house.prove()


def forget_balance(house: House, user: str) -> None:
    """Delete the cached balance, so that the next call asks the ledger."""
    assert house.redis.delete(keys.account_of(user, house.settings.partitions).balance)


@pytest.mark.slow
@pytest.mark.scenario(number=18)
def test_a_worker_in_the_middle_of_a_batch_survives_a_silent_redis(house: House) -> None:
    with house.proxied_redis() as (proxy, behind):
        named = behind.model_copy(update=QUICK)
        with house.dyno(settings=named, crash_at=FREEZE + "after_commit") as dyno:
            house.emit(40)
            wait_until(lambda: house.recorded() > 0, "a batch is committed", SLOW_SECONDS)
            (worker,) = children(dyno.pid)
            wait_until(lambda: is_frozen(worker), "the worker is frozen before it publishes", SLOW_SECONDS)
            proxy.black_hole()
            start = monotonic()
            os.kill(worker, signal.SIGCONT)
            wait_until(lambda: "halted, nothing is lost" in house.log_of(dyno), "the worker gave up", SLOW_SECONDS)
            wait_until(lambda: "is away, trying again" in house.log_of(dyno), "so did its supervisor", SLOW_SECONDS)
            # The batch before this, this one and the mark, one after the other.
            assert monotonic() - start < 4 * ATTEMPTS * TIMEOUT_MS / 1_000 + SLACK_SECONDS
            assert house.backlog()
            proxy.forward()
            house.wait_until_drained(2 * SLOW_SECONDS)
            house.resend()
            house.wait_until_drained()
    house.prove()


@pytest.mark.slow
@pytest.mark.scenario(number=18)
def test_a_worker_in_the_middle_of_a_batch_survives_a_silent_postgres(house: House) -> None:
    with house.proxied_postgres() as (proxy, behind):
        named = behind.model_copy(
            update={"job_timeout_seconds": 10, "statement_timeout_ms": 2_000, "database_connect_timeout_seconds": 2}
        )
        with house.dyno(settings=named, crash_at=FREEZE + "inside_transaction") as dyno:
            house.emit(40)
            (worker,) = children(dyno.pid)
            wait_until(lambda: is_frozen(worker), "the worker is frozen in its transaction", SLOW_SECONDS)
            proxy.black_hole()
            start = monotonic()
            os.kill(worker, signal.SIGCONT)
            wait_until(lambda: "halted, nothing is lost" in house.log_of(dyno), "the worker gave up", SLOW_SECONDS)
            assert monotonic() - start < named.job_timeout_seconds + SLACK_SECONDS
            assert house.recorded() == 0
            proxy.forward()
            house.wait_until_drained()
            house.resend()
            house.wait_until_drained()
    house.prove()
