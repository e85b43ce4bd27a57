"""What a batch of entries does to the accounts it names. Pure: rows in, rows out.

The drain reads and locks, this decides, the ledger writes, and the publication tells Redis afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from config.catalogue import Catalogue
from schemas.events import Refusal
from worker.intake import Event, Received, Refresh, Refused
from worker.ledger import EntryRow, Loaded, UsageRow, Writes
from worker.periods import open_account, open_balance
from worker.snapshot import Account, Balance
from worker.waterfall import Buckets, pay

BUCKET_FIELDS = ("used", "rollover", "purchased")


class Disposal(NamedTuple):
    """What Redis is told about one user: entries to delete, ids that leave pending, the balance if there is one."""

    user_id: str
    entries: list[str]
    ids: dict[str, list[str]]
    account: Account | None
    closed_holds: list[Event]


class Outcome(NamedTuple):
    """A batch worked out: what the ledger writes, and what Redis is told once that is committed."""

    writes: Writes
    disposals: list[Disposal]
    loose_entries: list[str]


def users_of(received: Sequence[Received]) -> list[str]:
    """Users whose accounts the batch touches, in the order in which they are locked."""
    return sorted({item.user_id for item in received if not isinstance(item, Refused)})


def identities_of(received: Sequence[Received]) -> tuple[list[str], list[str]]:
    """Users and ids of the batch's events, side by side."""
    events = [item for item in received if isinstance(item, Event)]
    return [event.user_id for event in events], [event.event_id for event in events]


def opening_entries(account: Account, now: datetime) -> list[EntryRow]:
    """Ledger entries that open `account`: one for the account, one per meter."""
    detail = {"plan": account.plan, "status": account.status, "trust": account.trust}
    entries = [EntryRow(account.user_id, 1, "open", "", "open", 0, 0, 0, 0, 0, 0, json.dumps(detail), now)]
    for balance in account.balances.values():
        entries.append(opening_entry(account.user_id, len(entries) + 1, balance, now))
    return entries


def opening_entry(user_id: str, seq: int, balance: Balance, now: datetime) -> EntryRow:
    """Ledger entry for the first period of a meter and what it brings along; its detail are the terms in force."""
    detail = {name: value for name, value in balance._asdict().items() if name not in ("meter", *BUCKET_FIELDS)}
    buckets = (balance.used, balance.rollover, balance.purchased)
    return EntryRow(
        user_id, seq, "open", balance.meter, "open_meter", *buckets, *buckets, json.dumps(detail, default=str), now,
    )  # fmt: skip


def refusal_of(event: Event, reason: Refusal, detail: str) -> Refused:
    """The dead letter of an event that is well formed, but cannot be applied."""
    owner = (event.user_id, event.meter, event.event_id) if event.marked else None
    return Refused(event.entry_id, reason, detail, event.payload, len(event.payload), owner)


def work_out(received: Sequence[Received], loaded: Loaded, catalogue: Catalogue, default_plan: str | None) -> Outcome:
    """Decide the whole batch, in order: duplicates, conflicts, who pays, new balances.

    Touches only its arguments' values; the same batch against the same `loaded` gives the same outcome.
    """
    outcome = Outcome(Writes.none(), [], [])
    applied_at = loaded.now.isoformat()
    by_user: dict[str, list[Event]] = {}
    disposals: dict[str, Disposal] = {}
    for item in received:
        if isinstance(item, Event):
            by_user.setdefault(item.user_id, []).append(item)
        elif isinstance(item, Refresh):
            by_user.setdefault(item.user_id, [])
            _disposal(disposals, item.user_id).entries.append(item.entry_id)
        else:
            _refuse(item, outcome, disposals)

    for user_id, events in by_user.items():
        account = loaded.accounts.get(user_id)
        if account is None and default_plan is not None and events:
            account = open_account(catalogue, user_id, default_plan, "active", loaded.now)
            entries = opening_entries(account, loaded.now)
            account = account._replace(version=len(entries))
            outcome.writes.opened_accounts.append(account)
            outcome.writes.opened_balances.extend((user_id, balance) for balance in account.balances.values())
            outcome.writes.entries.extend(entries)
        fresh = _drop_known(events, loaded, outcome)
        if account is None:
            outcome.writes.usage.extend(_uncollected(event, applied_at) for event in fresh)
        else:
            account = _apply(account, fresh, loaded.now, applied_at, catalogue, outcome.writes)
        disposal = _disposal(disposals, user_id)
        for event in events:
            disposal.entries.append(event.entry_id)
            if event.marked:
                disposal.ids.setdefault(event.meter, []).append("e:" + event.event_id)
            if event.hold_key is not None:
                outcome.writes.closed_holds.append((user_id, event.hold_key))
                if not event.marked:  # our scripts closed the hold when they appended the event
                    disposal.ids.setdefault(event.meter, []).append("h:" + event.hold_key)
                    disposal.closed_holds.append(event)
        disposals[user_id] = disposal._replace(account=account)

    outcome.disposals.extend(disposals.values())
    return outcome


def _drop_known(events: list[Event], loaded: Loaded, outcome: Outcome) -> list[Event]:
    """Events not recorded before, in order. Safe under the account lock: nobody else can record them meanwhile."""
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
    """What must be equal for two events of one identity to be the same event."""
    return event.meter, event.quantity, event.multiplier


def _apply(
    account: Account, events: list[Event], now: datetime, applied_at: str, catalogue: Catalogue, writes: Writes
) -> Account:
    """Take the events from the account's buckets, one after the other. `applied_at` is `now` as text."""
    user_id, status, version = account.user_id, account.status, account.version
    balances = dict(account.balances)
    buckets: dict[str, Buckets] = {}
    consumed: dict[str, int] = {}
    started: dict[str, str] = {}
    for event in events:
        meter = event.meter
        before = buckets.get(meter)
        if before is None:
            if meter not in balances:
                opened = open_balance(catalogue, account.plan, meter, now)
                balances[meter] = opened
                version += 1
                writes.opened_balances.append((user_id, opened))
                writes.entries.append(opening_entry(user_id, version, opened, now))
            before = balances[meter].buckets(status)
            consumed[meter] = 0
            started[meter] = balances[meter].period_start.isoformat()
        buckets[meter], split = pay(before, event.amount)
        consumed[meter] += event.amount
        version += 1
        writes.usage.append(
            UsageRow(
                user_id,
                event.event_id,
                version,
                meter,
                event.quantity,
                event.multiplier,
                event.amount,
                *split,
                0,
                started[meter],
                event.occurred_at,
                applied_at,
                event.clamped,
                event.source,
                event.reference_id,
                event.hold_key,
                event.dimensions,
            )
        )
    for meter, (_, used, rollover, purchased, _) in buckets.items():
        balances[meter] = balances[meter].after(used, rollover, purchased)
        writes.moved.append((user_id, meter, used, rollover, purchased, consumed[meter], 0))
    if version > account.version:
        writes.versions.append((user_id, version))
    return account._replace(version=version, balances=balances)


def _uncollected(event: Event, applied_at: str) -> UsageRow:
    """The row of an event for which nobody has an account: recorded in full, paid by no bucket."""
    return UsageRow(
        event.user_id, event.event_id, None, event.meter, event.quantity, event.multiplier, event.amount,
        0, 0, 0, 0, event.amount, None, event.occurred_at, applied_at, event.clamped,
        event.source, event.reference_id, event.hold_key, event.dimensions,
    )  # fmt: skip


def _refuse(refused: Refused, outcome: Outcome, disposals: dict[str, Disposal]) -> None:
    outcome.writes.refused.append(refused)
    if refused.owner is None:
        outcome.loose_entries.append(refused.entry_id)
        return
    user_id, meter, event_id = refused.owner
    disposal = _disposal(disposals, user_id)
    disposal.entries.append(refused.entry_id)
    disposal.ids.setdefault(meter, []).append("e:" + event_id)


def _disposal(disposals: dict[str, Disposal], user_id: str) -> Disposal:
    return disposals.setdefault(user_id, Disposal(user_id, [], {}, None, []))
