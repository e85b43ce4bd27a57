"""The books of the sponsorship pool: its grants and credits, from the pool's lock to Redis.

Its stream entries have three kinds: `k=grant` for a settled sponsored request, `k=credit` for paid work that was not
sponsored, `r=<user>` after a change of an account's trust. A request is known by its id for ever: a repeat of a
recorded one changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
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
from schemas.traces import trace_id_of, traceparent_of
from worker.consumer.books import Trim
from worker.consumer.tally import Tally
from worker.crash import crash_point, poison_point
from worker.errors import Rejected
from worker.keyspace import calls, scripts
from worker.keyspace.cache import pool_text
from worker.keyspace.entries import TOO_LARGE, RawEntry, kept_of
from worker.keyspace.keys import SPONSORSHIP, slot_of
from worker.ledger import sponsorship
from worker.ledger.accounts import closed_users, existing_accounts
from worker.ledger.connection import Postgres
from worker.ledger.dead_letters import store_refused
from worker.resources import Resources
from worker.rules.entry_times import stream_time
from worker.rules.received import Refresh, Refused
from worker.rules.sponsorship import CreditRow, GrantRow, Known, Locked, Pool, absorbed_of, credit_of, hash_of

# The end of the year 9999, the last possible date.
_LAST_MILLISECOND = 253_402_300_799_999

Identifier = Annotated[str, Field(pattern=ID_PATTERN)]
Units = Annotated[int, Field(ge=0, le=MAX_AMOUNT)]
Fields = TypeVar("Fields", bound="_Fields")


class _Fields(BaseModel):
    """Fields of a stream entry, as text."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Grant(_Fields):
    """A stream entry `k=grant`, as worker/keyspace/lua/sponsor_settle.lua writes it."""

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
    """A stream entry `k=credit`, as worker/keyspace/lua/sponsor_credit.lua writes it."""

    request: Identifier
    paid: Units


class _Trust(_Fields):
    """A stream entry about a change of the trust of user `r`."""

    r: Identifier


class Settled(NamedTuple):
    """A settled sponsored request: the pool gives `absorbed` units."""

    entry_id: str
    user_id: str
    grant: _Grant
    payload: bytes
    traceparent: str | None


class Credited(NamedTuple):
    """Work paid without the pool: a share of it flows into the pool."""

    entry_id: str
    credit: _Credit
    payload: bytes
    traceparent: str | None


Request = Settled | Credited
Received = Request | Refused | Refresh


class Loaded(NamedTuple):
    """The facts for a batch, read under the pool's lock. `histories`: names of closed users' histories."""

    locked: Locked
    histories: dict[str, str]


class Outcome(NamedTuple):
    """The outcome of a batch: rows to write, the pool after them, and a publication for Redis after the COMMIT."""

    items: Sequence[Received]
    locked: Locked
    pool: Pool
    grants: list[GrantRow]
    credited: list[CreditRow]
    refused: list[Refused]

    @property
    def in_use(self) -> frozenset[str]:
        """Users with accounts that another transaction held: their stream entries stay."""
        return self.locked.in_use

    @property
    def waits(self) -> int:
        """None: no entry of the pool names a meter."""
        return 0


class SponsorshipBooks:
    """The books of the pool's stream. See `Books`."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def next_change(self, first_id: str, now: datetime) -> datetime | None:
        """Return when another catalogue comes into force after the stream entry `first_id`; None without one."""
        return self._resources.in_force.timeline.next_change(stream_time(first_id, now))

    def judge(self, entries: Sequence[RawEntry], now: datetime) -> Iterator[Received]:  # noqa: ARG002 - a grant has a time
        """Return a grant, credit, change of trust or refusal for each stream entry, whatever the time in its id."""
        return map(_judged, entries)

    def is_recorded(self, postgres: Postgres, item: Request) -> bool:
        """Return True if the request has a grant or a credit."""
        return sponsorship.is_recorded(postgres, hash_of(_request_of(item)))

    def refuse(self, item: Request, reason: Refusal, detail: str) -> Refused:
        """Return the dead letter of a stream entry that cannot be applied."""
        return _refusal_of(item, reason, detail)

    def load_for_update(self, postgres: Postgres, items: Sequence[Received], *, skip_locked: bool) -> Loaded:
        """Lock the pool; then read its balance, the recorded requests, and the clock."""
        hashes = [hash_of(_request_of(item)) for item in items if isinstance(item, Settled | Credited)]
        changed = sorted({item.user_id for item in items if isinstance(item, Refresh)})
        initial = self._resources.catalogue.sponsorship.initial
        locked = sponsorship.lock_pool(postgres, initial, hashes, changed, skip_locked=skip_locked)
        return Loaded(locked=locked, histories=self._histories(postgres, items))

    def work_out(self, items: Sequence[Received], loaded: Loaded) -> Outcome:
        """Drop known requests; give and take in the order of the stream."""
        poison_point(_request_of(item) for item in items if isinstance(item, Settled | Credited))
        now = loaded.locked.now
        entered = stream_time(items[0].entry_id, now) if items else now
        terms = self._resources.in_force.timeline.at(entered, now).sponsorship
        return work_out(items, loaded.locked, loaded.histories, terms.paid_share_percent)

    def append(self, postgres: Postgres, outcome: Outcome) -> None:
        """Write grants and credits."""
        sponsorship.append(postgres, outcome.grants, outcome.credited)

    def update(self, postgres: Postgres, outcome: Outcome) -> None:
        """Write the pool's balance, and dead letters."""
        if outcome.grants or outcome.credited:
            sponsorship.update(postgres, outcome.pool)
        store_refused(postgres, SPONSORSHIP.number, outcome.refused)

    def count(self, tally: Tally, items: Sequence[Received], outcome: Outcome) -> None:
        """Count nothing beside the dead letters: the pool's grants are no events."""

    def publish(self, outcome: Outcome, taken_ms: int, *, trim: Trim | None = None) -> Sequence[calls.Note]:
        """Publish in one script: the pool appears, settled requests leave `promised`, stream entries are deleted.

        The same step forgets the standings of users with changed trust.
        """
        notes = trim.notes(1) if trim else []
        entries = [] if notes else [item.entry_id for item in outcome.items]
        settled = [f"g:{request}" for request in map(_promised_in, outcome.items) if request is not None]
        users = dict.fromkeys(item.user_id for item in outcome.items if isinstance(item, Refresh))
        ends_ms = taken_ms + self._resources.settings.cache_ttl_ms
        pool = calls.Publication(
            SPONSORSHIP.pool,
            SPONSORSHIP.pool_lease,
            [(SPONSORSHIP.promised, settled)],
            pool_text(outcome.pool),
            ends_ms,
            SPONSORSHIP.pool_version,
        )
        forgotten = [calls.Publication(SPONSORSHIP.standing(user), SPONSORSHIP.standing_lease(user)) for user in users]
        slot = slot_of(int(outcome.locked.now.timestamp() * 1_000))
        version_ttl_ms = self._resources.settings.version_ttl_seconds * 1_000
        request = calls.publish(
            SPONSORSHIP,
            slot,
            entries,
            [pool, *forgotten],
            version_ttl_ms=version_ttl_ms,
            note=notes[0] if notes else None,
        )
        scripts.run(self._resources.redis, request)
        crash_point("after_publish")
        return notes

    def _histories(self, postgres: Postgres, items: Sequence[Received]) -> dict[str, str]:
        """Return the closed users of a batch, and the names of their histories."""
        users = sorted({item.user_id for item in items if isinstance(item, Settled)})
        strangers = sorted(set(users) - existing_accounts(postgres, users)) if users else []
        return closed_users(postgres, strangers) if strangers else {}


def work_out(items: Sequence[Received], locked: Locked, histories: dict[str, str], percent: Decimal) -> Outcome:
    """Decide a whole batch, in order. Pure.

    A refused settlement changes nothing: no share of its payment flows back.
    The pool never gives more than it has. Redis promises no more than it has either, but a ledger restored from a
    backup may have less than Redis believes.
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
                outcome = _take(item, item.grant.paid, outcome, known, percent, locked.now)
        elif isinstance(item, Credited):
            outcome = _take(item, item.credit.paid, outcome, known, percent, locked.now)
    return outcome


def _known_before(locked: Locked) -> Known:
    """Return a copy of the recorded requests of the batch, to which the batch adds its own."""
    return Known(granted=dict(locked.known.granted), credited=dict(locked.known.credited))


def _give(item: Settled, outcome: Outcome, known: Known, histories: dict[str, str], now: datetime) -> Outcome:
    """Let the pool pay for a request, unless it has done so."""
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
        trace_id=trace_id_of(item.traceparent) if user_id == item.user_id else None,
    )
    outcome.grants.append(row)
    return outcome._replace(pool=pool)


def _take(
    item: Settled | Credited, paid: int, outcome: Outcome, known: Known, percent: Decimal, now: datetime
) -> Outcome:
    """Credit the pool with a share of a request's payment, unless it has it already."""
    digest = hash_of(_request_of(item))
    if digest in known.credited:
        if known.credited[digest] != paid:
            detail = f"request: credited with paid {known.credited[digest]}"
            outcome.refused.append(_refusal_of(item, Refusal.ID_CONFLICT, detail))
        return outcome
    known.credited[digest] = paid
    credited, whole = credit_of(paid, percent), int(percent)
    pool = outcome.pool._replace(units=outcome.pool.units + credited, seq=outcome.pool.seq + 1)
    outcome.credited.append(
        CreditRow(
            request_hash=digest,
            seq=pool.seq,
            paid=paid,
            share_percent=whole,
            credited=credited,
            pool_after=pool.units,
            created_at=now,
            share=None if percent == whole else percent,
        )
    )
    return outcome._replace(pool=pool)


def _judged(entry: RawEntry) -> Received:
    """Return a stream entry as a grant, credit, change of trust or refusal. Never raises."""
    raw_id, flat = entry[0], entry[1]
    entry_id = raw_id.decode("ascii")
    if len(entry) == 3 or sum(map(len, flat)) > MAX_ENTRY_BYTES or len(flat) > 2 * MAX_ENTRY_FIELDS:
        return Refused(entry_id, Refusal.TOO_LARGE, TOO_LARGE, *kept_of(entry), None)
    fields = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in _pairs(flat)}
    payload = json.dumps(fields).encode()
    traceparent = traceparent_of(fields.pop("t", None))
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
            return Settled(entry_id, grant.user, grant, payload, traceparent)
        if kind == "credit":
            return Credited(entry_id, _parsed(_Credit, fields), payload, traceparent)
        raise Rejected(Refusal.BAD_POOL_ENTRY, f"field k: must be grant or credit (got {kind[:64]!a})")
    except Rejected as rejected:
        kept, size = payload[:MAX_PAYLOAD_BYTES], len(payload)
        return Refused(entry_id, rejected.reason, rejected.detail, kept, size, owner, traceparent=traceparent)


def _pairs(flat: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _parsed(model: type[Fields], fields: dict[str, str]) -> Fields:
    """Return the fields of a stream entry. Raises Rejected with the first rule that they break."""
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
    """Return the request of a stream entry that the pool promised units; a refused one returns them to the pool."""
    if isinstance(item, Settled):
        return item.grant.request
    return item.owner[2] if isinstance(item, Refused) and item.owner else None


def _refusal_of(item: Settled | Credited, reason: Refusal, detail: str) -> Refused:
    owner = (item.user_id, "", item.grant.request) if isinstance(item, Settled) else None
    size = len(item.payload)
    return Refused(item.entry_id, reason, detail, item.payload, size, owner, traceparent=item.traceparent)
