"""Paused partitions, and facts about refused stream entries for operators."""

from alembic import op

revision = "0005"
down_revision = "0004"

STATEMENTS = [
    # One row per pause, kept: operator, partition, time and reason. At its end it names the stream entry up to which
    # workers make dead letters of unreadable ones.
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
    # The key that had signed the stream entry rightly at its intake; a replay of such a letter needs no second look.
    "ALTER TABLE dead_letter ADD COLUMN signed_by text",
    "CREATE INDEX dead_letter_open ON dead_letter (reason) WHERE state = 'open'",
    "CREATE INDEX dead_letter_time ON dead_letter (created_at) INCLUDE (partition_id, reason)",
]


def upgrade() -> None:
    """Create everything; nothing is paused."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop everything; workers drain paused partitions again."""
    op.execute("DROP INDEX dead_letter_time")
    op.execute("DROP INDEX dead_letter_open")
    op.execute("ALTER TABLE dead_letter DROP COLUMN signed_by")
    op.execute("DROP TABLE partition_pause")
