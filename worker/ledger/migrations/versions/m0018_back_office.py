"""Reports over all accounts: usage per day, per account and month; accounts by their name in logs."""

from alembic import op

revision = "0018"
down_revision = "0017"

# New tables, and no reference to account: it would take a lock on the account's row and wait for its batches. No CHECK
# that a count is not negative: a reversal is proposed as a negative row before it is added to the one that is there.
#
# Of these indexes only the one on the log takes time. It holds events without an account alone, so an event of an
# account costs nothing. It reads the whole log once, about a second per million rows; drains wait meanwhile, and no
# event is lost. For a very large log, make it beforehand: CREATE INDEX CONCURRENTLY with this name and definition.
STATEMENTS = [
    """
    CREATE TABLE report_state (
        user_id text COLLATE "C" PRIMARY KEY,
        seq bigint NOT NULL CHECK (seq > 0),
        plan text NOT NULL
    ) WITH (fillfactor = 70)
    """,
    """
    CREATE TABLE usage_daily (
        day date NOT NULL,
        meter text COLLATE "C" NOT NULL,
        plan text COLLATE "C" NOT NULL,
        events bigint NOT NULL,
        amount bigint NOT NULL,
        PRIMARY KEY (day, meter, plan)
    ) WITH (fillfactor = 70)
    """,
    """
    CREATE TABLE usage_monthly (
        user_id text COLLATE "C" NOT NULL,
        month date NOT NULL,
        meter text COLLATE "C" NOT NULL,
        plan text COLLATE "C" NOT NULL,
        events bigint[] NOT NULL,
        amounts bigint[] NOT NULL,
        PRIMARY KEY (user_id, month, meter, plan)
    ) WITH (fillfactor = 70)
    """,
    "CREATE INDEX usage_monthly_month ON usage_monthly (month, meter)",
    # One that was made beforehand and cut short is of no use to any report.
    """
    DO $$ BEGIN
        IF EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('usage_log_uncollected') AND NOT indisvalid) THEN
            DROP INDEX usage_log_uncollected;
        END IF;
    END $$
    """,
    """
    CREATE INDEX IF NOT EXISTS usage_log_uncollected ON usage_log (occurred_at, user_id, meter) INCLUDE (amount)
    WHERE seq IS NULL
    """,
    # Last: it keeps others from changing accounts until the COMMIT.
    "CREATE INDEX account_log_name ON account (substr(sha256(decode(user_id, 'escape')), 1, 6))",
]


def upgrade() -> None:
    """Create everything. Empty tables are right: reports then read the log, until the job has filled them."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop everything; the log has it all."""
    op.execute("DROP INDEX usage_log_uncollected")
    op.execute("DROP INDEX account_log_name")
    for table in ("usage_monthly", "usage_daily", "report_state"):
        op.execute(f"DROP TABLE {table}")
