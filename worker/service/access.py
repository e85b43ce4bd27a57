"""Every operation of the service, the right that it needs, and the guard before each.

A role has the rights that worker/rules/api_keys.py lists for it. What this table does not name is not served.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple

from fastapi import Request, Response
from fastapi.routing import APIRoute
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
from schemas.notices import NoticeFeed
from schemas.reports import (
    AccountLimits,
    Breakdown,
    Credits,
    Engagement,
    EventPage,
    Explanation,
    Timeline,
    UsageSummary,
)
from schemas.service import AccountChange, AccountState, ClosedAccount, EventsAnswer, Plans
from worker.errors import ApiKeyRefused
from worker.rules.api_keys import RIGHTS, ApiKey, Right, require_right
from worker.service import asking, changing, reading
from worker.service.service import service_of


class Operation(NamedTuple):
    """One path and method, for keys that have one of the `rights`. `answer` is what it answers with `status`."""

    method: str
    path: str
    rights: tuple[Right, ...]
    call: Callable[..., Coroutine[Any, Any, Response]]
    answer: Any
    status: int = 200

    @property
    def finds_account(self) -> bool:
        """True if an unknown account, or an unknown event of it, is answered 404. Pre-flight calls answer a reason."""
        return self.path.startswith("/v1/accounts/") or self.call in _OF_ACCOUNT


_OF_ACCOUNT = (
    reading.balances, reading.credits, reading.limits, reading.usage, reading.breakdown, reading.engagement,
    reading.timeline, reading.events, reading.explain,
)  # fmt: skip


def _post(path: str, rights: Right | tuple[Right, ...], call: Any, answer: Any, status: int = 200) -> Operation:
    return Operation("POST", f"/v1/{path}", _all(rights), call, answer, status)


def _get(path: str, rights: Right | tuple[Right, ...], call: Any, answer: Any) -> Operation:
    return Operation("GET", f"/v1/{path}", _all(rights), call, answer)


def _all(rights: Right | tuple[Right, ...]) -> tuple[Right, ...]:
    return rights if isinstance(rights, tuple) else (rights,)


OPERATIONS = (
    _post("check", Right.CHECK, asking.check, CheckAnswer),
    _post("estimate", Right.CHECK, asking.estimate, EstimateAnswer),
    _get("remaining", Right.CHECK, asking.remaining, Remaining),
    _post("plan-backend", Right.CHECK, asking.plan_backend, RoutingAnswer),
    _post("holds", Right.HOLD, asking.reserve, HoldAnswer),
    _post("holds/capture", Right.HOLD, asking.capture, EventAnswer),
    _post("holds/settle", Right.HOLD, asking.settle, EventAnswer),
    _post("holds/release", (Right.HOLD, Right.RELEASE_HOLD), asking.release, HoldAnswer),
    _post("holds/extend", Right.HOLD, asking.extend, HoldAnswer),
    _post("charge", Right.CHARGE, asking.charge, ChargeAnswer),
    _post("events", Right.EMIT, asking.emit, EventAnswer | EventsAnswer, 202),
    _post("sponsorship/decide", Right.SPONSOR, asking.decide, SponsorAnswer),
    _post("sponsorship/confirm", Right.SPONSOR, asking.confirm_partial, SponsorAnswer),
    _post("sponsorship/settle", Right.SPONSOR, asking.settle_sponsored, SettlementAnswer),
    _post("sponsorship/release", Right.SPONSOR, asking.release_sponsored, SponsorHoldAnswer),
    _post("sponsorship/credit", Right.CREDIT_POOL, asking.credit_pool, CreditAnswer),
    _get("balances", Right.READ_ACCOUNTS, reading.balances, AccountState),
    _get("credits", Right.READ_ACCOUNTS, reading.credits, Credits),
    _get("limits", Right.READ_ACCOUNTS, reading.limits, AccountLimits),
    _get("plans", Right.READ_ACCOUNTS, reading.plans, Plans),
    _get("usage", Right.READ_USAGE, reading.usage, UsageSummary),
    _get("breakdown", Right.READ_USAGE, reading.breakdown, Breakdown),
    _get("engagement", Right.READ_USAGE, reading.engagement, Engagement),
    _get("timeline", Right.READ_USAGE, reading.timeline, Timeline),
    _get("events", Right.READ_USAGE, reading.events, EventPage),
    _get("explain", Right.READ_USAGE, reading.explain, Explanation),
    _get("notices", Right.READ_NOTICES, reading.notices, NoticeFeed),
    _post("accounts/open", Right.OPEN_ACCOUNT, changing.open_account, AccountChange),
    _post("accounts/grant", Right.GRANT, changing.grant, AccountChange),
    _post("accounts/claw-back", Right.CLAW_BACK, changing.claw_back, AccountChange),
    _post("accounts/reverse", Right.REVERSE, changing.reverse, AccountChange),
    _post("accounts/renew", Right.RENEW, changing.renew, AccountChange),
    _post("accounts/change-plan", Right.CHANGE_PLAN, changing.change_plan, AccountChange),
    _post("accounts/set-status", Right.SET_STATUS, changing.set_status, AccountChange),
    _post("accounts/set-limit", Right.SET_LIMIT, changing.set_limit, AccountChange),
    _post("accounts/forgive-debt", Right.FORGIVE_DEBT, changing.forgive_debt, AccountChange),
    _post("accounts/set-trust", Right.SET_TRUST, changing.set_trust, AccountChange),
    _post("accounts/close", Right.CLOSE_ACCOUNT, changing.close, ClosedAccount),
)

_BY_PATH: Mapping[tuple[str, str], Operation] = {(each.method, each.path): each for each in OPERATIONS}
# It takes other media types also, and names them itself.
_READS_ITS_BODY = asking.emit


class GuardedRoute(APIRoute):
    """A route that asks for the API key before it reads the body. A route without an operation cannot be made."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler behind the guard."""
        handle = super().get_route_handler()
        method = next(iter(self.methods or ()))
        operation = _BY_PATH[method, self.path]
        takes_json = method == "POST" and operation.call is not _READS_ITS_BODY

        async def guarded(request: Request) -> Response:
            request.state.key = await _admitted(request, operation)
            if takes_json and not _is_json(request):
                raise HTTPException(415, "Content-Type: must be application/json")
            return await handle(request)

        return guarded


async def _admitted(request: Request, operation: Operation) -> ApiKey:
    """Return the API key of a request if it may do this. Raises ApiKeyRefused, LedgerUnavailable, ClientBusy."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise ApiKeyRefused(KeyRefusal.MISSING, "missing: send it as Authorization: Bearer <key>")
    key = await service_of(request).key_of(secret.strip())
    held = RIGHTS[key.role]
    require_right(key, next((right for right in operation.rights if right in held), operation.rights[0]))
    return key


def _is_json(request: Request) -> bool:
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    return kind.strip().lower() == "application/json" and charset in {"", "charset=utf-8"}
