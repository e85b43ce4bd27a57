"""Publish batches in the order of their commits, while Postgres works on the next."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic

from worker.consumer.books import PublishedT, Publishes


class Publisher(Generic[PublishedT]):
    """Publishes one batch after the other; at most one of them in the background."""

    def __init__(self, books: Publishes[PublishedT]) -> None:
        self._books = books
        # One thread: balances appear in the order of their commits.
        self._thread = ThreadPoolExecutor(1, "publisher")
        self._last: Future[None] | None = None

    def publish(self, outcome: PublishedT, taken_ms: int, *, in_background: bool) -> None:
        """Publish after the batch before, in another thread only if `in_background`: without overlap it costs time.

        Raises the error of publishing the batch before, or this one unless it is `in_background`.
        """
        self.wait()
        if in_background:
            self._last = self._thread.submit(self._books.publish, outcome, taken_ms)
        else:
            self._books.publish(outcome, taken_ms)

    def wait(self) -> None:
        """Wait for the last batch. Raises the error of its publishing."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait for the last batch, and end the thread."""
        self._thread.shutdown()
