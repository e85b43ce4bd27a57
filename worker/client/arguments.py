"""Arguments of the calls, checked before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from schemas.events import ID_CHARACTERS, ID_PATTERN, MAX_AMOUNT, Scalar
from worker.client.session import Context
from worker.errors import InvalidRequest

_is_identifier = re.compile(ID_PATTERN).fullmatch


MAX_HOLD_TTL_SECONDS = 86_400


class Facts(NamedTuple):
    """The facts about a piece of work, beside who used how many units of what.

    `event_id` is None where the call has an id of its own. `backend` did the work; `dimensions` may name it as well.
    """

    event_id: str | None = None
    source: str | None = None
    reference_id: str | None = None
    dimensions: Mapping[str, Scalar] | None = None
    backend: str | None = None

    def dimensions_with_backend(self) -> dict[str, Scalar] | None:
        """Return the dimensions with the backend in them. Raises InvalidRequest where they name another."""
        if self.backend is None:
            return None if self.dimensions is None else dict(self.dimensions)
        dimensions = {"backend": self.backend, **(self.dimensions or {})}
        if dimensions["backend"] != self.backend:
            raise InvalidRequest("dimensions.backend", dimensions["backend"], f"{self.backend}, as `backend` says")
        return dimensions


def require(
    context: Context,
    user_id: str,
    meter: str,
    amount: int,
    *,
    key: str | None = None,
    event_id: str | None = None,
    backend: str | None = None,
) -> None:
    """Raise InvalidRequest for an argument that could never be right, before anything is sent."""
    require_id("user_id", user_id)
    for name, value in (("key", key), ("event_id", event_id)):
        if value is not None:
            require_id(name, value)
    if not isinstance(meter, str) or meter not in context.catalogue.meters:
        raise InvalidRequest("meter", meter, "one of " + ", ".join(sorted(context.catalogue.meters)))
    require_amount("amount", amount)
    if backend is not None and not (isinstance(backend, str) and backend in context.catalogue.backends):
        raise InvalidRequest("backend", backend, "one of " + ", ".join(sorted(context.catalogue.backends)))


def require_id(name: str, value: object) -> None:
    """Raise InvalidRequest, naming the argument, unless `value` may be an id."""
    if not (isinstance(value, str) and _is_identifier(value)):
        raise InvalidRequest(name, value, f"1 to 128 characters of {ID_CHARACTERS}")


def require_amount(name: str, value: object) -> None:
    """Raise InvalidRequest, naming the argument, unless `value` may be an amount."""
    if type(value) is not int or not 0 <= value <= MAX_AMOUNT:
        raise InvalidRequest(name, value, f"a whole number from 0 to {MAX_AMOUNT}")


def hold_ttl_seconds(context: Context, ttl_seconds: int | None) -> int:
    """How long a hold lives: what was asked for, else the setting. Raises InvalidRequest."""
    ttl = context.settings.hold_ttl_seconds if ttl_seconds is None else ttl_seconds
    if type(ttl) is not int or not 1 <= ttl <= MAX_HOLD_TTL_SECONDS:
        raise InvalidRequest("ttl_seconds", ttl, f"1 to {MAX_HOLD_TTL_SECONDS}")
    return ttl
