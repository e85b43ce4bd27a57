"""What refused entries tell an operator: which of them say that a producer is broken, and what the log says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from math import inf
from time import monotonic

from loguru import logger

from schemas.events import SIGNATURE_REFUSALS, Refusal
from worker.keyspace.keys import Stream
from worker.rules.received import Refused

# The form is not that of an event, or nobody who holds a key vouches for it. Whoever sends these sends nothing else,
# and a newer worker or another key may well read them: too many of them pause a partition. A value that breaks a rule
# does not: that is one event's fault, and its dead letter can be replayed as soon as the rule is another.
UNREADABLE = SIGNATURE_REFUSALS | {
    Refusal.TOO_LARGE,
    Refusal.NO_PAYLOAD,
    Refusal.BAD_VERSION,
    Refusal.NOT_UTF8,
    Refusal.NOT_JSON,
    Refusal.TOO_DEEP,
    Refusal.DUPLICATE_KEY,
    Refusal.NOT_AN_OBJECT,
    Refusal.UNKNOWN_FIELD,
    Refusal.MISSING_FIELD,
    Refusal.BAD_POOL_ENTRY,
}

_ADVICE = {
    Refusal.MISSING_SIGNATURE: "a producer has no key: set its METERFALL_SIGNING_KEYS",
    Refusal.UNKNOWN_KEY: "a producer signs with a key that METERFALL_SIGNING_KEYS does not have here",
    Refusal.BAD_SIGNATURE: "a producer has another secret for the same key, or somebody forges events",
    Refusal.EXPIRED_SIGNATURE: "a producer signs with a key that has ended: give it the new one",
    Refusal.BAD_VERSION: "a producer writes another version: update the workers first",
    Refusal.UNKNOWN_FIELD: "a producer writes fields of another release: update the workers first",
    Refusal.UNKNOWN_METER: "a producer names a meter that the catalogue lacks: add it, then replay them",
    Refusal.WRONG_PARTITION: "a producer counts partitions otherwise: correct it, then replay them",
    Refusal.ID_CONFLICT: "a producer uses an id twice for different work",
    Refusal.POISON: "workers died on it: keep it for whoever mends the worker",
}
# A flood of refusals must not be a flood of lines.
SECONDS_BETWEEN_LINES = 10.0


def counted(refused: Iterable[Refused]) -> Counter[Refusal]:
    """How many there are of each reason."""
    return Counter(item.reason for item in refused)


def in_words(counts: Counter[Refusal]) -> str:
    """`3 not_json, 1 too_old`, the most frequent first."""
    return ", ".join(f"{count} {reason.value}" for reason, count in counts.most_common())


class RefusalLog:
    """Says in the log what became a dead letter and what to do about it, for each stream once in a while.

    What comes in between is said with the next batch after that.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._unsaid: dict[Stream, Counter[Refusal]] = {}
        self._said_at: dict[Stream, float] = {}

    def add(self, stream: Stream, refused: Iterable[Refused]) -> None:
        """Note what a batch refused, and say it unless something was said a moment ago."""
        counts = self._unsaid.setdefault(stream, Counter())
        counts.update(counted(refused))
        now = self._clock()
        if not counts or now < self._said_at.get(stream, -inf) + SECONDS_BETWEEN_LINES:
            return
        advice = [_ADVICE[reason] for reason, _ in counts.most_common() if reason in _ADVICE]
        logger.warning(
            "partition {}: {} refused: {}. `meterfall dead list` shows them{}",
            stream.name, counts.total(), in_words(counts), "".join(f"; {each}" for each in advice),
        )  # fmt: skip
        self._unsaid[stream] = Counter()
        self._said_at[stream] = now
