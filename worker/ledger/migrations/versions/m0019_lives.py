"""The lives of Redis: each time that it lost its data, and who acknowledged that."""

from alembic import op

revision = "0019"
down_revision = "0018"

# A new table: a worker of the former release does not know it, and goes on beside the new ones. It is empty: the first
# process that looks begins the first life, and no installation hears of a loss that it did not have.
STATEMENTS = [
    """
    CREATE TABLE redis_life (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        token text COLLATE "C" NOT NULL UNIQUE,
        began_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        found text NOT NULL CHECK (found IN ('new', 'empty', 'older', 'unknown')),
        acknowledged_at timestamptz,
        acknowledged_by text COLLATE "C",
        reason text COLLATE "C",
        CHECK ((acknowledged_at IS NULL) = (acknowledged_by IS NULL)
            AND (acknowledged_at IS NULL) = (reason IS NULL))
    )
    """,
]


def upgrade() -> None:
    """Create the table, empty."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop the table: what Redis lost and who acknowledged it is forgotten, nothing else."""
    op.execute("DROP TABLE redis_life")
