"""Blocking calls that a signal interrupts: time limits of RQ and Celery raise in the middle of a call, so does `^C`.

Whatever the moment, no hold is left that no caller has, no connection is lost to the client, and the next call works.
"""

from __future__ import annotations

import gc
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, cast

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import give_account
from tests.support.resources import settings_for
from tests.support.sponsorship import Everybody
from tests.support.streams import pending_of
from worker.client import Billing
from worker.keyspace.keys import SPONSORSHIP

# An interruption in a finalizer, such as that of a connection of redis-py, goes no further: Python only prints it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

USER, METER = "alice", "premium_voice"
CONNECTIONS = 4


class TimeLimit(Exception):
    """What a job queue raises when a job has had its time."""


@pytest.fixture(params=[TimeLimit, KeyboardInterrupt], ids=["time limit", "^C"])
def interruption(request: pytest.FixtureRequest) -> Iterator[type[BaseException]]:
    """What the handler of the alarm raises."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise request.param

    before = signal.signal(signal.SIGALRM, interrupt)
    yield request.param
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    made = settings_for(emptied_database_url, redis_url, client_connections=CONNECTIONS, client_wait_ms=100)
    give_account(made, USER, "max")
    return made


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    """A client that has been in use."""
    with Billing.connect(settings, trust=Everybody("elite")) as made:
        made.check(USER, METER, 1)
        made.decide(USER, 1, "warm")
        made.release_sponsored(USER, "warm", "")
        yield made


@contextmanager
def an_alarm(seconds: float) -> Iterator[None]:
    """Interrupt the block after some time; it may end before."""
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def interrupted_call(
    call: Callable[[str], Any], key: str, after: float, interruption: type[BaseException]
) -> list[Any]:
    """What a call gave its caller, if anything, that was interrupted after some time or ended before.

    It calls from Python to Python: an interruption just after a function in C drops what that returned.
    """
    answer = None
    try:
        with an_alarm(after):
            answer = call(key)
    except interruption:
        pass
    return [] if answer is None else [answer]


def holds_of(redis: Redis, settings: Settings) -> set[str]:
    """Holds on the account and on the pool."""
    promised = cast("list[bytes]", redis.hkeys(SPONSORSHIP.promised))
    names = [*pending_of(redis, settings, USER, METER), *(name.decode() for name in promised)]
    return {name[2:] for name in names if name.startswith("h:")}


def seconds_of(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def assert_that_all_connections_are_free(billing: Billing) -> None:
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

    usual = sorted(seconds_of(partial(ask, f"usual-{number}")) for number in range(21))[10]
    for number in range(21):
        give_back(f"usual-{number}")
    answered = 0
    for number in range(300):
        key = f"job-{number}"
        received = interrupted_call(ask, key, moments.uniform(0, usual * 1.3), interruption)
        assert holds_of(redis, settings) == ({key} if received else set()), number
        assert_that_all_connections_are_free(billing)
        if received:
            answered += 1
            give_back(key)
    assert 20 < answered < 280, "the moments are spread over the call"


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
    kind = type(permits[0])
    del billing, permits
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, kind)]
