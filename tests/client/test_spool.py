"""The spool: what a producer records while Redis is away is on its disk, and is sent later, in order, each once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from threading import Barrier, Thread
from threading import enumerate as enumerate_threads
from typing import cast

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from config.settings import Settings
from schemas.answers import EventAnswer, HoldState
from schemas.events import UsageEvent
from tests.client.clients import open_client
from tests.support.ledger import give_account, rows
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import account_of, drain, pending_of, stream_of
from tests.support.waiting import wait_until
from worker import tracing
from worker.admin import dead_letters
from worker.client import AsyncBilling, Billing, recording, sending, spooling
from worker.client.effects import Command, Effects, Send
from worker.client.recording import _rounds, append_events
from worker.client.session import Context
from worker.client.spool_file import Spool
from worker.client.spool_items import Item
from worker.client.spooling import Sent
from worker.consumer.drain import drain_stream
from worker.demo.servers import Server
from worker.errors import RedisUnavailable, SpoolUnavailable, UsageLimitExceeded
from worker.keyspace import keys
from worker.reports.proof import verify_ledger

# It is about a server of its own.
pytestmark = pytest.mark.once

USER, METER = "u1", "credits"
# Quick to notice that Redis is gone.
QUICK: dict[str, object] = {"redis_socket_timeout_ms": 500, "redis_retries": 1}


@pytest.fixture(autouse=True)
def patient_senders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who found Redis away tries again when the test says so."""
    monkeypatch.setattr(spooling, "_AWAY_SECONDS", 60)


@pytest.fixture
def server(own_redis: Server) -> Iterator[Server]:
    """That Redis, running and empty."""
    own_redis.start()
    with Redis.from_url(own_redis.url) as redis:
        redis.config_set("maxmemory", 0)
        redis.flushall()
    yield own_redis
    own_redis.thaw()


@pytest.fixture
def settings(emptied_database_url: str, server: Server, tmp_path: Path) -> Settings:
    return settings_for(emptied_database_url, server.url, spool_path=tmp_path / "spool", **QUICK)


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    """A client with a spool; the user has 1,000 credits."""
    give_account(settings, USER)
    with Billing.connect(settings) as client:
        yield client


def spool_of(settings: Settings) -> Spool:
    assert settings.spool_path is not None
    return Spool(settings.spool_path, settings.spool_max_bytes)


def spooled_ids(settings: Settings) -> list[str]:
    """Ids of the events in the spool, in its order."""
    return [json.loads(each.item.content)["event_id"] for each in spool_of(settings).oldest(10_000)]


def applied(settings: Settings, user_id: str = USER) -> list[str]:
    """Ids of a user's events in the order in which they were applied."""
    query = "SELECT event_id FROM usage_log WHERE user_id = %s ORDER BY seq"
    return [str(row[0]) for row in rows(settings, query, user_id)]


def sent_ids(redis: Redis, settings: Settings, user_id: str = USER) -> list[str]:
    """Ids of the events in the stream of a user's partition, oldest first."""
    return [json.loads(fields[b"e"])["event_id"] for fields in stream_of(redis, settings, user_id)]


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """The environment of a producer or an operator under these settings."""
    assert settings.database_url is not None
    return {
        **os.environ,
        "DATABASE_URL": settings.database_url,
        "REDIS_URL": settings.redis_url,
        "METERFALL_SPOOL_PATH": str(settings.spool_path),
        "METERFALL_REDIS_SOCKET_TIMEOUT_MS": "500",
        "METERFALL_REDIS_RETRIES": "1",
        **more,
    }


def command(settings: Settings, *args: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """`meterfall …` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "worker", *args],
        env=environment(settings, **more), input=stdin, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def lines(*event_ids: str, user_id: str = USER) -> str:
    """Events as the command takes them."""
    return "\n".join(
        json.dumps({"event_id": each, "user_id": user_id, "meter": METER, "quantity": 1}) for each in event_ids
    )


# ---------------------------------------------------------------------------------------------------------------------
# An outage


def test_what_was_recorded_in_an_outage_is_sent_by_the_next_call_in_order(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    hold = billing.reserve(USER, METER, 100, "job")
    server.stop()
    answers = [
        billing.emit(USER, METER, 1, event_id="a"),
        billing.capture(USER, METER, "job", "page-1", 30),
        *billing.emit_events([UsageEvent(event_id=each, user_id=USER, meter=METER, quantity=2) for each in "bc"]),
        hold.settle(60),
    ]
    assert [(each.event_id, each.amount, each.spooled) for each in answers] == [
        ("a", 1, True), ("page-1", 30, True), ("b", 2, True), ("c", 2, True), ("job", 60, True),
    ]  # fmt: skip
    credit = billing.credit_pool("request-1", 500)
    assert (credit.credited, credit.spooled) == (50, True)
    server.start()
    billing.context.away_until = 0
    last = billing.emit(USER, METER, 5, event_id="d")
    assert not last.spooled, "nothing was left before it"
    assert spool_of(settings).is_empty()
    assert pending_of(redis, settings, USER, METER)["total"] == 100
    drain(settings, USER)
    assert applied(settings) == ["a", "page-1", "b", "c", "job", "d"]
    assert rows(settings, "SELECT sum(amount), count(*) FROM usage_log") == [(100, 6)]
    assert pending_of(redis, settings, USER, METER) == {}
    with worker_resources(settings) as resources:
        drain_stream(resources, keys.SPONSORSHIP)
        assert rows(settings, "SELECT paid, credited FROM sponsor_credit") == [(500, 50)]
        assert verify_ledger(resources).differences == []


def test_a_captured_part_leaves_its_hold_when_it_is_sent(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    billing.reserve(USER, METER, 100, "job")
    server.stop()
    assert billing.capture(USER, METER, "job", "page-1", 30).spooled
    server.start()
    assert billing.send_spooled() == (1, False)
    assert pending_of(redis, settings, USER, METER) == {"h:job": 70, "e:page-1": 30, "total": 100}


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_what_is_in_the_spool_is_sent_without_another_call(
    settings: Settings, server: Server, redis: Redis, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooling, "_AWAY_SECONDS", 0.2)
    client = open_client(kind, settings)
    server.stop()
    for number in range(3):
        assert client.emit(USER, METER, 10, event_id=f"e{number}").spooled
    server.start()
    wait_until(lambda: spool_of(settings).is_empty(), "it is sent", seconds=5)
    assert sent_ids(redis, settings) == ["e0", "e1", "e2"]
    wait_until(lambda: not senders(), "nobody is left to send")
    assert not client.context.takes_redis_for_away
    client.close()


def senders() -> list[Thread]:
    """The threads of this process that send a spool."""
    return [each for each in enumerate_threads() if each.name == "meterfall-spool-sender"]


def test_a_block_whose_settling_was_spooled_does_not_release_its_hold(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    with billing.reserve(USER, METER, 100, "job") as hold:
        server.stop()
        assert hold.settle(70).spooled
        server.start()
    assert pending_of(redis, settings, USER, METER) == {"h:job": 100, "total": 100}
    billing.send_spooled()
    assert billing.settle(USER, METER, "job", 70).hold is HoldState.HELD, "it was settled, not released"
    drain(settings, USER)
    assert applied(settings) == ["job"]


def test_a_hold_released_in_an_outage_is_given_back_when_it_is_sent_in_its_turn(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    for key in ("first", "second", "third"):
        billing.reserve(USER, METER, 100, key)
    server.stop()
    kept = billing.release(USER, METER, "first")
    assert (kept.spooled, kept.state) == (True, HoldState.UNKNOWN)
    assert billing.settle(USER, METER, "second", 70).spooled
    assert billing.release(USER, METER, "second").spooled, "too late: it is settled before that"
    with pytest.raises(ZeroDivisionError), billing.reserve(USER, METER, 100, "by-the-ledger"):
        raise ZeroDivisionError
    assert [each.item.kind for each in spool_of(settings).oldest(10)] == ["release", "event", "release", "release"]
    server.start()
    assert pending_of(redis, settings, USER, METER)["total"] == 300
    assert billing.send_spooled() == (4, False)
    assert pending_of(redis, settings, USER, METER) == {"h:third": 100, "e:second": 70, "total": 170}
    again = billing.release(USER, METER, "first")
    assert (again.state, again.spooled) == (HoldState.RELEASED, False)
    drain(settings, USER)
    assert applied(settings) == ["second"]


def test_a_hold_that_was_reserved_again_meanwhile_is_not_given_back(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    billing.reserve(USER, METER, 1_000, "job")
    server.stop()
    billing.release(USER, METER, "job")
    server.start()
    billing.context.away_until = 0
    billing.context.breaker.answered()
    again = billing.reserve(USER, METER, 1_000, "job")
    assert billing.send_spooled() == (1, False)
    assert again.answer.state is HoldState.HELD
    assert pending_of(redis, settings, USER, METER) == {"h:job": 1_000, "total": 1_000}
    assert not billing.check(USER, METER, 1).allowed
    assert again.release().state is HoldState.HELD, "one that is not late is meant for it"
    assert billing.check(USER, METER, 1_000).allowed


def test_a_key_that_is_forgotten_is_not_closed_by_a_late_release(
    billing: Billing, settings: Settings, server: Server
) -> None:
    server.stop()
    billing.release(USER, METER, "job")
    server.start()
    assert billing.send_spooled() == (1, False)
    assert billing.reserve(USER, METER, 1_000, "job").answer.state is HoldState.HELD


def test_a_release_that_redis_refuses_does_not_keep_the_events_behind_it_waiting(
    billing: Billing, settings: Settings, server: Server, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    billing.release(USER, METER, "job")
    billing.context.away_until = 0
    billing.emit(USER, METER, 1, event_id="a")
    server.start()
    redis.set(account_of(settings, USER).hold("job"), "somebody else's")
    assert billing.send_spooled() == (2, False)
    assert sent_ids(redis, settings) == ["a"]
    assert "a hold stays until it expires" in caplog.text


def test_without_a_spool_a_release_is_raised_and_its_hold_expires(settings: Settings, server: Server) -> None:
    give_account(settings, USER)
    with Billing.connect(settings.model_copy(update={"spool_path": None})) as billing:
        billing.reserve(USER, METER, 100, "job")
        server.stop()
        with pytest.raises(RedisUnavailable):
            billing.release(USER, METER, "job")
    assert spool_of(settings).is_empty()


def test_an_event_that_arrived_though_its_reply_was_lost_counts_once(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    billing.emit(USER, METER, 1, event_id="before")
    server.freeze()
    assert billing.emit(USER, METER, 10, event_id="a").spooled
    server.thaw()
    wait_until(lambda: sent_ids(redis, settings) == ["before", "a"], "Redis goes on with what it had been sent")
    assert billing.send_spooled().items == 1
    assert sent_ids(redis, settings) == ["before", "a", "a"]
    assert pending_of(redis, settings, USER, METER) == {"e:before": 1, "e:a": 10, "total": 11}
    drain(settings, USER)
    assert applied(settings) == ["before", "a"]
    assert billing.check(USER, METER, 1).available == 989


def test_a_part_that_is_refused_is_not_overtaken_by_the_next(billing: Billing, settings: Settings) -> None:
    small = settings.model_copy(update={"emit_chunk_events": 1})
    context = Context(small, billing.context.catalogue)
    events = [UsageEvent(event_id=f"e{n}", user_id=USER, meter=METER, quantity=1, multiplier="1") for n in range(3)]
    steps = append_events(context, events)
    assert isinstance(next(steps), Command), "one part of a partition at a time"
    assert isinstance(steps.send(0), Command)
    with pytest.raises(RedisUnavailable) as caught:
        steps.throw(OutOfMemoryError("OOM"))
    assert caught.value.events == tuple(events[1:])


@pytest.mark.parametrize("seed", range(5))
def test_no_event_goes_beside_an_earlier_one_of_its_user_nor_many_of_a_partition(billing: Billing, seed: int) -> None:
    context, random = (
        Context(billing.context.settings.model_copy(update={"emit_chunk_events": 4}), billing.context.catalogue),
        Random(seed),
    )
    events = [
        UsageEvent(
            event_id=f"e{at}",
            user_id=f"u{random.randrange(6)}",
            meter=METER,
            quantity=1,
            hold_key=random.choice((None, f"h{at}")),
        )
        for at in range(200)
    ]
    recorded: list[UsageEvent] = []
    for batches in _rounds(events, context):
        users = [user for _, batch in batches for user in {event.user_id for event in batch}]
        assert len(users) == len(set(users)), "one batch of a user, as Redis may refuse it and take the next"
        sizes = Counter(context.partition(event.user_id) for _, batch in batches for event in batch)
        assert max(sizes.values()) <= 4
        assert all(len(batch) == 1 for _, batch in batches if any(event.hold_key for event in batch))
        recorded += [event for _, batch in batches for event in batch]
    assert sorted(recorded, key=lambda event: event.user_id) == sorted(events, key=lambda event: event.user_id)


def test_what_is_kept_just_after_the_sender_found_nothing_left_is_sent(
    billing: Billing, settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = UsageEvent(event_id="late", user_id=USER, meter=METER, quantity=1, multiplier="1")

    def look_and_keep(context: Context, limit: int) -> Effects[Sent | None]:
        sent = yield from send_in_turn(context, limit)
        if sent and not sent.items and not kept:  # another thread keeps an event, before this one says what it found
            kept.append(event)
            spool_of(settings).keep([Item("event", event.model_dump_json())])
            billing.run(wake())
        return sent

    def wake() -> Effects[None]:
        yield Send()

    kept: list[UsageEvent] = []
    send_in_turn = spooling.send_in_turn
    monkeypatch.setattr(sending, "send_in_turn", look_and_keep)
    billing.run(wake())
    wait_until(lambda: sent_ids(redis, settings) == ["late"], "it is sent as well")
    wait_until(lambda: spool_of(settings).is_empty(), "it is forgotten")


def test_the_file_is_gone_once_nothing_is_in_it(billing: Billing, settings: Settings, server: Server) -> None:
    file = Path(str(settings.spool_path)) / "spool.sqlite3"
    billing.emit(USER, METER, 1, event_id="a")
    assert not file.parent.exists()
    server.stop()
    billing.emit(USER, METER, 1, event_id="b")
    assert file.exists()
    assert file.parent.stat().st_mode & 0o077 == 0, "nobody else reads it"
    server.start()
    billing.send_spooled()
    assert not billing.emit(USER, METER, 1, event_id="c").spooled
    assert not file.exists()


def test_nobody_deletes_a_file_in_which_somebody_is_just_keeping_something(tmp_path: Path) -> None:
    spools = [Spool(tmp_path / "spool", 2**20) for _ in range(4)]

    def work(number: int) -> None:
        for at in range(25):
            spools[number].keep([Item("event", f"{number}-{at}")])
            spools[number].is_empty()

    def empty_it() -> None:
        for _ in range(25):
            turn = spools[3].take_turn()
            assert turn is not None, "nobody else sends"
            with turn:
                found = spools[3].oldest(100)
                seen.extend(each.item.content for each in found)
                spools[3].forget([each.id for each in found])
            spools[3].is_empty()

    seen: list[str] = []
    spools[0].keep([Item("event", "first")])
    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(work, number) for number in range(3)] + [threads.submit(empty_it)]
        for each in done:
            each.result()
    seen += [each.item.content for each in spools[0].oldest(1_000)]
    assert sorted(seen) == sorted(["first", *(f"{number}-{at}" for number in range(3) for at in range(25))])


def test_while_redis_is_taken_to_be_away_no_call_waits_for_it(
    billing: Billing, settings: Settings, server: Server
) -> None:
    server.stop()
    billing.emit(USER, METER, 1, event_id="a")
    server.start()
    assert billing.emit(USER, METER, 1, event_id="b").spooled, "Redis is not asked"
    billing.context.away_until = 0
    assert not billing.emit(USER, METER, 1, event_id="c").spooled
    drain(settings, USER)
    assert applied(settings) == ["a", "b", "c"]


def test_while_much_is_left_a_call_goes_to_the_end_and_waits_for_nobody(
    billing: Billing, settings: Settings, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooling, "_FEW", 50)
    server.stop()
    many = [UsageEvent(event_id=f"e{number}", user_id=USER, meter=METER, quantity=1) for number in range(60)]
    assert all(answer.spooled for answer in billing.emit_events(many))
    server.start()
    billing.context.away_until = 0
    answers: list[EventAnswer] = []
    while not answers or answers[-1].spooled:
        answers.append(billing.emit(USER, METER, 1, event_id=f"later{len(answers)}"))
    assert len(answers) > 1, "the first did not wait; the last found nothing left"
    drain(settings, USER)
    assert applied(settings) == [f"e{n}" for n in range(60)] + [f"later{n}" for n in range(len(answers))]


def test_asyncio_spools_and_sends_as_well(billing: Billing, settings: Settings, server: Server) -> None:
    async def work() -> None:
        async with AsyncBilling.connect(settings) as client:
            hold = await client.reserve(USER, METER, 10, "job")
            server.stop()
            many = await asyncio.gather(*(client.emit(USER, METER, 1, event_id=f"e{n}") for n in range(20)))
            assert all(answer.spooled for answer in many)
            assert (await hold.settle(10)).spooled
            server.start()
            client.context.away_until = 0
            assert not (await client.emit(USER, METER, 1, event_id="last")).spooled

    asyncio.run(work())
    drain(settings, USER)
    order = applied(settings)
    assert (sorted(order[:20]), order[20:]) == (sorted(f"e{n}" for n in range(20)), ["job", "last"])


def test_threads_share_a_spool(billing: Billing, settings: Settings, server: Server) -> None:
    users = [f"u{thread}" for thread in range(6)]
    turn = Barrier(len(users) + 1)

    def work(user: str) -> None:
        for number in range(40):
            if number in (10, 20, 30):
                turn.wait(30)
                turn.wait(30)
            billing.emit(user, METER, 1, event_id=f"e{number:02}")

    for user in users:
        if user != USER:
            give_account(settings, user)
    with ThreadPoolExecutor(len(users)) as threads:
        done = [threads.submit(work, user) for user in users]
        for change in (server.stop, server.start, server.stop):
            turn.wait(30)
            change()
            turn.wait(30)
        for each in done:
            each.result()
    server.start()
    assert not billing.send_spooled(10_000).left
    for user in users:
        drain(settings, user)
        assert applied(settings, user) == [f"e{number:02}" for number in range(40)]


# ---------------------------------------------------------------------------------------------------------------------
# What is raised all the same


def test_what_waiting_does_not_mend_is_raised(billing: Billing, settings: Settings, redis: Redis) -> None:
    redis.set(account_of(settings, USER).pending(METER), "no hash")
    with pytest.raises(RedisUnavailable, match="WRONGTYPE") as caught:
        billing.emit(USER, METER, 1, event_id="a")
    assert [event.event_id for event in caught.value.events] == ["a"]
    assert spool_of(settings).is_empty()


def test_what_is_confirmed_is_forgotten_though_what_comes_after_it_fails_unexpectedly(
    billing: Billing, settings: Settings, redis: Redis
) -> None:
    event = UsageEvent(event_id="a", user_id=USER, meter=METER, quantity=1, multiplier="1")
    spool_of(settings).keep([Item("event", event.model_dump_json()), Item("credit", '{"from": "another program"}')])
    with pytest.raises(TypeError):
        billing.send_spooled()
    assert sent_ids(redis, settings) == ["a"]
    assert [each.item.kind for each in spool_of(settings).oldest(10)] == ["credit"]


def test_a_full_spool_hands_the_events_back_and_keeps_what_it_has(
    billing: Billing, settings: Settings, server: Server
) -> None:
    small = settings.model_copy(update={"spool_max_bytes": 65_536})
    server.stop()
    with Billing.connect(small) as client:
        spooled: list[str] = []

        def fill() -> None:
            while len(spooled) < 1_000:
                client.emit(USER, METER, 1, event_id=f"e{len(spooled):03}", reference_id="x" * 200)
                spooled.append(f"e{len(spooled):03}")

        with pytest.raises(RedisUnavailable, match="METERFALL_SPOOL_MAX_BYTES") as caught:
            fill()
        assert 50 < len(spooled) < 1_000
        assert [event.event_id for event in caught.value.events] == [f"e{len(spooled):03}"]
        assert spooled_ids(settings) == spooled
        assert sum(file.stat().st_size for file in Path(str(settings.spool_path)).iterdir()) <= 65_536
        many = [UsageEvent(event_id=f"m{n}", user_id=USER, meter=METER, quantity=1) for n in range(300)]
        with pytest.raises(RedisUnavailable) as caught:
            client.emit_events(many)
        assert len(caught.value.events) == 300, "all of them or none"
        assert spooled_ids(settings) == spooled
        server.start()
        client.context.away_until = 0
        while client.emit_events(many[:1])[0].spooled:
            pass
    drain(settings, USER)
    assert applied(settings) == [*spooled, "m0"]


def test_a_damaged_spool_stays_as_it_is_and_stops_nobody(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    folder = Path(str(settings.spool_path))
    folder.mkdir()
    (folder / "spool.sqlite3").write_bytes(b"no database" * 1_000)
    assert not billing.emit(USER, METER, 1, event_id="a").spooled
    server.stop()
    with pytest.raises(RedisUnavailable, match="not a database") as caught:
        billing.emit(USER, METER, 1, event_id="b")
    assert [event.event_id for event in caught.value.events] == ["b"]
    with pytest.raises(SpoolUnavailable, match="not a database"):
        billing.send_spooled()
    assert (folder / "spool.sqlite3").read_bytes() == b"no database" * 1_000


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def test_killed_after_spooling_the_next_process_sends_it_first(
    billing: Billing, settings: Settings, server: Server
) -> None:
    server.stop()
    killed = command(settings, "emit", "-", stdin=lines("a", "b"), CRASH_POINT_FOR_TESTS="after_spooling")
    assert killed.returncode == -signal.SIGKILL
    assert killed.stdout == ""
    assert spooled_ids(settings) == ["a", "b"]
    server.start()
    sent = command(settings, "emit", "-", stdin=lines("c"))
    assert (sent.returncode, sent.stdout) == (0, "1 event sent\n"), sent.stderr
    drain(settings, USER)
    assert applied(settings) == ["a", "b", "c"]


def test_killed_between_sending_and_forgetting_it_is_sent_twice_and_counts_once(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    server.stop()
    billing.emit(USER, METER, 1, event_id="a")
    billing.emit(USER, METER, 1, event_id="b")
    server.start()
    killed = command(settings, "spool", "send", CRASH_POINT_FOR_TESTS="after_sending_the_spool")
    assert killed.returncode == -signal.SIGKILL
    assert sent_ids(redis, settings) == ["a", "b"]
    assert spooled_ids(settings) == ["a", "b"]
    drain(settings, USER)
    again = command(settings, "spool", "send")
    assert (again.returncode, again.stdout) == (0, "2 items sent\n"), again.stderr
    assert sent_ids(redis, settings) == ["a", "b"]
    drain(settings, USER)
    assert applied(settings) == ["a", "b"]
    assert pending_of(redis, settings, USER, METER) == {}


# Writes so much that SQLite must write to the file itself before the end of the transaction, and dies there.
TORN = """
import os, signal, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 5")
database.execute("BEGIN IMMEDIATE")
row = (0.0, "event", "x" * 900)
database.executemany("INSERT INTO kept (kept_at, kind, content) VALUES (?, ?, ?)", [row] * 2_000)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_written_half_when_a_process_died_is_undone_and_everything_before_it_is_sent(
    billing: Billing, settings: Settings, server: Server
) -> None:
    server.stop()
    for each in "abc":
        billing.emit(USER, METER, 1, event_id=each)
    file = Path(str(settings.spool_path)) / "spool.sqlite3"
    whole = file.stat().st_size
    torn = subprocess.run([sys.executable, "-c", TORN, str(file)], check=False)
    assert torn.returncode == -signal.SIGKILL
    assert file.stat().st_size > whole + 1_000_000, "the half is in the file"
    assert file.with_name("spool.sqlite3-journal").exists()
    billing.emit(USER, METER, 1, event_id="d")
    assert spooled_ids(settings) == ["a", "b", "c", "d"]
    server.start()
    assert billing.send_spooled() == (4, False)
    drain(settings, USER)
    assert applied(settings) == ["a", "b", "c", "d"]


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

PRODUCER = """
import sys
from config.settings import load_settings
from worker.client import Billing
import os

name, users = sys.argv[1], sys.argv[2:]
with Billing.connect(load_settings(os.environ)) as billing:
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        for user in users:
            billing.emit(user, "credits", 1, event_id=f"{name}-{number:04}")
        print(line.strip(), flush=True)
"""


def test_processes_that_share_a_spool_lose_nothing_and_keep_the_order_of_each(
    billing: Billing, settings: Settings, server: Server
) -> None:
    names = ("p", "q")
    give_account(settings, "u2")
    give_account(settings, "u3")
    producers = {
        name: subprocess.Popen(
            [sys.executable, "-c", PRODUCER, name, USER, f"u{number}"],
            env=environment(settings), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number, name in enumerate(names, start=2)
    }  # fmt: skip

    def say(word: str) -> None:
        """One round of each producer, at the same time; returns when both are done."""
        for process in producers.values():
            assert process.stdin is not None
            print(word, file=process.stdin, flush=True)
        for process in producers.values():
            assert process.stdout is not None
            assert process.stdout.readline() == f"{word}\n"

    try:
        for process in producers.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        rounds = 0
        for up in (True, False, True, False, True):
            (server.start if up else server.stop)()
            for _ in range(12):
                say(f"round {rounds}")
                rounds += 1
        killed = producers.pop("q")
        killed.kill()
        killed.communicate()
        say(f"round {rounds}")
        rounds += 1
    finally:
        for process in producers.values():
            process.communicate()
    assert not billing.send_spooled(10_000).left
    for user in (USER, "u2", "u3"):
        drain(settings, user)
    p, q = [f"p-{number:04}" for number in range(rounds)], [f"q-{number:04}" for number in range(rounds - 1)]
    both = applied(settings)
    assert ([each for each in both if each in p], [each for each in both if each in q]) == (p, q)
    assert len(both) == len(p) + len(q)
    assert (applied(settings, "u2"), applied(settings, "u3")) == (p, q)


def test_a_forked_process_goes_on_with_the_spool(billing: Billing, settings: Settings, server: Server) -> None:
    server.stop()
    billing.emit(USER, METER, 1, event_id="parent")
    pid = os.fork()
    if not pid:
        answer = billing.emit(USER, METER, 1, event_id="child")
        os._exit(0 if answer.spooled else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert spooled_ids(settings) == ["parent", "child"]


def test_a_forked_process_sends_by_itself(billing: Billing, settings: Settings, server: Server, redis: Redis) -> None:
    server.stop()
    assert billing.emit(USER, METER, 1, event_id="parent").spooled  # and now a thread of the parent is to send it
    server.start()
    pid = os.fork()
    if not pid:
        billing.context.away_until = 0
        answer = billing.emit(USER, METER, 1, event_id="child")
        os._exit(1 if answer.spooled else 0)
    assert os.waitpid(pid, 0)[1] == 0
    assert sent_ids(redis, settings) == ["parent", "child"]


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_a_client_that_is_closed_sends_what_is_left(
    settings: Settings, server: Server, redis: Redis, kind: str
) -> None:
    client = open_client(kind, settings)
    server.stop()
    assert client.emit(USER, METER, 1, event_id="a").spooled
    server.start()
    client.context.away_until = 0
    client.close()
    assert sent_ids(redis, settings) == ["a"]
    assert spool_of(settings).is_empty()
    assert not senders()


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_a_client_that_is_closed_does_not_wait_for_a_redis_that_is_away(
    settings: Settings, server: Server, kind: str
) -> None:
    client = open_client(kind, settings)
    server.freeze()
    assert client.emit(USER, METER, 1, event_id="a").spooled
    began = time.monotonic()
    client.close()
    assert time.monotonic() - began < 0.3
    wait_until(lambda: not senders(), "nobody is left to send")
    assert spooled_ids(settings) == ["a"]


def test_who_finds_another_sending_takes_over_when_that_one_is_done(
    settings: Settings, server: Server, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooling, "_AWAY_SECONDS", 0.1)
    found: list[Sent | None] = []

    def note(context: Context, limit: int) -> Effects[Sent | None]:
        found.append((yield from send_in_turn(context, limit)))
        return found[-1]

    send_in_turn = spooling.send_in_turn
    monkeypatch.setattr(sending, "send_in_turn", note)
    with Billing.connect(settings.model_copy(update={"redis_socket_timeout_ms": 30_000})) as client:
        server.stop()
        assert client.emit(USER, METER, 1, event_id="a").spooled
        turn = None
        while turn is None:  # until a try of its own is over
            turn = spool_of(settings).take_turn()
        wait_until(lambda: None in found, "it finds another sending")
        wait_until(lambda: client.context.takes_redis_for_away, "nobody knows better yet")
        server.start()
        turn.close()
        wait_until(lambda: spool_of(settings).is_empty(), "it takes over", seconds=5)
    assert sent_ids(redis, settings) == ["a"]


def test_an_error_that_is_no_outage_does_not_pass_for_one(
    settings: Settings, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spooling, "_AWAY_SECONDS", 0.1)
    spool_of(settings).keep([Item("event", '{"event_id": "a", "colour": "red"}')])
    with Billing.connect(settings.model_copy(update={"redis_socket_timeout_ms": 30_000})) as client:
        client.context.away_until = time.monotonic() + 0.1
        assert client.emit(USER, METER, 1, event_id="b").spooled
        wait_until(lambda: "what is in the spool stays there" in caplog.text, "it has tried")
        wait_until(lambda: not client.context.takes_redis_for_away, "Redis is there", seconds=5)


def test_a_process_ends_though_something_is_in_its_spool(settings: Settings, server: Server) -> None:
    server.stop()
    script = (
        "from worker.client import Billing; print(Billing.connect().emit('u1', 'credits', 1, event_id='a').spooled)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert ended.stdout == "True\n"
    assert spooled_ids(settings) == ["a"]


def test_one_sends_at_a_time(settings: Settings, billing: Billing, server: Server, redis: Redis) -> None:
    server.stop()
    billing.emit(USER, METER, 1, event_id="a")
    server.start()
    turn = spool_of(settings).take_turn()
    assert turn is not None
    with turn:
        assert spool_of(settings).take_turn() is None
        with pytest.raises(SpoolUnavailable, match="another process is sending"):
            billing.send_spooled(1, 0.01)
        billing.context.away_until = 0
        assert billing.emit(USER, METER, 1, event_id="b").spooled, "it may not overtake what is being sent"
        assert sent_ids(redis, settings) == []
    wait_until(lambda: spool_of(settings).is_empty(), "the other is done")
    assert sent_ids(redis, settings) == ["a", "b"]


# ---------------------------------------------------------------------------------------------------------------------
# Operators and workers


def test_operators_see_what_is_spooled_and_send_it(billing: Billing, settings: Settings, server: Server) -> None:
    server.stop()
    kept = command(settings, "emit", "-", stdin=lines("a", "b"))
    assert (kept.returncode, kept.stdout) == (0, "0 events sent, 2 spooled\n"), kept.stderr
    billing.context.away_until = 0
    billing.credit_pool("request-1", 500)
    billing.release(USER, METER, "job-1")
    listed = json.loads(command(settings, "spool", "list", "--json").stdout)
    names = ("kind", "user_id", "event_id", "key", "request_id")
    assert [tuple(row[name] for name in names) for row in listed] == [
        ("event", USER, "a", None, None), ("event", USER, "b", None, None),
        ("credit", None, None, None, "request-1"), ("release", USER, None, "job-1", None),
    ]  # fmt: skip
    refused = command(settings, "spool", "send")
    assert refused.returncode == 1
    assert "Redis did not confirm" in refused.stderr
    server.start()
    status = json.loads(command(settings, "status", "--json").stdout)
    assert status["spooled"] == 4
    assert 0 < status["spooled_oldest_age_ms"] < 120_000
    assert "spooled on this machine 4" in command(settings, "status").stdout
    assert command(settings, "spool", "send").stdout == "4 items sent\n"
    assert command(settings, "spool", "list").stdout == "none\n"
    unset = command(settings, "spool", "list", METERFALL_SPOOL_PATH="")
    assert (unset.returncode, unset.stderr) == (
        2, "meterfall: METERFALL_SPOOL_PATH: unset; it names the folder of the spool\n",
    )  # fmt: skip


def test_a_dyno_sends_what_producers_on_its_machine_have_spooled(
    billing: Billing, settings: Settings, server: Server
) -> None:
    server.stop()
    for each in "abc":
        billing.emit(USER, METER, 1, event_id=each)
    server.start()
    with dyno(settings, METERFALL_SPOOL_PATH=str(settings.spool_path)):
        wait_until(lambda: applied(settings) == ["a", "b", "c"], "the dyno sent and applied them", seconds=30)
    assert spool_of(settings).is_empty()


def test_a_captured_part_that_contradicts_an_earlier_one_becomes_a_dead_letter(
    billing: Billing, settings: Settings, server: Server
) -> None:
    billing.reserve(USER, METER, 100, "job")
    billing.capture(USER, METER, "job", "page-1", 30)
    server.stop()
    billing.capture(USER, METER, "job", "page-1", 31)
    billing.emit(USER, METER, 1, event_id="after")
    server.start()
    assert billing.send_spooled() == (2, False)
    drain(settings, USER)
    assert applied(settings) == ["page-1", "after"]
    with worker_resources(settings) as resources:
        (letter,) = dead_letters.listed(resources)
    assert letter.reason == "id_conflict"


def test_what_a_newer_release_has_kept_is_left_to_it(billing: Billing, settings: Settings, server: Server) -> None:
    spool_of(settings).keep([Item("event", '{"event_id": "a", "colour": "red"}')])
    with pytest.raises(SpoolUnavailable, match="unknown to this release"):
        billing.send_spooled()
    assert billing.emit(USER, METER, 1, event_id="b").spooled
    assert len(spool_of(settings).oldest(10)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# A Redis without memory


def test_a_full_redis_loses_nothing_of_a_producer_that_spools(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    memory = int(redis.info("memory")["used_memory"])
    # A dyno's connections, scripts and heartbeats need about one MiB of it.
    redis.config_set("maxmemory", memory + 3 * 2**20)
    answers: list[EventAnswer] = []
    while sum(answer.spooled for answer in answers) < 200:
        many = [
            UsageEvent(event_id=f"e{n:05}", user_id=USER, meter=METER, quantity=1, reference_id="x" * 200)
            for n in range(len(answers), len(answers) + 50)
        ]
        answers += billing.emit_events(many)
    assert not answers[0].spooled
    assert stream_of(redis, settings, USER), "it is Redis that is full"
    with dyno(settings, METERFALL_SPOOL_PATH=str(settings.spool_path)):
        wait_until(lambda: len(applied(settings)) == len(answers), "all are applied", seconds=60)
        wait_until(lambda: spool_of(settings).is_empty(), "the spool is empty")
    assert applied(settings) == [answer.event_id for answer in answers]
    with worker_resources(settings) as resources:
        assert verify_ledger(resources).differences == []


# ---------------------------------------------------------------------------------------------------------------------
# Together with holds that the ledger grants


def test_work_goes_on_within_the_balance_while_redis_is_away(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    billing.check(USER, METER, 1)
    server.stop()
    for number in range(20):
        with billing.reserve(USER, METER, 60, f"job-{number}") as hold:
            assert hold.settle(40).spooled
    assert billing.check(USER, METER, 200).available == 1_000 - 20 * 40, "each counts as what it cost"
    with billing.reserve(USER, METER, 200, "given-back"):
        assert billing.check(USER, METER, 1).available == 0
    assert billing.check(USER, METER, 1).available == 200
    with pytest.raises(UsageLimitExceeded):
        billing.reserve(USER, METER, 201, "too-much")
    server.start()
    assert billing.send_spooled().left is False
    drain(settings, USER)
    assert rows(settings, "SELECT count(*), sum(amount) FROM usage_log") == [(20, 800)]
    assert rows(settings, "SELECT count(*) FROM ledger_hold") == [(0,)]
    with Billing.connect(settings) as fresh:
        wait_until(lambda: fresh.check(USER, METER, 1).available == 200, "nothing is held any more")
    assert pending_of(redis, settings, USER, METER).get("total", 0) == 0


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_parts_in_the_spool_count_whatever_becomes_of_their_hold(
    settings: Settings, server: Server, redis: Redis, kind: str
) -> None:
    give_account(settings, USER)
    with closing(open_client(kind, settings)) as client:
        client.check(USER, METER, 1)
        server.stop()
        document = client.reserve(USER, METER, 600, "document")
        for page in (1, 2, 3, 1):  # the first one again
            assert document.capture(f"page-{page}", 100).spooled
        assert client.check(USER, METER, 1).available == 400, "parts are paid out of the hold"
        assert document.settle(50).spooled
        assert client.check(USER, METER, 1).available == 650
        assert document.settle(50).spooled
        assert client.check(USER, METER, 1).available == 650

        released = client.reserve(USER, METER, 200, "released")
        released.capture("cover", 150)
        assert released.release().spooled
        assert client.check(USER, METER, 1).available == 500

        small = client.reserve(USER, METER, 10, "small")
        small.capture("more", 250)
        assert client.check(USER, METER, 1).available == 250, "a part counts in full, also beyond its hold"

        batch = client.reserve(USER, METER, 200, "batch")
        client.emit_events(
            [UsageEvent(event_id="batched", user_id=USER, meter=METER, quantity=20, hold_key=batch.answer.key)]
        )
        assert client.check(USER, METER, 1).available == 230
        with pytest.raises(UsageLimitExceeded):
            client.reserve(USER, METER, 231, "too-much")

        server.start()
        assert client.send_spooled().left is False
    drain(settings, USER)
    assert rows(settings, "SELECT sum(amount) FROM usage_log") == [(770,)]
    with Billing.connect(settings) as fresh:
        fresh.release(USER, METER, "small")  # it is open still
        wait_until(lambda: fresh.check(USER, METER, 1).available == 230, "nothing is held any more")
    assert rows(settings, "SELECT count(*) FROM ledger_hold") == [(0,)]
    assert pending_of(redis, settings, USER, METER).get("total", 0) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Traces

TRACES = {each: f"00-{number:032x}-{number:016x}-01" for number, each in enumerate(("a", "page", "job"), start=1)}


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported OpenTelemetry."""
    monkeypatch.setattr(tracing, "_api", lambda: None)


def recorded_traces(settings: Settings) -> dict[object, object]:
    return dict(rows(settings, "SELECT event_id, trace_id FROM usage_log"))  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_host")
def test_what_waits_in_the_spool_keeps_its_trace(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    hold = billing.reserve(USER, METER, 100, "job")
    server.stop()
    billing.emit(USER, METER, 1, event_id="a", traceparent=TRACES["a"])
    billing.emit(USER, METER, 1, event_id="without")
    billing.credit_pool("order", 100, traceparent=TRACES["a"])
    billing.capture(USER, METER, "job", "page", 30, traceparent=TRACES["page"])
    hold.settle(60, traceparent=TRACES["job"])
    server.start()
    assert billing.send_spooled() == Sent(5, left=False)
    ((_, credit),) = cast("list[tuple[bytes, dict[bytes, bytes]]]", redis.xrange(keys.SPONSORSHIP.entries))
    assert credit[b"t"] == TRACES["a"].encode()
    drain(settings, USER)
    wanted = {each: traceparent[3:35] for each, traceparent in TRACES.items()}
    assert recorded_traces(settings) == {**wanted, "without": None}


def test_the_trace_of_the_host_waits_in_the_spool_also(
    billing: Billing, settings: Settings, server: Server, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def sending_in(traceparent: str | None) -> Iterator[str | None]:
        yield traceparent

    server.stop()
    with monkeypatch.context() as patched:
        patched.setattr(recording, "sending", lambda _: sending_in(TRACES["a"]))
        billing.emit(USER, METER, 1, event_id="a")
        billing.emit(USER, METER, 1, event_id="page", traceparent=TRACES["page"])
    server.start()
    billing.send_spooled()
    drain(settings, USER)
    assert recorded_traces(settings) == {each: TRACES[each][3:35] for each in ("a", "page")}


@pytest.mark.usefixtures("no_host")
def test_a_spool_of_an_earlier_release_is_sent(
    billing: Billing, settings: Settings, server: Server, redis: Redis
) -> None:
    assert settings.spool_path is not None
    settings.spool_path.mkdir()
    event = UsageEvent(event_id="earlier", user_id=USER, meter=METER, quantity=1)
    with closing(sqlite3.connect(settings.spool_path / "spool.sqlite3")) as database:
        database.execute(
            "CREATE TABLE kept (id INTEGER PRIMARY KEY AUTOINCREMENT, kept_at REAL NOT NULL, kind TEXT NOT NULL, "
            "content TEXT NOT NULL, captured_from TEXT)"
        )
        row = (time.time(), "event", event.model_dump_json())
        database.execute("INSERT INTO kept (kept_at, kind, content) VALUES (?, ?, ?)", row)
        database.commit()
    spools = [spool_of(settings) for _ in range(4)]
    with ThreadPoolExecutor(len(spools)) as threads:
        assert list(threads.map(lambda spool: spool.length(), spools)) == [1] * len(spools)
    spools[0].keep([Item("event", event.model_copy(update={"event_id": "a"}).model_dump_json(), None, TRACES["a"])])
    assert billing.send_spooled() == Sent(2, left=False)
    drain(settings, USER)
    assert recorded_traces(settings) == {"earlier": None, "a": TRACES["a"][3:35]}
