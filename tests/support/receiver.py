"""A receiver of webhooks that does what a test says, and keeps what came."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, NamedTuple


class Came(NamedTuple):
    """One request: its headers with small letters, its body as it came and as JSON."""

    headers: dict[str, str]
    body: bytes
    notice: Any

    @property
    def notice_id(self) -> str:
        return self.headers["webhook-id"]


class Receiver:
    """What a receiver answers, and what came. `answer` gives the status for a request; it may also take its time."""

    def __init__(self) -> None:
        self.came: list[Came] = []
        self.answer: Callable[[Came], int] = lambda _: 204
        self.url = ""
        # Set at the end: whoever hangs goes home.
        self.over = Event()
        self.most_at_once = 0
        self._at_once = 0
        self._lock = Lock()

    def take(self, came: Came) -> int:
        """Return the status for a request."""
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            status = self.answer(came)
        finally:
            with self._lock:
                self._at_once -= 1
                self.came.append(came)
        return status

    def hang(self, _: Came) -> int:
        """Answer never."""
        self.over.wait(60)
        return 204

    def sleep(self, seconds: float) -> Callable[[Came], int]:
        """Return an answer that takes so long."""

        def answer(_: Came) -> int:
            time.sleep(seconds)
            return 204

        return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


@contextmanager
def receiver(port: int = 0) -> Iterator[Receiver]:
    """Listen on a loopback port until the end of the block."""
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status = found.take(Came(headers, body, json.loads(body)))
            try:
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("location", f"{found.url}elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()
            except OSError:  # the sender has hung up
                pass

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = _Server(("127.0.0.1", port), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}/"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.over.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
