"""The books of the workers over a ledger in memory. They judge, work out and publish as the real ones do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worker.consumer import sponsorship, usage
from worker.keyspace.connection import redis_now_ms
from worker.keyspace.keys import Partition, Stream
from worker.resources import Resources
from worker.rules.batch import Outcome, fingerprint_of, identities_of, users_of
from worker.rules.received import Received
from worker.rules.rows import Loaded
from worker.rules.sponsorship import Known, Locked
from worker.testing.ledger import EPOCH, MemoryLedger


class _UsageBooks(usage.UsageBooks):
    """The books of a partition, whose transactions read and write a ledger in memory."""

    def __init__(self, resources: Resources, partition: Partition, ledger: MemoryLedger) -> None:
        super().__init__(resources, partition)
        self._ledger = ledger

    def load_for_update(self, _: Any, items: Sequence[Received], *, skip_locked: bool) -> Loaded:  # noqa: ARG002
        ledger = self._ledger
        accounts = {user: ledger.accounts[user] for user in users_of(items) if user in ledger.accounts}
        known = [identity for identity in zip(*identities_of(items), strict=True) if identity in ledger.log]
        recorded = {identity: fingerprint_of(ledger.log[identity].event) for identity in known}
        return Loaded(now=ledger.now(), epoch=EPOCH, accounts=accounts, recorded=recorded)

    def append(self, _: Any, outcome: Outcome) -> None:
        ledger, writes = self._ledger, outcome.writes
        rows = (row for run in writes.usage for row in run.applied())
        ledger.log.update({(row.event.user_id, row.event.event_id): row for row in rows})
        ledger.refused.extend(writes.refused)

    def update(self, _: Any, outcome: Outcome) -> None:
        changed = [disposal.account for disposal in outcome.disposals if disposal.account is not None]
        self._ledger.accounts.update({account.user_id: account for account in changed})
        for user_id, key in outcome.writes.closed_holds:
            self._ledger.forget_holds(user_id, [key])


class _PoolBooks(sponsorship.SponsorshipBooks):
    """The books of the pool over a ledger in memory."""

    def __init__(self, resources: Resources, ledger: MemoryLedger) -> None:
        super().__init__(resources)
        self._ledger = ledger

    def load_for_update(
        self,
        _: Any,
        items: Sequence[sponsorship.Received],  # noqa: ARG002
        *,
        skip_locked: bool,  # noqa: ARG002
    ) -> sponsorship.Loaded:
        granted = {row.request_hash: (row.user_id, row.actual, row.paid) for row in self._ledger.grants}
        credited = {row.request_hash: row.paid for row in self._ledger.credits}
        known = Known(granted=granted, credited=credited)
        locked = Locked(now=self._ledger.now(), pool=self._ledger.pool(), known=known, in_use=frozenset())
        return sponsorship.Loaded(locked=locked, histories={})

    def append(self, _: Any, outcome: sponsorship.Outcome) -> None:
        self._ledger.grants.extend(outcome.grants)
        self._ledger.credits.extend(outcome.credited)

    def update(self, _: Any, outcome: sponsorship.Outcome) -> None:
        self._ledger.stored_pool = outcome.pool
        self._ledger.refused.extend(outcome.refused)


def apply_stream(resources: Resources, ledger: MemoryLedger, stream: Stream) -> None:
    """Apply all entries of a stream in one batch, and publish it."""
    books: Any = (
        _UsageBooks(resources, stream, ledger) if isinstance(stream, Partition) else _PoolBooks(resources, ledger)
    )
    resources.redis.delete(stream.rung)
    entries: Any = resources.redis.xrange(stream.entries)
    if not entries:
        return
    taken_ms = redis_now_ms(resources.redis)
    items = list(books.judge(entries, ledger.now()))
    outcome = books.work_out(items, books.load_for_update(None, items, skip_locked=False))
    books.append(None, outcome)
    books.update(None, outcome)
    books.publish(outcome, taken_ms)
