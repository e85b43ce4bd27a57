"""Shared by the tests of bad input: hostile payloads, their appending, and the keys of users."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from redis import Redis

from schemas.events import MAX_PAYLOAD_BYTES, Refusal
from tests.faults.house import METER, House
from tests.support.oracle import NOBODY
from tests.support.streams import account_of
from worker.keyspace.entries import owner_of
from worker.keyspace.keys import Stream

# Keys of drains and supervisors; all others belong to users.
_BOOKKEEPING = ("events", "rung", "hand", "busy", "halted", "failing", "unrolled", "recent", "pool-version", "totals")

# A stream entry of the pool as worker/keyspace/lua/sponsor_settle.lua writes it, but for the request.
GRANT = {
    "v": "1", "k": "grant", "held": "10", "actual": "10", "paid": "0", "absorbed": "10", "window": "0",
    "tier": "trusted", "budget": "200", "late": "0",
}  # fmt: skip


def payload(user_id: str, event_id: str, /, **written: str) -> bytes:
    """Return an event over one unit. `written` are members, as JSON text."""
    event = {"user_id": user_id, "event_id": event_id, "meter": METER, "quantity": 1, "multiplier": "1"}
    members = {name: json.dumps(value) for name, value in event.items()} | written
    return ("{" + ",".join(f'"{name}":{text}' for name, text in members.items()) + "}").encode()


def append(
    house: House, stream: Stream, data: bytes, reason: Refusal, *, marked: bool = False, signature: bytes | None = None
) -> None:
    """Append a payload by a plain XADD; it must end as a dead letter for `reason`.

    `marked`: as if a script of ours had counted it as pending.
    """
    fields: dict[Any, Any] = {"v": "1", "e": data}
    if marked:
        fields["m"] = "1"
    if signature is not None:
        fields["s"] = signature
    house.redis.xadd(stream.entries, fields)
    owner = owner_of(data[:MAX_PAYLOAD_BYTES])  # a dead letter keeps no more
    user_id, event_id = (owner[0], owner[2]) if owner else NOBODY
    house.accepted.dead[user_id, event_id, reason.value] += 1


def append_fields(house: House, stream: Stream, fields: Mapping[str, str | bytes], reason: Refusal) -> None:
    """Append a stream entry without an event; it must end as a dead letter for `reason`."""
    written: dict[Any, Any] = dict(fields)
    house.redis.xadd(stream.entries, written)
    house.accepted.dead[(*NOBODY, reason.value)] += 1


def count_as_pending(house: House, user_id: str, event_id: str) -> None:
    """Count an event over one unit as pending, as our scripts do when they append it."""
    name = account_of(house.settings, user_id).pending(METER)
    for field in (f"e:{event_id}", "total"):
        house.redis.hincrby(name, field, 1)


def key_space(redis: Redis) -> dict[str, Any]:
    """Return all keys of users with their content. Removes their expiry, so that a test may compare them."""
    found: dict[str, Any] = {}
    for raw in redis.scan_iter("mf:*{*", count=1_000):
        name = raw.decode()
        if name.rpartition(":")[2] not in _BOOKKEEPING and ":disposed:" not in name:
            redis.persist(name)
            found[name] = redis.dump(name)
    return found
