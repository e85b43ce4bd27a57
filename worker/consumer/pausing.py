"""Which streams are left alone, and why: an operator paused one, or half of what came in lately was no event at all.

A producer that is broken, or a forger, must not empty a stream into the dead letters: paused, its entries stay where
they are until somebody has looked. The row in Postgres is what counts; every batch reads it together with its lock. The
mark in Redis only saves others the way: it expires, and the next drain that finds the row puts it there again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from worker.consumer.refusals import UNREADABLE, counted, in_words
from worker.keyspace import keys, scripts
from worker.ledger import partitions
from worker.ledger.connection import batch_connection
from worker.ledger.partitions import Pause
from worker.resources import Tools
from worker.rules.received import Refused

# By whom a partition is paused when it was no operator.
WORKER = "worker"
MARK_MS = 10_000
WINDOW_MS = 86_400_000
NO_ENTRY = "0-0"


class Entry(Protocol):
    """An entry that was read and judged."""

    @property
    def entry_id(self) -> str: ...


class Finding(NamedTuple):
    """Why a partition is to be paused. `example` quotes an entry, so it is for the row, never for the log."""

    reason: str
    example: str


def why_to_pause(tools: Tools, partition: int, items: Sequence[Entry], tolerated_to: str | None) -> Finding | None:
    """The reason to pause a partition rather than dispose of the batch `items`; None when there is none.

    Asked once for each batch, which is still in the stream: counts how much of it, and of what came shortly before, is
    unreadable. Entries up to `tolerated_to` do not count. Asked again for a batch that is there because of a kill, it
    may say so a little early.
    """
    least = tools.settings.pause_min_entries
    if not least or not any(type(item) is Refused for item in items):
        return None
    tolerated = 0
    if tolerated_to is not None:
        tolerated = bisect_right(items, _position(tolerated_to), key=lambda item: _position(item.entry_id))
    unreadable = [item for item in items[tolerated:] if isinstance(item, Refused) and item.reason in UNREADABLE]
    if not unreadable:
        return None
    names = [keys.stream(partition), keys.recent(partition)]
    args = [len(items), tolerated, len(unreadable), least, tools.settings.pause_percent, WINDOW_MS]
    found = scripts.run(tools.redis, scripts.call("recent", names, args))
    if not found:
        return None
    entries, none = found
    first = unreadable[0]
    return Finding(
        f"{none} of the last {entries} entries are no events (of this batch {in_words(counted(unreadable))})",
        f"entry {first.entry_id}, {first.reason.value}: {first.detail[:200]}",
    )


def pause(tools: Tools, partition: int, by: str, reason: str) -> Pause:
    """Have workers leave a partition alone from their next batch on; returns the pause in force, maybe an older one.

    Safe to repeat. Killed before its COMMIT, nothing happened.
    """
    with batch_connection(tools.engine) as postgres:
        while (found := partitions.pause_in_force(postgres, partition)) is None:
            partitions.insert_pause(postgres, partition, by, reason)
        postgres.commit()
    mark(tools, partition)
    return found


def resume(tools: Tools, partition: int, by: str) -> Pause | None:
    """Have a partition drained again; returns the pause that is over, None when there was none.

    What is in the stream at this moment gives no reason for another pause: unreadable entries of it become dead
    letters. Safe to repeat, also after a kill.
    """
    with batch_connection(tools.engine) as postgres:
        found = partitions.pause_in_force(postgres, partition, for_update=True)
        if found is not None:
            partitions.end_pause(postgres, partition, by, _last_entry(tools, partition))
            postgres.commit()
    tools.redis.delete(keys.paused(partition), keys.recent(partition), keys.rung(partition))
    tools.ring(partition)
    return found


def latest(tools: Tools) -> dict[int, Pause]:
    """By partition the last pause there was, whether or not it is over."""
    with batch_connection(tools.engine) as postgres:
        return {pause.partition: pause for pause in partitions.latest_pauses(postgres)}


def mark(tools: Tools, partition: int) -> None:
    """Let others know for a while without asking Postgres that a partition is paused."""
    tools.redis.set(keys.paused(partition), "1", px=MARK_MS)


def _last_entry(tools: Tools, partition: int) -> str:
    """Id of the last entry that a stream ever had."""
    if not tools.redis.exists(keys.stream(partition)):
        return NO_ENTRY
    info = tools.redis.xinfo_stream(keys.stream(partition))
    return str(info["last-generated-id"].decode())


def _position(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)
