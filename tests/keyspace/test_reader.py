"""Reading: everything comes, in order and once; and whatever lies in a stream, a read is bounded in bytes."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.events import MAX_ENTRY_BYTES, MAX_ENTRY_FIELDS, MAX_PAYLOAD_BYTES, Refusal
from tests.support.ledger import give_account, rows
from tests.support.payloads import payload
from tests.support.resources import settings_for, worker_resources
from worker.consumer.drain import drain_stream
from worker.keyspace import keys
from worker.keyspace.entries import RawEntry
from worker.keyspace.reader import Piece, pieces
from worker.resources import Resources

PARTITION = keys.Partition(0)
STREAM = PARTITION.entries
MEGABYTE = 1_000_000
# A read of a stream smaller than the bound needs no look at its stream entries.
SMALL, TIGHT = 8 * 2**20, 60_000


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    return settings_for(emptied_database_url, redis_url, partitions=1)


def read(
    resources: Resources, max_bytes: int, *, after: str | None = None, max_entries: int = 10_000, piece: int = 500
) -> list[Piece]:
    """All pieces of one read."""
    return list(pieces(resources.redis, PARTITION, after, max_entries, max_bytes, piece))


def entries_of(found: list[Piece]) -> list[RawEntry]:
    return [entry for entries, _ in found for entry in entries]


def fill(redis: Redis, sizes: list[int]) -> list[str]:
    """Append stream entries with events of these sizes in bytes; return their ids."""
    with redis.pipeline() as pipe:
        for size in sizes:
            pipe.xadd(STREAM, {"v": "1", "e": "x" * size})
        return [raw_id.decode() for raw_id in pipe.execute()]


def bytes_of(entry: RawEntry) -> int:
    """Return the bytes that a stream entry takes in the memory of its reader."""
    return sum(64 + len(part) for part in entry[1])


@pytest.mark.parametrize("max_bytes", [SMALL, TIGHT])
@pytest.mark.parametrize("piece", [1, 7, 500])
def test_everything_comes_once_and_in_order(redis: Redis, resources: Resources, max_bytes: int, piece: int) -> None:
    """A read that ends at its bound says so; the next goes on behind it."""
    sizes = [number % 3_000 for number in range(1_000)]
    ids = fill(redis, sizes)
    seen: list[str] = []
    after: str | None = None
    while True:
        found = read(resources, max_bytes, after=after, piece=piece, max_entries=300)
        entries = entries_of(found)
        seen += [entry[0].decode() for entry in entries]
        assert all(len(each) <= piece for each, _ in found)
        assert len(entries) <= 300
        assert [more for _, more in found[:-1]] == [True] * (len(found) - 1)
        if not found or not found[-1].more:
            break
        after = seen[-1]
    assert seen == ids
    assert all(earlier < later for earlier, later in pairwise(map(_moment, seen)))


def _moment(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)


def test_an_empty_stream_and_one_that_is_read_to_its_end(redis: Redis, resources: Resources) -> None:
    assert read(resources, SMALL) == []
    ids = fill(redis, [10] * 3)
    assert [piece.more for piece in read(resources, SMALL)] == [False]
    for max_bytes in (SMALL, TIGHT, 1):
        assert read(resources, max_bytes, after=ids[-1]) == []
    redis.xdel(STREAM, *ids)
    assert read(resources, SMALL) == []


@pytest.mark.parametrize("sizes", [[50_000] * 40, [10] * 500 + [50_000] * 40, [50_000] + [10] * 500 + [60_000] * 20])
def test_a_read_ends_at_its_bytes_whatever_came_before(redis: Redis, resources: Resources, sizes: list[int]) -> None:
    fill(redis, sizes)
    entries: list[RawEntry] = []
    while True:
        after = entries[-1][0].decode() if entries else None
        found = entries_of(read(resources, 200_000, after=after))
        if not found:
            break
        assert sum(map(bytes_of, found)) <= 200_000 + MAX_ENTRY_BYTES
        entries += found
    assert [len(entry[1][3]) for entry in entries] == sizes


@pytest.mark.parametrize(
    ("fields", "size", "kept"),
    [
        ({"v": "1", "e": "x" * MEGABYTE}, MEGABYTE, b"x" * MAX_PAYLOAD_BYTES),
        ({"e": b"\xff" * MEGABYTE}, MEGABYTE, b"\xff" * MAX_PAYLOAD_BYTES),
        ({"v": "1", "e": "{}", "junk": "x" * MEGABYTE}, 2, b"{}"),
        ({"v": "1", "junk": "x" * MEGABYTE}, MEGABYTE + 9, b"v\n1\njunk\n" + b"x" * (2**16 - 9)),
        ({"v": "1", "x" * MEGABYTE: ""}, MEGABYTE + 5, b"v\n1\n" + b"x" * (2**16 - 4)),
        ({f"{number:05}": "" for number in range(30_000)}, 209_999, None),
    ],
    ids=["event", "bytes", "beside an event", "value", "name", "fields"],
)
def test_what_is_too_large_for_any_event_comes_cut(
    redis: Redis, resources: Resources, fields: dict[Any, Any], size: int, kept: bytes | None
) -> None:
    before, cut_id, behind = redis.xadd(STREAM, {"a": "1"}), redis.xadd(STREAM, fields), redis.xadd(STREAM, {"b": "1"})
    found = read(resources, 2 * TIGHT)
    assert [entry[0] for entry in entries_of(found)] == [before, cut_id, behind]
    assert [len(piece.entries) for piece in found] == [1, 1, 1]
    entry = found[1].entries[0]
    assert len(entry) == 3
    assert entry[2] == size
    assert entry[1][0] == b"e"
    assert len(entry[1][1]) <= MAX_PAYLOAD_BYTES
    assert kept is None or entry[1][1] == kept


LARGE: dict[str, dict[Any, Any]] = {
    "an event of 10 MB": {"v": "1", "e": payload(source="x" * 10 * MEGABYTE)},
    "JSON 100,000 deep": {"v": "1", "e": b"[" * 100_000 + b"]" * 100_000},
    "a valid event beside 1 MB": {"v": "1", "e": payload(), "junk": "x" * MEGABYTE},
    "a valid event with a large version": {"v": "1" * 70_000, "e": payload()},
    "a valid event with a large mark": {"v": "1", "e": payload(), "m": "x" * 70_000},
    "a valid event with a large signature": {"v": "1", "e": payload(), "s": "x" * 70_000},
    "a valid event among many fields": {"v": "1", "e": payload()} | {str(number): "" for number in range(20_000)},
    "one field too many": {"v": "1", "e": payload()} | {str(n): "" for n in range(MAX_ENTRY_FIELDS - 1)},
}


@pytest.mark.parametrize("fields", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("batch_max_bytes", [65_536, 2**30])
def test_what_is_too_large_is_refused_however_it_was_read(
    settings: Settings, redis: Redis, fields: dict[Any, Any], batch_max_bytes: int
) -> None:
    give_account(settings, "u1")
    redis.xadd(STREAM, fields)
    redis.xadd(STREAM, {"v": "1", "e": payload(event_id="neighbour")})
    with worker_resources(settings.model_copy(update={"batch_max_bytes": batch_max_bytes})) as resources:
        drain_stream(resources, PARTITION)
    assert rows(settings, "SELECT event_id FROM usage_log") == [("neighbour",)]
    ((reason, kept),) = rows(settings, "SELECT reason, length(payload) FROM dead_letter")
    assert reason == Refusal.TOO_LARGE.value
    assert isinstance(kept, int)
    assert kept <= MAX_PAYLOAD_BYTES
    assert redis.xlen(STREAM) == 0


HOSTILE: dict[str, Callable[[int], dict[Any, Any]]] = {
    "events of 2 MB": lambda number: {"v": "1", "e": b'{"x":"' + b"%d" % number * 2 * MEGABYTE},
    "JSON 100,000 deep": lambda number: {"v": "1", "e": b"[" * 100_000 + b"%d" % number + b"]" * 100_000},
    "JSON 30,000 deep": lambda number: {"v": "1", "e": b"[" * 30_000 + b"%d" % number + b"]" * 30_000},
    "keys twice": lambda number: {"v": "1", "e": b"{" + b'"a":%d,' % number * 8_000 + b'"a":1}'},
    "many keys": lambda number: {"v": "1", "e": json.dumps({f"{number}-{key}": key for key in range(4_000)})},
    "not JSON": lambda number: {"v": "1", "e": b"%d" % number + b"x" * 65_000},
    "not UTF-8": lambda number: {"v": "1", "e": b"%d" % number + b"\xff" * 65_000},
    "huge numbers": lambda number: {"v": "1", "e": b'{"quantity":%d' % (number % 9 + 1) + b"9" * 65_000 + b"}"},
    "many fields": lambda number: {str(field): "" for field in range(number, number + 10_000)},
    "marked": lambda number: {"v": "1", "e": b"[" * 65_000 + b"%d" % number, "m": "1"},
}
HOSTILE_ENTRIES = 120
BOUND_BYTES = 12 * MEGABYTE


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_the_memory_of_a_drain_is_bounded(
    settings: Settings, redis: Redis, hostile: Callable[[int], dict[Any, Any]]
) -> None:
    """More comes than fits, behind small events, which let a read without a bound in bytes ask for many."""
    give_account(settings, "u1")
    with redis.pipeline() as pipe:
        for number in range(1_000):
            pipe.xadd(STREAM, {"v": "1", "e": payload(event_id=f"small-{number}")})
        pipe.execute()
    for number in range(HOSTILE_ENTRIES):
        redis.xadd(STREAM, hostile(number))
    bounds = {"batch_max_bytes": 2**20}
    with worker_resources(settings.model_copy(update=bounds)) as resources:
        tracemalloc.start()
        try:
            drain_stream(resources, PARTITION)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert redis.xlen(STREAM) == 0
    assert rows(settings, "SELECT (SELECT count(*) FROM usage_log), (SELECT count(*) FROM dead_letter)") == [
        (1_000, HOSTILE_ENTRIES)
    ]
    assert peak < BOUND_BYTES, f"{peak / MEGABYTE:.0f} MB"
