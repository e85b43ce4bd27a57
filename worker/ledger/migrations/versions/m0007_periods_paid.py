"""Periods that invoices pay: who vouches for an open one, what was paid, changes that wait, and time zones."""

from alembic import op

revision = "0007"
down_revision = "0006"

# The first step of a rolling deploy; the new workers, which fill the columns, are the second. A worker of the former
# release names the columns that it reads and writes, so it goes on beside the new ones. NULL means what it left: the
# bounds of a period vouch for it, and its usage counts from its start. So no row needs to be rewritten.
#
# Where a worker of the former release opens a period that a new one had marked, the mark falls: its statement does not
# name the columns. The first trigger fires only for a statement that names them; triggers of one kind fire by name.
STATEMENTS = [
    """
    ALTER TABLE balance
        ADD COLUMN backing text CHECK (backing IN ('none', 'trial', 'bounds', 'invoice', 'grace', 'missing')),
        ADD COLUMN counted_from timestamptz,
        ADD COLUMN timezone text
    """,
    """
    ALTER TABLE account
        ADD COLUMN paid_from timestamptz,
        ADD COLUMN paid_until timestamptz,
        ADD COLUMN waiting jsonb,
        ADD COLUMN waiting_at timestamptz,
        ADD COLUMN timezone text
    """,
    # For due accounts. Usage changes none of these columns, so updates of balances still stay within their page.
    """
    CREATE INDEX balance_provided ON balance (period_end, user_id)
        WHERE cadence = 'subscription' AND period_end IS NOT NULL
    """,
    "CREATE INDEX account_waiting ON account (waiting_at, user_id) WHERE waiting_at IS NOT NULL",
    """
    CREATE FUNCTION note_backing() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM set_config('meterfall.knows_backing', 'on', true);
        RETURN NULL;
    END
    $$
    """,
    """
    CREATE FUNCTION forget_backing() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.backing := NULL;
        NEW.counted_from := NULL;
        RETURN NEW;
    END
    $$
    """,
    """
    CREATE TRIGGER backing_is_known BEFORE UPDATE OF backing ON balance
        FOR EACH STATEMENT EXECUTE FUNCTION note_backing()
    """,
    """
    CREATE TRIGGER backing_is_stale BEFORE UPDATE OF period_start ON balance
        FOR EACH ROW WHEN (current_setting('meterfall.knows_backing', true) IS DISTINCT FROM 'on')
        EXECUTE FUNCTION forget_backing()
    """,
]


def upgrade() -> None:
    """Add the columns, empty."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop the columns: who vouches for a period is lost, and so are changes that wait; periods and buckets stay."""
    op.execute("DROP TRIGGER backing_is_stale ON balance")
    op.execute("DROP TRIGGER backing_is_known ON balance")
    op.execute("DROP FUNCTION forget_backing()")
    op.execute("DROP FUNCTION note_backing()")
    op.execute("DROP INDEX account_waiting")
    op.execute("DROP INDEX balance_provided")
    for column in ("timezone", "waiting_at", "waiting", "paid_until", "paid_from"):
        op.execute(f"ALTER TABLE account DROP COLUMN {column}")
    for column in ("timezone", "counted_from", "backing"):
        op.execute(f"ALTER TABLE balance DROP COLUMN {column}")
