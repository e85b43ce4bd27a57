"""`meterfall cache acknowledge`: who has dealt with a Redis that lost its data, when and why."""

from __future__ import annotations

from redis import Redis

from config.settings import Settings
from tests.support.commands import Meterfall
from tests.support.resources import worker_resources


def test_the_command_says_who_when_and_why(settings: Settings, redis: Redis, meterfall: Meterfall) -> None:
    with worker_resources(settings) as resources:
        resources.claim()
    redis.flushdb()
    shown = meterfall("health")
    assert "degraded redis_emptied: Redis was found empty at" in shown.out
    assert meterfall("cache", "acknowledge").code == 2, "a reason is wanted"
    refused = meterfall("cache", "acknowledge", "--reason", "x" * 300)
    assert (refused.code, "reason" in refused.err) == (2, True)
    (row,) = meterfall.done("cache", "acknowledge", "--by", "jane", "--reason", "sent again", "--json")
    assert (row["found"], row["acknowledged_by"], row["reason"]) == ("empty", "jane", "sent again")
    assert "0 losses of Redis acknowledged" in meterfall.done("cache", "acknowledge", "--reason", "again")
    assert "redis_emptied" not in meterfall("health").out
