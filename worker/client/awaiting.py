"""How operations run on an event loop: each by itself, whether or not its caller still waits.

Web frameworks cancel a request again and again when its client hangs up, and then every `await` of a clean-up is
cancelled. So a caller only waits for the answer of an operation. An operation that has begun runs to its end, within
the time limits of its commands. If its caller was cancelled, what the operation has set aside is given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic

from redis.exceptions import RedisError

from worker.client.effects import AskSpool, Command, Effect, Effects, LoadTurn, Pause, Pipeline, Send, T, logger
from worker.client.lanes import Lane, request_of
from worker.client.session import Context, Running, UndoAll
from worker.client.turns import LoopTurns
from worker.errors import ClientClosed, RedisUnavailable, WrongRedis
from worker.keyspace.connection import lane_pool
from worker.keyspace.replicas import failed_confirmation

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

# How long a caller that was cancelled still waits for what it began. Beyond that, it ends without its caller.
_CANCELLED_WAIT_SECONDS = 1.0


class LoopClient:
    """What a client has on one event loop: its ways to Redis, and its operations under way."""

    def __init__(
        self,
        context: Context,
        executor: Executor,
        spool_executor: Executor,
        answer: Callable[[Effect], Any],
        forget: Callable[[], object],
    ) -> None:
        """`answer` answers the questions to ledger, host and spool; it waits, and runs on the executors.

        `forget` is called once the loop has ended, or the client is closed.
        """
        self._forget = forget
        self._context = context
        self.loop = asyncio.get_running_loop()
        self.under_way: set[_Operation[Any]] = set()
        self._executor = executor
        self._spool_executor = spool_executor
        self._answer = answer
        settings = context.settings
        pool = lane_pool(settings)
        confirmation = (context.confirmation, lambda replies: failed_confirmation(replies, settings))
        self._asking = Lane(pool, settings.redis_check_timeout_ms / 1_000, settings.redis_retries, confirmation)
        self._recording = Lane(pool, settings.redis_socket_timeout_ms / 1_000, settings.redis_retries, confirmation)
        self._turns = LoopTurns(self.loop, context.ledger_connections, settings.load_wait_ms / 1_000)
        self._guard: AsyncGenerator[None, None] | None = None

    async def run(self, running: Running[T], undo: UndoAll | None, *, may_leave: bool) -> T:
        """Carry out an operation and return its answer.

        A caller that is cancelled waits a moment longer, for the end of the operation and of what undoes it; unless it
        `may_leave`, because the operation changes nothing.
        """
        if self._guard is None:
            await self._have_it_closed()
        operation = _Operation(self, running, undo)
        operation.go_on()
        try:
            return await operation.answer
        except GeneratorExit:
            operation.abandon()
            raise
        except asyncio.CancelledError:
            self._context.counters.unwaited += 1
            operation.abandon()
            if not may_leave:
                await self._wait_for([operation], _CANCELLED_WAIT_SECONDS)
            raise

    async def close(self) -> None:
        """Wait for what is under way, as long as commands may take, and give the connections back."""
        if self._guard is not None:
            await self._guard.aclose()

    async def _have_it_closed(self) -> None:
        """Have the loop call `close` before it ends, as `asyncio.run` does for the generators that it has begun."""
        self._guard = self._until_the_end()
        await anext(self._guard)

    async def _until_the_end(self) -> AsyncGenerator[None, None]:
        lanes = (self._asking, self._recording)
        try:
            yield
        finally:
            for lane in lanes:
                lane.resume()
            longest = self._context.settings.redis_socket_timeout_ms / 1_000
            deadline = self.loop.time() + longest
            while self.under_way and self.loop.time() < deadline:  # a clean-up may make one call after the other
                await self._wait_for(list(self.under_way), deadline - self.loop.time())
            if self.under_way:
                logger.warning("%s calls have not ended within %.1f s", len(self.under_way), longest)
            for lane in lanes:
                await lane.close()
            self._forget()

    async def _wait_for(self, operations: Sequence[_Operation[Any]], seconds: float) -> None:
        """Wait for the end of operations, though this is cancelled again and again."""
        deadline = self.loop.time() + seconds
        while left := [each.ended for each in operations if not each.ended.done()]:
            if self.loop.time() >= deadline:
                return
            with suppress(asyncio.CancelledError):
                await asyncio.wait(left, timeout=deadline - self.loop.time())

    def running(self, steps: Effects[T]) -> Running[T]:
        """An operation of this client, up to its first step."""
        return Running(self._context, steps)

    def perform(self, step: Effect, deliver: Callable[[Any], None]) -> None:
        """Carry out one step; `deliver` is told its result, or its error, in a later turn of the loop."""
        if isinstance(step, Command | Pipeline):
            self._send(step, deliver)
        elif isinstance(step, LoadTurn):
            self._turns.take(step, deliver)
        elif isinstance(step, Pause):
            self.loop.call_later(step.seconds, deliver, None)
        elif isinstance(step, Send) or (isinstance(step, AskSpool) and step.quick):
            self.loop.call_soon(deliver, _result(_outcome(self._answer, step)))
        else:
            executor = self._spool_executor if isinstance(step, AskSpool) else self._executor
            asked = self.loop.run_in_executor(executor, _outcome, self._answer, step)
            asked.add_done_callback(lambda future: deliver(_result_of(future)))

    def _send(self, step: Command | Pipeline, deliver: Callable[[Any], None]) -> None:
        breaker = self._context.breaker
        if step.short and not breaker.lets_through():
            self.loop.call_soon(deliver, breaker.error())
            return
        lane = self._asking if step.short else self._recording
        commands = (step.args,) if isinstance(step, Command) else step.commands
        try:
            request = request_of(commands, partial(self._delivered, step, deliver), records=step.records)
        except (RedisError, UnicodeError) as error:
            self.loop.call_soon(deliver, error)
        else:
            lane.send(request)

    def _delivered(
        self, step: Command | Pipeline, deliver: Callable[[Any], None], replies: list[Any] | Exception
    ) -> None:
        if isinstance(replies, Exception):
            deliver(self._context.met(replies))
        else:
            self._context.breaker.answered()
            deliver(replies[0] if isinstance(step, Command) else replies)


def _outcome(question: Callable[[Effect], Any], step: Effect) -> tuple[Any, Exception | None]:
    """Ask in a thread. A future cannot carry every error: not a StopIteration, nor what ends a thread."""
    try:
        return question(step), None
    except StopIteration as error:
        return None, RuntimeError(repr(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
        return None, error


def _result_of(asked: asyncio.Future[tuple[Any, Exception | None]]) -> Any:
    """Return what was answered, or the error."""
    if asked.cancelled():
        return ClientClosed()
    return _result(asked.result())


def _result(outcome: tuple[Any, Exception | None]) -> Any:
    """Return the value of an outcome, or its error."""
    value, error = outcome
    return value if error is None else error


class _Operation(Generic[T]):
    """One operation under way. Its caller waits for `answer`; at `ended` nothing is left to be done."""

    def __init__(self, home: LoopClient, running: Running[T], undo: UndoAll | None) -> None:
        self.answer: asyncio.Future[T] = home.loop.create_future()
        self.ended: asyncio.Future[None] = home.loop.create_future()
        self._home = home
        self._running: Running[Any] = running
        self._undo = undo
        home.under_way.add(self)

    def go_on(self) -> None:
        """Carry out the next step, or end with the answer."""
        if self._running.step is not None:
            try:
                self._home.perform(self._running.step, self._take)
            except RuntimeError as error:  # the executors are shut down: the client was closed meanwhile
                logger.warning("a call came to its next question after its client was closed: %s", error)
                self._home.loop.call_soon(self._take, ClientClosed())
        elif self.answer.done():
            self._give_back()
        else:
            self.answer.set_result(self._running.answer)
            self._end()

    def abandon(self) -> None:
        """The caller was cancelled; perhaps just when there was an answer, which then nobody has received."""
        if not self.answer.done():
            self.answer.cancel()
        if self.answer.cancelled():
            return
        if (error := self.answer.exception()) is not None:
            self._lose(error)
            return
        self.ended = self._home.loop.create_future()
        self._home.under_way.add(self)
        self._give_back()

    def _take(self, result: Any) -> None:
        """Go on with the result of the step, or with its error."""
        try:
            if isinstance(result, Exception):
                self._running.fail(result)
            else:
                self._running.succeed(result)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
            if self.answer.done():
                self._lose(error)
            else:
                self.answer.set_exception(error)
            self._end()
        else:
            self.go_on()

    def _give_back(self) -> None:
        """Undo what has ended without a receiver: this operation goes on with the steps of that."""
        undo, self._undo = self._undo, None
        steps = None if undo is None else undo(self._running)
        if steps is None:
            self._end()
        else:
            self._running = self._home.running(steps)
            self.go_on()

    def _lose(self, error: BaseException) -> None:
        """Say what nobody is told by an exception any more."""
        events = [event.event_id for event in error.events] if isinstance(error, RedisUnavailable | WrongRedis) else []
        logger.warning("a call whose caller was cancelled failed: %s%s", error, f" {events}" if events else "")

    def _end(self) -> None:
        self._home.under_way.discard(self)
        if not self.ended.done():
            self.ended.set_result(None)
