"""The state of the system on one page, with either server away also."""

from __future__ import annotations

from starlette.responses import Response

from worker.reports.health import supervisors, worker_processes
from worker.reports.metrics import Figures
from worker.service.console.render import page
from worker.service.console.visit import Visit

_REFRESH_SECONDS = 10


def overview(visit: Visit, figures: Figures | None) -> Response:
    """Show the last status: that of now, or if it cannot be read in time, the one before it, which says so.

    It refreshes itself by a header, which no reader of the page need wait for: a link stops it.
    """
    status = visit.console.latest(None if figures is None else figures.status)
    is_still = visit.asked("still") == "1"
    response = page(
        visit,
        "overview.html",
        status=200,
        found=status,
        is_late=figures is None,
        is_still=is_still,
        dynos=0 if status is None else len(supervisors(status)),
        workers=0 if status is None else len(worker_processes(status)),
    )
    if not is_still:
        response.headers["refresh"] = str(_REFRESH_SECONDS)
    return response
