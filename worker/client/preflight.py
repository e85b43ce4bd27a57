"""What each pre-flight call does, without saying how its commands travel; see worker/client/effects.py.

Every call is one Lua round trip; a balance that is not cached costs a load first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from redis import exceptions as redis_errors

from schemas.answers import (
    CheckAnswer,
    HoldAnswer,
    HoldState,
    PayFrom,
    Reason,
    Remaining,
    RoutingAnswer,
)
from schemas.events import canonical_multiplier
from worker.client.arguments import amounts_of, hold_ttl_seconds, price, require, require_amount, require_pay_from
from worker.client.effects import DOWN, FAILED, Ask, Effects, logger, run_script, time_of, unconfirmed
from worker.client.loading import gated, take_tier
from worker.client.session import Context
from worker.crash import crash_point
from worker.errors import (
    HoldClosed,
    HoldConflict,
    InvalidRequest,
    UsageDenied,
)
from worker.keyspace import calls
from worker.rules import routing
from worker.rules.account import backend_of, sub_meters
from worker.rules.preflight import (
    MeterStanding,
    Spend,
    answer_without_balance,
    check_answer,
    denied,
    remaining_answer,
    standing_in_ledger,
    standing_in_reply,
)
from worker.rules.prices import Units

RELAY_METER = "relay_credits"


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def check(
    context: Context,
    user_id: str,
    meter: str,
    amount: int = 1,
    *,
    backend: str | None = None,
    pay_from: PayFrom | None = None,
) -> Effects[CheckAnswer]:
    """May `user_id` spend `amount` units of `meter` now, given what is pending? Changes nothing.

    `amount` is after the multiplier. With `backend`, its sub-cap must have room as well, where the plan has one. With
    `pay_from="allowance"` purchased units do not count, whatever the account says.
    The answer says why; it is advice, only `reserve` and `charge` promise.
    While Postgres does not answer, the last known balance may, within the setting's age and until its next boundary.
    Raises LedgerUnavailable when there is none and Postgres does not answer.
    """
    answer, _ = yield from check_standing(context, user_id, meter, amount, backend=backend, pay_from=pay_from)
    return answer


def check_standing(
    context: Context,
    user_id: str,
    meter: str,
    amount: int,
    *,
    backend: str | None = None,
    pay_from: PayFrom | None = None,
) -> Effects[tuple[CheckAnswer, MeterStanding | None]]:
    """What `check` answers, and where the account stands: None where no balance was looked at, or there is none."""
    require(context, user_id, meter, amount, backend=backend)
    require_pay_from(pay_from)
    spend = Spend(user_id, meter, amount, backend, pay_from)
    if not context.settings.billing_enabled:
        return answer_without_balance(spend, Reason.BILLING_DISABLED, allowed=True), None
    backends = context.capped_backends(meter, backend)
    names = sub_meters(meter, backends)
    request = calls.check(context.account(user_id), meter, amount, names, allowance=pay_from == "allowance")
    try:
        reply = yield from gated(context, user_id, request)
    except DOWN as error:
        return (yield from _without_redis(context, spend, error))
    standing = standing_in_reply(reply, backends)
    return check_answer(spend, standing), standing


def remaining(
    context: Context, user_id: str, meter: str = RELAY_METER, *, tier: str | None = None
) -> Effects[Remaining]:
    """What is left to `user_id` on `meter`, as a whole and per backend with a sub-cap, at one moment.

    `tier` is the plan that the request carries: an account on another plan is put on it first. Else nothing changes.
    Nothing is left to an account that nobody opened.
    Raises LedgerUnavailable as `check` does, and RedisUnavailable unless the ledger may answer instead.
    """
    require(context, user_id, meter, 0)
    if tier is not None:
        yield from take_tier(context, user_id, meter, tier)
    if not context.settings.billing_enabled:
        return Remaining(user_id=user_id, meter=meter, kind="unlimited", limit=None, used=0, pending=0, remaining=None)
    backends = context.catalogue.capped_backends.get(meter, ())
    request = calls.check(context.account(user_id), meter, 0, context.sub_meters(meter))
    try:
        reply = yield from gated(context, user_id, request)
    except DOWN as error:
        if context.settings.redis_down != "ledger":
            raise unconfirmed(error) from error
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
    amount: int | None = None,
    key: str = "",
    ttl_seconds: int | None = None,
    *,
    quantity: int | None = None,
    model_slug: str | None = None,
    multiplier: str | None = None,
    backend: str | None = None,
    keep_alive: bool = False,
    pay_from: PayFrom | None = None,
) -> Effects[HoldAnswer]:
    """Check, and set `amount` units aside under `key` until settled, released, or `ttl_seconds` have passed.

    Or give `quantity` units, before the multiplier: of `model_slug` by the catalogue, or the one given. The hold
    remembers the multiplier, for its own `settle` and `capture`.
    With `backend`, its sub-cap is checked and held as well, where the plan has one.
    With `pay_from="allowance"` purchased units do not count, also if `extend` raises the hold.
    With `keep_alive`, a `with` block renews the hold by itself at each third of its life, for as long as it runs.
    Repeated with the same amount and backend it returns the same hold, with the end that it has, so a lost reply does
    no harm; `extend` prolongs it. Interrupted by a signal, it gives back what it holds and closes the key: one try.
    Raises UsageLimitExceeded (or UsageDenied) with the check's answer, HoldConflict when the key holds something
    else, HoldClosed when it is over, LedgerUnavailable as `check` does.
    """
    require(context, user_id, meter, 0, key=key, backend=backend)
    if not isinstance(keep_alive, bool):
        raise InvalidRequest("keep_alive", keep_alive, "True or False")
    cost = price(context, Units(amount, quantity, multiplier, model_slug))
    times = None if quantity is None else canonical_multiplier(cost.multiplier)
    _, at_most = amounts_of(context, meter, cost)
    require_pay_from(pay_from)
    spend = Spend(user_id, meter, at_most, backend, pay_from)
    ttl = hold_ttl_seconds(context, ttl_seconds)
    call_id = context.new_call_id()
    request = calls.reserve(
        context.account(user_id), meter, spend.amount, key, sub_meter=context.sub_meter(meter, backend),
        ttl_ms=ttl * 1_000, outcome_ttl_ms=context.outcome_ttl_ms, unchecked=not context.settings.billing_enabled,
        multiplier=times or "", call_id=call_id, allowance=pay_from == "allowance",
    )  # fmt: skip

    def undo(*, short: bool = False) -> Effects[Any]:
        account, sub_meters = context.account(user_id), context.sub_meters(meter)
        release = calls.release(
            account, meter, key, sub_meters, outcome_ttl_ms=context.outcome_ttl_ms, call_id=call_id
        )  # fmt: skip
        return run_script(release, short=short)

    def undo_in_ledger() -> Effects[Any]:
        # In this order: a load that takes the hold over meanwhile finds the key closed.
        if (yield Ask(lambda ledger: ledger.give_back_hold(user_id, key, call_id))):
            with suppress(*FAILED):  # it may have reached Redis as well, and only its reply was lost
                yield from undo(short=True)

    def hold_in_ledger() -> Effects[HoldAnswer]:
        answer: HoldAnswer = yield Ask(lambda ledger: ledger.hold(spend, key, ttl, call_id), undo_in_ledger)
        context.holds_in_ledger = True
        return answer

    try:
        reply = yield from gated(context, user_id, request, undo=undo)
    except DOWN as error:
        answer = yield from _reserve_without_redis(context, spend, key, hold_in_ledger, error)
        return answer.model_copy(update={"multiplier": times})
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
            # An older release may have made the hold: it remembers none.
            multiplier=reply[4].decode() if len(reply) > 4 else times,
        )
    if status == b"conflict":
        raise _conflict(user_id, key, reply)
    if status == b"closed":
        raise HoldClosed(user_id, key, HoldState(reply[1].decode()))
    raise denied(check_answer(spend, standing_in_reply(reply, context.capped_backends(meter, backend))))


def extend(
    context: Context,
    user_id: str,
    meter: str,
    key: str,
    *,
    ttl_seconds: int | None = None,
    amount: int | None = None,
) -> Effects[HoldAnswer]:
    """The open hold `key` ends `ttl_seconds` from now, and holds for `amount` units in all, captured parts among them.

    `amount` is after the multiplier. Only what comes on top is checked, and against the sub-cap of the hold as well;
    less frees the difference. Without `ttl_seconds` the end stays where it is, but with neither the hold lives on for
    as long as the setting says. A repeat is harmless.
    Raises UsageLimitExceeded with the answer about what comes on top, and the hold stays as it is; HoldClosed when it
    is over or unknown, which nothing revives; HoldConflict when it is on another meter; RedisUnavailable; and
    LedgerUnavailable as `check` does.
    """
    require(context, user_id, meter, 0, key=key)
    if amount is not None:
        require_amount("amount", amount)
    ttl = hold_ttl_seconds(context, ttl_seconds) if amount is None or ttl_seconds is not None else None
    request = calls.extend(
        context.account(user_id), meter, key, context.sub_meters(meter), ttl_ms=ttl and ttl * 1_000, amount=amount,
        outcome_ttl_ms=context.outcome_ttl_ms, unchecked=not context.settings.billing_enabled,
    )  # fmt: skip
    # A hold that the ledger granted while Redis was down comes with the balance.
    in_ledger = context.settings.redis_down == "ledger" and context.settings.database_url is not None
    try:
        reply = yield from gated(context, user_id, request, once=b"missing" if in_ledger else None)
    except redis_errors.RedisError as error:
        raise unconfirmed(error) from error
    status = reply[0]
    if status == b"held":
        return HoldAnswer(
            user_id=user_id,
            meter=meter,
            key=key,
            state=HoldState.HELD,
            amount=int(reply[1]),
            left=int(reply[2]),
            expires_at=time_of(int(reply[3])),
            backend=backend_of(reply[4].decode()),
            multiplier=reply[5].decode() or None,
        )
    if status == b"conflict":
        raise _conflict(user_id, key, reply)
    if status == b"refused":
        backend = backend_of(reply[2].decode())
        backends = () if backend is None else (backend,)
        raise denied(
            check_answer(Spend(user_id, meter, int(reply[1]), backend), standing_in_reply(reply[3:], backends))
        )
    raise HoldClosed(user_id, key, HoldState.UNKNOWN if status == b"missing" else HoldState(reply[1].decode()))


def _conflict(user_id: str, key: str, reply: Sequence[bytes]) -> HoldConflict:
    """What the key holds, by the reply of a script."""
    multiplier = reply[4].decode() if len(reply) > 4 else None
    return HoldConflict(user_id, key, reply[1].decode(), int(reply[2]), backend_of(reply[3].decode()), multiplier)


# ---------------------------------------------------------------------------------------------------------------------
# Without Redis


def _without_redis(
    context: Context, spend: Spend, error: Exception
) -> Effects[tuple[CheckAnswer, MeterStanding | None]]:
    """The answer of a check while Redis is down, by the setting `redis_down`; and the standing, where it is known."""
    mode = context.settings.redis_down
    logger.warning("Redis is down, checking by `%s`: %s", mode, error)
    if mode == "deny":
        return answer_without_balance(spend, Reason.REDIS_DOWN_DENIED), None
    if mode == "allow":
        return _bounded(spend, context.let_through.left(spend, context.settings.redis_down_max_amount)), None
    view = yield Ask(lambda ledger: ledger.account(spend.user_id))
    standing = standing_in_ledger(view.account, spend.meter, view.holds)
    return check_answer(spend, standing), standing


def _reserve_without_redis(
    context: Context, spend: Spend, key: str, hold_in_ledger: Callable[[], Effects[HoldAnswer]], error: Exception
) -> Effects[HoldAnswer]:
    """A hold while Redis is down: by `ledger` a row under the account's lock, by `allow` a number in this process."""
    settings = context.settings
    if settings.billing_enabled:
        logger.warning("Redis is down, holding by `%s`: %s", settings.redis_down, error)
        if settings.redis_down == "ledger":
            return (yield from hold_in_ledger())
        if settings.redis_down == "deny":
            raise UsageDenied(answer_without_balance(spend, Reason.REDIS_DOWN_DENIED)) from error
        bounded = _bounded(spend, context.let_through.take(spend, key, settings.redis_down_max_amount))
        if not bounded.allowed:
            raise UsageDenied(bounded) from error
    user_id, meter, amount, backend = spend[:4]
    return HoldAnswer(
        user_id=user_id, meter=meter, key=key, state=HoldState.HELD, amount=amount, left=amount, backend=backend
    )


def _bounded(spend: Spend, left: int) -> CheckAnswer:
    """The answer by `allow`, with `left` units of the bound."""
    allowed = spend.amount <= left
    reason = Reason.REDIS_DOWN_ALLOWED if allowed else Reason.REDIS_DOWN_BOUND_REACHED
    return answer_without_balance(spend, reason, left, allowed=allowed)
