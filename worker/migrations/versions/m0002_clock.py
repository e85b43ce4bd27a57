"""The ledger's clock is a function, so that tests can move it. Placeholder for the migration of periods."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the clock."""
    op.execute("CREATE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT clock_timestamp()'")


def downgrade() -> None:
    """Drop the clock."""
    op.execute("DROP FUNCTION ledger_now()")
