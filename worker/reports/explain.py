"""Explain the payment of one event."""

from __future__ import annotations

from typing import Any

from schemas.reports import (
    BucketUnits,
    EventState,
    Explanation,
    GrantPart,
    RefusedEvent,
)
from worker.errors import NotFound
from worker.keyspace.entries import owner_of
from worker.ledger import reports
from worker.ledger.accounts import read_entry
from worker.ledger.connection import Postgres
from worker.ledger.orders import read_credits
from worker.ledger.repeats import read_repeat
from worker.reports.usage import parts_of, require_identifier, snapshot_of, unit_of
from worker.resources import Resources
from worker.rules.credits import purchases_of
from worker.rules.explanations import event_sentences, repeat_sentence, what_it_used
from worker.rules.fractions import MILLIONTHS, as_decimal
from worker.rules.grants import UNNAMED, burn_order, unnamed
from worker.rules.rows import LateRepeat, UsageRow
from worker.rules.wallets import ITSELF, cost_in_millionths
from worker.rules.waterfall import limit_in_force


def explain(resources: Resources, user_id: str, event_id: str) -> Explanation:
    """Explain which bucket paid how much for an event, and why.

    The answer has figures and sentences, with the balances before and after the event.
    Raises ReportError for an event that is neither in the log nor a dead letter.
    """
    require_identifier("user_id", user_id)
    require_identifier("event_id", event_id)
    with snapshot_of(resources) as postgres:
        event = reports.read_event(postgres, user_id, event_id)
        if event is None:
            return _explain_refused(postgres, user_id, event_id)
        explained = (
            _explain_uncollected(resources, event)
            if event.seq is None
            else _explain_applied(resources, postgres, event, event.seq)
        )
        repeat = read_repeat(postgres, user_id, event_id)
        return explained if repeat is None else _with_repeat(explained, repeat)


def _explain_applied(resources: Resources, postgres: Postgres, event: UsageRow, seq: int) -> Explanation:
    user_id, meter = event.user_id, event.payer
    terms = reports.detail_before(postgres, user_id, meter, seq, "allowance")
    plan = reports.detail_before(postgres, user_id, "", seq, "plan").get("plan")
    status = reports.detail_before(postgres, user_id, "", seq, "status").get("status", "")
    used, rollover, purchased = reports.balance_before(postgres, user_id, meter, seq)
    reversal = read_entry(postgres, user_id, f"reverse:{event.event_id}", meter)
    limit = limit_in_force(terms.get("allowance", 0), status)
    explanation = Explanation(
        **_facts(resources, event),
        state=EventState.REVERSED if reversal else EventState.APPLIED,
        sentences=(),
        plan=plan,
        status=status,
        unlimited=limit is None,
        spill=terms.get("spill", True),
        limit=limit,
        before=BucketUnits(used=used, rollover=rollover, purchased=purchased),
        after=BucketUnits(
            used=used + event.from_subscription,
            rollover=rollover - event.from_rollover - event.overflow_to_debt,
            purchased=purchased - event.from_purchased,
        ),
        grants=_grants_of(postgres, event),
        gone=reversal.detail.get("gone", {}) if reversal else {},
        late=event.period_start is not None and event.occurred_at < event.period_start,
        reversed_at=reversal and reversal.created_at,
        reversed_by=reversal and reversal.actor,
        reversed_reason=reversal and reversal.reason,
    )
    return explanation.model_copy(update={"sentences": tuple(event_sentences(explanation))})


def _grants_of(postgres: Postgres, event: UsageRow) -> tuple[GrantPart, ...]:
    """Return the grants that an event took units of, in the order in which they pay."""
    if not event.grants:
        return ()
    entries = [entry for entry in read_credits(postgres, [event.user_id]) if entry.meter == event.payer]
    orders = purchases_of(entries).orders
    grants = [order.grant for key, order in orders.items() if key in event.grants and order.grant is not None]
    if UNNAMED in event.grants:
        grants.append(unnamed(0))
    return tuple(
        GrantPart(
            order=grant.key or None,
            units=event.grants[grant.key],
            category=grant.category,
            priority=grant.priority,
            expires_at=grant.expires_at,
        )
        for grant in sorted(grants, key=burn_order)
    )


def _explain_uncollected(resources: Resources, event: UsageRow) -> Explanation:
    explanation = Explanation(**_facts(resources, event), state=EventState.UNCOLLECTED, sentences=())
    sentence = f"No account was open for {event.user_id}: the event is recorded in full as uncollected, no bucket paid."
    return explanation.model_copy(update={"sentences": (what_it_used(explanation), sentence)})


def _with_repeat(explained: Explanation, repeat: LateRepeat) -> Explanation:
    sentence = repeat_sentence(repeat.times, repeat.last_at)
    return explained.model_copy(
        update={
            "sentences": (*explained.sentences, sentence),
            "delivered_again": repeat.times,
            "delivered_again_at": repeat.last_at,
        }
    )


def _explain_refused(postgres: Postgres, user_id: str, event_id: str) -> Explanation:
    """Explain an event that only dead letters name. Raises ReportError without any."""
    letters = [
        RefusedEvent(dead_letter=number, reason=reason, detail=detail, state=state, created_at=created_at)
        for number, reason, detail, state, created_at, payload in reports.letters_naming(postgres, event_id)
        if (owner_of(payload) or ("", "", ""))[::2] == (user_id, event_id)
    ]
    if not letters:
        raise NotFound(f"event_id: {user_id} has no event {event_id}, applied or refused; it may not be drained yet")
    sentences = [
        f"Refused at {letter.created_at.isoformat()} as {letter.reason} ({letter.detail}): dead letter "
        f"{letter.dead_letter}, {letter.state}. No bucket paid."
        for letter in letters
    ]
    return Explanation(
        user_id=user_id,
        event_id=event_id,
        state=EventState.DEAD_LETTER,
        sentences=tuple(sentences),
        refusals=tuple(letters),
    )


def _facts(resources: Resources, event: UsageRow) -> dict[str, Any]:
    """Return the fields that the row of an event holds by itself."""
    columns = event._asdict()
    facts = {name: columns[name] for name in Explanation.model_fields if name in columns and name != "grants"}
    left = event.remainder
    if left is not None and left >= 0:
        exact = cost_in_millionths(event.quantity, event.multiplier, event.price or ITSELF)
        before = event.amount * MILLIONTHS + left - exact
        facts |= {"carried_before": as_decimal(before), "carried_after": as_decimal(left)}
    if event.wallet is not None:
        facts["wallet_unit"] = unit_of(resources, event.wallet)
    return {**facts, "unit": unit_of(resources, event.meter), "parts": parts_of(event)}
