"""Changes of an account that are not usage: each once, as a ledger entry, published by itself, or refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import psycopg
import pytest
from redis import Redis

from config.catalogue import Allowance, Catalogue, CatalogueError
from config.settings import DEFAULT_CATALOGUE, Settings
from schemas.answers import Reason
from schemas.events import MAX_TOTAL
from tests.support.books import assert_proved
from tests.support.ledger import give_account, move_clock, rows
from tests.support.processes import killed_in
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain, partition_of, pending_of, stream_of
from tests.support.waiting import wait_until
from worker.admin import accounts, credits, dead_letters, erasure
from worker.admin.catalogue_diff import differences
from worker.admin.erasure import close_account
from worker.client import Billing
from worker.consumer import renewals
from worker.consumer.drain import drain_stream
from worker.errors import AccountError, BadInput, KeyConflict
from worker.ledger import batch, reports
from worker.ledger.connection import Postgres, batch_connection
from worker.reports.proof import verify_ledger
from worker.resources import Resources
from worker.rules.account import ChangeAnswer
from worker.rules.rows import Loaded

USER, OTHER = "jane.doe@example.org", "trial-7"
METER = "premium_voice"
DAY = timedelta(days=1)


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    with Billing.connect(settings) as client:
        yield client


@pytest.fixture
def proved(resources: Resources) -> Iterator[None]:
    """Whatever the test did, the ledger is consistent after it."""
    yield
    assert verify_ledger(resources).differences == []


pytestmark = pytest.mark.usefixtures("proved")


def entries(settings: Settings, user_id: str = USER) -> list[tuple[object, ...]]:
    """Return kind, key and meter of the ledger entries without those of the opening, in order."""
    return rows(
        settings,
        "SELECT kind, entry_key, meter FROM ledger_entry WHERE user_id = %s AND kind NOT LIKE 'open%%' ORDER BY seq",
        user_id,
    )


def stored(settings: Settings) -> list[list[tuple[object, ...]]]:
    """Everything that Postgres holds about accounts."""
    tables = ("account", "balance", "ledger_entry", "order_key", "usage_log", "dead_letter")
    return [rows(settings, f"SELECT t::text FROM {table} AS t ORDER BY 1") for table in tables]


def buckets(resources: Resources, meter: str = METER, user_id: str = USER) -> tuple[int, int, int]:
    balance = accounts.show(resources, user_id).balances[meter]
    return balance.used, balance.rollover, balance.purchased


def bill(settings: Settings, redis: Redis, *events: tuple[str, str, int], user_id: str = USER, **more: Any) -> None:
    """Send events (id, meter, quantity) as a plain producer and apply them."""
    for event_id, meter, quantity in events:
        event = {"event_id": event_id, "user_id": user_id, "meter": meter, "quantity": quantity} | more
        redis.xadd(partition_of(settings, user_id).entries, {"v": "1", "e": json.dumps(event)})
    drain(settings, user_id)


def pass_time(settings: Settings, by: timedelta) -> None:
    """Let the ledger's clock go ahead, and take cached balances away: their time in Redis does not pass by itself."""
    move_clock(settings, by)
    with Redis.from_url(settings.redis_url) as client:
        for key in client.scan_iter("*:balance:*"):
            client.delete(key)


def now_of(settings: Settings) -> datetime:
    ((now,),) = rows(settings, "SELECT ledger_now()")
    assert isinstance(now, datetime)
    return now.astimezone(UTC)


# ---------------------------------------------------------------------------------------------------------------------
# Each change: once, as a ledger entry, published by itself


# So near that an invoice for the time after it takes effect at once.
SOON = timedelta(minutes=30)


def renew(resources: Resources, invoice: str = "inv-1") -> ChangeAnswer:
    """Pay the 30 days after the period with which the account was opened; the same days at each call."""
    opened = "SELECT detail->>'period_end' FROM ledger_entry WHERE kind = 'open_meter' AND user_id = %s LIMIT 1"
    ((ends,),) = rows(resources.settings, opened, USER)
    start = datetime.fromisoformat(str(ends))
    return accounts.renew(resources, USER, invoice, start, start + 30 * DAY)


# A change, and its ledger entry about METER: kind, key, change of each bucket, balances after.
CHANGES: dict[str, tuple[Callable[[Resources], object], str, str, tuple[int, int, int], tuple[int, int, int]]] = {
    "grant": (lambda own: credits.grant(own, USER, METER, 30, "o1"), "grant", "grant:o1", (0, 0, 30), (100, 7, 80)),
    "clawback": (
        lambda resources: credits.claw_back(resources, USER, METER, 40, "r1"),
        "clawback", "clawback:r1", (0, 0, -40), (100, 7, 10),
    ),
    "transfer": (
        lambda resources: credits.carry_over(resources, OTHER, USER, "t1", meter=METER),
        "transfer_in", "transfer:t1", (0, 0, 20), (100, 7, 70),
    ),
    "reversal": (lambda own: credits.reverse(own, USER, "e1"), "reversal", "reverse:e1", (-100, 0, 0), (0, 7, 50)),
    "renewal": (renew, "renewal", "renew:inv-1", (-100, 99_900, 0), (0, 99_907, 50)),
}  # fmt: skip
# Changes of the account as a whole, and the kind of their ledger entry.
WHOLE: dict[str, tuple[Callable[[Resources], object], str]] = {
    "status": (lambda resources: accounts.set_status(resources, USER, "past_due"), "set_status"),
    "plan": (lambda resources: accounts.change_plan(resources, USER, "plus"), "change_plan"),
    "later": (lambda resources: accounts.change_plan(resources, USER, "plus", at="period_end"), "schedule"),
    "close": (lambda resources: close_account(resources, USER, forfeit=True), "close"),
}
ALL = {name: change[0] for name, change in (CHANGES | WHOLE).items()}


@pytest.fixture
def used(settings: Settings, redis: Redis, resources: Resources) -> None:
    """Jane on basic: 100 used by one event, 7 rolled over, 50 purchased; and a trial account with 20 purchased.

    Jane's period ends soon.
    """
    give_account(settings, USER, "basic", buckets={METER: (0, 7, 50)}, end=now_of(settings) + SOON)
    give_account(settings, OTHER, "basic", buckets={METER: (0, 0, 20)})
    bill(settings, redis, ("e1", METER, 100))


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_one_entry_with_the_balances_after_it(settings: Settings, resources: Resources, name: str) -> None:
    change, kind, key, changes, after = CHANGES[name]
    change(resources)
    (row,) = rows(
        settings,
        "SELECT kind, used_change, rollover_change, purchased_change, used_after, rollover_after, purchased_after "
        "FROM ledger_entry WHERE user_id = %s AND entry_key = %s AND meter = %s",
        USER, key, METER,
    )  # fmt: skip
    assert row == (kind, *changes, *after)
    assert buckets(resources) == after


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("name", ALL)
def test_a_change_repeated_changes_nothing(settings: Settings, redis: Redis, resources: Resources, name: str) -> None:
    ALL[name](resources)
    before = stored(settings)
    answer = ALL[name](resources)
    assert stored(settings) == before
    assert not isinstance(answer, ChangeAnswer) or answer.repeated


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("name", ALL)
def test_killed_before_the_commit_nothing_happened_and_the_notice_is_harmless(
    settings: Settings, redis: Redis, resources: Resources, billing: Billing, name: str
) -> None:
    before, seen = stored(settings), billing.check(USER, METER, 1)
    killed_in(settings, ALL[name], "after_refresh")
    assert {b"v": b"1", b"r": USER.encode()} in stream_of(redis, settings, USER)
    drain(settings, USER)
    assert stream_of(redis, settings, USER) == []
    assert stored(settings) == before
    assert billing.check(USER, METER, 1) == seen


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("name", ALL)
def test_killed_right_after_the_commit_redis_learns_of_it(
    settings: Settings, redis: Redis, resources: Resources, billing: Billing, name: str
) -> None:
    before = billing.check(USER, METER, 1)
    killed_in(settings, ALL[name])
    drain(settings, USER)
    after = billing.check(USER, METER, 1)
    if name == "close":
        assert after.reason == "unknown_account"
        return
    balance = accounts.show(resources, USER).balances[METER]
    assert (after.limit, after.used, after.rollover, after.purchased) == balance.buckets("active")[:4]
    if name in CHANGES or name == "plan":
        assert after != before


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("name", WHOLE)
def test_a_change_of_the_whole_account_is_an_entry_too(settings: Settings, resources: Resources, name: str) -> None:
    if name == "later":  # both plans wait for their invoice, so it is only noted
        assert accounts.show(resources, USER).next_plan is None
    WHOLE[name][0](resources)
    kinds = [row[0] for row in rows(settings, "SELECT kind FROM ledger_entry WHERE meter = '' ORDER BY created_at")]
    assert kinds[-1] == WHOLE[name][1]


def test_a_carry_over_empties_the_giver_and_tells_both(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, OTHER, "tenant")
    give_account(settings, USER, "tenant")
    credits.grant(resources, OTHER, "credits", 70, "trial")
    drain(settings, OTHER)
    change = credits.carry_over(resources, OTHER, USER, "signup")
    assert (change.account.user_id, change.account.balances["credits"].purchased) == (USER, 70)
    assert buckets(resources, "credits", OTHER) == (0, 0, 0)
    for user in (USER, OTHER):
        assert {b"v": b"1", b"r": user.encode()} in stream_of(redis, settings, user)
    assert entries(settings, OTHER)[-1] == ("transfer_out", "transfer:signup", "credits")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: the field is named, nothing is written

Refusal = tuple[Callable[[Resources], object], str]
LATER, PAST = datetime(2031, 1, 1, tzinfo=UTC), datetime(2020, 1, 1, tzinfo=UTC)
REFUSED: dict[str, Refusal] = {
    "open: unknown plan": (lambda t: accounts.open_new(t, "new", "gold"), r"^plan: unknown code 'gold'"),
    "open: unknown status": (lambda t: accounts.open_new(t, "new", "basic", status="gone"), r"^status: unknown 'gone'"),
    "open: closed is no status": (lambda t: accounts.open_new(t, "new", "basic", status="closed"), r"^status: unknown"),
    "open: ends before it starts": (
        lambda t: accounts.open_new(t, "new", "basic", start=LATER, end=LATER), r"^period_end: must be after"
    ),
    "open: exists": (lambda t: accounts.open_new(t, USER, "basic"), r"^user_id: .* has an account already"),
    "open: no id": (lambda t: accounts.open_new(t, "a#b", "basic"), r"^user_id: must be 1 to 128"),
    "open: rollover where none spills": (
        lambda t: accounts.open_new(t, "new", "core", rollover={"relay_credits": 1}), r"^rollover: 'relay_credits'"
    ),
    "status: unknown account": (lambda t: accounts.set_status(t, "nobody", "active"), r"^user_id: no account nobody"),
    "status: unknown": (lambda t: accounts.set_status(t, USER, "gone"), r"^status: unknown 'gone'"),
    "status: not an ending": (
        lambda t: accounts.set_status(t, USER, "active", at="period_end"), r"^status: later only"
    ),
    "status: no known end": (lambda t: accounts.set_status(t, USER, "canceled", at="period_end"), r"^at: nobody knows"),
    "plan: unknown": (lambda t: accounts.change_plan(t, USER, "gold"), r"^plan: unknown code 'gold'"),
    "plan: unknown account": (lambda t: accounts.change_plan(t, "nobody", "plus"), r"^user_id: no account nobody"),
    "plan: no known end": (lambda t: accounts.change_plan(t, USER, "free", at="period_end"), r"^at: nobody knows"),
    "plan: ends in the past": (
        lambda t: accounts.change_plan(t, USER, "plus", period_end=PAST), r"^period_end: must"
    ),
    "renew: unknown account": (
        lambda t: accounts.renew(t, "nobody", "inv", LATER, LATER + DAY), r"^user_id: no account nobody"
    ),
    "renew: ends before it starts": (lambda t: accounts.renew(t, USER, "inv", LATER, LATER), r"^period_end: must be"),
    "renew: no invoice": (lambda t: accounts.renew(t, USER, "", LATER, LATER + DAY), r"^invoice_id: must be 1 to 128"),
    "renew: plan without invoices": (lambda t: accounts.renew(t, OTHER, "inv", LATER, LATER + DAY), r"^plan: no meter"),
    "grant: unknown meter": (lambda t: credits.grant(t, USER, "gold", 1, "k"), r"^meter: unknown 'gold'"),
    "grant: never spills": (lambda t: credits.grant(t, USER, "relay_credits", 1, "k"), r"^meter: relay_credits takes"),
    "grant: nothing": (lambda t: credits.grant(t, USER, METER, 0, "k"), r"^amount: must be .* \(got 0\)"),
    "grant: too much": (lambda t: credits.grant(t, USER, METER, 10**12 + 1, "k"), r"^amount: must be"),
    "grant: no key": (lambda t: credits.grant(t, USER, METER, 1, "a b"), r"^key: must be 1 to 128"),
    "grant: key of another amount": (lambda t: credits.grant(t, USER, METER, 2, "paid"), r"^key: paid was used for 1"),
    "grant: nobody": (lambda t: credits.grant(t, "nobody", METER, 1, "k"), r"^user_id: no account nobody; open it"),
    "grant: nobody, plan": (lambda t: credits.grant(t, "nobody", METER, 1, "k", open_plan="gold"), r"^plan: unknown"),
    "clawback: unknown meter": (lambda t: credits.claw_back(t, USER, "gold", 1, "k"), r"^meter: unknown 'gold'"),
    "clawback: unknown account": (lambda t: credits.claw_back(t, "nobody", METER, 1, "k"), r"^user_id: no account"),
    "clawback: key of another amount": (
        lambda t: credits.claw_back(t, USER, METER, 4, "back"), r"^key: back was used for 1 of"
    ),
    "clawback: of another order": (
        lambda t: credits.claw_back(t, USER, METER, 1, "back", order="paid"), r"^key: back was used for 1 of"
    ),
    "clawback: more than was bought": (
        lambda t: credits.claw_back(t, USER, METER, 5, "k"), r"^amount: must be at most 4, the .* \(got 5\)"
    ),
    "clawback: more than the order gave": (
        lambda t: credits.claw_back(t, USER, METER, 5, "k", order="more"),
        r"^amount: must be at most 4; more gave 4, 0 were taken back \(got 5\)",
    ),
    "clawback: a greater total than the order gave": (
        lambda t: credits.claw_back(t, USER, METER, order="more", total_refunded=5),
        r"^total_refunded: must be at most 4; more gave 4, 0 were taken back \(got 5\)",
    ),
    "clawback: no such order": (
        lambda t: credits.claw_back(t, USER, METER, 1, "k", order="none"), r"^order: none gave jane.* nothing of prem"
    ),
    "clawback: a total of no order": (
        lambda t: credits.claw_back(t, USER, METER, total_refunded=5), r"^order: missing"
    ),
    "clawback: total and amount": (
        lambda t: credits.claw_back(t, USER, METER, 5, "k", order="paid", total_refunded=5), r"^amount: give"
    ),
    "clawback: neither": (lambda t: credits.claw_back(t, USER, METER, key="k"), r"^amount: give"),
    "clawback: no key": (lambda t: credits.claw_back(t, USER, METER, 5), r"^key: missing"),
    "clawback: bad total": (
        lambda t: credits.claw_back(t, USER, METER, order="paid", total_refunded=0), r"^total_refunded: must be a whole"
    ),
    "grant: order of another account": (
        lambda t: credits.grant(t, OTHER, "credits", 1, "paid"), r"^key: paid was used by another account$"
    ),
    "grant: order of another account, nobody": (
        lambda t: credits.grant(t, "nobody", METER, 1, "paid", open_plan="basic"), r"^key: paid was used by another"
    ),
    "seed: unknown meter": (lambda t: credits.seed_signup(t, "new", 1, meter="gold", plan="tenant"), r"^meter: tenant"),
    "seed: out of range": (lambda t: credits.seed_signup(t, "new", -1, plan="tenant"), r"^amount: must be"),
    "seed: unknown plan": (lambda t: credits.seed_signup(t, "new", plan="gold"), r"^plan: unknown code"),
    "transfer: unknown meter": (lambda t: credits.carry_over(t, OTHER, USER, "k", meter="gold"), r"^meter: unknown"),
    "transfer: unknown giver": (lambda t: credits.carry_over(t, "nobody", USER, "k"), r"^user_id: no account nobody"),
    "transfer: to itself": (lambda t: credits.carry_over(t, USER, USER, "k"), r"^to_user: must be another"),
    "transfer: key of another giver": (
        lambda t: credits.carry_over(t, "third", USER, "moved", meter=METER), r"^key: moved was used for another"
    ),
    "transfer: key of another taker": (
        lambda t: credits.carry_over(t, OTHER, "third", "moved", meter=METER), r"^key: moved was used for another"
    ),
    "transfer: key of the way there": (
        lambda t: credits.carry_over(t, USER, OTHER, "moved", meter=METER), r"^key: moved was used for another"
    ),
    "reverse: unknown account": (lambda t: credits.reverse(t, "nobody", "e"), r"^user_id: no account nobody"),
    "reverse: unknown event": (lambda t: credits.reverse(t, USER, "e"), r"^event_id: no event e"),
    "close: unknown account": (lambda t: close_account(t, "nobody"), r"^user_id: no account nobody"),
    "show: unknown account": (lambda t: accounts.show(t, "nobody"), r"^user_id: no account nobody"),
}  # fmt: skip


def test_every_mistake_names_its_field_and_writes_nothing(settings: Settings, resources: Resources) -> None:
    give_account(settings, USER, "basic")
    give_account(settings, OTHER, "tenant")
    give_account(settings, "third", "basic")
    credits.grant(resources, USER, METER, 1, "paid")
    credits.claw_back(resources, USER, METER, 1, "back")
    credits.grant(resources, USER, METER, 4, "more")
    credits.carry_over(resources, OTHER, USER, "moved", meter=METER)
    before, wrong = stored(settings), []
    for name, (action, pattern) in REFUSED.items():
        try:
            action(resources)
        except (BadInput, CatalogueError) as error:
            if not re.search(pattern, str(error)):
                wrong.append(f"{name}: {error}")
        else:
            wrong.append(f"{name}: accepted")
    assert wrong == []
    assert stored(settings) == before


# ---------------------------------------------------------------------------------------------------------------------
# Credits


def test_a_clawback_takes_what_is_left_and_the_rest_becomes_debt(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic", buckets={METER: (100_000, 0, 0), "ocr_tokens": (0, 0, 5)})
    credits.grant(resources, USER, METER, 100, "order-1")
    bill(settings, redis, ("e1", METER, 60))
    first = credits.claw_back(resources, USER, METER, 100, "refund-1")
    assert (first.repeated, first.debt, first.taken) == (False, 60, 100)
    again = credits.claw_back(resources, USER, METER, 100, "refund-1")
    assert (again.repeated, again.debt, again.taken) == (True, 60, 100)
    assert buckets(resources) == (100_000, -60, 0)
    assert credits.claw_back(resources, USER, "ocr_tokens", 5, "refund-1").taken == 5  # another meter, another refund


def test_a_clawback_ends_where_debt_does(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, USER, "basic", buckets={METER: (100_000, 3 - MAX_TOTAL, 6)})
    bill(settings, redis, ("e1", METER, 4))
    with pytest.raises(AccountError, match=r"^amount: the debt would exceed"):
        credits.claw_back(resources, USER, METER, 6, "k")
    assert credits.claw_back(resources, USER, METER, 5, "k").debt == 3


def test_a_signup_is_seeded_once(settings: Settings, redis: Redis, resources: Resources) -> None:
    first = credits.seed_signup(resources, USER, 300, plan="tenant")
    assert not first.repeated
    assert credits.seed_signup(resources, USER, 300, plan="tenant").repeated
    assert credits.seed_signup(resources, USER, 900, plan="tenant").repeated
    assert accounts.show(resources, USER).balances["credits"].allowance == 300
    bill(settings, redis, ("e1", "credits", 250))
    pass_time(settings, 32 * DAY)
    bill(settings, redis, ("e2", "credits", 1))
    later = accounts.show(resources, USER).balances["credits"]
    assert (later.allowance, later.used) == (1_000, 1)
    ((granted, consumed),) = rows(settings, "SELECT lifetime_granted, lifetime_consumed FROM balance")
    assert (granted, consumed) == (300, 251)  # the seed counts as granted, a refill does not


def relay(settings: Settings, redis: Redis, name: str, gemini: int, hardware: int) -> None:
    """Use units of a relay, on the backend with the sub-cap and on the other."""
    bill(settings, redis, (f"{name}-1", "relay_credits", gemini), dimensions={"backend": "gemini"})
    bill(settings, redis, (f"{name}-2", "relay_credits", hardware), dimensions={"backend": "hardware"})


@pytest.mark.parametrize("first", ["pro", "max_relay"])
def test_back_from_unlimited_the_current_month_counts_and_nothing_older(
    settings: Settings, redis: Redis, resources: Resources, billing: Billing, first: str
) -> None:
    accounts.open_new(resources, USER, first)
    relay(settings, redis, "r0", 20, 100)
    accounts.change_plan(resources, USER, "max_relay")
    relay(settings, redis, "r1", 2_000, 9_000)
    pass_time(settings, 40 * DAY)
    relay(settings, redis, "r2", 30, 700)
    back = accounts.change_plan(resources, USER, "pro").account.balances["relay_credits"]
    assert (back.allowance, back.used) == (5_000, 730)
    assert back.cap_used is not None
    assert back.cap_used["gemini"] == 30
    relay(settings, redis, "r3", 5, 5)
    left = billing.remaining(USER)
    assert (left.remaining, [each.remaining for each in left.backends]) == (4_260, [965])


def test_from_an_endless_unlimited_period_nothing_older_than_a_month_counts(
    emptied_database_url: str, redis_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "catalogue.toml"
    text = DEFAULT_CATALOGUE.read_text(encoding="utf-8")
    path.write_text(
        text.replace('meters.relay_credits = { cadence = "monthly" }', "meters.relay_credits = {}"), "utf-8"
    )
    settings = settings_for(emptied_database_url, redis_url, catalogue_path=path)
    with worker_resources(settings) as resources, Redis.from_url(redis_url) as redis:
        for user_id in (USER, OTHER):
            accounts.open_new(resources, user_id, "max_relay")
            bill(settings, redis, ("e1", "relay_credits", 9_000), user_id=user_id)
        young = accounts.change_plan(resources, USER, "pro").account.balances["relay_credits"]
        pass_time(settings, 40 * DAY)
        old = accounts.change_plan(resources, OTHER, "pro").account.balances["relay_credits"]
        assert (young.used, old.used) == (9_000, 0)
        assert_proved(resources)


ONCE = """
[meters.tokens]
unit = "tokens"

[plans.gift]
name = "Gift"
tier = 0
meters.credits = { quantity = 5, cadence = "off" }
meters.tokens = { quantity = 5, cadence = "lifetime" }
meters.relay_credits = { quantity = 5, cadence = "lifetime" }
"""


def test_a_grant_before_the_signup_brings_no_seed(emptied_database_url: str, redis_url: str, tmp_path: Path) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_text(DEFAULT_CATALOGUE.read_text(encoding="utf-8") + ONCE, encoding="utf-8")
    settings = settings_for(emptied_database_url, redis_url, catalogue_path=path)
    with worker_resources(settings) as resources, closing(Billing.connect(settings)) as billing:
        credits.grant(resources, USER, "credits", 2, "order-1", open_plan="gift")
        left = {meter: billing.check(USER, meter).available for meter in ("credits", "tokens", "relay_credits")}
        assert left == {"credits": 2, "tokens": 0, "relay_credits": 5}
        credits.seed_signup(resources, OTHER, plan="gift")
        assert billing.check(OTHER, "credits").available == 5
        assert_proved(resources)


def test_seeds_at_the_same_time_open_one_account(settings: Settings, resources: Resources) -> None:
    with ThreadPoolExecutor(4) as pool:
        seeds = list(
            pool.map(lambda amount: credits.seed_signup(resources, USER, amount, plan="tenant"), [10, 20, 30, 40])
        )
    (seeded,) = [change for change in seeds if not change.repeated]
    found = accounts.show(resources, USER).balances["credits"].allowance
    assert found == seeded.account.balances["credits"].allowance
    assert [change.account.balances["credits"].allowance for change in seeds] == [found] * 4


def test_credit_granted_to_a_new_account_is_all_it_has_until_the_next_boundary(
    settings: Settings, redis: Redis, resources: Resources, billing: Billing
) -> None:
    credits.grant(resources, USER, "credits", 50, "order-1", open_plan="tenant")
    drain(settings, USER)
    assert billing.check(USER, "credits", 1).available == 50
    bill(settings, redis, ("e1", "credits", 20))
    assert buckets(resources, "credits") == (1_000, 0, 30)
    pass_time(settings, 32 * DAY)
    assert buckets(resources, "credits") == (0, 0, 30)
    assert credits.seed_signup(resources, USER, 10, plan="tenant").repeated


def test_grants_to_an_unknown_account_at_the_same_time(settings: Settings, resources: Resources) -> None:
    def grant(number: int) -> ChangeAnswer:
        return credits.grant(resources, USER, "credits", 10, f"order-{number % 8}", open_plan="tenant")

    with ThreadPoolExecutor(4) as pool:
        changes = list(pool.map(grant, range(16)))
    assert sum(change.repeated for change in changes) == 8
    assert buckets(resources, "credits") == (1_000, 0, 80)
    assert rows(settings, "SELECT count(*) FROM account") == [(1,)]


# ---------------------------------------------------------------------------------------------------------------------
# Reversals


def test_a_reversal_puts_every_part_back_once(settings: Settings, redis: Redis, resources: Resources) -> None:
    give_account(settings, USER, "basic", buckets={METER: (99_900, 30, 20)})
    bill(settings, redis, ("e1", METER, 200))
    assert buckets(resources) == (100_000, -50, 0)
    assert not credits.reverse(resources, USER, "e1").repeated
    assert buckets(resources) == (99_900, 30, 20)
    assert credits.reverse(resources, USER, "e1").repeated
    assert buckets(resources) == (99_900, 30, 20)
    assert rows(settings, "SELECT lifetime_consumed FROM balance WHERE meter = %s", METER) == [(0,)]


@pytest.mark.parametrize(("rollover", "after"), [(0, 100), (-40, 60), (999_950, 1_000_000), (1_000_000, 1_000_000)])
def test_reversed_after_its_period_closed_it_returns_as_rollover_within_the_cap(
    settings: Settings, redis: Redis, resources: Resources, rollover: int, after: int
) -> None:
    give_account(settings, USER, "basic", buckets={METER: (99_900, rollover, 0)}, end=now_of(settings) + SOON)
    bill(settings, redis, ("e1", METER, 100))
    renew(resources)
    assert buckets(resources) == (0, rollover, 0)
    for _ in range(2):
        credits.reverse(resources, USER, "e1")
        assert buckets(resources) == (0, after, 0)


def test_an_unlimited_part_of_a_closed_period_returns_nothing(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "plus", end=now_of(settings) + SOON)
    bill(settings, redis, ("e1", "server_kokoro", 100))
    renew(resources)
    accounts.change_plan(resources, USER, "basic")
    credits.reverse(resources, USER, "e1")
    assert buckets(resources, "server_kokoro") == (0, 0, 0)


def test_a_meter_that_never_spills_returns_to_the_open_period_only(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "pro")
    gemini: dict[str, Any] = {"dimensions": {"backend": "gemini"}}
    bill(settings, redis, ("e1", "relay_credits", 30), ("e2", "relay_credits", 5), **gemini)
    bill(settings, redis, ("e3", "relay_credits", 7))
    credits.reverse(resources, USER, "e1")
    balance = accounts.show(resources, USER).balances["relay_credits"]
    assert (balance.used, balance.cap_used) == (12, {"gemini": 5})
    pass_time(settings, 32 * DAY)
    credits.reverse(resources, USER, "e2")
    balance = accounts.show(resources, USER).balances["relay_credits"]
    assert (balance.used, balance.rollover, (balance.cap_used or {}).get("gemini", 0)) == (0, 0, 0)


def test_a_lifetime_event_is_reversed_while_its_plan_is_away(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "core")
    bill(settings, redis, ("e1", "relay_credits", 30), dimensions={"backend": "gemini"})
    bill(settings, redis, ("e2", "relay_credits", 12))
    accounts.change_plan(resources, USER, "pro")
    credits.reverse(resources, USER, "e1")
    assert buckets(resources, "relay_credits") == (0, 0, 0)
    accounts.change_plan(resources, USER, "core")
    balance = accounts.show(resources, USER).balances["relay_credits"]
    assert (balance.used, (balance.cap_used or {}).get("gemini")) == (12, 0)


def test_nobody_paid_for_an_uncollected_event(settings: Settings, redis: Redis, resources: Resources) -> None:
    bill(settings, redis, ("e1", METER, 30))
    accounts.open_new(resources, USER, "basic")
    with pytest.raises(AccountError, match=r"^event_id: e1 was recorded as uncollected"):
        credits.reverse(resources, USER, "e1")


# ---------------------------------------------------------------------------------------------------------------------
# Status and plan over time


def test_a_trial_ends_by_itself_unless_it_becomes_an_account(
    settings: Settings, resources: Resources, billing: Billing
) -> None:
    for user in (USER, OTHER):
        accounts.open_new(resources, user, "basic", status="trialing")
        drain(settings, user)
    accounts.set_status(resources, USER, "active")
    drain(settings, USER)
    pass_time(settings, 7 * DAY + timedelta(minutes=1))
    assert [accounts.show(resources, user).status for user in (USER, OTHER)] == ["active", "expired"]
    assert [billing.check(user, METER, 1).allowed for user in (USER, OTHER)] == [True, False]
    assert renewals.renew_due(resources).accounts == 2
    assert rows(settings, "SELECT status FROM account ORDER BY user_id") == [("active",), ("expired",)]
    # The status is due first: it decides what the end of the trial is worth.
    assert next(kind for kind, _, _ in entries(settings, OTHER)) == "set_status"
    assert {kind for kind, _, _ in entries(settings, USER)} == {"set_status", "lapse"}


def test_a_cancellation_at_period_end_and_taken_back(
    settings: Settings, resources: Resources, billing: Billing
) -> None:
    ends = now_of(settings) + 30 * DAY
    accounts.open_new(resources, USER, "basic", end=ends)
    change = accounts.set_status(resources, USER, "canceled", at="period_end")
    assert (change.account.status, change.account.status_change_at) == ("active", ends)
    assert accounts.set_status(resources, USER, "canceled", at="period_end").repeated
    back = accounts.set_status(resources, USER, "active")
    assert (back.repeated, back.account.next_status, back.account.status_change_at) == (False, None, None)
    accounts.set_status(resources, USER, "canceled", at="period_end")
    credits.grant(resources, USER, METER, 25, "order")
    pass_time(settings, 30 * DAY - timedelta(minutes=1))
    assert billing.check(USER, METER, 1).available == 100_025
    pass_time(settings, 30 * DAY + timedelta(minutes=1))
    assert accounts.show(resources, USER).status == "canceled"
    assert billing.check(USER, METER, 1).available == 25  # what was purchased stays


def test_past_due_keeps_the_allowance_and_goes_back(resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    for status, limit in (("past_due", 100_000), ("unpaid", 0), ("past_due", 100_000), ("active", 100_000)):
        account = accounts.set_status(resources, USER, status).account
        assert account.balances[METER].buckets(account.status).limit == limit


def test_the_highest_tier_ever_held_stays(resources: Resources) -> None:
    accounts.open_new(resources, USER, "free")
    tiers = [
        accounts.change_plan(resources, USER, plan).account.highest_tier for plan in ("plus", "basic", "max", "free")
    ]
    assert tiers == [2, 2, 3, 3]


@pytest.mark.parametrize("late", [None, timedelta(hours=1), 3 * DAY])
def test_a_change_at_period_end_between_paid_plans_comes_with_the_next_period(
    settings: Settings, redis: Redis, resources: Resources, late: timedelta | None
) -> None:
    start = now_of(settings)
    accounts.open_new(resources, USER, "plus", end=start + 30 * DAY)
    bill(settings, redis, ("e1", METER, 299_000))
    accounts.change_plan(resources, USER, "basic", at="period_end")
    drain(settings, USER)
    pass_time(settings, 30 * DAY - timedelta(minutes=1))
    assert accounts.show(resources, USER).plan == "plus"
    if late is not None:
        pass_time(settings, 30 * DAY + late)
        assert accounts.show(resources, USER).plan == "basic"
    account = accounts.renew(resources, USER, "inv-2", start + 30 * DAY, start + 60 * DAY).account
    balance = account.balances[METER]
    assert (account.plan, account.next_plan, account.highest_tier) == ("basic", None, 2)
    # Closed with what plus granted; the new period has what basic grants.
    assert (balance.allowance, balance.used, balance.rollover) == (100_000, 0, 1_000)
    assert (balance.period_start, balance.period_end) == (start + 30 * DAY, start + 60 * DAY)
    assert accounts.renew(resources, USER, "inv-2", start + 30 * DAY, start + 60 * DAY).repeated
    with pytest.raises(KeyConflict, match=r"^invoice_id: inv-2 is of another period"):
        accounts.renew(resources, USER, "inv-2", start + 60 * DAY, start + 90 * DAY)
    assert accounts.renew(resources, USER, "inv-1", start, start + 30 * DAY).stale
    assert accounts.show(resources, USER).balances[METER] == balance


def test_a_change_at_period_end_to_a_free_plan_takes_effect_at_the_known_end(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    start = now_of(settings)
    accounts.open_new(resources, USER, "basic", end=start + 30 * DAY)
    accounts.change_plan(resources, USER, "free", at="period_end")
    assert accounts.change_plan(resources, USER, "free", at="period_end").repeated
    pass_time(settings, 30 * DAY + timedelta(hours=1))
    bill(settings, redis, ("e1", METER, 10))
    account = accounts.show(resources, USER)
    balance = account.balances[METER]
    assert (account.plan, account.next_plan) == ("free", None)
    assert (balance.allowance, balance.used, balance.rollover) == (5_000, 10, 100_000)
    assert balance.period_start == start + 30 * DAY
    ((period_start,),) = rows(settings, "SELECT period_start FROM usage_log")
    assert period_start == start + 30 * DAY


def test_naming_the_plan_it_has_calls_a_scheduled_change_off(settings: Settings, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic", end=now_of(settings) + 30 * DAY)
    accounts.change_plan(resources, USER, "free", at="period_end")
    assert accounts.change_plan(resources, USER, "basic").account.next_plan is None
    pass_time(settings, 31 * DAY)
    assert accounts.show(resources, USER).plan == "basic"


def test_a_renewal_finds_the_meters_of_a_plan_taken_meanwhile(settings: Settings, resources: Resources) -> None:
    start = now_of(settings)
    accounts.open_new(resources, USER, "tenant")
    accounts.change_plan(resources, USER, "basic", period_end=start + 30 * DAY)
    assert (
        accounts.set_status(resources, USER, "canceled", at="period_end").account.status_change_at == start + 30 * DAY
    )
    accounts.set_status(resources, USER, "active")
    pass_time(settings, 31 * DAY)
    balance = accounts.renew(resources, USER, "inv", start + 30 * DAY, start + 60 * DAY).account.balances[METER]
    assert (balance.rollover, balance.period_end) == (100_000, start + 60 * DAY)


def test_a_late_renewal_brings_its_plan_to_meters_that_were_opened_after_its_end(
    settings: Settings, resources: Resources
) -> None:
    start = now_of(settings) - 60 * DAY
    accounts.open_new(resources, USER, "basic", start=start, end=start + 30 * DAY)
    plans = dict(resources.catalogue.plans)
    meters = {**plans["plus"].meters, "credits": Allowance(quantity=10)}
    plans["plus"] = plans["plus"].model_copy(update={"meters": meters})
    edited = Resources(
        settings, resources.catalogue.model_copy(update={"plans": plans}), resources.engine, resources.redis
    )
    accounts.change_plan(edited, USER, "plus", at="period_end")
    credits.grant(edited, USER, "credits", 5, "order-1")
    account = accounts.renew(edited, USER, "inv", start + 30 * DAY, start + 61 * DAY).account
    assert (account.plan, account.balances[METER].period_end) == ("plus", start + 61 * DAY)
    late = account.balances["credits"]
    assert (late.allowance, late.purchased, late.period_end) == (10, 5, start + 61 * DAY)


@pytest.mark.parametrize(("late", "kind"), [(timedelta(minutes=-30), "renewal"), (timedelta(hours=1), "lapse")])
def test_the_history_of_closed_periods_is_kept(
    settings: Settings, redis: Redis, resources: Resources, late: timedelta, kind: str
) -> None:
    start = now_of(settings)
    accounts.open_new(resources, USER, "basic", end=start + 30 * DAY)
    bill(settings, redis, ("e1", METER, 70))
    pass_time(settings, 30 * DAY + late)
    accounts.renew(resources, USER, "inv", start + 30 * DAY, start + 60 * DAY)
    ((closed,),) = rows(
        settings,
        "SELECT detail->'closed' FROM ledger_entry WHERE kind = %s AND meter = %s",
        kind, METER,
    )  # fmt: skip
    assert isinstance(closed, dict)
    assert (closed["plan"], closed["allowance"], closed["used"], closed["skipped"]) == ("basic", 100_000, 70, 0)
    assert datetime.fromisoformat(closed["period_end"]) == start + 30 * DAY


# ---------------------------------------------------------------------------------------------------------------------
# Closing for good


@pytest.fixture
def closed(settings: Settings, redis: Redis, resources: Resources, billing: Billing) -> str:
    """An account with a life, closed; the pseudonym of its history."""
    accounts.open_new(resources, USER, "basic", end=now_of(settings) + 30 * DAY)
    credits.grant(resources, USER, METER, 500, "order-1")
    credits.grant(resources, OTHER, "credits", 5, "order-2", open_plan="tenant")
    bill(settings, redis, ("e1", METER, 100), reference_id="contract-of-jane", hold_key="job-of-jane")
    bill(settings, redis, ("e2", METER, 50), dimensions={"document_id": "diary-of-jane", "backend": "gemini"})
    bill(settings, redis, ("e3", METER, -1), reference_id="contract-of-jane")
    stream = partition_of(settings, USER).entries
    for half in (f'{{"user_id": "{USER}", "quantity": 1}}', f'{{"event_id": "e5", "user_id" :"{USER}", "me'):
        redis.xadd(stream, {"v": "1", "e": half})
    theirs = {"event_id": "e1", "user_id": OTHER, "meter": "gold", "quantity": 1, "source": USER}
    redis.xadd(stream, {"v": "1", "e": json.dumps(theirs)})
    billing.charge(USER, METER, 7, event_id="e4")
    drain(settings, USER)
    renew(resources)  # it waits for its start
    accounts.set_status(resources, USER, "canceled", at="period_end")
    credits.reverse(resources, USER, "e2")
    pseudonym = close_account(resources, USER, forfeit=True)
    drain(settings, USER)
    return pseudonym


def test_a_closed_account_leaves_history_under_a_pseudonym_and_nothing_personal(
    settings: Settings, redis: Redis, resources: Resources, closed: str
) -> None:
    assert closed.startswith("closed:")
    for table in ("account", "balance", "ledger_entry", "usage_log", "dead_letter", "ledger_hold"):
        for personal in (USER, "of-jane"):
            assert rows(settings, f"SELECT t::text FROM {table} AS t WHERE t::text LIKE %s", f"%{personal}%") == []
    letters = rows(settings, "SELECT state, payload = '' FROM dead_letter ORDER BY id")
    assert letters == [("dropped", True)] * 3 + [("open", False)]  # the last one is another user's
    assert rows(settings, "SELECT event_id, amount FROM usage_log WHERE user_id = %s ORDER BY seq", closed) == [
        ("e1", 100), ("e2", 50), ("e4", 7)
    ]  # fmt: skip
    assert rows(settings, "SELECT plan, status FROM account WHERE user_id = %s", closed) == [("basic", "closed")]
    balances = rows(
        settings, "SELECT used, rollover, purchased, coalesce(allowance, -1) FROM balance WHERE user_id = %s", closed
    )
    assert set(balances) == {(0, 0, 0, 0)}
    ((change,),) = rows(
        settings,
        "SELECT purchased_change FROM ledger_entry WHERE user_id = %s AND kind = 'close' AND meter = %s",
        closed, METER,
    )  # fmt: skip
    assert change == -500


def test_what_redis_still_knows_of_a_closed_account_expires(settings: Settings, redis: Redis, closed: str) -> None:
    partition = partition_of(settings, USER)
    assert not redis.exists(partition.account(USER).balance, partition.account(USER).lease)
    assert pending_of(redis, settings, USER, METER) == {}
    assert stream_of(redis, settings, USER) == []
    named: Any = redis.keys(f"*{USER}*")
    seconds = [redis.ttl(key) for key in named]
    assert all(0 < left <= settings.outcome_ttl_seconds for left in seconds), dict(zip(named, seconds, strict=True))


@pytest.mark.parametrize("default_plan", [None, "free"])
def test_a_late_repeat_is_still_known_and_nothing_is_billed(
    settings: Settings, redis: Redis, closed: str, default_plan: str | None
) -> None:
    before = rows(settings, "SELECT t::text FROM usage_log AS t ORDER BY 1")
    late = settings.model_copy(update={"default_plan": default_plan})
    bill(late, redis, ("e1", METER, 100), ("e4", METER, 7))
    assert rows(settings, "SELECT t::text FROM usage_log AS t ORDER BY 1") == before
    bill(late, redis, ("e1", METER, 99))
    assert rows(settings, "SELECT reason FROM dead_letter WHERE state = 'open' ORDER BY id DESC LIMIT 1") == [
        ("id_conflict",)
    ]
    bill(late, redis, ("new", METER, 3))
    assert rows(settings, "SELECT uncollected FROM usage_log WHERE event_id = 'new'") == [(3,)]
    assert rows(settings, "SELECT 1 FROM account WHERE user_id = %s", USER) == []


def test_a_second_close_is_harmless_and_the_id_stays_closed(
    settings: Settings, resources: Resources, closed: str
) -> None:
    before = stored(settings)
    assert close_account(resources, USER) == closed
    for action in (
        lambda: accounts.open_new(resources, USER, "basic"),
        lambda: credits.grant(resources, USER, METER, 1, "k", open_plan="basic"),
        lambda: credits.seed_signup(resources, USER, plan="tenant"),
        lambda: accounts.set_status(resources, USER, "active"),
    ):
        with pytest.raises(AccountError, match=r"^user_id: .* was closed; reopen it, or"):
            action()
    assert stored(settings) == before


def test_history_stays_as_it_is_also_when_closed(
    settings: Settings, redis: Redis, resources: Resources, closed: str
) -> None:
    credits.grant(resources, OTHER, "credits", 6, "order-3")
    bill(settings, redis, ("e1", "credits", 1), user_id=OTHER, reference_id="theirs")
    for statement in (
        "UPDATE usage_log SET reference_id = NULL WHERE user_id = 'trial-7'",
        "UPDATE usage_log SET user_id = 'closed:x' WHERE user_id = 'trial-7'",
        "UPDATE ledger_entry SET user_id = 'closed:x' WHERE user_id = 'trial-7'",
        "UPDATE usage_log SET amount = amount + 1, uncollected = uncollected + 1 WHERE user_id LIKE 'closed:%%'",
        "UPDATE ledger_entry SET purchased_after = 1 WHERE user_id LIKE 'closed:%%'",
        "UPDATE ledger_entry SET detail = '{}' WHERE user_id LIKE 'closed:%%'",
        "UPDATE usage_log SET user_id = 'trial-7' WHERE user_id LIKE 'closed:%%'",
        "DELETE FROM usage_log WHERE user_id LIKE 'closed:%%'",
        "DELETE FROM ledger_entry WHERE user_id LIKE 'closed:%%'",
    ):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            rows(settings, statement)


def test_an_account_with_events_that_wait_is_not_closed(
    settings: Settings, resources: Resources, billing: Billing
) -> None:
    accounts.open_new(resources, USER, "basic")
    drain(settings, USER)
    billing.emit(USER, METER, 5, event_id="e1")
    with pytest.raises(AccountError, match=r"^forfeit: closing .* loses 1 event not applied yet; "):
        close_account(resources, USER)
    drain(settings, USER)
    assert close_account(resources, USER).startswith("closed:")
    assert dead_letters.listed(resources) == []


def test_a_closed_id_may_spend_nothing_though_strangers_start_on_a_plan(settings: Settings, closed: str) -> None:
    """Its events are uncollected, so whatever a check allowed would be free for ever."""
    with Billing.connect(settings.model_copy(update={"default_plan": "free"})) as billing:
        assert billing.check("stranger", METER, 1).allowed
        answer = billing.check(USER, METER, 1)
    assert (answer.allowed, answer.reason) == (False, Reason.UNKNOWN_ACCOUNT)


def test_a_history_is_no_account(settings: Settings, redis: Redis, resources: Resources, closed: str) -> None:
    before = stored(settings)
    for action in (
        lambda: accounts.set_status(resources, closed, "active"),
        lambda: accounts.change_plan(resources, closed, "plus"),
        lambda: credits.grant(resources, closed, METER, 1, "k"),
        lambda: credits.carry_over(resources, OTHER, closed, "k", meter="credits"),
        lambda: credits.reverse(resources, closed, "e1"),
        lambda: close_account(resources, closed),
    ):
        with pytest.raises(AccountError, match=r"^user_id: .* was closed; reopen it, or"):
            action()
    assert stored(settings) == before
    bill(settings, redis, ("e1", METER, 100), ("new", METER, 3), user_id=closed)
    assert rows(settings, "SELECT event_id, uncollected FROM usage_log WHERE seq IS NULL") == [("new", 3)]
    assert stored(settings)[:3] == before[:3]


def test_refused_events_are_erased_however_their_producer_writes_a_slash(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    accounts.open_new(resources, "org/jane", "basic")
    for written in ("org/jane", "org\\/jane"):
        half = f'{{"user_id": "{written}", "reference_id": "contract-of-jane", "quan'
        redis.xadd(partition_of(settings, "org/jane").entries, {"v": "1", "e": half})
    drain(settings, "org/jane")
    close_account(resources, "org/jane")
    assert rows(settings, "SELECT state, payload FROM dead_letter") == [("dropped", b"")] * 2


@pytest.mark.parametrize("rolled_up", [True, False])
def test_a_roll_up_that_meets_the_closing_leaves_nothing_personal(
    settings: Settings, redis: Redis, resources: Resources, monkeypatch: pytest.MonkeyPatch, rolled_up: bool
) -> None:
    accounts.open_new(resources, USER, "basic")
    bill(settings, redis, ("e1", METER, 100), dimensions={"document_id": "diary-of-jane"})
    may_commit, stands = Event(), Event()
    erase_letters = erasure._erase_dead_letters

    def erase(postgres: Postgres, user_id: str) -> None:
        erase_letters(postgres, user_id)
        stands.set()
        assert may_commit.wait(10)

    def roll_up() -> None:
        with batch_connection(resources.engine) as postgres:
            reports.roll_up(postgres, USER, 1_000)

    if rolled_up:
        roll_up()
    monkeypatch.setattr(erasure, "_erase_dead_letters", erase)
    with ThreadPoolExecutor(2) as pool:
        closing_now = pool.submit(close_account, resources, USER)
        assert stands.wait(10)
        rolling = pool.submit(roll_up)
        waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        wait_until(lambda: rolling.done() or bool(rows(settings, waits)), "it waits for the closing, or is through")
        may_commit.set()
        closing_now.result(10)
        rolling.result(10)
    for table in ("rollup_state", "usage_rollup", "document_rollup", "document_lifetime", "balance_checkpoint"):
        assert rows(settings, f"SELECT t::text FROM {table} AS t WHERE user_id = %s", USER) == []


def test_a_batch_that_skips_an_account_being_closed_leaves_its_events_for_later(
    settings: Settings, redis: Redis, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The close commits while the batch asks who is skipped and who was never there."""
    accounts.open_new(resources, USER, "basic")
    bill(settings, redis, ("e1", METER, 100))
    may_commit, stands = Event(), Event()
    real_erase, real_load = erasure._erase_dead_letters, batch.load_for_update

    def erase(postgres: Postgres, user_id: str) -> None:
        real_erase(postgres, user_id)
        stands.set()
        assert may_commit.wait(10)

    def load(*arguments: Any, skip_locked: bool = False) -> Loaded:
        loaded = real_load(*arguments, skip_locked=skip_locked)
        if skip_locked:
            may_commit.set()
            closing_now.result(10)
        return loaded

    monkeypatch.setattr(erasure, "_erase_dead_letters", erase)
    late = settings.model_copy(update={"default_plan": "free", "lock_timeout_ms": 50})
    with ThreadPoolExecutor(1) as pool:
        closing_now = pool.submit(close_account, resources, USER)
        assert stands.wait(10)
        monkeypatch.setattr(batch, "load_for_update", load)
        event = {"event_id": "e1", "user_id": USER, "meter": METER, "quantity": 100}
        redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": json.dumps(event)})
        with worker_resources(late) as own:
            drain_stream(own, partition_of(settings, USER))
    drain(late, USER)
    assert rows(settings, "SELECT count(*) FROM usage_log WHERE event_id = 'e1'") == [(1,)]
    assert rows(settings, "SELECT 1 FROM account WHERE user_id = %s", USER) == []


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue


def test_an_edited_catalogue_is_shown_as_what_would_change(resources: Resources) -> None:
    accounts.open_many(resources, [USER, OTHER], "basic")
    assert differences(resources, resources.catalogue) == []
    plans = dict(resources.catalogue.plans)
    voice = plans["basic"].meters[METER].model_copy(update={"quantity": 90_000, "rollover_cap": 5})
    plans["basic"] = plans["basic"].model_copy(update={"meters": {**plans["basic"].meters, METER: voice}})
    edited: Catalogue = resources.catalogue.model_copy(update={"plans": plans})
    found = [
        (each.plan, each.meter, each.field, each.in_force, each.catalogue, each.accounts)
        for each in differences(resources, edited)
    ]
    assert found == [
        ("basic", METER, "allowance", 100_000, 90_000, 2),
        ("basic", METER, "rollover_cap", 1_000_000, 5, 2),
    ]
    del plans["basic"]
    gone = differences(resources, resources.catalogue.model_copy(update={"plans": plans}))
    assert {(each.field, each.catalogue) for each in gone} == {("plan", "gone; terms stay")}


def test_a_difference_is_counted_once_for_all_accounts_that_have_it(settings: Settings, resources: Resources) -> None:
    basic = resources.catalogue.plans["basic"]
    for user, terms in ((USER, {"quantity": 90_000}), (OTHER, {"quantity": 90_000, "rollover_cap": 7})):
        meters = {**basic.meters, METER: basic.meters[METER].model_copy(update=terms)}
        plans = {**resources.catalogue.plans, "basic": basic.model_copy(update={"meters": meters})}
        earlier = Resources(
            settings, resources.catalogue.model_copy(update={"plans": plans}), resources.engine, resources.redis
        )
        accounts.open_new(earlier, user, "basic")
    found = [
        (each.field, each.in_force, each.catalogue, each.accounts)
        for each in differences(resources, resources.catalogue)
    ]
    assert sorted(found) == [("allowance", 90_000, 100_000, 2), ("rollover_cap", 7, 1_000_000, 1)]


def test_a_plan_that_is_gone_is_renewed_under_its_terms(settings: Settings, resources: Resources) -> None:
    start = now_of(settings)
    accounts.open_new(resources, USER, "basic", end=start + 30 * DAY)
    plans = {code: plan for code, plan in resources.catalogue.plans.items() if code != "basic"}
    later = Resources(
        settings, resources.catalogue.model_copy(update={"plans": plans}), resources.engine, resources.redis
    )
    drain(settings, USER)
    pass_time(settings, 30 * DAY - SOON)
    balance = accounts.renew(later, USER, "inv", start + 30 * DAY, start + 60 * DAY).account.balances[METER]
    assert (balance.allowance, balance.rollover, balance.cadence) == (100_000, 100_000, "subscription")


def test_the_key_of_two_transfers_is_not_taken_for_a_third(resources: Resources) -> None:
    for user_id in "abcd":
        accounts.open_new(resources, user_id, "tenant")
        credits.grant(resources, user_id, "credits", 10, f"g-{user_id}")
    credits.carry_over(resources, "a", "b", "k")
    credits.carry_over(resources, "c", "d", "k")
    credits.grant(resources, "c", "credits", 10, "g2")
    with pytest.raises(AccountError, match=r"^key: k was used"):
        credits.carry_over(resources, "c", "b", "k")


def test_what_comes_after_closing_joins_the_history_without_a_name(settings: Settings, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    history = close_account(resources, USER)
    drain(settings, USER)
    with Billing.connect(settings) as billing:
        for _ in range(2):
            billing.emit(USER, METER, 5, event_id="late", reference_id="Jane's", dimensions={"document_id": "diary"})
    drain(settings, USER)
    query = "SELECT user_id, event_id, uncollected, reference_id, dimensions FROM usage_log"
    assert rows(settings, query) == [(history, "late", 5, None, None)]
    assert rows(settings, "SELECT FROM dead_letter") == []
