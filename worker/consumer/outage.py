"""An outage in the log: one line when it is over, that says how long it was; before it the errors not yet told."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from loguru import logger


class Outage:
    """Knows since when a server does not answer."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._server = ""
        self._since = 0.0

    def begin(self, server: str) -> None:
        """Note that `server` does not answer; logs nothing."""
        if not self._server:
            self._since = self._clock()
        self._server = server

    def end(self) -> None:
        """Log that the server answers again, if it did not."""
        if self._server:
            seconds = self._clock() - self._since
            logger.bind(recovers=True).info("{} answers, work goes on after {:.0f} s", self._server, seconds)
        self._server = ""
