"""A wallet on real servers: one pot of credits, several meters at their prices, and books that agree to the unit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from redis import Redis

from config.catalogue import load_catalogue
from config.settings import Settings
from schemas.answers import HoldState, Parts, Reason
from tests.client.clients import open_client
from tests.support.ledger import empty_ledger, give_account, rows
from tests.support.resources import worker_resources
from tests.support.streams import drain, pending_of
from worker.admin import accounts, catalogues, credits, erasure, transfer
from worker.admin.catalogue_diff import differences
from worker.client import Billing
from worker.errors import AccountError, EventConflict, UsageLimitExceeded
from worker.ledger import reports as statements
from worker.ledger.connection import batch_connection
from worker.reports import usage
from worker.reports.explain import explain
from worker.reports.overviews import open_overviews
from worker.reports.proof import verify_ledger

USER = "u1"
VOICE, LOCAL, TOKENS, CREDITS = "premium_voice", "server_kokoro", "ocr_tokens", "credits"


@pytest.fixture(params=["blocking", "asyncio"])
def billing(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Any]:
    """Either client; the user has 10,000 credits a month."""
    give_account(settings, USER, "studio")
    with closing(open_client(request.param, settings)) as client:
        yield client


@pytest.fixture
def blocking(settings: Settings) -> Iterator[Billing]:
    """The blocking client, where one will do; the same user."""
    give_account(settings, USER, "studio")
    with Billing.connect(settings) as client:
        yield client


def proven(settings: Settings) -> None:
    """Every balance follows from its changes, also what Redis has cached."""
    with worker_resources(settings) as resources:
        assert verify_ledger(resources).differences == []


def buckets(settings: Settings, meter: str = CREDITS) -> tuple[object, ...]:
    """Used, rollover and purchased of a meter, as they are stored."""
    (found,) = rows(
        settings, "SELECT used, rollover, purchased FROM balance WHERE user_id = %s AND meter = %s", USER, meter
    )
    return found


def log(settings: Settings, *columns: str) -> list[tuple[object, ...]]:
    """These columns of the usage log, in the order of the events."""
    return rows(settings, f"SELECT {', '.join(columns)} FROM usage_log WHERE user_id = %s ORDER BY seq", USER)


# ---------------------------------------------------------------------------------------------------------------------
# Checks, holds and charges


def test_a_check_speaks_of_the_meter_and_of_its_wallet(billing: Any) -> None:
    answer = billing.check(USER, VOICE, 3_333)
    assert (answer.allowed, answer.reason, answer.available) == (True, Reason.WITHIN_LIMIT, 3_333)
    assert (answer.wallet, answer.price, answer.cost) == (CREDITS, "3", 9_999)
    assert (answer.limit, answer.used, answer.pending, answer.kind) == (10_000, 0, 0, "monthly")
    assert not billing.check(USER, VOICE, 3_334).allowed
    assert billing.check(USER, TOKENS, 5_000_000).allowed
    assert billing.check(USER, TOKENS, 5_000_499).available == 5_000_499
    assert not billing.check(USER, TOKENS, 5_000_500).allowed
    own = billing.check(USER, CREDITS, 10_000)
    assert (own.allowed, own.wallet, own.price, own.cost) == (True, None, None, None)


def test_everything_pending_counts_together(billing: Any, settings: Settings) -> None:
    billing.reserve(USER, VOICE, 1_000, "voice")  # 3,000
    billing.emit(USER, LOCAL, 2_500, event_id="local")  # 2,500
    billing.charge(USER, TOKENS, 500_000, "tokens")  # 1,000
    billing.charge(USER, CREDITS, 500, "direct")  # 500
    left = {meter: billing.remaining(USER, meter) for meter in (VOICE, LOCAL, TOKENS, CREDITS)}
    assert {meter: answer.remaining for meter, answer in left.items()} == {
        VOICE: 1_000, LOCAL: 3_000, TOKENS: 1_500_499, CREDITS: 3_000,
    }  # fmt: skip
    assert {answer.pending for answer in left.values()} == {7_000}
    assert (left[VOICE].wallet, left[VOICE].price, left[VOICE].limit) == (CREDITS, "3", 10_000)
    assert left[CREDITS].wallet is None
    assert not billing.check(USER, VOICE, 1_001).allowed
    drain(settings, USER)
    assert buckets(settings) == (4_000, 0, 0)
    assert {meter: billing.remaining(USER, meter).remaining for meter in left} == {
        VOICE: 1_000, LOCAL: 3_000, TOKENS: 1_500_499, CREDITS: 3_000,
    }  # fmt: skip
    proven(settings)


def test_a_hold_is_in_units_of_its_meter(billing: Any, settings: Settings, redis: Redis) -> None:
    held = billing.reserve(USER, VOICE, 3_000, "k").answer
    assert (held.amount, held.left) == (3_000, 3_000)
    assert pending_of(redis, settings, USER, VOICE) == {"h:k": 3_000, "total": 3_000}
    with pytest.raises(UsageLimitExceeded) as caught:
        billing.reserve(USER, LOCAL, 1_001, "other")
    assert (caught.value.answer.available, caught.value.answer.cost) == (1_000, 1_001)
    with pytest.raises(UsageLimitExceeded):
        billing.extend(USER, VOICE, "k", amount=3_334)
    assert billing.extend(USER, VOICE, "k", amount=3_333).amount == 3_333
    billing.capture(USER, VOICE, "k", "page-1", 1_000)
    assert billing.check(USER, CREDITS, 1).available == 1
    billing.settle(USER, VOICE, "k", 500)
    assert billing.check(USER, CREDITS, 1).available == 5_500
    drain(settings, USER)
    assert buckets(settings) == (4_500, 0, 0)
    assert billing.reserve(USER, TOKENS, 2_750_000, "t").answer.left == 2_750_000
    assert billing.release(USER, TOKENS, "t").state is HoldState.HELD
    proven(settings)


def test_a_charge_names_the_parts_of_the_wallet_and_a_repeat_the_same(billing: Any, settings: Settings) -> None:
    with worker_resources(settings) as resources:
        credits.grant(resources, USER, CREDITS, 50, "order-1")
    drain(settings, USER)
    first = billing.charge(USER, VOICE, 3_340, "c")
    assert (first.amount, first.wallet) == (3_340, CREDITS)
    assert first.expected == Parts(from_subscription=10_000, from_purchased=20)
    again = billing.charge(USER, VOICE, 3_340, "c")
    assert (again.repeated, again.expected, again.wallet) == (True, first.expected, CREDITS)
    with pytest.raises(UsageLimitExceeded) as caught:
        billing.charge(USER, VOICE, 11, "d")
    assert (caught.value.answer.available, caught.value.answer.cost) == (10, 33)
    with pytest.raises(EventConflict):
        billing.charge(USER, VOICE, 3_339, "c")
    drain(settings, USER)
    assert buckets(settings) == (10_000, 0, 30)
    proven(settings)


def test_a_charge_whose_outcome_is_forgotten_is_a_repeat_while_it_waits_and_after(
    blocking: Billing, settings: Settings, redis: Redis
) -> None:
    first = blocking.charge(USER, VOICE, 3_333, "c")
    for key in redis.scan_iter(match="mf:{p*}:charge:*"):
        redis.delete(key)
    waiting = blocking.charge(USER, VOICE, 3_333, "c")
    assert (waiting.repeated, waiting.expected, waiting.wallet) == (True, first.expected, CREDITS)
    drain(settings, USER)
    for key in redis.scan_iter(match="mf:{p*}:charge:*"):
        redis.delete(key)
    recorded = blocking.charge(USER, VOICE, 3_333, "c")
    assert (recorded.repeated, recorded.amount, recorded.wallet) == (True, 3_333, CREDITS)
    assert recorded.expected == Parts(from_subscription=9_999)


def test_an_estimate_costs_what_the_event_will(billing: Any, settings: Settings) -> None:
    found = billing.estimate(USER, VOICE, 1_000, multiplier="1.5")
    assert (found.amount, found.cost, found.allowed) == (1_500, 4_500, True)
    assert found.expected == Parts(from_subscription=4_500)
    assert found.sponsorship.charge == 4_500, "the pool is asked for units of the wallet"
    assert not billing.estimate(USER, VOICE, 3_334).allowed
    billing.emit(USER, VOICE, 1_000, multiplier="1.5", event_id="e")
    drain(settings, USER)
    assert log(settings, "amount") == [(4_500,)]


def test_32_at_once_for_the_last_credit(blocking: Billing, settings: Settings) -> None:
    """Through three meters; nobody gets a credit twice."""
    blocking.charge(USER, CREDITS, 9_991, "before")  # 9 are left
    start = Barrier(32)

    def attempt(number: int) -> int:
        start.wait(10)
        meter, cost = ((VOICE, 3), (LOCAL, 1), (CREDITS, 1))[number % 3]
        try:
            if number % 2:
                blocking.charge(USER, meter, 1, f"c{number}")
            else:
                blocking.reserve(USER, meter, 1, f"k{number}")
        except UsageLimitExceeded:
            return 0
        return cost

    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(attempt, range(32))) == 9
    assert blocking.remaining(USER, CREDITS).remaining == 0
    drain(settings, USER)
    proven(settings)


def test_without_redis_the_ledger_holds_against_the_wallet(blocking: Billing, settings: Settings) -> None:
    blocking.emit(USER, TOKENS, 499, event_id="e")  # 0.998 credits are carried
    drain(settings, USER)
    alone = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with Billing.connect(alone) as lonely:
        lonely.reserve(USER, VOICE, 3_000, "k1")
        answer = lonely.check(USER, LOCAL, 1_001)
        assert (answer.allowed, answer.available, answer.pending, answer.wallet) == (False, 1_000, 9_000, CREDITS)
        lonely.reserve(USER, LOCAL, 999, "k2")
        assert lonely.remaining(USER, TOKENS).remaining == 500
        assert lonely.check(USER, TOKENS, 1).cost == 1
        with pytest.raises(UsageLimitExceeded):
            lonely.reserve(USER, LOCAL, 2, "k3")
    assert blocking.remaining(USER, CREDITS).remaining == 1, "Redis takes the holds over"


# ---------------------------------------------------------------------------------------------------------------------
# Caps inside the wallet


@pytest.fixture
def capped(settings: Settings, tmp_path: Path) -> Settings:
    """Settings whose plan lets voice have 600 of the credits only."""
    text = settings.catalogue_path.read_text(encoding="utf-8")
    before = 'meters.credits = { quantity = 10_000, cadence = "monthly" }'
    assert text.count(before) == 1
    path = tmp_path / "catalogue.toml"
    path.write_text(text.replace(before, before[:-2] + ", caps = { meter = { premium_voice = 600 } } }"))
    return settings.model_copy(update={"catalogue_path": path})


def test_a_cap_inside_the_wallet(capped: Settings) -> None:
    give_account(capped, USER, "studio")
    with Billing.connect(capped) as billing:
        assert billing.remaining(USER, VOICE).remaining == 200
        billing.reserve(USER, VOICE, 50, "k")
        billing.charge(USER, VOICE, 100, "c")
        answer = billing.check(USER, VOICE, 51)
        assert (answer.allowed, answer.reason, answer.available) == (False, Reason.METER_CAP_EXCEEDED, 50)
        assert (answer.cap, answer.cap_used, answer.cap_pending, answer.cost) == (600, 0, 450, 153)
        assert billing.check(USER, LOCAL, 9_550).allowed, "only voice has a cap"
        with pytest.raises(UsageLimitExceeded):
            billing.reserve(USER, VOICE, 51, "other")
        drain(capped, USER)
        answer = billing.check(USER, VOICE, 51)
        assert (answer.available, answer.cap_used, answer.cap_pending) == (50, 300, 150)
        billing.settle(USER, VOICE, "k", 500)  # work that was done is recorded, whatever the cap
        drain(capped, USER)
        assert billing.remaining(USER, VOICE).remaining == 0
    assert buckets(capped) == (1_800, 0, 0)
    with worker_resources(capped) as resources:
        credits.reverse(resources, USER, "k")
        drain(capped, USER)
        assert buckets(capped) == (300, 0, 0)
        summary = {each.meter: each for each in usage.usage_summary(resources, USER).meters}
        assert (summary[VOICE].wallet_used, summary[VOICE].quantity, summary[VOICE].available) == (300, 100, 100)
        assert (summary[CREDITS].caps, summary[CREDITS].cap_used) == ({VOICE: 600}, {VOICE: 300})
    proven(capped)


# ---------------------------------------------------------------------------------------------------------------------
# The books


def test_the_log_keeps_meter_quantity_and_price(blocking: Billing, settings: Settings) -> None:
    blocking.emit(USER, VOICE, 1, multiplier="1.5", event_id="a")
    blocking.emit(USER, VOICE, 1, multiplier="1.5", event_id="b")
    blocking.emit(USER, TOKENS, 499, event_id="c")
    blocking.emit(USER, CREDITS, 7, event_id="d")
    blocking.emit(USER, TOKENS, 1, event_id="e")
    drain(settings, USER)
    columns = ("event_id", "meter", "quantity", "multiplier::text", "wallet", "price::text", "amount", "remainder")
    assert log(settings, *columns) == [
        ("a", VOICE, 1, "1.5", CREDITS, "3", 4, 500_000),
        ("b", VOICE, 1, "1.5", CREDITS, "3", 5, 0),
        ("c", TOKENS, 499, "1", CREDITS, "0.002", 0, 998_000),
        ("d", CREDITS, 7, "1", None, None, 7, None),
        ("e", TOKENS, 1, "1", CREDITS, "0.002", 1, 0),
    ]
    assert buckets(settings) == (17, 0, 0)
    assert buckets(settings, VOICE) == (0, 0, 0)
    proven(settings)


def test_explain_names_price_and_wallet(blocking: Billing, settings: Settings) -> None:
    blocking.emit(USER, VOICE, 3_334, event_id="a")
    blocking.emit(USER, VOICE, 1, multiplier="1.5", event_id="b")
    drain(settings, USER)
    with worker_resources(settings) as resources:
        found = explain(resources, USER, "a")
        assert (found.meter, found.wallet, found.price, found.amount, found.wallet_unit) == (
            VOICE, CREDITS, "3", 10_002, "credits",
        )  # fmt: skip
        assert found.sentences[0] == (
            "Event a used 3,334 of premium_voice (characters), which draws on the wallet credits at 3 a unit: "
            "10,002 credits."
        )
        assert (found.before, found.after) == (
            found.before.model_copy(update={"used": 0, "rollover": 0}),  # type: ignore[union-attr]
            found.after.model_copy(update={"used": 10_000, "rollover": -2}),  # type: ignore[union-attr]
        )
        assert "The subscription paid 10,000 of the 10,000 left of its 10,000." in found.sentences
        fraction = explain(resources, USER, "b")
        assert (fraction.carried_before, fraction.carried_after) == ("0", "0.5")
        assert fraction.sentences[1].startswith("Exactly that is 4.5: with 0 carried from earlier events it paid 4")


def test_reports_have_both_units(blocking: Billing, settings: Settings) -> None:
    facts: dict[str, Any] = {"voice_slug": "narrator", "document_id": "d1", "page_idx": 3}
    blocking.emit(USER, VOICE, 100, event_id="a", dimensions=facts)
    blocking.emit(USER, TOKENS, 5_000, event_id="b")
    blocking.emit(USER, CREDITS, 7, event_id="c")
    drain(settings, USER)
    with worker_resources(settings) as resources:
        summary = {each.meter: each for each in usage.usage_summary(resources, USER).meters}
        voice, own = summary[VOICE], summary[CREDITS]
        assert (voice.unit, voice.quantity, voice.wallet, voice.price, voice.wallet_used) == (
            "characters", 100, CREDITS, "3", 300,
        )  # fmt: skip
        assert (voice.limit, voice.used, voice.available) == (10_000, 317, 3_227)
        assert (own.used, own.available, own.wallet, own.cap_used) == (317, 9_683, None, {VOICE: 300, TOKENS: 10})
        periods = {each.meter: each for each in usage.breakdown(resources, USER).periods}
        drawn = periods[f"{VOICE}@{CREDITS}"]
        assert (drawn.unit, drawn.events, drawn.quantity, drawn.amount) == ("credits", 1, 100, 300)
        assert (periods[CREDITS].quantity, periods[CREDITS].amount) == (7, 7)
        found = usage.breakdown(resources, USER)
        assert [(each.meter, each.voice, each.quantity, each.amount) for each in found.voices if each.voice] == [
            (f"{VOICE}@{CREDITS}", "narrator", 100, 300)
        ]
        assert [(each.meter, each.document_id, each.pages) for each in found.documents] == [
            (f"{VOICE}@{CREDITS}", "d1", 1)
        ]
        assert usage.engagement(resources, USER).characters == 100
        changes = [change for change in usage.timeline(resources, USER).changes if change.kind == "usage"]
        assert [(change.meter, change.wallet, change.amount) for change in changes] == [
            (CREDITS, None, 7), (TOKENS, CREDITS, 10), (VOICE, CREDITS, 300),
        ]  # fmt: skip
        (event, *_) = usage.events(resources, USER, limit=3).events[::-1]
        assert (event.wallet, event.price, event.amount, event.quantity) == (CREDITS, "3", 300, 100)
        (snapshot,) = usage.snapshot(resources)
        assert {each.meter: each.quantity for each in snapshot.meters if each.wallet} == {
            VOICE: 100, TOKENS: 5_000, LOCAL: 0,
        }  # fmt: skip


def test_reports_are_the_same_after_a_roll_up(blocking: Billing, settings: Settings) -> None:
    blocking.emit(USER, VOICE, 100, event_id="a")
    blocking.emit(USER, CREDITS, 7, event_id="b")
    drain(settings, USER)
    with worker_resources(settings) as resources:
        before = usage.breakdown(resources, USER).periods
        with batch_connection(resources.engine) as postgres:
            assert not statements.roll_up(postgres, USER, 1_000)
        assert usage.breakdown(resources, USER).periods == before
        explained = explain(resources, USER, "b")
        assert explained.before is not None
        assert explained.before.used == 300
        with open_overviews(resources) as reports:
            asked = list(reports.usage(reports.span(None, None)))
        assert {(each.meter, each.events, each.amount) for each in asked} == {
            (f"{VOICE}@{CREDITS}", 1, 300), (CREDITS, 1, 7),
        }  # fmt: skip
    proven(settings)


def test_a_reversal_gives_back_to_the_wallet(blocking: Billing, settings: Settings) -> None:
    with worker_resources(settings) as resources:
        credits.grant(resources, USER, CREDITS, 60, "order-1", category="promotional")
        drain(settings, USER)
        blocking.emit(USER, VOICE, 3_350, event_id="a")  # 10,050
        drain(settings, USER)
        assert buckets(settings) == (10_000, 0, 10)
        credits.reverse(resources, USER, "a")
        assert credits.reverse(resources, USER, "a").repeated
        drain(settings, USER)
        assert buckets(settings) == (0, 0, 60)
        assert usage.engagement(resources, USER).characters == 0
    assert rows(settings, "SELECT lifetime_consumed FROM balance WHERE meter = 'credits'") == [(0,)]
    assert rows(settings, "SELECT meter FROM ledger_entry WHERE kind = 'reversal'") == [(CREDITS,)]
    assert blocking.remaining(USER, VOICE).remaining == 3_353
    proven(settings)


def test_an_event_dearer_than_any_may_be_is_a_dead_letter(blocking: Billing, settings: Settings) -> None:
    blocking.emit(USER, VOICE, 333_333_333_334, event_id="a")
    blocking.emit(USER, VOICE, 1, event_id="b")
    drain(settings, USER)
    assert log(settings, "event_id") == [("b",)]
    ((reason, detail),) = rows(settings, "SELECT reason, detail FROM dead_letter")
    assert reason == "amount_out_of_range"
    assert str(detail).endswith("price 3: at most 1000000000000 of credits")
    assert blocking.remaining(USER, VOICE).pending == 0
    proven(settings)


def test_a_meter_that_the_plan_lacks_is_recorded_by_itself(blocking: Billing, settings: Settings) -> None:
    blocking.emit(USER, "relay_credits", 5, event_id="a")
    drain(settings, USER)
    assert log(settings, "meter", "wallet", "amount") == [("relay_credits", None, 5)]
    assert buckets(settings) == (0, 0, 0)
    proven(settings)


# ---------------------------------------------------------------------------------------------------------------------
# Plans and catalogues


def test_to_a_plan_with_a_wallet_and_back(settings: Settings) -> None:
    """What the meter had of its own pays nothing meanwhile, and is there again."""
    give_account(settings, USER, "basic", buckets={VOICE: (40_000, 500, 70)})
    with worker_resources(settings) as resources, Billing.connect(settings) as billing:
        assert billing.remaining(USER, VOICE).remaining == 60_570
        accounts.change_plan(resources, USER, "studio")
        drain(settings, USER)
        assert billing.remaining(USER, VOICE).remaining == 3_333
        billing.emit(USER, VOICE, 10, event_id="a")
        drain(settings, USER)
        assert buckets(settings, VOICE) == (40_000, 500, 70)
        with pytest.raises(AccountError, match=r"^meter: premium_voice draws on the wallet credits in plan studio"):
            credits.grant(resources, USER, VOICE, 5, "order-1")
        accounts.change_plan(resources, USER, "basic")
        drain(settings, USER)
        assert billing.remaining(USER, VOICE).remaining == 60_570
        billing.emit(USER, VOICE, 10, event_id="b")
        drain(settings, USER)
        assert log(settings, "event_id", "wallet", "amount") == [("a", CREDITS, 30), ("b", None, 10)]
        assert buckets(settings, VOICE) == (40_010, 500, 70)
    proven(settings)


def test_the_price_of_the_stream_time_counts(settings: Settings, tmp_path: Path) -> None:
    """An event that waited while another price came into force costs what it did when it came."""
    give_account(settings, USER, "studio")
    text = settings.catalogue_path.read_text(encoding="utf-8")
    dearer = tmp_path / "dearer.toml"
    dearer.write_text(text.replace('premium_voice = { wallet = "credits", price = "3" }',
                                   'premium_voice = { wallet = "credits", price = "4.5" }'))  # fmt: skip
    with worker_resources(settings) as resources, Billing.connect(settings) as billing:
        resources.claim()
        billing.emit(USER, VOICE, 10, event_id="a")

        found = differences(resources, load_catalogue(dearer))
        assert [
            (each.plan, each.meter, each.field, each.in_force, each.catalogue, each.accounts) for each in found
        ] == [("studio", VOICE, "price", "3", "4.5", 1)]
        catalogues.apply(resources, load_catalogue(dearer), by="test")
        billing.emit(USER, VOICE, 10, event_id="b")
    drain(settings, USER)
    assert log(settings, "event_id", "price::text", "amount") == [("a", "3", 30), ("b", "4.5", 45)]
    assert buckets(settings) == (75, 0, 0)
    proven(settings)


def test_an_account_with_a_wallet_moves_to_another_ledger(blocking: Billing, settings: Settings, redis: Redis) -> None:
    blocking.emit(USER, TOKENS, 499, event_id="a")
    blocking.emit(USER, VOICE, 10, event_id="b")
    drain(settings, USER)
    with worker_resources(settings) as resources:
        lines: list[str] = []
        transfer.export_accounts(resources, lines.append)
    empty_ledger(str(settings.database_url))
    redis.flushdb()
    with worker_resources(settings) as resources:
        assert transfer.import_accounts(resources, "".join(lines)).accounts == 1
        again: list[str] = []
        transfer.export_accounts(resources, again.append)
    assert json.loads(again[0])["meters"] == json.loads(lines[0])["meters"]
    drain(settings, USER)
    blocking.emit(USER, TOKENS, 1, event_id="c")
    drain(settings, USER)
    assert log(settings, "amount", "remainder") == [(1, 0)], "the fraction came along"
    proven(settings)


def test_a_closed_account_leaves_a_history_with_its_prices(blocking: Billing, settings: Settings) -> None:
    blocking.emit(USER, VOICE, 10, event_id="a")
    drain(settings, USER)
    with worker_resources(settings) as resources:
        erasure.close_account(resources, USER)
    ((user_id, *row),) = rows(settings, "SELECT user_id, meter, quantity, wallet, price::text, amount FROM usage_log")
    assert str(user_id).startswith("closed:")
    assert row == [VOICE, 10, CREDITS, "3", 30]
    proven(settings)
