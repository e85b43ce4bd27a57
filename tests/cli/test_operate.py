"""The commands that look after a running meterfall."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

import psycopg
from redis import Redis

from config.settings import Settings
from tests.support.commands import METER, USER, Meterfall, assert_all_refused, assert_refused, lines_of
from tests.support.ledger import rows
from tests.support.streams import drain, partition_of, stream_of
from worker.keyspace import keys
from worker.reports.status import PartitionStatus


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
