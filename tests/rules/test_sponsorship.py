"""The pool's rules: the golden cases, and what must hold for any request."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.catalogue import TRUST_TIERS
from tests.support.vectors import golden_cases
from worker.rules.sponsorship import DAY_MS, LOWEST_TIER, Decision, absorbed_of, credit_of, decide

CASES = golden_cases("sponsor")

amounts = st.integers(0, 10**12) | st.integers(0, 20)
positive = st.integers(1, 10**12) | st.integers(1, 20)
# A budget may be lowered below what was absorbed, and a pool below what it promised.
left = st.integers(-(10**12), 9 * 10**15) | st.integers(-20, 20)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(figure) for figure in case["given"].values()))
def test_golden_case(case: dict[str, Any]) -> None:
    decision = decide(**case["given"])
    assert {name: getattr(decision, name) for name in case["decision"]} == case["decision"]


def test_there_are_golden_cases() -> None:
    assert {case["decision"]["serve"] for case in CASES} == {"free", "partial", "gate"}


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ((40, 50, 10, 40), ("free", 40, 0, "within_budget")),
        ((41, 50, 10, 41), ("partial", 40, 1, "budget_short")),
        ((41, 50, 9, 40), ("partial", 40, 1, "pool_short")),
        ((41, 50, 10, 40), ("partial", 40, 1, "budget_short")),
        ((1, 0, 0, 0), ("gate", 0, 1, "no_budget")),
        ((1, 50, 50, 0), ("gate", 0, 1, "budget_spent")),
        ((1, 50, 60, 5), ("gate", 0, 1, "budget_spent")),
        ((1, 50, 49, 0), ("gate", 0, 1, "pool_empty")),
        ((1, 50, 49, -3), ("gate", 0, 1, "pool_empty")),
        ((0, 0, 0, 0), ("gate", 0, 0, "nothing_to_cover")),
        ((-7, 50, 0, 50), ("gate", 0, 0, "nothing_to_cover")),
    ],
)
def test_the_edges_and_their_reasons(given_: tuple[int, int, int, int], expected: tuple[str, int, int, str]) -> None:
    assert decide(*given_) == expected


@given(positive, amounts, amounts, left)
def test_absorb_and_charge_are_the_estimate(estimate: int, budget: int, absorbed: int, pool: int) -> None:
    decision = decide(estimate, budget, absorbed, pool)
    assert decision.absorb + decision.charge == estimate
    assert min(decision.absorb, decision.charge) >= 0


@given(st.integers(-20, 20) | amounts, amounts, amounts, left)
def test_never_more_than_budget_or_pool(estimate: int, budget: int, absorbed: int, pool: int) -> None:
    decision = decide(estimate, budget, absorbed, pool)
    assert decision.absorb <= max(0, budget - absorbed)
    assert decision.absorb <= max(0, pool)


@given(positive, amounts, amounts, left)
def test_as_much_as_budget_and_pool_have(estimate: int, budget: int, absorbed: int, pool: int) -> None:
    decision = decide(estimate, budget, absorbed, pool)
    assert decision.charge == 0 or decision.absorb in (max(0, budget - absorbed), max(0, pool))


@given(positive, amounts, amounts, left)
def test_how_it_is_served_follows_from_the_parts(estimate: int, budget: int, absorbed: int, pool: int) -> None:
    decision = decide(estimate, budget, absorbed, pool)
    parts = {(True, False): "free", (True, True): "partial", (False, True): "gate"}
    assert decision.serve == parts[decision.absorb > 0, decision.charge > 0]


@given(positive, amounts, amounts, left)
def test_what_was_partial_is_free_for_the_part(estimate: int, budget: int, absorbed: int, pool: int) -> None:
    absorb = decide(estimate, budget, absorbed, pool).absorb
    if absorb:
        assert decide(absorb, budget, absorbed, pool) == Decision("free", absorb, 0, "within_budget")


@given(amounts, amounts, amounts)
def test_what_is_absorbed_in_the_end(held: int, actual: int, paid: int) -> None:
    absorbed = absorbed_of(held, actual, paid)
    assert 0 <= absorbed <= held
    assert absorbed + paid <= max(actual, paid)
    assert absorbed == held or absorbed + paid == max(actual, paid)


@pytest.mark.parametrize(
    ("paid", "percent", "credited"),
    [(0, 10, 0), (9, 10, 0), (10, 10, 1), (19, 10, 1), (10**12, 10, 10**11), (99, 0, 0), (99, 100, 99)],
)
def test_a_share_of_what_is_paid_flows_back(paid: int, percent: int, credited: int) -> None:
    assert credit_of(paid, percent) == credited


@given(amounts, st.integers(0, 100_000_000))
def test_a_share_is_exact_to_a_millionth_of_a_percent(paid: int, millionths: int) -> None:
    assert credit_of(paid, Decimal(millionths).scaleb(-6)) == paid * millionths // 100_000_000


def test_constants() -> None:
    assert TRUST_TIERS[0] == LOWEST_TIER
    assert DAY_MS == 24 * 60 * 60 * 1_000
