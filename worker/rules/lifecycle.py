"""The life of an account: open it, cross its boundaries, change its plan or status. Pure rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from config.catalogue import Catalogue
from worker.rules.account import Account, Backing, Balance, Change, Waiting, schedule_of
from worker.rules.calendar import CALENDAR_CADENCES
from worker.rules.credits import STARTED, cross_grants
from worker.rules.periods import (
    Meeting,
    Paid,
    Terms,
    calendar_meeting_of,
    calendar_met,
    corrected,
    is_lapsing,
    lapsed,
    meeting_of,
    met,
    next_is_due,
    next_period,
    next_terms,
    open_balance,
    opened_meter,
    resumed,
    terms_of,
    under_plan,
    until_provided,
    vouched,
)
from worker.rules.wallets import draws_of
from worker.rules.waterfall import ENTITLED_STATUSES


class Invoice(NamedTuple):
    """A paid period; `key` makes it count once."""

    invoice_id: str
    key: str
    period_start: datetime
    period_end: datetime


def invoice_in(change: Waiting) -> Invoice:
    """Return the invoice that waits."""
    assert change.period_start is not None
    assert change.period_end is not None
    return Invoice(change.name, f"renew:{change.name}", change.period_start, change.period_end)


def open_account(
    catalogue: Catalogue,
    user_id: str,
    plan: str,
    status: str,
    start: datetime,
    end: datetime | None = None,
    timezone: str | None = None,
) -> Account:
    """Return a new account on `plan`, version 0, with a first period for every meter.

    The periods begin at `start`. A trial ends at `end`, else after the days of its plan; with 0 days it does not end.
    """
    found = catalogue.plan(plan)
    ends_at = end_of_trial(catalogue, plan, start, end) if status == "trialing" else end
    on_trial = status == "trialing"
    backing: Backing | None = "trial" if on_trial and not found.trial_rollover else None
    balances = {
        meter: open_balance(catalogue, plan, meter, start, ends_at, backing, timezone, on_trial=on_trial)
        for meter in (found.trial_meters if on_trial else found.meters)
    }
    account = Account(
        user_id=user_id,
        plan=plan,
        status=status,
        trust="new",
        version=0,
        balances=balances,
        highest_tier=found.tier,
        timezone=timezone,
    )
    if status == "trialing" and ends_at is not None:
        account = account._replace(next_status="expired", status_change_at=ends_at)
    if found.paid_by_invoice and end is not None and status != "trialing":
        account = account._replace(paid_from=start, paid_until=end)
    return account


def end_of_trial(catalogue: Catalogue, plan: str, start: datetime, end: datetime | None) -> datetime | None:
    """Return the end of a trial: the provider's, else by the days of the plan. None: it does not end by itself."""
    found = catalogue.plans.get(plan)
    return end if end is not None or found is None or not found.trial_days else start + found.trial_length


def with_plan_meters(
    catalogue: Catalogue,
    account: Account,
    start: datetime,
    end: datetime | None = None,
    backing: Backing | None = None,
) -> Account:
    """Return the account with a first period for each meter of its plan that it lacks.

    The periods are not stored yet. See `open_balance`.
    """
    plan = catalogue.plans.get(account.plan)
    missing = [meter for meter in plan.meters if meter not in account.balances] if plan else []
    if not missing:
        return account
    added = {
        meter: open_balance(catalogue, account.plan, meter, start, end, backing, account.timezone) for meter in missing
    }
    return account._replace(balances={**account.balances, **added})


def open_late(catalogue: Catalogue, account: Account, meter: str, start: datetime) -> Balance:
    """Return a first period of one more meter of an open account.

    Where the provider renews it, it ends with the account's other periods, and the same vouches for it.
    """
    siblings = (balance for balance in account.balances.values() if balance.cadence == "subscription")
    sibling = next(siblings, None)
    end, backing = (sibling.period_end, sibling.backing) if sibling else (None, None)
    if end is not None and end <= start:
        end = None
    return open_balance(catalogue, account.plan, meter, start, end, backing, account.timezone)


def open_plan_meters(
    catalogue: Catalogue,
    account: Account,
    steps: list[Change],
    start: datetime,
    end: datetime | None = None,
    backing: Backing | None = None,
) -> Account:
    """Do the same as `with_plan_meters` for good: add a step for each period."""
    opened = with_plan_meters(catalogue, account, start, end, backing)
    steps += [opened_meter(balance) for meter, balance in opened.balances.items() if meter not in account.balances]
    return opened


def end_of_period(account: Account) -> datetime | None:
    """Return the end of the account's open period; None if unknown.

    It is the payment provider's, else that of the longest calendar period.
    """
    balances = account.balances.values()
    if account.paid_until is not None and any(is_paid_calendar(balance) for balance in balances):
        return account.paid_until
    provided = [
        b.period_end
        for b in balances
        if b.cadence == "subscription" and b.period_end is not None and b.backing != "grace"
    ]
    sticky = [
        b.period_end
        for b in balances
        if b.cadence in CALENDAR_CADENCES and b.anchor == "sticky" and b.period_end is not None
    ]
    return max(provided or sticky, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# What the account does by itself


def first_change(catalogue: Catalogue, account: Account, used: Collection[str] | None) -> datetime | None:
    """Return the earliest moment at which the account changes by itself: a boundary, or a change that waits.

    Of the boundaries of calendar, grants and limits only those of the meters in `used` count; None stands for all, but
    for floating calendars and windows of limits, which wait for a use. The moment may be over.
    """
    due = [at for at, _, _ in _changes(catalogue, account)]
    for meter in account.balances if used is None else used:
        balance = account.balances.get(meter)
        if balance is None:
            continue
        counts = used is not None or balance.anchor == "sticky"
        if counts and balance.period_end is not None and balance.cadence in CALENDAR_CADENCES:
            due.append(balance.period_end)
        if balance.grants is not None:
            due += balance.grants.boundaries()
        if balance.limits is not None and used is not None:  # a window waits for a use
            due.append(balance.limits.next_window())
    return min(due, default=None)


def bring_up_to_date(
    catalogue: Catalogue, account: Account, now: datetime, used: Collection[str] | None
) -> tuple[Account, list[Change]]:
    """Apply due boundaries of the meters in `used`, and changes, in time order.

    None stands for all but the floating meters, which wait for a use. Before a change of the whole account it brings
    all sticky meters to its moment, so that no period accrues under terms that were not in force.
    Returns the account, at the same version, and one step per change.
    """
    steps: list[Change] = []
    first = first_change(catalogue, account, used)
    if first is None or first > now:
        return account, steps
    while due := min(_changes(catalogue, account), default=None, key=_when):
        at, _, change = due
        if at > now:
            break
        account = _cross(catalogue, account, at, _sticky_meters(account), steps)
        account = change(catalogue, account, at, steps)
    # Computed again: a change of plan may have made a meter floating.
    account = _cross(catalogue, account, now, _sticky_meters(account) if used is None else used, steps)
    account = cross_grants_of(account, now, account.balances if used is None else used, steps)
    return (account if used is None else _open_windows(catalogue, account, now, used, steps)), steps


def bring_all_up_to_date(catalogue: Catalogue, account: Account, now: datetime) -> tuple[Account, list[Change]]:
    """Do the same as `bring_up_to_date` for every meter but the floating ones."""
    return bring_up_to_date(catalogue, account, now, None)


def as_of(catalogue: Catalogue, account: Account, now: datetime) -> Account:
    """Return the account as a check sees it at `now`.

    Due boundaries are applied, and every meter of the plan is there. Nothing of it is stored; the next event, change or
    `renew_due` job will store the same.
    """
    current, steps = bring_up_to_date(catalogue, account, now, account.balances)
    if steps:  # a change of plan may have opened meters that are due since
        current, _ = bring_up_to_date(catalogue, current, now, current.balances)
    whole = with_plan_meters(catalogue, current, now)
    if whole is not current:  # the limits of the new meters have windows also
        whole = _open_windows(catalogue, whole, now, whole.balances, [])
    draws = draws_of(catalogue, whole.plan, whole.status)
    return whole._replace(draws=draws) if draws else whole


_TakeChange = Callable[[Catalogue, Account, datetime, list[Change]], Account]
_Due = tuple[datetime, int, _TakeChange]


def _changes(catalogue: Catalogue, account: Account) -> list[_Due]:
    """Return the changes of the whole account that are scheduled or follow by themselves: when, in which order, what.

    At one moment the status changes first: it decides what the end of a period is worth. A plan and an invoice belong
    to the period that begins then.
    """
    due: list[_Due] = []
    grace, status = catalogue.renewal_grace, account.status
    if account.status_change_at is not None:
        due.append((account.status_change_at, 0, _take_next_status))
    for balance in account.balances.values():
        if account.paid_until is not None and _may_miss(balance):
            due.append((account.paid_until + grace, 1, _miss_invoice))
        elif balance.period_end is not None and is_lapsing(balance, status, grace):
            due.append((balance.period_end, 1, _lapse))
    if account.plan_change_at is not None:
        due.append((account.plan_change_at, 2, _take_next_plan))
    if account.waiting:
        due.append((account.waiting[0].at, 3, _take_waiting))
    return due


def _when(due: _Due) -> tuple[datetime, int]:
    return due[0], due[1]


def _take_next_plan(catalogue: Catalogue, account: Account, at: datetime, steps: list[Change]) -> Account:
    return change_plan(catalogue, account, account.next_plan or account.plan, at, steps)


def _take_next_status(catalogue: Catalogue, account: Account, at: datetime, steps: list[Change]) -> Account:
    return change_status(catalogue, account, account.next_status or account.status, at, steps)


def _take_waiting(catalogue: Catalogue, account: Account, at: datetime, steps: list[Change]) -> Account:
    """Let the first change take effect that waits; an invoice that comes too late by now has none."""
    change = account.waiting[0]
    account = account._replace(waiting=account.waiting[1:])
    if change.kind == "plan" and change.name == account.plan:
        account = account._replace(next_plan=None, plan_change_at=None)
    elif change.kind == "next_plan":
        account = account._replace(next_plan=change.name, plan_change_at=change.period_start)
    elif change.kind == "next_status":
        account = account._replace(next_status=change.name, status_change_at=change.period_start)
    steps.append(account_step("taken", _key(f"taken:{change.kind}:{change.name}", at, account), schedule_of(account)))
    if change.kind == "plan" and change.name != account.plan:
        return change_plan(catalogue, account, change.name, at, steps, change.period_end)
    if change.kind == "status":
        return change_status(catalogue, account, change.name, at, steps)
    if change.kind == "invoice":
        return renew_account(catalogue, account, invoice_in(change), at, steps) or account
    if change.kind == "period" and change.period_end is not None:
        return set_period(account, change.period_end, f"period:{change.name}", steps) or account
    return account


def _may_miss(balance: Balance) -> bool:
    """True if the limit of an open calendar period falls to 0 when the paid time and its hours of grace are over."""
    return is_paid_calendar(balance) and balance.backing != "missing"


def _miss_invoice(_: Catalogue, account: Account, at: datetime, steps: list[Change]) -> Account:
    """Set the limit of calendar periods to 0 that no invoice pays from `at` on."""
    balances = dict(account.balances)
    for meter, balance in account.balances.items():
        if _may_miss(balance):
            after = balances[meter] = balance._replace(backing="missing")
            key = _key("missing", at, account)
            detail = {"at": at}
            steps.append(Change(kind="missing", key=key, meter=meter, before=balance, after=after, detail=detail))
    return account._replace(balances=balances)


def _lapse(catalogue: Catalogue, account: Account, at: datetime, steps: list[Change]) -> Account:
    """End the provider's periods that are over at `at`, as no invoice came.

    A plan that waits for the provider's next period comes with it, unless the account is not entitled any more.
    """
    grace = catalogue.renewal_grace
    over = {
        meter
        for meter, balance in account.balances.items()
        if balance.period_end is not None and balance.period_end <= at and is_lapsing(balance, account.status, grace)
    }

    def follow(balance: Balance, terms: Terms) -> tuple[Balance, str, dict[str, Any]]:
        return lapsed(balance, terms, account.status, grace), "lapse", {"at": at}

    begins = account.status in ENTITLED_STATUSES and any(account.balances[meter].backing != "grace" for meter in over)
    return _into_next(
        catalogue, account, at, _key("lapse", at, account), over, follow, steps,
        takes_plan=begins,
        end=at + grace if begins and grace else None,
        backing="grace" if begins and grace else "missing",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is done to it


def change_plan(
    catalogue: Catalogue,
    account: Account,
    plan: str,
    at: datetime,
    steps: list[Change],
    period_end: datetime | None = None,
) -> Account:
    """Put the account on `plan` at `at`; open a period for each meter that it lacks.

    It closes a provider's period that ends at `at`; other periods stay open under the new terms. `period_end` is the
    provider's end of the period, if invoices renew the new plan.
    """
    account = _with_paid_time(catalogue, account, plan, at, period_end)
    changed = announce_plan(catalogue, account, plan, at, steps)
    balances = dict(account.balances)
    for meter, before in account.balances.items():
        after, step = _under_plan(catalogue, account, plan, before, at, period_end)
        if after != before:
            balances[meter] = after
            steps.append(step)
    return open_plan_meters(catalogue, changed._replace(balances=balances), steps, at, period_end)


def _with_paid_time(
    catalogue: Catalogue, account: Account, plan: str, at: datetime, period_end: datetime | None
) -> Account:
    """Return the account with the time that is paid, if it comes to a plan whose calendar invoices pay."""
    if not _is_paid_by_invoice(catalogue, plan) or _is_paid_by_invoice(catalogue, account.plan):
        return account
    if period_end is not None:
        return account._replace(paid_from=at, paid_until=period_end)
    if account.paid_until is not None and account.paid_until <= at:
        return account._replace(paid_from=None, paid_until=None)
    return account


def _under_plan(
    catalogue: Catalogue,
    account: Account,
    plan: str,
    before: Balance,
    at: datetime,
    period_end: datetime | None,
    *,
    with_invoice: bool = False,
) -> tuple[Balance, Change]:
    """Return the open period of a meter under `plan`, taken at `at`, and the step.

    `period_end` is the end that the payment provider named, or the invoice with which the plan comes.
    """
    after, closes = under_plan(before, _terms(catalogue, account, before, plan), account.status, at)
    after = until_provided(after, period_end)
    if after.cadence in CALENDAR_CADENCES:
        backing = _calendar_backing(catalogue, account, plan, before, at, period_end, with_invoice=with_invoice)
        after = after._replace(backing=backing)
    detail = {"at": at, "closes": closes, **closing(account.plan, before, 0)}
    key = _key("plan", at, account)
    return after, Change(kind="change_plan", key=key, meter=before.meter, before=before, after=after, detail=detail)


def _calendar_backing(
    catalogue: Catalogue,
    account: Account,
    plan: str,
    before: Balance,
    at: datetime,
    period_end: datetime | None,
    *,
    with_invoice: bool,
) -> Backing | None:
    """Return who vouches for an open calendar period under `plan`, taken at `at`."""
    if not _is_paid_by_invoice(catalogue, plan):
        return None
    if is_paid_calendar(before):
        return before.backing
    if account.status == "trialing":
        return "trial"
    if period_end is not None and not with_invoice and not _is_paid_by_invoice(catalogue, account.plan):
        return "bounds"  # the paid time is what the provider named: its invoice is still to come
    return "invoice" if account.paid_until is not None and at < account.paid_until else vouched(period_end)


def _is_paid_by_invoice(catalogue: Catalogue, plan: str) -> bool:
    return plan in catalogue.plans and catalogue.plans[plan].paid_by_invoice


def is_invoiced(catalogue: Catalogue, account: Account, balance: Balance) -> bool:
    """True for a period that invoices renew, or whose calendar they pay."""
    is_calendar = balance.cadence in CALENDAR_CADENCES
    return balance.backing is not None or (is_calendar and _is_paid_by_invoice(catalogue, account.plan))


def is_paid_calendar(balance: Balance) -> bool:
    """True for a period of a calendar that refills within time that invoices paid only."""
    return balance.backing is not None and balance.cadence in CALENDAR_CADENCES


def renew_account(
    catalogue: Catalogue, account: Account, invoice: Invoice, now: datetime, steps: list[Change]
) -> Account | None:
    """Give the provider's periods to the invoice: it adopts those that nobody vouched for and closes the others.

    The other periods stay open. A plan change that waits for the provider's next period takes effect with it. Returns
    None if the invoice comes too late for all of them.
    """
    grace = catalogue.renewal_grace
    paid = Paid(account.paid_from, account.paid_until, grace)
    meetings = {
        meter: _meeting_of(balance, invoice, paid)
        for meter, balance in account.balances.items()
        if is_invoiced(catalogue, account, balance)
    }
    due = {meter for meter, meeting in meetings.items() if meeting != "stale"}
    if not due:
        return None
    account = account._replace(paid_from=invoice.period_start, paid_until=invoice.period_end)
    facts = {"invoice_id": invoice.invoice_id, "period_start": invoice.period_start, "period_end": invoice.period_end}
    steps.append(account_step("paid", f"paid:{invoice.invoice_id}", {**facts, **schedule_of(account)}))
    status = account.status
    takes_plan = account.next_plan is not None and account.plan_change_at is None
    if takes_plan:  # a period that the new plan leaves to the calendar has no bounds to adopt
        plan = account.next_plan or account.plan
        due -= {
            meter
            for meter in due
            if meetings[meter] == "adopts"
            and account.balances[meter].cadence == "subscription"
            and next_terms(catalogue, plan, account.balances[meter], account.timezone).cadence != "subscription"
        }

    def follow(balance: Balance, terms: Terms) -> tuple[Balance, str, dict[str, Any]]:
        meeting: Meeting = meetings[balance.meter]
        if meeting == "adopts" and not takes_plan and not _is_trial(catalogue, account, balance):
            terms = Terms.of(balance)  # the open period keeps the allowance in force
        facts = {"invoice_id": invoice.invoice_id, "meeting": meeting, "grace_s": grace.total_seconds()}
        if balance.cadence == "subscription":
            after = met(balance, terms, status, invoice.period_start, invoice.period_end, meeting)
            return after, "renewal", facts
        after = calendar_met(balance, terms, status, invoice.period_start, invoice.period_end, meeting, grace)
        facts |= {
            "paid_from": paid.since,
            "paid_until": paid.until,
            "bounds": [invoice.period_start, invoice.period_end],
            "grid": "anchored",
        }
        return after, "renewal", facts

    return _into_next(
        catalogue, account, now, invoice.key, due, follow, steps,
        takes_plan=takes_plan, start=invoice.period_start, end=invoice.period_end, backing="invoice",
    )  # fmt: skip


def _is_trial(catalogue: Catalogue, account: Account, balance: Balance) -> bool:
    """True if the open period is tried out, also if its rest rolls over."""
    on_trial = terms_of(catalogue, account.plan, balance.meter, account.timezone, on_trial=True)
    return balance.backing == "trial" or Terms.of(balance) == on_trial


def _meeting_of(balance: Balance, invoice: Invoice, paid: Paid) -> Meeting:
    start, end = invoice.period_start, invoice.period_end
    if balance.cadence == "subscription":
        return meeting_of(balance, start, end, paid.grace)
    return calendar_meeting_of(balance, paid, start, end)


def _into_next(
    catalogue: Catalogue,
    account: Account,
    at: datetime,
    key: str,
    due: Collection[str],
    follow: Callable[[Balance, Terms], tuple[Balance, str, dict[str, Any]]],
    steps: list[Change],
    *,
    takes_plan: bool,
    start: datetime | None = None,
    end: datetime | None = None,
    backing: Backing = "missing",
) -> Account:
    """Let the provider's next period begin on the meters that are `due`: `follow` says what becomes of each.

    If it `takes_plan`, a plan that waits for this period takes effect first, for the other meters at `at`.
    """
    left, before = account.plan, account.balances
    if takes_plan and account.next_plan is not None and account.plan_change_at is None:
        account = announce_plan(catalogue, account, account.next_plan, at, steps)
    account = open_plan_meters(catalogue, account, steps, start or at, end, backing)
    balances = dict(account.balances)
    for meter, balance in before.items():
        if meter in due:
            after, kind, facts = follow(balance, next_terms(catalogue, account.plan, balance, account.timezone))
            if after.cadence in CALENDAR_CADENCES and not _is_paid_by_invoice(catalogue, account.plan):
                after = after._replace(backing=None)
            closes = closing(left, balance, 0) if after.counted_from != balance.counted_from else {}
            detail = {**facts, "plan": account.plan, **closes}
            balances[meter] = after
            steps.append(Change(kind=kind, key=key, meter=meter, before=balance, after=after, detail=detail))
        elif account.plan != left:
            left_account = account._replace(plan=left)
            by_invoice = backing == "invoice"
            balances[meter], step = _under_plan(
                catalogue, left_account, account.plan, balance, at, end if by_invoice else None, with_invoice=by_invoice
            )
            steps.append(step)
    return account._replace(balances=balances)


def _key(kind: str, at: datetime, account: Account) -> str:
    """Return the key of a change at a moment.

    A correction or a late invoice may let the same moment come again: the version tells the two apart.
    """
    return f"{kind}:{at.isoformat()}:{account.version}"


def announce_plan(catalogue: Catalogue, account: Account, plan: str, at: datetime, steps: list[Change]) -> Account:
    """Return the account under the name of `plan`, with its balances as they were."""
    # The plan before counts also: accounts of the first releases have no stored rank.
    tiers = [catalogue.plans[code].tier for code in (account.plan, plan) if code in catalogue.plans]
    highest = max([account.highest_tier, *tiers])
    detail = {
        "plan": plan, "before": account.plan, "at": at, "highest_tier": highest,
        "paid_from": account.paid_from, "paid_until": account.paid_until,
    }  # fmt: skip
    steps.append(account_step("change_plan", _key("plan", at, account), detail))
    return account._replace(plan=plan, highest_tier=highest, next_plan=None, plan_change_at=None)


def change_status(catalogue: Catalogue, account: Account, status: str, at: datetime, steps: list[Change]) -> Account:
    """Give the account `status` at `at`.

    It cancels a scheduled change of status, unless `status` leaves the schedule. A trial gets its end. Where the
    provider's period is over already, an account that is entitled no more closes it, and one that is entitled again
    waits for its invoice in hours of grace.
    """
    was_entitled, is_entitled = account.status in ENTITLED_STATUSES, status in ENTITLED_STATUSES
    begins_trial = status == "trialing" and account.status != "trialing"
    if was_entitled and not is_entitled:
        account = _close_overdue(catalogue, account, at, steps)
    changed = account._replace(status=status)
    if not leaves_schedule(status):
        changed = changed._replace(next_status=None, status_change_at=None)
    if begins_trial and changed.next_status is None:
        ends_at = end_of_trial(catalogue, account.plan, at, end_of_period(account))
        if ends_at is not None and ends_at > at:
            changed = changed._replace(next_status="expired", status_change_at=ends_at)
    detail = {
        "status": status, "before": account.status, "at": at,
        "next_status": changed.next_status, "status_change_at": changed.status_change_at,
    }  # fmt: skip
    key = _key("status", at, account)
    steps.append(account_step("set_status", key, detail))
    balances = dict(changed.balances)
    plan = catalogue.plans.get(account.plan)
    loses_rest = begins_trial and not (plan is not None and plan.trial_rollover)
    for meter, balance in changed.balances.items():
        after = balance
        if is_entitled and not was_entitled and balance.backing == "missing" and balance.cadence == "subscription":
            after = resumed(balance, at, catalogue.renewal_grace)
        elif loses_rest and balance.backing in ("none", "bounds"):
            after = balance._replace(backing="trial")
        elif account.status == "trialing" and is_entitled and balance.backing is None:
            after, step = _under_plan(catalogue, changed, account.plan, balance, at, None)
            if after != balance:  # the trial had an allowance of its own
                steps.append(step)
                balances[meter] = after
            continue
        if after != balance:
            detail = {"at": at, "grace_s": catalogue.renewal_grace.total_seconds()}
            kind = "trial" if after.backing == "trial" else "resume"
            steps.append(Change(kind=kind, key=key, meter=meter, before=balance, after=after, detail=detail))
            balances[meter] = after
    return changed._replace(balances=balances)


def _close_overdue(catalogue: Catalogue, account: Account, at: datetime, steps: list[Change]) -> Account:
    """Close the provider's periods that were over before `at`, while the account was entitled.

    Without hours of grace they are open until then.
    """
    over = {
        meter
        for meter, balance in account.balances.items()
        if balance.cadence == "subscription" and balance.period_end is not None and balance.period_end < at
    }

    def follow(balance: Balance, terms: Terms) -> tuple[Balance, str, dict[str, Any]]:
        return lapsed(balance, terms, account.status, timedelta(0)), "lapse", {"at": at}

    if not over:
        return account
    return _into_next(catalogue, account, at, _key("lapse", at, account), over, follow, steps, takes_plan=False)


def set_period(account: Account, end: datetime, key: str, steps: list[Change]) -> Account | None:
    """Correct the end of the open periods that the provider renews, and of a trial. None: there is no such period."""
    balances = dict(account.balances)
    detail: dict[str, Any] = {"end": end}
    changed = []
    for meter, balance in account.balances.items():
        if balance.backing is not None and balance.period_start < end:
            balances[meter] = corrected(balance, end)
            changed.append(
                Change(kind="set_period", key=key, meter=meter, before=balance, after=balances[meter], detail=detail)
            )
    on_trial = account.status == "trialing"
    if not changed and not on_trial:
        return None
    account = account._replace(balances=balances)
    if on_trial:
        account = account._replace(next_status="expired", status_change_at=end)
    starts = [balance.period_start for balance in account.balances.values() if is_paid_calendar(balance)]
    since = account.paid_from or min(starts, default=None)
    if since is not None and end > since:
        account = account._replace(paid_from=since, paid_until=end)
    steps += [account_step("set_period", key, {**detail, **schedule_of(account)}), *changed]
    return account


def leaves_schedule(status: str) -> bool:
    """True for a status that leaves a scheduled end: a late payment withdraws nothing."""
    return status in ("past_due", "trialing")


def account_step(kind: str, key: str, detail: Mapping[str, Any]) -> Change:
    """Return a change of the account as a whole."""
    return Change(kind=kind, key=key, meter="", before=None, after=None, detail=detail)


def waiting_with(account: Account, change: Waiting) -> Account:
    """Return the account with one more change that waits, in the order in which they take effect."""
    # Sorted is stable: of two at one moment, the earlier accepted takes effect first.
    return account._replace(waiting=tuple(sorted([*account.waiting, change], key=lambda each: each.at)))


def _terms(catalogue: Catalogue, account: Account, balance: Balance, plan: str | None = None) -> Terms:
    """Return the grant of `plan`, by default the account's, on the meter of `balance`; of its trial while it lasts."""
    on_trial = account.status == "trialing"
    return next_terms(catalogue, plan or account.plan, balance, account.timezone, on_trial=on_trial)


def _sticky_meters(account: Account) -> list[str]:
    return [meter for meter, balance in account.balances.items() if balance.anchor == "sticky"]


def _paid_by(catalogue: Catalogue, account: Account, terms: Terms) -> Paid | None:
    """Return the time that invoices paid, if the account's calendar refills within it only."""
    if terms.cadence not in CALENDAR_CADENCES or not _is_paid_by_invoice(catalogue, account.plan):
        return None
    return Paid(account.paid_from, account.paid_until, catalogue.renewal_grace)


def _cross(
    catalogue: Catalogue, account: Account, until: datetime, meters: Collection[str], steps: list[Change]
) -> Account:
    """Bring these meters into the period that holds `until`."""
    balances = dict(account.balances)
    for meter in meters:
        before = account.balances.get(meter)
        if before is None or not next_is_due(before, until):  # checked here also: most are not
            continue
        terms = _terms(catalogue, account, before)
        paid = _paid_by(catalogue, account, terms)
        crossed = next_period(before, terms, account.status, until, paid)
        if crossed is None or before.period_end is None:
            continue
        balances[meter], skipped = crossed
        facts = {"until": until, **closing(account.plan, before, skipped)}
        if paid is not None:
            facts |= {"grace_s": paid.grace.total_seconds(), "accrues": "paid"}
        steps.append(
            Change(
                kind="refill",
                key=f"refill:{before.period_end.isoformat()}"
                if paid is None
                else _key("refill", before.period_end, account),
                meter=meter,
                before=before,
                after=balances[meter],
                detail=facts,
            )
        )
    return account._replace(balances=balances)


def cross_grants_of(account: Account, until: datetime, meters: Collection[str], steps: list[Change]) -> Account:
    """Let the grants of these meters start and expire that are due at `until`.

    No period and no status changes what a grant is worth, so these boundaries may follow all others. Their steps are
    added to `steps`.
    """
    balances = dict(account.balances)
    for meter in meters:
        before = balances.get(meter)
        if before is None or before.grants is None:
            continue
        for (at, kind, grant), after in cross_grants(before, until):
            began = kind == "start"
            step = Change(
                kind="grant" if began else "expire",
                key=f"{STARTED}{grant.key}" if began else f"expire:{grant.key}",
                meter=meter,
                before=balances[meter],
                after=after,
                detail={"at": at, "units": grant.left},
            )
            steps.append(step)
            balances[meter] = after
    return account._replace(balances=balances)


def _open_windows(
    catalogue: Catalogue, account: Account, at: datetime, meters: Collection[str], steps: list[Change]
) -> Account:
    """Open the windows of limits of these meters that hold `at`, in place of those that are over."""
    balances = dict(account.balances)
    for meter in meters:
        before = balances.get(meter)
        if before is None or before.limits is None or before.limits.next_window() > at:
            continue
        zone = timezone_of(catalogue, account)
        since = account.version + len(steps) + 1  # the number of the entry itself
        balances[meter] = after = before._replace(limits=before.limits.opened(at, zone, since))
        detail = {"at": at, "timezone": zone}
        key = _key("window", at, account)
        steps.append(Change(kind="open_window", key=key, meter=meter, before=before, after=after, detail=detail))
    return account._replace(balances=balances)


def timezone_of(catalogue: Catalogue, account: Account) -> str | None:
    """Return the time zone of the account's calendar: its own, else that of its plan; None: UTC."""
    plan = catalogue.plans.get(account.plan)
    return account.timezone or (plan.timezone if plan else None)


def closing(plan: str, closed: Balance, skipped: int) -> dict[str, Any]:
    """Return the closed period as its ledger entry keeps it: this is the history of periods."""
    names = ("period_start", "period_end", "allowance", "used", "rollover", "cap_used")
    return {"closed": {"plan": plan, "skipped": skipped, **{name: getattr(closed, name) for name in names}}}
