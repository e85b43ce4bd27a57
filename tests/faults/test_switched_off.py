"""The matrix must be able to fail: without the duplicate check, every test of scenarios 1 to 10 fails.

Each of them sends or reads an event twice, and the oracle must see it, not a time-out on the way.
tests/faults/mutated.py replaces the check in every process.
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
    """Send an event again, as another stream entry."""
    house.resend(1)


def pay_into_the_pool(house: House) -> None:
    """Credit the pool again for a request."""
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
