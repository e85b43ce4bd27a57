"""The state of the system: backlog, age, pending and throughput per partition."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import redis

from config.settings import Settings
from worker.admin.partitions import latest
from worker.client.spool_file import Spool
from worker.keyspace import keys
from worker.keyspace.connection import redis_now_ms
from worker.ledger.accounts import count_accounts
from worker.ledger.connection import batch_connection
from worker.ledger.dead_letters import open_dead_letters, recently_refused
from worker.resources import Resources
from worker.rules.account import is_sub_meter

# `refused` covers this time.
RECENT_SECONDS = 600


class PartitionStatus(NamedTuple):
    """One partition, or the `sponsor` pool.

    The oldest stream entry has waited `oldest_age_ms`. `pending` counts holds and events not applied yet. `refused`
    counts dead letters of the last minutes by reason.
    """

    partition: int | str
    lag: int
    oldest_age_ms: int
    pending: int
    per_second: float
    in_hand: bool
    refused: dict[str, int]
    halted: str
    paused: str


class Status(NamedTuple):
    """The whole system at one moment.

    `stranded` counts the stream entries beyond the number of partitions: a producer with an old number sent them, and
    no worker drains them. `spooled` items wait on this machine's disk, the oldest for `spooled_oldest_age_ms`.
    `emptied_at` is the last moment at which a process found Redis empty with a ledger in use. The holds that were open
    then are gone, and so are the events that were not applied yet.
    """

    partitions: list[PartitionStatus]
    accounts: int
    dead_letters: int
    dead_by_reason: dict[str, int]
    waiting_jobs: int
    stranded: dict[int, int]
    spooled: int
    spooled_oldest_age_ms: int
    emptied_at: datetime | None


def read_status(resources: Resources) -> Status:
    """Read the whole state once.

    It counts pending by a scan, so it is for operators, not for checks.
    """
    settings, client = resources.settings, resources.redis
    now_ms = redis_now_ms(client)
    minute = now_ms // 60_000
    pending = _pending_by_partition(client)
    with batch_connection(resources.engine) as postgres:
        accounts = count_accounts(postgres)
        dead = open_dead_letters(postgres)
        refused = recently_refused(postgres, RECENT_SECONDS)
    paused = {stream: pause for stream, pause in latest(resources).items() if pause.resumed_at is None}
    found = []
    pending[keys.SPONSORSHIP] = max(0, client.hlen(keys.SPONSORSHIP.promised) - 1)
    for stream in keys.streams(settings.partitions):
        with client.pipeline(transaction=False) as pipe:
            pipe.xlen(stream.entries)
            pipe.xrange(stream.entries, count=1)
            pipe.mget(stream.applied(minute - 1), stream.applied(minute))
            pipe.exists(stream.busy)
            pipe.get(stream.halted)
            lag, oldest, applied, busy, halted = pipe.execute()
        age_ms = now_ms - int(oldest[0][0].split(b"-")[0]) if oldest else 0
        seconds = 60 + now_ms % 60_000 / 1_000
        per_second = sum(int(count or 0) for count in applied) / seconds
        text = (halted or b"").decode()
        pause = paused.get(stream)
        found.append(
            PartitionStatus(
                stream.name, lag, max(0, age_ms), pending[stream], per_second, bool(busy),
                refused.get(stream.number, {}), text, f"by {pause.paused_by}: {pause.reason}" if pause else "",
            )
        )  # fmt: skip
    waiting = client.llen(f"rq:queue:{settings.queue_name}")
    stranded = _stranded(client, settings.partitions)
    emptied_ms = int(client.get(keys.FOUND_EMPTY) or 0)
    emptied_at = datetime.fromtimestamp(emptied_ms / 1_000, UTC) if emptied_ms else None
    return Status(found, accounts, sum(dead.values()), dead, waiting, stranded, *_spooled(settings), emptied_at)


def backlogs(client: redis.Redis, partitions: int) -> dict[keys.Stream, int]:
    """Return the number of waiting stream entries by partition, the pool's stream included.

    One round trip.
    """
    drained = keys.streams(partitions)
    with client.pipeline(transaction=False) as pipe:
        for stream in drained:
            pipe.xlen(stream.entries)
        return dict(zip(drained, pipe.execute(), strict=True))


def _spooled(settings: Settings) -> tuple[int, int]:
    """Count the spooled items of this machine; return also the age (ms) of the oldest.

    Raises SpoolUnavailable.
    """
    if settings.spool_path is None:
        return 0, 0
    count, since = Spool(settings.spool_path, settings.spool_max_bytes).count()
    age = datetime.now(UTC) - since if since is not None else timedelta()
    return count, max(0, int(age / timedelta(milliseconds=1)))


def _stranded(client: redis.Redis, partitions: int) -> dict[int, int]:
    streams = {
        keys.partition_in(raw.decode()).number: raw for raw in client.scan_iter(match=keys.STREAM_PATTERN, count=1_000)
    }
    lags = {partition: client.xlen(raw) for partition, raw in sorted(streams.items()) if partition >= partitions}
    return {partition: lag for partition, lag in lags.items() if lag}


def _pending_by_partition(client: redis.Redis) -> dict[keys.Stream, int]:
    counts: dict[keys.Stream, int] = defaultdict(int)
    for raw in client.scan_iter(match=keys.PENDING_PATTERN, count=1_000):
        name = raw.decode()
        if not is_sub_meter(keys.owner_of_pending(name)[1]):
            counts[keys.partition_in(name)] += max(0, client.hlen(raw) - 1)
    return counts
