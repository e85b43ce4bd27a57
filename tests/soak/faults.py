"""The faults of servers, dynos, producers and networks, and the seconds until work goes on.

Every fault is over when its function returns: killed processes run again, frozen ones go on. The soak does nothing else
for the recovery; a function returns the seconds that the product itself needed.
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
# By then a dyno has a partition in hand, or none will.
AT_WORK_SECONDS = 0.5
# The longest wait for any fault; tests/soak/report.py has the bounds of faults that promise one.
RECOVERY_SECONDS = 60.0


class Hit(NamedTuple):
    """One fault: its kind, its target, and the seconds until work went on; None if no work waited."""

    kind: str
    target: str
    seconds: float | None = None


class Strike:
    """The tools of every fault."""

    def __init__(self, site: Site, users: int) -> None:
        self.site = site
        self.random = Random()
        self._hasty = False
        self._users = [customer.user_id for customer in customers_of(site.resources.catalogue, users)]
        self._billing = Billing(site.settings)
        self._sent = 0

    def by(self, random: Random, *, hasty: bool = False) -> Strike:
        """Return the same for the next fault, which draws from `random`: its draws must not affect other faults.

        No one waits for the end of a hasty fault: the next comes before work has gone on.
        """
        self.random, self._hasty = random, hasty
        return self

    def close(self) -> None:
        """Close the connections."""
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
        """Emit until Redis has confirmed all events; repeat all of them if one failed: identity decides."""
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
        """Fill the streams, and pick a dyno that has some of it in hand, else any dyno."""
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
        """Return the seconds from `since` until the oldest stream entry of every stream was disposed of.

        None if there was none, or the fault is hasty.
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
        """Restart ended dynos, as a platform does all the time."""
        for dyno in self.site.dynos:
            if not dyno.alive() and not _group_lives(dyno.pid):
                dyno.kill_all()
                dyno.start()


# Processes -----------------------------------------------------------------------------------------------------------


def kill_worker(strike: Strike) -> Hit:
    """Send SIGKILL to a worker process; its supervisor starts another, and other dynos go on meanwhile."""
    dyno = strike.worker_at_work()
    heads, pid = strike.site.heads(), dyno.worker_process()
    if pid is not None:  # an earlier fault may have ended it
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return Hit("SIGKILL worker", dyno.name, strike.seconds_until_moved(time.monotonic(), heads))


def kill_dyno(strike: Strike) -> Hit:
    """Send SIGKILL to a whole dyno, as a platform does; start another one."""
    dyno = strike.worker_at_work()
    heads = strike.site.heads()
    kill_tree(dyno.pid)
    killed_at = time.monotonic()
    strike.bring_back()
    return Hit("SIGKILL dyno", dyno.name, strike.seconds_until_moved(killed_at, heads))


def kill_supervisor(strike: Strike) -> Hit:
    """Send SIGKILL to a supervisor alone: the kernel signals its worker process, which ends in good order."""
    return _ended(strike, "SIGKILL supervisor", lambda supervisor: os.kill(supervisor, signal.SIGKILL))


def terminate_dyno(strike: Strike) -> Hit:
    """Send SIGTERM to all processes of a dyno, as at every deploy; start another one."""
    return _ended(strike, "SIGTERM dyno", lambda supervisor: os.killpg(supervisor, signal.SIGTERM))


def _ended(strike: Strike, kind: str, end: Callable[[int], None]) -> Hit:
    """End a dyno by `end` on its supervisor, wait for all its processes, and start another one."""
    dyno = strike.worker_at_work()
    heads, supervisor = strike.site.heads(), dyno.pid
    end(supervisor)
    seconds = strike.seconds_until_moved(time.monotonic(), heads)
    wait_for(f"a dyno ended after {kind}", lambda: not _group_lives(supervisor), RECOVERY_SECONDS)
    strike.bring_back()
    return Hit(kind, dyno.name, seconds)


def freeze_worker(strike: Strike) -> Hit:
    """Freeze a worker process for a few seconds: only its batch stands still."""
    dyno = strike.worker_at_work()
    pid = dyno.worker_process()
    return _frozen(strike, pid or dyno.pid, Hit("SIGSTOP worker", dyno.name))


def freeze_supervisor(strike: Strike) -> Hit:
    """Freeze a supervisor for a few seconds: others hear the bell."""
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
    """Send SIGKILL to a producer in the middle of its calls; the next one repeats the calls in doubt."""
    producer = strike.random.choice(strike.site.producers)
    producer.kill_all()
    producer.start(strike.site.promised)
    producer.hear("ready")
    return Hit("SIGKILL producer", producer.name)


def _group_lives(group: int) -> bool:
    """Return True while a process of the group lives; zombies do not count."""
    done = subprocess.run(["ps", "-e", "-o", "pgid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return any(row[0] == str(group) and not row[1].startswith("Z") for row in rows)


# Servers -------------------------------------------------------------------------------------------------------------


def kill_redis(strike: Strike) -> Hit:
    """Send SIGKILL to Redis, and start it on the data on disk."""
    return _restarted(strike, strike.site.redis_server, None, "SIGKILL Redis")


def stop_redis(strike: Strike) -> Hit:
    """Send SIGTERM to Redis, and start it."""
    return _restarted(strike, strike.site.redis_server, signal.SIGTERM, "SIGTERM Redis")


def crash_postgres(strike: Strike) -> Hit:
    """Send SIGQUIT to Postgres, an immediate stop, and start it with recovery."""
    return _restarted(strike, strike.site.postgres, signal.SIGQUIT, "SIGQUIT Postgres")


def stop_postgres(strike: Strike) -> Hit:
    """Send SIGINT to Postgres, a fast stop, and start it."""
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
    """Put a black hole before Redis, for all connections through the proxy."""
    return _swallowed(strike, strike.site.redis_proxy, "black hole Redis")


def lose_postgres(strike: Strike) -> Hit:
    """Put a black hole before Postgres, for all connections through the proxy."""
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
    """Close all connections to Redis through the proxy."""
    return _cut(strike, strike.site.redis_proxy, "cut Redis")


def cut_postgres(strike: Strike) -> Hit:
    """Close all connections to Postgres through the proxy."""
    return _cut(strike, strike.site.postgres_proxy, "cut Postgres")


def _cut(strike: Strike, proxy: Proxy, kind: str) -> Hit:
    strike.fill()
    heads = strike.site.heads()
    proxy.cut()
    return Hit(kind, "proxy", strike.seconds_until_moved(time.monotonic(), heads))


def flush_balances(strike: Strike) -> Hit:
    """Delete all that Redis only caches: balances, the pool, standings of its callers."""
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
# Frequencies of kinds that come more than once per round.
TIMES = {"kill_worker": 6, "kill_redis": 2, "crash_postgres": 2}
