"""A life under the catalogue that was in force: a simulation must end where the ledger does."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from config.catalogue import Catalogue
from worker.reports.simulation_run import Walk
from worker.rules.account import Account
from worker.rules.rows import EntryRow, UsageRow
from worker.rules.simulation import Question
from worker.rules.waterfall import Split


def written_at(row: EntryRow | UsageRow) -> datetime:
    return row.applied_at if isinstance(row, UsageRow) else row.created_at


def differences_in_force(
    catalogue: Catalogue, user_id: str, history: Sequence[EntryRow | UsageRow], since: datetime
) -> list[str]:
    """Every difference between the ledger and a simulation from `since` on under the catalogue that was in force."""
    question = Question(catalogue, lambda _: catalogue, {}, since)
    undone = {row.detail["event_id"] for row in history if isinstance(row, EntryRow) and row.kind == "reversal"}
    walk, found = Walk(question, user_id, undone), []
    for _, _, row, charged in walk.billed(history):
        parts = Split(row.from_subscription, row.from_rollover, row.from_purchased, row.overflow_to_debt)
        simulated = charged and (charged.payer, charged.split, charged.period_start, dict(charged.grants))
        if simulated != (row.payer, parts, row.period_start, row.grants or {}):
            found.append(f"event {row.event_id} is {row}, simulated {charged}")
    assert walk.simulated is not None
    made, is_now = _payable(walk.simulated.account), _payable(walk.real.account)
    names = sorted(name for name in {*made, *is_now} if made.get(name) != is_now.get(name))
    return found + [f"{name} is {is_now.get(name)}, simulated {made.get(name)}" for name in names]


def _payable(account: Account) -> dict[str, object]:
    """An account without what denies checks alone, and without its version."""
    facts = account._asdict() | {"balances": None, "version": 0, "trust": "", "pay_from": None, "notices": None}
    for meter, balance in account.balances.items():
        parked = balance.parked and balance.parked._replace(cap_used=None)
        payable = balance._replace(limits=None, cap_used=None, parked=parked)
        facts |= {f"{meter} {name}": value for name, value in payable._asdict().items()}
    return facts
