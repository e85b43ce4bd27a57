"""What Redis promised of an account: holds, and events that are not applied yet; and units set aside from both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from secrets import token_hex
from typing import NamedTuple

from worker.errors import AccountError
from worker.keyspace import calls, scripts
from worker.keyspace.keys import AccountKeys, account_of
from worker.ledger.connection import Postgres
from worker.ledger.holds import read_ledger_holds
from worker.resources import Resources

# How long the outcome of a hold of ours is remembered: nobody asks for it.
_OUTCOME_TTL_MS = 1_000


class Pending(NamedTuple):
    """Open holds of an account and their units by meter, and its events that are not applied yet."""

    holds: dict[str, dict[str, int]]
    events: int

    def held(self, meter: str) -> int:
        """Return the units that holds keep of a meter."""
        return sum(self.holds.get(meter, {}).values())


def read_pending(resources: Resources, postgres: Postgres, user_id: str) -> Pending:
    """Return holds in Redis and in the ledger, and unread events.

    A hold whose time is over counts until a script takes it out. Raises the errors of both servers.
    """
    account = account_of(user_id, resources.settings.partitions)
    meters = sorted(resources.catalogue.meters)
    with resources.redis.pipeline(transaction=False) as pipe:
        for meter in meters:
            pipe.hgetall(account.pending(meter))
        maps = dict(zip(meters, pipe.execute(), strict=True))
    holds = {
        meter: {name[2:].decode(): int(units) for name, units in found.items() if name.startswith(b"h:")}
        for meter, found in maps.items()
    }
    for hold in read_ledger_holds(postgres, user_id):
        holds.setdefault(hold.meter, {}).setdefault(hold.key, hold.amount)
    events = sum(name.startswith(b"e:") for found in maps.values() for name in found)
    return Pending({meter: found for meter, found in holds.items() if found}, events)


def require_all_applied(pending: Pending, field: str, user_id: str, then: str) -> None:
    """Raise AccountError while events of the account wait to be applied; `then` says what to do after them."""
    if pending.events:
        events = "1 event of" if pending.events == 1 else f"{pending.events:,} events of"
        are = "is" if pending.events == 1 else "are"
        raise AccountError(f"{field}: {events} {user_id} {are} not applied yet; {then} after that")


@contextmanager
def set_aside(resources: Resources, user_id: str, meter: str, units: int) -> Iterator[str]:
    """Hold `units` of an account for the length of the block, whatever its balance; yield the key of the hold.

    The block holds the account's lock and takes units from its balance. Checks go by a cached balance until that
    changed: they count this hold, so nobody promises the units a second time. After the block no cached balance is from
    before it. Killed within, the hold expires after all of these did.
    """
    account = account_of(user_id, resources.settings.partitions)
    key = f"aside:{token_hex(8)}"
    settings = resources.settings
    longest_ms = max(settings.cache_ttl_ms, settings.ledger_down_balance_max_age_seconds * 1_000)
    ttl_ms = longest_ms + 2 * settings.statement_timeout_ms
    hold = calls.reserve(
        account, meter, units, key, sub_meter=None, ttl_ms=ttl_ms, outcome_ttl_ms=_OUTCOME_TTL_MS, unchecked=True
    )
    scripts.run(resources.redis, hold)
    try:
        yield key
        # The lease also: a balance that was read before the COMMIT can no longer be installed.
        resources.redis.delete(account.balance, account.lease)
    finally:
        _release(resources, account, meter, key)


def _release(resources: Resources, account: AccountKeys, meter: str, key: str) -> None:
    scripts.run(resources.redis, calls.release(account, meter, key, (), outcome_ttl_ms=_OUTCOME_TTL_MS))
