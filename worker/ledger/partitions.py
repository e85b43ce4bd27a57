"""Every statement about partitions: their number, their lock, and their pauses."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Engine

from worker.ledger.connection import LOCK_SPACE, LedgerError, Postgres, batch_connection, check_timeouts
from worker.ledger.dead_letters import storable
from worker.ledger.revision import check_revision


class Pause(NamedTuple):
    """One pause of a partition, over if it has an end. Stream entries up to `tolerated_to` cause no new one."""

    partition: int
    paused_at: datetime
    paused_by: str
    reason: str
    resumed_at: datetime | None
    resumed_by: str | None
    tolerated_to: str | None


_PAUSE = "partition_id, paused_at, paused_by, reason, resumed_at, resumed_by, tolerated_to"


def pause_in_force(postgres: Postgres, partition: int, *, for_update: bool = False) -> Pause | None:
    """Return the open pause of a partition, or None; `for_update` locks it until the transaction ends."""
    row = postgres.execute(
        f"SELECT {_PAUSE} FROM partition_pause WHERE partition_id = %s AND resumed_at IS NULL"
        f"{' FOR UPDATE' if for_update else ''}",
        (partition,),
    ).fetchone()
    return Pause(*row) if row else None


def insert_pause(postgres: Postgres, partition: int, by: str, reason: str) -> None:
    """Pause a partition from now on, unless it is paused already, without a commit."""
    postgres.execute(
        "INSERT INTO partition_pause (partition_id, paused_by, reason) VALUES (%s, %s, %s) "
        "ON CONFLICT (partition_id) WHERE resumed_at IS NULL DO NOTHING",
        (partition, storable(by), storable(reason)),
    )


def end_pause(postgres: Postgres, partition: int, by: str, tolerated_to: str) -> None:
    """End a pause, without a commit."""
    postgres.execute(
        "UPDATE partition_pause SET resumed_at = clock_timestamp(), resumed_by = %s, tolerated_to = %s "
        "WHERE partition_id = %s AND resumed_at IS NULL",
        (storable(by), tolerated_to, partition),
    )


def latest_pauses(postgres: Postgres) -> list[Pause]:
    """Return the last pause of every partition that was ever paused."""
    rows = postgres.execute(
        f"SELECT DISTINCT ON (partition_id) {_PAUSE} FROM partition_pause ORDER BY partition_id, id DESC"
    ).fetchall()
    return [Pause(*row) for row in rows]


def claim_partitions(engine: Engine, partitions: int) -> None:
    """Write the number of partitions once.

    Raises LedgerError if the ledger was set up with another number: events of a user would change streams. Also if
    the tables do not fit this release.
    """
    with batch_connection(engine) as postgres:
        check_timeouts(postgres)
        check_revision(postgres)
        written = read_partitions(postgres)
        if written is None:
            postgres.execute("UPDATE ledger SET partitions = %s WHERE partitions IS NULL", (partitions,))
            written = read_partitions(postgres)
            postgres.commit()
    if written != partitions:
        raise LedgerError(f"METERFALL_PARTITIONS: this ledger has {written} partitions, not {partitions}")


def read_partitions(postgres: Postgres) -> int | None:
    """Return the ledger's number of partitions; None if no worker has run yet."""
    row = postgres.execute("SELECT partitions FROM ledger").fetchone()
    return row[0] if row else None


def change_partitions(postgres: Postgres, partitions: int) -> None:
    """Write another number of partitions, without a commit."""
    postgres.execute("UPDATE ledger SET partitions = %s", (partitions,))


_LOCK_PARTITIONS = """
    SELECT number, pg_try_advisory_xact_lock(%s, number), latest.id IS NOT NULL AND latest.resumed_at IS NULL,
        latest.tolerated_to, latest.resumed_at, ledger_now(), (SELECT coalesce(max(version), 0) FROM catalogue_version)
    FROM unnest(%s::integer[]) AS number LEFT JOIN LATERAL (
        SELECT id, resumed_at, tolerated_to FROM partition_pause WHERE partition_id = number ORDER BY id DESC LIMIT 1
    ) AS latest ON true
"""


class Turn(NamedTuple):
    """The turn of a drain on a partition: `is_ours` if no other drain has it. `now` is the clock of the ledger.

    Stream entries up to `tolerated_to`, let through at the end of the last pause (`resumed_at`), cause no new pause.
    `catalogue` is the newest registered version, 0 without one.
    """

    is_ours: bool
    is_paused: bool
    tolerated_to: str | None
    resumed_at: datetime | None
    now: datetime
    catalogue: int


def try_lock_partition(postgres: Postgres, partition: int) -> Turn:
    """Take the partition's lock until this transaction ends, unless another drain has it, and read its pause."""
    return try_lock_partitions(postgres, [partition])[partition]


def try_lock_partitions(postgres: Postgres, partitions: Sequence[int]) -> dict[int, Turn]:
    """Take the locks of partitions that no other drain has, as for one; return the turn on each by its number."""
    rows = postgres.execute(_LOCK_PARTITIONS, (LOCK_SPACE, partitions)).fetchall()
    return {number: Turn(*row) for number, *row in rows}
