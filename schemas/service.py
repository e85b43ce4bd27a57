"""What the HTTP service answers beside the answers of the calls: problems, batches, accounts and their changes."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from schemas.answers import Answer, EventAnswer


class ProblemMistake(Answer):
    """One mistake in a request; `index` is the place of an event in its batch, from 0."""

    field: str | None = None
    index: int | None = None
    detail: str


class Problem(BaseModel):
    """A problem document (RFC 9457). A denial has the figures of the check beside these members."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str = Field(description="a URN that names the kind of the problem")
    title: str
    status: int
    detail: str
    reason: str | None = Field(None, description="the reason code of a denial or of a refused key")
    field: str | None = Field(None, description="the first field that is wrong")
    index: int | None = Field(None, description="the place of the first wrong event in its batch, from 0")
    errors: tuple[ProblemMistake, ...] = Field((), description="the mistakes, at most 20")
    unconfirmed: tuple[str, ...] = Field((), description="ids of events to send again; a repeat is harmless")


class EventsAnswer(Answer):
    """The events of a batch, in its order: Redis has confirmed all of them, or the spool has them."""

    events: tuple[EventAnswer, ...]


class MeterState(Answer):
    """One meter of an account as it is stored: its allowance, None if unlimited, and the units in its buckets."""

    meter: str
    limit: int | None
    used: int
    rollover: int
    purchased: int
    cadence: str
    period_start: datetime
    period_end: datetime | None


class AccountState(Answer):
    """An account at `version`; events that wait are not in it. `next_plan` and `next_status` are scheduled."""

    user_id: str
    plan: str
    status: str
    trust: str
    version: int
    next_plan: str | None
    next_status: str | None
    meters: tuple[MeterState, ...]


class AccountChange(Answer):
    """The outcome of a change, and the account after it.

    `repeated`: an earlier call did it. `stale`: it came too late to change anything. `waits_until`: it takes effect at
    that moment; `waits_for_events`: after older events of the account. `taken` units were taken back, `debt` of them
    became debt; `gone` are in no balance, as their grants have ended. `forgiven` units of debt were forgiven. `owes`
    is debt that a grant did not pay; `missing` the units short before anything is available.
    """

    account: AccountState
    repeated: bool
    stale: bool
    debt: int
    taken: int
    forgiven: int
    gone: int
    owes: int
    missing: int
    waits_until: datetime | None
    waits_for_events: bool


class ClosedAccount(Answer):
    """A closed account: its history is kept under `name`, which tells nobody who it was."""

    name: str


class PlanMeter(Answer):
    """What a plan grants of a meter: `quantity` units, None if unlimited. A meter with a `wallet` draws on that."""

    meter: str
    quantity: int | None
    cadence: str | None
    rollover_cap: int
    wallet: str | None
    price: str | None


class PlanOffer(Answer):
    """An active plan of the catalogue that this process carries."""

    plan: str
    name: str
    tier: int
    price_month_cents: int
    price_year_cents: int
    trial_days: int
    meters: tuple[PlanMeter, ...]


class Plans(Answer):
    """The active plans."""

    plans: tuple[PlanOffer, ...]


class Live(Answer):
    """The process answers."""

    live: bool


class Ready(Answer):
    """The verdict of the health check, and its findings by name."""

    severity: str
    failed: dict[str, str]
