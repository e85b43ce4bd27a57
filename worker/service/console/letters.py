"""Dead letters: in groups with their remedy, one with its payload, and replayed or dropped with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from loguru import logger
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from config.log import described
from worker.admin import dead_letters
from worker.admin.change import MAX_CAUSE, cause_of
from worker.admin.dead_letters import DeadLetterError
from worker.errors import AccountError
from worker.ledger.dead_letters import Wanted
from worker.resources import Resources
from worker.rules.remedies import remedy_of
from worker.service.console.render import link, page
from worker.service.console.visit import Visit

_PAGE = 25
# As many as fit into the time of a request; the page says how many are left.
_AT_ONCE = 200
_STATES = ("open", "replayed", "dropped")
_OUTCOMES = ("replayed", "dropped", "refused")
_WAYS = ("replay", "drop")


class _Chosen(NamedTuple):
    """The letters that a person is about to resolve: `ids` of now, out of `total` up to `last`."""

    way: str
    reason: str | None
    letter_id: int | None
    last: int
    ids: tuple[int, ...]
    total: int


def listed(visit: Visit) -> Response:
    """List dead letters that meet the filters, and count them by reason."""
    state = visit.asked("state") or "open"
    if state not in _STATES:
        raise HTTPException(422, f"state: must be one of {', '.join(_STATES)} (got {state[:64]!r})")
    wanted = Wanted(state, visit.asked("reason"), None, None, visit.asked("user"), visit.asked("source"))
    with visit.console.connections.lend() as resources:
        groups = dead_letters.summary(resources, wanted)
        found = dead_letters.page(resources, wanted, after=visit.asked_number("after") or 0, limit=_PAGE)
    return page(
        visit, "dead_letters.html", wanted=wanted, groups=groups, remedy_of=remedy_of, found=found, states=_STATES,
        more_after=found.letters[-1].id if len(found.letters) == _PAGE else None,
        done=[(name, int(text)) for name in _OUTCOMES if (text := visit.query.get(name, "")).isdecimal()],
        mistake=visit.asked_number("mistake_of"),
    )  # fmt: skip


def letter(visit: Visit) -> Response:
    """Show one dead letter with its payload."""
    letter_id = visit.asked_number("id")
    if letter_id is None:
        raise HTTPException(422, "id: missing")
    with visit.console.connections.lend() as resources:
        found = dead_letters.show(resources, letter_id)
    payload = found.payload.decode("utf-8", "backslashreplace")
    return page(visit, "dead_letter.html", letter=found, payload=payload, remedy=remedy_of(found.reason))


def resolve(visit: Visit) -> Response:
    """Ask why, and say how many; then replay or drop them. Letters that came since are left alone.

    Each letter is resolved by itself: killed in between, those before it are done and the others are open.
    """
    with visit.console.connections.lend() as resources:
        chosen = _chosen(resources, {**visit.query, **visit.form})
        if not visit.form:
            return page(visit, "resolve.html", chosen=chosen, mistake=None, why="", longest=MAX_CAUSE)
        why = visit.form.get("why", "").strip()
        try:
            cause = cause_of(visit.key.name, why)
        except AccountError as error:
            return page(
                visit, "resolve.html", 422, chosen=chosen, mistake=str(error).replace("reason:", "why:", 1), why=why,
                longest=MAX_CAUSE,
            )  # fmt: skip
        done, refused, first = 0, 0, None
        for each in chosen.ids:
            try:
                if chosen.way == "replay":
                    vouch = visit.form.get("vouch") == "1"
                    dead_letters.replay(resources, each, vouch=vouch, cause=cause, letters=len(chosen.ids))
                else:
                    dead_letters.drop(resources, each, cause=cause, letters=len(chosen.ids))
                done += 1
            except DeadLetterError as error:
                refused, first = refused + 1, first or each
                logger.info("dead letter {} stays as it is: {}", each, described(error))
    name = "replayed" if chosen.way == "replay" else "dropped"
    return RedirectResponse(link("dead-letters", **{name: done}, refused=refused or None, mistake_of=first), 303)


def _chosen(resources: Resources, asked: Mapping[str, str]) -> _Chosen:
    """Return the letters that a link or a form is about. Raises HTTPException, DeadLetterError."""
    way, reason = asked.get("do", ""), asked.get("reason", "").strip() or None
    if way not in _WAYS:
        raise HTTPException(422, f"do: must be one of {', '.join(_WAYS)} (got {way[:64]!r})")
    numbers = {}
    for name in ("id", "last"):
        text = asked.get(name, "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 19):
            raise HTTPException(422, f"{name}: must be a whole number (got {text[:64]!r})")
        numbers[name] = int(text) if text else None
    letter_id, last = numbers["id"], numbers["last"]
    if (letter_id is None) == (reason is None):
        raise HTTPException(422, "reason: name a reason, or the id of one letter")
    if letter_id is not None:
        dead_letters.show(resources, letter_id)
        return _Chosen(way, None, letter_id, letter_id, (letter_id,), 1)
    assert reason is not None
    ids = [each for each in dead_letters.open_ids(resources, reason) if last is None or each <= last]
    return _Chosen(way, reason, None, last or max(ids, default=0), tuple(ids[:_AT_ONCE]), len(ids))
