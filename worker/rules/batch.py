"""The effect of a batch of stream entries on its accounts. Pure: rows in, rows out.

The drain reads and locks, this module decides, the ledger writes, and the drain publishes to Redis afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from config.catalogue import Catalogue
from schemas.events import Refusal
from worker.rules.account import Account, Balance, sub_meter
from worker.rules.history import about, open_for_good, record
from worker.rules.lifecycle import bring_up_to_date, is_due, open_account
from worker.rules.periods import open_balance, opened_meter
from worker.rules.received import Event, Received, Refresh, Refused
from worker.rules.rows import AppliedEvent, Changed, Loaded, Moved, Writes, backend_in
from worker.rules.waterfall import Buckets, Split, pay

_NOBODY_PAYS = Split(from_subscription=0, from_rollover=0, from_purchased=0, overflow_to_debt=0)


class Disposal(NamedTuple):
    """The publication of one user: stream entries to delete, ids that leave pending, the balance if any."""

    user_id: str
    entries: list[str]
    ids: dict[str, list[str]]
    account: Account | None
    closed_holds: list[Event]


class Outcome(NamedTuple):
    """The outcome of a batch: rows for the ledger, and a publication for Redis after the COMMIT."""

    loaded: Loaded
    writes: Writes
    disposals: list[Disposal]
    loose_entries: list[str]

    @property
    def refused(self) -> list[Refused]:
        """The dead letters of the batch."""
        return self.writes.refused

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
    return Refused(event.entry_id, reason, detail, event.payload, len(event.payload), owner, event.signed_by)


def work_out(received: Sequence[Received], loaded: Loaded, catalogue: Catalogue, default_plan: str | None) -> Outcome:
    """Decide the whole batch, in order: duplicates, conflicts, payments, new balances.

    Touches only its arguments' values; the same batch against the same `loaded` gives the same outcome.
    """
    outcome = Outcome(loaded=loaded, writes=Writes.none(), disposals=[], loose_entries=[])
    applied_at = loaded.now.isoformat()
    by_user: dict[str, list[Event]] = {}
    disposals: dict[str, Disposal] = {}
    for item in _free(received, loaded.in_use):
        if isinstance(item, Event):
            by_user.setdefault(item.user_id, []).append(item)
        elif isinstance(item, Refresh):
            by_user.setdefault(item.user_id, [])
            _disposal(disposals, item.user_id).entries.append(item.entry_id)
        else:
            _refuse(item, outcome, disposals, catalogue)

    for user_id, events in by_user.items():
        account = loaded.accounts.get(user_id)
        if account is None and default_plan is not None and events and user_id not in loaded.closed:
            account = open_account(catalogue, user_id, default_plan, "active", loaded.now)
            account = open_for_good(outcome.writes, account, loaded.now)
        fresh = _drop_known(events, loaded, outcome)
        if account is None:
            history = loaded.closed.get(user_id)
            outcome.writes.usage.extend(_uncollected(event, applied_at, history) for event in fresh)
        else:
            account = _apply(account, fresh, loaded.now, applied_at, catalogue, outcome.writes)
        disposal = _disposal(disposals, user_id)
        for event in events:
            disposal.entries.append(event.entry_id)
            if event.marked:
                _unpend(disposal, catalogue, event.meter, "e:" + event.event_id)
            if event.hold_key is not None:
                outcome.writes.closed_holds.append((user_id, event.hold_key))
                if not event.marked:  # our scripts closed the hold when they appended the event
                    _unpend(disposal, catalogue, event.meter, "h:" + event.hold_key)
                    disposal.closed_holds.append(event)
        disposals[user_id] = disposal._replace(account=account)

    outcome.disposals.extend(disposals.values())
    return outcome


def _free(received: Sequence[Received], in_use: frozenset[str]) -> Sequence[Received]:
    """Return the items without those of accounts in use."""
    return (
        [item for item in received if isinstance(item, Refused) or item.user_id not in in_use] if in_use else received
    )


def _drop_known(events: list[Event], loaded: Loaded, outcome: Outcome) -> list[Event]:
    """Return the events not recorded yet, in order.

    Safe under the account lock: no other transaction records them meanwhile.
    """
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
    account: Account, events: list[Event], now: datetime, applied_at: str, catalogue: Catalogue, writes: Writes
) -> Account:
    """Apply due boundaries, then take the events from the account's buckets, one after the other.

    `applied_at` is `now` as text. It crosses boundaries of meters that the events use: a check computes the others, and
    the job `renew_due` stores them.
    """
    user_id, first_version = account.user_id, account.version
    used_meters = {event.meter: None for event in events}
    retermed: set[str] = set()
    if is_due(account, now, used_meters) or not used_meters.keys() <= account.balances.keys():
        account, retermed = _bring_up_to_date(account, used_meters, now, catalogue, writes)
    balances = dict(account.balances)
    version, status = account.version, account.status
    buckets: dict[str, Buckets] = {}
    consumed: dict[str, int] = dict.fromkeys(retermed, 0)
    started: dict[str, str] = {}
    capped: set[str] = set()
    for event in events:
        meter = event.meter
        buckets_before = buckets.get(meter)
        if buckets_before is None:
            balance = balances[meter]
            buckets_before = balance.buckets(status)
            consumed[meter] = 0
            started[meter] = balance.period_start.isoformat()
            if balance.caps is not None:
                capped.add(meter)
        buckets[meter], split = pay(buckets_before, event.amount)
        consumed[meter] += event.amount
        if meter in capped:
            balances[meter] = balances[meter]._replace(
                cap_used=count_backend(_decoded(event.dimensions), event.amount, balances[meter])
            )
        version += 1
        writes.usage.append(
            AppliedEvent(
                event=event,
                seq=version,
                split=split,
                uncollected=0,
                period_start=started[meter],
                applied_at=applied_at,
            )
        )
    for meter, left in buckets.items():
        balances[meter] = balances[meter].after(left)
        if meter not in retermed and meter not in capped:
            writes.moved.append(
                Moved(
                    user_id=user_id,
                    meter=meter,
                    used=left.used,
                    rollover=left.rollover,
                    purchased=left.purchased,
                    consumed=consumed[meter],
                    granted=0,
                )
            )
    if retermed or capped:
        changed = sorted(retermed | capped)
        writes.retermed.extend(
            Changed(user_id=user_id, balance=balances[meter], consumed=consumed[meter], granted=0) for meter in changed
        )
    if version > first_version:
        writes.versions.append((user_id, version))
    return account._replace(version=version, balances=balances)


def _bring_up_to_date(
    account: Account, meters: Collection[str], now: datetime, catalogue: Catalogue, writes: Writes
) -> tuple[Account, set[str]]:
    """Apply due boundaries and changes, and open a first period for each of `meters` that the account has never used.

    Returns the account at its new version, and the meters with changed terms.
    """
    current, steps = bring_up_to_date(catalogue, account, now, meters)
    missing = [meter for meter in meters if meter not in current.balances]
    steps += [opened_meter(open_balance(catalogue, current.plan, meter, now)) for meter in missing]
    opened = [step.after for step in steps if step.before is None and step.after is not None]
    writes.opened_balances.extend(
        Changed(user_id=account.user_id, balance=balance, consumed=0, granted=0) for balance in opened
    )
    balances = {step.meter: step.after for step in steps if step.after is not None}
    current = record(writes, current._replace(balances={**current.balances, **balances}), steps, now)
    if about(current) != about(account):
        writes.restated.append(current)
    return current, {step.meter for step in steps if step.before is not None}


def count_backend(dimensions: Mapping[str, Any] | None, amount: int, balance: Balance) -> Mapping[str, int] | None:
    """Return the usage of the sub-caps of `balance` after an event with these dimensions."""
    if balance.caps is None:
        return balance.cap_used
    backend = backend_in(dimensions)
    if backend is None or backend not in balance.caps:
        return balance.cap_used
    cap_used = balance.cap_used or {}
    return {**cap_used, backend: cap_used.get(backend, 0) + amount}


def _decoded(dimensions: str | None) -> dict[str, Any] | None:
    """Return the dimensions of an event, which come as JSON."""
    return json.loads(dimensions) if dimensions else None


def _uncollected(event: Event, applied_at: str, history: str | None) -> AppliedEvent:
    """Return the row of an event without an account: recorded in full, paid by no bucket.

    After the closing of its account, it joins that account's `history`, without personal data.
    """
    if history is not None:
        event = event._replace(user_id=history, reference_id=None, hold_key=None, dimensions=None)
    return AppliedEvent(
        event=event,
        seq=None,
        split=_NOBODY_PAYS,
        uncollected=event.amount,
        period_start=None,
        applied_at=applied_at,
    )


def _refuse(refused: Refused, outcome: Outcome, disposals: dict[str, Disposal], catalogue: Catalogue) -> None:
    outcome.writes.refused.append(refused)
    if refused.owner is None:
        outcome.loose_entries.append(refused.entry_id)
        return
    user_id, meter, event_id = refused.owner
    disposal = _disposal(disposals, user_id)
    disposal.entries.append(refused.entry_id)
    _unpend(disposal, catalogue, meter, "e:" + event_id)


def _unpend(disposal: Disposal, catalogue: Catalogue, meter: str, pending_id: str) -> None:
    """Take an id out of pending, and out of the meter's sub-caps, against which it may count."""
    disposal.ids.setdefault(meter, []).append(pending_id)
    for backend in catalogue.capped_backends.get(meter, ()):
        disposal.ids.setdefault(sub_meter(meter, backend), []).append(pending_id)


def _disposal(disposals: dict[str, Disposal], user_id: str) -> Disposal:
    return disposals.setdefault(user_id, Disposal(user_id=user_id, entries=[], ids={}, account=None, closed_holds=[]))
