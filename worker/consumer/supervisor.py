"""One dyno: an RQ worker process, and the supervisor that wakes it.

The supervisor listens to the doorbell and turns a ring into a drain job, at most one waiting per partition. One
supervisor at a time, by lease, also sweeps (worker/consumer/sweep.py). It restarts the worker process when that dies
(worker/consumer/child.py). While Redis has no memory for jobs, the supervisor drains by itself.
"""

from __future__ import annotations

import select
import signal
from contextlib import closing
from time import monotonic
from typing import cast

import psycopg
import redis
from loguru import logger

from config.log import described
from config.settings import Settings, without_secrets
from worker.client import Billing
from worker.consumer import jobs
from worker.consumer.child import RESTART_SECONDS, Child
from worker.consumer.drain import drain_stream
from worker.consumer.start import log_start
from worker.consumer.sweep import Sweep
from worker.crash import crash_point
from worker.errors import BillingError
from worker.keyspace import keys
from worker.keyspace.connection import connect
from worker.reports.status import backlogs
from worker.resources import Resources

SPOOLED_A_SWEEP = 1_000
# An outage of hours makes a line a minute, not one a second.
_WARN_AGAIN_SECONDS = 60.0


class Supervisor:
    """Turns doorbells and backlogs into jobs, and keeps one worker process alive."""

    def __init__(self, settings: Settings, environ: dict[str, str]) -> None:
        self._settings = settings
        self._drained = keys.streams(settings.partitions)
        self._client = connect(settings)
        self._rq_client = jobs.rq_connection(settings)
        self._queue = jobs.job_queue(settings, self._rq_client)
        self.sweep = Sweep(settings, self._client, self._queue)
        self._child = Child(environ)
        self._billing = Billing(settings) if settings.spool_path is not None else None
        self._resources: Resources | None = None
        self._stopping = False
        self._missed = ""
        self._warned: dict[str, tuple[str, float]] = {}

    def run(self, *, burst: bool) -> int:
        """Work until SIGTERM or SIGINT; with `burst` until every stream is empty.

        It waits for a server that does not answer, at start and at work; with `burst` it raises the server's error. At
        its end the worker finishes the batch in hand. A worker that takes longer than the stop timeout is killed, which
        loses nothing.
        Returns the exit code: with `burst` 1 if a halted or paused stream is not empty, else 0.
        Raises LedgerError and CatalogueError if this dyno's settings differ from the ledger's.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        next_sweep = monotonic()
        has_memory = True
        try:
            self._claim(patiently=not burst)
            while not self._stopping:
                if has_memory:  # without it a worker process cannot even register
                    self._keep_child()
                try:
                    self._listen(max(0.01, next_sweep - monotonic()))
                    if monotonic() >= next_sweep:
                        next_sweep = monotonic() + self._settings.sweep_interval_ms / 1_000
                        self._send_spooled()
                        if self.sweep.leads() or burst:
                            self.sweep.run()
                        has_memory = True
                        self._note_answer()
                        if burst and self._is_done():
                            break
                except redis.OutOfMemoryError as error:
                    has_memory = False
                    logger.warning("Redis has no memory for jobs, draining without them: {}", described(error))
                    self._drain_without_jobs()
                except redis.RedisError as error:
                    if burst:
                        raise
                    self._miss(error)
            return 1 if burst and not self._stopping and self._backlogs() else 0
        finally:
            self._child.stop(self._settings.stop_timeout_seconds)
            for opened in (self._resources, self._billing):
                if opened is not None:
                    opened.close()

    def _claim(self, *, patiently: bool) -> None:
        """Agree on the number of partitions with both servers, once they answer.

        A platform may start the servers after us.
        """
        with closing(Resources.open(self._settings)) as resources:
            while not self._stopping:
                try:
                    resources.claim()
                except (redis.RedisError, psycopg.OperationalError) as error:
                    if not patiently:
                        raise
                    self._miss(error)
                else:
                    self._note_answer()
                    log_start(resources)
                    return

    def _keep_child(self) -> None:
        """Start the worker process; restart it if it died."""
        if self._child.is_wanted():
            if self._child.died_at_once():
                self._pause()
            self._child.start()

    def _send_spooled(self) -> None:
        """Send a part of this machine's spool, if it has one."""
        if self._billing is None:
            return
        try:
            self._billing.send_spooled(SPOOLED_A_SWEEP)
        except BillingError as error:
            self._warn("what is in the spool stays there", error)

    def _drain_without_jobs(self) -> None:
        """Drain every stream here, for at most the time box each.

        A job takes memory of Redis; a drain only gives memory back. Workers and other dynos may do the same at the same
        time: the partition's lock decides.
        """
        if self._resources is None:
            self._resources = Resources.open(self._settings)
        for stream in self._drained:
            if self._stopping:
                return
            try:
                stop_at = monotonic() + self._settings.drain_time_box_ms / 1_000
                drain_stream(self._resources, stream, stop_at=stop_at)
            except Exception as error:  # noqa: BLE001 - as with a job: the next sweep tries again, nothing is lost
                logger.warning("partition {} was not drained: {}", stream.name, described(error))

    # -- Doorbell -----------------------------------------------------------------------------------------------------

    def _listen(self, seconds: float) -> None:
        """Wait for the doorbell, at most `seconds`; enqueue drains of its streams."""
        heard = self._client.blpop([keys.BELL], timeout=seconds)
        if heard is None:
            return
        crash_point("after_doorbell")
        more = self._client.lpop(keys.BELL, len(self._drained)) or []
        rang = {cast("tuple[bytes, bytes]", heard)[1], *cast("list[bytes]", more)}
        # A producer may push anything onto the bell.
        rung = [stream for stream in self._drained if str(stream.number).encode() in rang]
        wanted = [stream for stream in rung if not self._client.exists(stream.paused)]
        jobs.enqueue_each(self._queue, self._client, "drain", wanted)

    def _is_done(self) -> bool:
        """True if nothing is in hand or queued, and all streams but stopped ones are empty."""
        stopped = [each for each in self._drained if self._client.exists(each.halted, each.paused)]
        busy = any(self._client.exists(each.busy) for each in self._drained)
        return not busy and set(self._backlogs()) <= set(stopped) and not self._queue.job_ids

    def _backlogs(self) -> list[keys.Stream]:
        """Return the streams that are not empty."""
        return [stream for stream, lag in backlogs(self._client, self._settings.partitions).items() if lag]

    # -- Servers that do not answer ------------------------------------------------------------------------------------

    def _request_stop(self, signum: int, _frame: object) -> None:
        logger.info("{}: finishing the batch in hand", signal.Signals(signum).name)
        self._stopping = True

    def _miss(self, error: redis.RedisError | psycopg.OperationalError) -> None:
        """Log which server does not answer, and wait a moment."""
        is_redis = isinstance(error, redis.RedisError)
        url = self._settings.redis_url if is_redis else self._settings.database_url or ""
        self._missed = f"{'Redis' if is_redis else 'Postgres'} at {without_secrets(url)}"
        what = "refuses" if isinstance(error, redis.ResponseError) else "is away"
        self._warn(f"{self._missed} {what}, trying again", error)
        self._pause()

    def _note_answer(self) -> None:
        """Log that the missed server answers again."""
        if self._missed:
            logger.info("{} answers", self._missed)
            self._warned.clear()
        self._missed = ""

    def _warn(self, about: str, error: Exception) -> None:
        """Log a warning; repeat the same one only after a while."""
        description, now = described(error), monotonic()
        before, at = self._warned.get(about, ("", 0.0))
        if description != before or now >= at + _WARN_AGAIN_SECONDS:
            logger.warning("{}: {}", about, description)
            self._warned[about] = description, now

    def _pause(self) -> None:
        """Wait a moment before the next attempt."""
        select.select([], [], [], RESTART_SECONDS)
