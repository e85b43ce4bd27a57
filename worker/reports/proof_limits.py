"""The proof of limits: what the rules make of the limits of a balance at each entry.

The replay counts each event in the windows that are open. An entry that opens a window or changes a limit says
which limits and windows there are after it. `wrong_windows` proves from the log what a window had used when its limit
was set.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from worker.reports.wrong import Wrong
from worker.rules.account import Balance
from worker.rules.limits import Limits, Window, bounds
from worker.rules.rows import EntryRow


def limits_after(before: Balance | None, row: EntryRow) -> Limits | None:
    """Return the limits that an entry leaves: those that it names, else what a release without limits makes of them."""
    if "limits" in row.detail:
        stored = row.detail["limits"]
        return None if stored is None else Limits.from_json(stored)
    limits = None if before is None else before.limits
    if limits is not None and row.kind == "reversal":  # it counts the life of the balance, and nothing else
        return limits.spent(-sum(row.detail["parts"].values()))
    return limits


def wrong_limits(before: Limits | None, after: Limits | None, row: EntryRow) -> list[Wrong]:
    """Return what is wrong with the limits that an entry without terms leaves `after` those `before` it."""
    if before is None and after is None:
        return []
    expected, wrong = _expected(before, row)
    if expected == after:
        return wrong
    text = f"ledger entry {row.kind} {row.entry_key} leaves the limits {after}, the rules say {expected}"
    return [*wrong, Wrong(text, "entry limits", row.meter, expected, after)]


def _expected(before: Limits | None, row: EntryRow) -> tuple[Limits | None, list[Wrong]]:
    """Return the limits that the rules make of those `before` an entry, and what is wrong with its words."""
    detail = row.detail
    if row.kind == "open_window":
        at = datetime.fromisoformat(detail["at"])
        ahead = at > row.created_at
        wrong = [_wrong(row, f"opens a window at {at}, after it was written")] if ahead else []
        return before and before.opened(at, detail["timezone"], row.seq), wrong
    if row.kind == "set_limit":
        return _after_set(before or Limits(), row)
    if row.kind == "reversal" and "limits" in detail:
        return before and before.given_back(sum(detail["parts"].values()), detail["seq"]), []
    if row.kind == "reversal":
        return before and before.spent(-sum(detail["parts"].values())), []
    return (None if row.kind == "forget_limits" else before), []


def _after_set(before: Limits, row: EntryRow) -> tuple[Limits | None, list[Wrong]]:
    detail: Any = row.detail
    per, after = detail["per"], before.with_amount(detail["set_by"], detail["per"], detail["amount"])
    if after is None or detail["amount"] is None or per in after.windows:
        return after, [_wrong(row, "opens a window that is open")] if "window" in detail else []
    if "window" not in detail:
        return after, [_wrong(row, "opens no window")]
    window = Window.from_json(detail["window"])
    right = bounds(per, row.created_at, detail["timezone"]) == window[:2] and window.since < row.seq
    wrong = [] if right else [_wrong(row, f"opens the window {window}, which its time belies")]
    return after._replace(windows={**after.windows, per: window}), wrong


def _wrong(row: EntryRow, what: str) -> Wrong:
    return Wrong(f"ledger entry {row.kind} {row.entry_key} {what}", "entry limits", row.meter)
