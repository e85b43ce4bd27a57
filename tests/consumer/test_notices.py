"""Notices on real servers: written in the COMMIT of their cause, each once, and read by cursor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import psycopg
import pytest
from redis import Redis

from config.catalogue import CatalogueError, load_catalogue
from config.settings import Settings
from tests.support.books import assert_proved
from tests.support.catalogues import edited_catalogue
from tests.support.ledger import execute, move_clock, rows
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import partition_of
from worker.admin import accounts, credits, limits, notices, partitions
from worker.admin.erasure import close_account
from worker.admin.transfer import export_accounts, import_accounts
from worker.consumer.drain import drain_stream
from worker.consumer.refusals import RefusalLog
from worker.consumer.renewals import renew_due
from worker.consumer.rounds import dispose_together
from worker.consumer.tally import Tally
from worker.errors import AccountError
from worker.ledger import batch as ledger_batch
from worker.ledger.catalogues import insert_version
from worker.ledger.connection import batch_connection
from worker.ledger.notices import put_in_line
from worker.reports.proof_run import prove_for
from worker.resources import Resources

USER, METER = "user-42", "premium_voice"
RULES = """
notices = [
    { kind = "balance.threshold", percent = 80 },
    { kind = "balance.threshold", meter = "premium_voice", left = 1_000, top_up = 50_000 },
    { kind = "balance.depleted" }, { kind = "balance.recovered" }, { kind = "balance.debt" },
    { kind = "grant.expiring", days_before = 7 }, { kind = "grant.expired" },
    { kind = "period.renewed" }, { kind = "renewal.missing" },
]
"""
ALL = 100_000  # of the plan's premium_voice


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    path = edited_catalogue(tmp_path, ("[plans.basic]\n", f"[plans.basic]\n{RULES}"))
    return settings_for(emptied_database_url, redis_url, catalogue_path=path, hand_grace_ms=50, lock_timeout_ms=200)


def use(redis: Redis, settings: Settings, event_id: str, quantity: int, **fields: object) -> None:
    """Append an event as a producer in another language would."""
    event = {"user_id": USER, "meter": METER, "quantity": quantity, "event_id": event_id} | fields
    redis.xadd(partition_of(settings, str(event["user_id"])).entries, {"v": "1", "e": json.dumps(event)})


def drain(resources: Resources) -> None:
    drain_stream(resources, partition_of(resources.settings, USER))


def told(settings: Settings, user_id: str = USER) -> list[tuple[object, ...]]:
    """Kind, meter and count of all that is told of a user, in the order of their causes."""
    query = "SELECT kind, meter, times FROM notice WHERE user_id = %s AND kind NOT LIKE %s ORDER BY number"
    return rows(settings, query, user_id, "grant.expiring")


def test_a_batch_tells_in_its_own_commit_and_once(
    settings: Settings, redis: Redis, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts.open_new(resources, USER, "basic")
    use(redis, settings, "a", 79_999)
    drain(resources)
    assert told(settings) == []
    use(redis, settings, "b", 1)
    failures = iter([psycopg.errors.DeadlockDetected("first"), None])
    update = ledger_batch.update

    def update_at_last(*args: object) -> None:
        if (error := next(failures, None)) is not None:
            assert rows(settings, "SELECT count(*) FROM notice") == [(0,)], "written, and not committed"
            raise error
        update(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger_batch, "update", update_at_last)
    drain(resources)
    assert told(settings) == [("balance.threshold", METER, 1)]
    use(redis, settings, "b", 1)  # a repeat
    use(redis, settings, "c", 19_500)
    drain(resources)
    assert told(settings)[1:] == [("balance.threshold", METER, 1)], "the other line"
    assert_proved(resources)


def test_a_round_tells_also(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    accounts.open_new(resources, "user-1", "basic")
    concerned = {partition_of(settings, user) for user in (USER, "user-1")}
    for user in (USER, "user-1"):
        drain_stream(resources, partition_of(settings, user))
        use(redis, settings, "a", ALL, user_id=user)
        redis.set(partition_of(settings, user).rung, "1")
    assert dispose_together(resources, partition_of(settings, USER), RefusalLog(), Tally()).done == concerned
    assert len(concerned) == 2
    for user in (USER, "user-1"):
        assert [each[0] for each in told(settings, user)] == ["balance.threshold"] * 2 + ["balance.depleted"]


def test_a_top_up_recovers_and_the_next_is_told_again(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    use(redis, settings, "a", ALL + 5)
    drain(resources)
    assert [each[0] for each in told(settings)] == [
        "balance.threshold", "balance.threshold", "balance.depleted", "balance.debt",
    ]  # fmt: skip
    page = notices.feed(resources)
    low = next(each for each in page.notices if each.data.left == 1_000)
    assert low.data.top_up is not None
    assert (low.data.top_up.amount, low.data.available) == (50_000, 0)
    for _ in range(2):
        credits.grant(resources, USER, METER, low.data.top_up.amount, low.data.top_up.key)
    assert told(settings)[4:] == [("balance.recovered", METER, 1)]
    use(redis, settings, "b", 49_990)
    drain(resources)
    assert ("balance.threshold", METER, 2) in told(settings)[5:]
    more = notices.feed(resources, after=page.cursor)
    keys = [each.data.top_up.key for each in more.notices if each.data.top_up is not None]
    assert keys
    assert low.data.top_up.key not in keys, "another top-up has another key"
    assert_proved(resources)


def test_what_happens_to_credit_and_periods_is_told(settings: Settings, resources: Resources) -> None:
    now = datetime.now(UTC)
    accounts.open_new(resources, USER, "basic", start=now - timedelta(days=1), end=now + timedelta(days=20))
    credits.grant(resources, USER, METER, 500, "gift", expires_at=now + timedelta(days=10))
    credits.grant(resources, USER, METER, 500, "spent", expires_at=now + timedelta(days=10))
    assert notices.feed(resources).notices == ()
    credits.claw_back(resources, USER, METER, order="spent", total_refunded=500)
    move_clock(settings, timedelta(days=4))
    page = notices.feed(resources)
    assert [(each.type, each.data.order, each.data.units) for each in page.notices] == [("grant.expiring", "gift", 500)]
    move_clock(settings, timedelta(days=11))
    for _ in range(2):
        renew_due(resources)
    assert told(settings) == [("grant.expired", METER, 1)]
    move_clock(settings, timedelta(days=22))
    for _ in range(2):
        renew_due(resources)
    missing = [each for each in told(settings) if each[0] == "renewal.missing"]
    assert {each[1] for each in missing} == {"server_kokoro", "premium_voice", "ocr_tokens"}
    assert len(missing) == 3
    drain(resources)
    for _ in range(2):
        accounts.renew(resources, USER, "in_1", now + timedelta(days=20), now + timedelta(days=50))
    assert len([each for each in told(settings) if each[0] == "period.renewed"]) == 3
    assert_proved(resources)


def test_refusals_pauses_and_differences_are_told(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    partition = partition_of(settings, USER)
    bad = json.dumps({"user_id": USER, "meter": METER, "event_id": "x", "quantity": -1})
    for _ in range(3):
        redis.xadd(partition.entries, {"v": "1", "e": bad, "m": "1"})
    drain(resources)
    assert told(settings) == [("event.refused", METER, 1)]
    for _ in range(2):
        partitions.pause(resources, partition, "ops", "a look")
    execute(settings, "UPDATE balance SET used = 7 WHERE user_id = %s AND meter = %s", USER, METER)
    while prove_for(resources, 60, str, lambda _: None).report is None:
        pass
    found = rows(settings, "SELECT kind, data->>'differences' FROM notice WHERE user_id = '' ORDER BY number")
    assert found == [("partition.paused", None), ("proof.differs", "1")]


def test_a_batch_waits_for_no_sender(settings: Settings, redis: Redis, resources: Resources) -> None:
    """A sender that is stopped in its transaction holds the row of a notice that a batch makes again."""
    accounts.open_new(resources, USER, "basic")
    partition = partition_of(settings, USER)
    bad = json.dumps({"user_id": USER, "meter": METER, "event_id": "x", "quantity": -1})
    redis.xadd(partition.entries, {"v": "1", "e": bad, "m": "1"})
    drain(resources)
    with psycopg.connect(str(settings.database_url)) as sender:
        assert sender.execute("UPDATE notice SET position = 1").rowcount == 1
        redis.xadd(partition.entries, {"v": "1", "e": bad, "m": "1"})
        worker = Thread(target=drain, args=(resources,))
        worker.start()
        worker.join(30)
        left = redis.xlen(partition.entries)
        sender.rollback()
    worker.join(30)
    assert left == 0, "applied while the sender holds the row"
    assert told(settings) == [("event.refused", METER, 1)]


def test_the_feed_leaves_out_no_notice_that_is_committed_late(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    """A reader of the numbers would pass the first notice by: it is written first and committed last."""
    accounts.open_new(resources, USER, "basic")
    accounts.open_new(resources, "other", "basic")
    with psycopg.connect(str(settings.database_url)) as slow:
        slow.execute(
            "INSERT INTO notice (notice_id, user_id, meter, kind, rule, period, times, created_at, due_at, data) "
            "VALUES ('ntc_slow', 'slow', '', 'balance.debt', 'balance.debt', 'p', 1, now(), now(), '{}')"
        )
        use(redis, settings, "a", ALL)
        drain(resources)
        first = notices.feed(resources, limit=2)
        assert len(first.notices) == 2
        slow.commit()
    second = notices.feed(resources, after=first.cursor)
    ids = [each.data.notice_id for page in (first, second) for each in page.notices]
    assert len(ids) == len(set(ids)) == 4
    assert "ntc_slow" in ids
    assert notices.feed(resources, after=second.cursor).cursor == second.cursor
    only = notices.feed(resources, kinds=["balance.depleted"], user_id=USER)
    assert [each.type for each in only.notices] == ["balance.depleted"]


def test_two_readers_of_the_feed_give_each_place_once(settings: Settings, redis: Redis, resources: Resources) -> None:
    execute(
        settings,
        "INSERT INTO notice (notice_id, user_id, meter, kind, rule, period, times, created_at, due_at, data) "
        "SELECT 'ntc_' || n, 'u', '', 'balance.debt', 'balance.debt', n::text, 1, now(), now(), '{}' "
        "FROM generate_series(1, 5000) AS n",
    )

    def place() -> None:
        while rows(settings, "SELECT count(*) FROM notice WHERE position IS NULL") != [(0,)]:
            with batch_connection(resources.engine) as postgres:
                put_in_line(postgres)
                postgres.commit()

    threads = [Thread(target=place) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert rows(settings, "SELECT count(*), min(position), max(position) FROM notice") == [(5_000, 1, 5_000)]
    assert rows(settings, "SELECT count(*) FROM notice WHERE position <> substr(notice_id, 5)::int") == [(0,)]


def test_rules_of_an_account_go_before_the_plans_and_move_with_it(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    accounts.open_new(resources, USER, "basic")
    own: Sequence[dict[str, object]] = [{"kind": "balance.threshold", "percent": 1, "meter": METER}]
    assert not notices.set_rules(resources, USER, own).repeated
    assert notices.set_rules(resources, USER, own).repeated
    use(redis, settings, "a", ALL)
    drain(resources)
    assert told(settings) == [("balance.threshold", METER, 1)]
    lines: list[str] = []
    export_accounts(resources, lines.append)
    assert json.loads(lines[0])["notices"] == [{"kind": "balance.threshold", "percent": 1, "meter": METER}]
    line = "".join(lines).replace(USER, "user-43")
    assert import_accounts(resources, line).accounts == 1
    assert accounts.show(resources, "user-43").notices == accounts.show(resources, USER).notices
    notices.set_rules(resources, USER, [])
    credits.grant(resources, USER, METER, ALL, "order-1")
    use(redis, settings, "b", ALL)
    drain(resources)
    assert len(told(settings)) == 1
    assert accounts.show(resources, USER).notices == ()
    notices.set_rules(resources, USER, None)
    assert_proved(resources)


def test_a_limit_that_is_reached_is_told_once_a_window(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    notices.set_rules(resources, USER, [{"kind": "limit.reached"}])
    limits.set_limit(resources, USER, METER, "day", 100, of="user")
    drain(resources)
    for event_id, quantity in (("a", 99), ("b", 1), ("c", 5)):
        use(redis, settings, event_id, quantity)
        drain(resources)
    assert told(settings) == [("limit.reached", METER, 1)]
    (notice,) = notices.feed(resources, kinds=["limit.reached"]).notices
    data = notice.data
    assert (data.rule, data.per, data.set_by, data.limit, data.used) == (
        "limit.reached:per=day,of=user", "day", "user", 100, 100,
    )  # fmt: skip
    assert data.period_start is not None
    assert data.period_end == data.period_start + timedelta(days=1)
    credits.reverse(resources, USER, "a")
    use(redis, settings, "d", 94)
    drain(resources)
    assert told(settings) == [("limit.reached", METER, 1), ("limit.reached", METER, 2)]
    assert_proved(resources)


_NEWER = [{"kind": "tea.ready", "meter": METER, "cups": 3}, {"kind": "balance.depleted", "sugar": True}]


def test_rules_of_an_account_that_a_newer_release_wrote_stop_nothing_and_are_kept(
    settings: Settings, redis: Redis, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    accounts.open_new(resources, USER, "basic")
    rules = [*_NEWER, {"kind": "balance.threshold", "percent": 1, "meter": METER}]
    execute(settings, "UPDATE account SET notices = %s::jsonb", json.dumps(rules))
    for event_id in ("a", "b"):
        use(redis, settings, event_id, ALL)
        drain(resources)
    assert told(settings) == [("balance.threshold", METER, 1)]
    lines = [record.getMessage() for record in caplog.records if "tea.ready" in record.getMessage()]
    assert lines == ["accounts: this release does not tell notices of the kind 'tea.ready'"]
    credits.grant(resources, USER, METER, ALL, "order-1")
    accounts.set_timezone(resources, USER, "Europe/Berlin")
    assert rows(settings, "SELECT notices FROM account") == [(rules,)]
    exported: list[str] = []
    export_accounts(resources, exported.append)
    assert json.loads(exported[0])["notices"] == rules
    with pytest.raises(AccountError, match=r"rules\.0\.kind"):
        notices.set_rules(resources, USER, _NEWER)
    assert_proved(resources)


def test_rules_of_a_catalogue_that_a_newer_release_applied_stop_nothing(
    settings: Settings, redis: Redis, resources: Resources, tmp_path: Path
) -> None:
    accounts.open_new(resources, USER, "basic")
    own = resources.own_catalogue.text
    text = own.replace('{ kind = "balance.debt" }', '{ kind = "balance.debt" }, { kind = "tea.ready" }')
    assert text != own
    with batch_connection(resources.engine) as postgres:
        insert_version(postgres, "f" * 64, text, None, "ann", None)
        postgres.commit()
    with worker_resources(settings) as newer:
        newer.claim()
        assert newer.catalogue.text == text
        use(redis, settings, "a", 1)
        drain(newer)
        assert rows(settings, "SELECT count(*) FROM usage_log") == [(1,)]
        path = tmp_path / "newer.toml"
        path.write_text(text)
        with pytest.raises(CatalogueError, match=r"plans\.basic\.notices\..*kind"):
            load_catalogue(path)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([{"kind": "balance.threshold", "percent": 101}], "rules.0.percent"),
        ([{"kind": "balance.depleted"}, {"kind": "tea"}], "rules.1.kind"),
        ([{"kind": "balance.depleted", "meter": "tea"}], "meter: unknown"),
        (["balance.depleted"], "rules.0"),
    ],
)
def test_wrong_rules_are_refused(resources: Resources, rules: Sequence[dict[str, object]], said: str) -> None:
    accounts.open_new(resources, USER, "basic")
    with pytest.raises(AccountError, match=said):
        notices.set_rules(resources, USER, rules)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"after": -1}, "after: must be"), ({"limit": 0}, "limit: must be"), ({"limit": 1_001}, "limit: must be"),
        ({"kinds": ["tea"]}, "kinds: unknown 'tea'"), ({"kinds": "balance.debt"}, "kinds: must be a list"),
        ({"user_id": "a b"}, "user_id"),
    ],
)  # fmt: skip
def test_a_feed_that_cannot_be_is_refused(resources: Resources, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(AccountError, match=said):
        notices.feed(resources, **arguments)  # type: ignore[arg-type]


def test_a_closed_account_leaves_nothing_told(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    use(redis, settings, "a", ALL)
    drain(resources)
    assert told(settings)
    close_account(resources, USER, forfeit=True)
    assert rows(settings, "SELECT count(*) FROM notice UNION ALL SELECT count(*) FROM notice_alarm") == [(0,), (0,)]
