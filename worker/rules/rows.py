"""The values that one transaction of the ledger reads and writes. Pure: no statement, no connection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

from config.catalogue import Draw
from worker.rules.account import Account, Balance
from worker.rules.limits import Limits
from worker.rules.received import Event, Refused
from worker.rules.waterfall import Split


class Loaded(NamedTuple):
    """What a batch needs to know, read after its locks are held. `now` is the clock of the ledger.

    `closed` maps users whose accounts were closed for good to the names of their histories, and those names, which are
    no accounts, to themselves; the events of both are in `recorded` like all others. `in_use` are users whose accounts
    another transaction held. `applied_at` says when each event in `recorded` was applied. `awaited` are
    stream entries that wait for a catalogue with their meter, and with them all later events of their accounts;
    `behind` are accounts with such entries in earlier batches.
    """

    now: datetime
    epoch: int
    accounts: dict[str, Account]
    recorded: dict[tuple[str, str], tuple[str, int, str]]
    closed: Mapping[str, str] = MappingProxyType({})
    in_use: frozenset[str] = frozenset()
    applied_at: Mapping[tuple[str, str], datetime] = MappingProxyType({})
    awaited: frozenset[str] = frozenset()
    behind: frozenset[str] = frozenset()


class AppliedEvent(NamedTuple):
    """An event for the usage log, and which bucket paid how many units. Times are ISO 8601 text.

    `amount` is the event's, with the unit that carried fractions completed.
    An event without an account has no `seq` and no period; its amount is `uncollected`. `remainder` are the millionths
    that are carried after the event; below zero, those by which it was rounded up; None if it has no fraction.
    `grants` are the units that it took of each grant, by key; None if it took none, or if no order gave them.
    `draw` has the wallet that paid and its price; amount, parts and remainder are then in units of that.
    """

    event: Event
    amount: int
    seq: int | None
    split: Split
    period_start: str | None
    remainder: int | None = None
    grants: Mapping[str, int] | None = None
    draw: Draw | None = None

    @property
    def uncollected(self) -> int:
        """The units that nobody pays."""
        return self.amount if self.seq is None else 0


class AppliedRun(NamedTuple):
    """Consecutive events of one user for the usage log, side by side with what became of each.

    A value for each event would cost more than to decide it. `first_seq` is that of the first event, None without an
    account. `splits` are in the order of the fields of `Split`. `grants` are those of the events that took from grants,
    by the place of the event, and so is `drawn`: which of them drew on a wallet. The others are as in `AppliedEvent`.
    """

    events: Sequence[Event]
    amounts: Sequence[int]
    splits: Sequence[tuple[int, int, int, int]]
    first_seq: int | None
    period_starts: Sequence[str | None]
    remainders: Sequence[int | None]
    grants: Mapping[int, Mapping[str, int]]
    drawn: Mapping[int, Draw] = MappingProxyType({})

    @property
    def seqs(self) -> Sequence[int | None]:
        """The sequence numbers of the events."""
        count, first = len(self.events), self.first_seq
        return [None] * count if first is None else range(first, first + count)

    def applied(self) -> Iterator[AppliedEvent]:
        """Yield each event by itself."""
        columns = (self.events, self.amounts, self.seqs, self.splits, self.period_starts, self.remainders)
        for at, (event, amount, seq, split, period_start, remainder) in enumerate(zip(*columns, strict=True)):
            yield AppliedEvent(
                event=event,
                amount=amount,
                seq=seq,
                split=Split(*split),
                period_start=period_start,
                remainder=remainder,
                grants=self.grants.get(at),
                draw=self.drawn.get(at),
            )


class UsageRow(NamedTuple):
    """A row of the usage log as it is read, in the order of its columns.

    Of an event of a meter that draws on a wallet, `amount`, parts and `remainder` are in units of the `wallet`, each
    unit of the meter at `price`.
    """

    user_id: str
    event_id: str
    seq: int | None
    meter: str
    quantity: int
    multiplier: str
    amount: int
    from_subscription: int
    from_rollover: int
    from_purchased: int
    overflow_to_debt: int
    uncollected: int
    period_start: datetime | None
    occurred_at: datetime
    applied_at: datetime
    clamped: bool
    source: str | None
    reference_id: str | None
    hold_key: str | None
    dimensions: dict[str, Any] | None
    remainder: int | None = None
    trace_id: str | None = None
    grants: dict[str, int] | None = None
    wallet: str | None = None
    price: str | None = None

    @property
    def payer(self) -> str:
        """The meter whose buckets paid."""
        return self.wallet or self.meter

    @property
    def backend(self) -> str | None:
        """The backend that did the work, if the event names it."""
        return backend_in(self.dimensions)


def backend_in(dimensions: Mapping[str, Any] | None) -> str | None:
    """Return the backend that an event names in its dimensions, if any."""
    backend = dimensions.get("backend") if dimensions else None
    return backend if isinstance(backend, str) else None


class EntryRow(NamedTuple):
    """One ledger entry: a change that is not usage, with the balances after it, who made it and why.

    `detail` is stored as JSON: times in it are ISO 8601 text when it is read. The system's own changes, and entries
    older than the columns, have neither actor nor reason.
    """

    user_id: str
    seq: int
    entry_key: str
    meter: str
    kind: str
    used_change: int
    rollover_change: int
    purchased_change: int
    used_after: int
    rollover_after: int
    purchased_after: int
    detail: Mapping[str, Any]
    created_at: datetime
    actor: str | None
    reason: str | None


class Changed(NamedTuple):
    """A balance after a batch, and what the batch adds to its lifetime counters."""

    user_id: str
    balance: Balance
    consumed: int
    granted: int


class Moved(NamedTuple):
    """A balance of which only the buckets changed, and the units that the batch adds to its lifetime counters.

    The order of the fields is that of the statement that stores them.
    """

    user_id: str
    meter: str
    used: int
    rollover: int
    purchased: int
    carried: int
    consumed: int
    granted: int


class Limited(NamedTuple):
    """The limits of a balance after a change of them, or after a window opened; None: there are none any more."""

    user_id: str
    meter: str
    limits: Limits | None


class LateRepeat(NamedTuple):
    """An event that came again `times` times after its outcome was forgotten, the last time at `last_at`."""

    user_id: str
    event_id: str
    times: int
    last_at: datetime


class Notice(NamedTuple):
    """Something to tell, once for each `user_id`, `rule`, `meter`, `period` and `times`.

    A notice for operators has user "", one about a whole account meter "". `period` names a period of the balance by
    its start, or else what the notice is about. It is due at `due_at`; a grant's end is told in advance. `data` are
    facts beside these, as JSON takes them.
    """

    user_id: str
    meter: str
    kind: str
    rule: str
    period: str
    times: int
    created_at: datetime
    due_at: datetime
    data: Mapping[str, Any]

    @property
    def notice_id(self) -> str:
        """Return its id, by which receivers know a repeat: the same facts have the same id, also after a restore."""
        identity = "\x1f".join((self.user_id, self.rule, self.meter, self.period, str(self.times)))
        return f"ntc_{sha256(identity.encode()).hexdigest()[:32]}"


class Crossing(NamedTuple):
    """A line that a balance reached, or has really recovered from; see worker/rules/notices.py.

    `told` is the notice of a line reached, or None for a recovery of which nothing is told.
    """

    user_id: str
    meter: str
    rule: str
    period: str
    is_reached: bool
    told: Notice | None


class Alarm(NamedTuple):
    """A line that was told: in which `period`, how many `times` in it, and whether it `is_open`: not recovered from."""

    period: str
    times: int
    is_open: bool


class Writes(NamedTuple):
    """All that one transaction writes.

    `moved` are balances whose buckets moved. `retermed` are
    those whose terms changed, too; `restated` are accounts whose plan, status or schedule changed. `limits` are those
    that changed otherwise than by an event. `repeats` are known events that came again late, in the order of users and
    events. `crossings` are lines that balances reached or left: whether they are told, the ledger knows.
    """

    usage: list[AppliedRun]
    moved: list[Moved]
    retermed: list[Changed]
    versions: list[tuple[str, int]]
    restated: list[Account]
    opened_accounts: list[Account]
    opened_balances: list[Changed]
    entries: list[EntryRow]
    refused: list[Refused]
    closed_holds: list[tuple[str, str]]
    repeats: list[LateRepeat]
    limits: list[Limited]
    notices: list[Notice]
    crossings: list[Crossing]

    @classmethod
    def none(cls) -> Writes:
        """Empty lists to be filled."""
        return cls(
            usage=[],
            moved=[],
            retermed=[],
            versions=[],
            restated=[],
            opened_accounts=[],
            opened_balances=[],
            entries=[],
            refused=[],
            closed_holds=[],
            repeats=[],
            limits=[],
            notices=[],
            crossings=[],
        )


def together(parts: Iterable[Writes]) -> Writes:
    """Return what several batches with different accounts write, as one transaction writes it."""
    whole = Writes(*(list(chain.from_iterable(rows)) for rows in zip(*parts, strict=True)))
    whole.repeats.sort()
    return whole
