"""A cache that is cold: each balance is loaded once, and nobody waits for longer than the settings say."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import execute, give_accounts
from tests.support.resources import settings_for
from tests.support.streams import account_of
from tests.support.waiting import wait_until
from worker.client import AsyncBilling, Billing
from worker.client.ledger import LedgerView
from worker.demo.servers import Server
from worker.errors import LedgerUnavailable
from worker.keyspace import calls
from worker.ledger.connection import batch_connection

METER = "premium_voice"
USERS = [f"s{number}" for number in range(200)]
# As if Postgres were on the other side of a network: the pool's ping, and a load.
ROUND_TRIP_SECONDS, ROUND_TRIPS = 0.05, 2


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Users in the order in which they are loaded."""
    found: list[str] = []
    load = LedgerView.account_views

    def counted(self: LedgerView, users: Sequence[str]) -> Any:
        found.extend(users)
        time.sleep(ROUND_TRIPS * ROUND_TRIP_SECONDS)
        return load(self, users)

    monkeypatch.setattr(LedgerView, "account_views", counted)
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
def begun() -> list[str]:
    """Users whose load is held up by `go_on`."""
    return []


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch, begun: list[str]) -> Iterator[threading.Event]:
    """No load ends before this is set."""
    may = threading.Event()
    load = LedgerView.account_views

    def held_up(self: LedgerView, users: Sequence[str]) -> Any:
        begun.extend(users)
        may.wait(30)
        return load(self, users)

    monkeypatch.setattr(LedgerView, "account_views", held_up)
    yield may
    may.set()


@pytest.fixture
def impatient(settings: Settings) -> Settings:
    """Two rounds at once are all."""
    give_accounts(settings, USERS[:20], "basic")
    return settings.model_copy(update={"load_wait_ms": 200, "database_pool_size": 1})


def test_a_thread_waits_for_so_long_only(impatient: Settings, go_on: threading.Event, begun: list[str]) -> None:
    with Billing.connect(impatient) as billing, ThreadPoolExecutor(30) as threads:
        others = []
        for user in USERS[:2]:
            others.append(threads.submit(billing.check, user, METER, 1))
            wait_until(partial(begun.__contains__, user), "its round has begun")
        began = time.monotonic()
        for user in (USERS[0], USERS[10]):  # one who is being loaded, and one whose turn does not come
            with pytest.raises(LedgerUnavailable, match=r"0\.2 s"):
                billing.check(user, METER, 1)
        assert time.monotonic() - began < 2
        go_on.set()
        assert all(other.result(10).allowed for other in others)
        assert billing.check(USERS[10], METER, 1).allowed


def test_a_coroutine_waits_for_so_long_only(impatient: Settings, go_on: threading.Event, begun: list[str]) -> None:
    async def ask() -> None:
        async with AsyncBilling.connect(impatient) as billing:
            others = []
            for user in USERS[:2]:
                others.append(asyncio.create_task(billing.check(user, METER, 1)))
                await asyncio.to_thread(wait_until, partial(begun.__contains__, user), "its round has begun")
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
    load = LedgerView._views

    def held_up(self: LedgerView, postgres: Any, users: Sequence[str]) -> Any:
        loading.set()
        go_on.wait(30)
        return load(self, postgres, users)

    monkeypatch.setattr(LedgerView, "_views", held_up)
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
        load = LedgerView.account_views
        fails = iter([True])

        def unsure(self: LedgerView, users: Sequence[str]) -> Any:
            if next(fails, False):
                raise LedgerUnavailable("gone")
            return load(self, users)

        monkeypatch.setattr(LedgerView, "account_views", unsure)
        with pytest.raises(LedgerUnavailable, match="gone"):
            billing.check(USERS[0], METER, 1)
        assert billing.check(USERS[0], METER, 1).allowed


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.usefixtures("accounts")
def test_several_processes_load_each_balance_once(settings: Settings, redis: Redis, loads: list[str]) -> None:
    """Each process has clients of its own, which know nothing of the others' turns."""
    patient = settings.model_copy(update={"load_other_wait_ms": 30_000})
    users = USERS[:60]
    with Billing.connect(patient) as one, Billing.connect(patient) as other, ThreadPoolExecutor(120) as threads:
        clients = [one, other] * len(users)
        answers = threads.map(lambda client, user: client.check(user, METER, 1), clients, sorted(users * 2))
        assert all(answer.allowed for answer in answers)
    assert sorted(loads) == sorted(users)


@pytest.mark.parametrize("kind", ["threads", "coroutines"])
def test_the_load_of_a_process_that_died_is_waited_for_so_long_only(
    settings: Settings, redis: Redis, kind: str
) -> None:
    give_accounts(settings, USERS[:1], "basic")
    quick = settings.model_copy(update={"load_other_wait_ms": 300})
    lease = account_of(settings, USERS[0]).lease
    redis.set(lease, "f" * 16 + ":1", px=60_000)

    async def ask() -> bool:
        async with AsyncBilling.connect(quick) as billing:
            return (await billing.check(USERS[0], METER, 1)).allowed

    began = time.monotonic()
    if kind == "threads":
        with Billing.connect(quick) as billing:
            assert billing.check(USERS[0], METER, 1).allowed
    else:
        assert asyncio.run(ask())
    assert 0.3 <= time.monotonic() - began < 5


# ---------------------------------------------------------------------------------------------------------------------
# An account with many pending ids


MANY, RECORDED = 70_000, 60_000
# A step of a thousand ids takes some milliseconds; all of them in one step would take several times this.
LONGEST_MS = 100


@pytest.fixture
def many(emptied_database_url: str, own_redis: Server) -> Iterator[tuple[Settings, Redis]]:
    """An account with so many pending ids, most of which are recorded: as after a return of an old copy of Redis."""
    settings = settings_for(emptied_database_url, own_redis.url)
    give_accounts(settings, USERS[:1], "basic")
    pending = account_of(settings, USERS[0]).pending(METER)
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
        for first in range(0, MANY, 10_000):
            redis.hset(pending, mapping={f"e:e{number}": 1 for number in range(first, first + 10_000)})
        redis.hset(pending, mapping={"h:hold": 5, "total": MANY + 5})
        execute(
            settings,
            "INSERT INTO usage_log (user_id, event_id, seq, meter, quantity, multiplier, amount, from_subscription, "
            "from_rollover, from_purchased, overflow_to_debt, uncollected, period_start, occurred_at, applied_at, "
            "clamped) SELECT 's0', 'e' || n, n + 2, 'premium_voice', 1, 1, 1, 1, 0, 0, 0, 0, now(), now(), now(), "
            f"false FROM generate_series(0, {RECORDED - 1}) AS n; UPDATE account SET seq = {RECORDED + 1}",
        )
        redis.config_set("slowlog-log-slower-than", 0)
        redis.config_set("slowlog-max-len", 100_000)
        redis.slowlog_reset()
        yield settings, redis
        redis.config_set("slowlog-log-slower-than", 10_000)
        redis.config_set("slowlog-max-len", 128)


def longest_ms(redis: Redis) -> float:
    durations: list[int] = [each["duration"] for each in redis.slowlog_get(100_000)]
    return max(durations) / 1_000


def test_no_step_takes_longer_for_many_pending_ids(many: tuple[Settings, Redis]) -> None:
    settings, redis = many
    # Their look-up takes its time, and a call must not fail for it.
    with Billing.connect(settings.model_copy(update={"load_lease_ttl_ms": 60_000})) as billing:
        assert billing.check(USERS[0], METER, 1).pending == MANY - RECORDED + 5
    assert longest_ms(redis) < LONGEST_MS
    kept = redis.hgetall(account_of(settings, USERS[0]).pending(METER))
    assert len(kept) == MANY - RECORDED + 2
    assert kept[b"h:hold"] == b"5"


def test_a_load_that_dies_half_way_leaves_no_balance_that_counts_too_little(
    many: tuple[Settings, Redis], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, redis = many
    account = account_of(settings, USERS[0])
    shed, done = calls.shed, []

    def dying(*args: Any, **kwargs: Any) -> Any:
        done.append(args)
        if len(done) > 3:
            raise KeyboardInterrupt
        return shed(*args, **kwargs)

    monkeypatch.setattr(calls, "shed", dying)
    stale = f"1 1 1\n{METER} 100000 0 0 0 1 sub"
    redis.set(account.balance, stale)
    with Billing.connect(settings) as billing:
        with pytest.raises(KeyboardInterrupt):
            billing.check(USERS[0], METER, 1)
        assert not redis.exists(account.balance), "the old balance does not contain what has left pending"
        assert redis.hlen(account.pending(METER)) == MANY + 2 - 3_000
        monkeypatch.undo()
        assert billing.check(USERS[0], METER, 1).pending == MANY - RECORDED + 5


def test_an_older_list_of_rights_lets_a_load_read_all_ids_at_once(many: tuple[Settings, Redis]) -> None:
    settings, redis = many
    redis.execute_command("ACL", "SETUSER", "old", "on", "nopass", "~*", "&*", "+@all", "-hscan")
    try:
        url = settings.redis_url.replace("unix://", "unix://old:any@")
        with Billing.connect(settings.model_copy(update={"redis_url": url, "load_lease_ttl_ms": 60_000})) as billing:
            assert billing.check(USERS[0], METER, 1).pending == MANY - RECORDED + 5
    finally:
        redis.execute_command("ACL", "DELUSER", "old")
