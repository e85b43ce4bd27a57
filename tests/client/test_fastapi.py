"""The client in a FastAPI service in uvicorn: listeners who hang up, a killed process, errors as HTTP answers."""

from __future__ import annotations

import http.client
import json
import random
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote

import pytest
from redis import Redis
from starlette.requests import HTTPConnection

from config.settings import Settings
from schemas.events import ID_ALLOWED
from tests.client.speech_service import CHUNK_UNITS, METER, UNITS
from tests.support.books import assert_proved, open_dead_letters
from tests.support.ledger import give_account, rows
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain, pending_of
from tests.support.waiting import wait_until
from tests.support.web import WebService, web_service
from worker.client import Billing
from worker.contrib.fastapi import billing_of
from worker.demo.servers import Server

APP = "tests.client.speech_service:app"
USER = "alice"
# So large that the buffers of both ends are full: the service waits for the listener in the middle of a chunk.
LARGE_CHUNK_BYTES = 400_000
LISTENERS = 120
# How the service streams: with the client alone, with `meterfall.contrib.fastapi`.
KINDS = ("plain", "billed")

without_spool = pytest.mark.parametrize("settings", ["plain"], indirect=True)


@pytest.fixture(params=["plain", "spool"])
def settings(request: pytest.FixtureRequest, emptied_database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    spool = {"spool_path": tmp_path / "spool"} if request.param == "spool" else {}
    made = settings_for(emptied_database_url, redis_url, **spool)
    give_account(made, USER, "max")
    return made


@dataclass
class Journal:
    """What the service noted: the units of each piece of work that it began to settle, or that it has settled."""

    path: Path

    def noted(self, word: str) -> dict[str, int]:
        lines = [line.split() for line in self.path.read_text(encoding="utf-8").splitlines()]
        return {key: int(units) for name, key, units in lines if name == word}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


@contextmanager
def speech(settings: Settings, journal: Journal, name: str = "service", **environ: str) -> Iterator[WebService]:
    """The service at work."""
    environment = {"JOURNAL": str(journal.path), **environ}
    with web_service(APP, settings, journal.path.parent, name, environment=environment) as running:
        yield running


@pytest.fixture
def running(settings: Settings, journal: Journal) -> Iterator[WebService]:
    with speech(settings, journal) as made:
        yield made


def events_and_holds(redis: Redis, settings: Settings, meter: str = METER) -> tuple[dict[str, int], set[str]]:
    """Events that are pending with their units, and holds that are open."""
    pending = pending_of(redis, settings, USER, meter)
    events = {name[2:]: units for name, units in pending.items() if name.startswith("e:")}
    return events, {name[2:] for name in pending if name.startswith("h:")}


def no_holds(redis: Redis, settings: Settings) -> bool:
    return events_and_holds(redis, settings)[1] == set()


def prove(settings: Settings, events: dict[str, int]) -> None:
    """Each event is in the log once with its units, and the books are right."""
    drain(settings, USER)
    assert rows(settings, "SELECT event_id, amount FROM usage_log ORDER BY event_id") == sorted(events.items())
    with worker_resources(settings) as resources:
        assert_proved(resources)
        assert open_dead_letters(resources) == []


def listen(running: WebService, path: str, habit: int, moment: float) -> int | None:
    """Listen to a stream and hang up by habit; return the units that arrived if they are all of them."""
    if habit == 3:
        path += f"?chunk_bytes={LARGE_CHUNK_BYTES}"
    listener = running.call("GET", path)
    try:
        if habit == 0:  # at once
            return None
        response = listener.getresponse()
        if habit == 1:  # in the middle
            response.read(1 + int(moment * (UNITS - 2)))
            return None
        if habit == 3:  # in the middle, after it was slow
            response.read(1)
            Event().wait(moment / 10)
            return None
        return len(response.read())
    finally:
        listener.hang_up()


@contextmanager
def flushing(redis: Redis, scripts: str) -> Iterator[None]:
    """Have Redis forget its scripts again and again, if they are to be `unknown`."""
    over = Event()

    def flush() -> None:
        while not over.wait(0.01):
            redis.script_flush()

    thread = Thread(target=flush)
    if scripts == "unknown":
        thread.start()
    try:
        yield
    finally:
        over.set()
        if scripts == "unknown":
            thread.join()


class Case(NamedTuple):
    """How listeners meet the service."""

    kinds: tuple[str, ...] = KINDS
    scripts: str = "loaded"
    environ: Mapping[str, str] = MappingProxyType({})
    collects: bool = False


CASES = {
    "loaded": Case(),
    "unknown": Case(scripts="unknown"),
    "middleware": Case(kinds=("billed",), environ={"MIDDLEWARE": "1"}),
    # A middleware cancels the service in the middle of sending: a generator then waits at its `yield`. Starlette does
    # not close it, a BilledResponse does; any other ends when Python collects it.
    "collected": Case(kinds=("plain",), environ={"MIDDLEWARE": "1"}, collects=True),
}


# Not on a server that other tests use at the same time: the scripts that it forgets are theirs as well.
@pytest.mark.once
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_listeners_who_hang_up_are_billed_for_what_was_produced(
    settings: Settings, redis: Redis, journal: Journal, case: Case
) -> None:
    moments = random.Random(11)
    habits = [(number // 2 % 4, moments.random()) for number in range(LISTENERS)]
    with (
        speech(settings, journal, **case.environ) as running,
        flushing(redis, case.scripts),
        ThreadPoolExecutor(20) as threads,
    ):
        paths = [f"/{case.kinds[number % len(case.kinds)]}/{USER}/job-{number}" for number in range(LISTENERS)]
        heard = list(threads.map(lambda path, habit: listen(running, path, *habit), paths, habits))
        if case.collects:
            wait_until(lambda: running.ask("GET", "/collect").status == 200 and no_holds(redis, settings), "collected")
        # What the service has begun to settle is there, what it has not is given back; nothing waits for an expiry.
        wait_until(lambda: no_holds(redis, settings), "no hold is open", 1)
    events, _ = events_and_holds(redis, settings)
    assert events == journal.noted("settles")
    whole = {f"job-{number}": units for number, units in enumerate(heard) if units is not None}
    assert whole == {f"job-{number}": UNITS for number, (habit, _) in enumerate(habits) if habit == 2}
    assert whole.items() <= events.items(), "a stream that arrived whole is billed"
    cut_off = [units for key, units in events.items() if key not in whole]
    assert sum(units < UNITS for units in cut_off) > 20, "some were cut off in the middle"
    assert all(units % CHUNK_UNITS == 0 for units in events.values())
    prove(settings, events)


def test_a_killed_service_leaves_holds_until_they_expire_and_bills_nothing_twice(
    settings: Settings, redis: Redis, journal: Journal
) -> None:
    brief = settings.model_copy(update={"hold_ttl_seconds": 3})
    paths = {f"job-{number:02}": f"/{KINDS[number % 2]}/{USER}/job-{number:02}" for number in range(12)}
    with speech(brief, journal) as killed, speech(brief, journal, "other") as other:
        whole = [key for key in list(paths)[:4] if heard(killed, paths[key]) == UNITS]
        assert len(whole) == 4
        cut = [killed.call("GET", path) for key, path in paths.items() if key not in whole]
        for listener in cut:
            listener.getresponse().read(CHUNK_UNITS)
        killed.kill()
        for listener in cut:
            listener.close()
        events, holds = events_and_holds(redis, settings)
        assert events == dict.fromkeys(whole, UNITS), "what was confirmed before is there"
        assert holds == set(paths) - set(whole), "nobody gave these back"
        # Half of the listeners try again in time: the key finds its hold, and the work is billed once.
        again = [*whole, *sorted(holds)[:4]]
        with ThreadPoolExecutor(8) as threads:
            answers = dict(zip(again, threads.map(lambda key: heard(other, paths[key]), again), strict=True))
        assert {key for key, units in answers.items() if units == UNITS} == set(again) - set(whole)
        with Billing.connect(brief) as billing:
            wait_until(lambda: billing.remaining(USER, METER).pending == 8 * UNITS, "the other holds have expired", 6)
    events, holds = events_and_holds(redis, settings)
    assert (events, holds) == (dict.fromkeys(again, UNITS), set())
    prove(settings, events)


def heard(running: WebService, path: str) -> int | None:
    """Units that arrived in a whole stream; None if the service refused."""
    with suppress(http.client.IncompleteRead, http.client.RemoteDisconnected):
        answer = running.ask("GET", path)
        return len(answer.body) if answer.status == 200 else None
    return None


def refusals(running: WebService) -> dict[str, tuple[int, str | None, object]]:
    """Status, Retry-After and title of the answer to each error that a handler raises."""
    names = ("busy", "redis", "ledger", "spool", "conflict", "wrong")
    answers = {name: running.ask("GET", f"/errors/{name}") for name in names}
    for name, answer in answers.items():
        text = answer.body.decode()
        assert answer.problem["status"] == answer.status, name
        assert answer.problem.keys() == {"type", "title", "status", "detail"}, name
        assert not [word for word in ("alice", "secret", "redis.internal", "/var/spool", "password") if word in text]
    return {
        name: (answer.status, answer.headers.get("retry-after"), answer.problem["title"])
        for name, answer in answers.items()
    }


@without_spool
def test_errors_are_problem_documents(settings: Settings, running: WebService) -> None:
    unavailable = (503, "1", "Billing unavailable")
    assert refusals(running) == {
        "busy": (429, "1", "Too many requests"),
        "redis": unavailable,
        "ledger": unavailable,
        "spool": unavailable,
        "conflict": (409, None, "Event conflict"),
        "wrong": (500, None, "Billing misconfigured"),
    }
    page = {"text": "one two"}
    assert running.ask("POST", f"/pages/{USER}/page-1", page).status == 200
    closed = running.ask("POST", f"/pages/{USER}/page-1", page)
    assert (closed.status, closed.problem["type"]) == (409, "urn:meterfall:hold-closed")
    with Billing.connect(settings) as billing, billing.reserve(USER, "ocr_tokens", 5, key="page-2"):
        taken = running.ask("POST", f"/pages/{USER}/page-2", page)
    assert (taken.status, taken.problem["title"]) == (409, "Hold conflict")
    malformed = running.ask("POST", f"/pages/{USER}/page%203", page)
    assert (malformed.status, malformed.problem) == (
        422,
        {
            "type": "urn:meterfall:invalid-request",
            "title": "Invalid request",
            "status": 422,
            "detail": f"key: must be {ID_ALLOWED}",
            "field": "key",
        },
    )
    name = "Zoë Smith"
    assert running.ask("POST", f"/pages/{quote(name)}/page-3", page).problem["field"] == "user_id"
    encoded = urlsafe_b64encode(name.encode()).decode()
    assert running.ask("POST", f"/pages/{encoded}/page-3", page).problem["reason"] == "unknown_account"
    assert running.ask("POST", f"/pages/{USER}/page-4", {"no": "text"}).status == 422, "FastAPI's own"


@without_spool
def test_a_refusal_has_the_figures_of_the_check(settings: Settings, running: WebService) -> None:
    give_account(settings, "bob", "free", buckets={"ocr_tokens": (19_990, 0, 0)})
    denied = running.ask("POST", "/pages/bob/page-1", {"text": "twelve chars"})
    assert (denied.status, denied.headers.get("retry-after")) == (402, None)
    assert denied.problem == {
        "type": "urn:meterfall:usage-limit-exceeded",
        "title": "Usage limit exceeded",
        "status": 402,
        "detail": "The amount does not fit into the units left.",
        "meter": "ocr_tokens",
        "requested": 12,
        "reason": "limit_exceeded",
        "available": 10,
        "limit": 20_000,
        "used": 19_990,
        "pending": 0,
        "rollover": 0,
        "purchased": 0,
        "kind": "monthly",
    }
    nobody = running.ask("POST", "/pages/nobody/page-1", {"text": "twelve chars"})
    assert (nobody.status, nobody.problem["title"], nobody.problem["reason"]) == (
        402,
        "Usage denied",
        "unknown_account",
    )


@without_spool
def test_without_redis_a_denial_says_try_again(settings: Settings, journal: Journal) -> None:
    gone = settings.model_copy(update={"redis_url": "unix:///nowhere/redis.sock", "redis_down": "deny"})
    with speech(gone.model_copy(update={"redis_retries": 0}), journal) as running:
        denied = running.ask("POST", f"/pages/{USER}/page-1", {"text": "words"})
    assert (denied.status, denied.headers["retry-after"]) == (503, "1")
    assert (denied.problem["title"], denied.problem["reason"]) == ("Billing unavailable", "redis_down_denied")


@without_spool
def test_a_request_is_settled_or_released_before_its_answer(
    settings: Settings, redis: Redis, running: WebService
) -> None:
    asked = {
        "page-1": ({"text": " two words "}, 200),
        "page-2": ({"text": "    "}, 200),  # nothing was produced
        "page-3": ({"text": "words", "fail": True}, 418),  # some was, before the handler raised
        "page-4": ({"text": "  ", "fail": True}, 418),
    }
    for key, (page, status) in asked.items():
        assert running.ask("POST", f"/pages/{USER}/{key}", page).status == status
        assert events_and_holds(redis, settings, "ocr_tokens")[1] == set(), key
    assert running.ask("GET", f"/lines/{USER}/lines-1").body == b"line 0\nline 1\nline 2\n"
    assert running.ask("GET", f"/lost/{USER}/lost-1").status == 500
    assert running.ask("GET", f"/billed/{USER}/speech-1").headers["content-type"] == "audio/mpeg"
    assert events_and_holds(redis, settings) == ({"lines-1": 30, "speech-1": UNITS}, set())
    prove(settings, {"page-1": 9, "page-3": 5, "lines-1": 30, "speech-1": UNITS})
    query = "SELECT source, dimensions->>'voice_slug' FROM usage_log WHERE event_id = 'speech-1'"
    assert rows(settings, query) == [("tts", "narrator")]


def test_an_application_without_the_lifespan_says_so() -> None:
    with pytest.raises(RuntimeError, match="no billing client"):
        billing_of(HTTPConnection({"type": "http", "state": {}}))


@without_spool
def test_a_quantity_is_multiplied_and_a_hold_is_kept_while_its_handler_runs(
    settings: Settings, running: WebService
) -> None:
    held = running.ask("GET", f"/modelled/{USER}/long-1?model_slug=m2")
    assert b'"amount":1500' in held.body
    prove(settings, {"long-1": 150})
    query = "SELECT quantity, multiplier::text, dimensions->>'model_slug' FROM usage_log"
    assert rows(settings, query) == [(100, "1.5", "m2")]


@without_spool
def test_a_stream_that_cannot_be_billed_does_not_arrive_whole(
    settings: Settings, journal: Journal, own_redis: Server
) -> None:
    own = settings.model_copy(update={"redis_url": own_redis.url, "redis_retries": 0, "redis_down_pause_ms": 100})
    path = f"/billed/{USER}/job-1"
    with speech(own, journal) as running, Redis.from_url(own_redis.url) as redis:
        listener = running.call("GET", f"{path}?pause_seconds=0.05")
        response = listener.getresponse()
        response.read(CHUNK_UNITS)
        own_redis.stop()
        with pytest.raises(http.client.IncompleteRead):
            response.read()
        listener.close()
        own_redis.start()
        assert events_and_holds(redis, own) == ({}, {"job-1"})
        time.sleep(0.2)  # the service takes Redis for away until then
        assert heard(running, path) == UNITS
        assert events_and_holds(redis, own) == ({"job-1": UNITS}, set())
    prove(own, {"job-1": UNITS})


@without_spool
def test_the_description_of_the_service_shows_what_its_dependencies_need(running: WebService) -> None:
    described = json.loads(running.ask("GET", "/openapi.json").body)
    parameters = described["paths"]["/modelled/{user_id}/{key}"]["get"]["parameters"]
    assert {each["name"] for each in parameters} == {"user_id", "model_slug"}
