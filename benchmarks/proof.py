"""The cost of a proof, and what it does to a dyno beside it: `python -m benchmarks.proof`.

1. **Cost**: a ledger of `--users` accounts is proven, and `--changes` more events are drained. Then the incremental
   proof of these new changes, and a proof of everything from zero, count the processor time of Python and of Postgres,
   in µs for each change. Postgres' is that of the whole server, with its background processes: nothing else runs on it.
2. **In the way**: a dyno drains `--rate` events a second, in turns with and without a process that proves the whole
   ledger from zero beside it, as a dyno would. From `emit` to the visible balance, the ratio of the 99th percentiles
   within a round counts; other programs on the machine disturb both parts of a round alike.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from time import monotonic, process_time, sleep

from benchmarks import load
from benchmarks.bench import (
    START_SECONDS,
    VISIBLE_RATES,
    Arena,
    BenchError,
    Sizes,
    _arena,
    _dyno,
    _end,
    _measure_visibility,
    _open_accounts,
)
from benchmarks.probes import EVENTS_A_PIPELINE, drain_everything
from worker.client import Billing
from worker.consumer import jobs
from worker.consumer.worker_process import spare_collections
from worker.process import on_launcher_death
from worker.reports.proof_run import prove_ledger
from worker.resources import Resources

TARGET_CPU_US = 35.0
TARGET_P99_RATIO = 1.3
_NICENESS = 10
_TICKS = os.sysconf("SC_CLK_TCK")


def measure_cost(arena: Arena, changes: int, users: int) -> dict[str, float]:
    """Prove, drain `changes` more events, and prove again; return µs of processor time for each change."""
    found: dict[str, float] = {}
    with closing(Resources.open(arena.settings)) as resources, Billing.connect(arena.settings) as billing:
        spare_collections()
        if prove_ledger(resources).differences:
            raise BenchError("the new ledger differs")
        for start in range(0, changes, 10 * EVENTS_A_PIPELINE):
            billing.emit_events(load.events(min(10 * EVENTS_A_PIPELINE, changes - start), users, seed=start))
            drain_everything(resources)
        # Now, or autovacuum would come in the middle of the measurements.
        arena.execute("VACUUM (ANALYZE)")
        arena.execute("CHECKPOINT")
        for name, whole in (("new", False), ("from_zero", True)):
            python, postgres, began = process_time(), _postgres_seconds(arena), monotonic()
            report = prove_ledger(resources, whole=whole)
            if report.differences or (report.from_zero > 0) != whole or report.changes < changes:
                raise BenchError(f"the proof is not as expected: {report}")
            found[f"{name}_changes"] = report.changes
            found[f"{name}_python_us"] = (process_time() - python) / report.changes * 1e6
            found[f"{name}_postgres_us"] = (_postgres_seconds(arena) - postgres) / report.changes * 1e6
            found[f"{name}_cpu_us"] = found[f"{name}_python_us"] + found[f"{name}_postgres_us"]
            found[f"{name}_seconds"] = monotonic() - began
    return found


def measure_in_the_way(arena: Arena, rounds: int, rate: int, seconds: float, users: int) -> dict[str, float]:
    """Return the medians of the 99th percentiles, without and with a proof, and of their ratios, all in ms."""
    sizes = Sizes(users=users, visible_seconds=seconds)
    found: dict[str, list[float]] = defaultdict(list)
    with _dyno(arena):
        for number in range(rounds):
            for name in sorted(("alone", "proving"), reverse=bool(number % 2)):
                latencies: dict[str, list[float]] = defaultdict(list)
                if name == "alone":
                    _measure_visibility(arena, sizes, number, rate, latencies)
                else:
                    with _proof_from_zero(arena):
                        _measure_visibility(arena, sizes, number, rate, latencies)
                key = "visible" if rate == VISIBLE_RATES[-1] else f"visible{rate}"
                for share in ("p50", "p99"):
                    found[f"{name}_{share}_ms"] += latencies[f"{key}_{share}_ms"]
            for share in ("p50", "p99"):
                found[f"{share}_ratio"].append(found[f"proving_{share}_ms"][-1] / found[f"alone_{share}_ms"][-1])
    return {name: median(values) for name, values in found.items()}


@contextmanager
def _proof_from_zero(arena: Arena) -> Iterator[None]:
    """Run the process of the proof, as a dyno does, with a run of all accounts from zero that outlives the block."""
    arena.execute("TRUNCATE proof_run, proof_checkpoint")
    queue = jobs.proof_queue(arena.settings, jobs.rq_connection(arena.settings))
    jobs.enqueue_proof(queue)
    end_with_us = on_launcher_death(signal.SIGTERM)

    def before_its_program() -> None:
        if end_with_us is not None:
            end_with_us()
        os.nice(_NICENESS)

    process = subprocess.Popen(
        [sys.executable, "-m", "worker.consumer.proof_process"], env=arena.environ, stdout=arena.log, stderr=arena.log,
        preexec_fn=before_its_program,
    )  # fmt: skip
    try:
        deadline = monotonic() + START_SECONDS
        while not _steps(arena):
            if monotonic() > deadline:
                raise BenchError("the proof did not start")
            sleep(0.05)
        yield
        if not arena.execute("SELECT 1 FROM proof_run WHERE finished_at IS NULL"):
            raise BenchError("the proof was over too soon: more --changes, or fewer --seconds")
    finally:
        _end(process)
        queue.connection.delete(queue.key)


def _steps(arena: Arena) -> int:
    return int((arena.execute("SELECT step FROM proof_run") or (0,))[0])


def _postgres_seconds(arena: Arena) -> float:
    """Return the processor time of the server: of the processes that live, and of those that have ended."""
    (folder,) = arena.execute("SHOW data_directory")
    postmaster = int(Path(folder, "postmaster.pid").read_text().split()[0])
    listed = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    ticks = sum(_ticks(postmaster)) + sum(sum(_ticks(int(child))[:2]) for child in listed)
    return ticks / _TICKS


def _ticks(pid: int) -> tuple[int, int, int, int]:
    """Return the ticks of a process in user and system mode, and the same of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    utime, stime, cutime, cstime = map(int, fields[11:15])
    return utime, stime, cutime, cstime


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print JSON. Exit code 1 if a target is missed. Leaves nothing behind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=__doc__)
    parser.add_argument("--changes", type=int, default=200_000, help="new events between two proofs")
    parser.add_argument("--users", type=int, default=10_000, help="accounts that have them")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of turns of the dyno with and without a proof")
    parser.add_argument("--rate", type=int, default=500, help="events a second that the dyno drains")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each turn")
    options = parser.parse_args(arguments)
    with _arena(os.environ) as arena:
        _open_accounts(arena, options.users)
        figures = measure_cost(arena, options.changes, options.users)
        print(json.dumps(figures), file=sys.stderr)
        figures |= measure_in_the_way(arena, options.rounds, options.rate, options.seconds, options.users)
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}, indent=2))
    missed = [
        f"{name} {figures[name]:.2f} > {target:g}"
        for name, target in (("new_cpu_us", TARGET_CPU_US), ("p99_ratio", TARGET_P99_RATIO))
        if figures.get(name, 0) > target
    ]
    print(f"missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
