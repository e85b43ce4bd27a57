"""The books of usage: the work of a batch of events on accounts, from their locks to Redis."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import redis

from config.catalogue import Catalogue
from config.log import name_in_logs
from schemas.events import Refusal
from worker.consumer.books import Trim
from worker.consumer.intake import Intake
from worker.consumer.refusals import RefusalLog
from worker.consumer.rollout import Rollout
from worker.consumer.tally import Tally
from worker.crash import crash_point, poison_point
from worker.keyspace import calls, scripts
from worker.keyspace.cache import cache_life, cache_text
from worker.keyspace.entries import RawEntry
from worker.keyspace.keys import Partition, slot_of
from worker.ledger import accounts as ledger_accounts
from worker.ledger import batch
from worker.ledger.connection import Postgres
from worker.reports import counts
from worker.resources import Resources
from worker.rules.account import sub_meters
from worker.rules.batch import (
    Disposal,
    Outcome,
    identities_of,
    refusal_of,
    users_of,
    without_waiting,
    work_out,
)
from worker.rules.catalogues import missing_default_plan
from worker.rules.entry_times import stream_time
from worker.rules.lifecycle import as_of
from worker.rules.received import Event, Received, Refused
from worker.rules.repeats import duplicate_ages, late_repeats
from worker.rules.rows import LateRepeat, Loaded


class UsageBooks:
    """The books of one partition. See `Books`."""

    def __init__(self, resources: Resources, partition: Partition, refusals: RefusalLog | None = None) -> None:
        """`refusals` limits what is logged across drains."""
        self._resources = resources
        self._refusals = refusals or RefusalLog()
        self._settings = resources.settings
        self._partition = partition
        self._outcome_ttl = timedelta(seconds=resources.settings.outcome_ttl_seconds)
        self._in_force = resources.in_force
        self._intake = Intake(partition, resources.settings, resources.catalogue)
        self._rollout = Rollout(resources, partition, self._refusals)
        self._behind: frozenset[str] = frozenset()

    def judge(self, entries: Sequence[RawEntry], now: datetime) -> Iterator[Received]:
        """Return an event, a refusal or a refresh for each stream entry, by the catalogue in force at the first one."""
        if entries:
            self._intake.go_by(self._priced_by(entries[0][0].decode("ascii"), now))
        return self._intake.receive(entries, now)

    def next_change(self, first_id: str, now: datetime) -> datetime | None:
        """Return when another catalogue comes into force after the stream entry `first_id`; None without one."""
        return self._in_force.timeline.next_change(stream_time(first_id, now))

    def _priced_by(self, entry_id: str, now: datetime) -> Catalogue:
        return self._in_force.timeline.at(stream_time(entry_id, now), now)

    def is_recorded(self, postgres: Postgres, item: Event) -> bool:
        """Return True if the event is in the usage log."""
        return ledger_accounts.is_recorded(postgres, item.user_id, item.event_id)

    def refuse(self, item: Event, reason: Refusal, detail: str) -> Refused:
        """Return the dead letter of an event that cannot be applied."""
        return refusal_of(item, reason, detail)

    def load_for_update(self, postgres: Postgres, items: Sequence[Received], *, skip_locked: bool) -> Loaded:
        """Lock the accounts; then read balances, recorded events and the clock. Raises the errors of Postgres."""
        users, identities = users_of(items), identities_of(items)
        return self.with_waiting(items, batch.load_for_update(postgres, users, identities, skip_locked=skip_locked))

    def with_waiting(self, items: Sequence[Received], loaded: Loaded) -> Loaded:
        """Return what was loaded, with the items of this partition that wait for a catalogue. Asks Redis for few."""
        awaited = self._rollout.awaited(items, loaded.now, self._in_force.timeline)
        behind = self._behind | self._not_to_be_opened(items, loaded)
        return loaded._replace(awaited=awaited, behind=behind) if awaited or behind else loaded

    def _not_to_be_opened(self, items: Sequence[Received], loaded: Loaded) -> frozenset[str]:
        """Return the users whose accounts cannot be opened: their events wait for a catalogue with the default plan."""
        plan = self._settings.default_plan
        if plan is None or not items or plan in self._priced_by(items[0].entry_id, loaded.now).plans:
            return frozenset()
        known = loaded.accounts.keys() | loaded.closed.keys() | loaded.in_use
        strangers = frozenset(item.user_id for item in items if isinstance(item, Event)) - known
        if strangers:
            self._refusals.add_unopened(self._partition, missing_default_plan(plan))
        return strangers

    def work_out(self, items: Sequence[Received], loaded: Loaded) -> Outcome:
        """Apply due boundaries, drop duplicates, and let the waterfall decide."""
        poison_point(item.event_id for item in items if isinstance(item, Event))
        timeline, now = self._in_force.timeline, loaded.now
        catalogue = self._priced_by(items[0].entry_id, now) if items else timeline.at(now, now)
        outcome = work_out(items, loaded, catalogue, self._settings.default_plan, timeline.capped_backends)
        if loaded.recorded:
            kept, _ = without_waiting(items, loaded)
            outcome.writes.repeats.extend(late_repeats(kept, loaded, self._outcome_ttl))
        self._behind = self._behind | outcome.waiting
        return outcome

    def append(self, postgres: Postgres, outcome: Outcome) -> None:
        """Write new accounts and balances, ledger entries and the usage log."""
        batch.append(postgres, outcome.writes, outcome.loaded.now)

    def update(self, postgres: Postgres, outcome: Outcome) -> None:
        """Write balances, versions, dead letters, and ended ledger holds."""
        batch.update(postgres, self._partition.number, outcome.writes)

    def count(self, tally: Tally, items: Sequence[Received], outcome: Outcome) -> None:
        """Count the events applied, those without an account, and duplicates."""
        events = sum(len(run.events) for run in outcome.writes.usage)
        uncollected = [run for run in outcome.writes.usage if run.first_seq is None]
        tally.count(counts.APPLIED, events - sum(len(run.events) for run in uncollected))
        if uncollected:
            by_meter, units = Counter[str](), Counter[str]()
            for row in (row for run in uncollected for row in run.applied()):
                by_meter[row.event.meter] += 1
                units[row.event.meter] += row.uncollected
            tally.count(counts.UNCOLLECTED_EVENTS, by_meter)
            tally.count(counts.UNCOLLECTED_UNITS, units)
        if outcome.disposed > events + len(outcome.refused):  # else each entry is an event that was new, or refused
            ages = duplicate_ages(without_waiting(items, outcome.loaded)[0], outcome.loaded)
            tally.observe(counts.DUPLICATE_AGE, [age.total_seconds() for age in ages])

    def publish(self, outcome: Outcome, taken_ms: int, *, trim: Trim | None = None) -> Sequence[calls.Note]:
        """Publish balances, ids and stream entries: `publish_chunk_accounts` accounts per script, pipelined."""
        size = self._settings.publish_chunk_accounts
        notes = trim.notes(-(-len(outcome.disposals) // size)) if trim else []
        requests = self.publication(outcome, taken_ms, notes)
        self.after_publication(outcome, scripts.run_all(self._resources.redis, requests))
        crash_point("after_publish")
        return notes

    def publication(self, outcome: Outcome, taken_ms: int, notes: Sequence[calls.Note] = ()) -> list[scripts.Call]:
        """Return the calls that publish an outcome, for one pipeline. With a note for each script, entries stay."""
        size = self._settings.publish_chunk_accounts
        disposals = outcome.disposals
        chunks = [disposals[start : start + size] for start in range(0, len(disposals), size)]
        if notes:
            requests = [
                self._publish_call(chunk, [], outcome, taken_ms, note)
                for chunk, note in zip(chunks, notes, strict=True)
            ]
        else:
            requests = [self._publish_call(chunk, _entries_of(chunk), outcome, taken_ms) for chunk in chunks]
            if outcome.loose_entries:
                requests.append(self._publish_call([], outcome.loose_entries, outcome, taken_ms))
        requests.extend(self._close_call(event) for event in _closed_in(outcome))
        return requests

    def after_publication(self, outcome: Outcome, replies: Sequence[Any]) -> None:
        """Do what follows from the replies to the calls of `publication`. Raises the errors of Redis."""
        closed = _closed_in(outcome)
        self._release_elsewhere(closed, replies[len(replies) - len(closed) :])
        self._mark_unrolled(outcome)
        if outcome.writes.repeats:
            self._tell_repeats(outcome.writes.repeats)

    def _tell_repeats(self, repeats: Sequence[LateRepeat]) -> None:
        last = max(repeats, key=lambda repeat: repeat.last_at)
        who = name_in_logs(last.user_id, self._settings.log_user_ids)
        self._refusals.add_repeats(self._partition, sum(repeat.times for repeat in repeats), who)

    def _publish_call(
        self,
        disposals: Sequence[Disposal],
        entries: Sequence[str],
        outcome: Outcome,
        taken_ms: int,
        note: calls.Note | None = None,
    ) -> scripts.Call:
        now = outcome.loaded.now
        catalogue = self._in_force.timeline.at(now, now)
        publications = [self._publication(disposal, outcome.loaded, taken_ms, catalogue) for disposal in disposals]
        slot = slot_of(int(now.timestamp() * 1_000))
        version_ttl_ms = self._settings.version_ttl_seconds * 1_000
        return calls.publish(self._partition, slot, entries, publications, version_ttl_ms=version_ttl_ms, note=note)

    def _publication(
        self, disposal: Disposal, loaded: Loaded, taken_ms: int, catalogue: Catalogue
    ) -> calls.Publication:
        """Return the publication of one account: its balance, if it has one, and the ids that this contains."""
        account = self._partition.account(disposal.user_id)
        gone = [(account.pending(meter), ids) for meter, ids in disposal.ids.items()]
        if disposal.account is None:
            return calls.Publication(account.balance, account.lease, gone)
        whole = as_of(catalogue, disposal.account, loaded.now)
        # Counted from before the read of the ledger: even after a slow batch no balance outlives its period.
        fresh_ms, kept_ms = cache_life(whole, loaded.now, self._settings)
        text = cache_text(loaded.epoch, whole, taken_ms + fresh_ms if kept_ms > fresh_ms else None)
        return calls.Publication(account.balance, account.lease, gone, text, taken_ms + kept_ms, account.version)

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
        return sub_meters(meter, self._in_force.timeline.capped_backends.get(meter, ()))

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


def _closed_in(outcome: Outcome) -> list[Event]:
    """Return the events that close a hold of a plain producer."""
    return [event for disposal in outcome.disposals for event in disposal.closed_holds]


def _entries_of(disposals: Sequence[Disposal]) -> list[str]:
    """Return the stream entries that leave with these accounts."""
    return [entry for disposal in disposals for entry in disposal.entries]
