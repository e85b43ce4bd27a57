"""Find accounts: by id or the beginning of one, by the name in logs, by plan and status."""

from __future__ import annotations

import re

from config.log import HASH_DIGITS, name_in_logs
from schemas.reports import FoundAccount, FoundAccounts
from worker.errors import ReportError
from worker.ledger.connection import batch_connection, begin_snapshot
from worker.ledger.finding import Sought, count_accounts_found, find_accounts
from worker.reports.usage import require_identifier, require_limit
from worker.resources import Resources
from worker.rules.waterfall import STATUSES

_is_name_in_logs = re.compile(rf"(?:user:)?([0-9a-f]{{{HASH_DIGITS}}})").fullmatch


def find(
    resources: Resources,
    *,
    user_id: str | None = None,
    prefix: str | None = None,
    log_name: str | None = None,
    plan: str | None = None,
    status: str | None = None,
    after: str | None = None,
    limit: int = 100,
) -> FoundAccounts:
    """Return the accounts that meet every condition given, by id, at most `limit`; without a condition, all.

    `log_name` is a user as logs name it, `user:` and 12 digits, or the digits alone. Plan and status are those stored:
    a change that is due counts when somebody has stored it. `after` is the `more_after` of the page before; accounts
    that are opened meanwhile do not shift a page. A closed account is found by its pseudonym only.
    Raises ReportError for a condition that no account can meet.
    """
    for name, value in (("user_id", user_id), ("prefix", prefix), ("after", after)):
        if value is not None:
            require_identifier(name, value)
    if plan is not None and not (isinstance(plan, str) and plan in resources.catalogue.plans):
        raise ReportError(f"plan: unknown {plan!r}; there are {', '.join(resources.catalogue.plans)}")
    if status is not None and status not in (*STATUSES, "closed"):
        raise ReportError(f"status: unknown {status!r}; there are {', '.join(STATUSES)}, closed")
    require_limit("limit", limit)
    sought = Sought(user_id, prefix, _digits_of(log_name), plan, status)
    with batch_connection(resources.engine) as postgres:
        begin_snapshot(postgres)
        rows = find_accounts(postgres, sought, after=after or "", limit=limit + 1)
        total = count_accounts_found(postgres, sought)
        postgres.rollback()
    page = rows[:limit]
    return FoundAccounts(
        accounts=tuple(
            FoundAccount(**row._asdict(), name_in_logs=name_in_logs(row.user_id, resources.settings.log_user_ids))
            for row in page
        ),
        total=total,
        more_after=page[-1].user_id if len(rows) > limit else None,
    )


def _digits_of(log_name: str | None) -> str | None:
    """Return the digits in a user's name in logs."""
    if log_name is None:
        return None
    found = _is_name_in_logs(log_name) if isinstance(log_name, str) else None
    if found is None:
        allowed = f"user: and {HASH_DIGITS} digits of 0-9a-f, as logs name a user"
        raise ReportError(f"log_name: must be {allowed} (got {str(log_name)[:64]!r})")
    return found[1]
