"""Sub-caps per backend on real servers: what is left of them, what counts against them, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from itertools import takewhile
from threading import Barrier
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.answers import BackendRemaining, HoldState, Reason, Remaining, RoutingAnswer
from schemas.events import Scalar, UsageEvent
from tests.client.clients import open_client
from tests.support.ledger import give_account, move_clock, rows
from tests.support.resources import settings_for
from tests.support.streams import account_of, drain, partition_of, pending_of, stream_of
from worker.admin import accounts
from worker.client import Billing
from worker.client.ledger import LedgerView
from worker.consumer import jobs
from worker.consumer.renewals import renew_due
from worker.demo import stage
from worker.errors import EventConflict, HoldClosed, HoldConflict, InvalidRequest, UsageLimitExceeded
from worker.keyspace import scripts
from worker.keyspace.scripts import Call
from worker.reports.holds import open_holds
from worker.reports.proof import verify_ledger
from worker.reports.status import read_status
from worker.resources import Resources

USER, METER = "u1", "relay_credits"
SUB_METER = "relay_credits/gemini"


@pytest.fixture(params=["blocking", "asyncio"])
def billing(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Any]:
    """Either client; the user has 500 units for good, at most 100 of them on gemini."""
    give_account(settings, USER, "core")
    with closing(open_client(request.param, settings)) as client:
        yield client


@pytest.fixture
def blocking(settings: Settings) -> Iterator[Billing]:
    """The blocking client, where one will do; the same user."""
    give_account(settings, USER, "core")
    with Billing.connect(settings) as client:
        yield client


@pytest.fixture
def maps(redis: Redis, settings: Settings) -> Callable[[], tuple[dict[str, int], dict[str, int]]]:
    """What is pending now: on the meter, and of it on gemini."""
    return lambda: (pending_of(redis, settings, USER, METER), pending_of(redis, settings, USER, SUB_METER))


Maps = Callable[[], tuple[dict[str, int], dict[str, int]]]


def expire(redis: Redis, settings: Settings, key: str) -> None:
    """Let the hold's time be over in both lists of holds, as if it had been waited for."""
    partition = partition_of(settings, USER)
    assert redis.hset(partition.account(USER).hold(key), "expires_ms", 1) == 0
    for meter in (METER, SUB_METER):
        assert redis.zadd(partition.account(USER).holds(meter), {key: 1}, xx=True, ch=True) == 1
        redis.zadd(partition.expiries, {partition.account(USER).expiring(meter): 1})


def assert_nothing_is_left(redis: Redis) -> None:
    """Every pending map and every list of open holds is gone."""
    assert [
        key for pattern in ("*:pending:*", "*:holds:*") for key in redis.scan_iter(match=f"mf:{{p*}}{pattern}")
    ] == []


# ---------------------------------------------------------------------------------------------------------------------
# The gate


def test_the_cap_denies_while_the_meter_has_room(billing: Any, maps: Maps, redis: Redis, settings: Settings) -> None:
    assert billing.check(USER, METER, 100, backend="gemini").allowed
    answer = billing.check(USER, METER, 101, backend="gemini")
    assert (answer.allowed, answer.reason, answer.available) == (False, Reason.BACKEND_CAP_EXCEEDED, 100)
    attempts: list[Callable[[], Any]] = [
        lambda: billing.reserve(USER, METER, 101, "k", backend="gemini"),
        lambda: billing.charge(USER, METER, 101, "c", backend="gemini"),
        lambda: billing.charge(USER, METER, 101, "c", dimensions={"backend": "gemini"}),
    ]
    for attempt in attempts:
        with pytest.raises(
            UsageLimitExceeded, match=r"on gemini: backend_cap_exceeded.* cap 100, used 0 of it"
        ) as caught:
            attempt()
        assert caught.value.answer == answer
    assert maps() == ({}, {})
    assert stream_of(redis, settings, USER) == []
    for elsewhere in ({"backend": "hardware"}, {}):
        assert billing.check(USER, METER, 101, **elsewhere).allowed


def test_a_check_says_all_it_knows(billing: Any) -> None:
    billing.reserve(USER, METER, 30, "k1", backend="gemini")
    billing.reserve(USER, METER, 50, "k2", backend="hardware")
    answer = billing.check(USER, METER, 70, backend="gemini")
    assert (answer.allowed, answer.reason, answer.available, answer.pending) == (True, Reason.WITHIN_LIMIT, 70, 80)
    assert (answer.limit, answer.used, answer.kind) == (500, 0, "lifetime")
    assert (answer.backend, answer.cap, answer.cap_used, answer.cap_pending) == ("gemini", 100, 0, 30)
    other = billing.check(USER, METER, 70, backend="hardware")
    assert (other.available, other.pending, other.backend, other.cap, other.cap_pending) == (
        420,
        80,
        "hardware",
        None,
        0,
    )
    assert billing.check(USER, METER, 70).backend is None


def test_the_meter_decides_first(billing: Any) -> None:
    billing.reserve(USER, METER, 450, "k", backend="hardware")
    assert billing.check(USER, METER, 51, backend="gemini").reason is Reason.LIMIT_EXCEEDED
    assert billing.check(USER, METER, 101, backend="gemini").reason is Reason.LIMIT_EXCEEDED
    assert billing.check(USER, METER, 1, backend="gemini").available == 50


def test_a_plan_without_a_cap_has_none(settings: Settings) -> None:
    give_account(settings, USER, "max_relay")
    with Billing.connect(settings) as client:
        client.reserve(USER, METER, 10**6, "k", backend="gemini")
        answer = client.check(USER, METER, 10**9, backend="gemini")
        assert (answer.allowed, answer.reason, answer.available) == (True, Reason.UNLIMITED, None)
        assert (answer.kind, answer.cap, answer.pending) == ("unlimited", None, 10**6)


def test_32_reserves_at_once_for_the_last_unit_of_the_cap(blocking: Billing, maps: Maps) -> None:
    blocking.reserve(USER, METER, 99, "before", backend="gemini")
    start = Barrier(32)

    def attempt(number: int) -> str:
        start.wait(10)
        try:
            if number % 2:
                blocking.charge(USER, METER, 1, f"c{number}", backend="gemini")
            else:
                blocking.reserve(USER, METER, 1, f"k{number}", backend="gemini")
        except UsageLimitExceeded as denied:
            return denied.answer.reason.value
        return "granted"

    with ThreadPoolExecutor(32) as threads:
        outcomes = list(threads.map(attempt, range(32)))
    assert sorted(outcomes) == ["backend_cap_exceeded"] * 31 + ["granted"]
    assert [ids["total"] for ids in maps()] == [100, 100]
    assert blocking.reserve(USER, METER, 400, "rest", backend="hardware").answer.left == 400


def test_a_hold_of_the_same_key_on_another_backend_is_refused(billing: Any, maps: Maps) -> None:
    first = billing.reserve(USER, METER, 30, "k", backend="gemini").answer
    assert first.backend == "gemini"
    assert billing.reserve(USER, METER, 30, "k", backend="gemini").answer == first
    for other in ({"backend": "hardware"}, {}):
        with pytest.raises(HoldConflict, match="already holds 30 of relay_credits on gemini") as caught:
            billing.reserve(USER, METER, 30, "k", **other)
        assert (caught.value.meter, caught.value.amount, caught.value.backend) == (METER, 30, "gemini")
    billing.reserve(USER, METER, 30, "other", backend="hardware")
    with pytest.raises(HoldConflict) as caught:
        billing.reserve(USER, METER, 30, "other", backend="gemini")
    assert caught.value.backend is None, "hardware has no cap, so the hold counts against none"
    assert maps() == ({"h:k": 30, "h:other": 30, "total": 60}, {"h:k": 30, "total": 30})


# ---------------------------------------------------------------------------------------------------------------------
# From hold to event, on either backend


@pytest.mark.parametrize(
    ("held_on", "named", "counted"),
    [
        ("gemini", {}, True),
        ("gemini", {"backend": "gemini"}, True),
        ("gemini", {"backend": "hardware"}, False),
        ("gemini", {"dimensions": {"backend": "hardware", "page_idx": 1}}, False),
        ("hardware", {}, False),
        ("hardware", {"backend": "gemini"}, True),
        (None, {}, False),
        (None, {"dimensions": {"backend": "gemini"}}, True),
        (None, {"backend": "gemini", "dimensions": {"backend": "gemini"}}, True),
        ("gemini", {"dimensions": {"backend": 7}}, False),
    ],
)
def test_an_event_counts_on_the_backend_that_did_the_work(
    billing: Any,
    maps: Maps,
    redis: Redis,
    settings: Settings,
    held_on: str | None,
    named: dict[str, Any],
    counted: bool,
) -> None:
    hold = billing.reserve(USER, METER, 90, "k", backend=held_on)
    held = held_on == "gemini"
    assert maps() == ({"h:k": 90, "total": 90}, {"h:k": 90, "total": 90} if held else {})
    assert hold.capture("page-1", 20, **named).hold is HoldState.HELD
    assert hold.capture("page-1", 20, **named).repeated
    on_gemini = ({"h:k": 70} if held else {}) | ({"e:page-1": 20} if counted else {})
    assert maps()[0] == {"h:k": 70, "e:page-1": 20, "total": 90}
    assert maps()[1] == (on_gemini and on_gemini | {"total": sum(on_gemini.values())})
    assert hold.settle(60, **named).hold is HoldState.HELD
    assert hold.settle(60, **named).repeated
    assert maps()[0] == {"e:page-1": 20, "e:k": 60, "total": 80}
    assert maps()[1] == ({"e:page-1": 20, "e:k": 60, "total": 80} if counted else {})
    for fields in stream_of(redis, settings, USER):
        facts = UsageEvent.model_validate_json(fields[b"e"]).dimensions or {}
        assert (facts.get("backend") == "gemini") is counted
    assert redis.exists(account_of(settings, USER).holds(SUB_METER)) == 0
    drain(settings, USER)
    assert_nothing_is_left(redis)
    left = billing.remaining(USER)
    assert (left.used, left.remaining) == (80, 420)
    assert left.backends[0].used == (80 if counted else 0)


def test_release_gives_back_on_both(billing: Any, maps: Maps, redis: Redis) -> None:
    hold = billing.reserve(USER, METER, 90, "k", backend="gemini")
    hold.capture("page-1", 20, backend="hardware")
    assert hold.release().state is HoldState.HELD
    assert maps() == ({"e:page-1": 20, "total": 20}, {})
    assert list(redis.scan_iter(match="*:holds:*")) == []
    assert billing.check(USER, METER, 100, backend="gemini").available == 100


@pytest.mark.parametrize("swept_by", ["check", "check of the meter", "job", "nobody"])
def test_an_expired_hold_counts_on_neither(
    blocking: Billing,
    maps: Maps,
    redis: Redis,
    settings: Settings,
    resources: Resources,
    monkeypatch: pytest.MonkeyPatch,
    swept_by: str,
) -> None:
    hold = blocking.reserve(USER, METER, 90, "k", backend="gemini")
    hold.capture("page-1", 20)
    blocking.reserve(USER, METER, 5, "other", backend="gemini")
    expire(redis, settings, "k")
    monkeypatch.setattr(jobs, "resources", lambda: resources)
    sub_map = {"e:page-1": 20, "h:other": 5, "total": 25}
    if swept_by == "check":
        assert blocking.check(USER, METER, 1, backend="gemini").cap_pending == 25
        assert maps() == (sub_map, sub_map)
    elif swept_by == "check of the meter":
        assert blocking.check(USER, METER, 1).pending == 25
        assert maps() == (sub_map, {"h:k": 70} | sub_map | {"total": 95}), "each map expires when it is looked at"
    elif swept_by == "job":
        jobs.expire_holds(partition_of(settings, USER).number)
        assert maps() == (sub_map, sub_map)
    with pytest.raises(HoldClosed):
        blocking.reserve(USER, METER, 90, "k", backend="gemini")
    assert hold.settle(70).hold is HoldState.EXPIRED
    blocking.release(USER, METER, "other")
    assert blocking.check(USER, METER, 10, backend="gemini").available == 10
    drain(settings, USER)
    partition = partition_of(settings, USER)
    redis.zadd(partition.expiries, {partition.account(USER).expiring(meter): 1 for meter in (METER, SUB_METER)})
    jobs.expire_holds(partition.number)
    assert_nothing_is_left(redis)
    assert redis.zcard(partition.expiries) == 0


def test_the_index_of_expiries_knows_the_earliest_of_each(blocking: Billing, redis: Redis, settings: Settings) -> None:
    partition = partition_of(settings, USER)
    blocking.reserve(USER, METER, 1, "early", ttl_seconds=60)
    blocking.reserve(USER, METER, 1, "late", ttl_seconds=600, backend="gemini")
    blocking.reserve(USER, METER, 1, "later", ttl_seconds=6_000, backend="gemini")
    for meter, first in ((METER, "early"), (SUB_METER, "late")):
        score = redis.zscore(partition.expiries, partition.account(USER).expiring(meter))
        assert score == redis.zscore(partition.account(USER).holds(meter), first)


def test_charge_checks_and_pends_on_both(billing: Any, maps: Maps, redis: Redis, settings: Settings) -> None:
    first = billing.charge(USER, METER, 60, "c1", backend="gemini", dimensions={"page_idx": 3})
    assert billing.charge(USER, METER, 60, "c1", backend="gemini") == first.model_copy(update={"repeated": True})
    with pytest.raises(EventConflict):
        billing.charge(USER, METER, 61, "c1", backend="gemini")
    billing.charge(USER, METER, 70, "c2", backend="hardware")
    assert maps() == ({"e:c1": 60, "e:c2": 70, "total": 130}, {"e:c1": 60, "total": 60})
    sent = [UsageEvent.model_validate_json(fields[b"e"]).dimensions for fields in stream_of(redis, settings, USER)]
    assert sent == [{"backend": "gemini", "page_idx": 3}, {"backend": "hardware"}]
    with pytest.raises(UsageLimitExceeded) as caught:
        billing.charge(USER, METER, 41, "c3", backend="gemini")
    assert caught.value.available == 40
    drain(settings, USER)
    assert billing.charge(USER, METER, 60, "c1", backend="gemini").repeated
    assert_nothing_is_left(redis)
    assert billing.check(USER, METER, 41, backend="gemini").reason is Reason.BACKEND_CAP_EXCEEDED


def test_emit_pends_on_both_and_is_never_refused(billing: Any, maps: Maps, redis: Redis, settings: Settings) -> None:
    work: list[tuple[int, dict[str, Scalar] | None]] = [
        (150, {"backend": "gemini"}),
        (7, {"backend": "hardware"}),
        (5, None),
        (1, {"backend": "gemini"}),
    ]
    events = [
        UsageEvent(event_id=f"e{number}", user_id=USER, meter=METER, quantity=quantity, dimensions=facts)
        for number, (quantity, facts) in enumerate(work)
    ]
    for _ in range(2):
        billing.emit_events(events)
    billing.emit(USER, METER, 2, event_id="e9", dimensions={"backend": "gemini"})
    total = {"e:e0": 150, "e:e1": 7, "e:e2": 5, "e:e3": 1, "e:e9": 2, "total": 165}
    assert maps() == (total, {"e:e0": 150, "e:e3": 1, "e:e9": 2, "total": 153})
    sent = [UsageEvent.model_validate_json(fields[b"e"]).event_id for fields in stream_of(redis, settings, USER)]
    assert sent == [*[event.event_id for event in events] * 2, "e9"]
    assert billing.check(USER, METER, 1, backend="gemini").available == 0
    drain(settings, USER)
    assert_nothing_is_left(redis)
    assert rows(settings, "SELECT count(*), sum(amount) FROM usage_log") == [(5, 165)]
    answer = billing.check(USER, METER, 1, backend="gemini")
    assert (answer.reason, answer.used, answer.cap_used) == (Reason.BACKEND_CAP_EXCEEDED, 165, 153)


def test_a_plain_producers_event_closes_the_hold_on_both(
    blocking: Billing, maps: Maps, redis: Redis, settings: Settings
) -> None:
    blocking.reserve(USER, METER, 90, "k", backend="gemini")
    event = UsageEvent(event_id="e1", user_id=USER, meter=METER, quantity=60, hold_key="k")
    redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": event.model_dump_json(exclude_none=True)})
    drain(settings, USER)
    assert maps() == ({}, {})
    assert_nothing_is_left(redis)
    assert blocking.release(USER, METER, "k").state is HoldState.SETTLED


@pytest.mark.parametrize("marked", [True, False])
def test_a_hold_that_is_settled_on_another_meter_is_freed_on_both(
    blocking: Billing, redis: Redis, settings: Settings, marked: bool
) -> None:
    blocking.reserve(USER, METER, 90, "k", backend="gemini")
    if marked:
        blocking.settle(USER, "credits", "k", 5, backend="gemini")
        assert pending_of(redis, settings, USER, SUB_METER) == {}
        assert pending_of(redis, settings, USER, "credits") == {"e:k": 5, "total": 5}
    else:
        event = UsageEvent(event_id="k", user_id=USER, meter="credits", quantity=5, hold_key="k")
        redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": event.model_dump_json(exclude_none=True)})
    drain(settings, USER)
    assert_nothing_is_left(redis)


def test_a_balance_that_contains_an_event_takes_it_out_of_both(
    blocking: Billing, maps: Maps, redis: Redis, settings: Settings
) -> None:
    partition = partition_of(settings, USER)
    blocking.emit(USER, METER, 10, event_id="applied", dimensions={"backend": "gemini"})
    (fields,) = stream_of(redis, settings, USER)
    drain(settings, USER)
    # As a worker leaves it that dies between COMMIT and publish: still in the stream, still pending, not cached.
    redis.xadd(partition.entries, {"v": "1", "e": fields[b"e"], "m": "1"})
    for meter in (METER, SUB_METER):
        redis.hset(partition.account(USER).pending(meter), mapping={"e:applied": 10, "total": 10})
    redis.delete(partition.account(USER).balance)
    blocking.charge(USER, METER, 5, "waiting", backend="gemini")
    assert maps() == ({"e:waiting": 5, "total": 5}, {"e:waiting": 5, "total": 5})
    assert blocking.check(USER, METER, 85, backend="gemini").available == 85
    drain(settings, USER)
    assert blocking.check(USER, METER, 85, backend="gemini").available == 85
    assert_nothing_is_left(redis)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The script calls that the operations make from now on."""
    calls: list[Call] = []

    def noted(*parts: Any) -> Call:
        calls.append(Call(*parts))
        return calls[-1]

    monkeypatch.setattr(scripts, "Call", noted)
    return calls


def test_meters_without_caps_keep_their_keys(
    blocking: Billing, redis: Redis, settings: Settings, sent: list[Call]
) -> None:
    give_account(settings, "u2")
    blocking.check("u2", "credits", 1, backend="gemini")
    hold = blocking.reserve("u2", "credits", 5, "k", backend="gemini")
    hold.capture("e1", 1)
    hold.settle(2)
    blocking.charge("u2", "credits", 3, "c", backend="gemini")
    blocking.emit("u2", "credits", 4, event_id="e2", dimensions={"backend": "gemini"})
    blocking.release("u2", "credits", "k")
    counts = {request.script.name: len(request.keys) for request in sent}
    assert counts.pop("install") == 4, "without pending maps, as no id is in the balance"
    assert counts == {
        "lease": 2, "check": 4, "reserve": 6, "capture": 5, "settle": 6, "charge": 7, "emit": 4, "release": 4,
    }  # fmt: skip
    assert not [name for request in sent for name in request.keys if "/" in name]
    assert {request.keys[0].split("}")[0] for request in sent} == {f"mf:{{p{partition_of(settings, 'u2').number}"}


def test_all_keys_of_a_script_share_one_tag(blocking: Billing, settings: Settings, sent: list[Call]) -> None:
    hold = blocking.reserve(USER, METER, 5, "k", backend="gemini")
    hold.capture("e1", 1)
    hold.settle(2)
    blocking.charge(USER, METER, 3, "c", backend="gemini")
    blocking.emit(USER, METER, 4, dimensions={"backend": "gemini"})
    blocking.remaining(USER)
    blocking.release(USER, METER, "k")
    tag = f"mf:{{p{partition_of(settings, USER).number}}}:"
    assert sent
    assert [name for request in sent for name in request.keys if not name.startswith(tag)] == []
    with_maps = [request for request in sent if request.script.name not in ("lease", "install")]
    assert all(any("/gemini" in name for name in request.keys) for request in with_maps)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def test_an_id_in_both_maps_counts_once(
    blocking: Billing, redis: Redis, settings: Settings, resources: Resources
) -> None:
    blocking.reserve(USER, METER, 30, "k1", backend="gemini")
    blocking.reserve(USER, METER, 30, "k2", backend="hardware")
    blocking.charge(USER, METER, 5, "c", backend="gemini")
    assert sum(partition.pending for partition in read_status(resources).partitions) == 3
    listed = open_holds(resources)
    assert sorted((hold.meter, hold.key, hold.amount, hold.left) for hold in listed) == [
        (METER, "k1", 30, 30),
        (METER, "k2", 30, 30),
    ]
    assert stage._pending(resources, USER) == ({(USER, "k1"), (USER, "k2")}, {(USER, "c")})


def test_the_proof_looks_at_sub_caps_as_well(
    blocking: Billing, redis: Redis, settings: Settings, resources: Resources
) -> None:
    blocking.charge(USER, METER, 5, "c", backend="gemini")
    report = verify_ledger(resources)
    assert (report.pending_maps, report.differences) == (2, [])
    redis.hincrby(account_of(settings, USER).pending(SUB_METER), "total", 3)
    assert verify_ledger(resources).differences == [f"{USER}: pending {SUB_METER} total 8, its ids sum to 5"]


# ---------------------------------------------------------------------------------------------------------------------
# What is left, and routing by it


def test_remaining_is_one_script_call(billing: Any, redis: Redis) -> None:
    billing.reserve(USER, METER, 30, "k1", backend="gemini")
    billing.charge(USER, METER, 50, "c", backend="hardware")
    left = Remaining(
        user_id=USER, meter=METER, kind="lifetime", limit=500, used=0, pending=80, remaining=420,
        backends=(BackendRemaining(backend="gemini", cap=100, used=0, pending=30, remaining=70),),
    )  # fmt: skip
    assert billing.remaining(USER) == left
    with redis.monitor() as monitor:
        assert billing.remaining(USER, METER) == left
        redis.echo("over")
        seen = list(takewhile(lambda each: each["command"] != "ECHO over", monitor.listen()))
    # Others may be at work in other databases of this Redis; what a script does is seen, too.
    database = redis.get_connection_kwargs().get("db", 0)
    sent = [each["command"].split()[0] for each in seen if each["db"] == database and each["client_type"] != "lua"]
    assert sent.count("EVALSHA") == 1, sent


@pytest.mark.parametrize(
    ("plan", "status", "meter", "expected"),
    [
        ("pro", "active", METER, ("monthly", 5_000, 5_000, (1_000,))),
        ("pro", "canceled", METER, ("monthly", 0, 0, (1_000,))),
        ("max_relay", "active", METER, ("unlimited", None, None, ())),
        ("tenant", "active", "credits", ("monthly", 1_000, 1_000, ())),
        ("tenant", "active", METER, (None, 0, 0, ())),
    ],
)
def test_remaining_knows_the_kind(
    settings: Settings, plan: str, status: str, meter: str, expected: tuple[Any, ...]
) -> None:
    give_account(settings, USER, plan, status)
    with Billing.connect(settings) as client:
        left = client.remaining(USER, meter)
        caps = tuple(backend.cap for backend in left.backends)
        assert (left.kind, left.limit, left.remaining, caps) == expected


def test_nothing_is_left_to_an_account_nobody_opened(billing: Any) -> None:
    left = billing.remaining("nobody")
    assert (left.kind, left.limit, left.remaining, left.backends) == (None, 0, 0, ())
    assert billing.plan_backend("nobody", "gemini_first", has_hardware=True).reason == "out_of_credits"


def test_billing_switched_off_leaves_everything(emptied_database_url: str, redis_url: str) -> None:
    settings = settings_for(emptied_database_url, redis_url, billing_enabled=False)
    with Billing.connect(settings) as client:
        assert client.remaining("nobody").remaining is None
        assert client.plan_backend("nobody", "gemini_only", has_hardware=False).backend == "gemini"
        answer = client.check("nobody", METER, 10**9, backend="gemini")
        assert (answer.reason, answer.backend) == (Reason.BILLING_DISABLED, "gemini")
        client.reserve("nobody", METER, 10**9, "k", backend="gemini").settle(5)


def test_a_backend_is_planned_by_what_is_left(billing: Any) -> None:
    answer = billing.plan_backend(USER, "gemini_first", has_hardware=True)
    assert answer == RoutingAnswer(
        user_id=USER, meter=METER, preference="gemini_first", allowed=True, backend="gemini", reason=None,
        remaining=500, sub_remaining=100,
    )  # fmt: skip
    billing.charge(USER, METER, 100, "c1", backend="gemini")
    assert billing.plan_backend(USER, "gemini_first", has_hardware=True).backend == "hardware"
    assert billing.plan_backend(USER, "gemini_first", has_hardware=False).reason == "gemini_cap_exceeded_no_hardware"
    billing.charge(USER, METER, 400, "c2", backend="hardware")
    answer = billing.plan_backend(USER, "hardware_only", has_hardware=True)
    assert (answer.allowed, answer.reason, answer.remaining, answer.sub_remaining) == (False, "out_of_credits", 0, 0)


def test_a_request_that_carries_its_tier(
    billing: Any, settings: Settings, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger is asked only then, and a changed plan is seen at once, whatever was cached."""
    questions: list[tuple[str, str]] = []
    real = LedgerView.on_tier

    def noted(view: LedgerView, user_id: str, tier: str) -> bool:
        questions.append((user_id, tier))
        return real(view, user_id, tier)

    monkeypatch.setattr(LedgerView, "on_tier", noted)
    assert billing.remaining("newcomer").remaining == 0
    assert questions == []
    assert billing.remaining("newcomer", tier="core").remaining == 500
    billing.charge("newcomer", METER, 60, "c1", backend="gemini")
    left = billing.remaining("newcomer", tier="pro")
    assert (left.kind, left.limit, left.pending, left.backends[0].cap) == ("monthly", 5_000, 60, 1_000)
    assert billing.remaining("newcomer", tier="pro") == left
    answer = billing.plan_backend("newcomer", "gemini_only", has_hardware=False, tier="max_relay")
    assert (answer.backend, answer.remaining, answer.sub_remaining) == ("gemini", None, None)
    assert questions == [("newcomer", tier) for tier in ("core", "pro", "pro", "max_relay")]
    with pytest.raises(InvalidRequest, match=r"^tier: must be a plan with relay_credits: core, .* \(got 'gold'\)$"):
        billing.remaining("newcomer", tier="gold")
    assert len(questions) == 4
    shown = accounts.show(resources, "newcomer")
    assert (shown.plan, shown.next_plan) == ("max_relay", None)
    drain(settings, "newcomer")  # the charge came before the plans
    renew_due(resources)
    assert rows(settings, "SELECT plan, next_plan FROM account WHERE user_id = 'newcomer'") == [("max_relay", None)]


def test_a_tier_counts_as_left_once_a_change_is_due(
    blocking: Billing, settings: Settings, resources: Resources
) -> None:
    """The job that stores the change has not run yet."""
    accounts.open_new(resources, "leaver", "pro")
    accounts.change_plan(resources, "leaver", "core", at="period_end")
    move_clock(settings, timedelta(days=32))
    assert blocking.remaining("leaver").kind == "lifetime"
    assert blocking.remaining("leaver", tier="core").kind == "lifetime"
    left = blocking.remaining("leaver", tier="pro")
    assert (left.kind, left.limit) == ("monthly", 5_000)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def test_wrong_backends_are_refused_before_anything_is_sent(billing: Any, redis: Redis) -> None:
    hold = billing.reserve(USER, METER, 1, "held")
    before = set(redis.keys())
    named: list[Callable[..., Any]] = [
        lambda **named: billing.check(USER, METER, 1, **named),
        lambda **named: billing.reserve(USER, METER, 1, "k", **named),
        lambda **named: billing.charge(USER, METER, 1, "c", **named),
        lambda **named: billing.capture(USER, METER, "k", "e", 1, **named),
        lambda **named: billing.settle(USER, METER, "k", 1, **named),
    ]
    for wrong in ("gemni", "", 7, "gemini/x", "GEMINI"):
        for attempt in named:
            with pytest.raises(InvalidRequest, match=r"^backend: must be one of gemini, hardware \(got "):
                attempt(backend=wrong)
    contradictions: list[Callable[..., Any]] = [
        lambda **named: billing.charge(USER, METER, 1, "c", **named),
        lambda **named: billing.capture(USER, METER, "k", "e", 1, **named),
        lambda **named: hold.settle(1, **named),
    ]
    for attempt in contradictions:
        with pytest.raises(InvalidRequest, match=r"^dimensions\.backend: must be gemini") as caught:
            attempt(backend="gemini", dimensions={"backend": "hardware"})
        assert caught.value.field == "dimensions.backend"
    for preference in ("", "cheapest", "GEMINI_FIRST"):
        with pytest.raises(InvalidRequest, match=r"^preference: must be one of gemini_first, .*, hardware_only"):
            billing.plan_backend(USER, preference, has_hardware=True)
    with pytest.raises(InvalidRequest, match=r"^meter: must be one of"):
        billing.remaining(USER, "relay_credits/gemini")
    assert set(redis.keys()) == before
