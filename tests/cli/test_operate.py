"""The commands that look after a running meterfall."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

import psycopg
from redis import Redis

from config.settings import Settings
from schemas.codes import Refusal
from schemas.status import PartitionStatus, Status
from tests.support.commands import METER, USER, Meterfall, assert_all_refused, assert_refused, lines_of
from tests.support.ledger import rows
from tests.support.streams import drain, partition_of, stream_of
from worker.keyspace import keys
from worker.rules.remedies import REMEDIES


def test_dead_letters_are_listed_shown_replayed_and_dropped(
    settings: Settings, redis: Redis, meterfall: Meterfall
) -> None:
    meterfall.done("emit", "--raw", "-", stdin='{"user_id": "user-42"}\n{"user_id": "user-42", "x": "\\u0000"}\n')
    drain(settings, USER)
    first, second = meterfall.done("dead", "list", "--json")
    assert set(first) == {"id", "partition", "entry_id", "reason", "detail", "created_at"}
    assert (first["partition"], first["reason"]) == (partition_of(settings, USER).number, "missing_field")
    number, other = str(first["id"]), str(second["id"])
    page = meterfall("dead", "list", "--limit", "1", "--json")
    assert ([one["id"] for one in page.json], page.err) == ([first["id"]], f"1 of 2; the next: --after {first['id']}\n")
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


def test_more_than_ten_dead_letters_of_a_reason_are_not_disposed_of_by_a_word(
    settings: Settings, redis: Redis, meterfall: Meterfall
) -> None:
    lines = [json.dumps({"event_id": f"e{n}", "user_id": USER, "meter": "new", "quantity": 1}) for n in range(12)]
    meterfall.done("emit", "--raw", "-", stdin="\n".join(lines))
    drain(settings, USER)
    for command in ("drop", "replay"):
        refused = meterfall("dead", command, "--reason", "unknown_meter")
        assert_refused(refused, 2, "12 open dead letters", "unknown_meter", "nothing was done", "--yes")
    first = meterfall("dead", "list", "--limit", "10")
    assert (first.code, first.err.startswith("10 of 12; the next: --after ")) == (0, True)
    after = first.err.split()[-1]
    assert len(meterfall.done("dead", "list", "--after", after, "--json")) == 2
    number = str(partition_of(settings, USER).number)
    assert len(meterfall.done("dead", "list", "--partition", number, "--json")) == 12
    other = str((int(number) + 1) % settings.partitions)
    assert meterfall.done("dead", "list", "--partition", other) == "none\n"
    assert meterfall.done("dead", "list", "--since", "2999-01-01T00:00:00Z") == "none\n"
    assert meterfall.done("dead", "drop", "--reason", "unknown_meter", "--yes") == "12 dead letters dropped, 0 left\n"


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
    assert (clean["accounts"], clean["differences"]) == (1, [])
    assert clean["changes"] > 1
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as postgres:
        postgres.execute("UPDATE balance SET used = 4 WHERE meter = %s", (METER,))
    found = meterfall("verify", "--json")
    assert found.code == 1
    assert {(each["user_id"], each["meter"]) for each in found.json["differences"]} == {(USER, METER)}
    plain = meterfall("verify")
    assert plain.err.splitlines() == [each["text"] for each in found.json["differences"]]


def test_status_counts_what_waits_and_a_new_epoch_forgets_what_is_cached(
    settings: Settings, redis: Redis, meterfall: Meterfall
) -> None:
    meterfall.done("account", "open", USER, "basic")
    drain(settings, USER)
    meterfall.done("check", USER, METER)
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "a"}, {"event_id": "b"}))
    shown = meterfall("status", "--json")
    assert (shown.code, shown.json["severity"]) == (1, "down"), "no dyno is alive"
    found = shown.json
    assert set(found) == set(Status.model_fields)
    assert (found["accounts"], found["dead_letters"]) == (1, 0)
    assert [set(partition) for partition in found["partitions"]] == [set(PartitionStatus.model_fields)] * 9
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
    assert "1 account, no open dead letters" in meterfall("status").out
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
    output = meterfall.done("partition", "pause", partition, "--reason", "looking into it", "--by", "jane")
    assert output.startswith(f"partition {partition} is paused by jane since 20")
    assert meterfall.done("partition", "pause", partition, "--reason", "again", "--by", "joe") == output
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "a"}))
    drain(settings, USER)
    found = {row["partition"]: row for row in meterfall.done("partition", "list", "--json")}
    assert list(found) == [*range(8), "sponsor"]
    own = found[int(partition)]
    assert (own["state"], own["lag"], own["paused_by"], own["reason"]) == ("paused", 1, "jane", "looking into it")
    assert {row["state"] for name, row in found.items() if name != int(partition)} == {"drained"}
    assert "looking into it" in meterfall.done("partition", "list")
    assert f"`meterfall partition resume {partition}`" in " ".join(meterfall("status").out.split())
    assert meterfall.done("check", USER, METER, "--json")["pending"] == 1
    assert meterfall.done("partition", "resume", partition, USER="joe") == f"partition {partition} is resumed\n"
    assert meterfall.done("partition", "resume", partition) == f"partition {partition} was not paused\n"
    drain(settings, USER)
    assert rows(settings, "SELECT event_id FROM usage_log") == [("a",)]
    assert rows(settings, "SELECT resumed_by FROM partition_pause") == [("joe",)]
    assert "resume" not in meterfall("status").out


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


def refused_events(settings: Settings, meterfall: Meterfall, lines: list[str]) -> None:
    meterfall.done("emit", "--raw", "-", stdin="\n".join(lines))
    for user in {json.loads(line)["user_id"] for line in lines}:
        drain(settings, user)


def test_a_resolved_letter_tells_who_resolved_it_when_why_and_with_how_many(
    settings: Settings, meterfall: Meterfall
) -> None:
    lines = [json.dumps({"event_id": f"e{n}", "user_id": USER, "meter": "new", "quantity": 1}) for n in range(3)]
    refused_events(settings, meterfall, lines)
    first, *others = (str(row["id"]) for row in meterfall.done("dead", "list", "--json"))
    meterfall.done("dead", "replay", first, "--by", "jane", "--why", "the meter is there now")
    meterfall.done("dead", "drop", *others, "--why", "sent anew by the shop", USER="joe", LOGNAME="joe")
    (replayed,) = meterfall.done("dead", "list", "--state", "replayed", "--json")
    told = ("resolved_by", "resolved_reason", "resolved_letters")
    assert [replayed[name] for name in told] == ["jane", "the meter is there now", 1]
    dropped = meterfall.done("dead", "list", "--state", "dropped", "--json")
    assert [[row[name] for name in told] for row in dropped] == [["joe", "sent anew by the shop", 2]] * 2
    assert "sent anew by the shop" in meterfall.done("dead", "list", "--state", "dropped")
    shown = meterfall.done("dead", "show", others[0], "--json")
    assert [shown[name] for name in told] == ["joe", "sent anew by the shop", 2]
    assert shown["resolved_at"] > shown["created_at"]
    assert_refused(meterfall("dead", "drop", first, "--why", "a\nb"), 2, "why: ", "printable")


def test_closing_an_account_erases_what_operators_wrote_about_its_letters(
    settings: Settings, meterfall: Meterfall
) -> None:
    meterfall.done("account", "open", USER, "basic")
    refused_events(settings, meterfall, [json.dumps({"event_id": "e", "user_id": USER, "meter": "new", "quantity": 1})])
    meterfall.done("dead", "drop", "--reason", "unknown_meter", "--why", f"{USER} phoned", "--by", USER)
    meterfall.done("account", "close", USER, "--yes", "--by", "jane")
    told = "SELECT state, resolved_by, resolved_reason, resolved_letters FROM dead_letter"
    assert rows(settings, told) == [("dropped", None, "account closed", 1)]


def test_dead_letters_are_found_by_user_and_source_and_counted_by_reason(
    settings: Settings, meterfall: Meterfall
) -> None:
    event = {"event_id": "e", "user_id": USER, "meter": "new", "quantity": 1}
    events: list[dict[str, object]] = [
        *({**event, "event_id": f"tts{n}", "source": "tts"} for n in range(3)),
        # What a payload says deeper down is not its user or its source.
        {**event, "source": "ocr", "dimensions": {"user_id": "other", "source": "tts"}},
        {**event, "user_id": "other", "meter": "premium_voice", "quantity": -1},
    ]
    refused_events(settings, meterfall, list(map(json.dumps, events)))
    meterfall.done("emit", "--raw", "-", stdin='{"user_id": "user-42", "event_id": "\\u0000"}')
    drain(settings, USER)

    def listed(*options: str) -> list[str]:
        return [row["reason"] for row in meterfall.done("dead", "list", "--json", *options)]

    assert listed("--user", "other") == ["bad_quantity"]
    assert listed("--source", "tts") == ["unknown_meter"] * 3
    assert listed("--source", "ocr", "--user", USER) == ["unknown_meter"]
    page = meterfall("dead", "list", "--user", USER, "--limit", "2", "--json")
    assert (len(page.json), page.err[:6]) == (2, "2 of 5"), "the total counts what the filters leave"

    counts = meterfall.done("dead", "summary", "--json")
    assert (counts[0]["reason"], counts[0]["letters"]) == ("unknown_meter", 4)
    assert sum(row["letters"] for row in counts) == 6
    assert all(row["oldest"] <= row["newest"] and row["remedy"] for row in counts)
    by_source = meterfall.done("dead", "summary", "--by", "source", "--reason", "unknown_meter", "--json")
    assert [(row["source"], row["letters"]) for row in by_source] == [("tts", 3), ("ocr", 1)]
    number = partition_of(settings, "other").number
    (by_partition,) = meterfall.done("dead", "summary", "--by", "partition", "--user", "other", "--json")
    assert (by_partition["partition"], by_partition["letters"]) == (number, 1)
    text = meterfall.done("dead", "summary", COLUMNS="80").splitlines()
    assert f"unknown_meter: {REMEDIES[Refusal.UNKNOWN_METER]}" in text
    assert meterfall.done("dead", "summary", "--state", "dropped") == "none\n"


def test_every_reason_has_a_remedy_of_one_line() -> None:
    assert REMEDIES.keys() == set(Refusal)
    assert [reason for reason, remedy in REMEDIES.items() if "\n" in remedy or not 10 < len(remedy) < 140] == []
