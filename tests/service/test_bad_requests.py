"""Requests that no call is made for: one problem document each, with the right status, and nothing of the payload."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import closing
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from tests.support.resources import settings_for
from tests.support.serving import Served
from worker.service.app import make_app
from worker.service.door import HEADERS, Door

WHO = {"user_id": "user-42", "meter": "premium_voice"}


def test_paths_and_methods_that_there_are_not(served: Served) -> None:
    for path in ("/", "/v1", "/v1/nothing", "/docs", "/openapi.json", "/v1/check/"):
        answer = served.get(path)
        assert (answer.status, answer.problem["title"]) == (404, "Not found"), path
    wrong = served.ask("GET", "/v1/check")
    assert (wrong.status, wrong.problem["title"], wrong.headers["allow"]) == (405, "Method not allowed", "POST")
    assert served.ask("DELETE", "/live").status == 405
    assert served.ask("PUT", "/v1/events").headers["allow"] == "GET, POST"


def test_every_answer_has_the_security_headers(served: Served) -> None:
    for answer in (served.get("/live"), served.get("/nothing"), served.post("/v1/check", WHO)):
        assert {name.decode(): value.decode() for name, value in HEADERS}.items() <= answer.headers.items()
        assert "server" not in answer.headers
    asked = served.ask(
        "OPTIONS", "/v1/check", None, None, {"Origin": "https://x", "Access-Control-Request-Method": "POST"}
    )
    assert not any(name.startswith("access-control") for name in asked.headers)


WRONG_BODIES: list[tuple[Any, str, str]] = [
    ({}, "user_id", "must be given"),
    ({**WHO, "amount": "7"}, "amount", "valid integer"),
    ({**WHO, "amount": 7.5}, "amount", "valid integer"),
    ({**WHO, "amount": True}, "amount", "valid integer"),
    ({**WHO, "amount": -1}, "amount", "greater than or equal to 0"),
    ({**WHO, "amount": 10**13}, "amount", "less than or equal to"),
    ({**WHO, "amount": None}, "amount", "valid integer"),
    ({**WHO, "colour": "red"}, "colour", "left out"),
    ({**WHO, "\ud800": "red"}, "body", ""),
    ({**WHO, "x" * 900: "red"}, "x" * 64, "left out"),
    ({**WHO, "user_id": "a b"}, "user_id", "1 to 128 characters"),
    ({**WHO, "user_id": 7}, "user_id", "1 to 128 characters"),
    ({**WHO, "meter": "Voice"}, "meter", "characters of a-z"),
    ({**WHO, "meter": "no_such_meter"}, "meter", "one of "),
    ({**WHO, "backend": "moon"}, "backend", "one of "),
    ({**WHO, "pay_from": "all"}, "pay_from", "allowance"),
    ([WHO], "body", ""),
    ("text", "body", ""),
    (None, "body", ""),
]


@pytest.mark.parametrize(("body", "field", "allowed"), WRONG_BODIES, ids=[str(each[0])[-40:] for each in WRONG_BODIES])
def test_a_wrong_body_names_its_field(served: Served, body: Any, field: str, allowed: str) -> None:
    answer = served.ask(
        "POST", "/v1/check", json.dumps(body).encode(), "producer", {"Content-Type": "application/json"}
    )
    assert answer.status == 422
    assert answer.problem["field"] == field
    assert allowed in answer.problem["detail"]


def test_a_body_that_is_no_json(served: Served) -> None:
    for body in (b"", b"{", b'{"a": NaN', b"\xff", b"[" * 100_000, b'{"amount": ' + b"9" * 5_000 + b"}"):
        answer = served.ask("POST", "/v1/check", body, "producer", {"Content-Type": "application/json"})
        assert (answer.status, answer.problem["title"]) == (422, "Invalid request"), body[:20]
        assert answer.problem["field"] in {"body", "amount"}
    for media in ("text/plain", "application/x-www-form-urlencoded", "", "application/json; charset=latin-1"):
        answer = served.ask("POST", "/v1/check", b"{}", "producer", {"Content-Type": media})
        assert (answer.status, answer.problem["title"]) == (415, "Unsupported media type"), media


def test_a_body_that_is_too_large_is_not_read(served: Served) -> None:
    large = b'{"user_id": "' + b"a" * (4 * 2**20) + b'"}'
    told = served.ask("POST", "/v1/check", large, "producer", {"Content-Type": "application/json"})
    assert (told.status, told.problem["detail"]) == (413, "The body may have 4194304 bytes.")
    # Without a length, in chunks: the limit counts what arrives.
    head = (
        f"POST /v1/check HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.secrets['producer']}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    with closing(socket.create_connection(("127.0.0.1", served.port), 30)) as connection:
        connection.sendall(head.encode())
        try:
            for _ in range(70):
                connection.sendall(chunk)
        except OSError:
            pass  # it has answered already, and reads no more
        assert connection.recv(4_096).startswith(b"HTTP/1.1 413 ")
    assert served.get("/live").status == 200


def test_an_error_that_nobody_expected_tells_nothing() -> None:
    settings = settings_for("postgresql://h/d", "redis://h/0")
    app = make_app(settings)

    async def fails(_request: Request) -> Response:
        raise ValueError("canary-of-a-payload")

    app.add_route("/fails", fails)
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": "GET", "path": "/fails", "headers": [], "query_string": b"", "state": {}}
    asyncio.run(Door(app, settings)(scope, receive, send))
    assert messages[0]["status"] == 500
    found = json.loads(messages[1]["body"])
    assert (found["title"], found["status"]) == ("Internal server error", 500)
    assert "canary" not in str(messages)
