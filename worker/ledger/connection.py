"""Connections to the ledger, their time-outs, and what holds for a whole transaction."""

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


# First key of our advisory locks: "mf" as two bytes, so that they cannot meet another application's.
LOCK_SPACE = 0x6D66


Postgres = psycopg.Connection[tuple[Any, ...]]


class LedgerError(BadInput):
    """The ledger is not what this process was set up for; the message says what to do."""


class _ImpatientConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that waits for each answer no longer than `patience_seconds`.

    The time-outs of the server are of no use against a server that is frozen itself, nor are those of the network: its
    kernel acknowledges whatever it is sent.
    """

    patience_seconds: float

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """As psycopg does, but raises OperationalError when the patience is over, and closes: an answer that comes
        later would be taken for that of the next statement."""
        try:
            return super().wait(gen, interval, self.patience_seconds if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001 - what `wait` says it raises
            self.close()
            raise psycopg.OperationalError(f"Postgres has said nothing for {self.patience_seconds:g} s") from None


def open_engine(settings: Settings, *, statement_timeout_ms: int | None = None) -> Engine:
    """A pool of connections with the time-outs of the money path. Opens none yet.

    Where Postgres says nothing for a little longer than a statement may take, psycopg.OperationalError is raised and
    the connection is thrown away. Raises LedgerError when DATABASE_URL is unset.
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
            # A network that swallows everything is noticed after about this long, not after hours.
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
    """Psycopg's own connection from the pool, for pipelines and COPY; whatever is not committed is rolled back.

    A connection that failed in any way is thrown away: a statement cut short may still hold its locks.
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

    `idle_timeout_ms` is how long its reader may be busy with something else; it holds no locks meanwhile.
    """
    postgres.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    if idle_timeout_ms is not None:
        postgres.execute(f"SET LOCAL idle_in_transaction_session_timeout = {idle_timeout_ms:d}")


def read_clock(postgres: Postgres) -> datetime:
    """What time it is for the ledger."""
    ((now, _),) = postgres.execute(READ_CLOCK).fetchall()
    return cast("datetime", now)


def new_epoch(postgres: Postgres) -> int:
    """Start a new epoch: balances cached before count as older than anything published from now on.

    Its number is the time: after two restores of one backup, a number that is only the next one would be the same.
    """
    row = postgres.execute(
        "UPDATE ledger SET epoch = greatest(epoch + 1, extract(epoch FROM clock_timestamp())::bigint) RETURNING epoch"
    ).fetchone()
    assert row is not None
    postgres.commit()
    return int(row[0])
