"""Webhooks: where notices are sent, and the secrets that sign them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from secrets import token_bytes, token_hex
from typing import NamedTuple

from worker.admin.notices import require_kinds
from worker.admin.posting import target_of
from worker.errors import AccountError
from worker.ledger import notices, webhooks
from worker.ledger.connection import batch_connection, read_clock
from worker.ledger.webhooks import Backlog, Delivery, Webhook
from worker.resources import Resources
from worker.rules.entry_times import END_OF_TIME
from worker.rules.rows import Notice

# As Standard Webhooks wants it: 24 to 64 bytes.
_SECRET_BYTES = 32
MAX_WEBHOOKS = 100


class Added(NamedTuple):
    """A webhook, and its new secret: nothing shows it again."""

    webhook_id: str
    secret: str


def add(resources: Resources, url: str, *, kinds: Sequence[str] | None = None, by: str | None = None) -> Added:
    """Add a webhook at `url`, for these kinds of notice or for all. It gets what is told from now on.

    Raises AccountError for an unknown kind, and where there are `MAX_WEBHOOKS` already; BadInput for a URL that is not
    https, or leads to a private address.
    """
    require_kinds(kinds)
    target_of(url, allows_private=resources.settings.webhook_private_addresses)
    added = Added(f"wh_{token_hex(6)}", _new_secret())
    with batch_connection(resources.engine) as postgres:
        notices.lock_line(postgres)
        if len(webhooks.read_webhooks(postgres)) >= MAX_WEBHOOKS:
            raise AccountError(f"url: there are {MAX_WEBHOOKS} webhooks already; remove one")
        webhooks.insert_webhook(postgres, added.webhook_id, url, list(kinds) if kinds else None, added.secret, by)
        postgres.commit()
    return added


def listed(resources: Resources) -> list[Webhook]:
    """Return all webhooks, the oldest first, without their secrets."""
    with batch_connection(resources.engine) as postgres:
        return webhooks.read_webhooks(postgres)


def backlog(resources: Resources) -> Backlog:
    """Return what waits at all webhooks."""
    with batch_connection(resources.engine) as postgres:
        return webhooks.read_backlog(postgres)


def remove(resources: Resources, webhook_id: str) -> None:
    """Delete a webhook, its secrets, and what was to be sent to it. Raises AccountError if there is none."""
    with batch_connection(resources.engine) as postgres:
        if not webhooks.delete_webhook(postgres, webhook_id):
            raise _unknown(webhook_id)
        postgres.commit()


def rotate(resources: Resources, webhook_id: str, overlap_hours: float = 24) -> Added:
    """Give a webhook a new secret; the old ones sign beside it for `overlap_hours`.

    Raises AccountError for an unknown webhook, and for hours outside 0 to 720.
    """
    if not 0 <= overlap_hours <= 720:
        raise AccountError(f"overlap_hours: must be from 0 to 720 (got {overlap_hours})")
    added = Added(webhook_id, _new_secret())
    with batch_connection(resources.engine) as postgres:
        _require(webhooks.read_webhooks(postgres), webhook_id)
        webhooks.end_secrets(postgres, webhook_id, overlap_hours)
        webhooks.insert_secret(postgres, webhook_id, added.secret)
        postgres.commit()
    return added


def send_test(resources: Resources, webhook_id: str) -> str:
    """Have a notice of kind `webhook.test` sent to one webhook; return its id. A dyno sends it, as all others.

    Raises AccountError for an unknown webhook.
    """
    with batch_connection(resources.engine) as postgres:
        _require(webhooks.read_webhooks(postgres), webhook_id)
        period = f"{webhook_id}:{token_hex(6)}"
        # Never due: it gets no place in the feed, and no other webhook gets it.
        facts = {"text": "a test of this webhook"}
        kind, now = "webhook.test", read_clock(postgres)
        notice = Notice("", "", kind, kind, period, 1, now, END_OF_TIME, facts)
        notices.store(postgres, [notice])
        webhooks.deliver_only(postgres, webhook_id, notice.notice_id)
        postgres.commit()
    return notice.notice_id


def outcome(resources: Resources, notice_id: str) -> Delivery | None:
    """Return what became of a test so far."""
    with batch_connection(resources.engine) as postgres:
        return next(iter(webhooks.read_deliveries(postgres, notice_id)), None)


def _new_secret() -> str:
    return f"whsec_{b64encode(token_bytes(_SECRET_BYTES)).decode()}"


def _require(found: Sequence[Webhook], webhook_id: str) -> None:
    if webhook_id not in {each.webhook_id for each in found}:
        raise _unknown(webhook_id)


def _unknown(webhook_id: str) -> AccountError:
    return AccountError(f"webhook: no webhook {webhook_id[:64]!r}; `meterfall webhooks list` has all")
