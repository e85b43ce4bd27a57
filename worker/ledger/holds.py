"""Statements about holds that the ledger keeps while Redis is down."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from worker.ledger.columns import array, text_array
from worker.ledger.connection import Postgres

# It asks the clock once, not for each row.
READ_HOLDS = """
    SELECT user_id, hold_key, meter, amount, expires_at, backend, call_id FROM ledger_hold
    WHERE user_id = ANY(%s::text[]) AND expires_at > (SELECT ledger_now())
"""


class LedgerHold(NamedTuple):
    """A hold that the ledger granted while Redis was down.

    `call_id` is the call that made it, and alone knows of it. None: other calls were told of it as well.
    """

    key: str
    meter: str
    amount: int
    expires_at: datetime
    backend: str | None = None
    call_id: str | None = None


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


def share_ledger_hold(postgres: Postgres, user_id: str, hold_key: str) -> None:
    """Note that another call was told of a hold: from now on no call gives it back as its own."""
    postgres.execute("UPDATE ledger_hold SET call_id = NULL WHERE user_id = %s AND hold_key = %s", (user_id, hold_key))


def give_back_ledger_hold(postgres: Postgres, user_id: str, hold_key: str, call_id: str) -> bool:
    """Delete a hold if that call made it, and no other was told of it. Return True if no hold is left under the key.

    The lock waits for a COMMIT of that call which may still be on its way.
    """
    names = (user_id, hold_key)
    postgres.execute("SELECT FROM account WHERE user_id = %s FOR UPDATE", (user_id,))
    postgres.execute("DELETE FROM ledger_hold WHERE user_id = %s AND hold_key = %s AND call_id = %s", (*names, call_id))
    left = postgres.execute("SELECT FROM ledger_hold WHERE user_id = %s AND hold_key = %s", names).fetchone()
    return left is None


def insert_ledger_hold(postgres: Postgres, user_id: str, hold: LedgerHold) -> None:
    """Store a hold; it replaces an expired one of the same key."""
    postgres.execute(
        "INSERT INTO ledger_hold (user_id, hold_key, meter, amount, expires_at, backend, call_id) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (user_id, hold_key) DO UPDATE "
        "SET meter = excluded.meter, amount = excluded.amount, expires_at = excluded.expires_at, "
        "backend = excluded.backend, call_id = excluded.call_id",
        (user_id, *hold),
    )
