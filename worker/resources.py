"""The resources of one process: settings, catalogue, the pool of connections to Postgres, and Redis."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from time import monotonic

import redis
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Engine

from config.catalogue import Catalogue, UnreadRule, catalogue_of, parse_with_settings
from config.log import client_logger, warn_once
from config.settings import Settings
from worker.keyspace import keys, totals
from worker.keyspace.connection import connect, redis_now_ms
from worker.keyspace.keys import RING_TTL_MS, Stream
from worker.ledger import catalogues, lives
from worker.ledger.connection import LedgerError, Postgres, batch_connection, open_engine, read_clock
from worker.ledger.partitions import claim_partitions
from worker.rules.account import Change
from worker.rules.catalogues import Timeline, other_catalogue
from worker.rules.lives import Life, found_as, token_of

FIRST_START = "first start"

# Sees the changes of each account, by user id, before they are stored; whatever it raises stops them.
Review = Callable[[Sequence[tuple[str, Sequence[Change]]]], None]


class CataloguesInForce:
    """The catalogues of the ledger, as far as this process has read them; until then the one that it carries.

    Threads may share it: they read one immutable `timeline`.
    """

    def __init__(self, settings: Settings, own: Catalogue) -> None:
        self._settings = settings
        self.timeline = Timeline.of(0, [(datetime.fromtimestamp(0, UTC), own)])
        self._clock: tuple[datetime, float] | None = None

    def take_up(self, postgres: Postgres, newest: int, now: datetime) -> bool:
        """Read the registered catalogues if `newest` is another version than ours; return True if we did.

        `now` is the clock of the ledger. Raises CatalogueError for a catalogue that this release cannot read: a newer
        release must then do the work.
        """
        self._clock = now, monotonic()
        if newest in (0, self.timeline.version):
            return False
        rows = catalogues.read_versions(postgres, of_last_days=self._settings.event_max_age_days)
        registered = [(row.effective_from, self._parse(row)) for row in rows]
        self.timeline = Timeline.of(newest, registered)
        return True

    def refresh(self, postgres: Postgres) -> None:
        """Ask for the newest version, and take it up. Raises CatalogueError."""
        self.take_up(postgres, *catalogues.newest_version(postgres))

    def follow(self, other: CataloguesInForce) -> None:
        """Know what another one of this process knows."""
        self.timeline, self._clock = other.timeline, other._clock

    def put_off(self) -> None:
        """Go on with what we know, as if the ledger had been asked."""
        self._clock = datetime.now(UTC), monotonic()

    def is_older_than(self, seconds: float) -> bool:
        """Return True if the ledger was not asked for so long, or never."""
        return self._clock is None or monotonic() > self._clock[1] + seconds

    def now(self) -> Catalogue:
        """Return the catalogue in force now, by the clock of the ledger as this process last read it."""
        at, since = self._clock or (datetime.now(UTC), monotonic())
        moment = at + timedelta(seconds=monotonic() - since)
        return self.timeline.at(moment, moment)

    def _parse(self, row: catalogues.CatalogueVersion) -> Catalogue:
        unread: list[UnreadRule] = []
        # Whether it has the default plan is asked where an account is to be opened: all other work goes on.
        found = parse_with_settings(row.content, f"catalogue version {row.version}", self._settings, unread=unread)
        for rule in unread:
            warn_once(f"catalogue version {row.version}: this release does not tell notices of the kind {rule.kind!r}")
        return found


@dataclass(frozen=True)
class Resources:
    """The resources of a worker process; made once, shared by its drains.

    `own_catalogue` is the file that this process carries, `catalogue` the one in force. `review` is that of a command
    that asks before it changes much; other processes have none.
    """

    settings: Settings
    own_catalogue: Catalogue
    engine: Engine
    redis: redis.Redis
    review: Review | None = None
    in_force: CataloguesInForce = field(init=False)

    def __post_init__(self) -> None:
        """Go by the file of this process until the ledger is asked."""
        object.__setattr__(self, "in_force", CataloguesInForce(self.settings, self.own_catalogue))

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue in force, as far as this process knows."""
        return self.in_force.now()

    @property
    def missing_default_plan(self) -> str | None:
        """The default plan of the settings, if the catalogue in force lacks it."""
        plan = self.settings.default_plan
        return plan if plan is not None and plan not in self.catalogue.plans else None

    def reviewed(self, review: Review) -> Resources:
        """Return the same resources with a `review`. Close them once, by either."""
        other = replace(self, review=review)
        object.__setattr__(other, "in_force", self.in_force)
        return other

    @classmethod
    def open(cls, settings: Settings) -> Resources:
        """Open the resources for `settings`; connect to no server yet.

        Raises CatalogueError or LedgerError.
        """
        catalogue = catalogue_of(settings)
        return cls(settings, catalogue, open_engine(settings), connect(settings))

    def claim(self, *, compares: bool = True) -> None:
        """Agree on the number of partitions and the catalogue with the ledger and Redis, before any work.

        An unregistered ledger gets the catalogue of this process. If Redis is not in the life that the ledger knows,
        its holds and unread events are lost, and a new life begins. With `compares`, it warns if this process carries
        another catalogue than the one in force.
        Raises LedgerError if either has another number: a user's events would be in two streams.
        """
        wanted = self.settings.partitions
        claim_partitions(self.engine, wanted)
        # Read before the write: a Redis without memory refuses writes, and workers must drain it all the same.
        written = self.redis.get(keys.PARTITION_COUNT) or self.redis.set(
            keys.PARTITION_COUNT, wanted, nx=True, get=True
        )
        if written is not None and int(written) != wanted:
            raise LedgerError(f"METERFALL_PARTITIONS: this Redis has {int(written)} partitions, not {wanted}")
        if found_as(self._token(), [life.token for life in self.lives()]) is not None:
            # Without memory, or with one broken key, it must be drained all the same.
            with contextlib.suppress(redis.ResponseError):
                totals.look(self.redis, keys.streams(wanted))  # before the first stream entry: each counts from 0
            # Who only looks leaves the life to a dyno.
            with contextlib.suppress(redis.OutOfMemoryError, redis.exceptions.NoPermissionError, InsufficientPrivilege):
                self._begin_life()
        accepted = self._claim_catalogue()
        if compares:
            self._compare(accepted)

    def lives(self) -> list[Life]:
        """Return the lives of Redis that the ledger knows, newest first."""
        with batch_connection(self.engine) as postgres:
            return lives.read_lives(postgres)

    def _begin_life(self) -> None:
        """Begin a new life of Redis, unless another process has begun it.

        A token that Redis has and the ledger does not know is taken over, so that two ledgers do not fight for one
        Redis. Killed after the write to Redis and before the COMMIT, the next call takes the token over likewise.
        """
        with batch_connection(self.engine) as postgres:
            lives.lock_lives(postgres)
            token, known = self._token(), [life.token for life in lives.read_lives(postgres)]
            found = found_as(token, known)
            if found is None:
                return
            # A dyno of the former release may have found it empty, before the ledger knew of lives.
            marked_ms = 0 if known else int(self.redis.get(keys.FOUND_EMPTY) or 0)
            began_at = datetime.fromtimestamp(marked_ms / 1_000, UTC) if marked_ms else None
            if token is None or token in known:
                token = token_hex(16)
            lives.insert_life(postgres, token, "empty" if marked_ms else found, began_at)
            self.redis.set(keys.LIFE, token)
            self.redis.set(keys.FOUND_EMPTY, marked_ms if found == "new" else redis_now_ms(self.redis))
            postgres.commit()

    def _token(self) -> str | None:
        """Return the token of the life that Redis is in; None without one."""
        return token_of(self.redis.get(keys.LIFE))

    def _claim_catalogue(self) -> list[Catalogue]:
        """Take up the registered catalogues, or register our own as the first. Two first starts register one.

        Returns those in force and to come. Raises CatalogueError for one that this release cannot read.
        """
        own = self.own_catalogue
        with batch_connection(self.engine) as postgres:
            if catalogues.newest_version(postgres)[0] == 0 and own.text:
                catalogues.lock_catalogues(postgres)
                if catalogues.newest_version(postgres)[0] == 0:
                    catalogues.insert_version(postgres, own.fingerprint, own.text, None, FIRST_START, None)
                postgres.commit()
        return self.take_up_catalogues()

    def _compare(self, accepted: Sequence[Catalogue]) -> None:
        """Warn if our catalogue is none of these, and announce its meters: events of these wait until it is applied."""
        own = self.own_catalogue
        if own.fingerprint in {each.fingerprint for each in accepted}:
            return
        client_logger.warning("%s", other_catalogue(own.digest, accepted[0].digest))
        with contextlib.suppress(redis.OutOfMemoryError, redis.exceptions.NoPermissionError):
            self.redis.hset(keys.OTHER_CATALOGUES, own.fingerprint, " ".join(sorted(own.meters)))
            self.redis.pexpire(keys.OTHER_CATALOGUES, keys.OTHER_CATALOGUES_TTL_MS)

    def take_up_catalogues(self) -> list[Catalogue]:
        """Read the registered catalogues; return the one in force and those to come, whose digests Redis then has.

        Producers without a ledger compare theirs. Raises CatalogueError.
        """
        with batch_connection(self.engine) as postgres:
            self.in_force.refresh(postgres)
            now = read_clock(postgres)
        timeline = self.in_force.timeline
        accepted = [timeline.at(now, now), *timeline.to_come(now)]
        # Who only looks may not write it; a dyno has.
        with contextlib.suppress(redis.OutOfMemoryError, redis.exceptions.NoPermissionError):
            known = " ".join(each.fingerprint for each in accepted)
            if self.redis.get(keys.CATALOGUE) != known.encode():
                self.redis.set(keys.CATALOGUE, known)
        return accepted

    def ring(self, stream: Stream) -> None:
        """Wake a supervisor for this stream, unless a drain of it waits already."""
        if self.redis.set(stream.rung, "1", nx=True, px=RING_TTL_MS):
            self.redis.rpush(keys.BELL, stream.number)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()
        self.redis.close()
