"""What the soak does to servers, dynos, producers and networks, and how long it takes until work goes on.

Every fault is over when its function returns: what was killed was started again, what was frozen goes on. Nothing else
is done for the recovery; the seconds that are returned are what the product needed for it by itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import NamedTuple

from schemas.events import UsageEvent
from tests.soak.producer import customers_of
from tests.soak.site import POLL_SECONDS, Dyno, Site, SoakError, wait_for
from tests.support.oracle import Identity
from tests.support.proxy import Proxy
from worker.client import Billing
from worker.demo.processes import kill_tree
from worker.demo.servers import Server
from worker.errors import RedisUnavailable
from worker.keyspace import keys

BURST_EVENTS = 3_000
# Until then somebody has a partition in hand, or nobody will.
AT_WORK_SECONDS = 0.5
# No fault is given more than this; the bound of those that promise one is in tests/soak/report.py.
RECOVERY_SECONDS = 60.0


class Hit(NamedTuple):
    """One fault: its kind, what it hit, and the seconds until work went on; None where there was none to go on with."""

    kind: str
    target: str
    seconds: float | None = None


class Strike:
    """What every fault works with."""

    def __init__(self, site: Site, users: int) -> None:
        self.site = site
        self.random = Random()
        self._hasty = False
        self._users = [customer.user_id for customer in customers_of(site.resources.catalogue, users)]
        self._billing = Billing(site.settings)
        self._sent = 0

    def by(self, random: Random, *, hasty: bool = False) -> Strike:
        """The same for the next fault, which draws from `random`: what one draws must not decide about others.

        Nobody waits for the end of a hasty one: the next comes while work has not gone on yet.
        """
        self.random, self._hasty = random, hasty
        return self

    def close(self) -> None:
        """Give the connections back."""
        self._billing.close()

    # -- Work to go on with -------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Emit many events at once, so that all partitions have work when a fault comes."""
        events = []
        for _ in range(BURST_EVENTS):
            user_id, event_id = self.random.choice(self._users), f"fill-{self._sent}"
            self._sent += 1
            events.append(
                UsageEvent(event_id=event_id, user_id=user_id, meter="ocr_tokens", quantity=1, multiplier="1")
            )
        self._emit(events)

    def _emit(self, events: list[UsageEvent]) -> None:
        """Emit until Redis has confirmed it, all of it if anything was not: identity decides."""
        give_up_at = time.monotonic() + RECOVERY_SECONDS
        while True:
            try:
                answers = self._billing.emit_events(events)
            except RedisUnavailable:
                if time.monotonic() > give_up_at:
                    raise
                self.site.promised.counts["again: emit"] += 1
            else:
                break
        for answer in answers:
            identity: Identity = answer.user_id, answer.event_id
            self.site.promised.events[identity] = answer.amount

    def worker_at_work(self) -> Dyno:
        """Fill the streams, and pick a dyno that has some of it in hand; any, if nobody is seen to."""
        self.fill()
        give_up_at = time.monotonic() + AT_WORK_SECONDS
        while time.monotonic() < give_up_at:
            dyno = self.site.dyno_at_work()
            if dyno is not None and dyno.worker_process() is not None:
                return dyno
        wait_for("some worker process is up", lambda: bool(self._with_engine()), RECOVERY_SECONDS)
        return self.random.choice(self._with_engine())

    def _with_engine(self) -> list[Dyno]:
        return [dyno for dyno in self.site.dynos if dyno.worker_process() is not None]

    def seconds_until_moved(self, since: float, heads: dict[keys.Stream, tuple[int, int]]) -> float | None:
        """Seconds from `since` until the oldest entry of every stream was disposed of; None where there was none, or
        nobody waits.
        """
        if not heads or self._hasty:
            return None
        left = heads
        while left:
            if time.monotonic() > since + RECOVERY_SECONDS:
                halted = {stream.name: self.site.redis.get(stream.halted) for stream in left}
                raise SoakError(f"partitions {[*halted]} did not go on in {RECOVERY_SECONDS:.0f} s; halted: {halted}")
            self.bring_back()
            time.sleep(POLL_SECONDS)
            now = self.site.heads()
            left = {stream: head for stream, head in left.items() if now.get(stream) == head}
        return time.monotonic() - since

    def bring_back(self) -> None:
        """Do what a platform does all the time: start dynos again that ended, all processes of them, for any reason."""
        for dyno in self.site.dynos:
            if not dyno.alive() and not _group_lives(dyno.pid):
                dyno.kill_all()
                dyno.start()


# Processes -----------------------------------------------------------------------------------------------------------


def kill_worker(strike: Strike) -> Hit:
    """SIGKILL to a worker process; its supervisor starts another, and other dynos go on meanwhile."""
    dyno = strike.worker_at_work()
    heads, pid = strike.site.heads(), dyno.worker_process()
    if pid is not None:  # it may have ended by itself, after a fault before
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return Hit("SIGKILL worker", dyno.name, strike.seconds_until_moved(time.monotonic(), heads))


def kill_dyno(strike: Strike) -> Hit:
    """SIGKILL to a whole dyno, as by the platform; another one is started."""
    dyno = strike.worker_at_work()
    heads = strike.site.heads()
    kill_tree(dyno.pid)
    killed_at = time.monotonic()
    strike.bring_back()
    return Hit("SIGKILL dyno", dyno.name, strike.seconds_until_moved(killed_at, heads))


def kill_supervisor(strike: Strike) -> Hit:
    """SIGKILL to a supervisor alone: its worker process is told by the kernel, and ends in good order."""
    return _ended(strike, "SIGKILL supervisor", lambda supervisor: os.kill(supervisor, signal.SIGKILL))


def terminate_dyno(strike: Strike) -> Hit:
    """SIGTERM to all processes of a dyno, as at every deploy; another one is started."""
    return _ended(strike, "SIGTERM dyno", lambda supervisor: os.killpg(supervisor, signal.SIGTERM))


def _ended(strike: Strike, kind: str, end: Callable[[int], None]) -> Hit:
    """Have a dyno end by what `end` does to its supervisor, wait until all of it has, and start another one."""
    dyno = strike.worker_at_work()
    heads, supervisor = strike.site.heads(), dyno.pid
    end(supervisor)
    seconds = strike.seconds_until_moved(time.monotonic(), heads)
    wait_for(f"a dyno ended after {kind}", lambda: not _group_lives(supervisor), RECOVERY_SECONDS)
    strike.bring_back()
    return Hit(kind, dyno.name, seconds)


def freeze_worker(strike: Strike) -> Hit:
    """SIGSTOP to a worker process for a few seconds: its batch stands still, and so does nobody else."""
    dyno = strike.worker_at_work()
    pid = dyno.worker_process()
    return _frozen(strike, pid or dyno.pid, Hit("SIGSTOP worker", dyno.name))


def freeze_supervisor(strike: Strike) -> Hit:
    """SIGSTOP to a supervisor for a few seconds: others hear the bell."""
    dyno = strike.random.choice(strike.site.dynos)
    strike.fill()
    return _frozen(strike, dyno.pid, Hit("SIGSTOP supervisor", dyno.name))


def _frozen(strike: Strike, pid: int, hit: Hit) -> Hit:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(strike.random.uniform(0.5, 4))
        heads = strike.site.heads()
    finally:
        thawed_at = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return hit._replace(seconds=strike.seconds_until_moved(thawed_at, heads))


def kill_producer(strike: Strike) -> Hit:
    """SIGKILL to a producer in the middle of its calls; the next one makes sure of what was in doubt."""
    producer = strike.random.choice(strike.site.producers)
    producer.kill_all()
    producer.start(strike.site.promised)
    producer.hear("ready")
    return Hit("SIGKILL producer", producer.name)


def _group_lives(group: int) -> bool:
    """True while a process of the group lives; a dead one that nobody waited for does not count."""
    done = subprocess.run(["ps", "-e", "-o", "pgid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return any(row[0] == str(group) and not row[1].startswith("Z") for row in rows)


# Servers -------------------------------------------------------------------------------------------------------------


def kill_redis(strike: Strike) -> Hit:
    """SIGKILL to Redis, and its start on what is on disk."""
    return _restarted(strike, strike.site.redis_server, None, "SIGKILL Redis")


def stop_redis(strike: Strike) -> Hit:
    """SIGTERM to Redis, and its start."""
    return _restarted(strike, strike.site.redis_server, signal.SIGTERM, "SIGTERM Redis")


def crash_postgres(strike: Strike) -> Hit:
    """SIGQUIT to Postgres, its immediate stop, and its start with recovery."""
    return _restarted(strike, strike.site.postgres, signal.SIGQUIT, "SIGQUIT Postgres")


def stop_postgres(strike: Strike) -> Hit:
    """SIGINT to Postgres, its fast stop, and its start."""
    return _restarted(strike, strike.site.postgres, signal.SIGINT, "SIGINT Postgres")


def _restarted(strike: Strike, server: Server, how: signal.Signals | None, kind: str) -> Hit:
    strike.fill()
    if how is None:
        server.kill()
    else:
        server.stop(how)
    time.sleep(strike.random.uniform(0.1, 3))
    server.start()
    answered_at = time.monotonic()
    heads = strike.site.heads()
    if not heads:
        strike.fill()
        heads = strike.site.heads()
    return Hit(kind, server.label.split()[0], strike.seconds_until_moved(answered_at, heads))


# Networks and caches -------------------------------------------------------------------------------------------------


def lose_redis(strike: Strike) -> Hit:
    """A black hole before Redis, for those who are behind the proxy."""
    return _swallowed(strike, strike.site.redis_proxy, "black hole Redis")


def lose_postgres(strike: Strike) -> Hit:
    """A black hole before Postgres, for those who are behind the proxy."""
    return _swallowed(strike, strike.site.postgres_proxy, "black hole Postgres")


def _swallowed(strike: Strike, proxy: Proxy, kind: str) -> Hit:
    strike.fill()
    proxy.black_hole()
    try:
        time.sleep(strike.random.uniform(0.5, 7))
        heads = strike.site.heads()
    finally:
        opened_at = time.monotonic()
        proxy.forward()
    return Hit(kind, "proxy", strike.seconds_until_moved(opened_at, heads))


def cut_redis(strike: Strike) -> Hit:
    """All connections to Redis that go through the proxy are closed."""
    return _cut(strike, strike.site.redis_proxy, "cut Redis")


def cut_postgres(strike: Strike) -> Hit:
    """All connections to Postgres that go through the proxy are closed."""
    return _cut(strike, strike.site.postgres_proxy, "cut Postgres")


def _cut(strike: Strike, proxy: Proxy, kind: str) -> Hit:
    strike.fill()
    heads = strike.site.heads()
    proxy.cut()
    return Hit(kind, "proxy", strike.seconds_until_moved(time.monotonic(), heads))


def flush_balances(strike: Strike) -> Hit:
    """All that Redis only remembers for a while is gone: cached balances, the pool, what is known of its callers."""
    redis = strike.site.redis
    found = [*redis.scan_iter(keys.BALANCE_PATTERN, 1_000), *redis.scan_iter(keys.STANDING_PATTERN, 1_000)]
    redis.delete(keys.SPONSORSHIP.pool, *found)
    return Hit("FLUSH balances", f"{len(found)} keys")


FAULTS: dict[str, Callable[[Strike], Hit]] = {
    function.__name__: function
    for function in (
        kill_worker, kill_dyno, kill_supervisor, terminate_dyno, freeze_worker, freeze_supervisor, kill_producer,
        kill_redis, stop_redis, crash_postgres, stop_postgres,
        lose_redis, lose_postgres, cut_redis, cut_postgres, flush_balances,
    )
}  # fmt: skip
# How often a kind comes, beside one of every other.
TIMES = {"kill_worker": 6, "kill_redis": 2, "crash_postgres": 2}
