"""An account may be closed only by a release that knows all that is kept of it."""

from alembic import op

revision = "0022"
down_revision = "0021"

# At the COMMIT: the order of the statements is the release's own. Only a close deletes an account.
TRIGGER = """
    CREATE FUNCTION refuse_half_a_close() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF EXISTS (SELECT FROM account WHERE user_id = OLD.user_id) THEN
            RETURN NULL;  -- opened again in the same transaction
        END IF;
        IF EXISTS (SELECT FROM report_state WHERE user_id = OLD.user_id)
            OR EXISTS (SELECT FROM usage_monthly WHERE user_id = OLD.user_id)
            OR EXISTS (SELECT FROM proof_checkpoint WHERE user_id = OLD.user_id)
        THEN
            RAISE EXCEPTION 'this release closes an account only in part: close it with the release of these tables';
        END IF;
        RETURN NULL;
    END
    $$;
    CREATE CONSTRAINT TRIGGER account_closed_whole AFTER DELETE ON account DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION refuse_half_a_close()
"""


def upgrade() -> None:
    """Refuse to leave sums and checkpoints behind, as an earlier release would that does not know them."""
    op.execute(TRIGGER)


def downgrade() -> None:
    """Let accounts be closed without a look at what is left."""
    op.execute("DROP TRIGGER account_closed_whole ON account")
    op.execute("DROP FUNCTION refuse_half_a_close()")
