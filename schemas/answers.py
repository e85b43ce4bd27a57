"""What the pre-flight calls answer. Frozen; every refusal says why, every amount is in whole units of its meter."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class Reason(StrEnum):
    """Why a check, hold or charge came out as it did."""

    WITHIN_LIMIT = "within_limit"
    UNLIMITED = "unlimited"
    LIMIT_EXCEEDED = "limit_exceeded"
    BACKEND_CAP_EXCEEDED = "backend_cap_exceeded"
    METER_NOT_IN_PLAN = "meter_not_in_plan"
    UNKNOWN_ACCOUNT = "unknown_account"
    BILLING_DISABLED = "billing_disabled"
    REDIS_DOWN_DENIED = "redis_down_denied"
    REDIS_DOWN_ALLOWED = "redis_down_allowed"
    REDIS_DOWN_BOUND_REACHED = "redis_down_bound_reached"


class HoldState(StrEnum):
    """Where a hold stands. `unknown`: never seen, or its outcome is older than the time outcomes are remembered."""

    HELD = "held"
    SETTLED = "settled"
    RELEASED = "released"
    EXPIRED = "expired"
    UNKNOWN = "unknown"


class Answer(BaseModel):
    """Base of all answers: immutable, and only the fields it names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Parts(Answer):
    """What each bucket pays; the five sum to the amount."""

    from_subscription: int = 0
    from_rollover: int = 0
    from_purchased: int = 0
    overflow_to_debt: int = 0
    uncollected: int = 0


class CheckAnswer(Answer):
    """May this user spend `requested` units now? `available` and `limit` are None where usage is unlimited.

    `kind` is the cadence of the allowance, or `unlimited`; None where there is none. `cap` is the sub-cap in force for
    the `backend` that was asked about, None where there is none; `available` is then what both leave.
    """

    user_id: str
    meter: str
    requested: int
    allowed: bool
    reason: Reason
    available: int | None = None
    pending: int = 0
    limit: int | None = None
    used: int = 0
    rollover: int = 0
    purchased: int = 0
    kind: str | None = None
    backend: str | None = None
    cap: int | None = None
    cap_used: int = 0
    cap_pending: int = 0


class BackendRemaining(Answer):
    """What is left of the sub-cap of one backend; `remaining` is `cap` − `used` − `pending`, at least 0."""

    backend: str
    cap: int
    used: int
    pending: int
    remaining: int


class Remaining(Answer):
    """What is left to a user on one meter. `limit` and `remaining` are None where usage is unlimited.

    `kind` is the cadence of the allowance (`lifetime`, `monthly`, …), or `unlimited`; None where there is none.
    `backends` are those with a sub-cap in force.
    """

    user_id: str
    meter: str
    kind: str | None
    limit: int | None
    used: int
    pending: int
    remaining: int | None
    backends: tuple[BackendRemaining, ...] = ()


class RoutingAnswer(Answer):
    """Which backend to use, or why there is none; and what was left when this was decided, None = unlimited."""

    user_id: str
    meter: str
    preference: str
    allowed: bool
    backend: str | None
    reason: str | None
    remaining: int | None
    sub_remaining: int | None


class HoldAnswer(Answer):
    """One hold: `amount` was set aside at first, `left` of it is still held until `expires_at`.

    `backend` is the one it was asked for, where a reserve named one.
    """

    user_id: str
    meter: str
    key: str
    state: HoldState
    amount: int
    left: int
    expires_at: datetime | None = None
    backend: str | None = None


class EventAnswer(Answer):
    """An event that Redis has confirmed. `hold` is the state of the hold before this call, where there was one.

    A repeat gets the first answer with `repeated` set; nothing is recorded twice.
    """

    user_id: str
    meter: str
    event_id: str
    amount: int
    hold: HoldState | None = None
    repeated: bool = False


class ChargeAnswer(EventAnswer):
    """A charge that was allowed, and the buckets expected to pay; `explain` has the final word."""

    expected: Parts
