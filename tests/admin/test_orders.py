"""Orders and their refunds: each order counts once in all accounts, and no refund takes more than was bought."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Event

import pytest
from redis import Redis

from config.settings import Settings
from schemas.events import MAX_TOTAL
from tests.admin.test_accounts import METER, OTHER, USER, bill, buckets
from tests.support.ledger import empty_ledger, execute, give_account, rows
from tests.support.streams import drain
from tests.support.waiting import wait_until
from worker.admin import accounts, credits, transfer
from worker.admin.erasure import close_account
from worker.client import Billing
from worker.errors import AccountError, KeyConflict, OrderUsed
from worker.ledger.connection import Postgres
from worker.ledger.orders import OrderKind, claim_key
from worker.reports.proof import verify_ledger
from worker.resources import Resources


@pytest.fixture(autouse=True)
def two_accounts(settings: Settings) -> None:
    give_account(settings, USER, "basic")
    give_account(settings, OTHER, "basic")


def consistent(resources: Resources) -> bool:
    return verify_ledger(resources).differences == []


# ---------------------------------------------------------------------------------------------------------------------
# Once in all accounts


def test_an_order_is_granted_to_one_account(resources: Resources) -> None:
    credits.grant(resources, USER, METER, 5_000, "order-7")
    with pytest.raises(OrderUsed, match=r"^key: order-7 was used by another account$") as refused:
        credits.grant(resources, OTHER, METER, 5_000, "order-7")
    assert (refused.value.field, refused.value.key) == ("key", "order-7")
    assert USER not in str(refused.value)
    assert credits.grant(resources, USER, METER, 5_000, "order-7").repeated
    credits.grant(resources, USER, "ocr_tokens", 30, "order-7")  # one order of two things
    assert (buckets(resources)[2], buckets(resources, METER, OTHER)[2]) == (5_000, 0)
    assert consistent(resources)


def test_an_invoice_renews_one_account(settings: Settings, resources: Resources) -> None:
    now = datetime.now(UTC)
    before = rows(settings, "SELECT period_start, period_end, used FROM balance WHERE user_id = %s", OTHER)
    for invoice, start in (("in_now", now), ("in_ahead", now + timedelta(days=5))):
        accounts.renew(resources, USER, invoice, start, now + timedelta(days=30))
        with pytest.raises(OrderUsed, match=rf"^invoice_id: {invoice} was used by another account$") as refused:
            accounts.renew(resources, OTHER, invoice, start, now + timedelta(days=30))
        assert (refused.value.field, refused.value.key) == ("invoice_id", invoice)
        drain(settings, USER)
        assert accounts.renew(resources, USER, invoice, start, now + timedelta(days=30)).repeated
    assert rows(settings, "SELECT period_start, period_end, used FROM balance WHERE user_id = %s", OTHER) == before
    # One that changes nothing renews nobody: the right account may have it.
    old = now - timedelta(days=60), now - timedelta(days=30)
    assert accounts.renew(resources, USER, "in_old", *old).stale
    accounts.open_new(resources, "late", "basic", start=old[0])
    assert not accounts.renew(resources, "late", "in_old", *old).stale
    assert consistent(resources)


def test_two_accounts_that_use_an_order_at_once(
    settings: Settings, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_claimed, may_commit = Event(), Event()
    real = claim_key

    def claim(postgres: Postgres, kind: OrderKind, key: str, user_id: str) -> str:
        found = real(postgres, kind, key, user_id)
        if user_id == USER:
            has_claimed.set()
            assert may_commit.wait(10)
        return found

    monkeypatch.setattr("worker.admin.change.claim_key", claim)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(credits.grant, resources, USER, METER, 5_000, "order-7")
        assert has_claimed.wait(10)
        second = pool.submit(credits.grant, resources, OTHER, METER, 5_000, "order-7")
        waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        wait_until(lambda: second.done() or bool(rows(settings, waits)), "the second waits for the first")
        may_commit.set()
        assert not first.result(10).repeated
        with pytest.raises(OrderUsed):
            second.result(10)
    assert buckets(resources, METER, OTHER)[2] == 0
    assert consistent(resources)


def test_a_grant_that_is_refused_leaves_its_order_to_others(settings: Settings, resources: Resources) -> None:
    give_account(settings, "rich", "basic", buckets={METER: (0, 0, MAX_TOTAL)})
    with pytest.raises(AccountError, match=r"^amount: purchased would exceed"):
        credits.grant(resources, "rich", METER, 5, "order-7")
    credits.grant(resources, OTHER, METER, 5, "order-7")
    assert consistent(resources)


def test_the_order_of_an_erased_account_stays_used(settings: Settings, resources: Resources) -> None:
    credits.grant(resources, USER, METER, 5_000, "order-7")
    drain(settings, USER)
    close_account(resources, USER, forfeit=True)
    assert rows(settings, "SELECT count(*) FROM order_key WHERE user_id = %s", USER) == [(0,)]
    with pytest.raises(OrderUsed, match=r"^key: order-7 was used by another account$"):
        credits.grant(resources, OTHER, METER, 5_000, "order-7")
    assert consistent(resources)


def test_a_proof_finds_orders_that_count_twice_or_are_not_noted(settings: Settings, resources: Resources) -> None:
    credits.grant(resources, USER, METER, 5_000, "order-7")
    execute(settings, "UPDATE order_key SET user_id = %s", OTHER)
    assert verify_ledger(resources).differences == [f"{USER}: ledger entry grant:order-7 is the key of {OTHER}"]
    execute(settings, "DELETE FROM order_key")
    assert verify_ledger(resources).differences == [f"{USER}: ledger entry grant:order-7 has no row in order_key"]


# ---------------------------------------------------------------------------------------------------------------------
# To debtors


@pytest.mark.parametrize(
    ("used", "granted", "missing"),
    [(0, 20, 0), (99_980, 20, 10), (100_000, 20, 30), (100_000, 50, 0), (100_000, 60, 0)],
)
def test_a_grant_to_a_debtor_tells_how_much_is_missing(
    settings: Settings, resources: Resources, used: int, granted: int, missing: int
) -> None:
    give_account(settings, "debtor", "basic", buckets={METER: (used, -50, 0)})
    for _ in range(2):
        answer = credits.grant(resources, "debtor", METER, granted, "o1")
        assert (answer.owes, answer.missing) == (50, missing)
    drain(settings, "debtor")
    with Billing.connect(settings) as billing:
        left = billing.check("debtor", METER).available
        assert left is not None
        assert left - missing == 100_000 - used - 50 + granted


def test_a_grant_that_is_refused_opens_no_account(settings: Settings, resources: Resources) -> None:
    credits.grant(resources, USER, METER, 5, "order-7")
    for plan, pattern in ((None, r"^user_id: no account new; "), ("basic", r"^key: order-7 was used")):
        with pytest.raises(AccountError, match=pattern):
            credits.grant(resources, "new", METER, 5, "order-7", open_plan=plan)
    assert rows(settings, "SELECT FROM account WHERE user_id = 'new'") == []
    assert credits.grant(resources, "new", METER, 5, "order-8", open_plan="basic").account.plan == "basic"


# ---------------------------------------------------------------------------------------------------------------------
# Refunds


def refund(
    resources: Resources, *arguments: object, user: str = USER, **options: object
) -> tuple[int, int, bool, bool]:
    """Claw back; return units taken, debt, and whether it was repeated or stale."""
    answer = credits.claw_back(resources, user, METER, *arguments, **options)  # type: ignore[arg-type]
    return answer.taken, answer.debt, answer.repeated, answer.stale


def test_a_refund_takes_what_is_left_of_its_order(settings: Settings, redis: Redis, resources: Resources) -> None:
    credits.grant(resources, USER, METER, 5_000, "order-9")
    credits.grant(resources, USER, METER, 1_000, "order-10")
    assert refund(resources, 2_500, "re_1", order="order-9") == (2_500, 0, False, False)
    assert refund(resources, 2_500, "re_1", order="order-9") == (2_500, 0, True, False)
    with pytest.raises(AccountError, match=r"at most 2500; order-9 gave 5000, 2500 were taken back \(got 5000\)$"):
        refund(resources, 5_000, "re_2", order="order-9")
    bill(settings, redis, ("e1", METER, 103_000))
    assert refund(resources, 2_500, "re_2", order="order-9") == (2_500, 2_000, False, False)
    with pytest.raises(AccountError, match=r"at most 0; order-9 gave 5000, 5000 were taken back \(got 1\)$"):
        refund(resources, 1, "re_3", order="order-9")
    assert buckets(resources) == (100_000, -2_000, 0)
    assert consistent(resources)


def test_totals_come_again_and_in_any_order(resources: Resources) -> None:
    credits.grant(resources, USER, METER, 5_000, "ch_1")
    assert refund(resources, order="ch_1", total_refunded=1_000) == (1_000, 0, False, False)
    assert refund(resources, order="ch_1", total_refunded=1_000) == (1_000, 0, True, False)
    assert refund(resources, key="evt_2", order="ch_1", total_refunded=4_000) == (3_000, 0, False, False)
    assert refund(resources, key="evt_3", order="ch_1", total_refunded=2_500) == (0, 0, False, True)
    assert refund(resources, key="evt_4", order="ch_1", total_refunded=4_000) == (0, 0, True, False)
    assert refund(resources, key="evt_2", order="ch_1", total_refunded=4_000) == (3_000, 0, True, False)
    with pytest.raises(KeyConflict, match=r"^key: evt_2 was used for 3000 of .* of order ch_1, as the total 4000"):
        refund(resources, key="evt_2", order="ch_1", total_refunded=4_500)
    with pytest.raises(AccountError, match=r"^total_refunded: must be at most 5000; .* \(got 5001\)"):
        refund(resources, order="ch_1", total_refunded=5_001)
    assert buckets(resources)[2] == 1_000
    assert consistent(resources)


def test_without_an_order_a_refund_takes_at_most_what_was_bought(resources: Resources) -> None:
    credits.grant(resources, USER, METER, 5_000, "order-9")
    with pytest.raises(AccountError, match=r"^amount: must be at most 5000, the .* bought .* \(got 900000\)$"):
        refund(resources, 900_000, "re_1")
    assert refund(resources, 4_000, "re_1") == (4_000, 0, False, False)
    # What was taken without naming the order cannot be taken once more by naming it.
    with pytest.raises(AccountError, match=r"most 1000; order-9 gave 5000, 0 were taken back, and 1000 are left of ev"):
        refund(resources, 5_000, "re_2", order="order-9")
    assert refund(resources, 1_000, "re_2", order="order-9") == (1_000, 0, False, False)
    assert buckets(resources)[2] == 0
    assert consistent(resources)


def test_an_order_goes_along_with_a_carry_over(settings: Settings, redis: Redis, resources: Resources) -> None:
    credits.grant(resources, OTHER, METER, 5_000, "order-9")
    refund(resources, 1_000, "re_1", order="order-9", user=OTHER)
    credits.carry_over(resources, OTHER, USER, "merge", meter=METER)
    with pytest.raises(AccountError, match=r"^order: order-9 was carried over to another account; take it back there$"):
        refund(resources, 1_000, "re_2", order="order-9", user=OTHER)
    with pytest.raises(AccountError, match=r"^amount: must be at most 0, "):
        refund(resources, 1, "re_2", user=OTHER)
    with pytest.raises(OrderUsed):
        credits.grant(resources, USER, METER, 5_000, "order-9")
    assert credits.grant(resources, OTHER, METER, 5_000, "order-9").repeated
    bill(settings, redis, ("e1", METER, 101_000))
    assert refund(resources, order="order-9", total_refunded=5_000) == (4_000, 1_000, False, False)
    assert buckets(resources) == (100_000, -1_000, 0)
    # And back again, with what is left of other orders.
    credits.grant(resources, USER, METER, 300, "order-10")
    accounts.set_status(resources, USER, "canceled")
    assert consistent(resources)


def test_refunds_of_former_releases_stay_as_they_were(settings: Settings, resources: Resources) -> None:
    """They had no bound and no order: the proof asks for none, and new refunds count them."""
    credits.grant(resources, USER, METER, 5_000, "order-9")
    credits.claw_back(resources, USER, METER, 5_000, "re_1")
    detail = '{"amount": 5002, "debt": 2, "cap_used": null, "parked": null}'
    execute(
        settings,
        f"""
        ALTER TABLE ledger_entry DISABLE TRIGGER USER;
        UPDATE ledger_entry SET rollover_change = -2, rollover_after = -2, detail = '{detail}' WHERE kind = 'clawback';
        ALTER TABLE ledger_entry ENABLE TRIGGER USER;
        UPDATE balance SET rollover = -2 WHERE meter = '{METER}' AND user_id = '{USER}'
        """,
    )
    assert consistent(resources)
    with pytest.raises(AccountError, match=r"^amount: must be at most 0, "):
        refund(resources, 1, "re_2")


@pytest.mark.parametrize("spoilt", ['{"allowed": 10000}', '{"amount": 2000}', '{"total_refunded": 3000}'])
def test_a_proof_finds_a_refund_that_breaks_the_bound(settings: Settings, resources: Resources, spoilt: str) -> None:
    credits.grant(resources, USER, METER, 5_000, "order-9")
    credits.claw_back(resources, USER, METER, order="order-9", total_refunded=1_000)
    assert consistent(resources)
    execute(
        settings,
        "ALTER TABLE ledger_entry DISABLE TRIGGER USER; UPDATE ledger_entry SET detail = detail || "
        f"'{spoilt}' WHERE kind = 'clawback'; ALTER TABLE ledger_entry ENABLE TRIGGER USER",
    )
    assert not consistent(resources)


# ---------------------------------------------------------------------------------------------------------------------
# In another ledger


def test_orders_move_with_their_account(settings: Settings, resources: Resources) -> None:
    credits.grant(resources, USER, METER, 5_000, "order-9", actor="shop")
    credits.grant(resources, OTHER, METER, 700, "order-10")
    refund(resources, 1_000, "re_1", order="order-9")
    credits.carry_over(resources, OTHER, USER, "merge", meter=METER)
    lines: list[str] = []
    transfer.export_accounts(resources, lines.append)
    text = "".join(lines)
    empty_ledger(settings.database_url or "")
    resources.claim()
    assert transfer.import_accounts(resources, text).accounts == 2
    again: list[str] = []
    transfer.export_accounts(resources, again.append)
    assert "".join(again) == text
    assert credits.grant(resources, USER, METER, 5_000, "order-9").repeated
    assert credits.grant(resources, OTHER, METER, 700, "order-10").repeated
    with pytest.raises(AccountError, match=r"^key: order-9 was used for 5000 of"):
        credits.grant(resources, USER, METER, 5_001, "order-9")
    with pytest.raises(OrderUsed):
        credits.grant(resources, OTHER, METER, 5_000, "order-9")
    with pytest.raises(AccountError, match=r"most 5000; order-9 gave 5000, 1000 were taken back \(got 5001\)$"):
        refund(resources, order="order-9", total_refunded=5_001)
    assert refund(resources, order="order-10", total_refunded=700) == (700, 0, False, False)
    with pytest.raises(AccountError, match=r"carried over"):
        refund(resources, 1, "re_9", order="order-10", user=OTHER)
    assert consistent(resources)


def test_an_order_is_imported_once(settings: Settings, resources: Resources) -> None:
    credits.grant(resources, USER, METER, 5, "order-9")
    lines: list[str] = []
    transfer.export_accounts(resources, lines.append)
    line = next(line for line in lines[0].splitlines() if USER in line)
    for text, pattern in (
        (line.replace(USER, "third"), r"^row 1: orders: must be new \(got 'order-9', which was used by another acc"),
        (
            "\n".join(line.replace("order-9", "o").replace(USER, name) for name in ("x", "y")),
            r"^row 2: orders: must be in",
        ),
    ):
        with pytest.raises(AccountError, match=pattern):
            transfer.import_accounts(resources, text)
