"""Reports of one account, the plans, and the feed of notices. No list is without a limit."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response

from schemas.events import Identifier
from schemas.notices import Kind
from schemas.service import AccountState, MeterState, PlanMeter, PlanOffer, Plans
from worker.rules.account import Account
from worker.service.asking import answered
from worker.service.service import Here

User = Annotated[Identifier, Query(description="the account")]
Limit = Annotated[int, Query(ge=1, le=1_000, description="rows of this page")]
Before = Annotated[int | None, Query(ge=1, description="`more_before_seq` of the page before")]


def state_of(account: Account) -> AccountState:
    """Return an account as the service answers it."""
    meters = tuple(
        MeterState(
            meter=each.meter,
            limit=each.limit(account.status),
            used=each.used,
            rollover=each.rollover,
            purchased=each.purchased,
            cadence=each.cadence,
            period_start=each.period_start,
            period_end=each.period_end,
        )
        for _, each in sorted(account.balances.items())
    )
    names = ("user_id", "plan", "status", "trust", "version", "next_plan", "next_status")
    return AccountState(**{name: getattr(account, name) for name in names}, meters=meters)


async def balances(here: Here, user_id: User) -> Response:
    """Report plan, status and the buckets of every meter, as they are stored and due now."""
    return answered(state_of(await here.report(lambda accounts: accounts.show(user_id))))


async def usage(here: Here, user_id: User) -> Response:
    """Report every meter of an account as a check would find it, with what is pending."""
    return answered(await here.report(lambda accounts: accounts.usage(user_id)))


async def breakdown(
    here: Here,
    user_id: User,
    documents: Limit = 200,
    after: Annotated[str | None, Query(max_length=256, description="`more_documents_after` of the page before")] = None,
) -> Response:
    """Report the open periods by voice and model, and by document."""
    return answered(await here.report(lambda accounts: accounts.breakdown(user_id, documents=documents, after=after)))


async def engagement(here: Here, user_id: User) -> Response:
    """Report the whole life of an account by voice and month."""
    return answered(await here.report(lambda accounts: accounts.engagement(user_id)))


async def timeline(here: Here, user_id: User, limit: Limit = 50, before_seq: Before = None) -> Response:
    """Report changes of an account, newest first: who made each, and why."""
    return answered(await here.report(lambda accounts: accounts.timeline(user_id, limit=limit, before_seq=before_seq)))


async def events(here: Here, user_id: User, limit: Limit = 50, before_seq: Before = None) -> Response:
    """Report recorded events of an account, newest first."""
    return answered(await here.report(lambda accounts: accounts.events(user_id, limit=limit, before_seq=before_seq)))


async def explain(here: Here, user_id: User, event_id: Annotated[Identifier, Query()]) -> Response:
    """Explain which bucket paid how much for an event."""
    return answered(await here.report(lambda accounts: accounts.explain(user_id, event_id)))


async def credits(here: Here, user_id: User) -> Response:
    """Report every grant of an account: given, left, when it ends, what used it."""
    return answered(await here.report(lambda accounts: accounts.credits(user_id)))


async def limits(here: Here, user_id: User) -> Response:
    """Report every limit of an account, and what is left in its open window."""
    return answered(await here.report(lambda accounts: accounts.limits(user_id)))


async def plans(here: Here) -> Response:
    """List the active plans of the catalogue that this process carries."""
    catalogue = here.billing.context.catalogue
    offers = tuple(
        PlanOffer(
            plan=code,
            name=plan.name,
            tier=plan.tier,
            price_month_cents=plan.price_month_cents,
            price_year_cents=plan.price_year_cents,
            trial_days=plan.trial_days,
            meters=tuple(
                PlanMeter(
                    meter=meter,
                    quantity=None if grant.wallet else grant.quantity,
                    cadence=None if grant.wallet else grant.cadence,
                    rollover_cap=grant.rollover_cap,
                    wallet=grant.wallet,
                    price=None if grant.price is None else str(grant.price),
                )
                for meter, grant in plan.meters.items()
            ),
        )
        for code, plan in catalogue.plans.items()
        if plan.active
    )
    return answered(Plans(plans=offers))


async def notices(
    here: Here,
    after: Annotated[int, Query(ge=0, description="`cursor` of the page before")] = 0,
    limit: Limit = 100,
    kind: Annotated[list[Kind] | None, Query(max_length=12, description="only these kinds; repeatable")] = None,
    user_id: Annotated[Identifier | None, Query(description="only notices about this account")] = None,
) -> Response:
    """Read the feed of notices, in the order in which they were told."""
    return answered(
        await here.report(lambda accounts: accounts.notices(after=after, limit=limit, kinds=kind, user_id=user_id))
    )
