"""Measuring processes for credits and notices: `python -m benchmarks.credit_probes NAME ARGUMENTS`.

They work as those of benchmarks/probes.py do. What grants, limits or notices cost is measured in pairs: once with them,
once without, in turns within one process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from time import monotonic, perf_counter, process_time
from typing import Any

from psycopg.types.json import Jsonb

from benchmarks import load
from benchmarks.cpu import live_seconds, tree_pids
from benchmarks.probes import CALLS_A_BLOCK, Result, drain_everything, main, say_ready, timed
from config.settings import load_settings
from worker.admin import accounts, notices, webhooks
from worker.client import Billing
from worker.consumer.notices import send_notices
from worker.consumer.worker_process import spare_collections
from worker.ledger import notices as ledger_notices
from worker.ledger.connection import batch_connection
from worker.process import on_launcher_death
from worker.resources import Resources
from worker.rules.grants import Grant, Grants
from worker.rules.rows import Notice

# Of three grants the first two are small: an event takes from one, two or three of them.
_GRANTED = (1_000, 1_000, 10**6)
_SPEND_GRANTS = """
    UPDATE balance SET used = allowance, purchased = %s, grants = %s WHERE meter = %s AND user_id = ANY(%s)
"""
_WRITE_AGAIN = "UPDATE balance SET used = used WHERE meter = %s AND user_id = ANY(%s)"
# One unit before the line of 80 %, which the rules of the plan have.
_PUT_BEFORE_LINE = "UPDATE balance SET used = allowance * 8 / 10 - 1 WHERE meter = %s AND user_id = ANY(%s)"
_LINE_EVERY = 100

Prepare = Callable[[Resources, Sequence[str]], None]


def granted_batches(users: int, plan: str, meter: str, turns: int, run: str, roots: Sequence[int] | None) -> Result:
    """Measure draining one event of each of `users` accounts: plain, and from three grants of an account.

    The results are those of `_batches`.
    """
    now = datetime.now(UTC)
    three = [
        Grant(f"order-{at}", units, units, "paid", 50, now, None, now) for at, units in enumerate(_GRANTED)
    ]  # fmt: skip
    row = Jsonb(Grants(tuple(three)).as_json())

    def give(resources: Resources, names: Sequence[str]) -> None:
        _execute(resources, _SPEND_GRANTS, (sum(_GRANTED), row, meter, list(names)))

    return _batches({"plain": partial(_write_again, meter), "granted": give}, users, plan, meter, turns, run, roots)


def noticed_batches(users: int, plan: str, meter: str, turns: int, run: str, roots: Sequence[int] | None) -> Result:
    """Measure the same while no account reaches a line of its notices, and while one in a hundred does.

    Raises RuntimeError if others are told than these.
    """
    told: list[int] = []

    def put_before_line(resources: Resources, names: Sequence[str]) -> None:
        _write_again(meter, resources, [name for at, name in enumerate(names) if at % _LINE_EVERY])
        _execute(resources, _PUT_BEFORE_LINE, (meter, list(names[::_LINE_EVERY])))
        told.append(len(names[::_LINE_EVERY]))

    found = _batches(
        {"plain": partial(_write_again, meter), "crossing": put_before_line}, users, plan, meter, turns, run, roots
    )
    with closing(Resources.open(load_settings(os.environ))) as resources:
        (count,) = _execute(
            resources, "SELECT count(*) FROM notice WHERE starts_with(user_id, %s)", (f"{run}-",)
        )  # fmt: skip
    if count != sum(told):
        raise RuntimeError(f"{sum(told)} accounts reached a line, {count} notices are stored")
    return found


def _batches(
    turns_of: dict[str, Prepare],
    users: int,
    plan: str,
    meter: str,
    turns: int,
    run: str,
    roots: Sequence[int] | None,
) -> Result:
    """Return `seconds` and `cpu` seconds of each turn, by name.

    Each turn opens accounts for all names on `plan` and prepares them; the order alternates. The CPU time is that of
    this process and of those of `roots` with their children that live; it is missing without them. `run` keeps the
    accounts of one run from those of another.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    settings = load_settings(os.environ)
    with closing(Resources.open(settings)) as resources, Billing.connect(settings) as billing:
        spare_collections()
        say_ready()
        for turn in range(turns):
            for name in sorted(turns_of, reverse=turn % 2 == 0):
                names = [f"{run}-{turn}-{name}-{number:05}" for number in range(users)]
                accounts.open_many(resources, names, plan)
                turns_of[name](resources, names)
                drain_everything(resources)  # the refreshes of the new accounts
                pairs = zip(names, load.events(users, 1, seed=turn), strict=True)
                billing.emit_events(
                    [event.model_copy(update={"user_id": user_id, "meter": meter}) for user_id, event in pairs]
                )
                pids = {os.getpid(), *tree_pids(roots or ())}
                spent = live_seconds(pids)
                started = perf_counter()
                drain_everything(resources)
                seconds[name].append(perf_counter() - started)
                cpu[name].append(live_seconds(pids) - spent)
    return {"seconds": seconds, **({} if roots is None else {"cpu": cpu})}


def limited_calls(count: int, panels: dict[str, list[str]], meter: str, run: str) -> Result:
    """Measure `count` reserves of each of the `panels` of users, a block of them in turns.

    `latencies` are in microseconds. `cpu` is that of this process and of Redis for a call, in microseconds. Balances
    are cached before; holds are released again, untimed.
    """
    latencies: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, float] = defaultdict(float)
    with Billing.connect() as billing:
        for panel in panels.values():
            for user_id in panel:
                billing.estimate(user_id, meter, 1)
        say_ready()
        for start in range(0, count, CALLS_A_BLOCK):
            block = range(start, min(start + CALLS_A_BLOCK, count))
            turn = start // CALLS_A_BLOCK
            for name in sorted(panels, reverse=bool(turn % 2)):
                panel = panels[name]
                holds = [(panel[at % len(panel)], f"{run}-{name}-{at}") for at in block]
                call = partial(_reserve, billing, meter, iter(holds))
                spent = _redis_seconds(billing) + process_time()
                latencies[name] += timed(call, block)
                cpu[name] += _redis_seconds(billing) + process_time() - spent
                for user_id, key in holds:
                    billing.release(user_id, meter, key)
    return {"latencies": latencies, "cpu": {name: seconds / count * 1e6 for name, seconds in cpu.items()}}


def _reserve(billing: Billing, meter: str, holds: Iterator[tuple[str, str]], _: int) -> None:
    user_id, key = next(holds)
    billing.reserve(user_id, meter, 1, key)


def _redis_seconds(billing: Billing) -> float:
    """Return the CPU seconds of Redis by its own count, which is finer than that of /proc."""
    used = billing.redis.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def expired_grants(meter: str, prefix: str) -> Result:
    """Give each account with this `prefix` a grant that has ended; return their number. No probe: it measures nothing.

    A row for each account and nothing else: an operator's call for each of 100,000 would take minutes.
    """
    now = datetime.now(UTC)
    ended = Grant("gift", 500, 500, "promotional", 50, now, now, now)
    row = Jsonb(Grants((ended,)).as_json())
    say_ready()
    with (
        closing(Resources.open(load_settings(os.environ))) as resources,
        batch_connection(resources.engine) as postgres,
    ):
        done = postgres.execute(
            "UPDATE balance SET purchased = %s, grants = %s WHERE meter = %s AND starts_with(user_id, %s)",
            (ended.left, row, meter, prefix),
        )
        postgres.commit()
    return {"accounts": done.rowcount}


def deliveries(count: int, run: str) -> Result:
    """Measure seconds in which a sender posts `count` notices of half as many accounts to a receiver beside it.

    Raises RuntimeError if the receiver did not get all.
    """
    settings = load_settings(os.environ)
    with closing(Resources.open(settings)) as resources, _receiver() as (process, url):
        spare_collections()
        notices.feed(resources, limit=1)  # what others were told has its place before the webhook is there
        added = webhooks.add(resources, url)
        now = datetime.now(UTC)
        facts = {"plan": "plus", "percent": 80, "used": 240_000, "limit": 300_000, "available": 60_000, "suggested": 9}
        made = [
            Notice(f"{run}-{at // 2:05}", "premium_voice", "balance.threshold", "balance.threshold:percent=80",
                   f"period-{at % 2}", 1, now, now, facts)
            for at in range(count)
        ]  # fmt: skip
        with batch_connection(resources.engine) as postgres:
            ledger_notices.store(postgres, made)
            postgres.commit()
        say_ready()
        started, cpu_started, delivered = perf_counter(), process_time(), 0
        while delivered < count:
            sent = send_notices(resources, monotonic() + settings.webhook_time_box_seconds)
            delivered += sent.delivered
            if not sent.more and delivered < count:
                raise RuntimeError(f"{delivered} of {count} notices were delivered, {sent.failed} attempts failed")
        seconds, cpu_seconds = perf_counter() - started, process_time() - cpu_started
        webhooks.remove(resources, added.webhook_id)
        process.terminate()
        assert process.stdout is not None
        received = int(process.stdout.readline())
    if received != count:
        raise RuntimeError(f"{count} notices were sent, {received} came")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


@contextmanager
def _receiver() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a receiver in a process of its own, which a sender would not share with it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.credit_probes", "receive", "{}"], stdout=subprocess.PIPE, text=True,
        preexec_fn=on_launcher_death(signal.SIGTERM),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def receive() -> None:
    """Take notices on a port of the loopback interface until SIGTERM; print its URL, and at the end their number."""
    print(asyncio.run(_receive()), flush=True)


async def _receive() -> int:
    came = 0
    over = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        json.loads(await reader.readexactly(length))
        came += 1
        writer.write(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
        writer.close()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    async with await asyncio.start_server(take, "127.0.0.1", 0, backlog=256) as server:
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", flush=True)
        await over.wait()
    return came


# Leaves --------------------------------------------------------------------------------------------------------------


def _write_again(meter: str, resources: Resources, names: Sequence[str]) -> None:
    """Write the balances once more, as the others of a pair are: both have rows of the same age."""
    _execute(resources, _WRITE_AGAIN, (meter, list(names)))


def _execute(resources: Resources, statement: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Run one statement and commit; return its first row, () without one."""
    with batch_connection(resources.engine) as postgres:
        cursor = postgres.execute(statement, arguments)
        row = (cursor.fetchone() or ()) if cursor.description else ()
        postgres.commit()
    return row


PROBES: dict[str, Callable[..., Result | None]] = {
    "granted_batches": granted_batches,
    "noticed_batches": noticed_batches,
    "limited_calls": limited_calls,
    "expired_grants": expired_grants,
    "deliveries": deliveries,
    "receive": receive,
}


if __name__ == "__main__":
    main(PROBES)
