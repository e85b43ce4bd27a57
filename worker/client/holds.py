"""Holds as a service has them in hand: settle, capture, release, and a `with` block that gives the rest back."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, Self
from weakref import proxy

from schemas.answers import EventAnswer, HoldAnswer
from schemas.events import Scalar
from worker.client import preflight, spooling
from worker.client.arguments import Facts, hold_ttl_seconds, stated
from worker.client.effects import Effects, logger
from worker.client.keeping import AsyncKeeping, Kept, keep
from worker.client.methods import as_method, awaiting, blocking
from worker.client.recording import capturing_event, settling_event
from worker.client.session import Context
from worker.errors import BillingError
from worker.rules.prices import Units

if TYPE_CHECKING:
    from worker.client.billing import AsyncBilling, Billing

P = ParamSpec("P")


class _Life(NamedTuple):
    """What a reserve says about the life of its hold."""

    ttl_seconds: int | None
    keep_alive: bool

    @classmethod
    def named_in(cls, args: Sequence[Any], named: Mapping[str, Any]) -> Self:
        """What the arguments of `reserve` say: user, meter, amount, key, and fifth the life, unless it is named."""
        return cls(named.get("ttl_seconds", args[4] if len(args) > 4 else None), named.get("keep_alive", False))


class _HoldRecord:
    """One hold and whether its settling was tried: after that, nothing may be given back by itself."""

    def __init__(self, context: Context, answer: HoldAnswer, life: _Life) -> None:
        self.context = context
        self.answer = answer
        self.settle_tried = False
        self.kept = Kept(answer.key, hold_ttl_seconds(context, life.ttl_seconds))
        self.keep_alive = life.keep_alive


def _settle_hold(
    record: _HoldRecord,
    actual: int | None = None,
    *,
    quantity: int | None = None,
    model_slug: str | None = None,
    multiplier: str | None = None,
    event_id: str | None = None,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
    traceparent: str | None = None,
) -> Effects[EventAnswer]:
    """The hold becomes one event over `actual` units, or over `quantity`; see `Billing.settle`.

    Unless `backend` or `dimensions` say otherwise, the work was done on the backend it was held on. A quantity without
    a model or a multiplier counts by the multiplier that the hold was reserved with.
    """
    held = record.answer
    units = Units(actual, quantity, multiplier, model_slug, named="actual")
    facts = Facts(
        event_id, source, reference_id, dimensions, _backend_used(held, dimensions, backend), model_slug, traceparent
    )  # fmt: skip
    event = settling_event(
        record.context, held.user_id, held.meter, held.key, units, facts, held=held.multiplier or "1"
    )
    # From here on the event may have reached Redis, whatever the reply.
    record.settle_tried = True
    return spooling.settle_event(record.context, event)


def _capture_hold(
    record: _HoldRecord,
    event_id: str,
    amount: int | None = None,
    *,
    quantity: int | None = None,
    model_slug: str | None = None,
    multiplier: str | None = None,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
    traceparent: str | None = None,
) -> Effects[EventAnswer]:
    """A part of the hold becomes the event `event_id`; see `Billing.capture`. Backend, quantity: as in `settle`."""
    held = record.answer
    units = Units(amount, quantity, multiplier, model_slug)
    facts = Facts(
        event_id, source, reference_id, dimensions, _backend_used(held, dimensions, backend), model_slug, traceparent
    )
    event = capturing_event(
        record.context, held.user_id, held.meter, held.key, units, facts, held=held.multiplier or "1"
    )
    return spooling.capture_event(record.context, event, held.key)


def _backend_used(held: HoldAnswer, dimensions: Mapping[str, Scalar] | None, backend: str | None) -> str | None:
    """The backend that an event of the hold names: the one it is given, else that of the hold."""
    return held.backend if backend is None and "backend" not in stated(dimensions) else backend


def _extend_hold(
    record: _HoldRecord, *, ttl_seconds: int | None = None, amount: int | None = None
) -> Effects[HoldAnswer]:
    """The hold ends `ttl_seconds` from now, or holds `amount` units in all; with neither, it lives on for as long as
    it was reserved for. See `Billing.extend`. Where a block keeps it, later renewals give it that life as well.
    """
    held = record.answer
    if ttl_seconds is None and amount is None:
        ttl_seconds = record.kept.ttl_seconds
    answer = yield from preflight.extend(
        record.context, held.user_id, held.meter, held.key, ttl_seconds=ttl_seconds, amount=amount
    )
    record.kept.ttl_seconds = ttl_seconds or record.kept.ttl_seconds
    return answer.model_copy(update={"backend": held.backend, "multiplier": held.multiplier})


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


def _shown(hold: Hold | AsyncHold) -> str:
    """What a hold is, for logs and debuggers: as it was granted, and whether this object tried to settle it."""
    held, tried = hold.answer, hold._context.settle_tried  # noqa: SLF001 - its own
    facts = f"user_id={held.user_id!r}, meter={held.meter!r}, key={held.key!r}, amount={held.amount}"
    return f"<{type(hold).__name__} {facts}, state={held.state.value!r}{', settle tried' if tried else ''}>"


class Hold:
    """A hold that was granted. As a context manager it gives itself back unless settling was tried."""

    def __init__(self, billing: Billing, answer: HoldAnswer, life: _Life) -> None:
        self.answer = answer
        self._context = _HoldRecord(billing.context, answer, life)
        self._run = billing.run
        self._stop_keeping: Callable[[], None] | None = None

    settle = blocking(_settle_hold)
    capture = blocking(_capture_hold)
    extend = blocking(_extend_hold)
    release = blocking(_release_hold)
    _leave = blocking(_leave_hold)

    def __repr__(self) -> str:
        return _shown(self)

    def __enter__(self) -> Self:
        try:
            record = self._context
            if record.keep_alive:
                hold = proxy(self)  # a block whose end was interrupted stops nothing, but lets go of the hold
                self._stop_keeping = keep(record.context, record.kept, lambda: hold.extend())
            return self
        except BaseException:  # interrupted: the block does not begin, so it does not end either
            self._leave()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            if self._stop_keeping is not None:
                self._stop_keeping()
            self._leave()
        except BaseException:  # interrupted: nobody else would give it back
            self._leave()
            raise


class AsyncHold:
    """A hold that was granted, for asyncio. See `Hold`."""

    def __init__(self, billing: AsyncBilling, answer: HoldAnswer, life: _Life) -> None:
        self.answer = answer
        self._context = _HoldRecord(billing.context, answer, life)
        self._run = billing.run
        self._keeping: AsyncKeeping | None = None

    settle = awaiting(_settle_hold)
    capture = awaiting(_capture_hold)
    extend = awaiting(_extend_hold)
    release = awaiting(_release_hold)
    leave = awaiting(_leave_hold)

    def __repr__(self) -> str:
        return _shown(self)

    async def __aenter__(self) -> Self:
        record = self._context
        if record.keep_alive:
            self._keeping = AsyncKeeping(record.kept, self.extend)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeping is not None:
            self._keeping.stop()
        await self.leave()


class HoldRequest(Coroutine[Any, Any, AsyncHold]):
    """A hold that is being asked for: `await` it, make a task of it, or use it in `async with`.

    Python warns of one that is forgotten; mypy reports it with `enable_error_code = ["unused-awaitable"]`.
    """

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
        return await self._hold.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        if self._hold is not None:
            await self._hold.__aexit__()


def blocking_hold(
    operation: Callable[Concatenate[Context, P], Effects[HoldAnswer]],
) -> Callable[Concatenate[Billing, P], Hold]:
    """Make a method of `Billing` that reserves."""

    @as_method(operation, "Hold")
    def method(self: Billing, /, *args: P.args, **kwargs: P.kwargs) -> Hold:
        return self.run(reserved(self, *args, **kwargs))

    def reserved(self: Billing, *args: P.args, **kwargs: P.kwargs) -> Effects[Hold]:
        answer = yield from operation(self.context, *args, **kwargs)
        # Made within the operation, so that an interruption here gives the hold back as well.
        return Hold(self, answer, _Life.named_in(args, kwargs))

    return method


def awaiting_hold(
    operation: Callable[Concatenate[Context, P], Effects[HoldAnswer]],
) -> Callable[Concatenate[AsyncBilling, P], HoldRequest]:
    """Make a method of `AsyncBilling` that reserves. A hold that nobody received is released."""

    @as_method(operation, "HoldRequest")
    def method(self: AsyncBilling, /, *args: P.args, **kwargs: P.kwargs) -> HoldRequest:
        return HoldRequest(reserved(self, *args, **kwargs))

    async def reserved(self: AsyncBilling, *args: P.args, **kwargs: P.kwargs) -> AsyncHold:
        steps = operation(self.context, *args, **kwargs)
        undo = partial(spooling.give_back, self.context)
        return AsyncHold(self, await self.run(steps, undo=undo), _Life.named_in(args, kwargs))

    reserved.__qualname__ = operation.__name__  # named by the warning about a forgotten `await`
    return method
