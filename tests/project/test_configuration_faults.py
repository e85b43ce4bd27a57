"""A fault of the configuration is one line that names it: never an outage, never a traceback, never a wait for ever."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import psycopg
import pytest
from redis import Redis

from config.settings import Settings, SettingsError
from tests.support.commands import PASSWORD, Meterfall, assert_refused
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from worker.admin import accounts
from worker.client import Billing, new_key
from worker.consumer.drain import drain_stream
from worker.demo.servers import Server, find_postgres, find_redis, postgres_server, redis_server
from worker.errors import LedgerUnavailable
from worker.keyspace import keys
from worker.ledger.migrate import grant_roles, migrate
from worker.ledger.migrations import newest_revision
from worker.reports.status import read_status

WAIT_SECONDS = 20
USER, METER = "user-42", "premium_voice"


class Site(NamedTuple):
    """A Postgres that wants passwords of some logins, and a Redis with users."""

    postgres: Server
    redis: Server

    def settings(
        self, login: str = "meterfall", *, redis_user: str = "default", database: str = "meterfall"
    ) -> Settings:
        url = self.postgres.url.replace("meterfall@", f"{login}@").replace("/meterfall?", f"/{database}?")
        return settings_for(url, self.redis.url.replace("unix://", f"unix://{redis_user}:{PASSWORD}@"))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with postgres_server(find_postgres(os.environ)) as postgres, redis_server(find_redis(os.environ)) as redis:
        migrate(postgres.url)
        grant_roles(postgres.url)
        with psycopg.connect(postgres.url, autocommit=True) as owner:
            owner.execute("CREATE ROLE mf_reader LOGIN")
            owner.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO mf_reader")
            owner.execute("CREATE ROLE mf_monitor LOGIN IN ROLE meterfall_monitor")
            owner.execute("CREATE ROLE nobody LOGIN")
        with Redis.from_url(redis.url) as client:
            client.execute_command("ACL SETUSER default resetpass >" + PASSWORD)
            client.auth(PASSWORD)
            client.execute_command("ACL SETUSER blind on >" + PASSWORD + " ~* +ping +client|setname")
        found = Site(postgres, redis)
        with worker_resources(found.settings()) as resources:
            resources.claim()
        yield found


@pytest.fixture
def meterfall(command_server: subprocess.Popen[str], site: Site) -> Meterfall:
    return Meterfall(command_server, site.settings())


def urls_of(settings: Settings) -> dict[str, str]:
    return {"DATABASE_URL": settings.database_url or "", "REDIS_URL": settings.redis_url}


def test_a_missing_right_names_login_right_table_command_and_role(site: Site, meterfall: Meterfall) -> None:
    assert_refused(
        meterfall("account", "open", USER, "basic", **urls_of(site.settings("mf_reader"))),
        2, "login `mf_reader` may not INSERT into", "account",
        "`meterfall account open` needs the role meterfall_operator",
    )  # fmt: skip
    shown = meterfall("status", **urls_of(site.settings("nobody")))
    assert shown.code == 1
    assert "nobody" in shown.out
    assert "meterfall_monitor" in shown.out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"login": "missing"}, 'role "missing" does not exist'),
        ({"database": "missing"}, 'database "missing" does not exist'),
        ({"redis_user": "missing"}, "wrong user or password"),
        ({"redis_user": "blind"}, "lacks a right"),
        ({"login": "mf_reader"}, "needs the role meterfall_worker"),
    ],
)
def test_a_dyno_ends_with_the_reason_and_so_does_a_command(
    site: Site, meterfall: Meterfall, wrong: dict[str, str], said: str
) -> None:
    settings = site.settings(**wrong)
    with dyno(settings) as process:
        _, output = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 2, output
    assert said in output
    assert "Traceback" not in output
    assert PASSWORD not in output
    if "login" not in wrong or wrong["login"] == "missing":
        assert_refused(meterfall("account", "show", USER, **urls_of(settings)), 2, said)


@pytest.mark.parametrize(
    ("variable", "option", "said"),
    [
        ("REDIS_URL", "dbb=1", "REDIS_URL: no such option 'dbb'"),
        ("REDIS_URL", "health_check_interval=soon", "health_check_interval"),
        ("DATABASE_URL", "nonsense=1", 'invalid connection option "nonsense"'),
        ("DATABASE_URL", "target_session_attrs=writable", "invalid target_session_attrs value"),
    ],
)
def test_a_wrong_option_of_a_url_is_no_outage(
    site: Site, meterfall: Meterfall, variable: str, option: str, said: str
) -> None:
    urls = urls_of(site.settings())
    urls[variable] += f"{'&' if '?' in urls[variable] else '?'}{option}"
    assert_refused(meterfall("account", "show", USER, **urls), 2, variable, said)
    with dyno(settings_for(urls["DATABASE_URL"], urls["REDIS_URL"])) as process:
        _, output = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, said in output, "Traceback" in output) == (2, True, False), output
    with (
        pytest.raises((SettingsError, LedgerUnavailable), match=variable),
        Billing.connect(settings_for(urls["DATABASE_URL"], urls["REDIS_URL"])) as billing,
    ):
        billing.check("never-seen", METER, 1)


def test_a_password_that_redis_wants_and_nobody_gave_is_named(site: Site, meterfall: Meterfall) -> None:
    assert_refused(meterfall("holds", "list", REDIS_URL=site.redis.url), 2, "REDIS_URL", "NOAUTH")
    assert "NOAUTH" in meterfall("status", REDIS_URL=site.redis.url).out


def test_the_client_says_what_is_refused(site: Site) -> None:
    with Billing.connect(site.settings(database="missing")) as billing, pytest.raises(LedgerUnavailable) as caught:
        billing.check("never-seen", METER, 1)
    assert "refuses us: database" in str(caught.value)


def test_older_tables_are_named_with_the_remedy(site: Site, meterfall: Meterfall) -> None:
    with psycopg.connect(site.postgres.url, autocommit=True) as owner:
        owner.execute("UPDATE meterfall_version SET version_num = '0004'")
        try:
            said = f"tables are 0004, this release wants {newest_revision()}: run `meterfall migrate`"
            assert_refused(meterfall("account", "list"), 2, said)
            assert_refused(meterfall("status"), 2, said)
            with dyno(site.settings()) as process:
                _, output = process.communicate(timeout=WAIT_SECONDS)
            assert (process.returncode, said in output, "Traceback" in output) == (2, True, False)
            owner.execute("UPDATE meterfall_version SET version_num = '9999'")
            assert "the tables are" not in meterfall("status").out, "newer tables fit: they come before their dynos"
        finally:
            owner.execute("UPDATE meterfall_version SET version_num = %s", (newest_revision(),))


def test_a_monitor_reads_the_status(site: Site) -> None:
    with worker_resources(site.settings("mf_monitor")) as resources:
        resources.claim()
        assert read_status(resources).accounts == 0


# ---------------------------------------------------------------------------------------------------------------------
# A right that is missing at work


def halted_by(settings: Settings, owner: Settings) -> str:
    """Drain a partition with an event as `settings` log in, which must halt it; what `status` then says of it."""
    with Billing.connect(owner) as billing:
        billing.emit(USER, METER, 5, event_id=new_key())
    partition = keys.partition_of(USER, settings.partitions)
    with worker_resources(settings) as resources, pytest.raises(Exception, match="permission"):
        drain_stream(resources, partition)
    with worker_resources(owner) as resources:
        (halted,) = {one.halted for one in read_status(resources).partitions if one.halted}
        resources.redis.delete(partition.halted)
        drain_stream(resources, partition)
    return halted


def test_a_right_that_is_missing_at_work_names_login_right_table_and_role(site: Site) -> None:
    with worker_resources(site.settings()) as resources:
        accounts.open_new(resources, USER, "basic")
    with psycopg.connect(site.postgres.url, autocommit=True) as owner:
        owner.execute("CREATE ROLE mf_partial LOGIN")
        owner.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO mf_partial")
        needs = ": `meterfall worker run` needs the role meterfall_worker (42501)"

        owner.execute("REVOKE UPDATE ON balance FROM mf_partial")
        said = halted_by(site.settings("mf_partial"), site.settings())
        assert said == f"DATABASE_URL: login `mf_partial` may not UPDATE balance{needs}"

        columns = "SELECT string_agg(attname, ', ') FROM pg_attribute WHERE attrelid = 'balance'::regclass AND "
        ((others,),) = owner.execute(f"{columns} attnum > 0 AND NOT attisdropped AND attname <> 'used'".encode())
        owner.execute(f"GRANT UPDATE ({others}) ON balance TO mf_partial".encode())
        said = halted_by(site.settings("mf_partial"), site.settings())
        assert said == f"DATABASE_URL: login `mf_partial` may not UPDATE (used) balance{needs}"


def test_a_right_that_the_role_itself_lacks_at_work_names_the_remedy(site: Site) -> None:
    with psycopg.connect(site.postgres.url, autocommit=True) as owner:
        owner.execute("CREATE ROLE mf_worker LOGIN IN ROLE meterfall_worker")
        owner.execute("REVOKE INSERT ON ledger_entry FROM meterfall_worker")
        owner.execute("REVOKE INSERT ON usage_log FROM meterfall_worker")
        try:
            said = halted_by(site.settings("mf_worker"), site.settings())
        finally:
            grant_roles(site.postgres.url)
    assert said == (
        "DATABASE_URL: login `mf_worker` lacks a right (permission denied for table usage_log), and so does its role "
        "meterfall_worker: `meterfall migrate --roles` grants what this release needs (42501)"
    )


@pytest.mark.parametrize(
    ("lacks", "said"),
    [("-xrange", "it may not run XRANGE, in a script"), ("-xdel", "it may not run XDEL, in a script")],
)
def test_a_right_of_redis_that_is_missing_at_work_is_named(site: Site, lacks: str, said: str) -> None:
    with Redis.from_url(site.settings().redis_url) as client:
        client.execute_command("ACL SETUSER partial reset on >" + PASSWORD + f" ~* &* +@all {lacks}")
    found = halted_by(site.settings(redis_user="partial"), site.settings())
    assert "the user `partial` lacks a right (NOPERM)" in found
    assert f"{said}: `meterfall worker run` needs the role worker" in found
    assert PASSWORD not in found
    assert USER not in found
