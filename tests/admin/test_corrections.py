"""Counter-entries: the only ways to put a balance right, each once, by somebody and for a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from redis import Redis

from config.settings import Settings
from schemas.events import MAX_AMOUNT
from tests.admin.test_accounts import METER, OTHER, USER, bill, buckets, stored
from tests.support.ledger import execute, give_account, move_clock, rows
from worker.admin import accounts, corrections, credits
from worker.errors import AccountError
from worker.reports.proof import verify_ledger
from worker.reports.usage import timeline
from worker.resources import Resources
from worker.rules.account import ChangeAnswer


@pytest.fixture(autouse=True)
def an_account(settings: Settings, redis: Redis, resources: Resources) -> None:
    """100 used, 50 of debt, 30 bought by order o1."""
    give_account(settings, USER, "basic", buckets={METER: (0, -50, 0)})
    give_account(settings, OTHER, "tenant")
    bill(settings, redis, ("e1", METER, 100))
    credits.grant(resources, USER, METER, 30, "o1")


def adjust(resources: Resources, key: str = "fix-1", meter: str = METER, **units: int) -> ChangeAnswer:
    return corrections.adjust(resources, USER, meter, key=key, actor="ops", reason="ticket 7", **units)


def consistent(resources: Resources) -> bool:
    return verify_ledger(resources).differences == []


def test_an_adjustment_moves_each_bucket_once(settings: Settings, resources: Resources) -> None:
    first = adjust(resources, used=-40, rollover=60, purchased=-30)
    assert not first.repeated
    assert buckets(resources) == (60, 10, 0)
    assert adjust(resources, used=-40, rollover=60, purchased=-30).repeated
    assert buckets(resources) == (60, 10, 0)
    (change,) = timeline(resources, USER, limit=1).changes
    assert (change.kind, change.what, change.actor, change.reason) == ("adjust", "adjust:fix-1", "ops", "ticket 7")
    assert rows(settings, "SELECT lifetime_consumed FROM balance WHERE user_id = %s AND meter = %s", USER, METER) == [
        (100,)
    ]
    assert consistent(resources)


def test_a_reversal_returns_what_no_adjustment_took_off_before(resources: Resources) -> None:
    adjust(resources, used=-70)
    assert not credits.reverse(resources, USER, "e1").repeated
    assert buckets(resources) == (0, -50, 30)
    (change,) = timeline(resources, USER, limit=1).changes
    assert "30 of 100 returned to the open period: an adjustment had taken off the rest" in change.model_dump_json()
    assert consistent(resources)


def test_debt_is_forgiven_in_part_or_in_all(resources: Resources) -> None:
    for _ in range(2):
        assert corrections.forgive_debt(resources, USER, METER, 20, key="k1").forgiven == 20
    assert corrections.forgive_debt(resources, USER, METER, key="k2").forgiven == 30
    again = corrections.forgive_debt(resources, USER, METER, key="k2")
    assert (again.repeated, again.forgiven) == (True, 30)
    assert buckets(resources) == (100, 0, 30)
    assert consistent(resources)


def test_a_grant_is_undone_as_far_as_no_refund_took_it_back(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    credits.claw_back(resources, USER, METER, 10, "r1", order="o1")
    bill(settings, redis, ("e2", METER, 99_905))
    answer = corrections.undo(resources, USER, "grant:o1", actor="ops")
    assert (answer.debt, buckets(resources)) == (5, (100_000, -55, 0))
    again = corrections.undo(resources, USER, "grant:o1")
    assert (again.repeated, again.debt, buckets(resources)) == (True, 5, (100_000, -55, 0))
    with pytest.raises(AccountError, match=r"^order: o1|^amount: must be at most 0"):
        credits.claw_back(resources, USER, METER, 1, "r2", order="o1")
    assert credits.grant(resources, USER, METER, 30, "o1").repeated, "its order stays used"
    assert consistent(resources)


def test_a_grant_of_two_meters_is_undone_on_both(resources: Resources) -> None:
    credits.grant(resources, USER, "ocr_tokens", 7, "o1")
    corrections.undo(resources, USER, "grant:o1")
    assert (buckets(resources), buckets(resources, "ocr_tokens")) == ((100, -50, 0), (0, 0, 0))
    assert consistent(resources)


def test_a_refund_is_undone_with_its_debt(settings: Settings, redis: Redis, resources: Resources) -> None:
    bill(settings, redis, ("e2", METER, 99_920))
    assert credits.claw_back(resources, USER, METER, order="o1", total_refunded=30).debt == 20
    corrections.undo(resources, USER, "clawback:o1:30")
    assert buckets(resources) == (100_000, -50, 10)
    # The refund's key stays used; the units may be refunded again under another.
    assert credits.claw_back(resources, USER, METER, order="o1", total_refunded=30).repeated
    assert credits.claw_back(resources, USER, METER, key="r2", order="o1", total_refunded=30).taken == 30
    assert consistent(resources)


def test_an_adjustment_is_undone(resources: Resources) -> None:
    adjust(resources, used=-40, rollover=60, purchased=-30)
    corrections.undo(resources, USER, "adjust:fix-1")
    assert buckets(resources) == (100, -50, 30)
    assert credits.claw_back(resources, USER, METER, 30, "r1").taken == 30, "bought again"
    assert consistent(resources)


def test_an_adjustment_that_can_no_longer_be_put_back_is_refused(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    adjust(resources, purchased=20)
    bill(settings, redis, ("e2", METER, 99_945))
    with pytest.raises(
        AccountError,
        match=r"^entry: adjust:fix-1 cannot be undone; purchased: 5 -20 would fall below 0; add -5 to .*",
    ):
        corrections.undo(resources, USER, "adjust:fix-1")
    adjust(resources, "fix-2", used=-1)
    move_clock(settings, timedelta(days=40))
    bill(settings, redis, ("e3", METER, 0))  # an invoice waits for older entries, as each change leaves one
    start = datetime.now(UTC) + timedelta(days=40)
    accounts.renew(resources, USER, "inv-1", start, start + timedelta(days=30))
    with pytest.raises(AccountError, match=r"^entry: the period that adjust:fix-2 adjusted is closed$"):
        corrections.undo(resources, USER, "adjust:fix-2")
    assert consistent(resources)


REFUSED: dict[str, tuple[Callable[[Resources], object], str]] = {
    "adjust: nothing": (lambda t: adjust(t), r"^adjust: give units of one of used, rollover, purchased$"),
    "adjust: used below zero": (
        lambda t: adjust(t, used=-101), r"^used: 100 -101 would fall below 0; add -100 to \d+$"
    ),
    "adjust: bought below zero": (
        lambda t: adjust(t, purchased=-31), r"^purchased: 30 -31 would fall below 0; add -30 to "
    ),
    "adjust: too much": (lambda t: adjust(t, rollover=MAX_AMOUNT + 1), r"^rollover: must be a whole number from -1000"),
    "adjust: no number": (lambda t: adjust(t, rollover=True), r"^rollover: must be a whole number .* \(got True\)$"),
    "adjust: never spills": (
        lambda t: adjust(t, meter="relay_credits", rollover=1), r"^rollover: must be 0, as relay_credits never spills"
    ),
    "adjust: unknown meter": (lambda t: adjust(t, meter="gold", used=1), r"^meter: unknown 'gold'"),
    "adjust: bad key": (lambda t: adjust(t, "a b", used=1), r"^key: must be 1 to 128"),
    "adjust: key of another": (lambda t: adjust(t, "done", used=2), r"^key: done was used for used \+1, rollover -3"),
    "adjust: nobody": (
        lambda t: corrections.adjust(t, USER, METER, used=1, key="k", actor=None, reason="x"),  # type: ignore[arg-type]
        r"^actor: missing",
    ),
    "adjust: no reason": (
        lambda t: corrections.adjust(t, USER, METER, used=1, key="k", actor="x", reason=None),  # type: ignore[arg-type]
        r"^reason: missing",
    ),
    "adjust: unknown account": (
        lambda t: corrections.adjust(t, "nobody", METER, used=1, key="k", actor="x", reason="x"), r"^user_id: no acc"
    ),
    "forgive: too much": (
        lambda t: corrections.forgive_debt(t, USER, METER, 54, key="k"), r"^amount: must be at most 53, the debt .*54"
    ),
    "forgive: none owed": (
        lambda t: corrections.forgive_debt(t, USER, "ocr_tokens", key="k"), r"^amount: jane.* owes nothing of ocr_tok"
    ),
    "forgive: nothing": (lambda t: corrections.forgive_debt(t, USER, METER, 0, key="k"), r"^amount: must be a whole"),
    "undo: no entry": (lambda t: corrections.undo(t, USER, "grant:o9"), r"^entry: jane.* has no entry 'grant:o9'$"),
    "undo: another kind": (
        lambda t: corrections.undo(t, USER, "open"), r"^entry: must be a grant, clawback, adjust .* \(got open open\)$"
    ),
    "undo: an undo": (lambda t: corrections.undo(t, USER, "undo:grant:o2"), r"^entry: must be .*got undo undo:grant:"),
    "undo: refunded": (lambda t: corrections.undo(t, USER, "grant:o3"), r"^entry: nothing of grant:o3 is left, 4 were"),
    "undo: refund of an order that was carried over": (
        lambda t: corrections.undo(t, OTHER, "clawback:r4"), r"^entry: o4 was carried over to another account; its re"
    ),
    "undo: carried over": (lambda t: corrections.undo(t, OTHER, "grant:o4"), r"^entry: grant:o4 was carried over to"),
}  # fmt: skip


def test_every_mistake_names_its_field_and_writes_nothing(settings: Settings, resources: Resources) -> None:
    adjust(resources, "done", used=1, rollover=-3)
    adjust(resources, "done-2", used=-1)
    credits.grant(resources, USER, METER, 4, "o2")
    corrections.undo(resources, USER, "grant:o2")
    credits.grant(resources, USER, METER, 4, "o3")
    credits.claw_back(resources, USER, METER, 4, "r3", order="o3")
    accounts.change_plan(resources, OTHER, "tenant")
    credits.grant(resources, OTHER, "credits", 4, "o4")
    credits.claw_back(resources, OTHER, "credits", 1, "r4", order="o4")
    credits.carry_over(resources, OTHER, USER, "merge")
    before, wrong = stored(settings), []
    for name, (action, pattern) in REFUSED.items():
        try:
            action(resources)
        except AccountError as error:
            if not re.search(pattern, str(error)):
                wrong.append(f"{name}: {error}")
        else:
            wrong.append(f"{name}: accepted")
    assert wrong == []
    assert stored(settings) == before


@pytest.fixture
def spoil(settings: Settings) -> Callable[[str], None]:
    """Changes what an entry says, past the triggers."""

    def change(statement: str) -> None:
        execute(
            settings,
            "ALTER TABLE ledger_entry DISABLE TRIGGER USER; "
            f"UPDATE ledger_entry SET {statement}; ALTER TABLE ledger_entry ENABLE TRIGGER USER",
        )

    return change


@pytest.mark.parametrize(
    "statement",
    [
        "detail = jsonb_set(detail, '{adjusted,used}', '9') WHERE kind = 'adjust'",
        """detail = detail || '{"amount": 9}' WHERE kind = 'forgive_debt'""",
        """detail = detail || '{"amount": 9}' WHERE kind = 'undo'""",
        """detail = detail || '{"entry": "grant:o9"}' WHERE kind = 'undo'""",
    ],
)
def test_a_proof_finds_a_counter_entry_that_says_something_else(
    resources: Resources, spoil: Callable[[str], None], statement: str
) -> None:
    adjust(resources, used=1)
    corrections.forgive_debt(resources, USER, METER, 20, key="k1")
    corrections.undo(resources, USER, "grant:o1")
    assert consistent(resources)
    spoil(statement)
    assert not consistent(resources)
