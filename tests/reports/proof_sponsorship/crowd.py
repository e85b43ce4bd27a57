"""Many clients at once, in threads and processes, and somebody who watches the pool meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

from redis import Redis

from config.settings import Settings
from tests.support.sponsorship import Everybody
from tests.support.threads import at_once
from worker.client import Billing
from worker.keyspace import keys


def in_processes(
    settings: Settings, call: Callable[[Billing, int], Any], processes: int = 4, each: int = 8
) -> list[Any]:
    """Make `processes` × `each` numbered calls at the same time, in so many processes and threads, with a client for
    each process; returns their results, which must be fit for JSON."""
    ready, started = os.pipe(), os.pipe()
    children = []
    for process in range(processes):
        result, mine = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(started[1])
                with Billing(settings, Everybody("elite")) as client:
                    client.estimate("somebody", "credits", 0)
                    os.write(ready[1], b"!")
                    os.read(started[0], 1)  # until nobody can write any more
                    numbers = range(process * each, (process + 1) * each)
                    found = at_once([lambda number=number: call(client, number) for number in numbers])  # type: ignore[misc]
                os.write(mine, json.dumps(found).encode())
            finally:
                os._exit(0)
        os.close(mine)
        children.append((pid, result))
    for _ in children:
        assert os.read(ready[0], 1) == b"!"
    for end in (*started, *ready):
        os.close(end)
    found = []
    for pid, result in children:
        with os.fdopen(result, "rb") as answers:
            found += json.loads(answers.read())
        os.waitpid(pid, 0)
    return found


class Watcher(Thread):
    """Looks at the pool again and again, and notes whenever more is promised than there is."""

    LOOK = "return {redis.call('GET', KEYS[1]), redis.call('HGETALL', KEYS[2])}"

    def __init__(self, redis: Redis) -> None:
        super().__init__()
        self.redis = redis
        self.enough = Event()
        self.looks = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        """Until it is enough. What the pool has and what it promised are read in one step."""
        while not self.enough.is_set():
            reply: Any = self.redis.eval(self.LOOK, 2, keys.SPONSORSHIP.pool, keys.SPONSORSHIP.promised)
            found = {name: int(held) for name, held in zip(reply[1][::2], reply[1][1::2], strict=True)}
            total = found.pop(b"total", 0)
            if total != sum(found.values()) or total > int(reply[0].split(b"\n")[1]):
                self.wrong.append(str(reply))
            self.looks += 1

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        self.join()
