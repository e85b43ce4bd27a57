"""Accounts that live for years: boundaries of periods, scheduled changes, sub-caps per backend, erasure."""

from alembic import op

revision = "0002"
down_revision = "0001"

# Older workers go on beside newer ones: every new column has a default, and none is renamed.
STATEMENTS = [
    # The clock of the ledger. A function, so that a test can set it in a database of its own.
    "CREATE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT clock_timestamp()'",
    # The key of the hashes that name closed accounts; without the database they lead to no person.
    "ALTER TABLE ledger ADD COLUMN pseudonym_key uuid NOT NULL DEFAULT gen_random_uuid()",
    """
    ALTER TABLE account
        ADD COLUMN highest_tier integer NOT NULL DEFAULT 0 CHECK (highest_tier >= 0),
        ADD COLUMN next_plan text,
        ADD COLUMN plan_change_at timestamptz CHECK (plan_change_at IS NULL OR next_plan IS NOT NULL),
        ADD COLUMN next_status text CHECK (next_status IN ('canceled', 'expired')),
        ADD COLUMN status_change_at timestamptz CHECK ((status_change_at IS NULL) = (next_status IS NULL)),
        DROP CONSTRAINT account_status_check,
        ADD CONSTRAINT account_status_check CHECK (
            status IN ('active', 'past_due', 'trialing', 'canceled', 'expired', 'paused', 'unpaid', 'closed')
        )
    """,
    # Sub-caps in force and their usage; lifetime usage that waits until its plan returns. Absent = none.
    """
    ALTER TABLE balance
        ADD COLUMN caps jsonb,
        ADD COLUMN cap_used jsonb,
        ADD COLUMN parked jsonb,
        DROP CONSTRAINT balance_period_index_check,
        ADD CONSTRAINT balance_period_index_check CHECK (period_index >= -1)
    """,
    # Until now a period of a calendar cadence had no end; its first boundary is one step after its anchor.
    """
    UPDATE balance SET period_end = (anchored_at AT TIME ZONE 'UTC' + CASE cadence
        WHEN 'monthly' THEN interval '1 month' WHEN 'weekly' THEN interval '7 days' ELSE interval '1 day' END
    ) AT TIME ZONE 'UTC'
    WHERE period_end IS NULL AND cadence IN ('monthly', 'weekly', 'daily')
    """,
    # For due accounts. Neither column changes with usage, so updates of balances still stay within their page.
    """
    CREATE INDEX balance_due ON balance (period_end, user_id)
        WHERE anchor = 'sticky' AND cadence IN ('monthly', 'weekly', 'daily')
    """,
    """
    CREATE INDEX account_change_due ON account (least(plan_change_at, status_change_at), user_id)
        WHERE plan_change_at IS NOT NULL OR status_change_at IS NOT NULL
    """,
    "ALTER TABLE ledger_hold ADD COLUMN backend text",
    # After an account is closed, its history may take a pseudonym and lose personal data; nothing else of it changes.
    """
    CREATE FUNCTION allow_only_erasure() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        personal text[] := ARRAY['user_id', 'reference_id', 'hold_key', 'dimensions'];
    BEGIN
        IF NEW.user_id LIKE 'closed:%'
            AND EXISTS (SELECT FROM account WHERE user_id = OLD.user_id AND status = 'closed')
            AND to_jsonb(NEW) - personal = to_jsonb(OLD) - personal
        THEN
            RETURN NEW;
        END IF;
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'object_not_in_prerequisite_state';
    END
    $$
    """,
]
APPEND_ONLY = ["usage_log", "ledger_entry"]
TRIGGER = "CREATE TRIGGER {0}_append_only BEFORE {1} ON {0} FOR EACH ROW EXECUTE FUNCTION {2}()"


def upgrade() -> None:
    """Create everything."""
    for statement in STATEMENTS:
        op.execute(statement)
    for table in APPEND_ONLY:
        op.execute(f"DROP TRIGGER {table}_append_only ON {table}")
        op.execute(TRIGGER.format(table, "DELETE", "refuse_change"))
        op.execute(
            f"CREATE TRIGGER {table}_only_erased BEFORE UPDATE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION allow_only_erasure()"
        )


def downgrade() -> None:
    """Drop everything. The content of the newer columns is lost; a closed account counts as canceled."""
    for table in APPEND_ONLY:
        op.execute(f"DROP TRIGGER {table}_only_erased ON {table}")
        op.execute(f"DROP TRIGGER {table}_append_only ON {table}")
        op.execute(TRIGGER.format(table, "UPDATE OR DELETE", "refuse_change"))
    op.execute("DROP FUNCTION allow_only_erasure()")
    op.execute("ALTER TABLE ledger_hold DROP COLUMN backend")
    op.execute("DROP INDEX account_change_due")
    op.execute("DROP INDEX balance_due")
    op.execute("UPDATE balance SET period_index = 0 WHERE period_index < 0")
    op.execute(
        "ALTER TABLE balance DROP COLUMN parked, DROP COLUMN cap_used, DROP COLUMN caps, "
        "DROP CONSTRAINT balance_period_index_check, "
        "ADD CONSTRAINT balance_period_index_check CHECK (period_index >= 0)"
    )
    op.execute("UPDATE account SET status = 'canceled' WHERE status = 'closed'")
    op.execute(
        "ALTER TABLE account DROP COLUMN status_change_at, DROP COLUMN next_status, DROP COLUMN plan_change_at, "
        "DROP COLUMN next_plan, DROP COLUMN highest_tier, DROP CONSTRAINT account_status_check, "
        "ADD CONSTRAINT account_status_check CHECK "
        "(status IN ('active', 'past_due', 'trialing', 'canceled', 'expired', 'paused', 'unpaid'))"
    )
    op.execute("ALTER TABLE ledger DROP COLUMN pseudonym_key")
    op.execute("DROP FUNCTION ledger_now()")
