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
    `explanation` says it in words, where somebody asked for them: the command does.
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
    explanation: str | None = None


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

    `backend` is the one it was asked for, where a reserve named one. `spooled`: it is to be given back as soon as Redis
    takes it, and its state is not known yet.
    """

    user_id: str
    meter: str
    key: str
    state: HoldState
    amount: int
    left: int
    expires_at: datetime | None = None
    backend: str | None = None
    spooled: bool = False


class EventAnswer(Answer):
    """An event that Redis has confirmed. `hold` is the state of the hold before this call, where there was one.

    A repeat gets the first answer with `repeated` set; nothing is recorded twice. `spooled`: Redis has not confirmed
    it, but it is on the disk of the caller's machine, and is sent from there; what became of its hold is not known yet.
    """

    user_id: str
    meter: str
    event_id: str
    amount: int
    hold: HoldState | None = None
    repeated: bool = False
    spooled: bool = False


class ChargeAnswer(EventAnswer):
    """A charge that was allowed, and the buckets expected to pay; `explain` has the final word."""

    expected: Parts


class Serve(StrEnum):
    """How a request is served: the pool covers all of it, a part, or nothing."""

    FREE = "free"
    PARTIAL = "partial"
    GATE = "gate"


class SponsorReason(StrEnum):
    """Why the pool covers what it covers."""

    WITHIN_BUDGET = "within_budget"
    BUDGET_SHORT = "budget_short"
    POOL_SHORT = "pool_short"
    NO_BUDGET = "no_budget"
    BUDGET_SPENT = "budget_spent"
    POOL_EMPTY = "pool_empty"
    NO_IDENTITY = "no_identity"
    NOTHING_TO_COVER = "nothing_to_cover"
    POOL_UNAVAILABLE = "pool_unavailable"


class SponsorAdvice(Answer):
    """What the sponsorship pool covers of an `estimate`: `absorb`, and `charge` is left to the user.

    `tier` and `daily_budget` are in force for the user; `absorbed_today` was absorbed or held in the open window, and
    `pool` was left, before this. None and 0 where the pool was not asked.
    """

    user_id: str | None
    estimate: int
    serve: Serve
    absorb: int
    charge: int
    reason: SponsorReason
    tier: str | None = None
    daily_budget: int = 0
    absorbed_today: int = 0
    pool: int = 0


class SponsorAnswer(SponsorAdvice):
    """A decision about one request. The pool holds `absorb` until `expires_at`; where that is None, it holds nothing.

    `paid` was paid by the user before, `outstanding` is what nobody covers yet: `charge` less `paid`, at least 0.
    A repeat gets the first answer with `repeated` set; nothing is held twice.
    """

    request_id: str
    paid: int = 0
    outstanding: int
    expires_at: datetime | None = None
    repeated: bool = False


class SettlementAnswer(Answer):
    """A sponsored request in the end. It cost `actual`; the user paid `paid`, the pool pays `absorbed`.

    `returned` of what was `held` stays in the pool, `uncovered` is left to whoever did the work, `credited` flows back
    into the pool as a share of `paid`. `late`: the hold had expired, and what was still allowed was taken anew.
    A repeat gets the first answer with `repeated` set; nothing is recorded twice.
    """

    user_id: str
    request_id: str
    held: int
    actual: int
    paid: int
    absorbed: int
    returned: int
    uncovered: int
    credited: int
    late: bool = False
    repeated: bool = False


class SponsorHoldAnswer(Answer):
    """A sponsored hold: `amount` was held at first, `left` of it is still held. A release tells the `state` before."""

    user_id: str
    request_id: str
    state: HoldState
    amount: int
    left: int


class CreditAnswer(Answer):
    """A payment whose share (`credited`) flows into the pool, once for a request. `spooled`: as for an event."""

    request_id: str
    paid: int
    credited: int
    spooled: bool = False


class EstimateAnswer(Answer):
    """What `quantity` units would cost: `amount` after the multiplier, by the balance and the pool at this moment.

    `check` is what a check of the amount answers, and `allowed` its verdict: the account's own buckets have room.
    `expected` are the buckets that would pay if the pool did not help; None where no balance was looked at.
    `sponsorship` is what the pool would cover; `allowed_with_pool`: what it leaves to charge fits.
    """

    user_id: str
    meter: str
    quantity: int
    multiplier: str
    amount: int
    allowed: bool
    allowed_with_pool: bool
    check: CheckAnswer
    expected: Parts | None
    sponsorship: SponsorAdvice
