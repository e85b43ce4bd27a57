"""Scenario 20: an event that kills every worker that takes it in hand. It ends alone, as a dead letter."""

from __future__ import annotations

import re

import pytest

from tests.faults.house import House

# A dyno pauses before it restarts a worker that died at once, and the partition waits until the mark is old.
SECONDS_PER_DEATH = 15


@pytest.mark.scenario(number=20)
@pytest.mark.parametrize("deaths_alone", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_event_that_kills_its_worker_is_a_dead_letter_and_its_neighbours_are_billed(
    house: House, deaths_alone: int
) -> None:
    poison = house.emit(40)[17]
    patience = SECONDS_PER_DEATH * (1 + deaths_alone)
    named = house.settings_with(poison_deaths=deaths_alone)
    with house.dyno(settings=named, crash_at=f"poison:{poison.event_id}") as dyno:
        house.wait_until_drained(patience)
        assert deaths_in(house.log_of(dyno)) == 1 + deaths_alone, "once among others, and then alone"
        del house.accepted.events[poison.user_id, poison.event_id]
        house.accepted.dead[poison.user_id, poison.event_id, "poison"] += 1
        house.prove()
        house.emit(8)
        house.wait_until_drained()
    house.prove()


@pytest.mark.slow
@pytest.mark.scenario(number=20)
def test_a_request_of_the_pool_that_kills_its_worker_gives_nothing_and_the_others_do(house: House) -> None:
    deaths_alone = 1
    with house.sponsor() as sponsor:
        for number, user in enumerate(house.users):
            house.absorb(sponsor, user, f"r{number}", 7)
        named = house.settings_with(poison_deaths=deaths_alone)
        with house.dyno(settings=named, crash_at="poison:r5") as dyno:
            house.wait_until_drained(SECONDS_PER_DEATH * (1 + deaths_alone))
            assert deaths_in(house.log_of(dyno)) == 1 + deaths_alone
            del house.accepted.grants["r5"]
            house.accepted.dead["", "", "poison"] += 1
            house.prove()
            house.emit(8)
            house.wait_until_drained()
    house.prove()


def deaths_in(log: str) -> int:
    """Return the number of worker processes that followed a killed one in the log of their supervisor."""
    assert re.search(r"worker process \d+ ended with -9", log)
    return len(re.findall(r"worker process \d+ started", log)) - 1
