"""The trace of the request that caused an event, beside it in the usage log."""

from alembic import op

revision = "0016"
down_revision = "0013"


def upgrade() -> None:
    """Add the column, empty.

    It has neither default nor CHECK, so that no row is read or written. A worker of the former release names the
    columns that it writes, and goes on beside the new ones: its rows have no trace.
    """
    op.execute('ALTER TABLE usage_log ADD COLUMN trace_id text COLLATE "C"')


def downgrade() -> None:
    """Drop the column: the traces are forgotten, nothing else."""
    op.execute("ALTER TABLE usage_log DROP COLUMN trace_id")
