"""Scenario 24: payloads made to cost memory, or to have two readings. Workers refuse them before parsing."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.events import MAX_PAYLOAD_BYTES, Refusal
from tests.faults.hostile import GRANT, append, append_fields, count_as_pending, payload
from tests.faults.house import House
from tests.support.streams import partition_of
from worker.demo.processes import children
from worker.keyspace import keys

HUGE = 10 * 2**20
# Enough in a row that memory would show a worker that reads or keeps them all at once.
NUMBER = 6
# A worker may have the current piece and the next in memory, each in a copy or two; never all of them.
ROOM = NUMBER // 2 * HUGE


@pytest.mark.scenario(number=24)
@pytest.mark.parametrize("stream", ["partition", pytest.param("pool", marks=pytest.mark.slow)])
def test_payloads_of_ten_megabytes_are_refused_in_bounded_memory(house: House, stream: str) -> None:
    user = house.users[0]
    partition = partition_of(house.settings, user)
    with house.dyno() as dyno:
        (worker,) = children(dyno.pid)
        house.emit(40)
        house.billing.credit_pool("before", 10)
        house.wait_until_drained()
        before = peak_memory(worker)
        # No drain runs until all of them are there.
        house.redis.set(partition.halted, "by the test")
        house.redis.set(keys.SPONSORSHIP.halted, "by the test")
        for number in range(NUMBER):
            if stream == "partition":
                # Each is an event except for its length, and costs a hundred megabytes as objects.
                many = "[" + "0," * (HUGE // 2) + "0]"
                data = payload(user, f"huge-{number}", dimensions=many)
                append(house, partition, data, Refusal.TOO_LARGE, marked=True)
            else:
                fields = GRANT | {"user": user, "request": f"huge-{number}", "held": "\x00" * HUGE}
                append_fields(house, keys.SPONSORSHIP, fields, Refusal.TOO_LARGE)
        house.emit(40)
        house.billing.credit_pool("after", 10)
        house.redis.delete(partition.halted, keys.SPONSORSHIP.halted)
        house.wait_until_drained()
        assert children(dyno.pid) == {worker}, "the same process to the end"
        grown = peak_memory(worker) - before
    assert grown < ROOM
    house.prove()


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
# Members in an otherwise valid event.
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
        append_fields(house, keys.SPONSORSHIP, {"v": "1"} | fields, Refusal.BAD_POOL_ENTRY)
    with house.dyno():
        house.wait_until_drained()
    house.prove()


def peak_memory(pid: int) -> int:
    """Return the peak memory of a process so far, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1_024
