"""The speed of the reports over all accounts: `python -m benchmarks.overviews [--rows 10000000] [--accounts 100000]`.

Builds a ledger of its own: that many events of last month, spread evenly over accounts, days and three meters. Every
twentieth account is near a limit, every hundredth owes units or has purchased ones; one event in a hundred has no
account. All but the last `--tail` events are summed up, which it times too. Then it runs each report, and each search
for accounts, as the command does, to its last row. Time is that of the report: from the call to the last row as CSV.
Memory is the peak of the whole process of the command, once more from its start.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks.bench import scratch_database
from config.settings import load_settings
from worker.admin import accounts
from worker.consumer.jobs import SUM_UP_CHANGES
from worker.demo.servers import running_servers
from worker.ledger import summing
from worker.ledger.connection import Postgres
from worker.ledger.migrate import migrate
from worker.reports.finding import find
from worker.reports.overviews import Overviews, open_overviews
from worker.resources import Resources
from worker.rules.spans import Span, month_of

TARGET_SECONDS = 1.0
PLANS = ("basic", "plus")
# Made after the rows, in a fifth of the time; the same indexes as the migrations'.
_INDEXES = ("usage_log_pkey", "usage_log_user_id_seq_key")
# `hash` is even over meters and users, and always the same.
_FILL = """
    INSERT INTO usage_log (
        user_id, event_id, seq, meter, quantity, multiplier, amount, from_subscription, from_rollover, from_purchased,
        overflow_to_debt, uncollected, period_start, occurred_at, applied_at, clamped, source, dimensions
    )
    SELECT CASE WHEN has_account THEN 'user-' || lpad((k %% %(accounts)s)::text, 7, '0') ELSE 'nobody-' || k %% 500 END,
        'job-' || k, CASE WHEN has_account THEN %(opened)s + 1 + k / %(accounts)s END, meter, units, 1, units,
        CASE WHEN has_account THEN units ELSE 0 END, 0, 0, 0, CASE WHEN has_account THEN 0 ELSE units END,
        CASE WHEN has_account THEN %(start)s::timestamptz END, at, at, false, 'tts',
        jsonb_build_object('model_slug', 'm1', 'voice_slug', 'narrator', 'document_id', 'doc-' || k %% 1000)
    FROM (
        SELECT k, 50 + hash / 128 %% 1950 AS units, k %% %(accounts)s %% 100 <> 99 AS has_account,
            (ARRAY['premium_voice', 'server_kokoro', 'ocr_tokens'])[1 + hash %% 3] AS meter,
            %(start)s::timestamptz + %(length)s * (k::float8 / %(rows)s) AS at
        FROM (
            SELECT k, hashint8(k)::bigint + 2147483648 AS hash
            FROM generate_series(%(from)s::bigint, %(to)s::bigint - 1) AS k
        ) AS numbered
    ) AS made
"""
# The accounts are copies of one of each plan.
_COPY = """
    INSERT INTO {table} SELECT copied.* FROM {table} AS their
    JOIN generate_series(%(first)s, %(last)s - 1) AS number
        ON their.user_id = (ARRAY['plan-basic', 'plan-plus'])[1 + number %% 2]
    CROSS JOIN LATERAL jsonb_populate_record(
        their, jsonb_build_object('user_id', 'user-' || lpad(number::text, 7, '0'))
    ) AS copied
"""
_SET_BALANCES = """
    UPDATE balance SET
        used = coalesce(CASE WHEN number % 20 = 0 THEN allowance * 9 / 10 ELSE allowance / 3 END, 0),
        rollover = CASE WHEN number % 100 = 1 THEN -5 ELSE 0 END,
        purchased = CASE WHEN number % 100 = 2 THEN 700 ELSE 0 END
    FROM (SELECT user_id AS name, right(user_id, 7)::int AS number FROM account WHERE user_id LIKE 'user-%') AS numbered
    WHERE name = user_id
"""


class Figure(NamedTuple):
    """One report: its rows, the median and longest time to the last row, and the peak memory of its command."""

    report: str
    rows: int
    median_seconds: float
    longest_seconds: float
    peak_mib: float


def last_month() -> Span:
    """Return the calendar month before this one."""
    return month_of(month_of(datetime.now(UTC).date()).since - timedelta(days=1))


def build(resources: Resources, rows: int, users: int, tail: int) -> None:
    """Fill the empty ledger, and sum up all but the last `tail` events."""
    span = last_month()
    start, end = (datetime(day.year, day.month, day.day, tzinfo=UTC) for day in span)
    opened = max(
        account.version
        for plan in PLANS
        for account in accounts.open_many(resources, [f"plan-{plan}"], plan, start=start)
    )
    values = {
        "rows": rows, "accounts": users, "opened": opened, "start": start, "length": end - start,
    }  # fmt: skip
    # A connection without time-outs: these statements take minutes.
    with psycopg.connect(resources.settings.database_url or "") as postgres:
        postgres.execute("SET maintenance_work_mem = '512MB'; SET synchronous_commit = off; SET timezone = 'UTC'")
        copy_accounts(postgres, 0, users)
        definitions = [
            (name, *(postgres.execute("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = %s", (name,))
                     .fetchone() or ("",)))
            for name in _INDEXES
        ]  # fmt: skip
        for name, _ in definitions:
            postgres.execute(f"ALTER TABLE usage_log DROP CONSTRAINT {name}")
        postgres.execute(_FILL, {**values, "from": 0, "to": rows - tail})
        for name, definition in definitions:
            postgres.execute(f"ALTER TABLE usage_log ADD CONSTRAINT {name} {definition}")
        postgres.execute(_SET_BALANCES)
        set_versions(postgres)
        tidy(postgres)
        started = perf_counter()
        changes = sum_all_up(postgres)
        seconds = perf_counter() - started
        print(
            f"summed up {changes:,} changes in {seconds:.0f} s, {seconds / changes * 1e6:.0f} µs each", file=sys.stderr
        )
        postgres.execute(_FILL, {**values, "from": rows - tail, "to": rows})
        set_versions(postgres)
        tidy(postgres)


def sum_all_up(postgres: Postgres) -> int:
    """Sum up all changes, as the job does; return their number."""
    changes, go_on_at = 0, ""
    while True:
        summed = summing.sum_up(postgres, go_on_at, SUM_UP_CHANGES)
        changes += summed.changes
        if summed.go_on_at is None:
            return changes
        go_on_at = summed.go_on_at


def copy_accounts(postgres: Postgres, first: int, last: int) -> None:
    """Open the accounts of these numbers."""
    for table in ("account", "balance", "ledger_entry"):
        postgres.execute(_COPY.format(table=table), {"first": first, "last": last})
    postgres.commit()


def set_versions(postgres: Postgres) -> None:
    """Give every account the number of its newest event."""
    postgres.execute(
        "UPDATE account SET seq = newest FROM (SELECT user_id AS name, max(seq) AS newest FROM usage_log GROUP BY 1) "
        "AS log WHERE name = user_id AND seq < newest"
    )
    postgres.commit()


def tidy(postgres: Postgres) -> None:
    """Vacuum now, or autovacuum would come in the middle of the measurements."""
    postgres.commit()
    postgres.autocommit = True
    postgres.execute("VACUUM (ANALYZE)")
    postgres.execute("CHECKPOINT")
    postgres.autocommit = False


def reports_of() -> dict[str, tuple[Callable[[Overviews], Iterator[Any]], tuple[str, ...]]]:
    """Return each report by name: its call, and the arguments of its command."""
    month = last_month()
    week = Span(month.since + timedelta(days=17), month.since + timedelta(days=24))
    days, some = (
        ("--from", f"{month.since}", "--to", f"{month.until}"),
        ("--from", f"{week.since}", "--to", f"{week.until}"),
    )
    return {
        "usage by day": (lambda o: o.usage(month, ["day"]), ("usage", *days, "--by", "day")),
        "usage by meter": (lambda o: o.usage(month), ("usage", *days)),
        "usage by plan": (lambda o: o.usage(month, ["plan"]), ("usage", *days, "--by", "plan")),
        "usage by account": (lambda o: o.usage(month, ["account"]), ("usage", *days, "--by", "account")),
        "usage by account, a week": (lambda o: o.usage(week, ["account"]), ("usage", *some, "--by", "account")),
        "top": (lambda o: o.top(month), ("top", *days)),
        "top, a week": (lambda o: o.top(week), ("top", *some)),
        "near-limit": (lambda o: o.near_limit(80), ("near-limit",)),
        "debtors": (lambda o: o.debtors(), ("debtors",)),
        "purchased": (lambda o: o.purchased(), ("purchased",)),
        "purchased by account": (lambda o: o.purchased_of_accounts(), ("purchased", "--by", "account")),
        "uncollected": (lambda o: o.uncollected(month), ("uncollected", *days)),
    }


def searches(users: int) -> dict[str, Mapping[str, Any]]:
    """Return searches for accounts by name: the arguments of `find`."""
    someone = f"user-{users // 2:07}"
    return {
        "find by id": {"user_id": someone},
        "find by prefix": {"prefix": someone[:-2]},
        "find by name in logs": {"log_name": sha256(someone.encode()).hexdigest()[:12]},
        "find by plan": {"plan": "plus"},
        "find by status, none": {"status": "past_due"},
    }


def measure(resources: Resources, users: int, runs: int) -> list[Figure]:
    """Time every report and every search."""
    environment = {
        **os.environ, "DATABASE_URL": resources.settings.database_url or "", "REDIS_URL": resources.settings.redis_url,
    }  # fmt: skip
    figures = []
    for name, (call, arguments) in reports_of().items():
        taken = [_read_report(resources, call) for _ in range(runs)]
        peak = _peak_mib([sys.executable, "-m", "worker", "report", *arguments, "--csv"], environment)
        figures.append(_figure(name, taken, peak))
    for name, sought in searches(users).items():
        taken = []
        for _ in range(runs):
            started = perf_counter()
            found = find(resources, **sought)
            taken.append((len(found.accounts), perf_counter() - started))
        figures.append(_figure(name, taken, 0))
    return figures


def _read_report(resources: Resources, call: Callable[[Overviews], Iterator[Any]]) -> tuple[int, float]:
    """Write a report as CSV to nowhere; return its rows and seconds."""
    started, rows = perf_counter(), 0
    with open_overviews(resources) as overviews, Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        written = csv.writer(nowhere)
        for row in call(overviews):
            written.writerow(row if isinstance(row, tuple) else [getattr(row, name) for name in row.__slots__])
            rows += 1
    return rows, perf_counter() - started


def _peak_mib(command: list[str], environment: Mapping[str, str]) -> float:
    """Run a command to its end; return the peak of its memory."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return usage.ru_maxrss / 1_024


def _figure(name: str, taken: list[tuple[int, float]], peak_mib: float) -> Figure:
    seconds = sorted(each for _, each in taken)
    return Figure(name, taken[0][0], seconds[len(seconds) // 2], seconds[-1], peak_mib)


def main(arguments: list[str] | None = None) -> int:
    """Build, measure, print. Exit code 1 if a report misses its target. Leaves nothing behind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overviews", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the usage log")
    parser.add_argument("--accounts", type=int, default=100_000, help="accounts with usage")
    parser.add_argument("--idle-accounts", type=int, default=0, help="accounts without usage, opened after the reports")
    parser.add_argument(
        "--tail", type=int, default=14_000, help="events that are not summed up; default those of an hour"
    )
    parser.add_argument("--runs", type=int, default=5, help="of each report")
    options = parser.parse_args(arguments)
    if options.accounts < 100 or options.runs < 1 or not 0 <= options.tail < options.rows:
        parser.error("--accounts: at least 100; --runs: at least 1; --tail: less than --rows")
    with (
        running_servers(os.environ) as servers,
        scratch_database(servers.database_url, f"meterfall_bench_{os.getpid()}") as url,
    ):
        migrate(url)
        settings = load_settings({}, database_url=url, redis_url=servers.redis_url, redis_retries=0)
        with closing(Resources.open(settings)) as resources:
            started = perf_counter()
            build(resources, options.rows, options.accounts, options.tail)
            with psycopg.connect(url) as postgres:
                sizes = postgres.execute(
                    "SELECT relname || ' ' || pg_size_pretty(pg_total_relation_size(oid)) FROM pg_class "
                    "WHERE relname IN ('usage_log', 'usage_daily', 'usage_monthly', 'report_state', 'account_log_name')"
                ).fetchall()
            print(f"{options.rows:,} rows, {perf_counter() - started:.0f} s; {', '.join(row[0] for row in sizes)}")
            figures = measure(resources, options.accounts, options.runs)
            _print(figures, f"{options.accounts:,} accounts")
            if options.idle_accounts:
                total = options.accounts + options.idle_accounts
                with psycopg.connect(url) as postgres:
                    postgres.execute("SET synchronous_commit = off; SET timezone = 'UTC'")
                    copy_accounts(postgres, options.accounts, total)
                    sum_all_up(postgres)
                    tidy(postgres)
                figures = measure(resources, total, options.runs)
                _print(figures, f"{total:,} accounts")
    slow = [figure.report for figure in figures if figure.median_seconds > TARGET_SECONDS]
    print(f"over {TARGET_SECONDS:g} s: {', '.join(slow) or 'none'}")
    return 1 if slow else 0


def _print(figures: list[Figure], title: str) -> None:
    table = Table(title=title)
    for column in Figure._fields:
        table.add_column(column)
    for figure in figures:
        table.add_row(
            figure.report, f"{figure.rows:,}", f"{figure.median_seconds:.3f}", f"{figure.longest_seconds:.3f}",
            f"{figure.peak_mib:.0f}" if figure.peak_mib else "",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
