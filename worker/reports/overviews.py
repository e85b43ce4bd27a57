"""The reports over all accounts: usage, top, near-limit, debtors, purchased, uncollected.

Each reads one read-only snapshot under a time-out of its own, row by row: it takes no lock, so no drain waits for it,
and its memory does not grow with the accounts. Amounts are units of one meter. A report of usage counts every applied
event on the UTC day of the work (`occurred_at`), and no reversed one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from itertools import islice
from typing import Literal, TypeVar

from schemas.overviews import (
    DebtFigure,
    NearLimitFigure,
    PurchasedFigure,
    TopFigure,
    UncollectedFigure,
)
from worker.errors import ReportError
from worker.ledger import overviews
from worker.ledger.accounts import read_accounts
from worker.ledger.connection import Postgres, batch_connection, open_engine, read_clock
from worker.ledger.overviews import StoredBalance, UsageFigures
from worker.resources import Resources
from worker.rules.lifecycle import as_of
from worker.rules.spans import Span, month_of
from worker.rules.waterfall import limit_in_force

# Columns by which usage is grouped, by their names for people. The meter is always one: no report adds different ones.
Group = Literal["day", "meter", "plan", "account"]
GROUPS: dict[Group, str] = {"day": "day", "meter": "meter", "plan": "plan", "account": "user_id"}
MAX_TOP = 10_000
T = TypeVar("T")

# Balances that are brought up to date together.
_CHUNK = 500


def columns_of(by: Sequence[str]) -> tuple[Group, ...]:
    """Return the groups of a report of usage in the order of its columns; the meter is always one."""
    return tuple(name for name in GROUPS if name in by or name == "meter")


class Overviews:
    """The reports over all accounts, in one snapshot. Read the rows of one report before you ask for the next.

    Each method checks its arguments before it reads, and raises ReportError.
    """

    def __init__(self, resources: Resources, postgres: Postgres) -> None:
        self._resources = resources
        self._postgres = postgres
        self._now = read_clock(postgres)

    def span(self, since: date | None, until: date | None) -> Span:
        """Return the days from `since` up to, and without, `until`.

        By default `since` begins the month of the ledger's clock, and `until` ends the month of `since`.
        Raises ReportError.
        """
        for name, day in (("since", since), ("until", until)):
            if day is not None and type(day) is not date:
                raise ReportError(f"{name}: must be a date without a time (got {day!r:.64})")
        since = since or month_of(self._now.date()).since
        until = until or month_of(since).until
        if since >= until:
            raise ReportError(f"from: must be before to, the first day that no longer counts (got {since} to {until})")
        return Span(since, until)

    def usage(
        self, span: Span, by: Sequence[str] = ("meter",), *, meter: str | None = None, plan: str | None = None
    ) -> Iterator[UsageFigures]:
        """Yield events and amount by meter and by the groups of `by`: `day`, `meter`, `plan`, `account`.

        The plan is the one that the account had at the event; "" for an event without an account.
        """
        if not isinstance(by, list | tuple):
            raise ReportError(f"by: must be a list of {', '.join(GROUPS)} (got {by!r:.64})")
        unknown = [name for name in by if not _is_one_of(name, GROUPS)]
        if unknown or not by:
            wrong = f"unknown {', '.join(map(repr, unknown))}" if unknown else "missing"
            raise ReportError(f"by: {wrong}; there are {', '.join(GROUPS)}")
        self._require_meter(meter)
        if plan is not None and not _is_one_of(plan, self._resources.catalogue.plans):
            raise ReportError(f"plan: unknown {plan!r:.64}; there are {', '.join(self._resources.catalogue.plans)}")
        columns = [GROUPS[name] for name in columns_of(by)]
        return overviews.read_usage(self._postgres, span, columns, meter=meter, plan=plan)

    def top(self, span: Span, *, meter: str | None = None, limit: int = 10) -> Iterator[TopFigure]:
        """Yield the `limit` accounts that used most of each meter; equal ones in the order of their ids."""
        self._require_meter(meter)
        _require_whole("limit", limit, MAX_TOP)
        return overviews.read_top(self._postgres, span, meter=meter, limit=limit)

    @property
    def near_limit_percent(self) -> int:
        """The percentage of the settings from which an account is near a limit."""
        return self._resources.settings.near_limit_percent

    def near_limit(self, percent: int, *, meter: str | None = None) -> Iterator[NearLimitFigure]:
        """Yield the meters of entitled accounts of which at least `percent` of the limit is used.

        Boundaries that are due count as a check would find them.
        """
        self._require_meter(meter)
        _require_whole("percent", percent, 100)
        stored = overviews.read_near_limit(self._postgres, percent, meter=meter)
        return self._up_to_date(stored, lambda balance: _near_limit(balance, percent))

    def debtors(self, *, meter: str | None = None) -> Iterator[DebtFigure]:
        """Yield the debts of accounts, by user and meter. Allowance that a due boundary brings pays debt first."""
        self._require_meter(meter)
        return self._up_to_date(overviews.read_debts(self._postgres, meter=meter), _debt)

    def purchased(self, *, meter: str | None = None) -> Iterator[PurchasedFigure]:
        """Yield purchased units that are not spent, by meter: what was paid and is still owed to users."""
        self._require_meter(meter)
        return overviews.read_purchased(self._postgres, meter=meter)

    def purchased_of_accounts(self, *, meter: str | None = None) -> Iterator[PurchasedFigure]:
        """Yield purchased units that are not spent, by user and meter."""
        self._require_meter(meter)
        return overviews.read_purchased_of_accounts(self._postgres, meter=meter)

    def uncollected(self, span: Span | None = None, *, meter: str | None = None) -> Iterator[UncollectedFigure]:
        """Yield events that no account paid, by user and meter, of a span or of all time."""
        self._require_meter(meter)
        return overviews.read_uncollected(self._postgres, span, meter=meter)

    def _require_meter(self, meter: str | None) -> None:
        meters = self._resources.catalogue.meters
        if meter is not None and not _is_one_of(meter, meters):
            raise ReportError(f"meter: unknown {meter!r:.64}; there are {', '.join(meters)}")

    def _up_to_date(
        self, stored: Iterator[StoredBalance], figure_of: Callable[[StoredBalance], T | None]
    ) -> Iterator[T]:
        """Yield the figures of balances as they are now, a chunk at a time; most are as they are stored."""
        while chunk := list(islice(stored, _CHUNK)):
            users = sorted({balance.user_id for balance in chunk if balance.is_due})
            accounts = read_accounts(self._postgres, users).accounts if users else {}
            now = {user_id: as_of(self._resources.catalogue, each, self._now) for user_id, each in accounts.items()}
            for balance in chunk:
                found = balance
                if balance.is_due:
                    account = now[balance.user_id]
                    current = account.balances[balance.meter]
                    same = {name: getattr(current, name) for name in StoredBalance._fields if hasattr(current, name)}
                    found = balance._replace(plan=account.plan, status=account.status, **same)
                if (figure := figure_of(found)) is not None:
                    yield figure


@contextmanager
def open_overviews(resources: Resources) -> Iterator[Overviews]:
    """Open a read-only snapshot for reports, on a connection of its own with the time-out of reports."""
    timeout_ms = resources.settings.report_timeout_ms
    engine = open_engine(resources.settings, statement_timeout_ms=timeout_ms)
    try:
        with batch_connection(engine) as postgres:
            overviews.begin(postgres, idle_timeout_ms=timeout_ms)
            yield Overviews(resources, postgres)
            postgres.rollback()
    finally:
        engine.dispose()


def _is_one_of(name: object, known: Container[str]) -> bool:
    return isinstance(name, str) and name in known


def _require_whole(field: str, number: int, most: int) -> None:
    if type(number) is not int or not 1 <= number <= most:
        raise ReportError(f"{field}: must be a whole number from 1 to {most} (got {number!r:.64})")


def _near_limit(balance: StoredBalance, percent: int) -> NearLimitFigure | None:
    limit = 0 if balance.backing == "missing" else limit_in_force(balance.allowance, balance.status)
    if not limit or balance.used * 100 < limit * percent:
        return None
    return NearLimitFigure(
        user_id=balance.user_id,
        meter=balance.meter,
        plan=balance.plan,
        status=balance.status,
        used=balance.used,
        limit=limit,
        percent=balance.used * 100 // limit,
        rollover=balance.rollover,
        purchased=balance.purchased,
        period_end=balance.period_end,
    )


def _debt(balance: StoredBalance) -> DebtFigure | None:
    if balance.rollover >= 0:
        return None
    return DebtFigure(
        user_id=balance.user_id,
        meter=balance.meter,
        plan=balance.plan,
        status=balance.status,
        debt=-balance.rollover,
        purchased=balance.purchased,
    )
