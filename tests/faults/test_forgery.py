"""Scenario 22: signatures that are missing, forged or too late are refused and counted; a replay is a duplicate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from config.settings import Settings, load_settings
from schemas.events import Refusal
from tests.faults.hostile import append, count_as_pending, payload
from tests.faults.house import PARTITIONS, House
from tests.support.ledger import rows
from tests.support.signatures import SECRETS, signature
from tests.support.streams import partition_of
from worker.client import Billing
from worker.keyspace.keys import Partition

FORGER = "f" * 32


def signed(house: House) -> Settings:
    """Return settings of a house with required signatures. The key `old` ended an hour ago."""
    ended = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    text = ",".join(f"{key_id}={secret}" for key_id, secret in SECRETS.items()) + f"@{ended}"
    made = load_settings({}, signing_keys=text, signatures="required")
    return house.settings_with(signing_keys=made.signing_keys, signatures=made.signatures)


@pytest.mark.scenario(number=22)
def test_what_nobody_vouches_for_is_refused_and_its_neighbours_are_billed(house: House) -> None:
    victim = house.users[0]
    house.users = house.users[1:]
    partition = partition_of(house.settings, victim)
    settings = signed(house)
    with Billing.connect(settings) as producer:
        for number in range(7):
            data = payload(victim, f"forged-{number}")
            other = payload(victim, f"forged-{number}", quantity="9")
            field, reason = [
                (None, Refusal.MISSING_SIGNATURE),
                (b"", Refusal.BAD_SIGNATURE),
                (signature(other, "tts"), Refusal.BAD_SIGNATURE),
                (signature(data, "tts", FORGER), Refusal.BAD_SIGNATURE),
                (signature(data, "tts").replace(b"tts", b"ocr"), Refusal.BAD_SIGNATURE),
                (signature(data, "new", FORGER), Refusal.UNKNOWN_KEY),
                (signature(data, "old"), Refusal.EXPIRED_SIGNATURE),
            ][number]
            count_as_pending(house, victim, f"forged-{number}")
            append(house, partition, data, reason, marked=True, signature=field)
            assert house.send(house.new_events(7), through=producer) == []
    with house.dyno(settings=settings):
        house.wait_until_drained()
    assert house.recorded() == 7 * 7
    assert rows(house.settings, "SELECT count(*) FROM usage_log WHERE user_id = %s", victim) == [(0,)]
    house.prove()


@pytest.mark.scenario(number=22)
def test_what_is_replayed_with_its_signature_is_a_duplicate(house: House) -> None:
    settings = signed(house)
    with Billing.connect(settings) as producer:
        assert house.send(house.new_events(40), through=producer) == []
    found: dict[Partition, Any] = {each: house.redis.xrange(each.entries) for each in PARTITIONS}
    replay(house, found)
    with house.dyno(settings=settings):
        house.wait_until_drained()
        replay(house, found)
        house.wait_until_drained()
    assert house.recorded() == 40
    house.prove()


def replay(house: House, found: dict[Partition, Any]) -> None:
    """Append stream entries once more, unchanged, as any eavesdropper can."""
    for partition, entries in found.items():
        for _, fields in entries:
            house.redis.xadd(partition.entries, fields)
