"""What the calls that record do when Redis does not confirm: keep it in the spool, where one is set, and send it later.

The operations themselves (worker/client/recording.py) know nothing of this: they raise RedisUnavailable with what may
be unsent. Here they are wrapped, so that this is put on disk instead, and the answer says so.

Order: of two calls on one machine, the second begun after the first was answered, the first is in the stream first. So
a call goes to Redis only when nothing is in the spool; else it sends what is there, a bounded part of it, and puts
its own at the end if any is left. Each is recorded once, by its identity: an event that had arrived, and one sent twice
because its sender was killed before it was forgotten, is a duplicate.

Not kept are `charge`, which asks before it records, and the calls about sponsored holds: what the pool pays is decided
when it is told, and later it would decide otherwise; its holds expire by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import groupby
from time import monotonic
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

from pydantic import ValidationError
from redis import exceptions as redis_errors

from schemas.answers import CreditAnswer, EventAnswer, HoldAnswer, HoldState
from schemas.events import UsageEvent
from worker.client import recording as client_recording
from worker.client import sponsorship as client_sponsorship
from worker.client.effects import DOWN, Ask, AskSpool, Busy, Effects, SpoolTurn, logger
from worker.client.loading import forget_ledger_holds
from worker.client.recording import append_events, event_answer, payload
from worker.client.session import Context
from worker.client.spool_items import Item, Kept
from worker.client.turns import Turn
from worker.crash import crash_point
from worker.errors import (
    BillingError,
    EventConflict,
    InvalidRequest,
    LedgerUnavailable,
    RedisUnavailable,
    SpoolUnavailable,
)
from worker.rules import sponsorship

P = ParamSpec("P")
T = TypeVar("T")

# What one call sends beside its own: a few milliseconds, most of them for the disk.
SENT_A_CALL = 100
# How long `send_spooled` waits for another thread or process that is sending: a little longer than those milliseconds.
_TURN_SECONDS = 0.2
# How long a call waits while another call of its process is sending. Then it puts its own behind what is there, which
# costs less than to wait on; but where little is left, waiting is what lets the spool become empty under load.
PATIENCE_SECONDS = 0.1
# After Redis was away, calls that can be spooled do not wait for it for so long: one call a second finds out.
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
            yield from _settle_in_ledger(context, error.events[0])
            return event_answer(error.events[0], spooled=True)

    return keeping


def _settle_in_ledger(context: Context, event: UsageEvent) -> Effects[None]:
    """Let a hold that the ledger granted count as what the work cost, until the event is sent and applied.

    Should this fail, it counts as what was held.
    """
    key = event.hold_key
    if key is None or not context.holds_in_ledger:
        return
    amount = client_recording.amount_of(event)
    try:
        yield Ask(lambda ledger: ledger.settle_hold(event.user_id, key, amount))
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
    priced = [client_recording.priced(context, event) for event in events]
    try:
        return (yield from _in_turn(context, append_events(context, priced)))
    except RedisUnavailable as error:
        yield from _keep(context, error, _items_of(error))
        spooled = set(map(id, error.events))
        return [event_answer(event, spooled=id(event) in spooled) for event in priced]


def release(context: Context, user_id: str, meter: str, key: str) -> Effects[HoldAnswer]:
    """Give a hold back. See `recording.release`; what Redis does not confirm is kept in the spool, where one is set.
    The hold then stands until it is sent, or expires before that; and it stands if it was reserved again meanwhile.
    """
    return (yield from _release(context, user_id, meter, key, late=False))


def give_back(context: Context, answer: HoldAnswer) -> Effects[HoldAnswer]:
    """Release a hold that nobody received; not if another call has reserved it again meanwhile, and has it in hand."""
    released = yield from _release(context, answer.user_id, answer.meter, answer.key, late=True)
    if context.holds_in_ledger:
        yield from forget_ledger_holds(context, answer.user_id, [answer.key])
    return released


def _release(context: Context, user_id: str, meter: str, key: str, *, late: bool) -> Effects[HoldAnswer]:
    try:
        return (yield from _in_turn(context, client_recording.release(context, user_id, meter, key, late=late)))
    except RedisUnavailable as error:
        named = {"user_id": user_id, "meter": meter, "key": key}
        yield from _keep(context, error, [Item("release", json.dumps(named))])
        if context.holds_in_ledger:
            yield from forget_ledger_holds(context, user_id, [key])
        return HoldAnswer(**named, state=HoldState.UNKNOWN, amount=0, left=0, spooled=True)


def credit_pool(context: Context, request_id: str, paid: int) -> Effects[CreditAnswer]:
    """See `sponsorship.credit_pool`; what Redis does not confirm is kept in the spool, where one is set."""
    try:
        return (yield from _in_turn(context, client_sponsorship.credit_pool(context, request_id, paid)))
    except RedisUnavailable as error:
        yield from _keep(context, error, [Item("credit", json.dumps({"request_id": request_id, "paid": paid}))])
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
    """True when nothing is in the spool, or nothing any more. One call of a process sends, the others wait for it."""
    if context.takes_redis_for_away:
        return False
    try:
        if (yield AskSpool(lambda spool: spool.has_no_file(), quick=True)):
            return True
        if (yield AskSpool(lambda spool: spool.is_empty())):
            return True
    except SpoolUnavailable as error:
        # Better out of order than not at all.
        logger.error("events may overtake what is in the spool: %s", error)
        return True
    deadline = monotonic() + PATIENCE_SECONDS
    try:
        while (turn := (yield SpoolTurn())) is None:
            if (yield AskSpool(lambda spool: spool.is_empty())):
                return True
            if monotonic() >= deadline:
                return False
        return not (yield from _send_having(context, turn)).left
    except BillingError as error:
        logger.warning("what is in the spool stays there: %s", error)
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
    if not context.spooled:
        logger.warning("events are kept in %s until Redis takes them: %s", context.settings.spool_path, cause)
    context.spooled = True


def _items_of(error: RedisUnavailable) -> list[Item]:
    return [Item("event", payload(event).decode(), error.captured_from) for event in error.events]


# ---------------------------------------------------------------------------------------------------------------------
# Sending


def send(context: Context, limit: int = SENT_A_CALL, wait_seconds: float = _TURN_SECONDS) -> Effects[Sent]:
    """Send what is in the spool, oldest first, at most `limit` items; each leaves it once Redis has confirmed it.

    One thread or process of the machine sends at a time; this one waits for its turn for `wait_seconds`.
    Raises RedisUnavailable, and SpoolUnavailable also when it did not get its turn. If killed, what was sent and not
    forgotten is sent again, and is a duplicate.
    """
    may_hold, context.spooled = context.spooled, False  # first: a thread that keeps something meanwhile sets it again
    try:
        sent = yield from _send_oldest(context, limit, wait_seconds)
        may_hold = sent.left
    except RedisUnavailable as error:
        may_hold = True
        if isinstance(error.__cause__, DOWN):
            context.away_until = monotonic() + _AWAY_SECONDS
        raise
    finally:
        if may_hold:
            context.spooled = True
    return sent


def _send_oldest(context: Context, limit: int, wait_seconds: float) -> Effects[Sent]:
    """Send the oldest items; see `send`."""
    if (yield AskSpool(lambda spool: spool.is_empty())):
        return Sent(0, left=False)
    turn = yield AskSpool(lambda spool: spool.take_turn(wait_seconds))
    try:
        found: list[Kept] = yield AskSpool(lambda spool: spool.oldest(limit))
        confirmed: list[int] = []
        error: RedisUnavailable | None = None
        for run in _runs(found):
            try:
                yield from _send_run(context, [each.item for each in run])
            except RedisUnavailable as failed:
                error = failed
                unsent = set(map(_identity, failed.events))
                confirmed += [each.id for each in run if unsent and _identity(_event_in(each.item)) not in unsent]
                break
            confirmed += [each.id for each in run]
        crash_point("after_sending_the_spool")
        yield AskSpool(lambda spool: spool.forget(confirmed))
    finally:
        turn.close()
    if error is not None:
        raise error
    context.away_until = 0.0
    return Sent(len(confirmed), left=len(found) == limit)


def _send_having(context: Context, turn: Turn) -> Effects[Sent]:
    """Send a part of what is in the spool, and end the turn for that."""
    try:
        return (yield from send(context, wait_seconds=0))
    finally:
        turn.end(None)


def then_send(context: Context, steps: Effects[T]) -> Effects[T]:
    """The same steps; where they succeed, a part of what this client has spooled is sent after them."""
    answer = yield from steps
    if context.spooled and not context.takes_redis_for_away:
        try:
            if (turn := (yield SpoolTurn())) is not None:  # else another call of this process has just sent
                yield from _send_having(context, turn)
        except BillingError as error:  # the call itself has succeeded
            logger.warning("what is in the spool stays there: %s", error)
    return answer


def _runs(found: Sequence[Kept]) -> list[list[Kept]]:
    """What is to be sent in one go: events that stand beside each other; each other item alone."""
    alone = (each.id if each.item.kind != "event" or each.item.captured_from else 0 for each in found)
    return [[each for each, _ in run] for _, run in groupby(zip(found, alone, strict=True), key=lambda pair: pair[1])]


def _send_run(context: Context, items: Sequence[Item]) -> Effects[None]:
    """Send items in order. Raises RedisUnavailable with the events that Redis has not confirmed."""
    first = items[0]
    if first.kind == "credit":
        yield from client_sponsorship.credit_pool(context, **json.loads(first.content))
    elif first.kind == "release":
        try:
            yield from client_recording.release(context, **json.loads(first.content), late=True)
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
        return UsageEvent.model_validate_json(item.content)
    except ValidationError as error:
        # Kept by a newer release, which is to send it.
        raise SpoolUnavailable("of this machine", f"an event in it is unknown to this release: {error}") from error


def _identity(event: UsageEvent) -> tuple[str, str]:
    return event.user_id, event.event_id
