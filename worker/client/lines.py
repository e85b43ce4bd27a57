"""How the commands of threads travel: each caller has a connection of its own while its commands take.

The connections are redis-py's. Its client adds a pool, counters and a look at the socket to each command, which takes
longer than the command itself. Every command is safe to repeat: one whose connection was lost is sent again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Connection, ConnectionPool
from redis import exceptions as redis_errors

from worker.keyspace.connection import pack_command


class Lines:
    """Connections to one server. Threads may share it; after a fork, a child makes its own."""

    def __init__(self, pool: ConnectionPool) -> None:
        """Connects to nothing yet. `pool` says how; its own connections are not used."""
        self._pool = pool
        # The one given back last goes first. A list adds and takes in one step, so that it needs no lock.
        self._idle: list[Connection] = []
        self._closed = False

    def replies(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands together; return their replies in order, errors of single commands among them.

        Raises RedisError if no reply came: after the retries of the connection, or at once after a time-out. Raises
        UnicodeError for an argument that cannot travel; then nothing was sent.
        """
        packed = b"".join(map(pack_command, commands))
        try:
            connection = self._idle.pop()
        except IndexError:
            return self._on_a_new_one(packed, len(commands))
        try:
            return self._exchange(connection, packed, len(commands))
        except (redis_errors.ConnectionError, redis_errors.ReadOnlyError):
            # The server may have closed it long ago, as it lay idle, so this is no retry yet.
            return self._on_a_new_one(packed, len(commands))

    def close(self) -> None:
        """Close the connections: at once, or as soon as their callers have their replies."""
        self._closed = True
        while self._idle:
            self._idle.pop().disconnect()

    def _on_a_new_one(self, packed: bytes, count: int) -> list[Any]:
        connection: Connection = self._pool.connection_class(**self._pool.connection_kwargs)
        connection.connect()
        replies: list[Any] = connection.retry.call_with_retry(
            lambda: self._exchange(connection, packed, count), lambda _: connection.disconnect()
        )
        return replies

    def _exchange(self, connection: Connection, packed: bytes, count: int) -> list[Any]:
        """Send, read, give the connection back. Interrupted in between, it is closed: a reply may be on its way."""
        try:
            connection.send_packed_command((packed,))
            replies = [_reply_on(connection) for _ in range(count)]
            for reply in replies:
                # A primary that became a replica keeps its connections: whoever connects anew may find its successor.
                if isinstance(reply, redis_errors.ReadOnlyError):
                    raise reply
        except BaseException:
            connection.disconnect()
            raise
        self._idle.append(connection)
        if self._closed:
            self.close()
        return replies


def _reply_on(connection: Connection) -> Any:
    """Read the next reply, an error as well."""
    try:
        return connection.read_response()
    except redis_errors.ResponseError as error:
        return error
