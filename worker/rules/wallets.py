"""Wallets: a meter that draws on the buckets of another one, at an exact price. Pure, in integers.

A plan gives such a meter no allowance of its own: `premium_voice = { wallet = "credits", price = "3" }`. Its events
cost quantity × multiplier × price units of the wallet, exact to a millionth; a smaller part is dropped, which needs a
multiplier and a price with more than six decimals together. The rest of a unit is carried by account and meter, as
`fractions` says. Only a meter that carries may draw on a wallet. What is pending is in whole units of the meter: an
event that drops a fraction of one would cost more than they say.

A check counts all that is pending of the meters of one wallet together: the units of each meter, at its price, with
what it carries. So it never promises more than the events will cost. Lua does the same (worker/keyspace/lua/common.lua,
`in_wallet`); the golden cases in tests/vectors/wallets.json hold both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from config.catalogue import Catalogue, Draw
from schemas.events import ratio
from worker.rules.fractions import MILLIONTHS, as_decimal, in_millionths

# The price of a wallet's own meter.
ITSELF = "1"


def cost_in_millionths(quantity: int, multiplier: str, price: str) -> int:
    """Return quantity × multiplier × price in millionths of a unit of the wallet; a smaller part is dropped."""
    numerator, denominator = ratio(price)
    return in_millionths(quantity, multiplier) * numerator // denominator


def drawn_units(quantity: int, multiplier: str, price: str) -> tuple[int, int]:
    """Return the whole units of the wallet that an event costs, and the millionths to carry."""
    return divmod(cost_in_millionths(quantity, multiplier, price), MILLIONTHS)


def price_in_millionths(price: str) -> int:
    """Return a price as a whole number."""
    return in_millionths(1, price)


def cost_of(units: int, price_millionths: int, carried: int) -> int:
    """Return the whole units of the wallet that `units` of a meter cost in all, with the millionths that it carries."""
    return (units * price_millionths + carried) // MILLIONTHS


class Pending(NamedTuple):
    """What is pending on one meter of a wallet, in units of the meter, with its price and what it carries."""

    units: int
    price_millionths: int
    carried: int

    @property
    def cost(self) -> int:
        """The units of the wallet that it will cost."""
        return cost_of(self.units, self.price_millionths, self.carried)

    def cost_of_more(self, units: int) -> int:
        """Return the units of the wallet that `units` more of the meter cost."""
        return self._replace(units=self.units + units).cost - self.cost

    def units_for(self, room: int) -> int:
        """Return the most units of the meter that cost at most `room` units of the wallet."""
        least_too_many = (self.cost + room + 1) * MILLIONTHS - self.carried
        return (least_too_many - 1) // self.price_millionths - self.units

    @property
    def price(self) -> str:
        """The price as decimal text."""
        return as_decimal(self.price_millionths)


def draws_of(catalogue: Catalogue, plan: str, status: str) -> Mapping[str, Draw]:
    """Return the meters of a plan that draw on a wallet, with wallet and price; of its trial while that lasts."""
    return catalogue.draws(plan, on_trial=status == "trialing") if plan in catalogue.plans_with_wallets else {}


def wallet_of(draws: Mapping[str, Draw], meter: str) -> str | None:
    """Return the wallet that pays for a meter; a wallet pays for its own. None if the meter has to do with none."""
    draw = draws.get(meter)
    if draw is not None:
        return draw.wallet
    return meter if any(each.wallet == meter for each in draws.values()) else None


def meters_of(draws: Mapping[str, Draw], wallet: str) -> dict[str, str]:
    """Return the prices of the meters that a wallet pays for, itself among them."""
    return {wallet: ITSELF, **{meter: draw.price for meter, draw in draws.items() if draw.wallet == wallet}}
