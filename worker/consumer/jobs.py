"""The RQ jobs and their queue. Arguments are partition numbers, so a failed job reveals no secret."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from secrets import token_hex
from time import monotonic
from typing import cast

import psycopg
import redis
from loguru import logger
from rq import Queue
from rq.serializers import JSONSerializer

from config.log import name_in_logs
from config.settings import Settings, load_settings
from worker.consumer import renewals
from worker.consumer.drain import drain_stream
from worker.consumer.refusals import RefusalLog
from worker.crash import crash_point
from worker.keyspace import calls, scripts
from worker.keyspace.connection import redis_now_ms, retries
from worker.keyspace.keys import RING_TTL_MS, Partition, Stream, stream_of, streams
from worker.ledger import reports
from worker.ledger.connection import batch_connection
from worker.ledger.sqlstate import ErrorKind, kind_of
from worker.reports.proof import LedgerWrongError, verify_ledger
from worker.resources import Resources

# A failed job loses no work: the sweep makes another. RQ keeps it for operators, but not for a whole outage.
FAILURE_TTL_SECONDS = 600
VERIFY_TIMEOUT_SECONDS = 6 * 3_600
MAX_EXPIRIES_A_JOB = 10_000
# Changes of one account in a transaction: a drain may have to wait for it, about 20 ms.
ROLL_UP_ROWS = 1_000


@cache
def resources() -> Resources:
    """Return the resources of this worker process, made at its first job."""
    return Resources.open(load_settings(os.environ))


@cache
def refusals() -> RefusalLog:
    """Return the refusal log of this process; it limits lines across drains."""
    return RefusalLog()


def rq_connection(settings: Settings) -> redis.Redis:
    """Return a Redis client for RQ alone.

    A job enqueued twice does no harm, so the client may repeat its commands.
    """
    return redis.Redis.from_url(
        settings.redis_url,
        retry=retries(settings),
        retry_on_error=[redis.exceptions.ReadOnlyError],
        driver_info=None,
    )


def job_queue(settings: Settings, connection: redis.Redis) -> Queue:
    """Return the queue of all jobs. JSON, never pickle."""
    return Queue(
        settings.queue_name,
        connection=connection,
        serializer=JSONSerializer,
        default_timeout=settings.job_timeout_seconds,
    )


def enqueue(queue: Queue, name: str, *streams: Stream) -> None:
    """Put one job at the end of the queue; its id names it without a read."""
    queue.enqueue(
        f"worker.jobs.{name}",
        args=[stream.number for stream in streams],
        job_id=f"{_kind_of(name, *streams)}-{token_hex(4)}",
        description=name,
        result_ttl=0,
        failure_ttl=FAILURE_TTL_SECONDS,
        job_timeout=VERIFY_TIMEOUT_SECONDS if name == "verify" else None,
    )


def enqueue_each(queue: Queue, client: redis.Redis, name: str, streams: Sequence[Stream]) -> None:
    """Put one job per stream into the queue, unless one waits already."""
    if not streams:
        return
    waiting = {job_id.rpartition("-")[0] for job_id in queue.job_ids}
    for stream in streams:
        if _kind_of(name, stream) in waiting:
            continue
        if name == "drain":
            client.set(stream.rung, "1", nx=True, px=RING_TTL_MS)
        enqueue(queue, name, stream)


def _kind_of(name: str, *streams: Stream) -> str:
    """Return the beginning of the ids of such jobs: jobs of one kind do the same."""
    return "-".join([name, *(str(stream.number) for stream in streams)])


@cache
def _own_queue() -> Queue:
    settings = resources().settings
    return job_queue(settings, rq_connection(settings))


def drain(number: int) -> None:
    """Drain the stream `number` for at most the time box; re-enqueue for the rest.

    Other streams whose doorbell rang get the rest of the time box: they need not wait for jobs of their own, which then
    find nothing to do. Safe to run twice or at the same time: identity and the lock decide.
    """
    crash_point("after_job_taken")
    settings, client = resources().settings, resources().redis
    stop_at = monotonic() + settings.drain_time_box_ms / 1_000
    turn: Stream | None = stream_of(number)
    unfinished: set[Stream] = set()
    while turn is not None and monotonic() < stop_at:
        unfinished.discard(turn)
        try:
            more = drain_stream(resources(), turn, stop_at=stop_at, refusals=refusals()).more
        except psycopg.OperationalError:
            return  # logged, and the stream halted: a failed job would only add a traceback, every time
        if more:
            unfinished.add(turn)
            client.set(turn.rung, "1", nx=True, px=RING_TTL_MS)
        turn = _next_rung(client, settings.partitions, turn)
    for stream in sorted(unfinished, key=lambda each: each.number):
        enqueue(_own_queue(), "drain", stream)


def expire_holds(number: int) -> None:
    """Take expired holds of the stream `number` out of pending.

    Checks do the same for their own user.
    """
    client, stream = resources().redis, stream_of(number)
    due = client.zrange(stream.expiries, "-inf", redis_now_ms(client), byscore=True, offset=0, num=MAX_EXPIRIES_A_JOB)
    scripts.run_all(client, [calls.expire(stream, member.decode()) for member in cast("list[bytes]", due)])


def renew_due() -> None:
    """Store due boundaries and changes for at most the time box; re-enqueue if more.

    Safe to repeat: a stored boundary is due no more.
    """
    done = renewals.renew_due(resources(), monotonic() + resources().settings.drain_time_box_ms / 1_000)
    if done.more:
        enqueue(_own_queue(), "renew_due")
    if done.accounts:
        logger.info("renew_due: {} accounts, {} ledger entries", done.accounts, done.entries)


def roll_up(number: int) -> None:
    """Update the roll-ups of marked accounts for the time box, or until a drain waits.

    The sweep enqueues it again while there is more. Killed, it loses a mark; the account's next mark makes up for it.
    """
    settings, client, partition = resources().settings, resources().redis, Partition(number)
    marked = partition.unrolled
    stop_at = monotonic() + settings.drain_time_box_ms / 1_000
    while (user := cast("bytes | None", client.spop(marked))) is not None:
        try:
            with batch_connection(resources().engine) as postgres:
                more = reports.roll_up(postgres, user.decode(), ROLL_UP_ROWS)
        except psycopg.Error as error:
            if kind_of(error) is ErrorKind.TRANSIENT:
                client.sadd(marked, user)
            raise
        if more:
            client.sadd(marked, user)
        if monotonic() >= stop_at or _next_rung(client, settings.partitions, partition) is not None:
            break


def verify() -> None:
    """Prove every balance. A difference fails the job; each is logged in one line."""
    report = verify_ledger(resources(), named=lambda user_id: name_in_logs(user_id, resources().settings.log_user_ids))
    for difference in report.differences:
        logger.error("verify: {}", difference)
    if report.differences:
        raise LedgerWrongError(f"{len(report.differences)} differences")
    logger.info("verify: {} accounts, {} changes, clean", report.accounts, report.changes)


def _next_rung(client: redis.Redis, partitions: int, after: Stream) -> Stream | None:
    """Return the next stream in turn that rang and is not paused, None without one.

    The pool has its turn also.
    """
    turns = streams(partitions)
    turns = turns[turns.index(after) + 1 :] + turns[: turns.index(after) + 1]
    with client.pipeline(transaction=False) as pipe:
        for turn in turns:
            pipe.exists(turn.rung)
            pipe.exists(turn.paused)
        replies = pipe.execute()
    found = zip(turns, replies[0::2], replies[1::2], strict=True)
    return next((turn for turn, rung, paused in found if rung and not paused), None)
