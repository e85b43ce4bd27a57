"""The runbook, followed to the letter: servers are brought into each of its troubles, its very commands are run, and
the books are proved.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import psycopg
import pytest

from benchmarks import oracle
from config.settings import PREFIX, Settings, variable_name
from schemas.answers import CheckAnswer
from schemas.events import UsageEvent
from tests.console import ROOT, Shell, blocks_of, sections_of
from tests.faults.house import METER, PLAN, RECOVERY_SECONDS, SLOW_SECONDS, House, open_house
from tests.faults.standby import standby_of
from tests.support import give_account, partition_of, rows, wait_until
from worker import dead_letters, keys, ledger, pauses
from worker.client import Billing
from worker.servers import Server, find_postgres, postgres_server
from worker.status import read_status
from worker.tools import Tools

RUNBOOK = sections_of((ROOT / "docs/runbook.md").read_text(encoding="utf-8"))


class Operator:
    """Somebody with the runbook and a shell."""

    def __init__(self, house: House) -> None:
        self.folder = house.folder / "operator"
        self.folder.mkdir()
        (self.folder / "config").symlink_to(ROOT / "config")
        programs = Path(house.postgres.command[0]).parent
        environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        environ |= {variable_name(name): str(getattr(house.settings, name)) for name in house.settings.model_fields_set}
        self.shell = Shell(self.folder, environ | {"PATH": f"{programs}:{environ['PATH']}"})
        self._left: list[str] = []

    @contextmanager
    def procedure(self, heading: str) -> Iterator[None]:
        """The runbook lies open there for the length of the block, in which all its commands must be run."""
        self._left = [block.text for block in blocks_of(RUNBOOK[heading]) if block.language == "console"]
        yield
        assert self._left == []

    def follow(self) -> None:
        """Run the next block of the procedure; what it shows must be printed."""
        assert self.shell.run(self._left.pop(0)) == []

    def skip(self) -> None:
        """Pass over the next block of the procedure, which says that it is for another case."""
        self._left.pop(0)

    def keep(self, name: str, events: Iterable[UsageEvent]) -> None:
        """Write a file of events that services have kept."""
        lines = (event.model_dump_json(exclude_none=True) for event in events)
        (self.folder / name).write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def operator(house: House) -> Operator:
    return Operator(house)


def prove(house: House, settings: Settings) -> None:
    """Ask the oracle about the servers of `settings`."""
    with closing(Tools.open(settings)) as tools:
        oracle.prove(tools, house.accepted)


def test_every_procedure_is_tested() -> None:
    tested = re.findall(r'procedure\("([^"]+)"\)', Path(__file__).read_text(encoding="utf-8"))
    assert {heading for heading, text in RUNBOOK.items() if "```console" in text} == set(tested)


# ---------------------------------------------------------------------------------------------------------------------
# Postgres


def test_a_backup_is_restored_and_what_came_after_it_is_sent_again(house: House, operator: Operator) -> None:
    user = house.users[0]
    with house.dyno():
        before = house.emit(40)
        house.wait_until_drained()
        with operator.procedure("Back up the ledger"):
            operator.follow()
        after = house.emit(24)
        house.wait_until_drained()
    shown = house.billing.check(user, METER)
    house.emit(8)
    restored = house.settings_with(database_url=house.postgres.url.replace("/meterfall?", "/restored?"))
    operator.shell.export({"RESTORED_URL": restored.database_url})
    operator.keep("sent-since-the-backup.jsonl", [*before[-8:], *after])
    with operator.procedure("Restore a backup"), database_dropped(house, "restored"):
        operator.follow()
        assert rows(restored, "SELECT count(*) FROM usage_log") == [(len(before),)]
        operator.follow()
        with Billing.connect(restored) as billing:
            older = billing.check(user, METER)
        assert buckets(older) != buckets(shown), "what was cached is not believed"
        with house.dyno(settings=restored):
            operator.follow()
            house.wait_until_drained()
            operator.follow()
        prove(house, restored)


def buckets(answer: CheckAnswer) -> tuple[int, int, int]:
    return answer.used, answer.rollover, answer.purchased


@contextmanager
def database_dropped(house: House, name: str) -> Iterator[None]:
    """Drop a database after the block, which makes it."""
    try:
        yield
    finally:
        with psycopg.connect(house.postgres.url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def primary() -> Iterator[Server]:
    """A Postgres that the test may lose for good."""
    with postgres_server(find_postgres(os.environ)) as server:
        ledger.migrate(server.url)
        yield server


@pytest.mark.parametrize("synchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_standby_is_promoted_and_dynos_find_it_by_themselves(
    primary: Server, durable_redis: Server, tmp_path: Path, synchronous: bool
) -> None:
    with open_house(primary, durable_redis, tmp_path) as house, standby_of(primary, synchronous=synchronous) as standby:
        operator = Operator(house)
        both = f"postgresql://meterfall@/meterfall?host={primary.folder},{standby.folder}&port=5432,5432"
        settings = house.settings_with(database_url=f"{both}&target_session_attrs=read-write")
        operator.shell.export({"DATABASE_URL": settings.database_url, "STANDBY_URL": standby.url})
        with operator.procedure("Postgres fails over"), house.dyno(settings=settings):
            house.emit(24)
            house.wait_until_drained()
            if synchronous:
                operator.follow()
            else:
                operator.skip()
                standby.freeze()
            lately = house.emit(40)
            wait_until(lambda: bool(house.redis.exists(*map(keys.hand, (0, 1)))) or not house.backlog(), "it works")
            if not synchronous:
                house.wait_until_drained()
            primary.kill()
            standby.thaw()
            house.emit(8)
            operator.follow()
            if synchronous:
                operator.skip()
                house.wait_until_drained(RECOVERY_SECONDS)
            else:
                operator.keep("sent-lately.jsonl", lately)
                operator.follow()
                house.wait_until_drained()
            operator.follow()
        prove(house, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Redis


def test_a_redis_without_its_data_is_filled_again(house: House, operator: Operator, tmp_path: Path) -> None:
    operator.shell.export({variable_name("spool_path"): tmp_path / "spool"})
    with house.dyno():
        applied = house.emit(40)
        house.billing.reserve(house.users[0], METER, 5, "job-1")
        house.wait_until_drained()
    lost = house.emit(24)
    house.redis.flushall()
    operator.keep("sent-lately.jsonl", [*applied[-8:], *lost])
    with operator.procedure("Redis lost its data"), house.dyno():
        operator.follow()
        operator.follow()
        house.wait_until_drained()
        operator.follow()
    house.prove()


# ---------------------------------------------------------------------------------------------------------------------
# Streams


@pytest.fixture
def worker_settings(house: House) -> Iterator[Settings]:
    """The settings of dynos that log in as a worker, with the rights of config/postgres-roles.sql."""
    assert house.settings.database_url is not None
    with psycopg.connect(house.settings.database_url, autocommit=True) as owner:
        owner.execute((ROOT / "config/postgres-roles.sql").read_text(encoding="utf-8").encode())
        owner.execute("CREATE ROLE billing_worker LOGIN IN ROLE meterfall_worker")
        yield house.settings_with(database_url=house.settings.database_url.replace("meterfall@", "billing_worker@"))
        owner.execute("DROP ROLE billing_worker")


def test_a_stuck_partition_goes_on_once_the_cause_is_gone(
    house: House, operator: Operator, worker_settings: Settings
) -> None:
    assert house.settings.database_url is not None
    with operator.procedure("A partition is stuck"), closing(psycopg.connect(house.settings.database_url)) as stranger:
        with house.dyno(settings=worker_settings):
            stranger.execute("REVOKE INSERT ON usage_log FROM meterfall_worker")
            stranger.commit()
            house.emit(24)
            wait_until(lambda: "42501" in said_to_halt(house), "it is halted", SLOW_SECONDS)
            operator.follow()
            house.wait_until_drained(RECOVERY_SECONDS)
            stranger.execute("SELECT 1 FROM account FOR UPDATE")
            house.emit(24)
            wait_until(lambda: "attempt 2 failed" in said_in(house), "workers cannot get at it", SLOW_SECONDS)
            operator.shell.export({"PID": stranger.info.backend_pid})
            operator.follow()
            house.wait_until_drained()
        house.emit(24)
        operator.follow()
        assert house.backlog() == 0
    house.prove()


def said_to_halt(house: House) -> str:
    return " ".join(partition.halted for partition in read_status(house.tools).partitions)


def said_in(house: House) -> str:
    return "".join(log.read_text(errors="replace") for log in house.folder.glob("*.log"))


def test_a_paused_partition_is_resumed_and_its_dead_letters_worked_through(house: House, operator: Operator) -> None:
    (partition,) = {partition_of(house.settings, user) for user in house.users[:1]}
    catalogue = (ROOT / "config/catalogue.toml").read_text(encoding="utf-8")
    newer = house.folder / "catalogue.toml"
    newer.write_text(catalogue.replace("[meters.", '[meters.brand_new]\nunit = "unit"\nspill = true\n\n[meters.', 1))
    new = [UsageEvent(event_id=f"n{n}", user_id=house.users[0], meter="brand_new", quantity=1) for n in range(4)]
    pausing = house.settings_with(pause_min_entries=20)
    with operator.procedure("A partition is paused"), house.dyno(settings=pausing):
        for event in new:
            entry = {"v": "1", "e": event.model_dump_json(exclude_none=True)}
            house.redis.xadd(keys.stream(partition), entry)  # type: ignore[arg-type]
        for _ in range(30):
            house.redis.xadd(keys.stream(partition), {"v": "1", "e": "{}"})
        wait_until(lambda: is_paused(house, partition), "it is paused", SLOW_SECONDS)
        house.emit(16)
        operator.shell.export({"PARTITION": partition})
        operator.follow()
        operator.follow()
        house.wait_until_drained()
    with operator.procedure("Work through the dead letters"):
        letter = dead_letters.listed(house.tools, reason="unknown_meter")[0]
        operator.shell.export({"LETTER": letter.id})
        operator.follow()
        with house.dyno(settings=house.settings_with(catalogue_path=newer)):
            operator.follow()
            house.accept(new)
            house.wait_until_drained()
        operator.follow()
    house.prove()


def is_paused(house: House, partition: int) -> bool:
    pause = pauses.latest(house.tools).get(partition)
    return pause is not None and pause.resumed_at is None


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
        for user in (late, misled):  # by a producer that did not hear of it
            event = UsageEvent(event_id="late", user_id=user, meter=METER, quantity=1)
            entry = {"v": "1", "e": event.model_dump_json(exclude_none=True)}
            house.redis.xadd(keys.stream(partition_of(house.settings, user)), entry)  # type: ignore[arg-type]
            house.accept([event])
        with house.dyno(settings=fewer):
            wait_until(lambda: bool(dead_letters.listed(house.tools)), "the misled event is refused", SLOW_SECONDS)
            operator.follow()
            wait_until(lambda: house.recorded() == len(house.accepted.events), "all of it is billed", SLOW_SECONDS)
            with Billing.connect(fewer) as billing:
                assert billing.check(late, METER).used == 1
    prove(house, fewer)


def user_in(settings: Settings, partitions: range, other: Settings) -> str:
    """A user whose events are in one of these partitions, and in another one under other settings."""
    names = (f"user-{number}" for number in range(100, 1_000))
    return next(
        name
        for name in names
        if partition_of(settings, name) in partitions and partition_of(settings, name) != partition_of(other, name)
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
    op.execute("ALTER TABLE usage_log ADD CHECK (region IS NOT NULL) NOT VALID")


def downgrade() -> None:
    op.execute("ALTER TABLE usage_log DROP CONSTRAINT usage_log_region_check")
"""


def make_release(folder: Path, *migrations: str) -> Path:
    """A next release in a folder: our code, further migrations, and a log that says where an event came from."""
    for package in ("worker", "config", "schemas"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    source = folder / "worker/ledger.py"
    text = source.read_text(encoding="utf-8")
    columns = "    hold_key: str | None\n    dimensions: str | None\n"
    assert text.count(columns) == 1
    source.write_text(text.replace(columns, f'{columns}    region: str = "eu"\n'), encoding="utf-8")
    versions = folder / "worker/migrations/versions"
    newest = max(path.name[1:5] for path in versions.glob("m*.py"))
    for number, migration in enumerate(migrations, start=1):
        (versions / f"m090{number}_region.py").write_text(migration.replace("{before}", newest), encoding="utf-8")
    return folder


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
                    house.emit(40)
                    new = stack.enter_context(house.dyno(release=release))
                    house.emit(40)
                    old.send_signal(signal.SIGTERM)
                    assert old.wait(house.settings.stop_timeout_seconds) == 0
                    house.emit(40)
                    house.wait_until_drained()
                    operator.follow()
                    old = new
        regions = rows(house.settings, "SELECT DISTINCT region FROM usage_log")
        assert set(regions) == {(None,), ("eu",)}, "old and new workers have worked"
        assert dead_letters.listed(house.tools) == []
        house.prove()
    finally:
        operator.shell.run(f"$ meterfall migrate {max(path.name[1:5] for path in MIGRATIONS.glob('m*.py'))}\n")


MIGRATIONS = ROOT / "worker/migrations/versions"
