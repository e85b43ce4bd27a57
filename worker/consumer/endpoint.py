"""What a dyno tells over HTTP: `/live`, `/ready`, `/metrics`. It reads, changes nothing, and bills on without it."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from threading import BoundedSemaphore, Lock, Thread
from time import monotonic
from typing import Any, ClassVar

from loguru import logger

from config.log import described
from config.settings import Settings
from worker.consumer.tally import DynoCounts
from worker.reports.metrics import CONTENT_TYPE, Figures, exposition, read_figures
from worker.resources import Resources

# Who probes often, and many who probe at once, cost the servers one reading a second.
_KEPT_SECONDS = 1.0
# A probe gets its answer within 2 s, though a server may be silent for longer.
_PATIENCE_SECONDS = 1.5
_REQUESTS_AT_ONCE = 16
_JSON = "application/json"


class Reader:
    """Reads the status, one reading at a time, and keeps it for a second."""

    def __init__(self, settings: Settings) -> None:
        """Connect to no server yet."""
        short = {"redis_socket_timeout_ms": 1_000, "redis_retries": 0, "database_connect_timeout_seconds": 1}
        self._settings = settings.model_copy(update=short)
        self._resources: Resources | None = None
        self._pool = ThreadPoolExecutor(1, "endpoint")
        self._lock = Lock()
        self._reading: Future[Figures] | None = None
        self._began = 0.0

    def figures(self) -> Figures | None:
        """Return the figures, at most a second old; None if it takes longer than a probe waits."""
        with self._lock:
            is_old = monotonic() > self._began + _KEPT_SECONDS
            if self._reading is None or (self._reading.done() and is_old):
                self._reading, self._began = self._pool.submit(self._read), monotonic()
            reading = self._reading
        try:
            return reading.result(_PATIENCE_SECONDS)
        except TimeoutError:
            return None
        except Exception as error:  # noqa: BLE001 - who probes sees it, and the dyno bills on
            logger.bind(cause="endpoint").warning("no status for a probe: {}", described(error))
            return None

    def close(self) -> None:
        """Give the connections back; a reading under way is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._resources is not None:
            self._resources.close()

    def _read(self) -> Figures:
        if self._resources is None:
            self._resources = Resources.open(self._settings)
        return read_figures(self._resources)


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
        """Answer 200 while nothing is down; degraded is ready, and says so."""
        figures = self.server.reader.figures()
        if figures is None:
            body: dict[str, Any] = {"severity": "down", "failed": {"status": f"not read in {_PATIENCE_SECONDS} s"}}
        else:
            status = figures.status
            body = {"severity": status.severity, "failed": {one.check: one.text for one in status.findings}}
        self._answer(503 if body["severity"] == "down" else 200, _JSON, json.dumps(body).encode() + b"\n")

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
