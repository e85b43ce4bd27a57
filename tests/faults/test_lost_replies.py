"""Scenarios 2, 4 and 5: the server did its work, and its reply was lost."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import pytest

from schemas.events import UsageEvent
from tests.faults.house import METER, SLOW_SECONDS, House
from tests.support.proxy import Proxy
from tests.support.streams import pending_of, stream_of
from worker.client import Billing
from worker.keyspace.scripts import script


@pytest.mark.scenario(number=2)
def test_a_commit_whose_reply_is_lost_is_found_when_the_batch_is_repeated(house: House) -> None:
    with house.proxied_postgres() as (proxy, behind), house.dyno(settings=behind):
        lost = proxy.lose_reply(b"COMMIT", reply=b"COMMIT")
        house.emit(40)
        assert lost.wait(SLOW_SECONDS)
        house.wait_until_drained()
    house.prove()


@pytest.mark.scenario(number=4)
def test_an_emit_whose_reply_is_lost_is_two_entries_and_counts_once(house: House) -> None:
    (event,) = house.new_events(1)
    with house.proxied_redis() as (proxy, behind), Billing.connect(behind) as producer:
        lost = lose_reply_of(house, proxy, "emit")
        assert house.send([event], through=producer) == []
        assert lost.is_set()
    first, second = stream_of(house.redis, house.settings, event.user_id)
    assert first == second
    counted = {f"e:{event.event_id}": event.quantity, "total": event.quantity}
    assert pending_of(house.redis, house.settings, event.user_id, METER) == counted
    house.drain()
    house.prove()


@pytest.mark.scenario(number=5)
@pytest.mark.parametrize("call", ["reserve", "capture", "extend", "settle", "charge"])
def test_a_call_whose_reply_is_lost_is_done_once(house: House, call: str) -> None:
    user = house.users[0]
    with house.proxied_redis() as (proxy, behind), Billing.connect(behind) as producer:
        calls: dict[str, Callable[[], object]] = {
            "reserve": lambda: producer.reserve(user, METER, 12, "job-1"),
            "capture": lambda: producer.capture(user, METER, "job-1", "page-1", 5),
            "extend": lambda: producer.extend(user, METER, "job-1", ttl_seconds=900, amount=20),
            "settle": lambda: producer.settle(user, METER, "job-1", 6),
            "charge": lambda: producer.charge(user, METER, 7, "c1"),
        }
        for name, do in calls.items():
            lost = lose_reply_of(house, proxy, name) if name == call else None
            do()
            assert lost is None or lost.is_set()
            if name == "reserve":
                assert pending_of(house.redis, house.settings, user, METER) == {"h:job-1": 12, "total": 12}
            if name == "extend":
                held = {"h:job-1": 15, "e:page-1": 5, "total": 20}
                assert pending_of(house.redis, house.settings, user, METER) == held
    assert house.pending() == {"e:page-1": 5, "e:job-1": 6, "e:c1": 7}
    assert house.backlog() == 3
    amounts = {"page-1": 5, "job-1": 6, "c1": 7}
    house.accept(UsageEvent(event_id=name, user_id=user, meter=METER, quantity=n) for name, n in amounts.items())
    house.resend(3)
    house.drain()
    house.prove()


def lose_reply_of(house: House, proxy: Proxy, name: str) -> Event:
    """Lose the reply of the next run of a script; Redis knows its text, so no NOSCRIPT comes first."""
    house.redis.script_load(script(name).text)
    return proxy.lose_reply(script(name).sha.encode())
