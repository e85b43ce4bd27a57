"""Pre-flight on real servers: section 8 of the design, with both clients."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from textwrap import dedent
from threading import Barrier, Event
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import make_url

from config.settings import Settings
from schemas.answers import ChargeAnswer, EventAnswer, HoldAnswer, HoldState, Parts, Reason
from schemas.events import MAX_AMOUNT, UsageEvent
from tests.client.clients import open_client
from tests.support.ledger import give_account, rows
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import account_of, drain, partition_of, pending_of, stream_of
from tests.support.waiting import wait_until
from worker.admin.erasure import close_account
from worker.client import AsyncBilling, Billing, effects, new_key
from worker.client.ledger import LedgerView
from worker.errors import (
    EventConflict,
    HoldClosed,
    HoldConflict,
    InvalidRequest,
    LedgerUnavailable,
    RedisUnavailable,
    UsageDenied,
    UsageLimitExceeded,
)
from worker.keyspace import keys, scripts
from worker.keyspace.connection import redis_now_ms

USER, METER = "u1", "credits"


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


def available(client: Any, user: str = USER) -> int | None:
    """What the user may still spend."""
    left: int | None = client.check(user, METER).available
    return left


def expire(redis: Redis, settings: Settings, key: str, user: str = USER) -> None:
    """Let the hold's time be over, as if it had been waited for."""
    partition = partition_of(settings, user)
    assert redis.hset(partition.account(user).hold(key), "expires_ms", 1) == 0
    assert redis.zadd(partition.account(user).holds(METER), {key: 1}, xx=True, ch=True) == 1


# ---------------------------------------------------------------------------------------------------------------------
# check


def test_check_says_all_it_knows(billing: Any) -> None:
    billing.reserve(USER, METER, 300, "k")
    answer = billing.check(USER, METER, 700)
    assert (answer.allowed, answer.reason, answer.available, answer.pending) == (True, Reason.WITHIN_LIMIT, 700, 300)
    assert (answer.limit, answer.used, answer.rollover, answer.purchased, answer.requested) == (1000, 0, 0, 0, 700)
    denied = billing.check(USER, METER, 701)
    assert (denied.allowed, denied.reason, denied.available) == (False, Reason.LIMIT_EXCEEDED, 700)


def test_check_changes_nothing(billing: Any, redis: Redis, settings: Settings) -> None:
    for _ in range(3):
        assert billing.check(USER, METER, 400).available == 1000
    assert pending_of(redis, settings, USER, METER) == {}
    assert stream_of(redis, settings, USER) == []
    assert rows(settings, "SELECT seq, used FROM account JOIN balance USING (user_id)") == [(2, 0)]


def test_check_of_nothing_is_allowed_when_nothing_is_left(billing: Any) -> None:
    billing.reserve(USER, METER, 1000, "k")
    assert billing.check(USER, METER, 0).allowed
    assert not billing.check(USER, METER, 1).allowed


@pytest.mark.parametrize(
    ("plan", "meter", "status", "buckets", "left", "reason"),
    [
        ("tenant", "credits", "active", (400, 30, 5), 635, Reason.WITHIN_LIMIT),
        ("tenant", "credits", "canceled", (400, 30, 5), 35, Reason.WITHIN_LIMIT),
        ("tenant", "credits", "past_due", (1200, -30, 50), 20, Reason.WITHIN_LIMIT),
        ("tenant", "credits", "trialing", (1000, -30, 5), 0, Reason.LIMIT_EXCEEDED),
        ("max_relay", "relay_credits", "active", (400, 0, 0), None, Reason.UNLIMITED),
        ("max_relay", "relay_credits", "unpaid", (400, 0, 0), 0, Reason.LIMIT_EXCEEDED),
        ("core", "relay_credits", "active", (480, 7, 7), 20, Reason.WITHIN_LIMIT),
    ],
)
def test_what_is_available(
    settings: Settings,
    plan: str,
    meter: str,
    status: str,
    buckets: tuple[int, int, int],
    left: int | None,
    reason: Reason,
) -> None:
    give_account(settings, USER, plan, status, {meter: buckets})
    with Billing.connect(settings) as client:
        answer = client.check(USER, meter, 1)
        assert (answer.available, answer.reason, answer.allowed) == (left, reason, reason is not Reason.LIMIT_EXCEEDED)
        if left is not None:
            assert client.check(USER, meter, left).allowed
            assert not client.check(USER, meter, left + 1).allowed


def test_a_meter_that_the_plan_does_not_have(billing: Any) -> None:
    answer = billing.check(USER, "premium_voice", 1)
    assert (answer.allowed, answer.available, answer.limit) == (False, 0, 0)
    assert answer.reason in (Reason.METER_NOT_IN_PLAN, Reason.LIMIT_EXCEEDED)


# ---------------------------------------------------------------------------------------------------------------------
# reserve


def test_reserve_holds(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 250, "k")
    assert (hold.answer.state, hold.answer.amount, hold.answer.left) == (HoldState.HELD, 250, 250)
    assert pending_of(redis, settings, USER, METER) == {"h:k": 250, "total": 250}
    assert available(billing) == 750


def test_the_same_reserve_returns_the_same_hold(billing: Any, redis: Redis, settings: Settings) -> None:
    first = billing.reserve(USER, METER, 900, "k").answer
    assert billing.reserve(USER, METER, 900, "k", 5).answer == first
    assert pending_of(redis, settings, USER, METER) == {"h:k": 900, "total": 900}


def test_another_amount_or_meter_under_the_same_key_is_refused(billing: Any, redis: Redis, settings: Settings) -> None:
    billing.reserve(USER, METER, 100, "k")
    with pytest.raises(HoldConflict) as caught:
        billing.reserve(USER, METER, 101, "k")
    assert (caught.value.key, caught.value.meter, caught.value.amount) == ("k", METER, 100)
    with pytest.raises(HoldConflict):
        billing.reserve(USER, "premium_voice", 100, "k")
    assert pending_of(redis, settings, USER, METER) == {"h:k": 100, "total": 100}
    assert pending_of(redis, settings, USER, "premium_voice") == {}


def test_reserve_is_denied_beyond_what_is_left(billing: Any, redis: Redis, settings: Settings) -> None:
    billing.reserve(USER, METER, 600, "first")
    with pytest.raises(UsageLimitExceeded) as caught:
        billing.reserve(USER, METER, 401, "second")
    error = caught.value
    assert (error.meter, error.limit, error.used, error.available, error.requested) == (METER, 1000, 0, 400, 401)
    assert pending_of(redis, settings, USER, METER) == {"h:first": 600, "total": 600}
    assert billing.reserve(USER, METER, 400, "second").answer.left == 400


def test_accounts_and_keys_do_not_meet(blocking: Billing, settings: Settings) -> None:
    give_account(settings, "u2")
    blocking.reserve(USER, METER, 1000, "k")
    assert blocking.reserve("u2", METER, 1000, "k").answer.left == 1000
    assert available(blocking) == available(blocking, "u2") == 0


def test_32_reserves_at_once_for_the_last_credits(blocking: Billing, redis: Redis, settings: Settings) -> None:
    start = Barrier(32)

    def attempt(number: int) -> int:
        start.wait(10)
        try:
            return blocking.reserve(USER, METER, 90, f"k{number}").answer.amount
        except UsageLimitExceeded:
            return 0

    with ThreadPoolExecutor(32) as threads:
        granted = list(threads.map(attempt, range(32)))
    assert sum(granted) == 990
    assert pending_of(redis, settings, USER, METER)["total"] == 990


# ---------------------------------------------------------------------------------------------------------------------
# settle, capture, release


@pytest.mark.parametrize("actual", [0, 180, 250, 400, 5_000])
def test_settle_swaps_the_hold_for_the_event(billing: Any, redis: Redis, settings: Settings, actual: int) -> None:
    hold = billing.reserve(USER, METER, 250, "k")
    answer = hold.settle(actual, source="tts", reference_id="r", dimensions={"page_idx": 3})
    assert answer == EventAnswer(user_id=USER, meter=METER, event_id="k", amount=actual, hold=HoldState.HELD)
    assert pending_of(redis, settings, USER, METER) == {"e:k": actual, "total": actual}
    (fields,) = stream_of(redis, settings, USER)
    assert (fields[b"v"], fields[b"m"]) == (b"1", b"1")
    event = UsageEvent.model_validate_json(fields[b"e"])
    assert (event.quantity, event.multiplier, event.hold_key, event.source) == (actual, "1", "k", "tts")
    assert event.dimensions == {"page_idx": 3}


def test_a_repeated_settle_gets_the_first_answer(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 250, "k")
    first = hold.settle(180)
    for actual in (180, 999):
        assert billing.settle(USER, METER, "k", actual) == first.model_copy(update={"repeated": True})
    assert pending_of(redis, settings, USER, METER) == {"e:k": 180, "total": 180}
    assert len(stream_of(redis, settings, USER)) == 1
    drain(settings, USER)
    assert billing.settle(USER, METER, "k", 180).repeated
    assert pending_of(redis, settings, USER, METER) == {}
    assert available(billing) == 820
    with pytest.raises(HoldClosed) as caught:
        billing.reserve(USER, METER, 250, "k")
    assert caught.value.state is HoldState.SETTLED
    assert pending_of(redis, settings, USER, METER) == {}


def test_settle_under_another_event_id(billing: Any, redis: Redis, settings: Settings) -> None:
    billing.reserve(USER, METER, 250, "k")
    assert billing.settle(USER, METER, "k", 180, event_id="job-1").event_id == "job-1"
    assert pending_of(redis, settings, USER, METER) == {"e:job-1": 180, "total": 180}
    assert billing.settle(USER, METER, "k", 20, event_id="job-2").hold is HoldState.SETTLED
    assert pending_of(redis, settings, USER, METER) == {"e:job-1": 180, "e:job-2": 20, "total": 200}


def test_capture_takes_parts_and_settle_the_rest(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 100, "doc")
    assert hold.capture("page-1", 30).hold is HoldState.HELD
    assert pending_of(redis, settings, USER, METER) == {"h:doc": 70, "e:page-1": 30, "total": 100}
    assert hold.capture("page-1", 30).repeated
    hold.capture("page-2", 90)
    assert pending_of(redis, settings, USER, METER) == {"h:doc": 0, "e:page-1": 30, "e:page-2": 90, "total": 120}
    assert billing.reserve(USER, METER, 100, "doc").answer.left == 0
    hold.settle(5)
    assert pending_of(redis, settings, USER, METER) == {"e:page-1": 30, "e:page-2": 90, "e:doc": 5, "total": 125}
    assert len(stream_of(redis, settings, USER)) == 3
    drain(settings, USER)
    assert pending_of(redis, settings, USER, METER) == {}
    assert available(billing) == 875


def test_a_captured_id_keeps_its_amount(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 100, "doc")
    hold.capture("page-1", 30)
    with pytest.raises(EventConflict) as caught:
        hold.capture("page-1", 31)
    assert (caught.value.event_id, caught.value.amount) == ("page-1", 30)
    assert pending_of(redis, settings, USER, METER) == {"h:doc": 70, "e:page-1": 30, "total": 100}


def test_release_gives_back_what_is_left(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 100, "doc")
    hold.capture("page-1", 30)
    assert (answer := hold.release()).state is HoldState.HELD
    assert (answer.amount, answer.left) == (100, 0)
    assert pending_of(redis, settings, USER, METER) == {"e:page-1": 30, "total": 30}
    assert billing.release(USER, METER, "doc").state is HoldState.RELEASED
    with pytest.raises(HoldClosed) as caught:
        billing.reserve(USER, METER, 100, "doc")
    assert caught.value.state is HoldState.RELEASED
    assert available(billing) == 970


def test_release_before_a_late_reserve(billing: Any, redis: Redis, settings: Settings) -> None:
    assert billing.release(USER, METER, "k").state is HoldState.UNKNOWN
    with pytest.raises(HoldClosed):
        billing.reserve(USER, METER, 100, "k")
    assert pending_of(redis, settings, USER, METER) == {}


def test_settle_after_release_still_records(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 100, "k")
    hold.release()
    assert hold.settle(70).hold is HoldState.RELEASED
    assert pending_of(redis, settings, USER, METER) == {"e:k": 70, "total": 70}
    assert billing.release(USER, METER, "k").state is HoldState.SETTLED
    assert pending_of(redis, settings, USER, METER) == {"e:k": 70, "total": 70}
    drain(settings, USER)
    assert available(billing) == 930


def test_settle_and_capture_of_an_unknown_key_still_record(billing: Any, redis: Redis, settings: Settings) -> None:
    assert billing.settle(USER, METER, "k", 70).hold is HoldState.UNKNOWN
    assert billing.capture(USER, METER, "other", "page-1", 5).hold is HoldState.UNKNOWN
    assert billing.settle(USER, METER, "k", 70).repeated
    assert pending_of(redis, settings, USER, METER) == {"e:k": 70, "e:page-1": 5, "total": 75}


def test_outcomes_are_remembered_for_as_long_as_set(blocking: Billing, redis: Redis, settings: Settings) -> None:
    partition = partition_of(settings, USER)
    blocking.reserve(USER, METER, 10, "k", ttl_seconds=60)
    assert 950_000 < redis.pttl(partition.account(USER).hold("k")) <= 960_000
    blocking.settle(USER, METER, "k", 10)
    assert 890_000 < redis.pttl(partition.account(USER).hold("k")) <= 900_000
    blocking.release(USER, METER, "other")
    assert 890_000 < redis.pttl(partition.account(USER).hold("other")) <= 900_000
    blocking.charge(USER, METER, 1, "c")
    assert 890_000 < redis.pttl(partition.account(USER).charge("c")) <= 900_000


# ---------------------------------------------------------------------------------------------------------------------
# expiry


def test_an_expired_hold_counts_no_more(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 400, "k")
    hold.capture("page-1", 100)
    billing.reserve(USER, METER, 50, "other")
    expire(redis, settings, "k")
    assert available(billing) == 850
    assert pending_of(redis, settings, USER, METER) == {"e:page-1": 100, "h:other": 50, "total": 150}
    with pytest.raises(HoldClosed) as caught:
        billing.reserve(USER, METER, 400, "k")
    assert caught.value.state is HoldState.EXPIRED


def test_a_hold_expires_by_the_clock_of_redis(blocking: Billing, redis: Redis, settings: Settings) -> None:
    answer = blocking.reserve(USER, METER, 400, "k", ttl_seconds=1).answer
    seconds, microseconds = redis.time()
    assert answer.expires_at is not None
    assert 0 < answer.expires_at.timestamp() - (seconds + microseconds / 1e6) <= 1
    assert available(blocking) == 600
    wait_until(lambda: available(blocking) == 1000, "the hold has expired")
    seconds, microseconds = redis.time()
    assert seconds + microseconds / 1e6 >= answer.expires_at.timestamp()


@pytest.mark.parametrize("swept", [False, True])
def test_after_expiry_all_work_still_counts(billing: Any, redis: Redis, settings: Settings, swept: bool) -> None:
    hold = billing.reserve(USER, METER, 400, "k")
    expire(redis, settings, "k")
    if swept:
        assert available(billing) == 1000
    assert hold.capture("page-1", 100).hold is HoldState.EXPIRED
    assert hold.settle(30).hold is HoldState.EXPIRED
    assert pending_of(redis, settings, USER, METER) == {"e:page-1": 100, "e:k": 30, "total": 130}
    assert billing.release(USER, METER, "k").state is HoldState.SETTLED
    drain(settings, USER)
    assert available(billing) == 870


def test_release_after_expiry_is_harmless(billing: Any, redis: Redis, settings: Settings) -> None:
    hold = billing.reserve(USER, METER, 400, "k")
    expire(redis, settings, "k")
    assert hold.release().state is HoldState.EXPIRED
    assert pending_of(redis, settings, USER, METER) == {}
    assert available(billing) == 1000


def test_the_index_of_expiries_knows_the_earliest(blocking: Billing, redis: Redis, settings: Settings) -> None:
    index = partition_of(settings, USER).expiries
    late = blocking.reserve(USER, METER, 1, "late", ttl_seconds=600).answer.expires_at
    early = blocking.reserve(USER, METER, 1, "early", ttl_seconds=60).answer.expires_at
    blocking.reserve(USER, METER, 1, "later", ttl_seconds=6_000)
    assert early is not None
    assert late is not None
    assert redis.zscore(index, f"{USER}:{METER}") == round(early.timestamp() * 1000) < round(late.timestamp() * 1000)


# ---------------------------------------------------------------------------------------------------------------------
# charge


def test_charge_checks_pends_and_appends(billing: Any, redis: Redis, settings: Settings) -> None:
    answer = billing.charge(USER, METER, 400, "c1", source="relay")
    assert answer == ChargeAnswer(
        user_id=USER, meter=METER, event_id="c1", amount=400, expected=Parts(from_subscription=400)
    )
    assert pending_of(redis, settings, USER, METER) == {"e:c1": 400, "total": 400}
    (fields,) = stream_of(redis, settings, USER)
    assert UsageEvent.model_validate_json(fields[b"e"]).source == "relay"


def test_a_denied_charge_leaves_no_trace(billing: Any, redis: Redis, settings: Settings) -> None:
    billing.reserve(USER, METER, 700, "k")
    with pytest.raises(UsageLimitExceeded) as caught:
        billing.charge(USER, METER, 301, "c1")
    assert caught.value.answer.available == 300
    assert stream_of(redis, settings, USER) == []
    assert pending_of(redis, settings, USER, METER) == {"h:k": 700, "total": 700}
    assert billing.charge(USER, METER, 300, "c1").repeated is False


def test_a_repeated_charge_gets_the_first_answer(billing: Any, redis: Redis, settings: Settings) -> None:
    first = billing.charge(USER, METER, 600, "c1")
    assert billing.charge(USER, METER, 600, "c1") == first.model_copy(update={"repeated": True})
    with pytest.raises(EventConflict):
        billing.charge(USER, METER, 601, "c1")
    with pytest.raises(EventConflict):
        billing.charge(USER, "premium_voice", 600, "c1")
    drain(settings, USER)
    assert billing.charge(USER, METER, 600, "c1") == first.model_copy(update={"repeated": True})
    assert pending_of(redis, settings, USER, METER) == {}
    assert available(billing) == 400


def forget_outcome(redis: Redis, settings: Settings, event_id: str) -> None:
    """Let Redis forget a charge, as if its time had been waited for."""
    assert redis.delete(account_of(settings, USER).charge(event_id)) == 1


def test_a_charge_that_the_ledger_knows_is_never_denied(billing: Any, redis: Redis, settings: Settings) -> None:
    """Its outcome is forgotten, and what it took is gone: a retry of paid work is not told that there is no credit."""
    billing.charge(USER, METER, 600, "c1", dimensions={"backend": "gemini"})
    drain(settings, USER)
    forget_outcome(redis, settings, "c1")
    repeated = billing.charge(USER, METER, 600, "c1", dimensions={"backend": "gemini"})
    assert repeated == ChargeAnswer(
        user_id=USER, meter=METER, event_id="c1", amount=600, repeated=True, expected=Parts(from_subscription=600)
    )
    assert stream_of(redis, settings, USER) == []
    for other in ({"meter": METER, "amount": 601}, {"meter": "premium_voice", "amount": 600}):
        with pytest.raises(EventConflict, match="already sent with amount 600"):
            billing.charge(USER, other["meter"], other["amount"], "c1")
    with pytest.raises(UsageLimitExceeded):
        billing.charge(USER, METER, 600, "c2")
    assert available(billing) == 400


def test_a_repeat_by_quantity_is_known_by_its_multiplier(billing: Any, redis: Redis, settings: Settings) -> None:
    billing.charge(USER, METER, event_id="c1", quantity=600, model_slug="m2")
    drain(settings, USER)
    forget_outcome(redis, settings, "c1")
    assert billing.charge(USER, METER, event_id="c1", quantity=600, multiplier="1.50").repeated
    with pytest.raises(EventConflict):
        billing.charge(USER, METER, 900, "c1")


def test_a_charge_that_waits_for_long_is_never_denied(billing: Any, redis: Redis, settings: Settings) -> None:
    """No worker drains for longer than Redis remembers an outcome: the event itself says that it is a repeat."""
    first = billing.charge(USER, METER, 600, "c1")
    forget_outcome(redis, settings, "c1")
    assert billing.charge(USER, METER, 600, "c1") == first.model_copy(update={"repeated": True})
    with pytest.raises(EventConflict):
        billing.charge(USER, METER, 700, "c1")
    assert len(stream_of(redis, settings, USER)) == 1


def test_a_charge_of_a_closed_account_is_known(blocking: Billing, redis: Redis, settings: Settings) -> None:
    blocking.charge(USER, METER, 600, "c1")
    drain(settings, USER)
    with worker_resources(settings) as resources:
        close_account(resources, USER)
    drain(settings, USER)
    forget_outcome(redis, settings, "c1")
    assert blocking.charge(USER, METER, 600, "c1").repeated
    with pytest.raises(UsageDenied):
        blocking.charge(USER, METER, 600, "c2")


def test_without_postgres_a_denied_repeat_stays_denied(redis: Redis, settings: Settings) -> None:
    """The balance is cached, so nothing else needs Postgres. It is asked once, and then left alone for a while."""
    give_account(settings, USER)
    with Billing.connect(settings) as client:
        client.charge(USER, METER, 600, "c1")
        drain(settings, USER)
        assert client.check(USER, METER, 1).allowed
    forget_outcome(redis, settings, "c1")
    assert settings.database_url is not None
    nowhere = make_url(settings.database_url).set(database="nowhere").render_as_string(False)
    for url in (None, nowhere):
        away = settings.model_copy(update={"database_url": url, "ledger_down_pause_ms": 60_000})
        with Billing.connect(away) as client:
            for _ in range(2):
                with pytest.raises(UsageLimitExceeded):
                    client.charge(USER, METER, 600, "c1")
            assert client.context.ledger_breaker.lets_through() is (url is None)


def test_a_charge_names_the_buckets_behind_what_is_pending(settings: Settings) -> None:
    give_account(settings, USER, buckets={METER: (900, 30, 500)})
    with Billing.connect(settings) as client:
        client.reserve(USER, METER, 80, "k")
        expected = client.charge(USER, METER, 150, "c1").expected
        assert expected == Parts(from_subscription=20, from_rollover=30, from_purchased=100)
        client.release(USER, METER, "k")
        drain(settings, USER)
        # The hold paid nothing in the end, so more of the allowance was left: the ledger has the final word.
        paid = rows(
            settings, "SELECT from_subscription, from_rollover, from_purchased, overflow_to_debt FROM usage_log"
        )
        assert paid == [(100, 30, 20, 0)]


def test_a_charge_on_a_meter_that_does_not_spill(settings: Settings) -> None:
    give_account(settings, USER, "core")
    with Billing.connect(settings) as client:
        assert client.charge(USER, "relay_credits", 500, "c1").expected == Parts(from_subscription=500)
        with pytest.raises(UsageLimitExceeded):
            client.charge(USER, "relay_credits", 1, "c2")


def test_32_charges_at_once_never_overspend(blocking: Billing, redis: Redis, settings: Settings) -> None:
    start = Barrier(32)

    def attempt(number: int) -> int:
        start.wait(10)
        try:
            return blocking.charge(USER, METER, 90, f"c{number % 16}").amount
        except UsageLimitExceeded:
            return 0

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(attempt, range(32)))
    assert pending_of(redis, settings, USER, METER)["total"] == 990
    assert len(stream_of(redis, settings, USER)) == 11


# ---------------------------------------------------------------------------------------------------------------------
# emit


def test_emit_pends_and_appends(billing: Any, redis: Redis, settings: Settings) -> None:
    answer = billing.emit(USER, METER, 7, event_id="e1", dimensions={"model_slug": "m2"})
    assert answer == EventAnswer(user_id=USER, meter=METER, event_id="e1", amount=10)
    assert pending_of(redis, settings, USER, METER) == {"e:e1": 11, "total": 11}
    (fields,) = stream_of(redis, settings, USER)
    event = UsageEvent.model_validate_json(fields[b"e"])
    assert (event.quantity, event.multiplier) == (7, "1.5")
    assert event.occurred_at is not None
    assert available(billing) == 989  # 10.5 may cost 11


def test_emit_is_never_refused_for_lack_of_credit(billing: Any, settings: Settings) -> None:
    billing.emit(USER, METER, 5_000, event_id="e1")
    assert available(billing) == 0
    drain(settings, USER)
    assert rows(settings, "SELECT from_subscription, overflow_to_debt FROM usage_log") == [(1000, 4000)]
    assert rows(settings, "SELECT used, rollover FROM balance") == [(1000, -4000)]
    assert available(billing) == 0


def test_emit_makes_ids_in_the_order_of_time(billing: Any) -> None:
    ids = [billing.emit(USER, METER, 1).event_id for _ in range(20)]
    assert len(set(ids)) == 20
    assert [identifier[:13] for identifier in ids] == sorted(identifier[:13] for identifier in ids)
    assert {identifier[14] for identifier in ids} == {"7"}


def test_a_new_key_serves_a_hold_and_an_event(billing: Any, redis: Redis, settings: Settings) -> None:
    keys_made = [new_key() for _ in range(1_000)]
    assert len(set(keys_made)) == 1_000
    billing.reserve(USER, METER, 100, keys_made[0])
    assert billing.settle(USER, METER, keys_made[0], 40).event_id == keys_made[0]
    assert billing.charge(USER, METER, 10, keys_made[1]).event_id == keys_made[1]


def test_an_event_sent_twice_counts_once(billing: Any, redis: Redis, settings: Settings) -> None:
    billing.reserve(USER, METER, 100, "k")
    for _ in range(2):
        billing.emit(USER, METER, 50, event_id="e1")
    assert pending_of(redis, settings, USER, METER) == {"h:k": 100, "e:e1": 50, "total": 150}
    assert len(stream_of(redis, settings, USER)) == 2
    drain(settings, USER)
    assert rows(settings, "SELECT event_id, amount FROM usage_log") == [("e1", 50)]
    assert pending_of(redis, settings, USER, METER) == {"h:k": 100, "total": 100}
    assert available(billing) == 850


def test_an_emit_that_names_a_hold_closes_it(billing: Any, redis: Redis, settings: Settings) -> None:
    billing.reserve(USER, METER, 100, "k")
    billing.emit(USER, METER, 60, event_id="e1", hold_key="k")
    assert pending_of(redis, settings, USER, METER) == {"e:e1": 60, "total": 60}
    assert billing.release(USER, METER, "k").state is HoldState.SETTLED


def test_a_plain_producers_event_closes_the_hold_it_names(blocking: Billing, redis: Redis, settings: Settings) -> None:
    blocking.reserve(USER, METER, 100, "k")
    event = UsageEvent(event_id="e1", user_id=USER, meter=METER, quantity=60, hold_key="k")
    stream = partition_of(settings, USER).entries
    for _ in range(2):
        redis.xadd(stream, {"v": "1", "e": event.model_dump_json(exclude_none=True)})
    assert pending_of(redis, settings, USER, METER) == {"h:k": 100, "total": 100}
    blocking.reserve(USER, METER, 7, "other")
    drain(settings, USER)
    assert pending_of(redis, settings, USER, METER) == {"h:other": 7, "total": 7}
    assert available(blocking) == 933
    assert blocking.release(USER, METER, "k").state is HoldState.SETTLED


def test_many_events_keep_their_order_and_ring_once(billing: Any, redis: Redis, settings: Settings) -> None:
    events = [
        UsageEvent(
            event_id=f"e{number}", user_id=USER, meter=METER, quantity=1, hold_key="k" if number == 250 else None
        )
        for number in range(450)
    ]
    billing.reserve(USER, METER, 100, "k")
    answers = billing.emit_events(events)
    assert [answer.event_id for answer in answers] == [event.event_id for event in events]
    sent = [UsageEvent.model_validate_json(fields[b"e"]).event_id for fields in stream_of(redis, settings, USER)]
    assert sent == [event.event_id for event in events]
    assert pending_of(redis, settings, USER, METER)["total"] == 450
    assert redis.lrange(keys.BELL, 0, -1) == [b"%d" % partition_of(settings, USER).number]
    assert billing.emit_events([]) == []


def test_order_holds_when_redis_knows_only_some_of_the_scripts(billing: Any, redis: Redis, settings: Settings) -> None:
    redis.script_flush()
    billing.settle(USER, METER, "loads-the-script", 1)
    billing.emit_events(
        [
            UsageEvent(
                event_id=f"e{number}", user_id=USER, meter=METER, quantity=1, hold_key="k" if number == 1 else None
            )
            for number in range(3)
        ]
    )
    sent = [UsageEvent.model_validate_json(fields[b"e"]).event_id for fields in stream_of(redis, settings, USER)]
    assert sent == ["loads-the-script", "e0", "e1", "e2"]


def test_emit_writes_the_multiplier_it_promised_and_stays_in_range(
    billing: Any, redis: Redis, settings: Settings
) -> None:
    billing.emit_events(
        [UsageEvent(event_id="e1", user_id=USER, meter=METER, quantity=4, dimensions={"model_slug": "m3"})]
    )
    assert pending_of(redis, settings, USER, METER) == {"e:e1": 9, "total": 9}
    too_much = UsageEvent(
        event_id="e2", user_id=USER, meter=METER, quantity=MAX_AMOUNT, dimensions={"model_slug": "m2"}
    )
    with pytest.raises(ValueError, match=str(MAX_AMOUNT)):
        billing.emit_events([too_much])
    assert pending_of(redis, settings, USER, METER) == {"e:e1": 9, "total": 9}


def test_emit_refuses_what_the_wire_format_refuses(billing: Any, redis: Redis, settings: Settings) -> None:
    for wrong in (
        {"quantity": -1},
        {"quantity": MAX_AMOUNT, "multiplier": "2"},
        {"quantity": 1, "source": "a\nb"},
        {"quantity": 1, "hold_key": "a#b"},
        {"quantity": 1, "event_id": "{p1}"},
        {"quantity": 1, "dimensions": {"k": "x" * 3_000}},
    ):
        with pytest.raises(InvalidRequest):
            billing.emit(USER, METER, **wrong)
    assert stream_of(redis, settings, USER) == []
    assert pending_of(redis, settings, USER, METER) == {}


# ---------------------------------------------------------------------------------------------------------------------
# with


class Boom(Exception):
    """Raised inside a block."""


def use_hold(kind: str, settings: Settings, steps: Callable[[Any], list[Any]]) -> None:
    """Run a `with` block over a hold of 100 under the key k: the calls in `steps`, or raise what is among them."""
    if kind == "blocking":
        with Billing.connect(settings) as client, client.reserve(USER, METER, 100, key="k") as hold:
            for step in steps(hold):
                if isinstance(step, Exception):
                    raise step
        return

    async def block() -> None:
        async with AsyncBilling.connect(settings) as client, client.reserve(USER, METER, 100, key="k") as hold:
            for step in steps(hold):
                if isinstance(step, Exception):
                    raise step
                await step

    asyncio.run(block())


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
class TestWith:
    @pytest.fixture(autouse=True)
    def account(self, settings: Settings) -> None:
        """The user has 1,000 credits."""
        give_account(settings, USER)

    def test_settled(self, kind: str, settings: Settings, redis: Redis) -> None:
        use_hold(kind, settings, lambda hold: [hold.settle(70)])
        assert pending_of(redis, settings, USER, METER) == {"e:k": 70, "total": 70}

    def test_never_settled(self, kind: str, settings: Settings, redis: Redis) -> None:
        use_hold(kind, settings, lambda _: [])
        assert pending_of(redis, settings, USER, METER) == {}

    def test_raises_before_settle(self, kind: str, settings: Settings, redis: Redis) -> None:
        with pytest.raises(Boom):
            use_hold(kind, settings, lambda _: [Boom()])
        assert pending_of(redis, settings, USER, METER) == {}
        with Billing.connect(settings) as client, pytest.raises(HoldClosed):
            client.reserve(USER, METER, 100, "k")

    def test_raises_after_capture(self, kind: str, settings: Settings, redis: Redis) -> None:
        with pytest.raises(Boom):
            use_hold(kind, settings, lambda hold: [hold.capture("page-1", 30), Boom()])
        assert pending_of(redis, settings, USER, METER) == {"e:page-1": 30, "total": 30}

    def test_raises_after_settle(self, kind: str, settings: Settings, redis: Redis) -> None:
        with pytest.raises(Boom):
            use_hold(kind, settings, lambda hold: [hold.settle(70), Boom()])
        assert pending_of(redis, settings, USER, METER) == {"e:k": 70, "total": 70}
        assert len(stream_of(redis, settings, USER)) == 1

    def test_denied(self, kind: str, settings: Settings, redis: Redis) -> None:
        with Billing.connect(settings) as client:
            client.charge(USER, METER, 901, "c")
        with pytest.raises(UsageLimitExceeded):
            use_hold(kind, settings, lambda _: [])
        assert pending_of(redis, settings, USER, METER) == {"e:c": 901, "total": 901}

    def test_settle_that_redis_does_not_confirm(
        self, kind: str, settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = scripts.Script("settle", "return redis.error_reply('OOM no memory left')", "0" * 40)
        real = scripts.script
        monkeypatch.setattr(scripts, "script", lambda name: broken if name == "settle" else real(name))
        with pytest.raises(RedisUnavailable) as caught:
            use_hold(kind, settings, lambda hold: [hold.settle(70, reference_id="r")])
        (event,) = caught.value.events
        assert (event.event_id, event.quantity, event.reference_id, event.hold_key) == ("k", 70, "r", "k")
        assert pending_of(redis, settings, USER, METER) == {"h:k": 100, "total": 100}


# ---------------------------------------------------------------------------------------------------------------------
# loading, publishing


def test_many_at_once_load_a_missing_balance(blocking: Billing, redis: Redis, settings: Settings) -> None:
    for number in range(20):
        blocking.emit(USER, METER, 10, event_id=f"e{number}")
    start = Barrier(24)

    def attempt(number: int) -> int | None:
        start.wait(10)
        return available(blocking) if number else drain(settings, USER).entries

    with ThreadPoolExecutor(24) as threads:
        results = list(threads.map(attempt, range(24)))
    assert results == [20] + [800] * 23
    assert pending_of(redis, settings, USER, METER) == {}
    assert available(blocking) == 800


def test_a_balance_that_contains_an_event_takes_it_out_of_pending(
    blocking: Billing, redis: Redis, settings: Settings
) -> None:
    blocking.emit(USER, METER, 10, event_id="applied")
    partition = partition_of(settings, USER)
    (fields,) = stream_of(redis, settings, USER)
    drain(settings, USER)
    # As a worker leaves it that dies between COMMIT and publish: still in the stream, still pending, not cached.
    redis.xadd(partition.entries, {"v": "1", "e": fields[b"e"], "m": "1"})
    redis.hset(partition.account(USER).pending(METER), mapping={"e:applied": 10, "total": 10})
    redis.delete(partition.account(USER).balance)
    blocking.emit(USER, METER, 5, event_id="waiting")
    assert available(blocking) == 985
    assert pending_of(redis, settings, USER, METER) == {"e:waiting": 5, "total": 5}
    drain(settings, USER)
    assert available(blocking) == 985
    assert pending_of(redis, settings, USER, METER) == {}


def test_a_publish_while_a_balance_is_loaded_wins(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_account(settings, USER)
    partition = partition_of(settings, USER)
    with Billing.connect(settings) as client:
        client.emit(USER, METER, 100, event_id="e1")
        real, loads = client._ask, 0

        def slow(step: effects.Ask) -> Any:
            nonlocal loads
            read = real(step)
            loads += 1
            if loads == 1:
                drain(settings, USER)  # commits and publishes while the old balance is on its way
            return read

        monkeypatch.setattr(client, "_ask", slow)
        assert available(client) == 900
        assert loads >= 2
        cached: Any = redis.get(partition.account(USER).balance)
    assert cached.split(b"\n")[1] == b"credits 1000 100 0 0 1 monthly"


def test_a_cached_balance_is_fresh_for_a_minute_and_kept_for_a_quarter_of_an_hour(
    blocking: Billing, redis: Redis, settings: Settings
) -> None:
    key = account_of(settings, USER).balance
    assert available(blocking) == 1000
    cached: Any = redis.get(key)
    assert 50_000 < int(cached.split(b"\n")[0].split(b" ")[2]) - redis_now_ms(redis) <= 60_000
    assert 890_000 < redis.pttl(key) <= 900_000
    redis.delete(key)
    assert available(blocking) == 1000


def test_a_load_slower_than_the_balance_may_live_is_done_again(
    emptied_database_url: str, redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(emptied_database_url, redis_url, cache_ttl_ms=1_000, ledger_down_balance_max_age_seconds=0)
    give_account(settings, USER)
    key = account_of(settings, USER).balance
    with Billing.connect(settings) as client:
        real, cached = client._ask, []

        def slow(step: effects.Ask) -> Any:
            read = real(step)
            cached.append(redis.exists(key))
            if len(cached) == 1:
                over = redis_now_ms(redis) + 1_000
                wait_until(lambda: redis_now_ms(redis) >= over, "the balance that was read is out of date")
            return read

        monkeypatch.setattr(client, "_ask", slow)
        assert available(client) == 1000
        assert cached == [0, 0], "what came too late was not cached, and was read again"
        assert 0 < redis.pttl(key) <= 1_000


def test_a_drain_replaces_a_cached_balance_and_caches_none_by_itself(
    blocking: Billing, redis: Redis, settings: Settings
) -> None:
    key = account_of(settings, USER).balance
    blocking.emit(USER, METER, 1, event_id="e1")
    drain(settings, USER)
    assert not redis.exists(key)
    assert available(blocking) == 999
    blocking.emit(USER, METER, 1, event_id="e2")
    drain(settings, USER)
    assert b"credits 1000 2 0 0 1" in (redis.get(key) or b"")


def test_a_refresh_publishes_without_an_event(blocking: Billing, redis: Redis, settings: Settings) -> None:
    assert available(blocking) == 1000
    partition = partition_of(settings, USER)
    redis.set(partition.account(USER).balance, "1 1\ncredits 5 0 0 0 1", px=60_000)
    assert available(blocking) == 5
    redis.xadd(partition.entries, {"r": USER})
    drain(settings, USER)
    assert available(blocking) == 1000
    assert stream_of(redis, settings, USER) == []


# ---------------------------------------------------------------------------------------------------------------------
# accounts nobody opened, billing switched off


def test_an_unknown_account_may_spend_nothing(billing: Any, redis: Redis, settings: Settings) -> None:
    answer = billing.check("nobody", METER, 1)
    assert (answer.allowed, answer.reason, answer.available) == (False, Reason.UNKNOWN_ACCOUNT, 0)
    attempts: list[Callable[[], Any]] = [
        lambda: billing.reserve("nobody", METER, 1, "k"),
        lambda: billing.charge("nobody", METER, 1, "c"),
    ]
    for attempt in attempts:
        with pytest.raises(UsageDenied) as caught:
            attempt()
        assert type(caught.value) is UsageDenied
        assert caught.value.answer.reason is Reason.UNKNOWN_ACCOUNT
    assert pending_of(redis, settings, "nobody", METER) == {}


def test_an_unknown_accounts_events_are_uncollected(billing: Any, redis: Redis, settings: Settings) -> None:
    billing.check("nobody", METER, 1)
    billing.emit("nobody", METER, 30, event_id="e1")
    drain(settings, "nobody")
    assert rows(settings, "SELECT user_id, amount, uncollected FROM usage_log") == [("nobody", 30, 30)]
    assert pending_of(redis, settings, "nobody", METER) == {}
    assert stream_of(redis, settings, "nobody") == []


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_the_default_plan_opens_an_account(kind: str, emptied_database_url: str, redis_url: str, redis: Redis) -> None:
    settings = settings_for(emptied_database_url, redis_url, default_plan="tenant")
    with closing(open_client(kind, settings)) as client:
        assert client.check("newcomer", METER, 1000).allowed
        assert not client.check("newcomer", METER, 1001).allowed
        assert rows(settings, "SELECT * FROM account") == []
        client.charge("newcomer", METER, 400, "c1")
        client.reserve("newcomer", METER, 100, "k")
        drain(settings, "newcomer")
        assert available(client, "newcomer") == 500
        assert rows(settings, "SELECT user_id, plan FROM account") == [("newcomer", "tenant")]


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_billing_switched_off_allows_all_and_records(
    kind: str, emptied_database_url: str, redis_url: str, redis: Redis
) -> None:
    settings = settings_for(emptied_database_url, redis_url, billing_enabled=False)
    give_account(settings, USER)
    with closing(open_client(kind, settings)) as client:
        answer = client.check(USER, METER, 10**9)
        assert (answer.allowed, answer.reason) == (True, Reason.BILLING_DISABLED)
        hold = client.reserve("nobody", METER, 10**9, "k")
        hold.settle(5)
        client.charge(USER, METER, 2_000, "c1")
        client.emit(USER, METER, 1, event_id="e1")
    drain(settings, USER)
    drain(settings, "nobody")
    recorded = rows(settings, "SELECT user_id, event_id, amount FROM usage_log ORDER BY amount")
    assert recorded == [(USER, "e1", 1), ("nobody", "k", 5), (USER, "c1", 2_000)]


# ---------------------------------------------------------------------------------------------------------------------
# arguments


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("user_id", ["", "a" * 129, "{p1}", "a\r\nb", "a\n", "a#b", "a\x00", "\u202e", "x" * 10_000]),
        ("meter", ["", "tea", "Credits", ".+", "a" * 65]),
        ("amount", [-1, MAX_AMOUNT + 1, 2**63, 1.0, True, "1", None, float("nan")]),
        ("key", ["", "a" * 129, "a#b", "a b", "a\n", "{x}"]),
        ("ttl_seconds", [0, -1, 604_801]),
    ],
)
def test_reserve_names_the_argument_that_is_wrong(
    blocking: Billing, redis: Redis, field: str, wrong: list[Any]
) -> None:
    assert available(blocking) == 1000
    before = set(redis.keys())
    for value in wrong:
        arguments: dict[str, Any] = {"user_id": USER, "meter": METER, "amount": 1, "key": "k", field: value}
        with pytest.raises(InvalidRequest) as caught:
            blocking.reserve(**arguments)
        assert caught.value.field == field
        assert str(caught.value).startswith(f"{field}: must be ")
        assert len(str(caught.value)) < 400
    assert set(redis.keys()) == before


def test_every_call_refuses_wrong_arguments(billing: Any, redis: Redis, settings: Settings) -> None:
    attempts: list[tuple[str, Callable[[], Any]]] = [
        ("user_id", lambda: billing.check("{p1}", METER)),
        ("meter", lambda: billing.check(USER, "tea")),
        ("amount", lambda: billing.check(USER, METER, -1)),
        ("user_id", lambda: billing.settle("", METER, "k", 1)),
        ("key", lambda: billing.settle(USER, METER, "a#b", 1)),
        ("event_id", lambda: billing.settle(USER, METER, "k", 1, event_id="a b")),
        ("actual", lambda: billing.settle(USER, METER, "k", MAX_AMOUNT + 1)),
        ("key", lambda: billing.capture(USER, METER, "a#b", "e", 1)),
        ("event_id", lambda: billing.capture(USER, METER, "k", "", 1)),
        ("amount", lambda: billing.capture(USER, METER, "k", "e", 1.5)),
        ("key", lambda: billing.release(USER, METER, "a#b")),
        ("event_id", lambda: billing.charge(USER, METER, 1, "{x}")),
        ("amount", lambda: billing.charge(USER, METER, True, "c")),
    ]
    for field, attempt in attempts:
        with pytest.raises(InvalidRequest) as caught:
            attempt()
        assert caught.value.field == field
    assert stream_of(redis, settings, USER) == []


@pytest.mark.parametrize("unwanted", ["rq", "sqlalchemy", "psycopg", "loguru", "msgspec", "alembic", "typer"])
def test_the_client_imports_little(unwanted: str) -> None:
    code = f"import sys, worker.client; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("missing", ["sqlalchemy", "psycopg"])
def test_a_missing_package_for_postgres_is_named(missing: str, redis_url: str) -> None:
    code = f"""
        import asyncio, sys
        sys.modules["{missing}"] = None
        from config.settings import load_settings
        from worker.client import AsyncBilling, Billing
        from worker.errors import LedgerUnavailable

        settings = load_settings({{}}, redis_url="{redis_url}", database_url="postgresql://nobody@127.0.0.1:9/none")
        async def check():
            async with AsyncBilling.connect(settings) as client:
                await client.check("{USER}", "{METER}")
        with Billing.connect(settings) as client:
            for ask in (lambda: client.check("{USER}", "{METER}"), lambda: asyncio.run(check())):
                try:
                    ask()
                except LedgerUnavailable as error:
                    print(error)
            client.emit("{USER}", "{METER}", 1)
    """
    first, second = run_python(code).splitlines()
    assert first == second
    assert missing in first
    assert first.endswith("): pip install sqlalchemy 'psycopg[binary]'")


def test_a_spool_that_this_python_cannot_have_is_a_bad_setting() -> None:
    """As on Windows, which has no module fcntl: there the client works, but for the spool."""
    code = """
        import sys
        sys.modules["fcntl"] = None
        from config.settings import SettingsError, load_settings
        from worker.client import Billing
        Billing.connect(load_settings({})).close()
        try:
            Billing.connect(load_settings({}, spool_path="spool"))
        except SettingsError as error:
            print(error)
    """
    shown = run_python(code)
    assert shown.startswith("METERFALL_SPOOL_PATH: a spool does not work in this Python (")
    assert "fcntl" in shown


def run_python(code: str) -> str:
    """What a Python of its own prints that runs this code; fails if it does."""
    command = [sys.executable, "-c", dedent(code)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_a_producer_needs_no_ledger(redis_url: str, redis: Redis) -> None:
    settings = settings_for(None, redis_url)
    with Billing.connect(settings) as client:
        client.emit(USER, METER, 5, event_id="e1")
        assert client.settle(USER, METER, "k", 3).amount == 3
        with pytest.raises(LedgerUnavailable, match="DATABASE_URL"):
            client.check(USER, METER, 1)
    assert pending_of(redis, settings, USER, METER) == {"e:e1": 5, "e:k": 3, "total": 8}


def test_threads_share_one_ledger(blocking: Billing, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[LedgerView] = []
    second = Event()
    real = LedgerView.__init__

    def slow(self: LedgerView, *args: Any) -> None:
        opened.append(self)
        if len(opened) > 1:
            second.set()
        second.wait(0.3)
        real(self, *args)

    monkeypatch.setattr(LedgerView, "__init__", slow)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: available(blocking), range(4))) == [1000] * 4
    kept = blocking._ledger
    for view in opened:
        view.close()
    assert opened == [kept], "those not kept are never closed, and their connections stay open"


def test_answers_are_about_the_hold_that_was_asked_for(blocking: Billing) -> None:
    hold = blocking.reserve(USER, METER, 10, "k")
    assert isinstance(hold.answer, HoldAnswer)
    assert (hold.answer.user_id, hold.answer.meter, hold.answer.key) == (USER, METER, "k")
