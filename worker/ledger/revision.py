"""The revision of the tables: where it is written, whose tables these are, and whether they fit this release.

The number is in a table of our own, `meterfall_version`. Releases up to the one with migration 0010 kept it in
`alembic_version`, which other programs use also. `adopt` renames that table and leaves a view of the old name in its
place. So the `migrate` of an older release goes on working after a roll-back, forward and back.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from sqlalchemy import Connection, text

from worker.ledger.connection import LedgerError, Postgres
from worker.ledger.migrations import VERSION_TABLE, newest_revision

FORMER_VERSION_TABLE = "alembic_version"

# Any one of them marks a database as used. Together with these columns they are ours since the first migration.
_NAMES = ("account", "balance", "dead_letter", "ledger", "ledger_entry", "usage_log")
_SIGNS = (("ledger", "epoch"), ("ledger", "partitions"), ("usage_log", "event_id"), ("balance", "rollover"))
_FOREIGN = "this schema belongs to another program: {}; use a database of its own, or set METERFALL_DATABASE_SCHEMA"

_LOOK = """
    SELECT current_schema(),
        (SELECT relkind::text FROM pg_class WHERE relname = 'meterfall_version' AND relnamespace = here.oid),
        (SELECT relkind::text FROM pg_class WHERE relname = 'alembic_version' AND relnamespace = here.oid),
        ARRAY(SELECT relname::text FROM pg_class WHERE relnamespace = here.oid AND relname = ANY(%(names)s)
            AND relkind IN ('r', 'p', 'v', 'm', 'f') ORDER BY 1),
        ARRAY(SELECT relname::text || '.' || attname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
            WHERE relnamespace = here.oid AND attnum > 0 AND NOT attisdropped)
    FROM (SELECT current_schema()::text AS name) AS wanted LEFT JOIN pg_namespace AS here ON nspname = wanted.name
"""


class Schema(NamedTuple):
    """What the first schema of the search path holds: tables with our names, and the two tables of versions."""

    name: str | None
    version_table: bool
    former_table: bool  # a table, not the view that `adopt` leaves
    tables: tuple[str, ...]
    is_ours: bool


def look_at(postgres: Postgres) -> Schema:
    """Look at the schema that a connection works in. Needs no right on any table."""
    name, version, former, tables, columns = postgres.execute(_LOOK, {"names": list(_NAMES)}).fetchall()[0]
    is_ours = {f"{table}.{column}" for table, column in _SIGNS} <= set(columns)
    return Schema(name, version is not None, former in ("r", "p"), tuple(tables), is_ours)


def check_revision(postgres: Postgres) -> None:
    """Raise LedgerError unless this schema holds a ledger with all that this release wants.

    Newer tables fit also: migrations come before the dynos that need them, and stay after a roll-back. A login that may
    not read the version is believed: the first statement that does not fit will tell.
    """
    found = look_at(postgres)
    if not found.is_ours:
        if found.tables:
            raise LedgerError("DATABASE_URL: " + _FOREIGN.format(f"its table `{found.tables[0]}` is not ours"))
        if found.name is None and (path := _search_path(postgres)) is not None:
            raise LedgerError(
                f"METERFALL_DATABASE_SCHEMA: the schema {path} does not exist; mend the setting, or run "
                "`meterfall migrate`, which makes it"
            )
        where = "this database" if found.name in (None, "public") else f"the schema {found.name}"
        raise LedgerError(f"DATABASE_URL: {where} holds no ledger; run `meterfall migrate`")
    revision, wanted = _revision_in(postgres, found), newest_revision()
    if revision is not None and revision < wanted:
        raise LedgerError(f"DATABASE_URL: tables are {revision}, this release wants {wanted}: run `meterfall migrate`")


def _search_path(postgres: Postgres) -> str | None:
    """Return the schema that the connection was told to work in; None for the server's own search path."""
    ((path,),) = postgres.execute("SELECT current_setting('search_path')").fetchall()
    return None if "$user" in path else str(path)


def read_revision(postgres: Postgres) -> str | None:
    """Return the revision of our tables; None without any, or for a login that may not read it. Changes nothing."""
    found = look_at(postgres)
    return _revision_in(postgres, found) if found.is_ours else None


def _revision_in(postgres: Postgres, found: Schema) -> str | None:
    table = VERSION_TABLE if found.version_table else FORMER_VERSION_TABLE
    ((readable,),) = postgres.execute(
        "SELECT coalesce(has_table_privilege(to_regclass(%s)::oid, 'SELECT'), false)", (table,)
    ).fetchall()
    if not readable:
        return None
    ((revision,),) = postgres.execute(f"SELECT max(version_num) FROM {table}".encode()).fetchall()
    return cast("str | None", revision)


def adopt(connection: Connection, known: frozenset[str]) -> str | None:
    """Make `meterfall_version` the place of the revision, and return what it holds, without a commit.

    `known` are the revisions of this release; a later release's are numbers also. Repeating is harmless.
    Raises LedgerError and changes nothing if the schema belongs to another program.
    """
    postgres = connection.connection.driver_connection
    assert postgres is not None
    found = look_at(postgres)
    if found.name is None:
        raise LedgerError("DATABASE_URL: its search path names no schema; set METERFALL_DATABASE_SCHEMA to create one")
    if found.tables and not found.is_ours:
        raise LedgerError("DATABASE_URL: " + _FOREIGN.format(f"its table `{found.tables[0]}` is not ours"))
    if found.version_table:
        return _version_in(connection, VERSION_TABLE)
    if not found.former_table:
        if found.tables:
            raise LedgerError("DATABASE_URL: has our tables, but no table of their revision; restore it whole")
        return None
    version = _version_in(connection, FORMER_VERSION_TABLE)
    is_former = found.is_ours and version is not None and (version in known or version.isdigit())
    if version is not None and not is_former:
        raise LedgerError("DATABASE_URL: " + _FOREIGN.format(f"its `alembic_version` is {version!r}"))
    if is_former or not _has_others(connection):
        connection.execute(text(f"ALTER TABLE {FORMER_VERSION_TABLE} RENAME TO {VERSION_TABLE}"))
        connection.execute(text(f"ALTER INDEX alembic_version_pkc RENAME TO {VERSION_TABLE}_pkc"))
        connection.execute(text(f"CREATE VIEW {FORMER_VERSION_TABLE} AS SELECT version_num FROM {VERSION_TABLE}"))
    return version


def _version_in(connection: Connection, table: str) -> str | None:
    return connection.execute(text(f"SELECT max(version_num) FROM {table}")).scalar()


def _has_others(connection: Connection) -> bool:
    """True if the schema has any table but `alembic_version`, which is empty: then it may be another program's."""
    others = "SELECT 1 FROM pg_tables WHERE schemaname = current_schema() AND tablename <> 'alembic_version' LIMIT 1"
    return connection.execute(text(others)).scalar() is not None
