"""Lost stream entries: pending ids whose entries are neither in their stream nor in the ledger, and right totals.

A producer may trim a stream by an option of XADD, a full Redis may evict it, a failover may lose its end. Checks then
count such events for ever, and nobody bills them. An id is pending from the step that appends its stream entry, and
leaves before that entry does, or in one step with it. So an id is stuck if it is pending before and after the stream
was read, and not in the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import redis

from worker.admin.change import cause_of
from worker.errors import BadInput
from worker.keyspace import calls, keys, scripts
from worker.keyspace.entries import LAST_ID, owner_of
from worker.keyspace.keys import SPONSORSHIP, Stream
from worker.keyspace.totals import Totals, look, read_totals
from worker.ledger.connection import batch_connection
from worker.ledger.losses import FreedRow, insert_freed, recorded_among
from worker.resources import Resources
from worker.rules.account import is_sub_meter, sub_meters

_READ_AT_ONCE = 500
# A stream of this length is read, whatever its totals say.
_SHORT = 10_000
_START = "0-0"
# Searches of one stream while producers go on appending to it.
_ATTEMPTS = 50


class Stuck(NamedTuple):
    """A pending id whose stream entry is lost. For the pool, `user_id` and `meter` are '' and the id is a request."""

    stream: Stream
    user_id: str
    meter: str
    event_id: str
    units: int

    @property
    def key(self) -> str:
        """Return the key of its pending map."""
        if isinstance(self.stream, keys.Sponsorship):
            return self.stream.promised
        return self.stream.account(self.user_id).pending(self.meter)

    @property
    def id_in_map(self) -> str:
        """Return its id as the pending map has it."""
        return f"{'g' if self.stream == SPONSORSHIP else 'e'}:{self.event_id}"


@dataclass
class _Found:
    """What a scan found of one stream: the number of holds, and its events."""

    holds: int = 0
    events: list[Stuck] = field(default_factory=list)


class Search(NamedTuple):
    """Pending ids of a stream without an entry, up to the last id that the stream had then."""

    stuck: list[Stuck]
    last_id: str


def find_stuck(resources: Resources) -> dict[Stream, Search]:
    """Return pending ids whose stream entries are lost, for the streams that have any. Reads only.

    One scan of Redis, and a read of every stream that may have lost an entry. Raises the errors of Redis.
    """
    client = resources.redis
    drained = keys.streams(resources.settings.partitions)
    found = _scan(client)
    totals = read_totals(client, drained)
    searches = {
        stream: _search(client, stream, found[stream].events)
        for stream in drained
        if stream in found and (_is_suspect(totals[stream], len(found[stream].events)))
    }
    return {stream: search for stream, search in searches.items() if search.stuck}


def recount(resources: Resources) -> dict[Stream, int]:
    """Correct the totals by a scan, and note stuck ids; return the number of these for the streams that have any.

    While ids come and leave, a scan sees no one moment. It corrects a number only if what moved meanwhile does not
    explain the difference. Repeating is harmless. Raises the errors of Redis.
    """
    client = resources.redis
    drained = keys.streams(resources.settings.partitions)
    before = read_totals(client, drained)
    found = _scan(client)
    after = read_totals(client, drained)
    stuck = {}
    requests = []
    for stream in drained:
        seen = found.get(stream, _Found())
        events, holds = len(seen.events), seen.holds
        moved = after[stream].ids_added + after[stream].ids_left - before[stream].ids_added - before[stream].ids_left
        lost = _search(client, stream, seen.events).stuck if _is_suspect(after[stream], events) else []
        if lost:
            stuck[stream] = len(lost)
        requests.append(
            calls.recount(
                stream, _correction(events, after[stream].events_noted, moved),
                _correction(holds, after[stream].holds_noted, moved), len(lost),
            )
        )  # fmt: skip
    scripts.run_all(client, requests)
    return stuck


class Reconciled(NamedTuple):
    """Pending ids that were freed, and the stream entries that were lost in all, by stream, since the last time."""

    freed: list[FreedRow]
    lost: dict[Stream, int]


def reconcile(resources: Resources, *, actor: str | None = None, reason: str | None = None) -> Reconciled:
    """Free pending ids whose stream entries are lost, with a record of each in the ledger; return what it did.

    It changes no balance. Nobody bills a lost event, unless its producer sends it again. It frees an id in one step in
    which the stream has none of its entries. Killed between the record and that step, a repeat frees it.
    Raises AccountError for a wrong actor or reason, BadInput if a stream grows too fast, and the errors of the servers.
    """
    cause = cause_of(actor, reason)
    freed: list[FreedRow] = []
    for stream, found in find_stuck(resources).items():
        search = found
        with batch_connection(resources.engine) as postgres:
            recorded = recorded_among(postgres, [(each.user_id, each.event_id) for each in search.stuck])
            rows = [
                FreedRow(
                    stream.number, each.user_id, each.meter, each.event_id, each.units,
                    (each.user_id, each.event_id) in recorded,
                )
                for each in search.stuck
            ]  # fmt: skip
            insert_freed(postgres, rows, cause)
            postgres.commit()
        for _ in range(_ATTEMPTS):
            if scripts.run(resources.redis, calls.free(stream, search.last_id, _gone(resources, search.stuck))):
                break
            search = _search(resources.redis, stream, search.stuck)
        else:
            raise BadInput(f"partition {stream.name}: its stream grows too fast; try again in a quieter moment")
        freed += rows
    drained = keys.streams(resources.settings.partitions)
    look(resources.redis, drained)
    counts = scripts.run_all(resources.redis, [calls.settled(stream) for stream in drained])
    return Reconciled(freed, {stream: int(lost) for stream, lost in zip(drained, counts, strict=True) if lost})


def _gone(resources: Resources, stuck: Sequence[Stuck]) -> list[calls.Gone]:
    """Return the ids by pending map: of the meter, and of all its sub-meters."""
    ids: dict[str, list[str]] = {}
    for each in stuck:
        backends = resources.catalogue.capped_backends.get(each.meter, ())
        maps = [each.key]
        if isinstance(each.stream, keys.Partition):
            maps += [each.stream.account(each.user_id).pending(sub) for sub in sub_meters(each.meter, backends)]
        for key in maps:
            ids.setdefault(key, []).append(each.id_in_map)
    return list(ids.items())


def _correction(found: int, noted: int, moved: int) -> int:
    return found - noted if abs(found - noted) > moved else 0


def _is_suspect(totals: Totals, events: int) -> bool:
    """True if a stream may have lost the entry of one of its pending events."""
    return bool(events) and (
        totals.length <= _SHORT or events > totals.length or totals.missing != 0 or totals.lost > 0
    )


def _scan(client: redis.Redis) -> dict[Stream, _Found]:
    """Return holds and events of every stream, by its pending maps; each map once, though a scan may repeat a key."""
    found: dict[Stream, _Found] = {}
    for raw_key in set(client.scan_iter(match=keys.PENDING_PATTERN, count=1_000)):
        key = raw_key.decode()
        user_id, meter = keys.owner_of_pending(key)
        if not is_sub_meter(meter):
            _add(found, keys.partition_in(key), user_id, meter, _map(client, key))
    _add(found, SPONSORSHIP, "", "", _map(client, SPONSORSHIP.promised))
    return found


def _map(client: redis.Redis, key: str) -> dict[bytes, bytes]:
    return cast("dict[bytes, bytes]", client.hgetall(key))


def _add(found: dict[Stream, _Found], stream: Stream, user_id: str, meter: str, ids: dict[bytes, bytes]) -> None:
    seen = found.setdefault(stream, _Found())
    for name, units in ids.items():
        if name.startswith(b"h:"):
            seen.holds += 1
        elif name != b"total":
            seen.events.append(Stuck(stream, user_id, meter, name[2:].decode(), int(units)))


def _search(client: redis.Redis, stream: Stream, events: Sequence[Stuck]) -> Search:
    """Return those of these events that are not in the stream, and pending still."""
    missing = {(each.user_id, each.event_id): each for each in events}
    last_id = _strike_out(client, stream, missing, _START)
    pending = list(missing.values())
    with client.pipeline(transaction=False) as pipe:
        for each in pending:
            pipe.hget(each.key, each.id_in_map)
        left = pipe.execute()
    missing = {
        (each.user_id, each.event_id): each for each, units in zip(pending, left, strict=True) if units is not None
    }
    # One that was sent again meanwhile is in the stream by now.
    last_id = _strike_out(client, stream, missing, last_id)
    return Search(sorted(missing.values(), key=lambda each: (each.user_id, each.event_id)), last_id)


def _strike_out(client: redis.Redis, stream: Stream, missing: dict[tuple[str, str], Stuck], after: str) -> str:
    """Take out the events that the stream has after an entry; return the last id of the stream."""
    last_id = after
    for entry_id, flat in _entries(client, stream, after):
        last_id = entry_id
        owner = _identity(stream, dict(zip(flat[0::2], flat[1::2], strict=True)))
        if owner is not None:
            missing.pop(owner, None)
    return max(last_id, _last_id(client, stream), key=_order) if missing else last_id


def _last_id(client: redis.Redis, stream: Stream) -> str:
    if not client.exists(stream.entries):
        return _START
    return str(client.xinfo_stream(stream.entries)["last-generated-id"].decode())


def _order(entry_id: str) -> tuple[int, int]:
    time, _, number = entry_id.partition("-")
    return int(time), int(number)


def _entries(client: redis.Redis, stream: Stream, after: str) -> Iterator[tuple[str, list[bytes]]]:
    while after != LAST_ID:
        found = cast("list[tuple[bytes, list[bytes]]]", client.xrange(stream.entries, f"({after}", count=_READ_AT_ONCE))
        for entry_id, flat in found:
            yield entry_id.decode(), flat
        if len(found) < _READ_AT_ONCE:
            return
        after = found[-1][0].decode()


def _identity(stream: Stream, fields: dict[bytes, bytes]) -> tuple[str, str] | None:
    """Return user and event of a stream entry, or '' and the request in the pool's stream."""
    if stream == SPONSORSHIP:
        return ("", fields[b"request"].decode("utf-8", "replace")) if b"request" in fields else None
    owner = owner_of(fields.get(b"e", b""))
    return (owner[0], owner[2]) if owner else None
