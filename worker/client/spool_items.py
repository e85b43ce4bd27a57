"""What the spool keeps, as values: a client knows them on every system, the file itself only where it has one."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, NamedTuple


class Item(NamedTuple):
    """What is to be kept, as JSON: an event, a hold to be given back, a credit of the pool. `captured_from` is the hold
    that an event is a part of; `traceparent` is the trace of the call.
    """

    kind: Literal["event", "release", "credit"]
    content: str
    captured_from: str | None = None
    traceparent: str | None = None


class Kept(NamedTuple):
    """An item in the spool."""

    id: int
    kept_at: datetime
    item: Item
