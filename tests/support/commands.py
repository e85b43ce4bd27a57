"""The command `meterfall`, run for tests by a server that has its imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from config.settings import Settings
from schemas.answers import CheckAnswer
from tests.support.paths import ROOT
from worker.rules.explanations import explain_check

USER = "user-42"
METER = "premium_voice"
PASSWORD = "hunter2"
MODULE = [sys.executable, "-m", "worker"]


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
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environment["COLUMNS"] = "200"
        if settings is not None:
            assert settings.database_url is not None
            self.environment |= {"REDIS_URL": settings.redis_url, "DATABASE_URL": settings.database_url}

    def __call__(self, *arguments: str, stdin: str = "", **environment: str) -> Done:
        """Run one command to its end, in a process of its own (see tests/support/command_server.py)."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([arguments, self.environment | environment, stdin]) + "\n")
        self._server.stdin.flush()
        return Done(*json.loads(self._server.stdout.readline()))

    def started(self, program: Sequence[str], *arguments: str) -> Done:
        """Run one command as a shell would, imports and all."""
        ended = subprocess.run(
            [*program, *arguments],
            env=self.environment,
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


def wrong(done: Done, code: int, named: Sequence[str]) -> str:
    """What is wrong with the way a command failed; empty if one line said it all, and no password."""
    if PASSWORD in done.out + done.err:
        return f"tells the password: {done.err[-300:]}"
    if "Traceback" in done.err:
        return f"a traceback: {done.err.strip().splitlines()[-1]}"
    if done.code != code:
        return f"exit code {done.code}, not {code}: {done.out[:300]}{done.err}"
    if done.out or done.err.count("\n") != 1 or not done.err.startswith("meterfall: "):
        return f"not one line: {done.out[:300]!r} {done.err!r}"
    missing = [name for name in named if name not in done.err]
    return f"{done.err!r} does not say {missing}" if missing else ""


def assert_refused(done: Done, code: int, *named: str) -> None:
    """The command failed with `code` and one line that says all of `named`."""
    assert wrong(done, code, named) == ""


Case = tuple[list[str], dict[str, str], Sequence[str]]


def assert_all_refused(meterfall: Meterfall, cases: Sequence[Case], code: int = 2) -> None:
    """Every case (arguments, environment, what the line must say) fails with `code` and one line."""
    found = []
    for arguments, environment, named in cases:
        if said := wrong(meterfall(*arguments, **environment), code, named):
            found.append(f"{' '.join(arguments)[:80]} {environment or ''}: {said}")
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def checked(printed: dict[str, Any]) -> CheckAnswer:
    """The answer of a check as the command prints it, with a sentence about it; without that sentence."""
    answer = CheckAnswer.model_validate(printed)
    assert answer.explanation == explain_check(answer)
    return answer.model_copy(update={"explanation": None})


def lines_of(*events: dict[str, object]) -> str:
    return "".join(json.dumps({"user_id": USER, "meter": METER, "quantity": 1} | event) + "\n" for event in events)
