"""Publish batches in the order of their commits, while Postgres works on the next."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic

import redis

from worker.consumer.books import PublishedT, Publishes, Trim
from worker.crash import crash_point
from worker.keyspace import calls, scripts
from worker.keyspace.keys import Stream, slot_of


class Publisher(Generic[PublishedT]):
    """Publishes one batch after the other; at most one of them in the background."""

    def __init__(self, client: redis.Redis, stream: Stream, books: Publishes[PublishedT]) -> None:
        self._redis = client
        self._stream = stream
        self._books = books
        # One thread: balances appear in the order of their commits.
        self._thread = ThreadPoolExecutor(1, "publisher")
        self._last: Future[None] | None = None

    def publish(self, outcome: PublishedT, taken_ms: int, trim: Trim | None, *, in_background: bool) -> None:
        """Publish after the batch before, in another thread only if `in_background`: without overlap it costs time.

        With `trim` the entries of the batch leave the stream together, after that.
        Raises the error of publishing the batch before, or this one unless it is `in_background`.
        """
        self.wait()
        if in_background:
            self._last = self._thread.submit(self._publish, outcome, taken_ms, trim)
        else:
            self._publish(outcome, taken_ms, trim)

    def wait(self) -> None:
        """Wait for the last batch. Raises the error of its publishing."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait for the last batch, and end the thread."""
        self._thread.shutdown()

    def _publish(self, outcome: PublishedT, taken_ms: int, trim: Trim | None) -> None:
        notes = self._books.publish(outcome, taken_ms, trim=trim)
        if trim is None or not notes:
            return
        crash_point("before_trim")
        # Killed here, the next drain reads known entries again.
        request = calls.trim(self._stream, slot_of(taken_ms), trim.first_id, trim.last_id, notes)
        if scripts.run(self._redis, request) < 0:
            self._books.publish(outcome, taken_ms)
