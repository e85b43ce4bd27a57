"""Every statement about dead letters."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any, Literal, NamedTuple

from worker.ledger.connection import Postgres
from worker.rules.account import Cause
from worker.rules.received import Refused

INSERT_DEAD_LETTER = """
    INSERT INTO dead_letter (partition_id, entry_id, payload_hash, reason, detail, payload, payload_bytes, signed_by,
        traceparent)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (partition_id, entry_id, payload_hash) DO NOTHING
"""


def store_refused(postgres: Postgres, partition: int, refused: Sequence[Refused]) -> None:
    """Write dead letters of one stream without a commit."""
    if refused:
        with postgres.cursor() as cursor:
            cursor.executemany(INSERT_DEAD_LETTER, [dead_letter_row(partition, one) for one in refused])


def storable(words: str) -> str:
    """Return a sentence that may quote a payload without NUL and lone surrogates, which a text column refuses."""
    return words.encode("ascii", "backslashreplace").decode().replace("\x00", "\\0")[:1_000]


def dead_letter_row(partition: int, refused: Refused) -> tuple[Any, ...]:
    digest = sha256(refused.payload).digest()
    detail = storable(refused.detail)
    return (
        partition, refused.entry_id, digest, refused.reason.value, detail, refused.payload, refused.payload_bytes,
        refused.signed_by, refused.traceparent,
    )  # fmt: skip


class DeadLetter(NamedTuple):
    """A refused stream entry as Postgres keeps it.

    If it was replayed or dropped, `resolved_by` says who did, `resolved_reason` why, and `resolved_letters` the number
    of letters that the same command resolved. A letter that an earlier release resolved has none of the three.
    """

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
    resolved_by: str | None
    resolved_reason: str | None
    resolved_letters: int | None
    traceparent: str | None


_DEAD_LETTER = (
    "id, partition_id, entry_id, reason, detail, payload, payload_bytes, signed_by, state, created_at, resolved_at, "
    "resolved_by, resolved_reason, resolved_letters, traceparent"
)


class Wanted(NamedTuple):
    """Which dead letters a list is about; None leaves a filter out.

    `user` and `source` are what a letter's payload names. A payload that is no JSON object names neither.
    """

    state: str = "open"
    reason: str | None = None
    partition: int | None = None
    since: datetime | None = None
    user: str | None = None
    source: str | None = None


_WANTED = """
    state = %(state)s AND (%(reason)s::text IS NULL OR reason = %(reason)s)
    AND (%(partition)s::integer IS NULL OR partition_id = %(partition)s)
    AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s)
    AND (%(user)s::text IS NULL OR payload_text(payload, 'user_id') = %(user)s)
    AND (%(source)s::text IS NULL OR payload_text(payload, 'source') = %(source)s)
"""

GroupKey = Literal["reason", "partition", "source"]
_GROUP_KEYS: dict[GroupKey, str] = {
    "reason": "NULL", "partition": "partition_id", "source": "payload_text(payload, 'source')"
}  # fmt: skip


class Group(NamedTuple):
    """Dead letters of one reason and, where the groups are by another key also, one value of that."""

    reason: str
    value: str | int | None
    letters: int
    oldest: datetime
    newest: datetime


def read_dead_letters(postgres: Postgres, wanted: Wanted, *, after: int, limit: int) -> list[DeadLetter]:
    """Return the wanted dead letters with ids above `after`, oldest first, at most `limit`."""
    rows = postgres.execute(
        f"SELECT {_DEAD_LETTER} FROM dead_letter WHERE {_WANTED} AND id > %(after)s ORDER BY id LIMIT %(limit)s",
        {**wanted._asdict(), "after": after, "limit": limit},
    ).fetchall()
    return [DeadLetter(*row) for row in rows]


def count_wanted(postgres: Postgres, wanted: Wanted) -> int:
    """Count the wanted dead letters."""
    row = postgres.execute(f"SELECT count(*) FROM dead_letter WHERE {_WANTED}", wanted._asdict()).fetchone()
    return int(row[0]) if row else 0


def group_dead_letters(postgres: Postgres, wanted: Wanted, by: GroupKey) -> list[Group]:
    """Return the wanted dead letters in groups, the largest first."""
    rows = postgres.execute(
        f"SELECT reason, {_GROUP_KEYS[by]} AS value, count(*), min(created_at), max(created_at) FROM dead_letter "
        f"WHERE {_WANTED} GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2",
        wanted._asdict(),
    ).fetchall()
    return [Group(*row) for row in rows]


def open_dead_letter_ids(postgres: Postgres, reason: str) -> list[int]:
    """Return the ids of all open dead letters of one reason, oldest first."""
    rows = postgres.execute(
        "SELECT id FROM dead_letter WHERE state = 'open' AND reason = %s ORDER BY id", (reason,)
    ).fetchall()
    return [row[0] for row in rows]


def lock_dead_letter(postgres: Postgres, letter_id: int) -> DeadLetter | None:
    """Return one dead letter, locked until the transaction ends."""
    row = postgres.execute(f"SELECT {_DEAD_LETTER} FROM dead_letter WHERE id = %s FOR UPDATE", (letter_id,)).fetchone()
    return DeadLetter(*row) if row else None


def resolve_dead_letter(postgres: Postgres, letter_id: int, state: str, cause: Cause, letters: int) -> None:
    """Note that a dead letter was replayed or dropped, by whom and why, as one of so many `letters`; the row stays."""
    postgres.execute(
        "UPDATE dead_letter SET state = %s, resolved_at = ledger_now(), resolved_by = %s, resolved_reason = %s, "
        "resolved_letters = %s WHERE id = %s",
        (state, cause.actor, cause.reason, letters, letter_id),
    )


def open_dead_letters(postgres: Postgres) -> dict[str, int]:
    """Count open dead letters by reason. Reads one index, of open ones alone."""
    rows = postgres.execute(
        "SELECT reason, count(*) FROM dead_letter WHERE state = 'open' GROUP BY reason ORDER BY count(*) DESC, reason"
    ).fetchall()
    return {str(reason): int(count) for reason, count in rows}


def recently_refused(postgres: Postgres, seconds: int) -> dict[int, dict[str, int]]:
    """Count the refusals of the last `seconds` by partition and reason. Reads one index, of that time alone."""
    rows = postgres.execute(
        "SELECT partition_id, reason, count(*) FROM dead_letter "
        "WHERE created_at > clock_timestamp() - make_interval(secs => %s) GROUP BY 1, 2 ORDER BY count(*) DESC, reason",
        (seconds,),
    ).fetchall()
    found: dict[int, dict[str, int]] = {}
    for partition, reason, count in rows:
        found.setdefault(partition, {})[reason] = count
    return found


def count_dead_letters(postgres: Postgres, containing: str) -> dict[str, int]:
    """Count dead letters in any state with this text in their payload, by reason."""
    rows = postgres.execute(
        "SELECT reason, count(*) FROM dead_letter WHERE position(%s::bytea IN payload) > 0 GROUP BY 1 ORDER BY 1",
        (containing.encode(),),
    ).fetchall()
    return dict(rows)
