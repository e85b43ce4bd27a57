"""API keys of the HTTP service: make them, list them, revoke them, and tell whose a request is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from secrets import token_bytes, token_hex
from threading import Lock
from time import monotonic
from types import MappingProxyType
from typing import NamedTuple

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from config.log import client_logger
from schemas.codes import KeyRefusal, Role
from worker.admin.change import cause_of, require_time
from worker.errors import AccountError, ApiKeyRefused, LedgerUnavailable
from worker.ledger import api_keys
from worker.ledger.connection import LedgerError, batch_connection, read_clock
from worker.resources import Resources
from worker.rules.account import Cause
from worker.rules.api_keys import (
    KEY_ID_BYTES,
    SECRET_BYTES,
    ApiKey,
    KnownKey,
    digest_of,
    is_key_id,
    judge,
    key_id_in,
    require_in_force,
    secret_of,
)

# A process keeps all of them in memory, and reads them every few seconds.
MAX_KEYS = 1_000


class Added(NamedTuple):
    """A key, and its secret: nothing shows it again."""

    key: ApiKey
    secret: str


def add(
    resources: Resources,
    name: str,
    role: Role,
    *,
    expires_at: datetime | None = None,
    actor: str,
    reason: str | None = None,
) -> Added:
    """Make a key. It counts at once; a process that was asked for it before counts it a little later.

    Killed before the COMMIT, nothing happened; killed after it, the key is there, and nobody has its secret: revoke it.
    Raises AccountError for a name that another key has, for a wrong name, role, actor or reason, for an end that is not
    in the future, and where there are `MAX_KEYS` already.
    """
    cause = _cause_of(actor, reason)
    _require_name(name)
    if role not in list(Role):
        raise AccountError(f"role: must be one of {', '.join(Role)} (got {str(role)[:64]!r})")
    if expires_at is not None:
        require_time("expires_at", expires_at)
    key_id = token_hex(KEY_ID_BYTES)
    secret = secret_of(key_id, token_bytes(SECRET_BYTES))
    with batch_connection(resources.engine) as postgres:
        now = read_clock(postgres)
        if expires_at is not None and expires_at <= now:
            raise AccountError(f"expires_at: must be after {now.isoformat()}, which is now")
        if api_keys.count_keys(postgres) >= MAX_KEYS:
            raise AccountError(f"name: there are {MAX_KEYS} keys already; revoke one")
        key = api_keys.insert_key(postgres, key_id, digest_of(secret), name, Role(role), cause, expires_at)
        if key is None:
            raise AccountError(f"name: another key is called {name!r}; revoke that one first, or take another name")
        postgres.commit()
    return Added(key, secret)


def revoke(resources: Resources, key: str, *, actor: str, reason: str | None = None) -> ApiKey:
    """Revoke the key with this id or this name; processes refuse it within `api_key_trusted_ms`.

    Safe to repeat by its id: the first revocation stands. Killed before the COMMIT, nothing happened.
    Raises AccountError if there is none, or for a wrong actor or reason.
    """
    cause = _cause_of(actor, reason)
    with batch_connection(resources.engine) as postgres:
        found = api_keys.revoke_key(postgres, key, cause) if isinstance(key, str) and key.isprintable() else None
        if found is None:
            raise AccountError(f"key: no key {str(key)[:64]!r}; `meterfall api-keys list` has all")
        postgres.commit()
    return found


def listed(resources: Resources, *, with_revoked: bool = False, limit: int = MAX_KEYS) -> tuple[datetime, list[ApiKey]]:
    """Return the time of the ledger, and the keys, newest first; with those that were revoked if so asked."""
    with batch_connection(resources.engine) as postgres:
        return read_clock(postgres), api_keys.read_keys(postgres, limit, with_revoked=with_revoked)


def _cause_of(actor: str, reason: str | None) -> Cause:
    """Return who makes or revokes a key, and why. Raises AccountError for a wrong or missing actor or reason."""
    cause = cause_of(actor, reason)
    if cause.actor is None:
        raise AccountError("actor: missing; it is kept with the key")
    return cause


def _require_name(name: str) -> None:
    """Raise AccountError unless `name` may be an actor, and is not taken for the id of a key."""
    try:
        cause = cause_of(name, None)
    except AccountError as error:
        raise AccountError(str(error).replace("actor:", "name:", 1)) from None
    if cause.actor is None or name != name.strip() or is_key_id(name):
        raise AccountError(f"name: must begin and end with no space, and not look like the id of a key (got {name!r})")


class _Read(NamedTuple):
    """The keys as one read found them, and when that read began, by the clock of the keyring."""

    keys: Mapping[str, KnownKey]
    began_at: float


_NOTHING_READ = _Read(MappingProxyType({}), float("-inf"))


class Keyring:
    """The API keys that one process knows: all of them, read at once. Threads may share it.

    A process asks Postgres once in `api_key_trusted_ms`, however many requests come. A key that it does not know has it
    asked earlier, but not within `api_key_unknown_pause_ms` of the last read: who guesses keys gives Postgres no more
    to do than that. While Postgres does not answer, it goes by what it has read for `api_key_outage_seconds`; an expiry
    counts at once all the same.
    """

    def __init__(self, resources: Resources, clock: Callable[[], float] = monotonic) -> None:
        """Know no keys yet; ask no server."""
        settings = resources.settings
        self._engine = resources.engine
        self._clock = clock
        self._trusted = settings.api_key_trusted_ms / 1_000
        self._unknown_pause = settings.api_key_unknown_pause_ms / 1_000
        self._outage = settings.api_key_outage_seconds
        self._down_pause = settings.ledger_down_pause_ms / 1_000
        self._read = _NOTHING_READ
        self._failed_at: float | None = None
        self._lock = Lock()

    def recall(self, secret: str, now: datetime) -> ApiKey | None:
        """Answer as `authenticate` does, if no server needs to be asked; None if one does. Never waits."""
        key_id = key_id_in(secret)
        read = self._read
        if not self._counts(read, key_id):
            if not self._is_spared():
                return None
            read = self._last_known(key_id)
        return judge(read.keys.get(key_id), secret, now)

    def authenticate(self, secret: str, now: datetime) -> ApiKey:
        """Return the key whose secret this is, in force at `now`, the time of this process.

        Raises ApiKeyRefused, with one reason for an unknown key and a wrong secret; LedgerUnavailable if Postgres does
        not answer, and what it said last is too old or does not have the key.
        """
        return judge(self._known(key_id_in(secret)), secret, now)

    def key_of(self, key_id: str, now: datetime) -> ApiKey:
        """Return the key with this id, in force at `now`. A session names it: who signed in had its secret.

        Raises as `authenticate` does.
        """
        known = self._known(key_id)
        if known is None:
            raise ApiKeyRefused(KeyRefusal.UNKNOWN, "there is no such key")
        require_in_force(known.key, now)
        return known.key

    def _known(self, key_id: str) -> KnownKey | None:
        read = self._read
        if not self._counts(read, key_id):
            read = self._read_again(key_id)
        return read.keys.get(key_id)

    def _counts(self, read: _Read, key_id: str) -> bool:
        """Return True if the answer about a key may come from this read."""
        return self._clock() - read.began_at < (self._trusted if key_id in read.keys else self._unknown_pause)

    def _is_spared(self) -> bool:
        """Return True if Postgres has failed, and a call tries it again already or none does yet."""
        failed_at = self._failed_at
        return failed_at is not None and (self._lock.locked() or self._clock() - failed_at < self._down_pause)

    def _read_again(self, key_id: str) -> _Read:
        """Return the keys of a read that counts, which one thread makes for all that wait.

        Once Postgres has failed, one call tries it again after each pause, and the others do not wait for it.
        """
        asked_at = self._clock()
        if not self._lock.acquire(blocking=self._failed_at is None):
            return self._last_known(key_id)
        try:
            if self._read.began_at >= asked_at or self._counts(self._read, key_id):
                return self._read
            if self._failed_at is not None and self._clock() - self._failed_at < self._down_pause:
                return self._last_known(key_id)
            began_at = self._clock()
            try:
                with batch_connection(self._engine) as postgres:
                    known = api_keys.read_known(postgres, 2 * MAX_KEYS)
            except (psycopg.Error, SQLAlchemyError, LedgerError) as error:
                self._failed_at = self._clock()
                client_logger.warning("API keys cannot be read, so those count that were known: %s", error)
                return self._last_known(key_id)
            self._read = _Read({each.key.key_id: each for each in known}, began_at)
            self._failed_at = None
            return self._read
        finally:
            self._lock.release()

    def _last_known(self, key_id: str) -> _Read:
        """Return the last read, if it may be used without Postgres and has the key. Raises LedgerUnavailable."""
        read = self._read
        if self._clock() - read.began_at >= self._outage or key_id not in read.keys:
            raise LedgerUnavailable("Postgres does not answer, and nothing else says whose API key this is")
        return read
