"""What Sentry hears of a dyno: the kind and the places of unexpected errors, and nothing of data, people or secrets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import psycopg
import pytest

from config.settings import Settings
from tests.support.canaries import PASSWORD, PAYLOAD, USER, settings_with_passwords
from tests.support.ledger import give_account
from tests.support.processes import dyno
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.demo.servers import Server

METER = "premium_voice"


@pytest.fixture
def settings(database_url: str, own_redis: Server) -> Settings:
    """Settings whose URLs carry passwords."""
    return settings_with_passwords(database_url, own_redis)


@contextmanager
def sentry_sink() -> Iterator[tuple[str, list[bytes]]]:
    """A server on loopback that takes what the SDK sends: its DSN, and the bodies, decompressed."""
    bodies: list[bytes] = []

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Sink) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://public@127.0.0.1:{server.server_port}/1", bodies
        finally:
            server.shutdown()
            thread.join()


def test_sentry_hears_of_an_unexpected_error_and_nothing_of_its_data(settings: Settings) -> None:
    give_account(settings, USER, "basic")
    with psycopg.connect(settings.database_url or "") as connection:
        connection.execute(
            "CREATE FUNCTION tell_all() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused %', "
            "NEW::text USING ERRCODE = 'P0001', DETAIL = NEW::text, HINT = NEW.user_id; END $$"
        )
        trigger = "CREATE TRIGGER tell_all BEFORE INSERT ON usage_log FOR EACH ROW EXECUTE FUNCTION tell_all()"
        connection.execute(trigger)
    with Billing.connect(settings) as billing:
        billing.emit(USER, METER, 1, event_id="e", source=PAYLOAD, dimensions={"document_id": PAYLOAD})
    with sentry_sink() as (dsn, bodies):
        with dyno(settings, SENTRY_DSN=dsn, NO_PROXY="127.0.0.1", SENTRY_ENVIRONMENT="tests") as process:
            wait_until(lambda: bool(bodies), "Sentry has heard of the error", 30)
            process.terminate()
            process.communicate(timeout=25)
        sent = b"\n".join(bodies).decode()
    assert [canary for canary in (USER, PASSWORD, PAYLOAD) if canary in sent] == []
    assert "refused" not in sent
    event = json.loads(bodies[0].splitlines()[2])
    last = event["exception"]["values"][-1]
    assert last["value"] == "RaiseException: P0001"
    assert "apply_batch" in [frame["function"] for frame in last["stacktrace"]["frames"]]
    assert not any("vars" in frame for frame in last["stacktrace"]["frames"])
    assert set(event) <= {
        *("event_id", "timestamp", "platform", "level", "release", "environment", "server_name", "sdk", "exception"),
    }


def test_a_dsn_that_is_none_stops_no_dyno_and_is_not_quoted(settings: Settings) -> None:
    with dyno(settings, "--burst", SENTRY_DSN=f"no-dsn-{PASSWORD}") as process:
        _, message = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "SENTRY_DSN: no DSN" in message
    assert PASSWORD not in message
