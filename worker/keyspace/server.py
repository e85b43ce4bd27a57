"""Facts about the Redis server that endanger what it keeps, read once at a dyno's start and by `status`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import redis

# The oldest release of each whose commands and scripts we use.
OLDEST = {"redis": (7, 0), "valkey": (7, 2)}
# From this part of its memory on, a server is nearly full.
NEARLY_FULL_PERCENT = 90
# Where everything is lost with the process, or some of it without a word.
SAFE_POLICY = "noeviction"


class ServerFacts(NamedTuple):
    """What a Redis or Valkey says about itself; None: it may not say, or does not know.

    `product` is `redis` or `valkey`. `maxmemory_bytes` is 0 if memory is not bounded. `evicted_keys` counts since its
    start. `run_id` names the process: it changes with every restart.
    """

    product: str | None
    version: tuple[int, ...] | None
    role: str | None
    run_id: str | None
    uptime_seconds: int | None
    used_memory_bytes: int | None
    maxmemory_bytes: int | None
    maxmemory_policy: str | None
    evicted_keys: int | None
    has_aof: bool | None
    connected_replicas: int | None

    @property
    def version_text(self) -> str:
        """Return product and version for people."""
        version = ".".join(map(str, self.version)) if self.version else "of an unknown version"
        return f"{(self.product or 'Redis').capitalize()} {version}"

    @property
    def memory_percent(self) -> int | None:
        """Return how full the memory is, None if that is unknown or has no bound."""
        if not self.maxmemory_bytes or self.used_memory_bytes is None:
            return None
        return 100 * self.used_memory_bytes // self.maxmemory_bytes

    def dangers(self) -> list[str]:
        """Return what endangers events and holds, one sentence each with its remedy. What is unknown is no danger."""
        found = []
        oldest = OLDEST.get(self.product or "")
        if oldest is not None and self.version is not None and self.version < oldest:
            found.append(f"{self.version_text} is too old: {self.product} {'.'.join(map(str, oldest))} is the oldest")
        if self.role is not None and self.role not in ("master", "primary"):
            found.append("this Redis is a replica: REDIS_URL must name the primary")
        if self.maxmemory_policy is not None and self.maxmemory_policy != SAFE_POLICY:
            found.append(
                f"maxmemory-policy is {self.maxmemory_policy}: a full Redis would throw events and holds away; "
                f"set {SAFE_POLICY}"
            )
        if self.evicted_keys:
            found.append(f"{self.evicted_keys:,} keys were evicted since its start; `meterfall verify` names losses")
        if self.has_aof is False:
            found.append("no append-only file: a restart loses unread events and holds; set appendonly yes")
        percent = self.memory_percent
        if percent is not None and percent >= NEARLY_FULL_PERCENT:
            found.append(f"memory is {percent} % full: a full Redis refuses events; raise maxmemory")
        return found

    def unknown(self) -> list[str]:
        """Return the facts that the server did not tell; its role may not ask, or a platform hides them."""
        shown = {
            "version": self.version,
            "maxmemory_policy": self.maxmemory_policy,
            "has_aof": self.has_aof,
            "used_memory_bytes": self.used_memory_bytes,
        }
        return [name for name, value in shown.items() if value is None]


def read_server(client: redis.Redis) -> ServerFacts:
    """Ask a server about itself, by INFO alone: CONFIG is not needed.

    A role without the right to ask gets unknown facts. Raises the errors of a Redis that does not answer.
    """
    try:
        said = cast("Mapping[str, Any]", client.info())
    except redis.ResponseError as error:
        if isinstance(error, redis.BusyLoadingError | redis.ReadOnlyError):
            raise
        said = {}
    is_valkey = "valkey_version" in said or said.get("server_name") == "valkey"
    version = said.get("valkey_version") if is_valkey else said.get("redis_version")
    aof = said.get("aof_enabled")
    return ServerFacts(
        product=None if not said else "valkey" if is_valkey else "redis",
        version=tuple(map(int, re.findall(r"\d+", str(version))[:3])) or None if version is not None else None,
        role=said.get("role"),
        run_id=said.get("run_id"),
        uptime_seconds=_number(said.get("uptime_in_seconds")),
        used_memory_bytes=_number(said.get("used_memory")),
        maxmemory_bytes=_number(said.get("maxmemory")),
        maxmemory_policy=said.get("maxmemory_policy"),
        evicted_keys=_number(said.get("evicted_keys")),
        has_aof=None if aof is None else bool(int(aof)),
        connected_replicas=_number(said.get("connected_slaves", said.get("connected_replicas"))),
    )


def _number(value: Any) -> int | None:
    return None if value is None else int(value)
