"""The Lua scripts and how they are called: one `Call` is one script, its keys and its arguments.

A call says what is to be done; who does it, and whether by waiting or by awaiting, is the caller's business. Each
script's head lists its keys, arguments and answers. Scripts are addressed by the hash of their text, so a new release
runs its own beside an old one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

from config.settings import Settings

_FOLDER = Path(__file__).with_name("lua")
# Under memory pressure Redis refuses a whole script before its first write. What frees memory, or must be done before
# it can be freed, may still run.
_FREES_MEMORY = frozenset(
    {"check", "close", "done", "expire", "extent", "hand", "publish", "recent", "release", "sponsor_release"}
)


class Script(NamedTuple):
    """Text of one script and the hash Redis knows it by."""

    name: str
    text: str
    sha: str


class Call(NamedTuple):
    """One script with its keys and arguments."""

    script: Script
    keys: Sequence[str]
    args: Sequence[str | int | bytes]


@cache
def script(name: str) -> Script:
    """The script `lua/<name>.lua`, with the shared functions in front: those of all, and those of the pool."""
    flags = " flags=allow-oom" if name in _FREES_MEMORY else ""
    parts = ["common", "sponsor", name] if name.startswith("sponsor_") else ["common", name]
    text = "\n".join([f"#!lua{flags}", *((_FOLDER / f"{part}.lua").read_text(encoding="utf-8") for part in parts)])
    return Script(name, text, sha1(text.encode(), usedforsecurity=False).hexdigest())


def call(name: str, keys: Sequence[str], args: Sequence[str | int | bytes]) -> Call:
    """A call of the script `name`."""
    return Call(script(name), keys, args)


def retries(settings: Settings, retry: type[Retry] | type[AsyncRetry] = Retry) -> Any:
    """How often and how soon a client repeats a lost command: redis-py's ten times would take seconds to notice."""
    return retry(ExponentialBackoff(cap=0.2, base=0.02), settings.redis_retries)


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
        # Redis 7.0 does not know the command for the library's name; where it is known, no role may use it.
        "driver_info": None,
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


def run(client: redis.Redis, request: Call) -> Any:
    """Run one call and return Redis' reply. Safe to repeat, as every script is."""
    _, text, sha = request.script
    try:
        return client.evalsha(sha, len(request.keys), *request.keys, *request.args)
    except NoScriptError:
        return client.eval(text, len(request.keys), *request.keys, *request.args)


def run_all(client: redis.Redis, requests: Sequence[Call]) -> list[Any]:
    """Run calls in one pipeline, without a transaction around them; returns the replies in order."""
    if not requests:
        return []
    try:
        return _pipelined(client, requests)
    except NoScriptError:
        for request in requests:
            client.script_load(request.script.text)
        return _pipelined(client, requests)


def _pipelined(client: redis.Redis, requests: Sequence[Call]) -> list[Any]:
    with client.pipeline(transaction=False) as pipe:
        for request in requests:
            pipe.evalsha(request.script.sha, len(request.keys), *request.keys, *request.args)
        return pipe.execute()
