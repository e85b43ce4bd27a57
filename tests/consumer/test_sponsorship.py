"""The pool's stream, drained on real servers: what is given, what flows back, what is refused, and the proof."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from config.settings import DEFAULT_CATALOGUE, Settings, load_settings
from tests.support.books import assert_proved, open_dead_letters
from tests.support.ledger import give_account, rows
from tests.support.processes import killed_in
from tests.support.resources import worker_resources
from tests.support.sponsorship import drain_pool, pool_row
from tests.support.waiting import wait_until
from worker.admin import accounts, dead_letters, erasure
from worker.consumer import sponsorship as consumer_sponsorship
from worker.consumer.drain import drain_stream
from worker.errors import AccountError
from worker.keyspace import keys
from worker.ledger import sponsorship
from worker.ledger.connection import batch_connection
from worker.reports.proof import verify_ledger
from worker.resources import Resources
from worker.rules.sponsorship import PoolStanding, hash_of

USER = "user-42"
NOW_MS = int(datetime(2026, 11, 20, 10, tzinfo=UTC).timestamp() * 1_000)
INITIAL = 10_000


def send(redis: Redis, **fields: object) -> str:
    """Append a stream entry to the pool's stream."""
    raw: Any = redis.xadd(keys.SPONSORSHIP.entries, {"v": "1", **{name: str(value) for name, value in fields.items()}})
    return str(raw.decode())


def send_grant(redis: Redis, request: str, absorbed: int, **fields: object) -> str:
    """Append the settlement of a request that held and cost what the pool absorbs."""
    redis.hset(keys.SPONSORSHIP.promised, mapping={f"g:{request}": absorbed})
    redis.hincrby(keys.SPONSORSHIP.promised, "total", absorbed)
    grant = {"user": USER, "held": absorbed, "actual": absorbed, "paid": 0, "absorbed": absorbed, "window": NOW_MS}
    grant |= {"tier": "elite", "budget": 1_000, "late": 0}
    return send(redis, k="grant", request=request, **{**grant, **fields})


def test_a_batch_gives_takes_and_is_written_once(settings: Settings, redis: Redis, resources: Resources) -> None:
    send_grant(redis, "a", 40)
    send(redis, k="credit", request="b", paid=509)
    send_grant(redis, "c", 30, actual=80, paid=50, held=35)
    assert drain_pool(resources) == 3
    assert pool_row(settings) == (INITIAL, INITIAL - 40 + 50 - 30 + 5, 4)
    assert rows(
        settings, "SELECT seq, user_id, held, actual, paid, absorbed, pool_after FROM sponsor_grant ORDER BY 1"
    ) == [
        (1, USER, 40, 40, 0, 40, 9_960),
        (3, USER, 35, 80, 50, 30, 9_980),
    ]
    assert rows(settings, "SELECT seq, paid, share_percent, credited, pool_after FROM sponsor_credit ORDER BY 1") == [
        (2, 509, 10, 50, 10_010),
        (4, 50, 10, 5, 9_985),
    ]
    assert redis.xlen(keys.SPONSORSHIP.entries) == 0
    assert redis.exists(keys.SPONSORSHIP.promised) == 0
    assert_proved(resources)


def test_the_share_may_be_a_fraction_of_a_percent_and_the_first_amount_comes_from_the_environment(
    settings: Settings, redis: Redis, tmp_path: Path
) -> None:
    path = tmp_path / "catalogue.toml"
    text = DEFAULT_CATALOGUE.read_text(encoding="utf-8")
    path.write_text(text.replace("paid_share_percent = 10", 'paid_share_percent = "2.5"'), encoding="utf-8")
    environ = {"METERFALL_SPONSOR_INITIAL_UNITS": "123", "METERFALL_CATALOGUE_PATH": str(path)}
    own = load_settings(environ, database_url=settings.database_url, redis_url=settings.redis_url)
    with worker_resources(own) as resources:
        for request, paid in (("a", 39), ("b", 509)):  # 0.975 and 12.725 units
            send(redis, k="credit", request=request, paid=paid)
        drain_pool(resources)
        assert rows(own, "SELECT share, credited, pool_after FROM sponsor_credit ORDER BY seq") == [
            (Decimal("2.5"), 0, 123),
            (Decimal("2.5"), 12, 135),
        ]
        assert pool_row(own)[:2] == (123, 135)
        assert_proved(resources)


def test_a_cached_pool_is_replaced_and_ids_leave_with_it(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    redis.set(keys.SPONSORSHIP.pool, "1 0\n10000")
    redis.set(keys.SPONSORSHIP.pool_lease, "somebody")
    send_grant(redis, "a", 40)
    drain_pool(resources)
    assert redis.get(keys.SPONSORSHIP.pool) == b"1 1\n9960"
    assert 0 < redis.pttl(keys.SPONSORSHIP.pool) <= settings.cache_ttl_ms
    assert redis.exists(keys.SPONSORSHIP.pool_lease, keys.SPONSORSHIP.promised) == 0


def test_what_comes_again_is_known_and_leaves_all_the_same(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    send_grant(redis, "a", 40, paid=20, actual=60)
    drain_pool(resources)
    send_grant(redis, "a", 40, paid=20, actual=60)
    send(redis, k="credit", request="a", paid=20)
    send_grant(redis, "b", 1)
    send_grant(redis, "b", 1)
    assert drain_pool(resources) == 4
    assert pool_row(settings) == (INITIAL, INITIAL - 40 + 2 - 1, 3)
    assert open_dead_letters(resources) == []
    assert redis.exists(keys.SPONSORSHIP.promised) == 0
    assert_proved(resources)


def test_a_request_that_says_something_else_the_second_time_is_a_dead_letter(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    send_grant(redis, "a", 40)
    send_grant(redis, "a", 41)
    send(redis, k="credit", request="b", paid=100)
    send(redis, k="credit", request="b", paid=200)
    drain_pool(resources)
    assert pool_row(settings) == (INITIAL, INITIAL - 40 + 10, 2)
    assert open_dead_letters(resources) == [
        ("id_conflict", "request: recorded with actual 40, paid 0"),
        ("id_conflict", "request: credited with paid 100"),
    ]
    with pytest.raises(dead_letters.DeadLetterError, match="only our scripts write"):
        dead_letters.replay(resources, dead_letters.listed(resources)[0].id)
    assert_proved(resources)


def test_a_settlement_that_is_refused_credits_nothing(settings: Settings, redis: Redis, resources: Resources) -> None:
    """The first one stands, whatever the second one says of what was paid."""
    send_grant(redis, "a", 40)
    send_grant(redis, "a", 40, actual=140, paid=100)
    drain_pool(resources)
    assert open_dead_letters(resources) == [("id_conflict", "request: recorded with actual 40, paid 0")]
    assert pool_row(settings) == (INITIAL, INITIAL - 40, 1)
    assert_proved(resources)


def test_the_pool_never_gives_more_than_it_has(settings: Settings, redis: Redis, resources: Resources) -> None:
    """Redis promises no more than the ledger has, unless that was restored from a backup."""
    send_grant(redis, "a", INITIAL - 10, budget=2 * INITIAL)
    send_grant(redis, "b", 25, budget=2 * INITIAL)
    send(redis, k="credit", request="c", paid=1_000)
    send_grant(redis, "d", 25, budget=2 * INITIAL)
    drain_pool(resources)
    assert rows(settings, "SELECT absorbed, pool_after FROM sponsor_grant ORDER BY seq") == [
        (INITIAL - 10, 10),
        (10, 0),
        (25, 75),
    ]
    assert_proved(resources)


@pytest.mark.parametrize(
    ("fields", "reason", "detail"),
    [
        ({"k": "grant"}, "bad_pool_entry", "user: Field required"),
        ({"k": "credit", "request": "a"}, "bad_pool_entry", "paid: Field required"),
        ({"k": "credit", "request": "a", "paid": -1}, "bad_pool_entry", "paid: Input should be greater than or equal"),
        ({"k": "credit", "request": "a", "paid": 10**12 + 1}, "bad_pool_entry", "paid: Input should be less than"),
        ({"k": "credit", "request": "a", "paid": "1e3"}, "bad_pool_entry", "paid: Input should be a valid integer"),
        ({"k": "credit", "request": "a b", "paid": 1}, "bad_pool_entry", "request: String should match"),
        ({"k": "credit", "request": "a", "paid": 1, "x": 1}, "bad_pool_entry", "x: Extra inputs"),
        ({"k": "gift", "request": "a"}, "bad_pool_entry", "field k: must be grant or credit (got 'gift')"),
        ({"e": "{}"}, "bad_pool_entry", "field k: must be grant or credit (got '')"),
        ({"r": "{p0}\n"}, "bad_pool_entry", "r: String should match"),
        ({"v": "2", "r": USER}, "bad_version", "field v: must be 1"),
        (
            {"k": "credit", "request": "a" * 70_000, "paid": 1},
            "too_large",
            "at most 66560 bytes in 16 fields",
        ),
    ],
)
def test_what_no_script_writes_is_a_dead_letter(
    settings: Settings, redis: Redis, resources: Resources, fields: dict[str, object], reason: str, detail: str
) -> None:
    redis.xadd(keys.SPONSORSHIP.entries, {"v": "1", **{name: str(value) for name, value in fields.items()}})
    send_grant(redis, "neighbour", 1)
    drain_pool(resources)
    ((found, sentence),) = open_dead_letters(resources)
    assert (found, sentence[: len(detail)]) == (reason, detail)
    assert pool_row(settings) == (INITIAL, INITIAL - 1, 1)
    assert redis.xlen(keys.SPONSORSHIP.entries) == 0


def test_a_grant_of_more_than_was_held_or_left_to_pay_is_refused(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    send_grant(redis, "a", 40, held=39)
    send_grant(redis, "b", 40, held=60, actual=60, paid=21)
    drain_pool(resources)
    assert {sentence for _, sentence in open_dead_letters(resources)} == {
        "absorbed: more than was held, or than was left to pay"
    }
    assert pool_row(settings) == (INITIAL, INITIAL, 0)


def test_a_change_of_trust_is_forgotten_in_redis_once_it_is_committed(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER)
    redis.set(keys.SPONSORSHIP.standing(USER), "1 1\nnew 0 0")
    redis.set(keys.SPONSORSHIP.standing_lease(USER), "somebody")
    assert not accounts.set_trust(resources, USER, "trusted").repeated
    assert redis.exists(keys.SPONSORSHIP.standing(USER)) == 1
    drain_pool(resources)
    assert redis.exists(keys.SPONSORSHIP.standing(USER), keys.SPONSORSHIP.standing_lease(USER)) == 0
    assert accounts.set_trust(resources, USER, "trusted").repeated
    assert redis.xlen(keys.SPONSORSHIP.entries) == 0
    with pytest.raises(AccountError, match="trust: unknown 'friend'; there are new, established, trusted, elite"):
        accounts.set_trust(resources, USER, "friend")
    assert_proved(resources)


def test_a_drain_waits_for_whoever_changes_the_trust(settings: Settings, redis: Redis, resources: Resources) -> None:
    """It must not make Redis forget before the new tier can be read."""
    give_account(settings, USER)
    redis.set(keys.SPONSORSHIP.standing(USER), "1 1\nnew 0 0")
    send(redis, r=USER)
    send_grant(redis, "a", 1, user="another")
    assert settings.database_url is not None
    quick = settings.model_copy(update={"lock_timeout_ms": 50})
    with psycopg.connect(settings.database_url) as holder:
        holder.execute("SELECT FROM account WHERE user_id = %s FOR UPDATE", (USER,))
        with worker_resources(quick) as own:
            drain_pool(own)
        assert redis.exists(keys.SPONSORSHIP.standing(USER)) == 1
        assert redis.xlen(keys.SPONSORSHIP.entries) == 1
        assert pool_row(settings) == (INITIAL, INITIAL - 1, 1)
    drain_pool(resources)
    assert redis.exists(keys.SPONSORSHIP.standing(USER)) == 0


def test_the_grants_of_a_closed_account_are_kept_under_its_history(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER)
    send_grant(redis, "a", 40)
    drain_pool(resources)
    pseudonym = erasure.close_account(resources, USER)
    send_grant(redis, "b", 2)  # settled before, applied after
    send_grant(redis, "a", 40)
    drain_pool(resources)
    assert rows(settings, "SELECT DISTINCT user_id FROM sponsor_grant") == [(pseudonym,)]
    assert open_dead_letters(resources) == []
    assert_proved(resources)


def test_a_grant_that_is_written_while_its_account_is_closed_joins_the_history(
    settings: Settings, redis: Redis, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_account(settings, USER)
    send_grant(redis, "a", 40)
    work_out = consumer_sponsorship.work_out
    closing: list[Future[str]] = []

    def close_meanwhile(*args: Any) -> Any:
        """The batch has asked who is closed, and nobody was."""
        closing.append(threads.submit(erasure.close_account, resources, USER))
        wait_until(lambda: closing[0].done() or waits_for_a_lock(settings), "the account is closed, or that waits")
        return work_out(*args)

    monkeypatch.setattr(consumer_sponsorship, "work_out", close_meanwhile)
    with ThreadPoolExecutor(1) as threads:
        drain_pool(resources)
    assert rows(settings, "SELECT user_id FROM sponsor_grant") == [(closing[0].result(),)]
    assert_proved(resources)


def waits_for_a_lock(settings: Settings) -> bool:
    """True while some connection to the test's database does."""
    waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(rows(settings, waiting))


@pytest.mark.parametrize("label", ["after_read", "inside_transaction", "after_commit", "after_publish"])
def test_a_worker_killed_anywhere_gives_once(
    settings: Settings, redis: Redis, resources: Resources, label: str
) -> None:
    quick = settings.model_copy(update={"hand_grace_ms": 1})
    send_grant(redis, "a", 40, actual=60, paid=20)
    send(redis, k="credit", request="b", paid=10)
    killed_in(quick, lambda resources: drain_stream(resources, keys.SPONSORSHIP), label)
    drain_pool(resources)
    assert pool_row(settings) == (INITIAL, INITIAL - 40 + 2 + 1, 3)
    assert redis.xlen(keys.SPONSORSHIP.entries) == 0
    assert redis.exists(keys.SPONSORSHIP.promised) == 0
    assert_proved(resources)


def test_an_entry_that_kills_workers_is_a_dead_letter_in_the_end(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    quick = settings.model_copy(update={"hand_grace_ms": 1, "batch_max_events": 16, "poison_deaths": 2})
    for number in range(4):
        send_grant(redis, f"request-{number}", 1)
    for _ in range(3):  # in hand with others, then alone, and alone again
        killed_in(quick, lambda resources: drain_stream(resources, keys.SPONSORSHIP), "poison:request-2")
    with worker_resources(quick) as own:
        drain_pool(own)
    assert [reason for reason, _ in open_dead_letters(resources)] == ["poison"]
    assert pool_row(settings) == (INITIAL, INITIAL - 3, 3)
    assert redis.exists(keys.SPONSORSHIP.promised) == 0


def test_a_row_that_postgres_refuses_is_found_and_its_neighbours_are_applied(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("ALTER TABLE sponsor_grant ADD CONSTRAINT spoilt CHECK (absorbed <> 13)")
    try:
        for number in (12, 13, 14):
            send_grant(redis, f"request-{number}", number)
        drain_pool(resources)
    finally:
        with psycopg.connect(settings.database_url) as connection:
            connection.execute("ALTER TABLE sponsor_grant DROP CONSTRAINT spoilt")
    assert [reason for reason, _ in open_dead_letters(resources)] == ["data_error"]
    assert pool_row(settings) == (INITIAL, INITIAL - 26, 2)
    assert redis.exists(keys.SPONSORSHIP.promised) == 0
    assert_proved(resources)


def test_what_was_promised_to_a_settlement_that_is_refused_returns_to_the_pool(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    send_grant(redis, "a", 40, held=39)
    assert redis.hget(keys.SPONSORSHIP.promised, "g:a") == b"40"
    drain_pool(resources)
    assert [reason for reason, _ in open_dead_letters(resources)] == ["bad_pool_entry"]
    assert redis.exists(keys.SPONSORSHIP.promised) == 0
    assert_proved(resources)


@pytest.fixture
def proved(settings: Settings, redis: Redis, resources: Resources) -> Iterator[psycopg.Connection]:
    """A connection to a ledger whose pool has some history, with the triggers off."""
    send_grant(redis, "a", 40)
    send(redis, k="credit", request="b", paid=100)
    drain_pool(resources)
    assert_proved(resources)
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        yield connection


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("UPDATE sponsor_pool SET balance = balance + 1", "its grants and credits make it"),
        ("UPDATE sponsor_pool SET initial = initial + 1", "says 9960 after it, replayed 9961"),
        ("UPDATE sponsor_pool SET seq = seq + 1", "its grants and credits make it"),
        ("UPDATE sponsor_grant SET absorbed = 39", "says 9960 after it, replayed 9961"),
        ("UPDATE sponsor_grant SET pool_after = 1", "says 1 after it, replayed 9960"),
        ("UPDATE sponsor_grant SET daily_budget = 39", "the budget was 39"),
        ("DELETE FROM sponsor_credit", "its grants and credits make it"),
        ("UPDATE sponsor_credit SET seq = 3", "expected seq 2"),
        ("DELETE FROM sponsor_pool", "no pool"),
    ],
)
def test_verify_names_whatever_is_wrong_with_the_pool(
    proved: psycopg.Connection, resources: Resources, wrong: str, named: str
) -> None:
    proved.execute(wrong)
    differences = verify_ledger(resources).differences
    assert differences
    assert any(named in difference for difference in differences), differences


def test_verify_compares_the_pool_with_redis(settings: Settings, redis: Redis, resources: Resources) -> None:
    send_grant(redis, "a", 40)
    drain_pool(resources)
    redis.set(keys.SPONSORSHIP.pool, "1 1\n9961")
    redis.hset(keys.SPONSORSHIP.promised, mapping={"h:x": 5, "total": 6})
    redis.hset(keys.SPONSORSHIP.today(USER), mapping={"start": NOW_MS, "absorbed": 5, "h:x": 5, "total": 9})
    assert sorted(verify_ledger(resources).differences) == [
        "pool: Redis says '1 1\\n9961', the ledger '1 1\\n9960'",
        f"pool: {keys.SPONSORSHIP.promised} has total 6, its ids sum to 5",
        f"pool: {keys.SPONSORSHIP.today(USER)} has total 9, its ids sum to 10",
    ]
    redis.set(keys.SPONSORSHIP.pool, "1 0\n10000")  # an older version: it may lag behind
    redis.delete(keys.SPONSORSHIP.promised, keys.SPONSORSHIP.today(USER))
    assert_proved(resources)


def test_verify_finds_a_grant_that_is_applied_and_still_promised(settings: Settings, redis: Redis) -> None:
    with worker_resources(settings.model_copy(update={"pending_alarm_seconds": 1})) as resources:
        send_grant(redis, "a", 40)
        drain_pool(resources)
        redis.hset(keys.SPONSORSHIP.promised, mapping={"g:a": 40, "total": 40})
        assert_proved(resources)
        with batch_connection(resources.engine) as postgres:
            postgres.execute("SET session_replication_role = replica")
            postgres.execute("UPDATE sponsor_grant SET created_at = created_at - interval '2 seconds'")
            postgres.commit()
        assert verify_ledger(resources).differences == ["pool: a is applied and still promised"]


def test_grants_and_credits_are_append_only(settings: Settings, redis: Redis, resources: Resources) -> None:
    send_grant(redis, "a", 40, actual=60, paid=20)
    drain_pool(resources)
    with batch_connection(resources.engine) as postgres:
        for statement in (
            "UPDATE sponsor_grant SET absorbed = 1",
            "UPDATE sponsor_grant SET user_id = 'closed:x'",
            "DELETE FROM sponsor_grant",
            "TRUNCATE sponsor_grant",
            "UPDATE sponsor_credit SET credited = 1",
            "DELETE FROM sponsor_credit",
            "TRUNCATE sponsor_credit",
        ):
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="append-only"):
                postgres.execute(statement)
            postgres.rollback()


def test_where_a_user_stands_is_the_last_window(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, USER)
    day = 86_400_000
    for request, absorbed, window in (("a", 40, NOW_MS - day), ("b", 7, NOW_MS), ("c", 5, NOW_MS)):
        send_grant(redis, request, absorbed, window=window)
    drain_pool(resources)
    with batch_connection(resources.engine) as postgres:
        found = sponsorship.read_standing(postgres, USER)
        assert (found.tier, found.window_start, found.absorbed) == ("new", datetime(2026, 11, 20, 10, tzinfo=UTC), 12)
        assert sponsorship.read_standing(postgres, "nobody") == PoolStanding(None, 0, 1, None, 0)
        assert sponsorship.is_recorded(postgres, hash_of("a"))
        assert not sponsorship.is_recorded(postgres, hash_of("d"))
