"""A standby for a Postgres of ours: it follows the primary, and may be promoted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.faults.house import SLOW_SECONDS
from tests.support.waiting import wait_until
from worker.demo import servers
from worker.demo.servers import Server


@contextmanager
def standby_of(primary: Server, *, synchronous: bool) -> Iterator[Server]:
    """Run a standby that has caught up with `primary`, for the length of the block.

    With a synchronous one, every later commit is on both servers before its answer.
    """
    with servers._locked_folder("postgres") as (folder, lock):
        if primary.account:
            os.chown(folder, primary.account.pw_uid, primary.account.pw_gid)
        program, data = Path(primary.command[0]), folder / "data"
        moved = {"-D": "-D", str(primary.folder / "data"): str(data)}
        options = [moved.get(part, part.replace(str(primary.folder), str(folder))) for part in primary.command[1:]]
        url = primary.url.replace(str(primary.folder), str(folder))
        server = Server(
            label=f"standby of {primary.label}",
            url=url,
            folder=folder,
            command=[str(program), *options],
            stop_signal=primary.stop_signal,
            answers=lambda: servers._postgres_answers(url),
            account=primary.account,
            lock=lock,
        )
        source = f"host={primary.folder} user=meterfall application_name=standby"
        copy = [str(program.with_name("pg_basebackup")), f"--pgdata={data}", f"--dbname={source}"]
        backup = server.spawn([*copy, "--write-recovery-conf", "--checkpoint=fast", "--no-sync"])
        assert backup.wait(SLOW_SECONDS) == 0, server.log_tail()
        try:
            server.start()
            wait_until(lambda: state_of_standby(primary) == "async", "the standby follows", SLOW_SECONDS)
            if synchronous:
                with psycopg.connect(primary.url, autocommit=True) as connection:
                    connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
                    connection.execute("SELECT pg_reload_conf()")
                wait_until(lambda: state_of_standby(primary) == "sync", "the standby is synchronous", SLOW_SECONDS)
            yield server
        finally:
            server.stop()


def state_of_standby(primary: Server) -> str:
    """Return `async` or `sync` for a standby that follows; else empty text."""
    with psycopg.connect(primary.url, autocommit=True) as connection:
        row = connection.execute("SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'").fetchone()
    return str(row[0]) if row else ""
