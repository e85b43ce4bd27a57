"""A host project and its tests, which use `meterfall.testing` as docs/testing.md says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.console import blocks_of
from tests.support.paths import ROOT


def files_of_the_guide() -> dict[str, str]:
    """The Python files in docs/testing.md, by the names in their first lines."""
    guide = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    return {text.split()[1]: text for language, text in blocks_of(guide) if language == "python"}


def run_suite(folder: Path, files: Mapping[str, str], python: str = sys.executable) -> str:
    """Write files into a folder and run their tests there, with an environment that names no server.

    Returns the output of pytest, which ends with its summary.
    """
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    unwanted = ("METERFALL_", "PYTHON", "PYTEST", "DATABASE_URL", "REDIS_URL")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", ".", *files]
    return subprocess.run(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    ).stdout
