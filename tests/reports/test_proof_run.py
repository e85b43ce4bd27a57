"""The proof in steps: from the checkpoint of each account, now and then from zero, and whatever somebody changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from config.settings import Settings
from schemas.status import Difference
from tests.support.ledger import execute, give_account, give_accounts, rows, stop_clock
from tests.support.processes import killed_in
from tests.support.resources import worker_resources
from tests.support.streams import account_of, drain
from worker.admin import accounts, credits
from worker.admin.erasure import close_account, reopen
from worker.client import Billing
from worker.ledger import checkpoints
from worker.ledger.accounts import read_account
from worker.ledger.connection import batch_connection
from worker.ledger.proof import read_history
from worker.reports.proof import Replayed, replay
from worker.reports.proof_result import read_result
from worker.reports.proof_run import Outcome, prove_for, prove_ledger
from worker.reports.proof_state import replayed_from, state_of
from worker.resources import Resources
from worker.rules.checkpoint import DAYS

USER, METER = "user-42", "premium_voice"
MANY = [f"many-{number:02}" for number in range(12)]


def bill(settings: Settings, user_id: str, *event_ids: str) -> None:
    with Billing.connect(settings) as billing:
        for event_id in event_ids:
            billing.emit(user_id, METER, 10, event_id=event_id, source="a")
    drain(settings, user_id)


def found(resources: Resources, *, whole: bool = False) -> list[str]:
    return prove_ledger(resources, whole=whole).differences


@contextmanager
def unguarded(settings: Settings, table: str = "usage_log") -> Iterator[None]:
    """Within the block the rows of the history may be changed, as their owner may."""
    execute(settings, f"ALTER TABLE {table} DISABLE TRIGGER USER")
    yield
    execute(settings, f"ALTER TABLE {table} ENABLE TRIGGER USER")


@pytest.fixture
def proven(settings: Settings, redis: Redis, resources: Resources) -> str:
    """The name of an account with five events, proven."""
    give_account(settings, USER, "basic")
    bill(settings, USER, *"abcde")
    assert found(resources) == []
    return USER


# ---------------------------------------------------------------------------------------------------------------------
# What is new


def test_a_proof_replays_what_is_new_alone(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_accounts(settings, [USER, *MANY], "basic")
    bill(settings, USER, "a", "b")
    first = prove_ledger(resources)
    assert (first.from_zero, first.from_checkpoint, first.differences) == (13, 0, [])
    bill(settings, USER, "c")
    bill(settings, MANY[3], "d", "e")
    second = prove_ledger(resources)
    assert (second.from_zero, second.from_checkpoint, second.changes, second.differences) == (0, 13, 3, [])
    assert prove_ledger(resources).changes == 0
    whole = prove_ledger(resources, whole=True)
    assert (whole.from_zero, whole.changes, whole.differences) == (13, first.changes + 3, [])


def test_a_replay_goes_on_from_its_state_as_if_it_had_not_stopped(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    accounts.open_new(resources, USER, "plus")
    accounts.open_new(resources, MANY[0], "plus")
    credits.grant(resources, USER, METER, 500, "order-1", reason="free text")
    credits.grant(resources, USER, METER, 300, "order-2")
    bill(settings, USER, "a", "b")
    credits.claw_back(resources, USER, METER, 100, "refund-1")
    credits.reverse(resources, USER, "a")
    accounts.change_plan(resources, USER, "basic")
    credits.carry_over(resources, USER, MANY[0], "moved", meter=METER)
    bill(settings, USER, "c")
    with batch_connection(resources.engine) as postgres:
        history = list(read_history(postgres, [USER]))
        _, _, stored = read_account(postgres, USER)
    kept = Replayed.nothing(USER)
    for row in history:
        assert list(replay(kept, row)) == []
        kept = replayed_from(USER, json.loads(json.dumps(state_of(kept), default=datetime.isoformat)))
    assert kept.account == stored
    assert "free text" not in json.dumps(state_of(kept), default=str)
    assert len(kept.made) > 1
    assert found(resources) == []


def test_a_wrong_new_row_is_named_by_each_proof_until_it_is_mended(
    settings: Settings, proven: str, resources: Resources
) -> None:
    bill(settings, USER, "f", "g")
    wrong = "UPDATE usage_log SET from_subscription = {}, overflow_to_debt = {} WHERE event_id = 'f'"
    with unguarded(settings):
        execute(settings, wrong.format(9, 1))
    for _ in range(3):
        (difference, *_) = found(resources)
        assert difference.startswith(f"{USER} seq ")
        assert "event f has parts (9, 0, 0, 1), the waterfall says (10, 0, 0, 0)" in difference
        bill(settings, USER, "h")
    with unguarded(settings):
        execute(settings, wrong.format(10, 0))
    assert found(resources) == []


@pytest.mark.parametrize(
    "wrong", ["UPDATE balance SET used = used + 1", "UPDATE account SET plan = 'plus'", "UPDATE account SET seq = 3"]
)
def test_a_stored_balance_that_changed_by_itself_is_named(
    settings: Settings, proven: str, resources: Resources, wrong: str
) -> None:
    execute(settings, wrong)
    assert found(resources) != []
    assert found(resources) != [], "and again"


def test_a_cached_balance_is_compared_although_its_account_did_not_change(
    settings: Settings, redis: Redis, proven: str, resources: Resources
) -> None:
    with Billing.connect(settings) as billing:
        billing.check(USER, METER)
    (name,) = redis.scan_iter("mf:{p*}:balance:*")
    text = redis.get(name)
    assert isinstance(text, bytes)
    redis.set(name, text.replace(b"premium_voice 100000 50", b"premium_voice 100000 7"))
    assert ["Redis says" in each for each in found(resources)] == [True]
    redis.delete(name)
    assert prove_ledger(resources)[:2] == (0, 1), "the ledger is not in doubt"


# ---------------------------------------------------------------------------------------------------------------------
# What is old


def test_a_changed_old_row_is_found_from_zero_and_named_until_it_is_as_before(
    settings: Settings, proven: str, resources: Resources
) -> None:
    with unguarded(settings):
        execute(settings, "UPDATE usage_log SET source = 'b' WHERE event_id = 'c'")
    assert found(resources) == [], "nothing is new"
    for whole in (True, False, False):
        (difference,) = found(resources, whole=whole)
        assert difference.endswith("rows up to seq 9 are not those that were proven before"), difference
        bill(settings, USER, f"more-{whole}")
    with unguarded(settings):
        execute(settings, "UPDATE usage_log SET source = 'a' WHERE event_id = 'c'")
    assert found(resources) == []
    assert prove_ledger(resources)[:2] == (0, 1)


def test_within_thirty_days_the_daily_proof_finds_it(settings: Settings, proven: str, resources: Resources) -> None:
    with unguarded(settings):
        execute(settings, "UPDATE usage_log SET reference_id = 'x' WHERE event_id = 'c'")
    now = datetime.now(UTC)
    days = 0
    while not found(resources):
        days += 1
        assert days <= DAYS
        stop_clock(settings, now + timedelta(days=days))
    assert days > 0


def test_rows_that_are_gone_are_named(settings: Settings, proven: str, resources: Resources) -> None:
    with unguarded(settings):
        execute(settings, "DELETE FROM usage_log WHERE event_id = 'e'")
        execute(settings, "UPDATE account SET seq = seq - 1")
        taken = "SET used = used - 10, lifetime_consumed = lifetime_consumed - 10"
        execute(settings, f"UPDATE balance {taken} WHERE meter = '{METER}'")
    # No row contradicts another.
    assert ["9 changes were proven, 8 are left" in each for each in found(resources)] == [True]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize(
    "changed",
    ["state = '{}'", "seq = 8", "digest = sha256('x')", "stands = 1", "whole_on = whole_on + 1", "seal = ''"],
)
def test_a_changed_checkpoint_is_named_and_mended(
    settings: Settings, proven: str, resources: Resources, changed: str
) -> None:
    before = rows(settings, "SELECT seq, digest, state::text, stands, whole_on, seal FROM proof_checkpoint")
    execute(settings, f"UPDATE proof_checkpoint SET {changed}")
    assert ["is not as the proof wrote it" in each for each in found(resources)] == [True]
    assert rows(settings, "SELECT seq, digest, state::text, stands, whole_on, seal FROM proof_checkpoint") == before
    assert prove_ledger(resources)[:2] == (0, 1)


def test_a_forged_checkpoint_is_found_from_zero(settings: Settings, proven: str, resources: Resources) -> None:
    """Whoever forges it rightly sealed still cannot make the rows say the same."""
    execute(
        settings,
        'UPDATE proof_checkpoint SET state = replace(state::text, \'"granted"\', \'"other":1,"granted"\')::json; '
        f"UPDATE proof_checkpoint AS forged SET seal = {checkpoints._SEAL.format('forged')}",
    )
    assert found(resources) == []
    assert ["is not what its rows make of it" in each for each in found(resources, whole=True)] == [True]
    assert found(resources, whole=True) == [], "it is mended"


def test_a_checkpoint_of_another_release_is_no_difference(
    settings: Settings, proven: str, resources: Resources
) -> None:
    execute(
        settings,
        "UPDATE proof_checkpoint SET form = 0, state = '{}'; "
        f"UPDATE proof_checkpoint AS older SET seal = {checkpoints._SEAL.format('older')}",
    )
    assert prove_ledger(resources)[:2] == (1, 0)
    assert prove_ledger(resources)[:2] == (0, 1)


def test_a_closed_account_leaves_no_checkpoint_and_its_history_is_proven_anew(
    settings: Settings, proven: str, resources: Resources
) -> None:
    history = close_account(resources, USER)
    assert rows(settings, "SELECT FROM proof_checkpoint") == []
    report = prove_ledger(resources)
    assert (report.from_zero, report.differences) == (1, [])
    assert rows(settings, "SELECT user_id FROM proof_checkpoint") == [(history,)]
    reopen(resources, USER, "basic")
    assert prove_ledger(resources)[:2] == (1, 1)
    assert found(resources, whole=True) == []


def test_a_proof_that_read_an_account_before_it_was_closed_writes_no_checkpoint_of_it(
    settings: Settings, proven: str, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    bill(settings, USER, "f")
    lock = checkpoints.lock_writes

    def late(postgres: object) -> None:
        monkeypatch.setattr(checkpoints, "lock_writes", lock)
        close_account(resources, USER)
        lock(postgres)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "lock_writes", late)
    prove_ledger(resources)
    assert rows(settings, "SELECT user_id FROM proof_checkpoint WHERE user_id !~ 'closed'") == []
    assert found(resources) == []


# ---------------------------------------------------------------------------------------------------------------------
# Steps, and runs of the periodic proof


@pytest.fixture
def short(settings: Settings) -> Settings:
    """Steps of three accounts, and of seven changes."""
    few = {"verify_chunk_accounts": 3, "verify_chunk_changes": 7, "verify_load_percent": 100}
    return settings.model_copy(update=few)


def prove(resources: Resources, seconds: float, number: int | None = None, told: list[str] | None = None) -> Outcome:
    """Go on with a run; `told` takes the differences that it tells."""

    def tell(difference: Difference) -> None:
        if told is not None:
            told.append(difference.text)

    return prove_for(resources, seconds, str, tell, number)


def run_to_its_end(settings: Settings) -> tuple[int, int, int, list[str]]:
    with worker_resources(settings) as resources:
        report = None
        while report is None:
            report = prove(resources, 0.05).report
    return report.from_zero, report.from_checkpoint, report.changes, report.differences


def test_an_account_with_more_changes_than_a_step_has_is_proven_in_parts(
    settings: Settings, short: Settings, redis: Redis, resources: Resources
) -> None:
    give_accounts(settings, [USER, *MANY], "basic")
    credits.grant(resources, USER, METER, 5, "order-1")
    bill(settings, USER, *map(str, range(40)))
    credits.reverse(resources, USER, "7")
    with worker_resources(short) as in_steps:
        assert prove_ledger(in_steps) == prove_ledger(resources, whole=True)
    before = rows(settings, "SELECT user_id, seq, digest, state::text, seal FROM proof_checkpoint ORDER BY 1")
    execute(settings, "DELETE FROM proof_checkpoint")
    assert prove_ledger(resources).differences == []
    assert rows(settings, "SELECT user_id, seq, digest, state::text, seal FROM proof_checkpoint ORDER BY 1") == before
    with unguarded(settings):
        execute(settings, "UPDATE usage_log SET amount = 11, from_subscription = 11 WHERE event_id = '3'")
    with worker_resources(short) as in_steps:
        execute(settings, "DELETE FROM proof_checkpoint")
        assert "event 3 has amount 11" in " ".join(found(in_steps))
    assert rows(settings, f"SELECT FROM proof_checkpoint WHERE user_id = '{USER}'") == []


def test_a_run_killed_after_any_step_goes_on_and_ends_with_the_same_result(
    settings: Settings, short: Settings, redis: Redis, resources: Resources
) -> None:
    give_accounts(settings, [USER, *MANY], "basic")
    bill(settings, USER, *map(str, range(30)))
    execute(settings, f"UPDATE balance SET used = 1 WHERE user_id = '{MANY[0]}' AND meter = '{METER}'")
    expected = run_to_its_end(short)
    assert expected[:2] == (13, 0)
    assert len(expected[3]) == 1
    execute(settings, "DELETE FROM proof_checkpoint")
    redis.flushdb()
    kills = 0
    while rows(settings, "SELECT in_hand->>'user_id' FROM proof_run") != [(USER,)]:
        assert kills < 30
        # Killed once before a step is stored, then after one was.
        killed_in(short, lambda of: prove(of, 60), "after_proof_step")
        killed_in(short, lambda of: prove(of, 0))
        kills += 1
    (position,) = rows(settings, "SELECT after, finished_at FROM proof_run")
    assert position[1] is None
    assert run_to_its_end(short) == expected
    kept = read_result(redis)
    assert kept is not None
    assert (kept.accounts, kept.from_zero, kept.differences) == (13, 13, 1)


def test_a_difference_is_told_though_what_comes_after_it_fails(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    execute(settings, f"UPDATE balance SET purchased = 7 WHERE user_id = '{USER}' AND meter = '{METER}'")
    broken = account_of(settings, "somebody").pending(METER)
    redis.set(broken, "no map")
    told: list[str] = []
    for _ in range(2):
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            prove(resources, 60, told=told)
    redis.delete(broken)
    done = prove(resources, 60, told=told)
    assert (done.differences, told) == (1, [f"{USER}: {METER} has purchased 7, its changes make it 0"])


def test_one_process_proves_at_a_time(settings: Settings, proven: str, redis: Redis, resources: Resources) -> None:
    with batch_connection(resources.engine) as postgres:
        assert checkpoints.try_turn(postgres)
        done = prove(resources, 5)
        assert (done.is_taken, done.report) == (True, None)
        postgres.rollback()
    assert prove(resources, 5).report is not None


def test_a_run_that_ended_is_not_begun_again_for_a_late_job(proven: str, redis: Redis, resources: Resources) -> None:
    done = prove(resources, 5)
    assert done.run is not None
    assert done.report is not None
    assert prove(resources, 5, done.run.number).run is None
    again = prove(resources, 5)
    assert again.run is not None
    assert again.run.number == done.run.number + 1


def test_a_run_goes_on_before_an_account_that_was_closed_on_its_way(
    settings: Settings, short: Settings, redis: Redis, resources: Resources
) -> None:
    give_accounts(settings, MANY, "basic")
    with worker_resources(short) as in_steps:
        position = ""
        while position < MANY[4]:
            run = prove(in_steps, 0).run
            assert run is not None
            position = run.after
        close_account(resources, position)
        assert rows(settings, "SELECT after FROM proof_run") == [(MANY[MANY.index(position) - 1],)]
    assert run_to_its_end(short)[3] == []
