"""`status` and `health`: what they say in every trouble, in 80 columns and 25 lines, with either server away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from time import monotonic

import psycopg
import pytest
from redis import Redis

from config.settings import Settings
from schemas.export import FOLDER
from schemas.status import Health, Status
from tests.support.commands import METER, USER, Done, Meterfall, lines_of
from tests.support.ledger import empty_ledger, give_account
from tests.support.paths import ROOT
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain, partition_of
from tests.support.waiting import wait_until
from worker.demo.servers import Server, find_postgres, postgres_server
from worker.keyspace import keys
from worker.ledger.connection import batch_connection
from worker.ledger.overviews import recently_uncollected

WIDTH, LINES = 80, 25


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[Server]:
    """A Postgres that only this module uses, and may stop."""
    from worker.ledger.migrate import migrate

    with postgres_server(find_postgres(os.environ)) as server:
        migrate(server.url)
        yield server


@pytest.fixture
def settings(own_postgres: Server, own_redis: Server) -> Iterator[Settings]:
    own_postgres.start()
    own_redis.start()
    empty_ledger(own_postgres.url)
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
    yield settings_for(own_postgres.url, own_redis.url)
    own_postgres.start()
    own_redis.start()


def lines(shown: Done) -> list[str]:
    """The lines of a status for people, after it was seen to fit the terminal of an operator."""
    assert "Traceback" not in shown.err
    found = shown.out.splitlines()
    assert len(found) <= LINES, shown.out
    assert max(map(len, found)) <= WIDTH, shown.out
    assert ".. " not in shown.out, "one full stop ends a finding"
    return found


def test_status_is_ok_with_a_dyno_and_down_without_one(settings: Settings, meterfall: Meterfall) -> None:
    give_account(settings, USER)
    with dyno(settings):
        wait_until(lambda: meterfall("health").code == 0, "the dyno leads, and all is well", seconds=30)
        shown = meterfall("status")
        assert (shown.code, lines(shown)[0].split()[0]) == (0, "OK"), shown
        assert meterfall.done("health") == ""
        meterfall.done("emit", "-", stdin="".join(lines_of({"event_id": f"e{n}"}) for n in range(300)))
        wait_until(lambda: meterfall("status", "--json").json["lag"] == 0, "they are applied", seconds=30)
        assert meterfall.done("status", "--json")["per_second"] > 15, "300 events within the last 15 seconds"
    wait_until(lambda: meterfall("health").code == 1, "its lease is over", seconds=30)
    shown = meterfall("status")
    assert (shown.code, lines(shown)[0]) == (1, "DOWN: nobody drains: no dyno is alive")
    assert meterfall("health").out.startswith("down workers: nobody drains")


def test_status_names_work_that_no_account_paid_and_what_to_do(
    settings: Settings, meterfall: Meterfall, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_account(settings, USER)
    assert meterfall("status", "--json").json["uncollected"] == []
    events = [json.dumps({"event_id": f"e{n}", "user_id": "new", "meter": METER, "quantity": 40}) for n in range(3)]
    events.append(json.dumps({"event_id": "e3", "user_id": "other", "meter": "ocr_tokens", "quantity": 7}))
    meterfall.done("emit", "-", stdin="\n".join(events))
    drain(settings, "new")
    drain(settings, "other")
    shown = " ".join(" ".join(lines(meterfall("status"))).split())
    assert f"in a day no account paid {METER} 3 events, 120 units; ocr_tokens 1 event, 7 units: " in shown
    assert "`meterfall report uncollected`" in shown
    assert meterfall("status", "--json").json["uncollected"] == [
        {"meter": METER, "events": 3, "amount": 120}, {"meter": "ocr_tokens", "events": 1, "amount": 7},
    ]  # fmt: skip
    with worker_resources(settings) as resources, batch_connection(resources.engine) as postgres:
        assert recently_uncollected(postgres, 86_400, 2) == [("ocr_tokens", 1, 7), (METER, 1, 40)]
        assert recently_uncollected(postgres, 0, 10_000) == []


def test_status_tells_what_it_knows_with_either_server_away(
    settings: Settings, own_redis: Server, own_postgres: Server, meterfall: Meterfall
) -> None:
    give_account(settings, USER)
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "a"}, {"event_id": "b"}))
    meterfall.done("partition", "pause", "3", "--reason", "a look", "--by", "jane")
    own_postgres.kill()
    began = monotonic()
    shown = meterfall("status")
    assert (shown.code, lines(shown)[0][:31]) == (1, "DOWN: Postgres does not answer:")
    assert "2 stream entries" in shown.out
    assert "partition 3 is paused as Redis says" in " ".join(shown.out.split())
    found = Status.model_validate_json(meterfall("status", "--json").out)
    assert (found.lag, found.accounts, found.dead_letters, found.postgres.answers) == (2, None, None, False)
    own_redis.kill()
    assert [one.check for one in Health.model_validate_json(meterfall("health", "--json").out).findings] == [
        "redis", "postgres",
    ]  # fmt: skip
    own_postgres.start()
    shown = meterfall("status")
    assert shown.code == 1
    assert lines(shown)[0].startswith("DOWN: Redis at ")
    assert "1 account, no open dead letters" in shown.out
    found = Status.model_validate_json(meterfall("status", "--json").out)
    assert (found.lag, found.partitions, found.accounts) == (None, (), 1)
    assert monotonic() - began < 60


def test_status_is_short_in_all_troubles_at_once(settings: Settings, own_redis: Server, meterfall: Meterfall) -> None:
    give_account(settings, USER)
    bad = [
        {"user_id": USER, "event_id": f"bad-{n}", "meter": ("brand_new", METER)[n % 2], "quantity": -(n % 2) or 1}
        for n in range(400)
    ]
    meterfall.done("emit", "--raw", "-", stdin="\n".join(map(json.dumps, bad)))
    drain(settings, USER)
    with Redis.from_url(own_redis.url) as redis:
        for stream in keys.streams(settings.partitions):
            redis.set(stream.halted, "DiskFull: could not extend file " + "base/16384/" * 40)
            if stream != partition_of(settings, USER):
                redis.xadd(stream.entries, {"v": "1", "r": USER}, id="1700000000000-1")
        for number in (11, 12, 40):
            redis.xadd(keys.Partition(number).entries, {"v": "1", "r": USER})
        redis.set(keys.FOUND_EMPTY, 1_700_000_000_000)
        redis.config_set("maxmemory-policy", "allkeys-lru")
        for partition in "0", "1", "2":
            meterfall.done("partition", "pause", partition, "--reason", "x" * 300, "--by", "jane")
        try:
            shown = meterfall("status")
            health = meterfall("health")
        finally:
            redis.config_set("maxmemory-policy", "noeviction")
    text = " ".join(" ".join(lines(shown)).split())
    assert shown.code == health.code == 1
    assert "partitions 0–7, sponsor are halted: DiskFull" in text
    assert "events wait for" in text
    checks = {line.split(":")[0] for line in health.out.splitlines()}
    assert checks == {
        "down workers", "degraded lag", "degraded halted", "degraded paused", "degraded stranded",
        "degraded dead_letters", "degraded redis_emptied", "degraded redis_setup",
    }  # fmt: skip
    assert "3 events in stream 11–12, 40" in health.out
    assert "degraded lag" not in meterfall("health", "--max-lag-seconds", "2000000000").out


def test_a_proof_leaves_its_result_in_the_status(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "a", "quantity": 5}))
    drain(settings, USER)
    assert meterfall("status", "--json").json["proof"] is None
    meterfall.done("verify")
    assert meterfall("status", "--json").json["proof"]["differences"] == 0
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as postgres:
        postgres.execute("UPDATE balance SET used = 4 WHERE meter = %s", (METER,))
    wrong = meterfall("verify", "--json")
    record = next(one for one in wrong.json["differences"] if one["kind"] == "balance used")
    assert wrong.code == 1
    assert (record["user_id"], record["meter"], record["expected"], record["found"]) == (USER, METER, "5", "4")
    found = Status.model_validate_json(meterfall("status", "--json").out)
    assert found.proof is not None
    assert found.proof.differences == len(wrong.json["differences"])
    assert "proof" in {one.check for one in found.findings}


def test_a_watch_ends_on_ctrl_c(settings: Settings) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("METERFALL_")}
    environment |= {"REDIS_URL": settings.redis_url, "DATABASE_URL": str(settings.database_url)}
    watching = subprocess.Popen(
        [sys.executable, "-m", "worker", "status", "--watch", "0.5"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watching.stdout is not None
    shown = 0
    while shown < 2:
        shown += watching.stdout.readline().startswith("DOWN: nobody drains")
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=20)
    assert (watching.returncode, errors) == (130, "")


def test_the_published_schema_describes_what_is_printed(settings: Settings, meterfall: Meterfall) -> None:
    for command, name in (("status", "status"), ("health", "health"), ("verify", "proof_report")):
        schema = json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
        printed = meterfall(command, "--json").json
        assert set(printed) == set(schema["properties"]), command
