"""What operations are made of: steps, which `worker.client` carries out by waiting or by awaiting.

An operation is a generator: it yields steps (a Redis command, several in a pipeline, a question to the ledger or to the
host) and is sent their results; what it returns is the answer. So both clients share all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from secrets import token_hex
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from redis import exceptions as redis_errors

from config.catalogue import TRUST_TIERS, Catalogue
from config.log import client_logger
from config.settings import Settings
from worker.errors import PartitionMismatch, RedisUnavailable
from worker.keyspace import keys
from worker.keyspace.scripts import Call, call
from worker.keyspace.signatures import Signer, signer_of

if TYPE_CHECKING:
    from worker.client.ledger import LedgerView
    from worker.client.spool_file import Spool

logger = client_logger

T = TypeVar("T")

# How often a load may lose its lease to a publish before the call gives up; each try reads Postgres anew.
_LOAD_ATTEMPTS = 50
# Long enough for the script that something was loaded for.
_SHORTEST_LIFE_MS = 50

DOWN = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
)


# A Redis that answers, but not with what was asked: in a failover, or with a disk it cannot write to.
_NOT_SERVING = ("NOREPLICAS", "MISCONF", "CLUSTERDOWN", "MASTERDOWN", "BUSY ")


class Command(NamedTuple):
    """One Redis command; the step's result is its reply."""

    args: tuple[Any, ...]


class Pipeline(NamedTuple):
    """Redis commands sent together; the step's result is the list of replies, errors among them."""

    commands: tuple[tuple[Any, ...], ...]


class Ask(NamedTuple):
    """A question to the ledger; the step's result is what the function returns."""

    question: Callable[[LedgerView], Any]


class AskHost(NamedTuple):
    """A question to the host's own code, which may take its time; the step's result is what the function returns."""

    question: Callable[[], Any]


class AskSpool(NamedTuple):
    """A question to the spool on this machine's disk; the step's result is what the function returns."""

    question: Callable[[Spool], Any]


Effect = Command | Pipeline | Ask | AskHost | AskSpool
Effects = Generator[Effect, Any, T]


class TrustSource(Protocol):
    """How far a host trusts its users, where it knows better than their accounts.

    A client that is given one asks it when the pool decides, estimates, or settles late. What it raises ends the call.
    """

    def tier_of(self, user_id: str) -> str | None:
        """The user's trust tier. None: the account's own; a tier that does not exist counts as the lowest."""
        ...


@dataclass
class Context:
    """What the operations know: settings, catalogue, whom to ask for trust, and how to sign.

    And what they remember: whether Redis agreed on the number of partitions, and what they let through without it;
    whether something may be in the spool, and until when (`monotonic()`) Redis is taken to be away because of that.
    """

    settings: Settings
    catalogue: Catalogue
    trust: TrustSource | None = None
    claimed: bool = False
    let_through: dict[tuple[str, str], int] = field(default_factory=dict)
    spooled: bool = False
    away_until: float = 0.0

    def partition(self, user_id: str) -> int:
        """Partition of a user."""
        return keys.partition_of(user_id, self.settings.partitions)

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
    def outcome_ttl_ms(self) -> int:
        """How long the outcome of a call is remembered."""
        return self.settings.outcome_ttl_seconds * 1_000


def as_down(error: Exception) -> Exception:
    """The error of a Redis that answers but does not serve as that of one that is away; any other as it is."""
    if isinstance(error, redis_errors.ResponseError) and str(error).startswith(_NOT_SERVING):
        return redis_errors.ConnectionError(str(error))
    return error


class Running(Generic[T]):
    """An operation under way: the `step` to carry out next, or, when there is none, its `answer`."""

    step: Effect | None
    answer: T

    def __init__(self, context: Context, steps: Effects[T]) -> None:
        agreed = context.claimed or context.takes_redis_for_away
        self._steps = steps if agreed else claim_first(context, steps)
        self._go_on(self._steps.send, None)

    def succeed(self, result: Any) -> None:
        """Go on with the result of the step."""
        self._go_on(self._steps.send, result)

    def fail(self, error: Exception) -> None:
        """Go on with the error of the step; raises it unless the operation knows what to do."""
        self._go_on(self._steps.throw, as_down(error))

    def _go_on(self, move: Callable[[Any], Effect], value: Any) -> None:
        try:
            self.step = move(value)
        except StopIteration as done:
            self.step, self.answer = None, done.value


def claim_first(context: Context, steps: Effects[T]) -> Effects[T]:
    """The same steps, after Redis agreed on the number of partitions; written by whoever comes first.

    Raises PartitionMismatch where it has another number: events of one user would be in two streams.
    """
    wanted = context.settings.partitions
    try:
        _, written = yield Pipeline((("SET", keys.PARTITION_COUNT, wanted, "NX"), ("GET", keys.PARTITION_COUNT)))
    except DOWN:
        written = None
    if isinstance(written, bytes):
        if int(written) != wanted:
            raise PartitionMismatch(int(written), wanted)
        context.claimed = True
    return (yield from steps)


# ---------------------------------------------------------------------------------------------------------------------
# What several operations do


def run_script(request: Call) -> Effects[Any]:
    """One script: by its hash, and by its text where Redis does not know it yet."""
    tail = (len(request.keys), *request.keys, *request.args)
    try:
        return (yield Command(("EVALSHA", request.script.sha, *tail)))
    except redis_errors.NoScriptError:
        return (yield Command(("EVAL", request.script.text, *tail)))


def run_scripts(requests: Sequence[Call]) -> Effects[list[Any]]:
    """Several scripts in one pipeline; replies in order, errors among them.

    The texts go first: one script unknown to Redis among others that it knows would come late, and out of order.
    """
    if len(requests) == 1:
        return [(yield from run_script(requests[0]))]
    texts = dict.fromkeys(request.script.text for request in requests)
    commands: list[tuple[Any, ...]] = [("SCRIPT LOAD", text) for text in texts]
    commands += [
        ("EVALSHA", request.script.sha, len(request.keys), *request.keys, *request.args) for request in requests
    ]
    replies: list[Any] = yield Pipeline(tuple(commands))
    return replies[len(texts) :]


# Reads from Postgres what a script did not find, and caches it. It is told what the script answered, and the shortest
# life (ms) that this may have; returns True when that life was over before it came. None: nothing is missing.
Load = Callable[[bytes, int], Effects[bool] | None]


def run_loading(context: Context, request: Call, load: Load, needed: str) -> Effects[Any]:
    """Run a script that needs what may not be cached; what it does not find is loaded first.

    Raises RedisUnavailable when what is `needed` changes faster than it can be loaded.
    """
    shortest_life_ms = 0
    for _ in range(_LOAD_ATTEMPTS):
        reply = yield from run_script(request)
        if context.let_through:
            context.let_through.clear()
        loading = load(reply[0], shortest_life_ms)
        if loading is None:
            return reply
        was_late = yield from loading
        # The boundary is behind the next load. Should that be late again, its life is shorter than a load takes.
        shortest_life_ms = _SHORTEST_LIFE_MS if was_late else 0
    raise RedisUnavailable(f"{needed} changed {_LOAD_ATTEMPTS} times while it was loaded")


def take_lease(context: Context, lease: str) -> Effects[bytes]:
    """Take the right to cache what is read from Postgres from now on; returns its token."""
    token: bytes = yield from run_script(call("lease", [lease], [token_hex(8), context.settings.load_lease_ttl_ms]))
    return token


def ring(partitions: Iterable[int]) -> Effects[None]:
    """Wake a supervisor. Should this be lost, its sweep finds the backlog within a second: so failing is no error."""
    for partition in partitions:
        try:
            yield Command(("RPUSH", keys.BELL, partition))
        except DOWN as error:
            logger.warning("doorbell of partition %s not rung: %s", partition, error)
