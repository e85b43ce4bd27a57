"""The runbook to the letter: tests bring servers into each trouble, run its commands, and prove the books."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from config.settings import Settings, variable_name
from schemas.answers import CheckAnswer
from schemas.events import Scalar, UsageEvent
from tests.faults.house import METER, PARTITIONS, PLAN, RECOVERY_SECONDS, SLOW_SECONDS, House, open_house
from tests.faults.operators import (
    ROLES,
    RUNBOOK,
    Operator,
    as_login,
    make_logins,
    put_roles_in_force,
    redis_users,
    settings_of,
)
from tests.faults.standby import standby_of
from tests.support import oracle
from tests.support.catalogues import NEW_METER, newer_catalogue
from tests.support.ledger import give_account, rows
from tests.support.paths import ROOT
from tests.support.resources import worker_resources
from tests.support.streams import account_of, is_paused, partition_of
from tests.support.waiting import wait_until
from worker.admin import credits, dead_letters, erasure
from worker.client import Billing
from worker.demo.servers import Server, find_postgres, find_redis, postgres_server, redis_server
from worker.errors import HoldClosed
from worker.keyspace import calls, scripts
from worker.keyspace.connection import redis_now_ms
from worker.ledger.migrate import migrate
from worker.reports.proof_result import keep_result
from worker.reports.proof_run import prove_ledger
from worker.reports.status import read_status
from worker.resources import Resources


@pytest.fixture
def operator(house: House) -> Iterator[Operator]:
    put_roles_in_force(house.postgres.url)
    with redis_users(house):
        yield Operator(house)
    with psycopg.connect(house.postgres.url, autocommit=True) as owner:
        for role in ROLES:
            owner.execute(f"DROP ROLE login_{role}")


def prove(house: House, settings: Settings) -> None:
    """Prove the books on the servers of `settings` by the oracle."""
    with closing(Resources.open(settings)) as resources:
        oracle.prove(resources, house.accepted)


def test_every_procedure_is_tested() -> None:
    tested = re.findall(r'procedure\("([^"]+)"\)', Path(__file__).read_text(encoding="utf-8"))
    assert {heading for heading, text in RUNBOOK.items() if "```console" in text} == set(tested)


# ---------------------------------------------------------------------------------------------------------------------
# Catalogues


def test_a_new_catalogue_is_put_in_force_while_services_use_it_already(
    house: House, operator: Operator, tmp_path: Path
) -> None:
    path, newer = newer_catalogue(tmp_path)
    operator.shell.export({"CATALOGUE": path})
    as_worker = settings_of("worker", house.settings)
    # The role of a service reads the catalogue in force, and announces the one that it carries.
    as_producer = settings_of("producer", house.settings).model_copy(update={"catalogue_path": path})
    with house.dyno(settings=as_worker) as dyno, Billing.connect(as_producer) as producer:
        house.emit(8)
        sent = [
            UsageEvent(event_id=f"new-{n}", user_id=user, meter=NEW_METER, quantity=1, multiplier="1")
            for n, user in enumerate(house.users)
        ]
        assert producer.check(house.users[0], NEW_METER).available == 0
        house.send(sent, producer)
        wait_until(lambda: "wait for a catalogue" in house.log_of(dyno), "they wait", SLOW_SECONDS)
        with operator.procedure("Put a new catalogue in force"):
            operator.follow()
            said = operator.follow()
        assert newer.digest in said
        house.wait_until_drained(RECOVERY_SECONDS)
    with worker_resources(house.settings) as resources:
        resources.claim()
        oracle.prove(resources, house.accepted)


# ---------------------------------------------------------------------------------------------------------------------
# Postgres


@pytest.fixture
def new_server() -> Iterator[Server]:
    """A Postgres without our roles, with a login `billing` for the owner of the tables."""
    with postgres_server(find_postgres(os.environ)) as server:
        with psycopg.connect(server.url, autocommit=True) as admin:
            admin.execute("CREATE ROLE billing LOGIN CREATEROLE")
        yield server


def test_a_backup_is_restored_and_what_came_after_it_is_done_again(
    house: House, operator: Operator, new_server: Server
) -> None:
    user = house.users[0]
    give_account(house.settings, "erased", PLAN)
    with house.dyno():
        before = [*house.emit(40), settle(house, user, "job-1", 3)]
        house.wait_until_drained()
        with operator.procedure("Back up the ledger"):
            operator.follow()
        credits.grant(house.resources, user, METER, 1_000, "order-1")
        house.wait_until_drained()
        after = [*house.emit(24), settle(house, user, "job-2", 100)]
        house.wait_until_drained()
        erasure.close_account(house.resources, "erased")
    shown, late = house.billing.check(user, METER), cached_of(house, user)
    house.emit(8)
    operator.keep("sent-since-the-backup.jsonl", [*before[-8:], *after])
    restored = house.settings_with(database_url=new_server.url.replace("/meterfall?", "/restored?"))
    owner_url = as_login("billing", restored)
    operator.shell.export({"SERVER_URL": new_server.url, "RESTORED_URL": owner_url, "ERASED": "erased"})
    with operator.procedure("Restore a backup"):
        operator.follow()
        assert rows(restored, "SELECT count(*) FROM usage_log") == [(len(before),)]
        operator.use(restored, owner="billing")
        operator.follow()
        make_logins(new_server.url)
        operator.follow()
        with Billing.connect(restored) as billing:
            assert buckets(billing.check(user, METER)) == in_ledger(restored, user) != buckets(shown)
            publish(house, user, late)
            assert buckets(billing.check(user, METER)) == in_ledger(restored, user), "a late word of the old ledger"
        with worker_resources(restored) as resources:
            credits.grant(resources, user, METER, 1_000, "order-1")
        assert rows(restored, "SELECT count(*) FROM account WHERE user_id = 'erased'") == [(1,)]
        operator.follow()
        assert rows(restored, "SELECT count(*) FROM account WHERE user_id = 'erased'") == [(0,)]
        with house.dyno(settings=settings_of("worker", restored)):
            operator.follow()
            house.wait_until_drained()
            operator.follow()
        prove(house, restored)
        assert rows(restored, "SELECT count(*) FROM balance WHERE rollover < 0") == [(0,)], "nobody is in debt"


def settle(house: House, user_id: str, key: str, actual: int) -> UsageEvent:
    """Have a service hold, and settle `actual` units; return the event that it keeps."""
    facts: dict[str, Scalar] = {"model_slug": "m2"}
    house.billing.reserve(user_id, METER, actual, key)
    house.billing.settle(user_id, METER, key, actual, multiplier="1", dimensions=facts)
    event = UsageEvent(
        event_id=key, user_id=user_id, meter=METER, quantity=actual, multiplier="1", hold_key=key, dimensions=facts
    )
    house.accept([event])
    return event


def buckets(answer: CheckAnswer) -> tuple[int, int, int]:
    return answer.used, answer.rollover, answer.purchased


def in_ledger(settings: Settings, user_id: str) -> tuple[object, ...]:
    """Return used, rollover and purchased in Postgres."""
    query = "SELECT used, rollover, purchased FROM balance WHERE meter = %s AND user_id = %s"
    (found,) = rows(settings, query, METER, user_id)
    return found


def cached_of(house: House, user_id: str) -> str:
    """Return the cached balance of a user."""
    cached: Any = house.redis.get(account_of(house.settings, user_id).balance)
    return str(cached.decode())


def publish(house: House, user_id: str, balance: str) -> None:
    """Publish a balance, like a slow worker of the ledger before the restore."""
    account = account_of(house.settings, user_id)
    ends_ms = redis_now_ms(house.redis) + house.settings.cache_ttl_ms
    publication = calls.Publication(account.balance, account.lease, text=balance, ends_ms=ends_ms)
    scripts.run(house.redis, calls.publish(account.partition, 0, [], [publication]))


@pytest.fixture
def primary() -> Iterator[Server]:
    """A Postgres that the test may destroy."""
    with postgres_server(find_postgres(os.environ)) as server:
        migrate(server.url)
        yield server


@pytest.mark.slow
def test_a_synchronous_standby_is_promoted_and_dynos_find_it_by_themselves(
    primary: Server, durable_redis: Server, tmp_path: Path
) -> None:
    with failing_over(primary, durable_redis, tmp_path, synchronous=True) as (house, operator, _, settings):
        with operator.procedure("Postgres fails over"), house.dyno(settings=settings):
            house.emit(24)
            house.wait_until_drained()
            operator.follow()
            house.emit(40)
            wait_until(
                lambda: bool(house.redis.exists(*(partition.hand for partition in PARTITIONS))) or not house.backlog(),
                "it works",
            )
            primary.kill()
            house.emit(8)
            operator.follow()
            operator.skip()
            operator.skip()
            house.wait_until_drained(RECOVERY_SECONDS)
            operator.follow()
        prove(house, settings)


@pytest.mark.slow
def test_what_an_asynchronous_standby_had_not_heard_of_is_sent_again(
    primary: Server, durable_redis: Server, tmp_path: Path
) -> None:
    with failing_over(primary, durable_redis, tmp_path, synchronous=False) as (house, operator, standby, settings):
        user = house.users[0]
        with operator.procedure("Postgres fails over"):
            with house.dyno(settings=settings):
                house.emit(24)
                house.wait_until_drained()
                operator.skip()
                standby.kill()
                lately = [*house.emit(40), settle(house, user, "job-1", 3)]
                house.wait_until_drained()
                shown, late = house.billing.check(user, METER), cached_of(house, user)
                primary.kill()
                standby.start()
                house.emit(8)
                operator.follow()
            operator.follow()
            with Billing.connect(settings) as billing:
                assert buckets(billing.check(user, METER)) == in_ledger(settings, user) != buckets(shown)
                publish(house, user, late)
                assert buckets(billing.check(user, METER)) == in_ledger(settings, user), (
                    "a late word of the old primary"
                )
            operator.keep("sent-lately.jsonl", lately)
            with house.dyno(settings=settings):
                operator.follow()
                house.wait_until_drained()
            operator.follow()
        prove(house, settings)


@contextmanager
def failing_over(
    primary: Server, durable_redis: Server, folder: Path, *, synchronous: bool
) -> Iterator[tuple[House, Operator, Server, Settings]]:
    """A house, an operator, and settings that name both its Postgres and a standby."""
    with ExitStack() as stack:
        house = stack.enter_context(open_house(primary, durable_redis, folder))
        put_roles_in_force(primary.url)
        standby = stack.enter_context(standby_of(primary, synchronous=synchronous))
        stack.enter_context(redis_users(house))
        both = f"postgresql://meterfall@/meterfall?host={primary.folder},{standby.folder}&port=5432,5432"
        settings = house.settings_with(database_url=f"{both}&target_session_attrs=read-write")
        operator = Operator(house)
        operator.use(settings)
        operator.shell.export({"STANDBY_URL": standby.url})
        yield house, operator, standby, settings


# ---------------------------------------------------------------------------------------------------------------------
# Redis


@pytest.mark.slow
def test_a_redis_without_its_data_is_filled_again(house: House, operator: Operator, tmp_path: Path) -> None:
    away = house.settings_with(redis_url="unix:///nowhere/redis.sock", spool_path=tmp_path / "spool")
    operator.shell.export({variable_name("spool_path"): away.spool_path})
    with house.dyno():
        applied = house.emit(40)
        house.billing.reserve(house.users[0], METER, 5, "job-1")
        house.wait_until_drained()
    lost = house.emit(24)
    with house.sponsor() as sponsor:
        assert sponsor.decide(house.users[0], 5, "request-1").absorb == 5
        house.redis.flushall()
        with pytest.raises(HoldClosed):
            sponsor.settle_sponsored(house.users[0], "request-1", 5)
    house.billing.settle(house.users[0], METER, "job-1", 5)
    house.accept([UsageEvent(event_id="job-1", user_id=house.users[0], meter=METER, quantity=5)])
    operator.keep("sent-lately.jsonl", [*applied[-8:], *lost])
    with operator.procedure("Redis lost its data"), house.dyno():
        operator.follow()
        operator.follow()
        with Billing.connect(away) as billing:
            spooled = house.new_events(3)
            assert all(answer.spooled for answer in billing.emit_events(spooled))
            house.accept(spooled)
        operator.follow()
        house.wait_until_drained()
        operator.follow()
        assert read_status(house.resources).redis_losses
        operator.follow()
        assert read_status(house.resources).redis_losses == ()
    house.prove()


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def test_a_stuck_partition_goes_on_once_the_cause_is_gone(house: House, operator: Operator) -> None:
    url = str(house.settings.database_url)
    with ExitStack() as stack:
        stack.enter_context(operator.procedure("A partition is stuck"))
        owner = stack.enter_context(psycopg.connect(url, autocommit=True))
        owner.execute("CREATE ROLE login_watch LOGIN IN ROLE pg_monitor, pg_signal_backend")
        stack.callback(owner.execute, "DROP ROLE login_watch")
        operator.shell.login("admin", {"DATABASE_URL": as_login("login_watch", house.settings)})
        backup = stack.enter_context(closing(psycopg.connect(url)))
        backup.execute("LOCK TABLE account, balance, usage_log IN ACCESS SHARE MODE")
        with house.dyno(settings=settings_of("worker", house.settings)):
            owner.execute("REVOKE INSERT ON usage_log FROM meterfall_worker")
            house.emit(24)
            wait_until(lambda: "42501" in said_to_halt(house), "it is halted", SLOW_SECONDS)
            operator.follow()
            house.wait_until_drained(RECOVERY_SECONDS)
            stranger = stack.enter_context(closing(psycopg.connect(as_login("login_operator", house.settings))))
            stranger.execute("SELECT 1 FROM account FOR UPDATE")
            house.emit(24)
            wait_until(lambda: "attempt 2 failed" in said_in(house), "workers cannot get at it", SLOW_SECONDS)
            listed = [line.split("|")[0].strip() for line in operator.follow().splitlines()]
            pids = [pid for pid in listed if pid.isdigit()]
            assert pids[0] == str(stranger.info.backend_pid), "the longest first"
            assert str(backup.info.backend_pid) not in pids
            operator.shell.export({"PID": stranger.info.backend_pid})
            operator.follow()
            house.wait_until_drained()
        house.emit(24)
        operator.follow()
        assert house.backlog() == 0
    house.prove()


@pytest.mark.slow
def test_workers_that_wait_for_their_synchronous_standby_are_seen_to_do_so(
    primary: Server, durable_redis: Server, tmp_path: Path
) -> None:
    with failing_over(primary, durable_redis, tmp_path, synchronous=True) as (house, operator, standby, settings):
        waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        with operator.procedure("A partition is stuck"), house.dyno(settings=settings):
            standby.freeze()
            house.emit(24)
            wait_until(lambda: rows(settings, waiting) == [(True,)], "a COMMIT waits", SLOW_SECONDS)
            operator.skip()
            assert "| SyncRep |" in operator.follow()
            operator.skip()
            operator.skip()
            assert house.backlog() == 24
            standby.thaw()
            house.wait_until_drained()
        prove(house, settings)


def said_to_halt(house: House) -> str:
    return " ".join(partition.halted for partition in read_status(house.resources).partitions)


def said_in(house: House) -> str:
    return "".join(log.read_text(errors="replace") for log in house.folder.glob("*.log"))


@pytest.mark.slow
def test_a_paused_partition_is_resumed_and_its_dead_letters_worked_through(house: House, operator: Operator) -> None:
    (partition,) = {partition_of(house.settings, user) for user in house.users[:1]}
    catalogue = (ROOT / "config/catalogue.toml").read_text(encoding="utf-8")
    newer = house.folder / "catalogue.toml"
    newer.write_text(catalogue.replace("[meters.", '[meters.brand_new]\nunit = "unit"\nspill = true\n\n[meters.', 1))
    new = [UsageEvent(event_id=f"n{n}", user_id=house.users[0], meter="brand_new", quantity=1) for n in range(4)]
    aged = UsageEvent(
        event_id="aged", user_id=house.users[0], meter=METER, quantity=1, occurred_at=datetime.now(UTC) - timedelta(40)
    )
    pausing = house.settings_with(pause_min_entries=20)
    with operator.procedure("A partition is paused"), house.dyno(settings=pausing):
        for event in new:
            entry = {"v": "1", "e": event.model_dump_json(exclude_none=True)}
            house.redis.xadd(partition.entries, entry)  # type: ignore[arg-type]
        entry = {"v": "1", "e": aged.model_dump_json(exclude_none=True)}
        house.redis.xadd(partition.entries, entry)  # type: ignore[arg-type]
        for _ in range(30):
            house.redis.xadd(partition.entries, {"v": "1", "e": "{}"})
        wait_until(lambda: is_paused(house.resources, partition), "it is paused", SLOW_SECONDS)
        house.emit(16)
        operator.shell.export({"PARTITION": partition.number})
        operator.follow()
        operator.follow()
        house.wait_until_drained()
    with operator.procedure("Work through the dead letters"):
        letter = dead_letters.listed(house.resources, reason="unknown_meter")[0]
        # The shell has no terminal to ask on.
        operator.shell.export({"LETTER": letter.id, "METERFALL_CONFIRM_ITEMS": 50})
        operator.follow()
        with house.dyno(settings=house.settings_with(catalogue_path=newer, event_max_age_days=50)):
            operator.shell.run(f"operator$ meterfall catalogue apply {newer} --reason 'new meter' --yes\n")
            operator.follow()
            operator.shell.run("operator$ meterfall dead replay --reason too_old\n")
            house.accept([*new, aged])
            house.wait_until_drained()
        operator.follow()
    house.prove()


def test_a_changed_row_is_named_until_the_owner_lets_it_stand(house: House, operator: Operator) -> None:
    house.emit(24)
    house.drain()
    with closing(Resources.open(house.settings)) as resources:
        assert prove_ledger(resources).differences == []
        with psycopg.connect(str(house.settings.database_url), autocommit=True) as owner:
            owner.execute("ALTER TABLE usage_log DISABLE TRIGGER USER")
            changed = owner.execute(
                "UPDATE usage_log SET source = 'changed' WHERE (user_id, event_id) = "
                "(SELECT user_id, event_id FROM usage_log LIMIT 1) RETURNING user_id"
            ).fetchone()
            owner.execute("ALTER TABLE usage_log ENABLE TRIGGER USER")
        report = prove_ledger(resources, whole=True)
        keep_result(resources.redis, report, len(report.found))
    assert changed is not None
    with operator.procedure("A proof finds differences"):
        assert "the last proof found 1 difference" in operator.follow()
        operator.shell.export({"ACCOUNT": changed[0]})
        operator.follow()
        operator.follow()
        operator.follow()
    house.prove()


def test_the_queue_moves_to_a_redis_of_its_own_while_dynos_work(house: House, operator: Operator) -> None:
    with redis_server(find_redis(os.environ)) as server, Redis.from_url(server.url) as queue:
        moved = house.settings_with(queue_redis_url=server.url)
        with operator.procedure("Give the queue a Redis of its own"), house.dyno() as old:
            house.emit(16)
            with house.run("worker", "worker", "run", settings=moved):
                wait_until(lambda: any(queue.scan_iter("rq:worker:*")), "the new dyno is up", SLOW_SECONDS)
                house.emit(16)
                old.send_signal(signal.SIGTERM)
                assert old.wait(house.settings.stop_timeout_seconds) == 0
                house.emit(16)
                house.wait_until_drained()
                operator.shell.export({"METERFALL_QUEUE_REDIS_URL": server.url})
                operator.follow()
    house.prove()


@pytest.mark.slow
def test_the_number_of_partitions_is_changed_and_nothing_stays_behind(house: House, operator: Operator) -> None:
    fewer = house.settings_with(partitions=3)
    late = user_in(house.settings, range(7, 8), fewer)
    misled = user_in(house.settings, range(3), fewer)
    give_account(house.settings, late, PLAN)
    give_account(house.settings, misled, PLAN)
    house.emit(24)
    house.billing.reserve(house.users[0], METER, 5, "job-1")
    operator.shell.export({"USER_ID": house.users[0]})
    with operator.procedure("Change the number of partitions"):
        operator.follow()
        operator.follow()
        operator.follow()
        for user in (late, misled):  # by a producer with the old number
            event = UsageEvent(event_id="late", user_id=user, meter=METER, quantity=1)
            entry = {"v": "1", "e": event.model_dump_json(exclude_none=True)}
            house.redis.xadd(partition_of(house.settings, user).entries, entry)  # type: ignore[arg-type]
            house.accept([event])
        with house.dyno(settings=fewer):
            wait_until(lambda: bool(dead_letters.listed(house.resources)), "the misled event is refused", SLOW_SECONDS)
            operator.follow()
            wait_until(lambda: house.recorded() == len(house.accepted.events), "all of it is billed", SLOW_SECONDS)
            with Billing.connect(fewer) as billing:
                assert billing.check(late, METER).used == 1
    prove(house, fewer)


def user_in(settings: Settings, partitions: range, other: Settings) -> str:
    """Return a user with events in one of these partitions, and in another one under `other` settings."""
    names = (f"user-{number}" for number in range(100, 1_000))
    return next(
        name
        for name in names
        if partition_of(settings, name).number in partitions
        and partition_of(settings, name) != partition_of(other, name)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Releases

EXPAND = """
from alembic import op

revision, down_revision = "0901", "{before}"
branch_labels = depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE usage_log ADD COLUMN region text")
    op.execute("CREATE TABLE region (name text PRIMARY KEY)")


def downgrade() -> None:
    op.execute("DROP TABLE region")
    op.execute("ALTER TABLE usage_log DROP COLUMN region")
"""
CONTRACT = """
from alembic import op

revision, down_revision = "0902", "0901"
branch_labels = depends_on = None


def upgrade() -> None:
    op.execute("CREATE INDEX IF NOT EXISTS usage_log_region ON usage_log (region)")
    op.execute("ALTER TABLE usage_log ADD CHECK (region IS NOT NULL) NOT VALID")


def downgrade() -> None:
    op.execute("ALTER TABLE usage_log DROP CONSTRAINT usage_log_region_check")
"""


def make_release(folder: Path, *migrations: str) -> Path:
    """Make a next release in a folder: our code, further migrations, and a log with the region of an event."""
    for package in ("worker", "config", "schemas"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    source = folder / "worker/rules/rows.py"
    text = source.read_text(encoding="utf-8")
    field, value = "    dimensions: dict[str, Any] | None\n", "            event.dimensions,\n"
    assert text.count(field) == text.count(value) == 1
    text = text.replace(field, f'{field}    region: str = "eu"\n').replace(value, f'{value}            "eu",\n')
    source.write_text(text, encoding="utf-8")
    versions = folder / "worker/ledger/migrations/versions"
    newest = max(path.name[1:5] for path in versions.glob("m*.py"))
    for number, migration in enumerate(migrations, start=1):
        (versions / f"m090{number}_region.py").write_text(migration.replace("{before}", newest), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_releases_follow_each_other_under_load_while_their_migrations_come_in_two_steps(
    house: House, operator: Operator
) -> None:
    releases = [
        ROOT,
        make_release(house.folder / "first", EXPAND),
        make_release(house.folder / "second", EXPAND, CONTRACT),
    ]
    try:
        with ExitStack() as stack:
            old = stack.enter_context(house.dyno())
            for release in releases[1:]:
                operator.shell.use(release)
                with operator.procedure("Deploy a release with a migration"):
                    house.emit(40)
                    operator.follow()
                    operator.follow()
                    operator.follow()
                    house.emit(40)
                    new = stack.enter_context(house.dyno(release=release))
                    house.emit(40)
                    old.send_signal(signal.SIGTERM)
                    assert old.wait(house.settings.stop_timeout_seconds) == 0
                    house.emit(40)
                    house.wait_until_drained()
                    operator.follow()
                    old = new
        valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'usage_log_region'::regclass"
        assert rows(house.settings, valid) == [(True,)]
        regions = rows(house.settings, "SELECT DISTINCT region FROM usage_log")
        assert set(regions) == {(None,), ("eu",)}, "old and new workers have worked"
        assert dead_letters.listed(house.resources) == []
        house.prove()
    finally:
        operator.shell.run(f"owner$ meterfall migrate {max(path.name[1:5] for path in MIGRATIONS.glob('m*.py'))}\n")


MIGRATIONS = ROOT / "worker/ledger/migrations/versions"
