"""Every statement of the reports: roll-ups of the usage log, and sums of roll-ups and the log's tail.

A roll-up sums an account's rows up to one sequence number. A change takes its number under the account's lock, so a
snapshot shows an account's changes without a gap. A report adds the rows after that number (the tail) in the same
statement, so it is exact even if the roll-up lags. A reversal is a row of the tail also: the reversed event with the
opposite sign. A roll-up has no source but the log, so it may be erased and made again.

All reads of the log go through its key (user_id, seq), from one number to another: one account, no more than its tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, NamedTuple

from worker.ledger.accounts import ENTRY_COLUMNS, USAGE_COLUMNS
from worker.ledger.columns import text_array
from worker.ledger.connection import Postgres
from worker.rules.rows import EntryRow, UsageRow


def reported_meter(row: str) -> str:
    """Return SQL for what reports call the meter of a row of the log.

    What a meter drew on a wallet is apart, as its units are the wallet's: `premium_voice@credits`.
    """
    return f"CASE WHEN {row}.wallet IS NULL THEN {row}.meter ELSE {row}.meter || '@' || {row}.wallet END"


# The newest change of the account in this snapshot, 0 for none. Both look at the end of an index.
_TOP = """greatest(
        0,
        (SELECT max(seq) FROM usage_log WHERE user_id = %(user)s),
        (SELECT max(seq) FROM ledger_entry WHERE user_id = %(user)s)
    )"""
# Bounded on both sides: the planner then expects a small part of the account, and always takes the index.
_SPAN_OF_TAIL = f"""
    span AS (
        SELECT coalesce((SELECT seq FROM rollup_state WHERE user_id = %(user)s), 0) AS low, {_TOP} AS high
    )
"""
# Only a whole number is a page or a duration; the lengths keep every sum within its type.
_CHANGES = f"""
    change AS MATERIALIZED (
        SELECT seq, sign, {reported_meter("signed")} AS meter, coalesce(wallet, meter) AS payer, period_start, quantity,
            amount, from_subscription, from_rollover + overflow_to_debt AS from_rollover, from_purchased,
            date_trunc('month', occurred_at AT TIME ZONE 'UTC')::date AS month,
            coalesce(dimensions ->> 'voice_slug', '') AS voice,
            coalesce(dimensions ->> 'model_slug', '') AS model,
            CASE WHEN dimensions ->> 'duration_ms' ~ '^[0-9]{{1,10}}$'
                THEN (dimensions ->> 'duration_ms')::bigint ELSE 0 END AS duration_ms,
            nullif(dimensions ->> 'document_id', '') COLLATE "C" AS document_id,
            CASE WHEN dimensions ->> 'page_idx' ~ '^[0-9]{{1,9}}$'
                THEN (dimensions ->> 'page_idx')::integer END AS page
        FROM (
            SELECT 1 AS sign, usage_log.* FROM usage_log
            WHERE user_id = %(user)s AND seq > (SELECT low FROM span) AND seq <= (SELECT high FROM span)
            UNION ALL
            SELECT -1, event.* FROM ledger_entry AS entry
            JOIN usage_log AS event ON event.user_id = %(user)s AND event.event_id = substr(entry.entry_key, 9)
            WHERE entry.user_id = %(user)s AND entry.kind = 'reversal'
                AND entry.seq > (SELECT low FROM span) AND entry.seq <= (SELECT high FROM span)
        ) AS signed
    )
"""
_COUNT_OF = "(SELECT coalesce(sum(upper(page) - lower(page)), 0)::bigint FROM unnest({}) AS page)"
_DOCUMENT_SUMS = """sum(sign)::bigint AS events, sum(sign * amount)::bigint AS amount,
        coalesce(range_agg(int4range(page, page + 1)) FILTER (WHERE page IS NOT NULL), '{}') AS pages"""
# The tail's change of the account's lifetime documents and pages. A document counts while an unreversed event names it.
# One look into the index per document: a plain join may read all documents of the account.
_DOCUMENTS = f"""
    document AS (
        SELECT document_id, {_DOCUMENT_SUMS} FROM change WHERE document_id IS NOT NULL GROUP BY document_id
    ),
    grown AS (
        SELECT coalesce(sum((after.events > 0)::integer - (before.events > 0)::integer), 0) AS documents,
            coalesce(sum(
                CASE WHEN after.events > 0 THEN {_COUNT_OF.format("after.pages")} ELSE 0 END
                - CASE WHEN before.events > 0 THEN {_COUNT_OF.format("before.pages")} ELSE 0 END
            ), 0) AS pages
        FROM document
        LEFT JOIN LATERAL (
            SELECT events, pages FROM document_lifetime
            WHERE user_id = %(user)s AND document_lifetime.document_id = document.document_id
            OFFSET 0
        ) AS old ON true
        CROSS JOIN LATERAL (
            SELECT coalesce(old.events, 0) AS events, coalesce(old.pages, '{{}}') AS pages
        ) AS before
        CROSS JOIN LATERAL (
            SELECT before.events + document.events AS events, before.pages + document.pages AS pages
        ) AS after
    )
"""


def _latest_balance(meter: str, seq: str) -> str:
    """Return SQL for a meter's last stored balance up to `seq`: of a ledger entry or of a checkpoint."""
    where = f"WHERE user_id = %(user)s AND meter = {meter} AND seq <= {seq} ORDER BY seq DESC LIMIT 1"
    return f"""
            SELECT * FROM (
                (SELECT seq, used_after AS used, rollover_after AS rollover, purchased_after AS purchased
                FROM ledger_entry {where})
                UNION ALL
                (SELECT seq, used, rollover, purchased FROM balance_checkpoint {where})
            ) AS written ORDER BY seq DESC LIMIT 1"""


def begin(postgres: Postgres) -> None:
    """Make this transaction a read-only snapshot without JIT, as its statements are short."""
    postgres.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL jit = off")


# ---------------------------------------------------------------------------------------------------------------------
# Rolling up


_ROLL_UP = f"""
    WITH span AS (SELECT %(low)s::bigint AS low, least(%(low)s::bigint + %(rows)s, {_TOP}) AS high),
    {_CHANGES},
    {_DOCUMENTS},
    by_voice AS (
        INSERT INTO usage_rollup AS old
        SELECT %(user)s, meter, period_start, month, voice, model,
            sum(sign), sum(sign * quantity), sum(sign * amount), sum(sign * duration_ms)
        FROM change GROUP BY meter, period_start, month, voice, model
        ON CONFLICT (user_id, meter, period_start, month, voice, model) DO UPDATE
        SET events = old.events + excluded.events, quantity = old.quantity + excluded.quantity,
            amount = old.amount + excluded.amount, duration_ms = old.duration_ms + excluded.duration_ms
    ),
    by_document AS (
        INSERT INTO document_rollup AS old
        SELECT %(user)s, meter, period_start, document_id, events, amount, pages, {_COUNT_OF.format("pages")}
        FROM (
            SELECT meter, period_start, document_id, {_DOCUMENT_SUMS}
            FROM change WHERE document_id IS NOT NULL GROUP BY meter, period_start, document_id
        ) AS new
        ON CONFLICT (user_id, meter, period_start, document_id) DO UPDATE
        SET events = old.events + excluded.events, amount = old.amount + excluded.amount,
            pages = old.pages + excluded.pages, page_count = {_COUNT_OF.format("old.pages + excluded.pages")}
    ),
    by_life AS (
        INSERT INTO document_lifetime AS old (user_id, document_id, events, pages)
        SELECT %(user)s, document_id, events, pages FROM document
        ON CONFLICT (user_id, document_id) DO UPDATE
        SET events = old.events + excluded.events, pages = old.pages + excluded.pages
    ),
    by_meter AS (
        INSERT INTO balance_checkpoint
        SELECT %(user)s, balance.meter, span.high, base.used + coalesce(sum(change.from_subscription), 0),
            base.rollover - coalesce(sum(change.from_rollover), 0),
            base.purchased - coalesce(sum(change.from_purchased), 0)
        FROM span
        JOIN balance ON balance.user_id = %(user)s AND span.high > span.low
        CROSS JOIN LATERAL ({_latest_balance("balance.meter", "span.high")}) AS base
        LEFT JOIN change ON change.sign > 0 AND change.payer = balance.meter AND change.seq > base.seq
        GROUP BY balance.meter, span.high, base.used, base.rollover, base.purchased
    )
    UPDATE rollup_state
    SET seq = span.high, documents = rollup_state.documents + grown.documents, pages = rollup_state.pages + grown.pages
    FROM span, grown
    WHERE user_id = %(user)s AND span.high > span.low
    RETURNING span.high, {_TOP}
"""


def roll_up(postgres: Postgres, user_id: str, rows: int) -> bool:
    """Roll up the next at most `rows` changes of an account and commit. Returns True when there are more.

    Two at once take turns. Killed at any point, all of it happened or nothing. Does not touch the account's lock.
    """
    # Skip an account closed meanwhile: a mark outlives its account.
    postgres.execute(
        "INSERT INTO rollup_state (user_id) SELECT user_id FROM account WHERE user_id = %s ON CONFLICT DO NOTHING",
        (user_id,),
    )
    # Statements of their own, after the wait for the lock: they must read the state after it.
    state = postgres.execute("SELECT seq FROM rollup_state WHERE user_id = %s FOR UPDATE", (user_id,)).fetchone()
    if not postgres.execute("SELECT FROM account WHERE user_id = %s", (user_id,)).rowcount:
        state = None
    if state is None:  # erased while we waited
        postgres.rollback()
        return False
    done = postgres.execute(_ROLL_UP, {"user": user_id, "low": state[0], "rows": rows}).fetchone()
    postgres.commit()
    return done is not None and done[0] < done[1]


def tail_length(postgres: Postgres, user_id: str) -> int:
    """Return the number of changes of the account that no roll-up holds yet."""
    row = postgres.execute(f"WITH {_SPAN_OF_TAIL} SELECT high - low FROM span", {"user": user_id}).fetchone()
    return int(row[0]) if row else 0


def erase(postgres: Postgres, user_id: str) -> None:
    """Delete the account's roll-ups, in the caller's transaction. Reports stay right: they read the log instead.

    Waits for a roll-up of this account; no roll-up waits for the account's lock. A later roll-up waits for the caller's
    COMMIT, and finds the account gone.
    """
    # A first roll-up of the account must find a row to wait for.
    postgres.execute("INSERT INTO rollup_state (user_id) VALUES (%s) ON CONFLICT DO NOTHING", (user_id,))
    for table in ("rollup_state", "usage_rollup", "document_rollup", "document_lifetime", "balance_checkpoint"):
        postgres.execute(f"DELETE FROM {table} WHERE user_id = %s", (user_id,))


# ---------------------------------------------------------------------------------------------------------------------
# Reports


class VoiceFigures(NamedTuple):
    """Usage of a meter in a period by one voice and model. `amount` is after the multiplier, `quantity` before it."""

    meter: str
    voice: str
    model: str
    events: int
    quantity: int
    amount: int
    duration_ms: int


class DocumentFigures(NamedTuple):
    """Usage of a meter in a period by one document; `pages` are distinct. No events: all were reversed."""

    meter: str
    document_id: str
    events: int
    amount: int
    pages: int


class MonthFigures(NamedTuple):
    """Usage of one voice with one model in one month; `characters` on meters that count characters."""

    month: date
    voice: str
    model: str
    characters: int
    duration_ms: int
    syntheses: int


class LifeFigures(NamedTuple):
    """An account's whole life."""

    months: list[MonthFigures]
    documents: int
    pages: int


class Period(NamedTuple):
    """A period of a report. It lists documents after `after_document`; None: no documents."""

    meter: str
    period_start: datetime
    after_document: str | None = ""


_ASKED = """
    page AS (
        SELECT * FROM unnest(%(meters)s::text[], %(starts)s::timestamptz[], %(afters)s::text[])
            AS page (meter, period_start, after_document)
    )
"""
# Two reports in one statement, because both need the tail: rows of voices have no document, and the other way round.
_BREAKDOWN = f"""
    WITH {_SPAN_OF_TAIL}, {_CHANGES}, {_ASKED},
    in_period AS MATERIALIZED (SELECT * FROM change JOIN page USING (meter, period_start)),
    by_voice AS (
        SELECT meter, voice, model, sum(events)::bigint AS events, sum(quantity)::bigint AS quantity,
            sum(amount)::bigint AS amount, sum(duration_ms)::bigint AS duration_ms
        FROM (
            SELECT meter, voice, model, events, quantity, amount, duration_ms
            FROM usage_rollup JOIN page USING (meter, period_start) WHERE user_id = %(user)s
            UNION ALL
            SELECT meter, voice, model, sign, sign * quantity, sign * amount, sign * duration_ms FROM in_period
        ) AS both_parts
        GROUP BY meter, voice, model HAVING sum(events) > 0
    ),
    rolled_document AS (
        SELECT listed.* FROM page CROSS JOIN LATERAL (
            SELECT meter, document_id, events, amount, pages, page_count FROM document_rollup
            WHERE user_id = %(user)s AND meter = page.meter AND period_start = page.period_start
                AND document_id > page.after_document
            ORDER BY document_id LIMIT %(documents)s
        ) AS listed
    ),
    tail_document AS (
        SELECT meter, document_id, {_DOCUMENT_SUMS} FROM in_period
        WHERE document_id > after_document GROUP BY meter, document_id
    ),
    by_document AS (
        SELECT coalesce(rolled.meter, tail.meter) AS meter,
            coalesce(rolled.document_id, tail.document_id) AS document_id,
            coalesce(rolled.events, 0) + coalesce(tail.events, 0) AS events,
            coalesce(rolled.amount, 0) + coalesce(tail.amount, 0) AS amount,
            CASE WHEN tail.pages IS NULL THEN rolled.page_count
                ELSE {_COUNT_OF.format("coalesce(rolled.pages, '{}') + tail.pages")} END AS pages
        FROM rolled_document AS rolled
        FULL JOIN tail_document AS tail ON tail.meter = rolled.meter AND tail.document_id = rolled.document_id
        ORDER BY 1, 2 LIMIT %(documents)s
    )
    SELECT meter, voice, model, events, quantity, amount, duration_ms, NULL, NULL FROM by_voice
    UNION ALL
    SELECT meter, NULL, NULL, events, NULL, amount, NULL, document_id, pages FROM by_document
"""


def read_breakdown(
    postgres: Postgres, user_id: str, periods: Sequence[Period], documents: int
) -> tuple[list[VoiceFigures], list[DocumentFigures]]:
    """Return an account's usage in these periods (one per meter), by voice and model and by document.

    Lists the first `documents` documents in the order of meter and id. Exact at the moment of the snapshot.
    """
    parameters = {
        "meters": text_array([period.meter for period in periods]),
        "starts": [period.period_start for period in periods],
        "afters": [period.after_document for period in periods],
    }
    rows = postgres.execute(_BREAKDOWN, {"user": user_id, "documents": documents, **parameters}).fetchall()
    voices, listed = [], []
    for meter, voice, model, events, quantity, amount, duration_ms, document_id, pages in rows:
        if document_id is None:
            voices.append(VoiceFigures(meter, voice, model, int(events), int(quantity), int(amount), int(duration_ms)))
        else:
            listed.append(DocumentFigures(meter, document_id, int(events), int(amount), int(pages)))
    return sorted(voices), sorted(listed)


# Also where a wallet paid for them.
_COUNTS_CHARACTERS = "split_part(meter, '@', 1) = ANY(%(characters)s::text[])"
_ENGAGEMENT = f"""
    WITH {_SPAN_OF_TAIL}, {_CHANGES}, {_DOCUMENTS},
    by_month AS (
        SELECT month, voice, model,
            coalesce(sum(quantity) FILTER (WHERE {_COUNTS_CHARACTERS}), 0)::bigint,
            sum(duration_ms)::bigint, sum(events)::bigint
        FROM (
            SELECT meter, month, voice, model, quantity, duration_ms, events FROM usage_rollup WHERE user_id = %(user)s
            UNION ALL
            SELECT meter, month, voice, model, sign * quantity, sign * duration_ms, sign FROM change
        ) AS both_parts
        WHERE voice <> '' OR {_COUNTS_CHARACTERS}
        GROUP BY month, voice, model HAVING sum(events) > 0
    )
    SELECT * FROM by_month
    UNION ALL
    SELECT NULL, NULL, NULL, coalesce(rolled.documents, 0) + grown.documents::bigint,
        coalesce(rolled.pages, 0) + grown.pages::bigint, NULL
    FROM grown LEFT JOIN rollup_state AS rolled ON rolled.user_id = %(user)s
"""


def read_engagement(postgres: Postgres, user_id: str, characters: Sequence[str]) -> LifeFigures:
    """Return an account's lifetime usage.

    `characters` are the meters that count characters. An event on one of them, or with a voice, is a synthesis.
    """
    parameters = {"user": user_id, "characters": text_array(characters)}
    rows = postgres.execute(_ENGAGEMENT, parameters).fetchall()
    ((_, _, _, documents, pages, _),) = [row for row in rows if row[0] is None]
    return LifeFigures(sorted(MonthFigures(*row) for row in rows if row[0] is not None), documents, pages)


# ---------------------------------------------------------------------------------------------------------------------
# One account's changes, one by one


def read_changes(
    postgres: Postgres, user_id: str, before_seq: int | None, limit: int
) -> tuple[list[UsageRow], list[EntryRow]]:
    """Return the newest `limit` usage rows and the newest `limit` ledger entries before `before_seq`, newest first."""
    parameters = (user_id, before_seq if before_seq is not None else 2**63 - 1, limit)
    entries = postgres.execute(
        f"SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE user_id = %s AND seq < %s ORDER BY seq DESC LIMIT %s",
        parameters,
    ).fetchall()
    return read_events(postgres, user_id, before_seq, limit), [EntryRow(*row) for row in entries]


def read_events(postgres: Postgres, user_id: str, before_seq: int | None, limit: int) -> list[UsageRow]:
    """Return the newest `limit` events of an account with a sequence number below `before_seq`, newest first."""
    rows = postgres.execute(
        f"SELECT {USAGE_COLUMNS} FROM usage_log WHERE user_id = %s AND seq < %s ORDER BY seq DESC LIMIT %s",
        (user_id, before_seq if before_seq is not None else 2**63 - 1, limit),
    ).fetchall()
    return [UsageRow(*row) for row in rows]


def read_grant_uses(postgres: Postgres, user_id: str, after: int) -> list[UsageRow]:
    """Return the events after the change `after` that took units of grants, newest first."""
    rows = postgres.execute(
        f"SELECT {USAGE_COLUMNS} FROM usage_log WHERE user_id = %s AND seq > %s AND grants IS NOT NULL "
        "ORDER BY seq DESC",
        (user_id, after),
    ).fetchall()
    return [UsageRow(*row) for row in rows]


def read_reversals(postgres: Postgres, user_id: str, event_ids: Sequence[str]) -> dict[str, datetime]:
    """Return when events of an account were reversed, by event id; without the others."""
    rows = postgres.execute(
        "SELECT detail->>'event_id', created_at FROM ledger_entry WHERE user_id = %s AND entry_key = ANY(%s::text[])",
        (user_id, text_array([f"reverse:{event_id}" for event_id in event_ids])),
    ).fetchall()
    return {row[0]: row[1] for row in rows}


def read_event(postgres: Postgres, user_id: str, event_id: str) -> UsageRow | None:
    """Return one event of the log, or None."""
    row = postgres.execute(
        f"SELECT {USAGE_COLUMNS} FROM usage_log WHERE user_id = %s AND event_id = %s", (user_id, event_id)
    ).fetchone()
    return UsageRow(*row) if row else None


def detail_before(postgres: Postgres, user_id: str, meter: str, seq: int, name: str) -> dict[str, Any]:
    """Return the detail of a meter's newest ledger entry before the change `seq` that has `name`, else {}."""
    row = postgres.execute(
        "SELECT detail FROM ledger_entry "
        "WHERE user_id = %s AND meter = %s AND seq < %s AND detail ? %s ORDER BY seq DESC LIMIT 1",
        (user_id, meter, seq, name),
    ).fetchone()
    return row[0] if row else {}


_BALANCE_BEFORE = f"""
    WITH base AS MATERIALIZED ({_latest_balance("%(meter)s", "%(seq)s - 1")})
    SELECT base.used + coalesce(sum(from_subscription), 0)::bigint,
        base.rollover - coalesce(sum(from_rollover + overflow_to_debt), 0)::bigint,
        base.purchased - coalesce(sum(from_purchased), 0)::bigint
    FROM base LEFT JOIN usage_log
    ON user_id = %(user)s AND coalesce(wallet, meter) = %(meter)s
        AND usage_log.seq > base.seq AND usage_log.seq < %(seq)s
    GROUP BY base.used, base.rollover, base.purchased
"""


def balance_before(postgres: Postgres, user_id: str, meter: str, seq: int) -> tuple[int, int, int]:
    """Return the buckets before the change `seq`: used, rollover, purchased. Zeros for a meter not open by then."""
    row = postgres.execute(_BALANCE_BEFORE, {"user": user_id, "meter": meter, "seq": seq}).fetchone()
    return (row[0], row[1], row[2]) if row else (0, 0, 0)


def letters_naming(postgres: Postgres, event_id: str) -> list[tuple[int, str, str, str, datetime, bytes]]:
    """Return id, reason, detail, state, time and payload of dead letters with this id in the payload. Reads all."""
    return postgres.execute(
        "SELECT id, reason, detail, state, created_at, payload FROM dead_letter "
        "WHERE position(%s::bytea IN payload) > 0 ORDER BY id",
        (event_id.encode(),),
    ).fetchall()


# Users with a common prefix as a range of the primary key: no character of an id sorts after "~".
HAS_PREFIX = "user_id >= %(prefix)s AND user_id < %(prefix)s || '~'"


class PlanUsage(NamedTuple):
    """Usage of one meter by accounts of one plan, and the buckets that paid; amounts in units of the meter."""

    plan: str
    meter: str
    accounts: int
    events: int
    amount: int
    from_subscription: int
    from_rollover: int
    from_purchased: int
    overflow_to_debt: int
    uncollected: int


def usage_by_plan(postgres: Postgres, prefix: str) -> list[PlanUsage]:
    """Return usage by plan and meter of all users with `prefix`; plan "" for users without an account."""
    meter = reported_meter("usage_log")
    parts = ", ".join(f"sum({name})::bigint" for name in PlanUsage._fields[4:])
    rows = postgres.execute(
        f"SELECT coalesce(plan, ''), {meter}, count(DISTINCT user_id), count(*), {parts} "
        f"FROM usage_log LEFT JOIN account USING (user_id) WHERE {HAS_PREFIX} GROUP BY 1, 2 ORDER BY 1, 2",
        {"prefix": prefix},
    ).fetchall()
    return [PlanUsage(*row) for row in rows]


class ClosedPeriod(NamedTuple):
    """A period that ended by the calendar or with an invoice, and the next one; amounts in units of the meter."""

    user_id: str
    plan: str
    meter: str
    period_start: datetime
    period_end: datetime | None
    allowance: int | None
    used: int
    rollover_before: int
    rollover_after: int
    refilled_to: int | None


def closed_periods(postgres: Postgres, prefix: str) -> list[ClosedPeriod]:
    """Return closed periods of all users with `prefix`, in the order of users and of time."""
    rows = postgres.execute(
        "SELECT user_id, closed.plan, meter, closed.period_start, closed.period_end, closed.allowance, closed.used, "
        "closed.rollover, rollover_after, (detail->>'allowance')::bigint FROM ledger_entry, jsonb_to_record("
        "detail->'closed') AS closed (plan text, period_start timestamptz, period_end timestamptz, allowance bigint, "
        "used bigint, rollover bigint) WHERE kind IN ('refill', 'renewal', 'lapse') AND detail ? 'closed' "
        f"AND {HAS_PREFIX} ORDER BY user_id, seq",
        {"prefix": prefix},
    ).fetchall()
    return [ClosedPeriod(*row) for row in rows]
