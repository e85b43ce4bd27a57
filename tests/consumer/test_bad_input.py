"""Bad input through a whole drain: it becomes dead letters, its neighbours are billed, nobody else is touched."""

from __future__ import annotations

import json

import pytest
from redis import Redis

from config.settings import Settings
from schemas.events import Refusal
from tests.support.ledger import give_account, rows
from tests.support.payloads import MINIMAL, REFUSALS, payload, raw
from tests.support.resources import settings_for
from tests.support.streams import drain, partition_of
from worker.client import Billing
from worker.keyspace import keys

USER, METER = "u1", "credits"


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    """One partition, and a user with 1,000 credits who cannot be told from those in the bad payloads."""
    settings = settings_for(emptied_database_url, redis_url, partitions=1)
    give_account(settings, USER)
    return settings


def neighbour(number: int) -> bytes:
    """A valid event over one unit."""
    return payload(event_id=f"neighbour-{number}", quantity=1)


def billed(settings: Settings) -> list[str]:
    """Ids in the usage log, in the order in which they were applied."""
    return [str(row[0]) for row in rows(settings, "SELECT event_id FROM usage_log ORDER BY seq")]


def dead(settings: Settings) -> list[tuple[object, ...]]:
    """Reason and size of every dead letter."""
    return rows(settings, "SELECT reason, payload_bytes FROM dead_letter ORDER BY id")


def test_every_kind_of_bad_input_between_good_events(settings: Settings, redis: Redis) -> None:
    bad = [(reason, data) for reason, name, data in REFUSALS if name != "a lone surrogate"]
    stream = keys.Partition(0).entries
    for number, (_, data) in enumerate(bad):
        redis.xadd(stream, {"v": "1", "e": data})
        redis.xadd(stream, {"v": "1", "e": neighbour(number)})
    drain(settings, USER)
    assert redis.xlen(stream) == 0
    assert billed(settings) == [f"neighbour-{number}" for number in range(len(bad))]
    assert dead(settings) == [(reason.value, len(data)) for reason, data in bad]
    assert rows(settings, "SELECT used, rollover, purchased FROM balance") == [(len(bad), 0, 0)]
    assert rows(settings, "SELECT count(*) FROM account") == [(1,)]


def test_a_name_that_is_not_text_does_not_stop_the_partition(settings: Settings, redis: Redis) -> None:
    redis.xadd(keys.Partition(0).entries, {"v": "1", "e": payload()[:-1] + rb',"\ud800":1,"\ud800":2}'})
    redis.xadd(keys.Partition(0).entries, {"v": "1", "e": neighbour(0)})
    drain(settings, USER)
    assert billed(settings) == ["neighbour-0"]
    assert [reason for reason, _ in dead(settings)] == [Refusal.DUPLICATE_KEY.value]


@pytest.mark.parametrize(
    "data",
    [
        raw("dimensions", '{"a":1e-99999}'),
        raw("dimensions", '{"a":1e-17000}'),
        raw("dimensions", '{"a":' + "9" * 350 + "}"),
        raw("dimensions", '{"a":"\uffff"}'),
        raw("dimensions", '{"":1.5e300,"b":5e-324}'),
        payload(source="\u202e" * 256),
        payload(quantity=10**12, multiplier="0.999999"),
    ],
    ids=["tiny", "smaller than any numeric", "350 digits", "noncharacter", "floats", "marks", "large"],
)
def test_what_intake_accepts_the_ledger_takes(settings: Settings, redis: Redis, data: bytes) -> None:
    redis.xadd(keys.Partition(0).entries, {"v": "1", "e": data})
    drain(settings, USER)
    assert dead(settings) == []
    assert billed(settings) == ["e1"]


@pytest.mark.parametrize("offset", ["+15:59", "-15:59", "+16:00", "-23:59", "+23:59"])
def test_a_time_zone_far_out_is_no_data_error(settings: Settings, redis: Redis, offset: str) -> None:
    redis.xadd(keys.Partition(0).entries, {"v": "1", "e": neighbour(0)}, id="1795176000000-0")
    redis.xadd(
        keys.Partition(0).entries,
        {"v": "1", "e": payload(occurred_at=f"2026-11-19T12:00:00{offset}")},
        id="1795176000000-1",
    )
    drain(settings, USER)
    assert [reason for reason, _ in dead(settings)] in ([], [Refusal.BAD_OCCURRED_AT.value])


@pytest.mark.parametrize("entry_id", ["253402300800000-0", "18446744073709551614-0"])
def test_an_entry_id_out_of_the_calendar_does_not_stop_the_partition(
    settings: Settings, redis: Redis, entry_id: str
) -> None:
    redis.xadd(keys.Partition(0).entries, {"v": "1", "e": neighbour(0)})
    redis.xadd(keys.Partition(0).entries, {"v": "1", "e": neighbour(1)}, id=entry_id)
    drain(settings, USER)
    assert redis.xlen(keys.Partition(0).entries) == 0
    assert "neighbour-0" in billed(settings)


def test_hostile_names_touch_no_key_of_others(settings: Settings, redis: Redis) -> None:
    give_account(settings, "u1:x")
    with Billing.connect(settings) as client:
        for user in (USER, "u1:x"):
            client.reserve(user, METER, 100, "e1")
            client.emit(user, METER, 5, event_id="held-back")
        redis.delete(keys.Partition(0).entries)
        before = {name: redis.hgetall(name) for name in redis.keys("mf:*pending*")}
        for changes in (
            {"user_id": "u1", "meter": "x:credits", "event_id": "held-back"},
            {"user_id": "{p0}:pending:u1", "event_id": "held-back"},
            {"user_id": "u1:credits\r\nDEL x", "event_id": "held-back"},
            {"user_id": "u1", "meter": "credits", "event_id": "held-back\x00"},
        ):
            redis.xadd(
                keys.Partition(0).entries, {"v": "1", "e": json.dumps({**MINIMAL, **changes, "quantity": -1}), "m": "1"}
            )
        drain(settings, USER)
        assert {name: redis.hgetall(name) for name in redis.keys("mf:*pending*")} == before
    assert len(dead(settings)) == 4


def test_a_marked_entry_that_is_refused_leaves_pending(settings: Settings, redis: Redis) -> None:
    partition = partition_of(settings, USER)
    redis.hset(partition.account(USER).pending(METER), mapping={"e:e1": 5, "h:k": 2, "total": 7})
    redis.xadd(partition.entries, {"v": "1", "e": payload(colour="red"), "m": "1"})
    drain(settings, USER)
    assert redis.hgetall(partition.account(USER).pending(METER)) == {b"h:k": b"2", b"total": b"2"}
    assert dead(settings) == [(Refusal.UNKNOWN_FIELD.value, len(payload(colour="red")))]


def test_an_id_with_another_fingerprint(settings: Settings, redis: Redis) -> None:
    with Billing.connect(settings) as client:
        client.emit(USER, METER, 5, event_id="e1")
        client.emit(USER, METER, 6, event_id="e1")
        client.emit(USER, METER, 5, event_id="e1", multiplier="1.00")
        client.emit(USER, "premium_voice", 5, event_id="e1")
        drain(settings, USER)
        client.emit(USER, METER, 5, event_id="e1", multiplier="2")
        drain(settings, USER)
        assert [reason for reason, _ in dead(settings)] == [Refusal.ID_CONFLICT.value] * 3
        assert rows(settings, "SELECT meter, quantity, amount FROM usage_log") == [(METER, 5, 5)]
        assert redis.keys("mf:*pending*") == []
        assert client.check(USER, METER, 1).available == 995
