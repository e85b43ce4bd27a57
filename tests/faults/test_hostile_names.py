"""Scenario 23: names made to reach other keys. Calls and workers refuse them everywhere, and touch no other key."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.events import Refusal, UsageEvent
from tests.faults.hostile import GRANT, append, append_fields, key_space, payload
from tests.faults.house import METER, PARTITIONS, House, Trusting
from tests.support.ledger import give_account
from tests.support.streams import account_of, partition_of
from worker.client import Billing
from worker.errors import InvalidRequest
from worker.keyspace import keys

VICTIM = "user-0"
NAMES = {
    "braces": "{p0}:pending:" + VICTIM,
    "braces of the pool": "{sponsor}:today:" + VICTIM,
    "line end": VICTIM + "\r\nDEL mf:bell\r\n",
    "trailing line end": VICTIM + "\n",
    "NUL": VICTIM + "\x00",
    "right-to-left mark": "\u202e" + VICTIM,
    "hold of another": VICTIM + "#job-1",
    "pattern": "*",
    "10 kB": "u" * 10_000,
}
# Fields of an event in which they are wrong.
REFUSED = {
    "user_id": Refusal.BAD_USER_ID,
    "event_id": Refusal.BAD_EVENT_ID,
    "hold_key": Refusal.BAD_HOLD_KEY,
    "meter": Refusal.BAD_METER,
}
RELAY = "relay_credits"
CALLER = "caller"
# Every call with valid arguments, in an order in which all succeed.
CALLS: dict[str, dict[str, Any]] = {
    "check": {"user_id": CALLER, "meter": RELAY, "backend": "gemini"},
    "remaining": {"user_id": CALLER, "meter": RELAY, "tier": "core"},
    "plan_backend": {
        "user_id": CALLER, "preference": "gemini_first", "has_hardware": True, "meter": RELAY, "tier": "core",
    },
    "reserve": {"user_id": CALLER, "meter": RELAY, "amount": 5, "key": "job-1", "backend": "gemini"},
    "capture": {
        "user_id": CALLER, "meter": RELAY, "key": "job-1", "event_id": "page-1", "amount": 1, "backend": "gemini",
    },
    "extend": {"user_id": CALLER, "meter": RELAY, "key": "job-1", "amount": 6},
    "release": {"user_id": CALLER, "meter": RELAY, "key": "job-1"},
    "settle": {
        "user_id": CALLER, "meter": RELAY, "key": "job-1", "actual": 1, "event_id": "rest", "backend": "gemini",
    },
    "charge": {"user_id": CALLER, "meter": RELAY, "amount": 1, "event_id": "charge-1", "backend": "gemini"},
    "emit": {"user_id": CALLER, "meter": RELAY, "quantity": 1, "event_id": "e1", "hold_key": "job-2"},
    "estimate": {"user_id": CALLER, "meter": RELAY, "quantity": 1, "backend": "gemini"},
    "decide": {"user_id": CALLER, "estimate": 5, "request_id": "request-1"},
    "confirm_partial": {"user_id": CALLER, "estimate": 5, "request_id": "request-2", "paid": 1},
    "settle_sponsored": {"user_id": CALLER, "request_id": "request-1", "actual": 5},
    "release_sponsored": {"user_id": CALLER, "request_id": "request-2", "reason": "cancelled"},
    "credit_pool": {"request_id": "request-3", "paid": 10},
}  # fmt: skip
# Arguments that are names; no other argument becomes part of a key.
ARGUMENTS = {"user_id", "meter", "key", "event_id", "hold_key", "request_id", "backend", "tier", "preference"}
# These take events, which cannot have such names.
OTHERS = {"emit_events", "send_spooled", "run", "close", "connect", "counters"}


@pytest.mark.scenario(number=23)
def test_names_in_the_streams_are_refused_and_no_key_is_touched(house: House) -> None:
    senders = [next(each for each in house.users if partition_of(house.settings, each) == p) for p in PARTITIONS]
    occupy(house)
    # A stream entry that names its own user may cause a reload of that user's balance.
    house.redis.delete(*(account_of(house.settings, user).balance for user in senders))
    before = key_space(house.redis)
    for partition, user in zip(PARTITIONS, senders, strict=True):
        for number, name in enumerate(NAMES.values()):
            for field, reason in REFUSED.items():
                data = payload(user, f"{field}-{number}", **{field: json.dumps(name)})
                append(house, partition, data, reason, marked=True)
            append_fields(house, partition, {"v": "1", "r": name}, Refusal.BAD_USER_ID)
    for name in NAMES.values():
        for fields in (
            GRANT | {"user": name, "request": "request-1"},
            GRANT | {"user": VICTIM, "request": name},
            {"v": "1", "k": "credit", "request": name, "paid": "10"},
            {"v": "1", "r": name},
        ):
            append_fields(house, keys.SPONSORSHIP, fields, Refusal.BAD_POOL_ENTRY)
    with house.dyno():
        house.wait_until_drained()
        assert key_space(house.redis) == before
        house.emit(8)
        house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=23)
def test_no_call_takes_such_a_name_and_no_key_is_touched(house: House) -> None:
    assert {name for name in dir(Billing) if not name.startswith("_")} - OTHERS == set(CALLS)
    occupy(house)
    give_account(house.settings, CALLER, "core")
    with Billing.connect(house.settings, trust=Trusting()) as billing:
        before = key_space(house.redis)
        for call, usual in CALLS.items():
            for argument in ARGUMENTS & usual.keys():
                for name in NAMES.values():
                    with pytest.raises(InvalidRequest, match=f"^{argument}: "):
                        getattr(billing, call)(**usual | {argument: name})
        assert key_space(house.redis) == before
        assert house.backlog() == 0
        # The name alone was the reason: with the usual names every call succeeds.
        for call, usual in CALLS.items():
            getattr(billing, call)(**usual)
    house.accepted.grants["request-1"] = 5
    amounts = {"page-1": 1, "rest": 1, "charge-1": 1, "e1": 1}
    house.accept(UsageEvent(event_id=name, user_id=CALLER, meter=RELAY, quantity=n) for name, n in amounts.items())
    house.drain()
    house.prove()


@pytest.mark.scenario(number=23)
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_no_event_can_be_made_with_such_a_name(name: str) -> None:
    usual = {"user_id": VICTIM, "event_id": "e1", "hold_key": "job-1", "meter": METER, "quantity": 1}
    UsageEvent.model_validate(usual)
    for field in REFUSED:
        with pytest.raises(ValidationError):
            UsageEvent.model_validate(usual | {field: name})


def occupy(house: House) -> None:
    """Give the users data to lose: holds, an outcome of a charge, and a promise of the pool."""
    with Billing.connect(house.settings, trust=Trusting()) as billing:
        for user in house.users:
            billing.reserve(user, METER, 3, "job-1")
            house.accepted.holds[user, METER, "job-1"] = 3
            billing.charge(user, METER, 1, "charge-1")
            house.accept([UsageEvent(event_id="charge-1", user_id=user, meter=METER, quantity=1)])
            request = f"request-of-{user}"
            house.accepted.promises[request] = billing.decide(user, 20, request).absorb
    house.drain()
