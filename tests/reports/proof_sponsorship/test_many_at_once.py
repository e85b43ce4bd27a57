"""Many clients at once, and workers beside them: the last unit is given once, and no more is promised than there is."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
from redis import Redis

from config.settings import Settings
from tests.reports.proof_sponsorship.crowd import Watcher, in_processes
from tests.reports.proof_sponsorship.model import BUDGETS
from tests.support.books import assert_proved
from tests.support.ledger import rows
from tests.support.resources import worker_resources
from tests.support.sponsorship import Everybody, drain_pool, open_accounts, open_pool, pool_row, promised, today_of
from tests.support.threads import at_once
from worker.admin import accounts, dead_letters
from worker.client import Billing
from worker.keyspace import keys
from worker.resources import Resources


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_one_of_many_gets_the_last_unit_of_the_pool(
    settings: Settings, redis: Redis, resources: Resources, how: str
) -> None:
    open_pool(settings, 1)

    def decide(client: Billing, number: int) -> str:
        return client.decide(f"user-{number}", 1, f"request-{number}").reason.value

    if how == "processes":
        reasons = in_processes(settings, decide)
    else:
        with Billing(settings, Everybody("elite")) as client:
            reasons = at_once([lambda number=number: decide(client, number) for number in range(32)])  # type: ignore[misc]
    assert Counter(reasons) == {"within_budget": 1, "pool_empty": 31}
    assert list(promised(redis).values()) == [1]
    winner = reasons.index("within_budget")
    with Billing(settings) as client:
        assert client.settle_sponsored(f"user-{winner}", f"request-{winner}", 5).absorbed == 1
    drain_pool(resources)
    assert pool_row(settings) == (1, 0, 1)
    assert_proved(resources)


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_one_of_many_gets_the_last_unit_of_a_day(
    settings: Settings, redis: Redis, resources: Resources, how: str
) -> None:
    def decide(client: Billing, number: int) -> str:
        return client.decide("ada", 1, f"request-{number}").reason.value

    with Billing(settings, Everybody("elite")) as client:
        assert client.decide("ada", BUDGETS["elite"] - 1, "before").serve == "free"
        if how == "processes":
            reasons = in_processes(settings, decide)
        else:
            reasons = at_once([lambda number=number: decide(client, number) for number in range(32)])  # type: ignore[misc]
        assert Counter(reasons) == {"within_budget": 1, "budget_spent": 31}
        assert sum(today_of(redis, "ada").values()) == BUDGETS["elite"]
        client.settle_sponsored("ada", "before", 10**6)
        client.settle_sponsored("ada", f"request-{reasons.index('within_budget')}", 10**6)
    drain_pool(resources)
    assert rows(settings, "SELECT sum(absorbed)::bigint FROM sponsor_grant") == [(BUDGETS["elite"],)]
    assert_proved(resources)


def test_a_decision_and_a_settlement_repeated_by_many_are_one(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    with Billing(settings, Everybody("trusted")) as client:
        decisions = at_once([lambda: client.decide("ada", 40, "request")] * 32)
        assert Counter(one.repeated for one in decisions) == {True: 31, False: 1}
        assert len({one.model_copy(update={"repeated": False}) for one in decisions}) == 1
        assert promised(redis) == {"h:request": 40}
        assert today_of(redis, "ada") == {"absorbed": 0, "h:request": 40}
        # Each says something else: the first one stands.
        settlements = at_once(
            [lambda paid=paid: client.settle_sponsored("ada", "request", 31, paid=paid) for paid in range(32)]  # type: ignore[misc]
        )
    assert Counter(one.repeated for one in settlements) == {True: 31, False: 1}
    (first,) = {one.model_copy(update={"repeated": False}) for one in settlements}
    assert redis.xlen(keys.SPONSORSHIP.entries) == 1
    drain_pool(resources)
    assert rows(settings, "SELECT actual, paid, absorbed FROM sponsor_grant") == [(31, first.paid, 31 - first.paid)]
    assert promised(redis) == {}
    assert_proved(resources)


def test_never_more_is_promised_than_there_is_while_two_workers_drain(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    """Six clients on a pool that is too small for them, two workers at once, and money that comes in."""
    open_pool(settings, 300)
    settings = settings.model_copy(update={"hand_grace_ms": 200})
    done = Event()
    absorbed, credited, gates = Counter[int](), Counter[int](), Counter[int]()

    def work(client: Billing, number: int) -> None:
        for turn in range(60):
            user, name = f"user-{(number + turn) % 3}", f"request-{number}-{turn}"
            estimate = 1 + (7 * number + 11 * turn) % 40
            answer = client.decide(user, estimate, name)
            if answer.serve == "partial":
                answer = client.confirm_partial(user, estimate, name, paid=answer.charge)
                assert answer.outstanding >= 0
            gates[number] += answer.absorb == 0
            if answer.expires_at is None:
                credited[number] += client.credit_pool(name, estimate).credited
            elif turn % 5 == 0:
                client.release_sponsored(user, name, "no work")
            else:
                settlement = client.settle_sponsored(user, name, max(0, estimate - turn % 3))
                absorbed[number] += settlement.absorbed
                credited[number] += settlement.credited

    def keep_draining() -> int:
        with worker_resources(settings) as own:
            entries = 0
            while not done.is_set():
                entries += drain_pool(own)
            return entries

    with (
        Billing(settings, Everybody("elite")) as client,
        Redis.from_url(settings.redis_url) as eyes,
        ThreadPoolExecutor(8) as threads,
    ):
        client.estimate("somebody", "credits", 1)  # the pool is cached from here on
        with Watcher(eyes) as watcher:
            drains = [threads.submit(keep_draining) for _ in range(2)]
            try:
                for working in [threads.submit(work, client, number) for number in range(6)]:
                    working.result()
            finally:
                done.set()
            entries = sum(one.result() for one in drains)
        assert watcher.wrong == []
        assert watcher.looks > 100
    drain_pool(resources)
    assert entries > 0
    assert 0 < gates.total() < 6 * 60
    assert pool_row(settings)[:2] == (300, 300 - absorbed.total() + credited.total())
    assert promised(redis) == {}
    assert dead_letters.listed(resources) == []
    assert_proved(resources)


def test_trust_that_is_lowered_while_requests_run_counts_from_then_on(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    open_accounts(resources, "elite", "ada")
    lowered, first = Event(), Barrier(4)

    def work(client: Billing, number: int) -> int:
        absorbed = 0
        for turn in range(40):
            if turn == 10:
                first.wait()
            was_lowered = lowered.is_set()
            answer = client.decide("ada", 5, f"request-{number}-{turn}")
            if was_lowered:
                assert (answer.tier, answer.daily_budget) == ("established", 50)
            if answer.expires_at is not None:
                assert answer.absorbed_today + 5 <= answer.daily_budget
                absorbed += client.settle_sponsored("ada", f"request-{number}-{turn}", 5).absorbed
        return absorbed

    with Billing(settings) as client, ThreadPoolExecutor(3) as threads:
        working = [threads.submit(work, client, number) for number in range(3)]
        first.wait()
        held = client.decide("ada", 20, "runs")
        accounts.set_trust(resources, "ada", "established")
        drain_pool(resources)
        lowered.set()
        absorbed = sum(one.result() for one in working)
        assert absorbed >= 3 * 10 * 5
        assert held.tier == "elite"
        assert client.decide("ada", 1, "refused").reason == "budget_spent"
        # What was held before is held still.
        assert client.settle_sponsored("ada", "runs", 20).absorbed == 20
    drain_pool(resources)
    assert rows(settings, "SELECT sum(absorbed)::bigint FROM sponsor_grant") == [(absorbed + 20,)]
    assert today_of(redis, "ada") == {"absorbed": absorbed + 20}
    assert_proved(resources)
