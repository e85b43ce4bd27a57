"""Every statement about events that came again late: a key used twice, perhaps."""

from __future__ import annotations

from collections.abc import Sequence

from worker.ledger.columns import array
from worker.ledger.connection import Postgres
from worker.rules.rows import LateRepeat

# A batch that is read again after a kill notes the same again: it counts once, by the time of its last repeat.
NOTE_REPEATS = """
    INSERT INTO late_repeat (user_id, event_id, times, last_at)
    SELECT * FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::timestamptz[])
    ON CONFLICT (user_id, event_id) DO UPDATE
    SET times = late_repeat.times + excluded.times, last_at = excluded.last_at
    WHERE excluded.last_at > late_repeat.last_at
"""


def repeat_arrays(repeats: Sequence[LateRepeat]) -> list[str]:
    """Return the arguments of NOTE_REPEATS; one row for each event."""
    return [array(column) for column in zip(*repeats, strict=True)]


def count_repeats(postgres: Postgres, seconds: int) -> int:
    """Return how many events came again late within the last `seconds`."""
    row = postgres.execute(
        "SELECT count(*) FROM late_repeat WHERE last_at >= ledger_now() - make_interval(secs => %s)", (seconds,)
    ).fetchone()
    assert row is not None
    return int(row[0])


def read_repeat(postgres: Postgres, user_id: str, event_id: str) -> LateRepeat | None:
    """Return how often an event came again late, None if it never did."""
    row = postgres.execute(
        "SELECT user_id, event_id, times, last_at FROM late_repeat WHERE user_id = %s AND event_id = %s",
        (user_id, event_id),
    ).fetchone()
    return LateRepeat(*row) if row else None


def rename_repeats(postgres: Postgres, user_id: str, pseudonym: str) -> None:
    """Move the notes about a closed account to its pseudonym."""
    postgres.execute("UPDATE late_repeat SET user_id = %s WHERE user_id = %s", (pseudonym, user_id))
