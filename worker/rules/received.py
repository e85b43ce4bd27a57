"""The three things that a stream entry can be: an event, a refusal, or a request to publish an account again."""

from __future__ import annotations

from typing import NamedTuple

from schemas.events import (
    Refusal,
)


class Event(NamedTuple):
    """A valid event as it came in: the multiplier resolved, the amount computed, the time clamped.

    `amount` are whole units; `remainder` are millionths of a unit beside them, see `fractions.whole_units`.
    `traceparent` names the trace of its producer, and decides nothing. A marked one counts as pending against the
    sub-cap of `capped_backend` also, if its producer's catalogue has one.
    `occurred_at` is ISO 8601 text: the ledger only stores it, and COPY writes text three times as fast as dates.
    """

    entry_id: str
    marked: bool
    user_id: str
    event_id: str
    meter: str
    quantity: int
    multiplier: str
    amount: int
    occurred_at: str
    clamped: bool
    source: str | None
    reference_id: str | None
    hold_key: str | None
    dimensions: str | None
    payload: bytes
    signed_by: str | None = None
    remainder: int = 0
    traceparent: str | None = None
    capped_backend: str | None = None


class Refused(NamedTuple):
    """An entry that is no valid event. `owner` is (user, meter, event id) where a marked entry still names them; in the
    pool's books it is (user, "", request) of what the pool promised. `signed_by` is the id of the key whose signature
    was found right. `traceparent` is the producer's trace, as in an event. `lacks` is (user, meter) of an event that is
    wrong in its unknown meter only, and may wait for a catalogue that has it. `capped_backend`: as in an event.
    """

    entry_id: str
    reason: Refusal
    detail: str
    payload: bytes
    payload_bytes: int
    owner: tuple[str, str, str] | None
    signed_by: str | None = None
    lacks: tuple[str, str] | None = None
    traceparent: str | None = None
    capped_backend: str | None = None


class Refresh(NamedTuple):
    """An account changed without an event: publish its balance."""

    entry_id: str
    user_id: str


Received = Event | Refused | Refresh
