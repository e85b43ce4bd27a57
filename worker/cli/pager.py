"""The pager for output longer than the screen, as git has it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import typer

_VARIABLE = "METERFALL_PAGER"
# Quit if it fits one screen, keep colours, leave the text on the screen.
_LESS = "FRX"
_NOT_FOUND = (126, 127)


def page(text: str) -> None:
    """Print text, through a pager if stdout is a terminal that it does not fit. Without a pager, print it."""
    pager = _pager()
    is_long = sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines
    if not (is_long and pager and _shown_by(pager, text)):
        typer.echo(text, nl=False)


def use_no_pager() -> None:
    """Print everything at once, whatever the environment says."""
    os.environ[_VARIABLE] = "cat"


def _pager() -> str:
    """Return the pager to start; empty for none."""
    named = os.environ.get(_VARIABLE) or os.environ.get("PAGER") or "less"
    return "" if named == "cat" else named


def _shown_by(pager: str, text: str) -> bool:
    """Have the pager show the text; return False if there is no such program."""
    sys.stdout.flush()
    environment = {"LESS": _LESS, **os.environ}
    # Ctrl-C is the pager's: it ends a search there, and not the command.
    former = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        # By the shell, as PAGER may have options.
        done = subprocess.run(pager, shell=True, input=text.encode(), env=environment, check=False)  # noqa: S602
    finally:
        signal.signal(signal.SIGINT, former)
    return done.returncode not in _NOT_FOUND
