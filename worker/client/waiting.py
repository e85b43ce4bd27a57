"""How operations run by waiting: a thread carries out one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from redis.exceptions import RedisError

from worker.client.effects import Command, Effect, Effects, Pipeline, T, logger
from worker.client.session import Context, Running
from worker.errors import BillingError
from worker.keyspace.replicas import failed_confirmation


def carry_out(running: Running[T], perform: Callable[[Effect], Any]) -> T:
    """Carry out the steps of an operation and return its answer.

    A signal may raise anything between any two lines: time limits of job queues do, and `^C`. Then the operation gives
    back what it has taken, and a hold that its caller has not received is given back, by one try.
    """
    try:
        while running.step is not None:
            try:
                result = perform(running.step)
            except BaseException as error:  # noqa: BLE001 - the operation gives back what it has taken, and raises it
                running.fail(error)
            else:
                running.succeed(result)
        return running.answer
    except BaseException as error:
        running.close()
        if not isinstance(error, BillingError | RedisError) and running.undo is not None:
            _undo(running.undo(), running.context, perform)
        raise


def _undo(steps: Effects[Any], context: Context, perform: Callable[[Effect], Any]) -> None:
    """Give back what an interrupted call may have set aside. It waits for Redis as shortly as a check."""

    def perform_shortly(step: Effect) -> Any:
        return perform(step._replace(short=True) if isinstance(step, Command) else step)

    try:
        carry_out(Running(context, steps), perform_shortly)
    except Exception as error:  # noqa: BLE001 - what interrupted the call goes first
        logger.warning("an interrupted call may have left a hold, which expires: %s", error)


class Way(Protocol):
    """What commands travel by."""

    def replies(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands together; return their replies in order, errors of single commands among them."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


def replies_to(step: Command | Pipeline, way: Way, context: Context) -> Any:
    """Send one command, or several together; returns the result of the step. Raises what a failure means for a call."""
    try:
        if step.records and context.confirmation:
            found: Any = _confirmed_by_replicas(step, way, context)
        elif isinstance(step, Pipeline):
            found = way.replies(step.commands)
        elif isinstance(found := way.replies((step.args,))[0], Exception):
            raise found
    except RedisError as error:
        if (failure := context.met(error)) is error:
            raise
        raise failure from error
    context.breaker.answered()
    return found


def _confirmed_by_replicas(step: Command | Pipeline, way: Way, context: Context) -> Any:
    """Send commands that record, and wait for replicas in the same round trip. Raises TooFewReplicas."""
    commands = step.commands if isinstance(step, Pipeline) else (step.args,)
    replies = way.replies((*commands, *context.confirmation))
    found, confirmed = replies[: len(commands)], replies[len(commands) :]
    if isinstance(step, Command) and isinstance(found[0], Exception):
        raise found[0]  # it did nothing that could be confirmed
    if (failure := failed_confirmation(confirmed, context.settings)) is not None:
        raise failure
    return found if isinstance(step, Pipeline) else found[0]
