"""Answers in words: the reason for a check's answer, and the buckets that paid for an event. Pure rules, no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from schemas.answers import CheckAnswer, Parts, Reason
from schemas.reports import BucketUnits, Explanation, GrantPart
from worker.rules.fractions import MILLIONTHS, as_decimal
from worker.rules.wallets import ITSELF, cost_in_millionths
from worker.rules.waterfall import ENTITLED_STATUSES


def explain_check(answer: CheckAnswer) -> str:
    """Explain a check in one or two sentences, with the numbers."""
    request = f"{answer.requested:,} of {answer.meter}"
    verdict = "Allowed" if answer.allowed else "Denied"
    if answer.reason in _WITHOUT_NUMBERS:
        return f"{verdict}: {_WITHOUT_NUMBERS[answer.reason].format(request=request, user=answer.user_id)}"
    if answer.reason is Reason.BACKEND_CAP_EXCEEDED and answer.cap is not None:
        return (
            f"{verdict}: {request} on {answer.backend} does not fit into the {answer.available:,} available. "
            f"Of its sub-cap {answer.cap:,} there are {answer.cap_used:,} used and {answer.cap_pending:,} pending."
        )
    if answer.limited_by is not None:
        limit = answer.limited_by
        whose = {"plan": "of the plan", "operator": "of an operator", "user": "of the user"}[limit.set_by]
        asked = request
        if answer.wallet is not None:
            asked = f"{request} cost {answer.cost:,} of {answer.wallet}, at {answer.price} each. That"
        return (
            f"{verdict}: {asked} does not fit into the limit {whose}, {limit.amount:,} per {limit.per}. Of it there "
            f"are {limit.used:,} used and {answer.pending:,} pending; the next {limit.per} begins at "
            f"{limit.ends_at.isoformat()}."
        )
    if answer.wallet is not None:
        return f"{verdict}: {_in_its_wallet(answer, request)}"
    if answer.limit is None or answer.available is None:
        return f"{verdict} ({answer.reason.value}): {request}."
    if answer.reason is Reason.WITHIN_LIMIT:
        sentence = f"{verdict}: {request} fits into the {answer.available:,} available."
    elif answer.reason is Reason.LIMIT_EXCEEDED:
        sentence = f"{verdict}: {request} does not fit into the {answer.available:,} available."
    elif answer.reason is Reason.RENEWAL_MISSING:
        sentence = (
            f"{verdict}: {request} does not fit into the {answer.available:,} available: "
            "the period is over and no invoice has paid the next one."
        )
    else:
        sentence = f"{verdict} ({answer.reason.value}): {request}, {answer.available:,} available."
    return (
        f"{sentence} Of the limit {answer.limit:,} there are {max(0, answer.limit - answer.used):,} left; "
        f"rollover {answer.rollover:,}, purchased {answer.purchased:,}, pending {answer.pending:,}."
    )


def _in_its_wallet(answer: CheckAnswer, request: str) -> str:
    """Explain a check of a meter that draws on a wallet: what it costs, and what the wallet has."""
    asked = f"{request} cost {answer.cost:,} of {answer.wallet}, at {answer.price} each"
    if answer.available is None:
        return f"{asked}; that is unlimited."
    fits = "fit" if answer.allowed else "do not fit"
    missing = ": the period is over and no invoice has paid the next one" if answer.kind == "renewal_missing" else ""
    sentence = f"{asked}; they {fits} into the room for {answer.available:,}{missing}."
    if answer.cap is not None:
        sentence += (
            f" Of its cap {answer.cap:,} in the wallet there are {answer.cap_used:,} used and {answer.cap_pending:,} "
            "pending."
        )
    if answer.limit is None:
        return sentence
    return (
        f"{sentence} Of the wallet's limit {answer.limit:,} there are {max(0, answer.limit - answer.used):,} left; "
        f"rollover {answer.rollover:,}, purchased {answer.purchased:,}, pending {answer.pending:,}."
    )


_WITHOUT_NUMBERS = {
    Reason.UNLIMITED: "{request}, usage is unlimited.",
    Reason.METER_NOT_IN_PLAN: "{request}, the plan of {user} lacks this meter and nothing was saved or bought on it.",
    Reason.UNKNOWN_ACCOUNT: "{request}, {user} has no account and there is no default plan.",
    Reason.SUSPENDED: "{request}, the account of {user} is suspended; usage is recorded all the same.",
    Reason.BILLING_DISABLED: "{request}, billing is switched off; usage is recorded all the same.",
    Reason.REDIS_DOWN_DENIED: "{request}, Redis does not answer and the settings let nothing through without it.",
    Reason.REDIS_DOWN_ALLOWED: "{request}, Redis does not answer and the settings let a bounded amount through.",
    Reason.REDIS_DOWN_BOUND_REACHED: "{request}, Redis does not answer and the bounded amount is used up.",
}


def event_sentences(event: Explanation) -> Iterator[str]:
    """Describe an applied event: its usage, the buckets that paid, its period."""
    assert event.parts is not None
    assert event.before is not None
    assert event.after is not None
    before, parts, limit = event.before, event.parts, event.limit
    yield what_it_used(event)
    yield from about_fractions(event)
    if event.status not in ENTITLED_STATUSES:
        yield f"The account was {event.status}, which has no allowance."
    if event.unlimited:
        yield f"Usage was unlimited on plan {event.plan}: the subscription took all of it."
    elif not event.spill:
        yield f"Nothing spills on this meter: all of it counts against the limit, {limit:,}; {before.used:,} were used."
    elif event.amount == 0:
        yield "It moved nothing."
    else:
        yield from _who_paid(parts, before, event.after, limit or 0)
        yield from _which_grants(event)
    if event.period_start is not None and event.occurred_at is not None:
        yield f"It counts in the period that began {event.period_start.isoformat()}."
        if event.late:
            yield (
                f"The work was done before that, at {event.occurred_at.isoformat()}: an event belongs to the period "
                "that is open when it is applied."
            )
    if event.clamped:
        yield "Its time was ahead of the clock and was set to its arrival."
    if event.reversed_at is not None:
        by = f" by {event.reversed_by}" if event.reversed_by else ""
        why = f": {event.reversed_reason}" if event.reversed_reason else ""
        yield f"It was reversed at {event.reversed_at.isoformat()}{by}{why}."
        for order, units in event.gone.items():
            yield f"{units:,} of its units are gone: they came from {order}, which had ended by then."


def repeat_sentence(times: int, last_at: datetime) -> str:
    """Describe that an event came again late, in one sentence."""
    how_often = "" if times == 1 else f" {times:,} times, the last time"
    return (
        f"It was delivered again{how_often} at {last_at.isoformat()}, after its outcome was forgotten, and billed "
        "once: a late retry, or a key used twice."
    )


def _who_paid(parts: Parts, before: BucketUnits, after: BucketUnits, limit: int) -> Iterator[str]:
    if parts.from_subscription:
        left = max(0, limit - before.used)
        yield f"The subscription paid {parts.from_subscription:,} of the {left:,} left of its {limit:,}."
    elif limit:
        yield f"Nothing was left of the subscription's {limit:,}."
    if parts.from_rollover:
        yield f"Rollover paid {parts.from_rollover:,} of {before.rollover:,}."
    elif before.rollover < 0 and (parts.from_purchased or parts.overflow_to_debt):
        yield f"Rollover was a debt of {-before.rollover:,} and paid nothing."
    if parts.from_purchased:
        yield f"Purchased credits paid {parts.from_purchased:,} of {before.purchased:,}."
    if parts.overflow_to_debt:
        yield f"Nothing was left for {parts.overflow_to_debt:,}: rollover is a debt of {-after.rollover:,} now."


def _which_grants(event: Explanation) -> Iterator[str]:
    """Name the grants that the purchased units came from."""
    if event.grants:
        parts = [f"{part.units:,} of {_grant_in_words(part)}" for part in event.grants]
        yield f"They came from {'; '.join(parts)}."


def _grant_in_words(part: GrantPart) -> str:
    if part.order is None:
        return "credit without an order"
    end = "without an end" if part.expires_at is None else f"until {part.expires_at.isoformat()}"
    return f"{part.order} ({part.category}, priority {part.priority}, {end})"


def what_it_used(event: Explanation) -> str:
    """Describe the usage of an event in the log, in one sentence."""
    if event.wallet is not None:
        times = f" × {event.multiplier}" if event.multiplier != "1" else ""
        return (
            f"Event {event.event_id} used {event.quantity:,}{times} of {event.meter} ({event.unit}), which draws on "
            f"the wallet {event.wallet} at {event.price} a unit: {event.amount:,} {event.wallet_unit}."
        )
    times = f" × {event.multiplier} = {event.amount:,}" if event.multiplier != "1" else ""
    return f"Event {event.event_id} used {event.quantity:,}{times} of {event.meter} ({event.unit})."


def about_fractions(event: Explanation) -> Iterator[str]:
    """Describe what became of a fraction of a unit; yields nothing for an event without one."""
    if event.quantity is None or event.multiplier is None or event.amount is None:
        return
    exact = cost_in_millionths(event.quantity, event.multiplier, event.price or ITSELF)
    if event.carried_after is not None:
        yield (
            f"Exactly that is {as_decimal(exact)}: with {event.carried_before} carried from earlier events it paid "
            f"{event.amount:,} and left {event.carried_after} to the next."
        )
    elif exact != event.amount * MILLIONTHS:
        yield f"Exactly that is {as_decimal(exact)}; it was rounded to {event.amount:,}."
