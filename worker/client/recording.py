"""What each call that records does: emit, capture, settle, release, charge.

Each appends its events and changes what is pending in one script, so a repeat is harmless.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError
from redis import exceptions as redis_errors

from schemas.answers import (
    ChargeAnswer,
    EventAnswer,
    HoldAnswer,
    HoldState,
    Parts,
    PayFrom,
)
from schemas.events import ALLOWED, MAX_AMOUNT, MAX_DIMENSIONS, Scalar, UsageEvent, canonical_multiplier, is_too_much
from worker.client.arguments import Facts, amounts_of, multiplier_of, price, require, require_pay_from, stated
from worker.client.effects import (
    DOWN,
    FAILED,
    Ask,
    Effects,
    as_down,
    logger,
    ring,
    run_script,
    run_scripts,
    unconfirmed,
)
from worker.client.loading import forget_ledger_holds, gated
from worker.client.session import Context
from worker.crash import crash_point
from worker.errors import (
    EventConflict,
    InvalidRequest,
    LedgerUnavailable,
)
from worker.keyspace import calls
from worker.keyspace.keys import Partition
from worker.keyspace.scripts import Call
from worker.rules.preflight import (
    Spend,
    buckets_in,
    check_answer,
    denied,
    expected_parts,
    in_wallet_of,
    standing_in_reply,
)
from worker.rules.prices import Price, Units
from worker.tracing import sending

# Gives bytes at once, where a model gives text.
_EVENT = TypeAdapter(UsageEvent)


def emit(
    context: Context,
    user_id: str,
    meter: str,
    quantity: int,
    *,
    event_id: str | None = None,
    multiplier: str | None = None,
    occurred_at: datetime | None = None,
    source: str | None = None,
    reference_id: str | None = None,
    hold_key: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    traceparent: str | None = None,
) -> Effects[EventAnswer]:
    """Record that `quantity` units were used. Never refused for lack of credit; pending at once, billed soon after.

    Without `event_id` a time-ordered one is made; give your own to make a repeat harmless. With `hold_key` the event
    closes that hold. Raises InvalidRequest for an event that breaks the wire format, or that workers would refuse as
    too old (`event_max_age_days`); RedisUnavailable with the event when Redis does not confirm.
    """
    no_id = event_id is None or event_id == ""
    model = stated(dimensions).get("model_slug")
    event = _event_of(
        context,
        user_id,
        meter,
        quantity,
        Facts(new_key() if no_id else event_id, source, reference_id, dimensions, traceparent=traceparent),
        multiplier=multiplier_of(context, model) if multiplier is None else multiplier,
        occurred_at=occurred_at,
        hold_key=hold_key,
    )
    (answer,) = yield from append_events(context, [priced(context, event)])
    return answer


def emit_events(context: Context, events: Iterable[UsageEvent]) -> Effects[list[EventAnswer]]:
    """Record many events, in order per user, in few script calls that go together.

    Raises RedisUnavailable with those events that Redis has not confirmed; sending them again is safe, and in order.
    """
    return (yield from append_events(context, all_priced(context, events)))


def append_events(context: Context, events: Sequence[UsageEvent]) -> Effects[list[EventAnswer]]:
    """The same for events that are priced already.

    One script call per user and pipeline: were two of them under way and the first refused, the second would be
    recorded before it.
    """
    rounds = _rounds(events, context)
    with sending(len(events)) as traceparent:
        for done, batches in enumerate(rounds):
            requests = [_append_call(context, batch, traceparent) for _, batch in batches]
            try:
                replies = yield from run_scripts(requests)
            except FAILED as error:
                raise unconfirmed(error, _events_in(rounds[done:]), None, traceparent) from error
            crash_point("after_emit")
            refused = [(as_down(reply), batch) for reply, batch in zip(replies, batches, strict=True) if _failed(reply)]
            if refused:
                # What waiting does not mend comes first: the caller must hear of it.
                reason = min((error for error, _ in refused), key=lambda error: isinstance(error, DOWN))
                unsent = _events_in([[batch for _, batch in refused], *rounds[done + 1 :]])
                raise unconfirmed(reason, unsent, None, traceparent) from reason
            for reply, (_, batch) in zip(replies, batches, strict=True):
                if batch[0].hold_key is not None:
                    yield from _release_elsewhere(context, batch[0], reply)
            yield from ring(
                partition for reply, (partition, _) in zip(replies, batches, strict=True) if _must_ring(reply)
            )
    return [event_answer(context, event) for event in events]


def capture(
    context: Context,
    user_id: str,
    meter: str,
    key: str,
    event_id: str,
    amount: int | None = None,
    *,
    quantity: int | None = None,
    model_slug: str | None = None,
    multiplier: str | None = None,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
    traceparent: str | None = None,
) -> Effects[EventAnswer]:
    """A part of the hold `key` becomes the event `event_id` (a page of a document); the rest stays held.

    `amount` or `quantity`: as in `settle`. It counts in full, even beyond what was left, and against the sub-cap of the
    backend that did the work (`backend`, or `dimensions`), whichever it was held on. A repeat gets the first answer.
    Raises EventConflict when the id was captured with another amount, RedisUnavailable with the event.
    """
    units = Units(amount, quantity, multiplier, model_slug)
    facts = Facts(event_id, source, reference_id, dimensions, backend, model_slug, traceparent)
    return (yield from capture_event(context, capturing_event(context, user_id, meter, key, units, facts), key))


def capturing_event(
    context: Context, user_id: str, meter: str, key: str, units: Units, facts: Facts, *, held: str | None = None
) -> UsageEvent:
    """Return the event that is a part of a hold, checked. Raises InvalidRequest before anything is sent.

    `held` is the multiplier of the hold; None: it is not known here.
    """
    require(context, user_id, meter, 0, key=key, event_id=facts.event_id, backend=facts.backend)
    if facts.event_id == key:
        raise InvalidRequest("event_id", key, "another than the hold's key, which settle uses")
    return _priced_event(context, user_id, meter, price(context, units, facts, held=held), facts)


def capture_event(context: Context, event: UsageEvent, key: str) -> Effects[EventAnswer]:
    """Send an event that is a part of the hold `key`. See `capture`."""
    with sending(1) as traceparent:
        request = calls.capture(
            marked(context, event, traceparent),
            key,
            context.sub_meters(event.meter),
            outcome_ttl_ms=context.outcome_ttl_ms,
        )
        reply = yield from _recorded(event, request, traceparent, captured_from=key)
    if reply[0] == b"conflict":
        raise EventConflict(event.user_id, event.event_id, int(reply[1]))
    yield from ring([context.partition(event.user_id)] if reply[3] else [])
    return event_answer(context, event, HoldState(reply[0].decode()), repeated=bool(reply[2]))


def settle(
    context: Context,
    user_id: str,
    meter: str,
    key: str,
    actual: int | None = None,
    *,
    quantity: int | None = None,
    model_slug: str | None = None,
    multiplier: str | None = None,
    event_id: str | None = None,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
    traceparent: str | None = None,
) -> Effects[EventAnswer]:
    """The hold `key` becomes one event over `actual` units (after the multiplier), which may be less or more.

    Or over `quantity` units, before the multiplier: of `model_slug` (or `dimensions`) by the catalogue, or the one
    given. A hold at hand knows its multiplier (`Hold.settle`); here name the model or the multiplier. An amount beside
    a model whose multiplier is not 1 is refused, unless `multiplier="1"` says that it is applied already.
    It counts against the sub-cap of the backend that did the work (`backend`, or `dimensions`), not of the hold's.

    Always records, also after release or expiry: the work was done. The event's id is `key` unless given. A repeat
    gets the first answer, also one with another amount: it then has `repeated` set and the `amount` that was recorded
    first, so compare that with yours. Raises RedisUnavailable with the event; the hold then stays until it expires.
    """
    units = Units(actual, quantity, multiplier, model_slug, named="actual")
    facts = Facts(event_id, source, reference_id, dimensions, backend, model_slug, traceparent)
    return (yield from settle_event(context, settling_event(context, user_id, meter, key, units, facts)))


def settling_event(
    context: Context, user_id: str, meter: str, key: str, units: Units, facts: Facts, *, held: str | None = None
) -> UsageEvent:
    """Return the event that settles a hold, checked. Raises InvalidRequest before anything is sent.

    `held` is the multiplier of the hold; None: it is not known here.
    """
    if facts.event_id is None or facts.event_id == "":
        facts = facts._replace(event_id=key)
    require(context, user_id, meter, 0, key=key, event_id=facts.event_id, backend=facts.backend)
    return _priced_event(context, user_id, meter, price(context, units, facts, held=held), facts, hold_key=key)


def settle_event(context: Context, event: UsageEvent) -> Effects[EventAnswer]:
    """Send an event that settles the hold it names. See `settle`."""
    with sending(1) as traceparent:
        reply = yield from _recorded(event, _settle_call(context, event, traceparent), traceparent)
    yield from _release_elsewhere(context, event, reply)
    yield from ring([context.partition(event.user_id)] if reply[4] else [])
    state = HoldState(reply[0].decode())
    return event_answer(context, event, state, amount=int(reply[2]), repeated=bool(reply[3]))


def release(context: Context, user_id: str, meter: str, key: str, *, late: bool = False) -> Effects[HoldAnswer]:
    """Give the hold `key` back. The answer's state is the one before: `settled` means there was nothing to give back.

    Releasing a key never seen closes it, so that a reserve which is still on its way cannot revive it. A `late` one,
    which was told before an outage was over, does not; and it leaves alone what was reserved again since.
    Raises RedisUnavailable; the hold then stays until it expires.
    """
    require(context, user_id, meter, 0, key=key)
    try:
        reply = yield from run_script(_release_call(context, user_id, meter, key, late=late))
    except redis_errors.RedisError as error:
        raise unconfirmed(error) from error
    state = HoldState(reply[0].decode())
    if (
        state is HoldState.UNKNOWN
        and not late
        and context.settings.redis_down == "ledger"
        and context.settings.database_url
    ):
        # It may be a hold that the ledger granted while Redis was down.
        yield from forget_ledger_holds(context, {user_id: [key]})
    return HoldAnswer(user_id=user_id, meter=meter, key=key, state=state, amount=int(reply[2]), left=0)


def charge(
    context: Context,
    user_id: str,
    meter: str,
    amount: int | None = None,
    event_id: str = "",
    *,
    quantity: int | None = None,
    model_slug: str | None = None,
    multiplier: str | None = None,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
    traceparent: str | None = None,
    pay_from: PayFrom | None = None,
) -> Effects[ChargeAnswer]:
    """Check, and record `amount` units (after the multiplier) as the event `event_id`, in one step.

    Or `quantity` units, before the multiplier: of `model_slug` (or `dimensions`) by the catalogue, or the one given.
    With a backend (`backend`, or `dimensions`), its sub-cap is checked as well, where the plan has one.
    With `pay_from="allowance"` purchased units do not count; what is recorded takes from them all the same.
    The answer names the buckets expected to pay. A repeat gets the first answer; a denial leaves no trace.
    Before it denies, it looks into the ledger once: an event recorded there is answered as the repeat that it is, with
    the parts that paid. While Postgres does not answer, such a repeat may be denied.
    Raises UsageLimitExceeded (or UsageDenied), EventConflict, LedgerUnavailable, RedisUnavailable with the event.
    """
    require(context, user_id, meter, 0, event_id=event_id, backend=backend)
    require_pay_from(pay_from)
    facts = Facts(event_id, source, reference_id, dimensions, backend, model_slug, traceparent)
    cost = price(context, Units(amount, quantity, multiplier, model_slug), facts)
    amount, at_most = amounts_of(context, meter, cost)
    event = _priced_event(context, user_id, meter, cost, facts)
    if not context.settings.billing_enabled:
        (recorded,) = yield from emit_events(context, [event])
        return ChargeAnswer(**recorded.model_dump(), expected=Parts())
    named = (event.dimensions or {}).get("backend")
    spend = Spend(user_id, meter, at_most, named if isinstance(named, str) else None, pay_from)
    with sending(1) as trace:
        request = calls.charge(
            marked(context, event, trace), outcome_ttl_ms=context.outcome_ttl_ms, allowance=pay_from == "allowance"
        )
        try:
            reply = yield from gated(context, user_id, request)
        except FAILED as error:
            raise unconfirmed(error, [event]) from error
    if reply[0] == b"conflict":
        raise EventConflict(user_id, event_id, int(reply[2]))
    if reply[0] != b"charged":
        known = yield from _recorded_in_ledger(context, event)
        if known is not None:
            return known
        raise denied(check_answer(spend, standing_in_reply(reply, context.capped_backends(meter, spend.backend))))
    yield from ring([context.partition(user_id)] if reply[8] else [])
    wallet = in_wallet_of(reply[-1])
    units = amount if wallet is None else wallet.own.cost_of_more(amount)
    return ChargeAnswer(
        user_id=user_id,
        meter=meter,
        event_id=event_id,
        amount=amount,
        repeated=bool(reply[7]),
        expected=expected_parts(buckets_in(reply), int(reply[6]), units),
        wallet=wallet.name if wallet and wallet.name != meter else None,
    )


def _recorded_in_ledger(context: Context, event: UsageEvent) -> Effects[ChargeAnswer | None]:
    """Answer a charge that the ledger recorded long ago as a repeat. None: it did not, or nobody knows.

    After Postgres failed, charges do not wait for it for a moment. Raises EventConflict if another event has the id.
    """
    if context.settings.database_url is None or not context.ledger_breaker.lets_through():
        return None
    try:
        recorded = yield Ask(lambda ledger: ledger.payment(event.user_id, event.event_id))
    except LedgerUnavailable as error:
        context.ledger_breaker.failed(error)
        logger.warning("a denied charge may be a repeat, and Postgres cannot tell: %s", error)
        return None
    context.ledger_breaker.answered()
    if recorded is None:
        return None
    sent = (event.meter, event.quantity, canonical_multiplier(event.multiplier or "1"))
    if (recorded.meter, recorded.quantity, canonical_multiplier(recorded.multiplier)) != sent:
        raise EventConflict(event.user_id, event.event_id, recorded.amount)
    paid = Parts(**{bucket: getattr(recorded, bucket) for bucket in Parts.model_fields})
    answer = event_answer(context, event, repeated=True).model_dump()
    return ChargeAnswer(**answer, expected=paid, wallet=recorded.wallet)


def marked(context: Context, event: UsageEvent, traceparent: str | None = None) -> calls.MarkedEvent:
    """A priced event as scripts append it: signed, where this process has a key.

    `traceparent` is its trace if it has none of its own.
    """
    text = payload(event)
    amount, at_most = amounts_of(context, event.meter, price_in(event))
    return calls.MarkedEvent(
        account=context.account(event.user_id),
        meter=event.meter,
        sub_meter=context.sub_meter(event.meter, (event.dimensions or {}).get("backend")),
        event_id=event.event_id,
        amount=amount,
        at_most=at_most,
        payload=text,
        signature=context.signer.sign(text) if context.signer is not None else "",
        trace=event.traceparent or traceparent or "",
    )


def payload(event: UsageEvent) -> bytes:
    """Return the event as it travels: JSON in UTF-8."""
    return _EVENT.dump_json(event, exclude_none=True)


def price_in(event: UsageEvent) -> Price:
    """What a priced event is billed."""
    return Price(event.quantity, event.multiplier or "1")


def _append_call(context: Context, batch: Sequence[UsageEvent], traceparent: str | None) -> Call:
    """The script that appends `batch`: an event that names a hold settles it, and comes alone."""
    if batch[0].hold_key is not None:
        return _settle_call(context, batch[0], traceparent)
    return calls.emit([marked(context, event, traceparent) for event in batch])


def _settle_call(context: Context, event: UsageEvent, traceparent: str | None) -> Call:
    """The script that settles the hold which the event names, or the one that has its id."""
    sub_meters, key = context.sub_meters(event.meter), event.hold_key or event.event_id
    return calls.settle(marked(context, event, traceparent), key, sub_meters, outcome_ttl_ms=context.outcome_ttl_ms)


def _release_call(context: Context, user_id: str, meter: str, key: str, *, late: bool = False) -> Call:
    """The script that gives a hold back."""
    account, sub_meters = context.account(user_id), context.sub_meters(meter)
    return calls.release(account, meter, key, sub_meters, outcome_ttl_ms=context.outcome_ttl_ms, late=late)


def new_key() -> str:
    """Make a key that no other call has: for one piece of work, kept with it, and used again by its retries.

    It serves as key of a hold and as id of an event. A UUIDv7: ids in the order of time keep the index of the usage log
    dense (RFC 9562, section 5.7).
    """
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = milliseconds << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & (1 << 62) - 1
    digits = f"{value:032x}"  # a UUID object would take as long as all the rest
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _recorded(
    event: UsageEvent, request: Call, traceparent: str | None, captured_from: str | None = None
) -> Effects[Any]:
    """Run a script that appends `event`; whatever Redis says against it, the error carries the event and its trace."""
    try:
        return (yield from run_script(request))
    except FAILED as error:
        raise unconfirmed(error, [event], captured_from, traceparent) from error


def _release_elsewhere(context: Context, event: UsageEvent, reply: Sequence[bytes]) -> Effects[None]:
    """Free the hold of an event that was recorded on another meter than it was held on."""
    meter = reply[5].decode()
    if not meter or meter == event.meter:
        return
    try:
        request = _release_call(context, event.user_id, meter, event.hold_key or event.event_id)
        yield from run_script(request)
    except redis_errors.RedisError as error:
        logger.warning("hold %s on %s stays until it expires: %s", event.hold_key, meter, error)


_Batches = list[tuple[Partition, list[UsageEvent]]]


def _rounds(events: Sequence[UsageEvent], context: Context) -> list[_Batches]:
    """Events in batches of one script call. What goes together in a round is no batch after another of the same user,
    and of each partition at most `emit_chunk_events`, so that Redis is soon done with it.
    """
    rounds: list[_Round] = []
    last: dict[str, tuple[int, bool]] = {}
    full: Counter[Partition] = Counter()  # the rounds, from the first on, that have no room for more of it
    for event in events:
        partition, alone = context.partition(event.user_id), event.hold_key is not None
        at, was_alone = last.get(event.user_id, (-1, True))
        if alone or was_alone:
            at += 1
        looked_at_all = at <= full[partition]
        at = max(at, full[partition])
        while at < len(rounds) and rounds[at].sizes[partition] >= context.settings.emit_chunk_events:
            at += 1
        if looked_at_all:
            full[partition] = at
        if at == len(rounds):
            rounds.append(_Round())
        rounds[at].add(event, partition, alone=alone)
        last[event.user_id] = at, alone
    return [each.batches for each in rounds]


class _Round:
    """Batches that go together, and how many of their events each partition has."""

    def __init__(self) -> None:
        self.batches: _Batches = []
        self.sizes: Counter[Partition] = Counter()
        self._open: dict[Partition, list[UsageEvent]] = {}

    def add(self, event: UsageEvent, partition: Partition, *, alone: bool) -> None:
        """Put an event into the batch of its partition; one that goes alone into a batch of its own."""
        self.sizes[partition] += 1
        if not alone and partition in self._open:
            self._open[partition].append(event)
            return
        batch = [event]
        self.batches.append((partition, batch))
        if not alone:
            self._open[partition] = batch


def _events_in(rounds: Iterable[_Batches]) -> list[UsageEvent]:
    return [event for batches in rounds for _, batch in batches for event in batch]


def _must_ring(reply: Any) -> bool:
    return bool(reply[4] if isinstance(reply, list) else reply)


def _failed(reply: Any) -> bool:
    return isinstance(reply, Exception)


def all_priced(context: Context, events: Iterable[UsageEvent]) -> list[UsageEvent]:
    """The events that a caller gives, each as `priced`. Raises InvalidRequest also for something else among them."""
    given = list(events) if isinstance(events, Iterable) else [events]
    for each in given:
        if not isinstance(each, UsageEvent):
            raise InvalidRequest("events", each, "UsageEvent objects")
    return [priced(context, event) for event in given]


def priced(context: Context, event: UsageEvent) -> UsageEvent:
    """The event with its multiplier written in, so that a later catalogue cannot change what it costs.

    Raises InvalidRequest when that makes the amount too large, for a meter that the catalogue does not have, and for an
    event that workers would refuse as too old.
    """
    if event.occurred_at is not None and event.occurred_at < context.clock() - context.event_max_age:
        days = context.event_max_age.days
        raise InvalidRequest("occurred_at", event.occurred_at.isoformat(), f"at most {days} days ago")
    if event.meter not in context.catalogue.meters:
        raise InvalidRequest("meter", event.meter, "one of " + ", ".join(sorted(context.catalogue.meters)))
    if event.multiplier is not None:
        return event
    multiplier = multiplier_of(context, (event.dimensions or {}).get("model_slug"))
    if is_too_much(event.quantity, multiplier):
        raise InvalidRequest("quantity", event.quantity, f"at most {MAX_AMOUNT} after the multiplier {multiplier}")
    return event.model_copy(update={"multiplier": multiplier})


def _priced_event(
    context: Context, user_id: str, meter: str, cost: Price, facts: Facts, *, hold_key: str | None = None
) -> UsageEvent:
    """Return the event of a piece of work whose price is known. Raises InvalidRequest."""
    return _event_of(context, user_id, meter, cost.quantity, facts, multiplier=cost.multiplier, hold_key=hold_key)


def _event_of(
    context: Context,
    user_id: str,
    meter: str,
    quantity: int,
    facts: Facts,
    *,
    multiplier: str,
    occurred_at: datetime | None = None,
    hold_key: str | None = None,
) -> UsageEvent:
    """Return the event of a piece of work, done now unless `occurred_at` is given. Raises InvalidRequest."""
    event = new_event(
        event_id=facts.event_id,
        user_id=user_id,
        meter=meter,
        quantity=quantity,
        multiplier=multiplier,
        occurred_at=occurred_at or context.clock(),
        source=facts.source,
        reference_id=facts.reference_id,
        hold_key=hold_key,
        dimensions=facts.all_dimensions(),
    )
    return event if facts.traceparent is None else event.traced(facts.traceparent)


def new_event(**fields: Any) -> UsageEvent:
    """A valid event. Raises InvalidRequest naming the first field that is not."""
    try:
        return UsageEvent(**fields)
    except ValidationError as error:
        raise refusal_of(error) from None


def refusal_of(error: ValidationError) -> InvalidRequest:
    """What the first mistake in an event is to a caller: its field, and in words what that takes."""
    first = error.errors(include_url=False)[0]
    name, kind = ".".join(map(str, first["loc"])), first["type"]
    if not name:
        return InvalidRequest("quantity", first["input"]["quantity"], f"at most {MAX_AMOUNT} after the multiplier")
    if kind == "missing":
        allowed = "given"
    elif kind == "extra_forbidden":
        allowed = "left out: an event has no such field"
    elif name == "dimensions" and kind == "too_long":
        allowed = f"at most {MAX_DIMENSIONS} names"
    elif name == "dimensions" and kind == "value_error":
        allowed = first["msg"].removeprefix("Value error, must be ")
    elif first["loc"][0] == "dimensions" and len(first["loc"]) > 1:
        name = ".".join(map(str, first["loc"][:2]))
        allowed = "named by text" if first["loc"][-1] == "[key]" else "text, a number, True, False or None"
    else:
        allowed = ALLOWED[name]
    return InvalidRequest(name, first["input"], allowed)


def event_answer(
    context: Context,
    event: UsageEvent,
    hold: HoldState | None = None,
    *,
    amount: int | None = None,
    repeated: bool = False,
    spooled: bool = False,
) -> EventAnswer:
    """What a call answers about an event that it recorded: with the amount of the first call, where that is known."""
    if amount is None:
        amount, _ = amounts_of(context, event.meter, price_in(event))
    return EventAnswer(
        user_id=event.user_id,
        meter=event.meter,
        event_id=event.event_id,
        amount=amount,
        hold=hold,
        repeated=repeated,
        spooled=spooled,
    )
