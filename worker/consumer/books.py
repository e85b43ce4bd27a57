"""The books: what the entries of one stream mean. One protocol; the books of usage and those of the pool keep to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from schemas.events import Refusal
from worker.keyspace.entries import RawEntry
from worker.ledger.connection import Postgres
from worker.rules.received import Refresh, Refused


class Item(Protocol):
    """A stream entry that carries work: an event, a grant, a credit."""

    @property
    def entry_id(self) -> str: ...


class Outcome(Protocol):
    """A batch worked out: what it writes, and what Redis is told after the COMMIT."""

    @property
    def refused(self) -> Sequence[Refused]:
        """The dead letters of the batch."""
        ...

    @property
    def in_use(self) -> frozenset[str]:
        """Users whose accounts another transaction held: their entries stay in the stream."""
        ...


ItemT = TypeVar("ItemT", bound=Item)
LoadedT = TypeVar("LoadedT")
OutcomeT = TypeVar("OutcomeT", bound=Outcome)
PublishedT = TypeVar("PublishedT", contravariant=True)


class Judges(Protocol[ItemT]):
    """Judges single entries."""

    def judge(self, entries: Sequence[RawEntry]) -> Iterable[ItemT | Refresh | Refused]:
        """One item for each entry, in order. Never raises: an invalid entry becomes a `Refused`."""
        ...

    def is_recorded(self, postgres: Postgres, item: ItemT) -> bool:
        """True when the item was applied before."""
        ...

    def refuse(self, item: ItemT, reason: Refusal, detail: str) -> Refused:
        """The dead letter of an item that is well formed, but cannot be applied."""
        ...


class Publishes(Protocol[PublishedT]):
    """Tells Redis what was committed."""

    def publish(self, outcome: PublishedT, taken_ms: int) -> None:
        """Balances appear, ids leave pending, entries leave the stream.

        At `taken_ms` on the clock of Redis nothing of the outcome had been read from Postgres. Safe to repeat. Killed
        in between, the rest is found in the stream, is known, and is published then.
        """
        ...


class Books(Judges[ItemT], Publishes[OutcomeT], Protocol[ItemT, LoadedT, OutcomeT]):
    """What the entries of one stream do, from their locks to what Redis shows. See `apply_batch` for the order."""

    def load_for_update(
        self, postgres: Postgres, items: Sequence[ItemT | Refresh | Refused], *, skip_locked: bool
    ) -> LoadedT:
        """Lock what the items change, in sorted order, and read it. `skip_locked` leaves out accounts in use."""
        ...

    def work_out(self, items: Sequence[ItemT | Refresh | Refused], loaded: LoadedT) -> OutcomeT:
        """Decide the whole batch, in order. Pure."""
        ...

    def append(self, postgres: Postgres, outcome: OutcomeT) -> None:
        """Write the rows that the batch adds."""
        ...

    def update(self, postgres: Postgres, outcome: OutcomeT) -> None:
        """Write what the batch changes, and its dead letters. Runs in a pipeline that ends with the COMMIT."""
        ...
