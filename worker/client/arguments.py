"""Arguments of the calls, checked before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from schemas.events import DIMENSIONS_ALLOWED, ID_ALLOWED, ID_PATTERN, MAX_AMOUNT, Scalar
from worker.client.session import Context
from worker.errors import InvalidRequest
from worker.rules.prices import Price, Units, price_of

_is_identifier = re.compile(ID_PATTERN).fullmatch
# What Postgres can store.
_is_text = re.compile("[^\x00\ud800-\udfff]*").fullmatch


# A job of some days; the bound of the setting is the same.
MAX_HOLD_TTL_SECONDS = 7 * 86_400


class Facts(NamedTuple):
    """The facts about a piece of work, beside who used how many units of what.

    `event_id` is None where the call has an id of its own. `backend` did the work, with the model `model_slug`;
    `dimensions` may name both as well. `traceparent` (W3C) is the trace of the work; None: the current one.
    """

    event_id: str | None = None
    source: str | None = None
    reference_id: str | None = None
    dimensions: Mapping[str, Scalar] | None = None
    backend: str | None = None
    model_slug: str | None = None
    traceparent: str | None = None

    @property
    def model(self) -> object:
        """The model that did the work, if one is named."""
        return stated(self.dimensions).get("model_slug") if self.model_slug is None else self.model_slug

    def all_dimensions(self) -> dict[str, Scalar] | None:
        """Return the dimensions with backend and model in them. Raises InvalidRequest where they name others."""
        given = stated(self.dimensions)
        named = {"backend": self.backend, "model_slug": self.model_slug}
        beside = {name: value for name, value in named.items() if value is not None}
        if not beside:
            return None if self.dimensions is None else dict(given)
        dimensions = {**beside, **given}
        for name, value in beside.items():
            if dimensions[name] != value:
                raise InvalidRequest(f"dimensions.{name}", dimensions[name], f"{value}, as `{name}` says")
        return dimensions


def stated(dimensions: Mapping[str, Scalar] | None) -> Mapping[str, Scalar]:
    """Return the dimensions of a call, of none an empty map. Raises InvalidRequest for another type."""
    if dimensions is None:
        return {}
    if not isinstance(dimensions, Mapping):
        raise InvalidRequest("dimensions", dimensions, DIMENSIONS_ALLOWED)
    return dimensions


def require(
    context: Context, user_id: str, meter: str, amount: int, *, backend: str | None = None, **ids: object
) -> None:
    """Raise InvalidRequest for an argument that could never be right, before anything is sent.

    `ids` are the other ids of the call, by the names of its arguments.
    """
    require_id("user_id", user_id)
    for name, value in ids.items():
        require_id(name, value)
    if not isinstance(meter, str) or meter not in context.catalogue.meters:
        raise InvalidRequest("meter", meter, "one of " + ", ".join(sorted(context.catalogue.meters)))
    require_amount("amount", amount)
    if backend is not None and not (isinstance(backend, str) and backend in context.catalogue.backends):
        raise InvalidRequest("backend", backend, "one of " + ", ".join(sorted(context.catalogue.backends)))


def require_id(name: str, value: object) -> None:
    """Raise InvalidRequest, naming the argument, unless `value` may be an id."""
    if not (isinstance(value, str) and _is_identifier(value)):
        raise InvalidRequest(name, value, ID_ALLOWED)


def require_amount(name: str, value: object) -> None:
    """Raise InvalidRequest, naming the argument, unless `value` may be an amount."""
    if type(value) is not int or not 0 <= value <= MAX_AMOUNT:
        raise InvalidRequest(name, value, f"a whole number from 0 to {MAX_AMOUNT}")


def require_pay_from(pay_from: object) -> None:
    """Raise InvalidRequest unless this says what a check may count."""
    if pay_from is not None and pay_from != "allowance":
        raise InvalidRequest("pay_from", pay_from, "allowance, or None")


def require_model(model_slug: object) -> None:
    """Raise InvalidRequest unless this may be the name of a model, or none."""
    if model_slug is not None and not (isinstance(model_slug, str) and _is_text(model_slug)):
        raise InvalidRequest("model_slug", model_slug, "text, without NUL characters and lone surrogates")


def hold_ttl_seconds(context: Context, ttl_seconds: int | None, most: int = MAX_HOLD_TTL_SECONDS) -> int:
    """How long a hold lives: what was asked for, else the setting, at most `most`. Raises InvalidRequest."""
    ttl = min(context.settings.hold_ttl_seconds, most) if ttl_seconds is None else ttl_seconds
    if type(ttl) is not int or not 1 <= ttl <= most:
        raise InvalidRequest("ttl_seconds", ttl, f"1 to {most}")
    return ttl


def multiplier_of(context: Context, model: object) -> str:
    """The catalogue's multiplier of a model, "1" without a model.

    The setting says what becomes of a model that the catalogue does not know: it counts as 1, which the context notes,
    or it is refused with InvalidRequest.
    """
    if model is None:
        return "1"
    multipliers = context.catalogue.multipliers
    known = multipliers.get(model) if isinstance(model, str) else None
    if known is not None:
        return known
    if context.settings.unknown_models == "refuse":
        listed = ", ".join(sorted(multipliers)) or "none"
        allowed = f"a model with a multiplier in the catalogue, which has {listed}; add a line below its [multipliers]"
        raise InvalidRequest("model_slug", model, allowed)
    context.unknown_models.count(model)
    return "1"


def amounts_of(context: Context, meter: str, cost: Price) -> tuple[int, int]:
    """The units that a price is answered as, and the units that it may cost at most: these must fit, and are pending.

    The second is more by one where the meter carries a fraction, as earlier ones may complete a unit with it.
    """
    return cost.amounts(context.catalogue.roundings.get(meter, "carry"))


def price(context: Context, units: Units, facts: Facts | None = None, *, held: str | None = "1") -> Price:
    """What the units of a call cost, by the catalogue; see `price_of`. Raises InvalidRequest."""
    model = units.model_slug if facts is None else facts.model
    require_model(units.model_slug)
    return price_of(units, model, lambda each: multiplier_of(context, each), held)
