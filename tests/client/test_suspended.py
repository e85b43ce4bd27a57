"""A suspended account may spend nothing, whatever its balance; finished work is recorded all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.answers import CheckAnswer, Reason, Serve
from tests.client.clients import open_client
from tests.support.ledger import give_account, rows
from tests.support.resources import settings_for
from tests.support.sponsorship import drain_pool
from tests.support.streams import drain
from worker.admin import accounts
from worker.client import Billing
from worker.errors import UsageDenied, UsageLimitExceeded
from worker.reports.proof import verify_ledger
from worker.reports.usage import usage_summary
from worker.resources import Resources

USER, METER = "u1", "credits"


@pytest.fixture(params=["blocking", "awaiting"])
def billing(request: pytest.FixtureRequest, settings: Settings, resources: Resources) -> Iterator[Any]:
    """A client of either kind; the user has 1,000 of the plan, 30 saved and 50 bought."""
    give_account(settings, USER, "tenant", buckets={METER: (0, 30, 50)})
    client = open_client(request.param, settings)
    yield client
    client.close()
    drain(settings, USER)
    assert verify_ledger(resources).differences == []


def suspend(settings: Settings, resources: Resources, status: str = "suspended") -> None:
    accounts.set_status(resources, USER, status, actor="ops")
    drain(settings, USER)


def denied(call: Callable[[], object]) -> CheckAnswer:
    with pytest.raises(UsageDenied) as caught:
        call()
    assert not isinstance(caught.value, UsageLimitExceeded), "no purchase would help"
    return caught.value.answer


def test_nothing_is_allowed_by_a_cached_balance(billing: Any, settings: Settings, resources: Resources) -> None:
    assert billing.check(USER, METER, 1_080).allowed
    suspend(settings, resources)
    for amount in (0, 1, 2_000):
        answer = billing.check(USER, METER, amount)
        assert (answer.allowed, answer.reason, answer.available) == (False, Reason.SUSPENDED, 0)
    assert denied(lambda: billing.reserve(USER, METER, 1, "job")).reason is Reason.SUSPENDED
    assert denied(lambda: billing.charge(USER, METER, 1, event_id="e")).reason is Reason.SUSPENDED
    assert billing.remaining(USER, METER).remaining == 0
    found = billing.estimate(USER, METER, 0)
    assert (found.allowed, found.allowed_with_pool, found.expected) == (False, False, None)
    assert billing.check(USER, "premium_voice", 1).reason is Reason.SUSPENDED, "also on a meter that the plan lacks"
    suspend(settings, resources, "active")
    assert billing.check(USER, METER, 1_080).allowed


def test_nothing_is_allowed_by_a_balance_read_from_the_ledger(
    billing: Any, settings: Settings, resources: Resources, redis: Redis
) -> None:
    suspend(settings, resources)
    redis.flushdb()
    assert billing.check(USER, METER, 1).reason is Reason.SUSPENDED
    assert denied(lambda: billing.reserve(USER, METER, 1, "job")).reason is Reason.SUSPENDED


def test_work_under_way_is_recorded_and_gets_no_more(billing: Any, settings: Settings, resources: Resources) -> None:
    billing.reserve(USER, METER, 100, "job")
    suspend(settings, resources)
    assert denied(lambda: billing.extend(USER, METER, "job", amount=200)).reason is Reason.SUSPENDED
    billing.capture(USER, METER, "job", "page-1", 40)
    billing.settle(USER, METER, "job", 60)
    billing.emit(USER, METER, 20, event_id="e1")
    drain(settings, USER)
    paid = "SELECT sum(from_rollover)::int, sum(from_purchased)::int, sum(overflow_to_debt)::int FROM usage_log"
    assert rows(settings, paid) == [(30, 50, 40)]
    (meter,) = [meter for meter in usage_summary(resources, USER).meters if meter.meter == METER]
    assert meter.available == 0


def test_usage_does_not_call_bought_units_available(billing: Any, settings: Settings, resources: Resources) -> None:
    suspend(settings, resources)
    summary = usage_summary(resources, USER)
    assert [(meter.purchased, meter.available) for meter in summary.meters] == [(50, 0)]


class Host:
    """A host that trusts everybody."""

    def tier_of(self, user_id: str) -> str | None:
        return "elite" if user_id else None


def test_the_pool_covers_nothing_whatever_the_host_says(settings: Settings, resources: Resources) -> None:
    give_account(settings, USER, "tenant")
    accounts.set_trust(resources, USER, "trusted")
    drain_pool(resources)
    with Billing.connect(settings) as billing:
        assert billing.decide(USER, 10, "r1").serve is Serve.FREE
        suspend(settings, resources)
        drain_pool(resources)
        assert billing.decide(USER, 10, "r2").serve is Serve.GATE
        suspend(settings, resources, "active")
        drain_pool(resources)
        assert billing.decide(USER, 10, "r3").serve is Serve.FREE
    suspend(settings, resources)
    drain_pool(resources)
    with Billing.connect(settings, trust=Host()) as billing:
        assert billing.decide(USER, 10, "r4").serve is Serve.GATE


def test_without_redis_the_ledger_denies(settings: Settings, resources: Resources) -> None:
    give_account(settings, USER, "tenant", "suspended", {METER: (0, 30, 50)})
    gone = settings_for(settings.database_url, "redis://127.0.0.1:1/0", redis_retries=0)
    with Billing.connect(gone) as billing:
        assert billing.check(USER, METER, 1).reason is Reason.SUSPENDED
        assert denied(lambda: billing.reserve(USER, METER, 1, "job")).reason is Reason.SUSPENDED
        assert billing.remaining(USER, METER).remaining == 0


@pytest.mark.parametrize("status", ["incomplete", "incomplete_expired"])
def test_an_incomplete_subscription_grants_nothing(settings: Settings, resources: Resources, status: str) -> None:
    give_account(settings, USER, "tenant", buckets={METER: (0, 0, 50)})
    accounts.set_status(resources, USER, status)
    with Billing.connect(settings) as billing:
        assert billing.check(USER, METER, 50).allowed
        assert billing.check(USER, METER, 51).reason is Reason.LIMIT_EXCEEDED
