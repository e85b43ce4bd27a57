"""The examples, run on real servers with kills and an outage of Redis; each job is audited.

What the client saw is what the log holds, and `verify` proves it.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import pytest
from redis import Redis

from config.settings import Settings
from distributions.client import build
from tests.support.books import assert_proved, open_dead_letters
from tests.support.ledger import give_accounts, rows
from tests.support.paths import ROOT
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain
from tests.support.waiting import wait_until
from tests.support.web import WebService, web_service
from worker.client import Billing
from worker.demo.servers import Server
from worker.process import on_launcher_death

EXAMPLES = ROOT / "examples"
USERS = [f"user-{number}" for number in range(6)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package `meterfall`, as it is in the wheel."""
    stage = tmp_path_factory.mktemp("wheel")
    build.lay_out(stage)
    return stage


@pytest.fixture
def settings(emptied_database_url: str, own_redis: Server) -> Iterator[Settings]:
    """Settings for a Redis that a test may stop."""
    own_redis.start()
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
    made = settings_for(emptied_database_url, own_redis.url, redis_retries=0, redis_down_pause_ms=200)
    give_accounts(made, USERS, "max")
    yield made
    own_redis.start()


def recorded(settings: Settings) -> dict[str, int]:
    """Drain everything, prove the books, and return the events of the log with their amounts."""
    for user_id in USERS:
        drain(settings, user_id)
    with worker_resources(settings) as resources:
        assert_proved(resources)
        assert open_dead_letters(resources) == []
    found = rows(settings, "SELECT event_id, amount FROM usage_log")
    events = {str(event_id): int(str(amount)) for event_id, amount in found}
    assert len(events) == len(found), "no event is there twice"
    return events


def pending(settings: Settings, meter: str) -> int:
    """Units that are pending or held, of all users."""
    with Billing.connect(settings) as billing:
        return sum(billing.remaining(user_id, meter).pending for user_id in USERS)


# ---------------------------------------------------------------------------------------------------------------------
# The service that streams speech


@dataclass
class Job:
    """One piece of speech and what its listener saw of it."""

    key: str
    user_id: str
    text: str
    hangs_up: bool
    heard: int = 0  # characters, of the try that heard most
    whole: bool = False
    refused: int | None = None

    def listen(self, service: WebService) -> None:
        """Ask for the speech once, and hear it, or a part of it."""
        listener = service.call("POST", "/speech", {"text": self.text}, x_user=self.user_id, idempotency_key=self.key)
        try:
            response = listener.getresponse()
            if response.status != 200:
                self.refused = response.status
                return
            heard = 0
            while chunk := response.read1(65_536):
                heard += len(chunk)
                self.heard = max(self.heard, heard // 100)
                if self.hangs_up:
                    return
            if heard != 100 * len(self.text):
                raise http.client.IncompleteRead(b"")
            self.whole = True
        finally:
            listener.hang_up()


class Audience:
    """Listeners who try again, as the README of the service says, until their job is done."""

    def __init__(self, service: WebService) -> None:
        self.service = service
        self.moved = Lock()
        self.cut = 0

    def hear(self, job: Job) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with self.moved:
                service = self.service
            try:
                job.refused = None
                job.listen(service)
            except (OSError, http.client.HTTPException):
                self.cut += 1
            else:
                if job.refused not in {402, 503}:  # 402: too many holds while Redis is away
                    return
            time.sleep(0.05)
        raise AssertionError(f"{job} is never done")


def test_each_job_of_the_speech_service_is_billed_as_it_was_heard(
    settings: Settings, own_redis: Server, wheel: Path, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"spool_path": tmp_path / "spool"})
    jobs = [
        Job(f"job-{number}", USERS[number % len(USERS)], f"Sentence {number}. " * (20 + number), number % 4 == 3)
        for number in range(80)
    ]

    @contextmanager
    def service(name: str) -> Iterator[WebService]:
        code = EXAMPLES / "tts_service"
        with web_service(
            "app:app", settings, tmp_path, name, code=code, environment={"PYTHONPATH": str(wheel)}
        ) as running:
            yield running

    with service("first") as first, service("second") as second, ThreadPoolExecutor(8) as threads:
        audience = Audience(first)
        done = [threads.submit(audience.hear, job) for job in jobs]
        wait_until(lambda: sum(each.done() for each in done) >= 15, "15 jobs are done", 30)
        with audience.moved:
            first.kill()
            audience.service = second
        wait_until(lambda: sum(each.done() for each in done) >= 35, "35 jobs are done", 30)
        own_redis.stop()
        wait_until(lambda: sum(each.done() for each in done) >= 50, "50 jobs are done, while Redis is away", 30)
        own_redis.start()
        for each in done:
            each.result(60)
        assert audience.cut > 0, "the kill has cut some off"
    with Billing.connect(settings) as billing:
        wait_until(lambda: not billing.send_spooled().left, "the spool is empty")
    found = recorded(settings)
    for job in jobs:
        billed = found.pop(job.key, 0)
        if job.whole:
            assert billed == len(job.text), job
        elif job.hangs_up:
            assert job.heard <= billed <= len(job.text), job
        else:  # billed, but the service was killed before it could say so
            assert (job.refused, billed) == (409, len(job.text)), job
    assert found == {}
    assert sum(job.whole for job in jobs) > 50
    assert pending(settings, "premium_voice") == 0, "no hold is open"


# ---------------------------------------------------------------------------------------------------------------------
# The script that reads a document

PAGES = 300


@dataclass
class Reader:
    """The script, its pages and the texts that it made."""

    settings: Settings
    wheel: Path
    folder: Path

    def __post_init__(self) -> None:
        for name in ("pages", "texts"):
            (self.folder / name).mkdir()
        for number in range(PAGES):
            text = "word " * (10 + number % 50)
            (self.folder / "pages" / f"{number:03}.txt").write_text(text, encoding="utf-8")

    @contextmanager
    def run(self) -> Iterator[subprocess.Popen[str]]:
        """Run the script; killed at the end of the block if it still runs."""
        urls = {"DATABASE_URL": str(self.settings.database_url), "REDIS_URL": self.settings.redis_url}
        script = EXAMPLES / "ocr_batch" / "ocr_batch.py"
        with subprocess.Popen(
            [sys.executable, script, USERS[0], "scan-7", "pages", "texts"],
            cwd=self.folder,
            env={**os.environ, **urls, "PYTHONPATH": str(self.wheel)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=on_launcher_death(signal.SIGKILL),
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def wait_for(self, process: subprocess.Popen[str], page: int) -> None:
        """Read what the script prints until it has billed a page."""
        assert process.stdout is not None
        for line in process.stdout:
            if line == f"page {page}\n":
                return
        assert process.stderr is not None
        raise AssertionError(process.stderr.read())

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Let the script end; return its errors."""
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        return errors

    @property
    def texts(self) -> dict[str, int]:
        """The event of each page that has a text, and its tokens."""
        texts = {path.stem: path.read_text(encoding="utf-8") for path in (self.folder / "texts").glob("*.txt")}
        return {f"scan-7-page-{int(number)}": len(text.split()) for number, text in texts.items()}


def test_each_page_of_the_document_is_billed_once(
    settings: Settings, own_redis: Server, wheel: Path, tmp_path: Path
) -> None:
    reader = Reader(settings, wheel, tmp_path)
    with reader.run() as killed:
        reader.wait_for(killed, 99)
    billed = recorded(settings)
    assert len(reader.texts) - len(billed) in {0, 1}, "at most the page in hand has a text and no event"
    assert billed.items() <= reader.texts.items()
    assert 0 < pending(settings, "ocr_tokens") < 100 * PAGES, "the hold stays for the next run"
    with reader.run() as second:
        reader.wait_for(second, 199)
        own_redis.stop()
        time.sleep(0.5)
        own_redis.start()
        assert "Redis did not confirm" in reader.finish(second)
    assert pending(settings, "ocr_tokens") == sum(reader.texts.values()) - sum(billed.values()), (
        "the rest is given back"
    )
    assert recorded(settings) == reader.texts
    assert len(reader.texts) == PAGES
    with reader.run() as again:
        reader.finish(again)
    assert recorded(settings) == reader.texts
    assert pending(settings, "ocr_tokens") == 0
    query = "SELECT count(DISTINCT dimensions->>'page_idx') FROM usage_log WHERE dimensions->>'document_id' = 'scan-7'"
    assert rows(settings, query) == [(PAGES,)]
    with Redis.from_url(settings.redis_url) as redis:
        assert len(list(redis.scan_iter("mf:*:hold:*#scan-7-*"))) == 2, (
            "one hold for the work, none but an empty one after"
        )
