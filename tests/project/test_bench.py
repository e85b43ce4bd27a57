"""The real bench command, at its smallest: it measures everything it promises and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import cast

import psycopg
import pytest
from redis import Redis

from benchmarks import publish
from benchmarks.bench import (
    FIGURES,
    QUICK,
    TARGETS,
    BenchError,
    BenchInputError,
    Report,
    Sizes,
    Target,
    _arena,
    _measure_outages,
    _open_accounts,
)
from benchmarks.cpu import PARTS, live_seconds, machine_time, server_pids, tree_pids, tree_seconds
from benchmarks.plot import CONSUMERS, TARGET_LABELS
from tests.support.paths import ROOT
from worker.demo.servers import Server, Servers


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
@pytest.mark.timeout(300)  # a minute of CPU, beside other tests
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
    for _, consumer in CONSUMERS:
        parts = [figures[f"{consumer}_{part}_cpu_us"] for part in PARTS]
        assert figures[f"{consumer}_cpu_us"] == pytest.approx(sum(parts), abs=0.001)
    assert 0 <= figures["machine"]["others_cpu_percent"] <= 100
    # Each part has its line, and the last one is the last that was foretold.
    lines = [line for line in errors.splitlines() if re.match(r" +\d+ of \d+  .* s$", line)]
    assert [line.split()[:3] for line in lines] == [[str(at), "of", str(len(lines))] for at in range(1, len(lines) + 1)]
    assert len(lines) > 10
    # What would be published of it.
    result = json.loads((tmp_path / "bench.json").read_text())
    page = publish.page(result)
    assert [label for label in TARGET_LABELS.values() if f"| {label} |" not in page] == []
    assert "A quick run" in page
    assert "One round, " in publish.readme_block(result)
    assert " / " not in page.partition("## The consumers side by side")[2].partition("Cells are")[0]

    with psycopg.connect(servers.database_url) as connection:
        names = connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'meterfall_bench_%'").fetchall()
        assert names == []
    with Redis.from_url(redis_url) as redis:
        assert redis.dbsize() == 0


@pytest.mark.once
@pytest.mark.parametrize("seconds", [0.2, 8.0])
def test_an_outage_in_which_nothing_is_spooled_measures_no_recovery(environ: dict[str, str], seconds: float) -> None:
    sizes = replace(QUICK, hung_checks=5, outage_seconds=seconds)
    found = defaultdict[str, list[float]](list)
    with _arena(environ) as arena:
        _open_accounts(arena, sizes.users)
        if seconds < 1:
            with pytest.raises(BenchError, match=r"nothing was spooled in an outage of 0\.2 s"):
                _measure_outages(arena, sizes, 1, found)
            assert "spool_recovery_s" not in found
        else:
            _measure_outages(arena, sizes, 1, found)
            assert found["spooled_in_outage"][0] > 0


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


def test_what_is_published_is_what_the_kept_run_measured() -> None:
    result = json.loads((ROOT / publish.RESULT).read_text(encoding="utf-8"))
    readme = (ROOT / publish.README).read_text(encoding="utf-8")
    again = "`python -m benchmarks.publish` makes both again from docs/benchmarks.json"
    assert publish.page(result) == (ROOT / publish.PAGE).read_text(encoding="utf-8"), again
    assert publish.with_block(readme, publish.readme_block(result)) == readme, again
    assert result["machine"]["durable"]
    # A run that is too small to quote says so, in both.
    quoted = "A quick run" not in publish.page(result)
    assert quoted == ("A quick run" not in publish.readme_block(result)) == (result["machine"]["rounds"] >= 3)


def test_a_readme_without_its_marks_is_refused() -> None:
    block = f"{publish.BEGIN}\nnew\n{publish.END}"
    assert publish.with_block(f"a\n{publish.BEGIN}\nold\n{publish.END}\nb", block) == f"a\n{block}\nb"
    for readme in ("a\nb", f"{publish.BEGIN} no end", f"{block}\n{block}"):
        with pytest.raises(ValueError, match="must have one block of figures"):
            publish.with_block(readme, block)


def test_a_figure_that_cannot_be_measured_is_named_and_not_missed() -> None:
    figures = {name: target.value for name, target in TARGETS.items()}
    assert Report(figures, {}, {}).verdict() == f"all {len(TARGETS)} targets reached"
    del figures["drain_cpu_us"]
    assert Report(figures, {}, {}).verdict() == (
        f"all {len(TARGETS) - 1} targets reached; cannot be measured here: drain_cpu_us"
    )
    figures["worker_rss_mb"] = 10**6
    assert Report(figures, {}, {}).verdict() == "missed: worker_rss_mb; cannot be measured here: drain_cpu_us"


def test_the_table_tells_least_and_most_of_the_rounds() -> None:
    report = Report({"drain_cpu_us": 40}, {"drain_cpu_us": [50, 40, 30.04]}, {})
    assert report.table() == [
        {"figure": "drain_cpu_us", "value": "40", "least": "30", "most": "50", "target": "≤ 38", "reached": "no"}
    ]


def test_the_time_of_children_counts_after_their_end_also() -> None:
    before, machine_before = tree_seconds([os.getpid()]), machine_time()
    work = "from time import process_time\nwhile process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    spent, machine_after = tree_seconds([os.getpid(), os.getpid()]) - before, machine_time()
    assert 0.29 <= spent < 5
    assert machine_before is not None
    assert machine_after is not None
    assert machine_after.busy - machine_before.busy >= 0.29
    assert machine_after.total > machine_before.total


def test_short_work_is_counted_finely_and_only_of_those_that_live() -> None:
    waiting = "import sys\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", waiting], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        pids = tree_pids([os.getpid()])
        assert {os.getpid(), child.pid} <= pids
        assert live_seconds([child.pid]) > 0.001
        before, own = live_seconds([os.getpid()]), process_time()
        while process_time() < own + 0.003:
            pass
        assert 0.003 <= live_seconds([os.getpid()]) - before < 2
        child.kill()
    assert live_seconds([child.pid]) == 0


@pytest.mark.once  # it looks into the folder of the servers that the tests start
def test_the_servers_are_known_by_their_processes(servers: Servers, own_redis: Server) -> None:
    with psycopg.connect(servers.database_url) as postgres, Redis.from_url(own_redis.url) as redis:
        pids = server_pids(postgres, redis)
        assert pids is not None
        assert pids.redis == own_redis.pid
        (folder,) = postgres.execute("SHOW data_directory").fetchone() or ("",)
        assert str(pids.postgres) == (Path(folder) / "postmaster.pid").read_text().split()[0]


def test_an_id_of_another_machine_is_nobody_here(servers: Servers) -> None:
    class ElsewhereRedis:
        def info(self, _: str) -> dict[str, int]:
            return {"process_id": os.getpid()}  # here it is this test

    with psycopg.connect(servers.database_url) as postgres:
        assert server_pids(postgres, cast("Redis", ElsewhereRedis())) is None
