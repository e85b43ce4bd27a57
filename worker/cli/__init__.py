"""The commands, `meterfall …`. Each parses, calls one function, and prints a table or JSON.

Each file of a group has a Typer of its own, and `GROUPS` lists them in the order of the help:

events        emit, check, charge, remaining, plan-backend
holds         reserve, capture, settle, release, holds …
accounts      plans, catalogue …, account …, reverse
sponsorship   estimate, pool …
reports       usage, explain
overviews     report …
notices       notices …, webhooks …
api_keys      api-keys …
operate       migrate, serve, worker …, status, health, verify, dead …, partition …, spool …, cache …, pending …,
              repartition
trials        demo, replay, bench

The groups share

options       the arguments and options of several commands
io            connections, values read from text, and what a command prints
confirm       the question before a command that moves or destroys much
tables        tables that fit a terminal
pager         the pager for lists longer than the screen
errors        the end of a command: one line, and an exit code

Exit codes: 0 done, 1 the answer is no, 2 the command cannot be done as given; README.md has the rule. Always with one
line that says what to change.
A command imports its own modules when it runs, so version, help, completions and usage errors answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.accounts import app as accounts_app
from worker.cli.api_keys import app as api_keys_app
from worker.cli.errors import run
from worker.cli.events import app as events_app
from worker.cli.holds import app as holds_app
from worker.cli.notices import app as notices_app
from worker.cli.operate import app as operate_app
from worker.cli.overviews import app as overviews_app
from worker.cli.pager import use_no_pager
from worker.cli.reports import app as reports_app
from worker.cli.sponsorship import app as sponsorship_app
from worker.cli.trials import app as trials_app
from worker.ledger.migrations import newest_revision
from worker.version import read_version

# Groups by their title in the help.
GROUPS = {
    "Events and pre-flight": events_app,
    "Holds": holds_app,
    "Plans and accounts": accounts_app,
    "Sponsorship pool": sponsorship_app,
    "Reports": reports_app,
    "Reports on all accounts": overviews_app,
    "Notices": notices_app,
    "HTTP service": api_keys_app,
    "Operation": operate_app,
    "Trials": trials_app,
}


def _assemble() -> typer.Typer:
    """Assemble the groups, each under its title."""
    whole = typer.Typer(no_args_is_help=True, help="Usage events in, balances out.")
    for title, group in GROUPS.items():
        for command in group.registered_commands:
            command.rich_help_panel = title
        for subgroup in group.registered_groups:
            subgroup.rich_help_panel = title
        whole.add_typer(group)
    return whole


app = _assemble()


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
    no_pager: Annotated[
        bool, typer.Option("--no-pager", help="print long lists at once; else METERFALL_PAGER or PAGER shows them")
    ] = False,
) -> None:
    """Take the options that stand before a command."""
    if no_pager:
        use_no_pager()


def main() -> None:
    """Run the command that the arguments of this process name."""
    run(app)
