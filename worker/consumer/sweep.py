"""Work that no doorbell announces: backlogs, due holds and periods, the periodic proof.

One supervisor at a time sweeps, by lease.
"""

from __future__ import annotations

from collections.abc import Sequence
from secrets import token_hex

import redis
from loguru import logger
from rq import Queue

from config.settings import Settings
from worker.consumer import jobs
from worker.keyspace import keys
from worker.keyspace.connection import redis_now_ms


class Sweep:
    """Enqueues jobs for work without a ring. Redis and the queue are the supervisor's."""

    def __init__(self, settings: Settings, client: redis.Redis, queue: Queue) -> None:
        self._settings = settings
        self._client = client
        self._queue = queue
        self._drained = keys.streams(settings.partitions)
        self._token = token_hex(8)
        self._has_seen_mark = False

    def leads(self) -> bool:
        """True while this supervisor holds the lease; takes a free one."""
        lease_ms = 3 * self._settings.sweep_interval_ms
        if self._client.set(keys.LEADER, self._token, nx=True, px=lease_ms):
            return True
        if self._client.get(keys.LEADER) != self._token.encode():
            return False
        self._client.pexpire(keys.LEADER, lease_ms)
        return True

    def run(self) -> None:
        """Enqueue drains of backlogs, due holds and periods, roll-ups, and the proof."""
        now_ms = redis_now_ms(self._client)
        self._notice_emptied(now_ms)
        with self._client.pipeline(transaction=False) as pipe:
            for stream in self._drained:
                pipe.xlen(stream.entries)
                pipe.exists(stream.busy, stream.halted, stream.paused)
                pipe.zcount(stream.expiries, "-inf", now_ms)
            replies = pipe.execute()
        found = list(zip(self._drained, replies[0::3], replies[1::3], replies[2::3], strict=True))
        self._enqueue_each("drain", [stream for stream, lag, busy, _ in found if lag and not busy])
        self._enqueue_each("expire_holds", [stream for stream, _, _, due in found if due])
        self._enqueue_each("roll_up", self._unrolled())
        self._enqueue_periodic("renew_due", keys.RENEWED, self._settings.renew_interval_seconds)
        self._enqueue_periodic("verify", keys.VERIFIED, self._settings.verify_interval_seconds)

    def _notice_emptied(self, now_ms: int) -> None:
        """Note for `status` that Redis lost everything: its mark was there and is gone."""
        if self._client.exists(keys.FOUND_EMPTY):
            self._has_seen_mark = True
        elif self._has_seen_mark:
            self._client.set(keys.FOUND_EMPTY, now_ms, nx=True)
            logger.error("Redis was emptied: its holds are gone, and so are events that were not applied yet")

    def _enqueue_periodic(self, name: str, mark: str, interval_seconds: int) -> None:
        """Enqueue one job per interval over all dynos; none if the interval is 0."""
        if interval_seconds and self._client.set(mark, "1", nx=True, ex=interval_seconds):
            jobs.enqueue(self._queue, name)

    def _unrolled(self) -> list[keys.Partition]:
        """Return partitions with accounts to roll up; none while events wait.

        Events wait while a stream has more than a read. The stream entries of a paused partition do not count: they
        wait for an operator.
        """
        partitions = keys.partitions_of(self._settings.partitions)
        with self._client.pipeline(transaction=False) as pipe:
            for partition in partitions:
                pipe.xlen(partition.entries)
                pipe.exists(partition.paused)
                pipe.exists(partition.unrolled)
            replies = pipe.execute()
        found = list(zip(partitions, replies[0::3], replies[1::3], replies[2::3], strict=True))
        busy = any(lag > self._settings.read_chunk_events and not paused for _, lag, paused, _ in found)
        return [] if busy else [partition for partition, _, _, marked in found if marked]

    def _enqueue_each(self, name: str, streams: Sequence[keys.Stream]) -> None:
        jobs.enqueue_each(self._queue, self._client, name, streams)
