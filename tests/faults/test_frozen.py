"""Scenario 6: a worker is frozen inside its batch, another takes over, the first goes on."""

from __future__ import annotations

import pytest

from tests.faults.house import RECOVERY_SECONDS, SLOW_SECONDS, House, thaw

# Where it freezes; and whether it holds its locks then, and so stalls the partition until Postgres ends its session.
POINTS = {"rows_written": True, "after_commit": False}


@pytest.mark.scenario(number=6)
@pytest.mark.parametrize("label", POINTS)
def test_a_frozen_worker_does_no_harm_when_it_goes_on(house: House, label: str) -> None:
    house.emit(40)
    stall_seconds = house.settings.idle_in_transaction_timeout_ms / 1_000 if POINTS[label] else 0
    with house.frozen_at(label) as first:
        assert bool(house.recorded()) != POINTS[label]
        with house.dyno():
            house.wait_until_drained(stall_seconds + RECOVERY_SECONDS)
            recorded = house.recorded()
            thaw(first)
            first.terminate()  # which lets the batch in hand finish
            assert first.wait(SLOW_SECONDS) == 0
            assert house.recorded() == recorded == 40
            house.resend()
            house.wait_until_drained()
    house.prove()
