"""The command `meterfall`, run for tests by a server that has its imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from config.settings import Settings
from tests.support.paths import ROOT


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Meterfall:
    """The command, on a test's servers."""

    def __init__(self, server: subprocess.Popen[str], settings: Settings | None = None) -> None:
        self._server = server
        ours = ("METERFALL_", "REDIS_URL", "DATABASE_URL", "CRASH_POINT")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self._environment["COLUMNS"] = "200"
        if settings is not None:
            assert settings.database_url is not None
            self._environment |= {"REDIS_URL": settings.redis_url, "DATABASE_URL": settings.database_url}

    def __call__(self, *arguments: str, stdin: str = "", **environment: str) -> Done:
        """Run one command to its end, in a process of its own (see tests/support/command_server.py)."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([arguments, self._environment | environment, stdin]) + "\n")
        self._server.stdin.flush()
        return Done(*json.loads(self._server.stdout.readline()))

    def started(self, program: Sequence[str], *arguments: str) -> Done:
        """Run one command as a shell would, imports and all."""
        ended = subprocess.run(
            [*program, *arguments],
            env=self._environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Done(ended.returncode, ended.stdout, ended.stderr)

    def done(self, *arguments: str, **options: str) -> Any:
        """Run a command that must succeed in silence; what it printed, parsed when it was asked for JSON."""
        done = self(*arguments, **options)
        assert (done.code, done.err) == (0, ""), f"{arguments}: {done}"
        return done.json if "--json" in arguments else done.out


@contextmanager
def serve_commands() -> Iterator[subprocess.Popen[str]]:
    """The server that runs commands (tests/support/command_server.py), for the length of the block."""
    command = [sys.executable, "-m", "tests.support.command_server"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server
        server.kill()
