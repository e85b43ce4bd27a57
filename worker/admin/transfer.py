"""Move accounts between ledgers, as JSON lines; import them also from the ledger file of a relay.

A line is the stored state of one account: plan, status, schedule, when, by whom and why it was opened, and each meter
with its terms, open period, buckets, purchases and lifetime counters; and its own rules of notices, if any. Notices
that were told stay. History stays in the old ledger: sequence
numbers, usage and ledger entries. So the new ledger knows no earlier event; move accounts after their streams are
drained. It knows the orders and invoices that the account used: none counts again, and refunds take no more than an
order gave.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args

import psycopg
from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
)

from config.catalogue import TRUST_TIERS, Allowance, Catalogue, NoticeRule, TimeZone
from schemas.events import MAX_AMOUNT, MAX_TOTAL, Identifier, MeterCode
from worker.admin.accounts import ENDING_STATUSES
from worker.admin.change import MAX_CAUSE, cause_of, refresh, refresh_trust
from worker.admin.relay_import import install, installs_of
from worker.admin.transfer_rows import (
    Arrival,
    BadRow,
    Row,
    Time,
    Total,
    WrongValue,
    one_of,
    parse_row,
    printable,
    require_known,
    unambiguous,
)
from worker.crash import crash_point
from worker.errors import AccountError
from worker.ledger import batch
from worker.ledger.accounts import State, closed_users, existing_accounts, next_states
from worker.ledger.connection import Postgres, batch_connection, begin_snapshot, read_clock
from worker.ledger.orders import OrderKind, claim_keys, claimed_keys, keys_of, read_credits
from worker.resources import Resources
from worker.rules.account import Account, Backing, Balance, Cause, Parked, Waiting, schedule_of
from worker.rules.calendar import CALENDAR_CADENCES, boundary
from worker.rules.credits import Order, Purchases, purchases_of
from worker.rules.fractions import MILLIONTHS
from worker.rules.grants import CATEGORIES, FIRST_PRIORITY, LAST_PRIORITY, MAX_GRANTS, UNNAMED, Grant, Grants
from worker.rules.history import opened_account, record
from worker.rules.limits import PERS, SETTERS, Limits, Window
from worker.rules.periods import vouched
from worker.rules.rows import Changed, EntryRow, Limited, Writes
from worker.rules.waterfall import STATUSES

_CHUNK_ACCOUNTS = 1_000
# An export waits for its reader, perhaps a pager; it holds no locks meanwhile.
_READER_TIMEOUT_MS = 600_000

# Opens a counter by name; the counter receives the progress so far.
Watch = Callable[[str], AbstractContextManager[Callable[[int], object]]]


class Imported(NamedTuple):
    """The number of imported accounts, and the rows that were not imported."""

    accounts: int
    bad: list[BadRow]


# ---------------------------------------------------------------------------------------------------------------------
# Out


def export_accounts(
    resources: Resources, write: Callable[[str], object], progress: Callable[[int], object] | None = None
) -> int:
    """Write every open account as a line of JSON, by user id; return their number.

    The lines show one moment of the ledger, read in chunks. They hold the stored state: due boundaries are not applied.
    `progress` receives the number of accounts written so far.
    """
    accounts = 0
    after = ""  # before every id
    with batch_connection(resources.engine) as postgres:
        begin_snapshot(postgres, idle_timeout_ms=_READER_TIMEOUT_MS)
        while states := [*_with_orders(postgres, next_states(postgres, after, _CHUNK_ACCOUNTS))]:
            write("".join(_line_of(state) for state in states))
            after = states[-1].account.user_id
            accounts += len(states)
            if progress is not None:
                progress(accounts)
    return accounts


def _with_orders(postgres: Postgres, states: Sequence[State]) -> Iterator[State]:
    users = [state.account.user_id for state in states]
    keys = keys_of(postgres, users)
    entries: dict[str, dict[str, list[EntryRow]]] = {}
    for entry in read_credits(postgres, users):
        entries.setdefault(entry.user_id, {}).setdefault(entry.meter, []).append(entry)
    for user_id, state in zip(users, states, strict=True):
        purchases = {meter: purchases_of(made) for meter, made in entries.get(user_id, {}).items()}
        yield state._replace(keys=keys.get(user_id, {}), purchases=purchases)


def _line_of(state: State) -> str:
    account, opened_at, counters, opened, keys, purchases = state
    meters = {
        meter: {**_meter_of(balance, *counters[meter]), "purchases": (made := purchases.get(meter)) and made.as_json()}
        for meter, balance in account.balances.items()
    }
    about = {"user_id": account.user_id, "plan": account.plan, "status": account.status, "trust": account.trust}
    opening = {"opened_at": opened_at, "opened_by": opened.actor, "opened_reason": opened.reason}
    rules = account.notices
    own = {} if rules is None else {"notices": [rule.as_json() for rule in rules]}
    line = {**about, **schedule_of(account), **own, **opening, "orders": dict(keys), "meters": meters}
    return json.dumps(line, default=datetime.isoformat, separators=(",", ":")) + "\n"


def _meter_of(balance: Balance, consumed: int, granted: int) -> dict[str, object]:
    fields = {
        **balance._asdict(),
        "parked": balance.parked and balance.parked.as_json(),
        "grants": balance.grants and balance.grants.as_json(),
        "limits": balance.limits and balance.limits.as_json(),
    }
    del fields["meter"]
    return {**fields, "lifetime_consumed": consumed, "lifetime_granted": granted}


# ---------------------------------------------------------------------------------------------------------------------
# In


def import_accounts(
    resources: Resources,
    text: str,
    *,
    skip_bad: bool = False,
    watch: Watch | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> Imported:
    """Open the accounts of `text`: lines of an export, or the ledger of a relay.

    A relay's ledger is a JSON object with `rows` by install id. The import checks everything first, then writes in one
    transaction: killed or failed before its COMMIT, nothing is imported. After it Redis is asked to publish the
    accounts; if that fails, or we die, its cached balances expire.
    Raises AccountError that names the first bad row, its field and the values allowed. With `skip_bad` it imports the
    other rows and returns the bad ones. A row of a user with an account is bad, so a repeat imports nothing.
    """
    cause = cause_of(actor, reason)
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
                _store(resources, arrivals, now, cause, progress)
            break
        except psycopg.errors.UniqueViolation:
            continue  # another call opened one of them since the last look
    for chunk in _chunks(arrivals):
        accounts = [arrival.state.account for arrival in chunk]
        refresh(resources, [account.user_id for account in accounts])
        refresh_trust(resources, [account.user_id for account in accounts if account.trust != TRUST_TIERS[0]])
    return Imported(len(arrivals), bad)


def count_rows(text: str) -> int:
    """Return the number of accounts that an import of `text` is about, good or bad."""
    installs = installs_of(text)
    return sum(bool(line.strip()) for line in text.split("\n")) if installs is None else len(installs)


def _more(rows: int) -> str:
    return f"; and {rows} more bad row{'s' if rows > 1 else ''}" if rows else ""


def _judge(rows: Iterable[Arrival | BadRow], progress: Callable[[int], object]) -> tuple[list[Arrival], list[BadRow]]:
    """Sort rows into good and bad; of the rows of one user, or with one order, all but the first are bad."""
    arrivals: dict[str, Arrival] = {}
    claimed: dict[tuple[str, str], int] = {}
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
                continue
            twice = [(claim, claimed[claim]) for claim in _claims_of(row) if claim in claimed]
            if twice:
                (_, key), where = twice[0]
                del arrivals[user_id]
                bad.append(BadRow(row.row, user_id, "orders", f"must be in the file once ({key} is in row {where})"))
            claimed |= {claim: row.row for claim in _claims_of(row) if claim not in claimed}
        if count % _CHUNK_ACCOUNTS == 0:
            progress(count)
    return list(arrivals.values()), bad


def _without_existing(
    resources: Resources, arrivals: list[Arrival], bad: list[BadRow]
) -> tuple[list[Arrival], list[BadRow]]:
    """Move the rows of users that have or had an account, and those with a used order, to the bad ones."""
    existing: dict[str, str] = {}
    used: set[tuple[str, str]] = set()
    with batch_connection(resources.engine) as postgres:
        for chunk in _chunks(arrivals):
            users = [arrival.state.account.user_id for arrival in chunk]
            existing |= dict.fromkeys(existing_accounts(postgres, users), "has an account already")
            existing |= dict.fromkeys(closed_users(postgres, users), "was closed for good")
            claims = [claim for arrival in chunk for claim in _claims_of(arrival)]
            used |= claimed_keys(postgres, claims)
    good, found = [], []
    for arrival in arrivals:
        user_id = arrival.state.account.user_id
        taken = [key for kind, key in _claims_of(arrival) if (kind, key) in used]
        if user_id in existing:
            wrong = f"must be new (got {user_id!r}, which {existing[user_id]})"
            found.append(BadRow(arrival.row, user_id, "user_id", wrong))
        elif taken:
            wrong = f"must be new (got {taken[0]!r}, which was used by another account)"
            found.append(BadRow(arrival.row, user_id, "orders", wrong))
        else:
            good.append(arrival)
    return good, sorted([*bad, *found])


def _claims_of(arrival: Arrival) -> list[tuple[OrderKind, str]]:
    """Return the orders and invoices that an account brings along."""
    return [(kind, key) for kind in get_args(OrderKind) for key in arrival.state.keys.get(kind, ())]


def _store(
    resources: Resources,
    arrivals: Iterable[Arrival],
    now: datetime,
    cause: Cause,
    progress: Callable[[int], object],
) -> None:
    """Write all accounts, or none."""
    written = 0
    # In the lock order, over all chunks; see worker/ledger/__init__.py.
    in_order = sorted(arrivals, key=lambda arrival: arrival.state.account.user_id)
    with batch_connection(resources.engine) as postgres:
        for chunk in _chunks(in_order):
            writes = Writes.none()
            for arrival in chunk:
                _open(writes, arrival, now, cause)
            batch.store(postgres, writes, now, {arrival.state.account.user_id: arrival.state for arrival in chunk})
            crash_point("inside_import")
            written += len(chunk)
            progress(written)
        claims = [(*claim, arrival.state.account.user_id) for arrival in in_order for claim in _claims_of(arrival)]
        claim_keys(postgres, claims)
        postgres.commit()


def _open(writes: Writes, arrival: Arrival, now: datetime, cause: Cause) -> None:
    """Add an account, its contents and its ledger entries to `writes`."""
    account, counters, purchases = arrival.state.account, arrival.state.counters, arrival.state.purchases
    steps = opened_account(account, cause, imported=True, **arrival.facts)
    for at, step in enumerate(steps):
        if step.meter:
            consumed, granted = counters[step.meter]
            detail: dict[str, Any] = {"lifetime_consumed": consumed, "lifetime_granted": granted}
            brought = purchases.get(step.meter)
            if brought is not None:
                detail["purchases"] = brought.as_json()
            steps[at] = step._replace(detail=detail)
    writes.opened_accounts.append(record(writes, account, steps, now))
    for meter, balance in account.balances.items():
        consumed, granted = counters[meter]
        writes.opened_balances.append(
            Changed(user_id=account.user_id, balance=balance, consumed=consumed, granted=granted)
        )
        if balance.limits is not None:
            writes.limits.append(Limited(account.user_id, meter, balance.limits))


def _chunks(arrivals: Iterable[Arrival]) -> Iterator[list[Arrival]]:
    rest = iter(arrivals)
    while chunk := list(islice(rest, _CHUNK_ACCOUNTS)):
        yield chunk


def _unwatched(_: str) -> AbstractContextManager[Callable[[int], object]]:
    return nullcontext(lambda _: None)


# ---------------------------------------------------------------------------------------------------------------------
# Values of a row


Units = Annotated[int, Field(ge=0, le=MAX_AMOUNT)]


# ---------------------------------------------------------------------------------------------------------------------
# Rows of an export


class _ParkedRow(Row):
    period_start: Time
    used: Total
    cap_used: dict[MeterCode, Total] | None


class _GrantRow(Row):
    """A grant. One without a key belongs to no order, and no number of units was given."""

    key: Identifier | Literal[""]
    given: Total | None
    left: Annotated[int, Field(ge=1, le=MAX_TOTAL)]
    category: Annotated[str, one_of(*CATEGORIES)]
    priority: Annotated[int, Field(ge=FIRST_PRIORITY, le=LAST_PRIORITY)]
    effective_at: Time
    expires_at: Time | None
    created_at: Time

    @field_validator("given")
    @classmethod
    def _of_an_order(cls, given: int | None, info: ValidationInfo) -> int | None:
        if "key" in info.data and (info.data["key"] == "") != (given is None):
            raise ValueError("must be a number with a key, and null without")
        return given

    @field_validator("left")
    @classmethod
    def _at_most_given(cls, left: int, info: ValidationInfo) -> int:
        given = info.data.get("given")
        if given is not None and left > given:
            raise ValueError(f"must be at most given ({given})")
        return left

    @field_validator("expires_at")
    @classmethod
    def _after_its_start(cls, end: datetime | None, info: ValidationInfo) -> datetime | None:
        start = info.data.get("effective_at")
        if end is not None and start is not None and end <= start:
            raise ValueError(f"must be after effective_at ({start.isoformat()})")
        return end

    def grant(self) -> Grant:
        """Return the grant of this row."""
        return Grant(**self.model_dump())


class _GrantsRow(Row):
    in_force: Annotated[tuple[_GrantRow, ...], Field(strict=False, max_length=MAX_GRANTS)]
    to_come: Annotated[tuple[_GrantRow, ...], Field(strict=False, max_length=MAX_GRANTS)]

    @field_validator("to_come")
    @classmethod
    def _each_once(cls, to_come: tuple[_GrantRow, ...], info: ValidationInfo) -> tuple[_GrantRow, ...]:
        keys = [row.key for row in (*info.data.get("in_force", ()), *to_come)]
        if len(keys) > len(set(keys)):
            raise ValueError("each grant must be there once")
        return to_come

    def grants(self) -> Grants:
        """Return the grants of this row, in the order in which they pay."""
        in_force = Grants().plus(row.grant() for row in self.in_force)
        return in_force.plus((row.grant() for row in self.to_come), to_come=True)


class _WindowRow(Row):
    starts: Time
    ends: Time
    since: Total
    used: Annotated[int, Field(ge=-MAX_TOTAL, le=MAX_TOTAL)]

    @field_validator("ends")
    @classmethod
    def _after_its_start(cls, ends: datetime, info: ValidationInfo) -> datetime:
        starts = info.data.get("starts")
        if starts is not None and ends <= starts:
            raise ValueError(f"must be after starts ({starts.isoformat()})")
        return ends


_Per = Annotated[str, one_of(*PERS)]


class _LimitsRow(Row):
    """The limits of a meter by setter and window, and the windows that are open."""

    amounts: dict[Annotated[str, one_of(*SETTERS)], dict[_Per, Annotated[int, Field(ge=1, le=MAX_AMOUNT)]]]
    windows: dict[_Per, _WindowRow]

    @field_validator("windows")
    @classmethod
    def _of_limits(cls, windows: dict[str, _WindowRow], info: ValidationInfo) -> dict[str, _WindowRow]:
        amounts = info.data.get("amounts")
        pers = set(windows) if amounts is None else {per for of_setter in amounts.values() for per in of_setter}
        if not pers:
            raise ValueError("must be null without any limit, and not empty")
        if set(windows) - pers:
            raise ValueError(f"must have windows with a limit only ({', '.join(sorted(pers))})")
        return windows

    def limits(self) -> Limits:
        """Return the limits of this row. All changes of the new ledger are after the start of their windows."""
        windows = {per: Window(row.starts, row.ends, 0, row.used) for per, row in self.windows.items()}
        return Limits(cast("Any", self.amounts), cast("Any", windows))


class _OrderRow(Row):
    given: Total
    taken: Total
    carried: bool
    # Exports of earlier releases lack these.
    expired: Total = 0
    grant: _GrantRow | None = None

    def order(self) -> Order:
        """Return the order of this row."""
        grant = self.grant.grant() if self.grant is not None else None
        return Order(self.given, self.taken, self.carried, self.expired, grant)


class _PurchasesRow(Row):
    bought: Annotated[int, Field(ge=-MAX_TOTAL, le=MAX_TOTAL)]
    orders: dict[Identifier, _OrderRow]

    def purchases(self) -> Purchases:
        """Return the purchases of this row."""
        return Purchases(self.bought, {key: row.order() for key, row in self.orders.items()})


class _KeysRow(Row):
    """The orders and invoices that an account used."""

    grant: list[Identifier] = Field(default_factory=list)
    renew: list[Identifier] = Field(default_factory=list)


class _MeterRow(Row):
    """The fields of a Balance, in their order, and its lifetime counters."""

    allowance: Units | None
    spill: bool
    rollover_cap: Units
    caps: dict[MeterCode, Units | None] | None
    cadence: Annotated[str, one_of(*get_args(Allowance.model_fields["cadence"].annotation))]
    anchor: Annotated[str, one_of(*get_args(Allowance.model_fields["anchor"].annotation))]
    timezone: TimeZone | None = None  # exports of earlier releases lack it
    anchored_at: Time
    period_index: Annotated[int, Field(ge=-1, le=MAX_AMOUNT)]
    period_start: Time
    period_end: Time | None
    # Exports of earlier releases lack both.
    backing: Annotated[str, one_of(*get_args(Backing))] | None = None
    counted_from: Time | None = None
    used: Total
    rollover: Annotated[int, Field(ge=-MAX_TOTAL, le=MAX_TOTAL)]
    purchased: Total
    cap_used: dict[MeterCode, Total] | None
    parked: _ParkedRow | None
    # Exports of earlier releases lack it.
    carried: Annotated[int, Field(ge=0, lt=MILLIONTHS)] = 0
    # Exports of earlier releases lack it: no order gave any of the purchased units.
    grants: _GrantsRow | None = None
    # Exports of earlier releases lack it.
    limits: _LimitsRow | None = None
    lifetime_consumed: Total
    lifetime_granted: Total
    # Exports of earlier releases lack it.
    purchases: Annotated[_PurchasesRow | None, Field(validate_default=True)] = None

    @field_validator("period_end")
    @classmethod
    def _ends_as_its_terms_say(cls, end: datetime | None, info: ValidationInfo) -> datetime | None:
        terms = info.data
        if {"cadence", "anchor", "timezone", "anchored_at", "period_index", "period_start"} - terms.keys():
            return end  # one of them is wrong, and is named instead
        calendar = terms["cadence"] in CALENDAR_CADENCES
        if end is None and calendar:
            raise ValueError(f"must be a time, as the cadence is {terms['cadence']}")
        if end is not None and end <= terms["period_start"]:
            raise ValueError(f"must be after period_start ({terms['period_start'].isoformat()})")
        if calendar and terms["anchor"] == "sticky":
            due = _boundary_after(terms["anchored_at"], terms["cadence"], terms["period_index"], terms["timezone"])
            if end != due:
                raise ValueError(
                    f"must be {due.isoformat()}, the boundary that follows from anchored_at and period_index"
                )
        return end

    @field_validator("grants")
    @classmethod
    def _sum_to_purchased(cls, grants: _GrantsRow | None, info: ValidationInfo) -> _GrantsRow | None:
        purchased = info.data.get("purchased")
        if grants is not None and purchased is not None and grants.grants().units() != purchased:
            raise ValueError(f"must have purchased units left in force ({purchased})")
        return grants

    @field_validator("purchases")
    @classmethod
    def _have_the_order_of_each_grant(
        cls, purchases: _PurchasesRow | None, info: ValidationInfo
    ) -> _PurchasesRow | None:
        """A refund, a report and what returns to a grant go by its order."""
        grants, orders = info.data.get("grants"), purchases.purchases().orders if purchases is not None else {}
        for grant in () if grants is None else (row.grant() for row in (*grants.in_force, *grants.to_come)):
            order = orders.get(grant.key)
            same = order is not None and order.grant is not None and order.grant._replace(left=grant.left) == grant
            if grant.key != UNNAMED and not same:
                raise ValueError(f"must have the order of the grant {grant.key!r}, with the same terms")
        return purchases

    def balance(self, meter: str) -> Balance:
        """Return the balance of `meter` in this row."""
        parked = Parked(self.parked.period_start, self.parked.used, self.parked.cap_used) if self.parked else None
        found: dict[str, Any] = {
            name: getattr(self, name) for name in Balance._fields if name not in ("meter", "parked")
        }
        found["grants"] = self.grants.grants().packed() if self.grants is not None else None
        found["limits"] = self.limits.limits() if self.limits is not None else None
        found["counted_from"] = self.counted_from or self.period_start
        if self.cadence == "subscription":
            found["backing"] = self.backing or vouched(self.period_end)
        return Balance(meter=meter, **found, parked=parked)


def _boundary_after(anchor: datetime, cadence: str, index: int, timezone: str | None) -> datetime:
    try:
        return boundary(anchor, cadence, index + 1, timezone)
    except (ValueError, OverflowError):
        raise ValueError("must be within the calendar, and so must the boundary after period_index") from None


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable characters")
    return text


_CauseText = Annotated[str, Field(min_length=1, max_length=MAX_CAUSE), AfterValidator(_printable)]


class _WaitingRow(Row):
    kind: Annotated[str, one_of("invoice", "plan", "status", "period", "next_plan", "next_status")]
    at: Time
    name: Identifier
    period_start: Time | None
    period_end: Time | None

    def change(self) -> Waiting:
        """Return the change that waits."""
        return Waiting(cast("Any", self.kind), self.at, self.name, self.period_start, self.period_end)


class _AccountRow(Row):
    """A line of an export."""

    user_id: Identifier
    plan: str
    status: Annotated[str, one_of(*STATUSES)]
    trust: Annotated[str, one_of(*TRUST_TIERS)]
    highest_tier: Annotated[int, Field(ge=0, le=2**31 - 1)]
    next_plan: str | None
    plan_change_at: Time | None
    next_status: Annotated[str, one_of(*ENDING_STATUSES)] | None
    status_change_at: Time | None
    opened_at: Time
    # Exports of earlier releases lack these.
    opened_by: _CauseText | None = None
    opened_reason: _CauseText | None = None
    orders: _KeysRow = _KeysRow()
    paid_from: Time | None = None
    paid_until: Time | None = None
    waiting: Annotated[tuple[_WaitingRow, ...], Field(strict=False)] = ()
    timezone: TimeZone | None = None
    pay_from: Annotated[str, one_of("allowance")] | None = None
    notices: Annotated[tuple[NoticeRule, ...], Field(strict=False)] | None = None
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
    """Return the account of a line.

    Raises WrongValue for a plan or a meter that the catalogue lacks.
    """
    require_known("plan", row.plan, catalogue.plans)
    require_known("next_plan", row.next_plan, catalogue.plans)
    for meter in row.meters:
        require_known("meters", meter, catalogue.meters)
    balances = {meter: found.balance(meter) for meter, found in row.meters.items()}
    account = Account(
        user_id=row.user_id,
        plan=row.plan,
        status=row.status,
        trust=row.trust,
        version=0,
        balances=balances,
        highest_tier=row.highest_tier,
        next_plan=row.next_plan,
        plan_change_at=row.plan_change_at,
        next_status=row.next_status,
        status_change_at=row.status_change_at,
        paid_from=row.paid_from,
        paid_until=row.paid_until,
        waiting=tuple(change.change() for change in row.waiting),
        timezone=row.timezone,
        pay_from=row.pay_from,
        notices=row.notices,
    )
    lives = {meter: (found.lifetime_consumed, found.lifetime_granted) for meter, found in row.meters.items()}
    purchases = {meter: found.purchases.purchases() for meter, found in row.meters.items() if found.purchases}
    keys = {kind: used for kind, used in row.orders if used}
    opened = Cause(actor=row.opened_by, reason=row.opened_reason)
    return State(account, row.opened_at, lives, opened, keys, purchases)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of either kind of file


def _rows_of(catalogue: Catalogue, text: str, now: datetime) -> Iterator[Arrival | BadRow]:
    """Yield every row of the file, judged by itself."""
    installs = installs_of(text)
    if installs is not None:
        for number, (install_id, value) in enumerate(installs, start=1):
            try:
                yield install(catalogue, number, install_id, value, now)
            except WrongValue as wrong:
                shown = printable(install_id)
                yield BadRow(number, shown, wrong.field, f"{wrong.reason}, install {shown}")
        return
    for number, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        line: object = None
        try:
            line = _value_of(written)
            yield Arrival(number, _account_state(catalogue, parse_row(_AccountRow, line)), {})
        except WrongValue as wrong:
            named = line.get("user_id") if isinstance(line, dict) else None
            yield BadRow(number, printable(named) if isinstance(named, str) else "", wrong.field, wrong.reason)


def _value_of(line: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=unambiguous)
    except WrongValue:
        raise
    except (ValueError, RecursionError) as error:
        raise WrongValue("row", f"must be JSON: {error} (got {line.strip()!r:.64})") from None
