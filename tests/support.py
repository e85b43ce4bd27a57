"""What several tests need: settings for their servers, accounts, drains, a look at what is pending, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime

import psycopg
from redis import Redis

from config.catalogue import load_catalogue
from config.settings import Settings, load_settings
from worker import keys, ledger
from worker.batch import opening_entries
from worker.drain import Drain, Report, Tools
from worker.ledger import Writes
from worker.periods import open_account


def settings_for(database_url: str | None, redis_url: str, **overrides: object) -> Settings:
    """Settings for a test's servers; nothing is read from the environment."""
    return load_settings({}, database_url=database_url, redis_url=redis_url, **overrides)


def give_account(
    settings: Settings,
    user_id: str,
    plan: str = "tenant",
    status: str = "active",
    buckets: Mapping[str, tuple[int, int, int]] | None = None,
) -> None:
    """Open an account. `buckets` maps meters to what it has at first: used, rollover, purchased."""
    now = datetime.now(UTC)
    account = open_account(load_catalogue(settings.catalogue_path), user_id, plan, status, now)
    balances = dict(account.balances)
    for meter, (used, rollover, purchased) in (buckets or {}).items():
        balances[meter] = balances[meter].after(used, rollover, purchased)
    account = account._replace(balances=balances)
    entries = opening_entries(account, now)
    opened = account._replace(version=len(entries))
    writes = Writes([], [], [], [opened], [(user_id, balance) for balance in balances.values()], entries, [], [])
    engine = ledger.open_engine(settings)
    try:
        with ledger.batch_connection(engine) as postgres:
            ledger.store_and_commit(postgres, 0, writes, now)
    finally:
        engine.dispose()


@contextmanager
def worker_tools(settings: Settings) -> Iterator[Tools]:
    """The tools of a worker process, in this process."""
    with closing(Tools.open(settings)) as tools:
        yield tools


def drain(settings: Settings, user_id: str) -> Report:
    """Drain the partition of `user_id` in this process until its stream is empty."""
    with worker_tools(settings) as tools:
        report = Drain(tools, partition_of(settings, user_id)).run()
    assert not report.more
    return report


def partition_of(settings: Settings, user_id: str) -> int:
    """Partition of a user under these settings."""
    return keys.partition_of(user_id, settings.partitions)


def pending_of(redis: Redis, settings: Settings, user_id: str, meter: str) -> dict[str, int]:
    """The pending map of a user and meter as it is stored, `total` included."""
    stored: dict[bytes, bytes] = redis.hgetall(keys.pending(partition_of(settings, user_id), user_id, meter))
    return {name.decode(): int(amount) for name, amount in stored.items()}


def stream_of(redis: Redis, settings: Settings, user_id: str) -> list[dict[bytes, bytes]]:
    """Fields of the entries in the stream of a user's partition, oldest first."""
    return [fields for _, fields in redis.xrange(keys.stream(partition_of(settings, user_id)))]


def rows(settings: Settings, query: str, *values: object) -> list[tuple[object, ...]]:
    """Rows that Postgres returns for `query`."""
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as connection:
        return connection.execute(query, values).fetchall()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    """Return as soon as `condition` holds; fail once `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s: {what}"
        time.sleep(0.005)
