"""A Redis in memory: fakeredis, which runs our Lua scripts, with a clock and outages that a test decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha1
from pathlib import Path
from threading import RLock
from typing import Any, Self

from fakeredis import FakeServer, FakeStrictRedis
from redis import exceptions as redis_errors

from worker.keyspace import keys

_CLOCK = Path(__file__).with_name("clock.lua").read_text(encoding="utf-8")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class MemoryRedis(FakeStrictRedis):
    """The Redis of one fake, for any number of threads. One command runs at a time.

    It answers the doorbell itself, by a call of `on_bell` with the number of the stream.
    """

    def __init__(self, ahead: timedelta, on_bell: Callable[[int], object]) -> None:
        """`ahead`: how far its clock, and that of the whole fake, is ahead of the machine's."""
        super().__init__(server=FakeServer(version=(7,)))
        # As worker/keyspace/connection.py: these stay raw.
        for command in ("XRANGE", "HSCAN"):
            self.set_response_callback(command, lambda reply, **_: reply)
        self.one_at_a_time = RLock()
        self._ahead = ahead
        self._on_bell = on_bell
        self._texts: dict[str, str] = {}
        self._is_down = False

    def now(self) -> datetime:
        """Return the time on the clock of the fake."""
        return datetime.now(UTC) + self._ahead

    def advance(self, by: timedelta) -> None:
        """Move the clock forward, and with it the end of every key."""
        with self.one_at_a_time, self.in_reach():
            self._ahead += by
            for name in list(self.scan_iter()):
                if (left := self.pttl(name)) >= 0:
                    self.pexpire(name, left - by // _MILLISECOND)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Let each command fail, as if Redis were away, until the block ends."""
        with self.one_at_a_time:
            before, self._is_down = self._is_down, True
        try:
            yield
        finally:
            with self.one_at_a_time:
                self._is_down = before

    @contextmanager
    def in_reach(self) -> Iterator[None]:
        """Let the fake itself reach this Redis, though it is down for the service."""
        with self.one_at_a_time:
            before, self._is_down = self._is_down, False
            try:
                yield
            finally:
                self._is_down = before

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run one command. Raises the errors of redis-py."""
        with self.one_at_a_time:
            if self._is_down:
                raise redis_errors.ConnectionError("the test has this Redis down")
            match args:
                case ("RPUSH", keys.BELL, number):
                    return self._on_bell(int(number))
                case ("EVAL", text, *rest):
                    self._remember(text)
                    return self._run(text, rest, options)
                case ("EVALSHA", sha, *rest):
                    if sha not in self._texts:
                        raise redis_errors.NoScriptError("No matching script")
                    return self._run(self._texts[sha], rest, options)
                case ("TIME",):
                    return divmod((self.now() - _EPOCH) // timedelta(microseconds=1), 1_000_000)
                case ("SCRIPT", "LOAD", text):
                    return self._remember(text)
            return self._carry_out(args, options)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:  # noqa: ARG002
        """Return commands that run together."""
        return _Together(self)

    def replies(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run commands together, as those of a client travel; return the replies, errors of single ones among them."""
        with self.pipeline() as pipe:
            for command in commands:
                pipe.execute_command(*command)
            replies: list[Any] = pipe.execute(raise_on_error=False)
        return replies

    def _remember(self, text: str) -> str:
        sha = sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._texts[sha] = text
        return sha

    def _run(self, text: str, rest: list[Any], options: dict[str, Any]) -> Any:
        """Run a script under the clock of the fake. fakeredis does not know the first line, which has flags."""
        timed = f"local ahead_ms = {self._ahead // _MILLISECOND}\n{_CLOCK}{text.partition(chr(10))[2]}"
        return self._carry_out(("EVAL", timed, *rest), options)

    def _carry_out(self, command: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return super().execute_command(*command, **options)  # type: ignore[no-untyped-call]


class _Together:
    """The commands of a pipeline. They run one after the other, and nothing runs in between."""

    def __init__(self, redis: MemoryRedis) -> None:
        self._redis = redis
        self._commands: list[tuple[Any, ...]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.clear()

    def execute_command(self, *args: Any) -> None:
        """Add a command."""
        self._commands.append(args)

    def evalsha(self, *args: Any) -> None:
        """Add a script, by its hash."""
        self.execute_command("EVALSHA", *args)

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Run the commands; return the replies, with `raise_on_error=False` errors among them."""
        with self._redis.one_at_a_time:
            return [self._reply(command, raise_on_error) for command in self._commands]

    def _reply(self, command: tuple[Any, ...], raise_on_error: bool) -> Any:
        try:
            return self._redis.execute_command(*command)
        except redis_errors.ResponseError as error:
            if raise_on_error:
                raise
            return error
