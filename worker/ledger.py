"""Every statement that Postgres gets, and nothing else: connections, migrations, the batch, accounts, dead letters.

The statements of the batch run on psycopg's own cursor, in pipelines and with COPY; the rest goes through SQLAlchemy.
Both use one connection of one pool, so a transaction is a transaction whichever way a statement takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from heapq import merge
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from config.settings import Settings
from worker.errors import BadInput
from worker.intake import Refused
from worker.snapshot import Account, Balance

# First key of our advisory locks: "mf" as two bytes, so that they cannot meet another application's.
LOCK_SPACE = 0x6D66
MIGRATION_LOCK_SPACE = LOCK_SPACE + 1


class LedgerError(BadInput):
    """The ledger is not what this process was set up for; the message says what to do."""


def open_engine(settings: Settings, *, statement_timeout_ms: int | None = None) -> Engine:
    """A pool of connections with the time-outs of the money path. Opens none yet.

    Raises LedgerError when DATABASE_URL is unset.
    """
    if settings.database_url is None:
        raise LedgerError("DATABASE_URL: unset; it names the Postgres that holds the ledger")
    timeouts = {
        "statement_timeout": statement_timeout_ms or settings.statement_timeout_ms,
        "lock_timeout": settings.lock_timeout_ms,
        "idle_in_transaction_session_timeout": settings.idle_in_transaction_timeout_ms,
        "timezone": "UTC",
    }
    return create_engine(
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


def migrate(database_url: str, revision: str = "head") -> None:
    """Bring the schema at `database_url` to `revision` ("head", "base", or a number), forward or back.

    Each migration is one transaction; killed in between, the next call goes on from there.
    """
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    # One at a time: a platform may start several dynos at once. The lock is the session's, so it ends with it.
    with engine.connect() as connection, engine.connect() as guard:
        guard.execute(text("SELECT pg_advisory_lock(:space, 0)"), {"space": MIGRATION_LOCK_SPACE})
        current = connection.execute(text("SELECT to_regclass('alembic_version')")).scalar()
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if current else None
        connection.rollback()
        config.attributes["connection"] = connection
        back = revision == "base" or (version is not None and revision.isdigit() and revision < version)
        try:
            (command.downgrade if back else command.upgrade)(config, revision)
        except CommandError:
            known = ", ".join(
                reversed([script.revision for script in ScriptDirectory.from_config(config).walk_revisions()])
            )
            raise LedgerError(f"revision: unknown {revision!r}; there are base, head, {known}") from None
        connection.commit()


def claim_partitions(engine: Engine, partitions: int) -> int:
    """Write the number of partitions once; returns the ledger's epoch.

    Raises LedgerError when the ledger was set up with another number: events of a user would change streams.
    """
    with batch_connection(engine) as postgres:
        try:
            found = postgres.execute("SELECT partitions, epoch FROM ledger").fetchone()
        except psycopg.errors.UndefinedTable:
            raise LedgerError("DATABASE_URL: this database holds no ledger; run `meterfall migrate`") from None
        if found is None or found[0] is None:
            postgres.execute("UPDATE ledger SET partitions = %s WHERE partitions IS NULL", (partitions,))
            found = postgres.execute("SELECT partitions, epoch FROM ledger").fetchone()
            postgres.commit()
    written, epoch = found or (None, 0)
    if written != partitions:
        raise LedgerError(f"METERFALL_PARTITIONS: this ledger has {written} partitions, not {partitions}")
    return int(epoch)


Postgres = psycopg.Connection[tuple[Any, ...]]


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


class Loaded(NamedTuple):
    """What a batch needs to know, read after its locks are held. `now` is the clock of the ledger."""

    now: datetime
    epoch: int
    accounts: dict[str, Account]
    recorded: dict[tuple[str, str], tuple[str, int, str]]


class UsageRow(NamedTuple):
    """One row of the usage log, in the order of its columns. Times are ISO 8601 text."""

    user_id: str
    event_id: str
    seq: int | None
    meter: str
    quantity: int
    multiplier: str
    amount: int
    from_subscription: int
    from_rollover: int
    from_purchased: int
    overflow_to_debt: int
    uncollected: int
    period_start: str | None
    occurred_at: str
    applied_at: str
    clamped: bool
    source: str | None
    reference_id: str | None
    hold_key: str | None
    dimensions: str | None


class EntryRow(NamedTuple):
    """One ledger entry: a change that is not usage, with the balances after it."""

    user_id: str
    seq: int
    entry_key: str
    meter: str
    kind: str
    used_change: int
    rollover_change: int
    purchased_change: int
    used_after: int
    rollover_after: int
    purchased_after: int
    detail: str
    created_at: datetime


_COPY_USAGE = f"COPY usage_log ({', '.join(UsageRow._fields)}) FROM STDIN"

_LOCK_PARTITION = "SELECT pg_try_advisory_xact_lock(%s, %s)"

# Locked in the order of the ids, so that two batches over the same users wait for each other, never in a circle.
_LOCK_ACCOUNTS = """
    SELECT user_id, plan, status, trust, seq FROM account WHERE user_id = ANY(%s::text[]) ORDER BY user_id FOR UPDATE
"""
# A statement of its own, after the locks: joined to the locking one it would read balances from before the wait.
_READ_BALANCES = """
    SELECT user_id, meter, allowance, spill, rollover_cap, cadence, anchor, anchored_at, period_index, period_start,
        period_end, used, rollover, purchased
    FROM balance WHERE user_id = ANY(%s::text[]) ORDER BY user_id, meter
"""
# One look into the index per event: as a plain join Postgres may prefer to read the whole log, which only grows.
_READ_RECORDED = """
    SELECT asked.user_id, asked.event_id, meter, quantity, multiplier::text
    FROM unnest(%s::text[], %s::text[]) AS asked (user_id, event_id)
    CROSS JOIN LATERAL (
        SELECT meter, quantity, multiplier FROM usage_log
        WHERE usage_log.user_id = asked.user_id AND usage_log.event_id = asked.event_id
        OFFSET 0
    ) AS recorded
"""
_READ_CLOCK = "SELECT clock_timestamp(), epoch FROM ledger"

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
_INSERT_ACCOUNT = """
    INSERT INTO account (user_id, plan, status, trust, seq, opened_at) VALUES (%s, %s, %s, %s, %s, %s)
"""
_INSERT_BALANCE = """
    INSERT INTO balance (user_id, meter, allowance, spill, rollover_cap, cadence, anchor, anchored_at, period_index,
        period_start, period_end, used, rollover, purchased)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_INSERT_ENTRY = f"""
    INSERT INTO ledger_entry ({", ".join(EntryRow._fields)}) VALUES ({", ".join(["%s"] * len(EntryRow._fields))})
"""
_INSERT_DEAD_LETTER = """
    INSERT INTO dead_letter (partition_id, entry_id, payload_hash, reason, detail, payload, payload_bytes)
    VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (partition_id, entry_id, payload_hash) DO NOTHING
"""
_DROP_LEDGER_HOLDS = """
    DELETE FROM ledger_hold USING unnest(%s::text[], %s::text[]) AS closed (user_id, hold_key)
    WHERE ledger_hold.user_id = closed.user_id AND ledger_hold.hold_key = closed.hold_key
"""


def try_lock_partition(postgres: Postgres, partition: int) -> bool:
    """Take the partition's lock until this transaction ends; False when another drain has it."""
    row = postgres.execute(_LOCK_PARTITION, (LOCK_SPACE, partition)).fetchone()
    return bool(row and row[0])


def load_for_update(
    postgres: Postgres, users: Sequence[str], identities: tuple[list[str], list[str]], *, skip_locked: bool = False
) -> Loaded:
    """Lock the accounts of `users` (sorted), then read balances, known events and the clock, in one round trip.

    `identities` are the users and the ids of the batch's events.
    `recorded` maps (user, event id) to the fingerprint (meter, quantity, multiplier) of events already in the log.
    With `skip_locked`, accounts that another transaction holds are left out instead of waited for.
    """
    names = text_array(users)
    asked = [text_array(column) for column in identities]
    with postgres.pipeline():
        locked = postgres.execute(_LOCK_ACCOUNTS + ("SKIP LOCKED" if skip_locked else ""), (names,))
        balances = postgres.execute(_READ_BALANCES, (names,))
        recorded = postgres.execute(_READ_RECORDED, asked)
        clock = postgres.execute(_READ_CLOCK)
        accounts = _accounts(locked.fetchall(), balances.fetchall())
        fingerprints = {(row[0], row[1]): (row[2], row[3], row[4]) for row in recorded.fetchall()}
        ((now, epoch),) = clock.fetchall()
    return Loaded(now, epoch, accounts, fingerprints)


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
            by_user[row[0]][row[1]] = Balance(*row[1:])
    return {
        user_id: Account(user_id, plan, status, trust, seq, by_user[user_id])
        for user_id, plan, status, trust, seq in locked
    }


class Writes(NamedTuple):
    """All that one transaction writes. `moved` are (user, meter, used, rollover, purchased, consumed, granted): the
    buckets after it, and what it adds to the lifetime counters.
    """

    usage: list[UsageRow]
    moved: list[tuple[str, str, int, int, int, int, int]]
    versions: list[tuple[str, int]]
    opened_accounts: list[Account]
    opened_balances: list[tuple[str, Balance]]
    entries: list[EntryRow]
    refused: list[Refused]
    closed_holds: list[tuple[str, str]]

    @classmethod
    def none(cls) -> Writes:
        """Empty lists to be filled."""
        return cls([], [], [], [], [], [], [], [])


def store_and_commit(postgres: Postgres, partition: int, writes: Writes, now: datetime) -> None:
    """Write one batch and commit it, all or nothing. Raises what Postgres raises."""
    with postgres.cursor() as cursor:
        for account in writes.opened_accounts:
            cursor.execute(_INSERT_ACCOUNT, (*account[:5], now))
        if writes.opened_balances:
            cursor.executemany(_INSERT_BALANCE, [(user, *balance) for user, balance in writes.opened_balances])
        if writes.entries:
            cursor.executemany(_INSERT_ENTRY, writes.entries)
        if writes.usage:
            copy_usage(cursor, writes.usage)
        with postgres.pipeline():
            if writes.versions:
                cursor.execute(_STORE_BALANCES, (*_arrays(writes.moved, "ttiiiii"), *_arrays(writes.versions, "ti")))
            if writes.refused:
                cursor.executemany(_INSERT_DEAD_LETTER, [_dead_letter(partition, one) for one in writes.refused])
            if writes.closed_holds:
                cursor.execute(_DROP_LEDGER_HOLDS, _arrays(writes.closed_holds, "tt"))
            postgres.commit()


def copy_usage(cursor: psycopg.Cursor[tuple[Any, ...]], rows: Sequence[UsageRow]) -> None:
    """Append `rows` to the usage log with COPY."""
    with cursor.copy(_COPY_USAGE) as copy:
        for row in rows:
            copy.write_row(row)


def text_array(items: Sequence[str]) -> str:
    """Array literal of ids and meters, whose characters need no escape. Five times as fast as psycopg's list dumper."""
    return '{"' + '","'.join(items) + '"}' if items else "{}"


def _arrays(rows: Sequence[tuple[Any, ...]], kinds: str) -> list[str]:
    """Rows as one array literal per column; `kinds` says for each whether it holds text or integers."""
    if not rows:
        return ["{}"] * len(kinds)
    columns = zip(*rows, strict=True)
    return [
        text_array(column) if kind == "t" else "{" + ",".join(map(str, column)) + "}"
        for kind, column in zip(kinds, columns, strict=True)
    ]


def _dead_letter(partition: int, refused: Refused) -> tuple[Any, ...]:
    digest = sha256(refused.payload).digest()
    # The detail may quote the payload: NUL and lone surrogates are no text to Postgres.
    detail = refused.detail.encode("ascii", "backslashreplace").decode().replace("\x00", "\\0")[:1_000]
    return (
        partition, refused.entry_id, digest, refused.reason.value, detail, refused.payload, refused.payload_bytes,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One account, read without a lock.

# One statement is one snapshot: account and balances belong to the same version.
_READ_ACCOUNT = """
    SELECT clock_timestamp(), epoch, account.user_id, plan, status, trust, seq, meter, allowance, spill, rollover_cap,
        cadence, anchor, anchored_at, period_index, period_start, period_end, used, rollover, purchased
    FROM ledger LEFT JOIN account ON account.user_id = %s LEFT JOIN balance USING (user_id) ORDER BY meter
"""


class LedgerHold(NamedTuple):
    """A hold that the ledger granted while Redis was down."""

    key: str
    meter: str
    amount: int
    expires_at: datetime


def read_account(postgres: Postgres, user_id: str) -> tuple[datetime, int, Account | None]:
    """The ledger's clock, its epoch and the account at one version; None for an account nobody opened."""
    rows = postgres.execute(_READ_ACCOUNT, (user_id,)).fetchall()
    now, epoch, found, plan, status, trust, seq = rows[0][:7]
    if found is None:
        return now, epoch, None
    balances = {row[7]: Balance(*row[7:]) for row in rows if row[7] is not None}
    return now, epoch, Account(found, plan, status, trust, seq, balances)


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
        "SELECT hold_key, meter, amount, expires_at FROM ledger_hold "
        "WHERE user_id = %s AND expires_at > clock_timestamp()",
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
        "INSERT INTO ledger_hold (user_id, hold_key, meter, amount, expires_at) VALUES (%s, %s, %s, %s, %s) "
        "ON CONFLICT (user_id, hold_key) DO UPDATE "
        "SET meter = excluded.meter, amount = excluded.amount, expires_at = excluded.expires_at",
        (user_id, *hold),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Changes that are not usage.


def set_status(postgres: Postgres, user_id: str, status: str) -> None:
    """Store an account's status; the caller holds its lock and writes the entry."""
    postgres.execute("UPDATE account SET status = %s WHERE user_id = %s", (status, user_id))


def read_entry(postgres: Postgres, user_id: str, entry_key: str, meter: str) -> EntryRow | None:
    """The ledger entry with this idempotency key, or None."""
    statement = (
        f"SELECT {', '.join(EntryRow._fields).replace('detail', 'detail::text')} FROM ledger_entry "
        "WHERE user_id = %s AND entry_key = %s AND meter = %s"
    )
    row = postgres.execute(statement, (user_id, entry_key, meter)).fetchone()
    return EntryRow(*row) if row else None


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
    state: str
    created_at: datetime
    resolved_at: datetime | None


_DEAD_LETTER = "id, partition_id, entry_id, reason, detail, payload, payload_bytes, state, created_at, resolved_at"


def read_dead_letters(postgres: Postgres, *, state: str, reason: str | None, limit: int) -> list[DeadLetter]:
    """Dead letters in `state`, oldest first; of one `reason` only, if given."""
    rows = postgres.execute(
        f"SELECT {_DEAD_LETTER} FROM dead_letter "
        "WHERE state = %s AND (%s::text IS NULL OR reason = %s) ORDER BY id LIMIT %s",
        (state, reason, reason, limit),
    ).fetchall()
    return [DeadLetter(*row) for row in rows]


def lock_dead_letter(postgres: Postgres, letter_id: int) -> DeadLetter | None:
    """One dead letter, locked until the transaction ends."""
    row = postgres.execute(f"SELECT {_DEAD_LETTER} FROM dead_letter WHERE id = %s FOR UPDATE", (letter_id,)).fetchone()
    return DeadLetter(*row) if row else None


def resolve_dead_letter(postgres: Postgres, letter_id: int, state: str) -> None:
    """Note that a dead letter was replayed or dropped; the row stays."""
    postgres.execute(
        "UPDATE dead_letter SET state = %s, resolved_at = clock_timestamp() WHERE id = %s", (state, letter_id)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Whole-ledger reads.


def count_rows(postgres: Postgres) -> dict[str, int]:
    """How many accounts there are and how many dead letters are open; estimates would not do for either."""
    row = postgres.execute(
        "SELECT (SELECT count(*) FROM account), (SELECT count(*) FROM dead_letter WHERE state = 'open')"
    ).fetchone()
    assert row is not None
    return {"accounts": row[0], "dead_letters": row[1]}


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
    """Accounts as one snapshot shows them; `consumed` by user and meter is the lifetime counter."""

    now: datetime
    epoch: int
    accounts: dict[str, Account]
    consumed: dict[str, dict[str, int]]


def read_accounts(postgres: Postgres, users: Sequence[str]) -> Snapshot:
    """The accounts of `users`; consistent within a snapshot transaction (`begin_snapshot`)."""
    names = text_array(users)
    found = postgres.execute(
        "SELECT user_id, plan, status, trust, seq FROM account WHERE user_id = ANY(%s::text[]) ORDER BY user_id",
        (names,),
    ).fetchall()
    accounts = _accounts(found, postgres.execute(_READ_BALANCES, (names,)).fetchall())
    consumed: dict[str, dict[str, int]] = {user_id: {} for user_id in accounts}
    counters = postgres.execute(
        "SELECT user_id, meter, lifetime_consumed FROM balance WHERE user_id = ANY(%s::text[])", (names,)
    ).fetchall()
    for user_id, meter, units in counters:
        consumed[user_id][meter] = units
    ((now, epoch),) = postgres.execute(_READ_CLOCK).fetchall()
    return Snapshot(now, epoch, accounts, consumed)


def read_history(postgres: Postgres, users: Sequence[str]) -> Iterator[EntryRow | UsageRow]:
    """Every change of these accounts in the order of their sequence, streamed: a user may have millions of rows."""
    entry_columns = ", ".join(EntryRow._fields).replace("detail", "detail::text")
    usage_columns = ", ".join(UsageRow._fields).replace("multiplier", "multiplier::text")
    with (
        postgres.cursor("entries") as entries,
        postgres.cursor("usage") as usage,
    ):
        entries.execute(
            f"SELECT {entry_columns} FROM ledger_entry WHERE user_id = ANY(%s::text[]) ORDER BY user_id, seq",
            (text_array(users),),
        )
        usage.execute(
            f"SELECT {usage_columns} FROM usage_log "
            "WHERE user_id = ANY(%s::text[]) AND seq IS NOT NULL ORDER BY user_id, seq",
            (text_array(users),),
        )
        changes: list[Iterator[EntryRow | UsageRow]] = [(EntryRow(*row) for row in entries)]
        changes.append(UsageRow(*row) for row in usage)
        yield from merge(*changes, key=lambda row: (row.user_id, row.seq))


def applied_before(postgres: Postgres, user_id: str, event_ids: Sequence[str], seconds: int) -> list[str]:
    """Those of `event_ids` that were applied more than `seconds` ago."""
    rows = postgres.execute(
        "SELECT event_id FROM usage_log WHERE user_id = %s AND event_id = ANY(%s::text[]) "
        "AND applied_at < clock_timestamp() - make_interval(secs => %s)",
        (user_id, text_array(event_ids), seconds),
    ).fetchall()
    return [row[0] for row in rows]


def begin_snapshot(postgres: Postgres) -> None:
    """Make this transaction one snapshot that writes nothing."""
    postgres.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def new_epoch(postgres: Postgres) -> int:
    """Start a new epoch: balances cached before count as older than anything published from now on."""
    row = postgres.execute("UPDATE ledger SET epoch = epoch + 1 RETURNING epoch").fetchone()
    assert row is not None
    postgres.commit()
    return int(row[0])
