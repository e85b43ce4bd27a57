"""Bring the schema to a revision."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, NamedTuple, cast

import psycopg
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from config.settings import DEFAULT_CATALOGUE
from worker.ledger.connection import LOCK_SPACE, LedgerError, Postgres, engine_url
from worker.ledger.migrations import VERSION_TABLE, newest_revision
from worker.ledger.revision import adopt, check_revision, read_revision

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATION_LOCK_SPACE = LOCK_SPACE + 1


# Longest time that a waiting migration blocks workers, and the time that it then gives them.
_MIGRATION_LOCK_TIMEOUT_MS = 500


_MIGRATION_PAUSE_SECONDS = 1.0

# Rows of a table that are counted one by one; of a larger one Postgres tells an estimate.
_COUNTED_ROWS = 100_000


def migrate(
    database_url: str, revision: str = "head", patience_seconds: float = 60, *, schema: str | None = None
) -> None:
    """Bring the schema at `database_url` to `revision` ("head", "base", or a number), forward or back.

    Each migration is one transaction; after a kill in between, the next call goes on from there. It waits for a table
    in use only for a moment at a time: later users of the table wait for its lock also, and a backup may take hours.
    The tables are in `schema`, which it creates; None: in the first of the login's search path.
    Raises LedgerError for a revision that does not exist, for a database of another program, which it leaves as it is,
    for a pooler, for a step back that would lose what accounts own, and if a table is still in use after
    `patience_seconds`.
    """
    # Imported here: it takes a sixth of a worker's start, and only migrations need it.
    from alembic import command
    from alembic.util import CommandError

    engine, config = owner_engine(database_url, schema), _config()
    # One at a time: a platform may start several dynos at once. The lock is the session's, so it ends with it.
    with engine.connect() as connection, engine.connect() as guard:
        refuse_pooler(connection)
        guard.execute(text("SELECT pg_advisory_lock(:space, 0)"), {"space": MIGRATION_LOCK_SPACE})
        if schema is not None:
            connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
        connection.execute(text(f"SET lock_timeout = {_MIGRATION_LOCK_TIMEOUT_MS}"))
        connection.commit()
        config.attributes["connection"] = connection

        def run() -> None:
            version = adopt(connection, frozenset(_known(config)))
            connection.commit()
            (command.downgrade if _is_back(version, revision) else command.upgrade)(config, revision)

        try:
            _once_not_in_use(connection, patience_seconds, run)
        except CommandError:
            raise _unknown(config, revision) from None


def grant_roles(database_url: str, *, schema: str | None = None) -> None:
    """Apply the packaged config/postgres-roles.sql to the tables in `schema`. Repeating is harmless.

    Raises LedgerError if there is no ledger, or for a pooler.
    """
    statements = DEFAULT_CATALOGUE.with_name("postgres-roles.sql").read_text(encoding="utf-8")
    with owner_engine(database_url, schema).connect() as connection:
        refuse_pooler(connection)
        postgres = _driver(connection)
        check_revision(postgres)
        postgres.rollback()
        postgres.execute(statements)  # its own BEGIN and COMMIT


def owner_engine(database_url: str, schema: str | None) -> Engine:
    """Return connections for the owner of the tables, without time-outs, none of them kept."""
    return create_engine(engine_url(database_url, schema, {}), poolclass=NullPool)


def _driver(connection: Connection) -> Postgres:
    """Return psycopg's own connection."""
    postgres = connection.connection.driver_connection
    assert postgres is not None
    return cast("Postgres", postgres)


def refuse_pooler(connection: Connection) -> None:
    """Raise LedgerError if the server process is another than the one that greeted us: a pooler is in between.

    A migration's locks and settings are the session's; a pooler of transactions would give them to somebody else.
    """
    postgres = _driver(connection)
    ((server_process,),) = postgres.execute("SELECT pg_backend_pid()").fetchall()
    postgres.rollback()
    if server_process != postgres.info.backend_pid:
        raise LedgerError("METERFALL_MIGRATE_URL: must name Postgres itself; there is a pooler in between")


class Revisions(NamedTuple):
    """The revision of the tables, None without any, and the one that this release wants."""

    current: str | None
    wanted: str


def revisions(database_url: str, *, schema: str | None = None) -> Revisions:
    """Return the revision of the tables and the wanted one. Changes nothing."""
    with owner_engine(database_url, schema).connect() as connection:
        return Revisions(read_revision(_driver(connection)), newest_revision())


def statements(database_url: str, revision: str = "head", *, schema: str | None = None) -> str:
    """Return the statements that `migrate` would run. Changes nothing. Raises LedgerError as `migrate` does."""
    with owner_engine(database_url, schema).connect() as connection:
        return _statements(read_revision(_driver(connection)), revision)


class Loss(NamedTuple):
    """A table that a step back would drop with rows in it; `exact` is false for an estimate."""

    table: str
    rows: int
    exact: bool


class Losses(NamedTuple):
    """What a migration would destroy, and in which database."""

    database: str
    tables: list[Loss]


def losses(database_url: str, revision: str, *, schema: str | None = None) -> Losses:
    """Return the tables with rows that `migrate` to `revision` would drop; forward there are none. Changes nothing.

    Reads the statements themselves, so no migration can forget to declare a table. Raises LedgerError as `migrate`
    does.
    """
    with owner_engine(database_url, schema).connect() as connection:
        database = str(connection.execute(text("SELECT current_database()")).scalar_one())
        version = read_revision(_driver(connection))
        dropped = re.findall(r"\bDROP TABLE (\w+)", _statements(version, revision))
        own = [table for table in dropped if table not in (VERSION_TABLE, "alembic_version")]
        found = [_count(connection, table) for table in own] if _is_back(version, revision) else []
    return Losses(database, [loss for loss in found if loss.rows])


def _count(connection: Connection, table: str) -> Loss:
    """Count the rows of a table: a few exactly, many by the estimate of Postgres, at least those that were seen."""
    seen = connection.execute(text(f"SELECT count(*) FROM (SELECT FROM {table} LIMIT {_COUNTED_ROWS + 1}) AS seen"))
    rows = int(seen.scalar_one())
    if rows <= _COUNTED_ROWS:
        return Loss(table, rows, exact=True)
    estimate = connection.execute(
        text("SELECT reltuples FROM pg_class WHERE oid = to_regclass(:table)"), {"table": table}
    )
    return Loss(table, max(rows, int(estimate.scalar_one())), exact=False)


def _config(output: io.StringIO | None = None) -> Config:
    """Return Alembic's configuration; printed statements go to `output`."""
    from alembic.config import Config

    config = Config(output_buffer=output)
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    return config


def _is_back(version: str | None, revision: str) -> bool:
    return revision == "base" or (version is not None and revision.isdigit() and revision < version)


def _statements(version: str | None, revision: str) -> str:
    from alembic import command
    from alembic.util import CommandError

    if revision in ("base", version) and version in (None, revision):
        return ""
    output = io.StringIO()
    config = _config(output)
    run = command.downgrade if _is_back(version, revision) else command.upgrade
    try:
        run(config, f"{version or 'base'}:{revision}", sql=True)
    except CommandError:
        raise _unknown(config, revision) from None
    return output.getvalue()


def _unknown(config: Config, revision: str) -> LedgerError:
    return LedgerError(f"revision: unknown {revision!r}; there are base, head, {', '.join(_known(config))}")


def _known(config: Config) -> list[str]:
    """Return the revisions of this release, oldest first."""
    from alembic.script import ScriptDirectory

    return sorted(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())


def _once_not_in_use(connection: Connection, patience_seconds: float, run: Callable[[], None]) -> None:
    """Run migrations and commit; retry while one of their tables is in use. See `migrate`."""
    give_up_at = monotonic() + patience_seconds
    while True:
        try:
            run()
            connection.commit()
        except OperationalError as error:
            if isinstance(error.orig, psycopg.errors.ObjectNotInPrerequisiteState):
                connection.rollback()
                raise LedgerError(error.orig.diag.message_primary or str(error.orig)) from None
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise
            if monotonic() >= give_up_at:
                raise LedgerError(
                    f"a table has been in use for {patience_seconds:g} s, by a backup or a long query; the schema is "
                    "as the last finished migration left it, and a repeat goes on from there"
                ) from None
            connection.rollback()
            sleep(_MIGRATION_PAUSE_SECONDS)
        else:
            return
