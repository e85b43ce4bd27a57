"""A service whose Redis was away under load is soon as quick as before, and nothing is lost or recorded twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import give_account
from tests.support.resources import settings_for
from tests.support.streams import recorded_ids
from worker.client import AsyncBilling, Billing
from worker.client.spool_file import Spool
from worker.demo.servers import Server

METER = "premium_voice"
USERS = [f"u{number}" for number in range(60)]
RECOVERY_SECONDS = 5


@pytest.fixture
def server(own_redis: Server) -> Iterator[Server]:
    own_redis.start()
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
    yield own_redis
    own_redis.start()


@pytest.fixture
def settings(emptied_database_url: str, server: Server, tmp_path: Path) -> Settings:
    made = settings_for(emptied_database_url, server.url, spool_path=tmp_path / "spool", partitions=1)
    give_account(made, USERS[0], "max")
    return made


@dataclass
class Load:
    """Coroutines that emit without a pause, each for a user of its own; what they were answered, in order."""

    settings: Settings
    stopped: bool = False
    answered: dict[str, list[str]] = field(default_factory=lambda: {user: [] for user in USERS})
    calls: list[tuple[float, float, bool]] = field(default_factory=list)

    async def run(self, billing: AsyncBilling) -> None:
        await asyncio.gather(*(self._emit(billing, user) for user in USERS))

    async def _emit(self, billing: AsyncBilling, user: str) -> None:
        while not self.stopped:
            event_id = f"{user}-{len(self.answered[user])}"
            began = time.monotonic()
            answer = await billing.emit(user, METER, 1, event_id=event_id)
            self.calls.append((began, time.monotonic() - began, answer.spooled))
            self.answered[user].append(event_id)

    def took(self, since: float) -> float:
        """Median of the seconds that calls took which began after `since`."""
        return median(seconds for began, seconds, _ in self.calls if began >= since)

    def spooled(self, since: float) -> int:
        return sum(spooled for began, _, spooled in self.calls if began >= since)

    async def recovered(self, back: float, usual: float) -> float:
        """Seconds until a quarter of a second goes by in which nothing is spooled and calls are as quick as before."""
        while (now := time.monotonic()) < back + RECOVERY_SECONDS + 1:
            await asyncio.sleep(0.25)
            if (
                not self.spooled(now)
                and any(began >= now for began, *_ in self.calls)
                and self.took(now) < 2 * usual + 0.005
            ):
                return now - back
        late = [spooled for began, _, spooled in self.calls if began >= now]
        raise AssertionError(f"{sum(late)} of {len(late)} last calls spooled, {self.took(now)} s each, {usual} before")


def assert_all_are_there(load: Load, server: Server) -> None:
    with Redis.from_url(server.url) as redis:
        found = recorded_ids(redis, load.settings, USERS)
    # Sent twice is what may happen to an event whose reply was lost; whoever applies it knows it by its id.
    assert {user: list(dict.fromkeys(ids)) for user, ids in found.items()} == load.answered


def test_an_outage_under_load_is_over_soon_after_it(settings: Settings, server: Server) -> None:
    load = Load(settings)

    async def serve() -> float:
        async with AsyncBilling.connect(settings) as billing:
            running = asyncio.create_task(load.run(billing))
            began = time.monotonic()
            await asyncio.sleep(1)
            usual = load.took(began)
            server.stop()
            gone = time.monotonic()
            await asyncio.sleep(2)
            assert load.spooled(gone) > 100, "there was load"
            server.start()  # in this thread: a server ends with the thread that started it
            took = await load.recovered(time.monotonic(), usual)
            load.stopped = True
            await running
        return took

    assert asyncio.run(serve()) < RECOVERY_SECONDS
    assert Spool(settings.spool_path or Path(), settings.spool_max_bytes).is_empty()
    assert_all_are_there(load, server)


def test_a_few_events_left_in_the_spool_slow_nobody_down(settings: Settings, server: Server) -> None:
    server.stop()
    with Billing.connect(settings) as billing:
        for number in range(3):
            assert billing.emit(USERS[0], METER, 1, event_id=f"{USERS[0]}-{number}").spooled
    server.start()
    load = Load(settings)
    load.answered[USERS[0]] += [f"{USERS[0]}-{number}" for number in range(3)]

    async def serve() -> float:
        async with AsyncBilling.connect(settings) as billing:
            running = asyncio.create_task(load.run(billing))
            took = await load.recovered(time.monotonic(), usual=1)
            load.stopped = True
            await running
        return took

    assert asyncio.run(serve()) < 2
    assert_all_are_there(load, server)
