"""The three things that a stream entry can be: an event, a refusal, or a request to publish an account again."""

from __future__ import annotations

from typing import NamedTuple

from schemas.events import (
    Refusal,
)


class Event(NamedTuple):
    """A valid event as it came in: the multiplier resolved, the amount computed, the time clamped.

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


class Refused(NamedTuple):
    """An entry that is no valid event. `owner` is (user, meter, event id) where a marked entry still names them; in the
    pool's books it is (user, "", request) of what the pool promised. `signed_by` is the id of the key whose signature
    was found right.
    """

    entry_id: str
    reason: Refusal
    detail: str
    payload: bytes
    payload_bytes: int
    owner: tuple[str, str, str] | None
    signed_by: str | None = None


class Refresh(NamedTuple):
    """An account changed without an event: publish its balance."""

    entry_id: str
    user_id: str


Received = Event | Refused | Refresh
