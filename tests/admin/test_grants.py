"""Grants of credit on real servers: what pays first, what starts and ends, what comes back, and what proves it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from config.settings import Settings
from tests.support.ledger import empty_ledger, execute, give_account, rows, stop_clock
from tests.support.streams import drain, partition_of
from worker.admin import accounts, corrections, credits, transfer
from worker.admin.erasure import close_account
from worker.client import Billing
from worker.consumer.renewals import renew_due
from worker.errors import AccountError, KeyConflict, OrderUsed
from worker.keyspace.cache import cache_life
from worker.reports.credits import credits_of
from worker.reports.explain import explain
from worker.reports.overviews import open_overviews
from worker.reports.proof import verify_ledger
from worker.reports.proof_run import prove_ledger
from worker.resources import Resources

USER, OTHER, METER = "ann", "bob", "premium_voice"
# Ahead of any real clock: there the streams of the tests go by the ledger's clock.
START = datetime(2088, 3, 1, 9, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
LIMIT = 100_000
KEPT = "SELECT grants, grants_due FROM balance WHERE user_id = %s AND meter = %s"


@pytest.fixture(autouse=True)
def spent_accounts(settings: Settings) -> None:
    """Two accounts whose allowance is used up, so that credit pays."""
    stop_clock(settings, START)
    for user in (USER, OTHER):
        give_account(settings, user, "basic", buckets={METER: (LIMIT, 0, 0)}, end=START + 400 * DAY)


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    with Billing.connect(settings) as client:
        yield client


def start_anew(settings: Settings) -> None:
    """A ledger without any account, at START."""
    assert settings.database_url is not None
    empty_ledger(settings.database_url)
    stop_clock(settings, START)


def send(resources: Resources, event_id: str, quantity: int, user_id: str = USER) -> None:
    """An event comes now, and waits."""
    event = {"event_id": event_id, "user_id": user_id, "meter": METER, "quantity": quantity}
    stream = partition_of(resources.settings, user_id).entries
    resources.redis.xadd(stream, {"v": "1", "e": json.dumps(event)})


def use(resources: Resources, event_id: str, quantity: int, user_id: str = USER) -> Any:
    """An event comes and is applied; return what it took of each grant."""
    send(resources, event_id, quantity, user_id)
    drain(resources.settings, user_id)
    return took(resources, event_id)


def took(resources: Resources, event_id: str) -> Any:
    return rows(resources.settings, "SELECT grants FROM usage_log WHERE event_id = %s", event_id)[0][0]


def grant(resources: Resources, amount: int, key: str, user_id: str = USER, **terms: Any) -> None:
    credits.grant(resources, user_id, METER, amount, key, **terms)
    drain(resources.settings, user_id)


def left(resources: Resources, user_id: str = USER) -> dict[str, int]:
    """What is left of each grant, in the order in which they pay."""
    found = credits_of(resources, user_id).grants
    return {each.order or "": each.left for each in found if each.state == "in_force"}


def purchased(resources: Resources, user_id: str = USER) -> int:
    return accounts.show(resources, user_id).balances[METER].purchased


def entries(settings: Settings, kind: str) -> list[tuple[Any, ...]]:
    return rows(
        settings, "SELECT user_id, entry_key, purchased_change FROM ledger_entry WHERE kind = %s ORDER BY 1, 2", kind
    )


def proved(resources: Resources) -> bool:
    """From zero and from checkpoints."""
    return verify_ledger(resources).differences == prove_ledger(resources).differences == []


# ---------------------------------------------------------------------------------------------------------------------
# Who pays


def test_grants_pay_in_their_order_and_each_event_says_from_which(resources: Resources) -> None:
    grant(resources, 100, "order-1")
    grant(resources, 50, "gift", category="promotional", expires_at=START + 30 * DAY)
    grant(resources, 20, "first", priority=10)
    assert list(left(resources)) == ["first", "gift", "order-1"]
    assert use(resources, "e1", 30) == {"first": 20, "gift": 10}
    assert use(resources, "e2", 60) == {"gift": 40, "order-1": 20}
    assert left(resources) == {"order-1": 80}
    told = explain(resources, USER, "e2")
    assert [(part.order, part.units, part.category) for part in told.grants] == [
        ("gift", 40, "promotional"), ("order-1", 20, "paid"),
    ]  # fmt: skip
    assert any("gift" in sentence and "order-1" in sentence for sentence in told.sentences)
    assert proved(resources)


def test_units_of_before_are_one_paid_grant_and_take_the_plain_path(settings: Settings, resources: Resources) -> None:
    start_anew(settings)
    give_account(settings, USER, "basic", buckets={METER: (LIMIT, 0, 40)}, end=START + 400 * DAY)
    assert left(resources) == {"": 40}
    assert use(resources, "e1", 15) is None
    assert rows(settings, "SELECT grants FROM balance WHERE meter = %s", METER) == [(None,)]
    grant(resources, 10, "order-1")
    assert list(left(resources).items()) == [("", 25), ("order-1", 10)]
    assert use(resources, "e2", 30) == {"": 25, "order-1": 5}
    assert use(resources, "e3", 5) == {"order-1": 5}
    assert rows(settings, "SELECT grants, grants_due FROM balance WHERE meter = %s", METER) == [(None, None)]
    assert proved(resources)


def test_the_report_of_credit_adds_up(resources: Resources) -> None:
    grant(resources, 100, "order-1", expires_at=START + DAY)
    grant(resources, 10, "later", effective_at=START + 3 * DAY)
    use(resources, "e1", 30)
    use(resources, "e2", 5)
    credits.reverse(resources, USER, "e2")
    credits.claw_back(resources, USER, METER, 20, "refund-1", order="order-1")
    stop_clock(resources.settings, START + 2 * DAY)
    for _ in range(2):  # computed, then stored
        first, later = credits_of(resources, USER).grants[::-1]
        assert (first.order, first.state, later.order, later.state) == ("order-1", "ended", "later", "to_come")
        assert (first.given, first.left, first.used, first.taken_back, first.expired) == (100, 0, 30, 20, 50)
        assert [(each.event_id, each.units) for each in first.events] == [("e2", 5), ("e1", 30)]
        assert (later.given, later.left, later.used) == (10, 10, 0)
        drain(resources.settings, USER)
        renew_due(resources)
    assert proved(resources)


# ---------------------------------------------------------------------------------------------------------------------
# Starts and ends


def test_an_event_is_charged_by_the_grants_in_force_when_it_came(settings: Settings, resources: Resources) -> None:
    grant(resources, 100, "short", expires_at=START + 2 * HOUR)
    grant(resources, 100, "late", effective_at=START + HOUR)
    send(resources, "before", 10)
    stop_clock(settings, START + HOUR)
    send(resources, "between", 10)
    stop_clock(settings, START + 2 * HOUR)
    send(resources, "after", 10)
    stop_clock(settings, START + 5 * HOUR)
    renew_due(resources)  # older events wait, so it leaves both boundaries to them
    assert entries(settings, "expire") == []
    drain(settings, USER)
    assert [took(resources, event) for event in ("before", "between", "after")] == [
        {"short": 10}, {"short": 10}, {"late": 10},
    ]  # fmt: skip
    assert entries(settings, "expire") == [(USER, "expire:short", -80)]
    assert [key for _, key, _ in entries(settings, "grant")] == ["grant:short", "start:late"]
    assert proved(resources)


def test_a_check_computes_what_the_job_stores_once(settings: Settings, resources: Resources, billing: Billing) -> None:
    grant(resources, 100, "short", expires_at=START + 2 * HOUR)
    grant(resources, 7, "late", effective_at=START + HOUR)
    assert billing.check(USER, METER).available == 100
    assert purchased(resources) == 100
    stored = accounts.show(resources, USER)
    assert cache_life(stored, START, settings).kept_ms <= HOUR / timedelta(milliseconds=1)
    near = cache_life(stored, START + HOUR - timedelta(milliseconds=30), settings)
    assert near.kept_ms == 30  # no cached balance outlives a start or an end
    for at, there in ((HOUR, 107), (2 * HOUR, 7)):
        stop_clock(settings, START + at)
        resources.redis.delete(partition_of(settings, USER).account(USER).balance)  # what time does by itself
        assert (purchased(resources), billing.check(USER, METER).available) == (there, there)
        for _ in range(2):
            renew_due(resources)
        assert purchased(resources) == there
    assert entries(settings, "expire") == [(USER, "expire:short", -100)]
    assert rows(settings, "SELECT grants_due FROM balance WHERE user_id = %s AND meter = %s", USER, METER) == [(None,)]
    assert proved(resources)


def test_reports_on_all_accounts_know_what_has_started_and_ended(settings: Settings, resources: Resources) -> None:
    grant(resources, 100, "short", expires_at=START + 2 * HOUR)
    grant(resources, 7, "late", effective_at=START + HOUR)
    grant(resources, 1, "other", OTHER)
    corrections.adjust(resources, USER, METER, rollover=-5, key="fix-1", actor="ops", reason="a debt")
    drain(settings, USER)

    def told() -> tuple[Any, ...]:
        with open_overviews(resources) as overviews:
            of_accounts = {found.user_id: found.purchased for found in overviews.purchased_of_accounts()}
            return (
                of_accounts,
                [(found.accounts, found.purchased) for found in overviews.purchased()],
                [d.purchased for d in overviews.debtors()],
            )

    for at, units in ((timedelta(0), 100), (HOUR, 107), (2 * HOUR, 7)):
        stop_clock(settings, START + at)
        assert told() == ({USER: units, OTHER: 1}, [(2, units + 1)], [units])
    renew_due(resources)
    assert told() == ({USER: 7, OTHER: 1}, [(2, 8)], [7])


def test_what_nobody_uses_starts_and_ends_at_once_long_after(settings: Settings, resources: Resources) -> None:
    grant(resources, 5, "brief", effective_at=START + DAY, expires_at=START + 2 * DAY)
    stop_clock(settings, START + 90 * DAY)
    renew_due(resources)
    assert entries(settings, "expire") == [(USER, "expire:brief", -5)]
    granted = "SELECT lifetime_granted FROM balance WHERE user_id = %s AND meter = %s"
    assert rows(settings, granted, USER, METER) == [(5,)]
    assert proved(resources)


# ---------------------------------------------------------------------------------------------------------------------
# What comes back, and what is taken back


def test_a_reversal_returns_to_the_same_grants_and_what_has_ended_is_gone(
    settings: Settings, resources: Resources
) -> None:
    grant(resources, 10, "gift", category="promotional", expires_at=START + DAY)
    grant(resources, 10, "order-1")
    assert use(resources, "e1", 12) == {"gift": 10, "order-1": 2}
    assert use(resources, "e2", 8) == {"order-1": 8}
    credits.reverse(resources, USER, "e1")
    assert left(resources) == {"gift": 10, "order-1": 2}
    assert use(resources, "e3", 10) == {"gift": 10}
    stop_clock(settings, START + 2 * DAY)
    answer = credits.reverse(resources, USER, "e3")
    assert (answer.gone, credits.reverse(resources, USER, "e3").gone) == (10, 10)
    assert left(resources) == {"order-1": 2}
    drain(settings, USER)
    told = explain(resources, USER, "e3")
    assert told.gone == {"gift": 10}
    assert any("gone" in sentence and "gift" in sentence for sentence in told.sentences)
    assert entries(settings, "expire") == []  # nothing was left when it ended
    assert proved(resources)


def test_a_refund_takes_its_own_order_first_and_nothing_for_what_expired(
    settings: Settings, resources: Resources
) -> None:
    grant(resources, 100, "order-1", expires_at=START + DAY)
    grant(resources, 100, "order-2")
    credits.claw_back(resources, USER, METER, 30, "refund-1", order="order-2")
    assert left(resources) == {"order-1": 100, "order-2": 70}
    use(resources, "e1", 40)
    stop_clock(settings, START + 2 * DAY)
    refunded = credits.claw_back(resources, USER, METER, order="order-1", total_refunded=100)
    # 60 of it had expired; the 40 that were spent come from what is left.
    assert (refunded.taken, refunded.gone, refunded.debt) == (100, 60, 0)
    assert left(resources) == {"order-2": 30}
    undone = corrections.undo(resources, USER, "clawback:order-1:100")
    assert (undone.gone, left(resources)) == (60, {"order-2": 70})
    drain(settings, USER)
    assert proved(resources)


def test_changes_go_by_the_moment_though_older_entries_of_the_stream_wait(
    settings: Settings, resources: Resources
) -> None:
    grant(resources, 100, "order-1", priority=0)
    use(resources, "e1", 100)
    grant(resources, 100, "short", expires_at=START + HOUR)
    grant(resources, 30, "long", priority=60)
    grant(resources, 50, "late", effective_at=START + HOUR, priority=70)
    stop_clock(settings, START + 2 * HOUR)
    resources.redis.xadd(partition_of(settings, USER).entries, {"v": "1", "r": USER})
    corrections.adjust(resources, USER, METER, purchased=-10, key="fix-1", actor="ops", reason="test")
    assert left(resources) == {"long": 20, "late": 50}
    refunded = credits.claw_back(resources, USER, METER, 90, "refund-1", order="order-1")
    assert (refunded.gone, refunded.debt, left(resources)) == (0, 20, {})
    assert corrections.undo(resources, USER, "clawback:refund-1").gone == 0
    assert left(resources) == {"long": 20, "late": 50}
    assert credits.claw_back(resources, USER, METER, 75, "refund-2").debt == 0  # 5 of them would have expired
    assert left(resources) == {}
    drain(settings, USER)
    renew_due(resources)
    assert entries(settings, "expire") == [(USER, "expire:short", -95)]
    assert proved(resources)


@pytest.mark.parametrize(
    "turns", ["refund end reverse", "refund reverse end", "reverse refund end", "end reverse refund"]
)
def test_a_refund_and_a_reversal_leave_no_debt_in_any_order(
    settings: Settings, resources: Resources, turns: str
) -> None:
    grant(resources, 100, "order-1", expires_at=START + DAY)
    use(resources, "e1", 70)
    for turn in turns.split():
        if turn == "refund":
            credits.claw_back(resources, USER, METER, 100, "refund-1", order="order-1")
        elif turn == "reverse":
            credits.reverse(resources, USER, "e1")
        else:
            stop_clock(settings, START + 2 * DAY)
            drain(settings, USER)
            renew_due(resources)
    balance = accounts.show(resources, USER).balances[METER]
    assert (balance.rollover, balance.purchased) == (0, 0)
    (found,) = credits_of(resources, USER).grants
    assert (found.used, found.left) == (0, 0)
    if turns.startswith("refund"):
        assert corrections.undo(resources, USER, "clawback:refund-1").gone == 30
    drain(settings, USER)
    assert proved(resources)


def test_a_refund_without_an_order_takes_nothing_for_what_expired(settings: Settings, resources: Resources) -> None:
    grant(resources, 100, "gift", category="promotional", expires_at=START + DAY)
    grant(resources, 50, "order-1")
    stop_clock(settings, START + 2 * DAY)
    renew_due(resources)
    with pytest.raises(AccountError, match=r"^amount: must be at most 50, the .* nor expired \(got 51\)$"):
        credits.claw_back(resources, USER, METER, 51, "refund-1")
    refunded = credits.claw_back(resources, USER, METER, 50, "refund-1")
    assert (refunded.debt, purchased(resources)) == (0, 0)
    # Nor is it taken for an order whose units went already.
    with pytest.raises(AccountError, match=r"^amount: must be at most 0; "):
        credits.claw_back(resources, USER, METER, 1, "refund-2", order="order-1")
    counted = credits.claw_back(resources, USER, METER, 100, "refund-3", order="gift")
    assert (counted.gone, counted.debt) == (100, 0)
    drain(settings, USER)
    assert proved(resources)


def test_a_grant_to_come_is_refunded_and_undone(resources: Resources) -> None:
    grant(resources, 50, "order-1", effective_at=START + DAY)
    credits.claw_back(resources, USER, METER, 20, "refund-1", order="order-1")
    assert [(each.order, each.left) for each in credits_of(resources, USER).grants] == [("order-1", 30)]
    undone = corrections.undo(resources, USER, "grant:order-1")
    assert (undone.debt, purchased(resources)) == (0, 0)
    stop_clock(resources.settings, START + 2 * DAY)
    renew_due(resources)
    assert entries(resources.settings, "grant") == []  # nothing was left to start


def test_a_grant_that_has_started_is_undone_by_its_own_entry(settings: Settings, resources: Resources) -> None:
    grant(resources, 50, "order-1", effective_at=START + DAY)
    stop_clock(settings, START + 2 * DAY)
    renew_due(resources)
    assert use(resources, "e1", 20) == {"order-1": 20}
    with pytest.raises(AccountError, match=r"^entry: start:order-1 is the start of a grant; undo grant:order-1$"):
        corrections.undo(resources, USER, "start:order-1")
    assert corrections.undo(resources, USER, "grant:order-1").debt == 20
    assert purchased(resources) == 0
    assert proved(resources)


def test_an_adjustment_that_gave_is_undone_on_the_credit_without_an_order(
    settings: Settings, resources: Resources
) -> None:
    grant(resources, 200, "gift", category="promotional", expires_at=START + DAY)
    for key in ("fix-1", "fix-2"):
        corrections.adjust(resources, USER, METER, purchased=100, key=key, actor="op", reason="a fix")
    corrections.undo(resources, USER, "adjust:fix-1")
    assert left(resources) == {"gift": 200, "": 100}
    drain(settings, USER)
    assert use(resources, "e1", 270) == {"gift": 200, "": 70}
    grant(resources, 80, "order-1")
    grant(resources, 50, "gift-2", category="promotional", expires_at=START + DAY)
    corrections.undo(resources, USER, "adjust:fix-2")
    assert left(resources) == {"order-1": 60}, "what of it was used is taken from what pays next"
    undone = rows(settings, "SELECT detail -> 'grants' FROM ledger_entry WHERE kind = 'undo' ORDER BY seq")
    assert undone == [({"": 100},), ({"": 30, "gift-2": 50, "order-1": 20},)]
    reported = {each.order: (each.left, each.taken_back, each.used) for each in credits_of(resources, USER).grants}
    assert (reported["gift-2"], reported["order-1"]) == ((0, 50, 0), (60, 20, 0))
    assert proved(resources)


def test_grants_move_with_a_carry_over(settings: Settings, resources: Resources) -> None:
    grant(resources, 10, "gift", category="promotional", expires_at=START + DAY)
    grant(resources, 20, "order-1")
    grant(resources, 5, "later", effective_at=START + 2 * DAY)
    grant(resources, 3, "own", OTHER)
    use(resources, "e1", 4)
    moved = credits.carry_over(resources, USER, OTHER, "move-1", meter=METER)
    assert (moved.moved, left(resources), list(left(resources, OTHER).items())) == (
        26, {}, [("gift", 6), ("order-1", 20), ("own", 3)],
    )  # fmt: skip
    for user in (USER, OTHER):
        drain(settings, user)
    credits.reverse(resources, USER, "e1")
    assert left(resources) == {"gift": 4}
    refunded = credits.claw_back(resources, OTHER, METER, 8, "refund-1", order="order-1")
    assert (refunded.debt, left(resources, OTHER)["order-1"]) == (0, 12)
    stop_clock(settings, START + 3 * DAY)
    renew_due(resources)
    assert (purchased(resources), purchased(resources, OTHER)) == (0, 20)
    assert entries(settings, "expire") == [(USER, "expire:gift", -4), (OTHER, "expire:gift", -6)]
    assert proved(resources)


def test_grants_move_to_another_ledger(settings: Settings, resources: Resources) -> None:
    grant(resources, 10, "gift", category="promotional", priority=3, expires_at=START + DAY)
    grant(resources, 20, "order-1")
    grant(resources, 5, "later", effective_at=START + 2 * DAY)
    use(resources, "e1", 4)
    before = accounts.show(resources, USER).balances[METER]
    lines: list[str] = []
    transfer.export_accounts(resources, lines.append)
    start_anew(settings)
    line = json.loads(next(line for line in "".join(lines).splitlines() if f'"{USER}"' in line))
    for grants, wrong in (
        (line["meters"][METER]["grants"] | {"in_force": []}, r"grants: must have purchased units left in force \(26\)"),
        (None, ""),
    ):
        bad = json.loads(json.dumps(line))
        if grants is not None:
            bad["meters"][METER]["grants"] = grants
            with pytest.raises(AccountError, match=wrong):
                transfer.import_accounts(resources, json.dumps(bad))
    transfer.import_accounts(resources, json.dumps(line))
    after = accounts.show(resources, USER).balances[METER]
    assert (after.grants, after.purchased) == (before.grants, 26)
    assert credits.grant(resources, USER, METER, 20, "order-1").repeated
    assert use(resources, "e2", 7) == {"gift": 6, "order-1": 1}
    assert proved(resources)


@pytest.mark.parametrize(
    ("order", "field", "wrong"),
    [
        ("order-1", None, None),
        ("later", None, None),
        ("order-1", "grant", None),
        ("order-1", "category", "promotional"),
        ("order-1", "given", 21),
        ("later", "effective_at", (START + DAY).isoformat()),
    ],
)
def test_an_import_wants_the_order_of_each_grant_with_its_terms(
    settings: Settings, resources: Resources, order: str, field: str | None, wrong: Any
) -> None:
    grant(resources, 20, "order-1")
    grant(resources, 5, "later", effective_at=START + 2 * DAY)
    use(resources, "e1", 4)
    lines: list[str] = []
    transfer.export_accounts(resources, lines.append)
    line = json.loads(next(line for line in "".join(lines).splitlines() if f'"{USER}"' in line))
    orders = line["meters"][METER]["purchases"]["orders"]
    if field is None:
        del orders[order]
    elif field == "grant":
        del orders[order]["grant"]
    else:
        orders[order]["grant"][field] = wrong
    start_anew(settings)
    refused = rf"purchases: must have the order of the grant '{order}', with the same terms"
    with pytest.raises(AccountError, match=refused):
        transfer.import_accounts(resources, json.dumps(line))
    del line["meters"][METER]["purchases"]
    with pytest.raises(AccountError, match="purchases: must have the order of the grant 'order-1'"):
        transfer.import_accounts(resources, json.dumps(line))


def test_a_closed_account_leaves_no_grant(settings: Settings, resources: Resources) -> None:
    grant(resources, 10, "gift", expires_at=START + DAY)
    grant(resources, 5, "later", effective_at=START + 2 * DAY)
    history = close_account(resources, USER, forfeit=True)
    assert rows(
        settings, "SELECT grants, grants_due FROM balance WHERE user_id = %s AND meter = %s", history, METER
    ) == [(None, None)]
    stop_clock(settings, START + 9 * DAY)
    assert renew_due(resources).entries == 0
    assert proved(resources)


def test_a_closing_wants_to_be_told_of_credit_to_come(settings: Settings, resources: Resources) -> None:
    grant(resources, 300, "later", effective_at=START + DAY)
    grant(resources, 200, "after-it", effective_at=START + 2 * DAY)
    with pytest.raises(AccountError, match=rf"^forfeit: closing {USER} loses 500 to come of {METER}; say so"):
        close_account(resources, USER)
    stop_clock(settings, START + DAY)
    lost = rf"loses 300 purchased of {METER}, 200 to come of {METER}; say so"
    with pytest.raises(AccountError, match=lost):
        close_account(resources, USER)
    _keep_the_stream_busy(resources)
    with pytest.raises(AccountError, match=lost):  # started, though not stored yet
        close_account(resources, USER)


def test_a_closing_loses_nothing_of_credit_that_has_ended(settings: Settings, resources: Resources) -> None:
    grant(resources, 10, "gift", expires_at=START + DAY)
    stop_clock(settings, START + DAY)
    _keep_the_stream_busy(resources)
    assert close_account(resources, USER).startswith("closed:")
    assert rows(settings, "SELECT 1 FROM ledger_entry WHERE kind = 'expire'") == []
    drain(settings, USER)
    assert proved(resources)


def _keep_the_stream_busy(resources: Resources) -> None:
    """While any entry waits in its stream, no end of an account's grant is stored."""
    resources.redis.xadd(partition_of(resources.settings, USER).entries, {"v": "1", "r": USER})


# ---------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    ("terms", "wrong"),
    [
        ({"category": "free"}, r"^category: must be paid or promotional \(got 'free'\)$"),
        ({"priority": 101}, r"^priority: must be a whole number from 0 to 100 \(got 101\)$"),
        ({"priority": -1}, r"^priority: "),
        ({"priority": True}, r"^priority: "),
        ({"priority": "5"}, r"^priority: "),
        ({"expires_at": START}, r"^expires_at: must be after now, "),
        ({"expires_at": datetime(2088, 5, 1)}, r"^expires_at: must be a time with an offset "),  # noqa: DTZ001
        ({"effective_at": "tomorrow"}, r"^effective_at: must be a time with an offset "),
        ({"effective_at": START + DAY, "expires_at": START + DAY}, r"^expires_at: must be after effective_at, "),
        ({"effective_at": START + DAY, "expires_at": START + HOUR}, r"^expires_at: must be after effective_at, "),
    ],
)
def test_a_bad_grant_is_refused_and_nothing_is_written(
    settings: Settings, resources: Resources, terms: dict[str, Any], wrong: str
) -> None:
    before = rows(settings, "SELECT account::text FROM account ORDER BY 1")
    with pytest.raises(AccountError, match=wrong):
        credits.grant(resources, USER, METER, 10, "order-1", **terms)
    with pytest.raises(AccountError, match=wrong):
        credits.grant(resources, "new", METER, 10, "order-1", open_plan="basic", **terms)
    assert rows(settings, "SELECT account::text FROM account ORDER BY 1") == before
    assert rows(settings, "SELECT key FROM order_key") == []
    grant(resources, 10, "order-1")  # the key is free


def test_a_key_is_used_once_for_one_grant(resources: Resources) -> None:
    terms: dict[str, Any] = {"category": "promotional", "priority": 7, "expires_at": START + DAY}
    terms["effective_at"] = START + HOUR
    grant(resources, 10, "order-1", **terms)
    assert credits.grant(resources, USER, METER, 10, "order-1", **terms).repeated
    for field, value in (
        ("category", "paid"),
        ("priority", 8),
        ("expires_at", None),
        ("effective_at", START + 2 * HOUR),
    ):
        with pytest.raises(KeyConflict, match=rf"^key: order-1 was used for a grant with {field} "):
            credits.grant(resources, USER, METER, 10, "order-1", **terms | {field: value})
    with pytest.raises(KeyConflict, match=r"^key: order-1 was used for 10 of "):
        credits.grant(resources, USER, METER, 11, "order-1", **terms)
    with pytest.raises(OrderUsed):
        credits.grant(resources, OTHER, METER, 10, "order-1", **terms)
    stop_clock(resources.settings, START + 2 * DAY)  # ended meanwhile: still a repeat
    assert credits.grant(resources, USER, METER, 10, "order-1", **terms).repeated
    assert proved(resources)


@pytest.mark.parametrize(
    "change",
    [
        "purchased = purchased + 1, grants = jsonb_set(grants, '{in_force,0,priority}', '51')",
        "grants = jsonb_set(grants, '{in_force,0,left}', '11'), purchased = 31",
        "grants = jsonb_set(grants, '{in_force,0,left}', '0'), purchased = 20",
        "grants = jsonb_set(grants, '{in_force,0,left}', '9')",
        "grants = jsonb_set(grants, '{in_force,0,priority}', '101')",
        "grants = jsonb_set(grants, '{in_force,0,category}', '\"free\"')",
        "grants = jsonb_set(grants, '{in_force,0,key}', '\"order-1\"')",
        "grants = '{}'",
    ],
)
def test_postgres_stores_no_grants_that_do_not_fit(settings: Settings, resources: Resources, change: str) -> None:
    grant(resources, 10, "gift", category="promotional")
    grant(resources, 20, "order-1")
    with pytest.raises(psycopg.errors.CheckViolation):
        execute(settings, f"UPDATE balance SET {change} WHERE user_id = 'ann' AND meter = 'premium_voice'")


def test_a_proof_finds_grants_that_were_changed(settings: Settings, resources: Resources) -> None:
    grant(resources, 10, "gift", category="promotional")
    grant(resources, 20, "order-1")
    use(resources, "e1", 12)
    assert proved(resources)
    left_over = "jsonb_set(jsonb_set(grants, '{in_force,0,left}', '%s'), '{in_force,0,key}', '\"%s\"')"
    where = "WHERE user_id = 'ann' AND meter = 'premium_voice'"
    execute(settings, f"UPDATE balance SET grants = {left_over % (18, 'gift')} {where}".replace("%", "%%"))
    assert any("grants" in text for text in verify_ledger(resources).differences)
    assert any("grants" in text for text in prove_ledger(resources).differences)
    execute(settings, f"UPDATE balance SET grants = {left_over % (18, 'order-1')} {where}".replace("%", "%%"))
    assert proved(resources)
    execute(settings, "ALTER TABLE usage_log DISABLE TRIGGER USER")
    execute(settings, "UPDATE usage_log SET grants = '{\"gift\": 9, \"order-1\": 3}' WHERE event_id = 'e1'")
    assert any("e1 took" in text for text in verify_ledger(resources).differences)
    assert any("rows up to" in text for text in prove_ledger(resources, whole=True).differences)
    execute(settings, "UPDATE usage_log SET grants = '{\"gift\": 10, \"order-1\": 2}' WHERE event_id = 'e1'")
    execute(settings, "ALTER TABLE usage_log ENABLE TRIGGER USER")
    assert verify_ledger(resources).differences == []


# ---------------------------------------------------------------------------------------------------------------------
# Beside the release before, and back to it


def as_before(settings: Settings, seq: int, event_id: str, units: int) -> None:
    """Charge purchased units as a worker of the release before does: it leaves the grants alone."""
    execute(
        settings,
        f"INSERT INTO usage_log (user_id, event_id, seq, meter, quantity, multiplier, amount, from_subscription, "
        f"from_rollover, from_purchased, overflow_to_debt, uncollected, period_start, occurred_at, applied_at, "
        f"clamped) "
        f"SELECT user_id, '{event_id}', {seq}, meter, {units}, 1, {units}, 0, 0, {units}, 0, 0, "
        f"coalesce(counted_from, period_start), ledger_now(), ledger_now(), false "
        f"FROM balance WHERE user_id = 'ann' AND meter = 'premium_voice'",
    )
    execute(
        settings,
        f"UPDATE balance SET purchased = purchased - {units}, lifetime_consumed = lifetime_consumed + {units} "
        f"WHERE user_id = 'ann' AND meter = 'premium_voice'",
    )
    execute(settings, f"UPDATE account SET seq = {seq} WHERE user_id = 'ann'")


def grant_as_before(settings: Settings, seq: int, key: str, units: int) -> None:
    """Grant as the release before does."""
    execute(
        settings,
        f"UPDATE balance SET purchased = purchased + {units}, lifetime_granted = lifetime_granted + {units} "
        f"WHERE user_id = 'ann' AND meter = 'premium_voice'",
    )
    execute(
        settings,
        f"INSERT INTO ledger_entry (user_id, seq, entry_key, meter, kind, used_change, rollover_change, "
        f"purchased_change, used_after, rollover_after, purchased_after, detail, created_at) "
        f"SELECT user_id, {seq}, 'grant:{key}', meter, 'grant', 0, 0, {units}, used, rollover, purchased, '{{}}', "
        f"ledger_now() FROM balance WHERE user_id = 'ann' AND meter = 'premium_voice'",
    )
    execute(settings, f"UPDATE account SET seq = {seq} WHERE user_id = 'ann'")


def test_a_dyno_of_the_release_before_charges_and_grants_beside_this_one(
    settings: Settings, resources: Resources
) -> None:
    grant(resources, 10, "gift", category="promotional", expires_at=START + DAY)
    grant(resources, 20, "order-1", priority=60)
    version = accounts.show(resources, USER).version
    as_before(settings, version + 1, "old-1", 13)
    assert left(resources) == {"order-1": 17}
    grant_as_before(settings, version + 2, "old-order", 8)  # pays before priority 60
    assert list(left(resources).items()) == [("", 8), ("order-1", 17)]
    grant_as_before(settings, version + 3, "old-order-2", 1)
    assert use(resources, "e1", 10) == {"": 9, "order-1": 1}
    as_before(settings, accounts.show(resources, USER).version + 1, "old-2", 16)
    assert rows(settings, KEPT, USER, METER) == [(None, None)]
    assert explain(resources, USER, "old-1").grants == ()
    credits.reverse(resources, USER, "old-1")
    assert left(resources) == {"": 13}
    drain(settings, USER)
    assert proved(resources)
