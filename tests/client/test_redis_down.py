"""Pre-flight while Redis is gone, by the setting `redis_down`, and what becomes of it once Redis is back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.answers import HoldState, Parts, Reason, Serve, SponsorReason
from schemas.events import UsageEvent
from tests.support.ledger import give_account, rows
from tests.support.resources import settings_for
from tests.support.streams import drain, partition_of, pending_of, stream_of
from worker.client import AsyncBilling, Billing
from worker.client.effects import Command, Effect
from worker.demo.servers import Server
from worker.errors import HoldConflict, LedgerUnavailable, RedisUnavailable, UsageDenied, UsageLimitExceeded

USER, METER = "u1", "credits"


@pytest.fixture
def server(own_redis: Server) -> Server:
    """That Redis, running and empty."""
    own_redis.start()
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
    return own_redis


def settings_of(url: str, server: Server, **overrides: object) -> Settings:
    """Settings under which a test does not wait long for a Redis that is gone, nor for one that is back."""
    quick = {"redis_socket_timeout_ms": 500, "redis_retries": 1, "redis_down_pause_ms": 0}
    return settings_for(url, server.url, **(quick | overrides))


@pytest.fixture
def down(emptied_database_url: str, server: Server) -> Iterator[Any]:
    """Makes a client to a Redis that is gone; the user has 1,000 credits."""
    opened: list[Billing] = []
    settings = settings_of(emptied_database_url, server)
    give_account(settings, USER)
    with Billing.connect(settings) as client:
        client.check("first", METER)  # so that the outage of an earlier test is over for this process
    server.stop()

    def connect(mode: str, **overrides: object) -> Billing:
        opened.append(Billing.connect(settings_of(emptied_database_url, server, redis_down=mode, **overrides)))
        return opened[-1]

    yield connect
    for client in opened:
        client.close()


def test_deny(down: Any) -> None:
    client = down("deny")
    answer = client.check(USER, METER, 1)
    assert (answer.allowed, answer.reason) == (False, Reason.REDIS_DOWN_DENIED)
    with pytest.raises(UsageDenied) as caught:
        client.reserve(USER, METER, 1, "k")
    assert caught.value.answer.reason is Reason.REDIS_DOWN_DENIED


def test_ledger_answers_checks(down: Any) -> None:
    client = down("ledger")
    answer = client.check(USER, METER, 1000)
    assert (answer.allowed, answer.reason, answer.available, answer.limit) == (True, Reason.WITHIN_LIMIT, 1000, 1000)
    assert client.check(USER, METER, 1001).reason is Reason.LIMIT_EXCEEDED
    assert client.check("nobody", METER, 1).reason is Reason.UNKNOWN_ACCOUNT


def test_ledger_grants_holds_within_the_balance(down: Any) -> None:
    client = down("ledger")
    first = client.reserve(USER, METER, 600, "k").answer
    assert (first.state, first.left) == (HoldState.HELD, 600)
    assert first.expires_at is not None
    assert client.reserve(USER, METER, 600, "k").answer == first
    with pytest.raises(HoldConflict):
        client.reserve(USER, METER, 601, "k")
    assert client.check(USER, METER, 1).available == 400
    with pytest.raises(UsageLimitExceeded) as caught:
        client.reserve(USER, METER, 401, "other")
    assert caught.value.available == 400


def test_ledger_bounds_the_number_of_holds(down: Any) -> None:
    client = down("ledger", redis_down_max_holds=2)
    client.reserve(USER, METER, 1, "k1")
    client.reserve(USER, METER, 1, "k2")
    with pytest.raises(UsageDenied) as caught:
        client.reserve(USER, METER, 1, "k3")
    assert not caught.value.answer.allowed
    assert caught.value.answer.reason is Reason.REDIS_DOWN_BOUND_REACHED
    assert client.reserve(USER, METER, 1, "k2").answer.left == 1


def test_ledger_stays_within_the_balance_under_many_at_once(down: Any) -> None:
    client = down("ledger", redis_down_max_holds=100)
    start = Barrier(8)

    def attempt(number: int) -> int:
        start.wait(10)
        try:
            amount: int = client.reserve(USER, METER, 300, f"k{number}").answer.amount
        except UsageLimitExceeded:
            return 0
        return amount

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(attempt, range(8))) == 900


def test_ledger_refuses_whom_it_does_not_know(down: Any) -> None:
    with pytest.raises(UsageDenied) as caught:
        down("ledger").reserve("nobody", METER, 1, "k")
    assert caught.value.answer.reason is Reason.UNKNOWN_ACCOUNT
    assert type(caught.value) is UsageDenied


def test_a_denial_says_that_it_denies(down: Any) -> None:
    with pytest.raises(UsageDenied) as caught:
        down("ledger", default_plan="tenant").reserve("newcomer", METER, 1, "k")
    assert not caught.value.answer.allowed


def test_allow_is_bounded(down: Any) -> None:
    client = down("allow", redis_down_max_amount=100)
    assert client.check("nobody", METER, 100).reason is Reason.REDIS_DOWN_ALLOWED
    assert client.check("nobody", METER, 101).reason is Reason.REDIS_DOWN_BOUND_REACHED
    assert client.reserve(USER, METER, 60, "k1").answer.state is HoldState.HELD
    with pytest.raises(UsageDenied) as caught:
        client.reserve(USER, METER, 41, "k2")
    assert caught.value.answer.reason is Reason.REDIS_DOWN_BOUND_REACHED
    assert client.reserve(USER, METER, 40, "k2").answer.left == 40
    assert client.reserve("other", METER, 100, "k").answer.left == 100


def test_allow_starts_anew_once_redis_answers(down: Any, server: Server) -> None:
    client = down("allow", redis_down_max_amount=100)
    client.reserve(USER, METER, 100, "k1")
    server.start()
    assert client.check(USER, METER, 1000).reason is Reason.WITHIN_LIMIT
    server.stop()
    assert client.reserve(USER, METER, 100, "k2").answer.left == 100


@pytest.fixture
def _impatient_threads() -> Iterator[None]:
    """Threads that give way to each other after every few steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_impatient_threads")
def test_allow_keeps_its_bound_across_threads(down: Any) -> None:
    client = down("allow", redis_down_max_amount=100, redis_retries=0)
    start = Barrier(8)

    def granted(user_id: str, thread: int) -> int:
        def attempt(number: int) -> int:
            try:
                amount: int = client.reserve(user_id, METER, 1, f"{thread}-{number}").answer.amount
            except UsageDenied:
                return 0
            return amount

        start.wait(10)
        return sum(map(attempt, range(30)))

    with ThreadPoolExecutor(8) as threads:
        for user_id in (f"user-{number}" for number in range(20)):
            assert sum(threads.map(granted, [user_id] * 8, range(8))) == 100


def test_all_clients_of_a_process_share_the_bound(down: Any) -> None:
    first, second = (down("allow", redis_down_max_amount=100) for _ in range(2))
    first.reserve(USER, METER, 60, "k1")
    assert second.check(USER, METER, 1).available == 40

    async def reserve(amount: int) -> HoldState:
        async with AsyncBilling.connect(first.context.settings) as client:
            return (await client.reserve(USER, METER, amount, "k2")).answer.state

    with pytest.raises(UsageDenied):
        asyncio.run(reserve(41))
    assert asyncio.run(reserve(40)) is HoldState.HELD
    with pytest.raises(UsageDenied):
        second.reserve(USER, METER, 1, "k3")


def test_allow_counts_a_repeat_once(down: Any) -> None:
    client = down("allow", redis_down_max_amount=100)
    first = client.reserve(USER, METER, 60, "k").answer
    assert client.reserve(USER, METER, 60, "k").answer == first
    assert client.check(USER, METER, 1).available == 40
    with pytest.raises(HoldConflict, match="already holds 60 of credits"):
        client.reserve(USER, METER, 20, "k")
    assert client.reserve(USER, METER, 40, "other").answer.left == 40
    assert client.reserve(USER, METER, 60, "k").answer == first


def test_a_late_answer_does_not_end_an_outage(down: Any, server: Server) -> None:
    """What Redis answered before it went says nothing about what was let through since."""
    client = down("allow", redis_down_max_amount=100)
    answered, let_through = Event(), Event()

    class Slow(Billing):
        def _perform(self, step: Effect) -> Any:
            result = super()._perform(step)
            if isinstance(step, Command) and step.args[0].startswith("EVAL"):
                answered.set()
                assert let_through.wait(10)
            return result

    server.start()
    client.check(USER, METER)
    with Slow.connect(client.context.settings) as slow, ThreadPoolExecutor(1) as thread:
        checked = thread.submit(slow.check, USER, METER, 1)
        assert answered.wait(10)
        server.stop()
        client.reserve(USER, METER, 100, "k1")
        let_through.set()
        assert checked.result(10).reason is Reason.WITHIN_LIMIT
        with pytest.raises(UsageDenied):
            client.reserve(USER, METER, 1, "k2")


@pytest.mark.parametrize("mode", ["deny", "ledger", "allow"])
def test_whatever_the_setting_events_come_back_with_the_error(down: Any, mode: str) -> None:
    client = down(mode)
    attempts: list[tuple[Callable[[], Any], list[tuple[str, int]]]] = [
        (lambda: client.emit(USER, METER, 5, event_id="e1", source="tts"), [("e1", 5)]),
        (lambda: client.settle(USER, METER, "k", 6), [("k", 6)]),
        (lambda: client.capture(USER, METER, "k", "page-1", 7), [("page-1", 7)]),
        (lambda: client.charge(USER, METER, 8, "c1"), [("c1", 8)]),
        (lambda: client.release(USER, METER, "k"), []),
        (
            lambda: client.emit_events(
                [UsageEvent(event_id=f"e{n}", user_id=f"u{n}", meter=METER, quantity=n) for n in range(3)]
            ),
            [("e0", 0), ("e1", 1), ("e2", 2)],
        ),
    ]
    for attempt, expected in attempts:
        with pytest.raises(RedisUnavailable) as caught:
            attempt()
        assert sorted((event.event_id, event.quantity) for event in caught.value.events) == expected


def test_asyncio_answers_the_same(down: Any, emptied_database_url: str, server: Server) -> None:
    async def ask(mode: str) -> tuple[Reason, Any]:
        async with AsyncBilling.connect(settings_of(emptied_database_url, server, redis_down=mode)) as client:
            checked = await client.check(USER, METER, 1)
            try:
                return checked.reason, (await client.reserve(USER, METER, 1, "k")).answer.state
            except UsageDenied as denied:
                return checked.reason, denied.answer.reason

    assert asyncio.run(ask("deny")) == (Reason.REDIS_DOWN_DENIED, Reason.REDIS_DOWN_DENIED)
    assert asyncio.run(ask("ledger")) == (Reason.WITHIN_LIMIT, HoldState.HELD)
    assert asyncio.run(ask("allow")) == (Reason.REDIS_DOWN_ALLOWED, HoldState.HELD)


def test_without_postgres_too(server: Server) -> None:
    server.stop()
    gone = "postgresql://nobody@127.0.0.1:9/none"
    with Billing.connect(settings_of(gone, server, redis_down="ledger")) as client:
        with pytest.raises(LedgerUnavailable):
            client.check(USER, METER, 1)
        with pytest.raises(LedgerUnavailable):
            client.reserve(USER, METER, 1, "k")


def test_switched_off_it_allows_without_redis_as_well(down: Any) -> None:
    client = down("deny", billing_enabled=False)
    assert client.check(USER, METER, 10**9).reason is Reason.BILLING_DISABLED
    with pytest.raises(RedisUnavailable), client.reserve(USER, METER, 10**9, "k") as hold:
        hold.settle(5)


def test_holds_of_the_ledger_join_redis(down: Any, server: Server) -> None:
    client = down("ledger")
    client.reserve(USER, METER, 600, "k")
    client.reserve(USER, METER, 100, "other")
    server.start()
    settings = client.context.settings
    with Redis.from_url(server.url) as redis:
        assert client.check(USER, METER, 1).available == 300
        assert pending_of(redis, settings, USER, METER) == {"h:k": 600, "h:other": 100, "total": 700}
        assert client.settle(USER, METER, "k", 550).hold is HoldState.HELD
        drain(settings, USER)
        assert client.check(USER, METER, 1).available == 350
        assert pending_of(redis, settings, USER, METER) == {"h:other": 100, "total": 100}
        assert rows(settings, "SELECT hold_key FROM ledger_hold") == [], "Redis has taken them over"


def test_the_ledger_keeps_sub_caps(down: Any, server: Server, emptied_database_url: str) -> None:
    client = down("ledger", redis_down_max_holds=10)
    settings = client.context.settings
    give_account(settings, "u2", "core")
    relay = "relay_credits"
    hold = client.reserve("u2", relay, 90, "k", backend="gemini")
    assert client.reserve("u2", relay, 90, "k", backend="gemini").answer == hold.answer
    with pytest.raises(HoldConflict, match="on gemini"):
        client.reserve("u2", relay, 90, "k", backend="hardware")
    client.reserve("u2", relay, 200, "other", backend="hardware")
    with pytest.raises(UsageLimitExceeded) as caught:
        client.reserve("u2", relay, 11, "more", backend="gemini")
    answer = caught.value.answer
    assert (answer.reason, answer.available, answer.pending) == (Reason.BACKEND_CAP_EXCEEDED, 10, 290)
    assert (answer.kind, answer.cap, answer.cap_used, answer.cap_pending) == ("lifetime", 100, 0, 90)
    assert client.check("u2", relay, 11, backend="gemini") == answer
    left = client.remaining("u2")
    assert (left.kind, left.remaining, left.pending) == ("lifetime", 210, 290)
    assert [(one.backend, one.pending, one.remaining) for one in left.backends] == [("gemini", 90, 10)]
    assert client.plan_backend("u2", "gemini_first", has_hardware=False).sub_remaining == 10
    server.start()
    with Redis.from_url(server.url) as redis:
        assert client.remaining("u2") == left
        assert pending_of(redis, settings, "u2", relay) == {"h:k": 90, "h:other": 200, "total": 290}
        assert pending_of(redis, settings, "u2", f"{relay}/gemini") == {"h:k": 90, "total": 90}
        assert hold.settle(40).hold is HoldState.HELD
        assert pending_of(redis, settings, "u2", f"{relay}/gemini") == {"e:k": 40, "total": 40}


@pytest.mark.parametrize("mode", ["deny", "allow"])
def test_what_is_left_is_not_made_up(down: Any, mode: str) -> None:
    client = down(mode)
    with pytest.raises(RedisUnavailable):
        client.remaining(USER)
    with pytest.raises(RedisUnavailable):
        client.plan_backend(USER, "gemini_first", has_hardware=True)
    with pytest.raises(RedisUnavailable):
        client.remaining("newcomer", tier="core")
    assert client.check(USER, "relay_credits", 1, backend="gemini").backend == "gemini"


def test_a_ledger_hold_that_was_released_does_not_come_back(down: Any, server: Server) -> None:
    client = down("ledger")
    hold = client.reserve(USER, METER, 600, "k", ttl_seconds=3_600)
    server.start()
    assert client.check(USER, METER, 1).available == 400
    hold.release()
    settings = client.context.settings
    with Redis.from_url(server.url) as redis:
        # The outcome is forgotten and the balance is read anew, long before the hold's own time is over.
        partition = partition_of(settings, USER)
        redis.delete(partition.account(USER).hold("k"), partition.account(USER).balance)
        assert client.check(USER, METER, 1).available == 1000
        assert pending_of(redis, settings, USER, METER) == {}


def test_redis_lost_in_a_block_keeps_the_hold_and_hands_the_event_back(
    emptied_database_url: str, server: Server
) -> None:
    settings = settings_of(emptied_database_url, server)
    give_account(settings, USER)
    with Billing.connect(settings) as client:
        hold = client.reserve(USER, METER, 100, "k")
        server.stop()
        with pytest.raises(RedisUnavailable) as caught, hold:
            hold.settle(70)
        server.start()
        (event,) = caught.value.events
        with Redis.from_url(server.url) as redis:
            assert pending_of(redis, settings, USER, METER) == {"h:k": 100, "total": 100}
            for _ in range(2):
                client.emit_events([event])
            assert pending_of(redis, settings, USER, METER) == {"e:k": 70, "total": 70}
            drain(settings, USER)
            assert stream_of(redis, settings, USER) == []
        assert rows(settings, "SELECT event_id, amount, hold_key FROM usage_log") == [("k", 70, "k")]
        assert client.check(USER, METER, 1).available == 930


def test_redis_out_of_memory(emptied_database_url: str, server: Server) -> None:
    settings = settings_of(emptied_database_url, server)
    give_account(settings, USER)
    with Billing.connect(settings) as client, Redis.from_url(server.url) as redis:
        client.emit(USER, METER, 5, event_id="before")
        hold = client.reserve(USER, METER, 100, "k")
        redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(RedisUnavailable) as caught:
                client.emit(USER, METER, 7, event_id="refused")
            assert hold.release().state is HoldState.HELD
            drain(settings, USER)
            assert stream_of(redis, settings, USER) == []
            assert pending_of(redis, settings, USER, METER) == {}
        finally:
            redis.config_set("maxmemory", 0)
        client.emit_events(caught.value.events)
        drain(settings, USER)
        assert client.check(USER, METER, 1).available == 988


# ---------------------------------------------------------------------------------------------------------------------
# The sponsorship pool


def test_without_redis_the_pool_covers_nothing(down: Any, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    client = down("ledger", sponsor_daily_units_new=100)
    answer = client.decide(USER, 40, "r")
    assert (answer.serve, answer.absorb, answer.charge) == (Serve.GATE, 0, 40)
    assert (answer.reason, answer.tier) == (SponsorReason.POOL_UNAVAILABLE, None)
    assert "the sponsorship pool does not answer" in caplog.messages[-1]
    attempts: list[Callable[[], Any]] = [
        lambda: client.confirm_partial(USER, 40, "r", paid=1),
        lambda: client.settle_sponsored(USER, "r", 40),
        lambda: client.release_sponsored(USER, "r", "no answer came"),
        lambda: client.credit_pool("r", 40),
    ]
    for attempt in attempts:
        with pytest.raises(RedisUnavailable, match=r"Redis did not confirm \(.*\)$"):
            attempt()
    server.start()
    assert client.decide(USER, 40, "r").serve is Serve.FREE


@pytest.mark.parametrize(("mode", "allowed"), [("ledger", True), ("deny", False), ("allow", True)])
def test_an_estimate_without_redis(down: Any, mode: str, allowed: bool) -> None:
    answer = down(mode).estimate(USER, METER, 40)
    assert (answer.amount, answer.allowed, answer.allowed_with_pool) == (40, allowed, allowed)
    assert answer.sponsorship.reason is SponsorReason.POOL_UNAVAILABLE
    assert answer.expected == (Parts(from_subscription=40) if mode == "ledger" else None)
    assert down(mode).check(USER, METER, 40) == answer.check


def test_a_sponsored_hold_outlives_redis(emptied_database_url: str, server: Server) -> None:
    settings = settings_of(emptied_database_url, server, sponsor_daily_units_new=100)
    with Billing.connect(settings) as client:
        client.decide(USER, 60, "r1")
        client.decide(USER, 40, "r2")
        server.stop()
        with pytest.raises(RedisUnavailable):
            client.settle_sponsored(USER, "r1", 50)
        server.start()
        assert client.decide(USER, 60, "r1").repeated
        assert client.settle_sponsored(USER, "r1", 50).absorbed == 50
        assert client.decide(USER, 20, "r3").absorb == 10


def test_sponsoring_while_redis_is_out_of_memory(emptied_database_url: str, server: Server) -> None:
    settings = settings_of(emptied_database_url, server, sponsor_daily_units_new=100)
    with Billing.connect(settings) as client, Redis.from_url(server.url) as redis:
        client.decide(USER, 60, "r1")
        client.decide(USER, 40, "r2")
        redis.config_set("maxmemory", 1)
        try:
            assert client.decide(USER, 1, "r3").reason is SponsorReason.POOL_UNAVAILABLE
            with pytest.raises(RedisUnavailable):
                client.settle_sponsored(USER, "r1", 50)
            assert client.release_sponsored(USER, "r2", "no answer came").state is HoldState.HELD
        finally:
            redis.config_set("maxmemory", 0)
        assert client.settle_sponsored(USER, "r1", 50).absorbed == 50
        assert client.decide(USER, 50, "r3").serve is Serve.FREE
