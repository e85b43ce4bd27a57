"""The heartbeats of this process: `status` shows who lives, and what it does."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from time import monotonic
from typing import Literal

import redis
from loguru import logger

from config.catalogue import catalogue_of
from config.log import described
from config.settings import Settings
from schemas.status import Dyno
from worker.keyspace import keys
from worker.ledger.migrations import newest_revision
from worker.reports.dynos import FORGOTTEN, clock, heartbeats, name_of
from worker.version import read_version

# Well below the 15 s after which a process is taken for dead.
_INTERVAL_SECONDS = 2.0
# A supervisor may sweep more often than anybody looks.
_SHORTEST_SECONDS = 1.0
IDLE = "idle"


class Heart:
    """Says that this process lives. It never raises: who bills does not stop for it."""

    def __init__(self, role: Literal["supervisor", "worker", "proof", "notices"], settings: Settings) -> None:
        """Read what does not change; speak to no server yet. Raises CatalogueError."""
        self._role = role
        self._settings = settings
        self._started_at = monotonic()
        self._doing = IDLE, self._started_at
        self._next_beat = 0.0
        self._stopped = Event()
        self._thread: Thread | None = None
        self._last: Dyno | None = None
        self._release, self._revision = read_version(), newest_revision()
        self._catalogue = catalogue_of(settings).digest

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Let the heartbeats say `what`, until the end of the block."""
        self._doing = what, monotonic()
        try:
            yield
        finally:
            self._doing = IDLE, monotonic()

    def beat(self, client: redis.Redis) -> None:
        """Write a heartbeat, at most one a second. A Redis that does not take it gets the next one."""
        if monotonic() < self._next_beat:
            return
        self._next_beat = monotonic() + _SHORTEST_SECONDS
        try:
            self._last = self._heartbeat(client)
            client.hset(keys.DYNOS, name_of(self._last), self._last.model_dump_json())
        except redis.RedisError as error:
            logger.debug("no heartbeat: {}", described(error))

    def beat_always(self, client: redis.Redis) -> None:
        """Write heartbeats from a thread of its own until `stop`: a long job says so too."""

        def beats() -> None:
            while not self._stopped.is_set():
                self.beat(client)
                self._stopped.wait(_INTERVAL_SECONDS)

        self._thread = Thread(target=beats, name="heart", daemon=True)
        self._thread.start()

    def stop(self, client: redis.Redis) -> None:
        """End, and take this process off the list. Killed before that, it is off the list after 15 s."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_INTERVAL_SECONDS)
        if self._last is not None:
            with suppress(redis.RedisError):
                client.hdel(keys.DYNOS, name_of(self._last))

    def _heartbeat(self, client: redis.Redis) -> Dyno:
        now, here = clock(client), monotonic()
        doing, since = self._doing
        return Dyno(
            host=socket.gethostname(),
            pid=os.getpid(),
            parent_pid=os.getppid(),
            role=self._role,
            release=self._release,
            revision=self._revision,
            catalogue=self._catalogue,
            doing=doing,
            since=now - timedelta(seconds=here - since),
            started_at=now - timedelta(seconds=here - self._started_at),
            seen_at=now,
        )


def drop_old(client: redis.Redis) -> None:
    """Forget processes that were not seen for an hour, and what is no heartbeat. Raises the errors of Redis."""
    now = clock(client)
    for name, dyno in heartbeats(client):
        if dyno is None or now - dyno.seen_at > FORGOTTEN:
            client.hdel(keys.DYNOS, name)
