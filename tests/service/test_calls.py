"""Questions, holds and charges over HTTP: the answers of the client, and its refusals."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from config.settings import Settings
from schemas.answers import CheckAnswer, LimitReached, Reason
from tests.support.ledger import give_account, rows
from tests.support.serving import Served
from tests.support.streams import drain
from worker.service.limits import limit_headers

USER, METER = "user-42", "premium_voice"
WHO = {"user_id": USER, "meter": METER}


@pytest.fixture(autouse=True)
def _account(settings: Settings) -> None:
    give_account(settings, USER, "basic")


def test_a_check_answers_and_says_what_is_left(served: Served) -> None:
    answer = served.post("/v1/check", {**WHO, "amount": 1_840})
    assert answer.status == 200
    assert answer.json["allowed"] is True
    assert (answer.json["available"], answer.json["limit"]) == (100_000, 100_000)
    assert answer.headers["ratelimit"] == '"premium_voice";r=100000'
    assert answer.headers["ratelimit-policy"] == '"premium_voice";q=100000'

    denied = served.post("/v1/check", {**WHO, "amount": 100_001})
    assert (denied.status, denied.json["allowed"], denied.json["reason"]) == (200, False, "limit_exceeded")
    unknown = served.post("/v1/check", {"user_id": "nobody", "meter": METER})
    assert (unknown.status, unknown.json["reason"]) == (200, "unknown_account")


def test_a_hold_goes_its_whole_way(served: Served, settings: Settings) -> None:
    held = served.post("/v1/holds", {**WHO, "amount": 1_840}, Idempotency_Key="job-7f3")
    assert (held.status, held.json["state"], held.json["left"]) == (200, "held", 1_840)
    again = served.post("/v1/holds", {**WHO, "amount": 1_840, "key": "job-7f3"}, Idempotency_Key='"job-7f3"')
    assert again.json == held.json

    page = served.post("/v1/holds/capture", {**WHO, "key": "job-7f3", "amount": 40}, Idempotency_Key="page-1")
    assert (page.status, page.json["event_id"], page.json["hold"]) == (200, "page-1", "held")
    longer = served.post("/v1/holds/extend", {**WHO, "key": "job-7f3", "amount": 2_000, "ttl_seconds": 3_600})
    assert (longer.status, longer.json["amount"], longer.json["left"]) == (200, 2_000, 1_960)
    settled = served.post("/v1/holds/settle", {**WHO, "actual": 1_700, "source": "tts"}, Idempotency_Key="job-7f3")
    assert (settled.status, settled.json["hold"], settled.json["repeated"]) == (200, "held", False)
    repeated = served.post("/v1/holds/settle", {**WHO, "key": "job-7f3", "actual": 9})
    assert (repeated.json["amount"], repeated.json["repeated"]) == (1_700, True)

    over = served.post("/v1/holds", {**WHO, "amount": 1, "key": "job-7f3"})
    assert (over.status, over.problem["title"]) == (409, "Hold closed")
    assert served.post("/v1/holds", {**WHO, "amount": 5, "key": "other"}).status == 200
    conflict = served.post("/v1/holds", {**WHO, "amount": 6, "key": "other"})
    assert (conflict.status, conflict.problem["title"]) == (409, "Hold conflict")
    assert served.post("/v1/holds/release", {**WHO, "key": "other"}).json["state"] == "held"
    assert served.post("/v1/holds/release", {**WHO, "key": "other"}).json["state"] == "released"

    drain(settings, USER)
    recorded = rows(settings, "SELECT event_id, amount, source FROM usage_log ORDER BY seq")
    assert recorded == [("page-1", 40, None), ("job-7f3", 1_700, "tts")]


def test_a_denied_hold_has_the_figures_and_the_headers(served: Served) -> None:
    denied = served.post("/v1/holds", {**WHO, "amount": 100_001, "key": "job-7f3"})
    assert denied.status == 402
    found = denied.problem
    assert (found["reason"], found["available"], found["requested"]) == ("limit_exceeded", 100_000, 100_001)
    assert USER not in denied.body.decode()
    assert denied.headers["ratelimit"] == '"premium_voice";r=100000'


def test_a_charge_is_recorded_once_with_its_trace(served: Served, settings: Settings) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    first = served.post("/v1/charge", {**WHO, "amount": 40}, Idempotency_Key="c-1", traceparent=trace)
    assert (first.status, first.json["expected"]["from_subscription"], first.json["repeated"]) == (200, 40, False)
    assert served.post("/v1/charge", {**WHO, "amount": 40, "event_id": "c-1"}).json["repeated"] is True
    conflict = served.post("/v1/charge", {**WHO, "amount": 41, "event_id": "c-1"})
    assert (conflict.status, conflict.problem["title"]) == (409, "Event conflict")
    drain(settings, USER)
    (recorded,) = rows(settings, "SELECT event_id, amount, trace_id FROM usage_log")
    assert recorded == ("c-1", 40, trace[3:35])


def test_two_different_keys_of_one_request_are_refused_and_so_is_none(served: Served) -> None:
    for path, body, field in (
        ("/v1/holds", {**WHO, "amount": 1}, "key"),
        ("/v1/holds/settle", {**WHO, "actual": 1}, "key"),
        ("/v1/holds/capture", {**WHO, "key": "h", "amount": 1}, "event_id"),
        ("/v1/charge", {**WHO, "amount": 1}, "event_id"),
        ("/v1/sponsorship/decide", {"user_id": USER, "estimate": 1}, "request_id"),
    ):
        missing = served.post(path, body)
        assert (missing.status, missing.problem["field"]) == (422, field), path
        differ = served.post(path, {**body, field: "one"}, Idempotency_Key="two")
        assert (differ.status, differ.problem["field"]) == (422, field), path
        assert "Idempotency-Key" in differ.problem["detail"]


def test_estimates_remaining_and_routing(served: Served, settings: Settings) -> None:
    estimate = served.post("/v1/estimate", {**WHO, "quantity": 1_840, "multiplier": "1.5"})
    assert (estimate.status, estimate.json["amount"], estimate.json["allowed"]) == (200, 2_760, True)
    left = served.get(f"/v1/remaining?user_id={USER}&meter={METER}", "producer")
    assert (left.status, left.json["remaining"]) == (200, 100_000)
    give_account(settings, "tenant-1", "tenant")
    routed = served.post(
        "/v1/plan-backend", {"user_id": "tenant-1", "preference": "gemini_first", "has_hardware": True}
    )
    assert routed.status == 200
    assert routed.json["preference"] == "gemini_first"
    wrong = served.post("/v1/plan-backend", {"user_id": USER, "preference": "moon_first", "has_hardware": True})
    assert (wrong.status, wrong.problem["field"]) == (422, "preference")


def test_the_headers_of_a_limit_per_day_say_when_it_ends() -> None:
    now = datetime(2026, 11, 30, 12, tzinfo=UTC)
    reached = LimitReached(per="day", set_by="user", amount=500, used=500, ends_at=now + timedelta(hours=2))
    answer = CheckAnswer(
        user_id="u", meter="m", requested=1, allowed=False, reason=Reason.SPENDING_LIMIT_REACHED, available=0,
        limit=9_000, limited_by=reached,
    )  # fmt: skip
    assert limit_headers(answer, now) == {"RateLimit-Policy": '"m";q=500;w=86400', "RateLimit": '"m";r=0;t=7200'}
    assert limit_headers(answer.model_copy(update={"available": None})) == {}
    capped = answer.model_copy(update={"limited_by": None, "available": 7, "cap": 10, "backend": "gemini"})
    assert limit_headers(capped) == {"RateLimit-Policy": '"m/gemini";q=10', "RateLimit": '"m/gemini";r=7'}
    wallet = answer.model_copy(update={"limited_by": None, "wallet": "credits"})
    assert limit_headers(wallet) == {"RateLimit": '"m";r=0'}
