"""The result of the last proof of all balances, and a form that begins another one."""

from __future__ import annotations

from starlette.responses import RedirectResponse, Response

from worker.reports.proof_result import read_result
from worker.rules.api_keys import Right
from worker.service.console.render import link, page
from worker.service.console.visit import Visit

_REFRESH_SECONDS = 2


def proof(visit: Visit) -> Response:
    """Show the result of the last proof, and the one under way; the form of an operator begins one."""
    prover = visit.console.prover
    if visit.form:
        visit.require(Right.OPERATE)
        prover.start(visit.key.name)
        return RedirectResponse(link("proof"), 303)
    with visit.console.connections.lend() as resources:
        found = read_result(resources.redis)
    response = page(visit, "proof.html", found=found, running=prover.running)
    if prover.running is not None and not prover.running.is_over:
        response.headers["refresh"] = str(_REFRESH_SECONDS)
    return response
