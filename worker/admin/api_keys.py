"""API keys of the HTTP service: make them, list them, revoke them, and tell whose a request is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from time import monotonic
from typing import NamedTuple

from schemas.codes import Role
from worker.resources import Resources
from worker.rules.api_keys import ApiKey


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
    """Make a key."""
    raise NotImplementedError


def revoke(resources: Resources, key: str, *, actor: str, reason: str | None = None) -> ApiKey:
    """End a key, by its id or its name."""
    raise NotImplementedError


def listed(resources: Resources) -> list[ApiKey]:
    """Return the keys."""
    raise NotImplementedError


class Keyring:
    """The keys that this process knows. Threads may share it; make one for each process."""

    def __init__(self, resources: Resources, clock: Callable[[], float] = monotonic) -> None:
        self._resources = resources
        self._clock = clock

    def recall(self, secret: str, now: datetime) -> ApiKey | None:
        """Answer as `authenticate` does, without waiting; None where the ledger has to be asked."""
        raise NotImplementedError

    def authenticate(self, secret: str, now: datetime) -> ApiKey:
        """Return the key of a secret, in force at `now`.

        Raises ApiKeyRefused; LedgerUnavailable if Postgres does not answer and none of its last answers may be used.
        """
        raise NotImplementedError
