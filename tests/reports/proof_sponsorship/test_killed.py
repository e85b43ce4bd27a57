"""Clients killed between any two steps, lost replies, and a killed dyno: nothing is lost or repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from tests.reports.proof_sponsorship.interrupted import Interrupted, lose_reply, survives
from tests.support.books import assert_proved
from tests.support.processes import dyno, kill
from tests.support.sponsorship import (
    Everybody,
    drain_pool,
    expire,
    members,
    open_accounts,
    past_the_triggers,
    pool_row,
    promised,
    sweep,
    today_of,
)
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.errors import LedgerUnavailable, RedisUnavailable
from worker.keyspace import keys
from worker.resources import Resources


@dataclass(frozen=True)
class Case:
    """A call about the request `name`, what must be done before, and what it answers, alone or repeated."""

    call: Callable[[Billing, str], Any]
    before: Callable[[Billing, Redis, str], object]
    answers: dict[str, Any]
    holds: int = 0
    absorbed: int = 0
    credited: int = 0


def nothing_before(client: Billing, redis: Redis, name: str) -> None:
    """It is new."""


def decided(client: Billing, redis: Redis, name: str) -> None:
    """It holds 40."""
    assert client.decide("ada", 40, name).serve == "free"


def decided_and_expired(client: Billing, redis: Redis, name: str) -> None:
    """It held 40."""
    decided(client, redis, name)
    expire(redis, "ada", name)


CASES = {
    "decide": Case(
        lambda client, name: client.decide("ada", 40, name),
        nothing_before,
        {"serve": "free", "absorb": 40, "charge": 0},
        holds=40,
    ),
    "confirm": Case(
        lambda client, name: client.confirm_partial("ada", 60, name, paid=20),
        nothing_before,
        {"serve": "partial", "absorb": 40, "charge": 20, "outstanding": 0},
        holds=40,
    ),
    "settle": Case(
        lambda client, name: client.settle_sponsored("ada", name, 61, paid=30),
        decided,
        {"absorbed": 31, "returned": 9, "credited": 3, "late": False},
        absorbed=31,
        credited=3,
    ),
    "settle late": Case(
        lambda client, name: client.settle_sponsored("ada", name, 61, paid=30),
        decided_and_expired,
        {"absorbed": 31, "returned": 9, "credited": 3, "late": True},
        absorbed=31,
        credited=3,
    ),
    "release": Case(
        lambda client, name: client.release_sponsored("ada", name, "no work"), decided, {"amount": 40, "left": 0}
    ),
    "credit": Case(lambda client, name: client.credit_pool(name, 39), nothing_before, {"credited": 3}, credited=3),
}


def assert_answered(case: Case, answer: Any) -> None:
    """The answer is that of the case, whether it is the first or a repeat."""
    found = answer.model_dump()
    assert {name: found[name] for name in case.answers} == case.answers


@pytest.fixture
def everything_back(settings: Settings, redis: Redis, resources: Resources) -> Callable[[Case], None]:
    """Ends a case: what it held is back without anybody's doing, what it gave and got is in the books, once."""
    open_accounts(resources, "elite", "ada")
    balance = 10_000

    def end(case: Case) -> None:
        nonlocal balance
        for name in promised(redis):
            if name.startswith("h:"):
                expire(redis, "ada", name[2:])
        for member in members(redis, keys.SPONSORSHIP.expiries):
            redis.zadd(keys.SPONSORSHIP.expiries, {member: 1})
        sweep(resources)
        drain_pool(resources)
        balance += case.credited - case.absorbed
        assert pool_row(settings)[1] == balance
        assert promised(redis) == {}
        assert not redis.exists(keys.SPONSORSHIP.holds, keys.SPONSORSHIP.user_holds("ada"), keys.SPONSORSHIP.expiries)
        assert today_of(redis, "ada").keys() <= {"absorbed"}
        redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing("ada"), keys.SPONSORSHIP.today("ada"))
        with past_the_triggers(settings) as postgres:
            postgres.execute("UPDATE sponsor_grant SET window_start = window_start - interval '1 day'")

    return end


@pytest.mark.parametrize("what", CASES)
def test_a_client_killed_between_any_two_steps_leaves_nothing_behind(
    settings: Settings,
    redis: Redis,
    resources: Resources,
    billing: Billing,
    everything_back: Callable[[Case], None],
    what: str,
) -> None:
    """Whether the caller comes again or never."""
    case = CASES[what]
    forever = Case(case.call, case.before, {})
    for at in count():
        name = f"tried-again-{at}"
        case.before(billing, redis, name)
        redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing("ada"))
        killed = not survives(settings, at, lambda client, name=name: case.call(client, name))  # type: ignore[misc]
        assert_answered(case, case.call(billing, name))
        assert sum(held for name, held in promised(redis).items() if name.startswith("h:")) == case.holds
        everything_back(case)
        if not killed:
            break
        name = f"given-up-{at}"
        case.before(billing, redis, name)
        redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing("ada"))
        assert not survives(settings, at, lambda client, name=name: case.call(client, name))  # type: ignore[misc]
        was_sent = redis.xlen(keys.SPONSORSHIP.entries) > 0
        everything_back(case if was_sent else forever)
    assert at >= (2 if what == "release" else 3)
    assert_proved(resources)


@pytest.mark.parametrize("what", CASES)
def test_a_call_whose_reply_is_lost_at_any_step_may_be_made_again(
    settings: Settings,
    redis: Redis,
    resources: Resources,
    billing: Billing,
    everything_back: Callable[[Case], None],
    what: str,
) -> None:
    case = CASES[what]
    for at in count():
        name = f"request-{at}"
        case.before(billing, redis, name)
        redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing("ada"))
        with Interrupted(settings, at, lose_reply, lost=True) as client:
            try:
                first = case.call(client, name)
            except (RedisUnavailable, LedgerUnavailable):
                assert what != "decide"
            else:
                if getattr(first, "reason", None) == "pool_unavailable":
                    assert (first.serve, first.absorb, first.charge) == ("gate", 0, 40)
                else:
                    assert_answered(case, first)
            over = client.steps <= at
        assert_answered(case, case.call(billing, name))
        assert sum(held for name, held in promised(redis).items() if name.startswith("h:")) == case.holds
        everything_back(case)
        if over:
            break
    assert at >= (2 if what == "release" else 3)
    assert_proved(resources)


def test_a_dyno_that_is_killed_loses_and_repeats_nothing(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    absorbed = 0
    settings = settings.model_copy(update={"sponsor_daily_units_elite": 10_000})
    with Billing(settings, Everybody("elite")) as client, dyno(settings) as process:
        for number in range(200):
            assert client.decide(f"user-{number % 7}", 9, f"request-{number}").serve == "free"
            absorbed += client.settle_sponsored(f"user-{number % 7}", f"request-{number}", 8).absorbed
            if number == 100:
                wait_until(lambda: redis.xlen(keys.SPONSORSHIP.entries) < 50, "it drains the pool", 20)
        kill(process)
    wait_until(lambda: not redis.exists(keys.SPONSORSHIP.busy), "the dead one counts as dead")
    drain_pool(resources)
    assert absorbed == 1_600
    assert pool_row(settings) == (10_000, 8_400, 200)
    assert promised(redis) == {}
    assert_proved(resources)
