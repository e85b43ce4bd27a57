"""Tables in a schema of their own; the revision's table taken over, forward and back; other programs' left alone."""

from __future__ import annotations

import subprocess

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool

from tests.support.commands import Meterfall, assert_refused
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from worker.client import Billing
from worker.ledger.connection import LedgerError
from worker.ledger.migrate import migrate
from worker.ledger.migrations import newest_revision

USER, METER = "user-42", "premium_voice"
HEAD = newest_revision()


@pytest.fixture
def bare_url(database_url: str) -> str:
    """A database without any table."""
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute("DROP SCHEMA public CASCADE")
        owner.execute("CREATE SCHEMA public")
    return database_url


def names_in(url: str, schema: str) -> set[str]:
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace(%s)", (schema,))
        return {str(name) for (name,) in found}


def revision_in(url: str, table: str) -> str | None:
    with psycopg.connect(url) as connection:
        row = connection.execute(f"SELECT version_num FROM {table}".encode()).fetchone()
        return str(row[0]) if row else None


@pytest.mark.parametrize("way", ["setting", "options"])
def test_commands_dynos_and_clients_work_in_a_schema_of_their_own(
    command_server: subprocess.Popen[str], bare_url: str, redis_url: str, way: str
) -> None:
    url, environment = bare_url, {"METERFALL_DATABASE_SCHEMA": "billing"}
    if way == "options":
        with psycopg.connect(bare_url, autocommit=True) as owner:
            owner.execute("CREATE SCHEMA billing")
        url, environment = f"{bare_url}{'&' if '?' in bare_url else '?'}options=-csearch_path%3Dbilling", {}
    settings = settings_for(url, redis_url, database_schema=environment.get("METERFALL_DATABASE_SCHEMA"))
    meterfall = Meterfall(command_server, settings)
    for _ in range(2):
        assert meterfall("migrate", **environment).out == "ledger is at head\n"
    meterfall.done("account", "open", USER, "basic", **environment)
    with Billing.connect(settings) as billing:
        assert billing.check(USER, METER, 1).allowed
        billing.emit(USER, METER, 3)
    with dyno(settings, "--burst", **environment) as process:
        _, output = process.communicate(timeout=30)
    assert process.returncode == 0, output
    with psycopg.connect(bare_url) as owner:
        assert owner.execute("SELECT amount FROM billing.usage_log").fetchall() == [(3,)]
    assert names_in(bare_url, "public") == set()
    assert meterfall("verify", **environment).code == 0


def test_the_former_table_of_the_revision_is_taken_over_and_the_older_migrate_goes_on(bare_url: str) -> None:
    as_before(bare_url)
    migrate(bare_url)
    assert revision_in(bare_url, "meterfall_version") == HEAD
    assert revision_in(bare_url, "alembic_version") == HEAD
    # After a roll-back the older release migrates back and forward again, through the view.
    for direction, revision in ((command.downgrade, "0009"), (command.upgrade, HEAD)):
        older(bare_url, direction, revision)
        assert revision_in(bare_url, "meterfall_version") == revision
    migrate(bare_url, "base")
    older(bare_url, command.upgrade, "head")
    migrate(bare_url)
    assert revision_in(bare_url, "meterfall_version") == HEAD


def as_before(url: str) -> None:
    """A ledger as releases up to now left it."""
    older(url, command.upgrade, "head")
    with psycopg.connect(url, autocommit=True) as owner:
        assert "meterfall_version" not in names_in(url, "public"), owner


def older(url: str, direction: object, revision: str) -> None:
    """Migrate as an older release does: Alembic with its default table, and these migrations."""
    import tempfile
    from pathlib import Path

    from worker.ledger import migrations

    config = Config()
    with tempfile.TemporaryDirectory() as folder:
        text = (
            "from alembic import context\n"
            "context.configure(connection=context.config.attributes['connection'], transaction_per_migration=True)\n"
            "with context.begin_transaction():\n    context.run_migrations()\n"
        )
        Path(folder, "env.py").write_text(text, encoding="utf-8")
        config.set_main_option("script_location", folder)
        config.set_main_option("version_locations", str(Path(migrations.__file__).with_name("versions")))
        config.set_main_option("path_separator", "os")
        engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            direction(config, revision)  # type: ignore[operator]
            connection.commit()


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (
            "CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('ae1027a6acf')",
            "ae1027a6acf",
        ),
        ("CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('0003')", "0003"),
        ("CREATE TABLE account (id int)", "`account` is not ours"),
        ("CREATE TABLE ledger (id int, amount numeric); CREATE TABLE usage_log (id int)", "`ledger` is not ours"),
    ],
)
def test_the_database_of_another_program_is_recognised_and_left_alone(
    command_server: subprocess.Popen[str], bare_url: str, redis_url: str, theirs: str, said: str
) -> None:
    with psycopg.connect(bare_url, autocommit=True) as owner:
        owner.execute(theirs.encode())
    before = names_in(bare_url, "public")
    meterfall = Meterfall(command_server, settings_for(bare_url, redis_url))
    for revision in ("head", "base"):
        assert_refused(meterfall("migrate", revision), 2, "belongs to another program", said)
    if "account" in theirs or "ledger" in theirs:
        assert_refused(meterfall("status"), 2, "belongs to another program")
    assert names_in(bare_url, "public") == before
    # Beside it, in a schema of its own, there is room.
    migrate(bare_url, schema="billing")
    with worker_resources(settings_for(bare_url, redis_url, database_schema="billing")) as resources:
        resources.claim()
    assert names_in(bare_url, "public") == before


def test_a_search_path_that_names_no_schema_is_said(bare_url: str) -> None:
    url = f"{bare_url}{'&' if '?' in bare_url else '?'}options=-csearch_path%3Dnowhere"
    with pytest.raises(LedgerError, match="METERFALL_DATABASE_SCHEMA"):
        migrate(url)
