"""The hand of a drain: the range of stream entries that it works on.

A mark in Redis names it, so that a successor finds the range on which a worker died.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from secrets import token_hex
from time import monotonic
from typing import Generic

from worker.consumer import pausing
from worker.consumer.books import ItemT, Judges, Trim
from worker.keyspace import calls, scripts
from worker.keyspace.entries import LAST_ID, RawEntry
from worker.keyspace.keys import Stream
from worker.keyspace.reader import pieces
from worker.ledger.partitions import Turn
from worker.resources import Resources
from worker.rules.entry_times import END_OF_TIME, stream_time
from worker.rules.received import Refresh, Refused


@dataclass(frozen=True, slots=True)
class Range:
    """A range of stream entries to take: at most `limit` after the entry `after`, None for the beginning.

    `suspect` is the first entry of a dead worker's range; `deaths` workers died while they applied it alone.
    """

    after: str | None
    limit: int
    suspect: str | None = None
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class Batch(Generic[ItemT]):
    """Judged stream entries. The next read begins after `last_id`, None if there were none.

    `is_full` means that the read ended at its bounds, so that more may follow. `deaths` is the number of workers that
    died while they applied the only entry of this batch.
    """

    items: Sequence[ItemT | Refresh | Refused]
    last_id: str | None
    is_full: bool = False
    deaths: int = 0


class Taken(Exception):
    """Another drain has the partition, or believed this one dead and took its range."""


class Unreadable(Exception):
    """Too many of the latest stream entries are no events: the partition must be paused. Carries the finding."""

    def __init__(self, found: pausing.Finding) -> None:
        super().__init__(found.reason)
        self.found = found


class Hand(Generic[ItemT]):
    """The hand of one drain: `batch` is the last one read, `taken_ms` the time of the read on the clock of Redis.

    `waits` counts the stream entries so far that wait for a catalogue.
    """

    def __init__(self, resources: Resources, stream: Stream, books: Judges[ItemT]) -> None:
        self._resources = resources
        self._settings = resources.settings
        self._stream = stream
        self._books = books
        self._token = token_hex(8)
        self._reader = ThreadPoolExecutor(1, "reader")
        self._ahead: Future[Batch[ItemT]] | None = None
        self._left_out: set[str] = set()
        self._noted: str | None = None
        self.waits = 0
        self._clock: tuple[datetime, float] | None = None
        self.batch: Batch[ItemT] | None = None
        self.taken_ms = 0

    def take(self, wanted: Range | Batch[ItemT], turn: Turn) -> Batch[ItemT]:
        """Read and judge a range, or go on with a batch already read; mark it in hand before any parsing.

        Unreadable stream entries that the last resume let through are no reason to pause. It drops entries of users
        left out, as the order of their events must stay. Call it under the partition's lock.
        Raises Unreadable for a range that must stay in the stream, and Taken for a batch that another drain has.
        """
        self._clock = turn.now, monotonic()
        if isinstance(wanted, Batch):
            self._keep()
            self.batch = self._without_left_out(wanted)
            return self.batch
        batch = self._read_suspect(wanted) if wanted.suspect is not None else self._read_next(wanted)
        found = pausing.why_to_pause(self._resources, self._stream, batch.items, turn)
        if found is not None:
            raise Unreadable(found)
        if wanted.suspect is None and batch.is_full:
            self._note_read(batch.last_id)
            self._ahead = self._reader.submit(self.read, batch.last_id, self._settings.batch_max_events)
        self.batch = self._without_left_out(batch)
        return self.batch

    def let_go(self) -> None:
        """Forget the last batch: the next one is another."""
        self.batch = None

    def knows_the_end(self) -> bool:
        """Return True if reading ahead found nothing more in the stream."""
        return self._ahead is not None and self._ahead.result().last_id is None

    def leave_out(self, in_use: Collection[str], waits: int = 0) -> None:
        """Drop stream entries of users `in_use` from all further batches of this drain.

        The books leave out those that wait for a catalogue by themselves: here they are only counted.
        """
        self._left_out.update(in_use)
        self.waits += waits

    @property
    def has_left_out(self) -> bool:
        """Return True if some stream entries stay: their accounts were in use, or they wait for a catalogue."""
        return bool(self._left_out) or self.waits > 0

    def read(self, after: str | None, limit: int) -> Batch[ItemT]:
        """Read and judge stream entries after `after` (None: the beginning), bounded in number and in bytes.

        A batch ends before the first entry that another catalogue prices.
        """
        items: list[ItemT | Refresh | Refused] = []
        last_id, is_full, ends_at = None, False, None
        bounds = (limit, self._settings.batch_max_bytes, self._settings.read_chunk_events)
        for entries, is_full in pieces(self._resources.redis, self._stream, after, *bounds):  # noqa: B007 - the last one counts
            now = self.now()
            if last_id is None:
                ends_at = self._books.next_change(entries[0][0].decode("ascii"), now)
            own = entries if ends_at is None else [each for each in entries if _is_before(ends_at, each, now)]
            if own:
                last_id = own[-1][0].decode("ascii")
                items.extend(self._books.judge(own, now))
            if len(own) < len(entries):
                return Batch(items, last_id, is_full=True)
        return Batch(items, last_id, is_full)

    def forget_ahead(self) -> None:
        """Read the next batch again: what was read ahead was judged by an older catalogue."""
        if self._ahead is not None:
            self._ahead.result()
            self._ahead = None

    def now(self) -> datetime:
        """Return the clock of the ledger, as far as it is known: it was read at the beginning of the last batch.

        Reading ahead must not wait for Postgres. Before the first batch, no entry is ahead of it.
        """
        if self._clock is None:
            return END_OF_TIME
        at, since = self._clock
        return at + timedelta(seconds=monotonic() - since)

    def begin_anew(self) -> str | None:
        """Let the stream begin anew if it is empty and its last id is ahead of the clock; return that id then."""
        last_id = scripts.run(self._resources.redis, calls.anew(self._stream))
        return None if last_id is None else str(last_id.decode("ascii"))

    def put_back(self) -> int:
        """Remove the mark, as this drain did not die. Return the number of stream entries left."""
        return int(scripts.run(self._resources.redis, calls.done(self._stream, self._token)))

    def close(self) -> None:
        """Wait for a read under way, and end its thread."""
        self._reader.shutdown()

    def mark(self, first: str, size: int, deaths: int) -> None:
        """Mark the range in hand, under the lock and before any parsing: a successor finds it after a death."""
        request = calls.hand(self._stream, self._token, self._settings.hand_grace_ms, calls.InHand(first, size, deaths))
        self.taken_ms = int(scripts.run(self._resources.redis, request))

    def trim_of(self, batch: Batch[ItemT]) -> Trim | None:
        """Return the trim by which all entries of a batch may leave the stream at once; else None.

        A short batch is as quick entry by entry, and its last entry was not noted.
        """
        if self.has_left_out or not batch.items or batch.last_id in (None, LAST_ID) or batch.last_id != self._noted:
            return None
        return Trim(self._token, batch.items[0].entry_id, batch.last_id)

    def _note_read(self, last_id: str | None) -> None:
        """Note in Redis, after the read, how far this drain has read: see lua/trim.lua."""
        grace_ms, self._noted = self._settings.hand_grace_ms, last_id
        scripts.run(self._resources.redis, calls.hand(self._stream, self._token, grace_ms, read_to=last_id))

    def _keep(self) -> None:
        """Renew the mark of the range in hand. Raises Taken."""
        request = calls.hand(self._stream, self._token, self._settings.hand_grace_ms)
        self.taken_ms = int(scripts.run(self._resources.redis, request))
        if not self.taken_ms:
            raise Taken

    def _read_next(self, wanted: Range) -> Batch[ItemT]:
        """Return the next batch, which may have been read ahead."""
        self.mark("-", wanted.limit, 0)
        ahead, self._ahead = self._ahead, None
        return ahead.result() if ahead is not None else self.read(wanted.after, wanted.limit)

    def _read_suspect(self, wanted: Range) -> Batch[ItemT]:
        """Return a piece of a dead worker's range; its deaths count if it begins with the suspect."""
        head = next(pieces(self._resources.redis, self._stream, wanted.after, 1, 1, 1), None)
        first = head.entries[0][0].decode("ascii") if head else "-"
        deaths = wanted.deaths if first == wanted.suspect else 0
        self.mark(first, wanted.limit, deaths)
        return replace(self.read(wanted.after, wanted.limit), deaths=deaths)

    def _without_left_out(self, batch: Batch[ItemT]) -> Batch[ItemT]:
        if not self._left_out:
            return batch
        kept = [item for item in batch.items if getattr(item, "user_id", None) not in self._left_out]
        return replace(batch, items=kept)


def _is_before(moment: datetime, entry: RawEntry, now: datetime) -> bool:
    """True for a stream entry that came in before `moment`."""
    return stream_time(entry[0].decode("ascii"), now) < moment
