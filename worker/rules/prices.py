"""How many units a call is about: an amount, after the multiplier, or a quantity, before it. Pure.

A number that a caller takes for one and we for the other would be billed wrong in silence. So a call names one of both,
and an amount beside a model that has a multiplier is refused until the caller says that it is multiplied already.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from schemas.events import MAX_AMOUNT, MULTIPLIER_ALLOWED, MULTIPLIER_PATTERN, canonical_multiplier, is_too_much
from worker.errors import InvalidRequest
from worker.rules.fractions import whole_units

_is_multiplier = re.compile(MULTIPLIER_PATTERN).fullmatch


class Units(NamedTuple):
    """How many units a call is about, in the words of its caller.

    Either an `amount`, after the multiplier, or a `quantity`, before it. `named` is what the call names the amount.
    """

    amount: int | None
    quantity: int | None = None
    multiplier: str | None = None
    model_slug: str | None = None
    named: str = "amount"


class Price(NamedTuple):
    """What a call is billed: `quantity` units, each times `multiplier`."""

    quantity: int
    multiplier: str

    @property
    def amount(self) -> int:
        """Return the whole units after the multiplier, without a fraction."""
        return self.amounts("down")[0]

    def amounts(self, rounding: str) -> tuple[int, int]:
        """Return the whole units by the meter's rounding, and the units that it may cost at most.

        The second is more by one where a fraction is carried: earlier fractions may complete a unit with it.
        """
        units, remainder = whole_units(self.quantity, self.multiplier, rounding)
        return units, units + (remainder > 0)


def price_of(units: Units, model: object, multiplier_of: Callable[[object], str], held: str | None = "1") -> Price:
    """Return what `units` cost. Raises InvalidRequest, naming the field, for what could be understood in two ways.

    `model` did the work, if it is known; `multiplier_of` answers its multiplier. `held` is the multiplier of the hold
    that this is a part of, "1" without one; None: there is a hold, and its multiplier is not known here.
    """
    number = _number(units)
    if units.multiplier is not None:
        _require_multiplier(units.multiplier)
        multiplier: str | None = units.multiplier
    else:
        multiplier = held if model is None else multiplier_of(model)
    if units.quantity is None:
        return Price(_require_multiplied(units, number, multiplier or "1", model), "1")
    if multiplier is None:
        allowed = "given, or model_slug, beside a quantity: the multiplier of this hold is not known here"
        raise InvalidRequest("multiplier", None, allowed)
    if is_too_much(number, multiplier):
        raise InvalidRequest("quantity", number, f"at most {MAX_AMOUNT} after the multiplier {multiplier}")
    return Price(number, multiplier)


def _number(units: Units) -> int:
    """Return the amount or the quantity, of which there is exactly one."""
    if units.amount is not None and units.quantity is not None:
        raise InvalidRequest("quantity", units.quantity, f"left out, as {units.named} is given")
    number = units.amount if units.quantity is None else units.quantity
    if number is None:
        raise InvalidRequest(units.named, None, "given, or quantity")
    if type(number) is not int or not 0 <= number <= MAX_AMOUNT:
        field = units.named if units.quantity is None else "quantity"
        raise InvalidRequest(field, number, f"a whole number from 0 to {MAX_AMOUNT}")
    return number


def _require_multiplier(multiplier: object) -> None:
    """Raise InvalidRequest unless this may be a multiplier."""
    if not (isinstance(multiplier, str) and _is_multiplier(multiplier)):
        raise InvalidRequest("multiplier", multiplier, MULTIPLIER_ALLOWED)


def _require_multiplied(units: Units, amount: int, multiplier: str, model: object) -> int:
    """Return the amount. Raises InvalidRequest where it may be one that nobody has multiplied yet."""
    if canonical_multiplier(multiplier) == "1":
        return amount
    if units.multiplier is not None:
        allowed = f'"1" or left out beside {units.named}, which is after the multiplier; or pass quantity='
        raise InvalidRequest("multiplier", multiplier, allowed)
    whose = "this hold" if model is None else f"model {model!s:.64}"
    allowed = f"passed as quantity= (--model), as {whose} has the multiplier {multiplier}"
    already = 'or with multiplier="1" (--multiplier 1) if it is multiplied already'
    raise InvalidRequest(units.named, amount, f"{allowed}; {already}")
