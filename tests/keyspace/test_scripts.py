"""Scripts that Redis forgets between two commands: each call still runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis
from redis.client import Pipeline as RedisPipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError

from worker.client.effects import Command, Pipeline, run_scripts
from worker.demo.servers import Server
from worker.keyspace import calls, scripts
from worker.keyspace.keys import AccountKeys, Partition


def event_of(user: str, number: int) -> scripts.Call:
    """A call that appends one event to the partition of this number."""
    account = AccountKeys(Partition(number), user)
    return calls.emit([calls.MarkedEvent(account, "credits", None, "e1", 7, 7, b"{}", "")])


@pytest.fixture
def redis(own_redis: Server) -> Iterator[Redis]:
    """An empty Redis that no other test uses."""
    with Redis.from_url(own_redis.url) as client:
        client.flushdb()
        client.script_flush()
        yield client
        client.flushdb()


def test_calls_run_though_redis_forgets_scripts_again_and_again(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    execute, evalsha = RedisPipeline.execute, Redis.evalsha

    def forgetting(self: Any, *args: Any, **named: Any) -> Any:
        redis.script_flush()
        return execute(self, *args, **named)

    def forgetting_once_more(self: Any, *args: Any) -> Any:
        if not isinstance(self, RedisPipeline):
            redis.script_flush()
        return evalsha(self, *args)

    monkeypatch.setattr(RedisPipeline, "execute", forgetting)
    monkeypatch.setattr(Redis, "evalsha", forgetting_once_more)
    requests = [event_of("u1", 0), calls.check(AccountKeys(Partition(0), "u1"), "credits", 1, []), event_of("u2", 1)]
    assert scripts.run_all(redis, requests) == [1, [b"load"], 1]
    for number, user in enumerate(("u1", "u2")):
        account = AccountKeys(Partition(number), user)
        assert redis.xlen(account.partition.entries) == 1
        assert redis.hgetall(account.pending("credits")) == {b"e:e1": b"7", b"total": b"7"}


def test_a_client_sends_again_what_redis_forgot_between_load_and_call() -> None:
    requests = [event_of("u1", 0), event_of("u2", 1), event_of("u3", 2)]
    steps = run_scripts(requests)
    assert isinstance(next(steps), Pipeline)
    forgotten = NoScriptError("No matching script")
    again = steps.send([b"sha", 1, forgotten, forgotten])
    assert isinstance(again, Command)
    assert again.args[0] == "EVALSHA"
    again = steps.throw(NoScriptError("No matching script"))
    assert isinstance(again, Command)
    assert again.args[:2] == ("EVAL", requests[1].script.text)
    assert isinstance(steps.send(0), Command)
    lost = RedisConnectionError("lost")
    with pytest.raises(StopIteration) as done:
        steps.throw(lost)
    assert done.value.value == [1, 0, lost]
