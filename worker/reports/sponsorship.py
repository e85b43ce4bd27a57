"""The sponsorship pool as operators see it: its balance, its promises, its last grants."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple, cast

from worker.client.session import Context
from worker.keyspace.keys import SPONSORSHIP
from worker.ledger import sponsorship
from worker.ledger.connection import batch_connection, begin_snapshot, read_clock
from worker.resources import Resources
from worker.rules.sponsorship import DAY_MS, GrantRow


class PoolStatus(NamedTuple):
    """The pool at one moment, in units.

    `balance` is the ledger's. Requests under way hold `held`; `settled` is given away and not yet subtracted from the
    balance; `available` is the rest. `absorbed_today` is the sum of grants in the last 24 hours.
    """

    initial: int
    balance: int
    held: int
    settled: int
    available: int
    open_holds: int
    absorbed_today: int
    budgets: Mapping[str, int]
    grants: list[GrantRow]


def read_pool_status(resources: Resources, grants: int = 10) -> PoolStatus:
    """Read the pool and its newest `grants`. Reads only.

    Raises the errors of Postgres and Redis.
    """
    promised = cast("dict[bytes, bytes]", resources.redis.hgetall(SPONSORSHIP.promised))
    held = [int(units) for name, units in promised.items() if name.startswith(b"h:")]
    settled = sum(int(units) for name, units in promised.items() if name.startswith(b"g:"))
    with batch_connection(resources.engine) as postgres:
        begin_snapshot(postgres)
        since = read_clock(postgres) - timedelta(milliseconds=DAY_MS)
        row = sponsorship.read_pool_row(postgres)
        absorbed = sponsorship.absorbed_since(postgres, since)
        newest = sponsorship.last_grants(postgres, grants)
    initial = resources.catalogue.sponsorship.initial
    balance = row.balance if row else initial
    return PoolStatus(
        initial=row.initial if row else initial,
        balance=balance,
        held=sum(held),
        settled=settled,
        available=max(0, balance - sum(held) - settled),
        open_holds=len(held),
        absorbed_today=absorbed,
        budgets=Context(resources.settings, resources.catalogue).daily_budgets,
        grants=newest,
    )
