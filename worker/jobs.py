"""The RQ jobs, and the queue they wait in. Arguments are partition numbers, so a failed job tells nothing secret."""

from __future__ import annotations

import os
from functools import cache
from secrets import token_hex

import redis
from rq import Queue
from rq.serializers import JSONSerializer

from config.settings import Settings, load_settings
from worker import keys
from worker.drain import Drain, Tools

FAILURE_TTL_SECONDS = 6 * 3_600


@cache
def tools() -> Tools:
    """The tools of this worker process, made at its first job."""
    return Tools.open(load_settings(os.environ))


def rq_connection(settings: Settings) -> redis.Redis:
    """A Redis client for RQ alone."""
    return redis.Redis.from_url(settings.redis_url)


def job_queue(settings: Settings, connection: redis.Redis) -> Queue:
    """The queue of all jobs. JSON, never pickle."""
    return Queue(
        settings.queue_name,
        connection=connection,
        serializer=JSONSerializer,
        default_timeout=settings.job_timeout_seconds,
    )


def enqueue(queue: Queue, name: str, *partitions: int) -> None:
    """Put one job at the end of the queue; its id tells what it is without reading it."""
    queue.enqueue(
        f"worker.jobs.{name}",
        args=partitions,
        job_id="-".join([name, *map(str, partitions), token_hex(4)]),
        description=name,
        result_ttl=0,
        failure_ttl=FAILURE_TTL_SECONDS,
    )


@cache
def _own_queue() -> Queue:
    settings = tools().settings
    return job_queue(settings, rq_connection(settings))


def drain(partition: int) -> None:
    """Drain one partition for at most the time box; goes to the end of the queue again while there is more.

    Safe to run twice or at the same time: identity and the partition's lock decide.
    """
    report = Drain(tools(), partition).run()
    if report.more and tools().redis.set(keys.rung(partition), "1", nx=True, px=RING_TTL_MS):
        enqueue(_own_queue(), "drain", partition)


RING_TTL_MS = 60_000
