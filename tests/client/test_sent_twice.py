"""Calls that a client sends twice by itself, as a connection was lost: no calls of somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import give_account
from tests.support.proxy import Proxy
from tests.support.resources import settings_for
from tests.support.sponsorship import Everybody
from tests.support.streams import pending_of
from tests.support.waiting import wait_until
from worker.client import AsyncBilling, Billing
from worker.demo.servers import Server
from worker.keyspace.keys import SPONSORSHIP
from worker.keyspace.scripts import script

USER, METER = "alice", "premium_voice"
SECONDS = 20


@pytest.fixture
def proxy(own_redis: Server) -> Iterator[Proxy]:
    with Proxy(own_redis.folder / "redis.sock") as proxy:
        yield proxy


@pytest.fixture
def redis(own_redis: Server) -> Iterator[Redis]:
    """Redis without the proxy, empty, which knows the scripts: then no NOSCRIPT comes before the answer."""
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
        for name in ("reserve", "sponsor_decide"):
            redis.script_load(script(name).text)
        yield redis


@pytest.fixture
def settings(emptied_database_url: str, proxy: Proxy, redis: Redis, tmp_path: Path) -> Settings:
    """Through the proxy; the balances are loaded."""
    url = f"redis://127.0.0.1:{proxy.port}/0"
    made = settings_for(
        emptied_database_url,
        url,
        spool_path=tmp_path / "spool",
        redis_check_timeout_ms=60_000,
        redis_socket_timeout_ms=1_000,
    )
    give_account(made, USER, "max")
    with Billing.connect(made, trust=Everybody("elite")) as billing:
        billing.check(USER, METER, 1)
        billing.decide(USER, 1, "advice")
        billing.release_sponsored(USER, "advice", "")
    return made


@pytest.mark.parametrize("call", ["reserve", "sponsor_decide"])
def test_what_a_loop_that_ends_sends_again_holds_nothing(
    settings: Settings, proxy: Proxy, redis: Redis, call: str
) -> None:
    async def ask(billing: AsyncBilling) -> None:
        await (billing.reserve(USER, METER, 100, "job") if call == "reserve" else billing.decide(USER, 10, "job"))

    async def main(billing: AsyncBilling) -> None:
        task = asyncio.create_task(ask(billing))
        lost = proxy.lose_reply(script(call).sha.encode(), cut=False)
        assert await asyncio.to_thread(lost.wait, SECONDS)
        assert holds_of(redis, settings) == {"h:job"}
        assert not task.done()

    billing = AsyncBilling.connect(settings, trust=Everybody("elite"))
    asyncio.run(main(billing))
    asyncio.run(billing.close())
    assert holds_of(redis, settings) == set()


def test_a_release_that_comes_late_gives_back_a_hold_whose_reserve_was_sent_twice(
    settings: Settings, proxy: Proxy, redis: Redis
) -> None:
    with Billing.connect(settings) as billing:
        lost = proxy.lose_reply(script("reserve").sha.encode())
        billing.reserve(USER, METER, 100, "job")
        assert lost.is_set()
        proxy.black_hole()
        assert billing.release(USER, METER, "job").spooled
        assert holds_of(redis, settings) == {"h:job"}
        proxy.forward()
        wait_until(lambda: holds_of(redis, settings) == set(), "the hold is given back", SECONDS)


def holds_of(redis: Redis, settings: Settings) -> set[str]:
    """Holds on the account and on the pool."""
    promised = cast("list[bytes]", redis.hkeys(SPONSORSHIP.promised))
    names = [*pending_of(redis, settings, USER, METER), *(name.decode() for name in promised)]
    return {name for name in names if name.startswith("h:")}
