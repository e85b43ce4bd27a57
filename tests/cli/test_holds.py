"""The commands about holds."""

from __future__ import annotations

from redis import Redis

from config.settings import Settings
from schemas.answers import (
    EventAnswer,
    HoldAnswer,
    HoldState,
    Reason,
)
from schemas.events import UsageEvent
from tests.support.commands import METER, USER, Meterfall, assert_refused, checked
from tests.support.streams import pending_of, stream_of


def test_a_hold_from_check_to_settle(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    assert stream_of(redis, settings, USER) == [{b"v": b"1", b"r": USER.encode()}], "a worker is asked to publish it"
    answer = checked(meterfall.done("check", USER, METER, "100000", "--json"))
    assert (answer.allowed, answer.reason, answer.available) == (True, Reason.WITHIN_LIMIT, 100_000)
    assert "Denied: 100,001 of" in meterfall("check", USER, METER, "100001").out
    held = HoldAnswer.model_validate(meterfall.done("reserve", USER, METER, "600", "job-1", "--json"))
    assert (held.state, held.amount, held.left) == (HoldState.HELD, 600, 600)
    assert meterfall.done("reserve", USER, METER, "600", "job-1", "--json") == held.model_dump(mode="json")
    page = EventAnswer.model_validate(meterfall.done("capture", USER, METER, "job-1", "page-1", "200", "--json"))
    assert (page.event_id, page.amount, page.hold, page.repeated) == ("page-1", 200, HoldState.HELD, False)
    (listed,) = meterfall.done("holds", "list", "--user", USER, "--json")
    assert (listed["key"], listed["amount"], listed["left"], listed["meter"]) == ("job-1", 600, 400, METER)
    assert meterfall.done("holds", "show", USER, "job-1", "--json")["amount"] == 600
    settled = EventAnswer.model_validate(
        meterfall.done("settle", USER, METER, "job-1", "350", "--source", "tts", "-d", "voice_slug=narrator", "--json")
    )
    assert (settled.event_id, settled.amount, settled.hold) == ("job-1", 350, HoldState.HELD)
    sent = [UsageEvent.model_validate_json(fields[b"e"]) for fields in stream_of(redis, settings, USER)[1:]]
    assert [(event.event_id, event.quantity, event.source, event.dimensions) for event in sent] == [
        ("page-1", 200, None, None),
        ("job-1", 350, "tts", {"voice_slug": "narrator"}),
    ]
    assert meterfall.done("holds", "list", "--user", USER) == "none\n"


def test_a_quantity_counts_by_its_model(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    held = HoldAnswer.model_validate(meterfall.done("reserve", USER, METER, "600", "job-1", "--model", "m2", "--json"))
    assert (held.amount, held.left, held.multiplier) == (900, 900, "1.5")
    for command, amount in (
        (("capture", USER, METER, "job-1", "page-1", "7", "--model", "m2"), 10),
        (("capture", USER, METER, "job-1", "page-2", "7", "--multiplier", "2"), 14),
        (("charge", USER, METER, "7", "event-1", "--model", "m2"), 10),
        (("settle", USER, METER, "job-1", "100", "--multiplier", "1", "-d", "model_slug=m2"), 100),
    ):
        assert meterfall.done(*command, "--json")["amount"] == amount
    sent = [UsageEvent.model_validate_json(fields[b"e"]) for fields in stream_of(redis, settings, USER)[1:]]
    assert [(event.quantity, event.multiplier, event.dimensions) for event in sent] == [
        (7, "1.5", {"model_slug": "m2"}),
        (7, "2", None),
        (7, "1.5", {"model_slug": "m2"}),
        (100, "1", {"model_slug": "m2"}),
    ]


def test_a_hold_is_extended(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("reserve", USER, METER, "600", "job-1", "--ttl-seconds", "60")
    longer = HoldAnswer.model_validate(
        meterfall.done("holds", "extend", USER, METER, "job-1", "--ttl-seconds", "604800", "--json")
    )
    assert longer.expires_at is not None
    assert 604_000 < longer.expires_at.timestamp() - redis.time()[0] <= 604_801
    larger = HoldAnswer.model_validate(
        meterfall.done("holds", "extend", USER, METER, "job-1", "--amount", "700", "--json")
    )
    assert larger == longer.model_copy(update={"amount": 700, "left": 700})
    assert pending_of(redis, settings, USER, METER) == {"h:job-1": 700, "total": 700}
    refused = meterfall("holds", "extend", USER, METER, "job-1", "--amount", "100001")
    assert_refused(refused, 1, "may not spend 99301", "available 99300")
    assert meterfall.done("holds", "list", "--user", USER, "--json")[0]["amount"] == 700
    meterfall.done("release", USER, METER, "job-1")
    assert_refused(meterfall("holds", "extend", USER, METER, "job-1"), 1, "job-1", "released")
    assert_refused(meterfall("holds", "extend", USER, METER, "job-9"), 1, "job-9", "unknown")


def test_a_hold_is_given_back_once(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    for key in ("job-1", "job-2"):
        meterfall.done("reserve", USER, METER, "5", key)
    assert_refused(meterfall("reserve", USER, METER, "6", "job-1"), 1, "job-1", "5")
    for command, key in (("release",), "job-1"), (("holds", "release"), "job-2"):
        answer = HoldAnswer.model_validate(meterfall.done(*command, USER, METER, key, "--json"))
        assert (answer.key, answer.state, answer.left) == (key, HoldState.HELD, 0)
    again = HoldAnswer.model_validate(meterfall.done("release", USER, METER, "job-1", "--json"))
    assert again.state is HoldState.RELEASED
    assert_refused(meterfall("reserve", USER, METER, "5", "job-1"), 1, "job-1", "released")
    assert_refused(meterfall("holds", "show", USER, "job-9"), 2, "key", "job-9")
    assert pending_of(redis, settings, USER, METER) == {}
