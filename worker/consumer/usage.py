"""The books of usage: the work of a batch of events on accounts, from their locks to Redis."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import redis

from schemas.events import Refusal
from worker.consumer.intake import Intake
from worker.crash import crash_point, poison_point
from worker.keyspace import calls, scripts
from worker.keyspace.cache import cache_text, cache_ttl_ms
from worker.keyspace.entries import RawEntry
from worker.keyspace.keys import Partition
from worker.ledger import accounts as ledger_accounts
from worker.ledger import batch
from worker.ledger.connection import Postgres
from worker.resources import Resources
from worker.rules.account import sub_meters
from worker.rules.batch import Disposal, Outcome, identities_of, refusal_of, users_of, work_out
from worker.rules.lifecycle import as_of
from worker.rules.received import Event, Received, Refused
from worker.rules.rows import Loaded


class UsageBooks:
    """The books of one partition. See `Books`."""

    def __init__(self, resources: Resources, partition: Partition) -> None:
        self._resources = resources
        self._settings = resources.settings
        self._partition = partition
        self._intake = Intake(partition, resources.settings, resources.catalogue)

    def judge(self, entries: Sequence[RawEntry]) -> Iterator[Received]:
        """Return an event, a refusal or a refresh for each stream entry."""
        return self._intake.receive(entries)

    def is_recorded(self, postgres: Postgres, item: Event) -> bool:
        """Return True if the event is in the usage log."""
        return ledger_accounts.is_recorded(postgres, item.user_id, item.event_id)

    def refuse(self, item: Event, reason: Refusal, detail: str) -> Refused:
        """Return the dead letter of an event that cannot be applied."""
        return refusal_of(item, reason, detail)

    def load_for_update(self, postgres: Postgres, items: Sequence[Received], *, skip_locked: bool) -> Loaded:
        """Lock the accounts; then read balances, recorded events and the clock. Raises the errors of Postgres."""
        users, identities = users_of(items), identities_of(items)
        return batch.load_for_update(postgres, users, identities, skip_locked=skip_locked)

    def work_out(self, items: Sequence[Received], loaded: Loaded) -> Outcome:
        """Apply due boundaries, drop duplicates, and let the waterfall decide."""
        poison_point(item.event_id for item in items if isinstance(item, Event))
        return work_out(items, loaded, self._resources.catalogue, self._settings.default_plan)

    def append(self, postgres: Postgres, outcome: Outcome) -> None:
        """Write new accounts and balances, ledger entries and the usage log."""
        batch.append(postgres, outcome.writes, outcome.loaded.now)

    def update(self, postgres: Postgres, outcome: Outcome) -> None:
        """Write balances, versions, dead letters, and ended ledger holds."""
        batch.update(postgres, self._partition.number, outcome.writes)

    def publish(self, outcome: Outcome, taken_ms: int) -> None:
        """Publish balances, ids and stream entries: `publish_chunk_accounts` accounts per script, pipelined."""
        size = self._settings.publish_chunk_accounts
        disposals = outcome.disposals
        chunks = [disposals[start : start + size] for start in range(0, len(disposals), size)]
        requests = [self._publish_call(chunk, [], outcome, taken_ms) for chunk in chunks]
        if outcome.loose_entries:
            requests.append(self._publish_call([], outcome.loose_entries, outcome, taken_ms))
        closed = [event for disposal in disposals for event in disposal.closed_holds]
        requests.extend(self._close_call(event) for event in closed)
        replies = scripts.run_all(self._resources.redis, requests)
        self._release_elsewhere(closed, replies[len(requests) - len(closed) :])
        self._mark_unrolled(outcome)
        crash_point("after_publish")

    def _publish_call(
        self, disposals: Sequence[Disposal], loose: Sequence[str], outcome: Outcome, taken_ms: int
    ) -> scripts.Call:
        entries = [entry for disposal in disposals for entry in disposal.entries] + list(loose)
        publications = [self._publication(disposal, outcome.loaded, taken_ms) for disposal in disposals]
        minute = int(outcome.loaded.now.timestamp()) // 60
        return calls.publish(self._partition, minute, entries, publications)

    def _publication(self, disposal: Disposal, loaded: Loaded, taken_ms: int) -> calls.Publication:
        """Return the publication of one account: its balance, if it has one, and the ids that this contains."""
        account = self._partition.account(disposal.user_id)
        gone = [(account.pending(meter), ids) for meter, ids in disposal.ids.items()]
        if disposal.account is None:
            return calls.Publication(account.balance, account.lease, gone)
        whole = as_of(self._resources.catalogue, disposal.account, loaded.now)
        # Counted from before the read of the ledger: even after a slow batch no balance outlives its period.
        ends_ms = taken_ms + cache_ttl_ms(whole, loaded.now, self._settings.cache_ttl_ms)
        return calls.Publication(
            account.balance, account.lease, gone, text=cache_text(loaded.epoch, whole), ends_ms=ends_ms
        )

    def _close_call(self, event: Event) -> scripts.Call:
        return calls.close(
            self._partition.account(event.user_id), event.meter, event.hold_key or "", self._sub_meters(event.meter),
            event_id=event.event_id, amount=event.amount, outcome_ttl_ms=self._settings.outcome_ttl_seconds * 1_000,
        )  # fmt: skip

    def _release_elsewhere(self, closed: Sequence[Event], meters: Sequence[bytes]) -> None:
        """Release holds that an event on another meter named."""
        requests = []
        for event, raw in zip(closed, meters, strict=True):
            meter = raw.decode()
            if meter and meter != event.meter:
                request = calls.release(
                    self._partition.account(event.user_id), meter, event.hold_key or "", self._sub_meters(meter),
                    outcome_ttl_ms=self._settings.outcome_ttl_seconds * 1_000,
                )  # fmt: skip
                requests.append(request)
        scripts.run_all(self._resources.redis, requests)

    def _sub_meters(self, meter: str) -> list[str]:
        return sub_meters(meter, self._resources.catalogue.capped_backends.get(meter, ()))

    def _mark_unrolled(self, outcome: Outcome) -> None:
        """Mark accounts to roll up again. The account's next mark makes up for a lost one."""
        size, before = self._settings.rollup_after_rows, outcome.loaded.accounts
        grown = [
            user_id
            for user_id, _, _, account, _ in outcome.disposals
            if account and account.version // size > (before[user_id].version // size if user_id in before else 0)
        ]
        if grown:
            with contextlib.suppress(redis.RedisError):
                self._resources.redis.sadd(self._partition.unrolled, *grown)
