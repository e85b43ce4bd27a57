"""Cached balances in Redis: their text and their life."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from worker.rules.sponsorship import LOWEST_TIER

if TYPE_CHECKING:
    from config.settings import Settings
    from worker.rules.sponsorship import Pool, PoolStanding
from datetime import UTC

from worker.rules.account import Account, Balance, changes_after, sub_meter
from worker.rules.fractions import MILLIONTHS
from worker.rules.preflight import bounds_text, kind_of_limit
from worker.rules.wallets import ITSELF, price_in_millionths, wallet_of
from worker.rules.waterfall import may_spend

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def cache_text(epoch: int, account: Account, fresh_until_ms: int | None = None) -> str:
    """Return the balance as Redis keeps it: "epoch version", then a line per meter and per sub-cap of a backend.

    With `fresh_until_ms`, on the clock of Redis, the first line ends with that: the balance is stale from then on.
    A line is: meter limit used rollover purchased spill kind; `-` is an unlimited limit. What else bounds its checks
    follows, if there is something; see `bounds_text`. A wallet, and each meter that draws on it, goes on with these
    bounds, or `-`, and: wallet, whole part and millionths of the price, millionths carried. Only the bounds of the
    wallet count for its meters. `read_balance` and `in_wallet` in worker/keyspace/lua/common.lua read it. A suspended
    account has the line `!` instead: no script finds a unit in it.
    """
    head = f"{epoch} {account.version}"
    lines = _lines(account) if may_spend(account.status) else "!"
    return "\n".join([head if fresh_until_ms is None else f"{head} {fresh_until_ms}", *lines])


def _lines(account: Account) -> Iterator[str]:
    draws, status = account.draws, account.status
    for meter, balance in account.balances.items():
        if draws and (wallet := wallet_of(draws, meter)) is not None:
            yield _line_in_wallet(account, meter, wallet)
        else:
            limit = balance.limit(status)
            yield (
                f"{meter} {'-' if limit is None else limit} {balance.used} {balance.rollover} {balance.purchased} "
                f"{'1' if balance.spill else '0'} {kind_of_limit(balance, limit)}{_bounds(account, balance)}"
            )
        if balance.caps:
            yield from _cap_lines(meter, balance)


def _cap_lines(meter: str, balance: Balance) -> Iterator[str]:
    """Yield a line for each sub-cap: of a backend, or of a meter that draws on this wallet."""
    for capped, cap in (balance.caps or {}).items():
        if cap is None:
            continue
        cap_used = (balance.cap_used or {}).get(capped, 0)
        yield f"{sub_meter(meter, capped)} {cap} {cap_used} 0 0 0 {balance.cadence}"


def _line_in_wallet(account: Account, meter: str, wallet: str) -> str:
    """Return the line of a wallet, or of a meter that draws on it: no buckets of its own pay for that."""
    own, price, bounds = account.balances[meter], ITSELF, ""
    line = f"{meter} 0 0 0 0 {'1' if own.spill else '0'} {own.cadence}"
    carried = own.carried
    if meter == wallet:
        limit, carried = own.limit(account.status), 0
        buckets = f"{'-' if limit is None else limit} {own.used} {own.rollover} {own.purchased}"
        line = f"{meter} {buckets} {'1' if own.spill else '0'} {kind_of_limit(own, limit)}"
        bounds = _bounds(account, own)
    else:
        price = account.draws[meter].price
    whole, part = divmod(price_in_millionths(price), MILLIONTHS)
    return f"{line}{bounds or ' -'} {wallet} {whole} {part} {carried}"


def _bounds(account: Account, balance: Balance) -> str:
    if balance.limits is None and account.pay_from is None:
        return ""
    return f" {bounds_text(() if balance.limits is None else balance.limits.standings(), account.pay_from)}"


def unknown_account_text(epoch: int) -> str:
    """Return the text cached for a user without an account: version 0, so that any real balance replaces it."""
    return f"{epoch} 0\n?"


# To make one costs more than the rest of a life.
_hours = lru_cache(maxsize=16)(lambda hours: timedelta(hours=hours))
_MILLISECOND = timedelta(milliseconds=1)


class CacheLife(NamedTuple):
    """Milliseconds from the read on: a cached balance is fresh at first, and stale then until it is kept no longer."""

    fresh_ms: int
    kept_ms: int


def cache_life(account: Account, now: datetime, settings: Settings) -> CacheLife:
    """Return the life of a cached balance. After its next boundary or change it is not kept, whatever the settings say.

    At a boundary an account may lose what it had, and what it gets is not known.
    """
    fresh_ms = settings.cache_ttl_ms
    longest_ms = max(fresh_ms, settings.ledger_down_balance_max_age_seconds * 1_000)
    next_change = min(changes_after(account, now, _hours(settings.renewal_grace_hours)), default=None)
    left_ms = longest_ms if next_change is None else (next_change - now) // _MILLISECOND
    kept_ms = max(1, min(longest_ms, left_ms))
    return CacheLife(min(fresh_ms, kept_ms), kept_ms)


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
