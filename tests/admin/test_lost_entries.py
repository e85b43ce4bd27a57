"""Stream entries that are lost: noticed, named, and what they hold is freed with a record."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from config.settings import Settings
from tests.support.ledger import rows
from tests.support.resources import worker_resources
from worker.admin import accounts, credits, dead_letters
from worker.admin.erasure import close_account
from worker.admin.losses import find_stuck, reconcile, recount
from worker.admin.partitions import move_stranded, repartition
from worker.admin.transfer import export_accounts, import_accounts
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.keyspace import keys
from worker.keyspace.totals import look, read_totals
from worker.reports.proof import verify_ledger
from worker.resources import Resources

USER, METER = "u12", "premium_voice"


def emit(settings: Settings, *events: str) -> None:
    """Emit events of 20,000 units each."""
    with Billing.connect(settings) as billing:
        for event in events:
            billing.emit(USER, METER, 20_000, event_id=event)


def drain(resources: Resources) -> None:
    """Empty every stream."""
    for stream in keys.streams(resources.settings.partitions):
        drain_stream(resources, stream)


def test_a_stream_that_a_producer_trims_holds_nobodys_units_for_ever(settings: Settings) -> None:
    with worker_resources(settings) as resources:
        resources.claim()
        accounts.open_new(resources, USER, "basic")
        drain(resources)
        partition = keys.partition_of(USER, settings.partitions)
        drained = keys.streams(settings.partitions)
        emit(settings, "e1", "e2", "e3")
        assert find_stuck(resources) == {}
        raw = {"event_id": "own", "user_id": USER, "meter": METER, "quantity": 1}
        resources.redis.xadd(partition.entries, {"v": "1", "e": json.dumps(raw)}, maxlen=1, approximate=False)
        assert read_totals(resources.redis, [partition])[partition].all_lost == 3
        drain(resources)
        assert look(resources.redis, drained) == {partition: 3}
        assert look(resources.redis, drained) == {}, "each is noted once"
        assert recount(resources) == {partition: 3}
        found = read_totals(resources.redis, drained)[partition]
        assert (found.events, found.holds, found.lost, found.stuck) == (3, 0, 3, 3)

        differences = verify_ledger(resources).differences
        assert [wrong for wrong in differences if "e2 has 20000 units pending" in wrong]
        assert len(differences) == 4
        with pytest.raises(Exception, match="3 events not applied yet"):
            close_account(resources, USER)

        # One of them comes again: it is in the stream, so nobody frees it.
        emit(settings, "e3")
        done = reconcile(resources, actor="jane", reason="trimmed by tts")
        assert [(row.event_id, row.units, row.is_recorded) for row in done.freed] == [
            ("e1", 20_000, False), ("e2", 20_000, False),
        ]  # fmt: skip
        assert done.lost == {partition: 3}
        kept = rows(settings, "SELECT user_id, event_id, units, freed_by, reason FROM freed_pending ORDER BY id")
        assert kept == [(USER, event, 20_000, "jane", "trimmed by tts") for event in ("e1", "e2")]
        assert reconcile(resources) == ([], {})
        drain(resources)
        assert verify_ledger(resources).differences == []
        assert rows(settings, "SELECT event_id FROM usage_log ORDER BY seq") == [("own",), ("e3",)]
        found = read_totals(resources.redis, [partition])[partition]
        assert (found.events, found.all_lost, found.stuck) == (0, 0, 0)
        close_account(resources, USER, forfeit=True)
        drain(resources)
        repartition(resources, 3)


def test_a_deleted_stream_is_noticed_and_one_that_begins_anew_is_not(settings: Settings) -> None:
    with worker_resources(settings) as resources:
        partition = keys.partition_of(USER, settings.partitions)
        resources.claim()
        emit(settings, "e1", "e2")
        assert look(resources.redis, [partition]) == {}
        resources.redis.delete(partition.entries)
        emit(settings, "e3")
        assert look(resources.redis, [partition]) == {partition: 2}
        assert [row.event_id for row in reconcile(resources).freed] == ["e1", "e2"]
        drain(resources)
        assert look(resources.redis, [partition]) == {}


def test_totals_of_an_older_release_are_put_right_and_its_workers_raise_no_alarm(settings: Settings) -> None:
    with worker_resources(settings) as resources:
        partition = keys.partition_of(USER, settings.partitions)
        emit(settings, "e1", "e2")
        resources.redis.delete(partition.totals)  # as an older release left it
        assert read_totals(resources.redis, [partition])[partition].events is None
        assert look(resources.redis, [partition]) == {}
        assert recount(resources) == {}
        assert read_totals(resources.redis, [partition])[partition].events == 2
        # A worker of an older release disposes of an event: it writes no totals.
        oldest: Any = resources.redis.xrange(partition.entries, count=1)
        resources.redis.xdel(partition.entries, oldest[0][0])
        resources.redis.set(partition.applied_untold(resources.redis.time()[0] // 60), 1)
        assert look(resources.redis, [partition]) == {}
        assert read_totals(resources.redis, [partition])[partition].all_lost == 0


def counted_of(resources: Resources) -> dict[keys.Stream, tuple[int, int, int]]:
    """Stream entries, and pending ids of events and holds, counted one by one."""
    found = {}
    for stream in keys.streams(resources.settings.partitions):
        ids = [
            name
            for key in resources.redis.scan_iter(match=f"{stream.prefix}pending:*")
            for name in cast("dict[bytes, bytes]", resources.redis.hgetall(key))
            if "/" not in key.decode()
        ]
        entries = cast("list[Any]", resources.redis.xrange(stream.entries))
        kinds = [name[:2] for name in ids]
        found[stream] = (len(entries), kinds.count(b"e:"), kinds.count(b"h:"))
    return found


def assert_totals_are_a_full_count(resources: Resources) -> None:
    drained = keys.streams(resources.settings.partitions)
    totals = read_totals(resources.redis, drained)
    noted = {stream: (found.length, found.events_noted, found.holds_noted) for stream, found in totals.items()}
    assert noted == counted_of(resources)
    assert [
        (stream, found.missing, found.lost) for stream, found in totals.items() if found.missing or found.lost
    ] == []
    assert look(resources.redis, drained) == {}


def test_totals_are_a_full_count_after_each_command_that_appends_by_itself(settings: Settings) -> None:
    """They append plain stream entries, which no script of ours notes down: nothing of these is pending."""
    giver, taker, gone = "giver", "taker", "gone"
    with worker_resources(settings) as resources, Billing.connect(settings) as billing:
        resources.claim()
        recount(resources)
        for user in (giver, taker, gone):
            accounts.open_new(resources, user, "basic")
        assert_totals_are_a_full_count(resources)
        drain(resources)
        assert_totals_are_a_full_count(resources)

        # A carry-over: it sets units aside by a hold, and refreshes two accounts.
        credits.grant(resources, giver, METER, 500, "order-1")
        billing.reserve(giver, METER, 100, "job-1")
        credits.carry_over(resources, giver, taker, "signup", meter=METER)
        assert_totals_are_a_full_count(resources)
        billing.emit(taker, METER, 7, event_id="e1")
        assert_totals_are_a_full_count(resources)
        assert [sum(counts) for counts in zip(*counted_of(resources).values(), strict=True)][1:] == [1, 1]
        drain(resources)
        assert_totals_are_a_full_count(resources)

        # A close that forfeits a hold and an event that waits.
        billing.reserve(gone, METER, 30, "job-2")
        billing.emit(gone, METER, 5, event_id="e2")
        close_account(resources, gone, forfeit=True)
        assert_totals_are_a_full_count(resources)
        drain(resources)
        assert_totals_are_a_full_count(resources)

        # A transfer: export, and import under another name.
        lines: list[str] = []
        export_accounts(resources, lines.append)
        (line,) = [line for line in "".join(lines).splitlines() if f'"{taker}"' in line]
        moved = {**json.loads(line.replace(taker, "moved")), "orders": {}}
        import_accounts(resources, json.dumps({**moved, "meters": _without_purchases(moved["meters"])}))
        assert_totals_are_a_full_count(resources)
        drain(resources)
        assert_totals_are_a_full_count(resources)

        # Stream entries that are moved, refused and sent again.
        stranded = keys.Partition(settings.partitions + 1)
        for payload in ('{"event_id": "e3", "user_id": "giver"}', '{"event_id": "e4", "user_id": "taker", "x": 1}'):
            resources.redis.xadd(stranded.entries, {"v": "1", "e": payload, "m": "1"})
        move_stranded(resources, stranded)
        assert_totals_are_a_full_count(resources)
        drain(resources)
        letters = dead_letters.listed(resources)
        assert len(letters) == 2
        for letter in letters:
            dead_letters.replay(resources, letter.id)
        assert_totals_are_a_full_count(resources)
        drain(resources)
        assert_totals_are_a_full_count(resources)
        assert recount(resources) == {}
        assert_totals_are_a_full_count(resources)
        assert verify_ledger(resources).differences == []


def _without_purchases(meters: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {meter: {**about, "purchases": None, "grants": None} for meter, about in meters.items()}
