"""The periodic job that stores due changes: boundaries of sticky periods, and scheduled changes of plan or status.

No call waits for it: an event stores the boundaries of its meter, and a check computes them. The job keeps the history
of periods complete for idle accounts, and the next batch of the others short. It tells Redis nothing: a cached balance
lives until its next boundary, and later computations give the state that the job stores.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from time import monotonic
from typing import NamedTuple

from worker.ledger import batch
from worker.ledger.accounts import Due, due_balances, due_changes
from worker.ledger.connection import batch_connection
from worker.resources import Resources
from worker.rules.history import record_change
from worker.rules.lifecycle import bring_all_up_to_date
from worker.rules.rows import Writes


class Renewed(NamedTuple):
    """The work of one run. `more`: some due boundaries are left for the next run."""

    accounts: int
    entries: int
    more: bool


def renew_due(resources: Resources, stop_at: float = inf, progress: Callable[[int], None] | None = None) -> Renewed:
    """Store due boundaries and changes until `monotonic()` reaches `stop_at`.

    Each chunk of accounts is a transaction and holds its locks no longer. The job leaves out accounts that another
    transaction holds. Safe to repeat, to run twice at the same time, and to kill: a stored boundary is due no more.
    `progress` receives the number of accounts done so far.
    """
    accounts = entries = 0
    for read_due in (due_changes, due_balances):
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
                writes = Writes.none()
                for account in loaded.accounts.values():
                    current, steps = bring_all_up_to_date(resources.catalogue, account, loaded.now)
                    if steps:
                        record_change(writes, account, current, steps, loaded.now)
                batch.store_and_commit(postgres, writes, loaded.now)
            accounts += len(writes.versions)
            entries += len(writes.entries)
            if progress is not None:
                progress(accounts)
    return Renewed(accounts, entries, more=False)
