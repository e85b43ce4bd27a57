"""Fractions of a unit on real servers: carried from event to event, proved, explained, and never overspent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis import Redis

from config.catalogue import CatalogueError, load_catalogue
from config.settings import Settings
from schemas.answers import Parts
from tests.support.books import assert_proved
from tests.support.ledger import execute, give_account, rows
from tests.support.paths import ROOT
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import partition_of, pending_of
from worker.admin import accounts, credits, transfer
from worker.admin.erasure import close_account
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.errors import UsageLimitExceeded
from worker.reports.explain import explain
from worker.reports.proof import verify_ledger
from worker.resources import Resources

USER = "user-42"
METER = "premium_voice"
DAY = timedelta(days=1)


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    with closing(Billing.connect(settings)) as billing:
        yield billing


def send(redis: Redis, settings: Settings, event_id: str, quantity: int, multiplier: str, user_id: str = USER) -> None:
    event = {"event_id": event_id, "user_id": user_id, "meter": METER, "quantity": quantity, "multiplier": multiplier}
    redis.xadd(partition_of(settings, user_id).entries, {"v": "1", "e": json.dumps(event)})


def drain(resources: Resources, user_id: str = USER) -> None:
    while drain_stream(resources, partition_of(resources.settings, user_id)).more:
        pass


def buckets(settings: Settings, user_id: str = USER) -> tuple[object, ...]:
    query = "SELECT used, rollover, purchased, carried FROM balance WHERE user_id = %s AND meter = %s"
    (found,) = rows(settings, query, user_id, METER)
    return found


def logged(settings: Settings) -> list[tuple[object, ...]]:
    return rows(settings, "SELECT event_id, amount, remainder FROM usage_log ORDER BY seq")


@pytest.mark.parametrize(("multiplier", "total"), [("0.75", 750), ("1.5", 1_500), ("0.333333", 333)])
def test_a_thousand_small_events_cost_what_a_large_one_does(
    settings: Settings, redis: Redis, resources: Resources, multiplier: str, total: int
) -> None:
    accounts.open_new(resources, USER, "basic")
    for number in range(1_000):
        send(redis, settings, f"e{number}", 1, multiplier)
    drain(resources)
    assert buckets(settings)[0] == total
    assert_proved(resources)


def test_what_is_carried_belongs_to_account_and_meter(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    send(redis, settings, "a", 3, "0.75")
    drain(resources)
    send(redis, settings, "b", 4, "2")
    send(redis, settings, "c", 1, "1.5")
    drain(resources)
    assert logged(settings) == [("a", 2, 250_000), ("b", 8, None), ("c", 1, 750_000)]
    accounts.change_plan(resources, USER, "plus")
    credits.reverse(resources, USER, "c")
    assert buckets(settings) == (10, 0, 0, 750_000)
    send(redis, settings, "d", 1, "0.25")
    drain(resources)
    assert logged(settings)[-1] == ("d", 1, 0)
    assert_proved(resources)


def test_a_boundary_keeps_what_is_carried(settings: Settings, redis: Redis, resources: Resources) -> None:
    now = datetime.now(UTC)
    accounts.open_new(resources, USER, "basic", start=now - 40 * DAY, end=now - DAY)
    send(redis, settings, "a", 3, "0.75")
    drain(resources)
    before = buckets(settings)[3]
    accounts.renew(resources, USER, "invoice-1", now - DAY, now + 29 * DAY)
    assert (before, buckets(settings)[3]) == (250_000, 250_000)
    assert_proved(resources)


def test_without_an_account_nothing_is_carried(settings: Settings, redis: Redis, resources: Resources) -> None:
    for number in range(4):
        send(redis, settings, f"e{number}", 1, "0.75")
    drain(resources)
    assert rows(settings, "SELECT sum(amount), sum(uncollected), max(remainder) FROM usage_log") == [(0, 0, None)]


def test_a_row_of_an_older_worker_is_rounded_down(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    send(redis, settings, "a", 1, "0.75")
    drain(resources)
    with_trigger_off = "ALTER TABLE usage_log {} TRIGGER USER"
    execute(settings, with_trigger_off.format("DISABLE"))
    execute(settings, "UPDATE usage_log SET remainder = NULL")
    execute(settings, with_trigger_off.format("ENABLE"))
    execute(settings, "UPDATE balance SET carried = 0")
    assert_proved(resources)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE balance SET carried = carried + 1 WHERE meter = 'premium_voice'",
        "UPDATE usage_log SET remainder = remainder + 1 WHERE event_id = 'a'",
        "UPDATE usage_log SET remainder = NULL WHERE event_id = 'b'",
        "UPDATE usage_log SET amount = amount + 1, from_subscription = from_subscription + 1 WHERE event_id = 'b'",
    ],
)
def test_the_proof_finds_a_wrong_fraction(settings: Settings, redis: Redis, resources: Resources, damage: str) -> None:
    accounts.open_new(resources, USER, "basic")
    send(redis, settings, "a", 1, "0.75")
    send(redis, settings, "b", 1, "0.75")
    drain(resources)
    assert_proved(resources)
    execute(settings, "ALTER TABLE usage_log DISABLE TRIGGER USER")
    execute(settings, damage)
    execute(settings, "ALTER TABLE usage_log ENABLE TRIGGER USER")
    assert verify_ledger(resources).differences != []


def test_explain_says_what_was_carried(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    send(redis, settings, "a", 3, "0.75")
    send(redis, settings, "b", 3, "0.75")
    send(redis, settings, "c", 2, "1.5")
    drain(resources)
    first, second, third = (explain(resources, USER, event_id) for event_id in "abc")
    assert (first.amount, first.carried_before, first.carried_after) == (2, "0", "0.25")
    assert (second.amount, second.carried_before, second.carried_after) == (2, "0.25", "0.5")
    assert second.sentences[:2] == (
        "Event b used 3 × 0.75 = 2 of premium_voice (characters).",
        "Exactly that is 2.25: with 0.25 carried from earlier events it paid 2 and left 0.5 to the next.",
    )
    assert (third.carried_before, third.sentences[0]) == (
        None,
        "Event c used 2 × 1.5 = 3 of premium_voice (characters).",
    )


def test_an_account_moves_with_its_fraction_and_closes_without(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    accounts.open_new(resources, USER, "basic")
    send(redis, settings, "a", 3, "0.75")
    drain(resources)
    lines: list[str] = []
    transfer.export_accounts(resources, lines.append)
    exported = json.loads("".join(lines))
    assert exported["meters"][METER]["carried"] == 250_000
    transfer.import_accounts(resources, json.dumps(exported | {"user_id": "moved"}))
    assert buckets(settings, "moved") == (2, 0, 0, 250_000)
    send(redis, settings, "b", 3, "0.25", "moved")
    drain(resources, "moved")
    assert buckets(settings, "moved") == (3, 0, 0, 0)
    close_account(resources, USER)
    assert rows(settings, "SELECT max(carried) FROM balance WHERE starts_with(user_id, 'closed:')") == [(0,)]
    assert_proved(resources)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def test_a_fraction_must_fit_as_a_whole_unit(settings: Settings, billing: Billing, resources: Resources) -> None:
    give_account(settings, USER, "basic", buckets={METER: (99_999, 0, 0)})
    with pytest.raises(UsageLimitExceeded) as refused:
        billing.charge(USER, METER, quantity=2, multiplier="0.75", event_id="c1")
    assert (refused.value.requested, refused.value.available) == (2, 1)
    charged = billing.charge(USER, METER, quantity=1, multiplier="0.75", event_id="c2")
    assert (charged.amount, charged.expected) == (0, Parts())
    assert billing.charge(USER, METER, quantity=1, multiplier="0.75", event_id="c2").repeated
    estimate = billing.estimate(USER, METER, 1, multiplier="0.75")
    assert (estimate.amount, estimate.allowed) == (0, False)
    with pytest.raises(UsageLimitExceeded):
        billing.reserve(USER, METER, quantity=1, multiplier="0.75", key="k")
    drain(resources)
    assert_proved(resources)


def test_charges_of_fractions_never_overspend(settings: Settings, billing: Billing, resources: Resources) -> None:
    give_account(settings, USER, "basic", buckets={METER: (99_990, 0, 0)})
    allowed = 0
    for number in range(30):
        try:
            billing.charge(USER, METER, quantity=1, multiplier="0.75", event_id=f"c{number}")
            allowed += 1
        except UsageLimitExceeded:
            drain(resources)
    assert allowed == 14  # 10.5: the half is not a unit yet
    drain(resources)
    assert buckets(settings) == (100_000, 0, 0, 500_000)
    assert_proved(resources)


def test_a_hold_takes_the_next_whole_unit(
    settings: Settings, billing: Billing, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic")
    hold = billing.reserve(USER, METER, quantity=3, multiplier="0.75", key="k")
    assert hold.answer.amount == 3
    page = hold.capture("p1", quantity=1)
    assert (page.amount, hold.capture("p1", quantity=1).repeated) == (0, True)
    assert pending_of(redis, settings, USER, METER) == {"h:k": 2, "e:p1": 1, "total": 3}
    settled = hold.settle(quantity=2)
    assert settled.amount == 1
    assert hold.settle(quantity=2) == settled.model_copy(update={"repeated": True})
    assert pending_of(redis, settings, USER, METER) == {"e:k": 2, "e:p1": 1, "total": 3}
    drain(resources)
    assert pending_of(redis, settings, USER, METER) == {}
    assert buckets(settings) == (2, 0, 0, 250_000)
    assert_proved(resources)


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue's word


def with_rounding(folder: Path, rounding: str) -> Path:
    text = (ROOT / "config/catalogue.toml").read_text(encoding="utf-8")
    heading, draws = f"[meters.{METER}]\n", f'meters.{METER} = {{ wallet = "credits", price = "3" }}\n'
    assert draws in text  # a meter that draws on a wallet carries
    path = folder / "catalogue.toml"
    rounded = text.replace(heading, f'{heading}rounding = "{rounding}"\n').replace(draws, "")
    path.write_text(rounded, encoding="utf-8")
    return path


@pytest.mark.parametrize(("rounding", "total", "answered"), [("down", 0, 0), ("up", 4, 1)])
def test_a_meter_may_round_each_event(
    emptied_database_url: str, redis_url: str, tmp_path: Path, rounding: str, total: int, answered: int
) -> None:
    settings = settings_for(emptied_database_url, redis_url, catalogue_path=with_rounding(tmp_path, rounding))
    with worker_resources(settings) as resources, closing(Billing.connect(settings)) as billing:
        accounts.open_new(resources, USER, "basic")
        for number in range(4):
            assert billing.emit(USER, METER, 1, multiplier="0.75", event_id=f"e{number}").amount == answered
        drain(resources)
        assert buckets(settings) == (total, 0, 0, 0)
        assert explain(resources, USER, "e0").sentences[1] == f"Exactly that is 0.75; it was rounded to {answered}."
        assert_proved(resources)


def test_another_rounding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=rf"meters\.{METER}\.rounding: Input should be 'carry', 'down' or 'up'"):
        load_catalogue(with_rounding(tmp_path, "half"))
