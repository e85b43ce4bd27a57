"""The reports over all accounts say what the log says, however far the sums are behind it."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple
from datetime import UTC, date, datetime, timedelta
from operator import attrgetter
from random import Random
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel
from redis import Redis

from config.settings import Settings
from schemas import overviews as schemas
from schemas.overviews import DebtFigure
from tests.support.commands import MODULE, Meterfall, assert_refused
from tests.support.ledger import execute, give_account, move_clock, rows
from tests.support.paths import ROOT
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.sponsorship import drain_pool, open_accounts
from tests.support.streams import drain, partition_of
from tests.support.waiting import wait_until
from worker.admin import accounts, corrections, credits, dead_letters
from worker.admin.erasure import close_account, reopen
from worker.admin.transfer import export_accounts, import_accounts
from worker.client import Billing
from worker.consumer import jobs
from worker.errors import AccountError, ReportError
from worker.keyspace import keys
from worker.ledger import summing
from worker.ledger.connection import batch_connection, begin_snapshot
from worker.reports import proof_sums
from worker.reports.overviews import Overviews, open_overviews
from worker.reports.proof import verify_ledger
from worker.reports.proof_run import prove_ledger
from worker.resources import Resources
from worker.rules.spans import MonthPart, Span, month_of, parts_by_month

METER, OCR = "premium_voice", "ocr_tokens"
USERS = ("ann", "bob", "cid", "dan", "eve")
EVERYTHING = Span(date(2000, 1, 1), date(2100, 1, 1))
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)

Key = tuple[date, str, str, str]


@pytest.fixture
def meterfall(command_server: subprocess.Popen[str], settings: Settings) -> Meterfall:
    return Meterfall(command_server, settings)


class World:
    """Users at work, and the workers that apply it."""

    def __init__(self, resources: Resources, redis: Redis) -> None:
        self.resources, self.settings, self.redis = resources, resources.settings, redis
        self.emitted: list[tuple[str, str]] = []

    def use(self, user_id: str, amount: int = 10, *, meter: str = METER, at: datetime | None = None) -> str:
        """Send an event whose work was done `at`, and have it applied."""
        event_id = f"e{len(self.emitted)}"
        event = {
            "event_id": event_id, "user_id": user_id, "meter": meter, "quantity": amount, "multiplier": "1",
            "occurred_at": (at or datetime.now(UTC)).isoformat(),
        }  # fmt: skip
        self.redis.xadd(partition_of(self.settings, user_id).entries, {"v": "1", "e": json.dumps(event)})
        self.emitted.append((user_id, event_id))
        drain(self.settings, user_id)
        return event_id

    def change(self, user_id: str, change: Callable[..., object], *arguments: object, **options: object) -> None:
        """Change an account, and drain: a refresh left in the stream would make the next change wait."""
        change(self.resources, user_id, *arguments, **options)
        drain(self.settings, user_id)

    def sum_up(self, changes: int = 1_000, calls: int | None = None) -> int:
        """Sum up what is there, or `calls` transactions of it; returns the number of changes."""
        go_on_at: str | None = ""
        total = done = 0
        while go_on_at is not None and done != calls:
            with batch_connection(self.resources.engine) as postgres:
                summed = summing.sum_up(postgres, go_on_at, changes)
            go_on_at, total, done = summed.go_on_at, total + summed.changes, done + 1
        return total

    def reports(self) -> Any:
        """Open the reports for the length of a block."""
        return open_overviews(self.resources)

    def log(self) -> dict[Key, tuple[int, int]]:
        """Events and amount by day, meter, plan and user: the plain model of usage, from the log's rows alone."""
        entries: Any = rows(
            self.settings, "SELECT user_id, seq, kind, entry_key, meter, detail FROM ledger_entry ORDER BY seq"
        )
        undone = {(user, key.removeprefix("reverse:")) for user, _, kind, key, *_ in entries if kind == "reversal"}
        found: dict[Key, tuple[int, int]] = defaultdict(lambda: (0, 0))
        log: Any = rows(self.settings, "SELECT user_id, event_id, seq, meter, amount, occurred_at FROM usage_log")
        for user, event_id, seq, meter, amount, occurred_at in log:
            if (user, event_id) in undone:
                continue
            plans = [
                detail["plan"]
                for owner, number, _, _, on, detail in entries
                if owner == user and seq is not None and number < seq and on == "" and "plan" in detail
            ]
            key = (occurred_at.astimezone(UTC).date(), meter, plans[-1] if plans else "", user)
            found[key] = (found[key][0] + 1, found[key][1] + amount)
        return found


@pytest.fixture
def world(resources: Resources, redis: Redis) -> World:
    return World(resources, redis)


def grouped(log: dict[Key, tuple[int, int]], span: Span, by: Iterable[str]) -> list[tuple[object, ...]]:
    """The rows of a report of usage as the model has them."""
    sums: dict[tuple[object, ...], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for (day, meter, plan, user), (events, amount) in log.items():
        if span.since <= day < span.until:
            key = (
                day if "day" in by else None, meter, plan if "plan" in by else None, user if "account" in by else None,
            )  # fmt: skip
            sums[key] = (sums[key][0] + events, sums[key][1] + amount)
    return sorted((*key, *figures) for key, figures in sums.items())


GROUPINGS = (
    ["meter"], ["day"], ["plan"], ["account"], ["day", "plan"], ["account", "plan"], ["day", "account"],
    ["account", "day", "meter", "plan"],
)  # fmt: skip


def assert_usage_is_the_log(world: World) -> None:
    """Every grouping over spans that cut months in every way."""
    log = world.log()
    days = sorted({day for day, *_ in log}) or [TODAY.date()]
    edges = sorted({days[0], *days, days[-1] + timedelta(days=1), month_of(days[0]).since, month_of(days[-1]).until})
    spans = [EVERYTHING, *(Span(a, b) for a in edges for b in edges if a < b)]
    with world.reports() as overviews:
        for by in GROUPINGS:
            for span in spans:
                assert list(overviews.usage(span, by)) == grouped(log, span, by), (by, span)
        for span in spans[:12]:
            top = [astuple(row) for row in overviews.top(span, limit=2)]
            assert top == best(log, span, 2), span


def best(log: dict[Key, tuple[int, int]], span: Span, limit: int) -> list[tuple[object, ...]]:
    """The accounts that used most of each meter, as the model has them."""
    figures: Any = [row[1:2] + row[3:] for row in grouped(log, span, ["account"])]
    found: list[tuple[object, ...]] = []
    for meter in sorted({row[0] for row in figures}):
        ranked = sorted((-amount, user, events) for of, user, events, amount in figures if of == meter)
        found += [(meter, n, user, events, -amount) for n, (amount, user, events) in enumerate(ranked[:limit], 1)]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Usage


def test_usage_is_the_log_at_every_state_of_the_sums(world: World) -> None:
    for user_id in USERS:
        give_account(world.settings, user_id, "basic")
    random, days = Random(7), [TODAY - timedelta(days=n) for n in (0, 1, 2, 9, 20, 31, 34)]
    moments = [day + timedelta(microseconds=shift) for day in days[1:] for shift in (0, -1, 1)] + [TODAY]

    def work(events: int) -> None:
        for _ in range(events):
            user_id, meter = random.choice((*USERS, "nobody")), random.choice((METER, OCR))
            world.use(user_id, random.choice((0, 1, 7, 120_000)), meter=meter, at=random.choice(moments))

    work(12)
    assert_usage_is_the_log(world)  # without any sum: all is tail
    assert world.sum_up(changes=3, calls=2) > 0
    assert_usage_is_the_log(world)  # some accounts, and one of them in part
    world.change("ann", accounts.change_plan, "plus")
    world.change("bob", accounts.change_plan, "free")
    work(12)
    world.change("bob", accounts.change_plan, "max")
    world.change("cid", accounts.set_status, "canceled")
    with suppress(AccountError):
        world.change("ann", credits.reverse, next(event for user, event in world.emitted if user == "ann"))
    world.sum_up()
    assert world.sum_up() == 0
    assert_usage_is_the_log(world)  # no tail
    work(10)
    for user_id, event_id in world.emitted[::4]:  # events of before and after the sums
        if user_id != "nobody":
            world.change(user_id, credits.reverse, event_id)
    assert_usage_is_the_log(world)
    world.sum_up(changes=1)
    assert_usage_is_the_log(world)
    assert verify_ledger(world.resources).differences == []
    assert prove_ledger(world.resources, whole=True).differences == []


def test_an_erased_account_counts_under_its_pseudonym_and_a_reopened_one_anew(world: World) -> None:
    for user_id in ("ann", "bob"):
        give_account(world.settings, user_id, "plus")
        world.use(user_id, 5)
    world.sum_up()
    world.use("ann", 7)  # not summed up when she goes
    history = close_account(world.resources, "ann", forfeit=True)
    drain(world.settings, "ann")
    world.use("ann", 11)  # nobody's: uncollected
    assert_usage_is_the_log(world)
    for table in ("report_state", "usage_monthly"):
        assert rows(world.settings, f"SELECT DISTINCT user_id FROM {table} ORDER BY 1") == [("bob",), (history,)]
    world.sum_up()
    assert_usage_is_the_log(world)
    reopen(world.resources, "ann", "basic")
    drain(world.settings, "ann")
    world.use("ann", 13)
    assert_usage_is_the_log(world)
    world.sum_up()
    again = close_account(world.resources, "ann", forfeit=True)
    assert again != history
    assert_usage_is_the_log(world)
    world.sum_up()
    assert_usage_is_the_log(world)
    assert prove_ledger(world.resources, whole=True).differences == []


def test_a_summing_up_waits_for_nobody_and_an_erasure_for_it(world: World) -> None:
    give_account(world.settings, "ann", "plus")
    world.use("ann")
    with psycopg.connect(world.settings.database_url or "") as other:
        other.execute("SELECT FROM account WHERE user_id = 'ann' FOR UPDATE")  # a drain at work
        assert world.sum_up() > 0
        other.rollback()
        world.use("ann")
        summing.rename_sums(other, "zoe", "closed:zoe")  # an erasure at work
        assert world.sum_up() == 0
        other.rollback()
        assert world.sum_up() > 0


def test_sponsored_requests_count_with_what_the_user_paid(world: World, settings: Settings) -> None:
    open_accounts(world.resources, "trusted", "sue")
    with Billing.connect(settings) as billing:
        assert billing.decide("sue", 60, "r-1").serve == "free"
        billing.settle_sponsored("sue", "r-1", 90, paid=30)
        billing.emit("sue", "credits", 30, event_id="r-1")
    drain(settings, "sue")
    drain_pool(world.resources)
    with world.reports() as overviews:
        (row,) = overviews.usage(EVERYTHING, ["account"])
        assert (row.user_id, row.meter, row.events, row.amount) == ("sue", "credits", 1, 30)
    assert_usage_is_the_log(world)


def test_an_empty_ledger_has_empty_reports(world: World, meterfall: Meterfall) -> None:
    assert world.sum_up() == 0
    with world.reports() as overviews:
        for found in every_report(overviews):
            assert list(found) == []
    for name in ("usage", "top", "near-limit", "debtors", "purchased", "uncollected"):
        assert meterfall.done("report", name) == "none\n"
        assert meterfall.done("report", name, "--json")["rows"] == []
        assert meterfall.done("report", name, "--csv").count("\n") == 1, "the header alone"


def every_report(overviews: Overviews) -> Iterator[Iterator[object]]:
    yield overviews.usage(EVERYTHING, ["day", "account"])
    yield overviews.usage(EVERYTHING, ["day", "plan"])
    yield overviews.top(EVERYTHING)
    yield overviews.near_limit(80)
    yield overviews.debtors()
    yield overviews.purchased()
    yield overviews.purchased_of_accounts()
    yield overviews.uncollected()


# ---------------------------------------------------------------------------------------------------------------------
# The proof of the sums


@pytest.fixture
def summed(world: World) -> World:
    """Two accounts with a change of plan and a reversal, summed up but for one event."""
    for user_id in ("ann", "bob"):
        give_account(world.settings, user_id, "basic")
    days = (month_of(TODAY.date()).since - timedelta(days=n) for n in (1, 2, 20))
    for day in days:
        world.use("ann", 7, at=datetime(day.year, day.month, day.day, 12, tzinfo=UTC))
    world.change("ann", accounts.change_plan, "plus")
    world.use("ann", 5)
    world.use("bob", 3, meter=OCR)
    world.change("ann", credits.reverse, world.emitted[1][1])
    world.sum_up()
    world.use("bob", 4)
    return world


def wrong_sums(world: World, *, whole: bool = True) -> list[tuple[str | None, str | None]]:
    """User and meter of the differences of a proof; all of them are of sums."""
    found = prove_ledger(world.resources, whole=whole).found
    assert {each.kind for each in found} <= {"sums"}, found
    return [(each.user_id, each.meter) for each in found]


OF_ANN = "UPDATE usage_monthly SET {} WHERE user_id = 'ann' AND plan = 'plus'"


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        (OF_ANN.format("amounts[31] = amounts[31] + 1"), {("ann", METER), (None, METER)}),
        (OF_ANN.format("events[31] = events[31] - 1"), {("ann", METER), (None, METER)}),
        (OF_ANN.format("amounts = amounts[1:30]"), {("ann", METER), (None, METER)}),
        (OF_ANN.format("plan = 'free'"), {("ann", METER), (None, METER)}),
        ("DELETE FROM usage_monthly WHERE user_id = 'bob'", {("bob", OCR), (None, OCR)}),
        ("UPDATE usage_daily SET amount = amount - 1 WHERE meter = 'ocr_tokens'", {(None, OCR)}),
        ("DELETE FROM usage_daily WHERE plan = 'plus'", {(None, METER)}),
        ("INSERT INTO usage_daily VALUES ('2020-02-03', 'premium_voice', 'basic', 1, 1)", {(None, METER)}),
        ("UPDATE report_state SET plan = 'free' WHERE user_id = 'bob'", {("bob", None)}),
        ("UPDATE report_state SET seq = seq + 1 WHERE user_id = 'bob'", {("bob", METER)}),
        ("UPDATE report_state SET seq = seq + 7 WHERE user_id = 'bob'", {("bob", None), ("bob", METER)}),
        ("DELETE FROM report_state WHERE user_id = 'bob'", {("bob", OCR)}),
        ("INSERT INTO report_state VALUES ('zed', 3, 'basic')", {("zed", None)}),
    ],
)
def test_a_full_proof_names_a_changed_sum(
    summed: World, statement: str, found: set[tuple[str | None, str | None]]
) -> None:
    assert wrong_sums(summed) == []
    execute(summed.settings, statement)
    assert set(wrong_sums(summed)) == found
    assert {("sums", each.user_id) for each in verify_ledger(summed.resources).found} == {
        ("sums", user_id) for user_id, _ in found
    }


def test_a_changed_sum_is_told_in_words(summed: World) -> None:
    execute(summed.settings, OF_ANN.format("amounts[31] = 9"))
    of_ann, of_all = prove_ledger(summed.resources, whole=True).found
    month = TODAY.strftime("%Y-%m")
    assert of_ann.text == (
        f"ann: {METER} on plan 'plus' has 1 events, 9 units in its sums of {month} up to day 31, "
        "its log: 1 events, 5 units"
    )
    assert (of_ann.expected, of_ann.found) == ("1 events, 5 units", "1 events, 9 units")
    assert of_all.text.startswith(f"all accounts: {METER} on plan 'plus' has 1 events, 9 units")


def test_a_proof_from_checkpoints_looks_at_the_sums_of_accounts_that_begin_at_zero(summed: World) -> None:
    execute(summed.settings, OF_ANN.format("amounts[31] = 9"))
    assert wrong_sums(summed, whole=False) == [("ann", METER)], "the first proof begins at zero"
    assert wrong_sums(summed, whole=False) == [("ann", METER)], "and again, until it is gone"
    execute(summed.settings, OF_ANN.format("amounts[31] = 5"))
    assert wrong_sums(summed, whole=False) == []
    execute(summed.settings, OF_ANN.format("amounts[31] = 9"))
    assert wrong_sums(summed, whole=False) == [], "ann goes on from her checkpoint"
    assert ("ann", METER) in wrong_sums(summed)


def test_long_logs_are_compared_in_portions(summed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_sums, "_CHANGES_A_STATEMENT", 2)
    assert wrong_sums(summed) == []
    execute(summed.settings, OF_ANN.format("amounts[31] = 9"))
    assert set(wrong_sums(summed)) == {("ann", METER), (None, METER)}


def test_a_proof_beside_the_job_finds_nothing(world: World) -> None:
    for user_id in USERS:
        give_account(world.settings, user_id, "basic")
        for _ in range(3):
            world.use(user_id, 7)
    with batch_connection(world.resources.engine) as postgres:
        begin_snapshot(postgres)
        assert list(proof_sums.wrong_sums(postgres, USERS)) == []
        for _ in range(4):  # a summing up ends in the middle of a proof
            world.sum_up(changes=3, calls=1)
            assert list(proof_sums.wrong_sums(postgres, USERS)) == []
            assert wrong_sums(world) == []
    world.sum_up()
    assert wrong_sums(world) == []


def test_sums_are_right_after_what_operators_do(world: World, resources: Resources) -> None:
    for user_id in ("ann", "bob", "cid"):
        give_account(world.settings, user_id, "basic")
        world.use(user_id, 7)
    world.sum_up()
    world.change("ann", credits.grant, METER, 50, "order-1")
    world.change("ann", credits.carry_over, "bob", "carry-1", meter=METER)
    drain(world.settings, "bob")
    world.use("bob", 2)
    world.sum_up()
    assert wrong_sums(world) == []
    dead_letters.replay(resources, mended_letter(world, "bob", 11))
    drain(world.settings, "bob")
    world.emitted.append(("bob", "late"))
    assert wrong_sums(world) == [], "not summed up yet"
    world.sum_up()
    world.change("bob", credits.reverse, "late")
    exported: list[str] = []
    export_accounts(resources, exported.append)
    import_accounts(resources, "".join(exported).replace('"cid"', '"dan"').splitlines()[-1])
    world.use("dan", 4)
    assert wrong_sums(world) == []
    world.sum_up()
    assert wrong_sums(world) == []
    close_account(resources, "dan", forfeit=True)
    assert wrong_sums(world) == []
    assert_usage_is_the_log(world)


def mended_letter(world: World, user_id: str, amount: int) -> int:
    """Have an event on an unknown meter refused; return its dead letter, with a meter that there is."""
    event = {
        "event_id": "late", "user_id": user_id, "quantity": amount, "multiplier": "1",
        "occurred_at": datetime.now(UTC).isoformat(),
    }  # fmt: skip
    entry: Any = {"v": "1", "e": json.dumps(event | {"meter": "new_meter"})}
    world.redis.xadd(partition_of(world.settings, user_id).entries, entry)
    drain(world.settings, user_id)
    mended = json.dumps(event | {"meter": METER}).encode()
    execute(world.settings, "UPDATE dead_letter SET payload = %s, payload_bytes = %s", mended, len(mended))
    found: Any = rows(world.settings, "SELECT id FROM dead_letter")
    return int(found[0][0])


# ---------------------------------------------------------------------------------------------------------------------
# The job


def test_a_dyno_sums_up_by_itself(settings: Settings, world: World) -> None:
    give_account(settings, "ann", "plus")
    summed = "SELECT sum(amount) FROM usage_daily"
    with dyno(settings, METERFALL_SUM_UP_INTERVAL_SECONDS="1"):
        world.use("ann", 21)
        wait_until(lambda: rows(settings, summed) == [(21,)], "the usage is summed up", 30)
    with world.reports() as overviews:
        (row,) = overviews.usage(EVERYTHING)
        assert row.amount == 21


def test_the_job_gives_way_to_a_drain_that_waits(
    world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "resources", lambda: world.resources)
    monkeypatch.setattr(jobs, "SUM_UP_CHANGES", 1)
    for user_id in USERS:
        give_account(settings, user_id, "plus")
    world.redis.set(keys.Partition(0).rung, "1")
    jobs.sum_up()
    (first,) = rows(settings, "SELECT count(*) FROM report_state")
    assert first == (1,)
    world.redis.delete(keys.Partition(0).rung)
    jobs.sum_up()
    assert rows(settings, "SELECT count(*) FROM report_state") == [(5,)]


# ---------------------------------------------------------------------------------------------------------------------
# Balances


def test_near_limit_lists_what_a_check_would_find(world: World, settings: Settings) -> None:
    used = {"ann": 79_999, "bob": 80_000, "cid": 100_000, "dan": 99_999, "eve": 90_000}
    for user_id, units in used.items():
        give_account(settings, user_id, "basic", buckets={METER: (units, 0, 3)})
    execute(settings, "UPDATE account SET status = 'canceled' WHERE user_id = 'dan'")
    give_account(settings, "zoe", "max_relay")  # unlimited
    with world.reports() as overviews:
        found = {(row.user_id, row.percent, row.limit, row.purchased) for row in overviews.near_limit(80)}
        assert found == {("bob", 80, 100_000, 3), ("cid", 100, 100_000, 3), ("eve", 90, 100_000, 3)}
        assert [row.user_id for row in overviews.near_limit(100)] == ["cid"]
        assert [row.user_id for row in overviews.near_limit(91, meter=METER)] == ["cid"]
        assert list(overviews.near_limit(1, meter=OCR)) == []


def test_boundaries_that_are_due_count_before_they_are_stored(world: World, settings: Settings) -> None:
    for user_id in ("ann", "bob"):  # monthly by the calendar
        give_account(settings, user_id, "free", buckets={METER: (4_900, -2_000, 0)})
    give_account(
        settings, "cid", "basic", buckets={METER: (90_000, -50, 0)}, end=datetime.now(UTC) + timedelta(days=90)
    )
    with world.reports() as overviews:
        assert [row.user_id for row in overviews.near_limit(90)] == ["ann", "bob", "cid"]
        assert list(overviews.debtors()) == [
            DebtFigure("ann", METER, "free", "active", 2_000, 0),
            DebtFigure("bob", METER, "free", "active", 2_000, 0),
            DebtFigure("cid", METER, "basic", "active", 50, 0),
        ]
    move_clock(settings, timedelta(days=40))  # the rest of the month, 100, pays debt
    with world.reports() as overviews:
        assert [row.user_id for row in overviews.near_limit(90)] == ["cid"]
        assert [(row.user_id, row.debt) for row in overviews.debtors()] == [
            (user_id, -accounts.show(world.resources, user_id).balances[METER].rollover)
            for user_id in ("ann", "bob", "cid")
        ]
        assert {row.debt for row in overviews.debtors()} == {1_900, 50}


def test_a_change_that_is_due_may_bring_an_account_near_its_limit(world: World, settings: Settings) -> None:
    give_account(settings, "ann", "plus", buckets={METER: (99_000, 0, 0)})  # a third of 300,000
    world.change("ann", accounts.change_plan, "basic", at=datetime.now(UTC) + timedelta(hours=1))
    with world.reports() as overviews:
        assert list(overviews.near_limit(90)) == []
    move_clock(settings, timedelta(hours=2))
    with world.reports() as overviews:
        (row,) = overviews.near_limit(90)
        assert (row.user_id, row.plan, row.limit, row.percent) == ("ann", "basic", 100_000, 99)


def test_many_accounts_are_brought_up_to_date_chunk_by_chunk(
    world: World, settings: Settings, monkeypatch: Any
) -> None:
    monkeypatch.setattr("worker.reports.overviews._CHUNK", 3)
    for number in range(10):
        give_account(settings, f"user-{number}", "free", buckets={METER: (5_000, -10 * number - 10, 0)})
    move_clock(settings, timedelta(days=40))
    with world.reports() as overviews:
        assert [(row.user_id, row.debt) for row in overviews.debtors()] == [
            (f"user-{number}", 10 * number + 10) for number in range(10)
        ]


def test_debts_end_as_they_are_forgiven(world: World, settings: Settings) -> None:
    give_account(settings, "ann", "basic", buckets={METER: (100_000, -30, 0), OCR: (0, -1, 5)})
    corrections.forgive_debt(world.resources, "ann", METER, key="k1", reason="kind")
    with world.reports() as overviews:
        assert list(overviews.debtors()) == [DebtFigure("ann", OCR, "basic", "active", 1, 5)]
        assert list(overviews.debtors(meter=METER)) == []


def test_purchased_is_the_sum_of_its_accounts_and_never_of_different_meters(world: World, settings: Settings) -> None:
    for number, user_id in enumerate(USERS):
        give_account(settings, user_id, "basic")
        credits.grant(world.resources, user_id, METER, 100 * number + 1, f"order-{number}")
    credits.grant(world.resources, "ann", OCR, 5, "order-x")
    close_account(world.resources, "eve", forfeit=True)
    with world.reports() as overviews:
        of_meter = attrgetter("meter", "accounts", "purchased")
        assert list(map(of_meter, overviews.purchased())) == [(OCR, 1, 5), (METER, 4, 1 + 101 + 201 + 301)]
        assert [(row.user_id, row.meter, row.purchased) for row in overviews.purchased_of_accounts()] == [
            ("ann", OCR, 5), ("ann", METER, 1), ("bob", METER, 101), ("cid", METER, 201), ("dan", METER, 301),
        ]  # fmt: skip
        assert list(map(of_meter, overviews.purchased(meter=OCR))) == [(OCR, 1, 5)]


def test_uncollected_events_are_told_by_user_and_meter(world: World, settings: Settings) -> None:
    give_account(settings, "ann", "basic")
    world.use("ann", 9)
    days = [TODAY - timedelta(days=n) for n in (3, 2, 1)]
    for day in days:
        world.use("zed", 4, at=day)
    world.use("zed", 1, meter=OCR, at=days[0])
    world.use("amy", 2, at=days[2] - timedelta(microseconds=1))
    with world.reports() as overviews:
        assert list(map(astuple, overviews.uncollected())) == [
            ("amy", METER, 1, 2, days[2] - timedelta(microseconds=1), days[2] - timedelta(microseconds=1)),
            ("zed", OCR, 1, 1, days[0], days[0]),
            ("zed", METER, 3, 12, days[0], days[2]),
        ]
        span = Span(days[1].date(), days[2].date())
        assert [astuple(row)[:4] for row in overviews.uncollected(span, meter=METER)] == [
            ("amy", METER, 1, 2), ("zed", METER, 1, 4),
        ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Spans and bad input


def test_a_span_falls_into_its_months() -> None:
    assert parts_by_month(Span(date(2026, 1, 31), date(2026, 3, 2))) == [
        MonthPart(date(2026, 1, 1), 31, 31), MonthPart(date(2026, 2, 1), 1, 28), MonthPart(date(2026, 3, 1), 1, 1),
    ]  # fmt: skip
    assert parts_by_month(Span(date(2026, 12, 5), date(2026, 12, 6))) == [MonthPart(date(2026, 12, 1), 5, 5)]
    assert parts_by_month(Span(date(2026, 12, 5), date(2026, 12, 5))) == []
    assert month_of(date(2028, 2, 29)) == (date(2028, 2, 1), date(2028, 3, 1))
    assert month_of(date(2026, 12, 31)) == (date(2026, 12, 1), date(2027, 1, 1))
    random = Random(2)
    for _ in range(200):
        since = date(2024, 1, 1) + timedelta(days=random.randrange(900))
        span = Span(since, since + timedelta(days=random.randrange(120)))
        days = [
            part.month + timedelta(days=n - 1)
            for part in parts_by_month(span)
            for n in range(part.first, part.last + 1)
        ]
        assert days == [span.since + timedelta(days=n) for n in range((span.until - span.since).days)]


def test_without_days_a_report_is_about_this_month(world: World) -> None:
    with world.reports() as overviews:
        assert overviews.span(None, None) == month_of(TODAY.date())
        assert overviews.span(date(2026, 2, 5), None) == (date(2026, 2, 5), date(2026, 3, 1))


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (("usage", "--by", "voice"), ("by", "voice", "day, meter, plan, account")),
        (("usage", "--by", "day,,plan"), ("by", "''")),
        (("usage", "--from", "2026-12-01", "--to", "2026-12-01"), ("from", "before", "2026-12-01")),
        (("usage", "--from", "2026-12-02", "--to", "2026-12-01"), ("from", "before", "2026-12-02", "2026-12-01")),
        (("usage", "--from", "yesterday"), ("--from", "yesterday", "2026-11-01")),
        (("top", "--to", "2026-13-01"), ("--to", "2026-13-01")),
        (("usage", "--from", "2026-11-01T00:00:00Z"), ("--from",)),
        (("usage", "--meter", "tea"), ("meter", "tea", METER)),
        (("usage", "--plan", "gold"), ("plan", "gold", "basic")),
        (("near-limit", "--percent", "101"), ("percent", "1 to 100", "101")),
        (("near-limit", "--meter", "tea"), ("meter", "tea")),
        (("debtors", "--meter", "tea"), ("meter", "tea")),
        (("purchased", "--by", "plan"), ("--by", "plan", "meter, account")),
        (("uncollected", "--meter", "tea"), ("meter", "tea")),
        (("usage", "--csv", "--json"), ("--csv", "--json")),
    ],
)
def test_bad_input_names_the_field_and_what_is_allowed(
    meterfall: Meterfall, command: tuple[str, ...], names: tuple[str, ...]
) -> None:
    assert_refused(meterfall("report", *command), 2, *names)


def test_calls_refuse_what_the_commands_refuse(world: World) -> None:
    with world.reports() as overviews:
        with pytest.raises(ReportError, match=r"by: .*day, meter, plan, account"):
            overviews.usage(EVERYTHING, [])
        with pytest.raises(ReportError, match=r"limit: .*10000"):
            overviews.top(EVERYTHING, limit=0)
        with pytest.raises(ReportError, match=r"percent: .*1 to 100"):
            overviews.near_limit(0)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def busy(world: World, settings: Settings) -> World:
    """Accounts with something to say in every report."""
    for user_id in ("ann", "bob"):
        give_account(settings, user_id, "basic", buckets={METER: (90_000, -3, 8)})
    world.use("ann", 40)
    world.use("=bob", 2)
    world.sum_up()
    world.use("bob", 50, meter=OCR, at=TODAY)
    return world


MODELS: dict[str, type[BaseModel]] = {
    "usage": schemas.UsageReport, "top": schemas.TopReport, "near-limit": schemas.NearLimitReport,
    "debtors": schemas.DebtorsReport, "purchased": schemas.PurchasedReport, "uncollected": schemas.UncollectedReport,
}  # fmt: skip
COMMANDS = (
    ("usage",), ("usage", "--by", "day,plan"), ("usage", "--by", "account", "--by", "day"), ("top", "--limit", "1"),
    ("near-limit",), ("near-limit", "--percent", "91"), ("debtors",), ("purchased",), ("purchased", "--by", "account"),
    ("uncollected",), ("uncollected", "--from", "2026-01-01"),
)  # fmt: skip


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_table_csv_and_json_say_the_same(meterfall: Meterfall, command: tuple[str, ...]) -> None:
    found = meterfall.done("report", *command, "--json")
    MODELS[command[0]].model_validate_json(json.dumps(found))
    printed = list(csv.DictReader(io.StringIO(meterfall.done("report", *command, "--csv"))))
    as_text = [{name: "" if value is None else str(value) for name, value in row.items()} for row in found["rows"]]
    assert printed == as_text
    table = meterfall.done("report", *command)
    if not found["rows"]:
        assert table == "none\n"
    for row in found["rows"]:
        assert str(row.get("user_id") or row["meter"]) in table


@pytest.mark.usefixtures("busy")
def test_the_commands_take_their_options(meterfall: Meterfall) -> None:
    usage = meterfall.done("report", "usage", "--by", "account", "--meter", METER, "--json")
    assert [(row["user_id"], row["amount"]) for row in usage["rows"]] == [("=bob", 2), ("ann", 40)]
    assert usage["by"] == ["meter", "account"]
    assert meterfall.done("report", "usage", "--plan", "basic", "--meter", METER, "--json")["rows"] == [
        {"meter": METER, "events": 1, "amount": 40}
    ]
    assert meterfall.done("report", "near-limit", "--json")["percent"] == 80
    near = meterfall("report", "near-limit", "--json", METERFALL_NEAR_LIMIT_PERCENT="95").json
    assert (near["percent"], near["rows"]) == (95, [])


def test_a_table_is_bounded_and_says_so(meterfall: Meterfall, settings: Settings) -> None:
    execute(
        settings,
        "INSERT INTO usage_daily SELECT date '2026-01-01' + n, 'premium_voice', 'basic', 1, n "
        "FROM generate_series(0, 1200) AS n",
    )
    options = ("report", "usage", "--by", "day", "--from", "2026-01-01", "--to", "2030-01-01")
    table = meterfall(*options)
    assert (table.code, table.err) == (0, "the first 1,000 rows; --csv and --json print all\n")
    assert table.out.count("premium_voice") == 1_000
    assert len(meterfall.done(*options, "--json")["rows"]) == 1_201
    assert meterfall.done(*options, "--csv").count("\n") == 1_202


def test_a_reader_may_leave_before_the_end(settings: Settings) -> None:
    execute(
        settings,
        "INSERT INTO usage_daily SELECT date '2000-01-01' + n, 'premium_voice', 'basic', 1, n "
        "FROM generate_series(0, 20000) AS n",
    )
    command = [*MODULE, "report", "usage", "--by", "day", "--from", "2000-01-01", "--to", "2100-01-01", "--csv"]
    environment = {**os.environ, "DATABASE_URL": settings.database_url or "", "REDIS_URL": settings.redis_url}
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "day,meter,events,amount\n"
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == ("", 0)


def test_a_report_only_reads_and_has_a_time_out(world: World) -> None:
    with world.reports() as overviews, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        overviews._postgres.execute("DELETE FROM usage_daily")
    slow = settings_for(world.settings.database_url or "", world.settings.redis_url, report_timeout_ms=50)
    with (
        worker_resources(slow) as resources,
        open_overviews(resources) as overviews,
        pytest.raises(psycopg.errors.QueryCanceled),
    ):
        overviews._postgres.execute("SELECT pg_sleep(5)")
