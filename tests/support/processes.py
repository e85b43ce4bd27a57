"""Real dynos, and pieces of work that are killed in a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from config.settings import Settings
from tests.support.resources import worker_resources
from worker import crash
from worker.demo.processes import kill_tree
from worker.resources import Resources


@contextmanager
def dyno(settings: Settings, *options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`meterfall worker run` as a process; killed at the end of the block with its worker if it still runs."""
    assert settings.database_url is not None
    urls = {"DATABASE_URL": settings.database_url, "REDIS_URL": settings.redis_url}
    command = [sys.executable, "-m", "worker", "worker", "run", *options]
    process = subprocess.Popen(
        command, env={**os.environ, **urls, **environment}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        kill(process)
        process.communicate()


def worker_process_of(process: subprocess.Popen[str]) -> int | None:
    """Pid of the worker process that a dyno has started, beside the process of the proof."""
    done = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "worker.consumer.worker_process"],
        capture_output=True,
        text=True,
        check=False,
    )
    return int(done.stdout.split()[0]) if done.stdout.split() else None


def killed_in(settings: Settings, action: Callable[[Resources], object], label: str | None = None) -> None:
    """Do `action` in a process of its own that is killed with SIGKILL: at the crash point `label`, else right after."""
    pid = os.fork()
    if not pid:
        try:
            crash._ARMED = label
            with worker_resources(settings) as resources:
                action(resources)
                if label is None:
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to both processes of a dyno."""
    if process.poll() is None:
        kill_tree(process.pid)
        process.wait()
