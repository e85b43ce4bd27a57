"""Errors of the calls of services and hosts, and the base of all mistakes of a caller.

Each message says what happened, and to which user.

BadInput                     the request can never succeed in this form; commands exit with 2
├── AccountError             a change of an account that cannot be carried out
│   └── KeyConflict          … because its key was used for something else; commands exit with 1
│       └── OrderUsed        … because its order or invoice is another account's
├── ReportError              a report that cannot be made
└── NotFound                 no such account, or no such event of it (both of the above)
BillingError
├── InvalidRequest           an argument is malformed (also BadInput)
├── PartitionMismatch        this process and Redis have different numbers (also BadInput)
├── WrongRedis               Redis refuses what REDIS_URL says; `events` have not arrived (also BadInput)
├── ClientClosed             the call came after `close`
├── UsageDenied              the check said no; `answer` has the reason
│   └── UsageLimitExceeded   … because the amount does not fit
├── HoldConflict             this key already holds another amount, meter, backend or multiplier
├── HoldClosed               the hold of this key is settled, released, or expired
├── EventConflict            this event id stands for another amount or meter
├── RedisUnavailable         Redis did not confirm; `events` may not have arrived
│   └── ClientBusy           … because all connections of this process were in use for too long
├── SpoolUnavailable         the process could not read or write the spool on this machine's disk
└── LedgerUnavailable        the answer needs Postgres, which did not answer
Rejected                     a stream entry becomes a dead letter; only intake and its callers see this
ApiKeyRefused                a request brings no API key that may do this; only the HTTP service sees this
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # version and help are shown without pydantic
    from schemas.answers import CheckAnswer, HoldState
    from schemas.codes import KeyRefusal
    from schemas.events import Refusal, UsageEvent


class BadInput(ValueError):
    """The request can never succeed in this form. The message names the field and the values allowed."""


class AccountError(BadInput):
    """An account cannot be changed as asked. The message names the field and the values allowed."""


class KeyConflict(AccountError):
    """The key, order or invoice was used for something else, which the message names. Nothing changed."""


class OrderUsed(KeyConflict):
    """Another account used the order or invoice of a change. The message does not tell which: it may be erased."""

    def __init__(self, field: str, key: str) -> None:
        super().__init__(f"{field}: {key} was used by another account")
        self.field, self.key = field, key

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, vars(self))


class ReportError(BadInput):
    """The report cannot be made. The message names the field and the values allowed."""


class NotFound(AccountError, ReportError):
    """There is no such account, or no such event of it. The message names the field."""


class Rejected(Exception):
    """Intake refuses a stream entry. Carries the reason, and a sentence for the operator.

    `lacks`: the user and the meter of an event that only its unknown meter spoils.
    """

    def __init__(self, reason: Refusal, detail: str, lacks: tuple[str, str] | None = None) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.lacks = lacks


class ApiKeyRefused(Exception):
    """A request brings no API key that may do this. The message quotes no secret.

    `key_id` names the key if its secret was right: it is revoked, has expired, or has another role.
    """

    def __init__(self, reason: KeyRefusal, detail: str, key_id: str | None = None) -> None:
        super().__init__(reason, detail, key_id)
        self.reason = reason
        self.detail = detail
        self.key_id = key_id

    def __str__(self) -> str:
        return f"API key: {self.detail}"


class BillingError(Exception):
    """Base of all errors of the pre-flight calls. Each can be copied and pickled, so that a job queue may carry it."""

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, vars(self))


class InvalidRequest(BillingError, BadInput):
    """An argument is malformed; the call sent nothing."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: must be {allowed} (got {_shown(value)})")
        self.field = field
        self.allowed = allowed


class PartitionMismatch(BillingError, BadInput):
    """This process would put a user's events into another stream than other processes do."""

    def __init__(self, written: int, wanted: int) -> None:
        super().__init__(f"METERFALL_PARTITIONS: this Redis has {written} partitions, not {wanted}")


class WrongRedis(BillingError, BadInput):
    """Redis refuses what `REDIS_URL` says. No outage: waiting does not mend it. `events` have not arrived.

    `captured_from` names the hold if the event was a capture.
    """

    def __init__(self, reason: str, events: Sequence[UsageEvent] = (), captured_from: str | None = None) -> None:
        super().__init__(f"REDIS_URL: must name a user, a password and a database that Redis takes ({reason})")
        self.reason = reason
        self.events = tuple(events)
        self.captured_from = captured_from


class ClientClosed(BillingError):
    """The client was closed; it answers no more calls."""

    def __init__(self) -> None:
        super().__init__("the client is closed")


class UsageDenied(BillingError):
    """The user may not spend this amount now."""

    def __init__(self, answer: CheckAnswer) -> None:
        super().__init__(
            f"{answer.user_id} may not spend {answer.requested} of {_named(answer.meter, answer.backend)}: "
            f"{answer.reason.value}; {_figures(answer)}"
        )
        self.answer = answer
        self.meter = answer.meter
        self.limit = answer.limit
        self.used = answer.used
        self.available = answer.available
        self.requested = answer.requested


class UsageLimitExceeded(UsageDenied):
    """The amount does not fit into the units left."""


class HoldConflict(BillingError):
    """The key has a hold of another amount or meter, or one that counts against another backend's cap."""

    def __init__(
        self,
        user_id: str,
        key: str,
        meter: str,
        amount: int,
        backend: str | None = None,
        multiplier: str | None = None,
    ) -> None:
        times = "" if multiplier is None else f", at the multiplier {multiplier}"
        super().__init__(f"hold {key} of {user_id} already holds {amount} of {_named(meter, backend)}{times}")
        self.user_id, self.key, self.meter, self.amount, self.backend = user_id, key, meter, amount, backend
        self.multiplier = multiplier


class HoldClosed(BillingError):
    """The hold is over; take another key for other work."""

    def __init__(self, user_id: str, key: str, state: HoldState) -> None:
        super().__init__(f"hold {key} of {user_id} is {state.value}")
        self.user_id, self.key, self.state = user_id, key, state


class EventConflict(BillingError):
    """The event id already stands for another event; the first stands."""

    def __init__(self, user_id: str, event_id: str, amount: int) -> None:
        super().__init__(f"event {event_id} of {user_id} was already sent with amount {amount}")
        self.user_id, self.event_id, self.amount = user_id, event_id, amount


class RedisUnavailable(BillingError):
    """Redis did not confirm in time. Sending `events` again is safe: identity decides.

    `captured_from` names the hold if the event was a capture. `traceparent` is the trace of events without their own.
    """

    def __init__(
        self,
        reason: str,
        events: Sequence[UsageEvent] = (),
        captured_from: str | None = None,
        traceparent: str | None = None,
    ) -> None:
        unsent = f"; {len(events):,} {'event' if len(events) == 1 else 'events'} may be unsent" if events else ""
        super().__init__(f"Redis did not confirm ({reason}){unsent}")
        self.events = tuple(events)
        self.captured_from = captured_from
        self.traceparent = traceparent


class ClientBusy(RedisUnavailable):
    """All connections of this process were in use for longer than a call may wait. Redis itself is not down."""


class SpoolUnavailable(BillingError):
    """The process could not read or write the spool. Its content stays on disk."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"the spool {path} cannot be used: {reason}")


class LedgerUnavailable(BillingError):
    """The answer needs Postgres, and Postgres could not give it."""


def _restored(kind: type[BillingError], args: tuple[object, ...], attributes: dict[str, object]) -> BillingError:
    """Return an error as it was: its message is made already, of values that may not be its own arguments."""
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


def _shown(value: object) -> str:
    """Return a bad value as a message may quote it, cut short; one of another type than text or number with that."""
    try:
        shown = repr(str(value)[:64])
    except ValueError:  # Python prints no number of more than some thousand digits
        return "a number of too many digits"
    kind = type(value)
    if value is None or kind in {str, int}:
        return shown
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{shown} of type {where}{kind.__qualname__}"


def _named(meter: str, backend: str | None) -> str:
    return f"{meter} on {backend}" if backend is not None else meter


def _figures(answer: CheckAnswer) -> str:
    limit = "none" if answer.limit is None else answer.limit
    text = f"available {answer.available}, limit {limit}, used {answer.used}, pending {answer.pending}"
    if answer.wallet is not None:
        text = f"cost {answer.cost} of {answer.wallet}, {text}"
    if answer.limited_by is not None:
        by = answer.limited_by
        text += (
            f", limit of the {by.set_by} {by.amount} per {by.per}, used {by.used} of it, until {by.ends_at.isoformat()}"
        )
    if answer.cap is None:
        return text
    return f"{text}, cap {answer.cap}, used {answer.cap_used} of it, pending {answer.cap_pending} of it"
