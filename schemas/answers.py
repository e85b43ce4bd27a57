"""The answers of the pre-flight calls. Frozen; every refusal gives its reason, amounts are whole units of the meter."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Reason(StrEnum):
    """The reason for the outcome of a check, hold or charge."""

    WITHIN_LIMIT = "within_limit"
    UNLIMITED = "unlimited"
    LIMIT_EXCEEDED = "limit_exceeded"
    SPENDING_LIMIT_REACHED = "spending_limit_reached"
    BACKEND_CAP_EXCEEDED = "backend_cap_exceeded"
    METER_CAP_EXCEEDED = "meter_cap_exceeded"
    METER_NOT_IN_PLAN = "meter_not_in_plan"
    RENEWAL_MISSING = "renewal_missing"
    UNKNOWN_ACCOUNT = "unknown_account"
    SUSPENDED = "suspended"
    BILLING_DISABLED = "billing_disabled"
    REDIS_DOWN_DENIED = "redis_down_denied"
    REDIS_DOWN_ALLOWED = "redis_down_allowed"
    REDIS_DOWN_BOUND_REACHED = "redis_down_bound_reached"


class HoldState(StrEnum):
    """The state of a hold. `unknown`: Redis never saw it, or has forgotten its outcome."""

    HELD = "held"
    SETTLED = "settled"
    RELEASED = "released"
    EXPIRED = "expired"
    UNKNOWN = "unknown"


class Answer(BaseModel):
    """Base of all answers: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Parts(Answer):
    """The units that each bucket pays. The five parts sum to the amount."""

    from_subscription: int = 0
    from_rollover: int = 0
    from_purchased: int = 0
    overflow_to_debt: int = 0
    uncollected: int = 0


# What checks count: the allowance with its rollover, or purchased credits also.
PayFrom = Literal["allowance"]


class LimitReached(Answer):
    """The limit that denied: `amount` units per day, week or month, `used` of them in the window until `ends_at`.

    `set_by` is the plan, an operator or the user. Of several limits it is the one that ends last.
    """

    per: Literal["day", "week", "month"]
    set_by: Literal["plan", "operator", "user"]
    amount: int
    used: int
    ends_at: datetime


class CheckAnswer(Answer):
    """May this user spend `requested` units now? `available` and `limit` are None if usage is unlimited.

    `kind` is the cadence of the allowance, or `unlimited`; None without an allowance. `cap` is the sub-cap in force
    for the requested `backend`, None without one; `available` respects the limit, the cap and all limits per day, week
    and month. `limited_by` is the one of these that denied. With `pay_from` `allowance`, `purchased` does not count.
    Of a meter that draws on a `wallet`, `requested` and `available` are units of the meter; limit, used, rollover,
    purchased, pending, cap and `limited_by` are the wallet's, in its units, and so is `cost`, what the request costs at
    its `price`.
    `explanation` is the answer in words; only the command asks for it.
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
    pay_from: PayFrom | None = None
    limited_by: LimitReached | None = None
    wallet: str | None = None
    price: str | None = None
    cost: int | None = None
    explanation: str | None = None


class BackendRemaining(Answer):
    """The rest of a backend's sub-cap. `remaining` is `cap` − `used` − `pending`, at least 0."""

    backend: str
    cap: int
    used: int
    pending: int
    remaining: int


class Remaining(Answer):
    """The units left to a user on one meter. `limit` and `remaining` are None if usage is unlimited.

    `kind` is the cadence of the allowance (`lifetime`, `monthly`, …), or `unlimited`; None without an allowance.
    `remaining` respects all limits per day, week and month, and what the account pays from. `backends` lists each
    backend with a sub-cap in force. Of a meter that draws on a `wallet`, at `price` a unit, `remaining` is in units of
    the meter, and limit, used and pending are the wallet's.
    """

    user_id: str
    meter: str
    kind: str | None
    limit: int | None
    used: int
    pending: int
    remaining: int | None
    backends: tuple[BackendRemaining, ...] = ()
    wallet: str | None = None
    price: str | None = None


class RoutingAnswer(Answer):
    """The backend to use, or the reason for none, and the units left at that moment; None = unlimited."""

    user_id: str
    meter: str
    preference: str
    allowed: bool
    backend: str | None
    reason: str | None
    remaining: int | None
    sub_remaining: int | None


class HoldAnswer(Answer):
    """One hold: it began with `amount`, and `left` of it is still held until `expires_at`.

    Of a quantity whose multiplier leaves a fraction, the hold takes the next whole unit.
    `backend` is the one that the reserve named, if it named one. `multiplier` made the amount, if the reserve named a
    quantity. `spooled`: the release waits on the caller's disk until Redis takes it, and the state of the hold is not
    known yet.
    """

    user_id: str
    meter: str
    key: str
    state: HoldState
    amount: int
    left: int
    expires_at: datetime | None = None
    backend: str | None = None
    multiplier: str | None = None
    spooled: bool = False


class EventAnswer(Answer):
    """An event that Redis has confirmed. `hold` is the state of its hold before this call, if it had one.

    `amount` is in whole units. If a multiplier leaves a fraction, the event may cost one unit more, with the fractions
    of earlier events; `explain` has the final word.
    A repeat gets the first answer with `repeated` set; nothing is recorded twice. `spooled`: Redis has not confirmed
    the event. It is on the caller's disk, later calls send it, and the state of its hold is not known yet.
    """

    user_id: str
    meter: str
    event_id: str
    amount: int
    hold: HoldState | None = None
    repeated: bool = False
    spooled: bool = False


class ChargeAnswer(EventAnswer):
    """An allowed charge, and the buckets expected to pay; `explain` has the final word.

    If the meter draws on a `wallet`, they are the wallet's, and so is the unit of `expected`.
    """

    expected: Parts
    wallet: str | None = None


class Serve(StrEnum):
    """The part of a request that the pool covers: all of it, some, or none."""

    FREE = "free"
    PARTIAL = "partial"
    GATE = "gate"


class SponsorReason(StrEnum):
    """The reason for the part that the pool covers."""

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
    """The part of an `estimate` that the sponsorship pool covers: `absorb`. The user pays `charge`.

    `tier` and `daily_budget` are in force for the user. Before this answer, `absorbed_today` was absorbed or held in
    the open window, and `pool` was available. None and 0 if no call asked the pool.
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
    """A decision about one request. The pool holds `absorb` until `expires_at`; if that is None, it holds nothing.

    The user paid `paid` before. `outstanding` is still uncovered: `charge` less `paid`, at least 0.
    A repeat gets the first answer with `repeated` set; nothing is held twice.
    """

    request_id: str
    paid: int = 0
    outstanding: int
    expires_at: datetime | None = None
    repeated: bool = False


class SettlementAnswer(Answer):
    """A settled sponsored request. It cost `actual`; the user paid `paid`, the pool pays `absorbed`.

    Of `held` units, `returned` stay in the pool. The service bears `uncovered`. `credited` flows back into the
    pool as a share of `paid`. `late`: the hold had expired, and the pool paid the units that it still allowed.
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
    """A sponsored hold: it began with `amount`, `left` is still held. A release answers the `state` before it."""

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
    """The cost of `quantity` units: `amount` after the multiplier, by the balance and the pool at this moment.

    `check` is the answer of a check of the amount; `allowed` is its verdict: the account's own buckets have room.
    `expected` lists the buckets that would pay without the pool; None if no balance was read. If the meter draws on a
    wallet, they are the wallet's, as `check` says; `cost` is the amount in its units, and the pool covers these.
    `sponsorship` is the part that the pool would cover; `allowed_with_pool`: the rest fits into the buckets.
    """

    user_id: str
    meter: str
    quantity: int
    multiplier: str
    amount: int
    cost: int | None = None
    allowed: bool
    allowed_with_pool: bool
    check: CheckAnswer
    expected: Parts | None
    sponsorship: SponsorAdvice
