"""The oracle itself: it names every fault, and finds none in right books."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from schemas.events import UsageEvent
from tests.faults.house import METER, House
from tests.support.ledger import execute, give_account
from tests.support.oracle import HEADING, differences
from worker.keyspace import keys


def pending_key(house: House) -> str:
    return keys.account_of(house.users[0], house.settings.partitions).pending(METER)


def forget_an_event(house: House) -> None:
    del house.accepted.events[house.users[0], "e0"]


def invent_an_event(house: House) -> None:
    house.accept([UsageEvent(event_id="lost", user_id=house.users[0], meter=METER, quantity=1)])


def change_an_amount(house: House) -> None:
    house.accepted.events[house.users[0], "e0"] += 1


def bill_twice(house: House) -> None:
    """Make a dead letter of a recorded event."""
    payload = f'{{"event_id": "e0", "user_id": "{house.users[0]}", "meter": "{METER}"}}'
    execute(
        house.settings,
        "INSERT INTO dead_letter (partition_id, entry_id, payload_hash, reason, detail, payload, payload_bytes) "
        f"VALUES (0, '1-1', '', 'data_error', '', '{payload}', {len(payload)})",
    )


def expect_a_dead_letter(house: House) -> None:
    house.accepted.dead["", "", "not_json"] += 1


def move_a_balance(house: House) -> None:
    execute(house.settings, f"UPDATE balance SET purchased = purchased + 1 WHERE user_id = '{house.users[0]}'")


def lose_a_balance(house: House) -> None:
    execute(house.settings, f"DELETE FROM balance WHERE user_id = '{house.users[0]}' AND meter = '{METER}'")


def change_the_plan(house: House) -> None:
    execute(house.settings, f"UPDATE account SET plan = 'plus' WHERE user_id = '{house.users[0]}'")


def show_an_old_balance(house: House) -> None:
    name = keys.account_of(house.users[0], house.settings.partitions).balance
    house.redis.set(name, f"1 1\n{METER} 100000 0 0 0 1 subscription")


def leave_an_entry(house: House) -> None:
    house.redis.xadd(keys.SPONSORSHIP.entries, {"v": "1"})


def leave_an_event_pending(house: House) -> None:
    house.redis.hset(pending_key(house), mapping={"e:e0": 1, "total": 1})


def leave_a_hold_pending(house: House) -> None:
    house.redis.hset(pending_key(house), mapping={"h:job": 1, "total": 1})


def count_wrong(house: House) -> None:
    house.redis.hset(pending_key(house), mapping={"total": 1})


def expect_a_hold(house: House) -> None:
    house.accepted.holds[house.users[0], METER, "job-9"] = 5


def forget_a_grant(house: House) -> None:
    del house.accepted.grants["r0"]


def expect_more_of_the_pool(house: House) -> None:
    house.accepted.grants["r0"] += 1


def leave_a_promise(house: House) -> None:
    house.redis.hset(keys.SPONSORSHIP.promised, mapping={"g:r0": 7, "total": 7})


def leave_a_hold_in_a_window(house: House) -> None:
    house.redis.hset(keys.SPONSORSHIP.today(house.users[0]), mapping={"h:r9": 5})


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (forget_an_event, "event e0 of {user}: recorded and never accepted"),
        (invent_an_event, "event lost of {user}: accepted and not recorded"),
        (change_an_amount, "event e0 of {user}: recorded with amount 1, accepted with 2"),
        (bill_twice, "event e0 of {user}: 1 dead letters for data_error, expected 0"),
        (expect_a_dead_letter, "entry that names no event: 0 dead letters for not_json, expected 1"),
        (move_a_balance, "balance of {user} on premium_voice: "),
        (lose_a_balance, "balance of {user} on premium_voice: used, rollover, purchased [None, None, None]"),
        (change_the_plan, "verify: {user}: account plan is plus, its changes make it basic"),
        (show_an_old_balance, "cached balance of {user}: epoch and version 1 1, the ledger is at "),
        (leave_an_entry, "stream mf:{{sponsor}}:events: 1 entries left"),
        (leave_an_event_pending, "pending of {user} on premium_voice: e:e0 holds 1 units, expected 0"),
        (leave_a_hold_pending, "pending of {user} on premium_voice: h:job holds 1 units, expected 0"),
        (count_wrong, "pending of {user} on premium_voice: total 1, its ids sum to 0"),
        (forget_a_grant, "request "),
        (expect_more_of_the_pool, "request r0: the pool gave 7 units, accepted with 8"),
        (leave_a_promise, "pool: g:r0 is promised 7 units, expected 0"),
        (leave_a_hold_in_a_window, "window of {user}: h:r9 holds 5 units, expected 0"),
        (expect_a_hold, "pending of {user} on premium_voice: h:job-9 holds 0 units, expected 5"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_names_what_is_wrong(house: House, spoil: Callable[[House], None], named: str) -> None:
    house.emit(8)
    with house.sponsor() as sponsor:
        house.absorb(sponsor, house.users[0], "r0", 7)
    house.drain()
    house.prove()
    spoil(house)
    expected = named.format(user=house.users[0])
    found = differences(house.resources, house.accepted)
    assert any(each.startswith(expected) for each in found), found
    with pytest.raises(AssertionError, match=HEADING):
        house.prove()


def test_it_looks_at_an_entry_that_waits(house: House) -> None:
    house.emit(1)
    found = differences(house.resources, house.accepted)
    assert [each.split(":")[0] for each in found] == [
        f"event e0 of {house.users[0]}",
        "stream mf",
        f"pending of {house.users[0]} on {METER}",
    ]


def test_what_a_test_expects_is_no_difference(house: House) -> None:
    relay = "relay_credits"
    give_account(house.settings, "relay-1", "core")
    house.billing.reserve("relay-1", relay, 12, "job-1", backend="gemini")
    house.accepted.holds["relay-1", relay, "job-1"] = 12
    house.accepted.holds["relay-1", f"{relay}/gemini", "job-1"] = 12
    house.emit_nonsense()
    house.emit(8)
    house.drain()
    house.prove()
