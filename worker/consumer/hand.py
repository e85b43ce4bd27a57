"""The hand of a drain: the range of stream entries that it works on.

A mark in Redis names it, so that a successor finds the range on which a worker died.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Generic

from worker.consumer import pausing
from worker.consumer.books import ItemT, Judges
from worker.keyspace import calls, scripts
from worker.keyspace.keys import Stream
from worker.keyspace.reader import pieces
from worker.resources import Resources
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
    """The hand of one drain: `batch` is the last one read, `taken_ms` the time of the read on the clock of Redis."""

    def __init__(self, resources: Resources, stream: Stream, books: Judges[ItemT]) -> None:
        self._resources = resources
        self._settings = resources.settings
        self._stream = stream
        self._books = books
        self._token = token_hex(8)
        self._reader = ThreadPoolExecutor(1, "reader")
        self._ahead: Future[Batch[ItemT]] | None = None
        self._left_out: set[str] = set()
        self.batch: Batch[ItemT] | None = None
        self.taken_ms = 0

    def take(self, wanted: Range | Batch[ItemT], tolerated_to: str | None) -> Batch[ItemT]:
        """Read and judge a range, or go on with a batch already read; mark it in hand before any parsing.

        Unreadable stream entries up to `tolerated_to` are no reason to pause. It drops entries of users left out, as
        the order of their events must stay. Call it under the partition's lock.
        Raises Unreadable for a range that must stay in the stream, and Taken for a batch that another drain has.
        """
        if isinstance(wanted, Batch):
            self._keep()
            self.batch = self._without_left_out(wanted)
            return self.batch
        batch = self._read_suspect(wanted) if wanted.suspect is not None else self._read_next(wanted)
        found = pausing.why_to_pause(self._resources, self._stream, batch.items, tolerated_to)
        if found is not None:
            raise Unreadable(found)
        if wanted.suspect is None and batch.is_full:
            self._ahead = self._reader.submit(self.read, batch.last_id, self._settings.batch_max_events)
        self.batch = self._without_left_out(batch)
        return self.batch

    def let_go(self) -> None:
        """Forget the last batch: the next one is another."""
        self.batch = None

    def knows_the_end(self) -> bool:
        """Return True if reading ahead found nothing more in the stream."""
        return self._ahead is not None and self._ahead.result().last_id is None

    def leave_out(self, users: Collection[str]) -> None:
        """Drop stream entries of these users from all further batches of this drain."""
        self._left_out.update(users)

    @property
    def has_left_out(self) -> bool:
        """Return True if some stream entries stay because their accounts were in use."""
        return bool(self._left_out)

    def read(self, after: str | None, limit: int) -> Batch[ItemT]:
        """Read and judge stream entries after `after` (None: the beginning), bounded in number and in bytes."""
        items: list[ItemT | Refresh | Refused] = []
        last_id, is_full = None, False
        bounds = (limit, self._settings.batch_max_bytes, self._settings.read_chunk_events)
        for entries, is_full in pieces(self._resources.redis, self._stream, after, *bounds):  # noqa: B007 - the last one counts
            last_id = entries[-1][0].decode("ascii")
            items.extend(self._books.judge(entries))
        return Batch(items, last_id, is_full)

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
