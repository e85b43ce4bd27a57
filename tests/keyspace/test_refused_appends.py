"""An append that Redis refuses leaves nothing behind, on a real server: its repeat is the first one that counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from worker.demo.servers import Server
from worker.keyspace import calls, keys, scripts
from worker.keyspace.keys import SPONSORSHIP, Partition, Stream

ACCOUNT = keys.AccountKeys(Partition(0), "u1")
METER, SUB_METER = "relay_credits", "relay_credits/gemini"
TTL_MS = 600_000
LAST_ID = "18446744073709551615-18446744073709551615"
LAST_BUT_ONE = "18446744073709551615-18446744073709551614"


@pytest.fixture
def redis(own_redis: Server) -> Iterator[Redis]:
    """An empty Redis with a cached balance of 1,000 units, 500 of them on one backend, and a pool of 1,000."""
    with Redis.from_url(own_redis.url) as client:
        client.flushdb()
        client.set(ACCOUNT.balance, f"1 1\n{METER} 1000 0 0 0 0 monthly\n{SUB_METER} 500 0 0 0 0")
        client.set(SPONSORSHIP.pool, "1 0\n1000")
        client.set(SPONSORSHIP.standing("u1"), "1 0\nelite 0 0")
        yield client
        client.flushdb()


def event(event_id: str, amount: int = 10, sub_meter: str | None = SUB_METER) -> calls.MarkedEvent:
    """An event as scripts append it."""
    return calls.MarkedEvent(ACCOUNT, METER, sub_meter, event_id, amount, amount, b"{}", "")


def reserve(redis: Redis) -> None:
    """Hold 100 units under "k", on the backend."""
    request = calls.reserve(ACCOUNT, METER, 100, "k", sub_meter=SUB_METER, ttl_ms=TTL_MS, outcome_ttl_ms=TTL_MS)
    assert scripts.run(redis, request)[0] == b"held"


def decide(redis: Redis) -> None:
    """Let the pool hold 100 units of the request "r"."""
    request = calls.sponsor_decide(
        "all", "u1", "r", wanted=100, estimate=100, paid=0, ttl_ms=TTL_MS, outcome_ttl_ms=TTL_MS, tier="",
        daily_budgets={"new": 0, "elite": 1_000}, call_id="c1",
    )  # fmt: skip
    assert scripts.run(redis, request)[0] == b"held"


def decide_and_wait(redis: Redis) -> None:
    """The same, and the hold's time is over."""
    decide(redis)
    redis.hset(SPONSORSHIP.hold("r"), "expires_ms", 1)


SETTLE_REQUEST = calls.sponsor_settle(
    "u1", "r", actual=40, paid=None, outcome_ttl_ms=TTL_MS, tier="", daily_budgets={"new": 0, "elite": 1_000}
)


def nothing(_: Redis) -> None:
    """Nothing comes before."""


# Stream, what comes before, the call, and whether its answer says that it was a repeat.
Case = tuple[Stream, Callable[[Redis], None], scripts.Call, Callable[[Any], bool]]
CASES: dict[str, Case] = {
    "emit": (ACCOUNT.partition, nothing, calls.emit([event("a"), event("b")]), lambda reply: reply != 1),
    "capture": (
        ACCOUNT.partition, reserve, calls.capture(event("a"), "k", [SUB_METER], outcome_ttl_ms=TTL_MS),
        lambda reply: bool(reply[2]),
    ),
    "capture without a hold": (
        ACCOUNT.partition, nothing, calls.capture(event("a"), "k", [SUB_METER], outcome_ttl_ms=TTL_MS),
        lambda reply: bool(reply[2]),
    ),
    "settle": (
        ACCOUNT.partition, reserve, calls.settle(event("k"), "k", [SUB_METER], outcome_ttl_ms=TTL_MS),
        lambda reply: bool(reply[3]) or reply[0] != b"held",
    ),
    "charge": (
        ACCOUNT.partition, nothing, calls.charge(event("a"), outcome_ttl_ms=TTL_MS), lambda reply: bool(reply[7])
    ),
    "sponsor_settle": (SPONSORSHIP, decide, SETTLE_REQUEST, lambda reply: bool(reply[6])),
    "late sponsor_settle": (SPONSORSHIP, decide_and_wait, SETTLE_REQUEST, lambda reply: bool(reply[6])),
    "sponsor_credit": (SPONSORSHIP, nothing, calls.sponsor_credit("r", 100), lambda reply: reply != 1),
}  # fmt: skip


@contextmanager
def last_id_taken(redis: Redis, stream: Stream) -> Iterator[None]:
    """No entry can follow the last one."""
    redis.xadd(stream.entries, {"v": "1"}, id=LAST_ID)
    yield
    redis.delete(stream.entries)


@contextmanager
def wrong_type(redis: Redis, stream: Stream) -> Iterator[None]:
    """Somebody put another value where the stream was."""
    redis.set(stream.entries, "mine")
    yield
    redis.delete(stream.entries)


@contextmanager
def right_taken_away(redis: Redis, stream: Stream) -> Iterator[None]:
    """The role may not append any more."""
    redis.execute_command("ACL SETUSER default -xadd")
    try:
        yield
    finally:
        redis.execute_command("ACL SETUSER default +xadd")


@contextmanager
def key_taken_away(redis: Redis, stream: Stream) -> Iterator[None]:
    """The role may not touch the stream any more."""
    rest = (
        "balance",
        "pending",
        "lease",
        "hold",
        "charge",
        "pool",
        "promised",
        "standing",
        "today",
        "rung",
        "expiries",
    )
    redis.execute_command("ACL SETUSER default resetkeys " + " ".join(f"~mf:*:{name}*" for name in rest))
    try:
        yield
    finally:
        redis.execute_command("ACL SETUSER default allkeys")


@contextmanager
def out_of_memory(redis: Redis, stream: Stream) -> Iterator[None]:
    """Redis has no room for more."""
    redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        redis.config_set("maxmemory", 0)


FAILURES = [last_id_taken, wrong_type, right_taken_away, key_taken_away, out_of_memory]


def everything(redis: Redis, *, but: str) -> dict[bytes, object]:
    """All that Redis knows, apart from one key and from holds whose time is over."""
    reads: dict[Any, Callable[[bytes], object]] = {
        b"hash": redis.hgetall,
        b"zset": lambda key: redis.zrange(key, 0, -1),
        b"string": redis.get,
        b"stream": redis.xrange,
    }
    return {key: reads[redis.type(key)](key) for key in redis.scan_iter() if key != but.encode()}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
@pytest.mark.parametrize("name", CASES)
def test_what_was_not_appended_is_not_remembered(
    redis: Redis, name: str, failure: Callable[[Redis, Stream], Any]
) -> None:
    stream, prepare, request, is_repeat = CASES[name]
    prepare(redis)
    if name.startswith("late"):  # an attempt may take out the hold that is over: that is no trace of the request
        with wrong_type(redis, stream), pytest.raises(RedisError):
            scripts.run(redis, request)
    before = everything(redis, but=stream.entries)
    with failure(redis, stream):
        for _ in range(2):
            with pytest.raises(RedisError):
                scripts.run(redis, request)
        redis.execute_command("ACL SETUSER default allkeys")
        assert everything(redis, but=stream.entries) == before
    assert not is_repeat(scripts.run(redis, request))
    assert redis.xlen(stream.entries) == (2 if name == "emit" else 1)


def test_the_part_of_an_emit_that_was_appended_is_pending(redis: Redis) -> None:
    """The stream ends between two events: the first one is there and counts, the second is neither."""
    redis.xadd(ACCOUNT.partition.entries, {"v": "1"}, id=LAST_BUT_ONE)
    with pytest.raises(RedisError, match="exhausted"):
        scripts.run(redis, calls.emit([event("a", sub_meter=None), event("b")]))
    assert redis.xlen(ACCOUNT.partition.entries) == 2
    assert redis.hgetall(ACCOUNT.pending(METER)) == {b"e:a": b"10", b"total": b"10"}
    assert not redis.exists(ACCOUNT.pending(SUB_METER))


@pytest.mark.parametrize(
    "right", ["hset", "hsetnx", "hincrby", "pexpire", "zadd"], ids=lambda right: f"without {right}"
)
def test_a_hold_that_was_not_made_whole_ends(redis: Redis, right: str) -> None:
    """Whatever Redis refuses of a reserve, what it counts as pending has an end."""
    request = calls.reserve(ACCOUNT, METER, 100, "k", sub_meter=SUB_METER, ttl_ms=TTL_MS, outcome_ttl_ms=TTL_MS)
    redis.execute_command(f"ACL SETUSER default -{right}")
    try:
        with pytest.raises(RedisError):
            scripts.run(redis, request)
    finally:
        redis.execute_command(f"ACL SETUSER default +{right}")
    for meter in (METER, SUB_METER):
        if redis.hexists(ACCOUNT.pending(meter), "h:k"):
            assert redis.zscore(ACCOUNT.holds(meter), "k") is not None
            assert redis.zscore(ACCOUNT.partition.expiries, ACCOUNT.expiring(meter)) is not None
