"""Fakes answer as the real clients do: the same tests on both, blocking and with asyncio."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from random import Random
from typing import Any

import pytest

from schemas.answers import HoldState, Parts, Reason, Serve, SponsorReason
from tests.testing.subjects import Fake, Real, Subject
from worker.demo.servers import Server
from worker.errors import (
    AccountError,
    BillingError,
    EventConflict,
    HoldClosed,
    HoldConflict,
    InvalidRequest,
    RedisUnavailable,
    UsageDenied,
    UsageLimitExceeded,
)

USER, METER = "u1", "credits"
DAY = 86_400


def left(subject: Subject) -> tuple[int | None, int]:
    """Available and pending units of the user."""
    answer = subject.billing.check(USER, METER)
    return answer.available, answer.pending


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def test_a_check_answers_what_it_knows(subject: Subject) -> None:
    subject.billing.reserve(USER, METER, 300, "k")
    answer = subject.billing.check(USER, METER, 700)
    assert (answer.allowed, answer.reason, answer.available, answer.pending) == (True, Reason.WITHIN_LIMIT, 700, 300)
    assert (answer.limit, answer.used, answer.rollover, answer.purchased, answer.kind) == (1000, 0, 0, 0, "monthly")
    denied = subject.billing.check(USER, METER, 701)
    assert (denied.allowed, denied.reason) == (False, Reason.LIMIT_EXCEEDED)


@pytest.mark.parametrize(
    ("plan", "meter", "status", "buckets", "units", "reason"),
    [
        ("tenant", METER, "active", (400, 30, 5), 635, Reason.WITHIN_LIMIT),
        ("tenant", METER, "canceled", (400, 30, 5), 35, Reason.WITHIN_LIMIT),
        ("tenant", METER, "expired", (400, 0, 0), 0, Reason.LIMIT_EXCEEDED),
        ("tenant", METER, "past_due", (1200, -30, 50), 20, Reason.WITHIN_LIMIT),
        ("tenant", METER, "trialing", (1000, -30, 5), 0, Reason.LIMIT_EXCEEDED),
        ("max_relay", "relay_credits", "active", (400, 0, 0), None, Reason.UNLIMITED),
        ("max_relay", "relay_credits", "unpaid", (400, 0, 0), 0, Reason.LIMIT_EXCEEDED),
        ("tenant", "premium_voice", "active", None, 0, Reason.METER_NOT_IN_PLAN),
    ],
)
def test_what_is_available(
    make_subject: Callable[..., Subject],
    plan: str,
    meter: str,
    status: str,
    buckets: tuple[int, int, int] | None,
    units: int | None,
    reason: Reason,
) -> None:
    subject = make_subject()
    subject.open(USER, plan, status, {meter: buckets} if buckets else None)
    answer = subject.billing.check(USER, meter, 1)
    assert (answer.available, answer.reason) == (units, reason)


def test_a_change_of_status_counts_at_once(subject: Subject) -> None:
    assert left(subject) == (1000, 0)
    subject.set_status(USER, "paused")
    assert left(subject) == (0, 0)
    subject.set_status(USER, "active")
    assert left(subject) == (1000, 0)


def test_unknown_names(subject: Subject) -> None:
    assert subject.billing.check("nobody", METER, 1).reason is Reason.UNKNOWN_ACCOUNT
    with pytest.raises(UsageDenied):
        subject.billing.reserve("nobody", METER, 1, "k")
    with pytest.raises(InvalidRequest, match="meter: must be one of credits, ocr_tokens"):
        subject.billing.emit(USER, "minutes", 1)
    with pytest.raises(InvalidRequest, match=r"tier: must be one of|tier: must be a plan with"):
        subject.billing.remaining(USER, "relay_credits", tier="gold")
    for wrong in ({"amount": -1}, {"amount": 1, "backend": "nowhere"}):
        with pytest.raises(InvalidRequest):
            subject.billing.check(USER, METER, **wrong)


def test_a_request_may_carry_its_tier(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    assert subject.billing.remaining(USER, "relay_credits", tier="core").remaining == 500
    assert subject.billing.remaining(USER, "relay_credits", tier="pro").remaining == 5_000
    assert subject.billing.check(USER, "relay_credits", 1_001, backend="gemini").reason is Reason.BACKEND_CAP_EXCEEDED
    assert subject.billing.plan_backend(USER, "gemini_first", has_hardware=True).backend == "gemini"


def test_limits_bound_checks_and_count_what_was_applied(subject: Subject) -> None:
    subject.billing.charge(USER, METER, 100, "c1")
    subject.apply()
    subject.set_limit(USER, METER, "month", 300)
    assert left(subject) == (200, 0)
    subject.billing.reserve(USER, METER, 150, "k")
    denied = subject.billing.check(USER, METER, 51)
    assert (denied.reason, denied.available) == (Reason.SPENDING_LIMIT_REACHED, 50)
    assert (denied.limited_by.per, denied.limited_by.set_by, denied.limited_by.used) == ("month", "operator", 100)
    with pytest.raises(UsageLimitExceeded, match="limit of the operator 300 per month"):
        subject.billing.charge(USER, METER, 51, "c2")
    subject.advance(32 * DAY)
    subject.billing.emit(USER, METER, 20, event_id="e1")  # opens the next window
    subject.apply()
    assert left(subject) == (280, 0)
    subject.set_limit(USER, METER, "month", None)
    assert left(subject)[0] == 980


def test_one_wallet_pays_for_several_meters(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    subject.open(USER, "studio")
    subject.billing.reserve(USER, "premium_voice", 1_000, "k")
    assert subject.billing.charge(USER, "server_kokoro", 500, "c").expected == Parts(from_subscription=500)
    answer = subject.billing.check(USER, "premium_voice", 2_167)
    assert (answer.allowed, answer.available, answer.cost, answer.pending) == (False, 2_166, 6_501, 3_500)
    assert (answer.wallet, answer.price, answer.limit) == ("credits", "3", 10_000)
    subject.billing.settle(USER, "premium_voice", "k", 999)
    subject.apply()
    subject.billing.emit(USER, "ocr_tokens", 499, event_id="e")
    subject.apply()
    assert subject.billing.remaining(USER, "credits").remaining == 10_000 - 500 - 2_997
    assert subject.billing.check(USER, "ocr_tokens", 1).cost == 1, "0.998 are carried"


@pytest.mark.parametrize("plan", ["studio", "basic"])
def test_a_meter_that_draws_on_a_wallet_takes_no_grant(make_subject: Callable[..., Subject], plan: str) -> None:
    """Whether or not it had units of its own in another plan."""
    subject = make_subject()
    subject.open(USER, plan)
    if plan != "studio":
        subject.change_plan(USER, "studio")
    with pytest.raises(AccountError, match=r"premium_voice draws on the wallet credits.*; grant credits instead"):
        subject.grant(USER, "premium_voice", 500)
    subject.grant(USER, "credits", 500)
    assert subject.billing.check(USER, "premium_voice", 1).available == 10_500 // 3


# ---------------------------------------------------------------------------------------------------------------------
# Holds


def test_a_hold_becomes_an_event_and_then_a_debit(subject: Subject) -> None:
    with subject.billing.reserve(USER, METER, 250, "k") as hold:
        assert (hold.answer.state, hold.answer.left) == (HoldState.HELD, 250)
        assert left(subject) == (750, 250)
        answer = hold.settle(180, source="tts", dimensions={"page_idx": 3})
    assert (answer.event_id, answer.amount, answer.hold, answer.repeated) == ("k", 180, HoldState.HELD, False)
    assert left(subject) == (820, 180)
    subject.apply()
    assert left(subject) == (820, 0)
    assert subject.buckets(USER, METER) == (180, 0, 0)
    assert subject.recorded() == [(USER, "k", 180, "1")]


def test_a_block_that_raises_gives_its_hold_back(subject: Subject) -> None:
    with pytest.raises(ZeroDivisionError), subject.billing.reserve(USER, METER, 250, "k"):
        _ = 1 // 0
    assert left(subject) == (1000, 0)
    with pytest.raises(HoldClosed) as caught:
        subject.billing.reserve(USER, METER, 250, "k")
    assert caught.value.state is HoldState.RELEASED


def test_keys_hold_once(subject: Subject) -> None:
    first = subject.billing.reserve(USER, METER, 900, "k").answer
    assert subject.billing.reserve(USER, METER, 900, "k").answer == first
    with pytest.raises(HoldConflict) as caught:
        subject.billing.reserve(USER, METER, 901, "k")
    assert (caught.value.key, caught.value.amount) == ("k", 900)
    with pytest.raises(UsageLimitExceeded) as denied:
        subject.billing.reserve(USER, METER, 101, "other")
    assert (denied.value.available, denied.value.requested) == (100, 101)


def test_parts_of_a_hold(subject: Subject) -> None:
    hold = subject.billing.reserve(USER, METER, 100, "doc")
    assert hold.capture("page-1", 30).hold is HoldState.HELD
    assert hold.capture("page-1", 30).repeated
    with pytest.raises(EventConflict):
        hold.capture("page-1", 31)
    hold.capture("page-2", 90)
    assert left(subject) == (880, 120)
    assert hold.settle(5).hold is HoldState.HELD
    assert subject.billing.settle(USER, METER, "doc", 5).repeated
    assert subject.billing.release(USER, METER, "doc").state is HoldState.SETTLED
    subject.apply()
    assert subject.recorded() == [(USER, "doc", 5, "1"), (USER, "page-1", 30, "1"), (USER, "page-2", 90, "1")]
    assert left(subject) == (875, 0)


def test_a_hold_grows_and_lives_on(subject: Subject) -> None:
    hold = subject.billing.reserve(USER, METER, 100, "k", ttl_seconds=60)
    before = hold.answer.expires_at
    assert hold.extend(amount=400).left == 400
    with pytest.raises(UsageLimitExceeded):
        hold.extend(amount=1_001)
    assert hold.extend(ttl_seconds=3_600).expires_at > before
    subject.advance(1_800)
    assert left(subject) == (600, 400)
    assert hold.extend(amount=50).amount == 50
    assert hold.release().left == 0
    with pytest.raises(HoldClosed):
        hold.extend(ttl_seconds=5)


def test_a_hold_expires_and_its_work_still_counts(subject: Subject) -> None:
    hold = subject.billing.reserve(USER, METER, 400, "k", ttl_seconds=60)
    subject.advance(59)
    assert left(subject) == (600, 400)
    subject.advance(2)
    assert left(subject) == (1000, 0)
    with pytest.raises(HoldClosed) as caught:
        subject.billing.reserve(USER, METER, 400, "k")
    assert caught.value.state is HoldState.EXPIRED
    assert hold.settle(70).hold is HoldState.EXPIRED
    subject.apply()
    assert subject.buckets(USER, METER) == (70, 0, 0)


def test_outcomes_are_remembered_for_a_while(subject: Subject) -> None:
    subject.billing.release(USER, METER, "k")
    subject.advance(899)
    with pytest.raises(HoldClosed):
        subject.billing.reserve(USER, METER, 1, "k")
    subject.advance(2)
    assert subject.billing.reserve(USER, METER, 1, "k").answer.left == 1


def test_a_settle_after_a_release_and_without_a_hold(subject: Subject) -> None:
    hold = subject.billing.reserve(USER, METER, 100, "k")
    hold.release()
    assert hold.settle(70).hold is HoldState.RELEASED
    assert subject.billing.settle(USER, METER, "unheard", 5).hold is HoldState.UNKNOWN
    subject.apply()
    assert left(subject) == (925, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Charges and events


def test_a_charge_asks_and_records(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    subject.open(USER, buckets={METER: (900, 30, 500)})
    answer = subject.billing.charge(USER, METER, 150, "c1")
    assert answer.expected == Parts(from_subscription=100, from_rollover=30, from_purchased=20)
    assert subject.billing.charge(USER, METER, 150, "c1").repeated
    with pytest.raises(EventConflict):
        subject.billing.charge(USER, METER, 151, "c1")
    with pytest.raises(UsageLimitExceeded):
        subject.billing.charge(USER, METER, 481, "c2")
    subject.apply()
    assert subject.parts(USER, "c1") == answer.expected
    assert subject.buckets(USER, METER) == (1000, 0, 480)


def test_what_nobody_can_pay_becomes_debt(subject: Subject) -> None:
    subject.billing.emit(USER, METER, 1_200, event_id="e1")
    assert left(subject) == (0, 1200)
    subject.apply()
    assert subject.parts(USER, "e1") == Parts(from_subscription=1000, overflow_to_debt=200)
    assert subject.buckets(USER, METER) == (1000, -200, 0)
    assert left(subject) == (0, 0)
    subject.advance(32 * DAY)
    subject.billing.emit(USER, METER, 1, event_id="e2")
    subject.apply()
    assert subject.buckets(USER, METER)[1] <= 0


def test_an_event_counts_once_and_keeps_its_first_form(subject: Subject) -> None:
    for quantity in (30, 30, 31):
        subject.billing.emit(USER, METER, quantity, event_id="e1")
    subject.apply()
    subject.billing.emit(USER, METER, 30, event_id="e1")
    subject.apply()
    assert subject.recorded() == [(USER, "e1", 30, "1")]
    assert subject.refused() == ["id_conflict"]
    assert left(subject) == (970, 0)


def test_events_of_strangers_are_uncollected(subject: Subject) -> None:
    subject.billing.emit("nobody", METER, 30, event_id="e1")
    subject.apply()
    assert subject.parts("nobody", "e1") == Parts(uncollected=30)


def test_a_default_plan_opens_accounts(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(default_plan="tenant")
    assert left(subject) == (1000, 0)
    subject.billing.emit(USER, METER, 30, event_id="e1")
    subject.apply()
    assert subject.buckets(USER, METER) == (30, 0, 0)


def test_a_quantity_is_multiplied(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    subject.open(USER, "basic")
    voice = "premium_voice"
    hold = subject.billing.reserve(USER, voice, quantity=1_001, model_slug="m2", key="k")
    assert (hold.answer.amount, hold.answer.multiplier) == (1_502, "1.5")
    assert hold.settle(quantity=101).amount == 151
    assert subject.billing.charge(USER, voice, quantity=10, multiplier="2.25", event_id="c").amount == 22
    with pytest.raises(InvalidRequest):
        subject.billing.charge(USER, voice, 10, event_id="d", model_slug="m2")
    subject.billing.emit(USER, voice, 10, event_id="e", dimensions={"model_slug": "m2-turbo"})
    subject.apply()
    assert subject.recorded() == [(USER, "c", 10, "2.25"), (USER, "e", 10, "0.75"), (USER, "k", 101, "1.5")]
    assert subject.buckets(USER, voice)[0] == 181  # 151.5 + 22.5 + 7.5 = 181.5


def test_an_estimate_changes_nothing(subject: Subject) -> None:
    found = subject.billing.estimate(USER, METER, 1_100)
    assert (found.amount, found.check.allowed) == (1_100, False)
    assert left(subject) == (1000, 0)


def test_a_period_ends(subject: Subject) -> None:
    subject.billing.emit(USER, METER, 400, event_id="e1")
    subject.apply()
    subject.advance(32 * DAY)
    assert left(subject) == (1000, 0)
    subject.billing.emit(USER, METER, 5, event_id="e2")
    subject.apply()
    assert subject.buckets(USER, METER) == (5, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Outages


@pytest.mark.parametrize(
    ("policy", "amount", "reason"),
    [
        ("deny", 1, Reason.REDIS_DOWN_DENIED),
        ("ledger", 1000, Reason.WITHIN_LIMIT),
        ("ledger", 1001, Reason.LIMIT_EXCEEDED),
        ("allow", 10_000, Reason.REDIS_DOWN_ALLOWED),
        ("allow", 10_001, Reason.REDIS_DOWN_BOUND_REACHED),
    ],
)
def test_checks_without_redis(make_subject: Callable[..., Subject], policy: str, amount: int, reason: Reason) -> None:
    subject = make_subject(redis_down=policy)
    subject.open(USER)
    assert left(subject) == (1000, 0)
    with subject.redis_down():
        answer = subject.billing.check(USER, METER, amount)
        assert answer.reason is reason
        with pytest.raises((UsageDenied, RedisUnavailable)):
            subject.billing.charge(USER, METER, amount, "c1")
        with pytest.raises(RedisUnavailable) as caught:
            subject.billing.emit(USER, METER, 7, event_id="e1")
    assert [event.event_id for event in caught.value.events] == ["e1"]
    assert left(subject) == (1000, 0)
    subject.billing.emit_events(caught.value.events)
    subject.apply()
    assert subject.recorded() == [(USER, "e1", 7, "1")]


def test_holds_of_the_ledger_join_redis(subject: Subject) -> None:
    assert left(subject) == (1000, 0)
    with subject.redis_down():
        subject.billing.reserve(USER, METER, 600, "k")
        subject.billing.reserve(USER, METER, 600, "k")
        with pytest.raises(HoldConflict):
            subject.billing.reserve(USER, METER, 599, "k")
        with pytest.raises(UsageLimitExceeded):
            subject.billing.reserve(USER, METER, 401, "other")
    subject.advance(61)  # the balance is cached no more
    assert left(subject) == (400, 600)
    assert subject.billing.settle(USER, METER, "k", 500).hold is HoldState.HELD
    subject.apply()
    assert left(subject) == (500, 0)


def test_a_hold_of_the_ledger_ends_with_its_event(subject: Subject) -> None:
    assert left(subject) == (1000, 0)
    with subject.redis_down():
        subject.billing.reserve(USER, METER, 600, "k")
    subject.billing.settle(USER, METER, "k", 500)
    subject.apply()
    with subject.redis_down():
        assert left(subject) == (500, 0)


def test_redis_lost_in_a_block_keeps_the_hold(subject: Subject) -> None:
    with (
        pytest.raises(RedisUnavailable) as caught,
        subject.billing.reserve(USER, METER, 300, "k") as hold,
        subject.redis_down(),
    ):
        hold.settle(200)
    assert left(subject) == (700, 300)
    subject.billing.emit_events(caught.value.events)
    subject.apply()
    assert left(subject) == (800, 0)


def test_billing_that_is_switched_off(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(billing_enabled=False)
    subject.open(USER)
    assert subject.billing.check(USER, METER, 10**6).reason is Reason.BILLING_DISABLED
    subject.billing.charge(USER, METER, 30, "c1")
    subject.apply()
    assert subject.recorded() == [(USER, "c1", 30, "1")]


# ---------------------------------------------------------------------------------------------------------------------
# The sponsorship pool


def test_the_pool_covers_and_is_paid_back(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(sponsor_daily_units_new=50)
    subject.open(USER)
    billing = subject.billing
    free = billing.decide(USER, 40, "r1")
    assert (free.serve, free.absorb, free.pool) == (Serve.FREE, 40, 10_000)
    assert billing.decide(USER, 40, "r1").repeated
    assert billing.decide(USER, 20, "r2").serve is Serve.PARTIAL
    assert billing.decide(None, 20, "r3").reason is SponsorReason.NO_IDENTITY
    assert billing.confirm_partial(USER, 20, "r2", paid=10).absorb == 10
    assert billing.settle_sponsored(USER, "r1", 30).absorbed == 30
    assert billing.settle_sponsored(USER, "r1", 30).repeated
    billing.release_sponsored(USER, "r2", "not needed")
    billing.credit_pool("r9", 400)
    subject.apply()
    after = billing.decide(USER, 20, "r4")
    assert (after.serve, after.absorb, after.pool) == (Serve.FREE, 20, 10_000 - 30 + 40)


# ---------------------------------------------------------------------------------------------------------------------
# Whatever is called


def outcome(subject: Subject, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> object:
    """What a call answers or raises, without moments."""
    try:
        answer = getattr(subject.billing, name)(*args, **named)
    except BillingError as error:
        return type(error).__name__, str(error)
    answer = getattr(answer, "answer", answer)
    return answer.model_dump(exclude={"expires_at"})


def drawn(random: Random) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Some call: a method with its arguments. Few keys and users, so that calls meet."""
    user, meter = random.choice(["u1", "u2", "nobody"]), random.choice(["credits", "credits", "relay_credits"])
    key, event = f"k{random.randrange(6)}", f"e{random.randrange(12)}"
    amount = random.choice([0, 1, 40, 130, 400])
    backend = random.choice([None, None, "gemini"]) if meter == "relay_credits" else None
    at = {} if backend is None else {"backend": backend}
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("check", (user, meter, amount), at),
        ("remaining", (user, meter), {}),
        ("reserve", (user, meter, amount, key), {**at, "ttl_seconds": random.choice([60, 600])}),
        ("extend", (user, meter, key), {"amount": amount + 10}),
        ("extend", (user, meter, key), {"ttl_seconds": 120}),
        ("capture", (user, meter, key, event, amount), at),
        ("settle", (user, meter, key, amount), at),
        ("release", (user, meter, key), {}),
        ("charge", (user, meter, amount, event), at),
        ("emit", (user, meter, amount), {"event_id": event, "hold_key": random.choice([None, key])}),
        ("estimate", (user, meter, amount), at),
        ("decide", (user, amount, key), {}),
        ("settle_sponsored", (user, key, amount), {}),
        ("release_sponsored", (user, key, "why not"), {}),
        ("credit_pool", (event, amount), {}),
    ]
    return random.choice(calls)


@pytest.mark.parametrize("seed", range(4))
def test_any_calls_get_the_same_answers(seed: int, emptied_database_url: str, own_redis: Server) -> None:
    settings: dict[str, Any] = {"sponsor_daily_units_new": 300}
    fake, real = Fake("blocking", settings), Real("blocking", emptied_database_url, own_redis, settings)
    random = Random(seed)
    both: tuple[Subject, Subject] = fake, real
    with closing(fake), closing(real):
        for subject in both:
            subject.open("u1", buckets={"credits": (100, 50, 300)})
            subject.open("u2", "core")
        for number in range(250):
            name, args, named = drawn(random)
            found = [outcome(subject, name, args, named) for subject in both]
            assert found[0] == found[1], f"call {number}: {name}{args} {named}"
            apply, seconds = random.random() < 0.15, random.choice([0] * 72 + [30, 90, 1_000])
            for subject in both:
                if apply:
                    subject.apply()
                if seconds:
                    subject.advance(seconds)
        for subject in both:
            subject.apply()
        assert fake.recorded() == real.recorded()
        assert sorted(fake.refused()) == sorted(real.refused())
        for user, meter in (("u1", "credits"), ("u2", "relay_credits")):
            assert fake.buckets(user, meter) == real.buckets(user, meter)
