"""A command on a terminal of its own, whose questions a test answers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
from collections.abc import Mapping
from time import monotonic
from typing import NamedTuple

from tests.support.commands import MODULE
from tests.support.paths import ROOT

TIMEOUT_SECONDS = 60
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Shown(NamedTuple):
    """How a command on a terminal ended: its code, all that the terminal showed, and stdout if that was a pipe."""

    code: int
    screen: str
    piped: str


def on_terminal(
    arguments: list[str],
    environment: Mapping[str, str],
    *,
    answers: Mapping[str, str] | None = None,
    columns: int = 80,
    lines: int = 24,
    stdout_piped: bool = False,
) -> Shown:
    """Run a command with a pseudo-terminal as stdin, stderr and, unless `stdout_piped`, stdout.

    Each of `answers` is typed once its question is on the screen. Raises AssertionError if the command does not end.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    unset = {"COLUMNS", "LINES"}
    known = {"TERM": "xterm", **{name: value for name, value in environment.items() if name not in unset}}
    process = subprocess.Popen(
        [*MODULE, *arguments], cwd=ROOT, env=known, stdin=theirs, stderr=theirs,
        stdout=subprocess.PIPE if stdout_piped else theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    left, screen, piped = dict(answers or {}), "", b""
    sources = [ours] + ([process.stdout.fileno()] if process.stdout else [])
    deadline = monotonic() + TIMEOUT_SECONDS
    try:
        while sources:
            assert monotonic() < deadline, f"{arguments} does not end: {screen}"
            for source in select.select(sources, [], [], 0.2)[0]:
                data = b""
                with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
                    data = os.read(source, 65_536)
                if not data:
                    sources.remove(source)
                elif source == ours:
                    screen += data.decode("utf-8", "replace")
                else:
                    piped += data
            for question in [each for each in left if each in screen]:
                os.write(ours, left.pop(question).encode())
        code = process.wait(TIMEOUT_SECONDS)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        if process.stdout:
            process.stdout.close()
    return Shown(code, _CONTROL.sub("", screen), piped.decode())
