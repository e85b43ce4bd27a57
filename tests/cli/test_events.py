"""The commands that record usage and ask before it."""

from __future__ import annotations

import json
from pathlib import Path

from redis import Redis

from config.settings import Settings
from schemas.answers import (
    ChargeAnswer,
    Reason,
    Remaining,
    RoutingAnswer,
)
from schemas.events import UsageEvent
from tests.support.commands import METER, PASSWORD, USER, Meterfall, assert_refused, checked, lines_of
from tests.support.resources import settings_for
from tests.support.streams import drain, pending_of, stream_of
from worker.keyspace import keys


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


def test_a_malformed_line_sends_nothing(redis: Redis, meterfall: Meterfall) -> None:
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
    assert backlog(redis) == 0


def test_an_event_that_every_worker_would_refuse_is_not_sent(redis: Redis, meterfall: Meterfall) -> None:
    good = lines_of({"event_id": "a"})
    unknown = good + lines_of({"event_id": "b", "meter": "voice"})
    too_much = good + lines_of({"event_id": "b", "quantity": 10**12, "dimensions": {"model_slug": "m3"}})
    assert_refused(meterfall("emit", "-", stdin=unknown), 2, "line 2", "meter", "premium_voice")
    assert_refused(meterfall("emit", "-", stdin=too_much), 2, "line 2", "multiplier", "1000000000000")
    assert backlog(redis) == 0


def test_raw_is_a_plain_xadd(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    line = '{"user_id":  "user-42", "anything": [1, 2]}'
    assert meterfall.done("emit", "--raw", "-", stdin=line + "\n") == "1 event sent\n"
    assert stream_of(redis, settings, USER) == [{b"v": b"1", b"e": line.encode()}]
    assert pending_of(redis, settings, USER, METER) == {}
    for bad in ("{}", "[]", "no", '"user-42"', "[" * 100_000, '{"user_id": "\\ud800"}'):
        assert_refused(meterfall("emit", "--raw", "-", stdin=f"{line}\n{bad}\n"), 2, "line 2", "user_id")
    assert backlog(redis) == 1


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
    assert "1 bad_quantity, 1 missing_signature" in meterfall("status").out
    strict = key | {"METERFALL_SIGNATURES": "required"}
    unsigned = letters["missing_signature"]
    assert_refused(meterfall("dead", "replay", unsigned, **strict), 2, unsigned, "no key vouches", "--vouch")
    meterfall.done("dead", "replay", unsigned, "--vouch", **strict)
    meterfall.done("dead", "replay", letters["bad_quantity"], **strict)
    assert [b"s" in fields for fields in stream_of(redis, settings, USER)] == [True, True]
    wrong = {"METERFALL_SIGNING_KEYS": "tts=" + "5" * 31}
    assert_refused(meterfall("status", **wrong), 2, "METERFALL_SIGNING_KEYS", "key 1", "32 to 256")
    assert "5" * 31 not in meterfall("status", **wrong).err


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


def backlog(redis: Redis) -> int:
    return sum(redis.xlen(partition.entries) for partition in keys.partitions_of(8))
