"""The matrix must be able to fail: with the duplicate check switched off, every test of scenarios 1 to 10 does.

Each of them sends or reads something twice, and it is the oracle that has to see it: not a time-out on the way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.support.oracle import HEADING
from worker import crash

SCENARIOS = range(1, 11)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_the_duplicate_check_every_scenario_fails(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    chosen = " or ".join(f"scenario(number={number})" for number in SCENARIOS)
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", f"({chosen}) and not slow", f"--junit-xml={results}", "--tb=short"],
        env={**os.environ, crash.SWITCH: crash.DUPLICATE_CHECK},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    seen: set[int] = set()
    missed: list[str] = []
    for case in ET.parse(results).iter("testcase"):
        failure = case.find("failure")
        if failure is None or HEADING not in failure.get("message", ""):
            missed.append(case.get("name", ""))
        seen.update(int(each.get("value", "")) for each in case.iter("property") if each.get("name") == "scenario")
    assert missed == [], done.stdout
    assert seen == set(SCENARIOS)
