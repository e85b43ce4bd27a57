"""A child process that does not outlive its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

LINUX_PR_SET_PDEATHSIG = 1


def on_launcher_death(signal_number: signal.Signals) -> Callable[[], None] | None:
    """What a new process runs before its program, so that it gets the signal when this thread or process dies.

    Popen calls it after the change of user, which would clear the wish. None where the system has no such thing.
    """
    if sys.platform != "linux":
        return None
    # Looked up here: a forked child should do as little as it can.
    prctl, launcher = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(LINUX_PR_SET_PDEATHSIG, int(signal_number))
        if os.getppid() != launcher:  # died before it was asked for
            os._exit(1)

    return in_child
