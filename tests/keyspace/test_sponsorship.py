"""The pool's scripts on a real server at a time that the test sets: the same arithmetic as the rules in Python, every
answer of every script, and any sequence of calls against a plain model.

A window lasts DAY here. The clock is ahead of the server's, so that no key is gone before a script says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from tests.keyspace.lua import LARGEST, Lua
from worker.demo.servers import Servers
from worker.keyspace import keys
from worker.rules.sponsorship import absorbed_of, decide

START = 10**13
DAY = 10_000
TTL = 2_000
OUTCOME_TTL = 900_000
BUDGETS = {"new": 0, "established": 50, "trusted": 200, "elite": 1_000}
Reply = list[Any]


class Pool(Lua):
    """The scripts, with the keys and arguments of the operations."""

    def __init__(self, url: str) -> None:
        self.redis = Redis.from_url(url)
        self.empty()

    def empty(self) -> None:
        """Nothing is known, and time begins."""
        self.redis.flushdb()
        self.budgets = BUDGETS
        self.wait_until(START)

    def wait_until(self, now: int) -> None:
        """It is `now`."""
        self.now = now
        self.set_clock(now)

    def know(
        self, units: int = 10_000, tier: str = "elite", start: int = 0, absorbed: int = 0, user: str = "u"
    ) -> None:
        """Cache a pool, and where a user stands."""
        self.redis.set(keys.SPONSORSHIP.pool, f"1 0\n{units}")
        self.redis.set(keys.SPONSORSHIP.standing(user), f"1 0\n{tier} {start} {absorbed}")

    def decide(
        self,
        mode: str,
        request: str,
        wanted: int,
        *,
        user: str = "u",
        paid: int = 0,
        ttl: int = TTL,
        tier: str = "",
        call_id: str = "",
    ) -> Reply:
        """Ask for `wanted` units beside what is paid, by a call of its own unless one is named."""
        names = [*self.pool_keys(user), keys.SPONSORSHIP.hold(request), keys.SPONSORSHIP.expiries]
        args = [mode, user, request, wanted, wanted + paid, paid, ttl, OUTCOME_TTL, DAY, tier]
        args += [keys.SPONSORSHIP.expiring(), keys.SPONSORSHIP.expiring(user), call_id or token_hex(4)]
        args += self.pairs()
        reply: Reply = self.run("sponsor_decide", names, args)
        return reply

    def settle(
        self,
        request: str,
        actual: int,
        *,
        user: str = "u",
        paid: int | str = "",
        tier: str = "",
        ring_ttl: int = 60_000,
    ) -> Reply:
        """Settle."""
        names = [*self.pool_keys(user), keys.SPONSORSHIP.hold(request), keys.SPONSORSHIP.entries, keys.SPONSORSHIP.rung]
        args = [user, request, actual, paid, ring_ttl, OUTCOME_TTL, DAY, tier, "", *self.pairs()]
        reply: Reply = self.run("sponsor_settle", names, args)
        return reply

    def release(self, request: str, *, user: str = "u") -> Reply:
        """Give back."""
        names = [keys.SPONSORSHIP.hold(request), keys.SPONSORSHIP.promised, keys.SPONSORSHIP.holds]
        names += [keys.SPONSORSHIP.today(user), keys.SPONSORSHIP.user_holds(user)]
        reply: Reply = self.run("sponsor_release", names, [user, request, "because", OUTCOME_TTL])
        return reply

    def credit(self, request: str, paid: int) -> int:
        """Let a share of what was paid flow back."""
        names = [keys.SPONSORSHIP.entries, keys.SPONSORSHIP.rung]
        must_ring: int = self.run("sponsor_credit", names, [request, paid, 60_000, ""])
        return must_ring

    def expire(self, member: str) -> None:
        """What the job does for one member of the expiries."""
        names = [*keys.SPONSORSHIP.maps_of_expiring(member), keys.SPONSORSHIP.expiries]
        self.run("expire", names, [member])

    def publish(self, entries: list[str], ids: list[str], text: str) -> None:
        """What a drain does after its COMMIT."""
        names = [
            keys.SPONSORSHIP.entries,
            "minute",
            keys.SPONSORSHIP.pool,
            keys.SPONSORSHIP.pool_lease,
            keys.SPONSORSHIP.promised,
        ]
        self.run("publish", names, [len(entries), *entries, 1, text, START * 2, 1, len(ids), *ids])

    def pool_keys(self, user: str) -> list[str]:
        """The first six keys."""
        names = [keys.SPONSORSHIP.pool, keys.SPONSORSHIP.promised, keys.SPONSORSHIP.holds]
        return [
            *names,
            keys.SPONSORSHIP.standing(user),
            keys.SPONSORSHIP.today(user),
            keys.SPONSORSHIP.user_holds(user),
        ]

    def pairs(self) -> list[Any]:
        """Tiers and budgets."""
        return [item for pair in self.budgets.items() for item in pair]

    def map(self, name: str) -> dict[str, int]:
        """A pending map as it is stored."""
        return {field.decode(): int(amount) for field, amount in self.redis.hgetall(name).items()}

    def entries(self) -> list[dict[str, str]]:
        """The stream, oldest first."""
        found: Any = self.redis.xrange(keys.SPONSORSHIP.entries)
        return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in found]

    def dump(self) -> dict[bytes, bytes | None]:
        """Every key and its value."""
        return {name: self.redis.dump(name) for name in self.redis.scan_iter()}


@pytest.fixture(scope="module")
def shared(servers: Servers) -> Iterator[Pool]:
    """One client for all tests of the module."""
    pool = Pool(servers.redis_url)
    yield pool
    pool.redis.flushdb()
    pool.redis.close()


@pytest.fixture
def pool(shared: Pool) -> Pool:
    """The scripts on an empty Redis that knows a pool of 10,000 and an elite user."""
    shared.empty()
    shared.know()
    return shared


# ---------------------------------------------------------------------------------------------------------------------
# The rule

units = st.integers(0, LARGEST) | st.integers(0, 60) | st.integers(LARGEST - 60, LARGEST)
amounts = st.integers(0, 10**12) | st.integers(0, 60)
positive = st.integers(1, 10**12) | st.integers(1, 60)


@settings(max_examples=300)
@given(wanted=positive, budget=amounts, taken=amounts, left=units, promised=units, held=st.booleans())
def test_lua_and_python_decide_the_same(
    shared: Pool, wanted: int, budget: int, taken: int, left: int, promised: int, held: bool
) -> None:
    shared.empty()
    shared.know(left, "elite", START - 1, taken)
    shared.budgets = {**BUDGETS, "elite": budget}
    if promised:
        shared.redis.hset(keys.SPONSORSHIP.promised, mapping={"g:x": promised, "total": promised})
    decision = decide(wanted, budget, taken, left - promised)
    figures = [b"elite", b"%d" % budget, b"%d" % taken, b"%d" % max(0, left - promised)]
    advice = [b"advice", *figures, b"0", b"0", 0]
    before = shared.dump()
    assert shared.decide("advise", "r", wanted) == advice
    if decision.serve != "free":
        assert shared.decide("all", "r", wanted) == advice
    assert shared.dump() == before, "what holds nothing leaves no trace"
    mode = "all" if held and decision.serve == "free" else "most"
    reply = shared.decide(mode, "r", wanted)
    if decision.absorb == 0:
        assert reply == advice
        return
    assert reply == [b"held", *figures, b"%d" % decision.absorb, b"%d" % (START + TTL), 0]
    today = {"start": START - 1, "absorbed": taken, "h:r": decision.absorb, "total": taken + decision.absorb}
    assert shared.map(keys.SPONSORSHIP.today("u")) == today
    assert shared.map(keys.SPONSORSHIP.promised)["total"] == promised + decision.absorb


@settings(max_examples=200)
@given(held=positive, actual=amounts, paid=st.none() | amounts, confirmed=amounts)
def test_lua_and_python_absorb_the_same(shared: Pool, held: int, actual: int, paid: int | None, confirmed: int) -> None:
    shared.empty()
    shared.know(10**12)
    shared.budgets = {**BUDGETS, "elite": 10**12}
    shared.decide("most", "r", held, paid=confirmed)
    covered = confirmed if paid is None else paid
    absorbed = absorbed_of(held, actual, covered)
    reply = shared.settle("r", actual, paid="" if paid is None else paid)
    assert reply == [b"settled", *(b"%d" % figure for figure in (held, actual, covered, absorbed)), 0, 0, 1]
    assert shared.map(keys.SPONSORSHIP.today("u")) == {"start": START, "absorbed": absorbed, "total": absorbed}
    assert shared.map(keys.SPONSORSHIP.promised) == ({"g:r": absorbed, "total": absorbed} if absorbed else {})
    (entry,) = shared.entries()
    figures = {"held": held, "actual": actual, "paid": covered, "absorbed": absorbed, "window": START}
    figures |= {"budget": 10**12, "late": 0}
    assert {name: entry[name] for name in figures} == {name: str(figure) for name, figure in figures.items()}


# ---------------------------------------------------------------------------------------------------------------------
# decide


def test_what_is_held_counts_of_pool_and_window(pool: Pool) -> None:
    assert pool.decide("all", "r1", 40) == [b"held", b"elite", b"1000", b"0", b"10000", b"40", b"%d" % (START + TTL), 0]
    pool.wait_until(START + 7)
    reply = [b"held", b"elite", b"1000", b"40", b"9960", b"60", b"%d" % (START + 7 + 2 * TTL), 0]
    assert pool.decide("most", "r2", 60, paid=20, ttl=2 * TTL) == reply
    assert pool.map(keys.SPONSORSHIP.promised) == {"h:r1": 40, "h:r2": 60, "total": 100}
    assert pool.map(keys.SPONSORSHIP.today("u")) == {
        "start": START,
        "absorbed": 0,
        "h:r1": 40,
        "h:r2": 60,
        "total": 100,
    }
    held = [(b"r1", START + TTL), (b"r2", START + 7 + 2 * TTL)]
    for name in (keys.SPONSORSHIP.holds, keys.SPONSORSHIP.user_holds("u")):
        assert pool.redis.zrange(name, 0, -1, withscores=True) == held
    earliest = [(b"pool", START + TTL), (b"user:u", START + TTL)]
    assert pool.redis.zrange(keys.SPONSORSHIP.expiries, 0, -1, withscores=True) == earliest
    assert 0 < pool.redis.pttl(keys.SPONSORSHIP.hold("r1")) <= TTL + OUTCOME_TTL
    assert pool.redis.pexpiretime(keys.SPONSORSHIP.today("u")) == START + DAY
    assert pool.entries() == []


def test_a_call_that_is_sent_twice_is_no_repeat(pool: Pool) -> None:
    pool.know()
    first = pool.decide("all", "r", 40, call_id="c1")
    assert first[-1] == 0
    assert pool.decide("all", "r", 40, call_id="c1") == first
    assert pool.decide("all", "r", 40, call_id="c2") == [*first[:-1], 1]


def test_a_decision_is_repeated_as_it_was(pool: Pool) -> None:
    for mode, paid in (("all", 0), ("most", 30)):
        first = pool.decide(mode, mode, 40, paid=paid)
        pool.decide("all", "another", 300)
        pool.know(units=5, tier="new")
        before = pool.dump()
        pool.wait_until(pool.now + 5)
        before[b"test:clock"] = pool.redis.dump("test:clock")
        assert pool.decide(mode, mode, 40, paid=paid, ttl=9_999, tier="trusted") == [*first[:7], 1]
        # All that it leaves is the note that another call was told of the hold.
        assert pool.redis.hdel(keys.SPONSORSHIP.hold(mode), "again") == 1
        assert pool.dump() == before
        pool.empty()
        pool.know()


@pytest.mark.parametrize(
    "other",
    [{"user": "v"}, {"mode": "most"}, {"wanted": 41}, {"paid": 1, "wanted": 39}],
    ids=["user", "mode", "estimate", "paid"],
)
def test_an_id_that_holds_something_else_is_a_conflict(pool: Pool, other: dict[str, Any]) -> None:
    pool.know(user="v")
    pool.decide("all", "r", 40)
    before = pool.dump()
    question = {"mode": "all", "wanted": 40, **other}
    assert pool.decide(question.pop("mode"), "r", question.pop("wanted"), **question) == [b"conflict", b"u", b"40"]
    assert pool.dump() == before


def test_an_id_that_is_over_is_closed(pool: Pool) -> None:
    for request in ("settled", "released", "expired"):
        pool.decide("all", request, 10)
    pool.settle("settled", 10)
    pool.release("released")
    pool.release("unseen")
    pool.wait_until(START + TTL)
    for request in ("settled", "released", "expired", "unseen"):
        state = b"released" if request == "unseen" else request.encode()
        for mode in ("all", "most"):
            assert pool.decide(mode, request, 10) == [b"closed", state]
    assert pool.decide("advise", "expired", 10)[0] == b"advice", "advice looks at no hold"


def test_what_is_not_cached_is_asked_for_first(pool: Pool) -> None:
    pool.decide("all", "late", 10)
    pool.wait_until(START + TTL)
    for missing, answer in ((keys.SPONSORSHIP.pool, b"load_pool"), (keys.SPONSORSHIP.standing("u"), b"load")):
        pool.redis.delete(missing)
        for mode in ("advise", "all", "most"):
            assert pool.decide(mode, "r", 10) == [answer]
        assert pool.settle("late", 10) == [answer]
    assert not pool.redis.exists(keys.SPONSORSHIP.hold("r"), keys.SPONSORSHIP.promised)
    assert pool.entries() == []


def test_a_hold_in_time_is_settled_without_them(pool: Pool) -> None:
    pool.decide("all", "r", 10)
    pool.redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing("u"))
    assert pool.settle("r", 10)[:5] == [b"settled", b"10", b"10", b"0", b"10"]


@pytest.mark.parametrize(
    ("own", "host_tier", "tier", "budget"),
    [
        ("trusted", "", b"trusted", b"200"),
        ("trusted", "established", b"established", b"50"),
        ("trusted", "royal", b"new", b"0"),
        ("royal", "", b"new", b"0"),
    ],
)
def test_the_tier_is_the_hosts_else_the_accounts_else_the_lowest(
    pool: Pool, own: str, host_tier: str, tier: bytes, budget: bytes
) -> None:
    pool.know(tier=own)
    assert pool.decide("advise", "r", 10, tier=host_tier)[1:3] == [tier, budget]
    pool.decide("all", "late", 10, tier="elite")
    pool.wait_until(START + TTL)
    pool.settle("late", 10, tier=host_tier)
    (entry,) = pool.entries()
    assert (entry["tier"], entry["budget"], entry["late"]) == (tier.decode(), budget.decode(), "1")


def test_expired_holds_leave_before_anything_is_decided(pool: Pool) -> None:
    pool.decide("all", "r1", 700)
    assert pool.decide("all", "r2", 400)[0] == b"advice"
    pool.wait_until(START + TTL)
    assert pool.decide("all", "r2", 400)[3:6] == [b"0", b"10000", b"400"]
    assert pool.map(keys.SPONSORSHIP.promised) == {"h:r2": 400, "total": 400}
    assert pool.redis.zrange(keys.SPONSORSHIP.holds, 0, -1) == [b"r2"]


# ---------------------------------------------------------------------------------------------------------------------
# Windows


def test_a_window_floats(pool: Pool) -> None:
    """It opens with the first hold, lasts a day, and the next opens when something is held again."""
    pool.wait_until(START + 123)
    pool.decide("all", "r1", 900, ttl=100)
    pool.release("r1")
    pool.wait_until(START + 123 + DAY - 1)
    pool.decide("all", "r2", 600)
    assert pool.map(keys.SPONSORSHIP.today("u"))["start"] == START + 123
    pool.settle("r2", 500)
    pool.wait_until(START + 123 + DAY)
    assert pool.decide("advise", "r", 1_000)[3] == b"0"
    assert pool.map(keys.SPONSORSHIP.today("u"))["start"] == START + 123, "advice opens no window"
    pool.wait_until(START + 5 * DAY)
    assert pool.decide("all", "r3", 1_000)[0] == b"held"
    assert pool.map(keys.SPONSORSHIP.today("u")) == {
        "start": START + 5 * DAY,
        "absorbed": 0,
        "h:r3": 1_000,
        "total": 1_000,
    }


@pytest.mark.parametrize("ending", ["settle", "release", "expire", "late settle"])
def test_a_hold_counts_in_the_window_that_held_it(pool: Pool, ending: str) -> None:
    pool.decide("all", "old", 800, ttl=2 * DAY)
    pool.wait_until(START + DAY)
    pool.decide("all", "new", 300, ttl=9 * DAY)
    today = {"start": START + DAY, "absorbed": 0, "h:new": 300, "total": 300}
    assert pool.map(keys.SPONSORSHIP.today("u")) == today
    assert pool.map(keys.SPONSORSHIP.promised)["total"] == 1_100, "of the pool both are held"
    if ending == "settle":
        assert pool.settle("old", 750)[4] == b"750"
        assert pool.entries()[0]["window"] == str(START)
        assert pool.map(keys.SPONSORSHIP.promised) == {"h:new": 300, "g:old": 750, "total": 1_050}
    elif ending == "release":
        pool.release("old")
    else:
        pool.redis.zadd(keys.SPONSORSHIP.expiries, {"pool": 1, "user:u": 1})
        pool.wait_until(START + DAY + DAY - 1)
        pool.redis.hset(keys.SPONSORSHIP.hold("old"), "expires_ms", pool.now)
        for name in (keys.SPONSORSHIP.holds, keys.SPONSORSHIP.user_holds("u")):
            pool.redis.zadd(name, {"old": pool.now}, xx=True)
        for member in ("pool", "user:u"):
            pool.expire(member)
            assert pool.redis.zscore(keys.SPONSORSHIP.expiries, member) == START + 10 * DAY
    if ending == "late settle":
        assert pool.settle("old", 750)[4:6] == [b"700", 1], "the rest of the window that is open now"
        assert pool.entries()[0]["window"] == str(START + DAY)
        today |= {"absorbed": 700, "total": 1_000}
    assert pool.map(keys.SPONSORSHIP.today("u")) == today
    assert pool.redis.zrange(keys.SPONSORSHIP.user_holds("u"), 0, -1) == [b"new"]
    if ending in ("release", "expire"):
        assert pool.map(keys.SPONSORSHIP.promised) == {"h:new": 300, "total": 300}


@pytest.mark.parametrize(
    ("start", "taken", "window"),
    [(START - DAY + 1, 990, START - DAY + 1), (START - DAY, 0, START), (0, 0, START)],
    ids=["open", "over", "none"],
)
def test_a_window_that_redis_forgot_goes_on_from_the_ledger(pool: Pool, start: int, taken: int, window: int) -> None:
    pool.know(start=start, absorbed=990 if start else 0)
    reply = pool.decide("most", "r", 40)
    assert (int(reply[3]), int(reply[5])) == (taken, min(40, 1_000 - taken))
    held = min(40, 1_000 - taken)
    assert pool.map(keys.SPONSORSHIP.today("u")) == {
        "start": window,
        "absorbed": taken,
        "h:r": held,
        "total": taken + held,
    }
    assert pool.redis.pexpiretime(keys.SPONSORSHIP.today("u")) == window + DAY


def test_the_window_in_redis_is_newer_than_that_of_the_ledger(pool: Pool) -> None:
    pool.know(start=START - 10, absorbed=100)
    pool.decide("all", "r1", 40)
    pool.settle("r1", 30)
    pool.know(start=START - 10, absorbed=0)
    assert pool.decide("advise", "r", 1)[3] == b"130"
    pool.know(start=START - 5, absorbed=900)
    assert pool.decide("advise", "r", 1)[3] == b"130"


# ---------------------------------------------------------------------------------------------------------------------
# settle, release, credit


def test_an_entry_says_what_the_books_need(pool: Pool) -> None:
    pool.decide("most", "r", 60, paid=40)
    assert pool.settle("r", 90) == [b"settled", b"60", b"90", b"40", b"50", 0, 0, 1]
    assert pool.entries() == [
        {
            "v": "1", "k": "grant", "user": "u", "request": "r", "held": "60", "actual": "90", "paid": "40",
            "absorbed": "50", "window": str(START), "tier": "elite", "budget": "1000", "late": "0",
        }
    ]  # fmt: skip
    assert 0 < pool.redis.pttl(keys.SPONSORSHIP.hold("r")) <= OUTCOME_TTL
    assert 0 < pool.redis.pttl(keys.SPONSORSHIP.rung) <= 60_000
    pool.decide("all", "r2", 5)
    assert pool.settle("r2", 5)[7] == 0, "a drain is waiting already"


@pytest.mark.parametrize("late", [False, True])
def test_a_settlement_is_repeated_as_it_was(pool: Pool, late: bool) -> None:
    pool.decide("all", "r", 60)
    if late:
        pool.wait_until(START + TTL)
    first = pool.settle("r", 50, paid=20)
    before = pool.dump()
    for actual, paid in ((50, 20), (60, ""), (0, 0)):
        assert pool.settle("r", actual, paid=paid) == [*first[:6], 1, 0]
    assert pool.settle("r", 50, user="v") == [b"conflict", b"u", b"60"]
    assert pool.dump() == before


def test_nothing_to_settle_changes_nothing(pool: Pool) -> None:
    pool.decide("all", "mine", 60)
    pool.decide("all", "gone", 60)
    pool.release("gone")
    before = pool.dump()
    assert pool.settle("unseen", 50) == [b"closed", b"unknown"]
    assert pool.settle("gone", 50) == [b"closed", b"released"]
    assert pool.settle("mine", 50, user="v") == [b"conflict", b"u", b"60"]
    assert pool.dump() == before


@pytest.mark.parametrize("swept", [True, False])
@pytest.mark.parametrize(
    ("left", "budget", "actual", "absorbed"),
    [
        (10_000, 1_000, 60, 60), (10_000, 1_000, 50, 50), (10_000, 1_000, 0, 0), (10_000, 130, 60, 30),
        (10_000, 100, 60, 0), (10_000, 50, 60, 0), (20, 1_000, 60, 20), (0, 1_000, 60, 0), (20, 110, 60, 10),
    ],
)  # fmt: skip
def test_a_late_settlement_takes_what_is_still_allowed(
    pool: Pool, left: int, budget: int, actual: int, absorbed: int, swept: bool
) -> None:
    pool.decide("all", "late", 60)
    pool.decide("all", "other", 100)
    pool.settle("other", 100)
    pool.wait_until(START + TTL)
    if swept:
        pool.expire("pool")
        pool.expire("user:u")
    pool.know(units=left + 100)
    pool.budgets = {**BUDGETS, "elite": budget}
    reply = pool.settle("late", actual)
    assert reply[:7] == [b"settled", b"60", b"%d" % actual, b"0", b"%d" % absorbed, 1, 0]
    entry = pool.entries()[-1]
    assert (entry["absorbed"], entry["late"], entry["window"]) == (str(absorbed), "1", str(START))
    assert pool.map(keys.SPONSORSHIP.today("u")) == {
        "start": START,
        "absorbed": 100 + absorbed,
        "total": 100 + absorbed,
    }
    promised = {"g:other": 100, "total": 100 + absorbed} | ({"g:late": absorbed} if absorbed else {})
    assert pool.map(keys.SPONSORSHIP.promised) == promised


def test_a_late_settlement_opens_a_window_only_for_what_it_takes(pool: Pool) -> None:
    for request in ("r1", "r2"):
        pool.decide("all", request, 60)
    pool.wait_until(START + 3 * DAY)
    pool.settle("r1", 0)
    assert pool.map(keys.SPONSORSHIP.today("u"))["start"] == START
    pool.settle("r2", 60)
    assert pool.map(keys.SPONSORSHIP.today("u")) == {"start": START + 3 * DAY, "absorbed": 60, "total": 60}
    assert [entry["window"] for entry in pool.entries()] == [str(START), str(START + 3 * DAY)]


def test_only_a_late_settlement_asks_for_the_tier(pool: Pool) -> None:
    pool.decide("all", "r", 10)
    pool.decide("all", "late", 10)
    assert pool.settle("r", 10, tier="?")[0] == b"settled"
    pool.wait_until(START + TTL)
    before = pool.dump()
    assert pool.settle("late", 10, tier="?") == [b"tier"]
    assert pool.settle("r", 10, tier="?")[6] == 1
    assert pool.dump() == before


def test_a_release_gives_back_once_and_closes_the_id(pool: Pool) -> None:
    pool.decide("all", "r", 60)
    pool.decide("all", "other", 5)
    assert pool.release("r", user="v") == [b"conflict", b"u", b"60"]
    assert pool.release("r") == [b"held", b"60"]
    assert pool.map(keys.SPONSORSHIP.promised) == {"h:other": 5, "total": 5}
    assert pool.map(keys.SPONSORSHIP.today("u")) == {"start": START, "absorbed": 0, "h:other": 5, "total": 5}
    for name in (keys.SPONSORSHIP.holds, keys.SPONSORSHIP.user_holds("u")):
        assert pool.redis.zrange(name, 0, -1) == [b"other"]
    assert pool.redis.hget(keys.SPONSORSHIP.hold("r"), "reason") == b"because"
    assert 0 < pool.redis.pttl(keys.SPONSORSHIP.hold("r")) <= OUTCOME_TTL
    before = pool.dump()
    assert pool.release("r") == [b"released", b"60"]
    assert pool.dump() == before


@pytest.mark.parametrize("state", ["settled", "expired", "unknown"])
def test_a_release_leaves_what_is_over(pool: Pool, state: str) -> None:
    if state != "unknown":
        pool.decide("all", "r", 60)
    if state == "settled":
        pool.settle("r", 50)
    pool.wait_until(START + TTL)
    for repeated in (False, True):
        before = b"released" if state == "unknown" and repeated else state.encode()
        assert pool.release("r") == [before, b"0" if state == "unknown" else b"60"]
    assert "h:r" not in pool.map(keys.SPONSORSHIP.promised) | pool.map(keys.SPONSORSHIP.today("u"))
    after = b"released" if state == "unknown" else state.encode()
    assert pool.decide("all", "r", 60) == [b"closed", after]
    if state == "unknown":
        assert pool.release("r", user="v") == [b"conflict", b"u", b"0"]
        assert 0 < pool.redis.pttl(keys.SPONSORSHIP.hold("r")) <= OUTCOME_TTL
    if state == "expired":
        assert pool.settle("r", 60)[5] == 1, "the work may still have been done"


def test_a_credit_is_an_entry_and_rings_once(pool: Pool) -> None:
    assert [pool.credit("r", 10**12) for _ in range(2)] == [1, 0]
    assert pool.entries() == [{"v": "1", "k": "credit", "request": "r", "paid": str(10**12)}] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Any sequence of calls, each repeated at will, against a plain model

USERS = ["u", "v"]
REQUESTS = ["r1", "r2", "r3", "r4"]
UNITS, TIERS = 60, {"new": 5, "trusted": 35}
users = st.sampled_from(USERS)
requests = st.sampled_from(REQUESTS)
tiers = st.sampled_from(["", "new", "trusted", "royal"])
small = st.integers(1, 25)
times = st.integers(1, 3)


@dataclass
class Kept:
    """What the model knows of one request. `found`: tier, budget, taken, left, as they were when it was held."""

    state: str = "unknown"
    question: tuple[str, str, int, int] = ("", "", 0, 0)
    held: int = 0
    expires: int = 0
    window: int = 0
    found: tuple[str, int, int, int] = ("", 0, 0, 0)
    outcome: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass
class Window:
    """A user's window: what is in the stored map."""

    start: int
    absorbed: int = 0
    held: dict[str, int] = field(default_factory=dict)


class SponsorMachine(RuleBasedStateMachine):
    """Two users of one pool. Totals are never stored in the model, always summed."""

    lua: Pool

    def __init__(self) -> None:
        super().__init__()
        self.lua.empty()
        self.lua.budgets = TIERS
        self.now = START
        self.units = UNITS
        self.seq = 0
        self.promised: dict[str, int] = {}
        self.windows: dict[str, Window] = {}
        self.kept = {request: Kept() for request in REQUESTS}
        self.stream: list[tuple[str, str, int]] = []

    @initialize()
    def cache(self) -> None:
        """What the ledger knows is cached."""
        for user in USERS:
            self.lua.know(UNITS, "trusted", user=user)

    def state(self, request: str) -> str:
        """State of a request at this moment."""
        kept = self.kept[request]
        return "expired" if kept.state == "held" and kept.expires <= self.now else kept.state

    def sweep(self, *users: str) -> None:
        """Expired holds count no longer once a script has looked at their maps: the pool's, and those of users."""
        for request in REQUESTS:
            if self.state(request) == "expired":
                self.promised.pop(f"h:{request}", None)
                for user in users:
                    if user in self.windows:
                        self.windows[user].held.pop(request, None)

    def find(self, user: str, tier: str) -> tuple[str, int, int, int]:
        """What a script finds: tier, budget, taken, left."""
        self.sweep(user)
        tier = {"": "trusted", "royal": "new"}.get(tier, tier)
        window = self.windows.get(user)
        taken = window.absorbed + sum(window.held.values()) if window and window.start + DAY > self.now else 0
        return tier, TIERS[tier], taken, max(0, self.units - sum(self.promised.values()))

    def open_window(self, user: str) -> Window:
        """The window that something is counted in."""
        window = self.windows.get(user)
        if window is None or window.start + DAY <= self.now:
            window = self.windows[user] = Window(self.now)
        return window

    def drop(self, request: str) -> bool:
        """A hold leaves both maps. Returns whether its user's window knew it."""
        self.promised.pop(f"h:{request}", None)
        return sum(window.held.pop(request, 0) for window in self.windows.values()) > 0

    @rule(ahead=st.integers(0, 6_000))
    def wait(self, ahead: int) -> None:
        """Time passes."""
        self.now += ahead
        self.lua.wait_until(self.now)

    @rule(
        mode=st.sampled_from(["advise", "all", "most"]),
        user=users,
        request=requests,
        wanted=small,
        paid=st.sampled_from([0, 0, 3]),
        ttl=st.integers(500, 15_000),
        tier=tiers,
        repeats=times,
    )
    def decide(
        self, mode: str, user: str, request: str, wanted: int, paid: int, ttl: int, tier: str, repeats: int
    ) -> None:
        """The first answer stands as long as it holds; what holds nothing is decided anew."""
        for _ in range(repeats):
            reply = self.lua.decide(mode, request, wanted, user=user, paid=paid, ttl=ttl, tier=tier)
            kept, state, question = self.kept[request], self.state(request), (user, mode, wanted, paid)
            if mode != "advise" and state == "held":
                if kept.question == question:
                    assert reply == [b"held", *as_text(*kept.found, kept.held, kept.expires), 1]
                else:
                    assert reply == [b"conflict", *as_text(kept.question[0], kept.held)]
                continue
            if mode != "advise" and state != "unknown":
                assert reply == [b"closed", state.encode()]
                continue
            found = self.find(user, tier)
            decision = decide(wanted, *found[1:])
            if decision.absorb == 0 or mode == "advise" or (mode == "all" and decision.serve != "free"):
                assert reply == [b"advice", *as_text(*found, 0, 0), 0]
                continue
            expires, window = self.now + ttl, self.open_window(user)
            assert reply == [b"held", *as_text(*found, decision.absorb, expires), 0]
            self.kept[request] = Kept("held", question, decision.absorb, expires, window.start, found)
            self.promised[f"h:{request}"] = window.held[request] = decision.absorb

    @rule(
        user=users,
        request=requests,
        actual=st.integers(0, 25),
        paid=st.none() | st.integers(0, 5),
        tier=tiers,
        repeats=times,
    )
    def settle(self, user: str, request: str, actual: int, paid: int | None, tier: str, repeats: int) -> None:
        """In time it takes from what was held, late from what is left; a repeat gets the first answer."""
        for _ in range(repeats):
            rings = not self.lua.redis.exists(keys.SPONSORSHIP.rung)
            reply = self.lua.settle(request, actual, user=user, paid="" if paid is None else paid, tier=tier)
            kept, state = self.kept[request], self.state(request)
            if state in ("unknown", "released"):
                assert reply == [b"closed", state.encode()]
                continue
            if kept.question[0] != user:
                assert reply == [b"conflict", *as_text(kept.question[0], kept.held)]
                continue
            if state == "settled":
                *figures, late = kept.outcome
                assert reply == [b"settled", *as_text(kept.held, *figures), late, 1, 0]
                continue
            covered = kept.question[3] if paid is None else paid
            absorbed = absorbed_of(kept.held, actual, covered)
            late = int(state == "expired")
            if late:
                _, budget, taken, left = self.find(user, tier)
                absorbed = min(absorbed, max(0, budget - taken), left)
                if absorbed:
                    self.open_window(user).absorbed += absorbed
            elif self.drop(request):
                self.windows[user].absorbed += absorbed
            assert reply == [b"settled", *as_text(kept.held, actual, covered, absorbed), late, 0, int(rings)]
            if absorbed:
                self.promised[f"g:{request}"] = absorbed
            kept.state, kept.outcome = "settled", (actual, covered, absorbed, late)
            self.stream.append(("grant", request, absorbed))

    @rule(user=users, request=requests, repeats=times)
    def release(self, user: str, request: str, repeats: int) -> None:
        """What is held is given back once; the id stays closed."""
        for _ in range(repeats):
            reply = self.lua.release(request, user=user)
            kept, state = self.kept[request], self.state(request)
            if state != "unknown" and kept.question[0] != user:
                assert reply == [b"conflict", *as_text(kept.question[0], kept.held)]
                continue
            assert reply == as_text(state, kept.held)
            self.drop(request)
            if state == "unknown":
                kept.question = (user, "", 0, 0)
            if state in ("held", "unknown"):
                kept.state = "released"

    @rule(paid=st.integers(0, 99), repeats=times)
    def credit(self, paid: int, repeats: int) -> None:
        """Only the books know a repeat."""
        for _ in range(repeats):
            self.lua.credit("paid", paid)
            self.stream.append(("credit", "paid", paid))

    @precondition(lambda self: self.stream)
    @rule(count=st.integers(1, 6), repeats=times)
    def publish(self, count: int, repeats: int) -> None:
        """A drain disposes of the oldest stream entries; their ids leave as the pool pays for them."""
        found: Any = self.lua.redis.xrange(keys.SPONSORSHIP.entries, count=count)
        ids = []
        for kind, request, amount in self.stream[: len(found)]:
            self.units += amount // 10 if kind == "credit" else -amount
            if kind == "grant":
                ids.append(f"g:{request}")
                self.promised.pop(f"g:{request}", None)
        del self.stream[: len(found)]
        self.seq += len(found)
        for _ in range(repeats):
            self.lua.publish([raw.decode() for raw, _ in found], ids, f"1 {self.seq}\n{self.units}")

    @rule(repeats=times)
    def expire(self, repeats: int) -> None:
        """The periodic job takes expired holds out of each map and notes when to look again."""
        self.sweep(*USERS)
        for _ in range(repeats):
            for user in (None, *USERS):
                member = keys.SPONSORSHIP.expiring(user)
                self.lua.expire(member)
                waiting = [
                    kept.expires
                    for request, kept in self.kept.items()
                    if self.state(request) == "held" and kept.question[0] == (user or kept.question[0])
                ]
                assert self.lua.redis.zscore(keys.SPONSORSHIP.expiries, member) == min(waiting, default=None)

    @invariant()
    def the_maps_are_the_models(self) -> None:
        """The stored maps are the model's, and each total is the sum of its ids."""
        stored = self.lua.map(keys.SPONSORSHIP.promised)
        assert stored.pop("total", 0) == sum(stored.values())
        assert stored == self.promised
        for user in USERS:
            stored, window = self.lua.map(keys.SPONSORSHIP.today(user)), self.windows.get(user)
            assert bool(stored) is (window is not None)
            if window is not None:
                assert stored.pop("start") == window.start
                assert stored.pop("total") == sum(stored.values())
                assert stored == {"absorbed": window.absorbed} | {f"h:{key}": n for key, n in window.held.items()}

    @invariant()
    def the_totals_count_each_promise_once(self) -> None:
        """What a user's window holds is one of the promises."""
        holds = sum(name.startswith("h:") for name in self.promised)
        assert self.lua.totals() == {"holds": holds, "events": len(self.promised) - holds}

    @invariant()
    def the_lists_of_holds_are_the_models(self) -> None:
        """Listed is what is held and, until somebody looks, what has expired; a user's list spans his windows."""
        listed = {raw.decode() for raw in self.lua.redis.zrange(keys.SPONSORSHIP.holds, 0, -1)}
        assert listed == {name[2:] for name in self.promised if name.startswith("h:")}
        for user in USERS:
            listed = {raw.decode() for raw in self.lua.redis.zrange(keys.SPONSORSHIP.user_holds(user), 0, -1)}
            held = {request for request, kept in self.kept.items() if kept.question[0] == user and kept.state == "held"}
            assert {request for request in held if self.state(request) == "held"} <= listed <= held

    @invariant()
    def nobody_gets_more_than_there_is(self) -> None:
        """The pool can keep every promise, and no window is above the greatest budget."""
        assert sum(self.promised.values()) <= self.units
        for window in self.windows.values():
            assert window.absorbed + sum(window.held.values()) <= max(TIERS.values())

    @invariant()
    def the_stream_is_the_models(self) -> None:
        """Every settlement and credit is there once for each time that it was recorded, in order."""
        expected_stream = [
            (entry["k"], entry["request"], int(entry.get("absorbed", entry["paid"]))) for entry in self.lua.entries()
        ]
        assert expected_stream == self.stream


def as_text(*values: object) -> list[bytes]:
    """Values as the scripts return them."""
    return [str(value).encode() for value in values]


def test_any_sequence_of_calls(shared: Pool) -> None:
    class Machine(SponsorMachine):
        lua = shared

    run_state_machine_as_test(Machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))
