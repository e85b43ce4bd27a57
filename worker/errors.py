"""Errors of the pre-flight calls, and the base of everything that is the caller's mistake.

Each message says what happened and to whom.

BadInput                     what was asked can never be done as asked; commands exit with 2
BillingError
├── InvalidRequest           an argument that could never be right (also BadInput)
├── PartitionMismatch        this process and Redis disagree on their number (also BadInput)
├── UsageDenied              the check said no; `answer` says why
│   └── UsageLimitExceeded   … because the amount does not fit
├── HoldConflict             this key already holds another amount, meter or backend
├── HoldClosed               this key was settled, released, or has expired
├── EventConflict            this event id was used for another amount or meter
├── RedisUnavailable         Redis did not confirm; `events` are the events that may not have arrived
├── SpoolUnavailable         the spool on this machine's disk could not be read or written
└── LedgerUnavailable        Postgres was needed and did not answer
Rejected                     an entry of a stream is to become a dead letter; nobody but its judge sees this
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # version and help are shown without pydantic
    from schemas.answers import CheckAnswer, HoldState
    from schemas.events import Refusal, UsageEvent


class BadInput(ValueError):
    """What was asked can never be done as asked; the message names the field and what is allowed."""


class Rejected(Exception):
    """An entry of a stream is refused. Carries the reason and a sentence for the operator."""

    def __init__(self, reason: Refusal, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class BillingError(Exception):
    """Base of all errors of the pre-flight calls."""


class InvalidRequest(BillingError, BadInput):
    """An argument is malformed; nothing was sent."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: must be {allowed} (got {_shown(value)})")
        self.field = field


class PartitionMismatch(BillingError, BadInput):
    """This process would put a user's events into another stream than the others do."""

    def __init__(self, written: int, wanted: int) -> None:
        super().__init__(f"METERFALL_PARTITIONS: this Redis has {written} partitions, not {wanted}")


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
    """The amount does not fit into what is left."""


class HoldConflict(BillingError):
    """The key is taken by a hold of another amount or meter, or one that counts against another backend's cap."""

    def __init__(self, user_id: str, key: str, meter: str, amount: int, backend: str | None = None) -> None:
        super().__init__(f"hold {key} of {user_id} already holds {amount} of {_named(meter, backend)}")
        self.user_id, self.key, self.meter, self.amount, self.backend = user_id, key, meter, amount, backend


class HoldClosed(BillingError):
    """The hold is over; take another key for other work."""

    def __init__(self, user_id: str, key: str, state: HoldState) -> None:
        super().__init__(f"hold {key} of {user_id} is {state.value}")
        self.user_id, self.key, self.state = user_id, key, state


class EventConflict(BillingError):
    """The event id stands for something else already; the first stands."""

    def __init__(self, user_id: str, event_id: str, amount: int) -> None:
        super().__init__(f"event {event_id} of {user_id} was already sent with amount {amount}")
        self.user_id, self.event_id, self.amount = user_id, event_id, amount


class RedisUnavailable(BillingError):
    """Redis did not confirm in time. Sending `events` again is safe: identity decides.

    `captured_from` is the hold that the event was to be a part of, where it was captured.
    """

    def __init__(self, reason: str, events: Sequence[UsageEvent] = (), captured_from: str | None = None) -> None:
        unsent = f"; {len(events)} event(s) may be unsent" if events else ""
        super().__init__(f"Redis did not confirm ({reason}){unsent}")
        self.events = tuple(events)
        self.captured_from = captured_from


class SpoolUnavailable(BillingError):
    """The spool could not be read or written; what is in it stays there."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"the spool {path} cannot be used: {reason}")


class LedgerUnavailable(BillingError):
    """Postgres was needed for an answer and could not give it."""


def _shown(value: object) -> str:
    """A bad value as a message may quote it, cut short."""
    try:
        return repr(str(value)[:64])
    except ValueError:  # Python writes out no number that is longer than some thousand digits
        return "a number of too many digits"


def _named(meter: str, backend: str | None) -> str:
    return f"{meter} on {backend}" if backend is not None else meter


def _figures(answer: CheckAnswer) -> str:
    limit = "none" if answer.limit is None else answer.limit
    text = f"available {answer.available}, limit {limit}, used {answer.used}, pending {answer.pending}"
    if answer.cap is None:
        return text
    return f"{text}, cap {answer.cap}, used {answer.cap_used} of it, pending {answer.cap_pending} of it"
