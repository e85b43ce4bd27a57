"""Run a module without the product's duplicate check, to see whether tests notice.

    python -m tests.faults.mutated <module> [arguments]

This replaces one function of each kind of books, and becomes the module. A Python module that it starts as a process
comes through here as well: the tests start dynos, and a dyno starts its worker process. The product has no switch.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from worker.consumer import sponsorship
from worker.rules import batch
from worker.rules.batch import Outcome
from worker.rules.received import Event
from worker.rules.rows import Loaded
from worker.rules.sponsorship import Known, Locked

MODULE = "tests.faults.mutated"
PYTHON = (sys.executable, "-m")
COMMAND = (*PYTHON, MODULE)
_start = subprocess.Popen.__init__


def all_events(events: list[Event], _loaded: Loaded, _outcome: Outcome) -> list[Event]:
    """Take each event for a new one, in place of `_drop_known` of worker/rules/batch.py."""
    return events


def nothing_known(_locked: Locked) -> Known:
    """Take each request for a new one, in place of `_known_before` of worker/consumer/sponsorship.py."""
    return Known(granted={}, credited={})


def start_mutated(process: subprocess.Popen[Any], args: Sequence[str], *rest: Any, **options: Any) -> None:
    """Start a process; one that runs a Python module is mutated as well."""
    if tuple(args[:2]) == PYTHON:
        args = [*COMMAND, *args[2:]]
    _start(process, args, *rest, **options)


def main() -> None:
    """Replace the functions, and become the module that the command line names."""
    patch.object(batch, "_drop_known", all_events).start()
    patch.object(sponsorship, "_known_before", nothing_known).start()
    patch.object(subprocess.Popen, "__init__", start_mutated).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
