"""The statements of a batch, in the order in which it uses them.

They run on psycopg's own cursor, in pipelines and with COPY; other statements go through SQLAlchemy. Both use one
connection of one pool, so one transaction covers statements of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import psycopg

from schemas.traces import trace_id_of
from worker.ledger.accounts import (
    ACCOUNT_COLUMNS,
    BALANCE_COLUMNS,
    READ_BALANCES,
    State,
    account_row,
    accounts_of,
    balance_row,
    earlier_histories,
    existing_accounts,
    histories_of,
    notices_column,
    waiting_columns,
)
from worker.ledger.columns import COPY_NULL, array, arrays, as_json, copy_field, copy_rows, text_array
from worker.ledger.connection import READ_CLOCK, Postgres
from worker.ledger.dead_letters import INSERT_DEAD_LETTER, dead_letter_row
from worker.ledger.notices import store as store_notices
from worker.ledger.repeats import NOTE_REPEATS, repeat_arrays
from worker.rules.account import Account
from worker.rules.rows import AppliedRun, Changed, EntryRow, Loaded, UsageRow, Writes

# Columns that only events of meters with a wallet have: all others are copied without them.
OF_WALLETS = ("wallet", "price")
COPY_USAGE = f"COPY usage_log ({', '.join(name for name in UsageRow._fields if name not in OF_WALLETS)}) FROM STDIN"
COPY_DRAWN = f"COPY usage_log ({', '.join(UsageRow._fields)}) FROM STDIN"


# The order of the ids is part of the lock order; see worker/ledger/__init__.py.
_LOCK_ACCOUNTS = f"""
    SELECT {ACCOUNT_COLUMNS} FROM account WHERE user_id = ANY(%s::text[]) ORDER BY user_id FOR UPDATE
"""
# One look into the index per event: for a plain join Postgres may read the whole log, which only grows.
# Never prepared: a plan from the time of a small log reads all rows of a user, or of all users, for each event.
_READ_RECORDED = """
    SELECT candidate.user_id, candidate.event_id, meter, quantity, multiplier::text, applied_at
    FROM unnest(%s::text[], %s::text[]) AS candidate (user_id, event_id)
    CROSS JOIN LATERAL (
        SELECT meter, quantity, multiplier, applied_at FROM usage_log
        WHERE usage_log.user_id = candidate.user_id AND usage_log.event_id = candidate.event_id
        OFFSET 0
    ) AS recorded
"""

_STORE_BALANCES = """
    WITH moved AS (
        UPDATE balance SET used = new.used, rollover = new.rollover, purchased = new.purchased,
            carried = new.carried, lifetime_consumed = lifetime_consumed + new.consumed,
            lifetime_granted = lifetime_granted + new.granted
        FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::integer[], %s::bigint[],
            %s::bigint[]) AS new (user_id, meter, used, rollover, purchased, carried, consumed, granted)
        WHERE balance.user_id = new.user_id AND balance.meter = new.meter
    )
    UPDATE account SET seq = new.seq FROM unnest(%s::text[], %s::bigint[]) AS new (user_id, seq)
    WHERE account.user_id = new.user_id
"""
# A balance with new terms: the whole row, except the columns that only grow.
_RETERM = {
    "allowance": "bigint", "spill": "boolean", "rollover_cap": "bigint", "caps": "jsonb", "cadence": "text",
    "anchor": "text", "timezone": "text", "anchored_at": "timestamptz", "period_index": "bigint",
    "period_start": "timestamptz", "period_end": "timestamptz", "backing": "text", "counted_from": "timestamptz",
    "used": "bigint", "rollover": "bigint", "purchased": "bigint", "cap_used": "jsonb", "parked": "jsonb",
    "carried": "integer", "grants": "jsonb",
}  # fmt: skip
_STORE_TERMS = f"""
    UPDATE balance SET {", ".join(f"{name} = new.{name}" for name in _RETERM)},
        lifetime_consumed = lifetime_consumed + new.consumed, lifetime_granted = lifetime_granted + new.granted
    FROM unnest(%s::text[], %s::text[], {", ".join(f"%s::{kind}[]" for kind in _RETERM.values())}, %s::bigint[],
        %s::bigint[]) AS new (user_id, meter, {", ".join(_RETERM)}, consumed, granted)
    WHERE balance.user_id = new.user_id AND balance.meter = new.meter
"""
# After all that changes what was consumed in the life of the balance.
_STORE_LIMITS = """
    UPDATE balance SET limits = new.limits || jsonb_build_object('counted', lifetime_consumed)
    FROM unnest(%s::text[], %s::text[], %s::jsonb[]) AS new (user_id, meter, limits)
    WHERE balance.user_id = new.user_id AND balance.meter = new.meter
"""
_RESTATE_ACCOUNT = """
    UPDATE account SET plan = %(plan)s, status = %(status)s, trust = %(trust)s, highest_tier = %(highest_tier)s,
        next_plan = %(next_plan)s, plan_change_at = %(plan_change_at)s, next_status = %(next_status)s,
        status_change_at = %(status_change_at)s, paid_from = %(paid_from)s, paid_until = %(paid_until)s,
        waiting = %(waiting)s, waiting_at = %(waiting_at)s, timezone = %(timezone)s, pay_from = %(pay_from)s,
        notices = %(notices)s
    WHERE user_id = %(user_id)s
"""
_COPY_ACCOUNTS = f"COPY account ({ACCOUNT_COLUMNS}, opened_at, opened_by, opened_reason) FROM STDIN"
_COPY_BALANCES = f"COPY balance (user_id, {BALANCE_COLUMNS}, lifetime_consumed, lifetime_granted) FROM STDIN"
_COPY_ENTRIES = f"COPY ledger_entry ({', '.join(EntryRow._fields)}) FROM STDIN"
_DROP_LEDGER_HOLDS = """
    DELETE FROM ledger_hold USING unnest(%s::text[], %s::text[]) AS closed (user_id, hold_key)
    WHERE ledger_hold.user_id = closed.user_id AND ledger_hold.hold_key = closed.hold_key
"""


def load_for_update(
    postgres: Postgres, users: Sequence[str], identities: tuple[list[str], list[str]], *, skip_locked: bool = False
) -> Loaded:
    """Lock the accounts of `users` (sorted), then read balances, known events and the clock, in two round trips.

    `identities` are the users and the ids of the batch's events.
    `recorded` maps (user, event id) to the fingerprint (meter, quantity, multiplier) of events already in the log.
    With `skip_locked`, it leaves out accounts that another transaction holds instead of waiting for them.
    """
    # First, so that an account closed meanwhile is in use, not unknown.
    existing = existing_accounts(postgres, users) if skip_locked else set()
    names = text_array(users)
    pairs = [text_array(column) for column in identities]
    with postgres.pipeline():
        locked = postgres.execute(_LOCK_ACCOUNTS + ("SKIP LOCKED" if skip_locked else ""), (names,))
        balances = postgres.execute(READ_BALANCES, (names,))
        # A role that only holds, without events, may not read the log.
        recorded = postgres.execute(_READ_RECORDED, pairs, prepare=False) if identities[0] else None
        accounts = accounts_of(locked.fetchall(), balances.fetchall())
        known = {(row[0], row[1]): row[2:] for row in recorded.fetchall()} if recorded else {}
    # Not in the pipeline: see `_count_idleness`.
    ((now, epoch),) = postgres.execute(READ_CLOCK).fetchall()
    histories = {user_id: user_id for user_id, account in accounts.items() if account.status == "closed"}
    for user_id in histories:
        del accounts[user_id]
    strangers = [user_id for user_id in users if user_id not in accounts]
    kept = histories_of(postgres, strangers) if strangers else {}
    reopened = {user_id: account.reopened for user_id, account in accounts.items() if account.reopened}
    before = {**kept, **earlier_histories(postgres, reopened)} if reopened else kept
    if before:
        known |= _recorded_before_closing(postgres, before, identities)
    closed = {user_id: names[-1] for user_id, names in kept.items()} | histories
    in_use = frozenset(existing - accounts.keys() - closed.keys())
    return Loaded(
        now=now, epoch=epoch, accounts=accounts, closed=closed, in_use=in_use,
        recorded={identity: row[:3] for identity, row in known.items()},
        applied_at={identity: row[3] for identity, row in known.items()},
    )  # fmt: skip


def _recorded_before_closing(
    postgres: Postgres, histories: dict[str, list[str]], identities: tuple[list[str], list[str]]
) -> dict[tuple[str, str], Any]:
    """Return fingerprints and times of recorded events of accounts closed since: identity is for ever."""
    owners = {pseudonym: user_id for user_id, pseudonyms in histories.items() for pseudonym in pseudonyms}
    pairs = [
        (pseudonym, event_id)
        for user_id, event_id in zip(*identities, strict=True)
        for pseudonym in histories.get(user_id, ())
    ]
    rows = postgres.execute(_READ_RECORDED, arrays(pairs, "tt"), prepare=False).fetchall()
    return {(owners[row[0]], row[1]): row[2:] for row in rows}


def append(postgres: Postgres, writes: Writes, now: datetime, imported: Mapping[str, State] | None = None) -> None:
    """Write the rows that a batch adds: new accounts and balances, ledger entries, the usage log, notices.

    `imported` has the accounts that another ledger opened before, by user. Raises the errors of Postgres.
    """
    with postgres.cursor() as cursor:
        _copy_new_rows(cursor, writes, now, imported or {})
    if writes.notices or writes.crossings:
        store_notices(postgres, writes.notices, writes.crossings)


def update(postgres: Postgres, partition: int, writes: Writes) -> None:
    """Write the changes of a batch: balances, versions, accounts, dead letters, ended ledger holds.

    A pipeline sends its statements together, and a COMMIT after them. Raises the errors of Postgres.
    """
    with postgres.cursor() as cursor:
        _update_rows(cursor, partition, writes)


def store_and_commit(postgres: Postgres, writes: Writes, now: datetime) -> None:
    """Write changes of accounts and commit them, all or nothing. Raises the errors of Postgres."""
    append(postgres, writes, now)
    with postgres.pipeline():
        update(postgres, 0, writes)
        postgres.commit()


def store(postgres: Postgres, writes: Writes, now: datetime, imported: Mapping[str, State] | None = None) -> None:
    """Write without a commit: the caller has more to write in the same transaction.

    `imported` has the accounts that another ledger opened before, by user.
    """
    append(postgres, writes, now, imported)
    with postgres.pipeline():
        update(postgres, 0, writes)
    _count_idleness(postgres)


def _count_idleness(postgres: Postgres) -> None:
    """Send a plain statement, which a transaction needs that goes on after a pipeline.

    Psycopg ends a pipeline with a Sync and then a Flush. At a Flush after a Sync, Postgres stops counting how long the
    session idles in its transaction: a process frozen then would keep its locks for ever.
    """
    postgres.execute("SELECT 1")


def _copy_new_rows(
    cursor: psycopg.Cursor[tuple[Any, ...]],
    writes: Writes,
    now: datetime,
    imported: Mapping[str, State],
) -> None:
    if writes.opened_accounts:
        # In the lock order, as others may open the same accounts; see worker/ledger/__init__.py.
        opened_accounts = sorted(writes.opened_accounts, key=lambda account: account.user_id)
        opened = {entry.user_id: (now, entry.actor, entry.reason) for entry in writes.entries if entry.kind == "open"}
        opened |= {user_id: (state.opened_at, *state.opened) for user_id, state in imported.items()}
        copy_rows(cursor, _COPY_ACCOUNTS, [(*account_row(each), *opened[each.user_id]) for each in opened_accounts])
    if writes.opened_balances:
        copy_rows(cursor, _COPY_BALANCES, [_changed_row(changed) for changed in writes.opened_balances])
    if writes.entries:
        copy_rows(cursor, _COPY_ENTRIES, [_entry_row(entry) for entry in writes.entries])
    if writes.usage:
        drawn = [run for run in writes.usage if run.drawn]
        if len(drawn) < len(writes.usage):
            with cursor.copy(COPY_USAGE) as copy:
                copy.write(usage_text([run for run in writes.usage if not run.drawn] if drawn else writes.usage, now))
        if drawn:
            with cursor.copy(COPY_DRAWN) as copy:
                copy.write(usage_text(drawn, now))


def _update_rows(cursor: psycopg.Cursor[tuple[Any, ...]], partition: int, writes: Writes) -> None:
    if writes.versions:
        cursor.execute(_STORE_BALANCES, (*arrays(writes.moved, "ttiiiiii"), *arrays(writes.versions, "ti")))
    if writes.retermed:
        rows = [_changed_row(changed) for changed in writes.retermed]
        cursor.execute(_STORE_TERMS, [array(column) for column in zip(*rows, strict=True)])
    if writes.limits:  # of one balance, the last ones
        limits = {(row.user_id, row.meter): row.limits for row in writes.limits}
        rows = [(*of, as_json(found and found.as_json())) for of, found in limits.items()]
        cursor.execute(_STORE_LIMITS, [array(column) for column in zip(*rows, strict=True)])
    if writes.restated:
        cursor.executemany(_RESTATE_ACCOUNT, [_restated(account) for account in writes.restated])
    if writes.refused:
        cursor.executemany(INSERT_DEAD_LETTER, [dead_letter_row(partition, one) for one in writes.refused])
    if writes.repeats:
        cursor.execute(NOTE_REPEATS, repeat_arrays(writes.repeats))
    if writes.closed_holds:
        cursor.execute(_DROP_LEDGER_HOLDS, arrays(writes.closed_holds, "tt"))


def _restated(account: Account) -> dict[str, Any]:
    """Return the values of an account by name."""
    waiting, waiting_at = waiting_columns(account)
    return {**account._asdict(), "waiting": waiting, "waiting_at": waiting_at, "notices": notices_column(account)}


def _entry_row(entry: EntryRow) -> tuple[Any, ...]:
    """Return the values of a ledger entry in the order of its columns, its detail as JSON."""
    return tuple((entry._asdict() | {"detail": as_json(entry.detail)}).values())


def _changed_row(changed: Changed) -> tuple[Any, ...]:
    """Return the values of a balance, its user before them and its lifetime counters after them."""
    return (changed.user_id, *balance_row(changed.balance), changed.consumed, changed.granted)


_NO_DRAW = (COPY_NULL, COPY_NULL)


def usage_text(usage: Sequence[AppliedRun], applied_at: datetime) -> str:
    """Return the rows of the usage log as COPY reads them: the columns of `UsageRow`, by tabs, a line for each.

    Those of wallets are there in runs that draw on one.

    One text for all of them takes a third of the time of a write for each row. Ids, meters, numbers and times need no
    escape, and no control character is in the others: intake refuses these.
    """
    applied = applied_at.isoformat()
    lines: list[str] = []
    for run in usage:
        user_id, is_collected = run.events[0].user_id, run.first_seq is not None
        columns = (run.events, run.amounts, run.seqs, run.splits, run.period_starts, run.remainders)
        for at, (event, amount, seq, split, period_start, remainder) in enumerate(zip(*columns, strict=True)):
            subscription, rollover, purchased, debt = split
            units = str(amount)
            values = (
                user_id,
                event.event_id,
                str(seq) if is_collected else COPY_NULL,
                event.meter,
                str(event.quantity),
                event.multiplier,
                units,
                units if subscription == amount else str(subscription),
                str(rollover) if rollover else "0",
                str(purchased) if purchased else "0",
                str(debt) if debt else "0",
                "0" if is_collected else units,
                period_start or COPY_NULL,
                event.occurred_at,
                applied,
                "t" if event.clamped else "f",
                copy_field(event.source),
                copy_field(event.reference_id),
                event.hold_key or COPY_NULL,
                copy_field(event.dimensions),
                COPY_NULL if remainder is None else str(remainder),
                trace_id_of(event.traceparent) or COPY_NULL,
                copy_field(as_json(run.grants.get(at))),
            )
            line = "\t".join(values)
            lines.append("\t".join((line, *run.drawn.get(at, _NO_DRAW))) if run.drawn else line)
    lines.append("")  # each line ends
    return "\n".join(lines)
