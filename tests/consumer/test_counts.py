"""What the processes of a dyno count: it reaches the endpoint, and outlives the process that counted it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from config.settings import Settings
from tests.consumer.test_repeats import let_pass
from tests.support.ledger import execute, give_account, rows
from tests.support.processes import dyno, worker_process_of
from tests.support.streams import backlog, partition_of
from tests.support.waiting import wait_until
from tests.support.web import free_port, got
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.consumer.tally import DynoCounts, Tally
from worker.ledger.connection import batch_connection
from worker.reports.counts import APPLIED, BATCH_SECONDS, FAILURES, HALTS, PAUSES, REFUSED, SUM, Sums
from worker.reports.metrics import exposition
from worker.resources import Resources

METER = "credits"
Samples = dict[str, float]


def samples(text: str) -> Samples:
    """The samples of counters and histograms by name and labels."""
    return {
        one.name + "".join(f",{value}" for value in one.labels.values()): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if family.type in ("counter", "histogram")
    }


@contextmanager
def counting() -> Iterator[tuple[Tally, DynoCounts]]:
    """The tally of this process, and the sums to which it goes."""
    found = DynoCounts()
    found.start()
    try:
        yield Tally(found.pipe), found
    finally:
        found.stop()


def is_blocked(settings: Settings) -> bool:
    """True if a transaction waits for the lock of a row."""
    waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return rows(settings, waiting) != []


def test_counts_of_a_dyno_are_right_though_its_worker_process_is_killed(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, "u")
    port = free_port()
    seen: list[Samples] = []

    def scrape() -> Samples:
        _, text = got(port, "/metrics")
        seen.append(samples(text))
        return seen[-1]

    with Billing.connect(settings) as billing, dyno(settings, METERFALL_HTTP_PORT=str(port)) as running:

        def send(name: str) -> None:
            for number in range(20):
                billing.emit("u", METER, 1, event_id=f"{name}{number}")
            for number in range(5):
                billing.emit("u", METER, 1, event_id=f"{name}{number}")
            billing.emit("u", METER, 2, event_id=f"{name}0")
            billing.emit("stranger", METER, 7, event_id=name)

        def told(name: str) -> float:
            return scrape().get(name, -1)

        wait_until(lambda: told("meterfall_uncollected_units_total,credits") == 0, "it counts from 0", seconds=30)
        send("a")
        wait_until(lambda: told("meterfall_events_applied_total") == 20, "the first are applied", seconds=30)
        wait_until(lambda: told("meterfall_uncollected_units_total,credits") == 7, "the stranger is counted")

        first = worker_process_of(running)
        assert first is not None
        with batch_connection(resources.engine) as postgres:
            postgres.execute("SELECT 1 FROM account WHERE user_id = 'u' FOR UPDATE")
            send("b")
            wait_until(lambda: is_blocked(settings), "a batch waits for the account")
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: worker_process_of(running) not in (None, first), "there is another", seconds=20)
            postgres.rollback()
        wait_until(lambda: told("meterfall_events_applied_total") == 40, "the others are applied", seconds=30)
        wait_until(lambda: backlog(settings, redis) == 0, "streams are empty")
        last = scrape()

    assert last["meterfall_duplicate_age_seconds_count"] == 10
    assert last["meterfall_refused_entries_total,id_conflict"] == 2
    assert last["meterfall_refused_entries_total,not_json"] == 0
    assert last["meterfall_uncollected_events_total,credits"] == 2
    assert last["meterfall_uncollected_units_total,credits"] == 14
    # Entries that another process or attempt gave back are in two batches.
    assert last["meterfall_batch_entries_sum"] >= 54
    assert last["meterfall_batch_seconds_count"] == last["meterfall_batch_lock_seconds_count"] >= 2
    assert last["meterfall_batch_lock_seconds_sum"] < last["meterfall_batch_seconds_sum"]
    for before, after in pairwise(seen):
        assert {name for name, value in before.items() if after.get(name, -1) < value} == set()


def test_a_late_duplicate_is_counted_with_its_age(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, "u")
    partition = partition_of(settings, "u")
    with Billing.connect(settings) as billing, counting() as (tally, found):
        billing.emit("u", METER, 1, event_id="e")
        drain_stream(resources, partition, tally=tally)
        let_pass(settings, 7_200)
        billing.emit("u", METER, 1, event_id="e")
        drain_stream(resources, partition, tally=tally)
        wait_until(lambda: "meterfall_duplicate_age_seconds" in {name for name, _ in found.read()}, "it is counted")
        ages = samples(exposition(None, found.read()).decode())
        assert ages["meterfall_duplicate_age_seconds_bucket,3600.0"] == 0
        assert ages["meterfall_duplicate_age_seconds_bucket,86400.0"] == 1
        assert 7_200 <= ages["meterfall_duplicate_age_seconds_sum"] < 7_300


def test_failures_halts_and_pauses_are_counted_by_cause(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, "u")
    partition = partition_of(settings, "u")
    with Billing.connect(settings) as billing, counting() as (tally, found):
        billing.emit("u", METER, 1, event_id="e")
        execute(settings, "ALTER TABLE usage_log RENAME TO lost_log")
        try:
            with pytest.raises(psycopg.errors.UndefinedTable):
                drain_stream(resources, partition, tally=tally)
        finally:
            execute(settings, "ALTER TABLE lost_log RENAME TO usage_log")
        redis.delete(partition.halted)
        for _ in range(settings.pause_min_entries):
            redis.xadd(partition.entries, {"v": "1", "e": "no event"})
        drain_stream(resources, partition, tally=tally)
        wait_until(lambda: (PAUSES.name, "") in found.read(), "it is counted")
        assert {key: number for key, number in found.read().items() if key[0] in (FAILURES.name, HALTS.name)} == {
            (FAILURES.name, "UndefinedTable"): 1,
            (HALTS.name, "UndefinedTable"): 1,
        }


KILLED = """
import os, signal, sys
from worker.consumer.tally import Tally
from worker.reports.counts import APPLIED, BATCH_SECONDS
tally = Tally(int(sys.argv[1]))
tally.count(APPLIED, 3)
tally.observe(BATCH_SECONDS, [0.2, 0.3])
tally.send()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_sent_stays() -> None:
    with counting() as (_, found):
        command = [sys.executable, "-c", KILLED, str(found.pipe)]
        assert subprocess.run(command, pass_fds=[found.pipe], check=False).returncode == -signal.SIGKILL
        wait_until(lambda: (BATCH_SECONDS.name, SUM) in found.read(), "the counts are read")
        assert found.read()[APPLIED.name, ""] == 3
        text = samples(exposition(None, found.read()).decode())
        assert text["meterfall_batch_seconds_bucket,0.1"] == 0
        assert text["meterfall_batch_seconds_bucket,0.25"] == 1
        assert text["meterfall_batch_seconds_bucket,+Inf"] == text["meterfall_batch_seconds_count"] == 2


def test_a_full_pipe_loses_and_waits_for_nothing() -> None:
    found = DynoCounts()
    tally = Tally(found.pipe)
    reasons = {f"reason-{number:04}": 1 for number in range(1_000)}
    for _ in range(10):  # more than a pipe takes, which nobody reads yet
        tally.count(REFUSED, reasons)
        tally.send()
    found.start()
    expected: Sums = {(REFUSED.name, reason): 10 for reason in reasons}

    def arrived() -> bool:
        tally.send()
        return found.read() == expected

    wait_until(arrived, "all of it arrives")
    found.stop()
    tally.count(APPLIED)
    tally.send()  # and a supervisor that is gone is no error
