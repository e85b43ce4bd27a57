"""The metrics that processes count while they bill: their list, and the sums of one dyno.

A process adds to its tally once a batch, and sends it to the supervisor of its dyno (worker/consumer/tally.py). Labels
have few values: no user, no event.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from schemas.events import Refusal

# Sums by metric and part: the value of its label; of a histogram the number of a bucket, or SUM.
Sums = dict[tuple[str, str], float]
SUM = "sum"


class Counter(NamedTuple):
    """A metric that only grows. The values of its one label that are `known` have a sample from the start."""

    name: str
    text: str
    label: str | None = None
    known: tuple[str, ...] = ()


class Histogram(NamedTuple):
    """How often a value came, by upper bounds. The last bucket has none."""

    name: str
    text: str
    bounds: tuple[float, ...]


# From the try for the partition's lock to the COMMIT; a batch that fails is in meterfall_batch_failures.
BATCH_SECONDS = Histogram(
    "meterfall_batch_seconds",
    "Time from the begin of a batch to its COMMIT",
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
# Those of accounts in use also, which stay in the stream.
BATCH_ENTRIES = Histogram(
    "meterfall_batch_entries", "Stream entries of a batch", (1, 10, 100, 500, 1_000, 2_000, 5_000, 10_000, 20_000)
)
# With the read of their rows, which takes milliseconds. Nobody waits for a partition: its lock is tried.
LOCK_SECONDS = Histogram(
    "meterfall_batch_lock_seconds",
    "Time until a batch had the locks of its accounts",
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5),
)
APPLIED = Counter("meterfall_events_applied", "Events that an account paid for")
UNCOLLECTED_EVENTS = Counter("meterfall_uncollected_events", "Events recorded without an account", "meter")
UNCOLLECTED_UNITS = Counter("meterfall_uncollected_units", "Units that nobody paid", "meter")
# Its count is the number of duplicates. One that came before the first was applied is 0 s late.
DUPLICATE_AGE = Histogram(
    "meterfall_duplicate_age_seconds",
    "How long after it was applied an event came again",
    (0, 1, 10, 60, 900, 3_600, 86_400, 604_800),
)
REFUSED = Counter(
    "meterfall_refused_entries", "Dead letters written", "reason", tuple(reason.value for reason in Refusal)
)
# The causes are names of errors of Postgres and Redis.
FAILURES = Counter("meterfall_batch_failures", "Batches that failed: tried again, halved, or halted", "cause")
HALTS = Counter("meterfall_halts", "Times that an error halted a partition", "cause")
NOTICES_DELIVERED = Counter("meterfall_notices_delivered", "Notices that a webhook took")
NOTICES_FAILED = Counter("meterfall_notice_attempts_failed", "Attempts to send a notice that failed")
PAUSES = Counter("meterfall_pauses", "Times that unreadable stream entries paused a partition")

COUNTED: tuple[Counter | Histogram, ...] = (
    BATCH_SECONDS,
    BATCH_ENTRIES,
    LOCK_SECONDS,
    APPLIED,
    UNCOLLECTED_EVENTS,
    UNCOLLECTED_UNITS,
    DUPLICATE_AGE,
    REFUSED,
    FAILURES,
    HALTS,
    PAUSES,
    NOTICES_DELIVERED,
    NOTICES_FAILED,
)


def counted(metric: Counter, by: int | Mapping[str, int]) -> Sums:
    """Return the sums of a counter that grew by so much, or by so much for each value of its label."""
    if isinstance(by, int):
        return {(metric.name, ""): by}
    return {(metric.name, value): number for value, number in by.items()}


def observed(metric: Histogram, values: Iterable[float]) -> Sums:
    """Return the sums of a histogram to which these values came."""
    sums: Sums = {}
    for value in values:
        add(sums, {(metric.name, str(bisect_left(metric.bounds, value))): 1, (metric.name, SUM): value})
    return sums


def add(sums: Sums, more: Mapping[tuple[str, str], float]) -> None:
    """Add `more` to `sums`."""
    for key, number in more.items():
        sums[key] = sums.get(key, 0) + number
