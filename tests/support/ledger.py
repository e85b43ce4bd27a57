"""The ledger of a test: accounts opened at will, rows, and a clock that is the test's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta

import psycopg
from redis import ResponseError

from config.catalogue import load_catalogue
from config.settings import Settings
from worker.keyspace.connection import connect
from worker.keyspace.keys import partitions_of
from worker.ledger import batch
from worker.ledger.connection import batch_connection, open_engine
from worker.rules.history import open_for_good
from worker.rules.lifecycle import open_account
from worker.rules.rows import Writes


def give_account(
    settings: Settings,
    user_id: str,
    plan: str = "tenant",
    status: str = "active",
    buckets: Mapping[str, tuple[int, int, int]] | None = None,
    end: datetime | None = None,
) -> None:
    """Open an account. `buckets` maps meters to what it has at first: used, rollover, purchased.

    `end` is the end of its first period, if the payment provider names one.
    """
    give_accounts(settings, [user_id], plan, status, buckets, end)


def give_accounts(
    settings: Settings,
    users: Sequence[str],
    plan: str = "tenant",
    status: str = "active",
    buckets: Mapping[str, tuple[int, int, int]] | None = None,
    end: datetime | None = None,
) -> None:
    """Open several accounts alike. See `give_account`."""
    now = datetime.now(UTC)
    catalogue = load_catalogue(settings.catalogue_path)
    writes = Writes.none()
    for user_id in users:
        account = open_account(catalogue, user_id, plan, status, now, end)
        balances = dict(account.balances)
        for meter, (used, rollover, purchased) in (buckets or {}).items():
            balances[meter] = balances[meter]._replace(used=used, rollover=rollover, purchased=purchased)
        open_for_good(writes, account._replace(balances=balances), now)
    engine = open_engine(settings)
    try:
        with batch_connection(engine) as postgres:
            batch.store_and_commit(postgres, writes, now)
    finally:
        engine.dispose()


# One statement, run by Postgres alone. DELETE, not TRUNCATE: that makes new files, and syncs them. Accounts come last,
# because the others refer to them. A table is left alone if it is empty and all its triggers are on.
_EMPTY = """
DO $$
DECLARE
    name text;
    used boolean;
BEGIN
    FOR name IN
        SELECT tablename FROM pg_tables
        WHERE schemaname = 'public' AND tablename NOT IN ('ledger', 'meterfall_version')
        ORDER BY tablename = 'account'
    LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM %I)', name) INTO used;
        IF used OR EXISTS (SELECT FROM pg_trigger WHERE tgrelid = name::regclass AND tgenabled = 'D') THEN
            EXECUTE format('ALTER TABLE %I DISABLE TRIGGER USER', name);
            EXECUTE format('DELETE FROM %I', name);
            EXECUTE format('ALTER TABLE %I ENABLE TRIGGER USER', name);
        END IF;
    END LOOP;
    UPDATE ledger SET epoch = DEFAULT, partitions = NULL;
    -- A test may have moved the clock.
    CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT clock_timestamp()';
END $$
"""


def empty_ledger(database_url: str) -> None:
    """Make a migrated ledger as new; a tenth of the time that a new database takes."""
    with psycopg.connect(database_url) as connection:
        connection.execute(_EMPTY)


def rows(settings: Settings, query: str, *values: object) -> list[tuple[object, ...]]:
    """Rows that Postgres returns for `query`."""
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as connection:
        return connection.execute(query, values).fetchall()


def execute(settings: Settings, statements: str, *values: object) -> None:
    """Run statements in the ledger, as nobody but its owner may."""
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as connection:
        connection.execute(statements, values or None)


def move_clock(settings: Settings, by: timedelta) -> None:
    """Let the ledger's clock, in this test's own database, go on `by` ahead of the real one."""
    _replace_clock(settings, f"clock_timestamp() + interval '{by.total_seconds():.6f} seconds'")
    _move_streams(settings, datetime.now(UTC) + by)


def stop_clock(settings: Settings, at: datetime) -> None:
    """Stop the ledger's clock, in this test's own database, at one moment."""
    _replace_clock(settings, f"timestamptz '{at.isoformat()}'")
    _move_streams(settings, at)


def _move_streams(settings: Settings, to: datetime) -> None:
    """Let entries that come from now on be as young as the ledger's clock says: Redis numbers them in ascending order.

    A clock that stands before the real one needs nothing: such entries count as of the ledger's time.
    """
    with closing(connect(settings)) as redis:
        for partition in partitions_of(settings.partitions):
            with suppress(ResponseError):  # the stream is there already
                redis.xadd(partition.entries, {"v": "1"}, id=f"{int(to.timestamp() * 1_000)}-1")
                redis.xdel(partition.entries, f"{int(to.timestamp() * 1_000)}-1")
                redis.hincrby(partition.totals, "disposed", 1)  # or it would count as lost


def _replace_clock(settings: Settings, expression: str) -> None:
    assert settings.database_url is not None
    body = expression.replace("'", "''")
    with psycopg.connect(settings.database_url) as connection:
        connection.execute(
            f"CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT {body}'"
        )
