"""CloudEvents 1.0 as usage events.

    id → event_id        subject → user_id        source → source        time → occurred_at
    type → meter: what follows its last dot, unless `data` names the meter
    data → quantity and the other fields of a usage event; or the quantity alone, as a number

An id is unique for its subject, for ever: CloudEvents asks for that within a source. Extensions are ignored, but for
`traceparent`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from worker.errors import InvalidRequest

HEADER = "ce-"
_ATTRIBUTES = {"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema", "data"}
_DATA = ("meter", "quantity", "multiplier", "hold_key", "reference_id", "dimensions")
_OBJECT_OR_NUMBER = "an object with quantity and other fields of a usage event, or the quantity as a whole number"

# The places of the fields of a usage event, for messages about them.
PLACES = {
    "event_id": "id", "user_id": "subject", "source": "source", "occurred_at": "time",
    **{name: f"data.{name}" for name in _DATA},
}  # fmt: skip

# For the OpenAPI document. CloudEvents allows extensions beside these attributes.
SCHEMA: Mapping[str, Any] = {
    "title": "CloudEvent",
    "description": "A CloudEvents 1.0 event: `id` becomes event_id, `subject` user_id; the meter is `data.meter`, else "
    "what follows the last dot of `type`.",
    "type": "object",
    "required": ["specversion", "id", "source", "type", "subject", "data"],
    "properties": {
        "specversion": {"const": "1.0", "type": "string"},
        "id": {"type": "string", "minLength": 1, "maxLength": 128},
        "source": {"type": "string", "minLength": 1, "maxLength": 256},
        "type": {"type": "string", "minLength": 1},
        "subject": {"type": "string", "minLength": 1, "maxLength": 128},
        "time": {"type": "string", "format": "date-time"},
        "datacontenttype": {"type": "string"},
        "dataschema": {"type": "string"},
        "data": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "object"}]},
    },
}


class Mapped(NamedTuple):
    """The fields of a usage event, and the trace that it travels with."""

    fields: dict[str, Any]
    traceparent: str | None


def mapped(event: Mapping[str, Any]) -> Mapped:
    """Return the fields of the usage event that a CloudEvent stands for; they are not validated yet.

    Raises InvalidRequest, which names the attribute.
    """
    if event.get("specversion") != "1.0":
        raise InvalidRequest("specversion", event.get("specversion"), "1.0")
    for name in ("id", "source", "type", "subject"):
        value = event.get(name)
        if not isinstance(value, str) or not value:
            raise InvalidRequest(name, value, "given, as text")
    if "data_base64" in event:
        raise InvalidRequest("data_base64", "", "left out: usage is JSON, in data")
    media = event.get("datacontenttype", "application/json")
    if not is_json(media):
        raise InvalidRequest("datacontenttype", media, "application/json, or left out")
    for name in event.keys() - _ATTRIBUTES:
        if not (name.isascii() and name.isalnum() and name == name.lower()):
            raise InvalidRequest(name, "", "left out: names of extensions are lower-case letters and digits")
    data = event.get("data")
    if isinstance(data, int) and not isinstance(data, bool):
        data = {"quantity": data}
    if not isinstance(data, dict):
        raise InvalidRequest("data", None, _OBJECT_OR_NUMBER)
    unknown = next((name for name in data if name not in _DATA), None)
    if unknown is not None:
        raise InvalidRequest(f"data.{unknown}", "", "left out: a usage event has no such field there")
    time = {"occurred_at": event["time"]} if event.get("time") is not None else {}
    meter = {"meter": event["type"].rpartition(".")[2]}
    fields = {"event_id": event["id"], "user_id": event["subject"], "source": event["source"], **time, **meter, **data}
    traceparent = event.get("traceparent")
    return Mapped(fields, traceparent if isinstance(traceparent, str) else None)


def place_of(field: str, event: Mapping[str, Any]) -> str:
    """Return where a CloudEvent has a field of its usage event."""
    name, dot, rest = field.partition(".")
    data = event.get("data")
    if name == "meter" and not (isinstance(data, dict) and "meter" in data):
        return "type"
    if name == "quantity" and not isinstance(data, dict):
        return "data"
    return PLACES.get(name, name) + dot + rest


def in_headers(headers: Iterable[tuple[str, str]], media: str, data: Any) -> dict[str, Any]:
    """Return the CloudEvent of a request in binary mode: attributes are headers, the body is its data.

    Raises InvalidRequest for a header that is no percent-encoded UTF-8.
    """
    event: dict[str, Any] = {"datacontenttype": media, "data": data}
    for header, value in headers:
        if header.startswith(HEADER):
            try:
                event[header.removeprefix(HEADER)] = unquote(value, errors="strict")
            except UnicodeDecodeError:
                raise InvalidRequest(header, "", "UTF-8, with percent-encoding") from None
    return event


def is_json(media: object) -> bool:
    """Return True for the media type of JSON, whatever its parameters."""
    if not isinstance(media, str):
        return False
    kind = media.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
