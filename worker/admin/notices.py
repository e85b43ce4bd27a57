"""What was told: lists, the feed by cursor, and dead deliveries that are sent again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import ValidationError

from config.catalogue import NoticeRule
from schemas.events import ID_PATTERN
from schemas.notices import KINDS, FeedNotice, Kind, Notice, NoticeData, NoticeFeed, TopUp
from worker.admin.change import answer, cause_of, commit, locked, require_meter
from worker.errors import AccountError
from worker.ledger import notices, webhooks
from worker.ledger.connection import batch_connection
from worker.ledger.notices import StoredNotice
from worker.ledger.webhooks import Delivery
from worker.resources import Resources
from worker.rules.account import ChangeAnswer
from worker.rules.lifecycle import account_step

MAX_PAGE = 1_000
_is_identifier = re.compile(ID_PATTERN).fullmatch


def notice_of(stored: StoredNotice) -> Notice:
    """Return a notice as receivers read it."""
    return Notice(type=cast("Kind", stored.kind), timestamp=stored.told_at, data=_data_of(stored))


def _data_of(stored: StoredNotice) -> NoticeData:
    facts: dict[str, Any] = dict(stored.data)
    suggested = facts.pop("suggested", None)
    return NoticeData(
        notice_id=stored.notice_id,
        rule=stored.rule,
        period=stored.period,
        times=stored.times,
        user_id=stored.user_id or None,
        meter=stored.meter or None,
        top_up=None if suggested is None else TopUp(amount=suggested, key=f"top-up:{stored.notice_id}"),
        **facts,
    )


def feed(
    resources: Resources,
    *,
    after: int = 0,
    limit: int = 100,
    kinds: Sequence[str] | None = None,
    user_id: str | None = None,
) -> NoticeFeed:
    """Return the notices after the cursor `after`, in the order in which they were told, at most `limit`.

    `cursor` of the answer is where the next page begins; it stays as it is if nothing was told since. No notice comes
    before a cursor that was given out. Reading changes nothing, so a reader that died begins at its last cursor again.
    Raises AccountError for a cursor, a limit, a kind or a user id that cannot be.
    """
    _require(after, limit, kinds, user_id)
    with batch_connection(resources.engine) as postgres:
        while notices.put_in_line(postgres) >= notices.LINE_ROWS:
            postgres.commit()
        postgres.commit()
        found = notices.read_feed(postgres, after, limit, kinds, user_id)
    page = tuple(
        FeedNotice(cursor=each.position or 0, **dict(notice_of(each)))  # read by its place, so it has one
        for each in found
    )
    return NoticeFeed(notices=page, cursor=page[-1].cursor if page else after)


def parse_rules(texts: Sequence[str]) -> list[dict[str, object]] | None:
    """Return the rules of a command: KIND or KIND:name=value,…; None for `plan`, an empty list for `none`.

    Raises AccountError for a text that is no rule.
    """
    if list(texts) == ["plan"]:
        return None
    if list(texts) == ["none"]:
        return []
    parsed: list[dict[str, object]] = []
    for text in texts:
        kind, _, rest = text.partition(":")
        pairs = [pair.partition("=") for pair in rest.split(",") if pair]
        if not all(value for _, _, value in pairs):
            raise AccountError(f"rules: {text[:64]!r} must be KIND or KIND:name=value,name=value")
        values = {name: int(value) if value.isdecimal() else value for name, _, value in pairs}
        parsed.append({**values, "kind": kind})
    return parsed


def set_rules(
    resources: Resources,
    user_id: str,
    rules: Sequence[Mapping[str, object]] | None,
    *,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Give the account rules of its own for what it is told; None: those of its plan, an empty list: nothing.

    They count for changes from now on. Repeating is harmless.
    Raises AccountError for an unknown account, and for a rule that the catalogue would not take.
    """
    cause = cause_of(actor, reason)
    if rules is not None and not isinstance(rules, list | tuple):
        raise AccountError(f"rules: must be a list of rules, or None (got {str(rules)[:64]!r})")
    wanted = None if rules is None else tuple(_rule(resources, number, rule) for number, rule in enumerate(rules))
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current = account.current
        if current.notices == wanted:
            return answer(resources, current, now, repeated=True)
        current = current._replace(notices=wanted)
        said = None if wanted is None else [rule.as_json() for rule in wanted]
        step = account_step("set_notices", f"notices:{now.isoformat()}", {"notices": said})
        return commit(resources, postgres, now, account.then(current, step))


def _rule(resources: Resources, number: int, rule: Mapping[str, object]) -> NoticeRule:
    try:
        found = NoticeRule.model_validate(dict(rule) if isinstance(rule, Mapping) else rule)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f".{part}" for part in first["loc"])
        raise AccountError(f"rules.{number}{where}: {first['msg'].removeprefix('Value error, ')}") from None
    if found.meter is not None:
        require_meter(resources, found.meter)
    return found


def latest(
    resources: Resources, *, limit: int = 50, kinds: Sequence[str] | None = None, user_id: str | None = None
) -> list[StoredNotice]:
    """Return the notices that were told last, newest first. Raises AccountError as `feed` does."""
    _require(0, limit, kinds, user_id)
    with batch_connection(resources.engine) as postgres:
        return notices.read_latest(postgres, limit, kinds, user_id)


def dead(resources: Resources, limit: int = 50) -> list[Delivery]:
    """Return deliveries that were given up, the oldest first."""
    with batch_connection(resources.engine) as postgres:
        return webhooks.read_dead(postgres, limit)


def show(resources: Resources, notice_id: str) -> tuple[StoredNotice, list[Delivery]]:
    """Return a notice, and what became of it at each webhook. Raises AccountError if there is none."""
    with batch_connection(resources.engine) as postgres:
        found = notices.read_notice(postgres, notice_id)
        if found is None:
            raise AccountError(f"notice: no notice {notice_id[:64]!r}")
        return found, webhooks.read_deliveries(postgres, notice_id)


def replay(resources: Resources, notice_id: str | None = None, webhook_id: str | None = None) -> int:
    """Have deliveries that were given up sent again: of a notice, of a webhook, or all; return their number.

    Repeating is harmless: what waits already is left alone.
    """
    with batch_connection(resources.engine) as postgres:
        found = webhooks.replay(postgres, notice_id, webhook_id)
        postgres.commit()
    return found


def require_kinds(kinds: Sequence[str] | None) -> None:
    """Raise AccountError for a kind that does not exist."""
    for kind in kinds or ():
        if kind not in KINDS:
            raise AccountError(f"kinds: unknown {str(kind)[:64]!r}; there are {', '.join(KINDS)}")


def _require(after: int, limit: int, kinds: Sequence[str] | None, user_id: str | None) -> None:
    if isinstance(after, bool) or not isinstance(after, int) or not 0 <= after < 2**63:
        raise AccountError(f"after: must be 0 or the cursor of a page before (got {str(after)[:64]!r})")
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_PAGE:
        raise AccountError(f"limit: must be from 1 to {MAX_PAGE} (got {str(limit)[:64]!r})")
    if kinds is not None and not isinstance(kinds, list | tuple):
        raise AccountError(f"kinds: must be a list of kinds, or None (got {str(kinds)[:64]!r})")
    require_kinds(kinds)
    if user_id is not None and not (isinstance(user_id, str) and _is_identifier(user_id)):
        raise AccountError(f"user_id: no id of a user (got {str(user_id)[:64]!r})")
