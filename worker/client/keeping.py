"""Holds that live on while a `with` block runs: renewed at each third of their life.

The schedule is one rule for both clients. One thread of the process renews all holds of blocking clients; for asyncio
there is a task for each hold. Both end with the block, and neither outlives the process: then the hold expires.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from threading import Condition, RLock, Thread
from time import monotonic

from schemas.answers import HoldState
from worker.client.effects import logger
from worker.errors import ClientClosed, HoldClosed, RedisUnavailable

# A renewal that failed is tried again after a twelfth of the life, but no later than this.
_LONGEST_RETRY_SECONDS = 5.0


@dataclass
class Kept:
    """A hold to keep: its key, for the log, and the life that each renewal gives it."""

    key: str
    ttl_seconds: int


def first_delay(kept: Kept) -> float:
    """Seconds until the first renewal."""
    return kept.ttl_seconds / 3


def next_delay(kept: Kept, error: Exception | None) -> float | None:
    """Seconds until the next renewal, after one that succeeded or failed. None: the hold is over, and stays over."""
    if error is None:
        return kept.ttl_seconds / 3
    if isinstance(error, HoldClosed):
        # Settled and released is what holds end by; expired means that the block works on without one.
        if error.state not in (HoldState.SETTLED, HoldState.RELEASED):
            logger.warning("hold %s is not renewed any more: it is %s", kept.key, error.state.value)
        return None
    if isinstance(error, ReferenceError):
        return None  # the end of its block was interrupted, and nobody has the hold any more
    if isinstance(error, ClientClosed):
        logger.warning("hold %s is not renewed any more: its client was closed", kept.key)
        return None
    logger.warning("hold %s was not renewed, and is tried again: %s", kept.key, error)
    return _retry_seconds(kept)


def _retry_seconds(kept: Kept) -> float:
    return min(kept.ttl_seconds / 12, _LONGEST_RETRY_SECONDS)


# ---------------------------------------------------------------------------------------------------------------------
# Blocking


class _Renewal:
    """One hold that the thread keeps; `client` tells whose connection it needs."""

    def __init__(self, client: object, kept: Kept, renew: Callable[[], object]) -> None:
        self.client = client
        self.kept = kept
        self.renew = renew
        self.stopped = False


class Keeper:
    """Renews all holds that blocks of this process keep, in one daemon thread, which ends when there are none."""

    def __init__(self) -> None:
        # Taken as a lock, which no signal interrupts half-way: a Condition is written in Python.
        self._lock = RLock()
        self._changed = Condition(self._lock)
        self._due: list[tuple[float, int, _Renewal]] = []
        self._numbers = itertools.count()
        self._thread: Thread | None = None
        self._process = os.getpid()

    def keep(self, client: object, kept: Kept, renew: Callable[[], object]) -> Callable[[], None]:
        """Call `renew` at each third of the life of the hold; returns what ends that."""
        renewal = _Renewal(client, kept, renew)
        with self._lock:
            self._schedule(renewal, first_delay(kept))
            if self._thread is None or not self._thread.is_alive():  # its start may have been interrupted
                self._thread = Thread(target=self._run, name="meterfall-holds", daemon=True)
                self._thread.start()
            self._changed.notify()

        def stop() -> None:
            if os.getpid() != self._process:
                return  # a child that was forked inside the block: the thread, and perhaps the lock, stayed behind
            with self._lock:
                renewal.stopped = True
                self._due = [entry for entry in self._due if entry[2] is not renewal]
                heapq.heapify(self._due)
                self._changed.notify()

        return stop

    def _schedule(self, renewal: _Renewal, delay: float) -> None:
        heapq.heappush(self._due, (monotonic() + delay, next(self._numbers), renewal))

    def _run(self) -> None:
        while (renewal := self._next()) is not None:
            error: Exception | None = None
            try:
                renewal.renew()
            except Exception as failed:  # noqa: BLE001 - one hold must not end the thread that keeps the others
                error = failed
            delay = next_delay(renewal.kept, error)
            with self._lock:
                if not renewal.stopped and delay is not None:
                    self._schedule(renewal, delay)
                if isinstance(error, RedisUnavailable):
                    self._postpone(renewal.client)

    def _next(self) -> _Renewal | None:
        """Wait until a renewal is due. None when there is nothing left to keep: the thread ends."""
        with self._lock:
            while self._due:
                wait = self._due[0][0] - monotonic()
                if wait <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(wait)
            self._thread = None
            return None

    def _postpone(self, client: object) -> None:
        """Let the other holds of a client wait as well: its server is away, and each would keep all others waiting."""
        now = monotonic()
        self._due = [
            (max(due, now + _retry_seconds(renewal.kept)) if renewal.client is client else due, number, renewal)
            for due, number, renewal in self._due
        ]
        heapq.heapify(self._due)


_keeper = Keeper()


def keep(client: object, kept: Kept, renew: Callable[[], object]) -> Callable[[], None]:
    """Keep a hold of a blocking client; returns what ends that."""
    return _keeper.keep(client, kept, renew)


def _forget_after_fork() -> None:
    """A child process keeps no hold of its parent's: the thread stayed there."""
    global _keeper
    _keeper = Keeper()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_after_fork)


# ---------------------------------------------------------------------------------------------------------------------
# asyncio


class AsyncKeeping:
    """Keeps one hold in a task of the running loop, from here until `stop`."""

    def __init__(self, kept: Kept, renew: Callable[[], Awaitable[object]]) -> None:
        self._kept = kept
        self._renew = renew
        self._task = asyncio.create_task(self._run(), name=f"meterfall-hold-{kept.key}")

    def stop(self) -> None:
        """End it, without waiting: whoever is cancelled again and again must still come to give the hold back.

        A renewal under way may end after this. Where the hold is over by then, it changes nothing.
        """
        self._task.cancel()

    async def _run(self) -> None:
        delay: float | None = first_delay(self._kept)
        while delay is not None:
            await asyncio.sleep(delay)
            error: Exception | None = None
            try:
                await self._renew()
            except Exception as failed:  # noqa: BLE001 - tried again, whatever it was
                error = failed
            delay = next_delay(self._kept, error)
