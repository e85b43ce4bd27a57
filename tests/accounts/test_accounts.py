"""`Accounts` and `AsyncAccounts` are the functions behind the commands: typed, idempotent, safe to share."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from config.catalogue import CatalogueError
from config.settings import Settings
from schemas.reports import EventState
from tests.support.ledger import rows
from tests.support.resources import settings_for
from tests.support.streams import drain
from worker.accounts import Accounts, AsyncAccounts
from worker.client import Billing
from worker.errors import AccountError, BadInput, ClientClosed, LedgerUnavailable, RedisUnavailable, ReportError
from worker.reports.proof import verify_ledger
from worker.resources import Resources
from worker.rules.account import Account, ChangeAnswer

USER, METER = "user-42", "premium_voice"
NOW = datetime.now(UTC)
MONTH = timedelta(days=30)
WHO: Any = {"actor": "shop", "reason": "invoice in-1"}


@pytest.fixture
def accounts(settings: Settings) -> Iterator[Accounts]:
    with Accounts.connect(settings) as opened:
        yield opened


@pytest.fixture
def event(settings: Settings, accounts: Accounts) -> str:
    """An event of 100 units of an account that `accounts` opened."""
    accounts.open(USER, "basic", period_start=NOW, period_end=NOW + MONTH)
    with Billing.connect(settings) as billing:
        billing.emit(USER, METER, 100, event_id="e1", source="tts", dimensions={"voice_slug": "narrator"})
    drain(settings, USER)
    return "e1"


def methods_of(client: type) -> dict[str, Callable[..., object]]:
    return {name: each for name, each in inspect.getmembers(client, inspect.isfunction) if not name.startswith("_")}


# Each method that changes an account, on a ledger with USER and one event.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "open": lambda own: own.open("new", "basic", period_start=NOW, rollover={METER: -3}, **WHO),
    "grant": lambda own: own.grant(USER, METER, 50, "order-1", **WHO),
    "claw_back": lambda own: own.claw_back(USER, METER, 10, "refund-1", **WHO),
    "adjust": lambda own: own.adjust(USER, METER, rollover=-5, key="fix-1", **WHO),
    "forgive_debt": lambda own: own.forgive_debt(USER, METER, 2, key="k1", **WHO),
    "undo": lambda own: own.undo(USER, "adjust:fix-1", **WHO),
    "reverse": lambda own: own.reverse(USER, "e1", **WHO),
    "renew": lambda own: own.renew(USER, "in-2", NOW + MONTH, NOW + 2 * MONTH, **WHO),
    "set_period": lambda own: own.set_period(USER, NOW + MONTH - timedelta(days=1), "fix-1", **WHO),
    "change_plan": lambda own: own.change_plan(USER, "plus", **WHO),
    "set_status": lambda own: own.set_status(USER, "past_due", **WHO),
    "set_timezone": lambda own: own.set_timezone(USER, "America/New_York", **WHO),
    "set_notices": lambda own: own.set_notices(USER, [{"kind": "balance.debt"}], **WHO),
    "set_trust": lambda own: own.set_trust(USER, "trusted", **WHO),
    "set_limit": lambda own: own.set_limit(USER, METER, "day", 900, "limit-1", of="user", **WHO),
    "set_pay_from": lambda own: own.set_pay_from(USER, "allowance", **WHO),
    "seed": lambda own: own.seed("seeded", 7, plan="tenant", **WHO),
    "carry_over": lambda own: own.carry_over(USER, "new", "t1", meter=METER, **WHO),
    "close_account": lambda own: own.close_account("seeded", **WHO),
    "reopen": lambda own: own.reopen("seeded", "basic", **WHO),
}
READS: dict[str, Callable[[Any], Any]] = {
    "show": lambda own: own.show(USER),
    "find": lambda own: own.find(prefix=USER),
    "usage": lambda own: own.usage(USER),
    "breakdown": lambda own: own.breakdown(USER, documents=5),
    "engagement": lambda own: own.engagement(USER),
    "timeline": lambda own: own.timeline(USER, limit=2),
    "events": lambda own: own.events(USER, limit=2),
    "explain": lambda own: own.explain(USER, "e1"),
    "credits": lambda own: own.credits(USER),
    "notices": lambda own: own.notices(limit=5),
    "report_usage": lambda own: own.report_usage(by=["account", "day"]),
    "report_top": lambda own: own.report_top(),
    "report_near_limit": lambda own: own.report_near_limit(1, meter=METER),
    "report_debtors": lambda own: own.report_debtors(),
    "report_purchased": lambda own: own.report_purchased("account"),
    "report_uncollected": lambda own: own.report_uncollected(),
    "limits": lambda own: own.limits(USER),
}


def test_every_method_is_tried_here() -> None:
    assert methods_of(Accounts).keys() - {"close"} == CHANGES.keys() | READS.keys()


def test_both_have_the_same_methods_and_signatures() -> None:
    blocking, awaiting = methods_of(Accounts), methods_of(AsyncAccounts)
    assert blocking.keys() == awaiting.keys()
    assert all(inspect.iscoroutinefunction(method) for method in awaiting.values())
    assert {name: inspect.signature(each) for name, each in blocking.items()} == {
        name: inspect.signature(each) for name, each in awaiting.items()
    }
    assert all(method.__doc__ for method in (*blocking.values(), *awaiting.values()))
    assert list(inspect.signature(Accounts.grant).parameters) == [
        "self", "user_id", "meter", "amount", "key", "category", "priority", "effective_at", "expires_at", "open_plan",
        "actor", "reason",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What they do


def kept(settings: Settings) -> list[tuple[object, ...]]:
    """Everything that Postgres holds about accounts."""
    return [
        row
        for table in ("account", "balance", "ledger_entry")
        for row in rows(settings, f"SELECT t::text FROM {table} AS t ORDER BY 1")
    ]


@pytest.mark.usefixtures("event")
def test_a_repeat_of_any_change_is_harmless(settings: Settings, accounts: Accounts, resources: Resources) -> None:
    for name, change in CHANGES.items():
        first = change(accounts)
        before = kept(settings)
        again = change(accounts)
        assert kept(settings) == before, name
        if isinstance(first, ChangeAnswer):
            assert (first.repeated, again.repeated) == (False, True), name
            assert again.account == first.account, name
        else:
            assert again == first
    said = rows(settings, "SELECT DISTINCT actor, reason FROM ledger_entry WHERE actor IS NOT NULL ORDER BY 1, 2")
    assert said == [("shop", "invoice in-1"), ("shop", None)], "closing erased the reason for seeding"
    assert verify_ledger(resources).differences == []


@pytest.mark.usefixtures("event")
def test_the_reads_answer_what_the_commands_show(accounts: Accounts) -> None:
    assert isinstance(accounts.show(USER), Account)
    assert accounts.show(USER).balances[METER].used == 100
    (voice,) = [meter for meter in accounts.usage(USER).meters if meter.meter == METER]
    assert (voice.used, voice.limit, voice.available) == (100, 100_000, 99_900)
    assert [row.voice for row in accounts.breakdown(USER).voices] == ["narrator"]
    assert accounts.engagement(USER).characters == 100
    assert accounts.timeline(USER).changes[0].what == "e1"
    assert accounts.explain(USER, "e1").state is EventState.APPLIED


def test_reports_over_all_accounts_answer_their_first_rows_and_say_if_there_are_more(
    settings: Settings, accounts: Accounts, event: str
) -> None:
    for user_id, units in (("ann", 95_000), ("bob", 100_300)):
        accounts.open(user_id, "basic")
        with Billing.connect(settings) as billing:
            billing.emit(user_id, METER, units, event_id=event)
            billing.emit("nobody", METER, 1, event_id=f"of-{user_id}")
        drain(settings, user_id)
    drain(settings, "nobody")
    accounts.grant("ann", METER, 7, "order-1")
    today = datetime.now(UTC).date()

    usage = accounts.report_usage(today, today + timedelta(days=1), by=["account"], limit=2)
    assert (usage.since, usage.until, usage.by) == (today, today + timedelta(days=1), ("meter", "account"))
    assert [(row.user_id, row.amount, row.day) for row in usage.rows] == [("ann", 95_000, None), ("bob", 100_300, None)]
    assert usage.more
    whole = accounts.report_usage(by=("day", "plan"))
    assert [(row.day, row.plan, row.events) for row in whole.rows] == [(today, "", 2), (today, "basic", 3)]
    assert not whole.more
    assert [(row.rank, row.user_id) for row in accounts.report_top(limit=2).rows] == [(1, "bob"), (2, "ann")]
    near = accounts.report_near_limit(limit=1)
    assert (near.percent, [row.user_id for row in near.rows], near.more) == (80, ["ann"], True)
    assert [row.user_id for row in accounts.report_near_limit(96).rows] == ["bob"]
    assert [(row.user_id, row.debt) for row in accounts.report_debtors(meter=METER).rows] == [("bob", 300)]
    assert [(row.accounts, row.purchased) for row in accounts.report_purchased().rows] == [(1, 7)]
    assert [(row.user_id, row.purchased) for row in accounts.report_purchased("account").rows] == [("ann", 7)]
    assert [(row.user_id, row.events) for row in accounts.report_uncollected().rows] == [("nobody", 2)]
    assert accounts.report_uncollected(today - timedelta(days=9), today).rows == ()


def test_answers_are_frozen(accounts: Accounts, event: str) -> None:
    for read in READS.values():
        answer = read(accounts)
        with pytest.raises((AttributeError, ValueError)):
            answer.user_id = "another"
    changed = accounts.set_trust(USER, "trusted")
    with pytest.raises(AttributeError):
        changed.debt = 1  # type: ignore[misc]


def test_events_are_paged_by_cursor_and_know_their_reversal(settings: Settings, accounts: Accounts, event: str) -> None:
    with Billing.connect(settings) as billing:
        for number in range(2, 6):
            billing.emit(USER, METER, number, event_id=f"e{number}")
    drain(settings, USER)
    accounts.reverse(USER, "e4")
    accounts.grant(USER, METER, 1, "order-1")
    pages, before = [], None
    while True:
        page = accounts.events(USER, limit=2, before_seq=before)
        pages.append([(each.event_id, each.amount, each.reversed_at is not None) for each in page.events])
        before = page.more_before_seq
        if before is None:
            break
    assert pages == [[("e5", 5, False), ("e4", 4, True)], [("e3", 3, False), ("e2", 2, False)], [("e1", 100, False)]]
    first = accounts.events(USER, before_seq=page.events[0].seq + 1).events[0]
    assert (first.source, first.dimensions, first.unit) == ("tts", {"voice_slug": "narrator"}, "characters")
    assert first.parts.from_subscription == first.quantity == 100


def test_opening_otherwise_than_before_is_refused(settings: Settings, accounts: Accounts) -> None:
    opening: dict[str, Any] = {
        "status": "past_due",
        "period_start": NOW,
        "period_end": NOW + MONTH,
        "rollover": {METER: 5},
    }
    assert not accounts.open(USER, "basic", **opening).repeated
    accounts.set_status(USER, "active")
    accounts.change_plan(USER, "plus")
    before = kept(settings)
    again = accounts.open(USER, "basic", **opening)
    assert (again.repeated, again.account.plan, again.account.status) == (True, "plus", "active"), "as it is now"
    for changed in (
        {"plan": "free"}, {"status": "active"}, {"period_start": NOW - MONTH}, {"period_end": NOW + 2 * MONTH},
        {"rollover": {METER: 6}}, {"rollover": None},
    ):  # fmt: skip
        with pytest.raises(AccountError, match=f"^user_id: {USER} has an account already$"):
            accounts.open(USER, **{"plan": "basic", **opening, **changed})
    assert kept(settings) == before
    accounts.open("plain", "free")
    assert accounts.open("plain", "free").repeated


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_mistakes_are_named(accounts: Accounts, event: str) -> None:
    naive = datetime(2026, 11, 1)  # noqa: DTZ001 - the mistake
    wrong: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: accounts.show("nobody"), AccountError, "^user_id: no account nobody"),
        (lambda: accounts.usage("nobody"), ReportError, "^user_id: no account nobody"),
        (lambda: accounts.events("nobody"), ReportError, "^user_id: no account nobody"),
        (lambda: accounts.events(USER, limit=0), ReportError, "^limit: "),
        (lambda: accounts.events(USER, before_seq=0), ReportError, "^before_seq: "),
        (lambda: accounts.explain(USER, "e9"), ReportError, "^event_id: "),
        (lambda: accounts.usage(42), ReportError, "^user_id: "),  # type: ignore[arg-type]
        (lambda: accounts.show(42), AccountError, "^user_id: "),  # type: ignore[arg-type]
        (lambda: accounts.open("new", "gold"), CatalogueError, "gold"),
        (lambda: accounts.open("new", "basic", period_start=naive), AccountError, "^period_start: .* offset"),
        (lambda: accounts.open("new", "basic", period_end=naive), AccountError, "^period_end: .* offset"),
        (lambda: accounts.renew(USER, "in-1", naive, NOW), AccountError, "^period_start: .* offset"),
        (lambda: accounts.renew(USER, "in-1", NOW, naive), AccountError, "^period_end: .* offset"),
        (lambda: accounts.change_plan(USER, "plus", period_end=naive), AccountError, "^period_end: .* offset"),
        (lambda: accounts.change_plan(USER, "plus", at="later"), AccountError, "^at: must be now or period_end"),  # type: ignore[arg-type]
        (lambda: accounts.set_status(USER, "canceled", at="later"), AccountError, "^at: must be"),  # type: ignore[arg-type]
        (lambda: accounts.grant(USER, METER, 1.5, "o1"), AccountError, "^amount: must be a whole number"),  # type: ignore[arg-type]
        (lambda: accounts.grant(USER, METER, True, "o1"), AccountError, "^amount: must be a whole number"),
        (lambda: accounts.seed("new", 1.5, plan="tenant"), AccountError, "^amount: must be a whole"),  # type: ignore[arg-type]
        (lambda: accounts.open("new", "basic", rollover={METER: 1.5}), AccountError, "^rollover: must be"),  # type: ignore[dict-item]
        (lambda: accounts.grant(USER, METER, 1, "o1", actor="\n"), AccountError, "^actor: must be"),
    ]  # fmt: skip
    for call, error, message in wrong:
        with pytest.raises(error, match=message) as refused:
            call()
        assert isinstance(refused.value, BadInput | CatalogueError)


def test_servers_that_do_not_answer_have_public_errors(settings: Settings) -> None:
    dead_redis = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0", "redis_retries": 0})
    with Accounts.connect(dead_redis) as accounts, pytest.raises(RedisUnavailable):
        accounts.show(USER)
    dead_postgres = settings.model_copy(update={"database_url": "postgresql://127.0.0.1:1/none"})
    with Accounts.connect(dead_postgres) as accounts, pytest.raises(LedgerUnavailable):
        accounts.show(USER)


def test_a_ledger_that_is_set_up_otherwise_is_named(settings: Settings, accounts: Accounts) -> None:
    with pytest.raises(LedgerUnavailable, match=r"^DATABASE_URL: unset"):
        Accounts.connect(settings_for(None, settings.redis_url))
    accounts.open(USER, "basic")
    with (
        Accounts.connect(settings.model_copy(update={"partitions": 3})) as others,
        pytest.raises(LedgerUnavailable, match="METERFALL_PARTITIONS"),
    ):
        others.grant(USER, METER, 1, "order-1")


def test_a_call_after_closing_raises(settings: Settings) -> None:
    accounts = Accounts.connect(settings)
    accounts.open(USER, "basic")
    accounts.close()
    accounts.close()
    for use in (READS | CHANGES).values():
        with pytest.raises(ClientClosed):
            use(accounts)


# ---------------------------------------------------------------------------------------------------------------------
# Threads and asyncio


def test_threads_share_one(settings: Settings, accounts: Accounts, resources: Resources) -> None:
    accounts.open(USER, "basic")

    def grant(number: int) -> bool:
        return accounts.grant(USER, METER, 1, f"order-{number % 20}").repeated

    with ThreadPoolExecutor(8) as threads:
        repeated = list(threads.map(grant, range(40)))
    assert repeated.count(False) == 20
    assert accounts.show(USER).balances[METER].purchased == 20
    assert verify_ledger(resources).differences == []


@pytest.mark.usefixtures("event")
def test_a_child_goes_on_with_connections_of_its_own(accounts: Accounts, resources: Resources) -> None:
    child = os.fork()
    if not child:
        try:
            accounts.grant(USER, METER, 2, "child")
            os._exit(0)
        finally:
            os._exit(1)
    accounts.grant(USER, METER, 1, "parent")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert accounts.show(USER).balances[METER].purchased == 3
    assert verify_ledger(resources).differences == []


def test_asyncio_does_the_same(settings: Settings, event: str, resources: Resources) -> None:
    async def everything() -> dict[str, Any]:
        async with AsyncAccounts.connect(settings) as accounts:
            answers = {}
            for name, call in (READS | CHANGES).items():
                answers[name] = await call(accounts)
            granted = await asyncio.gather(*(accounts.grant(USER, METER, 1, f"order-{n % 5}x") for n in range(10)))
            assert [answer.repeated for answer in granted].count(False) == 5
            assert not any(thread.name.startswith("asyncio_") for thread in threading.enumerate())
            assert any(thread.name.startswith("meterfall-accounts") for thread in threading.enumerate())
        for call in (READS | CHANGES).values():
            with pytest.raises(ClientClosed):
                await call(accounts)
        return answers

    answers = asyncio.run(everything())
    assert answers["show"].balances[METER].used == 100
    assert answers["grant"].account.balances[METER].purchased == 50
    assert answers["timeline"].changes[0].what == "e1"
    assert answers["close_account"].startswith("closed:")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("meterfall-accounts")]
    assert verify_ledger(resources).differences == []


def test_the_loop_goes_on_while_a_call_waits_for_a_lock(settings: Settings, event: str) -> None:
    async def grant_and_tick() -> int:
        assert settings.database_url is not None
        async with AsyncAccounts.connect(settings) as accounts:
            with psycopg.connect(settings.database_url) as holder:
                holder.execute("SELECT FROM account WHERE user_id = %s FOR UPDATE", (USER,))
                granting = asyncio.create_task(accounts.grant(USER, METER, 1, "order-1"))
                ticks = 0
                while ticks < 10:
                    await asyncio.sleep(0.01)
                    ticks += 1
                assert not granting.done()
                holder.rollback()
            return (await granting).account.balances[METER].purchased

    assert asyncio.run(grant_and_tick()) == 1
