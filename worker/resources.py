"""The resources of one process: settings, catalogue, the pool of connections to Postgres, and Redis."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import redis
from sqlalchemy import Engine

from config.catalogue import Catalogue, load_catalogue
from config.settings import Settings
from worker.keyspace import keys
from worker.keyspace.connection import connect, redis_now_ms
from worker.keyspace.keys import RING_TTL_MS, Stream
from worker.ledger.connection import LedgerError, open_engine
from worker.ledger.partitions import claim_partitions


@dataclass(frozen=True)
class Resources:
    """The resources of a worker process; made once, shared by its drains."""

    settings: Settings
    catalogue: Catalogue
    engine: Engine
    redis: redis.Redis

    @classmethod
    def open(cls, settings: Settings) -> Resources:
        """Open the resources for `settings`; connect to no server yet.

        Raises CatalogueError or LedgerError.
        """
        catalogue = load_catalogue(settings.catalogue_path, settings.default_plan)
        return cls(settings, catalogue, open_engine(settings), connect(settings))

    def claim(self) -> None:
        """Agree on the number of partitions with the ledger and Redis, before any work.

        If Redis is empty though the ledger is in use, a key notes the time: its holds and unread events are lost.
        Raises LedgerError if either has another number: a user's events would be in two streams.
        """
        wanted = self.settings.partitions
        unused = claim_partitions(self.engine, wanted)
        # Read before the write: a Redis without memory refuses writes, and workers must drain it all the same.
        written = self.redis.get(keys.PARTITION_COUNT) or self.redis.set(
            keys.PARTITION_COUNT, wanted, nx=True, get=True
        )
        if written is not None and int(written) != wanted:
            raise LedgerError(f"METERFALL_PARTITIONS: this Redis has {int(written)} partitions, not {wanted}")
        if self.redis.get(keys.FOUND_EMPTY) is None:
            found_empty_ms = 0 if unused else redis_now_ms(self.redis)
            with contextlib.suppress(redis.OutOfMemoryError):  # it must be drained all the same
                self.redis.set(keys.FOUND_EMPTY, found_empty_ms, nx=True)

    def ring(self, stream: Stream) -> None:
        """Wake a supervisor for this stream, unless a drain of it waits already."""
        if self.redis.set(stream.rung, "1", nx=True, px=RING_TTL_MS):
            self.redis.rpush(keys.BELL, stream.number)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()
        self.redis.close()
