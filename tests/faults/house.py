"""A house for one test: a Postgres and a Redis of its own, which a test may kill, and the work of a test with them.

The house notes emitted events in `accepted` once Redis has confirmed them; the oracle checks these at the end:

    def test_killed_after_the_commit(house: House) -> None:
        house.emit(40)
        house.die_at("after_commit")
        with house.dyno():
            house.wait_until_drained(RECOVERY_SECONDS)
        house.prove()
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from secrets import token_hex
from threading import Event
from time import monotonic
from typing import Any

import psycopg
from redis import Redis

from config.settings import PREFIX, Settings, variable_name
from schemas.events import UsageEvent, multiplied
from tests.support import oracle
from tests.support.ledger import empty_ledger, give_accounts, rows
from tests.support.oracle import NOBODY, Accepted, Identity
from tests.support.proxy import Proxy
from tests.support.resources import settings_for
from tests.support.streams import partition_of
from tests.support.waiting import wait_until
from worker import crash
from worker.client import Billing
from worker.consumer import jobs
from worker.consumer.drain import drain_stream
from worker.demo.servers import Server
from worker.errors import RedisUnavailable
from worker.keyspace import keys
from worker.keyspace.scripts import script
from worker.process import on_launcher_death
from worker.resources import Resources

# The bound of the matrix: seconds from a worker's restart until the dead one's batch is done.
RECOVERY_SECONDS = 5
# Patience with a slow machine if the matrix has no bound.
SLOW_SECONDS = 30

METER = "premium_voice"
PLAN = "basic"
# So little in every bucket that a few events go through all of them, into debt.
BUCKETS = {METER: (99_990, 20, 30)}
USERS = 8
PARTITIONS = keys.partitions_of(2)

# Small batches, so that each partition has several, and reading ahead and publishing overlap. Short waits, as a test is
# about the time after them.
SETTINGS: dict[str, object] = {
    "batch_max_events": 10,
    "publish_chunk_accounts": 2,
    "hand_grace_ms": 600,
    "lock_timeout_ms": 500,
    "idle_in_transaction_timeout_ms": 1_000,
    "redis_socket_timeout_ms": 2_000,
    "halt_seconds": 1,
    "sweep_interval_ms": 100,
    "stop_timeout_seconds": 10,
    "renew_interval_seconds": 0,
    "verify_interval_seconds": 0,
}


@dataclass
class House:
    """Two servers with an empty ledger and an empty Redis, accounts of a few users, and events accepted for them."""

    postgres: Server
    redis_server: Server
    settings: Settings
    resources: Resources
    billing: Billing
    redis: Redis
    folder: Path
    users: list[str]
    accepted: Accepted = field(default_factory=Accepted)
    _sent: dict[Identity, UsageEvent] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)

    # -- Producers ----------------------------------------------------------------------------------------------------

    def new_events(self, number: int) -> list[UsageEvent]:
        """Return new events, of all users in turn."""
        return [_event(self.users[n % len(self.users)], f"e{n}", 1 + n % 7) for n in islice(self._numbers, number)]

    def send(self, events: Sequence[UsageEvent], through: Billing | None = None) -> list[UsageEvent]:
        """Emit events and note those that Redis confirmed; return the others, which a producer would send again."""
        unsure: list[UsageEvent] = []
        try:
            (through or self.billing).emit_events(events)
        except RedisUnavailable as error:
            unsure = list(error.events)
        unconfirmed = {(event.user_id, event.event_id) for event in unsure}
        self.accept(event for event in events if (event.user_id, event.event_id) not in unconfirmed)
        return unsure

    def emit(self, number: int) -> list[UsageEvent]:
        """Emit `number` new events; all are accepted."""
        events = self.new_events(number)
        assert self.send(events) == []
        return events

    def emit_nonsense(self, number: int = 1) -> None:
        """Append stream entries without an event to each partition; each must end as a dead letter."""
        for partition in PARTITIONS:
            for _ in range(number):
                self.redis.xadd(partition.entries, {"v": "1", "e": "{}"})
                self.accepted.dead[(*NOBODY, "missing_field")] += 1

    def resend(self, number: int = 5) -> None:
        """Send accepted events again, as a producer without an answer does."""
        again = list(islice(self._sent.values(), number))
        assert len(again) == number
        assert self.send(again) == []

    @contextmanager
    def sponsor(self, daily_units: int = 100) -> Iterator[Billing]:
        """Open a producer for which the pool covers `daily_units` per user and day."""
        with Billing.connect(self.settings_with(sponsor_daily_units_new=daily_units)) as producer:
            yield producer

    def absorb(self, sponsor: Billing, user_id: str, request_id: str, units: int) -> None:
        """Have the pool absorb a whole request, and note it as accepted."""
        assert sponsor.decide(user_id, units, request_id).absorb == units
        assert sponsor.settle_sponsored(user_id, request_id, units).absorbed == units
        self.accepted.grants[request_id] = units

    def accept(self, events: Iterable[UsageEvent]) -> None:
        """Note events that Redis confirmed, here or to another process. Without a multiplier the quantity counts."""
        for event in events:
            identity = event.user_id, event.event_id
            self.accepted.events[identity] = multiplied(event.quantity, event.multiplier or "1")
            self._sent[identity] = event

    # -- Workers ------------------------------------------------------------------------------------------------------

    @contextmanager
    def run(
        self,
        *arguments: str,
        settings: Settings | None = None,
        crash_at: str | None = None,
        release: Path | None = None,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run `python -m …` with the settings of the house, or others; kill it and its children at the end.

        `release` is the folder of another release. `crash_at` is for worker/crash.py: a label, `freeze:<label>` or
        `poison:<event id>`. A failing test shows the log of the process.
        """
        log = self.folder / f"{token_hex(4)}.log"
        named = settings or self.settings
        environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        environ |= {variable_name(name): _as_variable(getattr(named, name)) for name in named.model_fields_set}
        if crash_at is not None:
            environ[crash.VARIABLE] = crash_at
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=release,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=on_launcher_death(signal.SIGKILL),
            )
        log.rename(self._log(process))
        try:
            yield process
        finally:
            # The group, not the tree: a killed dyno leaves its worker process behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"--- {' '.join(arguments)}, {crash_at=}: {process.returncode}\n{self.log_of(process)}")

    @contextmanager
    def dyno(
        self,
        *options: str,
        settings: Settings | None = None,
        crash_at: str | None = None,
        release: Path | None = None,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run `meterfall worker run`; its worker process has registered with RQ when the block begins."""
        before = self._registered()
        command = ("worker", "worker", "run", *options)
        with self.run(*command, settings=settings, crash_at=crash_at, release=release) as process:
            wait_until(
                lambda: process.poll() is not None or bool(self._registered() - before), "the dyno is up", SLOW_SECONDS
            )
            yield process

    @contextmanager
    def worker_process(
        self, settings: Settings | None = None, crash_at: str | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a worker process without a supervisor, which would restart it after its death.

        It gets a drain of each partition with a backlog.
        """
        with closing(jobs.rq_connection(self.settings)) as connection:
            queue = jobs.job_queue(self.settings, connection)
            for stream in keys.streams(self.settings.partitions):
                if self.redis.xlen(stream.entries):
                    jobs.enqueue(queue, "drain", stream)
        with self.run("worker.consumer.worker_process", settings=settings, crash_at=crash_at) as process:
            yield process

    def log_of(self, process: subprocess.Popen[bytes]) -> str:
        """Return the log so far of a process that `run` started."""
        return self._log(process).read_text(errors="replace")

    def die_at(self, label: str, settings: Settings | None = None) -> None:
        """Let a worker process take the backlog in hand, and kill it at the crash point `label`."""
        with self.worker_process(settings, label) as process:
            assert process.wait(SLOW_SECONDS) == -signal.SIGKILL

    def die_with_the_commit_sent(self) -> None:
        """Kill a worker process that has sent its COMMIT and waits for the answer.

        It took the backlog in hand before. Postgres has committed, and the proxy keeps the answer back.
        """
        with self.proxied_postgres() as (proxy, behind):
            self._die_when(proxy.lose_reply(b"COMMIT", reply=b"COMMIT", cut=False), behind)

    def die_between_publishing_scripts(self) -> None:
        """Kill a worker process whose batch is published in part.

        It took the backlog in hand before. Redis has run the first script of the batch; the proxy tears the second.
        """
        publish = script("publish")
        self.redis.script_load(publish.text)  # else the first answer is NOSCRIPT
        with self.proxied_redis() as (proxy, behind):
            # The client must not retry before it is killed.
            patient = behind.model_copy(update={"redis_socket_timeout_ms": 1_000 * SLOW_SECONDS})
            self._die_when(proxy.tear(publish.sha.encode(), times=2), patient)

    def _die_when(self, reached: Event, settings: Settings) -> None:
        """Kill a worker process as soon as `reached` is set."""
        with self.worker_process(settings) as process:
            assert reached.wait(SLOW_SECONDS)
            process.kill()
            assert process.wait(SLOW_SECONDS) == -signal.SIGKILL

    @contextmanager
    def frozen_at(self, label: str, settings: Settings | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """Let a worker process take the backlog in hand, and freeze it at the crash point `label` until `thaw`."""
        with self.worker_process(settings, crash.FREEZE + label) as process:
            wait_until(lambda: is_frozen(process.pid), f"a worker is frozen at {label}", SLOW_SECONDS)
            yield process

    def drain(self) -> None:
        """Drain every partition in this process, for scenarios that are not about the worker."""
        for partition in keys.streams(self.settings.partitions):
            drain_stream(self.resources, partition)

    # -- Networks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def proxied_redis(self) -> Iterator[tuple[Proxy, Settings]]:
        """Start a proxy before Redis; yield it with settings that go through it."""
        with Proxy(self.redis_server.folder / "redis.sock") as proxy:
            yield proxy, self.settings_with(redis_url=f"redis://127.0.0.1:{proxy.port}/0")

    @contextmanager
    def proxied_postgres(self) -> Iterator[tuple[Proxy, Settings]]:
        """Start a proxy before Postgres; yield it with settings that go through it."""
        with Proxy(self.postgres.folder / ".s.PGSQL.5432") as proxy:
            yield proxy, self.settings_with(database_url=f"postgresql://meterfall@127.0.0.1:{proxy.port}/meterfall")

    def settings_with(self, **changes: object) -> Settings:
        """Return the settings of the house, with changes."""
        return self.settings.model_copy(update=changes)

    # -- State --------------------------------------------------------------------------------------------------------

    @contextmanager
    def connected(self) -> Iterator[psycopg.Connection]:
        """Open a connection to the ledger for the length of the block."""
        assert self.settings.database_url is not None
        with psycopg.connect(self.settings.database_url) as connection:
            yield connection

    def backlog(self) -> int:
        """Return the number of stream entries in all streams."""
        return sum(self.redis.xlen(stream.entries) for stream in keys.streams(self.settings.partitions))

    def recorded(self) -> int:
        """Return the number of rows in the usage log."""
        ((number,),) = rows(self.settings, "SELECT count(*) FROM usage_log")
        assert isinstance(number, int)
        return number

    def pending(self) -> dict[str, int]:
        """Return units by id (`h:<hold key>`, `e:<event id>`) in all pending maps."""
        found: dict[str, int] = {}
        for key in self.redis.scan_iter(keys.PENDING_PATTERN):
            stored: Any = self.redis.hgetall(key)
            found |= {name.decode(): int(units) for name, units in stored.items() if name != b"total"}
        return found

    def wait_until_drained(self, seconds: float = SLOW_SECONDS) -> None:
        """Return once the streams are empty and no drain is at work."""
        wait_until(lambda: not self.backlog(), "the streams are empty", seconds)
        # Not `hand`: the mark of a dead worker stays until the next drain with work.
        busy = [stream.busy for stream in keys.streams(self.settings.partitions)]
        wait_until(lambda: not self.redis.exists(*busy), "no drain is at work", SLOW_SECONDS)

    def prove(self) -> None:
        """Ask the oracle."""
        oracle.prove(self.resources, self.accepted)

    def _log(self, process: subprocess.Popen[bytes]) -> Path:
        return self.folder / f"{process.pid}.log"

    def _registered(self) -> set[Any]:
        found: Any = self.redis.smembers("rq:workers")
        return set(found)


class Trusting:
    """A host that trusts every user, for clients that ask the pool."""

    def tier_of(self, user_id: str) -> str | None:
        """Return the highest tier, for any user."""
        return "elite" if user_id else None


def thaw(process: subprocess.Popen[bytes]) -> None:
    """Let a frozen process go on."""
    process.send_signal(signal.SIGCONT)


def is_frozen(pid: int) -> bool:
    """Return True while a signal has stopped the process."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.startswith("T")


def let_pass(seconds: float) -> None:
    """Return after `seconds`, for tests about time itself."""
    start = monotonic()
    wait_until(lambda: monotonic() >= start + seconds, "time goes by", 2 * seconds)


def _as_variable(value: object) -> str:
    """Return a setting as text for the environment; a tuple is one of keys."""
    if not isinstance(value, tuple):
        return str(value)
    ends = [f"@{key.ends_at.isoformat()}" if key.ends_at else "" for key in value]
    return ",".join(f"{key.key_id}={key.secret.get_secret_value()}{end}" for key, end in zip(value, ends, strict=True))


def _event(user_id: str, event_id: str, quantity: int) -> UsageEvent:
    return UsageEvent(event_id=event_id, user_id=user_id, meter=METER, quantity=quantity, multiplier="1")


@contextmanager
def open_house(postgres: Server, redis_server: Server, folder: Path, **overrides: object) -> Iterator[House]:
    """Open a house on these servers, and mend what the test before did to them."""
    for server in (postgres, redis_server):
        server.thaw()
        server.start()
    settings = settings_for(postgres.url, redis_server.url, **(SETTINGS | overrides))
    empty_ledger(postgres.url)
    names = (f"user-{n}" for n in count())
    users = list(islice((name for name in names if partition_of(settings, name) in PARTITIONS), USERS))
    with ExitStack() as stack:
        redis = stack.enter_context(Redis.from_url(redis_server.url))
        redis.flushall()
        resources = stack.enter_context(closing(Resources.open(settings)))
        resources.claim()
        give_accounts(settings, users, PLAN, buckets=BUCKETS)
        billing = stack.enter_context(Billing.connect(settings))
        for user_id in users:
            billing.check(user_id, METER)  # cached from now on, so that the oracle sees what a publish shows
        yield House(postgres, redis_server, settings, resources, billing, redis, folder, users)
