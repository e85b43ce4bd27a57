"""Sessions of people in the console: a signed cookie that stands for an API key, and tokens for its forms.

A cookie is `<key id>.<number>.<end>.<MAC>`. It carries no secret of the key. The MAC is HMAC-SHA256 under a secret of
the service, at least `SECRET_BYTES` long, that all its processes share. Another secret ends all sessions. Nothing is
stored. Each request asks whether the key is still in force (`Keyring.key_of`), so a revocation ends its sessions.

A browser may send the cookie with requests that other sites make. It sends no token by itself: pages of the session
have it in their forms, and other sites cannot read it.
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64encode
from datetime import UTC, datetime
from typing import NamedTuple

SECRET_BYTES = 32
NUMBER_BYTES = 16

_cookie = re.compile(r"([0-9a-f]{12})\.([0-9a-f]{32})\.([0-9]{1,12})\.([A-Za-z0-9_-]{43})", re.ASCII)


class Session(NamedTuple):
    """The session of one person. `number` is random: `NUMBER_BYTES` as hexadecimal digits."""

    key_id: str
    number: str
    ends_at: datetime


def cookie_of(session: Session, secret: bytes) -> str:
    """Return the cookie of a session; its end counts in whole seconds."""
    signed = f"{session.key_id}.{session.number}.{int(session.ends_at.timestamp())}"
    return f"{signed}.{_mac('cookie', signed, secret)}"


def session_in(cookie: str, secret: bytes, now: datetime) -> Session | None:
    """Return the session of a cookie; None if the cookie is not ours, was changed, or is over at `now`."""
    found = _cookie.fullmatch(cookie)
    if found is None:
        return None
    signed, _, mac = cookie.rpartition(".")
    if not hmac.compare_digest(_mac("cookie", signed, secret), mac):
        return None
    session = Session(found[1], found[2], datetime.fromtimestamp(int(found[3]), UTC))
    return session if now < session.ends_at else None


def form_token(session: Session, secret: bytes) -> str:
    """Return the token for the forms of a session."""
    return _mac("form", session.number, secret)


def is_form_token(token: str, session: Session, secret: bytes) -> bool:
    """Return True if a form with this token comes from a page of the session."""
    return hmac.compare_digest(form_token(session, secret).encode(), token.encode("utf-8", "surrogatepass"))


def _mac(purpose: str, signed: str, secret: bytes) -> str:
    """Return the MAC of a text for one purpose: no cookie is a token, and no token a cookie."""
    if len(secret) < SECRET_BYTES:
        raise ValueError(f"secret: must be at least {SECRET_BYTES} bytes (got {len(secret)})")
    digest = hmac.digest(secret, f"meterfall {purpose} {signed}".encode(), "sha256")
    return urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")
