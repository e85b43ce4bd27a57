"""The commands that report on all accounts: `meterfall report …`."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from itertools import chain, islice
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from worker.cli.io import open_resources, print_rows
from worker.cli.options import JsonOption
from worker.errors import BadInput

if TYPE_CHECKING:
    from worker.reports.overviews import Overviews
    from worker.rules.spans import Span

# Rows of a table; CSV and JSON have all of them.
TABLE_ROWS = 1_000
# Columns of times, which CSV has in ISO form as JSON has. The text of a day or a number is the same everywhere.
_TIMES = frozenset({"period_end", "first_at", "last_at"})

app = typer.Typer()
report_app = typer.Typer(no_args_is_help=True, help="Report on all accounts.")
app.add_typer(report_app, name="report")

FromOption = Annotated[
    str | None, typer.Option("--from", metavar="DAY", help="first day, UTC, 2026-11-01; default this month's first")
]
ToOption = Annotated[
    str | None, typer.Option("--to", metavar="DAY", help="first day that no longer counts; default the next month's")
]
MeterFilter = Annotated[str | None, typer.Option(help="only this meter")]
CsvOption = Annotated[bool, typer.Option("--csv", help="print CSV with a header")]


class _Form(NamedTuple):
    """The form of a report: a table unless one of the two is set."""

    as_csv: bool
    as_json: bool


@report_app.command("usage")
def report_usage(
    since: FromOption = None,
    until: ToOption = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="day, meter, plan, account; repeatable, or with commas. The meter is always one"),
    ] = None,
    meter: MeterFilter = None,
    plan: Annotated[str | None, typer.Option(help="only events of accounts that were on this plan")] = None,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sum up events and amount of a span of days, by the day of the work."""
    groups = [name.strip() for each in by or ["meter"] for name in each.split(",")]
    from worker.reports.overviews import columns_of

    with _open_overviews() as overviews:
        span = _span(overviews, since, until)
        found = overviews.usage(span, groups, meter=meter, plan=plan)
        shown = columns_of(groups)
        columns = [*("user_id" if name == "account" else name for name in shown), "events", "amount"]
        _print({"report": "usage", **_days(span), "by": shown}, columns, found, _Form(as_csv, as_json))


@report_app.command("top")
def report_top(
    since: FromOption = None,
    until: ToOption = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="accounts of each meter")] = 10,
    meter: MeterFilter = None,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the accounts that used most of each meter in a span of days."""
    with _open_overviews() as overviews:
        span = _span(overviews, since, until)
        found = overviews.top(span, meter=meter, limit=limit)
        columns = ["meter", "rank", "user_id", "events", "amount"]
        _print({"report": "top", **_days(span)}, columns, found, _Form(as_csv, as_json))


@report_app.command("near-limit")
def report_near_limit(
    percent: Annotated[
        int | None, typer.Option(help="percentage of the limit; default METERFALL_NEAR_LIMIT_PERCENT")
    ] = None,
    meter: MeterFilter = None,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the accounts that have used most of a limit, as a check would find them now."""
    with _open_overviews() as overviews:
        least = overviews.near_limit_percent if percent is None else percent
        found = overviews.near_limit(least, meter=meter)
        columns = [
            "user_id", "meter", "plan", "status", "used", "limit", "percent", "rollover", "purchased", "period_end",
        ]  # fmt: skip
        _print({"report": "near-limit", "percent": least}, columns, found, _Form(as_csv, as_json))


@report_app.command("debtors")
def report_debtors(meter: MeterFilter = None, as_csv: CsvOption = False, as_json: JsonOption = False) -> None:
    """List the accounts that owe units, as a check would find them now."""
    with _open_overviews() as overviews:
        columns = ["user_id", "meter", "plan", "status", "debt", "purchased"]
        _print({"report": "debtors"}, columns, overviews.debtors(meter=meter), _Form(as_csv, as_json))


@report_app.command("purchased")
def report_purchased(
    by: Annotated[str, typer.Option(help="meter, or account")] = "meter",
    meter: MeterFilter = None,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sum up purchased units that are not spent, by meter or by account."""
    if by not in ("meter", "account"):
        raise BadInput(f"--by: unknown {by!r}; there are meter, account")
    about, form = {"report": "purchased", "by": by}, _Form(as_csv, as_json)
    with _open_overviews() as overviews:
        if by == "meter":
            _print(about, ["meter", "accounts", "purchased"], overviews.purchased(meter=meter), form)
        else:
            columns = ["user_id", "meter", "plan", "status", "purchased"]
            _print(about, columns, overviews.purchased_of_accounts(meter=meter), form)


@report_app.command("uncollected")
def report_uncollected(
    since: FromOption = None,
    until: ToOption = None,
    meter: MeterFilter = None,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
) -> None:
    """List events that no account paid, by user and meter; without days, those of all time."""
    with _open_overviews() as overviews:
        span = _span(overviews, since, until) if since or until else None
        columns = ["user_id", "meter", "events", "amount", "first_at", "last_at"]
        days = _days(span) if span else {"since": None, "until": None}
        found = overviews.uncollected(span, meter=meter)
        _print({"report": "uncollected", **days}, columns, found, _Form(as_csv, as_json))


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


@contextmanager
def _open_overviews() -> Iterator[Overviews]:
    from worker.reports.overviews import open_overviews

    with open_resources() as resources, open_overviews(resources) as overviews:
        yield overviews


def _span(overviews: Overviews, since: str | None, until: str | None) -> Span:
    return overviews.span(_parse_day("--from", since), _parse_day("--to", until))


def _parse_day(name: str, text: str | None) -> date | None:
    """Parse a day. Raises BadInput."""
    if text is None:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()  # noqa: DTZ007 - a day has no zone
    except ValueError:
        raise BadInput(f"{name}: {text!r} is no day; write it as 2026-11-01") from None


def _days(span: Span) -> dict[str, str]:
    return {name: day.isoformat() for name, day in span._asdict().items()}


def _print(about: Mapping[str, object], columns: Sequence[str], rows: Iterable[Any], form: _Form) -> None:
    """Print a report row by row as CSV or JSON, else the first rows as a table."""
    if form.as_csv and form.as_json:
        raise BadInput("--csv: not together with --json")
    # A missing right is an error of the first row: it is refused before any output.
    rest = iter(rows)
    rows = chain(list(islice(rest, 1)), rest)
    try:
        if form.as_csv:
            _print_csv(columns, rows)
        else:
            _print_values(about, ({name: getattr(row, name) for name in columns} for row in rows), form)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_csv(columns: Sequence[str], rows: Iterable[Any]) -> None:
    """Print rows as CSV. A report may have a row for each account: no row passes through Python code of its own."""
    written = csv.writer(sys.stdout, lineterminator="\n")
    written.writerow(columns)
    values: Iterable[tuple[object, ...]] = map(attrgetter(*columns), rows)
    if not _TIMES.isdisjoint(columns):
        values = (tuple(map(_text, each)) for each in values)
    written.writerows(values)


def _print_values(about: Mapping[str, object], values: Iterator[Mapping[str, object]], form: _Form) -> None:
    if form.as_json:
        _print_json(about, values)
    else:
        listed = list(islice(values, TABLE_ROWS + 1))
        print_rows(listed[:TABLE_ROWS], as_json=False)
        if len(listed) > TABLE_ROWS:
            typer.echo(f"the first {TABLE_ROWS:,} rows; --csv and --json print all", err=True)


def _print_json(about: Mapping[str, object], rows: Iterable[Mapping[str, object]]) -> None:
    """Print an object with one row a line, so that a report need not fit into memory."""
    sys.stdout.write(json.dumps(about)[:-1] + ', "rows": [')
    separator = "\n"
    for row in rows:
        sys.stdout.write(separator + json.dumps(row, default=_text))
        separator = ",\n"
    sys.stdout.write("\n]}\n" if separator == ",\n" else "]}\n")


def _text(value: object) -> object:
    return value.isoformat() if isinstance(value, date) else value
