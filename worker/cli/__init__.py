"""The commands, `meterfall …`. Each parses, calls one function, and prints a table or JSON.

One file holds one group of commands; the help lists them in the order of `GROUPS`. Shared by all of them are

io        what commands take in and give out: connections, files, tables, JSON
options   the arguments and options that several commands have
errors    how a command ends: one line, and an exit code

Exit codes: 0 done, 1 refused or found wrong, 2 bad usage or bad input, always with one line that says what to change.
"""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli import accounts, errors, events, holds, operate, reports, sponsorship, trials
from worker.ledger.migrations import newest_revision
from worker.version import read_version

GROUPS = (events.app, holds.app, accounts.app, sponsorship.app, reports.app, operate.app, trials.app)

app = typer.Typer(no_args_is_help=True, help="Usage events in, balances out.")
for group in GROUPS:
    app.add_typer(group)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"meterfall {read_version()}, tables at revision {newest_revision()}")
        raise typer.Exit


@app.callback()
def _take_options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show version and tables, and exit."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Entry point of `meterfall`: run a command, turn every expected error into one line and its exit code."""
    errors.run(app)
