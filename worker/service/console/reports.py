"""Usage of all accounts by day as a chart or CSV, and the accounts that used most."""

from __future__ import annotations

import csv
from datetime import date
from io import StringIO

from starlette.exceptions import HTTPException
from starlette.responses import Response

from schemas.overviews import UsageReport
from worker.service.console.pictures import charts
from worker.service.console.render import page
from worker.service.console.visit import Visit

_TOP = 10
_ROWS = 5_000


def usage(visit: Visit) -> Response:
    """Show usage by day and meter as charts, and the accounts that used most of each meter."""
    since, until, meter = _asked(visit)
    found = _by_day(visit)
    top = visit.console.accounts.report_top(since, until, meter=meter, limit=_TOP)
    return page(visit, "reports.html", found=found, charts=charts(found), top=top.rows, meter=meter)


def usage_csv(visit: Visit) -> Response:
    """Return usage by day and meter as CSV. It has no names of users, which a spreadsheet might take for formulas."""
    found = _by_day(visit)
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(["day", "meter", "events", "amount"])
    writer.writerows([each.day, each.meter, each.events, each.amount] for each in found.rows)
    name = f"usage-{found.since}-{found.until}.csv"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(text.getvalue(), media_type="text/csv", headers=headers)


def _by_day(visit: Visit) -> UsageReport:
    """Return the report that a query asks for. Raises HTTPException if it would be cut off: a chart must be whole."""
    since, until, meter = _asked(visit)
    found = visit.console.accounts.report_usage(since, until, by=("day",), meter=meter, limit=_ROWS)
    if found.more:
        raise HTTPException(422, f"until: the span has more than {_ROWS:,} days and meters; ask for less at once")
    return found


def _asked(visit: Visit) -> tuple[date | None, date | None, str | None]:
    return _day(visit, "since"), _day(visit, "until"), visit.asked("meter")


def _day(visit: Visit, name: str) -> date | None:
    text = visit.asked(name)
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise HTTPException(422, f"{name}: must be a date such as 2026-11-20 (got {str(text)[:64]!r})") from None
