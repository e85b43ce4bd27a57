"""Fractions of a unit: exact in any order, and nothing is lost or found on the way."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.events import MAX_AMOUNT, is_too_much, multiplied
from worker.rules.fractions import MILLIONTHS, as_decimal, carried_before, in_millionths, whole_units, with_carried

quantities = st.integers(0, MAX_AMOUNT) | st.integers(0, 20)
multipliers = st.integers(0, 999_999_999_999).map(lambda millionths: f"{millionths // 10**6}.{millionths % 10**6:06d}")
multipliers |= st.sampled_from(["0", "1", "1.5", "0.75", "2.25", "0.333333", "0.000001", "999999.999999"])


def exact(quantity: int, multiplier: str) -> Fraction:
    return quantity * Fraction(multiplier)


@given(st.lists(st.tuples(quantities, multipliers), max_size=30))
def test_carried_the_sum_is_the_floor_of_the_exact_sum_in_any_order(events: list[tuple[int, str]]) -> None:
    total, carried, due = 0, 0, Fraction(0)
    for quantity, multiplier in events:
        units, remainder = whole_units(quantity, multiplier)
        before = carried
        amount, carried = with_carried(units, remainder, carried)
        due += exact(quantity, multiplier)
        total += amount
        assert units <= amount <= units + (remainder > 0)
        assert 0 <= carried < MILLIONTHS
        assert total == floor(due)
        assert total * MILLIONTHS + carried == due * MILLIONTHS
        assert carried_before(quantity, multiplier, amount, carried) == before


@given(quantities, multipliers)
def test_each_rounding_says_what_it_did(quantity: int, multiplier: str) -> None:
    due = exact(quantity, multiplier)
    assert whole_units(quantity, multiplier, "down") == (floor(due), 0)
    units, remainder = whole_units(quantity, multiplier, "up")
    assert units == ceil(due)
    assert units * MILLIONTHS + remainder == due * MILLIONTHS
    units, remainder = whole_units(quantity, multiplier, "carry")
    assert units == floor(due) == multiplied(quantity, multiplier)
    assert units * MILLIONTHS + remainder == due * MILLIONTHS
    assert in_millionths(quantity, multiplier) == due * MILLIONTHS


@given(quantities, multipliers)
def test_an_event_that_is_not_too_much_never_pays_more_than_the_most(quantity: int, multiplier: str) -> None:
    assert is_too_much(quantity, multiplier) == (exact(quantity, multiplier) > MAX_AMOUNT)
    if not is_too_much(quantity, multiplier):
        units, remainder = whole_units(quantity, multiplier)
        assert with_carried(units, remainder, MILLIONTHS - 1)[0] <= MAX_AMOUNT


def test_whole_multipliers_leave_nothing() -> None:
    for multiplier in ("1", "2", "10", "1.000000"):
        assert whole_units(7, multiplier)[1] == 0


@pytest.mark.parametrize(("millionths", "text"), [(0, "0"), (1, "0.000001"), (500_000, "0.5"), (2_250_000, "2.25")])
def test_millionths_read_as_decimals(millionths: int, text: str) -> None:
    assert as_decimal(millionths) == text
