"""Every mistake is one line that names what to change, and an exit code; never a password."""

from __future__ import annotations

import getpass
import signal
import subprocess
import sys
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict
from redis import Redis

from config.settings import Settings
from tests.support.commands import (
    METER,
    MODULE,
    PASSWORD,
    USER,
    Meterfall,
    assert_all_refused,
    assert_refused,
    lines_of,
)
from tests.support.ledger import rows
from tests.support.paths import ROOT
from tests.support.resources import settings_for
from tests.support.streams import drain
from worker.keyspace import keys


def test_a_wrong_command_line_is_one_line_that_names_the_field(bare: Meterfall, tmp_path: Path) -> None:
    event = tmp_path / "event.json"
    event.write_text(lines_of({"event_id": "e1"}), encoding="utf-8")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b'{"user_id": "\xff"}\n')
    assert_all_refused(
        bare,
        [
            (["nonsense"], {}, ["nonsense"]),
            (["check"], {}, ["user"]),
            (["check", USER], {}, ["meter"]),
            (["check", USER, METER, "many"], {}, ["amount", "integer"]),
            (["check", USER, METER, "1.5"], {}, ["amount", "integer"]),
            (["check", USER, METER, "--nope"], {}, ["--nope"]),
            (["check", USER, METER, "1", "--", "2"], {}, ["2"]),
            (["holds", "nonsense"], {}, ["nonsense"]),
            (["holds", "list", "--limit", "0"], {}, ["--limit", "1"]),
            (["dead", "show", "first"], {}, ["letter", "integer"]),
            (["account", "grant", USER, METER, "5"], {}, ["--key"]),
            (
                ["account", "open", USER, "basic", "--period-end", "tomorrow"],
                {},
                ["--period-end", "ISO 8601", "offset"],
            ),
            (["account", "open", USER, "basic", "--period-start", "2026-01-01"], {}, ["--period-start", "offset"]),
            (["emit", str(tmp_path / "none.json")], {}, ["file", "none.json", "No such file"]),
            (["emit", str(binary)], {}, ["file", "UTF-8"]),
            (["emit", str(event)], {"METERFALL_PARTITIONS": "0"}, ["METERFALL_PARTITIONS", "1"]),
        ],
    )


def test_an_argument_that_could_never_be_right_is_named_before_anything_is_sent(bare: Meterfall) -> None:
    ids, meters = ["must be", "1 to 128 characters"], ["meter", "premium_voice"]
    assert_all_refused(
        bare,
        [
            (["check", "two words", METER], {}, ["user_id", *ids]),
            (["check", "x" * 129, METER], {}, ["user_id", *ids]),
            (["check", USER, "voice"], {}, meters),
            (["check", USER, METER, "1000000000001"], {}, ["amount", "1000000000000"]),
            (["check", "--", USER, METER, "-1"], {}, ["amount", "0"]),
            (["reserve", USER, METER, "1", ""], {}, ["key", *ids]),
            (["reserve", USER, METER, "1", "k", "--ttl-seconds", "0"], {}, ["ttl_seconds", "1 to 604800"]),
            (["capture", USER, METER, "k", "e 1", "1"], {}, ["event_id", *ids]),
            (["settle", USER, METER, "bad key", "1"], {}, ["key", *ids]),
            (["settle", USER, METER, "k", "1", "--event-id", "e#1"], {}, ["event_id", *ids]),
            (["release", USER, "voice", "k"], {}, meters),
            (["check", USER, METER, "--backend", "cloud"], {}, ["backend", "gemini, hardware", "cloud"]),
            (["reserve", USER, METER, "1", "k", "--backend", "cloud"], {}, ["backend", "gemini, hardware", "cloud"]),
            (
                ["charge", USER, METER, "1", "e1", "--backend", "gemini", "-d", "backend=hardware"],
                {},
                ["dimensions.backend", "gemini", "hardware"],
            ),
            (["remaining", USER, "--meter", "voice"], {}, meters),
            (["remaining", USER, "--tier", "gold"], {}, ["tier", "core, max_relay, pro", "gold"]),
            (["plan-backend", USER, "cheapest"], {}, ["preference", "gemini_first, hardware_first", "cheapest"]),
            (["charge", USER, METER, "1", "é"], {}, ["event_id", *ids]),
            (["charge", USER, METER, "1", "e1", "-d", "novalue"], {}, ["--dimension", "novalue", "name=value"]),
            (["charge", USER, METER, "1", "e1", "--source", "\x01"], {}, ["source"]),
            (["charge", USER, METER, "1", "e1", "--dimension", "a=" + "x" * 3_000], {}, ["dimensions", "2048"]),
            (["settle", USER, METER, "k", "1", "--source", "x" * 300], {}, ["source"]),
            (
                ["settle", USER, METER, "k", "1", "-d", "model_slug=m2"],
                {},
                ["actual", "1.5", "--model", "--multiplier 1"],
            ),
            (["capture", USER, METER, "k", "e", "1", "-d", "model_slug=m2"], {}, ["amount", "1.5", "--model"]),
            (["charge", USER, METER, "1", "e", "--model", "m2", "-d", "model_slug=m3"], {}, ["model_slug", "m2", "m3"]),
            (["reserve", USER, METER, "1", "k", "--multiplier", "1,5"], {}, ["multiplier", "decimal"]),
            (
                ["reserve", USER, METER, "1", "k", "--model", "m9"],
                {"METERFALL_UNKNOWN_MODELS": "refuse"},
                ["model_slug", "m9", "m1, m2", "[multipliers]"],
            ),
            (["holds", "extend", USER, METER, "k", "--ttl-seconds", "604801"], {}, ["ttl_seconds", "1 to 604800"]),
            (["holds", "extend", USER, METER, "k", "--amount", "1000000000001"], {}, ["amount", "1000000000000"]),
            (["holds", "extend", USER, METER, "a b"], {}, ["key", *ids]),
        ],
    )


def test_a_wrong_setting_is_named_with_what_is_allowed(bare: Meterfall, tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text("[plans", encoding="utf-8")
    redis_schemes, postgres_scheme = ["REDIS_URL", "redis://"], ["DATABASE_URL", "postgresql://"]
    nobody = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://u@127.0.0.1:1/db"}
    check, show = ["check", USER, METER], ["account", "show", USER]
    assert_all_refused(
        bare,
        [
            (["plans"], {"METERFALL_PARTITIONS": "0"}, ["METERFALL_PARTITIONS", "greater than or equal to 1", "'0'"]),
            (["plans"], {"METERFALL_REDIS_DOWN": "panic"}, ["METERFALL_REDIS_DOWN", "'deny', 'ledger' or 'allow'"]),
            (["plans"], {"METERFALL_LOG_LEVEL": "debug"}, ["METERFALL_LOG_LEVEL", "'DEBUG'"]),
            (["plans"], {"METERFALL_PARTITION": "8"}, ["METERFALL_PARTITION", "no such setting"]),
            (["plans"], {"METERFALL_CATALOGUE_PATH": str(catalogue)}, [str(catalogue), "Expected"]),
            (["plans"], {"METERFALL_CATALOGUE_PATH": "/nowhere.toml"}, ["/nowhere.toml", "No such file"]),
            (show, nobody | {"METERFALL_DEFAULT_PLAN": "gold"}, ["METERFALL_DEFAULT_PLAN", "gold", "basic"]),
            (show, {}, ["DATABASE_URL", "unset"]),
            (["migrate"], {}, ["DATABASE_URL", "unset"]),
            (["worker", "run", "--burst"], {}, ["DATABASE_URL", "unset"]),
            (check, {"REDIS_URL": "nonsense"}, redis_schemes),
            (check, {"REDIS_URL": f"http://:{PASSWORD}@127.0.0.1:1/0"}, redis_schemes),
            (check, {"REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:port/0"}, ["REDIS_URL", "port"]),
            (show, nobody | {"DATABASE_URL": "nonsense"}, postgres_scheme),
            (show, nobody | {"DATABASE_URL": f"mysql://u:{PASSWORD}@127.0.0.1:1/db"}, postgres_scheme),
            (["migrate"], {"DATABASE_URL": "nonsense"}, postgres_scheme),
        ],
    )


def test_a_missing_server_says_which_address_was_tried(bare: Meterfall, tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"
    no_redis = {"REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:1/0"}
    no_postgres = {"DATABASE_URL": f"postgresql://u:{PASSWORD}@127.0.0.1:1/db"}
    in_query = {"DATABASE_URL": f"postgresql://u@127.0.0.1:1/db?password={PASSWORD}"}
    no_socket = {"REDIS_URL": f"unix://{socket}?db=0&password={PASSWORD}"}
    postgres_socket = {"DATABASE_URL": f"postgresql://u:{PASSWORD}@/db?host={tmp_path}"}
    at_redis, at_postgres = ["127.0.0.1:1"], ["127.0.0.1", "port 1"]
    assert_all_refused(
        bare,
        [
            (["charge", USER, METER, "1", "e1"], no_redis, at_redis),
            (["settle", USER, METER, "k", "1"], no_redis, at_redis),
            (["release", USER, METER, "k"], no_socket, [str(socket)]),
            (["account", "show", USER], no_redis | no_postgres, ["DATABASE_URL", *at_postgres]),
            (["verify"], no_redis | in_query, ["DATABASE_URL", *at_postgres]),
            (["migrate"], postgres_socket, ["DATABASE_URL", str(tmp_path)]),
            (["migrate"], no_postgres, ["DATABASE_URL", *at_postgres]),
            (["worker", "run", "--burst"], no_redis | no_postgres, ["DATABASE_URL", *at_postgres]),
        ],
        code=1,
    )


def test_without_redis_an_operator_reads_its_address(settings: Settings, meterfall: Meterfall, tmp_path: Path) -> None:
    tcp, socket = "127.0.0.1:1", str(tmp_path / "redis.sock")
    down = {"REDIS_URL": f"redis://:{PASSWORD}@{tcp}/0"}
    in_query = {"REDIS_URL": f"unix://{socket}?db=0&password={PASSWORD}"}
    assert_all_refused(
        meterfall,
        [
            (["holds", "list"], down, ["REDIS_URL", tcp]),
            (["holds", "list"], in_query, ["REDIS_URL", socket]),
            (["cache", "reset"], down, ["REDIS_URL", tcp]),
            (["worker", "run", "--burst"], down, ["REDIS_URL", tcp]),
        ],
        code=1,
    )
    shown = meterfall("status", **down)
    assert (shown.code, "DOWN" in shown.out, tcp in shown.out, PASSWORD in shown.out) == (1, True, True, False)
    assert rows(settings, "SELECT epoch FROM ledger") == [(1,)]


def name_of(database_url: str) -> str:
    return str(conninfo_to_dict(database_url)["dbname"])


def test_a_database_without_a_ledger_says_what_to_do(
    command_server: subprocess.Popen[str], database_url: str, redis_url: str
) -> None:
    # A database of its own: its tables go.
    meterfall = Meterfall(command_server, settings_for(database_url, redis_url))
    meterfall.done("migrate", "base", "--destroy", name_of(database_url))
    run = ["DATABASE_URL", "meterfall migrate"]
    commands = (["account", "show", USER], ["status"], ["verify"], ["dead", "list"], ["worker", "run", "--burst"])
    assert_all_refused(meterfall, [(list(command), {}, run) for command in commands])
    assert meterfall.done("migrate") == "ledger is at head\n"
    assert meterfall.done("dead", "list") == "none\n"


def test_another_number_of_partitions_is_refused_by_every_command(redis: Redis, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    other = {"METERFALL_PARTITIONS": "4"}
    assert_all_refused(
        meterfall,
        [
            (["status"], other, ["METERFALL_PARTITIONS", "8", "4"]),
            (["account", "show", USER], other, ["METERFALL_PARTITIONS", "8", "4"]),
            (["charge", USER, METER, "1", "e1"], other, ["METERFALL_PARTITIONS", "8", "4"]),
        ],
    )
    assert list(redis.scan_iter(keys.PENDING_PATTERN)) == []


def test_an_interrupt_among_the_imports_ends_without_a_traceback() -> None:
    """Python names each import on stderr, so the signal comes while the first of many is done."""
    command = [sys.executable, "-X", "importtime", "-m", "worker", "--version"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as starting:
        assert starting.stderr is not None
        said = []
        for line in starting.stderr:
            said.append(line)
            if line.rstrip().endswith("typer.colors"):
                starting.send_signal(signal.SIGINT)
                break
        said += starting.stderr.readlines()
    assert starting.returncode == 130
    assert [line for line in said if not line.startswith("import time:")] == []


def test_a_setting_that_names_nothing_is_named(meterfall: Meterfall) -> None:
    meterfall.done("catalogue", "list")
    assert_refused(
        meterfall("account", "list", METERFALL_CATALOGUE_PATH="/nope"), 2, "METERFALL_CATALOGUE_PATH", "/nope"
    )
    assert_refused(
        meterfall("account", "list", METERFALL_DATABASE_SCHEMA="nosuch"), 2, "METERFALL_DATABASE_SCHEMA", "nosuch"
    )


def test_an_output_that_takes_nothing_is_one_line(meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    for command in ("account list", "account list --json", f"account show {USER}", "report usage --csv", "plans"):
        with Path("/dev/full").open("w", encoding="utf-8") as full:
            done = subprocess.run(
                [*MODULE, *command.split()], env=meterfall.environment, cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
                text=True, timeout=60, check=False,
            )  # fmt: skip
        assert (done.returncode, done.stderr) == (1, "meterfall: output: No space left on device\n"), command


def test_a_pause_has_a_reason_and_the_login_as_its_author(meterfall: Meterfall, settings: Settings) -> None:
    assert_refused(meterfall("partition", "pause", "3", "--reason", ""), 2, "reason: missing")
    assert_refused(meterfall("partition", "pause", "3", "--reason", "test", "--by", ""), 2, "by: missing")
    assert rows(settings, "SELECT * FROM partition_pause") == []
    meterfall.environment.pop("USER", None)
    meterfall.environment.pop("LOGNAME", None)
    paused = meterfall.done("partition", "pause", "3", "--reason", "test", "--json")
    assert paused["paused_by"] == getpass.getuser()


def test_the_release_of_a_hold_that_is_not_remembered_says_so(meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    for command in (["release"], ["holds", "release"]):
        key = f"no-such-{len(command)}"
        shown = meterfall.done(*command, USER, METER, key)
        assert f"no hold {key} of {USER} is remembered on {METER}: nothing was released" in shown
        other = f"no-{command[0]}"
        assert meterfall.done(*command, USER, METER, other, "--json")["state"] == "unknown"


def test_the_exit_codes_follow_the_rule_of_the_readme(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("account", "open", "user-43", "basic")
    invoice = ["in_1", "2026-12-01T00:00:00Z", "2036-12-01T00:00:00Z"]
    meterfall.done("account", "renew", USER, *invoice)
    drain(settings, USER)
    drain(settings, "user-43")
    meterfall.done("reserve", USER, METER, "5", "job-1")
    codes = {
        ("account", "renew", "user-43", *invoice): 1,
        ("account", "renew", USER, "in_1", "2026-12-01T00:00:00Z", "2036-12-02T00:00:00Z"): 1,
        ("account", "open", USER, "plus"): 2,
        ("account", "close", USER, "--yes"): 2,
        ("repartition", "5"): 2,
        ("account", "show", "nobody"): 2,
    }
    assert {command: meterfall(*command).code for command in codes} == codes
    assert meterfall("account", "open", USER, "basic").code == 0, "done before"
