"""Scenario 16: several transactions lock the same accounts, named in any order.

Two partitions share no users, so no two batches of usage meet. But carry-over locks two accounts at once, renewals lock
many, the pool's batch and closing an account lock both accounts and the pool. And another client may lock rows in an
order of its own. Our order is in worker/ledger/__init__.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg
import pytest

from config.settings import Settings
from tests.faults.house import METER, SLOW_SECONDS, House
from tests.support.ledger import give_account, move_clock, rows
from tests.support.resources import worker_resources
from tests.support.waiting import wait_until
from worker.admin import accounts, credits, erasure
from worker.consumer import renewals
from worker.consumer.drain import drain_stream
from worker.errors import AccountError
from worker.keyspace import keys

ROUNDS = 12


@pytest.mark.scenario(number=16)
def test_two_accounts_are_locked_in_one_order_however_they_are_named(house: House) -> None:
    first, second = sorted(house.users[:2])
    with worker_resources(patience(house)) as resources, ThreadPoolExecutor(2) as threads:
        with holding(house, "account", f"user_id = '{first}'"):
            waiting = [
                threads.submit(credits.carry_over, resources, first, second, "there", meter=METER),
                threads.submit(credits.carry_over, resources, second, first, "back", meter=METER),
            ]
            wait_until(lambda: waiters(house) == len(waiting), "both wait", SLOW_SECONDS)
            assert is_free(house, "account", f"user_id = '{second}'"), "who waits for the first has not got the second"
        finish(waiting)
    house.drain()
    house.prove()


@pytest.mark.scenario(number=16)
def test_the_accounts_come_before_the_pool(house: House) -> None:
    user, *_ = house.users
    account, pool = f"user_id = '{user}'", "true"
    with (
        house.sponsor() as sponsor,
        worker_resources(patience(house)) as resources,
        ThreadPoolExecutor(2) as threads,
    ):
        house.absorb(sponsor, user, "r0", 7)
        house.drain()
        accounts.set_trust(resources, user, "elite")
        house.absorb(sponsor, user, "r1", 7)
        with holding(house, "account", account):
            draining = threads.submit(drain_stream, resources, keys.SPONSORSHIP)
            wait_until(lambda: waiters(house) == 1, "the pool's batch waits for the account", SLOW_SECONDS)
            assert is_free(house, "sponsor_pool", pool), "and has not got the pool"
        finish([draining])
        accounts.set_trust(resources, user, "new")
        house.absorb(sponsor, user, "r2", 7)
        with holding(house, "sponsor_pool", pool):
            closing = threads.submit(partial(erasure.close_account, resources, user, forfeit=True))
            wait_until(lambda: waiters(house) == 1, "who closes the account waits for the pool", SLOW_SECONDS)
            assert not is_free(house, "account", account), "and has got the account"
            draining = threads.submit(drain_stream, resources, keys.SPONSORSHIP)
            wait_until(lambda: waiters(house) == 2, "both wait", SLOW_SECONDS)
        finish([closing, draining])
    house.drain()
    assert rows(house.settings, "SELECT count(*) FROM sponsor_grant WHERE user_id = %s", closing.result()) == [(3,)]
    house.prove()


@pytest.mark.scenario(number=16)
def test_a_batch_that_dies_in_a_deadlock_is_repeated(house: House) -> None:
    partition = keys.partition_of(house.users[0], house.settings.partitions)
    first, *_, last = sorted(u for u in house.users if keys.partition_of(u, house.settings.partitions) == partition)
    with house.dyno(settings=patience(house)) as dyno:
        with house.connected() as rude:
            # The batch must be the transaction that Postgres ends.
            rude.execute("SET deadlock_timeout = '1min'")
            lock(rude, "account", f"user_id = '{last}'")
            house.emit(40)
            wait_until(lambda: waiters(house) == 1, "the batch has the first and waits for the last", SLOW_SECONDS)
            lock(rude, "account", f"user_id = '{first}'")
            wait_until(lambda: "deadlock detected" in house.log_of(dyno), "the batch failed", SLOW_SECONDS)
            rude.rollback()
        house.wait_until_drained()
        assert "halted" not in house.log_of(dyno)
    house.resend()
    house.drain()
    house.prove()


@pytest.mark.slow
@pytest.mark.scenario(number=16)
def test_batches_carry_overs_grants_and_renewals_at_once_never_lock_each_other_out(house: House) -> None:
    give_account(house.settings, "newcomer", "basic")
    move_clock(house.settings, timedelta(days=32))  # periods are over: the first transaction stores that
    one, other, *_ = house.users
    patient = patience(house)
    with worker_resources(patient) as resources, house.dyno(settings=patient) as dyno:
        work: list[Callable[[int], Any]] = [
            lambda n: once_applied(
                lambda: credits.carry_over(resources, one, other, f"there-{n}", meter=METER, with_debt=True)
            ),
            lambda n: once_applied(
                lambda: credits.carry_over(resources, other, one, f"back-{n}", meter=METER, with_debt=True)
            ),
            lambda n: credits.grant(resources, one, METER, 5, f"order-{n}"),
            lambda _: renewals.renew_due(resources),
            lambda _: house.emit(16),
        ]
        with ThreadPoolExecutor(len(work)) as threads:
            finish([threads.submit(repeat, each) for each in work])
        house.wait_until_drained()
        assert "failed" not in house.log_of(dyno)
    house.resend()
    house.drain()
    house.prove()


def patience(house: House) -> Settings:
    """Return settings of workers without a lock time-out: only the order lets them through."""
    return house.settings_with(
        lock_timeout_ms=60_000,
        statement_timeout_ms=60_000,
        idle_in_transaction_timeout_ms=60_000,
        hand_grace_ms=65_000,
    )


def repeat(work: Callable[[int], Any]) -> None:
    for number in range(ROUNDS):
        work(number)


def once_applied(work: Callable[[], Any]) -> None:
    """Do what is refused while events of the account wait, as soon as none do."""

    def is_done() -> bool:
        try:
            work()
        except AccountError as error:
            if "not applied yet" in str(error) or "older events" in str(error):
                return False
            raise
        return True

    wait_until(is_done, "no event waits", SLOW_SECONDS)


def finish(running: list[Future[Any]]) -> None:
    for each in running:
        each.result(2 * SLOW_SECONDS)


def lock(connection: psycopg.Connection, table: str, which: str, how: str = "") -> bool:
    """Lock rows until the end of the transaction; return False if there were none."""
    return connection.execute(f"SELECT 1 FROM {table} WHERE {which} FOR UPDATE {how}".encode()).fetchone() is not None


@contextmanager
def holding(house: House, table: str, which: str) -> Iterator[None]:
    """Lock these rows for the length of the block."""
    with house.connected() as connection:
        assert lock(connection, table, which)
        yield
        connection.rollback()


def is_free(house: House, table: str, which: str) -> bool:
    with house.connected() as connection:
        return lock(connection, table, which, "SKIP LOCKED")


def waiters(house: House) -> int:
    """Return the number of sessions that wait for a lock."""
    return len(rows(house.settings, "SELECT DISTINCT pid FROM pg_locks WHERE NOT granted"))
