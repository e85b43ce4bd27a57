"""Wait for a condition, and fail in time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10, every: float = 0.005) -> None:
    """Return as soon as `condition` holds, with a look `every` so many seconds; fail once `seconds` have passed.

    A look may cost a process or a connection, and takes that from what is waited for: a third of the time at most.
    """
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if condition():
            return
        ended = time.monotonic()
        assert ended < deadline, f"still not so after {seconds} s: {what}"
        time.sleep(max(every, 2 * (ended - began)))
