"""Connections to the ledger: their time-outs, snapshots, the ledger's clock and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psycopg
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError

from config.settings import Settings
from worker.errors import BadInput

if TYPE_CHECKING:
    from psycopg.abc import PQGen


T = TypeVar("T")


# First key of our advisory locks: "mf" as two bytes, different from other applications' keys.
LOCK_SPACE = 0x6D66


Postgres = psycopg.Connection[tuple[Any, ...]]


class LedgerError(BadInput):
    """The ledger does not fit the settings of this process. The message says what to do."""


class _ImpatientConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that waits at most `patience_seconds` for each answer.

    The time-outs of the server do not help if the server itself is frozen, nor do those of the network: its kernel
    still acknowledges all data.
    """

    patience_seconds: float

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Wait like psycopg; after the patience close the connection and raise OperationalError.

        It closes because the next statement would take a later answer for its own.
        """
        try:
            return super().wait(gen, interval, self.patience_seconds if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001 - what `wait` says it raises
            self.close()
            raise psycopg.OperationalError(f"Postgres has said nothing for {self.patience_seconds:g} s") from None


def open_engine(settings: Settings, *, statement_timeout_ms: int | None = None) -> Engine:
    """Return a pool of connections with the time-outs of the money path. Opens none yet.

    If Postgres is silent for a little longer than the statement timeout, a connection closes and raises
    psycopg.OperationalError. Raises LedgerError if DATABASE_URL is unset.
    """
    if settings.database_url is None:
        raise LedgerError("DATABASE_URL: unset; it names the Postgres that holds the ledger")
    statement_timeout_ms = statement_timeout_ms or settings.statement_timeout_ms
    timeouts = {
        "statement_timeout": statement_timeout_ms,
        "lock_timeout": settings.lock_timeout_ms,
        "idle_in_transaction_session_timeout": settings.idle_in_transaction_timeout_ms,
        "timezone": "UTC",
    }
    engine = create_engine(
        make_url(settings.database_url).set(drivername="postgresql+psycopg"),
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
            "options": " ".join(f"-c {name}={value}" for name, value in timeouts.items()),
        },
    )

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: object, _record: object, args: list[Any], kwargs: dict[str, Any]) -> Postgres:
        connection = _ImpatientConnection.connect(*args, **kwargs)
        connection.patience_seconds = (statement_timeout_ms + settings.ledger_answer_grace_ms) / 1_000
        return connection

    return engine


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


READ_CLOCK = "SELECT ledger_now(), epoch FROM ledger"


def begin_snapshot(postgres: Postgres, *, idle_timeout_ms: int | None = None) -> None:
    """Make this transaction one snapshot that writes nothing.

    `idle_timeout_ms` is the longest time between two reads; the transaction holds no locks meanwhile.
    """
    postgres.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
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
