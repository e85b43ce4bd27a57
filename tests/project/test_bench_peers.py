"""The consumers that the bench compares with bill the same events as a worker does: same rows, same balances."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from redis import Redis

from benchmarks import batched, load, naive
from config.settings import Settings
from tests.support.ledger import execute, give_accounts, rows
from tests.support.paths import ROOT
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.keyspace import keys
from worker.resources import Resources

USERS = 12
EVENTS = 300
# All but the moment of the billing.
LOG = """
    SELECT user_id, event_id, seq, meter, quantity, multiplier, amount, from_subscription, from_rollover,
        from_purchased, overflow_to_debt, uncollected, period_start, occurred_at, clamped, source, reference_id,
        hold_key, dimensions, dimensions IS NULL, remainder, trace_id
    FROM usage_log ORDER BY user_id, seq
"""
BALANCES = """
    SELECT user_id, seq, meter, used, rollover, purchased, carried, lifetime_consumed, lifetime_granted
    FROM account JOIN balance USING (user_id) ORDER BY user_id, meter
"""
REMEMBER_THE_START = """
    DROP SCHEMA IF EXISTS start CASCADE;
    CREATE SCHEMA start;
    CREATE TABLE start.balance AS TABLE balance;
    CREATE TABLE start.account AS TABLE account;
"""
# As before the first event, so that the periods are the same.
BACK_TO_THE_START = """
    ALTER TABLE usage_log DISABLE TRIGGER USER;
    DELETE FROM usage_log;
    ALTER TABLE usage_log ENABLE TRIGGER USER;
    UPDATE balance SET used = before.used, rollover = before.rollover, purchased = before.purchased,
        carried = before.carried, lifetime_consumed = before.lifetime_consumed
    FROM start.balance AS before WHERE balance.user_id = before.user_id AND balance.meter = before.meter;
    UPDATE account SET seq = before.seq FROM start.account AS before WHERE account.user_id = before.user_id;
"""


@pytest.fixture
def payloads(settings: Settings, redis: Redis, resources: Resources) -> list[bytes]:
    """Stream entries that a worker has billed, in order; the ledger's rows are what it wrote."""
    names = load.user_names(USERS)
    start = {"ocr_tokens": (0, 3_000, 2_000), "premium_voice": (4_000, -10, 700)}
    for plan in load.PLANS:
        give_accounts(settings, load.users_of_plan(plan, names), plan, buckets=start)
    execute(settings, REMEMBER_THE_START)
    events = load.events(EVENTS, USERS, seed=1)
    events[1] = events[1].model_copy(update={"dimensions": None, "reference_id": None})
    with Billing.connect(settings) as billing:
        billing.emit_events([*events, *events[:50]])
    streams = keys.partitions_of(settings.partitions)
    entries: list[Any] = [entry for partition in streams for entry in redis.xrange(partition.entries) or ()]
    for partition in streams:
        while drain_stream(resources, partition).more:
            pass
    assert len(entries) == EVENTS + 50
    return [fields[b"e"] for _, fields in entries]


def run(peer: ModuleType, settings: Settings) -> dict[str, float]:
    """Run a consumer on its stream until that is empty; return what it tells."""
    environ = {**os.environ, "DATABASE_URL": str(settings.database_url), "REDIS_URL": settings.redis_url}
    done = subprocess.run(
        [sys.executable, "-m", peer.__name__], env=environ, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, float] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("peer", [batched, naive])
def test_a_peer_writes_the_rows_and_balances_of_a_worker(
    peer: ModuleType, payloads: list[bytes], settings: Settings, redis: Redis
) -> None:
    ours = rows(settings, LOG), rows(settings, BALANCES)
    assert len(ours[0]) == EVENTS
    assert {row[-2] for row in ours[0]} > {None}  # fractions, too
    assert any(sum(bool(part) for part in row[7:11]) > 1 for row in ours[0])
    execute(settings, BACK_TO_THE_START)

    for payload in payloads:
        redis.xadd(peer.STREAM, {"e": payload})
    told = run(peer, settings)
    assert told["events"] == len(payloads)
    assert 0 < told["cpu_seconds"] < told["seconds"]
    assert redis.xlen(peer.STREAM) == 0
    assert (rows(settings, LOG), rows(settings, BALANCES)) == ours


def test_the_batched_peer_bills_what_a_killed_run_left_once(
    payloads: list[bytes], settings: Settings, redis: Redis
) -> None:
    """All are billed, 200 were read, nobody acknowledged them."""
    ours = rows(settings, LOG), rows(settings, BALANCES)
    for payload in payloads:
        redis.xadd(batched.STREAM, {"e": payload})
    redis.xgroup_create(batched.STREAM, "bench", id="0")
    redis.xreadgroup("bench", "batched", {batched.STREAM: ">"}, count=200)
    assert run(batched, settings)["events"] == len(payloads)
    assert redis.xlen(batched.STREAM) == 0
    assert (rows(settings, LOG), rows(settings, BALANCES)) == ours
