"""CPU time, user and system, of Python, Postgres and Redis, and of all programs of the machine. Needs Linux's /proc.

The counters have steps of 10 ms, so a figure per event takes some thousand events; those of `live_seconds` are finer.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import redis

from worker.demo.processes import children

# The parts of the system, in the order in which all tables and pictures have them.
PARTS = ("python", "postgres", "redis")
_PROC = Path("/proc")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class ServerPids(NamedTuple):
    """The process ids of both servers: the postmaster, and Redis."""

    postgres: int
    redis: int


class MachineTime(NamedTuple):
    """CPU seconds of a machine since its start: those that programs took, and all of them."""

    busy: float
    total: float


def server_pids(postgres: psycopg.Connection[Any], client: redis.Redis) -> ServerPids | None:
    """Return the ids of the servers' processes; None unless both run here and /proc shows them."""
    ((backend,),) = postgres.execute("SELECT pg_backend_pid()").fetchall()
    server = int(client.info("server")["process_id"])
    # A server elsewhere, or in another container, has an id that is nobody's here, or somebody else's.
    if not _name(backend).startswith("postgres") or not _name(server).startswith(("redis", "valkey")):
        return None
    return ServerPids(postgres=_parent(backend), redis=server)


def tree_seconds(roots: Iterable[int]) -> float:
    """Return the CPU seconds of processes and of all their children, those included that ended.

    A process that two of the trees share counts once.
    """
    roots = list(roots)
    while True:
        # A process that ends during the look would count for nothing, or twice: look again.
        pids = _tree(roots)
        seconds = [_seconds(pid) for pid in sorted(pids)]
        known = [each for each in seconds if each is not None]
        if len(known) == len(pids) and _tree(roots) == pids:
            return sum(known)


def tree_pids(roots: Iterable[int]) -> set[int]:
    """Return the processes of `roots` and all their children that live now."""
    return _tree(roots)


def live_seconds(pids: Iterable[int]) -> float:
    """Return the CPU seconds of processes by the scheduler's count in nanoseconds; those that ended count nothing.

    So short work can be measured, and a vacuum that begins meanwhile is left out.
    """
    return sum(map(_scheduled_seconds, pids))


def machine_time() -> MachineTime | None:
    """Return the times of this machine; None without /proc."""
    try:
        first = (_PROC / "stat").read_text().splitlines()[0]
    except FileNotFoundError:
        return None
    user, nice, system, idle, waiting, *interrupts = (int(ticks) / _TICKS_PER_SECOND for ticks in first.split()[1:9])
    busy = user + nice + system + sum(interrupts)
    return MachineTime(busy, busy + idle + waiting)


def processor_name() -> str:
    """Return the name of this machine's processor, as /proc or Python tells it."""
    with suppress(FileNotFoundError):
        for line in (_PROC / "cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _tree(roots: Iterable[int]) -> set[int]:
    found: set[int] = set()
    fresh = set(roots)
    while fresh:
        found |= fresh
        fresh = set().union(*map(_children, fresh)) - found
    return found


def _children(pid: int) -> set[int]:
    try:
        return children(pid)
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return set()


def _seconds(pid: int) -> float | None:
    """Return the CPU seconds of a process and its children that ended; None if it has ended itself."""
    fields = _fields(pid)
    return sum(map(int, fields[11:15])) / _TICKS_PER_SECOND if fields else None


def _scheduled_seconds(pid: int) -> float:
    nanoseconds = 0
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in (_PROC / str(pid) / "task").iterdir():
            nanoseconds += int((thread / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def _parent(pid: int) -> int:
    return int(_fields(pid)[1])


def _name(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _fields(pid: int) -> list[str]:
    """Return what /proc tells of a process after its name, which may contain anything; [] if it has ended."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
