"""The guides in docs/ are run as they stand: every command, every line of Python, every answer that they show."""

from __future__ import annotations

import doctest
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from distributions.client import public
from tests.support.console import Shell, blocks_of
from tests.support.paths import ROOT

# Each has a test of its own. Runbook and monitoring are for systems in trouble: tests/faults/test_runbook.py and
# tests/project/test_operators_day.py bring them into it. The recipe for payment webhooks goes through months:
# tests/project/test_payment_webhooks.py lets them pass. The guide to tests is a suite of pytest:
# tests/testing/test_guide.py runs it. The guide to HTTP wants a service: tests/service/test_guide.py starts one. That
# to the console is for a browser: tests/service/test_console.py. The page of figures is no guide:
# tests/project/test_bench.py makes it again.
ELSEWHERE = {
    ROOT / "docs" / f"{name}.md"
    for name in ("runbook", "monitoring", "payment-webhooks", "testing", "benchmarks", "http", "console")
}
GUIDES = sorted(set((ROOT / "docs").glob("*.md")) - ELSEWHERE)


@pytest.fixture
def shell(database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell with the servers of this test, as the guides expect them: named by the environment."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    return Shell(tmp_path, os.environ)


def run_python(text: str, names: dict[str, Any]) -> list[str]:
    """Run a session; returns what came out otherwise than it says."""
    output: list[str] = []
    session = doctest.DocTestParser().get_doctest(text, names, "guide", None, None)
    session.globs = names
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(session, out=output.append, clear_globs=False)
    return output


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_does_what_it_says(guide: Path, shell: Shell) -> None:
    names: dict[str, Any] = {}
    ran = 0
    for language, text in blocks_of(guide.read_text(encoding="utf-8")):
        if language == "pycon":
            assert run_python(text, names) == []
            ran += 1
        elif language == "python":
            exec(text, names)
        elif language == "console":
            assert shell.run(text) == []
            ran += 1
    assert ran, "a guide without anything to run"


def test_the_sessions_of_the_readme_do_what_they_say(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "meterfall", public)  # as in the wheel
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sessions = [text for language, text in blocks_of(readme) if language == "pycon"]
    assert sessions
    names: dict[str, Any] = {}
    assert [run_python(text, names) for text in sessions] == [[]] * len(sessions)
    names["accounts"].close()


def test_a_guide_that_promises_something_else_is_found(shell: Shell) -> None:
    assert run_python(">>> 1 + 1\n3\n", {})
    assert shell.run("$ meterfall plans --json\n  no such line\n") == ["meterfall plans --json:   no such line"]
    assert shell.run("$ echo 1 \\\n  2; echo 3\n1 2\n…\n$ export A=4\n$ echo $A\n3…\n") == ["echo $A: 3…"]
    with pytest.raises(AssertionError, match="No such command"):
        shell.run("$ meterfall dance\n")
