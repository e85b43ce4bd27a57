"""A receiver of meterfall's notices that tops accounts up by itself. README.md says how to run it."""

from __future__ import annotations

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from meterfall import AccountError, Accounts, BillingError
from standardwebhooks import Webhook, WebhookVerificationError

MOST_BYTES = 65_536

accounts = Accounts.connect()
# Two secrets, separated by a space, while one replaces the other.
secrets = [Webhook(secret) for secret in os.environ["WEBHOOK_SECRETS"].split()]


def verified(body: bytes, headers: dict[str, str]) -> Any:
    """Return the notice if one of our secrets signed it in the last five minutes, else None."""
    for secret in secrets:
        try:
            return secret.verify(body, headers)
        except WebhookVerificationError:
            continue
    return None


def take(notice: Any) -> None:
    """Do what a notice asks for. It may come twice: the key of the top-up counts once, so nothing happens twice."""
    data = notice["data"]
    top_up = data.get("top_up")
    if notice["type"] == "balance.threshold" and top_up is not None:
        # A shop charges the card here, with the same key at its payment provider.
        answer = accounts.grant(data["user_id"], data["meter"], top_up["amount"], top_up["key"], actor="auto-top-up")
        done = "was topped up before" if answer.repeated else f"is topped up by {top_up['amount']}"
        print(f"{data['user_id']} {done}", flush=True)
    else:
        print(f"{notice['type']}: {data.get('user_id', 'for operators')}", flush=True)


class Handler(BaseHTTPRequestHandler):
    """Answers 204 once a notice is done, and an error for meterfall to send it again."""

    def do_POST(self) -> None:
        """Take one notice."""
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return self.answer(413)
        notice = verified(self.rfile.read(int(length)), dict(self.headers.items()))
        if notice is None:
            return self.answer(401)
        try:
            take(notice)
        except AccountError as error:  # no repeat mends it
            print(f"refused: {error}", file=sys.stderr, flush=True)
        except BillingError as error:  # a server is away: meterfall tries again
            print(f"later: {error}", file=sys.stderr, flush=True)
            return self.answer(503)
        return self.answer(204)

    def answer(self, status: int) -> None:
        """Send a status without a body."""
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8080"))), Handler) as server:
        print(f"listens on port {server.server_port}", flush=True)
        server.serve_forever()
