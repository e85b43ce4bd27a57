"""Proof: replay every change of every account through the rules and compare with what is stored, and with Redis.

Accounts are taken in chunks, one read-only snapshot each, so that a proof never blocks a batch. Every difference is
named; none is a rounding error, because nothing is rounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from sqlalchemy import Engine

from schemas.events import multiplied
from worker import keys, ledger
from worker.drain import Tools
from worker.ledger import EntryRow, Postgres, UsageRow
from worker.periods import with_plan_meters
from worker.snapshot import Account, cache_text
from worker.waterfall import Buckets, limit_in_force, pay


class LedgerWrongError(RuntimeError):
    """A proof found differences."""


class VerifyReport(NamedTuple):
    """What a proof covered, and every difference it found."""

    accounts: int
    changes: int
    pending_maps: int
    differences: list[str]


@dataclass
class _Replayed:
    """An account as its changes alone make it."""

    status: str = ""
    seq: int = 0
    allowances: dict[str, int | None] = field(default_factory=dict)
    spills: dict[str, bool] = field(default_factory=dict)
    buckets: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    consumed: dict[str, int] = field(default_factory=dict)


def verify_ledger(tools: Tools, progress: Callable[[int], None] | None = None) -> VerifyReport:
    """Prove all balances. Reads only; `progress` is told how many accounts are done.

    Raises what Postgres and Redis raise: a proof that could not be finished is not a proof.
    """
    settings = tools.settings
    engine = ledger.open_engine(settings, statement_timeout_ms=settings.verify_timeout_ms)
    differences: list[str] = []
    accounts = changes = 0
    after = ""  # before every id
    try:
        while True:
            with ledger.batch_connection(engine) as postgres:
                ledger.begin_snapshot(postgres)
                users = ledger.next_users(postgres, after, settings.verify_chunk_accounts)
                if not users:
                    break
                changes += _verify_chunk(tools, postgres, users, differences)
            accounts += len(users)
            after = users[-1]
            if progress is not None:
                progress(accounts)
        pending_maps = _verify_pending(tools, engine, differences)
    finally:
        engine.dispose()
    return VerifyReport(accounts, changes, pending_maps, differences)


def _verify_chunk(tools: Tools, postgres: Postgres, users: Sequence[str], differences: list[str]) -> int:
    """Replay these accounts and compare; returns the number of changes replayed."""
    loaded = ledger.read_accounts(postgres, users)
    replayed = {user_id: _Replayed() for user_id in users}
    changes = 0
    for row in ledger.read_history(postgres, users):
        changes += 1
        _replay(replayed[row.user_id], row, differences)
    for user_id, stored in loaded.accounts.items():
        differences.extend(_compare(stored, loaded.consumed[user_id], replayed[user_id]))
    differences.extend(_compare_cached(tools, loaded))
    return changes


def _replay(account: _Replayed, row: EntryRow | UsageRow, differences: list[str]) -> None:
    """Take one change, and check that it is what the rules say."""
    name = f"{row.user_id} seq {row.seq}"
    if row.seq != account.seq + 1:
        differences.append(f"{name}: expected seq {account.seq + 1}")
    account.seq = row.seq or 0
    if isinstance(row, EntryRow):
        _replay_entry(account, row, name, differences)
        return
    meter = row.meter
    if meter not in account.buckets:
        differences.append(f"{name}: event {row.event_id} on meter {meter}, which was never opened")
        return
    limit = limit_in_force(account.allowances[meter], account.status)
    after, split = pay(Buckets(limit, *account.buckets[meter], account.spills[meter]), row.amount)
    account.buckets[meter] = after.used, after.rollover, after.purchased
    account.consumed[meter] += row.amount
    stored = (row.from_subscription, row.from_rollover, row.from_purchased, row.overflow_to_debt)
    if stored != tuple(split):
        differences.append(f"{name}: event {row.event_id} has parts {stored}, the waterfall says {tuple(split)}")
    if row.amount != multiplied(row.quantity, row.multiplier):
        differences.append(f"{name}: event {row.event_id} has amount {row.amount}, not quantity × multiplier")


def _replay_entry(account: _Replayed, row: EntryRow, name: str, differences: list[str]) -> None:
    detail: dict[str, Any] = json.loads(row.detail)
    if row.meter == "":
        account.status = detail.get("status", account.status)
        return
    if row.kind == "open_meter":
        account.allowances[row.meter] = detail["allowance"]
        account.spills[row.meter] = detail["spill"]
        account.buckets[row.meter] = (0, 0, 0)
        account.consumed[row.meter] = 0
    used, rollover, purchased = account.buckets.get(row.meter, (0, 0, 0))
    after = (used + row.used_change, rollover + row.rollover_change, purchased + row.purchased_change)
    account.buckets[row.meter] = after
    stored = (row.used_after, row.rollover_after, row.purchased_after)
    if stored != after:
        differences.append(f"{name}: entry {row.kind} {row.entry_key} says {stored} after it, replayed {after}")


def _compare(stored: Account, consumed: dict[str, int], replayed: _Replayed) -> list[str]:
    found = []
    name = stored.user_id
    if (stored.status, stored.version) != (replayed.status, replayed.seq):
        is_now = f"{stored.status} at {stored.version}"
        found.append(f"{name}: account is {is_now}, its changes make it {replayed.status} at {replayed.seq}")
    for meter in sorted(set(stored.balances) | set(replayed.buckets)):
        balance = stored.balances.get(meter)
        has = (balance.used, balance.rollover, balance.purchased) if balance else None
        if has != replayed.buckets.get(meter):
            found.append(f"{name}: {meter} has {has}, its changes make it {replayed.buckets.get(meter)}")
        if balance and balance.allowance != replayed.allowances.get(meter):
            found.append(f"{name}: {meter} has allowance {balance.allowance}, not {replayed.allowances.get(meter)}")
        if consumed.get(meter) != replayed.consumed.get(meter):
            found.append(f"{name}: {meter} consumed {consumed.get(meter)}, its events {replayed.consumed.get(meter)}")
    return found


def _compare_cached(tools: Tools, loaded: ledger.Snapshot) -> list[str]:
    """Redis may lag behind, but at the same version it must say the same."""
    users = list(loaded.accounts)
    partitions = tools.settings.partitions
    with tools.redis.pipeline(transaction=False) as pipe:
        for user_id in users:
            pipe.get(keys.balance(keys.partition_of(user_id, partitions), user_id))
        cached = pipe.execute()
    found = []
    for user_id, raw in zip(users, cached, strict=True):
        account = with_plan_meters(tools.catalogue, loaded.accounts[user_id], loaded.now)
        expected = cache_text(loaded.epoch, account)
        if raw is None or raw.split(b"\n", 1)[0] != expected.split("\n", 1)[0].encode():
            continue
        if sorted(raw.decode().split("\n")) != sorted(expected.split("\n")):
            found.append(f"{user_id}: Redis says {raw.decode()!r}, the ledger {expected!r}")
    return found


def _verify_pending(tools: Tools, engine: Engine, differences: list[str]) -> int:
    """Totals equal the sum of their map, and no event applied a while ago is still pending."""
    maps = 0
    for raw_key in tools.redis.scan_iter(match=keys.pending_pattern(), count=1_000):
        user_id, meter = keys.owner_of_pending(raw_key.decode())
        fields = cast("dict[bytes, bytes]", tools.redis.hgetall(raw_key))
        if not fields:
            continue
        maps += 1
        total = int(fields.pop(b"total", b"0"))
        if total != sum(map(int, fields.values())):
            differences.append(
                f"{user_id}: pending {meter} total {total}, its ids sum to {sum(map(int, fields.values()))}"
            )
        events = [name[2:].decode() for name in fields if name.startswith(b"e:")]
        differences.extend(_stale(tools, engine, user_id, meter, events))
    return maps


def _stale(tools: Tools, engine: Engine, user_id: str, meter: str, events: Sequence[str]) -> list[str]:
    if not events:
        return []
    seconds = tools.settings.pending_alarm_seconds
    if tools.redis.xlen(keys.stream(keys.partition_of(user_id, tools.settings.partitions))):
        return []  # it may be a repeat that waits to be recognised
    with ledger.batch_connection(engine) as postgres:
        late = ledger.applied_before(postgres, user_id, events, seconds)
    return [f"{user_id}: event {event} on {meter} was applied over {seconds} s ago and is pending" for event in late]
