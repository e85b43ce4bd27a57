"""Rows of an import: their values, and the messages about bad ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from schemas.events import MAX_TOTAL
from worker.admin.accounts import parse_time
from worker.ledger.accounts import State


class BadRow(NamedTuple):
    """A row that cannot be imported. `row` counts from 1: lines of the file, or installs of a relay."""

    row: int
    user_id: str
    field: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.field}: {self.reason}"


class Arrival(NamedTuple):
    """An account that may be imported. The ledger entry that opens it keeps `facts`."""

    row: int
    state: State
    facts: Mapping[str, object]


class WrongValue(ValueError):
    """A value of a row breaks a rule. The message names the field and the values allowed."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = printable(field), reason


def printable(text: str) -> str:
    """Return the text as a terminal can show it: names in a file may hold anything."""
    return ascii(text)[1:-1][:128]


def time_of(value: object) -> datetime:
    """Parse an ISO 8601 time with an offset. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("must be an ISO 8601 time with an offset, as text")
    try:
        return parse_time(value)
    except ValueError as error:
        raise ValueError(f"must be an ISO 8601 time with an offset: {error}") from None


def one_of(*names: str) -> AfterValidator:
    """Return a validator that accepts these names only."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return AfterValidator(check)


class Row(BaseModel):
    """Base of all rows: immutable, strict, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Model = TypeVar("_Model", bound=Row)


def parse_row(model: type[_Model], value: object) -> _Model:
    """Return the row in `value`. Raises WrongValue for the first bad field."""
    if not isinstance(value, dict):
        raise WrongValue("row", f"must be a JSON object (got {value!r:.64})")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        raise WrongValue(field, "missing")
    if first["type"] == "extra_forbidden":
        raise WrongValue(field, "unknown field")
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    reason = reason.replace("String should match pattern", "must be text that matches")
    raise WrongValue(field, f"{reason} (got {first['input']!r:.64})")


def require_known(field: str, code: str | None, codes: Collection[str]) -> None:
    """Raise WrongValue unless `code` is None or one of `codes`."""
    if code is not None and code not in codes:
        raise WrongValue(field, f"must be one of {', '.join(sorted(codes)) or 'none there are'} (got {code!r:.64})")


class Repeated(dict[str, Any]):
    """A JSON object that repeats a name; a plain one would keep the last value only."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs

    def repeated(self) -> str:
        """Return the name that occurs most often."""
        return Counter(name for name, _ in self.pairs).most_common(1)[0][0]


def repeats_marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; one that repeats a name becomes a `Repeated`."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeated(pairs)


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises WrongValue if it repeats a name."""
    found = repeats_marked(pairs)
    if isinstance(found, Repeated):
        raise WrongValue(found.repeated(), "must be given once")
    return found


def month_of(value: object) -> datetime:
    """Parse a month as in 2026-11: its first moment, in UTC. Raises ValueError."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", value) or value < "0001":
        raise ValueError("must be a month, as in 2026-11")
    return datetime(int(value[:4]), int(value[5:]), 1, tzinfo=UTC)


Total = Annotated[int, Field(ge=0, le=MAX_TOTAL)]


Time = Annotated[datetime, BeforeValidator(time_of)]


Month = Annotated[datetime, BeforeValidator(month_of)]
