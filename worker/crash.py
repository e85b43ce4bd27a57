"""Labelled points at which a test may kill this process. Unless the environment names one, they do nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

VARIABLE = "CRASH_POINT_FOR_TESTS"
_ARMED = os.environ.get(VARIABLE)


def armed(label: str) -> bool:
    """True when the test environment names `label`."""
    return label == _ARMED


def crash_point(label: str) -> None:
    """Kill this process with SIGKILL if the test environment names `label`."""
    if armed(label):
        os.kill(os.getpid(), signal.SIGKILL)


def poison_point(event_ids: Iterable[str]) -> None:
    """Kill this process if the test environment names one of these events (`poison:<event id>`)."""
    if _ARMED is not None and _ARMED.startswith("poison:") and _ARMED.removeprefix("poison:") in event_ids:
        os.kill(os.getpid(), signal.SIGKILL)
