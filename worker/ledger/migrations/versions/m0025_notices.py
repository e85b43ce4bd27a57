"""Notices: what accounts and operators are told, where it is sent, and what became of it."""

from alembic import op

revision = "0025"
down_revision = "0024"

# The first step of a rolling deploy: new tables, and a column that may be NULL. Workers of the former release write no
# notices, so what happens in their batches is not told.
STATEMENTS = [
    # Rules of an account, in force instead of the plan's.
    "ALTER TABLE account ADD COLUMN notices jsonb",
    """
    CREATE TABLE notice (
        notice_id text COLLATE "C" PRIMARY KEY,
        number bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
        user_id text COLLATE "C" NOT NULL,
        meter text COLLATE "C" NOT NULL,
        kind text NOT NULL,
        rule text COLLATE "C" NOT NULL,
        period text COLLATE "C" NOT NULL,
        times integer NOT NULL CHECK (times > 0),
        created_at timestamptz NOT NULL,
        due_at timestamptz NOT NULL,
        position bigint,
        data jsonb NOT NULL,
        UNIQUE (user_id, rule, meter, period, times),
        UNIQUE (position)
    )
    """,
    "CREATE INDEX notice_due ON notice (due_at, number) WHERE position IS NULL",
    # The last place in the feed that was given.
    """
    CREATE TABLE notice_line (
        only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
        position bigint NOT NULL CHECK (position >= 0)
    )
    """,
    """
    CREATE TABLE notice_alarm (
        user_id text COLLATE "C" NOT NULL,
        meter text COLLATE "C" NOT NULL,
        rule text COLLATE "C" NOT NULL,
        period text COLLATE "C" NOT NULL,
        times integer NOT NULL CHECK (times > 0),
        is_open boolean NOT NULL,
        PRIMARY KEY (user_id, meter, rule)
    )
    """,
    """
    CREATE TABLE webhook (
        webhook_id text COLLATE "C" PRIMARY KEY,
        url text NOT NULL,
        kinds text[],
        position bigint NOT NULL CHECK (position >= 0),
        created_at timestamptz NOT NULL,
        created_by text
    )
    """,
    # A table of its own, so that only senders may read it.
    """
    CREATE TABLE webhook_secret (
        webhook_id text COLLATE "C" NOT NULL REFERENCES webhook ON DELETE CASCADE,
        secret text NOT NULL,
        created_at timestamptz NOT NULL,
        ends_at timestamptz,
        PRIMARY KEY (webhook_id, created_at)
    )
    """,
    """
    CREATE TABLE notice_delivery (
        webhook_id text COLLATE "C" NOT NULL REFERENCES webhook ON DELETE CASCADE,
        notice_id text COLLATE "C" NOT NULL REFERENCES notice ON DELETE CASCADE,
        user_id text COLLATE "C" NOT NULL,
        position bigint NOT NULL,
        state text NOT NULL CHECK (state IN ('waiting', 'delivered', 'dead')),
        attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
        next_at timestamptz CHECK (next_at IS NULL OR state = 'waiting'),
        error text,
        ended_at timestamptz CHECK ((ended_at IS NULL) = (state = 'waiting')),
        PRIMARY KEY (webhook_id, notice_id)
    )
    """,
    "CREATE INDEX notice_delivery_next ON notice_delivery (webhook_id, next_at) WHERE next_at IS NOT NULL",
    "CREATE INDEX notice_delivery_lane ON notice_delivery (webhook_id, user_id, position) WHERE state = 'waiting'",
    "CREATE INDEX notice_delivery_dead ON notice_delivery (webhook_id, position) WHERE state = 'dead'",
    "CREATE INDEX notice_delivery_notice ON notice_delivery (notice_id)",
]


def upgrade() -> None:
    """Make the tables."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop them, with what was not delivered yet and the rules of accounts; balances stay as they are."""
    for table in ("notice_delivery", "webhook_secret", "webhook", "notice_alarm", "notice_line", "notice"):
        op.execute(f"DROP TABLE {table}")
    op.execute("ALTER TABLE account DROP COLUMN notices")
