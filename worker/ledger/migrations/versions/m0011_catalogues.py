"""The catalogues of the ledger: text, digest, and the moment from which each is in force."""

from alembic import op

revision = "0011"
down_revision = "0010"

# The first step of a rolling deploy: workers of the former release go on with the files that they carry. The first
# start of a new one registers its own. The log of catalogues only grows; the newest version wins from its moment on.
STATEMENTS = [
    """
    CREATE TABLE catalogue_version (
        version integer PRIMARY KEY CHECK (version >= 1),
        digest text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),
        content text NOT NULL,
        effective_from timestamptz NOT NULL,
        applied_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        applied_by text NOT NULL,
        reason text
    )
    """,
]


def upgrade() -> None:
    """Create the table, empty."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop the table: workers then price by the files that they carry, as before."""
    op.execute("DROP TABLE catalogue_version")
