"""One client in many threads, on several event loops, in the children of a fork, and after it was closed."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import give_account
from tests.support.paths import ROOT
from tests.support.streams import pending_of
from worker.admin import credits
from worker.client import AsyncBilling, Billing
from worker.errors import ClientBusy, ClientClosed
from worker.resources import Resources

USER, METER = "alice", "premium_voice"
CHILDREN = 8


def test_a_client_may_be_used_on_one_event_loop_after_the_other(settings: Settings, redis: Redis) -> None:
    give_account(settings, USER, "basic")
    billing = AsyncBilling.connect(settings)
    for number in range(4):
        asyncio.run(billing.emit(USER, METER, 1, event_id=f"e{number}"))
        assert asyncio.run(billing.check(USER, METER, 1)).pending == number + 1
    asyncio.run(billing.close())
    assert pending_of(redis, settings, USER, METER)["total"] == 4


def test_a_client_may_be_used_on_several_event_loops_at_once(settings: Settings, redis: Redis) -> None:
    give_account(settings, USER, "basic")
    billing = AsyncBilling.connect(settings)
    together = Barrier(4)

    async def emit(thread: int) -> None:
        together.wait(10)
        for number in range(50):
            await billing.emit(USER, METER, 1, event_id=f"{thread}-{number}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda thread: asyncio.run(emit(thread)), range(4)))
    asyncio.run(billing.close())
    assert pending_of(redis, settings, USER, METER)["total"] == 200


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_loops_that_are_closed_without_their_end_leave_no_connection(settings: Settings, redis: Redis) -> None:
    """As code does that has not come to `asyncio.run`: nothing tells the client that such a loop is over."""
    give_account(settings, USER, "basic")
    billing = AsyncBilling.connect(settings)
    for _ in range(10):
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(billing.check(USER, METER, 1)).allowed
        loop.close()
    assert len(billing._loops) == 1
    asyncio.run(billing.close())
    assert billing._loops == {}
    gc.collect()
    ours = [client for client in redis.client_list() if client["name"] == "meterfall" and client["cmd"] == "evalsha"]
    assert ours == []


def test_a_closed_client_says_so(settings: Settings) -> None:
    give_account(settings, USER, "basic")
    billing = Billing.connect(settings)
    assert billing.check(USER, METER, 1).allowed
    billing.close()
    for call in (lambda: billing.check(USER, METER, 1), lambda: billing.emit(USER, METER, 1)):
        with pytest.raises(ClientClosed):
            call()

    async def ask() -> None:
        waiting = AsyncBilling.connect(settings)
        assert (await waiting.check(USER, METER, 1)).allowed
        await waiting.close()
        with pytest.raises(ClientClosed):
            await waiting.check(USER, METER, 1)
        with pytest.raises(ClientClosed):
            await waiting.reserve(USER, METER, 1, "job")

    asyncio.run(ask())


def test_a_thousand_coroutines_at_once_are_all_served(settings: Settings) -> None:
    give_account(settings, USER, "max")

    async def ask() -> list[Any]:
        async with AsyncBilling.connect(settings) as billing:
            await billing.check(USER, METER, 1)
            holds = await asyncio.gather(*(billing.reserve(USER, METER, 1, f"job-{n}") for n in range(1_000)))
            return list(await asyncio.gather(*(hold.settle(1) for hold in holds)))

    answers = asyncio.run(ask())
    assert len(answers) == 1_000
    assert not any(answer.spooled for answer in answers)


def test_a_thousand_threads_at_once_are_all_served(settings: Settings) -> None:
    give_account(settings, USER, "max")
    with Billing.connect(settings) as billing:
        billing.check(USER, METER, 1)
        together = Barrier(1_000)

        def work(number: int) -> bool:
            together.wait(60)
            with billing.reserve(USER, METER, 1, f"job-{number}") as hold:
                return hold.settle(1).spooled

        with ThreadPoolExecutor(1_000) as threads:
            assert sum(threads.map(work, range(1_000))) == 0
        assert billing.counters.busy == 0


def test_a_call_that_finds_no_connection_says_so_and_keeps_its_event(settings: Settings, redis: Redis) -> None:
    give_account(settings, USER, "basic")
    few = settings.model_copy(update={"client_connections": 1, "client_wait_ms": 50})
    with Billing.connect(few) as billing, ThreadPoolExecutor(1) as threads:
        billing.check(USER, METER, 1)
        blocked = threads.submit(billing.run, blpop())
        waiting = "blpop" in str(redis.client_list())
        while not waiting:
            waiting = "blpop" in str(redis.client_list())
        with pytest.raises(ClientBusy):
            billing.check(USER, METER, 1)
        with pytest.raises(ClientBusy) as caught:
            billing.emit(USER, METER, 1, event_id="e1")
        assert [event.event_id for event in caught.value.events] == ["e1"]
        assert billing.counters.busy == 2
        redis.rpush("go", "1")
        blocked.result(10)
        assert billing.emit(USER, METER, 1, event_id="e1").amount == 1


def blpop() -> Any:
    """Effects that keep a connection until somebody says go."""
    from worker.client.effects import Command

    yield Command(("BLPOP", "go", 0))


FORKS = """
import os, sys
from worker.client import AsyncBilling, Billing
from worker.keyspace.keys import account_of
import asyncio

users, rounds = sys.argv[2].split(","), int(sys.argv[3])
billing = AsyncBilling.connect() if sys.argv[1] == "awaiting" else Billing.connect()
redis = Billing.connect().redis

def remaining(user):
    found = billing.remaining(user, "premium_voice")
    return (asyncio.run(found) if sys.argv[1] == "awaiting" else found).remaining

remaining(users[0])
children = {}
read, write = os.pipe()
for number, user in enumerate(users):
    pid = os.fork()
    if not pid:
        redis = Billing.connect().redis
        for _ in range(rounds):
            redis.delete(account_of(user, 8).balance)
            try:
                left = remaining(user)
                said = "right" if left == 100_000 + number + 1 else f"WRONG: {user} sees {left}"
            except Exception as error:
                said = repr(error)
            os.write(write, (said.replace(chr(10), " ")[:200] + chr(10)).encode())
        os._exit(0)
    children[pid] = user
os.close(write)
for pid in children:
    os.waitpid(pid, 0)
remaining(users[0])
sys.stdout.write(os.fdopen(read).read())
"""


@pytest.mark.parametrize("rounds", [40, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_children_of_a_fork_have_connections_of_their_own(settings: Settings, kind: str, rounds: int) -> None:
    users = [f"u{number}" for number in range(CHILDREN)]
    resources = Resources.open(settings)
    for number, user in enumerate(users):
        give_account(settings, user, "basic")
        credits.grant(resources, user, METER, number + 1, f"order-{user}")
    resources.close()
    environ = os.environ | {"REDIS_URL": settings.redis_url, "DATABASE_URL": str(settings.database_url)}
    command = [sys.executable, "-c", FORKS, kind, ",".join(users), str(rounds)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert (len(said), set(said)) == (CHILDREN * rounds, {"right"})


def test_a_balance_of_somebody_else_is_not_installed(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if two processes shared a connection to Postgres: one reads the answer to the other."""
    give_account(settings, USER, "basic")
    give_account(settings, "bob", "max")
    with Billing.connect(settings) as billing:
        billing.check("bob", METER, 1)
        billing.check(USER, METER, 1)
        redis.flushdb()
        ledger = billing._ledger
        assert ledger is not None
        view = ledger.account("bob")
        monkeypatch.setattr(ledger, "account_views", lambda _users: {USER: view})
        with pytest.raises(Exception, match="another account"):
            billing.check(USER, METER, 1)
