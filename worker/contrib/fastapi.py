"""The client in a FastAPI application. Needs the extra `fastapi`: `pip install 'meterfall-client[fastapi]'`.

    app = FastAPI(lifespan=lifespan())
    add_error_handlers(app)

    def characters(speech: Speech) -> int:
        return len(speech.text)

    Speaking = Annotated[Work, reserved(meter="premium_voice", user=user_of, key=job_of, amount=characters)]

    @app.post("/speech")
    async def speak(speech: Speech, work: Speaking) -> BilledResponse:
        return BilledResponse(work, synthesize(speech.text), units=len, media_type="audio/mpeg")

A response that arrives whole is billed: the event is recorded before the end of the response is sent. A listener who
hangs up is billed for the units produced until then. If no units were produced, the hold is released.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from config.settings import Settings
from schemas.answers import Reason
from schemas.events import Scalar
from worker.client import AsyncBilling, AsyncHold
from worker.client.effects import logger
from worker.errors import (
    BillingError,
    ClientBusy,
    ClientClosed,
    EventConflict,
    HoldClosed,
    HoldConflict,
    InvalidRequest,
    LedgerUnavailable,
    RedisUnavailable,
    SpoolUnavailable,
    UsageDenied,
    UsageLimitExceeded,
)

__all__ = ["BilledResponse", "Work", "add_error_handlers", "billing_of", "lifespan", "problem_of", "reserved"]

# Where the client is in the state of the application, and in that of each request.
_STATE = "meterfall"


def lifespan(
    billing: AsyncBilling | Settings | None = None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """Return a lifespan that has a client for the application, and closes it at the end.

    Without a client or settings, it connects as the environment says, once the application starts. An application with
    a lifespan of its own enters it there: `async with lifespan()(app) as state: yield {**state, ...}`.
    """

    @asynccontextmanager
    async def running(_app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        opened = billing if isinstance(billing, AsyncBilling) else AsyncBilling.connect(billing)
        async with opened:
            yield {_STATE: opened}

    return running


def billing_of(connection: HTTPConnection) -> AsyncBilling:
    """Return the client of the application; a dependency: `billing: AsyncBilling = Depends(billing_of)`.

    Raises RuntimeError if the application does not run in `lifespan`.
    """
    found = getattr(connection.state, _STATE, None)
    if not isinstance(found, AsyncBilling):
        raise RuntimeError(
            "this application has no billing client: FastAPI(lifespan=meterfall.contrib.fastapi.lifespan())"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Holds around requests and streams


class Work:
    """The work of one request: its hold, and the units that it has produced so far.

    At the end of the request, the units become one event under the key of the hold, with `dimensions` and `source`.
    Without units, what is left of the hold is released. A handler may settle `hold` itself instead. `streams`: a
    response finishes the work, at the end of its stream.
    """

    def __init__(self, hold: AsyncHold, *, source: str | None = None, model_slug: str | None = None) -> None:
        self.hold = hold
        self.units = 0
        self.dimensions: dict[str, Scalar] = {}
        self.source = source
        self.model_slug = model_slug
        self.streams = False
        self._finished = False

    def add(self, units: int) -> None:
        """Count units that were produced: a quantity if the hold was reserved with one, else an amount."""
        self.units += units

    async def finish(self) -> None:
        """Settle the units, or release the hold. Only the first call does something.

        Raises RedisUnavailable with the event, unless a spool is set; the hold then stays until it expires.
        """
        if self._finished:
            return
        self._finished = True
        try:
            if self.units:
                await self._settle()
        finally:
            await self.hold.__aexit__()

    async def _settle(self) -> None:
        dimensions = self.dimensions or None
        if self.hold.answer.multiplier is None:
            await self.hold.settle(self.units, source=self.source, dimensions=dimensions)
        else:
            await self.hold.settle(
                quantity=self.units, model_slug=self.model_slug, source=self.source, dimensions=dimensions
            )


def reserved(
    *,
    meter: str,
    user: Callable[..., Any],
    key: Callable[..., Any],
    amount: Callable[..., Any] | int | None = None,
    quantity: Callable[..., Any] | int | None = None,
    model_slug: Callable[..., Any] | str | None = None,
    backend: Callable[..., Any] | str | None = None,
    ttl_seconds: int | None = None,
    keep_alive: bool = False,
    source: str | None = None,
) -> Any:
    """Return a dependency that reserves before the handler runs: `work: Annotated[Work, reserved(...)]`.

    The arguments are those of `AsyncBilling.reserve`. Functions among them are dependencies themselves: FastAPI fills
    their parameters, such as `request: Request` or the model of the body. With `keep_alive`, the hold is renewed until
    the work is finished.

    The hold is settled or released before the response is sent; by a `BilledResponse`, at the end of its stream. Units
    that a handler has counted are settled also if it raises.

    Raises what `reserve` does; `add_error_handlers` makes answers of it.
    """
    of_user, of_key = Depends(user), Depends(key)
    of_amount, of_quantity, of_model, of_backend = map(_dependency, (amount, quantity, model_slug, backend))

    async def reserve(
        connection: HTTPConnection,
        user_id: Any = of_user,
        hold_key: Any = of_key,
        units: Any = of_amount,
        unpriced: Any = of_quantity,
        model: Any = of_model,
        on: Any = of_backend,
    ) -> AsyncIterator[Work]:
        request = billing_of(connection).reserve(
            user_id, meter, units, hold_key, ttl_seconds,
            quantity=unpriced, model_slug=model, backend=on, keep_alive=keep_alive,
        )  # fmt: skip
        work = Work(await request.__aenter__(), source=source, model_slug=model)
        try:
            yield work
        except BaseException:
            await work.finish()
            raise
        if not work.streams:
            await work.finish()

    return Depends(reserve, **_SCOPE)


# Has the code after `yield` run before the response is sent, as it did before FastAPI 0.118. Releases 0.118 to 0.120
# have no such choice: there a plain answer is billed right after it was sent.
_SCOPE: dict[str, Any] = {"scope": "function"} if "scope" in inspect.signature(Depends).parameters else {}


def _dependency(value: Any) -> Any:
    """Return a dependency for a function, or for a value that is the same for every request."""

    async def fixed() -> Any:  # not a plain function, which FastAPI would run in a thread
        return value

    return Depends(value if callable(value) else fixed)


class BilledResponse(StreamingResponse):
    """A stream that settles the units that it produced: at its end, or when it is cut off.

    `units` says how many units a chunk is; they count before the chunk is sent. Without it, the
    producer of the chunks calls `work.add`. Return it from the handler that has the work.

    It closes the producer as well. A StreamingResponse does not: a generator that was cut off at its `yield` ends only
    when Python collects it, and a hold of its own stays open for as long.
    """

    def __init__(
        self,
        work: Work,
        content: AsyncIterable[Any] | Iterable[Any],
        *,
        units: Callable[[Any], int] | None = None,
        **response: Any,
    ) -> None:
        """`response` are the other arguments of a StreamingResponse, such as `media_type`."""
        work.streams = True
        self._work = work
        self._chunks = _counted(work, content, units)
        super().__init__(self._chunks, **response)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Nothing is left to be settled when this returns or raises."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._chunks.aclose()  # type: ignore[attr-defined]
            finally:
                await self._work.finish()


async def _counted(
    work: Work, content: AsyncIterable[Any] | Iterable[Any], units: Callable[[Any], int] | None
) -> AsyncIterator[Any]:
    """Yield the chunks and count their units; settle them before the end is told."""
    chunks = content if isinstance(content, AsyncIterable) else iterate_in_threadpool(content)
    try:
        async for chunk in chunks:
            if units is not None:
                work.add(units(chunk))
            yield chunk
    finally:
        # A producer that was cut off ends now, not when Python collects it: it may count its last units.
        if (end := getattr(chunks, "aclose", None)) is not None:
            await end()
        if (close := getattr(content, "close", None)) is not None:
            close()
    await work.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Errors as HTTP answers


class _Problem(NamedTuple):
    """How one kind of error is answered."""

    kind: type[BillingError]
    status: int
    title: str
    detail: str


# The first that fits. No detail names a user, or a server with its address: errors do.
_PROBLEMS = (
    _Problem(UsageLimitExceeded, 402, "Usage limit exceeded", "The amount does not fit into the units left."),
    _Problem(UsageDenied, 402, "Usage denied", "This account may not use this meter."),
    _Problem(HoldConflict, 409, "Hold conflict", "The key already holds another amount, meter or backend."),
    _Problem(HoldClosed, 409, "Hold closed", "The work of this key is over. Take another key for other work."),
    _Problem(EventConflict, 409, "Event conflict", "The event id already stands for another event."),
    _Problem(InvalidRequest, 422, "Invalid request", "An argument is malformed."),
    _Problem(ClientBusy, 429, "Too many requests", "All connections of the service are in use."),
    _Problem(RedisUnavailable, 503, "Billing unavailable", "The billing service does not answer."),
    _Problem(LedgerUnavailable, 503, "Billing unavailable", "The billing service does not answer."),
    _Problem(SpoolUnavailable, 503, "Billing unavailable", "The billing service does not answer."),
    _Problem(ClientClosed, 503, "Billing unavailable", "The service is shutting down."),
    _Problem(BillingError, 500, "Billing misconfigured", "The service is not set up for billing."),
)
_REDIS_DOWN = {Reason.REDIS_DOWN_DENIED, Reason.REDIS_DOWN_BOUND_REACHED}
_FIGURES = {
    "meter", "requested", "reason", "available", "limit", "used", "pending", "rollover", "purchased", "kind", "backend",
    "wallet", "price", "cost",
}  # fmt: skip
_FIGURES_OF_A_CAP = {"cap", "cap_used", "cap_pending"}


def add_error_handlers(app: FastAPI, *, retry_after_seconds: int = 1) -> None:
    """Answer errors of billing as `application/problem+json` (RFC 9457), with a status that says whose turn it is."""

    async def answer(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, BillingError)
        problem = problem_of(error)
        status = int(problem["status"])
        if status >= 500:
            events = [event.event_id for event in getattr(error, "events", ())]
            logger.error("answered %s: %s%s", status, error, f" {events}" if events else "")
        headers = {"Retry-After": str(retry_after_seconds)} if status in {429, 503} else None
        return JSONResponse(problem, status, headers, "application/problem+json")

    app.add_exception_handler(BillingError, answer)


def problem_of(error: BillingError) -> dict[str, Any]:
    """Return the members of the problem document of an error. They name neither a user nor a server.

    A denial has the figures of the check's answer. One that is due to an outage of Redis is 503, not 402: no payment
    would help.
    """
    problem = next(each for each in _PROBLEMS if isinstance(error, each.kind))
    found: dict[str, Any] = {
        "type": f"urn:meterfall:{problem.title.lower().replace(' ', '-')}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
    }
    if isinstance(error, InvalidRequest):
        found |= {"detail": f"{error.field}: must be {error.allowed}", "field": error.field}
    if isinstance(error, UsageDenied):
        if error.answer.reason in _REDIS_DOWN:
            return problem_of(RedisUnavailable("")) | {"reason": error.answer.reason.value}
        figures = _FIGURES if error.answer.cap is None else _FIGURES | _FIGURES_OF_A_CAP
        found |= error.answer.model_dump(mode="json", include=figures, exclude_none=True)
    return found
