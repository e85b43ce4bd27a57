"""Every statement about pending ids whose stream entries were lost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple

from worker.ledger.columns import array, text_array
from worker.ledger.connection import Postgres
from worker.rules.account import Cause


class FreedRow(NamedTuple):
    """One pending id that an operator freed; `is_recorded` if the usage log had its event: then it was billed."""

    partition: int
    user_id: str
    meter: str
    event_id: str
    units: int
    is_recorded: bool


def insert_freed(postgres: Postgres, rows: Sequence[FreedRow], cause: Cause) -> None:
    """Write down pending ids that are about to be freed, by whom and why."""
    postgres.execute(
        "INSERT INTO freed_pending (partition_id, user_id, meter, event_id, units, is_recorded, freed_by, reason) "
        "SELECT found.*, %s, %s FROM unnest(%s::integer[], %s::text[], %s::text[], %s::text[], %s::bigint[], "
        "%s::boolean[]) AS found",
        (cause.actor, cause.reason, *(array(column) for column in zip(*rows, strict=True))),
    )


def recorded_among(postgres: Postgres, identities: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return those of these (user, event id) that the usage log has."""
    if not identities:
        return set()
    users, events = zip(*identities, strict=True)
    rows = postgres.execute(
        "SELECT user_id, event_id FROM usage_log JOIN unnest(%s::text[], %s::text[]) AS asked (user_id, event_id) "
        "USING (user_id, event_id)",
        (text_array(users), text_array(events)),
    ).fetchall()
    return {(row[0], row[1]) for row in rows}


def read_freed(postgres: Postgres, user_id: str) -> list[tuple[FreedRow, datetime, str | None, str | None]]:
    """Return what was freed of a user, with when, by whom and why, oldest first."""
    rows = postgres.execute(
        "SELECT partition_id, user_id, meter, event_id, units, is_recorded, freed_at, freed_by, reason "
        "FROM freed_pending WHERE user_id = %s ORDER BY id",
        (user_id,),
    ).fetchall()
    return [(FreedRow(*row[:6]), row[6], row[7], row[8]) for row in rows]


def rename_freed(postgres: Postgres, user_id: str, pseudonym: str) -> None:
    """Move what was freed of a closed account to its pseudonym."""
    postgres.execute("UPDATE freed_pending SET user_id = %s WHERE user_id = %s", (pseudonym, user_id))
