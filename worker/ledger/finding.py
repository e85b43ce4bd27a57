"""Statements that find accounts by what an operator knows of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from worker.ledger.connection import Postgres


class Sought(NamedTuple):
    """What the accounts have in common; None leaves a condition out. `log_digits` are of the user's name in logs."""

    user_id: str | None = None
    prefix: str | None = None
    log_digits: str | None = None
    plan: str | None = None
    status: str | None = None


class FoundRow(NamedTuple):
    """An account as its row has it, without its balances."""

    user_id: str
    plan: str
    status: str
    trust: str
    opened_at: datetime


# No character of an id sorts after "~", so a prefix is a range of the primary key. The digits have an index.
_CONDITIONS = {
    "user_id": "user_id = %(user_id)s",
    "prefix": "user_id >= %(prefix)s AND user_id < %(prefix)s || '~'",
    "log_digits": "substr(sha256(decode(user_id, 'escape')), 1, 6) = decode(%(log_digits)s, 'hex')",
    "plan": "plan = %(plan)s",
    "status": "status = %(status)s",
}


def find_accounts(postgres: Postgres, sought: Sought, *, after: str, limit: int) -> list[FoundRow]:
    """Return the accounts sought with ids after `after`, by id, at most `limit`.

    An id, a prefix and a name in logs are looked up in an index. A plan or a status reads the accounts once.
    """
    found = postgres.execute(
        f"SELECT {', '.join(FoundRow._fields)} FROM account "
        f"WHERE {_where(sought)} AND user_id > %(after)s ORDER BY user_id LIMIT %(limit)s",
        {**sought._asdict(), "after": after, "limit": limit},
    )
    return [FoundRow(*row) for row in found.fetchall()]


def count_accounts_found(postgres: Postgres, sought: Sought) -> int:
    """Count the accounts sought."""
    found: Any = postgres.execute(f"SELECT count(*) FROM account WHERE {_where(sought)}", sought._asdict()).fetchone()
    return int(found[0])


def _where(sought: Sought) -> str:
    """Return the conditions that are given: a planner that sees a missing one would read all accounts."""
    given = [_CONDITIONS[name] for name, value in sought._asdict().items() if value is not None]
    return " AND ".join(given) or "true"
