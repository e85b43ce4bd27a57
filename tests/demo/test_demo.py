"""The demo's load, which is pure, and the demo itself as anyone would start it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET
from zoneinfo import ZoneInfo

import pytest
from redis import Redis
from rich.progress import Progress

from config.catalogue import load_catalogue
from config.settings import DEFAULT_CATALOGUE
from tests.support.ledger import rows
from tests.support.resources import settings_for, worker_resources
from worker.admin.posting import Refused, post, signed, target_of
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.demo.credits import cast_of, prove_spent, spend_credits, where_it_is_noon
from worker.demo.periods import first_start
from worker.demo.receiver import receiving
from worker.demo.servers import Servers
from worker.demo.sponsorship import prove_sponsored, serve_callers
from worker.demo.stage import Sponsored, Stage, own_workers
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

    assert [
        (step["what"], step["meter"], step["units"], step["credits"], step["says"]) for step in found["spent"][1:]
    ] == [
        ("order", None, None, 2_000, "never ends"),
        ("event", "ocr_tokens", 1_500_000, 3_000, "3,000 of the allowance"),
        ("event", "server_kokoro", 3_000, 3_000, "3,000 of the allowance"),
        ("event", "premium_voice", 1_000, 3_000, "3,000 of the allowance"),
        ("event", "premium_voice", 400, 1_200, "1,000 of the allowance, 200 of the gift"),
        ("expired", None, None, 300, "the rest of the gift"),
        ("event", "premium_voice", 100, 300, "300 of the order"),
        ("denied", "premium_voice", 200, 600, "10,500 of 11,000 a day, by the user"),
    ]
    # These servers stay, so the demo added no webhook to them.
    assert sorted((notice["kind"], notice["says"], notice["delivered"]) for notice in found["told"]) == [
        ("balance.threshold", "2,000 or fewer left; top up by 5,000", None),
        ("balance.threshold", "80 % of the allowance used; top up by 10,000", None),
        ("grant.expired", "300 of the gift expired", None),
    ]
    assert found["denied"]["spending_limit_reached"] == 1

    settings = settings_for(database_url, redis_url)
    assert rows(settings, "SELECT count(*) FROM webhook") == [(0,)]
    assert rows(settings, "SELECT initial - balance FROM sponsor_pool") == [(190 - 12,)]
    assert rows(settings, "SELECT count(*) FROM usage_log") == [(found["recorded"],)]
    assert rows(settings, "SELECT count(*) FROM account") == [(found["accounts"],)] == [(110,)]
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


@pytest.mark.timeout(240)
def test_on_servers_of_its_own_the_demo_delivers_the_notices_of_its_wallet() -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}
    environ = {**kept, "COLUMNS": "120"}
    command = [sys.executable, "-m", "worker", "demo", "--events", "20", "--users", "10"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [re.sub(r"[│\s]+", " ", line).strip() for line in done.stdout.splitlines()]
    heads = {line.partition(",")[0] for line in printed}
    assert {"A wallet for several meters", "What the account was told meanwhile; delivered counts deliveries with a "
            "right signature"} <= heads  # fmt: skip
    for line in (
        "event premium_voice 400 1,200 1,000 of the allowance, 200 of the gift",
        "expired 300 the rest of the gift",
        "event premium_voice 100 300 300 of the order",
        "denied premium_voice 200 600 10,500 of 11,000 a day, by the user",
        "verify clean",
    ):
        assert line in printed, done.stdout
    for notice in ("80 % of the allowance used; top up by 10,000", "300 of the gift expired", "2,000 or fewer left"):
        told = [line for line in printed if notice in line and "×" in line]
        assert len(told) == 1, done.stdout
        assert told[0].endswith(" 1 ×"), done.stdout


def test_the_proof_names_what_credit_did_otherwise_than_the_act_says(
    servers: Servers, database_url: str, redis_url: str
) -> None:
    with worker_resources(settings_for(database_url, redis_url)) as resources:
        on = Stage(servers, resources, Progress(disable=True), lasting=True)
        with own_workers(resources, 1) as workers:
            played = spend_credits(on, workers, "u-")
        assert played is not None
        assert prove_spent(on, played)[2] == []

        def faults(**otherwise: Any) -> list[str]:
            return prove_spent(on, played._replace(**otherwise))[2]

        assert faults(denied_by=None) == ["no limit denied is-denied of u-wallet"]
        (lost,) = faults(told=played.told[1:])
        assert lost.startswith("u-wallet was told [")
        (twice,) = faults(told=[played.told[0], *played.told])
        assert twice.startswith("u-wallet was told [")
        assert faults(came={})[0] == "balance.threshold of u-wallet was not delivered"
        dearer = played.cast._replace(prices={**played.cast.prices, "server_kokoro": Decimal(2)})
        assert faults(cast=dearer)[0] == (
            "uses-server_kokoro of u-wallet was paid by {'allowance': 3000}, it should be {'allowance': 6000}"
        )
        assert "0 of the gift expired, 300 were left of it" in faults(gift="another")
        less = [event._replace(units=300) if event.event_id == "uses-the-gift" else event for event in played.events]
        assert "300 of the gift expired, 500 were left of it" in faults(events=less)


def test_an_act_about_credits_needs_a_plan_with_a_wallet() -> None:
    catalogue = load_catalogue(DEFAULT_CATALOGUE)
    cast = cast_of(catalogue)
    assert cast is not None
    assert (cast.plan, cast.wallet, list(cast.prices)) == (
        "studio",
        "credits",
        ["ocr_tokens", "server_kokoro", "premium_voice"],
    )
    others = {code: plan for code, plan in catalogue.plans.items() if code != "studio"}
    assert cast_of(catalogue.model_copy(update={"plans": others})) is None


def test_the_day_of_the_act_never_ends_in_it() -> None:
    for hour in range(24):
        now = datetime(2027, 3, 1, hour, 59, tzinfo=UTC)
        assert now.astimezone(ZoneInfo(where_it_is_noon(now))).hour == 12


def test_the_receiver_counts_only_what_is_rightly_signed() -> None:
    with receiving() as receiver:
        receiver.secret = f"whsec_{b64encode(bytes(32)).decode()}"
        body = b'{"data": {"notice_id": "n-1"}}'
        right = signed([receiver.secret], "n-1", datetime.now(UTC), body.decode())
        wrong = signed([f"whsec_{b64encode(bytes(31) + b'1').decode()}"], "n-1", datetime.now(UTC), body.decode())
        target = target_of(receiver.url, allows_private=True)

        async def send() -> None:
            await post(target, right, body, 10, allows_private=True)
            with pytest.raises(Refused, match="401"):
                await post(target, wrong, body, 10, allows_private=True)

        asyncio.run(send())
        assert receiver.came == {"n-1": 1}


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
