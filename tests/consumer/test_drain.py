"""The batch on real servers: applied once, in order, narrowed to the guilty event, published, and never lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import Any

import psycopg
import pytest
from redis import Redis

from config.settings import Settings
from tests.support.books import assert_proved, open_dead_letters
from tests.support.ledger import execute, give_account, rows, stop_clock
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import account_of, partition_of, pending_of, stream_of
from tests.support.waiting import wait_until
from worker.admin import accounts, credits, dead_letters
from worker.client import Billing
from worker.consumer.drain import Report, drain_stream
from worker.consumer.hand import Hand, Range, Taken
from worker.consumer.usage import UsageBooks
from worker.errors import AccountError
from worker.ledger import batch as ledger_batch
from worker.ledger.connection import batch_connection
from worker.ledger.partitions import Turn, try_lock_partition
from worker.reports import proof
from worker.reports.proof import verify_ledger
from worker.reports.status import read_status
from worker.resources import Resources

USER = "user-42"
METER = "premium_voice"


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    return settings_for(emptied_database_url, redis_url, lock_timeout_ms=200, hand_grace_ms=50)


def same_partition_as(settings: Settings, user_id: str, count: int) -> list[str]:
    """Other users of the same partition."""
    wanted = partition_of(settings, user_id)
    found = (f"other-{number}" for number in range(10_000) if partition_of(settings, f"other-{number}") == wanted)
    return [next(found) for _ in range(count)]


def send_raw(redis: Redis, settings: Settings, **fields: object) -> str:
    """Append an event as a producer in another language would."""
    event = {"user_id": USER, "meter": METER, "quantity": 1} | fields
    entry = redis.xadd(partition_of(settings, str(event["user_id"])).entries, {"v": "1", "e": json.dumps(event)})
    return str(entry)


def drain_user(resources: Resources, user_id: str = USER) -> Report:
    return drain_stream(resources, partition_of(resources.settings, user_id))


def parts_of(settings: Settings, user_id: str = USER) -> list[tuple[object, ...]]:
    return rows(
        settings,
        "SELECT event_id, from_subscription, from_rollover, from_purchased, overflow_to_debt, uncollected "
        "FROM usage_log WHERE user_id = %s ORDER BY seq, event_id",
        user_id,
    )


def test_events_pay_in_stream_order_and_leave_the_stream(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    accounts.open_new(resources, USER, "basic")
    credits.grant(resources, USER, METER, 500, "order-1")
    for event_id, quantity in (("a", 99_900), ("b", 300), ("c", 400)):
        send_raw(redis, settings, event_id=event_id, quantity=quantity)
    assert drain_user(resources).more is False
    assert parts_of(settings) == [
        ("a", 99_900, 0, 0, 0, 0),
        ("b", 100, 0, 200, 0, 0),
        ("c", 0, 0, 300, 100, 0),
    ]
    assert stream_of(redis, settings, USER) == []
    balance = accounts.show(resources, USER).balances[METER]
    assert (balance.used, balance.rollover, balance.purchased) == (100_000, -100, 0)
    assert_proved(resources)


def test_a_duplicate_is_absorbed_and_a_conflict_is_a_dead_letter(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    send_raw(redis, settings, event_id="a", quantity=5)
    send_raw(redis, settings, event_id="a", quantity=5)
    drain_user(resources)
    send_raw(redis, settings, event_id="a", quantity=5, source="again")
    send_raw(redis, settings, event_id="a", quantity=5, multiplier="1.000")
    send_raw(redis, settings, event_id="a", quantity=6)
    send_raw(redis, settings, event_id="a", quantity=5, meter="ocr_tokens")
    send_raw(redis, settings, event_id="a", quantity=5, multiplier="2")
    drain_user(resources)
    assert parts_of(settings) == [("a", 5, 0, 0, 0, 0)]
    assert [reason for reason, _ in open_dead_letters(resources)] == ["id_conflict"] * 3
    assert_proved(resources)


def test_the_same_id_of_another_user_is_another_event(settings: Settings, redis: Redis, resources: Resources) -> None:
    (other,) = same_partition_as(settings, USER, 1)
    give_account(settings, USER, "basic")
    give_account(settings, other, "basic")
    send_raw(redis, settings, event_id="a", quantity=5)
    send_raw(redis, settings, event_id="a", quantity=7, user_id=other)
    drain_user(resources)
    assert parts_of(settings) == [("a", 5, 0, 0, 0, 0)]
    assert parts_of(settings, other) == [("a", 7, 0, 0, 0, 0)]


def test_the_first_allowance_of_an_account_that_an_event_opened_counts_as_granted(
    settings: Settings, redis: Redis
) -> None:
    with worker_resources(settings.model_copy(update={"default_plan": "tenant"})) as resources:
        send_raw(redis, settings, event_id="a", quantity=30, meter="credits")
        drain_user(resources)
        send_raw(redis, settings, event_id="b", quantity=5, meter="credits")
        drain_user(resources)
        counters = "SELECT lifetime_granted, lifetime_consumed FROM balance WHERE meter = 'credits'"
        assert rows(settings, counters) == [(1_000, 35)]
        assert_proved(resources)


def test_an_unknown_user_is_uncollected_or_opened_on_the_default_plan(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    send_raw(redis, settings, event_id="a", quantity=5)
    drain_user(resources)
    assert parts_of(settings) == [("a", 0, 0, 0, 0, 5)]
    with worker_resources(settings.model_copy(update={"default_plan": "free"})) as opening:
        send_raw(redis, settings, event_id="b", quantity=6_000)
        drain_user(opening)
        assert accounts.show(opening, USER).plan == "free"
        assert_proved(opening)
    assert parts_of(settings) == [("b", 5_000, 0, 0, 1_000, 0), ("a", 0, 0, 0, 0, 5)]


def test_a_meter_outside_the_plan_has_no_allowance(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "core")
    credits.grant(resources, USER, METER, 3, "order-1")
    send_raw(redis, settings, event_id="a", quantity=5)
    send_raw(redis, settings, event_id="b", quantity=600, meter="relay_credits")
    drain_user(resources)
    assert parts_of(settings) == [("a", 0, 0, 3, 2, 0), ("b", 600, 0, 0, 0, 0)]
    assert_proved(resources)


def test_a_status_that_is_not_entitled_has_no_allowance(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "plus", status="trialing")
    for number, status in enumerate(("active", "past_due", "paused", "canceled", "active")):
        accounts.set_status(resources, USER, status)
        send_raw(redis, settings, event_id=f"e{number}", quantity=1)
        drain_user(resources)
    assert [row[1:5] for row in parts_of(settings)] == [
        (1, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 1), (1, 0, 0, 0),
    ]  # fmt: skip
    assert_proved(resources)


def test_bad_entries_become_dead_letters_and_the_rest_is_billed(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    stream = partition_of(settings, USER).entries
    send_raw(redis, settings, event_id="a")
    redis.xadd(stream, {"nonsense": "1"})
    redis.xadd(stream, {"v": "1", "e": b"\xff\x00"})
    redis.xadd(stream, {"v": "1", "e": "{}"})
    redis.xadd(stream, {"v": "1", "e": "{}"})
    send_raw(redis, settings, event_id="b", quantity=-1)
    send_raw(redis, settings, event_id="c")
    drain_user(resources)
    assert [row[0] for row in parts_of(settings)] == ["a", "c"]
    reasons = [reason for reason, _ in open_dead_letters(resources)]
    assert reasons == ["bad_version", "not_utf8", "missing_field", "missing_field", "bad_quantity"]
    assert redis.xlen(stream) == 0


def test_an_event_that_postgres_refuses_is_found_and_its_neighbours_are_billed(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    others = same_partition_as(settings, USER, 6)
    for user in (USER, *others):
        give_account(settings, user, "max")
    bound = 9 * 10**15
    execute(settings, "UPDATE balance SET used = %s WHERE user_id = %s AND meter = 'server_kokoro'", bound - 10, USER)
    for user in others[:3]:
        send_raw(redis, settings, event_id="before", user_id=user)
    send_raw(redis, settings, event_id="fits", meter="server_kokoro", quantity=10)
    send_raw(redis, settings, event_id="too-much", meter="server_kokoro", quantity=10)
    for user in others[3:]:
        send_raw(redis, settings, event_id="after", user_id=user)
    drain_user(resources)
    ((reason, detail),) = open_dead_letters(resources)
    assert reason == "data_error"
    assert detail.startswith("23514")
    assert rows(settings, "SELECT event_id FROM usage_log WHERE user_id = %s", USER) == [("fits",)]
    assert len(rows(settings, "SELECT 1 FROM usage_log WHERE user_id <> %s", USER)) == len(others)
    assert stream_of(redis, settings, USER) == []


def test_an_error_that_is_no_events_fault_halts_is_told_until_it_ends_and_loses_nothing(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    send_raw(redis, settings, event_id="a")
    execute(settings, "ALTER TABLE usage_log RENAME TO away")
    with pytest.raises(psycopg.errors.UndefinedTable):
        drain_user(resources)
    assert redis.exists(partition_of(settings, USER).halted)
    assert drain_user(resources) == Report(0, more=False)
    assert len(stream_of(redis, settings, USER)) == 1
    redis.delete(partition_of(settings, USER).halted)
    assert any("usage_log" in one.halted for one in read_status(resources).partitions)
    execute(settings, "ALTER TABLE away RENAME TO usage_log")
    drain_user(resources)
    assert parts_of(settings) == [("a", 1, 0, 0, 0, 0)]
    send_raw(redis, settings, event_id="b")
    assert not any(one.halted for one in read_status(resources).partitions)


def test_an_account_in_use_is_left_for_later_and_keeps_its_order(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    (other,) = same_partition_as(settings, USER, 1)
    give_account(settings, USER, "basic")
    give_account(settings, other, "basic")
    with worker_resources(settings.model_copy(update={"batch_max_events": 2})) as small, locked(settings, USER):
        for number in range(4):
            send_raw(redis, settings, event_id=f"e{number}")
            send_raw(redis, settings, event_id=f"e{number}", user_id=other)
        drain_user(small)
        assert len(parts_of(settings, other)) == 4
        assert parts_of(settings) == []
        assert len(stream_of(redis, settings, USER)) == 4
    drain_user(resources)
    assert [row[0] for row in parts_of(settings)] == ["e0", "e1", "e2", "e3"]
    assert_proved(resources)


@contextmanager
def locked(settings: Settings, user_id: str) -> Iterator[None]:
    """Hold the account's row lock for the length of the block."""
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("SELECT 1 FROM account WHERE user_id = %s FOR UPDATE", (user_id,))
        yield
        connection.rollback()


def test_recovery_keeps_the_order_of_an_account_in_use(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, USER, "basic")
    for number in range(40):
        send_raw(redis, settings, event_id=f"e{number}")
    partition = partition_of(settings, USER)
    redis.hset(partition.hand, mapping={"token": "dead", "first": "-", "size": 64, "deaths": 0})
    with locked(settings, USER):
        drain_user(resources)
        assert parts_of(settings) == []
    drain_user(resources)
    assert [row[0] for row in parts_of(settings)] == [f"e{number}" for number in range(40)]


def test_a_drain_that_was_taken_for_dead_leaves_the_partition_to_the_other(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    send_raw(redis, settings, event_id="a")
    partition = partition_of(settings, USER)
    books = UsageBooks(resources, partition)
    one, other = Hand(resources, partition, books), Hand(resources, partition, books)
    turn = Turn(True, False, None, None, datetime.now(UTC), 0)
    batch = one.take(Range(None, 10), turn)
    assert one.take(batch, turn) == batch
    other.take(Range(None, 10), turn)
    with pytest.raises(Taken):
        one.take(batch, turn)


def test_each_part_of_a_spoilt_batch_is_published_as_it_is_committed(
    settings: Settings, redis: Redis, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_account(settings, USER, "max")
    execute(settings, "UPDATE balance SET used = 9000000000000000 WHERE meter = 'server_kokoro'")
    for number in range(8):
        send_raw(redis, settings, event_id=f"bad{number}", meter="server_kokoro", quantity=1)
    left: list[int] = []
    update = ledger_batch.update

    def spy(*args: Any) -> None:
        left.append(len(stream_of(redis, settings, USER)))
        update(*args)

    monkeypatch.setattr(ledger_batch, "update", spy)
    drain_user(resources)
    assert left[-1] == 1
    assert len(open_dead_letters(resources)) == 8


def test_a_publish_of_another_epoch_does_not_leave_a_balance_nobody_can_judge(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    with Billing.connect(settings) as billing:
        billing.emit(USER, METER, 40, event_id="a")
        name = account_of(settings, USER).balance
        redis.set(name, f"2 4\n{METER} 100000 0 0 0 1")
        drain_user(resources)
        assert not redis.exists(name)
        assert billing.check(USER, METER).available == 99_960


def test_whoever_finds_the_partition_taken_ends(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, USER, "basic")
    send_raw(redis, settings, event_id="a")
    with batch_connection(resources.engine) as postgres:
        assert try_lock_partition(postgres, partition_of(settings, USER).number).is_ours
        assert drain_user(resources) == Report(0, more=False)
        assert len(stream_of(redis, settings, USER)) == 1
        postgres.rollback()
    assert drain_user(resources).entries == 1


def test_two_drains_of_one_partition_apply_each_event_once(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    small = settings.model_copy(update={"batch_max_events": 7, "hand_grace_ms": 1})
    for number in range(200):
        send_raw(redis, settings, event_id=f"e{number}")

    def keep_draining() -> None:
        with worker_resources(small) as mine:
            while redis.xlen(partition_of(settings, USER).entries):
                drain_user(mine)

    threads = [Thread(target=keep_draining) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [row[0] for row in parts_of(settings)] == [f"e{number}" for number in range(200)]
    assert_proved(resources)


def test_a_publish_shows_the_debit_and_removes_the_pending_id_together(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    with Billing.connect(settings) as billing:
        assert billing.check(USER, METER).available == 100_000
        billing.emit(USER, METER, 40, event_id="a")
        assert pending_of(redis, settings, USER, METER) == {"e:a": 40, "total": 40}
        before = billing.check(USER, METER)
        assert (before.available, before.pending, before.used) == (99_960, 40, 0)
        drain_user(resources)
        after = billing.check(USER, METER)
        assert (after.available, after.pending, after.used) == (99_960, 0, 40)
    assert pending_of(redis, settings, USER, METER) == {}


def test_a_marked_entry_leaves_pending_whatever_becomes_of_it(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    with Billing.connect(settings) as billing:
        billing.emit(USER, METER, 5, event_id="a")
        billing.emit(USER, METER, 5, event_id="a")
        drain_user(resources)
        billing.emit(USER, METER, 5, event_id="a")
        billing.emit(USER, METER, 6, event_id="a")
        billing.emit("nobody", METER, 6, event_id="a")
    partition = partition_of(settings, USER)
    pending = partition.account(USER).pending(METER)
    redis.hset(pending, mapping={"e:bad": 3, "total": 3 + int(redis.hget(pending, "total") or 0)})
    refused = {"event_id": "bad", "user_id": USER, "meter": METER, "quantity": 3, "surprise": True}
    redis.xadd(partition.entries, {"v": "1", "m": "1", "e": json.dumps(refused)})
    for user in (USER, "nobody"):
        drain_user(resources, user)
        assert pending_of(redis, settings, user, METER) == {}
    assert sorted(reason for reason, _ in open_dead_letters(resources)) == ["id_conflict", "unknown_field"]


def test_a_raw_event_closes_the_hold_that_it_names(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, USER, "basic")
    with Billing.connect(settings) as billing:
        billing.reserve(USER, METER, 100, key="job-1")
        send_raw(redis, settings, event_id="e1", quantity=70, hold_key="job-1")
        drain_user(resources)
        after = billing.check(USER, METER)
        assert (after.pending, after.used) == (0, 70)
        assert billing.release(USER, METER, "job-1").state.value == "settled"


def test_a_change_without_an_event_reaches_redis(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    drain_user(resources)
    with Billing.connect(settings) as billing:
        assert billing.check(USER, METER).purchased == 0
        credits.grant(resources, USER, METER, 250, "order-1")
        accounts.set_status(resources, USER, "unpaid")
        drain_user(resources)
        after = billing.check(USER, METER)
    assert (after.purchased, after.limit, after.available) == (250, 0, 250)


def test_an_account_brings_rollover_or_debt_along(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic", rollover={METER: 50, "ocr_tokens": -7})
    send_raw(redis, settings, event_id="a", quantity=100_060)
    send_raw(redis, settings, event_id="b", quantity=1, meter="ocr_tokens")
    drain_user(resources)
    assert parts_of(settings) == [("a", 100_000, 50, 0, 10, 0), ("b", 1, 0, 0, 0, 0)]
    assert accounts.show(resources, USER).balances["ocr_tokens"].rollover == -7
    assert_proved(resources)
    with pytest.raises(AccountError, match="rollover: 'relay_credits' takes none on this plan"):
        accounts.open_new(resources, "other", "core", rollover={"relay_credits": 1})


def test_a_grant_is_applied_once_per_key(resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    assert credits.grant(resources, USER, METER, 10, "order-1").repeated is False
    assert credits.grant(resources, USER, METER, 10, "order-1").repeated is True
    with pytest.raises(AccountError, match="key: order-1 was used for 10"):
        credits.grant(resources, USER, METER, 11, "order-1")
    with pytest.raises(AccountError, match="relay_credits takes no grants"):
        credits.grant(resources, USER, "relay_credits", 10, "order-2")
    assert accounts.show(resources, USER).balances[METER].purchased == 10
    assert_proved(resources)


def test_a_dead_letter_is_replayed_once_its_cause_is_gone(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    send_raw(redis, settings, event_id="a", quantity=9, meter="new_meter")
    drain_user(resources)
    (letter,) = dead_letters.listed(resources)
    assert letter.reason == "unknown_meter"
    payload = json.loads(letter.payload)
    mended = json.dumps(payload | {"meter": METER}).encode()
    execute(settings, "UPDATE dead_letter SET payload = %s, payload_bytes = %s", mended, len(mended))
    dead_letters.replay(resources, letter.id)
    drain_user(resources)
    assert parts_of(settings) == [("a", 9, 0, 0, 0, 0)]
    assert dead_letters.listed(resources) == []
    with pytest.raises(dead_letters.DeadLetterError, match="is replayed already"):
        dead_letters.drop(resources, letter.id)


def test_a_read_is_bounded_in_bytes(settings: Settings, redis: Redis) -> None:
    give_account(settings, USER, "basic")
    facts = {f"k{number}": "x" * 60 for number in range(24)}
    for number in range(150):
        send_raw(redis, settings, event_id=f"e{number}", dimensions=facts)
    with worker_resources(settings.model_copy(update={"batch_max_bytes": 65_536})) as resources:
        partition = partition_of(settings, USER)
        batch = Hand(resources, partition, UsageBooks(resources, partition)).read(None, 2_000)
        assert 0 < len(batch.items) < 60
        drain_user(resources)
    assert len(parts_of(settings)) == 150


def test_no_plan_for_the_log_is_kept_from_the_days_when_it_was_small(resources: Resources) -> None:
    with batch_connection(resources.engine) as postgres:
        for _ in range(2 * (postgres.prepare_threshold or 0) + 1):
            ledger_batch.load_for_update(postgres, ["u1"], (["u1"], ["e1"]))
        kept = [row[0] for row in postgres.execute("SELECT statement FROM pg_prepared_statements").fetchall()]
    assert any("FROM balance" in statement for statement in kept)
    assert not any("FROM usage_log" in statement for statement in kept)


def test_the_log_and_the_entries_are_append_only(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, USER, "basic")
    send_raw(redis, settings, event_id="a")
    drain_user(resources)
    for statement in (
        "UPDATE usage_log SET amount = 0",
        "DELETE FROM usage_log",
        "UPDATE ledger_entry SET seq = 9",
        "DELETE FROM ledger_entry",
        "TRUNCATE usage_log",
    ):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="append-only"):
            execute(settings, statement)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("UPDATE balance SET used = used + 1 WHERE meter = 'premium_voice'", "premium_voice has"),
        ("UPDATE balance SET purchased = 1 WHERE meter = 'ocr_tokens'", "ocr_tokens has"),
        ("UPDATE balance SET allowance = 1 WHERE meter = 'ocr_tokens'", "has allowance 1"),
        ("UPDATE balance SET lifetime_consumed = 1", "consumed 1"),
        ("UPDATE account SET status = 'paused'", "account status is paused"),
        ("UPDATE account SET seq = seq + 1", "account version is"),
        (
            "ALTER TABLE usage_log DISABLE TRIGGER USER; UPDATE usage_log SET from_subscription = 4, "
            "overflow_to_debt = 1",
            "the waterfall says",
        ),
        ("ALTER TABLE usage_log DISABLE TRIGGER USER; DELETE FROM usage_log", "premium_voice has"),
    ],
)
def test_verify_names_whatever_is_wrong(
    settings: Settings, redis: Redis, resources: Resources, wrong: str, named: str
) -> None:
    give_account(settings, USER, "basic")
    send_raw(redis, settings, event_id="a", quantity=5)
    drain_user(resources)
    assert_proved(resources)
    execute(settings, wrong)
    found = verify_ledger(resources).differences
    assert any(named in difference for difference in found), found


@pytest.mark.parametrize(
    ("kind", "bucket"),
    [
        (kind, bucket)
        for kind in ("grant", "clawback", "reversal", "transfer_out", "transfer_in")
        for bucket in ("used", "rollover", "purchased")
        if (kind, bucket) not in {("grant", "purchased"), ("transfer_in", "purchased")}  # these may be any amount
    ],
)
def test_verify_names_an_entry_that_moves_more_than_its_kind_may(
    settings: Settings, resources: Resources, redis: Redis, kind: str, bucket: str
) -> None:
    """Its changes, the balance after it and the stored balance agree."""
    for user_id in (USER, "user-43"):
        give_account(settings, user_id, "basic", buckets={METER: (9, 9, 9)})
    send_raw(redis, settings, event_id="a", quantity=5)
    drain_user(resources)
    entry: dict[str, Callable[[], object]] = {
        "grant": lambda: credits.grant(resources, USER, METER, 7, "k"),
        "clawback": lambda: credits.claw_back(resources, USER, METER, 9, "k"),
        "reversal": lambda: credits.reverse(resources, USER, "a"),
        "transfer_out": lambda: credits.carry_over(resources, USER, "user-43", "k", meter=METER),
        "transfer_in": lambda: credits.carry_over(resources, "user-43", USER, "k", meter=METER),
    }
    entry[kind]()
    resources.redis.flushdb()
    assert_proved(resources)
    execute(
        settings,
        "ALTER TABLE ledger_entry DISABLE TRIGGER USER; "
        f"UPDATE ledger_entry SET {bucket}_change = {bucket}_change + 1, {bucket}_after = {bucket}_after + 1 "
        f"WHERE user_id = '{USER}' AND kind = '{kind}'; ALTER TABLE ledger_entry ENABLE TRIGGER USER; "
        f"UPDATE balance SET {bucket} = {bucket} + 1 WHERE user_id = '{USER}' AND meter = '{METER}'",
    )
    found = verify_ledger(resources).differences
    assert [f"entry {kind} " in each and "the rules say" in each for each in found] == [True], found


def test_verify_compares_with_redis(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, USER, "basic")
    with Billing.connect(settings.model_copy(update={"pending_alarm_seconds": 1})) as billing:
        billing.check(USER, METER)
    name = account_of(settings, USER).balance
    text = redis.get(name)
    assert isinstance(text, bytes)
    redis.set(name, text.replace(b"premium_voice 100000 0", b"premium_voice 100000 7"))
    pending = account_of(settings, USER).pending(METER)
    redis.hset(pending, mapping={"e:a": 5, "total": 6})
    found = " ".join(verify_ledger(resources).differences)
    assert "Redis says" in found
    assert "pending premium_voice total 6, its ids sum to 5" in found


def test_verify_allows_for_boundaries_that_pass_while_it_replays(
    settings: Settings, redis: Redis, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_account(settings, USER, "free", buckets={METER: (5, 0, 0)})
    balance = accounts.show(resources, USER).balances[METER]
    assert balance.period_end is not None
    end = balance.period_end
    stop_clock(settings, end - timedelta(seconds=1))
    compare = proof.compare

    def slowly(*arguments: Any) -> Any:
        """The replay takes two seconds, and in between somebody asks."""
        stop_clock(settings, end)
        redis.flushdb()
        with Billing.connect(settings) as billing:
            assert billing.check(USER, METER).available == 5_000
        stop_clock(settings, end + timedelta(seconds=1))
        return compare(*arguments)

    monkeypatch.setattr(proof, "compare", slowly)
    assert_proved(resources)
    name = account_of(settings, USER).balance
    text = redis.get(name)
    assert isinstance(text, bytes)
    monkeypatch.setattr(proof, "compare", compare)
    redis.set(name, text.replace(b"premium_voice 5000 0", b"premium_voice 5000 7"))
    assert any("Redis says" in found for found in verify_ledger(resources).differences)


def test_verify_finds_an_applied_event_that_is_still_pending(settings: Settings, redis: Redis) -> None:
    give_account(settings, USER, "basic")
    with worker_resources(settings.model_copy(update={"pending_alarm_seconds": 1})) as resources:
        send_raw(redis, settings, event_id="a", quantity=5)
        drain_user(resources)
        redis.hset(account_of(settings, USER).pending(METER), mapping={"e:a": 5, "total": 5})
        expected = [f"{USER}: event a on {METER} was applied over 1 s ago and is pending"]
        wait_until(lambda: verify_ledger(resources).differences == expected, "the stale id is named")
