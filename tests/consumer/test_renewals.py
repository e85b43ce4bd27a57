"""Boundaries when everybody comes at once: batches, the job twice, renewals and checks on real Postgres."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import move_clock, rows
from tests.support.processes import killed_in
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import account_of, partition_of
from tests.support.waiting import wait_until
from worker.admin import accounts
from worker.admin.change import locked
from worker.client import Billing
from worker.consumer import jobs, renewals
from worker.consumer.drain import drain_stream
from worker.consumer.supervisor import Supervisor
from worker.crash import crash_point
from worker.keyspace import keys
from worker.reports.proof import verify_ledger
from worker.resources import Resources
from worker.rules.account import Balance, ChangeAnswer

USERS = [f"user-{number:03}" for number in range(120)]
DAY = timedelta(days=1)

CATALOGUE = """
[meters.voice]
unit = "units"
[meters.text]
unit = "units"
[meters.credits]
unit = "units"
[plans.daily]
name = "Daily"
tier = 0
meters.voice = { quantity = 100, cadence = "daily", rollover_cap = 250 }
meters.text = { quantity = 10, cadence = "daily" }
meters.credits = { quantity = 50, cadence = "daily", anchor = "floating" }
[plans.paid]
name = "Paid"
tier = 1
meters.voice = { quantity = 1_000, rollover_cap = 5_000 }
meters.text = { quantity = 100 }
[sponsorship]
initial = 0
paid_share_percent = 0
daily_budget = { new = 0, established = 0, trusted = 0, elite = 0 }
"""


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    path = tmp_path / "catalogue.toml"
    path.write_text(CATALOGUE, encoding="utf-8")
    return settings_for(emptied_database_url, redis_url, catalogue_path=path, partitions=4, renew_chunk_accounts=20)


@pytest.fixture
def resources(settings: Settings) -> Iterator[Resources]:
    """With all accounts open on the daily plan, nothing due, and nothing cached."""
    with worker_resources(settings) as opened:
        accounts.open_many(opened, USERS, "daily")
        opened.redis.flushdb()
        yield opened


def send(resources: Resources, users: list[str], meter: str, amount: int, event_id: str) -> None:
    with resources.redis.pipeline(transaction=False) as pipe:
        for user_id in users:
            event = {"event_id": event_id, "user_id": user_id, "meter": meter, "quantity": amount}
            stream = partition_of(resources.settings, user_id).entries
            pipe.xadd(stream, {"v": "1", "e": json.dumps(event)})
        pipe.execute()


def drain_all(resources: Resources) -> None:
    for partition in keys.partitions_of(resources.settings.partitions):
        while drain_stream(resources, partition).more:
            pass


def boundaries(settings: Settings, kind: str = "refill") -> list[tuple[object, ...]]:
    """Return meter, key and number of its ledger entries, over all accounts."""
    return rows(
        settings,
        "SELECT meter, entry_key, count(*), count(DISTINCT user_id) FROM ledger_entry WHERE kind = %s "
        "GROUP BY 1, 2 ORDER BY 1, 2",
        kind,
    )


def counts(settings: Settings) -> list[list[tuple[object, ...]]]:
    tables = ("account", "balance", "ledger_entry", "usage_log", "ledger_hold")
    return [rows(settings, f"SELECT count(*), coalesce(sum(xmin::text::bigint), 0) FROM {table}") for table in tables]


def balance(resources: Resources, user_id: str, meter: str = "voice") -> Balance:
    return accounts.show(resources, user_id).balances[meter]


@pytest.mark.parametrize("missed", [1, 40])
def test_all_meet_at_one_boundary_and_each_is_applied_once(
    settings: Settings, resources: Resources, missed: int
) -> None:
    send(resources, USERS, "voice", 30, "before")
    drain_all(resources)
    move_clock(settings, missed * DAY + timedelta(hours=1))
    resources.redis.delete(*(account_of(settings, user).balance for user in USERS))
    send(resources, USERS, "voice", 7, "after")
    start = Barrier(5)

    def job() -> int:
        with worker_resources(settings) as own:
            start.wait()
            return renewals.renew_due(own).entries

    def batches(reverse: bool) -> None:
        with worker_resources(settings) as own:
            start.wait()
            partitions = keys.partitions_of(settings.partitions)
            for partition in reversed(partitions) if reverse else partitions:
                drain_stream(own, partition)

    def checks() -> set[int | None]:
        with Billing.connect(settings) as billing:
            start.wait()
            return {billing.check(user, "voice", 1).available for user in USERS}

    with ThreadPoolExecutor(5) as pool:
        stored = [pool.submit(job) for _ in range(2)]
        applied = [pool.submit(batches, reverse) for reverse in (False, True)]
        seen = pool.submit(checks)
        for run in stored:
            run.result(timeout=60)
        for batch in applied:
            batch.result(timeout=60)
        # Whoever asked saw the new period: without its event, or with it.
        rolled = min(70 + 100 * (missed - 1), 250)
        assert seen.result(timeout=60) <= {100 + rolled, 93 + rolled}
    drain_all(resources)
    renewals.renew_due(resources)
    assert {(row[0], row[2], row[3]) for row in boundaries(settings)} == {("text", 120, 120), ("voice", 120, 120)}
    found = [balance(resources, user) for user in USERS]
    assert {(each.used, each.rollover, each.purchased) for each in found} == {(7, rolled, 0)}
    assert verify_ledger(resources).differences == []


def test_floating_meters_are_left_to_their_next_use(settings: Settings, resources: Resources) -> None:
    send(resources, USERS[:1], "credits", 20, "before")
    drain_all(resources)
    move_clock(settings, 3 * DAY)
    assert renewals.renew_due(resources) == (120, 240, False)
    assert rows(settings, "SELECT DISTINCT used FROM balance WHERE meter = 'credits' ORDER BY 1") == [(0,), (20,)]
    assert renewals.renew_due(resources) == (0, 0, False)
    send(resources, USERS[:1], "credits", 5, "after")
    drain_all(resources)
    assert [row[0] for row in boundaries(settings)] == ["credits", "text", "voice"]
    assert balance(resources, USERS[0], "credits").used == 5


def test_a_renewal_delivered_eight_times_beside_a_batch_is_applied_once(
    settings: Settings, resources: Resources
) -> None:
    user = "payer"
    account = accounts.open_new(resources, user, "paid", end=datetime.now(UTC) + 30 * DAY)
    end = account.balances["voice"].period_end
    assert end is not None
    move_clock(settings, 30 * DAY - timedelta(minutes=30))
    begin = Barrier(10)

    def deliver(_: int) -> ChangeAnswer:
        with worker_resources(settings) as own:
            begin.wait()
            return accounts.renew(own, user, "inv-1", end, end + 30 * DAY)

    def emit_and_drain(number: int) -> None:
        with worker_resources(settings) as own:
            begin.wait()
            for turn in range(10):
                send(own, [user], "voice", 10, f"e{number}-{turn}")
                drain_stream(own, partition_of(settings, user))

    with ThreadPoolExecutor(10) as pool:
        batches = [pool.submit(emit_and_drain, number) for number in range(2)]
        changes = list(pool.map(deliver, range(8)))
        for batch in batches:
            batch.result(timeout=60)
    drain_all(resources)
    renewals.renew_due(resources)  # it may have waited for events before it
    assert sum(not change.repeated for change in changes) == 1
    assert rows(settings, "SELECT meter, count(*) FROM ledger_entry WHERE kind = 'renewal' GROUP BY 1 ORDER BY 1") == [
        ("text", 1), ("voice", 1)
    ]  # fmt: skip
    after = balance(resources, user)
    # What came before the renewal was paid by the first period, the rest by the second; together 200.
    assert after.used + (1_000 - after.rollover) == 200
    assert verify_ledger(resources).differences == []


def test_killed_between_two_chunks_and_run_again(settings: Settings, resources: Resources) -> None:
    move_clock(settings, 2 * DAY)

    def die_after_two_chunks(own: Resources) -> None:
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done = count
            if count >= 40:
                crash_point("between_chunks")

        renewals.renew_due(own, progress=progress)

    killed_in(settings, die_after_two_chunks, "between_chunks")
    assert {row[3] for row in boundaries(settings)} == {40}
    assert renewals.renew_due(resources) == (80, 160, False)
    assert {(row[2], row[3]) for row in boundaries(settings)} == {(120, 120)}
    assert renewals.renew_due(resources).entries == 0
    assert verify_ledger(resources).differences == []


def test_killed_inside_a_renewal_nothing_happened(settings: Settings, resources: Resources) -> None:
    start = accounts.open_new(resources, "payer", "paid").balances["voice"].period_start
    before = counts(settings)

    def renew(own: Resources) -> ChangeAnswer:
        return accounts.renew(own, "payer", "inv-1", start + 30 * DAY, start + 60 * DAY)

    killed_in(settings, renew, "after_refresh")
    assert counts(settings) == before
    assert not renew(resources).repeated
    assert verify_ledger(resources).differences == []


def test_an_account_in_use_is_left_to_its_user(settings: Settings, resources: Resources) -> None:
    move_clock(settings, DAY + timedelta(hours=1))
    with locked(resources, USERS[3]):
        assert renewals.renew_due(resources).accounts == 119
    assert renewals.renew_due(resources).accounts == 1


def test_the_time_box_ends_a_run_and_the_next_goes_on(settings: Settings, resources: Resources) -> None:
    move_clock(settings, DAY + timedelta(hours=1))
    assert renewals.renew_due(resources, stop_at=0) == (0, 0, True)
    assert renewals.renew_due(resources).more is False


def test_a_check_computes_what_is_due_and_writes_nothing(
    settings: Settings, resources: Resources, redis: Redis
) -> None:
    send(resources, USERS[:1], "voice", 30, "e1")
    drain_all(resources)
    renewals.renew_due(resources)
    resources.redis.flushdb()
    move_clock(settings, 2 * DAY + timedelta(hours=1))
    before = counts(settings)
    with Billing.connect(settings) as billing:
        assert billing.check(USERS[0], "voice", 1).available == 100 + 170
        assert billing.check(USERS[0], "credits", 1).available == 50
        billing.reserve(USERS[0], "voice", 5, key="job").release()
    assert accounts.show(resources, USERS[0]).balances["voice"].rollover == 170
    assert counts(settings) == before


def test_a_cached_balance_dies_at_the_boundary(settings: Settings, resources: Resources, redis: Redis) -> None:
    """And the check after that sees the next period, though nobody has stored it."""
    user = USERS[0]
    send(resources, [user], "voice", 30, "e1")
    drain_all(resources)
    resources.redis.flushdb()
    ends = "FROM balance WHERE meter = 'voice' AND user_id = %s"
    cached = account_of(settings, user).balance
    with Billing.connect(settings) as billing:
        billing.check(USERS[1], "voice", 1)  # both servers are connected
        ((ends_in,),) = rows(settings, f"SELECT period_end - clock_timestamp() {ends}", user)
        assert isinstance(ends_in, timedelta)
        move_clock(settings, ends_in - timedelta(seconds=1.5))
        assert billing.check(user, "voice", 1).available == 70
        left = redis.pttl(cached)
        assert 0 < left <= 1_500
        # It may die a little before: by as much as the load took. Then the next one would rightly see the old period.
        over = f"SELECT ledger_now() >= period_end {ends}"
        wait_until(lambda: rows(settings, over, user) == [(True,)], "the period is over")
        assert not redis.exists(cached)
        assert billing.check(user, "voice", 1).available == 170
    assert boundaries(settings) == []


def test_what_a_batch_publishes_dies_at_the_boundary_too(
    settings: Settings, resources: Resources, redis: Redis
) -> None:
    user = USERS[0]
    with Billing.connect(settings) as billing:
        billing.check(user, "voice", 1)
        ((end,),) = rows(settings, "SELECT period_end FROM balance WHERE meter = 'voice' AND user_id = %s", user)
        ((now,),) = rows(settings, "SELECT clock_timestamp()")
        assert isinstance(end, datetime)
        assert isinstance(now, datetime)
        move_clock(settings, end - now - timedelta(seconds=5))
        send(resources, [user], "voice", 30, "e1")
        drain_all(resources)
        left = redis.pttl(account_of(settings, user).balance)
        assert 0 < left <= 5_000
        assert billing.check(user, "voice", 1).used == 30


def test_the_job_is_enqueued_once_an_interval_for_all_dynos(settings: Settings, redis: Redis) -> None:
    short = settings.model_copy(update={"renew_interval_seconds": 60, "verify_interval_seconds": 0})
    dynos = [Supervisor(short, {}) for _ in range(3)]
    queue = jobs.job_queue(short, jobs.rq_connection(short))

    def jobs_waiting() -> list[str]:
        return [job_id for job_id in queue.job_ids if job_id.startswith("renew_due-")]

    for dyno in dynos:
        dyno.sweep.run()
    assert len(jobs_waiting()) == 1
    assert 0 < redis.ttl(keys.RENEWED) <= 60
    redis.delete(keys.RENEWED)  # the interval is over
    for dyno in dynos:
        dyno.sweep.run()
    assert len(jobs_waiting()) == 2
    never = Supervisor(short.model_copy(update={"renew_interval_seconds": 0}), {})
    redis.delete(keys.RENEWED)
    never.sweep.run()
    assert len(jobs_waiting()) == 2


def test_the_job_stores_what_is_due(settings: Settings, resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "resources", lambda: resources)
    move_clock(settings, DAY + timedelta(hours=1))
    jobs.renew_due()
    assert {(row[0], row[2]) for row in boundaries(settings)} == {("text", 120), ("voice", 120)}
