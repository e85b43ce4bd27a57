"""What a change would do, as rows of before and after, made by the rules that make the change.

The change runs up to its COMMIT under the locks of the account, and a review stops it there. The same review runs when
a person confirms: if the rows are others than those that the person saw, nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any, NamedTuple

from worker.rules.account import Account, Change

_BUCKETS = ("used", "rollover", "purchased")
_ABOUT = ("plan", "status", "next_plan", "plan_change_at", "next_status", "status_change_at")


class Row(NamedTuple):
    """One figure that a change moves: of a meter, or of the account as a whole if `meter` is empty."""

    meter: str
    name: str
    before: str
    after: str


# It sees what a change would do before it is stored, and may raise.
Check = Callable[[Sequence[Row]], None]


class Previewed(Exception):
    """A change that was only looked at. `rows` are what it would do."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)


class Overtaken(Previewed):
    """A change that would do something else than the person saw. It was not made."""


def look(rows: Sequence[Row]) -> None:
    """Stop every change. Raises Previewed."""
    raise Previewed(rows)


def as_seen(seen: str) -> Check:
    """Return the check that lets a change through if it does what the person saw; it raises Overtaken."""

    def check(rows: Sequence[Row]) -> None:
        if digest_of(rows) != seen:
            raise Overtaken(rows)

    return check


def digest_of(rows: Sequence[Row]) -> str:
    """Return a digest of what a person saw."""
    return sha256(repr([tuple(row) for row in rows]).encode()).hexdigest()


def rows_of(account: Account, changes: Sequence[tuple[str, Sequence[Change]]]) -> list[Row]:
    """Return what the steps of a change move. `account` is the account before it."""
    rows: list[Row] = []
    for _, steps in changes:
        for step in steps:
            rows += _of_meter(step) if step.meter else _of_account(account, step.detail)
    return rows


def _of_meter(step: Change) -> list[Row]:
    before, after = step.before, step.after
    rows = []
    if after is not None:
        for name in _BUCKETS:
            was, will = 0 if before is None else getattr(before, name), getattr(after, name)
            if was != will:
                rows.append(Row(step.meter, name, _units(was), _units(will)))
        was, will = None if before is None else before.allowance, after.allowance
        if was != will or (before is None and after is not None):
            rows.append(Row(step.meter, "allowance", "none yet" if before is None else _units(was), _units(will)))
    if step.kind == "set_limit":
        detail = step.detail
        name = f"limit per {detail['per']} ({detail['set_by']})"
        rows.append(Row(step.meter, name, _limit(detail["before"]), _limit(detail["amount"])))
    return rows


def _of_account(account: Account, detail: Mapping[str, Any]) -> list[Row]:
    found = [name for name in _ABOUT if name in detail]
    rows = [
        Row("", name, _text(getattr(account, name)), _text(detail[name]))
        for name in found
        if _text(getattr(account, name)) != _text(detail[name])
    ]
    if "status" in detail:
        for meter, balance in sorted(account.balances.items()):
            was, will = balance.limit(account.status), balance.limit(str(detail["status"]))
            if was != will:
                rows.append(Row(meter, "limit in force", _units(was), _units(will)))
    return rows


def _units(number: int | None) -> str:
    return "unlimited" if number is None else f"{number:,}".replace("-", "−")


def _limit(amount: int | None) -> str:
    return "none" if amount is None else f"{amount:,}"


def _text(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    return "none" if value is None else str(value)
