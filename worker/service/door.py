"""The outermost part: a time limit, a size limit and headers for every request, and an answer whatever happens.

Plain ASGI, because it must stand before anything that reads a body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config.settings import Settings
from worker.service.problems import fault, problem, unavailable

# An API answers programs: no browser may show, keep or embed what it says. TLS, and its headers, are the proxy's.
HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)


# Returns what a caller is shown: the answer that was made for a program, or a page in its place.
Shown = Callable[[Scope, Response], Response]


def _for_programs(_scope: Scope, response: Response) -> Response:
    return response


class Door:
    """An application behind the limits of the settings."""

    def __init__(self, app: ASGIApp, settings: Settings, shown: Shown = _for_programs) -> None:
        self.app = app
        self._shown = shown
        self._max_bytes = settings.serve_body_max_bytes
        self._seconds = settings.serve_timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; other scopes go through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _Request(receive, send, self._max_bytes, self._shown, has_arrived=not _has_body(scope))
        if _length_of(scope) > self._max_bytes:
            await request.answer(_too_large(self._max_bytes), scope)
            return
        try:
            async with asyncio.timeout(self._seconds):
                await self.app(scope, request.receive, request.send)
        except TimeoutError:
            await request.answer(self._late(request), scope)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets an answer
            if not request.has_begun:  # else the application has told of it
                await request.answer(fault(error), scope)

    def _late(self, request: _Request) -> Response:
        """Return the answer after the time is over: whose turn it was."""
        if request.waits_for_body:
            return problem(408, f"The body did not arrive within {self._seconds} s.")
        return unavailable(f"No answer within {self._seconds} s. Repeat the request with the same key.")


class _Request:
    """One request on its way in and out."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int, shown: Shown, *, has_arrived: bool) -> None:
        self._shown = shown
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._bytes = 0
        self._has_arrived = has_arrived
        # True while the application waits for the body. Before, it works by itself: it asks who calls.
        self.waits_for_body = False
        self.has_begun = False

    async def receive(self) -> Message:
        """Take the next part of the body. Raises HTTPException with 413 beyond the limit."""
        self.waits_for_body = not self._has_arrived
        message = await self._receive()
        self.waits_for_body = False
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            if self._bytes > self._max_bytes:
                raise HTTPException(413, _too_large_detail(self._max_bytes))
            self._has_arrived = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response, with the headers that each one has."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            named = {name for name, _ in message.get("headers", ())}
            message["headers"] = [
                *message.get("headers", ()),
                *((name, value) for name, value in HEADERS if name not in named),
            ]
        await self._send(message)

    async def answer(self, response: Response, scope: Scope) -> None:
        """Send a whole response, unless another one has begun: that one ends cut off, as its client must notice."""
        if not self.has_begun:
            await self._shown(scope, response)(scope, self._receive, self.send)


def _length_of(scope: Scope) -> int:
    """Return the length that a request announces; 0 if it announces none, or no number of a sane length."""
    headers: Any = scope["headers"]
    value = next((value for name, value in headers if name == b"content-length"), b"0")
    return int(value) if value.isdigit() and len(value) < 20 else 0


def _has_body(scope: Scope) -> bool:
    """Return True if a request announces a body."""
    return _length_of(scope) > 0 or any(name == b"transfer-encoding" for name, _ in scope["headers"])


def _too_large_detail(max_bytes: int) -> str:
    return f"The body may have {max_bytes} bytes."


def _too_large(max_bytes: int) -> Response:
    return problem(413, _too_large_detail(max_bytes))
