"""Labelled points at which a test may kill or freeze this process, and rules that a test may switch off.

Tests name them in the environment, once for the life of the process; unless they do, nothing here does anything.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

VARIABLE = "CRASH_POINT_FOR_TESTS"
SWITCH = "SWITCHED_OFF_FOR_TESTS"
FREEZE = "freeze:"
DUPLICATE_CHECK = "duplicate_check"
_ARMED = os.environ.get(VARIABLE)
_SWITCHED_OFF = os.environ.get(SWITCH)


def armed(label: str) -> bool:
    """True when the test environment names `label`."""
    return label == _ARMED


def crash_point(label: str) -> None:
    """Kill this process with SIGKILL if the test environment names `label`; freeze it with SIGSTOP, once, if that names
    `freeze:<label>`.
    """
    global _ARMED
    if _ARMED is None:
        return
    if armed(label):
        os.kill(os.getpid(), signal.SIGKILL)
    elif armed(FREEZE + label):
        _ARMED = None
        os.kill(os.getpid(), signal.SIGSTOP)


def poison_point(event_ids: Iterable[str]) -> None:
    """Kill this process if the test environment names one of these events (`poison:<event id>`)."""
    if _ARMED is not None and _ARMED.startswith("poison:") and _ARMED.removeprefix("poison:") in event_ids:
        os.kill(os.getpid(), signal.SIGKILL)


def switched_off(rule: str) -> bool:
    """True when the test environment switches `rule` off, to see whether the tests notice."""
    return rule == _SWITCHED_OFF
