"""Payloads of events, good and bad, as bytes."""

from __future__ import annotations

import json
from typing import Any

from schemas.events import MAX_AMOUNT, MAX_PAYLOAD_BYTES, Refusal

MINIMAL: dict[str, Any] = {"event_id": "e1", "user_id": "u1", "meter": "credits", "quantity": 7}


def payload(**changes: Any) -> bytes:
    """The minimal event with some fields changed; a field changed to `...` is left out."""
    return json.dumps({name: value for name, value in {**MINIMAL, **changes}.items() if value is not ...}).encode()


def raw(field: str, text: str | bytes) -> bytes:
    """The minimal event with the value of one field written exactly so."""
    members = {name: json.dumps(value).encode() for name, value in MINIMAL.items()}
    members[field] = text.encode() if isinstance(text, str) else text
    return b"{" + b",".join(b'"%s":%s' % (name.encode(), value) for name, value in members.items()) + b"}"


DEEP = b"[" * 30_000
REFUSALS: list[tuple[Refusal, str, bytes]] = [
    (Refusal.TOO_LARGE, "one byte too many", payload()[:-1] + b" " * (MAX_PAYLOAD_BYTES - len(payload()) + 1) + b"}"),
    (Refusal.TOO_LARGE, "10 MB", payload(source="x" * 10_000_000)),
    (Refusal.TOO_LARGE, "100,000 deep", b"[" * 100_000 + b"]" * 100_000),
    (Refusal.NOT_UTF8, "lone byte", raw("source", b'"\xff"')),
    (Refusal.NOT_UTF8, "encoded surrogate", raw("source", b'"\xed\xa0\x80"')),
    (Refusal.NOT_UTF8, "UTF-16", payload().decode().encode("utf-16")),
    (Refusal.NOT_UTF8, "in a dimension", raw("dimensions", b'{"a":"\xc3"}')),
    (Refusal.NOT_JSON, "empty", b""),
    (Refusal.NOT_JSON, "words", b"not json"),
    (Refusal.NOT_JSON, "byte order mark", b"\xef\xbb\xbf" + payload()),
    (Refusal.NOT_JSON, "cut off", payload()[:-1]),
    (Refusal.NOT_JSON, "two values", payload() + payload()),
    (Refusal.NOT_JSON, "single quotes", payload().replace(b'"', b"'")),
    (Refusal.NOT_JSON, "trailing comma", payload()[:-1] + b",}"),
    (Refusal.NOT_JSON, "raw NUL", raw("user_id", b'"a\x00b"')),
    (Refusal.NOT_JSON, "raw line end", raw("user_id", b'"a\r\nb"')),
    (Refusal.NOT_JSON, "raw tab in a dimension", raw("dimensions", b'{"a":"\t"}')),
    (Refusal.NOT_JSON, "NaN", raw("quantity", "NaN")),
    (Refusal.NOT_JSON, "Infinity", raw("quantity", "-Infinity")),
    (Refusal.NOT_JSON, "NaN in a dimension", raw("dimensions", '{"a":NaN}')),
    (Refusal.NOT_JSON, "leading zero", raw("quantity", "01")),
    (Refusal.NOT_JSON, "5,000 digits", raw("quantity", "1" * 5_000)),
    (Refusal.NOT_JSON, "lone surrogate", raw("source", r'"\ud800"')),
    (Refusal.TOO_DEEP, "arrays", DEEP + b"]" * 30_000),
    (Refusal.TOO_DEEP, "arrays that never end", DEEP),
    (Refusal.TOO_DEEP, "objects", b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    (Refusal.TOO_DEEP, "in a field", raw("dimensions", DEEP + b"]" * 30_000)),
    (Refusal.DUPLICATE_KEY, "first and last", payload()[:-1] + b',"quantity":8}'),
    (Refusal.DUPLICATE_KEY, "the same value", payload()[:-1] + b',"quantity":7}'),
    (Refusal.DUPLICATE_KEY, "escaped", payload()[:-1] + rb',"quantit\u0079":8}'),
    (Refusal.DUPLICATE_KEY, "space before the colon", payload()[:-1] + b',"quantity" :8}'),
    (Refusal.DUPLICATE_KEY, "tab before the colon", payload()[:-1] + b',"quantity"\t:8}'),
    (Refusal.DUPLICATE_KEY, "line end before the colon", payload()[:-1] + b',"quantity"\r\n:8}'),
    (Refusal.DUPLICATE_KEY, "a null first", b'{"source":null,' + payload(source="x")[1:]),
    (Refusal.DUPLICATE_KEY, "a null last", payload(source="x")[:-1] + b',"source":null}'),
    (Refusal.DUPLICATE_KEY, "of dimensions", raw("dimensions", '{"a":1,"a":2}')),
    (Refusal.DUPLICATE_KEY, "of dimensions, escaped", raw("dimensions", r'{"a":1,"\u0061":2}')),
    (Refusal.DUPLICATE_KEY, "of dimensions, blank", raw("dimensions", '{"a":1,"a" :2}')),
    (Refusal.DUPLICATE_KEY, "dimensions themselves", payload(dimensions={"a": 1})[:-1] + b',"dimensions":{}}'),
    (Refusal.DUPLICATE_KEY, "an unknown field", payload()[:-1] + b',"x":1,"x":1}'),
    (Refusal.DUPLICATE_KEY, "a lone surrogate", payload()[:-1] + rb',"\ud800":1,"\ud800":2}'),
    (Refusal.NOT_AN_OBJECT, "array", b"[]"),
    (Refusal.NOT_AN_OBJECT, "text", b'"x"'),
    (Refusal.NOT_AN_OBJECT, "number", b"7"),
    (Refusal.NOT_AN_OBJECT, "null", b"null"),
    (Refusal.UNKNOWN_FIELD, "extra", payload(colour="red")),
    (Refusal.UNKNOWN_FIELD, "other case", payload(Source="x")),
    *((Refusal.MISSING_FIELD, name, payload(**{name: ...})) for name in MINIMAL),
    (Refusal.MISSING_FIELD, "empty object", b"{}"),
    (Refusal.BAD_EVENT_ID, "empty", payload(event_id="")),
    (Refusal.BAD_EVENT_ID, "too long", payload(event_id="a" * 129)),
    (Refusal.BAD_EVENT_ID, "number", payload(event_id=7)),
    (Refusal.BAD_EVENT_ID, "hash", payload(event_id="a#b")),
    (Refusal.BAD_USER_ID, "braces", payload(user_id="{p1}:x")),
    (Refusal.BAD_USER_ID, "line end", payload(user_id="a\r\nFLUSHALL")),
    (Refusal.BAD_USER_ID, "trailing line end", payload(user_id="a\n")),
    (Refusal.BAD_USER_ID, "NUL", payload(user_id="a\x00b")),
    (Refusal.BAD_USER_ID, "right-to-left mark", payload(user_id="a\u202eb")),
    (Refusal.BAD_USER_ID, "right-to-left mark, as it is", raw("user_id", '"a\u200fb"')),
    (Refusal.BAD_USER_ID, "10 kB", payload(user_id="a" * 10_000)),
    (Refusal.BAD_USER_ID, "letters of another alphabet", payload(user_id="ａｂｃ")),
    (Refusal.BAD_USER_ID, "null", payload(user_id=None)),
    (Refusal.BAD_METER, "capital", payload(meter="Credits")),
    (Refusal.BAD_METER, "too long", payload(meter="a" * 65)),
    (Refusal.BAD_METER, "a pattern of Lua", payload(meter=".+")),
    (Refusal.UNKNOWN_METER, "well formed", payload(meter="cups_of_tea")),
    (Refusal.BAD_QUANTITY, "-1", raw("quantity", "-1")),
    (Refusal.BAD_QUANTITY, "2^63", raw("quantity", str(2**63))),
    (Refusal.BAD_QUANTITY, "2^64", raw("quantity", str(2**64))),
    (Refusal.BAD_QUANTITY, "one too many", raw("quantity", str(MAX_AMOUNT + 1))),
    (Refusal.BAD_QUANTITY, "1e400", raw("quantity", "1e400")),
    (Refusal.BAD_QUANTITY, "1e3", raw("quantity", "1e3")),
    (Refusal.BAD_QUANTITY, "1.0", raw("quantity", "1.0")),
    (Refusal.BAD_QUANTITY, "true", raw("quantity", "true")),
    (Refusal.BAD_QUANTITY, "text", raw("quantity", '"1"')),
    (Refusal.BAD_QUANTITY, "null", raw("quantity", "null")),
    (Refusal.BAD_QUANTITY, "1,000 digits", raw("quantity", "1" * 1_000)),
    (Refusal.BAD_MULTIPLIER, "number", payload(multiplier=1.5)),
    (Refusal.BAD_MULTIPLIER, "negative", payload(multiplier="-1")),
    (Refusal.BAD_MULTIPLIER, "seven places", payload(multiplier="1.1234567")),
    (Refusal.BAD_MULTIPLIER, "exponent", payload(multiplier="1e3")),
    (Refusal.BAD_MULTIPLIER, "empty", payload(multiplier="")),
    (Refusal.BAD_MULTIPLIER, "trailing line end", payload(multiplier="1\n")),
    (Refusal.BAD_MULTIPLIER, "digits of another alphabet", raw("multiplier", '"١"')),
    (Refusal.AMOUNT_OUT_OF_RANGE, "own multiplier", payload(quantity=MAX_AMOUNT, multiplier="1.000001")),
    (Refusal.AMOUNT_OUT_OF_RANGE, "catalogue's", payload(quantity=MAX_AMOUNT, dimensions={"model_slug": "m2"})),
    (Refusal.BAD_OCCURRED_AT, "no zone", payload(occurred_at="2026-11-20T10:00:00")),
    (Refusal.BAD_OCCURRED_AT, "leap second", payload(occurred_at="2026-11-20T10:00:60Z")),
    (Refusal.BAD_OCCURRED_AT, "24 o'clock", payload(occurred_at="2026-11-20T24:00:00Z")),
    (Refusal.BAD_OCCURRED_AT, "February 30", payload(occurred_at="2026-02-30T10:00:00Z")),
    (Refusal.BAD_OCCURRED_AT, "a day ahead of UTC", payload(occurred_at="2026-11-20T10:00:00+24:00")),
    (Refusal.BAD_OCCURRED_AT, "number", payload(occurred_at=1_763_632_800)),
    (Refusal.BAD_OCCURRED_AT, "words", payload(occurred_at="now")),
    (Refusal.TOO_OLD, "last year", payload(occurred_at="2025-11-20T10:00:00Z")),
    (Refusal.BAD_SOURCE, "too long", payload(source="a" * 257)),
    (Refusal.BAD_SOURCE, "control character", payload(source="a\nb")),
    (Refusal.BAD_SOURCE, "delete, as it is", raw("source", '"\x7f"')),
    (Refusal.BAD_REFERENCE_ID, "too long", payload(reference_id="ü" * 257)),
    (Refusal.BAD_REFERENCE_ID, "number", payload(reference_id=1)),
    (Refusal.BAD_HOLD_KEY, "hash", payload(hold_key="a#b")),
    (Refusal.BAD_HOLD_KEY, "empty", payload(hold_key="")),
    (Refusal.BAD_DIMENSIONS, "33 keys", payload(dimensions={f"k{i}": i for i in range(33)})),
    (Refusal.BAD_DIMENSIONS, "over 2 KiB", payload(dimensions={"k": "x" * 2_048})),
    (Refusal.BAD_DIMENSIONS, "nested", payload(dimensions={"k": {"a": 1}})),
    (Refusal.BAD_DIMENSIONS, "list", payload(dimensions=[1])),
    (Refusal.BAD_DIMENSIONS, "NUL", payload(dimensions={"k": "\x00"})),
    (Refusal.BAD_DIMENSIONS, "NUL in a key", payload(dimensions={"\x00": "k"})),
    (Refusal.BAD_DIMENSIONS, "1e400", raw("dimensions", '{"k":1e400}')),
]  # fmt: skip
