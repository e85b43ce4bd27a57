"""Stream entries with ids from the future: the ledger's clock counts, and the stream begins anew once it is empty."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from loguru import logger
from redis import Redis
from redis.exceptions import ResponseError

from config.settings import Settings
from schemas.events import Refusal, UsageEvent
from tests.client.clients import open_client
from tests.support.commands import Meterfall
from tests.support.entries import CATALOGUE, entry
from tests.support.ledger import give_account, move_clock, rows
from tests.support.payloads import payload
from tests.support.processes import dyno
from tests.support.resources import worker_resources
from tests.support.signatures import SECRETS, signature
from tests.support.streams import drain, is_paused, partition_of, pending_of
from tests.support.waiting import wait_until
from worker.admin import accounts
from worker.admin.partitions import resume
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.consumer.intake import Intake
from worker.consumer.refusals import RefusalLog
from worker.errors import InvalidRequest, RedisUnavailable
from worker.keyspace import calls, scripts
from worker.keyspace.entries import LAST_ID
from worker.keyspace.keys import SPONSORSHIP, Partition
from worker.reports.proof import verify_ledger
from worker.reports.status import read_status
from worker.resources import Resources
from worker.rules.entry_times import END_OF_TIME, entered_at, is_ahead
from worker.rules.received import Event, Refused

USER, METER = "u1", "credits"
NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)


def days_ahead(days: int) -> str:
    """The id of an entry so many days ahead of the real clock."""
    return f"{int(time.time() * 1_000) + days * 86_400_000}-0"


# Ahead by more than events may be old; of the year 3000; and such that nothing can follow.
AHEAD: dict[str, Callable[[], str]] = {
    "40 days": lambda: days_ahead(40),
    "the year 3000": lambda: "32503680000000-0",
    "the end": lambda: LAST_ID,
}


@pytest.fixture(params=AHEAD)
def id_ahead(request: pytest.FixtureRequest) -> str:
    """The id of an entry from the future."""
    return AHEAD[request.param]()


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    """A client; the user has 1,000 credits."""
    give_account(settings, USER)
    with Billing.connect(settings) as client:
        yield client


def send(redis: Redis, settings: Settings, event_id: str, entry_id: str = "*", **fields: object) -> None:
    """Append an event as a producer in another language does."""
    event = {"event_id": event_id, "user_id": USER, "meter": METER, "quantity": 1, **fields}
    redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": json.dumps(event)}, id=entry_id)


def last_id_of(redis: Redis, settings: Settings) -> str | None:
    """The last id that the stream has given out; None without a stream."""
    try:
        found: str = redis.xinfo_stream(partition_of(settings, USER).entries)["last-generated-id"].decode()
    except ResponseError:
        return None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What time it is


@pytest.mark.parametrize("ahead", [timedelta(days=40), timedelta(days=360_000)])
def test_the_clock_counts_where_an_id_is_ahead_of_it(ahead: timedelta) -> None:
    assert entered_at(f"{int((NOW + ahead).timestamp() * 1_000)}-7", NOW) == NOW
    assert entered_at(LAST_ID, NOW) == NOW
    before = NOW - timedelta(seconds=5)
    assert entered_at(f"{int(before.timestamp() * 1_000)}-7", NOW) == before
    assert (is_ahead(LAST_ID, NOW), is_ahead(f"{int(before.timestamp() * 1_000)}-0", NOW)) == (True, False)


def test_an_id_that_is_ahead_by_what_clocks_differ_says_the_time() -> None:
    little = NOW + timedelta(milliseconds=900)
    assert entered_at(f"{int(little.timestamp() * 1_000)}-0", NOW) == little


def test_an_id_after_the_end_of_dates_is_a_time_without_a_clock() -> None:
    assert entered_at(LAST_ID, END_OF_TIME) == END_OF_TIME


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "by the model"])
@pytest.mark.parametrize("raw_id", [b"1800000000000-0", b"32503680000000-0", LAST_ID.encode()])
def test_age_and_clamping_are_measured_from_the_clock(raw_id: bytes, fast: bool) -> None:
    intake = Intake(Partition(0), Settings(partitions=1), CATALOGUE)

    def judged(**fields: str) -> Event | Refused:
        data = payload(**fields)
        (found,) = intake.receive([entry(data if fast else data.replace(b":", b": ", 1), raw_id=raw_id)], NOW)
        assert isinstance(found, Event | Refused)
        return found

    fresh = judged(occurred_at="2026-10-27T00:00:00Z")
    assert isinstance(fresh, Event)
    assert (fresh.occurred_at[:10], fresh.clamped) == ("2026-10-27", False)
    old = judged(occurred_at="2026-10-26T00:00:00Z")
    assert isinstance(old, Refused)
    assert old.reason is Refusal.TOO_OLD
    ahead = judged(occurred_at="2026-11-30T12:05:01Z")
    assert isinstance(ahead, Event)
    assert (ahead.occurred_at, ahead.clamped) == (NOW.isoformat(), True)
    without = judged()
    assert isinstance(without, Event)
    assert (without.occurred_at, without.clamped) == (NOW.isoformat(), False)


def test_a_key_ends_by_the_clock() -> None:
    signing_keys = f"tts={SECRETS['tts']}@2026-12-10T00:00:00Z"
    settings = Settings.model_validate({"partitions": 1, "signing_keys": signing_keys, "signatures": "required"})
    intake = Intake(Partition(0), settings, CATALOGUE)
    data = payload()
    item = entry(data, raw_id=LAST_ID.encode(), s=signature(data))
    (before,) = intake.receive([item], NOW)
    assert isinstance(before, Event)
    (after,) = intake.receive([item], NOW + timedelta(days=11))
    assert isinstance(after, Refused)
    assert after.reason is Refusal.EXPIRED_SIGNATURE


# ---------------------------------------------------------------------------------------------------------------------
# The stream


def test_later_events_are_billed_and_the_stream_begins_anew(
    billing: Billing, redis: Redis, settings: Settings, resources: Resources, id_ahead: str
) -> None:
    send(redis, settings, "ahead", id_ahead)
    if id_ahead == LAST_ID:
        for _ in range(2):  # refused, and not remembered: the second is no repeat
            with pytest.raises(RedisUnavailable, match="exhausted"):
                billing.charge(USER, METER, 10, "c1")
        with pytest.raises(ResponseError, match="exhausted"):
            accounts.set_status(resources, USER, "past_due")
        assert accounts.show(resources, USER).status == "active", "a change that cannot be published is not made"
        assert pending_of(redis, settings, USER, METER) == {}
    else:
        assert not billing.charge(USER, METER, 10, "c1").repeated
        send(redis, settings, "mine", occurred_at=datetime.now(UTC).isoformat())
        assert last_id_of(redis, settings) is not None
    drain(settings, USER)
    assert rows(settings, "SELECT count(*) FROM dead_letter") == [(0,)]
    assert last_id_of(redis, settings) is None
    assert billing.charge(USER, METER, 10, "c1").repeated is (id_ahead != LAST_ID)
    send(redis, settings, "mine", occurred_at=datetime.now(UTC).isoformat())
    assert abs(int(str(last_id_of(redis, settings)).split("-")[0]) / 1_000 - time.time()) < 60
    drain(settings, USER)
    found = rows(settings, "SELECT event_id, amount, occurred_at FROM usage_log ORDER BY event_id")
    assert [row[:2] for row in found] == [("ahead", 1), ("c1", 10), ("mine", 1)]
    assert all(row[2] <= datetime.now(UTC) + timedelta(seconds=2) for row in found)  # type: ignore[operator]
    assert pending_of(redis, settings, USER, METER) == {}
    assert verify_ledger(resources).differences == []


def test_entries_from_the_future_fill_several_batches(redis: Redis, settings: Settings) -> None:
    """What is read ahead of the lock is judged by the clock of the batch before."""
    give_account(settings, USER)
    small = settings.model_copy(update={"batch_max_events": 3, "read_chunk_events": 2})
    send(redis, settings, "e0", days_ahead(40))
    for number in range(1, 10):
        send(redis, settings, f"e{number}", occurred_at=datetime.now(UTC).isoformat())
    drain(small, USER)
    assert rows(settings, "SELECT count(*) FROM usage_log") == [(10,)]
    assert last_id_of(redis, settings) is None


def test_the_last_possible_entry_is_read_behind_many_others(redis: Redis, settings: Settings) -> None:
    give_account(settings, USER)
    for number in range(8):
        send(redis, settings, f"e{number}")
    send(redis, settings, "last", LAST_ID)
    drain(settings.model_copy(update={"batch_max_events": 3, "read_chunk_events": 1}), USER)
    assert rows(settings, "SELECT count(*) FROM usage_log") == [(9,)]


def test_a_stream_that_is_not_empty_or_not_ahead_stays(redis: Redis, settings: Settings) -> None:
    stream = partition_of(settings, USER)
    assert scripts.run(redis, calls.anew(stream)) is None
    send(redis, settings, "e1")
    redis.xtrim(stream.entries, maxlen=0)
    assert scripts.run(redis, calls.anew(stream)) is None
    assert last_id_of(redis, settings) is not None
    send(redis, settings, "e2", days_ahead(1))
    assert scripts.run(redis, calls.anew(stream)) is None
    assert redis.xlen(stream.entries) == 1
    redis.xtrim(stream.entries, maxlen=0)
    assert scripts.run(redis, calls.anew(stream)) is not None
    assert last_id_of(redis, settings) is None


def test_a_dyno_mends_a_stream_that_was_left_empty_and_ahead(redis: Redis, settings: Settings) -> None:
    """A drain was killed after it had published the last entry, or an older release drained it."""
    send(redis, settings, "e1", LAST_ID)
    redis.xtrim(partition_of(settings, USER).entries, maxlen=0)
    with dyno(settings):
        wait_until(lambda: last_id_of(redis, settings) is None, "the stream begins anew")


def test_the_pools_stream_begins_anew_also(redis: Redis, settings: Settings, resources: Resources) -> None:
    redis.xadd(SPONSORSHIP.entries, {"v": "1", "k": "credit", "request": "r", "paid": "100"}, id=LAST_ID)
    drain_stream(resources, SPONSORSHIP)
    assert rows(settings, "SELECT paid FROM sponsor_credit") == [(100,)]
    assert not redis.exists(SPONSORSHIP.entries)


def test_operators_are_told(
    billing: Billing, redis: Redis, settings: Settings, resources: Resources, command_server: subprocess.Popen[str]
) -> None:
    meterfall = Meterfall(command_server, settings)
    number = partition_of(settings, USER).number
    send(redis, settings, "e1", days_ahead(40))
    assert read_status(resources).partitions[number].ahead_ms > 39 * 86_400_000
    assert f"partition {number} is 40.0 days ahead" in " ".join(meterfall("status").out.split())
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="ERROR")
    now = [0.0]
    log = RefusalLog(lambda: now[0])
    try:
        for at in (0, 30, 61):
            now[0] = at
            send(redis, settings, f"at-{at}", days_ahead(41))
            drain_stream(resources, partition_of(settings, USER), refusals=log)
    finally:
        logger.remove(sink)
    assert len([line for line in lines if "ahead of the clock" in line]) == 2
    assert read_status(resources).partitions[number].ahead_ms == 0


def test_a_resume_does_not_let_through_what_comes_after_the_stream_began_anew(redis: Redis, settings: Settings) -> None:
    give_account(settings, USER)
    few = settings.model_copy(update={"pause_min_entries": 5})
    partition = partition_of(settings, USER)
    with worker_resources(few) as resources:
        redis.xadd(partition.entries, {"v": "1", "e": "nonsense"}, id=days_ahead(40))
        for _ in range(2):
            for _ in range(6):
                redis.xadd(partition.entries, {"v": "1", "e": "nonsense"})
            drain_stream(resources, partition)
            assert is_paused(resources, partition)
            assert resume(resources, partition, "jane") is not None
            drain_stream(resources, partition)
            assert not is_paused(resources, partition)
            assert redis.xlen(partition.entries) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Events that are too old are refused where they are made


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_emit_refuses_what_workers_would_refuse_as_too_old(kind: str, redis: Redis, settings: Settings) -> None:
    give_account(settings, USER)
    client = open_client(kind, settings)
    try:
        too_old = datetime.now(UTC) - timedelta(days=35, seconds=1)
        event = UsageEvent(event_id="e1", user_id=USER, meter=METER, quantity=1, occurred_at=too_old)
        refused = pytest.raises(InvalidRequest, match="occurred_at: must be at most 35 days ago")
        with refused as caught:
            client.emit(USER, METER, 1, event_id="e1", occurred_at=too_old)
        assert caught.value.field == "occurred_at"
        with refused:
            client.emit_events([event])
        assert redis.xlen(partition_of(settings, USER).entries) == 0
        client.emit(USER, METER, 1, event_id="e1", occurred_at=too_old + timedelta(minutes=5))
    finally:
        client.close()
    drain(settings, USER)
    assert rows(settings, "SELECT count(*) FROM usage_log") == [(1,)]


def test_an_entry_of_the_past_is_still_measured_by_its_own_time(redis: Redis, settings: Settings) -> None:
    """A backlog of some weeks: its events were in time when they came."""
    give_account(settings, USER)
    send(redis, settings, "e1", occurred_at=(datetime.now(UTC) - timedelta(days=34)).isoformat())
    move_clock(settings, timedelta(days=30))
    drain(settings, USER)
    assert rows(settings, "SELECT count(*) FROM usage_log") == [(1,)]
