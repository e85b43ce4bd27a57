"""The waterfall: the golden cases, and what must hold for any balance and any amount."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.vectors import golden_cases
from worker.rules.waterfall import ENTITLED_STATUSES, STATUSES, Buckets, available, limit_in_force, pay

CASES = golden_cases("waterfall")

LARGEST = 9 * 10**15
amounts = st.integers(0, 10**12) | st.integers(0, 20)
small_or_large = st.integers(0, LARGEST) | st.integers(0, 20)
finite = st.builds(
    Buckets,
    limit=st.integers(0, 10**12) | st.integers(0, 20),
    used=small_or_large,
    rollover=st.integers(-LARGEST, LARGEST) | st.integers(-20, 20),
    purchased=small_or_large,
    spill=st.just(True),
)
any_buckets = st.builds(
    Buckets,
    limit=st.none() | st.integers(0, 10**12) | st.integers(0, 20),
    used=small_or_large,
    rollover=st.integers(-LARGEST, LARGEST) | st.integers(-20, 20),
    purchased=small_or_large,
    spill=st.booleans(),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['before']}-{case['amount']}-spill={case['spill']}")
def test_golden_case(case: dict[str, Any]) -> None:
    before = Buckets(**case["before"], spill=case["spill"])
    after, split = pay(before, case["amount"])
    assert split._asdict() == case["parts"]
    assert {name: getattr(after, name) for name in case["after"]} == case["after"]
    assert available(before, 0) == case["available_before"]


def test_there_are_golden_cases() -> None:
    assert len(CASES) >= 10
    assert {case["spill"] for case in CASES} == {True, False}


@given(any_buckets, amounts)
def test_parts_sum_to_the_amount_and_none_is_negative(before: Buckets, amount: int) -> None:
    _, split = pay(before, amount)
    assert sum(split) == amount
    assert min(split) >= 0


@given(any_buckets, amounts)
def test_each_bucket_moves_by_its_part(before: Buckets, amount: int) -> None:
    after, split = pay(before, amount)
    assert after.used - before.used == split.from_subscription
    assert before.rollover - after.rollover == split.from_rollover + split.overflow_to_debt
    assert before.purchased - after.purchased == split.from_purchased
    assert (after.limit, after.spill) == (before.limit, before.spill)


@given(any_buckets, amounts)
def test_purchased_never_goes_below_zero_and_debt_is_the_last_resort(before: Buckets, amount: int) -> None:
    after, split = pay(before, amount)
    assert after.purchased >= 0
    if split.overflow_to_debt:
        assert after.purchased == 0
        assert after.used >= (after.limit or 0)
        assert after.rollover < 0
    if split.from_rollover:
        assert before.rollover > 0
        assert after.used >= (after.limit or 0)
    if split.from_purchased:
        assert after.used >= (after.limit or 0)
        assert after.rollover <= 0


@given(any_buckets, amounts, amounts)
def test_one_amount_in_two_parts_ends_the_same(before: Buckets, first: int, second: int) -> None:
    whole_after, whole = pay(before, first + second)
    middle, one = pay(before, first)
    parts_after, two = pay(middle, second)
    assert parts_after == whole_after
    assert tuple(a + b for a, b in zip(one, two, strict=True)) == tuple(whole)


@given(any_buckets)
def test_nothing_costs_nothing(before: Buckets) -> None:
    after, split = pay(before, 0)
    assert after == before
    assert sum(split) == 0


@given(any_buckets.filter(lambda buckets: buckets.limit is None or not buckets.spill), amounts)
def test_unlimited_and_unspilling_meters_are_all_subscription(before: Buckets, amount: int) -> None:
    after, split = pay(before, amount)
    assert split == (amount, 0, 0, 0)
    assert after == before._replace(used=before.used + amount)


@given(finite.filter(lambda buckets: buckets.rollover >= 0), st.integers(1, 10**6))
def test_available_is_exactly_what_can_be_paid_without_debt(before: Buckets, more: int) -> None:
    left = available(before, 0)
    assert left is not None
    assert pay(before, left)[1].overflow_to_debt == 0
    assert pay(before, left + more)[1].overflow_to_debt == more


@given(finite, amounts)
def test_available_shrinks_by_what_was_paid(before: Buckets, amount: int) -> None:
    left = available(before, 0)
    assert left is not None
    assert available(pay(before, min(amount, left))[0], 0) == left - min(amount, left)


@given(any_buckets, amounts, amounts)
def test_pending_counts_like_a_debit_that_is_still_to_come(before: Buckets, pending: int, more: int) -> None:
    left = available(before, pending)
    if before.limit is None:
        assert left is None
        return
    unpromised = available(before, 0)
    assert left is not None
    assert unpromised is not None
    assert left == max(0, unpromised - pending)
    later = available(before, pending + more)
    assert later is not None
    assert 0 <= later <= left


def test_debt_lowers_what_is_available_and_stays_when_something_else_pays() -> None:
    before = Buckets(limit=100, used=100, rollover=-30, purchased=50, spill=True)
    assert available(before, 0) == 20
    after, split = pay(before, 20)
    assert (after.rollover, after.purchased) == (-30, 30)
    assert split == (0, 0, 20, 0)


@pytest.mark.parametrize("status", STATUSES)
def test_only_entitled_statuses_have_an_allowance(status: str) -> None:
    entitled = status in {"trialing", "active", "past_due"}
    assert (status in ENTITLED_STATUSES) is entitled
    assert limit_in_force(100, status) == (100 if entitled else 0)
    assert limit_in_force(None, status) == (None if entitled else 0)


def test_without_entitlement_rollover_and_purchased_stay_spendable() -> None:
    before = Buckets(limit_in_force(100, "canceled"), used=40, rollover=10, purchased=5, spill=True)
    assert available(before, 0) == 15
    assert pay(before, 15)[1] == (0, 10, 5, 0)
