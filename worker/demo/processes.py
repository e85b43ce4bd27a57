"""Child processes that do not outlive us, and trees of processes: frozen, thawed, killed as one."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


def freeze_tree(pid: int) -> set[int]:
    """Send SIGSTOP to a process and all its children; return their ids."""
    frozen = {pid}
    _signal(pid, signal.SIGSTOP)
    # Read again after each round: a fork that had begun may still have added a child.
    while fresh := children(pid) - frozen:
        for child in fresh:
            _signal(child, signal.SIGSTOP)
        frozen |= fresh
    return frozen


def thaw_tree(pid: int) -> None:
    """Let a frozen process and its children go on; others do not notice."""
    for one in (*children(pid), pid):
        _signal(one, signal.SIGCONT)


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and all its children, as a power cut would."""
    # Frozen first: nothing forks, cleans up or answers while the list is worked through.
    for one in freeze_tree(pid):
        _signal(one, signal.SIGKILL)


def children(pid: int) -> set[int]:
    """Return the child processes of `pid`."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    if listed.exists():
        return {int(child) for child in listed.read_text().split()}
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return {int(child) for child in done.stdout.split()}


def _signal(pid: int, signal_number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal_number)
