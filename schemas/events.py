"""The usage event as it travels, and every limit of the wire format.

`UsageEvent` is the one definition of a valid event: producers build it, the published JSON Schema derives from it, and
the worker's faster decoder accepts no event that this model refuses. A `StreamEntry` carries it.
"""

from __future__ import annotations

import json
import math
import re
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from schemas import codes
from schemas.traces import MAX_TRACEPARENT_LENGTH, TRACEPARENT_PATTERN, traceparent_of

# Why an entry is a dead letter.
Refusal = codes.Refusal
SIGNATURE_REFUSALS = codes.SIGNATURE_REFUSALS

WIRE_VERSION = b"1"
MAX_PAYLOAD_BYTES = 65_536
# Names and values of an entry together, with room for version, mark and signature beside the event.
MAX_ENTRY_BYTES = MAX_PAYLOAD_BYTES + 1_024
MAX_ENTRY_FIELDS = 16
MAX_AMOUNT = 10**12
MAX_TOTAL = 9 * 10**15  # Lua counts exactly below 2^53.
MAX_DIMENSIONS = 32
MAX_DIMENSIONS_BYTES = 2_048

# In pydantic's engine and in JSON Schema `$` is the very end of the text; in Python's re it is not: use fullmatch.
ID_CHARACTERS = r"A-Za-z0-9._:@|+=/\-"
ID_PATTERN = rf"^[{ID_CHARACTERS}]{{1,128}}$"
METER_PATTERN = r"^[a-z0-9_]{1,64}$"
MARK_PATTERN = r"^1(/[a-z0-9_]{1,64})?$"
MULTIPLIER_PATTERN = r"^(0|[1-9][0-9]{0,5})(\.[0-9]{1,6})?$"
# RFC 3339: a date, a time and an offset.
TIME_PATTERN = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})$"
TEXT_PATTERN = r"^[^\x00-\x1f\x7f]{0,256}$"
KEY_ID_PATTERN = r"^[A-Za-z0-9._-]{1,32}$"
SIGNATURE_PATTERN = r"^[A-Za-z0-9._-]{1,32}:[0-9a-f]{64}$"

# What fields take, as messages say it after "must be".
ID_ALLOWED = "1 to 128 characters of A-Z a-z 0-9 . _ : @ | + = / -"
MULTIPLIER_ALLOWED = 'decimal text such as "1.5", with up to 6 digits on each side'
TIME_ALLOWED = "a date, a time and an offset, as in 2026-11-20T10:00:00Z"
DIMENSIONS_ALLOWED = "a dict of names and values"
ALLOWED = {
    "event_id": ID_ALLOWED,
    "user_id": ID_ALLOWED,
    "hold_key": ID_ALLOWED,
    "meter": "1 to 64 characters of a-z 0-9 _",
    "quantity": f"a whole number from 0 to {MAX_AMOUNT}",
    "multiplier": MULTIPLIER_ALLOWED,
    "occurred_at": TIME_ALLOWED,
    "source": "text of at most 256 characters, without control characters",
    "reference_id": "text of at most 256 characters, without control characters",
    "dimensions": DIMENSIONS_ALLOWED,
}

Identifier = Annotated[str, Field(pattern=ID_PATTERN)]
MeterCode = Annotated[str, Field(pattern=METER_PATTERN)]
Amount = Annotated[int, Field(ge=0, le=MAX_AMOUNT, strict=True)]
Scalar = str | int | float | bool | None

# Made once: json.dumps with these arguments makes an encoder for every event.
_compact_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def multiplied(quantity: int, multiplier: str) -> int:
    """Return the amount billed for `quantity` units: floor(quantity × multiplier), exact.

    `multiplier` is decimal text.
    """
    if multiplier == "1":
        return quantity
    numerator, denominator = ratio(multiplier)
    return quantity * numerator // denominator


def is_too_much(quantity: int, multiplier: str) -> bool:
    """True if quantity × multiplier is more than an event may cost, be it by a fraction."""
    numerator, denominator = ratio(multiplier)
    return quantity * numerator > MAX_AMOUNT * denominator


@lru_cache(maxsize=4_096)
def ratio(multiplier: str) -> tuple[int, int]:
    """Return decimal text as a numerator and a denominator, in lowest terms."""
    return Decimal(multiplier).as_integer_ratio()


@lru_cache(maxsize=4_096)
def canonical_multiplier(multiplier: str) -> str:
    """Return the shortest text of a decimal ("1.50" → "1.5"): equal multipliers make equal fingerprints."""
    return multiplier.rstrip("0").rstrip(".") if "." in multiplier else multiplier


class UsageEvent(BaseModel):
    """A fact that already happened: a user used `quantity` units. Workers record it at any balance.

    (`user_id`, `event_id`) identifies it for ever. Meter, quantity and multiplier are its fingerprint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    event_id: Identifier = Field(description="unique per user, for ever")
    user_id: Identifier = Field(description="the account to bill")
    meter: MeterCode = Field(description="the meter that counts the usage")
    quantity: Amount = Field(description="whole units, before the multiplier")
    multiplier: str | None = Field(
        None,
        pattern=MULTIPLIER_PATTERN,
        description="decimal text; default: the catalogue's for dimensions.model_slug, else 1",
    )
    occurred_at: AwareDatetime | None = Field(
        None, strict=False, description="time of the work; default: the time of arrival"
    )
    source: str | None = Field(None, pattern=TEXT_PATTERN, description="the service that did the work")
    reference_id: str | None = Field(None, pattern=TEXT_PATTERN, description="the producer's own reference")
    hold_key: Identifier | None = Field(None, description="the hold that this event closes once a worker applies it")
    dimensions: dict[str, Scalar] | None = Field(
        None, max_length=MAX_DIMENSIONS, description="flat facts for reports, at most 2 KiB as JSON"
    )
    # Not a part of the event: it travels beside it, in the field `t` of the stream entry.
    _traceparent: str | None = PrivateAttr(None)

    @property
    def traceparent(self) -> str | None:
        """The trace that the event travels with, if it has one of its own."""
        return self._traceparent

    def traced(self, traceparent: str | None) -> UsageEvent:
        """Return the same event in the trace of `traceparent` (W3C); in none of its own if that is none."""
        traced = self.model_copy()
        traced._traceparent = traceparent_of(traceparent)  # noqa: SLF001 - its own
        return traced

    @field_validator("multiplier", mode="before")
    @classmethod
    def _decimal_as_text(cls, value: Any) -> Any:
        return format(value, "f") if isinstance(value, Decimal) else value

    @field_validator("occurred_at", mode="before")
    @classmethod
    def _time_as_written(cls, value: Any) -> Any:
        if value is None or isinstance(value, datetime):
            return value
        if isinstance(value, str) and re.fullmatch(TIME_PATTERN, value):
            return value
        raise ValueError(f"must be {TIME_ALLOWED}")

    @field_validator("dimensions", mode="after")
    @classmethod
    def _dimensions_fit(cls, value: dict[str, Scalar] | None) -> dict[str, Scalar] | None:
        if value is not None:
            check_dimensions(value)
        return value

    @model_validator(mode="after")
    def _amount_in_range(self) -> UsageEvent:
        if self.multiplier is not None and is_too_much(self.quantity, self.multiplier):
            raise ValueError(f"quantity × multiplier: at most {MAX_AMOUNT}")
        return self


def check_dimensions(value: dict[str, Scalar]) -> None:
    """Raise ValueError unless Postgres and JSON can hold these dimensions and they are small enough.

    The size is that of compact JSON in UTF-8.
    """
    if any("\x00" in part for item in value.items() for part in item if isinstance(part, str)):
        raise ValueError("must be free of NUL characters")
    if any(isinstance(part, float) and not math.isfinite(part) for part in value.values()):
        raise ValueError("must be free of NaN and infinite numbers")
    try:
        size = len(_compact_json(value).encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError("must be free of lone surrogates, which UTF-8 does not have") from None
    if size > MAX_DIMENSIONS_BYTES:
        raise ValueError(f"must be at most {MAX_DIMENSIONS_BYTES} bytes as JSON")


class StreamEntry(BaseModel):
    """The fields of an entry in a partition's stream, as XADD takes them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    v: Literal["1"] = Field(description="version of the wire format")
    e: str = Field(description=f"a usage event as JSON in UTF-8, at most {MAX_PAYLOAD_BYTES} bytes")
    s: str | None = Field(
        None,
        pattern=SIGNATURE_PATTERN,
        description="signature: the id of a key, a colon, and in hexadecimal the HMAC-SHA256 over the bytes of e; "
        "the text of the secret is the HMAC's key",
    )
    m: str | None = Field(
        None,
        pattern=MARK_PATTERN,
        description="only in entries that our scripts counted as pending; with /backend, against its sub-cap also",
    )
    t: str | None = Field(
        None,
        pattern=TRACEPARENT_PATTERN,
        max_length=MAX_TRACEPARENT_LENGTH,
        description="traceparent of W3C Trace Context; the usage log keeps its trace id. It is not signed and decides "
        "nothing: a wrong one is ignored",
    )
