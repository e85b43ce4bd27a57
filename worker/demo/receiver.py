"""A receiver of webhooks on this machine, for the demo: it checks each signature and counts what came."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from standardwebhooks import Webhook, WebhookVerificationError

_POLL_SECONDS = 0.05


class Receiver:
    """`came` counts the deliveries with a right signature by id of the notice; without the `secret` it takes none."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.secret: str | None = None
        self.came: Counter[str] = Counter()

    def take(self, body: bytes, headers: dict[str, str]) -> int:
        """Count a delivery; return the status to answer."""
        try:
            if self.secret is None:
                return 503
            Webhook(self.secret).verify(body, headers)
        except WebhookVerificationError:
            return 401
        self.came[json.loads(body)["data"]["notice_id"]] += 1
        return 204


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Listen on a port of the loopback interface for the length of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(found.take(body, {name.lower(): value for name, value in self.headers.items()}))
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep requests out of the demo's output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Receiver(f"http://127.0.0.1:{server.server_port}/")
        thread = Thread(target=server.serve_forever, args=(_POLL_SECONDS,), daemon=True)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
