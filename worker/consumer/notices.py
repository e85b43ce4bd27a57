"""The job that sends notices to webhooks: it puts them in line, takes what is due, posts it, and notes what came of it.

At least once, in order per account and webhook. Killed anywhere, what it had in hand is sent again after a while, with
the same id. Several may run: what one has taken no other takes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime
from random import Random
from time import monotonic
from typing import NamedTuple

from loguru import logger

from worker.admin.notices import notice_of
from worker.admin.posting import Refused, Target, post, signed, target_of
from worker.consumer.tally import Tally
from worker.crash import crash_point
from worker.errors import BadInput
from worker.ledger import notices, webhooks
from worker.ledger.connection import Postgres, batch_connection
from worker.ledger.webhooks import Ended, Taken, Webhook
from worker.reports import counts
from worker.resources import Resources
from worker.rules.retries import retry_seconds

# How often to look for what has come due, and how long to gather what ends into one COMMIT.
_LOOK_SECONDS, _GATHER_SECONDS = 0.2, 0.02


class Sent(NamedTuple):
    """The work of one job. `more`: something was due at its end."""

    delivered: int
    failed: int
    more: bool


def send_notices(resources: Resources, stop_at: float, tally: Tally | None = None) -> Sent:
    """Send what is due until `monotonic()` reaches `stop_at`; then wait for what is under way.

    While it waits, at most a time-out, the other webhooks still get what is due to them.
    Safe to repeat, to run twice at the same time, and to kill. Raises the errors of Postgres.
    """
    return asyncio.run(_Sender(resources, tally or Tally()).run(stop_at))


def are_due(resources: Resources) -> bool:
    """Return whether `send_notices` would have something to do now. Raises the errors of Postgres."""
    with batch_connection(resources.engine) as postgres:
        return webhooks.are_due(postgres, resources.settings.notice_keep_days)


def forget_old(resources: Resources, stop_at: float) -> int:
    """Delete notices that are old enough, as far as `monotonic()` allows, though nobody sends any; return their number.

    Those that nobody has read or sent get their places first: only these tell when a notice was told.
    Safe to repeat, to run twice at the same time, and to kill. Raises the errors of Postgres.
    """
    number, more = 0, True
    while more and monotonic() < stop_at:
        with batch_connection(resources.engine) as postgres:
            placed = notices.put_in_line(postgres) if notices.try_line(postgres) else 0
            forgotten = webhooks.forget(postgres, resources.settings.notice_keep_days)
            postgres.commit()
        number += forgotten
        more = bool(placed or forgotten)
    return number


class _Sender:
    """What is under way, and which webhooks failed last: these get one delivery at a time."""

    def __init__(self, resources: Resources, tally: Tally) -> None:
        self._resources = resources
        self._settings = resources.settings
        self._tally = tally
        self._under_way: dict[asyncio.Task[Ended], str] = {}
        self._failing: set[str] = set()
        self._draws = Random()  # noqa: S311 - when to try again is no secret
        self._delivered = self._failed = 0
        self._webhooks: list[Webhook] = []
        self._secrets: dict[str, list[str]] = {}
        self._next_look = 0.0

    async def run(self, stop_at: float) -> Sent:
        """Work until nothing is due and nothing under way, or until `stop_at`."""
        self._forget()
        more, ended = True, list[Ended]()
        while more and monotonic() < stop_at:
            placed, taken = self._turn(ended)
            for each, webhook in taken:
                self._under_way[asyncio.create_task(self._deliver(each, webhook))] = webhook.webhook_id
            ended = await self._wait()
            more = placed or bool(taken or ended or self._under_way)
        last = set(self._under_way)
        left = bool(last)
        while hanging := {self._under_way[task] for task in last & self._under_way.keys()}:
            # One that hangs or failed would make this wait begin again.
            for each, webhook in self._turn(ended, without=hanging | self._failing)[1]:
                self._under_way[asyncio.create_task(self._deliver(each, webhook))] = webhook.webhook_id
            ended = await self._wait()
        while self._under_way:
            ended += await self._wait()
        if ended:
            self._turn(ended, takes=False)
        self._tally.send()
        return Sent(self._delivered, self._failed, more or left)

    def _forget(self) -> None:
        with batch_connection(self._resources.engine) as postgres:
            webhooks.forget(postgres, self._settings.notice_keep_days)
            postgres.commit()

    def _turn(
        self, ended: list[Ended], *, takes: bool = True, without: Collection[str] = ()
    ) -> tuple[bool, list[tuple[Taken, Webhook]]]:
        """Write down what came of attempts, put due notices in line, and take the next deliveries; in one COMMIT.

        It takes nothing for webhooks in `without`. Returns whether there may be more to put in line, and what it took.
        """
        if ended:
            crash_point("after_posting_notices")
        placed, taken = False, list[tuple[Taken, Webhook]]()
        with batch_connection(self._resources.engine) as postgres:
            if ended:
                webhooks.end(postgres, ended)
            if takes and (monotonic() >= self._next_look or not (ended or self._under_way)):
                placed = self._put_in_line(postgres)
            if takes:
                taken = self._take(postgres, without)
            postgres.commit()
        crash_point("after_taking_notices")
        self._count(ended)
        return placed, taken

    def _put_in_line(self, postgres: Postgres) -> bool:
        """Give due notices their places, and each webhook its part; return True if there may be more."""
        self._next_look = monotonic() + _LOOK_SECONDS
        placed = looked_at = 0
        # Only with the line: another sender may end the last delivery of an account while this one adds its next.
        if notices.try_line(postgres):
            placed = notices.put_in_line(postgres)
            looked_at = webhooks.fan_out(postgres)
        self._webhooks = webhooks.read_webhooks(postgres)
        self._secrets = webhooks.read_secrets(postgres)
        return bool(placed or looked_at)

    def _take(self, postgres: Postgres, without: Collection[str]) -> list[tuple[Taken, Webhook]]:
        """Take deliveries that are due, as many as may be under way besides."""
        settings, taken = self._settings, list[tuple[Taken, Webhook]]()
        free = settings.webhook_max_under_way - len(self._under_way)
        busy = Counter(self._under_way.values())
        # The one with the fewest goes first: no webhook takes all places.
        served = (each for each in self._webhooks if each.webhook_id not in without)
        for webhook in sorted(served, key=lambda each: busy[each.webhook_id]):
            most = 1 if webhook.webhook_id in self._failing else settings.webhook_max_under_way_each
            rows = min(free, most - busy[webhook.webhook_id])
            if rows <= 0:
                continue
            # Longer than any attempt: only a sender that died leaves it to another one.
            lease = 2 * settings.webhook_timeout_ms / 1_000 + settings.webhook_time_box_seconds
            found = webhooks.take(postgres, webhook.webhook_id, rows, lease)
            free -= len(found)
            taken += [(one, webhook) for one in found]
        return taken

    async def _deliver(self, taken: Taken, webhook: Webhook) -> Ended:
        """Post one notice; say what becomes of its delivery."""
        notice = taken.notice
        try:
            secrets = self._secrets.get(webhook.webhook_id)
            if not secrets:
                raise Refused("the webhook has no secret that is in force")
            allows_private = self._settings.webhook_private_addresses
            target: Target = target_of(webhook.url, allows_private=allows_private)
            body = notice_of(notice).model_dump_json(exclude_none=True)
            headers = signed(secrets, notice.notice_id, datetime.now(UTC), body)
            seconds = self._settings.webhook_timeout_ms / 1_000
            await post(target, headers, body.encode(), seconds, allows_private=allows_private)
        except Exception as error:  # noqa: BLE001 - what is wrong with one notice or host holds up no other
            self._failing.add(webhook.webhook_id)
            text = str(error) if isinstance(error, Refused | BadInput) else f"{type(error).__name__}, in this release"
            is_last = taken.attempts >= self._settings.webhook_max_attempts
            wait = retry_seconds(taken.attempts, self._settings.webhook_retry_seconds, self._draws.random())
            state, retry = ("dead", None) if is_last else ("waiting", wait)
            return Ended(webhook.webhook_id, notice.notice_id, taken.lane, state, retry, text)
        self._failing.discard(webhook.webhook_id)
        return Ended(webhook.webhook_id, notice.notice_id, taken.lane, "delivered", None, None)

    async def _wait(self) -> list[Ended]:
        """Wait until attempts end: some of them, as one COMMIT may have many."""
        if not self._under_way:
            return []
        done, _ = await asyncio.wait(self._under_way, timeout=_GATHER_SECONDS)
        if not done:
            done, _ = await asyncio.wait(self._under_way, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            del self._under_way[task]
        return [task.result() for task in done]

    def _count(self, ended: list[Ended]) -> None:
        failed = [one for one in ended if one.error is not None]
        self._delivered += len(ended) - len(failed)
        self._failed += len(failed)
        self._tally.count(counts.NOTICES_DELIVERED, len(ended) - len(failed))
        self._tally.count(counts.NOTICES_FAILED, len(failed))
        for one in failed:
            if one.state == "dead":
                logger.bind(cause=f"dead delivery to {one.webhook_id}").error(
                    "a notice to webhook {} was given up: {}; `meterfall notices replay` sends it again",
                    one.webhook_id, one.error,
                )  # fmt: skip
