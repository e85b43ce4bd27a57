"""The sponsorship pool: one row with its balance, and its grants and credits."""

from alembic import op

revision = "0004"
down_revision = "0003"

STATEMENTS = [
    # Balance = initial + credits − grants; `seq` numbers both without a gap. One drain locks it, once per batch.
    """
    CREATE TABLE sponsor_pool (
        only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
        initial bigint NOT NULL CHECK (initial BETWEEN 0 AND 1000000000000),
        balance bigint NOT NULL CHECK (balance BETWEEN 0 AND 9000000000000000),
        seq bigint NOT NULL DEFAULT 0 CHECK (seq >= 0),
        opened_at timestamptz NOT NULL
    )
    """,
    # One row per settled request, for ever, with its id as a hash. The user is text, as a host may trust users without
    # an account.
    """
    CREATE TABLE sponsor_grant (
        request_hash bytea PRIMARY KEY CHECK (length(request_hash) = 32),
        user_id text COLLATE "C" NOT NULL CHECK (length(user_id) BETWEEN 1 AND 128),
        seq bigint NOT NULL UNIQUE,
        held bigint NOT NULL CHECK (held >= 0),
        actual bigint NOT NULL CHECK (actual >= 0),
        paid bigint NOT NULL CHECK (paid >= 0),
        absorbed bigint NOT NULL CHECK (absorbed BETWEEN 0 AND least(held, greatest(0, actual - paid))),
        pool_after bigint NOT NULL CHECK (pool_after >= 0),
        tier text NOT NULL,
        daily_budget bigint NOT NULL CHECK (daily_budget >= 0),
        window_start timestamptz NOT NULL,
        late boolean NOT NULL,
        created_at timestamptz NOT NULL
    )
    """,
    # For the units that a user's window absorbed, if Redis lost them, and that the pool gave since a moment.
    "CREATE INDEX sponsor_grant_window ON sponsor_grant (user_id, window_start)",
    "CREATE INDEX sponsor_grant_time ON sponsor_grant (created_at) INCLUDE (absorbed)",
    """
    CREATE TABLE sponsor_credit (
        request_hash bytea PRIMARY KEY CHECK (length(request_hash) = 32),
        seq bigint NOT NULL UNIQUE,
        paid bigint NOT NULL CHECK (paid >= 0),
        share_percent integer NOT NULL CHECK (share_percent BETWEEN 0 AND 100),
        credited bigint NOT NULL CHECK (credited = paid * share_percent / 100),
        pool_after bigint NOT NULL CHECK (pool_after >= 0),
        created_at timestamptz NOT NULL
    )
    """,
]
# A grant follows the erased history of its account; nothing else ever changes.
REFUSALS = [
    ("sponsor_grant", "append_only", "DELETE", "ROW", "refuse_change"),
    ("sponsor_grant", "only_erased", "UPDATE", "ROW", "allow_only_erasure"),
    ("sponsor_grant", "no_truncate", "TRUNCATE", "STATEMENT", "refuse_change"),
    ("sponsor_credit", "append_only", "UPDATE OR DELETE", "ROW", "refuse_change"),
    ("sponsor_credit", "no_truncate", "TRUNCATE", "STATEMENT", "refuse_change"),
]


def upgrade() -> None:
    """Create everything. The first batch opens the pool with the units in the catalogue."""
    for statement in STATEMENTS:
        op.execute(statement)
    for table, name, change, each, function in REFUSALS:
        op.execute(
            f"CREATE TRIGGER {table}_{name} BEFORE {change} ON {table} FOR EACH {each} EXECUTE FUNCTION {function}()"
        )


def downgrade() -> None:
    """Drop everything; the pool's history is lost."""
    for table in ("sponsor_credit", "sponsor_grant", "sponsor_pool"):
        op.execute(f"DROP TABLE {table}")
