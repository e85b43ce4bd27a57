"""Scenario 7: two different events with one id. The first stands, the second is a dead letter."""

from __future__ import annotations

import pytest

from tests.faults.house import House

OTHERS: dict[str, dict[str, object]] = {
    "amount": {"quantity": 99},
    "meter": {"meter": "ocr_tokens"},
    "multiplier": {"multiplier": "2"},
}


@pytest.mark.scenario(number=7)
@pytest.mark.parametrize("batch", ["same", "later"])
@pytest.mark.parametrize("other", OTHERS)
def test_the_first_event_of_an_id_stands_and_another_is_a_dead_letter(house: House, other: str, batch: str) -> None:
    (first, *_) = house.emit(8)
    if batch == "later":
        house.drain()
    second = first.model_copy(update=OTHERS[other])
    house.billing.emit_events([second])
    house.accepted.dead[first.user_id, first.event_id, "id_conflict"] += 1
    house.resend()
    house.drain()
    house.prove()
