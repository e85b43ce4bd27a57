"""The soak, at its shortest: it does what it promises, leaves nothing behind, and is able to fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from config.catalogue import load_catalogue
from config.settings import DEFAULT_CATALOGUE, Settings
from tests.faults import mutated
from tests.soak.journal import Journal, Promised, Reader
from tests.soak.producer import Lane, customers_of, rate_at, works
from tests.soak.report import Fault, Quiet, Report, Sample
from tests.soak.run import wait_for_sweep
from tests.support.ledger import give_account
from tests.support.oracle import Accepted, compare_held
from tests.support.resources import settings_for
from tests.support.streams import partition_of
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.consumer import jobs
from worker.demo.work import Customer
from worker.keyspace import keys
from worker.keyspace.connection import redis_now_ms
from worker.resources import Resources

CHEAP = ("kill_worker", "kill_producer", "freeze_supervisor", "cut_redis", "cut_postgres", "flush_balances")
USER, METER = "u", "credits"


def soak(folder: Path, *options: str, python: Sequence[str] = (sys.executable, "-m")) -> subprocess.Popen[str]:
    """A soak of its own servers; what it leaves behind, it would leave in `folder`."""
    command = [*python, "tests.soak", "--seed", "5", "--gap", "0.2", "--out", str(folder / "out")]
    return subprocess.Popen(
        [*command, *options], env={**os.environ, "TMPDIR": str(folder)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def report_of(folder: Path) -> dict[str, Any]:
    """What the soak wrote down."""
    found: dict[str, Any] = json.loads((folder / "out" / "soak.json").read_text())
    return found


def left_behind(folder: Path) -> list[str]:
    """Processes that still have the soak's folder in their environment or command, and what is in that."""
    done = subprocess.run(["ps", "-e", "-o", "args=", "eww"], capture_output=True, text=True, check=True)
    running = [line[:200] for line in done.stdout.splitlines() if f"TMPDIR={folder}" in line]
    return running + [path.name for path in folder.glob("meterfall-*")]


@pytest.mark.slow
def test_a_short_soak_passes_and_leaves_nothing(tmp_path: Path) -> None:
    process = soak(tmp_path, "--minutes", "0.1", "--faults", ",".join(CHEAP))
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    assert "soak: seed 5" in output
    report = report_of(tmp_path)
    assert report["failures"] == []
    assert len({fault["kind"] for fault in report["faults"]}) == len(CHEAP)
    assert report["events"] > 1_000
    assert report["duplicates"] > 0
    assert report["quiet_points"][-1]["differences"] == []
    assert report["quiet_points"][-1]["events"] == report["events"]
    assert (tmp_path / "out" / "soak.png").read_bytes().startswith(b"\x89PNG")
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_without_the_duplicate_check_the_soak_fails(tmp_path: Path) -> None:
    process = soak(tmp_path, "--minutes", "0.05", "--faults", "kill_producer,flush_balances", python=mutated.COMMAND)
    output, errors = process.communicate()
    assert process.returncode == 1, output + errors
    assert "dead letters for data_error, expected 0 (seed 5, minute 1)" in errors
    assert "Again with: make soak MINUTES=0.05 SEED=5" in errors
    assert (tmp_path / "out" / "soak-dyno-0.log").exists()
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_an_interrupted_soak_leaves_nothing(tmp_path: Path) -> None:
    process = soak(tmp_path, "--minutes", "5")
    at_work = "meterfall-soak-*/producer-1.journal"
    wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob(at_work)), "producers are at work", 60)
    assert left_behind(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "interrupted; everything is stopped\n")
    assert left_behind(tmp_path) == []


def test_the_same_seed_means_the_same_load() -> None:
    customers = customers_of(load_catalogue(DEFAULT_CATALOGUE, None), 20)
    first, again, other = (works(seed, "l0", customers) for seed in (1, 1, 2))
    drawn = [next(first) for _ in range(50)]
    assert drawn == [next(again) for _ in range(50)]
    assert drawn != [next(other) for _ in range(50)]
    assert len({rate_at(1, "l0", seconds) for seconds in range(0, 600, 5)}) > 1


def test_what_a_killed_producer_left_in_doubt_is_told_to_the_next(tmp_path: Path) -> None:
    path, promised = tmp_path / "journal", Promised()
    journal, reader = Journal(path), Reader(path)
    journal.note("sending", "u", "l0-w1", "ocr_tokens", 7, "1", None)
    journal.note("confirmed", "u", "l0-w1", 7)
    journal.note("sending", "u", "l0-w2", "ocr_tokens", 8, "1", None)
    journal.note("sending", "u", "l1-w2", "ocr_tokens", 9, "1", None)
    journal.note("holding", "u", "ocr_tokens", "l0-w3")
    reader.read_into(promised)
    reader.close()
    assert promised.events == {("u", "l0-w1"): 7}
    assert promised.doubts(["l0"]) == {
        "events": [["u", "l0-w2", "ocr_tokens", 8, "1", None]],
        "holds": [["u", "ocr_tokens", "l0-w3"]],
        "requests": [],
        "payments": [],
        "grants": [],
    }


def test_the_oracle_is_told_what_the_pool_gave_and_still_promises(tmp_path: Path) -> None:
    path, promised = tmp_path / "journal", Promised()
    journal, reader = Journal(path), Reader(path)
    for request, ended, held, absorbed in (("r1", "settled", 0, 31), ("r2", "left open", 50, 0)):
        journal.note("asking", "u", request, 60)
        journal.note("served", "u", request, "free", "within_budget", ended, 60, held, absorbed)
    reader.read_into(promised)
    reader.close()
    accepted = promised.accepted(Counter())
    assert (accepted.grants["r1"], accepted.promises) == (31, {"r2": 50})


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    """A user with an account, for whom the pool covers 100 units a day."""
    settings = settings_for(emptied_database_url, redis_url, sponsor_daily_units_new=100)
    give_account(settings, USER)
    return settings


@pytest.mark.parametrize(
    ("pool", "named"),
    [
        (None, [f"pending of {USER} on {METER}: h:forgotten holds 5 units, expected 0"]),
        (
            keys.SPONSORSHIP,
            [
                "pool: h:forgotten is promised 5 units, expected 0",
                f"window of {USER}: h:forgotten holds 5 units, expected 0",
            ],
        ),
    ],
    ids=["of a user", "of the pool"],
)
def test_the_oracle_is_asked_after_the_sweep_of_forgotten_holds(
    settings: Settings,
    resources: Resources,
    monkeypatch: pytest.MonkeyPatch,
    pool: keys.Stream | None,
    named: list[str],
) -> None:
    monkeypatch.setattr(jobs, "resources", lambda: resources)
    with Billing.connect(settings) as billing:
        if pool is None:
            billing.reserve(USER, METER, 5, "forgotten", 1)
        else:
            assert billing.decide(USER, 5, "forgotten", ttl_seconds=1).absorb == 5
    swept = partition_of(settings, USER) if pool is None else pool
    wait_until_due(resources, swept)
    assert [*compare_held(resources, Accepted())] == named, "expired, and not swept yet"
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(wait_for_sweep, resources, Accepted())
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        jobs.expire_holds(swept.number)
        waiting.result()
    assert [*compare_held(resources, Accepted())] == []


def test_a_producer_goes_on_when_a_hold_expired_before_it_had_an_answer(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    path, promised, customer = tmp_path / "journal", Promised(), Customer(USER, "tenant", (METER,))
    with Billing.connect(settings) as billing:
        lane = Lane("l0", 5, [customer], billing, resources, Journal(path))
        billing.decide(USER, 5, "l0-b1-ask", ttl_seconds=1)  # the producer never sees this answer, and asks again
        wait_until_due(resources, keys.SPONSORSHIP)
        lane._sponsor(Random(5), customer, "l0-b1")
    with closing(Reader(path)) as reader:
        reader.read_into(promised)
    assert promised.served["l0-b1-ask"].ended == "expired"
    assert promised.doubts(["l0"])["requests"] == []


def wait_until_due(resources: Resources, stream: keys.Stream) -> None:
    """Return once a hold of the stream has expired by the clock of Redis; no sweep has seen it."""
    due = stream.expiries
    wait_until(lambda: resources.redis.zcount(due, "-inf", redis_now_ms(resources.redis)) > 0, "a hold has expired")


def test_a_report_fails_on_slow_recovery_growth_and_differences() -> None:
    report = Report(1, 3, "PostgreSQL", "Valkey")
    report.faults = [Fault(1, "SIGKILL worker", "dyno-0", 4.9), Fault(2, "SIGKILL Redis", "Valkey", 5.1)]
    report.faults.append(Fault(3, "SIGKILL Redis", "Valkey", 9.0, hurried=True))
    report.samples = [Sample(at, 0, None, {"worker": [80 + 10 * at], "supervisor": [80]}) for at in range(9)]
    report.quiets = [Quiet(60 * at, 1, 1, 10, 50, 50 * at, {}, []) for at in range(1, 6)]
    report.quiets.append(Quiet(350, 1, 1, 10, 50, 50, {}, ["event x of u: accepted and not recorded"]))
    assert report.broken
    assert report.failures() == [
        "event x of u: accepted and not recorded (seed 3, minute 6)",
        "SIGKILL Redis at 2.0 s (Valkey): work went on after 5.1 s, the bound is 5 s (seed 3, minute 1)",
        "memory of a worker grew from 90 to 150 MB, the bound is 107 MB",
    ]
