"""One dyno: RQ worker processes, one for the proof, one for notices, and the supervisor that wakes them.

The supervisor listens to the doorbell and turns a ring into a drain job, at most one waiting per partition. One
supervisor at a time, by lease, also sweeps (worker/consumer/sweep.py). It restarts a child process that dies
(worker/consumer/child.py). While Redis has no memory for jobs, or refuses RQ its keys, the supervisor drains by itself;
so it does while a queue on a Redis of its own does not answer.
"""

from __future__ import annotations

import os
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
from worker.consumer import jobs, sentry
from worker.consumer.child import RESTART_SECONDS, Child, stop_all
from worker.consumer.drain import drain_stream
from worker.consumer.endpoint import Endpoint
from worker.consumer.faults import fault_of
from worker.consumer.heart import Heart
from worker.consumer.outage import Outage
from worker.consumer.start import log_start
from worker.consumer.sweep import Sweep
from worker.consumer.tally import Tally
from worker.crash import crash_point
from worker.errors import BillingError
from worker.keyspace import keys
from worker.keyspace.connection import connect, connect_queue
from worker.ledger.connection import LedgerError
from worker.ledger.faults import require_rights
from worker.reports.status import backlogs
from worker.resources import Resources

SPOOLED_A_SWEEP = 1_000
# The proof and the notices give way to all else that wants a processor of their machine.
_NICENESS = 10


class Supervisor:
    """Turns doorbells and backlogs into jobs, and keeps the worker processes alive."""

    def __init__(self, settings: Settings, environ: dict[str, str], processes: int = 1) -> None:
        """`processes` worker processes share the queue, one more proves, one sends notices; none is started yet."""
        self._settings = settings
        self._drained = keys.streams(settings.partitions)
        self._client = connect(settings)
        self._rq_client = connect_queue(settings)
        self._queue = jobs.job_queue(settings, self._rq_client)
        self._notices = jobs.notice_queue(settings, self._rq_client)
        self.sweep = Sweep(settings, self._client, self._queue, jobs.proof_queue(settings, self._rq_client))
        self._billing = Billing(settings) if settings.spool_path is not None else None
        self._resources: Resources | None = None
        self._stopping = False
        self._outage = Outage()
        self._heart = Heart("supervisor", settings)
        self._endpoint = Endpoint(settings)
        self._tally = Tally(self._endpoint.pipe)
        self._workers = [Child(environ, pipe=self._endpoint.pipe) for _ in range(processes)]
        self._prover = Child(environ, "worker.consumer.proof_process", "proof process", _NICENESS)
        self._sender = Child(
            environ, "worker.consumer.notice_process", "notice process", _NICENESS, self._endpoint.pipe
        )
        self._proves = self._looks = self._sends = self._has_sent = False

    def run(self, *, burst: bool) -> int:
        """Work until SIGTERM or SIGINT; with `burst`, without a proof, until each stream is empty or its entries wait.

        It waits for a server that does not answer, at start and at work; with `burst` it raises the server's error. At
        its end the worker finishes the batch in hand. A worker that takes longer than the stop timeout is killed, which
        loses nothing.
        Returns the exit code: with `burst` 1 if a stream is not empty, as it is halted or paused, or its entries wait
        for a catalogue, else 0.
        Raises LedgerError and CatalogueError if this dyno's settings differ from the ledger's, or a server refuses them
        at the start: waiting mends neither, and a platform restarts the dyno. At work a dyno says such a refusal once a
        minute and tries again, as it worked before.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        started_at = next_sweep = monotonic()
        has_jobs, has_started = True, False
        self._proves = not burst and self._settings.verify_interval_seconds > 0
        self._looks = not burst
        self._sends = self._looks and self._settings.webhook_interval_seconds > 0
        try:
            self._endpoint.start()
            self._claim(patiently=not burst)
            has_started = True
            if burst:  # what waited before may wait no more
                self._client.delete(*[stream.waiting for stream in self._drained])
            while not self._stopping:
                if has_jobs:  # without them a worker process cannot even register
                    self._keep_workers()
                try:
                    self._listen(max(0.01, next_sweep - monotonic()))
                    if monotonic() >= next_sweep:
                        next_sweep = monotonic() + self._settings.sweep_interval_ms / 1_000
                        self._look_around(leads=burst)
                        has_jobs = has_jobs or self._has_queue()
                        self._outage.end()
                        if burst and self._is_done():
                            self._tell_waiting()
                            break
                except redis.RedisError as error:
                    if burst and not isinstance(error, redis.OutOfMemoryError):
                        raise
                    if self._lacks_only_jobs(error):
                        has_jobs = False
                        self._drain_without_jobs(error)
                    else:
                        self._miss(error)
            return 1 if burst and not self._stopping and self._backlogs() else 0
        finally:
            stop_all([*self._workers, self._prover, self._sender], self._settings.stop_timeout_seconds)
            self._heart.stop(self._client)
            self._endpoint.stop()
            for opened in (self._resources, self._billing):
                if opened is not None:
                    opened.close()
            if has_started:
                logger.info("meterfall stopped after {:.0f} s, pid {}", monotonic() - started_at, os.getpid())

    def _claim(self, *, patiently: bool) -> None:
        """Agree on the number of partitions with both servers, once they answer.

        A platform may start the servers after us.
        """
        with closing(Resources.open(self._settings)) as resources:
            while not self._stopping:
                try:
                    resources.claim()
                    require_rights(resources.engine)
                    self._require_queue(patiently=patiently)
                except (redis.RedisError, psycopg.Error) as error:
                    if (fault := fault_of(error, self._settings)) is not None:
                        raise LedgerError(fault) from None
                    if not patiently or not isinstance(error, redis.RedisError | psycopg.OperationalError):
                        raise
                    self._miss(error)
                else:
                    self._outage.end()
                    log_start(resources)
                    return

    def _look_around(self, *, leads: bool) -> None:
        """Tell that this dyno lives, send what is spooled, and sweep if it leads, by lease or because it is told so."""
        self._heart.beat(self._client)
        self._send_spooled()
        self._has_sent = self._has_sent or (self._sends and bool(jobs.waiting_jobs(self._notices)))
        if self.sweep.leads() or leads:
            self.sweep.run(proves=self._proves, looks=self._looks)

    def _keep_workers(self) -> None:
        """Start the worker processes, the one for the proof, and once there are notices theirs; restart the dead."""
        if self._proves:
            self._keep(self._prover)
        if self._has_sent:
            self._keep(self._sender)
        wanted = [child for child in self._workers if child.is_wanted()]
        if any(child.died_at_once() for child in wanted):
            self._pause()
        for child in wanted:
            child.start()

    def _keep(self, child: Child) -> None:
        """Start a process beside the workers; restart it if it died, without a wait that holds up the doorbell."""
        if not child.died_at_once() and child.is_wanted():
            child.start()

    def _send_spooled(self) -> None:
        """Send a part of this machine's spool, if it has one."""
        if self._billing is None:
            return
        try:
            self._billing.send_spooled(SPOOLED_A_SWEEP)
        except BillingError as error:
            logger.warning("what is in the spool stays there: {}", described(error))

    def _has_queue(self) -> bool:
        """Return True if RQ may use its queue again. Raises QueueRefused."""
        jobs.waiting_jobs(self._queue)
        return True

    def _require_queue(self, *, patiently: bool) -> None:
        """Raise LedgerError if the queue has a Redis of its own that refuses us; if not `patiently`, or is away."""
        if self._settings.queue_redis_url is None:
            return
        try:
            jobs.waiting_jobs(self._queue)
        except redis.RedisError as error:
            fault = fault_of(error, self._settings, of_queue=True)
            if fault is None and not patiently:
                address = without_secrets(self._settings.queue_redis_url)
                fault = f"METERFALL_QUEUE_REDIS_URL: {address} does not answer: {error}"
            if fault is not None:
                raise LedgerError(fault) from None

    def _lacks_only_jobs(self, error: redis.RedisError) -> bool:
        """True if the streams can be drained all the same: only RQ lacks memory, rights, or a Redis of its own."""
        is_own = self._settings.queue_redis_url is not None
        if isinstance(error, jobs.QueueAway):
            return is_own
        return isinstance(error, redis.OutOfMemoryError | jobs.QueueRefused)

    def _drain_without_jobs(self, error: redis.RedisError) -> None:
        """Drain every stream here, for at most the time box each; `error` says why there are no jobs.

        A job takes memory of Redis, and keys that RQ may use; a drain only gives memory back. Workers and other dynos
        may do the same at the same time: the partition's lock decides.
        """
        if isinstance(error, redis.OutOfMemoryError):
            logger.warning("Redis has no memory for jobs, draining without them: {}", described(error))
        else:
            fault = fault_of(error, self._settings, of_queue=True)
            logger.warning("{}, draining without jobs", fault or f"no queue: {described(error)}")
        if self._resources is None:
            self._resources = Resources.open(self._settings)
        for stream in self._drained:
            if self._stopping:
                return
            try:
                stop_at = monotonic() + self._settings.drain_time_box_ms / 1_000
                drain_stream(self._resources, stream, stop_at=stop_at, tally=self._tally)
            except Exception as error:  # noqa: BLE001 - as with a job: the next sweep tries again, nothing is lost
                sentry.report(error)
                logger.bind(cause=f"not drained: {described(error)}").warning(
                    "partition {} was not drained: {}", stream.name, described(error)
                )

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
        """True if nothing is in hand or queued, and all streams but stopped ones are empty.

        Stream entries that wait for a catalogue do not count: each sweep has their stream drained again.
        """
        waiting = self._waiting()
        others = [each for each in self._drained if each not in waiting]
        stopped = [each for each in others if self._client.exists(each.halted, each.paused)]
        busy = any(self._client.exists(each.busy) for each in others)
        queued = [
            job for job in jobs.waiting_jobs(self._queue) if jobs.drains(job) not in {each.number for each in waiting}
        ]
        return not busy and set(self._backlogs()) <= {*stopped, *waiting} and not queued

    def _waiting(self) -> dict[keys.Stream, int]:
        """Return the streams with nothing but entries that wait for a catalogue, and their number."""
        marks = cast("list[bytes | None]", self._client.mget([stream.waiting for stream in self._drained]))
        lags = backlogs(self._client, self._settings.partitions)
        return {
            stream: int(mark)
            for stream, mark in zip(self._drained, marks, strict=True)
            if mark is not None and int(mark) == lags[stream]
        }

    def _tell_waiting(self) -> None:
        """Log how many stream entries wait for a catalogue."""
        for stream, number in self._waiting().items():
            logger.warning(
                "partition {}: {} stream entries wait for a catalogue and stay; `meterfall catalogue apply FILE`, then "
                "start again", stream.name, number,
            )  # fmt: skip

    def _backlogs(self) -> list[keys.Stream]:
        """Return the streams that are not empty."""
        return [stream for stream, lag in backlogs(self._client, self._settings.partitions).items() if lag]

    # -- Servers that do not answer ------------------------------------------------------------------------------------

    def _request_stop(self, signum: int, _frame: object) -> None:
        logger.info("{}: finishing the batch in hand", signal.Signals(signum).name)
        self._stopping = True

    def _miss(self, error: redis.RedisError | psycopg.OperationalError) -> None:
        """Log which server does not answer, and wait a moment."""
        if isinstance(error, jobs.QueueAway):
            error = cast("redis.RedisError", error.__cause__)
        is_redis = isinstance(error, redis.RedisError)
        url = self._settings.redis_url if is_redis else self._settings.database_url or ""
        server = f"{'Redis' if is_redis else 'Postgres'} at {without_secrets(url)}"
        what = "refuses" if isinstance(error, redis.ResponseError) else "is away"
        self._outage.begin(server)
        fault = fault_of(error, self._settings)
        logger.warning("{}", fault or f"{server} {what}, trying again: {described(error)}")
        self._pause()

    def _pause(self) -> None:
        """Wait a moment before the next attempt."""
        select.select([], [], [], RESTART_SECONDS)
