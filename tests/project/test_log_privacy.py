"""What logs say of people and secrets: nothing, whatever goes wrong.

Canaries are put wherever a user id, a password or a payload may come from, and looked for in all that is logged.
"""

from __future__ import annotations

import ast
import logging
import socket
import subprocess
import tomllib
from hashlib import sha256
from urllib.parse import unquote

import psycopg
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from rq.job import Job
from rq.serializers import JSONSerializer
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from config.catalogue import load_catalogue
from config.log import described, name_in_logs
from config.settings import Settings
from tests.support.canaries import PASSWORD, PAYLOAD, USER, settings_with_passwords
from tests.support.ledger import give_account, rows
from tests.support.paths import ROOT
from tests.support.processes import dyno
from tests.support.resources import settings_for
from tests.support.streams import account_of, partition_of
from tests.support.waiting import wait_until
from worker.client import Billing
from worker.consumer import jobs
from worker.demo.servers import Server
from worker.keyspace import keys

METER = "premium_voice"
HASHED = "user:" + sha256(USER.encode()).hexdigest()[:12]


def tells(message: str) -> list[str]:
    """Canaries that a text tells."""
    return [canary for canary in (USER, PASSWORD, PAYLOAD) if canary in message]


@pytest.fixture
def settings(database_url: str, own_redis: Server) -> Settings:
    """Settings whose URLs carry passwords, on a Redis that the test may stop."""
    return settings_with_passwords(database_url, own_redis, redis_retries=0)


def test_a_worker_tells_nothing_whatever_fails(settings: Settings, own_redis: Server) -> None:
    give_account(settings, USER, "basic")
    give_account(settings, f"{USER}-2", "basic")
    with psycopg.connect(settings.database_url or "") as connection:
        # Postgres refuses events with the code that they have as id, and tells all of them.
        connection.execute(
            "CREATE FUNCTION tell_all() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused' USING "
            "ERRCODE = NEW.event_id, DETAIL = NEW::text, HINT = NEW.user_id; END $$"
        )
        trigger = "CREATE TRIGGER tell_all BEFORE INSERT ON usage_log FOR EACH ROW EXECUTE FUNCTION tell_all()"
        connection.execute(trigger)
        # What a proof will find.
        connection.execute("UPDATE balance SET purchased = 7 WHERE user_id = %s AND meter = %s", (USER, METER))
    other = f"{USER}-2"
    pending = account_of(settings, other).pending(METER)
    with Billing.connect(settings) as billing, Redis.from_url(settings.redis_url) as redis:
        for code in ("22001", "42P01"):  # the event's own fault; and anything else
            billing.emit(USER, METER, 1, event_id=code, dimensions={"document_id": PAYLOAD})
        billing.reserve(other, METER, 1, key="k", ttl_seconds=1)
        redis.set(pending, PAYLOAD)  # no map any more: the script that takes the hold out of it fails
        with dyno(settings) as process:
            failed = ("drain: JobFailed: UndefinedTable", "expire_holds: JobFailed: ResponseError")
            wait_until(lambda: all(each in kept_failures(settings, redis) for each in failed), "both jobs failed", 20)
            redis.delete(pending, keys.VERIFIED)
            kept = wait_for_proof(settings, redis)
            kept += str(redis.get(partition_of(settings, USER).halted))
            own_redis.stop()
            message = logged_until("is away", process)
    for line in (
        "is a dead letter: StringDataRightTruncation: 22001\n",
        "halted, nothing is lost: UndefinedTable: 42P01 refused\n",
        f"verify: {HASHED}: {METER} has purchased 7,",
        "failed: ResponseError: WRONGTYPE",
    ):
        assert line in message
    assert tells(message) == []
    assert tells(kept) == []
    assert rows(settings, "SELECT reason FROM dead_letter") == [("data_error",)]


def test_a_dyno_says_once_at_its_start_what_it_is_and_no_password(settings: Settings, own_redis: Server) -> None:
    with dyno(settings) as process, Redis.from_url(settings.redis_url) as redis:
        wait_until(lambda: bool(redis.scard("rq:workers")), "its worker process has registered", 20)
        process.terminate()
        _, message = process.communicate(timeout=60)
    catalogue = load_catalogue(settings.catalogue_path).digest
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    servers = [own_redis.url.replace("unix://", "unix://default@"), unquote(settings.database_url or "")]
    (line,) = [line.partition("INFO    ")[2] for line in message.splitlines() if " starts on " in line]
    assert line == (
        f"meterfall {version} starts on {socket.gethostname()} with pid {process.pid}: 8 partitions, "
        f"{' and '.join(servers).replace(PASSWORD, '***')}, catalogue {catalogue}"
    )
    assert tells(message) == []


def wait_for_proof(settings: Settings, redis: Redis) -> str:
    """What RQ keeps of failures, once a proof is among them."""
    # It has the lowest priority, so it waits while other tests need the machine.
    wait_until(lambda: "LedgerWrongError" in kept_failures(settings, redis), "the proof has failed", 60)
    return kept_failures(settings, redis)


def kept_failures(settings: Settings, redis: Redis) -> str:
    """What RQ keeps of the jobs that failed: which they were, and their errors with and without traceback."""
    kept = ""
    queues = jobs.job_queue(settings, redis), jobs.proof_queue(settings, redis)
    for job_id in (each for queue in queues for each in queue.failed_job_registry.get_job_ids()):
        result = Job.fetch(job_id, redis, serializer=JSONSerializer).latest_result()
        text = str(result and result.exc_string).strip()
        kept += f"{text}\n{job_id.partition('-')[0]}: {text.splitlines()[-1].rpartition('worker_process.')[2]}\n"
    return kept


def logged_until(words: str, process: subprocess.Popen[str]) -> str:
    """What a dyno logs until it says this, and until it has ended."""
    assert process.stderr is not None
    message = ""
    while words not in message:
        line = process.stderr.readline()
        assert line, message
        message += line
    process.terminate()
    return message + process.communicate(timeout=25)[1]


def test_a_client_tells_nothing_where_servers_fail(
    settings: Settings, own_redis: Server, caplog: pytest.LogCaptureFixture
) -> None:
    give_account(settings, USER, "basic")
    caplog.set_level(logging.DEBUG)
    with Billing.connect(settings) as billing, psycopg.connect(settings.database_url or "", autocommit=True) as owner:
        # A hold that the ledger gave and cannot take back.
        own_redis.stop()
        hold = billing.reserve(USER, METER, 1, key="kept")
        own_redis.start()
        owner.execute(
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'kept' "
            "USING DETAIL = OLD::text; END $$"
        )
        owner.execute("CREATE TRIGGER keep BEFORE DELETE ON ledger_hold FOR EACH ROW EXECUTE FUNCTION keep()")
        hold.release()
        assert f"holds of {HASHED} stay in the ledger" in caplog.text
        # A tier whose change nobody can be told of, and a hold that cannot be given back.
        with billing.reserve(USER, METER, 1, key="left-behind"):
            own_redis.stop()
        billing.check(USER, METER, 1)
        billing.remaining(USER, METER)
    assert "hold left-behind stays until it expires" in caplog.text
    assert "Redis is down" in caplog.text
    assert tells(caplog.text) == []


# ---------------------------------------------------------------------------------------------------------------------
# One by one


def test_errors_of_postgres_are_told_by_code_and_without_rows(settings: Settings) -> None:
    give_account(settings, USER, "basic")
    expected = {
        f"INSERT INTO account SELECT * FROM account WHERE user_id = '{USER}'":
            'UniqueViolation: 23505 duplicate key value violates unique constraint "account_pkey"',
        f"SELECT '{PAYLOAD}'::int": "InvalidTextRepresentation: 22P02",
        "SELECT 1 / 0": "DivisionByZero: 22012",
        f"DO $$ BEGIN RAISE EXCEPTION '{PAYLOAD}'; END $$": "RaiseException: P0001",
        "SELECT * FROM missing": 'UndefinedTable: 42P01 relation "missing" does not exist',
    }  # fmt: skip
    engine = create_engine(
        (settings.database_url or "").replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool
    )
    for statement, line in expected.items():
        with psycopg.connect(settings.database_url or "") as connection, pytest.raises(psycopg.Error) as raised:
            connection.execute(statement)
        assert described(raised.value) == line
        with engine.connect() as wrapped, pytest.raises(DBAPIError) as caught:
            wrapped.execute(text(statement))
        assert described(caught.value) == line


def test_errors_of_redis_are_told_without_commands_and_keys() -> None:
    quoted = f"Command # 1 (EVALSHA abc 2 mf:{{p3}}:pending:{USER}:m ...) of pipeline caused error: "
    texts = {
        quoted + "WRONGTYPE Operation": "ResponseError: WRONGTYPE Operation",
        f"unknown command 'X', with args beginning with: '{USER}'": "ResponseError: unknown command 'X'",
        f"NOPERM no access to the 'mf:{{p3}}:balance:{USER}' key":
            "ResponseError: NOPERM no access to the 'mf:{p3}:balance:…' key",
    }  # fmt: skip
    assert [described(ResponseError(message)) for message in texts] == list(texts.values())
    assert described(RedisConnectionError("Error 111 connecting to host:6379.")) == (
        "ConnectionError: Error 111 connecting to host:6379."
    )


def test_any_other_error_is_told_by_its_kind_and_place() -> None:
    def fail() -> None:
        try:
            raise KeyError(USER)
        except KeyError as error:
            raise RuntimeError(PAYLOAD) from error

    with pytest.raises(RuntimeError) as raised:
        fail()
    message = described(raised.value)
    assert message.startswith("RuntimeError: KeyError at test_log_privacy.py:")
    assert described(FileNotFoundError(2, "No such file", PAYLOAD)) == "FileNotFoundError: No such file"


def test_the_hash_is_stable_and_may_be_switched_off() -> None:
    assert name_in_logs(USER, "hashed") == HASHED == "user:df62bfee11a6"
    assert name_in_logs(USER, "plain") == USER


def test_settings_show_no_url() -> None:
    shown = repr(settings_for(f"postgresql://u:{PASSWORD}@h/d", f"redis://:{PASSWORD}@h"))
    assert tells(shown) == []


def test_no_line_is_logged_with_an_error_or_a_user_as_it_is() -> None:
    found = []
    logging_modules = 0
    for path in (ROOT / "worker").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        logging_modules += "logger." in source
        describes = "from loguru import logger" not in source  # the client's logger does it by itself
        for node in ast.walk(ast.parse(source)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if getattr(node.func.value, "id", getattr(node.func.value, "attr", "")) not in ("logger", "client_logger"):
                continue
            names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            attributes = {name.attr for name in ast.walk(node) if isinstance(name, ast.Attribute)}
            shown = names | attributes
            if shown & {"user_id", "user", "payload", "redis_url", "database_url", "secret"}:
                found.append(f"{path.name}:{node.lineno}")
            if "error" in names and not describes and "described" not in names:
                found.append(f"{path.name}:{node.lineno}")
    assert logging_modules > 10
    assert found == []
