"""A job that is billed once, however often RQ runs it. README.md says how to run it."""

from __future__ import annotations

import time

from meterfall import Billing, HoldClosed, HoldState

METER = "premium_voice"
HOLD_SECONDS = 600

# The parent imports this module before it forks: its children have the client, and each connects anew.
billing = Billing.connect()


def narrate(user_id: str, chapter_id: str, text: str) -> str:
    """Speak a chapter. A run after a kill goes on under the same hold, or finds that the chapter is billed."""
    try:
        hold = billing.reserve(user_id, METER, len(text), chapter_id, HOLD_SECONDS)
    except HoldClosed as closed:
        if closed.state is not HoldState.SETTLED:
            raise
        return "billed before"
    with hold:
        synthesize(text)
        hold.settle(len(text), source="narration")
    return "billed"


def synthesize(text: str) -> bytes:
    """Stand in for an engine."""
    time.sleep(len(text) / 10_000)
    return b"\x7f" * len(text)
