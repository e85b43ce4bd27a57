"""Scenario 24: payloads made to cost memory or to be read in two ways. They are refused before they are parsed."""

from __future__ import annotations

import pytest

from schemas.events import MAX_PAYLOAD_BYTES, Refusal
from tests.faults.hostile import GRANT, append, append_fields, count_as_pending, payload
from tests.faults.house import House
from tests.support import partition_of
from worker import keys

DEEP = MAX_PAYLOAD_BYTES // 2
BROKEN = [
    (b"[" * 100_000 + b"]" * 100_000, Refusal.TOO_LARGE),
    (b"[" * 65_000, Refusal.TOO_DEEP),
    (b"[" * DEEP + b"]" * DEEP, Refusal.TOO_DEEP),
    (payload("user-0", "deep", dimensions="[" * 30_000 + "]" * 30_000), Refusal.TOO_DEEP),
    (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, Refusal.TOO_DEEP),
    (b"not json", Refusal.NOT_JSON),
    (b"", Refusal.NOT_JSON),
    (b"\xff\xfe{}", Refusal.NOT_UTF8),
    (b'"\xed\xa0\x80"', Refusal.NOT_UTF8),
]
# Written into an event that is good but for them.
MEMBERS = [
    ({"dimensions": '{"a":1,"a":1}'}, Refusal.DUPLICATE_KEY),
    ({"source": '"a","source":"a"'}, Refusal.DUPLICATE_KEY),
    ({"source": '"a","quantity":99'}, Refusal.DUPLICATE_KEY),
    ({"source": r'"a","quantit\u0079":99'}, Refusal.DUPLICATE_KEY),
]


@pytest.mark.scenario(number=24)
def test_payloads_that_cannot_be_read_or_can_be_read_in_two_ways_are_refused(house: House) -> None:
    user = house.users[0]
    partition = partition_of(house.settings, user)
    for data, reason in BROKEN:
        append(house, partition, data, reason)
        append(house, partition, data, reason, marked=True)
    for number, (written, reason) in enumerate(MEMBERS):
        count_as_pending(house, user, f"twice-{number}")
        append(house, partition, payload(user, f"twice-{number}", **written), reason, marked=True)
        house.emit(8)
    for fields in ({"k": "grant"}, {"e": "{}"}, GRANT | {"request": b"\xff"}, GRANT | {"user": user}):
        append_fields(house, keys.SPONSOR, {"v": "1"} | fields, Refusal.BAD_POOL_ENTRY)
    with house.dyno():
        house.wait_until_drained()
    house.prove()
