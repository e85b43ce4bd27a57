"""Calls that a signal interrupts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TimeLimit(Exception):
    """What a job queue raises when a job has had its time."""


@contextmanager
def raised_by_alarms(kind: type[BaseException]) -> Iterator[None]:
    """Let alarms raise `kind` in the block."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise kind

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


@contextmanager
def an_alarm(seconds: float) -> Iterator[None]:
    """Interrupt the block after some time; it may end before."""
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def interrupted_call(
    call: Callable[[str], Any], key: str, after: float, interruption: type[BaseException]
) -> list[Any]:
    """What a call gave its caller, if anything, that was interrupted after some time or ended before.

    It calls from Python to Python: an interruption just after a function in C drops what that returned.
    """
    answer = None
    try:
        with an_alarm(after):
            answer = call(key)
    except interruption:
        pass
    return [] if answer is None else [answer]
