"""The books of the sponsorship pool: what its stream says was absorbed and paid, from the pool's lock to what Redis
says afterwards.

The scripts put three kinds of entries onto that stream: `k=grant` when a sponsored request is settled, `k=credit` for
paid work that was not sponsored, `r=<user>` when an account's trust changed. A request is known by its id, for ever:
what is recorded of it is ignored when it comes again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, NamedTuple, TypeVar

from loguru import logger
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from config.catalogue import TRUST_TIERS
from schemas.events import (
    ID_PATTERN,
    MAX_AMOUNT,
    MAX_ENTRY_BYTES,
    MAX_ENTRY_FIELDS,
    MAX_PAYLOAD_BYTES,
    WIRE_VERSION,
    Refusal,
)
from worker.crash import crash_point, poison_point
from worker.errors import Rejected
from worker.keyspace import calls, scripts
from worker.keyspace.cache import pool_text
from worker.keyspace.entries import TOO_LARGE, RawEntry, kept_of
from worker.keyspace.keys import SPONSORSHIP
from worker.ledger import sponsorship
from worker.ledger.accounts import closed_users, existing_accounts
from worker.ledger.connection import Postgres
from worker.ledger.dead_letters import store_refused
from worker.resources import Resources
from worker.rules.received import Refresh, Refused
from worker.rules.sponsorship import CreditRow, GrantRow, Known, Locked, Pool, absorbed_of, credit_of, hash_of

# The end of the year 9999: later no date can be.
_LAST_MILLISECOND = 253_402_300_799_999

Identifier = Annotated[str, Field(pattern=ID_PATTERN)]
Units = Annotated[int, Field(ge=0, le=MAX_AMOUNT)]
Fields = TypeVar("Fields", bound="_Fields")


class _Fields(BaseModel):
    """Fields of an entry, as text."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Grant(_Fields):
    """An entry `k=grant`, as worker/keyspace/lua/sponsor_settle.lua writes it."""

    user: Identifier
    request: Identifier
    held: Units
    actual: Units
    paid: Units
    absorbed: Units
    window: Annotated[int, Field(ge=0, le=_LAST_MILLISECOND)]
    tier: Annotated[str, Field(pattern="^(" + "|".join(TRUST_TIERS) + ")$")]
    budget: Units
    late: bool

    @model_validator(mode="after")
    def _is_within_bounds(self) -> _Grant:
        if self.absorbed > absorbed_of(self.held, self.actual, self.paid):
            raise ValueError("absorbed: more than was held, or than was left to pay")
        return self


class _Credit(_Fields):
    """An entry `k=credit`, as worker/keyspace/lua/sponsor_credit.lua writes it."""

    request: Identifier
    paid: Units


class _Trust(_Fields):
    """An entry that says that the trust of user `r` changed."""

    r: Identifier


class Settled(NamedTuple):
    """A sponsored request that was settled: the pool is to give `absorbed` units."""

    entry_id: str
    user_id: str
    grant: _Grant
    payload: bytes


class Credited(NamedTuple):
    """Work that was paid for without the pool: a share of it flows into the pool."""

    entry_id: str
    credit: _Credit
    payload: bytes


Request = Settled | Credited
Received = Request | Refused | Refresh


class Loaded(NamedTuple):
    """What a batch needs to know, read under the pool's lock. `histories` names those of users who were closed."""

    locked: Locked
    histories: dict[str, str]


class Outcome(NamedTuple):
    """A batch worked out: rows to write, the pool after them, and what Redis is told after the COMMIT."""

    items: Sequence[Received]
    locked: Locked
    pool: Pool
    grants: list[GrantRow]
    credited: list[CreditRow]
    refused: list[Refused]

    @property
    def in_use(self) -> frozenset[str]:
        """Users whose accounts another transaction held: their entries stay in the stream."""
        return self.locked.in_use


class SponsorshipBooks:
    """The books of the pool's stream. See `Books`."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._terms = resources.catalogue.sponsorship

    def judge(self, entries: Sequence[RawEntry]) -> Iterator[Received]:
        """Grants, credits, changes of trust and refusals, one for each entry."""
        return map(_judged, entries)

    def is_recorded(self, postgres: Postgres, item: Request) -> bool:
        """True when the request has a grant or a credit."""
        return sponsorship.is_recorded(postgres, hash_of(_request_of(item)))

    def refuse(self, item: Request, reason: Refusal, detail: str) -> Refused:
        """The dead letter of an entry that cannot be applied."""
        return _refusal_of(item, reason, detail)

    def load_for_update(self, postgres: Postgres, items: Sequence[Received], *, skip_locked: bool) -> Loaded:
        """Lock the pool; then read what is in it, the requests that are recorded, and the clock."""
        hashes = [hash_of(_request_of(item)) for item in items if isinstance(item, Settled | Credited)]
        changed = sorted({item.user_id for item in items if isinstance(item, Refresh)})
        locked = sponsorship.lock_pool(postgres, self._terms.initial, hashes, changed, skip_locked=skip_locked)
        return Loaded(locked=locked, histories=self._histories(postgres, items))

    def work_out(self, items: Sequence[Received], loaded: Loaded) -> Outcome:
        """Drop what is known, give and take in the order of the stream."""
        poison_point(_request_of(item) for item in items if isinstance(item, Settled | Credited))
        return work_out(items, loaded.locked, loaded.histories, self._terms.paid_share_percent)

    def append(self, postgres: Postgres, outcome: Outcome) -> None:
        """Write grants and credits."""
        sponsorship.append(postgres, outcome.grants, outcome.credited)

    def update(self, postgres: Postgres, outcome: Outcome) -> None:
        """Write what is in the pool, and dead letters."""
        if outcome.grants or outcome.credited:
            sponsorship.update(postgres, outcome.pool)
        store_refused(postgres, SPONSORSHIP.number, outcome.refused)

    def publish(self, outcome: Outcome, taken_ms: int) -> None:
        """The pool becomes visible, what was settled leaves `promised`, the entries leave the stream, in one script.

        Standings of users whose trust changed are forgotten in the same step.
        """
        entries = [item.entry_id for item in outcome.items]
        settled = [f"g:{request}" for request in map(_promised_in, outcome.items) if request is not None]
        users = dict.fromkeys(item.user_id for item in outcome.items if isinstance(item, Refresh))
        ends_ms = taken_ms + self._resources.settings.cache_ttl_ms
        pool = calls.Publication(
            SPONSORSHIP.pool,
            SPONSORSHIP.pool_lease,
            [(SPONSORSHIP.promised, settled)],
            pool_text(outcome.pool),
            ends_ms,
        )
        forgotten = [calls.Publication(SPONSORSHIP.standing(user), SPONSORSHIP.standing_lease(user)) for user in users]
        minute = int(outcome.locked.now.timestamp()) // 60
        scripts.run(self._resources.redis, calls.publish(SPONSORSHIP, minute, entries, [pool, *forgotten]))
        crash_point("after_publish")

    def _histories(self, postgres: Postgres, items: Sequence[Received]) -> dict[str, str]:
        """Users whose accounts were closed, and the names of their histories."""
        users = sorted({item.user_id for item in items if isinstance(item, Settled)})
        strangers = sorted(set(users) - existing_accounts(postgres, users)) if users else []
        return closed_users(postgres, strangers) if strangers else {}


def work_out(items: Sequence[Received], locked: Locked, histories: dict[str, str], share_percent: int) -> Outcome:
    """Decide a whole batch, in order. Pure.

    A settlement that is refused changes nothing: what was paid with it does not flow back either.
    The pool never gives more than it has. Redis promises no more than that either, but a ledger restored from a backup
    may have less than Redis was told.
    """
    items = [item for item in items if getattr(item, "user_id", None) not in locked.in_use]
    outcome = Outcome(items=items, locked=locked, pool=locked.pool, grants=[], credited=[], refused=[])
    known = _known_before(locked)
    for item in items:
        if isinstance(item, Refused):
            outcome.refused.append(item)
        elif isinstance(item, Settled):
            refused = len(outcome.refused)
            outcome = _give(item, outcome, known, histories, locked.now)
            if item.grant.paid and len(outcome.refused) == refused:
                outcome = _take(item, item.grant.paid, outcome, known, share_percent, locked.now)
        elif isinstance(item, Credited):
            outcome = _take(item, item.credit.paid, outcome, known, share_percent, locked.now)
    return outcome


def _known_before(locked: Locked) -> Known:
    """Copy what is recorded of the batch's requests; the batch adds to the copy."""
    return Known(granted=dict(locked.known.granted), credited=dict(locked.known.credited))


def _give(item: Settled, outcome: Outcome, known: Known, histories: dict[str, str], now: datetime) -> Outcome:
    """The pool pays for a request, unless it has done so."""
    grant, digest = item.grant, hash_of(item.grant.request)
    user_id = histories.get(item.user_id, item.user_id)
    fingerprint = (user_id, grant.actual, grant.paid)
    if digest in known.granted:
        if known.granted[digest] != fingerprint:
            detail = f"request: recorded with actual {known.granted[digest][1]}, paid {known.granted[digest][2]}"
            outcome.refused.append(_refusal_of(item, Refusal.ID_CONFLICT, detail))
        return outcome
    known.granted[digest] = fingerprint
    absorbed = min(grant.absorbed, outcome.pool.units)
    if absorbed < grant.absorbed:
        logger.error("the pool has {} units, request {} was promised {}", absorbed, digest.hex(), grant.absorbed)
    pool = outcome.pool._replace(units=outcome.pool.units - absorbed, seq=outcome.pool.seq + 1)
    window_start = datetime.fromtimestamp(grant.window / 1_000, UTC)
    row = GrantRow(
        request_hash=digest,
        user_id=user_id,
        seq=pool.seq,
        held=grant.held,
        actual=grant.actual,
        paid=grant.paid,
        absorbed=absorbed,
        pool_after=pool.units,
        tier=grant.tier,
        daily_budget=grant.budget,
        window_start=window_start,
        late=grant.late,
        created_at=now,
    )
    outcome.grants.append(row)
    return outcome._replace(pool=pool)


def _take(
    item: Settled | Credited, paid: int, outcome: Outcome, known: Known, share_percent: int, now: datetime
) -> Outcome:
    """A share of what was paid for a request flows into the pool, unless it has done so."""
    digest = hash_of(_request_of(item))
    if digest in known.credited:
        if known.credited[digest] != paid:
            detail = f"request: credited with paid {known.credited[digest]}"
            outcome.refused.append(_refusal_of(item, Refusal.ID_CONFLICT, detail))
        return outcome
    known.credited[digest] = paid
    credited = credit_of(paid, share_percent)
    pool = outcome.pool._replace(units=outcome.pool.units + credited, seq=outcome.pool.seq + 1)
    outcome.credited.append(
        CreditRow(
            request_hash=digest,
            seq=pool.seq,
            paid=paid,
            share_percent=share_percent,
            credited=credited,
            pool_after=pool.units,
            created_at=now,
        )
    )
    return outcome._replace(pool=pool)


def _judged(entry: RawEntry) -> Received:
    """What an entry says. Never raises: whatever it is, it is one of the four."""
    raw_id, flat = entry[0], entry[1]
    entry_id = raw_id.decode("ascii")
    if len(entry) == 3 or sum(map(len, flat)) > MAX_ENTRY_BYTES or len(flat) > 2 * MAX_ENTRY_FIELDS:
        return Refused(entry_id, Refusal.TOO_LARGE, TOO_LARGE, *kept_of(entry), None)
    fields = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in _pairs(flat)}
    payload = json.dumps(fields).encode()
    owner = (
        (fields.get("user", ""), "", fields["request"]) if fields.get("k") == "grant" and "request" in fields else None
    )
    try:
        if fields.pop("v", None) != WIRE_VERSION.decode():
            raise Rejected(Refusal.BAD_VERSION, f"field v: must be {WIRE_VERSION.decode()}")
        if "r" in fields:
            return Refresh(entry_id, _parsed(_Trust, fields).r)
        kind = fields.pop("k", "")
        if kind == "grant":
            grant = _parsed(_Grant, fields)
            return Settled(entry_id, grant.user, grant, payload)
        if kind == "credit":
            return Credited(entry_id, _parsed(_Credit, fields), payload)
        raise Rejected(Refusal.BAD_POOL_ENTRY, f"field k: must be grant or credit (got {kind[:64]!a})")
    except Rejected as rejected:
        return Refused(entry_id, rejected.reason, rejected.detail, payload[:MAX_PAYLOAD_BYTES], len(payload), owner)


def _pairs(flat: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _parsed(model: type[Fields], fields: dict[str, str]) -> Fields:
    """The fields of an entry. Raises Rejected with the first rule that they break."""
    try:
        return model.model_validate_strings(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        detail = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        raise Rejected(Refusal.BAD_POOL_ENTRY, detail) from None


def _request_of(item: Settled | Credited) -> str:
    return item.grant.request if isinstance(item, Settled) else item.credit.request


def _promised_in(item: Received) -> str | None:
    """The request that an entry took from the pool. Refused, it gets nothing: then the pool is to have it back."""
    if isinstance(item, Settled):
        return item.grant.request
    return item.owner[2] if isinstance(item, Refused) and item.owner else None


def _refusal_of(item: Settled | Credited, reason: Refusal, detail: str) -> Refused:
    owner = (item.user_id, "", item.grant.request) if isinstance(item, Settled) else None
    return Refused(item.entry_id, reason, detail, item.payload, len(item.payload), owner)
