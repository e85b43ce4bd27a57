"""Settings and resources on a test's servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from config.settings import Settings, load_settings
from worker.resources import Resources


def settings_for(database_url: str | None, redis_url: str, **overrides: object) -> Settings:
    """Settings for a test's servers; nothing is read from the environment."""
    return load_settings({}, database_url=database_url, redis_url=redis_url, **overrides)


@contextmanager
def worker_resources(settings: Settings) -> Iterator[Resources]:
    """The resources of a worker process, in this process."""
    with closing(Resources.open(settings)) as resources:
        yield resources
