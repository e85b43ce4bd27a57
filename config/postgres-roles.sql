-- Roles of Postgres, each with what its job needs and nothing else. As the owner of the tables, after every migration:
--
--     meterfall migrate --roles
--
-- or:  psql "$METERFALL_MIGRATE_URL" --set ON_ERROR_STOP=1 --file config/postgres-roles.sql
--
-- These roles cannot log in. Give them to users that can; DATABASE_URL then names these users:
--
--     CREATE ROLE billing_worker LOGIN PASSWORD '…' IN ROLE meterfall_worker;
--
-- Then apply this file once more: it gives these users the time-outs that a pooler would not pass on.
-- Its first run needs CREATEROLE. Repeating is harmless, and revokes the grants of an older file.
-- It grants the tables in the first schema of the search path. tests/project/test_roles.py does the whole job of each role
-- under this file.

BEGIN;

DO $$
DECLARE
    ours constant text[] := ARRAY['meterfall_producer', 'meterfall_tiers', 'meterfall_worker', 'meterfall_operator',
        'meterfall_monitor', 'meterfall_keys', 'meterfall_service'];
    names constant text := array_to_string(ours, ', ');
    role text;
    member text;
    wanted text[];
BEGIN
    FOREACH role IN ARRAY ours LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', role);
        END IF;
    END LOOP;
    -- Only the owner makes tables here, even temporary ones.
    EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC', current_schema());
    EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA %I FROM %s', current_schema(), names);
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO %s', current_schema(), names);
    -- The revision of the tables, which every process compares at its start.
    EXECUTE format('GRANT SELECT ON meterfall_version TO %s', names);

    -- Settings of a session are those of who logs in, not of the roles that they are in. A setting that an administrator
    -- has made stays. Without METERFALL_DATABASE_POOLED each connection sets the same by itself.
    FOR member IN
        SELECT rolname FROM pg_roles AS login
        WHERE rolcanlogin AND NOT rolsuper
            AND EXISTS (SELECT FROM unnest(ours) AS each WHERE pg_has_role(login.oid, each, 'MEMBER'))
    LOOP
        FOREACH wanted SLICE 1 IN ARRAY ARRAY[
            ['statement_timeout', '5s'], ['lock_timeout', '2s'], ['idle_in_transaction_session_timeout', '10s'],
            ['timezone', 'UTC'], ['search_path', current_schema()::text]
        ] LOOP
            IF wanted <> ARRAY['search_path', 'public'] AND NOT EXISTS (
                SELECT FROM pg_db_role_setting, unnest(setconfig) AS setting
                WHERE setrole IN (0, member::regrole) AND setdatabase IN
                        (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
                    AND lower(setting) LIKE wanted[1] || '=%'
            ) THEN
                BEGIN
                    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET %s = %L', member, current_database(),
                        wanted[1], wanted[2]);
                EXCEPTION WHEN insufficient_privilege THEN
                    RAISE NOTICE '% keeps its %: an administrator may set it', member, wanted[1];
                END;
            END IF;
        END LOOP;
    END LOOP;
END
$$;

-- Services: balances that are not cached, the events in them, a user's standing with the sponsorship pool;
-- and holds while Redis is down. `pseudonym_key` in ledger tells them that an account was closed.
GRANT SELECT ON ledger, account, balance, ledger_hold, sponsor_pool TO meterfall_producer;
GRANT SELECT (user_id, event_id, seq, meter, quantity, multiplier, amount, from_subscription, from_rollover,
    from_purchased, overflow_to_debt, uncollected, wallet) ON usage_log TO meterfall_producer;
GRANT SELECT (user_id, window_start, absorbed) ON sponsor_grant TO meterfall_producer;
GRANT INSERT, UPDATE, DELETE ON ledger_hold TO meterfall_producer;
-- A hold locks its account. Postgres locks rows only for a role that may change some column: this one decides nothing.
GRANT UPDATE (opened_at) ON account TO meterfall_producer;

-- Dynos: apply events and boundaries, roll up, prove. The log, the ledger entries and the pool's grants only grow.
GRANT SELECT ON ledger, account, balance, usage_log, ledger_entry, order_key, ledger_hold, rollup_state, usage_rollup,
    document_rollup, document_lifetime, balance_checkpoint, sponsor_pool, sponsor_grant, sponsor_credit
    TO meterfall_worker;
GRANT INSERT ON usage_log, dead_letter, sponsor_pool, sponsor_grant, sponsor_credit TO meterfall_worker;
-- Reasons and times for the endpoint of a dyno; payloads stay unread.
GRANT SELECT (partition_id, entry_id, payload_hash, reason, state, created_at) ON dead_letter TO meterfall_worker;
GRANT INSERT, UPDATE ON rollup_state, usage_rollup, document_rollup, document_lifetime TO meterfall_worker;
GRANT INSERT ON balance_checkpoint TO meterfall_worker;
GRANT SELECT, INSERT, UPDATE ON report_state, usage_daily, usage_monthly TO meterfall_worker;
GRANT SELECT, INSERT, UPDATE ON proof_checkpoint, proof_run TO meterfall_worker;
GRANT UPDATE (balance, seq) ON sponsor_pool TO meterfall_worker;
GRANT UPDATE (partitions) ON ledger TO meterfall_worker;
GRANT DELETE ON ledger_hold TO meterfall_worker;
-- To note events that came again late.
GRANT SELECT, INSERT, UPDATE (times, last_at) ON late_repeat TO meterfall_worker;
-- To see pauses of partitions, and pause one. Only operators resume.
GRANT SELECT, INSERT ON partition_pause TO meterfall_worker;
-- The catalogue in force. A dyno registers the first one; operators apply others.
GRANT SELECT ON catalogue_version
    TO meterfall_producer, meterfall_tiers, meterfall_worker, meterfall_operator, meterfall_monitor;
GRANT INSERT ON catalogue_version TO meterfall_worker, meterfall_operator;

-- Notices are written with what they tell of, by whoever changes an account. Dynos send them; operators say where to,
-- and read them. Only dynos read the secrets that sign.
-- A service that opens accounts writes notices and reads none.
GRANT SELECT, INSERT ON notice TO meterfall_worker, meterfall_operator;
GRANT SELECT (notice_id), INSERT ON notice TO meterfall_tiers;
GRANT SELECT, INSERT, UPDATE ON notice_alarm TO meterfall_worker, meterfall_operator, meterfall_tiers;
GRANT UPDATE (position, data), DELETE ON notice TO meterfall_worker, meterfall_operator;
GRANT DELETE ON notice_alarm TO meterfall_operator;
GRANT SELECT, INSERT, UPDATE (position) ON notice_line TO meterfall_worker, meterfall_operator;
GRANT SELECT, INSERT, UPDATE ON notice_delivery TO meterfall_worker, meterfall_operator;
GRANT SELECT, UPDATE (position) ON webhook TO meterfall_worker;
GRANT SELECT ON webhook_secret TO meterfall_worker;
GRANT SELECT, INSERT, DELETE ON webhook TO meterfall_operator;
GRANT SELECT (webhook_id, created_at, ends_at), INSERT, UPDATE (ends_at) ON webhook_secret TO meterfall_operator;
-- The URL of a webhook may have a secret in its path: a monitor counts, and reads none.
GRANT SELECT (webhook_id, position) ON webhook TO meterfall_monitor;
GRANT SELECT (webhook_id, notice_id, position, state) ON notice_delivery TO meterfall_monitor;
GRANT SELECT ON notice_line TO meterfall_monitor;
GRANT SELECT (notice_id, number, kind, due_at, position) ON notice TO meterfall_monitor;

-- The lives of Redis. Dynos and operators begin one where Redis lost its data; operators acknowledge that.
GRANT SELECT ON redis_life TO meterfall_worker, meterfall_operator, meterfall_monitor;
GRANT INSERT (token, found, began_at) ON redis_life TO meterfall_worker, meterfall_operator;
GRANT UPDATE (acknowledged_at, acknowledged_by, reason) ON redis_life TO meterfall_operator;

-- People, provider webhooks, and processes that run the commands about accounts, holds, dead letters and reports.
GRANT SELECT ON ledger, account, balance, usage_log, ledger_entry, order_key, dead_letter, ledger_hold, rollup_state,
    usage_rollup, document_rollup, document_lifetime, balance_checkpoint, sponsor_pool, sponsor_grant, sponsor_credit,
    report_state, usage_daily, usage_monthly TO meterfall_operator;
GRANT UPDATE (partitions, epoch) ON ledger TO meterfall_operator;
GRANT UPDATE (state, resolved_at, resolved_by, resolved_reason, resolved_letters) ON dead_letter TO meterfall_operator;
GRANT SELECT, INSERT, UPDATE (resumed_at, resumed_by, tolerated_to) ON partition_pause TO meterfall_operator;
GRANT SELECT ON late_repeat TO meterfall_operator;
-- `pending reconcile` writes down each id that it frees.
GRANT SELECT, INSERT ON freed_pending TO meterfall_operator;
GRANT DELETE ON ledger_hold TO meterfall_operator;
-- `account close` renames history and erases personal fields; the triggers refuse any other change.
GRANT UPDATE (user_id, reference_id, hold_key, dimensions, trace_id) ON usage_log TO meterfall_operator;
GRANT UPDATE (user_id, actor, reason) ON ledger_entry TO meterfall_operator;
GRANT UPDATE (user_id) ON balance, freed_pending, late_repeat, order_key, report_state, usage_monthly
    TO meterfall_operator;
GRANT UPDATE (user_id, trace_id) ON sponsor_grant TO meterfall_operator;
-- `verify` keeps its checkpoints. `account close` deletes that of the account, and moves a run that was just there.
GRANT SELECT, INSERT, UPDATE, DELETE ON proof_checkpoint TO meterfall_operator;
GRANT SELECT, UPDATE (step, after, in_hand) ON proof_run TO meterfall_operator;
-- An order or an invoice is claimed by the account that it pays for.
GRANT INSERT ON order_key TO meterfall_operator;
-- It waits for the pool's batch by its row. To lock the row, Postgres wants the right to change a column of it.
GRANT INSERT, UPDATE (opened_at) ON sponsor_pool TO meterfall_operator;
GRANT UPDATE (payload, detail, traceparent) ON dead_letter TO meterfall_operator;
GRANT DELETE ON account, rollup_state, usage_rollup, document_rollup, document_lifetime, balance_checkpoint
    TO meterfall_operator;
GRANT INSERT ON rollup_state TO meterfall_operator;

-- People who only look, and the programs that watch: `status`, metrics, reports. No events' payloads.
GRANT SELECT ON ledger, account, balance, usage_log, ledger_entry, order_key, ledger_hold, rollup_state, usage_rollup,
    document_rollup, document_lifetime, balance_checkpoint, sponsor_pool, sponsor_grant, sponsor_credit, late_repeat,
    partition_pause, report_state, usage_daily TO meterfall_monitor;
GRANT SELECT (id, partition_id, entry_id, reason, state, created_at, resolved_at) ON dead_letter TO meterfall_monitor;

-- Opening and changing accounts: what workers and operators do, and services whose requests carry a tier
-- (`remaining(…, tier=…)`). Such a service is in both roles, meterfall_producer and meterfall_tiers.
GRANT INSERT ON account, balance, ledger_entry TO meterfall_worker, meterfall_operator, meterfall_tiers;
GRANT UPDATE (plan, status, trust, seq, highest_tier, next_plan, plan_change_at, next_status, status_change_at,
    paid_from, paid_until, waiting, waiting_at, timezone, pay_from, notices)
    ON account TO meterfall_worker, meterfall_operator, meterfall_tiers;
GRANT UPDATE (allowance, spill, rollover_cap, caps, cadence, anchor, anchored_at, period_index, period_start, period_end,
    backing, counted_from, timezone, used, rollover, purchased, cap_used, parked, carried, grants, limits,
    lifetime_consumed, lifetime_granted)
    ON balance TO meterfall_worker, meterfall_operator, meterfall_tiers;

-- API keys of the HTTP service. Its login is in meterfall_producer, meterfall_tiers, meterfall_operator and
-- meterfall_service: it does what all of them do, and tells by the digests whose a secret is. It makes no keys, so that
-- whoever breaks into it leaves none behind. People who make keys are in meterfall_keys; they see no digest, and need no other role.
GRANT SELECT ON api_key TO meterfall_service;
GRANT SELECT (key_id, name, role, created_at, created_by, reason, expires_at, revoked_at, revoked_by, revoked_reason),
    INSERT (key_id, name, role, created_at, created_by, reason, expires_at, digest),
    UPDATE (revoked_at, revoked_by, revoked_reason) ON api_key TO meterfall_keys;
GRANT SELECT (epoch) ON ledger TO meterfall_keys;  -- for the clock

-- Only the owner, who migrates, writes meterfall_version.

COMMIT;
