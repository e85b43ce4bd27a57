"""Changes of an account, each with a form, a preview of before and after, a reason, and a confirmation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, Literal, NamedTuple
from urllib.parse import urlencode

from loguru import logger
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from config.catalogue import CatalogueError
from config.log import name_in_logs
from worker.accounts.blocking import Accounts, SharingAccounts
from worker.admin.change import MAX_CAUSE
from worker.errors import AccountError, ReportError
from worker.reports.holds import open_holds
from worker.rules.account import ChangeAnswer
from worker.rules.api_keys import Right
from worker.rules.grants import CATEGORIES
from worker.rules.limits import PERS
from worker.rules.waterfall import STATUSES
from worker.service.console.previews import Check, Overtaken, Previewed, Row, as_seen, digest_of, look, rows_of
from worker.service.console.render import link, page
from worker.service.console.visit import Console, Visit

_HOLDS = 1_000
_is_number = re.compile(r"[0-9]{1,3}(?:[, ][0-9]{3})+|[0-9]{1,16}", re.ASCII).fullmatch

Values = Mapping[str, Any]
Options = Callable[[Console, str], Sequence[str]]


class Field(NamedTuple):
    """One field of a form. `key`: made once for each form, so that a repeat of it is harmless."""

    name: str
    label: str
    kind: Literal["text", "units", "when", "choice", "key"] = "text"
    is_required: bool = True
    options: Options | None = None
    hint: str = ""


class Outcome(NamedTuple):
    """What a change did: counts of units, and flags, both by name."""

    counts: Mapping[str, int]
    flags: tuple[str, ...] = ()


class Action(NamedTuple):
    """A change. `work` makes it, unless the check raises; a change that leaves nothing to do asks no check.

    One that `is_general` is offered for the account; the others for one of its events or holds.
    """

    name: str
    title: str
    right: Right
    fields: tuple[Field, ...]
    work: Callable[[Console, str, Values, Check], Outcome]
    hint: str = ""
    is_general: bool = True


# ---------------------------------------------------------------------------------------------------------------------
# What each change does


def _changing(call: Callable[[Accounts, str, Values], ChangeAnswer]) -> Callable[..., Outcome]:
    """Return the work of a change that `Accounts` makes."""

    def work(console: Console, user_id: str, values: Values, check: Check) -> Outcome:
        before = console.accounts.show(user_id)
        connections = console.connections.reviewed(lambda changes: check(rows_of(before, changes)))
        answer = call(SharingAccounts(connections), user_id, values)
        counts = {name: getattr(answer, name) for name in ("taken", "debt", "gone", "forgiven", "owes", "missing")}
        flags = [name for name in ("repeated", "stale") if getattr(answer, name)]
        if answer.waits_for_events or answer.waits_until is not None:
            flags.append("waits")
        return Outcome({name: units for name, units in counts.items() if units}, tuple(flags))

    return work


def _cause(values: Values) -> dict[str, Any]:
    return {"actor": values["actor"], "reason": values["reason"]}


def _grant(accounts: Accounts, user_id: str, values: Values) -> ChangeAnswer:
    return accounts.grant(
        user_id, values["meter"], values["amount"], values["order"], category=values["category"],
        expires_at=values["expires_at"], **_cause(values),
    )  # fmt: skip


def _claw_back(accounts: Accounts, user_id: str, values: Values) -> ChangeAnswer:
    return accounts.claw_back(
        user_id, values["meter"], values["amount"], values["key"], order=values["order"], **_cause(values)
    )


def _reverse(accounts: Accounts, user_id: str, values: Values) -> ChangeAnswer:
    return accounts.reverse(user_id, values["event_id"], **_cause(values))


def _set_status(accounts: Accounts, user_id: str, values: Values) -> ChangeAnswer:
    return accounts.set_status(user_id, values["status"], at=values["at"], **_cause(values))


def _change_plan(accounts: Accounts, user_id: str, values: Values) -> ChangeAnswer:
    return accounts.change_plan(user_id, values["plan"], at=values["at"], **_cause(values))


def _set_limit(accounts: Accounts, user_id: str, values: Values) -> ChangeAnswer:
    return accounts.set_limit(
        user_id, values["meter"], values["per"], values["amount"], values["key"], **_cause(values)
    )


def _forgive_debt(accounts: Accounts, user_id: str, values: Values) -> ChangeAnswer:
    return accounts.forgive_debt(user_id, values["meter"], values["amount"], key=values["key"], **_cause(values))


def _release_hold(console: Console, user_id: str, values: Values, check: Check) -> Outcome:
    """Release a hold. Redis keeps no author of it: the log does."""
    meter, key = values["meter"], values["hold"]
    with console.connections.lend() as resources:
        found = [each for each in open_holds(resources, user_id, _HOLDS) if (each.meter, each.key) == (meter, key)]
    if not found:
        return Outcome({}, ("unknown",))
    check([Row(meter, f"hold {key}", f"{found[0].left:,}", "0")])
    state = console.billing.release(user_id, meter, key).state
    named = name_in_logs(user_id, console.settings.log_user_ids)
    logger.info("{} released a hold of {} on {}: {}", values["actor"], named, meter, state)
    return Outcome({}, ("unknown",) if state == "unknown" else ())


# ---------------------------------------------------------------------------------------------------------------------
# The forms


def _meters(console: Console, user_id: str) -> Sequence[str]:
    return sorted(console.accounts.show(user_id).balances)


def _spilling(console: Console, user_id: str) -> Sequence[str]:
    with console.connections.lend() as resources:
        spills = resources.catalogue.spills
    return [meter for meter in _meters(console, user_id) if spills.get(meter)]


def _plans(console: Console, _user_id: str) -> Sequence[str]:
    with console.connections.lend() as resources:
        return list(resources.catalogue.plans)


def _orders(console: Console, user_id: str) -> Sequence[str]:
    found = {each.order: None for each in console.accounts.credits(user_id).grants if each.order is not None}
    return list(found)


def _of(*options: str) -> Options:
    return lambda _console, _user_id: options


_METER = Field("meter", "Meter", "choice", options=_spilling)
_AT = Field("at", "When", "choice", options=_of("now", "period_end"), hint="period_end: with the next period")
_KEY = Field("key", "", "key")

ACTIONS = (
    Action(
        "grant", "Grant units", Right.GRANT,
        (
            _METER,
            Field("amount", "Units", "units"),
            Field("order", "Order", "key", hint="the paid order or invoice; used once in all accounts"),
            Field("category", "Category", "choice", options=_of(*CATEGORIES)),
            Field("expires_at", "End (UTC)", "when", is_required=False, hint="empty: it never ends"),
        ),
        _changing(_grant),
    ),
    Action(
        "claw-back", "Claw back an order", Right.CLAW_BACK,
        (Field("order", "Order", "choice", options=_orders), _METER, Field("amount", "Units", "units"), _KEY),
        _changing(_claw_back), "Units that are spent already become debt.",
    ),
    Action(
        "set-status", "Set status", Right.SET_STATUS,
        (Field("status", "Status", "choice", options=_of(*STATUSES)), _AT),
        _changing(_set_status), "Later only an end: canceled or expired.",
    ),
    Action(
        "set-limit", "Set a limit", Right.SET_LIMIT,
        (
            Field("meter", "Meter", "choice", options=_meters),
            Field("per", "Per", "choice", options=_of(*PERS)),
            Field("amount", "Units", "units", is_required=False, hint="empty: take the limit away"),
            _KEY,
        ),
        _changing(_set_limit), "Checks are bounded; events are recorded all the same.",
    ),
    Action(
        "change-plan", "Change plan", Right.CHANGE_PLAN,
        (Field("plan", "Plan", "choice", options=_plans), _AT),
        _changing(_change_plan), "The current plan withdraws a change that is scheduled.",
    ),
    Action(
        "forgive-debt", "Forgive debt", Right.FORGIVE_DEBT,
        (_METER, Field("amount", "Units", "units", is_required=False, hint="empty: all of it"), _KEY),
        _changing(_forgive_debt),
    ),
    Action(
        "reverse", "Reverse an event", Right.REVERSE,
        (Field("event_id", "Event"),),
        _changing(_reverse), "Its units go back into the buckets that paid.", is_general=False,
    ),
    Action(
        "release-hold", "Release a hold", Right.RELEASE_HOLD,
        (Field("meter", "Meter", "choice", options=_meters), Field("hold", "Hold")),
        _release_hold, "Work that goes on under it is recorded all the same.", is_general=False,
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The page


class _Mistake(Exception):
    """A form with a field that cannot be read."""


def page_of(action: Action) -> Callable[[Visit], Response]:
    """Return the page of a change: the form, its preview, and the change itself."""

    def make(visit: Visit) -> Response:
        user_id = visit.query.get("user_id", "").strip()
        if not user_id:
            raise HTTPException(422, "user_id: missing")
        if not visit.form:
            return _form(visit, action, user_id, _first_texts(action, visit.query))
        texts = {each.name: visit.form.get(each.name, "").strip() for each in action.fields}
        texts["reason"] = visit.form.get("reason", "").strip()
        step = visit.form.get("step")
        if step not in {"preview", "confirm"}:
            return _form(visit, action, user_id, texts)
        try:
            return _answered(visit, action, user_id, texts, is_confirmed=step == "confirm")
        except (_Mistake, AccountError, ReportError, CatalogueError) as error:
            return _form(visit, action, user_id, texts, str(error))

    return make


def _answered(visit: Visit, action: Action, user_id: str, texts: Mapping[str, str], *, is_confirmed: bool) -> Response:
    """Preview a change, or make it if the person saw what it does. Raises _Mistake, and the errors of the change."""
    values = {each.name: _value(each, texts[each.name]) for each in action.fields}
    values |= {"actor": visit.key.name, "reason": _reason(texts["reason"])}
    check = as_seen(visit.form.get("seen", "")) if is_confirmed else look
    try:
        outcome = action.work(visit.console, user_id, values, check)
    except Previewed as found:
        return page(
            visit, "preview.html", action=action, user_id=user_id, texts=texts, rows=found.rows,
            seen=digest_of(found.rows), has_moved=isinstance(found, Overtaken), status=409 if is_confirmed else 200,
        )  # fmt: skip
    query = {"user_id": user_id, "done": action.name, **outcome.counts, **dict.fromkeys(outcome.flags, 1)}
    return RedirectResponse(f"{link('account')}?{urlencode(query)}", 303)


def _form(visit: Visit, action: Action, user_id: str, texts: Mapping[str, str], mistake: str | None = None) -> Response:
    options = {
        each.name: each.options(visit.console, user_id) for each in action.fields if each.options is not None
    }  # fmt: skip
    return page(
        visit, "action.html", 200 if mistake is None else 422, action=action, user_id=user_id, texts=texts,
        options=options, mistake=mistake, longest=MAX_CAUSE,
    )  # fmt: skip


def _first_texts(action: Action, query: Mapping[str, str]) -> dict[str, str]:
    """Return what a new form says: what its link says, and new keys."""
    texts = {each.name: query.get(each.name, "") for each in action.fields}
    texts |= {each.name: f"console-{token_hex(8)}" for each in action.fields if each.kind == "key"}
    return texts | {"reason": ""}


def _value(field: Field, text: str) -> Any:
    """Return the value of a field. Raises _Mistake that names it."""
    if not text:
        if field.is_required:
            raise _Mistake(f"{field.name}: missing")
        return None
    if field.kind == "units":
        if not _is_number(text):
            raise _Mistake(f"{field.name}: must be a whole number of units (got {text[:64]!r})")
        return int(text.replace(",", "").replace(" ", ""))
    if field.kind == "when":
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise _Mistake(f"{field.name}: must be a date and a time (got {text[:64]!r})") from None
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return text


def _reason(text: str) -> str:
    if not (1 <= len(text) <= MAX_CAUSE and text.isprintable()):
        raise _Mistake(f"reason: must be 1 to {MAX_CAUSE} printable characters; it is kept with the change")
    return text
