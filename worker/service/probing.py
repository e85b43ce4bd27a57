"""`/live`, `/ready` and `/metrics`, as every dyno has them. They want no key, and name no user."""

from __future__ import annotations

from fastapi import APIRouter, Response

from schemas.service import Live, Ready
from worker.reports.metrics import CONTENT_TYPE, exposition
from worker.reports.probes import readiness_of
from worker.service.asking import answered
from worker.service.service import Here

# Its plain functions run in threads: a reading waits for the servers.
router = APIRouter(tags=["probes"])


@router.get("/live", response_model=Live)
async def live() -> Response:
    """Answer that the process answers."""
    return answered(Live(live=True))


@router.get("/ready", response_model=Ready, responses={503: {"model": Ready}})
def ready(here: Here) -> Response:
    """Answer whether work can be done: 503 while anything is down."""
    found = readiness_of(here.reader.figures())
    return answered(Ready(severity=found.severity, failed=found.failed), status=found.code)


@router.get("/metrics", response_class=Response)
def metrics(here: Here) -> Response:
    """Answer the metrics of the system for Prometheus. Worker processes count; this one has nothing to add."""
    return Response(exposition(here.reader.figures(), {}), media_type=CONTENT_TYPE)
