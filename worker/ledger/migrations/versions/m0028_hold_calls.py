"""The call that made a hold of the ledger, so that a call gives back its own hold only."""

from alembic import op

revision = "0028"
down_revision = "0027"


def upgrade() -> None:
    """Add the column, empty: nobody gives back as its own a hold that a client of the former release makes."""
    op.execute("ALTER TABLE ledger_hold ADD COLUMN call_id text")


def downgrade() -> None:
    """Drop the column: a hold whose caller was interrupted stays until it expires, nothing else."""
    op.execute("ALTER TABLE ledger_hold DROP COLUMN call_id")
