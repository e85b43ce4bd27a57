"""What a client knows and remembers between calls, and how one call runs to its end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import count
from secrets import token_hex
from socket import EAI_NONAME, gaierror
from threading import Lock
from time import monotonic
from typing import Any, Generic, Protocol

from redis import exceptions as redis_errors

from config.catalogue import DIGEST_DIGITS, TRUST_TIERS, Catalogue
from config.settings import Settings
from schemas.events import Scalar
from worker.client.effects import DOWN, Ask, Busy, Command, Effect, Effects, Pipeline, T, Undo, as_down, logger
from worker.client.models import UnknownModels
from worker.errors import ClientBusy, HoldConflict, PartitionMismatch, WrongRedis
from worker.keyspace import keys
from worker.keyspace.replicas import TooFewReplicas, confirmation
from worker.keyspace.signatures import Signer, signer_of
from worker.rules.account import sub_meter, sub_meters
from worker.rules.catalogues import other_catalogue
from worker.rules.preflight import Spend


class TrustSource(Protocol):
    """How far a host trusts its users, where it knows better than their accounts.

    A client that is given one asks it when the pool decides, estimates, or settles late. What it raises ends the call.
    """

    def tier_of(self, user_id: str) -> str | None:
        """The user's trust tier. None: the account's own; a tier that does not exist counts as the lowest."""
        ...


class LetThrough:
    """Holds that this process grants while Redis is down, within a bound per account and meter. Threads may share it.

    They count until Redis answers again. A repeat is known by its user and key, and counts once.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._holds: dict[tuple[str, str], Spend] = {}
        self._units: dict[tuple[str, str], int] = {}
        # How many holds were ever granted: it tells whether some were between two moments.
        self.grants = 0

    def left(self, spend: Spend, bound: int) -> int:
        """Units of `bound` that are left to the account of `spend` on its meter."""
        return bound - self._units.get((spend.user_id, spend.meter), 0)

    def take(self, spend: Spend, key: str, bound: int) -> int:
        """Grant a hold if it fits within `bound`, in one atomic step.

        Returns the units that it could have: it is granted if these are `spend.amount` or more. Raises HoldConflict if
        the key is taken by another hold.
        """
        with self._lock:
            held = self._holds.get((spend.user_id, key))
            if held is not None and held != spend:
                raise HoldConflict(spend.user_id, key, held.meter, held.amount, held.backend)
            if held is not None:
                return spend.amount
            left = self.left(spend, bound)
            if spend.amount <= left:
                self._holds[spend.user_id, key] = spend
                self._units[spend.user_id, spend.meter] = bound - left + spend.amount
                self.grants += 1
            return left

    def redis_answered(self, grants: int) -> None:
        """Forget what was granted: Redis has answered a command that was sent after `grants` grants.

        If there were more since, Redis may have gone in between: then a later answer ends this outage.
        """
        if self._holds:
            with self._lock:
                if self.grants == grants:
                    self._holds.clear()
                    self._units.clear()


class SpooledParts:
    """Parts of holds that went to the spool. Holds that the ledger granted must count as these, also after their end.

    Threads may share it. They are known until nothing is left in the spool.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._parts: dict[tuple[str, str], dict[str, int]] = {}
        # How many were ever added: it tells whether some were between two moments.
        self.additions = 0

    def add(self, user_id: str, key: str, event_id: str, units: int) -> int:
        """Note a part of a hold, once; return the units of all its parts."""
        with self._lock:
            self._parts.setdefault((user_id, key), {})[event_id] = units
            self.additions += 1
        return self.units(user_id, key)

    def units(self, user_id: str, key: str) -> int:
        """Return the units of all parts of a hold."""
        with self._lock:
            return sum(self._parts.get((user_id, key), {}).values())

    def all_sent(self, additions: int) -> None:
        """Forget all: the spool was empty after `additions` additions. If there were more since, a later look does."""
        if self._parts:
            with self._lock:
                if self.additions == additions:
                    self._parts.clear()


class Breaker:
    """Whether a server failed a moment ago. Then calls with another answer do not wait for it: one a while tries.

    Threads may share it.
    """

    def __init__(self, pause_seconds: float) -> None:
        self._pause_seconds = pause_seconds
        self._lock = Lock()
        self._open_until: float | None = None
        self._reason = ""

    def lets_through(self) -> bool:
        """Return True when the server may be tried; once it failed, to one caller for each pause."""
        if self._open_until is None:
            return True
        with self._lock:
            if self._open_until is not None and monotonic() < self._open_until:
                return False
            self._open_until = monotonic() + self._pause_seconds
            return True

    def failed(self, error: Exception) -> None:
        """The server was lost, or did not answer in time."""
        with self._lock:
            self._open_until = monotonic() + self._pause_seconds
            self._reason = str(error)

    def answered(self) -> None:
        """The server answered: whatever it said, it is there."""
        if self._open_until is not None:
            with self._lock:
                self._open_until = None

    def error(self) -> Exception:
        """Return what a call is told instead of trying."""
        return redis_errors.ConnectionError(f"Redis failed a moment ago: {self._reason}")


# What the resolver says of a name that does not exist; whatever else it says may pass.
_NO_SUCH_HOST = {EAI_NONAME, getattr(socket, "EAI_NODATA", EAI_NONAME)}
_LOST = (redis_errors.ConnectionError, redis_errors.TimeoutError)


@dataclass
class Counters:
    """What happened in a client that its service may want to watch.

    `busy`: calls that found no free connection in time. `unwaited`: calls whose caller was cancelled before their end.
    """

    busy: int = 0
    unwaited: int = 0


# By the URL of their server, for the whole process: all clients that it makes share one bound and one breaker.
_let_through: dict[str, LetThrough] = {}
_breakers: dict[tuple[str, float], Breaker] = {}


def forget_the_parent() -> None:
    """In a child after a fork: what the parent let through is the parent's, and its locks may be held for ever."""
    _let_through.clear()
    _breakers.clear()


@dataclass
class Context:
    """What the operations know: settings, catalogue, whom to ask for trust, how to sign, and the `clock` of the host.

    And what they remember: whether Redis agreed on the number of partitions, and what they let through without it;
    whether the ledger granted holds meanwhile;
    until when (`monotonic()`) Redis is taken to be away because something had to be spooled;
    the models that had no multiplier.
    """

    settings: Settings
    catalogue: Catalogue
    trust: TrustSource | None = None
    claimed: bool = False
    holds_in_ledger: bool = False
    away_until: float = 0.0
    unknown_models: UnknownModels = field(default_factory=UnknownModels)
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    def __post_init__(self) -> None:
        self.counters = Counters()
        # What waits for replicas after commands that record; nothing by default.
        self.confirmation = confirmation(self.settings)
        self.share()

    def share(self) -> None:
        """Join what the clients of this process share."""
        self.unknown_models.begin_anew()
        self.spooled_parts = SpooledParts()
        # Begins the leases of this client: a lease of another one means that somebody else loads.
        self.loader = token_hex(4)
        self._call_numbers = count()
        # Taken by the call that compares the catalogues, and never given back: calls that began beside it do not.
        self._comparison = Lock()
        url, pause_seconds = self.settings.redis_url, self.settings.redis_down_pause_ms / 1_000
        self.let_through = _let_through.setdefault(url, LetThrough())
        self.breaker = _breakers.setdefault((url, pause_seconds), Breaker(pause_seconds))
        url, pause_seconds = self.settings.database_url or "", self.settings.ledger_down_pause_ms / 1_000
        self.ledger_breaker = _breakers.setdefault((url, pause_seconds), Breaker(pause_seconds))

    def new_call_id(self) -> str:
        """What tells a call that is sent again, because its connection was lost, from another call for the same."""
        return f"{self.loader}{next(self._call_numbers):x}"

    def is_first_to_compare(self) -> bool:
        """True once: for the call that compares the catalogue of this client with those in Redis."""
        return self._comparison.acquire(blocking=False)

    def account(self, user_id: str) -> keys.AccountKeys:
        """The keys of an account, in its partition."""
        return keys.account_of(user_id, self.settings.partitions)

    def partition(self, user_id: str) -> keys.Partition:
        """Partition of a user."""
        return keys.partition_of(user_id, self.settings.partitions)

    def capped_backends(self, meter: str, backend: Scalar) -> tuple[str, ...]:
        """The backend, if any plan has a sub-cap for it on this meter; else nothing: then no sub-meter is kept."""
        capped = self.catalogue.capped_backends.get(meter, ())
        return (backend,) if isinstance(backend, str) and backend in capped else ()

    def sub_meter(self, meter: str, backend: Scalar) -> str | None:
        """Name of the sub-cap that work on this backend counts against, None where no plan has one."""
        capped = self.capped_backends(meter, backend)
        return sub_meter(meter, capped[0]) if capped else None

    def sub_meters(self, meter: str) -> list[str]:
        """Names of all sub-caps that plans have on this meter."""
        return sub_meters(meter, self.catalogue.capped_backends.get(meter, ()))

    @cached_property
    def signer(self) -> Signer | None:
        """Signs what is sent, if this process has a key."""
        return signer_of(self.settings)

    @cached_property
    def daily_budgets(self) -> Mapping[str, int]:
        """Units that the pool covers in a day, by trust tier, the lowest first: a setting's, else the catalogue's."""
        terms: dict[str, int] = dict(self.catalogue.sponsorship.daily_budget.items())
        set_here = {tier: getattr(self.settings, f"sponsor_daily_units_{tier}") for tier in TRUST_TIERS}
        return {tier: terms[tier] if units is None else units for tier, units in set_here.items()}

    @property
    def takes_redis_for_away(self) -> bool:
        """True shortly after something had to be spooled: until then nothing waits for Redis that can be spooled."""
        return monotonic() < self.away_until

    @property
    def ledger_connections(self) -> int:
        """Connections to Postgres at most, those beyond the pool's size included."""
        return 2 * self.settings.database_pool_size

    def met(self, error: Exception) -> Exception:
        """Note that a command failed; return what that means for its call.

        What Redis refuses is a mistake in our settings, and so is a host that nobody knows, as long as Redis never
        answered. Later somebody has changed the password, or the name service fails: that is an outage, and events
        that were not confirmed go the way of an outage.
        """
        found = as_down(error)
        unknown_host = isinstance(error.__context__, gaierror) and error.__context__.errno in _NO_SUCH_HOST
        if not self.claimed and unknown_host:
            return WrongRedis(str(error))
        if self.claimed and isinstance(found, WrongRedis):
            found = redis_errors.ConnectionError(str(found))
        if isinstance(found, TooFewReplicas):
            self.breaker.answered()  # only its replicas did not
        elif isinstance(found, _LOST):
            self.breaker.failed(found)
        elif isinstance(error, redis_errors.ResponseError):
            self.breaker.answered()  # it did, though not what was wanted
        return found

    @cached_property
    def event_max_age(self) -> timedelta:
        """How long ago the work of an event may have been done."""
        return timedelta(days=self.settings.event_max_age_days)

    @property
    def outcome_ttl_ms(self) -> int:
        """How long the outcome of a call is remembered."""
        return self.settings.outcome_ttl_seconds * 1_000


class Running(Generic[T]):
    """An operation under way: the `step` to carry out next, or, when there is none, its `answer`."""

    step: Effect | None
    answer: T
    # Makes the steps that give back what the newest step may have set aside. None: it sets nothing aside.
    undo: Undo | None = None

    def __init__(self, context: Context, steps: Effects[T]) -> None:
        agreed = context.claimed or context.takes_redis_for_away
        self.context = context
        self._steps = steps if agreed else claim_first(context, steps)
        self._go_on(self._steps.send, None)

    def succeed(self, result: Any) -> None:
        """Go on with the result of the step."""
        self._go_on(self._steps.send, result)

    def fail(self, error: BaseException) -> None:
        """Go on with the error of the step; raises it unless the operation knows what to do."""
        self._go_on(self._steps.throw, as_down(error) if isinstance(error, Exception) else error)

    def close(self) -> None:
        """End the operation where it stands; it gives back what it has taken. One that has ended stays as it is."""
        self._steps.close()

    def _go_on(self, move: Callable[[Any], Effect], value: Any) -> None:
        try:
            self.step = step = move(value)
            self.undo = step.undo if isinstance(step, Command | Ask) else None
        except StopIteration as done:
            self.step, self.answer = None, done.value
        except Busy as error:
            raise ClientBusy(str(error)) from error
        except redis_errors.NoPermissionError as error:
            raise WrongRedis(str(error)) from error


# Makes the steps that undo an operation that has ended, and whose answer nobody received. None: it has left nothing.
UndoAll = Callable[[Running[Any]], "Effects[Any] | None"]


def claim_first(context: Context, steps: Effects[T]) -> Effects[T]:
    """The same steps, after Redis agreed on the number of partitions; written by whoever comes first.

    Raises PartitionMismatch where it has another number: events of one user would be in two streams.
    """
    wanted = context.settings.partitions
    try:
        written, in_force = yield Pipeline((("GET", keys.PARTITION_COUNT), ("GET", keys.CATALOGUE)), short=True)
        if written is None:
            _, written = yield Pipeline(
                (("SET", keys.PARTITION_COUNT, wanted, "NX"), ("GET", keys.PARTITION_COUNT)), short=True
            )
    except redis_errors.NoPermissionError:
        written = in_force = None  # the role of services writes no settings: a dyno or a command does
    except (*DOWN, Busy, WrongRedis):
        written = in_force = None  # a refusal meets the next command as well, and its error carries what may be unsent
    if isinstance(written, bytes):
        if int(written) != wanted:
            raise PartitionMismatch(int(written), wanted)
        context.claimed = True
    if isinstance(in_force, bytes) and context.is_first_to_compare():
        yield from _compare_catalogues(context, in_force.decode("utf-8", "replace").split())
    return (yield from steps)


def _compare_catalogues(context: Context, accepted: Sequence[str]) -> Effects[None]:
    """Warn if this process carries another catalogue than those in force and to come, the digests in `accepted`.

    Then it announces the meters of its own: events of these wait until it is in force.
    """
    own = context.catalogue
    if not accepted or not own.fingerprint or own.fingerprint in accepted:
        return
    logger.warning(other_catalogue(own.digest, accepted[0][:DIGEST_DIGITS]))
    announce = ("HSET", keys.OTHER_CATALOGUES, own.fingerprint, " ".join(sorted(own.meters)))
    with suppress(*DOWN, Busy, WrongRedis):
        yield Pipeline((announce, ("PEXPIRE", keys.OTHER_CATALOGUES, keys.OTHER_CATALOGUES_TTL_MS)), short=True)
