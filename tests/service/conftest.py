"""One running service for the tests of a module, on servers of their session, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.ledger import empty_ledger
from tests.support.resources import settings_for
from tests.support.serving import Served, make_keys, serving
from worker.demo.servers import Servers


@pytest.fixture(scope="module")
def module_settings(servers: Servers, _shared_database_url: str) -> Settings:
    """Settings of the service that a module shares."""
    return settings_for(_shared_database_url, servers.redis_url, api_key_unknown_pause_ms=0)


@pytest.fixture(scope="module")
def running(module_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The service that a module shares."""
    with serving(module_settings, tmp_path_factory.mktemp("serve"), keys=False) as served:
        yield served


@pytest.fixture
def settings(module_settings: Settings) -> Settings:
    """Settings for the servers of the test, which are empty."""
    assert module_settings.database_url is not None
    empty_ledger(module_settings.database_url)
    with Redis.from_url(module_settings.redis_url) as redis:
        redis.flushdb()
    return module_settings


@pytest.fixture
def served(running: Served, settings: Settings) -> Served:
    """The running service, with new API keys."""
    running.secrets = make_keys(settings)
    return running
