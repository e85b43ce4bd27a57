"""The run: load, faults, quiet points, and in the end a report. `run` reads top to bottom."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from random import Random
from threading import Event, Thread

import psycopg
import redis
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tests.soak.faults import FAULTS, TIMES, Strike
from tests.soak.producer import PREFIX, SHORT_TTL_SECONDS, customers_of
from tests.soak.report import Fault, Quiet, Report, Sample
from tests.soak.site import Dyno, Producer, Site, SoakError, open_site, wait_for
from tests.support import oracle
from tests.support.oracle import Accepted
from worker.admin import accounts
from worker.client import Billing
from worker.demo.servers import Servers
from worker.demo.sponsorship import Served, prove_sponsored
from worker.demo.stage import Stage, Tally
from worker.keyspace import keys
from worker.ledger import sponsorship
from worker.ledger.connection import batch_connection
from worker.resources import Resources
from worker.rules.sponsorship import Pool

SAMPLE_SECONDS = 0.5
# The share of faults that the next one follows at once.
HASTY_CHANCE = 0.15
# A busy machine needs a while for the rest of the work; a stuck process needs longer.
QUIET_SECONDS = 120.0
# An expired hold stays in its maps until the sweep, which comes every second; on a busy machine it is late.
SWEEP_SECONDS = 15.0


@dataclass(frozen=True)
class Plan:
    """The plan of a soak. It takes longer than `minutes` if some kind of fault has not come yet."""

    minutes: float
    seed: int
    faults: Sequence[str] = tuple(FAULTS)
    users: int = 200
    dynos: int = 3
    lanes: int = 3  # of each of two producers
    gap_seconds: float = 3.0  # between two faults, on average
    quiet_gap_seconds: tuple[float, float] = (60.0, 90.0)


def run(plan: Plan) -> Report:
    """Soak by `plan`.

    Ends early if the books of a quiet point differ from the promises, or if work does not go on by itself; the report
    names the reason. Stops all that it started, in any case.
    """
    with _interrupted_by_signals(), open_site() as site, closing(Strike(site, plan.users)) as strike:
        _open_accounts(site, plan)
        began = time.time()
        _start_children(site, plan, began)
        report = Report(plan.minutes, plan.seed, site.postgres.label, site.redis_server.label)
        faults, gaps = _faults(plan), Random(f"{plan.seed}/quiet points")
        hasty, proof_seconds = False, 0.0
        with _sampling(site, began, report.samples), _bar(plan) as bar:
            try:
                while not report.broken and not _is_over(plan, report, began):
                    # A proof takes longer with more events; load and faults must still fill most of a long soak.
                    quiet_at = time.time() + max(gaps.uniform(*plan.quiet_gap_seconds), 2 * proof_seconds)
                    while time.time() < quiet_at and not _is_over(plan, report, began):
                        kind, gap_seconds, random = next(faults)
                        if not hasty:
                            time.sleep(gap_seconds)
                        strike.bring_back()
                        before, hasty = hasty, random.random() < HASTY_CHANCE
                        bar.say(kind)
                        at = round(time.time() - began, 2)
                        report.faults.append(Fault(at, *FAULTS[kind](strike.by(random, hasty=hasty)), before))
                        site.read_journals()
                    strike.bring_back()
                    bar.say("quiet point")
                    report.quiets.append(_quiet_point(site, round(time.time() - began, 1)))
                    proof_seconds = report.quiets[-1].proof_seconds
                    site.resume_producers()
            except (SoakError, redis.RedisError, psycopg.Error) as error:
                report.error = f"{type(error).__name__}: {error}"
        report.finish(site.promised, time.time() - began)
        report.logs = {child.name: child.log.read_text(errors="replace") for child in (*site.dynos, *site.producers)}
        return report


def _is_over(plan: Plan, report: Report, began: float) -> bool:
    """Return True if the time is up, and every kind of fault has come once."""
    return time.time() >= began + 60 * plan.minutes and len(report.faults) >= len(plan.faults)


# Beginning -----------------------------------------------------------------------------------------------------------


def _open_accounts(site: Site, plan: Plan) -> None:
    """Open an account for every user, each on the next plan, and in the next trust tier."""
    by_plan: dict[str, list[str]] = {}
    customers = customers_of(site.resources.catalogue, plan.users)
    for customer in customers:
        by_plan.setdefault(customer.plan, []).append(customer.user_id)
    for code, users in by_plan.items():
        accounts.open_many(site.resources, users, code)
    tiers = ("new", "established", "trusted", "elite")
    for number, customer in enumerate(customers):
        accounts.set_trust(site.resources, customer.user_id, tiers[number // 3 % len(tiers)])


def _start_children(site: Site, plan: Plan, began: float) -> None:
    """Start dynos without a proxy, with Redis' proxy, and with Postgres' proxy, in turns; two producers likewise."""
    for number in range(plan.dynos):
        name = f"dyno-{number}"
        environ = site.environ_of(name, redis_proxied=number % 3 == 1, postgres_proxied=number % 3 == 2)
        dyno = Dyno(name, environ, site.folder / f"{name}.log")
        site.dynos.append(dyno)
        dyno.start()
    for number in range(2):
        name = f"producer-{number}"
        lanes = tuple(f"{PREFIX}l{number}{lane}" for lane in range(plan.lanes))
        journal = str(site.folder / f"{name}.journal")
        environ = site.environ_of(name, redis_proxied=number == 1, postgres_proxied=number == 1)
        arguments = {"seed": plan.seed, "users": plan.users, "began": began, "journal": journal}
        producer = Producer(name, environ, site.folder / f"{name}.log", arguments=arguments, lanes=lanes)
        site.producers.append(producer)
        producer.start(site.promised)
        producer.hear("ready")
    wait_for("a worker is up", lambda: bool(site.redis.exists("rq:workers")), QUIET_SECONDS)


def _faults(plan: Plan) -> Iterator[tuple[str, float, Random]]:
    """Yield faults without end, from the seed alone: kind, seconds to wait before it, and its random source.

    First each kind once, then rounds with each kind at its frequency, every round in another order.
    """
    random = Random(f"{plan.seed}/faults")
    times = dict.fromkeys(plan.faults, 1)
    for number in count():
        bag = [kind for kind, often in times.items() for _ in range(often)]
        random.shuffle(bag)
        for place, kind in enumerate(bag):
            yield kind, random.uniform(0.3, 1.7) * plan.gap_seconds, Random(f"{plan.seed}/faults/{number}/{place}")
        times = {kind: TIMES.get(kind, 1) for kind in plan.faults}


# Quiet points --------------------------------------------------------------------------------------------------------


def _quiet_point(site: Site, at: float) -> Quiet:
    """Let all work come to its end, and compare the promises with the books."""
    started = time.monotonic()
    site.pause_producers()
    time.sleep(SHORT_TTL_SECONDS)  # forgotten holds expire
    wait_for("all streams are drained", site.is_quiet, QUIET_SECONDS)
    drained_seconds = time.monotonic() - started
    proved_from = time.monotonic()
    _show_ledger_holds(site)
    promised = site.promised
    wait_for_sweep(site.resources, promised.accepted(Counter()))
    found = oracle.differences(site.resources, promised.accepted(oracle.dead_letters(site.resources)))
    found += _compare_pool(site)
    found += _compare_grants(site)
    counts = len(promised.events), *_count_keys(site)
    _release_kept(site)
    return Quiet(at, round(drained_seconds, 2), round(time.monotonic() - proved_from, 2), *counts, _memory(site), found)


def wait_for_sweep(resources: Resources, expected: Accepted) -> None:
    """Wait until the sweep has taken out all forgotten holds, of users and of the pool.

    The oracle names holds that are left after `SWEEP_SECONDS`.
    """
    with suppress(SoakError):
        wait_for("forgotten holds are gone", lambda: not [*oracle.compare_held(resources, expected)], SWEEP_SECONDS)


def _show_ledger_holds(site: Site) -> None:
    """Load balances, so that Redis takes over the holds that the ledger granted while it was down."""
    with Billing.connect(site.settings) as billing:
        for user_id, meter, _, _ in site.promised.kept.values():
            site.redis.delete(keys.account_of(user_id, site.settings.partitions).balance)
            billing.check(user_id, meter)


def _release_kept(site: Site) -> None:
    """Close the holds kept open for the oracle, so that Redis has no more of them at the next quiet point."""
    with Billing.connect(site.settings) as billing:
        for user_id, meter, key, _ in site.promised.kept.values():
            billing.release(user_id, meter, key)
        site.promised.kept.clear()
        for request_id, told in list(site.promised.served.items()):
            if told.ended == "left open":
                billing.release_sponsored(str(told.user_id), request_id, "the quiet point is over")
                site.promised.served[request_id] = told._replace(ended="released")


def _compare_pool(site: Site) -> list[str]:
    """Compare the pool's answers to clients with its books and its open promises."""
    with batch_connection(site.resources.engine) as postgres:
        epoch = sponsorship.read_epoch(postgres)
    before = Pool(site.resources.catalogue.sponsorship.initial, 0, epoch)
    servers = Servers(site.postgres.url, site.redis_server.url, site.postgres.label, site.redis_server.label)
    stage = Stage(servers, site.resources, Progress(disable=True), lasting=False)
    served = Served(before, list(site.promised.served.values()), Tally())
    _, faults = prove_sponsored(stage, PREFIX, served)
    return [f"pool: {fault}" for fault in faults]


def _compare_grants(site: Site) -> list[str]:
    """Compare the sold credits with the ledger: each is there once."""
    with batch_connection(site.resources.engine) as postgres:
        rows = postgres.execute(
            "SELECT user_id, meter, entry_key, purchased_change FROM ledger_entry WHERE kind = 'grant'"
        ).fetchall()
    found = Counter({(user_id, meter, key.removeprefix("grant:")): amount for user_id, meter, key, amount in rows})
    sold = site.promised.grants
    wrong = {name for name in found.keys() | sold.keys() if found[name] != sold.get(name)}
    again = [] if len(rows) == len(found) else ["grants: some key was used twice"]
    return [*again, *(f"grant {key} of {user_id} on {meter} is not as sold" for user_id, meter, key in sorted(wrong))]


def _count_keys(site: Site) -> tuple[int, int]:
    """Return the number of keys in Redis, and of those without an expiry."""
    found = list(site.redis.scan_iter(count=1_000))
    with site.redis.pipeline(transaction=False) as pipe:
        for key in found:
            pipe.ttl(key)
        lasting = sum(ttl == -1 for ttl in pipe.execute())
    return len(found), lasting


# Observation ---------------------------------------------------------------------------------------------------------


def _memory(site: Site) -> dict[str, list[float]]:
    """Return the resident memory of supervisors and of worker processes now, in MB."""
    pids = {dyno.pid: "supervisor" for dyno in site.dynos}
    pids |= {pid: "worker" for dyno in site.dynos if (pid := dyno.worker_process()) is not None}
    done = subprocess.run(
        ["ps", "-o", "pid=,rss=", "-p", ",".join(map(str, pids))], capture_output=True, text=True, check=False
    )
    found: dict[str, list[float]] = {"supervisor": [], "worker": []}
    for line in done.stdout.splitlines():
        pid, kilobytes = map(int, line.split())
        if kilobytes:  # a process that has just died has none
            found[pids[pid]].append(round(kilobytes / 1_024, 1))
    return found


@contextmanager
def _sampling(site: Site, began: float, samples: list[Sample]) -> Iterator[None]:
    """Look at lag, throughput and memory twice a second, for the length of the block."""
    over = Event()
    # A client of its own: a wait for a dead Redis must not hold others up.
    with closing(redis.Redis.from_url(site.redis_server.url, socket_timeout=1)) as client:

        def sample() -> None:
            streams = keys.streams(site.settings.partitions)
            while not over.wait(SAMPLE_SECONDS):
                at = time.time()
                lag = applied = None
                with suppress(redis.RedisError), client.pipeline(transaction=False) as pipe:
                    for partition in streams:
                        pipe.xlen(partition.entries)
                    # The count of the last minute may still grow when the next one has begun.
                    for minute in (int(at // 60) - 1, int(at // 60)):
                        first, after = (keys.slot_of(60_000 * each) for each in (minute, minute + 1))
                        for partition in streams:
                            pipe.mget([partition.applied(slot) for slot in range(first, after)])
                    replies = pipe.execute()
                    lag = sum(replies[: len(streams)])
                    counters = replies[len(streams) :]
                    applied = (
                        int(at // 60),
                        sum(int(each or 0) for slots in counters[: len(streams)] for each in slots),
                        sum(int(each or 0) for slots in counters[len(streams) :] for each in slots),
                    )
                samples.append(Sample(round(at - began, 2), lag, applied, _memory(site)))

        thread = Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class _Bar:
    """The progress bar, with the current event."""

    def __init__(self, progress: Progress, plan: Plan) -> None:
        self._progress = progress
        self._began = time.monotonic()
        self._task = progress.add_task("starting", total=60 * plan.minutes)

    def say(self, what: str) -> None:
        """Show the current event."""
        self._progress.update(self._task, description=what, completed=time.monotonic() - self._began)


@contextmanager
def _bar(plan: Plan) -> Iterator[_Bar]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bar(progress, plan)


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that no process stays."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
