"""The life of an account: open it, cross its boundaries, change its plan or status. Pure rules."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from config.catalogue import Catalogue
from worker.rules.account import Account, Balance, Change
from worker.rules.calendar import CALENDAR_CADENCES
from worker.rules.periods import (
    next_is_due,
    next_period,
    next_terms,
    open_balance,
    opened_meter,
    renewed,
    under_plan,
    until_provided,
)


class Invoice(NamedTuple):
    """A paid period; `key` makes it count once."""

    invoice_id: str
    key: str
    period_start: datetime
    period_end: datetime


def open_account(
    catalogue: Catalogue, user_id: str, plan: str, status: str, start: datetime, end: datetime | None = None
) -> Account:
    """Return a new account on `plan`, version 0, with a first period for every meter.

    The periods begin at `start`. A trial ends by itself after the days of its plan; with 0 days it does not end.
    """
    found = catalogue.plan(plan)
    balances = {meter: open_balance(catalogue, plan, meter, start, end) for meter in found.meters}
    account = Account(
        user_id=user_id, plan=plan, status=status, trust="new", version=0, balances=balances, highest_tier=found.tier
    )
    if status == "trialing" and found.trial_days:
        ends_at = start + timedelta(days=found.trial_days)
        account = account._replace(next_status="expired", status_change_at=ends_at)
    return account


def with_plan_meters(catalogue: Catalogue, account: Account, start: datetime, end: datetime | None = None) -> Account:
    """Return the account with a first period for each meter of its plan that it lacks.

    The periods are not stored yet. See `open_balance`.
    """
    plan = catalogue.plans.get(account.plan)
    missing = [meter for meter in plan.meters if meter not in account.balances] if plan else []
    if not missing:
        return account
    added = {meter: open_balance(catalogue, account.plan, meter, start, end) for meter in missing}
    return account._replace(balances={**account.balances, **added})


def open_plan_meters(
    catalogue: Catalogue, account: Account, steps: list[Change], start: datetime, end: datetime | None = None
) -> Account:
    """Do the same as `with_plan_meters` for good: add a step for each period."""
    opened = with_plan_meters(catalogue, account, start, end)
    steps += [opened_meter(balance) for meter, balance in opened.balances.items() if meter not in account.balances]
    return opened


def end_of_period(account: Account) -> datetime | None:
    """Return the end of the account's open period; None if unknown.

    It is the payment provider's, else that of the longest calendar period.
    """
    balances = account.balances.values()
    provided = [b.period_end for b in balances if b.cadence == "subscription" and b.period_end is not None]
    sticky = [
        b.period_end
        for b in balances
        if b.cadence in CALENDAR_CADENCES and b.anchor == "sticky" and b.period_end is not None
    ]
    return max(provided or sticky, default=None)


def is_due(account: Account, now: datetime, used: Collection[str]) -> bool:
    """True if a boundary of a meter in `used`, or an account-wide change, is due.

    Floating meters are due only when an event uses them.
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
    """Apply due boundaries of the meters in `used`, and changes, in time order.

    None stands for all but the floating meters, which wait for a use. Before a change of plan or status it brings all
    sticky meters to its moment, so that no period accrues under terms that were not in force.
    Returns the account, at the same version, and one step per change.
    """
    steps: list[Change] = []
    if not is_due(account, now, _sticky_meters(account) if used is None else used):
        return account, steps
    for at, change in _scheduled(account, now):
        account = _cross(catalogue, account, at, _sticky_meters(account), steps)
        account = change(catalogue, account, at, steps)
    # Computed again: a change of plan may have made a meter floating.
    return _cross(catalogue, account, now, _sticky_meters(account) if used is None else used, steps), steps


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
    return with_plan_meters(catalogue, current, now)


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
    changed = announce_plan(catalogue, account, plan, at, steps)
    balances = dict(account.balances)
    for meter, before in account.balances.items():
        terms = next_terms(catalogue, plan, before)
        after, closes = under_plan(before, terms, account.status, at)
        after = until_provided(after, period_end)
        if after != before:
            balances[meter] = after
            facts = {"at": at, "closes": closes, **closing(account.plan, before, 0)}
            steps.append(
                Change(
                    kind="change_plan",
                    key=f"plan:{at.isoformat()}",
                    meter=meter,
                    before=before,
                    after=after,
                    detail=facts,
                )
            )
    return open_plan_meters(catalogue, changed._replace(balances=balances), steps, at, period_end)


def renew_account(
    catalogue: Catalogue, account: Account, invoice: Invoice, now: datetime, steps: list[Change]
) -> Account | None:
    """Close each open period that the provider renews, and open the invoice's.

    The other periods stay open. A plan change that waits for the renewal takes effect with it. Returns None if no open
    period began before the invoice's: a later one is open already.
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
            steps.append(
                Change(kind="renewal", key=invoice.key, meter=meter, before=balance, after=after, detail=detail)
            )
        elif account.plan != left:
            after, closes = under_plan(balance, terms, account.status, now)
            after = until_provided(after, invoice.period_end)
            detail = {"at": now, "closes": closes, **closing(left, balance, 0)}
            steps.append(
                Change(
                    kind="change_plan",
                    key=f"plan:{now.isoformat()}",
                    meter=meter,
                    before=balance,
                    after=after,
                    detail=detail,
                )
            )
        else:
            continue
        balances[meter] = after
    return account._replace(balances=balances)


def announce_plan(catalogue: Catalogue, account: Account, plan: str, at: datetime, steps: list[Change]) -> Account:
    """Return the account under the name of `plan`, with its balances as they were."""
    # The plan before counts also: accounts of the first releases have no stored rank.
    tiers = [catalogue.plans[code].tier for code in (account.plan, plan) if code in catalogue.plans]
    highest = max([account.highest_tier, *tiers])
    detail = {"plan": plan, "before": account.plan, "at": at, "highest_tier": highest}
    steps.append(
        Change(kind="change_plan", key=f"plan:{at.isoformat()}", meter="", before=None, after=None, detail=detail)
    )
    return account._replace(plan=plan, highest_tier=highest, next_plan=None, plan_change_at=None)


def change_status(account: Account, status: str, at: datetime, steps: list[Change]) -> Account:
    """Give the account `status` at `at`.

    It cancels a scheduled change of status, unless `status` leaves the schedule.
    """
    changed = account._replace(status=status)
    if not leaves_schedule(status):
        changed = changed._replace(next_status=None, status_change_at=None)
    detail = {
        "status": status, "before": account.status, "at": at,
        "next_status": changed.next_status, "status_change_at": changed.status_change_at,
    }  # fmt: skip
    steps.append(
        Change(kind="set_status", key=f"status:{at.isoformat()}", meter="", before=None, after=None, detail=detail)
    )
    return changed


def leaves_schedule(status: str) -> bool:
    """True for a status that leaves a scheduled end: a late payment withdraws nothing."""
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
        if before is None or not next_is_due(before, until):  # checked here also: most are not
            continue
        crossed = next_period(before, next_terms(catalogue, account.plan, before), account.status, until)
        if crossed is None or before.period_end is None:
            continue
        balances[meter], skipped = crossed
        facts = {"until": until, **closing(account.plan, before, skipped)}
        steps.append(
            Change(
                kind="refill",
                key=f"refill:{before.period_end.isoformat()}",
                meter=meter,
                before=before,
                after=balances[meter],
                detail=facts,
            )
        )
    return account._replace(balances=balances)


def closing(plan: str, closed: Balance, skipped: int) -> dict[str, Any]:
    """Return the closed period as its ledger entry keeps it: this is the history of periods."""
    names = ("period_start", "period_end", "allowance", "used", "rollover", "cap_used")
    return {"closed": {"plan": plan, "skipped": skipped, **{name: getattr(closed, name) for name in names}}}
