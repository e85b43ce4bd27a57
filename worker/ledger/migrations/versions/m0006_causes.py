"""Who changed an account and why, in each ledger entry; who opened it and why, with the account."""

from alembic import op

revision = "0006"
down_revision = "0005"

# The first step of a rolling deploy; the new workers, which fill the columns, are the second. A worker of the former
# release names the columns that it writes and reads, so it goes on beside the new ones, and its rows have NULL. No
# migration tightens the columns later: entries from before and the system's own changes keep NULL.
STATEMENTS = [
    "ALTER TABLE ledger_entry ADD COLUMN actor text, ADD COLUMN reason text",
    # Where an import keeps them. The entry says who imported the account.
    "ALTER TABLE account ADD COLUMN opened_by text, ADD COLUMN opened_reason text",
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
_OF_EVENTS = "'user_id', 'reference_id', 'hold_key', 'dimensions'"
BEFORE = _ALLOW_ONLY_ERASURE.format(personal=_OF_EVENTS)
# A reason is free text and may name the person: it is erased with the account.
AFTER = _ALLOW_ONLY_ERASURE.format(personal=f"{_OF_EVENTS}, 'actor', 'reason'")


def upgrade() -> None:
    """Add the columns, empty."""
    for statement in [*STATEMENTS, AFTER]:
        op.execute(statement)


def downgrade() -> None:
    """Drop the columns: who made a change and why is lost, the changes stay."""
    op.execute(BEFORE)
    op.execute("ALTER TABLE account DROP COLUMN opened_reason, DROP COLUMN opened_by")
    op.execute("ALTER TABLE ledger_entry DROP COLUMN reason, DROP COLUMN actor")
