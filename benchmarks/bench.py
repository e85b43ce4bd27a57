"""The benchmark: rounds of measurements on real servers, medians, ratios to this machine's own ceilings, targets.

`run` reads top to bottom: prepare a ledger of its own, then phases with the same number of rounds each.

1. **Calls** while no worker runs: PING, a bare EVALSHA, check, reserve, charge, decide in turns; reserve with three
   limits and without any in turns; the same reserve with asyncio; emit, single and pipelined; and, on a Redis of the
   benchmark's own that is frozen meanwhile: checks, and reserves and settles of many users.
2. **Drains**, in each round: a bare COPY of the same rows, one worker, two workers, and the peers: the batched consumer
   and the ORM consumer. The worker of the first drain lives through all rounds, so its peak memory tells whether it
   grows. A probe calls `check` while workers drain. Each drain also counts the CPU time of its Python processes, of
   all processes of Postgres and of Redis; what the probe costs Redis is in it.
3. **Visibility** through that worker: events at 500 and 2,000 a second, from `emit` to the published balance.
4. **Signatures**: the same drain without and with them, in turns, each through a worker of its own.
5. **Decisions** of the sponsorship pool: one process asks for many at a time and settles them, while a worker writes
   the grants. The pool and the daily budgets are large enough for all of them.
6. **Renewals**, once: the job `renew_due` on many due accounts.
7. **Grants that end**, once: the same job, when each of these accounts has a grant that ended at the same moment.
8. **Boundaries**: batches in which every account starts a new period, and plain ones of the same size, in turns. Then
   batches in which every event takes from three grants, and others in which one account in a hundred reaches a line
   of its notices, each beside plain ones.
9. **Deliveries** of notices by one sender to a receiver on this machine.

The measured work runs in processes of its own: workers are the real command, `python -m worker worker run` (supervisor
and RQ worker), all others are in benchmarks/probes.py, benchmarks/credit_probes.py, benchmarks/naive.py and
benchmarks/batched.py. Every figure is the median of its rounds; a ratio is the median of the ratios within a round,
because other programs on the machine disturb both parts of a round alike. Before each drain, COPY and peer the log is
empty. A line on stderr names each part and its seconds. benchmarks/publish.py makes docs/benchmarks.md and the figures
of the README from the result.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from operator import truediv
from pathlib import Path
from secrets import token_hex
from statistics import median
from types import ModuleType
from typing import IO, Any, NamedTuple, Protocol, cast

import psycopg
import redis
from sqlalchemy import make_url

from benchmarks import batched, load, naive
from benchmarks.cpu import MachineTime, ServerPids, machine_time, processor_name, server_pids, tree_seconds
from benchmarks.probes import CEILING_SCHEMA, DUE_AGE, EVENTS_A_PIPELINE, peak_rss_mb
from config.settings import Settings, load_settings, naming_servers, variable_name
from schemas.codes import Role
from schemas.events import MAX_AMOUNT
from worker.admin import accounts, api_keys, limits
from worker.client import Billing
from worker.demo.servers import Servers, find_redis, redis_server, running_servers
from worker.keyspace import keys
from worker.ledger.migrate import migrate
from worker.process import on_launcher_death
from worker.reports.status import backlogs
from worker.resources import Resources
from worker.rules.limits import PERS
from worker.rules.sponsorship import LOWEST_TIER
from worker.version import read_version

CHECKOUT = Path(__file__).parents[1]
METER = "ocr_tokens"
CHECKS_PER_SECOND = 200
PANEL_USERS = 500
SAMPLES_PER_SECOND = 50
DECISIONS_IN_FLIGHT = 32
OUTAGE_IN_FLIGHT = 60
POOL_UNITS = 10**12
SIGNING_KEY = f"bench={token_hex(32)}"
VISIBLE_RATES = (500, 2_000)
# Its periods end by the calendar, on every meter.
DUE_PLAN = "free"
# It has rules for notices, a line at 80 % among them.
TOLD_PLAN = "plus"
LIMITED_USERS = 100
CREDIT_PROBES = "benchmarks.credit_probes"
HTTP_PROBES = "benchmarks.http_probes"
# Connections, and how often they ask all together: a third of what one process answers, or they only queue.
HTTP_CALLERS = 64
HTTP_CHECKS_PER_SECOND = 800
HTTP_BATCH_EVENTS = 500
HTTP_BATCH_CALLERS = 2
BOUNDARY_TURNS = 4
OPEN_CHUNK_ACCOUNTS = 1_000

POLL_SECONDS = 0.02
START_SECONDS = 30.0
STOP_SECONDS = 30.0
STALL_SECONDS = 60.0
HOLD_BACK_MS = 600_000


class BenchInputError(ValueError):
    """The benchmark cannot run with these arguments or servers; the message names the change to make."""


class BenchError(RuntimeError):
    """A measurement failed: a process ended, hung, or did not do the work. Carries the end of the workers' log."""


class Target(NamedTuple):
    """The target of a figure on 2 shared cores with 10,000 users and 200,000 events."""

    at_least: bool
    value: float

    def reached(self, value: float) -> bool:
        """Return True if `value` is on the right side."""
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.value:g}"


TARGETS = {
    "drain_cpu_us": Target(at_least=False, value=38),
    "drain_over_copy": Target(at_least=True, value=0.28),
    "drain2_over_copy": Target(at_least=True, value=0.40),
    "drain_over_naive": Target(at_least=True, value=60),
    "signed_over_unsigned": Target(at_least=True, value=0.80),
    "reserve_over_ping": Target(at_least=False, value=1.7),
    "decide_free_over_ping": Target(at_least=False, value=4),
    "decisions_per_s": Target(at_least=True, value=2_000),
    "async_reserve_per_core_s": Target(at_least=True, value=25_000),
    "async_reserve_1000_granted": Target(at_least=True, value=1_000),
    "hung_redis_first_check_ms": Target(at_least=False, value=600),
    "hung_redis_check_p99_ms": Target(at_least=False, value=20),
    "spool_recovery_s": Target(at_least=False, value=5),
    "check_draining_p99_ms": Target(at_least=False, value=10),
    "visible500_p50_ms": Target(at_least=False, value=8),
    "visible500_p99_ms": Target(at_least=False, value=25),
    "visible_p50_ms": Target(at_least=False, value=12),
    "visible_p99_ms": Target(at_least=False, value=30),
    "worker_rss_mb": Target(at_least=False, value=105),
    "boundary_batch_ratio": Target(at_least=False, value=2.0),
    "renew_due_seconds": Target(at_least=False, value=60),
    "grants_due_seconds": Target(at_least=False, value=60),
    "granted_batch_ratio": Target(at_least=False, value=1.5),
    "limited_reserve_p50_ratio": Target(at_least=False, value=1.2),
    "limited_reserve_cpu_ratio": Target(at_least=False, value=1.2),
    "noticed_batch_cpu_ratio": Target(at_least=False, value=1.05),
    "deliveries_per_s": Target(at_least=True, value=300),
    "http_check_over_check": Target(at_least=False, value=3),
    "http_check_p99_ms": Target(at_least=False, value=20),
    "http_events_per_s": Target(at_least=True, value=15_000),
}

# The figures with a target, in the order of the table. There are more without one.
FIGURES = (
    "drain_cpu_us", "drain2_cpu_us", "batched_cpu_us", "naive_cpu_us",
    "copy_rows_per_s", "drain_events_per_s", "drain2_events_per_s", "drain_over_copy", "drain2_over_copy",
    "batched_events_per_s", "drain_over_batched", "naive_events_per_s", "drain_over_naive", "signed_over_unsigned",
    "ping_p50_us", "bare_p50_us", "check_p50_us", "reserve_p50_us", "reserve_p99_us", "charge_p50_us",
    "bare_over_ping", "check_over_ping", "reserve_over_ping", "charge_over_ping", "reserve_over_bare",
    "ping_cpu_us", "bare_cpu_us", "reserve_cpu_us", "async_reserve_cpu_us", "async_reserve_per_s",
    "decide_free_p50_us", "decide_free_over_ping", "decisions_per_s",
    "grants_per_batch", "pool_updates_per_batch", "async_reserve_per_core_s", "async_reserve_1000_granted",
    "hung_redis_first_check_ms", "hung_redis_check_p99_ms", "spool_recovery_s",
    "check_draining_p99_ms", "emit_per_s", "emit_pipelined_per_s",
    "visible500_p50_ms", "visible500_p99_ms", "visible_p50_ms", "visible_p99_ms", "worker_rss_mb",
    "boundary_batch_ratio", "renew_due_seconds", "grants_due_seconds", "grants_due_longest_ms", "granted_batch_ratio",
    "limited_reserve_p50_ratio", "limited_reserve_cpu_ratio", "noticed_batch_cpu_ratio", "deliveries_per_s",
    "http_check_p50_us", "http_check_over_check", "http_check_p99_ms", "http_events_per_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """The size of the measurements."""

    events: int = 200_000
    users: int = 10_000
    rounds: int = 3
    copy_rows: int = 40_000
    batched_events: int = 10_000
    naive_events: int = 2_000
    calls: int = 4_000
    hung_checks: int = 400
    outage_seconds: float = 20.0
    single_emits: int = 4_000
    pipelined_emits: int = 40_000
    visible_seconds: float = 10.0
    decide_seconds: float = 5.0
    boundary_accounts: int = 4_000
    due_accounts: int = 100_000
    notices: int = 5_000
    http_seconds: float = 5.0
    http_events: int = 40_000

    def __post_init__(self) -> None:
        """Raise BenchInputError for sizes that measure nothing."""
        for name, least in (("events", 1_000), ("users", len(load.PLANS)), ("rounds", 1)):
            if getattr(self, name) < least:
                raise BenchInputError(f"--{name}: must be at least {least}")


QUICK = Sizes(
    events=5_000, users=400, rounds=1, copy_rows=5_000, batched_events=300, naive_events=100, calls=100,
    hung_checks=50, outage_seconds=8.0, single_emits=200, pipelined_emits=2_000,
    visible_seconds=1.0, decide_seconds=0.5, boundary_accounts=200, due_accounts=2_000, notices=200,
    http_seconds=1.0, http_events=1_000,
)  # fmt: skip


class Report(NamedTuple):
    """The result of `run`: medians by name, the figures of each round, and the machine."""

    figures: dict[str, float]
    rounds: dict[str, list[float]]
    machine: dict[str, str | int | bool]

    def verdict(self) -> str:
        """Return one line about the missed targets."""
        missed = [name for name in TARGETS if self._reached(name) == "no"]
        unknown = [name for name in TARGETS if name not in self.figures]
        verdict = f"missed: {', '.join(missed)}" if missed else f"all {len(TARGETS) - len(unknown)} targets reached"
        return f"{verdict}; cannot be measured here: {', '.join(unknown)}" if unknown else verdict

    def table(self) -> list[dict[str, str]]:
        """Return rows of figure, median, least and most of its rounds, target, reached: those with a target first."""
        names = (*FIGURES, *(name for name in self.figures if name not in FIGURES))
        return [
            {
                "figure": name,
                "value": in_short(self.figures[name]),
                "least": in_short(min(self.rounds.get(name, [self.figures[name]]))),
                "most": in_short(max(self.rounds.get(name, [self.figures[name]]))),
                "target": str(TARGETS.get(name, "")),
                "reached": self._reached(name),
            }
            for name in names
            if name in self.figures
        ]

    def _reached(self, name: str) -> str:
        if name not in TARGETS or name not in self.figures:
            return ""
        return "yes" if TARGETS[name].reached(self.figures[name]) else "no"

    def save(self, folder: Path) -> str:
        """Write bench.json and bench.png. Return one line with their paths, or the reason for no PNG."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.figures, "machine": self.machine, "rounds": self.rounds}, indent=2)
        (folder / "bench.json").write_text(text + "\n", encoding="utf-8")
        try:
            from benchmarks.plot import draw
        except ModuleNotFoundError as error:
            return f"wrote {folder}/bench.json; no plot: {error.name} is missing (requirements-dev.txt has it)"
        draw(self.figures, self.machine, TARGETS, folder / "bench.png")
        return f"wrote {folder}/bench.json and {folder}/bench.png"


def run(sizes: Sizes, environ: Mapping[str, str]) -> Report:
    """Measure everything on the servers that `environ` names, or on our own. Shows progress on stderr.

    Leaves nothing: it drops its database, empties its Redis database, and ends its processes.
    Raises BenchInputError for a Redis database that is not empty, BenchError if a measurement fails.
    """
    found: dict[str, list[float]] = defaultdict(list)
    with _arena(environ) as arena, _progress(4 + 19 * sizes.rounds, sizes.rounds) as step:
        cpu_before = _cpu_times(arena)
        step(f"opening {sizes.users:,} accounts")
        _open_accounts(arena, sizes.users)
        panels = _open_limited_accounts(arena)

        for number in range(sizes.rounds):
            step("idle calls", number)
            _measure_calls(arena, sizes, number, found)
            step("reserves with limits", number)
            _measure_limits(arena, sizes, panels, number, found)
            step("calls of one event loop", number)
            _measure_async_calls(arena, sizes, number, found)
            step("emit", number)
            _measure_emits(arena, sizes, number, found)
            step("Redis hangs", number)
            _measure_outages(arena, sizes, number, found)
        arena.redis.flushdb()

        with _dyno(arena) as first:
            for number in range(sizes.rounds):
                step("bare COPY", number)
                _measure_copy(arena, sizes, found)
                step(f"{sizes.events:,} events, one worker", number)
                checks = _measure_drain(arena, sizes, 2 * number, "drain", [first.pid], found)
                found["worker_rss_mb"].append(peak_rss_mb(_engine_of(first.pid)))
                with _dyno(arena) as second:
                    step(f"{sizes.events:,} events, two workers", number)
                    pids = [first.pid, second.pid]
                    checks += _measure_drain(arena, sizes, 2 * number + 1, "drain2", pids, found)
                found["check_draining_p50_ms"].append(_percentile(checks, 0.50) / 1e3)
                found["check_draining_p99_ms"].append(_percentile(checks, 0.99) / 1e3)
                step(f"{sizes.batched_events:,} events, the batched consumer", number)
                _measure_peer(arena, sizes, batched, sizes.batched_events, number, found)
                step(f"{sizes.naive_events:,} events, the ORM consumer", number)
                _measure_peer(arena, sizes, naive, sizes.naive_events, number, found)
                _note_drain_ratios(found)
            for number in range(sizes.rounds):
                for rate in VISIBLE_RATES:
                    step(f"visibility at {rate:,} events/s", number)
                    _measure_visibility(arena, sizes, number, rate, found)
            found["worker_rss_mb"].append(peak_rss_mb(_engine_of(first.pid)))
            found["supervisor_rss_mb"].append(peak_rss_mb(first.pid))

        for number in range(sizes.rounds):
            step(f"{sizes.events:,} events, signed and not", number)
            _measure_signatures(arena, sizes, number, found)

        settled = 0
        with _dyno(arena):
            for number in range(sizes.rounds):
                step("decisions of the pool", number)
                settled += _measure_decisions(arena, sizes, number, found)
        _note_pool_batches(arena, settled, found)

        step(f"opening {sizes.due_accounts:,} due accounts")
        _open_due_accounts(arena, sizes.due_accounts)
        step(f"renewing {sizes.due_accounts:,} accounts")
        _measure_renewals(arena, sizes, "renew_due", found)
        step(f"expiring {sizes.due_accounts:,} grants")
        _measure_grants_due(arena, sizes, found)
        for number in range(sizes.rounds):
            step("batches across a boundary", number)
            _measure_boundaries(arena, sizes, number, found)
            step("batches that take from three grants", number)
            _measure_grants(arena, sizes, number, found)
            step("batches in which accounts reach a line", number)
            _measure_notices(arena, sizes, number, found)
            step(f"delivering {sizes.notices:,} notices", number)
            _measure_deliveries(arena, sizes, number, found)

        with _service(arena) as service:
            for number in range(sizes.rounds):
                step("requests over HTTP", number)
                _measure_http(arena, sizes, service, number, found)

        figures = {name: median(values) for name, values in found.items()}
        figures["worker_rss_first_mb"], figures["worker_rss_mb"] = found["worker_rss_mb"][0], found["worker_rss_mb"][-1]
        rounds = {name: [round(value, 4) for value in values] for name, values in found.items()}
        machine = _machine(arena, sizes) | _disturbance(cpu_before, _cpu_times(arena))
        return Report({name: round(value, 4) for name, value in figures.items()}, rounds, machine)


# The measurements, one round each ------------------------------------------------------------------------------------


def _measure_calls(arena: Arena, sizes: Sizes, number: int, found: dict[str, list[float]]) -> None:
    arguments = {"count": sizes.calls, "panel": _panel(sizes), "meter": METER, "run": f"round-{number}"}
    latencies = _result(arena, "calls", arguments)
    cpu = latencies.pop("cpu")
    for name in latencies:
        found[f"{name}_p50_us"].append(_percentile(latencies[name], 0.50))
        found[f"{name}_p99_us"].append(_percentile(latencies[name], 0.99))
        found[f"{name}_cpu_us"].append(cpu[name])
    for name in [each for each in latencies if each != "ping"]:
        found[f"{name}_over_ping"].append(found[f"{name}_p50_us"][-1] / found["ping_p50_us"][-1])
    found["reserve_over_bare"].append(found["reserve_p50_us"][-1] / found["bare_p50_us"][-1])


def _measure_async_calls(arena: Arena, sizes: Sizes, number: int, found: dict[str, list[float]]) -> None:
    holds = 4 * sizes.calls
    arguments = {"count": holds, "in_flight": 64, "at_once": 1_000, "meter": METER, "run": f"round-{number}"}
    result = _result(arena, "async_calls", arguments | {"panel": _panel(sizes)})
    found["async_reserve_per_core_s"].append(holds / result["cpu_seconds"])
    found["async_reserve_cpu_us"].append(result["cpu_seconds"] / holds * 1e6)
    found["async_reserve_per_s"].append(holds / result["wall_seconds"])
    found["async_reserve_1000_granted"].append(result["granted"])


def _measure_emits(arena: Arena, sizes: Sizes, number: int, found: dict[str, list[float]]) -> None:
    arguments = {
        "single": sizes.single_emits, "pipelined": sizes.pipelined_emits, "users": sizes.users, "seed": 100 * number,
    }  # fmt: skip
    seconds = _result(arena, "emits", arguments)
    found["emit_per_s"].append(sizes.single_emits / seconds["single_seconds"])
    found["emit_pipelined_per_s"].append(sizes.pipelined_emits / seconds["pipelined_seconds"])


def _measure_outages(arena: Arena, sizes: Sizes, number: int, found: dict[str, list[float]]) -> None:
    """On a Redis of its own: nobody may freeze one that is given."""
    with redis_server(find_redis(arena.environ)) as own, tempfile.TemporaryDirectory() as folder:
        elsewhere = arena.on_another_redis(own.url, Path(folder))
        arguments = {"redis": own.pid, "panel": _panel(sizes), "meter": METER}
        checks = _result(elsewhere, "hung_checks", arguments | {"count": sizes.hung_checks})["check"]
        found["hung_redis_first_check_ms"].append(checks[0] / 1e3)
        found["hung_redis_check_p99_ms"].append(_percentile(checks[1:], 0.99) / 1e3)
        arguments |= {"seconds": sizes.outage_seconds, "in_flight": OUTAGE_IN_FLIGHT, "run": f"round-{number}"}
        outage = _result(elsewhere, "outage", arguments)
        if not outage["spooled"]:
            raise BenchError(
                f"nothing was spooled in an outage of {sizes.outage_seconds:g} s, so there is no recovery to measure: "
                f"it must outlast METERFALL_REDIS_SOCKET_TIMEOUT_MS ({elsewhere.settings.redis_socket_timeout_ms})"
            )
        found["spool_recovery_s"].append(outage["recovery_seconds"])
        found["spooled_in_outage"].append(outage["spooled"])


def _measure_copy(arena: Arena, sizes: Sizes, found: dict[str, list[float]]) -> None:
    arena.execute(f"TRUNCATE {CEILING_SCHEMA}.usage_log")
    result = _result(arena, "ceiling", {"rows": sizes.copy_rows, "users": sizes.users, "seed": 1})
    found["copy_rows_per_s"].append(result["rows"] / result["seconds"])


def _measure_drain(
    arena: Arena, sizes: Sizes, seed: int, name: str, dynos: Sequence[int], found: dict[str, list[float]]
) -> list[float]:
    """Fill the streams while they are held back, let go, and time the fall. Return latencies of `check` meanwhile, µs.

    `dynos` are the process ids of those that drain. Their CPU time counts from the letting go.

    The clock starts at the first look that finds fewer stream entries than before, so neither the start of a process
    nor the first connection counts. Only stream entries still there at that look count. It stops when the last stream
    is empty, after the publication of the last balance.
    """
    _empty_log(arena)
    _hold_back(arena)
    with Billing.connect(arena.settings) as billing:
        for start in range(0, sizes.events, 10 * EVENTS_A_PIPELINE):
            count = min(10 * EVENTS_A_PIPELINE, sizes.events - start)
            billing.emit_events(load.events(count, sizes.users, seed=10_000 * seed + start))
        panel = list(islice(load.skewed_users(sizes.users, seed), PANEL_USERS))
        arguments = {"rate": CHECKS_PER_SECOND, "panel": panel, "meter": METER}
        probe = _Probe(arena, "checks", arguments, stdin=subprocess.PIPE)
    with probe:
        probe.go()
        cpu = _cpu_seconds(arena, dynos)
        _let_go(arena)
        left = arena.backlog()
        while left == sizes.events:
            left = _next_look(arena, left)
        started, counted = time.perf_counter(), left
        while left:
            left = _next_look(arena, left)
        seconds = time.perf_counter() - started
        _note_cpu(name, sizes.events, cpu, _cpu_seconds(arena, dynos), found)
        latencies = probe.result()["check"]
    (rows,) = arena.execute("SELECT count(*) FROM usage_log")
    if rows != sizes.events:
        raise BenchError(f"{sizes.events} events were drained, {rows} rows are in the log{arena.log_tail()}")
    found[f"{name}_events_per_s"].append(counted / seconds)
    return cast("list[float]", latencies)


def _measure_signatures(arena: Arena, sizes: Sizes, number: int, found: dict[str, list[float]]) -> None:
    """Measure the cost of checking signatures for the workers; signing costs producers little."""
    turns = {"unsigned": arena, "signed": arena.with_signatures()}
    for name in sorted(turns, reverse=bool(number % 2)):
        with _dyno(turns[name]) as dyno:
            _measure_drain(turns[name], sizes, number, f"{name}_drain", [dyno.pid], found)
    signed, unsigned = (found[f"{name}_drain_events_per_s"][-1] for name in ("signed", "unsigned"))
    found["signed_over_unsigned"].append(signed / unsigned)


def _measure_peer(
    arena: Arena, sizes: Sizes, peer: ModuleType, events: int, number: int, found: dict[str, list[float]]
) -> None:
    """Let another consumer bill `events` of its own stream; `peer` is its module in benchmarks/."""
    _empty_log(arena)
    with arena.redis.pipeline(transaction=False) as pipe:
        for event in load.events(events, sizes.users, seed=number):
            pipe.xadd(peer.STREAM, {"e": event.model_dump_json(exclude_none=True)})
        pipe.execute()
    before = _cpu_seconds(arena)
    done = subprocess.run(
        [sys.executable, "-m", peer.__name__], env=arena.environ, stdout=subprocess.PIPE, stderr=arena.log,
        preexec_fn=on_launcher_death(signal.SIGTERM), check=False,
    )  # fmt: skip
    if done.returncode:
        raise BenchError(f"{peer.__name__} ended with {done.returncode}{arena.log_tail()}")
    result = json.loads(done.stdout)
    (rows,) = arena.execute("SELECT count(*) FROM usage_log")
    if not events == result["events"] == rows:
        raise BenchError(f"{peer.__name__} told of {result['events']} of {events} events, {rows} rows are in the log")
    name = peer.__name__.rpartition(".")[2]
    found[f"{name}_events_per_s"].append(events / result["seconds"])
    after = _cpu_seconds(arena)
    if after:
        # Not the time of its start-up, which a consumer that runs for days does not notice.
        before["python"], after["python"] = 0.0, result["cpu_seconds"]
    _note_cpu(name, events, before, after, found)


def _cpu_seconds(arena: Arena, dynos: Sequence[int] = ()) -> dict[str, float]:
    """Return the CPU seconds so far of `dynos` and their children, of Postgres and of Redis; {} if not known."""
    if arena.pids is None:
        return {}
    roots = {"python": dynos, "postgres": [arena.pids.postgres], "redis": [arena.pids.redis]}
    return {part: tree_seconds(pids) for part, pids in roots.items()}


def _note_cpu(
    name: str, events: int, before: Mapping[str, float], after: Mapping[str, float], found: dict[str, list[float]]
) -> None:
    """Note the microseconds per event of each part, and of all together."""
    spent = {part: (after[part] - before[part]) / events * 1e6 for part in after}
    for part, microseconds in spent.items():
        found[f"{name}_{part}_cpu_us"].append(microseconds)
    if spent:
        found[f"{name}_cpu_us"].append(sum(spent.values()))


def _note_drain_ratios(found: dict[str, list[float]]) -> None:
    one, two = found["drain_events_per_s"][-1], found["drain2_events_per_s"][-1]
    found["drain_over_copy"].append(one / found["copy_rows_per_s"][-1])
    found["drain2_over_copy"].append(two / found["copy_rows_per_s"][-1])
    for peer in ("batched", "naive"):
        found[f"drain_over_{peer}"].append(one / found[f"{peer}_events_per_s"][-1])


def _measure_visibility(arena: Arena, sizes: Sizes, number: int, rate: int, found: dict[str, list[float]]) -> None:
    """Let a producer print samples into a pipe, and a watcher read them from it; see benchmarks/probes.py."""
    arguments = {
        "rate": rate, "seconds": sizes.visible_seconds, "users": sizes.users, "seed": 7 * number + rate,
        "sample_every": rate // SAMPLES_PER_SECOND,
    }  # fmt: skip
    reading, writing = os.pipe()
    try:
        with _Probe(arena, "watch", {}, stdin=reading) as watcher:
            with _Probe(arena, "produce", arguments, stdout=writing) as producer:
                os.close(writing)
                writing = -1
                producer.wait(2 * sizes.visible_seconds)
            result = watcher.result()
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    key = "visible" if rate == VISIBLE_RATES[-1] else f"visible{rate}"
    found[f"{key}_p50_ms"].append(_percentile(result["visible"], 0.50) / 1e3)
    found[f"{key}_p99_ms"].append(_percentile(result["visible"], 0.99) / 1e3)
    found[f"{key}_emitted_per_s"].append(result["events"] / result["seconds"])
    _wait_until_drained(arena)


def _measure_decisions(arena: Arena, sizes: Sizes, number: int, found: dict[str, list[float]]) -> int:
    """Return the number of requests decided and settled."""
    arguments = {
        "seconds": sizes.decide_seconds, "in_flight": DECISIONS_IN_FLIGHT, "panel": _panel(sizes), "meter": METER,
        "run": f"round-{number}",
    }  # fmt: skip
    result = _result(arena, "decisions", arguments)
    found["decisions_per_s"].append(result["decisions"] / result["seconds"])
    _wait_until_drained(arena)
    return cast("int", result["decisions"])


def _note_pool_batches(arena: Arena, settled: int, found: dict[str, list[float]]) -> None:
    """Note the writes of the pool's row by Postgres' own count, which is complete once the worker has ended."""
    grants, batches = arena.execute("SELECT count(*), count(DISTINCT created_at) FROM sponsor_grant")
    if grants != settled:
        raise BenchError(f"{settled} requests were settled, {grants} are granted{arena.log_tail()}")
    (updates,) = arena.execute("SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'sponsor_pool'")
    found["grants_per_batch"].append(grants / batches)
    found["pool_updates_per_batch"].append(updates / batches)


def _measure_renewals(arena: Arena, sizes: Sizes, name: str, found: dict[str, list[float]]) -> None:
    """Let `renew_due` store what is due of all due accounts; the figures begin with `name`."""
    result = _result(arena, "renewals", {})
    if result["accounts"] != sizes.due_accounts:
        raise BenchError(f"{sizes.due_accounts} accounts were due, renew_due stored {result['accounts']}")
    found[f"{name}_seconds"].append(result["seconds"])
    found[f"{name}_entries_per_s"].append(result["entries"] / result["seconds"])
    found[f"{name}_longest_ms"].append(result["longest_seconds"] * 1e3)
    found[f"{name}_grown_mb"].append(result["grown_mb"])


def _measure_grants_due(arena: Arena, sizes: Sizes, found: dict[str, list[float]]) -> None:
    """Let the same job expire a grant of each of these accounts, all at one moment."""
    given = _result(arena, "expired_grants", {"meter": METER, "prefix": "due-"}, CREDIT_PROBES)["accounts"]
    arena.execute("ANALYZE balance")
    _measure_renewals(arena, sizes, "grants_due", found)
    (expired,) = arena.execute("SELECT count(*) FROM ledger_entry WHERE kind = 'expire'")
    if not given == expired == sizes.due_accounts:
        raise BenchError(f"{given} grants were due, {expired} have expired{arena.log_tail()}")


def _measure_limits(
    arena: Arena, sizes: Sizes, panels: Mapping[str, list[str]], number: int, found: dict[str, list[float]]
) -> None:
    arguments = {"count": sizes.calls, "panels": panels, "meter": METER, "run": f"round-{number}"}
    result = _result(arena, "limited_calls", arguments, CREDIT_PROBES)
    for name, latencies in result["latencies"].items():
        found[f"{name}_reserve_p50_us"].append(_percentile(latencies, 0.50))
        found[f"{name}_reserve_all_cpu_us"].append(result["cpu"][name])
    for what, figure in (("p50", "reserve_p50_us"), ("cpu", "reserve_all_cpu_us")):
        limited, unlimited = (found[f"{name}_{figure}"][-1] for name in ("limited", "unlimited"))
        found[f"limited_reserve_{what}_ratio"].append(limited / unlimited)


def _measure_grants(arena: Arena, sizes: Sizes, number: int, found: dict[str, list[float]]) -> None:
    result = _result(arena, "granted_batches", _batches(arena, sizes, DUE_PLAN, f"grants-{number}"), CREDIT_PROBES)
    found["granted_batch_ratio"] += map(truediv, result["seconds"]["granted"], result["seconds"]["plain"])
    if "cpu" in result:
        found["granted_batch_cpu_ratio"] += map(truediv, result["cpu"]["granted"], result["cpu"]["plain"])


def _measure_notices(arena: Arena, sizes: Sizes, number: int, found: dict[str, list[float]]) -> None:
    """By CPU time: what one account in a hundred costs is less than what other programs take of seconds."""
    result = _result(arena, "noticed_batches", _batches(arena, sizes, TOLD_PLAN, f"told-{number}"), CREDIT_PROBES)
    if "cpu" in result:
        found["noticed_batch_cpu_ratio"] += map(truediv, result["cpu"]["crossing"], result["cpu"]["plain"])


def _batches(arena: Arena, sizes: Sizes, plan: str, run: str) -> dict[str, object]:
    """Return the arguments of probes that compare batches."""
    roots = None if arena.pids is None else list(arena.pids)
    return {
        "users": sizes.boundary_accounts, "plan": plan, "meter": METER, "turns": BOUNDARY_TURNS, "run": run,
        "roots": roots,
    }  # fmt: skip


def _measure_deliveries(arena: Arena, sizes: Sizes, number: int, found: dict[str, list[float]]) -> None:
    result = _result(arena, "deliveries", {"count": sizes.notices, "run": f"notices-{number}"}, CREDIT_PROBES)
    found["deliveries_per_s"].append(sizes.notices / result["seconds"])
    found["delivery_cpu_us"].append(result["cpu_seconds"] / sizes.notices * 1e6)


def _measure_http(arena: Arena, sizes: Sizes, service: _Service, number: int, found: dict[str, list[float]]) -> None:
    """Ask one running service: one caller in turns with the sync client, many callers, and batches of events."""
    common = {"port": service.port, "key": service.key, "panel": _panel(sizes)}
    one = _result(arena, "one_caller", {**common, "requests": sizes.calls, "meter": METER}, HTTP_PROBES)
    http, client = (_percentile(one[name], 0.50) for name in ("http", "client"))
    found["http_check_p50_us"].append(http)
    found["http_check_over_check"].append(http / client)
    asking = {
        **common, "callers": HTTP_CALLERS, "per_second": HTTP_CHECKS_PER_SECOND, "seconds": sizes.http_seconds,
        "meter": METER,
    }  # fmt: skip
    cpu = tree_seconds([service.process.pid])
    many = _result(arena, "many_callers", asking, HTTP_PROBES)["http"]
    found["http_check_cpu_us"].append((tree_seconds([service.process.pid]) - cpu) / (len(many) + HTTP_CALLERS) * 1e6)
    found["http_check_p99_ms"].append(_percentile(many, 0.99) / 1e3)
    sending = {
        **common, "events": sizes.http_events, "size": HTTP_BATCH_EVENTS, "callers": HTTP_BATCH_CALLERS,
        "meter": METER, "run": f"http-{number}",
    }  # fmt: skip
    found["http_events_per_s"].append(sizes.http_events / _result(arena, "batches", sending, HTTP_PROBES)["seconds"])


def _measure_boundaries(arena: Arena, sizes: Sizes, number: int, found: dict[str, list[float]]) -> None:
    arguments = {"users": sizes.boundary_accounts, "plan": DUE_PLAN, "turns": BOUNDARY_TURNS, "run": f"round-{number}"}
    seconds = _result(arena, "boundaries", arguments)
    for name, values in seconds.items():
        found[f"{name}_batch_events_per_s"] += [sizes.boundary_accounts / value for value in values]
    found["boundary_batch_ratio"] += map(truediv, seconds["crossing"], seconds["plain"])


def _panel(sizes: Sizes) -> list[str]:
    """Return users that no check denies."""
    return load.users_of_plan("max", load.user_names(sizes.users))[:PANEL_USERS]


def _wait_until_drained(arena: Arena) -> None:
    left = arena.backlog()
    while left:
        left = _next_look(arena, left)


def _next_look(arena: Arena, before: int) -> int:
    """Return the backlog a moment later. Raises BenchError if it has not changed for a long time."""
    deadline = time.monotonic() + STALL_SECONDS
    while True:
        time.sleep(POLL_SECONDS)
        left = arena.backlog()
        if left != before:
            return left
        if time.monotonic() > deadline:
            raise BenchError(f"{left} events are left and nobody drains them{arena.log_tail()}")


# Servers -------------------------------------------------------------------------------------------------------------


class Arena(NamedTuple):
    """Servers with a database and an empty Redis of ours, their settings, and the log of our processes.

    `pids` are the servers' processes, None if they run elsewhere.
    """

    servers: Servers
    settings: Settings
    environ: dict[str, str]
    redis: redis.Redis
    postgres: psycopg.Connection[tuple[Any, ...]]
    log: IO[bytes]
    pids: ServerPids | None

    def execute(self, statement: str) -> tuple[Any, ...]:
        """Run one statement of our own; return its first row, () without one."""
        cursor = self.postgres.execute(statement)
        return (cursor.fetchone() or ()) if cursor.description else ()

    def backlog(self) -> int:
        """Return the number of stream entries in all streams."""
        return sum(backlogs(self.redis, self.settings.partitions).values())

    def with_signatures(self) -> Arena:
        """Return the same with signing producers, and workers that require a right signature."""
        environ = self.environ | {variable_name("signing_keys"): SIGNING_KEY, variable_name("signatures"): "required"}
        return self._replace(environ=environ, settings=load_settings(environ))

    def on_another_redis(self, url: str, spool: Path) -> Arena:
        """Return the same for producers on another Redis, who spool what it does not confirm."""
        environ = self.environ | {"REDIS_URL": url, variable_name("spool_path"): str(spool)}
        return self._replace(environ=environ, settings=load_settings(environ))

    def log_tail(self) -> str:
        """Return the last lines in the log of our processes, to append to a message."""
        self.log.seek(0)
        lines = self.log.read().decode("utf-8", "replace").splitlines()[-20:]
        return "".join(f"\n{line}" for line in lines)


@contextmanager
def _arena(environ: Mapping[str, str]) -> Iterator[Arena]:
    """Open a scratch database with the ledger's tables, and an empty Redis; both are as before at the end."""
    with (
        running_servers(environ) as servers,
        redis.Redis.from_url(servers.redis_url) as client,
        tempfile.TemporaryFile() as log,
    ):
        if stored := client.dbsize():
            raise BenchInputError(f"REDIS_URL: must name an empty database for the benchmark; its size is {stored}")
        try:
            with (
                scratch_database(servers.database_url, f"meterfall_bench_{os.getpid()}") as url,
                psycopg.connect(url, autocommit=True) as postgres,
            ):
                child_environ = {
                    **naming_servers(environ, url, servers.redis_url),
                    # The benchmarks are not installed, and processes import them from any folder.
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(CHECKOUT), environ.get("PYTHONPATH")))),
                    variable_name("log_level"): "WARNING",
                    # Periodic jobs of the supervisor would fall into a random round.
                    variable_name("verify_interval_seconds"): "0",
                    variable_name("renew_interval_seconds"): "0",
                    # The receiver of notices is on this machine.
                    variable_name("webhook_private_addresses"): "true",
                    # Accounts open in this tier, and the pool must cover every request.
                    variable_name(f"sponsor_daily_units_{LOWEST_TIER}"): str(POOL_UNITS),
                }
                migrate(url)
                settings = load_settings(child_environ)
                yield Arena(servers, settings, child_environ, client, postgres, log, server_pids(postgres, client))
        finally:
            client.flushdb()


@contextmanager
def scratch_database(server_url: str, name: str) -> Iterator[str]:
    """Make a database for the length of the block; yield its URL. If killed, it stays; its name has our process id."""
    server = make_url(server_url).set(drivername="postgresql")
    with psycopg.connect(server.render_as_string(hide_password=False), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            yield server.set(database=name).render_as_string(hide_password=False)
        finally:
            admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def _open_accounts(arena: Arena, users: int) -> None:
    """Open all accounts, a quarter of them on each plan, and a pool that lasts; make the ceiling's table."""
    names = load.user_names(users)
    with closing(Resources.open(arena.settings)) as resources:
        for plan in load.PLANS:
            accounts.open_many(resources, load.users_of_plan(plan, names), plan)
    arena.redis.flushdb()  # no balance is cached yet, so the refreshes of the new accounts are void
    arena.execute(f"INSERT INTO sponsor_pool (initial, balance, opened_at) VALUES ({POOL_UNITS}, {POOL_UNITS}, now())")
    arena.execute(f"CREATE SCHEMA {CEILING_SCHEMA}")
    arena.execute(f"CREATE TABLE {CEILING_SCHEMA}.usage_log (LIKE public.usage_log INCLUDING ALL)")
    arena.execute("ANALYZE")


def _open_limited_accounts(arena: Arena) -> dict[str, list[str]]:
    """Open users that no limit denies, half of them with a limit for each window; return both halves."""
    panels = {name: [f"{name}-{at:03}" for at in range(LIMITED_USERS)] for name in ("limited", "unlimited")}
    with closing(Resources.open(arena.settings)) as resources:
        for names in panels.values():
            accounts.open_many(resources, names, "max")
        for user_id in panels["limited"]:
            for per in PERS:
                limits.set_limit(resources, user_id, METER, per, MAX_AMOUNT)
    arena.redis.flushdb()  # as above
    return panels


def _open_due_accounts(arena: Arena, count: int) -> None:
    """Open `count` accounts with an ended period."""
    start = datetime.now(UTC) - DUE_AGE
    names = [f"due-{number:06}" for number in range(count)]
    with closing(Resources.open(arena.settings)) as resources:
        for first in range(0, count, OPEN_CHUNK_ACCOUNTS):
            accounts.open_many(resources, names[first : first + OPEN_CHUNK_ACCOUNTS], DUE_PLAN, start=start)
    arena.redis.flushdb()  # as above
    arena.execute("ANALYZE")


def _empty_log(arena: Arena) -> None:
    """Empty the usage log and the marks of roll-ups; balances and sequences go on.

    A roll-up of the round before would fall into the next measurement.
    """
    arena.redis.delete(*(partition.unrolled for partition in keys.partitions_of(arena.settings.partitions)))
    arena.execute("ALTER TABLE usage_log DISABLE TRIGGER usage_log_no_truncate")
    arena.execute("TRUNCATE usage_log")
    arena.execute("ALTER TABLE usage_log ENABLE TRIGGER usage_log_no_truncate")


def _hold_back(arena: Arena) -> None:
    """Let the streams fill while workers idle: no bell rings, and no drain begins, until `_let_go`."""
    with arena.redis.pipeline(transaction=False) as pipe:
        for partition in keys.partitions_of(arena.settings.partitions):
            pipe.set(partition.halted, "filling for the benchmark", px=HOLD_BACK_MS)
            pipe.set(partition.rung, "1", px=HOLD_BACK_MS)
        pipe.execute()


def _let_go(arena: Arena) -> None:
    """Ring for all partitions at once."""
    partitions = keys.partitions_of(arena.settings.partitions)
    with arena.redis.pipeline() as pipe:
        pipe.delete(*(partition.halted for partition in partitions))
        pipe.rpush(keys.BELL, *(partition.number for partition in partitions))
        pipe.execute()


def _machine(arena: Arena, sizes: Sizes) -> dict[str, str | int | bool]:
    """Return the facts about this machine and its servers."""
    fsync, synchronous_commit, version = (
        arena.execute(f"SHOW {name}")[0] for name in ("fsync", "synchronous_commit", "server_version")
    )
    server = arena.redis.info("server")
    redis_version = server.get("valkey_version") or server["redis_version"]
    return {
        "command": "meterfall bench --quick"
        if sizes == QUICK
        else f"make bench EVENTS={sizes.events} USERS={sizes.users} ROUNDS={sizes.rounds}",
        "quick": sizes == QUICK,
        "date": datetime.now(UTC).date().isoformat(),
        "version": read_version(),
        "cores": os.cpu_count() or 0,
        "processor": processor_name(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "postgres": f"PostgreSQL {version.split()[0]}",
        "redis": f"{server.get('server_name', 'redis').capitalize()} {redis_version}",
        "durable": fsync == "on" and synchronous_commit in ("on", "remote_write", "remote_apply"),
        "events": sizes.events,
        "users": sizes.users,
        "rounds": sizes.rounds,
    }


def _cpu_times(arena: Arena) -> tuple[MachineTime, float] | None:
    """Return the CPU times of this machine, and the seconds of ours and the servers' of them; None if not known."""
    machine = machine_time()
    if machine is None or arena.pids is None:
        return None
    return machine, tree_seconds([os.getpid(), *arena.pids])


def _disturbance(
    before: tuple[MachineTime, float] | None, after: tuple[MachineTime, float] | None
) -> dict[str, str | int | bool]:
    """Return the share of this machine's CPU time that other programs took meanwhile."""
    if before is None or after is None:
        return {}
    busy = after[0].busy - before[0].busy - (after[1] - before[1])
    return {"others_cpu_percent": round(100 * max(0.0, busy) / (after[0].total - before[0].total))}


# Processes -----------------------------------------------------------------------------------------------------------


@contextmanager
def _dyno(arena: Arena) -> Iterator[subprocess.Popen[bytes]]:
    """Run one dyno by the real command for the length of the block; ready when RQ has registered its worker."""
    wanted = _registered_workers(arena) + 1
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", "worker", "run"], env=arena.environ, stdout=arena.log, stderr=arena.log,
        preexec_fn=on_launcher_death(signal.SIGTERM),
    )  # fmt: skip
    try:
        _wait_for_start(arena, process, "worker", lambda: _registered_workers(arena) >= wanted)
        yield process
    finally:
        _end(process)


class _Service(NamedTuple):
    """A running `meterfall serve`, and an API key of it."""

    process: subprocess.Popen[bytes]
    port: int
    key: str


@contextmanager
def _service(arena: Arena) -> Iterator[_Service]:
    """Run the HTTP service, one process, by the real command for the length of the block; ready when it answers."""
    with closing(Resources.open(arena.settings)) as resources:
        key = api_keys.add(resources, "bench", Role.PRODUCER, actor="bench").secret
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = int(free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", "serve", "--port", str(port)], env=arena.environ, stdout=arena.log,
        stderr=arena.log, preexec_fn=on_launcher_death(signal.SIGTERM),
    )  # fmt: skip
    try:
        _wait_for_start(arena, process, "service", lambda: _listens(port))
        yield _Service(process, port, key)
    finally:
        _end(process)


def _wait_for_start(arena: Arena, process: subprocess.Popen[bytes], name: str, is_ready: Callable[[], bool]) -> None:
    """Wait until a process of ours is ready. Raises BenchError if it ends before, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"the {name} did not start{arena.log_tail()}")
        time.sleep(POLL_SECONDS)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _registered_workers(arena: Arena) -> int:
    return int(arena.redis.scard("rq:workers"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, and SIGKILL if that is not enough."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Probe:
    """A measuring process, of benchmarks/probes.py or another `module`, for the length of a block."""

    def __init__(
        self,
        arena: Arena,
        name: str,
        arguments: Mapping[str, Any],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        module: str = "benchmarks.probes",
    ) -> None:
        self._arena = arena
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, name, json.dumps(arguments)], env=arena.environ,
            stdin=subprocess.DEVNULL if stdin is None else stdin, stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=arena.log, preexec_fn=on_launcher_death(signal.SIGTERM),
        )  # fmt: skip
        if stdout is None and self._read_line() != b"ready\n":
            raise self._failure()

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        _end(self._process)

    def go(self) -> None:
        """Start a probe that waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """End the probe's standard input, if it has one, and wait for its result."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        line = self._read_line()
        if not line:
            raise self._failure()
        return cast("dict[str, Any]", json.loads(line))

    def wait(self, seconds: float) -> None:
        """Wait for the end of a probe that works for `seconds`."""
        try:
            code = self._process.wait(seconds + STALL_SECONDS)
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            raise self._failure()

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _failure(self) -> BenchError:
        _end(self._process)
        return BenchError(f"the probe {self._name} ended with {self._process.returncode}{self._arena.log_tail()}")


def _result(arena: Arena, name: str, arguments: Mapping[str, Any], module: str = "benchmarks.probes") -> dict[str, Any]:
    """Run a probe by itself, and return its result."""
    with _Probe(arena, name, arguments, module=module) as probe:
        return probe.result()


def _engine_of(supervisor: int) -> int:
    """Return the process id of a supervisor's RQ worker, its only child."""
    listed = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    if listed.exists():
        return int(listed.read_text().split()[0])
    done = subprocess.run(["pgrep", "-P", str(supervisor)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


# Leaves --------------------------------------------------------------------------------------------------------------


def _percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def in_short(value: float) -> str:
    """Return a figure with three digits, or all digits of its whole part."""
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


class _Step(Protocol):
    def __call__(self, description: str, number: int | None = None) -> None:
        """Begin the part that `description` names, in the round of this number, counted from 0."""


@contextmanager
def _progress(steps: int, rounds: int) -> Iterator[_Step]:
    """Give each part a line on stderr, its seconds when it ends; yield the function to call when a part begins."""
    begun, since = 0, 0.0

    def end() -> None:
        if begun:
            print(f"{time.monotonic() - since:7.1f} s", file=sys.stderr, flush=True)

    def step(description: str, number: int | None = None) -> None:
        nonlocal begun, since
        end()
        begun, since = begun + 1, time.monotonic()
        turn = "" if number is None else f", round {number + 1} of {rounds}"
        print(f"{begun:>4} of {steps}  {description + turn:<58}", end="", file=sys.stderr, flush=True)

    try:
        yield step
    finally:
        end()
