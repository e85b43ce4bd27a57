"""Notices under faults: the sender killed at each step, and receivers that are down, slow, hang, or say no."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from time import monotonic

import pytest

from config.settings import Settings
from tests.faults.house import METER, SLOW_SECONDS, House
from tests.support.ledger import execute, rows
from tests.support.receiver import Came, Receiver, receiver
from tests.support.waiting import wait_until
from worker.admin import notices, webhooks
from worker.consumer import jobs
from worker.reports.dynos import read_dynos
from worker.resources import Resources

# Each is told of a line that its few units cross.
RULES = [{"kind": "balance.depleted"}, {"kind": "balance.debt"}]
OVERRIDES = {
    "webhook_private_addresses": True, "webhook_timeout_ms": 300, "webhook_time_box_seconds": 1,
    "webhook_interval_seconds": 1, "webhook_retry_seconds": 0.05,
}  # fmt: skip
SENDER_POINTS = ("after_taking_notices", "after_posting_notices")


@pytest.fixture
def settings(house: House) -> Settings:
    """Settings with short waits; each account of the house is told of debt."""
    made = house.settings_with(**OVERRIDES)
    with closing(Resources.open(made)) as resources:
        for user in house.users:
            notices.set_rules(resources, user, RULES)
    house.drain()
    return made


@pytest.fixture
def there(settings: Settings) -> Iterator[Receiver]:
    with receiver() as found, closing(Resources.open(settings)) as resources:
        webhooks.add(resources, found.url)
        yield found


def make_debts(house: House) -> int:
    """Let every account go through all it has; return the number of notices."""
    events = [(user, f"debt-{user}") for user in house.users]
    for user, event_id in events:
        house.billing.emit(user, METER, 500_000, event_id=event_id)
    house.drain()
    return len(rows(house.settings, "SELECT 1 FROM notice"))


def is_all_delivered(house: House, number: int) -> bool:
    found = rows(house.settings, "SELECT count(*) FROM notice_delivery WHERE state = 'delivered'")
    return found == [(number,)]


def send_with(house: House, settings: Settings, crash_at: str | None = None) -> int:
    """Run a process that sends once, to its end or its death; return its exit code."""
    with closing(jobs.rq_connection(settings)) as connection:
        queue = jobs.notice_queue(settings, connection)
        queue.connection.delete(queue.key)
        jobs.enqueue_notices(queue)
        with house.run("worker.consumer.notice_process", settings=settings, crash_at=crash_at) as process:
            if crash_at is not None:
                return process.wait(SLOW_SECONDS)
            wait_until(lambda: not jobs.waiting_jobs(queue), "the job is taken", SLOW_SECONDS)
            process.terminate()
            return process.wait(SLOW_SECONDS)


@pytest.mark.parametrize("label", SENDER_POINTS)
def test_a_sender_killed_at_any_step_is_followed_by_another(
    house: House, settings: Settings, there: Receiver, label: str
) -> None:
    number = make_debts(house)
    assert number >= 2 * len(house.users)
    assert send_with(house, settings, crash_at=label) == -signal.SIGKILL
    came_before = {each.notice_id for each in there.came}
    assert bool(came_before) == (label == "after_posting_notices")
    with house.dyno(settings=settings):
        wait_until(lambda: is_all_delivered(house, number), "all is delivered", SLOW_SECONDS)
        senders = [one for one in read_dynos(house.redis) if one.role == "notices"]
        sender = max(senders, key=lambda one: one.started_at)  # a killed one is known for a while
        (worker,) = [one for one in read_dynos(house.redis) if one.role == "worker"]
        assert os.getpriority(os.PRIO_PROCESS, sender.pid) > os.getpriority(os.PRIO_PROCESS, worker.pid)
    assert {each.notice_id for each in there.came} == {row[0] for row in rows(settings, "SELECT notice_id FROM notice")}
    for user in house.users:
        mine = [each.notice["type"] for each in there.came if each.notice["data"]["user_id"] == user]
        assert list(dict.fromkeys(mine)) == ["balance.depleted", "balance.debt"], "in order, though some came twice"


@pytest.mark.parametrize("label", ["inside_transaction", "rows_written", "after_commit"])
def test_a_worker_killed_over_a_line_tells_it_once(house: House, settings: Settings, label: str) -> None:
    for user in house.users:
        house.billing.emit(user, METER, 500_000, event_id=f"debt-{user}")
    house.die_at(label)
    told = rows(settings, "SELECT count(*) FROM notice")
    assert bool(told[0][0]) == (label == "after_commit"), "with the batch, or not at all"
    with house.dyno():
        house.wait_until_drained()
    found = rows(settings, "SELECT user_id, kind, count(*) FROM notice GROUP BY 1, 2 ORDER BY 1, 2")
    assert found == [(user, kind, 1) for user in sorted(house.users) for kind in ("balance.debt", "balance.depleted")]


@pytest.mark.parametrize("trouble", ["down", "slow", "hanging", "500", "301"])
def test_a_receiver_in_trouble_gets_all_when_it_is_well_and_no_drain_waits(
    house: House, settings: Settings, trouble: str
) -> None:
    with closing(Resources.open(settings)) as resources, receiver() as there:
        if trouble == "down":
            webhooks.add(resources, "http://127.0.0.1:9/")
        else:
            webhooks.add(resources, there.url)
        there.answer = {
            "down": lambda _: 200, "slow": there.sleep(0.2), "hanging": there.hang,
            "500": lambda _: 500, "301": lambda _: 301,
        }[trouble]  # fmt: skip
        number = make_debts(house)
        with house.dyno(settings=settings):
            wait_until(lambda: has_failed(settings) or trouble == "slow", "it has failed", SLOW_SECONDS)
            began = monotonic()
            house.billing.emit(house.users[0], METER, 1, event_id="meanwhile")
            house.wait_until_drained()
            assert monotonic() - began < SLOW_SECONDS / 2
            there.answer = lambda _: 200
            if trouble == "down":
                execute(settings, "UPDATE webhook SET url = %s", there.url)
            wait_until(lambda: is_all_delivered(house, number), "all is delivered", 2 * SLOW_SECONDS)
        last: dict[str, Came] = {each.notice_id: each for each in there.came}
        assert len(last) == number


def has_failed(settings: Settings) -> bool:
    return bool(rows(settings, "SELECT 1 FROM notice_delivery WHERE error IS NOT NULL"))


@pytest.mark.slow
def test_a_million_notices_wait_and_a_sender_goes_on_in_bounded_rows(
    house: House, settings: Settings, there: Receiver
) -> None:
    execute(
        settings,
        "INSERT INTO notice (notice_id, user_id, meter, kind, rule, period, times, created_at, due_at, data) "
        "SELECT 'ntc_' || n, 'u-' || n, '', 'balance.debt', 'balance.debt', 'p', 1, now(), now(), '{}' "
        "FROM generate_series(1, 1000000) AS n",
    )
    with house.dyno(settings=settings):
        wait_until(lambda: len(there.came) > 2_000, "it goes on", 4 * SLOW_SECONDS)
        ((waiting,),) = rows(settings, "SELECT count(*) FROM notice_delivery WHERE state = 'waiting'")
        assert int(str(waiting)) <= 12_000
