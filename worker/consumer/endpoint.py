"""What a dyno tells over HTTP: `/live`, `/ready`, `/metrics`. It reads, changes nothing, and bills on without it."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from threading import BoundedSemaphore, Thread
from typing import Any, ClassVar

from loguru import logger

from config.log import described
from config.settings import Settings
from worker.consumer.tally import DynoCounts
from worker.reports.metrics import CONTENT_TYPE, exposition
from worker.reports.probes import Reader, readiness_of

_REQUESTS_AT_ONCE = 16
_JSON = "application/json"


class _Server(ThreadingHTTPServer):
    """A thread for each request, up to a bound: more are hung up on."""

    daemon_threads = True
    reader: Reader
    counts: DynoCounts

    def __init__(self, settings: Settings) -> None:
        if ":" in settings.http_host:
            self.address_family = AF_INET6
        self._free = BoundedSemaphore(_REQUESTS_AT_ONCE)
        super().__init__((settings.http_host, settings.http_port or 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: whoever asked has hung up."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    # A client that says nothing is hung up on.
    timeout: ClassVar[float] = 5.0

    def do_GET(self) -> None:
        """Answer one request."""
        path = self.path.partition("?")[0]
        if path == "/live":
            self._answer(200, _JSON, b'{"live": true}\n')
        elif path == "/ready":
            self._ready()
        elif path == "/metrics":
            self._answer(200, CONTENT_TYPE, exposition(self.server.reader.figures(), self.server.counts.read()))
        else:
            self._answer(404, _JSON, b'{"error": "no such path"}\n')

    def _ready(self) -> None:
        """Answer whether work can be done here."""
        found = readiness_of(self.server.reader.figures())
        self._answer(found.code, _JSON, json.dumps(found._asdict()).encode() + b"\n")

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log no request: probes come every second."""


class Endpoint:
    """The HTTP server of a dyno, if its settings name a port."""

    def __init__(self, settings: Settings) -> None:
        """Listen on nothing yet."""
        self._settings = settings
        self._server: _Server | None = None
        self._counts = DynoCounts() if settings.http_port is not None else None

    @property
    def pipe(self) -> int | None:
        """The pipe for the counts of this dyno's processes; None if nobody would read them."""
        return None if self._counts is None else self._counts.pipe

    def start(self) -> None:
        """Listen. A port in use is one line in the log, and the dyno works without."""
        settings = self._settings
        if self._counts is None:
            return
        self._counts.start()
        try:
            self._server = _Server(settings)
        except OSError as error:
            logger.error(
                "METERFALL_HTTP_PORT: no endpoint on {}:{}: {}",
                settings.http_host,
                settings.http_port,
                described(error),
            )
            return
        self._server.reader, self._server.counts = Reader(settings), self._counts
        Thread(target=self._server.serve_forever, name="endpoint", daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.reader.close()
        if self._counts is not None:
            self._counts.stop()
