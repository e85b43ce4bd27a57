"""A Redis that hangs costs one short wait; one that refuses our settings is a mistake, not an outage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.answers import Reason, SponsorReason
from schemas.events import UsageEvent
from tests.client.clients import open_client
from tests.support.ledger import give_account
from tests.support.resources import settings_for
from tests.support.waiting import wait_until
from worker.client import AsyncBilling, Billing
from worker.demo.servers import Server
from worker.errors import RedisUnavailable, UsageDenied, WrongRedis

USER, METER = "u1", "credits"
# A time-out and what this machine takes beside it; and a call that waits for nothing but Postgres.
FIRST_SECONDS, LATER_SECONDS = 0.6, 0.02


@pytest.fixture
def server(own_redis: Server) -> Iterator[Server]:
    own_redis.start()
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
    yield own_redis
    own_redis.thaw()


@pytest.fixture
def settings(emptied_database_url: str, server: Server) -> Settings:
    made = settings_for(emptied_database_url, server.url, redis_socket_timeout_ms=1_000)
    give_account(made, USER)
    return made


@pytest.fixture(params=["blocking", "awaiting"])
def billing(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Any]:
    client = open_client(request.param, settings)
    assert client.check(USER, METER, 1).allowed
    yield client
    client.close()


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def test_checks_wait_shortly_once_and_then_not_at_all(billing: Any, server: Server) -> None:
    server.freeze()
    assert seconds(lambda: billing.check(USER, METER, 1)) < FIRST_SECONDS
    # The pause is not over before these are: each of them would show a wait of its own.
    later = sorted(seconds(lambda: billing.check(USER, METER, 1)) for _ in range(30))
    assert later[-2] < LATER_SECONDS
    assert sum(later) < 1
    server.thaw()
    wait_until(lambda: bool(billing.check("nobody", METER, 1).available == 0), "Redis is asked again")
    assert billing.check(USER, METER, 1).reason is Reason.WITHIN_LIMIT


def test_one_call_of_many_finds_out_whether_redis_is_back(settings: Settings, server: Server) -> None:
    async def ask() -> list[float]:
        async with AsyncBilling.connect(settings) as billing:
            await billing.check(USER, METER, 1)
            server.freeze()
            await billing.check(USER, METER, 1)
            await asyncio.sleep(1.05)  # the pause
            loop = asyncio.get_running_loop()

            async def timed() -> float:
                began = loop.time()
                await billing.check(USER, METER, 1)
                return loop.time() - began

            return sorted(await asyncio.gather(*(timed() for _ in range(40))))

    *others, probe = asyncio.run(ask())
    assert probe > 0.4, "one has tried"
    assert others[-1] < 0.4, "no other has"


def test_a_reserve_goes_by_the_ledger_and_a_decision_by_its_gate(billing: Any, server: Server) -> None:
    server.freeze()
    assert seconds(lambda: billing.reserve(USER, METER, 1, "job")) < FIRST_SECONDS
    assert billing.decide(USER, 1, "r").reason is SponsorReason.POOL_UNAVAILABLE


def test_recording_waits_for_its_own_time_out_and_keeps_the_event(billing: Any, server: Server) -> None:
    server.freeze()

    def emit() -> None:
        with pytest.raises(RedisUnavailable) as caught:
            billing.emit(USER, METER, 1, event_id="e1")
        assert [event.event_id for event in caught.value.events] == ["e1"]

    assert 0.9 < seconds(emit) < 2


@pytest.fixture(params=["password", "user", "database", "host"])
def wrong(request: pytest.FixtureRequest, settings: Settings, server: Server) -> Iterator[Settings]:
    """Settings that Redis refuses, each for another reason."""
    base = server.url
    url = {
        "password": base.replace("unix://", "unix://:secret-word@"),
        "user": base.replace("unix://", "unix://stranger:secret-word@"),
        "database": base.replace("db=0", "db=99"),
        "host": "redis://no-such-host.invalid:6379/0",
    }[request.param]
    with Redis.from_url(base) as redis:
        if request.param == "password":
            redis.config_set("requirepass", "another-word")
        yield settings.model_copy(update={"redis_url": url})
        if request.param == "password":
            redis.config_set("requirepass", "")


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_what_redis_refuses_is_named_and_is_no_outage(wrong: Settings, kind: str) -> None:
    client = open_client(kind, wrong)
    calls: list[Callable[[], object]] = [
        lambda: client.check(USER, METER, 1),
        lambda: client.reserve(USER, METER, 1, "job"),
        lambda: client.emit(USER, METER, 1),
        lambda: client.charge(USER, METER, 1, "e"),
    ]
    for call in calls:
        with pytest.raises(WrongRedis, match="REDIS_URL") as caught:
            call()
        assert "secret-word" not in str(caught.value)
    client.close()


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_a_right_that_the_user_lacks_is_named(settings: Settings, server: Server, kind: str) -> None:
    with Redis.from_url(server.url) as redis:
        redis.execute_command("ACL", "SETUSER", "poor", "reset", "on", ">secret-word", "~elsewhere", "+@all")
    url = server.url.replace("unix://", "unix://poor:secret-word@")
    poor = settings.model_copy(update={"redis_url": url})
    with closing(open_client(kind, poor)) as client:
        asks: list[Callable[[], object]] = [
            lambda: client.check(USER, METER, 1),
            lambda: client.remaining(USER, METER),
            lambda: client.reserve(USER, METER, 1, "job"),
            lambda: client.decide(USER, 1, "request"),
            lambda: client.estimate(USER, METER, 1),
        ]
        for ask in asks:
            with pytest.raises(WrongRedis, match="permission"):
                ask()
        with pytest.raises(RedisUnavailable, match="permission") as caught:
            client.emit(USER, METER, 1, event_id="e1")
        assert [event.event_id for event in caught.value.events] == ["e1"]
    with pytest.raises(WrongRedis, match="permission"):
        Billing.connect(poor, check=True)


async def cancelled(task: asyncio.Task[Any]) -> float:
    """Cancel a task again and again; return the seconds until it ends."""
    began = time.monotonic()
    while not task.done():
        task.cancel()
        await asyncio.sleep(0.01)
    assert task.cancelled()
    return time.monotonic() - began


def test_a_cancelled_caller_waits_shortly_and_the_log_names_its_event(
    settings: Settings, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    patient = settings.model_copy(update={"redis_socket_timeout_ms": 3_000})

    async def settle() -> float:
        async with AsyncBilling.connect(patient) as billing:
            hold = await billing.reserve(USER, METER, 10, "job")
            server.freeze()
            task = asyncio.create_task(hold.settle(5))
            await asyncio.sleep(0)
            seconds = await cancelled(task)
            assert billing.counters.unwaited == 1
        return seconds

    assert 0.9 < asyncio.run(settle()) < 2
    (told,) = [record.getMessage() for record in caplog.records if "caller was cancelled" in record.getMessage()]
    assert told.endswith("['job']")


@pytest.mark.parametrize("spools", [False, True], ids=["without a spool", "with a spool"])
@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_what_redis_refuses_hands_the_events_back(wrong: Settings, kind: str, spools: bool, tmp_path: Path) -> None:
    # Time enough for a name service to say that it knows no such host.
    patient = wrong.model_copy(update={"redis_check_timeout_ms": 60_000, "redis_socket_timeout_ms": 60_000})
    ours = patient.model_copy(update={"spool_path": tmp_path / "spool"} if spools else {})
    many = [UsageEvent(event_id=each, user_id=USER, meter=METER, quantity=1) for each in ("e1", "e2")]
    with closing(open_client(kind, ours)) as client:
        calls: list[tuple[Callable[[], object], list[str], str | None]] = [
            (lambda: client.emit(USER, METER, 1, event_id="e1"), ["e1"], None),
            (lambda: client.emit_events(many), ["e1", "e2"], None),
            (lambda: client.capture(USER, METER, "job", "e1", 1), ["e1"], "job"),
            (lambda: client.settle(USER, METER, "job", 1), ["job"], None),
            (lambda: client.charge(USER, METER, 1, "e1"), ["e1"], None),
        ]
        for call, event_ids, captured_from in calls:
            with pytest.raises(WrongRedis) as caught:
                call()
            assert [event.event_id for event in caught.value.events] == event_ids
            assert caught.value.captured_from == captured_from
    assert not (tmp_path / "spool").exists(), "it is no outage"


@pytest.mark.parametrize("kind", [Billing, AsyncBilling])
def test_connect_may_ask_redis_at_once(wrong: Settings, kind: Any) -> None:
    with pytest.raises(WrongRedis, match="REDIS_URL"):
        kind.connect(wrong, check=True)


def test_connect_says_when_redis_is_away_or_divided_otherwise(settings: Settings, server: Server) -> None:
    Billing.connect(settings, check=True).close()
    with Billing.connect(settings) as billing:
        billing.check(USER, METER, 1)
    with pytest.raises(ValueError, match="METERFALL_PARTITIONS"):
        Billing.connect(settings.model_copy(update={"partitions": 4}), check=True)
    server.freeze()
    with pytest.raises(RedisUnavailable):
        Billing.connect(settings, check=True)


def test_deny_is_as_quick(settings: Settings, server: Server) -> None:
    with Billing.connect(settings.model_copy(update={"redis_down": "deny"})) as billing:
        billing.check(USER, METER, 1)
        server.freeze()
        assert not billing.check(USER, METER, 1).allowed
        with pytest.raises(UsageDenied):
            billing.reserve(USER, METER, 1, "job")


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_a_redis_that_is_back_without_its_scripts_is_back(settings: Settings, server: Server, kind: str) -> None:
    client = open_client(kind, settings.model_copy(update={"redis_down": "deny", "redis_down_pause_ms": 200}))
    assert client.check(USER, METER, 1).allowed
    server.stop()
    assert not client.check(USER, METER, 1).allowed
    server.start()
    with Redis.from_url(server.url) as redis:
        redis.script_flush()
    wait_until(lambda: bool(client.check(USER, METER, 1).allowed), "checks are allowed again", seconds=3)
    client.close()
