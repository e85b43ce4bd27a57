"""API keys of the HTTP service."""

from alembic import op

revision = "0027"
down_revision = "0026"

# The first step of a rolling deploy: a table of its own, which no earlier release reads. A revoked key keeps its row,
# as changes of accounts name it; its name may be given again.
STATEMENTS = [
    """
    CREATE TABLE api_key (
        key_id text COLLATE "C" PRIMARY KEY,
        name text COLLATE "C" NOT NULL,
        role text NOT NULL CHECK (role IN ('producer', 'reader', 'support', 'operator')),
        created_at timestamptz NOT NULL,
        created_by text NOT NULL,
        reason text,
        expires_at timestamptz CHECK (expires_at > created_at),
        revoked_at timestamptz,
        revoked_by text CHECK ((revoked_by IS NULL) = (revoked_at IS NULL)),
        revoked_reason text,
        digest bytea NOT NULL CHECK (octet_length(digest) = 32)
    )
    """,
    "CREATE UNIQUE INDEX api_key_name ON api_key (name) WHERE revoked_at IS NULL",
]


def upgrade() -> None:
    """Make the table."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop it with all keys: the services that have them are let in no more."""
    op.execute("DROP TABLE api_key")
