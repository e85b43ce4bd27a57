"""Holds as a service has them in hand: settle, capture, release, and a `with` block that gives the rest back."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self

from schemas.answers import EventAnswer, HoldAnswer
from schemas.events import Scalar
from worker.client import spooling
from worker.client.arguments import Facts
from worker.client.effects import Effects, logger
from worker.client.methods import as_method, awaiting, blocking
from worker.client.recording import capturing_event, settling_event
from worker.client.session import Context
from worker.errors import BillingError

if TYPE_CHECKING:
    from worker.client.billing import AsyncBilling, Billing

P = ParamSpec("P")


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
    facts = Facts(
        event_id=event_id, source=source, reference_id=reference_id, dimensions=dimensions,
        backend=_backend_used(held, dimensions, backend),
    )  # fmt: skip
    event = settling_event(record.context, held.user_id, held.meter, held.key, actual, facts)
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
    facts = Facts(
        event_id=event_id, source=source, reference_id=reference_id, dimensions=dimensions,
        backend=_backend_used(held, dimensions, backend),
    )  # fmt: skip
    event = capturing_event(record.context, held.user_id, held.meter, held.key, amount, facts)
    return spooling.capture_event(record.context, event, held.key)


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

    settle = blocking(_settle_hold)
    capture = blocking(_capture_hold)
    release = blocking(_release_hold)
    _leave = blocking(_leave_hold)

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

    settle = awaiting(_settle_hold)
    capture = awaiting(_capture_hold)
    release = awaiting(_release_hold)
    leave = awaiting(_leave_hold)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()


class HoldRequest(Coroutine[Any, Any, AsyncHold]):
    """A hold that is being asked for: `await` it, make a task of it, or use it in `async with`."""

    def __init__(self, hold: Coroutine[Any, Any, AsyncHold]) -> None:
        self._coroutine = hold
        self._hold: AsyncHold | None = None

    def __await__(self) -> Generator[Any, None, AsyncHold]:
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        """Go on as a coroutine does."""
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """Go on with an error as a coroutine does."""
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """End it as a coroutine ends."""
        self._coroutine.close()

    async def __aenter__(self) -> AsyncHold:
        self._hold = await self._coroutine
        return self._hold

    async def __aexit__(self, *_: object) -> None:
        if self._hold is not None:
            await self._hold.leave()


def blocking_hold(
    operation: Callable[Concatenate[Context, P], Effects[HoldAnswer]],
) -> Callable[Concatenate[Billing, P], Hold]:
    """Make a method of `Billing` that reserves."""

    @as_method(operation, "Hold")
    def method(self: Billing, /, *args: P.args, **kwargs: P.kwargs) -> Hold:
        return Hold(self, self.run(operation(self.context, *args, **kwargs)))

    return method


def awaiting_hold(
    operation: Callable[Concatenate[Context, P], Effects[HoldAnswer]],
) -> Callable[Concatenate[AsyncBilling, P], HoldRequest]:
    """Make a method of `AsyncBilling` that reserves. A hold that nobody received is released."""

    @as_method(operation, "HoldRequest")
    def method(self: AsyncBilling, /, *args: P.args, **kwargs: P.kwargs) -> HoldRequest:
        return HoldRequest(reserved(self, *args, **kwargs))

    async def reserved(self: AsyncBilling, *args: P.args, **kwargs: P.kwargs) -> AsyncHold:
        def undo(answer: HoldAnswer) -> Effects[HoldAnswer]:
            return spooling.release(self.context, answer.user_id, answer.meter, answer.key)

        steps = operation(self.context, *args, **kwargs)
        return AsyncHold(self, await self.run(steps, undo=undo))

    return method
