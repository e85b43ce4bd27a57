"""The effect of a batch of stream entries on its accounts. Pure: rows in, rows out.

The drain reads and locks, this module decides, the ledger writes, and the drain publishes to Redis afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from itertools import takewhile
from typing import Any, NamedTuple

from config.catalogue import Catalogue, Draw
from schemas.events import MAX_AMOUNT, Refusal
from worker.rules.account import Account, Balance, Change, sub_meter
from worker.rules.entry_times import stream_time
from worker.rules.fractions import MILLIONTHS, with_carried
from worker.rules.history import granted_by, is_restated, open_for_good, record
from worker.rules.lifecycle import bring_up_to_date, first_change, open_account, open_late
from worker.rules.notices import Watch, tell_change, tell_refusals, tell_usage
from worker.rules.periods import opened_meter
from worker.rules.received import Event, Received, Refresh, Refused
from worker.rules.rows import AppliedRun, Changed, Limited, Loaded, Moved, Writes, backend_in
from worker.rules.wallets import cost_in_millionths, drawn_units, draws_of, wallet_of
from worker.rules.waterfall import shares

_NOBODY_PAYS = (0, 0, 0, 0)


class Disposal(NamedTuple):
    """The publication of one user: stream entries to delete, ids that leave pending, the balance if any."""

    user_id: str
    entries: list[str]
    ids: dict[str, list[str]]
    account: Account | None
    closed_holds: list[Event]


class Outcome(NamedTuple):
    """The outcome of a batch: rows for the ledger, and a publication for Redis after the COMMIT.

    `waiting` are users whose events stay in the stream, from the first one on that waits for a catalogue; `waits` is
    the number of these stream entries.
    """

    loaded: Loaded
    writes: Writes
    disposals: list[Disposal]
    loose_entries: list[str]
    waiting: frozenset[str] = frozenset()
    waits: int = 0

    @property
    def refused(self) -> list[Refused]:
        """The dead letters of the batch."""
        return self.writes.refused

    @property
    def disposed(self) -> int:
        """The number of stream entries that the batch disposes of."""
        return len(self.loose_entries) + sum(len(disposal.entries) for disposal in self.disposals)

    @property
    def in_use(self) -> frozenset[str]:
        """Users with accounts that another transaction held: their stream entries stay."""
        return self.loaded.in_use


def users_of(received: Sequence[Received]) -> list[str]:
    """Return the users of the batch in the lock order of their accounts."""
    return sorted({item.user_id for item in received if not isinstance(item, Refused)})


def identities_of(received: Sequence[Received]) -> tuple[list[str], list[str]]:
    """Return the users and the ids of the batch's events, side by side."""
    events = [item for item in received if isinstance(item, Event)]
    return [event.user_id for event in events], [event.event_id for event in events]


def refusal_of(event: Event, reason: Refusal, detail: str) -> Refused:
    """Return the dead letter of an event that is well formed, but cannot be applied."""
    owner = (event.user_id, event.meter, event.event_id) if event.marked else None
    return Refused(
        event.entry_id, reason, detail, event.payload, len(event.payload), owner, event.signed_by,
        traceparent=event.traceparent, capped_backend=event.capped_backend,
    )  # fmt: skip


def work_out(
    received: Sequence[Received],
    loaded: Loaded,
    catalogue: Catalogue,
    default_plan: str | None,
    capped_backends: Mapping[str, tuple[str, ...]] | None = None,
) -> Outcome:
    """Decide the whole batch, in order: duplicates, conflicts, payments, new balances.

    `capped_backends` are those against which pending ids may count, by default the catalogue's.
    Touches only its arguments' values; the same batch against the same `loaded` gives the same outcome.
    """
    capped = catalogue.capped_backends if capped_backends is None else capped_backends
    read = len(received)
    received, waiting = without_waiting(received, loaded)
    outcome = Outcome(
        loaded=loaded, writes=Writes.none(), disposals=[], loose_entries=[], waiting=waiting, waits=read - len(received)
    )
    by_user: dict[str, list[Event]] = {}
    watch = Watch(catalogue)
    disposals: dict[str, Disposal] = {}
    for item in _free(received, loaded.in_use):
        if isinstance(item, Event):
            by_user.setdefault(item.user_id, []).append(item)
        elif isinstance(item, Refresh):
            by_user.setdefault(item.user_id, [])
            _disposal(disposals, item.user_id).entries.append(item.entry_id)
        else:
            _refuse(item, outcome, disposals, capped)

    for user_id, events in by_user.items():
        account = loaded.accounts.get(user_id)
        if account is None and default_plan is not None and events and user_id not in loaded.closed:
            opened_at = stream_time(events[0].entry_id, loaded.now)
            account = open_account(catalogue, user_id, default_plan, "active", opened_at)
            first = {meter: balance.allowance for meter, balance in account.balances.items() if balance.allowance}
            account = open_for_good(outcome.writes, account, loaded.now, seeded=first)
        fresh = _drop_known(events, loaded, outcome)
        if account is None:
            if fresh:
                outcome.writes.usage.append(_uncollected(fresh, loaded.closed.get(user_id)))
        else:
            account = _apply(account, fresh, loaded.now, catalogue, outcome.writes, watch)
        disposal = _disposal(disposals, user_id, account)
        entries, ids = disposal.entries, disposal.ids
        for event in events:
            entries.append(event.entry_id)
            if event.marked:
                _unpend(ids, capped, event.meter, "e:" + event.event_id, event.capped_backend)
            if event.hold_key is not None:
                outcome.writes.closed_holds.append((user_id, event.hold_key))
                if not event.marked:  # our scripts closed the hold when they appended the event
                    _unpend(ids, capped, event.meter, "h:" + event.hold_key)
                    disposal.closed_holds.append(event)

    if outcome.writes.refused:
        tell_refusals(outcome.writes, loaded.now)
    outcome.disposals.extend(disposals.values())
    return outcome


def _free(received: Sequence[Received], in_use: frozenset[str]) -> Sequence[Received]:
    """Return the items without those of accounts in use."""
    return (
        [item for item in received if isinstance(item, Refused) or item.user_id not in in_use] if in_use else received
    )


def without_waiting(received: Sequence[Received], loaded: Loaded) -> tuple[Sequence[Received], frozenset[str]]:
    """Return the items without those that wait for a catalogue, and the users of these.

    The order of an account's events stays: after one that waits, all wait. A refresh carries no order.
    """
    if not loaded.awaited and not loaded.behind:
        return received, frozenset()
    waiting, kept = set(loaded.behind), list[Received]()
    for item in received:
        if isinstance(item, Refused) and item.lacks is not None and item.entry_id in loaded.awaited:
            waiting.add(item.lacks[0])
        elif not (isinstance(item, Event) and item.user_id in waiting):
            kept.append(item)
    return kept, frozenset(waiting)


def _drop_known(events: list[Event], loaded: Loaded, outcome: Outcome) -> list[Event]:
    """Return the events not recorded yet, in order.

    Safe under the account lock: no other transaction records them meanwhile.
    """
    if not loaded.recorded and len({event.event_id for event in events}) == len(events):
        return events
    fresh: dict[str, Event] = {}
    for event in events:
        event_id = event.event_id
        earlier = fresh.get(event_id)
        known = loaded.recorded.get((event.user_id, event_id)) if loaded.recorded else None
        if known is None and earlier is None:
            fresh[event_id] = event
            continue
        first = known or fingerprint_of(earlier or event)
        if first != fingerprint_of(event):
            detail = f"event_id: recorded with meter {first[0]}, quantity {first[1]}, multiplier {first[2]}"
            outcome.writes.refused.append(refusal_of(event, Refusal.ID_CONFLICT, detail))
    return list(fresh.values())


def fingerprint_of(event: Event) -> tuple[str, int, str]:
    """Return the facts that two events of one identity share if they are the same event."""
    return event.meter, event.quantity, event.multiplier


def _apply(
    account: Account, events: list[Event], now: datetime, catalogue: Catalogue, writes: Writes, watch: Watch
) -> Account:
    """Take the events from the account's buckets, one after the other, each in the period of its stream time.

    Of the calendar it crosses boundaries of meters that the events use: a check computes the others, and the job
    `renew_due` stores them.
    """
    entries = len(writes.entries)
    after, used = _take(account, events, now, catalogue, writes)
    if len(writes.entries) > entries:
        tell_change(writes, watch, account, after, writes.entries[entries:], now)
    elif events and not watch.is_idle(after):
        tell_usage(writes, watch, account, after, used, now)
    return after


def charge(account: Account, events: list[Event], now: datetime, catalogue: Catalogue) -> tuple[Account, Writes]:
    """Take new events from an account as a batch does, and tell nobody; return the account and what would be written.

    A simulation asks for it. Each event counts at its stream time, by `now` at the latest.
    """
    writes = Writes.none()
    return _take(account, events, now, catalogue, writes)[0], writes


def _take(
    account: Account, events: list[Event], now: datetime, catalogue: Catalogue, writes: Writes
) -> tuple[Account, dict[str, None]]:
    """Take the events; return the account after them, and the meters that they moved."""
    tab = _Tab(account, writes, catalogue)
    used = {event.meter: None for event in events}
    if draws := draws_of(catalogue, account.plan, account.status):
        used |= dict.fromkeys(wallet for meter in used if (wallet := wallet_of(draws, meter)) is not None)
    rest = events
    if tab.is_settled_for(used, now, catalogue):
        tab.take(events)
        rest = []
    while rest:  # rare: until `now` the account changes by itself, or an event opens a meter
        first, at = rest[0], stream_time(rest[0].entry_id, now)
        tab.bring_up_to_date(first.meter, at, now, catalogue)
        run = list(takewhile(lambda event: tab.fits(event, now, catalogue), rest[1:]))
        tab.take([first, *run])
        rest = rest[1 + len(run) :]
    return tab.closed(), used


class _Tab:
    """One account while a batch takes its events from it, and what is to be written of it."""

    def __init__(self, account: Account, writes: Writes, catalogue: Catalogue) -> None:
        self._before = self._account = account
        self._writes = writes
        self._catalogue = catalogue
        self._consumed: dict[str, int] = {}
        self._has_crossed = False
        self._granted: dict[str, int] = {}
        self._retermed: set[str] = set()  # meters of which more than the buckets changed
        self._limited: set[str] = set()  # meters whose limits changed otherwise than by an event
        self._first_changes: dict[str, datetime | None] = {}  # of the account as it is now, by meter

    def is_settled_for(self, meters: Collection[str], at: datetime, catalogue: Catalogue) -> bool:
        """True if these meters are open and nothing of the account is due at `at`."""
        first = first_change(catalogue, self._account, meters)
        return (first is None or first > at) and all(meter in self._account.balances for meter in meters)

    def fits(self, event: Event, now: datetime, catalogue: Catalogue) -> bool:
        """True if nothing of the account changes by itself before this event, and its meter is open."""
        meter = event.meter
        if meter not in self._first_changes:
            meters = self._paying_for(meter, self._account)
            if any(each not in self._account.balances for each in meters):
                return False
            self._first_changes[meter] = first_change(catalogue, self._account, meters)
        first = self._first_changes[meter]
        return first is None or first > stream_time(event.entry_id, now)

    def bring_up_to_date(self, meter: str, at: datetime, now: datetime, catalogue: Catalogue) -> None:
        """Apply what is due at `at`, and open a first period of `meter` if the account has never used it.

        `now` is the clock of the ledger, for the entries.
        """
        self._has_crossed = True
        before = self._account
        # No wallet yet: the event uses none that its meter drew on before a change of plan or status that is due.
        current, steps = bring_up_to_date(catalogue, before, at, [meter])
        current = self._recorded(current, steps, now)
        opened = []
        for each in self._paying_for(meter, current):  # its plan may have changed by then
            if each not in current.balances:
                # Never before the account began: a producer may choose the id of an entry.
                begun = min((balance.period_start for balance in current.balances.values()), default=at)
                late = open_late(catalogue, current, each, max(at, begun))
                current = current._replace(balances={**current.balances, each: late})
                opened.append(opened_meter(late))
        current = self._recorded(current, opened, now)
        # What is due of the wallet that pays now: its calendar, and the windows of its limits.
        current, steps = bring_up_to_date(catalogue, current, at, self._paying_for(meter, current))
        current = self._recorded(current, steps, now)
        for name, balance in current.balances.items():
            known = before.balances.get(name)
            if balance is known:
                continue
            if name not in self._before.balances:
                self._consumed.setdefault(name, 0)
            elif balance != known:
                self._retermed.add(name)
            if balance.limits != (None if known is None else known.limits):
                self._limited.add(name)
        self._become(current)

    def _recorded(self, account: Account, steps: Sequence[Change], now: datetime) -> Account:
        """Write an entry for each step that led to `account`; return it at its new version."""
        for name, units in granted_by(steps).items():
            self._granted[name] = self._granted.get(name, 0) + units
        return record(self._writes, account, steps, now)

    def _paying_for(self, meter: str, account: Account) -> list[str]:
        """Return the meters that events of `meter` move: itself, and the wallet that it draws on."""
        wallet = wallet_of(draws_of(self._catalogue, account.plan, account.status), meter)
        return [meter] if wallet is None or wallet == meter else [meter, wallet]

    def _payable(self, events: list[Event], draws: Mapping[str, Draw]) -> list[Event]:
        """Return the events without those that cost a wallet more than any event may; these are refused."""
        kept = []
        for event in events:
            draw = draws.get(event.meter)
            most = MAX_AMOUNT * MILLIONTHS
            if draw is not None and cost_in_millionths(event.quantity, event.multiplier, draw.price) > most:
                detail = f"quantity × multiplier × price {draw.price}: at most {MAX_AMOUNT} of {draw.wallet}"
                self._writes.refused.append(refusal_of(event, Refusal.AMOUNT_OUT_OF_RANGE, detail))
            else:
                kept.append(event)
        return kept

    def _become(self, account: Account) -> None:
        self._account = account
        self._first_changes.clear()

    def take(self, events: list[Event]) -> None:
        """Take the events, in order, from periods that are open."""
        draws = draws_of(self._catalogue, self._account.plan, self._account.status)
        if draws:
            events = self._payable(events, draws)
        if not events:
            return
        balances = dict(self._account.balances)
        version, status = self._account.version, self._account.status
        purses: dict[str, _Purse] = {}
        amounts: list[int] = []
        splits: list[tuple[int, int, int, int]] = []
        period_starts: list[str] = []
        remainders: list[int | None] = []
        grants: dict[int, Mapping[str, int]] = {}
        drawn: dict[int, Draw] = {}
        for event in events:
            meter, amount, remainder = event.meter, event.amount, event.remainder or None
            purse = purses.get(meter)
            if purse is None:
                purse = purses[meter] = _Purse(balances[meter], status)
            draw = draws.get(meter) if draws else None
            if draw is not None:
                amount, left = drawn_units(event.quantity, event.multiplier, draw.price)
                remainder = left or None
            if remainder is not None and remainder > 0:  # what was rounded up carries nothing
                amount, remainder = with_carried(amount, remainder, purse.carried)
                purse.carried = remainder
            if draw is not None:
                drawn[len(splits)], wallet = draw, draw.wallet
                purse = purses.get(wallet)
                if purse is None:
                    purse = purses[wallet] = _Purse(balances[wallet], status)
                purse.count_meter(meter, amount)
            elif purse.is_capped:
                purse.count_backend(event, amount)
            split = purse.pay(amount)
            if purse.grants is not None and (from_purchased := split[2]):
                grants[len(splits)] = purse.take_grants(from_purchased)
            splits.append(split)
            amounts.append(amount)
            period_starts.append(purse.period_start)
            remainders.append(remainder)
        self._writes.usage.append(
            AppliedRun(
                events=events,
                amounts=amounts,
                splits=splits,
                first_seq=version + 1,
                period_starts=period_starts,
                remainders=remainders,
                grants=grants,
                drawn=drawn,
            )
        )
        version += len(events)
        for meter, purse in purses.items():
            if purse.is_capped or purse.grants is not balances[meter].grants:
                self._retermed.add(meter)
            balances[meter] = purse.balance_after()
            self._consumed[meter] = self._consumed.get(meter, 0) + purse.consumed
        self._become(self._account._replace(version=version, balances=balances))

    def closed(self) -> Account:
        """Write what became of the account; return it."""
        before, after, writes = self._before, self._account, self._writes
        for meter in sorted(self._retermed | self._consumed.keys()):
            balance, consumed = after.balances[meter], self._consumed.get(meter, 0)
            if meter not in before.balances or meter in self._retermed:
                rows = writes.retermed if meter in before.balances else writes.opened_balances
                granted = self._granted.get(meter, 0)
                rows.append(Changed(user_id=after.user_id, balance=balance, consumed=consumed, granted=granted))
            else:
                writes.moved.append(
                    Moved(
                        user_id=after.user_id,
                        meter=meter,
                        used=balance.used,
                        rollover=balance.rollover,
                        purchased=balance.purchased,
                        carried=balance.carried,
                        consumed=consumed,
                        granted=0,
                    )
                )
        for meter in sorted(self._limited):
            writes.limits.append(Limited(after.user_id, meter, after.balances[meter].limits))
        if self._has_crossed and is_restated(before, after):
            writes.restated.append(after)
        if after.version > before.version:
            writes.versions.append((after.user_id, after.version))
        return after


class _Purse:
    """The buckets of one balance while events are taken from them. `consumed` are the units so far."""

    __slots__ = (
        "_balance", "_limit", "_purchased", "_rollover", "_spill", "_used", "carried", "consumed", "grants",
        "is_capped", "period_start",
    )  # fmt: skip

    def __init__(self, balance: Balance, status: str) -> None:
        self._balance = balance
        self._limit, self._spill = balance.limit(status), balance.spill
        self._used, self._rollover, self._purchased = balance.used, balance.rollover, balance.purchased
        self.carried, self.grants = balance.carried, balance.grants
        self.period_start = balance.counted_from.isoformat()
        self.is_capped = balance.caps is not None
        self.consumed = 0

    def pay(self, amount: int) -> tuple[int, int, int, int]:
        """Take units; return how many each bucket paid, in the order of `Split`."""
        split = shares(self._limit, self._used, self._rollover, self._purchased, self._spill, amount)
        subscription, from_rollover, from_purchased, debt = split
        self._used += subscription
        if subscription != amount:
            self._rollover -= from_rollover + debt
            self._purchased -= from_purchased
        self.consumed += amount
        return split

    def take_grants(self, units: int) -> Mapping[str, int]:
        """Take units that came from purchased from the grants; return how many each gave, by key."""
        assert self.grants is not None
        left, taken = self.grants.take(units)
        self.grants = left.packed()
        return taken

    def count_backend(self, event: Event, amount: int) -> None:
        """Count the event against the sub-cap of its backend."""
        cap_used = count_backend(_decoded(event.dimensions), amount, self._balance)
        self._balance = self._balance._replace(cap_used=cap_used)

    def count_meter(self, meter: str, amount: int) -> None:
        """Count units that a meter draws on this wallet. The row is then written whole, as that of sub-caps."""
        self.is_capped = True
        self._balance = self._balance._replace(cap_used=count_meter(meter, amount, self._balance))

    def balance_after(self) -> Balance:
        """Return the balance with what is left."""
        balance = self._balance
        return balance._replace(
            used=self._used,
            rollover=self._rollover,
            purchased=self._purchased,
            carried=self.carried,
            grants=self.grants,
            limits=None if balance.limits is None else balance.limits.spent(self.consumed),
        )


def count_backend(dimensions: Mapping[str, Any] | None, amount: int, balance: Balance) -> Mapping[str, int] | None:
    """Return the usage of the sub-caps of `balance` after an event with these dimensions."""
    if balance.caps is None:
        return balance.cap_used
    backend = backend_in(dimensions)
    if backend is None or backend not in balance.caps:
        return balance.cap_used
    cap_used = balance.cap_used or {}
    return {**cap_used, backend: cap_used.get(backend, 0) + amount}


def count_meter(meter: str, amount: int, balance: Balance) -> Mapping[str, int]:
    """Return the usage of the wallet `balance` by meter, after units that a meter drew, capped or not."""
    cap_used = balance.cap_used or {}
    return {**cap_used, meter: cap_used.get(meter, 0) + amount}


def _decoded(dimensions: str | None) -> dict[str, Any] | None:
    """Return the dimensions of an event, which come as JSON."""
    return json.loads(dimensions) if dimensions else None


def _uncollected(events: list[Event], history: str | None) -> AppliedRun:
    """Return the rows of events without an account: recorded in full, paid by no bucket, their fractions dropped.

    After the closing of the account, they join that account's `history`, without personal data.
    """
    if history is not None:
        events = [
            event._replace(user_id=history, reference_id=None, hold_key=None, dimensions=None, traceparent=None)
            for event in events
        ]
    return AppliedRun(
        events=events,
        amounts=[event.amount for event in events],
        splits=[_NOBODY_PAYS] * len(events),
        first_seq=None,
        period_starts=[None] * len(events),
        remainders=[min(event.remainder, 0) or None for event in events],
        grants={},
    )


def _refuse(
    refused: Refused, outcome: Outcome, disposals: dict[str, Disposal], capped: Mapping[str, tuple[str, ...]]
) -> None:
    outcome.writes.refused.append(refused)
    if refused.owner is None:
        outcome.loose_entries.append(refused.entry_id)
        return
    user_id, meter, event_id = refused.owner
    disposal = _disposal(disposals, user_id)
    disposal.entries.append(refused.entry_id)
    _unpend(disposal.ids, capped, meter, "e:" + event_id, refused.capped_backend)


def _unpend(
    ids: dict[str, list[str]],
    capped: Mapping[str, tuple[str, ...]],
    meter: str,
    pending_id: str,
    backend: str | None = None,
) -> None:
    """Take an id out of pending, and out of the meter's sub-caps, against which it may count.

    It counts against that of `backend`, though perhaps only the producer's catalogue has it.
    """
    ids.setdefault(meter, []).append(pending_id)
    known = capped.get(meter, ())
    if known or backend is not None:
        for each in known if backend is None or backend in known else (*known, backend):
            ids.setdefault(sub_meter(meter, each), []).append(pending_id)


def _disposal(disposals: dict[str, Disposal], user_id: str, account: Account | None = None) -> Disposal:
    """Return the disposal of a user, with this account if there is one; made at its first use."""
    disposal = disposals.get(user_id)
    if disposal is None:
        disposal = Disposal(user_id=user_id, entries=[], ids={}, account=account, closed_holds=[])
    elif account is not None:
        disposal = disposal._replace(account=account)
    disposals[user_id] = disposal
    return disposal
