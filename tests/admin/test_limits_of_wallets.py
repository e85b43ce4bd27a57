"""Limits and wallets together: a limit of a wallet counts what all its meters cost; a meter that draws has none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from config.catalogue import load_catalogue
from config.settings import Settings
from schemas.answers import Reason
from tests.support.catalogues import edited_catalogue
from tests.support.ledger import give_account, stop_clock
from tests.support.limits import USER, go_to, limit, send, use
from tests.support.resources import settings_for
from tests.support.streams import drain
from worker.admin import accounts, credits, limits, transfer
from worker.client import Billing
from worker.errors import AccountError, UsageLimitExceeded
from worker.reports.limits import limits_of
from worker.reports.proof import verify_ledger
from worker.reports.proof_run import prove_ledger
from worker.reports.usage import usage_summary
from worker.resources import Resources
from worker.rules.batch import work_out
from worker.rules.lifecycle import as_of, open_account
from worker.rules.received import Event
from worker.rules.rows import Loaded

VOICE, LOCAL, TOKENS, CREDITS = "premium_voice", "server_kokoro", "ocr_tokens", "credits"
# Ahead of any real clock: there the streams of the tests go by the ledger's clock. A Monday.
START = datetime(2088, 3, 1, 9, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
PLANS = """
[plans.team]
name = "Team"
tier = 2
meters.credits = { quantity = 10_000, cadence = "monthly", limits = [{ per = "day", amount = 600 }] }
meters.premium_voice = { wallet = "credits", price = "3" }
meters.server_kokoro = { wallet = "credits", price = "1" }
"""


@pytest.fixture(scope="module")
def catalogue_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edited_catalogue(tmp_path_factory.mktemp("team"), ("[plans.plus]", f"{PLANS}\n[plans.plus]"))


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str, catalogue_path: Path) -> Settings:
    settings = settings_for(emptied_database_url, redis_url, catalogue_path=catalogue_path)
    stop_clock(settings, START)
    give_account(settings, USER, "studio")
    return settings


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    with Billing.connect(settings) as client:
        yield client


def used(resources: Resources) -> dict[tuple[str, str], int]:
    return {(each.meter, each.per): each.used for each in limits_of(resources, USER).limits}


def proved(resources: Resources) -> bool:
    """From zero and from checkpoints, in Redis as in Postgres."""
    return verify_ledger(resources).differences == prove_ledger(resources).differences == []


def test_a_limit_of_a_wallet_bounds_all_its_meters_together(resources: Resources, billing: Billing) -> None:
    limit(resources, "day", 1_000, CREDITS, of="user")
    billing.reserve(USER, VOICE, 200, "job-1")
    billing.charge(USER, LOCAL, 100, "c1")
    answer = billing.check(USER, VOICE, 100)
    assert (answer.allowed, answer.available, answer.pending) == (True, 100, 700)
    denied = billing.check(USER, VOICE, 101)
    assert (denied.allowed, denied.reason, denied.cost, denied.wallet) == (
        False, Reason.SPENDING_LIMIT_REACHED, 303, CREDITS,
    )  # fmt: skip
    assert denied.limited_by is not None
    assert (denied.limited_by.amount, denied.limited_by.used) == (1_000, 0)
    assert billing.remaining(USER, TOKENS).remaining == 150_499
    assert billing.check(USER, CREDITS, 301).reason is Reason.SPENDING_LIMIT_REACHED
    with pytest.raises(UsageLimitExceeded, match="limit of the user 1000 per day"):
        billing.charge(USER, VOICE, 101, "c2")
    with pytest.raises(UsageLimitExceeded):
        billing.extend(USER, VOICE, "job-1", amount=301)
    estimate = billing.estimate(USER, VOICE, 101)
    assert (estimate.allowed, estimate.cost) == (False, 303)
    # The clock of the client is behind that of the ledger, so the charge is too old.
    use(resources, "job-1", 200, VOICE, hold_key="job-1")
    assert used(resources) == {(CREDITS, "day"): 600}
    summary = {each.meter: each.available for each in usage_summary(resources, USER).meters}
    assert (summary[CREDITS], summary[VOICE], summary[LOCAL]) == (400, 133, 400)
    assert proved(resources)


def test_two_meters_at_once_get_no_more_than_the_wallets_limit(settings: Settings, resources: Resources) -> None:
    limit(resources, "day", 50, CREDITS)
    with Billing.connect(settings) as client, ThreadPoolExecutor(8) as threads:
        client.check(USER, VOICE)

        def cost(number: int) -> int:
            meter, price = ((VOICE, 3), (LOCAL, 1))[number % 2]
            try:
                return client.reserve(USER, meter, 2, f"job-{number}").answer.amount * price
            except UsageLimitExceeded:
                return 0

        spent = sum(threads.map(cost, range(60)))
        assert spent in (49, 50)
        assert client.check(USER, LOCAL, 51 - spent).reason is Reason.SPENDING_LIMIT_REACHED


def test_a_limit_that_is_set_counts_what_the_meters_drew_and_a_reversal_gives_it_back(resources: Resources) -> None:
    use(resources, "yesterday", 100, VOICE)
    go_to(resources, START + DAY)
    use(resources, "e1", 100, VOICE)
    use(resources, "e2", 40, LOCAL)
    use(resources, "e3", 7, CREDITS)
    credits.reverse(resources, USER, "e2")
    limit(resources, "day", 1_000, CREDITS)
    assert used(resources) == {(CREDITS, "day"): 307}
    use(resources, "e4", 10, VOICE)
    credits.reverse(resources, USER, "e1")
    assert used(resources) == {(CREDITS, "day"): 37}
    assert proved(resources)


def test_a_backlog_over_the_end_of_a_window_counts_in_the_windows_in_which_it_came(resources: Resources) -> None:
    limit(resources, "day", 1_000, CREDITS)
    send(resources, "e1", 100, VOICE)
    go_to(resources, START + DAY)
    use(resources, "e2", 10, VOICE)
    assert used(resources)[CREDITS, "day"] in (30, 330)
    use(resources, "e2", 10, VOICE)
    assert proved(resources)


def test_a_wallet_whose_plan_begins_with_an_event_counts_that_event(resources: Resources) -> None:
    """The change of plan, the windows and the event are one batch."""
    accounts.change_plan(resources, USER, "team", at=START + HOUR)
    drain(resources.settings, USER)
    go_to(resources, START + 2 * HOUR)
    use(resources, "e1", 100, VOICE)
    assert used(resources) == {(CREDITS, "day"): 300}
    assert proved(resources)


def test_a_meter_that_draws_is_given_no_limit_and_its_own_one_rests(resources: Resources, billing: Billing) -> None:
    accounts.change_plan(resources, USER, "basic")
    limit(resources, "day", 10, VOICE, of="user")
    accounts.change_plan(resources, USER, "studio")
    drain(resources.settings, USER)
    assert billing.check(USER, VOICE, 11).allowed
    use(resources, "e1", 50, VOICE)
    (resting,) = limits_of(resources, USER).limits
    assert (resting.meter, resting.wallet, resting.used) == (VOICE, CREDITS, 0)
    for of in ("operator", "user"):
        with pytest.raises(AccountError, match="draws on the wallet credits in plan studio; limit credits instead"):
            limits.set_limit(resources, USER, VOICE, "week", 5, of=of)
    accounts.change_plan(resources, USER, "basic")
    drain(resources.settings, USER)
    assert billing.check(USER, VOICE, 11).reason is Reason.SPENDING_LIMIT_REACHED
    use(resources, "e2", 4, VOICE)
    assert used(resources) == {(VOICE, "day"): 4}
    accounts.change_plan(resources, USER, "studio")
    limit(resources, "day", None, VOICE, of="user")
    assert used(resources) == {}
    assert proved(resources)


def test_purchased_credits_of_a_wallet_are_left_out(resources: Resources, billing: Billing) -> None:
    credits.grant(resources, USER, CREDITS, 600, key="order-1")
    use(resources, "e1", 3_300, VOICE)
    assert billing.check(USER, VOICE, 233).allowed
    assert billing.check(USER, VOICE, 34, pay_from="allowance").reason is Reason.LIMIT_EXCEEDED
    assert billing.check(USER, VOICE, 33, pay_from="allowance").allowed
    limits.set_pay_from(resources, USER, "allowance")
    drain(resources.settings, USER)
    assert (billing.check(USER, VOICE, 34).allowed, billing.remaining(USER, LOCAL).remaining) == (False, 100)
    assert proved(resources)


def test_the_limit_of_a_meter_that_opens_with_its_first_event_counts_that_event(catalogue_path: Path) -> None:
    """An account that lacks a meter of its plan: the catalogue got it later."""
    catalogue = load_catalogue(catalogue_path)
    whole = open_account(catalogue, USER, "team", "active", START)
    lacking = whole._replace(balances={name: each for name, each in whole.balances.items() if name != CREDITS})
    seen = as_of(catalogue, lacking, START + HOUR).balances[CREDITS].limits
    assert seen is not None
    assert [(each.amount, each.used) for each in seen.standings()] == [(600, 0)]
    facts: dict[str, Any] = dict.fromkeys(Event._fields) | {"entry_id": f"{int(START.timestamp()) * 1_000}-1"}
    facts |= {"user_id": USER, "meter": VOICE, "multiplier": "1", "remainder": 0, "occurred_at": START.isoformat()}
    events = [Event(**{**facts, "event_id": f"e{each}", "quantity": 10, "amount": 10}) for each in range(2)]
    outcome = work_out(events, Loaded(START + HOUR, 1, {USER: lacking}, {}), catalogue, None)
    after = outcome.disposals[-1].account
    assert after is not None
    limits_after = after.balances[CREDITS].limits
    assert limits_after is not None
    assert [each.used for each in limits_after.standings()] == [60]
    assert [entry.kind for entry in outcome.writes.entries] == ["open_meter", "open_window"]


def test_an_export_carries_the_limit_of_a_wallet(resources: Resources) -> None:
    limit(resources, "day", 1_000, CREDITS)
    use(resources, "e1", 100, VOICE)
    before = used(resources)
    lines: list[str] = []
    transfer.export_accounts(resources, lines.append)
    (moved,) = (row for row in map(json.loads, lines) if row.get("user_id") == USER)
    assert moved["meters"][CREDITS]["limits"]["windows"]["day"]["used"] == before[CREDITS, "day"] == 300
