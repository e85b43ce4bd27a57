"""Changing the number of partitions: everything of a user moves to another stream, so nothing may be under way."""

from __future__ import annotations

from config.settings import MAX_PARTITIONS
from worker import keys, ledger
from worker.crash import crash_point
from worker.errors import BadInput
from worker.tools import Tools


class RepartitionError(BadInput):
    """The number of partitions cannot be changed now; the message says what is in the way."""


def repartition(tools: Tools, partitions: int) -> int:
    """Write a new number of partitions into the ledger and into Redis; returns the ledger's number before.

    Producers and workers must be stopped: whoever still runs goes on with the old number. Streams must be drained and
    nothing may be pending, since it would stay behind where nobody looks any more. What is cached is forgotten.

    Takes every partition's lock, so that no drain is under way. Repeating is harmless; killed after the COMMIT, a
    repeat writes what Redis lacks. Raises RepartitionError, LedgerError, and what Postgres and Redis raise.
    """
    if not 1 <= partitions <= MAX_PARTITIONS:
        raise RepartitionError(f"partitions: must be from 1 to {MAX_PARTITIONS} (got {partitions})")
    with ledger.batch_connection(tools.engine) as postgres:
        before = ledger.read_partitions(postgres) or partitions
        told = int(tools.redis.get(keys.PARTITION_COUNT) or before)
        concerned = range(max(before, told, partitions))
        for partition in concerned:
            turn = ledger.try_lock_partition(postgres, partition)
            if not turn.is_ours:
                raise RepartitionError(f"partition {partition}: a worker is draining it; stop all workers first")
            if turn.is_paused:
                raise RepartitionError(f"partition {partition}: is paused; resume it first, `meterfall partition list`")
        _require_nothing_under_way(tools, concerned)
        ledger.change_partitions(postgres, partitions)
        postgres.commit()
    crash_point("after_commit")
    tools.redis.set(keys.PARTITION_COUNT, partitions)
    for key in tools.redis.scan_iter(match=keys.balance_pattern(), count=1_000):
        tools.redis.delete(key)
    return before


def _require_nothing_under_way(tools: Tools, partitions: range) -> None:
    for partition in partitions:
        if backlog := tools.redis.xlen(keys.stream(partition)):
            raise RepartitionError(f"partition {partition}: {backlog} entries wait; let workers drain them first")
    for raw_key in tools.redis.scan_iter(match=keys.pending_pattern(), count=1_000):
        user_id, meter = keys.owner_of_pending(raw_key.decode())
        if count := max(0, tools.redis.hlen(raw_key) - 1):
            raise RepartitionError(
                f"{user_id}: {count} holds or events on {meter} are pending; wait until holds have expired, "
                "or give them back with `meterfall holds release`"
            )
