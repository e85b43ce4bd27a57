"""Periods: the allowance in force, its bounds, and the rest of it at the end. Pure rules, no I/O.

All bounds are UTC. A period includes its start and excludes its end. The golden cases are tests/vectors/periods.json
and tests/vectors/renewal.json.

The rules in one place:

- `subscription`: the payment provider sets the bounds. When they are over and no invoice came, a period of grace opens,
  and after it the limit is 0 until an invoice comes. What is left at the end rolls over if the provider vouched for it.
- `monthly`, `weekly`, `daily` with a sticky anchor: boundary k lies k steps after the anchor, so Feb 28 and Mar 31
  follow Jan 31. A dormant account jumps to the period that holds now; its skipped periods roll over up to the cap.
- the same with a floating anchor: the first use after the end refills it; the next period starts at that moment.
- `lifetime` and `off` never end. Lifetime usage is parked while the account is on another plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from config.catalogue import Catalogue
from worker.rules.account import Backing, Balance, Change, Parked
from worker.rules.calendar import CALENDAR_CADENCES, boundary, index_at
from worker.rules.limits import Per, of_plan, with_plan
from worker.rules.waterfall import ENTITLED_STATUSES, limit_in_force


class Terms(NamedTuple):
    """The grant of a plan on one meter. `limits` are those that it sets, by window."""

    allowance: int | None
    spill: bool
    rollover_cap: int
    caps: Mapping[str, int | None] | None
    cadence: str
    anchor: str
    timezone: str | None = None
    limits: Mapping[Per, int] | None = None

    @classmethod
    def of(cls, balance: Balance) -> Terms:
        """Return the terms in force in the open period of `balance`."""
        fields = {name: getattr(balance, name) for name in cls._fields}
        return cls(**{**fields, "limits": of_plan(balance.limits)})

    def for_balance(self, before: Balance | None = None) -> dict[str, Any]:
        """Return the fields of a balance under these terms; limits of others than the plan stay as in `before`."""
        return {**self._asdict(), "limits": with_plan(before.limits if before is not None else None, self.limits)}


class Paid(NamedTuple):
    """The time that invoices paid, of a plan whose calendar refills within it only, and the hours of grace after it."""

    since: datetime | None
    until: datetime | None
    grace: timedelta

    def backing_at(self, start: datetime, end: datetime) -> Backing:
        """Return who vouches for a calendar period from `start` to `end`.

        One that begins just before the paid time is over belongs to the next invoice, whose start is about there.
        """
        if self.until is None or start - self.until >= self.grace:
            return "missing"
        return "invoice" if self.until - start > self.slack(start, end) else "grace"

    def slack(self, start: datetime, end: datetime) -> timedelta:
        """Return how far an invoice may begin from a boundary of the calendar that it means."""
        return min(self.grace, (end - start) / 24)


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


def terms_of(
    catalogue: Catalogue, plan: str, meter: str, timezone: str | None = None, *, on_trial: bool = False
) -> Terms:
    """Return the grant of `plan` on `meter` now, or of its trial, in the account's `timezone`, else in the plan's.

    A meter that the plan lacks has no allowance; rollover and purchased credits can still pay for it. One that draws on
    a wallet has none of its own either; see `wallets`.
    """
    granted = None
    if plan in catalogue.plans:
        found = catalogue.plans[plan]
        granted = (found.trial_meters if on_trial else found.meters).get(meter)
    spill = catalogue.spills.get(meter, True)
    if granted is None:
        return Terms(0, spill, 0, None, "off", "sticky")
    caps: dict[str, int | None] = {**granted.caps.get("backend", {}), **granted.caps.get("meter", {})}
    if granted.cadence in CALENDAR_CADENCES:  # counted all the same: a plan with the sub-cap may follow in this period
        caps = {**dict.fromkeys(catalogue.capped_backends.get(meter, ())), **caps}
    zone = (timezone or found.timezone) if granted.cadence in CALENDAR_CADENCES else None
    limits = {limit.per: limit.amount for limit in granted.limits} or None
    return Terms(
        granted.quantity, spill, granted.rollover_cap, caps or None, granted.cadence, granted.anchor, zone, limits
    )


def next_terms(
    catalogue: Catalogue, plan: str, balance: Balance, timezone: str | None = None, *, on_trial: bool = False
) -> Terms:
    """Return the grant of `plan`, or of its trial, on the meter of `balance`, in the account's `timezone` if any.

    A plan that the catalogue lacks keeps the terms in force.
    """
    if plan in catalogue.plans:
        return terms_of(catalogue, plan, balance.meter, timezone, on_trial=on_trial)
    return Terms.of(balance)


def open_balance(
    catalogue: Catalogue,
    plan: str,
    meter: str,
    start: datetime,
    end: datetime | None = None,
    backing: Backing | None = None,
    timezone: str | None = None,
    *,
    on_trial: bool = False,
) -> Balance:
    """Return a first period of `meter` on `plan` from `start`, by today's catalogue.

    `end` is known only if the payment provider sets the bounds; by default it then vouches for them, too.
    """
    terms = terms_of(catalogue, plan, meter, timezone, on_trial=on_trial)
    if terms.cadence in CALENDAR_CADENCES and plan in catalogue.plans:
        backing = (backing or vouched(end)) if catalogue.plans[plan].paid_by_invoice else None
    return _open(meter, terms, start, end, backing)


def opened_meter(balance: Balance) -> Change:
    """Return the step that opens the first period of a meter.

    It keeps the rollover or debt that the account brings along.
    """
    return Change(kind="open_meter", key="open", meter=balance.meter, before=None, after=balance, detail={})


def _open(
    meter: str, terms: Terms, start: datetime, end: datetime | None = None, backing: Backing | None = None
) -> Balance:
    if terms.cadence in CALENDAR_CADENCES:
        end = boundary(start, terms.cadence, 1, terms.timezone)
    elif terms.cadence != "subscription":
        end = backing = None
    return Balance(
        meter=meter,
        **terms.for_balance(),
        anchored_at=start,
        period_index=0,
        period_start=start,
        period_end=end,
        backing=(backing or vouched(end)) if terms.cadence == "subscription" else backing,
        counted_from=start,
        used=0,
        rollover=0,
        purchased=0,
    )


def vouched(end: datetime | None) -> Backing:
    """Return who vouches for a period of which the payment provider named this end, but no invoice."""
    return "none" if end is None else "bounds"


def _fresh(
    balance: Balance, terms: Terms, start: datetime, end: datetime | None = None, backing: Backing | None = None
) -> Balance:
    """Return a new period from `start` that keeps rollover, purchased credits and the carried fraction.

    A lifetime period goes on with its usage.
    """
    opened = _open(balance.meter, terms, start, end, backing)
    parked = balance.parked
    if terms.cadence == "lifetime" and parked is not None:
        resumed = parked.period_start
        opened = opened._replace(period_start=resumed, counted_from=resumed, used=parked.used, cap_used=parked.cap_used)
        parked = None
    return opened._replace(
        rollover=balance.rollover, purchased=balance.purchased, parked=parked, carried=balance.carried,
        grants=balance.grants, limits=with_plan(balance.limits, terms.limits),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Closing


def next_period(
    balance: Balance, terms: Terms, status: str, until: datetime, paid: Paid | None = None
) -> tuple[Balance, int] | None:
    """Return the period of `terms` that holds `until`, and the number of skipped ones.

    It crosses all boundaries at once. None if no boundary is due. Every call refills a due floating period, so call it
    only for a use. `paid`: the calendar refills within that time only; other time accrues nothing, and the limit of a
    period that begins there is 0.
    """
    due = balance.period_end
    if due is None or not next_is_due(balance, until):
        return None
    rollover = balance.rollover if _forfeits(balance) else _closing_rollover(balance, status)
    if balance.anchor == "floating":
        return _paid_for(_fresh(balance._replace(rollover=rollover), terms, until), paid, balance), 0
    if terms.cadence not in CALENDAR_CADENCES or terms.anchor == "floating":
        closed = balance._replace(rollover=rollover)
        opened = _paid_for(_fresh(closed, terms, due), paid, balance)
        # If even the first floating period is over, it starts now: missed periods are not stacked.
        if next_is_due(opened, until):
            opened = _paid_for(_fresh(closed, terms, until), paid, balance)
        return opened, 0
    same_grid = (terms.cadence, terms.timezone) == (balance.cadence, balance.timezone)
    anchor, first = (balance.anchored_at, balance.period_index + 1) if same_grid else (due, 0)
    index = max(first, index_at(anchor, terms.cadence, until, terms.timezone))
    skipped = index - first
    limit = limit_in_force(terms.allowance, status)
    accruing = skipped
    if paid is not None:
        accruing = max(0, min(index, _paid_before(anchor, terms, paid, first)) - first)
    if accruing and limit and terms.spill:
        rollover = rolled_over(limit * accruing, 0, rollover, terms.rollover_cap)
    start, end = (boundary(anchor, terms.cadence, each, terms.timezone) for each in (index, index + 1))
    opened = Balance(
        meter=balance.meter,
        **terms.for_balance(balance),
        anchored_at=anchor,
        period_index=index,
        period_start=start,
        period_end=end,
        backing=None,
        counted_from=start,
        used=0,
        rollover=rollover,
        purchased=balance.purchased,
        parked=balance.parked,
        carried=balance.carried,
        grants=balance.grants,
    )
    return _paid_for(opened, paid, balance), skipped


def next_is_due(balance: Balance, now: datetime) -> bool:
    """True if the calendar says that the open period is over."""
    end = balance.period_end
    return end is not None and end <= now and balance.cadence in CALENDAR_CADENCES


_INSTANT = timedelta(microseconds=1)


def _paid_before(anchor: datetime, terms: Terms, paid: Paid, first: int) -> int:
    """Return the index of the first period that invoices do not pay, from `first` on."""
    if paid.until is None:
        return first
    index = index_at(anchor, terms.cadence, paid.until - _INSTANT, terms.timezone)
    start, end = (boundary(anchor, terms.cadence, each, terms.timezone) for each in (index, index + 1))
    return index + 1 if paid.backing_at(start, end) == "invoice" else index


def _paid_for(opened: Balance, paid: Paid | None, before: Balance) -> Balance:
    """Return a period of the calendar, after `before`, with who vouches for it, if invoices pay it."""
    if paid is None or opened.period_end is None or opened.cadence not in CALENDAR_CADENCES:
        return opened
    backing = paid.backing_at(opened.period_start, opened.period_end)
    # The plan has just begun to wait for invoices: the first one is still to come.
    return opened._replace(backing="none" if backing == "missing" and before.backing is None else backing)


# ---------------------------------------------------------------------------------------------------------------------
# The payment provider's periods

# How an invoice meets the open period: it names its bounds, follows it, begins within it, comes too late, or goes on
# with its calendar.
Meeting = Literal["adopts", "follows", "forfeits", "stale", "continues"]
# The rest rolls over of time for which somebody vouched.
_VOUCHED = (None, "bounds", "invoice")


def renewed(
    balance: Balance,
    terms: Terms,
    status: str,
    start: datetime,
    end: datetime | None,
    backing: Backing | None = None,
    *,
    forfeits: bool = False,
) -> Balance:
    """Return the period that follows the open one by the payment provider's word.

    It lasts from `start` to `end`. If it `forfeits`, the open period's rest is lost, and pays no debt.
    """
    closed = balance if forfeits else balance._replace(rollover=_closing_rollover(balance, status))
    opened = _fresh(closed, terms, start, end, backing)
    return opened._replace(period_index=balance.period_index + 1) if terms.cadence == "subscription" else opened


def meeting_of(balance: Balance, start: datetime, end: datetime, grace: timedelta) -> Meeting:
    """Return how an invoice for the time from `start` to `end` meets the open period of `balance`.

    A period for which no invoice was named yet is adopted if it began at most `grace` before the invoice's, or later.
    """
    opened, over, backing = balance.period_start, balance.period_end, balance.backing
    if end <= opened:
        return "stale"
    if over is not None and start >= over and backing != "grace":
        return "follows"
    waits_for_invoice = backing != "invoice" and (backing != "bounds" or abs(opened - start) <= grace)
    if waits_for_invoice:
        return "adopts" if opened >= start - grace else "forfeits"
    return "forfeits" if start > opened else "stale"


def calendar_meeting_of(balance: Balance, paid: Paid, start: datetime, end: datetime) -> Meeting:
    """Return how an invoice for the time from `start` to `end` meets an open period whose calendar invoices pay."""
    opened, ends = balance.period_start, balance.period_end
    if end <= opened or ends is None:
        return "stale"
    slack = paid.slack(opened, ends)
    if paid.until is None or paid.since is None or balance.backing in (None, "none", "trial"):
        if opened > start + slack or (opened >= start and balance.period_index > 0):
            return "continues"  # periods of its time are closed already
        return "adopts" if opened >= start - paid.grace else "forfeits"
    if abs(paid.since - start) <= paid.grace:  # it pays what was named by its bounds
        return "continues" if opened >= start - paid.grace else "forfeits"
    if start >= paid.until - slack:
        return "continues" if abs(_boundary_before(balance, start + slack) - start) <= slack else "follows"
    return "forfeits" if start > paid.since else "stale"


def _boundary_before(balance: Balance, at: datetime) -> datetime:
    """Return the last boundary of a calendar at or before `at`.

    Before its anchor the calendar had none, only the start of a period that was open when it was anchored.
    """
    index = index_at(balance.anchored_at, balance.cadence, at, balance.timezone)
    if index < 0:
        return balance.period_start
    return boundary(balance.anchored_at, balance.cadence, index, balance.timezone)


def calendar_met(
    balance: Balance, terms: Terms, status: str, start: datetime, end: datetime, meeting: Meeting, grace: timedelta
) -> Balance:
    """Return what an invoice makes of an open period whose calendar invoices pay.

    Unless it goes on with the calendar, that begins anew with the invoice; adopted, with what was used.
    """
    provided = terms.cadence == "subscription"
    if meeting == "continues" and not provided:
        ends = balance.period_end
        slack = timedelta(0) if ends is None else Paid(start, end, grace).slack(balance.period_start, ends)
        is_paid = balance.period_start >= start - slack
        return balance._replace(backing="invoice") if is_paid else balance
    forfeits = meeting in ("forfeits", "continues") or _forfeits(balance)
    opened = renewed(balance, terms, status, start, end if provided else None, "invoice", forfeits=forfeits)
    if meeting != "adopts":
        return opened
    return opened._replace(
        counted_from=balance.counted_from, used=balance.used, cap_used=balance.cap_used, rollover=balance.rollover
    )


def adopted(balance: Balance, terms: Terms, start: datetime, end: datetime) -> Balance:
    """Return the open period with the bounds of the invoice that pays it; `used` stays."""
    return balance._replace(
        **terms.for_balance(balance), anchored_at=start, period_start=start, period_end=end, backing="invoice"
    )


def met(balance: Balance, terms: Terms, status: str, start: datetime, end: datetime, meeting: Meeting) -> Balance:
    """Return the period that an invoice makes of the open one, which it does not come too late for."""
    if meeting == "adopts":
        return adopted(balance, terms, start, end)
    forfeits = meeting == "forfeits" or _forfeits(balance)
    return renewed(balance, terms, status, start, end, "invoice", forfeits=forfeits)


def _forfeits(balance: Balance) -> bool:
    """True if the rest of the open period is lost at its end, as nobody vouched for it."""
    return balance.backing not in _VOUCHED


def is_lapsing(balance: Balance, status: str, grace: timedelta) -> bool:
    """True if the open period ends by itself at its end, though the payment provider renews it.

    Without hours of grace the period of an entitled account stays open until its invoice comes.
    """
    if balance.cadence != "subscription" or balance.period_end is None:
        return False
    return bool(grace) or balance.backing == "grace" or status not in ENTITLED_STATUSES


def lapsed(balance: Balance, terms: Terms, status: str, grace: timedelta) -> Balance:
    """Return what follows the open period at its end, as no invoice came.

    An entitled account gets a period of `grace`; after it, or without it, the limit is 0 until an invoice comes.
    """
    over = balance.period_end
    assert over is not None
    if balance.backing == "grace":
        return balance._replace(backing="missing", period_end=None)
    forfeits = _forfeits(balance)
    if status in ENTITLED_STATUSES and grace:
        return renewed(balance, terms, status, over, over + grace, "grace", forfeits=forfeits)
    return renewed(balance, terms, status, over, None, "missing", forfeits=forfeits)


def resumed(balance: Balance, at: datetime, grace: timedelta) -> Balance:
    """Return the period of an account that is entitled again at `at`, while its invoice is missing.

    What it used stays: an unpaid time never gives more than one allowance.
    """
    if not grace:
        return balance._replace(backing="none", period_start=at, anchored_at=at, period_end=None)
    return balance._replace(backing="grace", period_start=at, anchored_at=at, period_end=at + grace)


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
    cadence is anchored at the end of the open period, or at `at` if that has no end. Usage of an unlimited allowance
    without end does not count in a calendar period, unless it began less than such a period ago.
    """
    if terms.cadence == "lifetime" or balance.cadence == "lifetime":
        if terms.cadence == balance.cadence:
            return balance._replace(**terms.for_balance(balance))
        if balance.cadence == "lifetime":
            parked = Parked(balance.period_start, balance.used, balance.cap_used)
            return _fresh(balance._replace(parked=parked), terms, at)
        return _fresh(balance, terms, at)
    changed = balance._replace(**terms.for_balance(balance))
    if (terms.cadence, terms.anchor, terms.timezone) == (balance.cadence, balance.anchor, balance.timezone):
        return changed
    changed = changed._replace(backing="none" if terms.cadence == "subscription" else None)
    if terms.cadence not in CALENDAR_CADENCES:
        return changed._replace(anchored_at=at, period_index=0, period_end=None)
    if balance.period_end is not None and balance.period_end > at and balance.backing != "grace":
        return changed._replace(anchored_at=balance.period_end, period_index=-1)
    start = max(at, balance.period_start)  # the provider's may be yet to begin
    endless = balance.allowance is None and balance.period_end is None
    if endless and boundary(balance.period_start, terms.cadence, 1, terms.timezone) <= at:
        return _fresh(balance, terms, start)
    return changed._replace(
        anchored_at=start, period_index=0, period_end=boundary(start, terms.cadence, 1, terms.timezone)
    )


def until_provided(balance: Balance, end: datetime | None) -> Balance:
    """Return the period with the end that the payment provider names.

    A period stays as it is if the calendar sets its bounds, or if it began only after that end.
    """
    if balance.cadence != "subscription" or end is None or end <= balance.period_start:
        return balance
    return balance._replace(period_end=end, backing="bounds" if balance.backing in _OPEN_ENDED else balance.backing)


def corrected(balance: Balance, end: datetime) -> Balance:
    """Return the open period with the payment provider's end, or of a calendar: with paid time up to that."""
    if balance.cadence == "subscription":
        return until_provided(balance, end)
    return balance._replace(backing="bounds") if balance.backing in _OPEN_ENDED else balance


# Periods that wait for the provider's word about their end.
_OPEN_ENDED = ("none", "grace", "missing")


def under_plan(balance: Balance, terms: Terms, status: str, at: datetime) -> tuple[Balance, bool]:
    """Return a balance under a plan with these terms, taken at `at`.

    Says also whether that closed the open period.
    """
    if _closes_with_plan(balance, terms, at):
        return renewed(balance, terms, status, at, None, forfeits=_forfeits(balance)), True
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
