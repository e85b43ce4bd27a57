"""One drain: batch after batch of one stream, until it is empty or the time is up.

Here are the loop, retries and halves; the steps of a batch are in worker/consumer/batch.py. While Postgres commits a
batch, one thread reads and judges the next, another publishes the last.

What holds if the process dies anywhere: an entry leaves the stream only in the step that publishes a committed
transaction, or after it. The next drain finds every entry that was not disposed of, and knows by its identity what was
applied.
"""

from __future__ import annotations

import contextlib
from math import inf
from time import monotonic
from typing import Generic, NamedTuple

import psycopg
import redis
from loguru import logger

from config.log import described
from config.settings import Settings
from schemas.events import Refusal
from worker.admin import partitions
from worker.consumer import pausing, sponsorship
from worker.consumer.batch import Desk, Paused, apply_batch
from worker.consumer.books import Books, ItemT, LoadedT, OutcomeT
from worker.consumer.faults import explained
from worker.consumer.hand import Batch, Hand, Range, Taken, Unreadable
from worker.consumer.publisher import Publisher
from worker.consumer.recovery import LeftBehind, halves
from worker.consumer.refusals import RefusalLog, in_trace
from worker.consumer.tally import Tally
from worker.consumer.usage import UsageBooks
from worker.keyspace.keys import Partition, Stream
from worker.ledger.sqlstate import ErrorKind, kind_of
from worker.reports import counts
from worker.resources import Resources
from worker.rules.entry_times import is_ahead
from worker.rules.received import Refresh, Refused
from worker.tracing import Processing

# A batch that fails for a transient reason is retried whole; from the third attempt on without accounts in use.
_ATTEMPTS = 6
_ATTEMPTS_BEFORE_SKIPPING = 2
_WAITING_TTL_MS = 10_000
# A try that waits behind other jobs comes later than its halt ends: operators are told of the error meanwhile.
_FAILING_SECONDS = 60


class Done(NamedTuple):
    """A batch that was disposed of: what is left of it when its events are forgotten. See `Batch`."""

    entries: int
    last_id: str | None
    is_full: bool


class Report(NamedTuple):
    """What a drain did. `more` means that there is more to do at once: its time was up, or entries came too late."""

    entries: int
    more: bool


def drain_stream(
    resources: Resources,
    stream: Stream,
    *,
    stop_at: float = inf,
    refusals: RefusalLog | None = None,
    tally: Tally | None = None,
) -> Report:
    """Dispose of the entries of one stream, until `monotonic()` reaches `stop_at`; see `Drain.run`.

    `refusals` limits what is logged of dead letters across drains; `tally` counts for the metrics.
    """
    refusals, tally = refusals or RefusalLog(), tally or Tally()
    if isinstance(stream, Partition):
        return Drain(resources, stream, UsageBooks(resources, stream, refusals), refusals, tally).run(stop_at)
    pool_books = sponsorship.SponsorshipBooks(resources)
    return Drain[sponsorship.Request, sponsorship.Loaded, sponsorship.Outcome](
        resources, stream, pool_books, refusals, tally
    ).run(stop_at)


class Drain(Generic[ItemT, LoadedT, OutcomeT]):
    """A run of batches over one stream, each in its own transaction."""

    def __init__(
        self,
        resources: Resources,
        stream: Stream,
        books: Books[ItemT, LoadedT, OutcomeT],
        refusals: RefusalLog,
        tally: Tally,
    ) -> None:
        self._resources = resources
        self._settings = resources.settings
        self._stream = stream
        self._books = books
        self._hand = Hand(resources, stream, books)
        self._publisher = Publisher(resources.redis, stream, books)
        self._desk = Desk(
            engine=resources.engine,
            stream=stream,
            books=books,
            hand=self._hand,
            publisher=self._publisher,
            refusals=refusals,
            poison_deaths=resources.settings.poison_deaths,
            in_force=resources.in_force,
            tally=tally,
        )
        self._refusals = refusals
        self._tally = tally
        self._after: str | None = None
        self._is_paused = False
        self._is_ahead = False
        self._is_through = False

    def run(self, stop_at: float = inf) -> Report:
        """Dispose of entries until the stream is empty, another drain has it, it is paused, or `monotonic()` reaches
        `stop_at`.

        Safe to run twice, at the same time or after a kill. An error that is no event's fault halts the partition for
        a while and is raised; nothing is lost by it.
        """
        entries = 0
        with self._resources.redis.pipeline(transaction=False) as pipe:
            pipe.delete(self._stream.rung)
            pipe.exists(self._stream.halted, self._stream.paused)
            pipe.exists(self._stream.busy)
            pipe.hgetall(self._stream.hand)
            pipe.xlen(self._stream.entries)
            pipe.exists(self._stream.failing)
            _, stopped, alive, marker, backlog, failing = pipe.execute()
        # A marker that is still fresh belongs to a living drain that has let go of its lock between two batches.
        if stopped or alive or not backlog:
            return Report(0, more=False)
        try:
            if marker:
                entries += self._recover(LeftBehind.of(marker))
            more = True
            while more:
                done = self._dispose_next()
                entries += done.entries
                self._is_through = not done.is_full
                more = done.is_full and monotonic() < stop_at
        except Taken:
            pass
        except Paused:
            self._is_paused = True
            partitions.mark(self._resources, self._stream)
        except Unreadable as unreadable:
            self._pause(unreadable.found)
        except Exception as error:
            self._halt(error)
            raise
        else:
            if failing:
                self._resources.redis.delete(self._stream.failing)
        finally:
            more = self._finish()
            self._tally.send()
        return Report(entries, more)

    def _dispose_next(self) -> Done:
        """Dispose of the next batch; there was none when the answer has no `last_id`."""
        if self._hand.knows_the_end():
            return _NOTHING
        done = self._dispose(Range(self._after, self._settings.batch_max_events))
        self._go_on_after(done.last_id)
        return done

    def _recover(self, left: LeftBehind) -> int:
        """Go on where a dead worker stopped, piece by piece; returns the number of entries disposed of."""
        logger.warning("partition {}: a worker died with up to {} events in hand", self._stream.name, left.reach)
        entries = 0
        while entries < left.reach:
            done = self._dispose(left.piece(self._after))
            if done.last_id is None:
                break
            entries += done.entries
            self._go_on_after(done.last_id)
        return entries

    def _go_on_after(self, last_id: str | None) -> None:
        """Read on after this entry, None for the beginning. Tell operators of an id from the future."""
        self._after = last_id
        if last_id is not None and is_ahead(last_id, self._hand.now()):
            self._is_ahead = True
            self._refusals.add_ahead(self._stream, last_id)

    def _dispose(self, wanted: Range | Batch[ItemT]) -> Done:
        """Apply and publish one batch. Retry transient errors; bisect the batch on data errors."""
        self._hand.let_go()
        skip_locked = False
        unique_violations = 0
        for attempt in range(1, _ATTEMPTS + 1):
            span = Processing(str(self._stream.name))
            try:
                applied = apply_batch(self._desk, self._hand.batch or wanted, skip_locked=skip_locked)
            except psycopg.Error as error:
                batch = self._hand.batch
                span.end(batch.items if batch else (), error)
                self._tally.count(counts.FAILURES, {type(error).__name__: 1})
                kind = kind_of(error)
                if kind is ErrorKind.UNIQUE and unique_violations == 0:
                    unique_violations = 1
                elif batch is not None and kind in (ErrorKind.DATA, ErrorKind.UNIQUE):
                    self._bisect(batch, error)
                    return _done(batch)
                elif kind is not ErrorKind.TRANSIENT or attempt == _ATTEMPTS:
                    raise
                elif error.sqlstate is None and attempt == _ATTEMPTS_BEFORE_SKIPPING:
                    raise  # the new connection failed, too: Postgres is away, and trying again at once is of no use
                skip_locked = attempt >= _ATTEMPTS_BEFORE_SKIPPING
                said = described(error)
                logger.bind(cause=f"attempt {attempt} failed: {said}").warning(
                    "partition {}: attempt {} failed, {}", self._stream.name, attempt, said
                )
            else:
                if applied is None:
                    return _NOTHING
                span.end(applied.items)
                return _done(applied)
        raise AssertionError("the last attempt returns or raises")

    def _bisect(self, batch: Batch[ItemT], error: psycopg.Error) -> None:
        """Dispose of the halves of a batch that some event's data spoil, in order; an event that fails alone is dead.

        Each part is published as it is committed, so that the next attempt finds a shorter stream.
        """
        if len(batch.items) > 1:
            for half in halves(batch):
                self._dispose(half)
            return
        item = batch.items[0] if batch.items else None
        if item is None or isinstance(item, Refresh | Refused):
            raise error
        said = described(error)
        logger.error(
            "partition {}: entry {} is a dead letter: {}{}",
            self._stream.name, batch.last_id, said, in_trace(getattr(item, "traceparent", None)),
        )  # fmt: skip
        refused = self._books.refuse(item, Refusal.DATA_ERROR, f"{error.sqlstate}: {error.diag.message_primary}")
        self._dispose(Batch([refused], batch.last_id))

    def _pause(self, found: pausing.Finding) -> None:
        """Have workers leave the partition alone until an operator has looked."""
        self._is_paused = True
        self._tally.count(counts.PAUSES)
        partitions.pause(self._resources, self._stream, pausing.WORKER, f"{found.reason}; {found.example}")
        logger.error(
            "partition {} is paused: {}. Its entries stay in the stream, checks go on. Mend what writes them, then "
            "`meterfall partition resume {}`; what cannot be read then becomes dead letters",
            self._stream.name, found.reason, self._stream.name,
        )  # fmt: skip

    def _halt(self, error: Exception) -> None:
        """Leave the partition alone for a while, and tell operators why: of a missing right, whose and which."""
        said = explained(error, self._settings)
        self._tally.count(counts.HALTS, {type(error).__name__: 1})
        logger.bind(cause=f"halted: {said}").error("partition {}: halted, nothing is lost: {}", self._stream.name, said)
        with contextlib.suppress(redis.RedisError):
            seconds = self._settings.halt_seconds
            self._resources.redis.set(self._stream.failing, said[:500], ex=seconds + _FAILING_SECONDS)
            self._resources.redis.set(self._stream.halted, said[:500], ex=seconds)

    def _finish(self) -> bool:
        """Wait for the publisher and take the marker back: this drain did not die. True when there is more to do.

        A drain that came while the marker stood has left the partition to us; its entries are in the backlog.
        """
        backlog = 0
        try:
            self._publisher.wait()
        finally:
            self._hand.close()
            self._publisher.close()
            with contextlib.suppress(redis.RedisError):
                backlog = self._hand.put_back()
                if self._is_through and self._hand.waits:
                    ttl_ms = waiting_ttl_ms(self._settings)
                    self._resources.redis.set(self._stream.waiting, self._hand.waits, px=ttl_ms)
                if self._is_ahead and backlog == 0:
                    self._hand.begin_anew()
        return backlog > 0 and not self._hand.has_left_out and not self._is_paused


def waiting_ttl_ms(settings: Settings) -> int:
    """Return for how long the mark of a stream with waiting entries stays: each sweep drains it, which renews it."""
    return _WAITING_TTL_MS + 3 * settings.sweep_interval_ms


_NOTHING = Done(0, None, is_full=False)


def _done(batch: Batch[ItemT]) -> Done:
    return Done(len(batch.items), batch.last_id, batch.is_full)
