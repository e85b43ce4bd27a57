"""A client that is killed, or loses a reply, at any of its steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from config.settings import Settings
from worker.client import Billing
from worker.client.effects import Ask, Effect
from worker.errors import LedgerUnavailable


class Interrupted(Billing):
    """A client to which something happens before its step number `at`, or, if `lost`, instead of that step's reply."""

    def __init__(self, settings: Settings, at: int, happens: Callable[[Effect], None], *, lost: bool = False) -> None:
        super().__init__(settings)
        self.steps = 0
        self.at, self.happens, self.lost = at, happens, lost

    def _perform(self, step: Effect) -> Any:
        self.steps += 1
        mine = self.steps - 1 == self.at
        if mine and not self.lost:
            self.happens(step)
        result = super()._perform(step)
        if mine and self.lost:
            self.happens(step)
        return result


def die(_: Effect) -> None:
    """Nothing can be cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def lose_reply(step: Effect) -> None:
    """What was asked for was done, and nobody hears of it."""
    raise LedgerUnavailable("no reply") if isinstance(step, Ask) else RedisConnectionError("no reply")


def survives(settings: Settings, at: int, call: Callable[[Billing], object]) -> bool:
    """Make a call in a process that is killed before step number `at`; False when it was."""
    pid = os.fork()
    if not pid:
        try:
            with Interrupted(settings, at, die) as client:
                call(client)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
