"""Proof of the sponsorship pool: replay every grant and credit, and compare with the pool and with Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import redis
from sqlalchemy import Engine

from worker.keyspace.cache import pool_text
from worker.keyspace.keys import SPONSORSHIP, TODAY_PATTERN, user_of_today
from worker.ledger import sponsorship
from worker.ledger.connection import batch_connection, begin_snapshot
from worker.ledger.sponsorship import PoolRow
from worker.resources import Resources
from worker.rules.sponsorship import CreditRow, GrantRow, absorbed_of, credit_of, hash_of


def verify_pool(resources: Resources, engine: Engine, named: Callable[[str], str], differences: list[str]) -> int:
    """Prove the pool's balance, and that no user got more than a daily budget.

    The pool is its initial units plus credits less grants. Reads only, in one snapshot; `named` makes the name of a
    user for the differences.
    Returns the number of changes replayed.
    Raises the errors of Postgres and Redis.
    """
    with batch_connection(engine) as postgres:
        begin_snapshot(postgres)
        stored = sponsorship.read_pool_row(postgres)
        made = PoolRow(stored.initial, stored.initial, 0, stored.opened_at) if stored else None
        for row in sponsorship.read_journal(postgres):
            if made is None:
                differences.append("pool: there are grants or credits, but no pool")
                return 0
            differences.extend(f"pool seq {row.seq}: {wrong}" for wrong in _wrong_in(row, made))
            made = made._replace(balance=made.balance + _change_of(row), seq=row.seq)
        if stored != made:
            differences.append(f"pool: has {stored}, its grants and credits make it {made}")
        for user_id, start, absorbed, budget in sponsorship.overdrawn_windows(postgres):
            differences.append(
                f"pool: absorbed {absorbed} of {named(user_id)} in the day from {start}, the budget was {budget}"
            )
        current = sponsorship.read_pool(postgres)
    if current is not None:
        cached = cast("bytes | None", resources.redis.get(SPONSORSHIP.pool))
        by_ledger = pool_text(current)
        # Redis may lag, but at the same version it must show the same balance.
        if cached is not None and _version(cached.decode()) == _version(by_ledger) and cached.decode() != by_ledger:
            differences.append(f"pool: Redis says {cached.decode()!r}, the ledger {by_ledger!r}")
    return made.seq if made else 0


def verify_promises(resources: Resources, engine: Engine, named: Callable[[str], str], differences: list[str]) -> int:
    """Prove that totals equal their maps, and that no old grant is still promised.

    `named` makes the name of a user for the differences. Returns the number of maps proved.
    """
    maps = 0
    for key in _maps_of_the_pool(resources.redis):
        fields = cast("dict[bytes, bytes]", resources.redis.hgetall(key))
        if not fields:
            continue
        maps += 1
        fields.pop(b"start", None)
        total, ids_sum = totals_of(fields)
        if total != ids_sum:
            whose = key if key == SPONSORSHIP.promised else SPONSORSHIP.today(named(user_of_today(key)))
            differences.append(f"pool: {whose} has total {total}, its ids sum to {ids_sum}")
        requests = {hash_of(name[2:].decode()): name[2:].decode() for name in fields if name.startswith(b"g:")}
        # While stream entries wait, one of them may be a repeat that no worker has recognised yet.
        if requests and not resources.redis.xlen(SPONSORSHIP.entries):
            with batch_connection(engine) as postgres:
                seconds = resources.settings.pending_alarm_seconds
                applied = sponsorship.applied_grants(postgres, list(requests), seconds)
            differences.extend(f"pool: {requests[digest]} is applied and still promised" for digest in applied)
    return maps


def totals_of(fields: dict[bytes, bytes]) -> tuple[int, int]:
    """Take the total out of a pending map; return it and the sum of the ids.

    Both are in units.
    """
    return int(fields.pop(b"total", b"0")), sum(map(int, fields.values()))


def _maps_of_the_pool(client: redis.Redis) -> Iterator[str]:
    yield SPONSORSHIP.promised
    for raw_key in client.scan_iter(match=TODAY_PATTERN, count=1_000):
        yield raw_key.decode()


def _wrong_in(row: GrantRow | CreditRow, before: PoolRow) -> Iterator[str]:
    """Yield each way in which a row breaks the rules after `before`."""
    if row.seq != before.seq + 1:
        yield f"expected seq {before.seq + 1}"
    units = before.balance + _change_of(row)
    if row.pool_after != units or units < 0:
        yield f"says {row.pool_after} after it, replayed {units}"
    if isinstance(row, GrantRow) and row.absorbed > absorbed_of(row.held, row.actual, row.paid):
        yield f"absorbed {row.absorbed} of held {row.held}, actual {row.actual}, paid {row.paid}"
    if isinstance(row, CreditRow) and row.credited != credit_of(row.paid, row.percent):
        yield f"credited {row.credited}, not {row.percent} % of {row.paid}"


def _change_of(row: GrantRow | CreditRow) -> int:
    return -row.absorbed if isinstance(row, GrantRow) else row.credited


def _version(text: str) -> str:
    return text.split("\n", 1)[0]
