"""Put a catalogue in force, for all dynos at one moment."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import NamedTuple

from config.catalogue import Catalogue
from worker.errors import AccountError
from worker.keyspace import keys
from worker.ledger import catalogues
from worker.ledger.catalogues import CatalogueVersion, Use
from worker.ledger.connection import Postgres, batch_connection, read_clock
from worker.resources import Resources

# No batch that has begun is older than this.
_KNOWN_TO_EVERY_BATCH = timedelta(days=1)


class CatalogueInUse(AccountError):
    """Accounts are on a plan or a meter that a catalogue lacks, or are scheduled for it. Nothing changed."""


class Applied(NamedTuple):
    """A registered catalogue. `repeated`: it was the newest one already, and nothing changed."""

    version: CatalogueVersion
    repeated: bool


def require_applicable(resources: Resources, catalogue: Catalogue, at: datetime | None = None) -> None:
    """Check a catalogue against the accounts, and the moment against the ledger's clock. Reads only.

    Raises CatalogueInUse for a plan or a meter that accounts need and the catalogue lacks, AccountError for a past
    moment.
    """
    with batch_connection(resources.engine) as postgres:
        _require_applicable(postgres, catalogue, at)


def apply(
    resources: Resources, catalogue: Catalogue, *, by: str, reason: str | None = None, at: datetime | None = None
) -> Applied:
    """Register a catalogue, in force from `at` on, by default now. It replaces one that is yet to come.

    Workers take it up with their next batch; a batch that has begun keeps the former one. The ledger must be claimed.
    Safe to repeat: the newest catalogue is not registered twice. Killed before the COMMIT, nothing happened; after it,
    Redis learns the digest within `renew_interval_seconds`.
    Raises CatalogueInUse and AccountError like `require_applicable`.
    """
    with batch_connection(resources.engine) as postgres:
        catalogues.lock_catalogues(postgres)
        registered = catalogues.read_versions(postgres)
        newest, now = registered[-1], read_clock(postgres)
        since = now if at is None else at
        if newest.digest == catalogue.fingerprint and newest.effective_from <= since:
            return Applied(newest, repeated=True)
        _require_applicable(postgres, catalogue, at)
        version = catalogues.insert_version(postgres, catalogue.fingerprint, catalogue.text, at, by, reason)
        postgres.commit()
    # What services announced of this version stays: a batch that has begun does not know it yet.
    known = [each.digest for each in registered if each.applied_at < now - _KNOWN_TO_EVERY_BATCH]
    if known:
        resources.redis.hdel(keys.OTHER_CATALOGUES, *known)
    resources.take_up_catalogues()
    return Applied(version, repeated=False)


def history(resources: Resources) -> list[CatalogueVersion]:
    """Return the registered catalogues, oldest first."""
    with batch_connection(resources.engine) as postgres:
        return catalogues.read_versions(postgres)


def _require_applicable(postgres: Postgres, catalogue: Catalogue, at: datetime | None) -> None:
    now = read_clock(postgres)
    if at is not None and at < now:
        raise AccountError(f"--at: {at.isoformat()} is over; events of that time are charged. The earliest is now")
    _require_kept("plan", catalogues.plans_in_use(postgres), catalogue.plans)
    _require_kept("meter", catalogues.meters_in_use(postgres), catalogue.meters)


_WAY_OUT = {
    "plan": "keep it with `active = false`, or move them with `account change-plan` first",
    "meter": "keep it: their balances and credits on it would be stranded",
}


def _require_kept(what: str, used: list[Use], known: Collection[str]) -> None:
    """Raise AccountError for the plans or meters that accounts need and a catalogue lacks."""
    gone = sorted({use.name for use in used} - set(known))
    if not gone:
        return
    said = []
    for name in gone:
        counts = [f"{_accounts(use.accounts)} {use.how} it" for use in used if use.name == name]
        said.append(f"{name} ({', '.join(counts)})")
    raise CatalogueInUse(f"catalogue: lacks {what} {'; '.join(said)}. To rename is to remove: {_WAY_OUT[what]}")


def _accounts(number: int) -> str:
    return "1 account is" if number == 1 else f"{number} accounts are"
