"""Fractions of a unit: how quantity × multiplier becomes whole units. Pure, exact, in integers.

A multiplier has at most six decimals, so what is left of a unit is a whole number of millionths. The meter's rounding
in the catalogue says what becomes of it:

- `carry`: it stays with the account and the meter; the event with which a whole unit is together pays that unit.
- `down`: nobody pays it.
- `up`: the event pays a whole unit for it.
"""

from __future__ import annotations

from schemas.events import ratio

MILLIONTHS = 1_000_000


def whole_units(quantity: int, multiplier: str, rounding: str = "carry") -> tuple[int, int]:
    """Return the whole units of quantity × multiplier, and the remainder in millionths.

    Above zero, the remainder is to be carried; below zero, the units were rounded up by it. `multiplier` is decimal
    text. Units × 1,000,000 + remainder is the exact product, unless it was rounded down.
    """
    if multiplier == "1":
        return quantity, 0
    numerator, denominator = ratio(multiplier)
    units, rest = divmod(quantity * numerator, denominator)
    if not rest or rounding == "down":
        return units, 0
    left = rest * MILLIONTHS // denominator
    return (units, left) if rounding == "carry" else (units + 1, left - MILLIONTHS)


def with_carried(units: int, remainder: int, carried: int) -> tuple[int, int]:
    """Return the units that an event pays, and the millionths carried after it.

    `carried` are the millionths that earlier events of the account and the meter left over.
    """
    left = carried + remainder
    return (units + 1, left - MILLIONTHS) if left >= MILLIONTHS else (units, left)


def carried_before(quantity: int, multiplier: str, amount: int, left: int) -> int:
    """Return the millionths that were carried to an event that paid `amount` and left `left` millionths."""
    return amount * MILLIONTHS + left - in_millionths(quantity, multiplier)


def in_millionths(quantity: int, multiplier: str) -> int:
    """Return quantity × multiplier in millionths, exact."""
    numerator, denominator = ratio(multiplier)
    return quantity * numerator * (MILLIONTHS // denominator)


def as_decimal(millionths: int) -> str:
    """Return millionths as decimal text: 500,000 is "0.5"."""
    whole, rest = divmod(millionths, MILLIONTHS)
    return f"{whole}.{rest:06d}".rstrip("0") if rest else str(whole)
