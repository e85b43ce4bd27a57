"""The limits of an account: of each its amount, what the open window has used and has left, and when it ends."""

from __future__ import annotations

from schemas.reports import AccountLimits, LimitUsage
from worker.errors import NotFound
from worker.ledger.accounts import read_account
from worker.reports.usage import require_identifier, snapshot_of
from worker.resources import Resources
from worker.rules.lifecycle import as_of


def limits_of(resources: Resources, user_id: str) -> AccountLimits:
    """Report every limit of an account, as a check would find it now but for what is pending.

    Raises ReportError for a user without an account.
    """
    require_identifier("user_id", user_id)
    with snapshot_of(resources) as postgres:
        now, _, account = read_account(postgres, user_id)
    if account is None:
        raise NotFound(f"user_id: no account {user_id}")
    current = as_of(resources.catalogue, account, now)
    found = [
        LimitUsage(
            meter=meter,
            wallet=draw.wallet if (draw := current.draws.get(meter)) is not None else None,
            per=each.per,
            set_by=each.set_by,
            amount=each.amount,
            used=max(0, each.used),
            left=each.left(0),
            starts_at=each.starts_at,
            ends_at=each.ends_at,
        )
        for meter, balance in sorted(current.balances.items())
        if balance.limits is not None
        for each in balance.limits.standings()
    ]
    return AccountLimits(user_id=user_id, at=now, pay_from=current.pay_from, limits=tuple(found))
