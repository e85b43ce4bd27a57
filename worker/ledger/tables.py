"""The ledger's schema at a glance: every table, as the migrations leave it.

The migrations make the tables; this module creates nothing in production, and no dyno imports it. A test compares it
with a migrated database. Triggers and functions are in the migrations alone.

- Ids sort by bytes (`COLLATE "C"`): index comparisons are cheaper, and every server locks accounts in the same order.
- The keys of an account's tables begin with user_id, so that the tables can be spread over servers by that column.
- `account` and `balance` have no index on a column that usage changes, and pages with room: updates stay within a page.
- Constraints have the names that Postgres gives them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, INT4MULTIRANGE, JSONB
from sqlalchemy.types import TypeEngine

SCHEMA = MetaData()

_ID = Text(collation="C")
_TEXT = Text()
_UNITS = BigInteger()
_COUNT = Integer()
_FLAG = Boolean()
_TIME = DateTime(timezone=True)
_BYTES = LargeBinary()
_PAGES = INT4MULTIRANGE()
_UNITS_BY_DAY = ARRAY(BigInteger())

# The greatest amount of one event, hold or allowance, and the most that a bucket takes.
_AMOUNT = "BETWEEN 0 AND 1000000000000"
_BUCKET = "BETWEEN 0 AND 9000000000000000"
_DEBT_OR_BUCKET = "BETWEEN -9000000000000000 AND 9000000000000000"


def _column(name: str, kind: TypeEngine[Any], check: str = "", *, null: bool = False, default: str = "") -> Column[Any]:
    """Return a column, NOT NULL unless `null`; `check` and `default` are SQL."""
    checks = [CheckConstraint(check)] if check else []
    return Column(name, kind, *checks, nullable=null, server_default=text(default) if default else None)


def _number() -> Column[Any]:
    """Return the column of a row's number, which Postgres counts."""
    return Column("id", BigInteger, Identity(always=True), primary_key=True)


def _user_of_account() -> Column[Any]:
    """Return the user column of a row that needs its account."""
    return Column("user_id", _ID, ForeignKey("account.user_id"), nullable=False)


# ---------------------------------------------------------------------------------------------------------------------
# Accounts and their buckets

# One row: the ledger itself. The names of closed accounts' histories are hashed with `pseudonym_key`.
ledger = Table(
    "ledger",
    SCHEMA,
    _column("only_row", _FLAG, "only_row", default="true"),
    _column("epoch", _UNITS, "epoch > 0", default="1"),
    _column("partitions", _COUNT, "partitions BETWEEN 1 AND 1024", null=True),
    _column("created_at", _TIME, default="clock_timestamp()"),
    _column("pseudonym_key", Uuid(), default="gen_random_uuid()"),
    PrimaryKeyConstraint("only_row"),
)

# `seq` numbers every change of the account, usage or ledger entry, without a gap.
account = Table(
    "account",
    SCHEMA,
    _column("user_id", _ID, "length(user_id) BETWEEN 1 AND 128"),
    _column("plan", _TEXT),
    _column(
        "status",
        _TEXT,
        "status IN ('active', 'past_due', 'trialing', 'canceled', 'expired', 'paused', 'unpaid', 'incomplete', "
        "'incomplete_expired', 'suspended', 'closed')",
    ),
    _column("trust", _TEXT, "trust IN ('new', 'established', 'trusted', 'elite')", default="'new'"),
    _column("seq", _UNITS, "seq >= 0", default="0"),
    _column("opened_at", _TIME),
    _column("highest_tier", _COUNT, "highest_tier >= 0", default="0"),
    _column("next_plan", _TEXT, null=True),
    _column("plan_change_at", _TIME, "plan_change_at IS NULL OR next_plan IS NOT NULL", null=True),
    _column("next_status", _TEXT, "next_status IN ('canceled', 'expired')", null=True),
    _column("status_change_at", _TIME, "(status_change_at IS NULL) = (next_status IS NULL)", null=True),
    _column("opened_by", _TEXT, null=True),
    _column("opened_reason", _TEXT, null=True),
    _column("paid_from", _TIME, null=True),
    _column("paid_until", _TIME, null=True),
    _column("waiting", JSONB(), null=True),
    _column("waiting_at", _TIME, null=True),
    _column("timezone", _TEXT, null=True),
    _column("reopened", _COUNT, "reopened >= 0", default="0"),
    _column("pay_from", _TEXT, "pay_from = 'allowance'", null=True),
    # Its own rules of notices, in force instead of the plan's.
    _column("notices", JSONB(), null=True),
    PrimaryKeyConstraint("user_id"),
    postgresql_with={"fillfactor": 70},
)
# The accounts with a scheduled change, the next due first.
Index(
    "account_change_due",
    func.least(account.c.plan_change_at, account.c.status_change_at),
    account.c.user_id,
    postgresql_where=text("plan_change_at IS NOT NULL OR status_change_at IS NOT NULL"),
)

# The accounts with a change that waits, the next due first.
Index("account_waiting", account.c.waiting_at, account.c.user_id, postgresql_where=text("waiting_at IS NOT NULL"))

# The accounts by their name in logs: the first 12 hexadecimal digits of the SHA-256 of the id.
Index("account_log_name", text("substr(sha256(decode(user_id, 'escape')), 1, 6)"), _table=account)

# One row per account and meter: the terms of the open period, and the buckets.
balance = Table(
    "balance",
    SCHEMA,
    _user_of_account(),
    _column("meter", _ID),
    _column("allowance", _UNITS, f"allowance {_AMOUNT}", null=True),
    _column("spill", _FLAG),
    _column("rollover_cap", _UNITS, f"rollover_cap {_AMOUNT}"),
    _column("cadence", _TEXT, "cadence IN ('subscription', 'monthly', 'weekly', 'daily', 'lifetime', 'off')"),
    _column("anchor", _TEXT, "anchor IN ('sticky', 'floating')"),
    _column("anchored_at", _TIME),
    _column("period_index", _UNITS, "period_index >= -1"),
    _column("period_start", _TIME),
    _column("period_end", _TIME, "period_end > period_start", null=True),
    _column("used", _UNITS, f"used {_BUCKET}", default="0"),
    _column("rollover", _UNITS, f"rollover {_DEBT_OR_BUCKET}", default="0"),
    _column("purchased", _UNITS, f"purchased {_BUCKET}", default="0"),
    _column("lifetime_consumed", _UNITS, f"lifetime_consumed {_BUCKET}", default="0"),
    _column("lifetime_granted", _UNITS, f"lifetime_granted {_BUCKET}", default="0"),
    _column("caps", JSONB(), null=True),
    _column("cap_used", JSONB(), null=True),
    _column("parked", JSONB(), null=True),
    _column("backing", _TEXT, "backing IN ('none', 'trial', 'bounds', 'invoice', 'grace', 'missing')", null=True),
    _column("counted_from", _TIME, null=True),
    _column("timezone", _TEXT, null=True),
    # Millionths of a unit that events left over.
    _column("carried", _COUNT, "carried BETWEEN 0 AND 999999", default="0"),
    # What is left of each grant, in the order in which they pay; NULL if no order gave any purchased unit. And when the
    # next of them starts or ends, which a trigger fills in.
    _column("grants", JSONB(), null=True),
    _column("grants_due", _TIME, null=True),
    # The limits per day, week and month, and the open windows; NULL without limits. `counted` in it is what
    # lifetime_consumed was when it was written.
    _column("limits", JSONB(), "limits ?& ARRAY['amounts', 'windows', 'counted']", null=True),
    CheckConstraint("grants IS NULL OR grants_fit(grants, purchased)", name="balance_grants_check"),
    PrimaryKeyConstraint("user_id", "meter"),
    postgresql_with={"fillfactor": 70},
)
# The periods that end by the calendar, used or not, the next due first.
Index(
    "balance_due",
    balance.c.period_end,
    balance.c.user_id,
    postgresql_where=text("anchor = 'sticky' AND cadence IN ('monthly', 'weekly', 'daily')"),
)
# The periods that end by the payment provider's word.
Index(
    "balance_provided",
    balance.c.period_end,
    balance.c.user_id,
    postgresql_where=text("cadence = 'subscription' AND period_end IS NOT NULL"),
)
# The grants that start or end, the next due first.
Index(
    "balance_grants_due",
    balance.c.grants_due,
    balance.c.user_id,
    postgresql_where=text("grants_due IS NOT NULL"),
)

# Holds that the ledger granted alone while Redis was down.
ledger_hold = Table(
    "ledger_hold",
    SCHEMA,
    _user_of_account(),
    _column("hold_key", _ID),
    _column("meter", _ID),
    _column("amount", _UNITS, f"amount {_AMOUNT}"),
    _column("expires_at", _TIME),
    _column("backend", _TEXT, null=True),
    PrimaryKeyConstraint("user_id", "hold_key"),
)

# ---------------------------------------------------------------------------------------------------------------------
# History: append-only, save for the erasure of an account

# One row per event. Without an account an event has no `seq` and no period, and its amount is uncollected.
usage_log = Table(
    "usage_log",
    SCHEMA,
    _column("user_id", _ID),
    _column("event_id", _ID),
    _column("seq", _UNITS, null=True),
    _column("meter", _ID),
    _column("quantity", _UNITS, f"quantity {_AMOUNT}"),
    _column("multiplier", Numeric(), "multiplier >= 0"),
    _column("amount", _UNITS, f"amount {_AMOUNT}"),
    _column("from_subscription", _UNITS, "from_subscription >= 0"),
    _column("from_rollover", _UNITS, "from_rollover >= 0"),
    _column("from_purchased", _UNITS, "from_purchased >= 0"),
    _column("overflow_to_debt", _UNITS, "overflow_to_debt >= 0"),
    _column("uncollected", _UNITS, "uncollected >= 0"),
    _column("period_start", _TIME, null=True),
    _column("occurred_at", _TIME),
    _column("applied_at", _TIME),
    _column("clamped", _FLAG),
    _column("source", _TEXT, null=True),
    _column("reference_id", _TEXT, null=True),
    _column("hold_key", _TEXT, null=True),
    _column("dimensions", JSONB(), null=True),
    # Millionths carried after the event; below zero, those by which it was rounded up.
    _column("remainder", _COUNT, null=True),
    # 32 hexadecimal digits.
    _column("trace_id", _ID, null=True),
    # The units that it took of each grant, by key; NULL if it took none, or if no order gave them.
    _column("grants", JSONB(), null=True),
    # The meter that paid instead, and how many of its units each unit of this meter costs: amount, parts and remainder
    # are then in units of the wallet.
    _column("wallet", _ID, null=True),
    _column("price", Numeric(), null=True),
    PrimaryKeyConstraint("user_id", "event_id"),
    UniqueConstraint("user_id", "seq"),
    CheckConstraint(
        "from_subscription + from_rollover + from_purchased + overflow_to_debt + uncollected = amount",
        name="usage_log_parts_sum",
    ),
    CheckConstraint("(seq IS NULL) = (period_start IS NULL)", name="usage_log_collected"),
    # Events without an account alone: an event of an account costs nothing here.
    Index(
        "usage_log_uncollected", "occurred_at", "user_id", "meter",
        postgresql_include=["amount"], postgresql_where=text("seq IS NULL"),
    ),
)  # fmt: skip

# Events that came again after their outcome was forgotten. Not append-only: no balance depends on it.
late_repeat = Table(
    "late_repeat",
    SCHEMA,
    _column("user_id", _ID),
    _column("event_id", _ID),
    _column("times", _UNITS, "times > 0"),
    _column("last_at", _TIME),
    PrimaryKeyConstraint("user_id", "event_id"),
    Index("late_repeat_time", "last_at"),
)

# Pending ids whose stream entries were lost, as operators freed them.
freed_pending = Table(
    "freed_pending",
    SCHEMA,
    _number(),
    _column("freed_at", _TIME, default="clock_timestamp()"),
    _column("freed_by", _ID, null=True),
    _column("reason", _ID, null=True),
    _column("partition_id", _COUNT),
    _column("user_id", _ID),
    _column("meter", _ID),
    _column("event_id", _ID),
    _column("units", _UNITS, "units >= 0"),
    _column("is_recorded", _FLAG),
    Index("freed_pending_user", "user_id", "event_id"),
)

# Every change that is not usage, with the balances after it. A ledger entry about the whole account has the meter ''.
ledger_entry = Table(
    "ledger_entry",
    SCHEMA,
    _user_of_account(),
    _column("seq", _UNITS),
    _column("entry_key", _ID),
    _column("meter", _ID),
    _column("kind", _TEXT),
    _column("used_change", _UNITS),
    _column("rollover_change", _UNITS),
    _column("purchased_change", _UNITS),
    _column("used_after", _UNITS),
    _column("rollover_after", _UNITS),
    _column("purchased_after", _UNITS),
    _column("detail", JSONB()),
    _column("created_at", _TIME),
    _column("actor", _TEXT, null=True),
    _column("reason", _TEXT, null=True),
    PrimaryKeyConstraint("user_id", "seq"),
    UniqueConstraint("user_id", "entry_key", "meter"),
)

# The account that used an order (kind `grant`) or an invoice (`renew`): each counts once in all accounts. `shared`:
# several accounts had used it before this table; the first stands. A trigger of `ledger_entry` notes a key that nobody
# claimed.
order_key = Table(
    "order_key",
    SCHEMA,
    _column("kind", _TEXT, "kind IN ('grant', 'renew')"),
    _column("key", _ID),
    _user_of_account(),
    _column("shared", _FLAG, default="false"),
    PrimaryKeyConstraint("kind", "key"),
    Index("order_key_user", "user_id"),
)

# ---------------------------------------------------------------------------------------------------------------------
# The sponsorship pool: balance = initial + credits - grants; `seq` numbers grants and credits without a gap

sponsor_pool = Table(
    "sponsor_pool",
    SCHEMA,
    _column("only_row", _FLAG, "only_row", default="true"),
    _column("initial", _UNITS, f"initial {_AMOUNT}"),
    _column("balance", _UNITS, f"balance {_BUCKET}"),
    _column("seq", _UNITS, "seq >= 0", default="0"),
    _column("opened_at", _TIME),
    PrimaryKeyConstraint("only_row"),
)

# One row per settled request, append-only. Its user may have no account.
sponsor_grant = Table(
    "sponsor_grant",
    SCHEMA,
    _column("request_hash", _BYTES, "length(request_hash) = 32"),
    _column("user_id", _ID, "length(user_id) BETWEEN 1 AND 128"),
    _column("seq", _UNITS),
    _column("held", _UNITS, "held >= 0"),
    _column("actual", _UNITS, "actual >= 0"),
    _column("paid", _UNITS, "paid >= 0"),
    _column("absorbed", _UNITS, "absorbed BETWEEN 0 AND least(held, greatest(0, actual - paid))"),
    _column("pool_after", _UNITS, "pool_after >= 0"),
    _column("tier", _TEXT),
    _column("daily_budget", _UNITS, "daily_budget >= 0"),
    _column("window_start", _TIME),
    _column("late", _FLAG),
    _column("created_at", _TIME),
    _column("trace_id", _ID, null=True),
    PrimaryKeyConstraint("request_hash"),
    UniqueConstraint("seq"),
    # For the units that a user's window absorbed, and that the pool gave since a moment.
    Index("sponsor_grant_window", "user_id", "window_start"),
    Index("sponsor_grant_time", "created_at", postgresql_include=["absorbed"]),
)

# One row per paid request that fed the pool, append-only.
sponsor_credit = Table(
    "sponsor_credit",
    SCHEMA,
    _column("request_hash", _BYTES, "length(request_hash) = 32"),
    _column("seq", _UNITS),
    _column("paid", _UNITS, "paid >= 0"),
    _column("share_percent", _COUNT, "share_percent BETWEEN 0 AND 100"),
    _column("credited", _UNITS),
    _column("pool_after", _UNITS, "pool_after >= 0"),
    _column("created_at", _TIME),
    # The exact percentage if it is no whole number.
    _column("share", Numeric(), null=True),
    CheckConstraint("credited = floor(paid * coalesce(share, share_percent) / 100)", name="sponsor_credit_check"),
    PrimaryKeyConstraint("request_hash"),
    UniqueConstraint("seq"),
)

# ---------------------------------------------------------------------------------------------------------------------
# Partitions: refused stream entries, and pauses

# `signed_by`: the key that had signed the stream entry rightly at its intake. `resolved_by`, `resolved_reason` and
# `resolved_letters`: who dropped or replayed it, why, and the number of letters of that command.
# `traceparent`: for a replay.
dead_letter = Table(
    "dead_letter",
    SCHEMA,
    _number(),
    _column("partition_id", _COUNT),
    _column("entry_id", _TEXT),
    _column("payload_hash", _BYTES),
    _column("reason", _TEXT),
    _column("detail", _TEXT),
    _column("payload", _BYTES),
    _column("payload_bytes", _UNITS),
    _column("state", _TEXT, "state IN ('open', 'replayed', 'dropped')", default="'open'"),
    _column("created_at", _TIME, default="clock_timestamp()"),
    _column("resolved_at", _TIME, null=True),
    _column("signed_by", _TEXT, null=True),
    _column("resolved_by", _TEXT, null=True),
    _column("resolved_reason", _TEXT, null=True),
    _column("resolved_letters", _UNITS, null=True),
    _column("traceparent", _ID, null=True),
    UniqueConstraint("partition_id", "entry_id", "payload_hash"),
    Index("dead_letter_open", "reason", postgresql_where=text("state = 'open'")),
    Index("dead_letter_time", "created_at", postgresql_include=["partition_id", "reason"]),
)

# One row per pause, kept. At most one pause of a partition is open.
partition_pause = Table(
    "partition_pause",
    SCHEMA,
    _number(),
    _column("partition_id", _COUNT),
    _column("paused_at", _TIME, default="clock_timestamp()"),
    _column("paused_by", _TEXT),
    _column("reason", _TEXT),
    _column("resumed_at", _TIME, null=True),
    _column("resumed_by", _TEXT, null=True),
    _column("tolerated_to", _TEXT, null=True),
    CheckConstraint("(resumed_at IS NULL) = (resumed_by IS NULL) AND (resumed_at IS NULL) = (tolerated_to IS NULL)"),
    Index("partition_pause_open", "partition_id", unique=True, postgresql_where=text("resumed_at IS NULL")),
    Index("partition_pause_last", "partition_id", "id"),
)

# The lives of Redis: it lost its data before each but one `found` new. An operator acknowledges that.
redis_life = Table(
    "redis_life",
    SCHEMA,
    _number(),
    _column("token", _ID),
    _column("began_at", _TIME, default="clock_timestamp()"),
    _column("found", _TEXT, "found IN ('new', 'empty', 'older', 'unknown')"),
    _column("acknowledged_at", _TIME, null=True),
    _column("acknowledged_by", _ID, null=True),
    _column("reason", _ID, null=True),
    CheckConstraint(
        "(acknowledged_at IS NULL) = (acknowledged_by IS NULL) AND (acknowledged_at IS NULL) = (reason IS NULL)"
    ),
    UniqueConstraint("token"),
)

# The catalogues, never changed or removed. Of those whose moment has come, the newest version is in force.
catalogue_version = Table(
    "catalogue_version",
    SCHEMA,
    Column("version", _COUNT, CheckConstraint("version >= 1"), primary_key=True, autoincrement=False),
    _column("digest", _TEXT, "digest ~ '^[0-9a-f]{64}$'"),
    _column("content", _TEXT),
    _column("effective_from", _TIME),
    _column("applied_at", _TIME, default="clock_timestamp()"),
    _column("applied_by", _TEXT),
    _column("reason", _TEXT, null=True),
)

# ---------------------------------------------------------------------------------------------------------------------
# Roll-ups of the usage log for reports. They do not reference the account: that would lock its row.

# The change up to which an account is rolled up, and its documents and pages by then. A roll-up locks this row.
rollup_state = Table(
    "rollup_state",
    SCHEMA,
    _column("user_id", _ID),
    _column("seq", _UNITS, "seq >= 0", default="0"),
    _column("documents", _UNITS, "documents >= 0", default="0"),
    _column("pages", _UNITS, "pages >= 0", default="0"),
    PrimaryKeyConstraint("user_id"),
    postgresql_with={"fillfactor": 70},
)

usage_rollup = Table(
    "usage_rollup",
    SCHEMA,
    _column("user_id", _ID),
    _column("meter", _ID),
    _column("period_start", _TIME),
    _column("month", Date()),
    _column("voice", _ID),
    _column("model", _ID),
    _column("events", _UNITS),
    _column("quantity", _UNITS),
    _column("amount", _UNITS),
    _column("duration_ms", _UNITS),
    PrimaryKeyConstraint("user_id", "meter", "period_start", "month", "voice", "model"),
    postgresql_with={"fillfactor": 70},
)

document_rollup = Table(
    "document_rollup",
    SCHEMA,
    _column("user_id", _ID),
    _column("meter", _ID),
    _column("period_start", _TIME),
    _column("document_id", _ID),
    _column("events", _UNITS),
    _column("amount", _UNITS),
    _column("pages", _PAGES),
    _column("page_count", _UNITS),
    PrimaryKeyConstraint("user_id", "meter", "period_start", "document_id"),
    postgresql_with={"fillfactor": 70},
)

# One row per document, over all meters and periods: the counts in `rollup_state` stay exact.
document_lifetime = Table(
    "document_lifetime",
    SCHEMA,
    _column("user_id", _ID),
    _column("document_id", _ID),
    _column("events", _UNITS),
    _column("pages", _PAGES),
    PrimaryKeyConstraint("user_id", "document_id"),
    postgresql_with={"fillfactor": 70},
)

# The buckets after every few hundred changes: `explain` starts at the nearest.
balance_checkpoint = Table(
    "balance_checkpoint",
    SCHEMA,
    _column("user_id", _ID),
    _column("meter", _ID),
    _column("seq", _UNITS),
    _column("used", _UNITS),
    _column("rollover", _UNITS),
    _column("purchased", _UNITS),
    PrimaryKeyConstraint("user_id", "meter", "seq"),
)

# ---------------------------------------------------------------------------------------------------------------------
# Usage of all accounts, for reports. Sums of the log up to one change of each account, as the roll-ups above

# The change up to which an account is summed up, and its plan by then.
report_state = Table(
    "report_state",
    SCHEMA,
    _column("user_id", _ID),
    _column("seq", _UNITS, "seq > 0"),
    _column("plan", _TEXT),
    PrimaryKeyConstraint("user_id"),
    postgresql_with={"fillfactor": 70},
)

# All accounts together, by UTC day of the work and by the plan that the account had.
usage_daily = Table(
    "usage_daily",
    SCHEMA,
    _column("day", Date()),
    _column("meter", _ID),
    _column("plan", _ID),
    _column("events", _UNITS),
    _column("amount", _UNITS),
    PrimaryKeyConstraint("day", "meter", "plan"),
    postgresql_with={"fillfactor": 70},
)

# An account's month. Element n of the two arrays sums the days 1 to n, so a span of days is one difference.
usage_monthly = Table(
    "usage_monthly",
    SCHEMA,
    _column("user_id", _ID),
    _column("month", Date()),
    _column("meter", _ID),
    _column("plan", _ID),
    _column("events", _UNITS_BY_DAY),
    _column("amounts", _UNITS_BY_DAY),
    PrimaryKeyConstraint("user_id", "month", "meter", "plan"),
    Index("usage_monthly_month", "month", "meter"),
    postgresql_with={"fillfactor": 70},
)

# ---------------------------------------------------------------------------------------------------------------------
# The proof. Its rows do not reference the account either.

# Up to which change an account is proven, and its state by then. `seal` covers all of it but `doubted` and `proven_at`.
proof_checkpoint = Table(
    "proof_checkpoint",
    SCHEMA,
    _column("user_id", _ID),
    _column("seq", _UNITS, "seq >= 0"),
    _column("digest", _BYTES),
    _column("form", _COUNT),
    _column("state", JSON()),
    _column("stands", _UNITS),
    _column("whole_on", Date()),
    _column("seal", _BYTES),
    _column("doubted", _FLAG, default="false"),
    _column("proven_at", _TIME, default="clock_timestamp()"),
    PrimaryKeyConstraint("user_id"),
)

# One row: the last run of the periodic proof. The accounts up to `after` are proven, and a part of the next one.
proof_run = Table(
    "proof_run",
    SCHEMA,
    _column("only_row", _FLAG, "only_row", default="true"),
    _column("number", _UNITS, "number > 0"),
    _column("step", _UNITS, default="0"),
    _column("started_at", _TIME, default="clock_timestamp()"),
    _column("finished_at", _TIME, null=True),
    _column("after", _ID, default="''"),
    _column("in_hand", JSON(), null=True),
    _column("from_zero", _UNITS, default="0"),
    _column("from_checkpoint", _UNITS, default="0"),
    _column("changes", _UNITS, default="0"),
    _column("differences", _UNITS, default="0"),
    _column("found", JSON(), default="'[]'"),
    PrimaryKeyConstraint("only_row"),
)

# ---------------------------------------------------------------------------------------------------------------------
# Notices: not append-only, no balance depends on them

# What was told, once for each rule, account, meter, period and count of recoveries. Its place in the feed comes later.
notice = Table(
    "notice",
    SCHEMA,
    _column("notice_id", _ID),
    Column("number", BigInteger, Identity(always=True), nullable=False),
    _column("user_id", _ID),
    _column("meter", _ID),
    _column("kind", _TEXT),
    _column("rule", _ID),
    _column("period", _ID),
    _column("times", _COUNT, "times > 0"),
    _column("created_at", _TIME),
    _column("due_at", _TIME),
    _column("position", _UNITS, null=True),
    _column("data", JSONB()),
    PrimaryKeyConstraint("notice_id"),
    UniqueConstraint("user_id", "rule", "meter", "period", "times"),
    UniqueConstraint("position"),
    Index("notice_due", "due_at", "number", postgresql_where=text("position IS NULL")),
)

# The last place in the feed that was given. No place is given twice, also if its notice is erased.
notice_line = Table(
    "notice_line",
    SCHEMA,
    _column("only_row", _FLAG, "only_row", default="true"),
    _column("position", _UNITS, "position >= 0"),
    PrimaryKeyConstraint("only_row"),
)

# The lines that were told, and whether their balances have recovered since.
notice_alarm = Table(
    "notice_alarm",
    SCHEMA,
    _column("user_id", _ID),
    _column("meter", _ID),
    _column("rule", _ID),
    _column("period", _ID),
    _column("times", _COUNT, "times > 0"),
    _column("is_open", _FLAG),
    PrimaryKeyConstraint("user_id", "meter", "rule"),
)

# Where notices are sent. `position`: up to which place of the feed it was given its part.
webhook = Table(
    "webhook",
    SCHEMA,
    _column("webhook_id", _ID),
    _column("url", _TEXT),
    _column("kinds", ARRAY(Text()), null=True),
    _column("position", _UNITS, "position >= 0"),
    _column("created_at", _TIME),
    _column("created_by", _TEXT, null=True),
    PrimaryKeyConstraint("webhook_id"),
)

# Secrets that sign, apart from the webhooks: only senders read them.
webhook_secret = Table(
    "webhook_secret",
    SCHEMA,
    Column("webhook_id", _ID, ForeignKey("webhook.webhook_id", ondelete="CASCADE"), nullable=False),
    _column("secret", _TEXT),
    _column("created_at", _TIME),
    _column("ends_at", _TIME, null=True),
    PrimaryKeyConstraint("webhook_id", "created_at"),
)

# A notice on its way to a webhook. Of those of an account only the first that waits has a time.
notice_delivery = Table(
    "notice_delivery",
    SCHEMA,
    Column("webhook_id", _ID, ForeignKey("webhook.webhook_id", ondelete="CASCADE"), nullable=False),
    Column("notice_id", _ID, ForeignKey("notice.notice_id", ondelete="CASCADE"), nullable=False),
    _column("user_id", _ID),
    _column("position", _UNITS),
    _column("state", _TEXT, "state IN ('waiting', 'delivered', 'dead')"),
    _column("attempts", _COUNT, "attempts >= 0", default="0"),
    _column("next_at", _TIME, "next_at IS NULL OR state = 'waiting'", null=True),
    _column("error", _TEXT, null=True),
    _column("ended_at", _TIME, "(ended_at IS NULL) = (state = 'waiting')", null=True),
    PrimaryKeyConstraint("webhook_id", "notice_id"),
    Index("notice_delivery_next", "webhook_id", "next_at", postgresql_where=text("next_at IS NOT NULL")),
    Index("notice_delivery_lane", "webhook_id", "user_id", "position", postgresql_where=text("state = 'waiting'")),
    Index("notice_delivery_dead", "webhook_id", "position", postgresql_where=text("state = 'dead'")),
    Index("notice_delivery_notice", "notice_id"),
)

# ---------------------------------------------------------------------------------------------------------------------
# The HTTP service

# Keys of its callers, with the SHA-256 of each secret. Rows stay: changes of accounts name their keys.
api_key = Table(
    "api_key",
    SCHEMA,
    _column("key_id", _ID),
    _column("name", _ID),
    _column("role", _TEXT, "role IN ('producer', 'reader', 'support', 'operator')"),
    _column("created_at", _TIME),
    _column("created_by", _TEXT),
    _column("reason", _TEXT, null=True),
    _column("expires_at", _TIME, "expires_at > created_at", null=True),
    _column("revoked_at", _TIME, null=True),
    _column("revoked_by", _TEXT, "(revoked_by IS NULL) = (revoked_at IS NULL)", null=True),
    _column("revoked_reason", _TEXT, null=True),
    _column("digest", _BYTES, "octet_length(digest) = 32"),
    PrimaryKeyConstraint("key_id"),
    Index("api_key_name", "name", unique=True, postgresql_where=text("revoked_at IS NULL")),
)
