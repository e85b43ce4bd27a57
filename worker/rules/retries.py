"""When a webhook that failed is tried again. Pure."""

from __future__ import annotations

LONGEST_SECONDS = 86_400


def retry_seconds(attempts: int, first_seconds: float, share: float) -> float:
    """Return how long the next attempt waits after `attempts` that failed: four times as long each, at most a day.

    `share`, from 0 to 1, is drawn: the wait is between half of that time and all of it, so that receivers which failed
    together are not asked together.
    """
    whole = min(float(LONGEST_SECONDS), first_seconds * 4.0 ** min(attempts - 1, 20))
    return whole * (0.5 + 0.5 * share)
