"""The schema: forward and back, in the order the code writes it, and refusing every wrong balance."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict

from tests.support.commands import Meterfall, assert_refused
from tests.support.ledger import give_account, rows, stop_clock
from tests.support.paths import ROOT
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain
from tests.support.waiting import wait_until
from worker.admin import accounts, corrections, credits, limits
from worker.client import Billing
from worker.consumer.renewals import renew_due
from worker.ledger import batch
from worker.ledger.columns import as_json, copy_rows
from worker.ledger.connection import LedgerError
from worker.ledger.migrate import Loss, losses, migrate
from worker.reports.limits import limits_of
from worker.reports.proof import verify_ledger
from worker.resources import Resources
from worker.rules.credits import grants_on
from worker.rules.grants import Grant
from worker.rules.rows import EntryRow, UsageRow

START = datetime(2026, 11, 1, tzinfo=UTC)
END = "2026-12-01T00:00:00+00:00"

TABLES = {
    "account", "api_key", "balance", "balance_checkpoint", "catalogue_version", "dead_letter", "document_lifetime",
    "document_rollup", "freed_pending", "late_repeat", "ledger", "ledger_entry", "ledger_hold",
    "notice", "notice_alarm", "notice_delivery", "notice_line", "order_key",
    "partition_pause", "proof_checkpoint", "proof_run", "redis_life", "report_state", "rollup_state", "sponsor_credit",
    "sponsor_grant", "sponsor_pool", "usage_daily", "usage_log", "usage_monthly", "usage_rollup",
    "webhook", "webhook_secret",
}  # fmt: skip


@pytest.fixture
def postgres(database_url: str) -> Iterator[psycopg.Connection]:
    """A connection to a ledger with one account, `user-1`, on one meter."""
    give_account(settings_for(database_url, "redis://unused"), "user-1", "tenant")
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


def fetched(url: str, query: str) -> list[tuple[object, ...]]:
    return rows(settings_for(url, "redis://unused"), query)


def schema_of(url: str) -> list[list[tuple[object, ...]]]:
    """Tables, columns, constraints, indexes, triggers and functions, as Postgres describes them."""
    return [
        fetched(url, query)
        for query in (
            # Their order, not their numbers: a column that was dropped leaves its number behind.
            "SELECT table_name, rank() OVER (PARTITION BY table_name ORDER BY ordinal_position), column_name, "
            "data_type, collation_name, is_nullable, column_default "
            "FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2",
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
            "WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2",
            "SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1, 2",
            "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1",
            "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1",
            "SELECT relname, reloptions FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1",
        )
    ]


def tables_of(url: str) -> set[object]:
    return {row[0] for row in fetched(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}


def columns_of(url: str, table: str) -> tuple[object, ...]:
    query = f"SELECT column_name FROM information_schema.columns WHERE table_name = '{table}' ORDER BY ordinal_position"
    return tuple(row[0] for row in fetched(url, query))


@pytest.fixture
def meterfall(command_server: subprocess.Popen[str], database_url: str) -> Meterfall:
    """The command on the test's database, and on no Redis."""
    return Meterfall(command_server, settings_for(database_url, "redis://127.0.0.1:1/0"))


# ---------------------------------------------------------------------------------------------------------------------
# Forward and back


def test_there_is_one_head_and_one_way_to_it() -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "worker/ledger/migrations"))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    assert len(scripts.get_heads()) == 1
    assert len(scripts.get_bases()) == 1
    revisions = [script.revision for script in scripts.walk_revisions()]
    assert revisions == sorted(revisions, reverse=True)
    assert all(revision.isdigit() for revision in revisions), "migrate tells forward from back by the number"


def test_back_to_nothing_and_forward_again_is_the_same_schema(database_url: str) -> None:
    before = schema_of(database_url)
    assert tables_of(database_url) == TABLES | {"meterfall_version"}
    for _ in range(2):
        migrate(database_url, "base")
        assert tables_of(database_url) == {"meterfall_version"}
        assert fetched(database_url, "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace") == []
        migrate(database_url, "head")
        assert schema_of(database_url) == before


def test_migrating_twice_changes_nothing(database_url: str) -> None:
    give_account(settings_for(database_url, "redis://unused"), "user-1", "tenant")
    before = [schema_of(database_url), fetched(database_url, "SELECT * FROM ledger, account, balance")]
    migrate(database_url)
    migrate(database_url, "head")
    assert [schema_of(database_url), fetched(database_url, "SELECT * FROM ledger, account, balance")] == before
    migrate(database_url, "base")
    migrate(database_url, "base")
    assert tables_of(database_url) == {"meterfall_version"}


def test_every_revision_can_be_named_in_both_directions(database_url: str) -> None:
    before = schema_of(database_url)
    migrate(database_url, "0001")
    ((version,),) = fetched(database_url, "SELECT version_num FROM meterfall_version")
    assert version == "0001"
    migrate(database_url, "head")
    assert schema_of(database_url) == before


def test_a_driver_or_an_old_name_in_the_url_is_no_obstacle(database_url: str) -> None:
    for scheme in ("postgres://", "postgresql+psycopg://"):
        migrate(database_url.replace("postgresql://", scheme))
    assert tables_of(database_url) == TABLES | {"meterfall_version"}


def test_the_command_migrates_forward_and_back(database_url: str, meterfall: Meterfall) -> None:
    name = str(conninfo_to_dict(database_url)["dbname"])
    assert meterfall("migrate", "base", "--destroy", name) == (0, "ledger is at base\n", "")
    assert tables_of(database_url) == {"meterfall_version"}
    for _ in range(2):
        assert meterfall("migrate") == (0, "ledger is at head\n", "")
        assert tables_of(database_url) == TABLES | {"meterfall_version"}


def test_a_step_back_that_drops_rows_wants_the_name_of_the_database(database_url: str, meterfall: Meterfall) -> None:
    give_account(settings_for(database_url, "redis://unused"), "user-1", "tenant")
    before = schema_of(database_url)
    name = str(conninfo_to_dict(database_url)["dbname"])
    assert_refused(meterfall("migrate", "base"), 2, "account 1,", "balance ", "ledger 1", f"--destroy {name}")
    assert_refused(meterfall("migrate", "base", "--destroy", "other"), 2, "'other'", name, "account 1,")
    assert schema_of(database_url) == before
    assert fetched(database_url, "SELECT count(*) FROM account") == [(1,)]
    # No row of the sponsorship pool, pause or late repeat: nothing to ask for on the way to 0008.
    assert meterfall("migrate", "0008") == (0, "ledger is at 0008\n", "")
    assert meterfall("migrate", "base", "--destroy", name) == (0, "ledger is at base\n", "")


def test_every_table_that_a_step_back_drops_is_counted(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.ledger.migrate._count", lambda _, table: Loss(table, 1, exact=True))
    assert {loss.table for loss in losses(database_url, "base").tables} == TABLES
    assert losses(database_url, "head").tables == []


def test_many_rows_are_an_estimate_and_said_so(database_url: str, meterfall: Meterfall) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("INSERT INTO late_repeat SELECT 'u', n::text, 1, now() FROM generate_series(1, 100001) AS n")
    assert_refused(meterfall("migrate", "0008"), 2, "late_repeat about 100,001")


def test_the_check_and_the_statements_change_nothing(database_url: str, meterfall: Meterfall) -> None:
    before = schema_of(database_url)
    code, out, err = meterfall("migrate", "--check")
    assert (code, err) == (0, "")
    assert meterfall("migrate", "0001", "--check").code == 1
    assert "DROP TABLE late_repeat" in meterfall.done("migrate", "0008", "--sql")
    assert "DROP TABLE usage_log" in meterfall.done("migrate", "base", "--sql")
    assert meterfall.done("migrate", "--sql") == ""
    assert schema_of(database_url) == before
    migrate(database_url, "0008")
    old = meterfall("migrate", "--check")
    assert (old.code, old.err) == (1, "")
    assert old.out.startswith("tables are 0008, wanted 00")
    printed = meterfall.done("migrate", "--sql")
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(printed)  # what is printed is what migrates
    assert schema_of(database_url) == before
    assert meterfall("migrate", "--check") == (0, out, "")


def test_the_command_refuses_a_revision_that_does_not_exist(database_url: str, meterfall: Meterfall) -> None:
    before = schema_of(database_url)
    for revision in ("0099", "newest"):
        assert_refused(meterfall("migrate", revision), 2, "revision", revision, "head")
    assert schema_of(database_url) == before


def test_workers_go_on_while_a_migration_waits_for_a_table_that_is_in_use(database_url: str) -> None:
    migrate(database_url, "0001")
    settings = settings_for(database_url, "redis://unused")
    with ThreadPoolExecutor() as threads, psycopg.connect(database_url) as backup:
        backup.execute("LOCK TABLE account IN ACCESS SHARE MODE")  # as pg_dump does, for as long as it takes
        done = threads.submit(migrate, database_url)
        wait_until(lambda: bool(rows(settings, WAITS_FOR_ACCOUNT)), "the migration waits")
        for _ in range(3):
            with psycopg.connect(database_url, options="-c lock_timeout=2000") as worker:
                worker.execute("SELECT 1 FROM account FOR UPDATE")
        assert not done.done()
        backup.rollback()
        done.result(timeout=30)
    assert tables_of(database_url) == TABLES | {"meterfall_version"}


def test_a_migration_leaves_the_tables_to_others_between_its_tries(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(database_url, "0001")
    pauses = []
    with psycopg.connect(database_url) as backup:
        backup.execute("LOCK TABLE account IN ACCESS SHARE MODE")

        def work(seconds: float) -> None:
            pauses.append(seconds)
            with psycopg.connect(database_url, options="-c lock_timeout=1") as worker:
                worker.execute("LOCK TABLE account, ledger IN ROW EXCLUSIVE MODE")
            backup.rollback()

        monkeypatch.setattr("worker.ledger.migrate.sleep", work)
        migrate(database_url, patience_seconds=5)
    assert pauses == [1.0], "longer than it holds them up"
    assert tables_of(database_url) == TABLES | {"meterfall_version"}


WAITS_FOR_ACCOUNT = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'account'::regclass"


def test_a_table_that_stays_in_use_is_named_and_a_repeat_goes_on(database_url: str) -> None:
    migrate(database_url, "0001")
    with psycopg.connect(database_url) as backup:
        backup.execute("LOCK TABLE account IN ACCESS SHARE MODE")
        with pytest.raises(LedgerError, match="in use for 1 s"):
            migrate(database_url, patience_seconds=1)
    migrate(database_url)
    assert tables_of(database_url) == TABLES | {"meterfall_version"}


MIGRATE_AT_A_SIGN = (
    "import sys; from worker.ledger.migrate import migrate; print(flush=True); input(); migrate(sys.argv[1])"
)


def test_several_dynos_may_migrate_at_once(database_url: str) -> None:
    migrate(database_url, "base")
    with psycopg.connect(database_url) as connection:
        connection.execute("DROP TABLE meterfall_version")
    dynos = [
        subprocess.Popen(
            [sys.executable, "-c", MIGRATE_AT_A_SIGN, database_url],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for dyno in dynos:
        assert dyno.stdout is not None
        assert dyno.stdout.readline() == "\n", "it did not come up"
    for dyno in dynos:
        assert dyno.stdin is not None
        dyno.stdin.write("\n")
        dyno.stdin.flush()
    assert [(dyno.communicate(timeout=60)[1][-300:], dyno.returncode) for dyno in dynos] == [("", 0)] * 3
    assert tables_of(database_url) == TABLES | {"meterfall_version"}


# ---------------------------------------------------------------------------------------------------------------------
# A ledger that is in use


def grant_as_before(postgres: psycopg.Connection, user_id: str, entry_key: str, kind: str, day: int) -> None:
    """Write an entry as a release without order_key does."""
    postgres.execute(
        "INSERT INTO ledger_entry SELECT user_id, 100 + %s, %s, 'credits', %s, 0, 0, 5, 0, 0, 5, '{}', %s FROM account "
        "WHERE user_id = %s",
        (day, entry_key, kind, START.replace(day=day), user_id),
    )


def test_orders_of_a_ledger_in_use_are_noted_the_first_stands(database_url: str) -> None:
    settings = settings_for(database_url, "redis://unused")
    for user in ("ann", "bob"):
        give_account(settings, user, "tenant")
    migrate(database_url, "0006")
    with psycopg.connect(database_url, autocommit=True) as postgres:
        grant_as_before(postgres, "bob", "grant:order-7", "grant", 3)
        grant_as_before(postgres, "ann", "grant:order-7", "grant", 4)
        grant_as_before(postgres, "ann", "grant:a:b", "grant", 5)
        grant_as_before(postgres, "ann", "renew:in_1", "renewal", 6)
    noted = [
        ("grant", "a:b", "ann", False), ("grant", "order-7", "bob", True), ("renew", "in_1", "ann", False),
    ]  # fmt: skip
    query = "SELECT kind, key, user_id, shared FROM order_key ORDER BY kind, key"
    for _ in range(2):  # forward, back and forward again
        migrate(database_url)
        assert fetched(database_url, query) == noted
        migrate(database_url, "0006")
    migrate(database_url)
    # A dyno of the former release works on beside the new ones.
    with psycopg.connect(database_url, autocommit=True) as postgres:
        grant_as_before(postgres, "ann", "grant:order-8", "grant", 7)
        grant_as_before(postgres, "bob", "grant:order-8", "grant", 8)
    assert fetched(database_url, query) == sorted([*noted, ("grant", "order-8", "ann", False)])


def test_accounts_in_a_new_status_go_back_to_the_nearest_and_stay_proved(database_url: str, redis_url: str) -> None:
    settings = settings_for(database_url, redis_url)
    nearest = {"suspended": "paused", "incomplete": "unpaid", "incomplete_expired": "expired", "past_due": "past_due"}
    for status in nearest:
        give_account(settings, status, "tenant", status)
    migrate(database_url, "0006")
    query = "SELECT user_id, status FROM account ORDER BY user_id"
    assert fetched(database_url, query) == sorted(nearest.items())
    migrate(database_url)
    assert fetched(database_url, query) == sorted(nearest.items())
    with worker_resources(settings) as resources:
        assert verify_ledger(resources).differences == []


def test_a_step_back_drops_api_keys_only_if_that_is_said(database_url: str, meterfall: Meterfall) -> None:
    name = str(conninfo_to_dict(database_url)["dbname"])
    meterfall.done("api-keys", "add", "tts", "--role", "producer")
    assert_refused(meterfall("migrate", "0026"), 2, "api_key 1", f"--destroy {name}")
    assert meterfall("migrate", "0026", "--destroy", name) == (0, "ledger is at 0026\n", "")
    for command in ("add tts --role producer", "list", "revoke tts --yes"):
        assert_refused(meterfall("api-keys", *command.split()), 2, "tables are 0026, this release wants")
    meterfall.done("migrate")
    assert meterfall.done("api-keys", "list", "--json") == []
    assert meterfall("migrate", "0026") == (0, "ledger is at 0026\n", "")


# ---------------------------------------------------------------------------------------------------------------------
# What the code writes


def test_rows_have_the_columns_in_the_order_of_the_tables(database_url: str) -> None:
    assert columns_of(database_url, "usage_log") == UsageRow._fields
    assert columns_of(database_url, "ledger_entry") == EntryRow._fields


def test_a_new_ledger_has_one_row_and_no_partitions_yet(postgres: psycopg.Connection) -> None:
    assert postgres.execute("SELECT epoch, partitions FROM ledger").fetchall() == [(1, None)]
    with pytest.raises(errors.UniqueViolation):
        postgres.execute("INSERT INTO ledger DEFAULT VALUES")
    with pytest.raises(errors.CheckViolation):
        postgres.execute("INSERT INTO ledger (only_row) VALUES (false)")
    for partitions in (0, 1_025):
        with pytest.raises(errors.CheckViolation):
            postgres.execute("UPDATE ledger SET partitions = %s", (partitions,))
    with pytest.raises(errors.CheckViolation):
        postgres.execute("UPDATE ledger SET epoch = 0")


def test_accounts_sort_by_bytes_whatever_the_language_of_the_database(postgres: psycopg.Connection) -> None:
    users = ["Zoe", "a.b", "a-b", "aB", "ab", "_x", "user-1"]
    for user in users[:-1]:
        postgres.execute(
            "INSERT INTO account (user_id, plan, status, opened_at) VALUES (%s, 'tenant', 'active', now())", (user,)
        )
    found = [row[0] for row in postgres.execute("SELECT user_id FROM account ORDER BY user_id").fetchall()]
    assert found == sorted(users)


# ---------------------------------------------------------------------------------------------------------------------
# What Postgres refuses

MOST = 9_000_000_000_000_000


REFUSED: list[tuple[str, type[psycopg.Error]]] = [
    ("UPDATE balance SET used = -1", errors.CheckViolation),
    (f"UPDATE balance SET used = {MOST + 1}", errors.CheckViolation),
    (f"UPDATE balance SET rollover = {-MOST - 1}", errors.CheckViolation),
    (f"UPDATE balance SET rollover = {MOST + 1}", errors.CheckViolation),
    ("UPDATE balance SET purchased = -1", errors.CheckViolation),
    (f"UPDATE balance SET purchased = {MOST + 1}", errors.CheckViolation),
    ("UPDATE balance SET lifetime_consumed = -1", errors.CheckViolation),
    ("UPDATE balance SET lifetime_granted = -1", errors.CheckViolation),
    ("UPDATE balance SET allowance = -1", errors.CheckViolation),
    ("UPDATE balance SET allowance = 1000000000001", errors.CheckViolation),
    ("UPDATE balance SET rollover_cap = -1", errors.CheckViolation),
    ("UPDATE balance SET period_index = -2", errors.CheckViolation),
    ("UPDATE balance SET period_end = period_start", errors.CheckViolation),
    ("UPDATE balance SET period_end = period_start - interval '1 second'", errors.CheckViolation),
    ("UPDATE balance SET cadence = 'hourly'", errors.CheckViolation),
    ("UPDATE balance SET anchor = 'loose'", errors.CheckViolation),
    ("UPDATE balance SET carried = -1", errors.CheckViolation),
    ("UPDATE balance SET carried = 1000000", errors.CheckViolation),
    ("UPDATE balance SET used = NULL", errors.NotNullViolation),
    ("UPDATE balance SET rollover = NULL", errors.NotNullViolation),
    ("UPDATE balance SET purchased = NULL", errors.NotNullViolation),
    ("UPDATE balance SET user_id = 'nobody'", errors.ForeignKeyViolation),
    ("INSERT INTO balance SELECT * FROM balance", errors.UniqueViolation),
    ("DELETE FROM account", errors.ForeignKeyViolation),
    ("UPDATE account SET status = 'gone'", errors.CheckViolation),
    ("UPDATE account SET trust = 'royal'", errors.CheckViolation),
    ("UPDATE account SET seq = -1", errors.CheckViolation),
    ("INSERT INTO account SELECT * FROM account", errors.UniqueViolation),
    ("INSERT INTO account (user_id, plan, status, opened_at) VALUES ('', 'free', 'active', now())",
     errors.CheckViolation),
    ("INSERT INTO account (user_id, plan, status, opened_at) VALUES (repeat('x', 129), 'free', 'active', now())",
     errors.CheckViolation),
    ("INSERT INTO ledger_entry SELECT * FROM ledger_entry", errors.UniqueViolation),
    ("INSERT INTO ledger_hold VALUES ('user-1', 'k', 'credits', -1, now())", errors.CheckViolation),
    ("INSERT INTO ledger_hold VALUES ('nobody', 'k', 'credits', 1, now())", errors.ForeignKeyViolation),
    ("INSERT INTO dead_letter (partition_id, entry_id, payload_hash, reason, detail, payload, payload_bytes, state)"
     " VALUES (0, '1-0', '', 'poison', '', '', 0, 'lost')", errors.CheckViolation),
]  # fmt: skip


def refusal_of(postgres: psycopg.Connection, statement: str) -> str:
    """Name of the error that Postgres answers with; empty, and without effect, when it accepts."""
    try:
        with postgres.transaction(force_rollback=True):
            postgres.execute(statement)
    except psycopg.Error as error:
        return type(error).__name__
    return ""


def test_postgres_refuses_every_wrong_balance(postgres: psycopg.Connection) -> None:
    wrong = [
        (statement, found)
        for statement, error in REFUSED
        if (found := refusal_of(postgres, statement)) != error.__name__
    ]
    assert wrong == []


def test_the_greatest_amounts_fit(postgres: psycopg.Connection) -> None:
    postgres.execute(
        "UPDATE balance SET used = %(most)s, rollover = -%(most)s, purchased = %(most)s, lifetime_consumed = %(most)s, "
        "allowance = 1000000000000, rollover_cap = 1000000000000",
        {"most": MOST},
    )
    assert postgres.execute("SELECT used, rollover, purchased FROM balance").fetchall() == [(MOST, -MOST, MOST)]


def usage_row(**changes: object) -> UsageRow:
    """A row of the usage log that Postgres accepts, unless `changes` spoil it."""
    row = UsageRow(
        user_id="user-1", event_id="e1", seq=2, meter="credits", quantity=10, multiplier="1", amount=10,
        from_subscription=4, from_rollover=3, from_purchased=2, overflow_to_debt=1, uncollected=0, period_start=START,
        occurred_at=START, applied_at=START, clamped=False, source=None, reference_id=None, hold_key=None,
        dimensions=None,
    )  # fmt: skip
    return row._replace(**changes)  # type: ignore[arg-type]


def append(postgres: psycopg.Connection, *added: UsageRow) -> None:
    with postgres.transaction(), postgres.cursor() as cursor:
        in_json = ("dimensions", "grants")
        rows = [row._asdict() | {name: as_json(getattr(row, name)) for name in in_json} for row in added]
        copy_rows(cursor, batch.COPY_DRAWN, [tuple(row.values()) for row in rows])


def test_a_row_of_usage_is_stored_as_it_was_written(postgres: psycopg.Connection) -> None:
    written = usage_row(source="tts", reference_id="r", hold_key="h", multiplier="1.5", amount=10, dimensions={"a": 1})
    written = written._replace(remainder=250_000, grants={"order-1": 2}, wallet="credits", price="0.002")
    append(postgres, written)
    stored = postgres.execute("SELECT * FROM usage_log").fetchall()
    assert [str(value) for value in stored[0][:12]] == [str(value) for value in written[:12]]
    assert stored[0][12:15] == (START,) * 3
    assert stored[0][15:] == (
        False,
        "tts",
        "r",
        "h",
        {"a": 1},
        250_000,
        None,
        {"order-1": 2},
        "credits",
        Decimal("0.002"),
    )


SPOILT: list[dict[str, object]] = [
    {"from_subscription": 5},
    {"from_rollover": 2},
    {"from_purchased": 0},
    {"overflow_to_debt": 0},
    {"uncollected": 1},
    {"amount": 9},
    {"from_subscription": 5, "from_rollover": -1, "from_purchased": 5},
    {"from_subscription": -1, "from_rollover": 8},
    {"from_purchased": -1, "from_rollover": 6},
    {"overflow_to_debt": -1, "from_rollover": 5},
    {"uncollected": -1, "from_rollover": 4},
    {"quantity": -1},
    {"quantity": 1_000_000_000_001},
    {"amount": 1_000_000_000_001, "from_subscription": 999_999_999_995},
    {"multiplier": "-1"},
    {"seq": None},
    {"period_start": None},
]


def test_usage_whose_parts_do_not_add_up_is_refused(postgres: psycopg.Connection) -> None:
    append(postgres, usage_row(event_id="good"))
    for changes in SPOILT:
        with pytest.raises(errors.CheckViolation):
            append(postgres, usage_row(**{"seq": 3, **changes}))
    assert postgres.execute("SELECT event_id FROM usage_log").fetchall() == [("good",)]


def test_an_identity_and_a_place_in_the_sequence_are_taken_once(postgres: psycopg.Connection) -> None:
    append(postgres, usage_row())
    for twin in (usage_row(seq=3), usage_row(event_id="e2"), usage_row(seq=3, meter="ocr_tokens", amount=10)):
        with pytest.raises(errors.UniqueViolation):
            append(postgres, usage_row(event_id="e9", seq=9), twin)
    append(postgres, usage_row(user_id="user-2"))
    assert postgres.execute("SELECT user_id, event_id FROM usage_log ORDER BY 1").fetchall() == [
        ("user-1", "e1"), ("user-2", "e1"),
    ]  # fmt: skip


def test_uncollected_usage_needs_no_account_and_no_sequence(postgres: psycopg.Connection) -> None:
    nobody = usage_row(
        user_id="nobody", seq=None, period_start=None, uncollected=10,
        from_subscription=0, from_rollover=0, from_purchased=0, overflow_to_debt=0,
    )  # fmt: skip
    append(postgres, nobody, nobody._replace(event_id="e2"))
    assert postgres.execute("SELECT count(*) FROM usage_log WHERE seq IS NULL").fetchone() == (2,)


def test_an_idempotency_key_of_an_entry_is_taken_once_per_meter(postgres: psycopg.Connection) -> None:
    insert = (
        "INSERT INTO ledger_entry SELECT user_id, %s, 'grant:order-1', %s, 'grant', 0, 0, 5, 0, 0, 5, '{}', now() "
        "FROM account"
    )
    postgres.execute(insert, (11, "credits"))
    with pytest.raises(errors.UniqueViolation):
        postgres.execute(insert, (12, "credits"))
    with pytest.raises(errors.UniqueViolation):
        postgres.execute(insert, (11, "ocr_tokens"))
    postgres.execute(insert, (12, "ocr_tokens"))
    with pytest.raises(errors.ForeignKeyViolation):
        postgres.execute(
            "INSERT INTO ledger_entry VALUES ('nobody', 1, 'k', 'credits', 'grant', 0, 0, 5, 0, 0, 5, '{}', now())"
        )


def test_one_dead_letter_per_entry_and_payload(postgres: psycopg.Connection) -> None:
    insert = (
        "INSERT INTO dead_letter (partition_id, entry_id, payload_hash, reason, detail, payload, payload_bytes) "
        "VALUES (%s, '1-0', %s, 'not_json', '', '', 0)"
    )
    postgres.execute(insert, (0, b"a"))
    with pytest.raises(errors.UniqueViolation):
        postgres.execute(insert, (0, b"a"))
    postgres.execute(insert, (1, b"a"))
    postgres.execute(insert, (0, b"b"))
    assert postgres.execute("SELECT DISTINCT state FROM dead_letter").fetchall() == [("open",)]


def test_what_vouches_for_a_period_falls_where_a_worker_of_the_former_release_opens_the_next(
    postgres: psycopg.Connection,
) -> None:
    read = "SELECT backing, counted_from IS NULL FROM balance WHERE user_id = 'user-1'"
    mark = "UPDATE balance SET backing = 'missing', counted_from = now(), period_start = period_start"
    with postgres.transaction():
        postgres.execute(mark)
        postgres.execute("UPDATE balance SET used = used + 1")
    assert postgres.execute(read).fetchall() == [("missing", False)]
    postgres.execute("UPDATE balance SET period_start = period_start + interval '1 second', used = 0")
    assert postgres.execute(read).fetchall() == [(None, True)]


def test_units_of_before_grants_stay_and_grants_that_are_forgotten_stay_proved(
    database_url: str, redis_url: str
) -> None:
    settings = settings_for(database_url, redis_url)
    give_account(settings, "ann", "basic", buckets={"premium_voice": (100_000, 0, 40)})
    migrate(database_url, "0022")
    purchased = "SELECT purchased FROM balance WHERE user_id = 'ann' AND meter = 'premium_voice'"
    assert fetched(database_url, purchased) == [(40,)]
    migrate(database_url)
    with worker_resources(settings) as resources:
        ends = datetime.now(UTC) + timedelta(days=9)
        credits.grant(resources, "ann", "premium_voice", 10, "gift-0", category="promotional", expires_at=ends)
        assert [(part.key, part.left) for part in grants_of(resources)] == [("gift-0", 10), ("", 40)]
        assert verify_ledger(resources).differences == []
        migrate(database_url, "0022")
        assert fetched(database_url, purchased) == [(50,)]
        assert fetched(database_url, "SELECT kind, purchased_after FROM ledger_entry ORDER BY seq DESC LIMIT 1") == [
            ("merge_grants", 50)
        ]
        migrate(database_url)
        assert [(part.key, part.left) for part in grants_of(resources)] == [("", 50)]
        assert verify_ledger(resources).differences == []


def test_a_step_back_is_refused_after_the_first_event_that_drew_on_a_wallet(database_url: str, redis_url: str) -> None:
    settings = settings_for(database_url, redis_url)
    give_account(settings, "ann", "studio")
    migrate(database_url, "0023")
    assert "wallet" not in columns_of(database_url, "usage_log")
    migrate(database_url)
    assert columns_of(database_url, "usage_log") == UsageRow._fields
    with Billing.connect(settings) as billing:
        billing.emit("ann", "credits", 1)
        drain(settings, "ann")
        migrate(database_url, "0023")
        migrate(database_url)
        billing.emit("ann", "premium_voice", 1)
        drain(settings, "ann")
    with pytest.raises(LedgerError, match=r"usage_log has events that drew on a wallet"):
        migrate(database_url, "0023")
    assert fetched(database_url, "SELECT wallet, price FROM usage_log WHERE wallet IS NOT NULL") == [
        ("credits", Decimal(3))
    ]


def test_a_step_back_that_would_lose_credit_to_come_or_revive_what_has_ended_is_refused(
    database_url: str, redis_url: str
) -> None:
    settings = settings_for(database_url, redis_url)
    give_account(settings, "ann", "basic", buckets={"premium_voice": (100_000, 0, 40)})
    stop_clock(settings, datetime(2088, 3, 1, tzinfo=UTC))
    with worker_resources(settings) as resources:
        starts = datetime(2088, 3, 2, tzinfo=UTC)
        credits.grant(resources, "ann", "premium_voice", 10, "later", effective_at=starts)
        credits.grant(resources, "ann", "premium_voice", 7, "gift", expires_at=starts)
        with pytest.raises(
            LedgerError, match=r"lose credit to come of 1 balances, the first of ann; undo these grants"
        ):
            migrate(database_url, "0022")
        migrate(database_url)  # the steps before the refused one were made
        corrections.undo(resources, "ann", "grant:later")
        stop_clock(settings, starts)
        with pytest.raises(
            LedgerError, match=r"credit of 1 balances has ended, .* the first of ann; let the job renew"
        ):
            migrate(database_url, "0022")
        assert "grants" in columns_of(database_url, "balance"), "nothing was done"
        migrate(database_url)
        drain(settings, "ann")
        assert renew_due(resources).entries == 1
        migrate(database_url, "0022")
        assert fetched(database_url, "SELECT purchased FROM balance WHERE meter = 'premium_voice'") == [(40,)]
        migrate(database_url)
        assert verify_ledger(resources).differences == []


def test_a_step_back_from_grants_lets_a_worker_finish_first(database_url: str, redis_url: str) -> None:
    settings = settings_for(database_url, redis_url)
    give_account(settings, "ann", "basic", buckets={"premium_voice": (100_000, 0, 40)})
    with worker_resources(settings) as resources:
        ends = datetime.now(UTC) + timedelta(days=9)
        credits.grant(resources, "ann", "premium_voice", 10, "gift", expires_at=ends)
    with ThreadPoolExecutor() as threads, psycopg.connect(database_url) as worker:
        worker.execute("SELECT 1 FROM account FOR UPDATE")
        worker.execute("UPDATE account SET seq = seq + 1")
        done = threads.submit(migrate, database_url, "0022")
        wait_until(lambda: bool(rows(settings, "SELECT 1 FROM pg_locks WHERE NOT granted")), "the migration waits")
        worker.commit()
        done.result(timeout=30)
    merged = "SELECT account.seq - entry.seq FROM ledger_entry AS entry JOIN account USING (user_id) WHERE kind = %s"
    assert rows(settings, merged, "merge_grants") == [(0,)], "the worker's number is not used again"


def test_balances_are_read_while_grants_wait_for_a_query_of_the_log(database_url: str, redis_url: str) -> None:
    settings = settings_for(database_url, redis_url)
    migrate(database_url, "0022")
    with ThreadPoolExecutor() as threads, psycopg.connect(database_url) as report:
        report.execute("LOCK TABLE usage_log IN ACCESS SHARE MODE")
        done = threads.submit(migrate, database_url)
        waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'usage_log'::regclass"
        wait_until(lambda: bool(rows(settings, waits)), "the migration waits")
        held = "SELECT mode FROM pg_locks WHERE relation = 'balance'::regclass AND mode = 'AccessExclusiveLock'"
        assert rows(settings, held) == []
        report.rollback()
        done.result(timeout=30)
    assert tables_of(database_url) == TABLES | {"meterfall_version"}


def test_limits_that_are_forgotten_stay_proved(database_url: str, redis_url: str) -> None:
    settings = settings_for(database_url, redis_url)
    give_account(settings, "ann", "basic")
    with worker_resources(settings) as resources:
        limits.set_limit(resources, "ann", "premium_voice", "day", 500)
        limits.set_limit(resources, "ann", "ocr_tokens", "week", 900, of="user")
        limits.set_pay_from(resources, "ann", "allowance")
        drain(settings, "ann")
        assert verify_ledger(resources).differences == []
        migrate(database_url, "0023")
        assert "limits" not in columns_of(database_url, "balance")
        told = "SELECT meter, detail->>'before' IS NULL FROM ledger_entry WHERE kind = 'forget_limits' ORDER BY seq"
        assert fetched(database_url, told) == [("ocr_tokens", False), ("premium_voice", False), ("", False)]
        migrate(database_url)
        assert limits_of(resources, "ann").limits == ()
        assert limits_of(resources, "ann").pay_from is None
        assert verify_ledger(resources).differences == []
        limits.set_limit(resources, "ann", "premium_voice", "day", 700)
        assert verify_ledger(resources).differences == []


def grants_of(resources: Resources) -> tuple[Grant, ...]:
    """The grants in force of `ann`."""
    return grants_on(accounts.show(resources, "ann").balances["premium_voice"]).in_force
