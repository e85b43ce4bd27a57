"""The credit of an account, grant by grant: what each gave, what is left, when it ends, and what used it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from schemas.reports import Credits, CreditUse, GrantedCredit
from worker.errors import NotFound
from worker.ledger import reports
from worker.ledger.accounts import read_account
from worker.ledger.orders import read_credits
from worker.reports.usage import require_identifier, snapshot_of
from worker.resources import Resources
from worker.rules.account import Account, Balance
from worker.rules.corrections import GRANT_KINDS
from worker.rules.credits import STARTED, grant_in, grants_on, order_in, purchases_of
from worker.rules.grants import UNNAMED, Grant, Grants, burn_order, unnamed
from worker.rules.lifecycle import as_of
from worker.rules.rows import EntryRow, UsageRow

# Events named for each grant, and the newest changes of the account among which they are looked for.
_EVENTS = 5
_SEARCHED_CHANGES = 100_000

State = Literal["in_force", "to_come", "used_up", "ended"]


@dataclass
class _Flow:
    """Units of one grant of an account that came, that refunds and adjustments took, that ended, that moved away."""

    came: int = 0
    taken: int = 0
    ended: int = 0
    moved: int = 0


def credits_of(resources: Resources, user_id: str) -> Credits:
    """Report every grant of an account, as a check would find it now: those in force first, in the order they pay.

    Raises ReportError for a user without an account.
    """
    require_identifier("user_id", user_id)
    with snapshot_of(resources) as postgres:
        now, _, account = read_account(postgres, user_id)
        if account is None:
            raise NotFound(f"user_id: no account {user_id}")
        entries = read_credits(postgres, [user_id])
        used = reports.read_grant_uses(postgres, user_id, after=account.version - _SEARCHED_CHANGES)
    current = as_of(resources.catalogue, account, now)
    found = [
        granted
        for meter, balance in sorted(current.balances.items())
        for granted in _of_meter(
            balance,
            _ended_since(account, balance),
            [entry for entry in entries if entry.meter == meter],
            [row for row in used if row.meter == meter],
            now,
        )
    ]
    return Credits(user_id=user_id, at=now, grants=tuple(found))


def _ended_since(stored: Account, current: Balance) -> dict[str, int]:
    """Return the units of grants that have ended, though no entry says so yet, by key."""
    before = stored.balances.get(current.meter)
    left = grants_on(current)
    grants = [] if before is None or before.grants is None else [each for part in before.grants for each in part]
    return {grant.key: grant.left for grant in grants if left.of(grant.key) is None}


def _of_meter(
    balance: Balance, ended: Mapping[str, int], entries: Sequence[EntryRow], used: Sequence[UsageRow], now: datetime
) -> Iterable[GrantedCredit]:
    left, flows = grants_on(balance), _flows_of(entries)
    grants = {key: order.grant for key, order in purchases_of(entries).orders.items() if order.grant is not None}
    if left.of(UNNAMED) is not None:
        grants[UNNAMED] = unnamed(0)
    for key, units in ended.items():
        flows[key].ended += units
    states = {key: _state_of(key, grant, left, now) for key, grant in grants.items()}
    order = list(STATES)
    for key, grant in sorted(grants.items(), key=lambda each: (order.index(states[each[0]]), burn_order(each[1]))):
        here = left.of(key)
        units, flow = (here.left if here else 0), flows[key]
        yield GrantedCredit(
            meter=balance.meter,
            order=key or None,
            state=states[key],
            category=grant.category,
            priority=grant.priority,
            effective_at=grant.effective_at if key else None,
            expires_at=grant.expires_at,
            granted_at=grant.created_at if key else None,
            given=flow.came if key else None,
            left=units,
            used=flow.came - units - flow.taken - flow.ended - flow.moved if key else None,
            taken_back=flow.taken if key else None,
            expired=flow.ended if key else None,
            moved=flow.moved if key else None,
            events=tuple(
                CreditUse(event_id=row.event_id, at=row.applied_at, units=row.grants[key])
                for row in [row for row in used if row.grants and key in row.grants][:_EVENTS]
                if row.grants is not None
            ),
        )


# In the order in which the report lists them.
STATES: tuple[State, ...] = ("in_force", "to_come", "used_up", "ended")


def _state_of(key: str, grant: Grant, left: Grants, now: datetime) -> State:
    if any(each.key == key for each in left.in_force):
        return "in_force"
    if any(each.key == key for each in left.to_come):
        return "to_come"
    return "ended" if grant.expires_at is not None and grant.expires_at <= now else "used_up"


def _flows_of(entries: Iterable[EntryRow]) -> dict[str, _Flow]:
    """Return what became of each grant of one meter by its entries; events took the rest of what is not left."""
    flows: dict[str, _Flow] = defaultdict(_Flow)
    made: dict[str, EntryRow] = {}
    for entry in entries:
        kind, detail, grant = entry.kind, entry.detail, grant_in(entry)
        made[entry.entry_key] = entry
        if kind in GRANT_KINDS and grant is not None and not entry.entry_key.startswith(STARTED):
            flows[grant.key].came += grant.left
        elif kind == "expire":
            flows[order_in(entry.entry_key)].ended += detail["units"]
        elif kind in ("open_meter", "transfer_in", "transfer_out", "merge_grants") and detail.get("grants"):
            for each in (each for part in Grants.from_json(detail["grants"]) for each in part):
                if kind in ("transfer_out", "merge_grants"):
                    flows[each.key].moved += each.left
                else:
                    flows[each.key].came += each.left
        elif kind == "undo" and detail["kind"] not in GRANT_KINDS:
            before = made[detail["entry"]].detail.get("gone", {}) if detail["entry"] in made else {}
            sign = 1 if entry.purchased_change < 0 else -1  # it takes back what an adjustment gave
            for key, units in detail.get("grants", {}).items():
                flows[key].taken += sign * units
            _returned(flows, detail, before)
        elif kind == "reversal":
            _returned(flows, detail, {})
        elif kind in ("clawback", "adjust", "undo"):
            for key, units in detail.get("grants", {}).items():
                flows[key].taken += units
    return flows


def _returned(flows: dict[str, _Flow], detail: Mapping[str, Any], before: Mapping[str, int]) -> None:
    """Count units that came back but not to their grant; those of `before` were gone already."""
    for key, units in detail.get("gone", {}).items():
        flows[key].ended += units - before.get(key, 0)
    for key, units in detail.get("reclaimed", {}).items():
        flows[key].taken += units
