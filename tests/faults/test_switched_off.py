"""The matrix must be able to fail: with the duplicate check switched off, every test of scenarios 1 to 10 does.

Each of them sends or reads something twice, and it is the oracle that has to see it: not a time-out on the way. What
is switched off, and how it reaches every process, is in tests/faults/mutated.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.faults.house import House
from tests.faults.mutated import COMMAND, MODULE
from tests.support.oracle import HEADING

SCENARIOS = range(1, 11)


def send_an_event(house: House) -> None:
    """Send an event that was sent before; it is another entry."""
    house.resend(1)


def pay_into_the_pool(house: House) -> None:
    """Say again that a request was paid for."""
    house.billing.credit_pool("paid", 500)


@pytest.mark.parametrize("again", [send_an_event, pay_into_the_pool])
def test_the_oracle_sees_a_dyno_without_the_duplicate_check(house: House, again: Callable[[House], None]) -> None:
    house.emit(1)
    with house.run(MODULE, "worker", "worker", "run"):
        for _ in range(2):
            again(house)
            house.wait_until_drained()
    with pytest.raises(AssertionError, match=HEADING):
        house.prove()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_the_duplicate_check_every_scenario_fails(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    chosen = " or ".join(f"scenario(number={number})" for number in SCENARIOS)
    command = [*COMMAND, "pytest", str(Path(__file__).parent), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", f"({chosen}) and not slow", f"--junit-xml={results}", "--tb=short"],
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
