"""Reports say what the rows say, however far the roll-ups are behind them; explain says who paid."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from threading import Thread
from typing import Any, NamedTuple, cast

import psycopg
import pytest
from redis import Redis

from benchmarks import reports as benchmark
from config.settings import Settings
from schemas.answers import CheckAnswer, Parts, Reason
from schemas.reports import BucketUnits, Change, EventState, Explanation
from tests.support.ledger import give_account, rows
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain, partition_of
from tests.support.waiting import wait_until
from worker.admin import accounts, credits
from worker.client import Billing
from worker.consumer import jobs
from worker.consumer.supervisor import Supervisor
from worker.errors import ReportError
from worker.keyspace import keys
from worker.ledger import batch as ledger_batch
from worker.ledger import reports as ledger_reports
from worker.ledger.columns import copy_rows
from worker.ledger.connection import Postgres, batch_connection
from worker.reports import usage as reports_usage
from worker.reports.explain import explain
from worker.resources import Resources
from worker.rules.explanations import explain_check

USER = "user-42"
METERS = ("ocr_tokens", "premium_voice", "server_kokoro")
CHARACTERS = ("premium_voice", "server_kokoro")
OLD, OPEN = datetime(2026, 10, 7, tzinfo=UTC), datetime(2026, 11, 7, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


@pytest.fixture
def postgres(settings: Settings) -> Iterator[Postgres]:
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as connection:
        yield connection


# ---------------------------------------------------------------------------------------------------------------------
# An account written row by row, and the plain model of its reports


class Row(NamedTuple):
    """What the model knows of an event."""

    event_id: str
    meter: str
    quantity: int
    amount: int
    period_start: datetime
    occurred_at: datetime
    dimensions: dict[str, Any] | None


class Log:
    """One account's changes, written as the drain and the accounts write them, without their rules."""

    def __init__(self, settings: Settings, postgres: Postgres, user_id: str = USER) -> None:
        give_account(settings, user_id, "plus")
        self.user_id, self._postgres, self._seq = user_id, postgres, 4
        self.rows: list[Row] = []
        self.reversed: set[str] = set()
        postgres.execute(
            "UPDATE balance SET period_start = %s, anchored_at = %s WHERE user_id = %s", (OPEN, OPEN, user_id)
        )
        postgres.commit()

    def use(
        self,
        meter: str = "premium_voice",
        quantity: int = 10,
        period_start: datetime = OPEN,
        occurred_at: datetime = OPEN,
        **dimensions: Any,
    ) -> str:
        """Append one event of twice the quantity; returns its id."""
        self._seq += 1
        event_id, amount = f"e{self._seq}", 2 * quantity
        parts = (amount, 0, 0, 0, 0)
        facts = json.dumps(dimensions) if dimensions else None
        times = (period_start, occurred_at, OPEN)
        names = (None, None, None)
        row = (
            self.user_id,
            event_id,
            self._seq,
            meter,
            quantity,
            "2",
            amount,
            *parts,
            *times,
            False,
            *names,
            facts,
            None,
            None,
            None,
        )
        with self._postgres.cursor() as cursor:
            copy_rows(cursor, ledger_batch.COPY_USAGE, [row])
        self._postgres.commit()
        self.rows.append(Row(event_id, meter, quantity, amount, period_start, occurred_at, dimensions or None))
        return event_id

    def reverse(self, event_id: str) -> None:
        """Append the ledger entry of a reversal."""
        self._seq += 1
        (meter,) = [row.meter for row in self.rows if row.event_id == event_id]
        self._postgres.execute(
            "INSERT INTO ledger_entry VALUES (%s, %s, %s, %s, 'reversal', 0, 0, 0, 0, 0, 0, %s, %s)",
            (self.user_id, self._seq, f"reverse:{event_id}", meter, json.dumps({"event_id": event_id}), OPEN),
        )
        self._postgres.commit()
        self.reversed.add(event_id)

    def roll_up(self, rows: int = 1_000) -> bool:
        return ledger_reports.roll_up(self._postgres, self.user_id, rows)

    @property
    def standing(self) -> list[Row]:
        return [row for row in self.rows if row.event_id not in self.reversed]


def fact(row: Row, name: str) -> str:
    """A dimension as text, "" for none, as the roll-ups name it."""
    value = (row.dimensions or {}).get(name)
    return "" if value is None else json.dumps(value) if isinstance(value, bool) else str(value)


def whole(row: Row, name: str, digits: int) -> int | None:
    """A dimension that is a whole number of at most so many digits."""
    value = (row.dimensions or {}).get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def voices_of(log: Log, period_start: datetime = OPEN) -> list[tuple[object, ...]]:
    """The model: meter, voice, model, events, quantity, amount, duration."""
    sums: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in log.standing:
        if row.period_start == period_start:
            found = sums[row.meter, fact(row, "voice_slug"), fact(row, "model_slug")]
            figures = (1, row.quantity, row.amount, whole(row, "duration_ms", 10) or 0)
            found[:] = [total + figure for total, figure in zip(found, figures, strict=True)]
    return sorted((*names, *figures) for names, figures in sums.items())


def documents_of(log: Log, period_start: datetime = OPEN) -> list[tuple[object, ...]]:
    """The model: meter, document, events, amount, pages."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in log.standing:
        if row.period_start == period_start and fact(row, "document_id"):
            found = sums[row.meter, fact(row, "document_id")]
            found[:] = [found[0] + 1, found[1] + row.amount]
    pages = {
        name: {
            whole(row, "page_idx", 9)
            for row in log.rows
            if (row.meter, fact(row, "document_id"), row.period_start) == (*name, period_start)
        }
        for name in sums
    }
    return sorted((*name, *figures, len(pages[name] - {None})) for name, figures in sums.items())


def life_of(log: Log) -> tuple[list[tuple[object, ...]], int, int]:
    """The model: months with voice, model, characters, duration, syntheses; documents; pages."""
    months: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in log.standing:
        voice, spoken = fact(row, "voice_slug"), row.meter in CHARACTERS
        if voice or spoken:
            found = months[f"{row.occurred_at.astimezone(UTC):%Y-%m}", voice, fact(row, "model_slug")]
            figures = (row.quantity if spoken else 0, whole(row, "duration_ms", 10) or 0, 1)
            found[:] = [total + figure for total, figure in zip(found, figures, strict=True)]
    documents = {fact(row, "document_id") for row in log.standing} - {""}
    pages = {(fact(row, "document_id"), whole(row, "page_idx", 9)) for row in log.rows}
    counted = [page for document, page in pages if document in documents and page is not None]
    return sorted((*name, *figures) for name, figures in months.items()), len(documents), len(counted)


def assert_exact(resources: Resources, log: Log, *, documents: int = 500) -> None:
    """Breakdown and engagement say what the model says."""
    found = reports_usage.breakdown(resources, log.user_id)
    assert [tuple(voice.model_dump().values()) for voice in found.voices] == voices_of(log)
    assert paged_documents(resources, log.user_id, documents) == documents_of(log)
    life = reports_usage.engagement(resources, log.user_id)
    months, known, pages = life_of(log)
    assert [tuple(month.model_dump().values()) for month in life.months] == months
    assert (life.documents, life.pages) == (known, pages)
    assert (life.characters, life.syntheses) == (sum(life_sum(months, 3)), sum(life_sum(months, 5)))
    assert {period.meter: period.amount for period in found.periods} == {
        meter: sum(row.amount for row in log.standing if (row.meter, row.period_start) == (meter, OPEN))
        for meter in METERS
    }


def life_sum(months: Sequence[tuple[Any, ...]], column: int) -> list[int]:
    return [month[column] for month in months]


def paged_documents(resources: Resources, user_id: str, size: int) -> list[tuple[object, ...]]:
    """All documents of the open periods, read in pages."""
    found: list[tuple[object, ...]] = []
    after: str | None = None
    while True:
        page = reports_usage.breakdown(resources, user_id, documents=size, after=after)
        assert len(page.documents) <= size
        found += [tuple(document.model_dump().values()) for document in page.documents]
        after = page.more_documents_after
        if after is None:
            return found


def write_some(log: Log, random: Random) -> None:
    """One more change of any kind."""
    if log.standing and random.random() < 0.15:
        log.reverse(random.choice(log.standing).event_id)
        return
    facts = {
        "voice_slug": random.choice([None, "narrator", "Ångström", "", 7]),
        "model_slug": random.choice([None, "m1", "m2"]),
        "document_id": random.choice([None, "", "a", "b", "c/d", "ü"]),
        "page_idx": random.choice([None, 0, 1, 2, "2", "3", 9, 2.5, -1, True, "x"]),
        "duration_ms": random.choice([None, 5_000, "700", -3, 1.5]),
    }
    kept = {name: value for name, value in facts.items() if value is not None}
    occurred_at = OPEN + timedelta(days=random.randrange(-40, 20), microseconds=random.randrange(10**6))
    log.use(random.choice(METERS), random.randrange(50), random.choice([OLD, OPEN]), occurred_at, **kept)


# ---------------------------------------------------------------------------------------------------------------------
# Exact at any lag


@pytest.mark.parametrize("seed", range(4))
def test_reports_are_exact_however_far_the_roll_ups_are_behind(
    settings: Settings, resources: Resources, postgres: Postgres, seed: int
) -> None:
    random, log = Random(seed), Log(settings, postgres)
    for _ in range(25):
        for _ in range(random.randrange(8)):
            write_some(log, random)
        if random.random() < 0.6:
            log.roll_up(random.choice([1, 3, 10, 100]))
        assert_exact(resources, log, documents=random.choice([1, 2, 500]))
    while log.roll_up(7):
        assert_exact(resources, log)
    assert ledger_reports.tail_length(postgres, USER) == 0
    assert_exact(resources, log)


class Interrupted(Exception):
    """The process died."""


class Watched:
    """A connection on which something happens before it commits, or before its statement of this beginning."""

    def __init__(self, postgres: Postgres, then: Callable[[], object], before: str = "COMMIT") -> None:
        self._postgres, self._then, self._before = postgres, then, before

    def execute(self, statement: str, *arguments: Any) -> Any:
        if statement.split()[0] == self._before:
            self._then()
        return self._postgres.execute(statement, *arguments)

    def commit(self) -> None:
        if self._before == "COMMIT":
            self._then()
        self._postgres.commit()


def test_during_a_roll_up_and_after_its_death_the_figures_stay(
    settings: Settings, resources: Resources, postgres: Postgres
) -> None:
    random, log = Random(11), Log(settings, postgres)
    for _ in range(30):
        write_some(log, random)

    def die() -> None:
        assert_exact(resources, log)
        raise Interrupted

    for size in (10, 100):
        with pytest.raises(Interrupted):
            ledger_reports.roll_up(cast("Postgres", Watched(postgres, die)), USER, size)
        postgres.rollback()
        assert_exact(resources, log)
        watched = Watched(postgres, lambda: assert_exact(resources, log))
        ledger_reports.roll_up(cast("Postgres", watched), USER, size)
        assert_exact(resources, log)
    assert rows(settings, "SELECT seq FROM rollup_state") == [(34,)]


@pytest.mark.parametrize("before", ["WITH", "COMMIT"])  # what it reads and writes, and what others see of it
def test_two_roll_ups_at_once_take_turns(
    settings: Settings, resources: Resources, postgres: Postgres, before: str
) -> None:
    random, log = Random(12), Log(settings, postgres)
    for _ in range(30):
        write_some(log, random)
    log.roll_up(5)
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as other:
        second = Thread(target=lambda: ledger_reports.roll_up(other, USER, 20))

        def second_comes() -> None:
            second.start()
            waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            wait_until(lambda: bool(rows(settings, waiting)), "the second waits for the first")

        ledger_reports.roll_up(cast("Postgres", Watched(postgres, second_comes, before)), USER, 20)
        second.join()
    assert rows(settings, "SELECT seq FROM rollup_state") == [(34,)]
    assert_exact(resources, log)


def test_a_roll_up_does_not_wait_for_a_batch_of_the_account(
    settings: Settings, resources: Resources, postgres: Postgres
) -> None:
    log = Log(settings, postgres)
    log.use()
    with batch_connection(resources.engine) as batch:
        ledger_batch.load_for_update(batch, [USER], ([], []))
        assert log.roll_up() is False
    assert rows(settings, "SELECT seq FROM rollup_state") == [(5,)]


def test_erased_roll_ups_change_no_figure(settings: Settings, resources: Resources, postgres: Postgres) -> None:
    random, log = Random(13), Log(settings, postgres)
    for _ in range(40):
        write_some(log, random)
    log.roll_up(25)
    ledger_reports.erase(postgres, USER)
    postgres.commit()
    for table in ("rollup_state", "usage_rollup", "document_rollup", "document_lifetime", "balance_checkpoint"):
        assert rows(settings, f"SELECT * FROM {table}") == []
    assert_exact(resources, log)
    log.roll_up()
    assert_exact(resources, log)


def test_a_reversed_event_is_gone_before_and_after_its_roll_up(
    settings: Settings, resources: Resources, postgres: Postgres
) -> None:
    log = Log(settings, postgres)
    first = log.use(voice_slug="narrator", document_id="a", page_idx=1, duration_ms=10)
    log.use(voice_slug="narrator", document_id="a", page_idx=2, duration_ms=10)
    log.roll_up()
    log.reverse(first)  # rolled up already
    second = log.use("ocr_tokens", document_id="b", page_idx=1)
    log.reverse(second)  # not yet
    for _ in range(2):
        found = reports_usage.breakdown(resources, USER)
        assert [(voice.meter, voice.events, voice.amount, voice.duration_ms) for voice in found.voices] == [
            ("premium_voice", 1, 20, 10)
        ]
        assert [(one.document_id, one.events, one.pages) for one in found.documents] == [("a", 1, 2)]
        life = reports_usage.engagement(resources, USER)
        assert (life.syntheses, life.characters, life.documents, life.pages) == (1, 10, 1, 2)
        log.roll_up()


PAGES: list[tuple[object, bool]] = [
    (0, True), ("1", True), ("002", True), (999_999_999, True), ("7" * 9, True), (1_000_000_000, False), (-1, False),
    (10**30, False), (3.0, False), (3.5, False), (1e3, False), ("", False), (" 4", False), ("4\n", False), ("٣", False),
    (True, False), (None, False), ("1_0", False), ("+5", False), ("0x1", False), ("iv", False),
]  # fmt: skip


def test_a_page_is_a_whole_number_whatever_a_producer_sends(
    settings: Settings, resources: Resources, postgres: Postgres
) -> None:
    log = Log(settings, postgres)
    for value, _ in (*PAGES, (1, True), (2, True)):  # the last two are pages seen before
        log.use(document_id="d", page_idx=value, duration_ms=value)
    expected = sum(counts for _, counts in PAGES)
    for _ in range(2):
        ((document,), life) = (
            reports_usage.breakdown(resources, USER).documents,
            reports_usage.engagement(resources, USER),
        )
        assert (document.events, document.pages, life.documents, life.pages) == (len(PAGES) + 2, expected, 1, expected)
        assert_exact(resources, log)
        log.roll_up()


def test_longest_names_and_largest_figures_fit_the_roll_ups(
    settings: Settings, resources: Resources, postgres: Postgres
) -> None:
    log = Log(settings, postgres, "u" * 128)
    random = Random(1)
    for name in ("voice_slug", "model_slug", "document_id"):
        facts: dict[str, Any] = {name: random.randbytes(990).hex(), "duration_ms": 10**10 - 1}
        log.use(quantity=5 * 10**11, **facts)
    log.use(page_idx=999_999_999, document_id="d")
    log.roll_up()
    assert_exact(resources, log)


def test_usage_that_nobody_pays_for_is_in_no_report(
    settings: Settings, resources: Resources, postgres: Postgres
) -> None:
    with Billing.connect(settings) as billing:
        billing.emit(USER, "premium_voice", 5, event_id="early")
    drain(settings, USER)
    log = Log(settings, postgres)
    log.use()
    assert_exact(resources, log)
    log.roll_up()
    assert_exact(resources, log)


# ---------------------------------------------------------------------------------------------------------------------
# Edges of periods


def test_an_event_belongs_to_the_period_that_its_row_names(
    settings: Settings, resources: Resources, postgres: Postgres
) -> None:
    log = Log(settings, postgres)
    log.use(quantity=1, period_start=OLD, occurred_at=OPEN - MICROSECOND, voice_slug="v", document_id="d", page_idx=1)
    log.use(quantity=2, period_start=OLD, occurred_at=OPEN, voice_slug="v", document_id="d", page_idx=2)
    log.use(quantity=4, period_start=OPEN, occurred_at=OPEN - MICROSECOND, voice_slug="v", document_id="d", page_idx=3)
    log.use(quantity=8, period_start=OPEN - MICROSECOND, occurred_at=OPEN, voice_slug="v", document_id="d", page_idx=4)
    for _ in range(2):
        found = reports_usage.breakdown(resources, USER)
        assert [(voice.events, voice.quantity) for voice in found.voices] == [(1, 4)]
        assert [(document.events, document.pages) for document in found.documents] == [(1, 1)]
        log.roll_up(2)
        log.roll_up()


def test_months_end_at_midnight_utc(settings: Settings, resources: Resources, postgres: Postgres) -> None:
    log = Log(settings, postgres)
    december = datetime(2026, 12, 1, tzinfo=UTC)
    for moment in (december - MICROSECOND, december):
        log.use(occurred_at=moment)
    for _ in range(2):
        assert [month.month for month in reports_usage.engagement(resources, USER).months] == ["2026-11", "2026-12"]
        log.roll_up()


def test_a_boundary_that_is_due_but_not_written_opens_an_empty_period(
    settings: Settings, resources: Resources, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(settings, postgres)
    log.use(document_id="d")
    account = accounts.show(resources, USER)
    later = {
        meter: balance._replace(period_start=OPEN + MICROSECOND, counted_from=OPEN + MICROSECOND)
        for meter, balance in account.balances.items()
    }
    monkeypatch.setattr(reports_usage, "as_of", lambda *_: account._replace(balances=later))
    for _ in range(2):
        found = reports_usage.breakdown(resources, USER)
        assert (found.voices, found.documents) == ((), ())
        assert {period.period_start for period in found.periods} == {OPEN + MICROSECOND}
        log.roll_up()


# ---------------------------------------------------------------------------------------------------------------------
# Timeline, summary, snapshot


def test_a_timeline_has_every_change_once_however_it_is_paged(
    settings: Settings, resources: Resources, postgres: Postgres
) -> None:
    log = Log(settings, postgres)
    for number in range(9):
        event_id = log.use(quantity=number)
        if number % 3 == 0:
            log.reverse(event_id)
    everything = reports_usage.timeline(resources, USER, limit=100)
    assert [change.seq for change in everything.changes] == list(range(16, 0, -1))
    assert everything.more_before_seq is None
    assert reports_usage.timeline(resources, USER, limit=16) == everything
    assert reports_usage.timeline(resources, USER, limit=15).more_before_seq == 2
    found: list[Change] = []
    before: int | None = None
    while True:
        page = reports_usage.timeline(resources, USER, limit=3, before_seq=before)
        found += page.changes
        log.use()  # what comes now is on no later page
        before = page.more_before_seq
        if before is None:
            break
    assert found == list(everything.changes)


def test_a_timeline_says_what_each_change_did(settings: Settings, resources: Resources) -> None:
    give_account(settings, USER, "basic")
    credits.grant(resources, USER, "premium_voice", 500, "order-1")
    with Billing.connect(settings) as billing:
        billing.emit(USER, "premium_voice", 100_200, event_id="e1")
    drain(settings, USER)
    event, grant, *opened = reports_usage.timeline(resources, USER).changes
    assert (event.seq, event.kind, event.what, event.amount) == (6, "usage", "e1", 100_200)
    assert event.parts == Parts(from_subscription=100_000, from_purchased=200)
    assert (grant.kind, grant.what, grant.parts) == ("grant", "grant:order-1", None)
    assert grant.changes == BucketUnits(used=0, rollover=0, purchased=500)
    assert grant.after == BucketUnits(used=0, rollover=0, purchased=500)
    assert [(change.seq, change.kind) for change in opened] == [
        (4, "open_meter"), (3, "open_meter"), (2, "open_meter"), (1, "open"),
    ]  # fmt: skip
    assert opened[-1].detail is not None
    assert opened[-1].detail["plan"] == "basic"


def test_a_summary_says_what_a_check_finds(settings: Settings, resources: Resources) -> None:
    give_account(settings, USER, "basic", buckets={"premium_voice": (400, -100, 70), "ocr_tokens": (10, 5, 0)})
    give_account(settings, "relay", "pro")
    give_account(settings, "gone", "plus", status="canceled")
    with Billing.connect(settings) as billing:
        billing.reserve(USER, "premium_voice", 1_000, "hold-1")
        billing.emit(USER, "premium_voice", 30)
        for user_id in (USER, "relay", "gone"):
            summary = reports_usage.usage_summary(resources, user_id)
            for usage in summary.meters:
                check = billing.check(user_id, usage.meter, 1)
                figures = (usage.limit, usage.used, usage.rollover, usage.purchased, usage.pending, usage.available)
                assert figures == (
                    check.limit, check.used, check.rollover, check.purchased, check.pending, check.available,
                )  # fmt: skip
    summary = reports_usage.usage_summary(resources, USER)
    assert (summary.plan, summary.plan_name, summary.tier, summary.status) == ("basic", "Basic", 1, "active")
    assert [(usage.meter, usage.unit, usage.pending) for usage in summary.meters] == [
        ("ocr_tokens", "tokens", 0), ("premium_voice", "characters", 1_030), ("server_kokoro", "characters", 0),
    ]  # fmt: skip


def test_without_redis_a_summary_says_what_the_ledger_knows(settings: Settings) -> None:
    give_account(settings, USER, "basic")
    down = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0", "redis_retries": 0})
    with worker_resources(down) as resources:
        found = {
            usage.meter: (usage.pending, usage.available)
            for usage in reports_usage.usage_summary(resources, USER).meters
        }
    assert found["premium_voice"] == (None, 100_000)


def test_the_snapshot_has_every_account_once(
    settings: Settings, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports_usage, "SNAPSHOT_ACCOUNTS", 2)
    assert list(reports_usage.snapshot(resources)) == []
    users = [f"user-{number}" for number in range(5)]
    accounts.open_many(resources, users, "plus")
    found = list(reports_usage.snapshot(resources))
    assert [summary.user_id for summary in found] == users
    assert [(one.meters, one.plan) for one in found] == [
        (reports_usage.usage_summary(resources, user_id).meters, "plus") for user_id in users
    ]
    assert [summary.user_id for summary in reports_usage.snapshot(resources, after="user-2")] == ["user-3", "user-4"]


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda resources: reports_usage.usage_summary(resources, "nobody"), "user_id"),
        (lambda resources: reports_usage.breakdown(resources, "nobody"), "user_id"),
        (lambda resources: reports_usage.engagement(resources, "no body"), "user_id"),
        (lambda resources: reports_usage.timeline(resources, "nobody"), "user_id"),
        (lambda resources: reports_usage.timeline(resources, USER, limit=0), "limit"),
        (lambda resources: reports_usage.timeline(resources, USER, before_seq=0), "before_seq"),
        (lambda resources: reports_usage.breakdown(resources, USER, documents=10_001), "documents"),
        (lambda resources: reports_usage.breakdown(resources, USER, after="nonsense"), "after"),
        (lambda resources: explain(resources, USER, "e\n"), "event_id"),
        (lambda resources: explain(resources, USER, "e404"), "event_id"),
    ],
)
def test_what_cannot_be_reported_is_said_in_one_line(
    resources: Resources, ask: Callable[[Resources], object], field: str
) -> None:
    give_account(resources.settings, USER)
    with pytest.raises(ReportError, match=rf"^{field}: [^\n]+$"):
        ask(resources)


# ---------------------------------------------------------------------------------------------------------------------
# Why


def spend(settings: Settings, user_id: str, meter: str, quantity: int, event_id: str = "e1", **facts: Any) -> None:
    """One event, emitted and applied."""
    with Billing.connect(settings) as billing:
        billing.emit(user_id, meter, quantity, event_id=event_id, **facts)
    drain(settings, user_id)


def parts(*units: int) -> Parts:
    return Parts(**dict(zip(Parts.model_fields, units, strict=False)))


def assert_balances(resources: Resources, found: Explanation) -> None:
    """The buckets after the newest event are the account's."""
    balance = accounts.show(resources, found.user_id).balances[found.meter or ""]
    assert found.after == BucketUnits(used=balance.used, rollover=balance.rollover, purchased=balance.purchased)


BUCKETS: list[tuple[str, tuple[int, int, int], int, Parts, str]] = [
    ("subscription", (99_000, 50, 20), 600, parts(600), "The subscription paid 600 of the 1,000 left of its 100,000."),
    ("rollover", (100_000, 50, 20), 40, parts(0, 40), "Rollover paid 40 of 50."),
    ("purchased", (100_000, 0, 20), 20, parts(0, 0, 20), "Purchased credits paid 20 of 20."),
    (
        "all of them", (99_990, 50, 20), 100, parts(10, 50, 20, 20),
        "The subscription paid 10 of the 10 left of its 100,000. Rollover paid 50 of 50. "
        "Purchased credits paid 20 of 20. Nothing was left for 20: rollover is a debt of 20 now.",
    ),
    (
        "debt grows", (100_000, -7, 3), 10, parts(0, 0, 3, 7),
        "Nothing was left of the subscription's 100,000. Rollover was a debt of 7 and paid nothing. "
        "Purchased credits paid 3 of 3. Nothing was left for 7: rollover is a debt of 14 now.",
    ),
    ("nothing", (100_000, 50, 20), 0, parts(), "It moved nothing."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "quantity", "paid", "sentence"), [pytest.param(*case[1:], id=case[0]) for case in BUCKETS]
)
def test_explain_names_the_bucket_that_paid(
    settings: Settings, resources: Resources, before: tuple[int, int, int], quantity: int, paid: Parts, sentence: str
) -> None:
    give_account(settings, USER, "basic", buckets={"premium_voice": before})
    spend(settings, USER, "premium_voice", quantity)
    found = explain(resources, USER, "e1")
    assert (found.state, found.parts, found.amount) == (EventState.APPLIED, paid, quantity)
    assert (found.plan, found.status, found.limit, found.unlimited) == ("basic", "active", 100_000, False)
    assert found.before == BucketUnits(used=before[0], rollover=before[1], purchased=before[2])
    assert sentence in " ".join(found.sentences)
    assert_balances(resources, found)


def test_explain_of_unlimited_use(settings: Settings, resources: Resources) -> None:
    give_account(settings, USER, "plus")
    spend(settings, USER, "server_kokoro", 10**9)
    found = explain(resources, USER, "e1")
    assert (found.unlimited, found.limit, found.parts) == (True, None, parts(10**9))
    assert "Usage was unlimited on plan plus: the subscription took all of it." in found.sentences
    assert_balances(resources, found)


def test_explain_of_a_meter_that_does_not_spill(settings: Settings, resources: Resources) -> None:
    give_account(settings, USER, "pro", buckets={"relay_credits": (4_990, 0, 0)})
    spend(settings, USER, "relay_credits", 25)
    found = explain(resources, USER, "e1")
    assert (found.spill, found.limit, found.parts) == (False, 5_000, parts(25))
    sentence = "Nothing spills on this meter: all of it counts against the limit, 5,000; 4,990 were used."
    assert sentence in found.sentences
    assert_balances(resources, found)


def test_explain_tells_plan_and_status_of_that_time(
    settings: Settings, resources: Resources, postgres: Postgres
) -> None:
    give_account(settings, USER, "basic", buckets={"premium_voice": (0, 0, 5)})
    spend(settings, USER, "premium_voice", 1, "before")
    accounts.set_status(resources, USER, "canceled")
    spend(settings, USER, "premium_voice", 8, "without a plan".replace(" ", "-"))
    postgres.execute("UPDATE account SET plan = 'max'")
    postgres.commit()
    first, second = (explain(resources, USER, event_id) for event_id in ("before", "without-a-plan"))
    assert (first.plan, first.status, first.limit, first.parts) == ("basic", "active", 100_000, parts(1))
    assert (second.plan, second.status, second.limit, second.parts) == ("basic", "canceled", 0, parts(0, 0, 5, 3))
    assert "The account was canceled, which has no allowance." in second.sentences
    assert_balances(resources, second)


def test_explain_tells_multiplier_late_and_clamped(settings: Settings, resources: Resources) -> None:
    give_account(settings, USER, "basic")
    now = datetime.now(UTC)
    spend(settings, USER, "premium_voice", 3, dimensions={"model_slug": "m2"}, occurred_at=now - timedelta(days=2))
    spend(settings, USER, "premium_voice", 3, "e2", occurred_at=now + timedelta(days=2))
    late, clamped = explain(resources, USER, "e1"), explain(resources, USER, "e2")
    assert (late.multiplier, late.amount, late.late, late.clamped) == ("1.5", 4, True, False)
    assert late.sentences[0] == "Event e1 used 3 × 1.5 = 4 of premium_voice (characters)."
    assert late.sentences[1].endswith("with 0 carried from earlier events it paid 4 and left 0.5 to the next.")
    assert any(sentence.startswith("The work was done before that") for sentence in late.sentences)
    assert (clamped.multiplier, clamped.amount, clamped.late, clamped.clamped) == ("1", 3, False, True)
    assert "Its time was ahead of the clock and was set to its arrival." in clamped.sentences


def test_explain_tells_that_an_event_was_reversed(settings: Settings, resources: Resources, postgres: Postgres) -> None:
    log = Log(settings, postgres)
    event_id = log.use()
    log.reverse(event_id)
    found = explain(resources, USER, event_id)
    assert (found.state, found.reversed_at) == (EventState.REVERSED, OPEN)
    assert f"It was reversed at {OPEN.isoformat()}." in found.sentences


def test_explain_tells_that_nobody_paid(settings: Settings, resources: Resources) -> None:
    spend(settings, USER, "premium_voice", 12)
    found = explain(resources, USER, "e1")
    assert (found.state, found.parts, found.before, found.plan) == (
        EventState.UNCOLLECTED,
        parts(0, 0, 0, 0, 12),
        None,
        None,
    )
    assert "No account was open for user-42" in found.sentences[1]


def test_explain_finds_dead_letters_of_the_event(settings: Settings, resources: Resources, redis: Redis) -> None:
    give_account(settings, USER)
    for user_id, event_id in ((USER, "e1"), (USER, "e11"), ("somebody", "e1")):
        event = {"user_id": user_id, "event_id": event_id, "meter": "credits", "quantity": -1}
        redis.xadd(partition_of(settings, user_id).entries, {"v": "1", "e": json.dumps(event)})
        drain(settings, user_id)
    found = explain(resources, USER, "e1")
    assert (found.state, found.amount) == (EventState.DEAD_LETTER, None)
    assert [(letter.reason, letter.state) for letter in found.refusals] == [("bad_quantity", "open")]
    assert "as bad_quantity (quantity" in found.sentences[0]


def test_balances_of_explain_do_not_depend_on_roll_ups(
    settings: Settings, resources: Resources, postgres: Postgres
) -> None:
    random, expected = Random(3), {}
    give_account(settings, USER, "free", buckets={"premium_voice": (4_000, 300, 50), "ocr_tokens": (0, -5, 0)})
    for number in range(30):
        meter = random.choice(["premium_voice", "ocr_tokens"])
        if random.random() < 0.2:
            credits.grant(resources, USER, meter, 200, f"order-{number}")
        before = accounts.show(resources, USER).balances[meter]
        expected[f"e{number}"] = BucketUnits(used=before.used, rollover=before.rollover, purchased=before.purchased)
        spend(settings, USER, meter, random.randrange(900), f"e{number}")
    for _ in range(8):
        assert {event_id: explain(resources, USER, event_id).before for event_id in expected} == expected
        ledger_reports.roll_up(postgres, USER, 6)
    assert len(rows(settings, "SELECT DISTINCT seq FROM balance_checkpoint")) > 4


CHECKS: list[tuple[dict[str, Any], str]] = [
    (
        {"allowed": True, "reason": Reason.WITHIN_LIMIT, "limit": 5_000, "used": 4_000, "available": 1_010,
         "rollover": 20, "pending": 10},
        "Allowed: 100 of premium_voice fits into the 1,010 available. Of the limit 5,000 there are 1,000 left; "
        "rollover 20, purchased 0, pending 10.",
    ),
    (
        {"allowed": False, "reason": Reason.LIMIT_EXCEEDED, "limit": 50, "used": 70, "available": 3, "purchased": 3},
        "Denied: 100 of premium_voice does not fit into the 3 available. Of the limit 50 there are 0 left; "
        "rollover 0, purchased 3, pending 0.",
    ),
    ({"allowed": True, "reason": Reason.UNLIMITED}, "Allowed: 100 of premium_voice, usage is unlimited."),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "sentence"), CHECKS)
def test_a_check_is_explained_with_its_numbers(fields: dict[str, Any], sentence: str) -> None:
    answer = CheckAnswer(user_id=USER, meter="premium_voice", requested=100, **fields)
    assert explain_check(answer) == sentence


@pytest.mark.parametrize("reason", Reason)
@pytest.mark.parametrize("limit", [None, 7])
def test_every_reason_of_a_check_has_a_sentence(reason: Reason, limit: int | None) -> None:
    for allowed in (True, False):
        answer = CheckAnswer(
            user_id=USER, meter="m", requested=1, allowed=allowed, reason=reason, limit=limit, available=limit
        )
        assert explain_check(answer).startswith("Allowed" if allowed else "Denied")


# ---------------------------------------------------------------------------------------------------------------------
# Who rolls up, and when


def marked(redis: Redis, settings: Settings, user_id: str = USER) -> set[str]:
    found = cast("set[bytes]", redis.smembers(partition_of(settings, user_id).unrolled))
    return {name.decode() for name in found}


def test_a_drain_marks_an_account_each_time_enough_changes_came(settings: Settings, redis: Redis) -> None:
    settings = settings.model_copy(update={"rollup_after_rows": 10})
    give_account(settings, USER, "plus")  # 4 ledger entries
    for number, expected in enumerate([False] * 5 + [True] + [False] * 9 + [True]):
        spend(settings, USER, "premium_voice", 1, f"e{number}")
        assert bool(marked(redis, settings)) is expected, f"after {number + 5} changes"
        redis.delete(partition_of(settings, USER).unrolled)
    spend(settings, USER, "premium_voice", 1, "e15")  # a duplicate
    assert not marked(redis, settings)


@pytest.fixture
def job_tools(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Resources]:
    """The resources that jobs find in this process."""
    with worker_resources(settings) as opened:
        monkeypatch.setattr(jobs, "resources", lambda: opened)
        yield opened


def test_the_job_rolls_marked_accounts_up_and_forgets_them(
    settings: Settings, postgres: Postgres, redis: Redis, job_tools: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "ROLL_UP_ROWS", 4)
    logs = [Log(settings, postgres, user_id) for user_id in ("user-1", "user-2", "user-3")]
    for log in logs:
        for _ in range(7):
            log.use()
        redis.sadd(keys.Partition(0).unrolled, log.user_id)
    redis.sadd(keys.Partition(0).unrolled, "nobody")
    jobs.roll_up(0)
    assert redis.exists(keys.Partition(0).unrolled) == 0
    query = "SELECT user_id, seq FROM rollup_state WHERE seq > 0 ORDER BY 1"
    assert rows(settings, query) == [(log.user_id, 11) for log in logs]


def test_the_job_ends_after_one_step_when_a_drain_waits(
    settings: Settings, postgres: Postgres, redis: Redis, job_tools: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "ROLL_UP_ROWS", 4)
    log = Log(settings, postgres)
    for _ in range(7):
        log.use()
    partition = partition_of(settings, USER)
    redis.sadd(partition.unrolled, USER)
    redis.set(partition.rung, "1")
    jobs.roll_up(partition.number)
    assert rows(settings, "SELECT seq FROM rollup_state") == [(4,)]
    assert marked(redis, settings) == {USER}


def test_an_account_in_use_elsewhere_keeps_its_mark(
    settings: Settings, postgres: Postgres, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings.model_copy(update={"lock_timeout_ms": 50})
    log = Log(settings, postgres)
    log.use()
    log.roll_up()
    log.use()
    redis.sadd(keys.Partition(0).unrolled, USER)
    postgres.execute("SELECT 1 FROM rollup_state FOR UPDATE")
    with worker_resources(settings) as resources:
        monkeypatch.setattr(jobs, "resources", lambda: resources)
        with pytest.raises(psycopg.errors.LockNotAvailable):
            jobs.roll_up(0)
        assert redis.smembers(keys.Partition(0).unrolled) == {USER.encode()}
        postgres.rollback()
        jobs.roll_up(0)
    assert rows(settings, "SELECT seq FROM rollup_state") == [(6,)]


def test_a_report_that_meets_a_long_tail_asks_for_a_roll_up(
    settings: Settings, postgres: Postgres, redis: Redis
) -> None:
    log = Log(settings, postgres)
    with worker_resources(settings.model_copy(update={"rollup_after_rows": 3})) as resources:
        for ask in (reports_usage.breakdown, reports_usage.engagement):
            log.use()
            assert ledger_reports.tail_length(postgres, USER) == 5
            ask(resources, USER)
            assert not marked(redis, settings)
            log.use()
            ask(resources, USER)
            assert marked(redis, settings) == {USER}
            redis.delete(partition_of(settings, USER).unrolled)
            log.roll_up(2)


def test_the_sweep_lets_a_backlog_go_first(settings: Settings, redis: Redis) -> None:
    settings = settings.model_copy(update={"read_chunk_events": 3})
    supervisor = Supervisor(settings, {})
    redis.sadd(keys.Partition(5).unrolled, USER)
    for entry, expected in enumerate([1, 1, 1, 0]):
        redis.xadd(keys.Partition(2).entries, {"v": "1", "e": str(entry)})
        supervisor.sweep.run()
        queue = jobs.job_queue(settings, redis)
        assert [job_id[:9] for job_id in queue.job_ids if job_id.startswith("roll")] == ["roll_up-5"] * expected
        redis.delete(queue.key)


def test_a_worker_rolls_up_what_it_has_drained(settings: Settings, resources: Resources) -> None:
    accounts.open_new(resources, USER, "plus")
    with Billing.connect(settings) as billing:
        for _ in range(30):
            billing.emit(USER, "premium_voice", 1, dimensions={"voice_slug": "narrator"})
    with dyno(settings, METERFALL_ROLLUP_AFTER_ROWS="10", METERFALL_SWEEP_INTERVAL_MS="50"):
        query = "SELECT sum(events) FROM usage_rollup"
        wait_until(
            lambda: rows(settings, query) > [(20,)] if rows(settings, query) != [(None,)] else False, "rolled up"
        )
    assert reports_usage.engagement(resources, USER).syntheses == 30


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def test_indexes_serve_every_report(database_url: str, redis_url: str) -> None:
    with worker_resources(settings_for(database_url, redis_url)) as resources:
        benchmark.build(resources, rows=60_000, account_rows=6_000)
        figures, plans = benchmark.measure(resources, rows=60_000, runs=1)
        assert (
            reports_usage.engagement(resources, "books").syntheses
            + reports_usage.engagement(resources, "letters").syntheses
            > 0
        )
    log = ("usage_log_pkey", "usage_log_user_id_seq_key")
    for figure in figures:
        assert "WHOLE usage_log" not in figure.indexes, plans[f"{figure.report} of {figure.account}"]
        assert figure.report == "summary" or any(name in figure.indexes for name in log)
    of = {figure.report: figure.indexes for figure in figures}
    assert "document_rollup_pkey" in of["breakdown"]
    assert "document_lifetime_pkey" in of["engagement"]
    assert "balance_checkpoint_pkey" in of["explain"]
