"""The roles in config/redis.acl and config/postgres-roles.sql: each does its whole job, and nothing else.

Both files are put in force on servers of this module's own: every Redis and Postgres that is found.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, ResponseError
from rq.intermediate_queue import IntermediateQueue

from config.settings import Settings
from schemas.answers import HoldState
from schemas.codes import Role
from tests.support.commands import Meterfall, assert_refused
from tests.support.ledger import empty_ledger, move_clock, rows
from tests.support.paths import ROOT
from tests.support.processes import dyno
from tests.support.resources import settings_for, worker_resources
from tests.support.serving import serving
from tests.support.waiting import wait_until
from worker.admin import accounts, api_keys, credits
from worker.admin import partitions as admin_partitions
from worker.admin.erasure import close_account
from worker.admin.partitions import resume
from worker.client import Billing
from worker.consumer import jobs
from worker.consumer.drain import Report, drain_stream
from worker.consumer.worker_process import make_worker
from worker.demo.servers import Server, postgres_binaries, postgres_server, redis_binaries, redis_server
from worker.errors import RedisUnavailable
from worker.keyspace import keys, scripts
from worker.ledger.migrate import migrate
from worker.reports.finding import find
from worker.reports.metrics import read_figures
from worker.reports.overviews import open_overviews
from worker.reports.proof import verify_ledger
from worker.reports.status import read_status
from worker.rules.spans import Span

ACL = (ROOT / "config" / "redis.acl").read_text(encoding="utf-8")
SQL = (ROOT / "config" / "postgres-roles.sql").read_text(encoding="utf-8")

USER, METER = "user-42", "premium_voice"
# Every binary once: the shorter list goes on with its last.
_POSTGRES, _REDIS = list(postgres_binaries(os.environ)), list(redis_binaries(os.environ))
PAIRS = [(postgres or _POSTGRES[-1], redis or _REDIS[-1]) for postgres, redis in zip_longest(_POSTGRES, _REDIS)]


@dataclass
class Guarded:
    """Servers with the roles in force. `administer` is Redis without any restriction."""

    postgres: Server
    redis: Server
    administer: Redis

    def settings(self, role: str, **overrides: object) -> Settings:
        """Settings of a process that logs in as `role` at both servers."""
        database_url = self.postgres.url.replace("meterfall@", f"login_{role}@")
        redis_url = self.redis.url.replace("unix://", f"unix://{role.partition('_')[0]}:{_password(role)}@")
        return settings_for(database_url, redis_url, **overrides)

    def owner(self) -> Settings:
        """Settings of who owns the tables and administers Redis."""
        return settings_for(self.postgres.url, self.redis.url.replace("unix://", "unix://admin@"))

    def refused(self) -> list[str]:
        """What Redis has refused since it was asked last: role, kind, and command or key."""
        found: Any = self.administer.execute_command("ACL LOG")
        self.administer.execute_command("ACL LOG", "RESET")
        return [f"{entry['username']}: {entry['reason']} {entry['object']}" for entry in found]


def _password(role: str) -> str:
    return f"{role.partition('_')[0]}-password"


def _with_passwords(text: str) -> str:
    """The file as an operator completes it."""
    return re.sub(r"<(\w+)-password-sha256>", lambda found: sha256(_password(found[1]).encode()).hexdigest(), text)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0].label}, {pair[1].label}")
def _servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    postgres_binary, redis_binary = request.param
    users = "user admin on nopass ~* &* +@all\n" + _with_passwords(ACL)
    # Both ways in which a server may be given the file: in its configuration, or as its list of users.
    option = "include" if "Redis" in redis_binary.label else "aclfile"
    if option == "aclfile":
        users = "".join(line for line in users.splitlines(keepends=True) if line.startswith("user "))
    file = tmp_path_factory.mktemp("roles") / "redis.acl"
    file.write_text(users, encoding="utf-8")
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_server(postgres_binary))
        redis = stack.enter_context(
            redis_server(redis_binary, options={option: str(file), "enable-debug-command": "yes"})
        )
        migrate(postgres.url)
        with psycopg.connect(postgres.url, autocommit=True) as owner:
            for _ in range(2):  # repeating is harmless
                owner.execute(SQL)
            for role in ("producer", "worker", "operator", "monitor"):
                owner.execute(f"CREATE ROLE login_{role} LOGIN IN ROLE meterfall_{role}")
            owner.execute("CREATE ROLE login_producer_tiers LOGIN IN ROLE meterfall_producer, meterfall_tiers")
            owner.execute("CREATE ROLE login_keys LOGIN IN ROLE meterfall_keys")
            owner.execute(
                "CREATE ROLE login_service LOGIN IN ROLE meterfall_producer, meterfall_tiers, meterfall_operator, "
                "meterfall_service"
            )
        administer = stack.enter_context(Redis.from_url(redis.url.replace("unix://", "unix://admin@")))
        yield Guarded(postgres, redis, administer)


@pytest.fixture
def guarded(_servers: Guarded) -> Guarded:
    """The servers with the roles in force, empty but for one account."""
    _servers.administer.flushall()
    _servers.refused()
    empty_ledger(_servers.postgres.url)
    with worker_resources(_servers.settings("operator")) as resources:
        resources.claim()
        accounts.open_new(resources, USER, "basic")
        accounts.set_trust(resources, USER, "trusted")
    return _servers


def drain_all(guarded: Guarded) -> None:
    """Empty all streams in this process, logged in as worker."""
    with worker_resources(guarded.settings("worker")) as resources:
        for partition in keys.streams(resources.settings.partitions):
            drain_stream(resources, partition)


# ---------------------------------------------------------------------------------------------------------------------
# What each role can do


def test_a_producer_does_its_whole_job(guarded: Guarded) -> None:
    settings = guarded.settings("producer", default_plan="basic")
    with Billing.connect(settings) as billing:
        assert billing.check(USER, METER, 10).allowed
        assert billing.check("never-seen", METER, 10).allowed
        with billing.reserve(USER, METER, 100, key="document") as hold:
            hold.capture("page-1", 40)
            hold.capture("page-2", 60)
            assert hold.extend(ttl_seconds=604_800, amount=150).left == 50
            hold.settle(50)
        billing.reserve(USER, METER, 5, key="given-back").release()
        billing.charge(USER, METER, 7, "charged")
        billing.emit(USER, METER, 3, event_id="emitted")
        raw = {"event_id": "raw", "user_id": USER, "meter": METER, "quantity": 2}
        billing.redis.xadd(keys.partition_of(USER, 8).entries, {"v": "1", "e": json.dumps(raw)})
        assert billing.remaining("install-1").remaining == 0
        assert not billing.plan_backend("install-1", "gemini_first", has_hardware=False).allowed
        assert (
            billing.decide(USER, 100, "settled").absorb
            == billing.settle_sponsored(USER, "settled", 100).absorbed
            == 100
        )
        assert billing.confirm_partial(USER, 100, "released", paid=60).absorb == 40
        billing.release_sponsored(USER, "released", "no work")
        billing.credit_pool("paid", 100)
        assert billing.estimate(USER, METER, 10).sponsorship.absorb == 10
        # A balance that is not cached is read from the ledger, with the events that it contains.
        guarded.administer.delete(keys.account_of(USER, 8).balance)
        assert billing.check(USER, METER, 10).pending == 160
        # A charge that Redis has forgotten is looked up in the ledger before it is denied.
        account = keys.account_of(USER, 8)
        billing.charge(USER, METER, 60_000, "large")
        drain_all(guarded)
        guarded.administer.delete(account.charge("large"))
        assert billing.charge(USER, METER, 60_000, "large").repeated
    assert guarded.refused() == []


def test_a_producer_holds_in_the_ledger_while_redis_is_down(guarded: Guarded) -> None:
    away = guarded.settings("producer").model_copy(update={"redis_url": "unix:///nowhere/redis.sock"})
    with Billing.connect(away) as billing:
        assert billing.check(USER, METER, 10).allowed
        assert billing.reserve(USER, METER, 10, key="kept-by-the-ledger").answer.state is HoldState.HELD
    with Billing.connect(guarded.settings("producer")) as billing:
        assert billing.check(USER, METER, 10).pending == 10
    assert rows(guarded.owner(), "SELECT count(*) FROM ledger_hold") == [(0,)]


def test_a_producer_takes_tiers_only_with_the_role_for_it(guarded: Guarded) -> None:
    with Billing.connect(guarded.settings("producer_tiers")) as billing:
        for tier, limit in (("core", 500), ("pro", 5_000)):  # opens the account, then changes its plan
            assert billing.remaining("install-1", tier=tier).limit == limit
            drain_all(guarded)  # a change of plan waits for older entries
    assert guarded.refused() == []
    with Billing.connect(guarded.settings("producer")) as billing, pytest.raises(Exception, match="permission denied"):
        billing.remaining("install-1", tier="core")
    assert rows(guarded.owner(), "SELECT plan FROM account WHERE user_id = 'install-1'") == [("pro",)]


def test_a_worker_does_its_whole_job(guarded: Guarded) -> None:
    owner = guarded.owner()
    with Billing.connect(guarded.settings("producer")) as billing:
        for number in range(30):
            billing.emit(USER, METER, 1, event_id=f"e{number}")
            billing.emit(f"new-{number % 5}", "credits", 1, event_id=f"e{number}")
        billing.reserve(USER, METER, 10, key="expires", ttl_seconds=1)
        billing.reserve(USER, METER, 10, key="closed-by-an-event")
        for event in ({"event_id": "raw", "meter": METER, "hold_key": "closed-by-an-event"}, {"meter": "nonsense"}):
            payload = json.dumps({"user_id": USER, "quantity": 1, **event})
            billing.redis.xadd(keys.partition_of(USER, 8).entries, {"v": "1", "e": payload})
        for entry in (
            {"k": "grant", "user": USER, "request": "r1", "held": 5, "actual": 5, "paid": 0, "absorbed": 5,
             "window": 0, "tier": "new", "budget": 50, "late": 0},
            {"k": "credit", "request": "r2", "paid": 100},
        ):  # fmt: skip
            billing.redis.xadd(keys.SPONSORSHIP.entries, {"v": "1", **entry})  # type: ignore[dict-item]
    with worker_resources(guarded.settings("operator")) as resources:
        accounts.open_new(resources, "due", "pro")
    quickly = {f"METERFALL_{job}_INTERVAL_SECONDS": "1" for job in ("RENEW", "VERIFY")}
    opening = {
        "METERFALL_DEFAULT_PLAN": "tenant",
        "METERFALL_ROLLUP_AFTER_ROWS": "5",
        "METERFALL_OUTCOME_TTL_SECONDS": "1",
    }
    with dyno(guarded.settings("worker"), **quickly, **opening) as process:
        expected = {"usage_log": 61, "dead_letter": 1, "sponsor_grant": 1, "sponsor_credit": 1, "rollup_state": 6}
        for table, count in expected.items():
            query = f"SELECT count(*) FROM {table}"
            wait_until(lambda: rows(owner, query) == [(count,)], f"{count} rows in {table}", 20)  # noqa: B023
        with Billing.connect(guarded.settings("producer")) as billing:

            def is_noted() -> bool:
                billing.emit(USER, METER, 1, event_id="e0")
                return rows(owner, "SELECT count(*) FROM late_repeat WHERE times > 1") == [(1,)]

            wait_until(is_noted, "late repeats are noted", 20)
        expiries = keys.partition_of(USER, 8).expiries
        wait_until(lambda: not guarded.administer.exists(expiries), "the hold has expired", 20)
        move_clock(owner, timedelta(days=40))
        query = "SELECT count(*) FROM ledger_entry WHERE kind = 'refill' AND user_id = 'due'"
        wait_until(lambda: rows(owner, query) == [(1,)], "what is due is stored", 20)
        with worker_resources(owner) as resources:
            guarded.administer.delete(keys.VERIFIED)
            guarded.administer.delete(keys.PROVED)
            wait_until(lambda: bool(guarded.administer.exists(keys.VERIFIED)), "a proof is due")
            wait_until(lambda: bool(guarded.administer.exists(keys.PROVED)), "it is proved", 20)
            wait_until(lambda: read_status(resources).waiting_jobs == 0, "no job waits")
            assert verify_ledger(resources).differences == []
        process.terminate()
        _, output = process.communicate(timeout=25)
    assert guarded.refused() == []
    assert "changes, clean" in output
    # The clock was moved, and the streams with it: a dyno that looks after them meanwhile says that they are ahead.
    assert re.findall(".*(?:WARNING|ERROR|Warning|Traceback).*", output) == re.findall(
        ".* (?:1 refused: 1 missing_|[0-9]+ events came again |the stream began anew after ).*", output
    )


def test_a_worker_pauses_a_partition_and_an_operator_resumes_it(guarded: Guarded) -> None:
    stream = keys.Partition(0).entries
    with worker_resources(guarded.settings("operator")) as operator:
        for _ in range(2):
            operator.redis.xadd(stream, {"v": "1", "e": "nonsense"})
        with worker_resources(guarded.settings("worker").model_copy(update={"pause_min_entries": 2})) as worker:
            assert drain_stream(worker, keys.Partition(0)) == Report(0, more=False)
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                resume(worker, keys.Partition(0), "nobody")
            assert resume(operator, keys.Partition(0), "jane") is not None
            assert drain_stream(worker, keys.Partition(0)).entries == 2
            admin_partitions.pause(operator, keys.Partition(0), "jane", "look at it first")
            assert read_status(operator).partitions[0].paused == "by jane: look at it first"
    assert guarded.refused() == []


def test_a_worker_clears_up_what_a_dead_one_left_in_the_queue(guarded: Guarded) -> None:
    settings = guarded.settings("worker")
    worker = make_worker(jobs.job_queue(settings, jobs.rq_connection(settings)))
    (queue,) = worker.queues
    waiting = IntermediateQueue(queue.key, connection=worker.connection)
    jobs.enqueue(queue, "drain", keys.Partition(0))
    taken = worker.dequeue_job_and_maintain_ttl(1)
    assert taken is not None
    # Its worker died as soon as it had taken it …
    waiting.cleanup(worker, queue)
    guarded.administer.set(waiting.get_first_seen_key(taken[0].id), time.time() - 120)
    waiting.cleanup(worker, queue)
    assert (waiting.get_job_ids(), queue.failed_job_registry.get_job_ids()) == ([], [taken[0].id])
    # … or while it worked on it.
    jobs.enqueue(queue, "drain", keys.Partition(1))
    taken = worker.dequeue_job_and_maintain_ttl(1)
    assert taken is not None
    worker.prepare_execution(taken[0])
    worker.prepare_job_execution(taken[0], remove_from_intermediate_queue=True)
    queue.started_job_registry.cleanup(time.time() + 10**6)
    assert len(queue.failed_job_registry.get_job_ids()) == 2
    worker.run_maintenance_tasks()  # type: ignore[no-untyped-call]
    queue.failed_job_registry.cleanup(time.time() + 10**6)
    assert guarded.refused() == []


def test_a_burst_under_a_role_that_may_not_work_ends_and_says_so(guarded: Guarded) -> None:
    with dyno(guarded.settings("operator"), "--burst") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "`meterfall worker run` needs the role meterfall_worker" in errors.splitlines()[-1]


def test_an_operator_does_its_whole_job(guarded: Guarded, command_server: subprocess.Popen[str]) -> None:
    meterfall = Meterfall(command_server, guarded.settings("operator"))
    with Billing.connect(guarded.settings("producer")) as billing:
        billing.reserve(USER, METER, 5, key="job-1")
        billing.emit(USER, METER, 10, event_id="e1", dimensions={"document_id": "d", "page_idx": 1})
        billing.redis.xadd(keys.partition_of(USER, 8).entries, {"v": "1", "e": json.dumps({"user_id": USER})})
        billing.redis.xadd(keys.partition_of(USER, 8).entries, {"v": "1", "e": json.dumps({"user_id": USER})})
    drain_all(guarded)
    guarded.administer.xadd(keys.Partition(9).entries, {"v": "1", "r": USER})
    first, second = (letter["id"] for letter in meterfall.done("dead", "list", "--json"))
    start, end = datetime.now(UTC).isoformat(), "2126-02-01T00:00:00Z"
    for command in (
        "partition move 9",
        f"holds list --user {USER}",
        f"holds show {USER} job-1",
        f"holds extend {USER} {METER} job-1 --ttl-seconds 86400 --amount 7",
        f"holds release {USER} {METER} job-1",
        "dead summary --by source",
        f"dead show {first}",
        f"dead replay {first}",
        f"dead drop {second}",
        "dead replay --reason missing_field",
        "account open u2 basic --status trialing",
        "account set-status u2 active",
        "account set-trust u2 trusted",
        "account change-plan u2 plus",
        "account set-status u2 past_due",
        f"account grant u2 {METER} 100 --key order-1",
        f"account clawback u2 {METER} 10 --key refund-1",
        f"account renew u2 in_1 {start} {end}",
        "account set-period u2 2126-01-31T00:00:00Z --key fix-1",
        "account seed u3 --plan tenant",
        "account grant u3 credits 5 --key order-2",
        "account open u4 tenant",
        "account carry-over u3 u4 --key trial",
        f"account clawback u2 {METER} --order order-1 --total-refunded 20",
        f"account adjust u2 {METER} --used 5 --key fix-1 --reason test",
        "account adjust u4 credits --rollover=-5 --key fix-2 --reason test",
        "account forgive-debt u4 credits --key gift-1",
        "account undo u2 adjust:fix-1",
        "account set-status u2 suspended",
        "account grant u5 credits 5 --key order-5 --open tenant",
        "account close u5 --yes --forfeit",
        "account reopen u5 tenant",
        f"account show {USER}",
        "account list",
        "account export",
        f"usage {USER} --breakdown",
        f"usage {USER} --engagement",
        f"usage {USER} --timeline",
        f"explain {USER} e1",
        f"reverse {USER} e1",
        "catalogue diff",
        "catalogue simulate config/catalogue.toml --since 2026-01-01T00:00:00Z",
        "pool status",
        "pool credit paid 100",
        "verify",
        "verify --full",
        "cache reset",
        "cache acknowledge --reason test",
    ):
        meterfall.done(*command.split())
    drain_all(guarded)
    with Billing.connect(guarded.settings("producer")) as billing:
        billing.emit(USER, METER, 10, event_id="e2", reference_id="personal")
    with psycopg.connect(guarded.postgres.url) as owner:
        owner.execute(
            "INSERT INTO sponsor_grant VALUES (sha256('r'), %s, 1, 0, 0, 0, 0, 0, 'new', 0, now(), false, now())",
            (USER,),
        )
    shown = meterfall("status", "--json").json
    assert [one["check"] for one in shown["findings"] if one["severity"] == "down"] == ["workers"]
    drain_all(guarded)
    meterfall.done("account", "close", USER, "--yes")
    assert rows(guarded.owner(), "SELECT count(*) FROM usage_log WHERE reference_id IS NOT NULL") == [(0,)]
    assert rows(guarded.owner(), "SELECT count(*) FROM sponsor_grant WHERE user_id = %s", USER) == [(0,)]
    assert rows(guarded.owner(), "SELECT count(*) FROM dead_letter WHERE payload <> ''") == [(0,)]
    assert guarded.refused() == []


def test_who_makes_keys_needs_the_role_for_it(guarded: Guarded, command_server: subprocess.Popen[str]) -> None:
    meterfall = Meterfall(command_server, guarded.settings("keys"))
    meterfall.done("api-keys", "add", "tts", "--role", "producer")
    meterfall.done("api-keys", "list", "--all")
    meterfall.done("api-keys", "revoke", "tts", "--yes")
    for role in ("operator", "producer", "service"):
        done = Meterfall(command_server, guarded.settings(role))("api-keys", "add", "tts", "--role", "operator")
        assert_refused(done, 2, "api_key", "`meterfall api-keys add` needs the role meterfall_keys")
    assert guarded.refused() == []


def test_the_service_does_what_producers_and_operators_do(guarded: Guarded) -> None:
    with worker_resources(guarded.settings("keys")) as resources:
        added = api_keys.add(resources, "desk", Role.SUPPORT, actor="jane")
    settings = guarded.settings("service", default_plan="basic")
    with worker_resources(settings) as resources, Billing.connect(settings) as billing:
        resources.claim()
        assert api_keys.Keyring(resources).authenticate(added.secret, datetime.now(UTC)).name == "desk"
        billing.reserve(USER, METER, 100, key="document").settle(50)
        billing.charge(USER, METER, 7, "charged")
        billing.emit(USER, METER, 3, event_id="emitted")
        assert billing.remaining("install-1", tier="core").limit == 500
        assert billing.decide(USER, 100, "settled").absorb == 100
        drain_all(guarded)
        granted = credits.grant(resources, USER, METER, 100, key="order-1", actor="desk")
        assert granted.account.balances[METER].purchased == 100
        assert find(resources, prefix=USER).total == 1
        assert read_status(resources).accounts == 2
        accounts.set_status(resources, USER, "suspended")
        close_account(resources, "install-1", forfeit=True)
        guarded.administer.delete(keys.account_of(USER, 8).balance)
        assert not billing.check(USER, METER, 10).allowed
    with Billing.connect(settings.model_copy(update={"redis_url": "unix:///nowhere/redis.sock"})) as billing:
        assert not billing.check(USER, METER, 10).allowed
    assert guarded.refused() == []


def test_the_http_service_runs_as_service(guarded: Guarded, tmp_path: Path) -> None:
    with worker_resources(guarded.settings("keys")) as resources:
        secret = api_keys.add(resources, "desk", Role.OPERATOR, actor="jane").secret
    who = {"user_id": USER, "meter": METER}
    with serving(guarded.settings("service"), tmp_path, keys=False) as served:
        for path, body in (
            ("check", who), ("estimate", {**who, "quantity": 7}), ("holds", {**who, "amount": 9, "key": "h-1"}),
            ("holds/settle", {**who, "actual": 7, "key": "h-1"}), ("charge", {**who, "amount": 7, "event_id": "c-1"}),
            ("events", [{"event_id": f"e-{number}", **who, "quantity": 1} for number in range(3)]),
            ("sponsorship/decide", {"user_id": USER, "estimate": 7, "request_id": "r-1"}),
            ("accounts/grant", {**who, "amount": 7, "key": "order-1"}),
        ):  # fmt: skip
            assert served.post(f"/v1/{path}", body, secret).status in {200, 202}, path
        drain_all(guarded)
        for path in ("usage", "timeline", "credits", "limits", "breakdown", "engagement", "balances", "notices"):
            assert served.get(f"/v1/{path}?user_id={USER}", secret).status == 200, path
        assert served.get(f"/v1/explain?user_id={USER}&event_id=c-1", secret).json["state"] == "applied"
        assert served.get("/ready").json["severity"] in {"ok", "degraded", "down"}
        assert 'meterfall_server_up{server="postgres"} 1.0' in served.get("/metrics").body.decode()
    assert guarded.refused() == []


def test_an_operator_checks_and_estimates(guarded: Guarded) -> None:
    with Billing.connect(guarded.settings("operator")) as billing:
        assert billing.check(USER, METER, 10).allowed
        assert billing.estimate(USER, METER, 10).sponsorship is not None
    assert guarded.refused() == []


def test_the_endpoint_of_a_dyno_reads_as_a_worker(guarded: Guarded) -> None:
    with worker_resources(guarded.settings("worker")) as resources:
        resources.claim()
        status, totals = read_figures(resources)
        assert (status.redis.error, status.postgres.error) == (None, None)
        assert totals is not None
    assert guarded.refused() == []


@pytest.mark.parametrize("role", ["producer", "operator", "service"])
def test_who_records_may_wait_for_replicas(guarded: Guarded, role: str) -> None:
    settings = guarded.settings(role, redis_wait_replicas=1, redis_wait_timeout_ms=10)
    with Billing.connect(settings) as billing, pytest.raises(RedisUnavailable, match="0 of 1 replicas"):
        billing.emit(USER, METER, 7)
    assert guarded.refused() == []


def test_a_redis_for_the_queue_alone_takes_the_same_file(guarded: Guarded, tmp_path: Path) -> None:
    file = tmp_path / "users.acl"
    lines = [line for line in _with_passwords(ACL).splitlines() if line.startswith("user ")]
    file.write_text("\n".join(["user admin on nopass ~* &* +@all", *lines, ""]), encoding="utf-8")
    with redis_server(_REDIS[0], options={"aclfile": str(file)}) as queue:
        urls = {
            role: queue.url.replace("unix://", f"unix://{role}:{_password(role)}@")
            for role in ("worker", "operator", "service", "monitor")
        }
        with Redis.from_url(queue.url.replace("unix://", "unix://admin@")) as administer:
            with (
                Billing.connect(guarded.settings("producer")) as billing,
                dyno(guarded.settings("worker"), METERFALL_QUEUE_REDIS_URL=urls["worker"]),
            ):
                billing.emit(USER, METER, 7)
                wait_until(lambda: any(administer.scan_iter("rq:worker:*")), "a worker process is there")
                wait_until(lambda: rows(guarded.owner(), "SELECT count(*) FROM usage_log") == [(1,)], "it is billed")
            for role in ("operator", "service", "monitor"):
                with worker_resources(guarded.settings(role, queue_redis_url=urls[role])) as resources:
                    status = read_status(resources)
                assert status.queue is not None
                assert status.queue.error is None
            assert administer.execute_command("ACL LOG") == []
        assert guarded.refused() == []


def test_a_monitor_reads_the_status_and_the_queue(guarded: Guarded) -> None:
    with worker_resources(guarded.settings("monitor")) as resources:
        resources.claim()
        assert read_status(resources).accounts == 1
        queue = jobs.job_queue(resources.settings, resources.redis)
        assert (queue.count, queue.job_ids) == (0, [])
        assert queue.failed_job_registry.get_job_ids(cleanup=False) == []
    assert guarded.refused() == []


def test_a_monitor_reports_sums_and_no_names(guarded: Guarded) -> None:
    """An operator reports on every account. The sums by account are not a monitor's."""
    span = Span(date(2026, 1, 1), date(2036, 1, 1))
    with Billing.connect(guarded.settings("producer")) as billing:
        billing.emit(USER, METER, 7)
    drain_all(guarded)
    with pytest.MonkeyPatch.context() as patch, worker_resources(guarded.settings("worker")) as resources:
        patch.setattr(jobs, "resources", lambda: resources)
        jobs.sum_up()
    for role in ("operator", "monitor"):
        with worker_resources(guarded.settings(role)) as resources:
            resources.claim()
            with open_overviews(resources) as overviews:
                assert [(row.plan, row.amount) for row in overviews.usage(span, ["plan", "day"])] == [("basic", 7)]
                assert list(overviews.purchased()) == []
                if role == "monitor":
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        list(overviews.usage(span, ["account"]))
                else:
                    assert [row.user_id for row in overviews.usage(span, ["account"])] == [USER]
                    assert [row.user_id for row in overviews.top(span)] == [USER]
                    assert [*overviews.near_limit(80), *overviews.debtors(), *overviews.uncollected()] == []
                    assert find(resources, prefix=USER).total == 1
    assert guarded.refused() == []


READ_BY_A_MONITOR = (
    "catalogue simulate config/catalogue.toml --since 2026-01-01T00:00:00Z",
    f"usage {USER}", f"explain {USER} e1", "account list", f"account show {USER}", f"account find --id {USER}",
    "report usage", "report near-limit", "report debtors", "report purchased --by account", "report uncollected",
    "status", "health",
)  # fmt: skip
REFUSED_TO_A_MONITOR = ("report top", "report usage --by account", "dead list", "account set-trust " + USER + " elite")


def test_a_monitor_reads_what_the_documents_say_and_nothing_is_refused_after_output(
    guarded: Guarded, command_server: subprocess.Popen[str]
) -> None:
    with Billing.connect(guarded.settings("producer")) as billing:
        billing.emit(USER, METER, 7, event_id="e1")
    drain_all(guarded)
    meterfall = Meterfall(command_server, guarded.settings("monitor"))
    wrong = []
    for command in READ_BY_A_MONITOR:
        done = meterfall(*command.split())
        if done.err or (done.code != 0 and command not in ("status", "health")):
            wrong.append(f"{command}: {done}")
    assert wrong == []
    for command in REFUSED_TO_A_MONITOR:
        for more in ([], ["--csv"], ["--json"]) if command.startswith("report") else ([],):
            done = meterfall(*command.split(), *more)
            named = command.split(" --")[0] if command.startswith("report") else command.split()[0]
            assert_refused(done, 2, named, "needs the role meterfall_operator")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = readme[readme.index("A monitor writes nothing.") :].split("\n\n")[0]
    assert all(f"`{word}`" in told for word in ("usage", "explain", "account show", "list", "find", "report"))
    assert all(f"`{command}`" in told for command in REFUSED_TO_A_MONITOR[:2])


def test_an_operator_erases_what_is_summed_up(guarded: Guarded) -> None:
    with Billing.connect(guarded.settings("producer")) as billing:
        billing.emit(USER, METER, 7)
    drain_all(guarded)
    with pytest.MonkeyPatch.context() as patch, worker_resources(guarded.settings("worker")) as resources:
        patch.setattr(jobs, "resources", lambda: resources)
        jobs.sum_up()
    with worker_resources(guarded.settings("operator")) as resources:
        history = close_account(resources, USER, forfeit=True)
    assert rows(guarded.owner(), "SELECT user_id FROM usage_monthly") == [(history,)]


# ---------------------------------------------------------------------------------------------------------------------
# What no role can do

ACCOUNT = keys.Partition(0).account(USER)
STREAM, BALANCE = ACCOUNT.partition.entries, ACCOUNT.balance
NOBODY = [
    "FLUSHALL", "FLUSHDB", "SWAPDB 0 1", "SELECT 1", "KEYS *", "CONFIG GET *", "CONFIG SET maxmemory 1", "DEBUG JMAP",
    "SHUTDOWN NOSAVE", "SAVE", "BGREWRITEAOF", "MONITOR", "REPLICAOF NO ONE", "MODULE LIST", "ACL LIST",
    "ACL SETUSER me on", "CLIENT KILL ID 1", "CLIENT PAUSE 1", "SCRIPT FLUSH", "FUNCTION FLUSH", "SLOWLOG GET",
    "PUBLISH rq:pubsub:x shutdown", "PUBLISH other x", f"XGROUP CREATE {STREAM} g 0",
    f"RENAME {STREAM} mf:gone", f"MIGRATE localhost 1 {BALANCE} 0 1", f"DUMP {BALANCE}", f"SORT {BALANCE}",
    "GET other:key", "SET other:key x", "DEL other:key", "XADD other:events * v 1", "SET mf x",
    f"MGET {BALANCE} other:key",
]  # fmt: skip
NOT_FOR = {
    "producer": [
        f"XDEL {STREAM} 1-1", f"XRANGE {STREAM} - +", "SCAN 0", "BLPOP mf:bell 0.01", "LPOP mf:bell", "INFO",
        "LLEN rq:queue:meterfall", "RPUSH rq:queue:meterfall x", "HSET rq:job:x data x", "SUBSCRIBE rq:pubsub:x",
        "CLIENT LIST",
        # A stream and a setting are not its own to change, whatever it may do to balances and holds.
        *(f"{command} {key}{more}" for key in (STREAM, "mf:{sponsor}:events", "mf:partitions", "mf:found-empty")
          for command, more in (("DEL", ""), ("UNLINK", ""), ("SET", " x"), ("PEXPIRE", " 1"), ("PEXPIREAT", " 1"),
                                ("EXPIRE", " 1"), ("RENAME", " mf:other"), ("XTRIM", " MAXLEN 0"), ("GETDEL", ""))),
        "HSET mf:{p0}:totals lost 0", "DEL mf:{p0}:totals", "XADD mf:leader * v 1",
    ],
    "worker": [
        f"XADD {STREAM} * v 1", "XADD mf:{sponsor}:events * v 1", f"HSETNX {ACCOUNT.pending(METER)} h:x 1",
        "BLMOVE mf:bell rq:queue:x LEFT LEFT 0.01", "SUBSCRIBE other",
    ],
    "operator": [
        f"XDEL {STREAM} 1-1", f"XTRIM {STREAM} MAXLEN 0", "RPUSH rq:queue:meterfall x", "LPOP rq:queue:meterfall",
        "HGETALL rq:job:x",
        "HSET rq:job:x data x", "LLEN rq:wip:meterfall", "BLPOP mf:bell 0.01", "SUBSCRIBE rq:pubsub:x",
    ],
    "service": [
        f"XDEL {STREAM} 1-1", f"XTRIM {STREAM} MAXLEN 0", "RPUSH rq:queue:meterfall x", "LPOP rq:queue:meterfall",
        "HGETALL rq:job:x", "HSET rq:job:x data x", "LLEN rq:wip:meterfall", "BLPOP mf:bell 0.01",
        "SUBSCRIBE rq:pubsub:x", "CLIENT LIST",
    ],
    "monitor": [
        f"XDEL {STREAM} 1-1", f"XTRIM {STREAM} MAXLEN 0", f"XADD {STREAM} * v 1", f"SET {BALANCE} x", f"DEL {BALANCE}",
        "EVAL 'return 1' 0",
        "RPUSH rq:queue:meterfall x", "HSET rq:job:x data x", "SUBSCRIBE rq:pubsub:x", "LPOP mf:bell", "CLIENT LIST",
    ],
}  # fmt: skip


@pytest.mark.parametrize("role", NOT_FOR)
def test_redis_refuses_what_is_not_the_roles_job(guarded: Guarded, role: str) -> None:
    allowed = []
    with Redis.from_url(guarded.settings(role).redis_url) as client:
        for command in NOBODY + NOT_FOR[role]:
            name, *arguments = command.split()
            if not is_refused(client, name, *arguments):
                allowed.append(command)
            # A script may call no more than its caller.
            body = f"return redis.call({', '.join(repr(part) for part in command.split())})"
            if not is_refused(client, "EVAL", body, 0):
                allowed.append(f"{command}, in a script")
    assert allowed == []


def is_refused(client: Redis, *command: str | int) -> bool:
    """True when Redis says that the role lacks the permission."""
    try:
        client.execute_command(*command)
    except ResponseError as error:
        return bool(re.search(r"no permission|can't (run|access)|not allowed from script", str(error), re.IGNORECASE))
    return False


def test_nobody_gets_in_without_a_role_and_its_password(guarded: Guarded) -> None:
    for user in ("", "default:@", "default:x@", "worker:@", "worker:wrong@", "nobody:x@"):
        with (
            Redis.from_url(guarded.redis.url.replace("unix://", f"unix://{user}")) as client,
            pytest.raises(AuthenticationError),
        ):
            client.ping()


FORBIDDEN = [
    "UPDATE catalogue_version SET effective_from = now()",
    "UPDATE redis_life SET token = 'x'",
    "DELETE FROM redis_life",
    "DELETE FROM catalogue_version",
    "CREATE TABLE mine (x int)",
    "CREATE TEMPORARY TABLE mine (x int)",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql AS 'SELECT now()'",
    "CREATE ROLE mine",
    "ALTER TABLE usage_log ADD COLUMN mine int",
    "ALTER TABLE usage_log DISABLE TRIGGER USER",
    "ALTER TABLE balance DROP CONSTRAINT balance_used_check",
    "CREATE INDEX mine ON usage_log (meter)",
    "DROP TABLE ledger_hold",
    "SET session_replication_role = replica",
    "SET ROLE meterfall",
    "COPY account TO PROGRAM 'cat'",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT rolpassword FROM pg_authid",
    "UPDATE api_key SET role = 'operator'",
    "UPDATE api_key SET digest = ''",
    "DELETE FROM api_key",
    "DELETE FROM meterfall_version",
    "UPDATE meterfall_version SET version_num = '0001'",
    "INSERT INTO ledger VALUES (true)",
    "DELETE FROM ledger",
    "UPDATE ledger SET pseudonym_key = gen_random_uuid()",
    "DELETE FROM balance",
    "DELETE FROM usage_log",
    "UPDATE usage_log SET amount = 0",
    "UPDATE usage_log SET seq = seq + 1",
    "DELETE FROM ledger_entry",
    "UPDATE ledger_entry SET purchased_change = 0",
    "UPDATE ledger_entry SET detail = '{}'",
    "DELETE FROM dead_letter",
    "UPDATE dead_letter SET reason = 'x'",
    "DELETE FROM sponsor_pool",
    "DELETE FROM sponsor_grant",
    "UPDATE sponsor_grant SET absorbed = 0",
    "DELETE FROM sponsor_credit",
    "UPDATE sponsor_credit SET credited = 0",
]
# Only who makes keys, and the service that goes by them.
KEYS = [
    "SELECT digest FROM api_key",
    "SELECT name FROM api_key",
    "INSERT INTO api_key (key_id) VALUES ('x')",
    "UPDATE api_key SET revoked_at = now()",
]
HISTORY = [
    "UPDATE usage_log SET user_id = 'x'",
    "UPDATE usage_log SET dimensions = NULL",
    "UPDATE ledger_entry SET user_id = 'x'",
    "UPDATE sponsor_grant SET user_id = 'x'",
    "UPDATE balance SET user_id = 'x'",
    "DELETE FROM account",
    "UPDATE ledger SET epoch = 9",
    "UPDATE dead_letter SET payload = ''",
    "UPDATE dead_letter SET detail = ''",
    "UPDATE dead_letter SET state = 'dropped'",
    "UPDATE redis_life SET acknowledged_by = 'x'",
    "SELECT payload FROM dead_letter",
]
BOOKS = [
    "INSERT INTO usage_log (user_id) VALUES ('x')",
    "INSERT INTO dead_letter (reason) VALUES ('x')",
    "INSERT INTO sponsor_grant (user_id) VALUES ('x')",
    "INSERT INTO sponsor_credit (seq) VALUES (1)",
    "UPDATE sponsor_pool SET balance = 9",
    "INSERT INTO balance_checkpoint (user_id) VALUES ('x')",
    "INSERT INTO usage_rollup (user_id) VALUES ('x')",
    "INSERT INTO proof_run (number) VALUES (1)",
]
REFUSED: dict[str, list[str]] = {
    "monitor": [
        *FORBIDDEN,
        *KEYS,
        *HISTORY,
        *BOOKS,
        "UPDATE ledger SET partitions = 1",
        "INSERT INTO account (user_id) VALUES ('x')",
        "UPDATE account SET plan = 'max'",
        "UPDATE balance SET purchased = 9",
        "DELETE FROM ledger_hold",
        "INSERT INTO partition_pause (reason) VALUES ('x')",
        "INSERT INTO redis_life (token) VALUES ('x')",
    ],
    "worker": [
        *FORBIDDEN,
        *KEYS,
        *HISTORY,
        "UPDATE account SET opened_at = now()",
        "INSERT INTO ledger_hold VALUES ('x')",
        "DELETE FROM proof_checkpoint",
    ],
    "operator": [
        *FORBIDDEN,
        *KEYS,
        *BOOKS,
        "INSERT INTO ledger_hold VALUES ('x')",
        "UPDATE account SET opened_at = now()",
    ],
    "keys": [*FORBIDDEN, *KEYS[:1], *HISTORY, *BOOKS, "SELECT pseudonym_key FROM ledger", "SELECT * FROM account"],
    "service": [*FORBIDDEN, *KEYS[2:], *BOOKS],
    "producer": [
        *FORBIDDEN,
        *KEYS,
        *HISTORY,
        *BOOKS,
        "INSERT INTO sponsor_pool (initial) VALUES (1)",
        "INSERT INTO account (user_id) VALUES ('x')",
        "INSERT INTO balance (user_id) VALUES ('x')",
        "INSERT INTO catalogue_version (version) VALUES (9)",
        "INSERT INTO ledger_entry (user_id) VALUES ('x')",
        "UPDATE account SET plan = 'max'",
        "UPDATE account SET seq = 0",
        "UPDATE balance SET purchased = 9",
        "UPDATE ledger SET partitions = 1",
        "SELECT * FROM ledger_entry",
        "SELECT * FROM redis_life",
        "INSERT INTO redis_life (token) VALUES ('x')",
        "SELECT dimensions FROM usage_log",
        "SELECT dimensions FROM usage_log",
        "SELECT * FROM usage_rollup",
        "SELECT * FROM sponsor_credit",
        "SELECT request_hash FROM sponsor_grant",
    ],
}


@pytest.mark.parametrize("role", REFUSED)
def test_postgres_refuses_what_is_not_the_roles_job(guarded: Guarded, role: str) -> None:
    tables = rows(guarded.owner(), "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    allowed = []
    with psycopg.connect(guarded.settings(role).database_url or "", autocommit=True) as connection:
        for statement in REFUSED[role] + [f"TRUNCATE {table} CASCADE" for (table,) in tables]:
            try:
                connection.execute(statement)
            except psycopg.errors.InsufficientPrivilege:
                continue
            except psycopg.Error as error:
                allowed.append(f"{statement}: {error}")
            else:
                allowed.append(statement)
    assert allowed == []


def test_an_operator_renames_the_history_of_closed_accounts_only(guarded: Guarded) -> None:
    with Billing.connect(guarded.settings("producer")) as billing:
        billing.emit(USER, METER, 1)
    drain_all(guarded)
    with psycopg.connect(guarded.settings("operator").database_url or "", autocommit=True) as connection:
        for table in ("usage_log", "ledger_entry"):
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="append-only"):
                connection.execute(f"UPDATE {table} SET user_id = 'closed:x'")


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is forgotten

# Who runs which module, as far as it speaks to Redis; None: only the owner does, for a rehearsal.
ROLES_OF: dict[str, tuple[str, ...]] = {
    "admin.change": ("operator", "producer"),  # a producer whose requests carry a tier
    "cli.events": ("operator", "producer"),
    "cli.operate": ("operator",),
    "client.session": ("producer", "operator"),
    "client.billing": ("producer", "operator"),
    "admin.dead_letters": ("operator",),
    "admin.lives": ("operator",),
    "demo.services": (),
    "demo.sponsorship": (),
    "consumer.drain": ("worker",),
    "consumer.hand": ("worker",),
    "consumer.publisher": ("worker",),
    "consumer.rounds": ("worker",),
    "consumer.sweep": ("worker",),
    "admin.erasure": ("operator",),
    "admin.losses": ("worker", "operator"),
    "admin.pending": ("operator",),
    "consumer.jobs": ("worker",),
    "consumer.renewals": ("worker",),
    "client.loading": ("producer",),
    "client.preflight": ("producer",),
    "client.recording": ("producer",),
    "consumer.pausing": ("worker",),
    "consumer.rollout": ("worker",),
    "reports.sponsorship": ("operator",),
    "consumer.sponsorship": ("worker",),
    "keyspace.reader": ("worker",),
    "demo.stage": (),
    "admin.partitions": ("worker", "operator"),
    "admin.catalogues": ("operator",),
    "reports.usage": ("operator",),
    "keyspace.connection": ("worker", "operator", "monitor"),
    "keyspace.replicas": ("producer", "operator"),
    "keyspace.server": ("worker", "operator", "monitor"),
    "keyspace.totals": ("worker", "operator"),
    "keyspace.scripts": ("worker", "operator"),
    "client.sponsorship": ("producer",),
    "reports.status": ("worker", "operator", "monitor"),
    "consumer.heart": ("worker",),
    "reports.dynos": ("worker", "operator", "monitor"),
    "reports.proof_result": ("worker", "operator"),
    "keyspace.faults": (),
    "client.effects": ("producer",),
    "consumer.supervisor": ("worker",),
    "resources": ("worker", "operator", "producer"),
    "consumer.usage": ("worker",),
    "reports.holds": ("operator",),
    "reports.proof": ("worker", "operator"),
    "reports.proof_run": ("worker", "operator"),
    "reports.proof_sponsorship": ("worker", "operator"),
}
# The HTTP service does in one process what these do.
DOES_WHAT = {"service": ("producer", "operator")}
# Calls of producers that others also make: operators extend a hold or give it back, and credit the pool.
SCRIPTS_OF = {"operator": {"check", "install", "lease", "reuse", "shed", "extend", "release", "sponsor_credit"}}
# The module that has a function for each script: who uses one runs the script.
CALLS = "keyspace.calls"
# What connections and RQ send. Keys of RQ are behind a list of their own.
UNSEEN = {
    "ping",
    "client|setname",
    "client|list",
    "info",
    "multi",
    "exec",
    "unwatch",
    "subscribe",
    "unsubscribe",
    "xinfo|stream",
}
CLIENTS = {"redis", "client", "_client", "pipe"}
NO_COMMANDS = {"pipeline", "execute", "execute_command", "close", "aclose", "set_response_callback"}
COMMAND_OF = {"scan_iter": "scan", "delete": "del", "script_load": "script|load", "xinfo_stream": "xinfo|stream"}


@cache
def modules() -> dict[str, ast.Module]:
    """The worker's modules by their dotted names below `worker`.

    Without the migrations, which only write SQL, and without `testing`: it works on a Redis in memory, or of its own.
    """
    worker = ROOT / "worker"
    return {
        ".".join(path.relative_to(worker).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in worker.rglob("*.py")
        if not {"migrations", "testing"} & set(path.relative_to(worker).parts)
    }


def commands_in_python(module: ast.Module) -> set[str]:
    """Redis commands that a module sends: as methods of a client or pipeline, and as tuples ("SET", …)."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            whose = node.func.value
            name = getattr(whose, "attr", getattr(whose, "id", ""))
            if name in CLIENTS and node.func.attr not in NO_COMMANDS:
                found.add(COMMAND_OF.get(node.func.attr, node.func.attr))
        if isinstance(node, ast.Tuple) and node.elts and len(node.elts) > 1 and isinstance(node.elts[0], ast.Constant):
            first = node.elts[0].value
            second = node.elts[1]
            if first == "SCRIPT" and isinstance(second, ast.Constant) and second.value == "LOAD":
                first = "SCRIPT LOAD"
            if (
                isinstance(first, str)
                and re.fullmatch("[A-Z]{3,}( LOAD)?", first)
                and first not in {"NOREPLICAS", "NOAUTH"}
            ):
                found.add(first.lower().replace(" ", "|"))
    return found


def scripts_called_in(tree: ast.AST) -> set[str]:
    """Names of the scripts that are called without their function: `call("name", …)`."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    named = [node for node in calls if getattr(node.func, "attr", getattr(node.func, "id", "")) == "call"]
    first = [node.args[0] for node in named]
    return {node.value for node in first if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@cache
def functions_of_scripts() -> dict[str, set[str]]:
    """The functions of `CALLS` that call scripts, and which."""
    functions = [node for node in modules()[CALLS].body if isinstance(node, ast.FunctionDef)]
    return {node.name: called for node in functions if (called := scripts_called_in(node))}


def scripts_in(module: ast.Module) -> set[str]:
    """Names of the scripts that a module runs: those of the functions of `CALLS` that it uses."""
    room, _, name = f"worker.{CALLS}".rpartition(".")
    imports = [node for node in ast.walk(module) if isinstance(node, ast.ImportFrom)]
    known_as = {
        each.asname or each.name for node in imports if node.module == room for each in node.names if each.name == name
    }
    used = {each.name for node in imports if node.module == f"{room}.{name}" for each in node.names}
    used |= {
        node.attr
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known_as
    }
    return {script for function in used for script in functions_of_scripts().get(function, ())}


def commands_in_lua(text: str) -> set[str]:
    """Redis commands of a script, and of those shared functions that it reaches."""
    functions = dict(re.findall(r"^local function (\w+)(.*?)^end$", text, re.MULTILINE | re.DOTALL))
    reached = re.sub(r"^local function \w+.*?^end$", "", text, flags=re.MULTILINE | re.DOTALL)
    left = dict(functions)
    while called := [name for name in left if re.search(rf"\b{name}\(", reached)]:
        reached += "".join(left.pop(name) for name in called)
    called = re.findall(r"redis\.p?call\(\s*['\"](\w+)['\"](?:,\s*['\"](STREAM|USAGE)['\"])?", reached)
    return {"|".join(filter(None, names)).lower() for names in called}


def commands_of(role: str, *, queue: bool = True) -> set[str]:
    """Commands that config/redis.acl allows a role; without those on the queue's keys alone, if so asked."""
    (line,) = re.findall(rf"^user {role} .*", ACL, re.MULTILINE)
    return set(re.findall(r"\+([^\s)]+)", line if queue else re.sub(r"\(.*?\)", "", line)))


def scripts_of(role: str) -> set[str]:
    """Scripts that a role runs."""
    run = {name for module, tree in modules().items() if is_of(module, role) for name in scripts_in(tree)}
    return run.union(*(SCRIPTS_OF.get(each, set()) for each in DOES_WHAT.get(role, (role,))))


def is_of(module: str, role: str) -> bool:
    """True if a role runs a module, as far as it speaks to Redis."""
    return not {role, *DOES_WHAT.get(role, ())}.isdisjoint(ROLES_OF.get(module, ()))


def needed_by(role: str) -> dict[str, set[str]]:
    """Commands that a role needs, by the file that sends them."""
    ours = {module: tree for module, tree in modules().items() if is_of(module, role)}
    needed = {f"worker/{module.replace('.', '/')}.py": commands_in_python(tree) for module, tree in ours.items()}
    return needed | {f"{name}.lua": commands_in_lua(scripts.script(name).text) for name in scripts_of(role)}


@pytest.mark.parametrize("role", NOT_FOR)
def test_a_role_may_call_what_its_scripts_and_modules_call_and_nothing_else(role: str) -> None:
    needed, allowed = needed_by(role), commands_of(role)
    lacking = {where: sorted(names - allowed) for where, names in needed.items() if names - allowed}
    assert lacking == {}, f"config/redis.acl: {role} lacks these"
    assert sorted(commands_of(role, queue=False) - UNSEEN - set().union(*needed.values())) == []


def test_every_module_that_speaks_to_redis_has_its_roles() -> None:
    speak = {name for name, tree in modules().items() if commands_in_python(tree) or scripts_in(tree)}
    assert sorted(speak - ROLES_OF.keys()) == []


def test_every_script_is_run_by_some_role() -> None:
    called = {name for tree in modules().values() for name in scripts_in(tree)}
    assert sorted(called - set().union(*map(scripts_of, NOT_FOR))) == []
    assert {"check", "publish", "release"} <= called
    assert called == functions_of_scripts().keys(), "nobody uses these functions"
    written = {path.stem: path for path in (ROOT / "worker/keyspace").rglob("*.lua")}
    texts = "".join(scripts.script(name).text for name in called)
    for name in written.keys() - called:  # the shared functions in front of others
        assert written[name].read_text(encoding="utf-8") in texts


def test_each_script_is_called_by_the_function_of_its_name_alone() -> None:
    assert functions_of_scripts() == {name: {name} for name in functions_of_scripts()}
    assert [name for name, tree in modules().items() if scripts_called_in(tree)] == [CALLS]


def test_no_password_is_in_the_repository_and_none_is_forgotten() -> None:
    assert re.findall(r"#[0-9a-f]{64}|>\S+|nopass", ACL) == []
    assert re.findall(r"^user (\w+) on #<(\w+)-password-sha256>", ACL, re.MULTILINE) == [(r, r) for r in NOT_FOR]
    assert "user default off" in ACL.splitlines()


def test_every_table_is_in_the_roles_file(guarded: Guarded) -> None:
    tables = rows(guarded.owner(), "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert len(tables) > 10
    assert sorted(str(table) for (table,) in tables if not re.search(rf"\b{table}\b", SQL)) == []
