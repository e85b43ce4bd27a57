"""The books of a test, as operators look at them."""

from __future__ import annotations

from worker.admin import dead_letters
from worker.reports.proof import verify_ledger
from worker.reports.proof_run import prove_ledger
from worker.resources import Resources


def assert_proved(resources: Resources) -> None:
    """Every balance follows from its rows, and Redis says the same: from zero, and from the checkpoints."""
    assert verify_ledger(resources).differences == []
    assert prove_ledger(resources).differences == []


def open_dead_letters(resources: Resources) -> list[tuple[str, str]]:
    """Reason and detail of each open dead letter."""
    return [(letter.reason, letter.detail) for letter in dead_letters.listed(resources)]
