"""Every page of the console, the right that it needs, and the guard before it. What the table lacks is not served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any, NamedTuple

from loguru import logger
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from config.catalogue import CatalogueError
from config.log import described, places_of
from schemas.codes import KeyRefusal
from worker.errors import (
    AccountError,
    ApiKeyRefused,
    BadInput,
    BillingError,
    ClientBusy,
    LedgerUnavailable,
    NotFound,
    RedisUnavailable,
    ReportError,
)
from worker.rules.api_keys import Right, require_right
from worker.service.console import accounts, actions, catalogues, letters, notices, overview, proofs, reports
from worker.service.console.render import HEADERS, error_page, plain_page
from worker.service.console.visit import (
    NOBODY,
    Visit,
    begin_session,
    console_of,
    console_running,
    end_session,
    file_form_of,
    form_of,
    require_token,
    session_of,
    token_of,
)
from worker.service.service import service_of

__all__ = ["CONSOLE", "PAGES", "console_running", "make_console", "shown"]

CONSOLE = "/console"
_STYLE = files("worker.service.console").joinpath("static/console.css").read_text(encoding="utf-8")
_OVER = "Your session is over, or your key is no longer in force. Nothing was done."


class Page(NamedTuple):
    """One page, for keys that have the right. It is made in a thread, as it waits for the servers."""

    path: str
    right: Right
    make: Callable[[Visit], Response]
    takes_form: bool = False
    takes_file: bool = False


PAGES = (
    Page("/accounts", Right.READ_ACCOUNTS, accounts.search),
    Page("/account", Right.READ_ACCOUNTS, accounts.account),
    Page("/event", Right.READ_USAGE, accounts.event),
    Page("/reports", Right.READ_REPORTS, reports.usage),
    Page("/reports.csv", Right.READ_REPORTS, reports.usage_csv),
    Page("/dead-letters", Right.RESOLVE_DEAD_LETTERS, letters.listed),
    Page("/dead-letter", Right.RESOLVE_DEAD_LETTERS, letters.letter),
    Page("/dead-letters/resolve", Right.RESOLVE_DEAD_LETTERS, letters.resolve, takes_form=True),
    Page("/notices", Right.READ_NOTICES, notices.listed),
    Page("/notice", Right.READ_NOTICES, notices.notice),
    Page("/webhooks", Right.MANAGE_WEBHOOKS, notices.of_webhooks, takes_form=True),
    Page("/catalogue", Right.MANAGE_CATALOGUES, catalogues.catalogue, takes_form=True, takes_file=True),
    Page("/proof", Right.READ_STATUS, proofs.proof, takes_form=True),
    *(
        Page(f"/account/{each.name}", each.right, actions.page_of(each), takes_form=True)
        for each in actions.ACTIONS
    ),
)  # fmt: skip


def make_console() -> Starlette:
    """Return the application of the console; the service that mounts it has its `Console`."""
    return Starlette(
        routes=[
            Route("/console.css", _style),
            Route("/sign-in", _sign_in, methods=["GET", "POST"]),
            Route("/sign-out", _sign_out, methods=["POST"]),
            Route("/", _overview),
            *(Route(each.path, _guarded(each), methods=["GET", *(["POST"] * each.takes_form)]) for each in PAGES),
        ],
        exception_handlers={HTTPException: _of_http, **dict.fromkeys(_KINDS, _of_known), Exception: _of_fault},
    )


def shown(scope: Scope, response: Response) -> Response:
    """Return the answer of the door as a page if a browser asked for one of ours."""
    if not scope["path"].startswith(f"{CONSOLE}/"):
        return response
    title, text = _OF_THE_DOOR.get(response.status_code, ("The console failed", "The log of the service says how."))
    return error_page(response.status_code, title, text)


# ---------------------------------------------------------------------------------------------------------------------
# The guard


class _SignedOut(Exception):
    """A request without a session that is in force."""


async def _admitted(request: Request, right: Right, *, takes_file: bool = False) -> Visit:
    """Return the visit of a request whose key has the right, and whose form is from a page of the session.

    Raises _SignedOut, ApiKeyRefused for a wrong role, HTTPException, LedgerUnavailable, ClientBusy.
    """
    console = console_of(request)
    session = session_of(request, console)
    if session is None or session.key_id == NOBODY:
        raise _SignedOut
    try:
        key = await service_of(request).key_named(session.key_id)
    except ApiKeyRefused:
        raise _SignedOut from None
    require_right(key, Right.SIGN_IN)
    require_right(key, right)
    form = {}
    if request.method == "POST":
        form = await (file_form_of if takes_file else form_of)(request)
        require_token(form, session, console)
    return Visit(console, key, token_of(session, console), dict(request.query_params), form)


def _guarded(page: Page) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def answer(request: Request) -> Response:
        try:
            visit = await _admitted(request, page.right, takes_file=page.takes_file)
        except _SignedOut:
            return _signed_out(request)
        return await _made(visit, lambda: page.make(visit))

    return answer


async def _made(visit: Visit, make: Callable[[], Response]) -> Response:
    """Make a page in a thread of the console. Raises ClientBusy if too many people wait."""
    with visit.console.gate.passed():
        return await asyncio.get_running_loop().run_in_executor(visit.console.threads, make)


def _signed_out(request: Request) -> Response:
    """Return the answer to a person without a session: the way to sign in, or for a form that nothing was done."""
    if request.method == "GET":
        return RedirectResponse(f"{CONSOLE}/sign-in", 303)
    return error_page(401, "Sign in again", _OVER)


async def _overview(request: Request) -> Response:
    try:
        visit = await _admitted(request, Right.READ_STATUS)
    except _SignedOut:
        return _signed_out(request)
    reader = service_of(request).reader
    return await _made(visit, lambda: overview.overview(visit, reader.figures()))


# ---------------------------------------------------------------------------------------------------------------------
# Sessions


async def _sign_in(request: Request) -> Response:
    """Show the form; take a key, and begin a session with a new number."""
    if request.method == "GET":
        return _sign_in_page(request)
    console = console_of(request)
    form = await form_of(request)
    session = session_of(request, console)
    if session is None:
        return _sign_in_page(request, 403, "The page was too old, or the browser keeps no cookies. Try again.")
    require_token(form, session, console)
    try:
        key = await service_of(request).key_of(form.get("key", "").strip())
        require_right(key, Right.SIGN_IN)
    except ApiKeyRefused as error:
        status = 403 if error.reason is KeyRefusal.WRONG_ROLE else 401
        return _sign_in_page(request, status, f"The key is refused: {error}.")
    response = RedirectResponse(f"{CONSOLE}/", 303)
    begin_session(response, request, console, key.key_id)
    logger.info("{} signed in to the console", key.name)
    return response


def _sign_in_page(request: Request, status: int = 200, mistake: str | None = None) -> Response:
    console = console_of(request)
    shell = Response()
    session = begin_session(shell, request, console)
    response = plain_page("sign_in.html", status, token=token_of(session, console), mistake=mistake)
    response.headers["set-cookie"] = shell.headers["set-cookie"]
    return response


async def _sign_out(request: Request) -> Response:
    console = console_of(request)
    form = await form_of(request)
    session = session_of(request, console)
    if session is not None:
        require_token(form, session, console)
    response = RedirectResponse(f"{CONSOLE}/sign-in", 303)
    end_session(response, request)
    return response


async def _style(_request: Request) -> Response:
    return Response(_STYLE, media_type="text/css", headers=HEADERS | {"cache-control": "private, max-age=300"})


# ---------------------------------------------------------------------------------------------------------------------
# Errors

_OF_THE_DOOR = {
    408: ("The form did not arrive in time", "Nothing was done. Send it again."),
    413: ("The form is too large", "Nothing was done."),
    503: ("No answer in time", "A change may have been made: look at the account before you repeat it."),
}
_KINDS = (AccountError, ApiKeyRefused, BadInput, BillingError, CatalogueError, ReportError)
_TITLES = {401: "Sign in again", 403: "Not allowed", 404: "No such page", 405: "No such page", 415: "No form"}


async def _of_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = "There is no page at this address." if error.status_code in {404, 405} else error.detail
    return error_page(error.status_code, _TITLES.get(error.status_code, "This cannot be shown"), text)


async def _of_known(_request: Request, error: Exception) -> Response:
    if isinstance(error, ApiKeyRefused):
        return error_page(403, "Not allowed", f"Your key may not do this: {error}.")
    if isinstance(error, ClientBusy):
        return error_page(429, "Too many people wait", "Load the page again in a moment.")
    if isinstance(error, LedgerUnavailable | RedisUnavailable):
        server = "Postgres" if isinstance(error, LedgerUnavailable) else "Redis"
        kind = type(error).__name__
        logger.bind(cause=f"console: {kind}").error("answered 503: {}", described(error))
        return error_page(
            503, f"{server} does not answer", "Load the page again in a moment. A change may be repeated."
        )
    if isinstance(error, BillingError):
        return await _of_fault(_request, error)
    if isinstance(error, NotFound):
        return error_page(404, "There is none", str(error))
    return error_page(422, "This cannot be shown", str(error))


async def _of_fault(_request: Request, error: Exception) -> Response:
    kind = type(error).__name__
    logger.bind(cause=f"console: {kind}").error("a page failed: {}{}", described(error), places_of(error))
    return error_page(500, "The console failed", "The log of the service says how. Nothing was half done.")
