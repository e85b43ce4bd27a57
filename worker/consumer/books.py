"""The protocol of a stream's books, which give its stream entries their meaning. Usage and the pool keep to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol, TypeVar

from schemas.events import Refusal
from worker.consumer.tally import Tally
from worker.keyspace.calls import Note
from worker.keyspace.entries import RawEntry
from worker.ledger.connection import Postgres
from worker.rules.received import Refresh, Refused


class Item(Protocol):
    """A stream entry that carries work: an event, a grant, a credit."""

    @property
    def entry_id(self) -> str: ...


class Outcome(Protocol):
    """The outcome of a batch: rows to write, and a publication for Redis after the COMMIT."""

    @property
    def refused(self) -> Sequence[Refused]:
        """The dead letters of the batch."""
        ...

    @property
    def in_use(self) -> frozenset[str]:
        """Users with accounts that another transaction held: their stream entries stay."""
        ...

    @property
    def waits(self) -> int:
        """The number of stream entries that wait for a catalogue: these stay."""
        ...


ItemT = TypeVar("ItemT", bound=Item)
LoadedT = TypeVar("LoadedT")
OutcomeT = TypeVar("OutcomeT", bound=Outcome)
PublishedT = TypeVar("PublishedT", contravariant=True)


class Judges(Protocol[ItemT]):
    """Judges single stream entries."""

    def judge(self, entries: Sequence[RawEntry], now: datetime) -> Iterable[ItemT | Refresh | Refused]:
        """Return one item for each stream entry, in order. Never raises: an invalid one becomes a `Refused`.

        `now`, on the ledger's clock, counts for an entry whose id is ahead of it.
        """
        ...

    def next_change(self, first_id: str, now: datetime) -> datetime | None:
        """Return when other rules than those of the stream entry `first_id` come into force; None without such."""
        ...

    def is_recorded(self, postgres: Postgres, item: ItemT) -> bool:
        """Return True if the item was applied before."""
        ...

    def refuse(self, item: ItemT, reason: Refusal, detail: str) -> Refused:
        """Return the dead letter of an item that is well formed, but cannot be applied."""
        ...


class Trim(NamedTuple):
    """What leaves the stream at once: a batch, by its first and last entry. `token` is the drain's name in the mark."""

    token: str
    first_id: str
    last_id: str

    def notes(self, count: int) -> list[Note]:
        """Return the notes of so many scripts that publish the batch."""
        return [Note(self.token, f"published:{self.last_id}:{number}") for number in range(count)]


class Publishes(Protocol[PublishedT]):
    """Publishes committed outcomes to Redis."""

    def publish(self, outcome: PublishedT, taken_ms: int, *, trim: Trim | None = None) -> Sequence[Note]:
        """Publish: balances appear, ids leave pending, stream entries are deleted.

        With `trim` it may leave the entries to that, and return the notes in the hand that say what was published.

        `taken_ms`, on the clock of Redis, is before the outcome's first read from Postgres. Safe to repeat. Killed in
        between, the next drain finds the rest in the stream, knows it, and publishes it.
        """
        ...


class Books(Judges[ItemT], Publishes[OutcomeT], Protocol[ItemT, LoadedT, OutcomeT]):
    """The work on the stream entries of one stream, from locks to Redis. See `apply_batch` for the order."""

    def load_for_update(
        self, postgres: Postgres, items: Sequence[ItemT | Refresh | Refused], *, skip_locked: bool
    ) -> LoadedT:
        """Lock and read the rows that the items change, in sorted order. `skip_locked` leaves out accounts in use."""
        ...

    def work_out(self, items: Sequence[ItemT | Refresh | Refused], loaded: LoadedT) -> OutcomeT:
        """Decide the whole batch, in order. Pure."""
        ...

    def append(self, postgres: Postgres, outcome: OutcomeT) -> None:
        """Write the rows that the batch adds."""
        ...

    def update(self, postgres: Postgres, outcome: OutcomeT) -> None:
        """Write the changes of the batch and its dead letters. Runs in a pipeline that ends with the COMMIT."""
        ...

    def count(self, tally: Tally, items: Sequence[ItemT | Refresh | Refused], outcome: OutcomeT) -> None:
        """Count what was committed of these items, beside the dead letters."""
        ...
