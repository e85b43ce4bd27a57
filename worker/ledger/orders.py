"""Statements about orders and invoices: each is used once in all accounts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from worker.ledger.accounts import ENTRY_COLUMNS
from worker.ledger.columns import array, arrays, text_array
from worker.ledger.connection import Postgres
from worker.rules.credits import CREDIT_KINDS
from worker.rules.rows import EntryRow

# `grant`: a paid order, `renew`: an invoice.
OrderKind = Literal["grant", "renew"]


def claim_key(postgres: Postgres, kind: OrderKind, key: str, user_id: str) -> str:
    """Let the account use a key, unless one did before; return the account that has it.

    Waits for another transaction that claims the same key now. The claim ends with a transaction that rolls back, so a
    refused change leaves none. Call it under the account's lock.
    """
    statement = "INSERT INTO order_key (kind, key, user_id) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"
    postgres.execute(statement, (kind, key, user_id))
    row = postgres.execute("SELECT user_id FROM order_key WHERE kind = %s AND key = %s", (kind, key)).fetchone()
    assert row is not None
    return str(row[0])


def claim_keys(postgres: Postgres, claims: Iterable[tuple[OrderKind, str, str]]) -> None:
    """Let new accounts use the keys (kind, key, user) that they bring along.

    Raises psycopg.errors.UniqueViolation if an account has one of them.
    """
    postgres.execute(
        "INSERT INTO order_key (kind, key, user_id) SELECT * FROM unnest(%s::text[], %s::text[], %s::text[])",
        arrays(sorted(claims), "ttt"),
    )


def claimed_keys(postgres: Postgres, claims: Sequence[tuple[OrderKind, str]]) -> set[tuple[str, str]]:
    """Return those of the keys (kind, key) that an account has used."""
    rows = postgres.execute(
        "SELECT kind, key FROM order_key JOIN unnest(%s::text[], %s::text[]) AS claim (kind, key) USING (kind, key)",
        arrays(claims, "tt"),
    ).fetchall()
    return {(row[0], row[1]) for row in rows}


def keys_of(postgres: Postgres, users: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return the keys of these accounts by user and kind, sorted."""
    rows = postgres.execute(
        "SELECT user_id, kind, key FROM order_key WHERE user_id = ANY(%s::text[]) ORDER BY user_id, kind, key",
        (text_array(users),),
    ).fetchall()
    found: dict[str, dict[str, list[str]]] = {}
    for user_id, kind, key in rows:
        found.setdefault(user_id, {}).setdefault(kind, []).append(key)
    return found


def read_credits(postgres: Postgres, users: Sequence[str]) -> list[EntryRow]:
    """Return the entries of these accounts that made, moved or took purchased units, in order."""
    statement = (
        f"SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE user_id = ANY(%s::text[]) AND (kind = ANY(%s::text[]) "
        "OR kind = 'reversal' AND detail ? 'gone') AND meter <> '' ORDER BY user_id, seq"
    )
    rows = postgres.execute(statement, (text_array(users), text_array(CREDIT_KINDS))).fetchall()
    return [EntryRow(*row) for row in rows]


def wrong_keys(postgres: Postgres, users: Sequence[str], after: Sequence[int]) -> list[tuple[str, str, str]]:
    """Return user, key and owner of grants and renewals whose order or invoice is not their account's.

    It looks at each user's changes after the number in `after`. The owner is '' if nobody has the key. Keys that
    several accounts had used before the table existed are right.
    """
    rows = postgres.execute(
        "SELECT DISTINCT entry.user_id, entry.entry_key, coalesce(order_key.user_id, '') "
        "FROM unnest(%s::text[], %s::bigint[]) AS span (user_id, after) "
        "JOIN ledger_entry AS entry ON entry.user_id = span.user_id AND entry.seq > span.after LEFT JOIN order_key "
        "ON order_key.kind = CASE entry.kind WHEN 'renewal' THEN 'renew' ELSE 'grant' END "
        "AND order_key.key = substr(entry.entry_key, strpos(entry.entry_key, ':') + 1) "
        "WHERE entry.kind IN ('grant', 'grant_ahead', 'renewal') AND entry.entry_key NOT LIKE 'start:%%' "
        "AND (order_key.user_id IS NULL OR order_key.user_id <> entry.user_id AND NOT order_key.shared) ORDER BY 1, 2",
        (text_array(users), array(after)),
    ).fetchall()
    return [(row[0], row[1], row[2]) for row in rows]
