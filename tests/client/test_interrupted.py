"""Blocking calls that a signal interrupts: time limits of RQ and Celery raise in the middle of a call, so does `^C`.

Whatever the moment, no hold is left that no caller has, no connection is lost to the client, and the next call works.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.interruptions import TimeLimit, interrupted_call, raised_by_alarms
from tests.support.ledger import give_account
from tests.support.proxy import Proxy
from tests.support.resources import settings_for
from tests.support.sponsorship import Everybody
from tests.support.streams import pending_of
from worker.client import Billing
from worker.client import turns as turns_module
from worker.demo.servers import Server
from worker.keyspace import keys
from worker.keyspace.keys import SPONSORSHIP

# An interruption in a finalizer, such as that of a connection of redis-py, goes no further: Python only prints it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

USER, METER = "alice", "premium_voice"
CONNECTIONS = 4
# The functions that change what calls know of each other's loads.
CHANGES = {
    "join",
    "hurry",
    "leave",
    "release",
    "end_round",
    "_begin_rounds",
    "_give",
    "_without",
    "_end_round",
}


@pytest.fixture(params=[TimeLimit, KeyboardInterrupt], ids=["time limit", "^C"])
def interruption(request: pytest.FixtureRequest) -> Iterator[type[BaseException]]:
    """What the handler of the alarm raises."""
    with raised_by_alarms(request.param):
        yield request.param


@pytest.fixture
def proxy(own_redis: Server) -> Iterator[Proxy]:
    with Proxy(own_redis.folder / "redis.sock") as proxy:
        yield proxy


@pytest.fixture
def redis(own_redis: Server) -> Iterator[Redis]:
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
        yield redis


@pytest.fixture(params=["direct", "through a network"])
def settings(
    request: pytest.FixtureRequest, emptied_database_url: str, own_redis: Server, redis: Redis, proxy: Proxy
) -> Settings:
    url = own_redis.url if request.param == "direct" else f"redis://127.0.0.1:{proxy.port}/0"
    made = settings_for(emptied_database_url, url, client_connections=CONNECTIONS, client_wait_ms=100)
    give_account(made, USER, "max")
    return made


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    """A client that has been in use: Redis knows its scripts."""
    with Billing.connect(settings, trust=Everybody("elite")) as made:
        made.reserve(USER, METER, 1, "warm")
        made.release(USER, METER, "warm")
        made.decide(USER, 1, "warm")
        made.release_sponsored(USER, "warm", "")
        yield made


def holds_of(redis: Redis, settings: Settings) -> set[str]:
    """Holds on the account and on the pool."""
    promised = cast("list[bytes]", redis.hkeys(SPONSORSHIP.promised))
    names = [*pending_of(redis, settings, USER, METER), *(name.decode() for name in promised)]
    return {name[2:] for name in names if name.startswith("h:")}


def assert_that_all_connections_are_free(billing: Billing) -> None:
    if billing._permits.qsize() != CONNECTIONS:
        gc.collect()  # an exception and its frames refer to each other
    assert billing._permits.qsize() == CONNECTIONS


@pytest.mark.parametrize("call", ["reserve", "decide"])
def test_a_call_interrupted_at_any_moment_leaves_no_hold(
    settings: Settings, billing: Billing, redis: Redis, interruption: type[BaseException], call: str
) -> None:
    moments = random.Random(11)

    def ask(key: str) -> Any:
        return billing.reserve(USER, METER, 100, key) if call == "reserve" else billing.decide(USER, 10, key)

    def give_back(key: str) -> None:
        if call == "reserve":
            billing.release(USER, METER, key)
        else:
            billing.release_sponsored(USER, key, "")

    answered, latest = 0, 0.0002
    for number in range(150):
        key = f"job-{number}"
        received = interrupted_call(ask, key, moments.uniform(0, latest), interruption)
        assert holds_of(redis, settings) == ({key} if received else set()), number
        assert_that_all_connections_are_free(billing)
        latest *= 0.95 if received else 1.03  # as long as a call takes on this machine at the moment
        if received:
            answered += 1
            give_back(key)
    assert 10 < answered < 140, "the moments are spread over the call"


@pytest.mark.parametrize("settings", ["through a network"], indirect=True)
def test_a_reserve_that_arrives_after_its_interruption_holds_nothing(
    billing: Billing, redis: Redis, settings: Settings, proxy: Proxy, interruption: type[BaseException]
) -> None:
    sent: list[tuple[Any, ...]] = []
    perform = billing._send

    def held_up(step: Any) -> Any:
        """The first command is still on its way when the caller is interrupted."""
        if not sent:
            sent.append(step.args)
            raise interruption
        return perform(step)

    billing._send = held_up  # type: ignore[method-assign]
    with pytest.raises(interruption):
        billing.reserve(USER, METER, 100, "job")
    billing._send = perform  # type: ignore[method-assign]
    assert redis.execute_command(*sent[0])[0] == b"closed"
    assert holds_of(redis, settings) == set()


@pytest.mark.parametrize("call", ["reserve", "decide"])
@pytest.mark.parametrize("first", ["another", "interrupted"])
def test_an_interrupted_call_gives_back_no_hold_that_another_call_has(
    billing: Billing, redis: Redis, settings: Settings, interruption: type[BaseException], call: str, first: str
) -> None:
    def ask(by: Billing) -> None:
        if call == "reserve":
            by.reserve(USER, METER, 100, "job")
        else:
            by.decide(USER, 10, "job")

    perform = billing._send

    def interrupted_after(step: Any) -> Any:
        """The other call comes before this one, or between its end and the interruption."""
        billing._send = perform  # type: ignore[method-assign]
        if first == "interrupted":
            perform(step)
        with Billing.connect(settings, trust=Everybody("elite")) as other:
            ask(other)
        if first == "another":
            perform(step)
        raise interruption

    billing._send = interrupted_after  # type: ignore[method-assign]
    with pytest.raises(interruption):
        ask(billing)
    assert holds_of(redis, settings) == {"job"}


def test_a_permit_taken_just_before_an_interruption_is_made_up_for(
    billing: Billing, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    class Interrupted:
        """Permits whose taker is interrupted as soon as it has one."""

        def get(self, timeout: float) -> None:
            permits.get(timeout=timeout)
            raise interruption

    permits = billing._permits
    for _ in range(CONNECTIONS + 1):
        with monkeypatch.context() as patched:
            patched.setattr(billing, "_permits", Interrupted())
            with pytest.raises(interruption):
                billing.check(USER, METER, 1)
        assert_that_all_connections_are_free(billing)
    assert billing.check(USER, METER, 1).allowed


def test_the_permits_of_a_client_that_is_gone_are_gone(settings: Settings) -> None:
    billing = Billing(settings)
    permits = [billing._permits.get() for _ in range(CONNECTIONS)]
    kind, queue = type(permits[0]), permits[0]._permits
    del billing, permits
    gc.collect()
    assert queue() is None
    assert not [each for each in gc.get_objects() if isinstance(each, kind) and each._permits is queue]


@pytest.mark.parametrize("settings", ["direct"], indirect=True)
def test_a_load_interrupted_at_any_line_of_its_turn_keeps_nobody_waiting(settings: Settings, redis: Redis) -> None:
    """Each change of the turns is interrupted at each of its lines, and then the same balance is loaded."""
    with Billing.connect(settings) as billing:
        billing.check(USER, METER, 1)
        turns = billing._turns._turns
        for lines in range(200):
            left = lines

            def interrupt(frame: FrameType, event: str, _: Any) -> Any:
                nonlocal left
                if frame.f_code.co_name in CHANGES and frame.f_code.co_filename == turns_module.__file__:
                    if event == "line":
                        left -= 1
                        if left == -1:
                            raise TimeLimit
                    return interrupt
                return None

            redis.delete(keys.account_of(USER, settings.partitions).balance)
            sys.settrace(interrupt)
            try:
                billing.check(USER, METER, 1)
            except TimeLimit:
                pass
            finally:
                sys.settrace(None)
            if left >= 0:
                break
            redis.delete(keys.account_of(USER, settings.partitions).balance)
            began = time.monotonic()
            assert billing.check(USER, METER, 1).allowed
            assert time.monotonic() - began < settings.load_wait_ms / 2_000, lines
            assert (turns._waiting, turns._queue, turns._rounds) == ({}, {}, 0), lines
        assert 20 < lines < 199
