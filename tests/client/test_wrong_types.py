"""Any public call takes a wrong type for an argument, or raises the promised kind of error, naming the argument."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest

from config.catalogue import CatalogueError
from config.settings import Settings
from schemas.events import UsageEvent
from tests.client.clients import open_client
from tests.support.ledger import give_account
from worker.accounts import Accounts
from worker.client import Billing, Hold
from worker.errors import AccountError, BadInput, BillingError, ReportError

USER, METER = "user-1", "premium_voice"
NOW = datetime.now(UTC)
MONTH = timedelta(days=30)
WRONG: list[Any] = [None, "text", "", "\ud800", 5, -1, 1.5, float("nan"), True, [1], {"a": 1}, {1: [2]}, b"bytes"]
_numbers = count()

Arguments = dict[str, Any]


def new_id() -> str:
    return f"id-{next(_numbers)}"


def of_work(**named: Any) -> Arguments:
    """What every call that records takes."""
    return {"source": "tts", "reference_id": "r", "dimensions": {"voice": "narrator"}, "traceparent": None} | named


# Valid arguments of each call. Each is wrong once in each way, beside the others.
CALLS: dict[str, Callable[[], Arguments]] = {
    "check": lambda: {"user_id": USER, "meter": METER, "amount": 1, "backend": None, "pay_from": None},
    "remaining": lambda: {"user_id": USER, "meter": METER, "tier": None},
    "plan_backend": lambda: {
        "user_id": USER, "preference": "gemini_first", "has_hardware": False, "meter": METER, "tier": None,
    },
    "reserve": lambda: {
        "user_id": USER, "meter": METER, "amount": None, "key": new_id(), "ttl_seconds": 30, "quantity": 1,
        "model_slug": None, "multiplier": "1", "backend": None, "keep_alive": False, "pay_from": None,
    },
    "extend": lambda: {"user_id": USER, "meter": METER, "key": new_id(), "ttl_seconds": 30, "amount": 1},
    "emit": lambda: of_work(
        user_id=USER, meter=METER, quantity=1, event_id=new_id(), multiplier="1", occurred_at=NOW, hold_key=None
    ),
    "emit_events": lambda: {"events": [UsageEvent(event_id=new_id(), user_id=USER, meter=METER, quantity=1)]},
    "capture": lambda: of_work(
        user_id=USER, meter=METER, key=new_id(), event_id=new_id(), amount=None, quantity=1, model_slug=None,
        multiplier="1", backend=None,
    ),
    "settle": lambda: of_work(
        user_id=USER, meter=METER, key=new_id(), actual=None, quantity=1, model_slug=None, multiplier="1",
        event_id=new_id(), backend=None,
    ),
    "release": lambda: {"user_id": USER, "meter": METER, "key": new_id()},
    "charge": lambda: of_work(
        user_id=USER, meter=METER, amount=None, event_id=new_id(), quantity=1, model_slug=None, multiplier="1",
        backend=None, pay_from=None,
    ),
    "estimate": lambda: {
        "user_id": USER, "meter": METER, "quantity": 1, "model_slug": None, "multiplier": "1", "backend": None,
        "pay_from": None,
    },
    "decide": lambda: {"user_id": USER, "estimate": 1, "request_id": new_id(), "ttl_seconds": 30},
    "confirm_partial": lambda: {
        "user_id": USER, "estimate": 2, "request_id": new_id(), "paid": 1, "ttl_seconds": 30,
    },
    "settle_sponsored": lambda: {
        "user_id": USER, "request_id": new_id(), "actual": 1, "paid": 0, "traceparent": None,
    },
    "release_sponsored": lambda: {"user_id": USER, "request_id": new_id(), "reason": "no work"},
    "credit_pool": lambda: {"request_id": new_id(), "paid": 1, "traceparent": None},
    "send_spooled": lambda: {"limit": 10, "wait_seconds": 0.1},
}  # fmt: skip
OF_HOLDS: dict[str, Callable[[], Arguments]] = {
    "settle": lambda: of_work(
        actual=None, quantity=1, model_slug=None, multiplier="1", event_id=new_id(), backend=None
    ),
    "capture": lambda: of_work(
        event_id=new_id(), amount=None, quantity=1, model_slug=None, multiplier="1", backend=None
    ),
    "extend": lambda: {"ttl_seconds": 30, "amount": 1},
}
WHO: Arguments = {"actor": "shop", "reason": "a test"}
OF_ACCOUNTS: dict[str, Callable[[], Arguments]] = {
    "open": lambda: {
        "user_id": new_id(), "plan": "basic", "status": "active", "period_start": NOW, "period_end": NOW + MONTH,
        "rollover": {METER: 1}, "timezone": "UTC", **WHO,
    },
    "show": lambda: {"user_id": USER},
    "find": lambda: {
        "user_id": USER, "prefix": "user", "log_name": None, "plan": "basic", "status": "active", "after": None,
        "limit": 5,
    },
    "usage": lambda: {"user_id": USER},
    "breakdown": lambda: {"user_id": USER, "documents": 5, "after": None},
    "engagement": lambda: {"user_id": USER},
    "timeline": lambda: {"user_id": USER, "limit": 5, "before_seq": None},
    "events": lambda: {"user_id": USER, "limit": 5, "before_seq": None},
    "explain": lambda: {"user_id": USER, "event_id": "e1"},
    "grant": lambda: {
        "user_id": USER, "meter": METER, "amount": 5, "key": new_id(), "open_plan": None, "category": "paid",
        "priority": 50, "effective_at": NOW + MONTH, "expires_at": NOW + 2 * MONTH, **WHO,
    },
    "credits": lambda: {"user_id": USER},
    "report_usage": lambda: {
        "since": NOW.date(), "until": None, "by": ["day"], "meter": METER, "plan": "basic", "limit": 5,
    },
    "report_top": lambda: {"since": NOW.date(), "until": None, "meter": METER, "limit": 5},
    "report_near_limit": lambda: {"percent": 90, "meter": METER, "limit": 5},
    "report_debtors": lambda: {"meter": METER, "limit": 5},
    "report_purchased": lambda: {"by": "account", "meter": METER, "limit": 5},
    "report_uncollected": lambda: {"since": NOW.date(), "until": None, "meter": METER, "limit": 5},
    "claw_back": lambda: {
        "user_id": USER, "meter": METER, "amount": 1, "key": new_id(), "order": None, "total_refunded": None, **WHO,
    },
    "adjust": lambda: {
        "user_id": USER, "meter": METER, "rollover": 1, "purchased": 1, "used": 1, "key": new_id(), **WHO,
    },
    "forgive_debt": lambda: {"user_id": USER, "meter": METER, "amount": 1, "key": new_id(), **WHO},
    "undo": lambda: {"user_id": USER, "entry": "adjust:none", **WHO},
    "reverse": lambda: {"user_id": USER, "event_id": "e1", **WHO},
    "renew": lambda: {
        "user_id": USER, "invoice_id": new_id(), "period_start": NOW + MONTH, "period_end": NOW + 2 * MONTH, **WHO,
    },
    "change_plan": lambda: {"user_id": USER, "plan": "plus", "at": "now", "period_end": NOW + MONTH, **WHO},
    "set_status": lambda: {"user_id": USER, "status": "active", "at": "now", **WHO},
    "set_period": lambda: {"user_id": USER, "period_end": NOW + MONTH, "key": new_id(), **WHO},
    "set_timezone": lambda: {"user_id": USER, "timezone": "UTC", **WHO},
    "set_notices": lambda: {"user_id": USER, "rules": [{"kind": "balance.debt"}], **WHO},
    "notices": lambda: {"after": 0, "limit": 5, "kinds": ["balance.debt"], "user_id": USER},
    "set_trust": lambda: {"user_id": USER, "trust": "new", **WHO},
    "set_limit": lambda: {
        "user_id": USER, "meter": METER, "per": "day", "amount": 5, "key": new_id(), "of": "user", **WHO,
    },
    "limits": lambda: {"user_id": USER},
    "set_pay_from": lambda: {"user_id": USER, "pay_from": "allowance", **WHO},
    "seed": lambda: {"user_id": new_id(), "amount": 5, "meter": "credits", "plan": "tenant", **WHO},
    "carry_over": lambda: {
        "from_user": USER, "to_user": "other", "key": new_id(), "meter": METER, "with_debt": False, **WHO,
    },
    "close_account": lambda: {"user_id": USER, "forfeit": True, **WHO},
    "reopen": lambda: {"user_id": new_id(), "plan": "basic", **WHO},
}  # fmt: skip


def arguments_of(kind: type, name: str) -> set[str]:
    return set(inspect.signature(getattr(kind, name)).parameters) - {"self"}


def methods_of(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


def test_every_argument_of_every_method_is_wrong_once() -> None:
    assert methods_of(Billing) - {"run", "close"} == CALLS.keys()
    assert methods_of(Hold) - {"release"} == OF_HOLDS.keys()
    assert methods_of(Accounts) - {"close"} == OF_ACCOUNTS.keys()
    for kind, calls in ((Billing, CALLS), (Hold, OF_HOLDS), (Accounts, OF_ACCOUNTS)):
        assert {name: arguments_of(kind, name) for name in calls} == {name: set(call()) for name, call in calls.items()}


def escapes(
    method: Callable[..., Any], valid: Callable[[], Arguments], promised: tuple[type[Exception], ...]
) -> list[str]:
    """What comes of each wrong value for each argument, beside an answer and a promised error that names it."""
    # What the valid call is refused for: an account that was never closed, an event that nobody recorded.
    usual = outcome(method, valid(), promised).partition(": ")[0]
    found = []
    for field in valid():
        for value in WRONG:
            # The base calls name a quantity; an amount stands in its place.
            alone = {"quantity": None, "multiplier": None} if field in {"amount", "actual"} else {}
            arguments = {name: alone.get(name, each) for name, each in valid().items()} | {field: value}
            said = outcome(method, arguments, promised)
            named = said.partition(" (got ")[0]
            if not said or named.partition(": ")[0] == usual or named.endswith(f"no account {value}"):
                continue
            if not re.search(rf"\b{field}\b", named):
                found.append(f"{field}={value!r}: {said}")
    return found


def outcome(method: Callable[..., Any], arguments: Arguments, promised: tuple[type[Exception], ...]) -> str:
    """What a promised error says, nothing for an answer; a word that is no argument for any other error."""
    try:
        method(**arguments)
    except (BadInput, CatalogueError) as error:
        return str(error) if isinstance(error, promised) else f"another kind (got {error!r}"
    except BillingError:  # a well-formed call, and what the account or the hold answers to it
        return ""
    except Exception as error:  # noqa: BLE001 - this is what must not happen
        return f"escaped (got {error!r}"
    return ""


@pytest.fixture(params=["blocking", "awaiting"])
def billing(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Any]:
    give_account(settings, USER, "basic")
    opened = open_client(request.param, settings)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", CALLS)
def test_of_a_call(name: str, billing: Any) -> None:
    found = escapes(getattr(billing, name), CALLS[name], (BillingError,))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", OF_HOLDS)
def test_of_a_call_of_a_hold(name: str, billing: Any) -> None:
    def method(**arguments: Any) -> Any:
        hold = billing.reserve(USER, METER, 5, new_id(), quantity=None)
        try:
            return getattr(hold, name)(**arguments)
        finally:
            hold.release()

    found = escapes(method, OF_HOLDS[name], (BillingError,))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", OF_ACCOUNTS)
def test_of_a_call_about_accounts(name: str, settings: Settings) -> None:
    for user_id in (USER, "other"):
        give_account(settings, user_id, "basic")
    with Accounts.connect(settings) as accounts:
        found = escapes(getattr(accounts, name), OF_ACCOUNTS[name], (AccountError, ReportError, CatalogueError))
    assert not found, "\n".join(found)
