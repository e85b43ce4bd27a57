"""An order or an invoice counts once in all accounts; statuses that stop an account; ids that begin anew."""

from alembic import op

revision = "0008"
down_revision = "0007"

# The first step of a rolling deploy. A worker of the former release names the columns that it reads and writes, and
# the trigger notes the orders of its grants also.
_KINDS = "CASE kind WHEN 'grant' THEN 'grant' ELSE 'renew' END"
_KEY = "substr(entry_key, strpos(entry_key, ':') + 1)"
_STATUSES = "'active', 'past_due', 'trialing', 'canceled', 'expired', 'paused', 'unpaid'"
# The status of the former release that is nearest to a new one.
_BEFORE = "CASE status WHEN 'suspended' THEN 'paused' WHEN 'incomplete' THEN 'unpaid' ELSE 'expired' END"
_NEW = "status IN ('suspended', 'incomplete', 'incomplete_expired')"
STATEMENTS = [
    "ALTER TABLE account DROP CONSTRAINT account_status_check",
    f"""
    ALTER TABLE account ADD CONSTRAINT account_status_check
        CHECK (status IN ({_STATUSES}, 'incomplete', 'incomplete_expired', 'suspended', 'closed'))
    """,
    # The number of accounts of this id that were closed before it: their events stay known.
    "ALTER TABLE account ADD COLUMN reopened integer NOT NULL DEFAULT 0 CHECK (reopened >= 0)",
    # `shared`: several accounts had used the key before this migration; the first stands.
    """
    CREATE TABLE order_key (
        kind text NOT NULL CHECK (kind IN ('grant', 'renew')),
        key text COLLATE "C" NOT NULL,
        user_id text COLLATE "C" NOT NULL REFERENCES account (user_id),
        shared boolean NOT NULL DEFAULT false,
        PRIMARY KEY (kind, key)
    )
    """,
    "CREATE INDEX order_key_user ON order_key (user_id)",
    # As the owner: the roles of the former release may not write the table.
    f"""
    CREATE FUNCTION note_order() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    BEGIN
        INSERT INTO order_key (kind, key, user_id)
            SELECT {_KINDS}, {_KEY}, user_id FROM (SELECT NEW.kind, NEW.entry_key, NEW.user_id) AS entry
            ON CONFLICT DO NOTHING;
        RETURN NULL;
    END
    $$
    """,
    """
    CREATE TRIGGER note_order AFTER INSERT ON ledger_entry FOR EACH ROW
    WHEN (NEW.kind IN ('grant', 'renewal')) EXECUTE FUNCTION note_order()
    """,
    f"""
    INSERT INTO order_key (kind, key, user_id, shared)
    SELECT kind, key, (array_agg(user_id ORDER BY created_at, user_id))[1], count(DISTINCT user_id) > 1
    FROM (
        SELECT {_KINDS} AS kind, {_KEY} AS key, user_id, created_at
        FROM ledger_entry WHERE kind IN ('grant', 'renewal')
    ) AS used
    GROUP BY kind, key
    """,
]


def upgrade() -> None:
    """Note the orders and invoices of all accounts."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Forget which account used an order: each account knows its own again.

    Accounts in a new status take the nearest one of the former release, by a ledger entry each: the books stay proved.
    """
    op.execute("DROP TRIGGER note_order ON ledger_entry")
    op.execute("DROP FUNCTION note_order()")
    op.execute("DROP TABLE order_key")
    op.execute("ALTER TABLE account DROP COLUMN reopened")
    op.execute(
        f"""
        INSERT INTO ledger_entry (user_id, seq, entry_key, meter, kind, used_change, rollover_change, purchased_change,
            used_after, rollover_after, purchased_after, detail, created_at)
        SELECT user_id, seq + 1, 'status:' || to_char(ledger_now(), 'YYYY-MM-DD"T"HH24:MI:SS.USOF'), '', 'set_status',
            0, 0, 0, 0, 0, 0, jsonb_build_object('status', {_BEFORE}, 'before', status), ledger_now()
        FROM account WHERE {_NEW}
        """
    )
    op.execute(f"UPDATE account SET seq = seq + 1, status = {_BEFORE} WHERE {_NEW}")
    op.execute("ALTER TABLE account DROP CONSTRAINT account_status_check")
    op.execute(f"ALTER TABLE account ADD CONSTRAINT account_status_check CHECK (status IN ({_STATUSES}, 'closed'))")
