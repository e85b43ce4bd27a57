"""The RQ jobs and their queues. Arguments are numbers, so a failed job reveals no secret.

The proof and the notices have queues of their own, and processes of their own work on them: no drain ever waits behind
a proof, or behind a webhook that hangs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from worker.admin import losses
from worker.consumer import notices, renewals
from worker.consumer.drain import drain_stream
from worker.consumer.outage import Outage
from worker.consumer.refusals import RefusalLog
from worker.consumer.rounds import dispose_together
from worker.consumer.tally import Tally
from worker.crash import crash_point
from worker.keyspace import calls, scripts
from worker.keyspace.connection import connect_queue, redis_now_ms, retries
from worker.keyspace.keys import RING_TTL_MS, Partition, Stream, stream_of, streams
from worker.ledger import reports, summing
from worker.ledger.connection import batch_connection
from worker.ledger.sqlstate import ErrorKind, kind_of
from worker.reports.proof import LedgerWrongError
from worker.reports.proof_run import prove_for
from worker.resources import Resources

# A failed job loses no work: the sweep makes another. RQ keeps it for operators, but not for a whole outage.
FAILURE_TTL_SECONDS = 600
VERIFY_TIMEOUT_SECONDS = 6 * 3_600
MAX_EXPIRIES_A_JOB = 10_000
_outage = Outage()
# Changes of one account in a transaction: a drain may have to wait for it, about 20 ms.
ROLL_UP_ROWS = 1_000
# Changes in a transaction of `sum_up`: an erasure may have to wait for it, about 100 ms.
SUM_UP_CHANGES = 2_000


class QueueRefused(redis.ResponseError):
    """Redis works, but refuses what RQ wants of its own keys: one has a wrong type, or our user may not touch it."""


class QueueAway(redis.ConnectionError):
    """The Redis of the queue does not answer, does not know us, or is a replica. The streams may be on another one."""


@contextmanager
def _using_the_queue() -> Iterator[None]:
    """Raise a refusal of RQ's commands as QueueRefused, and their outage as QueueAway.

    A full Redis refuses all writers, not RQ alone.
    """
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError) as error:
        raise QueueAway(str(error)) from error
    except redis.OutOfMemoryError:
        raise
    except redis.ResponseError as error:
        raise QueueRefused(str(error)) from error


@cache
def resources() -> Resources:
    """Return the resources of this worker process, made at its first job."""
    return Resources.open(load_settings(os.environ))


@cache
def refusals() -> RefusalLog:
    """Return the refusal log of this process; it limits lines across drains."""
    return RefusalLog()


@cache
def tally() -> Tally:
    """Return the counts of this process."""
    return Tally()


def rq_connection(settings: Settings) -> redis.Redis:
    """Return a Redis client for an RQ worker, which waits long for jobs and sets the time-outs for that itself."""
    return connect_queue(settings, socket_timeout=None, socket_connect_timeout=None, retry=retries(settings))


def job_queue(settings: Settings, connection: redis.Redis) -> Queue:
    """Return the queue of all jobs but the proof and the notices."""
    return _queue(settings.queue_name, settings, connection)


def proof_queue(settings: Settings, connection: redis.Redis) -> Queue:
    """Return the queue of the proof."""
    return _queue(f"{settings.queue_name}-proof", settings, connection)


def notice_queue(settings: Settings, connection: redis.Redis) -> Queue:
    """Return the queue of the notices."""
    # A job waits for what is under way: killed before that, it would forget what came of it.
    longest = settings.webhook_time_box_seconds + 2 * settings.webhook_timeout_ms // 1_000
    return _queue(f"{settings.queue_name}-notices", settings, connection, longest)


def _queue(name: str, settings: Settings, connection: redis.Redis, longest_seconds: int = 0) -> Queue:
    """Return a queue. JSON, never pickle."""
    seconds = max(settings.job_timeout_seconds, longest_seconds)
    return Queue(name, connection=connection, serializer=JSONSerializer, default_timeout=seconds)


def enqueue(queue: Queue, name: str, *streams: Stream) -> None:
    """Put one job at the end of the queue; its id names it without a read. Raises QueueRefused and QueueAway."""
    _enqueue(queue, name, [stream.number for stream in streams])


def _enqueue(queue: Queue, name: str, numbers: Sequence[int]) -> None:
    with _using_the_queue():
        queue.enqueue(
            f"worker.jobs.{name}",
            args=list(numbers),
            job_id=f"{_kind_of(name, *numbers)}-{token_hex(4)}",
            description=name,
            result_ttl=0,
            failure_ttl=FAILURE_TTL_SECONDS,
            job_timeout=VERIFY_TIMEOUT_SECONDS if name == "verify" else None,
        )


def enqueue_each(queue: Queue, client: redis.Redis, name: str, streams: Sequence[Stream]) -> None:
    """Put one job per stream into the queue, unless one waits already. Raises QueueRefused and QueueAway."""
    if not streams:
        return
    waiting = {job_id.rpartition("-")[0] for job_id in waiting_jobs(queue)}
    for stream in streams:
        if _kind_of(name, stream.number) in waiting:
            continue
        if name == "drain":
            client.set(stream.rung, "1", nx=True, px=RING_TTL_MS)
        enqueue(queue, name, stream)


def drains(job_id: str) -> int | None:
    """Return the number of the stream that the job of this id drains; None for any other job."""
    kind = job_id.rpartition("-")[0]
    name, _, number = kind.partition("-")
    return int(number) if name == "drain" else None


def waiting_jobs(queue: Queue) -> list[str]:
    """Return the ids of the jobs that wait. Raises QueueRefused and QueueAway."""
    with _using_the_queue():
        return queue.job_ids


def enqueue_proof(queue: Queue, run: int | None = None) -> None:
    """Put a job of the proof into its queue, unless one waits already. Raises QueueRefused.

    With `run` it goes on with the run of this number, and does nothing once that has ended.
    """
    if not waiting_jobs(queue):
        _enqueue(queue, "verify", [] if run is None else [run])


def enqueue_notices(queue: Queue) -> None:
    """Put a job that sends notices into its queue, unless one waits already. Raises QueueRefused."""
    if not waiting_jobs(queue):
        _enqueue(queue, "send_notices", [])


def _kind_of(name: str, *numbers: int) -> str:
    """Return the beginning of the ids of such jobs: jobs of one kind do the same."""
    return "-".join([name, *map(str, numbers)])


@cache
def _own_queue() -> Queue:
    settings = resources().settings
    return job_queue(settings, connect_queue(settings))


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
        together = dispose_together(resources(), turn, refusals(), tally())
        unfinished = unfinished - together.done | together.left
        if turn in together.done:
            _outage.end()
            turn = _next_rung(client, settings.partitions, turn)
            continue
        try:
            done = drain_stream(resources(), turn, stop_at=stop_at, refusals=refusals(), tally=tally())
        except psycopg.OperationalError:
            _outage.begin("Postgres")
            return  # logged, and the stream halted: a failed job would only say it again
        if done.entries:
            _outage.end()
        if done.more:
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
    resources().take_up_catalogues()
    done = renewals.renew_due(resources(), monotonic() + resources().settings.drain_time_box_ms / 1_000)
    if done.more:
        enqueue(_own_queue(), "renew_due")
    if done.accounts:
        logger.info("renew_due: {} accounts, {} ledger entries", done.accounts, done.entries)


def look_for_notices() -> None:
    """Have notices sent if any is due, or has a place in the feed to get, or is old enough to be deleted.

    The process for that starts with the first one: a dyno of accounts without notices has none. If no dyno sends any,
    this deletes the old ones. Safe to repeat.
    """
    settings = resources().settings
    if not settings.webhook_interval_seconds:
        notices.forget_old(resources(), monotonic() + settings.drain_time_box_ms / 1_000)
    elif notices.are_due(resources()):
        enqueue_notices(notice_queue(settings, connect_queue(settings)))


def send_notices() -> None:
    """Send notices to webhooks for a time box; re-enqueue if more are due.

    Safe to run twice or at the same time, and to kill: what was under way is sent again.
    """
    settings = resources().settings
    sent = notices.send_notices(resources(), monotonic() + settings.webhook_time_box_seconds, tally())
    if sent.more:
        enqueue_notices(notice_queue(settings, connect_queue(settings)))


def recount() -> None:
    """Correct the totals of the streams by a scan; log pending ids whose stream entries are lost. Safe to repeat."""
    for stream, stuck in losses.recount(resources()).items():
        logger.error(
            "partition {}: {} pending events have lost their stream entries, and hold their users' units for ever; "
            "`meterfall verify` names them, `meterfall pending reconcile` frees them",
            stream.name, stuck,
        )  # fmt: skip


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


def sum_up() -> None:
    """Sum up usage for the reports over all accounts, for the time box or until a drain waits.

    Re-enqueues for the rest, unless a drain waits: the next interval goes on. A report adds what is not summed up.
    Killed, it loses nothing; two at once do the work of one.
    """
    settings, client = resources().settings, resources().redis
    stop_at = monotonic() + settings.drain_time_box_ms / 1_000
    go_on_at: str | None = ""
    while go_on_at is not None:
        with batch_connection(resources().engine) as postgres:
            go_on_at = summing.sum_up(postgres, go_on_at, SUM_UP_CHANGES).go_on_at
        if _next_rung(client, settings.partitions, Partition(0)) is not None:
            return
        if go_on_at is not None and monotonic() >= stop_at:
            enqueue(_own_queue(), "sum_up")
            return


def verify(run: int | None = None) -> None:
    """Prove balances for the time box; re-enqueue for the rest. Each difference is logged in one line.

    It goes on with the run under way, else begins one; with `run` only with that. A run with a difference fails its
    last job. Ends at once while another process proves. Killed, the sweep has another one go on after its last step.
    """
    resources().take_up_catalogues()
    settings = resources().settings
    done = prove_for(
        resources(),
        settings.verify_time_box_seconds,
        lambda user_id: name_in_logs(user_id, settings.log_user_ids),
        lambda difference: logger.error("verify: {}", difference.text),
        run,
    )
    if done.report is None:
        if done.run is not None and not done.is_taken:
            enqueue_proof(proof_queue(settings, _own_queue().connection), done.run.number)
    elif done.differences:
        raise LedgerWrongError(f"{done.differences} differences")
    else:
        logger.info(
            "verify: {} accounts, {} of them from zero, {} changes, clean",
            done.report.accounts, done.report.from_zero, done.report.changes,
        )  # fmt: skip


def _next_rung(client: redis.Redis, partitions: int, after: Stream) -> Stream | None:
    """Return the next stream in turn that rang and is not paused, None without one.

    The pool has its turn also.
    """
    turns = streams(partitions)
    turns = turns[turns.index(after) + 1 :] + turns[: turns.index(after) + 1]
    rung = cast("list[bytes | None]", client.mget([turn.rung for turn in turns]))
    candidates = [turn for turn, mark in zip(turns, rung, strict=True) if mark is not None]
    return next((turn for turn in candidates if not client.exists(turn.paused)), None)
