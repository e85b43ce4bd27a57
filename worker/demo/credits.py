"""The demo's act about credits: a gift ends, meters draw on a wallet, a day's limit denies, and notices tell of it.

One account has a plan with a wallet. Its meters use up the allowance and a part of the gift. The gift ends, without any
clock being moved, and the next event takes from the order. Then the user's own limit denies, although credit is left.
On servers of its own the demo adds a webhook: a dyno sends the notices to a receiver on this machine. On servers that
stay it leaves webhooks alone, as these would get notices of other accounts; it reads the feed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from math import floor
from typing import NamedTuple

from config.catalogue import Catalogue
from schemas.notices import FeedNotice
from worker.admin import accounts, credits, limits, notices, webhooks
from worker.client import Billing
from worker.demo.periods import wait_until
from worker.demo.receiver import Receiver, receiving
from worker.demo.stage import CreditStep, Stage, Tally, Told, Workers, wait_until_drained
from worker.errors import UsageDenied
from worker.ledger.accounts import read_entry, read_usage
from worker.ledger.connection import batch_connection, read_clock

# Long enough for all that happens before the gift ends, also on a busy machine.
_ENDS_IN = timedelta(seconds=3)
# A dyno looks for what is due every few seconds, and starts a process for it once.
# The process that sends notices starts with the first one, and gives way to all else on a busy machine.
_DELIVERY_SECONDS = 90.0
_POLL_SECONDS = 0.05
_LEAST_ALLOWANCE = 1_000
_PERCENT = 80
_KINDS = ("balance.threshold", "grant.expired")
# Both lines of the threshold, and the end of the gift.
_NOTICES = 3


class Cast(NamedTuple):
    """A plan with a wallet: its allowance per period, and the price of each meter that draws on it, dearest last."""

    plan: str
    wallet: str
    allowance: int
    prices: Mapping[str, Decimal]

    @property
    def gift(self) -> int:
        """Units of the wallet in the promotional grant; the order has four times as many."""
        return self.allowance // 20

    @property
    def order(self) -> int:
        """Units of the wallet that are bought."""
        return 4 * self.gift

    @property
    def limit(self) -> int:
        """Units of the wallet that the user allows for a day."""
        return self.allowance + 2 * self.gift


class Event(NamedTuple):
    """An event of the act: units of a meter. `is_late`: it comes after the end of the gift."""

    event_id: str
    meter: str
    units: int
    is_late: bool


class Played(NamedTuple):
    """What clients and operators did, and what they were told."""

    user_id: str
    cast: Cast
    gift: str
    order: str
    ended_at: datetime
    events: list[Event]
    asked: Event
    denied_by: str | None
    told: list[FeedNotice]
    came: Mapping[str, int] | None  # None: without a receiver
    tally: Tally


def spend_credits(on: Stage, workers: Workers, prefix: str) -> Played | None:
    """Open an account, give it credit, spend that, and wait for the notices. None if no plan has a wallet to show.

    Takes a few seconds. Raises RehearsalError if workers do not get through.
    """
    cast = cast_of(on.resources.catalogue)
    if cast is None:
        return None
    user_id, gift, order = (f"{prefix}{name}" for name in ("wallet", "gift", "order"))
    events, asked = _events(cast)
    resources, tally = on.resources, Tally()
    with _webhook(on) as receiver, Billing.connect(resources.settings) as billing:
        with batch_connection(resources.engine) as postgres:
            now = read_clock(postgres)
        accounts.open_new(resources, user_id, cast.plan, timezone=where_it_is_noon(now))
        line = {"kind": "balance.threshold", "meter": cast.wallet, "left": cast.order, "top_up": cast.allowance // 2}
        percent = {"kind": "balance.threshold", "meter": cast.wallet, "percent": _PERCENT}
        notices.set_rules(resources, user_id, [percent, line, {"kind": "grant.expired"}])
        limits.set_limit(resources, user_id, cast.wallet, "day", cast.limit, of="user", actor=user_id)
        credits.grant(resources, user_id, cast.wallet, cast.order, order)
        with batch_connection(resources.engine) as postgres:
            now = read_clock(postgres)
        # In whole milliseconds, as Redis counts: an event right after the end is none before it.
        ended_at = now - timedelta(microseconds=now.microsecond % 1_000) + _ENDS_IN
        credits.grant(
            resources, user_id, cast.wallet, cast.gift, gift, category="promotional", expires_at=ended_at
        )  # fmt: skip
        for is_late in (False, True):
            if is_late:
                wait_until(on, ended_at)
            for event in events:
                if event.is_late is is_late:
                    tally.take(billing.emit(user_id, event.meter, event.units, event_id=event.event_id, source="demo"))
            wait_until_drained(on, workers)
        denied_by = None
        try:
            tally.take(billing.charge(user_id, asked.meter, asked.units, asked.event_id, source="demo"))
        except UsageDenied as denied:
            tally.deny(denied)
            if (limit := denied.answer.limited_by) is not None:
                denied_by = f"{limit.used:,} of {limit.amount:,} a {limit.per}, by the {limit.set_by}"
        told = _wait_until_told(on, user_id, receiver)
    came = None if receiver is None else receiver.came
    return Played(user_id, cast, gift, order, ended_at, events, asked, denied_by, told, came, tally)


def prove_spent(on: Stage, played: Played) -> tuple[list[CreditStep], list[Told], list[str]]:
    """Compare the act with the books: who paid each event, what expired, and that each notice came once.

    Every stream must be drained. Returns what is shown of steps and notices, and every difference.
    """
    cast, user_id = played.cast, played.user_id
    names = {played.gift: "gift", played.order: "order"}
    left = {"allowance": cast.allowance, "gift": cast.gift, "order": cast.order}
    spent: dict[str, int] = dict.fromkeys(cast.prices, 0)
    steps = [
        CreditStep("gift", None, None, cast.gift, f"ends at {played.ended_at:%H:%M:%S} UTC"),
        CreditStep("order", None, None, cast.order, "never ends"),
    ]
    faults: list[str] = []
    with batch_connection(on.resources.engine) as postgres:
        for event in played.events:
            if event.is_late and left["gift"]:
                entry = read_entry(postgres, user_id, f"expire:{played.gift}", cast.wallet)
                expired = 0 if entry is None else -entry.purchased_change
                if expired != left["gift"]:
                    faults.append(f"{expired} of the gift expired, {left['gift']} were left of it")
                steps.append(CreditStep("expired", None, None, expired, "the rest of the gift"))
                left["gift"] = 0
            before = floor(spent[event.meter] * cast.prices[event.meter])
            spent[event.meter] += event.units
            expected = _paid(left, floor(spent[event.meter] * cast.prices[event.meter]) - before)
            row = read_usage(postgres, user_id, event.event_id)
            parts: dict[str, int] = {}
            if row is not None:
                taken = {names.get(order, order): units for order, units in (row.grants or {}).items()}
                parts = {name: units for name, units in {"allowance": row.from_subscription, **taken}.items() if units}
            if parts != expected:
                faults.append(f"{event.event_id} of {user_id} was paid by {parts}, it should be {expected}")
            by = ", ".join(f"{units:,} of the {name}" for name, units in parts.items())
            steps.append(CreditStep("event", event.meter, event.units, sum(parts.values()), by))
    cost = floor(played.asked.units * cast.prices[played.asked.meter])
    if played.denied_by is None:
        faults.append(f"no limit denied {played.asked.event_id} of {user_id}")
    steps.append(CreditStep("denied", played.asked.meter, played.asked.units, cost, played.denied_by or ""))
    told = [_as_told(notice, played.came) for notice in played.told]
    wanted = sorted([f"{_PERCENT} % of the allowance used", f"{cast.order:,} or fewer left", _expired(cast)])
    if sorted(notice.says.partition(";")[0] for notice in told) != wanted:
        faults.append(f"{user_id} was told {[notice.says for notice in told]}, it should be {wanted}")
    faults += [f"{notice.kind} of {user_id} was not delivered" for notice in told if notice.delivered == 0]
    return steps, told, faults


# Leaves --------------------------------------------------------------------------------------------------------------


def cast_of(catalogue: Catalogue) -> Cast | None:
    """Return the first plan with a wallet of which this act can be played, if there is one."""
    for code, plan in catalogue.plans.items():
        for wallet, granted in plan.meters.items():
            drawn = [(Decimal(draw.price), meter) for meter, draw in catalogue.draws(code).items()
                     if draw.wallet == wallet]  # fmt: skip
            is_plain = plan.active and catalogue.spills[wallet] and not granted.caps and not granted.limits
            if drawn and is_plain and (granted.quantity or 0) >= _LEAST_ALLOWANCE:
                prices = {meter: price for price, meter in sorted(drawn)}
                return Cast(code, wallet, granted.quantity or 0, prices)
    return None


def _events(cast: Cast) -> tuple[list[Event], Event]:
    """Return the events, and the request that the limit denies.

    Each meter takes its share of most of the allowance. The dearest takes the rest of it and a part of the gift, and
    after the end of the gift a part of the order.
    """
    share = cast.allowance * 9 // 10 // len(cast.prices)
    events = [Event(f"uses-{meter}", meter, int(share / price), is_late=False) for meter, price in cast.prices.items()]
    meter, price = list(cast.prices.items())[-1]
    rest = cast.allowance - sum(floor(event.units * cast.prices[event.meter]) for event in events)
    events.append(Event("uses-the-gift", meter, int((rest + cast.gift * 2 // 5) / price), is_late=False))
    events.append(Event("uses-the-order", meter, int(cast.gift * 3 // 5 / price), is_late=True))
    return events, Event("is-denied", meter, int(cast.gift * 6 // 5 / price), is_late=True)


def _paid(left: dict[str, int], cost: int) -> dict[str, int]:
    """Take `cost` from what is `left`, in its order; return the parts."""
    parts: dict[str, int] = {}
    for name, units in left.items():
        if part := min(units, cost - sum(parts.values())):
            parts[name], left[name] = part, units - part
    return parts


def where_it_is_noon(now: datetime) -> str:
    """Return a time zone in which the day of `now` ends in about twelve hours, not in the middle of the act."""
    east = (12 - now.hour) % 24
    east = east - 24 if east > 12 else east
    return "Etc/GMT" if not east else f"Etc/GMT{-east:+}"  # these names count hours to the west


@contextmanager
def _webhook(on: Stage) -> Iterator[Receiver | None]:
    """Have notices of the act sent to a receiver on this machine, if the servers are ours."""
    if on.lasting:
        yield None
        return
    with receiving() as receiver:
        added = webhooks.add(on.resources, receiver.url, kinds=_KINDS)
        receiver.secret = added.secret
        try:
            yield receiver
        finally:
            webhooks.remove(on.resources, added.webhook_id)


def _wait_until_told(on: Stage, user_id: str, receiver: Receiver | None) -> list[FeedNotice]:
    """Return what the account was told, once all of it was delivered, or after a while what there is.

    The feed may lack the newest notices while a dyno gives them their places.
    """
    deadline = time.monotonic() + _DELIVERY_SECONDS
    while True:
        told = list(notices.feed(on.resources, kinds=_KINDS, user_id=user_id).notices)
        delivered = receiver is None or all(receiver.came[notice.data.notice_id] for notice in told)
        if (len(told) >= _NOTICES and delivered) or time.monotonic() > deadline:
            return told
        time.sleep(_POLL_SECONDS)


def _as_told(notice: FeedNotice, came: Mapping[str, int] | None) -> Told:
    data = notice.data
    if notice.type == "grant.expired":
        says = f"{data.units:,} of the gift expired"
    elif data.percent is not None:
        says = f"{data.percent} % of the allowance used"
    else:
        says = f"{data.left:,} or fewer left"
    if data.top_up is not None:
        says += f"; top up by {data.top_up.amount:,}"
    return Told(notice.type, notice.timestamp, says, None if came is None else came.get(data.notice_id, 0))


def _expired(cast: Cast) -> str:
    return f"{cast.gift - cast.gift * 2 // 5:,} of the gift expired"
