"""Every statement about catalogues: the versions in the ledger, and the plans and meters that accounts need."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from worker.ledger.connection import CATALOGUE_LOCK, LOCK_SPACE, Postgres
from worker.ledger.dead_letters import storable


class CatalogueVersion(NamedTuple):
    """One registered catalogue: its text in TOML, and the moment from which it is in force."""

    version: int
    digest: str
    content: str
    effective_from: datetime
    applied_at: datetime
    applied_by: str
    reason: str | None


_VERSION = ", ".join(CatalogueVersion._fields)


class Use(NamedTuple):
    """Accounts that need a plan or a meter, and why: `on` it, or `scheduled` for it."""

    name: str
    how: str
    accounts: int


def read_versions(postgres: Postgres, *, of_last_days: int | None = None) -> list[CatalogueVersion]:
    """Return the registered catalogues, oldest first; with `of_last_days`, without those superseded before."""
    rows = postgres.execute(
        f"SELECT {_VERSION} FROM catalogue_version AS old WHERE %(days)s::integer IS NULL OR NOT EXISTS ("
        "SELECT FROM catalogue_version AS later WHERE later.version > old.version "
        "AND later.effective_from <= ledger_now() - make_interval(days => %(days)s::integer)) ORDER BY version",
        {"days": of_last_days},
    ).fetchall()
    return [CatalogueVersion(*row) for row in rows]


def newest_version(postgres: Postgres) -> tuple[int, datetime]:
    """Return the number of the newest registered catalogue, 0 without one, and the time of the ledger's clock."""
    ((version, now),) = postgres.execute(
        "SELECT coalesce(max(version), 0), ledger_now() FROM catalogue_version"
    ).fetchall()
    return version, now


def lock_catalogues(postgres: Postgres) -> None:
    """Let no other transaction register a catalogue until this one ends."""
    postgres.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_SPACE, CATALOGUE_LOCK))


def insert_version(
    postgres: Postgres, digest: str, content: str, effective_from: datetime | None, by: str, reason: str | None
) -> CatalogueVersion:
    """Register a catalogue, in force from `effective_from` on, by default now. Without a commit; see the lock above."""
    row = postgres.execute(
        "INSERT INTO catalogue_version (version, digest, content, effective_from, applied_by, reason) "
        "SELECT coalesce(max(version), 0) + 1, %s, %s, greatest(%s::timestamptz, ledger_now()), %s, %s "
        f"FROM catalogue_version RETURNING {_VERSION}",
        (digest, content, effective_from, storable(by), reason and storable(reason)),
    ).fetchone()
    assert row is not None
    return CatalogueVersion(*row)


def plans_in_use(postgres: Postgres) -> list[Use]:
    """Return the plans that open accounts are on, or are scheduled for, and how many."""
    rows = postgres.execute("""
        SELECT plan, 'on', count(*) FROM account WHERE status <> 'closed' GROUP BY plan
        UNION ALL SELECT next_plan, 'scheduled for', count(*) FROM account
            WHERE status <> 'closed' AND next_plan IS NOT NULL GROUP BY next_plan
        UNION ALL SELECT waits ->> 'name', 'scheduled for', count(DISTINCT user_id)
            FROM account, jsonb_array_elements(waiting) AS waits
            WHERE status <> 'closed' AND waiting IS NOT NULL AND waits ->> 'kind' IN ('plan', 'next_plan')
            GROUP BY waits ->> 'name'
        ORDER BY 1, 2
    """).fetchall()
    return [Use(*row) for row in rows]


def meters_in_use(postgres: Postgres) -> list[Use]:
    """Return the meters on which open accounts have a balance, and how many."""
    rows = postgres.execute(
        "SELECT meter, 'on', count(*) FROM balance JOIN account USING (user_id) WHERE status <> 'closed' "
        "GROUP BY meter ORDER BY meter"
    ).fetchall()
    return [Use(*row) for row in rows]
