"""Work that no doorbell announces: backlogs, due holds and periods, the periodic proof.

One supervisor at a time sweeps, by lease.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from secrets import token_hex
from time import monotonic
from typing import Any

import psycopg
import redis
from loguru import logger
from rq import Queue

from config.catalogue import CatalogueError
from config.log import described
from config.settings import Settings
from worker.consumer import jobs
from worker.consumer.heart import drop_old
from worker.errors import BadInput
from worker.keyspace import calls, keys, scripts, totals
from worker.keyspace.connection import redis_now_ms
from worker.resources import Resources
from worker.rules.lives import text_of, token_of

# No hurry: nobody may write such ids, and a drain sees to its own stream.
_SECONDS_BETWEEN_LOOKS = 10.0
# An open loss is said so often; a token that is another one is looked into at once.
_SECONDS_BETWEEN_CLAIMS = 3_600.0
# A recount scans Redis; a look that wants one comes again.
_SECONDS_BETWEEN_RECOUNTS = 30
# A job that goes on with a run while another does ends at once.
_SECONDS_BETWEEN_RESUMES = 10
# How often old notices are deleted where nobody sends any.
_SECONDS_BETWEEN_DELETIONS = 3_600

# A stream, its backlog, whether a drain passes it by, how many of its holds are due, and the size of its totals.
_Seen = tuple[keys.Stream, Any, Any, Any, Any]


class Sweep:
    """Enqueues jobs for work without a ring. Redis and the queues are the supervisor's."""

    def __init__(self, settings: Settings, client: redis.Redis, queue: Queue, proofs: Queue) -> None:
        self._settings = settings
        self._client = client
        self._queue = queue
        self._proofs = proofs
        self._drained = keys.streams(settings.partitions)
        self._token = token_hex(8)
        self._life: str | None = None
        self._next_claim = 0.0
        self._next_look = 0.0

    def leads(self) -> bool:
        """True while this supervisor holds the lease; takes a free one."""
        lease_ms = 3 * self._settings.sweep_interval_ms
        if self._client.set(keys.LEADER, self._token, nx=True, px=lease_ms):
            return True
        if self._client.get(keys.LEADER) != self._token.encode():
            return False
        self._client.pexpire(keys.LEADER, lease_ms)
        return True

    def run(self, *, proves: bool = True, looks: bool = True) -> None:
        """Enqueue drains of backlogs, due holds and periods, roll-ups and sums.

        Also the proof if this dyno `proves`, and a look for notices that are due or old if it `looks`.
        """
        now_ms = redis_now_ms(self._client)
        self._keep_life()
        with self._client.pipeline(transaction=False) as pipe:
            for stream in self._drained:
                pipe.xlen(stream.entries)
                pipe.exists(stream.busy, stream.halted, stream.paused)
                pipe.zcount(stream.expiries, "-inf", now_ms)
                pipe.hlen(stream.totals)
            replies = pipe.execute(raise_on_error=False)
        seen = zip(self._drained, replies[0::4], replies[1::4], replies[2::4], replies[3::4], strict=True)
        found = self._without_broken(seen)
        whole = [stream for stream, *_ in found]
        self._look_around(whole, [stream for stream, lag, *_ in found if not lag])
        self._enqueue_each("drain", [stream for stream, lag, busy, *_ in found if lag and not busy])
        self._enqueue_each("expire_holds", [stream for stream, _, _, due, _ in found if due])
        self._enqueue_each("roll_up", self._unrolled())
        self._enqueue_periodic("renew_due", keys.RENEWED, self._settings.renew_interval_seconds)
        self._enqueue_periodic("sum_up", keys.SUMMED_UP, self._settings.sum_up_interval_seconds)
        if proves:
            self._enqueue_proof()
        if looks:
            interval_seconds = self._settings.webhook_interval_seconds or _SECONDS_BETWEEN_DELETIONS
            self._enqueue_periodic("look_for_notices", keys.SENT_NOTICES, interval_seconds)

    def _without_broken(self, found: Iterable[_Seen]) -> list[_Seen]:
        """Leave out streams with keys of a wrong type, with a line about each: the others have their turn."""
        whole = []
        for stream, *replies in found:
            error = next((reply for reply in replies if isinstance(reply, Exception)), None)
            if error is None:
                whole.append((stream, *replies))
            elif not isinstance(error, redis.ResponseError) or isinstance(error, redis.OutOfMemoryError):
                raise error
            else:
                logger.error("partition {}: the sweep passes it by: {}", stream.name, described(error))
        return whole

    def _keep_life(self) -> None:
        """Claim this Redis anew if it lost its data, whoever led before; say so until an operator acknowledges it."""
        is_known = self._life is None or token_of(self._client.get(keys.LIFE)) == self._life
        if is_known and monotonic() < self._next_claim:
            return
        self._life = None
        self._next_claim = monotonic() + _SECONDS_BETWEEN_LOOKS
        try:
            with closing(Resources.open(self._settings)) as resources:
                resources.claim(compares=False)
                lives, life = resources.lives(), token_of(resources.redis.get(keys.LIFE))
        except (
            psycopg.Error,
            BadInput,
            CatalogueError,
        ) as error:  # the dyno goes on with the settings that it began with
            logger.warning("the life of Redis is unknown, trying again: {}", described(error))
            return
        for each in lives:
            if each.is_open:
                logger.bind(cause=f"lost before the life {each.token}").error(
                    "Redis was emptied or replaced: {}. After you have dealt with that: `meterfall cache acknowledge`",
                    text_of(each.began_at, each.found),
                )
        if lives and life == lives[0].token:
            self._life, self._next_claim = life, monotonic() + _SECONDS_BETWEEN_CLAIMS

    def _look_around(self, whole: Sequence[keys.Stream], empty: Sequence[keys.Stream]) -> None:
        """Do now and then what is in no hurry: note lost stream entries, let empty streams begin anew."""
        if monotonic() < self._next_look:
            return
        self._next_look = monotonic() + _SECONDS_BETWEEN_LOOKS
        for stream, lost in totals.look(self._client, whole).items():
            logger.error(
                "partition {}: {} stream entries are lost; no worker disposed of them. `meterfall verify` says more",
                stream.name, lost,
            )  # fmt: skip
        drop_old(self._client)
        self._begin_anew(empty)
        if self._wants_recount(whole):
            self._enqueue_periodic("recount", keys.RECOUNTED, _SECONDS_BETWEEN_RECOUNTS)

    def _wants_recount(self, whole: Sequence[keys.Stream]) -> bool:
        """True if totals are unknown or cannot be right, or if a stream may have lost entries of pending events."""
        found = totals.read_totals(self._client, whole).values()
        return any(
            each.counted_at_ms is None or each.events_noted < 0 or each.holds_noted < 0
            or each.events_noted > each.length or (each.lost > 0 and each.events_noted > 0)
            for each in found
        )  # fmt: skip

    def _begin_anew(self, empty: Sequence[keys.Stream]) -> None:
        """Let empty streams begin anew whose last id is ahead of the clock: the drain was killed before it could."""
        for stream, last_id in zip(
            empty, scripts.run_all(self._client, [calls.anew(stream) for stream in empty]), strict=True
        ):
            if last_id is not None:
                logger.error(
                    "partition {}: the stream began anew after the entry id {}, which is ahead of the clock",
                    stream.name, last_id.decode(),
                )  # fmt: skip

    def _enqueue_periodic(self, name: str, mark: str, interval_seconds: int) -> None:
        """Enqueue one job per interval over all dynos; none if the interval is 0."""
        if self._is_due(mark, interval_seconds):
            jobs.enqueue(self._queue, name)

    def _enqueue_proof(self) -> None:
        """Enqueue the proof if it is due, or if its run is under way and perhaps nobody goes on with it."""
        if self._is_due(keys.VERIFIED, self._settings.verify_interval_seconds):
            jobs.enqueue_proof(self._proofs)
        elif (run := self._client.get(keys.PROVING)) and self._is_due(keys.RESUMED, _SECONDS_BETWEEN_RESUMES):
            jobs.enqueue_proof(self._proofs, int(run))

    def _is_due(self, mark: str, interval_seconds: int) -> bool:
        """True once per interval over all dynos; never if the interval is 0."""
        return bool(interval_seconds and self._client.set(mark, "1", nx=True, ex=interval_seconds))

    def _unrolled(self) -> list[keys.Partition]:
        """Return partitions with accounts to roll up; none while events wait. Leaves broken ones out.

        Events wait while a stream has more than a read. The stream entries of a paused partition do not count: they
        wait for an operator.
        """
        partitions = keys.partitions_of(self._settings.partitions)
        with self._client.pipeline(transaction=False) as pipe:
            for partition in partitions:
                pipe.xlen(partition.entries)
                pipe.exists(partition.paused)
                pipe.exists(partition.unrolled)
            replies = pipe.execute(raise_on_error=False)
        seen = zip(partitions, replies[0::3], replies[1::3], replies[2::3], strict=True)
        found = [each for each in seen if not any(isinstance(reply, redis.ResponseError) for reply in each)]
        busy = any(lag > self._settings.read_chunk_events and not paused for _, lag, paused, _ in found)
        return [] if busy else [partition for partition, _, _, marked in found if marked]

    def _enqueue_each(self, name: str, streams: Sequence[keys.Stream]) -> None:
        jobs.enqueue_each(self._queue, self._client, name, streams)
