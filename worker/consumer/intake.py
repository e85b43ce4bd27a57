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
    MARK_PATTERN,
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
    is_too_much,
)
from schemas.traces import traceparent_of
from worker.errors import Rejected
from worker.keyspace.entries import TOO_LARGE, RawEntry, kept_of, owner_of
from worker.keyspace.keys import Partition, partition_of
from worker.keyspace.signatures import SignatureCheck
from worker.rules.entry_times import END_OF_TIME, entered_at, milliseconds_at
from worker.rules.fractions import whole_units
from worker.rules.received import Event, Received, Refresh, Refused

# Longest multiplier: six digits, a point, six digits.
_MULTIPLIER_LENGTH = 13
_TEXT_LIMIT = 256

_is_identifier = re.compile(ID_PATTERN).fullmatch
_is_multiplier = re.compile(MULTIPLIER_PATTERN).fullmatch
_is_meter = re.compile(METER_PATTERN).fullmatch
_is_mark = re.compile(MARK_PATTERN.encode()).fullmatch
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


# The fields of `emit` and of most plain producers, in their order. For any other list, such as one with a trace, intake
# looks fields up by name.
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
        self.go_by(catalogue)
        self._own_users: set[str] = set()
        self._max_age = timedelta(days=settings.event_max_age_days)
        self._max_ahead = timedelta(seconds=settings.event_max_ahead_seconds)
        self._signatures = SignatureCheck(settings)

    def go_by(self, catalogue: Catalogue) -> None:
        """Judge by this catalogue from now on: its meters, their rounding, its multipliers."""
        self._catalogue = catalogue
        self._meters = catalogue.roundings

    def receive(self, entries: Sequence[RawEntry], now: datetime = END_OF_TIME) -> Iterator[Received]:
        """Judge `entries` in order; yield one result for each. Never raises.

        `now` is the ledger's clock: an entry whose id is ahead of it counts as one that came in now.
        """
        if not entries:
            return
        # Entry ids ascend, so these bounds are safe for every entry of the chunk; the exact ones cost a date each.
        earliest = entered_at(entries[-1][0].decode("ascii"), now) - self._max_age
        latest = entered_at(entries[0][0].decode("ascii"), now) + self._max_ahead
        check_signatures = self._signatures.is_on
        for entry in entries:
            raw_id, flat = entry[0], entry[1]
            entry_id = raw_id.decode("ascii")
            names = flat[::2]
            fields = _NO_FIELDS if names in _USUAL_FIELDS else dict(zip(names, flat[1::2], strict=False))
            payload = flat[3] if fields is _NO_FIELDS else fields.get(b"e")
            marked, capped_backend = b"m" in names, None
            if marked and (mark := flat[5] if fields is _NO_FIELDS else fields.get(b"m", b"")) != b"1":
                capped_backend = _capped_backend(mark)
            signed_by = None
            traceparent = traceparent_of(fields.get(b"t")) if fields else None
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
                    entered = entered_at(entry_id, now)
                    signed_by = self._signatures.signed_by(payload, signature, milliseconds_at(entered))
                try:
                    yield self._plain(
                        entry_id, now, marked, payload, earliest, latest, signed_by, traceparent, capped_backend
                    )
                except (_NotPlain, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    yield self._judged(entry_id, now, marked, payload, signed_by, traceparent, capped_backend)
            except Rejected as refused:
                kept, size = kept_of(entry)
                owner = owner_of(kept) if marked and len(kept) == size else None
                yield Refused(
                    entry_id, refused.reason, refused.detail, kept, size, owner, signed_by, refused.lacks, traceparent,
                    capped_backend,
                )  # fmt: skip

    def _plain(
        self,
        entry_id: str,
        now: datetime,
        marked: bool,
        payload: bytes,
        earliest: datetime,
        latest: datetime,
        signed_by: str | None = None,
        traceparent: str | None = None,
        capped_backend: str | None = None,
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
        factor = "1" if multiplier == "1" else _known_multiplier(multiplier)
        quantity = wire.quantity
        if factor is None or not 0 <= quantity <= MAX_AMOUNT:
            raise _NotPlain
        meter = wire.meter
        amount, remainder = whole_units(quantity, factor, self._meters.get(meter, ""))

        occurred_at = wire.occurred_at
        if occurred_at is None:
            occurred_at = entered_at(entry_id, now).isoformat()
        elif not earliest <= _plain_time(occurred_at) <= latest:
            raise _NotPlain
        user_id, event_id, hold_key = wire.user_id, wire.event_id, wire.hold_key
        if (
            amount >= MAX_AMOUNT
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
            remainder, traceparent, capped_backend,
        )  # fmt: skip

    def _judged(
        self,
        entry_id: str,
        now: datetime,
        marked: bool,
        payload: bytes,
        signed_by: str | None = None,
        traceparent: str | None = None,
        capped_backend: str | None = None,
    ) -> Event:
        """Judge a payload by the model. Raises Rejected with the reason."""
        event = parse_event(payload)
        self._own_user(event.user_id)
        if event.meter not in self._meters:
            lacks = event.user_id, event.meter
            raise Rejected(Refusal.UNKNOWN_METER, f"meter: {event.meter} is not in the catalogue", lacks)
        facts = event.dimensions or {}
        multiplier = canonical_multiplier(event.multiplier or self._catalogue.multiplier(facts.get("model_slug")))
        if is_too_much(event.quantity, multiplier):
            raise Rejected(Refusal.AMOUNT_OUT_OF_RANGE, f"quantity × multiplier: at most {MAX_AMOUNT}")
        amount, remainder = whole_units(event.quantity, multiplier, self._meters[event.meter])
        entered = entered_at(entry_id, now)
        occurred_at = event.occurred_at or entered
        if occurred_at < entered - self._max_age:
            raise Rejected(Refusal.TOO_OLD, f"occurred_at: older than {self._max_age.days} days")
        clamped = occurred_at > entered + self._max_ahead
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
            occurred_at=(entered if clamped else occurred_at.astimezone(UTC)).isoformat(),
            clamped=clamped,
            source=event.source,
            reference_id=event.reference_id,
            hold_key=event.hold_key,
            dimensions=dimensions,
            payload=payload,
            signed_by=signed_by,
            remainder=remainder,
            traceparent=traceparent,
            capped_backend=capped_backend,
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


def _capped_backend(mark: bytes) -> str | None:
    """Return the backend whose sub-cap an entry with this mark counts against.

    A producer may write any mark. A wrong one names none: it would become part of a key.
    """
    return mark[2:].decode() if len(mark) > 2 and _is_mark(mark) else None


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
