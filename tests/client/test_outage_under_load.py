"""Redis goes away while a service reserves and settles for many users, and comes back: nothing is lost or doubled.

Soon all work goes straight to Redis again. Every user works one piece after the other, so what was answered tells the
order in which it must be in the stream. How quick it is then, the benchmark measures (`spool_recovery_s`): other tests
keep this machine's cores busy.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import give_account
from tests.support.resources import settings_for
from tests.support.streams import recorded_ids
from tests.support.waiting import wait_until
from worker.client import AsyncBilling, Billing
from worker.client.spool_file import Spool
from worker.demo.servers import Server, find_redis, redis_server

METER = "premium_voice"
COROUTINES, THREADS = 60, 8
DEADLINE_SECONDS = 20.0
WINDOW_SECONDS = 0.5

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def durable_redis() -> Iterator[Server]:
    """A Redis that loses nothing it has confirmed when it is killed."""
    with redis_server(find_redis(os.environ), appendfsync="always") as server:
        yield server


@pytest.fixture
def server(durable_redis: Server) -> Iterator[Server]:
    durable_redis.start()
    with Redis.from_url(durable_redis.url) as redis:
        redis.flushall()
    yield durable_redis
    durable_redis.thaw()


@pytest.fixture
def settings(emptied_database_url: str, server: Server, tmp_path: Path) -> Settings:
    return settings_for(
        emptied_database_url, server.url, spool_path=tmp_path / "spool", partitions=1, redis_socket_timeout_ms=1_000
    )


class Piece(NamedTuple):
    """A piece of work: when it began, and was it spooled."""

    began: float
    spooled: bool


@dataclass
class Load:
    """Users who reserve and settle without a pause; what they were answered, in order."""

    users: list[str]
    stopped: bool = False
    answered: dict[str, list[str]] = field(init=False)
    pieces: list[Piece] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answered = {user: [] for user in self.users}

    async def await_work(self, billing: AsyncBilling, user: str) -> None:
        while not self.stopped:
            key, began = self._next(user), time.monotonic()
            async with billing.reserve(user, METER, 2, key) as hold:
                answer = await hold.settle(1)
            self._done(user, key, began, spooled=answer.spooled)

    def work(self, billing: Billing, user: str) -> None:
        while not self.stopped:
            key, began = self._next(user), time.monotonic()
            with billing.reserve(user, METER, 2, key) as hold:
                answer = hold.settle(1)
            self._done(user, key, began, spooled=answer.spooled)

    def _next(self, user: str) -> str:
        return f"{user}-{len(self.answered[user])}"

    def _done(self, user: str, key: str, began: float, *, spooled: bool) -> None:
        self.pieces.append(Piece(began, spooled))
        self.answered[user].append(key)

    def since(self, moment: float) -> list[Piece]:
        return [piece for piece in self.pieces if piece.began >= moment]

    def goes_to_redis(self, since: float) -> bool:
        """True when all work since then went to Redis."""
        pieces = self.since(since)
        return bool(pieces) and not any(piece.spooled for piece in pieces)


async def through_an_outage(load: Load, away: Callable[[], None], back: Callable[[], None], seconds: float) -> None:
    """Let Redis be away for some seconds of the load; return once all work goes to it again."""
    await asyncio.sleep(1)  # connections are made, balances loaded
    gone = time.monotonic()
    away()
    await asyncio.sleep(seconds)
    assert sum(piece.spooled for piece in load.since(gone)) > 20, "there was load"
    back()
    returned = time.monotonic()
    while (window := time.monotonic()) < returned + DEADLINE_SECONDS:
        await asyncio.sleep(WINDOW_SECONDS)
        if load.goes_to_redis(window):
            return
    late = load.since(window)
    raise AssertionError(f"{sum(piece.spooled for piece in late)} of {len(late)} last pieces were spooled")


def outage_of(server: Server, how: str) -> tuple[Callable[[], None], Callable[[], None]]:
    return (server.kill, server.start) if how == "killed" else (server.freeze, server.thaw)


def assert_all_are_there(load: Load, settings: Settings) -> None:
    spool = Spool(settings.spool_path or Path(), settings.spool_max_bytes)
    wait_until(spool.is_empty, "all is sent")
    with Redis.from_url(settings.redis_url) as redis:
        found = recorded_ids(redis, settings, load.users)
    # Sent twice is what may happen to an event whose reply was lost; whoever applies it knows it by its id.
    assert {user: list(dict.fromkeys(ids)) for user, ids in found.items()} == load.answered


async def serve(settings: Settings, load: Load, server: Server, how: str, seconds: float) -> None:
    async with AsyncBilling.connect(settings) as billing:
        working = [asyncio.create_task(load.await_work(billing, user)) for user in load.users]
        try:
            await through_an_outage(load, *outage_of(server, how), seconds)
        finally:
            load.stopped = True
            await asyncio.gather(*working)


def coroutines_in_an_outage(settings: Settings, server: Server, how: str, seconds: float) -> None:
    load = Load([f"u{number}" for number in range(COROUTINES)])
    for user in load.users:
        give_account(settings, user, "max")
    asyncio.run(serve(settings, load, server, how, seconds))
    assert_all_are_there(load, settings)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_coroutines_soon_go_to_redis_again(settings: Settings, server: Server, how: str) -> None:
    coroutines_in_an_outage(settings, server, how, seconds=3)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_coroutines_soon_go_to_redis_again_after_a_long_outage(settings: Settings, server: Server, how: str) -> None:
    coroutines_in_an_outage(settings, server, how, seconds=20)


def test_threads_soon_go_to_redis_again(settings: Settings, server: Server) -> None:
    load = Load([f"u{number}" for number in range(THREADS)])
    for user in load.users:
        give_account(settings, user, "max")
    with Billing.connect(settings) as billing, ThreadPoolExecutor(THREADS) as threads:
        working = [threads.submit(load.work, billing, user) for user in load.users]
        try:
            asyncio.run(through_an_outage(load, *outage_of(server, "killed"), seconds=2))
        finally:
            load.stopped = True
        for each in working:
            each.result()
    assert_all_are_there(load, settings)
