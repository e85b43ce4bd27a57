"""What a carry-over moves: purchased units that are free. Held ones stay, debt stands in the way or goes along."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.events import MAX_TOTAL
from tests.admin.test_accounts import METER, OTHER, USER, bill, buckets
from tests.support.ledger import execute, give_account, rows, stop_clock
from tests.support.processes import killed_in
from tests.support.streams import drain, partition_of, pending_of
from tests.support.waiting import wait_until
from worker.admin import accounts, change, corrections, credits
from worker.client import Billing
from worker.errors import AccountError, KeyConflict, UsageLimitExceeded
from worker.reports.proof import verify_ledger
from worker.resources import Resources

FULL = 100_000


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    with Billing.connect(settings) as client:
        yield client


@pytest.fixture(autouse=True)
def giver_and_taker(settings: Settings, resources: Resources) -> Iterator[None]:
    """A giver with 5,000 purchased and nothing else to spend, and a taker; the books are right after the test."""
    give_account(settings, OTHER, "basic", buckets={METER: (FULL, 0, 0)})
    give_account(settings, USER, "basic")
    credits.grant(resources, OTHER, METER, 5_000, "order-1")
    drain(settings, OTHER)
    yield
    assert verify_ledger(resources).differences == []


def carry(resources: Resources, key: str = "merge", **options: Any) -> tuple[int, int]:
    """Carry over from OTHER to USER; return the units moved and kept."""
    answer = credits.carry_over(resources, OTHER, USER, key, meter=METER, **options)
    return answer.moved, answer.kept


def test_held_units_stay_and_are_not_promised_again(settings: Settings, resources: Resources, billing: Billing) -> None:
    hold = billing.reserve(OTHER, METER, 3_000, key="job-1")
    assert carry(resources) == (2_000, 3_000)
    assert (buckets(resources)[2], buckets(resources, METER, OTHER)) == (2_000, (FULL, 0, 3_000))
    # Before any worker has published the new balance.
    assert billing.check(OTHER, METER, 1).available == 0
    hold.settle(3_000)
    drain(settings, OTHER)
    assert buckets(resources, METER, OTHER) == (FULL, 0, 0), "no debt: each unit was spent once"


def test_allowance_and_rollover_pay_for_holds_before_credits(
    settings: Settings, resources: Resources, billing: Billing
) -> None:
    give_account(settings, "saver", "basic", buckets={METER: (FULL - 600, 400, 5_000)})
    billing.reserve("saver", METER, 3_000, key="job-1")
    answer = credits.carry_over(resources, "saver", USER, "merge", meter=METER)
    assert (answer.moved, answer.kept) == (3_000, 2_000)


def test_a_hold_while_units_move_gets_none_of_them(
    settings: Settings, resources: Resources, billing: Billing, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = change.commit
    tries: list[str] = []

    def reserve(when: str) -> None:
        with pytest.raises(UsageLimitExceeded):
            billing.reserve(OTHER, METER, 1, key=f"job-{when}")
        tries.append(when)

    def commit(*arguments: Any, **options: Any) -> Any:
        reserve("before")
        changed = real(*arguments, **options)
        reserve("after")
        return changed

    assert billing.check(OTHER, METER, 5_000).allowed  # the balance is cached
    monkeypatch.setattr("worker.admin.credits.commit", commit)
    assert carry(resources) == (5_000, 0)
    reserve("unpublished")
    drain(settings, OTHER)
    reserve("published")
    assert len(tries) == 4
    assert pending_of(resources.redis, settings, OTHER, METER) == {}


def test_a_grant_that_started_while_events_of_others_wait_pays_for_holds(
    settings: Settings, resources: Resources, billing: Billing
) -> None:
    now = datetime(2088, 3, 1, 9, tzinfo=UTC)
    stop_clock(settings, now)
    give_account(settings, "eve", "basic", buckets={METER: (FULL, 0, 0)})
    credits.grant(resources, "eve", METER, 100, "short", expires_at=now + timedelta(minutes=1))
    credits.grant(resources, "eve", METER, 100, "late", effective_at=now + timedelta(minutes=1))
    drain(settings, "eve")
    stop_clock(settings, now + timedelta(minutes=2))
    billing.reserve("eve", METER, 60, key="job-1")
    partition = partition_of(settings, "eve")
    resources.redis.xadd(partition.entries, {"v": "1", "r": "eve"})  # as for any other account of its stream
    moved = credits.carry_over(resources, "eve", USER, "merge-eve", meter=METER)
    assert (moved.moved, moved.kept) == (40, 60)
    assert (buckets(resources)[2], buckets(resources, METER, "eve")[2]) == (40, 60)
    assert billing.check("eve", METER, 1).available == 0
    drain(settings, "eve")
    kinds = "SELECT entry_key, purchased_change FROM ledger_entry WHERE user_id = 'eve' ORDER BY seq"
    assert rows(settings, kinds)[-3:] == [("expire:short", -100), ("start:late", 100), ("transfer:merge-eve", -40)]


def test_what_holds_need_entirely_is_not_moved(settings: Settings, resources: Resources, billing: Billing) -> None:
    billing.reserve(OTHER, METER, 5_000, key="job-1")
    with pytest.raises(AccountError, match=r"^from_user: holds need all 5000 purchased units of premium_voice$"):
        carry(resources)
    assert buckets(resources, METER, OTHER) == (FULL, 0, 5_000)
    assert pending_of(resources.redis, settings, OTHER, METER) == {"h:job-1": 5_000, "total": 5_000}
    billing.release(OTHER, METER, "job-1")
    assert carry(resources) == (5_000, 0)


def test_holds_of_the_ledger_count(settings: Settings, resources: Resources) -> None:
    insert = "INSERT INTO ledger_hold VALUES (%s, 'job-1', %s, 3000, ledger_now() + interval '1 minute')"
    execute(settings, insert, OTHER, METER)
    assert carry(resources) == (2_000, 3_000)


def test_events_that_wait_are_waited_for(settings: Settings, resources: Resources, billing: Billing) -> None:
    billing.emit(OTHER, METER, 2_000, event_id="e1")
    with pytest.raises(AccountError, match=r"^from_user: 1 event of .* is not applied yet; carry over after that$"):
        carry(resources)
    drain(settings, OTHER)
    assert carry(resources) == (3_000, 0)


def test_a_giver_in_debt_is_refused_or_its_debt_goes_along(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    bill(settings, redis, ("e1", METER, 6_000), user_id=OTHER)
    credits.grant(resources, OTHER, METER, 1_500, "order-2")
    drain(settings, OTHER)
    with pytest.raises(AccountError, match=r"^from_user: trial-7 owes 1000 of premium_voice; take the debt along"):
        carry(resources)
    assert carry(resources, with_debt=True) == (1_500, 0)
    assert carry(resources, with_debt=True) == (1_500, 0), "a repeat tells the same"
    assert (buckets(resources), buckets(resources, METER, OTHER)) == ((0, -1_000, 1_500), (FULL, 0, 0))


def test_debt_alone_may_go_along_too(settings: Settings, redis: Redis, resources: Resources) -> None:
    bill(settings, redis, ("e1", METER, 6_000), user_id=OTHER)
    assert carry(resources, with_debt=True) == (0, 0)
    assert (buckets(resources), buckets(resources, METER, OTHER)) == ((0, -1_000, 0), (FULL, 0, 0))


def test_debt_does_not_go_beyond_its_bound(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, "deep", "basic", buckets={METER: (0, 500 - MAX_TOTAL, 0)})
    bill(settings, redis, ("e1", METER, 6_000), user_id=OTHER)
    with pytest.raises(AccountError, match=r"^to_user: the debt would exceed"):
        credits.carry_over(resources, OTHER, "deep", "k", meter=METER, with_debt=True)


def test_a_refund_without_an_order_is_undone_though_the_order_was_carried_over(resources: Resources) -> None:
    """Its units return to the giver, and what was bought with them; they go along with the next carry-over."""
    credits.claw_back(resources, OTHER, METER, 1_000, "re_1")
    assert carry(resources) == (4_000, 0)
    corrections.undo(resources, OTHER, "clawback:re_1")
    assert (buckets(resources)[2], buckets(resources, METER, OTHER)[2]) == (4_000, 1_000)
    with pytest.raises(AccountError, match=r"^amount: must be at most 4000; order-1 gave 5000, 0 were taken back, and"):
        credits.claw_back(resources, USER, METER, 5_000, "re_2", order="order-1")
    drain(resources.settings, OTHER)
    assert carry(resources, "rest") == (1_000, 0)
    assert credits.claw_back(resources, USER, METER, 5_000, "re_2", order="order-1").debt == 0


def test_the_key_of_another_transfer_says_for_what_it_was_used(resources: Resources) -> None:
    carry(resources)
    with pytest.raises(KeyConflict, match=r"^key: merge was used for another transfer, of 5000 of premium_voice$"):
        credits.carry_over(resources, USER, OTHER, "merge", meter=METER)


def test_killed_in_between_nothing_moved_and_the_units_are_free_again(
    settings: Settings, resources: Resources, billing: Billing
) -> None:
    short = settings.model_copy(
        update={"cache_ttl_ms": 100, "statement_timeout_ms": 200, "ledger_down_balance_max_age_seconds": 0}
    )
    killed_in(short, carry, "after_refresh")
    assert buckets(resources)[2] == 0
    wait_until(lambda: billing.check(OTHER, METER, 5_000).allowed, "the units are free again")
    assert carry(resources) == (5_000, 0)


def test_a_second_carry_over_takes_what_was_held(settings: Settings, resources: Resources, billing: Billing) -> None:
    billing.reserve(OTHER, METER, 3_000, key="job-1")
    carry(resources)
    billing.release(OTHER, METER, "job-1")
    drain(settings, OTHER)
    assert carry(resources, "rest") == (3_000, 0)
    assert rows(settings, "SELECT purchased FROM balance WHERE user_id = %s AND meter = %s", USER, METER) == [(5_000,)]
    accounts.set_status(resources, OTHER, "canceled")


@pytest.mark.parametrize("bucket", ["purchased", "rollover"])
def test_a_proof_finds_units_that_did_not_leave(settings: Settings, resources: Resources, bucket: str) -> None:
    carry(resources)
    for sign in ("+", "-"):
        execute(
            settings,
            f"ALTER TABLE ledger_entry DISABLE TRIGGER USER; UPDATE ledger_entry SET {bucket}_change = {bucket}_change "
            f"{sign} 1, {bucket}_after = {bucket}_after {sign} 1 WHERE kind = 'transfer_out'; "
            f"ALTER TABLE ledger_entry ENABLE TRIGGER USER; UPDATE balance SET {bucket} = {bucket} {sign} 1 "
            f"WHERE user_id = '{OTHER}' AND meter = '{METER}'",
        )
        resources.redis.delete(*resources.redis.keys("*balance*"), "x")
        assert bool(verify_ledger(resources).differences) == (sign == "+")
