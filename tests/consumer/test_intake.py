"""Intake: a stream entry of any bytes becomes one event, one refusal with its reason, or one refresh."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config.settings import Settings
from schemas.events import MAX_AMOUNT, MAX_PAYLOAD_BYTES, SIGNATURE_REFUSALS, Refusal
from tests.consumer.drawn import FIELDS, events
from tests.support.entries import CATALOGUE, ENTERED, INTAKE, entry, entry_id, event, only, received, refused
from tests.support.payloads import DEEP, MINIMAL, REFUSALS, payload, raw
from worker.consumer.intake import Intake, _NotPlain
from worker.errors import Rejected
from worker.keyspace.entries import RawEntry
from worker.keyspace.keys import Partition, partition_of, partitions_of
from worker.rules.entry_times import END_OF_TIME
from worker.rules.received import Event, Refresh, Refused

# ---------------------------------------------------------------------------------------------------------------------
# Accepting


def test_a_plain_event() -> None:
    data = payload(multiplier="1.5", source="tts", reference_id="r", hold_key="h", dimensions={"page_idx": 3})
    assert event(data) == Event(
        entry_id().decode(), False, "u1", "e1", "credits", 7, "1.5", 10, ENTERED.isoformat(), False,
        "tts", "r", "h", '{"page_idx":3}', data, None, 500_000,
    )  # fmt: skip


def test_order_is_kept_and_each_entry_gives_one_result() -> None:
    items = [
        entry(payload(event_id=f"e{number}"), raw_id=entry_id(number=number)) if number % 2 else
        entry(b"nonsense", raw_id=entry_id(number=number))
        for number in range(20)
    ]  # fmt: skip
    results = received(*items)
    assert [item.entry_id for item in results] == [item[0].decode() for item in items]
    assert [type(item) for item in results] == [Refused, Event] * 10
    assert received() == []


def test_a_mark_is_kept() -> None:
    marked = only(entry(payload(), marked=True))
    assert isinstance(marked, Event)
    assert marked.marked
    assert not event(payload()).marked


@pytest.mark.parametrize(
    ("quantity", "multiplier", "amount"),
    [
        (7, "1.5", 10),
        (3, "0.333333", 0),
        (10**12, "0.999999", 999_999_000_000),
        (29, "0.1", 2),
        (5, "0", 0),
        (0, "9", 0),
    ],
)
def test_amounts_are_exact(quantity: int, multiplier: str, amount: int) -> None:
    longer = multiplier + ("" if "." in multiplier else ".") + "0"
    for spelled in (multiplier, longer) if len(longer.partition(".")[2]) <= 6 else (multiplier,):
        found = event(payload(quantity=quantity, multiplier=spelled))
        assert (found.amount, found.multiplier) == (amount, multiplier)


@pytest.mark.parametrize(
    ("dimensions", "multiplier"),
    [
        (..., "1"),
        ({}, "1"),
        ({"model_slug": "m2"}, "1.5"),
        ({"model_slug": "m2-turbo"}, "0.75"),
        ({"model_slug": "nobody-knows"}, "1"),
        ({"model_slug": 3}, "1"),
        ({"model_slug": None}, "1"),
    ],
)
def test_the_catalogue_has_the_default_multiplier(dimensions: object, multiplier: str) -> None:
    for data in (payload(quantity=10, dimensions=dimensions), payload(quantity=10, dimensions=dimensions, source=None)):
        found = event(data)
        assert found.multiplier == multiplier
        assert found.amount == int(10 * float(multiplier))


def test_an_events_own_multiplier_wins() -> None:
    assert event(payload(multiplier="2", dimensions={"model_slug": "m2"})).multiplier == "2"


def test_values_at_the_limits_are_accepted() -> None:
    assert event(payload(quantity=MAX_AMOUNT)).amount == MAX_AMOUNT
    assert event(payload(quantity=0)).amount == 0
    assert event(payload(event_id="a" * 128, user_id="Az09._:@|+=/-")).user_id == "Az09._:@|+=/-"
    padded = payload()[:-1] + b" " * (MAX_PAYLOAD_BYTES - len(payload())) + b"}"
    assert len(padded) == MAX_PAYLOAD_BYTES
    assert event(padded).event_id == "e1"


def test_a_null_is_the_same_as_nothing() -> None:
    nulls = dict.fromkeys(("multiplier", "occurred_at", "source", "reference_id", "hold_key", "dimensions"))
    assert event(payload(**nulls))._replace(payload=b"") == event(payload())._replace(payload=b"")


# ---------------------------------------------------------------------------------------------------------------------
# Time


def test_without_a_time_it_is_the_entrys() -> None:
    found = event(payload())
    assert (found.occurred_at, found.clamped) == (ENTERED.isoformat(), False)


AHEAD, AGE = timedelta(minutes=5), timedelta(days=35)
MICROSECOND = timedelta(microseconds=1)


@pytest.mark.parametrize("offset", [timedelta(0), timedelta(hours=5, minutes=30), timedelta(hours=-11)])
@pytest.mark.parametrize("judged", [False, True])
def test_time_limits_to_the_microsecond(offset: timedelta, judged: bool) -> None:
    def at(moment: datetime) -> bytes:
        local = (moment + offset).replace(tzinfo=None).isoformat(timespec="microseconds")
        sign = "-" if offset < timedelta(0) else "+"
        hours, minutes = divmod(int(abs(offset).total_seconds()) // 60, 60)
        return payload(occurred_at=f"{local}{sign}{hours:02}:{minutes:02}", **({"source": None} if judged else {}))

    latest = event(at(ENTERED + AHEAD))
    assert (datetime.fromisoformat(latest.occurred_at), latest.clamped) == (ENTERED + AHEAD, False)
    ahead = event(at(ENTERED + AHEAD + MICROSECOND))
    assert (datetime.fromisoformat(ahead.occurred_at), ahead.clamped) == (ENTERED, True)
    oldest = event(at(ENTERED - AGE))
    assert (datetime.fromisoformat(oldest.occurred_at), oldest.clamped) == (ENTERED - AGE, False)
    assert refused(entry(at(ENTERED - AGE - MICROSECOND))).reason is Refusal.TOO_OLD


def test_each_entry_of_a_read_has_its_own_time_limits() -> None:
    later = ENTERED + timedelta(hours=1)
    edge_of_first = payload(occurred_at=(ENTERED - AGE).isoformat())
    edge_of_last = payload(occurred_at=(later + AHEAD).isoformat())
    first, second, third, fourth = received(
        entry(edge_of_first, raw_id=entry_id(ENTERED)),
        entry(edge_of_last, raw_id=entry_id(ENTERED, 1)),
        entry(edge_of_first, raw_id=entry_id(later)),
        entry(edge_of_last, raw_id=entry_id(later, 1)),
    )
    assert isinstance(first, Event)
    assert not first.clamped
    assert isinstance(second, Event)
    assert second.clamped
    assert isinstance(third, Refused)
    assert third.reason is Refusal.TOO_OLD
    assert isinstance(fourth, Event)
    assert not fourth.clamped


def test_far_ends_of_the_calendar() -> None:
    assert event(payload(occurred_at="9999-12-31T23:59:59.999999-12:00")).clamped
    assert refused(entry(payload(occurred_at="0001-01-01T00:00:00+14:00"))).reason is Refusal.TOO_OLD
    assert refused(entry(payload(occurred_at="0000-01-01T00:00:00Z"))).reason is Refusal.BAD_OCCURRED_AT
    assert refused(entry(payload(occurred_at="10000-01-01T00:00:00Z"))).reason is Refusal.BAD_OCCURRED_AT


@pytest.mark.parametrize("fraction", ["1234567", "1234565", "9999999", "123456789", "000000999"])
def test_both_paths_cut_below_the_microsecond_alike(fraction: str) -> None:
    moment = f"2026-11-20T11:59:59.{fraction}Z"
    plain, judged = event(payload(occurred_at=moment)), event(payload(occurred_at=moment, source=None))
    assert datetime.fromisoformat(plain.occurred_at) == datetime.fromisoformat(judged.occurred_at)


@pytest.mark.parametrize("offset", ["+15:59", "-15:59", "+16:00", "-23:59", "+23:59"])
def test_an_accepted_time_is_one_that_postgres_takes(offset: str) -> None:
    result = only(entry(payload(occurred_at=f"2026-11-20T10:00:00{offset}")))
    if isinstance(result, Refused):
        assert result.reason is Refusal.BAD_OCCURRED_AT
        return
    assert isinstance(result, Event)
    # PostgreSQL refuses offsets from 16 hours on: 22009, time zone displacement out of range.
    shift = datetime.fromisoformat(result.occurred_at).utcoffset()
    assert shift is not None
    assert abs(shift) < timedelta(hours=16)


@pytest.mark.parametrize("raw_id", [b"253402300800000-0", b"18446744073709551615-18446744073709551614", b"0-1"])
def test_a_producer_may_choose_any_entry_id(raw_id: bytes) -> None:
    for data in (payload(), payload(occurred_at="2026-11-20T10:00:00Z"), b"nonsense"):
        assert isinstance(only(entry(data, raw_id=raw_id)), Event | Refused)


# ---------------------------------------------------------------------------------------------------------------------
# Refusing


@pytest.mark.parametrize(
    ("reason", "data"),
    [pytest.param(reason, data, id=f"{reason.value}: {name}") for reason, name, data in REFUSALS],
)
def test_refused(reason: Refusal, data: bytes) -> None:
    result = refused(entry(data))
    assert result.reason is reason
    assert result.payload == data[:MAX_PAYLOAD_BYTES]
    assert result.payload_bytes == len(data)
    assert result.entry_id == entry_id().decode()
    assert result.owner is None
    assert result.detail
    assert result.detail.encode("utf-8"), "the reason must fit into a column of text"


@pytest.mark.parametrize("data", [payload(), payload(quantity=-1)], ids=["an event", "a refused one"])
@pytest.mark.parametrize(
    ("mark", "backend"),
    [
        (b"1", None),
        (b"1/gemini", "gemini"),
        (b"gemini", None),
        (b"1/", None),
        (b"1/u2:credits", None),
        (b"1/gemini\n", None),
        (b"1/\xff", None),
        (b"1/" + b"a" * 65, None),
        (b"", None),
    ],
)
def test_a_mark_may_name_the_backend_whose_sub_cap_it_counts_against(
    data: bytes, mark: bytes, backend: str | None
) -> None:
    raw_id, flat = entry(data, marked=True)[:2]
    result = only((raw_id, [*flat[: flat.index(b"m")], b"m", mark]))
    assert isinstance(result, Event | Refused)
    assert result.capped_backend == backend
    assert isinstance(result, Refused) or result.marked


def test_every_reason_that_intake_gives_is_tried() -> None:
    # Decided when a batch is applied, and by the books of the pool.
    elsewhere = {Refusal.ID_CONFLICT, Refusal.DATA_ERROR, Refusal.POISON, Refusal.BAD_POOL_ENTRY}
    by_entry = {Refusal.NO_PAYLOAD, Refusal.BAD_VERSION, Refusal.WRONG_PARTITION}  # tried below
    by_key = SIGNATURE_REFUSALS  # tried in test_signatures.py
    assert {reason for reason, _, _ in REFUSALS} == set(Refusal) - elsewhere - by_entry - by_key


@pytest.mark.parametrize("version", [b"", b"0", b"2", b"1 ", b"\xff"])
def test_bad_version(version: bytes) -> None:
    assert refused(entry(payload(), v=version)).reason is Refusal.BAD_VERSION


def test_no_version() -> None:
    result = refused((entry_id(), [b"e", payload()]))
    assert (result.reason, result.payload) == (Refusal.BAD_VERSION, payload())


def test_no_payload() -> None:
    result = refused(entry(None, x=b"y"))
    assert (result.reason, result.payload) == (Refusal.NO_PAYLOAD, b"v\n1\nx\ny")


def test_wrong_partition() -> None:
    own = partition_of("u1", 8)
    settings_of_8 = Settings(partitions=8)
    for partition in partitions_of(8):
        result = only(entry(payload()), Intake(partition, settings_of_8, CATALOGUE))
        if partition == own:
            assert isinstance(result, Event)
        else:
            assert isinstance(result, Refused)
            assert result.reason is Refusal.WRONG_PARTITION
            assert result.detail == f"user_id: belongs to partition {own.number}"


def test_partitions_are_crc32_of_utf8() -> None:
    assert [partition_of(user, 8).number for user in ("123456789", "a", "u1")] == [
        0xCBF43926 % 8, 0xE8B7BE43 % 8, partition_of("u1", 2**32).number % 8,
    ]  # fmt: skip


OWNED = [
    payload(quantity=-1),
    payload(meter="cups_of_tea"),
    payload(colour="red"),
    payload()[:-1] + b',"quantity":8}',
    payload(occurred_at="2020-01-01T00:00:00Z"),
    raw("quantity", "1" * 5_000),
    raw("source", r'"\ud800"'),
]


@pytest.mark.parametrize("data", OWNED, ids=lambda data: data[-40:].decode())
def test_a_marked_entry_that_is_refused_still_names_what_was_counted(data: bytes) -> None:
    owner = refused(entry(data, marked=True)).owner
    assert owner is not None
    assert owner[0] == "u1"
    assert owner[2] == "e1"
    assert refused(entry(data)).owner is None


@pytest.mark.parametrize(
    "data", [b"nonsense", b"[]", DEEP, payload(user_id="{p1}"), payload(event_id=7), payload(meter=...), b"\xff\xfe"]
)
def test_a_marked_entry_that_names_nobody_has_no_owner(data: bytes) -> None:
    assert refused(entry(data, marked=True)).owner is None


@pytest.mark.parametrize("data", [payload(meter="x:y"), payload(meter="a" * 65), payload(meter="UPPER")])
def test_an_owner_has_a_meter_that_could_have_been_counted(data: bytes) -> None:
    assert refused(entry(data, marked=True)).owner is None


def test_a_refresh_names_its_account() -> None:
    assert only((entry_id(), [b"r", b"u1"])) == Refresh(entry_id().decode(), "u1")
    assert only((entry_id(), [b"v", b"1", b"r", b"u1"])) == Refresh(entry_id().decode(), "u1")


@pytest.mark.parametrize("user", [b"", b"{p1}", b"a\x00", b"\xff", b"x" * 10_000])
def test_a_refresh_of_nobody_is_refused(user: bytes) -> None:
    assert refused((entry_id(), [b"r", user])).reason is Refusal.BAD_USER_ID


def test_a_refresh_in_the_wrong_partition_is_refused() -> None:
    wrong = Partition((partition_of("u1", 8).number + 1) % 8)
    result = refused((entry_id(), [b"r", b"u1"]), Intake(wrong, Settings(partitions=8), CATALOGUE))
    assert result.reason is Refusal.WRONG_PARTITION


# ---------------------------------------------------------------------------------------------------------------------
# Bounded


def _peak_bytes(items: Sequence[RawEntry]) -> tuple[int, int]:
    """Memory that stays, and the most that was taken, while `items` are received."""
    tracemalloc.start()
    try:
        for _ in INTAKE.receive(items):
            pass
        return tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("marked", [False, True])
def test_what_is_too_large_is_not_parsed(marked: bool) -> None:
    huge = b'{"user_id":"u1","meter":"credits","event_id":"e1","x":[' + b"1.5," * 1_000_000 + b"1]}"
    _, peak = _peak_bytes([entry(huge, marked=marked)])
    assert peak < 1_000_000


def test_hostile_multipliers_do_not_stay_in_memory() -> None:
    items = [entry(payload(multiplier=f"{number}" + "9" * 60_000)) for number in range(200)]
    kept, _ = _peak_bytes(items)
    assert kept < 1_000_000


# ---------------------------------------------------------------------------------------------------------------------
# The two paths


def fast_path(data: bytes) -> Event | None:
    """What the fast path makes of a payload; None where it leaves the decision to the model."""
    entered = ENTERED
    try:
        return INTAKE._plain(entry_id().decode(), END_OF_TIME, False, data, entered - AGE, entered + AHEAD)
    except (_NotPlain, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def meaning(found: Event) -> tuple[object, ...]:
    """An event without the way in which its parts are spelled."""
    facts = None if found.dimensions is None else json.loads(found.dimensions)
    return (*found._replace(occurred_at="", dimensions=None), datetime.fromisoformat(found.occurred_at), facts)


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(events())
@example(payload(occurred_at="2026-11-20T11:59:59.123456Z", dimensions={"a": 1.5, "b": "ü"}))
def test_what_the_fast_path_accepts_the_model_accepts_alike(data: bytes) -> None:
    plain = fast_path(data)
    if plain is None:
        return
    try:
        judged = INTAKE._judged(entry_id().decode(), END_OF_TIME, False, data)
    except Rejected as rejected:
        raise AssertionError(f"the model refuses {data!r}: {rejected.reason}, {rejected.detail}") from None
    assert meaning(plain) == meaning(judged)


@pytest.mark.parametrize(
    "optional", [{}, {"source": "tts"}, {"occurred_at": "2026-11-20T12:00:00Z"}, {"dimensions": {"a": 1}}]
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_ordinary_events_take_the_fast_path(optional: dict[str, Any], separators: tuple[str, str]) -> None:
    assert fast_path(json.dumps({**MINIMAL, **optional}, separators=separators).encode()) is not None


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(FIELDS, max_size=4))
def test_whatever_comes_in_gives_one_result_per_entry(entries: list[list[bytes]]) -> None:
    items = [(entry_id(number=number), fields) for number, fields in enumerate(entries)]
    results = received(*items)
    assert [item.entry_id for item in results] == [raw_id.decode() for raw_id, _ in items]
    for item in results:
        assert isinstance(item, Event | Refused | Refresh)
        if isinstance(item, Refused):
            assert item.detail.encode()


@settings(max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_payloads_are_refused_or_valid(data: bytes, marked: bool) -> None:
    assert isinstance(only(entry(data, marked=marked)), Event | Refused)
