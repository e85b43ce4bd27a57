"""Pausing: too much that is no event stops a partition before it empties into the dead letters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from loguru import logger
from redis import Redis

from config.settings import Settings
from schemas.events import Refusal
from tests.support.ledger import give_account, rows
from tests.support.payloads import payload
from tests.support.processes import dyno, killed_in
from tests.support.resources import settings_for, worker_resources
from tests.support.signatures import KEYS, signature
from tests.support.streams import is_paused, pending_of
from tests.support.waiting import wait_until
from worker.admin import dead_letters
from worker.admin import partitions as admin_partitions
from worker.admin.losses import recount
from worker.admin.partitions import MARK_MS, latest, resume
from worker.client import Billing
from worker.consumer import jobs
from worker.consumer.drain import Report, drain_stream
from worker.consumer.pausing import WORKER, why_to_pause
from worker.consumer.refusals import SECONDS_BETWEEN_LINES, UNREADABLE, RefusalLog
from worker.consumer.supervisor import Supervisor
from worker.consumer.usage import UsageBooks
from worker.keyspace import calls, keys, scripts
from worker.ledger.partitions import Turn
from worker.reports.status import read_status
from worker.resources import Resources
from worker.rules.received import Refused

USER, METER = "u1", "credits"
PARTITION = keys.Partition(0)
STREAM = PARTITION.entries
BAD = b"not json"


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    made = settings_for(
        emptied_database_url, redis_url, partitions=1, pause_min_entries=20, hand_grace_ms=50, signing_keys=KEYS
    )
    give_account(made, USER)
    return made


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The lines that are logged meanwhile."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{level} {message}")
    yield lines
    logger.remove(sink)


_sent = iter(range(10**9))


def good(count: int) -> list[bytes]:
    """Events that were not sent before."""
    return [payload(event_id=f"e{next(_sent)}") for _ in range(count)]


def append(redis: Redis, payloads: list[bytes], stream: str = STREAM) -> None:
    with redis.pipeline() as pipe:
        for data in payloads:
            pipe.xadd(stream, {"v": "1", "e": data})
        pipe.execute()


def drain(resources: Resources, stream: keys.Stream = PARTITION) -> Report:
    return drain_stream(resources, stream)


def counts(settings: Settings) -> tuple[int, int]:
    """How many events are billed, and how many dead letters there are."""
    ((billed, dead),) = rows(settings, "SELECT (SELECT count(*) FROM usage_log), (SELECT count(*) FROM dead_letter)")
    assert isinstance(billed, int)
    assert isinstance(dead, int)
    return billed, dead


# ---------------------------------------------------------------------------------------------------------------------
# When


def test_a_batch_of_which_half_is_unreadable_stays_in_the_stream(
    settings: Settings, redis: Redis, resources: Resources, log: list[str]
) -> None:
    append(redis, [BAD, *good(1)] * 10)
    assert drain(resources) == Report(0, more=False)
    assert counts(settings) == (0, 0)
    assert redis.xlen(STREAM) == 20
    pause = latest(resources)[PARTITION]
    assert (pause.paused_by, pause.resumed_at, pause.tolerated_to) == (WORKER, None, None)
    assert "10 of the last 20 stream entries are no events (of this batch 10 not_json)" in pause.reason
    assert "Expecting value" in pause.reason
    (line,) = [line for line in log if line.startswith("ERROR")]
    assert "`meterfall partition resume 0`" in line
    assert "10 of the last 20 stream entries are no events (of this batch 10 not_json)" in line
    assert "Expecting value" not in line, "the log quotes no entry"


@pytest.mark.parametrize(("bad", "fine", "paused"), [(10, 10, True), (9, 11, False), (20, 0, True), (19, 0, False)])
def test_the_share_and_the_number_decide(
    settings: Settings, redis: Redis, resources: Resources, bad: int, fine: int, paused: bool
) -> None:
    append(redis, [*good(fine), *[BAD] * bad])
    drain(resources)
    assert is_paused(resources) is paused
    assert counts(settings) == ((0, 0) if paused else (fine, bad))


def test_a_trickle_counts_as_a_flood_does(settings: Settings, redis: Redis, resources: Resources) -> None:
    """A producer that sends one bad event at a time is broken as well: batches are counted together."""
    for _ in range(30):
        append(redis, [BAD])
        drain(resources)
        if is_paused(resources):
            break
    assert counts(settings) == (0, 19)
    assert redis.xlen(STREAM) == 1
    for _ in range(3):
        append(redis, [BAD])
        assert drain(resources) == Report(0, more=False)
    assert counts(settings) == (0, 19)


def test_good_entries_in_between_count_too(settings: Settings, redis: Redis, resources: Resources) -> None:
    """Three bad ones in ten, again and again, pause nothing; then all are bad, and it takes two windows at most."""
    for _ in range(18):
        for batch in ([BAD] * 3, good(4), good(3)):
            append(redis, batch)
            drain(resources)
    assert not is_paused(resources)
    assert counts(settings) == (126, 54)
    for _ in range(40):
        append(redis, [BAD])
        drain(resources)
    assert is_paused(resources)
    assert counts(settings)[1] <= 54 + 39


def test_a_long_good_past_excuses_nothing(settings: Settings, redis: Redis, resources: Resources) -> None:
    append(redis, [BAD])
    drain(resources)
    append(redis, good(3_000))
    drain(resources)
    append(redis, [BAD] * 3)
    drain(resources)
    append(redis, [BAD] * 20)
    drain(resources)
    assert is_paused(resources)
    assert counts(settings) == (3_000, 4)


@pytest.mark.parametrize("data", [payload(quantity=-1), payload(meter="cups_of_tea"), payload(user_id="{p0}")])
def test_values_that_break_a_rule_pause_nothing(
    settings: Settings, redis: Redis, resources: Resources, data: bytes
) -> None:
    append(redis, [data] * 40)
    drain(resources)
    assert not is_paused(resources)
    assert counts(settings) == (0, 40)


def test_the_reasons_that_count_are_those_of_form_and_signature() -> None:
    assert set(Refusal) - UNREADABLE == {
        Refusal.BAD_EVENT_ID, Refusal.BAD_USER_ID, Refusal.BAD_METER, Refusal.UNKNOWN_METER, Refusal.BAD_QUANTITY,
        Refusal.BAD_MULTIPLIER, Refusal.AMOUNT_OUT_OF_RANGE, Refusal.BAD_OCCURRED_AT, Refusal.TOO_OLD,
        Refusal.BAD_SOURCE, Refusal.BAD_REFERENCE_ID, Refusal.BAD_HOLD_KEY, Refusal.BAD_DIMENSIONS,
        Refusal.WRONG_PARTITION, Refusal.ID_CONFLICT, Refusal.DATA_ERROR, Refusal.POISON,
    }  # fmt: skip


@pytest.mark.parametrize("field", [None, b"tts:" + b"0" * 64, "expired"], ids=["missing", "forged", "expired"])
def test_what_is_not_rightly_signed_counts(settings: Settings, redis: Redis, field: Any) -> None:
    for data in good(20):
        fields: dict[Any, Any] = {"v": "1", "e": data}
        if field is not None:
            fields["s"] = signature(data, "old") if field == "expired" else field
        redis.xadd(STREAM, fields, id="1795176000000-*" if field == "expired" else "*")
    with worker_resources(settings.model_copy(update={"signatures": "required"})) as resources:
        drain(resources)
        assert is_paused(resources)
    assert counts(settings) == (0, 0)


def test_zero_entries_means_never(settings: Settings, redis: Redis) -> None:
    append(redis, [BAD] * 100)
    with worker_resources(settings.model_copy(update={"pause_min_entries": 0})) as resources:
        drain(resources)
        assert not is_paused(resources)
    assert counts(settings) == (0, 100)


def test_a_batch_that_comes_again_pauses_nothing_by_that_alone(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    """A worker that dies over a few bad stream entries, and dies again, has seen no more of them."""
    append(redis, [BAD] * 5)
    for _ in range(10):
        killed_in(settings, lambda resources: drain(resources), "after_read")
        wait_until(lambda: not redis.exists(PARTITION.busy), "the marker has expired")
    wait_until(lambda: drain(resources).more is False and redis.xlen(STREAM) == 0, "the entries are disposed of")
    assert not is_paused(resources)
    assert counts(settings) == (0, 5)


def test_killed_while_it_notices_the_next_worker_notices(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    append(redis, [BAD] * 19)
    drain(resources)
    append(redis, [BAD])

    def notice_and_die(resources: Resources) -> None:
        turn = Turn(True, False, None, None, datetime.now(UTC), 0)
        items = [Refused("1-0", Refusal.NOT_JSON, "", b"", 0, None)]
        assert why_to_pause(resources, PARTITION, items, turn) is not None

    killed_in(settings, notice_and_die)
    assert not is_paused(resources)
    drain(resources)
    assert is_paused(resources)
    assert counts(settings) == (0, 19)


# ---------------------------------------------------------------------------------------------------------------------
# Paused


def test_a_paused_partition_is_left_alone_and_its_users_are_answered(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    admin_partitions.pause(resources, PARTITION, "jane", "look at it first")
    with Billing.connect(settings) as billing:
        before = billing.check(USER, METER).available
        assert before is not None
        billing.emit(USER, METER, 5, event_id="a")
        with billing.reserve(USER, METER, 10, "job-1") as hold:
            hold.settle(7)
        billing.charge(USER, METER, 1, "b")
        for _ in range(2):
            assert drain(resources) == Report(0, more=False)
        assert billing.check(USER, METER).available == before - 13
        redis.delete(PARTITION.account(USER).balance)
        assert billing.check(USER, METER).available == before - 13, "loaded from Postgres, beside what is pending"
    assert counts(settings) == (0, 0)
    assert pending_of(redis, settings, USER, METER)["total"] == 13


def test_the_row_holds_where_redis_has_lost_everything(settings: Settings, redis: Redis, resources: Resources) -> None:
    admin_partitions.pause(resources, PARTITION, "jane", "look at it first")
    redis.flushdb()
    append(redis, good(3))
    assert drain(resources) == Report(0, more=False)
    assert 0 < redis.pttl(PARTITION.paused) <= MARK_MS
    assert not redis.exists(PARTITION.hand, PARTITION.busy)
    assert redis.xlen(STREAM) == 3


def test_another_drain_does_not_begin_where_the_mark_is(settings: Settings, redis: Redis, resources: Resources) -> None:
    append(redis, good(1))
    admin_partitions.mark(resources, PARTITION)
    assert drain(resources) == Report(0, more=False)
    redis.delete(PARTITION.paused)
    assert drain(resources).entries == 1


@contextmanager
def supervisor(settings: Settings) -> Iterator[Supervisor]:
    made = Supervisor(settings, {})
    yield made
    made._client.close()
    made._rq_client.close()


def waiting(redis: Redis, settings: Settings) -> list[str]:
    found: Any = redis.lrange(f"rq:queue:{settings.queue_name}", 0, -1)
    return [job_id.decode().rpartition("-")[0] for job_id in found]


def test_neither_sweep_nor_doorbell_wakes_a_worker_for_it(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    append(redis, good(1))
    append(redis, [BAD], keys.SPONSORSHIP.entries)
    admin_partitions.pause(resources, PARTITION, "jane", "look at it first")
    recount(resources)  # once, so that the sweep has no need of it
    redis.set(keys.SENT_NOTICES, "1")  # old notices were looked for just now, which no setting ends
    off = ("renew_interval_seconds", "sum_up_interval_seconds", "verify_interval_seconds")
    quiet = settings.model_copy(update=dict.fromkeys(off, 0))
    with supervisor(quiet) as watching:
        watching.sweep.run()
        assert waiting(redis, settings) == [f"drain-{keys.SPONSORSHIP.number}"]
        redis.delete(f"rq:queue:{settings.queue_name}")
        redis.rpush(keys.BELL, 0)
        watching._listen(1)
        assert waiting(redis, settings) == []
        redis.delete(keys.SPONSORSHIP.rung)
        redis.set(PARTITION.rung, "1")
        assert jobs._next_rung(resources.redis, 1, keys.SPONSORSHIP) is None
        resume(resources, PARTITION, "jane")
        assert jobs._next_rung(resources.redis, 1, keys.SPONSORSHIP) == PARTITION
        watching._listen(1)
        assert waiting(redis, settings) == ["drain-0"], "resuming rings"


def test_a_paused_backlog_keeps_no_rollups_from_others(settings: Settings, redis: Redis, resources: Resources) -> None:
    append(redis, good(600))
    redis.sadd(PARTITION.unrolled, USER)
    with supervisor(settings) as watching:
        assert watching.sweep._unrolled() == []
        admin_partitions.pause(resources, PARTITION, "jane", "look at it first")
        assert watching.sweep._unrolled() == [PARTITION]


def test_a_dyno_leaves_it_alone_and_says_so_at_its_end(settings: Settings, redis: Redis, resources: Resources) -> None:
    admin_partitions.pause(resources, PARTITION, "jane", "look at it first")
    append(redis, good(3))
    environment = {"METERFALL_PARTITIONS": "1", "METERFALL_SWEEP_INTERVAL_MS": "50"}
    with dyno(settings, "--burst", **environment) as process:
        assert process.wait(timeout=30) == 1
    assert counts(settings) == (0, 0)
    resume(resources, PARTITION, "jane")
    with dyno(settings, "--burst", **environment) as process:
        assert process.wait(timeout=30) == 0
    assert counts(settings) == (3, 0)


def test_a_batch_in_hand_is_the_last_one(
    settings: Settings, redis: Redis, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator who pauses does not wait for it, and the next batch is not begun."""
    append(redis, good(30))
    with worker_resources(settings.model_copy(update={"batch_max_events": 10})) as small:
        work_out = UsageBooks.work_out

        def pause_first(*arguments: Any) -> Any:
            admin_partitions.pause(resources, PARTITION, "jane", "stop")
            return work_out(*arguments)

        monkeypatch.setattr(UsageBooks, "work_out", pause_first)
        assert drain_stream(small, PARTITION).more is False
    assert counts(settings) == (10, 0)
    assert redis.xlen(STREAM) == 20


def test_the_stream_of_the_pool_can_be_paused(settings: Settings, redis: Redis, resources: Resources) -> None:
    stream = keys.SPONSORSHIP.entries
    admin_partitions.pause(resources, keys.SPONSORSHIP, "jane", "look at it first")
    redis.xadd(stream, {"v": "1", "k": "credit", "request": "a", "paid": "10"})
    assert drain(resources, keys.SPONSORSHIP) == Report(0, more=False)
    resume(resources, keys.SPONSORSHIP, "jane")
    assert drain(resources, keys.SPONSORSHIP).entries == 1
    for number in range(20):
        redis.xadd(stream, {"v": "1", "k": "gift", "request": str(number)})
    drain(resources, keys.SPONSORSHIP)
    assert is_paused(resources, keys.SPONSORSHIP), "an older worker does not know what a newer script writes"


def test_pausing_again_keeps_the_first_reason(settings: Settings, resources: Resources) -> None:
    first = admin_partitions.pause(resources, PARTITION, "jane", "look at it first")
    assert admin_partitions.pause(resources, PARTITION, WORKER, "another") == first
    assert rows(settings, "SELECT paused_by, reason FROM partition_pause") == [("jane", "look at it first")]


# ---------------------------------------------------------------------------------------------------------------------
# Resumed


def test_resuming_lets_through_what_is_there_and_nothing_after(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    append(redis, [*[BAD] * 30, *good(5)])
    drain(resources)
    assert counts(settings) == (0, 0)
    resumed = resume(resources, PARTITION, "jane")
    assert resumed is not None
    append(redis, [BAD] * 19)
    drain(resources)
    assert counts(settings) == (5, 49)
    assert not is_paused(resources)
    append(redis, [BAD])
    drain(resources)
    assert is_paused(resources), "the twentieth after that"
    assert counts(settings) == (5, 49)
    assert rows(settings, "SELECT paused_by, resumed_by FROM partition_pause ORDER BY id") == [
        (WORKER, "jane"), (WORKER, None),
    ]  # fmt: skip


def test_what_is_let_through_does_not_count_beside_what_came_after(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    admin_partitions.pause(resources, PARTITION, "jane", "look at it first")
    append(redis, [BAD] * 30)
    resume(resources, PARTITION, "jane")
    append(redis, [*[BAD] * 8, *good(12)])
    drain(resources)
    assert not is_paused(resources)
    assert counts(settings) == (12, 38)


def test_a_key_that_was_missing_makes_the_events_good_again(settings: Settings, redis: Redis) -> None:
    """Nothing was lost by a rotation in the wrong order: that is what pausing is for."""
    known = settings.model_copy(update={"signatures": "required"})
    unaware = known.model_copy(update={"signing_keys": known.signing_keys[1:]})
    for data in good(25):
        redis.xadd(STREAM, {"v": "1", "e": data, "s": signature(data)})
    with worker_resources(unaware) as resources:
        drain(resources)
        assert "unknown_key" in latest(resources)[PARTITION].reason
    with worker_resources(known) as resources:
        resume(resources, PARTITION, "jane")
        drain(resources)
    assert counts(settings) == (25, 0)


def test_resuming_what_is_not_paused_is_harmless(settings: Settings, redis: Redis, resources: Resources) -> None:
    assert resume(resources, PARTITION, "jane") is None
    admin_partitions.pause(resources, PARTITION, "jane", "look at it first")
    redis.delete(STREAM)
    assert resume(resources, PARTITION, "jane") is not None, "also of an empty stream"
    admin_partitions.mark(resources, PARTITION)
    assert resume(resources, PARTITION, "jane") is None
    assert not redis.exists(PARTITION.paused), "a mark that a killed command left"
    append(redis, good(1))
    assert drain(resources).entries == 1


# ---------------------------------------------------------------------------------------------------------------------
# What operators see


def test_status_shows_what_was_refused_and_what_is_paused(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    append(redis, [BAD, BAD, payload(quantity=-1), *good(20)])
    drain(resources)
    append(redis, [payload(meter="tea")], keys.SPONSORSHIP.entries)
    drain(resources, keys.SPONSORSHIP)
    dead_letters.drop(resources, dead_letters.listed(resources)[0].id)
    admin_partitions.pause(resources, PARTITION, "jane", "look at it first")
    found = read_status(resources)
    assert found.dead_by_reason == {"bad_pool_entry": 1, "bad_quantity": 1, "not_json": 1}
    assert found.dead_letters == 3
    first, pool = found.partitions
    assert (first.refused, first.paused) == ({"not_json": 2, "bad_quantity": 1}, "by jane: look at it first")
    assert (pool.refused, pool.paused) == ({"bad_pool_entry": 1}, "")
    with worker_resources(settings) as other:
        resume(other, PARTITION, "jane")
    assert read_status(resources).partitions[0].paused == ""


def test_the_log_says_what_was_refused_and_what_to_do(
    settings: Settings, redis: Redis, resources: Resources, log: list[str]
) -> None:
    append(redis, [payload(meter="tea"), *good(5), payload(meter="tea"), payload(quantity=-1)])
    drain(resources)
    (line,) = [line for line in log if "refused" in line]
    assert line == (
        "WARNING partition 0: 3 refused: 2 unknown_meter, 1 bad_quantity. `meterfall dead list` shows them; a producer "
        "names a meter that the catalogue lacks: add it, then replay them\n"
    )


def test_a_flood_of_refusals_is_no_flood_of_lines(log: list[str]) -> None:
    now = 100.0
    refusals = RefusalLog(lambda: now)
    refused = [Refused("1-0", Refusal.TOO_OLD, "", b"", 0, None)]
    for _ in range(5):
        refusals.add(PARTITION, refused)
        refusals.add(keys.SPONSORSHIP, refused)
    refusals.add(keys.Partition(1), [])
    now += SECONDS_BETWEEN_LINES
    refusals.add(PARTITION, [])
    refusals.add(PARTITION, refused)
    assert [line.partition(".")[0] for line in log] == [
        "WARNING partition 0: 1 refused: 1 too_old",
        "WARNING partition sponsor: 1 refused: 1 too_old",
        "WARNING partition 0: 4 refused: 4 too_old",
    ]


def test_the_count_of_a_window_needs_no_more_than_redis_7_0(resources: Resources, redis: Redis) -> None:
    """A stream that was deleted, and began anew, is counted from nothing."""
    append(redis, [BAD] * 3)

    def recent(entries: int, none: int) -> Any:
        request = calls.recent(PARTITION, entries, tolerated=0, unreadable=none, least=20, percent=50, window_ms=1_000)
        return scripts.run(resources.redis, request)

    for _ in range(5):
        assert recent(3, 3) is None, "the same three"
        assert redis.hget(PARTITION.recent, "none") == b"3"
    redis.delete(STREAM)
    append(redis, [BAD])
    redis.hset(PARTITION.recent, "from", 10)
    assert recent(1, 1) is None
    assert redis.hgetall(PARTITION.recent) == {b"from": b"0", b"none": b"1"}
    assert json.loads(json.dumps(recent(20, 19))) == [20, 20]
