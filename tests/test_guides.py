"""The guides in docs/ are run as they stand: every command, every line of Python, every answer that they show."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(autouse=True)
def environment(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers of this test, as the guides expect them: named by the environment."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)


def blocks_of(guide: Path) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a guide, in order: language and text."""
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        yield block[1], block[2]


def run_python(text: str, names: dict[str, Any]) -> list[str]:
    """Run a session; returns what came out otherwise than it says."""
    said: list[str] = []
    session = doctest.DocTestParser().get_doctest(text, names, "guide", None, None)
    session.globs = names
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(session, out=said.append, clear_globs=False)
    return said


def run_console(text: str) -> list[str]:
    """Run the commands of a block; returns the lines that the guide shows and that were not printed, in order."""
    missing: list[str] = []
    for shown in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *expected = shown.rstrip("\n").split("\n")
        words = shlex.split(command.split(" > ")[0])
        assert words[0] == "meterfall", command
        done = subprocess.run(
            [sys.executable, "-m", "worker", *words[1:]],
            env={**os.environ, "COLUMNS": "200"}, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
        printed = iter(" ".join(line.split()) for line in done.stdout.splitlines())
        wanted = [" ".join(line.split()) for line in expected if line != "…"]
        missing += [f"{command}: {line}" for line in wanted if line not in printed]
    return missing


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_does_what_it_says(guide: Path) -> None:
    names: dict[str, Any] = {}
    ran = 0
    for language, text in blocks_of(guide):
        if language == "pycon":
            assert run_python(text, names) == []
            ran += 1
        elif language == "console":
            assert run_console(text) == []
            ran += 1
    assert ran, "a guide without anything to run"


def test_a_guide_that_promises_something_else_is_found(database_url: str) -> None:
    assert run_python(">>> 1 + 1\n3\n", {})
    assert run_console("$ meterfall plans --json\n  no such line\n") == ["meterfall plans --json: no such line"]
