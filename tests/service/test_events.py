"""`POST /v1/events`: five forms of body, all or nothing, and each mistake by the place of its event."""

from __future__ import annotations

import json
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.events import UsageEvent
from tests.support.ledger import give_account, rows
from tests.support.serving import Reply, Served
from tests.support.streams import backlog, drain
from worker.service import cloudevents

USER, METER = "user-42", "premium_voice"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
JSON, LINES = "application/json", "application/x-ndjson"
CLOUD, CLOUDS = "application/cloudevents+json", "application/cloudevents-batch+json"


@pytest.fixture(autouse=True)
def _account(settings: Settings) -> None:
    give_account(settings, USER, "basic")


def usage(number: int, **changes: Any) -> dict[str, Any]:
    """An event of the user."""
    return {"event_id": f"e-{number}", "user_id": USER, "meter": METER, "quantity": number, **changes}


def cloud(number: int, **changes: Any) -> dict[str, Any]:
    """A CloudEvent that stands for an event of the user; a field changed to `...` is left out."""
    fields = {
        "specversion": "1.0", "id": f"e-{number}", "source": "/tts", "type": f"com.example.{METER}", "subject": USER,
        "time": "2026-11-30T10:00:00Z", "data": {"quantity": number}, **changes,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not ...}


def sent(served: Served, body: object, media: str = JSON, **headers: str) -> Reply:
    """Post a body as it is, or as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return served.ask("POST", "/v1/events", data, "producer", {"Content-Type": media, **named})


def recorded(settings: Settings) -> list[tuple[Any, ...]]:
    """Id, quantity and source of all recorded events."""
    drain(settings, USER)
    return rows(settings, "SELECT event_id, quantity, source FROM usage_log ORDER BY seq")


def test_one_event_gets_one_answer(served: Served, settings: Settings) -> None:
    answer = sent(served, usage(3, source="tts", multiplier="1.5"), traceparent=TRACE)
    assert answer.status == 202
    assert (answer.json["event_id"], answer.json["amount"], answer.json["spooled"]) == ("e-3", 4, False)
    unnamed = {name: value for name, value in usage(5).items() if name != "event_id"}
    assert sent(served, unnamed, Idempotency_Key="e-5").json["event_id"] == "e-5"
    assert sent(served, usage(5), Idempotency_Key="e-5").status == 202  # the same once more
    assert recorded(settings) == [("e-3", 3, "tts"), ("e-5", 5, None)]
    assert rows(settings, "SELECT trace_id FROM usage_log ORDER BY seq") == [(TRACE[3:35],), (None,)]


@pytest.mark.parametrize("media", [JSON, LINES, "application/jsonl", f"{JSON}; charset=utf-8", CLOUDS])
def test_a_batch_is_recorded_in_its_order(served: Served, settings: Settings, media: str) -> None:
    made = [cloud(number) if media == CLOUDS else usage(number, source="/tts") for number in range(1, 501)]
    lines = b"\r\n".join(json.dumps(each).encode() for each in made) + b"\n\n"
    answer = sent(served, lines if "json;" not in media and media in (LINES, "application/jsonl") else made, media)
    assert answer.status == 202
    assert [each["event_id"] for each in answer.json["events"]] == [f"e-{number}" for number in range(1, 501)]
    assert recorded(settings) == [(f"e-{number}", number, "/tts") for number in range(1, 501)]


def test_cloud_events_alone_structured_and_binary(served: Served, settings: Settings) -> None:
    structured = cloud(7, traceparent=TRACE, partitionkey="any", datacontenttype="application/json")
    assert sent(served, structured, f"{CLOUD}; charset=UTF-8").json["event_id"] == "e-7"
    number_alone = cloud(8, data=8, type=METER, time=...)
    assert sent(served, number_alone, CLOUD).json["amount"] == 8
    binary = {
        "ce-specversion": "1.0", "ce-id": "e-9", "ce-source": "%2Ftts", "ce-type": "made", "ce-subject": USER,
        "ce-time": "2026-11-30T10:00:00+01:00",
    }  # fmt: skip
    data = {"meter": METER, "quantity": 9, "dimensions": {"voice_slug": "narrator"}}
    assert sent(served, data, JSON, **binary).json["event_id"] == "e-9"
    assert recorded(settings) == [("e-7", 7, "/tts"), ("e-8", 8, "/tts"), ("e-9", 9, "/tts")]
    kept = rows(settings, "SELECT trace_id, dimensions, occurred_at::text FROM usage_log ORDER BY seq")
    assert kept[0][0] == TRACE[3:35]
    assert kept[2][1] == {"voice_slug": "narrator"}
    assert str(kept[2][2]).startswith("2026-11-30 09:00:00")


WRONG_EVENTS = [
    ({"quantity": "7"}, "quantity", "a whole number from 0"),
    ({"quantity": 7.0}, "quantity", "a whole number"),
    ({"quantity": True}, "quantity", "a whole number"),
    ({"quantity": -1}, "quantity", "a whole number"),
    ({"quantity": 10**12, "multiplier": "2"}, "quantity", "after the multiplier"),
    ({"user_id": "a b"}, "user_id", "1 to 128 characters"),
    ({"event_id": 7}, "event_id", "1 to 128 characters"),
    ({"meter": "no_such_meter"}, "meter", "one of "),
    ({"meter": None}, "meter", "characters of a-z"),
    ({"multiplier": 1.5}, "multiplier", "decimal text"),
    ({"occurred_at": "yesterday"}, "occurred_at", "a date, a time and an offset"),
    ({"occurred_at": "2020-01-01T00:00:00Z"}, "occurred_at", "at most 35 days ago"),
    ({"colour": "red"}, "colour", "left out"),
    ({"dimensions": {"list": [1]}}, "dimensions.list", "text, a number"),
    ({"dimensions": {"x": "y" * 3_000}}, "dimensions", "2048 bytes"),
    ({"hold_key": ""}, "hold_key", "1 to 128 characters"),
]


@pytest.mark.parametrize(("change", "field", "allowed"), WRONG_EVENTS, ids=[str(each[0])[:40] for each in WRONG_EVENTS])
def test_a_wrong_event_of_a_batch_is_named_and_nothing_is_recorded(
    served: Served, settings: Settings, redis: Redis, change: dict[str, Any], field: str, allowed: str
) -> None:
    answer = sent(served, [usage(1), usage(2), usage(3, **change), usage(4)])
    assert answer.status == 422
    found = answer.problem
    assert (found["index"], found["field"]) == (2, field)
    assert allowed in found["detail"]
    assert len(found["errors"]) == 1
    assert backlog(settings, redis) == 0


WRONG_CLOUDS = [
    ({"specversion": "0.3"}, "specversion", "1.0"),
    ({"id": ...}, "id", "given"),
    ({"id": "a b"}, "id", "1 to 128 characters"),
    ({"subject": ...}, "subject", "given"),
    ({"subject": "ä"}, "subject", "1 to 128 characters"),
    ({"source": "x" * 300}, "source", "at most 256"),
    ({"time": "noon"}, "time", "a date"),
    ({"type": "com.example.nothing"}, "type", "one of "),
    ({"data": {"quantity": 1, "meter": "nothing"}}, "data.meter", "one of "),
    ({"data": {"quantity": "1"}}, "data.quantity", "a whole number"),
    ({"data": True}, "data", "an object"),
    ({"data": -1}, "data", "a whole number"),
    ({"data": ...}, "data", "an object"),
    ({"data": {"quantity": 1, "user_id": "other"}}, "data.user_id", "left out"),
    ({"data": ..., "data_base64": "AA=="}, "data_base64", "left out"),
    ({"datacontenttype": "text/xml"}, "datacontenttype", "application/json"),
    ({"Colour": "red"}, "Colour", "lower-case"),
]


@pytest.mark.parametrize(("change", "field", "allowed"), WRONG_CLOUDS, ids=[str(each[0])[:40] for each in WRONG_CLOUDS])
def test_a_wrong_cloud_event_is_named_by_its_attribute(
    served: Served, settings: Settings, redis: Redis, change: dict[str, Any], field: str, allowed: str
) -> None:
    for body, media, index in ((cloud(1, **change), CLOUD, None), ([cloud(0), cloud(1, **change)], CLOUDS, 1)):
        answer = sent(served, body, media)
        found = answer.problem
        assert (answer.status, found["field"], found.get("index")) == (422, field, index)
        assert allowed in found["detail"]
    assert backlog(settings, redis) == 0


def test_every_wrong_event_is_named_up_to_a_bound(served: Served) -> None:
    found = sent(served, [usage(number, quantity=-1) for number in range(50)]).problem
    assert [each["index"] for each in found["errors"]] == list(range(20))


def test_bodies_that_hold_no_events(served: Served) -> None:
    for body, media in (
        (b"", JSON), (b"[", JSON), (b"[1,]", JSON), (b"\xff", JSON), (b"NaN", JSON), (b"[]", JSON), (b"7", JSON),
        (b"[7]", JSON), (b"null", JSON), (b'{"a":' * 500, JSON), (b"9" * 5_000, JSON), (b"\n\n", LINES),
        (b"{}\n{", LINES), (b"{}", CLOUDS), (b"[]", CLOUD),
    ):  # fmt: skip
        answer = sent(served, body, media)
        assert answer.status == 422, (body, media, answer)
        assert answer.problem["title"] == "Invalid request"
    second = sent(served, b'{"event_id":"e"}\n\n{', LINES).problem
    assert (second["index"], second["field"]) == (1, "event")
    header = sent(served, [usage(1)], JSON, Idempotency_Key="e-1")
    assert (header.status, header.problem["field"]) == (422, "Idempotency-Key")
    differ = sent(served, usage(1), JSON, Idempotency_Key="e-2")
    assert (differ.status, differ.problem["field"]) == (422, "event_id")
    percent = {"ce-specversion": "1.0", "ce-id": "%ff", "ce-source": "x", "ce-type": METER, "ce-subject": USER}
    assert sent(served, {"quantity": 1}, JSON, **percent).problem["field"] == "ce-id"


def test_other_media_types_and_too_many_events_are_refused(served: Served, settings: Settings, redis: Redis) -> None:
    for media in ("text/plain", "application/xml", "application/json5", ""):
        assert sent(served, usage(1), media).status == 415
    assert sent(served, {"quantity": 1}, "text/plain", ce_specversion="1.0").status == 415
    most = settings.serve_batch_max_events
    for body, media in (
        ([usage(number) for number in range(most + 1)], JSON),
        (b"\n".join(json.dumps(usage(number)).encode() for number in range(most + 1)), LINES),
    ):
        answer = sent(served, body, media)
        assert (answer.status, answer.problem["title"]) == (413, "Content too large")
    assert backlog(settings, redis) == 0


def test_the_schema_of_a_cloud_event_has_every_place_of_a_usage_event() -> None:
    # A field that usage events get some day must have a place in a CloudEvent, or it could not be sent there.
    assert set(cloudevents.PLACES) == set(UsageEvent.model_fields)
    assert {place.partition(".")[0] for place in cloudevents.PLACES.values()} <= set(cloudevents.SCHEMA["properties"])
