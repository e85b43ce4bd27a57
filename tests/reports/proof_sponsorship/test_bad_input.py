"""Bad input to the calls about the pool is named, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from math import inf, nan
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.sponsorship import Everybody, open_pool
from tests.support.streams import dump
from worker.client import Billing
from worker.errors import BillingError, HoldClosed, HoldConflict, InvalidRequest
from worker.resources import Resources

BAD_IDS: list[object] = [
    True, 1, 1.5, nan, b"ada", ["ada"], {"ada": 1}, " ", "a b", "{sponsor}", "a\r\nSET x 1", "a\n", "a\0", "a#b", "é",
    "\ud800", "\u202eada", "a" * 129, "a" * 10_000,
]  # fmt: skip
BAD_AMOUNTS: list[object] = [
    True, False, 1.0, 0.5, nan, inf, "1", "", b"1", Decimal(1), [1], 10**12 + 1, 10**13, 2**63, 2**64, 10**5_000,
]  # fmt: skip
NEGATIVE: list[object] = [-1, -(2**63), -(10**5_000)]
BAD_LIVES: list[object] = [0, -1, True, 1.5, "60", nan, 86_401, 2**63, 10**5_000]
BAD_REASONS: list[object] = [
    None,
    True,
    1,
    1.5,
    b"x",
    ["x"],
    "a\r\nb",
    "a\0",
    "\x1b[31m",
    "\u202e",
    "x" * 201,
    "x" * 10_000,
]
NO_ID: list[object] = [None, ""]
GOOD: dict[str, dict[str, Any]] = {
    "decide": {"user_id": "ada", "estimate": 5, "request_id": "new", "ttl_seconds": 60},
    "confirm_partial": {"user_id": "ada", "estimate": 5, "request_id": "new", "paid": 1, "ttl_seconds": 60},
    "settle_sponsored": {"user_id": "ada", "request_id": "held", "actual": 5, "paid": 1},
    "release_sponsored": {"user_id": "ada", "request_id": "held", "reason": "no work"},
    "credit_pool": {"request_id": "held", "paid": 10},
    "estimate": {
        "user_id": "ada", "meter": "credits", "quantity": 5, "model_slug": "m2", "multiplier": "1.5",
        "backend": "gemini",
    },
}  # fmt: skip
IDS = "1 to 128 characters of"
WHOLE = f"a whole number from 0 to {10**12}"
BAD: list[tuple[str, str, str, list[object]]] = [
    ("decide", "user_id", IDS, BAD_IDS),
    ("decide", "estimate", f"a whole number up to {10**12}", [None, *BAD_AMOUNTS]),
    ("decide", "request_id", IDS, BAD_IDS + NO_ID),
    ("decide", "ttl_seconds", "1 to 86400", BAD_LIVES),
    ("confirm_partial", "user_id", IDS, BAD_IDS),
    ("confirm_partial", "estimate", f"a whole number up to {10**12}", [None, *BAD_AMOUNTS]),
    ("confirm_partial", "request_id", IDS, BAD_IDS + NO_ID),
    ("confirm_partial", "paid", WHOLE, [None, *BAD_AMOUNTS, *NEGATIVE]),
    ("confirm_partial", "ttl_seconds", "1 to 86400", BAD_LIVES),
    ("settle_sponsored", "user_id", IDS, BAD_IDS + NO_ID),
    ("settle_sponsored", "request_id", IDS, BAD_IDS + NO_ID),
    ("settle_sponsored", "actual", WHOLE, [None, *BAD_AMOUNTS, *NEGATIVE]),
    ("settle_sponsored", "paid", WHOLE, [*BAD_AMOUNTS, *NEGATIVE]),
    ("release_sponsored", "user_id", IDS, BAD_IDS + NO_ID),
    ("release_sponsored", "request_id", IDS, BAD_IDS + NO_ID),
    ("release_sponsored", "reason", "at most 200 printable characters", BAD_REASONS),
    ("credit_pool", "request_id", IDS, BAD_IDS + NO_ID),
    ("credit_pool", "paid", WHOLE, [None, *BAD_AMOUNTS, *NEGATIVE]),
    ("estimate", "user_id", "", BAD_IDS + NO_ID),
    ("estimate", "meter", "", [*BAD_IDS, *NO_ID, "gold"]),
    ("estimate", "quantity", "", [None, *BAD_AMOUNTS, *NEGATIVE, 10**12]),
    ("estimate", "multiplier", "", [True, 1, 1.5, nan, "", "-1", "1e3", "NaN", "1,5", "1" * 10_000, b"1", ["1"]]),
    ("estimate", "model_slug", "", [1 + 2j, b"m2", ["m2"], {"m": 2}, "x" * 10_000]),
    ("estimate", "backend", "one of gemini, hardware", [True, 1, 1.5, b"gemini", ["gemini"], "", "nowhere", "g\r\n"]),
]


@pytest.mark.parametrize(("call", "field_", "allowed", "values"), BAD, ids=[f"{one[0]}-{one[1]}" for one in BAD])
def test_bad_input_is_named_and_changes_nothing(
    settings: Settings, redis: Redis, resources: Resources, call: str, field_: str, allowed: str, values: list[object]
) -> None:
    with Billing(settings, Everybody("elite")) as client:
        client.decide("ada", 20, "held")
        client.estimate(**GOOD["estimate"])
        before = dump(redis)
        for value in values:
            with pytest.raises(InvalidRequest) as raised:
                getattr(client, call)(**{**GOOD[call], field_: value})
            message = str(raised.value)
            # A slug is a dimension of the event: one that is too long makes these too large.
            named = (field_, "dimensions") if field_ == "model_slug" else field_
            assert message.startswith(named), (value, message)
            assert "must be " + allowed in message
            assert len(message) < 500
            assert dump(redis) == before


@pytest.mark.parametrize(
    "estimate", [0, -1, -(10**12), -(2**63), -(10**5_000)], ids=["0", "-1", "-10^12", "-2^63", "-10^5000"]
)
def test_an_estimate_that_asks_for_nothing_gates(
    settings: Settings, redis: Redis, billing: Billing, estimate: int
) -> None:
    billing.credit_pool("before", 0)  # the first call of a client claims the partitions
    before = dump(redis)
    for answer in (
        billing.decide("ada", estimate, "request"),
        billing.confirm_partial("ada", estimate, "request", paid=0),
        billing.decide(None, estimate, "request"),
    ):
        assert (answer.serve, answer.absorb, answer.charge, answer.outstanding) == ("gate", 0, 0, 0)
        assert answer.estimate == estimate
    assert dump(redis) == before


@pytest.mark.parametrize("user", [None, ""])
def test_nobody_is_never_covered(settings: Settings, redis: Redis, user: str | None) -> None:
    with Billing(settings, Everybody("elite")) as client:
        client.credit_pool("before", 0)
        before = dump(redis)
        answer = client.decide(user, 5, "request")
        assert (answer.user_id, answer.serve, answer.charge, answer.reason) == (None, "gate", 5, "no_identity")
        answer = client.confirm_partial(user, 5, "request", paid=2)
        assert (answer.serve, answer.charge, answer.outstanding, answer.reason) == ("gate", 5, 3, "no_identity")
    assert dump(redis) == before


def test_what_holds_nothing_and_what_is_refused_leaves_no_trace(settings: Settings, redis: Redis) -> None:
    open_pool(settings, 300)
    with Billing(settings, Everybody("trusted")) as client:
        client.decide("ada", 100, "held")
        client.decide("ada", 10, "settled")
        client.settle_sponsored("ada", "settled", 10)
        client.decide("ada", 10, "released")
        client.release_sponsored("ada", "released", "no work")
        client.confirm_partial("bob", 100, "other", paid=10)
        client.decide("eve", 90, "another")
        client.decide("bob", 40, "gated")
        client.estimate("ada", "credits", 1)
        client.decide("ada", 100, "held")  # its hold notes that a second call was told of it
        before = dump(redis)
        assert client.decide("ada", 11, "new").reason == "budget_short"
        assert client.decide("bob", 11, "new").reason == "pool_short"
        assert client.confirm_partial("ada", 40, "new", paid=40).reason == "nothing_to_cover"
        assert client.estimate("ada", "credits", 50).sponsorship.absorb == 10
        assert client.decide("ada", 100, "held").repeated
        assert client.settle_sponsored("ada", "settled", 1, paid=1).repeated
        calls: list[tuple[type[BillingError], str, Callable[[], object]]] = [
            (HoldConflict, "of ada already holds 100", lambda: client.decide("ada", 99, "held")),
            (HoldConflict, "of ada already holds 100", lambda: client.decide("bob", 100, "held")),
            (HoldConflict, "of ada already holds 100", lambda: client.confirm_partial("ada", 100, "held", paid=0)),
            (HoldConflict, "of bob already holds 90", lambda: client.confirm_partial("bob", 100, "other", paid=11)),
            (HoldConflict, "of bob already holds 90", lambda: client.decide("bob", 100, "other")),
            (HoldConflict, "of ada already holds 100", lambda: client.settle_sponsored("bob", "held", 1)),
            (HoldConflict, "of ada already holds 10", lambda: client.settle_sponsored("bob", "settled", 1)),
            (HoldConflict, "of ada already holds 100", lambda: client.release_sponsored("bob", "held", "mine")),
            (HoldClosed, "is settled", lambda: client.decide("ada", 10, "settled")),
            (HoldClosed, "is released", lambda: client.decide("ada", 10, "released")),
            (HoldClosed, "is released", lambda: client.settle_sponsored("ada", "released", 10)),
            (HoldClosed, "is unknown", lambda: client.settle_sponsored("ada", "new", 10)),
        ]
        for error, message, call in calls:
            with pytest.raises(error, match=message):
                call()
        assert dump(redis) == before
