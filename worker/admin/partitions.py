"""Partitions: change their number, pause them, resume them.

With another number all events and holds of a user belong to another stream, so nothing may be under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import redis

from config.settings import MAX_PARTITIONS
from worker.crash import crash_point
from worker.errors import BadInput
from worker.keyspace import calls, keys, scripts
from worker.keyspace.entries import LAST_ID, owner_of
from worker.keyspace.keys import Partition, Stream, partition_of, partitions_of, stream_of
from worker.ledger import notices, partitions
from worker.ledger.connection import batch_connection
from worker.ledger.partitions import Pause, change_partitions, read_partitions, try_lock_partition
from worker.resources import Resources
from worker.rules.notices import paused
from worker.rules.words import counted

_MOVED_AT_ONCE = 100


class RepartitionError(BadInput):
    """The number of partitions cannot change now; the message names the obstacle."""


def repartition(resources: Resources, partitions: int) -> int:
    """Write a new number of partitions to ledger and Redis; return the old one.

    Stop producers and workers before: a running process goes on with the old number. Streams must be drained and
    nothing may be pending, since no worker looks at the old streams any more. Cached balances are dropped. Takes every
    partition's lock, so that no drain is under way. Repeating is harmless; if killed after the COMMIT, a repeat
    writes the rest to Redis.
    Raises RepartitionError, LedgerError, and the errors of Postgres and Redis.
    """
    if not 1 <= partitions <= MAX_PARTITIONS:
        raise RepartitionError(f"partitions: must be from 1 to {MAX_PARTITIONS} (got {partitions})")
    with batch_connection(resources.engine) as postgres:
        before = read_partitions(postgres) or partitions
        in_redis = int(resources.redis.get(keys.PARTITION_COUNT) or before)
        concerned = partitions_of(max(before, in_redis, partitions))
        for partition in concerned:
            turn = try_lock_partition(postgres, partition.number)
            if not turn.is_ours:
                raise RepartitionError(f"partition {partition.name}: a worker is draining it; stop all workers first")
            if turn.is_paused:
                raise RepartitionError(
                    f"partition {partition.name}: is paused; resume it first, `meterfall partition list`"
                )
        _require_nothing_under_way(resources, concerned)
        change_partitions(postgres, partitions)
        postgres.commit()
    crash_point("after_commit")
    resources.redis.set(keys.PARTITION_COUNT, partitions)
    for key in resources.redis.scan_iter(match=keys.BALANCE_PATTERN, count=1_000):
        resources.redis.delete(key)
    return before


def move_stranded(resources: Resources, partition: Partition) -> int:
    """Move the stream entries of a stream without a drain to the right streams; count them.

    The stream lies beyond the number of partitions. An event without a time counts as of now; an entry without a user
    becomes a dead letter of the first partition. The move ends by deleting the Redis keys of the old partition, with
    pending ids and holds: no worker looks at them any more. If it is killed before that, a repeat moves the entries
    again; they are duplicates.
    Raises RepartitionError for a stream that workers drain.
    """
    partitions, client = resources.settings.partitions, resources.redis
    if partition.number < partitions:
        raise RepartitionError(f"partition {partition.name}: is one of the {partitions} that workers drain")
    stranded, moved, last_id = partition.entries, 0, "0-0"
    while True:
        entries = _entries_after(client, stranded, last_id)
        if entries:
            _append_elsewhere(resources, entries)
            crash_point("after_moving")
            moved, last_id = moved + len(entries), entries[-1][0].decode("ascii")
        elif scripts.run(client, calls.forget(partition, last_id)):
            break
    for key in client.scan_iter(match=partition.pattern, count=1_000):
        if key != stranded.encode():  # it may have begun anew
            client.delete(key)
    return moved


def _entries_after(client: redis.Redis, stream: str, last_id: str) -> list[tuple[bytes, list[bytes]]]:
    if last_id == LAST_ID:
        return []
    return cast("list[tuple[bytes, list[bytes]]]", client.xrange(stream, f"({last_id}", count=_MOVED_AT_ONCE))


def _append_elsewhere(resources: Resources, entries: Sequence[tuple[bytes, list[bytes]]]) -> None:
    targets = set()
    with resources.redis.pipeline(transaction=False) as pipe:
        for _, flat in entries:
            # Without its mark: the event is not pending in its new partition.
            fields = {name: value for name, value in zip(flat[0::2], flat[1::2], strict=True) if name != b"m"}
            target = _partition_of_entry(fields, resources.settings.partitions)
            targets.add(target)
            pipe.xadd(target.entries, cast("dict[Any, Any]", fields))
        pipe.execute()
    for target in targets:
        resources.ring(target)


def _partition_of_entry(fields: dict[bytes, bytes], partitions: int) -> Partition:
    owner = owner_of(fields.get(b"e", b""))
    user_id = owner[0] if owner else fields.get(b"r", b"").decode("utf-8", "replace")
    return partition_of(user_id, partitions) if user_id else Partition(0)


def _require_nothing_under_way(resources: Resources, partitions: Sequence[Partition]) -> None:
    for partition in partitions:
        if backlog := resources.redis.xlen(partition.entries):
            raise RepartitionError(
                f"partition {partition.name}: {counted(backlog, 'stream entry')} in it; let workers drain it"
            )
    for raw_key in resources.redis.scan_iter(match=keys.PENDING_PATTERN, count=1_000):
        user_id, meter = keys.owner_of_pending(raw_key.decode())
        ids = cast("dict[bytes, bytes]", resources.redis.hgetall(raw_key))
        if holds := sum(each.startswith(b"h:") for each in ids):
            raise RepartitionError(
                f"{user_id}: {counted(holds, 'hold')} pending on {meter}; wait until holds have expired, "
                "or give them back with `meterfall holds release`"
            )
        # No stream has an entry, as we have just seen.
        if events := sum(each.startswith(b"e:") for each in ids):
            raise RepartitionError(
                f"{user_id}: {counted(events, 'event')} pending on {meter} without a stream entry: `meterfall verify` "
                "names what is lost, `meterfall pending reconcile` frees it"
            )


MARK_MS = 10_000


NO_ENTRY = "0-0"


def pause(resources: Resources, stream: Stream, by: str, reason: str) -> Pause:
    """Pause a partition from its next batch on; return the pause in force.

    That may be an older one. Safe to repeat. Killed before its COMMIT, nothing happened.
    Raises BadInput without a name or a reason.
    """
    _require_text("by", by)
    _require_text("reason", reason)
    with batch_connection(resources.engine) as postgres:
        while (found := partitions.pause_in_force(postgres, stream.number)) is None:
            partitions.insert_pause(postgres, stream.number, by, reason)
        notices.store(postgres, [paused(stream.name, found.paused_by, found.reason, found.paused_at)])
        postgres.commit()
    mark(resources, stream)
    return found


def _require_text(field: str, value: str) -> None:
    if not value.strip():
        raise BadInput(f"{field}: missing; the next operator wants to know")


def resume(resources: Resources, stream: Stream, by: str) -> Pause | None:
    """Resume a partition; return the pause that is over, None if there was none.

    Stream entries of this moment cause no other pause: the unreadable ones become dead letters. Safe to repeat, also
    after a kill.
    Raises BadInput without a name.
    """
    _require_text("by", by)
    with batch_connection(resources.engine) as postgres:
        found = partitions.pause_in_force(postgres, stream.number, for_update=True)
        if found is not None:
            partitions.end_pause(postgres, stream.number, by, _last_entry(resources, stream))
            postgres.commit()
    resources.redis.delete(stream.paused, stream.recent, stream.rung)
    resources.ring(stream)
    return found


def latest(resources: Resources) -> dict[Stream, Pause]:
    """Return the last pause of each partition, whether or not it is over."""
    with batch_connection(resources.engine) as postgres:
        return {stream_of(pause.partition): pause for pause in partitions.latest_pauses(postgres)}


def mark(resources: Resources, stream: Stream) -> None:
    """Mark a partition as paused for a while, so that others need not ask Postgres."""
    resources.redis.set(stream.paused, "1", px=MARK_MS)


def _last_entry(resources: Resources, stream: Stream) -> str:
    """Return the id of the last stream entry that a stream ever had."""
    if not resources.redis.exists(stream.entries):
        return NO_ENTRY
    info = resources.redis.xinfo_stream(stream.entries)
    return str(info["last-generated-id"].decode())
