"""A client whose Postgres is behind: a standby is refused, and no older balance takes the place of a newer one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from unittest.mock import Mock

import psycopg
import pytest
from psycopg import sql
from psycopg.pq import TransactionStatus
from redis import Redis
from sqlalchemy import make_url

from config.settings import Settings
from tests.client.clients import open_client
from tests.faults.standby import standby_of
from tests.support.ledger import give_account, rows
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import account_of, drain
from tests.support.waiting import wait_until
from worker.admin import accounts
from worker.admin.change import refresh
from worker.admin.erasure import close_account
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.demo.servers import find_postgres, postgres_server
from worker.errors import LedgerUnavailable
from worker.keyspace.keys import SPONSORSHIP
from worker.ledger.connection import batch_connection, is_standby, new_epoch
from worker.ledger.migrate import migrate
from worker.resources import Resources

USER, METER = "u1", "credits"


@contextmanager
def copied(settings: Settings) -> Iterator[Settings]:
    """Settings that name a copy of the ledger, which stands for a standby that falls behind from now on."""
    assert settings.database_url is not None
    url = make_url(settings.database_url)
    name = f"{url.database}_behind"
    server = url.set(database="postgres").render_as_string(False)
    behind = url.set(database=name).render_as_string(False)
    with psycopg.connect(server, autocommit=True) as admin:
        copy = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
            sql.Identifier(name), sql.Identifier(url.database or "")
        )
        admin.execute(copy)
    try:
        yield settings.model_copy(update={"database_url": behind})
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def forget_balance(redis: Redis, settings: Settings, user: str = USER) -> None:
    """Let the cached balance expire, as if its time had been waited for."""
    redis.delete(account_of(settings, user).balance)


def publish(settings: Settings, user: str = USER) -> None:
    """Have a worker publish the account as it is."""
    with worker_resources(settings) as resources:
        refresh(resources, [user])
    drain(settings, user)


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_an_old_balance_is_spent_once_at_most(kind: str, settings: Settings, redis: Redis) -> None:
    give_account(settings, USER)
    publish(settings)
    with copied(settings) as behind, closing(open_client(kind, behind)) as client:
        assert client.charge(USER, METER, 1_000, "c1").amount == 1_000  # the copy is not behind yet
        drain(settings, USER)
        for number in range(2, 5):
            forget_balance(redis, settings)
            with pytest.raises(LedgerUnavailable, match="is behind the ledger"):
                client.charge(USER, METER, 1_000, f"c{number}")
            with pytest.raises(LedgerUnavailable):
                client.check(USER, METER, 1)
    assert rows(settings, "SELECT used, rollover FROM balance WHERE meter = %s", METER) == [(1_000, 0)]
    with Billing.connect(settings) as client:
        assert client.check(USER, METER, 1).available == 0


def test_the_version_outlives_the_balance_for_as_long_as_the_setting_says(settings: Settings, redis: Redis) -> None:
    give_account(settings, USER)
    publish(settings.model_copy(update={"version_ttl_seconds": 600}))
    account = account_of(settings, USER)
    assert not redis.exists(account.balance), "only a load caches what was not cached"
    assert 590_000 < redis.pttl(account.version) <= 600_000
    publish(settings)
    assert 3_590_000 < redis.pttl(account.version) <= 3_600_000
    with Billing.connect(settings) as client:
        assert client.check(USER, METER, 1).available == 1_000


def test_an_older_publish_does_not_lower_the_version(settings: Settings, redis: Redis) -> None:
    give_account(settings, USER)
    with Billing.connect(settings) as client:
        client.emit(USER, METER, 10, event_id="e1")
    drain(settings, USER)
    newest = redis.get(account_of(settings, USER).version)
    with copied(settings) as behind:
        with Billing.connect(settings) as client:
            client.emit(USER, METER, 10, event_id="e2")
        drain(settings, USER)
        later = redis.get(account_of(settings, USER).version)
        assert later != newest
        publish(behind)
    assert redis.get(account_of(settings, USER).version) == later


def test_a_new_epoch_begins_with_versions_of_its_own(settings: Settings, redis: Redis, resources: Resources) -> None:
    """A backup was restored: its versions are lower, and its epoch says that they count."""
    give_account(settings, USER)
    publish(settings)
    with copied(settings) as restored:
        with Billing.connect(settings) as client:
            client.charge(USER, METER, 1_000, "c1")
        drain(settings, USER)
        forget_balance(redis, settings)
        with worker_resources(restored) as opened, batch_connection(opened.engine) as postgres:
            new_epoch(postgres)
            postgres.commit()
        with Billing.connect(restored) as client:
            assert client.check(USER, METER, 1).available == 1_000


def test_a_closed_account_is_unknown_at_once(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, USER)
    publish(settings)
    version = account_of(settings, USER).version
    newest = redis.get(version)
    close_account(resources, USER)
    with Billing.connect(settings) as client:
        assert not client.check(USER, METER, 1).allowed
        redis.set(version, newest or b"")  # killed before it forgot the version
        forget_balance(redis, settings)
        assert not client.check(USER, METER, 1).allowed


def test_an_older_pool_is_not_cached_either(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, USER)
    accounts.set_trust(resources, USER, "elite")
    drain(settings, USER)

    def give(client: Billing, request: str) -> None:
        assert client.decide(USER, 500, request).absorb == 500
        client.settle_sponsored(USER, request, 500)
        with worker_resources(settings) as opened:
            drain_stream(opened, SPONSORSHIP)
        redis.delete(SPONSORSHIP.pool)

    with Billing.connect(settings) as client:
        give(client, "r1")
    resources.engine.dispose()
    with copied(settings) as behind, Billing.connect(settings) as client, Billing.connect(behind) as late:
        give(client, "r2")
        assert late.decide(USER, 1, "r3").absorb == 0, "a pool that is not known covers nothing"
        assert not redis.exists(SPONSORSHIP.pool)
        redis.delete(SPONSORSHIP.pool_version)
        late.decide(USER, 1, "r4")
        assert redis.exists(SPONSORSHIP.pool)


def test_a_standby_is_refused_unless_allowed(redis_url: str, redis: Redis) -> None:
    with postgres_server(find_postgres(os.environ)) as primary, standby_of(primary, synchronous=False) as standby:
        migrate(primary.url)
        settings = settings_for(primary.url, redis_url)
        give_account(settings, USER)
        on_standby = settings.model_copy(update={"database_url": standby.url})
        wait_until(
            lambda: (
                "account" in {row[0] for row in rows(on_standby, "SELECT tablename FROM pg_tables")}
                and rows(on_standby, "SELECT user_id FROM account") == [(USER,)]
            ),
            "the standby has caught up",
        )
        with Billing.connect(on_standby) as client:
            for _ in range(2):
                with pytest.raises(LedgerUnavailable, match=r"names a standby.*METERFALL_ALLOW_STANDBY"):
                    client.check(USER, METER, 1)
        with Billing.connect(on_standby.model_copy(update={"allow_standby": True})) as client:
            assert client.check(USER, METER, 1).available == 1_000
        forget_balance(redis, settings)
        with Billing.connect(on_standby) as client:
            with pytest.raises(LedgerUnavailable):
                client.check(USER, METER, 1)
            with psycopg.connect(standby.url, autocommit=True) as admin:
                admin.execute("SELECT pg_promote()")
            assert client.check(USER, METER, 1).available == 1_000, "a promotion is noticed"


def test_a_connection_that_is_told_nothing_asks_once(resources: Resources) -> None:
    """A pooler in between keeps what Postgres tells."""

    class Silent:
        """What libpq knows, apart from what the server told."""

        def __init__(self, told: Any) -> None:
            self._told = told

        def __getattr__(self, name: str) -> Any:
            return (lambda _: None) if name == "parameter_status" else getattr(self._told, name)

    with batch_connection(resources.engine) as postgres:
        asked = Mock(wraps=postgres)
        asked.pgconn, asked.is_standby = Silent(postgres.pgconn), None
        asked.__class__ = type(postgres)  # type: ignore[assignment]
        assert [is_standby(asked) for _ in range(2)] == [False, False]
        assert asked.execute.call_count == 1
        assert postgres.info.transaction_status is TransactionStatus.IDLE
