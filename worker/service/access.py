"""Every operation of the service, the right that it needs, and the guard before each.

A role has the rights that worker/rules/api_keys.py lists for it. What this table does not name is not served.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from schemas.answers import (
    ChargeAnswer,
    CheckAnswer,
    CreditAnswer,
    EstimateAnswer,
    EventAnswer,
    HoldAnswer,
    Remaining,
    RoutingAnswer,
    SettlementAnswer,
    SponsorAnswer,
    SponsorHoldAnswer,
)
from schemas.codes import KeyRefusal
from schemas.service import EventsAnswer
from worker.errors import ApiKeyRefused
from worker.rules.api_keys import Right, require_right
from worker.service import asking
from worker.service.service import service_of


class Operation(NamedTuple):
    """One path and method. `answer` is what it answers with `status`."""

    method: str
    path: str
    right: Right
    call: Callable[..., Coroutine[Any, Any, Response]]
    answer: Any
    status: int = 200


def _post(path: str, right: Right, call: Any, answer: Any, status: int = 200) -> Operation:
    return Operation("POST", f"/v1/{path}", right, call, answer, status)


def _get(path: str, right: Right, call: Any, answer: Any) -> Operation:
    return Operation("GET", f"/v1/{path}", right, call, answer)


OPERATIONS = (
    _post("check", Right.CHECK, asking.check, CheckAnswer),
    _post("estimate", Right.CHECK, asking.estimate, EstimateAnswer),
    _get("remaining", Right.CHECK, asking.remaining, Remaining),
    _post("plan-backend", Right.CHECK, asking.plan_backend, RoutingAnswer),
    _post("holds", Right.HOLD, asking.reserve, HoldAnswer),
    _post("holds/capture", Right.HOLD, asking.capture, EventAnswer),
    _post("holds/settle", Right.HOLD, asking.settle, EventAnswer),
    _post("holds/release", Right.RELEASE_HOLD, asking.release, HoldAnswer),
    _post("holds/extend", Right.HOLD, asking.extend, HoldAnswer),
    _post("charge", Right.CHARGE, asking.charge, ChargeAnswer),
    _post("events", Right.EMIT, asking.emit, EventAnswer | EventsAnswer, 202),
    _post("sponsorship/decide", Right.SPONSOR, asking.decide, SponsorAnswer),
    _post("sponsorship/confirm", Right.SPONSOR, asking.confirm_partial, SponsorAnswer),
    _post("sponsorship/settle", Right.SPONSOR, asking.settle_sponsored, SettlementAnswer),
    _post("sponsorship/release", Right.SPONSOR, asking.release_sponsored, SponsorHoldAnswer),
    _post("sponsorship/credit", Right.CREDIT_POOL, asking.credit_pool, CreditAnswer),
)
