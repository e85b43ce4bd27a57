"""What a drain has in hand: a range of its stream, marked in Redis so that a successor finds what its owner died on."""

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
    """Entries to be taken from a stream: at most `limit` of those after the entry `after`, None for its beginning.

    `suspect` belongs to a range that a dead worker left behind: the first entry of it, on which `deaths` workers died
    while it was applied alone.
    """

    after: str | None
    limit: int
    suspect: str | None = None
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class Batch(Generic[ItemT]):
    """Entries that were read and judged. `last_id` is where to read on, None when there was nothing.

    `is_full` means that the read ended at its bounds, so that more may follow. `deaths` is the number of workers that
    died while the only entry of this batch was applied alone.
    """

    items: Sequence[ItemT | Refresh | Refused]
    last_id: str | None
    is_full: bool = False
    deaths: int = 0


class Taken(Exception):
    """Another drain has the partition, or took this one for dead and has its range."""


class Unreadable(Exception):
    """Too many of the latest entries are no events: the partition must be paused. Carries the finding."""

    def __init__(self, found: pausing.Finding) -> None:
        super().__init__(found.reason)
        self.found = found


class Hand(Generic[ItemT]):
    """What one drain has in hand. `batch` is the last one that was read; `taken_ms` is when, on the clock of Redis."""

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
        """Read and judge a range, or go on with a batch that was read; mark it in hand before anything is parsed.

        Unreadable entries up to the entry `tolerated_to` are no reason to pause. Entries of users who were left out
        are dropped: the order of their events must stay. Call it under the partition's lock.
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
        """Forget the last batch: what is taken next is another one."""
        self.batch = None

    def knows_the_end(self) -> bool:
        """True when reading ahead found nothing more in the stream."""
        return self._ahead is not None and self._ahead.result().last_id is None

    def leave_out(self, users: Collection[str]) -> None:
        """Drop entries of these users from all further batches of this drain."""
        self._left_out.update(users)

    @property
    def has_left_out(self) -> bool:
        """True when some entries stay in the stream because their accounts were in use."""
        return bool(self._left_out)

    def read(self, after: str | None, limit: int) -> Batch[ItemT]:
        """Read and judge entries after `after` (None: from the beginning), bounded in number and in bytes."""
        items: list[ItemT | Refresh | Refused] = []
        last_id, is_full = None, False
        bounds = (limit, self._settings.batch_max_bytes, self._settings.read_chunk_events)
        for entries, is_full in pieces(self._resources.redis, self._stream, after, *bounds):  # noqa: B007 - the last one counts
            last_id = entries[-1][0].decode("ascii")
            items.extend(self._books.judge(entries))
        return Batch(items, last_id, is_full)

    def put_back(self) -> int:
        """Take the marker back, as this drain did not die; returns the number of entries in the stream."""
        return int(scripts.run(self._resources.redis, calls.done(self._stream, self._token)))

    def close(self) -> None:
        """Let a read that is under way finish, and end its thread."""
        self._reader.shutdown()

    def mark(self, first: str, size: int, deaths: int) -> None:
        """Note the range in hand, under the lock and before anything is parsed: a successor reads what this died on."""
        request = calls.hand(self._stream, self._token, self._settings.hand_grace_ms, calls.InHand(first, size, deaths))
        self.taken_ms = int(scripts.run(self._resources.redis, request))

    def _keep(self) -> None:
        """Renew the marker of the range in hand. Raises Taken."""
        request = calls.hand(self._stream, self._token, self._settings.hand_grace_ms)
        self.taken_ms = int(scripts.run(self._resources.redis, request))
        if not self.taken_ms:
            raise Taken

    def _read_next(self, wanted: Range) -> Batch[ItemT]:
        """The next batch, which may have been read ahead."""
        self.mark("-", wanted.limit, 0)
        ahead, self._ahead = self._ahead, None
        return ahead.result() if ahead is not None else self.read(wanted.after, wanted.limit)

    def _read_suspect(self, wanted: Range) -> Batch[ItemT]:
        """A piece of a dead worker's range; its deaths count if it begins with the suspect."""
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
