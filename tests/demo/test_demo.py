"""The demo's load, which is pure, and the demo itself as anyone would start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from redis import Redis
from rich.progress import Progress

from tests.support.ledger import rows
from tests.support.resources import settings_for, worker_resources
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.demo.periods import first_start
from worker.demo.servers import Servers
from worker.demo.sponsorship import prove_sponsored, serve_callers
from worker.demo.stage import Sponsored, Stage
from worker.demo.work import Emitted, Held, Malformed, make_customers, make_load
from worker.keyspace import keys
from worker.rules.calendar import CALENDAR_CADENCES, boundary, index_at

ROOT = Path(__file__).parents[2]
METERS = {"basic": ["ocr_tokens", "premium_voice"], "pro": ["relay_credits"]}
CUSTOMERS = make_customers("u-", 100, METERS)


def test_the_same_seed_makes_the_same_load() -> None:
    assert list(make_load(7, 500, CUSTOMERS)) == list(make_load(7, 500, CUSTOMERS))
    assert list(make_load(7, 500, CUSTOMERS)) != list(make_load(8, 500, CUSTOMERS))


def test_few_users_do_most_of_the_work_and_in_bursts() -> None:
    users = [work.user_id for work in make_load(1, 10_000, CUSTOMERS)]
    busiest = sum(count for _, count in Counter(users).most_common(10))
    assert busiest > len(users) / 2
    assert "|".join([CUSTOMERS[0].user_id] * 10) in "|".join(users)


def test_the_load_has_every_kind_of_work() -> None:
    load = list(make_load(1, 20_000, CUSTOMERS))
    held = [work for work in load if isinstance(work, Held)]
    assert {work.ending for work in held} == {"settle", "release", "abandon"}
    assert any(work.pages for work in held)
    assert any(work.actual > work.reserved for work in held)
    assert any(work.times > 1 for work in load if isinstance(work, Emitted))
    assert len({work.reason for work in load if isinstance(work, Malformed)}) >= 5


def test_a_period_can_end_at_any_moment() -> None:
    for day in range(4 * 366):
        end = datetime(2027, 1, 1, 12, 30, tzinfo=UTC) + timedelta(days=day)
        for cadence in ("monthly", "weekly", "daily", "subscription"):
            start = first_start(cadence, end)
            calendar = cadence if cadence in CALENDAR_CADENCES else "monthly"
            assert boundary(start, calendar, index_at(start, calendar, end)) == end
            assert start < end <= start + timedelta(days=62)


def rollover_of(line: dict[str, Any]) -> tuple[int, int, int]:
    """What was used of a closed period, and the rollover before and after."""
    return line["used"], line["rollover_before"], line["rollover_after"]


def test_demo_accounts_for_every_unit_and_leaves_nothing_behind(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    environ = {**os.environ, "DATABASE_URL": database_url, "REDIS_URL": redis_url}
    command = [sys.executable, "-m", "worker", "demo", "--events", "1500", "--users", "100", "--json"]
    began = datetime.now(UTC)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    found = json.loads(done.stdout)
    assert found["verify"] == "clean"
    assert found["faults"] == []
    assert found["operations"] == 1_500
    assert found["accepted"] == found["recorded"] == sum(line["events"] for line in found["usage"])
    assert found["entries"] == found["accepted"] + found["repeated"] + sum(found["dead_letters"].values())
    assert found["denied"]["unknown_account"] == 1
    buckets = ("from_subscription", "from_rollover", "from_purchased", "overflow_to_debt", "uncollected")
    for line in found["usage"]:
        assert line["amount"] == sum(line[bucket] for bucket in buckets)

    shown = defaultdict(list)
    for line in found["closed"]:
        shown[line["user_id"].rpartition("-")[2]].append(line)
    assert sorted(shown) == ["cap", "credits", "debt", "monthly", "saved"]
    assert [rollover_of(line) for line in shown["saved"]] == [(300_000, 0, 200_000)]
    assert [rollover_of(line) for line in shown["debt"]] == [(300_000, -50_000, 150_000)]
    assert [rollover_of(line) for line in shown["cap"]] == [(300_000, 950_000, 1_000_000)]
    assert (shown["monthly"][0]["rollover_before"], shown["monthly"][-1]["rollover_after"]) == (-5_000, 0)
    for name, used, granted in (("monthly", 30_000, 50_000), ("credits", 600, 1_000)):
        for line in shown[name]:
            assert line["allowance"] == line["refilled_to"] == granted
            # On the last days of some months another period has ended before, in which nothing was used.
            assert line["used"] == (used if datetime.fromisoformat(line["period_end"]) > began else 0)

    served = {
        line["request_id"].split("-", 2)[2]: (
            line["served"],
            line["ended"],
            line["held"],
            line["absorbed"],
            line["paid"],
        )
        for line in found["sponsored"]
    }
    assert served == {
        "anonymous-1": ("gate", "turned away", 0, 0, 0),
        "newcomer-1": ("gate", "paid", 0, 0, 100),
        "member-1": ("free", "settled", 40, 30, 0),
        "member-2": ("partial", "settled", 20, 20, 10),
        "member-3": ("gate", "paid", 0, 0, 10),
        "regular-1": ("free", "released", 120, 0, 0),
        "regular-2": ("free", "settled", 60, 60, 0),
        "regular-3": ("free", "left open", 50, 0, 0),
        "patron-1": ("free", "expired", 300, 0, 0),
        "patron-2": ("free", "settled late", 100, 80, 0),
    }
    assert (found["pool_absorbed"], found["pool_credited"], found["pool_promised"]) == (190, 12, 50)

    settings = settings_for(database_url, redis_url)
    assert rows(settings, "SELECT initial - balance FROM sponsor_pool") == [(190 - 12,)]
    assert rows(settings, "SELECT count(*) FROM usage_log") == [(found["recorded"],)]
    assert rows(settings, "SELECT count(*) FROM account") == [(found["accounts"],)] == [(109,)]
    with Redis.from_url(redis_url) as redis:
        assert sum(redis.xlen(partition.entries) for partition in keys.streams(settings.partitions)) == 0
    user = found["look_at_one"].split()[-1]
    looked_at = subprocess.run(
        [sys.executable, "-m", "worker", "account", "show", user, "--json"],
        env=environ, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert json.loads(looked_at.stdout)["user_id"] == user

    picture = tmp_path / "demo.svg"
    drawing = [sys.executable, str(ROOT / "docs/picture.py"), "-", "--out", str(picture)]
    subprocess.run(drawing, input=done.stdout, text=True, timeout=30, check=True)
    texts = [
        text.text
        for text in ET.fromstring(picture.read_text(encoding="utf-8")).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert f"{found['recorded']:,}" in texts


def test_the_proof_names_what_the_pool_did_otherwise_than_clients_were_told(
    servers: Servers, database_url: str, redis_url: str
) -> None:
    with (
        worker_resources(settings_for(database_url, redis_url)) as resources,
        Billing.connect(resources.settings) as billing,
    ):
        on = Stage(servers, resources, Progress(disable=True), lasting=False)
        served = serve_callers(on, "u-")
        drain_stream(resources, keys.SPONSORSHIP)
        assert prove_sponsored(on, "u-", served)[1] == []
        by_request = {one.request_id.removeprefix("u-"): one for one in served.requests}

        def faults(otherwise: Sponsored) -> list[str]:
            changed = [otherwise if one.request_id == otherwise.request_id else one for one in served.requests]
            return prove_sponsored(on, "u-", served._replace(requests=changed))[1]

        member, newcomer = by_request["member-1"], by_request["newcomer-1"]
        assert faults(member._replace(ended="expired")) == [
            "1 × granted by the pool but never settled, such as u-member-1 of u-member",
            "the pool has 9822 units, the answers to the clients make it 9852",
        ]
        assert faults(member._replace(absorbed=31)) == [
            "1 × granted by the pool with another amount, such as u-member-1 of u-member",
            "the pool has 9822 units, the answers to the clients make it 9821",
        ]
        assert faults(newcomer._replace(credited=9)) == [
            "1 × credited to the pool with another amount, such as u-newcomer-1 of u-newcomer",
            "the pool has 9822 units, the answers to the clients make it 9821",
        ]
        assert faults(by_request["regular-1"]._replace(ended="settled")) == [
            "1 × settled but not granted by the pool, such as u-regular-1 of u-regular"
        ]
        assert faults(by_request["regular-3"]._replace(ended="released")) == [
            "1 × promised by the pool but never left open, such as u-regular-3 of u-regular"
        ]
        assert faults(by_request["patron-1"]._replace(ended="left open")) == [
            "1 × left open but not promised by the pool, such as u-patron-1 of u-patron"
        ]

        billing.credit_pool("somebody", 1_000)
        drain_stream(resources, keys.SPONSORSHIP)
        assert prove_sponsored(on, "u-", served)[1] == [
            "the pool has 9922 units, the answers to the clients make it 9822"
        ]
        assert prove_sponsored(replace(on, lasting=True), "u-", served)[1] == []
