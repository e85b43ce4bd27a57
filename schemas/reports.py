"""The answers of the reports. Frozen; amounts are whole units of the meter, times UTC. None as a limit: unlimited."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from schemas.answers import Answer, Parts, PayFrom
from schemas.events import Scalar


class MeterUsage(Answer):
    """One meter of an account. A check would find `available`; holds and events not applied yet take `pending`.

    `caps` are sub-caps by backend, `cap_used` the units that the period used of them. `backing` says who vouches for a
    period that the payment provider renews: `none`, `trial`, `bounds` (it named them), `invoice`, `grace` (the invoice
    is late), `missing` (it is too late, and the limit is 0); it is None for other periods.

    `pending` is None while Redis does not answer; `available` then comes from the ledger alone.

    A meter that draws on a `wallet` at `price` a unit shows limit, buckets, pending and period of the wallet, in its
    units. `available` and `quantity`, the usage of the period before the multiplier, are in units of the meter;
    `wallet_used` is that usage in units of the wallet. `caps` and `cap_used` of a wallet are by meter.
    """

    meter: str
    unit: str
    limit: int | None
    used: int
    rollover: int
    purchased: int
    pending: int | None
    available: int | None
    cadence: str
    period_start: datetime
    period_end: datetime | None
    backing: str | None
    caps: dict[str, int]
    cap_used: dict[str, int]
    wallet: str | None = None
    price: str | None = None
    quantity: int | None = None
    wallet_used: int | None = None


class WaitingChange(Answer):
    """A change that was accepted and takes effect at `at`: an invoice, a plan, a status or a period, and its bounds."""

    kind: str
    at: datetime
    name: str
    period_start: datetime | None
    period_end: datetime | None


class UsageSummary(Answer):
    """An account and its meters, with every boundary applied that is due at `at`.

    `next_plan` takes effect at `plan_change_at`, or with the next renewal if that is None; `next_status` takes effect
    at `status_change_at`. `highest_tier` is the rank of the highest plan that the account ever had. The last invoice
    paid the time from `paid_from` to `paid_until`. `waiting` are changes that take effect later. With `pay_from`
    `allowance`, checks count no purchased units.
    """

    user_id: str
    plan: str
    plan_name: str
    tier: int | None
    status: str
    trust: str
    version: int
    highest_tier: int
    next_plan: str | None
    plan_change_at: datetime | None
    next_status: str | None
    status_change_at: datetime | None
    paid_from: datetime | None
    paid_until: datetime | None
    waiting: tuple[WaitingChange, ...]
    timezone: str | None
    pay_from: PayFrom | None
    at: datetime
    meters: tuple[MeterUsage, ...]


class PeriodUsage(Answer):
    """All events of a meter in its open period. No figure of any report counts reversed events.

    `meter@wallet` is a meter that draws on a wallet: `amount` is in units of the wallet. `quantity` is in units of the
    meter, before the multiplier. The lists per voice and document name meters likewise.
    """

    meter: str
    unit: str
    period_start: datetime
    period_end: datetime | None
    events: int
    quantity: int
    amount: int


class VoiceUsage(Answer):
    """The usage of one voice and model; `quantity` is before the multiplier. Both are "" for events without them."""

    meter: str
    voice: str
    model: str
    events: int
    quantity: int
    amount: int
    duration_ms: int


class DocumentUsage(Answer):
    """The usage of one document; `pages` counts the distinct pages billed in the period, reversed or not."""

    meter: str
    document_id: str
    events: int
    amount: int
    pages: int


class Breakdown(Answer):
    """The open periods of an account. More documents follow `more_documents_after`; None: there are no more."""

    user_id: str
    at: datetime
    periods: tuple[PeriodUsage, ...]
    voices: tuple[VoiceUsage, ...]
    documents: tuple[DocumentUsage, ...]
    more_documents_after: str | None


class VoiceMonth(Answer):
    """One voice with one model in one month (`2026-11`, UTC, by the time of the work)."""

    month: str
    voice: str
    model: str
    characters: int
    duration_ms: int
    syntheses: int


class Engagement(Answer):
    """The whole life of an account. A synthesis is an event that names a voice or counts characters."""

    user_id: str
    characters: int
    duration_ms: int
    syntheses: int
    documents: int
    pages: int
    months: tuple[VoiceMonth, ...]


class BucketUnits(Answer):
    """The three buckets of a meter, or the units by which a change moved them."""

    used: int
    rollover: int
    purchased: int


class Change(Answer):
    """One change of an account. `what`: the id of an event, which has parts, or the key of a ledger entry.

    Of an event of a meter that draws on a `wallet`, amount and parts are in units of that.

    `actor` and `reason` tell who made it and why. The system's own changes, such as refills, have neither.
    """

    seq: int
    at: datetime
    kind: str
    meter: str
    what: str
    amount: int | None = None
    parts: Parts | None = None
    wallet: str | None = None
    changes: BucketUnits | None = None
    after: BucketUnits | None = None
    detail: dict[str, object] | None = None
    actor: str | None = None
    reason: str | None = None


class Timeline(Answer):
    """Changes of an account, newest first. Older ones go on before `more_before_seq`; None: there are none."""

    user_id: str
    changes: tuple[Change, ...]
    more_before_seq: int | None


class RecordedEvent(Answer):
    """One event of an account as it was recorded, and the units that each bucket paid.

    If its meter draws on a `wallet`, amount and parts are in units of that, at `price` for each unit of the meter.
    """

    seq: int
    event_id: str
    meter: str
    unit: str
    quantity: int
    multiplier: str
    amount: int
    wallet: str | None = None
    price: str | None = None
    parts: Parts
    period_start: datetime
    occurred_at: datetime
    applied_at: datetime
    clamped: bool
    source: str | None
    reference_id: str | None
    hold_key: str | None
    dimensions: dict[str, Scalar] | None
    reversed_at: datetime | None


class EventPage(Answer):
    """Events of an account, newest first. Older ones go on before `more_before_seq`; None: there are none."""

    user_id: str
    events: tuple[RecordedEvent, ...]
    more_before_seq: int | None


class EventState(StrEnum):
    """The state of an event."""

    APPLIED = "applied"
    REVERSED = "reversed"
    UNCOLLECTED = "uncollected"
    DEAD_LETTER = "dead_letter"


class RefusedEvent(Answer):
    """A dead letter that names the event."""

    dead_letter: int
    reason: str
    detail: str
    state: str
    created_at: datetime


class GrantPart(Answer):
    """Units that an event took of one grant. `order` is None for credit that belongs to no order."""

    order: str | None
    units: int
    category: str
    priority: int
    expires_at: datetime | None


class Explanation(Answer):
    """The units that each bucket paid for an event, and the reasons, as figures and as sentences.

    `limit` is the allowance in force at that time, None if usage was unlimited. A dead letter has no figures.
    If the multiplier leaves a fraction of a unit, `carried_before` is the fraction that earlier events left over, and
    `carried_after` the fraction that this event left, as decimal text.
    `grants` are those that the purchased units came from, in the order in which they pay. It is empty if no order gave
    them, or if an earlier release applied the event. `gone` are units of a reversed event that returned to a grant
    which had ended, by order: no balance has them.
    If the meter draws on a `wallet`, at `price` for each unit, everything after `price` is about the wallet, in its
    unit, and so are `amount`, `limit` and the fractions.
    `trace_id` names the trace of the producer's request, if the event travelled with one.
    `delivered_again` counts deliveries that came after Redis had forgotten the outcome; none of them was billed.
    """

    user_id: str
    event_id: str
    state: EventState
    sentences: tuple[str, ...]
    seq: int | None = None
    meter: str | None = None
    unit: str | None = None
    quantity: int | None = None
    multiplier: str | None = None
    amount: int | None = None
    wallet: str | None = None
    price: str | None = None
    wallet_unit: str | None = None
    carried_before: str | None = None
    carried_after: str | None = None
    parts: Parts | None = None
    grants: tuple[GrantPart, ...] = ()
    plan: str | None = None
    status: str | None = None
    unlimited: bool | None = None
    spill: bool | None = None
    limit: int | None = None
    before: BucketUnits | None = None
    after: BucketUnits | None = None
    period_start: datetime | None = None
    occurred_at: datetime | None = None
    applied_at: datetime | None = None
    late: bool | None = None
    clamped: bool | None = None
    reversed_at: datetime | None = None
    reversed_by: str | None = None
    reversed_reason: str | None = None
    gone: dict[str, int] = Field(default_factory=dict)
    source: str | None = None
    reference_id: str | None = None
    dimensions: dict[str, Scalar] | None = None
    trace_id: str | None = None
    refusals: tuple[RefusedEvent, ...] = ()
    delivered_again: int = 0
    delivered_again_at: datetime | None = None


class CreditUse(Answer):
    """An event that took units of a grant."""

    event_id: str
    at: datetime
    units: int


class GrantedCredit(Answer):
    """One grant of an account: `given` = `left` + `used` + `taken_back` + `expired` + `moved`.

    `state`: `in_force`, `to_come` (it starts later), `used_up`, or `ended`. `order` is None for credit that belongs to
    no order, such as adjustments and units from before grants were kept: of that only `left` is known. `given` are the
    units that came to this account. `used` are those that events took, less those that reversals gave back;
    `taken_back` those that refunds and adjustments took; `expired` those that ended unused, or that returned after the
    end; `moved` those that a carry-over took along. `events` are the newest that used it.
    """

    meter: str
    order: str | None
    state: str
    category: str
    priority: int
    effective_at: datetime | None
    expires_at: datetime | None
    granted_at: datetime | None
    given: int | None
    left: int
    used: int | None
    taken_back: int | None
    expired: int | None
    moved: int | None
    events: tuple[CreditUse, ...]


class Credits(Answer):
    """Every grant of an account: by meter those in force in the order in which they pay, those to come, the others."""

    user_id: str
    at: datetime
    grants: tuple[GrantedCredit, ...]


class LimitUsage(Answer):
    """A limit of an account on one meter: `amount` units per day, week or month; `used` and `left` in the open window.

    `set_by` is the plan, an operator or the user. The window is open from `starts_at` until `ends_at`. Events that are
    not applied yet and holds are pending: checks count them also. If the meter draws on a `wallet` now, its own limit
    rests: it bounds nothing and counts nothing.
    """

    meter: str
    wallet: str | None
    per: str
    set_by: str
    amount: int
    used: int
    left: int
    starts_at: datetime | None
    ends_at: datetime


class AccountLimits(Answer):
    """Every limit of an account, by meter and window. `pay_from` `allowance`: checks count no purchased units."""

    user_id: str
    at: datetime
    pay_from: PayFrom | None
    limits: tuple[LimitUsage, ...]


class FoundAccount(Answer):
    """An account that a search found, as it is stored: a change that is due may not be in it yet."""

    user_id: str
    plan: str
    status: str
    trust: str
    opened_at: datetime
    name_in_logs: str


class FoundAccounts(Answer):
    """A page of accounts by id; `total` counts all that were found. More follow `more_after`; None: there are none."""

    accounts: tuple[FoundAccount, ...]
    total: int
    more_after: str | None
