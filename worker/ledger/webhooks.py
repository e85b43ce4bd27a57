"""Every statement about webhooks, their secrets, and the deliveries of notices to them.

A delivery is `waiting`, `delivered` or `dead`. Of the waiting ones of an account at a webhook only the first has a
time, `next_at`, at which it is sent: so notices of an account stay in order, and any number of senders may work. Who
takes a delivery moves that time on; if the sender is killed, another one takes it then.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from worker.ledger.columns import array
from worker.ledger.connection import Postgres
from worker.ledger.notices import COLUMNS, LINE_ROWS, READ_LAST, StoredNotice, lock_line, try_line
from worker.rules.entry_times import END_OF_TIME

# A webhook that does not answer gets no more rows than this; its other notices wait in the feed.
MOST_IN_LINE = 10_000


class Webhook(NamedTuple):
    """A webhook: where it leads, which kinds it gets (None: all), and up to which place of the feed it got them."""

    webhook_id: str
    url: str
    kinds: list[str] | None
    position: int
    created_at: datetime
    created_by: str | None


_WEBHOOK = ", ".join(Webhook._fields)


class Delivery(NamedTuple):
    """What became of a notice at a webhook. `error` is the last one."""

    webhook_id: str
    notice_id: str
    state: str
    attempts: int
    next_at: datetime | None
    error: str | None
    ended_at: datetime | None


_DELIVERY = ", ".join(Delivery._fields)


class Taken(NamedTuple):
    """A delivery in the hand of a sender: how often it was tried with this time, whose order it keeps, the notice."""

    webhook_id: str
    attempts: int
    lane: str
    notice: StoredNotice


class Ended(NamedTuple):
    """The end of an attempt: the new state, and for a retry the seconds until it. `error` is None after a success."""

    webhook_id: str
    notice_id: str
    user_id: str
    state: str
    retry_seconds: float | None
    error: str | None


def read_webhooks(postgres: Postgres) -> list[Webhook]:
    """Return all webhooks, the oldest first."""
    rows = postgres.execute(f"SELECT {_WEBHOOK} FROM webhook ORDER BY created_at, webhook_id").fetchall()
    return [Webhook(*row) for row in rows]


def insert_webhook(
    postgres: Postgres, webhook_id: str, url: str, kinds: Sequence[str] | None, secret: str, by: str | None
) -> None:
    """Write a webhook that gets what is told from now on."""
    postgres.execute(
        "INSERT INTO webhook (webhook_id, url, kinds, position, created_at, created_by) "
        f"VALUES (%s, %s, %s, ({READ_LAST}), ledger_now(), %s)",
        (webhook_id, url, None if kinds is None else list(kinds), by),
    )
    insert_secret(postgres, webhook_id, secret)


def delete_webhook(postgres: Postgres, webhook_id: str) -> bool:
    """Delete a webhook with its secrets and deliveries; return False if there is none.

    It waits for senders: they give no deliveries to a webhook that is gone.
    """
    lock_line(postgres)
    return postgres.execute("DELETE FROM webhook WHERE webhook_id = %s", (webhook_id,)).rowcount > 0


def insert_secret(postgres: Postgres, webhook_id: str, secret: str) -> None:
    """Give a webhook one more secret."""
    postgres.execute(
        "INSERT INTO webhook_secret (webhook_id, secret, created_at) VALUES (%s, %s, clock_timestamp())",
        (webhook_id, secret),
    )


def end_secrets(postgres: Postgres, webhook_id: str, hours: float) -> None:
    """Let the secrets of a webhook end after so many hours, unless they end earlier."""
    postgres.execute(
        "UPDATE webhook_secret SET ends_at = least(ends_at, ledger_now() + make_interval(secs => %s)) "
        "WHERE webhook_id = %s",
        (hours * 3_600, webhook_id),
    )


def read_secrets(postgres: Postgres) -> dict[str, list[str]]:
    """Return the secrets that sign now by webhook, the newest first."""
    rows = postgres.execute(
        "SELECT webhook_id, secret FROM webhook_secret WHERE ends_at IS NULL OR ends_at > ledger_now() "
        "ORDER BY created_at DESC"
    ).fetchall()
    found: dict[str, list[str]] = {}
    for webhook_id, secret in rows:
        found.setdefault(webhook_id, []).append(secret)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Deliveries

_FAN_OUT = """
    INSERT INTO notice_delivery (webhook_id, notice_id, user_id, position, state, next_at)
    SELECT %(webhook)s, notice_id, user_id, position, 'waiting', CASE
        WHEN row_number() OVER (PARTITION BY user_id ORDER BY position) = 1 AND NOT EXISTS (
            SELECT FROM notice_delivery AS earlier WHERE earlier.webhook_id = %(webhook)s
                AND earlier.user_id = notice.user_id AND earlier.state = 'waiting'
        ) THEN ledger_now()
    END
    FROM notice WHERE position > %(after)s AND position <= %(last)s
        AND (%(kinds)s::text[] IS NULL OR kind = ANY(%(kinds)s))
    ON CONFLICT DO NOTHING
"""
_TAKE = f"""
    WITH taken AS (
        UPDATE notice_delivery SET attempts = attempts + 1, next_at = ledger_now() + make_interval(secs => %(seconds)s)
        WHERE (webhook_id, notice_id) IN (
            SELECT webhook_id, notice_id FROM notice_delivery
            WHERE webhook_id = %(webhook)s AND next_at <= ledger_now() ORDER BY next_at
            LIMIT %(rows)s FOR UPDATE SKIP LOCKED
        )
        RETURNING webhook_id, attempts, notice_delivery.user_id AS lane, notice_id
    )
    SELECT webhook_id, attempts, lane, {COLUMNS} FROM taken JOIN notice USING (notice_id)
"""
_END = """
    UPDATE notice_delivery SET state = ended.state, error = ended.error,
        next_at = ledger_now() + make_interval(secs => ended.seconds),
        ended_at = CASE WHEN ended.state <> 'waiting' THEN ledger_now() END
    FROM unnest(%s::text[], %s::text[], %s::text[], %s::double precision[], %s::text[])
        AS ended (webhook_id, notice_id, state, seconds, error)
    WHERE notice_delivery.webhook_id = ended.webhook_id AND notice_delivery.notice_id = ended.notice_id
        AND notice_delivery.state = 'waiting'
"""
# The first that waits of each lane. A row for itself, looked up by its key: a join might look at all that wait.
_NEXT_OF_LANES = """
    WITH next AS MATERIALIZED (
        SELECT lane.webhook_id, first.notice_id
        FROM unnest(%s::text[], %s::text[]) AS lane (webhook_id, user_id) CROSS JOIN LATERAL (
            SELECT notice_id FROM notice_delivery AS waiting
            WHERE waiting.webhook_id = lane.webhook_id AND waiting.user_id = lane.user_id
                AND waiting.state = 'waiting'
            ORDER BY position LIMIT 1
        ) AS first
    )
    UPDATE notice_delivery SET next_at = ledger_now() FROM next
    WHERE notice_delivery.webhook_id = next.webhook_id AND notice_delivery.notice_id = next.notice_id
        AND notice_delivery.next_at IS NULL
"""
_LANES_UNDER_WAY = """
    SELECT webhook_id, user_id FROM unnest(%s::text[], %s::text[]) AS lane (webhook_id, user_id) WHERE EXISTS (
        SELECT FROM notice_delivery AS waiting WHERE waiting.webhook_id = lane.webhook_id
            AND waiting.user_id = lane.user_id AND waiting.state = 'waiting' AND waiting.next_at IS NOT NULL
    )
"""


def fan_out(postgres: Postgres) -> int:
    """Give each webhook its part of the next notices in line; return how many were looked at. Under `lock_line`."""
    ((last,),) = postgres.execute(READ_LAST).fetchall()
    looked_at = 0
    for webhook in read_webhooks(postgres):
        if webhook.position >= last or _in_line(postgres, webhook.webhook_id) >= MOST_IN_LINE:
            continue
        upto = min(last, webhook.position + LINE_ROWS)
        part = {"webhook": webhook.webhook_id, "after": webhook.position, "last": upto, "kinds": webhook.kinds}
        postgres.execute(_FAN_OUT, part)
        postgres.execute("UPDATE webhook SET position = %s WHERE webhook_id = %s", (upto, webhook.webhook_id))
        looked_at += upto - webhook.position
    return looked_at


def _in_line(postgres: Postgres, webhook_id: str) -> int:
    statement = """
        SELECT count(*) FROM (SELECT FROM notice_delivery WHERE webhook_id = %s AND state = 'waiting' LIMIT %s) AS seen
    """
    ((found,),) = postgres.execute(statement, (webhook_id, MOST_IN_LINE)).fetchall()
    return int(found)


def deliver_only(postgres: Postgres, webhook_id: str, notice_id: str) -> None:
    """Have a notice sent to one webhook, without a place in the feed."""
    postgres.execute(
        "INSERT INTO notice_delivery (webhook_id, notice_id, user_id, position, state, next_at) "
        "VALUES (%s, %s, %s, 0, 'waiting', ledger_now())",
        (webhook_id, notice_id, notice_id),
    )


def take(postgres: Postgres, webhook_id: str, rows: int, seconds: float) -> list[Taken]:
    """Take the next deliveries to a webhook; if nobody ends them, they are sent again after `seconds`."""
    found = postgres.execute(_TAKE, {"webhook": webhook_id, "rows": rows, "seconds": seconds}).fetchall()
    return [Taken(row[0], row[1], row[2], StoredNotice(*row[3:])) for row in found]


def end(postgres: Postgres, ended: Sequence[Ended]) -> None:
    """Write what became of attempts, and let the next notices of their accounts go."""
    lock_line(postgres)
    rows = sorted((one.webhook_id, one.notice_id, one.state, one.retry_seconds, one.error) for one in ended)
    columns = [list(column) for column in zip(*rows, strict=True)]
    postgres.execute(_END, columns)
    _go_on(postgres, sorted({(one.webhook_id, one.user_id) for one in ended if one.state != "waiting"}))


def _go_on(postgres: Postgres, lanes: Sequence[tuple[str, str]]) -> None:
    """Let the first that waits go, of lanes (webhook, user) of which nothing is under way."""
    if lanes:
        postgres.execute(_NEXT_OF_LANES, [array(column) for column in zip(*lanes, strict=True)])


# Places are given in the order in which notices came due. A test never comes due, and has no place.
_OLD = """
    SELECT notice_id FROM (
        SELECT notice_id, due_at FROM notice WHERE position IS NOT NULL ORDER BY position LIMIT %(rows)s
    ) AS first WHERE due_at < ledger_now() - make_interval(days => %(days)s)
    UNION ALL
    SELECT notice_id FROM notice WHERE position IS NULL AND due_at = %(never)s
        AND created_at < ledger_now() - make_interval(days => %(days)s)
"""
_ARE_DUE = f"""
    SELECT EXISTS (SELECT FROM notice WHERE position IS NULL AND due_at <= ledger_now())
        OR EXISTS (SELECT FROM notice_delivery WHERE next_at <= ledger_now())
        OR EXISTS (SELECT FROM webhook WHERE position < ({READ_LAST}))
        OR EXISTS ({_OLD})
"""
_LANES_OF = """
    SELECT DISTINCT webhook_id, user_id FROM notice_delivery
    WHERE notice_id = ANY(%s) AND state = 'waiting' AND next_at IS NOT NULL
"""


def are_due(postgres: Postgres, days: int) -> bool:
    """Return whether a notice waits for its place, for a webhook, or to be deleted so many days after it was told."""
    ((found,),) = postgres.execute(_ARE_DUE, {"days": days, "rows": 1, "never": END_OF_TIME}).fetchall()
    return bool(found)


def forget(postgres: Postgres, days: int) -> int:
    """Delete notices that were told so many days ago, with what became of them, about `LINE_ROWS`; return their number.

    What waits after one of them goes on. While another process has the line, it does nothing.
    """
    if not try_line(postgres):
        return 0
    old = [row[0] for row in postgres.execute(_OLD, {"rows": LINE_ROWS, "days": days, "never": END_OF_TIME})]
    if old:
        lanes = postgres.execute(_LANES_OF, (old,)).fetchall()
        postgres.execute("DELETE FROM notice WHERE notice_id = ANY(%s)", (old,))
        _go_on(postgres, sorted(lanes))
    return len(old)


def read_deliveries(postgres: Postgres, notice_id: str) -> list[Delivery]:
    """Return what became of a notice at each webhook."""
    rows = postgres.execute(
        f"SELECT {_DELIVERY} FROM notice_delivery WHERE notice_id = %s ORDER BY webhook_id", (notice_id,)
    ).fetchall()
    return [Delivery(*row) for row in rows]


def read_dead(postgres: Postgres, limit: int) -> list[Delivery]:
    """Return the deliveries that ended without success, the oldest first."""
    rows = postgres.execute(
        f"SELECT {_DELIVERY} FROM notice_delivery WHERE state = 'dead' ORDER BY position LIMIT %s", (limit,)
    ).fetchall()
    return [Delivery(*row) for row in rows]


def replay(postgres: Postgres, notice_id: str | None, webhook_id: str | None) -> int:
    """Have dead deliveries sent again, with all attempts anew; return their number."""
    lock_line(postgres)
    found = postgres.execute(
        "UPDATE notice_delivery SET state = 'waiting', attempts = 0, next_at = NULL, ended_at = NULL "
        "WHERE state = 'dead' AND (%(notice)s::text IS NULL OR notice_id = %(notice)s) "
        "AND (%(webhook)s::text IS NULL OR webhook_id = %(webhook)s) RETURNING webhook_id, user_id",
        {"notice": notice_id, "webhook": webhook_id},
    ).fetchall()
    if lanes := sorted(set(found)):
        under_way = postgres.execute(_LANES_UNDER_WAY, [array(column) for column in zip(*lanes, strict=True)])
        _go_on(postgres, sorted({*lanes} - {*under_way.fetchall()}))
    return len(found)


class Backlog(NamedTuple):
    """Deliveries by state, since when the oldest waits, and how many webhooks there are.

    Notices that a webhook was not given yet count as waiting, also those of kinds that it does not want.
    """

    webhooks: int
    waiting: int
    dead: int
    oldest: datetime | None


def read_backlog(postgres: Postgres) -> Backlog:
    """Return what waits at all webhooks."""
    row = postgres.execute(
        """
        WITH line AS (SELECT coalesce((SELECT position FROM notice_line), 0) AS position),
            unplaced AS (
                SELECT count(*) AS number, min(due_at) AS due_at FROM notice
                WHERE position IS NULL AND due_at <= ledger_now() AND EXISTS (SELECT FROM webhook)
            )
        SELECT (SELECT count(*) FROM webhook),
            (SELECT count(*) FROM notice_delivery WHERE state = 'waiting')
                + (SELECT coalesce(sum(line.position - webhook.position), 0) FROM webhook, line)
                + (SELECT number FROM unplaced),
            (SELECT count(*) FROM notice_delivery WHERE state = 'dead'),
            least(
                (SELECT min(notice.due_at) FROM notice_delivery JOIN notice USING (notice_id) WHERE state = 'waiting'
                    AND kind <> 'webhook.test'),
                (SELECT due_at FROM notice WHERE position > (SELECT min(position) FROM webhook)
                    ORDER BY position LIMIT 1),
                (SELECT due_at FROM unplaced)
            )
        """
    ).fetchone()
    assert row is not None
    return Backlog(int(row[0]), int(row[1]), int(row[2]), row[3])
