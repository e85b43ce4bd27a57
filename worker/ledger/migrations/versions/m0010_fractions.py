"""Fractions of a unit that are carried by account and meter; fractions of a percent that flow into the pool."""

from alembic import op

revision = "0010"
down_revision = "0009"

# The first step of a rolling deploy; the new workers, which fill the columns, are the second. A worker of the former
# release names the columns that it reads and writes: it goes on beside the new ones, rounds down and leaves what is
# carried alone. NULL in a row of the log says so. The log gets no CHECK: that would read all of it under a lock.
STATEMENTS = [
    "ALTER TABLE balance ADD COLUMN carried integer NOT NULL DEFAULT 0 CHECK (carried BETWEEN 0 AND 999999)",
    "ALTER TABLE usage_log ADD COLUMN remainder integer",
    # One row per paid request: soon read.
    """
    ALTER TABLE sponsor_credit ADD COLUMN share numeric,
        DROP CONSTRAINT sponsor_credit_check,
        ADD CONSTRAINT sponsor_credit_check CHECK (credited = floor(paid * coalesce(share, share_percent) / 100))
    """,
]


def upgrade() -> None:
    """Add the columns, empty."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop the columns: fractions of a unit that were carried are lost, the units stay."""
    op.execute(
        "ALTER TABLE sponsor_credit DROP CONSTRAINT sponsor_credit_check, DROP COLUMN share, "
        # Shares of before that were no whole percentage stay as they are.
        "ADD CONSTRAINT sponsor_credit_check CHECK (credited = paid * share_percent / 100) NOT VALID"
    )
    op.execute("ALTER TABLE usage_log DROP COLUMN remainder")
    op.execute("ALTER TABLE balance DROP COLUMN carried")
