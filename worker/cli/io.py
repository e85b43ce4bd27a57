"""Input and output of the commands: connections, values read from text, tables and JSON."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import typer

from worker.errors import BadInput
from worker.rules.formats import grouped, moment

if TYPE_CHECKING:
    from config.settings import Settings
    from worker.client import Billing
    from worker.resources import Resources

DONE, REFUSED, BAD_INPUT = 0, 1, 2
# Of commands that tell whether a server answers.
_SHORT_WAITS = {
    "redis_socket_timeout_ms": 2_000,
    "redis_retries": 0,
    "database_connect_timeout_seconds": 2,
    "statement_timeout_ms": 3_000,
}


# ---------------------------------------------------------------------------------------------------------------------
# Settings and connections


def read_settings() -> Settings:
    """Read the settings of the environment, and set up logging by them. Raises SettingsError."""
    from config.log import configure_logging
    from config.settings import load_settings

    settings = load_settings(os.environ)
    configure_logging(settings.log_level, settings.log_format)
    return settings


@contextmanager
def open_resources(*, claim: bool = True, compares_catalogues: bool = True) -> Iterator[Resources]:
    """Open the connections of workers and operators, and close them at the end.

    With `compares_catalogues`, it warns of a file that is not in force.

    Raises SettingsError or CatalogueError. Raises LedgerError if a server is unset or, unless `claim` is false, has
    another number of partitions.
    """
    from worker.resources import Resources

    resources = Resources.open(read_settings())
    try:
        if claim:
            resources.claim(compares=compares_catalogues)
        yield resources
    finally:
        resources.close()


@contextmanager
def open_for_monitoring() -> Iterator[Resources]:
    """Open the connections of `status` and `health`, with short waits: either server may be away.

    Raises SettingsError or CatalogueError. Raises LedgerError if DATABASE_URL is unset, or a server that answers has
    another number of partitions.
    """
    import psycopg
    import redis
    from sqlalchemy.exc import SQLAlchemyError

    from worker.resources import Resources

    resources = Resources.open(read_settings().model_copy(update=_SHORT_WAITS))
    try:
        with suppress(redis.RedisError, psycopg.Error, SQLAlchemyError):  # the status names a server that is away
            resources.claim()
        yield resources
    finally:
        resources.close()


@contextmanager
def open_billing() -> Iterator[Billing]:
    """Open a client like that of services, and close it at the end. Raises SettingsError or CatalogueError."""
    from worker.client import Billing

    with Billing.connect(read_settings()) as billing:
        yield billing


# ---------------------------------------------------------------------------------------------------------------------
# In


def login(by: str | None) -> str:
    """The value of `--by`, by default the login name. Raises BadInput where the machine knows none."""
    if by is not None:
        return by
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        raise BadInput("--by: missing, and this login has no name") from None


def read_text(file: str) -> str:
    """Read a UTF-8 file, or standard input for `-`. Raises BadInput."""
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"file: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"file: {file}: must be UTF-8") from None


def read_lines(file: str) -> list[str]:
    """Read the lines of a UTF-8 file, or of standard input for `-`, stripped and not empty. Raises BadInput."""
    return [line.strip() for line in read_text(file).split("\n") if line.strip()]


def amount_or_quantity(units: int, model: str | None, multiplier: str | None) -> tuple[int | None, int | None]:
    """Tell what a command's number is: an amount, or where a model or a multiplier is named a quantity."""
    return (units, None) if model is None and multiplier is None else (None, units)


def parse_dimensions(pairs: Sequence[str] | None) -> dict[str, Any] | None:
    """Return the values of `--dimension name=value`, None without any. Raises BadInput."""
    if not pairs:
        return None
    bad = [pair for pair in pairs if "=" not in pair]
    if bad:
        raise BadInput(f"--dimension: {bad[0]!r} must be name=value")
    return dict(pair.split("=", 1) for pair in pairs)


def parse_units(name: str, pairs: Sequence[str] | None) -> dict[str, int]:
    """Return the values of the option `--<name> meter=units`: units by meter. Raises BadInput."""
    try:
        return {meter: int(units) for meter, units in (pair.split("=", 1) for pair in pairs or [])}
    except ValueError:
        raise BadInput(f"--{name}: each must be meter=units") from None


def parse_time(name: str, text: str) -> datetime:
    """Parse the time of the argument `name`. Raises BadInput."""
    from worker.admin import accounts

    try:
        return accounts.parse_time(text)
    except ValueError as error:
        raise BadInput(f"{name}: {text!r} is no ISO 8601 time with an offset: {error}") from None


def parse_optional_time(name: str, text: str | None) -> datetime | None:
    """Parse the time of the argument `name`; None if it is missing. Raises BadInput."""
    return None if text is None else parse_time(name, text)


def parse_moment(at: str) -> Literal["now", "period_end"] | datetime:
    """Parse the option --at: now, period_end or a time. Raises BadInput."""
    if at in ("now", "period_end"):
        return cast("Literal['now', 'period_end']", at)
    return parse_time("--at: must be now, period_end or a time", at)


# ---------------------------------------------------------------------------------------------------------------------
# Out


@contextmanager
def open_output(file: str) -> Iterator[IO[str]]:
    """Open a file for UTF-8 text, or standard output for `-`. The file appears whole or not at all.

    Raises BadInput if the file cannot be written.
    """
    if file == "-":
        yield sys.stdout
        return
    target = Path(file)
    # Write to a pipe or a device directly: no file may replace it.
    part = target if target.exists() and not target.is_file() else target.with_name(f"{target.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
        if part != target:
            part.replace(target)
    except OSError as error:
        raise BadInput(f"file: {file}: {error.strerror}") from None
    finally:
        if part != target:
            part.unlink(missing_ok=True)


def print_answer(sentence: str, fields: Mapping[str, Any], as_json: bool) -> None:
    """Print what a command has done: a sentence, or its fields as JSON."""
    if as_json:
        print_json(fields)
    else:
        typer.echo(sentence)


def print_fields(fields: Mapping[str, Any], as_json: bool) -> None:
    """Print one record as a two-column table, or as JSON."""
    if as_json:
        print_json(fields)
        return
    print_rows([{"field": name, "value": _cell(value)} for name, value in fields.items()], as_json=False)


def print_rows(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print rows as a table, or as a JSON list. The table shows UTC to the second, JSON the exact times."""
    if as_json:
        print_json(rows)
        return
    if not rows:
        typer.echo("none")
        return
    from worker.cli.tables import print_table

    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    numbers = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    print_table(cells, numbers)


def print_json(value: Any) -> None:
    """Print indented JSON; times as ISO 8601, other types that JSON lacks as text."""
    typer.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return "" if value is None else str(value)


def _cell(value: Any) -> str:
    """Return a value for a table. Control characters become escapes, as events may contain any character."""
    if isinstance(value, datetime):
        return moment(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return grouped(value)
    text = _plain(value)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


@contextmanager
def show_progress(label: str) -> Iterator[Any]:
    """Show a counter for long work; silent if stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description} {task.completed}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done: progress.update(task, completed=done)
