"""One visit of a page: who comes, by which session, and what a form says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from secrets import token_bytes, token_hex
from threading import Lock
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from config.settings import Settings
from schemas.status import Status
from worker.accounts.blocking import SharingAccounts
from worker.accounts.connections import Connections
from worker.client import Billing
from worker.rules.api_keys import ApiKey, Right, require_right
from worker.rules.sessions import NUMBER_BYTES, SECRET_BYTES, Session, cookie_of, form_token, is_form_token, session_in
from worker.service.console.prover import Prover
from worker.service.service import Gate

COOKIE = "meterfall_console"
# The session of a person who has not signed in: it gives the form a token. No key has this id.
NOBODY = "0" * 12
_SIGN_IN_MINUTES = 60
_THREADS = 4
_WAITING = 32
_MAX_FIELDS = 64
_MAX_FIELD_BYTES = 65_536
_LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}


class Console:
    """What the pages of one process have, connected to no server before the first visit."""

    def __init__(self, settings: Settings) -> None:
        """Open the parts. Raises CatalogueError, and LedgerUnavailable if DATABASE_URL is unset."""
        self.settings = settings
        self.connections = Connections(settings)
        self.accounts = SharingAccounts(self.connections)
        self.billing = Billing.connect(settings)
        # The pages have threads of their own: services that ask a lot do not make people wait.
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="meterfall-console")
        self.gate = Gate(_WAITING)
        self.prover = Prover(settings)
        secret = settings.console_secret
        self.secret = token_bytes(SECRET_BYTES) if secret is None else secret.get_secret_value().encode()
        self._lock = Lock()
        self._last: Status | None = None

    def latest(self, status: Status | None) -> Status | None:
        """Keep a status that was read, and return the last one that was."""
        with self._lock:
            self._last = status or self._last
            return self._last

    def close(self) -> None:
        """Give all connections back, after the pages under way."""
        self.prover.close()
        self.threads.shutdown()
        self.billing.close()
        self.accounts.close()


@asynccontextmanager
async def console_running(settings: Settings) -> AsyncIterator[Console]:
    """Run the console for the life of an application."""
    console = Console(settings)
    try:
        yield console
    finally:
        console.close()


def console_of(request: Request) -> Console:
    """Return the console that a request came to."""
    console = request.state.console
    assert isinstance(console, Console)
    return console


@dataclass(frozen=True)
class Visit:
    """One request of a person who signed in. `token` goes into the forms of the page."""

    console: Console
    key: ApiKey
    token: str
    query: Mapping[str, str]
    form: Mapping[str, str] = field(default_factory=dict)

    def may(self, right: Right) -> bool:
        """Return True if the role of the key has this right."""
        return self.key.may(right)

    def require(self, right: Right) -> None:
        """Raise ApiKeyRefused unless the role of the key has this right."""
        require_right(self.key, right)

    def asked(self, name: str) -> str | None:
        """Return a part of the query without the spaces around it; None if there is none, or an empty one."""
        return self.query.get(name, "").strip() or None

    def asked_number(self, name: str) -> int | None:
        """Return a positive whole number of the query. Raises HTTPException for anything else."""
        text = self.asked(name)
        return None if text is None else whole_number(name, text)


def whole_number(name: str, text: str, most: int | None = None) -> int:
    """Return a whole number from 1, up to `most` if there is one. Raises HTTPException for anything else."""
    if not (text.isascii() and text.isdigit() and len(text) < 19 and 1 <= int(text) <= (most or int(text))):
        allowed = "from 1" if most is None else f"from 1 to {most:,}"
        raise HTTPException(422, f"{name}: must be a whole number {allowed} (got {text[:64]!r})")
    return int(text)


# ---------------------------------------------------------------------------------------------------------------------
# Sessions


def session_of(request: Request, console: Console) -> Session | None:
    """Return the session that a request brings, also that of a person who has not signed in."""
    return session_in(request.cookies.get(COOKIE, ""), console.secret, datetime.now(UTC))


def begin_session(response: Response, request: Request, console: Console, key_id: str = NOBODY) -> Session:
    """Begin a session with a new number, and have the browser keep it."""
    minutes = _SIGN_IN_MINUTES if key_id == NOBODY else console.settings.console_session_minutes
    session = Session(key_id, token_hex(NUMBER_BYTES), datetime.now(UTC) + timedelta(minutes=minutes))
    _set_cookie(response, request, cookie_of(session, console.secret), minutes * 60)
    return session


def end_session(response: Response, request: Request) -> None:
    """Have the browser forget its session."""
    _set_cookie(response, request, "", 0)


def _set_cookie(response: Response, request: Request, value: str, seconds: int) -> None:
    response.set_cookie(
        COOKIE, value, max_age=seconds, path="/console", secure=_is_far(request), httponly=True, samesite="strict"
    )


def _is_far(request: Request) -> bool:
    """Return True unless the browser is on this machine and speaks plain HTTP, as no proxy that ends TLS says."""
    host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
    return host not in _LOOPBACK or request.headers.get("x-forwarded-proto") == "https"


def token_of(session: Session, console: Console) -> str:
    """Return the token for the forms of a session."""
    return form_token(session, console.secret)


def require_token(form: Mapping[str, str], session: Session, console: Console) -> None:
    """Raise HTTPException unless a form comes from a page of the session."""
    if not is_form_token(form.get("token", ""), session, console.secret):
        raise HTTPException(403, "This form is not from a page of your session. Nothing was done: load the page anew.")


async def file_form_of(request: Request) -> dict[str, str]:
    """Return the fields of a form with a file, and the text of that. Raises HTTPException for anything else."""
    if _media_type(request) != "multipart/form-data":
        raise HTTPException(415, "This page takes a form with a file.")
    fields = {}
    async with request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES) as form:
        for name, value in form.items():
            try:
                fields[name] = value if isinstance(value, str) else (await value.read()).decode()
            except UnicodeDecodeError:
                raise HTTPException(422, f"{name}: must be text in UTF-8") from None
    return fields


async def form_of(request: Request) -> dict[str, str]:
    """Return the fields of a form. Raises HTTPException for a body that is no form of ours."""
    if _media_type(request) != "application/x-www-form-urlencoded":
        raise HTTPException(415, "The console takes forms only.")
    try:
        text = (await request.body()).decode("ascii")
        return dict(parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS))
    except ValueError:
        raise HTTPException(400, "The form cannot be read.") from None


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip()
