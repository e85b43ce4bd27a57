"""The reports over all accounts, as `report … --json` prints them and `Accounts` answers them.

Amounts are whole units of the meter, times UTC. `more`: a call of `Accounts` left out rows beyond its limit; a command
prints all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from typing import ClassVar, Literal

from pydantic import ConfigDict

from schemas.answers import Answer


class _Row:
    """Base of the rows: values of the standard library, as a report may have many; published as closed objects."""

    __slots__ = ()
    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class UsageFigure(_Row):
    """Usage of a meter; a report has the columns `day`, `plan` and `user_id` only if it groups by them.

    `day` is the UTC day of the work. `plan` is the plan that the account had then; "" for events without an account.
    """

    meter: str
    events: int
    amount: int
    day: date | None = None
    plan: str | None = None
    user_id: str | None = None


class UsageReport(Answer):
    """Usage of all accounts on the days from `since` up to, and without, `until`. No reversed event counts."""

    report: Literal["usage"]
    since: date
    until: date
    by: tuple[Literal["day", "meter", "plan", "account"], ...]
    rows: tuple[UsageFigure, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class TopFigure(_Row):
    """One of the accounts that used most of a meter; `rank` counts from 1."""

    meter: str
    rank: int
    user_id: str
    events: int
    amount: int


class TopReport(Answer):
    """The accounts that used most of each meter on the days from `since` up to, and without, `until`."""

    report: Literal["top"]
    since: date
    until: date
    rows: tuple[TopFigure, ...]


@dataclass(frozen=True, slots=True)
class NearLimitFigure(_Row):
    """A meter of an account near its limit; `percent` is rounded down, rollover and purchased credits come on top."""

    user_id: str
    meter: str
    plan: str
    status: str
    used: int
    limit: int
    percent: int
    rollover: int
    purchased: int
    period_end: datetime | None


class NearLimitReport(Answer):
    """The accounts that have used at least `percent` of a limit, as a check would find them now."""

    report: Literal["near-limit"]
    percent: int
    rows: tuple[NearLimitFigure, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class DebtFigure(_Row):
    """Debt of an account on a meter, in units of the meter."""

    user_id: str
    meter: str
    plan: str
    status: str
    debt: int
    purchased: int


class DebtorsReport(Answer):
    """The accounts that owe units, as a check would find them now."""

    report: Literal["debtors"]
    rows: tuple[DebtFigure, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class PurchasedFigure(_Row):
    """Purchased units that are not spent: of a meter in `accounts` accounts, or of one account."""

    meter: str
    purchased: int
    accounts: int | None = None
    user_id: str | None = None
    plan: str | None = None
    status: str | None = None


class PurchasedReport(Answer):
    """Purchased units that are not spent, by meter or by account."""

    report: Literal["purchased"]
    by: Literal["meter", "account"]
    rows: tuple[PurchasedFigure, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class UncollectedFigure(_Row):
    """Events of a user without an account, on one meter; times are those of the work."""

    user_id: str
    meter: str
    events: int
    amount: int
    first_at: datetime
    last_at: datetime


class UncollectedReport(Answer):
    """Events that no account paid, of a span or, without one, of all time."""

    report: Literal["uncollected"]
    since: date | None
    until: date | None
    rows: tuple[UncollectedFigure, ...]
    more: bool = False
