"""Grants of credit: golden cases by hand, and a model that keeps every single unit apart.

The model knows nothing of our code. Each unit is a coin that remembers its grant; a payment picks the coins that
come first by the rule of the design.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.rules.account import Balance
from worker.rules.credits import (
    Order,
    Returned,
    add_units,
    cross_grants,
    give,
    grants_on,
    move_in,
    move_out,
    put_back,
    take_back,
    with_grants,
)
from worker.rules.grants import UNNAMED, Grant, Grants, burn_order, unnamed

DAY = timedelta(days=1)
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def grant(
    key: str,
    left: int = 100,
    category: str = "paid",
    priority: int = 50,
    start: int = 0,
    end: int | None = None,
    made: int = 0,
    given_units: int | None = None,
) -> Grant:
    """A grant whose start, end and making are so many days after NOW."""
    return Grant(
        key, given_units or left, left, category, priority, NOW + start * DAY,  # type: ignore[arg-type]
        None if end is None else NOW + end * DAY, NOW + made * DAY,
    )  # fmt: skip


def balance(purchased: int = 0, grants: Grants | None = None) -> Balance:
    """A balance of nothing but credit."""
    return Balance(
        "credits", 0, True, 0, None, "off", "sticky", None, NOW, 0, NOW, None, None, NOW, 0, 0, purchased, grants=grants
    )


def having(*in_force: Grant, to_come: tuple[Grant, ...] = ()) -> Balance:
    return with_grants(balance(), Grants().plus(in_force).plus(to_come, to_come=True))


def left_of(found: Balance) -> list[tuple[str, int]]:
    return [(each.key, each.left) for each in grants_on(found).in_force]


# ---------------------------------------------------------------------------------------------------------------------
# Who pays first


GOLDEN_ORDER = [
    # Priority counts before all else, also before an end that is near.
    ([grant("late", priority=10), grant("soon", priority=11, end=1)], ["late", "soon"]),
    ([grant("a", priority=100), grant("b", priority=0), grant("c")], ["b", "c", "a"]),
    # Then the end: the soonest first, never last.
    ([grant("never"), grant("later", end=9), grant("soon", end=2)], ["soon", "later", "never"]),
    ([grant("paid", end=2), grant("gift", category="promotional", end=3)], ["paid", "gift"]),
    # Then what was given away, before what was paid for.
    ([grant("paid"), grant("gift", category="promotional")], ["gift", "paid"]),
    ([grant("paid", start=-9), grant("gift", category="promotional", start=-1)], ["gift", "paid"]),
    # Then the start, then the making, and at last the key.
    ([grant("young", start=-1, made=-9), grant("old", start=-5)], ["old", "young"]),
    ([grant("second", made=-1), grant("first", made=-2)], ["first", "second"]),
    ([grant("b"), grant("a"), grant("A")], ["A", "a", "b"]),
    # Credit without an order is paid credit that was always there.
    ([grant("order", start=-900), unnamed(5)], ["", "order"]),
    ([unnamed(5), grant("gift", category="promotional")], ["gift", ""]),
    ([unnamed(5), grant("ends", end=400)], ["ends", ""]),
]


@pytest.mark.parametrize(("grants", "order"), GOLDEN_ORDER)
def test_the_order_in_which_grants_pay(grants: list[Grant], order: list[str]) -> None:
    assert [each.key for each in sorted(grants, key=burn_order)] == order
    assert [each.key for each in Grants().plus(reversed(grants)).in_force] == order


@pytest.mark.parametrize(
    ("units", "used", "left"),
    [
        (0, {}, {"gift": 10, "": 5, "order": 100}),
        (4, {"gift": 4}, {"gift": 6, "": 5, "order": 100}),
        (10, {"gift": 10}, {"": 5, "order": 100}),
        (16, {"gift": 10, "": 5, "order": 1}, {"order": 99}),
        (115, {"gift": 10, "": 5, "order": 100}, {}),
        (500, {"gift": 10, "": 5, "order": 100}, {}),
    ],
)
def test_units_are_taken_in_that_order(units: int, used: dict[str, int], left: dict[str, int]) -> None:
    grants = Grants().plus([grant("order"), unnamed(5), grant("gift", 10, "promotional")])
    rest, taken = grants.take(units)
    assert (taken, {each.key: each.left for each in rest.in_force}) == (used, left)


class Terms(NamedTuple):
    """How a drawn grant pays, in days and units."""

    units: int
    priority: int
    end: int | None
    is_gift: bool
    start: int
    made: int


terms = st.builds(
    Terms,
    st.integers(1, 6),
    st.sampled_from([0, 49, 50, 51, 100]),
    st.none() | st.integers(1, 4),
    st.booleans(),
    st.integers(-3, 0),
    st.integers(-3, 0),
)


@given(st.lists(terms, max_size=6), st.lists(st.integers(0, 9), max_size=6))
def test_coins_one_by_one_pay_the_same(drawn: list[Terms], amounts: list[int]) -> None:
    """Each coin is asked whether a better one is left, by comparing the two in words of the design."""

    def better(one: tuple[int, Terms], other: tuple[int, Terms]) -> bool:
        (a, first), (b, second) = one, other
        if first.priority != second.priority:
            return first.priority < second.priority
        if first.end != second.end:
            return second.end is None or (first.end is not None and first.end < second.end)
        if first.is_gift != second.is_gift:
            return first.is_gift
        if first.start != second.start:
            return first.start < second.start
        return first.made < second.made if first.made != second.made else a < b

    coins = [(number, each) for number, each in enumerate(drawn) for _ in range(each.units)]
    grants = Grants().plus(
        grant(str(number), each.units, "promotional" if each.is_gift else "paid", each.priority, each.start, each.end,
              each.made) for number, each in enumerate(drawn)
    )  # fmt: skip
    for amount in amounts:
        spent: Counter[str] = Counter()
        for _ in range(min(amount, len(coins))):
            best = next(coin for coin in coins if not any(better(each, coin) for each in coins))
            coins.remove(best)
            spent[str(best[0])] += 1
        grants, used = grants.take(amount)
        assert used == dict(spent)
        assert grants.units() == len(coins)


def test_an_event_leaves_the_grants_alone_that_it_took_nothing_from() -> None:
    """A meter may have a thousand grants: to make each of them anew for every event takes seconds of a batch."""
    grants = Grants().plus(grant(f"{number:03}", 3) for number in range(100))
    rest, used = grants.take(4)
    assert used == {"000": 3, "001": 1}
    assert all(one is other for one, other in zip(rest.in_force[1:], grants.in_force[2:], strict=True))
    rest, used = grants.take(2, "050")
    assert used == {"050": 2}
    assert sum(one is other for one, other in zip(rest.in_force, grants.in_force, strict=True)) == 99


@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=6),
    st.integers(0, 40),
    st.none() | st.integers(0, 6).map(str),
)
def test_units_are_taken_as_if_each_grant_was_asked(
    drawn: list[tuple[int, bool]], units: int, first: str | None
) -> None:
    grants = Grants()
    for number, (left, to_come) in enumerate(drawn):
        grants = grants.plus([grant(str(number), left, start=int(to_come))], to_come=to_come)
    asked = [each for each in (*grants.in_force, *grants.to_come) if each.key == first]
    asked += [each for each in grants.in_force if each.key != first]
    expected = dict[str, int]()
    for each in asked:
        if part := min(units - sum(expected.values()), each.left):
            expected[each.key] = part
    rest, used = grants.take(units, first)
    assert (used, list(used)) == (expected, list(expected))
    for before, after in zip(grants, rest, strict=True):
        kept = [each._replace(left=each.left - used.get(each.key, 0)) for each in before]
        assert after == tuple(each for each in kept if each.left)


# ---------------------------------------------------------------------------------------------------------------------
# A balance and its grants


@given(st.integers(0, 50), st.lists(st.integers(-20, 20), max_size=8))
def test_a_balance_without_orders_stays_plain(purchased: int, changes: list[int]) -> None:
    here = balance(purchased)
    for change in changes:
        here = add_units(here, max(change, -here.purchased))
        assert here.grants is None


def test_the_last_grant_of_an_order_leaves_a_plain_balance() -> None:
    here = give(balance(5), grant("gift", 10, "promotional"), to_come=False)
    assert (here.purchased, left_of(here)) == (15, [("gift", 10), ("", 5)])
    assert with_grants(here, grants_on(here).take(12)[0]) == balance(3)


GOLDEN_REFUNDS = [
    # amount, order, expired -> left, used, gone, debt
    (30, "b", 0, [("a", 100), ("b", 70)], {"b": 30}, 0, 0),
    (130, "b", 0, [("a", 70)], {"b": 100, "a": 30}, 0, 0),  # its own first, then the one that pays next
    (250, "b", 0, [], {"b": 100, "a": 100}, 0, 50),
    (30, None, 0, [("a", 70), ("b", 100)], {"a": 30}, 0, 0),
    (150, "b", 40, [("a", 90)], {"b": 100, "a": 10}, 40, 0),  # what expired of it is no debt
    (120, "b", 40, [("a", 100)], {"b": 100}, 20, 0),
    (30, "b", 40, [("a", 100), ("b", 70)], {"b": 30}, 0, 0),
    (30, "spent", 0, [("a", 70), ("b", 100)], {"a": 30}, 0, 0),
    (30, "spent", 30, [("a", 100), ("b", 100)], {}, 30, 0),
]


@pytest.mark.parametrize(("amount", "order", "expired", "left", "used", "gone", "debt"), GOLDEN_REFUNDS)
def test_a_refund_takes_from_its_own_order_first(
    amount: int,
    order: str | None,
    expired: int,
    left: list[tuple[str, int]],
    used: dict[str, int],
    gone: int,
    debt: int,
) -> None:
    taken = take_back(having(grant("a", end=3), grant("b")), amount, NOW, order, expired)
    assert (left_of(taken.balance), taken.used, taken.gone, taken.debt) == (left, used, gone, debt)
    assert (taken.balance.purchased, taken.balance.rollover) == (sum(units for _, units in left), -debt)


def test_a_refund_takes_from_a_grant_that_is_to_come_only_if_it_is_its_own() -> None:
    here = having(grant("now", 10), to_come=(grant("later", 50, start=5),))
    own = take_back(here, 20, NOW, "later")
    assert (own.used, own.debt, own.balance.purchased) == ({"later": 20}, 0, 10)
    assert [each.left for each in grants_on(own.balance).to_come] == [30]
    other = take_back(here, 20, NOW, "now")
    assert (other.used, other.debt) == ({"now": 10}, 10)


ORDERS = {
    "ended": Order(100, grant=grant("ended", end=-1, start=-9)),
    "spent": Order(100, grant=grant("spent", end=9)),
    "later": Order(100, grant=grant("later", start=2)),
    "former": Order(100),
}


@pytest.mark.parametrize(
    ("used", "left", "gone"),
    [
        ({"spent": 7}, [("spent", 7), ("open", 40)], {}),
        ({"open": 7}, [("open", 47)], {}),
        ({"ended": 7}, [("open", 40)], {"ended": 7}),
        ({"ended": 7, "open": 1}, [("open", 41)], {"ended": 7}),
        ({"former": 7}, [("", 7), ("open", 40)], {}),  # it does not say how it pays
        ({UNNAMED: 7}, [("", 7), ("open", 40)], {}),
        ({"later": 7}, [("open", 40)], {}),  # it waits again
    ],
)
def test_what_returns_goes_to_its_own_grant(
    used: dict[str, int], left: list[tuple[str, int]], gone: dict[str, int]
) -> None:
    found = put_back(having(grant("open", 40, given_units=100)), used, ORDERS, NOW)
    assert (left_of(found.balance), found.gone) == (left, gone)
    assert sum(each.left for each in grants_on(found.balance).to_come) == used.get("later", 0)


def test_by_a_moment_grants_start_and_end_though_nobody_stored_it() -> None:
    grants = grants_on(
        having(grant("over", 10, end=1), grant("open", 10), to_come=(grant("due", 10, priority=0, start=1),))
    )
    at = NOW + DAY
    assert grants.take_at(25, NOW)[1] == {"over": 10, "open": 10}
    assert grants.take_at(25, at)[1] == {"due": 10, "open": 10, "over": 5}
    assert grants.take_at(25, at, "open")[1] == {"open": 10, "due": 10}
    assert grants.take_at(25, at, "over")[1] == {"over": 10, "due": 10, "open": 5}
    assert grants.take_at(15, at, started=False)[1] == {"open": 10, "over": 5}


def test_what_a_refund_counted_returns_once() -> None:
    order = {"k": Order(100, taken=100, grant=grant("k", 100, end=1))}
    for days in (0, 2):  # before and after its end
        owing = balance()._replace(rollover=-50)
        found = put_back(owing, {"k": 70}, order, NOW + days * DAY)
        assert (found.balance, found.gone, found.reclaimed) == (balance(20), {}, {"k": 70})
    half = {"k": order["k"]._replace(taken=60, expired=10)}
    found = put_back(balance(), {"k": 70}, half, NOW + 2 * DAY)
    assert (found.balance, found.gone, found.reclaimed) == (balance(40), {"k": 30}, {"k": 40})
    assert left_of(put_back(balance(), {"k": 70}, half, NOW).balance) == [("k", 30), ("", 40)]


def test_boundaries_come_in_the_order_of_time() -> None:
    here = having(
        grant("ends", 10, end=3),
        grant("never", 5),
        to_come=(grant("short", 20, start=1, end=2), grant("long", 40, start=4)),
    )
    crossed = [
        (found.at, found.kind, found.grant.key, after.purchased) for found, after in cross_grants(here, NOW + 3 * DAY)
    ]
    assert crossed == [
        (NOW + DAY, "start", "short", 35),
        (NOW + 2 * DAY, "expire", "short", 15),
        (NOW + 3 * DAY, "expire", "ends", 5),
    ]
    assert not list(cross_grants(here, NOW + DAY - timedelta(microseconds=1)))


def test_holds_are_paid_by_what_a_carry_over_leaves_behind() -> None:
    here = having(grant("soon", 10, end=1), grant("never", 20), to_come=(grant("later", 5, start=3),))
    left, moving = move_out(here, 25, NOW)
    assert left_of(left) == [("soon", 5)]
    assert (grants_on(left).to_come, moving.units(), [each.key for each in moving.to_come]) == ((), 25, ["later"])
    assert move_in(left, moving) == here
    assert move_out(here, 25, NOW + DAY)[1].units() == 20  # what has ended expires where it is


# ---------------------------------------------------------------------------------------------------------------------
# Any sequence


@given(st.data())
def test_no_unit_is_lost_or_made(data: st.DataObject) -> None:
    """Sums alone: what is left, used, gone and owed is what was given."""
    here, orders, flows = balance(data.draw(st.integers(0, 5))), dict[str, Order](), Counter(given=0)
    flows["given"] = here.purchased
    out: list[dict[str, int]] = []
    for number in range(data.draw(st.integers(0, 8))):
        move = data.draw(st.sampled_from(["grant", "take", "refund", "return"]))
        if move == "grant":
            end = data.draw(st.none() | st.integers(1, 3))
            new = grant(f"o{number}", data.draw(st.integers(1, 9)), end=end)
            here, orders[new.key] = give(here, new, to_come=False), Order(new.left, grant=new)
            flows["given"] += new.left
        elif move == "take":
            rest, used = grants_on(here).take(data.draw(st.integers(0, 9)))
            here = with_grants(here, rest)
            out.append(used)
        elif move == "refund":
            taken = take_back(here, data.draw(st.integers(0, 9)), NOW, data.draw(st.sampled_from([None, *orders])))
            here = taken.balance
            out.append(taken.used)
            flows["owed"] += taken.debt
        elif out:
            found: Returned = put_back(here, out.pop(), orders, NOW + data.draw(st.integers(0, 4)) * DAY)
            here = found.balance
            flows["gone"] += sum(found.gone.values())
        assert here.purchased == grants_on(here).units()
        assert here.purchased + sum(sum(used.values()) for used in out) + flows["gone"] == flows["given"]
        assert here.rollover == -flows["owed"]
        assert all(each.given is None or 0 < each.left <= each.given for each in grants_on(here).in_force)
        if here.grants is not None:
            assert Grants.from_json(here.grants.as_json()) == here.grants
