"""The process itself: how it starts and stops, one or several, and what it answers while servers are away or hang."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from time import monotonic

import psycopg
import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import empty_ledger, give_account, rows
from tests.support.paths import ROOT
from tests.support.resources import settings_for
from tests.support.serving import Served, serving
from tests.support.streams import backlog, drain
from tests.support.waiting import wait_until
from tests.support.web import free_port, got
from worker.demo.processes import children
from worker.demo.servers import Server, find_postgres, postgres_server
from worker.ledger.migrate import migrate

USER, METER = "user-42", "premium_voice"
WHO = {"user_id": USER, "meter": METER}


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[Server]:
    """A Postgres that only the tests of this module use, and may stop."""
    with postgres_server(find_postgres(os.environ)) as server:
        migrate(server.url)
        yield server


@contextmanager
def serving_on(postgres: Server, redis: Server, folder: Path, **variables: str) -> Iterator[tuple[Served, Settings]]:
    """Run the service on servers of a test, with one account."""
    redis.start()
    empty_ledger(postgres.url)
    with Redis.from_url(redis.url) as client:
        client.flushdb()
    settings = settings_for(postgres.url, redis.url, redis_retries=0, redis_socket_timeout_ms=1_000)
    names = {"METERFALL_API_KEY_UNKNOWN_PAUSE_MS": "0", **variables}
    with serving(settings, folder, variables=names) as served:
        try:
            yield served, settings
        finally:
            for server in (postgres, redis):
                server.thaw()
                server.start()


def post(head: dict[str, str], body: bytes) -> bytes:
    """A request as it travels."""
    lines = ["POST /v1/check HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def test_a_stop_lets_a_request_end_and_takes_no_more(database_url: str, own_redis: Server, tmp_path: Path) -> None:
    own_redis.start()
    settings = settings_for(database_url, own_redis.url)
    give_account(settings, USER, "basic")
    body = json.dumps({**WHO, "amount": 7}).encode()
    with serving(settings, tmp_path) as served, closing(socket.create_connection(("127.0.0.1", served.port), 30)) as it:
        head = {
            "Authorization": f"Bearer {served.secrets['producer']}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }
        it.sendall(post(head, body[:10]))
        wait_until(lambda: served.get("/live").status == 200, "it has taken the beginning")
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: got(served.port, "/live")[0] == 0, "it takes no more")
        assert served.process.poll() is None
        it.sendall(body[10:])
        assert it.recv(4_096).startswith(b"HTTP/1.1 200 ")
        assert served.process.wait(10) == 0


def test_a_stop_cuts_off_what_takes_too_long(database_url: str, own_redis: Server, tmp_path: Path) -> None:
    own_redis.start()
    settings = settings_for(database_url, own_redis.url)
    with (
        serving(settings, tmp_path, variables={"METERFALL_SERVE_STOP_TIMEOUT_SECONDS": "1"}) as served,
        closing(socket.create_connection(("127.0.0.1", served.port), 30)) as it,
    ):
        head = {"Authorization": f"Bearer {served.secrets['producer']}", "Content-Type": "application/json"}
        it.sendall(post(head | {"Content-Length": "100"}, b"{"))
        wait_until(lambda: served.get("/live").status == 200, "it has taken the beginning")
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(10) == 0


def test_several_processes_share_a_port_and_outlive_one_of_them(
    database_url: str, own_redis: Server, tmp_path: Path
) -> None:
    own_redis.start()
    settings = settings_for(database_url, own_redis.url, api_key_unknown_pause_ms=0)
    give_account(settings, USER, "basic")
    with serving(settings, tmp_path, "--processes", "2") as served:
        assert served.post("/v1/check", WHO).status == 200
        first = workers_of(served)
        assert len(first) == 2
        os.kill(min(first), signal.SIGKILL)
        wait_until(lambda: len(workers_of(served) - {min(first)}) == 2, "another one came", seconds=30)
        wait_until(lambda: got(served.port, "/live")[0] == 200, "it answers", seconds=30)
        second = workers_of(served)
        # Killed, nobody tells its children; they end by themselves and leave the port.
        served.process.kill()
        served.process.wait()
        wait_until(lambda: not any(is_alive(pid) for pid in second), "they have ended", seconds=30)
        assert got(served.port, "/live")[0] == 0


def workers_of(served: Served) -> set[int]:
    """The processes that answer: children of the service, but for the tracker of multiprocessing."""
    found = set()
    for pid in children(served.process.pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"spawn_main" in command:
            found.add(pid)
    return found


def is_alive(pid: int) -> bool:
    """True while there is such a process, zombies aside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_it_answers_whatever_happens_to_the_servers(own_postgres: Server, own_redis: Server, tmp_path: Path) -> None:
    events = [{"event_id": f"e-{number}", **WHO, "quantity": 1} for number in range(3)]
    with serving_on(own_postgres, own_redis, tmp_path) as (served, settings):
        give_account(settings, USER, "basic")
        assert served.post("/v1/check", WHO).status == 200
        own_redis.freeze()
        answer = served.post("/v1/check", WHO)
        assert (answer.status, answer.json["allowed"]) == (200, True)  # by the ledger
        lost = served.post("/v1/events", events)
        assert (lost.status, lost.problem["title"], lost.headers["retry-after"]) == (503, "Billing unavailable", "1")
        assert lost.problem["unconfirmed"] == ["e-0", "e-1", "e-2"]
        assert served.post("/v1/charge", {**WHO, "amount": 1, "event_id": "c-1"}).status == 503
        own_postgres.freeze()
        for path, body in (("check", WHO), ("holds", {**WHO, "amount": 1, "key": "h-1"})):
            began = monotonic()
            answer = served.post(f"/v1/{path}", body)
            assert answer.status in {200, 503}, path
            assert monotonic() - began < 15
        wait_until(lambda: served.get("/ready", None).status == 503, "it is not ready", seconds=10)
        assert served.get("/live", None).json == {"live": True}
        assert "meterfall_read_in_time" in served.get("/metrics", None).body.decode()
        own_postgres.thaw()
        own_redis.thaw()
        wait_until(lambda: not {"redis", "postgres", "status"} & failed_checks(served), "it is ready again", seconds=30)
        wait_until(lambda: served.post("/v1/events", events).status == 202, "they arrive", seconds=30)
        drain(settings, USER)
        assert rows(settings, "SELECT event_id FROM usage_log WHERE starts_with(event_id, 'e-') ORDER BY seq") == [
            ("e-0",), ("e-1",), ("e-2",),
        ]  # fmt: skip


def test_with_a_spool_events_outlive_an_outage(database_url: str, own_redis: Server, tmp_path: Path) -> None:
    own_redis.start()
    settings = settings_for(database_url, own_redis.url, redis_retries=0, redis_socket_timeout_ms=1_000)
    give_account(settings, USER, "basic")
    folder = tmp_path / "spool"
    folder.mkdir()
    with serving(settings, tmp_path, variables={"METERFALL_SPOOL_PATH": str(folder)}) as served:
        event = {"event_id": "e-1", **WHO, "quantity": 7}
        assert served.post("/v1/check", WHO).status == 200
        own_redis.kill()
        kept = served.post("/v1/events", event)
        assert (kept.status, kept.json["spooled"]) == (202, True)
        own_redis.start()
        with Redis.from_url(own_redis.url) as redis:
            wait_until(lambda: backlog(settings, redis) == 1, "it is sent", seconds=30)
    drain(settings, USER)
    assert rows(settings, "SELECT event_id, quantity FROM usage_log") == [("e-1", 7)]


def failed_checks(served: Served) -> set[str]:
    """The findings of `/ready`."""
    return set(served.get("/ready", None).json["failed"])


def test_both_servers_away_is_one_problem_document(own_postgres: Server, own_redis: Server, tmp_path: Path) -> None:
    with serving_on(own_postgres, own_redis, tmp_path) as (served, _):
        assert served.post("/v1/check", {**WHO, "user_id": "cold"}).status == 200
        own_redis.kill()
        own_postgres.kill()
        for path, body in (
            ("check", {**WHO, "user_id": "colder"}), ("events", {"event_id": "e-9", **WHO, "quantity": 1}),
            ("charge", {**WHO, "amount": 1, "event_id": "c-9"}),
        ):  # fmt: skip
            answer = served.post(f"/v1/{path}", body)
            assert (answer.status, answer.problem["title"]) == (503, "Billing unavailable"), path
        unknown = served.post("/v1/check", WHO, "mf_000000000000_" + "A" * 43)
        assert unknown.status == 503  # nobody can say whether there is such a key


def test_a_request_has_a_time_limit(own_postgres: Server, own_redis: Server, tmp_path: Path) -> None:
    with serving_on(own_postgres, own_redis, tmp_path, METERFALL_SERVE_TIMEOUT_SECONDS="1") as (served, _):
        assert served.post("/v1/check", {**WHO, "user_id": "warm"}).status == 200
        with closing(socket.create_connection(("127.0.0.1", served.port), 30)) as it:
            head = {"Authorization": f"Bearer {served.secrets['producer']}", "Content-Type": "application/json"}
            it.sendall(post(head | {"Content-Length": "100"}, b"{"))
            assert it.recv(4_096).startswith(b"HTTP/1.1 408 ")
        own_postgres.freeze()
        began = monotonic()
        answer = served.post("/v1/check", {**WHO, "user_id": "cold"})
        assert (answer.status, answer.problem["title"]) == (503, "Billing unavailable")
        assert monotonic() - began < 4


def test_calls_that_need_a_frozen_ledger_end_within_the_time_limit(
    own_postgres: Server, own_redis: Server, tmp_path: Path
) -> None:
    """Also those that wait for a thread which an earlier call has left with the frozen server."""
    with serving_on(own_postgres, own_redis, tmp_path, METERFALL_SERVE_TIMEOUT_SECONDS="2") as (served, settings):
        give_account(settings, USER, "basic")
        assert served.get(f"/v1/balances?user_id={USER}", "operator").status == 200
        own_postgres.freeze()
        grant = {**WHO, "amount": 1, "key": "k"}
        for call in (
            *(partial(served.get, f"/v1/{path}?user_id={USER}", "operator") for path in ("balances", "usage") * 4),
            *(partial(served.post, "/v1/accounts/grant", grant, "operator") for _ in range(2)),
            partial(served.post, "/v1/estimate", {**WHO, "user_id": "cold", "quantity": 1}, "operator"),
            partial(served.post, "/v1/holds", {**WHO, "user_id": "cold", "amount": 1, "key": "h"}, "operator"),
        ):
            began = monotonic()
            answer = call()
            assert (answer.status, answer.problem["title"]) == (503, "Billing unavailable"), answer
            assert answer.headers["retry-after"] == "1", answer
            assert monotonic() - began < 4
        own_postgres.thaw()
        thawed = monotonic()
        wait_until(lambda: served.post("/v1/accounts/grant", grant, "operator").status == 200, "it changes", seconds=30)
        assert monotonic() - thawed < 10
        assert len(rows(settings, "SELECT 1 FROM ledger_entry WHERE entry_key = 'grant:k'")) == 1


def test_reports_that_hang_leave_changes_alone_and_a_long_queue_is_refused(
    own_postgres: Server, own_redis: Server, tmp_path: Path
) -> None:
    few = {"METERFALL_SERVE_ACCOUNT_THREADS": "2", "METERFALL_SERVE_WAITING_MAX_CALLS": "4"}
    with serving_on(own_postgres, own_redis, tmp_path, **few) as (served, settings):
        give_account(settings, USER, "basic")
        grant = {**WHO, "amount": 5, "key": "order-1"}
        assert served.post("/v1/accounts/grant", grant, "operator").status == 200
        with psycopg.connect(settings.database_url or "") as other, ThreadPoolExecutor(8) as callers:
            other.execute("LOCK TABLE document_rollup IN ACCESS EXCLUSIVE MODE")
            path = f"/v1/breakdown?user_id={USER}"
            reports = [callers.submit(served.get, path) for _ in range(3)]
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            wait_until(lambda: rows(settings, waiting) == [(1,)], "one of them is at work")
            assert served.post("/v1/accounts/grant", {**grant, "key": "order-2"}, "operator").status == 200
            assert rows(settings, waiting) == [(1,)]
            reports += [callers.submit(served.get, path) for _ in range(5)]
            other_answers = [each.result() for each in reports[3:]]
            refused = [each for each in other_answers if each.status == 429]
            assert refused
            assert refused[0].problem["title"] == "Too many requests"
            assert refused[0].headers["retry-after"] == "1"
            other.rollback()
            assert {each.result().status for each in reports} <= {200, 429, 503}
        assert served.get(f"/v1/breakdown?user_id={USER}").status == 200


# ---------------------------------------------------------------------------------------------------------------------
# Starts that fail


def started(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `meterfall serve` until it ends, without uvicorn if a variable says so."""
    environ = {name: value for name, value in os.environ.items() if not name.endswith(("_URL", "_PORT"))}
    code = (
        "import os, sys\n"
        "if os.environ.get('WITHOUT'): sys.modules[os.environ['WITHOUT']] = None\n"
        "sys.argv[0] = 'meterfall'\n"
        "from worker.cli import main\nmain()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "serve", *options],
        cwd=ROOT, env=environ | variables, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


SOMEWHERE = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1/0"}


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_without_its_packages_it_says_what_to_install(package: str) -> None:
    ended = started(**SOMEWHERE, WITHOUT=package)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "pip install 'meterfall[serve]'" in ended.stderr


def test_starts_that_cannot_succeed_are_one_line() -> None:
    for variables, said in (
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, "DATABASE_URL: unset"),
        ({**SOMEWHERE, "METERFALL_SERVE_BODY_MAX_BYTES": "7"}, "METERFALL_SERVE_BODY_MAX_BYTES"),
        ({**SOMEWHERE, "METERFALL_CONSOLE_SECRET": "easy"}, "METERFALL_CONSOLE_SECRET"),
        ({**SOMEWHERE, "METERFALL_CATALOGUE_PATH": "/nowhere.toml"}, "/nowhere.toml"),
    ):
        ended = started(**variables)
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
        assert said in ended.stderr


def test_a_port_in_use_ends_it(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", free_port()))) as taken:
        ended = started("--port", str(taken.getsockname()[1]), **SOMEWHERE)
    assert ended.returncode != 0
    assert "address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr
