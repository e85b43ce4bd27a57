"""Connections to Redis: their time-outs and retries, and its clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio
from redis import Connection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from config.settings import Settings, SettingsError, variable_name


def retries(settings: Settings, retry: type[Retry] | type[AsyncRetry] = Retry) -> Any:
    """Return a client's retries of a lost command: few and short, as ten of redis-py would take seconds."""
    return retry(ExponentialBackoff(cap=0.2, base=0.02), settings.redis_retries)


# Redis 7.0 lacks the command for the library's name, and on newer ones no role may use it. Newer releases of redis-py
# have one option for it, and warn of the two older ones.
_UNNAMED_LIBRARY = {"driver_info": None} if hasattr(redis, "DriverInfo") else {"lib_name": None, "lib_version": None}


def tls_options(settings: Settings) -> dict[str, Any]:
    """Return how a `rediss://` server has to prove itself, for every client. What the URL says wins."""
    if settings.redis_tls is None:
        return {}
    if settings.redis_tls == "unverified":
        return {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    return {"ssl_ca_certs": settings.redis_tls}


def _options(settings: Settings, retry: type[Retry] | type[AsyncRetry]) -> dict[str, Any]:
    """Return the options of every client of the money path: bounded waits, few and short retries, replies as bytes."""
    timeout = settings.redis_socket_timeout_ms / 1_000
    return {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": retries(settings, retry),
        # A primary that became a replica keeps its connections; a new connection may find its successor.
        "retry_on_error": [redis.exceptions.ReadOnlyError],
        "protocol": 2,
        # With a name, redis-py reads an answer before the first command: else it takes the data that TLS 1.3 sends
        # after its handshake for one.
        "client_name": "meterfall",
        **_UNNAMED_LIBRARY,
        **tls_options(settings),
    }


def connect(settings: Settings) -> redis.Redis:
    """Return a client for the money path. RQ gets another one, as it changes the time-outs of its pool.

    XRANGE replies stay raw, (id, flat fields): a dictionary per stream entry is a third of the cost of reading.
    Raises SettingsError for an option of the URL that redis-py does not know.
    """
    with _options_of_the_url():
        client = redis.Redis.from_url(settings.redis_url, **_options(settings, Retry))
        _try_options(client.connection_pool)
    client.set_response_callback("XRANGE", lambda reply, **_: reply)
    return client


def connect_queue(settings: Settings, **options: Any) -> redis.Redis:
    """Return a client for the Redis of the RQ queue; without `options` it waits as one of the money path.

    A job enqueued twice does no harm, so the client may repeat its commands. A lost connection is tried anew, a
    time-out is not: it has cost the whole wait.
    Raises SettingsError for an option of the URL that redis-py does not know.
    """
    seconds = settings.redis_socket_timeout_ms / 1_000
    retry = Retry(ExponentialBackoff(cap=0.2, base=0.02), settings.redis_retries, (redis.ConnectionError,))
    bounded = {"socket_timeout": seconds, "socket_connect_timeout": seconds, "retry": retry}
    is_own = settings.queue_redis_url is not None
    tls = tls_options(settings) if settings.queue_url.startswith("rediss://") else {}
    with _options_of_the_url("queue_redis_url" if is_own else "redis_url"):
        client = redis.Redis.from_url(
            settings.queue_url,
            retry_on_error=[redis.exceptions.ReadOnlyError],
            **bounded | options,
            **_UNNAMED_LIBRARY,
            **tls,
        )
        _try_options(client.connection_pool)
    return client


@contextmanager
def _options_of_the_url(field: str = "redis_url") -> Iterator[None]:
    """Raise SettingsError for a wrong option of the URL; redis-py raises any error, most of them at the first call."""
    try:
        yield
    except (TypeError, ValueError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        reason = f"no such option {unknown[1]!r}" if unknown else str(error)
        raise SettingsError(f"{variable_name(field)}: {reason}") from None


def _try_options(pool: redis.ConnectionPool) -> None:
    pool.connection_class(**pool.connection_kwargs)  # opens no socket


def connect_service(settings: Settings, timeout_ms: int) -> redis.Redis:
    """A client for what a service asks beside its calls. See `service_pool`."""
    return redis.Redis.from_pool(service_pool(settings, timeout_ms))


def service_pool(settings: Settings, timeout_ms: int) -> redis.ConnectionPool:
    """What makes the connections of the calls of services, which wait for a command at most `timeout_ms`.

    A lost connection is tried anew, a time-out is not: it has cost the whole wait.
    Raises SettingsError for an option of the URL that redis-py does not know.
    """
    timeout = timeout_ms / 1_000
    retry = Retry(ExponentialBackoff(cap=0.2, base=0.02), settings.redis_retries, (redis.exceptions.ConnectionError,))
    timeouts = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "retry": retry}
    with _options_of_the_url():
        pool = redis.ConnectionPool.from_url(settings.redis_url, **_options(settings, Retry) | timeouts)
        _try_options(pool)
    return pool


def lane_pool(settings: Settings) -> redis.asyncio.ConnectionPool:
    """What makes the connections of an event loop. Their time-outs and retries are those of whole batches."""
    options = _options(settings, AsyncRetry) | {"socket_timeout": None, "retry": AsyncRetry(NoBackoff(), 0)}
    return redis.asyncio.ConnectionPool.from_url(settings.redis_url, **options | {"retry_on_error": []})


def _packer() -> Callable[[tuple[Any, ...]], bytes]:
    """Return what makes the bytes of a command: hiredis where it is installed, as redis-py does."""
    try:
        from hiredis import pack_command
    except ImportError:
        pack: Callable[..., list[bytes]] = Connection(protocol=2).pack_command
        return lambda command: b"".join(pack(*command))

    def packed(command: tuple[Any, ...]) -> bytes:
        # As text: hiredis 3.5 crashes the process if a signal raises while it makes the text of a number.
        return pack_command(tuple([str(each) if type(each) is int else each for each in command]))  # type: ignore[no-any-return, arg-type, unused-ignore]

    return packed


pack_command = _packer()


def redis_now_ms(client: redis.Redis) -> int:
    """Return the clock of Redis in milliseconds; holds use no other."""
    seconds, microseconds = client.time()
    return int(seconds) * 1_000 + int(microseconds) // 1_000
