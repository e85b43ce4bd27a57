"""Partitions that are paused, and what operators want to know of refused entries."""

from alembic import op

revision = "0005"
down_revision = "0004"

STATEMENTS = [
    # One row per pause, kept: who paused what, when and why. Resumed, it says up to which entry of the stream the
    # entries that are no events are let through as dead letters.
    """
    CREATE TABLE partition_pause (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        partition_id integer NOT NULL,
        paused_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        paused_by text NOT NULL,
        reason text NOT NULL,
        resumed_at timestamptz,
        resumed_by text,
        tolerated_to text,
        CHECK ((resumed_at IS NULL) = (resumed_by IS NULL) AND (resumed_at IS NULL) = (tolerated_to IS NULL))
    )
    """,
    "CREATE UNIQUE INDEX partition_pause_open ON partition_pause (partition_id) WHERE resumed_at IS NULL",
    "CREATE INDEX partition_pause_last ON partition_pause (partition_id, id)",
    # The key whose signature was found right when the entry came in: whether it may be replayed without a second look.
    "ALTER TABLE dead_letter ADD COLUMN signed_by text",
    "CREATE INDEX dead_letter_open ON dead_letter (reason) WHERE state = 'open'",
    "CREATE INDEX dead_letter_time ON dead_letter (created_at) INCLUDE (partition_id, reason)",
]


def upgrade() -> None:
    """Create everything; nothing is paused."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop everything; what was paused is drained again."""
    op.execute("DROP INDEX dead_letter_time")
    op.execute("DROP INDEX dead_letter_open")
    op.execute("ALTER TABLE dead_letter DROP COLUMN signed_by")
    op.execute("DROP TABLE partition_pause")
