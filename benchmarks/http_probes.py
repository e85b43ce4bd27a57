"""Measuring processes for the HTTP service: `python -m benchmarks.http_probes NAME ARGUMENTS`.

They work as those of benchmarks/probes.py do. The load takes the processors of the same machine: requests are made
before the clock starts, and of responses only the status and the length are read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle
from time import perf_counter

from benchmarks.probes import CALLS_A_BLOCK, Result, main, say_ready, timed
from worker.client import Billing


class Caller:
    """One connection to the service, kept alive. Use one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Caller:
        """Connect to a port of loopback."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes) -> float:
        """Send a request and read its response; return the time that took, in microseconds.

        Raises RuntimeError unless it succeeded.
        """
        began = perf_counter()
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        status, fields = head.split(b"\r\n", 1)
        length = next(line for line in fields.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        body = await self._reader.readexactly(int(length.partition(b":")[2]))
        if b" 20" not in status:
            raise RuntimeError(f"{status.decode()}: {body[:200].decode()}")
        return (perf_counter() - began) * 1e6

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


def request_of(path: str, key: str, body: object) -> bytes:
    """Return a POST with an API key and a body as JSON."""
    text = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


def _checks(panel: Sequence[str], meter: str, key: str) -> list[bytes]:
    return [request_of("/v1/check", key, {"user_id": user_id, "meter": meter, "amount": 1}) for user_id in panel]


def one_caller(port: int, key: str, requests: int, panel: Sequence[str], meter: str) -> Result:
    """Measure latencies of `POST /v1/check` on one connection, and of the sync client's `check`, in turns."""
    found: dict[str, list[float]] = {"http": [], "client": []}
    checks = cycle(_checks(panel, meter, key))

    async def ask(caller: Caller, number: int) -> None:
        found["http"] += [await caller.ask(next(checks)) for _ in range(number)]

    with Billing.connect() as billing, asyncio.Runner() as runner:
        caller = runner.run(Caller.connect(port))
        for user_id in panel:
            billing.check(user_id, meter, 1)
        runner.run(ask(caller, len(panel)))
        found["http"].clear()
        say_ready()
        for start in range(0, requests, CALLS_A_BLOCK):
            block = range(start, min(start + CALLS_A_BLOCK, requests))
            found["client"].extend(timed(lambda at: billing.check(panel[at % len(panel)], meter, 1), block))
            runner.run(ask(caller, len(block)))
        caller.close()
    return dict(found)


def many_callers(
    port: int, key: str, callers: int, per_second: float, seconds: float, panel: Sequence[str], meter: str
) -> Result:
    """Measure latencies of `POST /v1/check` from `callers` connections that ask `per_second` times together.

    Each asks at its own moments. One that is late asks at once: the latency counts from the moment that was due.
    """
    checks = cycle(_checks(panel, meter, key))
    pause = callers / per_second

    async def ask(caller: Caller, first: float, stop_at: float) -> list[float]:
        found = []
        for due in _moments(first, pause, stop_at):
            await asyncio.sleep(max(0.0, due - perf_counter()))
            late = max(0.0, perf_counter() - due) * 1e6
            found.append(late + await caller.ask(next(checks)))
        return found

    async def ask_all() -> list[float]:
        opened = [await Caller.connect(port) for _ in range(callers)]
        for caller in opened:
            await caller.ask(next(checks))
        say_ready()
        began = perf_counter()
        found = await asyncio.gather(
            *(ask(each, began + at * pause / callers, began + seconds) for at, each in enumerate(opened))
        )
        for caller in opened:
            caller.close()
        return [latency for of_caller in found for latency in of_caller]

    return {"http": asyncio.run(ask_all())}


def _moments(first: float, pause: float, stop_at: float) -> Iterator[float]:
    for number in count():
        due = first + number * pause
        if due >= stop_at:
            return
        yield due


def batches(
    port: int, key: str, events: int, size: int, callers: int, panel: Sequence[str], meter: str, run: str
) -> Result:
    """Measure the seconds of `events` events by `POST /v1/events` in batches of `size`, from `callers` connections."""
    users = cycle(panel)
    made = [
        request_of(
            "/v1/events",
            key,
            [
                {"event_id": f"{run}-{at}", "user_id": next(users), "meter": meter, "quantity": 5}
                for at in range(start, min(start + size, events))
            ],
        )
        for start in range(0, events, size)
    ]

    async def send() -> float:
        opened = [await Caller.connect(port) for _ in range(callers)]
        left = iter(made)

        async def take(caller: Caller) -> None:
            for request in left:
                await caller.ask(request)

        say_ready()
        began = perf_counter()
        await asyncio.gather(*map(take, opened))
        taken = perf_counter() - began
        for caller in opened:
            caller.close()
        return taken

    return {"seconds": asyncio.run(send())}


PROBES: dict[str, Callable[..., Result | None]] = {
    "one_caller": one_caller,
    "many_callers": many_callers,
    "batches": batches,
}


if __name__ == "__main__":
    main(PROBES)
