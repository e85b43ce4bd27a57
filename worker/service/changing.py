"""Changes of accounts. The name of the API key is the actor of each; repeats are harmless, as those of `Accounts`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request, Response

from schemas.service import AccountChange, ClosedAccount
from worker.rules.account import ChangeAnswer
from worker.rules.api_keys import ApiKey
from worker.service import bodies
from worker.service.asking import IdempotencyKey, answered, named_once
from worker.service.reading import state_of
from worker.service.service import Here


async def _key(request: Request) -> ApiKey:
    key = request.state.key
    assert isinstance(key, ApiKey)
    return key


Key = Annotated[ApiKey, Depends(_key)]


def _changed(change: ChangeAnswer) -> Response:
    facts = {name: value for name, value in change._asdict().items() if name in AccountChange.model_fields}
    return answered(AccountChange(**facts | {"account": state_of(change.account)}))


def _cause(key: ApiKey, body: bodies.ChangeBody) -> dict[str, Any]:
    return {"actor": key.name, "reason": body.reason}


async def open_account(here: Here, key: Key, body: bodies.OpenBody) -> Response:
    """Open an account on a plan."""
    return _changed(
        await here.change(
            lambda accounts: accounts.open(
                body.user_id,
                body.plan,
                status=body.status,
                period_start=body.period_start,
                period_end=body.period_end,
                rollover=body.rollover,
                timezone=body.timezone,
                **_cause(key, body),
            )
        )
    )


async def grant(here: Here, key: Key, body: bodies.GrantBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Grant purchased units, once for the key of the order."""
    order = named_once("key", body.key, idempotency_key)
    return _changed(
        await here.change(
            lambda accounts: accounts.grant(
                body.user_id,
                body.meter,
                body.amount,
                order,
                category=body.category,
                priority=body.priority,
                effective_at=body.effective_at,
                expires_at=body.expires_at,
                open_plan=body.open_plan,
                **_cause(key, body),
            )
        )
    )


async def claw_back(
    here: Here, key: Key, body: bodies.ClawBackBody, idempotency_key: IdempotencyKey = None
) -> Response:
    """Take purchased units back, as after a refund. A total of an order needs no key."""
    refund = None
    if body.key is not None or idempotency_key is not None or body.total_refunded is None:
        refund = named_once("key", body.key, idempotency_key)
    return _changed(
        await here.change(
            lambda accounts: accounts.claw_back(
                body.user_id,
                body.meter,
                body.amount,
                refund,
                order=body.order,
                total_refunded=body.total_refunded,
                **_cause(key, body),
            )
        )
    )


async def reverse(here: Here, key: Key, body: bodies.ReverseBody) -> Response:
    """Put the units of an event back into their buckets, once."""
    return _changed(
        await here.change(lambda accounts: accounts.reverse(body.user_id, body.event_id, **_cause(key, body)))
    )


async def renew(here: Here, key: Key, body: bodies.RenewBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Say that an invoice paid a period, once for the id of the invoice."""
    invoice = named_once("invoice_id", body.invoice_id, idempotency_key)
    return _changed(
        await here.change(
            lambda accounts: accounts.renew(
                body.user_id, invoice, body.period_start, body.period_end, **_cause(key, body)
            )
        )
    )


async def change_plan(here: Here, key: Key, body: bodies.ChangePlanBody) -> Response:
    """Put the account on another plan, now, at the end of its period, or at a time."""
    return _changed(
        await here.change(
            lambda accounts: accounts.change_plan(
                body.user_id, body.plan, at=body.at, period_end=body.period_end, **_cause(key, body)
            )
        )
    )


async def set_status(here: Here, key: Key, body: bodies.SetStatusBody) -> Response:
    """Set the status of an account, or end it later."""
    return _changed(
        await here.change(
            lambda accounts: accounts.set_status(body.user_id, body.status, at=body.at, **_cause(key, body))
        )
    )


async def set_limit(
    here: Here, key: Key, body: bodies.SetLimitBody, idempotency_key: IdempotencyKey = None
) -> Response:
    """Limit what an account spends of a meter per day, week or month. The key is optional."""
    named = None
    if body.key is not None or idempotency_key is not None:
        named = named_once("key", body.key, idempotency_key)
    return _changed(
        await here.change(
            lambda accounts: accounts.set_limit(
                body.user_id, body.meter, body.per, body.amount, named, of=body.of, **_cause(key, body)
            )
        )
    )


async def forgive_debt(
    here: Here, key: Key, body: bodies.ForgiveDebtBody, idempotency_key: IdempotencyKey = None
) -> Response:
    """Forgive debt of an account on a meter, once for the key."""
    named = named_once("key", body.key, idempotency_key)
    return _changed(
        await here.change(
            lambda accounts: accounts.forgive_debt(
                body.user_id, body.meter, body.amount, key=named, **_cause(key, body)
            )
        )
    )


async def set_trust(here: Here, key: Key, body: bodies.SetTrustBody) -> Response:
    """Put the account into a trust tier of the sponsorship pool."""
    return _changed(
        await here.change(lambda accounts: accounts.set_trust(body.user_id, body.trust, **_cause(key, body)))
    )


async def close(here: Here, key: Key, body: bodies.CloseBody) -> Response:
    """Close an account and erase the person. This cannot be undone."""
    name = await here.change(
        lambda accounts: accounts.close_account(body.user_id, forfeit=body.forfeit, **_cause(key, body))
    )
    return answered(ClosedAccount(name=name))
