"""Statements that read accounts, their balances and single changes, with and without a lock."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, NamedTuple

from worker.ledger.columns import as_json, text_array
from worker.ledger.connection import READ_CLOCK, Postgres, read_clock
from worker.ledger.holds import READ_HOLDS, LedgerHold
from worker.rules.account import UNSAID, Account, Balance, Cause, Parked
from worker.rules.periods import Terms
from worker.rules.rows import EntryRow, UsageRow

# Columns in the order of `Account` without its balances, and of `Balance`.
ACCOUNT_COLUMNS = (
    "user_id, plan, status, trust, seq, highest_tier, next_plan, plan_change_at, next_status, status_change_at"
)


BALANCE_COLUMNS = ", ".join(Balance._fields)


USAGE_COLUMNS = ", ".join(UsageRow._fields).replace("multiplier", "multiplier::text")
ENTRY_COLUMNS = ", ".join(EntryRow._fields)


# A statement of its own, after the locks: a join with the locking one would read balances from before the wait.
READ_BALANCES = f"""
    SELECT user_id, {BALANCE_COLUMNS} FROM balance WHERE user_id = ANY(%s::text[]) ORDER BY user_id, meter
"""


def closed_users(postgres: Postgres, users: Sequence[str]) -> dict[str, str]:
    """Return the closed accounts among `users`, and the names of their histories."""
    names = pseudonyms(postgres, users)
    kept = existing_accounts(postgres, list(names.values()))
    return {user_id: pseudonym for user_id, pseudonym in names.items() if pseudonym in kept}


def is_recorded(postgres: Postgres, user_id: str, event_id: str) -> bool:
    """Return True if the event is in the usage log."""
    found = postgres.execute("SELECT 1 FROM usage_log WHERE user_id = %s AND event_id = %s", (user_id, event_id))
    return found.fetchone() is not None


def existing_accounts(postgres: Postgres, users: Sequence[str]) -> set[str]:
    """Return the users that have an account, locked or not."""
    rows = postgres.execute(
        "SELECT user_id FROM account WHERE user_id = ANY(%s::text[])", (text_array(users),)
    ).fetchall()
    return {row[0] for row in rows}


def accounts_of(locked: list[tuple[Any, ...]], balances: list[tuple[Any, ...]]) -> dict[str, Account]:
    """Join rows of accounts and of their balances, by user id.

    `locked` has ACCOUNT_COLUMNS, `balances` the columns of READ_BALANCES. Ignores balances of other users.
    """
    by_user: dict[str, dict[str, Balance]] = {row[0]: {} for row in locked}
    for row in balances:
        if row[0] in by_user:
            by_user[row[0]][row[1]] = _balance(row[1:])
    return {row[0]: _account(row, by_user[row[0]]) for row in locked}


def _account(row: tuple[Any, ...], balances: dict[str, Balance]) -> Account:
    """Return the account in a row of `ACCOUNT_COLUMNS`."""
    user_id, plan, status, trust, seq, highest_tier, next_plan, plan_change_at, next_status, status_change_at = row
    return Account(
        user_id=user_id,
        plan=plan,
        status=status,
        trust=trust,
        version=seq,
        balances=balances,
        highest_tier=highest_tier,
        next_plan=next_plan,
        plan_change_at=plan_change_at,
        next_status=next_status,
        status_change_at=status_change_at,
    )


def account_row(account: Account) -> tuple[Any, ...]:
    """Return the values of an account in the order of `ACCOUNT_COLUMNS`."""
    return (
        account.user_id,
        account.plan,
        account.status,
        account.trust,
        account.version,
        account.highest_tier,
        account.next_plan,
        account.plan_change_at,
        account.next_status,
        account.status_change_at,
    )


def _balance(row: Sequence[Any]) -> Balance:
    """Return the balance in a row of `BALANCE_COLUMNS`, which are its fields by name."""
    balance = Balance(*row)
    return balance if balance.parked is None else balance._replace(parked=Parked.from_json(balance.parked))


def balance_row(balance: Balance) -> tuple[Any, ...]:
    """Return the values of a balance in the order of `BALANCE_COLUMNS`, for COPY and array literals."""
    return (
        balance.meter,
        balance.allowance,
        balance.spill,
        balance.rollover_cap,
        as_json(balance.caps),
        balance.cadence,
        balance.anchor,
        balance.anchored_at,
        balance.period_index,
        balance.period_start,
        balance.period_end,
        balance.used,
        balance.rollover,
        balance.purchased,
        as_json(balance.cap_used),
        as_json(balance.parked and balance.parked.as_json()),
    )


# One statement is one snapshot: account and balances belong to the same version.
_READ_ACCOUNT = f"""
    SELECT ledger_now(), epoch, {ACCOUNT_COLUMNS.replace("user_id", "account.user_id")}, {BALANCE_COLUMNS}
    FROM ledger LEFT JOIN account ON account.user_id = %s LEFT JOIN balance USING (user_id) ORDER BY meter
"""


def read_account(postgres: Postgres, user_id: str) -> tuple[datetime, int, Account | None]:
    """Return the ledger's clock, its epoch and the account at one version; None if no such account exists."""
    return _account_in(postgres.execute(_READ_ACCOUNT, (user_id,)).fetchall())


def _account_in(rows: Sequence[tuple[Any, ...]]) -> tuple[datetime, int, Account | None]:
    """Return the ledger's clock, its epoch and the account in rows of `_READ_ACCOUNT`."""
    now, epoch, found = rows[0][:3]
    if found is None:
        return now, epoch, None
    balances = {row[12]: _balance(row[12:]) for row in rows if row[12] is not None}
    return now, epoch, _account(rows[0][2:12], balances)


def read_account_with_holds(postgres: Postgres, user_id: str) -> tuple[datetime, int, Account | None, list[LedgerHold]]:
    """Return what `read_account` returns, and the holds of the ledger that have not expired; in one round trip."""
    with postgres.pipeline():
        account = postgres.execute(_READ_ACCOUNT, (user_id,))
        holds = postgres.execute(READ_HOLDS, (user_id,))
    return (*_account_in(account.fetchall()), [LedgerHold(*row) for row in holds.fetchall()])


def contained_events(postgres: Postgres, user_id: str, event_ids: Sequence[str], version: int) -> set[str]:
    """Return the events that the balance at `version` contains, or that will never change it."""
    rows = postgres.execute(
        "SELECT event_id FROM usage_log WHERE user_id = %s AND event_id = ANY(%s::text[]) AND coalesce(seq, 0) <= %s",
        (user_id, text_array(event_ids), version),
    ).fetchall()
    return {row[0] for row in rows}


def read_entry(postgres: Postgres, user_id: str, entry_key: str, meter: str) -> EntryRow | None:
    """Return the ledger entry with this idempotency key, or None."""
    statement = f"SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE user_id = %s AND entry_key = %s AND meter = %s"
    row = postgres.execute(statement, (user_id, entry_key, meter)).fetchone()
    return EntryRow(*row) if row else None


def read_entries(postgres: Postgres, user_id: str, entry_key: str) -> list[EntryRow]:
    """The ledger entries with this idempotency key, one per meter, in order."""
    statement = f"SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE user_id = %s AND entry_key = %s ORDER BY seq"
    return [EntryRow(*row) for row in postgres.execute(statement, (user_id, entry_key)).fetchall()]


def has_entry(postgres: Postgres, user_id: str, entry_key: str) -> bool:
    """Return True if a ledger entry with this idempotency key exists, on any meter."""
    statement = "SELECT FROM ledger_entry WHERE user_id = %s AND entry_key = %s LIMIT 1"
    return postgres.execute(statement, (user_id, entry_key)).rowcount > 0


def read_usage(postgres: Postgres, user_id: str, event_id: str) -> UsageRow | None:
    """Return one row of the usage log, or None."""
    statement = f"SELECT {USAGE_COLUMNS} FROM usage_log WHERE user_id = %s AND event_id = %s"
    row = postgres.execute(statement, (user_id, event_id)).fetchone()
    return UsageRow(*row) if row else None


def allowance_at(postgres: Postgres, user_id: str, meter: str, seq: int) -> int | None:
    """Return the allowance in force on a meter at the change `seq`; None = unlimited."""
    row = postgres.execute(
        "SELECT (detail->>'allowance')::bigint FROM ledger_entry "
        "WHERE user_id = %s AND seq < %s AND meter = %s AND detail ? 'allowance' ORDER BY seq DESC LIMIT 1",
        (user_id, seq, meter),
    ).fetchone()
    return row[0] if row else 0


def pseudonym_of(postgres: Postgres, user_id: str) -> str:
    """Return the name of a closed account's history."""
    return pseudonyms(postgres, [user_id])[user_id]


def pseudonyms(postgres: Postgres, users: Iterable[str]) -> dict[str, str]:
    """Return the names of closed accounts' histories by user id."""
    row = postgres.execute("SELECT pseudonym_key FROM ledger").fetchone()
    assert row is not None
    secret = row[0].bytes
    return {user: f"closed:{hmac.new(secret, user.encode(), sha256).hexdigest()[:40]}" for user in users}


def count_accounts(postgres: Postgres) -> int:
    """Return the exact number of accounts."""
    row = postgres.execute("SELECT count(*) FROM account").fetchone()
    assert row is not None
    return int(row[0])


def next_users(postgres: Postgres, after: str, limit: int) -> list[str]:
    """Return the next `limit` users with an account after `after`, in the order of their ids."""
    rows = postgres.execute(
        "SELECT user_id FROM account WHERE user_id > %s ORDER BY user_id LIMIT %s", (after, limit)
    ).fetchall()
    return [row[0] for row in rows]


class Snapshot(NamedTuple):
    """Accounts in one snapshot; `counters` by user and meter are units consumed and granted in its life."""

    now: datetime
    epoch: int
    accounts: dict[str, Account]
    counters: dict[str, dict[str, tuple[int, int]]]


def read_accounts(postgres: Postgres, users: Sequence[str]) -> Snapshot:
    """Return the accounts of `users`; consistent within a snapshot transaction (`begin_snapshot`)."""
    names = text_array(users)
    found = postgres.execute(
        f"SELECT {ACCOUNT_COLUMNS} FROM account WHERE user_id = ANY(%s::text[]) ORDER BY user_id",
        (names,),
    ).fetchall()
    accounts = accounts_of(found, postgres.execute(READ_BALANCES, (names,)).fetchall())
    counters: dict[str, dict[str, tuple[int, int]]] = {user_id: {} for user_id in accounts}
    counted = postgres.execute(
        "SELECT user_id, meter, lifetime_consumed, lifetime_granted FROM balance WHERE user_id = ANY(%s::text[])",
        (names,),
    ).fetchall()
    for user_id, meter, consumed, granted in counted:
        counters[user_id][meter] = consumed, granted
    ((now, epoch),) = postgres.execute(READ_CLOCK).fetchall()
    return Snapshot(now, epoch, accounts, counters)


class State(NamedTuple):
    """A stored account, its start, and by meter the units consumed and granted in its life.

    `opened` tells who opened it first and why; an imported account keeps it from its former ledger.
    """

    account: Account
    opened_at: datetime
    counters: Mapping[str, tuple[int, int]]
    opened: Cause = UNSAID


def next_states(postgres: Postgres, after: str, limit: int) -> list[State]:
    """Return the next `limit` open accounts after `after`, in the order of their ids.

    Consistent within a snapshot transaction (`begin_snapshot`).
    """
    rows = postgres.execute(
        "SELECT user_id, opened_at, opened_by, opened_reason FROM account "
        "WHERE status <> 'closed' AND user_id > %s ORDER BY user_id LIMIT %s",
        (after, limit),
    ).fetchall()
    found = read_accounts(postgres, [row[0] for row in rows])
    return [
        State(found.accounts[user_id], opened_at, found.counters[user_id], Cause(actor=actor, reason=reason))
        for user_id, opened_at, actor, reason in rows
    ]


_DUE_BALANCES = """
    SELECT period_end, user_id FROM balance
    WHERE anchor = 'sticky' AND cadence IN ('monthly', 'weekly', 'daily') AND period_end <= %(now)s
        AND (period_end, user_id) > (%(after_at)s, %(after_user)s)
    ORDER BY period_end, user_id LIMIT %(limit)s
"""


_DUE_CHANGES = """
    SELECT least(plan_change_at, status_change_at), user_id FROM account
    WHERE (plan_change_at IS NOT NULL OR status_change_at IS NOT NULL)
        AND least(plan_change_at, status_change_at) <= %(now)s
        AND (least(plan_change_at, status_change_at), user_id) > (%(after_at)s, %(after_user)s)
    ORDER BY least(plan_change_at, status_change_at), user_id LIMIT %(limit)s
"""


Due = tuple[datetime, str]
_BEFORE_ALL: Due = (datetime.min.replace(tzinfo=UTC), "")


def due_balances(postgres: Postgres, after: Due | None, limit: int) -> list[Due]:
    """Return the next due sticky periods after `after`: their ends and users, oldest first."""
    return _due(postgres, _DUE_BALANCES, after, limit)


def due_changes(postgres: Postgres, after: Due | None, limit: int) -> list[Due]:
    """Return the next due scheduled changes of accounts after `after`, oldest first."""
    return _due(postgres, _DUE_CHANGES, after, limit)


def _due(postgres: Postgres, statement: str, after: Due | None, limit: int) -> list[Due]:
    at, user_id = after or _BEFORE_ALL
    found = postgres.execute(
        statement, {"now": read_clock(postgres), "after_at": at, "after_user": user_id, "limit": limit}
    )
    return [(row[0], row[1]) for row in found.fetchall()]


def terms_in_force(postgres: Postgres) -> list[tuple[str, str, Terms, int]]:
    """Return the terms of open periods by plan and meter, and the number of accounts with each."""
    columns = ", ".join(Terms._fields)
    rows = postgres.execute(
        f"SELECT plan, meter, {columns}, count(*) FROM balance JOIN account USING (user_id) WHERE status <> 'closed' "
        f"GROUP BY plan, meter, {columns} ORDER BY plan, meter, count(*) DESC"
    ).fetchall()
    return [(row[0], row[1], Terms(*row[2:8]), row[8]) for row in rows]
