"""Change accounts: lock them, store their new state, COMMIT. Every change goes this way.

Before its COMMIT a change appends a `refresh` to each account's stream: a worker publishes the new balance even if this
process dies at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import NamedTuple

from schemas.events import ID_ALLOWED, ID_PATTERN
from worker.crash import crash_point
from worker.errors import AccountError, NotFound, OrderUsed
from worker.keyspace.keys import SPONSORSHIP, partition_of
from worker.ledger import batch
from worker.ledger.connection import Postgres, batch_connection
from worker.ledger.orders import OrderKind, claim_key, read_credits
from worker.resources import Resources
from worker.rules.account import UNSAID, Account, Balance, Cause, Change, ChangeAnswer
from worker.rules.credits import Purchases, purchases_of
from worker.rules.entry_times import END_OF_TIME
from worker.rules.history import entry_of, record_change
from worker.rules.lifecycle import (
    as_of,
    bring_all_up_to_date,
    cross_grants_of,
    open_late,
)
from worker.rules.notices import Watch, tell_change
from worker.rules.periods import opened_meter
from worker.rules.rows import Loaded, Writes
from worker.rules.wallets import draws_of
from worker.rules.waterfall import may_spend

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

    The boundaries that bring it up to date have no cause; the steps of the command that holds it have `cause`. While
    older events wait in its stream, it `is_behind`: boundaries between them and now are left to them.
    """

    stored: Account
    current: Account
    steps: tuple[Change, ...]
    cause: Cause
    is_behind: bool

    def then(self, current: Account, *steps: Change) -> Held:
        """Return the same after more steps, which the command makes."""
        caused = (step._replace(cause=self.cause) for step in steps)
        return self._replace(current=current, steps=(*self.steps, *caused))


@contextmanager
def locked(
    resources: Resources,
    *users: str,
    cause: Cause = UNSAID,
    opening: Callable[[str, datetime], Writes] | None = None,
) -> Iterator[tuple[Postgres, datetime, list[Held]]]:
    """Hold the accounts of `users` under their locks, at the ledger's time.

    The locks last until `commit` or the end of the block. `cause` is that of all steps to come. `opening` makes the
    rows of a missing account, which is opened in the same transaction.
    Raises AccountError if one does not exist, and psycopg.errors.UniqueViolation if another call opens it meanwhile.
    """
    require_users(users)
    with batch_connection(resources.engine) as postgres:
        loaded = batch.load_for_update(postgres, sorted(users), ([], []))
        require_not_closed(loaded)
        missing = [user_id for user_id in users if user_id not in loaded.accounts]
        if missing and opening is None:
            raise NotFound(f"user_id: no account {missing[0]}")
        if missing and opening is not None:
            for user_id in sorted(missing):
                batch.store(postgres, opening(user_id, loaded.now), loaded.now)
            loaded = batch.load_for_update(postgres, sorted(users), ([], []))
        found = [loaded.accounts[user_id] for user_id in users]
        yield postgres, loaded.now, [_held(resources, account, loaded.now, cause) for account in found]


def _settled_until(resources: Resources, user_id: str, now: datetime) -> datetime:
    """Return the moment up to which boundaries may be stored under the account's lock, as no older event of it waits.

    `now` is the clock of the ledger. An event that comes later is younger than `now`. Whoever may append to a stream
    need not be allowed to read it, so any entry counts as old; but none waits longer than `late_events_grace_hours`.
    """
    waits = resources.redis.xlen(partition_of(user_id, resources.settings.partitions).entries)
    return now - timedelta(hours=resources.settings.late_events_grace_hours) if waits else now


def commit(
    resources: Resources,
    postgres: Postgres,
    now: datetime,
    *changed: Held,
    consumed: Mapping[str, int] | None = None,
    last: Callable[[Postgres], None] | None = None,
) -> ChangeAnswer:
    """Store the new state of the accounts, all or nothing; answer for the first one.

    A review sees the steps of the command before any of it, and may raise: then nothing is stored.
    `last` runs before the COMMIT. So do the refreshes: the worker that reads them waits for our locks and publishes our
    commit, even if this process dies at once.
    """
    if resources.review is not None:
        resources.review(
            [(held.stored.user_id, [step for step in held.steps if step.cause == held.cause]) for held in changed]
        )
    writes, watch, accounts = Writes.none(), Watch(resources.catalogue), list[Account]()
    for held in changed:
        known = len(writes.entries)
        account = record_change(writes, held.stored, held.current, held.steps, now, consumed=consumed)
        tell_change(writes, watch, held.stored, account, writes.entries[known:], now)
        accounts.append(account)
    batch.store(postgres, writes, now)
    if last is not None:
        last(postgres)
    refresh(resources, [account.user_id for account in accounts])
    refresh_trust(
        resources,
        [
            held.stored.user_id
            for held in changed
            if _standing(as_of(resources.catalogue, held.current, now))
            != _standing(as_of(resources.catalogue, held.stored, now))
        ],
    )
    crash_point("after_refresh")
    postgres.commit()
    return answer(resources, accounts[0], now)


def answer(
    resources: Resources,
    account: Account,
    now: datetime,
    *,
    repeated: bool = False,
    stale: bool = False,
    debt: int = 0,
    waits_until: datetime | None = None,
) -> ChangeAnswer:
    """Return an account as it is now, with floating meters as if they were used."""
    current = as_of(resources.catalogue, account, now)
    return ChangeAnswer(current, repeated=repeated, stale=stale, debt=debt, waits_until=waits_until)


def with_meter(resources: Resources, account: Held, meter: str, now: datetime) -> tuple[Held, Balance]:
    """Return the account with a first period of `meter`, if it had none."""
    found = account.current.balances.get(meter)
    if found is not None:
        return account, found
    opened = open_late(resources.catalogue, account.current, meter, now)
    balances = {**account.current.balances, meter: opened}
    return account.then(account.current._replace(balances=balances), opened_meter(opened)), opened


def with_grants_due(account: Held, meter: str, now: datetime) -> tuple[Held, Balance]:
    """Return the account after all starts and ends of the grants of `meter` until `now`, though older events wait.

    Only for an account of which no event waits: one that does is charged by the grants that are left.
    """
    steps: list[Change] = []
    current = cross_grants_of(account.current, now, [meter], steps)
    return account._replace(current=current, steps=(*account.steps, *steps)), current.balances[meter]


def require_same_period(resources: Resources, account: Held, meter: str, now: datetime) -> None:
    """Raise AccountError if older events stand between the stored period of a meter and the one that is open now.

    A correction of used units, rollover or debt, and a new debt, belong to the period that is open now. While older
    events wait, a renewal, a plan change or a boundary before it is not stored yet: it would lose or undo the
    correction, and the rest of a period that is over would pay the debt. A floating period is open until its next use.
    """
    if not account.is_behind:
        return
    stored = account.current.balances.get(meter)
    seen, _ = bring_all_up_to_date(resources.catalogue, account.current, now)
    if stored is None or stored.counted_from != seen.balances[meter].counted_from:
        user_id = account.stored.user_id
        raise AccountError(
            f"user_id: older events of {user_id} wait, and a new period of {meter} after them; "
            "call again when a worker has applied them"
        )


def moved(account: Held, step: Change) -> Held:
    """Return the account after a step of one meter."""
    assert step.after is not None
    balances = {**account.current.balances, step.meter: step.after}
    return account.then(account.current._replace(balances=balances), step)


def purchases_on(postgres: Postgres, account: Held, meter: str, now: datetime) -> Purchases:
    """Return what an account bought on a meter, by its entries, and by its steps that are not stored yet."""
    user_id = account.stored.user_id
    stored = [entry for entry in read_credits(postgres, [user_id]) if entry.meter == meter]
    steps = [entry_of(user_id, 0, step, now) for step in account.steps if step.meter == meter]
    return purchases_of([*stored, *steps])


def require_meter(resources: Resources, meter: str) -> None:
    """Raise AccountError for a meter that the catalogue lacks."""
    if not isinstance(meter, str) or meter not in resources.catalogue.meters:
        raise AccountError(f"meter: unknown {meter!r:.64}; there are {', '.join(sorted(resources.catalogue.meters))}")


def require_no_wallet(resources: Resources, account: Account, meter: str, change: str) -> None:
    """Raise AccountError for a meter that draws on a wallet: none of its own units are spent. `change` is a verb."""
    draw = draws_of(resources.catalogue, account.plan, account.status).get(meter)
    if draw is not None:
        raise AccountError(
            f"meter: {meter} draws on the wallet {draw.wallet} in plan {account.plan}; {change} {draw.wallet} instead"
        )


def require_spilling(resources: Resources, meter: str) -> None:
    """Raise AccountError for an unknown meter, and for one that has neither rollover nor purchased units."""
    require_meter(resources, meter)
    if not resources.catalogue.spills[meter]:
        raise AccountError(f"meter: {meter} takes no grants, usage never spills into purchased credits")


def require_not_closed(loaded: Loaded) -> None:
    """Raise AccountError if an account to be opened was closed.

    Its events must stay known.
    """
    if loaded.closed:
        raise AccountError(f"user_id: {min(loaded.closed)} was closed; reopen it, or take another id")


def claim_order(postgres: Postgres, kind: OrderKind, field: str, key: str, user_id: str) -> None:
    """Let the account use an order or an invoice, within its change. Raises OrderUsed if another account did."""
    if claim_key(postgres, kind, key, user_id) != user_id:
        raise OrderUsed(field, key)


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


def require_flag(field: str, value: object) -> None:
    """Raise AccountError unless `value` is True or False: any other type may mean either."""
    if not isinstance(value, bool):
        raise AccountError(f"{field}: must be True or False (got {str(value)[:64]!r})")


def _standing(account: Account) -> tuple[str, bool]:
    """Return what the sponsorship pool goes by."""
    return account.trust, may_spend(account.status)


def _held(resources: Resources, account: Account, now: datetime, cause: Cause) -> Held:
    until = _settled_until(resources, account.user_id, now)
    current, steps = bring_all_up_to_date(resources.catalogue, account, until)
    return Held(stored=account, current=current, steps=tuple(steps), cause=cause, is_behind=until < now)


def require_identifier(field: str, value: str) -> None:
    """Raise AccountError for an id or a key that breaks the alphabet of ids."""
    if not (isinstance(value, str) and _is_identifier(value)):
        raise AccountError(f"{field}: must be {ID_ALLOWED} (got {str(value)[:64]!r})")


def require_time(field: str, moment: datetime) -> None:
    """Raise AccountError for a time without an offset, which names no moment, and for one near the end of dates."""
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise AccountError(f"{field}: must be a time with an offset (got {str(moment)[:64]!r})")
    if moment > END_OF_TIME:
        raise AccountError(f"{field}: must be before the year {END_OF_TIME.year} (got {moment.isoformat()})")
