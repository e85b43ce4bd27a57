"""The body of `POST /v1/events`: one event or many, in five forms, validated whole before anything is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from schemas.events import UsageEvent
from worker.client.recording import priced, refusal_of
from worker.client.session import Context
from worker.errors import InvalidRequest
from worker.service import cloudevents
from worker.service.problems import MAX_MISTAKES, Mistake, mistake_of

JSON = "application/json"
LINES = ("application/x-ndjson", "application/ndjson", "application/jsonl")
CLOUD_EVENT = "application/cloudevents+json"
CLOUD_EVENTS = "application/cloudevents-batch+json"
MEDIA_TYPES = (JSON, *LINES, CLOUD_EVENT, CLOUD_EVENTS)


class Body(NamedTuple):
    """What a body holds, parsed and not validated. `is_single`: it is one event, and no batch."""

    items: Sequence[Any]
    is_single: bool
    are_cloud_events: bool


class Batch(NamedTuple):
    """Valid events, priced, in the order of the body."""

    events: list[UsageEvent]
    is_single: bool


def parsed(headers: Headers, body: bytes, max_events: int) -> Body:
    """Parse a body by its media type.

    Raises Mistake for a body that is no JSON; HTTPException for a media type that is none of these (415), and for more
    than `max_events` (413).
    """
    media = headers.get("content-type", "")
    kind = media.partition(";")[0].strip().lower()
    is_binary = f"{cloudevents.HEADER}specversion" in headers
    if kind in LINES:
        found = Body(_lines(body), is_single=False, are_cloud_events=False)
    elif kind == CLOUD_EVENT:
        found = Body([_json(body)], is_single=True, are_cloud_events=True)
    elif kind == CLOUD_EVENTS:
        found = Body(_list(_json(body)), is_single=False, are_cloud_events=True)
    elif is_binary and cloudevents.is_json(media):
        try:
            event = cloudevents.in_headers(headers.items(), media, _json(body))
        except InvalidRequest as error:
            raise Mistake([mistake_of(error)]) from None
        found = Body([event], is_single=True, are_cloud_events=True)
    elif kind == JSON:
        value = _json(body)
        found = Body(value if isinstance(value, list) else [value], not isinstance(value, list), are_cloud_events=False)
    else:
        raise HTTPException(415, f"Content-Type: must be one of {', '.join(MEDIA_TYPES)}")
    if len(found.items) > max_events:
        raise HTTPException(413, f"A request may have {max_events} events.")
    if not found.items:
        raise Mistake([{"field": "body", "detail": "body: must hold at least one event"}])
    return found


def validated(context: Context, body: Body, *, event_id: str | None, traceparent: str | None) -> Batch:
    """Return the events of a body, each with its price, or raise Mistake with the place of every wrong one.

    `event_id` is that of a single event whose request names it in a header. `traceparent` is the trace of events
    without one of their own.
    """
    events, mistakes = [], []
    for index, item in enumerate(body.items):
        try:
            events.append(_event_of(context, item, body, event_id, traceparent))
        except InvalidRequest as error:
            mistakes.append(mistake_of(error, None if body.is_single else index))
            if len(mistakes) == MAX_MISTAKES:
                break
    if mistakes:
        raise Mistake(mistakes)
    return Batch(events, body.is_single)


def _event_of(context: Context, item: Any, body: Body, event_id: str | None, traceparent: str | None) -> UsageEvent:
    """Return one event. Raises InvalidRequest, which names the field by its place in the body."""
    if not isinstance(item, dict):
        raise InvalidRequest("event", None, "an object")
    if not body.are_cloud_events:
        if event_id is not None:
            if item.get("event_id", event_id) != event_id:
                raise InvalidRequest("event_id", None, "the same as Idempotency-Key, or left out")
            item = item | {"event_id": event_id}
        return _traced(_valid(context, item), traceparent)
    cloud = cloudevents.mapped(item)
    if event_id is not None and event_id != cloud.fields["event_id"]:
        raise InvalidRequest("id", None, "the same as Idempotency-Key")
    try:
        return _traced(_valid(context, cloud.fields), cloud.traceparent or traceparent)
    except InvalidRequest as error:
        raise InvalidRequest(cloudevents.place_of(error.field, item), None, error.allowed) from None


def _valid(context: Context, fields: Mapping[str, Any]) -> UsageEvent:
    try:
        event = UsageEvent.model_validate(fields)
    except ValidationError as error:
        raise refusal_of(error) from None
    return priced(context, event)


def _traced(event: UsageEvent, traceparent: str | None) -> UsageEvent:
    return event if traceparent is None else event.traced(traceparent)


def _json(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Mistake([{"field": "body", "detail": f"body: must be JSON ({error})"}]) from None


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Mistake([{"field": "body", "detail": "body: must be an array of events"}])
    return value


def _lines(body: bytes) -> list[Any]:
    """Return the values of the lines that are not empty. Raises Mistake with the number of the first bad one."""
    values: list[Any] = []
    for line in body.split(b"\n"):
        if not line.strip():
            continue
        try:
            values.append(from_json(line, allow_inf_nan=False))
        except ValueError as error:
            index = len(values)
            raise Mistake([{"index": index, "field": "event", "detail": f"event: must be JSON ({error})"}]) from None
    return values
