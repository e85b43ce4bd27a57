"""The notices that meterfall sends: their kinds, and the body of a webhook as receivers read it."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, cast, get_args

from schemas.answers import Answer

# Kinds that a rule of the catalogue asks for.
RuleKind = Literal[
    "balance.threshold", "balance.depleted", "balance.recovered", "balance.debt", "limit.reached", "grant.expiring",
    "grant.expired", "period.renewed", "renewal.missing",
]  # fmt: skip
# All kinds. The last ones are always told; `webhook.test` is sent by `meterfall webhooks test` alone.
Kind = Literal[
    "balance.threshold", "balance.depleted", "balance.recovered", "balance.debt", "limit.reached", "grant.expiring",
    "grant.expired", "period.renewed", "renewal.missing", "event.refused", "partition.paused", "proof.differs",
    "webhook.test",
]  # fmt: skip
RULE_KINDS = cast("tuple[RuleKind, ...]", get_args(RuleKind))
KINDS = cast("tuple[Kind, ...]", get_args(Kind))


class TopUp(Answer):
    """A suggestion for an automatic top-up: units to grant, and the key to grant them by, which counts once."""

    amount: int
    key: str


class NoticeData(Answer):
    """The facts of a notice; those that its kind does not have are missing.

    `rule` and `period` name what it is about: a notice comes once for each rule, account, meter, period and `times`.
    `times` counts real recoveries in the period, from 1. `user_id` is missing in a notice for operators. Balances are
    those after the change, without what is pending; `limit` and `available` are missing where the allowance is
    unlimited. `percent` and `left` are the line that was reached. Of a limit that `set_by` set `per` day, week or
    month, `limit`, `used`, `period_start` and `period_end` are those of its window. `units` of the grant `order` are
    left, or expired. An entry of the stream of `partition` was refused for `reason`, or the partition is paused for it.
    `differences` were found by a proof.
    """

    notice_id: str
    rule: str
    period: str
    times: int = 1
    user_id: str | None = None
    meter: str | None = None
    plan: str | None = None
    status: str | None = None
    percent: int | None = None
    left: int | None = None
    used: int | None = None
    limit: int | None = None
    rollover: int | None = None
    purchased: int | None = None
    available: int | None = None
    period_start: datetime | None = None
    period_end: datetime | None = None
    per: str | None = None
    set_by: str | None = None
    top_up: TopUp | None = None
    order: str | None = None
    units: int | None = None
    expires_at: datetime | None = None
    event_id: str | None = None
    reason: str | None = None
    partition: int | str | None = None
    by: str | None = None
    differences: int | None = None
    text: str | None = None


class Notice(Answer):
    """A notice, as a webhook's body and a feed have it: its kind as `type`, its time, and its facts."""

    type: Kind
    timestamp: datetime
    data: NoticeData


class FeedNotice(Notice):
    """A notice of a feed; `cursor` is its place."""

    cursor: int


class NoticeFeed(Answer):
    """A page of notices in the order in which they were told. The next page begins after `cursor`."""

    notices: tuple[FeedNotice, ...]
    cursor: int
