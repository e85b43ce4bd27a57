"""The commands about periods: renewals, corrections, and changes at a date. The ledger's clock is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from config.settings import Settings
from tests.support.commands import METER, USER, Meterfall, assert_refused
from tests.support.ledger import move_clock, rows
from tests.support.streams import drain

NOW = "2026-12-01T00:00:00Z"
OPENED = ["account", "open", USER, "basic", "--period-start", NOW, "--period-end", "2026-12-31T00:00:00Z"]
JANUARY = ["2026-12-31T00:00:00Z", "2027-01-31T00:00:00Z"]

Change = Callable[..., Any]


@pytest.fixture
def change(settings: Settings, meterfall: Meterfall) -> Iterator[Change]:
    """A function that runs an account command on an account of December, beside a worker. The proof holds after it."""

    def run(*arguments: str, code: int = 0) -> Any:
        done = meterfall("account", arguments[0], USER, *arguments[1:], "--json")
        assert done.code == code, done
        drain(settings, USER)
        return done.json

    later(settings, NOW)
    meterfall.done(*OPENED)
    drain(settings, USER)
    yield run
    meterfall.done("verify")


def later(settings: Settings, moment: str) -> None:
    """Let the ledger's clock go on from `moment`."""
    move_clock(settings, datetime.fromisoformat(moment) - datetime.now(UTC))


def count(settings: Settings) -> list[tuple[object, ...]]:
    return rows(settings, "SELECT count(*) FROM ledger_entry")


def test_an_invoice_of_another_period_is_refused_with_1(
    settings: Settings, meterfall: Meterfall, change: Change
) -> None:
    change("renew", "in_1", NOW, "2026-12-31T00:00:00Z")
    waits = change("renew", "in_2", *JANUARY)
    assert (waits["waits_until"], waits["waiting"][0]["name"]) == ("2026-12-31T00:00:00+00:00", "in_2")
    before = count(settings)
    for invoice in ("in_1", "in_2"):
        other = ["account", "renew", USER, invoice, "2026-12-30T00:00:00Z", "2027-01-30T00:00:00Z"]
        for arguments in (other, [*other, "--json"]):
            assert_refused(meterfall(*arguments), 1, "invoice_id", invoice, "another period", "2026-12")
    assert change("renew", "in_2", *JANUARY)["repeated"]
    assert count(settings) == before
    shown = meterfall.done("account", "show", USER)
    assert "invoice in_2 from 2026-12-31" in shown
    assert "it takes effect at 2027-12-31" in meterfall.done(
        "account", "renew", USER, "in_9", "2027-12-31T00:00:00Z", "2028-12-31T00:00:00Z"
    )


def test_a_change_that_waits_for_older_events_says_so(settings: Settings, meterfall: Meterfall, change: Change) -> None:
    waits = "it waits for older events, and takes effect when a worker applies them"
    calls = (
        ["set-status", USER, "past_due"],
        ["renew", USER, "in_1", NOW, "2026-12-31T00:00:00Z"],
        ["set-period", USER, "2026-12-20T00:00:00Z", "--key", "k4"],
    )
    assert waits not in meterfall.done("account", "set-trust", USER, "trusted")  # its refresh is the older entry
    for call in calls:
        assert meterfall.done("account", *call).startswith(f"{waits}; the account after it:\n{USER}: plan basic, ")
        assert waits in meterfall.done("account", *call)  # a repeat
    assert meterfall.done("account", *calls[2], "--json")["waits_for_events"]
    drain(settings, USER)
    shown = change("show")
    assert (shown["status"], shown["waiting"]) == ("past_due", [])
    assert shown["balances"][METER]["period_end"] == "2026-12-20T00:00:00+00:00"
    assert waits not in meterfall.done("account", *calls[2])


def test_a_stale_invoice_exits_with_1_and_changes_nothing(
    settings: Settings, meterfall: Meterfall, change: Change
) -> None:
    change("renew", "in_1", NOW, "2026-12-31T00:00:00Z")
    before = count(settings)
    old = ["renew", "in_0", "2026-11-01T00:00:00Z", NOW]
    answer = change(*old, code=1)
    assert (answer["stale"], answer["balances"][METER]["period_start"]) == (True, "2026-12-01T00:00:00+00:00")
    in_words = meterfall("account", old[0], USER, *old[1:])
    assert in_words.code == 1
    assert in_words.out.startswith("stale: a later period is open already; nothing changed\n")
    assert count(settings) == before


def test_a_cancellation_at_a_date_takes_effect_then_unless_it_is_withdrawn(settings: Settings, change: Change) -> None:
    christmas = ["--at", "2026-12-24T00:00:00Z"]
    answer = change("set-status", "canceled", *christmas)
    assert (answer["status"], answer["next_status"]) == ("active", "canceled")
    assert answer["status_change_at"] == "2026-12-24T00:00:00+00:00"
    assert change("set-status", "canceled", *christmas)["repeated"]
    assert change("set-status", "active")["next_status"] is None
    change("set-status", "canceled", *christmas)
    later(settings, "2026-12-23T23:59:00Z")
    assert change("show")["status"] == "active"
    later(settings, "2026-12-24T00:00:00Z")
    assert change("show")["status"] == "canceled"


def test_a_plan_at_a_date_takes_effect_then_unless_it_is_withdrawn(settings: Settings, change: Change) -> None:
    christmas = ["--at", "2026-12-24T00:00:00Z"]
    answer = change("change-plan", "plus", *christmas)
    assert (answer["plan"], answer["next_plan"]) == ("basic", "plus")
    assert answer["plan_change_at"] == "2026-12-24T00:00:00+00:00"
    assert change("change-plan", "plus", *christmas)["repeated"]
    assert change("change-plan", "basic")["next_plan"] is None
    change("change-plan", "plus", *christmas)
    later(settings, "2026-12-23T23:59:00Z")
    assert change("show")["balances"][METER]["allowance"] == 100_000
    later(settings, "2026-12-24T00:00:00Z")
    shown = change("show")
    assert (shown["plan"], shown["balances"][METER]["allowance"]) == ("plus", 300_000)
    assert shown["balances"][METER]["period_end"] == "2026-12-31T00:00:00+00:00"


def test_a_date_that_is_over_or_has_no_offset_is_refused(meterfall: Meterfall, change: Change) -> None:
    for command in (["set-status", USER, "canceled"], ["change-plan", USER, "plus"]):
        for moment in (NOW, "2026-11-30T00:00:00Z"):
            assert_refused(meterfall("account", *command, "--at", moment), 2, "at", "must be after now")
        for moment in ("2026-12-24T00:00:00", "christmas"):
            assert_refused(meterfall("account", *command, "--at", moment), 2, "at")


def test_an_end_is_corrected_once_by_its_key(settings: Settings, meterfall: Meterfall, change: Change) -> None:
    fixed = ["set-period", "2027-01-05T00:00:00Z", "--key", "fix-1"]
    assert change(*fixed)["balances"][METER]["period_end"] == "2027-01-05T00:00:00+00:00"
    before = count(settings)
    assert change(*fixed)["repeated"]
    assert_refused(
        meterfall("account", "set-period", USER, "2027-01-06T00:00:00Z", "--key", "fix-1"), 1, "key", "fix-1", "2027-01"
    )
    assert_refused(meterfall("account", "set-period", USER, NOW, "--key", "fix-2"), 2, "period_end", "must be after")
    assert count(settings) == before
    later(settings, "2027-01-05T00:00:00Z")
    assert datetime.fromisoformat(change("show")["balances"][METER]["period_end"]) == datetime.fromisoformat(
        "2027-01-05T00:00:00Z"
    ) + timedelta(days=1)
