"""Statements with which the proof reads the whole history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import merge

from worker.ledger.accounts import ENTRY_COLUMNS, USAGE_COLUMNS
from worker.ledger.columns import array, text_array
from worker.ledger.connection import Postgres
from worker.ledger.reports import HAS_PREFIX
from worker.rules.rows import EntryRow, UsageRow

# The whole units of an event by itself, as its producer knows them.
AMOUNT_ANSWERED = "CASE WHEN remainder >= 0 THEN floor(quantity * multiplier)::bigint ELSE amount END"


def recorded_amounts(postgres: Postgres, prefix: str) -> dict[tuple[str, str], int]:
    """Return the amounts by (user, event id) of all events of users with ids that begin with `prefix`.

    They are amounts as producers were answered: without the fractions that earlier events left over.
    """
    statement = f"SELECT user_id, event_id, {AMOUNT_ANSWERED} FROM usage_log WHERE {HAS_PREFIX}"
    rows = postgres.execute(statement, {"prefix": prefix}).fetchall()
    return {(user_id, event_id): amount for user_id, event_id, amount in rows}


def wrong_reversals(postgres: Postgres, users: Sequence[str], after: Sequence[int]) -> list[tuple[str, str]]:
    """Return users and keys of reversals with other parts than the event they reverse, or of other grants.

    It looks at each user's changes after the number in `after`.
    """
    parts = ("from_subscription", "from_rollover", "from_purchased", "overflow_to_debt")
    same = " AND ".join(f"(entry.detail->'parts'->>'{part}')::bigint = usage_log.{part}" for part in parts)
    # A release without grants says nothing of them: neither in the log nor in an entry.
    same += (
        " AND CASE WHEN NOT entry.detail ? 'grants' THEN true "
        "WHEN usage_log.grants IS NOT NULL THEN entry.detail->'grants' = usage_log.grants "
        "ELSE usage_log.from_purchased = "
        "(SELECT coalesce(sum(value::bigint), 0) FROM jsonb_each_text(entry.detail->'grants')) END"
    )
    rows = postgres.execute(
        "SELECT entry.user_id, entry.entry_key FROM unnest(%s::text[], %s::bigint[]) AS span (user_id, after) "
        "JOIN ledger_entry AS entry ON entry.user_id = span.user_id AND entry.seq > span.after LEFT JOIN usage_log "
        "ON usage_log.user_id = entry.user_id AND usage_log.event_id = entry.detail->>'event_id' "
        f"WHERE entry.kind = 'reversal' AND ({same}) IS NOT TRUE ORDER BY 1, 2",
        (text_array(users), array(after)),
    ).fetchall()
    return [(row[0], row[1]) for row in rows]


def read_history(postgres: Postgres, users: Sequence[str]) -> Iterator[EntryRow | UsageRow]:
    """Stream every change of these accounts in the order of their sequence: a user may have millions of rows."""
    with (
        postgres.cursor("entries") as entries,
        postgres.cursor("usage") as usage,
    ):
        entries.execute(
            f"SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE user_id = ANY(%s::text[]) ORDER BY user_id, seq",
            (text_array(users),),
        )
        usage.execute(
            f"SELECT {USAGE_COLUMNS} FROM usage_log WHERE user_id = ANY(%s::text[]) AND seq IS NOT NULL "
            "ORDER BY user_id, seq",
            (text_array(users),),
        )
        changes: list[Iterator[EntryRow | UsageRow]] = [(EntryRow(*row) for row in entries)]
        changes.append(UsageRow(*row) for row in usage)
        yield from merge(*changes, key=lambda row: (row.user_id, row.seq))


def applied_before(postgres: Postgres, user_id: str, event_ids: Sequence[str], seconds: int) -> list[str]:
    """Return the events that were applied more than `seconds` ago."""
    rows = postgres.execute(
        "SELECT event_id FROM usage_log WHERE user_id = %s AND event_id = ANY(%s::text[]) "
        "AND applied_at < ledger_now() - make_interval(secs => %s)",
        (user_id, text_array(event_ids), seconds),
    ).fetchall()
    return [row[0] for row in rows]
