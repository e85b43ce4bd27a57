"""A cache that is cold: each balance is loaded once, and nobody waits for longer than the settings say."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import give_accounts
from tests.support.streams import account_of
from tests.support.waiting import wait_until
from worker.client import AsyncBilling, Billing
from worker.client.ledger import LedgerView
from worker.errors import LedgerUnavailable
from worker.ledger.connection import batch_connection

METER = "premium_voice"
USERS = [f"s{number}" for number in range(200)]
# As if Postgres were on the other side of a network: the pool's ping, and a load.
ROUND_TRIP_SECONDS, ROUND_TRIPS = 0.05, 2


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Users in the order in which they are loaded."""
    found: list[str] = []
    load = LedgerView.account

    def counted(self: LedgerView, user_id: str) -> Any:
        found.append(user_id)
        time.sleep(ROUND_TRIPS * ROUND_TRIP_SECONDS)
        return load(self, user_id)

    monkeypatch.setattr(LedgerView, "account", counted)
    return found


@pytest.fixture
def accounts(settings: Settings) -> None:
    give_accounts(settings, USERS, "basic")


def cached(settings: Settings, redis: Redis) -> int:
    return sum(redis.exists(account_of(settings, user).balance) for user in USERS)


@pytest.mark.usefixtures("accounts")
def test_threads_load_each_balance_once(settings: Settings, redis: Redis, loads: list[str]) -> None:
    with Billing.connect(settings) as billing, ThreadPoolExecutor(300) as threads:

        def check(user: str) -> float:
            began = time.monotonic()
            assert billing.check(user, METER, 1).allowed
            return time.monotonic() - began

        took = list(threads.map(check, USERS * 3))
    assert 200 <= len(loads) <= 250, "a call that asked just before a load ended may load once more"
    assert cached(settings, redis) == 200
    assert max(took) < 5


@pytest.mark.usefixtures("accounts")
def test_coroutines_load_each_balance_once(settings: Settings, redis: Redis, loads: list[str]) -> None:
    async def ask() -> list[float]:
        async with AsyncBilling.connect(settings) as billing:

            async def check(user: str) -> float:
                began = time.monotonic()
                assert (await billing.check(user, METER, 1)).allowed
                return time.monotonic() - began

            checks = asyncio.gather(*(check(user) for user in USERS * 3))
            # The host's own threads are as free as before.
            began = time.monotonic()
            names = await asyncio.gather(
                *(asyncio.to_thread(lambda: threading.current_thread().name) for _ in range(50))
            )
            assert time.monotonic() - began < 1
            assert not any(name.startswith("meterfall") for name in names)
            return list(await checks)

    took = asyncio.run(ask())
    assert 200 <= len(loads) <= 250, "a call that asked just before a load ended may load once more"
    assert cached(settings, redis) == 200
    assert max(took) < 5


def test_a_load_takes_so_many_round_trips(settings: Settings, redis: Redis, tmp_path: Path) -> None:
    give_accounts(settings, USERS[:1], "basic")
    with Billing.connect(settings) as billing, (tmp_path / "trace").open("w+") as trace:
        billing.check(USERS[0], METER, 1)
        redis.flushdb()
        assert billing._ledger is not None
        with batch_connection(billing._ledger._engine) as postgres:  # the only one, which the next load takes
            postgres.pgconn.trace(trace.fileno())
        billing.check(USERS[0], METER, 1)
        postgres.pgconn.untrace()  # which writes what it has
        trace.seek(0)
        directions = "".join(re.findall(r"^[-0-9]+ [0-9:.]+\t([FB])\t", trace.read(), re.MULTILINE))
    assert directions.count("FB") == ROUND_TRIPS, "how often an answer follows what was sent"


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No load ends before this is set."""
    may = threading.Event()
    load = LedgerView.account

    def held_up(self: LedgerView, user_id: str) -> Any:
        may.wait(30)
        return load(self, user_id)

    monkeypatch.setattr(LedgerView, "account", held_up)
    yield may
    may.set()


@pytest.fixture
def impatient(settings: Settings) -> Settings:
    give_accounts(settings, USERS[:20], "basic")
    return settings.model_copy(update={"load_wait_ms": 200})


def test_a_thread_waits_for_so_long_only(impatient: Settings, go_on: threading.Event) -> None:
    with Billing.connect(impatient) as billing, ThreadPoolExecutor(30) as threads:
        others = [threads.submit(billing.check, user, METER, 1) for user in USERS[:8]]
        began = time.monotonic()
        for user in (USERS[0], USERS[10]):  # one who is being loaded, and one whose turn does not come
            with pytest.raises(LedgerUnavailable, match=r"0\.2 s"):
                billing.check(user, METER, 1)
        assert time.monotonic() - began < 2
        go_on.set()
        assert all(other.result(10).allowed for other in others)
        assert billing.check(USERS[10], METER, 1).allowed


def test_a_coroutine_waits_for_so_long_only(impatient: Settings, go_on: threading.Event) -> None:
    async def ask() -> None:
        async with AsyncBilling.connect(impatient) as billing:
            others = [asyncio.create_task(billing.check(user, METER, 1)) for user in USERS[:8]]
            await asyncio.sleep(0)
            began = time.monotonic()
            late = [USERS[0], *USERS[10:14], USERS[10]]
            found = await asyncio.gather(*(billing.check(user, METER, 1) for user in late), return_exceptions=True)
            assert time.monotonic() - began < 2
            assert [type(each) for each in found] == [LedgerUnavailable] * 6
            go_on.set()
            assert all(answer.allowed for answer in await asyncio.gather(*others))
            assert (await billing.check(USERS[10], METER, 1)).allowed

    asyncio.run(ask())


def test_a_client_that_is_closed_during_a_load_leaves_no_connection(
    impatient: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()
    load = LedgerView._view

    def held_up(self: LedgerView, postgres: Any, user_id: str) -> Any:
        loading.set()
        go_on.wait(30)
        return load(self, postgres, user_id)

    monkeypatch.setattr(LedgerView, "_view", held_up)
    with ThreadPoolExecutor(1) as threads:
        with Billing.connect(impatient) as billing:
            check = threads.submit(billing.check, USERS[0], METER, 1)
            assert loading.wait(10)
        go_on.set()
        check.exception(10)  # it may have an answer, or not
    with closing(psycopg.connect(str(impatient.database_url), autocommit=True)) as postgres:
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        wait_until(lambda: postgres.execute(others).fetchone() == (0,), "no connection is left")


@pytest.mark.usefixtures("accounts")
def test_a_load_that_fails_is_tried_by_the_next(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with Billing.connect(settings) as billing:
        load = LedgerView.account
        fails = iter([True])

        def unsure(self: LedgerView, user_id: str) -> Any:
            if next(fails, False):
                raise LedgerUnavailable("gone")
            return load(self, user_id)

        monkeypatch.setattr(LedgerView, "account", unsure)
        with pytest.raises(LedgerUnavailable, match="gone"):
            billing.check(USERS[0], METER, 1)
        assert billing.check(USERS[0], METER, 1).allowed
