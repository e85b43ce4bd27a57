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
from collections.abc import Awaitable, Callable, Generator, Mapping
from functools import wraps
from threading import Lock
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from redis.exceptions import ReadOnlyError, RedisError

from config.catalogue import load_catalogue
from config.settings import Settings, load_settings
from schemas.answers import EventAnswer, HoldAnswer
from schemas.events import Scalar
from worker.client import preflight, sponsorship, spooling
from worker.client.effects import (
    Ask,
    AskHost,
    AskSpool,
    Command,
    Context,
    Effect,
    Effects,
    Running,
    TrustSource,
    logger,
)
from worker.client.spool_file import Spool
from worker.errors import BillingError, SpoolUnavailable
from worker.keyspace import connection as keyspace_connection
from worker.keyspace.connection import connect_async

if TYPE_CHECKING:
    from worker.client.ledger import LedgerView

__all__ = ["AsyncBilling", "AsyncHold", "Billing", "BillingError", "Hold", "TrustSource"]

# What an operation is told about, to answer by its rules; anything else ends the call.
_TOLD = (RedisError, BillingError)

C = TypeVar("C")
C_contra = TypeVar("C_contra", contravariant=True)
P = ParamSpec("P")
T = TypeVar("T")


class _Blocking(Protocol[C]):
    """Something that carries out steps by waiting."""

    _context: C

    def _run(self, steps: Effects[T]) -> T: ...


class _Awaiting(Protocol[C]):
    """Something that carries out steps by awaiting."""

    _context: C

    async def _run(self, steps: Effects[T]) -> T: ...


def _blocking(operation: Callable[Concatenate[C, P], Effects[T]]) -> Callable[Concatenate[_Blocking[C], P], T]:
    """A method that carries out `operation` by waiting."""

    @wraps(operation)
    def method(self: _Blocking[C], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(operation(self._context, *args, **kwargs))

    return method


def _awaiting(
    operation: Callable[Concatenate[C, P], Effects[T]],
) -> Callable[Concatenate[_Awaiting[C], P], Awaitable[T]]:
    """A method that carries out `operation` by awaiting."""

    @wraps(operation)
    async def method(self: _Awaiting[C], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(operation(self._context, *args, **kwargs))

    return method


class _HoldRecord:
    """One hold and whether its settling was tried: after that, nothing may be given back by itself."""

    def __init__(self, context: Context, answer: HoldAnswer) -> None:
        self.context = context
        self.answer = answer
        self.settle_tried = False


def _settle_hold(
    record: _HoldRecord,
    actual: int,
    *,
    event_id: str | None = None,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
) -> Effects[EventAnswer]:
    """The hold becomes one event over `actual` units; see `Billing.settle`.

    Unless `backend` or `dimensions` say otherwise, the work was done on the backend it was held on.
    """
    held = record.answer
    event = preflight.settling_event(
        record.context, held.user_id, held.meter, held.key, actual,
        event_id=event_id, source=source, reference_id=reference_id, dimensions=dimensions,
        backend=_backend_used(held, dimensions, backend),
    )  # fmt: skip
    # From here on the event may have reached Redis, whatever the reply.
    record.settle_tried = True
    return spooling.settle_event(record.context, event)


def _capture_hold(
    record: _HoldRecord,
    event_id: str,
    amount: int,
    *,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
) -> Effects[EventAnswer]:
    """A part of the hold becomes the event `event_id`; see `Billing.capture`. The backend: as in `_settle_hold`."""
    held = record.answer
    return spooling.capture(
        record.context, held.user_id, held.meter, held.key, event_id, amount,
        source=source, reference_id=reference_id, dimensions=dimensions,
        backend=_backend_used(held, dimensions, backend),
    )  # fmt: skip


def _backend_used(held: HoldAnswer, dimensions: Mapping[str, Scalar] | None, backend: str | None) -> str | None:
    """The backend that an event of the hold names: the one it is given, else that of the hold."""
    return held.backend if backend is None and "backend" not in (dimensions or {}) else backend


def _release_hold(record: _HoldRecord) -> Effects[HoldAnswer]:
    """Give the rest of the hold back; see `Billing.release`."""
    held = record.answer
    return spooling.release(record.context, held.user_id, held.meter, held.key)


def _leave_hold(record: _HoldRecord) -> Effects[None]:
    """End of a `with` block: what nobody tried to settle is given back; otherwise the hold stays until it expires."""
    if record.settle_tried:
        return
    try:
        yield from _release_hold(record)
    except BillingError as error:
        logger.warning("hold %s stays until it expires: %s", record.answer.key, error)


class Hold:
    """A hold that was granted. As a context manager it gives itself back unless settling was tried."""

    def __init__(self, billing: Billing, answer: HoldAnswer) -> None:
        self.answer = answer
        self._context = _HoldRecord(billing.context, answer)
        self._run = billing.run

    settle = _blocking(_settle_hold)
    capture = _blocking(_capture_hold)
    release = _blocking(_release_hold)
    _leave = _blocking(_leave_hold)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()


class AsyncHold:
    """A hold that was granted, for asyncio. See `Hold`."""

    def __init__(self, billing: AsyncBilling, answer: HoldAnswer) -> None:
        self.answer = answer
        self._context = _HoldRecord(billing.context, answer)
        self._run = billing.run

    settle = _awaiting(_settle_hold)
    capture = _awaiting(_capture_hold)
    release = _awaiting(_release_hold)
    leave = _awaiting(_leave_hold)


class _AwaitedHold:
    """What `AsyncBilling.reserve` returns: `await` it for the hold, or use it in `async with`."""

    def __init__(self, billing: AsyncBilling, steps: Effects[HoldAnswer]) -> None:
        self._billing = billing
        self._steps = steps
        self._hold: AsyncHold | None = None

    async def _reserve(self) -> AsyncHold:
        return AsyncHold(self._billing, await self._billing.run(self._steps))

    def __await__(self) -> Generator[Any, None, AsyncHold]:
        return self._reserve().__await__()

    async def __aenter__(self) -> AsyncHold:
        self._hold = await self._reserve()
        return self._hold

    async def __aexit__(self, *_: object) -> None:
        if self._hold is not None:
            await self._hold.leave()


def _blocking_hold(
    operation: Callable[Concatenate[Context, P], Effects[HoldAnswer]],
) -> Callable[Concatenate[Billing, P], Hold]:
    @wraps(operation)
    def method(self: Billing, /, *args: P.args, **kwargs: P.kwargs) -> Hold:
        return Hold(self, self.run(operation(self.context, *args, **kwargs)))

    return method


def _awaiting_hold(
    operation: Callable[Concatenate[Context, P], Effects[HoldAnswer]],
) -> Callable[Concatenate[AsyncBilling, P], _AwaitedHold]:
    @wraps(operation)
    def method(self: AsyncBilling, /, *args: P.args, **kwargs: P.kwargs) -> _AwaitedHold:
        return _AwaitedHold(self, operation(self.context, *args, **kwargs))

    return method


class _Client:
    """What both clients are made of. Connects to nothing before the first call."""

    def __init__(self, settings: Settings, trust: TrustSource | None = None) -> None:
        catalogue = load_catalogue(settings.catalogue_path, settings.default_plan)
        self.context = Context(settings, catalogue, trust)
        self._context = self.context
        self._ledger: LedgerView | None = None
        self._ledger_opening = Lock()

    @classmethod
    def connect(cls, settings: Settings | None = None, *, trust: TrustSource | None = None) -> Self:
        """A client from `settings`, or from the environment. Raises SettingsError or CatalogueError.

        `trust` says how far users are trusted, where the host knows better than their accounts.
        """
        return cls(settings or load_settings(os.environ), trust)

    def _begin(self, steps: Effects[T]) -> Running[T]:
        """The operation, up to its first step."""
        spools = self.context.settings.spool_path is not None
        return Running(self.context, spooling.then_send(self.context, steps) if spools else steps)

    @property
    def _spool(self) -> Spool:
        settings = self.context.settings
        if settings.spool_path is None:
            raise SpoolUnavailable("METERFALL_SPOOL_PATH", "unset")
        return Spool(settings.spool_path, settings.spool_max_bytes)

    def _ask(self, step: Ask) -> Any:
        """Answer a question to the ledger. Imports SQLAlchemy and psycopg only now."""
        with self._ledger_opening:
            if self._ledger is None:
                from worker.client.ledger import LedgerView

                self._ledger = LedgerView(self.context.settings, self.context.catalogue)
        return step.question(self._ledger)


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

    check = _blocking(preflight.check)
    remaining = _blocking(preflight.remaining)
    plan_backend = _blocking(preflight.plan_backend)
    reserve = _blocking_hold(preflight.reserve)
    emit = _blocking(spooling.emit)
    emit_events = _blocking(spooling.emit_events)
    capture = _blocking(spooling.capture)
    settle = _blocking(spooling.settle)
    release = _blocking(spooling.release)
    charge = _blocking(preflight.charge)
    estimate = _blocking(sponsorship.estimate)
    decide = _blocking(sponsorship.decide)
    confirm_partial = _blocking(sponsorship.confirm_partial)
    settle_sponsored = _blocking(sponsorship.settle_sponsored)
    release_sponsored = _blocking(sponsorship.release_sponsored)
    credit_pool = _blocking(spooling.credit_pool)
    send_spooled = _blocking(spooling.send)

    def run(self, steps: Effects[T]) -> T:
        """Carry out the steps of one operation and return its answer."""
        running = self._begin(steps)
        while running.step is not None:
            try:
                result = self._perform(running.step)
            except _TOLD as error:
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
            return step.question(self._spool)
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

    check = _awaiting(preflight.check)
    remaining = _awaiting(preflight.remaining)
    plan_backend = _awaiting(preflight.plan_backend)
    reserve = _awaiting_hold(preflight.reserve)
    emit = _awaiting(spooling.emit)
    emit_events = _awaiting(spooling.emit_events)
    capture = _awaiting(spooling.capture)
    settle = _awaiting(spooling.settle)
    release = _awaiting(spooling.release)
    charge = _awaiting(preflight.charge)
    estimate = _awaiting(sponsorship.estimate)
    decide = _awaiting(sponsorship.decide)
    confirm_partial = _awaiting(sponsorship.confirm_partial)
    settle_sponsored = _awaiting(sponsorship.settle_sponsored)
    release_sponsored = _awaiting(sponsorship.release_sponsored)
    credit_pool = _awaiting(spooling.credit_pool)
    send_spooled = _awaiting(spooling.send)

    async def run(self, steps: Effects[T]) -> T:
        """Carry out the steps of one operation and return its answer."""
        running = self._begin(steps)
        while running.step is not None:
            try:
                result = await self._perform(running.step)
            except _TOLD as error:
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
            return await asyncio.to_thread(step.question, self._spool)
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
