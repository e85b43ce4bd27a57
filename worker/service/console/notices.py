"""Notices, where they are sent, and what became of them; a test of a webhook, and deliveries sent again."""

from __future__ import annotations

from loguru import logger
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from schemas.notices import KINDS
from worker.admin import notices, webhooks
from worker.resources import Resources
from worker.rules.api_keys import Right
from worker.service.console.render import link, page
from worker.service.console.visit import Visit

_LATEST = 50
_GIVEN_UP = 50


def listed(visit: Visit) -> Response:
    """List the notices that were told last, of a kind or of an account."""
    kind, user_id = visit.asked("kind"), visit.asked("user")
    with visit.console.connections.lend() as resources:
        found = notices.latest(resources, limit=_LATEST, kinds=None if kind is None else [kind], user_id=user_id)
    return page(visit, "notices.html", found=found, kinds=KINDS, kind=kind, user=user_id, most=_LATEST)


def notice(visit: Visit) -> Response:
    """Show a notice as receivers get it; to operators also what became of it at each webhook."""
    notice_id = visit.asked("id")
    if notice_id is None:
        raise HTTPException(422, "id: missing")
    with visit.console.connections.lend() as resources:
        found, deliveries = notices.show(resources, notice_id)
    body = notices.notice_of(found).model_dump_json(exclude_none=True, indent=2)
    if not visit.may(Right.MANAGE_WEBHOOKS):
        deliveries = []
    return page(visit, "notice.html", found=found, body=body, deliveries=deliveries)


def of_webhooks(visit: Visit) -> Response:
    """List webhooks, and deliveries that were given up; a form has them sent again, or tests a webhook.

    Sending again is harmless to repeat: what waits already is left alone. A receiver knows a repeat by its id.
    """
    with visit.console.connections.lend() as resources:
        if visit.form:
            return _sent(visit, resources)
        backlog, found = webhooks.backlog(resources), webhooks.listed(resources)
        given_up = notices.dead(resources, _GIVEN_UP)
    again = visit.query.get("again", "")
    return page(
        visit, "webhooks.html", found=found, given_up=given_up, backlog=backlog,
        again=int(again) if again.isdecimal() and len(again) < 10 else None,
    )  # fmt: skip


def _sent(visit: Visit, resources: Resources) -> Response:
    """Do what a form asks: have a test sent, or deliveries once more."""
    webhook_id, notice_id = (visit.form.get(name, "").strip() or None for name in ("webhook", "notice"))
    if visit.form.get("do") == "test":
        sent = webhooks.send_test(resources, webhook_id or "")
        logger.info("{} tests webhook {}", visit.key.name, webhook_id)
        return RedirectResponse(link("notice", id=sent), 303)
    if visit.form.get("do") != "replay":
        raise HTTPException(422, "do: must be test or replay")
    again = notices.replay(resources, notice_id, webhook_id)
    logger.info("{} has {} deliveries sent again", visit.key.name, again)
    return RedirectResponse(link("webhooks", again=again), 303)
