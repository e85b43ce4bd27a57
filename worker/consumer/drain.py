"""The way of a batch: from the stream, through one locked transaction, to what Redis is told.

`Drain.run` empties one stream for a while: that of a partition, or that of the sponsorship pool. What its entries
mean is the business of its books (worker/consumer/usage.py, worker/consumer/sponsorship.py); here is what is the same
for all: one drain at a time, retries, the search for an entry that spoils a batch, and what a dead worker leaves
behind. While Postgres commits a batch, one thread reads and judges the next, another publishes the last.

What holds if the process dies anywhere: an entry leaves the stream only in the step that publishes a committed
transaction, so whoever drains next finds every entry not disposed of; what had been applied is found by its identity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import inf
from secrets import token_hex
from time import monotonic
from typing import Any, NamedTuple, Protocol

import psycopg
import redis
from loguru import logger

from config.log import described
from schemas.events import Refusal
from worker.admin import partitions as admin_partitions
from worker.consumer import pausing
from worker.consumer.refusals import RefusalLog
from worker.consumer.sponsorship import PoolBooks
from worker.consumer.usage import UsageBooks
from worker.crash import crash_point
from worker.keyspace import scripts
from worker.keyspace.entries import RawEntry
from worker.keyspace.keys import Partition, Stream
from worker.keyspace.reader import pieces
from worker.ledger.connection import Postgres, batch_connection
from worker.ledger.partitions import try_lock_partition
from worker.ledger.sqlstate import Fault, fault_of
from worker.resources import Resources
from worker.rules.received import Refresh, Refused

# A batch that fails for a transient reason is retried whole; from the third attempt on without accounts in use.
_ATTEMPTS = 6
_ATTEMPTS_BEFORE_SKIPPING = 2
# After a death the range in hand is taken in pieces this many times smaller, until one event stands alone.
_NARROWING = 16


class Item(Protocol):
    """An entry, judged by the books of its stream."""

    @property
    def entry_id(self) -> str: ...


class Applied(Protocol):
    """A committed batch, to be published. `left_out` are users whose accounts were in use: their entries stay.

    `refused` are dead letters now.
    """

    @property
    def left_out(self) -> frozenset[str]: ...

    @property
    def refused(self) -> Sequence[Refused]: ...


class Books(Protocol):
    """What the entries of a stream mean. Items and what was applied are the books' own; a drain only hands them on."""

    def judge(self, entries: Sequence[RawEntry]) -> Iterable[Item]:
        """One item for each entry, in order; never raises. What is wrong becomes a `Refused`."""
        ...

    def apply(self, postgres: Postgres, items: Sequence[Any], taken_ms: int, *, skip_locked: bool) -> Applied:
        """Steps 4 to 9 of a batch: lock, work out, write, commit. At `taken_ms` on Redis' clock nothing was read."""
        ...

    def publish(self, applied: Any) -> None:
        """Step 10: what was committed becomes visible in Redis and leaves the stream, together. Safe to repeat."""
        ...

    def refusal_of(self, item: Any, reason: Refusal, detail: str) -> Refused:
        """The dead letter of an item that is well formed, but cannot be applied."""
        ...

    def is_recorded(self, postgres: Postgres, item: Any) -> bool:
        """True when the item was applied before."""
        ...


def books_of(resources: Resources, stream: Stream) -> Books:
    """The books in which a stream is entered."""
    return UsageBooks(resources, stream) if isinstance(stream, Partition) else PoolBooks(resources)


class Batch(NamedTuple):
    """Entries read from a stream, judged. `last_id` is where to read on, None when there was nothing.

    `full` means that the read ended at its bounds, so that more may follow. `deaths` is how many workers died while the
    only event of this batch was applied alone.
    """

    received: list[Item]
    last_id: str | None
    full: bool = False
    deaths: int = 0


class Done(NamedTuple):
    """A batch that was disposed of: what is left of it when its events are forgotten. See `Batch`."""

    entries: int
    last_id: str | None
    full: bool


class Report(NamedTuple):
    """What a drain did. `more` means that there is more to do at once: its time was up, or somebody came too late."""

    entries: int
    more: bool


class _Taken(Exception):
    """Another drain has the partition; this one ends."""


class _Paused(Exception):
    """The partition is to be left alone; this drain ends."""


class _Unreadable(Exception):
    """Too much of what came in lately is no event: the partition must be paused. Carries what was found."""

    def __init__(self, found: pausing.Finding) -> None:
        super().__init__(found.reason)
        self.found = found


class Drain:
    """One drain of one stream: a run of batches, each in its own transaction."""

    def __init__(self, resources: Resources, stream: Stream, refusals: RefusalLog | None = None) -> None:
        self._resources = resources
        self._refusals = refusals or RefusalLog()
        self._reader = ThreadPoolExecutor(1, "reader")
        # One thread, so that batches are published in the order of their commits.
        self._publisher = ThreadPoolExecutor(1, "publisher")
        self._settings = resources.settings
        self._stream = stream
        self._books = books_of(resources, stream)
        self._token = token_hex(8)
        self._taken_ms = 0
        self._left_out: set[str] = set()
        self._tolerated_to: str | None = None
        self._is_paused = False
        self._after: str | None = None
        self._ahead: Future[Batch] | None = None
        self._published: Future[None] | None = None

    def run(self, stop_at: float = inf) -> Report:
        """Dispose of entries until the stream is empty, the partition is taken or paused, or `monotonic()` reaches
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
            _, stopped, alive, left_behind, backlog = pipe.execute()
        # A marker that is still fresh belongs to a living drain that has let go of its lock between two batches.
        if stopped or alive or not backlog:
            return Report(0, more=False)
        try:
            if left_behind:
                entries += self._recover(left_behind)
            more = True
            while more:
                done = self._dispose_next()
                entries += done.entries
                more = done.full and monotonic() < stop_at
        except _Taken:
            pass
        except _Paused:
            self._is_paused = True
            admin_partitions.mark(self._resources, self._stream)
        except _Unreadable as unreadable:
            self._is_paused = True
            reason, example = unreadable.found
            admin_partitions.pause(self._resources, self._stream, pausing.WORKER, f"{reason}; {example}")
            logger.error(
                "partition {} is paused: {}. Its entries stay in the stream, checks go on. Mend what writes them, then "
                "`meterfall partition resume {}`; what cannot be read then becomes dead letters",
                self._stream.name, reason, self._stream.name,
            )  # fmt: skip
        except Exception as error:
            self._halt(error)
            raise
        finally:
            more = self._finish()
        return Report(entries, more)

    # -- One batch ----------------------------------------------------------------------------------------------------

    def _dispose_next(self) -> Done:
        """Dispose of the next batch; there was none when the answer has no `last_id`."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.result().last_id is None:
            return _NOTHING

        def read() -> Batch:
            self._take_in_hand("-", self._settings.batch_max_events, 0)
            return self._unless_unreadable(ahead.result() if ahead else self._read(self._after))

        done = self._dispose(read, read_ahead=True)
        self._after = done.last_id
        return done

    def _dispose(self, read: Callable[[], Batch], *, read_ahead: bool) -> Done:
        """Apply one batch, whatever it takes, and have it published: retries, and ever smaller parts where an event's
        data are refused.

        `read` is called once, under the lock; it marks what it takes in hand.
        """
        skip_locked = False
        unique_violations = 0
        batch: Batch | None = None

        def first_read() -> Batch:
            nonlocal batch
            if batch is None:
                batch = self._without_left_out(read())
            else:
                self._keep_in_hand()
            return batch

        for attempt in range(1, _ATTEMPTS + 1):
            try:
                applied = self._apply(first_read, read_ahead=read_ahead and attempt == 1, skip_locked=skip_locked)
                break
            except psycopg.Error as error:
                fault = fault_of(error)
                if fault is Fault.UNIQUE and unique_violations == 0:
                    unique_violations = 1
                elif batch is not None and fault in (Fault.DATA, Fault.UNIQUE):
                    self._narrow(batch, error)
                    return _done(batch)
                elif fault is not Fault.TRANSIENT or attempt == _ATTEMPTS:
                    raise
                elif error.sqlstate is None and attempt == _ATTEMPTS_BEFORE_SKIPPING:
                    raise  # the new connection failed, too: Postgres is away, and trying again at once is of no use
                skip_locked = attempt >= _ATTEMPTS_BEFORE_SKIPPING
                logger.warning("partition {}: attempt {} failed, {}", self._stream.name, attempt, described(error))
        if applied is None or batch is None:
            return _NOTHING
        publish = self._publish_later if batch.full else self._publish_now
        publish(applied)
        return _done(batch)

    def _apply(self, read: Callable[[], Batch], *, read_ahead: bool, skip_locked: bool) -> Applied | None:
        """Steps 1 to 9 of a batch, in one transaction; 4 to 9 are the books'. Returns None when there was nothing to
        apply.

        Raises _Taken when another drain has the partition, _Paused when nobody may have it, and what Postgres raises.
        Killed before the COMMIT, nothing happened; killed after it, the entries are still in the stream and turn out to
        be known.
        """
        with batch_connection(self._resources.engine) as postgres:
            turn = try_lock_partition(postgres, self._stream.number)
            if not turn.is_ours:
                raise _Taken
            if turn.is_paused:
                raise _Paused
            self._tolerated_to = turn.tolerated_to
            batch = read()
            if batch.last_id is None:
                return None
            crash_point("after_read")
            if read_ahead and batch.full:
                self._ahead = self._reader.submit(self._read, batch.last_id)
            received = self._without_poison(postgres, batch)
            applied = self._books.apply(postgres, received, self._taken_ms, skip_locked=skip_locked)
        crash_point("after_commit")
        self._refusals.add(self._stream, applied.refused)
        self._left_out |= applied.left_out
        return applied

    def _narrow(self, batch: Batch, error: psycopg.Error) -> None:
        """Dispose of the halves of a batch that some event's data spoil, in order; an event that fails alone is dead.

        Each part is published as it is committed, so that whoever has to begin again finds a shorter stream.
        """
        received = batch.received
        if len(received) == 1 and _may_be_refused(received[0]):
            said = described(error)
            logger.error("partition {}: entry {} is a dead letter: {}", self._stream.name, batch.last_id, said)
            detail = f"{error.sqlstate}: {error.diag.message_primary}"
            halves: list[list[Item]] = [[self._books.refusal_of(received[0], Refusal.DATA_ERROR, detail)]]
        elif len(received) < 2:
            raise error
        else:
            middle = len(received) // 2
            halves = [received[:middle], received[middle:]]
        for half in halves:
            self._dispose(partial(self._part, half), read_ahead=False)

    def _part(self, received: list[Item]) -> Batch:
        self._keep_in_hand()
        return Batch(received, received[-1].entry_id)

    # -- Reading ------------------------------------------------------------------------------------------------------

    def _read(self, after: str | None, limit: int | None = None) -> Batch:
        """Read and judge entries behind `after` (None: from the beginning), bounded in number and in bytes."""
        received: list[Item] = []
        last_id, full = None, False
        settings, stream = self._settings, self._stream.entries
        bounds = (limit or settings.batch_max_events, settings.batch_max_bytes, settings.read_chunk_events)
        for entries, full in pieces(self._resources.redis, stream, after, *bounds):  # noqa: B007 - the last one counts
            last_id = entries[-1][0].decode("ascii")
            received.extend(self._books.judge(entries))
        return Batch(received, last_id, full)

    def _unless_unreadable(self, batch: Batch) -> Batch:
        """The batch that was read, if it may be disposed of. Raises _Unreadable when it must stay in the stream."""
        found = pausing.why_to_pause(self._resources, self._stream, batch.received, self._tolerated_to)
        if found is not None:
            raise _Unreadable(found)
        return batch

    def _without_left_out(self, batch: Batch) -> Batch:
        """The batch without users whose earlier entries are still in the stream: their order must stay."""
        if not self._left_out:
            return batch
        kept = [item for item in batch.received if getattr(item, "user_id", None) not in self._left_out]
        return batch._replace(received=kept)

    # -- Publishing ---------------------------------------------------------------------------------------------------

    def _publish_later(self, applied: Applied) -> None:
        """Publish in the background; waits for the batch before, so that at most one is on its way."""
        if self._published is not None:
            self._published.result()
        self._published = self._publisher.submit(self._books.publish, applied)

    def _publish_now(self, applied: Applied) -> None:
        """Publish at once, after the batch before: with nothing to overlap, another thread would only cost time."""
        if self._published is not None:
            self._published.result()
        self._books.publish(applied)

    # -- What a dead worker leaves behind -----------------------------------------------------------------------------

    def _take_in_hand(self, first: str, size: int, deaths: int) -> None:
        """Note what is in hand, under the lock and before anything is parsed: a successor reads what this died on."""
        names = [self._stream.hand, self._stream.busy]
        args: list[str | int | bytes] = [self._token, self._settings.hand_grace_ms, first, size, deaths]
        self._taken_ms = int(scripts.run(self._resources.redis, scripts.call("hand", names, args)))

    def _keep_in_hand(self) -> None:
        """Go on with what is in hand. Raises _Taken when another drain took this one for dead and has it now."""
        names = [self._stream.hand, self._stream.busy]
        request = scripts.call("hand", names, [self._token, self._settings.hand_grace_ms])
        self._taken_ms = int(scripts.run(self._resources.redis, request))
        if not self._taken_ms:
            raise _Taken

    def _recover(self, left: dict[bytes, bytes]) -> int:
        """Go on where a dead worker stopped: its range in ever smaller pieces, each marked, until the killer is alone.

        Returns the number of entries disposed of.
        """
        size, deaths, first = int(left[b"size"]), int(left[b"deaths"]), left[b"first"].decode()
        piece = max(1, size // _NARROWING)
        died = deaths + 1 if size == 1 else 0
        logger.warning("partition {}: a worker died with up to {} events in hand", self._stream.name, 2 * size)
        entries = 0
        while entries < 2 * size:
            step = self._dispose(partial(self._read_piece, piece, first, died), read_ahead=False)
            if step.last_id is None:
                break
            entries += step.entries
            self._after = step.last_id
        return entries

    def _read_piece(self, size: int, suspect: str, deaths: int) -> Batch:
        """Read a piece of a dead worker's range. `deaths` counts if the piece begins with the entry `suspect`."""
        head = next(pieces(self._resources.redis, self._stream.entries, self._after, 1, 1, 1), None)
        first = head.entries[0][0].decode("ascii") if head else "-"
        died = deaths if first == suspect else 0
        self._take_in_hand(first, size, died)
        return self._unless_unreadable(self._read(self._after, size))._replace(deaths=died)

    def _without_poison(self, postgres: Postgres, batch: Batch) -> list[Item]:
        """The batch; an event on which enough workers died alone is refused, unless one of them had recorded it."""
        first = batch.received[0] if batch.received else None
        if batch.deaths < self._settings.poison_deaths or first is None or not _may_be_refused(first):
            return batch.received
        if self._books.is_recorded(postgres, first):
            return batch.received
        detail = f"{batch.deaths} workers died while it was applied alone"
        return [self._books.refusal_of(first, Refusal.POISON, detail)]

    def _halt(self, error: Exception) -> None:
        said = described(error)
        logger.error("partition {}: halted, nothing is lost: {}", self._stream.name, said)
        with contextlib.suppress(redis.RedisError):
            seconds = self._settings.halt_seconds
            self._resources.redis.set(self._stream.halted, said[:500], ex=seconds)

    def _finish(self) -> bool:
        """Wait for the publisher and take the marker back: this drain did not die. True when there is more to do.

        Whoever came while the marker stood has left the partition to us; what it came for is in the backlog.
        """
        names = [self._stream.hand, self._stream.busy, self._stream.entries]
        backlog = 0
        try:
            if self._ahead is not None:
                self._ahead.exception()
            if self._published is not None:
                self._published.result()
        finally:
            self._reader.shutdown()
            self._publisher.shutdown()
            with contextlib.suppress(redis.RedisError):
                backlog = scripts.run(self._resources.redis, scripts.call("done", names, [self._token]))
        return backlog > 0 and not self._left_out and not self._is_paused


_NOTHING = Done(0, None, full=False)


def _may_be_refused(item: Item) -> bool:
    """True for what brings something to be applied: a request to publish can be refused as little as a refusal."""
    return not isinstance(item, Refused | Refresh)


def _done(batch: Batch) -> Done:
    return Done(len(batch.received), batch.last_id, batch.full)
