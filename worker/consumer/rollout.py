"""The rollout of a catalogue: which unknown meters a catalogue to come has, so that their events wait for it.

A dyno or client that carries another catalogue announces its meters in Redis. Only these meters are waited for, and
only for a bounded time: a typing mistake becomes a dead letter at once, as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import cast

from worker.consumer.refusals import RefusalLog
from worker.keyspace import keys
from worker.keyspace.keys import Partition
from worker.resources import Resources
from worker.rules.catalogues import Timeline
from worker.rules.entry_times import stream_time
from worker.rules.received import Received, Refused


class Rollout:
    """What one drain asks about catalogues to come."""

    def __init__(self, resources: Resources, partition: Partition, refusals: RefusalLog) -> None:
        """`refusals` limits what is logged across drains."""
        self._refusals = refusals
        self._resources = resources
        self._partition = partition
        self._patience = timedelta(minutes=resources.settings.catalogue_wait_minutes)

    def awaited(self, items: Sequence[Received], now: datetime, timeline: Timeline) -> frozenset[str]:
        """Return the stream entries of this batch that wait for a catalogue.

        `now` is the clock of the ledger. An event has waited long enough after `catalogue_wait_minutes`, and none waits
        in a stream of more than `catalogue_wait_max_entries`: each drain reads these again. Raises the errors of Redis.
        """
        lacking = {
            item.entry_id: item.lacks[1]
            for item in items
            if isinstance(item, Refused)
            and item.lacks is not None
            and now - stream_time(item.entry_id, now) < self._patience
        }
        if not lacking:
            return frozenset()
        # Asked for each such batch: a service announces its catalogue just before its first event of a new meter.
        announced, backlog = self._ask()
        if backlog > self._resources.settings.catalogue_wait_max_entries:
            return frozenset()
        to_come = {meter for catalogue in timeline.to_come(now) for meter in catalogue.meters}
        registered = {catalogue.fingerprint for _, catalogue in timeline.changes}
        for fingerprint, meters in announced.items():
            if fingerprint not in registered:
                to_come |= meters
        waiting = {entry_id: meter for entry_id, meter in lacking.items() if meter in to_come}
        if waiting:
            named = ", ".join(sorted(set(waiting.values())))
            self._refusals.add_waiting(self._partition, named, self._resources.settings.catalogue_wait_minutes)
        return frozenset(waiting)

    def _ask(self) -> tuple[dict[str, frozenset[str]], int]:
        """Return the meters that each announced catalogue has, by its fingerprint, and the length of the stream."""
        with self._resources.redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.OTHER_CATALOGUES)
            pipe.xlen(self._partition.entries)
            found, backlog = pipe.execute()
        announced = cast("dict[bytes, bytes]", found)
        meters_of = {
            fingerprint.decode(): frozenset(meters.decode("utf-8", "replace").split())
            for fingerprint, meters in announced.items()
        }
        return meters_of, backlog
