"""The books of usage: what a batch of events does to accounts, from their locks to what Redis shows afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import redis

from schemas.events import Refusal
from worker.client.calls import release_call
from worker.client.session import Context
from worker.consumer.intake import Intake
from worker.crash import armed, crash_point, poison_point
from worker.keyspace import scripts
from worker.keyspace.cache import cache_text, cache_ttl_ms
from worker.keyspace.entries import RawEntry
from worker.keyspace.keys import Partition
from worker.ledger import accounts as ledger_accounts
from worker.ledger import batch
from worker.ledger.accounts import existing_accounts
from worker.ledger.connection import Postgres
from worker.resources import Resources
from worker.rules import account as rules_account
from worker.rules.batch import Disposal, identities_of, refusal_of, users_of, work_out
from worker.rules.lifecycle import as_of
from worker.rules.received import Event, Received, Refused
from worker.rules.rows import Loaded


class Applied(NamedTuple):
    """A committed batch, to be published. At `taken_ms` on the clock of Redis it was not read from Postgres yet.

    `left_out` are users whose accounts were in use: their entries stay for later.
    """

    disposals: list[Disposal]
    loose_entries: list[str]
    loaded: Loaded
    taken_ms: int
    left_out: frozenset[str]
    refused: list[Refused]


class UsageBooks:
    """Judges, applies and publishes the events of one partition. See `Books` in worker/consumer/drain.py."""

    def __init__(self, resources: Resources, partition: Partition) -> None:
        self._resources = resources
        self._settings = resources.settings
        self._partition = partition
        self._intake = Intake(partition, resources.settings, resources.catalogue)

    def judge(self, entries: Sequence[RawEntry]) -> Iterator[Received]:
        """Events, refusals and requests to publish, one for each entry."""
        return self._intake.receive(entries)

    def refusal_of(self, item: Event, reason: Refusal, detail: str) -> Refused:
        """The dead letter of an event that cannot be applied."""
        return refusal_of(item, reason, detail)

    def is_recorded(self, postgres: Postgres, item: Event) -> bool:
        """True when the event is in the usage log."""
        return ledger_accounts.is_recorded(postgres, item.user_id, item.event_id)

    def apply(self, postgres: Postgres, items: Sequence[Received], taken_ms: int, *, skip_locked: bool) -> Applied:
        """Lock the accounts, apply what is due, drop duplicates, let the waterfall decide, write, COMMIT.

        Raises what Postgres raises. Killed before the COMMIT, nothing happened; killed after it, the events are known.
        """
        loaded, received, left_out = self._lock_and_load(postgres, items, skip_locked=skip_locked)
        poison_point(item.event_id for item in received if isinstance(item, Event))
        outcome = work_out(received, loaded, self._resources.catalogue, self._settings.default_plan)
        crash_point("inside_transaction")
        batch.store_and_commit(postgres, self._partition.number, outcome.writes, loaded.now)
        refused = outcome.writes.refused
        if refused:
            crash_point("after_dead_letter")
        return Applied(outcome.disposals, outcome.loose_entries, loaded, taken_ms, left_out, refused)

    def publish(self, applied: Applied) -> None:
        """Step 10: balances, ids and entries of at most so many accounts per script, pipelined.

        Killed in between, the rest is found in the stream again, is known, and is published then.
        """
        size = self._settings.publish_chunk_accounts
        disposals = applied.disposals
        chunks = [disposals[start : start + size] for start in range(0, len(disposals), size)]
        calls = [self._publication(chunk, [], applied) for chunk in chunks]
        if applied.loose_entries:
            calls.append(self._publication([], applied.loose_entries, applied))
        closed = [event for disposal in disposals for event in disposal.closed_holds]
        calls.extend(self._closing(event) for event in closed)
        if armed("between_publishing_scripts"):
            scripts.run(self._resources.redis, calls[0])
            crash_point("between_publishing_scripts")
        replies = scripts.run_all(self._resources.redis, calls)
        self._release_elsewhere(closed, replies[len(calls) - len(closed) :])
        self._mark_unrolled(applied)
        crash_point("after_publish")

    def _publication(self, disposals: Sequence[Disposal], loose: Sequence[str], applied: Applied) -> scripts.Call:
        loaded = applied.loaded
        partition, catalogue = self._partition, self._resources.catalogue
        names = [partition.entries, partition.applied(int(loaded.now.timestamp()) // 60)]
        entries = [entry for disposal in disposals for entry in disposal.entries] + list(loose)
        args: list[str | int] = [len(entries), *entries, len(disposals)]
        for user_id, _, ids, account, _ in disposals:
            keys = partition.account(user_id)
            names += (keys.balance, keys.lease)
            if account is None:
                args += ("", 0, len(ids))
            else:
                whole = as_of(catalogue, account, loaded.now)
                # Counted from before the ledger was read: however slow we were, no balance outlives its period.
                ends_ms = applied.taken_ms + cache_ttl_ms(whole, loaded.now, self._settings.cache_ttl_ms)
                args += (cache_text(loaded.epoch, whole), ends_ms, len(ids))
            for meter, listed in ids.items():
                names.append(keys.pending(meter))
                args += (len(listed), *listed)
        return scripts.call("publish", names, args)

    def _closing(self, event: Event) -> scripts.Call:
        key = event.hold_key or ""
        account = self._partition.account(event.user_id)
        names = [account.holds(event.meter), account.hold(key)]
        backends = self._resources.catalogue.capped_backends.get(event.meter, ())
        sub_meters = [rules_account.sub_meter(event.meter, backend) for backend in backends]
        names += [account.holds(sub_meter) for sub_meter in sub_meters]
        outcome_ttl_ms = self._settings.outcome_ttl_seconds * 1_000
        return scripts.call("close", names, [key, event.event_id, event.amount, outcome_ttl_ms])

    def _release_elsewhere(self, closed: Sequence[Event], meters: Sequence[bytes]) -> None:
        """Free holds that were named by an event on another meter."""
        calls = []
        context = Context(self._settings, self._resources.catalogue)
        for event, raw in zip(closed, meters, strict=True):
            meter = raw.decode()
            if meter and meter != event.meter:
                calls.append(release_call(context, event.user_id, meter, event.hold_key or ""))
        scripts.run_all(self._resources.redis, calls)

    def _mark_unrolled(self, applied: Applied) -> None:
        """Note accounts that may be rolled up again. A mark that is lost is made good by the account's next one."""
        size, before = self._settings.rollup_after_rows, applied.loaded.accounts
        grown = [
            user_id
            for user_id, _, _, account, _ in applied.disposals
            if account and account.version // size > (before[user_id].version // size if user_id in before else 0)
        ]
        if grown:
            with contextlib.suppress(redis.RedisError):
                self._resources.redis.sadd(self._partition.unrolled, *grown)

    def _lock_and_load(
        self, postgres: Postgres, received: Sequence[Received], *, skip_locked: bool
    ) -> tuple[Loaded, Sequence[Received], frozenset[str]]:
        """The accounts under their locks, and the items without those of accounts in use, which are the third part."""
        users = users_of(received)
        # Asked first: one that is closed meanwhile is in use, not unknown.
        existing = existing_accounts(postgres, users) if skip_locked else set()
        loaded = batch.load_for_update(postgres, users, identities_of(received), skip_locked=skip_locked)
        in_use = frozenset(existing - loaded.accounts.keys() - loaded.closed.keys())
        if in_use:
            received = [item for item in received if isinstance(item, Refused) or item.user_id not in in_use]
        return loaded, received, in_use
