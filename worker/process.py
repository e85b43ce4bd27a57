"""A child process that does not outlive its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

LINUX_PR_SET_PDEATHSIG = 1


def on_launcher_death(signal_number: signal.Signals) -> Callable[[], None] | None:
    """Return the first code of a new process, so that it gets the signal when this thread or process dies.

    Popen calls it after the change of user, which would clear the setting. None if the system lacks it.
    """
    if sys.platform != "linux":
        return None
    # Looked up before the fork: a forked child should do as little as possible.
    prctl, launcher = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(LINUX_PR_SET_PDEATHSIG, int(signal_number))
        if os.getppid() != launcher:  # died before the request
            os._exit(1)

    return in_child


def end_with_parent(signal_number: signal.Signals, parent: int) -> None:
    """Have this process get the signal once its `parent` dies, for a child that another library has started.

    Ends it at once if the parent is dead already. Does nothing if the system lacks it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(LINUX_PR_SET_PDEATHSIG, int(signal_number))
        if os.getppid() != parent:
            os._exit(1)
