"""The RQ worker process, `python -m worker.consumer.worker_process`; the supervisor starts and watches it."""

from __future__ import annotations

import gc
import logging
import os
import sys
from time import sleep
from types import FrameType
from typing import Any

import redis
from loguru import logger
from rq import SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer

from config.log import configure_logging, described
from config.settings import Settings, load_settings
from worker.consumer.jobs import job_queue, resources, rq_connection
from worker.keyspace import keys

MAINTENANCE_SECONDS = 60
# RQ waits for jobs, and for a connection that died silently, about as long as this.
WORKER_TTL_SECONDS = 30
# Interval of attempts to reach an absent Redis, at the start.
ASK_AGAIN_SECONDS = 0.2


class JobFailed(RuntimeError):
    """A job failed; the message says where."""


class DiscreetJob(Job):
    """A job with failures that quote no user data: RQ logs their text, and keeps it in Redis for a while."""

    def perform(self) -> Any:
        """Do the work. Raises JobFailed with the traceback of the error."""
        try:
            return super().perform()
        except Exception as error:  # noqa: BLE001 - raised again in other words
            raise JobFailed(described(error)).with_traceback(error.__traceback__) from None


class DynoWorker(SimpleWorker):
    """RQ's worker with jobs in this process, so that SIGTERM to the whole dyno lets the batch in hand finish."""

    # RQ would retry an absent Redis less and less often, in the end once a minute, and find it up to a minute late.
    max_connection_wait_time = 1.0

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """Ignore a second SIGTERM; RQ would raise SystemExit inside the job."""


def make_worker(settings: Settings, connection: redis.Redis) -> DynoWorker:
    """Return the worker of our one queue.

    With one queue RQ moves a job into a list until it starts, so a kill loses none.
    """
    return DynoWorker(
        [job_queue(settings, connection)],
        connection=connection,
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
    is_logged = False
    while True:
        try:
            connection.delete(keys.NOTHING)
        except (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError) as error:
            if not is_logged:
                logger.warning("a worker process waits for Redis: {}", described(error))
            is_logged = True
            sleep(ASK_AGAIN_SECONDS)
        else:
            return


def main() -> int:
    """Wait for Redis, then work until a signal to stop.

    Exit code 0 after SIGTERM, 1 if a job lost Redis.
    """
    settings = load_settings(os.environ)
    configure_logging(settings.log_level)
    logging.getLogger("rq.worker").setLevel(logging.WARNING)
    spare_collections()
    connection = rq_connection(settings)
    wait_for_redis(connection)
    worker = make_worker(settings, connection)
    worker.work(logging_level="WARNING")
    resources().close()
    return 0 if worker._stop_requested or worker._shutdown_requested_date else 1  # noqa: SLF001


if __name__ == "__main__":
    sys.exit(main())
