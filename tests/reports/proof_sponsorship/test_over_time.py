"""Between a decision and its settlement: others take what was left, the day ends, trust changes, Redis forgets."""

from __future__ import annotations

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.books import assert_proved
from tests.support.ledger import rows
from tests.support.sponsorship import (
    DAY_MS,
    Everybody,
    drain_pool,
    expire,
    let_a_day_pass,
    open_accounts,
    open_pool,
    pool_row,
    promised,
    sweep,
    today_of,
)
from worker.admin import accounts
from worker.client import Billing
from worker.errors import HoldClosed
from worker.keyspace import keys
from worker.resources import Resources


@pytest.mark.parametrize(("taken", "absorb", "serve"), [(70, 30, "partial"), (100, 0, "gate")])
def test_a_confirmation_gets_what_others_left_of_the_pool(
    settings: Settings, redis: Redis, resources: Resources, taken: int, absorb: int, serve: str
) -> None:
    open_pool(settings, 100)
    with Billing(settings, Everybody("elite")) as client:
        advice = client.decide("ada", 150, "late")
        assert (advice.serve, advice.absorb, advice.charge, advice.expires_at) == ("partial", 100, 50, None)
        assert client.decide("bob", taken, "quick").serve == "free"
        assert client.settle_sponsored("bob", "quick", taken).absorbed == taken
        drain_pool(resources)
        answer = client.confirm_partial("ada", 150, "late", paid=50)
        assert (answer.serve, answer.absorb, answer.charge, answer.outstanding) == (
            serve, absorb, 150 - absorb, 100 - absorb
        )  # fmt: skip
        if absorb:
            assert client.settle_sponsored("ada", "late", 150, paid=150 - absorb).absorbed == absorb
        else:
            assert (answer.reason, answer.expires_at) == ("pool_empty", None)
            with pytest.raises(HoldClosed, match="late of ada is unknown"):
                client.settle_sponsored("ada", "late", 150)
    drain_pool(resources)
    assert pool_row(settings)[1] == (12 if absorb else 0)
    assert_proved(resources)


@pytest.mark.parametrize("forgotten", [False, True], ids=["rewound", "gone from Redis"])
@pytest.mark.parametrize("ending", ["settled", "settled late", "released", "expired"])
def test_the_day_ends_while_a_request_runs(
    settings: Settings, redis: Redis, resources: Resources, ending: str, forgotten: bool
) -> None:
    open_accounts(resources, "trusted", "ada")
    with Billing(settings) as client:
        assert client.decide("ada", 100, "yesterday").serve == "free"
        assert client.decide("ada", 5, "before").serve == "free"
        client.settle_sponsored("ada", "before", 5)
        drain_pool(resources)
        let_a_day_pass(settings, redis, "ada")
        if forgotten:
            redis.delete(keys.SPONSORSHIP.today("ada"))
        late = 20 if ending == "settled late" else 0
        today = 120 - late
        assert client.decide("ada", today, "today").serve == "free"  # yesterday takes nothing of it
        if ending == "released":
            client.release_sponsored("ada", "yesterday", "no work")
        elif ending == "settled":
            assert client.settle_sponsored("ada", "yesterday", 60).absorbed == 60
        else:
            expire(redis, "ada", "yesterday")
        if late:  # what today has left
            assert client.settle_sponsored("ada", "yesterday", 60).absorbed == late
        sweep(resources)
        assert today_of(redis, "ada") == {"absorbed": late, "h:today": today}
        assert client.settle_sponsored("ada", "today", today).absorbed == today
        drain_pool(resources)
        assert promised(redis) == {}
        days = rows(settings, "SELECT sum(absorbed)::bigint FROM sponsor_grant GROUP BY window_start ORDER BY 1")
        assert days == [(65 if ending == "settled" else 5,), (120,)]
        assert_proved(resources)
        # A Redis that has lost everything goes on with today, not with yesterday.
        redis.flushdb()
        answer = client.decide("ada", 1, "after")
        assert (answer.serve, answer.absorbed_today) == ("gate", 120)


def test_a_window_that_redis_lost_is_rebuilt_from_the_ledger(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    open_accounts(resources, "established", "ada")
    with Billing(settings) as client:
        client.decide("ada", 30, "a")
        client.settle_sponsored("ada", "a", 30)
        start = redis.hget(keys.SPONSORSHIP.today("ada"), "start")
        drain_pool(resources)
        redis.flushdb()
        answer = client.decide("ada", 30, "b")
        assert (answer.serve, answer.absorb, answer.absorbed_today) == ("partial", 20, 30)
        client.confirm_partial("ada", 30, "b", paid=10)
        assert redis.hget(keys.SPONSORSHIP.today("ada"), "start") == start
        assert 0 < redis.pttl(keys.SPONSORSHIP.today("ada")) <= DAY_MS
        client.settle_sponsored("ada", "b", 30)
    drain_pool(resources)
    assert rows(settings, "SELECT sum(absorbed)::bigint, count(*) FROM sponsor_grant GROUP BY window_start") == [
        (50, 2)
    ]
    assert_proved(resources)


@pytest.mark.parametrize("hosted", [False, True])
def test_a_late_settlement_is_judged_by_the_trust_of_its_own_time(
    settings: Settings, redis: Redis, resources: Resources, hosted: bool
) -> None:
    open_accounts(resources, "elite", "ada")
    host = Everybody("elite") if hosted else None
    with Billing(settings, host) as client:
        assert client.decide("ada", 100, "request").tier == "elite"
        expire(redis, "ada", "request")
        accounts.set_trust(resources, "ada", "established")
        drain_pool(resources)
        if host is not None:
            host.tier = "trusted"
        settlement = client.settle_sponsored("ada", "request", 100)
    drain_pool(resources)
    tier, budget, absorbed = ("trusted", 120, 100) if hosted else ("established", 50, 50)
    assert (settlement.late, settlement.absorbed, settlement.uncovered) == (True, absorbed, 100 - absorbed)
    assert rows(settings, "SELECT tier, daily_budget, absorbed, late FROM sponsor_grant") == [
        (tier, budget, absorbed, True)
    ]
    assert_proved(resources)
