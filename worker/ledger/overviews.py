"""The statements of the reports over all accounts. Each returns its rows by a cursor of the server.

Amounts of different meters are never added. See `summing` for the sums that serve usage, and for their tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date, datetime
from itertools import starmap
from typing import Any, NamedTuple

from schemas.overviews import PurchasedFigure, TopFigure, UncollectedFigure
from worker.ledger.connection import Postgres, begin_snapshot
from worker.ledger.summing import CHANGES, TAIL
from worker.rules.spans import Span, parts_by_month
from worker.rules.waterfall import ENTITLED_STATUSES

# Rows that a cursor fetches at once.
_ROWS_A_FETCH = 2_000


def begin(postgres: Postgres, *, idle_timeout_ms: int) -> None:
    """Make this transaction a read-only snapshot for cursors that are read to their end.

    `idle_timeout_ms` is the longest time between two fetches.
    """
    begin_snapshot(postgres, idle_timeout_ms=idle_timeout_ms)
    # JIT takes longer than it saves here. Reports come in order: one sort of the parts also groups them, where a hash
    # would need a sort after it. A sort above the memory goes to disk.
    postgres.execute("SET LOCAL jit = off; SET LOCAL cursor_tuple_fraction = 1; SET LOCAL work_mem = '64MB'")


def _read(postgres: Postgres, statement: str, parameters: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    with postgres.cursor(name="report", binary=True) as cursor:
        cursor.itersize = _ROWS_A_FETCH
        cursor.execute(statement, parameters)
        yield from cursor


# ---------------------------------------------------------------------------------------------------------------------
# Usage


class UsageFigures(NamedTuple):
    """Usage of a meter in a span; a column that the report does not group by is None.

    A report has a row for each account and meter: to make this one takes a quarter of the time of `UsageFigure`.
    """

    day: date | None
    meter: str
    plan: str | None
    user_id: str | None
    events: int
    amount: int


_GROUPED = UsageFigures._fields[:4]
_SINCE, _UNTIL = (f"%({name})s::date::timestamp AT TIME ZONE 'UTC'" for name in ("since", "until"))
# What is not in the sums: the changes after them, and events without an account.
_REST = f"""
    {TAIL}, {CHANGES},
    rest AS MATERIALIZED (
        SELECT day, meter, plan, user_id, sum(sign) AS events, sum(sign * amount)::bigint AS amount FROM change
        WHERE day >= %(since)s::date AND day < %(until)s::date GROUP BY day, meter, plan, user_id
        UNION ALL
        SELECT (occurred_at AT TIME ZONE 'UTC')::date, meter, '', user_id, count(*), sum(amount)::bigint FROM usage_log
        WHERE seq IS NULL AND occurred_at >= {_SINCE} AND occurred_at < {_UNTIL} GROUP BY 1, 2, 4
    )
"""
_OF_ALL = """
    SELECT day, meter, plan, NULL::text AS user_id, events, amount FROM usage_daily
    WHERE day >= %(since)s::date AND day < %(until)s::date
"""
# One month each.
_OF_ACCOUNTS = """
    SELECT NULL::date AS day, meter, plan, user_id, events[{last}] - coalesce(events[{first} - 1], 0) AS events,
        amounts[{last}] - coalesce(amounts[{first} - 1], 0) AS amount
    FROM usage_monthly WHERE month = '{month}'
"""
_OF_ACCOUNTS_BY_DAY = """
    SELECT month + n - 1 AS day, meter, plan, user_id, events[n] - coalesce(events[n - 1], 0) AS events,
        amounts[n] - coalesce(amounts[n - 1], 0) AS amount
    FROM usage_monthly CROSS JOIN generate_series({first}, {last}) AS n WHERE month = '{month}'
"""
_WANTED = "(%(meter)s::text IS NULL OR meter = %(meter)s) AND (%(plan)s::text IS NULL OR plan = %(plan)s)"
# Every meter of the sums of accounts is one of the sums of days too, which are few.
_METERS = f"""
    SELECT meter FROM usage_daily WHERE day >= %(since)s::date AND day < %(until)s::date AND {_WANTED}
    UNION SELECT meter FROM rest WHERE {_WANTED} ORDER BY meter
"""


def _used(sums: str, span: Span | None = None) -> str:
    """Return the rest and `sums` as `used`, the parts of a report; with `span` sums of each of its months."""
    of_months = [sums.format(**part._asdict()) for part in parts_by_month(span)] if span else [sums]
    return f"{_REST}, used AS MATERIALIZED ({' UNION ALL '.join([*of_months, 'SELECT * FROM rest'])})"


def _grouped(groups: Sequence[str], used: str) -> str:
    """Return a statement that adds up `used` by some of its columns; a column that it does not group by is NULL."""
    columns = [name if name in groups else f"NULL AS {name}" for name in _GROUPED]
    return f"""
        SELECT {", ".join(columns)}, sum(events)::bigint AS events, sum(amount)::bigint AS amount
        FROM {used} GROUP BY {", ".join(groups)} HAVING sum(events) > 0
    """


def _by_account(groups: Sequence[str]) -> str:
    """Return `_grouped` for each meter by itself: to sort all by meter and id takes thrice as long.

    The ids of a meter are nearly in order already, as the job makes the sums in that order.
    """
    order = ", ".join(groups)
    of_meter = f"(SELECT * FROM used WHERE meter = listed.meter AND {_WANTED} ORDER BY {order}) AS used"
    return f"""
        SELECT day, listed.meter, plan, user_id, events, amount
        FROM ({_METERS}) AS listed CROSS JOIN LATERAL ({_grouped(groups, of_meter)}) AS of_meter
        ORDER BY listed.meter, {order}
    """


def _parameters(span: Span, meter: str | None, plan: str | None) -> dict[str, Any]:
    return {**span._asdict(), "meter": meter, "plan": plan}


def read_usage(
    postgres: Postgres, span: Span, by: Sequence[str], *, meter: str | None, plan: str | None
) -> Iterator[UsageFigures]:
    """Yield usage of a span by meter and the columns `by` (of `day`, `plan`, `user_id`), in their order.

    Without accounts it reads `usage_daily_pkey`, a few rows a day; with them `usage_monthly_month`, a row for each
    account, meter and month. Both add the tail of the log by `usage_log_user_id_seq_key`, and events without an account
    by `usage_log_uncollected`.
    """
    groups = [name for name in _GROUPED if name in by or name == "meter"]
    if "user_id" in by and "day" not in by:
        groups.remove("meter")
        statement = f"WITH {_used(_OF_ACCOUNTS, span)} {_by_account(groups)}"
    else:
        used = _used(_OF_ACCOUNTS_BY_DAY, span) if "user_id" in by else _used(_OF_ALL)
        statement = f"WITH {used} {_grouped(groups, f'used WHERE {_WANTED}')} ORDER BY 1, 2, 3, 4"
    return map(UsageFigures._make, _read(postgres, statement, _parameters(span, meter, plan)))


def read_top(postgres: Postgres, span: Span, *, meter: str | None, limit: int) -> Iterator[TopFigure]:
    """Yield the `limit` accounts that used most of each meter in a span; equal ones by id. Served as `read_usage`."""
    statement = f"""
        WITH {_used(_OF_ACCOUNTS, span)}
        SELECT listed.meter, row_number() OVER (PARTITION BY listed.meter ORDER BY amount DESC, user_id) AS rank,
            user_id, events, amount
        FROM ({_METERS}) AS listed CROSS JOIN LATERAL (
            {_grouped(("user_id",), "used WHERE meter = listed.meter")} ORDER BY amount DESC, user_id LIMIT %(limit)s
        ) AS first
        ORDER BY listed.meter, rank
    """
    return starmap(TopFigure, _read(postgres, statement, {**_parameters(span, meter, None), "limit": limit}))


def read_uncollected(postgres: Postgres, span: Span | None, *, meter: str | None) -> Iterator[UncollectedFigure]:
    """Yield events without an account by user and meter, of a span or of all time.

    Served by `usage_log_uncollected`, which has these events alone.
    """
    within = f"AND occurred_at >= {_SINCE} AND occurred_at < {_UNTIL}" if span else ""
    statement = f"""
        SELECT user_id, meter, count(*), sum(amount)::bigint, min(occurred_at), max(occurred_at) FROM usage_log
        WHERE seq IS NULL {within} AND (%(meter)s::text IS NULL OR meter = %(meter)s)
        GROUP BY user_id, meter ORDER BY user_id, meter
    """
    parameters = {**(span._asdict() if span else {}), "meter": meter}
    return starmap(UncollectedFigure, _read(postgres, statement, parameters))


def recently_uncollected(postgres: Postgres, seconds: int, at_most: int) -> list[tuple[str, int, int]]:
    """Return the events that no account paid, of work within the last `seconds`: meter, events and units, most first.

    It reads `at_most` of them, the last ones, by an index that has these events alone.
    """
    rows = postgres.execute(
        """
        SELECT meter, count(*), sum(amount)::bigint FROM (
            SELECT meter, amount FROM usage_log
            WHERE seq IS NULL AND occurred_at >= ledger_now() - make_interval(secs => %s)
            ORDER BY occurred_at DESC LIMIT %s
        ) AS last GROUP BY meter ORDER BY count(*) DESC, meter
        """,
        (seconds, at_most),
    ).fetchall()
    return [(row[0], row[1], row[2]) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Balances


class StoredBalance(NamedTuple):
    """A balance as it is stored. `is_due`: a boundary or change of the account was due by now."""

    user_id: str
    meter: str
    plan: str
    status: str
    backing: str | None
    allowance: int | None
    used: int
    rollover: int
    purchased: int
    period_end: datetime | None
    is_due: bool


_CHANGES_AT = "least(plan_change_at, status_change_at, waiting_at)"
_STORED = f"""
    SELECT {", ".join(StoredBalance._fields[:-1])},
        coalesce(least(period_end, paid_until, grants_due, {_CHANGES_AT}) <= ledger_now(), false) AS is_due
    FROM balance JOIN account USING (user_id)
    WHERE (%(meter)s::text IS NULL OR meter = %(meter)s)
"""


def read_near_limit(postgres: Postgres, percent: int, *, meter: str | None) -> Iterator[StoredBalance]:
    """Yield stored balances of entitled accounts with `percent` of their allowance used, by user and meter.

    Yields also every balance of an account with a change that is due, which may set another limit.
    Reads all balances once: usage changes them, and an index would cost every batch.
    """
    statement = f"""
        {_STORED} AND (
            (allowance > 0 AND used * 100 >= allowance * %(percent)s AND status = ANY(%(entitled)s::text[]))
            OR {_CHANGES_AT} <= ledger_now()
        ) ORDER BY user_id, meter
    """
    parameters = {"meter": meter, "percent": percent, "entitled": sorted(ENTITLED_STATUSES)}
    return map(StoredBalance._make, _read(postgres, statement, parameters))


def read_debts(postgres: Postgres, *, meter: str | None) -> Iterator[StoredBalance]:
    """Yield stored balances with debt, by user and meter. Reads all balances once, as `read_near_limit`."""
    return map(
        StoredBalance._make,
        _read(postgres, f"{_STORED} AND rollover < 0 ORDER BY user_id, meter", {"meter": meter}),
    )


# The purchased units of a balance now: those of grants that have started and not ended, stored or not.
_PURCHASED_NOW = """(
        SELECT user_id, meter, CASE WHEN grants_due <= ledger_now() THEN (
            SELECT coalesce(sum((value ->> 'left')::bigint), 0)::bigint
            FROM jsonb_array_elements((grants -> 'in_force') || (grants -> 'to_come'))
            WHERE (value ->> 'effective_at')::timestamptz <= ledger_now()
                AND coalesce((value ->> 'expires_at')::timestamptz > ledger_now(), true)
        ) ELSE purchased END AS purchased FROM balance
    ) AS balance"""


def read_purchased(postgres: Postgres, *, meter: str | None) -> Iterator[PurchasedFigure]:
    """Yield purchased units that are not spent, by meter, now. Reads all balances once."""
    statement = f"""
        SELECT meter, sum(purchased)::bigint, count(*) FROM {_PURCHASED_NOW}
        WHERE purchased > 0 AND (%(meter)s::text IS NULL OR meter = %(meter)s) GROUP BY meter ORDER BY meter
    """
    return starmap(PurchasedFigure, _read(postgres, statement, {"meter": meter}))


def read_purchased_of_accounts(postgres: Postgres, *, meter: str | None) -> Iterator[PurchasedFigure]:
    """Yield purchased units that are not spent, by user and meter, now. Reads all balances once."""
    statement = f"""
        SELECT meter, purchased, NULL, user_id, plan, status FROM {_PURCHASED_NOW} JOIN account USING (user_id)
        WHERE purchased > 0 AND (%(meter)s::text IS NULL OR meter = %(meter)s) ORDER BY user_id, meter
    """
    return starmap(PurchasedFigure, _read(postgres, statement, {"meter": meter}))
