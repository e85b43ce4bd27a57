"""The RQ queue on a Redis of its own: jobs go there alone, and billing goes on while it is away."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from config.settings import Settings, SettingsError, load_settings
from tests.support.ledger import give_accounts, rows
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.consumer import jobs
from worker.demo.servers import Server
from worker.keyspace.connection import connect_queue
from worker.reports.dynos import read_dynos
from worker.reports.metrics import exposition, read_figures
from worker.reports.status import read_status

METER = "premium_voice"
USERS = [f"u{number}" for number in range(16)]


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str, own_redis: Server) -> Iterator[Settings]:
    made = settings_for(
        emptied_database_url, redis_url, queue_redis_url=own_redis.url, partitions=4, verify_interval_seconds=0,
        redis_socket_timeout_ms=300,
    )  # fmt: skip
    with Redis.from_url(redis_url) as streams, Redis.from_url(own_redis.url) as queue:
        streams.flushdb()
        queue.flushall()
        give_accounts(made, USERS, "basic")
        yield made
        streams.flushdb()


def environment(settings: Settings) -> dict[str, str]:
    return {
        "METERFALL_QUEUE_REDIS_URL": settings.queue_url,
        "METERFALL_PARTITIONS": "4",
        "METERFALL_REDIS_SOCKET_TIMEOUT_MS": "300",
        "METERFALL_VERIFY_INTERVAL_SECONDS": "0",
    }


def emit(settings: Settings, first: int, number: int) -> None:
    with Billing.connect(settings) as billing:
        for each in range(first, first + number):
            billing.emit(USERS[each % len(USERS)], METER, 1, event_id=f"e{each}")


def are_applied(settings: Settings, number: int) -> Callable[[], bool]:
    return lambda: rows(settings, "SELECT count(*), count(DISTINCT event_id) FROM usage_log") == [(number, number)]


def test_jobs_are_in_the_redis_of_the_queue_and_nothing_else_is(settings: Settings, own_redis: Server) -> None:
    with Redis.from_url(settings.redis_url) as streams, Redis.from_url(own_redis.url) as queue:
        with dyno(settings, **environment(settings)):
            emit(settings, 0, 40)
            wait_until(are_applied(settings, 40), "jobs apply all events", seconds=30)
            wait_until(lambda: any(queue.scan_iter("rq:worker:*")), "the worker process is known there", seconds=30)
        assert list(streams.scan_iter("rq:*")) == []
        assert list(queue.scan_iter("mf:*")) == []
        queue.flushall()  # what the killed dyno had enqueued
        jobs.enqueue(jobs.job_queue(settings, queue), "sum_up")
        with worker_resources(settings) as resources:
            status = read_status(resources)
        assert (status.waiting_jobs, status.queue and status.queue.answers) == (1, True)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dyno_drains_by_itself_while_the_redis_of_the_queue_is_away(
    settings: Settings, own_redis: Server, fault: signal.Signals
) -> None:
    with Redis.from_url(settings.redis_url) as streams, dyno(settings, **environment(settings)) as process:
        emit(settings, 0, 8)
        wait_until(are_applied(settings, 8), "jobs apply events", seconds=30)
        if fault is signal.SIGKILL:
            own_redis.kill()
        else:
            own_redis.freeze()
        try:
            emit(settings, 8, 32)
            wait_until(are_applied(settings, 40), "the supervisor drains", seconds=40)
            assert process.poll() is None
            with worker_resources(settings) as resources:
                figures = read_figures(resources)
            assert figures.status.queue is not None
            assert not figures.status.queue.answers
            assert (figures.status.waiting_jobs, figures.status.redis.answers) == (None, True)
            assert [one.severity for one in figures.status.findings if one.check == "queue"] == ["degraded"]
            assert b'meterfall_server_up{server="queue"} 0.0' in exposition(figures, {})
        finally:
            if fault is signal.SIGKILL:
                own_redis.start()
            else:
                own_redis.thaw()
        wait_until(lambda: any(one.role == "worker" for one in read_dynos(streams)), "a worker is back", seconds=40)
        emit(settings, 40, 8)
        wait_until(are_applied(settings, 48), "events are applied again", seconds=30)
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert "draining without jobs" in log
    assert "Traceback" not in log


def test_a_dyno_ends_in_one_line_if_the_redis_of_the_queue_refuses_it(settings: Settings) -> None:
    wrong = environment(settings)
    wrong["METERFALL_QUEUE_REDIS_URL"] = settings.queue_url.replace("unix://", "unix://missing:hunter2@")
    with dyno(settings, **wrong) as process:
        _, log = process.communicate(timeout=30)
    assert process.returncode == 2, log
    assert "METERFALL_QUEUE_REDIS_URL: " in log
    assert "wrong user or password" in log
    assert "hunter2" not in log
    assert "Traceback" not in log


def test_a_burst_names_the_redis_of_the_queue_that_is_away(settings: Settings) -> None:
    wrong = environment(settings) | {"METERFALL_QUEUE_REDIS_URL": "redis://:hunter2@127.0.0.1:1/0"}
    with dyno(settings, "--burst", **wrong) as process:
        _, log = process.communicate(timeout=30)
    assert process.returncode == 2, log
    assert "METERFALL_QUEUE_REDIS_URL: redis://127.0.0.1:1/0 does not answer" in log
    assert "hunter2" not in log
    assert "Traceback" not in log


def test_a_wrong_url_is_named_and_never_quoted() -> None:
    with pytest.raises(SettingsError, match=r"^METERFALL_QUEUE_REDIS_URL: must be a URL redis://") as caught:
        load_settings({"METERFALL_QUEUE_REDIS_URL": "http://:hunter2@host"})
    assert "hunter2" not in str(caught.value)
    settings = load_settings({"METERFALL_QUEUE_REDIS_URL": "redis://host?dbb=1"})
    with pytest.raises(SettingsError, match=r"^METERFALL_QUEUE_REDIS_URL: no such option 'dbb'$"):
        connect_queue(settings)


def test_without_it_the_queue_is_where_the_streams_are() -> None:
    assert load_settings({"REDIS_URL": "redis://host/3"}).queue_url == "redis://host/3"
