"""Intake: the bytes of a stream entry → an event, a refusal with a reason, or a refresh (a request to publish).

Intake never raises on bad input: every entry becomes exactly one of the three. Almost all events take a fast path that
accepts only plainly valid bytes. `UsageEvent` itself judges all others, and gives the reason. So one definition of
valid exists, and the decoder is only a short cut to it. Before it parses a payload, intake checks its size, and its
signature if signatures are on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import msgspec
from pydantic import ValidationError

from config.catalogue import Catalogue
from config.settings import Settings
from schemas.events import (
    ID_PATTERN,
    MAX_AMOUNT,
    MAX_DIMENSIONS,
    MAX_DIMENSIONS_BYTES,
    MAX_ENTRY_BYTES,
    MAX_ENTRY_FIELDS,
    MAX_PAYLOAD_BYTES,
    METER_PATTERN,
    MULTIPLIER_PATTERN,
    WIRE_VERSION,
    Refusal,
    UsageEvent,
    canonical_multiplier,
    multiplied,
)
from worker.errors import Rejected
from worker.keyspace.entries import TOO_LARGE, RawEntry, kept_of, owner_of
from worker.keyspace.keys import Partition, partition_of
from worker.keyspace.signatures import SignatureCheck
from worker.rules.received import Event, Received, Refresh, Refused

# Longest multiplier: six digits, a point, six digits.
_MULTIPLIER_LENGTH = 13
# Redis takes any entry id, but dates end. This is far enough from their end for every setting.
_LAST_MILLISECOND = 221_845_392_000_000
_TEXT_LIMIT = 256

_is_identifier = re.compile(ID_PATTERN).fullmatch
_is_multiplier = re.compile(MULTIPLIER_PATTERN).fullmatch
_is_meter = re.compile(METER_PATTERN).fullmatch
# In UTC and up to microseconds: every library reads it alike, so Postgres gets the text as it is.
_is_plain_time = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)", re.ASCII).fullmatch

_REFUSAL_OF_FIELD = {
    "event_id": Refusal.BAD_EVENT_ID,
    "user_id": Refusal.BAD_USER_ID,
    "meter": Refusal.BAD_METER,
    "quantity": Refusal.BAD_QUANTITY,
    "multiplier": Refusal.BAD_MULTIPLIER,
    "occurred_at": Refusal.BAD_OCCURRED_AT,
    "source": Refusal.BAD_SOURCE,
    "reference_id": Refusal.BAD_REFERENCE_ID,
    "hold_key": Refusal.BAD_HOLD_KEY,
    "dimensions": Refusal.BAD_DIMENSIONS,
}


# The fields of `emit` and of most plain producers, in their order. For any other list, intake looks fields up by name.
_USUAL_FIELDS = ([b"v", b"e", b"m"], [b"v", b"e"], [b"v", b"e", b"m", b"s"], [b"v", b"e", b"s"])
_NO_FIELDS: dict[bytes, bytes] = {}


class _Wire(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """A decoded event. It leaves floats in dimensions to the model: Postgres cannot hold each as written."""

    event_id: str
    user_id: str
    meter: str
    quantity: int
    multiplier: str | None = None
    occurred_at: str | None = None
    source: str | None = None
    reference_id: str | None = None
    hold_key: str | None = None
    dimensions: dict[str, str | int | bool | None] | None = None


_decode = msgspec.json.Decoder(_Wire).decode
_encode = msgspec.json.Encoder().encode


class _NotPlain(Exception):
    """The fast path cannot vouch for this payload; the model decides."""


class Intake:
    """Turns raw entries of one partition into events and refusals."""

    def __init__(self, partition: Partition, settings: Settings, catalogue: Catalogue) -> None:
        self._partition = partition
        self._partitions = settings.partitions
        self._catalogue = catalogue
        self._meters = frozenset(catalogue.meters)
        self._own_users: set[str] = set()
        self._max_age = timedelta(days=settings.event_max_age_days)
        self._max_ahead = timedelta(seconds=settings.event_max_ahead_seconds)
        self._signatures = SignatureCheck(settings)

    def receive(self, entries: Sequence[RawEntry]) -> Iterator[Received]:
        """Judge `entries` in order; yield one result for each. Never raises."""
        if not entries:
            return
        # Entry ids ascend, so these bounds are safe for every entry of the chunk; the exact ones cost a date each.
        earliest = _time_of(entries[-1][0]) - self._max_age
        latest = _time_of(entries[0][0]) + self._max_ahead
        check_signatures = self._signatures.is_on
        for entry in entries:
            raw_id, flat = entry[0], entry[1]
            entry_id = raw_id.decode("ascii")
            names = flat[::2]
            fields = _NO_FIELDS if names in _USUAL_FIELDS else dict(zip(names, flat[1::2], strict=False))
            payload = flat[3] if fields is _NO_FIELDS else fields.get(b"e")
            marked = b"m" in names
            signed_by = None
            try:
                if len(entry) == 3 or sum(map(len, flat)) > MAX_ENTRY_BYTES or len(flat) > 2 * MAX_ENTRY_FIELDS:
                    raise Rejected(Refusal.TOO_LARGE, TOO_LARGE)
                if payload is None and b"r" in fields:
                    yield Refresh(entry_id, self._own_user(fields[b"r"].decode("utf-8", "replace")))
                    continue
                if (flat[1] if fields is _NO_FIELDS else fields.get(b"v")) != WIRE_VERSION:
                    raise Rejected(Refusal.BAD_VERSION, f"field v: must be {WIRE_VERSION.decode()}")
                if payload is None:
                    raise Rejected(Refusal.NO_PAYLOAD, "field e: missing")
                if len(payload) > MAX_PAYLOAD_BYTES:
                    raise Rejected(Refusal.TOO_LARGE, f"{len(payload)} bytes; at most {MAX_PAYLOAD_BYTES}")
                if check_signatures:
                    usual = flat[-1] if names[-1] == b"s" else None
                    signature = usual if fields is _NO_FIELDS else fields.get(b"s")
                    signed_by = self._signatures.signed_by(payload, signature, _milliseconds_of(raw_id))
                try:
                    yield self._plain(entry_id, raw_id, marked, payload, earliest, latest, signed_by)
                except (_NotPlain, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    yield self._judged(entry_id, raw_id, marked, payload, signed_by)
            except Rejected as refused:
                kept, size = kept_of(entry)
                owner = owner_of(kept) if marked and len(kept) == size else None
                yield Refused(entry_id, refused.reason, refused.detail, kept, size, owner, signed_by)

    def _plain(
        self,
        entry_id: str,
        raw_id: bytes,
        marked: bool,
        payload: bytes,
        earliest: datetime,
        latest: datetime,
        signed_by: str | None = None,
    ) -> Event:
        """Accept a plainly valid event. Raises _NotPlain if a rule needs a closer look."""
        wire = _decode(payload)
        # The shortest form of an event is as long as the payload without blanks only if the payload has no nulls and
        # no repeated key: each of these needs bytes.
        shortest = len(_encode(wire))
        if shortest != len(payload) and shortest != len(msgspec.json.format(payload, indent=-1)):
            raise _NotPlain
        facts = wire.dimensions
        dimensions = None
        if facts is not None:
            dimensions = _encode(facts)
            # An escape may be a NUL, which Postgres does not store.
            if len(dimensions) > MAX_DIMENSIONS_BYTES or len(facts) > MAX_DIMENSIONS or b"\\" in dimensions:
                raise _NotPlain
        multiplier = wire.multiplier
        if multiplier is None:
            multiplier = self._catalogue.multiplier(facts.get("model_slug") if facts else None)
        factor = _known_multiplier(multiplier)
        quantity = wire.quantity
        if factor is None or not 0 <= quantity <= MAX_AMOUNT:
            raise _NotPlain
        amount = multiplied(quantity, factor)

        occurred_at = wire.occurred_at
        if occurred_at is None:
            occurred_at = _time_of(raw_id).isoformat()
        elif not earliest <= _plain_time(occurred_at) <= latest:
            raise _NotPlain
        user_id, event_id, meter, hold_key = wire.user_id, wire.event_id, wire.meter, wire.hold_key
        if (
            amount > MAX_AMOUNT
            or meter not in self._meters
            or not (user_id in self._own_users or self._is_own_user(user_id))
            or not _is_identifier(event_id)
            or not (hold_key is None or _is_identifier(hold_key))
            or not (_is_plain_text(wire.source) and _is_plain_text(wire.reference_id))
        ):
            raise _NotPlain
        # By position: named fields would cost 4 % of a drain. `_judged` names them, and tests hold both equal.
        return Event(
            entry_id, marked, user_id, event_id, meter, quantity, factor, amount, occurred_at, False,
            wire.source, wire.reference_id, hold_key, dimensions.decode() if dimensions else None, payload, signed_by,
        )  # fmt: skip

    def _judged(
        self, entry_id: str, raw_id: bytes, marked: bool, payload: bytes, signed_by: str | None = None
    ) -> Event:
        """Judge a payload by the model. Raises Rejected with the reason."""
        event = parse_event(payload)
        if event.meter not in self._meters:
            raise Rejected(Refusal.UNKNOWN_METER, f"meter: {event.meter} is not in the catalogue")
        self._own_user(event.user_id)
        facts = event.dimensions or {}
        multiplier = canonical_multiplier(event.multiplier or self._catalogue.multiplier(facts.get("model_slug")))
        amount = multiplied(event.quantity, multiplier)
        if amount > MAX_AMOUNT:
            raise Rejected(Refusal.AMOUNT_OUT_OF_RANGE, f"quantity × multiplier: at most {MAX_AMOUNT}")
        entered_at = _time_of(raw_id)
        occurred_at = event.occurred_at or entered_at
        if occurred_at < entered_at - self._max_age:
            raise Rejected(Refusal.TOO_OLD, f"occurred_at: older than {self._max_age.days} days")
        clamped = occurred_at > entered_at + self._max_ahead
        dimensions = None
        if event.dimensions is not None:
            dimensions = json.dumps(event.dimensions, separators=(",", ":"), ensure_ascii=False)
        return Event(
            entry_id=entry_id,
            marked=marked,
            user_id=event.user_id,
            event_id=event.event_id,
            meter=event.meter,
            quantity=event.quantity,
            multiplier=multiplier,
            amount=amount,
            occurred_at=(entered_at if clamped else occurred_at.astimezone(UTC)).isoformat(),
            clamped=clamped,
            source=event.source,
            reference_id=event.reference_id,
            hold_key=event.hold_key,
            dimensions=dimensions,
            payload=payload,
            signed_by=signed_by,
        )

    def _own_user(self, user_id: str) -> str:
        """Return the user id. Raises Rejected unless it is one of this partition.

        No other partition keeps the order of its events.
        """
        if not _is_identifier(user_id):
            raise Rejected(Refusal.BAD_USER_ID, f"user_id: must match {ID_PATTERN}")
        wanted = partition_of(user_id, self._partitions)
        if wanted != self._partition:
            raise Rejected(Refusal.WRONG_PARTITION, f"user_id: belongs to partition {wanted.number}")
        return user_id

    def _is_own_user(self, user_id: str) -> bool:
        """True for a user of this partition; remembers it as long as the drain lasts."""
        own = bool(_is_identifier(user_id)) and partition_of(user_id, self._partitions) == self._partition
        if own:
            self._own_users.add(user_id)
        return own


def parse_event(payload: bytes) -> UsageEvent:
    """Parse a payload whose size is checked. Raises Rejected.

    The structure comes first. Rejected names the first rule that the payload breaks.
    """
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(Refusal.NOT_UTF8, str(error)) from None
    try:
        # Numbers stay text: only the structure counts here, and 5,000 digits are not worth a conversion.
        value = json.loads(text, object_pairs_hook=_no_repeats, parse_int=str, parse_float=str, parse_constant=_no_nan)
    except RecursionError:
        raise Rejected(Refusal.TOO_DEEP, "nested too deeply") from None
    except ValueError as error:
        raise Rejected(Refusal.NOT_JSON, str(error)) from None
    if not isinstance(value, dict):
        raise Rejected(Refusal.NOT_AN_OBJECT, f"expected an object, got {type(value).__name__}")
    try:
        return UsageEvent.model_validate_json(payload)
    except ValidationError as error:
        raise _rejection(error) from None


def _rejection(error: ValidationError) -> Rejected:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ")
    detail = f"{'.'.join(str(part) for part in first['loc'])}: {message}" if field else message
    if first["type"] == "extra_forbidden":
        return Rejected(Refusal.UNKNOWN_FIELD, detail)
    if first["type"] == "missing":
        return Rejected(Refusal.MISSING_FIELD, detail)
    if first["type"] == "json_invalid" and "recursion" in message:
        return Rejected(Refusal.TOO_DEEP, detail)
    if first["type"] == "json_invalid":
        return Rejected(Refusal.NOT_JSON, detail)
    return Rejected(_REFUSAL_OF_FIELD.get(field, Refusal.AMOUNT_OUT_OF_RANGE), detail)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Rejected(Refusal.DUPLICATE_KEY, f"{repeated[:64]!a}: more than once")
    return found


def _no_nan(constant: str) -> None:
    raise Rejected(Refusal.NOT_JSON, f"{constant} is not JSON")


def _known_multiplier(text: str) -> str | None:
    """Return the multiplier in its shortest form, None for text that is none.

    The cache takes short texts only.
    """
    return _read_multiplier(text) if len(text) <= _MULTIPLIER_LENGTH else None


@lru_cache(maxsize=4_096)
def _read_multiplier(text: str) -> str | None:
    return canonical_multiplier(text) if _is_multiplier(text) else None


def _is_plain_text(text: str | None) -> bool:
    """True for None, and for a short text without control characters."""
    return text is None or (len(text) <= _TEXT_LIMIT and text.isprintable())


def _plain_time(text: str) -> datetime:
    """Parse a time in UTC. Raises _NotPlain for any other form."""
    if not _is_plain_time(text):
        raise _NotPlain
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise _NotPlain from None


def _time_of(raw_id: bytes) -> datetime:
    """Return when an entry was appended, by the clock of Redis."""
    return datetime.fromtimestamp(min(_milliseconds_of(raw_id), _LAST_MILLISECOND) / 1_000, UTC)


def _milliseconds_of(raw_id: bytes) -> int:
    return int(raw_id.partition(b"-")[0])
