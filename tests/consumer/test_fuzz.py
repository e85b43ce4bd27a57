"""Any bytes: one result for each stream entry, in order, within bounds, and signed if required.

`FUZZ_SECONDS` says how long to go on; each round draws anew, and a failure prints what reproduces it.
"""

from __future__ import annotations

import os
from time import monotonic

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from config.settings import load_settings
from schemas.events import MAX_PAYLOAD_BYTES, UsageEvent
from tests.consumer.drawn import FIELD_NAMES, events
from tests.support.entries import CATALOGUE
from tests.support.payloads import REFUSALS, payload
from tests.support.signatures import signature
from worker.consumer.intake import Intake
from worker.consumer.refusals import UNREADABLE
from worker.consumer.sponsorship import Credited, Settled, _judged
from worker.keyspace.entries import RawEntry
from worker.keyspace.keys import Partition
from worker.rules.received import Event, Refresh, Refused

SECONDS = float(os.environ.get("FUZZ_SECONDS", "4"))
ROUND_EXAMPLES = 100
SECRET = "0123456789abcdef0123456789abcdef"
MODES = ("off", "optional", "required")
INTAKES = {
    mode: Intake(Partition(0), load_settings({}, partitions=1, signatures=mode, signing_keys=f"k={SECRET}"), CATALOGUE)
    for mode in MODES
}
OTHERS = Intake(Partition(1), load_settings({}, partitions=2), CATALOGUE)
LARGEST_KEPT = 2_000  # of the examples, so that a round takes about a second


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    """Bytes that were an event, or one of the known bad ones, before something happened to them."""
    known = [data for _, _, data in REFUSALS if len(data) <= LARGEST_KEPT]
    data = draw(events() | st.sampled_from([*known, payload()]) | st.binary(max_size=64))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 8))
        piece = draw(
            st.binary(max_size=8)
            | st.sampled_from(
                [b'"', b"\\", b"{", b"[" * 40, b"\x00", b"\xff", b"9" * 40, b"e400", b"\\ud800", b",", b":"]
            )
        )
        data = data[:at] + piece * draw(st.sampled_from([1, 1, 1, 50])) + data[at + length :]
    return data


@st.composite
def entries(draw: st.DrawFn) -> RawEntry:
    """Draw a stream entry as Redis may return it: any fields in any order, with a right, a wrong or no signature."""
    data = draw(mangled())
    choice = draw(st.sampled_from([None, None, "right", "right", "other", "bytes"]))
    fields = [(b"v", draw(st.sampled_from([b"1", b"1", b"1", b"1", b"2", b""]))), (b"e", data)]
    if draw(st.booleans()):
        fields.append((b"m", b"1"))
    if choice == "right":
        fields.append((b"s", signature(data, "k", SECRET)))
    elif choice == "other":
        fields.append((b"s", signature(data + b" ", "k", SECRET)))
    elif choice == "bytes":
        fields.append((b"s", draw(st.binary(max_size=80))))
    fields += draw(st.just([]) | st.lists(st.tuples(FIELD_NAMES, st.binary(max_size=20)), max_size=20))
    if draw(st.integers(0, 4)) == 4:
        fields = draw(st.permutations(fields))
    flat = [part for pair in fields for part in pair]
    raw_id = b"%d-%d" % (draw(st.integers(0, 2**64 - 1) | st.just(1_795_176_000_000)), draw(st.integers(0, 2**64 - 1)))
    if draw(st.integers(0, 9)) == 9:
        return raw_id, [b"e", data], len(data) + draw(st.integers(0, 10**9))
    return raw_id, flat


def check_intake(mode: str, intake: Intake, batch: list[RawEntry]) -> None:
    results = list(intake.receive(batch))
    assert [result.entry_id.encode() for result in results] == [entry[0] for entry in batch]
    for entry, result in zip(batch, results, strict=True):
        if isinstance(result, Refused):
            check_refused(result)
        elif isinstance(result, Event):
            check_event(mode, entry, result)
        else:
            assert isinstance(result, Refresh)


def check_refused(refused: Refused) -> None:
    """What is refused fits into its dead letter, and says why."""
    assert len(refused.payload) <= MAX_PAYLOAD_BYTES
    assert refused.payload_bytes >= len(refused.payload)
    assert refused.detail
    assert refused.signed_by in (None, "k")
    assert SECRET not in refused.detail
    assert refused.reason in UNREADABLE or refused.owner is None or len(refused.owner) == 3


def check_event(mode: str, entry: RawEntry, event: Event) -> None:
    """What is accepted is an event by the model too, was not cut, and bears the signature it is said to bear."""
    assert len(entry) == 2
    model = UsageEvent.model_validate_json(event.payload)
    assert (model.user_id, model.event_id, model.meter, model.quantity) == event[2:4] + event[4:6]
    assert 0 <= event.amount <= 10**12
    fields = dict(zip(entry[1][::2], entry[1][1::2], strict=True))
    assert fields[b"e"] == event.payload
    right = fields.get(b"s") == signature(event.payload, "k", SECRET)
    assert event.signed_by == ("k" if right and mode != "off" else None)
    assert right or mode != "required"
    assert right or mode == "off" or b"s" not in fields


@pytest.mark.timeout(2 * SECONDS + 120)
def test_the_intake_bears_whatever_comes() -> None:
    """For `FUZZ_SECONDS`, in rounds; ids of stream entries need not ascend here, as each is judged by itself."""

    @given(st.lists(entries(), min_size=1, max_size=4))
    @settings(
        max_examples=ROUND_EXAMPLES,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    def examine(batch: list[RawEntry]) -> None:
        batch.sort(key=lambda entry: tuple(map(int, entry[0].split(b"-"))))
        for mode, intake in INTAKES.items():
            check_intake(mode, intake, batch)
        check_intake("off", OTHERS, batch)
        for entry in batch:
            result = _judged(entry)
            assert isinstance(result, Settled | Credited | Refresh | Refused)
            if isinstance(result, Refused):
                check_refused(result)

    deadline, turn = monotonic() + SECONDS, int.from_bytes(os.urandom(4), "big")
    while monotonic() < deadline:
        turn += 1
        seed(turn)(examine)()
