"""What each pre-flight call does, without saying how its commands travel; see worker/client/effects.py.

Every call is one Lua round trip; a balance that is not cached costs a load first.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from redis import exceptions as redis_errors

from config.log import name_in_logs
from schemas.answers import (
    ChargeAnswer,
    CheckAnswer,
    EventAnswer,
    HoldAnswer,
    HoldState,
    Parts,
    Reason,
    Remaining,
    RoutingAnswer,
)
from schemas.events import ID_CHARACTERS, ID_PATTERN, MAX_AMOUNT, Scalar, UsageEvent, multiplied
from worker.client.effects import (
    DOWN,
    Ask,
    Command,
    Context,
    Effects,
    Pipeline,
    as_down,
    logger,
    ring,
    run_loading,
    run_script,
    run_scripts,
    take_lease,
)
from worker.crash import crash_point
from worker.errors import (
    EventConflict,
    HoldClosed,
    HoldConflict,
    InvalidRequest,
    LedgerUnavailable,
    RedisUnavailable,
    UsageDenied,
)
from worker.keyspace import keys
from worker.keyspace.cache import cache_text, cache_ttl_ms, unknown_account_text
from worker.keyspace.keys import RING_TTL_MS
from worker.keyspace.scripts import Call, call
from worker.rules import account as rules_account
from worker.rules import routing
from worker.rules.account import Account, backend_of
from worker.rules.preflight import (
    Asked,
    MeterStanding,
    answer_without_balance,
    buckets_in,
    check_answer,
    denied,
    expected_parts,
    remaining_answer,
    standing_in_ledger,
    standing_in_reply,
)

_is_identifier = re.compile(ID_PATTERN).fullmatch

MAX_HOLD_TTL_SECONDS = 86_400
RELAY_METER = "relay_credits"


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def check(
    context: Context, user_id: str, meter: str, amount: int = 1, *, backend: str | None = None
) -> Effects[CheckAnswer]:
    """May `user_id` spend `amount` units of `meter` now, given what is pending? Changes nothing.

    `amount` is after the multiplier. With `backend`, its sub-cap must have room as well, where the plan has one.
    The answer says why; it is advice, only `reserve` and `charge` promise.
    Raises LedgerUnavailable when the balance is not cached and Postgres does not answer.
    """
    answer, _ = yield from check_standing(context, user_id, meter, amount, backend=backend)
    return answer


def check_standing(
    context: Context, user_id: str, meter: str, amount: int, *, backend: str | None = None
) -> Effects[tuple[CheckAnswer, MeterStanding | None]]:
    """What `check` answers, and where the account stands: None where no balance was looked at, or there is none."""
    _require(context, user_id, meter, amount, backend=backend)
    asked = Asked(user_id, meter, amount, backend)
    if not context.settings.billing_enabled:
        return answer_without_balance(asked, Reason.BILLING_DISABLED, allowed=True), None
    backends = _capped(context, meter, backend)
    try:
        reply = yield from _gated(context, user_id, _check_call(context, asked, backends))
    except DOWN as error:
        return (yield from _without_redis(context, asked, error))
    standing = standing_in_reply(reply, backends)
    return check_answer(asked, standing), standing


def remaining(
    context: Context, user_id: str, meter: str = RELAY_METER, *, tier: str | None = None
) -> Effects[Remaining]:
    """What is left to `user_id` on `meter`, as a whole and per backend with a sub-cap, at one moment.

    `tier` is the plan that the request carries: an account on another plan is put on it first. Else nothing changes.
    Nothing is left to an account that nobody opened.
    Raises LedgerUnavailable as `check` does, and RedisUnavailable unless the ledger may answer instead.
    """
    _require(context, user_id, meter, 0)
    if tier is not None:
        yield from _take_tier(context, user_id, meter, tier)
    if not context.settings.billing_enabled:
        return Remaining(user_id=user_id, meter=meter, kind="unlimited", limit=None, used=0, pending=0, remaining=None)
    backends = context.catalogue.capped_backends.get(meter, ())
    try:
        reply = yield from _gated(context, user_id, _check_call(context, Asked(user_id, meter, 0), backends))
    except DOWN as error:
        if context.settings.redis_down != "ledger":
            raise RedisUnavailable(str(error)) from error
        logger.warning("Redis is down, reading the ledger: %s", error)
        view = yield Ask(lambda ledger: ledger.account(user_id))
        return remaining_answer(user_id, meter, standing_in_ledger(view.account, meter, view.holds))
    return remaining_answer(user_id, meter, standing_in_reply(reply, backends))


def plan_backend(
    context: Context,
    user_id: str,
    preference: str,
    *,
    has_hardware: bool,
    meter: str = RELAY_METER,
    tier: str | None = None,
) -> Effects[RoutingAnswer]:
    """Which backend should do a request of `user_id`: by `preference` (one of `routing.PREFERENCES`), by what is left,
    and by whether the host has hardware of its own? Advice: reserve or charge on the backend it names.

    `tier` and what is raised: as in `remaining`.
    """
    if preference not in routing.PREFERENCES:
        raise InvalidRequest("preference", preference, "one of " + ", ".join(routing.PREFERENCES))
    left = yield from remaining(context, user_id, meter, tier=tier)
    on_gemini = next((each.remaining for each in left.backends if each.backend == routing.GEMINI), None)
    decision = routing.plan_backend(left.remaining, on_gemini, has_hardware, preference)
    return RoutingAnswer(
        user_id=user_id,
        meter=meter,
        preference=preference,
        **decision._asdict(),
        remaining=left.remaining,
        sub_remaining=on_gemini,
    )


def reserve(
    context: Context,
    user_id: str,
    meter: str,
    amount: int,
    key: str,
    ttl_seconds: int | None = None,
    *,
    backend: str | None = None,
) -> Effects[HoldAnswer]:
    """Check, and set `amount` units aside under `key` until settled, released, or `ttl_seconds` have passed.

    With `backend`, its sub-cap is checked and held as well, where the plan has one.
    Repeated with the same amount and backend it returns the same hold, so a lost reply does no harm.
    Raises UsageLimitExceeded (or UsageDenied) with the check's answer, HoldConflict when the key holds something
    else, HoldClosed when it is over, LedgerUnavailable as `check` does.
    """
    _require(context, user_id, meter, amount, key=key, backend=backend)
    asked = Asked(user_id, meter, amount, backend)
    ttl = hold_ttl_seconds(context, ttl_seconds)
    force = "" if context.settings.billing_enabled else "1"
    try:
        reply = yield from _gated(context, user_id, _reserve_call(context, asked, key, ttl, force))
    except DOWN as error:
        return (yield from _reserve_without_redis(context, asked, key, ttl, error))
    status = reply[0]
    if status == b"held":
        crash_point("after_reserve")
        state, expires = HoldState.HELD, time_of(int(reply[3]))
        return HoldAnswer(
            user_id=user_id,
            meter=meter,
            key=key,
            state=state,
            amount=int(reply[1]),
            left=int(reply[2]),
            expires_at=expires,
            backend=backend,
        )
    if status == b"conflict":
        raise HoldConflict(user_id, key, reply[1].decode(), int(reply[2]), backend_of(reply[3].decode()))
    if status == b"closed":
        raise HoldClosed(user_id, key, HoldState(reply[1].decode()))
    raise denied(check_answer(asked, standing_in_reply(reply, _capped(context, meter, backend))))


# ---------------------------------------------------------------------------------------------------------------------
# Recording


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
    event = new_event(
        event_id=event_id or new_event_id(),
        user_id=user_id,
        meter=meter,
        quantity=quantity,
        multiplier=multiplier or context.catalogue.multiplier((dimensions or {}).get("model_slug")),
        occurred_at=occurred_at or datetime.now(UTC),
        source=source,
        reference_id=reference_id,
        hold_key=hold_key,
        dimensions=dict(dimensions) if dimensions is not None else None,
    )
    (answer,) = yield from emit_events(context, [event])
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
        requests = [_append_call(context, partition, batch) for partition, batch in batches]
        try:
            replies = yield from run_scripts(requests)
        except redis_errors.RedisError as error:
            raise RedisUnavailable(str(error), _events_in(rounds[done:])) from error
        crash_point("after_emit")
        refused = [(as_down(reply), batch) for reply, batch in zip(replies, batches, strict=True) if _failed(reply)]
        if refused:
            # What waiting does not mend comes first: the caller must hear of it.
            reason = min((error for error, _ in refused), key=lambda error: isinstance(error, DOWN))
            unsent = [batch for _, batch in refused]
            raise RedisUnavailable(str(reason), _events_in([unsent, *rounds[done + 1 :]])) from reason
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
    amount: int,
    *,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
) -> Effects[EventAnswer]:
    """A part of the hold `key` becomes the event `event_id` (a page of a document); the rest stays held.

    `amount` is after the multiplier and counts in full, even beyond what was left. It counts against the sub-cap of the
    backend that did the work (`backend`, or `dimensions`), whichever it was held on. A repeat gets the first answer.
    Raises EventConflict when the id was captured with another amount, RedisUnavailable with the event.
    """
    _require(context, user_id, meter, amount, key=key, event_id=event_id, backend=backend)
    if event_id == key:
        raise InvalidRequest("event_id", event_id, "another than the hold's key, which settle uses")
    facts = _facts(dimensions, backend)
    event = _settled_event(user_id, meter, event_id, amount, None, source, reference_id, facts)
    return (yield from capture_event(context, event, key))


def capture_event(context: Context, event: UsageEvent, key: str) -> Effects[EventAnswer]:
    """Send an event that is a part of the hold `key`. See `capture`."""
    user_id, meter, partition = event.user_id, event.meter, context.partition(event.user_id)
    names = [keys.pending(partition, user_id, meter), keys.hold(partition, user_id, key)]
    names += [keys.stream(partition), keys.rung(partition)]
    args: list[str | int | bytes] = [key, event.event_id, amount_of(event), *_signed_payload(context, event)]
    args += (RING_TTL_MS, context.outcome_ttl_ms)
    counted = _sub_meter_of(context, event)
    for sub_meter in _sub_meters(context, meter):
        names.append(keys.pending(partition, user_id, sub_meter))
        if sub_meter == counted:
            args.append(len(names))
    reply = yield from _recorded(event, call("capture", names, args), captured_from=key)
    if reply[0] == b"conflict":
        raise EventConflict(user_id, event.event_id, int(reply[1]))
    yield from ring([partition] if reply[3] else [])
    return event_answer(event, HoldState(reply[0].decode()), repeated=bool(reply[2]))


def settle(
    context: Context,
    user_id: str,
    meter: str,
    key: str,
    actual: int,
    *,
    event_id: str | None = None,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
) -> Effects[EventAnswer]:
    """The hold `key` becomes one event over `actual` units (after the multiplier), which may be less or more.

    It counts against the sub-cap of the backend that did the work (`backend`, or `dimensions`), not of the hold's.

    Always records, also after release or expiry: the work was done. The event's id is `key` unless given; a repeat
    gets the first answer. Raises RedisUnavailable with the event; the hold then stays until it expires.
    """
    event = settling_event(
        context,
        user_id,
        meter,
        key,
        actual,
        event_id=event_id,
        source=source,
        reference_id=reference_id,
        dimensions=dimensions,
        backend=backend,
    )
    return (yield from settle_event(context, event))


def settling_event(
    context: Context,
    user_id: str,
    meter: str,
    key: str,
    actual: int,
    *,
    event_id: str | None = None,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
) -> UsageEvent:
    """The event that settles a hold, checked. Raises InvalidRequest or ValueError before anything is sent."""
    _require(context, user_id, meter, actual, key=key, event_id=event_id or key, backend=backend)
    facts = _facts(dimensions, backend)
    return _settled_event(user_id, meter, event_id or key, actual, key, source, reference_id, facts)


def settle_event(context: Context, event: UsageEvent) -> Effects[EventAnswer]:
    """Send an event that settles the hold it names. See `settle`."""
    partition = context.partition(event.user_id)
    reply = yield from _recorded(event, _settle_call(context, partition, event))
    yield from _release_elsewhere(context, event, reply)
    yield from ring([partition] if reply[4] else [])
    recorded = event.model_copy(update={"quantity": int(reply[2]), "multiplier": "1"})
    return event_answer(recorded, HoldState(reply[0].decode()), repeated=bool(reply[3]))


def release(context: Context, user_id: str, meter: str, key: str, *, late: bool = False) -> Effects[HoldAnswer]:
    """Give the hold `key` back. The answer's state is the one before: `settled` means there was nothing to give back.

    Releasing a key never seen closes it, so that a reserve which is still on its way cannot revive it. A `late` one,
    which was told before an outage was over, does not; and it leaves alone what was reserved again since.
    Raises RedisUnavailable; the hold then stays until it expires.
    """
    _require(context, user_id, meter, 0, key=key)
    try:
        reply = yield from run_script(release_call(context, user_id, meter, key, late=late))
    except redis_errors.RedisError as error:
        raise RedisUnavailable(str(error)) from error
    state = HoldState(reply[0].decode())
    if (
        state is HoldState.UNKNOWN
        and not late
        and context.settings.redis_down == "ledger"
        and context.settings.database_url
    ):
        # It may be a hold that the ledger granted while Redis was down.
        yield from _forget_ledger_holds(context, user_id, [key])
    return HoldAnswer(user_id=user_id, meter=meter, key=key, state=state, amount=int(reply[2]), left=0)


def charge(
    context: Context,
    user_id: str,
    meter: str,
    amount: int,
    event_id: str,
    *,
    source: str | None = None,
    reference_id: str | None = None,
    dimensions: Mapping[str, Scalar] | None = None,
    backend: str | None = None,
) -> Effects[ChargeAnswer]:
    """Check, and record `amount` units (after the multiplier) as the event `event_id`, in one step.

    With a backend (`backend`, or `dimensions`), its sub-cap is checked as well, where the plan has one.
    The answer names the buckets expected to pay. A repeat gets the first answer; a denial leaves no trace.
    Raises UsageLimitExceeded (or UsageDenied), EventConflict, LedgerUnavailable, RedisUnavailable with the event.
    """
    _require(context, user_id, meter, amount, event_id=event_id, backend=backend)
    facts = _facts(dimensions, backend)
    event = _settled_event(user_id, meter, event_id, amount, None, source, reference_id, facts)
    if not context.settings.billing_enabled:
        (recorded,) = yield from emit_events(context, [event])
        return ChargeAnswer(**recorded.model_dump(), expected=Parts())
    partition = context.partition(user_id)
    named = (event.dimensions or {}).get("backend")
    asked = Asked(user_id, meter, amount, named if isinstance(named, str) else None)
    backends = _capped(context, meter, asked.backend)
    names = _gate_keys(partition, user_id, meter)
    names += [keys.charge(partition, user_id, event_id), keys.stream(partition), keys.rung(partition)]
    sub_meters = [rules_account.sub_meter(meter, each) for each in backends]
    names += _sub_keys(partition, user_id, sub_meters)
    args: list[str | int | bytes] = [meter, amount, event_id, *_signed_payload(context, event)]
    args += (RING_TTL_MS, context.outcome_ttl_ms, *sub_meters)
    try:
        reply = yield from _gated(context, user_id, call("charge", names, args))
    except redis_errors.RedisError as error:
        raise RedisUnavailable(str(error), [event]) from error
    if reply[0] == b"conflict":
        raise EventConflict(user_id, event_id, int(reply[2]))
    if reply[0] != b"charged":
        raise denied(check_answer(asked, standing_in_reply(reply, backends)))
    yield from ring([partition] if reply[8] else [])
    return ChargeAnswer(
        user_id=user_id,
        meter=meter,
        event_id=event_id,
        amount=amount,
        repeated=bool(reply[7]),
        expected=expected_parts(buckets_in(reply), int(reply[6]), amount),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Loading a balance that is not cached


def _gated(context: Context, user_id: str, request: Call) -> Effects[Any]:
    """Run a script that needs the balance; load it first where it is not cached."""

    def load(answer: bytes, shortest_life_ms: int) -> Effects[bool] | None:
        return _load(context, user_id, shortest_life_ms) if answer == b"load" else None

    return (yield from run_loading(context, request, load, f"the balance of {user_id}"))


def _load(context: Context, user_id: str, shortest_life_ms: int) -> Effects[bool]:
    """Read a balance from Postgres and cache it, unless a publish or a boundary came in between: then the caller tries
    again. Returns True when the life of the balance was over before it came.

    Events which that balance already contains leave pending in the same step; holds that the ledger granted while
    Redis was down become holds here.
    """
    partition = context.partition(user_id)
    lease = keys.lease(partition, user_id)
    token = yield from take_lease(context, lease)
    view = yield Ask(lambda ledger: ledger.account(user_id))
    account: Account | None = view.account
    if account is None:
        text, ttl_ms, meters = unknown_account_text(view.epoch), context.settings.cache_ttl_ms, []
    else:
        text = cache_text(view.epoch, account)
        ttl_ms = cache_ttl_ms(account, view.now, context.settings.cache_ttl_ms)
        meters = [name for meter in account.balances for name in (meter, *_sub_meters(context, meter))]
    pending = [keys.pending(partition, user_id, meter) for meter in meters]
    listed = (yield Pipeline(tuple(("HKEYS", name) for name in pending))) if pending else []
    events = [[raw[2:].decode() for raw in names if raw.startswith(b"e:")] for names in listed]
    contained: set[str] = set()
    if account is not None and any(events):
        asked = [event_id for ids in events for event_id in ids]
        contained = yield Ask(lambda ledger: ledger.contained(user_id, asked, account.version))
    args: list[Any] = [token, text, ttl_ms, shortest_life_ms]
    for ids in events:
        gone = [f"e:{event_id}" for event_id in ids if event_id in contained]
        args += [len(gone), *gone]
    installed = yield from run_script(call("install", [keys.balance(partition, user_id), lease, *pending], args))
    for hold in view.holds:
        ttl = max(1, int((hold.expires_at - view.now).total_seconds()))
        held = Asked(user_id, hold.meter, hold.amount, hold.backend)
        yield from run_script(_reserve_call(context, held, hold.key, ttl, "1"))
    yield from _forget_ledger_holds(context, user_id, [hold.key for hold in view.holds])
    return bool(installed == b"late")


def _take_tier(context: Context, user_id: str, meter: str, tier: str) -> Effects[None]:
    """Put the account on the plan `tier`, if it is on another; then what is cached goes: it is of the plan before."""
    tiers = sorted(code for code, plan in context.catalogue.plans.items() if meter in plan.meters)
    if tier not in tiers:
        raise InvalidRequest("tier", tier, f"a plan with {meter}: {', '.join(tiers) or 'there is none'}")
    try:
        changed = yield Ask(lambda ledger: ledger.on_tier(user_id, tier))
    except redis_errors.RedisError as error:
        raise RedisUnavailable(str(error)) from error
    if not changed:
        return
    partition = context.partition(user_id)
    try:
        yield Command(("DEL", keys.balance(partition, user_id), keys.lease(partition, user_id)))
    except DOWN as error:
        who = name_in_logs(user_id, context.settings.log_user_ids)
        logger.warning("the balance of %s stays as it was until it is published: %s", who, error)


def _forget_ledger_holds(context: Context, user_id: str, hold_keys: Sequence[str]) -> Effects[None]:
    """Delete holds that Redis knows better now. Should this fail, the next load finds them again."""
    if not hold_keys:
        return
    try:
        yield Ask(lambda ledger: ledger.forget_holds(user_id, hold_keys))
    except LedgerUnavailable as error:
        who = name_in_logs(user_id, context.settings.log_user_ids)
        logger.warning("holds of %s stay in the ledger until they expire: %s", who, error)


# ---------------------------------------------------------------------------------------------------------------------
# Without Redis


def _without_redis(
    context: Context, asked: Asked, error: Exception
) -> Effects[tuple[CheckAnswer, MeterStanding | None]]:
    """The answer of a check while Redis is down, by the setting `redis_down`; and the standing, where it is known."""
    mode = context.settings.redis_down
    logger.warning("Redis is down, checking by `%s`: %s", mode, error)
    if mode == "deny":
        return answer_without_balance(asked, Reason.REDIS_DOWN_DENIED), None
    if mode == "allow":
        left = context.settings.redis_down_max_amount - context.let_through.get(asked[:2], 0)
        reason = Reason.REDIS_DOWN_ALLOWED if asked.amount <= left else Reason.REDIS_DOWN_BOUND_REACHED
        return answer_without_balance(asked, reason, left, allowed=asked.amount <= left), None
    view = yield Ask(lambda ledger: ledger.account(asked.user_id))
    standing = standing_in_ledger(view.account, asked.meter, view.holds)
    return check_answer(asked, standing), standing


def _reserve_without_redis(context: Context, asked: Asked, key: str, ttl: int, error: Exception) -> Effects[HoldAnswer]:
    """A hold while Redis is down: by `ledger` a row under the account's lock, by `allow` a number in this process."""
    if context.settings.redis_down == "ledger" and context.settings.billing_enabled:
        logger.warning("Redis is down, holding in the ledger: %s", error)
        answer: HoldAnswer = yield Ask(lambda ledger: ledger.hold(asked, key, ttl))
        return answer
    user_id, meter, amount, backend = asked
    if context.settings.billing_enabled:
        checked, _ = yield from _without_redis(context, asked, error)
        if not checked.allowed:
            raise UsageDenied(checked) from error
        context.let_through[user_id, meter] = context.let_through.get((user_id, meter), 0) + amount
    return HoldAnswer(
        user_id=user_id, meter=meter, key=key, state=HoldState.HELD, amount=amount, left=amount, backend=backend
    )


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


def _require(
    context: Context,
    user_id: str,
    meter: str,
    amount: int,
    *,
    key: str | None = None,
    event_id: str | None = None,
    backend: str | None = None,
) -> None:
    """Raise InvalidRequest for an argument that could never be right, before anything is sent."""
    require_id("user_id", user_id)
    for name, value in (("key", key), ("event_id", event_id)):
        if value is not None:
            require_id(name, value)
    if not isinstance(meter, str) or meter not in context.catalogue.meters:
        raise InvalidRequest("meter", meter, "one of " + ", ".join(sorted(context.catalogue.meters)))
    require_amount("amount", amount)
    if backend is not None and not (isinstance(backend, str) and backend in context.catalogue.backends):
        raise InvalidRequest("backend", backend, "one of " + ", ".join(sorted(context.catalogue.backends)))


def require_id(name: str, value: object) -> None:
    """Raise InvalidRequest, naming the argument, unless `value` may be an id."""
    if not (isinstance(value, str) and _is_identifier(value)):
        raise InvalidRequest(name, value, f"1 to 128 characters of {ID_CHARACTERS}")


def require_amount(name: str, value: object) -> None:
    """Raise InvalidRequest, naming the argument, unless `value` may be an amount."""
    if type(value) is not int or not 0 <= value <= MAX_AMOUNT:
        raise InvalidRequest(name, value, f"a whole number from 0 to {MAX_AMOUNT}")


def hold_ttl_seconds(context: Context, ttl_seconds: int | None) -> int:
    """How long a hold lives: what was asked for, else the setting. Raises InvalidRequest."""
    ttl = context.settings.hold_ttl_seconds if ttl_seconds is None else ttl_seconds
    if type(ttl) is not int or not 1 <= ttl <= MAX_HOLD_TTL_SECONDS:
        raise InvalidRequest("ttl_seconds", ttl, f"1 to {MAX_HOLD_TTL_SECONDS}")
    return ttl


def _facts(dimensions: Mapping[str, Scalar] | None, backend: str | None) -> Mapping[str, Scalar] | None:
    """The dimensions with the backend written in. Raises InvalidRequest where they name another."""
    if backend is None:
        return dimensions
    facts = {"backend": backend, **(dimensions or {})}
    if facts["backend"] != backend:
        raise InvalidRequest("dimensions.backend", facts["backend"], f"{backend}, as `backend` says")
    return facts


def _capped(context: Context, meter: str, backend: str | None) -> tuple[str, ...]:
    """The backend, if any plan has a sub-cap for it on this meter; else nothing: then no sub-meter is kept."""
    return (backend,) if backend in context.catalogue.capped_backends.get(meter, ()) and backend is not None else ()


def _sub_meters(context: Context, meter: str) -> list[str]:
    """Names of all sub-caps that plans have on this meter."""
    return [rules_account.sub_meter(meter, backend) for backend in context.catalogue.capped_backends.get(meter, ())]


def _sub_meter_of(context: Context, event: UsageEvent) -> str | None:
    """Name of the sub-cap that this event counts against, None where no plan has one."""
    backend = (event.dimensions or {}).get("backend")
    capped = context.catalogue.capped_backends.get(event.meter, ())
    return rules_account.sub_meter(event.meter, backend) if isinstance(backend, str) and backend in capped else None


def _sub_keys(partition: int, user_id: str, sub_meters: Sequence[str]) -> list[str]:
    """Pending and holds of each of these sub-meters."""
    return [name(partition, user_id, sub_meter) for sub_meter in sub_meters for name in (keys.pending, keys.holds)]


def new_event_id() -> str:
    """A UUIDv7: ids in the order of time keep the index of the usage log dense (RFC 9562, section 5.7)."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = milliseconds << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & (1 << 62) - 1
    return str(UUID(int=value))


def _recorded(event: UsageEvent, request: Call, captured_from: str | None = None) -> Effects[Any]:
    """Run a script that appends `event`; whatever Redis says against it, the error carries the event."""
    try:
        return (yield from run_script(request))
    except redis_errors.RedisError as error:
        raise RedisUnavailable(str(error), [event], captured_from) from error


def _release_elsewhere(context: Context, event: UsageEvent, reply: Sequence[bytes]) -> Effects[None]:
    """Free the hold of an event that was recorded on another meter than it was held on."""
    meter = reply[5].decode()
    if not meter or meter == event.meter:
        return
    try:
        request = release_call(context, event.user_id, meter, event.hold_key or event.event_id)
        yield from run_script(request)
    except redis_errors.RedisError as error:
        logger.warning("hold %s on %s stays until it expires: %s", event.hold_key, meter, error)


def release_call(context: Context, user_id: str, meter: str, key: str, *, late: bool = False) -> Call:
    """The script that gives a hold back."""
    partition = context.partition(user_id)
    names = [keys.pending(partition, user_id, meter), keys.holds(partition, user_id, meter)]
    names.append(keys.hold(partition, user_id, key))
    names += _sub_keys(partition, user_id, _sub_meters(context, meter))
    return call("release", names, [key, context.outcome_ttl_ms, int(late)])


def _gate_keys(partition: int, user_id: str, meter: str) -> list[str]:
    return [
        keys.balance(partition, user_id),
        keys.pending(partition, user_id, meter),
        keys.holds(partition, user_id, meter),
    ]


def _check_call(context: Context, asked: Asked, backends: Sequence[str]) -> Call:
    partition = context.partition(asked.user_id)
    sub_meters = [rules_account.sub_meter(asked.meter, each) for each in backends]
    names = _gate_keys(partition, asked.user_id, asked.meter) + _sub_keys(partition, asked.user_id, sub_meters)
    return call("check", names, [asked.meter, asked.amount, *sub_meters])


def _reserve_call(context: Context, asked: Asked, key: str, ttl: int, force: str) -> Call:
    user_id, meter, amount, backend = asked
    partition = context.partition(user_id)
    sub_meters = [rules_account.sub_meter(meter, each) for each in _capped(context, meter, backend)]
    names = _gate_keys(partition, user_id, meter)
    names += [keys.hold(partition, user_id, key), keys.expiries(partition)]
    names += _sub_keys(partition, user_id, sub_meters)
    args: list[str | int | bytes] = [meter, amount, key, ttl * 1_000, context.outcome_ttl_ms]
    args += (keys.expiring(user_id, meter), force)
    for sub_meter in sub_meters:
        args += (keys.expiring(user_id, sub_meter), sub_meter)
    return call("reserve", names, args)


def _settle_call(context: Context, partition: int, event: UsageEvent) -> Call:
    user_id, meter, key = event.user_id, event.meter, event.hold_key or event.event_id
    names = [keys.pending(partition, user_id, meter), keys.holds(partition, user_id, meter)]
    names += [keys.hold(partition, user_id, key), keys.stream(partition), keys.rung(partition)]
    args: list[str | int | bytes] = [key, event.event_id, amount_of(event), *_signed_payload(context, event)]
    args += (RING_TTL_MS, context.outcome_ttl_ms)
    counted = _sub_meter_of(context, event)
    for sub_meter in _sub_meters(context, meter):
        names.append(keys.pending(partition, user_id, sub_meter))
        if sub_meter == counted:
            args.append(len(names))
        names.append(keys.holds(partition, user_id, sub_meter))
    return call("settle", names, args)


def _append_call(context: Context, partition: int, batch: Sequence[UsageEvent]) -> Call:
    """The script that appends `batch`: an event that names a hold settles it."""
    if batch[0].hold_key is not None:
        return _settle_call(context, partition, batch[0])
    names = [keys.stream(partition), keys.rung(partition)]
    args: list[str | int | bytes] = [RING_TTL_MS]
    for event in batch:
        names.append(keys.pending(partition, event.user_id, event.meter))
        args += (event.event_id, amount_of(event), *_signed_payload(context, event))
        if (sub_meter := _sub_meter_of(context, event)) is not None:
            names.append(keys.pending(partition, event.user_id, sub_meter))
            args += (event.event_id, amount_of(event), "", "")
    return call("emit", names, args)


_Batches = list[tuple[int, list[UsageEvent]]]


def _rounds(events: Sequence[UsageEvent], context: Context) -> list[_Batches]:
    """Events in chunks of one script call, each partition's in order; in each round one chunk of a partition."""
    by_partition: dict[int, list[list[UsageEvent]]] = {}
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
    multiplier = context.catalogue.multiplier((event.dimensions or {}).get("model_slug"))
    if multiplied(event.quantity, multiplier) > MAX_AMOUNT:
        raise InvalidRequest("quantity", event.quantity, f"at most {MAX_AMOUNT} after the multiplier {multiplier}")
    return event.model_copy(update={"multiplier": multiplier})


def _settled_event(
    user_id: str,
    meter: str,
    event_id: str,
    amount: int,
    hold_key: str | None,
    source: str | None,
    reference_id: str | None,
    dimensions: Mapping[str, Scalar] | None,
) -> UsageEvent:
    """An event over an amount that is already multiplied."""
    return new_event(
        event_id=event_id,
        user_id=user_id,
        meter=meter,
        quantity=amount,
        multiplier="1",
        occurred_at=datetime.now(UTC),
        source=source,
        reference_id=reference_id,
        hold_key=hold_key,
        dimensions=dict(dimensions) if dimensions is not None else None,
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


def payload(event: UsageEvent) -> str:
    """The event as it stands in the stream."""
    return event.model_dump_json(exclude_none=True)


def _signed_payload(context: Context, event: UsageEvent) -> tuple[bytes, str]:
    """The event as it travels, and its signature; '' where this process has no key."""
    text = payload(event).encode()
    return text, context.signer.sign(text) if context.signer is not None else ""


def amount_of(event: UsageEvent) -> int:
    """What a priced event costs, in units of its meter."""
    return multiplied(event.quantity, event.multiplier or "1")


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


def time_of(milliseconds: int) -> datetime:
    """A moment on the clock of Redis."""
    return datetime.fromtimestamp(milliseconds / 1_000, UTC)
