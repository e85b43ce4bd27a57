"""The SQL of paused partitions."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from worker.ledger.batch import Postgres, storable


class Pause(NamedTuple):
    """One pause of a partition, over once it says when. Entries up to `tolerated_to` give no reason for another one."""

    partition: int
    paused_at: datetime
    paused_by: str
    reason: str
    resumed_at: datetime | None
    resumed_by: str | None
    tolerated_to: str | None


_PAUSE = "partition_id, paused_at, paused_by, reason, resumed_at, resumed_by, tolerated_to"


def pause_in_force(postgres: Postgres, partition: int, *, for_update: bool = False) -> Pause | None:
    """The pause of a partition, locked until the transaction ends if it is to be changed; None when there is none."""
    row = postgres.execute(
        f"SELECT {_PAUSE} FROM partition_pause WHERE partition_id = %s AND resumed_at IS NULL"
        f"{' FOR UPDATE' if for_update else ''}",
        (partition,),
    ).fetchone()
    return Pause(*row) if row else None


def insert_pause(postgres: Postgres, partition: int, by: str, reason: str) -> None:
    """Note that a partition is paused from now on, unless it was, without a commit."""
    postgres.execute(
        "INSERT INTO partition_pause (partition_id, paused_by, reason) VALUES (%s, %s, %s) "
        "ON CONFLICT (partition_id) WHERE resumed_at IS NULL DO NOTHING",
        (partition, storable(by), storable(reason)),
    )


def end_pause(postgres: Postgres, partition: int, by: str, tolerated_to: str) -> None:
    """Note that a pause is over, without a commit."""
    postgres.execute(
        "UPDATE partition_pause SET resumed_at = clock_timestamp(), resumed_by = %s, tolerated_to = %s "
        "WHERE partition_id = %s AND resumed_at IS NULL",
        (storable(by), tolerated_to, partition),
    )


def latest_pauses(postgres: Postgres) -> list[Pause]:
    """Of every partition that was ever paused the last pause."""
    rows = postgres.execute(
        f"SELECT DISTINCT ON (partition_id) {_PAUSE} FROM partition_pause ORDER BY partition_id, id DESC"
    ).fetchall()
    return [Pause(*row) for row in rows]
