"""Every statement about notices: they are written in the COMMIT of their cause, and get their place in the feed later.

Commits of different partitions pass each other, so a number that is taken while a notice is written is no cursor: a
reader could go past one that is committed later. `put_in_line` gives the places, one process at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from config.catalogue import EXPIRING
from worker.ledger.columns import array, arrays, as_json
from worker.ledger.connection import LOCK_SPACE, NOTICE_LOCK, Postgres
from worker.rules.entry_times import END_OF_TIME
from worker.rules.notices import tell
from worker.rules.rows import Alarm, Crossing, Notice

# One that is there is left out before it is inserted: an insert would wait for a sender that holds the row.
_INSERT_NOTICES = """
    INSERT INTO notice (notice_id, user_id, meter, kind, rule, period, times, created_at, due_at, data)
    SELECT notice_id, user_id, meter, kind, rule, period, times, created_at, due_at, data
    FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::integer[],
        %s::timestamptz[], %s::timestamptz[], %s::jsonb[]) WITH ORDINALITY
        AS made (notice_id, user_id, meter, kind, rule, period, times, created_at, due_at, data, ordinal)
    WHERE NOT EXISTS (SELECT FROM notice WHERE notice.notice_id = made.notice_id) ORDER BY ordinal
    ON CONFLICT DO NOTHING
"""
_READ_ALARMS = """
    SELECT user_id, meter, rule, period, times, is_open FROM notice_alarm
    JOIN unnest(%s::text[], %s::text[], %s::text[]) AS asked (user_id, meter, rule) USING (user_id, meter, rule)
"""
_STORE_ALARMS = """
    INSERT INTO notice_alarm (user_id, meter, rule, period, times, is_open)
    SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::integer[], %s::boolean[])
    ON CONFLICT (user_id, meter, rule)
    DO UPDATE SET period = excluded.period, times = excluded.times, is_open = excluded.is_open
"""
# Rows in one go: a place in line is given under a lock.
LINE_ROWS = 1_000
_DUE = """
    SELECT notice_id, kind FROM notice WHERE position IS NULL AND due_at <= ledger_now()
    ORDER BY due_at, number LIMIT %s
"""
# What is left of a grant that ends soon is known only when its notice is due.
_READ_LEFT = """
    SELECT notice_id, coalesce((
        SELECT sum(each."left") FROM balance, unnest(ARRAY['in_force', 'to_come']) AS half
        CROSS JOIN LATERAL jsonb_to_recordset(grants -> half) AS each (key text, "left" bigint)
        WHERE balance.user_id = notice.user_id AND balance.meter = notice.meter AND each.key = notice.data ->> 'order'
    ), 0)::bigint
    FROM notice WHERE notice_id = ANY(%s)
"""
_TELL_LEFT = """
    UPDATE notice SET data = jsonb_set(data, '{units}', to_jsonb(grant_left.units))
    FROM unnest(%s::text[], %s::bigint[]) AS grant_left (notice_id, units)
    WHERE notice.notice_id = grant_left.notice_id
"""
# The last place that was given is kept apart: the notice that has it may be erased, and no place is given twice.
READ_LAST = "SELECT coalesce((SELECT position FROM notice_line), 0)"
_PUT_IN_LINE = """
    WITH line AS (
        INSERT INTO notice_line (position) VALUES (%(places)s)
        ON CONFLICT (only_row) DO UPDATE SET position = notice_line.position + excluded.position
        RETURNING position - %(places)s AS last
    )
    UPDATE notice SET position = line.last + place.number
    FROM line, unnest(%(notices)s::text[]) WITH ORDINALITY AS place (notice_id, number)
    WHERE notice.notice_id = place.notice_id
"""


class StoredNotice(NamedTuple):
    """A notice as it is kept. `position` is its place in the feed, None until it has one."""

    notice_id: str
    user_id: str
    meter: str
    kind: str
    rule: str
    period: str
    times: int
    created_at: datetime
    due_at: datetime
    position: int | None
    data: dict[str, Any]

    @property
    def told_at(self) -> datetime:
        """Return when it was told: the end of a grant is written long before that. A test never comes due."""
        return self.created_at if self.due_at == END_OF_TIME else self.due_at


COLUMNS = ", ".join(f"notice.{name}" for name in StoredNotice._fields)


def store(postgres: Postgres, notices: Sequence[Notice], crossings: Sequence[Crossing] = ()) -> None:
    """Write notices, and those that the crossings of lines make, in the transaction of their cause.

    Call it under the locks of the accounts: no other transaction tells of their lines meanwhile. One that is there
    already is not written again.
    """
    alarms: dict[tuple[str, str, str], Alarm] = {}
    if crossings:
        asked = sorted({(each.user_id, each.meter, each.rule) for each in crossings})
        found = postgres.execute(_READ_ALARMS, arrays(asked, "ttt")).fetchall()
        alarms = {row[:3]: Alarm(*row[3:]) for row in found}
    told, changed = tell(crossings, alarms)
    with postgres.cursor() as cursor:
        insert(cursor, [*notices, *told])
        if changed:
            rows = sorted((*key, *alarm) for key, alarm in changed.items())
            cursor.execute(_STORE_ALARMS, [array(column) for column in zip(*rows, strict=True)])


def insert(cursor: psycopg.Cursor[tuple[Any, ...]], notices: Sequence[Notice]) -> None:
    """Write notices without a look at alarms. One that is there already is not written again."""
    if notices:
        rows = [
            (
                each.notice_id, each.user_id, each.meter, each.kind, each.rule, each.period, each.times,
                each.created_at, each.due_at, as_json(each.data),
            )
            for each in notices
        ]  # fmt: skip
        cursor.execute(_INSERT_NOTICES, [array(column) for column in zip(*rows, strict=True)])


def lock_line(postgres: Postgres) -> None:
    """Let one process at a time give places and choose what is sent next, until its transaction ends."""
    postgres.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_SPACE, NOTICE_LOCK))


def try_line(postgres: Postgres) -> bool:
    """Do the same as `lock_line` without a wait; return False while another process has the lock."""
    ((is_ours,),) = postgres.execute("SELECT pg_try_advisory_xact_lock(%s, %s)", (LOCK_SPACE, NOTICE_LOCK)).fetchall()
    return bool(is_ours)


def put_in_line(postgres: Postgres) -> int:
    """Give the next due notices their places in the feed, at most `LINE_ROWS`; return their number. No commit.

    Notices of one account keep the order of their causes. Of a grant that is used up nothing is told. While another
    process gives places, it does nothing.
    """
    if not try_line(postgres):
        return 0
    due = postgres.execute(_DUE, (LINE_ROWS,)).fetchall()
    if ending := [notice_id for notice_id, kind in due if kind == EXPIRING]:
        left: dict[str, int] = dict(postgres.execute(_READ_LEFT, (ending,)).fetchall())
        idle = {notice_id for notice_id, units in left.items() if not units}
        postgres.execute("DELETE FROM notice WHERE notice_id = ANY(%s)", (list(idle),))
        postgres.execute(_TELL_LEFT, (list(left), list(left.values())))
    else:
        idle = set()
    if placed := [notice_id for notice_id, _ in due if notice_id not in idle]:
        postgres.execute(_PUT_IN_LINE, {"places": len(placed), "notices": placed})
    return len(due)


def read_feed(
    postgres: Postgres, after: int, limit: int, kinds: Sequence[str] | None, user_id: str | None
) -> list[StoredNotice]:
    """Return the notices after a place in the feed, in its order, at most `limit`."""
    rows = postgres.execute(
        f"SELECT {COLUMNS} FROM notice WHERE position > %(after)s AND (%(kinds)s::text[] IS NULL OR kind = "
        "ANY(%(kinds)s)) AND (%(user)s::text IS NULL OR user_id = %(user)s) ORDER BY position LIMIT %(limit)s",
        {"after": after, "kinds": None if kinds is None else list(kinds), "user": user_id, "limit": limit},
    ).fetchall()
    return [StoredNotice(*row) for row in rows]


def read_latest(postgres: Postgres, limit: int, kinds: Sequence[str] | None, user_id: str | None) -> list[StoredNotice]:
    """Return the notices that were told last, newest first, at most `limit`; not those that are due later."""
    rows = postgres.execute(
        f"SELECT {COLUMNS} FROM notice WHERE due_at <= ledger_now() AND kind <> 'webhook.test' "
        "AND (%(kinds)s::text[] IS NULL OR kind = ANY(%(kinds)s)) AND (%(user)s::text IS NULL OR user_id = %(user)s) "
        "ORDER BY number DESC LIMIT %(limit)s",
        {"kinds": None if kinds is None else list(kinds), "user": user_id, "limit": limit},
    ).fetchall()
    return [StoredNotice(*row) for row in rows]


def read_notice(postgres: Postgres, notice_id: str) -> StoredNotice | None:
    """Return one notice, or None."""
    row = postgres.execute(f"SELECT {COLUMNS} FROM notice WHERE notice_id = %s", (notice_id,)).fetchone()
    return StoredNotice(*row) if row else None


def erase_notices(postgres: Postgres, user_id: str) -> None:
    """Delete what was told about an account, with what became of it, and its alarms.

    Its rows are locked after the line: so no sender waits for them while it has others that are deleted here.
    """
    lock_line(postgres)
    postgres.execute("DELETE FROM notice WHERE user_id = %s", (user_id,))
    postgres.execute("DELETE FROM notice_alarm WHERE user_id = %s", (user_id,))
