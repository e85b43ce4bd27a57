"""Open holds, as operators see them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple, cast

from worker.keyspace import keys
from worker.resources import Resources
from worker.rules.account import is_sub_meter


class OpenHold(NamedTuple):
    """An open hold, as Redis has it. Amounts in units."""

    user_id: str
    meter: str
    key: str
    amount: int
    left: int
    expires_at: datetime


def open_holds(resources: Resources, user_id: str | None = None, limit: int = 100) -> list[OpenHold]:
    """List open holds of one user or of all, at most `limit`.

    Within a meter, the next to expire comes first.
    """
    found: list[OpenHold] = []
    partitions = resources.settings.partitions
    for partition in keys.partitions_of(partitions) if user_id is None else [keys.partition_of(user_id, partitions)]:
        for raw in cast("list[bytes]", resources.redis.zrange(partition.expiries, 0, -1)):
            owner, meter = keys.owner_of_expiring(raw.decode())
            if user_id in (None, owner) and not is_sub_meter(meter) and len(found) < limit:
                found.extend(_holds_of(resources, partition.account(owner), meter, limit - len(found)))
    return found


def find_hold(resources: Resources, user_id: str, key: str) -> dict[str, str | int]:
    """Return every field that Redis has of a hold, units and times in ms as numbers; empty if it has none."""
    account = keys.account_of(user_id, resources.settings.partitions)
    record = cast("dict[bytes, bytes]", resources.redis.hgetall(account.hold(key)))
    return {name: int(value) if _is_number(name) else value.decode() for name, value in _decoded(record)}


def _decoded(record: dict[bytes, bytes]) -> Iterator[tuple[str, bytes]]:
    return ((name.decode(), value) for name, value in record.items())


def _is_number(field: str) -> bool:
    """Keys and ids may consist of digits, and stay texts."""
    return field in {"amount", "expires_ms", "settled"} or field.startswith("captured:")


def _holds_of(resources: Resources, account: keys.AccountKeys, meter: str, limit: int) -> list[OpenHold]:
    client = resources.redis
    found = []
    scored = client.zrange(account.holds(meter), 0, limit - 1, withscores=True)
    for raw, score in cast("list[tuple[bytes, float]]", scored):
        key = raw.decode()
        amount = client.hget(account.hold(key), "amount")
        left = client.hget(account.pending(meter), f"h:{key}")
        expires_at = datetime.fromtimestamp(score / 1_000, UTC)
        found.append(OpenHold(account.user_id, meter, key, int(amount or 0), int(left or 0), expires_at))
    return found
