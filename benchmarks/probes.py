"""Measuring processes: `python -m benchmarks.probes NAME ARGUMENTS`, the arguments as one JSON object.

Each measures one figure and does nothing else, so that no other thread takes the interpreter in the middle of a call.
It prints the line "ready" when it is warm and, at its end, the result as one line of JSON. Moments are those of
`time.monotonic`, which all processes of a machine share; latencies are in microseconds.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import count
from math import inf
from operator import sub
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter, process_time
from typing import Any

from benchmarks import load
from config.catalogue import load_catalogue
from config.settings import load_settings
from schemas.answers import Serve, SponsorAnswer
from schemas.events import UsageEvent
from worker.admin import accounts
from worker.client import AsyncBilling, Billing, preflight
from worker.client.effects import Command
from worker.client.recording import new_key
from worker.consumer.drain import drain_stream
from worker.consumer.intake import Intake
from worker.consumer.renewals import renew_due
from worker.consumer.worker_process import spare_collections
from worker.demo.processes import freeze_tree, thaw_tree
from worker.keyspace import keys
from worker.keyspace.entries import RawEntry
from worker.ledger import batch as ledger_batch
from worker.ledger.columns import COPY_NULL, copy_rows
from worker.ledger.connection import batch_connection, open_engine
from worker.resources import Resources
from worker.rules.batch import work_out
from worker.rules.lifecycle import open_account
from worker.rules.received import Event
from worker.rules.rows import Loaded

Result = dict[str, Any]

# The schema of the ceiling's copy of the usage log, under the same name: the same statement writes to it.
CEILING_SCHEMA = "ceiling"
ROWS_A_COMMIT = 2_000
CALLS_A_BLOCK = 100
EVENTS_A_PIPELINE = 1_000
POLL_SECONDS = 0.001
USUAL_SECONDS = 2.0
WINDOW_SECONDS = 0.25
# Longer than a month and shorter than two: an account opened then has one boundary to cross.
DUE_AGE = timedelta(days=40)


def ceiling(rows: int, users: int, seed: int) -> Result:
    """Measure rows per second of a bare COPY: the rows of a drain by the same statement, each written by itself.

    One connection, durable, `ROWS_A_COMMIT` per commit. It makes the rows before the clock starts.
    """
    found = _usage_rows(load.events(rows, users, seed), users)
    batches = [found[start : start + ROWS_A_COMMIT] for start in range(0, len(found), ROWS_A_COMMIT)]
    gc.freeze()
    gc.disable()
    engine = open_engine(load_settings(os.environ))
    with batch_connection(engine) as postgres:
        postgres.execute(f"SET search_path TO {CEILING_SCHEMA}")
        postgres.commit()
        say_ready()
        started = perf_counter()
        for batch in batches:
            with postgres.cursor() as cursor:
                copy_rows(cursor, ledger_batch.COPY_USAGE, batch)
            postgres.commit()
        seconds = perf_counter() - started
    engine.dispose()
    return {"rows": len(found), "seconds": seconds}


def calls(count: int, panel: Sequence[str], meter: str, run: str) -> Result:
    """Measure latencies of PING, a bare EVALSHA, check, reserve, charge and a free decision of the pool.

    PING and the EVALSHA, of the script of a reserve with its arguments, go through redis-py, and tell what server and
    library take; the others go through `Billing`. They take turns, a block of calls each. Balances and standings of the
    users of `panel` are cached before. Holds are released again, untimed. `run` keeps the ids of one run from those of
    another. `cpu` is the CPU of this process for a call, in microseconds.
    """
    with Billing.connect() as billing:
        for user_id in panel:
            billing.estimate(user_id, meter, 1)
        billing.reserve(panel[0], meter, 1, f"{run}-first").release()  # Redis has the script from here on
        bare: Iterator[tuple[object, ...]] = iter(())
        turns: dict[str, Callable[[int], object]] = {
            "ping": lambda _: billing.redis.ping(),
            "bare": lambda _: billing.redis.execute_command(*next(bare)),
            "check": lambda at: billing.check(panel[at % len(panel)], meter, 1),
            "reserve": lambda at: billing.reserve(panel[at % len(panel)], meter, 1, f"{run}-hold-{at}"),
            "charge": lambda at: billing.charge(panel[at % len(panel)], meter, 1, f"{run}-charge-{at}"),
            "decide_free": lambda at: _must_be_free(billing.decide(panel[at % len(panel)], 1, f"{run}-request-{at}")),
        }
        found: dict[str, list[float]] = defaultdict(list)
        cpu: dict[str, list[float]] = defaultdict(list)
        say_ready()
        for start in range(0, count, CALLS_A_BLOCK):
            block = range(start, min(start + CALLS_A_BLOCK, count))
            bare = iter([_reserve_command(billing, panel[at % len(panel)], meter, f"{run}-bare-{at}") for at in block])
            for name, call in turns.items():
                began = process_time()
                found[name].extend(timed(call, block))
                cpu[name].append((process_time() - began) / len(block) * 1e6)
            for at in block:
                for kind in ("hold", "bare"):
                    billing.release(panel[at % len(panel)], meter, f"{run}-{kind}-{at}")
                billing.release_sponsored(panel[at % len(panel)], f"{run}-request-{at}", "measured")
        return {**found, "cpu": {name: median(each) for name, each in cpu.items()}}


def _reserve_command(billing: Billing, user_id: str, meter: str, key: str) -> tuple[object, ...]:
    """Return the command that `billing.reserve` sends for one unit."""
    steps = preflight.reserve(billing.context, user_id, meter, 1, key)
    step = next(steps)
    assert isinstance(step, Command)
    return step.args


def async_calls(count: int, in_flight: int, at_once: int, panel: Sequence[str], meter: str, run: str) -> Result:
    """Measure seconds, and CPU seconds of this process, for `count` holds by `AsyncBilling`, `in_flight` at a time.

    Then reserve `at_once` more all together, and count those that are granted. The balances of the users of `panel`
    are cached before. `run` keeps the ids of one run from those of another.
    """
    return asyncio.run(_async_calls(count, in_flight, at_once, panel, meter, run))


async def _async_calls(total: int, in_flight: int, at_once: int, panel: Sequence[str], meter: str, run: str) -> Result:
    numbers = iter(range(total))
    async with AsyncBilling.connect() as billing:
        for user_id in panel:
            await billing.check(user_id, meter, 1)
        say_ready()

        async def serve() -> None:
            for number in numbers:
                await billing.reserve(panel[number % len(panel)], meter, 1, f"{run}-async-{number}")

        began, started = perf_counter(), process_time()
        await asyncio.gather(*(serve() for _ in range(in_flight)))
        seconds, wall_seconds = process_time() - started, perf_counter() - began
        together = (
            billing.reserve(panel[number % len(panel)], meter, 1, f"{run}-together-{number}")
            for number in range(at_once)
        )
        answers = await asyncio.gather(*together, return_exceptions=True)
        await asyncio.gather(
            *(billing.release(panel[at % len(panel)], meter, f"{run}-async-{at}") for at in range(total)),
            *(billing.release(panel[at % len(panel)], meter, f"{run}-together-{at}") for at in range(at_once)),
        )
    granted = sum(not isinstance(answer, BaseException) for answer in answers)
    return {"cpu_seconds": seconds, "wall_seconds": wall_seconds, "granted": granted}


def hung_checks(count: int, panel: Sequence[str], meter: str, redis: int) -> Result:
    """Measure latencies of `count` checks while the Redis with the process id `redis` is frozen, in their order.

    They go by the ledger, which is asked once before.
    """
    with Billing.connect() as billing:
        billing.check(panel[0], meter, 1)
        say_ready()
        freeze_tree(redis)
        try:
            return {"check": timed(lambda at: billing.check(panel[at % len(panel)], meter, 1), range(count))}
        finally:
            thaw_tree(redis)


def outage(seconds: float, in_flight: int, panel: Sequence[str], meter: str, run: str, redis: int) -> Result:
    """Measure how long after an outage of `seconds` a service is as it was, while `in_flight` users reserve and settle.

    That is the end of the first window in which nothing is spooled and the median is at most twice that of before. The
    Redis with the process id `redis` is frozen meanwhile. `run` keeps the ids of one run from those of another.
    """
    return asyncio.run(_outage(seconds, panel[:in_flight], meter, run, redis))


async def _outage(seconds: float, users: Sequence[str], meter: str, run: str, redis: int) -> Result:
    pieces: list[tuple[float, float, bool]] = []  # when it began, how long it took, was it spooled
    is_over = False

    def window(since: float) -> tuple[float, int]:
        """Median seconds, and how many were spooled, of what began since then."""
        found = [(took, spooled) for began, took, spooled in pieces if began >= since]
        return median(took for took, _ in found) if found else inf, sum(spooled for _, spooled in found)

    async with AsyncBilling.connect() as billing:

        async def serve(user_id: str) -> None:
            for number in count():
                if is_over:
                    return
                began = monotonic()
                async with billing.reserve(user_id, meter, 2, f"{run}-outage-{number}") as hold:
                    answer = await hold.settle(1)
                pieces.append((began, monotonic() - began, answer.spooled))

        say_ready()
        working = [asyncio.create_task(serve(user_id)) for user_id in users]
        await asyncio.sleep(USUAL_SECONDS / 2)  # balances are loaded
        began = monotonic()
        await asyncio.sleep(USUAL_SECONDS)
        usual, _ = window(began)
        freeze_tree(redis)
        try:
            gone = monotonic()
            await asyncio.sleep(seconds)
        finally:
            thaw_tree(redis)
        back = monotonic()
        spooled = sum(spooled for began, took, spooled in pieces if began + took >= gone)
        while True:
            began = monotonic()
            await asyncio.sleep(WINDOW_SECONDS)
            took, late = window(began)
            if not late and took <= 2 * usual:
                break
        recovery = monotonic() - back
        is_over = True
        await asyncio.gather(*working)
    return {"recovery_seconds": recovery, "spooled": spooled, "usual_seconds": usual}


def decisions(seconds: float, in_flight: int, panel: Sequence[str], meter: str, run: str) -> Result:
    """Count the requests to the pool that one process decides and settles within `seconds`, `in_flight` at a time.

    The users of `panel` make them in turns; the pool covers all of them. `run` keeps their ids from those of another
    run.
    """
    return asyncio.run(_decisions(seconds, in_flight, panel, meter, run))


async def _decisions(seconds: float, in_flight: int, panel: Sequence[str], meter: str, run: str) -> Result:
    numbers = count()
    async with AsyncBilling.connect() as billing:
        for user_id in panel:
            await billing.estimate(user_id, meter, 1)
        say_ready()
        started = monotonic()

        async def serve() -> None:
            while monotonic() < started + seconds:
                number = next(numbers)
                user_id, request_id = panel[number % len(panel)], f"{run}-{number}"
                _must_be_free(await billing.decide(user_id, 1, request_id))
                await billing.settle_sponsored(user_id, request_id, 1)

        await asyncio.gather(*(serve() for _ in range(in_flight)))
    return {"decisions": next(numbers), "seconds": monotonic() - started}


def emits(single: int, pipelined: int, users: int, seed: int) -> Result:
    """Measure seconds for `single` calls of `emit`, and for `emit_events` of `pipelined` events, a thousand per call.

    `emit` makes the event from its arguments; `emit_events` gets existing events.
    """
    work = load.uses(single, users, seed)
    many = load.events(pipelined, users, seed + 1)
    with Billing.connect() as billing:
        billing.emit_events(load.events(EVENTS_A_PIPELINE, users, seed + 2))
        say_ready()
        started = perf_counter()
        for use in work:
            _emit(billing, use, new_key())
        single_seconds = perf_counter() - started
        started = perf_counter()
        for start in range(0, pipelined, EVENTS_A_PIPELINE):
            billing.emit_events(many[start : start + EVENTS_A_PIPELINE])
        pipelined_seconds = perf_counter() - started
    return {"single_seconds": single_seconds, "pipelined_seconds": pipelined_seconds}


def checks(rate: float, panel: Sequence[str], meter: str) -> Result:
    """Measure latencies of `check`, `rate` a second, from the line "go" on standard input until its end.

    The users of `panel` take turns; their balances are cached before.
    """
    latencies = []
    with Billing.connect() as billing:
        for user_id in panel:
            billing.check(user_id, meter)
        say_ready()
        sys.stdin.readline()
        started = monotonic()
        at = 0
        while not _readable(max(0.0, started + at / rate - monotonic())):
            latencies += timed(lambda turn: billing.check(panel[turn % len(panel)], meter), [at])
            at += 1
    return {"check": latencies}


def produce(rate: float, seconds: float, users: int, seed: int, sample_every: int) -> None:
    """Emit single events at `rate` a second for `seconds`, on schedule even if answers are slow.

    On a machine that cannot keep up it stops after twice that time; the number of events tells.

    As soon as every `sample_every`-th event is accepted, it prints a line of JSON: event, user, meter, and the moment
    right before the call of `emit`. At the end it prints an object with the number of events and their seconds.
    """
    work = load.uses(int(rate * seconds), users, seed)
    gc.freeze()
    with Billing.connect() as billing:
        billing.redis.ping()
        started = monotonic()
        emitted = 0
        for at, use in enumerate(work):
            if monotonic() > started + 2 * seconds:
                break
            early = started + at / rate - monotonic()
            if early > 0:
                time.sleep(early)
            event_id, began = new_key(), monotonic()
            _emit(billing, use, event_id)
            emitted += 1
            if at % sample_every == 0:
                print(json.dumps([event_id, use.user_id, use.meter, began]), flush=True)
    print(json.dumps({"events": emitted, "seconds": monotonic() - started}), flush=True)


def watch() -> Result:
    """Measure latencies from `emit` to the visible balance, of the events that a producer prints to our standard input.

    An event's id leaves its pending map in the step that publishes the balance with it. So the probe looks for the ids
    of the few samples under way about once a millisecond; the moment of the answer counts.
    """
    settings = load_settings(os.environ)
    outstanding: list[tuple[str, str, float]] = []
    latencies = []
    lines = _lines_of_stdin()
    produced = None
    with Billing.connect() as billing:
        billing.redis.ping()
        say_ready()
        while produced is None or outstanding:
            if not outstanding:
                _readable(None)
            arrived = next(lines, None)
            if arrived is None and produced is None:
                raise RuntimeError("the producer died")
            for line in arrived or []:
                if isinstance(line, dict):
                    produced = line
                    continue
                event_id, user_id, meter, began = line
                account = keys.account_of(user_id, settings.partitions)
                outstanding.append((account.pending(meter), f"e:{event_id}", began))
            with billing.redis.pipeline(transaction=False) as pipe:
                for name, event, _ in outstanding:
                    pipe.hexists(name, event)
                pending = pipe.execute()
            now = monotonic()
            latencies += [
                (now - began) * 1e6 for (*_, began), there in zip(outstanding, pending, strict=True) if not there
            ]
            outstanding = [sample for sample, there in zip(outstanding, pending, strict=True) if there]
            time.sleep(POLL_SECONDS)
    return {"visible": latencies, **produced}


def renewals() -> Result:
    """Measure the job `renew_due`: seconds for all due boundaries, its longest transaction, its growth in MB."""
    with closing(Resources.open(load_settings(os.environ))) as resources:
        resources.claim()
        spare_collections()
        say_ready()
        before = peak_rss_mb(os.getpid())
        moments = [perf_counter()]
        done = renew_due(resources, progress=lambda _: moments.append(perf_counter()))
        seconds = perf_counter() - moments[0]
        longest = max(map(sub, moments[1:], moments), default=0.0)
    return {
        "accounts": done.accounts, "entries": done.entries, "seconds": seconds, "longest_seconds": longest,
        "grown_mb": peak_rss_mb(os.getpid()) - before,
    }  # fmt: skip


def boundaries(users: int, plan: str, turns: int, run: str) -> Result:
    """Measure seconds to drain one event of each of `users` accounts: once plain, once with an ended period.

    Each turn opens new accounts for both on `plan`, which has calendar periods; the order alternates. `run` keeps the
    accounts of one run from those of another.
    """
    found: dict[str, list[float]] = {"plain": [], "crossing": []}
    settings = load_settings(os.environ)
    with closing(Resources.open(settings)) as resources, Billing.connect(settings) as billing:
        spare_collections()
        say_ready()
        for turn in range(turns):
            for name in sorted(found, reverse=turn % 2 == 0):
                start = None if name == "plain" else datetime.now(UTC) - DUE_AGE
                names = [f"{run}-{turn}-{name}-{number:05}" for number in range(users)]
                accounts.open_many(resources, names, plan, start=start)
                drain_everything(resources)  # the refreshes of the new accounts
                pairs = zip(names, load.events(users, 1, seed=turn), strict=True)
                billing.emit_events([event.model_copy(update={"user_id": user_id}) for user_id, event in pairs])
                started = perf_counter()
                drain_everything(resources)
                found[name].append(perf_counter() - started)
    return dict(found)


# Leaves --------------------------------------------------------------------------------------------------------------


def drain_everything(resources: Resources) -> None:
    for partition in keys.partitions_of(resources.settings.partitions):
        while drain_stream(resources, partition).more:
            pass


def _usage_rows(events: Sequence[UsageEvent], users: int) -> list[tuple[object, ...]]:
    """Return the rows of the usage log that a drain of `events` writes, in its order."""
    settings = load_settings(os.environ)
    catalogue = load_catalogue(settings.catalogue_path)
    now = datetime.now(UTC)
    names = load.user_names(users)
    plans = {user_id: plan for plan in load.PLANS for user_id in load.users_of_plan(plan, names)}
    opened = {user_id: open_account(catalogue, user_id, plan, "active", now) for user_id, plan in plans.items()}
    streams: dict[keys.Partition, list[RawEntry]] = defaultdict(list)
    entry_id = f"{int(now.timestamp() * 1_000)}-0".encode()
    for event in events:
        payload = event.model_dump_json(exclude_none=True).encode()
        streams[keys.partition_of(event.user_id, settings.partitions)].append((entry_id, [b"v", b"1", b"e", payload]))
    rows: list[tuple[object, ...]] = []
    for partition, entries in streams.items():
        intake = Intake(partition, settings, catalogue)
        for start in range(0, len(entries), settings.batch_max_events):
            batch = list(intake.receive(entries[start : start + settings.batch_max_events]))
            assert all(isinstance(item, Event) for item in batch)
            outcome = work_out(batch, Loaded(now, 1, opened, {}), catalogue, None)
            lines = ledger_batch.usage_text(outcome.writes.usage, now).split("\n")[:-1]
            rows += [tuple(None if value == COPY_NULL else value for value in line.split("\t")) for line in lines]
            opened |= {one.user_id: one.account for one in outcome.disposals if one.account}
    return rows


def peak_rss_mb(pid: int) -> float:
    """Return the peak resident memory of a process, in MB of 2^20 bytes; the current one without /proc."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1_024
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1_024


def _emit(billing: Billing, use: load.Use, event_id: str) -> None:
    billing.emit(
        use.user_id, use.meter, use.quantity,
        event_id=event_id, source=use.source, reference_id=use.reference_id, dimensions=use.dimensions,
    )  # fmt: skip


def _must_be_free(answer: SponsorAnswer) -> None:
    """Raise RuntimeError unless the pool covers all of the request."""
    if answer.serve is not Serve.FREE:
        raise RuntimeError(f"the pool does not cover {answer.request_id}: {answer.reason}")


def timed(call: Callable[[int], object], turns: Sequence[int]) -> list[float]:
    """Return the microseconds of each call."""
    found = []
    for at in turns:
        started = perf_counter()
        call(at)
        found.append((perf_counter() - started) * 1e6)
    return found


def say_ready() -> None:
    print("ready", flush=True)


def _readable(seconds: float | None) -> bool:
    """Wait until standard input is readable or has ended, at most `seconds`; return True if so."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _lines_of_stdin() -> Iterator[list[Any]]:
    """Yield the JSON lines that arrived since the last time. Never waits; ends with standard input."""
    rest = b""
    while True:
        if not _readable(0):
            yield []
            continue
        chunk = os.read(sys.stdin.fileno(), 65_536)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield [json.loads(line) for line in lines]


PROBES: dict[str, Callable[..., Result | None]] = {
    "ceiling": ceiling,
    "calls": calls,
    "decisions": decisions,
    "emits": emits,
    "checks": checks,
    "produce": produce,
    "watch": watch,
    "renewals": renewals,
    "boundaries": boundaries,
    "async_calls": async_calls,
    "hung_checks": hung_checks,
    "outage": outage,
}


def main(probes: Mapping[str, Callable[..., Result | None]]) -> None:
    """Run the one of `probes` that the command line names."""
    name, arguments = sys.argv[1:]
    result = probes[name](**json.loads(arguments))
    if result is not None:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(PROBES)
