"""Streams and pending maps of users, as they lie in Redis, and the drain that empties them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from redis import Redis

from config.settings import Settings
from tests.support.resources import worker_resources
from worker.admin.partitions import latest
from worker.consumer.drain import Report, drain_stream
from worker.keyspace import keys
from worker.resources import Resources


def drain(settings: Settings, user_id: str) -> Report:
    """Drain the partition of `user_id` in this process until its stream is empty."""
    with worker_resources(settings) as resources:
        report = drain_stream(resources, partition_of(settings, user_id))
    assert not report.more
    return report


def partition_of(settings: Settings, user_id: str) -> keys.Partition:
    """Partition of a user under these settings."""
    return keys.partition_of(user_id, settings.partitions)


def account_of(settings: Settings, user_id: str) -> keys.AccountKeys:
    """The keys of an account under these settings."""
    return keys.account_of(user_id, settings.partitions)


def backlog(settings: Settings, redis: Redis) -> int:
    """Number of entries in the streams of all users."""
    return sum(redis.xlen(partition.entries) for partition in keys.partitions_of(settings.partitions))


FIRST = keys.Partition(0)


def is_paused(resources: Resources, stream: keys.Stream = FIRST) -> bool:
    """True while the stream is left alone."""
    pause = latest(resources).get(stream)
    return pause is not None and pause.resumed_at is None


def pending_of(redis: Redis, settings: Settings, user_id: str, meter: str) -> dict[str, int]:
    """The pending map of a user and meter as it is stored, `total` included."""
    stored: Any = redis.hgetall(account_of(settings, user_id).pending(meter))
    return {name.decode(): int(amount) for name, amount in stored.items()}


def stream_of(redis: Redis, settings: Settings, user_id: str) -> list[dict[bytes, bytes]]:
    """Fields of the entries in the stream of a user's partition, oldest first."""
    entries: Any = redis.xrange(partition_of(settings, user_id).entries)
    return [fields for _, fields in entries]


def recorded_ids(redis: Redis, settings: Settings, users: Iterable[str]) -> dict[str, list[str]]:
    """Ids of the events of each of these users in the order of their stream; a page at a time, as there may be many."""
    found: dict[str, list[str]] = {user: [] for user in users}
    for partition in keys.partitions_of(settings.partitions):
        start = "-"
        while entries := _page(redis, partition, start):
            for _, fields in entries:
                event = json.loads(fields[b"e"])
                found[event["user_id"]].append(event["event_id"])
            start = f"({entries[-1][0].decode()}"
    return found


def _page(redis: Redis, partition: keys.Partition, start: str) -> list[Any]:
    page: Any = redis.xrange(partition.entries, start, count=5_000)
    return list(page)


def dump(redis: Redis) -> dict[bytes, Any]:
    """Every key and its value."""
    return {name: redis.dump(name) for name in redis.scan_iter(count=1_000)}
