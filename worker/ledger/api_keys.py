"""Every statement about API keys. Rows are never deleted, and no statement changes a name, a role or a digest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from schemas.codes import Role
from worker.ledger.connection import Postgres
from worker.rules.account import Cause
from worker.rules.api_keys import ApiKey, KnownKey

# So long a revoked key is refused as revoked, after that as unknown.
_REVOKED_DAYS = 30

_KEY = ", ".join(ApiKey._fields)


def read_known(postgres: Postgres, limit: int) -> list[KnownKey]:
    """Return the keys that may come, with the digests of their secrets: first those that were not revoked."""
    rows = postgres.execute(
        f"SELECT {_KEY}, digest FROM api_key "
        "WHERE revoked_at IS NULL OR revoked_at > ledger_now() - make_interval(days => %s) "
        "ORDER BY revoked_at DESC NULLS FIRST LIMIT %s",
        (_REVOKED_DAYS, limit),
    ).fetchall()
    return [KnownKey(_key(row[:-1]), row[-1]) for row in rows]


def read_keys(postgres: Postgres, limit: int, *, with_revoked: bool) -> list[ApiKey]:
    """Return the keys, newest first."""
    rows = postgres.execute(
        f"SELECT {_KEY} FROM api_key WHERE revoked_at IS NULL OR %s ORDER BY created_at DESC, key_id LIMIT %s",
        (with_revoked, limit),
    ).fetchall()
    return [_key(row) for row in rows]


def count_keys(postgres: Postgres) -> int:
    """Count the keys that were not revoked."""
    ((count,),) = postgres.execute("SELECT count(*) FROM api_key WHERE revoked_at IS NULL").fetchall()
    return int(count)


def insert_key(
    postgres: Postgres, key_id: str, digest: bytes, name: str, role: Role, cause: Cause, expires_at: datetime | None
) -> ApiKey | None:
    """Write a key, without a commit; return None if another one that was not revoked has the name.

    It waits for a transaction that writes a key of this name.
    """
    row = postgres.execute(
        "INSERT INTO api_key (key_id, digest, name, role, created_at, created_by, reason, expires_at) "
        "VALUES (%s, %s, %s, %s, ledger_now(), %s, %s, %s) "
        f"ON CONFLICT (name) WHERE revoked_at IS NULL DO NOTHING RETURNING {_KEY}",
        (key_id, digest, name, role, cause.actor, cause.reason, expires_at),
    ).fetchone()
    return None if row is None else _key(row)


def revoke_key(postgres: Postgres, key: str, cause: Cause) -> ApiKey | None:
    """Revoke the key with this id or this name, without a commit; return None if there is none.

    A key that is revoked stays as it is, and answers to its id alone.
    """
    row = postgres.execute(
        "UPDATE api_key SET revoked_at = ledger_now(), revoked_by = %s, revoked_reason = %s "
        f"WHERE (key_id = %s OR name = %s) AND revoked_at IS NULL RETURNING {_KEY}",
        (cause.actor, cause.reason, key, key),
    ).fetchone()
    row = row or postgres.execute(f"SELECT {_KEY} FROM api_key WHERE key_id = %s", (key,)).fetchone()
    return None if row is None else _key(row)


def _key(row: Sequence[object]) -> ApiKey:
    found = ApiKey(*row)  # type: ignore[arg-type]
    return found._replace(role=Role(found.role))
