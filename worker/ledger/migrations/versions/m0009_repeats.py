"""Events that came again after their outcome was forgotten: a key used twice, perhaps."""

from alembic import op

revision = "0009"
down_revision = "0008"

# A new table: a worker of the former release does not know it, and goes on beside the new ones. An event may have no
# account, so the table references none.
STATEMENTS = [
    """
    CREATE TABLE late_repeat (
        user_id text COLLATE "C" NOT NULL,
        event_id text COLLATE "C" NOT NULL,
        times bigint NOT NULL CHECK (times > 0),
        last_at timestamptz NOT NULL,
        PRIMARY KEY (user_id, event_id)
    )
    """,
    "CREATE INDEX late_repeat_time ON late_repeat (last_at)",
]


def upgrade() -> None:
    """Create the table, empty."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop the table: what came again late is forgotten, nothing else."""
    op.execute("DROP TABLE late_repeat")
