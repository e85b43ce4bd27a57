"""The form of log lines: text or JSON, one for each cause and minute, whoever logs them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from loguru import logger
from redis.exceptions import ConnectionError as RedisConnectionError

from config import log
from config.log import configure_logging
from worker.consumer.outage import Outage
from worker.rules.api_keys import secret_of


class Clock:
    """A clock that a test moves."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def _own_sinks() -> Iterator[None]:
    """Logging as before after each test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logger.remove()
    root.handlers[:], root.level = handlers, level
    log.client_logger.setLevel(logging.NOTSET)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log._OncePerMinute.__init__, "__defaults__", (clock,))
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_of_json_has_time_level_message_and_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "json")
    logger.bind(partition=3).info("drained {} entries\nof a stream", 5)
    (line,) = lines(capsys)
    found = json.loads(line)
    assert found["time"].endswith("Z")
    assert found.pop("time")
    assert isinstance(found.pop("pid"), int)
    assert found == {"level": "INFO", "message": "drained 5 entries\nof a stream", "partition": 3}


@pytest.mark.parametrize("form", ["text", "json"])
def test_libraries_log_through_the_same_sink(capsys: pytest.CaptureFixture[str], form: str) -> None:
    configure_logging("INFO", form)  # type: ignore[arg-type]
    logging.getLogger("rq.worker").warning("Worker %s: job %s is late", "w1", "j1")
    logging.getLogger("rq.worker").info("Worker %s started", "w1")  # nobody asks
    logging.getLogger("meterfall").info("the spool is empty")
    found = lines(capsys)
    texts = [json.loads(line)["message"] if form == "json" else line.partition(" ")[2] for line in found]
    assert [text.removeprefix("WARNING ").removeprefix("INFO    ") for text in texts] == [
        "Worker w1: job j1 is late",
        "the spool is empty",
    ]


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_line_tells_the_secret_of_an_api_key(capsys: pytest.CaptureFixture[str], form: str) -> None:
    configure_logging("INFO", form)  # type: ignore[arg-type]
    secret = secret_of("0123456789ab", bytes(range(32)))
    logger.bind(path=f"/v1/check?key={secret}").warning("asked with {}", secret)
    logging.getLogger("uvicorn.error").warning("bad header: Bearer %s", secret)
    printed = capsys.readouterr().err
    assert printed.count("mf_0123456789ab_") == printed.count("\n") + (form == "json") == (3 if form == "json" else 2)
    assert secret.removeprefix("mf_0123456789ab_") not in printed


def messages(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The messages logged since the last look, as JSON has them, without the time of a number's last line."""
    return [re.sub(r"until [\d:]{8}", "until …", json.loads(line)["message"]) for line in lines(capsys)]


def test_one_cause_is_one_line_a_minute_with_the_number(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    configure_logging("INFO", "json")
    for partition in range(8):
        logger.bind(cause="halted: away").error("partition {}: halted: away", partition)
    logger.error("another")
    assert [json.loads(line)["message"] for line in lines(capsys)] == ["partition 0: halted: away", "another"]
    clock.seconds = 61
    logger.info("something else")
    assert messages(capsys) == [
        "partition 7: halted: away (7 more like it until …)",
        "something else",
    ]
    logger.bind(cause="halted: away").error("partition 1: halted: away")
    assert lines(capsys) == [], "the next minute has begun with the number"
    clock.seconds = 200
    logger.info("on")
    assert messages(capsys) == [
        "partition 1: halted: away (1 more like it until …)",
        "on",
    ]


def test_the_numbers_are_logged_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    for job in ("a", "b", "c"):
        logging.getLogger("rq.worker").error("job %s was lost", job)
    assert len(lines(capsys)) == 1
    logger.remove()
    (line,) = lines(capsys)
    assert re.search(r"ERROR   job c was lost \(2 more like it until \d\d:\d\d:\d\d\)$", line)


def test_after_an_outage_nothing_of_it_is_an_alarm(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    configure_logging("INFO", "json")
    outage = Outage()
    outage.begin("Postgres")
    for partition in range(8):
        logger.bind(cause="halted: away").error("partition {}: halted: away", partition)
    last = datetime.now(UTC)
    lines(capsys)
    outage.end()
    summary, over = (json.loads(line) for line in lines(capsys))
    until = re.fullmatch(r"partition 7: halted: away \(7 more like it until (\d\d:\d\d:\d\d)\)", summary["message"])
    assert until is not None
    assert until[1] in {f"{last - timedelta(seconds=ago):%H:%M:%S}" for ago in range(3)}
    assert (summary["level"], over["level"]) == ("INFO", "INFO")
    assert over["message"].startswith("Postgres answers, work goes on after")
    assert "recovers" not in over
    clock.seconds = 300
    logger.info("on")
    assert messages(capsys) == ["on"], "the outage was told"
    logger.bind(cause="halted: away").error("partition 1: halted: away")
    assert messages(capsys) == ["partition 1: halted: away"], "the next outage begins with a line"


def test_messages_without_a_fault_are_never_held_back(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    for _ in range(3):
        logger.info("the same")
    assert len(lines(capsys)) == 3


def test_an_expected_error_has_no_places_and_others_have_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    for error in (RedisConnectionError("Error 111 connecting to redis"), KeyError("canary-user")):
        try:
            raise error
        except (RedisConnectionError, KeyError):
            logging.getLogger("a.library").exception("it failed")
        # Another cause: the next one is a line of its own.
        configure_logging("INFO")
    expected, other = lines(capsys)
    assert expected.endswith("it failed: ConnectionError: Error 111 connecting to redis")
    assert "canary-user" not in other
    assert " at test_logs.py:" in other
