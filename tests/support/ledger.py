"""What several tests need: settings for their servers, accounts, drains, a look at what is pending, waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from redis import Redis

from config.catalogue import load_catalogue
from config.settings import Settings, load_settings
from worker import crash
from worker.consumer.drain import Drain, Report
from worker.demo.processes import kill_tree
from worker.keyspace import keys
from worker.ledger import batch
from worker.ledger.connection import batch_connection, open_engine
from worker.resources import Resources
from worker.rules.history import open_for_good
from worker.rules.lifecycle import open_account
from worker.rules.rows import Writes


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
    give_accounts(settings, [user_id], plan, status, buckets)


def give_accounts(
    settings: Settings,
    users: Sequence[str],
    plan: str = "tenant",
    status: str = "active",
    buckets: Mapping[str, tuple[int, int, int]] | None = None,
) -> None:
    """Open several accounts alike. See `give_account`."""
    now = datetime.now(UTC)
    catalogue = load_catalogue(settings.catalogue_path)
    writes = Writes.none()
    for user_id in users:
        account = open_account(catalogue, user_id, plan, status, now)
        balances = dict(account.balances)
        for meter, (used, rollover, purchased) in (buckets or {}).items():
            balances[meter] = balances[meter].after(used, rollover, purchased)
        open_for_good(writes, account._replace(balances=balances), now)
    engine = open_engine(settings)
    try:
        with batch_connection(engine) as postgres:
            batch.store_and_commit(postgres, 0, writes, now)
    finally:
        engine.dispose()


def empty_ledger(database_url: str) -> None:
    """Make a migrated ledger as new; a tenth of the time that a new database takes."""
    with psycopg.connect(database_url) as connection:
        found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        tables = {str(row[0]) for row in found} - {"ledger", "alembic_version"}
        # DELETE, not TRUNCATE: that makes new files, and syncs them. The others refer to accounts.
        for table in sorted(tables, key=lambda name: name == "account"):
            connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
            connection.execute(f"DELETE FROM {table}")
            connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
        connection.execute("UPDATE ledger SET epoch = DEFAULT, partitions = NULL")
        clock = "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE "
        connection.execute(clock + "AS 'SELECT clock_timestamp()'")  # a test may have moved it


@contextmanager
def worker_resources(settings: Settings) -> Iterator[Resources]:
    """The resources of a worker process, in this process."""
    with closing(Resources.open(settings)) as resources:
        yield resources


def drain(settings: Settings, user_id: str) -> Report:
    """Drain the partition of `user_id` in this process until its stream is empty."""
    with worker_resources(settings) as resources:
        report = Drain(resources, partition_of(settings, user_id)).run()
    assert not report.more
    return report


def partition_of(settings: Settings, user_id: str) -> keys.Partition:
    """Partition of a user under these settings."""
    return keys.partition_of(user_id, settings.partitions)


def account_of(settings: Settings, user_id: str) -> keys.AccountKeys:
    """The keys of an account under these settings."""
    return keys.account_of(user_id, settings.partitions)


def pending_of(redis: Redis, settings: Settings, user_id: str, meter: str) -> dict[str, int]:
    """The pending map of a user and meter as it is stored, `total` included."""
    stored: Any = redis.hgetall(account_of(settings, user_id).pending(meter))
    return {name.decode(): int(amount) for name, amount in stored.items()}


def stream_of(redis: Redis, settings: Settings, user_id: str) -> list[dict[bytes, bytes]]:
    """Fields of the entries in the stream of a user's partition, oldest first."""
    entries: Any = redis.xrange(partition_of(settings, user_id).entries)
    return [fields for _, fields in entries]


def rows(settings: Settings, query: str, *values: object) -> list[tuple[object, ...]]:
    """Rows that Postgres returns for `query`."""
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as connection:
        return connection.execute(query, values).fetchall()


def move_clock(settings: Settings, by: timedelta) -> None:
    """Let the ledger's clock, in this test's own database, go on `by` ahead of the real one."""
    _replace_clock(settings, f"clock_timestamp() + interval '{by.total_seconds():.6f} seconds'")


def stop_clock(settings: Settings, at: datetime) -> None:
    """Stop the ledger's clock, in this test's own database, at one moment."""
    _replace_clock(settings, f"timestamptz '{at.isoformat()}'")


def _replace_clock(settings: Settings, expression: str) -> None:
    assert settings.database_url is not None
    body = expression.replace("'", "''")
    with psycopg.connect(settings.database_url) as connection:
        connection.execute(
            f"CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT {body}'"
        )


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    """Return as soon as `condition` holds; fail once `seconds` have passed.

    A look may cost a process or a connection, and takes that from what is waited for: a third of the time at most.
    """
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if condition():
            return
        ended = time.monotonic()
        assert ended < deadline, f"still not so after {seconds} s: {what}"
        time.sleep(max(0.005, 2 * (ended - began)))


@contextmanager
def dyno(settings: Settings, *options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`meterfall worker run` as a process; killed at the end of the block with its worker if it still runs."""
    assert settings.database_url is not None
    urls = {"DATABASE_URL": settings.database_url, "REDIS_URL": settings.redis_url}
    command = [sys.executable, "-m", "worker", "worker", "run", *options]
    process = subprocess.Popen(
        command, env={**os.environ, **urls, **environment}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        kill(process)
        process.communicate()


def engine_of(process: subprocess.Popen[str]) -> int | None:
    """Pid of the worker process that a dyno has started."""
    done = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0]) if done.stdout.split() else None


def killed_in(settings: Settings, action: Callable[[Resources], object], label: str | None = None) -> None:
    """Do `action` in a process of its own that is killed with SIGKILL: at the crash point `label`, else right after."""
    pid = os.fork()
    if not pid:
        try:
            crash._ARMED = label
            with worker_resources(settings) as resources:
                action(resources)
                if label is None:
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to both processes of a dyno."""
    if process.poll() is None:
        kill_tree(process.pid)
        process.wait()
