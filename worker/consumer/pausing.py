"""When to pause a partition: half of its latest stream entries are no events. Operators may pause one by hand also.

A broken producer, or a forger, must not turn a stream into dead letters. The entries of a paused partition stay in the
stream until an operator resumes it. The row in Postgres decides; every batch reads it together with its lock. The mark
in Redis only spares other processes the query: it expires, and the next drain that finds the row sets it again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from worker.consumer.refusals import UNREADABLE, counted, in_words
from worker.keyspace import calls, scripts
from worker.keyspace.keys import Stream
from worker.ledger.partitions import Turn
from worker.resources import Resources
from worker.rules.entry_times import entered_at, is_ahead
from worker.rules.received import Refused

# The author of a pause by a worker; an operator has another name.
WORKER = "worker"
WINDOW_MS = 86_400_000


class Entry(Protocol):
    """A stream entry, read and judged."""

    @property
    def entry_id(self) -> str: ...


class Finding(NamedTuple):
    """The reason to pause a stream. `example` quotes a stream entry, so it is for the row, never for the log."""

    reason: str
    example: str


def why_to_pause(resources: Resources, stream: Stream, items: Sequence[Entry], turn: Turn) -> Finding | None:
    """Return the reason to pause a stream, None without one.

    Call it once for each batch, while it is still in the stream. It counts the unreadable stream entries of the batch
    and of the time shortly before it, except those that the last resume let through. A call repeated after a kill may
    find a reason a little early.
    """
    least = resources.settings.pause_min_entries
    if not least or not any(type(item) is Refused for item in items):
        return None
    tolerated = _tolerated(items, turn)
    unreadable = [item for item in items[tolerated:] if isinstance(item, Refused) and item.reason in UNREADABLE]
    if not unreadable:
        return None
    request = calls.recent(
        stream, len(items), tolerated=tolerated, unreadable=len(unreadable),
        least=least, percent=resources.settings.pause_percent, window_ms=WINDOW_MS,
    )  # fmt: skip
    found = scripts.run(resources.redis, request)
    if not found:
        return None
    entries, none = found
    first = unreadable[0]
    return Finding(
        f"{none} of the last {entries} stream entries are no events (of this batch {in_words(counted(unreadable))})",
        f"stream entry {first.entry_id}, {first.reason.value}: {first.detail[:200]}",
    )


def _tolerated(items: Sequence[Entry], turn: Turn) -> int:
    """Count the entries at the beginning of a batch that the last resume let through."""
    last = turn.tolerated_to
    if last is None or turn.resumed_at is None:
        return 0
    first = items[0].entry_id
    # After an id ahead of the clock the stream began anew: a smaller id that came after the resume is a later entry.
    if is_ahead(last, turn.now) and not is_ahead(first, turn.now) and entered_at(first, turn.now) > turn.resumed_at:
        return 0
    return bisect_right(items, _position(last), key=lambda item: _position(item.entry_id))


def _position(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)
