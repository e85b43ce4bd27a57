"""The catalogue in force, the differences of a file, and what events of the last days would have paid under it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.responses import Response

from config.catalogue import Catalogue, CatalogueError, parse_with_settings
from schemas.simulation import SimulationReport
from worker.admin import catalogues
from worker.admin.catalogue_diff import Difference, differences
from worker.admin.catalogues import CatalogueInUse
from worker.errors import ReportError
from worker.reports.simulation import Chosen, buckets_of, simulate
from worker.resources import Resources
from worker.service.console.render import page
from worker.service.console.visit import Visit, whole_number

_VERSIONS = 20
_DIFFERENCES = 200
# What answers within the time of a request.
_MAX_DAYS = 92
_MAX_SAMPLE = 1_000
_DAYS = 30
_SAMPLE = 100
_TOP = 20


class _Question(NamedTuple):
    """What a person wants to know of a file: one account, or a sample, over the last `days`."""

    days: int
    sample: int
    user_id: str | None
    old: str | None
    new: str | None


class _Tried(NamedTuple):
    """What a file would change, why it could not be applied, and what events would have paid."""

    catalogue: Catalogue
    refused: str | None
    differences: list[Difference]
    more: int
    report: SimulationReport | None
    mistake: str | None


def catalogue(visit: Visit) -> Response:
    """Show the catalogues that are and were in force; try an uploaded one. Nothing is written."""
    question = _question_of(visit)
    tried, mistake = None, None
    with visit.console.connections.lend() as resources:
        resources.take_up_catalogues()
        if visit.form:
            try:
                tried = _try(resources, visit.form.get("file", ""), question)
            except CatalogueError as error:
                mistake = str(error)
        versions = catalogues.history(resources)
        in_force, to_come = resources.catalogue, resources.in_force.timeline.to_come(datetime.now(UTC))
    shown = list(reversed(versions))[:_VERSIONS]
    return page(
        visit, "catalogue.html", 200 if mistake is None else 422, versions=shown, older=len(versions) - len(shown),
        in_force=in_force, to_come={each.fingerprint for each in to_come}, tried=tried, mistake=mistake,
        asked=question, max_days=_MAX_DAYS, max_sample=_MAX_SAMPLE, buckets_of=buckets_of,
    )  # fmt: skip


def _question_of(visit: Visit) -> _Question:
    def number(name: str, default: int, most: int) -> int:
        return whole_number(name, visit.form.get(name, "").strip().replace(",", "") or str(default), most)

    user_id, old, new = (visit.form.get(name, "").strip() or None for name in ("user", "old", "new"))
    if (old is None) != (new is None):
        raise HTTPException(422, "new: name both plans, or neither")
    return _Question(number("days", _DAYS, _MAX_DAYS), number("sample", _SAMPLE, _MAX_SAMPLE), user_id, old, new)


def _try(resources: Resources, text: str, question: _Question) -> _Tried:
    """Return what a file would change. Raises CatalogueError if it is none."""
    found = parse_with_settings(text, "file", resources.settings)
    refused, report, mistake = None, None, None
    try:
        catalogues.require_applicable(resources, found)
    except CatalogueInUse as error:
        refused = str(error)
    differing = differences(resources, found)
    chosen = Chosen(user_id=question.user_id) if question.user_id else Chosen(sample=question.sample)
    plans = {question.old: question.new} if question.old and question.new else {}
    since = datetime.now(UTC) - timedelta(days=question.days)
    try:
        report = simulate(resources, found, since, plans=plans, chosen=chosen, most_changed=_TOP)
    except ReportError as error:
        mistake = str(error)
    more = max(0, len(differing) - _DIFFERENCES)
    return _Tried(found, refused, differing[:_DIFFERENCES], more, report, mistake)
