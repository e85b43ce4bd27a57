"""Statements that read accounts, their balances and single changes, with and without a lock."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from config.catalogue import NoticeRule, UnreadRule, stored_rule
from config.log import warn_once
from worker.ledger.columns import array, arrays, as_json, text_array
from worker.ledger.connection import READ_CLOCK, Postgres, read_clock
from worker.ledger.holds import READ_HOLDS, LedgerHold
from worker.rules.account import UNSAID, Account, Balance, Cause, EventsAsked, Parked, Waiting
from worker.rules.calendar import CALENDAR_CADENCES
from worker.rules.credits import Purchases
from worker.rules.grants import Grants
from worker.rules.limits import Limits
from worker.rules.periods import Terms, vouched
from worker.rules.rows import EntryRow, UsageRow

# Columns in the order of `Account` without its balances, and of `Balance`.
ACCOUNT_COLUMNS = (
    "user_id, plan, status, trust, seq, highest_tier, next_plan, plan_change_at, next_status, status_change_at, "
    "paid_from, paid_until, waiting, waiting_at, timezone, reopened, pay_from, notices"
)
_ACCOUNT_WIDTH = len(ACCOUNT_COLUMNS.split(", "))


# Without `limits`, the last field: a statement of its own writes them, so that who has none writes nothing.
BALANCE_COLUMNS = ", ".join(Balance._fields[:-1])
# The values of a balance in the order of its fields. A worker of an earlier release leaves `counted_from` as it was.
# What was consumed since the limits were written is spent of each of their windows.
_BALANCE_VALUES = (
    ", ".join(f"balance.{name}" for name in Balance._fields)
    .replace("balance.counted_from", "coalesce(balance.counted_from, balance.period_start)")
    .replace(
        "balance.limits",
        "CASE WHEN balance.limits IS NOT NULL THEN balance.limits || jsonb_build_object('spent', "
        "balance.lifetime_consumed - (balance.limits->>'counted')::bigint) END AS limits",
    )
)


USAGE_COLUMNS = ", ".join(UsageRow._fields).replace("multiplier", "multiplier::text").replace("price", "price::text")
ENTRY_COLUMNS = ", ".join(EntryRow._fields)


# A statement of its own, after the locks: a join with the locking one would read balances from before the wait.
READ_BALANCES = f"""
    SELECT user_id, {_BALANCE_VALUES} FROM balance WHERE user_id = ANY(%s::text[]) ORDER BY user_id, meter
"""


class Payment(NamedTuple):
    """A recorded event: its fingerprint, its amount, and the units that each bucket paid, of the wallet if one did."""

    meter: str
    quantity: int
    multiplier: str
    amount: int
    from_subscription: int
    from_rollover: int
    from_purchased: int
    overflow_to_debt: int
    uncollected: int
    wallet: str | None = None


_PAYMENT_COLUMNS = ", ".join(Payment._fields).replace("multiplier", "multiplier::text")
_READ_PAYMENT = f"SELECT {_PAYMENT_COLUMNS} FROM usage_log WHERE user_id = %s AND event_id = %s"


def closed_users(postgres: Postgres, users: Sequence[str]) -> dict[str, str]:
    """Return the closed accounts among `users`, and the names of their latest histories."""
    return {user_id: names[-1] for user_id, names in histories_of(postgres, users).items()}


def histories_of(postgres: Postgres, users: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of all histories of closed accounts among `users`, in order: an id may be closed repeatedly."""
    found: dict[str, list[str]] = {}
    closed, generation = list(users), 0
    while closed:
        names = pseudonyms(postgres, closed, generation)
        kept = existing_accounts(postgres, list(names.values()))
        closed = [user_id for user_id in closed if names[user_id] in kept]
        for user_id in closed:
            found.setdefault(user_id, []).append(names[user_id])
        generation += 1
    return found


def earlier_histories(postgres: Postgres, reopened: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the names of the histories before accounts that were `reopened` so many times, by user."""
    found: dict[str, list[str]] = {user_id: [] for user_id in reopened}
    for generation in range(max(reopened.values(), default=0)):
        users = [user_id for user_id, times in reopened.items() if times > generation]
        for user_id, name in pseudonyms(postgres, users, generation).items():
            found[user_id].append(name)
    return found


def is_recorded(postgres: Postgres, user_id: str, event_id: str) -> bool:
    """Return True if the event is in the usage log."""
    found = postgres.execute("SELECT 1 FROM usage_log WHERE user_id = %s AND event_id = %s", (user_id, event_id))
    return found.fetchone() is not None


def read_payment(postgres: Postgres, user_id: str, event_id: str) -> Payment | None:
    """Return what paid for an event of the log, also of an account closed since; None without such an event."""
    for owner in (user_id, *histories_of(postgres, [user_id]).get(user_id, ())):
        row = postgres.execute(_READ_PAYMENT, (owner, event_id)).fetchone()
        if row is not None:
            return Payment(*row)
    return None


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
    (
        user_id, plan, status, trust, seq, highest_tier, next_plan, plan_change_at, next_status, status_change_at,
        paid_from, paid_until, waiting, _waiting_at, timezone, reopened, pay_from, notices,
    ) = row  # fmt: skip
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
        paid_from=paid_from,
        paid_until=paid_until,
        waiting=tuple(Waiting.from_json(change) for change in waiting) if waiting else (),
        timezone=timezone,
        reopened=reopened,
        pay_from=pay_from,
        notices=None if notices is None else tuple(map(_rule, notices)),
    )


def _rule(values: object) -> NoticeRule | UnreadRule:
    rule = stored_rule(values)
    if isinstance(rule, UnreadRule):
        warn_once(f"accounts: this release does not tell notices of the kind {rule.kind!r}")
    return rule


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
        account.paid_from,
        account.paid_until,
        *waiting_columns(account),
        account.timezone,
        account.reopened,
        account.pay_from,
        notices_column(account),
    )


def notices_column(account: Account) -> str | None:
    """Return the account's own rules of notices as JSON; None without any."""
    rules = account.notices
    return None if rules is None else as_json([rule.as_json() for rule in rules])


def waiting_columns(account: Account) -> tuple[str | None, datetime | None]:
    """Return the changes that wait as JSON, and when the first of them takes effect; None without any."""
    waiting = [change.as_json() for change in account.waiting]
    return as_json(waiting or None), account.waiting[0].at if account.waiting else None


def _balance(row: Sequence[Any]) -> Balance:
    """Return the balance in a row of `_BALANCE_VALUES`, which are its fields by name.

    A worker of an earlier release leaves `backing` as it was.
    """
    balance = Balance(*row)
    backing = balance.backing
    if balance.cadence == "subscription":
        backing = backing or vouched(balance.period_end)
    elif balance.cadence not in CALENDAR_CADENCES:
        backing = None
    parked, grants, limits = balance.parked, balance.grants, balance.limits
    if backing is balance.backing and parked is None and grants is None and limits is None:
        return balance
    return balance._replace(
        backing=backing,
        parked=None if parked is None else Parked.from_json(parked),
        grants=None if grants is None else Grants.from_json(cast("Any", grants)),
        limits=None if limits is None else Limits.from_json(cast("Any", limits)),
    )


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
        balance.timezone,
        balance.anchored_at,
        balance.period_index,
        balance.period_start,
        balance.period_end,
        balance.backing,
        # NULL for the usual case, so that a worker of an earlier release, which leaves it alone, may open a period.
        balance.counted_from if balance.counted_from != balance.period_start else None,
        balance.used,
        balance.rollover,
        balance.purchased,
        as_json(balance.cap_used),
        as_json(balance.parked and balance.parked.as_json()),
        balance.carried,
        as_json(balance.grants and balance.grants.as_json()),
    )


# One statement is one snapshot: account and balances belong to the same version. It asks the clock once, not for each
# row.
_READ_ACCOUNTS = f"""
    SELECT asked.user_id, (SELECT ledger_now()), epoch,
        {", ".join(f"account.{name}" for name in ACCOUNT_COLUMNS.split(", "))}, {_BALANCE_VALUES}
    FROM ledger CROSS JOIN unnest(%s::text[]) AS asked (user_id)
        LEFT JOIN account ON account.user_id = asked.user_id COLLATE "C"
        LEFT JOIN balance ON balance.user_id = account.user_id
    ORDER BY 1, meter
"""


class AccountFound(NamedTuple):
    """An account at one version, None if it does not exist, with the ledger's clock and epoch.

    `holds` are those of the ledger that have not expired.
    """

    now: datetime
    epoch: int
    account: Account | None
    holds: list[LedgerHold]


def read_account(postgres: Postgres, user_id: str) -> tuple[datetime, int, Account | None]:
    """Return the ledger's clock, its epoch and the account at one version; None if no such account exists."""
    found = _accounts_in(postgres.execute(_READ_ACCOUNTS, (array([user_id]),)).fetchall())[user_id]
    return found.now, found.epoch, found.account


def _accounts_in(rows: Sequence[tuple[Any, ...]]) -> dict[str, AccountFound]:
    """Return the accounts in rows of `_READ_ACCOUNTS`, by the user that was asked for."""
    by_user: dict[str, list[tuple[Any, ...]]] = {}
    for row in rows:
        by_user.setdefault(row[0], []).append(row)
    return {user_id: _account_in(found) for user_id, found in by_user.items()}


def _account_in(rows: Sequence[tuple[Any, ...]]) -> AccountFound:
    """Return the account in the rows of `_READ_ACCOUNTS` about one user."""
    _, now, epoch, found = rows[0][:4]
    if found is None:
        return AccountFound(now, epoch, None, [])
    at = 3 + _ACCOUNT_WIDTH
    balances = {row[at]: _balance(row[at:]) for row in rows if row[at] is not None}
    return AccountFound(now, epoch, _account(rows[0][3:at], balances), [])


def read_accounts_with_holds(postgres: Postgres, users: Sequence[str]) -> dict[str, AccountFound]:
    """Return what the ledger knows of each user, with the holds that it granted; in one round trip."""
    names = (array(users),)
    with postgres.pipeline():
        accounts = postgres.execute(_READ_ACCOUNTS, names)
        holds = postgres.execute(READ_HOLDS, names)
    found = _accounts_in(accounts.fetchall())
    for user_id, *hold in holds.fetchall():
        found[user_id].holds.append(LedgerHold(*hold))
    return found


def contained_events(postgres: Postgres, asked: Sequence[EventsAsked]) -> dict[str, set[str]]:
    """Return by user the events that the balance at that version contains, or that will never change it.

    One look at the primary key for each id. With `= ANY` a planner that expects few rows of the user reads them all:
    a long history, for each part of a long list.
    """
    rows = [(each.user_id, event_id, each.version) for each in asked for event_id in each.event_ids]
    found = postgres.execute(
        "SELECT asked.user_id, found.event_id "
        "FROM unnest(%s::text[], %s::text[], %s::bigint[]) AS asked (user_id, event_id, version) CROSS JOIN LATERAL ("
        'SELECT event_id FROM usage_log WHERE user_id = asked.user_id COLLATE "C" '
        'AND event_id = asked.event_id COLLATE "C" AND coalesce(seq, 0) <= asked.version OFFSET 0) AS found',
        arrays(rows, "tti"),
    )
    contained: dict[str, set[str]] = {each.user_id: set() for each in asked}
    for user_id, event_id in found.fetchall():
        contained[user_id].add(event_id)
    return contained


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


def caps_at(postgres: Postgres, user_id: str, meter: str, seq: int) -> Mapping[str, int | None]:
    """Return the sub-caps by backend in force on a meter at the change `seq`."""
    row = postgres.execute(
        "SELECT detail->'caps' FROM ledger_entry "
        "WHERE user_id = %s AND seq < %s AND meter = %s AND detail ? 'allowance' ORDER BY seq DESC LIMIT 1",
        (user_id, seq, meter),
    ).fetchone()
    return (row[0] if row else None) or {}


def pseudonym_of(postgres: Postgres, user_id: str, generation: int) -> str:
    """Return the name of a closed account's history."""
    return pseudonyms(postgres, [user_id], generation)[user_id]


def pseudonyms(postgres: Postgres, users: Iterable[str], generation: int) -> dict[str, str]:
    """Return the names of closed accounts' histories by user id; `generation` accounts of the id were closed before."""
    row = postgres.execute("SELECT pseudonym_key FROM ledger").fetchone()
    assert row is not None
    secret = row[0].bytes
    # No user id has a `#`.
    later = f"#{generation}" if generation else ""
    return {user: f"closed:{hmac.new(secret, (user + later).encode(), sha256).hexdigest()[:40]}" for user in users}


# Backwards from the newest change: it stops at the first event from before.
_READ_SPENT = """
    WITH last AS (
        SELECT coalesce((
            SELECT seq FROM usage_log
            WHERE user_id = %(user_id)s AND seq < %(before)s AND applied_at < %(starts)s ORDER BY seq DESC LIMIT 1
        ), 0) AS seq
    )
    SELECT last.seq, coalesce((
        SELECT sum(amount) FROM usage_log AS event
        WHERE user_id = %(user_id)s AND event.seq > last.seq AND event.seq < %(before)s
            AND coalesce(wallet, meter) = %(meter)s
            AND NOT EXISTS (
                SELECT FROM ledger_entry AS entry
                WHERE entry.user_id = event.user_id AND entry_key = 'reverse:' || event_id
                    AND entry.meter = %(meter)s AND entry.seq < %(before)s
            )
    ), 0)::bigint FROM last
"""


def spent_since(postgres: Postgres, user_id: str, meter: str, starts: datetime, before: int) -> tuple[int, int]:
    """Return the number of the last event that was applied before `starts`, and the units of a meter after it.

    These are units that the meter paid: as a wallet, also for the meters that draw on it.

    Only changes with a number below `before` count, and no event that was reversed by then. 0: there is no such event.
    """
    found = {"user_id": user_id, "meter": meter, "starts": starts, "before": before}
    row = postgres.execute(_READ_SPENT, found).fetchone()
    assert row is not None
    return row[0], row[1]


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

    `opened` tells who opened it first and why; an imported account keeps it from its former ledger. `keys` are the
    orders and invoices that the account used, by kind; `purchases` what it bought, by meter.
    """

    account: Account
    opened_at: datetime
    counters: Mapping[str, tuple[int, int]]
    opened: Cause = UNSAID
    keys: Mapping[str, Sequence[str]] = MappingProxyType({})
    purchases: Mapping[str, Purchases] = MappingProxyType({})


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


# Periods of the payment provider; without hours of grace some stay open beyond their end.
_DUE_PROVIDED = """
    SELECT period_end, user_id FROM balance
    WHERE cadence = 'subscription' AND period_end <= %(now)s AND (period_end, user_id) > (%(after_at)s, %(after_user)s)
    ORDER BY period_end, user_id LIMIT %(limit)s
"""


_DUE_WAITING = """
    SELECT waiting_at, user_id FROM account
    WHERE waiting_at <= %(now)s AND (waiting_at, user_id) > (%(after_at)s, %(after_user)s)
    ORDER BY waiting_at, user_id LIMIT %(limit)s
"""


_DUE_CHANGES = """
    SELECT least(plan_change_at, status_change_at), user_id FROM account
    WHERE (plan_change_at IS NOT NULL OR status_change_at IS NOT NULL)
        AND least(plan_change_at, status_change_at) <= %(now)s
        AND (least(plan_change_at, status_change_at), user_id) > (%(after_at)s, %(after_user)s)
    ORDER BY least(plan_change_at, status_change_at), user_id LIMIT %(limit)s
"""


_DUE_GRANTS = """
    SELECT grants_due, user_id FROM balance
    WHERE grants_due <= %(now)s AND (grants_due, user_id) > (%(after_at)s, %(after_user)s)
    ORDER BY grants_due, user_id LIMIT %(limit)s
"""


Due = tuple[datetime, str]
_BEFORE_ALL: Due = (datetime.min.replace(tzinfo=UTC), "")


def due_balances(postgres: Postgres, after: Due | None, limit: int) -> list[Due]:
    """Return the next due sticky periods after `after`: their ends and users, oldest first."""
    return _due(postgres, _DUE_BALANCES, after, limit)


def due_provided(postgres: Postgres, after: Due | None, limit: int) -> list[Due]:
    """Return the next periods of the payment provider that are over, after `after`, oldest first."""
    return _due(postgres, _DUE_PROVIDED, after, limit)


def due_waiting(postgres: Postgres, after: Due | None, limit: int) -> list[Due]:
    """Return the next accounts with a change that waits no longer, after `after`, oldest first."""
    return _due(postgres, _DUE_WAITING, after, limit)


def due_changes(postgres: Postgres, after: Due | None, limit: int) -> list[Due]:
    """Return the next due scheduled changes of accounts after `after`, oldest first."""
    return _due(postgres, _DUE_CHANGES, after, limit)


def due_grants(postgres: Postgres, after: Due | None, limit: int) -> list[Due]:
    """Return the next starts and ends of grants that are due, after `after`, and their users, oldest first."""
    return _due(postgres, _DUE_GRANTS, after, limit)


def oldest_due(postgres: Postgres) -> datetime | None:
    """Return since when the oldest boundary or change is due that the job has not stored; None without one.

    Periods of the payment provider are left out: some stay open beyond their end.
    """
    firsts = [read(postgres, None, 1) for read in (due_balances, due_waiting, due_changes, due_grants)]
    return min((due[0][0] for due in firsts if due), default=None)


def _due(postgres: Postgres, statement: str, after: Due | None, limit: int) -> list[Due]:
    at, user_id = after or _BEFORE_ALL
    found = postgres.execute(
        statement, {"now": read_clock(postgres), "after_at": at, "after_user": user_id, "limit": limit}
    )
    return [(row[0], row[1]) for row in found.fetchall()]


def terms_in_force(postgres: Postgres) -> list[tuple[str, str, Terms, int]]:
    """Return the terms of open periods by plan and meter, and the number of accounts with each."""
    columns = ", ".join(f"balance.{name}" for name in Terms._fields[:-1]) + ", balance.limits #> '{amounts,plan}'"
    rows = postgres.execute(
        f"SELECT plan, meter, {columns}, count(*) FROM balance JOIN account USING (user_id) WHERE status <> 'closed' "
        f"GROUP BY plan, meter, {columns} ORDER BY plan, meter, count(*) DESC"
    ).fetchall()
    return [(row[0], row[1], Terms(*row[2:-1]), row[-1]) for row in rows]
