"""Trace contexts as they travel with an event: the `traceparent` of W3C Trace Context.

A trace decides nothing: whoever may write an entry may write any trace, and a wrong one counts as none.
"""

from __future__ import annotations

import re

MAX_TRACEPARENT_LENGTH = 128
# Version, trace id, span id, flags; a later version may add fields.
TRACEPARENT_PATTERN = r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[0-9a-z-]{0,72})?$"
_LENGTH_OF_VERSION_0 = 55
_is_traceparent = re.compile(TRACEPARENT_PATTERN, re.ASCII).fullmatch


def traceparent_of(value: object) -> str | None:
    """Return text or bytes as a `traceparent`; None for whatever is none. Never raises."""
    if isinstance(value, bytes):
        value = value[: MAX_TRACEPARENT_LENGTH + 1].decode("latin-1")
    if not isinstance(value, str) or len(value) > MAX_TRACEPARENT_LENGTH or not _is_traceparent(value):
        return None
    is_longer, version = len(value) > _LENGTH_OF_VERSION_0, value[:2]
    if version == "ff" or (version == "00" and is_longer):
        return None
    # Ids of zeros name nothing.
    return value if value[3:35].strip("0") and value[36:52].strip("0") else None


def trace_id_of(traceparent: str | None) -> str | None:
    """Return the 32 hexadecimal digits that name the trace."""
    return traceparent[3:35] if traceparent else None


def span_id_of(traceparent: str) -> str:
    """Return the 16 hexadecimal digits that name the span of the producer."""
    return traceparent[36:52]
