"""Turns of the calls of a process to load balances: one at a time loads that of a user, and so many at once in all.

Whoever comes meanwhile waits for that one, for a bounded time. Without turns a cold cache is loaded once for each call
that waits, and all of these loads wait for each other.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from threading import Event, Lock, Semaphore
from typing import Any, NamedTuple

from worker.errors import LedgerUnavailable


class Turn(NamedTuple):
    """The right to load. Whoever has it must `end` it; ending it twice does no harm.

    With an error, those who wait for it fail as well: they would ask the same server for the same.
    """

    end: Callable[[LedgerUnavailable | None], None]


def _late(seconds: float) -> LedgerUnavailable:
    return LedgerUnavailable(f"a balance was not loaded within {seconds:g} s: too many are to be loaded at once")


class _Other:
    """Somebody's turn, as those see it who wait for its end."""

    def __init__(self) -> None:
        self.ended = Event()
        self.error: LedgerUnavailable | None = None


class ThreadTurns:
    """The turns of threads."""

    def __init__(self, at_once: int, wait_seconds: float) -> None:
        """So many at once; a thread waits at most `wait_seconds` for its turn, or for the end of somebody else's."""
        self._wait_seconds = wait_seconds
        self._free = Semaphore(at_once)
        self._lock = Lock()
        self._turns: dict[str, _Other] = {}

    def take(self, user_id: str) -> Turn | None:
        """Return the turn; None after another thread had it and is done.

        Raises LedgerUnavailable: it came to nothing there, or this thread has waited long enough.
        """
        deadline = time.monotonic() + self._wait_seconds
        with self._lock:
            other = self._turns.get(user_id)
            if other is None:
                mine = self._turns[user_id] = _Other()
        if other is not None:
            if not other.ended.wait(self._wait_seconds):
                raise _late(self._wait_seconds)
            if other.error is not None:
                raise LedgerUnavailable(*other.error.args)
            return None
        is_mine = False
        try:
            is_mine = self._free.acquire(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            if not is_mine:  # also if a signal ends the wait
                self._forget(user_id, mine, None)
        if not is_mine:
            raise _late(self._wait_seconds)

        def end(error: LedgerUnavailable | None) -> None:
            if not mine.ended.is_set():
                self._free.release()
                self._forget(user_id, mine, error)

        return Turn(end)

    def _forget(self, user_id: str, mine: _Other, error: LedgerUnavailable | None) -> None:
        with self._lock:
            del self._turns[user_id]
        mine.error = error
        mine.ended.set()


class LoopTurns:
    """The turns of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, at_once: int, wait_seconds: float) -> None:
        """So many at once; a call waits at most `wait_seconds` for its turn, or for the end of somebody else's."""
        self._loop = loop
        self._free = at_once
        self._wait_seconds = wait_seconds
        self._queue: deque[_Waiting] = deque()
        self._followers: dict[str, list[_Waiting]] = {}

    def take(self, user_id: str, deliver: Callable[[Any], None]) -> None:
        """Deliver the turn; None after another call had it and is done; or LedgerUnavailable."""
        waiting = _Waiting(user_id, deliver)
        waiting.timer = self._loop.call_later(self._wait_seconds, self._give_up, waiting)
        if user_id in self._followers:
            self._followers[user_id].append(waiting)
        else:
            self._followers[user_id] = []
            self._queue.append(waiting)
            self._go_on()

    def _go_on(self) -> None:
        while self._free and self._queue:
            waiting = self._queue.popleft()
            if waiting.take():
                self._free -= 1
                self._loop.call_soon(waiting.deliver, Turn(partial(self._end, waiting)))

    def _end(self, waiting: _Waiting, error: LedgerUnavailable | None) -> None:
        if waiting.ended:
            return
        waiting.ended = True
        self._free += 1
        self._release_followers(waiting.user_id, error)
        self._go_on()

    def _give_up(self, waiting: _Waiting) -> None:
        if waiting.take():
            if waiting in self._queue:  # it was to load for others, which have waited as long or a little shorter
                self._queue.remove(waiting)
                self._release_followers(waiting.user_id, None)
            waiting.deliver(_late(self._wait_seconds))

    def _release_followers(self, user_id: str, error: LedgerUnavailable | None) -> None:
        for follower in self._followers.pop(user_id):
            if follower.take():
                self._loop.call_soon(follower.deliver, error and LedgerUnavailable(*error.args))


class _Waiting:
    """A call that waits."""

    def __init__(self, user_id: str, deliver: Callable[[Any], None]) -> None:
        self.user_id = user_id
        self.deliver = deliver
        self.timer: asyncio.TimerHandle | None = None
        self.ended = False
        self._taken = False

    def take(self) -> bool:
        """Return True to the first who asks: what comes later must not be delivered."""
        first, self._taken = not self._taken, True
        if self.timer is not None:
            self.timer.cancel()
        return first
