"""The state of the system at one moment, from the servers that answer.

Reading costs a few commands per partition, and never a scan: a dyno reads it at every scrape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import psycopg
import redis
from sqlalchemy.exc import SQLAlchemyError

from config.catalogue import CatalogueError
from config.settings import MAX_PARTITIONS, Settings, without_secrets
from schemas.status import (
    Dyno,
    Health,
    NoticeBacklog,
    PartitionStatus,
    PostgresStatus,
    ProofStatus,
    QueueStatus,
    RedisLoss,
    RedisStatus,
    Status,
    UncollectedWork,
)
from worker.client.spool_file import Spool
from worker.keyspace import keys
from worker.keyspace.connection import connect_queue, redis_now_ms
from worker.keyspace.faults import fault_of as redis_fault
from worker.keyspace.server import read_server
from worker.keyspace.totals import Totals, read_totals
from worker.ledger.accounts import count_accounts, oldest_due
from worker.ledger.connection import Postgres, batch_connection
from worker.ledger.dead_letters import open_dead_letters, recently_refused
from worker.ledger.faults import fault_of as ledger_fault
from worker.ledger.lives import read_lives
from worker.ledger.migrations import newest_revision
from worker.ledger.overviews import recently_uncollected
from worker.ledger.partitions import Pause, latest_pauses
from worker.ledger.repeats import count_repeats
from worker.ledger.revision import read_revision
from worker.ledger.webhooks import read_backlog
from worker.reports.dynos import read_dynos
from worker.reports.health import Limits, findings, severity_of
from worker.reports.proof_result import read_result
from worker.resources import Resources
from worker.rules.entry_times import CLOCK_SKEW_MS, milliseconds_of
from worker.rules.lives import Life, found_as, token_of

# `refused` covers this time.
RECENT_SECONDS = 600
# `late_repeats` covers this time.
DAY_SECONDS = 86_400
# Events that no account paid, of which `status` reads no more.
MOST_UNCOLLECTED = 10_000
# The counters of this many full slots, and of the open one, make the rate.
_FULL_SLOTS = 2
_MILLISECOND = timedelta(milliseconds=1)


# As messages about missing rights name it.
COMMAND, ROLE = "status", "monitor"


class _Streams(NamedTuple):
    """What Redis knows about the streams, and about itself."""

    now: datetime
    server: RedisStatus
    partitions: tuple[PartitionStatus, ...]
    queue: QueueStatus | None
    waiting_jobs: int | None
    stranded: dict[int, int]
    lost: dict[str, int]
    losses: tuple[RedisLoss, ...] | None
    is_led: bool
    dynos: tuple[Dyno, ...]
    proof: ProofStatus | None


class _Books(NamedTuple):
    """What Postgres knows."""

    server: PostgresStatus
    accounts: int | None = None
    dead_by_reason: dict[str, int] | None = None
    refused: dict[int, dict[str, int]] | None = None
    late_repeats: int | None = None
    uncollected: Sequence[tuple[str, int, int]] | None = None
    renewal_due_at: datetime | None = None
    pauses: Mapping[int, Pause] | None = None
    lives: Sequence[Life] | None = None
    notices: NoticeBacklog | None = None


def read_status(resources: Resources, max_lag_seconds: int | None = None) -> Status:
    """Read the whole state once. A server that does not answer is named, and the rest is shown.

    It takes as long as the time-outs of the settings allow, at most once for each server.
    `max_lag_seconds` overrides the setting.
    """
    settings = resources.settings
    books = _read_books(resources)
    streams = _read_streams(resources, books)
    partitions = streams.partitions
    is_known = streams.server.answers
    lag = sum(one.lag for one in partitions)
    per_second = sum(one.per_second for one in partitions)
    spooled, spooled_age_ms = _spooled(settings)
    status = Status(
        at=streams.now,
        severity="ok",
        findings=(),
        redis=streams.server,
        postgres=books.server,
        queue=streams.queue,
        partitions=partitions,
        lag=lag if is_known else None,
        oldest_age_ms=max((one.oldest_age_ms for one in partitions), default=None),
        pending=sum(one.pending for one in partitions) if is_known else None,
        per_second=per_second if is_known else None,
        seconds_to_empty=lag / per_second if is_known and per_second else None,
        is_led=streams.is_led if is_known else None,
        dynos=streams.dynos if is_known else None,
        accounts=books.accounts,
        dead_letters=None if books.dead_by_reason is None else sum(books.dead_by_reason.values()),
        dead_by_reason=books.dead_by_reason,
        waiting_jobs=streams.waiting_jobs,
        stranded=streams.stranded if is_known else None,
        lost=streams.lost if is_known else None,
        spooled=spooled,
        spooled_oldest_age_ms=spooled_age_ms,
        emptied_at=streams.losses[0].at if streams.losses else None,
        redis_losses=streams.losses,
        late_repeats=books.late_repeats,
        uncollected=None
        if books.uncollected is None
        else tuple(
            UncollectedWork(meter=meter, events=events, amount=amount) for meter, events, amount in books.uncollected
        ),
        renewal_due_at=books.renewal_due_at,
        proof=streams.proof,
        notices=books.notices,
        catalogue=resources.catalogue.digest,
        missing_default_plan=resources.missing_default_plan,
    )
    limits = Limits(
        settings.health_max_lag_seconds if max_lag_seconds is None else max_lag_seconds,
        settings.verify_interval_seconds,
        settings.renew_interval_seconds,
    )
    found = findings(status, limits)
    return status.model_copy(update={"findings": tuple(found), "severity": severity_of(found)})


def health_of(status: Status) -> Health:
    """Return the outcome of the checks of a status."""
    return Health(at=status.at, severity=status.severity, findings=status.findings)


# ---------------------------------------------------------------------------------------------------------------------
# Postgres


def _read_books(resources: Resources) -> _Books:
    """Read what Postgres knows; only its error if it does not answer, or its tables are others."""
    wants = newest_revision()
    try:
        with batch_connection(resources.engine) as postgres:
            revision = read_revision(postgres)
            if revision is not None and revision < wants:
                return _Books(PostgresStatus(answers=True, revision=revision, wants_revision=wants))
            with suppress(CatalogueError):  # of a newer release; then its dynos do the work
                resources.in_force.refresh(postgres)
            return _Books(
                PostgresStatus(answers=True, revision=revision, wants_revision=wants),
                count_accounts(postgres),
                open_dead_letters(postgres),
                recently_refused(postgres, RECENT_SECONDS),
                count_repeats(postgres, DAY_SECONDS),
                recently_uncollected(postgres, DAY_SECONDS, MOST_UNCOLLECTED),
                oldest_due(postgres),
                {pause.partition: pause for pause in latest_pauses(postgres)},
                read_lives(postgres),
                _backlog_of(postgres),
            )
    except (psycopg.Error, SQLAlchemyError) as error:
        fault = ledger_fault(error, resources.settings, command=COMMAND, role=f"meterfall_{ROLE}")
        line = fault or f"Postgres does not answer: {_line(error)}"
        return _Books(PostgresStatus(answers=False, error=line, wants_revision=wants))


def _backlog_of(postgres: Postgres) -> NoticeBacklog:
    found = read_backlog(postgres)
    return NoticeBacklog(webhooks=found.webhooks, waiting=found.waiting, dead=found.dead, oldest_at=found.oldest)


# ---------------------------------------------------------------------------------------------------------------------
# Redis


def _read_streams(resources: Resources, books: _Books) -> _Streams:
    """Read what Redis knows; only its error if it does not answer."""
    try:
        return _answered(resources, books)
    except redis.RedisError as error:
        address = without_secrets(resources.settings.redis_url)
        fault = redis_fault(error, resources.settings, command=COMMAND, role=ROLE)
        line = fault or f"Redis at {address} does not answer: {_line(error)}"
        server = RedisStatus(answers=False, error=line)
        losses = _losses(books.lives) if books.lives is not None else None
        return _Streams(datetime.now(UTC), server, (), None, None, {}, {}, losses, False, (), None)


def _answered(resources: Resources, books: _Books) -> _Streams:
    settings, client = resources.settings, resources.redis
    now_ms = redis_now_ms(client)
    drained = keys.streams(settings.partitions)
    totals = read_totals(client, drained)
    facts = read_server(client)
    now = datetime.fromtimestamp(now_ms / 1_000, UTC)
    queue, waiting_jobs = _read_queue(settings, client)
    losses = _losses(books.lives) if books.lives is not None else None
    if losses is not None and books.lives:
        found = found_as(token_of(client.get(keys.LIFE)), [life.token for life in books.lives])
        if found is not None and found != "new":  # no dyno has begun the new life yet
            losses = (RedisLoss(at=now, found=found), *losses)
    return _Streams(
        now=now,
        server=RedisStatus(
            answers=True,
            version=facts.version_text if facts.version else None,
            used_memory_bytes=facts.used_memory_bytes,
            maxmemory_bytes=facts.maxmemory_bytes,
            maxmemory_policy=facts.maxmemory_policy,
            has_append_only_file=facts.has_aof,
            dangers=tuple(facts.dangers()),
        ),
        partitions=tuple(_partition(client, stream, now_ms, _pending(totals[stream]), books) for stream in drained),
        queue=queue,
        waiting_jobs=waiting_jobs,
        stranded=_stranded(client, settings.partitions),
        lost={str(stream.name): found.all_lost for stream, found in totals.items() if found.all_lost},
        losses=losses,
        is_led=bool(client.exists(keys.LEADER)),
        dynos=tuple(read_dynos(client)),
        proof=read_result(client),
    )


def _read_queue(settings: Settings, client: redis.Redis) -> tuple[QueueStatus | None, int | None]:
    """Return the Redis that the queue has for itself, None without one, and the number of waiting jobs."""
    name = f"rq:queue:{settings.queue_name}"
    if settings.queue_redis_url is None:
        return None, client.llen(name)
    try:
        with closing(connect_queue(settings)) as queue:
            return QueueStatus(answers=True), queue.llen(name)
    except redis.RedisError as error:
        fault = redis_fault(error, settings, command=COMMAND, role=ROLE, of_queue=True)
        address = without_secrets(settings.queue_redis_url)
        line = fault or f"the Redis of the queue at {address} does not answer: {_line(error)}"
        return QueueStatus(answers=False, error=line), None


def _losses(lives: Sequence[Life]) -> tuple[RedisLoss, ...]:
    """Return the losses that nobody has acknowledged, the last one first."""
    return tuple(RedisLoss(at=each.began_at, found=each.found) for each in lives if each.is_open)


def _partition(client: redis.Redis, stream: keys.Stream, now_ms: int, pending: int, books: _Books) -> PartitionStatus:
    slot = keys.slot_of(now_ms)
    with client.pipeline(transaction=False) as pipe:
        pipe.xlen(stream.entries)
        pipe.xrange(stream.entries, count=1)
        pipe.mget([stream.applied(each) for each in range(slot - _FULL_SLOTS, slot + 1)])
        pipe.exists(stream.busy)
        pipe.mget(stream.halted, stream.failing)
        pipe.exists(stream.paused)
        pipe.execute_command("XINFO STREAM", stream.entries)
        *replies, info = pipe.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    lag, oldest, applied, busy, (halted, failing), is_marked = replies
    age_ms = now_ms - int(oldest[0][0].split(b"-")[0]) if oldest else 0
    measured_ms = _FULL_SLOTS * keys.SLOT_MS + now_ms % keys.SLOT_MS
    return PartitionStatus(
        partition=stream.name,
        lag=lag,
        oldest_age_ms=max(0, age_ms),
        pending=pending,
        per_second=round(1_000 * sum(int(count or 0) for count in applied) / measured_ms, 2),
        in_hand=bool(busy),
        refused=None if books.refused is None else books.refused.get(stream.number, {}),
        # Between two tries it is not halted, but what failed has not ended.
        halted=(halted or (failing if lag else None) or b"").decode(),
        paused=_pause_of(stream, bool(is_marked), books.pauses),
        ahead_ms=_ahead_ms(info, now_ms),
    )


def _pause_of(stream: keys.Stream, is_marked: bool, pauses: Mapping[int, Pause] | None) -> str:
    """Return who paused a stream and why, empty if it is not paused. Without Postgres, the mark in Redis tells."""
    if pauses is None:
        return "as Redis says; the reason is in Postgres" if is_marked else ""
    pause = pauses.get(stream.number)
    return f"by {pause.paused_by}: {pause.reason}" if pause is not None and pause.resumed_at is None else ""


def _ahead_ms(info: Any, now_ms: int) -> int:
    """Return how far the last id of a stream is ahead of the clock, 0 if it is not, or if there is no stream."""
    if not isinstance(info, dict):
        return 0
    ahead_ms = milliseconds_of(info["last-generated-id"].decode()) - now_ms
    return ahead_ms if ahead_ms > CLOCK_SKEW_MS else 0


def _pending(totals: Totals) -> int:
    """Return the number of pending ids of a stream, as the scripts noted them; a recount corrects it if need be."""
    return max(0, totals.events_noted) + max(0, totals.holds_noted)


def _stranded(client: redis.Redis, partitions: int) -> dict[int, int]:
    """Return the stream entries in streams beyond our number: a producer has another METERFALL_PARTITIONS.

    Asks for every name that a setting allows, in one command while there is none.
    """
    names = {each.number: each.entries for each in keys.partitions_of(MAX_PARTITIONS)[partitions:]}
    if not names or not client.exists(*names.values()):
        return {}
    with client.pipeline(transaction=False) as pipe:
        for name in names.values():
            pipe.xlen(name)
        lags = dict(zip(names, pipe.execute(), strict=True))
    return {number: lag for number, lag in lags.items() if lag}


def backlogs(client: redis.Redis, partitions: int) -> dict[keys.Stream, int]:
    """Return the number of waiting stream entries by partition, the pool's stream included.

    One round trip.
    """
    drained = keys.streams(partitions)
    with client.pipeline(transaction=False) as pipe:
        for stream in drained:
            pipe.xlen(stream.entries)
        return dict(zip(drained, pipe.execute(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


def _spooled(settings: Settings) -> tuple[int, int]:
    """Count the spooled items of this machine; return also the age (ms) of the oldest.

    Raises SpoolUnavailable.
    """
    if settings.spool_path is None:
        return 0, 0
    count, since = Spool(settings.spool_path, settings.spool_max_bytes).count()
    age = datetime.now(UTC) - since if since is not None else timedelta()
    return count, max(0, int(age / _MILLISECOND))


def _line(error: Exception) -> str:
    """Return the first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
