"""The command on the servers of a test, and without any."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from config.settings import Settings
from tests.support.ledger import settings_for
from tests.support.meterfall import Meterfall, command_server


@pytest.fixture(scope="session")
def _server() -> Iterator[subprocess.Popen[str]]:
    with command_server() as server:
        yield server


@pytest.fixture
def bare(_server: subprocess.Popen[str]) -> Meterfall:
    """The command, with nothing in its environment."""
    return Meterfall(_server)


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(database_url, redis_url)


@pytest.fixture
def meterfall(_server: subprocess.Popen[str], settings: Settings) -> Meterfall:
    return Meterfall(_server, settings)
