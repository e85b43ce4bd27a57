"""Every statement about the sponsorship pool: its row, grants and credits, and users' standings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from heapq import merge
from typing import NamedTuple

from worker.ledger.columns import text_array
from worker.ledger.connection import Postgres
from worker.rules.sponsorship import CreditRow, GrantRow, Known, Locked, Pool, PoolStanding


class PoolRow(NamedTuple):
    """The stored pool."""

    initial: int
    balance: int
    seq: int
    opened_at: datetime


_GRANT = ", ".join(GrantRow._fields)
_CREDIT = ", ".join(CreditRow._fields)
_KNOWN_GRANTS = "SELECT request_hash, user_id, actual, paid FROM sponsor_grant WHERE request_hash = ANY(%s::bytea[])"
_KNOWN_CREDITS = "SELECT request_hash, paid FROM sponsor_credit WHERE request_hash = ANY(%s::bytea[])"
# A change of an account holds its row; after this returns, the next reader sees the committed state.
_WAIT_FOR_ACCOUNTS = "SELECT user_id FROM account WHERE user_id = ANY(%s::text[]) ORDER BY user_id FOR KEY SHARE"
# A status that waits for older events is in force for all that asks now.
_STATUS = """coalesce(
        (SELECT change->>'name' FROM jsonb_array_elements(account.waiting) AS change
        WHERE change->>'kind' = 'status' AND (change->>'at')::timestamptz <= ledger_now()
        ORDER BY (change->>'at')::timestamptz DESC LIMIT 1),
        account.status
    )"""
_READ_STANDING = f"""
    SELECT CASE {_STATUS} WHEN 'suspended' THEN '!' ELSE account.trust END, coalesce(account.seq, 0), epoch,
        latest.window_start, coalesce(latest.absorbed, 0)
    FROM ledger LEFT JOIN account ON account.user_id = %(user)s
    LEFT JOIN LATERAL (
        SELECT window_start, sum(absorbed)::bigint AS absorbed FROM sponsor_grant
        WHERE user_id = %(user)s
            AND window_start = (SELECT max(window_start) FROM sponsor_grant WHERE user_id = %(user)s)
        GROUP BY window_start
    ) AS latest ON true
"""


def read_pool(postgres: Postgres) -> Pool | None:
    """Return the pool; None if no batch has opened it yet."""
    row = postgres.execute("SELECT balance, seq, epoch FROM sponsor_pool, ledger").fetchone()
    return Pool(*row) if row else None


def read_epoch(postgres: Postgres) -> int:
    """Return the epoch of the ledger."""
    row = postgres.execute("SELECT epoch FROM ledger").fetchone()
    assert row is not None
    return int(row[0])


def read_standing(postgres: Postgres, user_id: str) -> PoolStanding:
    """Return a user's standing with the pool."""
    row = postgres.execute(_READ_STANDING, {"user": user_id}).fetchone()
    assert row is not None
    return PoolStanding(*row)


def lock_pool(
    postgres: Postgres, initial: int, hashes: Sequence[bytes], users: Sequence[str], *, skip_locked: bool = False
) -> Locked:
    """Lock the pool's row, then read it, the known requests and the clock.

    The lock lasts until this transaction ends. The accounts come first: that is the lock order, see
    worker/ledger/__init__.py.

    A new pool starts with `initial` units. Waits for open changes of the accounts of `users`; with `skip_locked` it
    leaves these accounts out instead.
    """
    in_use: frozenset[str] = frozenset()
    if users:
        free = _names(postgres, _WAIT_FOR_ACCOUNTS + (" SKIP LOCKED" if skip_locked else ""), users)
        if skip_locked:
            in_use = _names(postgres, "SELECT user_id FROM account WHERE user_id = ANY(%s::text[])", users) - free
    _lock_row(postgres, initial)
    row = postgres.execute("SELECT ledger_now(), balance, seq, epoch FROM sponsor_pool, ledger").fetchone()
    assert row is not None
    parameters = [list(hashes)]
    granted = {found[0]: found[1:] for found in postgres.execute(_KNOWN_GRANTS, parameters).fetchall()}
    credited = {found[0]: found[1] for found in postgres.execute(_KNOWN_CREDITS, parameters).fetchall()}
    return Locked(now=row[0], pool=Pool(*row[1:]), known=Known(granted=granted, credited=credited), in_use=in_use)


def append(postgres: Postgres, grants: Sequence[GrantRow], credited: Sequence[CreditRow]) -> None:
    """Write the grants and credits of a batch."""
    with postgres.cursor() as cursor:
        for statement, rows in (
            (f"COPY sponsor_grant ({_GRANT}) FROM STDIN", grants),
            (f"COPY sponsor_credit ({_CREDIT}) FROM STDIN", credited),
        ):
            if rows:
                with cursor.copy(statement) as copy:
                    for row in rows:
                        copy.write_row(row)


def update(postgres: Postgres, pool: Pool) -> None:
    """Write the pool's balance after a batch, once."""
    postgres.execute("UPDATE sponsor_pool SET balance = %s, seq = %s", (pool.units, pool.seq))


def is_recorded(postgres: Postgres, request_hash: bytes) -> bool:
    """Return True if the request has a grant or a credit."""
    known = (postgres.execute(query, [[request_hash]]).fetchone() for query in (_KNOWN_GRANTS, _KNOWN_CREDITS))
    return any(known)


def rename_grants(postgres: Postgres, initial: int, user_id: str, pseudonym: str) -> None:
    """Move the grants of a closed account to the name of its history, without their traces.

    Waits for a batch under way, which may still know the account by its old name. The next batch waits for the caller's
    COMMIT, so call it late. `initial`: as in `lock_pool`.
    """
    _lock_row(postgres, initial)
    postgres.execute("UPDATE sponsor_grant SET user_id = %s, trace_id = NULL WHERE user_id = %s", (pseudonym, user_id))


# ---------------------------------------------------------------------------------------------------------------------
# For operators and the proof


def read_pool_row(postgres: Postgres) -> PoolRow | None:
    """Return the stored pool; None if no batch has opened it yet."""
    row = postgres.execute(f"SELECT {', '.join(PoolRow._fields)} FROM sponsor_pool").fetchone()
    return PoolRow(*row) if row else None


def absorbed_since(postgres: Postgres, since: datetime) -> int:
    """Return the units that the pool absorbed from `since` on."""
    row = postgres.execute(
        "SELECT coalesce(sum(absorbed), 0)::bigint FROM sponsor_grant WHERE created_at >= %s", (since,)
    ).fetchone()
    assert row is not None
    return int(row[0])


def last_grants(postgres: Postgres, limit: int) -> list[GrantRow]:
    """Return the last grants, newest first."""
    rows = postgres.execute(f"SELECT {_GRANT} FROM sponsor_grant ORDER BY seq DESC LIMIT %s", (limit,)).fetchall()
    return [GrantRow(*row) for row in rows]


def read_journal(postgres: Postgres, after: int = 0) -> Iterator[GrantRow | CreditRow]:
    """Stream every grant and credit after the pool's change number `after`, in sequence."""
    with postgres.cursor("grants") as grants, postgres.cursor("credits") as credited:
        grants.execute(f"SELECT {_GRANT} FROM sponsor_grant WHERE seq > %s ORDER BY seq", (after,))
        credited.execute(f"SELECT {_CREDIT} FROM sponsor_credit WHERE seq > %s ORDER BY seq", (after,))
        changes: list[Iterator[GrantRow | CreditRow]] = [(GrantRow(*row) for row in grants)]
        changes.append(CreditRow(*row) for row in credited)
        yield from merge(*changes, key=lambda row: row.seq)


def overdrawn_windows(postgres: Postgres) -> list[tuple[str, datetime, int, int]]:
    """Return windows that absorbed more than their largest daily budget: user, start, absorbed, budget."""
    rows = postgres.execute(
        "SELECT user_id, window_start, sum(absorbed)::bigint, max(daily_budget) FROM sponsor_grant "
        "GROUP BY user_id, window_start HAVING sum(absorbed) > max(daily_budget) ORDER BY 1, 2"
    ).fetchall()
    return [(row[0], row[1], row[2], row[3]) for row in rows]


def applied_grants(postgres: Postgres, hashes: Sequence[bytes], seconds: int) -> set[bytes]:
    """Return the requests with a grant applied more than `seconds` ago."""
    rows = postgres.execute(
        "SELECT request_hash FROM sponsor_grant WHERE request_hash = ANY(%s::bytea[]) "
        "AND created_at < ledger_now() - make_interval(secs => %s)",
        (list(hashes), seconds),
    ).fetchall()
    return {row[0] for row in rows}


def _lock_row(postgres: Postgres, initial: int) -> None:
    """Lock the pool's row, after opening the pool if needed."""
    postgres.execute(
        "INSERT INTO sponsor_pool (initial, balance, opened_at) VALUES (%s, %s, ledger_now()) ON CONFLICT DO NOTHING",
        (initial, initial),
    )
    postgres.execute("SELECT FROM sponsor_pool FOR UPDATE")


def _names(postgres: Postgres, query: str, users: Sequence[str]) -> frozenset[str]:
    return frozenset(row[0] for row in postgres.execute(query, (text_array(users),)).fetchall())
