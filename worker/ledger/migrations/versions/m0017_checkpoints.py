"""The checkpoints of the proof, and the position of the run that is under way."""

from alembic import op

revision = "0017"
down_revision = "0016"

# New tables: a worker of the former release does not know them, and proves everything from zero beside the new ones.
# They reference no account, as that would lock its row. The state is `json`, not `jsonb`: its text stays as sealed.
STATEMENTS = [
    """
    CREATE TABLE proof_checkpoint (
        user_id text COLLATE "C" PRIMARY KEY,
        seq bigint NOT NULL CHECK (seq >= 0),
        digest bytea NOT NULL,
        form integer NOT NULL,
        state json NOT NULL,
        stands bigint NOT NULL,
        whole_on date NOT NULL,
        seal bytea NOT NULL,
        doubted boolean NOT NULL DEFAULT false,
        proven_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    """
    CREATE TABLE proof_run (
        only_row boolean NOT NULL DEFAULT true PRIMARY KEY CHECK (only_row),
        number bigint NOT NULL CHECK (number > 0),
        step bigint NOT NULL DEFAULT 0,
        started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        finished_at timestamptz,
        after text COLLATE "C" NOT NULL DEFAULT '',
        in_hand json,
        from_zero bigint NOT NULL DEFAULT 0,
        from_checkpoint bigint NOT NULL DEFAULT 0,
        changes bigint NOT NULL DEFAULT 0,
        differences bigint NOT NULL DEFAULT 0,
        found json NOT NULL DEFAULT '[]'
    )
    """,
]


def upgrade() -> None:
    """Create the tables, empty: the next proof of each account begins at zero."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop the tables. Nothing is lost but time: they say nothing that the rows of the ledger do not say."""
    for table in ("proof_run", "proof_checkpoint"):
        op.execute(f"DROP TABLE {table}")
