"""`keep_alive`: a hold lives for as long as its block runs, and no longer."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from textwrap import dedent
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.answers import HoldState
from tests.support.ledger import give_account
from tests.support.paths import ROOT
from tests.support.streams import account_of, pending_of
from tests.support.waiting import wait_until
from worker.client import AsyncBilling, Billing
from worker.client.keeping import Keeper, Kept, first_delay, next_delay
from worker.errors import ClientClosed, HoldClosed, InvalidRequest, RedisUnavailable
from worker.keyspace.connection import redis_now_ms

USER, METER = "u1", "credits"
THREAD = "meterfall-holds"


@pytest.fixture(autouse=True)
def _account(settings: Settings) -> None:
    give_account(settings, USER)


def keepers() -> list[threading.Thread]:
    """The threads that keep holds of this process."""
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def end_of(redis: Redis, settings: Settings, key: str = "k") -> int:
    """When a hold ends, by the clock of Redis (ms)."""
    return int(redis.hget(account_of(settings, USER).hold(key), "expires_ms") or 0)


def live_through(redis: Redis, moment_ms: int) -> None:
    """Wait until the clock of Redis has passed a moment."""
    wait_until(lambda: redis_now_ms(redis) > moment_ms, "the clock of Redis has passed that moment")


def wait_for_renewal(redis: Redis, settings: Settings) -> None:
    end = end_of(redis, settings)
    wait_until(lambda: end_of(redis, settings) > end, "the hold is renewed")


def in_block(kind: str, settings: Settings, during: Callable[[], None], **options: Any) -> HoldState | None:
    """Run `during` in a block that keeps a hold of one second, then settle; returns the hold's state before that."""
    if kind == "blocking":
        with Billing.connect(settings) as billing, billing.reserve(USER, METER, 100, "k", 1, **options) as hold:
            during()
            return hold.settle(70).hold

    async def block() -> HoldState | None:
        async with (
            AsyncBilling.connect(settings) as billing,
            billing.reserve(USER, METER, 100, "k", 1, **options) as hold,
        ):
            await asyncio.to_thread(during)
            return (await hold.settle(70)).hold

    return asyncio.run(block())


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
class TestKeepAlive:
    def test_a_hold_outlives_its_life(self, kind: str, settings: Settings, redis: Redis) -> None:
        def live_long() -> None:
            live_through(redis, end_of(redis, settings) + 1_000)

        assert in_block(kind, settings, live_long, keep_alive=True) is HoldState.HELD
        assert pending_of(redis, settings, USER, METER) == {"e:k": 70, "total": 70}
        wait_until(lambda: not keepers(), "the thread has ended")

    def test_without_it_the_hold_expires(self, kind: str, settings: Settings, redis: Redis) -> None:
        def live_long() -> None:
            live_through(redis, end_of(redis, settings))

        assert in_block(kind, settings, live_long) is HoldState.EXPIRED
        assert keepers() == []

    def test_it_ends_with_the_block(self, kind: str, settings: Settings, redis: Redis) -> None:
        def fail() -> None:
            wait_for_renewal(redis, settings)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            in_block(kind, settings, fail, keep_alive=True)
        assert pending_of(redis, settings, USER, METER) == {}
        ended = end_of(redis, settings)
        wait_until(lambda: not keepers(), "nobody is left to renew it")
        live_through(redis, ended)
        assert end_of(redis, settings) == ended

    def test_it_revives_nothing(self, kind: str, settings: Settings, redis: Redis) -> None:
        def release_elsewhere() -> None:
            end = end_of(redis, settings)
            with Billing.connect(settings) as other:
                assert other.release(USER, METER, "k").state is HoldState.HELD
            live_through(redis, end)  # renewals were due
            assert pending_of(redis, settings, USER, METER) == {}

        assert in_block(kind, settings, release_elsewhere, keep_alive=True) is HoldState.RELEASED
        assert pending_of(redis, settings, USER, METER) == {"e:k": 70, "total": 70}

    def test_a_renewal_that_fails_is_tried_again(
        self, kind: str, settings: Settings, redis: Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        record = account_of(settings, USER).hold("k")

        def break_it_for_a_while() -> None:
            kept = redis.dump(record)
            redis.set(record, "no hash")
            wait_until(lambda: "was not renewed" in caplog.text, "a renewal has failed")
            redis.restore(record, 0, kept, replace=True)  # type: ignore[arg-type]
            wait_for_renewal(redis, settings)

        assert in_block(kind, settings, break_it_for_a_while, keep_alive=True) is HoldState.HELD
        assert "hold k was not renewed, and is tried again" in caplog.text

    def test_a_longer_life_is_not_cut_short_again(self, kind: str, settings: Settings, redis: Redis) -> None:
        if kind == "blocking":
            with Billing.connect(settings) as billing, billing.reserve(USER, METER, 1, "k", 1, keep_alive=True) as hold:
                due = end_of(redis, settings)
                end = hold.extend(ttl_seconds=600).expires_at
                live_through(redis, due)
        else:

            async def block() -> Any:
                async with (
                    AsyncBilling.connect(settings) as billing,
                    billing.reserve(USER, METER, 1, "k", 1, keep_alive=True) as hold,
                ):
                    due = end_of(redis, settings)
                    answer = await hold.extend(ttl_seconds=600)
                    await asyncio.to_thread(live_through, redis, due)
                    return answer.expires_at

            end = asyncio.run(block())
        assert end is not None
        assert end_of(redis, settings) >= round(end.timestamp() * 1_000)


def test_it_is_asked_for_in_so_many_words(settings: Settings) -> None:
    with Billing.connect(settings) as billing:
        with pytest.raises(InvalidRequest, match="keep_alive: must be True or False"):
            billing.reserve(USER, METER, 1, "k", keep_alive="yes")  # type: ignore[arg-type]
        billing.reserve(USER, METER, 1, "k", keep_alive=True)
        assert keepers() == [], "it is the block that keeps"


def test_a_renewal_that_the_end_of_the_block_cuts_off_leaves_nothing_behind(settings: Settings, redis: Redis) -> None:
    """Its reply must not be taken for that of the next command."""

    async def block() -> None:
        async with AsyncBilling.connect(settings) as billing:
            async with billing.reserve(USER, METER, 100, "k", 1, keep_alive=True):
                await asyncio.sleep(0.2)
                redis.client_pause(600)
                await asyncio.sleep(0.3)
            answers = [await billing.check(USER, METER, amount) for amount in (1, 2, 3)]
            assert [(answer.requested, answer.pending) for answer in answers] == [(1, 0), (2, 0), (3, 0)]

    asyncio.run(block())
    assert pending_of(redis, settings, USER, METER) == {}


def test_a_task_that_is_cancelled_again_and_again_gives_its_hold_back(settings: Settings, redis: Redis) -> None:
    def renewals() -> list[asyncio.Task[Any]]:
        return [each for each in asyncio.all_tasks() if "meterfall-hold" in each.get_name()]

    async def block() -> None:
        async with AsyncBilling.connect(settings) as billing:

            async def work() -> None:
                async with billing.reserve(USER, METER, 100, "k", 1, keep_alive=True):
                    await asyncio.sleep(60)

            task = asyncio.create_task(work())
            await asyncio.to_thread(wait_until, lambda: end_of(redis, settings) > 0, "it is held")
            await asyncio.to_thread(wait_for_renewal, redis, settings)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.gather(*renewals(), return_exceptions=True)
            assert not renewals()

    asyncio.run(block())
    assert pending_of(redis, settings, USER, METER) == {}
    assert redis.hget(account_of(settings, USER).hold("k"), "state") == b"released"


def test_a_hold_is_kept_on_any_event_loop_and_in_any_kind_of_block(settings: Settings, redis: Redis) -> None:
    billing = AsyncBilling.connect(settings)

    async def block(key: str) -> HoldState | None:
        async with await billing.reserve(USER, METER, 100, key, 1, keep_alive=True) as hold:
            await asyncio.to_thread(live_through, redis, end_of(redis, settings, key))
            return (await hold.settle(1)).hold

    assert [asyncio.run(block(key)) for key in ("k1", "k2")] == [HoldState.HELD] * 2
    asyncio.run(billing.close())


def test_a_closed_client_renews_nothing(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    def close_in_the_block() -> None:
        billing = Billing.connect(settings)
        with billing.reserve(USER, METER, 100, "k", 1, keep_alive=True):
            billing.close()
            wait_until(lambda: not keepers(), "the thread has ended")

    with pytest.raises(ClientClosed):
        close_in_the_block()
    assert "hold k is not renewed any more: its client was closed" in caplog.text


def test_one_thread_keeps_all_holds_of_a_process(settings: Settings, redis: Redis) -> None:
    with ExitStack() as blocks:
        for number in range(20):
            billing = blocks.enter_context(Billing.connect(settings))
            blocks.enter_context(billing.reserve(USER, METER, 1, f"k{number}", ttl_seconds=1, keep_alive=True))
        assert len(keepers()) == 1
        live_through(redis, end_of(redis, settings, "k19"))
        assert pending_of(redis, settings, USER, METER)["total"] == 20
        assert billing.check(USER, METER).pending == 20
    assert pending_of(redis, settings, USER, METER) == {}
    wait_until(lambda: not keepers(), "the thread has ended")


PROGRAM = """
    import os, sys, time
    from worker.client import Billing
    billing = Billing.connect()
    with billing.reserve("u1", "credits", 100, "k", ttl_seconds=1, keep_alive=True):
        if sys.argv[1] == "fork" and os.fork() == 0:
            time.sleep(30)
        print("held", flush=True)
        time.sleep(1.5)
        print("kept", flush=True)
        if sys.argv[1] == "exit":
            raise SystemExit(3)
        time.sleep(30)
"""


@pytest.fixture
def program(settings: Settings) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process that keeps a hold."""
    started: list[subprocess.Popen[str]] = []

    def start(how: str) -> subprocess.Popen[str]:
        assert settings.database_url is not None
        environment = {**os.environ, "REDIS_URL": settings.redis_url, "DATABASE_URL": settings.database_url}
        command = [sys.executable, "-c", dedent(PROGRAM), how]
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_it_dies_with_the_process(
    program: Callable[[str], subprocess.Popen[str]], settings: Settings, redis: Redis
) -> None:
    process = program("stay")
    assert [line_of(process), line_of(process)] == ["held", "kept"]
    with Billing.connect(settings) as billing:
        assert billing.check(USER, METER).pending == 100
        process.kill()
        wait_until(lambda: billing.check(USER, METER).pending == 0, "nobody renews the hold")


def test_a_process_that_exits_waits_for_no_thread(program: Callable[[str], subprocess.Popen[str]]) -> None:
    process = program("exit")
    assert [line_of(process), line_of(process)] == ["held", "kept"]
    assert process.wait(5) == 3


def test_a_forked_child_keeps_nothing(
    program: Callable[[str], subprocess.Popen[str]], settings: Settings, redis: Redis
) -> None:
    process = program("fork")
    assert [line_of(process), line_of(process)] == ["held", "kept"]
    process.kill()  # the child lives on
    with Billing.connect(settings) as billing:
        wait_until(lambda: billing.check(USER, METER).pending == 0, "the child does not renew the hold")


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


def test_a_hold_is_renewed_at_each_third_of_its_life() -> None:
    kept = Kept("k", 600)
    assert first_delay(kept) == next_delay(kept, None) == 200
    assert next_delay(kept, RedisUnavailable("away")) == next_delay(kept, ValueError()) == 5
    assert next_delay(Kept("k", 12), RedisUnavailable("away")) == 1
    assert {next_delay(kept, HoldClosed(USER, "k", state)) for state in HoldState} == {None}


def test_what_ends_as_it_should_is_not_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    for state in (HoldState.SETTLED, HoldState.RELEASED, HoldState.EXPIRED):
        next_delay(Kept(f"key-{state.value}", 600), HoldClosed(USER, "k", state))
    assert [each.getMessage() for each in caplog.records] == ["hold key-expired is not renewed any more: it is expired"]


def test_a_server_that_is_away_holds_up_no_other_clients_holds() -> None:
    """Of those who wait for the same server only one finds out; the others wait as long as it does."""
    keeper, calls = Keeper(), []

    def renewing(name: str, error: Exception | None) -> Callable[[], None]:
        def renew() -> None:
            calls.append(name)
            if error is not None:
                raise error

        return renew

    away = RedisUnavailable("away")
    stops = [keeper.keep("a", Kept(f"a{number}", 3), renewing("a", away)) for number in range(5)]
    stops.append(keeper.keep("b", Kept("b", 3), renewing("b", None)))
    wait_until(lambda: "b" in calls, "the other client's hold is renewed")
    assert calls == ["a", "b"]
    time.sleep(0.4)
    assert calls.count("a") < 6
    for stop in (*stops, *stops):
        stop()
    wait_until(lambda: not keepers(), "the thread has ended")
