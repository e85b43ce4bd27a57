"""Cached balances in Redis: their text and their life."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from worker.rules.sponsorship import LOWEST_TIER

if TYPE_CHECKING:
    from worker.rules.sponsorship import Pool, PoolStanding
from datetime import UTC

from worker.rules.account import Account, changes_after, sub_meter

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def cache_text(epoch: int, account: Account) -> str:
    """Return the balance as Redis keeps it: "epoch version", then a line per meter and per sub-cap of a backend.

    A line is: meter limit used rollover purchased spill kind; `-` is an unlimited limit. `read_balance` in
    worker/keyspace/lua/common.lua reads it.
    """
    return "\n".join([f"{epoch} {account.version}", *_lines(account)])


def _lines(account: Account) -> Iterator[str]:
    for meter, balance in account.balances.items():
        limit, used, rollover, purchased, spill = balance.buckets(account.status)
        kind = "unlimited" if limit is None else balance.cadence
        yield f"{meter} {'-' if limit is None else limit} {used} {rollover} {purchased} {int(spill)} {kind}"
        for backend, cap in (balance.caps or {}).items():
            cap_used = (balance.cap_used or {}).get(backend, 0)
            yield f"{sub_meter(meter, backend)} {cap} {cap_used} 0 0 0 {balance.cadence}"


def unknown_account_text(epoch: int) -> str:
    """Return the text cached for a user without an account: version 0, so that any real balance replaces it."""
    return f"{epoch} 0\n?"


def cache_ttl_ms(account: Account, now: datetime, longest_ms: int) -> int:
    """Return the life (ms) of a cached balance: until its next boundary or change, at most `longest_ms`, at least 1."""
    due = [int((end - now).total_seconds() * 1_000) for end in changes_after(account, now)]
    return max(1, min([longest_ms, *due]))


def pool_text(pool: Pool) -> str:
    """Return the sponsorship pool as Redis keeps it: "epoch seq", then its units.

    `find` in worker/keyspace/lua/sponsor.lua reads it.
    """
    return f"{pool.epoch} {pool.seq}\n{pool.units}"


def standing_text(standing: PoolStanding) -> str:
    """Return a user's standing with the pool as Redis keeps it.

    It is "epoch seq", then tier, start (ms) of the last window, 0 without one, and the units absorbed in it. `find` in
    worker/keyspace/lua/sponsor.lua reads it.
    """
    start = standing.window_start or _EPOCH
    start_ms = (start - _EPOCH) // timedelta(milliseconds=1)
    return f"{standing.epoch} {standing.seq}\n{standing.tier or LOWEST_TIER} {start_ms} {standing.absorbed}"
