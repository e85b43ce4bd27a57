"""The report of a soak: numbers, recovery times, figures that must stay flat, and the verdict with its bounds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.soak.journal import Promised

# Seconds until work goes on after a SIGKILL of a worker, and after a server answers again.
RECOVERY_BOUND_SECONDS = 5.0
BOUNDED = (
    "SIGKILL worker", "SIGKILL dyno", "SIGKILL Redis", "SIGTERM Redis", "SIGQUIT Postgres", "SIGINT Postgres",
)  # fmt: skip
HURRIED = "one right after another"
# The last third of the run may need this much more than the first, and this much for momentary differences.
MEMORY_GROWTH, MEMORY_SPARE_MB = 1.10, 8.0
KEYS_GROWTH, KEYS_SPARE = 1.10, 100
# Fewer points are too few to compare: the head and the tail of a run differ from the rest.
LEAST_QUIETS = 3


class Fault(NamedTuple):
    """One fault at its second of the soak; see `Hit` in tests/soak/faults.py.

    `hurried`: it came before work had gone on after the one before. Its seconds are those of both, and have no bound.
    """

    at: float
    kind: str
    target: str
    seconds: float | None
    hurried: bool = False

    @property
    def bounded(self) -> bool:
        """Return True if work must go on in time."""
        return self.kind in BOUNDED and not self.hurried and self.seconds is not None


class Sample(NamedTuple):
    """One look: stream entries that wait, stream entries disposed of, resident memory in MB by process.

    `applied` is (minute, count of the minute before, count of this minute). None if Redis did not answer.
    """

    at: float
    lag: int | None
    applied: tuple[int, int, int] | None
    memory: dict[str, list[float]]


class Quiet(NamedTuple):
    """One quiet point: seconds until it was quiet and for the proof, and the facts at that moment.

    The facts: events accepted, keys in Redis, those without an expiry, memory in MB by process, and every difference
    that the oracle found.
    """

    at: float
    seconds: float
    proof_seconds: float
    events: int
    keys: int
    lasting_keys: int
    memory: dict[str, list[float]]
    differences: list[str]


@dataclass
class Report:
    """All observations. `error` names work that did not go on; `logs` help to find out why."""

    minutes: float
    seed: int
    postgres: str
    redis: str
    faults: list[Fault] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    quiets: list[Quiet] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    events: int = 0
    duplicates: int = 0
    dead_letters: int = 0
    logs: dict[str, str] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """Return True if the last quiet point found differences: the soak then ends."""
        return bool(self.quiets and self.quiets[-1].differences)

    def finish(self, promised: Promised, seconds: float) -> None:
        """Note the promises at the end."""
        self.seconds = round(seconds, 1)
        self.events = len(promised.events)
        self.duplicates = promised.counts["sent again"]
        self.dead_letters = sum(promised.spoilt_least.values())
        self.counts = dict(sorted(promised.counts.items()))

    # -- Verdict ------------------------------------------------------------------------------------------------------

    def failures(self) -> list[str]:
        """Return all failures; none if the soak has passed."""
        return [*self._went_wrong(), *self._too_slow(), *self._grown()]

    def _went_wrong(self) -> Iterator[str]:
        if self.error:
            yield f"{self.error} ({self._minute(self.seconds)})"
        for quiet in self.quiets:
            for difference in quiet.differences:
                yield f"{difference} ({self._minute(quiet.at)})"

    def _too_slow(self) -> Iterator[str]:
        for fault in self.faults:
            if fault.bounded and fault.seconds is not None and fault.seconds > RECOVERY_BOUND_SECONDS:
                yield (
                    f"{fault.kind} at {fault.at:.1f} s ({fault.target}): work went on after {fault.seconds:.1f} s, "
                    f"the bound is {RECOVERY_BOUND_SECONDS:.0f} s ({self._minute(fault.at)})"
                )

    def _minute(self, at: float) -> str:
        """Return the minute to look at in a repeat of this run."""
        return f"seed {self.seed}, minute {math.ceil(at / 60)}"

    def _grown(self) -> Iterator[str]:
        if len(self.quiets) < LEAST_QUIETS:
            return
        for name, first, last, bound, unit in self.flat():
            if last > bound:
                yield f"{name} grew from {first:.0f} to {last:.0f}{unit}, the bound is {bound:.0f}{unit}"

    def flat(self) -> list[tuple[str, float, float, float, str]]:
        """Return figures that must not grow: name, median of the first third, of the last, its limit, and the unit."""
        found = []
        for name in ("worker", "supervisor"):
            values = [median(sample.memory[name]) for sample in self.samples if sample.memory[name]]
            if values:
                first, last = _thirds(values)
                found.append((f"memory of a {name}", first, last, first * MEMORY_GROWTH + MEMORY_SPARE_MB, " MB"))
        if self.quiets:
            first, last = _thirds([float(quiet.lasting_keys) for quiet in self.quiets])
            found.append(("lasting keys in Redis", first, last, first * KEYS_GROWTH + KEYS_SPARE, ""))
        return found

    # -- Showing ------------------------------------------------------------------------------------------------------

    def recoveries(self) -> dict[str, list[float]]:
        """Return the seconds until work went on, by kind of fault."""
        found: dict[str, list[float]] = {}
        for fault in self.faults:
            if fault.seconds is not None:
                found.setdefault(HURRIED if fault.hurried else fault.kind, []).append(fault.seconds)
        return dict(sorted(found.items()))

    def throughput(self) -> list[tuple[float, float]]:
        """Return stream entries disposed of per second, by time; without moments at which Redis did not answer."""
        known = [(sample.at, sample.applied) for sample in self.samples if sample.applied is not None]
        found = []
        for (before, earlier), (at, later) in pairwise(known):
            # In the same minute: its growth; in the next: the growth of the old one, and all of the new one.
            done = later[2] - earlier[2] if later[0] == earlier[0] else later[1] - earlier[2] + later[2]
            if done >= 0 and later[0] - earlier[0] <= 1:
                found.append((at, done / max(0.1, at - before)))
        return found

    def peak_memory(self, name: str) -> float:
        """Return the largest memory of any process of this kind."""
        return max((value for sample in self.samples for value in sample.memory[name]), default=0.0)

    def table(self) -> list[tuple[str, str]]:
        """Return rows for the terminal: name and value."""
        kinds = Counter(fault.kind for fault in self.faults)
        if hurried := sum(fault.hurried for fault in self.faults):
            kinds[HURRIED] = hurried
        differences = sum(len(quiet.differences) for quiet in self.quiets)
        lags = [sample.lag for sample in self.samples if sample.lag is not None]
        rows = [
            ("seed, seconds", f"{self.seed}, {self.seconds:,.0f}"),
            ("events accepted", f"{self.events:,}"),
            ("  sent again and absorbed", f"{self.duplicates:,}"),
            ("  dead letters, as expected", f"{self.dead_letters:,}"),
            ("quiet points, differences", f"{len(self.quiets)}, {differences}"),
            ("largest backlog", f"{max(lags, default=0):,}"),
        ]
        times = self.recoveries()
        for kind, count in sorted(kinds.items()):
            bound = f" (bound {RECOVERY_BOUND_SECONDS:.0f})" if kind in BOUNDED else ""
            seconds = times.get(kind)
            shown = f", went on after p50 {_shown(seconds)} s{bound}" if seconds else ""
            rows.append((kind, f"{count} ×{shown}"))
        for name, kinds_of in (("recovery of killed workers", BOUNDED[:2]), ("recovery of servers", BOUNDED[2:])):
            all_of = [seconds for kind in kinds_of for seconds in times.get(kind, [])]
            if all_of:
                rows.append((name, f"p50 {_shown(all_of)} s (bound {RECOVERY_BOUND_SECONDS:.0f})"))
        rows.extend(
            (name, f"first third {first:.0f}, last third {last:.0f}{unit} (bound {bound_of:.0f})")
            for name, first, last, bound_of, unit in self.flat()
        )
        rows += [(f"peak memory of a {name}", f"{self.peak_memory(name):.0f} MB") for name in ("worker", "supervisor")]
        counts = [quiet.keys for quiet in self.quiets]
        if counts:
            rows.append(("keys at quiet points", f"{min(counts):,} … {max(counts):,}"))
        return rows

    def save(self, folder: Path) -> str:
        """Write soak.json and soak.png. Return one line with their paths, or the reason for no PNG."""
        folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "seed": self.seed, "minutes": self.minutes, "seconds": self.seconds,
            "postgres": self.postgres, "redis": self.redis,
            "events": self.events, "duplicates": self.duplicates, "dead_letters": self.dead_letters,
            "counts": self.counts, "failures": self.failures(), "error": self.error,
            "recovery_bound_seconds": RECOVERY_BOUND_SECONDS,
            "flat": [dict(zip(("what", "first", "last", "bound", "unit"), row, strict=True)) for row in self.flat()],
            "faults": [fault._asdict() for fault in self.faults],
            "quiet_points": [quiet._asdict() for quiet in self.quiets],
        }  # fmt: skip
        (folder / "soak.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        try:
            from tests.soak.plot import draw
        except ModuleNotFoundError as error:
            return f"wrote {folder}/soak.json; no plot: {error.name} is missing (requirements-dev.txt has it)"
        draw(self, folder / "soak.png")
        return f"wrote {folder}/soak.json and {folder}/soak.png"


def _thirds(values: Sequence[float]) -> tuple[float, float]:
    """Return the medians of the first and of the last third."""
    size = max(1, len(values) // 3)
    return median(values[:size]), median(values[-size:])


def _shown(values: Sequence[float]) -> str:
    """Return median, 99th percentile and the largest, in seconds, as text."""
    tail = sorted(values)[math.ceil(0.99 * len(values)) - 1]
    return f"{median(values):.2f}, p99 {tail:.2f}, max {max(values):.2f}"
