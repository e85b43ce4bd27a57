"""The RQ worker process, `python -m worker.consumer.worker_process [PIPE]`; the supervisor starts and watches it.

PIPE is the number of the inherited pipe that takes its counts (worker/consumer/tally.py).
`worker.consumer.proof_process` and `worker.consumer.notice_process` do the same for the queues of the proof and the
notices.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from time import sleep
from types import FrameType
from typing import Any, Literal

import redis
from loguru import logger
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer

from config.catalogue import catalogue_of
from config.log import configure_logging, described, is_expected, places_of
from config.settings import Settings, load_settings
from worker.consumer import sentry
from worker.consumer.faults import fault_of
from worker.consumer.heart import Heart
from worker.consumer.jobs import job_queue, resources, rq_connection, tally
from worker.consumer.outage import Outage
from worker.keyspace import keys
from worker.keyspace.connection import connect
from worker.reports import counts

MAINTENANCE_SECONDS = 60
# RQ waits for jobs, and for a connection that died silently, about as long as this.
WORKER_TTL_SECONDS = 30
# Interval of attempts to reach an absent Redis, at the start.
ASK_AGAIN_SECONDS = 0.2


class JobFailed(RuntimeError):
    """A job failed; the message says why. `is_expected`: a server was at fault, see `config.log.is_expected`."""

    def __init__(self, message: str, *, is_expected: bool) -> None:
        super().__init__(message)
        self.is_expected = is_expected


class DiscreetJob(Job):
    """A job with failures that quote no user data: RQ logs their text, and keeps it in Redis for a while."""

    def perform(self) -> Any:
        """Do the work. Raises JobFailed with the traceback of the error."""
        try:
            return super().perform()
        except Exception as error:  # noqa: BLE001 - raised again in other words
            sentry.report(error)
            failed = JobFailed(described(error), is_expected=is_expected(error))
            raise failed.with_traceback(error.__traceback__) from None


class DynoWorker(SimpleWorker):
    """RQ's worker with jobs in this process, so that SIGTERM to the whole dyno lets the batch in hand finish."""

    # RQ would retry an absent Redis less and less often, in the end once a minute, and find it up to a minute late.
    max_connection_wait_time = 1.0
    heart: Heart | None = None

    def perform_job(self, job: Job, queue: Queue) -> bool:
        """Do a job, and let the heartbeats say so: no command of its own."""
        if self.heart is None:
            return super().perform_job(job, queue)
        with self.heart.doing(" ".join([job.description or "", *map(str, job.args)])):
            return super().perform_job(job, queue)

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """Log a failed job in one line; RQ would log its traceback each time."""
        error = exc_info[1]
        message = str(error) if isinstance(error, JobFailed) else described(error)
        logger.bind(cause=f"{job.description}: {message}").error(
            "job {} failed: {}{}", job.id, message, places_of(error)
        )

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """Ignore a second SIGTERM; RQ would raise SystemExit inside the job."""


def make_worker(queue: Queue) -> DynoWorker:
    """Return the worker of one queue.

    With one queue RQ moves a job into a list until it starts, so a kill loses none.
    """
    return DynoWorker(
        [queue],
        connection=queue.connection,
        job_class=DiscreetJob,
        serializer=JSONSerializer,
        log_job_description=False,
        maintenance_interval=MAINTENANCE_SECONDS,
        worker_ttl=WORKER_TTL_SECONDS,
    )


def spare_collections() -> None:
    """Collect garbage less often: a batch makes many objects and no cycles.

    A collection after every 700 objects costs a fifth of the throughput.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def wait_for_redis(connection: redis.Redis) -> None:
    """Return after Redis answers and takes writes.

    A restarted Redis loads its data first, a former primary may be a replica, and RQ ends a worker that cannot
    register. A process that starts only after that takes a second or two more than this warm one.
    """
    outage = Outage()
    while True:
        try:
            connection.delete(keys.NOTHING)
        except (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError) as error:
            outage.begin("Redis")
            logger.warning("a worker process waits for Redis: {}", described(error))
            sleep(ASK_AGAIN_SECONDS)
        else:
            outage.end()
            return


def count_for_supervisor(settings: Settings, pipes: Sequence[str]) -> None:
    """Let the counts go to the first of these pipes, if any. Raises CatalogueError.

    What may be counted by meter begins at 0, so that Prometheus sees the first increase.
    """
    if not pipes:
        return
    tally().pipe = int(pipes[0])
    for metric in (counts.UNCOLLECTED_EVENTS, counts.UNCOLLECTED_UNITS):
        tally().count(metric, dict.fromkeys(catalogue_of(settings).meters, 0))
    tally().send()


def work(
    role: Literal["worker", "proof", "notices"],
    queue_of: Callable[[Settings, redis.Redis], Queue],
    pipes: Sequence[str] = (),
) -> int:
    """Wait for Redis, then work on a queue until a signal to stop. `role` is that of the heartbeats.

    The counts go to the first of `pipes`, if any.

    Exit code 0 after SIGTERM, 1 if a job lost Redis.
    """
    settings = load_settings(os.environ)
    configure_logging(settings.log_level, settings.log_format)
    sentry.set_up(os.environ)
    spare_collections()
    count_for_supervisor(settings, pipes)
    connection = rq_connection(settings)
    try:
        wait_for_redis(connection)
    except redis.ResponseError as error:
        logger.error("a {} process ends: {}", role, fault_of(error, settings, of_queue=True) or described(error))
        return 1
    worker = make_worker(queue_of(settings, connection))
    worker.heart = heart = Heart(role, settings)
    client = connect(settings)
    heart.beat_always(client)
    try:
        worker.work(logging_level="WARNING")
    except redis.RedisError as error:  # RQ could not even take itself off its list of workers
        logger.warning("a {} process ends without Redis: {}", role, described(error))
        return 1
    heart.stop(client)
    resources().close()
    return 0 if worker._stop_requested or worker._shutdown_requested_date else 1  # noqa: SLF001


if __name__ == "__main__":
    sys.exit(work("worker", job_queue, sys.argv[1:]))
