"""Scenarios 1 and 3: killed with SIGKILL at every labelled point, and another process goes on."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

import worker
from config.settings import load_settings
from schemas.events import UsageEvent
from tests.faults.house import METER, RECOVERY_SECONDS, SLOW_SECONDS, House
from tests.support.ledger import rows
from tests.support.oracle import NOBODY
from worker.keyspace import keys

# Points at which a worker process dies, and whether the ledger has its batch by then.
# "Between the renewals of two meters" is no state here: all meters of a renewal are one transaction.
WORKER_POINTS = {
    "after_job_taken": False,
    "after_read": False,
    "inside_transaction": False,
    "rows_written": False,
    "commit_sent": True,
    "after_dead_letter": True,
    "after_publish": True,
}
# Points after the COMMIT and before the end of publishing.
PUBLISHING_POINTS = ("after_commit", "between_publishing_scripts", "before_trim")
# Those of a round, in which one transaction has several partitions.
ROUND_POINTS = {
    "after_read": False,
    "inside_transaction": False,
    "rows_written": False,
    "after_commit": True,
    "after_publish": True,
}
# The same for the stream of the sponsorship pool, which one script publishes.
POOL_POINTS = WORKER_POINTS | {"after_commit": True}
# Points without a label in the code: the proxy stops the connection there, and the worker process is killed.
PROXY_POINTS = {
    "commit_sent": House.die_with_the_commit_sent,
    "between_publishing_scripts": House.die_between_publishing_scripts,
}
SUPERVISOR_POINTS = {"after_doorbell"}
PRODUCER_POINTS = {"after_reserve", "after_emit", "after_decision", "after_sponsored_settlement"}
# Points of changes that are not usage, of the spool, of the proof, and of commands; their own tests die there.
POINTS_OF_OTHER_TESTS = {
    "after_refresh", "inside_import", "after_spooling", "after_sending_the_spool", "after_moving",
    "after_proof_step", "after_taking_notices", "after_posting_notices",
}  # fmt: skip


def test_every_crash_point_of_the_code_is_tested() -> None:
    files = Path(str(worker.__file__)).parent.rglob("*.py")
    found = {label for file in files for label in re.findall(r'crash_point\("(\w+)"\)', file.read_text("utf-8"))}
    tested = {*WORKER_POINTS, *PUBLISHING_POINTS} | SUPERVISOR_POINTS | PRODUCER_POINTS | POINTS_OF_OTHER_TESTS
    assert found == tested - PROXY_POINTS.keys()


@pytest.mark.scenario(number=1)
@pytest.mark.parametrize("label", WORKER_POINTS)
def test_a_worker_killed_at_any_point_is_followed_by_another(house: House, label: str) -> None:
    house.emit_nonsense()
    house.emit(40)
    die_at(house, label)
    assert bool(house.recorded()) == WORKER_POINTS[label]
    assert house.backlog()
    with house.dyno():
        house.wait_until_drained(RECOVERY_SECONDS)
        house.resend()
        house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=1)
@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=[] if label == "commit_sent" else pytest.mark.slow) for label in POOL_POINTS]
)
def test_a_worker_killed_over_the_pools_stream_gives_once(house: House, label: str) -> None:
    house.redis.xadd(keys.SPONSORSHIP.entries, {"v": "1", "k": "nonsense"})
    house.accepted.dead[*NOBODY, "bad_pool_entry"] += 1
    with house.sponsor() as sponsor:
        house.absorb(sponsor, house.users[0], "r1", 40)
        house.billing.credit_pool("paid", 500)
        die_at(house, label)
        grants = [(1,)] if POOL_POINTS[label] else [(0,)]
        assert rows(house.settings, "SELECT count(*) FROM sponsor_grant") == grants
        assert bool(house.backlog()) == (label != "after_publish")
        with house.dyno():
            house.wait_until_drained(RECOVERY_SECONDS)
            house.billing.credit_pool("paid", 500)
            house.absorb(sponsor, house.users[1], "r2", 7)
            house.wait_until_drained()
    house.prove()
    assert rows(house.settings, "SELECT initial - balance FROM sponsor_pool") == [(40 - 50 + 7,)]


@pytest.mark.scenario(number=1)
def test_a_producer_killed_after_a_decision_or_its_settlement_finds_what_it_did(house: House) -> None:
    user, covered = house.users[0], house.settings_with(sponsor_daily_units_new=100)
    for command, label in (
        (("decide", user, "40", "r1"), "after_decision"),
        (("settle", user, "r1", "31"), "after_sponsored_settlement"),
    ):
        with house.run("worker", "pool", *command, settings=covered, crash_at=label) as doomed:
            assert doomed.wait(SLOW_SECONDS) == -signal.SIGKILL
        with house.run("worker", "pool", *command, "--json", settings=covered) as again:
            assert again.wait(SLOW_SECONDS) == 0
            assert '"repeated": true' in house.log_of(again)
    assert house.redis.xlen(keys.SPONSORSHIP.entries) == 1
    house.accepted.grants["r1"] = 31
    for _ in range(2):
        house.billing.credit_pool("paid", 500)
        house.drain()
    house.prove()


@pytest.mark.slow
@pytest.mark.scenario(number=1)
@pytest.mark.parametrize("label", ["inside_transaction", "after_commit"])
def test_the_settings_that_we_ship_recover_in_time(house: House, label: str) -> None:
    shipped = load_settings({}, database_url=house.settings.database_url, redis_url=house.settings.redis_url)
    house.emit(40)
    house.die_at(label, shipped)
    with house.dyno(settings=shipped):
        house.wait_until_drained(RECOVERY_SECONDS)
        house.resend()
        house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=1)
def test_a_supervisor_killed_after_the_doorbell_takes_no_event_along(house: House) -> None:
    house.emit(1)
    with house.run("worker", "worker", "run", crash_at="after_doorbell") as doomed:
        assert doomed.wait(SLOW_SECONDS) == -signal.SIGKILL
    assert house.redis.llen(keys.BELL) == 0, "it rang once, and whoever heard it is dead"
    assert house.backlog() == 1
    with house.dyno():
        house.wait_until_drained(RECOVERY_SECONDS)
        house.resend(1)
        house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=1)
def test_a_producer_killed_after_emit_sends_again(house: House) -> None:
    events = house.new_events(40)
    file = house.folder / "events.jsonl"
    file.write_text("".join(event.model_dump_json(exclude_none=True) + "\n" for event in events), "utf-8")
    with house.run("worker", "emit", str(file), crash_at="after_emit") as doomed:
        assert doomed.wait(SLOW_SECONDS) == -signal.SIGKILL
    assert house.backlog() == 40
    assert house.redis.llen(keys.BELL) == 0, "it died before it rang"
    with house.dyno():
        house.wait_until_drained(RECOVERY_SECONDS)
        with house.run("worker", "emit", str(file)) as again:
            assert again.wait(SLOW_SECONDS) == 0
        house.wait_until_drained()
    house.accept(events)
    house.prove()


@pytest.mark.scenario(number=1)
def test_a_producer_killed_after_reserve_finds_its_hold(house: House) -> None:
    user = house.users[0]
    reserve = ("worker", "reserve", user, METER, "12", "job-1")
    with house.run(*reserve, crash_at="after_reserve") as doomed:
        assert doomed.wait(SLOW_SECONDS) == -signal.SIGKILL
    assert house.pending() == {"h:job-1": 12}
    with house.run(*reserve) as again:
        assert again.wait(SLOW_SECONDS) == 0
    house.accepted.holds[user, METER, "job-1"] = 12
    house.prove()
    house.billing.settle(user, METER, "job-1", 9)
    del house.accepted.holds[user, METER, "job-1"]
    house.accept([UsageEvent(event_id="job-1", user_id=user, meter=METER, quantity=9)])
    house.resend(1)
    house.drain()
    house.prove()


@pytest.mark.scenario(number=1)
@pytest.mark.scenario(number=3)
@pytest.mark.parametrize("label", PUBLISHING_POINTS)
def test_what_was_committed_and_not_published_is_published_by_another(house: House, label: str) -> None:
    house.emit(40)
    die_at(house, label)
    first_batch = "SELECT event_id FROM usage_log WHERE applied_at = (SELECT min(applied_at) FROM usage_log)"
    recorded = {f"e:{event_id}" for (event_id,) in rows(house.settings, first_batch)}
    unpublished = recorded & house.pending().keys()
    if label == "after_commit":
        assert unpublished == recorded != set()
    elif label == "before_trim":
        assert (unpublished, house.backlog()) == (set(), 40), "all but the stream entries"
    else:
        assert set() < unpublished < recorded, "one script of the batch was run, the next was not"
    with house.dyno():
        house.wait_until_drained(RECOVERY_SECONDS)
    house.prove()


def die_at(house: House, point: str) -> None:
    """Let a worker process take the backlog in hand, and kill it at one of the points above."""
    if point in PROXY_POINTS:
        PROXY_POINTS[point](house)
    else:
        house.die_at(point)


@pytest.mark.scenario(number=1)
@pytest.mark.parametrize("label", ROUND_POINTS)
def test_a_worker_killed_in_a_round_of_all_partitions_is_followed_by_another(house: House, label: str) -> None:
    house.emit(8)
    house.die_at(label)
    assert house.recorded() == (8 if ROUND_POINTS[label] else 0), "both partitions, or none"
    assert bool(house.backlog()) == (label != "after_publish")
    with house.dyno():
        house.wait_until_drained(RECOVERY_SECONDS)
        house.resend()
        house.wait_until_drained()
    house.prove()
