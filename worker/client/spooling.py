"""What the calls that record do when Redis does not confirm: keep it in the spool, where one is set, and send it later.

The operations themselves (worker/client/recording.py) know nothing of this: they raise RedisUnavailable with what may
be unsent. Here they are wrapped, so that this is put on disk instead, and the answer says so.

Order: of two calls for one user on one machine, the second begun after the first was answered, the first is in the
stream first. So a call goes to Redis only when nothing is in the spool; else it puts its own at the end. One thread of
the client sends what is there, oldest first (worker/client/sending.py). Where few items are left, a call waits a moment
for these instead, or the spool would never become empty under load. Each is recorded once, by its identity: an event
that had arrived, and one sent twice because its sender was killed before it was forgotten, is a duplicate.

Not kept are `charge`, which asks before it records, and the calls about sponsored holds: what the pool pays is decided
when it is told, and later it would decide otherwise; its holds expire by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import groupby
from math import inf
from time import monotonic
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

from pydantic import ValidationError
from redis import exceptions as redis_errors

from schemas.answers import CreditAnswer, EventAnswer, HoldAnswer, HoldState
from schemas.events import UsageEvent
from worker.client import recording as client_recording
from worker.client import sponsorship as client_sponsorship
from worker.client.arguments import amounts_of
from worker.client.effects import DOWN, Ask, AskSpool, Busy, Effects, Pause, Send, logger, unconfirmed
from worker.client.loading import forget_ledger_holds
from worker.client.recording import append_events, event_answer, payload
from worker.client.session import Context, Running
from worker.client.spool_items import Item, Kept
from worker.crash import crash_point
from worker.errors import (
    EventConflict,
    InvalidRequest,
    LedgerUnavailable,
    RedisUnavailable,
    SpoolUnavailable,
)
from worker.rules import sponsorship

P = ParamSpec("P")
T = TypeVar("T")

# What is sent in one go, unless the caller says otherwise: a fraction of a second, most of it for the disk.
SENT_AT_ONCE = 1_000
# How long `send_spooled` waits for another thread or process that is sending.
_TURN_SECONDS = 0.2
# With so few items left a call waits for the spool to become empty, for so long. Beyond it, it puts its own at the end.
_FEW = SENT_AT_ONCE
_PATIENCE_SECONDS = 0.25
_POLL_SECONDS = 0.005
# After Redis was away, calls that can be spooled do not wait for it for so long: the sender finds out.
_AWAY_SECONDS = 1.0


class Sent(NamedTuple):
    """How many items were sent; `left` is True when some are still in the spool."""

    items: int
    left: bool


class _NotAsked(redis_errors.ConnectionError):
    """Redis was not asked: this one has to wait."""


# ---------------------------------------------------------------------------------------------------------------------
# Recording


def kept(
    operation: Callable[Concatenate[Context, P], Effects[EventAnswer]],
) -> Callable[Concatenate[Context, P], Effects[EventAnswer]]:
    """The same operation, but what Redis does not confirm is kept in the spool, where one is set.

    Raises RedisUnavailable with the event as before where none is set or where it is full.
    """

    @wraps(operation)
    def keeping(context: Context, /, *args: P.args, **kwargs: P.kwargs) -> Effects[EventAnswer]:
        try:
            return (yield from _in_turn(context, operation(context, *args, **kwargs)))
        except RedisUnavailable as error:
            yield from _keep(context, error, _items_of(error))
            yield from _count_in_ledger(context, error.events, error.captured_from)
            return event_answer(context, error.events[0], spooled=True)

    return keeping


def _count_in_ledger(context: Context, events: Iterable[UsageEvent], captured_from: str | None = None) -> Effects[None]:
    """Let holds that the ledger granted count as what their work cost, until the events are sent and applied.

    A hold whose parts went to the spool counts as these at least, and once it is settled as these and the rest. Should
    this fail, it counts as before.
    """
    if not context.holds_in_ledger:
        return
    parts = context.spooled_parts
    for event in events:
        user_id, key = event.user_id, captured_from or event.hold_key
        if key is None:
            continue
        _, units = amounts_of(context, event.meter, client_recording.price_in(event))
        if captured_from is not None:
            units = parts.add(user_id, key, event.event_id, units)
        else:
            units += parts.units(user_id, key)
        yield from _restate_hold(user_id, key, units, is_over=captured_from is None)


def _restate_hold(user_id: str, key: str, units: int, *, is_over: bool) -> Effects[None]:
    """Let a hold that the ledger granted count as `units`; while it is not over, as these at least."""
    try:
        yield Ask(lambda ledger: ledger.restate_hold(user_id, key, units, is_over=is_over))
    except LedgerUnavailable as error:
        logger.warning("hold %s counts in full until it expires: %s", key, error)


emit = kept(client_recording.emit)
capture = kept(client_recording.capture)
capture_event = kept(client_recording.capture_event)
settle = kept(client_recording.settle)
settle_event = kept(client_recording.settle_event)


def emit_events(context: Context, events: Iterable[UsageEvent]) -> Effects[list[EventAnswer]]:
    """Record many events, in order per user. See `recording.emit_events`; those that Redis does not confirm are kept
    in the spool, where one is set, all of them or none."""
    priced = client_recording.all_priced(context, events)
    try:
        return (yield from _in_turn(context, append_events(context, priced)))
    except RedisUnavailable as error:
        yield from _keep(context, error, _items_of(error))
        yield from _count_in_ledger(context, error.events)
        spooled = set(map(id, error.events))
        return [event_answer(context, event, spooled=id(event) in spooled) for event in priced]


def release(context: Context, user_id: str, meter: str, key: str) -> Effects[HoldAnswer]:
    """Give a hold back. See `recording.release`; what Redis does not confirm is kept in the spool, where one is set.
    The hold then stands until it is sent, or expires before that; and it stands if it was reserved again meanwhile.
    """
    try:
        return (yield from _in_turn(context, client_recording.release(context, user_id, meter, key)))
    except RedisUnavailable as error:
        yield from _keep(context, error, [_release_item(user_id, meter, key)])
        if context.holds_in_ledger:
            if parts := context.spooled_parts.units(user_id, key):
                yield from _restate_hold(user_id, key, parts, is_over=True)
            else:
                yield from forget_ledger_holds(context, {user_id: [key]})
        return HoldAnswer(
            user_id=user_id, meter=meter, key=key, state=HoldState.UNKNOWN, amount=0, left=0, spooled=True
        )


def give_back(context: Context, reserved: Running[HoldAnswer]) -> Effects[None]:
    """Give back a hold that nobody received; not one that another call made, or was told of. The rest: as `release`."""
    held = reserved.answer
    assert reserved.undo is not None, "the last step of a reserve is the one that holds"
    try:
        try:
            yield from reserved.undo()
        except redis_errors.RedisError as error:
            raise unconfirmed(error) from error
    except RedisUnavailable as error:
        yield from _keep(context, error, [_release_item(held.user_id, held.meter, held.key)])


def _release_item(user_id: str, meter: str, key: str) -> Item:
    return Item("release", json.dumps({"user_id": user_id, "meter": meter, "key": key}))


def credit_pool(
    context: Context, request_id: str, paid: int, *, traceparent: str | None = None
) -> Effects[CreditAnswer]:
    """See `sponsorship.credit_pool`; what Redis does not confirm is kept in the spool, where one is set."""
    try:
        credit = client_sponsorship.credit_pool(context, request_id, paid, traceparent=traceparent)
        return (yield from _in_turn(context, credit))
    except RedisUnavailable as error:
        named = json.dumps({"request_id": request_id, "paid": paid})
        yield from _keep(context, error, [Item("credit", named, traceparent=error.traceparent)])
        share = sponsorship.credit_of(paid, context.catalogue.sponsorship.paid_share_percent)
        return CreditAnswer(request_id=request_id, paid=paid, credited=share, spooled=True)


def _in_turn(context: Context, steps: Effects[T]) -> Effects[T]:
    """Carry out the steps once nothing is in the spool; else let them fail at the first, as if Redis were away."""
    if context.settings.spool_path is None or (yield from _may_go(context)):
        return (yield from steps)
    try:
        next(steps)
    except StopIteration as done:
        answer: T = done.value
        return answer
    steps.throw(_NotAsked("earlier events wait in the spool, or Redis was away a moment ago"))
    raise AssertionError("an operation went on though Redis is away")


def _may_go(context: Context) -> Effects[bool]:
    """True when nothing is in the spool, or nothing any more."""
    if context.takes_redis_for_away:
        return False
    additions = context.spooled_parts.additions
    try:
        if (yield AskSpool(lambda spool: spool.has_no_file(), quick=True)):
            context.spooled_parts.all_sent(additions)
            return True
        left = yield AskSpool(lambda spool: spool.length())
    except SpoolUnavailable as error:
        # Better out of order than not at all.
        logger.error("events may overtake what is in the spool: %s", error)
        return True
    if not left:
        return True
    yield Send()
    deadline = monotonic() + _PATIENCE_SECONDS
    while left <= _FEW and monotonic() < deadline and not context.takes_redis_for_away:
        yield Pause(_POLL_SECONDS)
        if (yield AskSpool(lambda spool: spool.has_no_file(), quick=True)):
            return True
    return False


def _keep(context: Context, error: RedisUnavailable, items: Sequence[Item]) -> Effects[None]:
    """Put on disk what Redis did not confirm. Raises RedisUnavailable where that cannot be done, or would not help."""
    cause = error.__cause__
    if context.settings.spool_path is None or not isinstance(cause, (*DOWN, Busy)):
        raise error
    if not isinstance(cause, _NotAsked | Busy):
        context.away_until = monotonic() + _AWAY_SECONDS
    try:
        yield AskSpool(lambda spool: spool.keep(items))
    except SpoolUnavailable as full:
        raise RedisUnavailable(f"{cause}; {full}", error.events, error.captured_from) from full
    crash_point("after_spooling")
    if (yield Send()):
        logger.warning("events are kept in %s until Redis takes them: %s", context.settings.spool_path, cause)


def _items_of(error: RedisUnavailable) -> list[Item]:
    return [
        Item("event", payload(event).decode(), error.captured_from, event.traceparent or error.traceparent)
        for event in error.events
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Sending


def send(context: Context, limit: int = SENT_AT_ONCE, wait_seconds: float = _TURN_SECONDS) -> Effects[Sent]:
    """Send what is in the spool, oldest first, at most `limit` items; each leaves it once Redis has confirmed it.

    One thread or process of the machine sends at a time; this one waits for its turn for `wait_seconds`.
    Raises RedisUnavailable, and SpoolUnavailable also when it did not get its turn. If killed, what was sent and not
    forgotten is sent again, and is a duplicate.
    """
    if type(limit) is not int or limit < 1:
        raise InvalidRequest("limit", limit, "a whole number from 1")
    if type(wait_seconds) not in {int, float} or not 0 <= wait_seconds < inf:
        raise InvalidRequest("wait_seconds", wait_seconds, "a number of seconds from 0")
    deadline = monotonic() + wait_seconds
    while (sent := (yield from send_in_turn(context, limit))) is None:
        if monotonic() >= deadline:
            raise SpoolUnavailable(str(context.settings.spool_path), "another process is sending it")
        yield Pause(_POLL_SECONDS)
    return sent


def send_in_turn(context: Context, limit: int) -> Effects[Sent | None]:
    """The same without a wait: None while another thread or process is sending."""
    if (yield AskSpool(lambda spool: spool.is_empty())):
        return Sent(0, left=False)
    turn = yield AskSpool(lambda spool: spool.take_turn())
    if turn is None:
        return None
    try:
        found: list[Kept] = yield AskSpool(lambda spool: spool.oldest(limit))
        confirmed: list[int] = []
        error: Exception | None = None
        for run in _runs(found):
            try:
                yield from _send_run(context, [each.item for each in run])
            except Exception as failed:  # noqa: BLE001 - whatever it is, what is confirmed must be forgotten first
                error = failed
                if isinstance(failed, RedisUnavailable):
                    unsent = set(map(_identity, failed.events))
                    confirmed += [each.id for each in run if unsent and _identity(_event_in(each.item)) not in unsent]
                break
            confirmed += [each.id for each in run]
        crash_point("after_sending_the_spool")
        yield AskSpool(lambda spool: spool.forget(confirmed))
    finally:
        turn.close()
    if error is not None:
        if isinstance(error.__cause__, DOWN):
            context.away_until = monotonic() + _AWAY_SECONDS
        raise error
    context.away_until = 0.0
    return Sent(len(confirmed), left=not (yield AskSpool(lambda spool: spool.is_empty())))


def _runs(found: Sequence[Kept]) -> list[list[Kept]]:
    """What is to be sent in one go: events that stand beside each other; each other item alone."""
    alone = (each.id if each.item.kind != "event" or each.item.captured_from else 0 for each in found)
    return [[each for each, _ in run] for _, run in groupby(zip(found, alone, strict=True), key=lambda pair: pair[1])]


def _send_run(context: Context, items: Sequence[Item]) -> Effects[None]:
    """Send items in order. Raises RedisUnavailable with the events that Redis has not confirmed."""
    first = items[0]
    if first.kind == "credit":
        named = json.loads(first.content)
        yield from client_sponsorship.credit_pool(context, **named, traceparent=first.traceparent)
    elif first.kind == "release":
        named = json.loads(first.content)
        try:
            yield from client_recording.release(context, **named, late=True)
            if context.spooled_parts.units(named["user_id"], named["key"]):
                # What the ledger kept for its parts: they were sent before it.
                yield from forget_ledger_holds(context, {named["user_id"]: [named["key"]]})
        except InvalidRequest as error:
            logger.error("a hold stays until it expires: %s", error)  # of a meter that a newer catalogue lacks
        except RedisUnavailable as error:
            if isinstance(error.__cause__, DOWN):
                raise
            # Nothing waits for it but its hold, which expires; everything behind it would.
            logger.error("a hold stays until it expires: %s", error)
    elif first.captured_from is not None:
        event = _event_in(first)
        try:
            yield from client_recording.capture_event(context, event, first.captured_from)
        except EventConflict:
            # Nobody is there to be told: as an event of its own it becomes a dead letter, which operators see.
            logger.error("event %s was captured before with another amount; it becomes a dead letter", event.event_id)
            yield from append_events(context, [event])
    else:
        yield from append_events(context, [_event_in(item) for item in items])


def _event_in(item: Item) -> UsageEvent:
    try:
        return UsageEvent.model_validate_json(item.content).traced(item.traceparent)
    except ValidationError as error:
        # Kept by a newer release, which is to send it.
        raise SpoolUnavailable("of this machine", f"an event in it is unknown to this release: {error}") from error


def _identity(event: UsageEvent) -> tuple[str, str]:
    return event.user_id, event.event_id
