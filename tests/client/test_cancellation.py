"""Callers that are cancelled: nothing that they began is lost, and nothing stays held for a caller who has gone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import give_account, rows
from tests.support.resources import settings_for
from tests.support.sponsorship import Everybody
from tests.support.streams import drain, pending_of
from tests.support.waiting import wait_until
from worker.client import AsyncBilling
from worker.keyspace.keys import SPONSORSHIP

USER, METER = "alice", "premium_voice"


@pytest.fixture(params=["plain", "spool"])
def settings(request: pytest.FixtureRequest, emptied_database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    spool = {"spool_path": tmp_path / "spool"} if request.param == "spool" else {}
    made = settings_for(emptied_database_url, redis_url, **spool)
    give_account(made, USER, "max")
    return made


@pytest.fixture(params=["loaded", "unknown"])
def scripts(request: pytest.FixtureRequest, settings: Settings, redis: Redis) -> str:
    """Whether Redis knows the scripts when a caller is cancelled."""
    return str(request.param)


@asynccontextmanager
async def connected(settings: Settings, redis: Redis, scripts: str = "loaded") -> AsyncIterator[AsyncBilling]:
    """A client that has been in use."""
    async with AsyncBilling.connect(settings, trust=Everybody("elite")) as billing:
        await billing.check(USER, METER, 1)
        if scripts == "unknown":
            redis.script_flush()
        yield billing


def events_and_holds(redis: Redis, settings: Settings) -> tuple[dict[str, int], set[str]]:
    """Events that are pending with their units, and holds that are open."""
    pending = pending_of(redis, settings, USER, METER)
    events = {name[2:]: units for name, units in pending.items() if name.startswith("e:")}
    return events, {name[2:] for name in pending if name.startswith("h:")}


def test_streams_that_are_cancelled_together_are_settled(settings: Settings, redis: Redis, scripts: str) -> None:
    async def stream(billing: AsyncBilling, key: str, ready: anyio.Event) -> None:
        async with billing.reserve(USER, METER, 10_000, key=key) as hold:
            ready.set()
            try:
                await anyio.sleep_forever()
            finally:
                await hold.settle(4_000)

    async def main() -> None:
        async with connected(settings, redis) as billing:
            async with anyio.create_task_group() as group:
                for number in range(50):
                    ready = anyio.Event()
                    group.start_soon(stream, billing, f"job-{number}", ready)
                    await ready.wait()
                if scripts == "unknown":
                    redis.script_flush()
                group.cancel_scope.cancel()
            found = events_and_holds(redis, settings)
        assert found == ({f"job-{number}": 4_000 for number in range(50)}, set())

    anyio.run(main)
    drain(settings, USER)
    assert rows(settings, "SELECT count(*), sum(amount) FROM usage_log") == [(50, 200_000)]


async def usual_seconds(work: Callable[[str], Awaitable[None]]) -> float:
    """How long this work takes on this machine now, undisturbed: the median of five."""
    taken = []
    for number in range(5):
        began = time.perf_counter()
        await work(f"usual-{number}")
        taken.append(time.perf_counter() - began)
    return sorted(taken)[2]


def test_work_cancelled_at_any_moment_is_settled_or_given_back(settings: Settings, redis: Redis, scripts: str) -> None:
    moments = random.Random(7)
    settled: list[str] = []

    async def work(billing: AsyncBilling, key: str) -> None:
        async with billing.reserve(USER, METER, 100, key=key) as hold:
            await anyio.sleep(moments.random() / 1_000)
            settled.append(key)
            await hold.settle(40)
            await anyio.sleep(moments.random() / 1_000)

    async def main() -> None:
        async with connected(settings, redis, scripts) as billing:
            usual = await usual_seconds(lambda key: work(billing, key))
            if scripts == "unknown":
                redis.script_flush()
            for number in range(200):
                async with anyio.create_task_group() as group:
                    group.start_soon(work, billing, f"job-{number}")
                    await anyio.sleep(moments.random() * 2 * usual)
                    group.cancel_scope.cancel()
                events, holds = events_and_holds(redis, settings)
                assert (events, holds) == (dict.fromkeys(settled, 40), set()), number

    anyio.run(main)
    assert 20 < len([key for key in settled if key.startswith("job-")]) < 200, "the moments are spread over the work"


@pytest.mark.parametrize("ask", ["await", "async with"])
def test_a_reserve_that_times_out_leaves_no_hold(settings: Settings, redis: Redis, ask: str) -> None:
    moments = random.Random(3)
    held = 0

    async def reserve(billing: AsyncBilling, key: str) -> None:
        if ask == "async with":
            async with billing.reserve(USER, METER, 100, key=key):
                return
        hold = await billing.reserve(USER, METER, 100, key=key)
        await hold.release()

    async def main() -> None:
        nonlocal held
        async with connected(settings, redis) as billing:
            usual = await usual_seconds(lambda key: reserve(billing, key))
            for number in range(60):
                try:
                    async with asyncio.timeout(moments.random() * 2 * usual):
                        await reserve(billing, f"job-{number}")
                    held += 1
                except TimeoutError:
                    pass
                assert events_and_holds(redis, settings) == ({}, set())

    asyncio.run(main())
    assert 0 < held < 60, "some had time enough, and some had not"


def test_a_decision_that_nobody_received_holds_nothing_of_the_pool(settings: Settings, redis: Redis) -> None:
    async def main() -> None:
        async with connected(settings, redis) as billing:
            kept = await billing.decide(USER, 10, "kept")
            assert kept.absorb == 10
            for number in range(20):
                asking = asyncio.ensure_future(billing.decide(USER, 10, f"job-{number}"))
                await asyncio.sleep(0)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            again = asyncio.ensure_future(billing.decide(USER, 10, "kept"))
            await asyncio.sleep(0)
            again.cancel()
            with pytest.raises(asyncio.CancelledError):
                await again
        assert redis.hgetall(SPONSORSHIP.promised) == {b"h:kept": b"10", b"total": b"10"}

    asyncio.run(main())


@pytest.fixture
def ended(settings: Settings, redis: Redis) -> Iterator[list[str]]:
    """Keys of work that an event loop was closed over; all of it is one event each."""
    keys: list[str] = []
    yield keys
    wait_until(lambda: events_and_holds(redis, settings)[1] == set(), "no hold is open")
    assert events_and_holds(redis, settings) == (dict.fromkeys(keys, 40), set())


def test_what_is_under_way_when_its_loop_ends_is_recorded(settings: Settings, redis: Redis, ended: list[str]) -> None:
    billing = AsyncBilling.connect(settings)

    async def work(key: str, ready: asyncio.Event) -> None:
        async with billing.reserve(USER, METER, 100, key=key) as hold:
            ready.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(key)
                await hold.settle(40)

    async def main() -> None:
        tasks: list[asyncio.Task[Any]] = []
        for number in range(10):
            ready = asyncio.Event()
            tasks.append(asyncio.create_task(work(f"job-{number}", ready)))
            await ready.wait()

    asyncio.run(main())  # which cancels all of them
    assert len(ended) == 10
    asyncio.run(billing.close())


def test_an_emit_whose_caller_gave_up_is_recorded_once(settings: Settings, redis: Redis) -> None:
    async def main() -> None:
        async with connected(settings, redis) as billing:
            for number in range(20):
                emitting = asyncio.create_task(billing.emit(USER, METER, 5, event_id=f"e{number}"))
                await asyncio.sleep(0)
                emitting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await emitting
            found = events_and_holds(redis, settings)
        assert found == ({f"e{number}": 5 for number in range(20)}, set())

    asyncio.run(main())


def test_a_retry_keeps_the_hold_that_its_cancelled_caller_began(settings: Settings, redis: Redis) -> None:
    async def main() -> None:
        async with connected(settings, redis) as billing:
            for number in range(20):
                first = asyncio.ensure_future(billing.reserve(USER, METER, 100, f"job-{number}"))
                await asyncio.sleep(0)
                again = asyncio.ensure_future(billing.reserve(USER, METER, 100, f"job-{number}"))
                await asyncio.sleep(0)
                first.cancel()
                hold = await again
                with pytest.raises(asyncio.CancelledError):
                    await first
                assert events_and_holds(redis, settings)[1] == {f"job-{number}"}
                await hold.release()

    asyncio.run(main())


def test_a_loop_whose_tasks_are_all_cancelled_with_calls_under_way_ends(settings: Settings, redis: Redis) -> None:
    settled: list[str] = []

    async def work(billing: AsyncBilling, key: str) -> None:
        async with billing.reserve(USER, METER, 100, key=key) as hold:
            try:
                await asyncio.sleep(60)
            finally:
                settled.append(key)
                await hold.settle(40)
                await hold.release()  # a second call of the clean-up

    async def emit(billing: AsyncBilling) -> None:
        while True:
            await billing.emit(USER, METER, 1)

    async def main(billing: AsyncBilling, round_: int) -> None:
        busy = [asyncio.create_task(emit(billing)) for _ in range(5)]
        works = [asyncio.create_task(work(billing, f"{round_}-{number}")) for number in range(10)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in busy + works)

    for round_ in range(5):
        billing = AsyncBilling.connect(settings)
        began = time.monotonic()
        asyncio.run(main(billing, round_))
        asyncio.run(billing.close())
        assert time.monotonic() - began < 5
        events, holds = events_and_holds(redis, settings)
        assert holds == set()
        assert {key for key, units in events.items() if units == 40} == set(settled)
