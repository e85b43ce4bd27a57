"""Wallets in the scripts: the golden cases, and the same arithmetic as in Python."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.catalogue import Draw
from schemas.answers import PayFrom, Reason
from tests.keyspace.lua import LARGEST, Lua
from tests.support.vectors import golden_cases
from worker.keyspace.cache import cache_text
from worker.keyspace.keys import Partition
from worker.ledger.holds import LedgerHold
from worker.rules.account import Account, Balance
from worker.rules.fractions import MILLIONTHS
from worker.rules.limits import PERS, Limits, Window
from worker.rules.preflight import (
    MeterStanding,
    Spend,
    check_answer,
    remaining_answer,
    standing_in_ledger,
    standing_in_reply,
)
from worker.rules.wallets import price_in_millionths
from worker.rules.waterfall import Buckets

GATES = [case for case in golden_cases("wallets") if case["kind"] == "gate"]
USER = "user-1"
KEYS = Partition(0).account(USER)
DAY = datetime(2026, 11, 30, tzinfo=UTC)


@pytest.fixture(scope="module")
def lua() -> Lua:
    """One interpreter for the tests that leave nothing behind."""
    return Lua()


def line(meter: str, buckets: Buckets | None, price: str, carried: int) -> str:
    """The line of a cached balance for a meter of the wallet `credits`."""
    limit, used, rollover, purchased, spill = buckets or Buckets(0, 0, 0, 0, spill=True)
    whole, part = divmod(price_in_millionths(price), MILLIONTHS)
    shown = f"{'-' if limit is None else limit} {used} {rollover} {purchased} {int(spill)}"
    return f"{meter} {shown} monthly - credits {whole} {part} {carried}"


def put(lua: Lua, lines: list[str], pending: dict[str, int]) -> None:
    """Cache a balance, and let so many units be pending by meter."""
    lua.redis.flushall()
    lua.set_clock(1_000_000)
    lua.redis.set(KEYS.balance, "\n".join(["1 1", *lines]))
    for meter, units in pending.items():
        if units:
            lua.redis.hset(KEYS.pending(meter), mapping={"e:x": units, "total": units})


def checked(lua: Lua, meter: str, amount: int, *words: str) -> tuple[bytes, MeterStanding]:
    """The status and the standing in the reply to a check."""
    reply = lua.run("check", [KEYS.balance, KEYS.pending(meter), KEYS.holds(meter)], [meter, amount, *words])
    standing = standing_in_reply(reply, [])
    assert standing is not None
    return reply[0], standing


@pytest.mark.parametrize("case", GATES, ids=lambda case: case["about"])
def test_golden_checks(lua: Lua, case: dict[str, Any]) -> None:
    buckets = Buckets(case["limit"], case["used"], case["rollover"], case["purchased"], case["spill"])
    lines = [line("credits", buckets, "1", 0)]
    if "cap" in case:
        lines.append(f"credits/{case['meter']} {case['cap']} {case['cap_used']} 0 0 0 monthly")
    lines += [line(meter, None, about["price"], about["carried"]) for meter, about in case["meters"].items()]
    pending = {meter: about["pending"] for meter, about in case["meters"].items()} | {"credits": case["direct"]}
    put(lua, lines, pending)
    status, standing = checked(lua, case["meter"], case["amount"])
    assert status.decode() == case["status"]
    assert standing.cost(case["amount"]) == case["cost"]
    assert remaining_answer(USER, case["meter"], standing).remaining == case["available"]
    if case["pending"] is not None:
        assert standing.pending == case["pending"]


prices = st.sampled_from(["1", "3", "0.002", "0.000001", "1.5", "999999.999999"]) | st.integers(1, 10**9).map(
    lambda units: f"{units // MILLIONTHS}.{units % MILLIONTHS:06d}"
)
units_pending = st.integers(0, 50) | st.integers(0, 10**12) | st.integers(0, LARGEST)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(prices, st.integers(0, MILLIONTHS - 1), units_pending), min_size=1, max_size=3),
    st.none() | st.integers(0, 10**12) | st.integers(0, 50),
    st.integers(-50, LARGEST),
    st.none() | st.integers(0, 10**12),
    st.lists(st.tuples(st.integers(1, 10**12) | st.integers(1, 50), st.integers(-5, 10**12)), max_size=2),
    st.sampled_from([None, "allowance"]),
    st.sampled_from([None, "allowance"]),
    st.data(),
)
def test_lua_and_python_agree_on_every_unit(
    lua: Lua,
    drawn: list[tuple[str, int, int]],
    limit: int | None,
    rollover: int,
    cap: int | None,
    bounds: list[tuple[int, int]],
    pay_from: PayFrom | None,
    asked_from: PayFrom | None,
    data: st.DataObject,
) -> None:
    """The account in Python shows what Lua reads; both decide on holds of the same units.

    `bounds` are limits of the wallet: amount, and what its window has used.
    """
    names = [f"m{number}" for number in range(len(drawn))]
    draws = {name: Draw("credits", price) for name, (price, _, _) in zip(names, drawn, strict=True)}
    pending = {name: units for name, (_, _, units) in zip(names, drawn, strict=True)}
    balances = {name: balance(name, carried=carried) for name, (_, carried, _) in zip(names, drawn, strict=True)}
    caps = None if cap is None else {"m0": cap}
    of_setter = {per: amount for per, (amount, _) in zip(PERS, bounds, strict=False)}
    windows = {per: Window(DAY, DAY + timedelta(1), 0, used) for per, (_, used) in zip(PERS, bounds, strict=False)}
    balances["credits"] = balance(
        "credits", allowance=limit, rollover=rollover, caps=caps, cadence="monthly", purchased=20,
        limits=Limits({"user": of_setter}, windows) if bounds else None,
    )  # fmt: skip
    # A limit of the meter itself rests.
    resting = Limits({"user": {"day": 1}}, {"day": Window(DAY, DAY + timedelta(1), 0, 1)})
    balances["m0"] = balances["m0"]._replace(limits=resting)
    account = Account(USER, "studio", "active", "new", 1, balances, draws=draws, pay_from=pay_from)
    put(lua, cache_text(1, account).split("\n")[1:], pending)
    holds = [LedgerHold(name, name, units, None, None) for name, units in pending.items()]  # type: ignore[arg-type]
    standing = standing_in_ledger(account, "m0", holds)
    most = remaining_answer(USER, "m0", standing).remaining
    edge = [] if most is None else [amount for amount in (most - 1, most, most + 1) if 0 <= amount <= 10**12]
    amount = data.draw(st.integers(0, 10**12) | (st.sampled_from(edge) if edge else st.nothing()))
    status, found = checked(lua, "m0", amount, *(["-purchased"] if asked_from else []))
    answer = check_answer(Spend(USER, "m0", amount, pay_from=asked_from), standing)
    reasons = {
        b"allowed": {Reason.WITHIN_LIMIT, Reason.UNLIMITED},
        b"denied": {Reason.LIMIT_EXCEEDED},
        b"limited": {Reason.SPENDING_LIMIT_REACHED},
        b"capped": {Reason.METER_CAP_EXCEEDED},
    }
    assert answer.reason in reasons[status]
    assert standing is not None
    assert found.wallet == standing.wallet
    assert [each.ends_at for each in found.limits] == [DAY + timedelta(1)] * len(bounds)
    if standing.pending <= LARGEST:
        told = tuple(each._replace(starts_at=None) for each in standing.limits)
        assert found == standing._replace(limits=told, pay_from=asked_from or pay_from)


def balance(meter: str, **changes: Any) -> Balance:
    """A balance with nothing in it."""
    empty: dict[str, Any] = dict.fromkeys(Balance._fields)
    facts = {"allowance": 0, "spill": True, "cadence": "off", "used": 0, "rollover": 0, "purchased": 0, "carried": 0}
    return Balance(**{**empty, **facts, "meter": meter, **changes})


def test_expired_holds_of_the_other_meters_count_no_more(lua: Lua) -> None:
    put(lua, [line("credits", Buckets(10, 0, 0, 0, spill=True), "1", 0), line("voice", None, "3", 0)], {})
    lua.redis.hset(KEYS.pending("voice"), mapping={"h:k": 3, "total": 3})
    lua.redis.zadd(KEYS.holds("voice"), {"k": 1_000_500})
    assert checked(lua, "credits", 1)[1].pending == 9
    lua.set_clock(1_000_500)
    assert checked(lua, "credits", 1)[1].pending == 0
    assert not lua.redis.exists(KEYS.pending("voice"), KEYS.holds("voice"))


def test_a_check_without_a_wallet_looks_at_its_own_maps_only(lua: Lua) -> None:
    """The other meters of a wallet cost calls: the accounts without one make none of them."""
    put(lua, ["voice 10 0 0 0 1 monthly", "credits 10 0 0 0 1 monthly"], {"credits": 10})
    reply = lua.run("check", [KEYS.balance, KEYS.pending("voice"), KEYS.holds("voice")], ["voice", 10])
    assert reply == [b"allowed", b"10", b"0", b"0", b"0", b"1", b"0", b"monthly"]
