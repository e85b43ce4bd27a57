"""Behind the real PgBouncer, which pools transactions: nothing of a session is relied on, and the books are right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import psycopg
import pytest

from config.settings import Settings
from tests.support.commands import Meterfall, assert_refused
from tests.support.ledger import rows
from tests.support.pooler import PgBouncer, pgbouncer
from tests.support.processes import dyno
from tests.support.proxy import Proxy
from tests.support.resources import settings_for, worker_resources
from tests.support.waiting import wait_until
from worker.admin import accounts
from worker.client import Billing
from worker.demo.servers import Server, find_postgres, find_redis, postgres_server, redis_server
from worker.errors import LedgerUnavailable
from worker.ledger.connection import LedgerError, batch_connection, begin_snapshot, open_engine
from worker.ledger.migrate import grant_roles, migrate
from worker.reports.proof import verify_ledger

METER = "premium_voice"
LOGINS = ("meterfall", "pool_producer", "pool_worker", "pool_operator", "unset")
USERS = [f"user-{number}" for number in range(20)]


class Pooled(NamedTuple):
    """A Postgres with the roles in force, a pooler in front of it, and a Redis."""

    pooler: PgBouncer
    postgres: Server
    redis: Server

    def settings(self, login: str, *, pooled: bool = True, **overrides: object) -> Settings:
        return settings_for(self.pooler.url(login), self.redis.url, database_pooled=pooled, **overrides)


@pytest.fixture(scope="module")
def pooled() -> Iterator[Pooled]:
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_server(find_postgres(os.environ)))
        redis = stack.enter_context(redis_server(find_redis(os.environ)))
        proxy = stack.enter_context(
            Proxy(postgres.folder / ".s.PGSQL.5432")
        )  # the pooler's user may not enter the folder
        pooler = stack.enter_context(pgbouncer(f"127.0.0.1 port={proxy.port}", LOGINS))
        migrate(postgres.url)
        grant_roles(postgres.url)
        with psycopg.connect(postgres.url, autocommit=True) as owner:
            for role in ("producer", "worker", "operator"):
                owner.execute(f"CREATE ROLE pool_{role} LOGIN IN ROLE meterfall_{role}")
            owner.execute("CREATE ROLE unset LOGIN IN ROLE meterfall_worker")
            owner.execute("ALTER ROLE unset SET lock_timeout = 0")
        grant_roles(postgres.url)
        yield Pooled(pooler, postgres, redis)


def test_two_dynos_bill_under_load_while_the_pooler_is_killed(pooled: Pooled) -> None:
    with worker_resources(pooled.settings("pool_operator")) as resources:
        resources.claim()
        for user in USERS:
            accounts.open_new(resources, user, "basic")
    sent = 0
    environment = {"METERFALL_DATABASE_POOLED": "true"}
    worker = pooled.settings("pool_worker")
    owner = settings_for(pooled.postgres.url, pooled.redis.url)

    def billed() -> int:
        ((count,),) = rows(owner, "SELECT count(*) FROM usage_log")
        return int(str(count))

    with (
        dyno(worker, **environment),
        dyno(worker, **environment),
        Billing.connect(pooled.settings("pool_producer")) as billing,
    ):
        for turn in range(3):
            for number in range(30):
                for user in USERS:
                    billing.emit(user, METER, 1, event_id=f"{turn}-{number}")
                    sent += 1
                if turn and number == 10:
                    pooled.pooler.kill()
                if turn and number == 20:
                    pooled.pooler.start()
            wait_until(lambda: billed() == sent, f"all {sent} events are billed", 40)  # noqa: B023
        billing.charge(USERS[0], METER, 1, "charged")
        sent += 1
        wait_until(lambda: billed() == sent, "the charge is billed", 20)
    assert rows(owner, "SELECT sum(amount), count(DISTINCT (user_id, event_id)) FROM usage_log") == [(sent, sent)]
    with worker_resources(pooled.settings("pool_worker")) as resources:
        assert verify_ledger(resources).differences == []


def test_a_login_without_time_outs_is_refused_with_the_remedy(pooled: Pooled) -> None:
    with dyno(pooled.settings("unset"), METERFALL_DATABASE_POOLED="true") as process:
        _, output = process.communicate(timeout=20)
    assert process.returncode == 2, output
    assert "`unset` lacks lock_timeout; `meterfall migrate --roles`" in output
    with (
        Billing.connect(pooled.settings("unset")) as billing,
        pytest.raises(LedgerUnavailable, match="lacks lock_timeout"),
    ):
        billing.check("never-seen", METER, 1)


def test_a_pooler_that_is_not_named_as_one_is_recognised(pooled: Pooled) -> None:
    with dyno(pooled.settings("pool_worker", pooled=False)) as process:
        _, output = process.communicate(timeout=20)
    assert process.returncode == 2, output
    assert "set METERFALL_DATABASE_POOLED=true" in output
    assert "Traceback" not in output


def test_options_that_the_pooler_drops_in_silence_are_missed(pooled: Pooled) -> None:
    with (
        Proxy(pooled.postgres.folder / ".s.PGSQL.5432") as proxy,
        pgbouncer(f"127.0.0.1 port={proxy.port}", LOGINS, "ignore_startup_parameters = options") as pooler,
        worker_resources(settings_for(pooler.url("meterfall"), pooled.redis.url)) as resources,
        pytest.raises(LedgerError, match="METERFALL_DATABASE_POOLED=true"),
    ):
        resources.claim()


def test_a_long_proof_has_its_own_statement_timeout(pooled: Pooled) -> None:
    engine = open_engine(pooled.settings("pool_worker"), statement_timeout_ms=60_000)
    with batch_connection(engine) as postgres:
        begin_snapshot(postgres)
        assert postgres.execute("SHOW statement_timeout").fetchall() == [("1min",)]
    engine.dispose()


def test_migrations_refuse_a_pooled_url(pooled: Pooled, meterfall: Meterfall) -> None:
    url = pooled.pooler.url("meterfall")
    assert_refused(
        meterfall("migrate", DATABASE_URL=url, METERFALL_DATABASE_POOLED="true"), 2, "METERFALL_MIGRATE_URL", "pooler"
    )
    assert_refused(meterfall("migrate", METERFALL_MIGRATE_URL=url), 2, "METERFALL_MIGRATE_URL", "pooler")
    done = meterfall(
        "migrate", DATABASE_URL=url, METERFALL_DATABASE_POOLED="true", METERFALL_MIGRATE_URL=pooled.postgres.url
    )
    assert (done.code, done.out) == (0, "ledger is at head\n")


@pytest.fixture
def meterfall(command_server: object, pooled: Pooled) -> Meterfall:
    return Meterfall(command_server, settings_for(pooled.postgres.url, pooled.redis.url))  # type: ignore[arg-type]
