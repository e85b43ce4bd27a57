"""The values that one transaction of the ledger reads and writes. Pure: no statement, no connection."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from worker.rules.account import Account, Balance
from worker.rules.received import Refused


class Loaded(NamedTuple):
    """What a batch needs to know, read after its locks are held. `now` is the clock of the ledger.

    `closed` maps users whose accounts were closed for good to the names of their histories, and those names, which are
    no accounts, to themselves; the events of both are in `recorded` like all others. `in_use` are users whose accounts
    another transaction held.
    """

    now: datetime
    epoch: int
    accounts: dict[str, Account]
    recorded: dict[tuple[str, str], tuple[str, int, str]]
    closed: Mapping[str, str] = MappingProxyType({})
    in_use: frozenset[str] = frozenset()


class UsageRow(NamedTuple):
    """One row of the usage log, in the order of its columns. Times are ISO 8601 text."""

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
    period_start: str | None
    occurred_at: str
    applied_at: str
    clamped: bool
    source: str | None
    reference_id: str | None
    hold_key: str | None
    dimensions: str | None


class EntryRow(NamedTuple):
    """One ledger entry: a change that is not usage, with the balances after it."""

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
    detail: str
    created_at: datetime


class Changed(NamedTuple):
    """A balance after a batch, and what the batch adds to its lifetime counters."""

    user_id: str
    balance: Balance
    consumed: int
    granted: int


class Writes(NamedTuple):
    """All that one transaction writes.

    `moved` are balances whose buckets moved: user, meter, used, rollover, purchased, consumed, granted. `retermed` are
    those whose terms changed, too; `restated` are accounts whose plan, status or schedule changed.
    """

    usage: list[UsageRow]
    moved: list[tuple[str, str, int, int, int, int, int]]
    retermed: list[Changed]
    versions: list[tuple[str, int]]
    restated: list[Account]
    opened_accounts: list[Account]
    opened_balances: list[Changed]
    entries: list[EntryRow]
    refused: list[Refused]
    closed_holds: list[tuple[str, str]]

    @classmethod
    def none(cls) -> Writes:
        """Empty lists to be filled."""
        return cls([], [], [], [], [], [], [], [], [], [])
