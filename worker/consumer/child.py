"""A child process of a dyno, which works on a queue: start it, restart it when it dies, stop it in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from time import monotonic

from loguru import logger

from worker.process import on_launcher_death

# Restart a worker that keeps dying, but not in a tight loop.
RESTART_SECONDS = 1.0


class Child:
    """At most one process of a module, which ends with this process."""

    def __init__(
        self,
        environ: Mapping[str, str],
        module: str = "worker.consumer.worker_process",
        name: str = "worker process",
        niceness: int = 0,
        pipe: int | None = None,
    ) -> None:
        """`module` is the one that it runs; `name` is its name in the log. With `niceness` it gives way to others.

        `pipe` takes its counts, see worker/consumer/tally.py; without one, nobody reads them.
        """
        self._environ = environ
        self._niceness = niceness
        self._module = module
        self._name = name
        self._pipes = [] if pipe is None else [pipe]
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    def is_wanted(self) -> bool:
        """True if there is no process; logs that one has died."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        code = self._process.returncode
        logger.bind(cause=f"{self._name} ended with {code}").warning(
            "{} {} ended with {}", self._name, self._process.pid, code
        )
        return True

    def died_at_once(self) -> bool:
        """True if the last process lived no longer than `RESTART_SECONDS`."""
        return self._process is not None and monotonic() - self._started_at < RESTART_SECONDS

    def start(self) -> None:
        """Start the process."""
        self._started_at = monotonic()
        end_with_us, niceness = on_launcher_death(signal.SIGTERM), self._niceness

        def before_its_program() -> None:  # so that a nice one gives way even while it starts
            if end_with_us is not None:
                end_with_us()
            os.nice(niceness)

        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, *map(str, self._pipes)],
            env=self._environ,
            pass_fds=self._pipes,
            preexec_fn=before_its_program,
        )
        logger.info("{} {} started", self._name, self._process.pid)

    def terminate(self) -> None:
        """Send SIGTERM, if there is a process, and do not wait."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

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
            logger.error("{} {} did not stop in time, killing it", self._name, process.pid)
            process.kill()
            process.wait()


def stop_all(children: Sequence[Child], timeout_seconds: float) -> None:
    """Stop processes at the same time: none waits longer than the timeout, however many they are."""
    stop_at = monotonic() + timeout_seconds
    for child in children:
        child.terminate()
    for child in children:
        child.stop(max(0.0, stop_at - monotonic()))
