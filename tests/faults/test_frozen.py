"""Scenario 6: a process is frozen inside its transaction, another takes over, the first goes on."""

from __future__ import annotations

import pytest

from tests.faults.house import METER, RECOVERY_SECONDS, SLOW_SECONDS, House, is_frozen, thaw
from tests.support.ledger import rows
from tests.support.waiting import wait_until
from worker.crash import FREEZE


@pytest.mark.scenario(number=6)
@pytest.mark.parametrize(
    "label", ["inside_transaction", pytest.param("rows_written", marks=pytest.mark.slow), "after_commit"]
)
def test_a_frozen_worker_does_no_harm_when_it_goes_on(house: House, label: str) -> None:
    house.emit(40)
    # Its locks stall the partition until Postgres ends its session.
    locked = label != "after_commit"
    stall_seconds = house.settings.idle_in_transaction_timeout_ms / 1_000 if locked else 0
    with house.frozen_at(label) as first:
        assert bool(house.recorded()) != locked
        with house.dyno():
            house.wait_until_drained(stall_seconds + RECOVERY_SECONDS)
            recorded = house.recorded()
            thaw(first)
            first.terminate()  # so it finishes its batch in hand
            assert first.wait(SLOW_SECONDS) == 0
            assert house.recorded() == recorded == 40
            house.resend()
            house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=6)
@pytest.mark.parametrize(
    "label", ["inside_transaction", pytest.param("after_read", marks=pytest.mark.slow), "after_commit"]
)
def test_a_worker_frozen_in_a_round_does_no_harm_when_it_goes_on(house: House, label: str) -> None:
    house.emit(8)
    with house.frozen_at(label) as first:
        assert house.recorded() == (8 if label == "after_commit" else 0), "both partitions, or none"
        with house.dyno():
            house.emit(8)
            house.wait_until_drained(house.settings.idle_in_transaction_timeout_ms / 1_000 + RECOVERY_SECONDS)
            thaw(first)
            first.terminate()
            assert first.wait(SLOW_SECONDS) == 0
            assert house.recorded() == 16
            house.resend()
            house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=6)
def test_a_frozen_change_of_an_account_gives_its_locks_back(house: House) -> None:
    user = house.users[0]
    grant = ("worker", "account", "grant", user, METER, "500", "--key", "order-1")
    with house.run(*grant, crash_at=FREEZE + "after_refresh") as first:
        wait_until(lambda: is_frozen(first.pid), "it is frozen with its locks", SLOW_SECONDS)
        house.emit(40)
        with house.dyno():
            house.wait_until_drained(house.settings.idle_in_transaction_timeout_ms / 1_000 + RECOVERY_SECONDS)
            thaw(first)
            assert first.wait(SLOW_SECONDS) != 0
            with house.run(*grant) as again:
                assert again.wait(SLOW_SECONDS) == 0
            house.resend()
            house.wait_until_drained()
    assert rows(house.settings, "SELECT user_id FROM ledger_entry WHERE entry_key = 'grant:order-1'") == [(user,)]
    house.prove()
