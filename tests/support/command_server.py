"""`python -m tests.support.command_server`: run commands for the tests, each in a process forked after the imports.

Half a second of imports for each of several hundred commands would be most of the suite. A forked child is a process
of its own, with its own environment, arguments, streams and exit code; it runs the same `worker.cli.main`.
"""

from __future__ import annotations

import functools
import gc
import io
import json
import os
import sys
import tempfile
import traceback
from typing import IO, NoReturn

import alembic.command
import psycopg
import redis
import typer
import typer.rich_utils

import worker.admin.accounts
import worker.admin.dead_letters
import worker.admin.transfer
import worker.cli
import worker.cli.tables
import worker.client
import worker.consumer.drain
import worker.consumer.supervisor
import worker.reports.proof
import worker.reports.status

# Imported to be there before the fork; the commands import them when they need them.
PRELOADED = (
    alembic.command, psycopg, redis, worker.admin.accounts, worker.admin.dead_letters, worker.admin.transfer,
    worker.cli.tables, worker.client, worker.consumer.drain, worker.reports.status, worker.consumer.supervisor,
    worker.reports.proof, typer.rich_utils,
)  # fmt: skip


def main() -> None:
    """Answer each line [arguments, environment, stdin] with a line [exit code, stdout, stderr], until stdin ends."""
    # Typer makes its commands from the functions anew for each command line: half of the time that a child takes.
    typer.main.get_command = functools.cache(typer.main.get_command)
    typer.main.get_command(worker.cli.app)
    # A collection in a child would write to, and so copy, most pages that it shares with us.
    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        arguments, environment, stdin = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if not pid:
                run(arguments, environment, stdin, out, err)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = [stream.read().decode("utf-8", "replace") for stream in (out, err) if stream.seek(0) == 0]
        print(json.dumps([code, *texts]), flush=True)


def run(arguments: list[str], environment: dict[str, str], stdin: str, out: IO[bytes], err: IO[bytes]) -> NoReturn:
    """Be the command, in the child."""
    code: object = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["meterfall", *arguments]
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        worker.cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 (what the interpreter would do with it)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
