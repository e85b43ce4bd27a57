"""The state of a replay as JSON, so that a later proof goes on from there. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from worker.reports.proof import Replayed
from worker.rules.account import SCHEDULE, Account, Balance, Parked, Waiting, schedule_of
from worker.rules.credits import Purchases
from worker.rules.grants import Grants
from worker.rules.limits import Limits
from worker.rules.rows import EntryRow

_ACCOUNT = ("plan", "status", "trust", "version", "reopened")
_ACCOUNT_TIMES = ("plan_change_at", "status_change_at", "paid_from", "paid_until")
_BALANCE_TIMES = ("anchored_at", "period_start", "period_end", "counted_from")
# What the undoing of an entry looks at, in its detail. Reasons are free text and have no place here.
_UNDONE = ("order", "amount", "grants", "gone")


def state_of(replayed: Replayed) -> dict[str, Any]:
    """Return the state of a replay as JSON can hold it; `replayed_from` reads it."""
    account = replayed.account
    return {
        "account": {name: getattr(account, name) for name in _ACCOUNT} | schedule_of(account),
        "balances": [
            balance._asdict()
            | {
                "parked": balance.parked and balance.parked.as_json(),
                "grants": balance.grants and balance.grants.as_json(),
                "limits": balance.limits and balance.limits.as_json(),
            }
            for balance in account.balances.values()
        ],
        "consumed": replayed.consumed,
        "granted": replayed.granted,
        "purchases": {meter: bought.as_json() for meter, bought in replayed.purchases.items()},
        "made": [_without_words(entry) for entry in replayed.made.values()],
    }


def replayed_from(user_id: str, state: dict[str, Any]) -> Replayed:
    """Return the replay at the state that `state_of` returned, as JSON gives it back.

    Raises KeyError, TypeError, ValueError or AttributeError if it is no such state.
    """
    about = dict(state["account"])
    _with_times(about, _ACCOUNT_TIMES)
    about["waiting"] = tuple(Waiting.from_json(change) for change in about["waiting"])
    known = {name: about[name] for name in (*_ACCOUNT, *SCHEDULE)}
    balances = [_balance(stored) for stored in state["balances"]]
    made = [_entry(user_id, stored) for stored in state["made"]]
    return Replayed(
        account=Account(user_id=user_id, balances={balance.meter: balance for balance in balances}, **known),
        consumed=dict(state["consumed"]),
        granted=dict(state["granted"]),
        purchases={meter: Purchases.from_json(stored) for meter, stored in state["purchases"].items()},
        made={(entry.entry_key, entry.meter): entry for entry in made},
    )


def _balance(stored: dict[str, Any]) -> Balance:
    known = dict(stored)
    _with_times(known, _BALANCE_TIMES)
    known["parked"] = known["parked"] and Parked.from_json(known["parked"])
    known["grants"] = known["grants"] and Grants.from_json(known["grants"])
    known["limits"] = known["limits"] and Limits.from_json(known["limits"])
    return Balance(**known)


def _without_words(entry: EntryRow) -> dict[str, Any]:
    facts = entry._asdict() | {"detail": {name: entry.detail[name] for name in _UNDONE if name in entry.detail}}
    for name in ("user_id", "actor", "reason"):
        del facts[name]
    return facts


def _entry(user_id: str, stored: dict[str, Any]) -> EntryRow:
    known = dict(stored)
    _with_times(known, ("created_at",))
    return EntryRow(user_id=user_id, actor=None, reason=None, **known)


def _with_times(known: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        known[name] = known[name] and datetime.fromisoformat(known[name])
