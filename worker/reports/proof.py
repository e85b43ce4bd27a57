"""Proof: replay every change of every account through the rules, and compare with Postgres and Redis.

The proof takes accounts in chunks, one read-only snapshot each, so it never blocks a batch. It names every difference.
None is a rounding error, because the books round nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple, cast

from sqlalchemy import Engine

from schemas.events import multiplied
from worker.keyspace import keys
from worker.keyspace.cache import cache_text
from worker.ledger.accounts import Snapshot, next_users, read_accounts
from worker.ledger.connection import Postgres, batch_connection, begin_snapshot, open_engine, read_clock
from worker.ledger.proof import applied_before, read_history, wrong_reversals
from worker.reports.proof_sponsorship import totals_of, verify_pool, verify_promises
from worker.resources import Resources
from worker.rules.account import Account, Balance, Parked, changes_after
from worker.rules.batch import count_backend
from worker.rules.calendar import CALENDAR_CADENCES, boundary
from worker.rules.history import SCHEDULE, TERM_KINDS, balance_of
from worker.rules.lifecycle import as_of
from worker.rules.periods import Terms, next_period, renewed, rolled_over, under_plan
from worker.rules.rows import EntryRow, UsageRow
from worker.rules.waterfall import pay


class LedgerWrongError(RuntimeError):
    """A proof found differences."""


class VerifyReport(NamedTuple):
    """The scope of a proof, and every difference it found."""

    accounts: int
    changes: int
    pending_maps: int
    differences: list[str]


@dataclass
class _Replayed:
    """An account as its changes alone make it."""

    account: Account
    consumed: dict[str, int] = field(default_factory=dict)
    granted: dict[str, int] = field(default_factory=dict)

    @classmethod
    def nothing(cls, user_id: str) -> _Replayed:
        """Return the account before its first change."""
        nothing = Account(user_id=user_id, plan="", status="", trust="new", version=0, balances={})
        return cls(nothing)

    def put(self, balance: Balance) -> None:
        """Take over the new balance of one meter."""
        self.account = self.account._replace(balances={**self.account.balances, balance.meter: balance})


def verify_ledger(
    resources: Resources, progress: Callable[[int], None] | None = None, *, named: Callable[[str], str] = str
) -> VerifyReport:
    """Prove all balances and the sponsorship pool. Reads only.

    `progress` receives the number of accounts proved so far. `named` makes the name of a user for the differences.
    Raises the errors of Postgres and Redis: an unfinished proof is no proof.
    """
    settings = resources.settings
    engine = open_engine(settings, statement_timeout_ms=settings.verify_timeout_ms)
    differences: list[str] = []
    accounts = changes = 0
    after = ""  # before every id
    try:
        while True:
            with batch_connection(engine) as postgres:
                begin_snapshot(postgres)
                users = next_users(postgres, after, settings.verify_chunk_accounts)
                if not users:
                    break
                changes += _verify_chunk(resources, postgres, users, named, differences)
            accounts += len(users)
            after = users[-1]
            if progress is not None:
                progress(accounts)
        changes += verify_pool(resources, engine, named, differences)
        pending_maps = _verify_pending(resources, engine, named, differences)
        pending_maps += verify_promises(resources, engine, named, differences)
    finally:
        engine.dispose()
    return VerifyReport(accounts, changes, pending_maps, differences)


def _verify_chunk(
    resources: Resources, postgres: Postgres, users: Sequence[str], named: Callable[[str], str], differences: list[str]
) -> int:
    """Replay these accounts and compare; return the number of changes replayed."""
    loaded = read_accounts(postgres, users)
    replayed = {user_id: _Replayed.nothing(user_id) for user_id in users}
    changes = 0
    for row in read_history(postgres, users):
        changes += 1
        wrongs = _replay(replayed[row.user_id], row)
        differences.extend(f"{named(row.user_id)} seq {row.seq}: {wrong}" for wrong in wrongs)
    for user_id, stored in loaded.accounts.items():
        compared = _compare(stored, loaded.counters[user_id], replayed[user_id])
        differences.extend(f"{named(user_id)}: {wrong}" for wrong in compared)
    for user_id, key in wrong_reversals(postgres, users):
        differences.append(f"{named(user_id)}: ledger entry {key} does not put back the parts of its event")
    differences.extend(f"{named(user_id)}: {wrong}" for user_id, wrong in _compare_cached(resources, postgres, loaded))
    return changes


def _replay(replayed: _Replayed, row: EntryRow | UsageRow) -> Iterator[str]:
    """Replay one change; yield each way in which it breaks the rules."""
    if row.seq != replayed.account.version + 1:
        yield f"expected seq {replayed.account.version + 1}"
    replayed.account = replayed.account._replace(version=row.seq or 0)
    if isinstance(row, UsageRow):
        yield from _replay_usage(replayed, row)
    elif row.meter == "":
        _replay_account(replayed, row)
    else:
        yield from _replay_entry(replayed, row)


def _replay_usage(replayed: _Replayed, row: UsageRow) -> Iterator[str]:
    before = replayed.account.balances.get(row.meter)
    if before is None:
        yield f"event {row.event_id} on meter {row.meter}, which was never opened"
        return
    after, split = pay(before.buckets(replayed.account.status), row.amount)
    cap_used = count_backend(row.dimensions, row.amount, before)
    replayed.put(before.after(after)._replace(cap_used=cap_used))
    replayed.consumed[row.meter] += row.amount
    stored = (row.from_subscription, row.from_rollover, row.from_purchased, row.overflow_to_debt)
    if stored != tuple(split):
        yield f"event {row.event_id} has parts {stored}, the waterfall says {tuple(split)}"
    if row.amount != multiplied(row.quantity, row.multiplier):
        yield f"event {row.event_id} has amount {row.amount}, not quantity × multiplier"
    if row.period_start != before.period_start:
        yield f"event {row.event_id} names the period from {row.period_start}, open was {before.period_start}"


def _replay_account(replayed: _Replayed, row: EntryRow) -> None:
    """Replay a change of the account as a whole."""
    detail, account = row.detail, replayed.account
    if row.kind == "open":
        replayed.granted |= detail.get("seeded", {})
    if row.kind == "change_plan":
        account = account._replace(next_plan=None, plan_change_at=None)
    if row.kind == "close":
        account = account._replace(next_plan=None, plan_change_at=None, next_status=None, status_change_at=None)
    known = {name: detail[name] for name in ("plan", "status", "trust", *SCHEDULE) if name in detail}
    for name in ("plan_change_at", "status_change_at"):
        if known.get(name):
            known[name] = datetime.fromisoformat(known[name])
    replayed.account = account._replace(**known)


def _replay_entry(replayed: _Replayed, row: EntryRow) -> Iterator[str]:
    """Replay a change of one meter."""
    detail = row.detail
    before = replayed.account.balances.get(row.meter)
    had = (before.used, before.rollover, before.purchased) if before else (0, 0, 0)
    changed = (row.used_change, row.rollover_change, row.purchased_change)
    stored = (row.used_after, row.rollover_after, row.purchased_after)
    made = tuple(old + change for old, change in zip(had, changed, strict=True))
    if stored != made:
        yield f"ledger entry {row.kind} {row.entry_key} says {stored} after it, replayed {made}"
    if row.kind == "open_meter":
        replayed.consumed[row.meter] = detail.get("lifetime_consumed", 0)
        replayed.granted[row.meter] = detail.get("lifetime_granted", 0) + replayed.granted.get(row.meter, 0)
    elif before is None:
        yield f"ledger entry {row.kind} {row.entry_key} on meter {row.meter}, which was never opened"
        return
    if row.kind in TERM_KINDS or before is None:
        after = _with_first_end(balance_of(row))
    else:
        after = before._replace(used=row.used_after, rollover=row.rollover_after, purchased=row.purchased_after)
        if "cap_used" in detail:
            parked = Parked.from_json(detail["parked"]) if detail["parked"] else None
            after = after._replace(cap_used=detail["cap_used"], parked=parked)
    if before is not None:
        expected = _expected(replayed.account, before, after, row.kind, detail)
        if expected is not None and expected != after:
            yield f"ledger entry {row.kind} {row.entry_key} leaves {after}, the rules say {expected}"
    replayed.put(after)
    if row.kind == "grant":
        replayed.granted[row.meter] += row.purchased_change
    if row.kind == "reversal":
        replayed.consumed[row.meter] -= sum(detail["parts"].values())


def _expected(
    account: Account, before: Balance, after: Balance, kind: str, detail: Mapping[str, Any]
) -> Balance | None:
    """Return the balance that the rules make of `before`; None without a rule.

    The ledger entry names the terms.
    """
    terms = Terms(*(getattr(after, name) for name in Terms._fields))
    if kind == "refill":
        crossed = next_period(before, terms, account.status, datetime.fromisoformat(detail["until"]))
        return before if crossed is None else crossed[0]
    if kind == "renewal":
        return renewed(before, terms, account.status, after.period_start, after.period_end)
    if kind == "change_plan":
        at = datetime.fromisoformat(detail["at"])
        expected, _ = under_plan(before, terms, account.status, at)
        # The provider alone sets the end of its period.
        return expected._replace(period_end=after.period_end) if after.cadence == "subscription" else expected
    if kind in ("grant", "transfer_in"):
        return before._replace(purchased=max(before.purchased, after.purchased))
    if kind == "transfer_out":
        return before._replace(purchased=0)
    if kind == "clawback":
        left = min(detail["amount"], before.purchased)
        debt = detail["amount"] - left
        return before._replace(purchased=before.purchased - left, rollover=before.rollover - debt)
    if kind == "reversal":
        return _put_back(before, after, detail)
    if kind == "close":
        return after._replace(used=0, rollover=0, purchased=0, cap_used=None, parked=None)
    return None


def _put_back(before: Balance, after: Balance, detail: Mapping[str, Any]) -> Balance:
    """Return the balance after a reversal.

    `wrong_reversals` proves from the log that its parts are those of the event.
    """
    parts, start = detail["parts"], datetime.fromisoformat(detail["period_start"])
    part = parts["from_subscription"]
    expected = before._replace(
        rollover=before.rollover + parts["from_rollover"] + parts["overflow_to_debt"],
        purchased=before.purchased + parts["from_purchased"],
    )
    if start == before.period_start:
        return expected._replace(used=before.used - part, cap_used=after.cap_used)
    if before.parked is not None and start == before.parked.period_start:
        cap_used = after.parked and after.parked.cap_used
        return expected._replace(parked=before.parked._replace(used=before.parked.used - part, cap_used=cap_used))
    # An unlimited allowance gets nothing back. The replay is past that period and no longer knows which kind it had.
    if not before.spill or after.rollover == expected.rollover:
        return expected
    return expected._replace(rollover=rolled_over(part, 0, expected.rollover, before.rollover_cap))


def _with_first_end(balance: Balance) -> Balance:
    """Fill in the end of a calendar period that the first releases left open.

    Their migration wrote it into the balance.
    """
    if balance.period_end is None and balance.cadence in CALENDAR_CADENCES:
        return balance._replace(period_end=boundary(balance.anchored_at, balance.cadence, 1))
    return balance


def _compare(stored: Account, counters: dict[str, tuple[int, int]], replayed: _Replayed) -> list[str]:
    made = replayed.account
    found = [
        f"account {name} is {getattr(stored, name)}, its changes make it {getattr(made, name)}"
        for name in ("plan", "status", "trust", "version", *SCHEDULE)
        if getattr(stored, name) != getattr(made, name)
    ]
    for meter in sorted(set(stored.balances) | set(made.balances)):
        has, should = stored.balances.get(meter), made.balances.get(meter)
        if has is None or should is None:
            found.append(f"{meter} has {has}, its changes make it {should}")
            continue
        found += [
            f"{meter} has {name} {getattr(has, name)}, its changes make it {getattr(should, name)}"
            for name in Balance._fields
            if getattr(has, name) != getattr(should, name)
        ]
        lifetime = (replayed.consumed.get(meter, 0), replayed.granted.get(meter, 0))
        found += [
            f"{meter} {name} {has_units} in its life, its changes make it {units}"
            for name, has_units, units in zip(("consumed", "granted"), counters[meter], lifetime, strict=True)
            if has_units != units
        ]
    return found


def _compare_cached(resources: Resources, postgres: Postgres, loaded: Snapshot) -> list[tuple[str, str]]:
    """Compare cached balances at the same version; return users that differ.

    Redis may lag, but at the same version it must show the same balance.
    """
    users = list(loaded.accounts)
    partitions = resources.settings.partitions
    with resources.redis.pipeline(transaction=False) as pipe:
        for user_id in users:
            pipe.get(keys.account_of(user_id, partitions).balance)
        cached = pipe.execute()
    # A worker or check computed a cached balance during the replay, or at most its life before the snapshot. The
    # balance changes by itself at boundaries: any of these moments may be the one it shows.
    first, last = loaded.now - timedelta(milliseconds=resources.settings.cache_ttl_ms), read_clock(postgres)
    found = []
    for user_id, raw in zip(users, cached, strict=True):
        if raw is None:
            continue
        head, *lines = raw.decode().split("\n")
        account = loaded.accounts[user_id]
        if head != cache_text(loaded.epoch, account).split("\n", 1)[0]:
            continue
        at: datetime | None = first
        views = []
        while at is not None and at <= last:
            current = as_of(resources.catalogue, account, at)
            views.append(set(cache_text(loaded.epoch, current).split("\n")[1:]))
            at = min(changes_after(current, at), default=None)
        if set(lines) not in views:
            found.append((user_id, f"Redis says {lines}, the ledger {sorted(views[-1])}"))
    return found


def _verify_pending(resources: Resources, engine: Engine, named: Callable[[str], str], differences: list[str]) -> int:
    """Prove that totals equal their maps, and that no old applied event is pending."""
    maps = 0
    for raw_key in resources.redis.scan_iter(match=keys.PENDING_PATTERN, count=1_000):
        user_id, meter = keys.owner_of_pending(raw_key.decode())
        fields = cast("dict[bytes, bytes]", resources.redis.hgetall(raw_key))
        if not fields:
            continue
        maps += 1
        total, ids_sum = totals_of(fields)
        if total != ids_sum:
            differences.append(f"{named(user_id)}: pending {meter} total {total}, its ids sum to {ids_sum}")
        events = [name[2:].decode() for name in fields if name.startswith(b"e:")]
        stale = _stale(resources, engine, user_id, meter, events)
        differences.extend(f"{named(user_id)}: {wrong}" for wrong in stale)
    return maps


def _stale(resources: Resources, engine: Engine, user_id: str, meter: str, events: Sequence[str]) -> list[str]:
    if not events:
        return []
    seconds = resources.settings.pending_alarm_seconds
    if resources.redis.xlen(keys.partition_of(user_id, resources.settings.partitions).entries):
        return []  # it may be a repeat that waits to be recognised
    with batch_connection(engine) as postgres:
        late = applied_before(postgres, user_id, events, seconds)
    return [f"event {event} on {meter} was applied over {seconds} s ago and is pending" for event in late]
