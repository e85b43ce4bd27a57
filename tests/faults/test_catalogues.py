"""Two dynos with different catalogue files, side by side, while a new catalogue rolls out."""

from __future__ import annotations

import json
from pathlib import Path

from schemas.events import UsageEvent
from tests.faults.house import METER, SLOW_SECONDS, House
from tests.support.catalogues import NEW_METER, newer_catalogue
from tests.support.ledger import rows
from tests.support.streams import partition_of
from tests.support.waiting import wait_until
from worker.admin import catalogues
from worker.client import Billing

EACH = 100
QUANTITY = 100


def test_two_dynos_with_different_files_charge_by_the_catalogue_in_force(house: House, tmp_path: Path) -> None:
    path, newer = newer_catalogue(tmp_path)
    with (
        house.dyno() as old,
        house.dyno(settings=house.settings_with(catalogue_path=path)) as new,
        Billing.connect(house.settings_with(catalogue_path=path)) as producer,
    ):
        before = append_raw(house, "before", "150")
        wait_until(lambda: house.recorded() == EACH, "the events of before are charged", SLOW_SECONDS)
        # Of a service that carries the newer file: its first call announces the meters of that.
        waiting = [event(house, f"new-{n}", n, NEW_METER) for n in range(EACH)]
        house.send(waiting, producer)
        wait_until(lambda: "wait for a catalogue" in house.log_of(old) + house.log_of(new), "they wait", SLOW_SECONDS)
        assert (house.recorded(), house.backlog(), dead(house)) == (EACH, EACH, 0)

        catalogues.apply(house.resources, newer, by="test")
        house.wait_until_drained()
        append_raw(house, "after", "300")
        house.wait_until_drained()
        assert newer.digest in house.log_of(new)
        assert "this process carries catalogue" in house.log_of(new)
        assert "this process carries catalogue" not in house.log_of(old)
    assert before == EACH
    amounts = rows(
        house.settings, "SELECT split_part(event_id, '-', 1), amount, count(*) FROM usage_log GROUP BY 1, 2 ORDER BY 1"
    )
    assert amounts == [("after", 300, EACH), ("before", 150, EACH), ("new", QUANTITY, EACH)]
    assert dead(house) == 0
    house.prove()


def append_raw(house: House, prefix: str, amount: str) -> int:
    """Append events of a plain producer, whose model the catalogue prices: each must cost `amount`."""
    for n in range(EACH):
        user_id = house.users[n % len(house.users)]
        sent = event(house, f"{prefix}-{n}", n, METER)
        fields = {"event_id": sent.event_id, "user_id": user_id, "meter": METER, "quantity": QUANTITY}
        payload = json.dumps(fields | {"dimensions": {"model_slug": "m2"}})
        partition = partition_of(house.settings, user_id)
        house.redis.xadd(partition.entries, {"v": "1", "e": payload})
        house.accepted.events[user_id, sent.event_id] = int(amount)
    return EACH


def event(house: House, event_id: str, number: int, meter: str) -> UsageEvent:
    user_id = house.users[number % len(house.users)]
    return UsageEvent(event_id=event_id, user_id=user_id, meter=meter, quantity=QUANTITY, multiplier="1")


def dead(house: House) -> int:
    ((number,),) = rows(house.settings, "SELECT count(*) FROM dead_letter")
    assert isinstance(number, int)
    return number
