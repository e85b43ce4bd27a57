"""What a dyno logs of an outage: a few lines that say what is away, and one that says that work goes on."""

from __future__ import annotations

import re
from threading import Event, Thread
from time import monotonic

import pytest

from tests.faults.house import SLOW_SECONDS, House
from tests.support.waiting import wait_until

# A dyno's lines of one outage, however long it is.
MOST_LINES = 20
GOES_ON = re.compile(r"answers, work goes on after \d+ s")


@pytest.mark.parametrize(
    ("server", "seconds"),
    [
        ("redis", 6),
        ("postgres", 6),
        pytest.param("redis", 30, marks=pytest.mark.slow),
        pytest.param("postgres", 30, marks=pytest.mark.slow),
    ],
)
def test_an_outage_under_load_is_a_few_lines(house: House, server: str, seconds: int) -> None:
    away = house.redis_server if server == "redis" else house.postgres
    enough = Event()

    def produce() -> None:
        while not enough.wait(0.02):
            house.send(house.new_events(8))

    producer = Thread(target=produce)
    with house.dyno() as dyno:
        house.emit(8)
        house.wait_until_drained()
        before = len(house.log_of(dyno).splitlines())
        producer.start()
        try:
            since = monotonic()
            away.kill()
            wait_until(lambda: monotonic() > since + seconds, "the outage is over", seconds + SLOW_SECONDS)
            away.start()
            wait_until(lambda: GOES_ON.search(house.log_of(dyno)) is not None, "work goes on", SLOW_SECONDS)
        finally:
            enough.set()
            producer.join()
        house.resend()
        house.wait_until_drained()
        lines = house.log_of(dyno).splitlines()[before:]
    assert len(lines) <= MOST_LINES, "\n".join(lines)
    assert not [line for line in lines if line.startswith(("Traceback", "  File"))]
    assert any("WARNING" in line or "ERROR" in line for line in lines)
    house.prove()
