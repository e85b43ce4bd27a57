"""A Postgres that is frozen: its kernel acknowledges everything, and nothing is ever answered."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from redis import Redis
from sqlalchemy import text

from config.settings import Settings
from schemas.answers import Reason, Serve, SponsorReason
from tests.support.ledger import give_account, rows
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import partition_of, stream_of
from tests.support.waiting import wait_until
from worker.client import AsyncBilling, Billing
from worker.demo.servers import Server, find_postgres, postgres_server
from worker.errors import LedgerUnavailable
from worker.keyspace.connection import connect
from worker.ledger.connection import Postgres, batch_connection, open_engine
from worker.ledger.migrate import migrate
from worker.reports.proof import verify_ledger

# It is about a server of its own.
pytestmark = pytest.mark.once

USER, METER = "u1", "premium_voice"
# A statement may take 300 ms, Postgres may be silent for 200 ms more, and connecting may take 2 s.
LIMITS: dict[str, object] = {
    "statement_timeout_ms": 300,
    "ledger_answer_grace_ms": 200,
    "database_connect_timeout_seconds": 2,
}
# An open connection finds out in 0.5 s; then a new one is tried for 2 s. The rest is for a slow machine.
SECONDS = 0.5 + 2 + 2


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A Postgres that only this module uses, and may freeze."""
    with postgres_server(find_postgres(os.environ)) as started:
        migrate(started.url)
        yield started


@pytest.fixture
def settings(server: Server, redis_url: str) -> Settings:
    return settings_for(server.url, redis_url, **LIMITS)


@pytest.fixture
def frozen(server: Server) -> Iterator[Server]:
    """The server, to be frozen and thawed by the test; it thaws at the end whatever happens."""
    try:
        yield server
    finally:
        server.thaw()


def seconds_to_refuse(ask: Callable[[], Any]) -> float:
    """How long it takes until `ask` raises LedgerUnavailable."""
    began = time.monotonic()
    with pytest.raises(LedgerUnavailable):
        ask()
    return time.monotonic() - began


def test_what_needs_the_ledger_says_so_within_the_time_and_works_again(settings: Settings, frozen: Server) -> None:
    give_account(settings, USER, "basic")
    give_account(settings, "u2", "basic")
    with Billing.connect(settings) as billing, Redis.from_url(settings.redis_url) as redis:
        assert billing.check(USER, METER, 1).allowed
        redis.flushdb()
        frozen.freeze()
        asks: list[Callable[[], Any]] = [
            lambda: billing.check(USER, METER, 1),
            lambda: billing.reserve("u2", METER, 1, "k"),
            lambda: billing.charge(USER, METER, 1, "c"),
            lambda: billing.remaining(USER, METER),
            lambda: billing.confirm_partial(USER, 10, "r", paid=5),
        ]
        with ThreadPoolExecutor(len(asks)) as threads:
            assert max(threads.map(seconds_to_refuse, asks)) < SECONDS
        decision = billing.decide(USER, 10, "r")
        assert (decision.serve, decision.reason) == (Serve.GATE, SponsorReason.POOL_UNAVAILABLE)
        frozen.thaw()
        answer = billing.check(USER, METER, 1)
    assert (answer.allowed, answer.reason) == (True, Reason.WITHIN_LIMIT)


def test_asyncio_is_not_held_up_either(settings: Settings, frozen: Server) -> None:
    give_account(settings, "u3", "basic")

    async def ask() -> None:
        async with AsyncBilling.connect(settings) as billing:
            assert (await billing.check("u3", METER, 1)).allowed
            with connect(settings) as redis:
                redis.flushdb()
            frozen.freeze()
            began = time.monotonic()
            with pytest.raises(LedgerUnavailable):
                await billing.check("u3", METER, 1)
            assert time.monotonic() - began < SECONDS
            frozen.thaw()
            assert (await billing.check("u3", METER, 1)).allowed

    asyncio.run(ask())


@pytest.mark.parametrize("inside", ["statement", "pipeline", "copy", "commit"])
def test_a_transaction_that_freezes_ends_in_time_and_its_connection_is_thrown_away(
    settings: Settings, frozen: Server, inside: str
) -> None:
    began = 0.0

    def freeze_inside(postgres: Postgres) -> None:
        nonlocal began
        postgres.execute("SELECT 1")
        began = time.monotonic()
        frozen.freeze()
        if inside == "pipeline":
            with postgres.pipeline():
                cursors = [postgres.execute("SELECT 1") for _ in range(3)]
                for cursor in cursors:
                    cursor.fetchall()
        elif inside == "copy":
            with postgres.cursor().copy("COPY usage_log FROM STDIN") as copy:
                copy.write(b"")
        elif inside == "commit":
            postgres.commit()
        else:
            postgres.execute("SELECT 1")

    engine = open_engine(settings)
    try:
        with engine.connect() as connection:
            first = connection.scalar(text("SELECT pg_backend_pid()"))
        with (
            pytest.raises(psycopg.OperationalError, match=r"nothing for 0\.5 s"),
            batch_connection(engine) as postgres,
        ):
            freeze_inside(postgres)
        assert 0.5 <= time.monotonic() - began < 2
        frozen.thaw()
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT pg_backend_pid()")) != first
    finally:
        engine.dispose()


def test_the_servers_own_time_out_comes_first_while_it_answers(settings: Settings) -> None:
    engine = open_engine(settings)
    try:
        with pytest.raises(psycopg.errors.QueryCanceled), batch_connection(engine) as postgres:
            postgres.execute("SELECT pg_sleep(5)")
    finally:
        engine.dispose()


def test_a_worker_goes_on_by_itself(settings: Settings, frozen: Server) -> None:
    user = "u4"
    give_account(settings, user, "basic")
    # No job but the drain: each would wait for this Postgres, too.
    own = LIMITS | {"renew_interval_seconds": 0, "verify_interval_seconds": 0}
    limits = {f"METERFALL_{name.upper()}": str(value) for name, value in own.items()}
    with Billing.connect(settings) as billing, Redis.from_url(settings.redis_url) as redis, dyno(settings, **limits):
        billing.emit(user, METER, 1, event_id="before")
        wait_until(lambda: stream_of(redis, settings, user) == [], "the worker works", seconds=20)
        frozen.freeze()
        billing.emit(user, METER, 2, event_id="meanwhile")
        halted = partition_of(settings, user).halted
        wait_until(lambda: redis.exists(halted) == 1, "the worker gave this Postgres up", seconds=40)
        assert len(stream_of(redis, settings, user)) == 1
        frozen.thaw()
        billing.emit(user, METER, 3, event_id="after")
        wait_until(lambda: stream_of(redis, settings, user) == [], "the worker went on", seconds=20)
        query = "SELECT event_id, amount FROM usage_log WHERE user_id = %s ORDER BY seq"
        assert rows(settings, query, user) == [("before", 1), ("meanwhile", 2), ("after", 3)]
        with worker_resources(settings) as resources:
            assert verify_ledger(resources).differences == []
