"""What operators and provider webhooks do to accounts: open, set the status, grant, show.

Every change is a ledger entry under the account's lock, with an idempotency key where it moves credit. Before its
COMMIT it appends a `refresh` entry to the account's stream: some worker publishes the new balance even if this process
dies at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NamedTuple

from schemas.events import ID_CHARACTERS, ID_PATTERN, MAX_AMOUNT, MAX_TOTAL
from worker import keys, ledger
from worker.batch import opening_entries, opening_entry
from worker.drain import Tools
from worker.errors import BadInput
from worker.ledger import EntryRow, Loaded, Postgres, Writes
from worker.periods import open_account, open_balance, with_plan_meters
from worker.snapshot import Account, Balance
from worker.waterfall import STATUSES

_is_identifier = re.compile(ID_PATTERN).fullmatch


class AccountError(BadInput):
    """An account command cannot be carried out; the message names the field and what is allowed."""


class Change(NamedTuple):
    """What a command did. `repeated`: its key was known, nothing changed now."""

    account: Account
    repeated: bool


def open_new(
    tools: Tools,
    user_id: str,
    plan: str,
    *,
    status: str = "active",
    start: datetime | None = None,
    end: datetime | None = None,
    rollover: Mapping[str, int] | None = None,
) -> Account:
    """Open an account on `plan` with a first period from `start` (default: now) to `end` (default: until renewed).

    `rollover` is what it brings along by meter, in units: saved allowance, or debt below zero.
    Raises AccountError when the account exists, the status is unknown, the period ends before it starts or a meter
    takes no rollover, and CatalogueError for an unknown plan.
    """
    (account,) = open_many(tools, [user_id], plan, status=status, start=start, end=end, rollover=rollover)
    return account


def open_many(
    tools: Tools,
    users: Sequence[str],
    plan: str,
    *,
    status: str = "active",
    start: datetime | None = None,
    end: datetime | None = None,
    rollover: Mapping[str, int] | None = None,
) -> list[Account]:
    """Open several accounts alike, all or none. See `open_new`."""
    brought = dict(rollover or {})
    _require_users(users)
    _require_status(status)
    writes = Writes.none()
    with ledger.batch_connection(tools.engine) as postgres:
        loaded = ledger.load_for_update(postgres, sorted(users), ([], []))
        if end is not None and end <= (start or loaded.now):
            raise AccountError(f"period_end: must be after period_start ({(start or loaded.now).isoformat()})")
        if loaded.accounts:
            raise AccountError(f"user_id: {next(iter(loaded.accounts))} has an account already")
        opened = []
        for user_id in sorted(users):
            account = open_account(tools.catalogue, user_id, plan, status, start or loaded.now, end)
            account = _with_rollover(account, brought)
            entries = opening_entries(account, loaded.now)
            account = account._replace(version=len(entries))
            writes.opened_accounts.append(account)
            writes.opened_balances.extend((user_id, balance) for balance in account.balances.values())
            writes.entries.extend(entries)
            opened.append(account)
        ledger.store_and_commit(postgres, 0, writes, loaded.now)
    # Not before the COMMIT: there is no row yet whose lock a drain would wait for.
    refresh(tools, users)
    return opened


def set_status(tools: Tools, user_id: str, status: str) -> Change:
    """Set the account's status. Only trialing, active and past_due accounts have an allowance. Repeating is harmless.

    Raises AccountError for an unknown account or status.
    """
    _require_status(status)
    with _changing(tools, user_id) as (postgres, loaded, account):
        if account.status == status:
            return Change(account, repeated=True)
        seq = account.version + 1
        detail = json.dumps({"status": status, "before": account.status})
        entry = EntryRow(user_id, seq, f"status-{seq}", "", "set_status", 0, 0, 0, 0, 0, 0, detail, loaded.now)
        ledger.set_status(postgres, user_id, status)
        writes = Writes.none()
        writes.entries.append(entry)
        writes.versions.append((user_id, seq))
        ledger.store_and_commit(postgres, 0, writes, loaded.now)
        return Change(account._replace(status=status, version=seq), repeated=False)


def grant(tools: Tools, user_id: str, meter: str, amount: int, key: str) -> Change:
    """Add `amount` purchased units, which never expire. Idempotent by `key` (the order or invoice that was paid).

    Raises AccountError for an unknown account or meter, an amount out of range, a meter that does not spill (its
    credit could never be spent), and a key that was used for another amount.
    """
    if meter not in tools.catalogue.meters:
        raise AccountError(f"meter: unknown {meter!r}; there are {', '.join(sorted(tools.catalogue.meters))}")
    if not tools.catalogue.spills[meter]:
        raise AccountError(f"meter: {meter} takes no grants, usage never spills into purchased credits")
    if not 1 <= amount <= MAX_AMOUNT:
        raise AccountError(f"amount: must be a whole number from 1 to {MAX_AMOUNT} (got {amount})")
    if not _is_identifier(key):
        raise AccountError(f"key: must be 1 to 128 characters of {ID_CHARACTERS} (got {key[:64]!r})")
    with _changing(tools, user_id) as (postgres, loaded, account):
        entry_key = f"grant:{key}"
        known = ledger.read_entry(postgres, user_id, entry_key, meter)
        if known is not None and known.purchased_change != amount:
            raise AccountError(f"key: {key} was used for {known.purchased_change} of {meter}")
        if known is not None:
            return Change(account, repeated=True)
        writes = Writes.none()
        seq = account.version
        balance = account.balances.get(meter)
        if balance is None:
            balance = open_balance(tools.catalogue, account.plan, meter, loaded.now)
            seq += 1
            writes.opened_balances.append((user_id, balance))
            writes.entries.append(opening_entry(user_id, seq, balance, loaded.now))
        after = balance.after(balance.used, balance.rollover, balance.purchased + amount)
        if after.purchased > MAX_TOTAL:
            raise AccountError(f"amount: purchased would exceed {MAX_TOTAL}")
        seq += 1
        writes.entries.append(_grant_entry(user_id, seq, entry_key, after, amount, loaded.now))
        writes.moved.append((user_id, meter, after.used, after.rollover, after.purchased, 0, amount))
        writes.versions.append((user_id, seq))
        ledger.store_and_commit(postgres, 0, writes, loaded.now)
        return Change(account._replace(version=seq, balances={**account.balances, meter: after}), repeated=False)


def show(tools: Tools, user_id: str) -> Account:
    """The account as the ledger has it, with a first period for meters it has not used yet. Raises AccountError."""
    _require_users([user_id])
    with ledger.batch_connection(tools.engine) as postgres:
        now, _, account = ledger.read_account(postgres, user_id)
    if account is None:
        raise AccountError(f"user_id: no account {user_id}")
    return with_plan_meters(tools.catalogue, account, now)


def refresh(tools: Tools, users: Sequence[str]) -> None:
    """Ask some worker to publish these accounts. Waits for the transaction that holds their lock, if any."""
    partitions = {user_id: keys.partition_of(user_id, tools.settings.partitions) for user_id in users}
    with tools.redis.pipeline(transaction=False) as pipe:
        for user_id, partition in partitions.items():
            pipe.xadd(keys.stream(partition), {"v": "1", "r": user_id})
        pipe.execute()
    for partition in set(partitions.values()):
        tools.ring(partition)


@contextmanager
def _changing(tools: Tools, user_id: str) -> Iterator[tuple[Postgres, Loaded, Account]]:
    """The account under its lock, announced to Redis before anything can be committed."""
    _require_users([user_id])
    with ledger.batch_connection(tools.engine) as postgres:
        loaded = ledger.load_for_update(postgres, [user_id], ([], []))
        account = loaded.accounts.get(user_id)
        if account is None:
            raise AccountError(f"user_id: no account {user_id}")
        refresh(tools, [user_id])
        yield postgres, loaded, account


def _grant_entry(user_id: str, seq: int, key: str, after: Balance, amount: int, now: datetime) -> EntryRow:
    buckets = (after.used, after.rollover, after.purchased)
    return EntryRow(user_id, seq, key, after.meter, "grant", 0, 0, amount, *buckets, "{}", now)


def _with_rollover(account: Account, brought: Mapping[str, int]) -> Account:
    balances = dict(account.balances)
    for meter, units in brought.items():
        balance = balances.get(meter)
        if balance is None or not balance.spill:
            takers = ", ".join(sorted(name for name, each in balances.items() if each.spill)) or "none"
            raise AccountError(f"rollover: {meter!r} takes none on this plan; there are {takers}")
        if not -MAX_AMOUNT <= units <= MAX_AMOUNT:
            raise AccountError(f"rollover: must be from {-MAX_AMOUNT} to {MAX_AMOUNT} (got {units})")
        balances[meter] = balance.after(0, units, 0)
    return account._replace(balances=balances)


def _require_users(users: Sequence[str]) -> None:
    for user_id in users:
        if not _is_identifier(user_id):
            raise AccountError(f"user_id: must be 1 to 128 characters of {ID_CHARACTERS} (got {user_id[:64]!r})")


def _require_status(status: str) -> None:
    if status not in STATUSES:
        raise AccountError(f"status: unknown {status!r}; there are {', '.join(STATUSES)}")


def parse_time(text: str) -> datetime:
    """An ISO 8601 time with an offset, in UTC. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("needs an offset, such as Z")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is outside the calendar") from None
