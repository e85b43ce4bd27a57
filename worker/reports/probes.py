"""What probes and scrapes are answered: one reading of the status a second, however many ask."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from time import monotonic
from typing import NamedTuple

from loguru import logger

from config.log import described
from config.settings import Settings
from worker.reports.metrics import Figures, read_figures
from worker.resources import Resources

# Who probes often, and many who probe at once, cost the servers one reading a second.
_KEPT_SECONDS = 1.0
# A probe gets its answer within 2 s, though a server may be silent for longer.
PATIENCE_SECONDS = 1.5


class Readiness(NamedTuple):
    """The answer of `/ready`: the verdict of the health check, and its findings by name."""

    severity: str
    failed: dict[str, str]

    @property
    def code(self) -> int:
        """The status of the response: 200 while nothing is down; degraded is ready, and says so."""
        return 503 if self.severity == "down" else 200


def readiness_of(figures: Figures | None) -> Readiness:
    """Return what `/ready` answers; without figures, that they could not be read in time."""
    if figures is None:
        return Readiness("down", {"status": f"not read in {PATIENCE_SECONDS} s"})
    status = figures.status
    return Readiness(status.severity, {one.check: one.text for one in status.findings})


class Reader:
    """Reads the status, one reading at a time, and keeps it for a second."""

    def __init__(self, settings: Settings) -> None:
        """Connect to no server yet."""
        short = {"redis_socket_timeout_ms": 1_000, "redis_retries": 0, "database_connect_timeout_seconds": 1}
        self._settings = settings.model_copy(update=short)
        self._resources: Resources | None = None
        self._pool = ThreadPoolExecutor(1, "endpoint")
        self._lock = Lock()
        self._reading: Future[Figures] | None = None
        self._began = 0.0

    def figures(self) -> Figures | None:
        """Return the figures, at most a second old; None if it takes longer than a probe waits."""
        with self._lock:
            is_old = monotonic() > self._began + _KEPT_SECONDS
            if self._reading is None or (self._reading.done() and is_old):
                self._reading, self._began = self._pool.submit(self._read), monotonic()
            reading = self._reading
        try:
            return reading.result(PATIENCE_SECONDS)
        except TimeoutError:
            return None
        except Exception as error:  # noqa: BLE001 - who probes sees it, and the process works on
            logger.bind(cause="endpoint").warning("no status for a probe: {}", described(error))
            return None

    def close(self) -> None:
        """Give the connections back; a reading under way is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._resources is not None:
            self._resources.close()

    def _read(self) -> Figures:
        if self._resources is None:
            self._resources = Resources.open(self._settings)
        return read_figures(self._resources)
