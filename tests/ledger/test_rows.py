"""Values reach the tables by name: each row in the order of its columns, and none built or cut by position."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.catalogue import Draw, NoticeRule
from schemas.events import TEXT_PATTERN
from tests.support.paths import ROOT
from worker.ledger import accounts
from worker.ledger.batch import COPY_USAGE, OF_WALLETS, usage_text
from worker.ledger.columns import COPY_NULL
from worker.rules.account import Account, Balance, Cause, Change, Parked, Waiting
from worker.rules.batch import Disposal
from worker.rules.grants import Grant, Grants
from worker.rules.received import Event
from worker.rules.rows import AppliedEvent, AppliedRun, Changed, EntryRow, Loaded, Moved, UsageRow, Writes
from worker.rules.sponsorship import CreditRow, GrantRow, Known, Locked
from worker.rules.waterfall import Split

NOW = datetime(2026, 11, 1, tzinfo=UTC)
OF_MONEY = (
    Account, AppliedEvent, AppliedRun, Balance, Cause, Change, Changed, CreditRow, Disposal, EntryRow, GrantRow, Known,
    Loaded, Locked, Moved, UsageRow, Writes,
)  # fmt: skip


def distinct(kind: type[Any]) -> Any:
    """A value whose fields all differ, so that no two can be exchanged unnoticed."""
    return kind(**{name: f"{name} of {kind.__name__}" for name in kind._fields})


def written(run: AppliedRun) -> dict[str, str]:
    """The only row of a run by column, as COPY reads it."""
    (line,) = usage_text([run], NOW).removesuffix("\n").split("\n")
    columns = [name for name in UsageRow._fields if run.drawn or name not in OF_WALLETS]
    return dict(zip(columns, line.split("\t"), strict=True))


def test_an_applied_event_has_the_columns_of_a_usage_row() -> None:
    event, split = distinct(Event), distinct(Split)
    facts: dict[str, Any] = {
        "amounts": ["the amount"], "splits": [split], "period_starts": ["a start"], "remainders": ["a remainder"],
        "grants": {0: {"order-1": 2}},
    }  # fmt: skip
    run = AppliedRun(events=[event], first_seq=7, drawn={0: Draw("a wallet", "a price")}, **facts)
    of_the_run = {
        "wallet": "a wallet", "price": "a price",
        "amount": "the amount", "seq": "7", "period_start": "a start", "remainder": "a remainder", "uncollected": "0",
        "applied_at": NOW.isoformat(), "clamped": "t", "trace_id": event.traceparent[3:35],
        "grants": '{"order-1":2}',
    }  # fmt: skip
    assert (
        written(run)
        == {name: getattr(event, name, None) or getattr(split, name, None) for name in UsageRow._fields} | of_the_run
    )


def test_the_rows_of_a_run_that_draws_on_a_wallet_name_it_where_it_paid() -> None:
    events = [distinct(Event), distinct(Event)]
    run = AppliedRun(
        events=events, amounts=[5, 6], splits=[(5, 0, 0, 0), (6, 0, 0, 0)], first_seq=1, period_starts=["a", "a"],
        remainders=[None, None], grants={}, drawn={1: Draw("credits", "0.002")},
    )  # fmt: skip
    rows = [dict(zip(UsageRow._fields, line.split("\t"), strict=True)) for line in usage_text([run], NOW).splitlines()]
    assert [(row["wallet"], row["price"]) for row in rows] == [(COPY_NULL, COPY_NULL), ("credits", "0.002")]
    assert [applied.draw for applied in run.applied()] == [None, Draw("credits", "0.002")]


def test_the_amount_of_an_event_without_an_account_is_uncollected() -> None:
    run = AppliedRun(
        events=[distinct(Event)], amounts=[5], splits=[(0, 0, 0, 0)], first_seq=None, period_starts=[None],
        remainders=[None], grants={},
    )  # fmt: skip
    stored = written(run)
    assert {stored[name] for name in ("seq", "period_start", "remainder", "grants")} == {COPY_NULL}
    assert stored["uncollected"] == stored["amount"] == "5"
    (applied,) = run.applied()
    assert (applied.seq, applied.uncollected, sum(applied.split)) == (None, 5, 0)


HOSTILE = ("\\N", "\\.", "\\", "\\t", "'\"", "")
ANY_TEXT = st.none() | st.from_regex(TEXT_PATTERN, fullmatch=True) | st.sampled_from(HOSTILE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the log is empty after each example
@given(texts=st.lists(st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT, st.booleans()), min_size=1, max_size=20))
def test_any_text_of_an_event_is_stored_as_it_came(
    texts: list[tuple[str | None, str | None, str | None, bool]], a_log: psycopg.Connection[Any]
) -> None:
    events = [
        Event(
            entry_id="1-0", marked=False, user_id="user-1", event_id=f"e{number}", meter="m", quantity=number,
            multiplier="1.5", amount=number, occurred_at=NOW.isoformat(), clamped=clamped, source=source,
            reference_id=reference, hold_key=None, payload=b"",
            dimensions=None if fact is None else json.dumps({"fact": fact, "n": number}, ensure_ascii=clamped),
        )
        for number, (source, reference, fact, clamped) in enumerate(texts)
    ]  # fmt: skip
    run = AppliedRun(
        events=events, amounts=[event.amount for event in events], splits=[(event.amount, 0, 0, 0) for event in events],
        first_seq=1, period_starts=[NOW.isoformat()] * len(events), remainders=[None] * len(events), grants={},
    )  # fmt: skip
    with a_log.cursor() as cursor, cursor.copy(COPY_USAGE.replace("usage_log", "pg_temp.usage_log")) as copy:
        copy.write(usage_text([run], NOW))
    rows = a_log.execute(f"DELETE FROM pg_temp.usage_log RETURNING {accounts.USAGE_COLUMNS}").fetchall()
    found = sorted(map(UsageRow._make, rows), key=lambda row: row.quantity)
    read = [(row.source, row.reference_id, row.dimensions and row.dimensions["fact"], row.clamped) for row in found]
    assert read == texts
    assert [(row.event_id, row.seq, row.from_subscription, row.applied_at, row.period_start) for row in found] == [
        (event.event_id, number, event.amount, NOW, NOW) for number, event in enumerate(events, 1)
    ]


@pytest.fixture
def a_log(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection with a usage log of its own, from which rows may go."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TEMP TABLE usage_log (LIKE public.usage_log INCLUDING CONSTRAINTS)")
        yield connection


def test_an_account_is_stored_in_the_order_of_its_columns() -> None:
    waiting = (Waiting("invoice", NOW, "in_2", NOW, NOW), Waiting("plan", NOW + timedelta(days=1), "free"))
    rule = NoticeRule(kind="balance.threshold", percent=80)
    account = distinct(Account)._replace(waiting=waiting, notices=(rule,))
    columns = accounts.ACCOUNT_COLUMNS.split(", ")
    # The balances have a table of their own, and the plan says what draws on a wallet. There is a column for when the
    # next change takes effect, for the job.
    assert len(columns) == len(Account._fields) - 2 + 1
    found = dict(zip(columns, accounts.account_row(account), strict=True))
    assert json.loads(found.pop("waiting")) == [change.as_json() for change in waiting]
    assert found.pop("waiting_at") == NOW
    assert json.loads(found.pop("notices")) == [{"kind": "balance.threshold", "percent": 80}]
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
    # A statement of its own writes the limits of those who have some.
    assert {name: found[name] for name in found.keys() - in_json} == {
        name: getattr(balance, name) for name in Balance._fields if name not in in_json and name != "limits"
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
