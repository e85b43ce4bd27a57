"""Accounts leave as lines and come back the same; what cannot come in says why, and then nothing does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from calendar import monthrange
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from threading import Barrier, BrokenBarrierError, local
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from config.catalogue import load_catalogue
from config.settings import DEFAULT_CATALOGUE, Settings
from tests.support.books import assert_proved
from tests.support.ledger import rows
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain
from worker import crash
from worker.admin import accounts, credits, erasure, transfer
from worker.admin.relay_import import _anchor_of
from worker.admin.transfer import Imported, _line_of, export_accounts, import_accounts
from worker.client import Billing
from worker.consumer.renewals import renew_due
from worker.errors import AccountError
from worker.ledger.accounts import State, existing_accounts
from worker.ledger.connection import Postgres
from worker.resources import Resources
from worker.rules.calendar import boundary, index_at
from worker.rules.lifecycle import open_account

# Plans beside those that ship, so that every cadence and both anchors are there.
MORE_PLANS = "".join(
    f"""
[plans.{cadence}_{anchor}]
name = "{cadence}"
tier = 1
meters.credits = {{ quantity = 700, cadence = "{cadence}", anchor = "{anchor}", rollover_cap = 5_000 }}
meters.ocr_tokens = {{ quantity = 50, cadence = "{cadence}", anchor = "{anchor}", caps.backend.gemini = 9 }}
"""
    for cadence in ("monthly", "weekly", "daily", "lifetime", "off")
    for anchor in ("sticky", "floating")
)


@pytest.fixture
def catalogue_path(tmp_path: Path) -> Path:
    """The catalogue with plans of every kind."""
    path = tmp_path / "catalogue.toml"
    path.write_text(DEFAULT_CATALOGUE.read_text(encoding="utf-8") + MORE_PLANS, encoding="utf-8")
    return path


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str, catalogue_path: Path) -> Settings:
    """An empty ledger to import into."""
    return settings_for(emptied_database_url, redis_url, partitions=1, catalogue_path=catalogue_path)


def exported(resources: Resources) -> str:
    lines: list[str] = []
    count = export_accounts(resources, lines.append)
    text = "".join(lines)
    assert count == text.count("\n")
    return text


def accounts_of(resources: Resources) -> dict[str, Any]:
    """What an export says, by user."""
    return {line["user_id"]: line for line in map(json.loads, exported(resources).splitlines())}


def line_of(user_id: str = "u1", plan: str = "tenant") -> dict[str, Any]:
    """A line of an export that is right."""
    opened_at = datetime(2026, 1, 31, 10, tzinfo=UTC)
    account = open_account(load_catalogue(DEFAULT_CATALOGUE), user_id, plan, "active", opened_at)
    found: dict[str, Any] = json.loads(_line_of(State(account, opened_at, dict.fromkeys(account.balances, (0, 0)))))
    return found


def lines_of(*lines: object) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def relay_of(**installs: object) -> str:
    return json.dumps({"rows": installs})


# ---------------------------------------------------------------------------------------------------------------------
# Out and in again


def live(settings: Settings) -> None:
    """Bring accounts of every kind into being, by the operations that services and operators have."""
    assert settings.database_url is not None
    now = datetime.now(UTC)

    def use(client: Billing, *events: tuple[str, str, int]) -> None:
        for user_id, meter, amount in events:
            client.emit(user_id, meter, amount, dimensions={"backend": "gemini"})
        drain(settings, "any")

    with worker_resources(settings) as resources, Billing.connect(settings) as client:
        accounts.open_new(resources, "trial", "basic", status="trialing")
        accounts.open_new(resources, "renewed", "basic", start=now - timedelta(days=3), end=now + timedelta(days=1))
        accounts.open_new(resources, "waits-for-renewal", "basic", rollover={"premium_voice": -70})
        accounts.change_plan(resources, "waits-for-renewal", "plus", at="period_end")
        accounts.open_new(resources, "waits-for-end", "free")
        accounts.change_plan(resources, "waits-for-end", "basic", at="period_end")
        accounts.open_new(resources, "cancels", "free")
        accounts.set_status(resources, "cancels", "canceled", at="period_end")
        accounts.open_new(resources, "past-due", "plus", status="past_due")
        for user_id in ("lifetime", "parks", "returns"):
            accounts.open_new(resources, user_id, "core")
        accounts.open_new(resources, "unlimited", "max_relay")
        for plan in [code for code in resources.catalogue.plans if code.endswith(("_sticky", "_floating"))]:
            accounts.open_new(resources, plan, plan)
        credits.seed_signup(resources, "seeded", 33, plan="tenant")
        credits.grant(resources, "buys", "credits", 90, "order-1", open_plan="tenant")
        credits.claw_back(resources, "buys", "credits", 90, "order-1")
        credits.carry_over(resources, "daily_sticky", "seeded", "k")
        accounts.open_new(resources, "gone", "free")
        drain(settings, "any")
        erasure.close_account(resources, "gone")
        use(client, ("trial", "ocr_tokens", 2_000_000), ("buys", "credits", 999), ("past-due", "server_kokoro", 5))
        use(client, *((user_id, "relay_credits", 40) for user_id in ("lifetime", "parks", "returns", "unlimited")))
        use(
            client,
            *((plan, "ocr_tokens", 7) for plan in resources.catalogue.plans if plan.endswith(("_sticky", "_floating"))),
        )
        accounts.change_plan(resources, "parks", "pro")
        accounts.change_plan(resources, "returns", "pro")
        accounts.change_plan(resources, "returns", "core")
        accounts.renew(resources, "renewed", "invoice-1", now + timedelta(days=1), now + timedelta(days=31))
        accounts.change_plan(resources, "monthly_sticky", "weekly_sticky")
        with psycopg.connect(settings.database_url) as postgres:
            postgres.execute(
                "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE "
                "AS $$SELECT clock_timestamp() + interval '8 days'$$"
            )
        use(client, ("weekly_floating", "credits", 3), ("daily_floating", "credits", 3), ("parks", "relay_credits", 4))
        renew_due(resources)
        accounts.open_new(resources, "trial-now", "basic", status="trialing")


def test_an_export_imported_into_an_empty_ledger_is_the_same_export(
    database_url: str, redis_url: str, catalogue_path: Path, resources: Resources, settings: Settings
) -> None:
    source = settings_for(database_url, redis_url, partitions=1, catalogue_path=catalogue_path)
    live(source)
    with worker_resources(source) as there:
        text = exported(there)
        assert_proved(there)
    with Redis.from_url(redis_url) as redis:
        redis.flushdb()  # the other ledger has a Redis of its own
    assert_has_every_kind([json.loads(line) for line in text.splitlines()])

    count = text.count("\n")
    assert import_accounts(resources, text) == Imported(count, [])
    assert exported(resources) == text
    assert_proved(resources)

    drain(settings, "any")
    assert_proved(resources)
    with Billing.connect(settings) as client:
        client.emit("weekly_sticky", "credits", 10, event_id="e1")
        client.emit("parks", "relay_credits", 10, dimensions={"backend": "gemini"})
        drain(settings, "any")
    credits.reverse(resources, "weekly_sticky", "e1")
    assert accounts.change_plan(resources, "parks", "core").account.balances["relay_credits"].used == 40
    assert_proved(resources)


def assert_has_every_kind(lines: list[dict[str, Any]]) -> None:
    """The export is worth the test."""
    users = [line["user_id"] for line in lines]
    assert users == sorted(users)
    assert not [user for user in users if user.startswith(("gone", "closed:"))]
    meters = [meter for line in lines for meter in line["meters"].values()]
    kinds: dict[str, Callable[[dict[str, Any]], object]] = {
        "trialing": lambda line: line["next_status"] == "expired",
        "cancels": lambda line: line["next_status"] == "canceled",
        "waits for an end": lambda line: line["plan_change_at"],
        "waits for a renewal": lambda line: line["next_plan"] and not line["plan_change_at"],
    }
    buckets: dict[str, Callable[[dict[str, Any]], object]] = {
        "debt": lambda meter: meter["rollover"] < 0,
        "saved": lambda meter: meter["rollover"] > 0,
        "parked": lambda meter: meter["parked"] and meter["parked"]["cap_used"] == {"gemini": 40},
        "cap used": lambda meter: meter["cap_used"] and meter["caps"],
        "unlimited": lambda meter: meter["allowance"] is None,
        "a period behind the first": lambda meter: meter["period_index"] > 0,
        "a period before its grid": lambda meter: meter["period_index"] == -1,
        "granted": lambda meter: meter["lifetime_granted"],
        "consumed": lambda meter: meter["lifetime_consumed"],
        "no end": lambda meter: meter["period_end"] is None,
    }
    missing = [name for name, fits in kinds.items() if not any(map(fits, lines))]
    assert missing + [name for name, fits in buckets.items() if not any(map(fits, meters))] == []
    found = {(meter["cadence"], meter["anchor"]) for meter in meters}
    assert len(found) == 11  # two anchors for each of five cadences, and the payment provider's


def test_times_come_in_with_any_offset_and_go_out_in_utc(resources: Resources) -> None:
    line = line_of() | {"opened_at": "2026-01-31T12:00:00.000001+02:00"}
    import_accounts(resources, lines_of(line))
    assert accounts_of(resources)["u1"]["opened_at"] == "2026-01-31T10:00:00.000001+00:00"


def test_an_import_reaches_checks_that_were_refused_before(settings: Settings, resources: Resources) -> None:
    with Billing.connect(settings) as client:
        assert not client.check("u1", "credits", 1).allowed
        import_accounts(resources, lines_of(line_of("u1")))
        drain(settings, "u1")
        assert client.check("u1", "credits", 1).available == 1_000


# ---------------------------------------------------------------------------------------------------------------------
# What cannot come in


def changed(path: str, value: object) -> dict[str, Any]:
    """The right line with the value at `path`, keys joined by dots, changed; `...` takes it away."""
    line = line_of()
    *way, last = path.split(".")
    place = line
    for name in way:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return line


def monthly(**changes: object) -> dict[str, Any]:
    """The line of an account whose sticky months were anchored at a 31st."""
    line = line_of(plan="pro")
    line["meters"]["relay_credits"] |= changes
    return line


def both(place: str, text: str) -> str:
    """A right line, as text, that names something twice."""
    return json.dumps(line_of()).replace(place, f"{text}, {place}", 1)


CREDITS, RELAY = "meters.credits", "meters.relay_credits"
BAD_LINES: list[tuple[object, str, str]] = [
    ("not json", "row", "must be JSON"),
    ("[" * 100_000, "row", "must be JSON"),
    ("1" * 5_000, "row", "must be JSON"),
    ("[]", "row", "must be a JSON object (got [])"),
    (both('"plan"', '"plan": "free"'), "plan", "once"),
    (both('"used"', '"used": 5'), "used", "once"),
    (changed("user_id", ...), "user_id", "missing"),
    (changed("user_id", "two words"), "user_id", "text that matches"),
    (changed("user_id", "\ud800"), "user_id", ""),
    (changed("user_id", 5), "user_id", "must be a valid string (got 5)"),
    (changed("plan", "gold"), "plan", "must be one of basic, core, daily_floating"),
    (changed("status", "closed"), "status", "must be one of active, past_due, trialing"),
    (changed("trust", "blind"), "trust", "must be one of new, established"),
    (changed("highest_tier", -1), "highest_tier", "greater than or equal to 0 (got -1)"),
    (changed("next_plan", "gold"), "next_plan", "must be one of basic"),
    (changed("plan_change_at", "2026-12-01T00:00:00Z"), "plan_change_at", "must be null without next_plan"),
    (changed("next_status", "paused"), "next_status", "must be one of canceled, expired"),
    (changed("next_status", "expired"), "status_change_at", "must be a time with next_status"),
    (changed("status_change_at", "2026-12-01T00:00:00Z"), "status_change_at", "null without"),
    (changed("opened_at", "2026-01-01T00:00:00"), "opened_at", "offset"),
    (changed("opened_at", "2026-02-30T00:00:00Z"), "opened_at", "ISO 8601 time"),
    (changed("opened_at", 1_700_000_000), "opened_at", "as text (got 1700000000)"),
    (changed("opened_at", "0001-01-01T00:00:00+23:59"), "opened_at", "calendar"),
    (changed("opened_by", ""), "opened_by", "at least 1"),
    (changed("opened_by", "x" * 257), "opened_by", "at most 256"),
    (changed("opened_reason", "two\nlines"), "opened_reason", "must be printable characters"),
    (changed("colour", "red"), "colour", "unknown field"),
    (changed("meters", []), "meters", "must be a valid dictionary"),
    (changed("meters.sand", line_of()["meters"]["credits"]), "meters", "must be one of credits, ocr_tokens"),
    (changed(f"{CREDITS}.used", ...), f"{CREDITS}.used", "missing"),
    (changed(f"{CREDITS}.used", -1), f"{CREDITS}.used", "greater than or equal to 0"),
    (changed(f"{CREDITS}.used", 1.0), f"{CREDITS}.used", "must be a valid integer (got 1.0)"),
    (changed(f"{CREDITS}.used", True), f"{CREDITS}.used", "must be a valid integer"),
    (changed(f"{CREDITS}.used", "5"), f"{CREDITS}.used", "must be a valid integer"),
    (changed(f"{CREDITS}.used", 9 * 10**15 + 1), f"{CREDITS}.used", "9000000000000000"),
    (changed(f"{CREDITS}.used", 10**400), f"{CREDITS}.used", "9000000000000000"),
    (changed(f"{CREDITS}.rollover", -9 * 10**15 - 1), f"{CREDITS}.rollover", "-9000000000000000"),
    (changed(f"{CREDITS}.purchased", -1), f"{CREDITS}.purchased", "0"),
    (changed(f"{CREDITS}.allowance", 10**12 + 1), f"{CREDITS}.allowance", "1000000000000"),
    (changed(f"{CREDITS}.rollover_cap", 10**12 + 1), f"{CREDITS}.rollover_cap", "1000000000000"),
    (changed(f"{CREDITS}.lifetime_consumed", -1), f"{CREDITS}.lifetime_consumed", "0"),
    (changed(f"{CREDITS}.lifetime_granted", None), f"{CREDITS}.lifetime_granted", "integer"),
    (changed(f"{CREDITS}.spill", 1), f"{CREDITS}.spill", "boolean"),
    (changed(f"{CREDITS}.cadence", "yearly"), f"{CREDITS}.cadence", "must be one of subscription, monthly, weekly"),
    (changed(f"{CREDITS}.anchor", "loose"), f"{CREDITS}.anchor", "must be one of sticky, floating"),
    (changed(f"{CREDITS}.caps", {"gemini": -1}), f"{CREDITS}.caps.gemini", "0"),
    (changed(f"{CREDITS}.caps", {"a b": 1}), f"{CREDITS}.caps.a b.[key]", "text that matches"),
    (changed(f"{CREDITS}.cap_used", {"gemini": None}), f"{CREDITS}.cap_used.gemini", "integer"),
    (changed(f"{CREDITS}.parked", {"used": 1, "cap_used": None}), f"{CREDITS}.parked.period_start", "missing"),
    (changed(f"{CREDITS}.period_index", -2), f"{CREDITS}.period_index", "-1"),
    (changed(f"{CREDITS}.period_end", None), f"{CREDITS}.period_end", "must be a time, as the cadence is monthly"),
    (changed(f"{CREDITS}.period_end", "2026-01-31T10:00:00Z"), f"{CREDITS}.period_end", "must be after period_start"),
    (monthly(period_end="2026-03-03T10:00:00Z"), f"{RELAY}.period_end", "must be 2026-02-28T10:00:00+00:00"),
    (monthly(period_index=1), f"{RELAY}.period_end", "must be 2026-03-31T10:00:00+00:00"),
    (monthly(period_index=10**12), f"{RELAY}.period_end", "within the calendar"),
    (monthly(anchored_at="9999-12-31T00:00:00Z"), f"{RELAY}.period_end", "within the calendar"),
]  # fmt: skip


def as_line(line: object) -> str:
    return line if isinstance(line, str) else json.dumps(line)


def test_every_kind_of_bad_line_names_row_and_field(resources: Resources) -> None:
    text = "\n".join(as_line(line) for line, _, _ in BAD_LINES)
    imported = import_accounts(resources, text + "\n\n" + lines_of(line_of("good")), skip_bad=True)
    assert imported.accounts == 1
    assert len(imported.bad) == len(BAD_LINES)
    wrong = [
        (number, bad)
        for number, (bad, (_, field, reason)) in enumerate(zip(imported.bad, BAD_LINES, strict=True), start=1)
        if (bad.row, bad.field) != (number, field) or reason not in bad.reason
    ]
    assert wrong == []
    assert list(accounts_of(resources)) == ["good"]


def test_a_bad_last_row_leaves_nothing(resources: Resources, settings: Settings) -> None:
    many = [line_of(f"u{number}") for number in range(1_200)]
    with pytest.raises(AccountError) as caught:
        import_accounts(resources, lines_of(*many, changed("plan", "gold"), changed("trust", 1)))
    message = str(caught.value)
    assert message.startswith("row 1201: plan: must be one of basic, ")
    assert message.endswith("(got 'gold'); and 1 more bad row")
    assert rows(settings, "SELECT (SELECT count(*) FROM account), (SELECT count(*) FROM ledger_entry)") == [(0, 0)]


def test_a_user_comes_in_once(resources: Resources) -> None:
    import_accounts(resources, lines_of(line_of("old")))
    before = exported(resources)
    text = lines_of(line_of("new"), line_of("old", "free"), line_of("new", "free"))
    with pytest.raises(AccountError, match="row 2: user_id: must be new"):
        import_accounts(resources, text)
    assert exported(resources) == before
    imported = import_accounts(resources, text, skip_bad=True)
    assert [(bad.row, bad.user_id, bad.field) for bad in imported.bad] == [(2, "old", "user_id"), (3, "new", "user_id")]
    assert {user: line["plan"] for user, line in accounts_of(resources).items()} == {"old": "tenant", "new": "tenant"}


def test_an_account_that_is_opened_meanwhile_is_a_bad_row(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = existing_accounts

    def looks_too_early(postgres: Postgres, users: list[str]) -> set[str]:
        found = look(postgres, users)
        with monkeypatch.context() as unpatched, suppress(AccountError):
            unpatched.setattr(transfer, "existing_accounts", look)
            accounts.open_new(resources, "b", "free")
        return found

    monkeypatch.setattr(transfer, "existing_accounts", looks_too_early)
    imported = import_accounts(resources, lines_of(line_of("a"), line_of("b")), skip_bad=True)
    assert (imported.accounts, [(bad.row, bad.field) for bad in imported.bad]) == (1, [(2, "user_id")])
    assert {user: line["plan"] for user, line in accounts_of(resources).items()} == {"a": "tenant", "b": "free"}
    assert_proved(resources)


def test_two_imports_of_the_same_accounts_wait_for_each_other(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has written one account when it meets the other's."""
    both, mine = Barrier(2), local()

    def meet(_: str) -> None:
        if not hasattr(mine, "met"):
            mine.met = True
            with suppress(BrokenBarrierError):
                both.wait(0.5)

    monkeypatch.setattr(transfer, "_CHUNK_ACCOUNTS", 1)
    monkeypatch.setattr(transfer, "crash_point", meet)

    def run(*users: str) -> int:
        with worker_resources(settings) as own:
            return import_accounts(own, lines_of(*map(line_of, users)), skip_bad=True).accounts

    with ThreadPoolExecutor(2) as pool:
        imports = [pool.submit(run, "a", "b"), pool.submit(run, "b", "a")]
        assert sorted(each.result(30) for each in imports) == [0, 2]


# ---------------------------------------------------------------------------------------------------------------------
# The ledger of a relay


def at(text: str) -> str:
    """A time as an export writes it."""
    return accounts.parse_time(text).isoformat()


# Anniversary day, last renewal → anchor, index, start and end of the open period.
ANNIVERSARIES = [
    (None, "2026-05-12T07:30:00Z", "2026-05-12T07:30:00Z", 0, "2026-05-12T07:30:00Z", "2026-06-12T07:30:00Z"),
    (31, "2026-01-31T08:00:00Z", "2026-01-31T08:00:00Z", 0, "2026-01-31T08:00:00Z", "2026-02-28T08:00:00Z"),
    (31, "2026-02-28T10:00:00Z", "2026-01-31T10:00:00Z", 1, "2026-02-28T10:00:00Z", "2026-03-31T10:00:00Z"),
    (31, "2026-05-30T10:00:00Z", "2026-03-31T10:00:00Z", 1, "2026-04-30T10:00:00Z", "2026-05-31T10:00:00Z"),
    (30, "2026-03-15T10:00:00Z", "2026-01-30T10:00:00Z", 1, "2026-02-28T10:00:00Z", "2026-03-30T10:00:00Z"),
    (29, "2024-02-29T10:00:00Z", "2024-02-29T10:00:00Z", 0, "2024-02-29T10:00:00Z", "2024-03-29T10:00:00Z"),
    (29, "2025-03-01T10:00:00Z", "2025-01-29T10:00:00Z", 1, "2025-02-28T10:00:00Z", "2025-03-29T10:00:00Z"),
    (20, "2026-01-15T10:00:00Z", "2025-12-20T10:00:00Z", 0, "2025-12-20T10:00:00Z", "2026-01-20T10:00:00Z"),
    (15, "2026-01-15T23:30:00-02:00", "2026-01-15T01:30:00Z", 0, "2026-01-15T01:30:00Z", "2026-02-15T01:30:00Z"),
]


def test_anniversaries_anchor_the_periods_of_a_relay(resources: Resources) -> None:
    installs = {}
    for number, (day, renewed_at, *_) in enumerate(ANNIVERSARIES):
        row = {"tier_snapshot": "pro", "last_renewal_at": renewed_at, "anniversary_day": day}
        installs[f"i{number}"] = {name: value for name, value in row.items() if value is not None}
    import_accounts(resources, relay_of(**installs))
    found = accounts_of(resources)
    for number, (_, _, anchor, index, start, end) in enumerate(ANNIVERSARIES):
        meter = found[f"i{number}"]["meters"]["relay_credits"]
        period = [meter[name] for name in ("anchored_at", "period_index", "period_start", "period_end")]
        assert period == [at(anchor), index, at(start), at(end)]
    assert_proved(resources)


@given(st.datetimes(timezones=st.just(UTC)).filter(lambda at: 1 < at.year < 9_999), st.integers(1, 31))
def test_an_anchor_is_the_latest_moment_on_its_day(renewed_at: datetime, day: int) -> None:
    anchor = _anchor_of(renewed_at, day)
    assert (anchor.day, anchor.time()) == (day, renewed_at.time())
    later = [anchor + timedelta(days=days) for days in range(1, (renewed_at - anchor).days + 1)]
    assert [each for each in later if each.day == day] == []
    index = index_at(anchor, "monthly", renewed_at)
    assert boundary(anchor, "monthly", index) <= renewed_at < boundary(anchor, "monthly", index + 1)


USED: dict[str, object] = {
    "lifetime_consumed": 480,
    "lifetime_gemini_consumed": 90,
    "monthly_consumed": 12,
    "monthly_gemini_consumed": 5,
    "last_active_at": "2026-11-01T12:00:00+01:00",
}


def test_what_each_tier_used_is_where_its_plan_looks_for_it(resources: Resources, settings: Settings) -> None:
    renewed = {**USED, "last_renewal_at": "2026-02-28T10:00:00Z", "anniversary_day": 31}
    text = relay_of(core={"tier_snapshot": "core", **renewed}, pro={"tier_snapshot": "pro", **renewed},
                    max={"tier_snapshot": "max", **renewed})  # fmt: skip
    assert import_accounts(resources, text) == Imported(3, [])
    found = accounts_of(resources)
    assert {user: (line["plan"], line["status"], line["highest_tier"]) for user, line in found.items()} == {
        "core": ("core", "active", 0), "pro": ("pro", "active", 1), "max": ("max_relay", "active", 2),
    }  # fmt: skip
    core, pro, unlimited = (found[user]["meters"]["relay_credits"] for user in ("core", "pro", "max"))
    assert (core["used"], core["cap_used"], core["parked"]) == (480, {"gemini": 90}, None)
    assert (core["period_start"], core["period_end"], core["caps"]) == (at("2026-01-31T10:00Z"), None, {"gemini": 100})
    for meter in (pro, unlimited):
        assert (meter["used"], meter["cap_used"]) == (12, {"gemini": 5})
        assert (meter["parked"]["used"], meter["parked"]["cap_used"]) == (480, {"gemini": 90})
        assert meter["parked"]["period_start"] < meter["period_start"] == at("2026-02-28T10:00Z")
    assert (pro["allowance"], unlimited["allowance"]) == (5_000, None)
    assert pro["period_end"] == unlimited["period_end"] == at("2026-03-31T10:00Z")
    assert (pro["caps"], unlimited["caps"]) == ({"gemini": 1_000}, {"gemini": None})
    assert {meter["lifetime_consumed"] for meter in (core, pro, unlimited)} == {480}
    kept = rows(settings, "SELECT (detail->>'last_active_at')::timestamptz FROM ledger_entry WHERE kind = 'open'")
    assert kept == [(datetime(2026, 11, 1, 11, tzinfo=UTC),)] * 3
    assert_proved(resources)

    for user in ("pro", "max"):  # what was used in a life comes back with the tier that counts it
        back = accounts.change_plan(resources, user, "core").account.balances["relay_credits"]
        assert (back.used, back.cap_used, back.parked) == (480, {"gemini": 90}, None)
    assert_proved(resources)


def test_a_reversal_after_an_import_does_not_touch_what_is_parked(resources: Resources, settings: Settings) -> None:
    renewed_at = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    import_accounts(
        resources, relay_of(i={"tier_snapshot": "pro", "lifetime_consumed": 3, "last_renewal_at": renewed_at})
    )
    with Billing.connect(settings) as client:
        client.emit("i", "relay_credits", 7, event_id="e1")
    drain(settings, "i")
    accounts.change_plan(resources, "i", "core")
    credits.reverse(resources, "i", "e1")
    assert accounts.show(resources, "i").balances["relay_credits"].used == 3
    assert_proved(resources)


def test_older_relays_know_a_month_and_the_oldest_nothing(resources: Resources) -> None:
    before = datetime.now(UTC)
    import_accounts(
        resources,
        relay_of(
            month={"tier_snapshot": "pro", "month": "2026-03"},
            day={"tier_snapshot": "pro", "month": "2026-03", "anniversary_day": 15},
            null={"tier_snapshot": "core", "month": None, "last_renewal_at": None, "anniversary_day": None},
            neither={"tier_snapshot": "pro"},
        ),
    )
    found = {user: line["meters"]["relay_credits"] for user, line in accounts_of(resources).items()}
    assert (found["month"]["anchored_at"], found["month"]["period_end"]) == (
        at("2026-03-01T00:00Z"),
        at("2026-04-01T00:00Z"),
    )
    assert (found["day"]["period_start"], found["day"]["period_end"]) == (
        at("2026-02-15T00:00Z"),
        at("2026-03-15T00:00Z"),
    )
    for user in ("null", "neither"):
        assert before <= datetime.fromisoformat(found[user]["anchored_at"]) <= datetime.now(UTC)
        assert (found[user]["used"], found[user]["cap_used"], found[user]["lifetime_consumed"]) == (0, {"gemini": 0}, 0)
    assert_proved(resources)


BAD_INSTALLS: list[tuple[object, str, str]] = [
    ({}, "tier_snapshot", "missing"),
    ({"tier_snapshot": "free"}, "tier_snapshot", "must be one of core, max, max_relay, pro (got 'free')"),
    ({"tier_snapshot": 1}, "tier_snapshot", "string"),
    ({"tier_snapshot": "pro", "colour": 1}, "colour", "unknown field"),
    ({"tier_snapshot": "pro", "[/red]\u202e\ud800": 1}, "", ""),
    ({"tier_snapshot": "pro", "lifetime_consumed": -1}, "lifetime_consumed", "greater than or equal to 0 (got -1)"),
    ({"tier_snapshot": "pro", "monthly_consumed": 1.5}, "monthly_consumed", "integer (got 1.5)"),
    ({"tier_snapshot": "pro", "monthly_gemini_consumed": "1"}, "monthly_gemini_consumed", "integer"),
    ({"tier_snapshot": "pro", "lifetime_gemini_consumed": None}, "lifetime_gemini_consumed", "integer"),
    ({"tier_snapshot": "pro", "anniversary_day": 0}, "anniversary_day", "1"),
    ({"tier_snapshot": "pro", "anniversary_day": 32}, "anniversary_day", "31"),
    ({"tier_snapshot": "pro", "last_renewal_at": "2026-02-30T00:00:00Z"}, "last_renewal_at", "ISO 8601"),
    ({"tier_snapshot": "pro", "last_renewal_at": "2026-02-20T00:00:00"}, "last_renewal_at", "offset"),
    ({"tier_snapshot": "pro", "last_renewal_at": "9999-12-20T00:00:00Z"}, "last_renewal_at", "calendar"),
    ({"tier_snapshot": "pro", "last_renewal_at": "0001-01-01T00:00:00Z", "anniversary_day": 9}, "last_renewal_at", ""),
    ({"tier_snapshot": "pro", "last_active_at": "yesterday"}, "last_active_at", "ISO 8601"),
    ({"tier_snapshot": "pro", "month": "2026-13"}, "month", "2026-11"),
    ({"tier_snapshot": "pro", "month": "0000-01"}, "month", "2026-11"),
    ({"tier_snapshot": "pro", "month": "9999-12"}, "month", "calendar"),
    ({"tier_snapshot": "pro", "month": 202611}, "month", "2026-11"),
    ({"tier_snapshot": "pro", "month": "2026-01", "last_renewal_at": "2026-01-05T00:00:00Z"}, "month", "left out"),
    ({"tier_snapshot": "pro", "install_id": "another"}, "install_id", "filed under (got 'another')"),
    ({"tier_snapshot": "pro", "install_id": 7}, "install_id", "string"),
    ([], "row", "must be a JSON object"),
]  # fmt: skip


def relay_rows(count: int) -> dict[str, dict[str, Any]]:
    """Rows of a relay as it writes them: every tier, with renewal, month or neither, whatever was used."""
    random = Random(20)
    rows: dict[str, dict[str, Any]] = {}
    for number in range(count):
        row: dict[str, Any] = {"tier_snapshot": random.choice(["core", "pro", "max"])}
        if random.random() < 0.9:
            row["install_id"] = f"install-{number}"
        renewed = START_OF_RELAY + timedelta(seconds=random.randrange(700 * 86_400))
        shape = number % 4
        if shape < 2:
            row["last_renewal_at"] = renewed.isoformat().replace("+00:00", "Z" if shape else "+00:00")
        elif shape == 2:
            row["month"] = f"{renewed:%Y-%m}"
        if shape < 3 and random.random() < 0.6:
            row["anniversary_day"] = random.randint(1, 31)
        for name in ("lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed", "monthly_gemini_consumed"):
            if random.random() < 0.8:
                row[name] = random.choice([0, random.randrange(600), 9 * 10**15])
        if random.random() < 0.5:
            row["last_active_at"] = renewed.isoformat()
        rows[f"install-{number}"] = row
    return rows


START_OF_RELAY = datetime(2024, 1, 1, tzinfo=UTC)


def anniversaries_around(moment: datetime, day: int) -> tuple[datetime, datetime]:
    """The monthly anniversaries before and after a moment, each on `day` or the last day of a shorter month."""
    months = [
        (moment.year + (moment.month - 1 + step) // 12, (moment.month - 1 + step) % 12 + 1) for step in (-1, 0, 1)
    ]
    found = [moment.replace(year=y, month=m, day=min(day, monthrange(y, m)[1])) for y, m in months]
    before = max(each for each in found if each <= moment)
    return before, found[found.index(before) + 1] if before != found[-1] else before


def test_a_real_ledger_of_a_relay_comes_in_as_it_reads(resources: Resources) -> None:
    written = relay_rows(300)
    assert import_accounts(resources, relay_of(**written)) == Imported(300, [])
    found, compared = accounts_of(resources), 0
    for install_id, row in written.items():
        line, tier = found[install_id], row["tier_snapshot"]
        meter = line["meters"]["relay_credits"]
        lifetime, monthly = row.get("lifetime_consumed", 0), row.get("monthly_consumed", 0)
        gemini = {part: {"gemini": row.get(f"{part}_gemini_consumed", 0)} for part in ("lifetime", "monthly")}
        renewal = row.get("last_renewal_at") or (f"{row['month']}-01T00:00:00Z" if "month" in row else None)
        bounds: tuple[str, str] | None = None
        if renewal is not None:
            moment = datetime.fromisoformat(renewal)
            start, end = anniversaries_around(moment, row.get("anniversary_day", moment.day))
            bounds = start.isoformat(), end.isoformat()
        facts = [
            (line["plan"], {"core": "core", "pro": "pro", "max": "max_relay"}[tier]),
            (meter["used"], lifetime if tier == "core" else monthly),
            (meter["cap_used"], gemini["lifetime" if tier == "core" else "monthly"]),
            (meter["parked"] and (meter["parked"]["used"], meter["parked"]["cap_used"]),
             None if tier == "core" else (lifetime, gemini["lifetime"])),
            ((meter["period_start"], meter["period_end"]) if bounds and tier != "core" else None,
             bounds if tier != "core" else None),
            ((meter["lifetime_consumed"], line["trust"], line["status"]), (lifetime, "new", "active")),
        ]  # fmt: skip
        compared += len(facts)
        assert [(has, wants) for has, wants in facts if has != wants] == [], (install_id, row)
    assert compared == 1_800
    assert_proved(resources)


def test_every_kind_of_bad_install_names_row_and_field(resources: Resources) -> None:
    installs: dict[str, object] = {f"i{number}": row for number, (row, _, _) in enumerate(BAD_INSTALLS)}
    text = relay_of(**installs, good={"tier_snapshot": "pro"}, **{"two words": {"tier_snapshot": "pro"}})
    twice = text[:-2] + ', "good": {"tier_snapshot": "core"}, "i": {"month": "2026-01", "month": "2026-02"}}}'
    imported = import_accounts(resources, twice, skip_bad=True)
    assert imported.accounts == 1
    expected = [*BAD_INSTALLS, (0, "install_id", ""), (0, "user_id", "once"), (0, "month", "once")]
    skipped = [number for number in range(1, len(expected) + 2) if number != len(BAD_INSTALLS) + 1]
    assert [bad.row for bad in imported.bad] == skipped
    wrong = [
        bad
        for bad, (_, field, reason) in zip(imported.bad, expected, strict=True)
        if field not in bad.field or reason not in bad.reason
    ]
    assert wrong == []
    assert accounts_of(resources)["good"]["plan"] == "pro"
    with pytest.raises(AccountError, match=r"row 1: tier_snapshot: missing, install i0; and \d+ more bad rows"):
        import_accounts(resources, text)


def test_what_is_no_relay_is_read_as_lines(resources: Resources) -> None:
    with pytest.raises(AccountError, match="row 1: user_id: missing"):
        import_accounts(resources, '{"rows": []}')
    with pytest.raises(AccountError, match="row 1: row: must be JSON"):
        import_accounts(resources, '{"rows": {"i": {"tier_snapshot": "pro"')
    assert import_accounts(resources, "\n\n") == Imported(0, [])


# ---------------------------------------------------------------------------------------------------------------------
# Much at once


def test_killed_in_the_middle_of_an_import_nothing_is_there(
    resources: Resources, settings: Settings, tmp_path: Path
) -> None:
    assert settings.database_url is not None
    file = tmp_path / "accounts.jsonl"
    text = lines_of(*(line_of(f"u{number}") for number in range(1_100)))
    file.write_text(text, encoding="utf-8")
    urls = {"DATABASE_URL": settings.database_url, "REDIS_URL": settings.redis_url, "METERFALL_PARTITIONS": "1"}
    killed = subprocess.run(
        [sys.executable, "-m", "worker", "account", "import", str(file)],
        env={**os.environ, **urls, crash.VARIABLE: "inside_import"},
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    count = "SELECT (SELECT count(*) FROM account), (SELECT count(*) FROM balance), (SELECT count(*) FROM ledger_entry)"
    assert rows(settings, count) == [(0, 0, 0)]
    assert import_accounts(resources, text) == Imported(1_100, [])
    assert rows(settings, count) == [(1_100, 1_100, 2_200)]


def test_ten_thousand_accounts_are_imported_at_once(resources: Resources) -> None:
    line = line_of()
    text = lines_of(*({**line, "user_id": f"u{number}"} for number in range(10_000)))
    began = time.monotonic()
    progress_counts: list[int] = []

    assert import_accounts(resources, text, watch=lambda _: nullcontext(progress_counts.append)).accounts == 10_000
    assert time.monotonic() - began < 20
    assert progress_counts == [*range(1_000, 10_001, 1_000)] * 2
    assert exported(resources).count("\n") == 10_000
