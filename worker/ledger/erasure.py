"""Statements that erase a closed account and keep its history under a pseudonym."""

from __future__ import annotations

from collections.abc import Sequence

from worker.ledger.accounts import ACCOUNT_COLUMNS
from worker.ledger.connection import Postgres

# A statement has a time-out, an account may have millions of events.
_RENAME_CHUNK = 10_000


_END_OF_CHUNK = """
    SELECT max(event_id) FROM (
        SELECT event_id FROM usage_log WHERE user_id = %s AND event_id > %s ORDER BY event_id LIMIT %s
    ) AS chunk
"""


# The backend stays: the proof of sub-caps needs it, and it is no personal fact.
_RENAME_USAGE = """
    UPDATE usage_log SET user_id = %(new)s, reference_id = NULL, hold_key = NULL, trace_id = NULL, dimensions =
        CASE WHEN dimensions ? 'backend' THEN jsonb_build_object('backend', dimensions->'backend') END
    WHERE user_id = %(old)s AND event_id > %(after)s AND event_id <= %(last)s
"""


# Reasons are free text. The reason for closing is the operator's record of the erasure itself.
_RENAME_ENTRIES = """
    UPDATE ledger_entry SET user_id = %(new)s,
        actor = nullif(actor, %(old)s),
        reason = CASE WHEN kind = 'close' AND position(%(old)s IN reason) = 0 THEN reason END
    WHERE user_id = %(old)s
"""


def rename_history(postgres: Postgres, user_id: str, pseudonym: str) -> None:
    """Copy a closed account to `pseudonym`, move its history there and blank personal data in it.

    The account's old row stays until `delete_renamed`, so that other rows can move meanwhile.
    """
    names = {"old": user_id, "new": pseudonym}
    columns = [column for column in f"{ACCOUNT_COLUMNS}, opened_at".split(", ") if column != "user_id"]
    postgres.execute(
        f"INSERT INTO account (user_id, {', '.join(columns)}) "
        f"SELECT %(new)s, {', '.join(columns)} FROM account WHERE user_id = %(old)s",
        names,
    )
    postgres.execute("UPDATE balance SET user_id = %(new)s WHERE user_id = %(old)s", names)
    postgres.execute(_RENAME_ENTRIES, names)
    postgres.execute("UPDATE order_key SET user_id = %(new)s WHERE user_id = %(old)s", names)
    after: str | None = ""
    while after is not None:
        ((last,),) = postgres.execute(_END_OF_CHUNK, (user_id, after, _RENAME_CHUNK)).fetchall()
        postgres.execute(_RENAME_USAGE, {**names, "after": after, "last": last})
        after = last
    postgres.execute("DELETE FROM ledger_hold WHERE user_id = %(old)s", names)


def delete_renamed(postgres: Postgres, user_id: str) -> None:
    """Delete the old row of an account after its history was renamed."""
    postgres.execute("DELETE FROM account WHERE user_id = %s", (user_id,))


def dead_letters_containing(postgres: Postgres, part: str) -> list[tuple[int, bytes]]:
    """Return ids and payloads of dead letters with this text in their payload."""
    statement = "SELECT id, payload FROM dead_letter WHERE position(%s::bytea IN payload) > 0"
    return [(row[0], row[1]) for row in postgres.execute(statement, (part.encode(),)).fetchall()]


def erase_reasons(postgres: Postgres, part: str) -> None:
    """Erase what operators wrote about dead letters where it has this text: it may be about other letters."""
    postgres.execute(
        "UPDATE dead_letter SET resolved_reason = 'erased' WHERE position(%s IN resolved_reason) > 0", (part,)
    )


def empty_dead_letters(postgres: Postgres, letter_ids: Sequence[int]) -> None:
    """Erase the content of dead letters, and all that operators wrote about them; the rows and their codes stay."""
    postgres.execute(
        "UPDATE dead_letter SET payload = '', detail = 'erased', traceparent = NULL, state = 'dropped', "
        "resolved_at = ledger_now(), resolved_by = NULL, resolved_reason = 'account closed', resolved_letters = %s "
        "WHERE id = ANY(%s)",
        (len(letter_ids), list(letter_ids)),
    )
