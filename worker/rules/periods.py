"""Periods: the allowance in force, its bounds, and the rest of it at the end. Pure rules, no I/O.

All bounds are UTC. A period includes its start and excludes its end. The golden cases are tests/vectors/periods.json
and tests/vectors/renewal.json.

The rules in one place:

- `subscription`: the payment provider sets the bounds by `renewed`; without a renewal the period stays open.
- `monthly`, `weekly`, `daily` with a sticky anchor: boundary k lies k steps after the anchor, so Feb 28 and Mar 31
  follow Jan 31. A dormant account jumps to the period that holds now; its skipped periods roll over up to the cap.
- the same with a floating anchor: the first use after the end refills it; the next period starts at that moment.
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
    """The grant of a plan on one meter."""

    allowance: int | None
    spill: bool
    rollover_cap: int
    caps: Mapping[str, int] | None
    cadence: str
    anchor: str


# ---------------------------------------------------------------------------------------------------------------------
# Rollover


def rolled_over(limit: int | None, used: int, rollover: int, cap: int) -> int:
    """Return the rollover after a period closes.

    Unused allowance first pays debt, then accrues up to `cap`. Nothing already granted is taken away; unlimited and
    zero limits leave the rollover as it is.
    """
    if not limit:
        return rollover
    return max(rollover, min(rollover + max(0, limit - used), cap))


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def terms_of(catalogue: Catalogue, plan: str, meter: str) -> Terms:
    """Return the grant of `plan` on `meter` now.

    A meter that the plan lacks has no allowance; rollover and purchased credits can still pay for it.
    """
    granted = catalogue.plans[plan].meters.get(meter) if plan in catalogue.plans else None
    spill = catalogue.spills.get(meter, True)
    if granted is None:
        return Terms(0, spill, 0, None, "off", "sticky")
    caps = granted.caps.get("backend") or None
    return Terms(granted.quantity, spill, granted.rollover_cap, caps, granted.cadence, granted.anchor)


def next_terms(catalogue: Catalogue, plan: str, balance: Balance) -> Terms:
    """Return the grant of `plan` on the meter of `balance`.

    A plan that the catalogue lacks keeps the terms in force.
    """
    if plan in catalogue.plans:
        return terms_of(catalogue, plan, balance.meter)
    return Terms(*(getattr(balance, name) for name in Terms._fields))


def open_balance(catalogue: Catalogue, plan: str, meter: str, start: datetime, end: datetime | None = None) -> Balance:
    """Return a first period of `meter` on `plan` from `start`, by today's catalogue.

    `end` is known only if the payment provider sets the bounds.
    """
    return _open(meter, terms_of(catalogue, plan, meter), start, end)


def opened_meter(balance: Balance) -> Change:
    """Return the step that opens the first period of a meter.

    It keeps the rollover or debt that the account brings along.
    """
    return Change(kind="open_meter", key="open", meter=balance.meter, before=None, after=balance, detail={})


def _open(meter: str, terms: Terms, start: datetime, end: datetime | None = None) -> Balance:
    if terms.cadence in CALENDAR_CADENCES:
        end = boundary(start, terms.cadence, 1)
    elif terms.cadence != "subscription":
        end = None
    return Balance(
        meter=meter,
        **terms._asdict(),
        anchored_at=start,
        period_index=0,
        period_start=start,
        period_end=end,
        used=0,
        rollover=0,
        purchased=0,
    )


def _fresh(balance: Balance, terms: Terms, start: datetime, end: datetime | None = None) -> Balance:
    """Return a new period from `start` that keeps rollover and purchased credits.

    A lifetime period goes on with its usage.
    """
    opened = _open(balance.meter, terms, start, end)
    parked = balance.parked
    if terms.cadence == "lifetime" and parked is not None:
        opened = opened._replace(period_start=parked.period_start, used=parked.used, cap_used=parked.cap_used)
        parked = None
    return opened._replace(rollover=balance.rollover, purchased=balance.purchased, parked=parked)


# ---------------------------------------------------------------------------------------------------------------------
# Closing


def next_period(balance: Balance, terms: Terms, status: str, until: datetime) -> tuple[Balance, int] | None:
    """Return the period of `terms` that holds `until`, and the number of skipped ones.

    It crosses all boundaries at once. None if no boundary is due. Every call refills a due floating period, so call it
    only for a use.
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
        # If even the first floating period is over, it starts now: missed periods are not stacked.
        return (_fresh(closed, terms, until) if next_is_due(opened, until) else opened), 0
    same_grid = terms.cadence == balance.cadence
    anchor, first = (balance.anchored_at, balance.period_index + 1) if same_grid else (due, 0)
    index = max(first, index_at(anchor, terms.cadence, until))
    skipped = index - first
    limit = limit_in_force(terms.allowance, status)
    if skipped and limit and terms.spill:
        rollover = rolled_over(limit * skipped, 0, rollover, terms.rollover_cap)
    start, end = boundary(anchor, terms.cadence, index), boundary(anchor, terms.cadence, index + 1)
    opened = Balance(
        meter=balance.meter,
        **terms._asdict(),
        anchored_at=anchor,
        period_index=index,
        period_start=start,
        period_end=end,
        used=0,
        rollover=rollover,
        purchased=balance.purchased,
        parked=balance.parked,
    )
    return opened, skipped


def next_is_due(balance: Balance, now: datetime) -> bool:
    """True if the calendar says that the open period is over."""
    end = balance.period_end
    return end is not None and end <= now and balance.cadence in CALENDAR_CADENCES


def renewed(balance: Balance, terms: Terms, status: str, start: datetime, end: datetime | None) -> Balance:
    """Return the period that follows the open one by the payment provider's word.

    It lasts from `start` to `end`.
    """
    closed = balance._replace(rollover=_closing_rollover(balance, status))
    opened = _fresh(closed, terms, start, end)
    return opened._replace(period_index=balance.period_index + 1) if terms.cadence == "subscription" else opened


def _closing_rollover(balance: Balance, status: str) -> int:
    if not balance.spill:
        return balance.rollover
    # The rest of a floating period pays debt. Any more of it is lost, at any cap.
    cap = 0 if balance.anchor == "floating" else balance.rollover_cap
    return rolled_over(limit_in_force(balance.allowance, status), balance.used, balance.rollover, cap)


# ---------------------------------------------------------------------------------------------------------------------
# Changing the plan


def with_terms(balance: Balance, terms: Terms, at: datetime) -> Balance:
    """Return the open period under other terms: bounds, used and rollover stay.

    Leaving a lifetime plan parks its usage and anchors a new period at `at`; coming back resumes the usage. A new
    cadence is anchored at the end of the open period, or at `at` if that has no end.
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
    """Return the period with the end that the payment provider names.

    A period stays as it is if the calendar sets its bounds, or if it began only after that end.
    """
    if balance.cadence != "subscription" or end is None or end <= balance.period_start:
        return balance
    return balance._replace(period_end=end)


def under_plan(balance: Balance, terms: Terms, status: str, at: datetime) -> tuple[Balance, bool]:
    """Return a balance under a plan with these terms, taken at `at`.

    Says also whether that closed the open period.
    """
    if _closes_with_plan(balance, terms, at):
        return renewed(balance, terms, status, at, None), True
    return with_terms(balance, terms, at), False


def _closes_with_plan(balance: Balance, terms: Terms, at: datetime) -> bool:
    """True if the open period ends at `at` without a sticky calendar's boundary.

    It is the provider's last one on this plan, or a floating one that is over and that no use would refill any more. If
    the provider renews the new `terms` also, the period stays open for its invoice, however late that is.
    """
    if balance.anchor == "floating" and next_is_due(balance, at):
        return (terms.cadence, terms.anchor) != (balance.cadence, balance.anchor)
    if balance.cadence != "subscription" or terms.cadence == "subscription":
        return False
    return balance.period_end is not None and balance.period_end <= at
