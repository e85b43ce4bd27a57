"""Events that come again after their outcome was forgotten: counted, logged without a name, shown, never billed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from loguru import logger
from redis import Redis

from config.log import name_in_logs
from config.settings import Settings
from tests.support.commands import Meterfall
from tests.support.ledger import execute, give_account, rows
from tests.support.streams import drain, partition_of
from worker.admin.erasure import close_account
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.consumer.refusals import RefusalLog
from worker.keyspace.keys import Partition
from worker.ledger.accounts import pseudonym_of
from worker.ledger.connection import batch_connection
from worker.reports.explain import explain
from worker.reports.proof import verify_ledger
from worker.reports.status import read_status
from worker.resources import Resources

USER, METER = "u1", "credits"
NOTED = "SELECT user_id, event_id, times FROM late_repeat ORDER BY 1, 2"


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    """A client; the user has 1,000 credits, and 10 of them were used for e1 and e2 each."""
    give_account(settings, USER)
    with Billing.connect(settings) as client:
        for event_id in ("e1", "e2"):
            client.emit(USER, METER, 10, event_id=event_id)
        drain(settings, USER)
        yield client


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged."""
    found: list[str] = []
    sink = logger.add(lambda message: found.append(message.record["message"]), level="WARNING")
    yield found
    logger.remove(sink)


def let_pass(settings: Settings, seconds: int) -> None:
    """Let what is applied have been applied so long ago."""
    execute(settings, "ALTER TABLE usage_log DISABLE TRIGGER USER")
    execute(settings, "UPDATE usage_log SET applied_at = applied_at - make_interval(secs => %s)", seconds)
    execute(settings, "ALTER TABLE usage_log ENABLE TRIGGER USER")


def test_a_retry_within_the_time_of_an_outcome_is_no_late_repeat(billing: Billing, settings: Settings) -> None:
    let_pass(settings, settings.outcome_ttl_seconds - 60)
    billing.emit(USER, METER, 10, event_id="e1")
    drain(settings, USER)
    assert rows(settings, NOTED) == []


def test_a_late_repeat_is_counted_shown_and_not_billed(
    billing: Billing, settings: Settings, resources: Resources, command_server: subprocess.Popen[str]
) -> None:
    let_pass(settings, settings.outcome_ttl_seconds + 60)
    for _ in range(3):
        billing.emit(USER, METER, 10, event_id="e1")
    billing.emit(USER, METER, 11, event_id="e2")  # another event under the same id is a dead letter
    billing.emit(USER, METER, 10, event_id="e3")
    billing.emit(USER, METER, 10, event_id="e3")  # as new as the first
    drain(settings, USER)
    assert rows(settings, NOTED) == [(USER, "e1", 3)]
    billing.emit(USER, METER, 10, event_id="e1")
    drain(settings, USER)
    assert rows(settings, NOTED) == [(USER, "e1", 4)]
    assert rows(settings, "SELECT sum(amount) FROM usage_log") == [(30,)]
    assert rows(settings, "SELECT used FROM balance WHERE meter = %s", METER) == [(30,)]
    assert verify_ledger(resources).differences == []

    explained = explain(resources, USER, "e1")
    assert explained.delivered_again == 4
    assert explained.delivered_again_at is not None
    assert "delivered again 4 times" in explained.sentences[-1]
    assert explain(resources, USER, "e3").delivered_again == 0
    assert read_status(resources).late_repeats == 1
    meterfall = Meterfall(command_server, settings)
    assert "1 event came again within a day" in meterfall("status").out
    assert "delivered again" in " ".join(meterfall.done("explain", USER, "e1").split())
    execute(settings, "UPDATE late_repeat SET last_at = last_at - interval '2 days'")
    assert read_status(resources).late_repeats == 0


def test_an_event_without_an_account_is_noted_too(settings: Settings) -> None:
    with Billing.connect(settings) as client:
        for _ in range(2):
            client.emit("stranger", METER, 10, event_id="e1")
            drain(settings, "stranger")
            let_pass(settings, settings.outcome_ttl_seconds + 60)
    assert rows(settings, NOTED) == [("stranger", "e1", 1)]


def test_a_batch_that_is_read_again_counts_once(billing: Billing, settings: Settings, redis: Redis) -> None:
    """A drain is killed between COMMIT and publish, and the stream entries are there still."""
    let_pass(settings, settings.outcome_ttl_seconds + 60)
    stream = partition_of(settings, USER).entries
    for _ in range(2):
        billing.emit(USER, METER, 10, event_id="e1")
    entries: Any = redis.xrange(stream)
    drain(settings, USER)
    redis.delete(stream)
    for entry_id, fields in entries:
        redis.xadd(stream, fields, id=entry_id)
    drain(settings, USER)
    assert rows(settings, NOTED) == [(USER, "e1", 2)]


def test_an_entry_from_before_its_event_was_applied_is_no_repeat(
    billing: Billing, settings: Settings, redis: Redis
) -> None:
    """Workers were away for hours after a COMMIT that nobody published."""
    stream = partition_of(settings, USER).entries
    billing.emit(USER, METER, 10, event_id="e4")
    waiting: Any = redis.xrange(stream)
    drain(settings, USER)
    redis.delete(stream)
    before = int(time.time() * 1_000) - 3_600_000
    redis.xadd(stream, waiting[0][1], id=f"{before}-0")
    let_pass(settings, 1_800)
    drain(settings, USER)
    assert rows(settings, NOTED) == []


def test_a_closed_account_keeps_its_notes_under_a_pseudonym(
    billing: Billing, settings: Settings, resources: Resources
) -> None:
    let_pass(settings, settings.outcome_ttl_seconds + 60)
    billing.emit(USER, METER, 10, event_id="e1")
    drain(settings, USER)
    close_account(resources, USER)
    drain(settings, USER)
    with batch_connection(resources.engine) as postgres:
        pseudonym = pseudonym_of(postgres, USER, 0)
    assert rows(settings, NOTED) == [(pseudonym, "e1", 1)]
    billing.emit(USER, METER, 10, event_id="e1")
    billing.emit(USER, METER, 10, event_id="e2")
    drain(settings, USER)
    assert rows(settings, NOTED) == [(pseudonym, "e1", 2), (pseudonym, "e2", 1)]


def test_the_log_names_no_user_and_says_it_once_a_minute(
    billing: Billing, settings: Settings, resources: Resources, lines: list[str]
) -> None:
    let_pass(settings, settings.outcome_ttl_seconds + 60)
    now = [0.0]
    log = RefusalLog(lambda: now[0])
    for at in (0, 30, 61):
        now[0] = at
        billing.emit(USER, METER, 10, event_id="e1")
        drain_stream(resources, partition_of(settings, USER), refusals=log)
    said = [line for line in lines if "came again" in line]
    assert [line.split(": ")[1].split()[0] for line in said] == ["1", "2"]
    assert name_in_logs(USER, "hashed") in said[0]
    assert f" {USER}" not in said[0]


def test_repeats_of_each_stream_are_counted_for_themselves(lines: list[str]) -> None:
    log = RefusalLog(lambda: 0.0)
    log.add_repeats(Partition(0), 2, "somebody")
    log.add_repeats(Partition(1), 3, "somebody")
    log.add_repeats(Partition(1), 4, "somebody")
    assert [line.split(": ")[1].split()[0] for line in lines] == ["2", "3"]
