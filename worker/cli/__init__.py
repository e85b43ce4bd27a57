"""The commands, `meterfall …`. Each parses, calls one function, and prints a table or JSON.

One file holds one group of commands; the help lists them in the order of `GROUPS`. Shared by all of them are

io        what commands take in and give out: connections, files, tables, JSON
options   the arguments and options that several commands have
errors    how a command ends: one line, and an exit code

Exit codes: 0 done, 1 refused or found wrong, 2 bad usage or bad input, always with one line that says what to change.
"""

from __future__ import annotations

import typer

from worker.cli import accounts, errors, events, holds, operate, reports, sponsorship, trials

GROUPS = (events.app, holds.app, accounts.app, sponsorship.app, reports.app, operate.app, trials.app)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Usage events in, balances out.")
for group in GROUPS:
    app.add_typer(group)


def main() -> None:
    """Entry point of `meterfall`: run a command, turn every expected error into one line and its exit code."""
    errors.run(app)
