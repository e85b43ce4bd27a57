"""The ledger: accounts, balances, the append-only usage log, ledger entries, dead letters."""

from alembic import op

revision = "0001"
down_revision = None

# Ids sort by bytes: index comparisons are cheaper, and every server locks accounts in the same order.
# Every key begins with user_id, so the tables can be spread over several servers by that column.
STATEMENTS = [
    """
    CREATE TABLE ledger (
        only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
        epoch bigint NOT NULL DEFAULT 1 CHECK (epoch > 0),
        partitions integer CHECK (partitions BETWEEN 1 AND 1024),
        created_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    "INSERT INTO ledger DEFAULT VALUES",
    """
    CREATE TABLE account (
        user_id text COLLATE "C" PRIMARY KEY CHECK (length(user_id) BETWEEN 1 AND 128),
        plan text NOT NULL,
        status text NOT NULL
            CHECK (status IN ('active', 'past_due', 'trialing', 'canceled', 'expired', 'paused', 'unpaid')),
        trust text NOT NULL DEFAULT 'new' CHECK (trust IN ('new', 'established', 'trusted', 'elite')),
        seq bigint NOT NULL DEFAULT 0 CHECK (seq >= 0),
        opened_at timestamptz NOT NULL
    ) WITH (fillfactor = 70)
    """,
    # One row per account and meter: the open period with the allowance in force, and the buckets.
    # No index on a column that changes: updates stay within their page.
    """
    CREATE TABLE balance (
        user_id text COLLATE "C" NOT NULL REFERENCES account,
        meter text COLLATE "C" NOT NULL,
        allowance bigint CHECK (allowance BETWEEN 0 AND 1000000000000),
        spill boolean NOT NULL,
        rollover_cap bigint NOT NULL CHECK (rollover_cap BETWEEN 0 AND 1000000000000),
        cadence text NOT NULL CHECK (cadence IN ('subscription', 'monthly', 'weekly', 'daily', 'lifetime', 'off')),
        anchor text NOT NULL CHECK (anchor IN ('sticky', 'floating')),
        anchored_at timestamptz NOT NULL,
        period_index bigint NOT NULL CHECK (period_index >= 0),
        period_start timestamptz NOT NULL,
        period_end timestamptz CHECK (period_end > period_start),
        used bigint NOT NULL DEFAULT 0 CHECK (used BETWEEN 0 AND 9000000000000000),
        rollover bigint NOT NULL DEFAULT 0 CHECK (rollover BETWEEN -9000000000000000 AND 9000000000000000),
        purchased bigint NOT NULL DEFAULT 0 CHECK (purchased BETWEEN 0 AND 9000000000000000),
        lifetime_consumed bigint NOT NULL DEFAULT 0 CHECK (lifetime_consumed BETWEEN 0 AND 9000000000000000),
        lifetime_granted bigint NOT NULL DEFAULT 0 CHECK (lifetime_granted BETWEEN 0 AND 9000000000000000),
        PRIMARY KEY (user_id, meter)
    ) WITH (fillfactor = 70)
    """,
    # One row per event, for ever. Without an account there is no sequence, and the amount is uncollected.
    """
    CREATE TABLE usage_log (
        user_id text COLLATE "C" NOT NULL,
        event_id text COLLATE "C" NOT NULL,
        seq bigint,
        meter text COLLATE "C" NOT NULL,
        quantity bigint NOT NULL CHECK (quantity BETWEEN 0 AND 1000000000000),
        multiplier numeric NOT NULL CHECK (multiplier >= 0),
        amount bigint NOT NULL CHECK (amount BETWEEN 0 AND 1000000000000),
        from_subscription bigint NOT NULL CHECK (from_subscription >= 0),
        from_rollover bigint NOT NULL CHECK (from_rollover >= 0),
        from_purchased bigint NOT NULL CHECK (from_purchased >= 0),
        overflow_to_debt bigint NOT NULL CHECK (overflow_to_debt >= 0),
        uncollected bigint NOT NULL CHECK (uncollected >= 0),
        period_start timestamptz,
        occurred_at timestamptz NOT NULL,
        applied_at timestamptz NOT NULL,
        clamped boolean NOT NULL,
        source text,
        reference_id text,
        hold_key text,
        dimensions jsonb,
        PRIMARY KEY (user_id, event_id),
        UNIQUE (user_id, seq),
        CONSTRAINT usage_log_parts_sum CHECK (
            from_subscription + from_rollover + from_purchased + overflow_to_debt + uncollected = amount
        ),
        CONSTRAINT usage_log_collected CHECK ((seq IS NULL) = (period_start IS NULL))
    )
    """,
    # Every change that is not usage, with the balances after it. A ledger entry about the whole account has meter ''.
    """
    CREATE TABLE ledger_entry (
        user_id text COLLATE "C" NOT NULL REFERENCES account,
        seq bigint NOT NULL,
        entry_key text COLLATE "C" NOT NULL,
        meter text COLLATE "C" NOT NULL,
        kind text NOT NULL,
        used_change bigint NOT NULL,
        rollover_change bigint NOT NULL,
        purchased_change bigint NOT NULL,
        used_after bigint NOT NULL,
        rollover_after bigint NOT NULL,
        purchased_after bigint NOT NULL,
        detail jsonb NOT NULL,
        created_at timestamptz NOT NULL,
        PRIMARY KEY (user_id, seq),
        UNIQUE (user_id, entry_key, meter)
    )
    """,
    """
    CREATE TABLE dead_letter (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        partition_id integer NOT NULL,
        entry_id text NOT NULL,
        payload_hash bytea NOT NULL,
        reason text NOT NULL,
        detail text NOT NULL,
        payload bytea NOT NULL,
        payload_bytes bigint NOT NULL,
        state text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'replayed', 'dropped')),
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        resolved_at timestamptz,
        UNIQUE (partition_id, entry_id, payload_hash)
    )
    """,
    # Holds that the ledger granted while Redis was down; the next load of the balance moves them to Redis.
    """
    CREATE TABLE ledger_hold (
        user_id text COLLATE "C" NOT NULL REFERENCES account,
        hold_key text COLLATE "C" NOT NULL,
        meter text COLLATE "C" NOT NULL,
        amount bigint NOT NULL CHECK (amount BETWEEN 0 AND 1000000000000),
        expires_at timestamptz NOT NULL,
        PRIMARY KEY (user_id, hold_key)
    )
    """,
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'object_not_in_prerequisite_state';
    END
    $$
    """,
]
APPEND_ONLY = ["usage_log", "ledger_entry"]


def upgrade() -> None:
    """Create everything."""
    for statement in STATEMENTS:
        op.execute(statement)
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION refuse_change()"
        )
        op.execute(
            f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )


def downgrade() -> None:
    """Drop everything."""
    for table in ("ledger_hold", "dead_letter", "ledger_entry", "usage_log", "balance", "account", "ledger"):
        op.execute(f"DROP TABLE {table}")
    op.execute("DROP FUNCTION refuse_change()")
