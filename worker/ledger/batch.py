"""Every statement that Postgres gets, and nothing else: connections, migrations, the batch, accounts, dead letters.

The statements of the batch run on psycopg's own cursor, in pipelines and with COPY; the rest goes through SQLAlchemy.
Both use one connection of one pool, so a transaction is a transaction whichever way a statement takes.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from heapq import merge
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import psycopg
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from config.settings import Settings
from worker.crash import armed, crash_point
from worker.errors import BadInput
from worker.rules.account import Account, Balance, Parked
from worker.rules.periods import Terms
from worker.rules.received import Refused
from worker.rules.rows import EntryRow, Loaded, UsageRow, Writes

if TYPE_CHECKING:
    from psycopg.abc import PQGen

T = TypeVar("T")

# First key of our advisory locks: "mf" as two bytes, so that they cannot meet another application's.
LOCK_SPACE = 0x6D66
MIGRATION_LOCK_SPACE = LOCK_SPACE + 1
# How long a migration may hold everybody up who comes after it, and how long they then have to themselves.
_MIGRATION_LOCK_TIMEOUT_MS = 500
_MIGRATION_PAUSE_SECONDS = 1.0


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


def migrate(database_url: str, revision: str = "head", patience_seconds: float = 60) -> None:
    """Bring the schema at `database_url` to `revision` ("head", "base", or a number), forward or back.

    Each migration is one transaction; killed in between, the next call goes on from there. A table that somebody uses
    is waited for again and again for a moment: whoever comes after a migration that waits for its lock waits as well,
    and a backup may take hours. Raises LedgerError for a revision that does not exist, and when a table is still in use
    after `patience_seconds`.
    """
    # Here: a sixth of the time that a worker takes to start, and only migrations need it.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    # One at a time: a platform may start several dynos at once. The lock is the session's, so it ends with it.
    with engine.connect() as connection, engine.connect() as guard:
        guard.execute(text("SELECT pg_advisory_lock(:space, 0)"), {"space": MIGRATION_LOCK_SPACE})
        current = connection.execute(text("SELECT to_regclass('alembic_version')")).scalar()
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if current else None
        connection.execute(text(f"SET lock_timeout = {_MIGRATION_LOCK_TIMEOUT_MS}"))
        connection.commit()
        config.attributes["connection"] = connection
        back = revision == "base" or (version is not None and revision.isdigit() and revision < version)
        run = command.downgrade if back else command.upgrade
        try:
            _once_not_in_use(connection, patience_seconds, lambda: run(config, revision))
        except CommandError:
            known = ", ".join(
                reversed([script.revision for script in ScriptDirectory.from_config(config).walk_revisions()])
            )
            raise LedgerError(f"revision: unknown {revision!r}; there are base, head, {known}") from None


def _once_not_in_use(connection: Connection, patience_seconds: float, run: Callable[[], None]) -> None:
    """Run migrations, again and again while a table of theirs is in use, and commit. See `migrate`."""
    give_up_at = monotonic() + patience_seconds
    while True:
        try:
            run()
            connection.commit()
        except OperationalError as error:
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


def claim_partitions(engine: Engine, partitions: int) -> bool:
    """Write the number of partitions once; returns True for whoever wrote it: nobody has used this ledger before.

    Raises LedgerError when the ledger was set up with another number: events of a user would change streams.
    """
    with batch_connection(engine) as postgres:
        try:
            written = read_partitions(postgres)
        except psycopg.errors.UndefinedTable:
            raise LedgerError("DATABASE_URL: this database holds no ledger; run `meterfall migrate`") from None
        unused = written is None
        if unused:
            postgres.execute("UPDATE ledger SET partitions = %s WHERE partitions IS NULL", (partitions,))
            written = read_partitions(postgres)
            postgres.commit()
    if written != partitions:
        raise LedgerError(f"METERFALL_PARTITIONS: this ledger has {written} partitions, not {partitions}")
    return unused


def read_partitions(postgres: Postgres) -> int | None:
    """The number of partitions that the ledger was set up with; None where no worker has run yet."""
    row = postgres.execute("SELECT partitions FROM ledger").fetchone()
    return row[0] if row else None


def change_partitions(postgres: Postgres, partitions: int) -> None:
    """Write another number of partitions, without a commit."""
    postgres.execute("UPDATE ledger SET partitions = %s", (partitions,))


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


# ---------------------------------------------------------------------------------------------------------------------
# The batch. In the order in which it uses them.


_COPY_USAGE = f"COPY usage_log ({', '.join(UsageRow._fields)}) FROM STDIN"

# Columns in the order of `Account` without its balances, and of `Balance`.
_ACCOUNT = "user_id, plan, status, trust, seq, highest_tier, next_plan, plan_change_at, next_status, status_change_at"
_BALANCE = ", ".join(Balance._fields)
_USAGE = ", ".join(f"{name}::text" if name in ("multiplier", "dimensions") else name for name in UsageRow._fields)

_LOCK_PARTITION = """
    SELECT pg_try_advisory_xact_lock(%s, %s), latest.id IS NOT NULL AND latest.resumed_at IS NULL, latest.tolerated_to
    FROM ledger LEFT JOIN LATERAL (
        SELECT id, resumed_at, tolerated_to FROM partition_pause WHERE partition_id = %s ORDER BY id DESC LIMIT 1
    ) AS latest ON true
"""

# Locked in the order of the ids, so that two batches over the same users wait for each other, never in a circle.
_LOCK_ACCOUNTS = f"""
    SELECT {_ACCOUNT} FROM account WHERE user_id = ANY(%s::text[]) ORDER BY user_id FOR UPDATE
"""
# A statement of its own, after the locks: joined to the locking one it would read balances from before the wait.
_READ_BALANCES = f"""
    SELECT user_id, {_BALANCE} FROM balance WHERE user_id = ANY(%s::text[]) ORDER BY user_id, meter
"""
# One look into the index per event: as a plain join Postgres may prefer to read the whole log, which only grows.
# Never prepared: a plan kept from the days of a small log reads all rows of a user, or of everybody, for each event.
_READ_RECORDED = """
    SELECT asked.user_id, asked.event_id, meter, quantity, multiplier::text
    FROM unnest(%s::text[], %s::text[]) AS asked (user_id, event_id)
    CROSS JOIN LATERAL (
        SELECT meter, quantity, multiplier FROM usage_log
        WHERE usage_log.user_id = asked.user_id AND usage_log.event_id = asked.event_id
        OFFSET 0
    ) AS recorded
"""
_READ_CLOCK = "SELECT ledger_now(), epoch FROM ledger"

_STORE_BALANCES = """
    WITH moved AS (
        UPDATE balance SET used = new.used, rollover = new.rollover, purchased = new.purchased,
            lifetime_consumed = lifetime_consumed + new.consumed, lifetime_granted = lifetime_granted + new.granted
        FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[])
            AS new (user_id, meter, used, rollover, purchased, consumed, granted)
        WHERE balance.user_id = new.user_id AND balance.meter = new.meter
    )
    UPDATE account SET seq = new.seq FROM unnest(%s::text[], %s::bigint[]) AS new (user_id, seq)
    WHERE account.user_id = new.user_id
"""
# A balance whose terms changed: the whole row, apart from what only grows.
_RETERM = {
    "allowance": "bigint", "spill": "boolean", "rollover_cap": "bigint", "caps": "jsonb", "cadence": "text",
    "anchor": "text", "anchored_at": "timestamptz", "period_index": "bigint", "period_start": "timestamptz",
    "period_end": "timestamptz", "used": "bigint", "rollover": "bigint", "purchased": "bigint", "cap_used": "jsonb",
    "parked": "jsonb",
}  # fmt: skip
_STORE_TERMS = f"""
    UPDATE balance SET {", ".join(f"{name} = new.{name}" for name in _RETERM)},
        lifetime_consumed = lifetime_consumed + new.consumed, lifetime_granted = lifetime_granted + new.granted
    FROM unnest(%s::text[], %s::text[], {", ".join(f"%s::{kind}[]" for kind in _RETERM.values())}, %s::bigint[],
        %s::bigint[]) AS new (user_id, meter, {", ".join(_RETERM)}, consumed, granted)
    WHERE balance.user_id = new.user_id AND balance.meter = new.meter
"""
_RESTATE_ACCOUNT = """
    UPDATE account SET plan = %s, status = %s, trust = %s, highest_tier = %s, next_plan = %s, plan_change_at = %s,
        next_status = %s, status_change_at = %s
    WHERE user_id = %s
"""
_COPY_ACCOUNTS = f"COPY account ({_ACCOUNT}, opened_at) FROM STDIN"
_COPY_BALANCES = f"COPY balance (user_id, {_BALANCE}, lifetime_consumed, lifetime_granted) FROM STDIN"
_COPY_ENTRIES = f"COPY ledger_entry ({', '.join(EntryRow._fields)}) FROM STDIN"
_INSERT_DEAD_LETTER = """
    INSERT INTO dead_letter (partition_id, entry_id, payload_hash, reason, detail, payload, payload_bytes, signed_by)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (partition_id, entry_id, payload_hash) DO NOTHING
"""
_DROP_LEDGER_HOLDS = """
    DELETE FROM ledger_hold USING unnest(%s::text[], %s::text[]) AS closed (user_id, hold_key)
    WHERE ledger_hold.user_id = closed.user_id AND ledger_hold.hold_key = closed.hold_key
"""


class Turn(NamedTuple):
    """Whether a drain may work on a partition: `is_ours` when no other one does.

    What was let through when its last pause ended, up to the entry `tolerated_to`, gives no reason for another.
    """

    is_ours: bool
    is_paused: bool
    tolerated_to: str | None


def try_lock_partition(postgres: Postgres, partition: int) -> Turn:
    """Take the partition's lock until this transaction ends, unless another drain has it; and is it paused?"""
    row = postgres.execute(_LOCK_PARTITION, (LOCK_SPACE, partition, partition)).fetchone()
    return Turn(*row) if row else Turn(is_ours=False, is_paused=False, tolerated_to=None)


def load_for_update(
    postgres: Postgres, users: Sequence[str], identities: tuple[list[str], list[str]], *, skip_locked: bool = False
) -> Loaded:
    """Lock the accounts of `users` (sorted), then read balances, known events and the clock, in two round trips.

    `identities` are the users and the ids of the batch's events.
    `recorded` maps (user, event id) to the fingerprint (meter, quantity, multiplier) of events already in the log.
    With `skip_locked`, accounts that another transaction holds are left out instead of waited for.
    """
    names = text_array(users)
    asked = [text_array(column) for column in identities]
    with postgres.pipeline():
        locked = postgres.execute(_LOCK_ACCOUNTS + ("SKIP LOCKED" if skip_locked else ""), (names,))
        balances = postgres.execute(_READ_BALANCES, (names,))
        recorded = postgres.execute(_READ_RECORDED, asked, prepare=False)
        accounts = _accounts(locked.fetchall(), balances.fetchall())
        fingerprints = {(row[0], row[1]): (row[2], row[3], row[4]) for row in recorded.fetchall()}
    # Not in the pipeline: see `_count_idleness`.
    ((now, epoch),) = postgres.execute(_READ_CLOCK).fetchall()
    histories = {user_id: user_id for user_id, account in accounts.items() if account.status == "closed"}
    for user_id in histories:
        del accounts[user_id]
    strangers = [user_id for user_id in users if user_id not in accounts]
    closed = closed_users(postgres, strangers) if strangers else {}
    if closed:
        fingerprints |= _recorded_before_closing(postgres, closed, identities)
    return Loaded(now, epoch, accounts, fingerprints, histories | closed)


def closed_users(postgres: Postgres, users: Sequence[str]) -> dict[str, str]:
    """Those of `users` whose accounts were closed, and the names of their histories."""
    names = pseudonyms(postgres, users)
    kept = existing_accounts(postgres, list(names.values()))
    return {user_id: pseudonym for user_id, pseudonym in names.items() if pseudonym in kept}


def _recorded_before_closing(
    postgres: Postgres, closed: dict[str, str], identities: tuple[list[str], list[str]]
) -> dict[tuple[str, str], tuple[str, int, str]]:
    """Fingerprints of those events whose account was closed after they were recorded: identity is for ever."""
    owners = {pseudonym: user_id for user_id, pseudonym in closed.items()}
    asked = [(closed[user_id], event_id) for user_id, event_id in zip(*identities, strict=True) if user_id in closed]
    rows = postgres.execute(_READ_RECORDED, _arrays(asked, "tt"), prepare=False).fetchall()
    return {(owners[row[0]], row[1]): (row[2], row[3], row[4]) for row in rows}


def is_recorded(postgres: Postgres, user_id: str, event_id: str) -> bool:
    """True when the event is in the usage log."""
    found = postgres.execute("SELECT 1 FROM usage_log WHERE user_id = %s AND event_id = %s", (user_id, event_id))
    return found.fetchone() is not None


def existing_accounts(postgres: Postgres, users: Sequence[str]) -> set[str]:
    """Those of `users` that have an account, locked or not."""
    rows = postgres.execute(
        "SELECT user_id FROM account WHERE user_id = ANY(%s::text[])", (text_array(users),)
    ).fetchall()
    return {row[0] for row in rows}


def _accounts(locked: list[tuple[Any, ...]], balances: list[tuple[Any, ...]]) -> dict[str, Account]:
    by_user: dict[str, dict[str, Balance]] = {row[0]: {} for row in locked}
    for row in balances:
        if row[0] in by_user:
            by_user[row[0]][row[1]] = _balance(row[1:])
    return {row[0]: _account(row, by_user[row[0]]) for row in locked}


def _account(row: tuple[Any, ...], balances: dict[str, Balance]) -> Account:
    """A row in the order of `_ACCOUNT`."""
    user_id, plan, status, trust, seq, *about = row
    return Account(user_id, plan, status, trust, seq, balances, *about)


def _balance(row: Sequence[Any]) -> Balance:
    """A row in the order of `_BALANCE`."""
    balance = Balance(*row)
    return balance if balance.parked is None else balance._replace(parked=Parked.from_json(balance.parked))


def store_and_commit(postgres: Postgres, partition: int, writes: Writes, now: datetime) -> None:
    """Write one batch and commit it, all or nothing. Raises what Postgres raises."""
    with postgres.cursor() as cursor:
        _copy_new_rows(cursor, writes, now)
        crash_point("rows_written")
        if armed("commit_sent"):
            with postgres.pipeline():
                _update_rows(cursor, partition, writes)
            commit(postgres)
        with postgres.pipeline():
            _update_rows(cursor, partition, writes)
            postgres.commit()


def commit(postgres: Postgres) -> None:
    """COMMIT; a test may have this process die when it is sent, and its answer unknown."""
    if armed("commit_sent"):
        postgres.pgconn.send_query(b"COMMIT")  # and nobody waits for the answer
        crash_point("commit_sent")
    postgres.commit()


def store(postgres: Postgres, writes: Writes, now: datetime, opened_at: Mapping[str, datetime] | None = None) -> None:
    """Write without a commit: the caller has more to write in the same transaction.

    `opened_at` says by user when accounts were opened that were not opened `now`.
    """
    with postgres.cursor() as cursor:
        _copy_new_rows(cursor, writes, now, opened_at)
        with postgres.pipeline():
            _update_rows(cursor, 0, writes)
    _count_idleness(postgres)


def _count_idleness(postgres: Postgres) -> None:
    """A plain statement: due after a pipeline where the transaction goes on.

    Psycopg ends a pipeline with a Sync and then a Flush, and at a Flush behind a Sync Postgres ceases to count how long
    the session idles in its transaction: frozen then, this process would keep its locks for ever.
    """
    postgres.execute("SELECT 1")


def store_refused(postgres: Postgres, partition: int, refused: Sequence[Refused]) -> None:
    """Write dead letters of one stream without a commit."""
    if refused:
        with postgres.cursor() as cursor:
            cursor.executemany(_INSERT_DEAD_LETTER, [_dead_letter(partition, one) for one in refused])


def _copy_new_rows(
    cursor: psycopg.Cursor[tuple[Any, ...]],
    writes: Writes,
    now: datetime,
    opened_at: Mapping[str, datetime] | None = None,
) -> None:
    if writes.opened_accounts:
        # In the order in which accounts are locked: others who open them, too, wait for us, never in a circle.
        opened_accounts = sorted(writes.opened_accounts, key=lambda account: account.user_id)
        since = [(opened_at or {}).get(account.user_id, now) for account in opened_accounts]
        about = [(*account[:5], *account[6:]) for account in opened_accounts]
        _copy(cursor, _COPY_ACCOUNTS, [(*row, at) for row, at in zip(about, since, strict=True)])
    if writes.opened_balances:
        opened = [(new.user_id, *_balance_row(new.balance), *new[2:]) for new in writes.opened_balances]
        _copy(cursor, _COPY_BALANCES, opened)
    if writes.entries:
        _copy(cursor, _COPY_ENTRIES, writes.entries)
    if writes.usage:
        copy_usage(cursor, writes.usage)


def _update_rows(cursor: psycopg.Cursor[tuple[Any, ...]], partition: int, writes: Writes) -> None:
    if writes.versions:
        cursor.execute(_STORE_BALANCES, (*_arrays(writes.moved, "ttiiiii"), *_arrays(writes.versions, "ti")))
    if writes.retermed:
        rows = [(new.user_id, *_balance_row(new.balance), *new[2:]) for new in writes.retermed]
        cursor.execute(_STORE_TERMS, [_array(column) for column in zip(*rows, strict=True)])
    if writes.restated:
        restated = [(*account[1:4], *account[6:], account.user_id) for account in writes.restated]
        cursor.executemany(_RESTATE_ACCOUNT, restated)
    if writes.refused:
        cursor.executemany(_INSERT_DEAD_LETTER, [_dead_letter(partition, one) for one in writes.refused])
    if writes.closed_holds:
        cursor.execute(_DROP_LEDGER_HOLDS, _arrays(writes.closed_holds, "tt"))


def _balance_row(balance: Balance) -> tuple[Any, ...]:
    """Values of a balance in the order of `_BALANCE`, as COPY and array literals want them."""
    parked = balance.parked and balance.parked.as_json()
    return (
        *balance[:4], _as_json(balance.caps), *balance[5:14], _as_json(balance.cap_used), _as_json(parked),
    )  # fmt: skip


def _as_json(value: object) -> str | None:
    return None if value is None else json.dumps(value)


def _copy(cursor: psycopg.Cursor[tuple[Any, ...]], statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    with cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def copy_usage(cursor: psycopg.Cursor[tuple[Any, ...]], rows: Sequence[UsageRow]) -> None:
    """Append `rows` to the usage log with COPY."""
    _copy(cursor, _COPY_USAGE, rows)


def text_array(items: Sequence[str]) -> str:
    """Array literal of ids and meters, whose characters need no escape. Five times as fast as psycopg's list dumper."""
    return '{"' + '","'.join(items) + '"}' if items else "{}"


def _array(values: Sequence[Any]) -> str:
    """Array literal of any column: numbers, booleans, times, text, NULL."""
    return "{" + ",".join(map(_array_item, values)) + "}"


def _array_item(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, int):  # a bool is one
        return str(value)
    text = value.isoformat() if isinstance(value, datetime) else value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _arrays(rows: Sequence[tuple[Any, ...]], kinds: str) -> list[str]:
    """Rows as one array literal per column; `kinds` says for each whether it holds text or integers."""
    if not rows:
        return ["{}"] * len(kinds)
    columns = zip(*rows, strict=True)
    return [
        text_array(column) if kind == "t" else "{" + ",".join(map(str, column)) + "}"
        for kind, column in zip(kinds, columns, strict=True)
    ]


def storable(words: str) -> str:
    """A sentence that may quote a payload, as a column of text takes it: NUL and lone surrogates are no text there."""
    return words.encode("ascii", "backslashreplace").decode().replace("\x00", "\\0")[:1_000]


def _dead_letter(partition: int, refused: Refused) -> tuple[Any, ...]:
    digest = sha256(refused.payload).digest()
    detail = storable(refused.detail)
    return (
        partition, refused.entry_id, digest, refused.reason.value, detail, refused.payload, refused.payload_bytes,
        refused.signed_by,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One account, read without a lock.

# One statement is one snapshot: account and balances belong to the same version.
_READ_ACCOUNT = f"""
    SELECT ledger_now(), epoch, {_ACCOUNT.replace("user_id", "account.user_id")}, {_BALANCE}
    FROM ledger LEFT JOIN account ON account.user_id = %s LEFT JOIN balance USING (user_id) ORDER BY meter
"""


class LedgerHold(NamedTuple):
    """A hold that the ledger granted while Redis was down."""

    key: str
    meter: str
    amount: int
    expires_at: datetime
    backend: str | None = None


def read_account(postgres: Postgres, user_id: str) -> tuple[datetime, int, Account | None]:
    """The ledger's clock, its epoch and the account at one version; None for an account nobody opened."""
    rows = postgres.execute(_READ_ACCOUNT, (user_id,)).fetchall()
    now, epoch, found = rows[0][:3]
    if found is None:
        return now, epoch, None
    balances = {row[12]: _balance(row[12:]) for row in rows if row[12] is not None}
    return now, epoch, _account(rows[0][2:12], balances)


def contained_events(postgres: Postgres, user_id: str, event_ids: Sequence[str], version: int) -> set[str]:
    """Those of `event_ids` that the account's balance at `version` contains, or that will never change it."""
    rows = postgres.execute(
        "SELECT event_id FROM usage_log WHERE user_id = %s AND event_id = ANY(%s::text[]) AND coalesce(seq, 0) <= %s",
        (user_id, text_array(event_ids), version),
    ).fetchall()
    return {row[0] for row in rows}


def read_ledger_holds(postgres: Postgres, user_id: str) -> list[LedgerHold]:
    """Holds of a user that the ledger granted and that have not expired."""
    rows = postgres.execute(
        "SELECT hold_key, meter, amount, expires_at, backend FROM ledger_hold "
        "WHERE user_id = %s AND expires_at > ledger_now()",
        (user_id,),
    ).fetchall()
    return [LedgerHold(*row) for row in rows]


def delete_ledger_holds(postgres: Postgres, user_id: str, hold_keys: Sequence[str]) -> None:
    """Delete holds of one user."""
    statement = "DELETE FROM ledger_hold WHERE user_id = %s AND hold_key = ANY(%s::text[])"
    postgres.execute(statement, (user_id, text_array(hold_keys)))


def insert_ledger_hold(postgres: Postgres, user_id: str, hold: LedgerHold) -> None:
    """Store a hold; one of the same key that has expired makes room."""
    postgres.execute(
        "INSERT INTO ledger_hold (user_id, hold_key, meter, amount, expires_at, backend) "
        "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (user_id, hold_key) DO UPDATE "
        "SET meter = excluded.meter, amount = excluded.amount, expires_at = excluded.expires_at, "
        "backend = excluded.backend",
        (user_id, *hold),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Changes that are not usage.


def read_entry(postgres: Postgres, user_id: str, entry_key: str, meter: str) -> EntryRow | None:
    """The ledger entry with this idempotency key, or None."""
    statement = (
        f"SELECT {', '.join(EntryRow._fields).replace('detail', 'detail::text')} FROM ledger_entry "
        "WHERE user_id = %s AND entry_key = %s AND meter = %s"
    )
    row = postgres.execute(statement, (user_id, entry_key, meter)).fetchone()
    return EntryRow(*row) if row else None


def has_entry(postgres: Postgres, user_id: str, entry_key: str) -> bool:
    """True when an entry with this idempotency key exists, on whatever meter."""
    statement = "SELECT FROM ledger_entry WHERE user_id = %s AND entry_key = %s LIMIT 1"
    return postgres.execute(statement, (user_id, entry_key)).rowcount > 0


def read_usage(postgres: Postgres, user_id: str, event_id: str) -> UsageRow | None:
    """One row of the usage log, or None."""
    statement = f"SELECT {_USAGE} FROM usage_log WHERE user_id = %s AND event_id = %s"
    row = postgres.execute(statement, (user_id, event_id)).fetchone()
    return _usage_row(row) if row else None


def allowance_at(postgres: Postgres, user_id: str, meter: str, seq: int) -> int | None:
    """The allowance that was in force on a meter when `seq` was taken; None = unlimited."""
    row = postgres.execute(
        "SELECT (detail->>'allowance')::bigint FROM ledger_entry "
        "WHERE user_id = %s AND seq < %s AND meter = %s AND detail ? 'allowance' ORDER BY seq DESC LIMIT 1",
        (user_id, seq, meter),
    ).fetchone()
    return row[0] if row else 0


def _usage_row(row: Sequence[Any]) -> UsageRow:
    """A stored row; its times as ISO 8601 text, like those that are written."""
    values: list[Any] = [value.isoformat() if isinstance(value, datetime) else value for value in row]
    return UsageRow(*values)


# ---------------------------------------------------------------------------------------------------------------------
# What is due.

_DUE_BALANCES = """
    SELECT period_end, user_id FROM balance
    WHERE anchor = 'sticky' AND cadence IN ('monthly', 'weekly', 'daily') AND period_end <= %(now)s
        AND (period_end, user_id) > (%(after_at)s, %(after_user)s)
    ORDER BY period_end, user_id LIMIT %(limit)s
"""
_DUE_CHANGES = """
    SELECT least(plan_change_at, status_change_at), user_id FROM account
    WHERE (plan_change_at IS NOT NULL OR status_change_at IS NOT NULL)
        AND least(plan_change_at, status_change_at) <= %(now)s
        AND (least(plan_change_at, status_change_at), user_id) > (%(after_at)s, %(after_user)s)
    ORDER BY least(plan_change_at, status_change_at), user_id LIMIT %(limit)s
"""
Due = tuple[datetime, str]
_BEFORE_ALL: Due = (datetime.min.replace(tzinfo=UTC), "")


def due_balances(postgres: Postgres, after: Due | None, limit: int) -> list[Due]:
    """The next due sticky periods behind `after`: when they ended and whose they are, oldest first."""
    return _due(postgres, _DUE_BALANCES, after, limit)


def due_changes(postgres: Postgres, after: Due | None, limit: int) -> list[Due]:
    """The next scheduled changes of accounts that are due behind `after`, oldest first."""
    return _due(postgres, _DUE_CHANGES, after, limit)


def _due(postgres: Postgres, statement: str, after: Due | None, limit: int) -> list[Due]:
    at, user_id = after or _BEFORE_ALL
    found = postgres.execute(
        statement, {"now": read_clock(postgres), "after_at": at, "after_user": user_id, "limit": limit}
    )
    return [(row[0], row[1]) for row in found.fetchall()]


def terms_in_force(postgres: Postgres) -> list[tuple[str, str, Terms, int]]:
    """The terms of open periods by plan and meter, and how many accounts have them."""
    columns = ", ".join(Terms._fields)
    rows = postgres.execute(
        f"SELECT plan, meter, {columns}, count(*) FROM balance JOIN account USING (user_id) WHERE status <> 'closed' "
        f"GROUP BY plan, meter, {columns} ORDER BY plan, meter, count(*) DESC"
    ).fetchall()
    return [(row[0], row[1], Terms(*row[2:8]), row[8]) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Erasing an account.

# A statement has a time-out, an account may have millions of events.
_RENAME_CHUNK = 10_000
_END_OF_CHUNK = """
    SELECT max(event_id) FROM (
        SELECT event_id FROM usage_log WHERE user_id = %s AND event_id > %s ORDER BY event_id LIMIT %s
    ) AS chunk
"""
# The backend stays: sub-caps are proved with it, and it is no fact about a person.
_RENAME_USAGE = """
    UPDATE usage_log SET user_id = %(new)s, reference_id = NULL, hold_key = NULL, dimensions =
        CASE WHEN dimensions ? 'backend' THEN jsonb_build_object('backend', dimensions->'backend') END
    WHERE user_id = %(old)s AND event_id > %(after)s AND event_id <= %(last)s
"""


def pseudonym_of(postgres: Postgres, user_id: str) -> str:
    """The name under which the history of a closed account is kept."""
    return pseudonyms(postgres, [user_id])[user_id]


def pseudonyms(postgres: Postgres, users: Iterable[str]) -> dict[str, str]:
    """The names under which the histories of closed accounts are kept, by user id."""
    row = postgres.execute("SELECT pseudonym_key FROM ledger").fetchone()
    assert row is not None
    secret = row[0].bytes
    return {user: f"closed:{hmac.new(secret, user.encode(), sha256).hexdigest()[:40]}" for user in users}


def rename_history(postgres: Postgres, user_id: str, pseudonym: str) -> None:
    """Copy a closed account to `pseudonym`, move its history there and blank what is personal in its events.

    The account's old row stays until `delete_renamed`, so that others may follow.
    """
    names = {"old": user_id, "new": pseudonym}
    columns = [column for column in f"{_ACCOUNT}, opened_at".split(", ") if column != "user_id"]
    postgres.execute(
        f"INSERT INTO account (user_id, {', '.join(columns)}) "
        f"SELECT %(new)s, {', '.join(columns)} FROM account WHERE user_id = %(old)s",
        names,
    )
    postgres.execute("UPDATE balance SET user_id = %(new)s WHERE user_id = %(old)s", names)
    postgres.execute("UPDATE ledger_entry SET user_id = %(new)s WHERE user_id = %(old)s", names)
    after: str | None = ""
    while after is not None:
        ((last,),) = postgres.execute(_END_OF_CHUNK, (user_id, after, _RENAME_CHUNK)).fetchall()
        postgres.execute(_RENAME_USAGE, {**names, "after": after, "last": last})
        after = last
    postgres.execute("DELETE FROM ledger_hold WHERE user_id = %(old)s", names)


def delete_renamed(postgres: Postgres, user_id: str) -> None:
    """Delete the row of an account whose history was renamed."""
    postgres.execute("DELETE FROM account WHERE user_id = %s", (user_id,))


def dead_letters_containing(postgres: Postgres, part: str) -> list[tuple[int, bytes]]:
    """Ids and payloads of dead letters whose payload contains a text."""
    statement = "SELECT id, payload FROM dead_letter WHERE position(%s::bytea IN payload) > 0"
    return [(row[0], row[1]) for row in postgres.execute(statement, (part.encode(),)).fetchall()]


def empty_dead_letter(postgres: Postgres, letter_id: int) -> None:
    """Erase what a dead letter says; that it was refused, and why, stays."""
    postgres.execute(
        "UPDATE dead_letter SET payload = '', detail = 'erased', state = 'dropped', resolved_at = ledger_now() "
        "WHERE id = %s",
        (letter_id,),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Dead letters.


class DeadLetter(NamedTuple):
    """A refused entry as it is kept."""

    id: int
    partition: int
    entry_id: str
    reason: str
    detail: str
    payload: bytes
    payload_bytes: int
    signed_by: str | None
    state: str
    created_at: datetime
    resolved_at: datetime | None


_DEAD_LETTER = (
    "id, partition_id, entry_id, reason, detail, payload, payload_bytes, signed_by, state, created_at, resolved_at"
)


def read_dead_letters(postgres: Postgres, *, state: str, reason: str | None, limit: int) -> list[DeadLetter]:
    """Dead letters in `state`, oldest first; of one `reason` only, if given."""
    rows = postgres.execute(
        f"SELECT {_DEAD_LETTER} FROM dead_letter "
        "WHERE state = %s AND (%s::text IS NULL OR reason = %s) ORDER BY id LIMIT %s",
        (state, reason, reason, limit),
    ).fetchall()
    return [DeadLetter(*row) for row in rows]


def open_dead_letter_ids(postgres: Postgres, reason: str) -> list[int]:
    """Ids of all open dead letters of one reason, oldest first."""
    rows = postgres.execute(
        "SELECT id FROM dead_letter WHERE state = 'open' AND reason = %s ORDER BY id", (reason,)
    ).fetchall()
    return [row[0] for row in rows]


def lock_dead_letter(postgres: Postgres, letter_id: int) -> DeadLetter | None:
    """One dead letter, locked until the transaction ends."""
    row = postgres.execute(f"SELECT {_DEAD_LETTER} FROM dead_letter WHERE id = %s FOR UPDATE", (letter_id,)).fetchone()
    return DeadLetter(*row) if row else None


def resolve_dead_letter(postgres: Postgres, letter_id: int, state: str) -> None:
    """Note that a dead letter was replayed or dropped; the row stays."""
    postgres.execute("UPDATE dead_letter SET state = %s, resolved_at = ledger_now() WHERE id = %s", (state, letter_id))


def open_dead_letters(postgres: Postgres) -> dict[str, int]:
    """How many dead letters are open, by reason. Reads one index, of those alone."""
    rows = postgres.execute(
        "SELECT reason, count(*) FROM dead_letter WHERE state = 'open' GROUP BY reason ORDER BY count(*) DESC, reason"
    ).fetchall()
    return {str(reason): int(count) for reason, count in rows}


def recently_refused(postgres: Postgres, seconds: int) -> dict[int, dict[str, int]]:
    """By partition and reason, what was refused in the last `seconds`. Reads one index, of that time alone."""
    rows = postgres.execute(
        "SELECT partition_id, reason, count(*) FROM dead_letter "
        "WHERE created_at > clock_timestamp() - make_interval(secs => %s) GROUP BY 1, 2 ORDER BY count(*) DESC, reason",
        (seconds,),
    ).fetchall()
    found: dict[int, dict[str, int]] = {}
    for partition, reason, count in rows:
        found.setdefault(partition, {})[reason] = count
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Whole-ledger reads.


def count_accounts(postgres: Postgres) -> int:
    """How many accounts there are; an estimate would not do."""
    row = postgres.execute("SELECT count(*) FROM account").fetchone()
    assert row is not None
    return int(row[0])


# Users whose id begins with a text, as a range of the primary key: no character of an id sorts behind "~".
_HAS_PREFIX = "user_id >= %(prefix)s AND user_id < %(prefix)s || '~'"


class PlanUsage(NamedTuple):
    """What accounts of one plan used of one meter, and which bucket paid; amounts in units of the meter."""

    plan: str
    meter: str
    accounts: int
    events: int
    amount: int
    from_subscription: int
    from_rollover: int
    from_purchased: int
    overflow_to_debt: int
    uncollected: int


def usage_by_plan(postgres: Postgres, prefix: str) -> list[PlanUsage]:
    """Usage of all users whose id begins with `prefix`, by plan and meter; plan "" for users without an account."""
    parts = ", ".join(f"sum({name})::bigint" for name in PlanUsage._fields[4:])
    rows = postgres.execute(
        f"SELECT coalesce(plan, ''), meter, count(DISTINCT user_id), count(*), {parts} "
        f"FROM usage_log LEFT JOIN account USING (user_id) WHERE {_HAS_PREFIX} GROUP BY 1, 2 ORDER BY 1, 2",
        {"prefix": prefix},
    ).fetchall()
    return [PlanUsage(*row) for row in rows]


class ClosedPeriod(NamedTuple):
    """A period that ended by the calendar or with an invoice, and what came of it; amounts in units of the meter."""

    user_id: str
    plan: str
    meter: str
    period_start: datetime
    period_end: datetime | None
    allowance: int | None
    used: int
    rollover_before: int
    rollover_after: int
    refilled_to: int | None


def closed_periods(postgres: Postgres, prefix: str) -> list[ClosedPeriod]:
    """Closed periods of all users whose id begins with `prefix`, in the order of users and of time."""
    rows = postgres.execute(
        "SELECT user_id, closed.plan, meter, closed.period_start, closed.period_end, closed.allowance, closed.used, "
        "closed.rollover, rollover_after, (detail->>'allowance')::bigint FROM ledger_entry, jsonb_to_record("
        "detail->'closed') AS closed (plan text, period_start timestamptz, period_end timestamptz, allowance bigint, "
        f"used bigint, rollover bigint) WHERE kind IN ('refill', 'renewal') AND {_HAS_PREFIX} ORDER BY user_id, seq",
        {"prefix": prefix},
    ).fetchall()
    return [ClosedPeriod(*row) for row in rows]


def recorded_amounts(postgres: Postgres, prefix: str) -> dict[tuple[str, str], int]:
    """(user, event id) of every event recorded for users whose id begins with `prefix`, and its amount."""
    statement = f"SELECT user_id, event_id, amount FROM usage_log WHERE {_HAS_PREFIX}"
    rows = postgres.execute(statement, {"prefix": prefix}).fetchall()
    return {(user_id, event_id): amount for user_id, event_id, amount in rows}


def count_dead_letters(postgres: Postgres, containing: str) -> dict[str, int]:
    """How many dead letters, in any state, have this text in their payload, by reason."""
    rows = postgres.execute(
        "SELECT reason, count(*) FROM dead_letter WHERE position(%s::bytea IN payload) > 0 GROUP BY 1 ORDER BY 1",
        (containing.encode(),),
    ).fetchall()
    return dict(rows)


def next_users(postgres: Postgres, after: str, limit: int) -> list[str]:
    """The next `limit` users with an account behind `after`, in the order of their ids."""
    rows = postgres.execute(
        "SELECT user_id FROM account WHERE user_id > %s ORDER BY user_id LIMIT %s", (after, limit)
    ).fetchall()
    return [row[0] for row in rows]


class Snapshot(NamedTuple):
    """Accounts as one snapshot shows them; `counters` by user and meter are units consumed and granted in its life."""

    now: datetime
    epoch: int
    accounts: dict[str, Account]
    counters: dict[str, dict[str, tuple[int, int]]]


def read_accounts(postgres: Postgres, users: Sequence[str]) -> Snapshot:
    """The accounts of `users`; consistent within a snapshot transaction (`begin_snapshot`)."""
    names = text_array(users)
    found = postgres.execute(
        f"SELECT {_ACCOUNT} FROM account WHERE user_id = ANY(%s::text[]) ORDER BY user_id",
        (names,),
    ).fetchall()
    accounts = _accounts(found, postgres.execute(_READ_BALANCES, (names,)).fetchall())
    counters: dict[str, dict[str, tuple[int, int]]] = {user_id: {} for user_id in accounts}
    counted = postgres.execute(
        "SELECT user_id, meter, lifetime_consumed, lifetime_granted FROM balance WHERE user_id = ANY(%s::text[])",
        (names,),
    ).fetchall()
    for user_id, meter, consumed, granted in counted:
        counters[user_id][meter] = consumed, granted
    ((now, epoch),) = postgres.execute(_READ_CLOCK).fetchall()
    return Snapshot(now, epoch, accounts, counters)


class State(NamedTuple):
    """An account as it is stored, since when, and by meter the units it consumed and was granted in its life."""

    account: Account
    opened_at: datetime
    counters: Mapping[str, tuple[int, int]]


def next_states(postgres: Postgres, after: str, limit: int) -> list[State]:
    """The next `limit` accounts that are not closed behind `after`, in the order of their ids.

    Consistent within a snapshot transaction (`begin_snapshot`).
    """
    rows = postgres.execute(
        "SELECT user_id, opened_at FROM account WHERE status <> 'closed' AND user_id > %s ORDER BY user_id LIMIT %s",
        (after, limit),
    ).fetchall()
    found = read_accounts(postgres, [row[0] for row in rows])
    return [State(found.accounts[user_id], opened_at, found.counters[user_id]) for user_id, opened_at in rows]


def wrong_reversals(postgres: Postgres, users: Sequence[str]) -> list[tuple[str, str]]:
    """Users and keys of reversals whose parts are not those of the event they reverse."""
    parts = ("from_subscription", "from_rollover", "from_purchased", "overflow_to_debt")
    same = " AND ".join(f"(entry.detail->'parts'->>'{part}')::bigint = usage_log.{part}" for part in parts)
    rows = postgres.execute(
        "SELECT entry.user_id, entry.entry_key FROM ledger_entry AS entry LEFT JOIN usage_log "
        "ON usage_log.user_id = entry.user_id AND usage_log.event_id = entry.detail->>'event_id' "
        f"WHERE entry.user_id = ANY(%s::text[]) AND entry.kind = 'reversal' AND ({same}) IS NOT TRUE",
        (text_array(users),),
    ).fetchall()
    return [(row[0], row[1]) for row in rows]


def read_history(postgres: Postgres, users: Sequence[str]) -> Iterator[EntryRow | UsageRow]:
    """Every change of these accounts in the order of their sequence, streamed: a user may have millions of rows."""
    entry_columns = ", ".join(EntryRow._fields).replace("detail", "detail::text")
    with (
        postgres.cursor("entries") as entries,
        postgres.cursor("usage") as usage,
    ):
        entries.execute(
            f"SELECT {entry_columns} FROM ledger_entry WHERE user_id = ANY(%s::text[]) ORDER BY user_id, seq",
            (text_array(users),),
        )
        usage.execute(
            f"SELECT {_USAGE} FROM usage_log WHERE user_id = ANY(%s::text[]) AND seq IS NOT NULL ORDER BY user_id, seq",
            (text_array(users),),
        )
        changes: list[Iterator[EntryRow | UsageRow]] = [(EntryRow(*row) for row in entries)]
        changes.append(_usage_row(row) for row in usage)
        yield from merge(*changes, key=lambda row: (row.user_id, row.seq))


def applied_before(postgres: Postgres, user_id: str, event_ids: Sequence[str], seconds: int) -> list[str]:
    """Those of `event_ids` that were applied more than `seconds` ago."""
    rows = postgres.execute(
        "SELECT event_id FROM usage_log WHERE user_id = %s AND event_id = ANY(%s::text[]) "
        "AND applied_at < ledger_now() - make_interval(secs => %s)",
        (user_id, text_array(event_ids), seconds),
    ).fetchall()
    return [row[0] for row in rows]


def begin_snapshot(postgres: Postgres, *, idle_timeout_ms: int | None = None) -> None:
    """Make this transaction one snapshot that writes nothing.

    `idle_timeout_ms` is how long its reader may be busy with something else; it holds no locks meanwhile.
    """
    postgres.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    if idle_timeout_ms is not None:
        postgres.execute(f"SET LOCAL idle_in_transaction_session_timeout = {idle_timeout_ms:d}")


def read_clock(postgres: Postgres) -> datetime:
    """What time it is for the ledger."""
    ((now, _),) = postgres.execute(_READ_CLOCK).fetchall()
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
