"""Replaying a trace: every row is billed once, whatever is repeated or killed; a bad trace sends nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import rows
from tests.support.processes import dyno, kill
from tests.support.resources import settings_for
from tests.support.waiting import wait_until
from worker.demo import stage
from worker.demo.replay import TraceError, new_run, read_trace, run_replay
from worker.demo.stage import RehearsalError

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
BALANCES = "SELECT user_id, used, rollover, purchased FROM balance WHERE meter = 'ocr_tokens' ORDER BY user_id"


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(database_url, redis_url)


def write_trace(path: Path, count: int) -> Path:
    """A trace with 50 requests a second, as the public ones are written: 7 digits, CRLF, no end of line at the end."""
    start = datetime(2023, 11, 16, 18, 15, 46, tzinfo=UTC)
    lines = [HEADER]
    for number in range(count):
        at = start + timedelta(milliseconds=20 * number)
        lines.append(f"{at:%Y-%m-%d %H:%M:%S.%f}0,{100 + number % 900},{number % 400}")
    path.write_bytes("\r\n".join(lines).encode())
    return path


def replay_command(trace: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "worker", "replay", str(trace), "--users", "50", "--json", *options]


def environ_for(settings: Settings) -> dict[str, str]:
    assert settings.database_url is not None
    return {**os.environ, "DATABASE_URL": settings.database_url, "REDIS_URL": settings.redis_url}


def replay(settings: Settings, trace: Path, *options: str) -> dict[str, Any]:
    """Replay a trace to its end; returns what the command printed."""
    done = subprocess.run(
        replay_command(trace, *options),
        env=environ_for(settings), capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_run_repeated_bills_nothing_twice_and_must_be_the_same(settings: Settings, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.csv", 600)
    first = replay(settings, trace, "--run", "again", "--workers", "1")
    after_first = rows(settings, BALANCES)
    assert first["recorded"] == first["rows"] == 600
    assert (first["recorded_before"], first["verify"], first["faults"]) == (0, "clean", [])

    second = replay(settings, trace, "--run", "again", "--workers", "1")
    assert (second["recorded"], second["recorded_before"], second["open_holds"]) == (600, 600, 0)
    assert rows(settings, BALANCES) == after_first
    assert rows(settings, "SELECT sum(quantity) FROM usage_log") == [(first["tokens"],)]

    command = replay_command(trace, "--run", "again", "--seed", "2")
    other = subprocess.run(command, env=environ_for(settings), capture_output=True, text=True, timeout=60, check=False)
    assert other.returncode == 2
    assert other.stderr.startswith("meterfall: --run: was used with another trace, seed")
    assert rows(settings, "SELECT count(*) FROM usage_log") == [(600,)]


def test_a_worker_killed_in_the_middle_is_replaced_and_every_row_is_billed_once(
    settings: Settings, tmp_path: Path
) -> None:
    trace = write_trace(tmp_path / "trace.csv", 1_500)
    command = replay_command(trace, "--workers", "0", "--speed", "5")
    with dyno(settings) as doomed:
        feeding = subprocess.Popen(command, env=environ_for(settings), stdout=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: recorded(settings) >= 200, "the worker is at work", seconds=30)
            kill(doomed)
            assert feeding.poll() is None, "the replay ended before its worker was killed"
            assert recorded(settings) < 1_500
            with dyno(settings):
                output, _ = feeding.communicate(timeout=60)
        finally:
            feeding.kill()
            feeding.communicate()
    found = json.loads(output)
    assert feeding.returncode == 0, found["faults"]
    assert (found["recorded"], found["verify"], found["faults"]) == (1_500, "clean", [])
    assert recorded(settings) == 1_500
    assert found["seconds"] >= 5.9  # 1,500 rows are 30 seconds of trace


def test_without_a_worker_it_says_so(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_STALL_SECONDS", 0.2)
    trace = read_trace(write_trace(tmp_path / "trace.csv", 5))
    with pytest.raises(RehearsalError, match="is a `meterfall worker run` running"):
        run_replay(environ_for(settings), trace, run="idle", users=3, seed=1, speed=None, workers=0)


def recorded(settings: Settings) -> int:
    """How many events are in the usage log."""
    ((count,),) = rows(settings, "SELECT count(*) FROM usage_log")
    assert isinstance(count, int)
    return count


# ---------------------------------------------------------------------------------------------------------------------
# The trace


def test_a_trace_is_read_as_it_is_published(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"{HEADER}\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    first, second = read_trace(path)
    assert first == (1, datetime(2023, 11, 16, 18, 15, 46, 680590, tzinfo=UTC), 374, 44)
    assert (second.number, second.context_tokens, second.generated_tokens) == (2, 396, 109)
    assert len(read_trace(path, limit=1)) == 1


GOOD = "2023-11-16 18:15:46.6805900,374,44"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header: must be TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("time,a,b\n" + GOOD, "header: must be"),
        (HEADER + "\n", "has no rows"),
        (f"{HEADER}\n{GOOD}\n2023-11-16 18:15:50,374\n", "row 2: has 2 columns"),
        (f"{HEADER}\n{GOOD}\n\n", "row 2: has 0 columns"),
        (f"{HEADER}\nyesterday,374,44\n", "row 1, TIMESTAMP: must be a time"),
        (f"{HEADER}\n{GOOD}\n2023-11-16 18:15:50,-1,44\n", "row 2, ContextTokens: must be a whole number"),
        (f"{HEADER}\n2023-11-16 18:15:50,374,4e3\n", "row 1, GeneratedTokens: must be a whole number"),
        (f"{HEADER}\n2023-11-16 18:15:50,374,\n", "row 1, GeneratedTokens"),
        (f"{HEADER}\n2023-11-16 18:15:50,374,{'9' * 5_000}\n", "row 1, GeneratedTokens"),
        (f"{HEADER}\n2023-11-16 18:15:50,٣٧٤,44\n", "row 1, ContextTokens"),
        (f'{HEADER}\n2023-11-16 18:15:50,"374,44\n', "is no CSV file"),
    ],
)
def test_a_malformed_trace_is_refused_by_row_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TraceError, match=message) as refused:
        read_trace(path)
    assert len(str(refused.value)) < 400


def test_a_malformed_trace_sends_nothing(settings: Settings, redis_url: str, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.csv", 20)
    trace.write_text(trace.read_text() + "\n2023-11-16 18:20:00,12,none\n")
    done = subprocess.run(
        replay_command(trace), env=environ_for(settings), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "row 21, GeneratedTokens: must be a whole number" in done.stderr
    assert rows(settings, "SELECT count(*) FROM account") == [(0,)]
    with Redis.from_url(redis_url) as redis:
        assert redis.dbsize() == 0


@pytest.mark.parametrize("name", ["a-b", "", "x" * 33, "a b", "a\n"])
def test_a_run_has_a_name_that_fits_into_ids(name: str) -> None:
    with pytest.raises(TraceError, match="--run: must be 1 to 32 letters"):
        new_run(name)
    assert new_run("2026.11_a") == "2026.11_a"
    assert new_run(None) != new_run(None)
