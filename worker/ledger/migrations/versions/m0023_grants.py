"""What is left of each grant of credit, and which grants an event took its units from."""

from alembic import op

revision = "0023"
down_revision = "0022"

# In the row of the balance, so that one look says whether the two fit.
GRANTS_FIT = """
    CREATE FUNCTION grants_fit(grants jsonb, purchased bigint) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
        SELECT coalesce(
            coalesce(sum(each."left") FILTER (WHERE half = 'in_force'), 0) = purchased
                AND count(*) = count(DISTINCT each.key)
                AND coalesce(bool_and(
                    each."left" > 0 AND each."left" <= coalesce(each.given, each."left")
                    AND (each.key = '') = (each.given IS NULL)
                    AND each.priority BETWEEN 0 AND 100 AND each.category IN ('paid', 'promotional')
                ), true),
            false
        )
        FROM unnest(ARRAY['in_force', 'to_come']) AS half
        CROSS JOIN LATERAL jsonb_to_recordset(grants -> half)
            AS each (key text, given bigint, "left" bigint, category text, priority integer)
    $$
    """

# The first step of a rolling deploy; the new workers, which fill the columns, are the second. A column that may be NULL
# costs a row nothing, and no table is rewritten. NULL says that no order gave any of the purchased units: so the units
# of before this migration are one paid grant without an end, and their accounts take the same path as before.
#
# A worker of the former release changes purchased units and leaves the grants as they were. The trigger then takes the
# units in the order in which the grants are stored, which is the one in which they pay, or adds them to the credit
# without an order; `add_units` in worker/rules/credits.py is the same rule. So both releases may write one account.
# The former release knows no end of a grant: give the first one after its last dyno has stopped.
STATEMENTS = [
    # Workers that hold an account finish first, and no other begins: none of them holds a balance then and waits for
    # the log, which we hold. The log comes before the balances, so that these are read while a long query of the log
    # keeps us waiting.
    "LOCK TABLE account IN EXCLUSIVE MODE",
    "ALTER TABLE usage_log ADD COLUMN grants jsonb",
    GRANTS_FIT,
    """
    ALTER TABLE balance ADD COLUMN grants jsonb, ADD COLUMN grants_due timestamptz,
        ADD CONSTRAINT balance_grants_check CHECK (grants IS NULL OR grants_fit(grants, purchased))
    """,
    "CREATE INDEX balance_grants_due ON balance (grants_due, user_id) WHERE grants_due IS NOT NULL",
    """
    CREATE FUNCTION keep_grants() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        units bigint := 0;
        part bigint;
        each jsonb;
        kept jsonb := '[]';
        spare jsonb := jsonb_build_object(
            'key', '', 'given', NULL, 'left', 0, 'category', 'paid', 'priority', 50, 'expires_at', NULL,
            'effective_at', '0001-01-01T00:00:00+00:00', 'created_at', '0001-01-01T00:00:00+00:00'
        );
    BEGIN
        IF TG_OP = 'UPDATE' AND NEW.grants = OLD.grants THEN
            units := OLD.purchased - NEW.purchased;
            IF NEW.user_id <> OLD.user_id AND NEW.purchased = 0 THEN
                NEW.grants := NULL;  -- closed: nothing is to come either
            END IF;
        END IF;
        IF units <> 0 AND NEW.grants IS NOT NULL THEN
            FOR each IN
                SELECT value FROM jsonb_array_elements(NEW.grants -> 'in_force') WITH ORDINALITY ORDER BY ordinality
            LOOP
                IF units < 0 AND each ->> 'key' = '' THEN
                    each := jsonb_set(each, '{left}', to_jsonb((each ->> 'left')::bigint - units));
                    units := 0;
                ELSIF units < 0 AND ((each ->> 'priority')::integer > 50 OR (each ->> 'priority')::integer = 50
                        AND each ->> 'expires_at' IS NULL AND each ->> 'category' = 'paid') THEN
                    kept := kept || jsonb_build_array(jsonb_set(spare, '{left}', to_jsonb(- units)));
                    units := 0;
                ELSIF units > 0 THEN
                    part := least(units, (each ->> 'left')::bigint);
                    units := units - part;
                    each := jsonb_set(each, '{left}', to_jsonb((each ->> 'left')::bigint - part));
                END IF;
                IF (each ->> 'left')::bigint > 0 THEN
                    kept := kept || jsonb_build_array(each);
                END IF;
            END LOOP;
            IF units < 0 THEN
                kept := kept || jsonb_build_array(jsonb_set(spare, '{left}', to_jsonb(- units)));
            END IF;
            NEW.grants := jsonb_set(NEW.grants, '{in_force}', kept);
            IF NEW.grants -> 'to_come' = '[]' AND NOT EXISTS (
                SELECT FROM jsonb_array_elements(kept) WHERE value ->> 'key' <> ''
            ) THEN
                NEW.grants := NULL;
            END IF;
        END IF;
        NEW.grants_due := (
            SELECT min(at) FROM (
                SELECT (value ->> 'expires_at')::timestamptz AS at FROM jsonb_array_elements(NEW.grants -> 'in_force')
                UNION ALL
                SELECT (value ->> 'effective_at')::timestamptz FROM jsonb_array_elements(NEW.grants -> 'to_come')
            ) AS boundary
        );
        RETURN NEW;
    END
    $$
    """,
    # Of a balance without grants it costs the look at two columns.
    """
    CREATE TRIGGER keep_grants BEFORE INSERT OR UPDATE ON balance FOR EACH ROW
    WHEN (NEW.grants IS NOT NULL OR NEW.grants_due IS NOT NULL) EXECUTE FUNCTION keep_grants()
    """,
]


def upgrade() -> None:
    """Add the columns, empty."""
    for statement in STATEMENTS:
        op.execute(statement)


# Workers that hold an account finish first, in the order of their locks, and none writes until we are done: so each seq
# and each amount below is the newest.
_LOCK = "LOCK TABLE account, balance IN EXCLUSIVE MODE"

# Purchased units stay; what they do not count, or no longer should, would be lost or come back to life.
_REFUSE = """
    DO $$
    DECLARE
        found record;
    BEGIN
        SELECT count(*) AS balances, min(user_id) AS first INTO found FROM balance WHERE grants -> 'to_come' <> '[]';
        IF found.balances > 0 THEN
            RAISE EXCEPTION 'this step back would lose credit to come of % balances, the first of %', found.balances,
                found.first || '; undo these grants (meterfall account undo USER grant:ORDER), or wait until they start'
                USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
        SELECT count(*) AS balances, min(user_id) AS first INTO found FROM balance WHERE grants_due <= ledger_now();
        IF found.balances > 0 THEN
            RAISE EXCEPTION 'credit of % balances has ended, but not by an entry yet, the first of %', found.balances,
                found.first || '; let the job renew_due of a worker of this release store it, and repeat'
                USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
    END
    $$
    """

# An entry for each balance says so, and keeps what was left. So the books stay proved, also if the tables come forward
# again.
_MERGE = [
    """
    INSERT INTO ledger_entry (user_id, seq, entry_key, meter, kind, used_change, rollover_change, purchased_change,
        used_after, rollover_after, purchased_after, detail, created_at)
    SELECT user_id, seq, 'merge_grants:' || seq, meter, 'merge_grants', 0, 0, 0, used, rollover, purchased,
        jsonb_build_object('grants', grants), ledger_now()
    FROM (
        SELECT account.seq + row_number() OVER (PARTITION BY user_id ORDER BY meter) AS seq, balance.*
        FROM balance JOIN account USING (user_id) WHERE grants IS NOT NULL
    ) AS merged
    """,
    """
    UPDATE account SET seq = seq + merged.meters
    FROM (SELECT user_id, count(*) AS meters FROM balance WHERE grants IS NOT NULL GROUP BY user_id) AS merged
    WHERE merged.user_id = account.user_id
    """,
]


def downgrade() -> None:
    """Forget the grants: purchased units stay, without an end.

    Refused while credit is to come, which nothing else would keep, and while an end that is due has no entry.
    """
    for statement in (_LOCK, _REFUSE, *_MERGE):
        op.execute(statement)
    op.execute("ALTER TABLE usage_log DROP COLUMN grants")
    op.execute("DROP TRIGGER keep_grants ON balance")
    op.execute("DROP FUNCTION keep_grants()")
    op.execute("ALTER TABLE balance DROP COLUMN grants, DROP COLUMN grants_due")
    op.execute("DROP FUNCTION grants_fit(jsonb, bigint)")
