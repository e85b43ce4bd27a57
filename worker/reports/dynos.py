"""The heartbeats of all processes, in one hash: who lives, of which release, and what it does now."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import redis
from pydantic import ValidationError

from schemas.status import Dyno
from worker.keyspace import keys
from worker.keyspace.connection import redis_now_ms

# A process that was not seen for so long is taken for dead, and is forgotten later.
ALIVE = timedelta(seconds=15)
FORGOTTEN = timedelta(hours=1)


def clock(client: redis.Redis) -> datetime:
    """Return the time of Redis. Raises the errors of Redis."""
    return datetime.fromtimestamp(redis_now_ms(client) / 1_000, UTC)


def name_of(dyno: Dyno) -> str:
    """Return the field of a process in the hash."""
    return f"{dyno.host}:{dyno.pid}:{dyno.role}"


def read_dynos(client: redis.Redis) -> list[Dyno]:
    """Return the processes that live, by host and pid. Raises the errors of Redis."""
    now = clock(client)
    living = [dyno for _, dyno in heartbeats(client) if dyno is not None and now - dyno.seen_at <= ALIVE]
    return sorted(living, key=lambda dyno: (dyno.host, dyno.pid))


def heartbeats(client: redis.Redis) -> Iterator[tuple[bytes | str, Dyno | None]]:
    """Yield the name and the heartbeat of each process; None if it has another form. Raises the errors of Redis."""
    for name, raw in client.hgetall(keys.DYNOS).items():
        try:
            yield name, Dyno.model_validate_json(raw)
        except ValidationError:
            yield name, None
