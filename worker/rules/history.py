"""Ledger entries: what every change that is not usage looks like in the ledger. Pure.

An entry stores the change of each bucket and the balances after it. Its detail says the rest: the terms from then on
where a period was opened or changed, and the period that was closed by it, which is the history of periods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from worker.rules.account import TERM_FIELDS, UNSAID, Account, Balance, Cause, Change, Parked, schedule_of
from worker.rules.grants import Grants
from worker.rules.limits import Limits
from worker.rules.periods import opened_meter, vouched
from worker.rules.rows import Changed, EntryRow, Limited, Writes
from worker.rules.waterfall import Buckets

# Kinds whose entry opens a period or changes its terms; everything about it is in the detail.
TERM_KINDS = frozenset(
    {"open_meter", "refill", "renewal", "lapse", "resume", "trial", "set_period", "missing", "change_plan", "close"}
)

# Kinds whose entry says which limits and windows there are after it, if there were or are any.
_LIMIT_KINDS = TERM_KINDS | {"set_limit", "open_window", "reversal"}

_NOTHING = Buckets(limit=0, used=0, rollover=0, purchased=0, spill=True)


def opened_account(account: Account, cause: Cause = UNSAID, **facts: object) -> list[Change]:
    """Steps that open `account`: one for the account, one per meter."""
    detail = {"plan": account.plan, "status": account.status, "trust": account.trust, **schedule_of(account), **facts}
    about = Change(kind="open", key="open", meter="", before=None, after=None, detail=detail)
    steps = [about, *(opened_meter(balance) for balance in account.balances.values())]
    return [step._replace(cause=cause) for step in steps]


def open_for_good(
    writes: Writes,
    account: Account,
    now: datetime,
    cause: Cause = UNSAID,
    *,
    seeded: Mapping[str, int] | None = None,
    **facts: object,
) -> Account:
    """Put a new account and its entries into `writes`; returns it at its first version.

    `seeded` are the units by meter that count as granted in its life.
    """
    if seeded:
        facts["seeded"] = seeded
    account = record(writes, account, opened_account(account, cause, **facts), now)
    writes.opened_accounts.append(account)
    writes.opened_balances.extend(
        Changed(user_id=account.user_id, balance=balance, consumed=0, granted=(seeded or {}).get(meter, 0))
        for meter, balance in account.balances.items()
    )
    writes.limits.extend(
        Limited(account.user_id, meter, balance.limits)
        for meter, balance in account.balances.items()
        if balance.limits is not None
    )
    return account


def record(writes: Writes, account: Account, steps: Sequence[Change], now: datetime) -> Account:
    """Put an entry for each step into `writes`, numbered behind the account's version; returns the new version."""
    version = account.version
    for step in steps:
        version += 1
        writes.entries.append(entry_of(account.user_id, version, step, now))
    return account._replace(version=version)


def record_change(
    writes: Writes,
    before: Account,
    after: Account,
    steps: Sequence[Change],
    now: datetime,
    *,
    consumed: Mapping[str, int] | None = None,
) -> Account:
    """Put into `writes` that `steps` turned the account `before` into `after`; returns that at its new version.

    `consumed` is added to the lifetime counters, by meter, and so is what the steps granted.
    """
    after = record(writes, after, steps, now)
    granted = granted_by(steps)
    for meter, balance in after.balances.items():
        used, given = (consumed or {}).get(meter, 0), granted.get(meter, 0)
        if balance == before.balances.get(meter) and not used and not given:
            continue
        changed = Changed(user_id=after.user_id, balance=balance, consumed=used, granted=given)
        (writes.retermed if meter in before.balances else writes.opened_balances).append(changed)
        known = before.balances.get(meter)
        if balance.limits is not None or (known is not None and known.limits is not None):
            writes.limits.append(Limited(after.user_id, meter, balance.limits))
    if is_restated(before, after):
        writes.restated.append(after)
    if after.version > before.version:
        writes.versions.append((after.user_id, after.version))
    return after


def granted_by(steps: Sequence[Change]) -> dict[str, int]:
    """Return the units that steps granted, by meter: a grant counts when it comes into force."""
    granted: dict[str, int] = {}
    for step in steps:
        if step.kind == "grant" and step.before is not None and step.after is not None:
            units = step.after.purchased - step.before.purchased
            granted[step.meter] = granted.get(step.meter, 0) + units
    return granted


def is_restated(before: Account, after: Account) -> bool:
    """True if anything but the version and the balances of an account changed."""
    return after._replace(version=before.version, balances=before.balances) != before


def entry_of(user_id: str, seq: int, step: Change, now: datetime) -> EntryRow:
    """The entry of one step."""
    before, after = step.before or _NOTHING, step.after or _NOTHING
    detail = step.detail
    if step.after is not None:
        terms = step.after.terms() if step.kind in TERM_KINDS else {}
        parked = step.after.parked and step.after.parked.as_json()
        detail = {**terms, "cap_used": step.after.cap_used, "parked": parked, **detail}
        if step.kind == "open_meter" and step.after.carried:  # of another ledger
            detail["carried"] = step.after.carried
        if step.kind == "open_meter" and step.after.grants is not None:
            detail["grants"] = step.after.grants.as_json()
        limits = step.after.limits
        if step.kind in _LIMIT_KINDS and (limits or (step.before is not None and step.before.limits)):
            detail["limits"] = limits and limits.as_json()
    return EntryRow(
        user_id=user_id,
        seq=seq,
        entry_key=step.key,
        meter=step.meter,
        kind=step.kind,
        used_change=after.used - before.used,
        rollover_change=after.rollover - before.rollover,
        purchased_change=after.purchased - before.purchased,
        used_after=after.used,
        rollover_after=after.rollover,
        purchased_after=after.purchased,
        detail=detail,
        created_at=now,
        actor=step.cause.actor,
        reason=step.cause.reason,
    )


def balance_of(entry: EntryRow) -> Balance:
    """The balance that a ledger entry leaves behind which was read and has the terms in its detail."""
    detail = entry.detail
    terms: dict[str, Any] = {name: detail.get(name) for name in TERM_FIELDS}
    for name in ("anchored_at", "period_start", "period_end", "counted_from"):
        if terms[name] is not None:
            terms[name] = datetime.fromisoformat(terms[name])
    if "counted_from" not in detail:  # of a release that knew neither it nor who vouches for a period
        terms["counted_from"] = terms["period_start"]
        terms["backing"] = vouched(terms["period_end"]) if terms["cadence"] == "subscription" else None
    parked = Parked.from_json(detail["parked"]) if detail.get("parked") else None
    return Balance(
        meter=entry.meter,
        **terms,
        used=entry.used_after,
        rollover=entry.rollover_after,
        purchased=entry.purchased_after,
        cap_used=detail.get("cap_used"),
        parked=parked,
        carried=detail.get("carried", 0),
        grants=Grants.from_json(detail["grants"]) if detail.get("grants") else None,
        limits=Limits.from_json(detail["limits"]) if detail.get("limits") else None,
    )
