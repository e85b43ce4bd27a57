"""Errors travel: whole through pickle and copy, and with a message that says what to pass instead."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from schemas.answers import CheckAnswer, HoldState, Reason
from schemas.codes import KeyRefusal
from schemas.events import Refusal, UsageEvent
from tests.support.resources import settings_for
from worker import errors
from worker.client import Billing

ANSWER = CheckAnswer(
    user_id="u", meter="m", requested=9, allowed=False, reason=Reason.LIMIT_EXCEEDED, available=1, limit=5, used=4
)
EVENTS = [UsageEvent(event_id="e", user_id="u", meter="m", quantity=1)]
ERRORS: list[Exception] = [
    errors.AccountError("user_id: wrong"),
    errors.ApiKeyRefused(KeyRefusal.REVOKED, "wrong", "0123456789ab"),
    errors.BadInput("meter: wrong"),
    errors.BillingError("wrong"),
    errors.ClientBusy("all in use", EVENTS),
    errors.ClientClosed(),
    errors.EventConflict("u", "e", 3),
    errors.HoldClosed("u", "k", HoldState.SETTLED),
    errors.HoldConflict("u", "k", "m", 3, "gemini"),
    errors.InvalidRequest("amount", -1, "at least 0"),
    errors.KeyConflict("invoice_id: of another period"),
    errors.LedgerUnavailable("gone"),
    errors.NotFound("user_id: no account 'u'"),
    errors.OrderUsed("invoice_id", "in_1"),
    errors.PartitionMismatch(4, 8),
    errors.RedisUnavailable("gone", EVENTS, "k"),
    errors.Rejected(Refusal.BAD_METER, "meter: wrong"),
    errors.ReportError("limit: wrong"),
    errors.SpoolUnavailable("/spool", "full"),
    errors.UsageDenied(ANSWER),
    errors.UsageLimitExceeded(ANSWER),
    errors.WrongRedis("no such database"),
]
WAYS: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]


@pytest.mark.parametrize("way", WAYS, ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_comes_through_whole(error: Exception, way: Callable[[Any], Any]) -> None:
    error.add_note("seen in a worker")
    found = way(error)
    assert type(found) is type(error)
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))


def test_every_error_is_tried() -> None:
    defined = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__}
    assert defined == set(map(type, ERRORS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user_id": UUID(int=1)}, r"user_id: .*of type uuid\.UUID\)"),
        ({"user_id": "Jürgen Müller"}, r"user_id: must be 1 to 128 characters of .*got 'Jürgen Müller'\)"),
        ({"user_id": None}, r"user_id: .*got 'None'\)"),
        ({"meter": b"premium_voice"}, r"meter: must be one of .*of type bytes\)"),
        ({"amount": np.int64(5)}, r"amount: must be a whole number .*got '5' of type numpy\.int64\)"),
        ({"amount": Decimal(5)}, r"amount: .*got '5' of type decimal\.Decimal\)"),
        ({"amount": 5.0}, r"amount: .*got '5\.0' of type float\)"),
        ({"amount": True}, r"amount: .*got 'True' of type bool\)"),
        ({"amount": "5"}, r"amount: .*got '5'"),
    ],
    ids=str,
)
def test_a_wrong_type_is_named(arguments: dict[str, Any], message: str) -> None:
    with Billing.connect(settings_for(None, "redis://127.0.0.1:1/0")) as billing:
        calls: list[Callable[..., object]] = [billing.check, lambda **named: billing.charge(**named, event_id="e")]
        for call in calls:
            with pytest.raises(errors.InvalidRequest, match=message):
                call(**({"user_id": "u", "meter": "premium_voice", "amount": 5} | arguments))


TIME = "occurred_at: must be a date, a time and an offset, as in 2026-11-20T10:00:00Z"
TEXT = "must be text of at most 256 characters, without control characters"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user_id": "a\\b"}, "user_id: must be 1 to 128 characters of A-Z a-z 0-9 . _ : @ | + = / - (got "),
        ({"event_id": "a b"}, "event_id: must be 1 to 128 characters of A-Z a-z 0-9 . _ : @ | + = / - (got 'a b')"),
        ({"meter": "Voice"}, "meter: must be 1 to 64 characters of a-z 0-9 _ (got 'Voice')"),
        ({"quantity": -1}, "quantity: must be a whole number from 0 to 1000000000000 (got '-1')"),
        ({"quantity": 10**12, "multiplier": "2"}, "quantity: must be at most 1000000000000 after the multiplier (got "),
        (
            {"multiplier": "1,5"},
            'multiplier: must be decimal text such as "1.5", with up to 6 digits on each side (got ',
        ),
        ({"multiplier": 0}, 'multiplier: must be decimal text such as "1.5", with up to 6 digits on each side (got '),
        ({"occurred_at": datetime(2026, 11, 20)}, TIME),  # noqa: DTZ001 - without an offset
        ({"occurred_at": "yesterday"}, TIME),
        ({"source": "s" * 257}, f"source: {TEXT} (got "),
        ({"reference_id": "a\nb"}, f"reference_id: {TEXT} (got "),
        ({"dimensions": "text"}, "dimensions: must be a dict of names and values (got 'text')"),
        ({"dimensions": {"n": float("nan")}}, "dimensions: must be free of NaN and infinite numbers (got "),
        ({"dimensions": {"n": "\x00"}}, "dimensions: must be free of NUL characters (got "),
        (
            {"dimensions": {"n": "\ud800"}},
            "dimensions: must be free of lone surrogates, which UTF-8 does not have (got ",
        ),
        ({"dimensions": {"n": "x" * 3_000}}, "dimensions: must be at most 2048 bytes as JSON (got "),
        ({"dimensions": {f"n{i}": i for i in range(33)}}, "dimensions: must be at most 32 names (got "),
        (
            {"dimensions": {"n": [1]}},
            "dimensions.n: must be text, a number, True, False or None (got '[1]' of type list)",
        ),
        ({"dimensions": {5: 1}}, "dimensions.5: must be named by text (got '5')"),
    ],
    ids=str,
)
def test_a_refusal_says_what_is_allowed_in_words(arguments: dict[str, Any], message: str) -> None:
    event: Any = {"user_id": "u", "meter": "premium_voice", "quantity": 5} | arguments
    with (
        Billing.connect(settings_for(None, "redis://127.0.0.1:1/0")) as billing,
        pytest.raises(errors.InvalidRequest) as refused,
    ):
        billing.emit(**event)
    assert str(refused.value).startswith(message)
