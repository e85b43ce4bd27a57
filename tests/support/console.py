"""Documents as their readers use them: the fenced blocks of a file, and a shell in which their commands are run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

TIMEOUT_SECONDS = 60

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^## (.*)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: its language and its text."""

    language: str
    text: str


def blocks_of(text: str) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    for block in _BLOCK.finditer(text):
        yield Block(block[1], block[2])


def sections_of(text: str) -> dict[str, str]:
    """The text below each heading of the second order, by heading."""
    _, *parts = _HEADING.split(text)
    return dict(zip(parts[0::2], parts[1::2], strict=True))


class Shell:
    """A shell with `meterfall` on its path, in a folder of its own; what one block exports, the next ones have."""

    def __init__(self, folder: Path, environ: Mapping[str, str], release: Path = ROOT) -> None:
        self._folder = folder
        self._exported = folder / "exported.sh"
        self._exported.touch()
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        self._command = programs / "meterfall"
        self._logins: dict[str, Mapping[str, str]] = {}
        self.printed: list[str] = []
        self._environ = {**environ, "PATH": f"{programs}:{environ['PATH']}", "COLUMNS": "200"}
        self.use(release)

    def use(self, release: Path) -> None:
        """Have `meterfall` be that of a release: a folder that holds the code."""
        self._command.write_text(f'#!/bin/sh\nPYTHONPATH="{release}" exec "{sys.executable}" -m worker "$@"\n')
        self._command.chmod(0o700)

    def export(self, variables: Mapping[str, object]) -> None:
        """Have what is run from now on know these variables."""
        with self._exported.open("a", encoding="utf-8") as exported:
            exported.writelines(f"export {name}={shlex.quote(str(value))}\n" for name, value in variables.items())

    def login(self, name: str, variables: Mapping[str, str]) -> None:
        """Have the commands behind the prompt `name$` know these variables, whatever was exported."""
        self._logins[name] = variables

    def run(self, block: str) -> list[str]:
        """Run the commands of a block, each of which must succeed; returns the lines that the block shows and that were
        not printed, in order. `…` stands for any number of lines, and within a line for anything.

        All that was printed is in `printed`. A prompt may begin with a name that `login` has told.
        """
        missing: list[str] = []
        self.printed = []
        _, *parts = re.split(r"^([a-z]*)\$ ", block, flags=re.MULTILINE)
        for name, shown in zip(parts[0::2], parts[1::2], strict=True):
            command, *expected = _command_and_lines(shown.rstrip("\n"))
            lines = self._printed_by(command, self._logins[name] if name else {})
            self.printed += lines
            printed = iter(lines)
            for line in expected:
                wanted = re.compile(".*".join(map(re.escape, " ".join(line.split()).split("…"))))
                if line.strip() != "…" and not any(wanted.fullmatch(each) for each in printed):
                    missing.append(f"{command}: {line}")
        return missing

    def _printed_by(self, command: str, login: Mapping[str, str]) -> list[str]:
        variables = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in login.items())
        script = f". {self._exported}\n{variables}{command}\nexport -p > {self._exported}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=self._environ, cwd=self._folder, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False, timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
        # Their exit code is the verdict, and a procedure begins in trouble.
        allowed = (0, 1) if command.startswith(("meterfall status", "meterfall health")) else (0,)
        assert done.returncode in allowed, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return [" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines()]


def _command_and_lines(shown: str) -> list[str]:
    """A command, which may go on behind a backslash, and the lines that are shown below it."""
    lines = shown.split("\n")
    last = next(number for number, line in enumerate(lines) if not line.endswith("\\"))
    return ["\n".join(lines[: last + 1]), *lines[last + 1 :]]
