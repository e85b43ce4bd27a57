"""Values reach the tables by name: each row in the order of its columns, and none built or cut by position."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.support.paths import ROOT
from worker.ledger import accounts
from worker.rules.account import Account, Balance, Cause, Change, Parked, Waiting
from worker.rules.batch import Disposal
from worker.rules.grants import Grant, Grants
from worker.rules.received import Event
from worker.rules.rows import AppliedEvent, Changed, EntryRow, Loaded, Moved, UsageRow, Writes
from worker.rules.sponsorship import CreditRow, GrantRow, Known, Locked
from worker.rules.waterfall import Split

NOW = datetime(2026, 11, 1, tzinfo=UTC)
OF_MONEY = (
    Account, AppliedEvent, Balance, Cause, Change, Changed, CreditRow, Disposal, EntryRow, GrantRow, Known, Loaded,
    Locked, Moved, UsageRow, Writes,
)  # fmt: skip


def distinct(kind: type[Any]) -> Any:
    """A value whose fields all differ, so that no two can be exchanged unnoticed."""
    return kind(**{name: f"{name} of {kind.__name__}" for name in kind._fields})


def test_an_applied_event_has_the_columns_of_a_usage_row() -> None:
    event, split = distinct(Event), distinct(Split)
    applied = distinct(AppliedEvent)._replace(event=event, split=split, grants={"order-1": 2})
    stored = UsageRow(*applied.columns())._asdict()
    stored["grants"] = json.loads(stored["grants"])
    assert stored == {
        name: getattr(applied, name, None) or getattr(event, name, None) or getattr(split, name, None)
        for name in UsageRow._fields
    } | {"trace_id": event.traceparent[3:35]}


def test_an_account_is_stored_in_the_order_of_its_columns() -> None:
    waiting = (Waiting("invoice", NOW, "in_2", NOW, NOW), Waiting("plan", NOW + timedelta(days=1), "free"))
    account = distinct(Account)._replace(waiting=waiting)
    columns = accounts.ACCOUNT_COLUMNS.split(", ")
    # The balances have a table of their own. When the next change takes effect has a column, for the job.
    assert len(columns) == len(Account._fields) - 1 + 1
    found = dict(zip(columns, accounts.account_row(account), strict=True))
    assert json.loads(found.pop("waiting")) == [change.as_json() for change in waiting]
    assert found.pop("waiting_at") == NOW
    assert found == {name: getattr(account, "version" if name == "seq" else name) for name in found}


def test_a_balance_is_stored_in_the_order_of_its_columns() -> None:
    grants = Grants((Grant("order-1", 9, 5, "paid", 50, NOW, None, NOW),))
    balance = distinct(Balance)._replace(
        caps={"gemini": 1}, cap_used={"gemini": 2}, parked=Parked(NOW, 3, {"g": 4}), grants=grants
    )
    found = dict(zip(accounts.BALANCE_COLUMNS.split(", "), accounts.balance_row(balance), strict=True))
    in_json = {"caps": {"gemini": 1}, "cap_used": {"gemini": 2}, "parked": balance.parked.as_json()}
    in_json["grants"] = grants.as_json()
    assert {name: json.loads(found[name]) for name in in_json} == in_json
    assert {name: found[name] for name in found.keys() - in_json} == {
        name: getattr(balance, name) for name in Balance._fields if name not in in_json
    }


@dataclass
class ByPosition(ast.NodeVisitor):
    """Finds values of money that are built with positional arguments. A whole row of the ledger (`*row`) may be."""

    found: list[int]

    def visit_Call(self, node: ast.Call) -> None:
        names = {kind.__name__ for kind in OF_MONEY}
        if isinstance(node.func, ast.Name) and node.func.id in names:
            is_row = len(node.args) == 1 and isinstance(node.args[0], ast.Starred)
            if node.args and not is_row:
                self.found.append(node.lineno)
        self.generic_visit(node)


def by_position(source: str) -> list[int]:
    """The lines on which a value of money is built by position."""
    visitor = ByPosition([])
    visitor.visit(ast.parse(source))
    return visitor.found


def test_no_value_of_money_is_built_by_position() -> None:
    assert by_position("Balance(meter, 0)\nMoved(user_id=1)\nUsageRow(*row)\nChanged(a, *rest)") == [1, 4]
    found = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "worker").rglob("*.py")
        if (lines := by_position(path.read_text(encoding="utf-8")))
    }
    assert found == {}
