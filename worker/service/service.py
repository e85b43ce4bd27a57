"""What one process of the service has: the client, accounts, API keys, the reader of the status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from config.settings import Settings
from worker.accounts import AsyncAccounts
from worker.accounts.blocking import Accounts
from worker.admin.api_keys import Keyring
from worker.client import AsyncBilling
from worker.errors import ClientBusy
from worker.reports.probes import Reader
from worker.resources import Resources
from worker.rules.api_keys import ApiKey

T = TypeVar("T")

# Questions about API keys that this process does not know. Few are asked at once: each knows its keys for a while.
_KEY_THREADS = 2
_KEYS_WAITING = 256
# A process goes by the keys that it knows while Postgres is away, so it need not wait long to find that out.
_KEY_WAITS = {
    "database_pool_size": _KEY_THREADS, "database_connect_timeout_seconds": 2, "statement_timeout_ms": 1_000,
}  # fmt: skip


class Gate:
    """Lets at most `most` calls wait or run at a time: a queue of any length answers nobody."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside = 0

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Count the calls inside. Raises ClientBusy if there are too many."""
        if self._inside >= self._most:
            raise ClientBusy(f"{self._inside} calls wait or run already")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


class Service:
    """The parts of one process, connected to no server before the first request."""

    def __init__(self, settings: Settings) -> None:
        """Open the parts. Raises CatalogueError, and LedgerUnavailable if DATABASE_URL is unset."""
        self.settings = settings
        self.billing = AsyncBilling.connect(settings)
        self._accounts = AsyncAccounts(Accounts(settings), settings.serve_account_threads)
        self._account_gate = Gate(settings.serve_waiting_max_calls)
        # One thread is left for changes, however many reports there are.
        self._reports = asyncio.Semaphore(settings.serve_account_threads - 1)
        self._key_resources = Resources.open(settings.model_copy(update=_KEY_WAITS))
        self._keyring = Keyring(self._key_resources)
        self._key_threads = ThreadPoolExecutor(_KEY_THREADS, thread_name_prefix="meterfall-keys")
        self._key_gate = Gate(_KEYS_WAITING)
        self.reader = Reader(settings)

    async def key_of(self, secret: str) -> ApiKey:
        """Return the API key of a secret.

        Raises ApiKeyRefused; LedgerUnavailable if Postgres has to be asked and does not answer; ClientBusy.
        """
        now = datetime.now(UTC)
        known = self._keyring.recall(secret, now)
        if known is not None:
            return known
        return await self._asked(self._keyring.authenticate, secret, now)

    async def key_named(self, key_id: str) -> ApiKey:
        """Return the API key with this id, which a session names. Raises as `key_of` does."""
        return await self._asked(self._keyring.key_of, key_id, datetime.now(UTC))

    async def _asked(self, ask: Callable[[str, datetime], ApiKey], what: str, now: datetime) -> ApiKey:
        with self._key_gate.passed():
            return await asyncio.get_running_loop().run_in_executor(self._key_threads, ask, what, now)

    async def change(self, call: Callable[[AsyncAccounts], Awaitable[T]]) -> T:
        """Carry out a change of an account. Raises ClientBusy if too many calls wait."""
        with self._account_gate.passed():
            return await call(self._accounts)

    async def report(self, call: Callable[[AsyncAccounts], Awaitable[T]]) -> T:
        """Carry out a report, beside changes. Raises ClientBusy if too many calls wait."""
        with self._account_gate.passed():
            async with self._reports:
                return await call(self._accounts)

    async def close(self) -> None:
        """Give all connections back, after the calls under way."""
        await self.billing.close()
        await self._accounts.close()
        await asyncio.to_thread(self._key_threads.shutdown)
        self._key_resources.close()
        self.reader.close()


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Service]:
    """Run the service for the life of an application."""
    service = Service(settings)
    try:
        yield service
    finally:
        await service.close()


def service_of(request: Request) -> Service:
    """Return the service that a request came to."""
    service = request.state.service
    assert isinstance(service, Service)
    return service


async def _service(request: Request) -> Service:  # not a plain function, which FastAPI would run in a thread
    return service_of(request)


# The service, as a dependency of a handler.
Here = Annotated[Service, Depends(_service)]
