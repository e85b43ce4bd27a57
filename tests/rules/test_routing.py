"""Routing: the golden cases, and what must hold for any request."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from tests.support.vectors import golden_cases
from worker.rules.routing import GEMINI, HARDWARE, PREFERENCES, Decision, plan_backend

CASES = golden_cases("routing")
ROOMS = (None, 0, 1, 5)
EVERY = list(product(ROOMS, ROOMS, (True, False), PREFERENCES))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case["given"].values()))
def test_golden_case(case: dict[str, Any]) -> None:
    assert plan_backend(**case["given"])._asdict() == case["decision"]


def test_there_are_golden_cases_for_every_preference() -> None:
    assert {case["given"]["preference"] for case in CASES} == set(PREFERENCES)


@pytest.mark.parametrize(
    ("preference", "both", "gemini", "hardware", "neither"),
    [
        ("gemini_first", GEMINI, GEMINI, HARDWARE, "gemini_cap_exceeded_no_hardware"),
        ("hardware_first", HARDWARE, GEMINI, HARDWARE, "no_backend_available"),
        ("gemini_only", GEMINI, GEMINI, "gemini_cap_exceeded_no_fallback", "gemini_cap_exceeded_no_fallback"),
        ("hardware_only", HARDWARE, "hardware_only_not_configured", HARDWARE, "hardware_only_not_configured"),
    ],
)
@pytest.mark.parametrize("remaining", [None, 1])
def test_the_whole_table(
    remaining: int | None, preference: str, both: str, gemini: str, hardware: str, neither: str
) -> None:
    for left, has_hardware, outcome in ((None, True, both), (3, True, both), (1, False, gemini), (0, True, hardware)):
        decision = plan_backend(remaining, left, has_hardware, preference)
        assert (decision.backend or decision.reason) == outcome
    assert plan_backend(remaining, 0, False, preference) == Decision(False, None, neither)


@pytest.mark.parametrize(("remaining", "sub_remaining", "has_hardware", "preference"), EVERY)
def test_for_any_request(remaining: int | None, sub_remaining: int | None, has_hardware: bool, preference: str) -> None:
    allowed, backend, reason = plan_backend(remaining, sub_remaining, has_hardware, preference)
    assert allowed is (backend is not None) is (reason is None)
    assert backend in (None, GEMINI, HARDWARE)
    assert not (backend == GEMINI and sub_remaining == 0)
    assert not (backend == HARDWARE and not has_hardware)
    assert not (backend == HARDWARE and preference == "gemini_only")
    assert not (backend == GEMINI and preference == "hardware_only")
    if remaining == 0:
        assert reason == "out_of_credits"


def test_an_unknown_preference_is_answered_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"^preference: must be one of gemini_first, .*, hardware_only \(got 'cheap'\)$"
    ):
        plan_backend(1, 1, True, "cheap")
