"""The site of a soak: servers of its own behind proxies, dynos, producers, and views of their state."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from config.settings import PREFIX, Settings, load_settings, variable_name
from tests.soak.journal import Promised, Reader
from tests.support.proxy import Proxy
from worker.demo.processes import children, kill_tree
from worker.demo.servers import Server, find_postgres, find_redis, postgres_server, redis_server
from worker.keyspace import keys
from worker.ledger.connection import batch_connection
from worker.ledger.migrate import migrate
from worker.process import on_launcher_death
from worker.reports.status import backlogs
from worker.resources import Resources

POLL_SECONDS = 0.01
START_SECONDS = 60.0
STOP_SECONDS = 35.0
SETTINGS = {
    "log_level": "WARNING",
    # The life of outcomes: long enough for every retry here, and short enough to see that keys stay few.
    "outcome_ttl_seconds": "60",
    # The soak proves the ledger itself, at quiet points.
    "verify_interval_seconds": "0",
}


class SoakError(RuntimeError):
    """Some work did not go on by itself; the message names it."""


def wait_for(what: str, done: Callable[[], bool], seconds: float) -> None:
    """Return once `done()` is true. Raises SoakError after `seconds`."""
    give_up_at = time.monotonic() + seconds
    while not done():
        if time.monotonic() > give_up_at:
            raise SoakError(f"after {seconds:.0f} s still not true: {what}")
        time.sleep(POLL_SECONDS)


@dataclass
class Child:
    """A process of ours that may be killed and started again: a dyno or a producer."""

    name: str
    environ: Mapping[str, str]
    log: Path
    process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """Return its process id; start it before."""
        assert self.process is not None
        return self.process.pid

    def spawn(self, *arguments: str, answers: bool = False) -> subprocess.Popen[str]:
        """Start `python -m …`. Its standard output goes to the log, unless it `answers` there."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=dict(self.environ), stdin=subprocess.PIPE, stdout=subprocess.PIPE if answers else log,
                stderr=log, text=True,
                start_new_session=True, preexec_fn=on_launcher_death(signal.SIGTERM),
            )  # fmt: skip
        return self.process

    def alive(self) -> bool:
        """Return True while the process lives."""
        return self.process is not None and self.process.poll() is None

    def tell_to_end(self) -> None:
        """Send SIGTERM to the process, and thaw it if it is frozen."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGCONT)
            self.process.terminate()

    def end(self) -> None:
        """Wait for its end after `tell_to_end`; else send SIGKILL to all of its group."""
        if self.process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self.kill_all()

    def kill_all(self) -> None:
        """Send SIGKILL to the process and its children."""
        if self.process is None:
            return
        if self.process.poll() is None:
            kill_tree(self.process.pid)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


class Dyno(Child):
    """`meterfall worker run`: a supervisor, and its worker process."""

    def start(self) -> None:
        """Start it without waiting."""
        self.spawn("worker", "worker", "run")

    def worker_process(self) -> int | None:
        """Return the process id of the worker process, None without one."""
        with suppress(OSError, ProcessLookupError):
            return next(iter(children(self.pid)), None)
        return None


@dataclass
class Producer(Child):
    """A process of tests/soak/producer.py, and its journal."""

    arguments: dict[str, Any] = field(default_factory=dict)
    lanes: tuple[str, ...] = ()
    reader: Reader | None = None

    def start(self, promised: Promised) -> None:
        """Start it after its predecessor's last work; return once it has repeated the calls in doubt."""
        if self.reader is None:
            self.reader = Reader(Path(self.arguments["journal"]))
        self.read(promised)
        lanes = {lane: promised.began.get(lane, -1) + 1 for lane in self.lanes}
        self.spawn("tests.soak.producer", json.dumps({**self.arguments, "lanes": lanes}), answers=True)
        self.say(json.dumps(promised.doubts(self.lanes)))

    def read(self, promised: Promised) -> None:
        """Read its new notes."""
        assert self.reader is not None
        self.reader.read_into(promised)

    def say(self, word: str) -> None:
        """Send it a word."""
        assert self.process is not None
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; `hear` raises for that
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()

    def hear(self, word: str) -> None:
        """Wait for its answer. Raises SoakError if it ended instead."""
        assert self.process is not None
        assert self.process.stdout is not None
        heard = self.process.stdout.readline()
        if heard != word + "\n":
            raise SoakError(f"{self.name} ended instead of being {word}:\n{tail(self.log)}")


@dataclass
class Site:
    """All targets of faults, and all signs of their end."""

    postgres: Server
    redis_server: Server
    redis_proxy: Proxy
    postgres_proxy: Proxy
    settings: Settings
    resources: Resources
    redis: redis.Redis
    folder: Path
    dynos: list[Dyno] = field(default_factory=list)
    producers: list[Producer] = field(default_factory=list)
    promised: Promised = field(default_factory=Promised)

    def heads(self) -> dict[keys.Stream, tuple[int, int]]:
        """Return the oldest stream entry of every stream that is not empty."""
        found = {}
        streams = keys.streams(self.settings.partitions)
        with self.redis.pipeline(transaction=False) as pipe:
            for stream in streams:
                pipe.xrange(stream.entries, count=1)
            for stream, entries in zip(streams, pipe.execute(), strict=True):
                if entries:
                    milliseconds, _, number = entries[0][0].decode().partition("-")
                    found[stream] = (int(milliseconds), int(number))
        return found

    def backlog(self) -> int:
        """Return the number of stream entries in all streams."""
        return sum(backlogs(self.redis, self.settings.partitions).values())

    def is_quiet(self) -> bool:
        """Return True if no stream entry waits and no drain is at work."""
        busy = [stream.busy for stream in keys.streams(self.settings.partitions)]
        return not self.backlog() and not self.redis.exists(*busy)

    def dyno_at_work(self) -> Dyno | None:
        """Return a dyno that has a partition in hand now, by the name of its connections."""
        with batch_connection(self.resources.engine) as postgres:
            rows = postgres.execute(
                "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory'"
            ).fetchall()
        names = {name for (name,) in rows}
        return next((dyno for dyno in self.dynos if dyno.name in names), None)

    def environ_of(self, name: str, *, redis_proxied: bool = False, postgres_proxied: bool = False) -> dict[str, str]:
        """Return the environment of a child. Its connections to Postgres bear its name."""
        redis_url = f"redis://127.0.0.1:{self.redis_proxy.port}/0" if redis_proxied else self.redis_server.url
        database_url = self.postgres.url
        if postgres_proxied:
            database_url = f"postgresql://meterfall@127.0.0.1:{self.postgres_proxy.port}/meterfall"
        mark = "&" if "?" in database_url else "?"
        return {
            **_environ(),
            "REDIS_URL": redis_url,
            "DATABASE_URL": f"{database_url}{mark}application_name={name}",
        }

    def read_journals(self) -> None:
        """Read the new notes of the producers."""
        for producer in self.producers:
            producer.read(self.promised)

    def pause_producers(self) -> None:
        """Return once no producer is in the middle of a work, and all their notes are read."""
        for producer in self.producers:
            producer.say("pause")
        for producer in self.producers:
            producer.hear("paused")
        self.read_journals()

    def resume_producers(self) -> None:
        """Let the producers go on."""
        for producer in self.producers:
            producer.say("go")


def _environ() -> dict[str, str]:
    ours = {variable_name(name): value for name, value in SETTINGS.items()}
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | ours


@contextmanager
def open_site() -> Iterator[Site]:
    """Open servers, proxies and a migrated ledger for the length of the block; end dynos and producers with it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meterfall-soak-")))
        postgres = stack.enter_context(postgres_server(find_postgres(os.environ)))
        redis_own = stack.enter_context(redis_server(find_redis(os.environ), appendfsync="always"))
        migrate(postgres.url)
        settings = load_settings(_environ(), database_url=postgres.url, redis_url=redis_own.url)
        resources = stack.enter_context(closing(Resources.open(settings)))
        resources.claim()
        site = Site(
            postgres,
            redis_own,
            stack.enter_context(Proxy(redis_own.folder / "redis.sock")),
            stack.enter_context(Proxy(postgres.folder / ".s.PGSQL.5432")),
            settings,
            resources,
            resources.redis,
            folder,
        )
        stack.callback(_end_all, site)
        yield site


def _end_all(site: Site) -> None:
    for proxy in (site.redis_proxy, site.postgres_proxy):
        proxy.forward()
    for producer in site.producers:
        producer.kill_all()
        if producer.reader is not None:
            producer.reader.close()
    for dyno in site.dynos:
        dyno.tell_to_end()
    for dyno in site.dynos:
        dyno.end()


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""
