"""Quantities, amounts and multipliers on real servers, with both clients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.answers import HoldState
from schemas.events import MAX_AMOUNT, UsageEvent
from tests.client.clients import open_client
from tests.support.ledger import give_account, rows
from tests.support.resources import settings_for
from tests.support.streams import account_of, drain, pending_of, stream_of
from worker.client import Billing
from worker.client.models import OTHERS, UnknownModels
from worker.errors import HoldConflict, InvalidRequest, RedisUnavailable, UsageLimitExceeded

USER, METER = "u1", "credits"


@pytest.fixture(params=["blocking", "asyncio"])
def billing(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Any]:
    """Either client; the user has 1,000 credits."""
    give_account(settings, USER)
    with closing(open_client(request.param, settings)) as client:
        yield client


@pytest.fixture
def sent(redis: Redis, settings: Settings) -> Callable[[], list[UsageEvent]]:
    """The events in the user's stream."""
    return lambda: [UsageEvent.model_validate_json(each[b"e"]) for each in stream_of(redis, settings, USER)]


Sent = Callable[[], list[UsageEvent]]


def test_every_call_prices_a_quantity_as_emit_does(billing: Any, sent: Sent, redis: Redis, settings: Settings) -> None:
    named = {"model_slug": "m2"}
    billing.emit(USER, METER, 7, event_id="emitted", dimensions=named)
    hold = billing.reserve(USER, METER, quantity=7, model_slug="m2", key="k")
    assert (hold.answer.amount, hold.answer.left, hold.answer.multiplier) == (11, 11, "1.5")
    answers = [
        hold.capture("by-slug", quantity=7, model_slug="m2"),
        hold.capture("by-dimension", quantity=7, dimensions=named),
        billing.capture(USER, METER, "k", "by-key", quantity=7, model_slug="m2", dimensions=named),
        billing.charge(USER, METER, quantity=7, event_id="charged", model_slug="m2"),
        hold.settle(quantity=7, model_slug="m2"),
        billing.settle(USER, METER, "other", quantity=7, dimensions=named),
    ]
    assert {answer.amount for answer in answers} == {10}
    emitted, *others = sent()
    wanted = (emitted.quantity, emitted.multiplier, emitted.dimensions)
    assert [(event.quantity, event.multiplier, event.dimensions) for event in others] == [wanted] * 6
    # The same fingerprint: an event that was captured may be sent by emit once more.
    billing.emit(USER, METER, 7, event_id="by-slug", dimensions=named)
    drain(settings, USER)
    assert rows(settings, "SELECT count(*), sum(amount) FROM usage_log") == [(7, 73)]
    assert rows(settings, "SELECT count(*) FROM dead_letter") == [(0,)]
    assert pending_of(redis, settings, USER, METER) == {}


def test_a_hold_prices_by_the_multiplier_it_was_reserved_with(billing: Any, sent: Sent) -> None:
    hold = billing.reserve(USER, METER, quantity=100, model_slug="m3", key="k")
    assert hold.answer.amount == 225
    assert hold.capture("page-1", quantity=10).amount == 22
    assert hold.settle(quantity=50).amount == 112
    assert [(event.quantity, event.multiplier, event.dimensions) for event in sent()] == [
        (10, "2.25", None), (50, "2.25", None),
    ]  # fmt: skip
    by_multiplier = billing.reserve(USER, METER, quantity=10, multiplier="1.50", key="k2")
    assert (by_multiplier.answer.amount, by_multiplier.answer.multiplier) == (15, "1.5")
    assert by_multiplier.settle(quantity=20, model_slug="m2-turbo").amount == 15


def test_another_process_finds_the_multiplier_at_the_hold(billing: Any, settings: Settings, redis: Redis) -> None:
    first = billing.reserve(USER, METER, quantity=10, model_slug="m2", key="k").answer
    with Billing.connect(settings) as other:
        assert other.reserve(USER, METER, quantity=10, model_slug="m2", key="k").answer == first
        assert other.reserve(USER, METER, 15, "k").answer == first
        assert other.extend(USER, METER, "k").multiplier == "1.5"
        with pytest.raises(HoldConflict, match=r"already holds 15 of credits, at the multiplier 1.5") as caught:
            other.reserve(USER, METER, quantity=15, multiplier="1", key="k")
        assert caught.value.multiplier == "1.5"
        with pytest.raises(InvalidRequest, match="multiplier: must be given, or model_slug"):
            other.settle(USER, METER, "k", quantity=10)
        assert other.settle(USER, METER, "k", quantity=10, model_slug="m2").amount == 15
    assert redis.hget(account_of(settings, USER).hold("k"), "multiplier") == b"1.5"


def test_a_hold_of_an_older_release_works_on(billing: Any, redis: Redis, settings: Settings) -> None:
    billing.reserve(USER, METER, 15, "k")
    assert redis.hget(account_of(settings, USER).hold("k"), "multiplier") is None
    hold = billing.reserve(USER, METER, quantity=10, model_slug="m2", key="k")
    assert (hold.answer.amount, hold.answer.multiplier) == (15, "1.5")
    assert billing.reserve(USER, METER, 15, "k").answer.multiplier is None
    assert billing.extend(USER, METER, "k").multiplier is None
    assert hold.settle(quantity=8).amount == 12


def test_an_amount_beside_a_model_that_multiplies_is_refused(billing: Any, sent: Sent, redis: Redis) -> None:
    hold = billing.reserve(USER, METER, 300, "k")
    before, m2 = set(redis.keys()), {"model_slug": "m2"}
    attempts: list[Callable[[], Any]] = [
        lambda: hold.settle(180, dimensions=m2),
        lambda: hold.settle(180, model_slug="m2"),
        lambda: hold.capture("page-1", 180, dimensions=m2),
        lambda: billing.settle(USER, METER, "k", 180, dimensions=m2),
        lambda: billing.capture(USER, METER, "k", "page-1", 180, dimensions=m2),
        lambda: billing.charge(USER, METER, 180, "c", dimensions=m2),
        lambda: billing.reserve(USER, METER, 180, "k2", model_slug="m2"),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidRequest, match=r'as model m2 has the multiplier 1.5; or with multiplier="1"'):
            attempt()
    assert sent() == []
    assert set(redis.keys()) == before
    assert hold.capture("page-1", 180, multiplier="1", dimensions=m2).amount == 180
    assert billing.charge(USER, METER, 180, "c", multiplier="1", dimensions=m2).amount == 180
    assert hold.settle(180, dimensions={"model_slug": "m1"}).amount == 180


def test_an_amount_is_refused_where_the_hold_multiplies(billing: Any, sent: Sent) -> None:
    hold = billing.reserve(USER, METER, quantity=100, model_slug="m2", key="k")
    with pytest.raises(
        InvalidRequest, match=r"actual: must be passed as quantity= .* as this hold has the multiplier 1.5"
    ):
        hold.settle(100)
    with pytest.raises(InvalidRequest, match="amount: must be passed as quantity="):
        hold.capture("page-1", 100)
    assert sent() == []
    assert hold.settle(100, multiplier="1").amount == 100


@pytest.mark.parametrize("known", ["amount", "quantity"])
def test_one_of_both_is_needed(billing: Any, known: str) -> None:
    both = {"amount": 1, "quantity": 1}
    calls: list[Callable[..., Any]] = [
        lambda **named: billing.reserve(USER, METER, key="k", **named),
        lambda **named: billing.capture(USER, METER, "k", "e", **named),
        lambda **named: billing.charge(USER, METER, event_id="e", **named),
    ]
    for arguments, field in ((both, "quantity"), ({}, "amount")):
        for call in calls:
            with pytest.raises(InvalidRequest) as caught:
                call(**arguments)
            assert caught.value.field == field
            assert "amount" in str(caught.value)
            assert "quantity" in str(caught.value)
    with pytest.raises(InvalidRequest, match="actual: must be given, or quantity"):
        billing.settle(USER, METER, "k")
    assert billing.charge(USER, METER, event_id="e", **{known: 1}).amount == 1


def test_one_model_is_named(billing: Any, sent: Sent) -> None:
    calls: list[Callable[..., Any]] = [
        lambda **named: billing.settle(USER, METER, "k", quantity=1, **named),
        lambda **named: billing.capture(USER, METER, "k", "e", quantity=1, **named),
        lambda **named: billing.charge(USER, METER, quantity=1, event_id="e", **named),
    ]
    for call in calls:
        with pytest.raises(
            InvalidRequest, match=r"dimensions.model_slug: must be m2, as `model_slug` says \(got 'm3'\)"
        ):
            call(model_slug="m2", dimensions={"model_slug": "m3"})
    with pytest.raises(InvalidRequest, match="model_slug: must be text"):
        billing.charge(USER, METER, quantity=1, event_id="e", model_slug=3)
    assert sent() == []


def test_a_quantity_is_checked_after_its_multiplier(billing: Any) -> None:
    with pytest.raises(UsageLimitExceeded) as caught:
        billing.reserve(USER, METER, quantity=668, model_slug="m2", key="k")
    assert caught.value.requested == 1_002
    assert billing.reserve(USER, METER, quantity=666, model_slug="m2", key="k").answer.amount == 999
    with pytest.raises(UsageLimitExceeded):
        billing.charge(USER, METER, quantity=2, event_id="c", model_slug="m2")
    with pytest.raises(InvalidRequest, match=f"at most {MAX_AMOUNT} after the multiplier 1.5"):
        billing.reserve(USER, METER, quantity=MAX_AMOUNT, model_slug="m2", key="k2")


def test_a_repeat_of_a_quantity_gets_the_first_answer(billing: Any, sent: Sent) -> None:
    hold = billing.reserve(USER, METER, quantity=100, model_slug="m2", key="k")
    assert not hold.capture("page-1", quantity=10).repeated
    assert hold.capture("page-1", quantity=10).repeated
    first = hold.settle(quantity=50)
    assert hold.settle(quantity=50) == first.model_copy(update={"repeated": True})
    assert len(sent()) == 2


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_an_event_that_redis_does_not_confirm_keeps_its_price(
    settings: Settings, redis: Redis, kind: str, tmp_path: Path
) -> None:
    give_account(settings, USER)
    nowhere = {"redis_url": "unix:///nowhere/redis.sock", "redis_retries": 0}
    with closing(open_client(kind, settings.model_copy(update=nowhere))) as away:
        calls: list[Callable[[], Any]] = [
            lambda: away.settle(USER, METER, "k", quantity=7, model_slug="m2"),
            lambda: away.capture(USER, METER, "k", "page-1", quantity=7, model_slug="m2"),
            lambda: away.charge(USER, METER, quantity=7, event_id="c", model_slug="m2"),
        ]
        for call in calls:
            with pytest.raises(RedisUnavailable) as caught:
                call()
            (event,) = caught.value.events
            assert (event.quantity, event.multiplier, event.dimensions) == (7, "1.5", {"model_slug": "m2"})
    spooling = {"spool_path": tmp_path}
    with closing(open_client(kind, settings.model_copy(update=nowhere | spooling))) as away:
        answer = away.capture(USER, METER, "k", "page-1", quantity=7, model_slug="m2")
        assert (answer.amount, answer.spooled) == (10, True)
    with closing(open_client(kind, settings.model_copy(update=spooling))) as back:
        back.send_spooled()
    assert pending_of(redis, settings, USER, METER) == {"e:page-1": 11, "total": 11}


# ---------------------------------------------------------------------------------------------------------------------
# Models that the catalogue does not know


def lookups(client: Any) -> list[Callable[[str], Any]]:
    """Every call that looks a model's multiplier up."""
    return [
        lambda model: client.emit(USER, METER, 1, dimensions={"model_slug": model}),
        lambda model: client.emit_events(
            [UsageEvent(event_id="e", user_id=USER, meter=METER, quantity=1, dimensions={"model_slug": model})]
        ),
        lambda model: client.estimate(USER, METER, 1, model_slug=model),
        lambda model: client.reserve(USER, METER, quantity=1, model_slug=model, key=f"hold-{model}"),
        lambda model: client.capture(USER, METER, "k", "page-1", quantity=1, model_slug=model),
        lambda model: client.settle(USER, METER, "k", quantity=1, model_slug=model),
        lambda model: client.charge(USER, METER, quantity=1, event_id="c", model_slug=model),
        lambda model: client.settle(USER, METER, "k2", 1, dimensions={"model_slug": model}),
    ]


def test_an_unknown_model_counts_as_one_and_is_counted(billing: Any, caplog: pytest.LogCaptureFixture) -> None:
    counted = billing.context.unknown_models
    with caplog.at_level(logging.WARNING):
        for number, lookup in enumerate(lookups(billing), start=1):
            lookup("m9")
            assert counted.lookups == {"m9": number}
        billing.emit(USER, METER, 1, dimensions={"model_slug": "m2"})
        billing.emit(USER, METER, 1, multiplier="2", dimensions={"model_slug": "m8"})
        billing.emit(USER, METER, 1, dimensions={"model_slug": None})
        billing.settle(USER, METER, "k3", 1, multiplier="1", dimensions={"model_slug": "m8"})
    assert counted.lookups == {"m9": number}
    assert [each.getMessage() for each in caplog.records if "multiplier" in each.getMessage()] == [
        "the catalogue has no multiplier for model 'm9': it counts as 1"
    ]


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_an_unknown_model_may_be_refused(emptied_database_url: str, redis_url: str, redis: Redis, kind: str) -> None:
    settings = settings_for(emptied_database_url, redis_url, unknown_models="refuse")
    give_account(settings, USER)
    with closing(open_client(kind, settings)) as client:
        for lookup in lookups(client):
            with pytest.raises(
                InvalidRequest, match=r"a model with a multiplier .* m1, m2, .*\[multipliers\] \(got 'm9'\)"
            ):
                lookup("m9")
        assert stream_of(redis, settings, USER) == []
        assert client.context.unknown_models.lookups == {}
        for lookup in lookups(client)[:-1]:
            lookup("m2")
        assert client.emit(USER, METER, 2, multiplier="2", dimensions={"model_slug": "m9"}).amount == 4
        assert (
            client.settle(USER, METER, "k2", 1, multiplier="1", dimensions={"model_slug": "m9"}).hold
            is HoldState.UNKNOWN
        )
        assert client.emit(USER, METER, 2).amount == 2


def test_the_counter_of_unknown_models_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    counter = UnknownModels()
    with caplog.at_level(logging.WARNING):
        for number in range(3_000):
            counter.count(f"{number}-" + "x" * 1_000)
        counter.count(10**5_000)
    assert len(counter.lookups) == 1_001
    assert counter.lookups[OTHERS] == 2_001
    assert len(caplog.records) == 1_001
    assert max(map(len, counter.lookups)) <= 64
