"""What only a deliberate fault in the product showed to be untested."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from redis import Redis

from config.settings import Settings
from tests.support.books import assert_proved
from tests.support.ledger import rows
from tests.support.resources import settings_for, worker_resources
from tests.support.sponsorship import DAY_MS, Everybody, drain_pool, open_accounts, open_pool, past_the_triggers
from worker.admin import erasure
from worker.client import Billing
from worker.keyspace import keys
from worker.ledger import sponsorship
from worker.ledger.connection import batch_connection
from worker.reports.proof import verify_ledger
from worker.resources import Resources


def test_a_closed_account_is_trusted_no_more(
    settings: Settings, redis: Redis, resources: Resources, billing: Billing
) -> None:
    """At once, whatever is cached or on its way into the cache; what it held is settled all the same."""
    open_accounts(resources, "trusted", "ada")
    assert billing.decide("ada", 5, "before").tier == "trusted"
    redis.set(keys.SPONSORSHIP.standing_lease("ada"), "somebody")
    pseudonym = erasure.close_account(resources, "ada")
    assert not redis.exists(keys.SPONSORSHIP.standing("ada"), keys.SPONSORSHIP.standing_lease("ada"))
    answer = billing.decide("ada", 5, "after")
    assert (answer.tier, answer.daily_budget, answer.absorbed_today) == ("new", 7, 5)
    assert billing.settle_sponsored("ada", "before", 5).absorbed == 5
    drain_pool(resources)
    assert rows(settings, "SELECT user_id, absorbed FROM sponsor_grant") == [(pseudonym, 5)]
    assert_proved(resources)


def test_a_batch_has_the_pools_row_to_itself(settings: Settings, resources: Resources) -> None:
    """The partition's lock lets one drain come this far; what changes the pool without it must wait all the same."""
    open_pool(settings, 100)
    with batch_connection(resources.engine) as first, batch_connection(resources.engine) as second:
        assert sponsorship.lock_pool(first, 1, [], []).pool.units == 100
        second.execute("SET LOCAL lock_timeout = '50ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            sponsorship.lock_pool(second, 1, [], [])


CHECKS = "SELECT conname FROM pg_constraint WHERE contype = 'c' AND conrelid = %s::regclass"


def test_a_tier_that_nobody_knows_is_the_lowest(settings: Settings, redis: Redis, billing: Billing) -> None:
    """Whether the host says it, or an account that a newer release wrote."""
    redis.set(keys.SPONSORSHIP.standing("ada"), "1 1\nfriend 0 0")
    with Billing(settings, Everybody("friend")) as hosted:
        for client in (billing, hosted):
            answer = client.decide("ada", 8, "request")
            assert (answer.tier, answer.daily_budget, answer.absorb) == ("new", 7, 7)


def test_whatever_redis_remembers_of_a_request_has_an_end(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    outcome_ms = settings.outcome_ttl_seconds * 1_000
    with Billing(settings, Everybody("elite")) as client:
        for name, ttl in (("held", 600), ("settled", 60), ("released", 3_600)):
            client.decide("ada", 10, name, ttl_seconds=ttl)
            # A late settlement must find it.
            assert ttl * 1_000 < redis.pttl(keys.SPONSORSHIP.hold(name)) - outcome_ms + 5_000 <= ttl * 1_000 + 5_000
        due: Any = redis.zrange(keys.SPONSORSHIP.expiries, 0, -1, withscores=True)
        first = redis.zscore(keys.SPONSORSHIP.holds, "settled")
        assert due == [(b"pool", first), (b"user:ada", first)]
        client.settle_sponsored("ada", "settled", 10)
        client.release_sponsored("ada", "released", "no work")
        client.release_sponsored("ada", "never-seen", "no work")
        for name in ("settled", "released", "never-seen"):
            assert outcome_ms - 5_000 < redis.pttl(keys.SPONSORSHIP.hold(name)) <= outcome_ms
    assert DAY_MS - 5_000 < redis.pttl(keys.SPONSORSHIP.today("ada")) <= DAY_MS
    drain_pool(resources)
    lasting = {name.decode() for name in redis.scan_iter("mf:{sponsor}:*") if redis.pttl(name) < 0}
    assert lasting - {keys.SPONSORSHIP.entries} == {
        keys.SPONSORSHIP.promised, keys.SPONSORSHIP.holds, keys.SPONSORSHIP.user_holds("ada"),
        keys.SPONSORSHIP.expiries, keys.SPONSORSHIP.totals,
    }  # fmt: skip


def test_settlements_and_credits_ring_once_for_a_waiting_drain(
    redis: Redis, resources: Resources, billing: Billing
) -> None:
    for number in range(2):
        billing.decide("ada", 1, f"request-{number}")
        billing.settle_sponsored("ada", f"request-{number}", 1)
        assert redis.lrange(keys.BELL, 0, -1) == [b"-1"]
    drain_pool(resources)
    for number in range(2):
        billing.credit_pool(f"order-{number}", 10)
        assert redis.lrange(keys.BELL, 0, -1) == [b"-1"] * 2


def test_an_estimate_says_what_the_pool_would_make_possible(settings: Settings, resources: Resources) -> None:
    """The account has 1,000 credits, the pool would pay 400."""
    open_accounts(resources, "new", "ada")
    with Billing(settings, Everybody("elite")) as client:
        for quantity, alone, together in ((1_000, True, True), (1_400, False, True), (1_401, False, False)):
            answer = client.estimate("ada", "credits", quantity)
            assert (answer.amount, answer.allowed, answer.allowed_with_pool) == (quantity, alone, together)
            assert answer.sponsorship.absorb == 400
            assert answer.expected is not None
            assert answer.expected.from_subscription == 1_000


def test_verify_finds_what_the_constraints_of_the_tables_prevent(database_url: str, redis_url: str) -> None:
    settings = settings_for(database_url, redis_url)
    with Billing(settings, Everybody("established")) as client, worker_resources(settings) as resources:
        for name in ("a", "b"):
            client.decide("ada", 25, name)
            client.settle_sponsored("ada", name, 30, paid=5)
        client.credit_pool("c", 100)
        drain_pool(resources)
        assert_proved(resources)
        with past_the_triggers(settings) as postgres:
            for statement, named in (
                ("UPDATE sponsor_grant SET daily_budget = 49", "absorbed 50 of ada in the day from"),
                ("UPDATE sponsor_grant SET daily_budget = 50, held = 24", "absorbed 25 of held 24, actual 30, paid 5"),
                ("UPDATE sponsor_grant SET held = 25, paid = 6", "absorbed 25 of held 25, actual 30, paid 6"),
                ("UPDATE sponsor_grant SET paid = 5", ""),
                ("UPDATE sponsor_credit SET paid = 99 WHERE paid = 100", "credited 10, not 10 % of 99"),
            ):
                for table in ("sponsor_grant", "sponsor_credit"):
                    for (name,) in postgres.execute(CHECKS, (table,)).fetchall():
                        postgres.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
                postgres.execute(statement)
                differences = verify_ledger(resources).differences
                assert any(named in one for one in differences) if named else differences == []
