"""Turns to load a balance: one load of a user at a time in a process, and no more than Postgres has connections for.

Without them a cold cache is loaded once for each call that waits, and all of these loads wait for each other.
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
    """The right to load; whoever has it must `end` it. Ending it twice does no harm."""

    end: Callable[[], None]


def _late(seconds: float) -> LedgerUnavailable:
    return LedgerUnavailable(f"a balance was not loaded within {seconds:g} s: too many are to be loaded at once")


class ThreadTurns:
    """The turns of threads."""

    def __init__(self, at_once: int, wait_seconds: float) -> None:
        """So many loads at once; a thread waits at most `wait_seconds` for its turn, or for somebody else's load."""
        self._wait_seconds = wait_seconds
        self._free = Semaphore(at_once)
        self._lock = Lock()
        self._loads: dict[str, Event] = {}

    def take(self, user_id: str) -> Turn | None:
        """Return the turn to load this user; None after another thread has loaded it. Raises LedgerUnavailable."""
        deadline = time.monotonic() + self._wait_seconds
        with self._lock:
            other = self._loads.get(user_id)
            if other is None:
                ended = self._loads[user_id] = Event()
        if other is not None:
            if not other.wait(self._wait_seconds):
                raise _late(self._wait_seconds)
            return None
        if not self._free.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._forget(user_id, ended)
            raise _late(self._wait_seconds)

        def end() -> None:
            if not ended.is_set():
                self._free.release()
                self._forget(user_id, ended)

        return Turn(end)

    def _forget(self, user_id: str, ended: Event) -> None:
        with self._lock:
            del self._loads[user_id]
        ended.set()


class LoopTurns:
    """The turns of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, at_once: int, wait_seconds: float) -> None:
        """So many loads at once; a call waits at most `wait_seconds` for its turn, or for somebody else's load."""
        self._loop = loop
        self._free = at_once
        self._wait_seconds = wait_seconds
        self._queue: deque[_Waiting] = deque()
        self._followers: dict[str, list[_Waiting]] = {}

    def take(self, user_id: str, deliver: Callable[[Any], None]) -> None:
        """Deliver the turn to load this user; None after another call has loaded it; or LedgerUnavailable."""
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

    def _end(self, waiting: _Waiting) -> None:
        if waiting.ended:
            return
        waiting.ended = True
        self._free += 1
        self._release_followers(waiting.user_id)
        self._go_on()

    def _give_up(self, waiting: _Waiting) -> None:
        if waiting.take():
            waiting.deliver(_late(self._wait_seconds))
            if waiting in self._queue:  # it was to load for others, which have waited as long or a little shorter
                self._queue.remove(waiting)
                self._release_followers(waiting.user_id)

    def _release_followers(self, user_id: str) -> None:
        for follower in self._followers.pop(user_id):
            if follower.take():
                self._loop.call_soon(follower.deliver, None)


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
