"""METERFALL_REDIS_WAIT_REPLICAS: an event is confirmed once replicas have it, so that a failover loses none."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings, SettingsError, load_settings
from schemas.events import UsageEvent
from tests.client.clients import open_client
from tests.support import oracle
from tests.support.ledger import give_accounts, rows
from tests.support.proxy import Proxy
from tests.support.resources import settings_for, worker_resources
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.client.effects import Command
from worker.consumer.drain import drain_stream
from worker.demo.servers import Server, find_redis, redis_server
from worker.errors import RedisUnavailable
from worker.keyspace import keys

pytestmark = pytest.mark.once

METER = "premium_voice"
USERS = [f"u{number}" for number in range(8)]
KINDS = pytest.mark.parametrize("kind", ["blocking", "awaited"])


@dataclass
class Pair:
    """A primary and its replica, whose link goes through `link`."""

    primary: Server
    replica: Server
    link: Proxy
    settings: Settings

    def waits_for_replica(self) -> None:
        """Return once the replica follows."""
        with Redis.from_url(self.replica.url) as replica:
            wait_until(lambda: replica.info("replication")["master_link_status"] == "up", "the replica follows")

    def promoted(self) -> Settings:
        """Kill the primary, promote the replica; return settings that name it."""
        self.primary.kill()
        with Redis.from_url(self.replica.url) as replica:
            replica.replicaof("NO", "ONE")
        return self.settings.model_copy(update={"redis_url": self.replica.url})


@pytest.fixture
def pair(emptied_database_url: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        binary = find_redis(os.environ)
        primary = stack.enter_context(redis_server(binary))
        path = re.fullmatch(r"unix://(.*)\?db=0", primary.url)
        assert path is not None
        link = stack.enter_context(Proxy(Path(path[1])))
        replica = stack.enter_context(redis_server(binary, options={"replicaof": f"127.0.0.1 {link.port}"}))
        settings = settings_for(
            emptied_database_url, primary.url, partitions=4, redis_wait_replicas=1, redis_wait_timeout_ms=150
        )
        made = Pair(primary, replica, link, settings)
        give_accounts(settings, USERS, "basic")
        with worker_resources(settings) as resources:
            resources.claim()
        made.waits_for_replica()
        yield made
        link.forward()


def apply_all(settings: Settings) -> None:
    with worker_resources(settings) as resources:
        for stream in keys.streams(settings.partitions):
            while drain_stream(resources, stream).more:
                pass


@KINDS
def test_an_event_that_no_replica_has_is_raised_also_when_it_is_repeated(pair: Pair, kind: str) -> None:
    with closing(open_client(kind, pair.settings)) as billing:
        assert not billing.emit(USERS[0], METER, 1, event_id="e0").spooled
        assert billing.check(USERS[0], METER, 1).allowed, "its balance is cached"
        pair.replica.freeze()
        for _ in range(2):
            with pytest.raises(RedisUnavailable, match="0 of 1 replicas") as caught:
                billing.emit(USERS[0], METER, 1, event_id="e1")
            assert [event.event_id for event in caught.value.events] == ["e1"]
        # Another connection has written nothing yet.
        with (
            closing(open_client(kind, pair.settings)) as other,
            pytest.raises(RedisUnavailable, match="0 of 1 replicas"),
        ):
            other.emit(USERS[0], METER, 1, event_id="e1")
        with pytest.raises(RedisUnavailable, match="0 of 1 replicas"):
            billing.emit_events(
                [UsageEvent(event_id=f"m{n}", user_id=USERS[n], meter=METER, quantity=1) for n in (1, 2)]
            )
        with pytest.raises(RedisUnavailable, match="0 of 1 replicas"):
            billing.charge(USERS[0], METER, 1, "e2")
        assert billing.check(USERS[0], METER, 1).allowed, "Redis itself answers"
        hold = billing.reserve(USERS[0], METER, 5, "job-1")
        with pytest.raises(RedisUnavailable, match="0 of 1 replicas"):
            billing.reserve(USERS[0], METER, 5, "job-2").capture("page-1", 1)
        with pytest.raises(RedisUnavailable, match="0 of 1 replicas"):
            hold.settle(4)
        # Repeats that write nothing, on a connection that has written nothing: WAIT alone would confirm them.
        repeats: list[Callable[[Any], object]] = [
            lambda other: other.charge(USERS[0], METER, 1, "e2"),
            lambda other: other.settle(USERS[0], METER, "job-1", 4),
            lambda other: other.capture(USERS[0], METER, "job-2", "page-1", 1),
        ]
        for repeat in repeats:
            with (
                closing(open_client(kind, pair.settings)) as other,
                pytest.raises(RedisUnavailable, match="0 of 1 replicas"),
            ):
                repeat(other)
        pair.replica.thaw()
        assert not billing.emit(USERS[0], METER, 1, event_id="e1").spooled
    apply_all(pair.settings)
    assert rows(pair.settings, "SELECT event_id FROM usage_log ORDER BY event_id") == [
        ("e0",), ("e1",), ("e2",), ("job-1",), ("m1",), ("m2",), ("page-1",),
    ]  # fmt: skip


@KINDS
def test_the_spool_keeps_an_event_until_a_replica_has_it(pair: Pair, kind: str, tmp_path: Path) -> None:
    settings = pair.settings.model_copy(update={"spool_path": tmp_path / "spool", "redis_down_pause_ms": 0})
    pair.replica.freeze()
    with closing(open_client(kind, settings)) as billing:
        assert billing.emit(USERS[0], METER, 1, event_id="e1").spooled
        with Redis.from_url(pair.primary.url) as primary:
            wait_until(lambda: any(primary.xlen(each.entries) for each in keys.streams(4)), "the primary has it")
    with Billing.connect(settings) as another:
        with pytest.raises(RedisUnavailable):
            another.send_spooled()
        pair.replica.thaw()
        wait_until(lambda: another.send_spooled().left == 0, "the spool is empty")
    apply_all(settings)
    assert rows(settings, "SELECT event_id FROM usage_log") == [("e1",)]


@KINDS
def test_nothing_accepted_is_lost_when_the_replica_takes_over(pair: Pair, kind: str) -> None:
    accepted, refused, stop = oracle.Accepted(), Event(), Event()

    def produce(user: str) -> None:
        with closing(open_client(kind, pair.settings)) as billing:
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    billing.emit(user, METER, 1, event_id=f"{user}-{number}")
                except RedisUnavailable:
                    refused.set()
                else:
                    accepted.events[user, f"{user}-{number}"] = 1

    producers = [Thread(target=produce, args=(user,)) for user in USERS[:4]]
    for producer in producers:
        producer.start()
    try:
        wait_until(lambda: len(accepted.events) > 200, "they produce")
        pair.link.black_hole()  # what the primary takes from now on, the replica never sees
        deadline = monotonic() + 0.5
        wait_until(lambda: refused.is_set() or monotonic() > deadline, "a call is refused, or none will be")
        settings = pair.promoted()
    finally:
        stop.set()
        for producer in producers:
            producer.join()
    apply_all(settings)
    found = {each for (each,) in rows(settings, "SELECT event_id FROM usage_log")}
    assert {event_id for _, event_id in accepted.events} - found == set(), "accepted and lost"
    assert refused.is_set()
    # What was refused may be there all the same.
    accepted.events |= {(str(event_id).split("-")[0], str(event_id)): 1 for event_id in found}
    with worker_resources(settings) as resources:
        oracle.prove(resources, accepted)


def test_without_the_setting_no_command_is_added(redis_url: str) -> None:
    settings = settings_for(None, redis_url)
    with Billing.connect(settings) as billing:
        assert billing.context.confirmation == ()
    assert Command(("PING",)).records is False


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"METERFALL_REDIS_WAIT_REPLICAS": "-1"}, "METERFALL_REDIS_WAIT_REPLICAS: .* greater than or equal to 0"),
        ({"METERFALL_REDIS_WAIT_REPLICAS": "one"}, "METERFALL_REDIS_WAIT_REPLICAS: .* integer"),
        (
            {"METERFALL_REDIS_WAIT_REPLICAS": "1", "METERFALL_REDIS_WAIT_TIMEOUT_MS": "500"},
            "METERFALL_REDIS_WAIT_TIMEOUT_MS: must be less than METERFALL_REDIS_CHECK_TIMEOUT_MS, which is 500",
        ),
        (
            {"METERFALL_REDIS_WAIT_REPLICAS": "1", "METERFALL_REDIS_CHECK_TIMEOUT_MS": "100"},
            "METERFALL_REDIS_WAIT_TIMEOUT_MS: must be less than METERFALL_REDIS_CHECK_TIMEOUT_MS, which is 100",
        ),
    ],
)
def test_a_wrong_value_is_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings(environment)
    load_settings({"METERFALL_REDIS_CHECK_TIMEOUT_MS": "100"})  # nothing waits
