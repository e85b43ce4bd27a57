"""Pending ids whose stream entries were lost, as operators freed them."""

from alembic import op

revision = "0013"
down_revision = "0011"

# A new table: a worker of the former release does not know it, and goes on beside the new ones. An event may have no
# account, so the table references none.
STATEMENTS = [
    """
    CREATE TABLE freed_pending (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        freed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        freed_by text COLLATE "C",
        reason text COLLATE "C",
        partition_id integer NOT NULL,
        user_id text COLLATE "C" NOT NULL,
        meter text COLLATE "C" NOT NULL,
        event_id text COLLATE "C" NOT NULL,
        units bigint NOT NULL CHECK (units >= 0),
        is_recorded boolean NOT NULL
    )
    """,
    "CREATE INDEX freed_pending_user ON freed_pending (user_id, event_id)",
]


def upgrade() -> None:
    """Create the table, empty."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop the table: what was freed is forgotten, nothing else."""
    op.execute("DROP TABLE freed_pending")
