"""The sponsorship pool on a test's servers: opened at will, drained, looked at, and moved in time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import rows
from worker.admin import accounts
from worker.consumer import jobs
from worker.consumer.drain import drain_stream
from worker.keyspace import keys
from worker.resources import Resources

DAY_MS = 24 * 60 * 60 * 1_000


@contextmanager
def past_the_triggers(settings: Settings) -> Iterator[psycopg.Connection]:
    """A connection that may do to the books what nobody else may."""
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        yield connection


def open_pool(settings: Settings, units: int) -> None:
    """The pool starts with so many units, whatever the catalogue says."""
    with past_the_triggers(settings) as postgres:
        postgres.execute("DELETE FROM sponsor_pool")
        postgres.execute(
            "INSERT INTO sponsor_pool (initial, balance, opened_at) VALUES (%s, %s, now())", (units, units)
        )


def open_accounts(resources: Resources, trust: str, *users: str) -> None:
    """Accounts in one trust tier, which the pool knows of."""
    accounts.open_many(resources, users, "tenant")
    for user in users:
        accounts.set_trust(resources, user, trust)
    drain_pool(resources)


def drain_pool(resources: Resources) -> int:
    """Drain the pool's stream until it is empty; returns the number of entries."""
    return drain_stream(resources, keys.SPONSORSHIP).entries


def sweep(resources: Resources) -> None:
    """What the job does that takes expired holds out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "resources", lambda: resources)
        jobs.expire_holds(keys.SPONSORSHIP.number)


def map_of(redis: Redis, name: str) -> dict[str, int]:
    """A pending map as it is stored."""
    stored: Any = redis.hgetall(name)
    return {field.decode(): int(units) for field, units in stored.items()}


def members(redis: Redis, name: str) -> set[str]:
    """What is in a sorted set."""
    stored: Any = redis.zrange(name, 0, -1)
    return {member.decode() for member in stored}


def promised(redis: Redis) -> dict[str, int]:
    """What the pool has promised, without the total, which must be the sum."""
    found = map_of(redis, keys.SPONSORSHIP.promised)
    assert found.pop("total", 0) == sum(found.values())
    return found


def today_of(redis: Redis, user: str) -> dict[str, int]:
    """A user's window, without its start and the total, which must be the sum."""
    found = map_of(redis, keys.SPONSORSHIP.today(user))
    found.pop("start", None)
    assert found.pop("total", 0) == sum(found.values())
    return found


def pool_row(settings: Settings) -> tuple[Any, ...]:
    """Initial units, balance, seq."""
    (found,) = rows(settings, "SELECT initial, balance, seq FROM sponsor_pool")
    return found


def expire(redis: Redis, user: str, request: str) -> None:
    """Let a hold's time be over, as if it had been waited for."""
    assert redis.hset(keys.SPONSORSHIP.hold(request), "expires_ms", 1) == 0
    for holds in (keys.SPONSORSHIP.holds, keys.SPONSORSHIP.user_holds(user)):
        redis.zadd(holds, {request: 1}, xx=True)
    due = {keys.SPONSORSHIP.expiring(): 1, keys.SPONSORSHIP.expiring(user): 1}
    redis.zadd(keys.SPONSORSHIP.expiries, due, xx=True)


def let_a_day_pass(settings: Settings, redis: Redis, *users: str) -> None:
    """Every window began a day earlier than it did. Only after a drain: entries in the stream cannot be changed."""
    assert redis.xlen(keys.SPONSORSHIP.entries) == 0
    for user in users:
        if redis.exists(keys.SPONSORSHIP.today(user)):
            redis.hincrby(keys.SPONSORSHIP.today(user), "start", -DAY_MS)
        redis.delete(keys.SPONSORSHIP.standing(user))
    for name in redis.scan_iter("mf:{sponsor}:hold:*", count=1_000):
        if redis.hexists(name, "window"):
            redis.hincrby(name, "window", -DAY_MS)
    with past_the_triggers(settings) as postgres:
        postgres.execute("UPDATE sponsor_grant SET window_start = window_start - interval '1 day'")


class Everybody:
    """A host that puts everybody into one tier."""

    def __init__(self, tier: str) -> None:
        self.tier = tier

    def tier_of(self, user_id: str) -> str | None:
        """The same for all."""
        return self.tier if user_id else None
