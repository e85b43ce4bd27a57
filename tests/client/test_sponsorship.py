"""The sponsorship pool on real servers, with both clients: from a decision to the books, and the estimate."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Barrier
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.answers import (
    CreditAnswer,
    HoldState,
    Parts,
    Reason,
    Serve,
    SettlementAnswer,
    SponsorAdvice,
    SponsorAnswer,
    SponsorHoldAnswer,
    SponsorReason,
)
from schemas.events import MAX_AMOUNT
from tests.client.clients import open_client
from tests.support.ledger import give_account, give_accounts, rows
from tests.support.resources import settings_for, worker_resources
from tests.support.sponsorship import map_of
from tests.support.streams import dump, partition_of, pending_of
from worker.admin import accounts
from worker.client import Billing
from worker.client.session import TrustSource
from worker.consumer import jobs
from worker.consumer.drain import drain_stream
from worker.errors import HoldClosed, HoldConflict, InvalidRequest, LedgerUnavailable, PartitionMismatch
from worker.keyspace import keys, scripts
from worker.keyspace.connection import redis_now_ms
from worker.keyspace.scripts import Call
from worker.reports.proof import verify_ledger
from worker.resources import Resources
from worker.rules import sponsorship

USER, OTHER, STRANGER = "u1", "u2", "nobody"
METER = "credits"
NOWHERE = "postgresql://127.0.0.1:1/none"


class Trust:
    """A host that knows whom it trusts, and remembers who was asked about, and in which thread."""

    def __init__(self, **tiers: str | None) -> None:
        self.tiers = tiers
        self.questions: list[str] = []
        self.threads: set[threading.Thread] = set()

    def tier_of(self, user_id: str) -> str | None:
        """The tier of those it knows; raises LookupError for others."""
        self.questions.append(user_id)
        self.threads.add(threading.current_thread())
        return self.tiers[user_id]


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    """A user whose budget is 200 units a day and one with 50; nobody else has an account."""
    settings = settings_for(emptied_database_url, redis_url)
    give_accounts(settings, [USER, OTHER])
    with worker_resources(settings) as resources:
        accounts.set_trust(resources, USER, "trusted")
        accounts.set_trust(resources, OTHER, "established")
    with Redis.from_url(redis_url) as redis:
        redis.flushdb()  # the requests to publish both changes go, too
    return settings


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Callable[..., Any]]:
    """Makes clients of either kind."""
    opened: list[Any] = []

    def open_one(trust: TrustSource | None = None, **overrides: object) -> Any:
        changed = settings.model_validate(settings.model_dump() | overrides)
        opened.append(open_client(request.param, changed, trust))
        return opened[-1]

    yield open_one
    for client in opened:
        client.close()


@pytest.fixture
def billing(connect: Callable[..., Any]) -> Any:
    """Either client."""
    return connect()


@pytest.fixture
def blocking(settings: Settings) -> Iterator[Billing]:
    """The blocking client, where one will do."""
    with closing(Billing.connect(settings)) as client:
        yield client


def drain_all(resources: Resources) -> None:
    """Drain every stream until it is empty."""
    for partition in keys.streams(resources.settings.partitions):
        assert not drain_stream(resources, partition).more


def assert_proved(resources: Resources) -> None:
    """What is in the books is right, and Redis says the same."""
    drain_all(resources)
    assert verify_ledger(resources).differences == []


def entries(redis: Redis) -> list[dict[str, str]]:
    """The pool's stream, oldest first."""
    found: Any = redis.xrange(keys.SPONSORSHIP.entries)
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in found]


def expire(redis: Redis, request: str, user: str = USER) -> None:
    """Let the hold's time be over, as if it had been waited for."""
    assert redis.hset(keys.SPONSORSHIP.hold(request), "expires_ms", 1) == 0
    for name in (keys.SPONSORSHIP.holds, keys.SPONSORSHIP.user_holds(user)):
        assert redis.zadd(name, {request: 1}, xx=True, ch=True) == 1
    redis.zadd(keys.SPONSORSHIP.expiries, {keys.SPONSORSHIP.expiring(): 1, keys.SPONSORSHIP.expiring(user): 1})


def end_window(redis: Redis, user: str = USER) -> None:
    """Let the user's window be over, as if a day had passed."""
    start: Any = redis.hget(keys.SPONSORSHIP.today(user), "start")
    redis.hset(keys.SPONSORSHIP.today(user), "start", int(start) - sponsorship.DAY_MS)


# ---------------------------------------------------------------------------------------------------------------------
# decide, confirm


def test_what_the_pool_covers_is_held_at_once(billing: Any, redis: Redis) -> None:
    first = billing.decide(USER, 40, "r1", ttl_seconds=60)
    assert first.expires_at is not None
    assert first == SponsorAnswer(
        user_id=USER, request_id="r1", estimate=40, serve=Serve.FREE, absorb=40, charge=0,
        reason=SponsorReason.WITHIN_BUDGET, tier="trusted", daily_budget=200, absorbed_today=0, pool=10_000,
        paid=0, outstanding=0, expires_at=first.expires_at, repeated=False,
    )  # fmt: skip
    assert billing.decide(USER, 40, "r1") == first.model_copy(update={"repeated": True})
    second = billing.decide(USER, 160, "r2")
    assert (second.serve, second.absorbed_today, second.pool) == (Serve.FREE, 40, 9_960)
    assert map_of(redis, keys.SPONSORSHIP.promised) == {"h:r1": 40, "h:r2": 160, "total": 200}
    assert 0 < redis_now_ms(redis) + 60_000 - int(first.expires_at.timestamp() * 1_000) < 10_000
    gated = billing.decide(USER, 1, "r3")
    assert (gated.serve, gated.reason, gated.charge) == (Serve.GATE, SponsorReason.BUDGET_SPENT, 1)


def test_a_part_is_advice_until_the_rest_is_paid(billing: Any, redis: Redis, resources: Resources) -> None:
    advice = billing.decide(OTHER, 80, "r")
    assert (advice.serve, advice.absorb, advice.charge, advice.outstanding) == (Serve.PARTIAL, 50, 30, 30)
    assert (advice.reason, advice.expires_at) == (SponsorReason.BUDGET_SHORT, None)
    assert map_of(redis, keys.SPONSORSHIP.promised) == {}
    held = billing.confirm_partial(OTHER, 80, "r", paid=30)
    assert held == advice.model_copy(
        update={
            "paid": 30,
            "outstanding": 0,
            "reason": SponsorReason.WITHIN_BUDGET,
            "expires_at": held.expires_at,
        }
    )
    assert held.expires_at is not None
    assert billing.confirm_partial(OTHER, 80, "r", paid=30) == held.model_copy(update={"repeated": True})
    assert map_of(redis, keys.SPONSORSHIP.promised) == {"h:r": 50, "total": 50}
    assert billing.settle_sponsored(OTHER, "r", 70) == SettlementAnswer(
        user_id=OTHER, request_id="r", held=50, actual=70, paid=30, absorbed=40, returned=10, uncovered=0, credited=3
    )
    assert_proved(resources)


@pytest.mark.parametrize(("left", "absorb", "outstanding"), [(20, 20, 30), (0, 0, 50)])
def test_a_confirmation_may_get_less_than_was_advised(
    billing: Any, redis: Redis, left: int, absorb: int, outstanding: int
) -> None:
    assert billing.decide(OTHER, 80, "r").absorb == 50
    billing.decide(OTHER, 50 - left, "meanwhile")
    answer = billing.confirm_partial(OTHER, 80, "r", paid=30)
    assert (answer.absorb, answer.charge, answer.paid, answer.outstanding) == (absorb, 80 - absorb, 30, outstanding)
    assert map_of(redis, keys.SPONSORSHIP.promised).get("h:r", 0) == absorb
    if absorb:
        assert (answer.serve, answer.reason) == (Serve.PARTIAL, SponsorReason.BUDGET_SHORT)
        settled = billing.settle_sponsored(OTHER, "r", 80, paid=60)
        assert (settled.absorbed, settled.uncovered, settled.credited) == (20, 0, 6)
    else:
        assert (answer.serve, answer.reason, answer.expires_at) == (Serve.GATE, SponsorReason.BUDGET_SPENT, None)
        billing.release_sponsored(OTHER, "meanwhile", "gave up")
        again = billing.confirm_partial(OTHER, 80, "r", paid=30)
        assert (again.absorb, again.repeated) == (50, False), "what holds nothing leaves no trace"


def test_a_confirmation_without_anything_paid_may_cover_all(billing: Any) -> None:
    answer = billing.confirm_partial(USER, 80, "r", paid=0)
    assert (answer.serve, answer.absorb, answer.charge, answer.outstanding) == (Serve.FREE, 80, 0, 0)


@pytest.mark.parametrize(
    ("user", "estimate", "reason"),
    [
        (None, 40, SponsorReason.NO_IDENTITY),
        ("", 40, SponsorReason.NO_IDENTITY),
        (USER, 0, SponsorReason.NOTHING_TO_COVER),
        (USER, -7, SponsorReason.NOTHING_TO_COVER),
        (None, -7, SponsorReason.NO_IDENTITY),
    ],
)
def test_who_is_gated_without_asking(
    billing: Any, redis: Redis, user: str | None, estimate: int, reason: SponsorReason
) -> None:
    expected = SponsorAnswer(
        user_id=user or None, request_id="r", estimate=estimate, serve=Serve.GATE, absorb=0, charge=max(0, estimate),
        reason=reason, outstanding=max(0, estimate),
    )  # fmt: skip
    assert billing.decide(user, estimate, "r") == expected
    assert billing.confirm_partial(user, estimate, "r", paid=0) == expected
    assert set(redis.scan_iter()) <= {keys.PARTITION_COUNT.encode()}


def test_a_request_that_is_paid_for_needs_nothing(billing: Any) -> None:
    for paid, outstanding in ((40, 0), (41, 0)):
        answer = billing.confirm_partial(USER, 40, "r", paid=paid)
        assert (answer.serve, answer.reason) == (Serve.GATE, SponsorReason.NOTHING_TO_COVER)
        assert (answer.absorb, answer.charge, answer.outstanding) == (0, 40, outstanding)


def test_strangers_have_the_lowest_tier(billing: Any) -> None:
    answer = billing.decide(STRANGER, 40, "r")
    assert (answer.serve, answer.reason, answer.tier) == (Serve.GATE, SponsorReason.NO_BUDGET, "new")


def test_an_empty_pool_gates(connect: Callable[..., Any], redis: Redis) -> None:
    billing = connect(sponsor_daily_units_trusted=10**12)
    billing.decide(USER, 9_990, "r1")
    short = billing.decide(USER, 40, "r2")
    assert (short.serve, short.absorb, short.reason) == (Serve.PARTIAL, 10, SponsorReason.POOL_SHORT)
    billing.decide(USER, 10, "r2")
    answer = billing.decide(USER, 40, "r3")
    assert (answer.serve, answer.reason, answer.pool) == (Serve.GATE, SponsorReason.POOL_EMPTY, 0)
    assert map_of(redis, keys.SPONSORSHIP.promised)["total"] == 10_000


def test_a_request_belongs_to_one_user_and_estimate(billing: Any, redis: Redis) -> None:
    billing.decide(USER, 40, "r")
    before = dump(redis)
    attempts: list[Callable[[], Any]] = [
        lambda: billing.decide(OTHER, 40, "r"),
        lambda: billing.decide(USER, 41, "r"),
        lambda: billing.confirm_partial(USER, 40, "r", paid=0),
        lambda: billing.settle_sponsored(OTHER, "r", 40),
        lambda: billing.release_sponsored(OTHER, "r", "mine"),
    ]
    for attempt in attempts:
        with pytest.raises(HoldConflict, match="hold r of u1 already holds 40 of the sponsorship pool") as caught:
            attempt()
        assert (caught.value.user_id, caught.value.key, caught.value.amount) == (USER, "r", 40)
    gone = {keys.SPONSORSHIP.standing(OTHER).encode()}
    assert {name: value for name, value in dump(redis).items() if name not in gone} == before


def test_a_request_that_is_over_stays_over(billing: Any, redis: Redis) -> None:
    for request in ("settled", "released", "expired"):
        billing.decide(USER, 10, request)
    billing.settle_sponsored(USER, "settled", 10)
    billing.release_sponsored(USER, "released", "no answer came")
    billing.release_sponsored(USER, "unseen", "no answer came")
    expire(redis, "expired")
    for request, state in (
        ("settled", HoldState.SETTLED),
        ("released", HoldState.RELEASED),
        ("unseen", HoldState.RELEASED),
        ("expired", HoldState.EXPIRED),
    ):
        for attempt in (billing.decide, lambda *questions: billing.confirm_partial(*questions, paid=0)):
            with pytest.raises(HoldClosed) as caught:
                attempt(USER, 10, request)
            assert caught.value.state is state
    for request, state in (("released", HoldState.RELEASED), ("never", HoldState.UNKNOWN)):
        with pytest.raises(HoldClosed, match=f"hold {request} of u1 is {state.value}") as caught:
            billing.settle_sponsored(USER, request, 10)
        assert caught.value.state is state


def test_settings_change_the_budgets(connect: Callable[..., Any], settings: Settings) -> None:
    billing = connect(sponsor_daily_units_new=7, sponsor_daily_units_trusted=0)
    assert billing.decide(STRANGER, 7, "r1").serve is Serve.FREE
    assert billing.decide(USER, 7, "r2").reason is SponsorReason.NO_BUDGET
    assert billing.decide(OTHER, 7, "r3").daily_budget == 50
    budgets = billing.context.daily_budgets
    assert list(budgets.items()) == [("new", 7), ("established", 50), ("trusted", 0), ("elite", 1_000)]


def test_a_change_of_trust_counts_once_it_is_published(billing: Any, redis: Redis, resources: Resources) -> None:
    billing.decide(OTHER, 40, "r1")
    accounts.set_trust(resources, OTHER, "elite")
    drain_all(resources)
    answer = billing.decide(OTHER, 900, "r2")
    assert (answer.serve, answer.tier, answer.absorbed_today) == (Serve.FREE, "elite", 40)


# ---------------------------------------------------------------------------------------------------------------------
# The host's trust


@pytest.mark.parametrize(
    ("host_tier", "tier", "budget"),
    [("elite", "elite", 1_000), ("royal", "new", 0), ("", "new", 0), (None, "trusted", 200)],
)
def test_the_host_may_say_whom_it_trusts(
    connect: Callable[..., Any], host_tier: str | None, tier: str, budget: int
) -> None:
    trust = Trust(u1=host_tier)
    billing = connect(trust)
    for answer in (billing.decide(USER, 1, "r1"), billing.estimate(USER, METER, 1).sponsorship):
        assert (answer.tier, answer.daily_budget) == (tier, budget)
    assert trust.questions == [USER, USER]


def test_a_host_may_trust_users_without_an_account(connect: Callable[..., Any], resources: Resources) -> None:
    billing = connect(Trust(nobody="elite"))
    assert billing.decide(STRANGER, 1_000, "r").serve is Serve.FREE
    assert billing.settle_sponsored(STRANGER, "r", 900).absorbed == 900
    assert_proved(resources)
    assert billing.decide(STRANGER, 1_000, "r2").absorb == 100


def test_the_host_is_asked_when_it_matters(connect: Callable[..., Any], redis: Redis) -> None:
    trust = Trust(u1="elite")
    billing = connect(trust)
    billing.decide(None, 1, "r")
    billing.decide(USER, 0, "r")
    billing.release_sponsored(USER, "other", "")
    billing.credit_pool("another", 1)
    assert trust.questions == []
    billing.decide(USER, 60, "r")
    billing.settle_sponsored(USER, "r", 60)
    assert trust.questions == [USER], "in time, a settlement needs no trust"
    billing.decide(USER, 60, "late")
    expire(redis, "late")
    trust.tiers[USER] = "established"
    assert billing.settle_sponsored(USER, "late", 60).absorbed == 0
    assert trust.questions == [USER] * 3
    in_a_thread_of_its_own = not isinstance(billing, Billing)
    assert (threading.current_thread() not in trust.threads) is in_a_thread_of_its_own


def test_what_the_host_raises_ends_the_call(connect: Callable[..., Any], redis: Redis) -> None:
    billing = connect(Trust())
    with pytest.raises(LookupError):
        billing.decide(USER, 40, "r")
    with pytest.raises(LookupError):
        billing.estimate(USER, METER, 40)
    assert map_of(redis, keys.SPONSORSHIP.promised) == {}


# ---------------------------------------------------------------------------------------------------------------------
# settle, release, credit


@pytest.mark.parametrize(
    ("actual", "paid", "absorbed", "returned", "uncovered", "credited"),
    [
        (60, None, 60, 0, 0, 0), (25, None, 25, 35, 0, 0), (0, None, 0, 60, 0, 0), (75, None, 60, 0, 15, 0),
        (75, 15, 60, 0, 0, 1), (75, 20, 55, 5, 0, 2), (75, 90, 0, 60, 0, 9), (75, 0, 60, 0, 15, 0),
    ],
)  # fmt: skip
def test_the_pool_pays_what_is_left_of_the_cost(
    billing: Any,
    redis: Redis,
    resources: Resources,
    settings: Settings,
    actual: int,
    paid: int | None,
    absorbed: int,
    returned: int,
    uncovered: int,
    credited: int,
) -> None:
    billing.decide(USER, 60, "r")
    first = billing.settle_sponsored(USER, "r", actual, paid=paid)
    assert first == SettlementAnswer(
        user_id=USER, request_id="r", held=60, actual=actual, paid=paid or 0, absorbed=absorbed, returned=returned,
        uncovered=uncovered, credited=credited,
    )  # fmt: skip
    assert billing.settle_sponsored(USER, "r", 1, paid=9) == first.model_copy(update={"repeated": True})
    assert map_of(redis, keys.SPONSORSHIP.promised) == ({"g:r": absorbed, "total": absorbed} if absorbed else {})
    assert len(entries(redis)) == 1
    assert_proved(resources)
    assert map_of(redis, keys.SPONSORSHIP.promised) == {}
    assert rows(settings, "SELECT user_id, held, actual, paid, absorbed, tier, daily_budget FROM sponsor_grant") == [
        (USER, 60, actual, paid or 0, absorbed, "trusted", 200)
    ]
    assert rows(settings, "SELECT balance FROM sponsor_pool") == [(10_000 - absorbed + credited,)]
    after = billing.decide(USER, 1, "next")
    assert (after.pool, after.absorbed_today) == (10_000 - absorbed + credited, absorbed)


def test_a_window_that_redis_lost_is_that_of_the_books(
    billing: Any, redis: Redis, resources: Resources, settings: Settings
) -> None:
    for request, cost in (("r1", 30), ("r2", 40)):
        billing.decide(USER, 60, request)
        billing.settle_sponsored(USER, request, cost)
    drain_all(resources)
    start: Any = redis.hget(keys.SPONSORSHIP.today(USER), "start")
    redis.flushdb()
    answer = billing.decide(USER, 130, "r3")
    assert (answer.serve, answer.absorbed_today, answer.pool) == (Serve.FREE, 70, 9_930)
    assert redis.hget(keys.SPONSORSHIP.today(USER), "start") == start
    billing.settle_sponsored(USER, "r3", 130)
    assert_proved(resources)
    assert rows(settings, "SELECT count(DISTINCT window_start), sum(absorbed)::int FROM sponsor_grant") == [(1, 200)]


def test_a_settlement_counts_in_the_window_that_held_it(
    billing: Any, redis: Redis, resources: Resources, settings: Settings
) -> None:
    billing.decide(USER, 150, "old", ttl_seconds=86_400)
    end_window(redis)
    answer = billing.decide(USER, 190, "new")
    assert (answer.serve, answer.absorbed_today, answer.pool) == (Serve.FREE, 0, 9_850)
    billing.settle_sponsored(USER, "old", 150)
    assert billing.decide(USER, 10, "more").absorbed_today == 190
    billing.settle_sponsored(USER, "new", 190)
    assert_proved(resources)
    assert rows(settings, "SELECT absorbed FROM sponsor_grant ORDER BY window_start") == [(150,), (190,)]


@pytest.mark.parametrize("cached", [True, False])
def test_a_late_settlement_takes_what_is_still_allowed(
    billing: Any, redis: Redis, resources: Resources, settings: Settings, cached: bool
) -> None:
    billing.decide(USER, 150, "late")
    expire(redis, "late")
    billing.decide(USER, 120, "meanwhile")
    if not cached:
        redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing(USER))
    first = billing.settle_sponsored(USER, "late", 150)
    assert (first.held, first.absorbed, first.returned, first.uncovered, first.late) == (150, 80, 70, 70, True)
    assert billing.settle_sponsored(USER, "late", 150) == first.model_copy(update={"repeated": True})
    assert billing.decide(USER, 1, "r").reason is SponsorReason.BUDGET_SPENT
    billing.settle_sponsored(USER, "meanwhile", 120)
    assert_proved(resources)
    assert rows(settings, "SELECT absorbed, late FROM sponsor_grant ORDER BY seq") == [(80, True), (120, False)]


def test_a_release_gives_all_back(billing: Any, redis: Redis) -> None:
    billing.decide(USER, 60, "r")
    for state in (HoldState.HELD, HoldState.RELEASED):
        assert billing.release_sponsored(USER, "r", "the model was down") == SponsorHoldAnswer(
            user_id=USER, request_id="r", state=state, amount=60, left=0
        )
    assert map_of(redis, keys.SPONSORSHIP.promised) == {}
    assert billing.decide(USER, 200, "r2").serve is Serve.FREE
    billing.settle_sponsored(USER, "r2", 200)
    assert billing.release_sponsored(USER, "r2", "").state is HoldState.SETTLED
    assert billing.release_sponsored(USER, "r3", "").state is HoldState.UNKNOWN


def test_a_share_of_what_others_pay_flows_back_once(billing: Any, redis: Redis, resources: Resources) -> None:
    for _ in range(2):
        assert billing.credit_pool("paid", 509) == CreditAnswer(request_id="paid", paid=509, credited=50)
    assert redis.lrange(keys.BELL, 0, -1) == [b"-1"], "rung once for a waiting drain"
    assert_proved(resources)
    assert billing.decide(USER, 1, "r").pool == 10_050


def test_an_expired_hold_is_taken_out_by_the_job(
    blocking: Billing, redis: Redis, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "resources", lambda: resources)
    blocking.decide(USER, 60, "r1")
    blocking.decide(USER, 70, "r2")
    blocking.decide(OTHER, 50, "r3")
    expire(redis, "r1")
    jobs.expire_holds(keys.SPONSORSHIP.number)
    assert map_of(redis, keys.SPONSORSHIP.promised) == {"h:r2": 70, "h:r3": 50, "total": 120}
    assert redis.hget(keys.SPONSORSHIP.today(USER), "total") == b"70"
    for request, user in (("r2", USER), ("r3", OTHER)):
        expire(redis, request, user)
    jobs.expire_holds(keys.SPONSORSHIP.number)
    assert map_of(redis, keys.SPONSORSHIP.promised) == {}
    assert redis.zcard(keys.SPONSORSHIP.expiries) == 0
    assert (
        redis.exists(keys.SPONSORSHIP.holds, keys.SPONSORSHIP.user_holds(USER), keys.SPONSORSHIP.user_holds(OTHER)) == 0
    )
    assert_proved(resources)


# ---------------------------------------------------------------------------------------------------------------------
# All at once, and without a part of it


@pytest.mark.parametrize("bound", ["pool", "budget"])
def test_32_at_once_for_the_last_unit(settings: Settings, redis: Redis, resources: Resources, bound: str) -> None:
    start = Barrier(32)
    trust = Trust(**{f"v{number}": "elite" for number in range(32)}, u1="trusted")
    with Billing.connect(settings, trust=trust) as billing:
        if bound == "pool":
            for number in range(10):
                billing.decide(f"v{number}", 1_000 - (number == 9), f"before-{number}")
        else:
            billing.decide(USER, 199, "before")
        redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing(USER))  # all load at once, too

        def attempt(number: int) -> SponsorAnswer:
            start.wait(10)
            user = f"v{number}" if bound == "pool" else USER
            if number % 2:
                return billing.decide(user, 1, f"r{number}")
            return billing.confirm_partial(user, 2, f"r{number}", paid=1)

        with ThreadPoolExecutor(32) as threads:
            answers = list(threads.map(attempt, range(32)))
        reasons = [answer.reason for answer in answers if answer.absorb == 0]
        # Of the ten who have used up their budgets, that is the reason.
        assert set(reasons) <= {SponsorReason.POOL_EMPTY, SponsorReason.BUDGET_SPENT}
        assert len(reasons) == 31
        assert map_of(redis, keys.SPONSORSHIP.promised)["total"] == (10_000 if bound == "pool" else 200)


def test_without_a_ledger_the_pool_covers_nothing_and_the_rest_says_so(
    connect: Callable[..., Any], redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    for url in (NOWHERE, None):
        billing = connect(database_url=url)
        answer = billing.decide(USER, 40, "r")
        assert answer == SponsorAnswer(
            user_id=USER, request_id="r", estimate=40, serve=Serve.GATE, absorb=0, charge=40,
            reason=SponsorReason.POOL_UNAVAILABLE, outstanding=40,
        )  # fmt: skip
        assert "the sponsorship pool does not answer" in caplog.messages[-1]
        with pytest.raises(LedgerUnavailable):
            billing.confirm_partial(USER, 40, "r", paid=1)
        with pytest.raises(LedgerUnavailable):
            billing.estimate(USER, METER, 40)
        assert map_of(redis, keys.SPONSORSHIP.promised) == {}


def test_the_ledger_is_not_needed_for_what_is_cached(connect: Callable[..., Any], redis: Redis) -> None:
    connect().decide(USER, 40, "r1")
    connect().check(USER, METER, 1)
    billing = connect(database_url=NOWHERE)
    assert billing.decide(USER, 40, "r2").serve is Serve.FREE
    assert billing.estimate(USER, METER, 40).sponsorship.serve is Serve.FREE
    redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing(USER))
    assert billing.settle_sponsored(USER, "r1", 40).absorbed == 40
    assert billing.release_sponsored(USER, "r2", "").state is HoldState.HELD
    assert connect().decide(USER, 40, "late").serve is Serve.FREE
    expire(redis, "late")
    redis.delete(keys.SPONSORSHIP.pool)
    with pytest.raises(LedgerUnavailable):
        billing.settle_sponsored(USER, "late", 40)
    assert connect().settle_sponsored(USER, "late", 40).absorbed == 40, "it may be tried again"


def test_another_number_of_partitions_is_refused(connect: Callable[..., Any]) -> None:
    connect().decide(USER, 40, "r")
    with pytest.raises(PartitionMismatch):
        connect(partitions=4).decide(USER, 40, "r2")


LONG = "x" * 129
BAD: list[tuple[str, Callable[[Any], Any]]] = [
    ("user_id", lambda billing: billing.decide("a b", 40, "r")),
    ("user_id", lambda billing: billing.decide(LONG, 40, "r")),
    ("user_id", lambda billing: billing.decide(0, 40, "r")),
    ("user_id", lambda billing: billing.decide("u1\n", 40, "r")),
    ("user_id", lambda billing: billing.decide("{u1}", 40, "r")),
    ("user_id", lambda billing: billing.confirm_partial("a#b", 40, "r", paid=1)),
    ("user_id", lambda billing: billing.settle_sponsored("", "r", 40)),
    ("user_id", lambda billing: billing.settle_sponsored(None, "r", 40)),
    ("user_id", lambda billing: billing.release_sponsored(None, "r", "")),
    ("user_id", lambda billing: billing.estimate(None, METER, 1)),
    ("user_id", lambda billing: billing.estimate("", METER, 1)),
    ("request_id", lambda billing: billing.decide(USER, 40, "")),
    ("request_id", lambda billing: billing.decide(None, 40, "a b")),
    ("request_id", lambda billing: billing.decide(USER, 0, LONG)),
    ("request_id", lambda billing: billing.confirm_partial(USER, 40, 7, paid=1)),
    ("request_id", lambda billing: billing.settle_sponsored(USER, "r\x00", 40)),
    ("request_id", lambda billing: billing.release_sponsored(USER, None, "")),
    ("request_id", lambda billing: billing.credit_pool("\u202er", 40)),
    *[
        ("estimate", lambda billing, bad=bad: billing.decide(USER, bad, "r"))
        for bad in (MAX_AMOUNT + 1, 1.5, "40", True, None, float("nan"), 10**5_000)
    ],
    ("estimate", lambda billing: billing.decide(None, "40", "r")),
    ("estimate", lambda billing: billing.confirm_partial(USER, 2**63, "r", paid=1)),
    *[
        ("paid", lambda billing, bad=bad: billing.confirm_partial(USER, 40, "r", paid=bad))
        for bad in (-1, MAX_AMOUNT + 1, 1.5, "1", False, None)
    ],
    ("paid", lambda billing: billing.settle_sponsored(USER, "r", 40, paid=-1)),
    ("paid", lambda billing: billing.settle_sponsored(USER, "r", 40, paid=True)),
    ("paid", lambda billing: billing.credit_pool("r", -1)),
    ("paid", lambda billing: billing.credit_pool("r", 10**13)),
    ("actual", lambda billing: billing.settle_sponsored(USER, "r", -1)),
    ("actual", lambda billing: billing.settle_sponsored(USER, "r", None)),
    ("ttl_seconds", lambda billing: billing.decide(USER, 40, "r", ttl_seconds=0)),
    ("ttl_seconds", lambda billing: billing.confirm_partial(USER, 40, "r", paid=1, ttl_seconds=86_401)),
    ("reason", lambda billing: billing.release_sponsored(USER, "r", "x" * 201)),
    ("reason", lambda billing: billing.release_sponsored(USER, "r", "two\nlines")),
    ("reason", lambda billing: billing.release_sponsored(USER, "r", "\ud800")),
    ("reason", lambda billing: billing.release_sponsored(USER, "r", None)),
    ("meter", lambda billing: billing.estimate(USER, "voice", 1)),
    ("meter", lambda billing: billing.estimate(USER, None, 1)),
    ("quantity", lambda billing: billing.estimate(USER, METER, -1)),
    ("quantity", lambda billing: billing.estimate(USER, METER, "1")),
    ("quantity", lambda billing: billing.estimate(USER, METER, MAX_AMOUNT, multiplier="1.5")),
    ("quantity", lambda billing: billing.estimate(USER, METER, MAX_AMOUNT, model_slug="m2")),
    ("multiplier", lambda billing: billing.estimate(USER, METER, 1, multiplier="1e3")),
    ("backend", lambda billing: billing.estimate(USER, METER, 1, backend="cloud")),
]


@pytest.mark.parametrize(("field", "call"), BAD, ids=[f"{number}-{field}" for number, (field, _) in enumerate(BAD)])
def test_bad_input_is_named_and_nothing_is_sent(
    redis_url: str, redis: Redis, field: str, call: Callable[[Any], Any]
) -> None:
    with Billing.connect(settings_for(NOWHERE, redis_url)) as billing:
        with pytest.raises(InvalidRequest) as caught:
            call(billing)
        assert caught.value.field == field
        assert str(caught.value).startswith(f"{field}: must be ")
    assert list(redis.scan_iter()) in ([], [keys.PARTITION_COUNT.encode()])


def test_the_largest_amounts_and_names(connect: Callable[..., Any], resources: Resources, redis: Redis) -> None:
    user, request = ("u" * 128), "-._:@|+=/" + "r" * 119
    billing = connect(Trust(**{user: "elite"}), sponsor_daily_units_elite=MAX_AMOUNT)
    redis.set(keys.SPONSORSHIP.pool, f"1 0\n{9 * 10**15}")
    assert billing.decide(user, MAX_AMOUNT, request).absorb == MAX_AMOUNT
    settled = billing.settle_sponsored(user, request, MAX_AMOUNT, paid=0)
    assert (settled.absorbed, settled.credited) == (MAX_AMOUNT, 0)
    (entry,) = entries(redis)
    assert (entry["request"], entry["absorbed"]) == (request, str(MAX_AMOUNT))
    assert map_of(redis, keys.SPONSORSHIP.promised)["total"] == MAX_AMOUNT
    assert billing.credit_pool(request[::-1], MAX_AMOUNT).credited == MAX_AMOUNT // 10


def test_all_keys_of_a_script_share_one_tag(blocking: Billing, monkeypatch: pytest.MonkeyPatch, redis: Redis) -> None:
    sent: list[Call] = []

    def noted(*parts: Any) -> Call:
        sent.append(Call(*parts))
        return sent[-1]

    monkeypatch.setattr(scripts, "Call", noted)
    blocking.decide(USER, 40, "r1")
    blocking.confirm_partial(USER, 40, "r2", paid=1)
    blocking.settle_sponsored(USER, "r1", 40)
    blocking.release_sponsored(USER, "r2", "")
    blocking.credit_pool("r3", 9)
    assert sent
    assert [name for request in sent for name in request.keys if not name.startswith("mf:{sponsor}:")] == []
    assert {request.script.name for request in sent if request.script.name.startswith("sponsor_")} == {
        "sponsor_decide", "sponsor_settle", "sponsor_release", "sponsor_credit",
    }  # fmt: skip
    found = {name for name in redis.scan_iter() if not name.startswith(b"mf:{sponsor}:")}
    assert found == {keys.PARTITION_COUNT.encode(), keys.BELL.encode()}


# ---------------------------------------------------------------------------------------------------------------------
# estimate


def test_an_estimate_says_who_would_pay(billing: Any) -> None:
    billing.reserve(USER, METER, 900, "k")
    answer = billing.estimate(USER, METER, 100, model_slug="m2")
    assert (answer.quantity, answer.multiplier, answer.amount) == (100, "1.5", 150)
    assert (answer.allowed, answer.allowed_with_pool) == (False, True)
    assert answer.check == billing.check(USER, METER, 150)
    assert answer.check.available == 100
    assert answer.expected == Parts(from_subscription=100, overflow_to_debt=50)
    assert answer.sponsorship == SponsorAdvice(
        user_id=USER, estimate=150, serve=Serve.FREE, absorb=150, charge=0, reason=SponsorReason.WITHIN_BUDGET,
        tier="trusted", daily_budget=200, absorbed_today=0, pool=10_000,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("quantity", "named", "amount"),
    [
        (10, {}, 10),
        (10, {"model_slug": "m3"}, 22),
        (10, {"model_slug": "unheard-of"}, 10),
        (10, {"multiplier": "0.19"}, 1),
        (10, {"multiplier": "0.09", "model_slug": "m2"}, 0),
        (0, {}, 0),
    ],
)
def test_an_estimate_costs_what_the_event_would(
    billing: Any, quantity: int, named: dict[str, str], amount: int
) -> None:
    answer = billing.estimate(USER, METER, quantity, **named)
    assert answer.amount == amount
    assert sum(answer.expected.model_dump().values()) == amount
    facts = {"model_slug": named["model_slug"]} if "model_slug" in named else None
    event = billing.emit(USER, METER, quantity, multiplier=named.get("multiplier"), dimensions=facts)
    assert event.amount == amount


@pytest.mark.parametrize(
    ("quantity", "charge", "allowed", "with_pool"),
    [(1_000, 800, True, True), (1_200, 1_000, False, True), (1_201, 1_001, False, False)],
)
def test_with_the_pool_only_the_rest_must_fit(
    billing: Any, quantity: int, charge: int, allowed: bool, with_pool: bool
) -> None:
    answer = billing.estimate(USER, METER, quantity)
    assert (answer.sponsorship.serve, answer.sponsorship.charge) == (Serve.PARTIAL, charge)
    assert (answer.allowed, answer.allowed_with_pool) == (allowed, with_pool)


def test_the_buckets_pay_in_their_order_after_what_is_pending(settings: Settings) -> None:
    give_account(settings, "u3", buckets={METER: (900, 50, 70)})
    with Billing.connect(settings) as client:
        client.emit("u3", METER, 120, event_id="e1")
        answer = client.estimate("u3", METER, 200)
        assert answer.expected == Parts(from_rollover=30, from_purchased=70, overflow_to_debt=100)
        assert answer.check.available == 100


def test_an_unlimited_meter_pays_all(settings: Settings) -> None:
    give_account(settings, "u3", "max_relay")
    with Billing.connect(settings) as client:
        answer = client.estimate("u3", "relay_credits", 10**9, backend="gemini")
        assert (answer.allowed, answer.allowed_with_pool) == (True, True)
        assert answer.expected == Parts(from_subscription=10**9)
        assert answer.sponsorship.reason is SponsorReason.NO_BUDGET


def test_a_cap_of_a_backend_denies_an_estimate(settings: Settings) -> None:
    give_account(settings, "u3", "core")
    with Billing.connect(settings, trust=Trust(u3="established")) as client:
        for quantity, with_pool in ((150, True), (151, False)):
            answer = client.estimate("u3", "relay_credits", quantity, backend="gemini")
            assert (answer.allowed, answer.check.reason) == (False, Reason.BACKEND_CAP_EXCEEDED)
            assert answer.allowed_with_pool is with_pool


@pytest.mark.parametrize(
    ("meter", "expected"),
    [("premium_voice", Parts(overflow_to_debt=40)), ("relay_credits", Parts(from_subscription=40))],
)
def test_a_meter_that_is_not_in_the_plan(
    billing: Any, settings: Settings, resources: Resources, meter: str, expected: Parts
) -> None:
    answer = billing.estimate(USER, meter, 40)
    assert (answer.check.reason, answer.allowed) == (Reason.METER_NOT_IN_PLAN, False)
    assert answer.expected == expected
    billing.emit(USER, meter, 40)
    drain_all(resources)
    assert rows(settings, "SELECT from_subscription, overflow_to_debt FROM usage_log") == [
        (expected.from_subscription, expected.overflow_to_debt)
    ]


def test_nobody_pays_for_a_stranger(billing: Any) -> None:
    answer = billing.estimate(STRANGER, METER, 40)
    assert (answer.check.reason, answer.allowed, answer.allowed_with_pool) == (Reason.UNKNOWN_ACCOUNT, False, False)
    assert answer.expected == Parts(uncollected=40)
    assert (answer.sponsorship.tier, answer.sponsorship.charge) == ("new", 40)


def test_an_estimate_without_billing_looks_at_no_balance(connect: Callable[..., Any]) -> None:
    answer = connect(billing_enabled=False).estimate(USER, METER, 5_000)
    assert (answer.check.reason, answer.allowed, answer.expected) == (Reason.BILLING_DISABLED, True, None)


@pytest.mark.parametrize("known", [True, False], ids=["cached", "not cached"])
def test_an_estimate_changes_nothing(billing: Any, redis: Redis, settings: Settings, known: bool) -> None:
    billing.reserve(USER, METER, 10, "k")
    billing.charge(USER, METER, 5, "c")
    billing.decide(USER, 60, "r1")
    billing.decide(USER, 70, "r2")
    billing.settle_sponsored(USER, "r1", 50)
    partition = partition_of(settings, USER)
    caches = {keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing(USER), partition.account(USER).balance}
    if not known:
        redis.delete(*caches)
    before = dump(redis)
    ledger = [rows(settings, f"SELECT * FROM {table}") for table in ("account", "balance", "sponsor_pool")]
    for quantity in (1, 40, 80, 5_000, 0):
        billing.estimate(USER, METER, quantity)
    after = dump(redis)
    assert {name for name in after if name not in before} == (set() if known else {name.encode() for name in caches})
    assert {name: after[name] for name in before} == before
    assert [rows(settings, f"SELECT * FROM {table}") for table in ("account", "balance", "sponsor_pool")] == ledger
    assert pending_of(redis, settings, USER, METER) == {"h:k": 10, "e:c": 5, "total": 15}
