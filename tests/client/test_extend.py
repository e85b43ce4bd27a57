"""Holds that live on or grow, on real servers, with both clients."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from threading import Barrier
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.answers import HoldState, Reason
from tests.client.clients import open_client
from tests.support.ledger import give_account, rows
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import account_of, drain, partition_of, pending_of
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.errors import HoldClosed, HoldConflict, InvalidRequest, RedisUnavailable, UsageLimitExceeded
from worker.keyspace import calls, scripts
from worker.keyspace.connection import redis_now_ms
from worker.reports.holds import open_holds
from worker.reports.proof import verify_ledger

USER, METER = "u1", "credits"
WEEK = 604_800


@pytest.fixture(params=["blocking", "asyncio"])
def billing(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Any]:
    """Either client; the user has 1,000 credits."""
    give_account(settings, USER)
    with closing(open_client(request.param, settings)) as client:
        yield client


@pytest.fixture
def blocking(settings: Settings) -> Iterator[Billing]:
    """The blocking client, where one will do; the user has 1,000 credits."""
    give_account(settings, USER)
    with Billing.connect(settings) as client:
        yield client


def seconds_left(redis: Redis, answer: Any) -> float:
    """What is left of the hold's life, by the clock of Redis."""
    return float(answer.expires_at.timestamp() - redis_now_ms(redis) / 1_000)


def test_a_hold_ends_so_long_after_now(billing: Any, redis: Redis) -> None:
    hold = billing.reserve(USER, METER, 400, "k", ttl_seconds=60)
    for answer, ttl in (
        (billing.extend(USER, METER, "k", ttl_seconds=WEEK), WEEK),
        (hold.extend(ttl_seconds=30), 30),
        (hold.extend(), 30),
        (billing.extend(USER, METER, "k"), 600),
    ):
        assert ttl - 5 < seconds_left(redis, answer) <= ttl
        assert answer == hold.answer.model_copy(update={"expires_at": answer.expires_at})
    assert billing.reserve(USER, METER, 400, "k", ttl_seconds=5).answer == answer, "a repeated reserve prolongs nothing"


def test_a_hold_lives_past_its_first_end(blocking: Billing, redis: Redis, settings: Settings) -> None:
    first = blocking.reserve(USER, METER, 400, "k", ttl_seconds=1).answer.expires_at
    assert first is not None
    blocking.extend(USER, METER, "k", ttl_seconds=60)
    wait_until(lambda: redis_now_ms(redis) > first.timestamp() * 1_000, "its first life is over")
    with worker_resources(settings) as resources:
        scripts.run(redis, calls.expire(partition_of(settings, USER), f"{USER}:{METER}"))
        assert [hold.key for hold in open_holds(resources, USER)] == ["k"]
    assert blocking.check(USER, METER).pending == 400
    assert blocking.settle(USER, METER, "k", 300).hold is HoldState.HELD
    drain(settings, USER)
    assert pending_of(redis, settings, USER, METER) == {}


def test_a_hold_may_live_a_week(blocking: Billing, redis: Redis, settings: Settings) -> None:
    answer = blocking.reserve(USER, METER, 400, "k", ttl_seconds=WEEK).answer
    assert WEEK - 5 < seconds_left(redis, answer) <= WEEK
    record = account_of(settings, USER).hold("k")
    assert (WEEK + 890) * 1_000 < redis.pttl(record) <= (WEEK + 900) * 1_000
    for call in (
        lambda: blocking.reserve(USER, METER, 1, "k2", ttl_seconds=WEEK + 1),
        lambda: blocking.extend(USER, METER, "k", ttl_seconds=WEEK + 1),
        lambda: blocking.extend(USER, METER, "k", ttl_seconds=0),
        lambda: blocking.extend(USER, METER, "k", ttl_seconds=1.5),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidRequest, match=f"ttl_seconds: must be 1 to {WEEK}"):
            call()
    with worker_resources(settings) as resources:
        assert [hold.expires_at for hold in open_holds(resources, USER)] == [answer.expires_at]
        assert verify_ledger(resources).differences == []
    assert blocking.settle(USER, METER, "k", 400).hold is HoldState.HELD
    assert 890_000 < redis.pttl(record) <= 900_000, "its outcome is remembered as long as any"


def test_a_setting_lets_every_hold_live_a_week_but_those_of_the_pool(
    emptied_database_url: str, redis_url: str, redis: Redis
) -> None:
    settings = settings_for(emptied_database_url, redis_url, hold_ttl_seconds=WEEK)
    give_account(settings, USER)
    with Billing.connect(settings) as client:
        assert WEEK - 5 < seconds_left(redis, client.reserve(USER, METER, 1, "k").answer) <= WEEK
        assert client.decide(USER, 1, "request").absorb == 0
        with pytest.raises(InvalidRequest, match="ttl_seconds: must be 1 to 86400"):
            client.decide(USER, 1, "request-2", ttl_seconds=86_401)


def test_a_hold_grows_within_what_is_left(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 300, "k")
    billing.reserve(USER, METER, 500, "other")
    assert (larger := hold.extend(amount=500)).amount == larger.left == 500
    assert larger.expires_at == hold.answer.expires_at
    with pytest.raises(UsageLimitExceeded) as caught:
        hold.extend(amount=501, ttl_seconds=WEEK)
    answer = caught.value.answer
    assert (answer.requested, answer.available, answer.pending, answer.limit) == (1, 0, 1000, 1000)
    assert answer.reason is Reason.LIMIT_EXCEEDED
    assert pending_of(redis, settings, USER, METER) == {"h:k": 500, "h:other": 500, "total": 1000}
    assert billing.reserve(USER, METER, 500, "k").answer == larger
    for _ in range(2):
        assert hold.extend(amount=100).left == 100
    assert billing.check(USER, METER).available == 400
    for wrong in (-1, 1.5, True, "1", 10**13):
        with pytest.raises(InvalidRequest, match="amount: must be a whole number"):
            hold.extend(amount=wrong)


def test_what_was_captured_stays_captured(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 100, "doc")
    hold.capture("page-1", 30)
    assert (hold.extend(amount=200).left, hold.extend(amount=20).left, hold.extend(amount=120).left) == (170, 0, 90)
    hold.capture("page-2", 110)
    assert hold.extend(amount=150).left == 10
    assert pending_of(redis, settings, USER, METER) == {
        "h:doc": 10, "e:page-1": 30, "e:page-2": 110, "total": 150,
    }  # fmt: skip
    hold.settle(5)
    drain(settings, USER)
    assert pending_of(redis, settings, USER, METER) == {}
    assert rows(settings, "SELECT sum(amount) FROM usage_log") == [(145,)]


def test_nothing_revives_a_hold(billing: Any, redis: Redis, settings: Settings) -> None:
    for key in ("settled", "released", "expired"):
        billing.reserve(USER, METER, 10, key)
    billing.settle(USER, METER, "settled", 10)
    billing.release(USER, METER, "released")
    redis.hset(account_of(settings, USER).hold("expired"), "expires_ms", 1)
    redis.zadd(account_of(settings, USER).holds(METER), {"expired": 1})
    for key in ("settled", "released", "expired", "unknown"):
        with pytest.raises(HoldClosed) as caught:
            billing.extend(USER, METER, key, ttl_seconds=WEEK, amount=20)
        assert (caught.value.key, caught.value.state) == (key, HoldState(key))
    assert billing.check(USER, METER).available == 990
    assert pending_of(redis, settings, USER, METER) == {"e:settled": 10, "total": 10}


def test_the_meter_of_the_hold_is_named(billing: Any) -> None:
    billing.reserve(USER, METER, 10, "k")
    with pytest.raises(HoldConflict, match="hold k of u1 already holds 10 of credits"):
        billing.extend(USER, "premium_voice", "k", ttl_seconds=5)


def test_a_hold_grows_within_the_cap_of_its_backend(settings: Settings, redis: Redis) -> None:
    give_account(settings, USER, "core")
    meter, sub_meter = "relay_credits", "relay_credits/gemini"
    with Billing.connect(settings) as client:
        hold = client.reserve(USER, meter, 60, "k", backend="gemini")
        other = client.reserve(USER, meter, 60, "k2", backend="hardware")
        assert hold.extend(ttl_seconds=WEEK, amount=100).backend == "gemini"
        with pytest.raises(
            UsageLimitExceeded, match=r"1 of relay_credits on gemini: backend_cap_exceeded.* cap 100"
        ) as caught:
            client.extend(USER, meter, "k", amount=101)
        assert (caught.value.answer.cap_pending, caught.value.answer.backend) == (100, "gemini")
        assert other.extend(amount=300).backend == "hardware"
        for name, total in ((meter, 400), (sub_meter, 100)):
            assert pending_of(redis, settings, USER, name)["total"] == total
        account = account_of(settings, USER)
        assert redis.zscore(account.holds(meter), "k") == redis.zscore(account.holds(sub_meter), "k")
        hold.settle(10)
        other.release()
    drain(settings, USER)
    assert pending_of(redis, settings, USER, meter) == pending_of(redis, settings, USER, sub_meter) == {}
    assert not redis.exists(account.holds(meter), account.holds(sub_meter))


def test_holds_that_grow_at_once_never_overspend(blocking: Billing, redis: Redis, settings: Settings) -> None:
    for number in range(16):
        blocking.reserve(USER, METER, 10, f"k{number}")
    start = Barrier(16)

    def grow(number: int) -> int:
        start.wait(10)
        try:
            return blocking.extend(USER, METER, f"k{number}", amount=100).amount
        except UsageLimitExceeded:
            return 10

    with ThreadPoolExecutor(16) as threads:
        held = list(threads.map(grow, range(16)))
    assert sum(held) == pending_of(redis, settings, USER, METER)["total"] == 16 * 10 + 9 * 90


def test_a_release_told_before_an_extension_still_counts(billing: Any, redis: Redis, settings: Settings) -> None:
    """Only another reserve says that somebody works under the hold anew (see `late` in release.lua)."""
    hold = billing.reserve(USER, METER, 10, "k")
    hold.extend(ttl_seconds=WEEK)
    assert redis.hget(account_of(settings, USER).hold("k"), "again") is None


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_without_redis_nothing_is_extended(settings: Settings, kind: str) -> None:
    away = settings.model_copy(update={"redis_url": "unix:///nowhere/redis.sock", "redis_retries": 0})
    with closing(open_client(kind, away)) as client, pytest.raises(RedisUnavailable):
        client.extend(USER, METER, "k")


def test_a_hold_that_the_ledger_granted_is_extended_once_redis_is_back(settings: Settings, redis: Redis) -> None:
    give_account(settings, USER)
    away = settings.model_copy(update={"redis_url": "unix:///nowhere/redis.sock", "redis_retries": 0})
    with Billing.connect(settings) as client, Billing.connect(away) as cut_off:
        assert client.check(USER, METER).pending == 0, "cached: nothing else would load it"
        hold = cut_off.reserve(USER, METER, quantity=100, model_slug="m2", key="k", ttl_seconds=WEEK)
        assert (hold.answer.amount, hold.answer.multiplier) == (150, "1.5")
        answer = client.extend(USER, METER, "k", amount=200)
        assert (answer.amount, answer.left) == (200, 200)
        assert answer.expires_at is not None
        assert hold.answer.expires_at is not None
        assert abs(answer.expires_at - hold.answer.expires_at) < timedelta(seconds=5)
        with pytest.raises(HoldClosed, match="unknown"):
            client.extend(USER, METER, "never-heard-of")
    assert rows(settings, "SELECT count(*) FROM ledger_hold") == [(0,)]


def test_nothing_is_checked_where_billing_is_off(emptied_database_url: str, redis_url: str) -> None:
    settings = settings_for(emptied_database_url, redis_url, billing_enabled=False)
    with Billing.connect(settings) as client:
        assert client.reserve("nobody", METER, 10, "k").extend(amount=10**9).left == 10**9


def test_a_balance_is_loaded_for_what_comes_on_top(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 10, "k")
    redis.delete(account_of(settings, USER).balance)
    assert hold.extend(ttl_seconds=WEEK).left == 10
    assert not redis.exists(account_of(settings, USER).balance), "to live on costs no look into the ledger"
    assert hold.extend(amount=11).left == 11
    assert redis.exists(account_of(settings, USER).balance)
    assert redis.zscore(partition_of(settings, USER).expiries, f"{USER}:{METER}") is not None
