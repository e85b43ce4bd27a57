"""Stream entries that point to a broken producer: the reasons of refusals, and the lines in the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from math import inf
from time import monotonic

from loguru import logger

from schemas.events import SIGNATURE_REFUSALS, Refusal
from schemas.traces import trace_id_of
from worker.keyspace.keys import Stream
from worker.rules.catalogues import ADD_DEFAULT_PLAN
from worker.rules.received import Refused

# Stream entries without the form of an event, or without a right signature. A producer that sends one sends nothing
# else, and a newer worker or another key may read them: too many of them pause a partition. A value that breaks a rule
# does not: one event has it, and an operator can replay its dead letter after the rule has changed.
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
SECONDS_BETWEEN_REPEATS = 60.0


def counted(refused: Iterable[Refused]) -> Counter[Refusal]:
    """Count the refusals of each reason."""
    return Counter(item.reason for item in refused)


def in_words(counts: Counter[Refusal]) -> str:
    """Return the counts as text, `3 not_json, 1 too_old`, the most frequent first."""
    return ", ".join(f"{count} {reason.value}" for reason, count in counts.most_common())


def in_trace(traceparent: str | None) -> str:
    """Return how a line about one event names its trace, empty without one."""
    return f" (trace {trace_id_of(traceparent)})" if traceparent else ""


class RefusalLog:
    """Logs dead letters and late repeats, with advice about them, for each stream once in a while.

    The first batch after that time logs those in between.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._unsaid: dict[Stream, Counter[Refusal]] = {}
        self._said_at: dict[Stream, float] = {}
        self._unsaid_repeats: Counter[Stream] = Counter()
        self._repeats_said_at: dict[Stream, float] = {}
        self._ahead_said_at: dict[Stream, float] = {}
        self._waiting_said_at: dict[Stream, float] = {}
        self._unopened_said_at: dict[Stream, float] = {}

    def add(self, stream: Stream, refused: Iterable[Refused]) -> None:
        """Note the refusals of a batch; log them unless the last line is recent."""
        refused = list(refused)
        counts = self._unsaid.setdefault(stream, Counter())
        counts.update(counted(refused))
        now = self._clock()
        if not counts or now < self._said_at.get(stream, -inf) + SECONDS_BETWEEN_LINES:
            return
        advice = [_ADVICE[reason] for reason, _ in counts.most_common() if reason in _ADVICE]
        logger.warning(
            "partition {}: {} refused: {}. `meterfall dead list` shows them{}{}",
            stream.name, counts.total(), in_words(counts),
            in_trace(refused[0].traceparent) if refused and counts.total() == 1 else "",
            "".join(f"; {each}" for each in advice),
        )  # fmt: skip
        self._unsaid[stream] = Counter()
        self._said_at[stream] = now

    def add_repeats(self, stream: Stream, times: int, last_user: str) -> None:
        """Note events that came again late, the last one of `last_user`; log them unless the last line is recent."""
        self._unsaid_repeats[stream] += times
        now = self._clock()
        if now < self._repeats_said_at.get(stream, -inf) + SECONDS_BETWEEN_REPEATS:
            return
        logger.warning(
            "partition {}: {} events came again after their outcome was forgotten, the last of {}. They are not billed "
            "again: a producer retries for long, or uses a key twice. `meterfall explain` shows each",
            stream.name, self._unsaid_repeats.pop(stream), last_user,
        )  # fmt: skip
        self._repeats_said_at[stream] = now

    def add_ahead(self, stream: Stream, last_id: str) -> None:
        """Note stream entries from the future; log them unless the last line is recent."""
        now = self._clock()
        if now < self._ahead_said_at.get(stream, -inf) + SECONDS_BETWEEN_REPEATS:
            return
        logger.error(
            "partition {}: the stream is ahead of the clock, up to the entry id {}: a producer makes ids of its own. "
            "Its events count as of now, and the stream begins anew once it is empty. Have it use `*` as the id",
            stream.name, last_id,
        )  # fmt: skip
        self._ahead_said_at[stream] = now

    def add_unopened(self, stream: Stream, what: str) -> None:
        """Note events that wait as no account can be opened, `what` is wrong; log it unless the last line is recent."""
        now = self._clock()
        if now < self._unopened_said_at.get(stream, -inf) + SECONDS_BETWEEN_REPEATS:
            return
        logger.error("partition {}: {}: {}", stream.name, what, ADD_DEFAULT_PLAN)
        self._unopened_said_at[stream] = now

    def add_waiting(self, stream: Stream, meters: str, minutes: int) -> None:
        """Note events that wait for a catalogue with their `meters`; log them unless the last line is recent."""
        now = self._clock()
        if now < self._waiting_said_at.get(stream, -inf) + SECONDS_BETWEEN_REPEATS:
            return
        logger.warning(
            "partition {}: events of {} wait for a catalogue that a process carries and that is not in force; "
            "`meterfall catalogue apply FILE` puts it there. After {} minutes they become dead letters",
            stream.name, meters, minutes,
        )  # fmt: skip
        self._waiting_said_at[stream] = now
