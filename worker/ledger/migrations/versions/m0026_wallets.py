"""The wallet that an event drew on, and the price of its meter."""

from alembic import op

revision = "0026"
down_revision = "0025"

# A column that may be NULL costs a row nothing, and no table is rewritten. NULL says that the meter paid by itself, as
# every event of before this migration. The log gets no CHECK: that would read all of it under a lock. A worker of the
# former release reads no catalogue with wallets, so it applies no event of one.
STATEMENTS = ['ALTER TABLE usage_log ADD COLUMN wallet text COLLATE "C", ADD COLUMN price numeric']

# The former release would take the units of a wallet for those of the meter, in proofs, reports and reversals.
_REFUSE = """
    DO $$ BEGIN
        IF EXISTS (SELECT FROM usage_log WHERE wallet IS NOT NULL) THEN
            RAISE EXCEPTION 'usage_log has events that drew on a wallet; the former release would take them for others'
                USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
    END $$
"""


def upgrade() -> None:
    """Add the columns, empty."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop the columns. Refused after the first event that drew on a wallet: its row means nothing without them."""
    op.execute("LOCK TABLE usage_log IN ACCESS EXCLUSIVE MODE")
    op.execute(_REFUSE)
    op.execute("ALTER TABLE usage_log DROP COLUMN wallet, DROP COLUMN price")
