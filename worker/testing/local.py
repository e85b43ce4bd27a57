"""Real servers for the tests of a host: PostgreSQL and Valkey from wheels, and workers that the test runs itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count

from redis import Redis

from config.settings import Settings, load_settings
from worker.consumer.drain import drain_stream
from worker.demo.servers import Servers, running_servers, scratch_database
from worker.keyspace import keys
from worker.ledger.migrate import migrate
from worker.resources import Resources


@dataclass(frozen=True)
class LocalServers:
    """An empty ledger and an empty Redis of one test, and `settings` that name them."""

    settings: Settings

    @property
    def environ(self) -> dict[str, str]:
        """The two URLs as variables of the environment."""
        return {"DATABASE_URL": str(self.settings.database_url), "REDIS_URL": self.settings.redis_url}

    def apply(self) -> None:
        """Apply the events that wait, as workers do; return when none is left."""
        with closing(Resources.open(self.settings)) as resources:
            resources.claim()
            for stream in keys.streams(self.settings.partitions):
                while drain_stream(resources, stream).more:
                    pass


class LocalPair:
    """A PostgreSQL and a Valkey for many tests, one after the other."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._numbers = count(1)
        migrate(servers.database_url)

    @contextmanager
    def emptied(self, settings: Mapping[str, object]) -> Iterator[LocalServers]:
        """Have an empty ledger and an empty Redis for the length of a block. `settings` are fields of `Settings`."""
        with (
            Redis.from_url(self._servers.redis_url) as redis,
            scratch_database(self._servers.database_url, f"test_{next(self._numbers)}", "meterfall") as database_url,
        ):
            redis.flushdb()
            urls = {"database_url": database_url, "redis_url": self._servers.redis_url}
            yield LocalServers(load_settings({}, **{**settings, **urls}))


@contextmanager
def local_pair() -> Iterator[LocalPair]:
    """Start both servers for the length of a block, and stop them after it, in about two seconds.

    It never uses those that the environment names: tests empty theirs. Raises ServersUnavailableError if there is no
    program to start, ServerStartError if one does not start. If the process is killed, Linux stops both.
    """
    with running_servers({"PATH": os.environ.get("PATH", os.defpath)}) as servers:
        yield LocalPair(servers)
