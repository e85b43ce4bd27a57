"""The way of counts out of the processes of a dyno: a pipe to its supervisor, which adds them up for the endpoint.

What is in the pipe outlives the process that wrote it, so no sum falls when a worker process is killed: only a new dyno
begins at 0. A kill between a COMMIT and the next line of code loses the counts of that one batch.
"""

from __future__ import annotations

import os
import select
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock, Thread

from worker.reports import counts
from worker.reports.counts import Histogram, Sums, add, counted, observed
from worker.rules.received import Refused

# A write of at most so many bytes is whole, whoever else writes, and is never cut by a kill.
_WHOLE_BYTES = select.PIPE_BUF


class Tally:
    """The counts of one process that its supervisor does not have yet."""

    def __init__(self, pipe: int | None = None) -> None:
        """`pipe` is the supervisor's; without one, nobody reads the counts."""
        self.pipe = pipe
        self._unsent: Sums = {}

    def count(self, metric: counts.Counter, by: int | Mapping[str, int] = 1) -> None:
        """Add to a counter, or to the counters of some values of its label."""
        add(self._unsent, counted(metric, by))

    def observe(self, metric: Histogram, values: Iterable[float]) -> None:
        """Add these values to a histogram."""
        add(self._unsent, observed(metric, values))

    def count_batch(
        self, items: Sequence[object], refused: Iterable[Refused], *, seconds: float, lock_seconds: float
    ) -> None:
        """Count a committed batch and its dead letters, and send all counts."""
        self.observe(counts.BATCH_ENTRIES, [len(items)])
        self.observe(counts.BATCH_SECONDS, [seconds])
        self.observe(counts.LOCK_SECONDS, [lock_seconds])
        self.count(counts.REFUSED, Counter(item.reason.value for item in refused))
        self.send()

    def send(self) -> None:
        """Send what was added. It never waits: what a full pipe does not take goes with the next batch."""
        if self.pipe is None:
            self._unsent.clear()
            return
        while self._unsent:
            keys, written = list[tuple[str, str]](), b""
            for key, number in self._unsent.items():
                line = f"{key[0]}\t{key[1]}\t{number!r}\n".encode()
                if keys and len(written) + len(line) > _WHOLE_BYTES:
                    break
                keys.append(key)
                written += line
            try:
                os.write(self.pipe, written)
            except OSError:  # full, or without a supervisor; then this process ends soon
                return
            for key in keys:
                del self._unsent[key]


class DynoCounts:
    """The sums of all processes of a dyno, as far as they came through its pipe."""

    def __init__(self) -> None:
        """Open the pipe; nobody reads it yet. Give its number `pipe` to each process that counts."""
        self._reading, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        self._lock = Lock()
        self._sums: Sums = {}
        self._thread = Thread(target=self._read, name="counts", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def read(self) -> Sums:
        """Return the sums so far."""
        with self._lock:
            return dict(self._sums)

    def stop(self) -> None:
        """Close our end; the thread ends after the last process."""
        os.close(self.pipe)

    def _read(self) -> None:
        with os.fdopen(self._reading, "rb") as lines:
            for line in lines:
                name, part, number = line.decode().rstrip("\n").split("\t")
                with self._lock:
                    add(self._sums, {(name, part): float(number)})
