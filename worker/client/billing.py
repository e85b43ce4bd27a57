"""The client for services: `Billing`, and `AsyncBilling` for asyncio. Needs redis and pydantic only.

    billing = Billing.connect()
    with billing.reserve("user-42", "premium_voice", 1_840, key="job-7f3") as hold:
        audio = synthesize(text)
        hold.settle(len(text), dimensions={"voice_slug": "narrator"})

What the calls mean is in worker/client/preflight.py and worker/client/sponsorship.py; what they do where Redis does not
confirm an event, in worker/client/spooling.py. Here is only how their steps are carried out: `Billing` waits,
`AsyncBilling` awaits, and everything else is shared.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakMethod, ref

from redis.exceptions import NoPermissionError, RedisError

from config.catalogue import catalogue_of
from config.settings import Settings, SettingsError, load_settings, without_secrets
from worker.client import preflight, sponsorship, spooling
from worker.client import recording as client_recording
from worker.client.awaiting import LoopClient
from worker.client.effects import (
    Ask,
    AskHost,
    AskSpool,
    Busy,
    Command,
    Effect,
    Effects,
    LoadTurn,
    Pause,
    Pipeline,
    Send,
    T,
)
from worker.client.holds import awaiting_hold, blocking_hold
from worker.client.lines import Lines
from worker.client.methods import awaiting, blocking
from worker.client.sending import Sender
from worker.client.session import Context, Counters, Running, TrustSource, UndoAll, forget_the_parent
from worker.client.turns import ThreadTurns
from worker.client.waiting import Way, carry_out, replies_to
from worker.errors import (
    BillingError,
    ClientClosed,
    LedgerUnavailable,
    PartitionMismatch,
    RedisUnavailable,
    SpoolUnavailable,
    WrongRedis,
)
from worker.keyspace import keys
from worker.keyspace.connection import connect_service, service_pool

if TYPE_CHECKING:
    from worker.client.ledger import LedgerView
    from worker.client.spool_file import Spool


# True in a service that installed the client alone: there this package is `meterfall.client`.
_IN_THE_WHEEL = __name__.startswith("meterfall.")

# What a child of a fork has from its parent: never used, never closed, because the parent still uses it.
_inherited: list[object] = []


class _Client:
    """What both clients are made of. Connects to nothing before the first call."""

    def __init__(self, settings: Settings, trust: TrustSource | None = None) -> None:
        catalogue = catalogue_of(settings)
        self.context = Context(settings, catalogue, trust)
        self._context = self.context
        self._ledger: LedgerView | None = None
        self._ledger_opening = Lock()
        self._spool = _spool_of(settings)
        self._sender = Sender(self.context, self._answer)
        self._closed = False
        _heirs.add(WeakMethod(self._begin_anew, _heirs.discard))

    @classmethod
    def connect(
        cls, settings: Settings | None = None, *, trust: TrustSource | None = None, check: bool = False
    ) -> Self:
        """A client from `settings`, or from the environment. Raises SettingsError or CatalogueError.

        A spool that does not work in this Python is a SettingsError. `trust` says how far users are trusted, where
        the host knows better than their accounts. With `check` it asks Redis once, and waits for that: raises
        WrongRedis, PartitionMismatch or RedisUnavailable.
        """
        made = cls(settings or load_settings(os.environ), trust)
        if check:
            made._check_redis()
        return made

    def __repr__(self) -> str:
        """Where it connects to, without passwords."""
        state = " closed" if self._closed else ""
        return f"<{type(self).__name__} {without_secrets(self.context.settings.redis_url)}{state}>"

    @property
    def counters(self) -> Counters:
        """What happened in this client that its service may want to watch, up to now."""
        return replace(self.context.counters)

    def _check_redis(self) -> None:
        """Ask Redis whether it takes our settings."""
        settings = self.context.settings
        with connect_service(settings, settings.redis_check_timeout_ms) as redis:
            try:
                written = redis.get(keys.PARTITION_COUNT)
            except NoPermissionError as error:
                raise WrongRedis(str(error)) from error
            except RedisError as error:
                found = self.context.met(error)
                raise found if isinstance(found, BillingError) else RedisUnavailable(str(error)) from error
        if written is not None and int(written) != settings.partitions:
            raise PartitionMismatch(int(written), settings.partitions)

    def _begin(self, steps: Effects[T]) -> Running[T]:
        """The operation, up to its first step."""
        if self._closed:
            raise ClientClosed
        return Running(self.context, steps)

    def _answer(self, step: Effect) -> Any:
        """Answer a question to the ledger, the host or the spool, or wake who sends it; waits for the answer."""
        if isinstance(step, Ask):
            return self._ask(step)
        if isinstance(step, AskHost):
            return step.question()
        if isinstance(step, Send):
            return self._sender.wake()
        assert isinstance(step, AskSpool)
        return self._ask_spool(step)

    def _ask(self, step: Ask) -> Any:
        """Answer a question to the ledger, which the first one opens. Raises LedgerUnavailable."""
        with self._ledger_opening:
            if self._ledger is None:
                self._ledger = _open_ledger(self.context)
        return step.question(self._ledger)

    def _ask_spool(self, step: AskSpool) -> Any:
        """Answer a question to the spool. Raises SpoolUnavailable."""
        if self._spool is None:
            raise SpoolUnavailable("METERFALL_SPOOL_PATH", "unset")
        return step.question(self._spool)

    def _begin_anew(self) -> None:
        """In a child after a fork: leave everything that is connected to the parent."""
        _inherited.append(self._ledger)
        self._ledger = None
        self._ledger_opening = Lock()
        self._spool = _spool_of(self.context.settings)
        self._sender = Sender(self.context, self._answer)
        self.context.share()


# What every client of this process does in a child after a fork.
_heirs: set[WeakMethod[Callable[[], None]]] = set()


def _after_fork() -> None:
    forget_the_parent()
    for heir in list(_heirs):
        if (begin_anew := heir()) is not None:
            begin_anew()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_after_fork)


def _open_ledger(context: Context) -> LedgerView:
    """The way to Postgres. Imports SQLAlchemy and psycopg only now: a producer may do without them.

    Raises LedgerUnavailable. If a package is missing, the message says what to install.
    """
    try:
        from worker.client.ledger import LedgerView
    except ImportError as error:
        needed = "'meterfall-client[ledger]'" if _IN_THE_WHEEL else "sqlalchemy 'psycopg[binary]'"
        message = f"this answer comes from Postgres, and a package for that is missing ({error}): pip install {needed}"
        raise LedgerUnavailable(message) from error
    return LedgerView(context.settings, context.catalogue)


def _spool_of(settings: Settings) -> Spool | None:
    """The spool, if one is set. Imports what locks its file only now: Windows lacks that. Raises SettingsError."""
    if settings.spool_path is None:
        return None
    try:
        from worker.client.spool_file import Spool
    except ImportError as error:
        raise SettingsError(f"METERFALL_SPOOL_PATH: a spool does not work in this Python ({error})") from error
    return Spool(settings.spool_path, settings.spool_max_bytes)


class _Permit:
    """The right of a call to use a connection.

    A call that is interrupted just as it takes or gives back its permit drops it; in its place there is a new one.
    """

    __slots__ = ("_permits",)

    def __init__(self, permits: ref[SimpleQueue[_Permit]]) -> None:
        self._permits = permits

    def __del__(self) -> None:
        permits = self._permits()
        if permits is not None:  # else the client is gone
            permits.put(_Permit(self._permits))


class Billing(_Client):
    """Pre-flight checks and events, blocking. Safe to share between threads, and to use on after a fork.

    What a signal handler raises may interrupt a call anywhere. A hold that its caller did not receive is released, by
    one short try; calls that record may be repeated.
    """

    def __init__(self, settings: Settings, trust: TrustSource | None = None) -> None:
        super().__init__(settings, trust)
        self._connect()

    def _connect(self) -> None:
        settings = self.context.settings
        self.redis = connect_service(settings, settings.redis_socket_timeout_ms)
        self._asking: Way = Lines(service_pool(settings, settings.redis_check_timeout_ms))
        self._recording: Way = Lines(self.redis.connection_pool)
        # One permit for each connection. A semaphore takes many times as long, for each call.
        self._permits: SimpleQueue[_Permit] = SimpleQueue()
        for _ in range(settings.client_connections):
            self._permits.put(_Permit(ref(self._permits)))
        self._turns = ThreadTurns(self.context.ledger_connections, settings.load_wait_ms / 1_000)

    def _begin_anew(self) -> None:
        super()._begin_anew()
        _inherited.extend((self.redis, self._asking, self._recording))
        self._connect()

    check = blocking(preflight.check)
    remaining = blocking(preflight.remaining)
    plan_backend = blocking(preflight.plan_backend)
    reserve = blocking_hold(preflight.reserve)
    extend = blocking(preflight.extend)
    emit = blocking(spooling.emit)
    emit_events = blocking(spooling.emit_events)
    capture = blocking(spooling.capture)
    settle = blocking(spooling.settle)
    release = blocking(spooling.release)
    charge = blocking(client_recording.charge)
    estimate = blocking(sponsorship.estimate)
    decide = blocking(sponsorship.decide)
    confirm_partial = blocking(sponsorship.confirm_partial)
    settle_sponsored = blocking(sponsorship.settle_sponsored)
    release_sponsored = blocking(sponsorship.release_sponsored)
    credit_pool = blocking(spooling.credit_pool)
    send_spooled = blocking(spooling.send)

    def run(self, steps: Effects[T]) -> T:
        """Carry out the steps of one operation and return its answer."""
        return carry_out(self._begin(steps), self._perform)

    _run = run

    def _perform(self, step: Effect) -> Any:
        if isinstance(step, (Command, Pipeline)):
            return self._send(step)
        if isinstance(step, LoadTurn):
            return self._turns.take(step)
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        return self._answer(step)

    def _send(self, step: Command | Pipeline) -> Any:
        breaker = self.context.breaker
        if step.short and not breaker.lets_through():
            raise breaker.error()
        try:
            permit = self._permits.get(timeout=self.context.settings.client_wait_ms / 1_000)
        except Empty:
            self.context.counters.busy += 1
            raise Busy(
                f"all {self.context.settings.client_connections} connections of this process are in use"
            ) from None
        try:
            return replies_to(step, self._asking if step.short else self._recording, self.context)
        finally:
            self._permits.put(permit)
            del permit  # a traceback that somebody keeps has this frame

    def close(self) -> None:
        """Give the connections back. Calls after this raise ClientClosed.

        If this client is sending a spool, it goes on for at most `METERFALL_REDIS_SOCKET_TIMEOUT_MS`, unless Redis is
        away.
        """
        self._closed = True
        self._sender.close(self.context.settings.redis_socket_timeout_ms / 1_000)
        self.redis.close()
        self._asking.close()
        self._recording.close()
        if self._ledger is not None:
            self._ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncBilling(_Client):
    """Pre-flight checks and events for asyncio, on any number of event loops, and after a fork.

    Calls of one turn of a loop travel in one write. Questions to the ledger, the host and the spool run in threads of
    its own. A call whose task is cancelled still runs to its end; a hold that its task did not receive is released.
    """

    def __init__(self, settings: Settings, trust: TrustSource | None = None) -> None:
        super().__init__(settings, trust)
        self._start()

    def _start(self) -> None:
        # As many as there are connections to Postgres, and one for the host; the spool waits for none of them.
        threads = self.context.ledger_connections + 1
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="meterfall")
        self._spool_executor = ThreadPoolExecutor(1, thread_name_prefix="meterfall-spool")
        self._loops: dict[asyncio.AbstractEventLoop, LoopClient] = {}

    def _begin_anew(self) -> None:
        super()._begin_anew()
        _inherited.extend((self._executor, self._spool_executor, *self._loops.values()))
        self._start()

    check = awaiting(preflight.check, may_leave=True)
    remaining = awaiting(preflight.remaining, may_leave=True)
    plan_backend = awaiting(preflight.plan_backend, may_leave=True)
    reserve = awaiting_hold(preflight.reserve)
    extend = awaiting(preflight.extend)
    emit = awaiting(spooling.emit)
    emit_events = awaiting(spooling.emit_events)
    capture = awaiting(spooling.capture)
    settle = awaiting(spooling.settle)
    release = awaiting(spooling.release)
    charge = awaiting(client_recording.charge)
    estimate = awaiting(sponsorship.estimate, may_leave=True)
    decide = awaiting(sponsorship.decide, undo=sponsorship.give_back)
    confirm_partial = awaiting(sponsorship.confirm_partial, undo=sponsorship.give_back)
    settle_sponsored = awaiting(sponsorship.settle_sponsored)
    release_sponsored = awaiting(sponsorship.release_sponsored)
    credit_pool = awaiting(spooling.credit_pool)
    send_spooled = awaiting(spooling.send)

    async def run(self, steps: Effects[T], *, undo: UndoAll | None = None, may_leave: bool = False) -> T:
        """Carry out the steps of one operation and return its answer.

        If the caller is cancelled, the operation runs to its end, and `undo` makes the steps that undo it. The
        caller waits for that, at most a second, unless it `may_leave`.
        """
        running = self._begin(steps)
        return await self._here().run(running, undo, may_leave=may_leave)

    _run = run

    def _here(self) -> LoopClient:
        """What this client has on the running loop."""
        loop = asyncio.get_running_loop()
        here = self._loops.get(loop)
        if here is None:
            self._forget_closed_loops()
            forget = partial(self._loops.pop, loop, None)
            here = LoopClient(self.context, self._executor, self._spool_executor, self._answer, forget)
            self._loops[loop] = here
        return here

    def _forget_closed_loops(self) -> None:
        """Let go of loops that were closed without the end of an `asyncio.run`; Python then closes their sockets."""
        for loop in list(self._loops):
            if loop.is_closed():
                self._loops.pop(loop, None)

    async def close(self) -> None:
        """Wait for calls that are under way, and give the connections back. Calls after this raise ClientClosed.

        If this client is sending a spool, it goes on for at most `METERFALL_REDIS_SOCKET_TIMEOUT_MS`, unless Redis is
        away.
        """
        self._closed = True
        here = self._loops.pop(asyncio.get_running_loop(), None)
        if here is not None:
            await here.close()
        self._forget_closed_loops()
        if not self._loops:  # else calls on other loops are under way
            await self._end_sending()
            self._executor.shutdown(wait=False)
            self._spool_executor.shutdown(wait=False)
        if self._ledger is not None:
            self._ledger.close()

    async def _end_sending(self) -> None:
        seconds = self.context.settings.redis_socket_timeout_ms / 1_000
        await asyncio.get_running_loop().run_in_executor(self._executor, self._sender.close, seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
