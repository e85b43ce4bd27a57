"""Turns of the calls of a process to load balances: one call loads those of many users, and the others wait for it.

A call that misses a balance begins a round. While rounds are under way, the next one gathers: one of its calls then
loads all its balances together. A cold cache is so loaded once for each user, at a fraction of the cost of single
loads. Each call waits for a bounded time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from itertools import islice
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Protocol

from worker.errors import LedgerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.client.effects import LoadTurn, T

# Users of one round: enough to share its round trips, few enough that each server answers within milliseconds.
_ROUND_USERS = 128
# Rounds that go on while the next one gathers. More of them would be smaller, and cost more for each user.
_USUAL_ROUNDS = 2
# After this wait one more round begins, as long as there are connections to Postgres: rounds are slow at the moment.
_GATHER_SECONDS = 0.05


class Turn:
    """The right of one call to load the balances of `users`, its own first. The call must `end` it.

    `waited_ms`: how long the users have waited already for the loads of other processes.
    """

    def __init__(self, turns: _Turns, users: tuple[str, ...], waited_ms: int = 0, *, is_round: bool) -> None:
        self.users = users
        self.waited_ms = waited_ms
        self._turns = turns
        self._is_round = is_round

    def done(self, users: Collection[str], error: LedgerUnavailable | None = None) -> None:
        """Let the calls go on that wait for `users`; with an error they fail."""
        self._turns.change(lambda: self._turns.release(self._without(users), error))

    def hand_over(self, users: Collection[str], waited_ms: int = 0) -> None:
        """Give a turn for `users` to one of the calls that wait for them. No number of rounds bounds such turns.

        It is for users that would hold up the others of this turn.
        """
        self._turns.change(lambda: self._turns.pass_on(self._without(users), waited_ms))

    def keep_only(self, users: Collection[str]) -> None:
        """The other users are done; what is left takes its time, so another round may begin."""
        others = [user_id for user_id in self.users if user_id not in users]
        self._turns.change(lambda: self._end(others, None))

    def end(self, error: LedgerUnavailable | None = None) -> None:
        """Let all calls go on that still wait for this turn; repeating this does no harm.

        With an error they fail: they would ask the same server for the same.
        """
        self._turns.change(lambda: self._end(self.users, error))

    def _end(self, users: Collection[str], error: LedgerUnavailable | None) -> None:
        self._turns.release(self._without(users), error)
        self._end_round()

    def _without(self, users: Collection[str]) -> list[str]:
        """Take users out of the turn; return those that were in it."""
        taken = [user_id for user_id in self.users if user_id in users]
        self.users = tuple(user_id for user_id in self.users if user_id not in users)
        return taken

    def _end_round(self) -> None:
        if self._is_round:
            self._is_round = False
            self._turns.end_round()


class _Call(Protocol):
    """A call that waits for its turn, or for the end of another call's."""

    step: LoadTurn

    def go_on(self, error: LedgerUnavailable | None) -> None:
        """Tell the call once that its wait is over; with an error it fails. Does not wait."""
        ...


class _Turns:
    """Who waits for which user. Whoever uses it has its `lock`."""

    def __init__(self, at_once: int) -> None:
        self.lock = Lock()
        self._at_once = at_once
        self._rounds = 0
        # Calls that wait, by user, in their order; users in `_queue` are in no turn yet.
        self._waiting: dict[str, dict[_Call, None]] = {}
        self._queue: dict[str, LoadTurn] = {}

    def change(self, change: Callable[[], T]) -> T:
        """Carry out a change with the lock. If a signal interrupts it half-way, all calls go on: they try again."""
        with self.lock:
            try:
                return change()
            except BaseException:
                self.begin_anew()
                raise

    def begin_anew(self) -> None:
        """Let all calls go on. Turns under way end, and change nothing by it."""
        waiting, self._waiting, self._queue, self._rounds = self._waiting, {}, {}, 0
        for calls in waiting.values():
            for call in calls:
                call.go_on(None)

    def join(self, call: _Call) -> None:
        """Have a call wait; begin a round if one may."""
        user_id = call.step.user_id
        calls = self._waiting.get(user_id)
        if calls is not None:
            calls[call] = None
            return
        self._waiting[user_id] = {call: None}
        self._queue[user_id] = call.step
        self._begin_rounds(_USUAL_ROUNDS)

    def hurry(self) -> bool:
        """Begin more rounds than usual; return True if users are left that wait for a round."""
        self._begin_rounds(self._at_once)
        return bool(self._queue)

    def leave(self, call: _Call) -> bool:
        """Forget a call that waits no longer. Return False if it was told already how it goes on."""
        user_id = call.step.user_id
        calls = self._waiting.get(user_id, {})
        if call not in calls:
            return False
        del calls[call]
        if not calls and user_id in self._queue:
            del self._queue[user_id], self._waiting[user_id]
        return True

    def release(self, users: Iterable[str], error: LedgerUnavailable | None) -> None:
        """Let the calls go on, or fail, that wait for `users`."""
        for user_id in users:
            for call in self._waiting.pop(user_id, ()):
                call.go_on(error and LedgerUnavailable(*error.args))

    def pass_on(self, users: Iterable[str], waited_ms: int) -> None:
        """Give a turn for `users` to one of their calls. Forget the users for whom none waits."""
        waited_for = []
        for user_id in users:
            if self._waiting.get(user_id):
                waited_for.append(user_id)
            else:
                self._waiting.pop(user_id, None)
        if waited_for:
            self._give(tuple(waited_for), waited_ms, is_round=False)

    def end_round(self) -> None:
        """Begin the next round in the place of one that has ended."""
        self._rounds = max(0, self._rounds - 1)
        self._begin_rounds(_USUAL_ROUNDS)

    def _begin_rounds(self, at_once: int) -> None:
        while self._queue and self._rounds < min(at_once, self._at_once):
            first = next(iter(self._queue))
            together = (user_id for user_id, step in self._queue.items() if not step.alone)
            users = (first,) if self._queue[first].alone else tuple(islice(together, _ROUND_USERS))
            for user_id in users:
                del self._queue[user_id]
            self._rounds += 1
            self._give(users, 0, is_round=True)

    def _give(self, users: tuple[str, ...], waited_ms: int, *, is_round: bool) -> None:
        calls = self._waiting[users[0]]
        call = next(iter(calls))
        del calls[call]
        call.step.turn = Turn(self, users, waited_ms, is_round=is_round)
        call.go_on(None)


def _late(seconds: float) -> LedgerUnavailable:
    return LedgerUnavailable(f"a balance was not loaded within {seconds:g} s: too many are to be loaded at once")


class ThreadTurns:
    """The turns of threads."""

    def __init__(self, at_once: int, wait_seconds: float) -> None:
        """Have at most `at_once` rounds under way; a thread waits at most `wait_seconds`."""
        self._wait_seconds = wait_seconds
        self._turns = _Turns(at_once)

    def take(self, step: LoadTurn) -> None:
        """Wait until the step has its turn, or another thread has loaded the balance.

        Raises LedgerUnavailable: it came to nothing there, or this thread has waited long enough.
        """
        call, turns = _ThreadCall(step), self._turns
        try:
            turns.change(lambda: turns.join(call))
            if not call.wait(min(_GATHER_SECONDS, self._wait_seconds)):
                turns.change(turns.hurry)
                call.wait(self._wait_seconds - _GATHER_SECONDS)
        finally:  # also if a signal ends the wait
            with turns.lock:
                try:
                    gave_up = turns.leave(call)
                except BaseException:
                    turns.begin_anew()
                    raise
        if gave_up:
            raise _late(self._wait_seconds)
        if call.error is not None:
            raise call.error


class _ThreadCall:
    """A thread that waits."""

    def __init__(self, step: LoadTurn) -> None:
        self.step = step
        self.error: LedgerUnavailable | None = None
        self._told = Event()

    def go_on(self, error: LedgerUnavailable | None) -> None:
        self.error = error
        self._told.set()

    def wait(self, seconds: float) -> bool:
        """Return True once the wait is over, False after so many seconds."""
        return self._told.is_set() or self._told.wait(max(0.0, seconds))


class LoopTurns:
    """The turns of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, at_once: int, wait_seconds: float) -> None:
        """Have at most `at_once` rounds under way; a call waits at most `wait_seconds`."""
        self._loop = loop
        self._wait_seconds = wait_seconds
        self._turns = _Turns(at_once)
        self._hurrying: asyncio.TimerHandle | None = None

    def take(self, step: LoadTurn, deliver: Callable[[Any], None]) -> None:
        """Deliver None once the step has its turn, or another call has loaded the balance; or LedgerUnavailable."""
        call = _LoopCall(step, lambda error: self._loop.call_soon(deliver, error))
        call.timer = self._loop.call_later(self._wait_seconds, self._give_up, call)
        with self._turns.lock:
            self._turns.join(call)
        if self._hurrying is None:
            self._hurrying = self._loop.call_later(_GATHER_SECONDS, self._hurry)

    def _hurry(self) -> None:
        with self._turns.lock:
            some_wait = self._turns.hurry()
        self._hurrying = self._loop.call_later(_GATHER_SECONDS, self._hurry) if some_wait else None

    def _give_up(self, call: _LoopCall) -> None:
        with self._turns.lock:
            if self._turns.leave(call):
                call.go_on(_late(self._wait_seconds))


class _LoopCall:
    """A coroutine's call that waits."""

    def __init__(self, step: LoadTurn, later: Callable[[LedgerUnavailable | None], object]) -> None:
        self.step = step
        self.timer: asyncio.TimerHandle | None = None
        self._later = later

    def go_on(self, error: LedgerUnavailable | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self._later(error)
