"""How operations run by waiting: a thread carries out one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis import Redis
from redis.exceptions import ReadOnlyError, RedisError

from worker.client.effects import Command, Effect, Pipeline, T
from worker.client.session import Context, Running


def carry_out(running: Running[T], perform: Callable[[Effect], Any]) -> T:
    """Carry out the steps of an operation and return its answer."""
    while running.step is not None:
        try:
            result = perform(running.step)
        except BaseException as error:  # noqa: BLE001 - the operation gives back what it has taken, and raises it
            running.fail(error)
        else:
            running.succeed(result)
    return running.answer


def replies_to(step: Command | Pipeline, redis: Redis, context: Context) -> Any:
    """Send one command, or several together; returns the result of the step. Raises what a failure means for a call."""
    try:
        found = redis.execute_command(*step.args) if isinstance(step, Command) else _pipelined(redis, step)
    except RedisError as error:
        if (found := context.met(error)) is error:
            raise
        raise found from error
    context.breaker.answered()
    return found


def _pipelined(redis: Redis, step: Pipeline) -> list[Any]:
    """Send commands together; returns the replies, errors among them."""
    with redis.pipeline(transaction=False) as pipe:
        for command in step.commands:
            pipe.execute_command(*command)
        replies: list[Any] = pipe.execute(raise_on_error=False)
    # A primary that became a replica keeps its connections, and new ones may find its successor. For single commands
    # redis-py connects anew by itself.
    if any(isinstance(reply, ReadOnlyError) for reply in replies):
        redis.connection_pool.disconnect(inuse_connections=False)
    return replies
