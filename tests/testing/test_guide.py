"""docs/testing.md as a host project follows it: its files, in a folder of their own, run by pytest."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributions.client import build
from tests.support.host import files_of_the_guide, run_suite

pytestmark = pytest.mark.once


def test_a_host_project_follows_the_guide(tmp_path: Path) -> None:
    build.lay_out(tmp_path)
    files = files_of_the_guide()
    assert sorted(files) == ["conftest.py", "test_asyncio.py", "test_servers.py", "test_speech.py"]
    assert "6 passed" in (said := run_suite(tmp_path, files)), said


def test_a_suite_that_expects_something_else_fails(tmp_path: Path) -> None:
    build.lay_out(tmp_path)
    wrong = 'def test_a_stranger(meterfall_billing):\n    assert meterfall_billing.check("u", "credits").allowed\n'
    files = {"conftest.py": files_of_the_guide()["conftest.py"], "test_wrong.py": wrong}
    assert "1 failed" in (said := run_suite(tmp_path, files)), said
