"""The periodic job that stores due changes: boundaries of sticky periods and grants, changes of plan or status.

No call waits for it: an event stores the boundaries of its meter, and a check computes them. The job keeps the history
of periods complete for idle accounts, and the next batch of the others short. It tells Redis nothing: a cached balance
lives until its next boundary, and later computations give the state that the job stores.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from math import inf
from time import monotonic
from typing import NamedTuple

from worker.keyspace.keys import Partition, partition_of, partitions_of
from worker.ledger import batch
from worker.ledger.accounts import Due, due_balances, due_changes, due_grants, due_provided, due_waiting
from worker.ledger.connection import batch_connection
from worker.resources import Resources
from worker.rules.entry_times import stream_time
from worker.rules.history import record_change
from worker.rules.lifecycle import bring_all_up_to_date
from worker.rules.notices import Watch, tell_change
from worker.rules.rows import Loaded, Writes


class Renewed(NamedTuple):
    """The work of one run. `more`: some due boundaries are left for the next run."""

    accounts: int
    entries: int
    more: bool


def renew_due(resources: Resources, stop_at: float = inf, progress: Callable[[int], None] | None = None) -> Renewed:
    """Store due boundaries and changes until `monotonic()` reaches `stop_at`.

    Each chunk of accounts is a transaction and holds its locks no longer. The job leaves out accounts that another
    transaction holds, and boundaries before which older events wait in the stream. Safe to repeat, to run twice at the
    same time, and to kill: a stored boundary is due no more.
    `progress` receives the number of accounts done so far.
    """
    accounts = entries = 0
    for read_due in (due_changes, due_waiting, due_grants, due_provided, due_balances):
        after: Due | None = None
        while True:
            if monotonic() >= stop_at:
                return Renewed(accounts, entries, more=True)
            with batch_connection(resources.engine) as postgres:
                due = read_due(postgres, after, resources.settings.renew_chunk_accounts)
                if not due:
                    break
                after = due[-1]
                users = sorted({user_id for _, user_id in due})
                loaded = batch.load_for_update(postgres, users, ([], []), skip_locked=True)
                writes, watch = Writes.none(), Watch(resources.catalogue)
                until = _settled_until(resources, loaded)
                for user_id, account in loaded.accounts.items():
                    partition = partition_of(user_id, resources.settings.partitions)
                    current, steps = bring_all_up_to_date(resources.catalogue, account, until[partition])
                    if steps:
                        known = len(writes.entries)
                        stored = record_change(writes, account, current, steps, loaded.now)
                        tell_change(writes, watch, account, stored, writes.entries[known:], loaded.now)
                batch.store_and_commit(postgres, writes, loaded.now)
            accounts += len(writes.versions)
            entries += len(writes.entries)
            if progress is not None:
                progress(accounts)
    return Renewed(accounts, entries, more=False)


def _settled_until(resources: Resources, loaded: Loaded) -> dict[Partition, datetime]:
    """Return the moment up to which boundaries may be stored, by partition: no older event waits in its stream.

    Read under the locks of the accounts: an event that comes later is younger than that. Events that wait for longer
    than `late_events_grace_hours` hold up nothing.
    """
    partitions = partitions_of(resources.settings.partitions)
    with resources.redis.pipeline(transaction=False) as pipe:
        for partition in partitions:
            pipe.xrange(partition.entries, count=1)
        oldest = pipe.execute()
    patience = loaded.now - timedelta(hours=resources.settings.late_events_grace_hours)
    return {
        partition: max(patience, stream_time(entries[0][0].decode(), loaded.now)) if entries else loaded.now
        for partition, entries in zip(partitions, oldest, strict=True)
    }
