"""The lives of Redis: a life ends when Redis loses its data, and the ledger knows each one by its token.

The ledger has the tokens of all lives, Redis that of its own. Where they differ, Redis is not what the ledger worked
with: holds and events that no worker applied are gone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple

# What a Redis was at the beginning of a life: `new` together with the ledger; `empty`; an `older` copy, whose token is
# that of a former life; or with a token `unknown` to the ledger, as if the ledger had been restored.
Found = Literal["new", "empty", "older", "unknown"]

_TEXTS = {
    "empty": "Redis was found empty at {}: holds and unread events are gone",
    "older": "Redis was found to be an old copy at {}: holds and unread events since then are gone",
    "unknown": "Redis was found at {} with data of a life unknown to the ledger: one of them was restored, or replaced",
}


class Life(NamedTuple):
    """One life of Redis, and who acknowledged what it was found as, when and why."""

    token: str
    began_at: datetime
    found: Found
    acknowledged_at: datetime | None = None
    acknowledged_by: str | None = None
    reason: str | None = None

    @property
    def is_open(self) -> bool:
        """Return True if operators have to be told of it: data were lost, and nobody has acknowledged that."""
        return self.found != "new" and self.acknowledged_at is None


def token_of(raw: object) -> str | None:
    """Return the token that Redis keeps; None without one, or for a text that is none of ours."""
    text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else ""
    return text if re.fullmatch("[0-9a-f]{32}", text) else None


def found_as(token: str | None, known: Sequence[str]) -> Found | None:
    """Return what a Redis with this token is to a ledger; None if it is in the ledger's newest life.

    `token` is None for a Redis without one; `known` are the tokens of the ledger, newest first.
    """
    if not known:
        return "new"
    if token == known[0]:
        return None
    if token is None:
        return "empty"
    return "older" if token in known else "unknown"


def text_of(began_at: datetime, found: str) -> str:
    """Return in one line what was lost before a life began."""
    return _TEXTS[found].format(f"{began_at:%Y-%m-%d %H:%M:%S} UTC")
