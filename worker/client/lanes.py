"""How the commands of one event loop travel: those of one turn of the loop in one write, on one connection.

While a batch is under way the next one gathers, so the more calls there are the less each costs, and no number of
calls runs out of connections. Every command is safe to repeat: a batch whose connection is lost is sent again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import redis.asyncio
from redis import exceptions as redis_errors

from worker.client.effects import logger
from worker.keyspace.connection import pack_command

# Requests of one write: enough to make its cost small, few enough that the first reply does not wait for long.
_BATCH_REQUESTS = 256
_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 0.2


class Request(NamedTuple):
    """Commands that go together, as bytes, and who gets their replies, or the error with which all of them failed.

    One that `records` fails also if the confirmation of its batch does.
    """

    packed: bytes
    replies: int
    deliver: Callable[[list[Any] | Exception], None]
    records: bool = False


def request_of(
    commands: Sequence[tuple[Any, ...]], deliver: Callable[[list[Any] | Exception], None], *, records: bool = False
) -> Request:
    """Make a request. Raises RedisError or UnicodeError for an argument that cannot travel."""
    return Request(b"".join(map(pack_command, commands)), len(commands), deliver, records)


# What waits for replicas after the requests of a batch, and tells from its replies why they are not confirmed.
Confirmation = tuple[Sequence[tuple[Any, ...]], Callable[[list[Any]], Exception | None]]


class Lane:
    """One connection of one event loop, and the commands that wait for it. Not for use by several threads."""

    def __init__(
        self,
        pool: redis.asyncio.ConnectionPool,
        timeout_seconds: float,
        retries: int,
        confirmation: Confirmation | None = None,
    ) -> None:
        """Connects to nothing yet. A batch takes at most `timeout_seconds`, connecting and its retries included.

        A batch with a request that records has a `confirmation` at its end: one for all of them.
        """
        self._pool = pool
        commands, self._failure_in = confirmation or ((), lambda _: None)
        self._confirmation, self._confirming = b"".join(map(pack_command, commands)), len(commands)
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._connection: Any = None
        self._waiting: deque[Request] = deque()
        self._under_way: list[Request] = []
        self._sender: asyncio.Task[None] | None = None
        self._closed = False

    def send(self, request: Request) -> None:
        """Send commands after those that wait already. Their replies are delivered in a later turn of the loop."""
        self._waiting.append(request)
        self._start()

    async def close(self) -> None:
        """Give the connection back. What is not confirmed by now fails: nobody would send it any more."""
        self._closed = True
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait([self._sender])
        # Over TLS both ends say goodbye: a loop that ended before would leave its transport open.
        await self._disconnect(nowait=False)
        self._fail([*self._under_way, *self._waiting], redis_errors.ConnectionError("the client was closed"))

    def _start(self) -> None:
        """See that a task sends. It begins in the next turn of the loop, when the other calls of this turn are there.

        When a loop ends, it cancels all tasks: then what was under way is sent anew, as long as the loop runs.
        """
        if self._sender is None and not self._closed and (self._waiting or self._under_way):
            self._sender = asyncio.get_running_loop().create_task(self._send_all())
            self._sender.add_done_callback(self._ended)

    def _ended(self, sender: asyncio.Task[None]) -> None:
        self._sender = None
        if not sender.cancelled() and (error := sender.exception()) is not None:
            logger.error("a reply of Redis was not delivered: %r", error)
        self._start()  # commands that came after it had looked, or that it was cancelled over

    def resume(self) -> None:
        """Go on after the loop has cancelled all tasks."""
        self._start()

    async def _send_all(self) -> None:
        while self._under_way or self._waiting:
            while self._waiting and len(self._under_way) < _BATCH_REQUESTS:
                self._under_way.append(self._waiting.popleft())
            replies = await self._exchange(self._under_way)
            delivered, self._under_way = self._under_way, []
            if isinstance(replies, Exception):
                # Those that came meanwhile have waited as long: they fail with it, and whoever comes next tries anew.
                self._fail([*delivered, *self._waiting], replies)
                continue
            at = 0
            unconfirmed = self._failure_in(replies[-self._confirming :]) if self._confirms(delivered) else None
            for request in delivered:
                found = replies[at : at + request.replies]
                at += request.replies
                is_refusal = unconfirmed is not None and request.replies == 1 and isinstance(found[0], Exception)
                # A single command that failed did nothing that could be confirmed.
                request.deliver(found if unconfirmed is None or is_refusal or not request.records else unconfirmed)

    def _confirms(self, requests: Sequence[Request]) -> bool:
        """True if the batch of these requests has a confirmation at its end."""
        return bool(self._confirming) and any(request.records for request in requests)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """Tell these requests, and all that wait, that they failed."""
        self._under_way = []
        self._waiting.clear()
        for request in requests:
            request.deliver(error)

    async def _exchange(self, requests: Sequence[Request]) -> list[Any] | Exception:
        """The replies of a batch, errors of single commands among them; or the error with which no reply came."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                for lost in range(self._retries + 1):
                    try:
                        return await self._replies(requests)
                    except (redis_errors.ConnectionError, redis_errors.ReadOnlyError, OSError):
                        await self._disconnect()
                        if lost == self._retries:
                            raise
                        await asyncio.sleep(min(_FIRST_PAUSE_SECONDS * 2**lost, _LONGEST_PAUSE_SECONDS))
        except TimeoutError:
            await self._disconnect()
            return redis_errors.TimeoutError(f"no reply within {self._timeout_seconds * 1_000:.0f} ms")
        except OSError as error:
            return redis_errors.ConnectionError(str(error))
        except Exception as error:  # noqa: BLE001 - every caller must hear of it, and the connection cannot be trusted
            await self._disconnect()
            return error
        raise AssertionError("a batch has neither replies nor an error")

    async def _replies(self, requests: Sequence[Request]) -> list[Any]:
        """Send a batch and read its replies in order. Whoever interrupts this must disconnect."""
        if self._connection is None:
            self._connection = self._pool.make_connection()
        connection = self._connection
        try:
            await connection.connect()
            packed, count = b"".join(each.packed for each in requests), sum(each.replies for each in requests)
            if self._confirms(requests):
                packed, count = packed + self._confirmation, count + self._confirming
            await connection.send_packed_command(packed, check_health=False)
            replies: list[Any] = []
            for _ in range(count):
                try:
                    replies.append(await connection.read_response())
                except redis_errors.ResponseError as error:
                    replies.append(error)
        except asyncio.CancelledError:
            await self._disconnect()
            raise
        for reply in replies:
            # A primary that became a replica keeps its connections: whoever connects anew may find its successor.
            if isinstance(reply, redis_errors.ReadOnlyError):
                raise reply
        return replies

    async def _disconnect(self, *, nowait: bool = True) -> None:
        """Drop the connection: what is still to come on it belongs to nobody. Without `nowait`, until it is closed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(redis_errors.RedisError, OSError):
                await connection.disconnect(nowait=nowait)
