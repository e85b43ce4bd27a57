"""Accounts from the ledger file of a relay."""

from __future__ import annotations

import json
from calendar import monthrange
from datetime import datetime
from typing import Annotated, Any

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
)

from config.catalogue import Catalogue
from schemas.events import Identifier
from worker.admin.transfer_rows import (
    Arrival,
    Month,
    Repeated,
    Row,
    Time,
    Total,
    WrongValue,
    parse_row,
    repeats_marked,
    require_known,
)
from worker.ledger.accounts import State
from worker.rules.account import Balance, Parked
from worker.rules.calendar import CALENDAR_CADENCES, boundary, index_at
from worker.rules.lifecycle import open_account
from worker.rules.periods import Terms, terms_of

RELAY_METER = "relay_credits"


class _RelayRow(Row):
    """A relay's row of an install, which may repeat the id that it is filed under.

    Older relays know a month instead of a renewal, the oldest neither.
    """

    install_id: str | None = None
    tier_snapshot: str
    lifetime_consumed: Total = 0
    lifetime_gemini_consumed: Total = 0
    last_renewal_at: Time | None = None
    month: Month | None = None
    anniversary_day: Annotated[int, Field(ge=1, le=31)] | None = None
    monthly_consumed: Total = 0
    monthly_gemini_consumed: Total = 0
    last_active_at: Time | None = None

    @field_validator("month")
    @classmethod
    def _instead_of_a_renewal(cls, month: datetime | None, info: ValidationInfo) -> datetime | None:
        if month is not None and info.data.get("last_renewal_at") is not None:
            raise ValueError("must be left out where last_renewal_at is given")
        return month


def _relay_state(catalogue: Catalogue, install_id: str, row: _RelayRow, now: datetime) -> State:
    """Return the account of an install, opened `now`. Raises WrongValue."""
    plan = _relay_plan(catalogue, row.tier_snapshot)
    renewed_at = row.last_renewal_at or row.month or now
    try:
        anchor = _anchor_of(renewed_at, row.anniversary_day or renewed_at.day)
        balance = _relay_balance(terms_of(catalogue, plan, RELAY_METER), row, renewed_at, anchor)
    except (ValueError, OverflowError):
        field = "last_renewal_at" if row.month is None else "month"
        raise WrongValue(field, f"must be well within the calendar (got {renewed_at.isoformat()!r})") from None
    account = open_account(catalogue, install_id, plan, "active", now)
    account = account._replace(balances={**account.balances, RELAY_METER: balance})
    lives = {**dict.fromkeys(account.balances, (0, 0)), RELAY_METER: (row.lifetime_consumed, 0)}
    return State(account, now, lives)


def _relay_plan(catalogue: Catalogue, tier: str) -> str:
    """Return the plan of a relay's tier: its namesake, or that name with `_relay`.

    The suffix is for names that another kind of plan has.
    """
    plans = {code for code, plan in catalogue.plans.items() if RELAY_METER in plan.meters}
    require_known("tier_snapshot", tier, plans | {code.removesuffix("_relay") for code in plans})
    return tier if tier in plans else f"{tier}_relay"


def _anchor_of(renewed_at: datetime, day: int) -> datetime:
    """Return the latest moment on `day` of a month that is not after `renewed_at`.

    It has the time of day of `renewed_at`.
    """
    back = 0
    while True:
        first = boundary(renewed_at.replace(day=1), "monthly", -back)
        if day <= monthrange(first.year, first.month)[1] and first.replace(day=day) <= renewed_at:
            return first.replace(day=day)
        back += 1


def _relay_balance(terms: Terms, row: _RelayRow, renewed_at: datetime, anchor: datetime) -> Balance:
    """Return the usage of an install, in the period of its last renewal.

    Under a lifetime tier that is its lifetime usage. Under any other tier the lifetime usage is parked until the
    lifetime tier returns. It began just before the anchor, as the start of a period tells usages apart.
    """
    counted = {"gemini": row.lifetime_gemini_consumed}
    if terms.cadence == "lifetime":
        return Balance(
            meter=RELAY_METER,
            **terms._asdict(),
            anchored_at=anchor,
            period_index=0,
            period_start=anchor,
            period_end=None,
            backing=None,
            counted_from=anchor,
            used=row.lifetime_consumed,
            rollover=0,
            purchased=0,
            cap_used=counted,
        )
    parked = Parked(anchor - datetime.resolution, row.lifetime_consumed, counted)
    calendar = terms.cadence in CALENDAR_CADENCES
    cadence = terms.cadence if calendar else "monthly"
    index = index_at(anchor, cadence, renewed_at)
    start, counted = boundary(anchor, cadence, index), {"gemini": row.monthly_gemini_consumed}
    balance = Balance(
        meter=RELAY_METER,
        **terms._asdict(),
        anchored_at=start,
        period_index=0,
        period_start=start,
        period_end=None,
        backing="none" if terms.cadence == "subscription" else None,
        counted_from=start,
        used=row.monthly_consumed,
        rollover=0,
        purchased=0,
        cap_used=counted,
        parked=parked,
    )
    if not calendar:
        return balance
    return balance._replace(anchored_at=anchor, period_index=index, period_end=boundary(anchor, cadence, index + 1))


class _Install(Row):
    install_id: Identifier


def install(catalogue: Catalogue, number: int, install_id: str, value: object, now: datetime) -> Arrival:
    """Return the account of an install, to be opened `now`. Raises WrongValue."""
    parse_row(_Install, {"install_id": install_id})
    if isinstance(value, Repeated):
        raise WrongValue(value.repeated(), "must be given once")
    row = parse_row(_RelayRow, value)
    if row.install_id not in (None, install_id):
        raise WrongValue("install_id", f"must be the id that the row is filed under (got {row.install_id!r:.64})")
    facts = {} if row.last_active_at is None else {"last_active_at": row.last_active_at}
    return Arrival(number, _relay_state(catalogue, install_id, row, now), facts)


def installs_of(text: str) -> list[tuple[str, Any]] | None:
    """Return install ids and rows if `text` is the ledger of a relay, else None.

    Such a ledger is a JSON object with `rows`; other names are ignored.
    """
    try:
        # For an export this fails after the first line, as more follows.
        whole = json.loads(text, object_pairs_hook=repeats_marked)
    except (ValueError, RecursionError):
        return None
    rows = whole.get("rows") if isinstance(whole, dict) else None
    if not isinstance(rows, dict):
        return None
    return rows.pairs if isinstance(rows, Repeated) else list(rows.items())
