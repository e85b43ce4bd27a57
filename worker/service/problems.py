"""Errors as problem documents (RFC 9457): one for each, with a reason code, and nothing of the payload.

The errors of the client have the documents of worker/contrib/fastapi.py. Here are those of accounts, of API keys, of
requests that no call was made for, and of faults that nobody expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from loguru import logger
from starlette.exceptions import HTTPException
from starlette.routing import Route

from config.catalogue import CatalogueError
from config.log import described, places_of
from schemas.codes import KeyRefusal
from schemas.events import ALLOWED
from worker.contrib.fastapi import problem_of
from worker.errors import (
    AccountError,
    ApiKeyRefused,
    BillingError,
    ClientBusy,
    InvalidRequest,
    KeyConflict,
    NotFound,
    RedisUnavailable,
    ReportError,
    UsageDenied,
)
from worker.service.limits import limit_headers

MEDIA_TYPE = "application/problem+json"
# A client that is told of more mistakes at once mends no more of them.
MAX_MISTAKES = 20
_MAX_NAME = 64
_RETRY_AFTER = {"Retry-After": "1"}
# Titles become types, so they must not change with the words that a release of Python has for a status.
_TITLES = {
    401: "Unauthorized", 403: "Forbidden", 404: "Not found", 405: "Method not allowed",
    408: "Request timeout", 413: "Content too large", 415: "Unsupported media type", 500: "Internal server error",
}  # fmt: skip
_DETAILS = {
    404: "There is no such path.",
    405: "This path takes other methods.",
}


class Mistake(Exception):
    """A request that the service refuses before any call. `errors` are its mistakes, the first of them first.

    Each has `detail`, and as far as they are known `field` and `index`, the place of an event in its batch.
    """

    def __init__(self, errors: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(errors[0]["detail"])
        self.errors = [dict(each) for each in errors[:MAX_MISTAKES]]


def mistake_of(error: InvalidRequest, index: int | None = None) -> dict[str, Any]:
    """Return the mistake that a call found in an argument; `index` is the place of its event in the batch."""
    found: dict[str, Any] = {} if index is None else {"index": index}
    name = _named(error.field)
    return found | {"field": name, "detail": f"{name}: must be {error.allowed}"}


def problem(
    status: int, detail: str, *, title: str | None = None, headers: Mapping[str, str] | None = None, **members: Any
) -> JSONResponse:
    """Return a problem document. Its `type` is a URN made of the title, by default the words of the status."""
    title = title or _TITLES.get(status) or HTTPStatus(status).phrase.capitalize()
    kind = title.lower().replace(" ", "-")
    content = {"type": f"urn:meterfall:{kind}", "title": title, "status": status, "detail": detail, **members}
    return JSONResponse(content, status, dict(headers or {}), MEDIA_TYPE)


def unavailable(detail: str) -> JSONResponse:
    """Return the document of a request that found no answer in time."""
    return problem(503, detail, title="Billing unavailable", headers=_RETRY_AFTER)


def fault(error: BaseException) -> JSONResponse:
    """Return the document of an error that nobody expected. The log has its kind and places, the answer neither."""
    kind = type(error).__name__
    logger.bind(cause=f"serve: {kind}").error("a request failed: {}{}", described(error), places_of(error))
    return problem(500, "The service failed. Its log says how.")


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of the application with its problem document."""
    for kind, answer in (
        (BillingError, _of_billing),
        (NotFound, _of_unknown),
        (AccountError, _of_account),
        (ReportError, _of_report),
        (CatalogueError, _of_report),
        (ApiKeyRefused, _of_key),
        (Mistake, _of_mistake),
        (RequestValidationError, _of_validation),
        (HTTPException, _of_http),
        (Exception, _of_fault),
    ):
        app.add_exception_handler(kind, answer)  # type: ignore[arg-type]


async def _of_billing(_request: Request, error: BillingError) -> JSONResponse:
    if isinstance(error, InvalidRequest):
        return _of_mistakes([mistake_of(error)])
    found = problem_of(error)
    status = int(found["status"])
    headers = dict(_RETRY_AFTER) if status in {429, 503} else {}
    if status >= 500:
        kind = type(error).__name__
        logger.bind(cause=f"serve: {kind}").error("answered {}: {}", status, described(error))
    if isinstance(error, UsageDenied):
        headers |= limit_headers(error.answer)
    if isinstance(error, RedisUnavailable) and error.events:
        found["unconfirmed"] = [event.event_id for event in error.events]
    if isinstance(error, ClientBusy):
        found["detail"] = "The service has too much work. Try again."
    return JSONResponse(found, status, headers, MEDIA_TYPE)


async def _of_unknown(_request: Request, error: NotFound) -> JSONResponse:
    named = _field_in(error)
    reason = "unknown_event" if named.get("field") == "event_id" else "unknown_account"
    return problem(404, str(error), reason=reason, **named)


async def _of_account(_request: Request, error: AccountError) -> JSONResponse:
    title = "Key conflict" if isinstance(error, KeyConflict) else "Change refused"
    return problem(409 if isinstance(error, KeyConflict) else 422, str(error), title=title, **_field_in(error))


async def _of_report(_request: Request, error: ReportError | CatalogueError) -> JSONResponse:
    return problem(422, str(error), title="Invalid request", **_field_in(error))


async def _of_key(_request: Request, error: ApiKeyRefused) -> JSONResponse:
    if error.reason is KeyRefusal.WRONG_ROLE:
        return problem(403, str(error), reason=error.reason.value)
    return problem(401, str(error), reason=error.reason.value, headers={"WWW-Authenticate": "Bearer"})


async def _of_mistake(_request: Request, error: Mistake) -> JSONResponse:
    return _of_mistakes(error.errors)


async def _of_validation(_request: Request, error: RequestValidationError) -> JSONResponse:
    return _of_mistakes([_in_words(each) for each in error.errors()[:MAX_MISTAKES]])


async def _of_http(request: Request, error: HTTPException) -> JSONResponse:
    if error.status_code == 400:  # FastAPI's, for a body that is no UTF-8 or nested too deeply
        return _of_mistakes([{"field": "body", "detail": "body: must be JSON in UTF-8"}])
    detail = _DETAILS.get(error.status_code, error.detail)
    headers = error.headers
    if error.status_code == 405:  # a route knows its own method; a path may have several
        headers = {"Allow": ", ".join(_methods_of(request))}
    return problem(error.status_code, detail, headers=headers)


def _methods_of(request: Request) -> list[str]:
    """Return all methods of the path of a request."""
    path = request.scope["path"]
    routes = [route for route in request.app.routes if isinstance(route, Route) and route.path == path]
    return sorted({method for route in routes for method in route.methods or ()})


async def _of_fault(_request: Request, error: Exception) -> JSONResponse:
    return fault(error)


def _of_mistakes(errors: Sequence[Mapping[str, Any]]) -> JSONResponse:
    """Return the document of a request with mistakes: the first one, and all of them in `errors`."""
    first = errors[0]
    return problem(422, title="Invalid request", **first, errors=list(errors))


def _in_words(error: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mistake that pydantic found, with the name of its field and in words what that takes."""
    place, *path = (str(part) for part in error["loc"])
    if error["type"] == "json_invalid":
        return {"field": "body", "detail": f"body: must be JSON, which it is not from character {path[0]} on"}
    name = _named(".".join(path)) or place
    if error["type"] == "missing":
        allowed = "must be given"
    elif error["type"] == "extra_forbidden":
        allowed = "must be left out: there is no such field"
    elif name in ALLOWED and path[-1:] == [name]:
        allowed = f"must be {ALLOWED[name]}"
    else:
        allowed = str(error["msg"]).removeprefix("Value error, ")
        allowed = allowed.replace("Input should be", "must be", 1).replace("String should", "must", 1)
    return {"field": name, "detail": f"{name}: {allowed}"}


def _named(field: str) -> str:
    """Return the name of a field, which a caller may have made up, as a document can hold it."""
    return field[:_MAX_NAME].encode("utf-8", "backslashreplace").decode("utf-8")


def _field_in(error: Exception) -> dict[str, Any]:
    """Return the field that a message names, as all of ours do."""
    field, colon, _ = str(error).partition(": ")
    return {"field": field} if colon and field.replace(".", "").replace("_", "").isalnum() else {}
