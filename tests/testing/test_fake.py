"""What a test does to a fake, and what it reads there."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any

import pytest
from fastapi import FastAPI

from config.catalogue import CatalogueError
from config.settings import SettingsError
from schemas.answers import HoldState, Parts, Reason, Serve
from tests.support.resources import settings_for
from worker.client import AsyncBilling, Billing, Hold
from worker.client.ledger import LedgerView
from worker.contrib.fastapi import lifespan
from worker.errors import AccountError, ClientClosed, InvalidRequest, RedisUnavailable, UsageLimitExceeded
from worker.testing import AsyncFakeBilling, FakeBilling
from worker.testing.ledger import MemoryLedger

USER, METER = "user-42", "credits"
NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def fake() -> FakeBilling:
    """A fake; the user has 1,000 credits."""
    return FakeBilling({USER: "tenant"})


def calls_of(client: type) -> dict[str, str]:
    """The public methods of a client, and their signatures."""
    found = inspect.getmembers(client, inspect.isfunction)
    return {name: str(inspect.signature(method)) for name, method in found if not name.startswith("_")}


@pytest.mark.parametrize(("fake_client", "client"), [(FakeBilling, Billing), (AsyncFakeBilling, AsyncBilling)])
def test_it_has_every_call_of_the_client(fake_client: type, client: type) -> None:
    assert issubclass(fake_client, client)
    assert len(calls_of(client)) > 18
    assert calls_of(client).items() <= calls_of(fake_client).items()


def test_its_ledger_answers_every_question() -> None:
    def parameters(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in methods if name[0] != "_"}

    assert len(parameters(LedgerView)) > 8
    assert parameters(LedgerView).items() <= parameters(MemoryLedger).items()


def test_balances_go_down_at_once(fake: FakeBilling) -> None:
    with fake.reserve(USER, METER, 250, "k") as hold:
        assert isinstance(hold, Hold)
        assert [(each.key, each.amount, each.left) for each in fake.holds] == [("k", 250, 250)]
        hold.settle(180, source="tts")
    assert fake.holds == []
    assert (fake.balance(USER, METER).used, fake.check(USER, METER).pending) == (180, 0)
    (event,) = fake.events
    assert (event.event_id, event.quantity, event.source, event.hold_key) == ("k", 180, "tts", "k")
    assert fake.parts(USER, "k") == Parts(from_subscription=180)


def test_events_wait_where_the_test_wants_it() -> None:
    fake = FakeBilling({USER: "tenant"}, apply_at_once=False)
    fake.emit(USER, METER, 30, event_id="e1")
    fake.emit(USER, METER, 30, event_id="e1")
    assert (fake.balance(USER, METER).used, fake.check(USER, METER).pending) == (0, 30)
    assert [event.event_id for event in fake.events] == ["e1"]
    with pytest.raises(KeyError):
        fake.parts(USER, "e1")
    fake.apply()
    assert (fake.balance(USER, METER).used, fake.check(USER, METER).pending) == (30, 0)
    assert [event.event_id for event in fake.events] == ["e1"]


def test_accounts_begin_as_a_test_says() -> None:
    fake = FakeBilling()
    fake.open(USER, "basic", purchased=5_000, used={"premium_voice": 99_000}, rollover={"premium_voice": -500})
    assert fake.check(USER, "premium_voice").available == 5_500
    assert fake.balance(USER, "ocr_tokens").purchased == 5_000
    fake.open("relay", "core", purchased=5_000)
    assert fake.balance("relay", "relay_credits").purchased == 0, "nothing could spend it"
    assert fake.open("late", "tenant", status="canceled").status == "canceled"
    assert fake.check("late", METER).available == 0


def test_accounts_change(fake: FakeBilling) -> None:
    assert fake.check(USER, METER).available == 1000
    assert fake.set_balance(USER, METER, used=400, purchased=7).used == 400
    assert fake.check(USER, METER).available == 607
    fake.set_status(USER, "unpaid")
    assert fake.check(USER, METER).available == 7
    assert fake.change_plan(USER, "basic").plan == "basic"
    fake.set_status(USER, "active")
    assert fake.check(USER, "premium_voice").available == 100_000
    fake.set_balance(USER, "premium_voice", rollover=5)
    assert fake.check(USER, "premium_voice").available == 100_005


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fake: fake.open(USER, "tenant"), "user-42 has an account already"),
        (lambda fake: fake.open("u", "gold"), "unknown code 'gold'"),
        (lambda fake: fake.open("u", "tenant", status="rich"), "status: unknown 'rich'; there are active, "),
        (lambda fake: fake.open("u", "tenant", trust="blind"), "trust: unknown 'blind'; there are new, "),
        (lambda fake: fake.open("u", "tenant", used={"minutes": 1}), "meter: unknown 'minutes'; there are credits"),
        (lambda fake: fake.open("u", "core", purchased={"relay_credits": 1}), "relay_credits does not spill"),
        (lambda fake: fake.open("u", "tenant", purchased=-1), "purchased: at least 0"),
        (lambda fake: fake.set_balance("u", METER, used=1), "no account u"),
        (lambda fake: fake.set_balance(USER, "minutes", used=1), "meter: unknown 'minutes'"),
        (lambda fake: fake.set_status("u", "active"), "no account u"),
        (lambda fake: fake.set_status(USER, "rich"), "status: unknown 'rich'"),
        (lambda fake: fake.change_plan(USER, "gold"), "unknown code 'gold'"),
        (lambda fake: fake.balance("u", METER), "no account u"),
        (lambda fake: fake.balance(USER, "minutes"), "meter: unknown 'minutes'"),
    ],
)
def test_what_cannot_be_is_named(fake: FakeBilling, change: Callable[[FakeBilling], object], said: str) -> None:
    with pytest.raises((AccountError, CatalogueError), match=said):
        change(fake)
    assert fake.balance(USER, METER).used == 0


def test_time_is_the_tests() -> None:
    fake = FakeBilling({USER: "tenant"}, now=NEW_YEAR)
    assert timedelta() <= fake.now - NEW_YEAR < timedelta(minutes=1)
    hold = fake.reserve(USER, METER, 400, "k", ttl_seconds=60)
    assert hold.answer.expires_at is not None
    assert hold.answer.expires_at - NEW_YEAR < timedelta(minutes=2)
    fake.advance(61)
    assert fake.holds == []
    assert hold.settle(70).hold is HoldState.EXPIRED
    (event,) = fake.events
    assert event.occurred_at is not None
    assert timedelta(minutes=1) < event.occurred_at - NEW_YEAR < timedelta(minutes=2)
    end = fake.balance(USER, METER).period_end
    assert end is not None
    assert timedelta() <= end - datetime(2026, 2, 1, tzinfo=UTC) < timedelta(minutes=1)
    fake.advance(timedelta(days=31))
    assert fake.check(USER, METER).available == 1000
    with pytest.raises(ValueError, match="seconds: at least 0"):
        fake.advance(-1)


def test_a_day_of_the_pool_ends() -> None:
    fake = FakeBilling()
    fake.open(USER, "tenant", trust="established")
    assert fake.decide(USER, 50, "r1").serve is Serve.FREE
    fake.settle_sponsored(USER, "r1", 50)
    assert fake.decide(USER, 1, "r2").serve is Serve.GATE
    fake.advance(timedelta(days=1))
    assert fake.decide(USER, 50, "r3").serve is Serve.FREE


def test_an_outage_ends_with_its_block(fake: FakeBilling) -> None:
    for _ in range(3):
        with fake.redis_down():
            assert fake.check(USER, METER, 1).allowed, "the ledger answers"
            with pytest.raises(RedisUnavailable), fake.redis_down():
                fake.emit(USER, METER, 1)
            fake.set_balance(USER, METER, used=10)
            with pytest.raises(RedisUnavailable):
                fake.settle(USER, METER, "k", 1)
        assert fake.check(USER, METER).available == 990
    assert fake.events == []


def test_settings_are_named_and_the_environment_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERFALL_REDIS_DOWN", "allow")
    monkeypatch.setenv("REDIS_URL", "redis://production:6379/0")
    fake = FakeBilling({USER: "tenant"}, redis_down="deny")
    with fake.redis_down():
        assert fake.check(USER, METER, 1).reason is Reason.REDIS_DOWN_DENIED
    with pytest.raises(SettingsError, match="METERFALL_REDIS_DOWN"):
        FakeBilling(redis_down="pray")


def test_code_that_connects_by_itself_gets_a_fake() -> None:
    with FakeBilling.connect(settings_for("postgresql:///far", "redis://far", default_plan="tenant")) as fake:
        assert fake.check("anyone", METER).available == 1000
    with pytest.raises(ClientClosed):
        fake.check("anyone", METER)


def test_dead_letters_are_shown(fake: FakeBilling) -> None:
    for quantity in (1, 2):
        fake.emit(USER, METER, quantity, event_id="e1")
    with pytest.raises(InvalidRequest, match="occurred_at"):
        fake.emit(USER, METER, 1, event_id="e2", occurred_at=fake.now - timedelta(days=40))
    assert [each.reason for each in fake.refused] == ["id_conflict"]
    assert [event.event_id for event in fake.events] == ["e1"]


def test_fakes_know_nothing_of_each_other(fake: FakeBilling) -> None:
    other = FakeBilling({USER: "tenant"})
    with fake.redis_down():
        other.charge(USER, METER, 400, "c1")
    other.advance(3_600)
    assert fake.check(USER, METER).available == 1000
    assert fake.now < other.now


def test_threads_never_overspend(fake: FakeBilling) -> None:
    def attempt(number: int) -> int:
        try:
            return fake.charge(USER, METER, 90, f"c{number}").amount
        except UsageLimitExceeded:
            return 0

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(attempt, range(32))) == 990
    assert fake.balance(USER, METER).used == 990


def test_asyncio_on_any_loop_beside_the_blocking_fake(fake: FakeBilling) -> None:
    billing = AsyncFakeBilling(beside=fake)

    async def work(number: int) -> None:
        async with billing.reserve(USER, METER, 10, f"k{number}") as hold:
            await hold.settle(5)

    async def twenty(first: int) -> None:
        await asyncio.gather(*(work(number) for number in range(first, first + 20)))

    for first in (0, 20):
        asyncio.run(twenty(first))
    assert fake.balance(USER, METER).used == 200 == billing.balance(USER, METER).used
    assert len(fake.events) == 40
    billing.end()
    with pytest.raises(ValueError, match="beside: "):
        AsyncFakeBilling(beside=fake, now=NEW_YEAR)


def test_fastapi_takes_it(fake: FakeBilling) -> None:
    async def serve() -> None:
        async with lifespan(AsyncFakeBilling(beside=fake))(FastAPI()) as state:
            (billing,) = state.values()
            await billing.emit(USER, METER, 30)

    asyncio.run(serve())
    assert fake.balance(USER, METER).used == 30


async def _cancelled(billing: AsyncFakeBilling) -> None:
    task = asyncio.create_task(billing.reserve(USER, METER, 10, "k").__aenter__())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_cancelled_task_leaves_no_hold(fake: FakeBilling) -> None:
    billing = AsyncFakeBilling(beside=fake)
    asyncio.run(_cancelled(billing))
    assert fake.holds == []
    billing.end()


def test_one_number_of_units_is_for_the_wallet_not_for_the_meters_that_draw_on_it(fake: FakeBilling) -> None:
    account = fake.open("ann", "studio", purchased=5, rollover=3)
    own = {meter: (balance.purchased, balance.rollover) for meter, balance in account.balances.items()}
    assert own == {"credits": (5, 3), "server_kokoro": (0, 0), "premium_voice": (0, 0), "ocr_tokens": (0, 0)}
    with pytest.raises(AccountError, match="grant credits instead"):
        fake.open("bob", "studio", purchased={"premium_voice": 5})


def test_it_starts_in_no_time() -> None:
    def first_check() -> float:
        begun = perf_counter()
        assert FakeBilling({USER: "tenant"}).check(USER, METER, 1).allowed
        return perf_counter() - begun

    assert min(first_check() for _ in range(5)) < 0.1


def test_a_spool_is_sent_after_the_outage(tmp_path: Any) -> None:
    fake = FakeBilling({USER: "tenant"}, spool_path=tmp_path)
    with fake.redis_down():
        assert fake.emit(USER, METER, 30, event_id="e1").spooled
    fake.send_spooled()
    assert fake.balance(USER, METER).used == 30
