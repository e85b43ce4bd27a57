"""The statements of a simulation: which accounts have events in a window of time, and what these accounts need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple, cast

from worker.ledger.columns import text_array
from worker.ledger.connection import Postgres
from worker.ledger.summing import NAMES_A_PLAN


class Window(NamedTuple):
    """The time from `since` up to, and without, `until`, by which changes are chosen: the ledger's clock wrote it."""

    since: datetime
    until: datetime


class Need(NamedTuple):
    """A plan that accounts were on in a window, or a meter that they used, and how many accounts."""

    name: str
    accounts: int


class Uncollected(NamedTuple):
    """Events of a meter in a window that had no account."""

    meter: str
    events: int
    amount: int


_HAS_EVENTS = """EXISTS (
    SELECT FROM usage_log WHERE usage_log.user_id = account.user_id AND seq IS NOT NULL
    AND applied_at >= %(since)s AND applied_at < %(until)s
)"""


def ledger_begins(postgres: Postgres) -> datetime | None:
    """Return when the first account was opened; None if there is none."""
    ((first,),) = postgres.execute("SELECT min(opened_at) FROM account").fetchall()
    return cast("datetime | None", first)


def users_in(postgres: Postgres, window: Window, *, user_id: str | None, sample: int | None) -> Iterator[str]:
    """Yield the users of accounts with events in a window, in the order of their ids.

    `user_id` is the only one to look at; `sample` is the number of accounts, chosen by the hash of their ids.
    """
    statement = (
        f"SELECT user_id FROM account WHERE {_HAS_EVENTS} AND (%(user_id)s::text IS NULL OR user_id = %(user_id)s)"
    )
    if sample is not None:
        statement = f"SELECT user_id FROM ({statement} ORDER BY md5(user_id) LIMIT %(sample)s) AS chosen"
    with postgres.cursor("simulated") as cursor:
        cursor.execute(f"{statement} ORDER BY user_id", {**window._asdict(), "user_id": user_id, "sample": sample})
        for row in cursor:
            yield row[0]


def plans_needed(postgres: Postgres, window: Window, user_id: str | None) -> list[Need]:
    """Return the plans that accounts were on in a window."""
    rows = postgres.execute(
        f"""
        WITH chosen AS MATERIALIZED (
            SELECT user_id FROM account WHERE {_HAS_EVENTS} AND (%(user_id)s::text IS NULL OR user_id = %(user_id)s)
        ),
        named AS (
            SELECT user_id, entry.plan FROM chosen CROSS JOIN LATERAL (
                SELECT detail ->> 'plan' AS plan, created_at, lead(created_at) OVER (ORDER BY seq) AS left_at
                FROM ledger_entry WHERE ledger_entry.user_id = chosen.user_id AND {NAMES_A_PLAN} OFFSET 0
            ) AS entry
            WHERE created_at < %(until)s AND (left_at IS NULL OR left_at >= %(since)s)
        )
        SELECT plan, count(DISTINCT user_id) FROM named GROUP BY plan ORDER BY plan
        """,
        {**window._asdict(), "user_id": user_id},
    ).fetchall()
    return [Need(*row) for row in rows]


def meters_needed(postgres: Postgres, window: Window, meters: Sequence[str], user_id: str | None) -> list[Need]:
    """Return those of `meters` that events of a window used."""
    rows = postgres.execute(
        """
        SELECT meter, count(DISTINCT user_id) FROM usage_log
        WHERE seq IS NOT NULL AND applied_at >= %(since)s AND applied_at < %(until)s
            AND meter = ANY(%(meters)s::text[]) AND (%(user_id)s::text IS NULL OR user_id = %(user_id)s)
        GROUP BY meter ORDER BY meter
        """,
        {**window._asdict(), "meters": text_array(meters), "user_id": user_id},
    ).fetchall()
    return [Need(*row) for row in rows]


def uncollected_in(postgres: Postgres, window: Window, user_id: str | None) -> list[Uncollected]:
    """Return the events of a window that had no account, by meter."""
    rows = postgres.execute(
        """
        SELECT meter, count(*), sum(uncollected)::bigint FROM usage_log
        WHERE seq IS NULL AND applied_at >= %(since)s AND applied_at < %(until)s
            AND (%(user_id)s::text IS NULL OR user_id = %(user_id)s)
        GROUP BY meter ORDER BY meter
        """,
        {**window._asdict(), "user_id": user_id},
    ).fetchall()
    return [Uncollected(*row) for row in rows]


def reversed_events(postgres: Postgres, users: Sequence[str], window: Window) -> dict[str, set[str]]:
    """Return the events of these users that were reversed in a window, by user."""
    rows = postgres.execute(
        "SELECT user_id, detail ->> 'event_id' FROM ledger_entry WHERE user_id = ANY(%s::text[]) "
        "AND kind = 'reversal' AND created_at >= %s AND created_at < %s",
        (text_array(users), *window),
    ).fetchall()
    found: dict[str, set[str]] = {}
    for user_id, event_id in rows:
        found.setdefault(user_id, set()).add(event_id)
    return found
