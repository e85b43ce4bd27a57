"""The reports: summary, breakdown, engagement, timeline, and the snapshot of all accounts.

Each reads one snapshot and changes nothing. The host keeps names of voices and titles of documents.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from heapq import merge

import redis

from config.catalogue import Draw
from schemas.answers import Parts
from schemas.events import ID_ALLOWED, ID_PATTERN
from schemas.reports import (
    Breakdown,
    BucketUnits,
    Change,
    DocumentUsage,
    Engagement,
    EventPage,
    MeterUsage,
    PeriodUsage,
    RecordedEvent,
    Timeline,
    UsageSummary,
    VoiceMonth,
    VoiceUsage,
    WaitingChange,
)
from worker.errors import NotFound, ReportError
from worker.keyspace import keys
from worker.ledger import reports
from worker.ledger.accounts import next_users, read_account, read_accounts
from worker.ledger.connection import Postgres, batch_connection
from worker.ledger.reports import Period
from worker.resources import Resources
from worker.rules.account import Account, Balance, schedule_of
from worker.rules.lifecycle import as_of
from worker.rules.preflight import MeterStanding, remaining_answer, standing_in_wallet, standing_of
from worker.rules.rows import EntryRow, UsageRow
from worker.rules.wallets import wallet_of
from worker.rules.waterfall import may_spend

MAX_LISTED = 10_000
SNAPSHOT_ACCOUNTS = 500
# A report asks for a roll-up if the tail is longer than this many roll-ups: a mark was lost, or the log is older than
# the roll-ups.
_LONG_TAIL = 2

_is_identifier = re.compile(ID_PATTERN).fullmatch


def usage_summary(resources: Resources, user_id: str) -> UsageSummary:
    """Report plan, status and every meter of an account, as a check would find them.

    Raises ReportError.
    """
    with snapshot_of(resources) as postgres:
        account, now = _account(resources, postgres, user_id)
        quantities = _quantities(postgres, [account])
    (summary,) = _summaries(resources, [account], now, quantities)
    return summary


def snapshot(resources: Resources, after: str = "") -> Iterator[UsageSummary]:
    """Yield the summaries of all accounts after the id `after`, sorted by id.

    Every few hundred accounts are a snapshot of their own, so that a long list holds back no vacuum.
    """
    while True:
        with snapshot_of(resources) as postgres:
            users = next_users(postgres, after, SNAPSHOT_ACCOUNTS)
            if not users:
                return
            found = read_accounts(postgres, users)
            accounts = [as_of(resources.catalogue, found.accounts[user_id], found.now) for user_id in users]
            quantities = _quantities(postgres, accounts)
        yield from _summaries(resources, accounts, found.now, quantities)
        after = users[-1]


def breakdown(resources: Resources, user_id: str, *, documents: int = 200, after: str | None = None) -> Breakdown:
    """Report the open periods of an account, per voice and model, and per document.

    Lists at most `documents` documents, in the order of meter and id. `after` continues the list: it is the
    `more_documents_after` (`meter/document`) of the page before.
    Raises ReportError.
    """
    require_limit("documents", documents)
    if after is not None and not (isinstance(after, str) and "/" in after and after.isprintable()):
        raise ReportError(f"after: must be meter/document, as more_documents_after gives it (got {str(after)[:64]!r})")
    with snapshot_of(resources) as postgres:
        account, now = _account(resources, postgres, user_id)
        meter_after, _, document_after = (after or "").partition("/")
        balances = _periods_of(account)
        periods = [
            Period(name, balance.counted_from, _after(name, meter_after, document_after))
            for name, balance in balances.items()
        ]
        voices, listed = reports.read_breakdown(postgres, user_id, periods, documents + 1)
        _ask_for_roll_up(resources, postgres, user_id)
    page = listed[:documents]
    last = page[-1] if len(listed) > documents else None
    return Breakdown(
        user_id=user_id,
        at=now,
        periods=tuple(
            PeriodUsage(
                meter=name,
                unit=unit_of(resources, name),
                period_start=balance.period_start,
                period_end=balance.period_end,
                events=sum(voice.events for voice in voices if voice.meter == name),
                quantity=sum(voice.quantity for voice in voices if voice.meter == name),
                amount=sum(voice.amount for voice in voices if voice.meter == name),
            )
            for name, balance in balances.items()
        ),
        voices=tuple(VoiceUsage(**voice._asdict()) for voice in voices),
        documents=tuple(DocumentUsage(**document._asdict()) for document in page if document.events > 0),
        more_documents_after=f"{last.meter}/{last.document_id}" if last else None,
    )


def engagement(resources: Resources, user_id: str) -> Engagement:
    """Report the whole life of an account, per voice and month, and its documents.

    Raises ReportError.
    """
    characters = sorted(code for code, meter in resources.catalogue.meters.items() if meter.unit == "characters")
    with snapshot_of(resources) as postgres:
        _account(resources, postgres, user_id)
        life = reports.read_engagement(postgres, user_id, characters)
        _ask_for_roll_up(resources, postgres, user_id)
    return Engagement(
        user_id=user_id,
        characters=sum(row.characters for row in life.months),
        duration_ms=sum(row.duration_ms for row in life.months),
        syntheses=sum(row.syntheses for row in life.months),
        documents=life.documents,
        pages=life.pages,
        months=tuple(VoiceMonth(**{**row._asdict(), "month": f"{row.month:%Y-%m}"}) for row in life.months),
    )


def timeline(resources: Resources, user_id: str, *, limit: int = 50, before_seq: int | None = None) -> Timeline:
    """Report changes of an account before `before_seq`, newest first, at most `limit`.

    Pages do not shift when new changes come: the sequence number is the page's key.
    Raises ReportError.
    """
    require_limit("limit", limit)
    _require_seq(before_seq)
    with snapshot_of(resources) as postgres:
        _account(resources, postgres, user_id)
        usage, entries = reports.read_changes(postgres, user_id, before_seq, limit + 1)
    changes = list(
        merge(map(_usage_change, usage), map(_entry_change, entries), key=lambda change: change.seq, reverse=True)
    )
    page = changes[:limit]
    return Timeline(
        user_id=user_id,
        changes=tuple(page),
        more_before_seq=page[-1].seq if len(changes) > limit else None,
    )


def events(resources: Resources, user_id: str, *, limit: int = 50, before_seq: int | None = None) -> EventPage:
    """Report the recorded events of an account before `before_seq`, newest first, at most `limit`.

    Pages do not shift when new events come: the sequence number is the page's key.
    Raises ReportError.
    """
    require_limit("limit", limit)
    _require_seq(before_seq)
    with snapshot_of(resources) as postgres:
        _account(resources, postgres, user_id)
        rows = reports.read_events(postgres, user_id, before_seq, limit + 1)
        page = rows[:limit]
        reversed_at = reports.read_reversals(postgres, user_id, [row.event_id for row in page])
    return EventPage(
        user_id=user_id,
        events=tuple(_recorded(resources, row, reversed_at.get(row.event_id)) for row in page),
        more_before_seq=page[-1].seq if len(rows) > limit else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


@contextmanager
def snapshot_of(resources: Resources) -> Iterator[Postgres]:
    """Open a read-only snapshot of the ledger for the length of the block."""
    with batch_connection(resources.engine) as postgres:
        reports.begin(postgres)
        yield postgres
        postgres.commit()  # a roll-back would make psycopg forget what it has prepared; planning is a third of a report


def _account(resources: Resources, postgres: Postgres, user_id: str) -> tuple[Account, datetime]:
    """Read the account now, and the ledger's clock."""
    require_identifier("user_id", user_id)
    now, _, account = read_account(postgres, user_id)
    if account is None:
        raise NotFound(f"user_id: no account {user_id}")
    return as_of(resources.catalogue, account, now), now


def _periods_of(account: Account) -> dict[str, Balance]:
    """Return the open periods of an account by what reports call the meter: of one with a wallet, the wallet's."""
    found = {}
    for meter, balance in account.balances.items():
        draw = account.draws.get(meter)
        if draw is None:
            found[meter] = balance
        else:
            found[f"{meter}@{draw.wallet}"] = account.balances[draw.wallet]
    return dict(sorted(found.items()))


def _quantities(postgres: Postgres, accounts: Sequence[Account]) -> dict[tuple[str, str], int]:
    """Return the units before the multiplier of meters that draw on a wallet, in its open period, by user and meter."""
    found: dict[tuple[str, str], int] = {}
    for account in accounts:
        if not account.draws:
            continue
        periods = [Period(name, balance.counted_from) for name, balance in _periods_of(account).items() if "@" in name]
        voices, _ = reports.read_breakdown(postgres, account.user_id, periods, 0)
        for voice in voices:
            key = account.user_id, voice.meter.partition("@")[0]
            found[key] = found.get(key, 0) + voice.quantity
    return found


def _summaries(
    resources: Resources, accounts: Sequence[Account], now: datetime, quantities: Mapping[tuple[str, str], int]
) -> list[UsageSummary]:
    pending = _pending(resources, accounts)
    return [
        UsageSummary(
            user_id=account.user_id,
            plan=account.plan,
            plan_name=plan.name if plan else account.plan,
            tier=plan.tier if plan else None,
            status=account.status,
            trust=account.trust,
            version=account.version,
            **{**schedule_of(account), "waiting": [WaitingChange(**each._asdict()) for each in account.waiting]},
            at=now,
            meters=tuple(
                _meter_usage(resources, account, meter, pending)
                if (draw := account.draws.get(meter)) is None
                else _drawn_usage(resources, account, meter, draw, pending, quantities.get((account.user_id, meter), 0))
                for meter in sorted(account.balances)
            ),
        )
        for account in accounts
        for plan in [resources.catalogue.plans.get(account.plan)]
    ]


def _meter_usage(
    resources: Resources, account: Account, meter: str, pending: Mapping[tuple[str, str], int] | None
) -> MeterUsage:
    balance = account.balances[meter]
    buckets = balance.buckets(account.status)
    units = None if pending is None else pending[account.user_id, meter]
    if units is not None and wallet_of(account.draws, meter) is not None:
        units = _standing(account, meter, meter, pending).pending
    return MeterUsage(
        meter=meter,
        unit=unit_of(resources, meter),
        limit=buckets.limit,
        used=balance.used,
        rollover=balance.rollover,
        purchased=balance.purchased,
        pending=units,
        available=standing_of(account, balance, units or 0).available() if may_spend(account.status) else 0,
        cadence=balance.cadence,
        period_start=balance.period_start,
        period_end=balance.period_end,
        backing=balance.backing,
        caps={backend: cap for backend, cap in (balance.caps or {}).items() if cap is not None},
        cap_used=dict(balance.cap_used or {}),
    )


def _drawn_usage(
    resources: Resources,
    account: Account,
    meter: str,
    draw: Draw,
    pending: Mapping[tuple[str, str], int] | None,
    quantity: int,
) -> MeterUsage:
    """Report a meter that draws on a wallet: the wallet's buckets, and its own part in them."""
    wallet = _meter_usage(resources, account, draw.wallet, pending)
    standing = _standing(account, meter, draw.wallet, pending)
    own = account.balances[draw.wallet].cap_used or {}
    return wallet.model_copy(
        update={
            "meter": meter,
            "unit": unit_of(resources, meter),
            "available": remaining_answer(account.user_id, meter, standing).remaining
            if may_spend(account.status)
            else 0,
            "caps": {},
            "cap_used": {},
            "wallet": draw.wallet,
            "price": draw.price,
            "quantity": quantity,
            "wallet_used": own.get(meter, 0),
        }
    )


def _standing(
    account: Account, meter: str, wallet: str, pending: Mapping[tuple[str, str], int] | None
) -> MeterStanding:
    """Return the standing of a meter in its wallet, or of the wallet."""
    units = {name: (pending or {}).get((account.user_id, name), 0) for name in account.balances}
    return standing_in_wallet(account, meter, wallet, units)


def _pending(resources: Resources, accounts: Sequence[Account]) -> dict[tuple[str, str], int] | None:
    """Sum the units of holds and events not applied, by user and meter.

    Returns None if Redis does not answer.
    """
    pairs = [(account.user_id, meter) for account in accounts for meter in account.balances]
    try:
        with resources.redis.pipeline(transaction=False) as pipe:
            for user_id, meter in pairs:
                pipe.hget(keys.account_of(user_id, resources.settings.partitions).pending(meter), "total")
            return {name: int(total or 0) for name, total in zip(pairs, pipe.execute(), strict=True)}
    except redis.RedisError:
        return None


def _ask_for_roll_up(resources: Resources, postgres: Postgres, user_id: str) -> None:
    """Mark the account for the next sweep if its tail is long.

    A long tail makes a report slow, never wrong.
    """
    if reports.tail_length(postgres, user_id) < _LONG_TAIL * resources.settings.rollup_after_rows:
        return
    with contextlib.suppress(redis.RedisError):
        resources.redis.sadd(keys.partition_of(user_id, resources.settings.partitions).unrolled, user_id)


def _recorded(resources: Resources, row: UsageRow, reversed_at: datetime | None) -> RecordedEvent:
    columns = row._asdict()
    same = {name: columns[name] for name in RecordedEvent.model_fields if name in columns}
    return RecordedEvent(**same, unit=unit_of(resources, row.meter), parts=parts_of(row), reversed_at=reversed_at)


def _usage_change(row: UsageRow) -> Change:
    return Change(
        seq=row.seq or 0, at=row.applied_at, kind="usage", meter=row.meter, what=row.event_id, amount=row.amount,
        parts=parts_of(row), wallet=row.wallet,
    )  # fmt: skip


def _entry_change(row: EntryRow) -> Change:
    moved = BucketUnits(used=row.used_change, rollover=row.rollover_change, purchased=row.purchased_change)
    after = BucketUnits(used=row.used_after, rollover=row.rollover_after, purchased=row.purchased_after)
    return Change(
        seq=row.seq, at=row.created_at, kind=row.kind, meter=row.meter, what=row.entry_key, changes=moved, after=after,
        detail=row.detail, actor=row.actor, reason=row.reason,
    )  # fmt: skip


def parts_of(row: UsageRow) -> Parts:
    """Return the units that each bucket paid for an event."""
    return Parts(
        from_subscription=row.from_subscription,
        from_rollover=row.from_rollover,
        from_purchased=row.from_purchased,
        overflow_to_debt=row.overflow_to_debt,
        uncollected=row.uncollected,
    )


def _after(meter: str, cursor_meter: str, cursor_document: str) -> str | None:
    """Return the document after which the list of this meter goes on.

    Returns None if the page before has listed all of them.
    """
    if meter < cursor_meter:
        return None
    return cursor_document if meter == cursor_meter else ""


def unit_of(resources: Resources, meter: str) -> str:
    """Return the unit of a meter, or of the wallet in `meter@wallet`; `units` for one that the catalogue lacks."""
    known = resources.catalogue.meters.get(meter.rpartition("@")[2])
    return known.unit if known else "units"


def require_limit(field: str, limit: int) -> None:
    if type(limit) is not int or not 1 <= limit <= MAX_LISTED:
        raise ReportError(f"{field}: must be a whole number from 1 to {MAX_LISTED} (got {limit!r:.64})")


def _require_seq(before_seq: int | None) -> None:
    if before_seq is not None and (type(before_seq) is not int or before_seq < 1):
        raise ReportError(f"before_seq: must be at least 1 (got {before_seq!r:.64})")


def require_identifier(field: str, value: str) -> None:
    """Raise ReportError for an id that no event or user can have."""
    if not (isinstance(value, str) and _is_identifier(value)):
        raise ReportError(f"{field}: must be {ID_ALLOWED} (got {str(value)[:64]!r})")
