"""The search for accounts, one account, and one event of it."""

from __future__ import annotations

import re

from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from schemas.reports import Change, FoundAccounts
from worker.errors import RedisUnavailable
from worker.reports.holds import OpenHold, open_holds
from worker.service.console.actions import ACTIONS
from worker.service.console.pictures import waterfall
from worker.service.console.render import link, page
from worker.service.console.visit import Console, Visit

_PAGE = 25
_HOLDS = 50
_LISTED = 100
_is_name_in_logs = re.compile(r"user:[0-9a-f]{12}").fullmatch
_is_hash = re.compile(r"[0-9a-f]{12}").fullmatch
# What an outcome of a change may say on the page of its account.
_COUNTS = ("taken", "debt", "gone", "forgiven", "owes", "missing")
_FLAGS = ("repeated", "stale", "waits", "unknown")


def search(visit: Visit) -> Response:
    """Search by id, its beginning, or the name in logs; or list accounts near a limit or in debt."""
    shown = visit.asked("show")
    if shown == "near-limit":
        return page(visit, "near_limit.html", found=visit.console.accounts.report_near_limit(limit=_LISTED))
    if shown == "debtors":
        return page(visit, "debtors.html", found=visit.console.accounts.report_debtors(limit=_LISTED))
    wanted, after = visit.asked("q"), visit.asked("after")
    found = _found(visit, wanted, after)
    if wanted is not None and after is None and found.total == 1 and found.accounts[0].user_id == wanted:
        return RedirectResponse(link("account", user_id=wanted), 303)
    return page(visit, "accounts.html", wanted=wanted, found=found)


def _found(visit: Visit, wanted: str | None, after: str | None) -> FoundAccounts:
    accounts = visit.console.accounts
    if wanted is not None and _is_name_in_logs(wanted):
        return accounts.find(log_name=wanted, after=after, limit=_PAGE)
    found = accounts.find(prefix=wanted, after=after, limit=_PAGE)
    if not found.total and wanted is not None and _is_hash(wanted):
        return accounts.find(log_name=wanted, after=after, limit=_PAGE)
    return found


def account(visit: Visit) -> Response:
    """Show an account: the waterfall of each meter, limits, grants, holds, the timeline, and events."""
    user_id = _user(visit)
    accounts = visit.console.accounts
    usage, credits = accounts.usage(user_id), accounts.credits(user_id)
    by_meter = {
        each.meter: waterfall(each, [grant for grant in credits.grants if grant.meter == each.meter])
        for each in usage.meters
        if each.wallet is None
    }
    return page(
        visit,
        "account.html",
        usage=usage,
        bars=by_meter,
        grants=credits.grants,
        limits=accounts.limits(user_id).limits,
        holds=_holds(visit.console, user_id),
        timeline=accounts.timeline(user_id, limit=_PAGE, before_seq=visit.asked_number("changes_before")),
        events=accounts.events(user_id, limit=_PAGE, before_seq=visit.asked_number("events_before")),
        moved=_moved,
        actions=[each for each in ACTIONS if each.is_general and visit.may(each.right)],
        done=next((each for each in ACTIONS if each.name == visit.asked("done")), None),
        counts={name: int(text) for name in _COUNTS if (text := visit.query.get(name, "")).isdecimal()},
        flags=[name for name in _FLAGS if visit.query.get(name) == "1"],
    )


def event(visit: Visit) -> Response:
    """Explain one event: which bucket paid how much, and why."""
    user_id, event_id = _user(visit), visit.asked("event_id")
    if event_id is None:
        raise HTTPException(422, "event_id: missing")
    return page(visit, "event.html", told=visit.console.accounts.explain(user_id, event_id))


def _user(visit: Visit) -> str:
    user_id = visit.asked("user_id")
    if user_id is None:
        raise HTTPException(422, "user_id: missing")
    return user_id


def _holds(console: Console, user_id: str) -> list[OpenHold] | None:
    """Return the open holds of an account, None if Redis does not answer: the rest of the page can be shown."""
    try:
        with console.connections.lend() as resources:
            return open_holds(resources, user_id, _HOLDS)
    except RedisUnavailable:
        return None


def _moved(change: Change) -> list[tuple[str, int]]:
    """Return what a change of the timeline moved, by bucket."""
    if change.parts is not None:
        return [(name, units) for name, units in change.parts.model_dump().items() if units]
    if change.changes is not None:
        return [(name, units) for name, units in change.changes.model_dump().items() if units]
    return []
