"""`meterfall demo`: services at work, workers that drain, and the proof that every unit is accounted for.

Three producers: two services that reserve before they work, in threads, and a gateway on asyncio that charges and
emits. Some of them forget holds, repeat themselves or send nonsense. Then a few more accounts see their period close
(worker/demo/periods.py), others ask the sponsorship pool (worker/demo/sponsorship.py), and one spends credits of a
wallet (worker/demo/credits.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from secrets import token_hex
from threading import Event
from typing import Any

from rich.progress import TaskID

from worker.admin import accounts, credits
from worker.client import AsyncBilling, Billing
from worker.client.effects import Command, Effects
from worker.demo.credits import prove_spent, spend_credits
from worker.demo.periods import close_periods
from worker.demo.sponsorship import prove_sponsored, serve_callers
from worker.demo.stage import Report, Stage, Tally, open_missing, own_workers, prove, stage, wait_until_drained
from worker.demo.work import (
    Charged,
    Customer,
    Emitted,
    Held,
    Malformed,
    Work,
    largest_amount,
    make_customers,
    make_load,
)
from worker.errors import UsageDenied
from worker.keyspace.entries import plain_entry

WORKERS = 2
_SERVICES = 2
_GATEWAY_CONCURRENCY = 32
# Abandoned holds must still be there when the proof counts them, however long a large demo takes.
_HOLD_TTL_SECONDS = 3_600
# Every third customer buys credits for this many of the largest pieces of work; not the very busiest, who run up debt.
_BUYERS = slice(1, None, 3)
_PURCHASE_WORKS = 20
# Every third customer brings saved allowance along, for this many of the largest pieces of work.
_SAVERS = slice(2, None, 3)
_SAVED_WORKS = 10


def run_demo(environ: Mapping[str, str], *, size: int, users: int, seed: int) -> Report:
    """Do `size` pieces of work for `users` new accounts, spread over all plans.

    On servers named in `environ` the accounts stay; our own servers are deleted afterwards.
    Raises RehearsalError if workers do not get through, and the errors of the servers.
    """
    with stage(environ) as on:
        prefix = f"demo-{token_hex(3)}-"
        plans = {code: list(plan.meters) for code, plan in on.resources.catalogue.plans.items() if plan.active}
        customers = make_customers(prefix, users, plans)
        stranger = Charged(f"{prefix}stranger", customers[0].meters[0], "w-stranger", 1)
        load = [*make_load(seed, size - 1, customers), stranger]
        with own_workers(on.resources, WORKERS) as workers:
            _open_savers(on, customers[_SAVERS])
            open_missing(on, customers)
            _sell_credits(on, customers)
            started = time.monotonic()
            tally = _produce(on, load)
            produced = time.monotonic()
            wait_until_drained(on, workers)
            seconds = time.monotonic() - started
            drained = _entries(tally)
            # In parallel, as both mostly wait.
            with ThreadPoolExecutor(2, "act") as threads:
                serving = threads.submit(serve_callers, on, prefix)
                spending = threads.submit(spend_credits, on, workers, prefix)
                closed = close_periods(on, workers, prefix, tally)
                served, played = serving.result(), spending.result()
            wait_until_drained(on, workers)
            tally.add(served.tally)
            if played is not None:
                tally.add(played.tally)
        numbers, usage, faults = prove(on, prefix, tally)
        sponsored, wrong = prove_sponsored(on, prefix, served)
        steps, told, unlike = ([], [], []) if played is None else prove_spent(on, played)
        others = {period.user_id for period in closed} | {one.user_id for one in served.requests if one.user_id}
        if played is not None:
            others.add(played.user_id)
        about: dict[str, object] = {
            "postgres": on.servers.postgres,
            "redis": on.servers.redis,
            "seed": seed,
            "accounts": len(customers) + len(others),
            "operations": size,
            "operations_per_second": round(size / (produced - started)),
            "entries": _entries(tally),
            "entries_per_second": round(drained / seconds),
            "seconds": round(seconds, 2),
        }
        if on.lasting:
            about["look_at_one"] = f"meterfall account show {customers[0].user_id}"
        return Report(about | numbers | sponsored, usage, faults + wrong + unlike, closed, served.requests, steps, told)


def _entries(tally: Tally) -> int:
    """Count the stream entries of the producers."""
    return len(tally.accepted) + tally.repeated + tally.malformed.total()


def _open_savers(on: Stage, savers: Sequence[Customer]) -> None:
    """Open the accounts that start with rollover, on meters that take it."""
    by_plan: dict[str, list[str]] = {}
    for customer in savers:
        by_plan.setdefault(customer.plan, []).append(customer.user_id)
    for plan, users in by_plan.items():
        meters = on.resources.catalogue.plans[plan].meters
        saved = {
            meter: _SAVED_WORKS * largest_amount(meter)
            for meter, allowance in meters.items()
            if on.resources.catalogue.spills[meter] and allowance.quantity is not None and allowance.wallet is None
        }
        accounts.open_many(on.resources, users, plan, rollover=saved)


def _sell_credits(on: Stage, customers: Sequence[Customer]) -> None:
    buyers = customers[_BUYERS]
    bar = on.bars.add_task("purchases", total=len(buyers))
    for customer in buyers:
        draws = on.resources.catalogue.draws(customer.plan)
        for meter in customer.meters:
            if on.resources.catalogue.spills[meter] and meter not in draws:
                units = _PURCHASE_WORKS * largest_amount(meter)
                credits.grant(on.resources, customer.user_id, meter, units, key=f"order-{customer.user_id}-{meter}")
        on.bars.advance(bar)


def _produce(on: Stage, load: Sequence[Work]) -> Tally:
    """Let the producers do all of the load at the same time; return their joint tally."""
    held = [work for work in load if isinstance(work, Held)]
    other = [work for work in load if not isinstance(work, Held)]
    bar = on.bars.add_task("operations", total=len(load))
    stopping = Event()
    with ThreadPoolExecutor(_SERVICES + 1, "producer") as threads:
        try:
            running = [threads.submit(_service, on, bar, held[n::_SERVICES], stopping) for n in range(_SERVICES)]
            running.append(threads.submit(asyncio.run, _gateway(on, bar, other, stopping)))
            tally = Tally()
            for producer in running:
                tally.add(producer.result())
        finally:
            stopping.set()
    return tally


def _service(on: Stage, bar: TaskID, load: Sequence[Held], stopping: Event) -> Tally:
    """Serve the load as a service that reserves before it works."""
    tally = Tally()
    with Billing.connect(on.resources.settings) as billing:
        for work in load:
            if stopping.is_set():
                break
            _hold_and_work(billing, work, tally)
            on.bars.advance(bar)
    return tally


def _hold_and_work(billing: Billing, work: Held, tally: Tally) -> None:
    try:
        hold = billing.reserve(work.user_id, work.meter, work.reserved, work.key, _HOLD_TTL_SECONDS)
    except UsageDenied as denied:
        tally.deny(denied)
        return
    for page, amount in enumerate(work.pages):
        tally.take(hold.capture(f"{work.key}-p{page}", amount, source="demo", dimensions={"page_idx": page}))
    if work.ending == "settle":
        tally.take(hold.settle(work.actual, source="demo"))
    elif work.ending == "release":
        hold.release()
    else:
        tally.left_open.add((work.user_id, work.key))


async def _gateway(on: Stage, bar: TaskID, load: Sequence[Work], stopping: Event) -> Tally:
    """Serve the load as a service on asyncio with many requests at a time."""
    tally = Tally()
    async with AsyncBilling.connect(on.resources.settings) as billing:
        for start in range(0, len(load), _GATEWAY_CONCURRENCY):
            if stopping.is_set():
                break
            requests = load[start : start + _GATEWAY_CONCURRENCY]
            await asyncio.gather(*(_request(billing, work, tally) for work in requests))
            on.bars.advance(bar, len(requests))
    return tally


async def _request(billing: AsyncBilling, work: Work, tally: Tally) -> None:
    if isinstance(work, Emitted):
        facts = {"model_slug": work.model} if work.model else None
        for _ in range(work.times):
            tally.take(
                await billing.emit(
                    work.user_id, work.meter, work.quantity, event_id=work.event_id, source="demo", dimensions=facts
                )
            )
    elif isinstance(work, Charged):
        try:
            tally.take(await billing.charge(work.user_id, work.meter, work.amount, work.event_id, source="demo"))
        except UsageDenied as denied:
            tally.deny(denied)
    elif isinstance(work, Malformed):
        stream = billing.context.partition(work.user_id).entries
        await billing.run(_append(stream, plain_entry(work.payload.encode(), billing.context.signer)))
        tally.malformed[work.reason.value] += 1


def _append(stream: str, fields: Mapping[str, Any]) -> Effects[None]:
    """Append a stream entry as a producer in any language does, with a plain XADD."""
    yield Command(("XADD", stream, "*", *(part for pair in fields.items() for part in pair)))
