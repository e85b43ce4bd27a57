"""Periods: which allowance is in force, from when to when, and what is left of it at the end. Pure rules, no I/O.

All bounds are UTC. A period holds its start and not its end. The golden cases are tests/vectors/periods.json and
tests/vectors/renewal.json.

The rules in one place:

- `subscription`: the payment provider sets the bounds by `renewed`; without a renewal the period stays open.
- `monthly`, `weekly`, `daily` with a sticky anchor: boundary k lies k steps behind the anchor, so Jan 31 is followed by
  Feb 28 and Mar 31. A dormant account jumps to the period that holds now; what it skipped rolls over up to the cap.
- the same with a floating anchor: refilled when it is used and due; the next period starts at that moment.
- `lifetime` and `off` never end. Lifetime usage is parked while the account is on another plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from config.catalogue import Catalogue
from worker.rules.account import Balance, Change, Parked
from worker.rules.calendar import CALENDAR_CADENCES, boundary, index_at
from worker.rules.waterfall import limit_in_force


class Terms(NamedTuple):
    """What a plan grants on one meter."""

    allowance: int | None
    spill: bool
    rollover_cap: int
    caps: Mapping[str, int] | None
    cadence: str
    anchor: str


# ---------------------------------------------------------------------------------------------------------------------
# The calendar


def rolled_over(limit: int | None, used: int, rollover: int, cap: int) -> int:
    """Rollover after a period closes: what is unused first pays debt, then accrues up to `cap`.

    Nothing already granted is taken away; unlimited and zero limits leave it alone.
    """
    if not limit:
        return rollover
    return max(rollover, min(rollover + max(0, limit - used), cap))


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def terms_of(catalogue: Catalogue, plan: str, meter: str) -> Terms:
    """What `plan` grants on `meter` now. A meter that it does not name has no allowance; rollover and purchased credits
    can still pay for it.
    """
    granted = catalogue.plans[plan].meters.get(meter) if plan in catalogue.plans else None
    spill = catalogue.spills.get(meter, True)
    if granted is None:
        return Terms(0, spill, 0, None, "off", "sticky")
    caps = granted.caps.get("backend") or None
    return Terms(granted.quantity, spill, granted.rollover_cap, caps, granted.cadence, granted.anchor)


def next_terms(catalogue: Catalogue, plan: str, balance: Balance) -> Terms:
    """What `plan` grants on the meter of `balance`; a plan that is gone keeps the terms in force."""
    if plan in catalogue.plans:
        return terms_of(catalogue, plan, balance.meter)
    return Terms(*(getattr(balance, name) for name in Terms._fields))


def open_balance(catalogue: Catalogue, plan: str, meter: str, start: datetime, end: datetime | None = None) -> Balance:
    """A first period of `meter` on `plan` from `start`, with the allowance that the catalogue grants now.

    `end` is known only where the payment provider sets the bounds.
    """
    return _open(meter, terms_of(catalogue, plan, meter), start, end)


def opened_meter(balance: Balance) -> Change:
    """The step that opens the first period of a meter, with what it brings along."""
    return Change("open_meter", "open", balance.meter, None, balance, {})


def _open(meter: str, terms: Terms, start: datetime, end: datetime | None = None) -> Balance:
    if terms.cadence in CALENDAR_CADENCES:
        end = boundary(start, terms.cadence, 1)
    elif terms.cadence != "subscription":
        end = None
    return Balance(meter, *terms, start, 0, start, end, 0, 0, 0)


def _fresh(balance: Balance, terms: Terms, start: datetime, end: datetime | None = None) -> Balance:
    """A new period from `start` that keeps rollover and purchased credits; a lifetime period goes on where it was."""
    opened = _open(balance.meter, terms, start, end)
    parked = balance.parked
    if terms.cadence == "lifetime" and parked is not None:
        opened = opened._replace(period_start=parked.period_start, used=parked.used, cap_used=parked.cap_used)
        parked = None
    return opened._replace(rollover=balance.rollover, purchased=balance.purchased, parked=parked)


# ---------------------------------------------------------------------------------------------------------------------
# Closing


def next_period(balance: Balance, terms: Terms, status: str, until: datetime) -> tuple[Balance, int] | None:
    """The period of `terms` that holds `until`, all boundaries crossed at once, and how many periods were skipped.

    None when no boundary is due. A floating period is refilled whenever this is asked, so ask only when it is used.
    """
    due = balance.period_end
    if due is None or not next_is_due(balance, until):
        return None
    rollover = _closing_rollover(balance, status)
    if balance.anchor == "floating":
        return _fresh(balance._replace(rollover=rollover), terms, until), 0
    if terms.cadence not in CALENDAR_CADENCES or terms.anchor == "floating":
        closed = balance._replace(rollover=rollover)
        opened = _fresh(closed, terms, due)
        # Where even the first floating period is over, missed ones are not stacked: it starts now.
        return (_fresh(closed, terms, until) if next_is_due(opened, until) else opened), 0
    same_grid = terms.cadence == balance.cadence
    anchor, first = (balance.anchored_at, balance.period_index + 1) if same_grid else (due, 0)
    index = max(first, index_at(anchor, terms.cadence, until))
    skipped = index - first
    limit = limit_in_force(terms.allowance, status)
    if skipped and limit and terms.spill:
        rollover = rolled_over(limit * skipped, 0, rollover, terms.rollover_cap)
    start, end = boundary(anchor, terms.cadence, index), boundary(anchor, terms.cadence, index + 1)
    contents = 0, rollover, balance.purchased
    return Balance(balance.meter, *terms, anchor, index, start, end, *contents, parked=balance.parked), skipped


def next_is_due(balance: Balance, now: datetime) -> bool:
    """True when the calendar says that the open period is over."""
    end = balance.period_end
    return end is not None and end <= now and balance.cadence in CALENDAR_CADENCES


def renewed(balance: Balance, terms: Terms, status: str, start: datetime, end: datetime | None) -> Balance:
    """The period from `start` to `end` that the payment provider says follows the open one."""
    closed = balance._replace(rollover=_closing_rollover(balance, status))
    opened = _fresh(closed, terms, start, end)
    return opened._replace(period_index=balance.period_index + 1) if terms.cadence == "subscription" else opened


def _closing_rollover(balance: Balance, status: str) -> int:
    if not balance.spill:
        return balance.rollover
    # What is left of a floating period pays debt and is lost otherwise, whatever the cap.
    cap = 0 if balance.anchor == "floating" else balance.rollover_cap
    return rolled_over(limit_in_force(balance.allowance, status), balance.used, balance.rollover, cap)


# ---------------------------------------------------------------------------------------------------------------------
# Changing the plan


def with_terms(balance: Balance, terms: Terms, at: datetime) -> Balance:
    """The open period under other terms: bounds, used and rollover stay.

    Leaving a lifetime plan parks its usage and anchors a new period at `at`; coming back goes on with it. Where the
    cadence changes, the new one is anchored at the end of the open period, or at `at` where that has none.
    """
    if terms.cadence == "lifetime" or balance.cadence == "lifetime":
        if terms.cadence == balance.cadence:
            return balance._replace(**terms._asdict())
        if balance.cadence == "lifetime":
            parked = Parked(balance.period_start, balance.used, balance.cap_used)
            return _fresh(balance._replace(parked=parked), terms, at)
        return _fresh(balance, terms, at)
    changed = balance._replace(**terms._asdict())
    if (terms.cadence, terms.anchor) == (balance.cadence, balance.anchor):
        return changed
    if terms.cadence not in CALENDAR_CADENCES:
        return changed._replace(anchored_at=at, period_index=0, period_end=None)
    if balance.period_end is not None and balance.period_end > at:
        return changed._replace(anchored_at=balance.period_end, period_index=-1)
    start = max(at, balance.period_start)  # the provider's may be yet to begin
    return changed._replace(anchored_at=start, period_index=0, period_end=boundary(start, terms.cadence, 1))


def until_provided(balance: Balance, end: datetime | None) -> Balance:
    """The period under terms that the provider renews, with its word on the end; unless it began only after that."""
    if balance.cadence != "subscription" or end is None or end <= balance.period_start:
        return balance
    return balance._replace(period_end=end)


def under_plan(balance: Balance, terms: Terms, status: str, at: datetime) -> tuple[Balance, bool]:
    """What a plan taken at `at` with these terms makes of a balance, and whether its open period is closed by that."""
    if _closes_with_plan(balance, terms, at):
        return renewed(balance, terms, status, at, None), True
    return with_terms(balance, terms, at), False


def _closes_with_plan(balance: Balance, terms: Terms, at: datetime) -> bool:
    """True when the open period ends at `at` though no sticky calendar says so: the provider's last one on this plan,
    or a floating one that is over and that nobody would refill any more.

    Where the provider renews the new `terms`, too, the period stays open for its invoice, however late that is.
    """
    if balance.anchor == "floating" and next_is_due(balance, at):
        return (terms.cadence, terms.anchor) != (balance.cadence, balance.anchor)
    if balance.cadence != "subscription" or terms.cadence == "subscription":
        return False
    return balance.period_end is not None and balance.period_end <= at


# ---------------------------------------------------------------------------------------------------------------------
# What is due
