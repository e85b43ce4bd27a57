"""The one who sends what a client has in its spool: a thread beside the calls, which is there while something is.

Each client has one at most, and of all on a machine one sends at a time. It does not keep its process alive: what is
left then is on disk, and another process sends it. A child after a fork starts its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from threading import Condition, RLock, Thread
from time import monotonic
from typing import Any

from worker.client.effects import DOWN, Command, Effect, Pipeline, logger
from worker.client.lines import Lines
from worker.client.session import Context, Running
from worker.client.spooling import SENT_AT_ONCE, Sent, send_in_turn
from worker.client.waiting import Way, carry_out, replies_to
from worker.keyspace.connection import service_pool

# Between two parts the turn is free for so long, and whoever waits for it looks more often than that.
_GAP_SECONDS = 0.01
_TURN_POLL_SECONDS = 0.005
# After an error that is no outage.
_RETRY_SECONDS = 1.0


class Sender:
    """Sends what is in the spool until it is empty, and tries again while Redis is away. Threads may share it."""

    def __init__(self, context: Context, answer: Callable[[Effect], Any]) -> None:
        """Start nothing yet. `answer` answers questions to the spool."""
        self._context = context
        self._answer = answer
        # Taken as a lock, which no signal interrupts half-way: a Condition is written in Python.
        self._lock = RLock()
        self._changed = Condition(self._lock)
        self._thread: Thread | None = None
        self._asked = False
        self._closed = False

    def wake(self) -> bool:
        """Have the spool sent, which is not empty. Return True if the thread had to be started for that."""
        with self._lock:
            if self._closed:
                return False
            self._asked = True
            self._changed.notify()
            if self._thread is not None and self._thread.is_alive():  # its start may have been interrupted
                return False
            self._thread = Thread(target=self._run, name="meterfall-spool-sender", daemon=True)
            self._thread.start()
            return True

    def close(self, seconds: float) -> None:
        """Send what is left and end, in `seconds` at most; at once if Redis is away."""
        with self._lock:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def _run(self) -> None:
        settings = self._context.settings
        with closing(Lines(service_pool(settings, settings.redis_socket_timeout_ms))) as way:
            while self._is_asked():
                self._empty_the_spool(way)

    def _is_asked(self) -> bool:
        """Return True if somebody has asked since the last look; else the thread ends."""
        with self._lock:
            asked, self._asked = self._asked, False
            if not asked:
                self._thread = None
            return asked

    def _empty_the_spool(self, way: Way) -> None:
        """Send one part after the other until nothing is left; once the client is closed, until one fails."""
        context, told = self._context, ""
        while self._waited_for_redis():
            was_away = context.away_until > 0
            if was_away:
                # Nothing else is to wait for Redis until this try has shown whether it is back.
                context.away_until = monotonic() + context.settings.redis_socket_timeout_ms / 1_000
            try:
                sent = self._send_a_part(way)
            except Exception as error:  # noqa: BLE001 - the thread must outlive whatever a single try meets
                if str(error) != told:
                    told = str(error)
                    logger.warning("what is in the spool stays there: %s", error)
                if isinstance(error.__cause__, DOWN):
                    continue
                context.away_until = 0.0
                if self._is_closed_within(_RETRY_SECONDS):
                    return
                continue
            if sent is None:  # whoever sends has not found out either
                context.away_until = monotonic() + _TURN_POLL_SECONDS if was_away else 0.0
                if self._is_closed_within(_TURN_POLL_SECONDS):
                    return
            elif sent.left:
                time.sleep(_GAP_SECONDS)
            else:
                context.away_until = 0.0  # whoever sent the last of it has found Redis
                return

    def _send_a_part(self, way: Way) -> Sent | None:
        context = self._context

        def perform(step: Effect) -> Any:
            return replies_to(step, way, context) if isinstance(step, Command | Pipeline) else self._answer(step)

        return carry_out(Running(context, send_in_turn(context, SENT_AT_ONCE)), perform)

    def _waited_for_redis(self) -> bool:
        """Wait while Redis is taken to be away. False if it still is when the client is closed."""
        with self._lock:
            while (left := self._context.away_until - monotonic()) > 0 and not self._closed:
                self._changed.wait(left)
            return left <= 0

    def _is_closed_within(self, seconds: float) -> bool:
        with self._lock:
            return self._changed.wait_for(lambda: self._closed, seconds)
