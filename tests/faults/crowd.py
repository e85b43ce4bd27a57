"""A producer process of a crowd: at a signal it reserves one unit in several threads at once, and prints its holds.

python -m tests.faults.crowd <user> <meter> <threads>
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from config.settings import load_settings
from worker.client import Billing
from worker.errors import UsageLimitExceeded

READY = "test:ready"
GO = "test:go"
PATIENCE_SECONDS = 60


def reserve_at_once(billing: Billing, user: str, meter: str, threads: int) -> list[str]:
    """Return the keys of the granted holds, one unit each."""
    wanted = [f"{os.getpid()}-{number}" for number in range(threads)]

    def reserve(key: str) -> str | None:
        try:
            return billing.reserve(user, meter, 1, key).answer.key
        except UsageLimitExceeded:
            return None

    with ThreadPoolExecutor(threads) as pool:
        return [key for key in pool.map(reserve, wanted) if key]


def main() -> None:
    """Print that we are ready, wait for a line of input, and print a line for each hold."""
    user, meter, threads = sys.argv[1:]
    patient = load_settings(os.environ, redis_socket_timeout_ms=PATIENCE_SECONDS * 1_000)
    with Billing.connect(patient) as billing:
        billing.check(user, meter)
        billing.redis.incr(READY)
        billing.redis.blmove(GO, GO, PATIENCE_SECONDS - 1)
        for key in reserve_at_once(billing, user, meter, int(threads)):
            sys.stdout.write(f"granted {key}\n")


if __name__ == "__main__":
    main()
