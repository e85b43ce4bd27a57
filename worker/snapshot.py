"""Values that travel between the ledger, the rules and Redis: an account and its balances at one version."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from worker.waterfall import Buckets, limit_in_force


class Balance(NamedTuple):
    """One meter of an account: the open period with the allowance in force, and what is in the buckets."""

    meter: str
    allowance: int | None
    spill: bool
    rollover_cap: int
    cadence: str
    anchor: str
    anchored_at: datetime
    period_index: int
    period_start: datetime
    period_end: datetime | None
    used: int
    rollover: int
    purchased: int

    def after(self, used: int, rollover: int, purchased: int) -> Balance:
        """The same period with other contents. Faster than `_replace`: a batch does this once an account and meter."""
        return Balance(*self[:10], used, rollover, purchased)

    def buckets(self, status: str) -> Buckets:
        """What the waterfall sees while the account has `status`."""
        return Buckets(limit_in_force(self.allowance, status), self.used, self.rollover, self.purchased, self.spill)


class Account(NamedTuple):
    """An account at `version`, its sequence number of changes. `balances` by meter."""

    user_id: str
    plan: str
    status: str
    trust: str
    version: int
    balances: Mapping[str, Balance]


def cache_text(epoch: int, account: Account) -> str:
    """The balance as Redis keeps it: "epoch version", then a line per meter: limit used rollover purchased spill.

    `-` is an unlimited limit. The Lua in worker/lua/common.lua, `read_balance`, is the reader.
    """
    lines = [f"{epoch} {account.version}"]
    for meter, balance in account.balances.items():
        limit, used, rollover, purchased, spill = balance.buckets(account.status)
        lines.append(f"{meter} {'-' if limit is None else limit} {used} {rollover} {purchased} {int(spill)}")
    return "\n".join(lines)


def unknown_account_text(epoch: int) -> str:
    """What is cached for a user whom nobody opened: version 0, so that the first real balance replaces it."""
    return f"{epoch} 0\n?"


def cache_ttl_ms(account: Account, now: datetime, longest_ms: int) -> int:
    """How long a cached balance may live: until the next boundary of a period, at most `longest_ms`, at least 1."""
    ends = [balance.period_end for balance in account.balances.values() if balance.period_end is not None]
    due = [int((end - now).total_seconds() * 1_000) for end in ends if end > now]
    return max(1, min([longest_ms, *due]))
