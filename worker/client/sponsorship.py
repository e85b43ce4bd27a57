"""What each call about the sponsorship pool does, and the estimate: operations, as in worker/client/preflight.py.

The pool covers requests of trusted users within a daily budget. A request has an id of its own, which no two users may
share: `decide` holds what the pool covers if that is all, `confirm_partial` holds a part once the rest is paid,
`settle_sponsored` says what the request cost, and `release_sponsored` that there was no work. What the pool gave and
got is in its books (worker/consumer/sponsorship.py) once a worker has drained its stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from redis import exceptions as redis_errors

from config.catalogue import TRUST_TIERS
from schemas.answers import (
    CreditAnswer,
    EstimateAnswer,
    HoldState,
    Parts,
    PayFrom,
    Reason,
    Serve,
    SettlementAnswer,
    SponsorAdvice,
    SponsorAnswer,
    SponsorHoldAnswer,
    SponsorReason,
)
from schemas.events import MAX_AMOUNT
from schemas.traces import traceparent_of
from worker.client import preflight
from worker.client.arguments import amounts_of, hold_ttl_seconds, require_amount, require_id, require_model
from worker.client.effects import DOWN, Ask, AskHost, Effects, Undo, logger, ring, run_script, time_of, unconfirmed
from worker.client.loading import require_current, run_loading, take_lease
from worker.client.recording import new_event, price_in, priced
from worker.client.session import Context, Running
from worker.crash import crash_point
from worker.errors import HoldClosed, HoldConflict, InvalidRequest, LedgerUnavailable, RedisUnavailable
from worker.keyspace import calls
from worker.keyspace.cache import pool_text, standing_text
from worker.keyspace.keys import SPONSORSHIP
from worker.keyspace.scripts import Call
from worker.rules import sponsorship
from worker.rules.preflight import MeterStanding, expected_parts
from worker.rules.sponsorship import LOWEST_TIER
from worker.tracing import sending

if TYPE_CHECKING:
    from worker.client.ledger import LedgerView

MAX_REASON_CHARACTERS = 200
# A hold counts in the window of a day in which it began.
_MAX_TTL_SECONDS = 86_400
# Why a hold is given back that nobody received.
_NOT_RECEIVED = "its caller was cancelled"


class _Request(NamedTuple):
    """What the pool is asked to cover. `paid` units of the estimate are paid already."""

    user_id: str | None
    estimate: int
    paid: int = 0
    request_id: str = ""
    ttl_ms: int = 0


class _Found(NamedTuple):
    """What the pool covers (fields of `SponsorAdvice`), and until when it holds that; None where it holds nothing."""

    advice: dict[str, Any]
    expires_at: datetime | None = None
    repeated: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def decide(
    context: Context, user_id: str | None, estimate: int, request_id: str, *, ttl_seconds: int | None = None
) -> Effects[SponsorAnswer]:
    """Does the pool cover the request `request_id`, which will cost about `estimate` units? If all of it: holds that.

    `free`: it does, and holds the estimate until settled, released, or `ttl_seconds` have passed. `partial`: it would
    cover `absorb`; nothing is held, see `confirm_partial`. `gate`: nothing, and `reason` says why; so it is for nobody
    (`user_id` None or empty), and while Redis or a ledger that is needed does not answer.
    Repeated while it holds, it returns the same answer; what holds nothing leaves no trace. If killed, or its answer
    lost, what it holds expires. Interrupted by a signal, it gives back what it holds and closes the id: one try.
    Raises HoldConflict when the id holds for another user or estimate, HoldClosed when its hold is over.
    """
    request = _request(context, user_id, estimate, 0, request_id, ttl_seconds)
    try:
        found = yield from _ask_pool(context, "all", request)
        crash_point("after_decision")
    except (*DOWN, RedisUnavailable, LedgerUnavailable) as error:
        found = _without_pool(request, error)
    return _answer(request, found)


def confirm_partial(
    context: Context,
    user_id: str | None,
    estimate: int,
    request_id: str,
    *,
    paid: int,
    ttl_seconds: int | None = None,
) -> Effects[SponsorAnswer]:
    """The user has paid `paid` units of the estimate: hold what the pool covers of the rest, which may be less by now.

    `absorb` is held, `outstanding` is covered by nobody yet; with that at 0 the work may start. What is paid on top
    after this is said when it is settled. Holds nothing where the pool has nothing to give.
    Repeats and errors are those of `decide`, but raises RedisUnavailable or LedgerUnavailable instead of a gate.
    """
    require_amount("paid", paid)
    request = _request(context, user_id, estimate, paid, request_id, ttl_seconds)
    try:
        return _answer(request, (yield from _ask_pool(context, "most", request)))
    except redis_errors.RedisError as error:
        raise unconfirmed(error) from error


def estimate(
    context: Context,
    user_id: str,
    meter: str,
    quantity: int,
    *,
    model_slug: str | None = None,
    multiplier: str | None = None,
    backend: str | None = None,
    pay_from: PayFrom | None = None,
) -> Effects[EstimateAnswer]:
    """What would `quantity` units of `meter` cost, which buckets would pay, and what would the pool cover of it?

    `multiplier` is decimal text; without it the catalogue's for `model_slug`, else 1. Nothing is held or changed.
    With `pay_from="allowance"` the check counts no purchased units.
    Where Redis is down, the check answers by the setting `redis_down`, and the pool covers nothing.
    Raises InvalidRequest, and LedgerUnavailable as `check` does.
    """
    require_model(model_slug)
    facts = None if model_slug is None else {"model_slug": model_slug}
    # As if it were emitted: the same checks, the same price.
    usage = {"user_id": user_id, "meter": meter, "quantity": quantity, "multiplier": multiplier, "dimensions": facts}
    event = priced(context, new_event(event_id="estimate", **usage))
    amount, at_most = amounts_of(context, meter, price_in(event))
    check, standing = yield from preflight.check_standing(
        context, user_id, meter, at_most, backend=backend, pay_from=pay_from
    )
    cost, room = amount, check.available
    wallet = standing.wallet if standing is not None else None
    if standing is not None and wallet is not None:
        cost, room = wallet.own.cost_of_more(amount), standing.available(pay_from)
        if wallet.cap is not None:
            room = wallet.cap.left if room is None else min(room, wallet.cap.left)
    if standing is not None and not standing.is_suspended:
        expected: Parts | None = _expected(context, meter, standing, cost)
    else:
        expected = Parts(uncollected=amount) if check.reason is Reason.UNKNOWN_ACCOUNT else None
    request = _Request(user_id, cost)
    try:
        found = yield from _ask_pool(context, "advise", request)
    except (*DOWN, RedisUnavailable, LedgerUnavailable) as error:
        found = _without_pool(request, error)
    advice = SponsorAdvice(**found.advice)
    return EstimateAnswer(
        user_id=user_id,
        meter=meter,
        quantity=quantity,
        multiplier=event.multiplier or "1",
        amount=amount,
        cost=None if wallet is None else cost,
        allowed=check.allowed,
        allowed_with_pool=check.allowed
        or (room is not None and advice.charge <= room and check.reason is not Reason.SUSPENDED),
        check=check,
        expected=expected,
        sponsorship=advice,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of a request


def settle_sponsored(
    context: Context,
    user_id: str,
    request_id: str,
    actual: int,
    *,
    paid: int | None = None,
    traceparent: str | None = None,
) -> Effects[SettlementAnswer]:
    """The request cost `actual` units, `paid` of which the user paid (None: what was said when the pool confirmed).

    The pool pays the rest, never more than it held; what it held beyond that is free again, in the window that held it.
    After the hold expired, the pool pays what it still may now (`late`). `traceparent` (W3C) is the trace of the work;
    None: the current one. A repeat gets the first answer; if killed, it
    is settled with its entry in the pool's stream or not at all.
    Raises HoldClosed when nothing is known of the request or it was released, HoldConflict when it is another user's,
    RedisUnavailable, and for a late one LedgerUnavailable; then it may be tried again.
    """
    require_id("user_id", user_id)
    require_id("request_id", request_id)
    require_amount("actual", actual)
    if paid is not None:
        require_amount("paid", paid)
    with sending(1) as current:
        try:
            reply = yield from _settle(
                context, user_id, request_id, actual, paid, traceparent_of(traceparent) or current
            )
        except redis_errors.RedisError as error:
            raise unconfirmed(error) from error
    crash_point("after_sponsored_settlement")
    yield from ring([SPONSORSHIP] if reply[7] else [])
    held, cost, covered, absorbed = map(int, reply[1:5])
    return SettlementAnswer(
        user_id=user_id,
        request_id=request_id,
        held=held,
        actual=cost,
        paid=covered,
        absorbed=absorbed,
        returned=held - absorbed,
        uncovered=max(0, cost - covered - absorbed),
        credited=_credited(context, covered),
        late=bool(reply[5]),
        repeated=bool(reply[6]),
    )


def release_sponsored(context: Context, user_id: str, request_id: str, reason: str) -> Effects[SponsorHoldAnswer]:
    """There was no such work, for `reason`: the pool has back what it held. The answer's state is the one before.

    Releasing a request never seen closes its id, so that a decision which is still on its way cannot revive it; one
    that was settled stays settled. Safe to repeat. Raises HoldConflict when it is another user's, and RedisUnavailable;
    the hold then stays until it expires.
    """
    require_id("user_id", user_id)
    require_id("request_id", request_id)
    if not (isinstance(reason, str) and len(reason) <= MAX_REASON_CHARACTERS and reason.isprintable()):
        raise InvalidRequest("reason", reason, f"at most {MAX_REASON_CHARACTERS} printable characters")
    request = calls.sponsor_release(user_id, request_id, reason, outcome_ttl_ms=context.outcome_ttl_ms)
    try:
        reply = yield from run_script(request)
    except redis_errors.RedisError as error:
        raise unconfirmed(error) from error
    _raise_refusal(user_id, request_id, reply)
    return SponsorHoldAnswer(
        user_id=user_id, request_id=request_id, state=HoldState(reply[0].decode()), amount=int(reply[1]), left=0
    )


def give_back(context: Context, decided: Running[SponsorAnswer]) -> Effects[SponsorHoldAnswer] | None:
    """Give back what a decision holds that nobody received. A repeated one belongs to the call that had it first."""
    answer = decided.answer
    if answer.user_id is None or answer.expires_at is None or answer.repeated:
        return None
    return release_sponsored(context, answer.user_id, answer.request_id, _NOT_RECEIVED)


def credit_pool(
    context: Context, request_id: str, paid: int, *, traceparent: str | None = None
) -> Effects[CreditAnswer]:
    """A request that the pool had no part in was paid for with `paid` units: a share of that flows into the pool.

    Once for a request, however often it is said; what was settled with the pool is credited already. `traceparent`: as
    in `settle_sponsored`.
    Raises RedisUnavailable; then it may be tried again.
    """
    require_id("request_id", request_id)
    require_amount("paid", paid)
    with sending(1) as current:
        trace = traceparent_of(traceparent) or current
        try:
            must_ring = yield from run_script(calls.sponsor_credit(request_id, paid, trace or ""))
        except redis_errors.RedisError as error:
            raise unconfirmed(error, traceparent=trace) from error
    yield from ring([SPONSORSHIP] if must_ring else [])
    return CreditAnswer(request_id=request_id, paid=paid, credited=_credited(context, paid))


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


def _ask_pool(context: Context, mode: calls.Mode, request: _Request) -> Effects[_Found]:
    """What the pool covers of a request; it holds that as far as the mode says."""
    user_id, wanted = request.user_id, request.estimate - request.paid
    if user_id is None:
        return _gate(request, SponsorReason.NO_IDENTITY)
    if wanted <= 0:
        return _gate(request, SponsorReason.NOTHING_TO_COVER)
    tier = yield from _tier_of(context, user_id)
    call_id = context.new_call_id()
    decide_call = calls.sponsor_decide(
        mode, user_id, request.request_id, wanted=wanted, estimate=request.estimate, paid=request.paid,
        ttl_ms=request.ttl_ms, outcome_ttl_ms=context.outcome_ttl_ms, tier=tier, daily_budgets=context.daily_budgets,
        call_id=call_id,
    )  # fmt: skip

    def undo() -> Effects[Any]:
        release = calls.sponsor_release(
            user_id, request.request_id, _NOT_RECEIVED, outcome_ttl_ms=context.outcome_ttl_ms, call_id=call_id
        )
        return run_script(release)

    reply = yield from _run_knowing(context, user_id, decide_call, None if mode == "advise" else undo)
    _raise_refusal(user_id, request.request_id, reply)
    tier, (budget, taken, left) = reply[1].decode(), map(int, reply[2:5])
    decision = sponsorship.decide(wanted, budget, taken, left)
    advice = {
        "user_id": user_id,
        "estimate": request.estimate,
        # Where the user has paid a part, the pool covers a part, though it be all of the rest.
        "serve": Serve.PARTIAL if decision.absorb and request.paid else decision.serve,
        "absorb": decision.absorb,
        "charge": request.estimate - decision.absorb,
        "reason": decision.reason,
        "tier": tier,
        "daily_budget": budget,
        "absorbed_today": taken,
        "pool": left,
    }
    expires_at = time_of(int(reply[6])) if reply[0] == b"held" else None
    return _Found(advice, expires_at, bool(reply[7]))


def _settle(
    context: Context, user_id: str, request_id: str, actual: int, paid: int | None, trace: str | None
) -> Effects[Any]:
    """The script's reply, with which the request is settled. Raises HoldConflict, HoldClosed."""

    def settling(tier: str) -> Call:
        return calls.sponsor_settle(
            user_id, request_id, actual=actual, paid=paid,
            outcome_ttl_ms=context.outcome_ttl_ms, tier=tier, daily_budgets=context.daily_budgets, trace=trace or "",
        )  # fmt: skip

    # Trust matters to a late one only; the host is not asked for nothing.
    reply = yield from _run_knowing(context, user_id, settling("" if context.trust is None else "?"))
    if reply[0] == b"tier":
        reply = yield from _run_knowing(context, user_id, settling((yield from _tier_of(context, user_id))))
    _raise_refusal(user_id, request_id, reply)
    return reply


def _run_knowing(context: Context, user_id: str, request: Call, undo: Undo | None = None) -> Effects[Any]:
    """Run a script that needs pool and standing; load first what is not cached. `undo`: see `Command`."""

    def load(answer: bytes, shortest_life_ms: int) -> Effects[bool] | None:
        if answer == b"load":
            key, lease = SPONSORSHIP.standing(user_id), SPONSORSHIP.standing_lease(user_id)
            return _load(context, key, lease, lambda ledger: standing_text(ledger.standing(user_id)), shortest_life_ms)
        if answer == b"load_pool":
            key, lease = SPONSORSHIP.pool, SPONSORSHIP.pool_lease
            return _load(context, key, lease, lambda ledger: pool_text(ledger.pool()), shortest_life_ms)
        return None

    return (yield from run_loading(context, request, load, f"the pool, or the standing of {user_id},", undo))


def _load(
    context: Context, key: str, lease: str, read: Callable[[LedgerView], str], shortest_life_ms: int
) -> Effects[bool]:
    """Read from Postgres, and cache it unless something newer is published meanwhile: then the caller tries again.

    Returns True when its life was over before it came.

    What is committed and not published yet counts twice for a moment, in the pool and in what is promised: that errs
    on the safe side.
    """
    token = yield from take_lease(context, lease)
    text = yield Ask(read)
    request = calls.install(
        SPONSORSHIP, key, lease, token, text, ttl_ms=context.settings.cache_ttl_ms, shortest_life_ms=shortest_life_ms,
        version_key=SPONSORSHIP.pool_version if key == SPONSORSHIP.pool else None,
    )  # fmt: skip
    installed = yield from run_script(request)
    require_current(installed)
    return bool(installed == b"late")


def _tier_of(context: Context, user_id: str) -> Effects[str]:
    """The trust tier that the host says, where it says any; '' for the account's own."""
    trust = context.trust
    tier = None if trust is None else (yield AskHost(lambda: trust.tier_of(user_id)))
    if tier is None:
        return ""
    return tier if tier in TRUST_TIERS else LOWEST_TIER


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


def _request(
    context: Context, user_id: str | None, estimate: int, paid: int, request_id: str, ttl_seconds: int | None
) -> _Request:
    """A request that may be asked about. Raises InvalidRequest before anything is sent."""
    user_id = None if user_id == "" else user_id
    if user_id is not None:
        require_id("user_id", user_id)
    require_id("request_id", request_id)
    if type(estimate) is not int or estimate > MAX_AMOUNT:
        raise InvalidRequest("estimate", estimate, f"a whole number up to {MAX_AMOUNT}")
    ttl = hold_ttl_seconds(context, ttl_seconds, _MAX_TTL_SECONDS)
    return _Request(user_id, estimate, paid, request_id, ttl * 1_000)


def _gate(request: _Request, reason: SponsorReason) -> _Found:
    """The pool covers nothing, and was not asked."""
    estimate, charge = request.estimate, max(0, request.estimate)
    verdict = {"serve": Serve.GATE, "absorb": 0, "charge": charge, "reason": reason}
    return _Found({"user_id": request.user_id, "estimate": estimate, **verdict})


def _without_pool(request: _Request, error: Exception) -> _Found:
    """What is answered while the pool cannot be asked: the user pays. What it holds all the same, if so, expires."""
    logger.warning("the sponsorship pool does not answer, it covers nothing: %s", error)
    return _gate(request, SponsorReason.POOL_UNAVAILABLE)


def _answer(request: _Request, found: _Found) -> SponsorAnswer:
    return SponsorAnswer(
        **found.advice,
        request_id=request.request_id,
        paid=request.paid,
        outstanding=max(0, found.advice["charge"] - request.paid),
        expires_at=found.expires_at,
        repeated=found.repeated,
    )


def _expected(context: Context, meter: str, standing: MeterStanding, amount: int) -> Parts:
    """Who would pay `amount`. A meter that is not in the plan will be opened as the catalogue says."""
    buckets = standing.buckets
    if not standing.in_plan:
        buckets = buckets._replace(spill=context.catalogue.spills[meter])
    return expected_parts(buckets, standing.pending, amount)


def _credited(context: Context, paid: int) -> int:
    return sponsorship.credit_of(paid, context.catalogue.sponsorship.paid_share_percent)


def _raise_refusal(user_id: str, request_id: str, reply: Sequence[bytes]) -> None:
    """Raise what a script refused: the request is another's, or its hold is over."""
    if reply[0] == b"conflict":
        raise HoldConflict(reply[1].decode(), request_id, "the sponsorship pool", int(reply[2]))
    if reply[0] == b"closed":
        raise HoldClosed(user_id, request_id, HoldState(reply[1].decode()))
