"""Entries of a stream as Redis gives them, and what intake makes of them."""

from __future__ import annotations

from datetime import UTC, datetime

from config.catalogue import load_catalogue
from config.settings import DEFAULT_CATALOGUE, Settings
from worker.consumer.intake import Intake
from worker.keyspace.entries import RawEntry
from worker.keyspace.keys import Partition
from worker.rules.received import Event, Received, Refused

CATALOGUE = load_catalogue(DEFAULT_CATALOGUE)
INTAKE = Intake(Partition(0), Settings(partitions=1), CATALOGUE)
ENTERED = datetime(2026, 11, 20, 12, 0, 0, 250_000, UTC)


def entry_id(at: datetime = ENTERED, number: int = 0) -> bytes:
    """The id Redis gives an entry appended at `at`."""
    return b"%d-%d" % (round(at.timestamp() * 1000), number)


def entry(payload: bytes | None, *, marked: bool = False, raw_id: bytes | None = None, **fields: bytes) -> RawEntry:
    """A stream entry; `fields` add to or replace what a producer sends."""
    named = {b"v": b"1"} | ({b"e": payload} if payload is not None else {}) | ({b"m": b"1"} if marked else {})
    named |= {name.encode(): value for name, value in fields.items()}
    return raw_id or entry_id(), [part for pair in named.items() for part in pair]


def received(*entries: RawEntry, intake: Intake = INTAKE) -> list[Received]:
    """What becomes of entries read together."""
    return list(intake.receive(entries))


def only(item: RawEntry, intake: Intake = INTAKE) -> Received:
    """What becomes of one entry."""
    (result,) = received(item, intake=intake)
    return result


def event(data: bytes, *, raw_id: bytes | None = None) -> Event:
    """The event in a payload that must be valid."""
    result = only(entry(data, raw_id=raw_id))
    assert isinstance(result, Event), result
    return result


def refused(item: RawEntry, intake: Intake = INTAKE) -> Refused:
    """The refusal of an entry that must not be valid."""
    result = only(item, intake)
    assert isinstance(result, Refused), result
    return result
