"""Real servers and fresh databases for the tests that ask for them.

A test asks by taking one of the fixtures `servers`, `database_url`, `redis_url`, and is marked `servers` for it.
"""

import itertools
import os
import secrets
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import settings as hypothesis_settings
from redis import Redis
from redis.connection import parse_url
from sqlalchemy import make_url

from config.settings import Settings
from tests.support.commands import serve_commands
from tests.support.ledger import empty_ledger
from tests.support.resources import settings_for, worker_resources
from worker.demo.servers import Server, Servers, find_redis, redis_server, running_servers, scratch_database
from worker.resources import Resources

# The whole suite must stay quick: few examples each run, and a failure prints what reproduces it.
hypothesis_settings.register_profile("meterfall", max_examples=100, deadline=None, print_blob=True)
hypothesis_settings.load_profile("meterfall")

SERVER_FIXTURES = {"servers", "database_url", "redis_url"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need servers, so that `pytest -m servers` runs them alone."""
    for item in items:
        if isinstance(item, pytest.Function) and not SERVER_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker("servers")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many scenarios of the matrix were run, in how many tests.

    Here and not in tests/faults: with pytest-xdist, whoever reports collects nothing, and loads no conftest below this.
    """
    reports = [report for found in terminalreporter.stats.values() for report in found]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    run = [{value for name, value in call.user_properties if name == "scenario"} for call in calls]
    if scenarios := set[int]().union(*run):
        terminalreporter.write_line(f"fault matrix: {len(scenarios)} scenarios in {sum(map(bool, run))} tests")


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """PostgreSQL and Redis for the whole session: those the environment names, else started here.

    Fails on a Redis database that is not empty: the tests flush theirs, and never somebody else's data.
    """
    with running_servers(_environ_of_this_worker()) as running:
        with Redis.from_url(running.redis_url) as redis:
            if keys := redis.dbsize():
                pytest.fail(f"REDIS_URL must name an empty database for the tests; {running.redis_url} has {keys} keys")
        yield running


def _environ_of_this_worker() -> dict[str, str]:
    """The environment; of several workers of pytest-xdist, number N has the Nth Redis database after the one named.

    Those of Postgres have names of their own anyway, and without a name each worker starts a Redis of its own.
    """
    environ = dict(os.environ)
    worker = int(environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    if worker and (url := environ.get("REDIS_URL")):
        # `db` in the query goes before what the path says, and a socket has nothing else.
        database = int(parse_url(url).get("db", 0)) + worker
        environ["REDIS_URL"] = make_url(url).update_query_dict({"db": str(database)}).render_as_string(False)
    return environ


@pytest.fixture(scope="session")
def _database_names() -> Iterator[str]:
    """Names no other session uses. The process id tells whose they are, the token tells containers apart."""
    prefix = f"meterfall_test_{os.getpid()}_{secrets.token_hex(3)}"
    return (f"{prefix}_{number}" for number in itertools.count())


@pytest.fixture(scope="session")
def _template(servers: Servers, _database_names: Iterator[str]) -> Iterator[str]:
    """Name of a migrated, empty database that the tests' databases are copied from."""
    from worker.ledger.migrate import migrate

    name = next(_database_names)
    with scratch_database(servers.database_url, name, "template0") as url:
        migrate(url)
        yield name


@pytest.fixture
def database_url(servers: Servers, _template: str, _database_names: Iterator[str]) -> Iterator[str]:
    """URL of a migrated, empty database for one test."""
    with scratch_database(servers.database_url, next(_database_names), _template) as url:
        yield url


@pytest.fixture(scope="module")
def _shared_database_url(servers: Servers, _template: str, _database_names: Iterator[str]) -> Iterator[str]:
    """URL of a migrated database for the tests of one module."""
    with scratch_database(servers.database_url, next(_database_names), _template) as url:
        yield url


@pytest.fixture
def emptied_database_url(_shared_database_url: str) -> str:
    """URL of a migrated, empty database that the module's tests share one after the other."""
    empty_ledger(_shared_database_url)
    return _shared_database_url


@pytest.fixture
def redis_url(servers: Servers) -> Iterator[str]:
    """URL of a Redis database that is empty before and after the test."""
    with Redis.from_url(servers.redis_url) as redis:
        redis.flushdb()
        yield servers.redis_url
        redis.flushdb()


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    """Settings for the servers of the test; a module that needs others has a fixture of that name."""
    return settings_for(emptied_database_url, redis_url)


@pytest.fixture
def redis(settings: Settings) -> Iterator[Redis]:
    """A client of the test's own, on the servers of `settings`."""
    with Redis.from_url(settings.redis_url) as client:
        yield client


@pytest.fixture
def resources(settings: Settings) -> Iterator[Resources]:
    """The resources of a worker process, on the servers of `settings`."""
    with worker_resources(settings) as opened:
        yield opened


@pytest.fixture(scope="module")
def own_redis() -> Iterator[Server]:
    """A Redis that only the tests of a module use, and may stop."""
    with redis_server(find_redis(os.environ)) as server:
        yield server


@pytest.fixture(scope="session")
def command_server() -> Iterator[subprocess.Popen[str]]:
    """A server that runs commands for `Meterfall`; all tests share it, since each command has a process of its own."""
    with serve_commands() as server:
        yield server
