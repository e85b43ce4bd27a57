"""Balances that are loaded together: each once, and no account that fails or takes its time holds up the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis, ResponseError

from config.settings import Settings
from schemas.answers import HoldState
from tests.support.ledger import execute, give_accounts
from tests.support.streams import account_of
from tests.support.waiting import wait_until
from worker.admin.erasure import close_account
from worker.client import AsyncBilling, Billing
from worker.client.ledger import LedgerView
from worker.errors import LedgerUnavailable
from worker.resources import Resources

METER, OTHER_METER = "premium_voice", "ocr_tokens"
USERS = [f"u{number:02}" for number in range(12)]
MANY = [f"m{number}" for number in range(2_000)]
# Two rounds go on while the next one gathers: these users begin them.
FIRST = ["first", "second"]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Patient: a machine that is busy with other work must not look like a server that is away."""
    patience = {
        "redis_check_timeout_ms": 30_000,
        "load_wait_ms": 60_000,
        "load_lease_ttl_ms": 60_000,
        "statement_timeout_ms": 60_000,
    }
    return settings.model_copy(update={**patience, "database_pool_size": 1, "load_other_wait_ms": 400})


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Users of each question to Postgres."""
    found: list[list[str]] = []
    load = LedgerView.account_views

    def noted(self: LedgerView, users: Sequence[str]) -> Any:
        found.append(list(users))
        return load(self, users)

    monkeypatch.setattr(LedgerView, "account_views", noted)
    return found


@pytest.fixture
def accounts(settings: Settings) -> None:
    give_accounts(settings, [*USERS, *FIRST], "basic")


class Told:
    """What each check said, or its error, and when."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.began = time.monotonic()

    def note(self, user_id: str, answer: Any) -> None:
        self.answers[user_id] = answer
        self.seconds[user_id] = time.monotonic() - self.began


async def checks(billing: AsyncBilling, users: Sequence[str]) -> Told:
    """Check all users at once: those after the first two are loaded in one round."""
    told = Told()

    async def check(user_id: str) -> None:
        try:
            told.note(user_id, await billing.check(user_id, METER, 1))
        except Exception as error:  # noqa: BLE001
            told.note(user_id, error)

    await asyncio.gather(*(check(user_id) for user_id in [*FIRST, *users]))
    return told


def together(settings: Settings, users: Sequence[str]) -> Told:
    """What an `AsyncBilling` says of users that are loaded in one round. No turn is left taken."""

    async def ask() -> Told:
        async with AsyncBilling.connect(settings) as billing:
            told = await checks(billing, users)
            nothing_left(billing._here()._turns)
            return told

    return asyncio.run(ask())


def nothing_left(turns: Any) -> None:
    """No call waits, and no round is under way."""
    left = turns._turns
    assert (left._waiting, left._queue, left._rounds) == ({}, {}, 0)


def allowed(told: Told, users: Sequence[str]) -> None:
    assert {user_id: told.answers[user_id].allowed for user_id in users} == dict.fromkeys(users, True)


# ---------------------------------------------------------------------------------------------------------------------
# Each once


def each_once(rounds: list[list[str]], at_most: int) -> None:
    assert sorted(user_id for users in rounds for user_id in users) == sorted(MANY)
    assert len(rounds) <= at_most


@pytest.mark.parametrize("call", ["check", "reserve"])
def test_coroutines_load_thousands_of_balances_in_few_rounds(
    settings: Settings, rounds: list[list[str]], call: str
) -> None:
    give_accounts(settings, MANY, "basic")

    async def ask() -> list[bool]:
        async with AsyncBilling.connect(settings) as billing:

            async def one(number: int, user_id: str) -> bool:
                if call == "check":
                    return (await billing.check(user_id, METER, 1)).allowed
                return (await billing.reserve(user_id, METER, 1, f"k{number}")).answer.state is HoldState.HELD

            return await asyncio.gather(*(one(number, user_id) for number, user_id in enumerate(MANY * 3)))

    assert asyncio.run(ask()) == [True] * 6_000
    each_once(rounds, 2_000 // 128 + 20)


def test_threads_load_thousands_of_balances_in_rounds(settings: Settings, rounds: list[list[str]]) -> None:
    give_accounts(settings, MANY, "basic")
    users = [user_id for user_id in MANY for _ in range(3)]
    with Billing.connect(settings) as billing, ThreadPoolExecutor(64) as threads:
        assert all(threads.map(lambda user_id: billing.check(user_id, METER, 1).allowed, users))
        nothing_left(billing._turns)
    each_once(rounds, 1_000)


# ---------------------------------------------------------------------------------------------------------------------
# One account of a round is unlike the others


@pytest.fixture(params=[0, 5], ids=["it loads for the others", "another loads for it"])
def odd(request: pytest.FixtureRequest, accounts: None) -> tuple[str, list[str], list[str]]:
    """A user, the others of its round, and all of the round in the order of their calls."""
    user_id, *others = USERS
    users = [*others]
    users.insert(request.param, user_id)
    return user_id, others, users


def test_a_round_asks_the_clock_of_the_ledger_no_more_often_than_a_single_load(settings: Settings) -> None:
    give_accounts(settings, MANY[:300], "basic")
    slow = "SELECT clock_timestamp() FROM pg_sleep(0.25)"
    execute(settings, f"CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE AS '{slow}'")
    began = time.monotonic()
    with Billing.connect(settings) as billing, ThreadPoolExecutor(300) as threads:
        assert all(threads.map(lambda user_id: billing.check(user_id, METER, 1).allowed, MANY[:300]))
    assert time.monotonic() - began < 15, "once for each row would take minutes"


def test_an_unknown_account_is_told_apart(
    settings: Settings, rounds: list[list[str]], odd: tuple[str, list[str], list[str]]
) -> None:
    _, others, users = odd
    told = together(settings, ["nobody", *users] if users[0] != others[0] else [*users, "nobody"])
    allowed(told, users)
    assert told.answers["nobody"].reason == "unknown_account"
    assert len(rounds) == 3


def test_a_closed_account_is_not_opened_with_the_default_plan(
    settings: Settings, resources: Resources, odd: tuple[str, list[str], list[str]]
) -> None:
    user_id, others, users = odd
    close_account(resources, user_id, forfeit=True)
    told = together(settings.model_copy(update={"default_plan": "basic"}), [*users, "new"])
    allowed(told, [*others, "new"])
    assert told.answers[user_id].reason == "unknown_account"


@pytest.mark.parametrize("ids", [900, 3_000])
def test_pending_ids_of_one_account_count_and_leave(
    settings: Settings, redis: Redis, rounds: list[list[str]], odd: tuple[str, list[str], list[str]], ids: int
) -> None:
    user_id, others, users = odd
    recorded = ids - 100
    pending = account_of(settings, user_id).pending(METER)
    events: Any = {f"e:e{number}": 1 for number in range(ids)}
    redis.hset(pending, mapping={**events, "h:hold": 5, "total": ids + 5})
    redis.hset(account_of(settings, others[0]).pending(METER), mapping={"e:e1": 1, "total": 1})
    execute(
        settings,
        "INSERT INTO usage_log (user_id, event_id, seq, meter, quantity, multiplier, amount, from_subscription, "
        "from_rollover, from_purchased, overflow_to_debt, uncollected, period_start, occurred_at, applied_at, "
        f"clamped) SELECT '{user_id}', 'e' || n, n + 2, 'premium_voice', 1, 1, 1, 1, 0, 0, 0, 0, now(), now(), now(), "
        f"false FROM generate_series(0, {recorded - 1}) AS n",
    )
    execute(settings, f"UPDATE account SET seq = {ids} WHERE user_id = '{user_id}'")
    told = together(settings, users)
    allowed(told, users)
    assert {each: told.answers[each].pending for each in users} == {
        **dict.fromkeys(others, 0), others[0]: 1, user_id: 105,
    }  # fmt: skip
    assert redis.hlen(pending) == 102


def another_process_loads(settings: Settings, redis: Redis, users: Sequence[str]) -> None:
    token = f"{'f' * 16}:{int(time.time() * 1_000)}"
    for user_id in users:
        redis.set(account_of(settings, user_id).lease, token, px=60_000)


def test_a_load_of_another_process_holds_up_its_own_user_alone(
    settings: Settings, redis: Redis, rounds: list[list[str]], odd: tuple[str, list[str], list[str]]
) -> None:
    user_id, others, users = odd
    another_process_loads(settings, redis, [user_id])
    told = together(settings.model_copy(update={"load_other_wait_ms": 3_000}), users)
    allowed(told, users)
    assert told.seconds[user_id] >= 3, "until that process is taken for dead"
    if users[0] != user_id:
        assert max(told.seconds[each] for each in others) < 3
    assert sorted(user for users in rounds for user in users) == sorted([*FIRST, *users])


def test_balances_that_another_process_loads_are_waited_for_together(
    settings: Settings, redis: Redis, rounds: list[list[str]], accounts: None
) -> None:
    another_process_loads(settings, redis, USERS)
    told = together(settings, [*USERS])
    allowed(told, USERS)
    assert min(told.seconds[user_id] for user_id in USERS) >= 0.4
    assert sorted(user for users in rounds for user in users) == sorted([*FIRST, *USERS])
    assert len(rounds) == 3, "they are loaded together after the wait"


@pytest.mark.parametrize("broken", ["lease", "pending", "version"])
def test_an_error_of_one_account_is_its_own(
    settings: Settings, redis: Redis, odd: tuple[str, list[str], list[str]], broken: str
) -> None:
    """The three steps of a round that Redis may refuse for one account: its lease, its pending ids, its balance."""
    user_id, others, users = odd
    keys = account_of(settings, user_id)
    name = {"lease": keys.lease, "pending": keys.pending(OTHER_METER), "version": keys.version}[broken]
    redis.rpush(name, "of another type")
    told = together(settings, users)
    allowed(told, others)
    assert isinstance(told.answers[user_id], ResponseError)
    redis.delete(name, keys.lease)
    allowed(together(settings, [user_id]), [user_id])


def test_a_balance_older_than_its_published_version_fails_its_own_calls(
    settings: Settings, redis: Redis, odd: tuple[str, list[str], list[str]]
) -> None:
    user_id, others, users = odd
    redis.set(account_of(settings, user_id).version, "9999999999 1")
    told = together(settings, users)
    allowed(told, others)
    assert isinstance(told.answers[user_id], LedgerUnavailable)


# ---------------------------------------------------------------------------------------------------------------------
# A round that ends in the middle


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[BaseException]]]:
    """Questions to Postgres wait for the event; one about several users raises the next of the errors."""
    go_on, errors = threading.Event(), list[BaseException]()
    load = LedgerView.account_views

    def slowly(self: LedgerView, users: Sequence[str]) -> Any:
        go_on.wait(60)
        if len(users) > 1 and errors:
            raise errors.pop()
        return load(self, users)

    monkeypatch.setattr(LedgerView, "account_views", slowly)
    yield go_on, errors
    go_on.set()


def in_threads(
    settings: Settings, go_on: threading.Event, users: Sequence[str], check: Callable[[Billing, str], Any]
) -> list[BaseException | None]:
    """The errors of checks in threads, by user: those after the first two are loaded in one round."""
    with Billing.connect(settings) as billing, ThreadPoolExecutor(len(users) + 2) as threads:
        turns = billing._turns._turns
        first = [threads.submit(check, billing, user_id) for user_id in FIRST]
        wait_until(lambda: turns._rounds == 2, "two rounds are under way")
        found = [threads.submit(check, billing, user_id) for user_id in users]
        wait_until(lambda: len(turns._queue) == len(users), "the others wait")
        go_on.set()
        errors = [each.exception(60) for each in [*first, *found]]
        nothing_left(billing._turns)
        assert all(billing.check(user_id, METER, 1).allowed for user_id in users)
    return errors


@pytest.mark.usefixtures("accounts")
def test_a_ledger_that_fails_fails_the_round(
    settings: Settings, held_up: tuple[threading.Event, list[BaseException]]
) -> None:
    go_on, errors = held_up
    errors.append(LedgerUnavailable("gone"))
    found = in_threads(settings, go_on, USERS, lambda billing, user_id: billing.check(user_id, METER, 1))
    assert [type(error) for error in found] == [type(None)] * 2 + [LedgerUnavailable] * len(USERS)


@pytest.mark.usefixtures("accounts")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ResponseError("odd")], ids=["interrupt", "error"])
def test_a_thread_that_is_interrupted_fails_nobody_else(
    settings: Settings, held_up: tuple[threading.Event, list[BaseException]], error: BaseException
) -> None:
    go_on, errors = held_up
    errors.append(error)
    found = in_threads(settings, go_on, USERS, lambda billing, user_id: billing.check(user_id, METER, 1))
    assert [each for each in found if each is not None] == [error]


@pytest.mark.usefixtures("accounts")
def test_a_caller_that_is_cancelled_fails_nobody_else(
    settings: Settings, held_up: tuple[threading.Event, list[BaseException]]
) -> None:
    go_on, _ = held_up

    async def ask() -> list[Any]:
        async with AsyncBilling.connect(settings) as billing:
            tasks = [asyncio.create_task(billing.check(user_id, METER, 1)) for user_id in [*FIRST, *USERS]]
            turns = billing._here()._turns._turns
            await asyncio.to_thread(wait_until, lambda: len(turns._queue) == len(USERS), "the others wait")
            tasks[0].cancel()
            tasks[2].cancel()  # it leads the round of the others
            go_on.set()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(wait_until, lambda: not turns._waiting, "no call waits")
            nothing_left(billing._here()._turns)
            return found

    found = asyncio.run(ask())
    assert [number for number, each in enumerate(found) if isinstance(each, asyncio.CancelledError)] == [0, 2]
    assert all(each.allowed for number, each in enumerate(found) if number not in {0, 2})
