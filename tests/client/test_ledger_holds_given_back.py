"""Holds that the ledger granted while Redis was away, and whose callers never received them: each is given back.

A call gives back what it made itself. A hold of another call, or of a retry with the same key, stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from threading import Event
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.interruptions import TimeLimit
from tests.support.ledger import give_account, rows
from tests.support.resources import settings_for
from tests.support.streams import pending_of
from worker.client import AsyncBilling, Billing
from worker.client.effects import Ask
from worker.client.ledger import LedgerView
from worker.demo.servers import Server
from worker.ledger.connection import _ImpatientConnection

USER, METER = "alice", "premium_voice"


@pytest.fixture(params=[TimeLimit, KeyboardInterrupt], ids=["time limit", "^C"])
def interruption(request: pytest.FixtureRequest) -> type[BaseException]:
    """What a signal handler raises."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def settings(emptied_database_url: str, own_redis: Server) -> Settings:
    """Settings of a Redis that is away, and was never asked before."""
    own_redis.start()
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
    own_redis.stop()
    made = settings_for(
        emptied_database_url, own_redis.url, redis_down="ledger", redis_down_pause_ms=0, redis_retries=0
    )
    give_account(made, USER, "max")
    return made


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    with Billing.connect(settings) as made:
        yield made


def keys_held(settings: Settings) -> set[str]:
    return {str(key) for (key,) in rows(settings, "SELECT hold_key FROM ledger_hold")}


def forget(key: str, ledger: LedgerView) -> None:
    ledger.forget_holds(USER, [key])


def pending_in_redis(settings: Settings) -> dict[str, int]:
    with Redis.from_url(settings.redis_url) as redis:
        return pending_of(redis, settings, USER, METER)


@pytest.mark.parametrize("comes", ["before", "after"])
def test_a_call_interrupted_at_any_statement_leaves_no_hold(
    settings: Settings,
    billing: Billing,
    interruption: type[BaseException],
    comes: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each wait for Postgres is interrupted, before what it waits for has reached Postgres or after it was answered."""
    wait = _ImpatientConnection.wait
    billing.reserve(USER, METER, 100, "first")

    for number in range(40):
        left = number

        def interrupted(gen: Any) -> Any:
            """What the wait is for, up to the interruption."""
            nonlocal left
            left -= 1
            if left == -1 and comes == "before":
                raise interruption
            answer = yield from gen
            if left == -1:
                raise interruption
            return answer

        def waiting(self: Any, gen: Any, *args: Any, **kwargs: Any) -> Any:
            return wait(self, interrupted(gen), *args, **kwargs)

        received = []
        with monkeypatch.context() as patched, suppress(interruption):
            patched.setattr(_ImpatientConnection, "wait", waiting)
            received = [billing.reserve(USER, METER, 100, f"job-{number}")]
        if left >= 0:
            break
        assert keys_held(settings) - {"first"} == {hold.answer.key for hold in received}, number
        billing._ask(Ask(partial(forget, f"job-{number}")))
    assert 5 < number < 39


@pytest.mark.parametrize("first", ["another", "interrupted"])
def test_an_interrupted_call_gives_back_no_hold_that_another_call_has(
    settings: Settings, billing: Billing, interruption: type[BaseException], first: str
) -> None:
    perform = billing._ask

    def interrupted_after(step: Any) -> Any:
        """The other call comes before this one, or between its end and the interruption."""
        billing._ask = perform  # type: ignore[method-assign]
        if first == "interrupted":
            perform(step)
        with Billing.connect(settings) as other:
            other.reserve(USER, METER, 100, "job")
        if first == "another":
            perform(step)
        raise interruption

    billing._ask = interrupted_after  # type: ignore[method-assign]
    with pytest.raises(interruption):
        billing.reserve(USER, METER, 100, "job")
    assert keys_held(settings) == {"job"}


def test_a_hold_that_redis_took_over_meanwhile_is_given_back_there(
    settings: Settings, billing: Billing, own_redis: Server, interruption: type[BaseException]
) -> None:
    perform = billing._ask

    def interrupted_after(step: Any) -> Any:
        billing._ask = perform  # type: ignore[method-assign]
        perform(step)
        own_redis.start()
        with Billing.connect(settings) as other:
            assert other.check(USER, METER, 1).pending == 100
        assert (keys_held(settings), pending_in_redis(settings)) == (set(), {"h:job": 100, "total": 100})
        raise interruption

    billing._ask = interrupted_after  # type: ignore[method-assign]
    with pytest.raises(interruption):
        billing.reserve(USER, METER, 100, "job")
    assert pending_in_redis(settings) == {}


@pytest.mark.parametrize("retry", ["none", "before", "after"])
def test_a_cancelled_call_gives_back_its_own_hold_only(settings: Settings, retry: str) -> None:
    """A retry with the same key, by a client of another process, comes before the hold or after it."""

    async def main() -> None:
        async with AsyncBilling.connect(settings) as billing, AsyncBilling.connect(settings) as other:
            ask = billing._ask

            def with_a_retry(step: Ask) -> Any:
                billing._ask = ask  # type: ignore[method-assign]
                if retry == "before":
                    asyncio.run_coroutine_threadsafe(reserved(other), loop).result()
                answer = ask(step)
                if retry == "after":
                    asyncio.run_coroutine_threadsafe(reserved(other), loop).result()
                loop.call_soon_threadsafe(first.cancel)
                return answer

            async def reserved(by: AsyncBilling) -> None:
                await by.reserve(USER, METER, 100, "job")

            loop = asyncio.get_running_loop()
            billing._ask = with_a_retry  # type: ignore[method-assign]
            first = asyncio.create_task(reserved(billing))
            with pytest.raises(asyncio.CancelledError):
                await first

    asyncio.run(main())
    assert keys_held(settings) == (set() if retry == "none" else {"job"})


@pytest.mark.parametrize("has_retry", [False, True])
def test_a_cancelled_call_gives_back_no_hold_of_a_retry_that_redis_took_over(
    settings: Settings, own_redis: Server, has_retry: bool
) -> None:
    granted, others_done = Event(), Event()

    async def main() -> None:
        async with AsyncBilling.connect(settings) as billing:
            ask = billing._ask

            def held_up(step: Ask) -> Any:
                billing._ask = ask  # type: ignore[method-assign]
                answer = ask(step)
                granted.set()
                assert others_done.wait(30)
                return answer

            async def reserved() -> None:
                await billing.reserve(USER, METER, 100, "job")

            billing._ask = held_up  # type: ignore[method-assign]
            first = asyncio.create_task(reserved())
            assert await asyncio.to_thread(granted.wait, 30)
            with Billing.connect(settings) as other:
                if has_retry:
                    other.reserve(USER, METER, 100, "job")
                own_redis.start()
                assert other.check(USER, METER, 1).pending == 100
            first.cancel()
            others_done.set()
            with pytest.raises(asyncio.CancelledError):
                await first

    asyncio.run(main())
    assert keys_held(settings) == set()
    assert pending_in_redis(settings) == ({"h:job": 100, "total": 100} if has_retry else {})
