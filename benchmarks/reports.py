"""The speed of reports on a long log: `python -m benchmarks.reports [--rows 10000000]`.

Builds a ledger of its own with that many rows. Two of its accounts have 50,000 rows each in their open period:
`books` (pages of long documents) and `letters` (every event another document). Their rows are spread evenly over the
whole log, the worst case for one account. Both are rolled up but for the longest tail that waits for no roll-up.
Then it times each report as its caller sees it, from the function's call to its answer: warm, and after enough other
reads that Postgres' own cache holds none of it. The plans name the index that serves each report.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from math import ceil
from random import Random
from time import perf_counter
from typing import Any, NamedTuple, cast

import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks.bench import scratch_database
from config.settings import load_settings
from worker.admin import accounts
from worker.consumer.jobs import ROLL_UP_ROWS
from worker.demo.servers import running_servers
from worker.ledger import reports as ledger_reports
from worker.ledger.accounts import read_account, read_entry
from worker.ledger.connection import Postgres, batch_connection
from worker.ledger.migrate import migrate
from worker.reports import explain as reports_explain
from worker.reports import usage
from worker.resources import Resources

ACCOUNTS = ("books", "letters")
PLAN = "plus"
# Log rows of one of the other users; a cache of 128 MiB holds the pages of about 30 of them.
ROWS_A_USER = 500
USERS_TO_EVICT = 60
TARGET_P95_MS = 20.0

# Tables in which the other users get copies of the first account's rows.
_COPY = """
    INSERT INTO {table} SELECT copied.* FROM {table} AS their CROSS JOIN generate_series(0, %s) AS number
    CROSS JOIN LATERAL jsonb_populate_record(their, jsonb_build_object('user_id', 'user-' || number)) AS copied
    WHERE their.user_id = 'books' AND {condition}
"""
_COPIED = {
    "account": "true",
    "balance": "true",
    "ledger_entry": "true",
    "rollup_state": "true",
    "usage_rollup": "their.model = 'm1'",
    "document_rollup": "their.document_id < 'doc-104'",
    "document_lifetime": "their.document_id < 'doc-104'",
    "balance_checkpoint": "their.seq < 2000",
}
_INDEXES = ("usage_log_pkey", "usage_log_user_id_seq_key")
# The key of a row in the log decides everything else, so that two runs build the same.
_FILL = """
    INSERT INTO usage_log
    SELECT user_id, '01932b00-0000-7000-8000-' || lpad(k::text, 12, '0'), seq, meter, quantity, 1, quantity,
        quantity, 0, 0, 0, 0, %(start)s, at, at, false, CASE meter WHEN 'ocr_tokens' THEN 'ocr' ELSE 'tts' END,
        'variant:' || k, NULL,
        jsonb_build_object(
            'model_slug', (ARRAY['m1', 'm2', 'm2-turbo', 'm3'])[1 + hash / 8 %% 4],
            'voice_slug', (ARRAY['narrator', 'storyteller', 'newsreader', 'companion'])[1 + hash / 32 %% 4],
            'document_id', 'doc-' || CASE user_id WHEN 'books' THEN seq / 100 ELSE k END,
            'page_idx', seq %% 100, 'backend', 'gemini', 'duration_ms', 1000 + hash / 128 %% 9000
        )
    FROM (
        SELECT k, hash, 50 + hash / 128 %% 1950 AS quantity,
            (ARRAY['premium_voice', 'premium_voice', 'server_kokoro', 'ocr_tokens'])[1 + hash %% 4] AS meter,
            CASE place WHEN 0 THEN 'books' WHEN 1 THEN 'letters' ELSE 'user-' || k %% %(users)s END AS user_id,
            CASE WHEN place < 2 THEN %(opened)s + 1 + k / %(stride)s ELSE 100 + k / %(users)s END AS seq,
            %(start)s::timestamptz + (%(now)s::timestamptz - %(start)s::timestamptz) * (k::float8 / %(rows)s) AS at
        FROM (
            SELECT k, k %% %(stride)s AS place, hashint8(k)::bigint + 2147483648 AS hash
            FROM generate_series(0, %(rows)s::bigint - 1) AS k
        ) AS numbered
    ) AS made
"""


class Figure(NamedTuple):
    """One report of one account: milliseconds, warm and with a cold cache, and the indexes that serve it."""

    report: str
    account: str
    p50_ms: float
    p95_ms: float
    evicted_p50_ms: float
    evicted_p95_ms: float
    indexes: str


class Explaining:
    """A connection that explains each statement, and then executes it."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self.plans: list[str] = []

    def execute(self, query: str, params: Any = None) -> Any:
        """Execute the statement as a connection does; keep its plan in `plans`."""
        if query.lstrip().startswith(("SELECT", "WITH")):
            lines = self._postgres.execute(f"EXPLAIN (ANALYZE, BUFFERS, SETTINGS) {query}", params).fetchall()
            self.plans.append("\n".join(line for (line,) in lines))
        return self._postgres.execute(query, params)

    def indexes(self) -> set[str]:
        """Return the indexes in the plans so far."""
        return set(re.findall(r"(?:using|Bitmap Index Scan on) (\w+)", "\n".join(self.plans)))

    def tables_read_whole(self) -> set[str]:
        """Return the tables that a plan reads from end to end."""
        return set(re.findall(r"Seq Scan on (\w+)", "\n".join(self.plans)))


def build(resources: Resources, rows: int, account_rows: int) -> None:
    """Fill the empty ledger with `rows` usage rows, `account_rows` of them for each of `ACCOUNTS`; roll these up."""
    now = datetime.now(UTC)
    start = now - timedelta(days=20)
    opened = accounts.open_many(resources, ACCOUNTS, PLAN, start=start)[0].version
    values = {"rows": rows, "stride": rows // account_rows, "users": ceil(rows / ROWS_A_USER), "opened": opened}
    with batch_connection(resources.engine) as postgres:
        postgres.execute("SET statement_timeout = 0; SET maintenance_work_mem = '1GB'; SET synchronous_commit = off")
        # Made after the rows, in a fifth of the time; the same indexes as the migration's.
        definitions = [
            (name, *(postgres.execute("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = %s", (name,))
                     .fetchone() or ("",)))
            for name in _INDEXES
        ]  # fmt: skip
        for name, _ in definitions:
            postgres.execute(f"ALTER TABLE usage_log DROP CONSTRAINT {name}")
        postgres.execute(_FILL, {**values, "start": start, "now": now})
        for name, definition in definitions:
            postgres.execute(f"ALTER TABLE usage_log ADD CONSTRAINT {name} {definition}")
        postgres.execute(
            "UPDATE account SET seq = (SELECT max(seq) FROM usage_log WHERE usage_log.user_id = account.user_id)"
        )
        postgres.execute(
            "UPDATE balance SET used = (SELECT sum(amount) FROM usage_log WHERE usage_log.user_id = balance.user_id "
            "AND usage_log.meter = balance.meter)"
        )
        postgres.execute("ANALYZE usage_log")
        postgres.commit()
        for user_id in ACCOUNTS:
            _roll_up_to_the_longest_tail(postgres, user_id, resources.settings.rollup_after_rows)
        for table, condition in _COPIED.items():
            postgres.execute(_COPY.format(table=table, condition=condition), (values["users"],))
        postgres.commit()
        # Now, or autovacuum would come in the middle of the measurements.
        postgres.autocommit = True
        postgres.execute("VACUUM (ANALYZE)")
        postgres.execute("CHECKPOINT")
        postgres.execute("RESET ALL")
        postgres.autocommit = False


def _roll_up_to_the_longest_tail(postgres: Postgres, user_id: str, rollup_after_rows: int) -> None:
    """Roll up all rows but the longest tail: one more row would be rolled up."""
    left = ledger_reports.tail_length(postgres, user_id)
    started, rolled = perf_counter(), left
    while (excess := left - (rollup_after_rows - 1)) > 0:
        ledger_reports.roll_up(postgres, user_id, min(excess, ROLL_UP_ROWS))
        left = ledger_reports.tail_length(postgres, user_id)
    rate = (rolled - left) / (perf_counter() - started)
    print(f"{user_id}: rolled up {rolled - left:,} rows at {rate:,.0f} a second, tail {left:,}", file=sys.stderr)


def measure(resources: Resources, rows: int, runs: int) -> tuple[list[Figure], dict[str, list[str]]]:
    """Time every report of both accounts; return the figures, and the plans of each report's statements."""
    figures: list[Figure] = []
    plans: dict[str, list[str]] = {}
    random = Random(1)
    with batch_connection(resources.engine) as cold:
        for user_id in ACCOUNTS:
            found = cold.execute(
                "SELECT event_id FROM usage_log WHERE user_id = %s ORDER BY seq", (user_id,)
            ).fetchall()
            event_ids = [event_id for (event_id,) in found]
            for name, call in _reports(user_id, event_ids, random).items():
                warm = [_milliseconds(call, resources) for _ in range(runs + 1)][1:]
                evicted = []
                for _ in range(runs):
                    _evict(cold, random, ceil(rows / ROWS_A_USER))
                    evicted.append(_milliseconds(call, resources))
                explaining = Explaining(cold)
                _statements(user_id, event_ids, resources)[name](cast("Postgres", explaining))
                cold.rollback()
                plans[f"{name} of {user_id}"] = explaining.plans
                served = sorted(explaining.indexes()) + [f"WHOLE {table}" for table in explaining.tables_read_whole()]
                times = (
                    _percentile(warm, 50),
                    _percentile(warm, 95),
                    _percentile(evicted, 50),
                    _percentile(evicted, 95),
                )
                figures.append(Figure(name, user_id, *times, ", ".join(served)))
    return figures, plans


def _reports(user_id: str, event_ids: list[str], random: Random) -> dict[str, Callable[[Resources], object]]:
    return {
        "summary": lambda resources: usage.usage_summary(resources, user_id),
        "breakdown": lambda resources: usage.breakdown(resources, user_id),
        "engagement": lambda resources: usage.engagement(resources, user_id),
        "timeline": lambda resources: usage.timeline(resources, user_id),
        "explain": lambda resources: reports_explain.explain(resources, user_id, random.choice(event_ids)),
    }


def _statements(user_id: str, event_ids: list[str], resources: Resources) -> Mapping[str, Callable[[Postgres], object]]:
    """Return the statements of each report, for their plans."""
    account = accounts.show(resources, user_id)
    periods = [ledger_reports.Period(one.meter, one.period_start) for one in account.balances.values()]
    middle = len(event_ids) // 2

    def explain(postgres: Postgres) -> None:
        event = ledger_reports.read_event(postgres, user_id, event_ids[middle])
        assert event is not None
        assert event.seq is not None
        ledger_reports.detail_before(postgres, user_id, event.meter, event.seq, "allowance")
        ledger_reports.detail_before(postgres, user_id, "", event.seq, "plan")
        ledger_reports.balance_before(postgres, user_id, event.meter, event.seq)
        read_entry(postgres, user_id, f"reverse:{event.event_id}", event.meter)

    return {
        "summary": lambda postgres: read_account(postgres, user_id),
        "breakdown": lambda postgres: ledger_reports.read_breakdown(postgres, user_id, periods, 201),
        "engagement": lambda postgres: ledger_reports.read_engagement(postgres, user_id, ["premium_voice"]),
        "timeline": lambda postgres: ledger_reports.read_changes(postgres, user_id, None, 51),
        "explain": explain,
    }


def _evict(postgres: Postgres, random: Random, users: int) -> None:
    """Read rows of other users until Postgres' own cache holds nothing else."""
    names = [f"user-{random.randrange(users)}" for _ in range(USERS_TO_EVICT)]
    postgres.execute("SELECT sum(amount) FROM usage_log WHERE user_id = ANY(%s)", (names,))
    postgres.rollback()


def _milliseconds(report: Callable[[Resources], object], resources: Resources) -> float:
    started = perf_counter()
    report(resources)
    return (perf_counter() - started) * 1_000


def _percentile(times: list[float], percent: int) -> float:
    return sorted(times)[max(0, ceil(len(times) * percent / 100) - 1)]


def main(arguments: list[str] | None = None) -> int:
    """Build, measure, print. Exit code 1 if a report misses its target. Leaves nothing behind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the usage log")
    parser.add_argument("--account-rows", type=int, default=50_000, help="rows of each account in its open period")
    parser.add_argument("--runs", type=int, default=60, help="of each report, warm and cold")
    parser.add_argument("--no-plans", action="store_true", help="only the table")
    options = parser.parse_args(arguments)
    if options.account_rows < 1 or options.runs < 1 or options.rows < 3 * options.account_rows:
        parser.error("--rows: must be at least 3 times --account-rows, and all of them at least 1")
    with (
        running_servers(os.environ) as servers,
        scratch_database(servers.database_url, f"meterfall_bench_{os.getpid()}") as url,
    ):
        migrate(url)
        settings = load_settings({}, database_url=url, redis_url=servers.redis_url, redis_retries=0)
        with closing(Resources.open(settings)) as resources:
            started = perf_counter()
            build(resources, options.rows, options.account_rows)
            with psycopg.connect(url) as postgres:
                size = postgres.execute("SELECT pg_size_pretty(pg_total_relation_size('usage_log'))").fetchone()
            print(f"{options.rows:,} rows, {(size or ('?',))[0]}, {perf_counter() - started:.0f} s", file=sys.stderr)
            figures, plans = measure(resources, options.rows, options.runs)
    if not options.no_plans:
        for name, statements in plans.items():
            for plan in statements:
                print(f"\n-- {name}\n{plan}")
    table = Table()
    for column in Figure._fields:
        table.add_column(column, overflow="fold")
    for figure in figures:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else value for value in figure))
    Console(width=160).print(table)
    slow = [
        f"{figure.report} of {figure.account}"
        for figure in figures
        if max(figure.p95_ms, figure.evicted_p95_ms) > TARGET_P95_MS
    ]
    print(f"p95 over {TARGET_P95_MS:g} ms: {', '.join(slow) or 'none'}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
