"""Reads of a stream in pieces that are bounded in bytes, whatever producers put there.

XRANGE counts stream entries and has no bound in bytes: after a thousand small events it may bring five hundred entries
of any size. So a script first tells how far a read may go. It cuts an entry that is too large for any event to the part
that a dead letter keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import redis

from worker.keyspace import calls, scripts
from worker.keyspace.entries import LAST_ID, RawEntry
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
    if after == LAST_ID:
        return
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
        last_id = piece[-1][0].decode("ascii")
        if not more or last_id == LAST_ID:
            return
        start, max_entries = f"({last_id}", max_entries - len(piece)


def read_small(
    client: redis.Redis, streams: Sequence[Stream], max_entries: int, max_bytes: int
) -> list[list[RawEntry]]:
    """Return the first entries of many streams, at most `max_entries` of each and about `max_bytes` of all together.

    Each may bring its share of these bytes, or one entry.

    In two round trips, whatever their number. None of a stream that begins with an entry larger than any event. Changes
    nothing.
    """
    requests = [calls.extent(stream, "-", max_entries, max_bytes // len(streams)) for stream in streams]
    found: list[list[RawEntry]] = []
    ends: dict[int, bytes] = {}
    for number, (kind, *rest) in enumerate(scripts.run_all(client, requests)):
        found.append(rest[0] if kind == b"few" else [])
        if kind in (b"all", b"part"):
            ends[number] = rest[0]
    if ends:
        with client.pipeline(transaction=False) as pipe:
            for number, end in ends.items():
                pipe.execute_command("XRANGE", streams[number].entries, "-", end, "COUNT", max_entries)
            for number, entries in zip(ends, pipe.execute(), strict=True):
                found[number] = cast("list[RawEntry]", entries)
    return found


def _between(client: redis.Redis, stream: Stream, start: str, end: bytes, count: int) -> list[RawEntry]:
    command = ("XRANGE", stream.entries, start, end, "COUNT", count)
    return cast("list[RawEntry]", client.execute_command(*command))
