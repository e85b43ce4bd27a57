"""The real bench command, at its smallest: it measures everything it promises and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from redis import Redis

from benchmarks.bench import FIGURES, TARGETS, BenchInputError, Sizes, Target
from tests.support.paths import ROOT
from worker.demo.servers import Servers


@pytest.fixture
def environ(servers: Servers, redis_url: str) -> dict[str, str]:
    """The environment of a command that works on the test's servers."""
    return {**os.environ, "DATABASE_URL": servers.database_url, "REDIS_URL": redis_url}


def bench(environ: dict[str, str], folder: Path, *options: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command in `folder`. Fails if a process of its group lives on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", "bench", "--quick", *options], env=environ, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    output, errors = process.communicate()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return process.returncode, output, errors


@pytest.mark.once  # what it measures, others test on all servers
def test_bench_measures_everything_and_leaves_nothing(
    environ: dict[str, str], servers: Servers, redis_url: str, tmp_path: Path
) -> None:
    code, output, errors = bench(environ, tmp_path, "--json", "--out", ".")
    assert code == 0, errors
    figures = json.loads(output)
    assert {name: value for name, value in figures.items() if name in FIGURES and not value > 0} == {}
    assert set(FIGURES) <= set(figures)
    assert set(TARGETS) <= set(FIGURES)
    assert figures["machine"]["events"] == 5_000
    assert figures["pool_updates_per_batch"] == 1
    assert json.loads((tmp_path / "bench.json").read_text())["rounds"]["copy_rows_per_s"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")

    with psycopg.connect(servers.database_url) as connection:
        names = connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'meterfall_bench_%'").fetchall()
        assert names == []
    with Redis.from_url(redis_url) as redis:
        assert redis.dbsize() == 0


def test_bench_without_a_checkout_says_that_it_needs_one(environ: dict[str, str], tmp_path: Path) -> None:
    for package in ("config", "schemas", "worker"):  # what the distribution installs
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert bench(environ | {"PYTHONPATH": str(tmp_path)}, tmp_path) == (
        2, "", "meterfall: bench: the benchmarks are not installed; run `make bench` in a checkout of the source\n",
    )  # fmt: skip


def test_bench_refuses_a_redis_database_in_use(environ: dict[str, str], redis_url: str, tmp_path: Path) -> None:
    with Redis.from_url(redis_url) as redis:
        redis.set("somebody", "else's")
        code, _, errors = bench(environ, tmp_path)
        assert (code, redis.get("somebody")) == (2, b"else's")
    assert errors == "meterfall: REDIS_URL: must name an empty database for the benchmark; its size is 1\n"


def test_sizes_that_measure_nothing_are_refused() -> None:
    with pytest.raises(BenchInputError, match="--rounds: must be at least 1"):
        Sizes(rounds=0)


def test_a_target_says_which_side_is_right() -> None:
    least, most = Target(at_least=True, value=0.2), Target(at_least=False, value=20)
    assert (least.reached(0.2), least.reached(0.19), str(least)) == (True, False, "≥ 0.2")
    assert (most.reached(20), most.reached(20.1), str(most)) == (True, False, "≤ 20")
