"""The Lua scripts without a server: sums that stay true, and the same arithmetic as the rules in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.keyspace.lua import LARGEST, TOTALS, Lua
from worker.keyspace import scripts
from worker.rules.limits import PERS, SETTERS, LimitStanding
from worker.rules.preflight import Spend, bounds_text, check_answer, standing_in_reply
from worker.rules.waterfall import Buckets, available


@pytest.fixture(scope="module")
def lua() -> Lua:
    """One interpreter for the tests that leave nothing behind."""
    return Lua()


FITS = (
    scripts.script("check").text.partition("\n")[2].partition("-- check:")[0]
    + "\nlocal b = {limit = ARGV[1], used = ARGV[2], rollover = ARGV[3], purchased = ARGV[4], spill = ARGV[5]}"
    + "\nreturn fits(b, ARGV[6], ARGV[7]) and 1 or 0"
)
quantities = st.integers(0, LARGEST) | st.integers(0, 50) | st.integers(LARGEST - 50, LARGEST)
limits = st.none() | st.integers(0, 10**12) | st.integers(0, 50)
buckets = st.builds(
    Buckets,
    limit=limits,
    used=quantities,
    rollover=st.integers(-LARGEST, LARGEST) | st.integers(-50, 50),
    purchased=quantities,
    spill=st.booleans(),
)


def fits(lua: Lua, balance: Buckets, pending: int, amount: int) -> bool:
    """What the Lua says about an amount beside what is pending."""
    limit = "-" if balance.limit is None else balance.limit
    args = [limit, balance.used, balance.rollover, balance.purchased, int(balance.spill), pending, amount]
    return bool(lua.eval(FITS, [], args))


@settings(max_examples=300)
@given(buckets, quantities, st.data())
def test_lua_and_python_agree_on_what_fits(lua: Lua, balance: Buckets, pending: int, data: st.DataObject) -> None:
    left = available(balance, pending)
    edge = [] if left is None else [amount for amount in (left - 1, left, left + 1) if 0 <= amount <= 10**12]
    amount = data.draw(st.integers(0, 10**12) | (st.sampled_from(edge) if edge else st.nothing()))
    assert fits(lua, balance, pending, amount) is (left is None or amount <= left)


ENDS_AT = datetime(2088, 3, 2, tzinfo=UTC)
bounds = st.lists(
    st.builds(
        LimitStanding,
        per=st.sampled_from(PERS),
        set_by=st.sampled_from(SETTERS),
        amount=st.integers(1, 10**12) | st.integers(1, 60),
        used=quantities | st.integers(-9, 9),
        starts_at=st.none(),
        ends_at=st.just(ENDS_AT),
    ),
    max_size=3,
)


@settings(max_examples=300)
@given(buckets, bounds, st.sampled_from([None, "allowance"]), st.booleans(), quantities, st.data())
def test_lua_and_python_agree_on_limits_and_on_what_is_paid_from(
    lua: Lua,
    balance: Buckets,
    limits: Sequence[LimitStanding],
    pay_from: str | None,
    once: bool,
    pending: int,
    data: st.DataObject,
) -> None:
    lua.redis.flushall()
    lua.set_clock(1_000_000)
    numbers = f"{'-' if balance.limit is None else balance.limit} {balance.used} {balance.rollover} {balance.purchased}"
    text = f"1 1\nvoice {numbers} {int(balance.spill)} monthly {bounds_text(limits, pay_from)}".rstrip()
    lua.redis.set("balance", f"{text}\nother 1 0 0 0 1 daily")
    lua.redis.hset("pending", "total", pending)
    keys = ["balance", "pending", "holds"]
    free = standing_in_reply(lua.run("check", keys, ["voice", 0]), [])
    assert free is not None
    assert (list(free.limits), free.pay_from, free.buckets) == (list(limits), pay_from, balance)
    left = free.available("allowance" if once else None)
    edge = [] if left is None else [amount for amount in (left - 1, left, left + 1) if 0 <= amount <= 10**12]
    amount = data.draw(st.integers(0, 10**12) | (st.sampled_from(edge) if edge else st.nothing()))
    reply = lua.run("check", keys, ["voice", amount, *(["-purchased"] if once else [])])
    answer = check_answer(Spend("u1", "voice", amount), standing_in_reply(reply, []))
    assert (reply[0] == b"allowed") == answer.allowed == (left is None or amount <= left)
    assert (reply[0] == b"limited") == (answer.limited_by is not None)


@pytest.mark.parametrize("more", [0, 1])
def test_the_edge_is_exact_for_the_largest_balances(lua: Lua, more: int) -> None:
    balance = Buckets(limit=10**12, used=0, rollover=-(LARGEST - 3), purchased=LARGEST, spill=True)
    assert fits(lua, balance, 10**12, 3 + more) is (more == 0)
    assert fits(lua, balance._replace(rollover=0, purchased=LARGEST - 10**12), LARGEST - 7, 7 + more) is (more == 0)


@pytest.mark.parametrize("number", [0, 1, 10**12, LARGEST, LARGEST - 1, 2**53 - 1])
def test_totals_are_written_as_integers(lua: Lua, number: int) -> None:
    lua.redis.delete("pending")
    lua.run("emit", ["stream", "rung", "pending"], [1_000, "a", number, "{}", ""])
    lua.run("emit", ["stream", "rung", "pending"], [1_000, "b", 0, "{}", ""])
    assert lua.redis.hget("pending", "total") == b"%d" % number
    lua.run("publish", ["stream", "minute", "balance", "lease", "pending"], [0, 1, "", 0, 1, 1, "e:a"])
    assert lua.redis.hgetall("pending") == {b"e:b": b"0", b"total": b"0"}


def test_an_id_listed_twice_leaves_pending_once(lua: Lua) -> None:
    """An emit with a lost reply makes two stream entries of one batch, which name the same pending id."""
    lua.redis.delete("pending")
    lua.run("emit", ["stream", "rung", "pending", "pending"], [1_000, "twice", 5, "{}", "", "other", 3, "{}", ""])
    lua.run("publish", ["stream", "minute", "balance", "lease", "pending"], [0, 1, "", 0, 1, 2, "e:twice", "e:twice"])
    assert lua.redis.hgetall("pending") == {b"e:other": b"3", b"total": b"3"}


def test_a_publication_of_thousands_of_ids(lua: Lua) -> None:
    lua.redis.flushall()
    lua.set_clock(1_000_000)
    ids = [f"id-{number}" for number in range(2_500)]
    args: list[Any] = [1_000]
    for event_id in ids:
        args += (event_id, 2, "{}", "")
    lua.run("emit", ["stream", "rung", *["pending"] * len(ids)], args)
    entries = [raw_id.decode() for raw_id, _ in lua.redis.xrange("stream")]
    listed = [f"e:{event_id}" for event_id in ids]
    keys = ["stream", "minute", "balance", "lease", "pending"]
    assert lua.run("publish", keys, [len(entries), *entries, 1, "", 0, 1, len(listed), *listed]) == len(ids)
    assert not lua.redis.exists("pending")
    assert lua.redis.xlen("stream") == 0
    assert lua.redis.get("minute") == b"2500"


# On the clock of Redis; later than any test.
LATER_MS = 10**13

VERSIONS = ["1 1", "1 2", "1 10", "2 1", "9 0", "10 0", f"1 {LARGEST}"]


@pytest.mark.parametrize("old", VERSIONS)
@pytest.mark.parametrize("new", VERSIONS)
def test_a_newer_balance_is_never_replaced_by_an_older_one(lua: Lua, old: str, new: str) -> None:
    def order(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split()))

    wanted = (new if order(new) >= order(old) else old).encode()
    keys = ["stream", "minute", "balance", "lease"]
    lua.redis.set("balance", f"{old}\ncredits 1 0 0 0 1")
    lua.run("publish", keys, [0, 1, f"{new}\ncredits 2 0 0 0 1", LATER_MS, 0])
    published = lua.redis.get("balance")
    if order(new)[0] < order(old)[0]:
        assert published is None, "whether a balance of another epoch holds this debit nobody can say"
    else:
        assert published is not None
        assert published.split(b"\n")[0] == wanted
    lua.redis.set("balance", f"{old}\ncredits 1 0 0 0 1")
    token = lua.run("lease", ["lease"], ["token", 5_000])
    lua.run("install", ["balance", "lease"], [token, f"{new}\ncredits 2 0 0 0 1", 60_000, 0, 0])
    installed = lua.redis.get("balance")
    assert installed is not None
    assert installed.split(b"\n")[0] == wanted


def test_a_balance_whose_life_is_over_is_not_published(lua: Lua) -> None:
    """A drain that was frozen after its COMMIT must not show the period that ended meanwhile."""
    lua.set_clock(1_000_000)
    keys = ["stream", "minute", "balance", "lease"]
    for ends_ms, cached in ((999_999, None), (1_000_000, None), (1_060_000, b"1 2\ncredits 2 0 0 0 1")):
        lua.redis.set("balance", "1 1\ncredits 1 0 0 0 1")
        lua.run("publish", keys, [0, 1, "1 2\ncredits 2 0 0 0 1", ends_ms, 0])
        assert lua.redis.get("balance") == cached
    assert 0 < lua.redis.pttl("balance") <= 60_000


def test_an_account_that_is_gone_is_not_cached_any_longer(lua: Lua) -> None:
    lua.redis.set("balance", "1 7\ncredits 1 0 0 0 1")
    lua.run("publish", ["stream", "minute", "balance", "lease"], [0, 1, "", 0, 0])
    assert not lua.redis.exists("balance")


def test_a_publish_takes_the_lease_and_caches_nothing_by_itself(lua: Lua) -> None:
    lua.redis.delete("balance", "lease")
    token = lua.run("lease", ["lease"], ["first", 5_000])
    assert token.startswith(b"first:")
    assert lua.run("lease", ["lease"], ["second", 5_000]) == token
    lua.run("publish", ["stream", "minute", "balance", "lease"], [0, 1, "1 5\ncredits 1 0 0 0 1", LATER_MS, 0])
    assert not lua.redis.exists("balance")
    assert lua.run("install", ["balance", "lease"], [token, "1 4\ncredits 9 0 0 0 1", 60_000, 0, 0]) == 0
    assert not lua.redis.exists("balance")


def test_ids_are_shed_under_a_lease_that_no_earlier_load_shares(lua: Lua) -> None:
    lua.redis.delete("balance", "lease", "pending")
    lua.redis.hset("pending", mapping={"e:a": 2, "e:b": 3, "total": 5})
    token = lua.run("lease", ["lease"], ["first", 5_000])
    lua.redis.set("balance", "1 1 5\ncredits 9 0 0 0 1")
    fresh = lua.run("shed", ["balance", "lease", "pending"], [token, "second", 5_000, 1, "e:a"])
    assert fresh.partition(b":")[::2] == (b"second", token.partition(b":")[2]), "its life begins as before"
    assert not lua.redis.exists("balance")
    assert lua.redis.hgetall("pending") == {b"e:b": b"3", b"total": b"3"}
    text = "1 4\ncredits 9 2 0 0 1"
    assert lua.run("install", ["balance", "lease"], [token, text, 60_000, 0, 0]) == 0, "it read the ledger earlier"
    assert lua.run("lease", ["lease"], ["third", 5_000]) == fresh
    lua.run("publish", ["stream", "minute", "balance", "lease"], [0, 1, "1 3\ncredits 9 0 0 0 1", LATER_MS, 0])
    assert not lua.redis.exists("balance"), "an older balance of a slow worker is not cached"
    assert lua.run("shed", ["balance", "lease", "pending"], [fresh, "fourth", 5_000, 1, "e:b"]) is None
    assert lua.redis.hgetall("pending") == {b"e:b": b"3", b"total": b"3"}


@pytest.mark.parametrize(("waited", "left"), [(0, 40_000), (1, 39_999), (39_999, 1), (40_000, None), (90_000, None)])
def test_a_balance_lives_from_the_moment_its_lease_was_taken(lua: Lua, waited: int, left: int | None) -> None:
    """A load may be slow: its balance must not outlive the boundary that its life was cut to."""
    lua.redis.flushall()
    lua.set_clock(1_000_000)
    token = lua.run("lease", ["lease"], ["first", 100_000])
    lua.set_clock(1_000_000 + waited)
    lua.run("emit", ["stream", "rung", "pending"], [1_000, "a", 5, "{}", ""])
    args = [token, "1 1\ncredits 10 5 0 0 1", 40_000, 0, 0, 1, "e:a"]
    reply = lua.run("install", ["balance", "lease", "pending"], args)
    assert not lua.redis.exists("lease"), "the next load takes a lease of its own time"
    if left is None:
        assert reply == b"late"
        assert not lua.redis.exists("balance")
        assert lua.redis.hgetall("pending") == {b"e:a": b"5", b"total": b"5"}, "what was not installed contains nothing"
    else:
        assert reply == 1
        # The life runs by a real clock here, and one of a millisecond is over before anyone looks.
        assert (left - 5_000 if left > 5_000 else -2) <= lua.redis.pttl("balance") <= left
        assert not lua.redis.exists("pending")


def test_a_balance_whose_life_is_shorter_than_its_load_is_cached_for_a_moment(lua: Lua) -> None:
    """Else a slow Postgres, or a boundary that does not come nearer, would keep a check loading for ever."""
    lua.redis.delete("balance")
    lua.set_clock(1_000_000)
    token = lua.run("lease", ["lease"], ["first", 100_000])
    lua.set_clock(1_000_100)
    assert lua.run("install", ["balance", "lease"], [token, "1 1\ncredits 10 5 0 0 1", 1, 50_000, 0]) == 1
    assert 45_000 <= lua.redis.pttl("balance") <= 50_000


def test_a_kept_balance_becomes_stale_and_ends_later(lua: Lua) -> None:
    lua.redis.flushall()
    lua.set_clock(1_000_000)
    token = lua.run("lease", ["lease"], ["first", 100_000])
    lua.set_clock(1_000_100)
    text = "1 1\ncredits 10 5 0 0 1"
    assert lua.run("install", ["balance", "lease"], [token, text, 40_000, 0, 90_000]) == 1
    assert lua.redis.get("balance") == b"1 1 1040000\ncredits 10 5 0 0 1", "both count from the lease"
    assert 85_000 <= lua.redis.pttl("balance") <= 89_900
    for at, status in ((1_039_999, b"allowed"), (1_040_000, b"stale")):
        lua.set_clock(at)
        assert lua.run("check", ["balance", "pending", "holds"], ["credits", 5])[0] == status


def test_a_stale_balance_is_used_again_for_a_moment_and_ends_when_it_would_have(lua: Lua) -> None:
    lua.set_clock(1_000_000)
    lua.redis.set("balance", "1 1 1000001\ncredits 10 5 0 0 1", px=90_000)
    assert lua.run("reuse", ["balance"], [700]) == 1
    assert lua.redis.get("balance") == b"1 1 1000001\ncredits 10 5 0 0 1", "a fresh one stays as it is"
    lua.set_clock(1_000_001)
    assert lua.run("reuse", ["balance"], [700]) == 1
    assert lua.redis.get("balance") == b"1 1 1000701\ncredits 10 5 0 0 1"
    assert 85_000 <= lua.redis.pttl("balance") <= 90_000
    lua.redis.delete("balance")
    assert lua.run("reuse", ["balance"], [700]) == 0
    assert not lua.redis.exists("balance")


def test_a_stale_balance_counts_as_none_for_a_load_and_as_a_balance_for_a_publish(lua: Lua) -> None:
    """A standby that took over may lack commits: then a load would else ask again and again."""
    keys = ["stream", "minute", "balance", "lease"]
    lua.set_clock(1_000_000)
    for fresh_until, installed in (("1000001", 0), ("1000000", 1)):
        lua.redis.set("balance", f"1 7 {fresh_until}\ncredits 10 5 0 0 1")
        token = lua.run("lease", ["lease"], ["token", 5_000])
        assert lua.run("install", ["balance", "lease"], [token, "1 6\ncredits 9 0 0 0 1", 60_000, 0, 0]) == installed
    lua.redis.set("balance", "1 7 1000000\ncredits 10 5 0 0 1")
    lua.run("publish", keys, [0, 1, "1 6 2000000\ncredits 2 0 0 0 1", LATER_MS, 0])
    assert lua.redis.get("balance") == b"1 7 1000000\ncredits 10 5 0 0 1", "an older one replaces nothing"
    lua.run("publish", keys, [0, 1, "1 8 2000000\ncredits 2 0 0 0 1", LATER_MS, 0])
    assert lua.redis.get("balance") == b"1 8 2000000\ncredits 2 0 0 0 1", "a newer one wins"


def test_a_lease_of_an_older_release_counts_from_now(lua: Lua) -> None:
    lua.redis.delete("balance")
    lua.redis.set("lease", "an-older-token")
    assert lua.run("lease", ["lease"], ["first", 5_000]) == b"an-older-token"
    assert lua.run("install", ["balance", "lease"], ["an-older-token", "1 4\ncredits 9 0 0 0 1", 60_000, 0, 0]) == 1
    assert 55_000 <= lua.redis.pttl("balance") <= 60_000


@pytest.mark.parametrize(
    ("text", "meter", "status"),
    [
        ("1 1\ncredits 10 0 0 0 1", b"credits", b"allowed"),
        ("1 1\nrelay_credits 10 0 0 0 0\ncredits 0 0 0 0 1", b"credits", b"denied"),
        ("1 1\ncredits 0 0 0 0 1\nrelay_credits 10 0 0 0 0", b"relay_credits", b"allowed"),
        ("1 1\nmore_credits 10 0 0 0 1", b"credits", b"absent"),
        ("1 1\ncredits_more 10 0 0 0 1", b"credits", b"absent"),
        ("1 1", b"credits", b"absent"),
        ("1 0\n?", b"credits", b"unknown"),
        ("1 1\ncredits - 99 -5 0 1", b"credits", b"allowed"),
        ("1 1\ncredits 10 0 -5 4 1", b"credits", b"allowed"),
        ("1 1\ncredits 10 0 -5 3 1", b"credits", b"denied"),
        ("1 1\ncredits 10 9 90 90 0", b"credits", b"denied"),
    ],
)
def test_a_check_reads_its_own_meter(lua: Lua, text: str, meter: bytes, status: bytes) -> None:
    lua.redis.delete("pending", "holds")
    lua.redis.set("balance", text)
    assert lua.run("check", ["balance", "pending", "holds"], [meter, 9])[0] == status


CAPPED = "1 1\nrelay 10 0 0 0 0 lifetime\nrelay/gemini 4 1 0 0 0 lifetime"


@pytest.mark.parametrize(
    ("text", "amount", "pending", "answer"),
    [
        (CAPPED, 2, (0, 0), [b"allowed", b"10", b"0", b"0", b"0", b"0", b"0", b"lifetime", b"4", b"1", b"0"]),
        (CAPPED, 3, (1, 1), [b"capped", b"10", b"0", b"0", b"0", b"0", b"1", b"lifetime", b"4", b"1", b"1"]),
        (CAPPED, 3, (9, 1), [b"denied", b"10", b"0", b"0", b"0", b"0", b"9", b"lifetime", b"4", b"1", b"1"]),
        (CAPPED, 0, (10, 9), [b"allowed", b"10", b"0", b"0", b"0", b"0", b"10", b"lifetime", b"4", b"1", b"9"]),
        ("1 1\nrelay 10 0 0 0 0 lifetime", 9, (1, 5),
         [b"allowed", b"10", b"0", b"0", b"0", b"0", b"1", b"lifetime", b"-", b"0", b"5"]),
        ("1 1\nrelay - 7 0 0 0 unlimited\nrelay/gemini 4 4 0 0 0 monthly", 1, (0, 0),
         [b"capped", b"-", b"7", b"0", b"0", b"0", b"0", b"unlimited", b"4", b"4", b"0"]),
        ("1 1\nrelay/gemini 4 0 0 0 0 monthly", 1, (0, 0),
         [b"absent", b"0", b"0", b"0", b"0", b"1", b"0", b"", b"4", b"0", b"0"]),
        ("1 1\nrelay 10 0 0 0 0", 9, (1, 0),
         [b"allowed", b"10", b"0", b"0", b"0", b"0", b"1", b"", b"-", b"0", b"0"]),
        ("1 0\n?", 1, (0, 0), [b"unknown", b"0", b"0", b"0", b"0", b"1", b"0", b"", b"-", b"0", b"0"]),
    ],
)  # fmt: skip
def test_the_gate_asks_the_meter_then_the_cap_of_the_backend(
    lua: Lua, text: str, amount: int, pending: tuple[int, int], answer: list[bytes]
) -> None:
    lua.redis.flushall()
    lua.set_clock(1_000_000)
    lua.redis.set("balance", text)
    for name, total in zip(("pending", "capped"), pending, strict=True):
        lua.redis.hset(name, mapping={"e:x": total, "total": total})
    keys = ["balance", "pending", "holds", "capped", "capped-holds"]
    assert lua.run("check", keys, ["relay", amount, "relay/gemini"]) == answer
    assert lua.run("check", keys[:3], ["relay", amount])[1:] == answer[1:8], "without a backend only the meter counts"


def test_one_check_answers_for_several_backends(lua: Lua) -> None:
    lua.redis.flushall()
    lua.set_clock(1_000_000)
    lua.redis.set("balance", "1 1\nrelay 10 0 0 0 0 daily\nrelay/a 4 1 0 0 0 daily\nrelay/b 3 0 0 0 0 daily")
    lua.redis.hset("b", mapping={"e:x": 2, "total": 2})
    keys = ["balance", "pending", "holds", "a", "a-holds", "b", "b-holds", "c", "c-holds"]
    reply = lua.run("check", keys, ["relay", 0, "relay/a", "relay/b", "relay/c"])
    assert reply[7:] == [b"daily", b"4", b"1", b"0", b"3", b"0", b"2", b"-", b"0", b"0"]


# ---------------------------------------------------------------------------------------------------------------------
# A hold that lives on, or grows


def reserve(lua: Lua, amount: int, *, ttl: int = 1_000, multiplier: str = "", sub: bool = False) -> Any:
    """Hold `amount` of 40 units under the key k, 25 of them on the backend with the sub-cap."""
    keys = ["balance", "pending", "holds", "hold", "expiries", *(SUB_KEYS if sub else [])]
    named = [f"u:{SUB_METER}", SUB_METER] if sub else []
    return lua.run("reserve", keys, ["credits", amount, "k", ttl, 900_000, "u:credits", "", multiplier, "c1", *named])


def extend(
    lua: Lua,
    amount: int | str = "",
    ttl: int | str = "",
    *,
    meter: str = "credits",
    unchecked: str = "",
    sub: bool = True,
) -> Any:
    """Extend the hold k."""
    keys = ["balance", "pending", "holds", "hold", "expiries", *(SUB_KEYS if sub else [])]
    named = [SUB_METER, f"u:{SUB_METER}"] if sub else []
    return lua.run("extend", keys, [meter, amount, "k", ttl, 900_000, f"u:{meter}", unchecked, *named])


def capture(lua: Lua, event_id: str, amount: int) -> Any:
    """Take a part of the hold k."""
    keys = ["pending", "hold", "stream", "rung", SUB_KEYS[0]]
    return lua.run("capture", keys, ["k", event_id, amount, "{}", "", 60_000, 900_000, amount])


@pytest.fixture
def held(lua: Lua) -> Lua:
    """An empty Redis with a balance of 40 units, 25 of them on the backend."""
    lua.redis.flushall()
    lua.set_clock(1_000_000)
    lua.redis.set("balance", f"1 1\ncredits 40 0 0 0 1 monthly\n{SUB_METER} 25 0 0 0 0 monthly")
    return lua


def test_an_extended_hold_ends_so_long_after_now(held: Lua) -> None:
    reserve(held, 10, ttl=5_000, sub=True)
    for now, ttl, ends in (
        (1_004_999, 5_000, 1_009_999),
        (1_009_000, 100, 1_009_100),
        (1_009_050, 604_800_000, 605_809_050),
    ):
        held.set_clock(now)
        assert extend(held, ttl=ttl) == [b"held", b"10", b"10", b"%d" % ends, SUB_METER.encode(), b""]
        assert held.redis.zscore("holds", "k") == held.redis.zscore(SUB_KEYS[1], "k") == ends
        assert held.redis.hget("hold", "expires_ms") == b"%d" % ends
        assert ttl + 895_000 < held.redis.pttl("hold") <= ttl + 900_000
        # The sweep looks no later than the hold ends; where it looks too early it notes when to look again.
        assert held.redis.zscore("expiries", "u:credits") <= ends
        assert held.redis.zscore("expiries", f"u:{SUB_METER}") <= ends


def test_a_hold_that_is_over_stays_over(held: Lua) -> None:
    assert extend(held, 20, 5_000) == [b"missing"]
    assert held.redis.keys("hold*") == []
    reserve(held, 10, ttl=5_000)
    held.set_clock(1_005_000)
    assert extend(held, 20, 5_000) == [b"closed", b"expired"]
    held.run("settle", ["pending", "holds", "hold", "stream", "rung"], ["k", "k", 5, "{}", "", 60_000, 900_000, 5])
    assert extend(held, 20, 5_000) == [b"closed", b"settled"]
    assert held.redis.hgetall("pending") == {b"e:k": b"5", b"total": b"5"}
    assert held.redis.zcard("holds") == 0
    held.redis.delete("hold")
    held.run("release", ["pending", "holds", "hold"], ["k", 900_000])
    assert extend(held, 20, 5_000) == [b"closed", b"released"]


def test_a_hold_that_an_applied_event_closes_is_not_extended_in_between(held: Lua) -> None:
    """The publish takes the id, `close` follows: an id that came back in between would stay until it expired."""
    reserve(held, 10)
    held.run("publish", ["stream", "minute", "balance", "lease", "pending"], [0, 1, "", 0, 1, 1, "h:k"])
    assert extend(held, 20, 5_000) == [b"closed", b"settled"]
    assert not held.redis.exists("pending")


@pytest.mark.parametrize(
    ("captures", "amount", "left"),
    [
        ([], 15, 15), ([], 5, 5), ([], 0, 0), ([4], 15, 11), ([4], 4, 0), ([4], 3, 0), ([4, 6], 12, 2),
        ([4, 8], 12, 0), ([4, 8], 15, 3), ([25], 30, 5), ([4], 10, 6),
    ],
)  # fmt: skip
def test_what_is_left_is_the_amount_without_what_was_captured(
    held: Lua, captures: list[int], amount: int, left: int
) -> None:
    reserve(held, 10)
    for number, part in enumerate(captures):
        capture(held, f"page-{number}", part)
    for _ in range(2):
        assert extend(held, amount)[1:3] == [b"%d" % amount, b"%d" % left]
        assert held.redis.hget("pending", "h:k") == b"%d" % left
        assert held.redis.hget("pending", "total") == b"%d" % (left + sum(captures))
    capture(held, "last", left + 1)
    assert extend(held, amount + 3)[2] == b"%d" % max(0, amount + 3 - sum(captures) - left - 1)


def test_what_came_before_the_hold_was_not_taken_from_it(held: Lua) -> None:
    capture(held, "overtook-its-reserve", 4)
    reserve(held, 10)
    assert extend(held, 11)[1:3] == [b"11", b"11"]


def test_the_parts_of_a_hold_are_summed_however_many_there_are(held: Lua) -> None:
    held.redis.set("balance", "1 1\ncredits - 0 0 0 1 unlimited")
    reserve(held, 1)
    for number in range(2_500):
        held.redis.hset("hold", f"captured:{number}", 2)
    capture(held, "cuts-short", 5)
    assert extend(held, 6_000)[1:3] == [b"6000", b"995"]


def test_only_what_comes_on_top_is_checked(held: Lua) -> None:
    reserve(held, 30)
    assert extend(held, 40)[0] == b"held"
    refused = extend(held, 41, 5_000)
    assert refused == [b"refused", b"1", b"", b"denied", b"40", b"0", b"0", b"0", b"1", b"40", b"monthly"]
    assert held.redis.hgetall("pending") == {b"h:k": b"40", b"total": b"40"}
    assert held.redis.hget("hold", "expires_ms") == b"1001000", "a denial leaves the hold as it was"
    assert extend(held, 41, unchecked="1")[:2] == [b"held", b"41"]
    held.redis.delete("balance")
    assert extend(held, 42) == [b"load"]
    assert extend(held, 10, 5_000)[:3] == [b"held", b"10", b"10"], "what frees asks for no balance"
    assert extend(held, ttl=5_000)[0] == b"held"


def test_a_hold_grows_within_the_cap_of_its_backend(held: Lua) -> None:
    reserve(held, 20, sub=True)
    assert extend(held, 25)[:2] == [b"held", b"25"]
    assert held.redis.hgetall(SUB_KEYS[0]) == {b"h:k": b"25", b"total": b"25"}
    refused = extend(held, 26)
    assert refused[:4] == [b"refused", b"1", SUB_METER.encode(), b"capped"]
    assert refused[-3:] == [b"25", b"0", b"25"]
    assert extend(held, 24)[:2] == [b"held", b"24"]
    assert held.redis.hgetall(SUB_KEYS[0]) == {b"h:k": b"24", b"total": b"24"}


def test_a_hold_on_another_meter_or_an_unknown_backend_is_a_conflict(held: Lua) -> None:
    reserve(held, 20, sub=True)
    assert extend(held, 25, meter="other") == [b"conflict", b"credits", b"20", SUB_METER.encode()]
    assert extend(held, 25, sub=False) == [b"conflict", b"credits", b"20", SUB_METER.encode()]
    assert held.redis.hgetall("pending") == {b"h:k": b"20", b"total": b"20"}


def test_a_hold_remembers_the_multiplier_it_was_reserved_with(held: Lua) -> None:
    first = [b"held", b"10", b"10", b"1001000"]
    assert reserve(held, 10, multiplier="1.5") == reserve(held, 10, multiplier="1.5") == [*first, b"1.5"]
    assert reserve(held, 10) == [*first, b"1.5"]
    assert reserve(held, 10, multiplier="2.5") == [b"conflict", b"credits", b"10", b"", b"1.5"]
    assert extend(held, 10)[4:] == [b"", b"1.5"]
    # As an older release makes it, whose script knows of none.
    held.redis.hdel("hold", "multiplier")
    assert reserve(held, 10, multiplier="1.5") == reserve(held, 10) == first
    assert reserve(held, 11) == [b"conflict", b"credits", b"10", b""]


# ---------------------------------------------------------------------------------------------------------------------
# Any sequence of calls, each repeated at will, against a plain model

KEYS = ["k1", "k2", "k3"]
EVENTS = ["e1", "e2", "e3", *KEYS]
LIMIT, CAP = 40, 25
small = st.integers(0, 12)
times = st.integers(1, 3)
# Whether the work is done on the backend that has a sub-cap.
capped = st.booleans()
SUB_METER = "credits/gemini"
SUB_KEYS = [f"pending:u:{SUB_METER}", f"holds:u:{SUB_METER}"]


def signature_of(event_id: str) -> str:
    """What a producer signs this event with; one of them signs nothing."""
    return "" if event_id == EVENTS[0] else f"key:{event_id}"


@dataclass
class HeldKey:
    """What the model knows of one hold key."""

    state: str = "unknown"
    amount: int = 0
    expires: int = 0
    on_capped: bool = False
    settled_as: tuple[str, int] | None = None
    captured: dict[str, int] = field(default_factory=dict)

    @property
    def taken(self) -> int:
        """Units of all its captures."""
        return sum(self.captured.values())


class PendingMachine(RuleBasedStateMachine):
    """One user and meter with a sub-cap. `pending` and `sub` are the model's maps of ids, of the meter and of the
    backend with the sub-cap; totals are never stored, always summed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lua = Lua()
        self.now = 1_000_000
        self.used = 0
        self.cap_used = 0
        self.version = 1
        self.pending: dict[str, int] = {}
        self.sub: dict[str, int] = {}
        self.holds: dict[str, HeldKey] = {key: HeldKey() for key in KEYS}
        self.charges: dict[str, int] = {}
        self.stream: list[str] = []

    @initialize()
    def cache(self) -> None:
        """A balance of LIMIT units, CAP of them on the backend."""
        self.lua.redis.set("balance", self.balance())

    def balance(self) -> str:
        """The balance as it is cached."""
        meter, cap = f"credits {LIMIT} {self.used} 0 0 1 monthly", f"{SUB_METER} {CAP} {self.cap_used} 0 0 0 monthly"
        return f"1 {self.version}\n{meter}\n{cap}"

    def state(self, key: str) -> str:
        """State of a hold at this moment."""
        held = self.holds[key]
        return "expired" if held.state == "held" and held.expires <= self.now else held.state

    def sweep(self, on_capped: bool) -> None:
        """Expired holds are no longer pending once a script has looked at their map."""
        for key in KEYS:
            if self.state(key) == "expired":
                self.pending.pop(f"h:{key}", None)
                if on_capped:
                    self.sub.pop(f"h:{key}", None)

    def verdict(self, amount: int, on_capped: bool) -> bytes:
        """What the gate says about so many more units."""
        if amount > max(0, max(0, LIMIT - self.used) - sum(self.pending.values())):
            return b"denied"
        if on_capped and amount > max(0, max(0, CAP - self.cap_used) - sum(self.sub.values())):
            return b"capped"
        return b"allowed"

    def record(self, event_id: str, amount: int, on_capped: bool) -> None:
        """An event was appended."""
        self.pending.setdefault(f"e:{event_id}", amount)
        if on_capped:
            self.sub.setdefault(f"e:{event_id}", amount)
        self.stream.append(event_id)

    def drop(self, name: str) -> int:
        """An id leaves both maps; returns what it was in the meter's."""
        self.sub.pop(name, None)
        return self.pending.pop(name, 0)

    @rule(ahead=st.integers(0, 3_000))
    def wait(self, ahead: int) -> None:
        """Time passes."""
        self.now += ahead
        self.lua.set_clock(self.now)

    @rule(amount=small, on_capped=capped)
    def check(self, amount: int, on_capped: bool) -> None:
        """A check answers by the sum of what is pending."""
        self.sweep(on_capped)
        sub = (SUB_KEYS, [SUB_METER]) if on_capped else ([], [])
        reply = self.lua.run("check", ["balance", "pending", "holds", *sub[0]], ["credits", amount, *sub[1]])
        assert reply[0] == self.verdict(amount, on_capped)
        assert int(reply[6]) == sum(self.pending.values())
        assert [int(number) for number in reply[8:]] == [CAP, self.cap_used, sum(self.sub.values())][: 3 * on_capped]

    @rule(key=st.sampled_from(KEYS), amount=small, ttl=st.integers(500, 4_000), on_capped=capped, repeats=times)
    def reserve(self, key: str, amount: int, ttl: int, on_capped: bool, repeats: int) -> None:
        """The first answer stands, whoever asks again."""
        keys = ["balance", "pending", "holds", f"hold:{key}", "expiries"]
        args: list[Any] = ["credits", amount, key, ttl, 900_000, "u:credits", "", "", "c1"]
        if on_capped:
            keys, args = keys + SUB_KEYS, [*args, f"u:{SUB_METER}", SUB_METER]
        for _ in range(repeats):
            reply = self.lua.run("reserve", keys, args)
            held, state = self.holds[key], self.state(key)
            if state == "held" and (held.amount, held.on_capped) == (amount, on_capped):
                assert reply == [b"held", b"%d" % amount, b"%d" % self.pending[f"h:{key}"], b"%d" % held.expires]
            elif state == "held":
                sub_meter = SUB_METER if held.on_capped else ""
                assert reply == [b"conflict", b"credits", b"%d" % held.amount, sub_meter.encode()]
            elif state != "unknown":
                assert reply == [b"closed", state.encode()]
            else:
                self.sweep(on_capped)
                if (verdict := self.verdict(amount, on_capped)) != b"allowed":
                    assert reply[0] == verdict
                else:
                    assert reply == [b"held", b"%d" % amount, b"%d" % amount, b"%d" % (self.now + ttl)]
                    self.holds[key] = HeldKey("held", amount, self.now + ttl, on_capped, captured=held.captured)
                    self.pending[f"h:{key}"] = amount
                    if on_capped:
                        self.sub[f"h:{key}"] = amount

    @rule(key=st.sampled_from(KEYS), amount=st.none() | small, ttl=st.none() | st.integers(500, 4_000), repeats=times)
    def extend(self, key: str, amount: int | None, ttl: int | None, repeats: int) -> None:
        """An open hold ends at another time and counts for another amount; only what comes on top is checked."""
        keys = ["balance", "pending", "holds", f"hold:{key}", "expiries", *SUB_KEYS]
        args = ["credits", amount, key, ttl, 900_000, "u:credits", "", SUB_METER, f"u:{SUB_METER}"]
        for _ in range(repeats):
            reply = self.lua.run("extend", keys, ["" if arg is None else arg for arg in args])
            held, state = self.holds[key], self.state(key)
            if state != "held":
                assert reply == ([b"missing"] if state == "unknown" else [b"closed", state.encode()])
                continue
            left, wanted = self.pending[f"h:{key}"], held.amount if amount is None else amount
            remains = left if wanted == held.amount else max(0, wanted - (held.amount - left if left else held.taken))
            sub_meter = SUB_METER if held.on_capped else ""
            if remains > left:
                self.sweep(held.on_capped)
                if (verdict := self.verdict(remains - left, held.on_capped)) != b"allowed":
                    assert reply[:4] == [b"refused", b"%d" % (remains - left), sub_meter.encode(), verdict]
                    continue
            held.amount, held.expires = wanted, held.expires if ttl is None else self.now + ttl
            self.pending[f"h:{key}"] = remains
            if held.on_capped:
                self.sub[f"h:{key}"] = remains
            numbers = [b"%d" % number for number in (wanted, remains, held.expires)]
            assert reply == [b"held", *numbers, sub_meter.encode(), b""]

    @rule(key=st.sampled_from(KEYS), event_id=st.sampled_from(EVENTS), amount=small, on_capped=capped, repeats=times)
    def capture(self, key: str, event_id: str, amount: int, on_capped: bool, repeats: int) -> None:
        """A part of the hold becomes an event once, on whichever backend."""
        for _ in range(repeats):
            keys = ["pending", f"hold:{key}", "stream", "rung", SUB_KEYS[0]]
            args = [
                key,
                event_id,
                amount,
                event_id,
                signature_of(event_id),
                60_000,
                900_000,
                amount,
                *([5] if on_capped else []),
            ]
            reply = self.lua.run("capture", keys, args)
            held, state = self.holds[key], self.state(key)
            before = held.captured.get(event_id)
            if before is not None and before != amount:
                assert reply == [b"conflict", b"%d" % before]
                continue
            assert reply[:3] == [state.encode(), b"%d" % amount, int(before is not None)]
            if before is None:
                for ids in (self.pending, self.sub):
                    if state == "held" and f"h:{key}" in ids:
                        ids[f"h:{key}"] -= min(amount, ids[f"h:{key}"])
                held.captured[event_id] = amount
                self.record(event_id, amount, on_capped)

    @rule(
        key=st.sampled_from(KEYS),
        event_id=st.none() | st.sampled_from(EVENTS),
        amount=small,
        on_capped=capped,
        repeats=times,
    )
    def settle(self, key: str, event_id: str | None, amount: int, on_capped: bool, repeats: int) -> None:
        """Settling always records, on whichever backend, and a repeat gets the first answer."""
        event_id = event_id or key
        for _ in range(repeats):
            keys = ["pending", "holds", f"hold:{key}", "stream", "rung", *SUB_KEYS]
            args = [
                key,
                event_id,
                amount,
                event_id,
                signature_of(event_id),
                60_000,
                900_000,
                amount,
                *([6] if on_capped else []),
            ]
            reply = self.lua.run("settle", keys, args)
            held, state = self.holds[key], self.state(key)
            if held.settled_as is not None and held.settled_as[0] == event_id:
                assert reply[1:4] == [event_id.encode(), b"%d" % held.settled_as[1], 1]
                continue
            assert reply[:4] == [state.encode(), event_id.encode(), b"%d" % amount, 0]
            self.drop(f"h:{key}")
            held.state, held.settled_as = "settled", (event_id, amount)
            self.record(event_id, amount, on_capped)

    @rule(key=st.sampled_from(KEYS), repeats=times)
    def release(self, key: str, repeats: int) -> None:
        """What is left is given back once; the key stays closed."""
        for _ in range(repeats):
            state, left = self.state(key), self.drop(f"h:{key}")
            reply = self.lua.run("release", ["pending", "holds", f"hold:{key}", *SUB_KEYS], [key, 900_000])
            assert (reply[0], int(reply[3])) == (state.encode(), left)
            if state in ("held", "unknown"):
                self.holds[key].state = "released"

    @rule(event_id=st.sampled_from(EVENTS), amount=small, on_capped=capped, repeats=times)
    def charge(self, event_id: str, amount: int, on_capped: bool, repeats: int) -> None:
        """Allowed once, then remembered; a denial leaves no trace, and is none for an event that waits."""
        keys = ["balance", "pending", "holds", f"charge:{event_id}", "stream", "rung"]
        args: list[Any] = ["credits", amount, event_id, event_id, signature_of(event_id), 60_000, 900_000, amount]
        if on_capped:
            keys, args = keys + SUB_KEYS, [*args, SUB_METER]
        for _ in range(repeats):
            reply = self.lua.run("charge", keys, args)
            first = self.charges.get(event_id)
            if first is not None:
                expected = (b"charged", 1) if first == amount else (b"conflict", b"%d" % first)
                assert (reply[0], reply[7] if first == amount else reply[2]) == expected
                continue
            self.sweep(on_capped)
            if (verdict := self.verdict(amount, on_capped)) != b"allowed":
                waiting = self.pending.get(f"e:{event_id}")
                if waiting is None:
                    assert reply[0] == verdict
                elif waiting == amount:
                    assert (reply[0], int(reply[6]), reply[7]) == (b"charged", sum(self.pending.values()) - amount, 1)
                else:
                    assert (reply[0], int(reply[2])) == (b"conflict", waiting)
                continue
            assert (reply[0], int(reply[6]), reply[7]) == (b"charged", sum(self.pending.values()), 0)
            self.charges[event_id] = amount
            self.record(event_id, amount, on_capped)

    @rule(batch=st.lists(st.tuples(st.sampled_from(EVENTS), small, capped), min_size=1, max_size=4), repeats=times)
    def emit(self, batch: list[tuple[str, int, bool]], repeats: int) -> None:
        """Emitting again, in one call or in several, appends again and counts nothing twice."""
        for _ in range(repeats):
            names: list[str] = []
            args: list[Any] = [60_000]
            for event_id, amount, on_capped in batch:
                names += ["pending", *SUB_KEYS[: int(on_capped)]]
                args += (event_id, amount, event_id, signature_of(event_id))
                if on_capped:
                    args += (event_id, amount, "", "")
                self.record(event_id, amount, on_capped)
            self.lua.run("emit", ["stream", "rung", *names], args)

    @precondition(lambda self: self.stream)
    @rule(count=st.integers(1, 6), repeats=times)
    def publish(self, count: int, repeats: int) -> None:
        """A drain disposes of the oldest stream entries; their ids leave, each once, even if listed twice."""
        entries = self.lua.redis.xrange("stream", count=count)
        listed = [f"e:{fields[b'e'].decode()}" for _, fields in entries]
        self.cap_used += sum(self.sub.get(name, 0) for name in set(listed))
        self.used += sum(self.drop(name) for name in listed)
        self.version += 1
        del self.stream[: len(entries)]
        ids = [raw_id.decode() for raw_id, _ in entries]
        for _ in range(repeats):
            group = [len(listed), *listed]
            args = [len(ids), *ids, 1, self.balance(), LATER_MS, 2, *group, *group]
            self.lua.run("publish", ["stream", "minute", "balance", "lease", "pending", SUB_KEYS[0]], args)

    @rule(repeats=times)
    def expire(self, repeats: int) -> None:
        """The periodic job takes expired holds out of each map and notes when to look again."""
        self.sweep(on_capped=True)
        for _ in range(repeats):
            self.lua.run("expire", ["pending", "holds", "expiries"], ["u:credits"])
            self.lua.run("expire", [*SUB_KEYS, "expiries"], [f"u:{SUB_METER}"])
        open_holds = [held for key, held in self.holds.items() if self.state(key) == "held"]
        for member, expiries in (
            ("u:credits", [held.expires for held in open_holds]),
            (f"u:{SUB_METER}", [held.expires for held in open_holds if held.on_capped]),
        ):
            assert self.lua.redis.zscore("expiries", member) == (min(expiries) if expiries else None)

    @rule(key=st.sampled_from(KEYS), event_id=st.sampled_from(EVENTS), repeats=times)
    def close(self, key: str, event_id: str, repeats: int) -> None:
        """A plain event that named the hold was applied: id and hold go, in this order."""
        held, state = self.holds[key], self.holds[key].state
        self.drop(f"h:{key}")
        for _ in range(repeats):
            keys = ["stream", "minute", "balance", "lease", "pending", SUB_KEYS[0]]
            self.lua.run("publish", keys, [0, 1, self.balance(), LATER_MS, 2, 1, f"h:{key}", 1, f"h:{key}"])
            self.lua.run("close", ["holds", f"hold:{key}", SUB_KEYS[1]], [key, event_id, 1, 900_000])
        if state == "held":
            held.state, held.settled_as = "settled", (event_id, 1)

    @invariant()
    def the_maps_are_the_models(self) -> None:
        """The stored maps are the model's, and each total is the sum of its ids."""
        for name, ids in (("pending", self.pending), (SUB_KEYS[0], self.sub)):
            stored = {field.decode(): int(amount) for field, amount in self.lua.redis.hgetall(name).items()}
            total = stored.pop("total", 0)
            assert stored == ids
            assert total == sum(stored.values())

    @invariant()
    def the_totals_count_each_id_of_the_meter_once(self) -> None:
        """They say how many events and holds the meter's map has, and count stream entries disposed of."""
        events = sum(name.startswith("e:") for name in self.pending)
        assert self.lua.totals() == {"events": events, "holds": len(self.pending) - events}
        added = self.lua.redis.xinfo_stream("stream")["entries-added"] if self.lua.redis.exists("stream") else 0
        assert int(self.lua.redis.hget(TOTALS, "disposed") or 0) == added - len(self.stream)

    @invariant()
    def the_stream_is_the_models(self) -> None:
        """Every stream entry is still there, in order, unless it was disposed of."""
        fields = [entry for _, entry in self.lua.redis.xrange("stream")]
        assert [entry[b"e"].decode() for entry in fields] == self.stream
        assert [entry.get(b"s", b"").decode() for entry in fields] == list(map(signature_of, self.stream))
        assert all(entry[b"m"] == b"1" and entry[b"v"] == b"1" for entry in fields)


TestPending = PendingMachine.TestCase
TestPending.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
