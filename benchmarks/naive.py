"""The usual way, to compare with: `python -m benchmarks.naive` bills one event per transaction through the ORM.

Same tables, same rules, same durability, and the usual care: lock the account, look for the event, lock the balance,
pay, write the row, commit, and only then delete the stream entry. Prints {"events": …, "seconds": …, "cpu_seconds": …}
as JSON, without its start-up; the CPU is that of this process.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from decimal import Decimal
from time import perf_counter, process_time
from typing import Any, cast

import redis
from sqlalchemy import Engine, create_engine, make_url, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from config.catalogue import Catalogue, load_catalogue
from config.settings import load_settings
from schemas.events import UsageEvent
from worker.rules.fractions import whole_units, with_carried
from worker.rules.waterfall import Buckets, limit_in_force, pay

STREAM = "bench:naive"
READ_EVENTS = 100


class _Base(DeclarativeBase):
    """Tables as worker/ledger/migrations made them."""


class _Account(_Base):
    __tablename__ = "account"

    user_id: Mapped[str] = mapped_column(primary_key=True)
    plan: Mapped[str]
    status: Mapped[str]
    seq: Mapped[int]


class _Balance(_Base):
    __tablename__ = "balance"

    user_id: Mapped[str] = mapped_column(primary_key=True)
    meter: Mapped[str] = mapped_column(primary_key=True)
    allowance: Mapped[int | None]
    spill: Mapped[bool]
    period_start: Mapped[datetime]
    used: Mapped[int]
    rollover: Mapped[int]
    purchased: Mapped[int]
    carried: Mapped[int]
    lifetime_consumed: Mapped[int]


class _UsageLog(_Base):
    __tablename__ = "usage_log"

    user_id: Mapped[str] = mapped_column(primary_key=True)
    event_id: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int | None]
    meter: Mapped[str]
    quantity: Mapped[int]
    multiplier: Mapped[Decimal]
    amount: Mapped[int]
    from_subscription: Mapped[int]
    from_rollover: Mapped[int]
    from_purchased: Mapped[int]
    overflow_to_debt: Mapped[int]
    uncollected: Mapped[int]
    period_start: Mapped[datetime | None]
    occurred_at: Mapped[datetime]
    applied_at: Mapped[datetime]
    clamped: Mapped[bool]
    source: Mapped[str | None]
    reference_id: Mapped[str | None]
    hold_key: Mapped[str | None]
    dimensions: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    remainder: Mapped[int | None]


def bill(engine: Engine, catalogue: Catalogue, payload: bytes) -> None:
    """Apply one event in a transaction of its own; an event in the log changes nothing."""
    event = UsageEvent.model_validate_json(payload)
    multiplier = event.multiplier or catalogue.multiplier((event.dimensions or {}).get("model_slug"))
    amount, remainder = whole_units(event.quantity, multiplier)
    with Session(engine) as session, session.begin():
        account = session.scalars(
            select(_Account).where(_Account.user_id == event.user_id).with_for_update()
        ).one()  # fmt: skip
        if session.get(_UsageLog, (event.user_id, event.event_id)) is not None:
            return
        balance = session.scalars(
            select(_Balance)
            .where(_Balance.user_id == event.user_id, _Balance.meter == event.meter)
            .with_for_update()
        ).one()  # fmt: skip
        left: int | None = None  # no fraction was carried
        if remainder:
            amount, left = with_carried(amount, remainder, balance.carried)
            balance.carried = left
        limit = limit_in_force(balance.allowance, account.status)
        before = Buckets(limit, balance.used, balance.rollover, balance.purchased, balance.spill)
        after, parts = pay(before, amount)
        account.seq += 1
        balance.used, balance.rollover, balance.purchased = after.used, after.rollover, after.purchased
        balance.lifetime_consumed += amount
        now = datetime.now(UTC)
        session.add(
            _UsageLog(
                user_id=event.user_id,
                event_id=event.event_id,
                seq=account.seq,
                meter=event.meter,
                quantity=event.quantity,
                multiplier=Decimal(multiplier),
                amount=amount,
                **parts._asdict(),
                uncollected=0,
                period_start=balance.period_start,
                occurred_at=event.occurred_at or now,
                applied_at=now,
                clamped=False,
                source=event.source,
                reference_id=event.reference_id,
                hold_key=event.hold_key,
                dimensions=event.dimensions,
                remainder=left,
            )
        )


def main() -> None:
    """Bill the stream `STREAM` until it is empty."""
    settings = load_settings(os.environ)
    assert settings.database_url is not None
    engine = create_engine(make_url(settings.database_url).set(drivername="postgresql+psycopg"))
    catalogue = load_catalogue(settings.catalogue_path)
    client = redis.Redis.from_url(settings.redis_url)
    with Session(engine) as session:  # connect, and build the mappers, before the clock starts
        session.scalars(select(_Account).limit(1)).all()
    count = 0
    started, cpu_started = perf_counter(), process_time()
    while entries := cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(STREAM, count=READ_EVENTS)):
        for entry_id, fields in entries:
            bill(engine, catalogue, fields[b"e"])
            client.xdel(STREAM, entry_id)
        count += len(entries)
    seconds, cpu_seconds = perf_counter() - started, process_time() - cpu_started
    print(json.dumps({"events": count, "seconds": seconds, "cpu_seconds": cpu_seconds}))


if __name__ == "__main__":
    main()
