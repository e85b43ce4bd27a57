"""Connections to Redis: their time-outs and retries, and its clock."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from config.settings import Settings


def retries(settings: Settings, retry: type[Retry] | type[AsyncRetry] = Retry) -> Any:
    """How often and how soon a client repeats a lost command: redis-py's ten times would take seconds to notice."""
    return retry(ExponentialBackoff(cap=0.2, base=0.02), settings.redis_retries)


# Redis 7.0 does not know the command for the library's name; where it is known, no role may use it. Newer releases of
# redis-py have one option for it, and warn of the two before.
_UNNAMED_LIBRARY = {"driver_info": None} if hasattr(redis, "DriverInfo") else {"lib_name": None, "lib_version": None}


def _options(settings: Settings, retry: type[Retry] | type[AsyncRetry]) -> dict[str, Any]:
    """Options of every client of the money path: bounded waits, few and short retries, replies as bytes."""
    timeout = settings.redis_socket_timeout_ms / 1_000
    return {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": retries(settings, retry),
        # A primary that became a replica keeps its connections: whoever connects anew may find its successor.
        "retry_on_error": [redis.exceptions.ReadOnlyError],
        "protocol": 2,
        # An answer is read before the first command: redis-py takes what TLS 1.3 sends after its handshake for one.
        "client_name": "meterfall",
        **_UNNAMED_LIBRARY,
    }


def connect(settings: Settings) -> redis.Redis:
    """A client for the money path. RQ gets another one: it changes the time-outs of the pool it is given.

    XRANGE replies stay as they come, (id, flat fields): a dictionary per entry is a third of the cost of reading.
    """
    client = redis.Redis.from_url(settings.redis_url, **_options(settings, Retry))
    client.set_response_callback("XRANGE", lambda reply, **_: reply)
    return client


def connect_async(settings: Settings) -> redis.asyncio.Redis:
    """The same for asyncio."""
    return redis.asyncio.Redis.from_url(settings.redis_url, **_options(settings, AsyncRetry))


def redis_now_ms(client: redis.Redis) -> int:
    """The clock of Redis, in milliseconds; holds know no other."""
    seconds, microseconds = client.time()
    return int(seconds) * 1_000 + int(microseconds) // 1_000
