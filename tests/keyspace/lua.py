"""The Lua scripts on a fake Redis, whose clock stands in a key, so that time is the test's."""

from __future__ import annotations

from typing import Any

import fakeredis

from worker.keyspace import scripts

CLOCK = "test:clock"
TOTALS = "totals"
LARGEST = 9 * 10**15


class Lua:
    """The scripts on a Redis of their own, at a time that the test sets."""

    def __init__(self) -> None:
        self.redis: Any = fakeredis.FakeRedis()
        self.set_clock(1_000_000)

    def set_clock(self, now_ms: int) -> None:
        """Let Redis' TIME be `now_ms`."""
        self.redis.delete(CLOCK)
        self.redis.rpush(CLOCK, now_ms // 1_000, now_ms % 1_000 * 1_000)

    def run(self, name: str, keys: list[str], args: list[Any]) -> Any:
        """The script's reply."""
        text = scripts.script(name).text.partition("\n")[2]
        takes_totals = "\ntotals = table.remove(KEYS)\n" in text
        return self.eval(text, [*keys, TOTALS] if takes_totals else keys, args)

    def totals(self) -> dict[str, int]:
        """How many ids are in the maps that count, as the scripts wrote it down."""
        noted = {name.decode(): int(value) for name, value in self.redis.hgetall(TOTALS).items()}
        return {kind: noted.get(f"{kind}_added", 0) - noted.get(f"{kind}_left", 0) for kind in ("events", "holds")}

    def eval(self, text: str, keys: list[str], args: list[Any]) -> Any:
        """The reply of a script given as text."""
        assert "redis.call('TIME')" in text
        timed = text.replace("redis.call('TIME')", f"redis.call('LRANGE', '{CLOCK}', 0, 1)")
        return self.redis.eval(timed, len(keys), *keys, *args)
