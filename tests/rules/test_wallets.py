"""Wallets: the golden cases, and an independent model in fractions of what events cost and what a check counts."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.answers import Reason
from tests.support.vectors import golden_cases
from worker.rules.fractions import MILLIONTHS, with_carried
from worker.rules.preflight import Cap, InWallet, MeterStanding, Spend, check_answer
from worker.rules.wallets import Pending, cost_of, drawn_units, price_in_millionths
from worker.rules.waterfall import Buckets, available

CASES = golden_cases("wallets")
COSTS = [case for case in CASES if case["kind"] == "cost"]
GATES = [case for case in CASES if case["kind"] == "gate"]


def decimals(most: int) -> st.SearchStrategy[str]:
    """Decimal text of a value above zero, with up to six decimals."""
    return st.integers(1, most * MILLIONTHS).map(lambda units: f"{units // MILLIONTHS}.{units % MILLIONTHS:06d}")


prices = st.sampled_from(["1", "3", "0.002", "0.000001", "1.5", "999999.999999"]) | decimals(1_000)
multipliers = st.sampled_from(["1", "1.5", "0.75", "2.25", "0"]) | decimals(10)


def charged(carried: int, quantity: int, multiplier: str, price: str) -> tuple[int, int]:
    """What an event pays, and the millionths that are carried after it, as a batch does it."""
    units, left = drawn_units(quantity, multiplier, price)
    return with_carried(units, left, carried) if left else (units, carried)


@pytest.mark.parametrize("case", COSTS, ids=lambda case: case["about"])
def test_golden_costs(case: dict[str, Any]) -> None:
    paid = charged(case["carried"], case["quantity"], case["multiplier"], case["price"])
    assert paid == (case["amount"], case["left"])


def standing_in(case: dict[str, Any]) -> MeterStanding:
    """The standing that a case describes."""
    found = {
        name: Pending(about["pending"], price_in_millionths(about["price"]), about["carried"])
        for name, about in case["meters"].items()
    } | {"credits": Pending(case["direct"], MILLIONTHS, 0)}
    buckets = Buckets(case["limit"], case["used"], case["rollover"], case["purchased"], case["spill"])
    own = found[case["meter"]]
    cap = Cap(case["cap"], case["cap_used"], own.cost) if "cap" in case else None
    total = sum(each.cost for each in found.values())
    return MeterStanding(buckets, total, "monthly", {}, in_plan=True, wallet=InWallet("credits", own, cap))


REASONS = {
    "allowed": {Reason.WITHIN_LIMIT, Reason.UNLIMITED},
    "denied": {Reason.LIMIT_EXCEEDED},
    "capped": {Reason.METER_CAP_EXCEEDED},
}


@pytest.mark.parametrize("case", GATES, ids=lambda case: case["about"])
def test_golden_checks(case: dict[str, Any]) -> None:
    standing = standing_in(case)
    answer = check_answer(Spend("user-1", case["meter"], case["amount"]), standing)
    assert answer.reason in REASONS[case["status"]]
    draws = case["meter"] != "credits"  # a wallet's own units cost one each
    assert (answer.wallet, answer.cost) == (("credits", case["cost"]) if draws else (None, None))
    assert answer.available == case["available"]
    assert standing_in(case).cost(case["amount"]) == case["cost"]
    assert case["pending"] in (None, answer.pending)
    assert answer.allowed is (case["available"] is None or case["amount"] <= case["available"])


def test_there_are_golden_cases() -> None:
    assert {case["status"] for case in GATES} == REASONS.keys()
    assert len(COSTS) >= 9
    assert len(GATES) >= 10


@given(st.lists(st.tuples(st.integers(0, 10**6), multipliers), max_size=20), prices)
def test_parts_sum_to_the_floor_of_what_they_cost_exactly(events: list[tuple[int, str]], price: str) -> None:
    """To a millionth of a unit for each event: what is smaller is dropped."""
    paid, carried = 0, 0
    for quantity, multiplier in events:
        amount, carried = charged(carried, quantity, multiplier, price)
        paid += amount
        assert amount >= 0
        assert 0 <= carried < MILLIONTHS
    exact = sum((quantity * Fraction(multiplier) * Fraction(price) for quantity, multiplier in events), Fraction(0))
    dropped = exact - paid - Fraction(carried, MILLIONTHS)
    assert 0 <= dropped < Fraction(max(1, len(events)), MILLIONTHS)
    if all(quantity * Fraction(multiplier) * Fraction(price) * MILLIONTHS % 1 == 0 for quantity, multiplier in events):
        assert paid == floor(exact)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(0, MILLIONTHS - 1), prices)
def test_pending_events_cost_what_the_check_counted(quantities: list[int], carried: int, price: str) -> None:
    expected, paid, left = cost_of(sum(quantities), price_in_millionths(price), carried), 0, carried
    for quantity in quantities:
        amount, left = charged(left, quantity, "1", price)
        paid += amount
    assert paid == expected


@given(
    st.integers(0, 10**12), st.integers(0, MILLIONTHS - 1), prices, st.integers(0, 9 * 10**15), st.integers(0, 10**9)
)
def test_the_units_that_a_room_is_good_for(units: int, carried: int, price: str, room: int, asked: int) -> None:
    pending = Pending(units, price_in_millionths(price), carried)
    most = pending.units_for(room)
    assert pending.cost_of_more(most) <= room < pending.cost_of_more(most + 1)
    assert (pending.cost_of_more(asked) <= room) is (asked <= most)
    exact = (units + asked) * Fraction(price) + Fraction(carried, MILLIONTHS)
    assert pending.cost + pending.cost_of_more(asked) == floor(exact)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), prices, st.integers(0, 10**6))
def test_a_check_allows_what_it_says_is_available(limit: int, used: int, others: int, price: str, units: int) -> None:
    own = Pending(units, price_in_millionths(price), 0)
    buckets = Buckets(limit, used, 0, 0, spill=True)
    standing = MeterStanding(
        buckets, own.cost + others, "monthly", {}, in_plan=True, wallet=InWallet("credits", own, None)
    )
    room = available(buckets, own.cost + others)
    assert room is not None
    most = check_answer(Spend("u", "premium_voice", 0), standing).available
    assert most == own.units_for(room)
    assert check_answer(Spend("u", "premium_voice", most), standing).allowed
    assert not check_answer(Spend("u", "premium_voice", most + 1), standing).allowed
