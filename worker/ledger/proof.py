"""Statements with which the proof reads the whole history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date, datetime
from heapq import merge
from typing import NamedTuple

from worker.ledger.accounts import ENTRY_COLUMNS, USAGE_COLUMNS, spent_since
from worker.ledger.checkpoints import Span
from worker.ledger.columns import array, arrays, text_array
from worker.ledger.connection import Postgres
from worker.ledger.reports import HAS_PREFIX, reported_meter
from worker.ledger.summing import NAMES_A_PLAN
from worker.rules.entry_times import END_OF_TIME
from worker.rules.rows import EntryRow, UsageRow

# The whole units of an event by itself, as its producer knows them.
AMOUNT_ANSWERED = (
    "CASE WHEN remainder >= 0 OR wallet IS NOT NULL THEN floor(quantity * multiplier)::bigint ELSE amount END"
)


def recorded_amounts(postgres: Postgres, prefix: str) -> dict[tuple[str, str], int]:
    """Return the amounts by (user, event id) of all events of users with ids that begin with `prefix`.

    They are amounts as producers were answered: in units of the meter, without the fractions that earlier events left.
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
    # An entry of a release without limits says no number of the event.
    same += " AND CASE WHEN entry.detail ? 'seq' THEN (entry.detail->>'seq')::bigint = usage_log.seq ELSE true END"
    rows = postgres.execute(
        "SELECT entry.user_id, entry.entry_key FROM unnest(%s::text[], %s::bigint[]) AS span (user_id, after) "
        "JOIN ledger_entry AS entry ON entry.user_id = span.user_id AND entry.seq > span.after LEFT JOIN usage_log "
        "ON usage_log.user_id = entry.user_id AND usage_log.event_id = entry.detail->>'event_id' "
        f"WHERE entry.kind = 'reversal' AND ({same}) IS NOT TRUE ORDER BY 1, 2",
        (text_array(users), array(after)),
    ).fetchall()
    return [(row[0], row[1]) for row in rows]


def wrong_windows(postgres: Postgres, users: Sequence[str], after: Sequence[int]) -> list[tuple[str, str, str, int]]:
    """Return user, key and meter of limits whose window counts otherwise than the log does, and the units of the log.

    These are windows that opened as their limit was set. It looks at each user's changes after the number in `after`.
    """
    entries = postgres.execute(
        "SELECT entry.user_id, entry.entry_key, entry.meter, entry.seq, entry.detail->'window' "
        "FROM unnest(%s::text[], %s::bigint[]) AS span (user_id, after) "
        "JOIN ledger_entry AS entry ON entry.user_id = span.user_id AND entry.seq > span.after "
        "WHERE entry.kind = 'set_limit' AND entry.detail ? 'window' ORDER BY 1, 4",
        (text_array(users), array(after)),
    ).fetchall()
    wrong = []
    for user_id, key, meter, seq, window in entries:
        since, used = spent_since(postgres, user_id, meter, datetime.fromisoformat(window["starts"]), seq)
        if (since, used) != (window["since"], window["used"]):
            wrong.append((user_id, key, meter, used))
    return wrong


def read_history(
    postgres: Postgres, users: Sequence[str], until: datetime = END_OF_TIME
) -> Iterator[EntryRow | UsageRow]:
    """Stream every change of these accounts that was written before `until`, in the order of their sequence.

    A user may have millions of rows.
    """
    with (
        postgres.cursor("entries") as entries,
        postgres.cursor("usage") as usage,
    ):
        entries.execute(
            f"SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE user_id = ANY(%s::text[]) "
            "AND created_at < %s ORDER BY user_id, seq",
            (text_array(users), until),
        )
        usage.execute(
            f"SELECT {USAGE_COLUMNS} FROM usage_log WHERE user_id = ANY(%s::text[]) AND seq IS NOT NULL "
            "AND applied_at < %s ORDER BY user_id, seq",
            (text_array(users), until),
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


# ---------------------------------------------------------------------------------------------------------------------
# The sums of the reports over all accounts


class SummedUp(NamedTuple):
    """The change `seq` up to which an account is summed up, of `newest`, with the plan that it had then.

    `has_plan` is the plan that the sums name, `plan` that of the ledger entries; "" without one.
    """

    user_id: str
    seq: int
    newest: int
    has_plan: str
    plan: str


class RunningSums(NamedTuple):
    """Sums of a month, meter and plan; element *n* - 1 has the days 1 to *n*. `user_id` is "" for all accounts."""

    user_id: str
    month: date
    meter: str
    plan: str
    events: list[int]
    amounts: list[int]


class SumsByDay(NamedTuple):
    """Sums of a month, meter and plan, each day by itself; days without any are left out. `user_id` as there."""

    user_id: str
    month: date
    meter: str
    plan: str
    days: list[int]
    events: list[int]
    amounts: list[int]


# From the log and the entries of plans, apart from the statement that sums up. Each era of a plan is one look into the
# index of the log (OFFSET 0).
_SUMS_OF_LOG = f"""
    WITH span AS MATERIALIZED (
        SELECT * FROM unnest(%s::text[], %s::bigint[], %s::bigint[]) AS span (user_id, after, upto)
    ),
    named AS (
        SELECT user_id, 0::bigint AS seq, '' AS plan FROM span
        UNION ALL
        SELECT user_id, entry.seq, entry.plan FROM span CROSS JOIN LATERAL (
            SELECT seq, detail ->> 'plan' AS plan FROM ledger_entry
            WHERE ledger_entry.user_id = span.user_id AND seq <= span.upto AND {NAMES_A_PLAN} OFFSET 0
        ) AS entry
    ),
    era AS MATERIALIZED (
        SELECT user_id, plan, seq AS began, lead(seq, 1, {2**62}) OVER (PARTITION BY user_id ORDER BY seq) AS ended
        FROM named
    ),
    change AS (
        SELECT user_id, plan, meter, day, 1 AS sign, amount FROM span JOIN era USING (user_id) CROSS JOIN LATERAL (
            SELECT {reported_meter("usage_log")} AS meter, amount, (occurred_at AT TIME ZONE 'UTC')::date AS day
            FROM usage_log WHERE usage_log.user_id = span.user_id AND seq > greatest(span.after, era.began)
                AND seq <= least(span.upto, era.ended) OFFSET 0
        ) AS event
        UNION ALL
        SELECT user_id, plan, meter, day, -1, amount FROM span CROSS JOIN LATERAL (
            SELECT event.seq, {reported_meter("event")} AS meter, amount, (occurred_at AT TIME ZONE 'UTC')::date AS day
            FROM ledger_entry AS entry
            JOIN usage_log AS event ON event.user_id = span.user_id AND event.event_id = entry.detail ->> 'event_id'
            WHERE entry.user_id = span.user_id AND entry.seq > span.after AND entry.seq <= span.upto
                AND entry.kind = 'reversal' OFFSET 0
        ) AS reversed JOIN era USING (user_id) WHERE seq > began AND seq < ended
    ),
    of_day AS (
        SELECT user_id, date_trunc('month', day::timestamp)::date AS month, meter, plan,
            extract(day FROM day)::int AS n, sum(sign)::bigint AS events, sum(sign * amount)::bigint AS amount
        FROM change GROUP BY user_id, day, meter, plan
    )
    SELECT user_id, month, meter, plan, array_agg(n), array_agg(events), array_agg(amount)
    FROM of_day GROUP BY user_id, month, meter, plan
"""


def summed_up(postgres: Postgres, users: Sequence[str]) -> list[SummedUp]:
    """Return how far these accounts are summed up; none for accounts that are not."""
    rows = postgres.execute(
        f"""
        SELECT user_id, state.seq, account.seq, state.plan, coalesce((
            SELECT detail ->> 'plan' FROM ledger_entry
            WHERE ledger_entry.user_id = account.user_id AND seq <= state.seq AND {NAMES_A_PLAN}
            ORDER BY seq DESC LIMIT 1
        ), '')
        FROM account JOIN report_state AS state USING (user_id) WHERE user_id = ANY(%s::text[]) ORDER BY user_id
        """,
        (text_array(users),),
    ).fetchall()
    return [SummedUp(*row) for row in rows]


def sums_of_accounts(postgres: Postgres, users: Sequence[str]) -> list[RunningSums]:
    """Return the stored sums of these accounts."""
    statement = f"SELECT {', '.join(RunningSums._fields)} FROM usage_monthly WHERE user_id = ANY(%s::text[])"
    rows = postgres.execute(statement, (text_array(users),), binary=True).fetchall()
    return [RunningSums(*row) for row in rows]


def sums_of_log(postgres: Postgres, spans: Sequence[Span]) -> list[SumsByDay]:
    """Return the sums of these changes as the log has them, one span for each user."""
    rows = postgres.execute(_SUMS_OF_LOG, arrays(spans, "tii"), binary=True).fetchall()
    return [SumsByDay(*row) for row in rows]


def summed_months(postgres: Postgres) -> list[date]:
    """Return the months that have sums."""
    rows = postgres.execute(
        "SELECT month FROM usage_monthly UNION SELECT date_trunc('month', day::timestamp)::date FROM usage_daily "
        "ORDER BY 1"
    ).fetchall()
    return [row[0] for row in rows]


def sums_of_month(postgres: Postgres, month: date) -> tuple[list[RunningSums], list[SumsByDay]]:
    """Return the sums of a month in all accounts: those of accounts added up, and those of days."""
    days = range(1, 32)
    added = ", ".join(
        f"ARRAY[{', '.join(f'sum({name}[{n}])::bigint' for n in days)}]" for name in ("events", "amounts")
    )
    of_accounts = postgres.execute(
        f"SELECT '', month, meter, plan, {added} FROM usage_monthly WHERE month = %s GROUP BY month, meter, plan",
        (month,),
    ).fetchall()
    of_days = postgres.execute(
        """
        SELECT '', %(month)s::date, meter, plan, array_agg(extract(day FROM day)::int), array_agg(events),
            array_agg(amount)
        FROM usage_daily WHERE day >= %(month)s AND day < %(month)s + interval '1 month' GROUP BY meter, plan
        """,
        {"month": month},
    ).fetchall()
    return [RunningSums(*row) for row in of_accounts], [SumsByDay(*row) for row in of_days]


def sums_of_nobody(postgres: Postgres) -> list[str]:
    """Return users with sums, and without an account."""
    rows = postgres.execute(
        "SELECT user_id FROM report_state WHERE NOT EXISTS (SELECT FROM account WHERE user_id = report_state.user_id) "
        "UNION SELECT user_id FROM usage_monthly "
        "WHERE NOT EXISTS (SELECT FROM account WHERE user_id = usage_monthly.user_id) ORDER BY 1"
    ).fetchall()
    return [row[0] for row in rows]
