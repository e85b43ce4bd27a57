"""Statements about holds that the ledger keeps while Redis is down."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from worker.ledger.columns import array, text_array
from worker.ledger.connection import Postgres

# It asks the clock once, not for each row.
READ_HOLDS = """
    SELECT user_id, hold_key, meter, amount, expires_at, backend FROM ledger_hold
    WHERE user_id = ANY(%s::text[]) AND expires_at > (SELECT ledger_now())
"""


class LedgerHold(NamedTuple):
    """A hold that the ledger granted while Redis was down."""

    key: str
    meter: str
    amount: int
    expires_at: datetime
    backend: str | None = None


def read_ledger_holds(postgres: Postgres, user_id: str) -> list[LedgerHold]:
    """Return the holds of one user that have not expired."""
    return [LedgerHold(*row[1:]) for row in postgres.execute(READ_HOLDS, (array([user_id]),)).fetchall()]


def delete_ledger_holds(postgres: Postgres, user_id: str, hold_keys: Sequence[str]) -> None:
    """Delete holds of one user."""
    statement = "DELETE FROM ledger_hold WHERE user_id = %s AND hold_key = ANY(%s::text[])"
    postgres.execute(statement, (user_id, text_array(hold_keys)))


def restate_ledger_hold(postgres: Postgres, user_id: str, hold_key: str, amount: int, *, is_over: bool) -> None:
    """Let a hold, if there is one, count as the `amount` that its work cost; while it is not over, as that at least."""
    statement = """
        UPDATE ledger_hold SET amount = CASE WHEN %s THEN %s ELSE greatest(amount, %s) END
        WHERE user_id = %s AND hold_key = %s
    """
    postgres.execute(statement, (is_over, amount, amount, user_id, hold_key))


def insert_ledger_hold(postgres: Postgres, user_id: str, hold: LedgerHold) -> None:
    """Store a hold; it replaces an expired one of the same key."""
    postgres.execute(
        "INSERT INTO ledger_hold (user_id, hold_key, meter, amount, expires_at, backend) "
        "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (user_id, hold_key) DO UPDATE "
        "SET meter = excluded.meter, amount = excluded.amount, expires_at = excluded.expires_at, "
        "backend = excluded.backend",
        (user_id, *hold),
    )
