"""Redis, Postgres and workers of a fake, all of them in memory."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import cast

from sqlalchemy import Engine

from config.catalogue import load_catalogue
from config.settings import load_settings
from worker.keyspace import keys
from worker.resources import Resources
from worker.testing.books import apply_stream
from worker.testing.ledger import MemoryLedger
from worker.testing.memory import MemoryRedis

# Clients of one process share what they let through by the URL of their Redis. So each world has a URL of its own.
_NUMBERS = count(1)


class World:
    """What the clients of one fake share. Threads may use it."""

    def __init__(self, now: datetime | None, apply_at_once: bool, settings: Mapping[str, object]) -> None:
        """`now`: the time on its clock, which goes on from there. Raises SettingsError, CatalogueError."""
        # A client that names no ledger asks it for less.
        own = {
            "redis_url": f"unix:///in-memory/{next(_NUMBERS)}",
            "database_url": "postgresql:///in-memory",
            "redis_wait_replicas": 0,
        }
        # No pause after an outage: the test says when it is over.
        self.settings = load_settings({}, **{"redis_down_pause_ms": 0, **settings, **own})
        self.catalogue = load_catalogue(
            self.settings.catalogue_path,
            self.settings.default_plan,
            sponsor_initial_units=self.settings.sponsor_initial_units,
        )
        ahead = timedelta() if now is None else now - datetime.now(UTC)
        self.redis = MemoryRedis(ahead, self._hear)
        self.ledger = MemoryLedger(self.settings, self.catalogue, self.redis.now)
        # No statement ever reaches an engine: the books are in memory.
        self.resources = Resources(self.settings, self.catalogue, cast("Engine", None), self.redis)
        self._apply_at_once = apply_at_once

    def apply(self) -> None:
        """Apply what waits in the streams, as workers do."""
        with self.redis.in_reach():
            for stream in keys.streams(self.settings.partitions):
                apply_stream(self.resources, self.ledger, stream)

    def refresh(self, user_id: str) -> None:
        """Forget what Redis has cached of an account that changed: the next call loads it anew."""
        account, pool = keys.account_of(user_id, self.settings.partitions), keys.SPONSORSHIP
        with self.redis.in_reach():
            self.redis.delete(account.balance, account.lease, pool.standing(user_id), pool.standing_lease(user_id))

    def _hear(self, number: int) -> None:
        """Hear the doorbell, as a supervisor does."""
        if self._apply_at_once:
            apply_stream(self.resources, self.ledger, keys.stream_of(number))
