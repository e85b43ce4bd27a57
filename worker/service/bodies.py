"""The bodies of requests. Strict: a number in quotes is refused, and so is a field that nobody knows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from schemas.answers import PayFrom
from schemas.codes import TrustTier
from schemas.events import MULTIPLIER_PATTERN, TIME_ALLOWED, TIME_PATTERN, Amount, Identifier, MeterCode, Scalar

_is_time = re.compile(TIME_PATTERN).fullmatch


def _as_written(value: Any) -> Any:
    """Take a time as RFC 3339 has it, and nothing else."""
    if isinstance(value, datetime) or (isinstance(value, str) and _is_time(value)):
        return value
    raise ValueError(f"must be {TIME_ALLOWED}")


Moment = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_as_written)]
Text = Annotated[str, StringConstraints(max_length=256)]
Code = Annotated[str, StringConstraints(max_length=64)]
TtlSeconds = Annotated[int, Field(ge=1, le=604_800, description="life of the hold, in seconds")]
Dimensions = Annotated[
    dict[str, Scalar], Field(max_length=32, description="flat facts for reports, at most 2 KiB as JSON")
]
KEY = "the key of a hold; Idempotency-Key names it as well"
REASON = "reason for the change; the timeline shows it"


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class CheckBody(Body):
    """May this user spend `amount` units now?"""

    user_id: Identifier
    meter: MeterCode
    amount: Amount = 1
    backend: Code | None = None
    pay_from: PayFrom | None = None


class EstimateBody(Body):
    """What would `quantity` units cost, and who would pay?"""

    user_id: Identifier
    meter: MeterCode
    quantity: Amount
    model_slug: Text | None = None
    multiplier: Annotated[str, StringConstraints(pattern=MULTIPLIER_PATTERN)] | None = None
    backend: Code | None = None
    pay_from: PayFrom | None = None


class PlanBackendBody(Body):
    """Which backend should do a request?"""

    user_id: Identifier
    preference: Code
    has_hardware: bool
    meter: MeterCode | None = None


class _Units(Body):
    """Units of a piece of work: an amount, or a quantity before the multiplier."""

    quantity: Amount | None = Field(None, description="units before the multiplier; instead of the amount")
    model_slug: Text | None = Field(None, description="model that does the work; its multiplier counts")
    multiplier: Annotated[str, StringConstraints(pattern=MULTIPLIER_PATTERN)] | None = None
    backend: Code | None = None


class ReserveBody(_Units):
    """Set units aside under a key."""

    user_id: Identifier
    meter: MeterCode
    amount: Amount | None = None
    key: Identifier | None = Field(None, description=KEY)
    ttl_seconds: TtlSeconds | None = None
    pay_from: PayFrom | None = None


class _Work(_Units):
    """A piece of work that was done."""

    user_id: Identifier
    meter: MeterCode
    source: Text | None = None
    reference_id: Text | None = None
    dimensions: Dimensions | None = None

    def facts(self) -> dict[str, Any]:
        """Return what the calls that record take by name."""
        names = ("quantity", "model_slug", "multiplier", "backend", "source", "reference_id", "dimensions")
        return {name: getattr(self, name) for name in names}


class CaptureBody(_Work):
    """A part of a hold becomes an event; the rest stays held."""

    key: Identifier = Field(description="the key of the hold")
    event_id: Identifier | None = Field(None, description="id of the event; Idempotency-Key names it as well")
    amount: Amount | None = None


class SettleBody(_Work):
    """A hold becomes one event; the rest is free again."""

    key: Identifier | None = Field(None, description=KEY)
    actual: Amount | None = Field(None, description="units that the work cost, after the multiplier")
    event_id: Identifier | None = Field(None, description="id of the event; by default the key of the hold")


class ReleaseBody(Body):
    """Give a hold back."""

    user_id: Identifier
    meter: MeterCode
    key: Identifier | None = Field(None, description=KEY)


class ExtendBody(Body):
    """Prolong a hold, or hold another amount."""

    user_id: Identifier
    meter: MeterCode
    key: Identifier | None = Field(None, description=KEY)
    ttl_seconds: TtlSeconds | None = None
    amount: Amount | None = None


class ChargeBody(_Work):
    """Check, and record, in one step."""

    amount: Amount | None = None
    event_id: Identifier | None = Field(None, description="id of the event; Idempotency-Key names it as well")
    pay_from: PayFrom | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The sponsorship pool


class DecideBody(Body):
    """Does the pool cover a request?"""

    user_id: Identifier | None = Field(None, description="nobody: the pool covers nothing")
    estimate: Amount
    request_id: Identifier | None = Field(None, description="id of the request; Idempotency-Key names it as well")
    ttl_seconds: TtlSeconds | None = None


class ConfirmBody(DecideBody):
    """The user paid a part: hold what the pool covers of the rest."""

    paid: Amount


class SettleSponsoredBody(Body):
    """A sponsored request cost `actual` units."""

    user_id: Identifier
    request_id: Identifier | None = None
    actual: Amount
    paid: Amount | None = None


class ReleaseSponsoredBody(Body):
    """There was no such work."""

    user_id: Identifier
    request_id: Identifier | None = None
    reason: Text


class CreditPoolBody(Body):
    """A payment without the pool: a share of it flows into the pool."""

    request_id: Identifier | None = None
    paid: Amount


# ---------------------------------------------------------------------------------------------------------------------
# Accounts


class ChangeBody(Body):
    """A change of an account. The name of the API key is kept as its actor."""

    user_id: Identifier
    reason: Text | None = Field(None, description=REASON)


class OpenBody(ChangeBody):
    """Open an account."""

    plan: Code
    status: Code = "active"
    period_start: Moment | None = None
    period_end: Moment | None = None
    rollover: Mapping[str, int] | None = None
    timezone: Code | None = None


class GrantBody(ChangeBody):
    """Grant purchased units."""

    meter: MeterCode
    amount: Amount
    key: Identifier | None = Field(None, description="the paid order; Idempotency-Key names it as well")
    category: Code = "paid"
    priority: int = 50
    effective_at: Moment | None = None
    expires_at: Moment | None = None
    open_plan: Code | None = None


class ClawBackBody(ChangeBody):
    """Take purchased units back, as after a refund."""

    meter: MeterCode
    amount: Amount | None = None
    key: Identifier | None = Field(None, description="id of the refund; Idempotency-Key names it as well")
    order: Identifier | None = None
    total_refunded: Amount | None = None


class ReverseBody(ChangeBody):
    """Put the units of an event back."""

    event_id: Identifier


class RenewBody(ChangeBody):
    """An invoice paid a period."""

    invoice_id: Identifier | None = Field(None, description="Idempotency-Key names it as well")
    period_start: Moment
    period_end: Moment


class ChangePlanBody(ChangeBody):
    """Put the account on another plan."""

    plan: Code
    at: Literal["now", "period_end"] | Moment = "now"
    period_end: Moment | None = None


class SetStatusBody(ChangeBody):
    """Set the status of an account."""

    status: Code
    at: Literal["now", "period_end"] | Moment = "now"


class SetLimitBody(ChangeBody):
    """Limit what an account spends of a meter; an amount of null takes the limit away."""

    meter: MeterCode
    per: Literal["day", "week", "month"]
    amount: Amount | None
    of: Literal["operator", "user"] = "operator"
    key: Identifier | None = Field(None, description="Idempotency-Key names it as well")


class ForgiveDebtBody(ChangeBody):
    """Forgive debt of an account on a meter, by default all of it."""

    meter: MeterCode
    amount: Amount | None = None
    key: Identifier | None = Field(None, description="Idempotency-Key names it as well")


class SetTrustBody(ChangeBody):
    """Put an account into a trust tier of the sponsorship pool."""

    trust: TrustTier


class CloseBody(ChangeBody):
    """Close an account and erase the person. This cannot be undone."""

    forfeit: bool = Field(False, description="lose purchased units, rollover, open holds and unread events")
