"""Scenario 27: cached balances that are late, lost, or loaded by many clients at once. None overwrites a newer one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Barrier, Event, Thread
from typing import Any

import pytest

from tests.faults.house import METER, SLOW_SECONDS, House, Trusting, thaw
from tests.support.ledger import rows
from tests.support.streams import account_of
from worker.client import Billing, ledger
from worker.keyspace import keys

CALLERS = 32
MUCH = 1_000_000


@pytest.mark.scenario(number=27)
def test_a_publish_that_comes_late_overwrites_no_newer_balance(house: House) -> None:
    house.emit(8)
    with house.frozen_at("after_commit") as late:
        with house.dyno():
            house.wait_until_drained()
            house.emit(8)
            house.wait_until_drained()
        shown = [cached(house, user) for user in house.users]
        assert all(shown)
        thaw(late)
        late.terminate()  # so it finishes its batch in hand
        assert late.wait(SLOW_SECONDS) == 0
    assert [cached(house, user) for user in house.users] == shown
    house.prove()


@pytest.mark.scenario(number=27)
@pytest.mark.parametrize("what", ["balance", "pool"])
def test_a_load_that_comes_late_overwrites_no_newer_one(
    house: House, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = house.users[0]
    was_read, may_go_on = Event(), Event()
    read = getattr(ledger.LedgerView, {"balance": "account_views", "pool": "pool"}[what])

    def slowly(view: ledger.LedgerView, *arguments: Any) -> Any:
        found = read(view, *arguments)
        if not was_read.is_set():
            was_read.set()
            assert may_go_on.wait(SLOW_SECONDS)
        return found

    monkeypatch.setattr(ledger.LedgerView, read.__name__, slowly)
    name = keys.SPONSORSHIP.pool if what == "pool" else account_of(house.settings, user).balance
    house.billing.credit_pool("before", 100)
    house.drain()
    house.redis.delete(name)
    patient = house.settings_with(load_lease_ttl_ms=60_000)
    answers: list[int | None] = []
    with Billing.connect(patient, trust=Trusting()) as billing:
        asks: dict[str, Callable[[], int | None]] = {
            "balance": lambda: billing.check(user, METER).available,
            "pool": lambda: billing.estimate(user, METER, 1).sponsorship.pool,
        }
        caller = Thread(target=lambda: answers.append(asks[what]()))
        caller.start()
        try:
            assert was_read.wait(SLOW_SECONDS)
            with house.dyno():
                house.send([event for event in house.new_events(8) if event.user_id == user])
                house.billing.credit_pool("meanwhile", 100)
                house.wait_until_drained()
        finally:
            may_go_on.set()
            caller.join()
        fresh = house.resources.catalogue.sponsorship.initial + 20 if what == "pool" else 60 - 1
        assert answers == [fresh]
        assert asks[what]() == fresh
    house.prove()


@pytest.mark.scenario(number=27)
def test_a_cache_that_is_lost_again_and_again_counts_nothing_twice(house: House) -> None:
    user = house.users[0]
    house.users = [user]
    spent = 0
    with house.dyno(), losing_caches(house):
        house.billing.reserve(user, METER, 9, "job-1")
        house.accepted.holds[user, METER, "job-1"] = 9
        while spent < 40:
            spent += sum(event.quantity for event in house.emit(2))
            assert house.billing.check(user, METER).available == 60 - spent - 9
        house.wait_until_drained()
        assert house.billing.check(user, METER).available == 60 - spent - 9
    house.prove()


@pytest.mark.scenario(number=27)
@pytest.mark.parametrize("lost", ["before", "again and again"])
def test_many_who_load_one_balance_at_once_agree_and_hold_once(house: House, lost: str) -> None:
    user = house.users[0]
    house.users = [user]
    room = 60

    def call(billing: Billing, number: int) -> None:
        billing.reserve(user, METER, 1, f"job-{number % 8}")
        available = billing.check(user, METER).available
        assert available is not None
        assert room - 8 - 20 <= available <= room - 1

    house.accepted.holds |= {(user, METER, f"job-{number}"): 1 for number in range(8)}
    house.redis.delete(account_of(house.settings, user).balance)
    with house.dyno():
        with emitting(house, 20), losing_caches(house) if lost != "before" else nullcontext():
            by_many(house, call)
        house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=27)
def test_many_who_load_the_pool_at_once_are_promised_no_more_than_there_is(house: House) -> None:
    user = house.users[0]
    initial = house.resources.catalogue.sponsorship.initial
    house.redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing(user))
    covered: list[int] = []

    def call(billing: Billing, number: int) -> None:
        answer = billing.decide(f"user-{number}", 500, f"request-{number}")
        if answer.expires_at is not None:
            covered.append(answer.absorb)
            settled = billing.settle_sponsored(f"user-{number}", f"request-{number}", 500)
            house.accepted.grants[f"request-{number}"] = settled.absorbed
            house.redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing(f"user-{number}"))

    with house.dyno():
        by_many(house, call)
        house.wait_until_drained()
    # Committed and unpublished usage may count twice for a moment, which errs on the safe side.
    assert 0 < sum(covered) <= initial
    assert rows(house.settings, "SELECT balance FROM sponsor_pool") == [(initial - sum(covered),)]
    house.prove()


def by_many(house: House, call: Callable[[Billing, int], None]) -> None:
    """Make a call from many clients at the same moment, each with its own connections."""
    barrier = Barrier(CALLERS)
    settings = house.settings_with(database_pool_size=1)

    def wait_and_call(number: int) -> None:
        with Billing.connect(settings, trust=Trusting()) as billing:
            barrier.wait(SLOW_SECONDS)
            call(billing, number)

    with ThreadPoolExecutor(CALLERS) as threads:
        for done in [threads.submit(wait_and_call, number) for number in range(CALLERS)]:
            done.result()


@contextmanager
def losing_caches(house: House) -> Iterator[None]:
    """Delete cached balances all the time for the length of the block."""
    names = [account_of(house.settings, user).balance for user in house.users]
    with in_background(lambda: house.redis.delete(*names)):
        yield


@contextmanager
def emitting(house: House, units: int) -> Iterator[None]:
    """Emit events over one unit, at most `units`, for the length of the block."""
    left = list(range(units))

    def emit() -> None:
        if left:
            (event,) = house.new_events(1)
            house.send([event.model_copy(update={"quantity": 1})])
            left.pop()

    with in_background(emit):
        yield


@contextmanager
def in_background(action: Callable[[], object]) -> Iterator[None]:
    """Repeat an action for the length of the block."""
    enough = Event()

    def repeat() -> None:
        while not enough.wait(0.01):
            action()

    thread = Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def cached(house: House, user: str) -> bytes | None:
    """Return the cached balance."""
    found: Any = house.redis.get(account_of(house.settings, user).balance)
    return bytes(found) if found else None
