"""Roll-ups of the usage log, for reports: sums of an account's rows up to one sequence number."""

from alembic import op

revision = "0003"
down_revision = "0002"

# No reference to account: it would take a lock on the account's row and wait for its batches. No CHECK that a count is
# not negative: a reversal is proposed as a negative row before it is added to the one that is there.
STATEMENTS = [
    # The change up to which the account is rolled up, and its lifetime documents and pages by then. A writer of any row
    # of these tables holds this row's lock.
    """
    CREATE TABLE rollup_state (
        user_id text COLLATE "C" PRIMARY KEY,
        seq bigint NOT NULL DEFAULT 0 CHECK (seq >= 0),
        documents bigint NOT NULL DEFAULT 0 CHECK (documents >= 0),
        pages bigint NOT NULL DEFAULT 0 CHECK (pages >= 0)
    ) WITH (fillfactor = 70)
    """,
    """
    CREATE TABLE usage_rollup (
        user_id text COLLATE "C" NOT NULL,
        meter text COLLATE "C" NOT NULL,
        period_start timestamptz NOT NULL,
        month date NOT NULL,
        voice text COLLATE "C" NOT NULL,
        model text COLLATE "C" NOT NULL,
        events bigint NOT NULL,
        quantity bigint NOT NULL,
        amount bigint NOT NULL,
        duration_ms bigint NOT NULL,
        PRIMARY KEY (user_id, meter, period_start, month, voice, model)
    ) WITH (fillfactor = 70)
    """,
    """
    CREATE TABLE document_rollup (
        user_id text COLLATE "C" NOT NULL,
        meter text COLLATE "C" NOT NULL,
        period_start timestamptz NOT NULL,
        document_id text COLLATE "C" NOT NULL,
        events bigint NOT NULL,
        amount bigint NOT NULL,
        pages int4multirange NOT NULL,
        page_count bigint NOT NULL,
        PRIMARY KEY (user_id, meter, period_start, document_id)
    ) WITH (fillfactor = 70)
    """,
    # One row per document over all meters and periods, so that the counts in rollup_state stay exact.
    """
    CREATE TABLE document_lifetime (
        user_id text COLLATE "C" NOT NULL,
        document_id text COLLATE "C" NOT NULL,
        events bigint NOT NULL,
        pages int4multirange NOT NULL,
        PRIMARY KEY (user_id, document_id)
    ) WITH (fillfactor = 70)
    """,
    # The buckets after every few hundred changes: `explain` starts at the nearest.
    """
    CREATE TABLE balance_checkpoint (
        user_id text COLLATE "C" NOT NULL,
        meter text COLLATE "C" NOT NULL,
        seq bigint NOT NULL,
        used bigint NOT NULL,
        rollover bigint NOT NULL,
        purchased bigint NOT NULL,
        PRIMARY KEY (user_id, meter, seq)
    )
    """,
]


def upgrade() -> None:
    """Create everything. Empty roll-ups are right: reports then read the log."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop everything; the log has it all."""
    for table in ("balance_checkpoint", "document_lifetime", "document_rollup", "usage_rollup", "rollup_state"):
        op.execute(f"DROP TABLE {table}")
