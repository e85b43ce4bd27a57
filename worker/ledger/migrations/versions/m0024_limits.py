"""Limits of what an account spends per day, week or month, and the accounts that pay by their allowance alone."""

from alembic import op

revision = "0024"
down_revision = "0023"

# The first step of a rolling deploy; the new workers, which fill the columns, are the second. A column that may be NULL
# costs a row nothing, and no table is rewritten.
#
# `limits` has the amounts and the open windows. `counted` in it are the units consumed in the life of the balance when
# it was written: what was consumed since is used of each window. So an event does not write the column, and a worker of
# the former release, which counts the life as well, counts it rightly. That worker opens no window: what it applies
# counts in the one before.
STATEMENTS = [
    """
    ALTER TABLE balance ADD COLUMN limits jsonb,
        ADD CONSTRAINT balance_limits_check CHECK (limits ?& ARRAY['amounts', 'windows', 'counted'])
    """,
    "ALTER TABLE account ADD COLUMN pay_from text CONSTRAINT account_pay_from_check CHECK (pay_from = 'allowance')",
]


def upgrade() -> None:
    """Add the columns, empty."""
    for statement in STATEMENTS:
        op.execute(statement)


# Workers that hold an account finish first, in the order of their locks, and none writes until we are done: so each seq
# below is the newest.
_LOCK = "LOCK TABLE account, balance IN EXCLUSIVE MODE"

# An entry for each balance, and for each account, says so and keeps what there was. So the books stay proved, also if
# the tables come forward again.
_FORGET = [
    """
    INSERT INTO ledger_entry (user_id, seq, entry_key, meter, kind, used_change, rollover_change, purchased_change,
        used_after, rollover_after, purchased_after, detail, created_at)
    SELECT user_id, seq, 'forget_limits:' || seq, meter, 'forget_limits', 0, 0, 0, used, rollover, purchased,
        jsonb_build_object('limits', NULL, 'before', limits), ledger_now()
    FROM (
        SELECT account.seq + row_number() OVER (PARTITION BY user_id ORDER BY meter) AS seq, balance.*
        FROM balance JOIN account USING (user_id) WHERE limits IS NOT NULL
    ) AS forgotten
    """,
    """
    UPDATE account SET seq = seq + forgotten.meters
    FROM (SELECT user_id, count(*) AS meters FROM balance WHERE limits IS NOT NULL GROUP BY user_id) AS forgotten
    WHERE forgotten.user_id = account.user_id
    """,
    """
    INSERT INTO ledger_entry (user_id, seq, entry_key, meter, kind, used_change, rollover_change, purchased_change,
        used_after, rollover_after, purchased_after, detail, created_at)
    SELECT user_id, seq + 1, 'forget_limits:' || seq + 1, '', 'forget_limits', 0, 0, 0, 0, 0, 0,
        jsonb_build_object('pay_from', NULL, 'before', pay_from), ledger_now()
    FROM account WHERE pay_from IS NOT NULL
    """,
    "UPDATE account SET seq = seq + 1 WHERE pay_from IS NOT NULL",
]


def downgrade() -> None:
    """Forget the limits: nothing bounds what the accounts spend but their allowance and their credits."""
    for statement in (_LOCK, *_FORGET):
        op.execute(statement)
    op.execute("ALTER TABLE balance DROP COLUMN limits")
    op.execute("ALTER TABLE account DROP COLUMN pay_from")
