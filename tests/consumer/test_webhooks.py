"""Webhooks: signed, in order per account, tried again, given up and replayed; and only where they may lead."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Event, Thread, Timer
from time import monotonic
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from config.settings import Settings
from schemas.status import NoticeBacklog
from tests.support.ledger import execute, move_clock, rows
from tests.support.processes import dyno
from tests.support.receiver import Came, Receiver, receiver
from tests.support.resources import settings_for, worker_resources
from tests.support.waiting import wait_until
from worker.admin import notices, webhooks
from worker.admin.posting import Refused, Target, post, target_of
from worker.cli.status_text import status_lines
from worker.consumer.jobs import enqueue_notices, notice_queue
from worker.consumer.notices import Sent, send_notices
from worker.consumer.tally import Tally
from worker.errors import AccountError, BadInput
from worker.ledger import webhooks as deliveries
from worker.ledger.connection import batch_connection
from worker.ledger.notices import erase_notices, put_in_line
from worker.reports.metrics import exposition, read_figures
from worker.reports.status import read_status
from worker.resources import Resources
from worker.rules.retries import LONGEST_SECONDS, retry_seconds

_MANY = """
    INSERT INTO notice (notice_id, user_id, meter, kind, rule, period, times, created_at, due_at, data)
    SELECT 'ntc_' || u || '_' || n, 'user-' || u, 'credits', 'balance.debt', 'balance.debt', n::text, 1,
        clock_timestamp(), clock_timestamp(), '{"used": 7}'
    FROM generate_series(1, %s) AS n, generate_series(1, %s) AS u ORDER BY n, u
"""

_ONE = """
    INSERT INTO notice (notice_id, user_id, meter, kind, rule, period, times, created_at, due_at, data)
    SELECT %s, 'user-1', 'credits', 'balance.debt', 'balance.debt', 'next', 1, now, now, '{}'
    FROM clock_timestamp() AS now
"""


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    return settings_for(
        emptied_database_url, redis_url, webhook_private_addresses=True, webhook_timeout_ms=500,
        webhook_retry_seconds=0.01, webhook_max_attempts=3,
    )  # fmt: skip


@pytest.fixture
def there() -> Iterator[Receiver]:
    with receiver() as found:
        yield found


def tell(settings: Settings, notices_each: int = 1, users: int = 1) -> None:
    execute(settings, _MANY, notices_each, users)


def send(resources: Resources, seconds: float = 20) -> Sent:
    return send_notices(resources, monotonic() + seconds)


def states(settings: Settings) -> list[tuple[object, ...]]:
    return rows(settings, "SELECT state, count(*), max(attempts) FROM notice_delivery GROUP BY 1 ORDER BY 1")


def test_a_notice_comes_signed_and_once(settings: Settings, resources: Resources, there: Receiver) -> None:
    added = webhooks.add(resources, there.url)
    tell(settings)
    assert send(resources) == Sent(1, 0, more=False)
    assert send(resources) == Sent(0, 0, more=False)
    (came,) = there.came
    body: Any = Webhook(added.secret).verify(came.body, came.headers)
    assert (body["type"], body["data"]["user_id"], body["data"]["used"]) == ("balance.debt", "user-1", 7)
    assert came.notice_id == body["data"]["notice_id"] == "ntc_1_1"
    with pytest.raises(WebhookVerificationError):
        Webhook(added.secret).verify(came.body.replace(b"user-1", b"user-2"), came.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 44).verify(came.body, came.headers)
    assert states(settings) == [("delivered", 1, 1)]


def test_two_secrets_sign_while_one_replaces_the_other(
    settings: Settings, resources: Resources, there: Receiver
) -> None:
    old = webhooks.add(resources, there.url)
    new = webhooks.rotate(resources, old.webhook_id, 1)
    tell(settings)
    send(resources)
    for secret in (old.secret, new.secret):
        Webhook(secret).verify(there.came[0].body, there.came[0].headers)
    move_clock(settings, timedelta(hours=2))
    notice_id = webhooks.send_test(resources, old.webhook_id)
    send(resources)
    assert there.came[1].notice_id == notice_id
    Webhook(new.secret).verify(there.came[1].body, there.came[1].headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(old.secret).verify(there.came[1].body, there.came[1].headers)
    assert rows(settings, "SELECT count(*) FROM webhook_secret") == [(2,)]


def test_each_webhook_gets_its_kinds_from_when_it_was_added(settings: Settings, resources: Resources) -> None:
    tell(settings)
    assert len(notices.feed(resources).notices) == 1
    with receiver() as every, receiver() as some, receiver() as others:
        webhooks.add(resources, every.url)
        webhooks.add(resources, some.url, kinds=["balance.debt"])
        webhooks.add(resources, others.url, kinds=["balance.depleted", "proof.differs"])
        execute(settings, "UPDATE notice SET period = 'before', notice_id = 'ntc_before'")
        tell(settings)
        send(resources)
        assert [len(each.came) for each in (every, some, others)] == [1, 1, 0]
        test = webhooks.send_test(resources, webhooks.listed(resources)[2].webhook_id)
        send(resources)
        assert [each.notice_id for each in others.came] == [test]
        assert [len(each.came) for each in (every, some)] == [1, 1]
        outcome = webhooks.outcome(resources, test)
        assert outcome is not None
        assert outcome.state == "delivered"
    assert test not in {each.data.notice_id for each in notices.feed(resources).notices}


def test_the_notices_of_an_account_keep_their_order_though_some_fail(
    settings: Settings, resources: Resources, there: Receiver
) -> None:
    webhooks.add(resources, there.url)
    tell(settings, notices_each=6, users=20)
    failed: set[str] = set()

    def answer(came: Came) -> int:
        if came.notice["data"]["period"] in ("2", "4") and came.notice_id not in failed:
            failed.add(came.notice_id)
            return 500
        return 200

    there.answer = answer
    stop_at = monotonic() + 30
    while len([1 for each in states(settings) if each[0] == "delivered" and each[1] == 120]) == 0:
        assert monotonic() < stop_at, states(settings)
        send(resources, 1)
    for user in range(1, 21):
        mine = [each for each in there.came if each.notice["data"]["user_id"] == f"user-{user}"]
        order = [int(each.notice["data"]["period"]) for each in mine]
        assert order == [1, 2, 2, 3, 4, 4, 5, 6]


def test_no_more_are_under_way_than_allowed(settings: Settings, redis: Any, there: Receiver) -> None:
    few = settings.model_copy(update={"webhook_max_under_way": 5, "webhook_max_under_way_each": 3})
    with worker_resources(few) as resources, receiver() as other:
        webhooks.add(resources, there.url)
        webhooks.add(resources, other.url)
        there.answer, other.answer = there.sleep(0.02), other.sleep(0.02)
        tell(few, users=40)
        assert send(resources).delivered == 80
        assert 1 < there.most_at_once <= 3
        assert 1 < other.most_at_once <= 3


def test_a_delivery_is_given_up_and_can_be_replayed(settings: Settings, resources: Resources, there: Receiver) -> None:
    added = webhooks.add(resources, there.url)
    there.answer = lambda _: 500
    tell(settings, notices_each=2)
    stop_at = monotonic() + 20
    while states(settings) != [("dead", 2, 3)]:
        assert monotonic() < stop_at, states(settings)
        send(resources, 0.5)
    assert [each.notice["data"]["period"] for each in there.came] == ["1"] * 3 + ["2"] * 3
    given_up = notices.dead(resources)
    assert {each.error for each in given_up} == {"answered 500"}
    there.answer = lambda _: 200
    assert notices.replay(resources, webhook_id="wh_none") == 0
    assert notices.replay(resources, webhook_id=added.webhook_id) == 2
    assert notices.replay(resources) == 0
    send(resources)
    assert states(settings) == [("delivered", 2, 1)]
    assert [each.notice["data"]["period"] for each in there.came[6:]] == ["1", "2"]
    _, deliveries = notices.show(resources, "ntc_1_1")
    assert [each.state for each in deliveries] == ["delivered"]


def test_a_redirect_is_not_followed(settings: Settings, resources: Resources, there: Receiver) -> None:
    webhooks.add(resources, there.url)
    there.answer = lambda _: 301
    tell(settings)
    send(resources, 1)
    assert rows(settings, "SELECT error FROM notice_delivery") == [("answered 301: redirects are not followed",)]
    assert {each.headers["webhook-id"] for each in there.came} == {"ntc_1_1"}


def test_one_webhook_that_hangs_delays_no_other(settings: Settings, resources: Resources, there: Receiver) -> None:
    with receiver() as stuck:
        stuck.answer = stuck.hang
        webhooks.add(resources, stuck.url)
        webhooks.add(resources, there.url)
        tell(settings, users=200)
        began = monotonic()
        while len({each.notice_id for each in there.came}) < 200 and monotonic() - began < 10:
            send(resources, 3)
        assert len({each.notice_id for each in there.came}) == 200
        assert monotonic() - began < 15
        assert len(rows(settings, "SELECT 1 FROM notice_delivery WHERE error = 'no answer within 0.5 s'")) > 0


def test_one_webhook_that_hangs_at_the_end_of_a_job_delays_no_other(settings: Settings, there: Receiver) -> None:
    slow = settings.model_copy(update={"webhook_timeout_ms": 3_000})
    with receiver() as stuck, worker_resources(slow) as resources, ThreadPoolExecutor(1) as executor:
        stuck.answer = stuck.hang
        webhooks.add(resources, stuck.url)
        webhooks.add(resources, there.url)
        tell(slow)
        began = monotonic()
        sending = executor.submit(send, resources, 0.3)
        wait_until(lambda: monotonic() > began + 0.8 and bool(there.came), "the job waits for the one that hangs")
        execute(slow, _ONE, "late")
        wait_until(lambda: "late" in {each.notice_id for each in there.came}, "the other gets what comes meanwhile")
        assert not sending.done()
        assert sending.result().more
        assert monotonic() - began < 6


def test_many_notices_wait_in_bounded_rows(settings: Settings, there: Receiver) -> None:
    # A machine with other work may take half a second for an answer.
    with worker_resources(settings.model_copy(update={"webhook_timeout_ms": 10_000})) as resources:
        many_wait(settings, resources, there)


def many_wait(settings: Settings, resources: Resources, there: Receiver) -> None:
    webhooks.add(resources, there.url)
    tell(settings, users=20_000)
    there.answer = lambda _: 500
    send(resources, 2)
    ((waiting,),) = rows(settings, "SELECT count(*) FROM notice_delivery WHERE state = 'waiting'")
    assert isinstance(waiting, int)
    assert waiting < 12_000, "the others wait in the feed"
    there.answer = lambda _: 200
    execute(settings, "UPDATE notice_delivery SET next_at = ledger_now(), attempts = 0 WHERE state = 'waiting'")
    there.came.clear()
    delivered, stop_at = 0, monotonic() + 60
    while delivered <= 100:
        assert monotonic() < stop_at, f"{delivered} were delivered"
        done = send(resources, 6)
        assert done.more
        delivered += done.delivered
    assert len({each.notice_id for each in there.came}) == len(there.came) == delivered, "each once"
    cursor, read = 0, 0
    while (page := notices.feed(resources, after=cursor, limit=1_000)).notices:
        cursor, read = page.cursor, read + len(page.notices)
    assert read == 20_000


def test_old_notices_are_forgotten_and_places_go_on(settings: Settings, resources: Resources, there: Receiver) -> None:
    webhooks.add(resources, there.url)
    tell(settings, users=5)
    send(resources)
    move_clock(settings, timedelta(days=31))
    send(resources)
    assert rows(settings, "SELECT 1 FROM notice UNION ALL SELECT 1 FROM notice_delivery") == []
    tell(settings)
    assert send(resources).delivered == 1
    assert rows(settings, "SELECT count(*), max(position) FROM notice") == [(1, 6)]


def test_where_nobody_sends_notices_old_ones_are_deleted(settings: Settings, there: Receiver) -> None:
    with worker_resources(settings) as resources:
        webhooks.add(resources, there.url)
    tell(settings, users=3)
    move_clock(settings, timedelta(days=31))
    execute(settings, _ONE.replace("clock_timestamp()", "ledger_now()"), "young")
    with dyno(settings, METERFALL_WEBHOOK_INTERVAL_SECONDS="0"):
        young = [("young",)]
        wait_until(lambda: rows(settings, "SELECT notice_id FROM notice") == young, "the old ones are deleted", 60)
    assert there.came == []


def test_a_notice_that_was_due_late_is_kept_from_then_on(
    settings: Settings, resources: Resources, there: Receiver
) -> None:
    """The end of a grant is written with the grant, perhaps a year before it is told."""
    webhooks.add(resources, there.url)
    there.answer = lambda _: 500
    tell(settings, notices_each=2)
    execute(settings, "UPDATE notice SET created_at = created_at - interval '300 days'")
    send(resources, 0.3)
    send(resources, 0.3)
    assert rows(settings, "SELECT count(*) FROM notice") == [(2,)]
    (first, _) = notices.feed(resources).notices
    assert first.timestamp > datetime.now(UTC) - timedelta(hours=1), "told now, though it was written long ago"


def test_what_waits_after_a_forgotten_notice_goes_on(settings: Settings, resources: Resources, there: Receiver) -> None:
    webhooks.add(resources, there.url)
    there.answer = lambda _: 500
    tell(settings, notices_each=2)
    send(resources, 0.1)
    execute(settings, "UPDATE notice SET due_at = due_at - interval '31 days' WHERE notice_id = 'ntc_1_1'")
    there.answer = lambda _: 200
    there.came.clear()
    send(resources)
    assert [each.notice_id for each in there.came] == ["ntc_1_2"]


def test_a_sender_adds_nothing_while_another_ends_the_last_delivery_of_an_account(
    settings: Settings, resources: Resources, there: Receiver
) -> None:
    """Neither would see the other: the notice that is added would wait for ever."""
    (webhook_id, _) = webhooks.add(resources, there.url)
    tell(settings)
    with batch_connection(resources.engine) as postgres:
        put_in_line(postgres)
        deliveries.fan_out(postgres)
        (taken,) = deliveries.take(postgres, webhook_id, 1, 60)
        postgres.commit()
        execute(settings, _ONE, "ntc_next")
        put_in_line(postgres)
        postgres.commit()
        deliveries.end(
            postgres, [deliveries.Ended(webhook_id, taken.notice.notice_id, taken.lane, "delivered", None, None)]
        )
        assert send(resources, 1) == Sent(0, 0, more=False)
        postgres.commit()
    assert send(resources) == Sent(1, 0, more=False)
    assert [each.notice_id for each in there.came] == ["ntc_next"]


def test_a_place_is_never_given_twice(settings: Settings, resources: Resources, there: Receiver) -> None:
    """Else a reader at the cursor, and each webhook, would pass by what gets the place of an erased notice."""
    webhooks.add(resources, there.url)
    tell(settings, users=2)
    send(resources)
    cursor = notices.feed(resources).cursor
    with batch_connection(resources.engine) as postgres:
        erase_notices(postgres, "user-2")
        postgres.commit()
    there.came.clear()
    execute(settings, _ONE, "ntc_next")
    send(resources)
    assert [each.notice_id for each in there.came] == ["ntc_next"]
    assert [each.data.notice_id for each in notices.feed(resources, after=cursor).notices] == ["ntc_next"]


def test_ends_of_grants_that_are_used_up_hold_up_nothing(
    settings: Settings, resources: Resources, there: Receiver
) -> None:
    webhooks.add(resources, there.url)
    tell(settings, users=1_500)
    execute(settings, "UPDATE notice SET kind = 'grant.expiring', data = '{\"order\": \"gone\"}'")
    tell_last = "UPDATE notice SET kind = 'balance.debt', data = '{}' WHERE user_id = 'user-1500'"
    execute(settings, tell_last)
    assert send(resources).delivered == 1
    assert [each.data.user_id for each in notices.feed(resources).notices] == ["user-1500"]


def test_a_notice_that_no_release_can_send_holds_up_no_other(
    settings: Settings, resources: Resources, there: Receiver
) -> None:
    webhooks.add(resources, there.url)
    webhooks.add(resources, f"https://{'x' * 64}.example.com/")
    webhooks.add(resources, "https://example..com/")
    tell(settings, notices_each=1, users=3)
    execute(settings, "UPDATE notice SET data = '{\"from\": \"a later release\"}' WHERE user_id = 'user-2'")
    stop_at = monotonic() + 20
    while states(settings) != [("dead", 7, 3), ("delivered", 2, 1)]:
        assert monotonic() < stop_at, states(settings)
        send(resources, 0.5)
    assert {each.notice_id for each in there.came} == {"ntc_1_1", "ntc_3_1"}


def test_a_webhook_that_is_removed_gets_nothing_more(settings: Settings, resources: Resources, there: Receiver) -> None:
    added = webhooks.add(resources, there.url)
    tell(settings)
    webhooks.remove(resources, added.webhook_id)
    assert send(resources) == Sent(0, 0, more=False)
    assert there.came == []
    assert rows(settings, "SELECT count(*) FROM webhook_secret") == [(0,)]
    for call in (webhooks.remove, webhooks.rotate, webhooks.send_test):
        with pytest.raises(AccountError, match="webhook: no webhook"):
            call(resources, added.webhook_id)


def test_what_no_sender_has_looked_at_waits_also(settings: Settings, resources: Resources, there: Receiver) -> None:
    """Else a system whose senders are all down would look well."""
    tell(settings)
    notices.feed(resources)
    webhooks.add(resources, there.url)
    assert read_status(resources).notices == NoticeBacklog(webhooks=1, waiting=0, dead=0, oldest_at=None)
    execute(settings, _ONE, "ntc_next")
    found = read_status(resources).notices
    assert found is not None
    assert found.waiting == 1
    assert found.oldest_at is not None


def test_a_job_may_last_until_what_is_under_way_has_ended(settings: Settings, redis: Any) -> None:
    slow = settings.model_copy(update={"webhook_timeout_ms": 60_000, "webhook_time_box_seconds": 10})
    queue = notice_queue(slow, redis)
    enqueue_notices(queue)
    (job,) = queue.jobs
    assert job.timeout is not None
    assert job.timeout >= 70
    assert job.timeout > slow.job_timeout_seconds


def test_deliveries_are_counted(settings: Settings, resources: Resources, there: Receiver) -> None:
    webhooks.add(resources, there.url)
    answers = iter([500])
    there.answer = lambda _: next(answers, 200)
    tell(settings)
    tally = Tally()
    counted: dict[str, int] = {}
    tally.count = lambda metric, by=1: counted.update({metric.name: counted.get(metric.name, 0) + by})  # type: ignore[method-assign, operator]
    stop_at = monotonic() + 10
    while counted.get("meterfall_notices_delivered", 0) < 1:
        assert monotonic() < stop_at
        send_notices(resources, monotonic() + 0.5, tally)
    assert counted == {"meterfall_notices_delivered": 1, "meterfall_notice_attempts_failed": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Where a webhook may lead


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.com/", "url: must be https"),
        ("http://127.0.0.1/", "url: must be https"),
        ("ftp://example.com/", "the scheme 'ftp'"),
        ("example.com", "url: must be a URL"),
        ("https://", "url: must be a URL"),
        ("https://example.com:x/", "with a number as port"),
        ("https://user:secret@example.com/", "neither a user, a password"),
        ("https://example.com/#part", "a fragment"),
        ("https://127.0.0.1/", "127.0.0.1 is private"),
        ("https://[::1]/", "::1 is private"),
        ("https://10.0.0.1/", "10.0.0.1 is private"),
        ("https://169.254.169.254/latest/", "169.254.169.254 is private"),
        ("https://100.64.0.1/", "100.64.0.1 is private"),
        ("https://[::ffff:10.0.0.1]/", "is private"),
        ("https://[64:ff9b::a00:1]/", "is private"),
        ("https://[2002:a00:1::]/", "is private"),
        ("https://[fd00::1]/", "is private"),
        ("https://[fec0::1]/", "is private"),
        ("https://[::10.0.0.1]/", "is private"),
        ("https://[fe80::1%eth0]/", "is private"),
        ("https://[3fff::1]/", "is private"),
        ("https://192.0.0.192/", "is private"),
        ("https://0.0.0.0/", "is private"),
        ("https://224.0.0.1/", "is private"),
        ("https://example.com/a b", "printable ASCII"),
        ("https://example.com/\r\nx: y", "printable ASCII"),
        ("https://exämple.com/", "printable ASCII"),
        ("https://example.com/" + "x" * 2_048, "at most 2048"),
    ],
)
def test_a_url_that_may_not_be_is_refused_with_field_and_reason(url: str, said: str) -> None:
    with pytest.raises(BadInput) as refused:
        target_of(url, allows_private=False)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_http_leads_to_loopback_only_and_only_where_allowed() -> None:
    assert target_of("http://localhost:80/x?y=1", allows_private=True) == Target(False, "localhost", 80, "/x?y=1")
    assert target_of("https://[2606:4700::1111]", allows_private=False).port == 443
    with pytest.raises(BadInput, match="must be https"):
        target_of("http://10.0.0.1/", allows_private=True)


def test_a_name_that_leads_to_a_private_address_is_not_connected_to(
    there: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if only one of its addresses is private; and what was checked is what is connected to."""
    asked: list[object] = []
    port = int(there.url.rsplit(":", 1)[1].rstrip("/"))

    def resolved(*addresses: str) -> Any:
        def getaddrinfo(host: object, *_: object, **__: object) -> list[Any]:
            if host == "hooks.example.com":
                asked.append(host)
            elif host not in addresses:
                raise AssertionError(f"resolved again: {host}")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in addresses]

        return getaddrinfo

    target = Target(False, "hooks.example.com", port, "/")
    for addresses in (("10.0.0.1",), ("93.184.215.14", "127.0.0.1"), ("::ffff:127.0.0.1",)):
        monkeypatch.setattr(socket, "getaddrinfo", resolved(*addresses))
        with pytest.raises(Refused, match="which is private"):
            asyncio.run(post(target, {}, b"{}", 5, allows_private=False))
    assert there.came == []
    monkeypatch.setattr(socket, "getaddrinfo", resolved("127.0.0.1"))
    asyncio.run(post(target, {}, b"{}", 5, allows_private=True))
    assert len(asked) == 4, "resolved once for each attempt"
    assert there.came[0].headers["host"] == f"hooks.example.com:{port}"


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "0", "017700000001"])
def test_other_spellings_of_a_private_address_are_not_connected_to(there: Receiver, host: str) -> None:
    target = target_of(f"https://{host}:{there.url.rsplit(':', 1)[1]}", allows_private=False)
    with pytest.raises(Refused, match="which is private"):
        asyncio.run(post(target, {}, b"{}", 5, allows_private=False))


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nx: " + b"x" * 20_000, "LimitOverrunError"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 50 + b"HTTP/1.1 ", "no answer within"),
        (b"HTTP/1.1 2", "no answer within"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP/1.1"),
    ],
)
def test_an_answer_without_end_is_left(head: bytes, said: str) -> None:
    """Also one that comes drop by drop."""

    over = Event()

    def drip(server: socket.socket) -> None:
        with server.accept()[0] as connection:
            connection.recv(65_536)
            with contextlib.suppress(OSError):
                connection.sendall(head)
                while not over.wait(0.02):
                    connection.sendall(b"x")

    began = monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        target = Target(False, "127.0.0.1", server.getsockname()[1], "/")
        try:
            with pytest.raises(Refused, match=said):
                asyncio.run(post(target, {}, b"{}", 0.5, allows_private=True))
        finally:
            over.set()
            thread.join(10)
    assert monotonic() - began < 5


def test_a_resolver_that_hangs_delays_no_other(there: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    over = Event()
    known = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **named: Any) -> Any:
        if host == "hangs.example.com":
            over.wait(30)
        return known(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    port = int(there.url.rsplit(":", 1)[1].rstrip("/"))

    async def attempts() -> list[BaseException | None]:
        hang = [
            post(Target(True, "hangs.example.com", 443, "/"), {}, b"{}", 1, allows_private=False) for _ in range(60)
        ]
        return await asyncio.gather(
            *hang,
            post(Target(False, "127.0.0.1", port, "/"), {}, b"{}", 1, allows_private=True),
            return_exceptions=True,
        )

    began = monotonic()
    timer = Timer(20, over.set)
    timer.start()
    try:
        *hung, other = asyncio.run(attempts())
        assert other is None
        assert {str(each) for each in hung} == {"no answer within 1 s"}
        assert monotonic() - began < 10, "nor does the end of the job wait"
    finally:
        over.set()
        timer.cancel()


def test_a_wait_grows_to_a_day_and_is_never_the_same() -> None:
    waits = [retry_seconds(attempts, 5, 1) for attempts in range(1, 12)]
    assert waits[:4] == [5, 20, 80, 320]
    assert waits[-1] == LONGEST_SECONDS == retry_seconds(1_000, 5, 1)
    assert retry_seconds(3, 5, 0) == 40


@pytest.mark.parametrize("kinds", [["tea"], ["limit.lifted"], [""]])
def test_an_unknown_kind_is_refused(resources: Resources, kinds: list[str]) -> None:
    with pytest.raises(AccountError, match="kinds: unknown"):
        webhooks.add(resources, "https://example.com/", kinds=kinds)


@pytest.mark.parametrize("hours", [-1, 721])
def test_hours_of_overlap_are_bounded(resources: Resources, hours: int) -> None:
    with pytest.raises(AccountError, match="overlap_hours: must be from 0 to 720"):
        webhooks.rotate(resources, "wh_1", hours)


def test_status_health_and_metrics_tell_what_waits_and_what_was_given_up(
    settings: Settings, resources: Resources, there: Receiver
) -> None:
    assert read_status(resources).notices == NoticeBacklog(webhooks=0, waiting=0, dead=0, oldest_at=None)
    webhooks.add(resources, there.url)
    there.answer = lambda _: 500
    tell(settings, notices_each=2)
    stop_at = monotonic() + 20
    while states(settings) != [("dead", 2, 3)]:
        assert monotonic() < stop_at
        send(resources, 0.5)
    tell_more = "INSERT INTO notice (notice_id, user_id, meter, kind, rule, period, times, created_at, due_at, data) "
    execute(
        settings,
        tell_more + "VALUES ('ntc_old', 'u', '', 'balance.debt', 'balance.debt', 'p', 1, now(), now(), '{}')",
    )
    notices.feed(resources)
    move_clock(settings, timedelta(minutes=20))
    execute(settings, "UPDATE notice SET due_at = now() - interval '20 minutes' WHERE notice_id = 'ntc_old'")
    status = read_status(resources)
    assert status.notices is not None
    assert (status.notices.webhooks, status.notices.waiting, status.notices.dead) == (1, 1, 2)
    found = {one.check: one.text for one in status.findings}
    assert found["notices_dead"].startswith("2 notices given up")
    assert "1 notice wait" in found["notices_late"] or "1 notices wait" in found["notices_late"]
    text = exposition(read_figures(resources), {}).decode()
    assert "meterfall_notices_waiting 1.0" in text
    assert "meterfall_notices_dead 2.0" in text
    assert "meterfall_notices_oldest_age_seconds 1" in text
    assert "notices: 1 wait for 1 webhook" in "\n".join(status_lines(status.model_copy(update={"findings": ()})))
