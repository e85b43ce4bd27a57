"""What a dead worker leaves behind, and how the one entry is found that spoils a batch.

A worker that dies leaves the marker of its range. The next drain takes that range in ever smaller pieces, each marked,
until the killer stands alone. An event whose data Postgres refuses is found in the same way, by halves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from schemas.events import Refusal
from worker.consumer.books import ItemT, Judges
from worker.consumer.hand import Batch, Range
from worker.ledger.connection import Postgres
from worker.rules.received import Refresh, Refused

# After a death the range in hand is taken in pieces this many times smaller, until one event stands alone.
_NARROWING = 16


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """The range that a dead worker had in hand: `size` entries from `first` on, or a few more.

    `deaths` is the number of workers that died before it while `first` was applied alone.
    """

    first: str
    size: int
    deaths: int

    @classmethod
    def of(cls, marker: Mapping[bytes, bytes]) -> LeftBehind:
        """The range that a marker in Redis names."""
        return cls(marker[b"first"].decode(), int(marker[b"size"]), int(marker[b"deaths"]))

    @property
    def reach(self) -> int:
        """The number of entries to take in pieces before all is as usual."""
        return 2 * self.size

    def piece(self, after: str | None) -> Range:
        """The next piece of it, after the entry `after`."""
        died = self.deaths + 1 if self.size == 1 else 0
        return Range(after, max(1, self.size // _NARROWING), suspect=self.first, deaths=died)


def without_poison(
    postgres: Postgres, books: Judges[ItemT], batch: Batch[ItemT], poison_deaths: int
) -> Sequence[ItemT | Refresh | Refused]:
    """The items of a batch; an event on which `poison_deaths` workers died alone is refused.

    Unless one of them had recorded it: then only its publication is missing.
    """
    first = batch.items[0] if batch.items else None
    if batch.deaths < poison_deaths or first is None or isinstance(first, Refresh | Refused):
        return batch.items
    if books.is_recorded(postgres, first):
        return batch.items
    return [books.refuse(first, Refusal.POISON, f"{batch.deaths} workers died while it was applied alone")]


def halves(batch: Batch[ItemT]) -> tuple[Batch[ItemT], Batch[ItemT]]:
    """The two halves of a batch of at least two items, in order."""
    middle = len(batch.items) // 2
    return part(batch.items[:middle]), part(batch.items[middle:])


def part(items: Sequence[ItemT | Refresh | Refused]) -> Batch[ItemT]:
    """A part of a batch that is in hand."""
    return Batch(items, items[-1].entry_id)
