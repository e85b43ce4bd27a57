"""One dyno: an RQ worker process, and the supervisor that wakes it.

The supervisor listens to the doorbell and turns a ring into a drain job, at most one waiting per partition. One
supervisor at a time, by lease, also sweeps: backlogs that nobody rang for, holds that are due, the periodic proof. The
worker process is started again when it dies. While Redis has no memory for jobs, the supervisor drains by itself.
"""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from secrets import token_hex
from time import monotonic
from typing import cast

import psycopg
import redis
from loguru import logger
from rq import Queue

from config.log import described
from config.settings import Settings, without_secrets
from worker.client import Billing
from worker.consumer import jobs
from worker.consumer.drain import Drain
from worker.crash import crash_point
from worker.errors import BillingError
from worker.keyspace import keys
from worker.keyspace.connection import connect, redis_now_ms
from worker.keyspace.keys import RING_TTL_MS, Partition, Stream, partitions_of, streams
from worker.process import on_launcher_death
from worker.reports.status import backlogs
from worker.resources import Resources

# A worker that keeps dying is started again, but not in a tight loop.
_RESTART_SECONDS = 1.0
SPOOLED_A_SWEEP = 1_000
# An outage of hours is a line a minute, not one a second.
_WARN_AGAIN_SECONDS = 60.0


class Supervisor:
    """Turns doorbells and backlogs into jobs, and keeps one worker process alive."""

    def __init__(self, settings: Settings, environ: dict[str, str]) -> None:
        self._settings = settings
        self._environ = environ
        self._drained = streams(settings.partitions)
        self._token = token_hex(8)
        self._client = connect(settings)
        self._rq_client = jobs.rq_connection(settings)
        self._queue: Queue = jobs.job_queue(settings, self._rq_client)
        self._billing = Billing(settings) if settings.spool_path is not None else None
        self._resources: Resources | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._stopping = False
        self._has_seen_mark = False
        self._missed = ""
        self._warned: dict[str, tuple[str, float]] = {}

    def run(self, *, burst: bool) -> int:
        """Work until SIGTERM or SIGINT, or with `burst` until every stream is empty. Returns the exit code.

        A server that does not serve is waited for, at the start, too; with `burst` its error is raised. The batch in
        hand is finished; a worker that takes longer than the stop time-out is killed, which loses nothing. With `burst`
        the code is 1 when a partition is halted or paused with something in its stream.

        Raises LedgerError and CatalogueError where this dyno is set up otherwise than the ledger.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        next_sweep = monotonic()
        has_memory = True
        try:
            self._claim(patiently=not burst)
            while not self._stopping:
                if has_memory:  # without it a worker process cannot even register
                    self._keep_worker()
                try:
                    self._listen(max(0.01, next_sweep - monotonic()))
                    if monotonic() >= next_sweep:
                        next_sweep = monotonic() + self._settings.sweep_interval_ms / 1_000
                        self._send_spooled()
                        if self._leads() or burst:
                            self.sweep()
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
            self._stop_worker()
            for opened in (self._resources, self._billing):
                if opened is not None:
                    opened.close()

    def _claim(self, *, patiently: bool) -> None:
        """Agree on the number of partitions with both servers, once they answer; a platform may start them after us."""
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
                    return

    def sweep(self) -> None:
        """Enqueue what nobody rang for: drains of backlogs, holds and periods that are due, the periodic proof."""
        now_ms = redis_now_ms(self._client)
        self._notice_emptied(now_ms)
        with self._client.pipeline(transaction=False) as pipe:
            for stream in self._drained:
                pipe.xlen(stream.entries)
                pipe.exists(stream.busy, stream.halted, stream.paused)
                pipe.zcount(stream.expiries, "-inf", now_ms)
            replies = pipe.execute()
        found = list(zip(self._drained, replies[0::3], replies[1::3], replies[2::3], strict=True))
        self._enqueue("drain", [stream for stream, lag, busy, _ in found if lag and not busy])
        self._enqueue("expire_holds", [stream for stream, _, _, due in found if due])
        self._enqueue("roll_up", self._unrolled())
        self._enqueue_periodic("renew_due", keys.RENEWED, self._settings.renew_interval_seconds)
        self._enqueue_periodic("verify", keys.VERIFIED, self._settings.verify_interval_seconds)

    def _notice_emptied(self, now_ms: int) -> None:
        """Note for `status` that Redis lost everything, where the mark is gone that was there before."""
        if self._client.exists(keys.FOUND_EMPTY):
            self._has_seen_mark = True
        elif self._has_seen_mark:
            self._client.set(keys.FOUND_EMPTY, now_ms, nx=True)
            logger.error("Redis was emptied: its holds are gone, and so are events that were not applied yet")

    def _enqueue_periodic(self, name: str, mark: str, interval_seconds: int) -> None:
        """One job in each interval, however many dynos there are; none where the interval is 0."""
        if interval_seconds and self._client.set(mark, "1", nx=True, ex=interval_seconds):
            jobs.enqueue(self._queue, name)

    def _unrolled(self) -> list[Partition]:
        """Partitions with accounts that may be rolled up; none while a stream has more than a read: events go first,
        but those of a paused partition wait for an operator.
        """
        partitions = partitions_of(self._settings.partitions)
        with self._client.pipeline(transaction=False) as pipe:
            for partition in partitions:
                pipe.xlen(partition.entries)
                pipe.exists(partition.paused)
                pipe.exists(partition.unrolled)
            replies = pipe.execute()
        found = list(zip(partitions, replies[0::3], replies[1::3], replies[2::3], strict=True))
        busy = any(lag > self._settings.read_chunk_events and not paused for _, lag, paused, _ in found)
        return [] if busy else [partition for partition, _, _, marked in found if marked]

    def _send_spooled(self) -> None:
        """Send a part of what producers on this machine have spooled, where they do."""
        if self._billing is None:
            return
        try:
            self._billing.send_spooled(SPOOLED_A_SWEEP)
        except BillingError as error:
            self._warn("what is in the spool stays there", error)

    def _drain_without_jobs(self) -> None:
        """Drain every stream for at most the time box, here: a job takes memory of Redis, its drain only gives it back.

        Workers and other dynos may do the same at the same time: the partition's lock decides.
        """
        if self._resources is None:
            self._resources = Resources.open(self._settings)
        for stream in self._drained:
            if self._stopping:
                return
            try:
                Drain(self._resources, stream).run(monotonic() + self._settings.drain_time_box_ms / 1_000)
            except Exception as error:  # noqa: BLE001 - as with a job: the next sweep tries again, nothing is lost
                logger.warning("partition {} was not drained: {}", stream.name, described(error))

    # -- Doorbell -----------------------------------------------------------------------------------------------------

    def _listen(self, seconds: float) -> None:
        """Wait for the doorbell, at most so long, and enqueue a drain for every stream that rang."""
        heard = self._client.blpop([keys.BELL], timeout=seconds)
        if heard is None:
            return
        crash_point("after_doorbell")
        more = self._client.lpop(keys.BELL, len(self._drained)) or []
        rang = {cast("tuple[bytes, bytes]", heard)[1], *cast("list[bytes]", more)}
        # Whoever may push onto the bell may push anything.
        rung = [stream for stream in self._drained if str(stream.number).encode() in rang]
        self._enqueue("drain", [stream for stream in rung if not self._client.exists(stream.paused)])

    def _enqueue(self, name: str, streams: Sequence[Stream]) -> None:
        """One job per stream, unless one is waiting already."""
        if not streams:
            return
        waiting = {job_id.rpartition("-")[0] for job_id in self._queue.job_ids}
        for stream in streams:
            if jobs.kind_of(name, stream) in waiting:
                continue
            if name == "drain":
                self._client.set(stream.rung, "1", nx=True, px=RING_TTL_MS)
            jobs.enqueue(self._queue, name, stream)

    def _leads(self) -> bool:
        """True while this supervisor holds the lease; whoever finds it free takes it."""
        lease_ms = 3 * self._settings.sweep_interval_ms
        if self._client.set(keys.LEADER, self._token, nx=True, px=lease_ms):
            return True
        if self._client.get(keys.LEADER) != self._token.encode():
            return False
        self._client.pexpire(keys.LEADER, lease_ms)
        return True

    def _is_done(self) -> bool:
        """Nothing in hand, nothing waiting, and nothing in the streams but what is halted or paused."""
        stopped = [each for each in self._drained if self._client.exists(each.halted, each.paused)]
        busy = any(self._client.exists(each.busy) for each in self._drained)
        return not busy and set(self._backlogs()) <= set(stopped) and not self._queue.job_ids

    def _backlogs(self) -> list[Stream]:
        """Streams that are not empty."""
        return [stream for stream, lag in backlogs(self._client, self._settings.partitions).items() if lag]

    # -- The worker process -------------------------------------------------------------------------------------------

    def _keep_worker(self) -> None:
        """Start the worker process, again if it died."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:
            logger.warning("worker process {} ended with {}", self._process.pid, self._process.returncode)
            if monotonic() - self._started_at < _RESTART_SECONDS:
                self._pause()
        self._started_at = monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.consumer.worker_process"],
            env=self._environ,
            preexec_fn=on_launcher_death(signal.SIGTERM),
        )

    def _stop_worker(self) -> None:
        """SIGTERM, wait for the batch in hand, SIGKILL when it takes too long."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(self._settings.stop_timeout_seconds)
        except subprocess.TimeoutExpired:
            logger.error("worker process {} did not stop in time, killing it", process.pid)
            process.kill()
            process.wait()

    def _request_stop(self, signum: int, _frame: object) -> None:
        logger.info("{}: finishing the batch in hand", signal.Signals(signum).name)
        self._stopping = True

    def _miss(self, error: redis.RedisError | psycopg.OperationalError) -> None:
        """Say which server does not serve, and wait a moment."""
        is_redis = isinstance(error, redis.RedisError)
        url = self._settings.redis_url if is_redis else self._settings.database_url or ""
        self._missed = f"{'Redis' if is_redis else 'Postgres'} at {without_secrets(url)}"
        what = "refuses" if isinstance(error, redis.ResponseError) else "is away"
        self._warn(f"{self._missed} {what}, trying again", error)
        self._pause()

    def _note_answer(self) -> None:
        """Say that the server that did not serve does so again."""
        if self._missed:
            logger.info("{} answers", self._missed)
            self._warned.clear()
        self._missed = ""

    def _warn(self, about: str, error: Exception) -> None:
        """Say what is wrong; the same again only after a while."""
        said, now = described(error), monotonic()
        before, at = self._warned.get(about, ("", 0.0))
        if said != before or now >= at + _WARN_AGAIN_SECONDS:
            logger.warning("{}: {}", about, said)
            self._warned[about] = said, now

    def _pause(self) -> None:
        """Wait a moment before trying again."""
        select.select([], [], [], _RESTART_SECONDS)
