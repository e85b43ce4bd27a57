"""What operations are made of: steps, which `worker.client` carries out by waiting or by awaiting.

An operation is a generator: it yields steps (a Redis command, several in a pipeline, a question to the ledger or to the
host) and is sent their results; what it returns is the answer. So both clients share all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from redis import exceptions as redis_errors

from config.log import client_logger
from worker.errors import ClientBusy, RedisUnavailable, WrongRedis
from worker.keyspace import keys
from worker.keyspace.scripts import Call

if TYPE_CHECKING:
    from schemas.events import UsageEvent
    from worker.client.ledger import LedgerView
    from worker.client.spool_file import Spool
    from worker.client.turns import Turn

logger = client_logger

T = TypeVar("T")


DOWN = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
)


# What a command of a recording call may fail with: its error then carries the events.
FAILED = (redis_errors.RedisError, WrongRedis)

# A Redis that answers, but not with what was asked: in a failover, or with a disk it cannot write to.
_REFUSALS = ("NOAUTH", "WRONGPASS", "DB index is out of range", "invalid DB index")
_NOT_SERVING = ("NOREPLICAS", "MISCONF", "CLUSTERDOWN", "MASTERDOWN", "BUSY ")


class Command(NamedTuple):
    """One Redis command; the step's result is its reply.

    A `short` one is of a call that has an answer without Redis, too: it waits shortly, and not at all just after Redis
    failed. `undo` makes the steps that give back what it may have set aside, and only that: for a caller that was
    interrupted or cancelled before it received the answer. One that `records` has an event, which is confirmed only
    once enough replicas have it, if the settings want any.
    """

    args: tuple[Any, ...]
    short: bool = False
    undo: Undo | None = None
    records: bool = False


class Pipeline(NamedTuple):
    """Redis commands sent together; the step's result is the list of replies, errors among them."""

    commands: tuple[tuple[Any, ...], ...]
    short: bool = False
    records: bool = False


class Ask(NamedTuple):
    """A question to the ledger; the step's result is what the function returns. `undo`: see `Command`."""

    question: Callable[[LedgerView], Any]
    undo: Undo | None = None


class AskHost(NamedTuple):
    """A question to the host's own code, which may take its time; the step's result is what the function returns."""

    question: Callable[[], Any]


class AskSpool(NamedTuple):
    """A question to the spool on this machine's disk; the step's result is what the function returns.

    A `quick` one takes microseconds, so that an event loop asks it at once.
    """

    question: Callable[[Spool], Any]
    quick: bool = False


@dataclass(slots=True, eq=False)
class LoadTurn:
    """A wait for the turn to load a user's balance; the step's result is None.

    The operation must end the `turn`, whatever interrupts it. None: another call has loaded the balance meanwhile.
    The turn may be for other users also, unless the user is to be loaded `alone`.
    """

    user_id: str
    alone: bool = False
    turn: Turn | None = None


class Pause(NamedTuple):
    """A short wait, in which an event loop goes on with other calls; the step's result is None."""

    seconds: float


class Send(NamedTuple):
    """Have what is in the spool sent, beside the calls. The step's result is True if nobody was sending it."""


# The scripts of calls that ask first.
_SHORT = frozenset({"check", "reserve", "charge", "lease", "install", "reuse", "shed", "sponsor_decide"})

# The scripts that append events.
_RECORDS = frozenset({"emit", "capture", "settle", "charge", "sponsor_settle", "sponsor_credit"})

Effect = Command | Pipeline | Ask | AskHost | AskSpool | LoadTurn | Pause | Send
Effects = Generator[Effect, Any, T]
Undo = Callable[[], "Effects[Any]"]


class Busy(redis_errors.RedisError):
    """All connections of this process were in use for longer than a call may wait. Redis was not asked."""


def unconfirmed(
    error: Exception,
    events: Sequence[UsageEvent] = (),
    captured_from: str | None = None,
    traceparent: str | None = None,
) -> RedisUnavailable | WrongRedis:
    """Return what a call raises whose command failed with `error`; it carries what may be unsent, and its trace."""
    if isinstance(error, WrongRedis):
        return WrongRedis(error.reason, events, captured_from)
    kind = ClientBusy if isinstance(error, Busy) else RedisUnavailable
    return kind(str(error), events, captured_from, traceparent)


def as_down(error: Exception) -> Exception:
    """The error of a Redis that answers but does not serve as that of one that is away; any other as it is.

    A password, a user or a database that Redis refuses is a mistake in `REDIS_URL`, never an outage.
    """
    while isinstance(error, redis_errors.ConnectionError) and isinstance(error.__cause__, redis_errors.RedisError):
        error = error.__cause__  # redis-py puts what a new connection was refused for into another error
    if isinstance(error, redis_errors.AuthenticationError) or (
        isinstance(error, redis_errors.ResponseError) and str(error).startswith(_REFUSALS)
    ):
        return WrongRedis(str(error))
    if isinstance(error, redis_errors.ResponseError) and str(error).startswith(_NOT_SERVING):
        return redis_errors.ConnectionError(str(error))
    return error


# ---------------------------------------------------------------------------------------------------------------------
# What several operations do


def run_script(request: Call, undo: Undo | None = None, *, short: bool = False) -> Effects[Any]:
    """One script: by its hash, and by its text where Redis does not know it yet. `undo`, `short`: see `Command`."""
    tail = (len(request.keys), *request.keys, *request.args)
    name = request.script.name
    short, records = short or name in _SHORT, name in _RECORDS
    try:
        return (yield Command(("EVALSHA", request.script.sha, *tail), short, undo, records))
    except redis_errors.NoScriptError:
        return (yield Command(("EVAL", request.script.text, *tail), short, undo, records))


def run_scripts(requests: Sequence[Call]) -> Effects[list[Any]]:
    """Several scripts in one pipeline; replies in order, errors among them. A single one raises its error.

    The texts go first: one script unknown to Redis among others that it knows would come late, and out of order. So
    does one that Redis forgets in between: no two of the calls are of one stream, or their order does not matter.
    """
    if len(requests) == 1:
        return [(yield from run_script(requests[0]))]
    short = all(request.script.name in _SHORT for request in requests)
    records = any(request.script.name in _RECORDS for request in requests)
    texts = dict.fromkeys(request.script.text for request in requests)
    commands: list[tuple[Any, ...]] = [("SCRIPT", "LOAD", text) for text in texts]
    commands += [
        ("EVALSHA", request.script.sha, len(request.keys), *request.keys, *request.args) for request in requests
    ]
    replies: list[Any] = (yield Pipeline(tuple(commands), short, records))[len(texts) :]
    for at, reply in enumerate(replies):
        if isinstance(reply, redis_errors.NoScriptError):
            try:
                replies[at] = yield from run_script(requests[at])
            except redis_errors.RedisError as error:
                replies[at] = error
    return replies


def ring(streams: Iterable[keys.Stream]) -> Effects[None]:
    """Wake a supervisor. Should this be lost, its sweep finds the backlog within a second: so failing is no error."""
    for stream in streams:
        try:
            yield Command(("RPUSH", keys.BELL, stream.number))
        except DOWN as error:
            logger.warning("doorbell of partition %s not rung: %s", stream.name, error)


def time_of(milliseconds: int) -> datetime:
    """A moment on the clock of Redis."""
    return datetime.fromtimestamp(milliseconds / 1_000, UTC)
