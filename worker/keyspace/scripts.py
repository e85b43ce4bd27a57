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
from redis.exceptions import NoScriptError

_FOLDER = Path(__file__).with_name("lua")
# Under memory pressure Redis refuses a whole script before its first write. What frees memory, or must be done before
# it can be freed, may still run.
_FREES_MEMORY = frozenset(
    {
        "anew",
        "check",
        "close",
        "done",
        "expire",
        "extent",
        "free",
        "hand",
        "look",
        "publish",
        "recent",
        "recount",
        "release",
        "reuse",
        "settled",
        "shed",
        "sponsor_release",
        "trim",
    }
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


def run(client: redis.Redis, request: Call) -> Any:
    """Run one call and return Redis' reply. Safe to repeat, as every script is."""
    _, text, sha = request.script
    try:
        return client.evalsha(sha, len(request.keys), *request.keys, *request.args)
    except NoScriptError:
        return client.eval(text, len(request.keys), *request.keys, *request.args)


def run_all(client: redis.Redis, requests: Sequence[Call]) -> list[Any]:
    """Run calls in one pipeline, without a transaction around them; returns the replies in order.

    If Redis has forgotten a script, all calls run again, one by one: so it may forget them once more meanwhile.
    """
    if not requests:
        return []
    try:
        with client.pipeline(transaction=False) as pipe:
            for request in requests:
                pipe.evalsha(request.script.sha, len(request.keys), *request.keys, *request.args)
            return pipe.execute()
    except NoScriptError:
        for text in dict.fromkeys(request.script.text for request in requests):
            client.script_load(text)
        return [run(client, request) for request in requests]
