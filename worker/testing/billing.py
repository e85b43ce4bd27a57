"""`FakeBilling` and `AsyncFakeBilling`: the clients of services, on servers and workers in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Self

from redis.exceptions import RedisError

from config.settings import Settings
from worker.client import AsyncBilling, Billing
from worker.client.awaiting import LoopClient
from worker.client.billing import _Client
from worker.client.effects import Ask, Command, Pipeline
from worker.client.session import TrustSource
from worker.testing.controls import Controls
from worker.testing.world import World


class _Fake(Controls, _Client):
    """What both fakes are made of: a real client, whose questions to the ledger are answered in memory."""

    def __init__(
        self,
        accounts: Mapping[str, str] | None = None,
        *,
        now: datetime | None = None,
        apply_at_once: bool = True,
        trust: TrustSource | None = None,
        beside: Controls | None = None,
        **settings: object,
    ) -> None:
        """Open `accounts`: plans by user.

        `now` is the time on the fake's clock, which goes on from there; None: that of the machine. With
        `apply_at_once=False` events wait for `apply`, as they wait for a worker. `beside` is another fake, with which
        this one shares all that is recorded. `settings` are fields of `Settings`, such as `catalogue_path` or
        `redis_down`; nothing is read from the environment.

        Raises SettingsError, CatalogueError, AccountError; ValueError for settings of a fake beside another one.
        """
        if beside is None:
            self.world = World(now, apply_at_once, settings)
        elif settings or now is not None or not apply_at_once:
            raise ValueError("beside: settings, time and workers are those of the other fake")
        else:
            self.world = beside.world
        super().__init__(self.world.settings, trust)
        self.context.clock = self.world.redis.now
        for user_id, plan in (accounts or {}).items():
            self.open(user_id, plan)

    @classmethod
    def connect(
        cls,
        settings: Settings | None = None,
        *,
        trust: TrustSource | None = None,
        check: bool = False,  # noqa: ARG003
    ) -> Self:
        """A fake with these settings, for code that connects by itself. Connects to nothing."""
        return cls(trust=trust, **(settings.model_dump() if settings else {}))

    def _ask(self, step: Ask) -> Any:
        """Answer a question to the ledger."""
        with self.world.redis.in_reach():
            return step.question(self.world.ledger)  # type: ignore[arg-type]


class FakeBilling(_Fake, Billing):
    """`Billing` without servers: the same calls, answers, errors and holds. Safe to share between threads.

    It is the real client over the real scripts, rules and books; only Redis and Postgres are in memory.
    """

    def _connect(self) -> None:
        super()._connect()
        self.redis = self._asking = self._recording = self.world.redis


class AsyncFakeBilling(_Fake, AsyncBilling):
    """`AsyncBilling` without servers: the same calls, answers, errors and holds, on any number of event loops.

    The calls that `FakeBilling` has beside those of the client are the same here: they do not wait, so `await` none.
    """

    def end(self) -> None:
        """End its threads, where no event loop can await `close`. Calls after this raise ClientClosed."""
        self._closed = True
        self._executor.shutdown(wait=False)
        self._spool_executor.shutdown(wait=False)

    def _here(self) -> LoopClient:
        loop = asyncio.get_running_loop()
        here = self._loops.get(loop)
        if here is None:
            forget = partial(self._loops.pop, loop, None)
            here = _FakeLoop(self.context, self._executor, self._spool_executor, self._answer, forget)
            here.redis = self.world.redis
            self._loops[loop] = here
        return here


class _FakeLoop(LoopClient):
    """What a fake has on one event loop: its commands travel nowhere."""

    redis: Any

    def _send(self, step: Command | Pipeline, deliver: Callable[[Any], None]) -> None:
        """Carry out commands at once, and deliver the replies in a later turn of the loop, as Redis would."""
        try:
            replies = self.redis.replies((step.args,) if isinstance(step, Command) else step.commands)
        except RedisError as error:
            self.loop.call_soon(self._delivered, step, deliver, error)
        else:
            self.loop.call_soon(self._delivered, step, deliver, replies)
