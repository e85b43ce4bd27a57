"""Calls made by many threads at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

T = TypeVar("T")
START_SECONDS = 30


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make all calls at the same time, each in a thread of its own; returns their results."""
    barrier = Barrier(len(calls), timeout=START_SECONDS)

    def wait_and_call(call: Callable[[], T]) -> T:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(wait_and_call, calls))
