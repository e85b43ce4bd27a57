"""The connections of clients that wait: one for each thread that calls, and none is used whose replies are in doubt."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, Thread

import pytest
from redis import Connection, ConnectionPool, Redis
from redis import exceptions as redis_errors

from config.settings import Settings
from worker.client.lines import Lines
from worker.keyspace.connection import service_pool

ID = [("CLIENT", "ID")]


def pool_of(settings: Settings, retries: int = 0) -> ConnectionPool:
    """What makes connections that retry so often."""
    return service_pool(settings.model_copy(update={"redis_retries": retries}), 2_000)


@pytest.fixture
def lines(settings: Settings) -> Iterator[Lines]:
    """Lines without a retry: what these tests want must not need one."""
    made = Lines(pool_of(settings))
    yield made
    made.close()


def test_one_caller_after_the_other_uses_the_same_connection(lines: Lines) -> None:
    assert lines.replies(ID) == lines.replies(ID)


def test_callers_at_the_same_time_have_connections_of_their_own(lines: Lines) -> None:
    found: list[int] = []
    together = Barrier(4)

    def call() -> None:
        together.wait(10)
        found.append(lines.replies([*ID, ("BLPOP", "mf:nothing", "0.3")])[0])

    threads = [Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(set(found)) == 4


def test_commands_go_together_and_an_error_of_one_is_its_reply(lines: Lines, redis: Redis) -> None:
    redis.set("mf:text", "x")
    first, error, last = lines.replies([("GET", "mf:text"), ("INCR", "mf:text"), ("GET", "mf:text")])
    assert (first, last) == (b"x", b"x")
    assert isinstance(error, redis_errors.ResponseError)


def test_a_connection_that_was_closed_as_it_lay_idle_costs_no_retry(lines: Lines, redis: Redis) -> None:
    (before,) = lines.replies(ID)
    redis.client_kill_filter(_id=str(before))
    (after,) = lines.replies(ID)
    assert after != before


def test_a_connection_whose_reader_was_interrupted_is_used_no_more(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = lines.replies(ID)
    with monkeypatch.context() as patched:

        def interrupted(_: Connection) -> None:
            raise KeyboardInterrupt

        patched.setattr(lines._pool.connection_class, "read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lines.replies([("ECHO", "of the call before")])
    (after,) = lines.replies(ID)
    assert isinstance(after, int)
    assert after != before


def test_an_argument_that_cannot_travel_costs_no_connection(lines: Lines) -> None:
    before = lines.replies(ID)
    with pytest.raises(UnicodeError):
        lines.replies([("ECHO", "\ud800")])
    assert lines.replies(ID) == before


def test_a_lost_connection_is_tried_anew_as_often_as_the_setting_says(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines(pool_of(settings, retries=2))
    sent: list[object] = []

    def lost(connection: Connection, command: object, check_health: bool = True) -> None:
        sent.append(command)
        raise redis_errors.ConnectionError("lost")

    lines.replies(ID)
    monkeypatch.setattr(lines._pool.connection_class, "connect", lambda _: None)
    monkeypatch.setattr(lines._pool.connection_class, "send_packed_command", lost)
    with pytest.raises(redis_errors.ConnectionError, match="lost"):
        lines.replies(ID)
    assert len(sent) == 1 + 3, "on the idle connection, and on a new one with two retries"
    lines.close()


def test_closed_lines_leave_no_connection_open(settings: Settings, redis: Redis) -> None:
    lines = Lines(pool_of(settings))
    began = Barrier(2)

    def call() -> None:
        began.wait(10)
        found.extend(lines.replies([*ID, ("BLPOP", "mf:nothing", "0.5")]))

    found: list[object] = lines.replies(ID)
    thread = Thread(target=call)
    thread.start()
    began.wait(10)
    found += lines.replies(ID)
    lines.close()
    thread.join(10)
    assert len(found) == 4
    open_now = {int(client["id"]) for client in redis.client_list()}
    assert open_now.isdisjoint(number for number in found if isinstance(number, int))
