"""Recovery after a worker's death, and the search for the one stream entry that spoils a batch.

A dying worker leaves the mark of its range. The next drain takes that range in ever smaller pieces, each marked, until
the killer stands alone. A drain finds an event with data that Postgres refuses in the same way, by halves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from schemas.events import Refusal
from worker.consumer.books import ItemT, Judges
from worker.consumer.hand import Batch, Range
from worker.ledger.connection import Postgres
from worker.rules.received import Refresh, Refused

# After a death drains take the range in hand in pieces this many times smaller, until one event stands alone.
_NARROWING = 16


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """The range that a dead worker had in hand: `size` stream entries from `first` on, or a few more.

    `deaths` is the number of workers that died before it while they applied `first` alone.
    """

    first: str
    size: int
    deaths: int

    @classmethod
    def of(cls, marker: Mapping[bytes, bytes]) -> LeftBehind:
        """Return the range that a mark in Redis names."""
        return cls(marker[b"first"].decode(), int(marker[b"size"]), int(marker[b"deaths"]))

    @property
    def reach(self) -> int:
        """The number of stream entries to take in pieces before drains take full batches again."""
        return 2 * self.size

    def piece(self, after: str | None) -> Range:
        """Return its next piece, after the stream entry `after`."""
        died = self.deaths + 1 if self.size == 1 else 0
        return Range(after, max(1, self.size // _NARROWING), suspect=self.first, deaths=died)


def without_poison(
    postgres: Postgres, books: Judges[ItemT], batch: Batch[ItemT], poison_deaths: int
) -> Sequence[ItemT | Refresh | Refused]:
    """Return the items of a batch; refuse an event on which `poison_deaths` workers died alone.

    If one of these workers had recorded it, it stays: then only its publication is missing.
    """
    first = batch.items[0] if batch.items else None
    if batch.deaths < poison_deaths or first is None or isinstance(first, Refresh | Refused):
        return batch.items
    if books.is_recorded(postgres, first):
        return batch.items
    return [books.refuse(first, Refusal.POISON, f"{batch.deaths} workers died while it was applied alone")]


def halves(batch: Batch[ItemT]) -> tuple[Batch[ItemT], Batch[ItemT]]:
    """Return the two halves of a batch of at least two items, in order."""
    middle = len(batch.items) // 2
    return part(batch.items[:middle]), part(batch.items[middle:])


def part(items: Sequence[ItemT | Refresh | Refused]) -> Batch[ItemT]:
    """Return these items of the batch in hand as a batch."""
    return Batch(items, items[-1].entry_id)
