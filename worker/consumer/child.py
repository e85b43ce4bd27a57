"""The worker process of a dyno: start it, restart it when it dies, stop it in time."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from time import monotonic

from loguru import logger

from worker.process import on_launcher_death

# Restart a worker that keeps dying, but not in a tight loop.
RESTART_SECONDS = 1.0


class Child:
    """At most one worker process, which ends with this process."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    def is_wanted(self) -> bool:
        """True if there is no worker process; logs that one has died."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        logger.warning("worker process {} ended with {}", self._process.pid, self._process.returncode)
        return True

    def died_at_once(self) -> bool:
        """True if the last worker process lived no longer than `RESTART_SECONDS`."""
        return self._process is not None and monotonic() - self._started_at < RESTART_SECONDS

    def start(self) -> None:
        """Start a worker process."""
        self._started_at = monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.consumer.worker_process"],
            env=self._environ,
            preexec_fn=on_launcher_death(signal.SIGTERM),
        )

    def stop(self, timeout_seconds: float) -> None:
        """Send SIGTERM and wait for the batch in hand; send SIGKILL after the timeout.

        SIGKILL loses nothing.
        """
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            logger.error("worker process {} did not stop in time, killing it", process.pid)
            process.kill()
            process.wait()
