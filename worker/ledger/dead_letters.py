"""Every statement about dead letters."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any, NamedTuple

from worker.ledger.connection import Postgres
from worker.rules.received import Refused

INSERT_DEAD_LETTER = """
    INSERT INTO dead_letter (partition_id, entry_id, payload_hash, reason, detail, payload, payload_bytes, signed_by)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (partition_id, entry_id, payload_hash) DO NOTHING
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
        refused.signed_by,
    )  # fmt: skip


class DeadLetter(NamedTuple):
    """A refused stream entry as Postgres keeps it."""

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
    """Return dead letters in `state`, oldest first; with a `reason` only those of it."""
    rows = postgres.execute(
        f"SELECT {_DEAD_LETTER} FROM dead_letter "
        "WHERE state = %s AND (%s::text IS NULL OR reason = %s) ORDER BY id LIMIT %s",
        (state, reason, reason, limit),
    ).fetchall()
    return [DeadLetter(*row) for row in rows]


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


def resolve_dead_letter(postgres: Postgres, letter_id: int, state: str) -> None:
    """Note that a dead letter was replayed or dropped; the row stays."""
    postgres.execute("UPDATE dead_letter SET state = %s, resolved_at = ledger_now() WHERE id = %s", (state, letter_id))


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
