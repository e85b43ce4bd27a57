"""What a batch takes from an account is what the waterfall says, event by event."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.catalogue import load_catalogue
from config.settings import load_settings
from tests.support.paths import ROOT
from worker.rules.account import Account
from worker.rules.batch import Outcome, work_out
from worker.rules.credits import with_grants
from worker.rules.grants import Grant, Grants
from worker.rules.lifecycle import open_account
from worker.rules.received import Event
from worker.rules.rows import AppliedEvent, Loaded
from worker.rules.waterfall import Buckets, Split, pay

NOW = datetime(2026, 11, 1, tzinfo=UTC)
CATALOGUE = load_catalogue(load_settings({}).catalogue_path)
METER, OTHER = "credits", "relay_credits"
CASES = json.loads((ROOT / "tests" / "vectors" / "waterfall.json").read_text(encoding="utf-8"))
amounts = st.integers(0, 10**12) | st.integers(0, 20)
units = st.integers(0, 10**14) | st.integers(0, 20)
any_buckets = st.builds(
    Buckets,
    limit=st.none() | st.integers(0, 10**12) | st.integers(0, 20),
    used=units,
    rollover=st.integers(-(10**14), 10**14) | st.integers(-20, 20),
    purchased=units,
    spill=st.booleans(),
)


def account_with(buckets: Buckets) -> Account:
    """An account with the same buckets on two meters, whose periods never end."""
    opened = open_account(CATALOGUE, "user-1", "tenant", "active", NOW)
    balance = next(iter(opened.balances.values()))._replace(
        allowance=buckets.limit, used=buckets.used, rollover=buckets.rollover, purchased=buckets.purchased,
        spill=buckets.spill, cadence="off", anchor="sticky", period_end=None, backing=None, caps=None,
    )  # fmt: skip
    return opened._replace(balances={meter: balance._replace(meter=meter) for meter in (METER, OTHER)})


def event(number: int, meter: str, amount: int) -> Event:
    return Event(
        entry_id=f"{int(NOW.timestamp()) * 1_000}-{number}", marked=True, user_id="user-1", event_id=f"e{number}",
        meter=meter, quantity=amount, multiplier="1", amount=amount, occurred_at=NOW.isoformat(), clamped=False,
        source=None, reference_id=None, hold_key=None, dimensions=None, payload=b"",
    )  # fmt: skip


def applied_to(account: Account, events: list[Event]) -> tuple[Outcome, list[AppliedEvent]]:
    outcome = work_out(events, Loaded(NOW, 1, {account.user_id: account}, {}), CATALOGUE, None)
    return outcome, [applied for run in outcome.writes.usage for applied in run.applied()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['before']}-{case['amount']}-spill={case['spill']}")
def test_golden_case(case: dict[str, Any]) -> None:
    account = account_with(Buckets(**case["before"], spill=case["spill"]))
    outcome, (applied,) = applied_to(account, [event(1, METER, case["amount"])])
    assert applied.split._asdict() == case["parts"]
    (disposal,) = outcome.disposals
    assert disposal.account is not None
    after = disposal.account.balances[METER].buckets("active")
    assert {name: getattr(after, name) for name in case["after"]} == case["after"]


@given(any_buckets, st.lists(st.tuples(st.sampled_from((METER, OTHER)), amounts), min_size=1, max_size=8))
def test_each_event_is_paid_as_the_waterfall_says(before: Buckets, used: list[tuple[str, int]]) -> None:
    left, splits = {METER: before, OTHER: before}, list[Split]()
    for meter, amount in used:
        left[meter], split = pay(left[meter], amount)
        splits.append(split)
    events = [event(number, meter, amount) for number, (meter, amount) in enumerate(used)]
    account = account_with(before)
    outcome, applied = applied_to(account, events)
    assert [each.split for each in applied] == splits
    assert [each.event for each in applied] == events
    assert [each.seq for each in applied] == list(range(account.version + 1, account.version + 1 + len(events)))
    (disposal,) = outcome.disposals
    assert disposal.account is not None
    assert {meter: disposal.account.balances[meter].buckets("active") for meter in left} == left
    consumed = {moved.meter: moved.consumed for moved in outcome.writes.moved}
    assert consumed == {meter: sum(amount for name, amount in used if name == meter) for meter in consumed}
    assert consumed.keys() == {meter for meter, _ in used}


def test_after_a_change_each_event_is_not_asked_again_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """To find the next change looks at all grants: a thousand of them, times the events of a batch."""
    asked, boundaries = list[Grants](), Grants.boundaries

    def counted(grants: Grants) -> list[datetime]:
        asked.append(grants)
        return boundaries(grants)

    monkeypatch.setattr(Grants, "boundaries", counted)
    account = account_with(Buckets(limit=0, used=0, rollover=0, purchased=0, spill=True))
    made = [
        Grant(str(day), 500, 500, "paid", 50, NOW - timedelta(days=9), NOW + timedelta(days=day), NOW)
        for day in (-1, 3)
    ]
    balances = {**account.balances, METER: with_grants(account.balances[METER], Grants().plus(made))}
    _, applied = applied_to(account._replace(balances=balances), [event(number, METER, 1) for number in range(200)])
    assert [each.grants for each in applied] == [{"3": 1}] * 200, "the other one has ended"
    assert len(asked) < 20
