"""Batches over a change of the catalogue: which one prices an entry, and which events wait."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from loguru import logger
from redis import Redis

from config.catalogue import load_catalogue
from config.settings import Settings
from schemas.answers import Reason
from tests.support.catalogues import NEW_METER, edited_catalogue, newer_catalogue
from tests.support.ledger import give_account, move_clock, rows, stop_clock
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import FIRST, stream_of
from worker.admin import accounts, catalogues
from worker.client import AsyncBilling, Billing
from worker.consumer import hand
from worker.consumer.drain import drain_stream
from worker.consumer.rollout import Rollout
from worker.consumer.start import log_start
from worker.keyspace import keys
from worker.reports.proof import verify_ledger
from worker.reports.status import read_status
from worker.resources import Resources
from worker.rules.catalogues import Timeline
from worker.rules.received import Received

USER, OTHER = "user-1", "user-2"
METER = "premium_voice"
_STARTER = """[plans.starter]
name = "Starter"
tier = 1
meters.premium_voice = { quantity = 100_000 }

"""
# After the first start, which registers the first catalogue.
NOW = (datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0)


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    return settings_for(emptied_database_url, redis_url, partitions=1, batch_max_events=10, read_chunk_events=4)


@pytest.fixture
def resources(settings: Settings) -> Iterator[Resources]:
    with worker_resources(settings) as found:
        found.claim()
        for user_id in (USER, OTHER):
            give_account(settings, user_id, "basic")
        yield found


def append(redis: Redis, event_id: str, meter: str = METER, user_id: str = USER, entry_id: str = "*") -> None:
    """Append an event as a plain producer does; the catalogue prices its model."""
    fields = {"event_id": event_id, "user_id": user_id, "meter": meter, "quantity": 100}
    payload = json.dumps(fields | {"dimensions": {"model_slug": "m2"}})
    redis.xadd(FIRST.entries, {"v": "1", "e": payload}, id=entry_id)


def amounts(settings: Settings) -> dict[object, object]:
    return dict(rows(settings, "SELECT event_id, amount FROM usage_log"))  # type: ignore[arg-type]


def dead(settings: Settings) -> list[object]:
    return [reason for (reason,) in rows(settings, "SELECT reason FROM dead_letter ORDER BY id")]


def announce(settings: Settings, path: Path) -> None:
    """Let a client start that carries the catalogue at `path`."""
    with closing(Billing.connect(settings.model_copy(update={"catalogue_path": path}))) as producer:
        producer.check(USER, METER)


def test_a_batch_ends_where_another_catalogue_comes_into_force(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    _, newer = newer_catalogue(tmp_path)
    with Redis.from_url(settings.redis_url) as redis:
        redis.delete(FIRST.entries)
        stop_clock(settings, NOW)
        moment = NOW + timedelta(minutes=1)
        catalogues.apply(resources, newer, by="test", at=moment)
        for second in range(57, 64):
            at = NOW + timedelta(seconds=second)
            append(redis, f"e{second}", entry_id=f"{int(at.timestamp() * 1_000)}-1")
        stop_clock(settings, NOW + timedelta(minutes=2))
        assert drain_stream(resources, FIRST).entries == 7
    assert amounts(settings) == {f"e{second}": 150 if second < 60 else 300 for second in range(57, 64)}


def test_a_worker_takes_up_a_new_catalogue_with_its_next_batch(
    settings: Settings, resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, newer = newer_catalogue(tmp_path)
    take, applied = hand.Hand.take, list[int]()

    def apply_after_the_first(self: hand.Hand, wanted: object, turn: object) -> object:  # type: ignore[type-arg]
        batch = take(self, wanted, turn)  # type: ignore[arg-type]
        if not applied:  # the second batch is being read ahead
            applied.append(1)
            knows = self.knows_the_end()
            assert not knows
            with worker_resources(settings) as operator, Redis.from_url(settings.redis_url) as redis:
                catalogues.apply(operator, newer, by="test")
                append(redis, "late", NEW_METER)
        return batch

    monkeypatch.setattr(hand.Hand, "take", apply_after_the_first)
    with Redis.from_url(settings.redis_url) as redis:
        for number in range(15):
            append(redis, f"e{number}")
        drain_stream(resources, FIRST)
    # What came in before keeps its price, though it is read again; what came in after has the new one.
    assert amounts(settings) == {f"e{number}": 150 for number in range(15)} | {"late": 300}


def test_events_of_a_meter_to_come_wait_and_the_order_of_their_account_holds(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    path, newer = newer_catalogue(tmp_path)
    announce(settings, path)
    with Redis.from_url(settings.redis_url) as redis:
        append(redis, "first")
        append(redis, "new", NEW_METER)
        append(redis, "behind")
        append(redis, "typo", "video_second")
        append(redis, "other", user_id=OTHER)
        for _ in range(2):
            assert not drain_stream(resources, FIRST).more, "the sweep comes back for them"
            assert set(amounts(settings)) == {"first", "other"}
            assert dead(settings) == ["unknown_meter"]
        # A top-up is published, though older events wait.
        accounts.set_status(resources, USER, "past_due")
        drain_stream(resources, FIRST)
        assert [json.loads(each[b"e"])["event_id"] for each in stream_of(redis, settings, USER)] == ["new", "behind"]

        catalogues.apply(resources, newer, by="test")
        drain_stream(resources, FIRST)
        assert redis.xlen(FIRST.entries) == 0
    # Priced by the catalogue of their time, which gave m2 half of the new price.
    assert amounts(settings) == {"first": 150, "new": 150, "behind": 150, "other": 150}
    order = rows(settings, "SELECT event_id FROM usage_log WHERE user_id = %s ORDER BY seq", USER)
    assert [event for (event,) in order] == ["first", "new", "behind"]
    assert verify_ledger(resources).differences == []


def test_a_batch_that_has_begun_lets_them_wait_though_the_catalogue_is_applied_meanwhile(
    settings: Settings, resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, newer = newer_catalogue(tmp_path)
    announce(settings, path)
    awaited, applied = Rollout.awaited, list[int]()

    def apply_meanwhile(self: Rollout, items: Sequence[Received], now: datetime, known: Timeline) -> frozenset[str]:
        if not applied:
            applied.append(1)
            with worker_resources(settings) as operator:
                catalogues.apply(operator, newer, by="test")
        return awaited(self, items, now, known)

    monkeypatch.setattr(Rollout, "awaited", apply_meanwhile)
    with Redis.from_url(settings.redis_url) as redis:
        append(redis, "new", NEW_METER)
        for _ in range(2):
            drain_stream(resources, FIRST)
    assert (applied, dead(settings), set(amounts(settings))) == ([1], [], {"new"})


def test_a_drain_under_way_learns_what_a_service_announces(
    settings: Settings, resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has asked for an event of another meter a moment ago."""
    path, _ = newer_catalogue(tmp_path)
    awaited, asked = Rollout.awaited, list[int]()

    def announce_afterwards(self: Rollout, items: Sequence[Received], now: datetime, known: Timeline) -> frozenset[str]:
        found = awaited(self, items, now, known)
        if items and not asked:
            asked.append(1)
            announce(settings, path)
            with Redis.from_url(settings.redis_url) as redis:
                append(redis, "new", NEW_METER)
        return found

    monkeypatch.setattr(Rollout, "awaited", announce_afterwards)
    with Redis.from_url(settings.redis_url) as redis:
        append(redis, "typo", "video_second")
        for number in range(25):  # three batches, of which two are read by then
            append(redis, f"e{number}", user_id=OTHER)
        drain_stream(resources, FIRST)
        assert (asked, len(dead(settings)), len(amounts(settings)), redis.xlen(FIRST.entries)) == ([1], 1, 25, 1)


def test_old_announcements_of_registered_catalogues_are_deleted(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    path, newer = newer_catalogue(tmp_path)
    announce(settings, path)
    catalogues.apply(resources, newer, by="test")
    with Redis.from_url(settings.redis_url) as redis:
        assert redis.hexists(keys.OTHER_CATALOGUES, newer.fingerprint)
        move_clock(settings, timedelta(days=2))
        catalogues.apply(resources, resources.own_catalogue, by="test")
        assert not redis.hexists(keys.OTHER_CATALOGUES, newer.fingerprint)


def test_an_event_waits_for_a_bounded_time_only(settings: Settings, resources: Resources, tmp_path: Path) -> None:
    path, _ = newer_catalogue(tmp_path)
    announce(settings, path)
    with Redis.from_url(settings.redis_url) as redis:
        append(redis, "new", NEW_METER)
        append(redis, "behind")
        drain_stream(resources, FIRST)
        assert (redis.xlen(FIRST.entries), dead(settings)) == (2, [])
        move_clock(settings, timedelta(minutes=settings.catalogue_wait_minutes))
        drain_stream(resources, FIRST)
    assert (set(amounts(settings)), dead(settings)) == ({"behind"}, ["unknown_meter"])


def test_too_many_entries_end_the_wait(settings: Settings, resources: Resources, tmp_path: Path) -> None:
    path, _ = newer_catalogue(tmp_path)
    announce(settings, path)
    few = settings.model_copy(update={"catalogue_wait_max_entries": 2})
    with Redis.from_url(settings.redis_url) as redis, worker_resources(few) as bounded:
        for number in range(3):
            append(redis, f"new{number}", NEW_METER)
        drain_stream(bounded, FIRST)
    assert dead(settings) == ["unknown_meter"] * 3


def test_a_client_with_another_catalogue_says_so_once_and_announces_its_meters(
    settings: Settings, resources: Resources, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, newer = newer_catalogue(tmp_path)
    with Billing.connect(settings) as same:
        same.check(USER, METER)
    assert "carries catalogue" not in caplog.text
    with Billing.connect(settings.model_copy(update={"catalogue_path": path})) as producer:
        for _ in range(2):
            producer.check(USER, METER)
    said = [each for each in caplog.messages if "carries catalogue" in each]
    assert len(said) == 1
    assert all(digest in said[0] for digest in (newer.digest, resources.own_catalogue.digest, "catalogue apply"))
    with Redis.from_url(settings.redis_url) as redis:
        stored = redis.hget(keys.OTHER_CATALOGUES, newer.fingerprint)
        assert isinstance(stored, bytes)
        assert NEW_METER in stored.decode().split()
        assert redis.pttl(keys.OTHER_CATALOGUES) > 0


def blocking_calls(settings: Settings, number: int) -> None:
    """So many first calls of one client at once, each in a thread of its own."""
    together = threading.Barrier(number)

    def check(billing: Billing) -> None:
        together.wait(10)
        billing.check(USER, METER)

    with Billing.connect(settings) as billing, ThreadPoolExecutor(number) as pool:
        for done in [pool.submit(check, billing) for _ in range(number)]:
            done.result(30)


def awaiting_calls(settings: Settings, number: int) -> None:
    """So many first calls of one client at once, each in a task of its own."""

    async def check_all() -> None:
        async with AsyncBilling.connect(settings) as billing:
            await asyncio.gather(*(billing.check(USER, METER) for _ in range(number)))

    asyncio.run(check_all())


@pytest.mark.usefixtures("resources")
@pytest.mark.parametrize("calls", [blocking_calls, awaiting_calls])
def test_of_first_calls_at_once_one_warns_and_announces(
    calls: Callable[[Settings, int], None],
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, newer = newer_catalogue(tmp_path)
    calls(settings.model_copy(update={"catalogue_path": path}), 10)
    assert sum("carries catalogue" in each for each in caplog.messages) == 1
    with Redis.from_url(settings.redis_url) as redis:
        assert redis.hexists(keys.OTHER_CATALOGUES, newer.fingerprint)


def test_a_clients_balance_goes_by_the_catalogue_in_force(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    """It carries a file with another meter, and has the ledger."""
    path, _ = newer_catalogue(tmp_path)
    with Billing.connect(settings.model_copy(update={"catalogue_path": path})) as producer:
        assert producer.check(USER, METER).available == 100_000
        assert producer.check(USER, NEW_METER).available == 0
    assert verify_ledger(resources).differences == []


def test_an_entry_from_before_a_plan_existed_is_billed_on_that_plan(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    """Nobody drained while a catalogue with a new plan came into force, and an account moved to it."""
    newer = edited_catalogue(tmp_path, ("[plans.plus]", _STARTER + "[plans.plus]"))
    with Redis.from_url(settings.redis_url) as redis:
        append(redis, "before", meter="ocr_tokens")
        append(redis, "stranger", user_id="newcomer")
        catalogues.apply(resources, load_catalogue(newer), by="test")
        accounts.change_plan(resources, USER, "starter")
        with worker_resources(
            settings.model_copy(update={"default_plan": "starter", "catalogue_path": newer})
        ) as opened:
            opened.claim()
            drain_stream(opened, FIRST)
        assert redis.xlen(FIRST.entries) == 0
    assert set(amounts(settings)) == {"before", "stranger"}
    assert accounts.show(resources, "newcomer").plan == "starter"
    assert verify_ledger(resources).differences == []


def test_without_its_default_plan_a_dyno_bills_on_and_strangers_wait(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    path = edited_catalogue(tmp_path, ("[plans.plus]", _STARTER + "[plans.plus]"))
    said: list[str] = []
    sink = logger.add(lambda message: said.append(str(message)), level="WARNING", format="{message}")
    opening = settings.model_copy(update={"default_plan": "starter", "catalogue_path": path})
    try:
        with worker_resources(opening) as opened, Redis.from_url(settings.redis_url) as redis:
            opened.claim()
            log_start(opened)
            assert [line for line in said if "METERFALL_DEFAULT_PLAN" in line and "starter" in line]
            said.clear()
            append(redis, "known")
            append(redis, "stranger", user_id="newcomer")
            append(redis, "again", user_id="newcomer")
            for _ in range(2):
                assert not drain_stream(opened, FIRST).more, "the sweep comes back for them"
                assert set(amounts(settings)) == {"known"}
            assert redis.xlen(FIRST.entries) == 2
            assert [line for line in said if "METERFALL_DEFAULT_PLAN" in line and "starter" in line]
            found = {one.check: one for one in read_status(opened).findings}
            assert "starter" in found["default_plan"].text
            assert "default_plan" not in {one.check for one in read_status(resources).findings}
            with Billing.connect(opening) as billing:
                assert billing.check("somebody", METER, 1).reason is Reason.UNKNOWN_ACCOUNT
            catalogues.apply(resources, load_catalogue(path), by="test")
            drain_stream(opened, FIRST)
            assert redis.xlen(FIRST.entries) == 0
            assert "default_plan" not in {one.check for one in read_status(opened).findings}
    finally:
        logger.remove(sink)
    order = rows(settings, "SELECT event_id FROM usage_log WHERE user_id = 'newcomer' ORDER BY seq")
    assert [event for (event,) in order] == ["stranger", "again"]
    assert dead(settings) == []
    assert verify_ledger(resources).differences == []


def test_a_burst_ends_when_only_waiting_entries_are_left(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    path, newer = newer_catalogue(tmp_path)
    announce(settings, path)
    with Redis.from_url(settings.redis_url) as redis:
        append(redis, "first")
        append(redis, "new", NEW_METER)
        append(redis, "behind")
        append(redis, "other", user_id=OTHER)
        with dyno(settings, "--burst", METERFALL_PARTITIONS="1") as running:
            _, said = running.communicate(timeout=60)
        assert running.returncode == 1
        assert "partition 0: 2 stream entries wait for a catalogue" in said
        assert set(amounts(settings)) == {"first", "other"}
        assert redis.xlen(FIRST.entries) == 2

        catalogues.apply(resources, newer, by="test")
        with dyno(settings, "--burst", METERFALL_PARTITIONS="1") as running:
            _, said = running.communicate(timeout=60)
        assert running.returncode == 0
        assert "wait for a catalogue" not in said
    assert set(amounts(settings)) == {"first", "new", "behind", "other"}


def test_what_only_a_producer_knows_to_be_capped_leaves_its_pending_too(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    """A client carries a catalogue with a new sub-cap, and counts its events against it; workers do not know it yet."""
    granted = "meters.ocr_tokens = { quantity = 1_000_000"
    path = edited_catalogue(tmp_path, (granted, f"{granted}, caps = {{ backend = {{ gemini = 100_000 }} }}"))
    facts = {"backend": "gemini"}
    newer = settings.model_copy(update={"catalogue_path": path})
    with Redis.from_url(settings.redis_url) as redis, closing(Billing.connect(newer)) as billing:
        billing.emit(USER, "ocr_tokens", 1, event_id="emitted", dimensions=facts)
        billing.emit(USER, "ocr_tokens", 1, event_id="elsewhere", dimensions={"backend": "hardware"})
        billing.charge(USER, "ocr_tokens", 1, event_id="charged", dimensions=facts)
        hold = billing.reserve(USER, "ocr_tokens", 9, key="held", backend="gemini")
        hold.capture("captured", 1, dimensions=facts)
        hold.settle(1, dimensions=facts)
        old = datetime.now(UTC) - timedelta(days=3)
        billing.emit(USER, "ocr_tokens", 1, event_id="refused", dimensions=facts, occurred_at=old)
        billing.emit(USER, "ocr_tokens", 2, event_id="emitted", dimensions=facts)
        pending = f"{FIRST.prefix}pending:{USER}:*"
        assert {key.decode().rpartition(":")[2] for key in redis.scan_iter(pending)} == {
            "ocr_tokens",
            "ocr_tokens/gemini",
        }
        impatient = settings.model_copy(update={"event_max_age_days": 1})
        with worker_resources(impatient) as worker:
            drain_stream(worker, FIRST)
        assert set(amounts(settings)) == {"emitted", "elsewhere", "charged", "captured", "held"}
        assert set(dead(settings)) == {"id_conflict", "too_old"}
        assert {key: redis.hgetall(key) for key in redis.scan_iter(pending)} == {}
    assert verify_ledger(resources).differences == []
