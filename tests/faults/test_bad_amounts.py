"""Scenario 21: invalid amounts. They are dead letters or refused, no balance moves, and other events are billed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from schemas.events import Refusal
from tests.faults.hostile import GRANT, append, append_fields, count_as_pending, key_space, payload
from tests.faults.house import METER, House
from tests.support.ledger import rows
from tests.support.streams import partition_of
from worker.client import Billing
from worker.errors import InvalidRequest
from worker.keyspace import keys

# As JSON text.
AMOUNTS = {
    "negative": ("-1", Refusal.BAD_QUANTITY),
    "2^63": (str(2**63), Refusal.BAD_QUANTITY),
    "1e400": ("1e400", Refusal.BAD_QUANTITY),
    "NaN": ("NaN", Refusal.NOT_JSON),
    "true": ("true", Refusal.BAD_QUANTITY),
    "text": ('"1"', Refusal.BAD_QUANTITY),
    "5,000 digits": ("1" * 5_000, Refusal.NOT_JSON),
}
# Invalid amounts for the client, as Python values. Digits as text are invalid here also.
VALUES = (-1, 2**63, 1e400, float("nan"), True, "1", 10**5_000)


@pytest.mark.scenario(number=21)
def test_no_amount_that_is_none_moves_a_balance_and_its_neighbours_are_billed(house: House) -> None:
    victim = house.users[0]
    house.users = house.users[1:]
    partition = partition_of(house.settings, victim)
    before = state_of(house, victim)
    for number, (text, reason) in enumerate(AMOUNTS.values()):
        house.emit(7)
        append(house, partition, payload(victim, f"raw-{number}", quantity=text), reason)
        # An event that our scripts counted must leave pending also.
        count_as_pending(house, victim, f"marked-{number}")
        append(house, partition, payload(victim, f"marked-{number}", quantity=text), reason, marked=True)
    with house.dyno():
        house.wait_until_drained()
    assert state_of(house, victim) == before
    assert house.recorded() == 7 * len(AMOUNTS)
    house.prove()


@pytest.mark.scenario(number=21)
def test_no_amount_that_is_none_moves_the_pool_and_its_neighbours_are_paid(house: House) -> None:
    for number, (text, _) in enumerate(AMOUNTS.values()):
        for field in ("held", "actual", "paid", "absorbed", "budget", "window"):
            fields = GRANT | {"user": house.users[0], "request": f"{field}-{number}", field: text}
            append_fields(house, keys.SPONSORSHIP, fields, Refusal.BAD_POOL_ENTRY)
        fields = {"v": "1", "k": "credit", "request": f"credit-{number}", "paid": text}
        append_fields(house, keys.SPONSORSHIP, fields, Refusal.BAD_POOL_ENTRY)
        house.billing.credit_pool(f"neighbour-{number}", 100)
    with house.dyno():
        house.wait_until_drained()
    initial = house.resources.catalogue.sponsorship.initial
    assert rows(house.settings, "SELECT balance FROM sponsor_pool") == [(initial + 10 * len(AMOUNTS),)]
    assert rows(house.settings, "SELECT count(*) FROM sponsor_grant") == [(0,)]
    house.prove()


@pytest.mark.scenario(number=21)
def test_no_call_takes_an_amount_that_is_none(house: House) -> None:
    user, billing = house.users[0], house.billing
    billing.reserve(user, METER, 5, "job-1")
    house.accepted.holds[user, METER, "job-1"] = 5
    before = key_space(house.redis)
    for value in VALUES:
        taken = [name for name, call in calls(billing, user, value).items() if not is_refused(call)]
        # A negative cost is no cost: the pool has nothing to cover, and answers so.
        assert taken == (["decide"] if value == -1 else [])
    assert key_space(house.redis) == before
    assert house.backlog() == 0
    house.prove()


def is_refused(call: Callable[[], object]) -> bool:
    """Return True if a call refuses its argument."""
    try:
        call()
    except InvalidRequest:
        return True
    return False


def calls(billing: Billing, user: str, value: object) -> dict[str, Callable[[], object]]:
    """Return every call that takes an amount, with this one."""
    # The calls are typed; this is for callers without type checks.
    amount: int = value  # type: ignore[assignment]
    return {
        "check": lambda: billing.check(user, METER, amount),
        "reserve": lambda: billing.reserve(user, METER, amount, "job-2"),
        "ttl_seconds": lambda: billing.reserve(user, METER, 1, "job-2", ttl_seconds=amount),
        "emit": lambda: billing.emit(user, METER, amount, event_id="e1"),
        "capture": lambda: billing.capture(user, METER, "job-1", "e1", amount),
        "settle": lambda: billing.settle(user, METER, "job-1", amount),
        "charge": lambda: billing.charge(user, METER, amount, "e1"),
        "estimate": lambda: billing.estimate(user, METER, amount),
        "decide": lambda: billing.decide(user, amount, "request-1"),
        "confirm_partial": lambda: billing.confirm_partial(user, 10, "request-1", paid=amount),
        "settle_sponsored": lambda: billing.settle_sponsored(user, "request-1", amount),
        "paid": lambda: billing.settle_sponsored(user, "request-1", 1, paid=amount),
        "credit_pool": lambda: billing.credit_pool("request-1", amount),
    }


def state_of(house: House, user: str) -> list[tuple[object, ...]]:
    """Return an account's version and balances."""
    query = "SELECT seq, meter, used, rollover, purchased FROM account JOIN balance USING (user_id) WHERE user_id = %s"
    return rows(house.settings, query, user)
