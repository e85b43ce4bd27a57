"""The trace of a dead letter, for its replay, and of a grant of the pool. Traces are erased with an account."""

from alembic import op

revision = "0021"
down_revision = "0020"

# Neither default nor CHECK, so that no row is read or written. A worker of the former release names the columns that it
# writes, and goes on beside the new ones: its rows have no trace.
ADDED = [
    'ALTER TABLE dead_letter ADD COLUMN traceparent text COLLATE "C"',
    'ALTER TABLE sponsor_grant ADD COLUMN trace_id text COLLATE "C"',
]

_ALLOW_ONLY_ERASURE = """
    CREATE OR REPLACE FUNCTION allow_only_erasure() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        personal text[] := ARRAY[{personal}];
    BEGIN
        IF NEW.user_id LIKE 'closed:%'
            AND EXISTS (SELECT FROM account WHERE user_id = OLD.user_id AND status = 'closed')
            AND to_jsonb(NEW) - personal = to_jsonb(OLD) - personal
        THEN
            RETURN NEW;
        END IF;
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'object_not_in_prerequisite_state';
    END
    $$
"""
_SO_FAR = "'user_id', 'reference_id', 'hold_key', 'dimensions', 'actor', 'reason'"
BEFORE = _ALLOW_ONLY_ERASURE.format(personal=_SO_FAR)
# Until now an account with a traced event could not be closed.
AFTER = _ALLOW_ONLY_ERASURE.format(personal=f"{_SO_FAR}, 'trace_id'")


def upgrade() -> None:
    """Add the columns, empty, and let an erasure empty a trace."""
    for statement in [*ADDED, AFTER]:
        op.execute(statement)


def downgrade() -> None:
    """Drop the columns: these traces are forgotten, nothing else."""
    op.execute(BEFORE)
    op.execute("ALTER TABLE sponsor_grant DROP COLUMN trace_id")
    op.execute("ALTER TABLE dead_letter DROP COLUMN traceparent")
