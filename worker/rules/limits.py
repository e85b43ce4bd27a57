"""Limits: what an account may spend on a meter per day, week or month, beside its allowance. Pure rules, no I/O.

A plan, an operator and the user may each set one limit per window; all of them are in force. Windows are those of the
calendar in the account's time zone: a day from midnight, a week from Monday, a month from the 1st. A window opens when
the first event after the one before needs it. An event counts in the windows that are open when it is applied, which
go by its stream time, whatever it costs and whoever pays. A window never goes back, as periods never do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast, get_args
from zoneinfo import ZoneInfo

from worker.rules.calendar import boundary, index_at

Per = Literal["day", "week", "month"]
PERS = cast("tuple[Per, ...]", get_args(Per))
# Of two limits of one amount, the first one is named.
Setter = Literal["plan", "operator", "user"]
SETTERS = cast("tuple[Setter, ...]", get_args(Setter))

_CADENCES = {"day": "daily", "week": "weekly", "month": "monthly"}
# Midnight of a Monday which is the 1st of a month: each window is some steps away from it.
_ANCHOR = datetime(2001, 1, 1)  # noqa: DTZ001 - the time zone is the account's
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_NONE: Mapping[Any, Any] = MappingProxyType({})


class Window(NamedTuple):
    """A window while it is open, from `starts` until `ends`: `used` units of events after the change `since`."""

    starts: datetime
    ends: datetime
    since: int
    used: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it; `from_json` reads it."""
        return {**self._asdict(), "starts": self.starts.isoformat(), "ends": self.ends.isoformat()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], spent: int = 0) -> Window:
        """Return the value that `as_json` wrote, after `spent` more units."""
        starts, ends = (datetime.fromisoformat(stored[name]) for name in ("starts", "ends"))
        return cls(starts, ends, stored["since"], stored["used"] + spent)


class LimitStanding(NamedTuple):
    """A limit in force: `amount` units per window, `used` of them in the window that is open until `ends_at`."""

    per: Per
    set_by: Setter
    amount: int
    used: int
    starts_at: datetime | None
    ends_at: datetime

    def left(self, pending: int) -> int:
        """Return the units left to spend beside `pending` ones, which count in the window now open."""
        return max(0, self.amount - self.used - pending)


class Limits(NamedTuple):
    """The limits of an account on one meter: amounts by setter and window, and the windows that are open."""

    amounts: Mapping[Setter, Mapping[Per, int]] = _NONE
    windows: Mapping[Per, Window] = _NONE

    @property
    def pers(self) -> list[Per]:
        """The windows that have a limit."""
        return [per for per in PERS if any(per in of_setter for of_setter in self.amounts.values())]

    def amount(self, set_by: Setter, per: Per) -> int | None:
        """Return the amount of one limit; None without it."""
        return self.amounts.get(set_by, _NONE).get(per)

    def next_window(self) -> datetime:
        """Return when the next window is due: the first end, or long ago if one was never opened."""
        return min(self.windows[per].ends if per in self.windows else _LONG_AGO for per in self.pers)

    def boundaries(self) -> list[datetime]:
        """Return the ends of the open windows, in no order."""
        return [window.ends for window in self.windows.values()]

    def opened(self, at: datetime, timezone: str | None, since: int) -> Limits:
        """Return the limits with the windows open that hold `at`, in place of those that ended. See `Window.since`."""
        due = [per for per in self.pers if per not in self.windows or self.windows[per].ends <= at]
        return self._replace(
            windows={**self.windows, **{per: Window(*bounds(per, at, timezone), since) for per in due}}
        )

    def spent(self, units: int) -> Limits:
        """Return the limits after an event of `units`."""
        windows = {per: window._replace(used=window.used + units) for per, window in self.windows.items()}
        return self._replace(windows=windows)

    def given_back(self, units: int, seq: int) -> Limits:
        """Return the limits after a reversal of the event `seq`: windows that counted it have its units back."""
        windows = {
            per: window._replace(used=window.used - units) if window.since < seq else window
            for per, window in self.windows.items()
        }
        return self._replace(windows=windows)

    def having(self, set_by: Setter, amounts: Mapping[Per, int]) -> Limits | None:
        """Return the limits with these amounts of one setter; None if no limit is left. Windows without one close."""
        others = {name: self.amounts[name] for name in SETTERS if name != set_by and name in self.amounts}
        given = {set_by: {per: amounts[per] for per in PERS if per in amounts}} if amounts else {}
        changed = Limits({name: {**others, **given}[name] for name in SETTERS if name in {**others, **given}})
        kept = changed.pers
        windows = {per: self.windows[per] for per in kept if per in self.windows}
        return changed._replace(windows=windows) if kept else None

    def with_amount(self, set_by: Setter, per: Per, amount: int | None) -> Limits | None:
        """Return the limits with one of another amount; None takes it away."""
        amounts = {name: units for name, units in self.amounts.get(set_by, _NONE).items() if name != per}
        return self.having(set_by, amounts if amount is None else {**amounts, per: amount})

    def standings(self) -> list[LimitStanding]:
        """Return each limit whose window is open: by window, the smallest amount first."""
        found = [
            LimitStanding(per, name, of_setter[per], window.used, window.starts, window.ends)
            for name, of_setter in self.amounts.items()
            for per, window in self.windows.items()
            if per in of_setter
        ]
        return sorted(found, key=lambda each: (PERS.index(each.per), each.amount, SETTERS.index(each.set_by)))

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it; `from_json` reads it."""
        windows = {per: window.as_json() for per, window in self.windows.items()}
        return {"amounts": {name: dict(amounts) for name, amounts in self.amounts.items()}, "windows": windows}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Limits:
        """Return the value that `as_json` wrote, after the units `spent` since, if it says so."""
        spent = stored.get("spent", 0)
        windows = {per: Window.from_json(each, spent) for per, each in stored["windows"].items()}
        return cls(stored["amounts"], windows)


def bounds(per: Per, at: datetime, timezone: str | None) -> tuple[datetime, datetime]:
    """Return start and end of the window that holds `at`, in `timezone` (an IANA name; None: UTC)."""
    anchor = _ANCHOR.replace(tzinfo=ZoneInfo(timezone or "UTC")).astimezone(UTC)
    cadence = _CADENCES[per]
    index = index_at(anchor, cadence, at, timezone)
    return boundary(anchor, cadence, index, timezone), boundary(anchor, cadence, index + 1, timezone)


def with_plan(limits: Limits | None, amounts: Mapping[Per, int] | None) -> Limits | None:
    """Return the limits under a plan with these amounts; None if there are no limits."""
    if limits is None and amounts is None:
        return None
    return (limits or Limits()).having("plan", amounts or {})


def of_plan(limits: Limits | None) -> Mapping[Per, int] | None:
    """Return the amounts that the plan set; None without any."""
    return None if limits is None else limits.amounts.get("plan")


def denying(standings: Iterable[LimitStanding], amount: int, pending: int) -> LimitStanding | None:
    """Return the limit into which `amount` does not fit beside `pending` units; None if it fits into all.

    Of several it is the one that ends last: before that, no window gives room.
    """
    found = [each for each in standings if amount > each.left(pending)]
    return max(found, key=lambda each: each.ends_at, default=None)
