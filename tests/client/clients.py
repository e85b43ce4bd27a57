"""Both clients with the same blocking calls, so that one test is a test of either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from config.settings import Settings
from worker.client import AsyncBilling, AsyncHold, Billing
from worker.client.session import TrustSource


class Awaited:
    """`AsyncBilling`, or a hold of it, called as if it were blocking: each call runs to its end on one event loop."""

    def __init__(self, target: AsyncBilling | AsyncHold, runner: asyncio.Runner) -> None:
        self._target = target
        self._runner = runner

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._target, name)

        def call(*args: Any, **named: Any) -> Any:
            async def wait() -> Any:
                return await method(*args, **named)

            result = self._runner.run(wait())
            return Awaited(result, self._runner) if isinstance(result, AsyncHold) else result

        return call if callable(method) else method

    def __enter__(self) -> Awaited:
        self._runner.run(self._target.__aenter__())
        return self

    def __exit__(self, *raised: Any) -> None:
        self._runner.run(self._target.__aexit__(*raised))

    def close(self) -> None:
        """Close the client and its event loop."""
        assert isinstance(self._target, AsyncBilling)
        self._runner.run(self._target.close())
        self._runner.close()


def open_client(kind: str, settings: Settings, trust: TrustSource | None = None) -> Any:
    """A client of either kind, with the same blocking calls."""
    if kind == "blocking":
        return Billing.connect(settings, trust=trust)
    runner = asyncio.Runner()

    async def connect() -> AsyncBilling:
        return AsyncBilling.connect(settings, trust=trust)

    return Awaited(runner.run(connect()), runner)
