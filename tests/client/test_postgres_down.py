"""Checks while Postgres is away and Redis is well: the last known balance answers, and never for more than it holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.answers import Reason
from tests.client.clients import open_client
from tests.support.books import assert_proved
from tests.support.ledger import empty_ledger, execute, give_account, give_accounts
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import account_of, drain
from tests.support.waiting import wait_until
from worker.admin.credits import grant
from worker.client import Billing
from worker.demo.servers import Server, find_postgres, postgres_server
from worker.errors import LedgerUnavailable, UsageLimitExceeded
from worker.ledger.migrate import migrate

# It is about a server of its own.
pytestmark = pytest.mark.once

USER, METER = "u1", "credits"
UNITS = 1_000  # of the account's plan
LIMITS: dict[str, object] = {
    "cache_ttl_ms": 200,
    "ledger_down_pause_ms": 300,
    "statement_timeout_ms": 300,
    "ledger_answer_grace_ms": 200,
    "database_connect_timeout_seconds": 2,
}
# A call that waits for Redis alone, on a slow machine.
AT_ONCE_SECONDS = 0.1


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A Postgres that only this module uses, and may freeze or kill."""
    with postgres_server(find_postgres(os.environ)) as started:
        migrate(started.url)
        yield started


@pytest.fixture
def postgres(server: Server) -> Iterator[Server]:
    """The server with an empty ledger; it answers at the end whatever happens."""
    empty_ledger(server.url)
    try:
        yield server
    finally:
        server.thaw()
        server.start()


@pytest.fixture
def settings(postgres: Server, redis_url: str) -> Settings:
    made = settings_for(postgres.url, redis_url, **LIMITS)
    give_account(made, USER)
    return made


@pytest.fixture(params=["blocking", "awaiting"])
def billing(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Any]:
    client = open_client(request.param, settings)
    client.context.ledger_breaker.answered()  # clients share it, and earlier tests took this Postgres away
    yield client
    client.close()


@pytest.fixture(params=["killed", pytest.param("frozen", marks=pytest.mark.slow)])
def take_away(request: pytest.FixtureRequest, postgres: Server) -> Callable[[], None]:
    return postgres.kill if request.param == "killed" else postgres.freeze


def bring_back(postgres: Server) -> None:
    postgres.thaw()
    postgres.start()


def left(billing: Any) -> int | None:
    """Units that a check says are available."""
    available: int | None = billing.check(USER, METER, 1).available
    return available


def wait_until_stale(settings: Settings, redis: Redis) -> None:
    """Return once the cached balance is due for a load."""
    key = account_of(settings, USER).balance

    def is_stale() -> bool:
        cached: Any = redis.get(key)
        assert cached is not None, "it is kept"
        seconds, micros = redis.time()
        return int(cached.split(b"\n")[0].split(b" ")[2]) <= seconds * 1_000 + micros // 1_000

    wait_until(is_stale, "the balance is stale")


def test_what_is_pending_counts_against_the_last_known_balance(
    billing: Any, settings: Settings, redis: Redis, postgres: Server, take_away: Callable[[], None]
) -> None:
    billing.emit(USER, METER, 100, event_id="applied")
    drain(settings, USER)
    assert left(billing) == UNITS - 100
    take_away()
    wait_until_stale(settings, redis)
    assert left(billing) == UNITS - 100
    billing.emit(USER, METER, 300, event_id="emitted")
    billing.charge(USER, METER, 200, "charged")
    held = billing.reserve(USER, METER, 150, "held")
    wait_until_stale(settings, redis)
    assert left(billing) == 250
    assert billing.remaining(USER, METER).remaining == 250
    held.extend(amount=250)
    asks: list[Callable[[], object]] = [
        lambda: billing.reserve(USER, METER, 151, "too-much"),
        lambda: billing.charge(USER, METER, 151, "too-much"),
        lambda: held.extend(amount=401),
    ]
    for ask in asks:
        wait_until_stale(settings, redis)
        with pytest.raises(UsageLimitExceeded):
            ask()
    billing.charge(USER, METER, 150, "the-rest")
    wait_until_stale(settings, redis)
    answer = billing.check(USER, METER, 1)
    assert (answer.allowed, answer.reason, answer.available) == (False, Reason.LIMIT_EXCEEDED, 0)
    held.settle(250)
    bring_back(postgres)
    drain(settings, USER)
    assert left(billing) == 0
    assert billing.remaining(USER, METER).used == UNITS
    with worker_resources(settings) as resources:
        assert_proved(resources)


def test_after_the_return_of_postgres_answers_are_fresh(
    billing: Any, settings: Settings, redis: Redis, postgres: Server, take_away: Callable[[], None]
) -> None:
    assert left(billing) == UNITS
    take_away()
    wait_until_stale(settings, redis)
    assert left(billing) == UNITS
    bring_back(postgres)
    # As if no worker ran: the balance is not published, and only a load can show it.
    with worker_resources(settings) as resources:
        grant(resources, USER, METER, 70, "order-1")
    wait_until(lambda: left(billing) == UNITS + 70, "the balance is loaded", seconds=2)


def test_only_one_call_a_while_waits_for_a_frozen_postgres(
    billing: Any, settings: Settings, redis: Redis, postgres: Server
) -> None:
    others = [f"other-{number}" for number in range(20)]
    give_accounts(settings, others)
    for user_id in [*others, USER]:
        billing.check(user_id, METER, 1)
    postgres.freeze()
    wait_until_stale(settings, redis)

    def seconds(user_id: str) -> float:
        began = time.perf_counter()
        assert billing.check(user_id, METER, 1).available == UNITS
        return time.perf_counter() - began

    took = [seconds(user_id) for user_id in others]
    assert took[0] > AT_ONCE_SECONDS, "the first one has tried"
    assert max(took[1:]) < AT_ONCE_SECONDS, "the others know that"


@pytest.mark.parametrize("cut", ["age", "setting", "boundary", "unknown account", "other account"])
def test_where_no_balance_may_answer_the_call_says_that_postgres_is_away(
    settings: Settings, redis: Redis, postgres: Server, cut: str
) -> None:
    kept_seconds = {"age": 2, "setting": 0}.get(cut, 60)
    user = "nobody" if cut == "unknown account" else USER
    with Billing.connect(settings.model_copy(update={"ledger_down_balance_max_age_seconds": kept_seconds})) as billing:
        if cut == "boundary":
            # It would get its units again at the boundary, if it still is entitled to them then.
            execute(settings, "UPDATE balance SET period_end = ledger_now() + %s", timedelta(seconds=2))
        began = time.monotonic()
        billing.check(user, METER, 1)
        key = account_of(settings, user).balance
        postgres.kill()
        if cut in {"age", "boundary"}:
            wait_until_stale(settings, redis)
            assert left(billing) == UNITS
        if cut == "other account":
            user = "u2"
        else:
            wait_until(lambda: not redis.exists(key), "the balance is not kept any longer", seconds=5)
            assert time.monotonic() - began < 3
        with pytest.raises(LedgerUnavailable):
            billing.check(user, METER, 1)
        if user == USER:
            with pytest.raises(LedgerUnavailable):
                billing.reserve(USER, METER, 1, "job")


def test_clients_that_keep_no_balance_do_not_use_that_of_others(
    settings: Settings, redis: Redis, postgres: Server
) -> None:
    strict = settings.model_copy(update={"ledger_down_balance_max_age_seconds": 0})
    with Billing.connect(settings) as keeping, Billing.connect(strict) as asking:
        assert left(keeping) == UNITS
        postgres.kill()
        wait_until_stale(settings, redis)
        with pytest.raises(LedgerUnavailable):
            asking.check(USER, METER, 1)
        assert left(keeping) == UNITS


def test_a_publish_renews_a_kept_balance(settings: Settings, redis: Redis, postgres: Server) -> None:
    """Else its ids would leave pending, and the last known balance would not hold what they cost."""
    with Billing.connect(settings) as billing:
        assert left(billing) == UNITS
        wait_until_stale(settings, redis)
        billing.emit(USER, METER, 400, event_id="e1")
        drain(settings, USER)
        postgres.kill()
        wait_until_stale(settings, redis)
        assert left(billing) == UNITS - 400
