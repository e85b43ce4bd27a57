"""The totals of each stream: how much is pending, how many stream entries were lost. Readers need no scan.

Our scripts keep them in the step that adds or takes out ids, or disposes of stream entries. They are for operators:
nothing that concerns money believes them. Scripts of older releases do not know them. So a recount corrects the
numbers of ids (worker/admin/losses.py), and a look counts stream entries of older workers as disposed of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import redis

from worker.keyspace import calls, scripts
from worker.keyspace.connection import redis_now_ms
from worker.keyspace.keys import Stream


class Totals(NamedTuple):
    """The totals of one stream at one moment.

    `length` stream entries wait; `added` were ever added to this stream. Our scripts disposed of `disposed`. `missing`
    left in another way since the last look: trimmed, deleted or evicted; below 0, the whole stream was. `lost` were
    found missing before, and no operator has dealt with them yet. `stuck` pending ids had no stream entry at the last
    recount. `events` and `holds` count pending ids, and `counted_at_ms` is the time of that recount; before the first
    one, all three are None. `ids_added` and `ids_left` count the ids that our scripts ever moved.
    """

    length: int
    added: int
    disposed: int
    missing: int
    lost: int
    lost_at_ms: int | None
    stuck: int
    stuck_at_ms: int | None
    events: int | None
    holds: int | None
    counted_at_ms: int | None
    ids_added: int
    ids_left: int
    # As the scripts wrote it down, right or wrong.
    events_noted: int
    holds_noted: int

    @property
    def all_lost(self) -> int:
        """Return the number of stream entries that no script of ours disposed of."""
        return self.lost + max(0, self.missing)


def read_totals(client: redis.Redis, streams: Sequence[Stream]) -> dict[Stream, Totals]:
    """Return the totals of these streams at one moment: one round trip, one look at two keys for each.

    Reads only, so a role that may write nothing can do it. Raises the errors of Redis.
    """
    with client.pipeline(transaction=True) as pipe:
        for stream in streams:
            pipe.execute_command("XINFO STREAM", stream.entries)
            pipe.hgetall(stream.totals)
        replies = pipe.execute(raise_on_error=False)
    return {
        stream: _totals_of(facts, noted)
        for stream, facts, noted in zip(streams, replies[0::2], replies[1::2], strict=True)
    }


def look(client: redis.Redis, streams: Sequence[Stream]) -> dict[Stream, int]:
    """Note stream entries that were lost since the last look; return their number for the streams that lost any.

    The first look at a stream notes where its count begins. Repeating is harmless. Raises the errors of Redis.
    """
    minute = redis_now_ms(client) // 60_000
    found = scripts.run_all(client, [calls.look(stream, minute) for stream in streams])
    return {stream: lost for stream, lost in zip(streams, found, strict=True) if lost}


def _totals_of(facts: Any, hashed: Any) -> Totals:
    """Return the totals of one stream by what Redis tells of it, an error if it is not there, and its hash."""
    for reply in (facts, hashed):
        if isinstance(reply, Exception) and not (reply is facts and "no such key" in str(reply).lower()):
            raise reply
    length, added = (0, 0) if isinstance(facts, Exception) else (int(facts["length"]), int(facts["entries-added"]))
    noted = {name.decode(): int(value) for name, value in hashed.items()}
    events, holds = _left(noted, "events"), _left(noted, "holds")
    # A stream that was deleted counts from 0 again.
    is_another = added < noted.get("added", 0)
    disposed, is_counted = noted.get("disposed", 0), "counted_at_ms" in noted
    missing = -noted["length"] if is_another else added - length - disposed - noted.get("base", 0)
    return Totals(
        length=length,
        added=added,
        disposed=disposed,
        missing=missing if "base" in noted else 0,
        lost=noted.get("lost", 0),
        lost_at_ms=noted.get("lost_at_ms"),
        stuck=noted.get("stuck", 0),
        stuck_at_ms=noted.get("stuck_at_ms"),
        # Below 0: an older release added them, which counts nothing.
        events=max(0, events) if is_counted else None,
        holds=max(0, holds) if is_counted else None,
        counted_at_ms=noted.get("counted_at_ms"),
        ids_added=noted.get("events_added", 0) + noted.get("holds_added", 0),
        ids_left=noted.get("events_left", 0) + noted.get("holds_left", 0),
        events_noted=events,
        holds_noted=holds,
    )


def _left(noted: Mapping[str, int], kind: str) -> int:
    return noted.get(f"{kind}_added", 0) - noted.get(f"{kind}_left", 0)
