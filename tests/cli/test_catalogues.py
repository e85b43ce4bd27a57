"""The commands about catalogues: what is in force, and how another one gets there."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from redis import Redis

from config.catalogue import load_catalogue
from config.settings import DEFAULT_CATALOGUE, Settings
from schemas.simulation import SimulationReport
from tests.support.catalogues import NEW_METER, edited_catalogue, newer_catalogue
from tests.support.commands import USER, Meterfall, assert_refused, lines_of
from tests.support.ledger import rows
from tests.support.resources import worker_resources
from tests.support.streams import drain
from worker.consumer.renewals import renew_due
from worker.keyspace import keys

FIRST = load_catalogue(DEFAULT_CATALOGUE)
WITHOUT_TENANT = ("[plans.tenant]", "[plans.lodger]")


def test_a_catalogue_is_applied_with_its_diff_and_listed(
    meterfall: Meterfall, settings: Settings, tmp_path: Path
) -> None:
    path, newer = newer_catalogue(tmp_path)
    cheaper = edited_catalogue(tmp_path, ("quantity = 100_000, rollover_cap", "quantity = 90_000, rollover_cap"))
    meterfall.done("account", "open", USER, "basic")
    (first,) = meterfall.done("catalogue", "list", "--json")
    assert (first["version"], first["digest"], first["by"]) == (1, FIRST.digest, "first start")

    printed = meterfall.done("catalogue", "apply", str(cheaper), "--yes", "--by", "jane", "--reason", "spring prices")
    assert "premium_voice" in printed
    assert "90,000" in printed
    applied = meterfall.done("catalogue", "apply", str(cheaper), "--yes", "--json")
    assert (applied["version"], applied["repeated"]) == (2, True)
    assert [each["accounts"] for each in applied["differences"]] == [1]

    later = (datetime.now(UTC) + timedelta(days=1)).isoformat(timespec="seconds")
    meterfall.done("catalogue", "apply", str(path), "--at", later, "--yes", "--json")
    listed = meterfall.done("catalogue", "list", "--json")
    assert [each["version"] for each in listed] == [1, 2, 3]
    assert (listed[1]["by"], listed[1]["reason"], listed[2]["effective_from"]) == ("jane", "spring prices", later)
    assert meterfall.done("catalogue", "show", "3") == path.read_text(encoding="utf-8")
    with Redis.from_url(settings.redis_url) as redis:
        in_force = redis.get(keys.CATALOGUE)
        assert isinstance(in_force, bytes)
        assert in_force.decode().split()[1:] == [newer.fingerprint], "a producer with the coming one is not warned"


# Each edit of the shipped catalogue, and the rows that name it: plan, meter, field, before, after, accounts.
EDITS: dict[str, tuple[tuple[str, str], list[list[object]]]] = {
    "multiplier": (('m2 = "1.5"', 'm2 = "30"'), [["", "", "multipliers.m2", "1.5", "30", None]]),
    "multiplier removed": (('m2-turbo = "0.75"', ""), [["", "", "multipliers.m2-turbo", "0.75", "none", None]]),
    "share of payments": (
        ("paid_share_percent = 10", "paid_share_percent = 12"),
        [["", "", "sponsorship.paid_share_percent", "10", "12", None]],
    ),
    "daily budget": (
        ("trusted = 200", "trusted = 201"), [["", "", "sponsorship.daily_budget.trusted", 200, 201, None]]
    ),
    "unit": (('[meters.ocr_tokens]\nunit = "tokens"', '[meters.ocr_tokens]\nunit = "pages"'),
        [["", "ocr_tokens", "unit", "tokens", "pages", 1]]),
    "allowance without accounts": (
        ("{ quantity = 3_000_000, rollover_cap", "{ quantity = 3_000_001, rollover_cap"),
        [["plus", "ocr_tokens", "allowance", 3_000_000, 3_000_001, 0]],
    ),
    "allowance with accounts": (
        ("{ quantity = 1_000_000, rollover_cap", "{ quantity = 1_000_001, rollover_cap"),
        [["basic", "ocr_tokens", "allowance", 1_000_000, 1_000_001, 1]],
    ),
    "price": (
        ("price_month_cents = 900", "price_month_cents = 901"), [["basic", "", "price_month_cents", 900, 901, 1]]
    ),
}  # fmt: skip


def test_every_difference_of_two_catalogues_is_named_with_its_accounts(meterfall: Meterfall, tmp_path: Path) -> None:
    meterfall.done("account", "open", USER, "basic")
    wrong = []
    for name, (edit, expected) in EDITS.items():
        path = edited_catalogue(tmp_path, edit)
        found = [list(row.values()) for row in meterfall.done("catalogue", "diff", str(path), "--json")]
        if found != expected:
            wrong.append(f"{name}: {found}")
    assert wrong == []
    assert meterfall.done("catalogue", "diff").strip() == "none"


def test_a_plan_that_comes_or_goes_is_a_difference(meterfall: Meterfall, tmp_path: Path) -> None:
    renamed = edited_catalogue(tmp_path, WITHOUT_TENANT)
    found = meterfall.done("catalogue", "diff", str(renamed), "--json")
    plans = [list(row.values()) for row in found if row["field"] == "plan"]
    assert plans == [["tenant", "", "plan", "tenant", "gone", 0], ["lodger", "", "plan", "none", "new", 0]]
    assert {row["plan"] for row in found} == {"tenant", "lodger"}


def test_one_that_accounts_need_is_not_taken_away(meterfall: Meterfall, settings: Settings, tmp_path: Path) -> None:
    renamed = edited_catalogue(tmp_path, WITHOUT_TENANT)
    meterfall.done("account", "open", "on-it", "tenant")
    for user_id in ("at-end", "dated"):
        meterfall.done("account", "open", user_id, "basic", "--period-end", "2027-01-31T00:00:00Z")
    meterfall.done("account", "change-plan", "at-end", "tenant", "--at", "period_end")
    in_a_day = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    meterfall.done("account", "change-plan", "dated", "tenant", "--at", in_a_day)
    assert_refused(
        meterfall("catalogue", "apply", str(renamed), "--yes"), 1,
        "plan tenant (1 account is on it, 2 accounts are scheduled for it)", "active = false", "change-plan",
    )  # fmt: skip
    assert rows(settings, "SELECT count(*) FROM catalogue_version") == [(1,)]

    meterfall.done("account", "change-plan", "on-it", "basic")
    for user_id in ("at-end", "dated"):
        meterfall.done("account", "change-plan", user_id, "basic")
    for user_id in ("on-it", "at-end", "dated"):
        drain(settings, user_id)
    with worker_resources(settings) as resources:
        renew_due(resources)  # until then the changes wait for their turn after older events
    default = meterfall("catalogue", "apply", str(renamed), "--yes", METERFALL_DEFAULT_PLAN="tenant")
    assert_refused(default, 2, "METERFALL_DEFAULT_PLAN", "tenant")
    meterfall.done("catalogue", "apply", str(renamed), "--yes")


def test_a_meter_with_balances_is_not_taken_away(meterfall: Meterfall, tmp_path: Path) -> None:
    path, _ = newer_catalogue(tmp_path)
    meterfall.done("plans")
    meterfall.done("catalogue", "apply", str(path), "--yes")
    meterfall.done("account", "open", USER, "basic", METERFALL_CATALOGUE_PATH=str(path))
    back = meterfall("catalogue", "apply", str(DEFAULT_CATALOGUE), "--yes")
    assert_refused(back, 1, f"meter {NEW_METER} (1 account is on it)", "keep it")


def test_a_past_moment_and_an_unconfirmed_change_are_refused(
    meterfall: Meterfall, settings: Settings, tmp_path: Path
) -> None:
    path, _ = newer_catalogue(tmp_path)
    past = meterfall("catalogue", "apply", str(path), "--yes", "--at", "2026-01-01T00:00:00Z")
    assert_refused(past, 2, "--at", "is over")
    for more in ([], ["--json"]):
        assert_refused(meterfall("catalogue", "apply", str(path), *more), 2, "--yes")
    assert_refused(meterfall("catalogue", "show", "9"), 2, "version: 9", "1")
    assert rows(settings, "SELECT count(*) FROM catalogue_version") == [(1,)]
    assert "is version 2, in force" in meterfall("catalogue", "apply", str(path), "--yes").out


def test_a_command_with_another_file_goes_by_the_one_in_force_and_says_so(meterfall: Meterfall, tmp_path: Path) -> None:
    path, newer = newer_catalogue(tmp_path)
    meterfall.done("catalogue", "list")
    done = meterfall("account", "open", USER, "basic", "--json", METERFALL_CATALOGUE_PATH=str(path))
    assert done.code == 0
    assert all(word in done.err for word in (newer.digest, FIRST.digest, "catalogue apply"))
    shown = meterfall.done("account", "show", USER, "--json")
    assert NEW_METER not in str(shown)


def test_a_simulation_is_told_in_a_table_and_wrong_words_are_refused(
    meterfall: Meterfall, settings: Settings, tmp_path: Path
) -> None:
    since = datetime.now(UTC).isoformat()
    meterfall.done("account", "open", USER, "basic")
    (tmp_path / "events").write_text(lines_of({"event_id": "e1", "quantity": 90_000}), encoding="utf-8")
    meterfall.done("emit", str(tmp_path / "events"))
    drain(settings, USER)
    smaller = str(edited_catalogue(tmp_path, ("quantity = 100_000, rollover_cap", "quantity = 60_000, rollover_cap")))
    simulate = ("catalogue", "simulate", smaller, "--since", since)
    printed = meterfall.done(*simulate)
    assert "1 event of 1 account; 1 would have paid otherwise" in printed
    assert "the accounts that change most" in printed
    assert {"-30,000", "30,000", "debt", USER} <= set(printed.replace("│", " ").split())
    found = meterfall.done(*simulate, "--json")
    assert SimulationReport.model_validate_json(json.dumps(found)).changed == 1
    for more, code, named in (
        (("--plan-map", "basic"), 2, "--plan-map: 'basic' must be OLD=NEW"),
        (("--plan-map", "basic=plus", "--plan-map", "basic=max"), 2, "--plan-map: basic is named twice"),
        (("--plan-map", "gone=plus"), 2, "plan-map: unknown plan 'gone'"),
        (("--until", "yesterday"), 2, "--until: 'yesterday' is no ISO 8601 time"),
        (("--sample", "1", "--user", USER), 2, "sample: not together with user"),
    ):
        assert_refused(meterfall(*simulate, *more), code, named)
    broken = tmp_path / "broken.toml"
    broken.write_text("plans = 3", encoding="utf-8")
    assert_refused(meterfall("catalogue", "simulate", str(broken), "--since", since), 2, "broken.toml")
    assert_refused(meterfall("catalogue", "simulate", str(tmp_path / "gone"), "--since", since), 2, "gone")
