"""Every statement about the lives of Redis."""

from __future__ import annotations

from datetime import datetime

from worker.ledger.connection import LIFE_LOCK, LOCK_SPACE, Postgres
from worker.rules.account import Cause
from worker.rules.lives import Found, Life

# A copy of Redis older than so many lives is not told from one that the ledger never knew.
_KNOWN_LIVES = 1_000

_LIFE = ", ".join(Life._fields)


def read_lives(postgres: Postgres) -> list[Life]:
    """Return the last lives of Redis, newest first."""
    rows = postgres.execute(f"SELECT {_LIFE} FROM redis_life ORDER BY id DESC LIMIT {_KNOWN_LIVES}").fetchall()
    return [Life(*row) for row in rows]


def lock_lives(postgres: Postgres) -> None:
    """Let no other transaction begin a life until this one ends."""
    postgres.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_SPACE, LIFE_LOCK))


def insert_life(postgres: Postgres, token: str, found: Found, began_at: datetime | None = None) -> Life:
    """Begin a life, by default now. Without a commit; see the lock above."""
    row = postgres.execute(
        "INSERT INTO redis_life (token, found, began_at) VALUES (%s, %s, coalesce(%s, clock_timestamp())) "
        f"RETURNING {_LIFE}",
        (token, found, began_at),
    ).fetchone()
    assert row is not None
    return Life(*row)


def acknowledge_lives(postgres: Postgres, cause: Cause) -> list[Life]:
    """Acknowledge each loss that nobody has acknowledged; return them, oldest first. Without a commit."""
    rows = postgres.execute(
        "WITH done AS (UPDATE redis_life SET acknowledged_at = clock_timestamp(), acknowledged_by = %s, reason = %s "
        f"WHERE found <> 'new' AND acknowledged_at IS NULL RETURNING id, {_LIFE}) SELECT {_LIFE} FROM done ORDER BY id",
        (cause.actor, cause.reason),
    ).fetchall()
    return [Life(*row) for row in rows]
