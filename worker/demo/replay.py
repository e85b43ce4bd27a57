"""`meterfall replay TRACE.csv`: a recorded trace of LLM requests as load, every row billed exactly once.

A row is one request of a user, drawn by the seed, on the meter `ocr_tokens`. The size of its context is known
beforehand, so the replay reserves that many tokens; it settles context and generated tokens together. If the reserve is
denied, the replay emits the request all the same: the recorded service did serve it. Requests are dated now, because
the ledger refuses old events; the dimensions keep the recorded time.
"""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from secrets import token_hex
from threading import Event
from typing import NamedTuple

from schemas.events import Scalar
from worker.client import Billing
from worker.demo.stage import Report, Stage, Tally, open_missing, own_workers, prove, stage, wait_until_drained
from worker.demo.work import Customer, make_customers, zipf_weights
from worker.errors import BadInput, HoldClosed, UsageDenied
from worker.keyspace import keys
from worker.ledger.connection import batch_connection
from worker.ledger.proof import recorded_amounts

COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
METER = "ocr_tokens"
# No dash: it ends the run in `replay-<run>-`, so that no run's users begin like another's.
RUN_PATTERN = r"[A-Za-z0-9_.]{1,32}"
_FEEDERS = 4
# Two such numbers together stay below the largest amount of an event, 10^12.
_TOKEN_DIGITS = 11


class TraceError(BadInput):
    """The trace cannot be replayed. The message names row, column and the values allowed. Nothing was sent."""


class Row(NamedTuple):
    """One request of the trace; `number` counts from 1, after the header."""

    number: int
    at: datetime
    context_tokens: int
    generated_tokens: int


class Request(NamedTuple):
    """A row as a user's work. The same run, row, seed and number of users give the same user and event."""

    row: Row
    user_id: str
    event_id: str


def new_run(name: str | None) -> str:
    """Return the name of a run: `name`, or a new one.

    Raises TraceError for a name that cannot be part of a user id.
    """
    if name is not None and not re.fullmatch(RUN_PATTERN, name):
        raise TraceError(f"--run: must be 1 to 32 letters, digits, dots or underscores ({_got(name)})")
    return name or token_hex(3)


def read_trace(path: Path, limit: int | None = None) -> list[Row]:
    """Read and check the CSV file at `path`, at most `limit` rows. Raises TraceError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = list(csv.reader(stream, strict=True))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: is no CSV file in UTF-8: {error}") from None
    if not lines or lines[0] != COLUMNS:
        raise TraceError(f"{path}: header: must be {','.join(COLUMNS)}")
    rows = [_parse_row(f"{path}: row {number}", number, cells) for number, cells in enumerate(lines[1:], start=1)]
    if not rows:
        raise TraceError(f"{path}: has no rows")
    return rows[:limit]


def run_replay(
    environ: Mapping[str, str],
    rows: Sequence[Row],
    *,
    run: str,
    users: int,
    seed: int,
    speed: float | None,
    workers: int | None,
) -> Report:
    """Feed `rows` at `speed` times the recorded pace, wait until drained, prove it.

    With a `speed` of None it feeds flat out. `workers` run for the time of the replay; 0 leaves the work to workers
    elsewhere; None starts two if no other worker could reach the servers. An interrupted `run` may be run again: it
    bills nothing twice.
    Raises TraceError if `run` was used for other rows, RehearsalError if no worker drains.
    """
    with stage(environ) as on:
        prefix = f"replay-{run}-"
        plans = {code: [METER] for code, plan in on.resources.catalogue.plans.items() if METER in plan.meters}
        customers = make_customers(prefix, users, plans)
        requests = _draw(rows, run, customers, seed)
        recorded_before = _require_same_run(on, prefix, requests)
        count = workers if workers is not None else 0 if on.lasting else 2
        with own_workers(on.resources, count) as processes:
            open_missing(on, customers)
            started = time.monotonic()
            tally = _feed(on, requests, speed)
            fed = time.monotonic()
            wait_until_drained(on, processes)
            drained = time.monotonic()
        numbers, usage, faults = prove(on, prefix, tally)
        about: dict[str, object] = {
            "postgres": on.servers.postgres,
            "redis": on.servers.redis,
            "run": run,
            "seed": seed,
            "users": users,
            "workers": count,
            "rows": len(rows),
            "recorded_before": recorded_before,
            "fed_per_second": round(len(rows) / (fed - started), 1),
            "drained_after_seconds": round(drained - fed, 2),
            "seconds": round(drained - started, 2),
            "tokens": sum(tally.accepted.values()),
        }
        return Report(about | numbers, usage, faults)


def _draw(rows: Sequence[Row], run: str, customers: Sequence[Customer], seed: int) -> list[Request]:
    """Give every row to a customer: a few of them make most of the requests."""
    random = Random(seed)  # noqa: S311 (the same users for the same seed, no secret)
    drawn = random.choices(customers, cum_weights=zipf_weights(len(customers)), k=len(rows))
    return [Request(row, customer.user_id, f"{run}-{row.number}") for row, customer in zip(rows, drawn, strict=True)]


def _require_same_run(on: Stage, prefix: str, requests: Sequence[Request]) -> int:
    """Count the `requests` that this run recorded before its interruption.

    Raises TraceError if it recorded any other: rows would be billed to two users.
    """
    with batch_connection(on.resources.engine) as postgres:
        recorded = recorded_amounts(postgres, prefix)
    amounts = {(request.user_id, request.event_id): _tokens(request.row) for request in requests}
    if any(amounts.get(identity) != amount for identity, amount in recorded.items()):
        raise TraceError("--run: was used with another trace, seed, limit or number of users; choose another name")
    return len(recorded)


def _feed(on: Stage, requests: Sequence[Request], speed: float | None) -> Tally:
    """Send all requests, none before its time.

    One thread sends the requests of a user, in the order of the trace.
    """
    lanes: list[list[Request]] = [[] for _ in range(_FEEDERS)]
    for request in requests:
        lanes[keys.partition_of(request.user_id, _FEEDERS).number].append(request)
    bar = on.bars.add_task("rows", total=len(requests))
    started, first_at = time.monotonic(), requests[0].row.at
    stopping = Event()

    def feed_lane(billing: Billing, lane: Sequence[Request]) -> Tally:
        tally = Tally()
        for request in lane:
            due = started + (request.row.at - first_at).total_seconds() / speed if speed else started
            if stopping.wait(max(0.0, due - time.monotonic())):
                break
            _send(billing, request, tally)
            on.bars.advance(bar)
        return tally

    with Billing.connect(on.resources.settings) as billing, ThreadPoolExecutor(_FEEDERS, "feeder") as threads:
        try:
            tally = Tally()
            for part in threads.map(lambda lane: feed_lane(billing, lane), lanes):
                tally.add(part)
        finally:
            stopping.set()
    return tally


def _send(billing: Billing, request: Request, tally: Tally) -> None:
    """Reserve the known part, settle the used one. Safe to repeat: identity decides."""
    row, user_id, event_id = request
    facts: dict[str, Scalar] = {
        "context_tokens": row.context_tokens,
        "generated_tokens": row.generated_tokens,
        "traced_at": row.at.isoformat(),
    }
    try:
        billing.reserve(user_id, METER, row.context_tokens, event_id)
    except UsageDenied as denied:
        tally.deny(denied)
        tally.take(billing.emit(user_id, METER, _tokens(row), event_id=event_id, source="replay", dimensions=facts))
        return
    except HoldClosed:
        pass  # sent by this run before; settling again changes nothing
    tally.take(billing.settle(user_id, METER, event_id, _tokens(row), source="replay", dimensions=facts))


def _tokens(row: Row) -> int:
    return row.context_tokens + row.generated_tokens


def _parse_row(where: str, number: int, cells: Sequence[str]) -> Row:
    if len(cells) != len(COLUMNS):
        raise TraceError(f"{where}: has {len(cells)} columns, must have {len(COLUMNS)}: {','.join(COLUMNS)}")
    try:
        at = datetime.fromisoformat(cells[0])
    except ValueError:
        raise TraceError(
            f"{where}, {COLUMNS[0]}: must be a time such as 2023-11-16 18:15:46.68 ({_got(cells[0])})"
        ) from None
    at = at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
    return Row(
        number, at, *(_parse_tokens(where, name, cell) for name, cell in zip(COLUMNS[1:], cells[1:], strict=True))
    )


def _parse_tokens(where: str, name: str, cell: str) -> int:
    if not (cell.isascii() and cell.isdigit() and len(cell) <= _TOKEN_DIGITS):
        raise TraceError(f"{where}, {name}: must be a whole number of at most {_TOKEN_DIGITS} digits ({_got(cell)})")
    return int(cell)


def _got(cell: str) -> str:
    return f"got {cell[:64]!r}"
