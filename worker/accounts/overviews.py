"""The reports over all accounts as answers of `Accounts`: the first rows of each, and whether there are more.

Every function takes one snapshot for its report and raises ReportError for a condition that no report can meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from itertools import islice
from typing import Literal, TypeVar

from schemas.overviews import (
    DebtorsReport,
    NearLimitReport,
    PurchasedReport,
    TopReport,
    UncollectedReport,
    UsageFigure,
    UsageReport,
)
from worker.errors import ReportError
from worker.reports.overviews import columns_of, open_overviews
from worker.reports.usage import require_limit
from worker.resources import Resources

T = TypeVar("T")


def usage_report(
    resources: Resources,
    since: date | None,
    until: date | None,
    *,
    by: Sequence[str],
    meter: str | None,
    plan: str | None,
    limit: int,
) -> UsageReport:
    """Return events and amount of a span of days, by meter and the groups of `by`."""
    require_limit("limit", limit)
    with open_overviews(resources) as overviews:
        span = overviews.span(since, until)
        found, more = _first(overviews.usage(span, by, meter=meter, plan=plan), limit)
        rows = tuple(UsageFigure(**row._asdict()) for row in found)
        return UsageReport(report="usage", **span._asdict(), by=columns_of(by), rows=rows, more=more)


def top_report(
    resources: Resources, since: date | None, until: date | None, *, meter: str | None, limit: int
) -> TopReport:
    """Return the `limit` accounts that used most of each meter in a span of days."""
    with open_overviews(resources) as overviews:
        span = overviews.span(since, until)
        rows = tuple(overviews.top(span, meter=meter, limit=limit))
        return TopReport(report="top", **span._asdict(), rows=rows)


def near_limit_report(resources: Resources, percent: int | None, *, meter: str | None, limit: int) -> NearLimitReport:
    """Return the accounts that have used `percent` of a limit; None: that of the settings."""
    require_limit("limit", limit)
    with open_overviews(resources) as overviews:
        least = overviews.near_limit_percent if percent is None else percent
        rows, more = _first(overviews.near_limit(least, meter=meter), limit)
        return NearLimitReport(report="near-limit", percent=least, rows=rows, more=more)


def debtors_report(resources: Resources, *, meter: str | None, limit: int) -> DebtorsReport:
    """Return the accounts that owe units."""
    require_limit("limit", limit)
    with open_overviews(resources) as overviews:
        rows, more = _first(overviews.debtors(meter=meter), limit)
        return DebtorsReport(report="debtors", rows=rows, more=more)


def purchased_report(
    resources: Resources, by: Literal["meter", "account"], *, meter: str | None, limit: int
) -> PurchasedReport:
    """Return purchased units that are not spent, by meter or by account."""
    require_limit("limit", limit)
    if by not in ("meter", "account"):
        raise ReportError(f"by: unknown {by!r:.64}; there are meter, account")
    with open_overviews(resources) as overviews:
        read = overviews.purchased if by == "meter" else overviews.purchased_of_accounts
        rows, more = _first(read(meter=meter), limit)
        return PurchasedReport(report="purchased", by=by, rows=rows, more=more)


def uncollected_report(
    resources: Resources, since: date | None, until: date | None, *, meter: str | None, limit: int
) -> UncollectedReport:
    """Return events that no account paid, of a span of days or, without one, of all time."""
    require_limit("limit", limit)
    with open_overviews(resources) as overviews:
        span = None if since is None and until is None else overviews.span(since, until)
        rows, more = _first(overviews.uncollected(span, meter=meter), limit)
        days = span._asdict() if span is not None else {"since": None, "until": None}
        return UncollectedReport(report="uncollected", **days, rows=rows, more=more)


def _first(rows: Iterable[T], limit: int) -> tuple[tuple[T, ...], bool]:
    """Return the first rows, and whether there are more."""
    found = tuple(islice(rows, limit + 1))
    return found[:limit], len(found) > limit
