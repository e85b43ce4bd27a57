-- Roles of Postgres, each with what its job needs and nothing else. As the owner of the tables, after every migration:
--
--     meterfall migrate
--     psql "$DATABASE_URL" --set ON_ERROR_STOP=1 --file config/postgres-roles.sql
--
-- These roles cannot log in. Give them to users that can; DATABASE_URL then names these users:
--
--     CREATE ROLE billing_worker LOGIN PASSWORD '…' IN ROLE meterfall_worker;
--
-- Its first run needs CREATEROLE. Repeating is harmless, and revokes the grants of an older file.
-- It expects the tables in the schema public. tests/project/test_roles.py does the whole job of each role under this file.

BEGIN;

DO $$
DECLARE
    role text;
BEGIN
    FOREACH role IN ARRAY
        ARRAY['meterfall_producer', 'meterfall_tiers', 'meterfall_worker', 'meterfall_operator']
    LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', role);
        END IF;
    END LOOP;
    -- Only the owner makes tables here, even temporary ones.
    EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
END
$$;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA public
    FROM meterfall_producer, meterfall_tiers, meterfall_worker, meterfall_operator;
GRANT USAGE ON SCHEMA public TO meterfall_producer, meterfall_tiers, meterfall_worker, meterfall_operator;

-- Services: balances that are not cached, the events in them, a user's standing with the sponsorship pool;
-- and holds while Redis is down. `pseudonym_key` in ledger tells them that an account was closed.
GRANT SELECT ON ledger, account, balance, ledger_hold, sponsor_pool TO meterfall_producer;
GRANT SELECT (user_id, event_id, seq, meter, quantity, multiplier) ON usage_log TO meterfall_producer;
GRANT SELECT (user_id, window_start, absorbed) ON sponsor_grant TO meterfall_producer;
GRANT INSERT, UPDATE, DELETE ON ledger_hold TO meterfall_producer;
-- A hold locks its account. Postgres locks rows only for a role that may change some column: this one decides nothing.
GRANT UPDATE (opened_at) ON account TO meterfall_producer;

-- Dynos: apply events and boundaries, roll up, prove. The log, the ledger entries and the pool's grants only grow.
GRANT SELECT ON ledger, account, balance, usage_log, ledger_entry, ledger_hold, rollup_state, usage_rollup,
    document_rollup, document_lifetime, balance_checkpoint, sponsor_pool, sponsor_grant, sponsor_credit
    TO meterfall_worker;
GRANT INSERT ON usage_log, dead_letter, sponsor_pool, sponsor_grant, sponsor_credit TO meterfall_worker;
GRANT SELECT (partition_id, entry_id, payload_hash) ON dead_letter TO meterfall_worker;
GRANT INSERT, UPDATE ON rollup_state, usage_rollup, document_rollup, document_lifetime TO meterfall_worker;
GRANT INSERT ON balance_checkpoint TO meterfall_worker;
GRANT UPDATE (balance, seq) ON sponsor_pool TO meterfall_worker;
GRANT UPDATE (partitions) ON ledger TO meterfall_worker;
GRANT DELETE ON ledger_hold TO meterfall_worker;
-- To see pauses of partitions, and pause one. Only operators resume.
GRANT SELECT, INSERT ON partition_pause TO meterfall_worker;

-- People, provider webhooks, and processes that run the commands about accounts, holds, dead letters and reports.
GRANT SELECT ON ledger, account, balance, usage_log, ledger_entry, dead_letter, ledger_hold, rollup_state,
    usage_rollup, document_rollup, document_lifetime, balance_checkpoint, sponsor_pool, sponsor_grant, sponsor_credit
    TO meterfall_operator;
GRANT UPDATE (partitions, epoch) ON ledger TO meterfall_operator;
GRANT UPDATE (state, resolved_at) ON dead_letter TO meterfall_operator;
GRANT SELECT, INSERT, UPDATE (resumed_at, resumed_by, tolerated_to) ON partition_pause TO meterfall_operator;
GRANT DELETE ON ledger_hold TO meterfall_operator;
-- `account close` renames history and erases personal fields; the triggers refuse any other change.
GRANT UPDATE (user_id, reference_id, hold_key, dimensions) ON usage_log TO meterfall_operator;
GRANT UPDATE (user_id, actor, reason) ON ledger_entry TO meterfall_operator;
GRANT UPDATE (user_id) ON balance, sponsor_grant TO meterfall_operator;
-- It waits for the pool's batch by its row. To lock the row, Postgres wants the right to change a column of it.
GRANT INSERT, UPDATE (opened_at) ON sponsor_pool TO meterfall_operator;
GRANT UPDATE (payload, detail) ON dead_letter TO meterfall_operator;
GRANT DELETE ON account, rollup_state, usage_rollup, document_rollup, document_lifetime, balance_checkpoint
    TO meterfall_operator;
GRANT INSERT ON rollup_state TO meterfall_operator;

-- Opening and changing accounts: what workers and operators do, and services whose requests carry a tier
-- (`remaining(…, tier=…)`). Such a service is in both roles, meterfall_producer and meterfall_tiers.
GRANT INSERT ON account, balance, ledger_entry TO meterfall_worker, meterfall_operator, meterfall_tiers;
GRANT UPDATE (plan, status, trust, seq, highest_tier, next_plan, plan_change_at, next_status, status_change_at)
    ON account TO meterfall_worker, meterfall_operator, meterfall_tiers;
GRANT UPDATE (allowance, spill, rollover_cap, caps, cadence, anchor, anchored_at, period_index, period_start, period_end,
    used, rollover, purchased, cap_used, parked, lifetime_consumed, lifetime_granted)
    ON balance TO meterfall_worker, meterfall_operator, meterfall_tiers;

-- alembic_version belongs to the migrations, which run as the owner.

COMMIT;
