"""API keys of the HTTP service: what a role may do, how a secret looks, and whether a key is good.

A secret is `mf_<key id>_<43 characters>`: 256 random bits as base64url, after a beginning that scanners of repositories
find. The ledger keeps its SHA-256. A slow hash is for words that people think of: nobody guesses 256 random bits,
however fast a guess is.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from hmac import compare_digest
from types import MappingProxyType
from typing import Literal, NamedTuple

from schemas.codes import API_KEY_PATTERN, KeyRefusal, Role
from worker.errors import ApiKeyRefused


class Right(StrEnum):
    """One kind of request that a role may make."""

    # What services do before and after a piece of work.
    EMIT = "emit"
    CHECK = "check"  # also remaining, plan-backend and estimate: the answers that a service goes by
    HOLD = "hold"
    CHARGE = "charge"
    SPONSOR = "sponsor"

    # Reads
    READ_ACCOUNTS = "read_accounts"  # balances, credits, limits, and the search for accounts
    READ_USAGE = "read_usage"  # usage, breakdown, engagement, timeline, explain
    READ_REPORTS = "read_reports"  # over all accounts
    READ_NOTICES = "read_notices"
    READ_STATUS = "read_status"

    # Changes of one account that support people make
    GRANT = "grant"
    CLAW_BACK = "claw_back"
    REVERSE = "reverse"
    CHANGE_PLAN = "change_plan"
    SET_STATUS = "set_status"
    SET_LIMIT = "set_limit"
    FORGIVE_DEBT = "forgive_debt"
    RELEASE_HOLD = "release_hold"

    SIGN_IN = "sign_in"  # to the console

    # Operators alone
    OPEN_ACCOUNT = "open_account"
    RENEW = "renew"
    SET_TRUST = "set_trust"
    ADJUST = "adjust"
    CLOSE_ACCOUNT = "close_account"
    CREDIT_POOL = "credit_pool"
    RESOLVE_DEAD_LETTERS = "resolve_dead_letters"  # reads their payloads also
    MANAGE_WEBHOOKS = "manage_webhooks"
    MANAGE_CATALOGUES = "manage_catalogues"
    OPERATE = "operate"  # pauses of partitions, proofs


_READS = frozenset({
    Right.READ_ACCOUNTS, Right.READ_USAGE, Right.READ_REPORTS, Right.READ_NOTICES, Right.READ_STATUS,
})  # fmt: skip

# A right that is not listed is refused.
RIGHTS: Mapping[Role, frozenset[Right]] = MappingProxyType({
    Role.PRODUCER: frozenset({Right.EMIT, Right.CHECK, Right.HOLD, Right.CHARGE, Right.SPONSOR}),
    Role.READER: _READS,
    Role.SUPPORT: _READS | {
        Right.GRANT, Right.CLAW_BACK, Right.REVERSE, Right.CHANGE_PLAN, Right.SET_STATUS, Right.SET_LIMIT,
        Right.FORGIVE_DEBT, Right.RELEASE_HOLD, Right.SIGN_IN,
    },
    Role.OPERATOR: frozenset(Right),
})  # fmt: skip


KeyState = Literal["in force", "expired", "revoked"]


class ApiKey(NamedTuple):
    """An API key, without its secret. Its name is the actor of the changes that it makes.

    `reason` is that of who made it. `expires_at`: None if it has no end; `revoked_at`: None if it was not revoked.
    """

    key_id: str
    name: str
    role: Role
    created_at: datetime
    created_by: str
    reason: str | None
    expires_at: datetime | None
    revoked_at: datetime | None = None
    revoked_by: str | None = None
    revoked_reason: str | None = None

    def may(self, right: Right) -> bool:
        """Return True if the role of the key has this right."""
        return right in RIGHTS[self.role]

    def state_at(self, now: datetime) -> KeyState:
        """Return whether the key is in force at `now`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "in force"


class KnownKey(NamedTuple):
    """An API key, and the SHA-256 of its secret."""

    key: ApiKey
    digest: bytes


SECRET_BYTES = 32
KEY_ID_BYTES = 6
_secret = re.compile(API_KEY_PATTERN, re.ASCII)
is_key_id = re.compile(r"[0-9a-f]{12}", re.ASCII).fullmatch

# No secret has it. A key that nobody knows is compared with it, so that the answer takes as long as to a wrong secret.
_NO_DIGEST = bytes(32)


def secret_of(key_id: str, random: bytes) -> str:
    """Return the secret of a key: its id, and `SECRET_BYTES` random bytes as text."""
    return f"mf_{key_id}_{urlsafe_b64encode(random).rstrip(b'=').decode('ascii')}"


def digest_of(secret: str) -> bytes:
    """Return what the ledger keeps of a secret."""
    return sha256(secret.encode("utf-8", "surrogatepass")).digest()


def key_id_in(secret: str) -> str:
    """Return the id in a secret. Raises ApiKeyRefused for a text that is no secret of ours, and quotes none of it."""
    if not secret:
        raise ApiKeyRefused(KeyRefusal.MISSING, "missing")
    found = _secret.fullmatch(secret)
    if found is None:
        raise ApiKeyRefused(KeyRefusal.MALFORMED, "must be mf_, the id of a key, _ and 43 characters")
    return found[1]


def judge(known: KnownKey | None, secret: str, now: datetime) -> ApiKey:
    """Return the key if `secret` is its secret and it is in force at `now`; None stands for an id that nobody knows.

    Raises ApiKeyRefused. A wrong secret and an unknown id get the same refusal after the same work; only a right secret
    is told that its key is over.
    """
    is_right = compare_digest(_NO_DIGEST if known is None else known.digest, digest_of(secret))
    if known is None or not is_right:
        raise ApiKeyRefused(KeyRefusal.UNKNOWN, "there is no such key")
    require_in_force(known.key, now)
    return known.key


def require_in_force(key: ApiKey, now: datetime) -> None:
    """Raise ApiKeyRefused if the key is revoked, or has expired at `now`."""
    match key.state_at(now):
        case "revoked":
            raise ApiKeyRefused(KeyRefusal.REVOKED, f"{key.key_id} was revoked", key.key_id)
        case "expired":
            raise ApiKeyRefused(KeyRefusal.EXPIRED, f"{key.key_id} has expired", key.key_id)


def require_right(key: ApiKey, right: Right) -> None:
    """Raise ApiKeyRefused unless the role of the key has this right."""
    if not key.may(right):
        roles = ", ".join(role for role in Role if right in RIGHTS[role])
        raise ApiKeyRefused(
            KeyRefusal.WRONG_ROLE, f"{key.key_id} has the role {key.role}, this needs {roles}", key.key_id
        )
