"""Which catalogue prices an event."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from config.catalogue import load_catalogue
from config.settings import DEFAULT_CATALOGUE
from tests.support.catalogues import NEW_METER, edited_catalogue, newer_catalogue
from worker.rules.catalogues import Timeline

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
FIRST = load_catalogue(DEFAULT_CATALOGUE)


def test_the_newest_whose_moment_has_come_prices_an_event(tmp_path: Path) -> None:
    _, newer = newer_catalogue(tmp_path)
    timeline = Timeline.of(2, [(NOON, FIRST), (NOON + HOUR, newer)])
    now = NOON + 30 * HOUR / 60
    assert [timeline.at(NOON + n * HOUR, now).digest for n in (-1, 0, 1, 2)] == [FIRST.digest] * 2 + [newer.digest] * 2
    assert (timeline.next_change(NOON - HOUR), timeline.next_change(NOON + HOUR)) == (NOON + HOUR, None)
    assert [each.digest for each in timeline.to_come(now)] == [newer.digest]
    assert [each.digest for each in timeline.between(NOON - HOUR, NOON + HOUR)] == [FIRST.digest, newer.digest]


def test_a_later_registration_takes_the_place_of_one_that_is_yet_to_come(tmp_path: Path) -> None:
    _, newer = newer_catalogue(tmp_path)
    other = load_catalogue(edited_catalogue(tmp_path, ('m3 = "2.25"', 'm3 = "2.5"')))
    timeline = Timeline.of(3, [(NOON, FIRST), (NOON + 9 * HOUR, newer), (NOON + HOUR, other)])
    assert timeline.at(NOON + 10 * HOUR, NOON + 10 * HOUR).digest == other.digest


def test_an_event_that_waited_for_its_meter_finds_it_and_every_other_price_as_before(tmp_path: Path) -> None:
    _, newer = newer_catalogue(tmp_path)
    timeline = Timeline.of(2, [(NOON, FIRST), (NOON + HOUR, newer)])
    assert NEW_METER not in timeline.at(NOON, NOON + HOUR / 2).meters
    found = timeline.at(NOON, NOON + HOUR)
    assert found.plan("basic").meters[NEW_METER].quantity == 1_000_000
    assert (found.multiplier("m2"), newer.multiplier("m2"), found.digest) == ("1.5", "3", FIRST.digest)
    assert {code: plan for code, plan in found.plans.items() if code != "basic"} == {
        code: plan for code, plan in FIRST.plans.items() if code != "basic"
    }


def test_a_plan_that_came_later_is_known_for_older_entries_also(tmp_path: Path) -> None:
    added = '[plans.starter]\nname = "Starter"\ntier = 1\nmeters.premium_voice = { quantity = 5 }\n\n'
    newer = load_catalogue(
        edited_catalogue(tmp_path, ("[plans.plus]", f"{added}[plans.plus]"), ('m2 = "1.5"', 'm2 = "3"'))
    )
    timeline = Timeline.of(2, [(NOON, FIRST), (NOON + HOUR, newer)])
    assert "starter" not in timeline.at(NOON, NOON + HOUR / 2).plans
    found = timeline.at(NOON, NOON + HOUR)
    assert found.plan("starter") == newer.plan("starter")
    assert (found.multiplier("m2"), found.digest, found.meters) == ("1.5", FIRST.digest, FIRST.meters)


def test_a_meter_that_came_later_draws_on_a_wallet_that_was_there_only(tmp_path: Path) -> None:
    """A plan of before gets no wallet that it did not have, and a cap of no meter that did not draw on it."""
    wallets = 'meters.hd_video = {{ wallet = "{}", price = "9" }}\n'
    added = ("[plans.free]", '[meters.hd_video]\nunit = "seconds"\n\n[meters.coins]\nunit = "coins"\n\n[plans.free]')
    tenant, studio = (
        "meters.credits = { quantity = 1_000",
        'meters.server_kokoro = { wallet = "credits", price = "1" }',
    )
    with_coins = "meters.coins = { quantity = 5, caps.meter = { hd_video = 3, server_kokoro = 2 } }\n"
    newer = load_catalogue(
        edited_catalogue(
            tmp_path,
            added,
            (tenant, wallets.format("credits") + tenant),
            (studio, with_coins + wallets.format("coins") + studio.replace("credits", "coins")),
        )
    )
    timeline = Timeline.of(2, [(NOON, FIRST), (NOON + HOUR, newer)])
    found = timeline.at(NOON, NOON + HOUR)
    assert found.draws("tenant")["hd_video"] == ("credits", "9")
    assert found.draws("studio") == {**FIRST.draws("studio"), "hd_video": ("coins", "9")}
    assert found.plan("studio").meters["coins"].caps == {"meter": {"hd_video": 3}}
