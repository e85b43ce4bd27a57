"""What-if: events of a window under another catalogue, on a real ledger."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from config.catalogue import load_catalogue
from config.settings import Settings
from schemas.simulation import SimulationReport
from tests.support.catalogues import edited_catalogue
from tests.support.ledger import give_account, rows, stop_clock
from tests.support.streams import drain
from worker.admin import accounts, corrections, credits
from worker.admin.erasure import close_account
from worker.client import Billing
from worker.errors import ReportError
from worker.reports.simulation import Chosen, simulate
from worker.resources import Resources

USER, OTHER, METER = "user-42", "user-43", "premium_voice"
# The allowance of `basic` on this meter is 100,000 units.
SMALLER = ("quantity = 100_000, rollover_cap", "quantity = 60_000, rollover_cap")


def bill(settings: Settings, user_id: str, event_id: str, amount: int, occurred_at: datetime | None = None) -> None:
    with Billing.connect(settings) as billing:
        billing.emit(user_id, METER, amount, event_id=event_id, occurred_at=occurred_at)
    drain(settings, user_id)


def parts(report: SimulationReport, plan: str, meter: str = METER) -> tuple[list[int], list[int]]:
    """What the accounts of a plan paid on a meter, and would have paid."""
    (found,) = [each for of in report.plans if of.plan == plan for each in of.meters if each.meter == meter]
    return list(found.paid.model_dump().values()), list(found.simulated.model_dump().values())


def test_a_smaller_allowance_moves_units_to_purchased_and_debt(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    give_account(settings, USER, "basic")
    give_account(settings, OTHER, "plus")
    credits.grant(resources, USER, METER, 10_000, "order-1")
    since = datetime.now(UTC)
    for number in range(9):
        bill(settings, USER, f"e{number}", 10_000)
    bill(settings, OTHER, "e0", 5_000)
    catalogue = load_catalogue(edited_catalogue(tmp_path, SMALLER))
    before = rows(settings, "SELECT * FROM balance ORDER BY user_id, meter")

    seen: list[int] = []
    report = simulate(resources, catalogue, since, progress=seen.append)
    assert (report.accounts, report.changed, report.events, report.refused, seen) == (2, 1, 10, 0, [1, 2])
    assert parts(report, "basic") == ([90_000, 0, 0, 0, 0], [60_000, 0, 10_000, 20_000, 0])
    assert parts(report, "plus") == ([5_000, 0, 0, 0, 0], [5_000, 0, 0, 0, 0])
    (changed,) = report.most_changed
    assert (changed.user_id, changed.meter, changed.events, changed.difference) == (USER, METER, 9, 30_000)
    assert report.meters[0].accounts == 2
    assert not report.more
    assert rows(settings, "SELECT * FROM balance ORDER BY user_id, meter") == before

    same = simulate(resources, resources.catalogue, since)
    assert (same.changed, same.most_changed, same.events) == (0, (), 10)
    alone = simulate(resources, catalogue, since, chosen=Chosen(user_id=OTHER))
    assert (alone.accounts, alone.changed) == (1, 0)
    assert simulate(resources, catalogue, since, chosen=Chosen(sample=1)).accounts == 1


def test_what_was_used_before_the_window_counts_and_is_not_reported(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    give_account(settings, USER, "basic")
    bill(settings, USER, "e0", 50_000)
    since = datetime.now(UTC)
    bill(settings, USER, "e1", 20_000)
    catalogue = load_catalogue(edited_catalogue(tmp_path, SMALLER))
    report = simulate(resources, catalogue, since)
    assert parts(report, "basic") == ([20_000, 0, 0, 0, 0], [10_000, 0, 0, 10_000, 0])


def test_a_plan_is_tried_in_place_of_another(settings: Settings, resources: Resources) -> None:
    give_account(settings, USER, "plus")
    since = datetime.now(UTC)
    bill(settings, USER, "e0", 150_000)
    report = simulate(resources, resources.catalogue, since, plans={"plus": "basic"})
    paid, simulated = parts(report, "plus")
    assert paid == [150_000, 0, 0, 0, 0]
    assert simulated == [100_000, 0, 0, 50_000, 0]
    (plan,) = report.plans
    assert (plan.simulated_plan, plan.simulated_price_month_cents) == ("basic", 900)


def test_a_multiplier_of_the_catalogue_counts_and_one_of_the_producer_stays(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    give_account(settings, USER, "basic")
    since = datetime.now(UTC)
    with Billing.connect(settings) as billing:
        for event_id, multiplier in (("e0", None), ("e1", "2")):
            billing.emit(
                USER, METER, quantity=1_000, event_id=event_id, multiplier=multiplier, dimensions={"model_slug": "m2"}
            )
    drain(settings, USER)
    catalogue = load_catalogue(edited_catalogue(tmp_path, ('m2 = "1.5"', 'm2 = "4"')))
    report = simulate(resources, catalogue, since)
    assert parts(report, "basic") == ([3_500, 0, 0, 0, 0], [6_000, 0, 0, 0, 0])


def test_a_reversed_event_counts_on_neither_side(settings: Settings, resources: Resources, tmp_path: Path) -> None:
    give_account(settings, USER, "basic")
    since = datetime.now(UTC)
    for number in range(2):
        bill(settings, USER, f"e{number}", 50_000)
    credits.reverse(resources, USER, "e0")
    bill(settings, USER, "e2", 5_000)
    report = simulate(resources, load_catalogue(edited_catalogue(tmp_path, SMALLER)), since)
    assert report.events == 2
    # e1 took 10,000 of the allowance; with e0 undone, e2 finds all of the rest.
    assert parts(report, "basic") == ([55_000, 0, 0, 0, 0], [15_000, 0, 0, 40_000, 0])


def test_an_account_of_the_window_is_opened_under_the_other_catalogue(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    give_account(settings, OTHER, "basic")
    since = datetime.now(UTC)
    accounts.open_new(resources, USER, "basic", rollover={METER: 7})
    bill(settings, USER, "e0", 60_010)
    report = simulate(resources, load_catalogue(edited_catalogue(tmp_path, SMALLER)), since)
    assert parts(report, "basic") == ([60_010, 0, 0, 0, 0], [60_000, 7, 0, 3, 0])


def test_a_closed_period_saves_what_the_other_allowance_left(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    start = datetime(2088, 1, 1, tzinfo=UTC)
    stop_clock(settings, start)
    accounts.open_new(resources, USER, "basic", end=start + timedelta(days=31))
    bill(settings, USER, "e0", 30_000, start)
    stop_clock(settings, start + timedelta(days=31, minutes=5))
    accounts.renew(resources, USER, "in-2", start + timedelta(days=31), start + timedelta(days=59))
    bill(settings, USER, "e1", 180_000, start + timedelta(days=31))
    stop_clock(settings, start + timedelta(days=31, minutes=6))
    report = simulate(resources, load_catalogue(edited_catalogue(tmp_path, SMALLER)), start)
    assert parts(report, "basic") == ([130_000, 70_000, 0, 10_000, 0], [90_000, 30_000, 0, 90_000, 0])


def test_events_without_an_account_are_uncollected_on_both_sides(settings: Settings, resources: Resources) -> None:
    give_account(settings, OTHER, "basic")
    since = datetime.now(UTC)
    bill(settings, "nobody", "e0", 12)
    report = simulate(resources, resources.catalogue, since)
    assert (report.accounts, report.events) == (0, 1)
    assert parts(report, "") == ([0, 0, 0, 0, 12], [0, 0, 0, 0, 12])


def test_the_accounts_that_change_most_are_kept(settings: Settings, resources: Resources, tmp_path: Path) -> None:
    since = datetime.now(UTC)
    for number in range(4):
        give_account(settings, f"user-{number}", "basic")
        bill(settings, f"user-{number}", "e0", 60_000 + number * 100)
    report = simulate(resources, load_catalogue(edited_catalogue(tmp_path, SMALLER)), since, most_changed=2)
    assert [(each.user_id, each.difference) for each in report.most_changed] == [("user-3", 300), ("user-2", 200)]
    assert (report.changed, report.more) == (3, True)


def test_a_question_that_has_no_answer_is_refused(settings: Settings, resources: Resources, tmp_path: Path) -> None:
    early = datetime.now(UTC)
    with pytest.raises(ReportError, match=r"^since: the ledger has no account yet"):
        simulate(resources, resources.catalogue, early)
    give_account(settings, USER, "basic")
    bill(settings, USER, "e0", 10)
    own, hour = resources.catalogue, timedelta(hours=1)
    lacks_plan = load_catalogue(edited_catalogue(tmp_path, ("[plans.basic]", "[plans.simple]"), name="plan.toml"))
    for message, catalogue, window, more in (
        ("since: must not be after now", own, (early + hour,), {}),
        ("until: must not be after now", own, (early, early + hour), {}),
        ("since: must be before until", own, (early, early), {}),
        ("since: must be a time with an offset", own, (early.replace(tzinfo=None),), {}),
        ("until: the ledger begins at .* after the window", own, (early - 2 * hour, early - hour), {}),
        ("plan-map: unknown plan 'gone'", own, (early,), {"plans": {"gone": "basic"}}),
        ("plan-map: the catalogue has no plan 'gone'", own, (early,), {"plans": {"basic": "gone"}}),
        (
            r"catalogue: lacks plan basic \(1 account of the window on it\).*--plan-map basic=PLAN",
            lacks_plan,
            (early,),
            {},
        ),
        ("user: no account nobody", own, (early,), {"chosen": Chosen(user_id="nobody")}),
        ("sample: not together with user", own, (early,), {"chosen": Chosen(1, USER)}),
        ("sample: must be a whole number, 1 or more", own, (early,), {"chosen": Chosen(0)}),
        ("top: must be a whole number, from 1 to 10000", own, (early,), {"most_changed": 0}),
    ):
        with pytest.raises(ReportError, match=f"^{message}"):
            simulate(resources, catalogue, *window, **more)
    assert simulate(resources, lacks_plan, early, plans={"basic": "simple"}).changed == 0


def test_nothing_changes_under_the_catalogue_in_force(settings: Settings, resources: Resources) -> None:
    """Also not for an account that was closed, or that carried credit over to another one."""
    give_account(settings, "before", "basic")
    since = datetime.now(UTC)
    accounts.open_new(resources, USER, "basic")
    accounts.open_new(resources, OTHER, "plus")
    for user_id in (USER, OTHER):
        credits.grant(resources, user_id, METER, 9_000, f"order-{user_id}")
        bill(settings, user_id, "e0", 104_000)
    credits.carry_over(resources, USER, OTHER, "trial", meter=METER)
    accounts.change_plan(resources, USER, "plus")
    bill(settings, USER, "e1", 500_000)
    corrections.adjust(resources, OTHER, METER, used=-50, key="fix", actor="jane", reason="billed too much")
    bill(settings, OTHER, "e1", 600_000)
    credits.reverse(resources, OTHER, "e0")
    close_account(resources, USER, forfeit=True)
    bill(settings, USER, "late", 5)
    report = simulate(resources, resources.catalogue, since)
    assert (report.accounts, report.changed, report.events) == (2, 0, 4)
    logged = rows(
        settings,
        "SELECT sum(from_subscription), sum(from_rollover), sum(from_purchased), sum(overflow_to_debt), "
        "sum(uncollected) FROM usage_log WHERE NOT (user_id = %s AND event_id = 'e0')",
        OTHER,
    )
    (meter,) = report.meters
    assert tuple(meter.simulated.model_dump().values()) == tuple(meter.paid.model_dump().values()) == logged[0]
