"""Connections to the ledger: their time-outs, snapshots, the ledger's clock and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError

from config.settings import Settings
from worker.errors import BadInput

if TYPE_CHECKING:
    from psycopg.abc import PQGen


T = TypeVar("T")


# First key of our advisory locks: "mf" as two bytes, different from other applications' keys.
LOCK_SPACE = 0x6D66

# Second keys of those that are no partition's. Partitions have their numbers, and the pool has -1.
CATALOGUE_LOCK, LIFE_LOCK, SUMS_LOCK, PROOF_LOCK, PROOF_WRITES_LOCK, NOTICE_LOCK = range(-2, -8, -1)


Postgres = psycopg.Connection[tuple[Any, ...]]


class LedgerError(BadInput):
    """The ledger does not fit the settings of this process. The message says what to do."""


class _ImpatientConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that waits at most `patience_seconds` for each answer.

    The time-outs of the server do not help if the server itself is frozen, nor do those of the network: its kernel
    still acknowledges all data.
    """

    is_standby: bool | None = None
    patience_seconds: float
    # Set where the server's own is another: behind a pooler, which passes no options on. See `begin_snapshot`.
    snapshot_timeout_ms: int | None = None

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Wait like psycopg; after the patience close the connection and raise OperationalError.

        It closes because the next statement would take a later answer for its own. So it does if a signal handler
        raises, unless nothing is under way: the pool would lend the connection again.
        """
        try:
            return super().wait(gen, interval, self.patience_seconds if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001 - what `wait` says it raises
            self.close()
            raise psycopg.OperationalError(f"Postgres has said nothing for {self.patience_seconds:g} s") from None
        except psycopg.Error:
            raise
        except BaseException:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.close()
            raise


# The money path relies on these; Postgres has none by itself. Behind a pooler, config/postgres-roles.sql sets them.
_TIMEOUTS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")


def engine_url(database_url: str, schema: str | None, own_options: Mapping[str, object]) -> URL:
    """Return the URL for an engine: its own `options=` go first, ours after them, so that ours win.

    With `schema` the tables are looked for there and nowhere else.
    """
    url = make_url(database_url).set(drivername="postgresql+psycopg")
    given = url.query.get("options", ())
    given = (given,) if isinstance(given, str) else given
    named = dict(own_options) | ({"search_path": schema} if schema is not None else {})
    options = " ".join([*given, *(f"-c {name}={value}" for name, value in named.items())])
    rest = url.difference_update_query(["options"])
    return rest.update_query_dict({"options": options}) if options else rest


def open_engine(settings: Settings, *, statement_timeout_ms: int | None = None) -> Engine:
    """Return a pool of connections with the time-outs of the money path. Opens none yet.

    If Postgres is silent for a little longer than the statement timeout, a connection closes and raises
    psycopg.OperationalError. Behind a pooler of transactions, each new connection checks that the login has the
    time-outs, and raises LedgerError if it lacks them. Nothing there outlives a transaction, not even a prepared
    statement.
    Raises LedgerError if DATABASE_URL is unset, or has options that a pooler would refuse.
    """
    if settings.database_url is None:
        raise LedgerError("DATABASE_URL: unset; it names the Postgres that holds the ledger")
    pooled = settings.database_pooled
    if pooled and "options" in make_url(settings.database_url).query:
        raise LedgerError("DATABASE_URL: METERFALL_DATABASE_POOLED takes no options=; set them by role")
    snapshot_timeout_ms = statement_timeout_ms if pooled else None
    statement_timeout_ms = statement_timeout_ms or settings.statement_timeout_ms
    options = {
        "statement_timeout": statement_timeout_ms,
        "lock_timeout": settings.lock_timeout_ms,
        "idle_in_transaction_session_timeout": settings.idle_in_transaction_timeout_ms,
        "timezone": "UTC",
    }
    engine = create_engine(
        engine_url(settings.database_url, *((None, {}) if pooled else (settings.database_schema, options))),
        pool_size=settings.database_pool_size,
        max_overflow=settings.database_pool_size,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "connect_timeout": settings.database_connect_timeout_seconds,
            # The kernel notices a network that drops everything after about this time, not after hours.
            "tcp_user_timeout": 2 * settings.statement_timeout_ms,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            **({"prepare_threshold": None} if pooled else {}),
        },
    )

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: object, _record: object, args: list[Any], kwargs: dict[str, Any]) -> Postgres:
        connection = _ImpatientConnection.connect(*args, **kwargs)
        connection.patience_seconds = (statement_timeout_ms + settings.ledger_answer_grace_ms) / 1_000
        connection.snapshot_timeout_ms = snapshot_timeout_ms
        if pooled:
            try:
                _check_login(connection, settings.database_schema)
            except BaseException:
                connection.close()
                raise
        return connection

    return engine


def check_timeouts(postgres: Postgres) -> None:
    """Raise LedgerError if the time-outs of `open_engine` got lost on the way: a pooler may drop them in silence."""
    ((timeout,),) = postgres.execute("SELECT current_setting('statement_timeout')").fetchall()
    if timeout == "0":
        raise LedgerError(
            "DATABASE_URL: a pooler drops our time-outs (ignore_startup_parameters): set METERFALL_DATABASE_POOLED=true"
        )


def _check_login(postgres: Postgres, schema: str | None) -> None:
    """Raise LedgerError if this login lacks a setting that `open_engine` cannot make behind a pooler."""
    login, now_in, timezone, *timeouts = postgres.execute(
        "SELECT current_user, current_schema(), current_setting('timezone'), "
        + ", ".join(f"current_setting('{name}')" for name in _TIMEOUTS)
    ).fetchall()[0]
    postgres.rollback()
    lacking = [name for name, value in zip(_TIMEOUTS, timeouts, strict=True) if value == "0"]
    if timezone not in {"UTC", "Etc/UTC", "GMT"}:
        lacking.append("timezone = 'UTC'")
    if schema is not None and now_in != schema:
        lacking.append(f"search_path = {schema}")
    if lacking:
        raise LedgerError(
            f"METERFALL_DATABASE_POOLED: the login `{login}` lacks {', '.join(lacking)}; `meterfall migrate --roles` "
            "sets them for the members of our roles, and new connections of the pooler have them (RECONNECT)"
        )


@contextmanager
def batch_connection(engine: Engine) -> Iterator[Postgres]:
    """Lend psycopg's own connection from the pool, for pipelines and COPY; roll back uncommitted work.

    Discards a connection after any error: a statement cut short may still hold its locks.
    """
    try:
        connection = engine.connect()
    except DBAPIError as error:
        raise error.orig or error from None
    try:
        inner = connection.connection.driver_connection
        if not isinstance(inner, psycopg.Connection):
            raise LedgerError("DATABASE_URL: needs the psycopg driver")
        yield inner
    except BaseException:
        connection.invalidate()
        raise
    finally:
        connection.close()


def is_standby(postgres: Postgres) -> bool:
    """Return True if the connection is to a standby.

    Postgres tells each connection by itself, which costs no query. Behind a pooler that keeps this, the connection asks
    once. Call it outside a transaction.
    """
    told = postgres.pgconn.parameter_status(b"in_hot_standby")
    if told is not None:
        return told == b"on"
    assert isinstance(postgres, _ImpatientConnection)
    if postgres.is_standby is None:
        ((postgres.is_standby,),) = postgres.execute("SELECT pg_is_in_recovery()").fetchall()
        postgres.rollback()
    return bool(postgres.is_standby)


READ_CLOCK = "SELECT ledger_now(), epoch FROM ledger"


def begin_snapshot(postgres: Postgres, *, idle_timeout_ms: int | None = None) -> None:
    """Make this transaction one snapshot that writes nothing.

    `idle_timeout_ms` is the longest time between two reads; the transaction holds no locks meanwhile.
    """
    postgres.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    if (timeout_ms := getattr(postgres, "snapshot_timeout_ms", None)) is not None:
        postgres.execute(f"SET LOCAL statement_timeout = {timeout_ms:d}")
    if idle_timeout_ms is not None:
        postgres.execute(f"SET LOCAL idle_in_transaction_session_timeout = {idle_timeout_ms:d}")


def read_clock(postgres: Postgres) -> datetime:
    """Return the time of the ledger's clock."""
    ((now, _),) = postgres.execute(READ_CLOCK).fetchall()
    return cast("datetime", now)


def new_epoch(postgres: Postgres) -> int:
    """Start a new epoch: balances cached before it are older than all that workers publish from now on.

    Its number is the time: after two restores of one backup, the next number would be the same.
    """
    row = postgres.execute(
        "UPDATE ledger SET epoch = greatest(epoch + 1, extract(epoch FROM clock_timestamp())::bigint) RETURNING epoch"
    ).fetchone()
    assert row is not None
    postgres.commit()
    return int(row[0])
