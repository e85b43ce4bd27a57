"""The proof of purchased credit: what the rules make of a balance at each entry that gives, moves or takes it.

No entry says what is left of each grant after it. The replay works it out, and compares it with the stored grants at
the end. An entry says which grants it took from or gave back to. Entries of former releases say nothing of grants: they
moved units in the order in which grants pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType

from worker.reports.wrong import Wrong
from worker.rules.account import Balance
from worker.rules.corrections import Shift, shifted
from worker.rules.credits import (
    STARTED,
    Purchases,
    add_units,
    cross_grants,
    give,
    grant_in,
    grants_on,
    move_in,
    move_out,
    order_in,
    put_back,
    take_back,
)
from worker.rules.grants import Grants
from worker.rules.periods import rolled_over
from worker.rules.rows import EntryRow

Expected = tuple[Balance, list[Wrong]]


def taken_back(purchases: Purchases, before: Balance, row: EntryRow, amount: int, order: str | None) -> Expected:
    """Return the balance after a refund of `amount`, of an order if one is named, and what its entry says wrongly."""
    if "grants" not in row.detail:
        left = min(amount, before.purchased)
        return add_units(before, -left)._replace(rollover=before.rollover - amount + left), []
    bought = purchases.orders.get(order) if order is not None else None
    taken = take_back(before, amount, row.created_at, order, bought.expired if bought else 0)
    return taken.balance, wrong_words(row, taken.used, {order: taken.gone} if order is not None and taken.gone else {})


def wrong_words(
    row: EntryRow,
    used: Mapping[str, int],
    gone: Mapping[str | None, int] | Mapping[str, int],
    reclaimed: Mapping[str, int] = MappingProxyType({}),
) -> list[Wrong]:
    """Return what is wrong with the words of an entry about grants, given the units that the rules name."""
    said = (row.detail["grants"], row.detail["gone"], row.detail.get("reclaimed", {}))
    should = (dict(used), dict(gone), dict(reclaimed))
    if said == should:
        return []
    text = f"ledger entry {row.kind} {row.entry_key} says {said} of the grants, the rules say {should}"
    return [Wrong(text, "entry grants", row.meter, should, said)]


def _granted(_: Purchases, before: Balance, after: Balance, row: EntryRow) -> Expected:
    if row.entry_key.startswith(STARTED):
        return _crossed(_, before, after, row)
    grant = grant_in(row)
    if grant is None:
        return add_units(before, max(0, row.purchased_change)), []
    waits = row.kind == "grant_ahead"
    wrong = []
    if (grant.key, grant.given) != (order_in(row.entry_key), grant.left) or waits != (
        grant.effective_at > row.created_at
    ):
        text = f"ledger entry {row.kind} {row.entry_key} gives the grant {grant}, which its key or its time belies"
        wrong.append(Wrong(text, "entry grants", row.meter))
    return give(before, grant, to_come=waits), wrong


def _crossed(_: Purchases, before: Balance, __: Balance, row: EntryRow) -> Expected:
    """A grant started or expired: the first one that was due then."""
    at = datetime.fromisoformat(row.detail["at"])
    boundary, expected = next(cross_grants(before, at), (None, before))
    found = boundary and (boundary.at, boundary.kind, boundary.grant.key, boundary.grant.left)
    kind = "start" if row.kind == "grant" else "expire"
    if found == (at, kind, order_in(row.entry_key), row.detail["units"]) and at <= row.created_at:
        return expected, []
    text = f"ledger entry {row.kind} {row.entry_key} is about a grant that does not {kind} at {at}"
    return expected, [Wrong(text, "entry grants", row.meter, found)]


def _clawed_back(purchases: Purchases, before: Balance, _: Balance, row: EntryRow) -> Expected:
    return taken_back(purchases, before, row, row.detail["amount"], row.detail.get("order"))


def _adjusted(_: Purchases, before: Balance, __: Balance, row: EntryRow) -> Expected:
    expected = shifted(before, Shift(**row.detail["adjusted"]), row.created_at)
    if "grants" not in row.detail:
        return expected, []
    return expected, wrong_words(
        row, grants_on(before).take_at(max(0, -row.purchased_change), row.created_at, started=False)[1], {}
    )


def _went(_: Purchases, before: Balance, __: Balance, row: EntryRow) -> Expected:
    detail = row.detail
    units = min(detail.get("units", before.purchased), before.purchased)  # earlier releases moved all of them
    rollover = before.rollover + detail.get("debt", 0)
    if "grants" not in detail:
        return add_units(before, -units)._replace(rollover=rollover), []
    left, moving = move_out(before, units, row.created_at)
    wrong = []
    if moving != Grants.from_json(detail["grants"]) or moving.units() != units:
        text = f"ledger entry transfer_out {row.entry_key} takes along other grants than {moving}"
        wrong.append(Wrong(text, "entry grants", row.meter, moving, detail["grants"]))
    return left._replace(rollover=rollover), wrong


def _came(_: Purchases, before: Balance, after: Balance, row: EntryRow) -> Expected:
    detail = row.detail
    if "units" not in detail:
        return add_units(before, max(0, after.purchased - before.purchased)), []
    rollover = before.rollover - detail["debt"]
    if "grants" not in detail:
        return add_units(before, detail["units"])._replace(rollover=rollover), []
    return move_in(before, Grants.from_json(detail["grants"]))._replace(rollover=rollover), []


def _merged(_: Purchases, before: Balance, __: Balance, ___: EntryRow) -> Expected:
    """The tables went back to a release without grants: what was in force is credit without an order."""
    return before._replace(grants=None), []


def _reversed(purchases: Purchases, before: Balance, after: Balance, row: EntryRow) -> Expected:
    """`wrong_reversals` proves from the log that the parts of a reversal, and its grants, are those of the event."""
    detail = row.detail
    parts, start = detail["parts"], datetime.fromisoformat(detail["period_start"])
    expected, wrong = add_units(before, parts["from_purchased"]), list[Wrong]()
    if "grants" in detail:
        expected, gone, reclaimed = put_back(before, detail["grants"], purchases.orders, row.created_at)
        wrong = wrong_words(row, detail["grants"], gone, reclaimed)
    expected = expected._replace(rollover=expected.rollover + parts["from_rollover"] + parts["overflow_to_debt"])
    return _with_subscription_part(before, expected, after, parts["from_subscription"], start), wrong


def _with_subscription_part(before: Balance, expected: Balance, after: Balance, part: int, start: datetime) -> Balance:
    """Return the balance of a reversal after the subscription's part of the event went back also."""
    if start == before.counted_from:
        return expected._replace(used=max(0, before.used - part), cap_used=after.cap_used)
    if before.parked is not None and start == before.parked.period_start:
        cap_used = after.parked and after.parked.cap_used
        used = max(0, before.parked.used - part)
        return expected._replace(parked=before.parked._replace(used=used, cap_used=cap_used))
    # An unlimited allowance gets nothing back. The replay is past that period and no longer knows which kind it had.
    if not before.spill or after.rollover == expected.rollover:
        return expected
    return expected._replace(rollover=rolled_over(part, 0, expected.rollover, before.rollover_cap))


# By the kind of the entry: from the purchases and the balance before it and the balance after it.
CREDIT_RULES: Mapping[str, Callable[[Purchases, Balance, Balance, EntryRow], Expected]] = {
    "grant": _granted,
    "grant_ahead": _granted,
    "expire": _crossed,
    "clawback": _clawed_back,
    "adjust": _adjusted,
    "transfer_out": _went,
    "transfer_in": _came,
    "merge_grants": _merged,
    "reversal": _reversed,
}
