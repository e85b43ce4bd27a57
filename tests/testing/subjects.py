"""One face for real clients and fakes, so that one test is a test of each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Protocol, cast

from redis import Redis

from config.settings import Settings
from schemas.answers import Parts
from tests.client.clients import Awaited, open_client
from tests.support.ledger import give_account, move_clock, rows
from tests.support.resources import settings_for, worker_resources
from worker.admin import accounts, credits, limits
from worker.consumer.drain import drain_stream
from worker.demo.servers import Server
from worker.keyspace import keys
from worker.testing import AsyncFakeBilling, FakeBilling

# Buckets by meter: used, rollover, purchased.
Buckets = dict[str, tuple[int, int, int]]


class Subject(Protocol):
    """A client and its world. Events wait until `apply`."""

    billing: Any

    def open(self, user_id: str, plan: str = "tenant", status: str = "active", buckets: Buckets | None = None) -> None:
        """Open an account."""

    def set_status(self, user_id: str, status: str) -> None:
        """Give an account another status."""

    def set_limit(self, user_id: str, meter: str, per: str, amount: int | None) -> None:
        """Give an account a limit."""

    def change_plan(self, user_id: str, plan: str) -> None:
        """Put an account on another plan now."""

    def grant(self, user_id: str, meter: str, amount: int) -> None:
        """Give an account purchased units that it did not have."""

    def apply(self) -> None:
        """Apply all events that wait."""

    def advance(self, seconds: int) -> None:
        """Let time pass."""

    def redis_down(self) -> AbstractContextManager[None]:
        """Have Redis down for a block."""
        ...

    def buckets(self, user_id: str, meter: str) -> tuple[int, int, int]:
        """Stored units: used, rollover, purchased."""
        ...

    def recorded(self) -> list[tuple[str, str, int, str]]:
        """Applied events: user, event, quantity, multiplier."""
        ...

    def parts(self, user_id: str, event_id: str) -> Parts:
        """Who paid for an applied event."""
        ...

    def refused(self) -> list[str]:
        """Reasons of the dead letters."""
        ...

    def close(self) -> None:
        """Close the client."""


class Fake:
    """A fake of either kind."""

    def __init__(self, kind: str, overrides: dict[str, Any]) -> None:
        if kind == "blocking":
            self._fake: Any = FakeBilling(apply_at_once=False, **overrides)
            self.billing: Any = self._fake
        else:
            self._fake = AsyncFakeBilling(apply_at_once=False, **overrides)
            self.billing = Awaited(self._fake, asyncio.Runner())

    def open(self, user_id: str, plan: str = "tenant", status: str = "active", buckets: Buckets | None = None) -> None:
        units = {
            name: {meter: given[at] for meter, given in (buckets or {}).items()}
            for at, name in enumerate(("used", "rollover", "purchased"))
        }
        self._fake.open(user_id, plan, status=status, **units)

    def set_status(self, user_id: str, status: str) -> None:
        self._fake.set_status(user_id, status)

    def set_limit(self, user_id: str, meter: str, per: str, amount: int | None) -> None:
        self._fake.set_limit(user_id, meter, per, amount)

    def change_plan(self, user_id: str, plan: str) -> None:
        self._fake.change_plan(user_id, plan)

    def grant(self, user_id: str, meter: str, amount: int) -> None:
        self._fake.set_balance(user_id, meter, purchased=amount)

    def apply(self) -> None:
        self._fake.apply()

    def advance(self, seconds: int) -> None:
        self._fake.advance(seconds)

    def redis_down(self) -> AbstractContextManager[None]:
        down: AbstractContextManager[None] = self._fake.redis_down()
        return down

    def buckets(self, user_id: str, meter: str) -> tuple[int, int, int]:
        balance = self._fake.balance(user_id, meter)
        return balance.used, balance.rollover, balance.purchased

    def recorded(self) -> list[tuple[str, str, int, str]]:
        return sorted((each.user_id, each.event_id, each.quantity, each.multiplier) for each in self._fake.events)

    def parts(self, user_id: str, event_id: str) -> Parts:
        found: Parts = self._fake.parts(user_id, event_id)
        return found

    def refused(self) -> list[str]:
        return [str(each.reason) for each in self._fake.refused]

    def close(self) -> None:
        self.billing.close()


class Real:
    """A real client of either kind, on servers of the test's own."""

    def __init__(self, kind: str, database_url: str, server: Server, overrides: dict[str, Any]) -> None:
        self._server = server
        server.start()
        self._settings: Settings = settings_for(
            database_url, server.url, **{"redis_down_pause_ms": 0, "redis_retries": 1, **overrides}
        )
        self._redis = Redis.from_url(server.url)
        self._redis.flushall()
        self._moved = 0
        self.billing: Any = open_client(kind, self._settings)

    def open(self, user_id: str, plan: str = "tenant", status: str = "active", buckets: Buckets | None = None) -> None:
        give_account(self._settings, user_id, plan, status, buckets)

    def set_status(self, user_id: str, status: str) -> None:
        with worker_resources(self._settings) as resources:
            accounts.set_status(resources, user_id, status)
        self.apply()

    def set_limit(self, user_id: str, meter: str, per: str, amount: int | None) -> None:
        with worker_resources(self._settings) as resources:
            limits.set_limit(resources, user_id, meter, per, amount)
        self.apply()

    def change_plan(self, user_id: str, plan: str) -> None:
        with worker_resources(self._settings) as resources:
            accounts.change_plan(resources, user_id, plan)
        self.apply()

    def grant(self, user_id: str, meter: str, amount: int) -> None:
        with worker_resources(self._settings) as resources:
            credits.grant(resources, user_id, meter, amount, f"order-{meter}")
        self.apply()

    def apply(self) -> None:
        with worker_resources(self._settings) as resources:
            for stream in keys.streams(self._settings.partitions):
                drain_stream(resources, stream)

    def advance(self, seconds: int) -> None:
        """Move the ledger's clock forward, and what Redis has by its own clock back by as much."""
        self._moved += seconds
        move_clock(self._settings, timedelta(seconds=self._moved))
        milliseconds = seconds * 1_000
        names: list[bytes] = list(self._redis.scan_iter())
        for name in names:
            left: Any = self._redis.pttl(name)
            if b":balance:" in name:
                head, _, lines = cast("bytes", self._redis.get(name)).partition(b"\n")
                epoch, version, *fresh_until = head.split()
                moved = [str(int(moment) - milliseconds).encode() for moment in fresh_until]
                self._redis.set(name, b" ".join([epoch, version, *moved]) + b"\n" + lines, keepttl=True)
            if b":hold:" in name and self._redis.hexists(name, "expires_ms"):
                self._redis.hincrby(name, "expires_ms", -milliseconds)
            elif b":holds:" in name or name.endswith((b":holds", b":expiries")):
                members: Any = self._redis.zrange(name, 0, -1)
                for member in members:
                    self._redis.zincrby(name, -milliseconds, member)
            if left >= 0:
                self._redis.pexpire(name, left - milliseconds)

    @contextmanager
    def redis_down(self) -> Iterator[None]:
        self._server.stop()
        try:
            yield
        finally:
            self._server.start()

    def buckets(self, user_id: str, meter: str) -> tuple[int, int, int]:
        query = "SELECT used, rollover, purchased FROM balance WHERE user_id = %s AND meter = %s"
        ((used, rollover, purchased),) = rows(self._settings, query, user_id, meter)
        assert isinstance(used, int)
        assert isinstance(rollover, int)
        assert isinstance(purchased, int)
        return used, rollover, purchased

    def recorded(self) -> list[tuple[str, str, int, str]]:
        query = "SELECT user_id, event_id, quantity, multiplier::text FROM usage_log ORDER BY 1, 2"
        return [tuple(row) for row in rows(self._settings, query)]  # type: ignore[misc]

    def parts(self, user_id: str, event_id: str) -> Parts:
        query = f"SELECT {', '.join(Parts.model_fields)} FROM usage_log WHERE user_id = %s AND event_id = %s"
        (row,) = rows(self._settings, query, user_id, event_id)
        return Parts.model_validate(dict(zip(Parts.model_fields, row, strict=True)))

    def refused(self) -> list[str]:
        return [str(reason) for (reason,) in rows(self._settings, "SELECT reason FROM dead_letter ORDER BY id")]

    def close(self) -> None:
        self.billing.close()
        self._redis.close()
