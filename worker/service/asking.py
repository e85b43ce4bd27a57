"""The calls of services: questions, holds, charges, events, and the sponsorship pool."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import Header, Query, Request, Response
from pydantic import BaseModel

from schemas.events import Identifier, MeterCode
from schemas.service import EventsAnswer
from schemas.traces import traceparent_of
from worker.client.preflight import RELAY_METER
from worker.errors import InvalidRequest
from worker.service import bodies
from worker.service.batches import parsed, validated
from worker.service.limits import limit_headers
from worker.service.service import Here

T = TypeVar("T", bound=BaseModel)

IdempotencyKey = Annotated[
    str | None, Header(alias="Idempotency-Key", description="the key of this piece of work; a repeat is harmless")
]
Traceparent = Annotated[str | None, Header(description="W3C trace that the event travels with")]


def answered(answer: BaseModel, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    """Return an answer as JSON. It is made by our own calls, so nothing validates it again."""
    return Response(answer.__pydantic_serializer__.to_json(answer), status, headers, "application/json")


def named_once(field: str, given: str | None, header: str | None) -> str:
    """Return the key of a request: that of the body, or that of `Idempotency-Key`, plain or in quotes.

    Raises InvalidRequest if there is none, or if they are different.
    """
    if header is not None and len(header) > 1 and header[0] == header[-1] == '"':
        header = header[1:-1]
    if given is not None and header is not None and given != header:
        raise InvalidRequest(field, None, "the same as Idempotency-Key, or left out")
    key = header if given is None else given
    if key is None:
        raise InvalidRequest(field, None, "given, in the body or as Idempotency-Key")
    return key


# ---------------------------------------------------------------------------------------------------------------------
# Questions


async def check(here: Here, body: bodies.CheckBody) -> Response:
    """Ask whether a user may spend units now. A *no* is an answer: 200, with `allowed` false and the reason."""
    answer = await here.billing.check(
        body.user_id, body.meter, body.amount, backend=body.backend, pay_from=body.pay_from
    )
    return answered(answer, limit_headers(answer))


async def remaining(here: Here, user_id: Annotated[Identifier, Query()], meter: MeterCode = RELAY_METER) -> Response:
    """Ask how many units are left, in all and per capped backend."""
    return answered(await here.billing.remaining(user_id, meter))


async def estimate(here: Here, body: bodies.EstimateBody) -> Response:
    """Ask what a quantity would cost, which buckets would pay, and what the pool would cover."""
    answer = await here.billing.estimate(
        body.user_id, body.meter, body.quantity, model_slug=body.model_slug, multiplier=body.multiplier,
        backend=body.backend, pay_from=body.pay_from,
    )  # fmt: skip
    return answered(answer, limit_headers(answer.check))


async def plan_backend(here: Here, body: bodies.PlanBackendBody) -> Response:
    """Ask which backend should do a request."""
    meter = RELAY_METER if body.meter is None else body.meter
    return answered(
        await here.billing.plan_backend(body.user_id, body.preference, has_hardware=body.has_hardware, meter=meter)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Holds and charges


async def reserve(here: Here, body: bodies.ReserveBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Check, and set units aside. A repeat with the same key and amount gets the same hold."""
    hold = await here.billing.reserve(
        body.user_id, body.meter, body.amount, named_once("key", body.key, idempotency_key), body.ttl_seconds,
        quantity=body.quantity, model_slug=body.model_slug, multiplier=body.multiplier, backend=body.backend,
        pay_from=body.pay_from,
    )  # fmt: skip
    return answered(hold.answer)


async def capture(
    here: Here, body: bodies.CaptureBody, idempotency_key: IdempotencyKey = None, traceparent: Traceparent = None
) -> Response:
    """Bill a part of a hold as an event. A repeat with the same event id gets the first answer."""
    event_id = named_once("event_id", body.event_id, idempotency_key)
    return answered(
        await here.billing.capture(
            body.user_id,
            body.meter,
            body.key,
            event_id,
            body.amount,
            **body.facts(),
            traceparent=traceparent_of(traceparent),
        )
    )


async def settle(
    here: Here, body: bodies.SettleBody, idempotency_key: IdempotencyKey = None, traceparent: Traceparent = None
) -> Response:
    """Bill a hold as one event, also after it expired. A repeat gets the first answer."""
    key = named_once("key", body.key, idempotency_key)
    return answered(
        await here.billing.settle(
            body.user_id,
            body.meter,
            key,
            body.actual,
            **body.facts(),
            event_id=body.event_id,
            traceparent=traceparent_of(traceparent),
        )
    )


async def release(here: Here, body: bodies.ReleaseBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Give a hold back. The answer has the state before."""
    key = named_once("key", body.key, idempotency_key)
    return answered(await here.billing.release(body.user_id, body.meter, key))


async def extend(here: Here, body: bodies.ExtendBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Prolong an open hold, or hold another amount; only what comes on top is checked."""
    key = named_once("key", body.key, idempotency_key)
    return answered(
        await here.billing.extend(body.user_id, body.meter, key, ttl_seconds=body.ttl_seconds, amount=body.amount)
    )


async def charge(
    here: Here, body: bodies.ChargeBody, idempotency_key: IdempotencyKey = None, traceparent: Traceparent = None
) -> Response:
    """Check, and record an event, in one step. A repeat with the same event id gets the first answer."""
    event_id = named_once("event_id", body.event_id, idempotency_key)
    return answered(
        await here.billing.charge(
            body.user_id,
            body.meter,
            body.amount,
            event_id,
            **body.facts(),
            pay_from=body.pay_from,
            traceparent=traceparent_of(traceparent),
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# Events


async def emit(
    here: Here, request: Request, idempotency_key: IdempotencyKey = None, traceparent: Traceparent = None
) -> Response:
    """Record finished work: one event, or a batch, of which all is valid or nothing is recorded.

    Killed or cut off in between, a batch may be recorded in part: send it again, as identity decides.
    """
    body = parsed(request.headers, await request.body(), here.settings.serve_batch_max_events)
    event_id = None
    if idempotency_key is not None:
        if not body.is_single:
            raise InvalidRequest("Idempotency-Key", None, "left out: the events of a batch have ids of their own")
        event_id = named_once("event_id", None, idempotency_key)
    context = here.billing.context
    batch = validated(context, body, event_id=event_id, traceparent=traceparent_of(traceparent))
    answers = await here.billing.emit_events(batch.events)
    if batch.is_single:
        return answered(answers[0], status=202)
    return answered(EventsAnswer.model_construct(events=tuple(answers)), status=202)


# ---------------------------------------------------------------------------------------------------------------------
# The sponsorship pool


async def decide(here: Here, body: bodies.DecideBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Ask whether the pool covers a request; if it covers all of it, hold that."""
    request_id = named_once("request_id", body.request_id, idempotency_key)
    return answered(await here.billing.decide(body.user_id, body.estimate, request_id, ttl_seconds=body.ttl_seconds))


async def confirm_partial(here: Here, body: bodies.ConfirmBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Hold what the pool covers of a request whose user has paid a part."""
    request_id = named_once("request_id", body.request_id, idempotency_key)
    return answered(
        await here.billing.confirm_partial(
            body.user_id, body.estimate, request_id, paid=body.paid, ttl_seconds=body.ttl_seconds
        )
    )


async def settle_sponsored(
    here: Here,
    body: bodies.SettleSponsoredBody,
    idempotency_key: IdempotencyKey = None,
    traceparent: Traceparent = None,
) -> Response:
    """Record what a sponsored request cost. A repeat gets the first answer."""
    request_id = named_once("request_id", body.request_id, idempotency_key)
    return answered(
        await here.billing.settle_sponsored(
            body.user_id, request_id, body.actual, paid=body.paid, traceparent=traceparent_of(traceparent)
        )
    )


async def release_sponsored(
    here: Here, body: bodies.ReleaseSponsoredBody, idempotency_key: IdempotencyKey = None
) -> Response:
    """Give back what the pool held for a request."""
    request_id = named_once("request_id", body.request_id, idempotency_key)
    return answered(await here.billing.release_sponsored(body.user_id, request_id, body.reason))


async def credit_pool(here: Here, body: bodies.CreditPoolBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Credit the pool with the share of a payment, once for a request."""
    request_id = named_once("request_id", body.request_id, idempotency_key)
    return answered(await here.billing.credit_pool(request_id, body.paid))
