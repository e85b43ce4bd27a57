"""What each call that records does: emit, capture, settle, release, charge.

Each appends its events and changes what is pending in one script, so a repeat is harmless.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError
from redis import exceptions as redis_errors

from schemas.answers import (
    ChargeAnswer,
    EventAnswer,
    HoldAnswer,
    HoldState,
    Parts,
)
from schemas.events import MAX_AMOUNT, Scalar, UsageEvent, multiplied
from worker.client.arguments import Facts, multiplier_of, price, require
from worker.client.effects import DOWN, Effects, as_down, logger, ring, run_script, run_scripts, unconfirmed
from worker.client.loading import forget_ledger_holds, gated
from worker.client.session import Context
from worker.crash import crash_point
from worker.errors import (
    EventConflict,
    InvalidRequest,
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
    standing_in_reply,
)
from worker.rules.prices import Price, Units

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
) -> Effects[EventAnswer]:
    """Record that `quantity` units were used. Never refused for lack of credit; pending at once, billed soon after.

    Without `event_id` a time-ordered one is made; give your own to make a repeat harmless. With `hold_key` the event
    closes that hold. Raises InvalidRequest for an event that breaks the wire format, RedisUnavailable with the event
    when Redis does not confirm.
    """
    event = _event_of(
        user_id,
        meter,
        quantity,
        Facts(event_id=event_id or new_event_id(), source=source, reference_id=reference_id, dimensions=dimensions),
        multiplier=multiplier or multiplier_of(context, (dimensions or {}).get("model_slug")),
        occurred_at=occurred_at,
        hold_key=hold_key,
    )
    (answer,) = yield from append_events(context, [priced(context, event)])
    return answer


def emit_events(context: Context, events: Iterable[UsageEvent]) -> Effects[list[EventAnswer]]:
    """Record many events, in order per user, in few script calls that go together.

    Raises RedisUnavailable with those events that Redis has not confirmed; sending them again is safe, and in order.
    """
    return (yield from append_events(context, [priced(context, event) for event in events]))


def append_events(context: Context, events: Sequence[UsageEvent]) -> Effects[list[EventAnswer]]:
    """The same for events that are priced already.

    One script call per partition and pipeline: were two of them under way and the first refused, the second would be
    recorded before it.
    """
    rounds = _rounds(events, context)
    for done, batches in enumerate(rounds):
        requests = [_append_call(context, batch) for _, batch in batches]
        try:
            replies = yield from run_scripts(requests)
        except redis_errors.RedisError as error:
            raise unconfirmed(error, _events_in(rounds[done:])) from error
        crash_point("after_emit")
        refused = [(as_down(reply), batch) for reply, batch in zip(replies, batches, strict=True) if _failed(reply)]
        if refused:
            # What waiting does not mend comes first: the caller must hear of it.
            reason = min((error for error, _ in refused), key=lambda error: isinstance(error, DOWN))
            unsent = [batch for _, batch in refused]
            raise unconfirmed(reason, _events_in([unsent, *rounds[done + 1 :]])) from reason
        for reply, (_, batch) in zip(replies, batches, strict=True):
            if batch[0].hold_key is not None:
                yield from _release_elsewhere(context, batch[0], reply)
        yield from ring(partition for reply, (partition, _) in zip(replies, batches, strict=True) if _must_ring(reply))
    return [event_answer(event) for event in events]


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
) -> Effects[EventAnswer]:
    """A part of the hold `key` becomes the event `event_id` (a page of a document); the rest stays held.

    `amount` or `quantity`: as in `settle`. It counts in full, even beyond what was left, and against the sub-cap of the
    backend that did the work (`backend`, or `dimensions`), whichever it was held on. A repeat gets the first answer.
    Raises EventConflict when the id was captured with another amount, RedisUnavailable with the event.
    """
    units = Units(amount, quantity, multiplier, model_slug)
    facts = Facts(event_id, source, reference_id, dimensions, backend, model_slug)
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
    return _priced_event(user_id, meter, price(context, units, facts, held=held), facts)


def capture_event(context: Context, event: UsageEvent, key: str) -> Effects[EventAnswer]:
    """Send an event that is a part of the hold `key`. See `capture`."""
    request = calls.capture(
        marked(context, event), key, context.sub_meters(event.meter), outcome_ttl_ms=context.outcome_ttl_ms
    )
    reply = yield from _recorded(event, request, captured_from=key)
    if reply[0] == b"conflict":
        raise EventConflict(event.user_id, event.event_id, int(reply[1]))
    yield from ring([context.partition(event.user_id)] if reply[3] else [])
    return event_answer(event, HoldState(reply[0].decode()), repeated=bool(reply[2]))


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
) -> Effects[EventAnswer]:
    """The hold `key` becomes one event over `actual` units (after the multiplier), which may be less or more.

    Or over `quantity` units, before the multiplier: of `model_slug` (or `dimensions`) by the catalogue, or the one
    given. A hold at hand knows its multiplier (`Hold.settle`); here name the model or the multiplier. An amount beside
    a model whose multiplier is not 1 is refused, unless `multiplier="1"` says that it is applied already.
    It counts against the sub-cap of the backend that did the work (`backend`, or `dimensions`), not of the hold's.

    Always records, also after release or expiry: the work was done. The event's id is `key` unless given; a repeat
    gets the first answer. Raises RedisUnavailable with the event; the hold then stays until it expires.
    """
    units = Units(actual, quantity, multiplier, model_slug, named="actual")
    facts = Facts(event_id, source, reference_id, dimensions, backend, model_slug)
    return (yield from settle_event(context, settling_event(context, user_id, meter, key, units, facts)))


def settling_event(
    context: Context, user_id: str, meter: str, key: str, units: Units, facts: Facts, *, held: str | None = None
) -> UsageEvent:
    """Return the event that settles a hold, checked. Raises InvalidRequest before anything is sent.

    `held` is the multiplier of the hold; None: it is not known here.
    """
    facts = facts._replace(event_id=facts.event_id or key)
    require(context, user_id, meter, 0, key=key, event_id=facts.event_id, backend=facts.backend)
    return _priced_event(user_id, meter, price(context, units, facts, held=held), facts, hold_key=key)


def settle_event(context: Context, event: UsageEvent) -> Effects[EventAnswer]:
    """Send an event that settles the hold it names. See `settle`."""
    reply = yield from _recorded(event, _settle_call(context, event))
    yield from _release_elsewhere(context, event, reply)
    yield from ring([context.partition(event.user_id)] if reply[4] else [])
    recorded = event.model_copy(update={"quantity": int(reply[2]), "multiplier": "1"})
    return event_answer(recorded, HoldState(reply[0].decode()), repeated=bool(reply[3]))


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
        yield from forget_ledger_holds(context, user_id, [key])
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
) -> Effects[ChargeAnswer]:
    """Check, and record `amount` units (after the multiplier) as the event `event_id`, in one step.

    Or `quantity` units, before the multiplier: of `model_slug` (or `dimensions`) by the catalogue, or the one given.
    With a backend (`backend`, or `dimensions`), its sub-cap is checked as well, where the plan has one.
    The answer names the buckets expected to pay. A repeat gets the first answer; a denial leaves no trace.
    Raises UsageLimitExceeded (or UsageDenied), EventConflict, LedgerUnavailable, RedisUnavailable with the event.
    """
    require(context, user_id, meter, 0, event_id=event_id, backend=backend)
    facts = Facts(event_id, source, reference_id, dimensions, backend, model_slug)
    cost = price(context, Units(amount, quantity, multiplier, model_slug), facts)
    amount, event = cost.amount, _priced_event(user_id, meter, cost, facts)
    if not context.settings.billing_enabled:
        (recorded,) = yield from emit_events(context, [event])
        return ChargeAnswer(**recorded.model_dump(), expected=Parts())
    named = (event.dimensions or {}).get("backend")
    spend = Spend(user_id, meter, amount, named if isinstance(named, str) else None)
    request = calls.charge(marked(context, event), outcome_ttl_ms=context.outcome_ttl_ms)
    try:
        reply = yield from gated(context, user_id, request)
    except redis_errors.RedisError as error:
        raise unconfirmed(error, [event]) from error
    if reply[0] == b"conflict":
        raise EventConflict(user_id, event_id, int(reply[2]))
    if reply[0] != b"charged":
        raise denied(check_answer(spend, standing_in_reply(reply, context.capped_backends(meter, spend.backend))))
    yield from ring([context.partition(user_id)] if reply[8] else [])
    return ChargeAnswer(
        user_id=user_id,
        meter=meter,
        event_id=event_id,
        amount=amount,
        repeated=bool(reply[7]),
        expected=expected_parts(buckets_in(reply), int(reply[6]), amount),
    )


def marked(context: Context, event: UsageEvent) -> calls.MarkedEvent:
    """A priced event as scripts append it: signed, where this process has a key."""
    text = payload(event)
    return calls.MarkedEvent(
        account=context.account(event.user_id),
        meter=event.meter,
        sub_meter=context.sub_meter(event.meter, (event.dimensions or {}).get("backend")),
        event_id=event.event_id,
        amount=amount_of(event),
        payload=text,
        signature=context.signer.sign(text) if context.signer is not None else "",
    )


def payload(event: UsageEvent) -> bytes:
    """Return the event as it travels: JSON in UTF-8."""
    return _EVENT.dump_json(event, exclude_none=True)


def amount_of(event: UsageEvent) -> int:
    """What a priced event costs, in units of its meter."""
    return multiplied(event.quantity, event.multiplier or "1")


def _append_call(context: Context, batch: Sequence[UsageEvent]) -> Call:
    """The script that appends `batch`: an event that names a hold settles it, and comes alone."""
    if batch[0].hold_key is not None:
        return _settle_call(context, batch[0])
    return calls.emit([marked(context, event) for event in batch])


def _settle_call(context: Context, event: UsageEvent) -> Call:
    """The script that settles the hold which the event names, or the one that has its id."""
    sub_meters, key = context.sub_meters(event.meter), event.hold_key or event.event_id
    return calls.settle(marked(context, event), key, sub_meters, outcome_ttl_ms=context.outcome_ttl_ms)


def _release_call(context: Context, user_id: str, meter: str, key: str, *, late: bool = False) -> Call:
    """The script that gives a hold back."""
    account, sub_meters = context.account(user_id), context.sub_meters(meter)
    return calls.release(account, meter, key, sub_meters, outcome_ttl_ms=context.outcome_ttl_ms, late=late)


def new_event_id() -> str:
    """A UUIDv7: ids in the order of time keep the index of the usage log dense (RFC 9562, section 5.7)."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = milliseconds << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & (1 << 62) - 1
    digits = f"{value:032x}"  # a UUID object would take as long as all the rest
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _recorded(event: UsageEvent, request: Call, captured_from: str | None = None) -> Effects[Any]:
    """Run a script that appends `event`; whatever Redis says against it, the error carries the event."""
    try:
        return (yield from run_script(request))
    except redis_errors.RedisError as error:
        raise unconfirmed(error, [event], captured_from) from error


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
    """Events in chunks of one script call, each partition's in order; in each round one chunk of a partition."""
    by_partition: dict[Partition, list[list[UsageEvent]]] = {}
    for event in events:
        chunks = by_partition.setdefault(context.partition(event.user_id), [])
        alone = event.hold_key is not None
        last = chunks[-1] if chunks else None
        if last is None or alone or last[0].hold_key is not None or len(last) >= context.settings.emit_chunk_events:
            chunks.append([event])
        else:
            last.append(event)
    most = max(map(len, by_partition.values()), default=0)
    return [
        [(partition, chunks[at]) for partition, chunks in by_partition.items() if at < len(chunks)]
        for at in range(most)
    ]


def _events_in(rounds: Iterable[_Batches]) -> list[UsageEvent]:
    return [event for batches in rounds for _, batch in batches for event in batch]


def _must_ring(reply: Any) -> bool:
    return bool(reply[4] if isinstance(reply, list) else reply)


def _failed(reply: Any) -> bool:
    return isinstance(reply, Exception)


def priced(context: Context, event: UsageEvent) -> UsageEvent:
    """The event with its multiplier written in, so that a later catalogue cannot change what it costs.

    Raises InvalidRequest when that makes the amount too large, and for a meter that the catalogue does not have.
    """
    if event.meter not in context.catalogue.meters:
        raise InvalidRequest("meter", event.meter, "one of " + ", ".join(sorted(context.catalogue.meters)))
    if event.multiplier is not None:
        return event
    multiplier = multiplier_of(context, (event.dimensions or {}).get("model_slug"))
    if multiplied(event.quantity, multiplier) > MAX_AMOUNT:
        raise InvalidRequest("quantity", event.quantity, f"at most {MAX_AMOUNT} after the multiplier {multiplier}")
    return event.model_copy(update={"multiplier": multiplier})


def _priced_event(user_id: str, meter: str, cost: Price, facts: Facts, *, hold_key: str | None = None) -> UsageEvent:
    """Return the event of a piece of work whose price is known. Raises InvalidRequest."""
    return _event_of(user_id, meter, cost.quantity, facts, multiplier=cost.multiplier, hold_key=hold_key)


def _event_of(
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
    return new_event(
        event_id=facts.event_id,
        user_id=user_id,
        meter=meter,
        quantity=quantity,
        multiplier=multiplier,
        occurred_at=occurred_at or datetime.now(UTC),
        source=facts.source,
        reference_id=facts.reference_id,
        hold_key=hold_key,
        dimensions=facts.all_dimensions(),
    )


def new_event(**fields: Any) -> UsageEvent:
    """A valid event. Raises InvalidRequest naming the first field that is not."""
    try:
        return UsageEvent(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"])) or "quantity"
        allowed = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("must be ")
        allowed = allowed.replace("String should match pattern", "text that matches")
        raise InvalidRequest(name, first["input"], allowed) from None


def event_answer(
    event: UsageEvent, hold: HoldState | None = None, *, repeated: bool = False, spooled: bool = False
) -> EventAnswer:
    """What a call answers about an event that it recorded."""
    return EventAnswer(
        user_id=event.user_id,
        meter=event.meter,
        event_id=event.event_id,
        amount=amount_of(event),
        hold=hold,
        repeated=repeated,
        spooled=spooled,
    )
