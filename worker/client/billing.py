"""The client for services: `Billing`, and `AsyncBilling` for asyncio. Needs redis and pydantic only.

    billing = Billing.connect()
    with billing.reserve("user-42", "premium_voice", 1_840, key="job-7f3") as hold:
        audio = synthesize(text)
        hold.settle(len(text), dimensions={"voice_slug": "narrator"})

What the calls mean is in worker/client/preflight.py and worker/client/sponsorship.py; what they do where Redis does not
confirm an event, in worker/client/spooling.py. Here is only how their steps are carried out: `Billing` waits,
`AsyncBilling` awaits, and everything else is shared.
"""

from __future__ import annotations

import asyncio
import os
from threading import Lock
from typing import TYPE_CHECKING, Any, Self, TypeVar

from redis.exceptions import ReadOnlyError, RedisError

from config.catalogue import load_catalogue
from config.settings import Settings, SettingsError, load_settings
from worker.client import preflight, sponsorship, spooling
from worker.client import recording as client_recording
from worker.client.effects import Ask, AskHost, AskSpool, Command, Effect, Effects
from worker.client.holds import awaiting, awaiting_hold, blocking, blocking_hold
from worker.client.session import Context, Running, TrustSource
from worker.errors import BillingError, LedgerUnavailable, SpoolUnavailable
from worker.keyspace import connection as keyspace_connection
from worker.keyspace.connection import connect_async

if TYPE_CHECKING:
    from worker.client.ledger import LedgerView
    from worker.client.spool_file import Spool


# True in a service that installed the client alone: there this package is `meterfall.client`.
_IN_THE_WHEEL = __name__.startswith("meterfall.")

# The errors of a step that its operation answers by its rules; any other ends the call.
_STEP_ERRORS = (RedisError, BillingError)

T = TypeVar("T")


class _Client:
    """What both clients are made of. Connects to nothing before the first call."""

    def __init__(self, settings: Settings, trust: TrustSource | None = None) -> None:
        catalogue = load_catalogue(settings.catalogue_path, settings.default_plan)
        self.context = Context(settings, catalogue, trust)
        self._context = self.context
        self._ledger: LedgerView | None = None
        self._ledger_opening = Lock()
        self._spool = _spool_of(settings)

    @classmethod
    def connect(cls, settings: Settings | None = None, *, trust: TrustSource | None = None) -> Self:
        """A client from `settings`, or from the environment. Raises SettingsError or CatalogueError.

        A spool that does not work in this Python is a SettingsError. `trust` says how far users are trusted, where
        the host knows better than their accounts.
        """
        return cls(settings or load_settings(os.environ), trust)

    def _begin(self, steps: Effects[T]) -> Running[T]:
        """The operation, up to its first step."""
        spools = self.context.settings.spool_path is not None
        return Running(self.context, spooling.then_send(self.context, steps) if spools else steps)

    def _ask(self, step: Ask) -> Any:
        """Answer a question to the ledger, which the first one opens. Raises LedgerUnavailable."""
        with self._ledger_opening:
            if self._ledger is None:
                self._ledger = _open_ledger(self.context)
        return step.question(self._ledger)

    def _ask_spool(self, step: AskSpool) -> Any:
        """Answer a question to the spool. Raises SpoolUnavailable."""
        if self._spool is None:
            raise SpoolUnavailable("METERFALL_SPOOL_PATH", "unset")
        return step.question(self._spool)


def _open_ledger(context: Context) -> LedgerView:
    """The way to Postgres. Imports SQLAlchemy and psycopg only now: a producer may do without them.

    Raises LedgerUnavailable. If a package is missing, the message says what to install.
    """
    try:
        from worker.client.ledger import LedgerView
    except ImportError as error:
        needed = "'meterfall-client[ledger]'" if _IN_THE_WHEEL else "sqlalchemy 'psycopg[binary]'"
        message = f"this answer comes from Postgres, and a package for that is missing ({error}): pip install {needed}"
        raise LedgerUnavailable(message) from error
    return LedgerView(context.settings, context.catalogue)


def _spool_of(settings: Settings) -> Spool | None:
    """The spool, if one is set. Imports what locks its file only now: Windows lacks that. Raises SettingsError."""
    if settings.spool_path is None:
        return None
    try:
        from worker.client.spool_file import Spool
    except ImportError as error:
        raise SettingsError(f"METERFALL_SPOOL_PATH: a spool does not work in this Python ({error})") from error
    return Spool(settings.spool_path, settings.spool_max_bytes)


def _met_a_replica(replies: list[Any]) -> bool:
    """True where the primary has become a replica: it keeps its connections, and new ones may find its successor.

    For single commands redis-py connects anew by itself (worker/keyspace/scripts.py).
    """
    return any(isinstance(reply, ReadOnlyError) for reply in replies)


class Billing(_Client):
    """Pre-flight checks and events, blocking. Safe to share between threads."""

    def __init__(self, settings: Settings, trust: TrustSource | None = None) -> None:
        super().__init__(settings, trust)
        self.redis = keyspace_connection.connect(settings)

    check = blocking(preflight.check)
    remaining = blocking(preflight.remaining)
    plan_backend = blocking(preflight.plan_backend)
    reserve = blocking_hold(preflight.reserve)
    extend = blocking(preflight.extend)
    emit = blocking(spooling.emit)
    emit_events = blocking(spooling.emit_events)
    capture = blocking(spooling.capture)
    settle = blocking(spooling.settle)
    release = blocking(spooling.release)
    charge = blocking(client_recording.charge)
    estimate = blocking(sponsorship.estimate)
    decide = blocking(sponsorship.decide)
    confirm_partial = blocking(sponsorship.confirm_partial)
    settle_sponsored = blocking(sponsorship.settle_sponsored)
    release_sponsored = blocking(sponsorship.release_sponsored)
    credit_pool = blocking(spooling.credit_pool)
    send_spooled = blocking(spooling.send)

    def run(self, steps: Effects[T]) -> T:
        """Carry out the steps of one operation and return its answer."""
        running = self._begin(steps)
        while running.step is not None:
            try:
                result = self._perform(running.step)
            except _STEP_ERRORS as error:
                running.fail(error)
            else:
                running.succeed(result)
        return running.answer

    _run = run

    def _perform(self, step: Effect) -> Any:
        if isinstance(step, Command):
            return self.redis.execute_command(*step.args)
        if isinstance(step, Ask):
            return self._ask(step)
        if isinstance(step, AskHost):
            return step.question()
        if isinstance(step, AskSpool):
            return self._ask_spool(step)
        with self.redis.pipeline(transaction=False) as pipe:
            for command in step.commands:
                pipe.execute_command(*command)
            replies = pipe.execute(raise_on_error=False)
        if _met_a_replica(replies):
            self.redis.connection_pool.disconnect(inuse_connections=False)
        return replies

    def close(self) -> None:
        """Give the connections back."""
        self.redis.close()
        if self._ledger is not None:
            self._ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncBilling(_Client):
    """Pre-flight checks and events for asyncio. Questions to the ledger, the host and the spool run in a thread."""

    def __init__(self, settings: Settings, trust: TrustSource | None = None) -> None:
        super().__init__(settings, trust)
        self.redis = connect_async(settings)

    check = awaiting(preflight.check)
    remaining = awaiting(preflight.remaining)
    plan_backend = awaiting(preflight.plan_backend)
    reserve = awaiting_hold(preflight.reserve)
    extend = awaiting(preflight.extend)
    emit = awaiting(spooling.emit)
    emit_events = awaiting(spooling.emit_events)
    capture = awaiting(spooling.capture)
    settle = awaiting(spooling.settle)
    release = awaiting(spooling.release)
    charge = awaiting(client_recording.charge)
    estimate = awaiting(sponsorship.estimate)
    decide = awaiting(sponsorship.decide)
    confirm_partial = awaiting(sponsorship.confirm_partial)
    settle_sponsored = awaiting(sponsorship.settle_sponsored)
    release_sponsored = awaiting(sponsorship.release_sponsored)
    credit_pool = awaiting(spooling.credit_pool)
    send_spooled = awaiting(spooling.send)

    async def run(self, steps: Effects[T]) -> T:
        """Carry out the steps of one operation and return its answer."""
        running = self._begin(steps)
        while running.step is not None:
            try:
                result = await self._perform(running.step)
            except _STEP_ERRORS as error:
                running.fail(error)
            else:
                running.succeed(result)
        return running.answer

    _run = run

    async def _perform(self, step: Effect) -> Any:
        if isinstance(step, Command):
            return await self.redis.execute_command(*step.args)
        if isinstance(step, Ask):
            return await asyncio.to_thread(self._ask, step)
        if isinstance(step, AskHost):
            return await asyncio.to_thread(step.question)
        if isinstance(step, AskSpool):
            return await asyncio.to_thread(self._ask_spool, step)
        async with self.redis.pipeline(transaction=False) as pipe:
            for command in step.commands:
                pipe.execute_command(*command)
            replies = await pipe.execute(raise_on_error=False)
        if _met_a_replica(replies):
            await self.redis.connection_pool.disconnect(inuse_connections=False)
        return replies

    async def close(self) -> None:
        """Give the connections back."""
        await self.redis.aclose()
        if self._ledger is not None:
            self._ledger.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
