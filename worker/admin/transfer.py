"""Accounts out of one ledger and into another, as JSON lines; also in from the ledger file of a relay.

A line is the state of one account as it is stored: plan, status, schedule, when it was opened, and each meter with its
terms, its open period, its buckets and its lifetime counters. It is not its history: sequence numbers, usage and ledger
entries stay where they are. So the ledger that imports knows no event and no invoice of before; move accounts when
nothing of theirs is on its way any more.
"""

from __future__ import annotations

import json
import re
from calendar import monthrange
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

import psycopg
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from config.catalogue import TRUST_TIERS, Allowance, Catalogue
from schemas.events import MAX_AMOUNT, MAX_TOTAL, Identifier, MeterCode
from worker.admin.accounts import ENDING_STATUSES, AccountError, parse_time, refresh, refresh_trust
from worker.crash import crash_point
from worker.ledger import batch
from worker.ledger.accounts import State, closed_users, existing_accounts, next_states
from worker.ledger.connection import batch_connection, begin_snapshot, read_clock
from worker.resources import Resources
from worker.rules.account import Account, Balance, Parked
from worker.rules.history import opened_account, record, schedule_of
from worker.rules.periods import CALENDAR_CADENCES, Terms, boundary, index_at, open_account, terms_of
from worker.rules.rows import Changed, Writes
from worker.rules.waterfall import STATUSES

RELAY_METER = "relay_credits"

_CHUNK_ACCOUNTS = 1_000
# An export waits for its reader, who may be a pager; it holds no locks meanwhile.
_READER_TIMEOUT_MS = 600_000

# Opens a counter with a name, and is told how far it is.
Watch = Callable[[str], AbstractContextManager[Callable[[int], object]]]


class BadRow(NamedTuple):
    """A row that cannot be imported. `row` counts from 1: lines of the file, or installs of a relay."""

    row: int
    user_id: str
    field: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.field}: {self.reason}"


class Imported(NamedTuple):
    """How many accounts were imported, and which rows were not."""

    accounts: int
    bad: list[BadRow]


class _Arrival(NamedTuple):
    """An account that may be imported; `facts` are kept in the entry that opens it."""

    row: int
    state: State
    facts: Mapping[str, object]


class _WrongError(ValueError):
    """A row is not what it should be."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = _printable(field), reason


def _printable(text: str) -> str:
    """The text as a terminal can show it: names in a file may hold anything."""
    return ascii(text)[1:-1][:128]


# ---------------------------------------------------------------------------------------------------------------------
# Out


def export_accounts(
    resources: Resources, write: Callable[[str], object], progress: Callable[[int], object] | None = None
) -> int:
    """Write every account that is not closed as a line of JSON, sorted by user id; returns how many.

    All of it is one moment of the ledger, read in chunks. What is due is not applied: the lines say what is stored.
    `progress` is told how many accounts are written.
    """
    accounts = 0
    after = ""  # before every id
    with batch_connection(resources.engine) as postgres:
        begin_snapshot(postgres, idle_timeout_ms=_READER_TIMEOUT_MS)
        while states := next_states(postgres, after, _CHUNK_ACCOUNTS):
            write("".join(_line_of(state) for state in states))
            after = states[-1].account.user_id
            accounts += len(states)
            if progress is not None:
                progress(accounts)
    return accounts


def _line_of(state: State) -> str:
    account, opened_at, counters = state
    meters = {meter: _meter_of(balance, *counters[meter]) for meter, balance in account.balances.items()}
    about = {"user_id": account.user_id, "plan": account.plan, "status": account.status, "trust": account.trust}
    line = {**about, **schedule_of(account), "opened_at": opened_at, "meters": meters}
    return json.dumps(line, default=datetime.isoformat, separators=(",", ":")) + "\n"


def _meter_of(balance: Balance, consumed: int, granted: int) -> dict[str, object]:
    fields = {**balance._asdict(), "parked": balance.parked and balance.parked.as_json()}
    del fields["meter"]
    return {**fields, "lifetime_consumed": consumed, "lifetime_granted": granted}


# ---------------------------------------------------------------------------------------------------------------------
# In


def import_accounts(resources: Resources, text: str, *, skip_bad: bool = False, watch: Watch | None = None) -> Imported:
    """Open the accounts that `text` holds: lines as `export_accounts` writes them, or the ledger of a relay.

    A relay's ledger is a JSON object with `rows` by install id. Everything is checked first and then written in one
    transaction: killed or failed before its COMMIT, nothing is imported. After it Redis is asked to publish the
    accounts; should that fail, or we die, what it caches of them runs out by itself.

    Raises AccountError naming the first row that is bad, in which field and what is allowed; with `skip_bad` such rows
    are returned and the others imported. A user that has an account is a bad row, so a repeat imports nothing.
    """
    watch = watch or _unwatched
    with batch_connection(resources.engine) as postgres:
        now = read_clock(postgres)
    with watch("rows checked") as progress:
        arrivals, bad = _judge(_rows_of(resources.catalogue, text, now), progress)
    while True:
        arrivals, bad = _without_existing(resources, arrivals, bad)
        if bad and not skip_bad:
            raise AccountError(f"{bad[0]}{_more(len(bad) - 1)}")
        try:
            with watch("accounts written") as progress:
                _store(resources, arrivals, now, progress)
            break
        except psycopg.errors.UniqueViolation:
            continue  # somebody opened one of them since we looked
    for chunk in _chunks(arrivals):
        accounts = [arrival.state.account for arrival in chunk]
        refresh(resources, [account.user_id for account in accounts])
        refresh_trust(resources, [account.user_id for account in accounts if account.trust != TRUST_TIERS[0]])
    return Imported(len(arrivals), bad)


def _more(rows: int) -> str:
    return f"; and {rows} more bad row{'s' if rows > 1 else ''}" if rows else ""


def _judge(rows: Iterable[_Arrival | BadRow], progress: Callable[[int], object]) -> tuple[list[_Arrival], list[BadRow]]:
    """Rows that may be imported, and rows that are bad; of several about one user all but the first are."""
    arrivals: dict[str, _Arrival] = {}
    bad: list[BadRow] = []
    for count, row in enumerate(rows, start=1):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            user_id = row.state.account.user_id
            first = arrivals.setdefault(user_id, row)
            if first is not row:
                bad.append(
                    BadRow(row.row, user_id, "user_id", f"must be in the file once ({user_id} is row {first.row})")
                )
        if count % _CHUNK_ACCOUNTS == 0:
            progress(count)
    return list(arrivals.values()), bad


def _without_existing(
    resources: Resources, arrivals: list[_Arrival], bad: list[BadRow]
) -> tuple[list[_Arrival], list[BadRow]]:
    """The same with the rows of users that have an account, or had one, among the bad ones."""
    existing: dict[str, str] = {}
    with batch_connection(resources.engine) as postgres:
        for chunk in _chunks(arrivals):
            users = [arrival.state.account.user_id for arrival in chunk]
            existing |= dict.fromkeys(existing_accounts(postgres, users), "has an account already")
            existing |= dict.fromkeys(closed_users(postgres, users), "was closed for good")
    found = [
        BadRow(arrival.row, user_id, "user_id", f"must be new (got {user_id!r}, which {existing[user_id]})")
        for arrival in arrivals
        if (user_id := arrival.state.account.user_id) in existing
    ]
    return [arrival for arrival in arrivals if arrival.state.account.user_id not in existing], sorted([*bad, *found])


def _store(
    resources: Resources, arrivals: Iterable[_Arrival], now: datetime, progress: Callable[[int], object]
) -> None:
    """Write all or nothing."""
    written = 0
    # In the order in which accounts are locked everywhere: two imports wait for each other, never in a circle.
    in_order = sorted(arrivals, key=lambda arrival: arrival.state.account.user_id)
    with batch_connection(resources.engine) as postgres:
        for chunk in _chunks(in_order):
            writes = Writes.none()
            for arrival in chunk:
                _open(writes, arrival, now)
            since = {arrival.state.account.user_id: arrival.state.opened_at for arrival in chunk}
            batch.store(postgres, writes, now, since)
            crash_point("inside_import")
            written += len(chunk)
            progress(written)
        postgres.commit()


def _open(writes: Writes, arrival: _Arrival, now: datetime) -> None:
    """Put an account with its contents, and the entries that account for them, into `writes`."""
    account, _, counters = arrival.state
    steps = opened_account(account, imported=True, **arrival.facts)
    for at, step in enumerate(steps):
        if step.meter:
            consumed, granted = counters[step.meter]
            steps[at] = step._replace(detail={"lifetime_consumed": consumed, "lifetime_granted": granted})
    writes.opened_accounts.append(record(writes, account, steps, now))
    writes.opened_balances.extend(
        Changed(account.user_id, balance, *counters[meter]) for meter, balance in account.balances.items()
    )


def _chunks(arrivals: Iterable[_Arrival]) -> Iterator[list[_Arrival]]:
    rest = iter(arrivals)
    while chunk := list(islice(rest, _CHUNK_ACCOUNTS)):
        yield chunk


def _unwatched(_: str) -> AbstractContextManager[Callable[[int], object]]:
    return nullcontext(lambda _: None)


# ---------------------------------------------------------------------------------------------------------------------
# What every row is made of


def _time(value: object) -> datetime:
    if not isinstance(value, str):
        raise ValueError("must be an ISO 8601 time with an offset, as text")
    try:
        return parse_time(value)
    except ValueError as error:
        raise ValueError(f"must be an ISO 8601 time with an offset: {error}") from None


def _month(value: object) -> datetime:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", value) or value < "0001":
        raise ValueError("must be a month, as in 2026-11")
    return datetime(int(value[:4]), int(value[5:]), 1, tzinfo=UTC)


def _one_of(*names: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return AfterValidator(check)


Units = Annotated[int, Field(ge=0, le=MAX_AMOUNT)]
Total = Annotated[int, Field(ge=0, le=MAX_TOTAL)]
Time = Annotated[datetime, BeforeValidator(_time)]
Month = Annotated[datetime, BeforeValidator(_month)]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Model = TypeVar("_Model", bound=_Row)


def _parse(model: type[_Model], value: object) -> _Model:
    """The row that `value` is. Raises _WrongError for the first field that is not as it should be."""
    if not isinstance(value, dict):
        raise _WrongError("row", f"must be a JSON object (got {value!r:.64})")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        raise _WrongError(field, "missing")
    if first["type"] == "extra_forbidden":
        raise _WrongError(field, "unknown field")
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    reason = reason.replace("String should match pattern", "must be text that matches")
    raise _WrongError(field, f"{reason} (got {first['input']!r:.64})")


def _known(field: str, code: str | None, codes: Collection[str]) -> None:
    if code is not None and code not in codes:
        raise _WrongError(field, f"must be one of {', '.join(sorted(codes)) or 'none there are'} (got {code!r:.64})")


# ---------------------------------------------------------------------------------------------------------------------
# Rows of an export


class _ParkedRow(_Row):
    period_start: Time
    used: Total
    cap_used: dict[MeterCode, Total] | None


class _MeterRow(_Row):
    """The fields of a Balance, in their order, and its lifetime counters."""

    allowance: Units | None
    spill: bool
    rollover_cap: Units
    caps: dict[MeterCode, Units] | None
    cadence: Annotated[str, _one_of(*get_args(Allowance.model_fields["cadence"].annotation))]
    anchor: Annotated[str, _one_of(*get_args(Allowance.model_fields["anchor"].annotation))]
    anchored_at: Time
    period_index: Annotated[int, Field(ge=-1, le=MAX_AMOUNT)]
    period_start: Time
    period_end: Time | None
    used: Total
    rollover: Annotated[int, Field(ge=-MAX_TOTAL, le=MAX_TOTAL)]
    purchased: Total
    cap_used: dict[MeterCode, Total] | None
    parked: _ParkedRow | None
    lifetime_consumed: Total
    lifetime_granted: Total

    @field_validator("period_end")
    @classmethod
    def _ends_as_its_terms_say(cls, end: datetime | None, info: ValidationInfo) -> datetime | None:
        terms = info.data
        if {"cadence", "anchor", "anchored_at", "period_index", "period_start"} - terms.keys():
            return end  # one of them is wrong, and is named instead
        calendar = terms["cadence"] in CALENDAR_CADENCES
        if end is None and calendar:
            raise ValueError(f"must be a time, as the cadence is {terms['cadence']}")
        if end is not None and end <= terms["period_start"]:
            raise ValueError(f"must be after period_start ({terms['period_start'].isoformat()})")
        if calendar and terms["anchor"] == "sticky":
            due = _boundary_after(terms["anchored_at"], terms["cadence"], terms["period_index"])
            if end != due:
                raise ValueError(
                    f"must be {due.isoformat()}, the boundary that follows from anchored_at and period_index"
                )
        return end

    def balance(self, meter: str) -> Balance:
        """The balance of `meter` that this row says."""
        parked = Parked(self.parked.period_start, self.parked.used, self.parked.cap_used) if self.parked else None
        values: list[Any] = [*(getattr(self, name) for name in Balance._fields[1:-1]), parked]
        return Balance(meter, *values)


def _boundary_after(anchor: datetime, cadence: str, index: int) -> datetime:
    try:
        return boundary(anchor, cadence, index + 1)
    except (ValueError, OverflowError):
        raise ValueError("must be within the calendar, and so must the boundary after period_index") from None


class _AccountRow(_Row):
    """A line of an export."""

    user_id: Identifier
    plan: str
    status: Annotated[str, _one_of(*STATUSES)]
    trust: Annotated[str, _one_of(*TRUST_TIERS)]
    highest_tier: Annotated[int, Field(ge=0, le=2**31 - 1)]
    next_plan: str | None
    plan_change_at: Time | None
    next_status: Annotated[str, _one_of(*ENDING_STATUSES)] | None
    status_change_at: Time | None
    opened_at: Time
    meters: dict[MeterCode, _MeterRow]

    @field_validator("plan_change_at")
    @classmethod
    def _only_with_a_plan(cls, at: datetime | None, info: ValidationInfo) -> datetime | None:
        if at is not None and "next_plan" in info.data and info.data["next_plan"] is None:
            raise ValueError("must be null without next_plan")
        return at

    @field_validator("status_change_at")
    @classmethod
    def _only_with_a_status(cls, at: datetime | None, info: ValidationInfo) -> datetime | None:
        if "next_status" in info.data and (info.data["next_status"] is None) != (at is None):
            raise ValueError("must be a time with next_status, and null without")
        return at


def _account_state(catalogue: Catalogue, row: _AccountRow) -> State:
    """The account that a line says. Raises _WrongError for a plan or a meter that is not in the catalogue."""
    _known("plan", row.plan, catalogue.plans)
    _known("next_plan", row.next_plan, catalogue.plans)
    for meter in row.meters:
        _known("meters", meter, catalogue.meters)
    balances = {meter: found.balance(meter) for meter, found in row.meters.items()}
    schedule = (row.highest_tier, row.next_plan, row.plan_change_at, row.next_status, row.status_change_at)
    account = Account(row.user_id, row.plan, row.status, row.trust, 0, balances, *schedule)
    lives = {meter: (found.lifetime_consumed, found.lifetime_granted) for meter, found in row.meters.items()}
    return State(account, row.opened_at, lives)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a relay's ledger


class _RelayRow(_Row):
    """What a relay knows of an install. Older ones know a month instead of a renewal, the oldest neither."""

    tier_snapshot: str
    lifetime_consumed: Total = 0
    lifetime_gemini_consumed: Total = 0
    last_renewal_at: Time | None = None
    month: Month | None = None
    anniversary_day: Annotated[int, Field(ge=1, le=31)] | None = None
    monthly_consumed: Total = 0
    monthly_gemini_consumed: Total = 0
    last_active_at: Time | None = None

    @field_validator("month")
    @classmethod
    def _instead_of_a_renewal(cls, month: datetime | None, info: ValidationInfo) -> datetime | None:
        if month is not None and info.data.get("last_renewal_at") is not None:
            raise ValueError("must be left out where last_renewal_at is given")
        return month


def _relay_state(catalogue: Catalogue, install_id: str, row: _RelayRow, now: datetime) -> State:
    """The account of an install, opened `now`. Raises _WrongError."""
    plan = _relay_plan(catalogue, row.tier_snapshot)
    renewed_at = row.last_renewal_at or row.month or now
    try:
        anchor = _anchor_of(renewed_at, row.anniversary_day or renewed_at.day)
        balance = _relay_balance(terms_of(catalogue, plan, RELAY_METER), row, renewed_at, anchor)
    except (ValueError, OverflowError):
        field = "last_renewal_at" if row.month is None else "month"
        raise _WrongError(field, f"must be well within the calendar (got {renewed_at.isoformat()!r})") from None
    account = open_account(catalogue, install_id, plan, "active", now)
    account = account._replace(balances={**account.balances, RELAY_METER: balance})
    lives = {**dict.fromkeys(account.balances, (0, 0)), RELAY_METER: (row.lifetime_consumed, 0)}
    return State(account, now, lives)


def _relay_plan(catalogue: Catalogue, tier: str) -> str:
    """The plan of a relay's tier: of that name, or with `_relay` behind it where the name is another plan's."""
    plans = {code for code, plan in catalogue.plans.items() if RELAY_METER in plan.meters}
    _known("tier_snapshot", tier, plans | {code.removesuffix("_relay") for code in plans})
    return tier if tier in plans else f"{tier}_relay"


def _anchor_of(renewed_at: datetime, day: int) -> datetime:
    """The latest moment on `day` of a month at the time of day of `renewed_at`, and not after it."""
    back = 0
    while True:
        first = boundary(renewed_at.replace(day=1), "monthly", -back)
        if day <= monthrange(first.year, first.month)[1] and first.replace(day=day) <= renewed_at:
            return first.replace(day=day)
        back += 1


def _relay_balance(terms: Terms, row: _RelayRow, renewed_at: datetime, anchor: datetime) -> Balance:
    """What an install used, in the period that holds its last renewal.

    Under a lifetime tier that is its lifetime usage. Under any other that waits until the lifetime tier returns; it
    began before the anchor, and not at it, as usage is told apart by the start of its period.
    """
    counted = {"gemini": row.lifetime_gemini_consumed}
    if terms.cadence == "lifetime":
        return Balance(RELAY_METER, *terms, anchor, 0, anchor, None, row.lifetime_consumed, 0, 0, counted)
    parked = Parked(anchor - datetime.resolution, row.lifetime_consumed, counted)
    calendar = terms.cadence in CALENDAR_CADENCES
    cadence = terms.cadence if calendar else "monthly"
    index = index_at(anchor, cadence, renewed_at)
    start, counted = boundary(anchor, cadence, index), {"gemini": row.monthly_gemini_consumed}
    balance = Balance(RELAY_METER, *terms, start, 0, start, None, row.monthly_consumed, 0, 0, counted, parked)
    if not calendar:
        return balance
    return balance._replace(anchored_at=anchor, period_index=index, period_end=boundary(anchor, cadence, index + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Which of both a file is


def _rows_of(catalogue: Catalogue, text: str, now: datetime) -> Iterator[_Arrival | BadRow]:
    """Every row of the file, judged by itself."""
    installs = _installs_of(text)
    if installs is not None:
        for number, (install_id, value) in enumerate(installs, start=1):
            try:
                yield _install(catalogue, number, install_id, value, now)
            except _WrongError as wrong:
                shown = _printable(install_id)
                yield BadRow(number, shown, wrong.field, f"{wrong.reason}, install {shown}")
        return
    for number, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        line: object = None
        try:
            line = _value_of(written)
            yield _Arrival(number, _account_state(catalogue, _parse(_AccountRow, line)), {})
        except _WrongError as wrong:
            named = line.get("user_id") if isinstance(line, dict) else None
            yield BadRow(number, _printable(named) if isinstance(named, str) else "", wrong.field, wrong.reason)


class _Install(_Row):
    install_id: Identifier


def _install(catalogue: Catalogue, number: int, install_id: str, value: object, now: datetime) -> _Arrival:
    _parse(_Install, {"install_id": install_id})
    if isinstance(value, _Repeated):
        raise _WrongError(value.repeated(), "must be given once")
    row = _parse(_RelayRow, value)
    facts = {} if row.last_active_at is None else {"last_active_at": row.last_active_at}
    return _Arrival(number, _relay_state(catalogue, install_id, row, now), facts)


class _Repeated(dict[str, Any]):
    """A JSON object that names something twice, of which a plain one would keep the last."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs

    def repeated(self) -> str:
        """The name that is given most often."""
        return Counter(name for name, _ in self.pairs).most_common(1)[0][0]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeated(pairs)


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = _object(pairs)
    if isinstance(found, _Repeated):
        raise _WrongError(found.repeated(), "must be given once")
    return found


def _installs_of(text: str) -> list[tuple[str, Any]] | None:
    """Install ids and rows, where the text is the ledger of a relay: an object with `rows`. Other names are ignored."""
    try:
        # Ends behind the first line of an export, where more follows.
        whole = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return None
    rows = whole.get("rows") if isinstance(whole, dict) else None
    if not isinstance(rows, dict):
        return None
    return rows.pairs if isinstance(rows, _Repeated) else list(rows.items())


def _value_of(line: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=_unambiguous)
    except _WrongError:
        raise
    except (ValueError, RecursionError) as error:
        raise _WrongError("row", f"must be JSON: {error} (got {line.strip()!r:.64})") from None
