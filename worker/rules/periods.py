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

from calendar import monthrange
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from config.catalogue import Catalogue
from worker.rules.account import Account, Balance, Parked
from worker.rules.waterfall import limit_in_force

_STEPS = {"weekly": timedelta(days=7), "daily": timedelta(days=1)}
CALENDAR_CADENCES = frozenset({"monthly", *_STEPS})
_SHORTEST_MONTH = 28


class Terms(NamedTuple):
    """What a plan grants on one meter."""

    allowance: int | None
    spill: bool
    rollover_cap: int
    caps: Mapping[str, int] | None
    cadence: str
    anchor: str


class Invoice(NamedTuple):
    """A period that was paid; `key` makes it count once."""

    invoice_id: str
    key: str
    period_start: datetime
    period_end: datetime


class Change(NamedTuple):
    """One change of an account that is not usage; each becomes a ledger entry.

    `key` makes it happen at most once. A step of the account as a whole has meter "" and no balances.
    """

    kind: str
    key: str
    meter: str
    before: Balance | None
    after: Balance | None
    detail: Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# The calendar


def boundary(anchor: datetime, cadence: str, index: int) -> datetime:
    """The boundary `index` steps behind `anchor`, at its time of day; a month too short ends on its last day."""
    if cadence != "monthly":
        return anchor + index * _STEPS[cadence]
    year, month = divmod(anchor.year * 12 + anchor.month - 1 + index, 12)
    day = anchor.day if anchor.day <= _SHORTEST_MONTH else min(anchor.day, monthrange(year, month + 1)[1])
    return anchor.replace(year=year, month=month + 1, day=day)


def index_at(anchor: datetime, cadence: str, now: datetime) -> int:
    """Index of the last boundary at or before `now`. Its cost does not depend on how far away that is."""
    if cadence != "monthly":
        return (now - anchor) // _STEPS[cadence]
    index = (now.year - anchor.year) * 12 + now.month - anchor.month
    return index if boundary(anchor, cadence, index) <= now else index - 1


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


def open_account(
    catalogue: Catalogue, user_id: str, plan: str, status: str, start: datetime, end: datetime | None = None
) -> Account:
    """A new account on `plan`, version 0, with a first period from `start` for every meter of the plan.

    A trial ends by itself, so many days after `start` as the plan says; 0 means that it does not.
    """
    found = catalogue.plan(plan)
    balances = {meter: open_balance(catalogue, plan, meter, start, end) for meter in found.meters}
    account = Account(user_id, plan, status, "new", 0, balances, found.tier)
    if status == "trialing" and found.trial_days:
        ends_at = start + timedelta(days=found.trial_days)
        account = account._replace(next_status="expired", status_change_at=ends_at)
    return account


def with_plan_meters(catalogue: Catalogue, account: Account, start: datetime, end: datetime | None = None) -> Account:
    """The account with a first period, not stored yet, for each meter of its plan that it lacks. See `open_balance`."""
    plan = catalogue.plans.get(account.plan)
    missing = [meter for meter in plan.meters if meter not in account.balances] if plan else []
    if not missing:
        return account
    added = {meter: open_balance(catalogue, account.plan, meter, start, end) for meter in missing}
    return account._replace(balances={**account.balances, **added})


def open_plan_meters(
    catalogue: Catalogue, account: Account, steps: list[Change], start: datetime, end: datetime | None = None
) -> Account:
    """`with_plan_meters` for good: each of them is a step."""
    opened = with_plan_meters(catalogue, account, start, end)
    steps += [opened_meter(balance) for meter, balance in opened.balances.items() if meter not in account.balances]
    return opened


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


def end_of_period(account: Account) -> datetime | None:
    """When the account's open period ends: the provider's word, else the longest calendar period; None if unknown."""
    balances = account.balances.values()
    provided = [b.period_end for b in balances if b.cadence == "subscription" and b.period_end is not None]
    sticky = [
        b.period_end
        for b in balances
        if b.cadence in CALENDAR_CADENCES and b.anchor == "sticky" and b.period_end is not None
    ]
    return max(provided or sticky, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# What is due


def is_due(account: Account, now: datetime, used: Collection[str]) -> bool:
    """True when a boundary of a meter in `used`, or a change of the whole account, is due. Floating meters are due only
    when they are used.
    """
    if account.status_change_at is not None and account.status_change_at <= now:
        return True
    if account.plan_change_at is not None and account.plan_change_at <= now:
        return True
    for meter in used:
        balance = account.balances.get(meter)
        if balance is not None and next_is_due(balance, now):
            return True
    return False


def bring_up_to_date(
    catalogue: Catalogue, account: Account, now: datetime, used: Collection[str] | None
) -> tuple[Account, list[Change]]:
    """Apply what is due, in the order of time: boundaries of the meters in `used`, and scheduled changes. None stands
    for all but the floating meters, which wait until they are used.

    Before a change of plan or status all sticky meters are brought to its moment, so that no period accrues under terms
    that were not in force. Returns the account, at the same version, and one step per change.
    """
    steps: list[Change] = []
    if not is_due(account, now, _sticky_meters(account) if used is None else used):
        return account, steps
    for at, change in _scheduled(account, now):
        account = _cross(catalogue, account, at, _sticky_meters(account), steps)
        account = change(catalogue, account, at, steps)
    # Asked again: a change of plan may have made a meter floating.
    return _cross(catalogue, account, now, _sticky_meters(account) if used is None else used, steps), steps


def bring_all_up_to_date(catalogue: Catalogue, account: Account, now: datetime) -> tuple[Account, list[Change]]:
    """`bring_up_to_date` for every meter but the floating ones, which wait until they are used."""
    return bring_up_to_date(catalogue, account, now, None)


def as_of(catalogue: Catalogue, account: Account, now: datetime) -> Account:
    """The account as a check sees it at `now`: with what is due applied, and with every meter of its plan.

    Nothing of it is stored; the next event, change or `renew_due` job will store the same.
    """
    current, steps = bring_up_to_date(catalogue, account, now, account.balances)
    if steps:  # a change of plan may have opened meters that are due since
        current, _ = bring_up_to_date(catalogue, current, now, current.balances)
    return with_plan_meters(catalogue, current, now)


def change_plan(
    catalogue: Catalogue,
    account: Account,
    plan: str,
    at: datetime,
    steps: list[Change],
    period_end: datetime | None = None,
) -> Account:
    """Put the account on `plan` at `at`, with a first period from then on for each meter of the plan that it lacks.

    A provider's period that ends at `at` is closed; other periods stay open under the new terms. `period_end` is the
    provider's word on the end of the period where the new plan is renewed by invoices.
    """
    changed = announce_plan(catalogue, account, plan, at, steps)
    balances = dict(account.balances)
    for meter, before in account.balances.items():
        terms = next_terms(catalogue, plan, before)
        after, closes = under_plan(before, terms, account.status, at)
        after = until_provided(after, period_end)
        if after != before:
            balances[meter] = after
            facts = {"at": at, "closes": closes, **closing(account.plan, before, 0)}
            steps.append(Change("change_plan", f"plan:{at.isoformat()}", meter, before, after, facts))
    return open_plan_meters(catalogue, changed._replace(balances=balances), steps, at, period_end)


def renew_account(
    catalogue: Catalogue, account: Account, invoice: Invoice, now: datetime, steps: list[Change]
) -> Account | None:
    """Close the open period of every meter that the provider renews and open the invoice's; the others stay open.

    A change of plan that waits for the renewal takes effect with it. None when no open period began before the
    invoice's: then a later one is open already.
    """
    before = account.balances
    due = {
        meter
        for meter, balance in before.items()
        if balance.cadence == "subscription" and balance.period_start < invoice.period_start
    }
    if not due:
        return None
    left = account.plan
    if account.next_plan is not None and account.plan_change_at is None:
        account = announce_plan(catalogue, account, account.next_plan, now, steps)
    account = open_plan_meters(catalogue, account, steps, invoice.period_start, invoice.period_end)
    balances = dict(account.balances)
    for meter, balance in before.items():
        terms = next_terms(catalogue, account.plan, balance)
        if meter in due:
            after = renewed(balance, terms, account.status, invoice.period_start, invoice.period_end)
            detail = {"invoice_id": invoice.invoice_id, "plan": account.plan, **closing(left, balance, 0)}
            steps.append(Change("renewal", invoice.key, meter, balance, after, detail))
        elif account.plan != left:
            after, closes = under_plan(balance, terms, account.status, now)
            after = until_provided(after, invoice.period_end)
            detail = {"at": now, "closes": closes, **closing(left, balance, 0)}
            steps.append(Change("change_plan", f"plan:{now.isoformat()}", meter, balance, after, detail))
        else:
            continue
        balances[meter] = after
    return account._replace(balances=balances)


def announce_plan(catalogue: Catalogue, account: Account, plan: str, at: datetime, steps: list[Change]) -> Account:
    """The account under the name of `plan`, with its balances as they were."""
    # The plan that is left counts, too: accounts of the first releases have no rank stored.
    tiers = [catalogue.plans[code].tier for code in (account.plan, plan) if code in catalogue.plans]
    highest = max([account.highest_tier, *tiers])
    detail = {"plan": plan, "before": account.plan, "at": at, "highest_tier": highest}
    steps.append(Change("change_plan", f"plan:{at.isoformat()}", "", None, None, detail))
    return account._replace(plan=plan, highest_tier=highest, next_plan=None, plan_change_at=None)


def change_status(account: Account, status: str, at: datetime, steps: list[Change]) -> Account:
    """Give the account `status` at `at`. What was scheduled for its status is off, unless this says nothing of that."""
    changed = account._replace(status=status)
    if not leaves_schedule(status):
        changed = changed._replace(next_status=None, status_change_at=None)
    detail = {
        "status": status, "before": account.status, "at": at,
        "next_status": changed.next_status, "status_change_at": changed.status_change_at,
    }  # fmt: skip
    steps.append(Change("set_status", f"status:{at.isoformat()}", "", None, None, detail))
    return changed


def leaves_schedule(status: str) -> bool:
    """True for a status that is no word on whether the account is to end: a late payment takes no cancellation back."""
    return status in ("past_due", "trialing")


def _scheduled(account: Account, now: datetime) -> list[tuple[datetime, Any]]:
    due: list[tuple[datetime, Any]] = []
    if account.plan_change_at is not None and account.plan_change_at <= now:
        due.append((account.plan_change_at, _take_next_plan))
    if account.status_change_at is not None and account.status_change_at <= now:
        due.append((account.status_change_at, _take_next_status))
    return sorted(due, key=lambda change: change[0])


def _take_next_plan(catalogue: Catalogue, account: Account, at: datetime, steps: list[Change]) -> Account:
    return change_plan(catalogue, account, account.next_plan or account.plan, at, steps)


def _take_next_status(_: Catalogue, account: Account, at: datetime, steps: list[Change]) -> Account:
    return change_status(account, account.next_status or account.status, at, steps)


def _sticky_meters(account: Account) -> list[str]:
    return [meter for meter, balance in account.balances.items() if balance.anchor == "sticky"]


def _cross(
    catalogue: Catalogue, account: Account, until: datetime, meters: Collection[str], steps: list[Change]
) -> Account:
    """Bring these meters into the period that holds `until`."""
    balances = dict(account.balances)
    for meter in meters:
        before = account.balances.get(meter)
        if before is None or not next_is_due(before, until):  # asked here, too: most are not
            continue
        crossed = next_period(before, next_terms(catalogue, account.plan, before), account.status, until)
        if crossed is None or before.period_end is None:
            continue
        balances[meter], skipped = crossed
        facts = {"until": until, **closing(account.plan, before, skipped)}
        steps.append(Change("refill", f"refill:{before.period_end.isoformat()}", meter, before, balances[meter], facts))
    return account._replace(balances=balances)


def closing(plan: str, closed: Balance, skipped: int) -> dict[str, Any]:
    """What an entry remembers of the period before it: this is the history of periods."""
    names = ("period_start", "period_end", "allowance", "used", "rollover", "cap_used")
    return {"closed": {"plan": plan, "skipped": skipped, **{name: getattr(closed, name) for name in names}}}
