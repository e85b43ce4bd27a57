"""The commands as an operator meets them: exit codes, one line for every mistake, JSON, and never a password."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from config.catalogue import load_catalogue
from config.settings import DEFAULT_CATALOGUE, Settings
from schemas.answers import (
    ChargeAnswer,
    CheckAnswer,
    EventAnswer,
    HoldAnswer,
    HoldState,
    Parts,
    Reason,
    Remaining,
    RoutingAnswer,
)
from schemas.events import UsageEvent
from schemas.reports import Breakdown, Engagement, Explanation, Timeline, UsageSummary
from tests.support.commands import Done, Meterfall
from tests.support.ledger import rows
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import backlog, drain, partition_of, pending_of, stream_of
from worker.consumer.drain import drain_stream
from worker.keyspace import keys
from worker.reports.status import PartitionStatus
from worker.rules.explanations import explain_check

USER = "user-42"
METER = "premium_voice"
PASSWORD = "hunter2"

MODULE = [sys.executable, "-m", "worker"]


def wrong(done: Done, code: int, named: Sequence[str]) -> str:
    """What is wrong with the way a command failed; empty if one line said it all, and no password."""
    if PASSWORD in done.out + done.err:
        return f"tells the password: {done.err[-300:]}"
    if "Traceback" in done.err:
        return f"a traceback: {done.err.strip().splitlines()[-1]}"
    if done.code != code:
        return f"exit code {done.code}, not {code}: {done.out[:300]}{done.err}"
    if done.out or done.err.count("\n") != 1 or not done.err.startswith("meterfall: "):
        return f"not one line: {done.out[:300]!r} {done.err!r}"
    missing = [name for name in named if name not in done.err]
    return f"{done.err!r} does not say {missing}" if missing else ""


def assert_refused(done: Done, code: int, *named: str) -> None:
    """The command failed with `code` and one line that says all of `named`."""
    assert wrong(done, code, named) == ""


Case = tuple[list[str], dict[str, str], Sequence[str]]


def assert_all_refused(meterfall: Meterfall, cases: Sequence[Case], code: int = 2) -> None:
    """Every case (arguments, environment, what the line must say) fails with `code` and one line."""
    found = []
    for arguments, environment, named in cases:
        if said := wrong(meterfall(*arguments, **environment), code, named):
            found.append(f"{' '.join(arguments)[:80]} {environment or ''}: {said}")
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.fixture
def bare(command_server: subprocess.Popen[str]) -> Meterfall:
    """The command, with nothing in its environment."""
    return Meterfall(command_server)


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_for(database_url, redis_url)


@pytest.fixture
def meterfall(command_server: subprocess.Popen[str], settings: Settings) -> Meterfall:
    return Meterfall(command_server, settings)


def checked(printed: dict[str, Any]) -> CheckAnswer:
    """The answer of a check as the command prints it, with a sentence about it; without that sentence."""
    answer = CheckAnswer.model_validate(printed)
    assert answer.explanation == explain_check(answer)
    return answer.model_copy(update={"explanation": None})


def lines_of(*events: dict[str, object]) -> str:
    return "".join(json.dumps({"user_id": USER, "meter": METER, "quantity": 1} | event) + "\n" for event in events)


# ---------------------------------------------------------------------------------------------------------------------
# Without servers


def test_the_command_and_the_module_are_the_same(bare: Meterfall) -> None:
    program = [str(Path(sys.executable).with_name("meterfall"))]
    listed, refused = ["plans", "--json"], ["check", "u"]
    for arguments in (listed, refused):
        assert bare.started(program, *arguments) == bare.started(MODULE, *arguments) == bare(*arguments)
    assert bare(*listed).code == 0
    assert_refused(bare(*refused), 2, "meter")


def test_help_names_every_command(bare: Meterfall) -> None:
    text = bare.done("--help")
    for command in (
        "migrate", "worker", "emit", "check", "reserve", "capture", "settle", "release", "charge", "remaining",
        "plan-backend", "holds", "plans", "catalogue", "account", "reverse", "usage", "explain", "dead", "cache",
        "verify", "status",
    ):  # fmt: skip
        assert f" {command} " in text
    without = bare()
    assert (without.code, without.err) == (2, "")
    assert "Usage:" in without.out


def test_plans_lists_what_the_catalogue_says(bare: Meterfall) -> None:
    listed = bare.done("plans", "--json")
    catalogue = load_catalogue(DEFAULT_CATALOGUE)
    assert {(row["plan"], row["meter"]) for row in listed} == {
        (code, meter) for code, plan in catalogue.plans.items() for meter in plan.meters
    }
    (basic,) = [row for row in listed if (row["plan"], row["meter"]) == ("basic", METER)]
    assert basic == {
        "plan": "basic", "tier": 1, "month_cents": 900, "year_cents": 9_000, "meter": METER, "quantity": 100_000,
        "cadence": "subscription", "rollover_cap": 1_000_000,
    }  # fmt: skip
    assert [row["quantity"] for row in listed if row["plan"] == "max_relay"] == ["unlimited"]
    table = bare.done("plans")
    assert [code for code in catalogue.plans if code not in table] == []


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
            (["reserve", USER, METER, "1", "k", "--ttl-seconds", "0"], {}, ["ttl_seconds", "1 to 86400"]),
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
            (["status"], down, ["REDIS_URL", tcp]),
            (["status"], in_query, ["REDIS_URL", socket]),
            (["holds", "list"], down, ["REDIS_URL", tcp]),
            (["cache", "reset"], down, ["REDIS_URL", tcp]),
            (["worker", "run", "--burst"], down, ["REDIS_URL", tcp]),
        ],
        code=1,
    )
    assert rows(settings, "SELECT epoch FROM ledger") == [(1,)]


def test_without_redis_a_check_answers_as_the_setting_says(meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    down = {"REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:1/0"}
    answers = {}
    for mode in ("deny", "ledger", "allow"):
        done = meterfall("check", USER, METER, "100", "--json", METERFALL_REDIS_DOWN=mode, **down)
        answers[mode] = (done.code, checked(json.loads(done.out)).reason)
    assert answers == {
        "deny": (1, Reason.REDIS_DOWN_DENIED),
        "ledger": (0, Reason.WITHIN_LIMIT),
        "allow": (0, Reason.REDIS_DOWN_ALLOWED),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pre-flight


def test_a_hold_from_check_to_settle(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    assert stream_of(redis, settings, USER) == [{b"v": b"1", b"r": USER.encode()}], "a worker is asked to publish it"
    answer = checked(meterfall.done("check", USER, METER, "100000", "--json"))
    assert (answer.allowed, answer.reason, answer.available) == (True, Reason.WITHIN_LIMIT, 100_000)
    assert "Denied: 100,001 of" in meterfall("check", USER, METER, "100001").out
    held = HoldAnswer.model_validate(meterfall.done("reserve", USER, METER, "600", "job-1", "--json"))
    assert (held.state, held.amount, held.left) == (HoldState.HELD, 600, 600)
    assert meterfall.done("reserve", USER, METER, "600", "job-1", "--json") == held.model_dump(mode="json")
    page = EventAnswer.model_validate(meterfall.done("capture", USER, METER, "job-1", "page-1", "200", "--json"))
    assert (page.event_id, page.amount, page.hold, page.repeated) == ("page-1", 200, HoldState.HELD, False)
    (listed,) = meterfall.done("holds", "list", "--user", USER, "--json")
    assert (listed["key"], listed["amount"], listed["left"], listed["meter"]) == ("job-1", 600, 400, METER)
    assert meterfall.done("holds", "show", USER, "job-1", "--json")["amount"] == "600"
    settled = EventAnswer.model_validate(
        meterfall.done("settle", USER, METER, "job-1", "350", "--source", "tts", "-d", "voice_slug=narrator", "--json")
    )
    assert (settled.event_id, settled.amount, settled.hold) == ("job-1", 350, HoldState.HELD)
    sent = [UsageEvent.model_validate_json(fields[b"e"]) for fields in stream_of(redis, settings, USER)[1:]]
    assert [(event.event_id, event.quantity, event.source, event.dimensions) for event in sent] == [
        ("page-1", 200, None, None),
        ("job-1", 350, "tts", {"voice_slug": "narrator"}),
    ]
    assert meterfall.done("holds", "list", "--user", USER) == "none\n"


def test_a_denial_is_exit_code_1_and_says_why(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    denied = meterfall("check", USER, METER, "100001", "--json")
    assert (denied.code, denied.err) == (1, "")
    assert checked(json.loads(denied.out)).reason is Reason.LIMIT_EXCEEDED
    why = ["limit_exceeded", "available 100000", METER, USER]
    assert_refused(meterfall("charge", USER, METER, "100001", "e1"), 1, *why)
    assert_refused(meterfall("reserve", USER, METER, "100001", "job-1", "--json"), 1, *why)
    assert_refused(meterfall("charge", "nobody", METER, "1", "e1"), 1, "unknown_account", "nobody")
    charged = ChargeAnswer.model_validate(meterfall.done("charge", USER, METER, "70", "e1", "--json"))
    assert (charged.amount, charged.expected.from_subscription, charged.repeated) == (70, 70, False)
    again = meterfall.done("charge", USER, METER, "70", "e1", "--json")
    assert again == charged.model_dump(mode="json") | {"repeated": True}
    assert_refused(meterfall("charge", USER, METER, "71", "e1"), 1, "e1", "70")
    assert pending_of(redis, settings, USER, METER) == {"e:e1": 70, "total": 70}


def test_a_sub_cap_counts_and_a_backend_is_planned_by_it(
    settings: Settings, redis: Redis, meterfall: Meterfall
) -> None:
    relay, on_gemini = "relay_credits", ("--backend", "gemini")
    meterfall.done("account", "open", USER, "core")
    assert meterfall.done("reserve", USER, relay, "60", "job-1", *on_gemini, "--json")["backend"] == "gemini"
    meterfall.done("charge", USER, relay, "30", "e1", *on_gemini)
    meterfall.done("capture", USER, relay, "job-1", "page-1", "10", *on_gemini)
    meterfall.done("settle", USER, relay, "job-1", "50", *on_gemini)
    pending = {"e:e1": 30, "e:page-1": 10, "e:job-1": 50, "total": 90}
    assert pending_of(redis, settings, USER, f"{relay}/gemini") == pending == pending_of(redis, settings, USER, relay)
    denied = meterfall("check", USER, relay, "11", *on_gemini, "--json")
    assert (denied.code, denied.json["reason"], denied.json["cap"]) == (1, "backend_cap_exceeded", 100)
    assert_refused(meterfall("charge", USER, relay, "11", "e2", *on_gemini), 1, "backend_cap_exceeded", "on gemini")
    assert meterfall.done("check", USER, relay, "11", "--json")["allowed"]
    left = Remaining.model_validate(meterfall.done("remaining", USER, "--json"))
    assert (left.kind, left.remaining, left.backends[0].remaining) == ("lifetime", 410, 10)
    assert "gemini 10 of 100" in meterfall.done("remaining", USER)
    meterfall.done("charge", USER, relay, "10", "e3", *on_gemini)
    planned = ["plan-backend", USER, "gemini_first", "--json"]
    assert RoutingAnswer.model_validate(meterfall.done(*planned, "--hardware")).backend == "hardware"
    refused = meterfall(*planned)
    assert (refused.code, refused.json["reason"]) == (1, "gemini_cap_exceeded_no_hardware")


def test_a_hold_is_given_back_once(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    for key in ("job-1", "job-2"):
        meterfall.done("reserve", USER, METER, "5", key)
    assert_refused(meterfall("reserve", USER, METER, "6", "job-1"), 1, "job-1", "5")
    for command, key in (("release",), "job-1"), (("holds", "release"), "job-2"):
        given = HoldAnswer.model_validate(meterfall.done(*command, USER, METER, key, "--json"))
        assert (given.key, given.state, given.left) == (key, HoldState.HELD, 0)
    again = HoldAnswer.model_validate(meterfall.done("release", USER, METER, "job-1", "--json"))
    assert again.state is HoldState.RELEASED
    assert_refused(meterfall("reserve", USER, METER, "5", "job-1"), 1, "job-1", "released")
    assert_refused(meterfall("holds", "show", USER, "job-9"), 2, "key", "job-9")
    assert pending_of(redis, settings, USER, METER) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Events


def test_emit_sends_lines_from_a_file_and_from_standard_input(
    settings: Settings, redis: Redis, meterfall: Meterfall, tmp_path: Path
) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text(
        "\n" + lines_of({"event_id": "a", "quantity": 10, "dimensions": {"model_slug": "m2"}}) + "\n", encoding="utf-8"
    )
    assert meterfall.done("emit", str(file)) == "1 event sent\n"
    assert meterfall.done("emit", "-", stdin=lines_of({"event_id": "b"}, {"event_id": "c"})) == "2 events sent\n"
    assert meterfall.done("emit", "-", stdin="") == "0 events sent\n"
    sent = stream_of(redis, settings, USER)
    events = [UsageEvent.model_validate_json(fields[b"e"]) for fields in sent]
    assert [(event.event_id, event.multiplier) for event in events] == [("a", "1.5"), ("b", "1"), ("c", "1")]
    assert all(b"m" in fields for fields in sent), "emitted events are counted as pending"
    assert pending_of(redis, settings, USER, METER) == {"e:a": 15, "e:b": 1, "e:c": 1, "total": 17}


def test_a_malformed_line_sends_nothing(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    good = lines_of({"event_id": "a"})
    bad: list[tuple[str, str]] = [
        ("{", "JSON"),
        ("[]", "event"),
        (lines_of({}), "event_id"),
        (lines_of({"event_id": "b", "quantity": -1}), "quantity"),
        (lines_of({"event_id": "b", "quantity": 1.5}), "quantity"),
        (lines_of({"event_id": "b", "price": 1}), "price"),
        (lines_of({"event_id": "b", "occurred_at": "2026-11-20T10:00:00"}), "occurred_at"),
        (lines_of({"event_id": "b", "dimensions": {"a": {"b": 1}}}), "dimensions.a"),
    ]

    for line, named in bad:
        assert_refused(meterfall("emit", "-", stdin=good + line), 2, "line 2", named)
    assert backlog(settings, redis) == 0


def test_an_event_that_every_worker_would_refuse_is_not_sent(
    settings: Settings, redis: Redis, meterfall: Meterfall
) -> None:
    good = lines_of({"event_id": "a"})
    unknown = good + lines_of({"event_id": "b", "meter": "voice"})
    too_much = good + lines_of({"event_id": "b", "quantity": 10**12, "dimensions": {"model_slug": "m3"}})
    assert_refused(meterfall("emit", "-", stdin=unknown), 2, "line 2", "meter", "premium_voice")
    assert_refused(meterfall("emit", "-", stdin=too_much), 2, "line 2", "multiplier", "1000000000000")
    assert backlog(settings, redis) == 0


def test_raw_is_a_plain_xadd(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    line = '{"user_id":  "user-42", "anything": [1, 2]}'
    assert meterfall.done("emit", "--raw", "-", stdin=line + "\n") == "1 event sent\n"
    assert stream_of(redis, settings, USER) == [{b"v": b"1", b"e": line.encode()}]
    assert pending_of(redis, settings, USER, METER) == {}
    for bad in ("{}", "[]", "no", '"user-42"', "[" * 100_000, '{"user_id": "\\ud800"}'):
        assert_refused(meterfall("emit", "--raw", "-", stdin=f"{line}\n{bad}\n"), 2, "line 2", "user_id")
    assert backlog(settings, redis) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Accounts


def test_no_table_cuts_anything_off_however_narrow_the_terminal(meterfall: Meterfall) -> None:
    key = "order-" + "0123456789" * 6
    meterfall.done("account", "open", USER, "basic", "--period-end", "2036-12-01T00:00:00Z")
    meterfall.done("account", "grant", USER, METER, "123456789", "--key", key)
    told = {
        ("account", "list"): (USER, "basic", METER, "123456789", "123556789", "2036-12-0100:00:00Z"),
        ("account", "show", USER): (METER, "100000", "123456789", "2036-12-0100:00:00Z"),
        ("usage", USER): ("purchased", METER, "123456789", "123556789", "2036-12-0100:00:00Z"),
        ("usage", USER, "--timeline"): (f"grant:{key}", "purchased123456789", "open_meter"),
        ("plans",): ("server_kokoro", "subscription", "10000000", "rollover_cap"),
    }
    for command, parts in told.items():
        for columns in (60, 76, 80, 100):
            table = meterfall.done(*command, COLUMNS=str(columns))
            assert max(map(len, table.splitlines()[1:])) <= columns, command
            assert "…" not in table, command
            cells = [re.split("[│┃]", line)[1:-1] for line in table.splitlines() if line[0] in "│┃"]
            text = "".join(itertools.chain.from_iterable(itertools.zip_longest(*cells, fillvalue="")))
            missing = [part for part in parts if part not in text.replace(" ", "")]
            assert missing == [], (command, columns)


def test_an_account_is_opened_granted_shown_and_changed(meterfall: Meterfall) -> None:
    bounds = ["--period-start", "2026-11-01T00:00:00Z", "--period-end", "2036-12-01T00:00:00+01:00"]
    opened = meterfall.done("account", "open", USER, "basic", "--status", "past_due", *bounds, "--json")
    assert (opened["user_id"], opened["plan"], opened["status"], opened["trust"]) == (USER, "basic", "past_due", "new")
    assert set(opened["balances"]) == {"server_kokoro", METER, "ocr_tokens"}
    voice = opened["balances"][METER]
    assert (voice["allowance"], voice["used"], voice["rollover"], voice["purchased"]) == (100_000, 0, 0, 0)
    assert (voice["period_start"], voice["period_end"]) == ("2026-11-01T00:00:00+00:00", "2036-11-30T23:00:00+00:00")
    grant = ["account", "grant", USER, METER]
    granted = meterfall.done(*grant, "250", "--key", "order-1", "--json")
    assert (granted["balances"][METER]["purchased"], granted["version"]) == (250, opened["version"] + 1)
    assert meterfall.done(*grant, "250", "--key", "order-1", "--json") == {**granted, "repeated": True}
    assert_refused(meterfall(*grant, "251", "--key", "order-1"), 2, "key", "order-1", "250")
    changed = meterfall.done("account", "set-status", USER, "unpaid", "--json")
    assert (changed["status"], changed["version"]) == ("unpaid", granted["version"] + 1)
    shown = meterfall.done("account", "show", USER, "--json")
    name = shown.pop("name_in_logs")
    assert {**shown, "repeated": False, "stale": False, "debt": 0} == changed
    table = meterfall.done("account", "show", USER)
    assert name.startswith("user:")
    assert f"in logs: {name}" in table
    assert table.startswith(f"{USER}: plan basic, unpaid")
    assert METER in table


def test_an_account_command_that_cannot_be_carried_out_names_the_field(
    settings: Settings, meterfall: Meterfall
) -> None:
    meterfall.done("account", "open", USER, "basic")
    before = rows(settings, "SELECT * FROM ledger_entry ORDER BY seq")
    opening, grant = ["account", "open", "user-9"], ["account", "grant", USER]
    ids = ["user_id", "1 to 128 characters"]
    assert_all_refused(
        meterfall,
        [
            (["account", "open", USER, "basic"], {}, ["user_id", USER, "already"]),
            ([*opening, "gold"], {}, ["plan", "gold", "basic"]),
            ([*opening, "basic", "--status", "suspended"], {}, ["status", "trialing"]),
            ([*opening, "basic", "--period-end", "2020-01-01T00:00:00Z"], {}, ["period_end", "after"]),
            ([*opening, "basic", "--period-start", "0001-01-01T00:00:00+14:00"], {}, ["--period-start"]),
            ([*opening, "free", "--period-start", "9999-12-31T00:00:00Z"], {}, ["period_start", "9999"]),
            ([*opening, "tenant", "--period-start", "9999-12-01T00:00:00Z"], {}, ["period_start", "9999"]),
            (["account", "renew", USER, "i", "9999-12-01T00:00:00Z", "9999-12-31T00:00:00Z"], {}, ["period_start"]),
            (["account", "open", "two words", "basic"], {}, ids),
            (["account", "open", 'a","b', "basic"], {}, ids),
            (["account", "open", 'a"b', "basic"], {}, ids),
            (["account", "open", "é", "basic"], {}, ids),
            (["account", "open", "x" * 129, "basic"], {}, ids),
            (["account", "open", "", "basic"], {}, ids),
            (["account", "show", "user-9"], {}, ["user_id", "user-9"]),
            (["account", "show", 'a"b'], {}, ["user_id"]),
            (["account", "set-status", USER, "suspended"], {}, ["status", "past_due"]),
            (["account", "set-status", 'a"b', "active"], {}, ["user_id"]),
            (["account", "set-status", "user-9", "active"], {}, ["user_id", "user-9"]),
            (
                ["account", "change-plan", USER, "plus", "--at", "period_end", "--period-end", "2036-01-01T00:00:00Z"],
                {},
                ["--period-end", "--at now"],
            ),
            ([*grant, METER, "0", "--key", "k"], {}, ["amount", "1"]),
            ([*grant, METER, "1000000000001", "--key", "k"], {}, ["amount", "1000000000000"]),
            ([*grant, "voice", "5", "--key", "k"], {}, ["meter", "premium_voice"]),
            ([*grant, "relay_credits", "5", "--key", "k"], {}, ["meter", "relay_credits"]),
            ([*grant, METER, "5", "--key", ""], {}, ["key", "1 to 128 characters"]),
            (["account", "grant", 'a"b', METER, "5", "--key", "k"], {}, ["user_id"]),
        ],
    )
    assert rows(settings, "SELECT * FROM ledger_entry ORDER BY seq") == before
    assert rows(settings, "SELECT user_id FROM account") == [(USER,)]


def test_accounts_are_exported_and_imported(meterfall: Meterfall, tmp_path: Path) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("account", "open", "user-9", "tenant")
    folder = tmp_path / "out"
    folder.mkdir()
    file = folder / "accounts.jsonl"
    assert meterfall.done("account", "export", str(file)) == f"2 accounts written to {file}\n"
    assert list(folder.iterdir()) == [file]
    text = file.read_text(encoding="utf-8")
    assert meterfall.done("account", "export") == meterfall.done("account", "export", "-") == text

    first, second = text.splitlines()
    wrong = second.replace('"used":0', '"used":"[/x]"').replace("user-9", "user-10")
    file.write_text("\n".join([first.replace(USER, "user-11"), wrong, second]), encoding="utf-8")
    missing = str(folder / "none" / "file")
    assert_all_refused(
        meterfall,
        [
            (
                ["account", "import", str(file)],
                {},
                ["row 2: meters.credits.used: must be", "[/x]", "and 1 more bad row"],
            ),
            (["account", "import", missing], {}, ["file", "No such file"]),
            (["account", "export", missing], {}, ["file", "No such file"]),
        ],
    )
    listed = meterfall.done("account", "import", str(file), "--skip-bad", "--json")
    assert listed["accounts"] == 1
    assert [(bad["row"], bad["user_id"], bad["field"]) for bad in listed["bad"]] == [
        (2, "user-10", "meters.credits.used"),
        (3, "user-9", "user_id"),
    ]
    shown = meterfall.done("account", "import", "-", "--skip-bad", stdin=wrong)
    assert "must be a valid integer (got '[/x]')" in shown
    assert shown.endswith("0 accounts imported, 1 bad row skipped\n")
    relay = json.dumps({"rows": {"i1": {"tier_snapshot": "max"}}})
    assert meterfall.done("account", "import", "-", stdin=relay) == "1 account imported\n"
    assert meterfall.done("account", "show", "i1", "--json")["plan"] == "max_relay"
    meterfall.done("verify")


def test_usage_is_reported_in_tables_and_as_json(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("account", "open", "relay-1", "max_relay")
    facts = {"voice_slug": "narrator", "document_id": "d1", "page_idx": 1}
    sent = [
        {"user_id": USER, "event_id": f"e{number}", "meter": METER, "quantity": 100, "dimensions": facts}
        for number in range(3)
    ]
    meterfall.done("emit", "-", stdin=lines_of(*sent))
    drain(settings, USER)

    summary = UsageSummary.model_validate_json(meterfall("usage", USER, "--json").out)
    (meter,) = [each for each in summary.meters if each.meter == METER]
    assert (meter.limit, meter.used, meter.available) == (100_000, 300, 99_700)
    broken = Breakdown.model_validate_json(meterfall("usage", USER, "--breakdown", "--json").out)
    assert [(voice.voice, voice.events, voice.amount) for voice in broken.voices] == [("narrator", 3, 300)]
    assert [(document.document_id, document.pages) for document in broken.documents] == [("d1", 1)]
    life = Engagement.model_validate_json(meterfall("usage", USER, "--engagement", "--json").out)
    assert (life.characters, life.syntheses, life.documents, life.pages) == (300, 3, 1, 1)
    page = Timeline.model_validate_json(meterfall("usage", USER, "--timeline", "--limit", "2", "--json").out)
    assert [change.what for change in page.changes] == ["e2", "e1"]
    older = meterfall("usage", USER, "--timeline", "--limit", "1", "--before-seq", str(page.more_before_seq))
    assert "e0" in older.out
    assert older.err == "older changes: --before-seq 5\n"

    for options, shown in (
        ([], ["Basic (basic), active", "99700"]),
        (["--breakdown"], ["narrator", "d1"]),
        (["--engagement"], ["syntheses", "narrator"]),
        (["--timeline"], ["open_meter", "from_subscription 100"]),
    ):
        table = meterfall.done("usage", USER, *options)
        assert [word for word in shown if word not in table] == []
    listed = meterfall.done("account", "list", "--json")
    assert [each["user_id"] for each in listed] == ["relay-1", USER]
    assert meterfall.done("account", "list", "--after", USER, "--json") == []
    assert len(meterfall.done("account", "list", "--limit", "1", "--json")) == 1
    assert "unlimited" in meterfall.done("account", "list")


def test_a_table_shows_what_a_terminal_would_obey(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    voice = "\x1b[2J[red]用户\n"
    meterfall.done(
        "emit",
        "-",
        stdin=lines_of(
            {"user_id": USER, "event_id": "e", "meter": METER, "quantity": 1, "dimensions": {"voice_slug": voice}}
        ),
    )
    drain(settings, USER)
    table = meterfall.done("usage", USER, "--breakdown")
    assert r"\x1b[2J[red]用户\n" in table
    assert "\x1b" not in table


def test_the_timeline_says_what_became_of_plan_and_status(meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic", "--status", "trialing", "--period-end", "2036-12-01T00:00:00Z")
    meterfall.done("account", "set-status", USER, "active")
    meterfall.done("account", "change-plan", USER, "free", "--at", "period_end")
    meterfall.done("account", "set-status", USER, "canceled", "--at", "period_end")
    meterfall.done("account", "change-plan", USER, "plus")
    meterfall.done("account", "change-plan", USER, "max", "--at", "period_end")
    meterfall.done("account", "set-status", USER, "active")
    meterfall.done("account", "change-plan", USER, "plus", "--at", "period_end")
    table = meterfall.done("usage", USER, "--timeline")
    told = [
        "trialing → active",
        "free from 2036-12-01T00:00:00Z",
        "free from 2036-12-01T00:00:00Z, canceled from 2036-12-01T00:00:00Z",
        "basic → plus",
        "allowance 300000",
        "unlimited",
        "max from the next renewal, canceled from 2036-12-01T00:00:00Z",
        "stays active",
        "nothing",
    ]
    assert [words for words in told if words not in table] == []
    closed = meterfall.done("account", "close", USER, "--yes").split()[-1]
    assert "active → closed" in meterfall.done("usage", closed, "--timeline")


def test_an_event_is_explained_in_words_and_as_json(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("emit", "-", stdin=lines_of({"user_id": USER, "event_id": "e1", "meter": METER, "quantity": 7}))
    drain(settings, USER)
    said = meterfall.done("explain", USER, "e1")
    assert said.startswith(f"Event e1 used 7 of {METER} (characters).\nThe subscription paid 7 of the 100,000 left")
    found = Explanation.model_validate_json(meterfall("explain", USER, "e1", "--json").out)
    assert found.parts == Parts(from_subscription=7)
    assert said.splitlines()[: len(found.sentences)] == list(found.sentences)


def test_a_report_that_cannot_be_made_names_the_field(meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    cases: list[Case] = [
        (["usage", "nobody"], {}, ["user_id", "nobody"]),
        (["usage", "no body", "--breakdown"], {}, ["user_id", "no body"]),
        (["usage", USER, "--breakdown", "--engagement"], {}, ["--breakdown", "--engagement"]),
        (["usage", USER, "--breakdown", "--limit", "0"], {}, ["documents", "0"]),
        (["usage", USER, "--breakdown", "--after", "d1"], {}, ["after", "meter/document"]),
        (["usage", USER, "--limit", "5"], {}, ["--limit"]),
        (["usage", USER, "--timeline", "--after", "m/d"], {}, ["--after", "--breakdown"]),
        (["usage", USER, "--before-seq", "4"], {}, ["--before-seq", "--timeline"]),
        (["usage", USER, "--timeline", "--before-seq", "0"], {}, ["before_seq", "0"]),
        (["explain", USER, "e404"], {}, ["event_id", "e404"]),
        (["account", "list", "--limit", "0"], {}, ["limit", "1"]),
    ]
    assert_all_refused(meterfall, cases)


# ---------------------------------------------------------------------------------------------------------------------
# Operating


def test_dead_letters_are_listed_shown_replayed_and_dropped(
    settings: Settings, redis: Redis, meterfall: Meterfall
) -> None:
    meterfall.done("emit", "--raw", "-", stdin='{"user_id": "user-42"}\n{"user_id": "user-42", "x": "\\u0000"}\n')
    drain(settings, USER)
    first, second = meterfall.done("dead", "list", "--json")
    assert set(first) == {"id", "partition", "entry_id", "reason", "detail", "created_at"}
    assert (first["partition"], first["reason"]) == (partition_of(settings, USER).number, "missing_field")
    number, other = str(first["id"]), str(second["id"])
    assert [one["id"] for one in meterfall.done("dead", "list", "--limit", "1", "--json")] == [first["id"]]
    shown = meterfall.done("dead", "show", number, "--json")
    assert (shown["payload"], shown["state"], shown["resolved_at"]) == ('{"user_id": "user-42"}', "open", None)
    entry_id = meterfall.done("dead", "replay", number).split()[-1]
    assert re.fullmatch(r"[0-9]+-[0-9]+", entry_id)
    assert stream_of(redis, settings, USER) == [{b"v": b"1", b"e": b'{"user_id": "user-42"}'}]
    assert meterfall.done("dead", "drop", other) == f"dropped {other}\n"
    assert_refused(meterfall("dead", "replay", number), 2, number, "replayed already")
    assert_refused(meterfall("dead", "drop", other), 2, other, "dropped already")
    assert meterfall.done("dead", "list") == "none\n"
    assert [one["id"] for one in meterfall.done("dead", "list", "--state", "dropped", "--json")] == [second["id"]]


def test_many_dead_letters_are_replayed_or_dropped_at_once(
    settings: Settings, redis: Redis, meterfall: Meterfall
) -> None:
    unknown = [
        {"event_id": f"e{n}", "user_id": USER, "meter": "brand_new", "quantity": 1} for n in range(4)
    ]  # fmt: skip
    lines = [*map(json.dumps, unknown), '{"user_id": "user-42"}', json.dumps({**unknown[0], "source": "x" * 300})]
    meterfall.done("emit", "--raw", "-", stdin="\n".join(lines))
    drain(settings, USER)
    ids = {row["detail"] or row["id"]: row["id"] for row in meterfall.done("dead", "list", "--json")}
    assert len(ids) >= 2
    one, two, *_ = (row["id"] for row in meterfall.done("dead", "list", "--reason", "unknown_meter", "--json"))
    assert meterfall.done("dead", "drop", str(one), str(two)) == "2 dead letters dropped, 0 left\n"
    refused = meterfall("dead", "replay", str(one), "99")
    assert (refused.code, refused.out) == (1, "0 dead letters sent again, 2 left\n")
    assert refused.err.splitlines() == [f"{one}: is dropped already", "id: no dead letter 99"]
    assert meterfall.done("dead", "replay", "--reason", "unknown_meter") == "2 dead letters sent again, 0 left\n"
    assert [json.loads(entry[b"e"])["event_id"] for entry in stream_of(redis, settings, USER)] == ["e2", "e3"]
    assert meterfall.done("dead", "drop", "--reason", "unknown_meter") == "0 dead letters dropped, 0 left\n"
    assert {row["reason"] for row in meterfall.done("dead", "list", "--json")} == {"missing_field", "bad_source"}


def test_a_wrong_question_about_dead_letters_is_not_answered_with_none(meterfall: Meterfall) -> None:
    assert_all_refused(
        meterfall,
        [
            (["dead", "show", "7"], {}, ["id", "7"]),
            (["dead", "replay", "7"], {}, ["id", "7"]),
            (["dead", "drop", "99999999999999999999999"], {}, ["id"]),
            (["dead", "drop"], {}, ["id", "--reason"]),
            (["dead", "replay", "7", "--reason", "id_conflict"], {}, ["id", "--reason"]),
            (["partition", "move", "3"], {}, ["partition 3", "8"]),
            (["dead", "list", "--state", "closed"], {}, ["state", "open", "replayed", "dropped"]),
            (["dead", "list", "--reason", "bad_luck"], {}, ["reason", "id_conflict"]),
            (["dead", "list", "--limit", "99999999999999999999999"], {}, ["limit"]),
        ],
    )


def test_verify_is_clean_or_names_what_is_wrong(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "a", "quantity": 5}))
    drain(settings, USER)
    clean = meterfall.done("verify", "--json")
    assert (clean["accounts"], clean["differences"]) == (1, 0)
    assert clean["changes"] > 1
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as postgres:
        postgres.execute("UPDATE balance SET used = 4 WHERE meter = %s", (METER,))
    found = meterfall("verify", "--json")
    assert (found.code, found.json["differences"]) == (1, len(found.err.splitlines()))
    assert found.json["differences"] >= 1
    assert USER in found.err
    assert METER in found.err


def test_status_counts_what_waits_and_a_new_epoch_forgets_what_is_cached(
    settings: Settings, redis: Redis, meterfall: Meterfall
) -> None:
    meterfall.done("account", "open", USER, "basic")
    drain(settings, USER)
    meterfall.done("check", USER, METER)
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "a"}, {"event_id": "b"}))
    found = meterfall.done("status", "--json")
    assert {"partitions", "accounts", "dead_letters", "waiting_jobs"} <= set(found)
    assert (found["accounts"], found["dead_letters"]) == (1, 0)
    assert [set(partition) for partition in found["partitions"]] == [set(PartitionStatus._fields)] * 9
    assert [partition["partition"] for partition in found["partitions"]] == [*range(8), "sponsor"]
    own = found["partitions"][partition_of(settings, USER).number]
    assert (own["partition"], own["lag"], own["pending"], own["halted"]) == (
        partition_of(settings, USER).number,
        2,
        2,
        "",
    )
    assert own["per_second"] > 0, "the refresh entry was disposed of a moment ago"
    assert sum(partition["lag"] for partition in found["partitions"]) == 2
    assert "accounts 1, open dead letters 0" in meterfall.done("status")
    meterfall("pool", "decide", USER, "1", "request-1")
    patterns = (keys.BALANCE_PATTERN, keys.STANDING_PATTERN, keys.SPONSORSHIP.pool)
    assert [len(list(redis.scan_iter(pattern))) for pattern in patterns] == [1, 1, 1]
    epoch = int(meterfall.done("cache", "reset").removeprefix("epoch "))
    assert abs(epoch - datetime.now(UTC).timestamp()) < 60, "two restores of one backup must not begin the same epoch"
    assert [len(list(redis.scan_iter(pattern))) for pattern in patterns] == [0, 0, 0]
    assert rows(settings, "SELECT epoch FROM ledger") == [(epoch,)]
    assert meterfall.done("cache", "reset") > f"epoch {epoch}\n", "also within the same second"
    assert meterfall.done("check", USER, METER, "--json")["pending"] == 2


def test_a_partition_is_paused_listed_and_resumed(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    partition = str(partition_of(settings, USER).number)
    meterfall.done("account", "open", USER, "basic")
    drain(settings, USER)
    said = meterfall.done("partition", "pause", partition, "--reason", "looking into it", "--by", "jane")
    assert said.startswith(f"partition {partition} is paused by jane since 20")
    assert meterfall.done("partition", "pause", partition, "--reason", "again", "--by", "joe") == said
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "a"}))
    drain(settings, USER)
    found = {row["partition"]: row for row in meterfall.done("partition", "list", "--json")}
    assert list(found) == [*range(8), "sponsor"]
    own = found[int(partition)]
    assert (own["state"], own["lag"], own["paused_by"], own["reason"]) == ("paused", 1, "jane", "looking into it")
    assert {row["state"] for name, row in found.items() if name != int(partition)} == {"drained"}
    assert "looking into it" in meterfall.done("partition", "list")
    assert f"`meterfall partition resume {partition}`" in meterfall.done("status")
    assert meterfall.done("check", USER, METER, "--json")["pending"] == 1
    assert meterfall.done("partition", "resume", partition, USER="joe") == f"partition {partition} is resumed\n"
    assert meterfall.done("partition", "resume", partition) == f"partition {partition} was not paused\n"
    drain(settings, USER)
    assert rows(settings, "SELECT event_id FROM usage_log") == [("a",)]
    assert rows(settings, "SELECT resumed_by FROM partition_pause") == [("joe",)]
    assert "resume" not in meterfall.done("status")


def test_the_stream_of_the_pool_is_paused_by_its_name(meterfall: Meterfall) -> None:
    paused = meterfall.done("partition", "pause", "sponsor", "--reason", "looking into it")
    assert paused.startswith("partition sponsor is paused by ")
    assert meterfall.done("partition", "resume", "sponsor") == "partition sponsor is resumed\n"
    allowed = ["partition", "0 to 7", "sponsor"]
    assert_all_refused(
        meterfall,
        [
            (["partition", "pause", "8", "--reason", "x"], {}, allowed),
            (["partition", "pause", "p3", "--reason", "x"], {}, allowed),
            (["partition", "resume", "03"], {}, allowed),
            (["partition", "pause", "3"], {}, ["--reason"]),
        ],
    )


def test_signing_is_a_matter_of_settings(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    key = {"METERFALL_SIGNING_KEYS": "tts=" + "5" * 32}
    meterfall.done("account", "open", USER, "basic")
    line = lines_of({"event_id": "a", "quantity": -1})
    meterfall.done("emit", "--raw", "-", stdin=line, **key)
    meterfall.done("emit", "--raw", "-", stdin=line)
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "b"}), **key)
    signed = [b"s" in fields for fields in stream_of(redis, settings, USER) if b"e" in fields]
    assert signed == [True, False, True]
    required = {"signatures": "required", "signing_keys": key["METERFALL_SIGNING_KEYS"]}
    drain(settings_for(settings.database_url, settings.redis_url, **required), USER)
    letters = {row["reason"]: str(row["id"]) for row in meterfall.done("dead", "list", "--json")}
    assert set(letters) == {"bad_quantity", "missing_signature"}
    assert meterfall.done("dead", "show", letters["bad_quantity"], "--json")["signed_by"] == "tts"
    assert "1 bad_quantity, 1 missing_signature" in meterfall.done("status")
    strict = key | {"METERFALL_SIGNATURES": "required"}
    unsigned = letters["missing_signature"]
    assert_refused(meterfall("dead", "replay", unsigned, **strict), 2, unsigned, "no key vouches", "--vouch")
    meterfall.done("dead", "replay", unsigned, "--vouch", **strict)
    meterfall.done("dead", "replay", letters["bad_quantity"], **strict)
    assert [b"s" in fields for fields in stream_of(redis, settings, USER)] == [True, True]
    wrong = {"METERFALL_SIGNING_KEYS": "tts=" + "5" * 31}
    assert_refused(meterfall("status", **wrong), 2, "METERFALL_SIGNING_KEYS", "key 1", "32 to 256")
    assert "5" * 31 not in meterfall("status", **wrong).err


def test_a_database_without_a_ledger_says_what_to_do(meterfall: Meterfall) -> None:
    meterfall.done("migrate", "base")
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


# ---------------------------------------------------------------------------------------------------------------------
# The sponsorship pool


def test_the_pool_covers_a_request_from_the_first_decision_to_the_books(
    settings: Settings, meterfall: Meterfall
) -> None:
    meterfall.done("account", "open", USER, "basic")
    assert meterfall("pool", "decide", USER, "40", "request-1", "--json").json["reason"] == "no_budget"
    assert meterfall.done("account", "set-trust", USER, "trusted", "--json")["trust"] == "trusted"
    drain_pool(settings)
    decided = meterfall.done("pool", "decide", USER, "40", "request-1", "--json")
    assert (decided["serve"], decided["absorb"], decided["charge"]) == ("free", 40, 0)
    assert meterfall.done("pool", "status", "--json")["held"] == 40
    advised = meterfall.done("pool", "decide", USER, "200", "request-2", "--json")
    assert (advised["serve"], advised["absorb"], advised["charge"]) == ("partial", 160, 40)
    confirmed = meterfall.done("pool", "confirm", USER, "200", "request-2", "40", "--json")
    assert (confirmed["absorb"], confirmed["outstanding"]) == (160, 0)
    assert meterfall("pool", "decide", USER, "1", "request-3").code == 1, "the budget is spent"
    settled = meterfall.done("pool", "settle", USER, "request-1", "31", "--json")
    assert (settled["absorbed"], settled["returned"]) == (31, 9)
    assert meterfall.done("pool", "release", USER, "request-2", "no answer came", "--json")["state"] == "held"
    assert meterfall.done("pool", "credit", "order-9", "509", "--json")["credited"] == 50
    meterfall.done("pool", "credit", "order-9", "509")
    drain_pool(settings)
    status = meterfall.done("pool", "status", "--json")
    assert (status["initial"], status["balance"], status["held"], status["available"]) == (10_000, 10_019, 0, 10_019)
    assert (status["absorbed_today"], status["budgets"]["trusted"]) == (31, 200)
    assert [(grant["user_id"], grant["absorbed"], grant["pool_after"]) for grant in status["grants"]] == [
        (USER, 31, 9_969)
    ]
    assert meterfall.done("verify", "--json")["differences"] == 0


def test_an_estimate_says_who_would_pay_and_fails_when_nobody_would(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    found = meterfall.done("estimate", USER, METER, "1000", "--model", "m2", "--json")
    assert (found["amount"], found["allowed"], found["expected"]["from_subscription"]) == (1_500, True, 1_500)
    beyond = meterfall("estimate", USER, METER, "1000000", "--json")
    assert (beyond.code, beyond.json["allowed"], beyond.json["check"]["reason"]) == (1, False, "limit_exceeded")
    said = meterfall.done("estimate", USER, METER, "5")
    assert "from_subscription" in said
    assert "gate: absorbs 0, leaves 5 to charge (no_budget)" in said


def test_what_is_wrong_with_a_sponsored_request_is_named(meterfall: Meterfall) -> None:
    assert_all_refused(
        meterfall,
        [
            (["pool", "decide", "a b", "40", "request-1"], {}, ["user_id"]),
            (["pool", "decide", USER, str(10**13), "request-1"], {}, ["estimate"]),
            (["pool", "decide", USER, "40", ""], {}, ["request_id"]),
            (["pool", "credit", "order-9", str(10**13)], {}, ["paid"]),
            (["pool", "status", "--grants", "1001"], {}, ["grants"]),
            (["account", "set-trust", USER, "friend"], {}, ["trust", "elite"]),
            (["estimate", USER, "voice", "1"], {}, ["meter", METER]),
        ],
    )
    nobody = meterfall("pool", "decide", "", "40", "request-1", "--json")
    assert (nobody.code, nobody.json["reason"]) == (1, "no_identity")
    unknown = meterfall("pool", "settle", USER, "request-1", "40")
    assert (unknown.code, unknown.out) == (1, "")
    assert "unknown" in unknown.err


def drain_pool(settings: Settings) -> None:
    """Drain the pool's stream in this process."""
    with worker_resources(settings) as resources:
        drain_stream(resources, keys.SPONSORSHIP)
