"""Scenarios 28 and 29: payments arrive twice, out of order, or while a batch is under way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TypeVar

import pytest

from tests.faults.house import BUCKETS, METER, SLOW_SECONDS, House
from tests.support.ledger import rows
from tests.support.threads import at_once
from worker.admin import accounts, credits
from worker.errors import AccountError
from worker.resources import Resources

T = TypeVar("T")
Period = Callable[[int], tuple[str, datetime, datetime]]
DELIVERIES = 6
# Short, so that all of them begin within the hour: a later invoice would wait.
PERIOD = timedelta(minutes=10)
ALLOWANCE, CAP = 100_000, 1_000_000  # of the plan of the house


@pytest.fixture
def period(house: House) -> Period:
    """An invoice by its number: its id, and the bounds of its period. Number 1 follows the open period of the user."""
    start = datetime.now(UTC)
    with patient_tools(house) as resources:
        accounts.set_period(resources, house.users[0], start + PERIOD, "first")
    return lambda number: (f"invoice-{number}", start + number * PERIOD, start + (number + 1) * PERIOD)


@contextmanager
def patient_tools(house: House) -> Iterator[Resources]:
    """Open resources without a lock time-out."""
    settings = house.settings_with(
        database_pool_size=DELIVERIES, lock_timeout_ms=20_000, statement_timeout_ms=25_000,
        idle_in_transaction_timeout_ms=30_000,
    )  # fmt: skip
    with closing(Resources.open(settings)) as resources:
        yield resources


# ---------------------------------------------------------------------------------------------------------------------
# Renewals


@pytest.mark.scenario(number=28)
def test_an_invoice_delivered_by_many_at_once_beside_batches_renews_once(house: House, period: Period) -> None:
    user = house.users[0]
    with patient_tools(house) as resources, house.dyno():
        for number in (1, 2):
            house.emit(40)
            changes = at_once([partial(accounts.renew, resources, user, *period(number))] * DELIVERIES)
            assert sorted(change.repeated for change in changes) == [False] + [True] * (DELIVERIES - 1)
            assert not any(change.stale for change in changes)
            house.emit(40)
        house.wait_until_drained()
    assert renewals(house, user) == ["renew:invoice-1", "renew:invoice-2"]
    assert balance_of(house, user) == replayed(house, user)
    house.prove()


@pytest.mark.scenario(number=28)
def test_an_invoice_that_comes_after_a_later_one_changes_nothing(house: House, period: Period) -> None:
    user = house.users[0]
    with patient_tools(house) as resources, house.dyno():
        house.emit(40)
        assert not accounts.renew(resources, user, *period(2)).stale
        house.emit(40)
        house.wait_until_drained()
        before = balance_of(house, user)
        assert accounts.renew(resources, user, *period(1)).stale
        assert accounts.renew(resources, user, *period(2)).repeated
        assert accounts.renew(resources, user, *period(1)).stale
        assert balance_of(house, user) == before
        house.emit(40)
        assert not accounts.renew(resources, user, *period(3)).stale
        house.emit(40)
        house.wait_until_drained()
    assert renewals(house, user) == ["renew:invoice-2", "renew:invoice-3"]
    assert balance_of(house, user) == replayed(house, user)
    house.prove()


@pytest.mark.slow
@pytest.mark.scenario(number=28)
def test_an_invoice_whose_delivery_was_killed_renews_once_when_it_comes_again(house: House, period: Period) -> None:
    user = house.users[0]
    invoice, start, end = period(1)
    renew = ("worker", "account", "renew", user, invoice, start.isoformat(), end.isoformat())
    house.emit(40)
    with house.run(*renew, crash_at="after_refresh") as killed:
        assert killed.wait(SLOW_SECONDS) == -signal.SIGKILL
    assert renewals(house, user) == []
    with house.dyno(), house.run(*renew) as one, house.run(*renew) as other:
        assert [one.wait(SLOW_SECONDS), other.wait(SLOW_SECONDS)] == [0, 0]
        house.emit(40)
        house.wait_until_drained()
    assert renewals(house, user) == [f"renew:{invoice}"]
    assert balance_of(house, user) == replayed(house, user)
    house.prove()


def renewals(house: House, user: str) -> list[object]:
    """Return the invoices that renewed the meter, in order."""
    query = "SELECT entry_key FROM ledger_entry WHERE kind = 'renewal' AND (user_id, meter) = (%s, %s) ORDER BY seq"
    return [row[0] for row in rows(house.settings, query, user, METER)]


def balance_of(house: House, user: str) -> tuple[object, ...]:
    """Return the buckets: used, rollover or debt, purchased."""
    query = "SELECT used, rollover, purchased FROM balance WHERE (user_id, meter) = (%s, %s)"
    (found,) = rows(house.settings, query, user, METER)
    return found


def replayed(house: House, user: str) -> tuple[int, int, int]:
    """Return the same by the rules: work it out from amounts and renewals in their order, and no other source."""
    used, rollover, purchased = BUCKETS[METER]
    query = (
        "SELECT seq, amount FROM usage_log WHERE (user_id, meter) = (%s, %s) UNION ALL "
        "SELECT seq, NULL FROM ledger_entry WHERE (user_id, meter) = (%s, %s) AND kind = 'renewal' ORDER BY seq"
    )
    for _, amount in rows(house.settings, query, user, METER, user, METER):
        if amount is None:
            rollover = max(rollover, min(rollover + max(0, ALLOWANCE - used), CAP))
            used = 0
            continue
        left = int(str(amount))
        part = min(left, max(0, ALLOWANCE - used))
        used, left = used + part, left - part
        part = min(left, max(0, rollover))
        rollover, left = rollover - part, left - part
        part = min(left, purchased)
        purchased, left = purchased - part, left - part
        rollover -= left
    return used, rollover, purchased


# ---------------------------------------------------------------------------------------------------------------------
# Top-ups


@pytest.mark.scenario(number=29)
def test_a_top_up_delivered_by_many_at_once_beside_batches_counts_once(house: House) -> None:
    user = house.users[0]
    with patient_tools(house) as resources, house.dyno():
        house.emit(40)
        changes = at_once([lambda: credits.grant(resources, user, METER, 500, "order-1")] * DELIVERIES)
        assert sorted(change.repeated for change in changes) == [False] + [True] * (DELIVERIES - 1)
        house.emit(40)
        house.wait_until_drained()
        with pytest.raises(AccountError, match="order-1 was used for 500"):
            credits.grant(resources, user, METER, 501, "order-1")
    granted = rows(house.settings, "SELECT sum(purchased_change)::bigint FROM ledger_entry WHERE kind = 'grant'")
    assert granted == [(500,)]
    house.prove()


@pytest.mark.scenario(number=29)
def test_a_payment_credited_to_the_pool_by_many_at_once_counts_once(house: House) -> None:
    with house.dyno():
        at_once([lambda: house.billing.credit_pool("request-1", 500)] * DELIVERIES)
        house.wait_until_drained()
        house.billing.credit_pool("request-1", 500)
        house.wait_until_drained()
    initial = house.resources.catalogue.sponsorship.initial
    assert rows(house.settings, "SELECT balance FROM sponsor_pool") == [(initial + 50,)]
    house.prove()


@pytest.mark.scenario(number=29)
def test_what_a_debtor_buys_is_spent_on_what_comes_and_the_debt_stays(house: House) -> None:
    user = house.users[0]
    house.users = [user]
    with patient_tools(house) as resources, house.dyno():
        house.emit(21)  # 84 units: 10 of the plan, 20 saved, 30 bought, 24 owed
        house.wait_until_drained()
        assert balance_of(house, user) == (ALLOWANCE, -24, 0)
        credits.grant(resources, user, METER, 100, "order-1")
        assert balance_of(house, user) == (ALLOWANCE, -24, 100)
        house.emit(14)  # 56 units
        house.wait_until_drained()
        assert balance_of(house, user) == (ALLOWANCE, -24, 44)
        assert house.billing.check(user, METER).available == 44 - 24, "a check counts the debt"
        house.emit(14)
        house.wait_until_drained()
        assert balance_of(house, user) == (ALLOWANCE, -36, 0)
        credits.grant(resources, user, METER, 100, "order-1")
        assert balance_of(house, user) == (ALLOWANCE, -36, 0)
    house.prove()
