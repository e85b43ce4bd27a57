"""The batched way, to compare with: `python -m benchmarks.batched` bills each user of a batch in one transaction.

Same tables, same rules, same durability, and as many events per batch as a worker takes. It reads through a consumer
group and groups by user. Per user it locks the account and its balances, looks for known events, pays in order, inserts
all rows by one `executemany`, updates, and commits. Then it acknowledges and deletes the stream entries of the batch. A
crash repeats at most one batch, and known events change nothing.

Prints {"events": …, "seconds": …, "cpu_seconds": …} as JSON, without its start-up; the CPU is that of this process.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from time import perf_counter, process_time
from typing import Any, cast

import psycopg
import redis
from psycopg.types.json import Jsonb
from sqlalchemy import make_url

from config.catalogue import Catalogue, load_catalogue
from config.settings import load_settings
from schemas.events import UsageEvent
from worker.rules.fractions import whole_units, with_carried
from worker.rules.waterfall import Buckets, limit_in_force, pay

STREAM = "bench:batched"
_GROUP, _CONSUMER = "bench", "batched"
_PENDING, _NEW = "0", ">"

_LOCK_ACCOUNT = "SELECT seq, status FROM account WHERE user_id = %s FOR UPDATE"
_LOCK_BALANCES = """
    SELECT meter, allowance, spill, period_start, used, rollover, purchased, carried
    FROM balance WHERE user_id = %s AND meter = ANY(%s) FOR UPDATE
"""
_READ_KNOWN = "SELECT event_id FROM usage_log WHERE user_id = %s AND event_id = ANY(%s)"
_USAGE_COLUMNS = (
    "user_id", "event_id", "seq", "meter", "quantity", "multiplier", "amount", "from_subscription", "from_rollover",
    "from_purchased", "overflow_to_debt", "uncollected", "period_start", "occurred_at", "applied_at", "clamped",
    "source", "reference_id", "hold_key", "dimensions", "remainder",
)  # fmt: skip
_INSERT_USAGE = (
    f"INSERT INTO usage_log ({', '.join(_USAGE_COLUMNS)}) VALUES ({', '.join(['%s'] * len(_USAGE_COLUMNS))})"
)
_UPDATE_BALANCE = """
    UPDATE balance SET used = %s, rollover = %s, purchased = %s, carried = %s,
        lifetime_consumed = lifetime_consumed + %s
    WHERE user_id = %s AND meter = %s
"""
_UPDATE_ACCOUNT = "UPDATE account SET seq = %s WHERE user_id = %s"

Entry = tuple[bytes, dict[bytes, bytes]]


def bill_batch(postgres: psycopg.Connection[tuple[Any, ...]], catalogue: Catalogue, payloads: Sequence[bytes]) -> None:
    """Apply the events of a batch, one transaction per user; events in the log change nothing."""
    by_user: dict[str, list[UsageEvent]] = defaultdict(list)
    for payload in payloads:
        event = UsageEvent.model_validate_json(payload)
        by_user[event.user_id].append(event)
    for user_id, events in by_user.items():
        with postgres.transaction(), postgres.cursor() as cursor:
            _bill_user(cursor, catalogue, user_id, events)


def _bill_user(
    cursor: psycopg.Cursor[tuple[Any, ...]], catalogue: Catalogue, user_id: str, events: Sequence[UsageEvent]
) -> None:
    ((seq, status),) = cursor.execute(_LOCK_ACCOUNT, (user_id,)).fetchall()
    known = {row[0] for row in cursor.execute(_READ_KNOWN, (user_id, [event.event_id for event in events]))}
    balances = {row[0]: row[1:] for row in cursor.execute(_LOCK_BALANCES, (user_id, [each.meter for each in events]))}
    buckets = {
        meter: Buckets(limit_in_force(allowance, status), used, rollover, purchased, spill)
        for meter, (allowance, spill, _, used, rollover, purchased, _) in balances.items()
    }
    carried = {meter: row[-1] for meter, row in balances.items()}
    consumed: dict[str, int] = defaultdict(int)
    now = datetime.now(UTC)
    rows: list[tuple[object, ...]] = []
    for event in events:
        if event.event_id in known:
            continue
        known.add(event.event_id)
        meter = event.meter
        multiplier = event.multiplier or catalogue.multiplier((event.dimensions or {}).get("model_slug"))
        amount, remainder = whole_units(event.quantity, multiplier)
        left: int | None = None  # no fraction was carried
        if remainder:
            amount, left = with_carried(amount, remainder, carried[meter])
            carried[meter] = left
        buckets[meter], parts = pay(buckets[meter], amount)
        consumed[meter] += amount
        seq += 1
        rows.append((
            user_id, event.event_id, seq, meter, event.quantity, multiplier, amount, *parts, 0, balances[meter][2],
            event.occurred_at or now, now, False, event.source, event.reference_id, event.hold_key,
            None if event.dimensions is None else Jsonb(event.dimensions), left,
        ))  # fmt: skip
    if not rows:
        return
    cursor.executemany(_INSERT_USAGE, rows)
    after = [(meter, buckets[meter], units) for meter, units in consumed.items()]
    cursor.executemany(
        _UPDATE_BALANCE,
        [
            (each.used, each.rollover, each.purchased, carried[meter], units, user_id, meter)
            for meter, each, units in after
        ],
    )
    cursor.execute(_UPDATE_ACCOUNT, (seq, user_id))


def _read(client: redis.Redis, since: str, count: int) -> list[Entry]:
    """Return entries that this consumer has not acknowledged, or new ones."""
    answer = cast("list[tuple[bytes, list[Entry]]]", client.xreadgroup(_GROUP, _CONSUMER, {STREAM: since}, count=count))
    return [entry for _, entries in answer for entry in entries]


def main() -> None:
    """Bill the stream `STREAM` until it is empty, what a killed run left first."""
    settings = load_settings(os.environ)
    assert settings.database_url is not None
    catalogue = load_catalogue(settings.catalogue_path)
    client = redis.Redis.from_url(settings.redis_url)
    try:
        client.xgroup_create(STREAM, _GROUP, id="0", mkstream=True)
    except redis.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise
    url = make_url(settings.database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    count = 0
    with psycopg.connect(url, autocommit=True) as postgres:
        started, cpu_started = perf_counter(), process_time()
        for since in (_PENDING, _NEW):
            while entries := _read(client, since, settings.batch_max_events):
                bill_batch(postgres, catalogue, [fields[b"e"] for _, fields in entries])
                ids = [entry_id for entry_id, _ in entries]
                with client.pipeline() as pipe:
                    pipe.xack(STREAM, _GROUP, *ids)
                    pipe.xdel(STREAM, *ids)
                    pipe.execute()
                count += len(entries)
        seconds, cpu_seconds = perf_counter() - started, process_time() - cpu_started
    client.delete(STREAM)
    print(json.dumps({"events": count, "seconds": seconds, "cpu_seconds": cpu_seconds}))


if __name__ == "__main__":
    main()
