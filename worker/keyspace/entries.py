"""Entries of a stream as bytes: what a producer writes, and what a refused one still tells."""

from __future__ import annotations

import json
import re
from typing import Any

from schemas.events import (
    ID_PATTERN,
    MAX_ENTRY_BYTES,
    MAX_ENTRY_FIELDS,
    MAX_PAYLOAD_BYTES,
    METER_PATTERN,
    WIRE_VERSION,
)
from worker.keyspace.signatures import Signer

# Id and flat list of fields as they were read. One that is larger than any event may be can come with nothing but the
# beginning of its field e, or of all its fields where it has none; third is then how many bytes that had.
RawEntry = tuple[bytes, list[bytes]] | tuple[bytes, list[bytes], int]

# The last possible id: none can follow it, and Redis refuses to read after it.
LAST_ID = "18446744073709551615-18446744073709551615"

# Both parts of an id are below 2^64.
_LAST_NUMBER = 2**64 - 1

TOO_LARGE = f"at most {MAX_ENTRY_BYTES} bytes in {MAX_ENTRY_FIELDS} fields"

_is_identifier = re.compile(ID_PATTERN).fullmatch
_is_meter = re.compile(METER_PATTERN).fullmatch


def kept_of(entry: RawEntry) -> tuple[bytes, int]:
    """What a dead letter keeps of an entry, its field e or else all fields, cut to 64 KiB; and how long that was."""
    if len(entry) == 3:
        return entry[1][1], entry[2]
    flat = entry[1]
    payload = dict(zip(flat[::2], flat[1::2], strict=False)).get(b"e")
    kept = b"\n".join(flat) if payload is None else payload
    return kept[:MAX_PAYLOAD_BYTES], len(kept)


def owner_of(payload: bytes) -> tuple[str, str, str] | None:
    """(user, meter, event id) that a refused payload names, if it names them: what our scripts counted as pending."""
    try:
        value = json.loads(payload, parse_int=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    # Only what could have been counted may become part of a key: a meter with a colon would name another user's.
    rules = {"user_id": _is_identifier, "meter": _is_meter, "event_id": _is_identifier}
    texts = [value[name] for name, rule in rules.items() if isinstance(value.get(name), str) and rule(value[name])]
    return (texts[0], texts[1], texts[2]) if len(texts) == len(rules) else None


def plain_entry(payload: bytes, signer: Signer | None, traceparent: str | None = None) -> dict[Any, Any]:
    """The fields of an entry as a producer in any language makes them, signed where there is a key."""
    fields: dict[Any, Any] = {"v": WIRE_VERSION, "e": payload}
    if signer is not None:
        fields["s"] = signer.sign(payload)
    return fields if traceparent is None else {**fields, "t": traceparent}


def follower_of(entry_id: str) -> str:
    """Return the smallest id that may follow `entry_id`, which is not `LAST_ID`."""
    ms, _, number = entry_id.partition("-")
    return f"{ms}-{int(number) + 1}" if int(number) < _LAST_NUMBER else f"{int(ms) + 1}-0"
