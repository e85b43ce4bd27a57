"""Prices: an amount is never taken for a quantity, nor the other way round."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.events import MAX_AMOUNT, canonical_multiplier, multiplied
from worker.errors import InvalidRequest
from worker.rules.prices import Price, Units, price_of

MODELS = {"plain": "1", "plain-too": "1.0", "dear": "1.5", "cheap": "0.75"}


def found(model: object) -> str:
    """The multiplier of a model; 1 for one that nobody knows."""
    return MODELS.get(str(model), "1")


def refused(units: Units, model: object = None, held: str | None = "1") -> InvalidRequest:
    """What the caller is told."""
    with pytest.raises(InvalidRequest) as caught:
        price_of(units, model, found, held)
    return caught.value


WRONG: list[Any] = ["", "1e3", "-1", 1.5, "1\n"]
numbers = st.none() | st.integers(0, 100)
multipliers = st.none() | st.sampled_from(["0", "0.5", "1", "1.0", "1.50", "2"])


@given(numbers, numbers, multipliers, st.sampled_from([None, *MODELS, "unheard-of"]), multipliers)
def test_no_units_are_billed_at_another_multiplier_than_they_were_meant(
    amount: int | None, quantity: int | None, multiplier: str | None, model: str | None, held: str | None
) -> None:
    """Against the rule in other words: what a call names, in this order, else the hold's."""
    applies = multiplier if multiplier is not None else found(model) if model is not None else held
    is_one = applies is None or canonical_multiplier(applies) == "1"
    if (
        (amount is None) == (quantity is None)
        or (quantity is None and not is_one)
        or (quantity is not None and not applies)
    ):
        refused(Units(amount, quantity, multiplier), model, held)
        return
    price = price_of(Units(amount, quantity, multiplier), model, found, held)
    if quantity is None:
        assert (price, price.amount) == (Price(amount or 0, "1"), amount)
    else:
        assert price == (quantity, applies)
        assert price.amount == multiplied(quantity, str(applies))


@pytest.mark.parametrize(
    ("units", "model", "held", "field", "says"),
    [
        (Units(1, 2), None, "1", "quantity", "left out, as amount is given"),
        (Units(1, 2, named="actual"), None, "1", "quantity", "left out, as actual is given"),
        (Units(None), None, "1", "amount", "given, or quantity"),
        (Units(None, named="actual"), None, "1", "actual", "given, or quantity"),
        (Units(-1, named="actual"), None, "1", "actual", "from 0 to"),
        (Units(None, True), None, "1", "quantity", "from 0 to"),
        (Units(None, MAX_AMOUNT, "1.000001"), None, "1", "quantity", "after the multiplier 1.000001"),
        (Units(10), "dear", "1", "amount", 'model dear has the multiplier 1.5; or with multiplier="1"'),
        (Units(10, named="actual"), None, "1.5", "actual", "as this hold has the multiplier 1.5"),
        (Units(10, multiplier="1.5"), "dear", "1", "multiplier", "left out beside amount"),
        (Units(None, 10), None, None, "multiplier", "given, or model_slug"),
        *((Units(None, 1, wrong), None, "1", "multiplier", "decimal text") for wrong in WRONG),
    ],
)  # fmt: skip
def test_what_could_be_meant_in_two_ways_is_refused(
    units: Units, model: str | None, held: str | None, field: str, says: str
) -> None:
    error = refused(units, model, held)
    assert error.field == field
    assert says in str(error)


@pytest.mark.parametrize(
    ("units", "model", "held", "price"),
    [
        (Units(10), None, "1", (10, "1")),
        (Units(10), None, None, (10, "1")),
        (Units(10), "plain-too", "1", (10, "1")),
        (Units(10, multiplier="1.0"), "dear", "1.5", (10, "1")),
        (Units(None, 10), None, "1", (10, "1")),
        (Units(None, 10), None, "1.5", (10, "1.5")),
        (Units(None, 10), "cheap", "1.5", (10, "0.75")),
        (Units(None, 10, "2"), "cheap", "1.5", (10, "2")),
        (Units(None, 10), "unheard-of", "1.5", (10, "1")),
        (Units(None, 0, "0"), None, None, (0, "0")),
    ],
)  # fmt: skip
def test_the_multiplier_that_counts(units: Units, model: Any, held: str | None, price: tuple[int, str]) -> None:
    assert price_of(units, model, found, held) == price


def test_a_call_that_says_it_all_looks_nothing_up() -> None:
    def never(model: object) -> str:
        raise AssertionError(model)

    assert price_of(Units(None, 3, "2"), "dear", never) == (3, "2")
    assert price_of(Units(3, None, "1"), "dear", never) == (3, "1")
    assert price_of(Units(3), None, never) == (3, "1")
