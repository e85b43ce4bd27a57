"""Change accounts: lock them, store their new state, COMMIT. Every change goes this way.

Before its COMMIT a change appends a `refresh` to each account's stream: a worker publishes the new balance even if this
process dies at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import NamedTuple

from schemas.events import ID_CHARACTERS, ID_PATTERN
from worker.crash import crash_point
from worker.errors import AccountError
from worker.keyspace.keys import SPONSORSHIP, partition_of
from worker.ledger import batch
from worker.ledger.connection import Postgres, batch_connection
from worker.resources import Resources
from worker.rules.account import UNSAID, Account, Cause, Change, ChangeAnswer
from worker.rules.history import record_change
from worker.rules.lifecycle import (
    as_of,
    bring_all_up_to_date,
)
from worker.rules.rows import Loaded, Writes

_is_identifier = re.compile(ID_PATTERN).fullmatch


# The most characters of an actor or a reason.
MAX_CAUSE = 256


def refresh(resources: Resources, users: Sequence[str]) -> None:
    """Ask a worker to publish these accounts.

    The worker waits for the transaction that holds their lock, if any.
    """
    partitions = {user_id: partition_of(user_id, resources.settings.partitions) for user_id in users}
    with resources.redis.pipeline(transaction=False) as pipe:
        for user_id, partition in partitions.items():
            pipe.xadd(partition.entries, {"v": "1", "r": user_id})
        pipe.execute()
    for partition in set(partitions.values()):
        resources.ring(partition)


def refresh_trust(resources: Resources, users: Sequence[str]) -> None:
    """Have the pool forget the cached standing of these users.

    The worker waits for the transaction that holds their lock, if any.
    """
    if not users:
        return
    with resources.redis.pipeline(transaction=False) as pipe:
        for user_id in users:
            pipe.xadd(SPONSORSHIP.entries, {"v": "1", "r": user_id})
        pipe.execute()
    resources.ring(SPONSORSHIP)


class Held(NamedTuple):
    """An account under its lock: as stored, and brought up to date by `steps`, which are not stored yet.

    The boundaries that bring it up to date have no cause; the steps of the command that holds it have `cause`.
    """

    stored: Account
    current: Account
    steps: tuple[Change, ...]
    cause: Cause

    def then(self, current: Account, *steps: Change) -> Held:
        """Return the same after more steps, which the command makes."""
        caused = (step._replace(cause=self.cause) for step in steps)
        return self._replace(current=current, steps=(*self.steps, *caused))


@contextmanager
def locked(resources: Resources, *users: str, cause: Cause = UNSAID) -> Iterator[tuple[Postgres, datetime, list[Held]]]:
    """Hold the accounts of `users` under their locks, at the ledger's time.

    The locks last until `commit` or the end of the block. `cause` is that of all steps to come.
    Raises AccountError if one does not exist.
    """
    require_users(users)
    with batch_connection(resources.engine) as postgres:
        loaded = batch.load_for_update(postgres, sorted(users), ([], []))
        require_not_closed(loaded)
        missing = [user_id for user_id in users if user_id not in loaded.accounts]
        if missing:
            raise AccountError(f"user_id: no account {missing[0]}")
        found = [loaded.accounts[user_id] for user_id in users]
        yield postgres, loaded.now, [_held(resources, account, loaded.now, cause) for account in found]


def commit(
    resources: Resources,
    postgres: Postgres,
    now: datetime,
    *changed: Held,
    granted: Mapping[str, int] | None = None,
    consumed: Mapping[str, int] | None = None,
    last: Callable[[Postgres], None] | None = None,
) -> ChangeAnswer:
    """Store the new state of the accounts, all or nothing; answer for the first one.

    `last` runs before the COMMIT. So do the refreshes: the worker that reads them waits for our locks and publishes our
    commit, even if this process dies at once.
    """
    writes = Writes.none()
    accounts = [
        record_change(writes, held.stored, held.current, held.steps, now, granted=granted, consumed=consumed)
        for held in changed
    ]
    batch.store(postgres, writes, now)
    if last is not None:
        last(postgres)
    refresh(resources, [account.user_id for account in accounts])
    refresh_trust(resources, [held.stored.user_id for held in changed if held.current.trust != held.stored.trust])
    crash_point("after_refresh")
    postgres.commit()
    return answer(resources, accounts[0], now)


def answer(
    resources: Resources, account: Account, now: datetime, *, repeated: bool = False, stale: bool = False, debt: int = 0
) -> ChangeAnswer:
    """Return an account as it is now, with floating meters as if they were used."""
    return ChangeAnswer(as_of(resources.catalogue, account, now), repeated, stale, debt)


def require_not_closed(loaded: Loaded) -> None:
    """Raise AccountError if an account to be opened was closed.

    Its events must stay known.
    """
    if loaded.closed:
        raise AccountError(f"user_id: {min(loaded.closed)} was closed for good; take another id")


def require_users(users: Sequence[str]) -> None:
    """Raise AccountError for an id that no user can have."""
    for user_id in users:
        require_identifier("user_id", user_id)


def cause_of(actor: str | None, reason: str | None) -> Cause:
    """Return who changes an account and why, as its entries keep it. Raises AccountError."""
    for field, value in (("actor", actor), ("reason", reason)):
        if value is not None and not (isinstance(value, str) and 1 <= len(value) <= MAX_CAUSE and value.isprintable()):
            raise AccountError(f"{field}: must be 1 to {MAX_CAUSE} printable characters (got {value!a:.64})")
    return Cause(actor=actor, reason=reason)


def _held(resources: Resources, account: Account, now: datetime, cause: Cause) -> Held:
    current, steps = bring_all_up_to_date(resources.catalogue, account, now)
    return Held(stored=account, current=current, steps=tuple(steps), cause=cause)


def require_identifier(field: str, value: str) -> None:
    """Raise AccountError for an id or a key that breaks the alphabet of ids."""
    if not (isinstance(value, str) and _is_identifier(value)):
        raise AccountError(f"{field}: must be 1 to 128 characters of {ID_CHARACTERS} (got {str(value)[:64]!r})")
