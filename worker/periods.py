"""Periods: which allowance is in force, and when. Pure rules, no I/O."""

from __future__ import annotations

from datetime import datetime

from config.catalogue import Catalogue
from worker.snapshot import Account, Balance


def open_balance(catalogue: Catalogue, plan: str, meter: str, start: datetime, end: datetime | None = None) -> Balance:
    """A first period of `meter` on `plan` from `start`, with the allowance that the catalogue grants now.

    A meter that the plan does not name has no allowance; rollover and purchased credits can still pay for it.
    `end` is known only where the payment provider sets the bounds; without a renewal the period stays open.
    """
    allowance = catalogue.plans[plan].meters.get(meter) if plan in catalogue.plans else None
    return Balance(
        meter=meter,
        allowance=allowance.quantity if allowance else 0,
        spill=catalogue.spills.get(meter, True),
        rollover_cap=allowance.rollover_cap if allowance else 0,
        cadence=allowance.cadence if allowance else "off",
        anchor=allowance.anchor if allowance else "sticky",
        anchored_at=start,
        period_index=0,
        period_start=start,
        period_end=end,
        used=0,
        rollover=0,
        purchased=0,
    )


def open_account(
    catalogue: Catalogue, user_id: str, plan: str, status: str, start: datetime, end: datetime | None = None
) -> Account:
    """A new account on `plan`, version 0, with a first period from `start` for every meter of the plan."""
    meters = catalogue.plan(plan).meters
    balances = {meter: open_balance(catalogue, plan, meter, start, end) for meter in meters}
    return Account(user_id, plan, status, "new", 0, balances)


def with_plan_meters(catalogue: Catalogue, account: Account, now: datetime) -> Account:
    """The account with a first period, not stored yet, for each meter its plan gained since it was opened."""
    plan = catalogue.plans.get(account.plan)
    missing = [meter for meter in plan.meters if meter not in account.balances] if plan else []
    if not missing:
        return account
    added = {meter: open_balance(catalogue, account.plan, meter, now) for meter in missing}
    return account._replace(balances={**account.balances, **added})
