"""Limits per day, week and month on real servers: who is denied and why, what counts when, and what proves it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from config.settings import Settings
from schemas.answers import Reason
from tests.client.clients import open_client
from tests.support.catalogues import edited_catalogue
from tests.support.ledger import execute, give_account, rows, stop_clock
from tests.support.limits import METER, USER, go_to, limit, send, use
from tests.support.resources import settings_for
from tests.support.streams import account_of, drain, partition_of
from worker.accounts import Accounts
from worker.admin import accounts, credits, limits, transfer
from worker.admin.erasure import close_account
from worker.client import Billing
from worker.client.ledger import LedgerView
from worker.consumer.renewals import renew_due
from worker.errors import AccountError, InvalidRequest, KeyConflict, UsageLimitExceeded
from worker.keyspace.cache import cache_life
from worker.reports.limits import limits_of
from worker.reports.proof import verify_ledger
from worker.reports.proof_run import prove_ledger
from worker.reports.usage import timeline, usage_summary
from worker.resources import Resources
from worker.rules.preflight import standing_in_ledger

# Ahead of any real clock: there the streams of the tests go by the ledger's clock. A Monday; New York has winter time.
START = datetime(2088, 3, 1, 9, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
# Plans with limits of their own, and one in a time zone.
PLANS = """
[plans.bounded]
name = "Bounded"
tier = 1
timezone = "America/New_York"
[plans.bounded.meters.premium_voice]
quantity = 100_000
limits = [{ per = "day", amount = 1_000 }, { per = "month", amount = 5_000 }]
[plans.bounded.meters.relay_credits]
quantity = 500
cadence = "monthly"
caps = { backend = { gemini = 100 } }
limits = [{ per = "week", amount = 150 }]

[plans.wider]
name = "Wider"
tier = 2
meters.premium_voice = { limits = [{ per = "day", amount = 3_000 }] }
"""


@pytest.fixture(scope="module")
def catalogue_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edited_catalogue(tmp_path_factory.mktemp("limits"), ("[plans.plus]", f"{PLANS}\n[plans.plus]"))


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str, catalogue_path: Path) -> Settings:
    settings = settings_for(emptied_database_url, redis_url, catalogue_path=catalogue_path)
    stop_clock(settings, START)
    give_account(settings, USER, "basic", end=START + 400 * DAY)
    return settings


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    with Billing.connect(settings) as client:
        yield client


def used(resources: Resources, meter: str = METER) -> dict[str, int]:
    """What the open windows have used."""
    return {each.per: each.used for each in limits_of(resources, USER).limits if each.meter == meter}


def shown_available(resources: Resources) -> int | None:
    """What the summary shows to the user."""
    return next(each.available for each in usage_summary(resources, USER).meters if each.meter == METER)


def stored(settings: Settings, meter: str = METER) -> Any:
    return rows(settings, "SELECT limits FROM balance WHERE user_id = %s AND meter = %s", USER, meter)[0][0]


def kinds(settings: Settings) -> list[object]:
    query = "SELECT kind FROM ledger_entry WHERE user_id = %s AND kind LIKE %s ORDER BY seq"
    return [kind for (kind,) in rows(settings, query, USER, "%limit%") + rows(settings, query, USER, "%window")]


def proved(resources: Resources) -> bool:
    """From zero and from checkpoints, in Redis as in Postgres."""
    return verify_ledger(resources).differences == prove_ledger(resources).differences == []


# ---------------------------------------------------------------------------------------------------------------------
# Who is denied, and why


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_checks_holds_and_charges_enforce_all_limits_and_name_the_one_that_denied(
    settings: Settings, resources: Resources, kind: str
) -> None:
    limit(resources, "day", 500, of="user")
    limit(resources, "day", 800)
    limit(resources, "week", 700)
    with closing(open_client(kind, settings)) as client:
        answer = client.check(USER, METER, 500)
        assert (answer.allowed, answer.reason, answer.available) == (True, Reason.WITHIN_LIMIT, 500)
        client.reserve(USER, METER, 300, "job-1")
        denied = client.check(USER, METER, 201)
        assert (denied.allowed, denied.reason, denied.available, denied.pending) == (
            False, Reason.SPENDING_LIMIT_REACHED, 200, 300,
        )  # fmt: skip
        by = denied.limited_by
        assert (by.per, by.set_by, by.amount, by.used, by.ends_at) == (
            "day", "user", 500, 0, datetime(2088, 3, 2, tzinfo=UTC),
        )  # fmt: skip
        attempts: list[Callable[[], Any]] = [
            lambda: client.reserve(USER, METER, 201, "job-2"),
            lambda: client.charge(USER, METER, 201, "event-2"),
            lambda: client.extend(USER, METER, "job-1", amount=501),
        ]
        for attempt in attempts:
            with pytest.raises(UsageLimitExceeded, match="limit of the user 500 per day") as caught:
                attempt()
            assert caught.value.answer.reason is Reason.SPENDING_LIMIT_REACHED
        assert client.check(USER, METER, 400).limited_by == by
        # Both deny; the week ends later, and until then nothing helps.
        assert client.check(USER, METER, 401).limited_by.per == "week"
        assert client.extend(USER, METER, "job-1", amount=500).left == 500
        assert client.check(USER, METER, 1).available == 0
        assert client.remaining(USER, METER).remaining == 0
        estimate = client.estimate(USER, METER, 1)
        assert (estimate.allowed, estimate.check.reason) == (False, Reason.SPENDING_LIMIT_REACHED)
        use(resources, "job-1", 500, hold_key="job-1")
        last = client.check(USER, METER, 1)
        assert last.pending == 0
        assert (last.reason, last.limited_by and last.limited_by.used) == (Reason.SPENDING_LIMIT_REACHED, 500), last
    assert proved(resources)


def test_many_at_once_get_no_more_than_the_limit(settings: Settings, resources: Resources) -> None:
    limit(resources, "day", 50)
    with Billing.connect(settings) as client, ThreadPoolExecutor(8) as threads:
        client.check(USER, METER)

        def reserve(number: int) -> int:
            try:
                return client.reserve(USER, METER, 7, f"job-{number}").answer.amount
            except UsageLimitExceeded:
                return 0

        assert sum(threads.map(reserve, range(40))) == 49


def test_a_cap_of_a_backend_and_a_limit_both_hold(settings: Settings, resources: Resources, billing: Billing) -> None:
    accounts.change_plan(resources, USER, "bounded")
    drain(settings, USER)
    relay = "relay_credits"
    assert billing.check(USER, relay, 100, backend="gemini").allowed
    assert billing.check(USER, relay, 101, backend="gemini").reason is Reason.BACKEND_CAP_EXCEEDED
    use(resources, "e1", 80, relay)
    answer = billing.check(USER, relay, 71, backend="gemini")
    assert (answer.reason, answer.available) == (Reason.SPENDING_LIMIT_REACHED, 70)
    left = billing.remaining(USER, relay)
    assert (left.remaining, left.backends[0].remaining) == (70, 100)
    billing.reserve(USER, relay, 70, "job", backend="gemini")
    assert billing.check(USER, relay, 1).available == 0
    assert proved(resources)


def test_an_unlimited_meter_is_bounded_also(settings: Settings, resources: Resources, billing: Billing) -> None:
    accounts.change_plan(resources, USER, "wider")
    drain(settings, USER)
    answer = billing.check(USER, METER, 3_000)
    assert (answer.allowed, answer.reason, answer.limit, answer.available) == (True, Reason.WITHIN_LIMIT, None, 3_000)
    by = billing.check(USER, METER, 3_001).limited_by
    assert by is not None
    assert by.set_by == "plan"
    assert billing.remaining(USER, METER).remaining == 3_000
    assert shown_available(resources) == 3_000


def test_events_are_recorded_whatever_the_limit(settings: Settings, resources: Resources, billing: Billing) -> None:
    limit(resources, "day", 100)
    use(resources, "e1", 5_000)
    assert used(resources) == {"day": 5_000}
    assert limits_of(resources, USER).limits[0].left == 0
    assert accounts.show(resources, USER).balances[METER].used == 5_000
    assert billing.check(USER, METER, 0).allowed
    assert not billing.check(USER, METER, 1).allowed
    assert proved(resources)


def test_without_redis_the_ledger_enforces_the_same(settings: Settings, resources: Resources) -> None:
    limit(resources, "day", 100)
    use(resources, "e1", 30)
    with closing(LedgerView(settings, resources.catalogue)) as ledger:
        view = ledger.account(USER)
    standing = standing_in_ledger(view.account, METER, view.holds)
    assert standing is not None
    assert standing.available() == 70
    assert [(each.per, each.amount, each.used) for each in standing.limits] == [("day", 100, 30)]


def test_a_user_without_an_account_is_bounded_by_the_default_plan(
    emptied_database_url: str, redis_url: str, catalogue_path: Path
) -> None:
    settings = settings_for(emptied_database_url, redis_url, catalogue_path=catalogue_path, default_plan="bounded")
    with Billing.connect(settings) as client:
        assert client.check("stranger", METER, 1_000).allowed
        assert client.check("stranger", METER, 1_001).reason is Reason.SPENDING_LIMIT_REACHED


# ---------------------------------------------------------------------------------------------------------------------
# What counts when


def test_an_event_counts_in_the_window_in_which_it_came(settings: Settings, resources: Resources) -> None:
    limit(resources, "day", 100)
    limit(resources, "month", 10_000)
    use(resources, "e0", 1)
    midnight = datetime(2088, 3, 2, tzinfo=UTC)
    stop_clock(settings, midnight - HOUR)
    send(resources, "before", 10)
    stop_clock(settings, midnight)
    send(resources, "after", 20)
    stop_clock(settings, midnight + 3 * HOUR)
    send(resources, "later", 30)
    stop_clock(settings, midnight + DAY + HOUR)
    renew_due(resources)
    drain(settings, USER)  # a backlog over two boundaries, in one batch
    found = rows(
        settings,
        "SELECT detail->'limits'->'windows'->'day'->>'starts', seq FROM ledger_entry WHERE kind = 'open_window'",
    )
    # The windows of the limits were opened as they were set; one entry for the day that began with "after".
    assert [starts for starts, _ in found] == ["2088-03-02T00:00:00+00:00"]
    assert stored(settings)["windows"]["day"]["used"] == 50
    assert used(resources) == {"day": 0, "month": 61}, "none came today"
    before = rows(settings, "SELECT event_id, seq FROM usage_log WHERE event_id = 'before'")
    assert before[0][1] < found[0][1]  # type: ignore[operator]
    use(resources, "today", 5)
    assert used(resources) == {"day": 5, "month": 66}
    assert proved(resources)


def test_a_new_window_is_seen_at_its_first_moment(settings: Settings, resources: Resources, billing: Billing) -> None:
    limit(resources, "day", 100)
    use(resources, "e1", 100)
    midnight = datetime(2088, 3, 2, tzinfo=UTC)
    assert cache_life(accounts.show(resources, USER), midnight - timedelta(milliseconds=30), settings).kept_ms == 30
    go_to(resources, midnight - timedelta(milliseconds=1))
    assert not billing.check(USER, METER, 1).allowed
    go_to(resources, midnight)
    assert billing.check(USER, METER, 100).allowed
    assert kinds(settings) == ["set_limit"], "a check stores nothing"
    renew_due(resources)
    assert kinds(settings) == ["set_limit"], "no job opens windows"
    assert proved(resources)


@pytest.mark.parametrize(("timezone", "hours"), [("America/New_York", 23), ("Europe/Berlin", 24), ("Asia/Kolkata", 24)])
def test_windows_are_days_of_the_accounts_time_zone(
    settings: Settings, resources: Resources, timezone: str, hours: int
) -> None:
    # In 2088 the clock of New York goes forward on 14 March.
    accounts.set_timezone(resources, USER, timezone)
    stop_clock(settings, datetime(2088, 3, 14, 12, tzinfo=UTC))
    drain(settings, USER)
    limit(resources, "day", 100)
    (found,) = limits_of(resources, USER).limits
    assert found.starts_at is not None
    assert found.ends_at - found.starts_at == timedelta(hours=hours)
    use(resources, "e1", 70)
    go_to(resources, found.ends_at - timedelta(seconds=1))
    use(resources, "e2", 7)
    assert used(resources) == {"day": 77}
    go_to(resources, found.ends_at)
    use(resources, "e3", 5)
    assert used(resources) == {"day": 5}
    assert proved(resources)


def test_a_limit_counts_what_its_window_has_used_already(settings: Settings, resources: Resources) -> None:
    use(resources, "yesterday", 1_000)
    go_to(resources, START + DAY)
    use(resources, "e1", 40)
    use(resources, "e2", 30)
    use(resources, "other", 7, "ocr_tokens")
    credits.reverse(resources, USER, "e2")
    use(resources, "e3", 5)
    limit(resources, "day", 100)
    assert used(resources) == {"day": 45}
    limit(resources, "week", 5_000)
    assert used(resources) == {"day": 45, "week": 1_045}
    limit(resources, "day", 60)
    limit(resources, "day", None)
    limit(resources, "day", 60)
    assert used(resources) == {"day": 45, "week": 1_045}
    assert proved(resources)


def test_a_reversed_event_gives_its_windows_their_units_back(settings: Settings, resources: Resources) -> None:
    limit(resources, "day", 100)
    limit(resources, "week", 1_000)
    use(resources, "e1", 60)
    go_to(resources, START + DAY)
    use(resources, "e2", 50)
    assert used(resources) == {"day": 50, "week": 110}
    credits.reverse(resources, USER, "e1")
    assert used(resources) == {"day": 50, "week": 50}
    credits.reverse(resources, USER, "e2")
    assert used(resources) == {"day": 0, "week": 0}
    credits.reverse(resources, USER, "e2")
    use(resources, "e3", 1)
    assert used(resources) == {"day": 1, "week": 1}
    assert proved(resources)


def test_a_plan_brings_its_limits_with_its_period(settings: Settings, resources: Resources, billing: Billing) -> None:
    limit(resources, "day", 2_000, of="user")
    use(resources, "e1", 300)
    accounts.change_plan(resources, USER, "bounded")
    drain(settings, USER)
    assert [(each.per, each.set_by, each.amount, each.used) for each in limits_of(resources, USER).limits] == [
        ("day", "plan", 1_000, 300), ("day", "user", 2_000, 300), ("month", "plan", 5_000, 0),
        ("week", "plan", 150, 0),
    ]  # fmt: skip
    use(resources, "e2", 100)
    assert used(resources) == {"day": 400, "month": 100}
    accounts.change_plan(resources, USER, "wider")
    drain(settings, USER)
    assert [(each.set_by, each.amount, each.used) for each in limits_of(resources, USER).limits] == [
        ("user", 2_000, 400), ("plan", 3_000, 400),
    ]  # fmt: skip
    accounts.change_plan(resources, USER, "basic")
    limit(resources, "day", None, of="user")
    assert stored(settings) is None
    assert billing.check(USER, METER, 50_000).allowed
    assert proved(resources)


def test_an_account_without_limits_writes_nothing_of_them(settings: Settings, resources: Resources) -> None:
    use(resources, "e1", 5)
    assert stored(settings) is None
    text: Any = resources.redis.get(account_of(settings, USER).balance)
    assert text is None or all(len(line.split()) == 7 for line in text.decode().split("\n")[1:])
    found = rows(settings, "SELECT count(*) FROM ledger_entry WHERE detail ? 'limits'")
    assert found == [(0,)]


def test_events_of_a_bounded_account_write_its_limits_only_when_a_window_opens(
    settings: Settings, resources: Resources
) -> None:
    limit(resources, "day", 100)
    before = stored(settings)
    for number in range(3):
        use(resources, f"e{number}", 10)
    assert stored(settings) == before
    assert used(resources) == {"day": 30}


def test_a_worker_of_the_release_before_counts_rightly(settings: Settings, resources: Resources) -> None:
    """It adds to what was consumed in the life of the balance, and knows no limits."""
    limit(resources, "day", 100)
    use(resources, "e1", 10)
    execute(
        settings,
        "UPDATE balance SET used = used + 5, lifetime_consumed = lifetime_consumed + 5 WHERE meter = 'premium_voice'",
    )
    assert used(resources) == {"day": 15}


# ---------------------------------------------------------------------------------------------------------------------
# Changes


def test_a_change_is_an_entry_with_actor_and_reason_idempotent_by_key(settings: Settings, resources: Resources) -> None:
    first = limits.set_limit(resources, USER, METER, "week", 700, key="t-1", of="user", actor="ann", reason="too much")
    assert not first.repeated
    assert limits.set_limit(resources, USER, METER, "week", 700, key="t-1", of="user").repeated
    with pytest.raises(KeyConflict, match=r"^key: t-1 was used for 700 per week of the user of premium_voice$"):
        limits.set_limit(resources, USER, METER, "week", 900, key="t-1", of="user")
    assert limits.set_limit(resources, USER, METER, "week", 700, of="user").repeated
    removed = limits.set_limit(resources, USER, METER, "week", None, key="t-2", of="user")
    assert removed.account.balances[METER].limits is None
    assert limits.set_limit(resources, USER, METER, "week", 700, key="t-1", of="user").repeated, "it was done once"
    assert limits.set_limit(resources, USER, METER, "week", None).repeated
    newest, before, *_ = timeline(resources, USER).changes
    assert (newest.kind, newest.what) == ("set_limit", "limit:t-2")
    assert (before.what, before.actor, before.reason) == ("limit:t-1", "ann", "too much")
    assert before.detail is not None
    assert (before.detail["per"], before.detail["amount"], before.detail["set_by"]) == ("week", 700, "user")
    drain(settings, USER)
    assert proved(resources)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"per": "year"}, r"^per: must be one of day, week, month \(got 'year'\)$"),
        ({"per": 7}, r"^per: must be one of day, week, month"),
        ({"amount": 0}, r"^amount: must be a whole number from 1 to 1000000000000"),
        ({"amount": -1}, r"^amount: must be a whole number from 1"),
        ({"amount": True}, r"^amount: must be a whole number from 1"),
        ({"of": "plan"}, r"^of: must be one of operator, user \(got 'plan'\)$"),
        ({"meter": "minutes"}, r"^meter: unknown 'minutes'"),
        ({"user_id": "nobody"}, r"^user_id: no account nobody$"),
        ({"key": "a b"}, r"^key: must be "),
    ],
)
def test_a_wrong_limit_is_refused_by_field_and_reason(
    settings: Settings, resources: Resources, wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(AccountError, match=told):
        limits.set_limit(resources, **{"user_id": USER, "meter": METER, "per": "day", "amount": 5, **wrong})
    assert stored(settings) is None


def test_what_a_window_counted_at_first_is_proven_from_the_log(settings: Settings, resources: Resources) -> None:
    use(resources, "e1", 40)
    limit(resources, "day", 100)
    assert proved(resources)
    forge = (
        "ALTER TABLE ledger_entry DISABLE TRIGGER USER; UPDATE ledger_entry SET detail = "
        "jsonb_set(jsonb_set(detail, '{window,used}', '30'), '{limits,windows,day,used}', '30') "
        "WHERE kind = 'set_limit'; ALTER TABLE ledger_entry ENABLE TRIGGER USER; "
        "UPDATE balance SET limits = jsonb_set(limits, '{windows,day,used}', '30') WHERE limits IS NOT NULL"
    )
    execute(settings, forge)
    resources.redis.delete(account_of(settings, USER).balance)
    (found,) = verify_ledger(resources).differences
    assert "counts other units in its window than the log, which has 40" in found


@pytest.mark.parametrize(
    ("forged", "told"),
    [
        ("jsonb_set(limits, '{windows,day,used}', '1')", "has limits"),
        ("jsonb_set(limits, '{windows,day,since}', '0')", "has limits"),
        ("jsonb_set(limits, '{amounts,operator,day}', '999')", "has limits"),
        ("limits || '{\"counted\": 0}'", "has limits"),
        ("NULL", "has limits"),
    ],
)
def test_forged_limits_are_found(settings: Settings, resources: Resources, forged: str, told: str) -> None:
    limit(resources, "day", 100)
    use(resources, "e1", 40)
    go_to(resources, START + DAY)
    use(resources, "e2", 30)
    assert proved(resources)
    execute(settings, f"UPDATE balance SET limits = {forged} WHERE limits IS NOT NULL")
    resources.redis.delete(account_of(settings, USER).balance)
    found = verify_ledger(resources).differences
    assert len(found) == 1
    assert told in found[0]


def test_the_limits_of_a_row_have_their_three_parts(settings: Settings) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        execute(settings, "UPDATE balance SET limits = '{\"amounts\": {}}'")


# ---------------------------------------------------------------------------------------------------------------------
# What checks count


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_pay_from_allowance_leaves_purchased_units_out(settings: Settings, resources: Resources, kind: str) -> None:
    credits.grant(resources, USER, METER, 500, "order-1")
    use(resources, "e1", 99_000)
    with closing(open_client(kind, settings)) as client:
        assert client.check(USER, METER, 1_500).allowed
        once = client.check(USER, METER, 1_001, pay_from="allowance")
        assert (once.allowed, once.reason, once.available) == (False, Reason.LIMIT_EXCEEDED, 1_000)
        assert (once.pay_from, once.purchased) == ("allowance", 500)
        attempts: list[Callable[[], Any]] = [
            lambda: client.reserve(USER, METER, 1_001, "job-1", pay_from="allowance"),
            lambda: client.charge(USER, METER, 1_001, "event-1", pay_from="allowance"),
        ]
        for attempt in attempts:
            with pytest.raises(UsageLimitExceeded):
                attempt()
        assert not client.estimate(USER, METER, 1_001, pay_from="allowance").allowed
        client.reserve(USER, METER, 900, "job-1", pay_from="allowance")
        with pytest.raises(UsageLimitExceeded):
            client.extend(USER, METER, "job-1", amount=1_001)  # the hold remembers it
        client.release(USER, METER, "job-1")
        for wrong in ("all", "purchased", 5, True, ""):
            with pytest.raises(InvalidRequest, match="pay_from"):
                client.check(USER, METER, 1, pay_from=wrong)

        limits.set_pay_from(resources, USER, "allowance")
        drain(settings, USER)
        assert client.check(USER, METER, 1_001).reason is Reason.LIMIT_EXCEEDED
        assert client.check(USER, METER, 1_001).pay_from == "allowance"
        assert client.remaining(USER, METER).remaining == 1_000
        with pytest.raises(UsageLimitExceeded):
            client.charge(USER, METER, 1_001, "event-2")
        assert limits_of(resources, USER).pay_from == "allowance"
        use(resources, "e2", 1_200)  # what happened is paid by all that there is
        assert accounts.show(resources, USER).balances[METER].purchased == 300
        assert client.check(USER, METER, 1).available == 0
        assert shown_available(resources) == 0
        limits.set_pay_from(resources, USER, None)
        drain(settings, USER)
        assert client.check(USER, METER, 1).available == 300
    assert limits.set_pay_from(resources, USER, None).repeated
    with pytest.raises(AccountError, match=r"^pay_from: must be allowance, or None \(got 'all'\)$"):
        limits.set_pay_from(resources, USER, "all")
    assert proved(resources)


# ---------------------------------------------------------------------------------------------------------------------
# Moved, closed


def test_export_and_import_carry_limits(settings: Settings, resources: Resources) -> None:
    limit(resources, "day", 100, of="user")
    limit(resources, "week", 900)
    use(resources, "e1", 40)
    limits.set_pay_from(resources, USER, "allowance")
    drain(settings, USER)
    lines: list[str] = []
    transfer.export_accounts(resources, lines.append)
    line = json.loads(lines[0])
    assert line["meters"][METER]["limits"]["windows"]["day"]["used"] == 40
    line["user_id"] = "moved"
    assert transfer.import_accounts(resources, json.dumps(line)).accounts == 1
    drain(settings, "moved")
    moved = limits_of(resources, "moved")
    assert moved.pay_from == "allowance"
    assert [(each.per, each.set_by, each.used) for each in moved.limits] == [
        ("day", "user", 40), ("week", "operator", 40),
    ]  # fmt: skip
    assert proved(resources)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("amounts", "user", "day"), 0, r"limits\.amounts\.user\.day: must be greater than or equal to 1"),
        (("amounts", "boss"), {"day": 1}, r"limits\.amounts\.boss.*must be one of plan, operator, user"),
        (("amounts", "user", "year"), 5, r"limits\.amounts\.user\.year.*must be one of day, week, month"),
        (("windows", "month"), {"starts": "2088-03-01T00:00Z", "ends": "2088-04-01T00:00Z", "since": 0, "used": 0},
         r"limits\.windows: must have windows with a limit only \(day\)"),
        (("windows", "day", "ends"), "2088-02-01T00:00:00Z", r"limits\.windows\.day\.ends: must be after starts"),
    ],
)  # fmt: skip
def test_an_import_names_what_is_wrong_with_limits(
    resources: Resources, path: tuple[str, ...], value: Any, told: str
) -> None:
    limit(resources, "day", 100, of="user")
    lines: list[str] = []
    transfer.export_accounts(resources, lines.append)
    line = json.loads(lines[0])
    line["user_id"] = "moved"
    place = line["meters"][METER]["limits"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(AccountError, match=told):
        transfer.import_accounts(resources, json.dumps(line))


def test_a_closed_account_has_no_limits(settings: Settings, resources: Resources) -> None:
    limit(resources, "day", 100, actor=USER, reason="ann asked")
    use(resources, "e1", 40)
    history = close_account(resources, USER, forfeit=True)
    assert rows(settings, "SELECT DISTINCT limits FROM balance") == [(None,)]
    found = rows(settings, "SELECT actor, reason FROM ledger_entry WHERE kind = 'set_limit' AND user_id = %s", history)
    assert found == [(None, None)]
    assert proved(resources)


def test_hosts_set_and_read_limits(settings: Settings, redis: Redis) -> None:
    with Accounts.connect(settings) as own:
        change = own.set_limit(USER, METER, "day", 20_000, "ticket-1", of="user", actor=USER)
        window = change.account.balances[METER].limits
        assert window is not None
        assert window.amounts == {"user": {"day": 20_000}}
        (found,) = own.limits(USER).limits
        assert (found.meter, found.per, found.set_by, found.amount, found.used, found.left) == (
            METER, "day", "user", 20_000, 0, 20_000,
        )  # fmt: skip
        assert own.set_pay_from(USER, "allowance").account.pay_from == "allowance"
    assert redis.xlen(partition_of(settings, USER).entries) > 0, "a worker is asked to publish"
