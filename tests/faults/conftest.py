"""Houses for the fault tests, and their marks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.house import House, open_house
from worker.demo.servers import Server, find_postgres, find_redis, postgres_server, redis_server
from worker.ledger.migrate import migrate

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, and put the number of its scenario where reports find it."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("faults")
            item.user_properties += [("scenario", mark.kwargs["number"]) for mark in item.iter_markers("scenario")]


@pytest.fixture(scope="session")
def _postgres() -> Iterator[Server]:
    with postgres_server(find_postgres(os.environ)) as server:
        migrate(server.url)
        yield server


@pytest.fixture(scope="session")
def durable_redis() -> Iterator[Server]:
    """A durable Redis: confirmed writes are on disk."""
    with redis_server(find_redis(os.environ), appendfsync="always") as server:
        yield server


@pytest.fixture
def house(_postgres: Server, durable_redis: Server, tmp_path: Path) -> Iterator[House]:
    """A house for one test. Its servers are shared, one test after the other, and mended before each."""
    with open_house(_postgres, durable_redis, tmp_path) as opened:
        yield opened
