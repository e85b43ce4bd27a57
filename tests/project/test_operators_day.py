"""An operator's day: a deployment by Procfile and roles, load, one trouble after the other, and the remedy of each.

What is wrong must be told within ten seconds: by the endpoint of a dyno, by `health`, by `status`, and in the log where
a dyno meets it. Remedies are the commands of docs/monitoring.md, run as they stand. At the end the books are proven.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from schemas.events import UsageEvent
from tests.faults.house import METER, SLOW_SECONDS, House, open_house
from tests.faults.operators import Operator, make_logins, redis_roles, settings_of
from tests.support.commands import Meterfall, serve_commands
from tests.support.console import blocks_of, sections_of
from tests.support.ledger import rows
from tests.support.oracle import NOBODY
from tests.support.paths import ROOT
from tests.support.receiver import receiver
from tests.support.streams import partition_of
from tests.support.waiting import wait_until
from tests.support.web import free_port, got
from worker.client import Billing
from worker.demo.servers import Server, find_postgres, find_redis, postgres_server, redis_server
from worker.keyspace import keys
from worker.rules.words import counted

# The promise: so long after its cause a trouble is told.
TOLD_SECONDS = 10
# What was trimmed is told within a minute.
LOST_SECONDS = 60
PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text("utf-8").splitlines())
MIGRATIONS = ROOT / "worker/ledger/migrations/versions"
PAGE = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
REMEDIES = sections_of(PAGE)


class Day:
    """A house under load, an operator with the page of remedies, and a dyno that is watched through its endpoint."""

    def __init__(self, house: House, operator: Operator, monitor: Meterfall) -> None:
        self.house, self.operator, self.shell, self.monitor = house, operator, operator.shell, monitor
        self.port = free_port()
        self.settings = settings_of("worker", house.settings).model_copy(update={"http_port": self.port})
        self.dyno: subprocess.Popen[bytes] | None = None
        self.followed: set[str] = set()

    @contextmanager
    def dynos(self, **changes: object) -> Iterator[subprocess.Popen[bytes]]:
        """Run the line `worker` of the Procfile, watched from now on."""
        interpreter, *options = PROCFILE["worker"].split()
        assert (interpreter, options[0]) == ("python", "-m")
        settings = self.settings.model_copy(update=changes)
        with self.house.run(*options[1:], settings=settings) as process:
            self.dyno = process
            wait_until(lambda: got(self.port, "/ready")[0] == 200, "the dyno is ready", SLOW_SECONDS, every=0.25)
            yield process

    @contextmanager
    def load(self) -> Iterator[None]:
        """Have services emit events all the time, as the role `producer`."""
        enough = Event()

        def produce() -> None:
            with Billing.connect(settings_of("producer", self.house.settings)) as producer:
                while not enough.wait(0.2):
                    self.house.send(self.house.new_events(8), producer)

        producer = Thread(target=produce)
        producer.start()
        try:
            yield
        finally:
            enough.set()
            producer.join()

    def failed(self) -> dict[str, str]:
        """The failed checks that the endpoint tells, by name."""
        code, body = got(self.port, "/ready")
        return dict(json.loads(body)["failed"]) if code else {}

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of a metric now; the sum of those that differ in other labels."""
        families = text_string_to_metric_families(got(self.port, "/metrics")[1])
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        found = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
        return sum(found) if found else None

    def is_told(self, check: str, text: str, logged: str | None = None) -> None:
        """A failed check is told everywhere within the promised time."""
        wait_until(lambda: text in self.failed().get(check, ""), f"/ready tells {check}", TOLD_SECONDS, every=0.25)
        assert self.metric("meterfall_failed_checks", check=check)
        health, status = self.monitor("health"), self.monitor("status")
        assert (health.code, status.code) == (1, 1)
        assert any(f" {check}: " in line and text in line for line in health.out.splitlines()), health.out
        assert status.out.startswith(("DEGRADED: ", "DOWN: ")), status.out
        # Lines are wrapped, at words and within long ones.
        assert "".join(text.split()) in "".join(status.out.split()), status.out
        if logged is not None:
            wait_until(lambda: logged in self.log(), f"the log tells {logged}", TOLD_SECONDS)

    def is_over(self, *checks: str) -> None:
        """Checks no longer fail, within the promised time."""
        wait_until(lambda: not self.failed().keys() & set(checks), f"{checks} are well", SLOW_SECONDS, every=0.25)

    def prints(self, block: str) -> list[str]:
        """The lines that commands print."""
        assert self.shell.run(block) == []
        return self.shell.printed

    def remedy(self, alert: str, **variables: object) -> list[str]:
        """Run the commands of an alert, as they stand on the page; return what they print."""
        self.shell.export(variables)
        blocks = [block.text for block in blocks_of(REMEDIES[alert]) if block.language == "console"]
        assert blocks, f"{alert} has no command"
        self.followed.add(alert)
        return [line for block in blocks for line in self.prints(block)]

    def refuses(self, login: str, command: str) -> str:
        """What a command says that must not succeed."""
        return " ".join(self.prints(f"{login}$ if {command}; then exit 99; fi\n"))

    def log(self) -> str:
        """The log of the watched dyno."""
        assert self.dyno is not None
        return self.house.log_of(self.dyno)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """A Postgres, and a Redis that knows the roles after a restart also."""
    users = tmp_path / "users.acl"
    users.write_text("".join(f"user {name} {' '.join(rules)}\n" for name, rules in redis_roles().items()), "utf-8")
    with (
        postgres_server(find_postgres(os.environ)) as postgres,
        redis_server(find_redis(os.environ), appendfsync="always", options={"aclfile": str(users)}) as redis,
    ):
        yield postgres, redis


@pytest.fixture
def day(servers: tuple[Server, Server], tmp_path: Path) -> Iterator[Day]:
    """The morning: empty servers, the line `release` of the Procfile, and the roles put in force."""
    postgres, redis = servers
    release = PROCFILE["release"].split()
    owner = {**os.environ, "DATABASE_URL": postgres.url}
    done = subprocess.run(
        [sys.executable, *release[1:], "--roles"], env=owner, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    make_logins(postgres.url)
    with open_house(postgres, redis, tmp_path) as house, serve_commands() as server:
        yield Day(house, Operator(house), Meterfall(server, settings_of("monitor", house.settings)))


@pytest.mark.timeout(300)
def test_an_operators_day(day: Day) -> None:
    nobody_drains(day)
    # A receiver that fails once is given up at once, not after a day.
    with day.dynos(webhook_private_addresses=True, webhook_max_attempts=1) as dyno:
        day.is_over("workers")
        assert day.failed() == {}
        with day.load():
            partition_is_halted(day)
            partition_is_paused(day)
            events_are_refused(day)
            server_is_away(day, "redis", "Redis at")
            server_is_away(day, "postgres", "OperationalError")
            redis_may_evict(day)
            producer_has_another_number_of_partitions(day)
        entries_are_trimmed(day)
        redis_is_flushed(day)
        receiver_fails(day)
        books_are_changed_by_hand(day)
        dyno.send_signal(signal.SIGTERM)
        assert dyno.wait(SLOW_SECONDS) == 0
    words_destroy_nothing(day)
    strangers_are_told_what_is_wrong(day)
    with_commands = {
        alert for alert, text in REMEDIES.items() if "```console" in text and alert.startswith("Meterfall")
    }
    assert day.followed == with_commands
    with day.dynos():
        day.house.wait_until_drained()
    day.house.prove()


def append(day: Day, partition: keys.Partition, event: UsageEvent) -> None:
    """Append an event by a plain XADD, as a producer of another language does."""
    entry: dict[Any, Any] = {"v": "1", "e": event.model_dump_json(exclude_none=True)}
    day.house.redis.xadd(partition.entries, entry)


def nobody_drains(day: Day) -> None:
    """Before the first dyno runs. A fresh installation has lost nothing."""
    assert day.monitor("status").out.startswith("DOWN: nobody drains: no dyno is alive\n")
    (line,) = day.monitor("health").out.splitlines()
    assert line.startswith("down workers: nobody drains")


def partition_is_halted(day: Day) -> None:
    with psycopg.connect(day.house.postgres.url, autocommit=True) as owner:
        owner.execute("REVOKE INSERT ON usage_log FROM meterfall_worker")
        day.is_told("halted", "lacks a right", logged="lacks a right")
        assert day.metric("meterfall_partition_halted")
        day.remedy("MeterfallHalted")
    day.is_over("halted")


def partition_is_paused(day: Day) -> None:
    partition = partition_of(day.house.settings, day.house.users[0])
    day.prints(f"operator$ meterfall partition pause {partition.number} --reason noise\n")
    day.is_told("paused", "noise")
    assert day.metric("meterfall_partition_paused", partition=str(partition.number)) == 1
    day.remedy("MeterfallPaused", PARTITION=partition.number)
    day.is_over("paused")


def events_are_refused(day: Day) -> None:
    wrong = [
        UsageEvent(event_id=f"x{n}", user_id=user, meter="nonsense", quantity=1)
        for n, user in enumerate(day.house.users)
    ]
    for event in wrong:
        entry: dict[Any, Any] = {"v": "1", "e": event.model_dump_json(exclude_none=True)}
        day.house.redis.xadd(partition_of(day.house.settings, event.user_id).entries, entry)
    day.is_told("dead_letters", f"{len(wrong)} unknown_meter", logged="unknown_meter")
    assert day.metric("meterfall_dead_letters_open", reason="unknown_meter") == len(wrong)
    day.remedy("MeterfallDeadLetters")


def server_is_away(day: Day, name: str, logged: str) -> None:
    server = day.house.redis_server if name == "redis" else day.house.postgres
    outages = day.log().count("work goes on after")
    server.kill()
    day.is_told(name, "connect", logged)
    assert day.metric("meterfall_server_up", server=name) == 0
    assert got(day.port, "/ready")[0] == 503
    server.start()
    day.is_over(name)
    wait_until(lambda: day.log().count("work goes on after") > outages, "the log tells the end", SLOW_SECONDS)


def redis_may_evict(day: Day) -> None:
    day.house.redis.config_set("maxmemory-policy", "allkeys-lru")
    day.is_told("redis_setup", "allkeys-lru")
    day.remedy("MeterfallUnhealthy")
    day.house.redis.config_set("maxmemory-policy", "noeviction")
    day.is_over("redis_setup")


def producer_has_another_number_of_partitions(day: Day) -> None:
    stray = day.house.settings.partitions + 3
    event = UsageEvent(event_id="stray", user_id=day.house.users[0], meter=METER, quantity=1, multiplier="1")
    append(day, keys.partitions_of(stray + 1)[stray], event)
    day.house.accept([event])
    day.is_told("stranded", f"stream {stray}")
    day.remedy("MeterfallStranded", STREAM=stray)
    day.prints("operator$ meterfall dead replay --reason wrong_partition --yes\n")
    day.is_over("stranded")


def entries_are_trimmed(day: Day) -> None:
    """By a producer, with an option of XADD. Nothing else happens meanwhile, so all of them are known."""
    house = day.house
    house.wait_until_drained()
    partition = partition_of(house.settings, house.users[0])
    day.prints(f"operator$ meterfall partition pause {partition.number} --reason inventory\n")
    lost = [event for event in house.new_events(16) if partition_of(house.settings, event.user_id) == partition]
    house.billing.emit_events(lost)
    entry: dict[Any, Any] = {"v": "1", "e": "{}"}
    house.redis.xadd(partition.entries, entry, maxlen=1, approximate=False)
    house.accepted.dead[(*NOBODY, "missing_field")] += 1
    wait_until(lambda: "lost" in day.failed(), "lost entries are told", LOST_SECONDS, every=0.25)
    day.is_told("lost", f"{counted(len(lost), 'stream entry')} lost", logged="lost")
    assert day.metric("meterfall_partition_lost_entries", partition=str(partition.number)) == len(lost)
    day.prints(f"operator$ meterfall partition resume {partition.number}\n")
    house.wait_until_drained()
    freed = day.remedy("MeterfallLost", OPERATOR="jane")
    assert f"{len(lost)} pending events freed" in " ".join(freed)
    day.is_over("lost")
    assert house.send(lost) == []


def redis_is_flushed(day: Day) -> None:
    house = day.house
    house.wait_until_drained()
    lost = house.emit(8)
    house.wait_until_drained()
    house.redis.flushall()
    day.is_told("redis_emptied", "found empty", logged="Redis was")
    assert house.send(lost) == []  # again: duplicates, as a service cannot know which were lost
    day.remedy("MeterfallRedisEmptied", OPERATOR="jane")
    day.is_over("redis_emptied")


def receiver_fails(day: Day) -> None:
    day.shell.export({"METERFALL_WEBHOOK_PRIVATE_ADDRESSES": "true"})
    with receiver() as there:
        there.answer = lambda _: 500
        day.prints(f"operator$ meterfall webhooks add {there.url}\n")
        ((webhook_id,),) = rows(day.house.settings, "SELECT webhook_id FROM webhook")
        assert "answered 500" in day.refuses("operator", f"meterfall webhooks test {webhook_id}")
        day.is_told("notices_dead", "1 notice given up", logged="given up: answered 500")
        assert day.metric("meterfall_notices_dead") == 1
        there.answer = lambda _: 204
        day.remedy("MeterfallNoticesGivenUp")
        day.is_over("notices_dead")
        wait_until(lambda: len(there.came) == 2, "the notice has come", SLOW_SECONDS)
        day.prints(f"operator$ meterfall webhooks remove {webhook_id} --yes\n")


def books_are_changed_by_hand(day: Day) -> None:
    with psycopg.connect(day.house.postgres.url, autocommit=True) as owner:
        change = "UPDATE balance SET purchased = purchased + %s WHERE user_id = %s AND meter = %s"
        owner.execute(change, (1, day.house.users[0], METER))
        day.remedy("MeterfallProofDiffers")
        day.is_told("proof", "1 difference")
        assert day.metric("meterfall_proof_differences") == 1
        owner.execute(change, (-1, day.house.users[0], METER))
    day.remedy("MeterfallProofOld")
    day.is_over("proof")


def words_destroy_nothing(day: Day) -> None:
    before = rows(day.house.settings, "SELECT count(*) FROM usage_log")
    done = day.refuses("owner", "meterfall migrate base")
    assert "--destroy meterfall" in done
    assert "usage_log" in done
    assert rows(day.house.settings, "SELECT count(*) FROM usage_log") == before


def strangers_are_told_what_is_wrong(day: Day) -> None:
    """A role without the right, a typing mistake in a setting, tables of another release: one line each."""
    said = day.refuses("producer", f"meterfall account grant {day.house.users[0]} {METER} 5 --key order-1")
    assert "login_producer" in said
    assert "meterfall_operator" in said
    said = day.refuses("worker", "METERFALL_BATCH_MAX_EVENT=5 meterfall worker run --burst")
    assert "METERFALL_BATCH_MAX_EVENTS" in said
    newest, before = sorted((path.name[1:5] for path in MIGRATIONS.glob("m*.py")), reverse=True)[:2]
    day.prints(f"owner$ meterfall migrate {before} --destroy meterfall\n")
    said = day.refuses("worker", "meterfall worker run --burst")
    assert f"tables are {before}, this release wants {newest}" in said
    day.prints("owner$ meterfall migrate --roles\n")
