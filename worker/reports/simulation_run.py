"""The walk of one account through its history, as it was and under another catalogue, side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from typing import NamedTuple, TypeGuard

from worker.reports.proof import Replayed, replay
from worker.rules.rows import EntryRow, UsageRow
from worker.rules.simulation import Charged, Question, Simulated, moment_of

# Events that are charged together.
_CHUNK = 500


class Billed(NamedTuple):
    """An event of the window: as its `row` says, and as it was `charged` under the other catalogue.

    `sign` is -1 for an event of the window that is reversed in it. `plan` is the plan that the account really had.
    `charged` is None if a wallet would refuse the event.
    """

    sign: int
    plan: str
    row: UsageRow
    charged: Charged | None


class Walk:
    """One account: what it was (`real`), and from the start of the window on what it would be (`simulated`)."""

    def __init__(self, question: Question, user_id: str, reversed_events: Collection[str]) -> None:
        self._question = question
        self._reversed = frozenset(reversed_events)
        self._kept: dict[str, Billed] = {}
        self.real = Replayed.nothing(user_id)
        self.simulated: Simulated | None = None

    def billed(self, rows: Iterable[EntryRow | UsageRow]) -> Iterator[Billed]:
        """Go through all rows of the account up to the end of the window, and yield its events of the window."""
        for _, together in groupby(rows, key=_transaction):
            part = list(together)
            if _are_events(part):
                yield from self._charge(part)
            elif _are_entries(part):
                opening = list(takewhile(_is_of_opening, part)) if part[0].kind == "open" else []
                self._open(opening)
                yield from self._meet(part[len(opening) :])

    def _charge(self, rows: Sequence[UsageRow]) -> Iterator[Billed]:
        """Charge events of one moment."""
        if rows[0].applied_at < self._question.since:
            for row in rows:
                self._replay(row)
            return
        simulated, account = self._begun(), self.real.account
        in_force = self._question.in_force(rows[0].applied_at)
        used = {(row.meter, row.payer) for row in rows}
        moments = {pair: moment_of(in_force, account, {*pair}, rows[0].applied_at) for pair in used}
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            charged = simulated.take(part, [moments[row.meter, row.payer] for row in part])
            for row, paid in zip(part, charged, strict=True):
                self._replay(row)
                billed = Billed(1, account.plan, row, paid)
                if row.event_id in self._reversed:
                    self._kept[row.event_id] = billed
                yield billed

    def _open(self, rows: Sequence[EntryRow]) -> None:
        """Open the account as these entries did, if there are any."""
        for row in rows:
            self._replay(row)
        if rows and rows[0].created_at >= self._question.since:
            self.simulated = Simulated.opened(self._question, self.real.account, rows, self._reversed)

    def _meet(self, rows: Sequence[EntryRow]) -> Iterator[Billed]:
        """Meet the entries of one transaction."""
        if not rows or rows[0].created_at < self._question.since:
            for row in rows:
                self._replay(row)
            return
        simulated = self._begun()
        before = []
        for row in rows:
            before.append(self.real.account)
            self._replay(row)
        real = self.real.account
        moment = moment_of(self._question.in_force(rows[0].created_at), real, None, rows[0].created_at)
        rest = deque(rows)
        for account in before:
            row = rest.popleft()
            simulated.meet(row, account, rest, moment)
            if row.kind == "reversal" and (billed := self._kept.pop(row.detail["event_id"], None)):
                yield billed._replace(sign=-1)

    def _begun(self) -> Simulated:
        """Return the simulated account, which begins as the real one is now."""
        if self.simulated is None:
            real = self.real
            self.simulated = Simulated(self._question, real.account, real.purchases, real.made, self._reversed)
        return self.simulated

    def _replay(self, row: EntryRow | UsageRow) -> None:
        deque(replay(self.real, row), maxlen=0)  # what breaks the rules is the business of `verify`


def _transaction(row: EntryRow | UsageRow) -> tuple[bool, object]:
    """Return what the rows of one transaction share: events and entries, each by their moment."""
    return (True, row.applied_at) if isinstance(row, UsageRow) else (False, row.created_at)


def _is_of_opening(row: EntryRow) -> bool:
    """True for the first entries of an account: of itself, and of the meters that it has from the start."""
    return (row.kind == "open" and row.meter == "") or (row.kind == "open_meter" and row.entry_key == "open")


def _are_events(rows: Sequence[EntryRow | UsageRow]) -> TypeGuard[Sequence[UsageRow]]:
    return isinstance(rows[0], UsageRow)


def _are_entries(rows: Sequence[EntryRow | UsageRow]) -> TypeGuard[Sequence[EntryRow]]:
    return isinstance(rows[0], EntryRow)
