"""Reads of a stream in pieces that are bounded in bytes, whatever producers put there.

XRANGE counts stream entries and has no bound in bytes: after a thousand small events it may bring five hundred entries
of any size. So a script first tells how far a read may go. It cuts an entry that is too large for any event to the part
that a dead letter keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import redis

from worker.keyspace import calls, scripts
from worker.keyspace.entries import RawEntry
from worker.keyspace.keys import Stream


class Piece(NamedTuple):
    """Consecutive stream entries, at least one. `more`: the read ended at a bound, so that others may follow."""

    entries: list[RawEntry]
    more: bool


def pieces(
    client: redis.Redis, stream: Stream, after: str | None, max_entries: int, max_bytes: int, piece_entries: int
) -> Iterator[Piece]:
    """Yield the stream entries after `after` (None: the beginning), up to `max_entries` or `max_bytes`.

    A piece has at most `piece_entries`, so that the caller works on them while they are fresh. An entry larger than any
    event comes as the only one of its piece, cut. Changes nothing; entries appended meanwhile may be left for the next
    read.
    """
    start, small_up_to = f"({after}" if after else "-", None
    while max_entries > 0 and max_bytes > 0:
        count = min(max_entries, piece_entries)
        piece: list[RawEntry]
        if small_up_to is not None:
            piece = _between(client, stream, start, small_up_to, count)
            more = len(piece) == count
        else:
            kind, *found = scripts.run(client, calls.extent(stream, start, count, max_bytes))
            if kind == b"none":
                return
            if kind == b"all":
                small_up_to = found[0]
                continue
            if kind == b"cut":
                entry_id, size, text = found
                piece, size, more = [(entry_id, [b"e", text], size)], len(text), True
            elif kind == b"few":
                piece, size, more = found
            else:
                end, size, more = found
                piece = _between(client, stream, start, end, count)
            max_bytes -= size
        if not piece:
            return
        yield Piece(piece, bool(more))
        if not more:
            return
        start, max_entries = f"({piece[-1][0].decode('ascii')}", max_entries - len(piece)


def _between(client: redis.Redis, stream: Stream, start: str, end: bytes, count: int) -> list[RawEntry]:
    command = ("XRANGE", stream.entries, start, end, "COUNT", count)
    return cast("list[RawEntry]", client.execute_command(*command))
