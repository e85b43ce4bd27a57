"""The examples, run on real servers with kills and an outage of Redis; each job is audited.

What the client saw is what the log holds, and `verify` proves it. The slow tests do the same for a minute, with workers
at work, kills at random moments, and a Redis that is killed once and frozen once.
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import pytest
from redis import Redis
from rq import Queue, Retry
from rq.serializers import JSONSerializer

from config.settings import Settings
from distributions.client import build
from tests.support.books import assert_proved, open_dead_letters
from tests.support.ledger import give_accounts, rows
from tests.support.paths import ROOT
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain
from tests.support.waiting import wait_until
from tests.support.web import WebService, web_service
from worker.client import Billing
from worker.demo.processes import children, kill_tree
from worker.demo.servers import Server, find_redis, redis_server
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


@pytest.fixture
def durable_settings(emptied_database_url: str) -> Iterator[tuple[Settings, Server]]:
    """Settings for a Redis that loses nothing if it is killed; and that Redis."""
    with redis_server(find_redis(os.environ), appendfsync="always") as server:
        made = settings_for(emptied_database_url, server.url, redis_retries=0, redis_down_pause_ms=200)
        give_accounts(made, USERS, "max", buckets={"premium_voice": (0, 0, 10_000_000)})
        yield made, server


@contextmanager
def workers(settings: Settings) -> Iterator[None]:
    """Run a dyno for the length of the block."""
    with dyno(settings, METERFALL_LOG_LEVEL="ERROR", METERFALL_VERIFY_INTERVAL_SECONDS="0"):
        yield


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
    hangs_up_after: int | None  # characters
    heard: int = 0  # characters, of the try that heard most
    whole: bool = False
    refused: int | None = None
    hung_up_at: float | None = None  # on the clock of `monotonic`

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
                if self.hangs_up_after is not None and self.heard >= self.hangs_up_after:
                    self.hung_up_at = time.monotonic()
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


def audit(jobs: Sequence[Job], found: dict[str, int], kills: Sequence[float] = ()) -> int:
    """Compare each job with the events of the log, and return the number of those that nobody was billed for.

    That is so only if a listener hung up, and the service was killed within a second, before it could settle.
    """
    left = dict(found)
    unbilled = 0
    for job in jobs:
        billed = left.pop(job.key, 0)
        if job.whole:
            assert billed == len(job.text), job
        elif job.hung_up_at is None:  # billed, but the service was killed before it could say so
            assert (job.refused, billed) == (409, len(job.text)), job
        elif billed or not any(0 <= killed_at - job.hung_up_at < 1 for killed_at in kills):
            assert job.heard <= billed <= len(job.text), job
        else:
            unbilled += 1
    assert left == {}, "nothing else is billed"
    return unbilled


@contextmanager
def speech_service(settings: Settings, wheel: Path, folder: Path, name: str) -> Iterator[WebService]:
    """Run the example."""
    code, environment = EXAMPLES / "tts_service", {"PYTHONPATH": str(wheel)}
    with web_service("app:app", settings, folder, name, code=code, environment=environment) as running:
        yield running


def test_each_job_of_the_speech_service_is_billed_as_it_was_heard(
    settings: Settings, own_redis: Server, wheel: Path, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"spool_path": tmp_path / "spool"})
    jobs = [
        Job(
            f"job-{number}",
            USERS[number % len(USERS)],
            f"Sentence {number}. " * (20 + number),
            0 if number % 4 == 3 else None,
        )
        for number in range(80)
    ]

    with (
        speech_service(settings, wheel, tmp_path, "first") as first,
        speech_service(settings, wheel, tmp_path, "second") as second,
        ThreadPoolExecutor(8) as threads,
    ):
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
    assert audit(jobs, recorded(settings)) == 0
    assert sum(job.whole for job in jobs) > 50
    assert pending(settings, "premium_voice") == 0, "no hold is open"


SPEECHES, HOLD_SECONDS = 1_500, 30


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_job_of_the_speech_service_is_billed_as_it_was_heard_for_a_minute(
    durable_settings: tuple[Settings, Server], wheel: Path, tmp_path: Path
) -> None:
    base, redis_server = durable_settings
    settings = base.model_copy(update={"spool_path": tmp_path / "spool", "hold_ttl_seconds": HOLD_SECONDS})
    drawn = random.Random(7)
    jobs = []
    for number in range(SPEECHES):
        text = f"Sentence {number}. " * drawn.randrange(1, 80)
        hangs_up_after = drawn.randrange(len(text)) if drawn.random() < 0.25 else None
        jobs.append(Job(f"job-{number}", drawn.choice(USERS), text, hangs_up_after))
    kills: list[float] = []
    with workers(settings), ExitStack() as services, ThreadPoolExecutor(12) as threads:

        def new_service() -> WebService:
            return services.enter_context(speech_service(settings, wheel, tmp_path, f"service-{len(kills)}"))

        audience = Audience(new_service())
        done = [threads.submit(audience.hear, job) for job in jobs]

        def go_on_for(number: int) -> None:
            enough = sum(each.done() for each in done) + number
            wait_until(lambda: sum(each.done() for each in done) >= enough, f"{number} more jobs are done", 60)

        def kill_the_service() -> None:
            with audience.moved:  # no job begins meanwhile: on a slow machine none would be left
                after = new_service()
            go_on_for(drawn.randrange(40, 100))
            with audience.moved:
                before, audience.service = audience.service, after
                kills.append(time.monotonic())
                before.kill()

        for take_away, bring_back in (
            (redis_server.kill, redis_server.start),
            (redis_server.freeze, redis_server.thaw),
            (None, None),
        ):
            for _ in range(4):
                kill_the_service()
            if take_away and bring_back:
                go_on_for(60)
                take_away()
                go_on_for(60)
                bring_back()
        for each in done:
            each.result(120)
    with Billing.connect(settings) as billing:
        wait_until(lambda: not billing.send_spooled().left, "the spool is empty", 30)
    found = recorded(settings)
    unbilled = audit(jobs, found, kills)
    wait_until(lambda: pending(settings, "premium_voice") == 0, "no hold is open beyond its life", HOLD_SECONDS + 5)
    hung_up = sum(job.hung_up_at is not None for job in jobs)
    print(
        f"{len(jobs)} jobs, {sum(job.whole for job in jobs)} whole, {hung_up} hung up; {audience.cut} cut off by"
        f" {len(kills)} kills, 2 outages; {len(found)} events, {sum(found.values())} units;"
        f" {unbilled} of a listener gone just before a kill, 0 differences"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The script that reads a document

PAGES, MANY_PAGES = 300, 4_000


@dataclass
class Reader:
    """The script, its pages and the texts that it made."""

    settings: Settings
    wheel: Path
    folder: Path
    pages: int = PAGES

    def __post_init__(self) -> None:
        for name in ("pages", "texts"):
            (self.folder / name).mkdir()
        for number in range(self.pages):
            text = "word " * (10 + number % 50)
            (self.folder / "pages" / f"{number:04}.txt").write_text(text, encoding="utf-8")

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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_page_of_a_long_document_is_billed_once_though_its_reader_is_killed_again_and_again(
    durable_settings: tuple[Settings, Server], wheel: Path, tmp_path: Path
) -> None:
    settings, redis_server = durable_settings
    reader = Reader(settings, wheel, tmp_path, MANY_PAGES)
    drawn = random.Random(7)
    stops = sorted(drawn.sample(range(100, MANY_PAGES - 600), 8))
    outages = {2: (redis_server.kill, redis_server.start), 5: (redis_server.freeze, redis_server.thaw)}
    waited = 0
    with workers(settings):
        for number, page in enumerate(stops):
            with reader.run() as process:
                reader.wait_for(process, page)
                if number in outages:
                    take_away, bring_back = outages[number]
                    take_away()
                    assert process.stderr is not None
                    assert "Redis did not confirm" in process.stderr.readline()
                    bring_back()
                    reader.wait_for(process, page + drawn.randrange(100, 500))
                    waited += 1
        with reader.run() as last:
            reader.finish(last)
    assert recorded(settings) == reader.texts
    with reader.run() as again:
        reader.finish(again)
    assert recorded(settings) == reader.texts
    assert len(reader.texts) == MANY_PAGES
    assert pending(settings, "ocr_tokens") == 0, "no hold is open"
    print(
        f"{MANY_PAGES} pages, {sum(reader.texts.values())} units, {len(stops)} kills, {waited} outages, 0 differences"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The RQ worker that forks

CHAPTERS = 20


@contextmanager
def prefork(settings: Settings, wheel: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the worker of the example; killed at the end of the block, with its child."""
    urls = {"DATABASE_URL": str(settings.database_url), "REDIS_URL": settings.redis_url}
    with subprocess.Popen(
        [sys.executable, "prefork.py"],
        cwd=EXAMPLES / "rq_jobs",
        env={**os.environ, **urls, "PYTHONPATH": str(wheel)},
        stderr=subprocess.DEVNULL,
        preexec_fn=on_launcher_death(signal.SIGKILL),
    ) as process:
        try:
            yield process
        finally:
            kill_tree(process.pid)


def test_each_job_of_the_forking_worker_is_billed_once_though_its_child_is_killed(
    settings: Settings, wheel: Path
) -> None:
    texts = {f"book-{number}": "la" * (100 + 20 * number) for number in range(CHAPTERS)}
    with (
        Redis.from_url(settings.redis_url) as redis,
        prefork(settings, wheel) as first,
        prefork(settings, wheel) as second,
    ):
        queue = Queue("narration", connection=redis, serializer=JSONSerializer)
        jobs = [
            queue.enqueue("narration.narrate", USERS[number % len(USERS)], chapter, text, retry=Retry(max=20))
            for number, (chapter, text) in enumerate(texts.items())
        ]

        def done() -> int:
            return sum(job.is_finished for job in jobs if job.get_status())

        killed: set[int] = set()

        def kill_a_child(parent: subprocess.Popen[bytes]) -> bool:
            for child in children(parent.pid) - killed:
                with suppress(ProcessLookupError):  # its job has ended
                    os.kill(child, signal.SIGKILL)
                    killed.add(child)
                    return True
            return False

        for number, parent in enumerate([first, second, first, second], 1):
            wait_until(partial(lambda enough: done() >= enough, 3 * number), "some jobs are done", 30)
            wait_until(partial(kill_a_child, parent), "a child is killed at work", 30)
        wait_until(lambda: done() == CHAPTERS, "all jobs are done", 60)
        assert {first.poll(), second.poll()} == {None}, "the parents live on"
        assert {job.return_value() for job in jobs} <= {"billed", "billed before"}
    assert recorded(settings) == {chapter: len(text) for chapter, text in texts.items()}
    assert pending(settings, "premium_voice") == 0, "no hold is open"
