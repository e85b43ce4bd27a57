"""The recipe of docs/long-jobs.md, killed with SIGKILL in the middle: every page is billed once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.console import blocks_of
from tests.support.ledger import give_account, rows
from tests.support.paths import ROOT
from tests.support.resources import worker_resources
from tests.support.streams import drain, pending_of, stream_of
from worker.client import Billing
from worker.reports.holds import open_holds
from worker.reports.proof import verify_ledger

USER, METER, BOOK = "ada", "premium_voice", "book-1"
PAGES = 300

# Speaks a book whose audio lies in a folder, and stops dead at a page: before it is captured, or after.
PROGRAM = """
    import sys, time
    from collections.abc import MutableMapping
    from pathlib import Path

    attempt, folder, when, stop_at = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

    def stop():
        print("stopped", flush=True)
        time.sleep(60)

    class Audio(MutableMapping):
        def __contains__(self, number): return (folder / str(number)).exists()
        def __getitem__(self, number): return (folder / str(number)).read_bytes()
        def __delitem__(self, number): (folder / str(number)).unlink()
        def __iter__(self): return (int(path.name) for path in folder.iterdir())
        def __len__(self): return len(list(folder.iterdir()))
        def __setitem__(self, number, spoken):
            if when == "captured" and number == stop_at:
                stop()
            (folder / str(number)).write_bytes(spoken)

    def speak(text):
        if when == "speaking" and text.startswith(f"{stop_at:03} "):
            stop()
        return text.upper().encode()

    with Billing.connect() as billing:
        read_aloud(billing, "ada", "book-1", attempt, pages(), speak, Audio())
    print("done", flush=True)
"""


def pages() -> dict[int, str]:
    """The book: pages of different lengths, each beginning with its number."""
    return {number: f"{number:03} " + "la" * (20 + number % 9) for number in range(1, PAGES + 1)}


Attempt = Callable[[int, str, int], subprocess.Popen[str]]


@pytest.fixture
def attempt(settings: Settings, tmp_path: Path) -> Iterator[Attempt]:
    """Starts an attempt of the recipe as it stands in the guide."""
    (recipe,) = [text for language, text in blocks_of((ROOT / "docs/long-jobs.md").read_text()) if language == "python"]
    book = f"def pages(): return {pages()!r}\n"
    (tmp_path / "job.py").write_text(recipe + book + dedent(PROGRAM), encoding="utf-8")
    (tmp_path / "audio").mkdir()
    assert settings.database_url is not None
    environment = {**os.environ, "REDIS_URL": settings.redis_url, "DATABASE_URL": settings.database_url}
    started: list[subprocess.Popen[str]] = []

    def start(number: int, when: str = "", stop_at: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "job.py"), str(number), str(tmp_path / "audio"), when, str(stop_at)]
        environ = {**environment, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    """What it prints next."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_job_that_is_killed_twice_bills_each_page_once(attempt: Attempt, settings: Settings, redis: Redis) -> None:
    give_account(settings, USER, "basic")
    for number, when, stop_at in ((1, "captured", 100), (2, "speaking", 200)):
        process = attempt(number, when, stop_at)
        assert line_of(process) == "stopped"
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
        held = pending_of(redis, settings, USER, METER)
        assert held[f"h:{BOOK}:{number}"] > 0, "nobody gave the hold back"
        if number == 1:
            drain(settings, USER)
    assert line_of(attempt(3, "", 0)) == "done"

    amounts = {f"{BOOK}:page-{number}": len(text) * 3 // 2 for number, text in pages().items()}
    sent = len(stream_of(redis, settings, USER))
    assert sent == PAGES - 99, "page 100 was captured by two attempts"
    drain(settings, USER)
    assert sorted(rows(settings, "SELECT event_id, amount FROM usage_log")) == sorted(amounts.items())
    assert rows(settings, "SELECT count(*) FROM dead_letter") == [(0,)]
    used = "SELECT used FROM balance WHERE user_id = %s AND meter = %s"
    assert rows(settings, used, USER, METER) == [(sum(amounts.values()),)]
    assert pending_of(redis, settings, USER, METER) == {}
    with worker_resources(settings) as resources:
        assert open_holds(resources, USER) == []
        assert verify_ledger(resources).differences == []


def test_a_page_is_known_to_the_ledger_when_redis_has_forgotten_it(settings: Settings, redis: Redis) -> None:
    give_account(settings, USER, "basic")
    with Billing.connect(settings) as billing:
        for attempt in (1, 2):
            with billing.reserve(USER, METER, 100, f"{BOOK}:{attempt}") as hold:
                assert not hold.capture("page-1", 40).repeated
                assert hold.capture("page-1", 40).repeated
            drain(settings, USER)
        assert billing.check(USER, METER).used == 40
        redis.flushdb()  # as if years had passed; other tests may use the databases beside it
        assert not billing.capture(USER, METER, "another", "page-1", 40).repeated
        drain(settings, USER)
        assert billing.check(USER, METER).used == 40
    assert rows(settings, "SELECT event_id, amount FROM usage_log") == [("page-1", 40)]
    assert pending_of(redis, settings, USER, METER) == {}
