"""Labelled points at which a test may kill or freeze this process.

Tests name one in the environment, once for the life of the process; otherwise this module does nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

VARIABLE = "CRASH_POINT_FOR_TESTS"
FREEZE = "freeze:"
_ARMED = os.environ.get(VARIABLE)


def crash_point(label: str) -> None:
    """Kill or freeze this process at `label` if the test environment says so.

    `<label>` kills it with SIGKILL; `freeze:<label>` freezes it with SIGSTOP, once.
    """
    global _ARMED
    if _ARMED is None:
        return
    if label == _ARMED:
        os.kill(os.getpid(), signal.SIGKILL)
    elif FREEZE + label == _ARMED:
        _ARMED = None
        os.kill(os.getpid(), signal.SIGSTOP)


def poison_point(event_ids: Iterable[str]) -> None:
    """Kill this process if the test environment names one of these events (`poison:<event id>`)."""
    if _ARMED is not None and _ARMED.startswith("poison:") and _ARMED.removeprefix("poison:") in event_ids:
        os.kill(os.getpid(), signal.SIGKILL)
